"""Mistakes in a configuration: what and where, in plain words. pydantic's findings are translated here."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, Secret, SecretBytes, SecretStr
from pydantic_core import ErrorDetails, PydanticCustomError

from gateway.units import DURATION_EXAMPLES, SIZE_EXAMPLES

Steps = tuple[str | int, ...]
"""A place in the YAML: mapping keys and list indexes from the top."""

MASK: Final = str(SecretStr("x"))


@dataclass(frozen=True)
class Problem:
    """One mistake. `line` and `column` count from 1 and are None where there is no text to point at."""

    file: str
    line: int | None
    column: int | None
    path: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        path = f" {self.path}:" if self.path else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{place}:{path} {self.message}{hint}"


class Concern(NamedTuple):
    """What is wrong, or will be, with a sound configuration in the world as it is: a model that is gone.

    `path`: where in the section, or the plugin's `config`, that is looked at.
    """

    path: Steps
    message: str
    severity: Literal["error", "warning"] = "warning"


class ConfigError(Exception):
    """The configuration can't be used; `problems` holds every mistake that was found, in line order.

    `files`: what it names, readable or not, where that is known: a change of one of them may mend it.
    """

    def __init__(self, problems: Sequence[Problem], files: Iterable[Path] = ()) -> None:
        self.problems = tuple(problems)
        self.files = frozenset(files)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def spell(path: Sequence[str | int]) -> str:
    """`plugins[2].config.per_minute`; a key that holds other characters is quoted: `overrides["a/b"]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'["{part}"]'
    return text.removeprefix(".")


def in_line_order(problems: Sequence[Problem]) -> list[Problem]:
    """Sorted; what stands behind an anchor is said once, however often it is used."""
    unique = {(problem.line, problem.column, problem.message): problem for problem in reversed(problems)}
    return sorted(unique.values(), key=lambda problem: (problem.line or 0, problem.column or 0))


def did_you_mean(word: object, known: Collection[str]) -> str | None:
    close = get_close_matches(word.lower(), known, n=1, cutoff=0.5) if isinstance(word, str) else []
    return f"did you mean {close[0]!r}?" if close else None


def refusal(problem: str, hint: str | None = None) -> PydanticCustomError:
    """An error of our own validators: its words reach the user as they are, save for secrets."""
    return PydanticCustomError("refused", "{problem}", {"problem": problem, "hint": hint})


# --- pydantic's findings ----------------------------------------------------------------------------------

_WANTED: Final = {
    "int": "a whole number",
    "bool": "true or false",
    "float": "a number",
    "decimal": "a number",
    "string": "text",
    "path": "a file name",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}


@dataclass(frozen=True)
class Finding:
    """One of pydantic's error details, beside the file and the model that it speaks of."""

    detail: ErrorDetails
    path: Steps
    siblings: tuple[str, ...]
    """The keys that the model knows where `path` ends."""
    secret: bool

    @property
    def about_key(self) -> bool:
        return self.detail["type"] == "extra_forbidden" or "[key]" in self.detail["loc"]

    @property
    def is_consequence(self) -> bool:
        """Whether this only repeats that another field, or an entry of this list, is wrong."""
        kind, given = self.detail["type"], self.detail["input"]
        if kind == "literal_error" and isinstance(given, dict):  # `false` or a mapping: what is wrong is within that
            return str(self.detail["loc"][-1]).startswith("literal[")
        return kind == "default_factory_not_called" or (
            kind == "too_short" and len(given) >= self.detail["ctx"]["min_length"]
        )

    def words(self, given: object, hidden: Collection[str]) -> tuple[str, str | None]:
        """Message and hint. `given`: the value as it stands in the file; `hidden`: texts that it got from `${…}`."""
        kind, context = self.detail["type"], self.detail.get("ctx", {})
        shown = _shown(given, hide=self.secret or bool(hidden))
        if kind == "missing":
            return "is required", None
        if kind == "extra_forbidden":
            return "unknown key", did_you_mean(self.path[-1], self.siblings) or _known(self.siblings)
        if kind in {"too_short", "too_long"}:
            return _length(context, given), None
        if kind == "unit":
            examples = DURATION_EXAMPLES if context["kind"] == "duration" else SIZE_EXAMPLES
            return f"{shown} is not a {context['kind']}", f"write {examples}"
        if kind.endswith(("_type", "_parsing", "_from_float")) and kind.partition("_")[0] in _WANTED:
            unquoted = kind in {"string_type", "path_type"} and isinstance(given, int | float)
            return f"must be {_WANTED[kind.partition('_')[0]]}, not {shown}", "put it in quotes" if unquoted else None
        # `error` is the exception of a validator, maybe of a plugin's author, who may have quoted the value.
        error = context.get("error")
        message = str(error) if isinstance(error, Exception) else self.detail["msg"]
        for text in sorted({*hidden, str(given) if self.secret else ""} - {""}, key=len, reverse=True):
            message = message.replace(text, MASK)
        if message.startswith("Input should be "):
            message += f", not {shown}"
        hint = context.get("hint") if kind == "refused" else None
        if kind in {"literal_error", "enum"}:
            hint = did_you_mean(given, re.findall(r"'([^']*)'", context["expected"]))
        return re.sub(r"^\w+ should ", "must ", message), hint


def _known(names: Sequence[str]) -> str | None:
    return f"known: {', '.join(names)}" if names else None


def _length(context: dict[str, Any], given: object) -> str:
    what = "characters" if isinstance(given, str) else "entries"
    if context.get("min_length") == 1:
        return "must not be empty"
    bound = "min_length" if "min_length" in context else "max_length"
    most = "least" if bound == "min_length" else "most"
    return f"must have at {most} {context[bound]} {what}, not {context['actual_length']}"


def _shown(given: object, *, hide: bool) -> str:
    if isinstance(given, dict | list | None):
        return "a mapping" if isinstance(given, dict) else "a list" if isinstance(given, list) else "empty"
    if hide or "://" in str(given):  # a URL may hold a password
        return "the value given"
    return repr(given if len(given) <= 60 else given[:60] + "…") if isinstance(given, str) else str(given).lower()


def locate(detail: ErrorDetails, model: type[BaseModel], prefix: Steps, in_file: Collection[Steps]) -> Finding:
    """Where in the file, and where in the model, pydantic found it."""
    path, secret = prefix, False
    siblings: tuple[str, ...] = ()
    kinds: list[Any] = [model]
    for step in detail["loc"]:
        fields = [name for kind in kinds for name in _fields(kind)]
        # pydantic puts names of union members and `[key]` between the steps; the file knows none of them.
        if (*path, step) in in_file or step in fields or (detail["type"] == "missing" and step == detail["loc"][-1]):
            path, siblings = (*path, step), tuple(fields)
            kinds = [below for kind in kinds for below in _below(kind, step)]
            secret = secret or any(_is_a(kind, (SecretStr, SecretBytes, Secret)) for kind in kinds)
        elif isinstance(step, int):  # an entry that stands alone in place of its list
            kinds = [below for kind in kinds for below in _below(kind, step)]
    return Finding(detail, path, siblings, secret)


def _is_a(kind: Any, classes: type | tuple[type, ...]) -> bool:
    kind = get_origin(kind) or kind
    return isinstance(kind, type) and issubclass(kind, classes)


def _fields(kind: Any) -> dict[str, Any]:
    if not _is_a(kind, BaseModel):
        return {}
    return {field.alias or name: field.annotation for name, field in kind.model_fields.items()}


def _below(kind: Any, step: str | int) -> Iterator[Any]:
    """The types that a model's field, or an entry of a list or mapping, may have."""
    if _is_a(kind, BaseModel):
        yield from _alternatives(_fields(kind).get(str(step)))
    else:
        yield from (each for inner in get_args(kind)[-2:] if inner is not ... for each in _alternatives(inner))


def _alternatives(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in {Union, UnionType}:
        yield from (each for member in get_args(annotation) for each in _alternatives(member))
    else:
        yield annotation
