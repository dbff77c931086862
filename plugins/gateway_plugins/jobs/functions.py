"""The one function that RQ may call. What travels through Redis is a kind of work and an id, nothing else."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from rq.job import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway_plugins.jobs.parts import Handler

FUNCTION: Final = f"{__name__}.run"

# Why a handler is cancelled: somebody cancelled the work; its time is over; the worker stops, and puts it back; another
# worker has it.
Why: TypeAlias = Literal["", "stop", "timeout", "requeue", "lost"]

handlers: ContextVar[Mapping[str, Handler]] = ContextVar("handlers")
reason: ContextVar[Callable[[], Why]] = ContextVar("reason", default=lambda: "")
told: ContextVar[list[str]] = ContextVar("told")  # how the work ended, by whoever knows what it was


async def run(kind: str, work: str) -> None:
    """Raises LookupError outside `xenios worker`."""
    await handlers.get()[kind](work)


class AllowedJob(Job):
    """A job that imports nothing but `run`, whatever Redis says."""

    @property
    def func(self) -> Any:
        if self.func_name != FUNCTION or self.instance is not None:
            raise PermissionError("Not a job of Xenios.")
        return run

    @property
    def work(self) -> tuple[str, str]:
        """Kind and id. Raises an exception of any kind where somebody else wrote it."""
        if self.func is not run or self.kwargs:
            raise PermissionError("Not a job of Xenios.")
        kind, work = self.args
        if not (isinstance(kind, str) and isinstance(work, str) and self.id == job_id(kind, work)):
            raise PermissionError("Not a job of Xenios.")
        return kind, work

    # Ours have none.
    success_callback = failure_callback = stopped_callback = None


def job_id(kind: str, work: str) -> str:
    """RQ's, which knows no colon."""
    return f"{kind}-{work}"
