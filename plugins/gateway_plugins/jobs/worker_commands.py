"""`xenios worker` runs jobs; `xenios queues` shows what waits for it."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import structlog
import typer

from gateway import StoreUnavailable, Tasks
from gateway_plugins.jobs.queue import connect
from gateway_plugins.jobs.worker import AsyncWorker, tell_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from gateway_plugins.jobs.queue import Queue, QueueState

log = structlog.get_logger("gateway.plugin", plugin="jobs")

TIDY_SECONDS = 10.0
# After Redis was emptied workers say again what they run: only then it is known what was lost.
SETTLING_SECONDS = 3.0
PART_SECONDS = 20.0  # the longest that a part may tidy
LOCK_SECONDS = 30.0  # after which another worker tidies, if the one that does dies


def add_commands(plugin: Any, cli: typer.Typer) -> None:
    """`plugin` has `headless()`."""

    @cli.command("worker", short_help="Run jobs.")
    def worker(
        queues: Annotated[
            str, typer.Option(help="Only these, with commas. Default: all of the configuration.", show_default=False)
        ] = "",
        processes: Annotated[int, typer.Option(min=1, max=64, help="So many processes, each of which runs jobs.")] = 1,
        concurrency: Annotated[
            int | None,
            typer.Option(
                min=1,
                help="The most jobs that a process runs at once, of all queues. Default: what each queue says.",
                show_default=False,
            ),
        ] = None,
        *,
        burst: Annotated[bool, typer.Option("--burst", help="End when nothing waits any more.")] = False,
    ) -> None:
        """Runs jobs, hundreds at once in one process, until it is stopped (TERM, INT): then it waits for
        `worker.grace`, and puts back what has not ended.
        """
        names = [name.strip() for name in queues.split(",") if name.strip()]

        async def run(started: Any, stop: asyncio.Event) -> None:
            await work(started, stop, names=names, concurrency=concurrency, burst=burst)

        plugin.headless(run, processes=processes)

    @cli.command("queues", short_help="What waits, runs and has failed.")
    def queues(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
        """Of each queue: how many jobs wait, run, are to run later and failed within the last hour; how long the first
        has waited; how many worker processes it has.
        """

        async def run(started: Any, _: asyncio.Event) -> None:
            states = await started.queue.states()
            typer.echo(json.dumps([asdict(state) for state in states], indent=2) if as_json else _table(states))

        plugin.headless(run)


async def work(plugin: Any, stop: asyncio.Event, *, names: Sequence[str], concurrency: int | None, burst: bool) -> None:
    """One process. Raises ValueError if there is no such queue."""
    queue: Queue = plugin.queue
    if unknown := sorted(set(names) - set(queue.queues)):
        raise ValueError(f"No such queue: {', '.join(unknown)}. There are {', '.join(queue.queues)}.")
    settings = plugin.config.worker
    connection = connect(plugin.services.redis.url, max(1.0, min(5.0, settings.lease / 4)))
    worker = AsyncWorker(
        connection,
        {name: of for name, of in queue.queues.items() if name in names or not names},
        {kind: handler for part in plugin.parts for kind, handler in part.handlers.items()},
        concurrency=concurrency,
        lease=settings.lease,
        grace=settings.grace,
        ended=queue.ended,
    )
    try:
        if burst:
            await _tidy(plugin, lambda: _held(plugin, worker.name))
            await worker.run(stop, burst=True)
        else:
            async with _tidying(plugin, worker.name):
                await worker.run(stop)
    finally:
        connection.close()


@asynccontextmanager
async def _tidying(plugin: Any, holder: str) -> AsyncIterator[None]:
    """One worker does so, as long as it lives."""
    tasks = Tasks()
    tasks.spawn(_keep_tidying(plugin, holder), "jobs: tidying")
    try:
        yield
    finally:
        await tasks.drain(0)
        try:
            await plugin.queue.unlock("tidy", holder)
        except StoreUnavailable:
            log.debug("jobs_tidying_not_handed_over")


async def _keep_tidying(plugin: Any, holder: str) -> None:
    while True:
        held = await _held(plugin, holder)
        if held == 1:
            await _tidy(plugin, lambda: _held(plugin, holder))
        await asyncio.sleep(SETTLING_SECONDS if held == 2 else TIDY_SECONDS)


async def _held(plugin: Any, holder: str) -> int:
    try:
        return int(await plugin.queue.lock("tidy", holder, LOCK_SECONDS))
    except StoreUnavailable:
        return 0


async def _tidy(plugin: Any, allowed: Callable[[], Awaitable[int]]) -> None:
    """All parts, each by itself."""
    for part in plugin.parts:
        if not await allowed():
            return
        try:
            async with asyncio.timeout(PART_SECONDS):
                await part.tidy()
        except StoreUnavailable:
            log.debug("jobs_not_tidied", part=type(part).__name__)
        except Exception as error:  # noqa: BLE001 - the other parts are tidied all the same
            tell_of(error, "jobs_tidying_failed", part=type(part).__name__)


def _table(states: Sequence[QueueState]) -> str:
    rows: list[tuple[str, ...]] = [("queue", "waiting", "running", "scheduled", "failed", "oldest", "workers")]
    for state in states:
        counts = (state.waiting, state.running, state.scheduled, state.failed)
        oldest = "" if state.oldest_seconds is None else f"{state.oldest_seconds:.0f}s"
        rows.append((state.name, *map(str, counts), oldest, str(state.workers)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    names = (row[0].ljust(widths[0]) for row in rows)
    return "\n".join("  ".join([name, *line[1:]]) for name, line in zip(names, lines, strict=True))
