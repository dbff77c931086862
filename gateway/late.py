"""Late work: what is kept of a request that is answered later, and what is still to be settled when that is done.

A plugin that takes jobs keeps a `LateRequest` of what it accepted, and runs it by `services.run`, in whatever process
and as often as it must: the request goes through the pipeline as it came, in phase `run`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.exchange import Principal, Scopes
from gateway.limits import Rule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gateway.errors import GatewayError
    from gateway.exchange import Exchange
    from gateway.kit.ledger import Ledger
    from gateway.limits import State


@dataclass(frozen=True, slots=True)
class LateRequest:
    """What is kept of an accepted request. No credential is in it.

    `headers`: those that may pass to an upstream, and those that a `when:` or a plugin (`reads_headers`) asks for.
    `principal`: who asked, as verified then. `deadline`: seconds that a run of it may take, None: as any request.
    """

    endpoint: str
    body: bytes = field(repr=False)  # a prompt, which belongs in no log
    content_type: str
    headers: Mapping[str, str]
    request_id: str
    reference: str
    principal: Principal
    traceparent: str | None = None
    deadline: float | None = None

    @classmethod
    def of(cls, exchange: Exchange) -> LateRequest:
        """Of a request to a proxied endpoint whose principal and body are known."""
        if exchange.principal is None:
            raise ValueError("Nobody asked: there is no principal.")
        derived = exchange.snapshot.derived
        picked = exchange.request.pick((*derived.forwarded[exchange.endpoint], *derived.kept))
        return cls(
            endpoint=exchange.endpoint,
            body=exchange.raw_body,
            content_type=_as_text(exchange.request.header("content-type") or "application/json"),
            headers={name: _as_text(value) for name, value in picked.items()},
            request_id=exchange.request_id,
            reference=exchange.principal.reference,
            principal=exchange.principal,
            traceparent=exchange.traceparent,
        )

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> LateRequest:
        """What `to_json` made, here or in another version. Raises msgspec.DecodeError."""
        kept = msgspec.json.decode(data, type=_Kept)
        values: dict[str, Any] = msgspec.structs.asdict(kept)
        return cls(**{**values, "principal": _principal(kept.principal)})


def _as_text(value: str) -> str:
    """A header's value as JSON can hold it: its bytes need not be UTF-8."""
    return value if value.isascii() else value.encode(errors="surrogateescape").decode(errors="replace")


class _Kept(msgspec.Struct):
    """A LateRequest as it is read: fields of a later version are passed over."""

    endpoint: str
    body: bytes
    content_type: str
    headers: dict[str, str]
    request_id: str
    reference: str
    principal: dict[str, Any]
    traceparent: str | None = None
    deadline: float | None = None


def _principal(kept: Mapping[str, Any]) -> Principal:
    known = {f.name: kept[f.name] for f in fields(Principal) if f.name in kept}
    scopes = known.get("scopes") or {}
    lists = {f.name: scopes.get(f.name) for f in fields(Scopes)}
    known["scopes"] = Scopes(**{name: None if globs is None else tuple(globs) for name, globs in lists.items()})
    known["roles"] = frozenset(known.get("roles") or ())
    return Principal(**known)


def settlement_of(exchange: Exchange, actual: Sequence[tuple[Rule, int | None]]) -> list[Any]:
    """What `settle` needs, as JSON. Not what rates took: that may not be put right twice, and is over in a minute."""
    admission = exchange.admission
    held = [[rule.key, rule.kind, rule.amount, used] for rule, used in actual if rule.kind != "rate"]
    return [exchange.id, admission is None or admission.levels is not None, held]


def settle(ledger: Ledger, settlement: Sequence[Any] | None) -> None:
    """Settle what a worker did not live to settle. As often as you like; the first time counts. None: nothing."""
    if not settlement:
        return
    op, admitted, held = settlement
    actual = [(Rule(key, kind, 1, _refuse, amount=amount), used) for key, kind, amount, used in held]
    if actual:
        ledger.settle(op, actual, admitted=admitted)


def _refuse(rule: Rule, state: State) -> GatewayError:
    raise AssertionError(f"{rule.key} is settled, not judged: {state}")
