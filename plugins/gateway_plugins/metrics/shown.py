"""The numbers as Prometheus reads them, and some once more under the names of OpenTelemetry's GenAI conventions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics

from gateway import Family, Series

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    from prometheus_client.core import Metric

# Source: PROTOCOL §4 (semantic-conventions-genai); what it has no name for goes by the endpoint's.
_OPERATIONS = {
    "chat/completions": "chat",
    "messages": "chat",
    "responses": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
    "images/generations": "generate_content",
}


class _Same(NamedTuple):
    """A metric of ours under another name."""

    name: str
    about: str
    streams: bool = False


_GENAI = {
    "xenios_request_duration_seconds": _Same(
        "gen_ai_server_request_duration_seconds", "GenAI: duration of requests, as xenios_request_duration_seconds."
    ),
    "xenios_time_to_first_token_seconds": _Same(
        "gen_ai_server_time_to_first_token_seconds", "GenAI: as xenios_time_to_first_token_seconds."
    ),
    "xenios_time_per_output_token_seconds": _Same(
        "gen_ai_server_time_per_output_token_seconds", "GenAI: as xenios_time_per_output_token_seconds."
    ),
    "xenios_attempt_duration_seconds": _Same(
        "gen_ai_client_operation_duration_seconds", "GenAI: duration of attempts, as xenios_attempt_duration_seconds."
    ),
    "xenios_request_tokens": _Same("gen_ai_client_token_usage", "GenAI: tokens of requests, as xenios_request_tokens."),
}


class Format(NamedTuple):
    """Of the text. Names are plain ASCII, so no way of writing others needs to be agreed on."""

    encode: Callable[[Any], bytes]
    content_type: str


PLAIN = Format(exposition.generate_latest, exposition.CONTENT_TYPE_PLAIN_0_0_4)
OPENMETRICS = Format(openmetrics.generate_latest, openmetrics.CONTENT_TYPE_LATEST)


def accepted(accept: str) -> Format:
    return OPENMETRICS if "application/openmetrics-text" in accept.lower() else PLAIN


def shown(families: Sequence[Family], encode: Callable[[Any], bytes], upstreams: Mapping[str, str] | None) -> bytes:
    """`upstreams`: name → kind; None: without GenAI's names."""
    genai = _genai(families, upstreams) if upstreams is not None else ()
    return encode(_Collected([*families, *genai]))


class Newest:
    """One text for all who ask at the same time: making it is what a scrape costs."""

    def __init__(self, make: Callable[[], Awaitable[bytes]]) -> None:
        self._make = make
        self._making = asyncio.Lock()
        self._begun = self._made = 0
        self._text = b""

    async def get(self) -> bytes:
        """One that was begun after this was called: an older one may tell less than another worker did since."""
        wanted = self._begun + 1
        async with self._making:
            if self._made < wanted:
                self._begun = number = self._begun + 1
                self._text = await self._make()
                self._made = number
            return self._text


class _Collected:
    """What prometheus_client takes for a registry."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return map(_family, self._families)


def _family(family: Family) -> Metric:
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        bounds = [*map(_bound, family.bounds), "+Inf"]
        for series in family.series:
            total, buckets = 0, []
            for bound, count in zip(bounds, series.counts, strict=True):
                total += count
                buckets.append((bound, float(total)))
            histogram.add_metric(series.labels, buckets, series.value)
        return histogram
    make: Callable[..., CounterMetricFamily | GaugeMetricFamily] = (
        CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    )
    plain = make(family.name, family.help, labels=family.labels)
    for series in family.series:
        plain.add_metric(series.labels, series.value)
    return plain


def _bound(bound: float) -> str:
    return str(float(bound))


def _genai(families: Iterable[Family], upstreams: Mapping[str, str]) -> Iterator[Family]:
    for family in families:
        same = _GENAI.get(family.name)
        if same is not None:
            yield _renamed(family, same, upstreams)


def _renamed(family: Family, same: _Same, upstreams: Mapping[str, str]) -> Family:
    """With GenAI's labels; series that then are one are added up."""
    failure = next((name for name in ("outcome", "cause") if name in family.labels), None)
    has_kind = "kind" in family.labels
    labels: tuple[str, ...] = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
    labels += ("error_type",) * (failure is not None) + ("gen_ai_token_type",) * has_kind
    out = Family(same.name, family.kind, same.about, labels, family.merge, family.bounds, [])
    sums: dict[tuple[str, ...], Series] = {}
    for series in family.series:
        of = dict(zip(family.labels, series.labels, strict=True))
        if not of["upstream"]:
            continue  # refused before there was a model
        values: tuple[str, ...] = (
            _OPERATIONS.get(of["endpoint"], of["endpoint"]),
            "openrouter" if upstreams.get(of["upstream"]) == "openrouter" else of["upstream"],
            of["model"],
        )
        if failure is not None:
            values += ("" if of[failure] == "ok" else of[failure],)
        if has_kind:
            values += (of["kind"],)
        there = sums.get(values)
        sums[values] = series.under(values) if there is None else there.plus(series)
    out.series = list(sums.values())
    return out
