"""What the parts of this plugin have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import contextlib

    from gateway import Router

# Does the work with this id, in a worker process. It may raise Again. One that is cancelled asks the queue why.
Handler: TypeAlias = Callable[[str], Awaitable[None]]


class Again(Exception):
    """Not now: the work is put back, and done in so many seconds."""

    def __init__(self, after: float) -> None:
        super().__init__(f"again in {after:g} s")
        self.after = after


class Part(Protocol):
    """Single jobs, background responses, files, batches, webhooks: each its routes, its work, its tidying."""

    handlers: Mapping[str, Handler]  # by kind of work

    def register_routes(self, router: Router) -> None: ...

    def add_commands(self, cli: Any) -> None: ...

    def lifespan(self) -> contextlib.AbstractAsyncContextManager[None]:
        """In every process: those that serve, and workers."""

    async def tidy(self) -> None:
        """About every ten seconds, in one worker: what is old goes, what Redis forgot is enqueued again."""
