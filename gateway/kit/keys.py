"""Client keys: how they look, how they are stored. 256 random bits, a prefix that scanners find, a checksum."""

from __future__ import annotations

import binascii
import functools
import hmac
import re
import secrets

PREFIX = "sk-xenios-"
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_LENGTH = 43  # 62**43 > 2**256
_CHECK_LENGTH = 6
HASH_PREFIX = "hmac-sha256:"
_HASH = re.compile(r"hmac-sha256:[0-9a-f]{64}")


def new_key() -> str:
    """A new key: `sk-xenios-` + 43 characters of secret + 6 of checksum. Show it once, store its hash."""
    secret = _base62(secrets.randbits(256), _SECRET_LENGTH)
    return PREFIX + secret + _checksum(secret)


def is_well_formed(key: str) -> bool:
    """Has the prefix, the length and the checksum of a key of ours: tells a typo from a key that isn't known."""
    body = key.removeprefix(PREFIX)
    if body == key or len(body) != _SECRET_LENGTH + _CHECK_LENGTH or not body.isascii():
        return False
    return hmac.compare_digest(_checksum(body[:_SECRET_LENGTH]), body[_SECRET_LENGTH:])


def hash_key(key: str, pepper: str) -> str:
    """What is stored: `hmac-sha256:` and 64 hex digits. A random key of 256 bits needs no slow hash."""
    keyed = _keyed(pepper).copy()
    keyed.update(key.encode())
    return HASH_PREFIX + keyed.hexdigest()


@functools.lru_cache(maxsize=8)
def _keyed(pepper: str) -> hmac.HMAC:
    """Setting up an HMAC costs more than using it."""
    return hmac.new(pepper.encode(), digestmod="sha256")


def is_hash(text: str) -> bool:
    return _HASH.fullmatch(text) is not None


def _checksum(secret: str) -> str:
    return _base62(binascii.crc32(secret.encode()), _CHECK_LENGTH)


def _base62(number: int, length: int) -> str:
    out = ""
    for _ in range(length):
        number, digit = divmod(number, 62)
        out = _ALPHABET[digit] + out
    return out
