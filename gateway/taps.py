"""The taps of one stream: each whole event passes through them, in plugin order."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gateway import dispatch
from gateway.errors import PluginError
from gateway.exchange import Event, Outcome
from gateway.timing import TimedTap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.dispatch import Impl, Impls
    from gateway.exchange import Exchange, Timing
    from gateway.hookspecs import Tap
    from gateway.streaming import EventStream


class TapChain:
    """A tap that fails is removed and logged; one that guards (`on_error: fail`) ends the stream with an error."""

    def __init__(self, exchange: Exchange, taps: list[tuple[Impl, Tap]]) -> None:
        self._exchange = exchange
        self._taps = taps

    @classmethod
    def open(cls, exchange: Exchange, impls: Impls, stream: EventStream) -> TapChain | None:
        """Ask each plugin; None, and no work per event, if none is interested."""
        chain = cls(exchange, [])
        for impl in impls:
            if not impl.applies(exchange):
                continue
            dispatch.running[0] = impl.where
            try:
                tap = impl.call(exchange) if exchange.timings is None else _timed(exchange.timings, impl, exchange)
            except dispatch.FAILURES as error:
                try:
                    chain._failed(impl, error)
                except PluginError:
                    chain.close(Outcome.PLUGIN_ERROR)
                    raise
                continue
            finally:
                dispatch.running[0] = None
            if tap is not None:
                chain._taps.append((impl, tap))
        if not chain._taps:
            return None
        stream.tap, stream.flush = chain.event, chain.flush
        return chain

    def event(self, event: Event) -> list[Event]:
        """What leaves the chain for one event."""
        return self._through(self._taps, [event])

    def flush(self) -> bytes:
        """A clean end: each tap's last words go through the taps after it."""
        out: list[Event] = []
        while self._taps:
            (impl, tap), *self._taps = self._taps
            try:
                last = [_event(e) for e in tap.end(Outcome.OK)]
            except dispatch.FAILURES as error:
                self._failed(impl, error)
                continue
            if impl.rewrites:
                out += self._through(self._taps, last)
        return b"".join(out)

    def close(self, outcome: Outcome) -> None:
        """The stream ended otherwise: each tap hears of it once, what it returns is dropped."""
        taps, self._taps = self._taps, []
        for impl, tap in taps:
            try:
                tap.end(outcome)
            except dispatch.FAILURES as error:
                impl.failed(error, self._exchange)

    def _through(self, taps: list[tuple[Impl, Tap]], events: list[Event]) -> list[Event]:
        for impl, tap in taps:
            if not events:
                break
            dispatch.running[0] = impl.where
            try:
                if impl.rewrites:
                    events = [out for event in events for out in _outputs(tap.event(event))]
                else:
                    for event in events:
                        tap.event(event)
            except dispatch.FAILURES as error:
                self._failed(impl, error)
        dispatch.running[0] = None
        return events

    def _failed(self, impl: Impl, error: BaseException) -> None:
        dispatch.running[0] = None
        impl.failed(error, self._exchange)
        self._taps = [(i, t) for i, t in self._taps if i is not impl]
        if _guards(impl):
            self._exchange.error_by = f"{impl.plugin}.{impl.hook}"
            raise PluginError from error


def _timed(timings: list[Timing], impl: Impl, exchange: Exchange) -> Tap | None:
    began = time.monotonic()
    tap: Tap | None = None
    try:
        tap = impl.call(exchange)
    finally:
        if tap is None:
            timings.append((*impl.where, began, time.monotonic()))
    return None if tap is None else TimedTap(timings, impl, tap, began)


def _guards(impl: Impl) -> bool:
    """Only who says `on_error: fail` in so many words guards; a tap's default is to be removed."""
    return impl.on_error == "fail" and impl.explicit


def _outputs(out: Event | bytes | Sequence[Event | bytes] | None) -> list[Event]:
    if out is None:
        return []
    if isinstance(out, bytes):
        return [_event(out)]
    return [_event(e) for e in out]


def _event(data: Event | bytes) -> Event:
    return data if isinstance(data, Event) else Event(data)
