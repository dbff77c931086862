"""The contract between the core and every plugin, ours and yours: each hook, in the order of one request.

Mark an implementation with `@hookimpl` (from `gateway`). Its name, arguments and colour (`def`, `async def`) must be
those below; the start is refused otherwise. Within a hook, plugins are called in the order of the YAML list
(`request_finished`: in reverse).

Refusing and failing are different things. A hook *refuses* by raising `Refused` (or another `GatewayError`): that
always reaches the client, whatever `on_error` says. Any other exception is a *failure*: what happens then stands at
each hook; where it says `on_error`, the YAML decides (`fail`: 503 `plugin_error`; `ignore`: logged, counted, next).
A failure's log line names the plugin and the hook.

Every hook runs exactly once per exchange unless its text says otherwise.

A request that is taken as a job makes two exchanges. In phase `accept` the hooks run up to `lookup_response`, which
must answer, then `response_started` and `request_finished`. In phase `run` all run, but for `authenticate`:
`restore_principal` was asked before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from gateway.errors import GatewayError
    from gateway.exchange import (
        Attempt,
        AttemptRecord,
        Correction,
        Decision,
        Event,
        Exchange,
        Finding,
        Outcome,
        Principal,
        Reply,
    )
    from gateway.routes import Router
    from gateway.settings import Upstream
    from gateway.upstream import UpstreamReply

PROJECT = "xenios"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Tap(Protocol):
    """What `open_tap` returns: it sees each whole event of one stream, in both directions of time only forwards."""

    def event(self, event: Event) -> Event | bytes | Sequence[Event | bytes] | None:
        """One event. What is returned counts only if the plugin class says `rewrites = True`; else it passes unchanged.

        Return it (passes unchanged), None (dropped or held back), or what takes its place. What a tap holds back is
        its own to bound. The terminator (`[DONE]`, `message_stop`) is not shown: `end` comes before it.
        """

    def end(self, outcome: Outcome) -> Sequence[Event | bytes]:
        """The stream ended: exactly once, also after a truncation or a disconnect (what it returns is then dropped)."""


class Hooks:
    """Every hook. Read from top to bottom: that is the order of one request."""

    # --- start-up -------------------------------------------------------------------------------------------------

    @hookspec
    def register_routes(self, router: Router) -> None:
        """Start-up: add routes of the plugin's own by `router.add(method, path, handler, access=…)`.

        Access is `principal` unless you say `public` or `admin`; the core enforces it. A failure ends the start and
        names the plugin.
        """

    @hookspec
    def register_commands(self, cli: Any) -> None:
        """Start of the command line: add commands to `cli` (a `typer.Typer`). A failure ends the command.

        The plugin is not constructed: `self` has `config`, `id`, `pepper()`, `with_database(use)` and `headless(run)`.
        """

    @hookspec
    def register_upstreams(self, register: Callable[[str, Upstream], None]) -> None:
        """Start-up: add upstreams by `register(name, upstream)`. A name that the YAML has already is refused."""

    # --- a request comes in ---------------------------------------------------------------------------------------

    @hookspec
    async def request_received(self, exchange: Exchange) -> None:
        """The request's head is known, nothing else: no principal, no body. All plugins are called.

        May refuse. A failure is answered with 503.
        """

    @hookspec
    async def authenticate(self, exchange: Exchange) -> Principal | None:
        """Who is calling? The first answer that is not None counts; None from all is answered with 401.

        `exchange.credentials` is there in this hook only. Raise `Unauthenticated` to refuse a credential that is
        yours but bad. A failure is answered with 503 and can't be ignored.
        """

    @hookspec
    async def restore_principal(self, reference: str, kept: Principal | None) -> Principal | None:
        """Rebuild the principal from `Principal.reference`, never from a secret: for a job, or a dry run in its name.

        `kept`: the principal as it was verified when the job was taken; None for a dry run, which knows only a name.
        Look again whether it may still call; return `kept` only if nothing better is known, and never another plugin's.
        First answer counts; None from all fails it as `principal_gone`. A failure: the job is retried.
        """

    @hookspec
    async def prepare_request(self, exchange: Exchange) -> None:
        """The body is parsed and valid: edit `exchange.body`. All plugins are called; the only hook that may edit it.

        A field that only a plugin can do (`background`) is taken out here by the one that does it; what is left of
        them afterwards is refused. No side effects: it runs in dry runs too. May refuse. A failure is answered with
        503.
        """

    @hookspec
    async def choose_targets(self, exchange: Exchange) -> Decision | None:
        """Which models may answer, in order. First answer counts; nobody: the asked model where the settings place it.

        No side effects: it runs in dry runs too. May refuse. A failure is answered with 503.
        """

    @hookspec
    async def check_request(self, exchange: Exchange) -> None:
        """Last gate: sees the edited body, `exchange.decision` with all targets, the principal. Refuses by raising.

        All plugins are called. A failure: `on_error` (default `fail`).
        """

    @hookspec
    async def lookup_response(self, exchange: Exchange) -> Reply | None:
        """Is there an answer without an upstream (a cache, the 202 of a job)? The first answer counts.

        In phase `accept` somebody must have one, else the client gets 503 `no_job_taken`. A reply with `chunks` passes
        as it is: no tap sees it, nor does `transform_response`.
        A failure: `on_error` (default `fail`; a cache sets `ignore`).
        """

    # --- attempts at upstreams ------------------------------------------------------------------------------------

    @hookspec
    async def around_upstream(  # type: ignore[empty-body]  # a specification: never called itself
        self,
        exchange: Exchange,
        attempt: Attempt,
        call_next: Callable[[Attempt], Awaitable[UpstreamReply]],
    ) -> UpstreamReply:
        """An onion around the upstream: call `call_next(attempt)` once, several times (fallback) or not at all.

        `attempt` is what the layer outside proposes; at first it is the first target of the decision. To try another
        target call `call_next(exchange.attempt(target))`. A failed attempt raises `UpstreamError`; calling again closes
        the reply before. It returns at the first content event of a stream: the preamble before it is held back until
        then, and is thrown away with a failed attempt. A layer that finds an answer wanting sets `reply.record.cause`
        before it calls again. Layers that stand before `fallback` in the YAML run once a
        request, those after it once an attempt. Exceptions go outwards.
        """

    @hookspec
    def attempt_started(self, exchange: Exchange, attempt: AttemptRecord) -> None:
        """An attempt is about to be sent. A failure is isolated: logged, and nothing else.

        The last chance to add a header to this one attempt, whatever layer made it:
        `attempt.attempt = attempt.attempt.replace(headers={**attempt.attempt.headers, …})`.
        """

    @hookspec
    def attempt_finished(self, exchange: Exchange, attempt: AttemptRecord) -> None:
        """The attempt's last byte, failure or cancellation: status, cause, usage, cost and timings are filled in.

        Exactly once for each `attempt_started`. A failure is isolated.
        """

    # --- the answer -----------------------------------------------------------------------------------------------

    @hookspec
    def open_tap(self, exchange: Exchange) -> Tap | None:
        """Once per stream, after the winning attempt: return a Tap to see its events, None if not interested.

        A tap that fails is removed and logged; with `on_error: fail` the stream ends with the dialect's error event.
        """

    @hookspec
    async def transform_response(self, exchange: Exchange) -> None:
        """A whole reply (not a stream, not an error): edit `exchange.reply`. Also on a hit of `lookup_response`, but
        not in phase `accept`: what is said of a job is no answer yet.

        May refuse. A failure is answered with 503.
        """

    @hookspec
    def render_error(self, exchange: Exchange, error: GatewayError) -> Reply | None:
        """The request was refused or failed before anything was sent: how should the client be told?

        The first answer counts; nobody: the dialect's own error. A failure is isolated, and the default used.
        Not called once a stream has begun: the dialect's error event is sent then.
        """

    @hookspec
    def response_started(self, exchange: Exchange) -> None:
        """The reply's head is about to go out, errors too: edit `exchange.reply_headers`. A failure is isolated."""

    # --- afterwards -----------------------------------------------------------------------------------------------

    @hookspec
    async def request_finished(self, exchange: Exchange) -> None:
        """The end, whatever it was: outcome, attempts, usage, cost and timings are final. In reverse YAML order.

        Always runs, also for a plugin none of whose hooks ran before, and off the client's path: the reply is sent
        already. Has 5 seconds. A failure is isolated.
        """

    @hookspec
    async def usage_corrected(self, correction: Correction) -> None:
        """The true usage and cost of an attempt came later (the upstream's `/generation`, a job).

        At most once per operation id, maybe in another process than the request's. A failure is isolated.
        """

    @hookspec
    async def explain(self, exchange: Exchange) -> Sequence[str | Finding] | None:
        """A dry run has come as far as `choose_targets`: say what this plugin would do. Read-only.

        An administrator asks what would become of a request (`POST /admin/explain`, `X-Xenios-Explain: 1`,
        `xenios explain`). Of the hooks before, a dry run calls `prepare_request` and `choose_targets`; none after this
        one. `exchange.decision` is None if `choose_targets` refused. Return lines of text, or a `Finding` where there
        is more to it: a refusal, something about a target, another order. Raise the refusal that `check_request` would
        raise, and hold the limits that it would hold: the core tells what is left of them and whether they would
        refuse, and takes nothing. Any other failure is reported as a finding.
        """
