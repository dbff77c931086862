"""The folder in which processes exchange their numbers (`metrics.py`): whose file is which.

1, 2 … are workers that serve: they begin at zero with their gateway. From 1001 on are processes beside it, such as
workers of jobs, which come and go on their own. Each of these holds the lock of its number while it lives, so that no
two have the same, and the next one to have it goes on from where the last one was.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from typing import TYPE_CHECKING

from gateway.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FIRST_BESIDE = 1001
MOST_BESIDE = 1000
BEFORE = "before"  # what processes beside the gateway had counted when it started


def start_anew(folder: Path) -> None:
    """A gateway starts, and counts from zero: also what those beside it count, who go on. Raises OSError.

    Who shows the numbers takes away what is in `BEFORE`: else a counter would begin above zero, which Prometheus takes
    for so many new events.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    before = folder / BEFORE
    shutil.rmtree(before, ignore_errors=True)
    before.mkdir(mode=0o700)
    for file in list(folder.iterdir()):
        number = file.name.partition(".")[0]
        if not number.isdigit() or file.suffix == ".lock":
            continue
        if int(number) >= FIRST_BESIDE and _lives(folder, number):
            if file.name == number:
                shutil.copyfile(file, before / number)
        else:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def number_beside(folder: Path) -> Iterator[int]:
    """A number that no other process has, for as long as the context lasts. Raises OSError, StartError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(FIRST_BESIDE, FIRST_BESIDE + MOST_BESIDE):
        lock = _locked(folder, str(number))
        if lock is not None:
            try:
                yield number
            finally:
                os.close(lock)
            return
    raise StartError(f"{MOST_BESIDE} processes work with {folder.parent} already.")


def _lives(folder: Path, number: str) -> bool:
    lock = _locked(folder, number)
    if lock is not None:
        os.close(lock)
    return lock is None


def _locked(folder: Path, number: str) -> int | None:
    """The lock's descriptor; None if somebody else has it. Raises OSError."""
    lock = os.open(folder / f"{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
