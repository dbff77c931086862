"""YAML text → plain values that know their line, with `${…}` replaced after parsing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gateway.problems import ConfigError, Problem, Steps, in_line_order, locate, spell

MAX_DEPTH: Final = 50
MAX_VALUES: Final = 100_000

_Model = TypeVar("_Model", bound=BaseModel)
_Place = tuple[int, int]


class Position(NamedTuple):
    """Line and column, from 1, of a key or list item and of its value; a list or mapping stands at its key."""

    key: _Place
    value: _Place


@dataclass(frozen=True)
class Source:
    """A configuration file's values, not yet validated, and where each of them stands.

    `problems` are mistakes of the text itself that let the validation go on: a missing variable, a key given
    twice. What stands at such a place is never reported a second time.
    """

    file: str
    base: Path
    data: dict[str, Any] = field(default_factory=dict)
    positions: dict[Steps, Position] = field(default_factory=dict)
    expanded: dict[Steps, tuple[str, ...]] = field(default_factory=dict)
    """For each value that `${…}` gave: the texts that must not be printed."""
    files: dict[str, str] = field(default_factory=dict, repr=False)
    """What the files that it names held, by path: who has text and files can read the same once more."""
    named: set[Path] = field(default_factory=set, repr=False)
    """The files that it names, those that can't be read too."""
    problems: list[Problem] = field(default_factory=list)
    text: str = field(default="", repr=False)

    def read(self, path: Path) -> str:
        """What a file that it names holds; read once, whoever asks. Raises OSError, or ValueError if it's no UTF-8."""
        name = str(path)
        self.named.add(path)
        if name not in self.files:
            self.files[name] = path.read_bytes().decode("utf-8-sig")
        return self.files[name]

    def where(self, path: Sequence[str | int], *, value: bool = False) -> tuple[int, int]:
        """Line and column, from 1, of the key or list item at `path`, else of its nearest known ancestor."""
        for length in range(len(path), 0, -1):
            position = self.positions.get(tuple(path[:length]))
            if position is not None:
                return position.value if value and length == len(path) else position.key
        return (1, 1)

    def at(self, path: Sequence[str | int]) -> Any:
        """The value at `path`; LookupError where there is none."""
        value: Any = self.data
        for step in path:
            value = value[step]
        return value

    def problem(
        self, path: Sequence[str | int], message: str, hint: str | None = None, *, value: bool = False
    ) -> Problem:
        """A mistake that the caller found at `path`: an unknown plugin, a clash between two entries."""
        return Problem(self.file, *self.where(path, value=value), spell(path), message, hint)

    def validate(self, model: type[_Model], prefix: Sequence[str | int] = ()) -> tuple[_Model | None, list[Problem]]:
        """The value at `prefix`, such as a plugin's `config`, as `model`; or the problems that prevent it."""
        try:
            data = self.at(prefix)
        except LookupError:
            data = None
        try:  # a section that is left out or empty: all defaults
            return model.model_validate({} if data is None else data, context={"source": self}), []
        except ValidationError as error:
            return None, self.problems_of(error, model, prefix)

    def problems_of(
        self, error: ValidationError, model: type[BaseModel], prefix: Sequence[str | int] = ()
    ) -> list[Problem]:
        """Pydantic's findings in plain words, placed in the file, in line order, without secret values."""
        known = {(problem.line, problem.column) for problem in self.problems}
        found: dict[Steps, Problem] = {}
        for detail in error.errors(include_url=False):
            finding = locate(detail, model, tuple(prefix), self.positions)
            path = finding.path
            if finding.is_consequence or self.where(path, value=not finding.about_key) in known:
                continue
            given = self.at(path) if path in self.positions else detail["input"]
            message, hint = finding.words(given, self._hidden(path))
            if path in found:  # one union, one problem
                found[path] = replace(found[path], message=f"{found[path].message}, or {message}")
            else:
                found[path] = self.problem(path, message, hint, value=not finding.about_key)
        return in_line_order(list(found.values()))

    def _hidden(self, path: Steps) -> set[str]:
        """What `${…}` gave at this path, above or below."""
        near = (texts for at, texts in self.expanded.items() if at[: len(path)] == path[: len(at)])
        return {text for texts in near for text in texts}


# --- Reading ----------------------------------------------------------------------------------------------

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNREADABLE: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
# Leading zeros stay text, and so do numbers too large for Python's int() or float().
_INTEGER: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,99})")
_FLOAT: Final = re.compile(rf"(?:[-+]?\.[0-9]+|{_INTEGER.pattern}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]{{1,2}})?")
_WORDS: Final[dict[str, object]] = {"": None, "~": None, "null": None, "true": True, "false": False}
_EXPRESSION: Final = re.compile(r"\$\$\{|\$\{[^}]*\}?")
_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-((?:(?!\$\{).)*))?\}", re.DOTALL)


def read_file(path: Path, env: Mapping[str, str]) -> Source:
    """Raises ConfigError when the file can't be read as YAML at all."""
    try:
        content = path.read_bytes()
        text = content.decode()
    except OSError as error:
        raise ConfigError([Problem(str(path), None, None, "", f"can't be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        line, column = _line_and_column(content[: error.start].decode())
        raise ConfigError([Problem(str(path), line, column, "", "is not UTF-8", "save the file as UTF-8")]) from None
    return read_text(text, str(path), path.absolute().parent, env)


def read_text(
    text: str, file: str, base: Path, env: Mapping[str, str], files: Mapping[str, str] | None = None
) -> Source:
    """Raises ConfigError when the text is no YAML at all. `files`: as they were when another process read them."""
    return _Reader(Source(file, base, files=dict(files or {}), text=text), env).read(text.removeprefix("\ufeff"))


def typed(text: str) -> Any:
    """A plain scalar's value: a number, true, false or null; what YAML 1.1 also guesses at (yes, on, dates) is text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _line_and_column(before: str) -> _Place:
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _mark(mark: Any) -> _Place:
    return mark.line + 1, mark.column + 1


class _ExpressionError(Exception):
    """Message, hint."""


class _Reader:
    def __init__(self, source: Source, env: Mapping[str, str]) -> None:
        self._source = source
        self._env = env
        self._values = 0

    def read(self, text: str) -> Source:
        strange = _UNREADABLE.search(text)
        if strange:
            place = _line_and_column(text[: strange.start()])
            raise self._stop(place, f"the character U+{ord(strange[0]):04X} can't stand in YAML")
        try:
            self._check_events(text)
            root = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            raise self._syntax(error) from None
        if root is None or (isinstance(root, yaml.ScalarNode) and typed(root.value) is None):
            return self._source
        if not isinstance(root, yaml.MappingNode):
            raise self._stop(_mark(root.start_mark), "the file must be a mapping, such as `server:` at its top")
        return replace(self._source, data=self._build(root, ()), problems=in_line_order(self._source.problems))

    def _stop(self, place: _Place, message: str, hint: str | None = None) -> ConfigError:
        return ConfigError([Problem(self._source.file, *place, "", message, hint)])

    def _report(self, node: yaml.Node, path: Steps, message: str, hint: str | None = None) -> None:
        place = _mark(node.start_mark)
        self._source.problems.append(Problem(self._source.file, *place, spell(path), message, hint))

    def _check_events(self, text: str) -> None:
        """Refuses what only the event stream shows, before anything recurses into the document."""
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            self._check_depth(depth, event)
            tag = getattr(event, "tag", None)
            if tag:
                raise self._stop(_mark(event.start_mark), f"the tag {tag} is not allowed", "quotes make text")

    def _check_depth(self, depth: int, at: yaml.Node | yaml.Event) -> None:
        if depth > MAX_DEPTH:
            raise self._stop(_mark(at.start_mark), f"nested deeper than {MAX_DEPTH} levels")

    def _syntax(self, error: yaml.MarkedYAMLError) -> ConfigError:
        begun: Any = error.context_mark
        mark: Any = error.problem_mark or begun
        message = f"not valid YAML: {error.problem}"
        if begun and begun.line != mark.line:
            message += f" ({error.context} that begins on line {begun.line + 1})"
        hint = "indent with blanks; quote texts that hold ': ' or begin with a sign, and ${…} within [ ] and { }"
        return self._stop(_mark(mark), message, hint)

    def _count(self, node: yaml.Node, depth: int) -> None:
        """Aliases are followed as often as they are used: without a limit a small file grows without end."""
        self._check_depth(depth, node)
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._stop(_mark(node.start_mark), f"more than {MAX_VALUES} values, each use of an alias counted")

    def _build(self, node: yaml.Node, path: Steps) -> Any:
        self._count(node, len(path))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._placed(item, item, (*path, index)) for index, item in enumerate(node.value)]
        pairs = self._pairs(node, path, len(path))
        return {name: self._placed(key, value, (*path, name)) for name, (key, value) in pairs.items()}

    def _placed(self, key: yaml.Node, value: yaml.Node, path: Steps) -> Any:
        stands = value if isinstance(value, yaml.ScalarNode) else key
        self._source.positions[path] = Position(_mark(key.start_mark), _mark(stands.start_mark))
        return self._build(value, path)

    def _pairs(self, node: yaml.Node, path: Steps, depth: int) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        if not isinstance(node, yaml.MappingNode):
            self._report(node, path, "`<<` takes a mapping or a list of mappings")
            return pairs
        for key, value in node.value:
            self._count(key, depth)
            name = key.value
            if not isinstance(key, yaml.ScalarNode):
                self._report(key, path, "a key must be text, not a list or mapping")
            elif name == "<<" and not key.style:
                for parent in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    merged = self._pairs(parent, path, depth + 1) | merged
            elif name in pairs:
                first = _mark(pairs[name][0].start_mark)[0]
                self._report(key, (*path, name), f"{name!r} is given twice, first on line {first}", "keep one of them")
            else:
                pairs[name] = (key, value)
        return merged | pairs

    def _scalar(self, node: yaml.ScalarNode, path: Steps) -> Any:
        text: str = node.value
        if "${" not in text:
            return text if node.style else typed(text)
        found: list[str] = []

        def expand(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            found.append(self._value(match[0]))
            return found[-1]

        try:
            result = _EXPRESSION.sub(expand, text)
        except _ExpressionError as error:
            self._report(node, path, *error.args)
            return None
        if not found:
            return result
        self._source.expanded[path] = (result, *found)
        # Text, whatever it looks like: a secret may be all digits, and a number's field takes a number's text.
        return result if result or node.style else None

    def _value(self, expression: str) -> str:
        if expression.startswith("${file:") and expression.endswith("}"):
            return self._file(self._source.base / expression[7:-1])
        match = _VARIABLE.fullmatch(expression)
        if match is None:
            raise _ExpressionError(
                "is not an expression", "write ${NAME}, ${NAME:-default} or ${file:/path}; $${ is a literal ${"
            )
        name, default = match.groups()
        value = self._env.get(name)
        if not value and (file := self._env.get(f"{name}_FILE")):  # as containers' secrets are given
            value = self._file(self._source.base / file)
        value = value or default
        if value is None and name not in self._env:
            message = f"the environment variable {name} is not set"
            raise _ExpressionError(message, f"set {name}, or write ${{{name}:-default}}")
        return value or ""

    def _file(self, path: Path) -> str:
        try:
            text = self._source.read(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise _ExpressionError(f"the file {path} can't be read: {reason}") from None
        return text.removesuffix("\n").removesuffix("\r")
