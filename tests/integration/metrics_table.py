"""The table of all metrics in `plugins/gateway_plugins/metrics/README.md`, made from the metrics of a running gateway.

python -m tests.integration.metrics_table           # writes it anew; `make schema` does
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.kit.testing import Gateway
from gateway.plugins import installed

if TYPE_CHECKING:
    from gateway.metrics import Family

README = Path(__file__).resolve().parents[2] / "plugins" / "gateway_plugins" / "metrics" / "README.md"
MARKS = "<!-- made by `make schema` -->\n", "<!-- to here -->\n"
# What a plugin needs to start at all.
NEEDS = {"jwt_auth": {"issuers": [{"issuer": "https://login.example.com", "audience": "x", "secret": "s" * 32}]}}


async def families() -> list[Family]:
    """Of a gateway with all built-in plugins."""
    names = sorted(n for n, point in installed().items() if point.value.startswith("gateway_plugins."))
    plugins, redis = [(name, NEEDS.get(name, {})) for name in names], {"services": {"redis": "embedded"}}
    async with Gateway.test(plugins=plugins, settings=redis) as gateway:
        return await gateway.snapshot.services.metrics.read()


def table(found: list[Family]) -> str:
    rows = [
        f"| `{family.name}` | {family.kind} | {', '.join(f'`{label}`' for label in family.labels) or '–'} | {family.help} |"
        for family in found
    ]
    return "\n".join(["| metric | kind | labels | what it tells |", "|---|---|---|---|", *rows, ""])


def written(text: str, made: str) -> str:
    """The document with the table in its place."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{made}\n{MARKS[1]}{after}"


if __name__ == "__main__":
    README.write_text(written(README.read_text(), table(asyncio.run(families()))))
