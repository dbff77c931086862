"""Routing: which models answer a request, in which order.

A request is matched in this order; what matches first decides:

1. a **task**: the header `X-Xenios-Task: chat`, or the model name `task/chat`. The header wins over whatever stands in
   `model` (which must be there nevertheless, since OpenAI's clients can't leave it out).
2. an **alias**: the model name is exactly an alias' name.
3. a **rule**: the model name matches a glob; the first rule of the list that matches.

Nothing matches: the model that was asked for, at the default upstream. `use` names one model or several in fallback
order (the `fallback` plugin walks through them):

    smart: anthropic/claude-opus-4.6
    fast: [anthropic/claude-haiku-4.5, {model: openai/gpt-5-mini, strip: [temperature]}]
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from gateway import BadRequest, Decision, GatewayError, Target, UpstreamName, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema

    from gateway import Exchange, Services

HEADER = "X-Xenios-Task"
PREFIX = "task/"
_REMEMBERED = 1000
_REMEMBERED_LENGTH = 200
# What a target may not set: it would be asked for something else than the client, who waits in another dialect.
_FIXED = frozenset({"model", "models", "fallbacks", "stream"})


def _parameters(value: dict[str, Any]) -> dict[str, Any]:
    wrong = sorted(_FIXED & value.keys())
    if wrong:
        raise ValueError(f"can't set {', '.join(wrong)}")
    return value


_Parameters = Annotated[dict[str, Any], BeforeValidator(lambda v: _parameters(v) if isinstance(v, dict) else v)]


class TargetEntry(BaseModel):
    """One model at one upstream; a text alone is its model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        None, min_length=1, description="The upstream's name of the model. Required; in a rule: default the asked one."
    )
    upstream: UpstreamName | None = Field(
        None, description="Name in `upstreams`. Default: catalogue.overrides' for this model, else upstream.default."
    )
    set: _Parameters = Field({}, description="Body fields that are set, whatever the client sent. Default none.")
    strip: tuple[str, ...] = Field(
        (), description="Body fields that are removed since this model refuses them. Default none."
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


Use = Annotated[tuple[TargetEntry, ...], Field(min_length=1), BeforeValidator(_listed), _OneOrMany]
Match = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(_listed), _OneOrMany
]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^\S+$")]


class Rule(BaseModel):
    """Models whose names match go elsewhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name = Field(description="Name of the rule in logs and in the reply's `x-xenios-rule`.")
    match: Match = Field(description="Glob of model names (`gpt-*`), or several.")
    use: Use = Field(description="Target, or targets in fallback order.")


class Task(BaseModel):
    """A job that applications name instead of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    use: Use = Field(description="Model, or models in fallback order.")
    description: str = Field("", description="What the task is for. For people. Default none.")
    defaults: _Parameters = Field(
        {},
        description="Body fields that are set where the client did not send them, such as temperature. Default none.",
    )


class Config(BaseModel):
    """Names that clients may ask for, and what answers them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    aliases: dict[Name, Use] = Field(
        {}, description="By name: model, or models in fallback order. Default none. Names are compared exactly."
    )
    rules: tuple[Rule, ...] = Field(
        (), description="Globs of model names and what serves them; the first that matches. Default none."
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
        for where, own, entry in self._entries():
            if entry.model is None and not where.startswith("rule"):
                raise ValueError(f"{where}: a target has no model")
            # An alias may carry its model's own name, to give that model fallbacks.
            if entry.model != own and entry.model in self.aliases:
                raise ValueError(f"{where}: {entry.model!r} is an alias itself; name its models")
            if entry.model is not None and entry.model.startswith(PREFIX):
                raise ValueError(f"{where}: {entry.model!r} is a task; name its models")
        return self

    def _entries(self) -> Iterator[tuple[str, str | None, TargetEntry]]:
        """(where, the alias' own name, target) of every target."""
        for name, use in self.aliases.items():
            yield from ((f"alias {name!r}", name, entry) for entry in use)
        for rule in self.rules:
            yield from ((f"rule {rule.name!r}", None, entry) for entry in rule.use)
        for name, task in self.tasks.items():
            yield from ((f"task {name!r}", None, entry) for entry in task.use)

    def faults(self, upstreams: Sequence[str]) -> list[str]:
        """What is wrong with it beside these upstreams. Of a YAML file `UpstreamName` has said it, with the line."""
        return [
            f"{where}: there is no upstream {entry.upstream!r} (known: {', '.join(upstreams)})"
            for where, _, entry in self._entries()
            if entry.upstream is not None and entry.upstream not in upstreams
        ]


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str
    glob: str
    targets: tuple[Target, ...]
    keeps_name: bool  # a target without a model: the asked one

    def decide(self, asked: str) -> Decision:
        targets = self.targets
        if self.keeps_name:
            targets = tuple(t if t.model else replace(t, model=asked) for t in targets)
        return Decision(asked, targets, alias=asked, rule=self.name, reasons=(f"rule {self.name} ({self.glob})",))


class _Task:
    def __init__(self, name: str, targets: tuple[Target, ...], defaults: Mapping[str, Any]) -> None:
        self._name = name
        self._targets = targets
        self._defaults = defaults
        self._with_defaults = self._targets_with(defaults)

    def decide(self, asked: str, body: Mapping[str, Any], how: str) -> Decision:
        targets = self._with_defaults
        if not self._defaults.keys().isdisjoint(body):
            targets = self._targets_with({name: value for name, value in self._defaults.items() if name not in body})
        return Decision(asked, targets, task=self._name, reasons=(f"task {self._name}, by {how}",))

    def _targets_with(self, missing: Mapping[str, Any]) -> tuple[Target, ...]:
        return tuple(Target(t.model, t.upstream, {**missing, **t.overrides}, t.strip) for t in self._targets)


class Plugin:
    """Maps tasks, aliases and globs of model names to targets."""

    Config: TypeAlias = Config

    def __init__(self, config: Config, services: Services) -> None:
        settings = services.settings
        faults = config.faults(tuple(settings.upstreams))
        if faults:
            raise ValueError("; ".join(faults))
        served_by = {model: o.upstream for model, o in settings.catalogue.overrides.items() if o.upstream}

        def targets(use: Sequence[TargetEntry]) -> tuple[Target, ...]:
            return tuple(
                Target(
                    e.model or "", e.upstream or served_by.get(e.model or "", settings.upstream.default), e.set, e.strip
                )
                for e in use
            )

        self._tasks = {name: _Task(name, targets(task.use), task.defaults) for name, task in config.tasks.items()}
        self._aliases = {
            name: Decision(name, targets(use), alias=name, reasons=(f"alias {name}",))
            for name, use in config.aliases.items()
        }
        self._rules = [
            _Rule(rule.name, glob, targets(rule.use), any(entry.model is None for entry in rule.use))
            for rule in config.rules
            for glob in rule.match
        ]
        # One pattern for all rules; alternatives are tried in order, and the group that matched is the rule's.
        self._pattern = (
            re.compile("|".join(f"({fnmatch.translate(rule.glob)})" for rule in self._rules)) if self._rules else None
        )
        self._ruled: dict[str, _Rule | None] = {}
        # What GET /v1/models lists beside the upstreams' models.
        self.listed_models: tuple[str, ...] = (*self._aliases, *(PREFIX + name for name in self._tasks))

    @hookimpl
    async def choose_targets(self, exchange: Exchange) -> Decision | None:
        body = exchange.body
        # OpenRouter's clients may send a list of models instead.
        asked = str(body.get("model") or next(iter(body.get("models") or ()), ""))
        task = exchange.request.header(HEADER)
        if task:
            return self._task(task.strip(), HEADER, exchange).decide(asked, body, "header")
        alias = self._aliases.get(asked)
        if alias is not None:
            return alias
        if asked.startswith(PREFIX):
            return self._task(asked[len(PREFIX) :], "model", exchange).decide(asked, body, "model")
        rule = self._ruled[asked] if asked in self._ruled else self._match(asked)
        return rule.decide(asked) if rule is not None else None

    @hookimpl
    async def explain(self, exchange: Exchange) -> Sequence[str] | None:
        try:
            decision = await self.choose_targets(exchange)
        except GatewayError as error:
            return [f"refuses: {error.message}"]
        if decision is None:
            return ["nothing matches: the asked model at the default upstream"]
        places = ", then ".join(f"{target.model} at {target.upstream}" for target in decision.targets)
        return [f"{'; '.join(decision.reasons)}: {places}"]

    def _match(self, asked: str) -> _Rule | None:
        """The first rule that matches, remembered: a hundred globs cost 20 µs. Clients choose the names: bounded."""
        found = self._pattern.fullmatch(asked) if self._pattern else None
        rule = self._rules[(found.lastindex or 1) - 1] if found else None
        if len(asked) <= _REMEMBERED_LENGTH:
            if len(self._ruled) >= _REMEMBERED:
                self._ruled.clear()
            self._ruled[asked] = rule
        return rule

    def _task(self, name: str, param: str, exchange: Exchange) -> _Task:
        task = self._tasks.get(name)
        if task is None:
            scopes = exchange.principal.scopes if exchange.principal else None
            known = ", ".join(n for n in self._tasks if scopes is None or scopes.allows("tasks", n))
            raise BadRequest(
                f"There is no task {name[:100]!r}. {f'Known: {known}.' if known else 'None is known.'}",
                param=param,
                code="unknown_task",
            )
        return task
