"""What the long tests share: a client's session, and what a process holds."""

from __future__ import annotations

import os
import resource
import subprocess
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp

PATIENCE = 60.0


@contextmanager
def many_files(wanted: int = 4096):
    """The system's usual 1024 open files are too few; a started process inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, more), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def client(gateway, connections=0):
    """A session with the bootstrap key; `connections` at most, 0 = any number."""
    headers = {"Authorization": f"Bearer {gateway.key}"}
    connector = aiohttp.TCPConnector(limit=connections)
    base = f"http://127.0.0.1:{gateway.port}"
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(base, connector=connector, headers=headers, timeout=timeout) as session:
        yield session


def resident(pid: int) -> int:
    """Bytes of memory that the process holds."""
    status = Path(f"/proc/{pid}/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(shown.stdout) * 1024
