"""Fallback: when a model's upstream fails, the next target of the decision is tried.

The targets and their order come from routing; the client sees one answer. It is tried elsewhere only what another
model can mend: an upstream that can't be reached, is too slow, too busy, broken, or has no such model. What is wrong
with the request itself (invalid, too long, against a content policy) is told to the client at once, unless `on`, or
the rule that decided, says otherwise. Once a stream has shown content there is no fallback any more.

Another target is tried at once. Only when none is left, one that failed is tried again after a wait: `retries`.

A target that keeps failing is left alone for a while (a circuit breaker): passed over where there is another, else the
client gets 503 with Retry-After. Attempts feed it at their very end, so that stalls and cuts of streams count.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from gateway import (
    OTHER,
    Cause,
    Duration,
    Finding,
    GatewayError,
    Reply,
    Source,
    Tasks,
    UpstreamError,
    Usage,
    hookimpl,
)
from gateway.kit import BreakerPolicy, Breakers, clean, input_estimate
from gateway_plugins.fallback.outputs import is_invalid
from gateway_plugins.fallback.plan import Entry, Plan, Policy
from gateway_plugins.fallback.shared import Shared

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from gateway import Attempt, AttemptRecord, Exchange, Router, Services, Target, UpstreamReply
    from gateway.kit import Breaker, Change

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
    "context_length",
    "content_policy",
    "invalid_output",
]
_Retried = Literal[
    "connection", "tls", "timeout", "rate_limit", "server_error", "bad_reply", "truncated", "invalid_output"
]

# What a target is to blame for. Neither what is wrong with a request, nor how well it answered, nor who left.
_BLAMED = frozenset(
    {
        Cause.CONNECTION,
        Cause.TLS,
        Cause.TIMEOUT,
        Cause.SERVER_ERROR,
        Cause.BAD_REPLY,
        Cause.TRUNCATED,
        Cause.AUTH,
        Cause.PAYMENT,
    }
)
# By these a client chooses who answers behind a target: how that goes says nothing of the target as others ask for it.
_NARROWING = ("provider", "preset")
_NUMBERS = {"closed": 0, "resting": 1, "half_open": 2, "open": 3}  # states in metrics: the worse, the higher
_PERHAPS_BILLED = frozenset({Cause.TIMEOUT, Cause.TRUNCATED, Cause.BAD_REPLY, Cause.INVALID_OUTPUT})


class BreakerConfig(BaseModel):
    """When a target is left alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: Duration = Field(30.0, gt=0, description="How far back attempts count. Default 30s.")
    failures: float = Field(
        0.5, gt=0, le=1, description="Share of failed attempts within the window that opens the circuit. Default 0.5."
    )
    requests: PositiveInt = Field(
        10, description="Attempts of one worker within the window before it may open. Default 10."
    )
    open_for: Duration = Field(
        15.0,
        gt=0,
        description="How long an open circuit lets nothing through; then one attempt, and one more each time that "
        "this has passed, until one is good. Default 15s.",
    )
    max_rest: Duration = Field(
        60.0,
        description="How long at most a target is left alone that answered 429 with Retry-After. Default 60s; 0: it is "
        "not.",
    )


class Config(BaseModel):
    """When another target is tried, how often, and when one is left alone."""

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
        description="Causes of a failed attempt after which another is made; a routing rule may say otherwise for "
        "its requests. Default those that another model can mend. Not auth and payment (our key refused, our account "
        "out of credit: add them if targets have other upstreams), context_length, content_policy, nor invalid_output: "
        "a whole answer that is not the JSON which the request asked for.",
    )
    max_attempts: PositiveInt = Field(
        3, description="Attempts at most for one request, the first included. Default 3; targets beyond it are unused."
    )
    retries: dict[_Retried, NonNegativeInt] = Field(
        {"connection": 1, "rate_limit": 1, "server_error": 1},
        description="How often a target is tried again after a cause, if no other is left. Default once after "
        "connection, rate_limit and server_error.",
    )
    backoff: Duration = Field(
        0.5,
        gt=0,
        description="Longest wait before the first such try; doubled with each, and drawn at random up to that. "
        "Default 500ms.",
    )
    max_wait: Duration = Field(
        10.0,
        description="Longest wait. Default 10s; an upstream that asks for more (Retry-After) is not tried again.",
    )
    max_extra_usd: Annotated[PositiveFloat, Field(allow_inf_nan=False)] | None = Field(
        None,
        description="What failed attempts may have cost, as known or estimated, before another is made. Default any "
        "amount. What has no known price is too much.",
    )
    breaker: BreakerConfig | Literal[False] = Field(
        BreakerConfig(), description="When a target that keeps failing is left alone. Default as below; false: never."
    )


class Plugin:
    """Tries another target when one fails."""

    Config: TypeAlias = Config
    reads_settings = ()  # what is known of circuits stays known over a reload

    def __init__(
        self,
        config: Config,
        services: Services,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        dice: Callable[[], float] = random.random,
    ) -> None:
        """Clock, sleep and dice (from 0 to 1) are a test's."""
        self._clock = clock
        self._sleep = sleep
        self._services = services
        self._on = frozenset(Cause(name) for name in config.on)
        self._policy = Policy(
            attempts=config.max_attempts,
            retries={Cause(name): count for name, count in config.retries.items()},
            backoff=config.backoff,
            max_wait=config.max_wait,
            dice=dice,
        )
        self._max_extra = None if config.max_extra_usd is None else round(config.max_extra_usd * 10**12)
        self._max_rest = config.breaker.max_rest if config.breaker else 0.0
        self._states = services.metrics.gauge(
            "xenios_breaker_state",
            "A target's circuit: 0 closed, 1 resting as it asked to, 2 half-open, 3 open; as the worst worker sees it.",
            ("upstream", "model"),
            merge="max",
        )
        self._changes = services.metrics.counter(
            "xenios_breaker_changes_total",
            "Changes of a target's circuit: opened, probed, probe_failed, closed, rests.",
            ("upstream", "model", "change"),
        )
        self.breakers: Breakers | None = None
        self._shared: Shared | None = None
        if config.breaker:
            policy = BreakerPolicy(
                config.breaker.window, config.breaker.failures, config.breaker.requests, config.breaker.open_for
            )
            self.breakers = Breakers(policy, self._changed)
            self._shared = Shared(services, self.breakers, clock)

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        no_longer_shown = self._states.read_from(self._shown_states)
        tasks = Tasks()
        if self._shared is not None and self._services.redis is not None:
            tasks.spawn(self._shared.keep(), "fallback: breakers")
        try:
            yield
        finally:
            no_longer_shown()
            await tasks.drain(0)

    # --- a request ---------------------------------------------------------------------------------------------------

    @hookimpl
    async def around_upstream(
        self, exchange: Exchange, attempt: Attempt, call_next: Callable[[Attempt], Awaitable[UpstreamReply]]
    ) -> UpstreamReply:
        on = self._causes(exchange)
        first = Entry(attempt.target, attempt)
        entry = first if self._may_begin(first.target) else None
        plan: Plan | None = None
        flawed: UpstreamReply | None = None  # the last that was not what was asked for
        error: UpstreamError | None = None
        while True:
            if entry is not None:
                error = None
                try:
                    answer = await call_next(entry.attempt or exchange.attempt(entry.target))
                except GatewayError as failure:
                    if not isinstance(failure, UpstreamError) or failure.cause not in on:
                        if flawed is None:
                            raise
                        exchange.error_by = None  # whoever refused a further attempt did not refuse the request
                        return flawed
                    error, cause = failure, failure.cause
                else:
                    if Cause.INVALID_OUTPUT not in on or answer.stream is not None:
                        return answer
                    if not is_invalid(exchange, answer.record.target, answer.body):
                        return answer
                    flawed, cause = answer, Cause.INVALID_OUTPUT
                    answer.record.cause = cause
                plan = plan or self._plan(exchange, first)
                plan.failed(entry, error, cause, self._clock())
            plan = plan or self._plan(exchange, first)
            entry = await self._next(exchange, plan)
            if entry is None:
                break
        if flawed is not None:
            return flawed  # it is paid for, and nobody has a better one
        raise error or self._all_open([e.target for e in plan.entries])

    def _causes(self, exchange: Exchange) -> frozenset[Cause]:
        decision = exchange.decision
        return self._on if decision is None or decision.fallback_on is None else decision.fallback_on

    def _plan(self, exchange: Exchange, first: Entry) -> Plan:
        others = list(exchange.decision.targets) if exchange.decision else []
        if first.target in others:
            others.remove(first.target)  # once, as the list may name it again
        return Plan(self._policy, [first, *map(Entry, others)], self._closed_for, exchange.skipped.append)

    async def _next(self, exchange: Exchange, plan: Plan) -> Entry | None:
        """After the wait that it takes; None: there is nothing left to try."""
        while not self._costs_too_much(exchange):
            step = plan.next(self._clock(), exchange.deadline)
            if step is None:
                break
            if step.wait > 0:
                running, exchange.running = exchange.running, None  # it waits on purpose: no plugin is slow
                await self._sleep(step.wait)
                exchange.running = running
            if self._may_begin(step.entry.target):
                return step.entry
        return None

    def _costs_too_much(self, exchange: Exchange) -> bool:
        if self._max_extra is None:
            return False
        spent = 0
        for record in exchange.attempts:
            cost = record.cost.pico_usd
            if cost is None:
                if record.first_content is None and record.cause not in _PERHAPS_BILLED:
                    continue
                seen = record.usage.output_tokens or 0
                usage = Usage(input_tokens=input_estimate(exchange), output_tokens=seen, source=Source.ESTIMATE)
                cost = self._services.catalogue.cost(record.target.upstream, record.target.model, usage).pico_usd
            if cost is None:
                return True
            spent += cost
        return spent > self._max_extra

    # --- circuits ----------------------------------------------------------------------------------------------------

    def _may_begin(self, target: Target) -> bool:
        breaker = self.breakers.find(target.name) if self.breakers is not None else None
        return breaker is None or breaker.allow(self._clock())

    def _closed_for(self, target: Target, now: float) -> float:
        """Seconds of its rest; for ever while it is open and no probe is due: nobody waits for that."""
        breaker = self.breakers.find(target.name) if self.breakers is not None else None
        if breaker is None:
            return 0.0
        wait = breaker.wait(now)
        return float("inf") if wait > 0 and breaker.opened_at is not None else wait

    def _all_open(self, targets: Sequence[Target]) -> UpstreamError:
        now = self._clock()
        found = [self.breakers.find(target.name) for target in targets] if self.breakers is not None else []
        wait = min((breaker.wait(now) for breaker in found if breaker is not None), default=0.0)
        what = "the model of this request" if len(targets) == 1 else "each model of this request"
        return UpstreamError(
            Cause.CIRCUIT_OPEN, f"Too many attempts at {what} failed just now. Try again soon.", retry_after=wait
        )

    @hookimpl
    def attempt_finished(self, exchange: Exchange, attempt: AttemptRecord) -> None:
        if self.breakers is None:
            return
        now, cause, name = self._clock(), attempt.cause, attempt.attempt.target.name
        breaker = self.breakers.find(name) or self.breakers.of(name, now)
        if breaker is None:
            return
        if cause is None or cause is Cause.INVALID_OUTPUT:
            breaker.succeeded(now, attempt.started)
        elif any(exchange.body.get(name) for name in _NARROWING):
            breaker.told_nothing(now, attempt.started)
            return
        elif cause in _BLAMED or (cause is Cause.RATE_LIMIT and breaker.opened_at is not None):
            breaker.failed(now, attempt.started, cause)
        else:
            breaker.told_nothing(now, attempt.started)
        if cause is Cause.RATE_LIMIT and attempt.retry_after and self._max_rest:
            breaker.rest(now + min(attempt.retry_after, self._max_rest), cause)

    def _changed(self, breaker: Breaker, change: Change) -> None:
        upstream, _, model = breaker.name.partition("/")
        self._changes.add(1, upstream, self._services.metrics.model(upstream, model), change)
        if self._shared is not None:
            self._shared.note(breaker)
        if change == "opened":
            self._services.log.warning("circuit_opened", target=clean(breaker.name), cause=breaker.cause)
        elif change == "closed":
            self._services.log.warning("circuit_closed", target=clean(breaker.name))

    # --- shown -------------------------------------------------------------------------------------------------------

    def _shown_states(self) -> dict[tuple[str, ...], float]:
        """For metrics. What clients made up, or other gateways know, is `other`, and told while it is not closed."""
        now, known, found = self._clock(), self._services.catalogue.status(), dict[tuple[str, ...], float]()
        for breaker in self.breakers or ():
            upstream, _, model = breaker.name.partition("/")
            labels = (upstream, self._services.metrics.model(upstream, model)) if upstream in known else (OTHER, OTHER)
            state = _NUMBERS[breaker.state(now)]
            if state or OTHER not in labels:
                found[labels] = max(state, found.get(labels, 0))
        return found

    @hookimpl
    def register_routes(self, router: Router) -> None:
        # a second instance has breakers of its own
        name = self._services.plugin_id
        path = "/admin/targets" if name == "fallback" else f"/admin/targets/{name}"
        router.add("GET", path, self.targets, access="admin", summary="Targets that were tried, and their circuits.")

    async def targets(self, exchange: Exchange) -> Reply:
        """As this worker sees them: the counts are its own, open circuits everybody's who shares a Redis."""
        del exchange
        now, at = self._clock(), time.time()
        shown = [
            _shown(breaker, now, at)
            for breaker in sorted(self.breakers or (), key=lambda b: (b.opened_at is None, b.name))
        ]
        return Reply(200, data={"object": "list", "data": shown, "shared": self._services.redis is not None})

    def warnings(self) -> Sequence[str]:
        """For `/health/ready`."""
        now = self._clock()
        return [
            f"{clean(breaker.name)}: circuit {breaker.state(now)} ({breaker.cause})"
            for breaker in self.breakers or ()
            if breaker.opened_at is not None
        ]

    @hookimpl
    async def explain(self, exchange: Exchange) -> Sequence[Finding]:
        targets = exchange.decision.targets if exchange.decision else ()
        on = ", ".join(sorted(self._causes(exchange)))
        now, most = self._clock(), self._policy.attempts if on else 1
        found: list[Finding] = []
        tried: list[Target] = []
        for target in targets:
            breaker = self.breakers.find(target.name) if self.breakers is not None else None
            state = "closed" if breaker is None else breaker.state(now)
            wait = 0.0 if breaker is None else breaker.wait(now)
            if wait > 0 and breaker is not None:
                text = f"passed over, circuit {state} ({breaker.cause}), again in {wait:.0f} s"
            elif len(tried) < most:
                tried.append(target)
                text = f"attempt {len(tried)}, circuit {state}"
            else:
                text = f"not tried, attempts at most: {most}"
            found.append(Finding(text, target=target, data={"circuit": state, "again_in": round(wait, 1)}))
        found.append(Finding(f"another attempt on {on or 'no cause'}; {most} at most", order=tried))
        if targets and not tried:
            found.append(Finding("all circuits are open", refuses=self._all_open(targets)))
        return found


def _shown(breaker: Breaker, now: float, at: float) -> dict[str, object]:
    """`at`: the time of day that `now` is, in seconds since 1970."""
    passed, failed = breaker.counts(now)
    opened = breaker.opened_at
    return {
        "object": "target",
        "target": clean(breaker.name),
        "state": breaker.state(now),
        "succeeded": passed,
        "failed": failed,
        "opened": breaker.opened,
        "opened_at": None if opened is None else int(at - (now - opened)),
        "next_attempt_in": round(breaker.wait(now), 1),
        "last_cause": breaker.cause,
    }
