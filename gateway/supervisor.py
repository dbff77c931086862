"""What must exist before a worker starts: a locked data directory, the pepper and the bootstrap key.

Several workers and their respawn are `processes.py`, reload is `reload.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway.kit.keys import hash_key, is_well_formed, new_key

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gateway.settings import Settings


class DataDirError(Exception):
    """The data directory can't be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The secrets of this installation. `bootstrap_key` is None where the settings switch it off."""

    pepper: str = field(repr=False)
    bootstrap_key: str | None = field(repr=False)
    bootstrap_key_is_new: bool = False

    @property
    def bootstrap_key_hash(self) -> str | None:
        return hash_key(self.bootstrap_key, self.pepper) if self.bootstrap_key else None


@contextlib.contextmanager
def data_dir(path: Path) -> Iterator[Path]:
    """The directory, 0700, made if missing, locked for as long as the context lasts. Raises DataDirError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DataDirError(
            f"The data directory {path} can't be used ({error.strerror}); set server.data_dir."
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataDirError(
                f"Another xenios uses the data directory {path}; set server.data_dir to another "
                "(with the default configuration: XENIOS_DATA_DIR)."
            ) from error
        yield path
    finally:
        os.close(lock)


def identity(path: Path, settings: Settings, *, new_bootstrap_key: bool = False) -> Identity:
    """Read the pepper and the bootstrap key, made at the first start and the same afterwards. Raises DataDirError."""
    given = settings.server.pepper
    pepper = given.get_secret_value() if given else _kept(path / "pepper", secrets.token_hex(32))[0]
    if not settings.server.bootstrap_key:
        return Identity(pepper, None)
    file = path / "bootstrap_key"
    if new_bootstrap_key:
        file.unlink(missing_ok=True)
    key, is_new = _kept(file, new_key())
    if not is_well_formed(key):
        raise DataDirError(f"{file} holds no key of ours; remove it, or start with --new-key, to get another.")
    return Identity(pepper, key, is_new)


def identity_beside(path: Path, settings: Settings) -> Identity:
    """As a gateway has it, for a process beside it: nothing is made, which the gateway would not have. Raises
    DataDirError.
    """
    given = settings.server.pepper
    pepper = given.get_secret_value() if given else _found(path / "pepper")
    if pepper is None:
        raise DataDirError(
            f"There is no pepper in {path}: no gateway has run there yet. Start `xenios serve` first; or, on a host "
            "without one, set server.pepper to what the gateway has."
        )
    return Identity(pepper, _found(path / "bootstrap_key") if settings.server.bootstrap_key else None)


def read_pepper(settings: Settings) -> str:
    """The pepper alone, for `xenios keys hash`; makes the data directory if need be."""
    if settings.server.pepper:
        return settings.server.pepper.get_secret_value()
    return _kept(make_data_dir(settings) / "pepper", secrets.token_hex(32))[0]


def make_data_dir(settings: Settings) -> Path:
    """The data directory, for commands that run beside a gateway: not locked. Raises DataDirError."""
    path = settings.server.data_dir
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataDirError(
            f"The data directory {path} can't be used ({error.strerror}); set server.data_dir."
        ) from error
    return path


def _found(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataDirError(f"{file} can't be read ({error.strerror}).") from error


def _kept(file: Path, fresh: str) -> tuple[str, bool]:
    """(content, newly made). Written to the side and linked: two starters at once agree on one."""
    try:
        if file.exists():
            return file.read_text().strip(), False
        side = file.with_name(f"{file.name}.{os.getpid()}")
        side.touch(mode=0o600)
        side.write_text(fresh + "\n")
        try:
            os.link(side, file)
        except FileExistsError:
            return file.read_text().strip(), False
        finally:
            side.unlink()
    except OSError as error:
        raise DataDirError(f"{file} can't be used ({error.strerror}).") from error
    return fresh, True
