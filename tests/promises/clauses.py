"""The clauses of `tests/promises.toml`, and how their breaks are applied."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TOML = HERE.parent / "promises.toml"
FIELDS = {"issue", "text", "break"}
_HUNK = re.compile(r"^@@ [^\n]*@@[^\n]*\n", re.MULTILINE)


class BreakDoesNotApply(Exception):
    """The code has changed under a break: write the patch anew."""


@dataclass(frozen=True)
class Clause:
    """`P2.row`. `breaks`: patches, each of which makes the clause false."""

    name: str
    issue: int
    text: str
    breaks: tuple[Path, ...]


@dataclass(frozen=True)
class Promise:
    name: str
    title: str
    text: str
    clauses: tuple[Clause, ...]


@dataclass(frozen=True)
class Promises:
    """`current`: the clauses of this issue and of those before it are due."""

    current: int
    promises: tuple[Promise, ...]

    @property
    def clauses(self) -> dict[str, Clause]:
        return {c.name: c for p in self.promises for c in p.clauses}

    def due(self, clause: Clause) -> bool:
        return clause.issue <= self.current


def load(path: Path = TOML) -> Promises:
    """Raises ValueError on what is not a clause."""
    data = tomllib.loads(path.read_text())
    current = data.pop("current")
    return Promises(current, tuple(_promise(name, table) for name, table in data.items()))


def _promise(name: str, table: Mapping[str, object]) -> Promise:
    parts = {key: value for key, value in table.items() if isinstance(value, dict)}
    if set(table) - set(parts) != {"title", "text"} or not parts:
        raise ValueError(f"{name} needs title, text and clauses")
    return Promise(
        name, str(table["title"]), str(table["text"]), tuple(_clause(f"{name}.{k}", v) for k, v in parts.items())
    )


def _clause(name: str, table: Mapping[str, object]) -> Clause:
    if not {"issue", "text"} <= set(table) <= FIELDS or not isinstance(table["issue"], int):
        raise ValueError(f"{name} needs issue and text, and may have break; nothing else")
    given = table.get("break", [])
    names = given if isinstance(given, list) else [given]
    return Clause(name, table["issue"], str(table["text"]), tuple(HERE / n for n in names))


def apply(patch: Path, root: Path) -> list[str]:
    """Apply a unified diff under `root`; the paths that it changed. Raises BreakDoesNotApply.

    Stricter than patch(1), and blind to line numbers: what a hunk replaces must stand in its file exactly once.
    """
    changed: list[str] = []
    for path, hunks in _files(patch):
        target = root / path
        if not target.is_file():
            raise BreakDoesNotApply(f"{patch.name}: there is no {path}")
        text = target.read_text()
        for number, (old, new) in enumerate(hunks, 1):
            found = text.count(old)
            if found != 1:
                raise BreakDoesNotApply(f"{patch.name}: hunk {number} of {path} fits in {found} places")
            text = text.replace(old, new)
        target.write_text(text)
        changed.append(path)
    return changed


def paths(patch: Path) -> list[str]:
    """The files that a patch changes."""
    return [path for path, _ in _files(patch)]


def _files(patch: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """Path → (old, new) of each hunk."""
    out: list[tuple[str, list[tuple[str, str]]]] = []
    for part in re.split(r"^--- [^\n]*\n(?=\+\+\+ )", patch.read_text(), flags=re.MULTILINE)[1:]:
        head, _, rest = part.partition("\n")
        path = head.removeprefix("+++ ").partition("\t")[0].removeprefix("b/")
        out.append((path, [_sides(patch, hunk) for hunk in _HUNK.split(rest)[1:]]))
    if not out or not all(hunks for _, hunks in out):
        raise BreakDoesNotApply(f"{patch.name} is not a unified diff")
    return out


def _sides(patch: Path, hunk: str) -> tuple[str, str]:
    old, new = [], []
    for line in hunk.splitlines(keepends=True):
        if line.startswith("diff "):
            break  # git's head of the next file
        if line[0] not in " +-\n":
            raise BreakDoesNotApply(f"{patch.name}: not a line of a hunk: {line!r}")
        text = line if line == "\n" else line[1:]
        if line[0] != "+":
            old.append(text)
        if line[0] != "-":
            new.append(text)
    return "".join(old), "".join(new)
