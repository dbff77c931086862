"""Fallback: when a model's upstream fails, the next target of the decision is tried.

The targets and their order come from routing; the client sees one answer. It is tried elsewhere only what another
model can mend: an upstream that can't be reached, is too slow, too busy, broken, or has no such model. What is wrong
with the request itself (invalid, too long, against a content policy) is told to the client at once. Once a stream has
shown content there is no fallback any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from gateway import Cause, Finding, UpstreamError, hookimpl

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from gateway import Attempt, Exchange, Services, Target, UpstreamReply

_Cause = Literal[
    "connection",
    "tls",
    "timeout",
    "rate_limit",
    "server_error",
    "bad_reply",
    "truncated",
    "model_not_found",
    "auth",
    "payment",
]


class Config(BaseModel):
    """When the next target is tried, and how often."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    on: tuple[_Cause, ...] = Field(
        (
            "connection",
            "tls",
            "timeout",
            "rate_limit",
            "server_error",
            "bad_reply",
            "truncated",
            "model_not_found",
        ),
        description="Causes of a failed attempt after which the next target is tried. Default all but auth and "
        "payment: our key refused, our account out of credit; with these, add them if targets have other upstreams.",
    )
    max_attempts: PositiveInt = Field(
        3, description="Attempts at most for one request, the first included. Default 3; targets beyond it are unused."
    )


class Plugin:
    """Tries the next target when one fails."""

    Config: TypeAlias = Config

    def __init__(self, config: Config, services: Services) -> None:
        del services
        self._on = frozenset(Cause(name) for name in config.on)
        self._max = config.max_attempts

    @hookimpl
    async def around_upstream(
        self, exchange: Exchange, attempt: Attempt, call_next: Callable[[Attempt], Awaitable[UpstreamReply]]
    ) -> UpstreamReply:
        rest: Iterator[Target] | None = None
        for _ in range(self._max - 1):
            try:
                return await call_next(attempt)
            except UpstreamError as error:
                if error.cause not in self._on:
                    raise
                rest = rest or iter(_others(exchange, attempt.target))
                target = next(rest, None)
                if target is None:
                    raise
            attempt = exchange.attempt(target)
        return await call_next(attempt)

    @hookimpl
    async def explain(self, exchange: Exchange) -> Sequence[Finding] | None:
        targets = exchange.decision.targets[: self._max] if exchange.decision else ()
        if len(targets) < 2:
            return [Finding("no fallback: there is one target, or one attempt is allowed", order=targets)]
        names = ", then ".join(target.model for target in targets)
        return [Finding(f"{names}; on {', '.join(sorted(self._on))}", order=targets)]


def _others(exchange: Exchange, tried: Target) -> list[Target]:
    """The decision's targets without the one that was tried: once, as the list may name it again for a retry."""
    targets = list(exchange.decision.targets) if exchange.decision else []
    if tried in targets:
        targets.remove(tried)
    return targets
