"""What the simulated model says, how many tokens that is, and what OpenRouter would bill for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from importlib import resources
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.simulator.schemas import instance
from gateway.simulator.steering import Steering, is_simulated

if TYPE_CHECKING:
    from collections.abc import Iterator

AUTO = "openrouter/auto"
_AUTO_SERVES = "openai/gpt-4o-mini"
_DEFAULT_PIECE = 12
_FILLER = "The quick brown fox jumps over the lazy dog while nobody counts the tokens. "
_TOOL_WORDS = ("tool", "weather")
BIG_LINE = 10 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of any dialect. `after_tool`: the last word came from a tool.
    `tool_choice`: none, auto, required or a tool's name. `output`: None for text, else the schema to satisfy.
    """

    body: dict[str, Any]
    text: str
    prompt_chars: int
    after_tool: bool = False
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    output: dict[str, Any] | None = None
    max_tokens: int | None = None
    choices: int = 1
    reasoning: bool = False
    stop: tuple[str, ...] = ()

    @property
    def streams(self) -> bool:
        return self.body.get("stream") is True


@dataclass(frozen=True, slots=True)
class Usage:
    """`cost` in USD; `seconds` of audio and `search_units` only where an endpoint bills them."""

    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    prompt_cost: float = 0.0
    completion_cost: float = 0.0
    request_cost: float = 0.0
    seconds: float = 0.0
    search_units: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    @property
    def cost(self) -> float:
        return round(self.prompt_cost + self.completion_cost + self.request_cost, 12)


@dataclass(frozen=True, slots=True)
class Answer:
    """`finish`: stop, length, tool_calls, error or "" (blank). `pieces` joined are `text`."""

    usage: Usage
    pieces: tuple[str, ...] = ()
    call: tuple[Tool, str] | None = None
    reasoning: tuple[str, ...] = ()
    finish: str = "stop"
    failed: bool = False
    reports_usage: bool = True

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Models:
    """The bundled list, as GET /models answers it, plus the entry that prices simulated models and one that retires."""

    data: list[dict[str, Any]]
    by_id: dict[str, dict[str, Any]] = field(repr=False)

    def find(self, asked: str) -> dict[str, Any] | None:
        """What serves `asked`: variants (`:free`), canonical slugs and `~author/family-latest` count."""
        if is_simulated(asked):
            return {**self.by_id.get(asked, self.by_id["xenios/sim"]), "id": asked}
        if asked == AUTO:
            return self.by_id[_AUTO_SERVES]
        known = asked.split(":", 1)[0]
        if known.startswith("~"):
            family = known[1:].removesuffix("-latest")
            return next((item for item in reversed(self.data) if item["id"].startswith(family)), None)
        return self.by_id.get(known)


def load_models() -> Models:
    text = resources.files("gateway").joinpath("data", "openrouter-models.json").read_bytes()
    data: list[dict[str, Any]] = msgspec.json.decode(text)["data"]
    simulated = {
        **data[0],
        "id": "xenios/sim",
        "canonical_slug": "xenios/sim",
        "name": "Xenios: simulated model",
        "pricing": {"prompt": "0.000001", "completion": "0.000005", "request": "0"},
        "expiration_date": None,
        "links": {"details": "/api/v1/models/xenios/sim/endpoints"},
    }
    retiring = {
        **simulated,
        "id": "xenios/sim-expiring",
        "canonical_slug": "xenios/sim-expiring",
        "name": "Xenios: simulated model that retires in thirty days",
        "expiration_date": (datetime.now(UTC).date() + timedelta(days=30)).isoformat(),
        "links": {"details": "/api/v1/models/xenios/sim-expiring/endpoints"},
    }
    data = [*data, simulated, retiring]
    return Models(data, {name: item for item in data for name in (item["canonical_slug"], item["id"])})


def tokens_of(chars: int) -> int:
    return -(-chars // 4)


def bill(model: dict[str, Any], usage: Usage, *, requests: int = 0) -> Usage:
    """A negative price (routers, audio by the minute) says that there is none per token: it bills 0."""
    pricing = dict(model["pricing"])
    for tier in pricing.get("overrides", ()):
        if usage.prompt >= tier.get("min_prompt_tokens", 0):
            pricing.update(tier)
    prompt, completion, request = (
        max(float(pricing.get(name, 0)), 0.0) for name in ("prompt", "completion", "request")
    )
    return replace(
        usage,
        prompt_cost=usage.prompt * prompt,
        completion_cost=usage.completion * completion,
        request_cost=usage.request_cost + requests * request,
    )


def compose(ask: Ask, model: dict[str, Any], steering: Steering) -> Answer:
    """The whole answer of a text model; deterministic for one request and model name."""
    reasoning = tuple(_cut(f"The user wrote: {_echo(ask.text)} A short answer will do.", 16)) if ask.reasoning else ()
    reasoning_tokens = tokens_of(sum(map(len, reasoning)))
    tool = None if "empty" in steering or ask.output is not None else _tool_to_call(ask)
    if tool is not None:
        made = instance(tool.schema)
        arguments = msgspec.json.encode(made if isinstance(made, dict) else {}).decode()
        completion = tokens_of(len(tool.name) + len(arguments)) + reasoning_tokens
        answer = Answer(Usage(), call=(tool, arguments), reasoning=reasoning, finish="tool_calls")
    else:
        text, finish = _limited(_text(ask, model, steering), ask)
        answer = Answer(Usage(), pieces=tuple(_pieces(text, steering)), reasoning=reasoning, finish=finish)
        completion = (tokens_of(len(text)) + reasoning_tokens) * ask.choices
    if "empty" in steering:
        answer, completion, reasoning_tokens = replace(answer, reasoning=()), 0, 0
    usage = Usage(tokens_of(ask.prompt_chars), completion, reasoning_tokens)
    return _marred(replace(answer, usage=bill(model, usage)), steering)


def misreported(answer: Answer, steering: Steering) -> Answer:
    """The usage as the name's words have it: missing, negative or absurd."""
    if "negusage" in steering:
        answer = replace(answer, usage=Usage(-5, -7, prompt_cost=-0.5))
    if "absusage" in steering:
        answer = replace(answer, usage=Usage(10**15, 10**15, prompt_cost=1e12))
    return replace(answer, reports_usage=False) if "nousage" in steering else answer


def _marred(answer: Answer, steering: Steering) -> Answer:
    if steering.first(frozenset({"finerr", "errmid", "errpre"})):
        # zero-completion insurance: what ends in an error is not charged
        usage = replace(answer.usage, prompt_cost=0.0, completion_cost=0.0)
        answer = replace(answer, usage=usage, failed=True)
    if "errpre" in steering:
        answer = replace(answer, pieces=(), reasoning=(), call=None)
    return misreported(answer, steering)


def _tool_to_call(ask: Ask) -> Tool | None:
    if not ask.tools or ask.tool_choice == "none":
        return None
    named = next((tool for tool in ask.tools if tool.name == ask.tool_choice), None)
    if named is not None:
        return named
    invited = not ask.after_tool and any(word in ask.text.lower() for word in _TOOL_WORDS)
    return ask.tools[0] if ask.tool_choice == "required" or invited else None


def _text(ask: Ask, model: dict[str, Any], steering: Steering) -> str:
    if "empty" in steering:
        return ""
    if ask.output is not None:
        return msgspec.json.encode(instance(ask.output)).decode()
    opening = f'This is a simulated answer. You wrote: "{_echo(ask.text)}" No model was asked, nothing was spent. '
    if "split" in steering:
        opening = "Größe 日本語 ✓ " + opening
    size = _size(steering)
    if size is not None:
        opening = _shaped(opening, size)
    elif not is_simulated(str(model["id"])):
        opening += f"{model['name']} would have thought about it longer. "
    return opening if size is not None else opening.rstrip()


def _size(steering: Steering) -> int | None:
    if "bigline" in steering:
        return BIG_LINE
    if steering.chunks is None:
        return None
    return steering.chunks * (steering.chunk_bytes or _DEFAULT_PIECE)


def _shaped(opening: str, size: int) -> str:
    """Exactly `size` bytes when the opening is ASCII: what a load test asks for."""
    plain = opening.encode("ascii", "replace").decode()
    return (plain + _FILLER * (max(size - len(plain), 0) // len(_FILLER) + 1))[:size]


def _limited(text: str, ask: Ask) -> tuple[str, str]:
    for stop in ask.stop:
        if stop and stop in text:
            text = text[: text.index(stop)]
    if ask.max_tokens is not None and tokens_of(len(text)) > ask.max_tokens:
        return text[: ask.max_tokens * 4], "length"
    return text, "stop"


def _pieces(text: str, steering: Steering) -> Iterator[str]:
    if "bigline" in steering:
        return iter([text] if text else [])
    return _cut(text, steering.chunk_bytes or _DEFAULT_PIECE)


def _cut(text: str, size: int) -> Iterator[str]:
    return (text[at : at + size] for at in range(0, len(text), size))


def _echo(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:77] + "..."


def digest(text: str, size: int) -> bytes:
    """Pseudo-random bytes that depend on `text` alone: embeddings, scores and images repeat."""
    return hashlib.shake_128(text.encode("utf-8", "surrogatepass")).digest(size)
