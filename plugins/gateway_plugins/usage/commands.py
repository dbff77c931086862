"""`xenios usage`: what was used, on the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway import GatewayError
from gateway_plugins.usage import shown, store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.kit import Database

_NUMBERS = ("requests", "input_tokens", "output_tokens", "cost_usd", "cost_unknown")


def add_commands(plugin: Any, cli: typer.Typer) -> None:
    """`plugin` has `with_database()`."""

    @cli.command("usage", short_help="Requests, tokens and dollars.")
    def usage(  # noqa: PLR0917 - one option each
        by: Annotated[
            str, typer.Option(help=f"Sums by these, with commas: {', '.join(store.GROUPS)}; `total`: one sum.")
        ] = "model",
        start: Annotated[
            str | None, typer.Option("--from", help="ISO date or time, UTC. Default: 30 days ago.", show_default=False)
        ] = None,
        end: Annotated[
            str | None, typer.Option("--to", help="ISO date (to its end) or time.", show_default=False)
        ] = None,
        tenant: Annotated[str | None, typer.Option(help="Only this tenant's.", show_default=False)] = None,
        key: Annotated[str | None, typer.Option(help="Only this one's, such as key:app.", show_default=False)] = None,
        team: Annotated[str | None, typer.Option(help="Only this team's.", show_default=False)] = None,
        model: Annotated[str | None, typer.Option(help="Only what this model answered.", show_default=False)] = None,
        task: Annotated[str | None, typer.Option(help="Only this task's.", show_default=False)] = None,
        *,
        rows: Annotated[bool, typer.Option("--rows", help="Every request, newest first, instead of sums.")] = False,
        as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Requests, tokens and dollars: sums by model, key, team, task or day; or every request."""
        given = {
            "from": start or "", "to": end or "", "tenant": tenant or "", "key": key or "", "team": team or "",
            "model": model or "", "task": task or "",
        }  # fmt: skip
        try:
            query = shown.query(given)
            groups = [] if by == "total" else shown.groups(by)
        except GatewayError as error:
            _fail(f"{error.message} ({_option(error.param)})", 2)

        async def ask(database: Database) -> None:
            if rows:
                await _print_requests(database, query, as_json=as_json, as_csv=as_csv)
                return
            everything, _ = await store.grouped(database, query, (), 1)
            found, _ = await store.grouped(database, query, groups, 100_000) if groups else ([], False)
            total = shown.sums(store.total(everything))
            data = [shown.sums(row) for row in found]
            if as_json:
                typer.echo(json.dumps({"data": data, "total": total}, indent=2))
            elif as_csv:
                typer.echo(shown.table(data if groups else [total], [*groups, *shown.SUM_COLUMNS]), nl=False)
            else:
                _print_sums(groups, data, total)

        try:
            plugin.with_database(ask)
        except GatewayError as error:
            _fail(str(error), 1)


async def _print_requests(database: Database, query: store.Query, *, as_json: bool, as_csv: bool) -> None:
    """Page by page: there may be millions. JSON: one object per line."""
    after, head = None, True
    while head or after is not None:
        page, after = await store.listed(database, query, shown.MOST_ROWS, after)
        data = [shown.request(row) for row in page]
        if as_json:
            for row in data:
                typer.echo(json.dumps(row))
        elif as_csv:
            typer.echo(shown.table(data, shown.REQUEST_COLUMNS, head=head), nl=False)
        else:
            for row in data:
                unknown = "-" if row["model"] is None else "?"  # nothing answered, nothing was spent
                cost = unknown if row["cost_usd"] is None else f"{row['cost_usd']:.6f}"
                typer.echo(
                    f"{row['at']} {row['key']:24} {row['model'] or row['model_asked'] or '-':36} "
                    f"{row['input_tokens'] or 0:>8} {row['output_tokens'] or 0:>8} {cost:>12} {row['outcome']}"
                )
        head = False


def _print_sums(groups: Sequence[str], data: Sequence[dict[str, Any]], total: dict[str, Any]) -> None:
    lines = [[*groups, *_NUMBERS]]
    lines += [[*(row[g] or "-" for g in groups), *_numbers(row)] for row in data]
    if groups:
        lines.append(["total", *[""] * (len(groups) - 1), *_numbers(total)])
    else:
        lines.append(_numbers(total))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = [
            cell.ljust(width) if i < len(groups) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())


def _numbers(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['requests']:,}",
        *("-" if row[name] is None else f"{row[name]:,}" for name in ("input_tokens", "output_tokens")),
        ("?" if row["cost_unknown"] else "-") if row["cost_usd"] is None else f"{row['cost_usd']:,.6f}",
        f"{row['cost_unknown']:,}",
    ]


def _option(param: str | None) -> str:
    return "--by" if param == "group_by" else f"--{param}"


def _fail(message: str, code: int) -> Any:
    typer.echo(f"xenios: {message}", err=True)
    raise typer.Exit(code)
