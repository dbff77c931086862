import hashlib
import hmac

from hypothesis import assume, given
from hypothesis import strategies as st

from gateway.kit import hash_key, is_well_formed, new_key
from gateway.kit.keys import PREFIX, is_hash

# A key made by `xenios keys hash --new`, kept as it is: keys that users hold must stay valid.
KNOWN = "sk-xenios-003aUlTJC7tjlCTQj2uNU3MFagCXG9LRKRcwGkBIDlf1Yo7hP"
KEY = new_key()


def test_a_new_key_is_well_formed_and_new():
    """Each new key has the prefix that secret scanners find, 49 letters and digits, and is nobody else's."""
    keys = {new_key() for _ in range(200)}
    assert len(keys) == 200
    for key in keys:
        body = key.removeprefix(PREFIX)
        assert key.startswith("sk-xenios-")
        assert (len(body), body.isalnum(), body.isascii()) == (49, True, True)
        assert is_well_formed(key)


def test_old_keys_stay_valid():
    """A key made by an earlier version, and the hash that was stored for it, still fit."""
    assert is_well_formed(KNOWN)
    stored = "hmac-sha256:fdf43b66d2c4081b268296e5a8dd59227b3ba0eed26add2b9e84935616de42c4"
    assert hash_key(KNOWN, "pepper") == stored


@given(at=st.integers(len(PREFIX), len(KEY) - 1), char=st.characters(codec="utf-8"))
def test_one_wrong_character_is_noticed(at, char):
    """A key with one character mistyped is told apart from a key that isn't known."""
    assume(KEY[at] != char)
    assert not is_well_formed(KEY[:at] + char + KEY[at + 1 :])


@given(st.text())
def test_other_texts_are_no_keys(text):
    """Whatever is sent as a key is judged without an error."""
    assert not is_well_formed(text)
    assert not is_well_formed(PREFIX + text[:49])
    assert not is_well_formed(KEY + text) or not text


def test_a_key_without_its_prefix_is_none():
    """A key that lost its prefix is no key."""
    assert not is_well_formed(KEY.removeprefix(PREFIX))
    assert not is_well_formed(PREFIX + PREFIX + KEY.removeprefix(PREFIX))


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"), min_size=1))
def test_a_hash_is_hmac_sha256_with_the_pepper(key, pepper):
    """Stored hashes can be made and verified by any tool that knows HMAC-SHA256."""
    expected = hmac.new(pepper.encode(), key.encode(), hashlib.sha256).hexdigest()
    assert hash_key(key, pepper) == f"hmac-sha256:{expected}"
    assert hash_key(key, pepper) == hash_key(key, pepper)
    assert is_hash(hash_key(key, pepper))


def test_only_whole_hashes_are_hashes():
    """A cut, a longer, a differently written hash in the configuration is refused, not compared in vain."""
    good = hash_key(KEY, "pepper")
    for bad in (good[:-1], good + "0", good.upper(), good.removeprefix("hmac-"), " " + good, good + "\n", KEY, ""):
        assert not is_hash(bad)
