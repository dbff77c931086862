"""`xenios jobs list | show | cancel | retry | rm`, by the database alone: a worker acts on it within some seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway import GatewayError
from gateway_plugins.jobs import shown
from gateway_plugins.jobs.settings import Queue
from gateway_plugins.jobs.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from gateway.kit import Database
    from gateway_plugins.jobs.store import Job

Ids = Annotated[list[str], typer.Argument(help="Ids of jobs.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_SOON = "A worker does so within some ten seconds."
_COLUMNS = ("id", "status", "queue", "task", "model", "tenant", "attempts", "created", "error")


@dataclass(frozen=True)
class _Held:
    database: Database


def add_commands(plugin: Any, cli: typer.Typer) -> None:
    """`plugin` has `config` and `with_database()`."""
    group = typer.Typer(help="Jobs: requests that are answered later.", no_args_is_help=True)
    cli.add_typer(group, name="jobs")

    def ask(use: Callable[[Store], Coroutine[Any, Any, Any]]) -> Any:
        async def with_store(database: Database) -> Any:
            return await use(Store(_Held(database)))

        try:
            return plugin.with_database(with_store)
        except GatewayError as error:
            _fail(str(error))

    def each(ids: Sequence[str], use: Callable[[Store, Job], Coroutine[Any, Any, str | None]], done: str) -> None:
        """`use` says why it can't be done with a job, or None."""

        async def run(store: Store) -> list[str]:
            wrong = []
            for job_id in ids:
                job = await store.get(job_id)
                problem = f"there is no job {job_id}" if job is None else await use(store, job)
                if problem is None:
                    typer.echo(f"{job_id} {done}")
                else:
                    wrong.append(problem)
            return wrong

        if wrong := ask(run):
            _fail("; ".join(wrong))

    @group.command("list")
    def list_jobs(
        status: Annotated[
            str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.", show_default=False)
        ] = None,
        queue: Annotated[str | None, typer.Option(help="Only this queue's.", show_default=False)] = None,
        task: Annotated[str | None, typer.Option(help="Only this task's.", show_default=False)] = None,
        tenant: Annotated[str | None, typer.Option(help="Only this tenant's.", show_default=False)] = None,
        limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 50,
        *,
        as_json: AsJson = False,
    ) -> None:
        """Jobs, newest first."""
        equal = {k: v for k, v in (("status", status), ("queue", queue), ("task", task)) if v is not None}
        found, more = ask(lambda store: store.listed(tenant, equal, limit))
        if as_json:
            typer.echo(json.dumps([shown.job(job) for job in found], indent=2))
            return
        _print(found)
        if more:
            typer.echo(f"There are more than {limit}.", err=True)

    @group.command("show")
    def show(
        job_id: Annotated[str, typer.Argument(metavar="ID", help="Id of a job.")],
        *,
        result: Annotated[bool, typer.Option("--result", help="Print what its request was answered.")] = False,
    ) -> None:
        """One job, as JSON."""
        job = ask(lambda store: store.get(job_id))
        if job is None:
            _fail(f"there is no job {job_id}")
        if not result:
            typer.echo(json.dumps({**shown.job(job), "tenant": job.tenant, "principal": job.principal}, indent=2))
            return
        found = ask(lambda store: store.result(job_id))
        if found is None:
            _fail(f"{job_id} has no result: it is {job.status}")
        typer.echo(found.body, nl=False)

    @group.command("cancel")
    def cancel(ids: Ids) -> None:
        """Stop jobs that wait or run."""

        async def use(store: Store, job: Job) -> str | None:
            if job.ended:
                return f"{job.id} has {job.status}" if job.status != "cancelled" else None
            await store.ask_cancel(job.id)
            return None

        each(ids, use, f"will be cancelled. {_SOON}")

    @group.command("retry")
    def retry(
        ids: Annotated[list[str] | None, typer.Argument(help="Ids of jobs.", show_default=False)] = None,
        queue: Annotated[str | None, typer.Option(help="With --all-failed: of this queue.", show_default=False)] = None,
        tenant: Annotated[
            str | None, typer.Option(help="With --all-failed: of this tenant.", show_default=False)
        ] = None,
        *,
        all_failed: Annotated[bool, typer.Option("--all-failed", help="All that have failed.")] = False,
    ) -> None:
        """Put jobs back in their queue that failed or were cancelled."""
        if bool(ids) == all_failed:
            _fail("name jobs, or say --all-failed", 2)

        async def use(store: Store, job: Job) -> str | None:
            attempts = plugin.config.queues.get(job.queue, Queue()).attempts
            done = await store.retry(job.id, attempts=attempts, run_within=plugin.config.run_within)
            return None if done else f"{job.id} has not failed: it is {job.status}"

        async def failed(store: Store) -> list[str]:
            equal = {"status": "failed", **({} if queue is None else {"queue": queue})}
            return [job.id for job in (await store.listed(tenant, equal, 100_000))[0]]

        each(ids or ask(failed), use, f"waits again. {_SOON}")

    @group.command("rm")
    def remove(ids: Ids) -> None:
        """Forget jobs that are not running, and their results."""

        async def use(store: Store, job: Job) -> str | None:
            return None if await store.delete(job.id) else f"{job.id} is running: cancel it first"

        each(ids, use, "is forgotten.")


def _print(jobs: Sequence[Job]) -> None:
    lines = [_COLUMNS, *(_cells(job) for job in jobs)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cells(job: Job) -> tuple[str, ...]:
    at = datetime.fromtimestamp(job.created_at / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    tries = f"{job.attempts}/{job.max_attempts}"
    return (
        job.id, job.status, job.queue, job.task or "-", job.model or "-", job.tenant, tries, at, job.error_code or "-",
    )  # fmt: skip


def _fail(message: str, code: int = 1) -> Any:
    typer.echo(f"xenios: {message}", err=True)
    raise typer.Exit(code)
