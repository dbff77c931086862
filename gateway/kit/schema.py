"""The tables that a plugin owns: which revisions there are, without importing what migrates them."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Schema:
    """A plugin class's attribute `schema = Schema("my_plugin", Path(__file__).parent)`.

    `folder` holds `tables.py`, whose `metadata` (SQLAlchemy) says what the tables are, and `migrations/` with one
    Alembic revision per file. They are imported by `xenios db` and `migrate_on_start` alone. Tables must have names
    that begin with `name` and an underscore.
    """

    name: str
    folder: Path

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", self.name):
            raise ValueError(f"Schema: {self.name!r} is no name: small letters, digits and underscores.")

    @property
    def version_table(self) -> str:
        """Alembic's table for these tables alone, so that plugins come and go by themselves."""
        return f"alembic_version_{self.name}"

    @property
    def migrations(self) -> Path:
        return self.folder / "migrations"

    @cached_property
    def revisions(self) -> tuple[str, ...]:
        """From the first to the newest. Raises ValueError if they are not one line."""
        after: dict[str | None, str] = {}
        for file in sorted(self.migrations.glob("*.py")):
            names = _constants(file)
            if "revision" not in names:
                continue
            before = names.get("down_revision")
            if before in after:
                raise ValueError(f"{self.migrations}: {after[before]} and {names['revision']} both follow {before}.")
            after[before] = names["revision"]
        line: list[str] = []
        while (following := after.get(line[-1] if line else None)) is not None:
            line.append(following)
        if not line or len(line) != len(after):
            raise ValueError(f"{self.migrations} must hold one line of revisions, the first with down_revision = None.")
        return tuple(line)

    @property
    def head(self) -> str:
        return self.revisions[-1]

    def is_older(self, version: str | None) -> bool:
        """A version that isn't known here is a newer program's, which keeps what older ones need."""
        return version is None or version in self.revisions[:-1]


def _constants(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Constant):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                found[target.id] = node.value.value
    return found
