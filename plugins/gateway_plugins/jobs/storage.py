"""Where files lie: a folder or an S3-compatible store, by obstore. Its errors become ours here."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway import GatewayError, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from gateway import Services
    from gateway_plugins.jobs.settings import Files

PIECE = 4 << 20  # bytes that are read at once
PART = 5 << 20  # S3 takes no smaller part of an upload, but the last
AT_ONCE = 2  # parts of one upload under way: with PART, the memory that it takes
SECONDS = 30.0  # for one request to S3
WRITERS = 16  # of one key at the same time, at most


class MissingError(Exception):
    """The bytes are not there any more, or fewer than there were."""


class Storage:
    """Bytes under keys that we made. Every method raises Unavailable where the store does not answer."""

    def __init__(self, settings: Files, services: Services) -> None:
        self._settings = settings
        self._services = services
        self._store: Any = None
        # of a process without data_dir, which keeps nothing, there are no files either
        self._folder = (services.data_dir or Path(".xenios")) / "files" if settings.storage == "local" else None

    async def put(self, key: str, pieces: AsyncIterator[bytes]) -> None:
        """All of `pieces`, or nothing: what they raise is raised, and leaves no bytes."""
        import obstore  # noqa: PLC0415 - what opens no file does without

        with self._told(reads=False):
            await obstore.put_async(self._opened(), key, pieces, chunk_size=PART, max_concurrency=AT_ONCE)

    async def read(self, key: str, size: int, start: int = 0) -> AsyncGenerator[bytes, None]:
        """From `start` to `size`, piece by piece, however slowly it is taken. Raises MissingError."""
        while start < size:
            piece = await self.range(key, start, min(PIECE, size - start))
            yield piece
            start += len(piece)

    async def range(self, key: str, start: int, length: int) -> bytes:
        """Raises MissingError."""
        import obstore  # noqa: PLC0415 - as above

        with self._told(reads=True):
            found = bytes(await obstore.get_range_async(self._opened(), key, start=start, length=length))
        if len(found) != length:
            raise MissingError(key)
        return found

    async def delete(self, key: str) -> None:
        """With what an upload left that was killed. One that isn't there is deleted."""
        import obstore  # noqa: PLC0415 - as above

        with contextlib.suppress(MissingError), self._told(reads=True):
            await obstore.delete_async(self._opened(), key)
        if self._folder is not None:
            await asyncio.to_thread(_unlink_halves, self._folder / key)

    def _opened(self) -> Any:
        if self._store is None:
            self._store = _local(self._folder) if self._folder is not None else _s3(self._settings)
        return self._store

    @contextlib.contextmanager
    def _told(self, *, reads: bool) -> Iterator[None]:
        from obstore.exceptions import BaseError  # noqa: PLC0415 - as above

        try:
            yield
        except FileNotFoundError as error:
            if reads:
                raise MissingError from None
            self._log(error)  # S3: there is no such bucket
            raise _unavailable() from None
        except (BaseError, OSError) as error:
            if reads and any(behind_its_end in str(error) for behind_its_end in ("StartTooLarge", "status code: 416")):
                raise MissingError from None
            self._log(error)
            if "os error 28" in str(error) or "os error 122" in str(error):  # the disk, or its quota
                raise GatewayError(
                    "The storage for files has no room left. Tell the operator.",
                    status=507,
                    code="storage_full",
                    should_retry=False,
                ) from None
            raise _unavailable() from None

    def _log(self, error: Exception) -> None:
        said = str(error).partition("\n")[0][:300]
        self._services.log.error("file_storage_failed", error=type(error).__name__, message=said)


def _unavailable() -> Unavailable:
    return Unavailable("The storage for files does not answer. Try again soon.", code="storage_unavailable")


def _local(folder: Path) -> Any:
    from obstore.store import LocalStore  # noqa: PLC0415 - as above

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return LocalStore(folder)


def _s3(settings: Files) -> Any:
    from obstore.store import S3Store  # noqa: PLC0415 - as above

    bucket, _, prefix = settings.storage.removeprefix("s3://").partition("/")
    given: dict[str, Any] = {}
    if settings.endpoint is not None:
        given["endpoint"] = settings.endpoint
    if settings.access_key_id is not None and settings.secret_access_key is not None:
        given["access_key_id"] = settings.access_key_id.get_secret_value()
        given["secret_access_key"] = settings.secret_access_key.get_secret_value()
    return S3Store(
        bucket,
        prefix=prefix or None,
        region=settings.region,
        client_options={
            "allow_http": (settings.endpoint or "").startswith("http://"),
            "connect_timeout": timedelta(seconds=5),
            "timeout": timedelta(seconds=SECONDS),
        },
        retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=SECONDS)},
        **given,
    )


def _unlink_halves(path: Path) -> None:
    """What uploads were to become `path` and were killed: each has the first number from 1 that nobody had then.

    The folder is not listed: with each file of many that would take longer than all the rest.
    """
    number, last = 1, WRITERS
    while number <= last:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(f"{path.name}#{number}").unlink()
            last = number + WRITERS
        number += 1
