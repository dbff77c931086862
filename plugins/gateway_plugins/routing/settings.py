"""What the YAML may say of routing: aliases, rules, tasks, and the targets that they name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    field_validator,
    model_validator,
)

from gateway import Cause, Duration, UpstreamName, When

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema

HEADER = "X-Xenios-Task"
PREFIX = "task/"
# What a target may not set: it would be asked for something else than the client, who waits in another dialect.
FIXED = frozenset({"model", "models", "fallbacks", "stream"})
# What a target may not take out: without it there is no request.
_NEEDED = FIXED | {"messages", "input", "prompt", "query", "documents", "file"}
# Ends of an attempt that are nobody's failure, or the client's own mistake; and what is no end of one.
_NO_FALLBACK = frozenset({Cause.CLIENT_DISCONNECT, Cause.ABANDONED, Cause.INVALID_REQUEST, Cause.CIRCUIT_OPEN})


def _parameters(value: dict[str, Any]) -> dict[str, Any]:
    wrong = sorted(FIXED & value.keys())
    if wrong:
        raise ValueError(f"can't set {', '.join(wrong)}")
    if "provider" in value:
        raise ValueError("write it as a target's own `provider`: there it is checked, and merged")
    return value


def _spared(name: str) -> str:
    if name in _NEEDED:
        raise ValueError(f"can't strip {name}")
    return name


Parameters = Annotated[dict[str, Any], BeforeValidator(lambda v: _parameters(v) if isinstance(v, dict) else v)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Timeouts(_Section):
    """Time limits of one attempt."""

    first_event: Duration | None = Field(
        None, gt=0, description="To the first content event. Default upstream.first_event_timeout."
    )
    stall: Duration | None = Field(
        None, gt=0, description="Longest silence within a reply. Default upstream.stall_timeout."
    )
    total: Duration | None = Field(None, gt=0, description="To the last byte. Default none of its own.")


Amount = PositiveFloat | dict[Literal["p50", "p75", "p90", "p99"], PositiveFloat]
Quantization = Literal[
    "int4", "int8", "fp4", "mxfp4", "nvfp4", "fp6", "fp8", "mxfp8", "fp16", "bf16", "fp32", "unknown"
]


class Sort(_Section):
    """OpenRouter's `sort` with a partition."""

    by: Literal["price", "throughput", "latency", "exacto"] = Field(description="What counts. Required.")
    partition: Literal["model", "none"] | None = Field(None, description="OpenRouter's. Default model.")


class MaxPrice(_Section):
    """The most that a provider may cost, in USD per million tokens (`request`: per request, `image`: per image)."""

    prompt: Annotated[float, Field(ge=0)] | None = Field(None, description="Input. Default any.")
    completion: Annotated[float, Field(ge=0)] | None = Field(None, description="Output. Default any.")
    request: Annotated[float, Field(ge=0)] | None = Field(None, description="Each request. Default any.")
    image: Annotated[float, Field(ge=0)] | None = Field(None, description="Each image. Default any.")
    audio: Annotated[float, Field(ge=0)] | None = Field(None, description="Audio. Default any.")


class Provider(_Section):
    """OpenRouter's provider preferences: https://openrouter.ai/docs/features/provider-routing."""

    order: tuple[str, ...] | None = Field(None, description="Providers to try, in order. Default OpenRouter's.")
    only: tuple[str, ...] | None = Field(None, description="Providers allowed. Default all.")
    ignore: tuple[str, ...] | None = Field(None, description="Providers not allowed. Default none.")
    allow_fallbacks: bool | None = Field(None, description="Others may answer if these fail. Default true.")
    require_parameters: bool | None = Field(
        None, description="Only providers that know all parameters of the request. Default false."
    )
    data_collection: Literal["allow", "deny"] | None = Field(
        None, description="deny: only providers that keep no data. Default allow."
    )
    zdr: bool | None = Field(None, description="Only zero data retention. Default false.")
    enforce_distillable_text: bool | None = Field(
        None, description="Only models whose output may train others. Default false."
    )
    quantizations: tuple[Quantization, ...] | None = Field(None, description="Quantizations allowed. Default all.")
    sort: Literal["price", "throughput", "latency", "exacto"] | Sort | None = Field(
        None, description="What providers are sorted by. Default OpenRouter's balance."
    )
    max_price: MaxPrice | None = Field(None, description="The most that one may cost. Default any.")
    preferred_min_throughput: Amount | None = Field(None, description="Tokens per second. Default any.")
    preferred_max_latency: Amount | None = Field(None, description="Seconds. Default any.")
    options: dict[str, dict[str, Any]] | None = Field(None, description="Options by provider. Default none.")


class TargetEntry(_Section):
    """One model at one upstream; a text alone is its model."""

    model: str | None = Field(
        None,
        min_length=1,
        description="The upstream's name of the model, with a variant (`:nitro`) or preset (`@preset/name`) if wanted. "
        "Required; in a rule: default what would answer without it (of the task or alias, else the asked model).",
    )
    upstream: UpstreamName | None = Field(
        None, description="Name in `upstreams`. Default: catalogue.overrides' for this model, else upstream.default."
    )
    set: Parameters = Field({}, description="Body fields that are set, whatever the client sent. Default none.")
    strip: tuple[Annotated[str, AfterValidator(_spared)], ...] = Field(
        (), description="Body fields that are removed since this model refuses them. Default none."
    )
    provider: Provider | None = Field(
        None,
        description="OpenRouter's provider preferences; each wins over the upstream's and the client's. Default none.",
    )
    timeouts: Timeouts | None = Field(
        None, description="Time limits of an attempt at it. Default the rule's or task's, else the settings'."
    )
    max_usd: PositiveFloat | None = Field(
        None, description="Left out of requests that may cost more USD. Default the rule's or task's."
    )

    @model_validator(mode="before")
    @classmethod
    def _model_alone(cls, value: object) -> object:
        return {"model": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "minLength": 1}, handler.resolve_ref_schema(handler(core_schema))]}


class _OneOrMany:
    """A list, of which one entry may stand alone."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        many = handler(core_schema)
        return {"anyOf": [many["items"], many]}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(source)


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


def _acts(cause: Cause) -> Cause:
    if cause in _NO_FALLBACK:
        raise ValueError(f"{cause} is nothing that another model could mend")
    return cause


Use = Annotated[tuple[TargetEntry, ...], Field(min_length=1), BeforeValidator(_listed), _OneOrMany]
Match = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(_listed), _OneOrMany
]
Causes = Annotated[tuple[Annotated[Cause, AfterValidator(_acts)], ...], BeforeValidator(_listed), _OneOrMany]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^\S+$")]


class Side(_Section):
    """A share of the requests."""

    weight: Annotated[float, Field(gt=0, le=1_000_000)] = Field(
        description="Its share, in proportion to the other sides'. Required."
    )
    use: Use = Field(description="Target, or targets in fallback order. Required.")


class _Way(_Section):
    """What rules and tasks have in common: which models answer, and within which limits."""

    use: Use | None = Field(None, description="Target, or targets in fallback order.")
    split: tuple[Side, ...] | None = Field(
        None,
        min_length=2,
        description="Instead of `use`: a list of {weight, use}, among which requests are shared out.",
    )
    sticky: Literal["user", "session", "key"] | None = Field(
        None,
        description="Of a split: the same user (the body's `user`), session (`session_id` or x-session-id) or key "
        "stays on its side; who names none is drawn. Default: each request is drawn.",
    )
    others_follow: bool = Field(
        False, description="Of a split: the other sides' targets are fallbacks of the chosen one's. Default false."
    )
    timeout: Duration | None = Field(
        None,
        gt=0,
        description="Of the whole request, fallbacks included. Default, and at most, server.request_timeout.",
    )
    timeouts: Timeouts | None = Field(None, description="Time limits of each attempt. Default the settings'.")
    fallback_on: Causes | None = Field(
        None, description="Causes after which the next target is tried. Default as `fallback` says; []: none."
    )
    max_usd: PositiveFloat | None = Field(
        None,
        description="Targets are left out of requests that may cost more USD with them; none left: 400 `cost_ceiling`. "
        "Default no limit.",
    )

    @property
    def sides(self) -> tuple[Side, ...]:
        return self.split or ((Side(weight=1, use=self.use),) if self.use else ())

    def _check_split(self) -> None:
        if self.use is not None and self.split is not None:
            raise ValueError("has both `use` and `split`")
        if self.split is None and (self.sticky is not None or self.others_follow):
            raise ValueError("`sticky` and `others_follow` are for a `split`")


class Rule(_Way):
    """Requests that match go to these models."""

    name: Name = Field(description="Name of the rule in logs and in the reply's `x-xenios-rule`. Required.")
    match: Match | None = Field(
        None, description="Glob of names asked for (`gpt-*`), or several: short for when: {models: …}. Default all."
    )
    when: When | None = Field(None, description="The requests that it is for; all must hold. Default all.")
    refuse: str | None = Field(
        None, min_length=1, description="Instead of models: 403 with this message. Default: not refused."
    )
    offload: bool = Field(
        False,
        description="Its requests become jobs, which the plugin `jobs` answers with 202 and runs later; alone, without "
        "another choice of models. Default false.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Rule:
        self._check_split()
        ways = (self.use is not None) + (self.split is not None) + (self.refuse is not None)
        if ways > 1 or (ways == 0 and not self.offload):
            raise ValueError("needs one of `use`, `split` and `refuse`")
        if self.offload and self.refuse is not None:
            raise ValueError("has `offload` beside `refuse`")
        if self.match is not None and self.when is not None and self.when.models is not None:
            raise ValueError("`match` is short for `when: {models: …}`; write one of them")
        return self

    @property
    def sides(self) -> tuple[Side, ...]:
        """One that only offloads keeps what would answer without it."""
        return super().sides or ((Side(weight=1, use=(TargetEntry(),)),) if self.offload else ())

    @property
    def conditions(self) -> When | None:
        """`when`, with `match` in it."""
        if self.match is None:
            return self.when
        return (self.when or When()).model_copy(update={"models": self.match})


class AnswerSchema(_Section):
    """A JSON schema that answers must follow."""

    json_schema: dict[str, Any] = Field(alias="schema", description="The JSON schema. Required.")
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Its name. Default the task's.")
    strict: bool = Field(True, description="Held to by the model, not only aimed at. Default true.")

    model_config = ConfigDict(validate_by_alias=True, validate_by_name=True)


class Task(_Way):
    """A job that applications name instead of a model."""

    description: str = Field("", description="What the task is for. For people. Default none.")
    rule: Name | None = Field(
        None, description="Instead of `use`: name of the rule whose models answer, whatever its `when` says."
    )
    defaults: Parameters = Field(
        {},
        description="Body fields that are set where the client did not send them, such as temperature. Default none.",
    )
    response_format: AnswerSchema | None = Field(
        None,
        description="JSON schema of the answer where the client asked for no form of it (chat/completions, responses, "
        "messages). Default none.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Task:
        self._check_split()
        if self.rule is not None and (self.use is not None or self.split is not None):
            raise ValueError("has `rule` beside `use` or `split`")
        return self


class Config(_Section):
    """Names that clients may ask for, and what answers them."""

    native_fallback: Literal["off", "openrouter"] = Field(
        "off",
        description="Who tries the next model. off: this gateway, one by one; a client's `models` become its targets. "
        "openrouter: targets in a row at one OpenRouter with equal parameters are sent as `models` in one attempt, "
        "unless `fallback_on` is said for them. OpenRouter's own fallback also acts on moderation. Default off.",
    )
    rules: tuple[Rule, ...] = Field(
        (), description="Asked in order, before tasks and aliases; the first that matches decides. Default none."
    )
    aliases: dict[Name, Use] = Field(
        {}, description="By name: model, or models in fallback order. Default none. Names are compared exactly."
    )
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], Task] = Field(
        {}, description=f"By name, which clients send in the header {HEADER} or as model `task/<name>`. Default none."
    )

    @field_validator("aliases")
    @classmethod
    def _own_names(cls, value: dict[str, tuple[TargetEntry, ...]]) -> dict[str, tuple[TargetEntry, ...]]:
        for name in value:
            if name.startswith(PREFIX):
                raise ValueError(f"{name!r} looks like a task: {PREFIX} is kept for those")
        return value

    @model_validator(mode="after")
    def _point_at_models(self) -> Config:
        names = [rule.name for rule in self.rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two rules are called {twice[0]!r}")
        for name, task in self.tasks.items():
            rule = next((r for r in self.rules if r.name == task.rule), None)
            if task.rule is not None and rule is None:
                raise ValueError(f"task {name!r}: there is no rule {task.rule!r}")
            if rule is not None and rule.refuse is not None:
                raise ValueError(f"task {name!r}: rule {task.rule!r} names no models, it refuses")
            if rule is not None and any(e.model is None for side in rule.sides for e in side.use):
                raise ValueError(f"task {name!r}: rule {task.rule!r} has a target without a model")
        for place in self.entries():
            entry, where = place.entry, place.name
            if entry.model is None and not where.startswith("rule"):
                raise ValueError(f"{where}: a target has no model")
            # An alias may carry its model's own name, to give that model fallbacks.
            if entry.model != place.own and entry.model in self.aliases:
                raise ValueError(f"{where}: {entry.model!r} is an alias itself; name its models")
            if entry.model is not None and entry.model.startswith(PREFIX):
                raise ValueError(f"{where}: {entry.model!r} is a task; name its models")
        return self

    def entries(self) -> Iterator[Place]:
        """Every target, with the name of what it is in."""
        for name, use in self.aliases.items():
            yield from _places(f"alias {name!r}", ("aliases", name), use, own=name)
        for index, rule in enumerate(self.rules):
            yield from _of_way(f"rule {rule.name!r}", ("rules", index), rule)
        for name, task in self.tasks.items():
            yield from _of_way(f"task {name!r}", ("tasks", name), task)

    def faults(self, kinds: Mapping[str, str]) -> list[str]:
        """What is wrong with it beside these upstreams (name → kind), which only the whole file tells."""
        out = [
            f"{place.name}: there is no upstream {place.entry.upstream!r} (known: {', '.join(kinds)})"
            for place in self.entries()
            if place.entry.upstream is not None and place.entry.upstream not in kinds
        ]
        return out + [
            f"{place.name}: only an upstream of kind openrouter has provider preferences"
            for place in self.entries()
            if place.entry.provider is not None and kinds.get(place.entry.upstream or "") == "openai"
        ]


Path: TypeAlias = tuple[str | int, ...]


class Place(NamedTuple):
    """A target and where it stands. `own`: the alias' name that it is in."""

    name: str
    path: Path
    entry: TargetEntry
    own: str | None = None


def _places(name: str, path: Path, use: Sequence[TargetEntry], own: str | None = None) -> Iterator[Place]:
    for index, entry in enumerate(use):
        yield Place(name, (*path, index), entry, own)


def _of_way(name: str, path: Path, way: _Way) -> Iterator[Place]:
    if way.use is not None:
        yield from _places(name, (*path, "use"), way.use)
    for index, side in enumerate(way.split or ()):
        yield from _places(name, (*path, "split", index, "use"), side.use)
