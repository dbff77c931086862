"""Processes as the benchmark sees them: cores, CPU time, memory, and their end. Linux: all of it stands in /proc."""

import contextlib
import os
import re
import resource
import signal
import threading
import time
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
STOP_LIMIT_S = 15
STORES = ("valkey", "redis", "postgres")  # what they use is no time of the gateway's
pause = threading.Event().wait  # seconds


def cores(workers=1):
    """(those of a target with so many workers, that of the mock and the client); the same one where there is only one."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[: max(1, min(workers, len(usable) - 1))], usable[-1]


@contextlib.contextmanager
def pinned(where):
    """What is started within inherits the cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, where)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def open_files():
    """How many a process may have; what is started from here inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def family(root):
    """/proc/PID/stat of a process and of all that descend from it: PID → (name, fields behind it)."""
    seen, children = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError):
            stat = Path(f"/proc/{name}/stat").read_text()
            begin, end = stat.index("("), stat.rindex(")")
            fields = stat[end + 2 :].split()
            seen[int(name)] = stat[begin + 1 : end], fields
            children.setdefault(int(fields[1]), []).append(int(name))
    found, ahead = {}, [root]
    while ahead:
        pid = ahead.pop()
        if pid in seen:
            found[pid] = seen[pid]
            ahead += children.get(pid, ())
    return found


def is_store(name):
    return name.startswith(STORES)


def cpu_s(root):
    """CPU seconds, user and system, dead children among them: (of the family, of the stores in it)."""
    used = {True: 0, False: 0}
    for name, fields in family(root).values():
        used[is_store(name)] += sum(map(int, fields[11:15]))
    return used[False] / TICK, used[True] / TICK


def move_stores(root, core):
    """The stores that it started inherited its core."""
    for pid, (name, _) in family(root).items():
        if is_store(name):
            os.sched_setaffinity(pid, {core})


def rss_mb(root):
    return sum(int(fields[21]) for name, fields in family(root).values() if not is_store(name)) * PAGE / 2**20


def pss_mb(root):
    """Like RSS, but what processes share is counted once. None where the kernel doesn't tell."""
    total = 0
    for pid, (name, _) in family(root).items():
        if not is_store(name):
            with contextlib.suppress(OSError):
                told = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += int(re.search(r"^Pss:\s+(\d+)", told, re.MULTILINE)[1])
    return total / 1024 if total else None


def machine_s():
    """CPU seconds that the machine spent on anything at all."""
    with open("/proc/stat") as stat:
        user, nice, system, _idle, _iowait, irq, softirq = map(int, stat.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / TICK


def own_s():
    """CPU seconds of this process and of the load clients that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def stop(process):
    """Asks the process to end; what is left of it and its family after a while is killed."""
    left = set(family(process.pid))
    with contextlib.suppress(OSError):
        process.terminate()
    until = time.monotonic() + STOP_LIMIT_S
    while left and time.monotonic() < until:
        process.poll()
        left = {pid for pid in left if os.path.exists(f"/proc/{pid}")}
        pause(0.02)
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=5)


def last_lines(path, size=300):
    with contextlib.suppress(OSError):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return " / ".join(lines[-2:])[-size:]
    return ""
