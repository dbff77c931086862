"""What systemd is told of a service of `Type=notify`: that it is ready, reloads, stops, lives (sd_notify(3)).

Where nobody wants to know, which is everywhere else, nothing is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING

from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import MutableMapping


class Notices:
    """To the socket that `NOTIFY_SOCKET` names; processes that are started later do not see it."""

    def __init__(self, env: MutableMapping[str, str] = os.environ) -> None:
        path = env.pop("NOTIFY_SOCKET", "")
        self._address = f"\0{path[1:]}" if path.startswith("@") else path
        microseconds, pid = env.pop("WATCHDOG_USEC", ""), env.pop("WATCHDOG_PID", "")
        wanted = self._address and microseconds and pid in {"", str(os.getpid())}
        self._every = int(microseconds) / 2e6 if wanted else None

    def ready(self, status: str) -> None:
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, seconds: float | None = None) -> None:
        """`seconds`: that it may take, whatever the unit says."""
        self._send("STOPPING=1", *([] if seconds is None else [f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"]))

    async def until(self, stop: asyncio.Event, status: str) -> None:
        """Ready now, and alive until `stop` is set."""
        self.ready(status)
        tasks = Tasks()
        tasks.spawn(self.alive(), "watchdog notices")
        try:
            await stop.wait()
        finally:
            await tasks.drain(0)

    async def alive(self) -> None:
        """Say so as long as the event loop turns, where the unit has a `WatchdogSec`."""
        while self._every is not None:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self._every)

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
            out.connect(self._address)
            out.sendall("\n".join(lines).encode())
