"""`xenios webhooks`: messages, sent again; endpoints, their secrets and a test."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from yarl import URL

from gateway import GatewayError
from gateway_plugins.jobs.settings import EVENTS
from gateway_plugins.jobs.webhooks import messages, store
from gateway_plugins.jobs.webhooks.client import Client
from gateway_plugins.jobs.webhooks.directory import Directory
from gateway_plugins.jobs.webhooks.routes import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from gateway.kit import Database, Row

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
STATES = ("waiting", "delivered", "dead")
MOST = 10_000


def add_commands(plugin: Any, cli: typer.Typer) -> None:
    """`plugin` has `config`, `pepper()` and `with_database()`."""
    group = typer.Typer(help="Webhooks: what was sent, who is told.", no_args_is_help=True)
    cli.add_typer(group, name="webhooks")
    config = plugin.config.webhooks

    def ask(use: Callable[[Database], Coroutine[Any, Any, Any]]) -> Any:
        try:
            return plugin.with_database(use)
        except GatewayError as error:
            _fail(error.message)

    def directory() -> Directory:
        return Directory(config, plugin.pepper())

    @group.command("list")
    def list_messages(
        status: Annotated[str | None, typer.Option(help=f"{', '.join(STATES)}.", show_default=False)] = None,
        tenant: Annotated[str | None, typer.Option(help="Only this tenant's.", show_default=False)] = None,
        endpoint: Annotated[str | None, typer.Option(help="Only to this endpoint.", show_default=False)] = None,
        limit: Annotated[int, typer.Option(min=1, max=MOST, help="How many at most.")] = 50,
        *,
        as_json: AsJson = False,
    ) -> None:
        """Messages, the newest first."""
        if status is not None and status not in STATES:
            _fail(f"--status is one of {', '.join(STATES)}.", 2)
        rows = ask(lambda db: store.deliveries(db, limit=limit, status=status, tenant=tenant, endpoint=endpoint))
        if as_json:
            typer.echo(json.dumps([_message(row) for row in rows], indent=2))
            return
        for row in rows:
            _print_message(row)
        typer.echo(f"{len(rows)} message{'' if len(rows) == 1 else 's'}")

    @group.command("endpoints")
    def list_endpoints(
        tenant: Annotated[str | None, typer.Option(help="Only this tenant's.", show_default=False)] = None,
        *,
        as_json: AsJson = False,
    ) -> None:
        """Who is told: endpoints that were registered, and those of the configuration."""
        known = directory()

        async def all_pages(database: Database) -> list[dict[str, Any]]:
            found, after, more = [*await _configured(known, database, tenant)], None, True
            while more:
                rows, more = await store.endpoints(database, tenant, limit=500, after=after)
                found += [shown(row, known.secrets(row["id"], row)[0]) for row in rows]
                after = rows[-1]["id"] if rows else None
            return found

        found = ask(all_pages)
        if as_json:
            typer.echo(json.dumps(found, indent=2))
            return
        for one in found:
            state = "disabled" if one["disabled_at"] else "active"
            typer.echo(
                f"{one['id']:20} {state:9} {one['tenant'] or '-':20} {one['url']}  {','.join(one['event_types'])}"
            )

    @group.command("show")
    def show(
        key: Annotated[str, typer.Argument(metavar="ID", help="Of a message (msg_…) or an endpoint (we_…).")],
    ) -> None:
        """One message with its text, or one endpoint, as JSON."""
        known = directory() if key.startswith("we_") else None

        async def find(database: Database) -> dict[str, Any]:
            if known is None:
                row = await store.delivery(database, key)
                return {**_message(row), "body": json.loads(row["body"])}
            for one in await _configured(known, database, None):
                if one["id"] == key:
                    return one
            row = await store.endpoint(database, key)
            return shown(row, known.secrets(key, row)[0])

        typer.echo(json.dumps(ask(find), indent=2))

    @group.command("resend", short_help="Send messages again.")
    def resend(
        keys: Annotated[list[str] | None, typer.Argument(metavar="ID...", show_default=False)] = None,
        dead_of: Annotated[
            str | None, typer.Option("--dead-of", help="All dead messages to this endpoint.", show_default=False)
        ] = None,
        *,
        as_json: AsJson = False,
    ) -> None:
        """Send messages again, under the same ids; a worker does so within ten seconds."""
        if (dead_of is None) is (not keys):
            _fail("Name messages (msg_…), or an endpoint by --dead-of.", 2)

        async def again(database: Database) -> list[Row]:
            wanted = keys or [
                row["id"] for row in await store.deliveries(database, limit=MOST, status="dead", endpoint=dead_of)
            ]
            return [await store.resend(database, key) for key in wanted]

        rows = ask(again)
        if as_json:
            typer.echo(json.dumps([_message(row) for row in rows], indent=2))
            return
        for row in rows:
            _print_message(row)

    @group.command("rotate", short_help="A new signing secret, which is printed.")
    def rotate(
        key: Annotated[str | None, typer.Argument(metavar="ID", help="Of an endpoint.", show_default=False)] = None,
        tenant: Annotated[
            str | None, typer.Option(help="Instead: the secret of this tenant's jobs' webhooks.", show_default=False)
        ] = None,
        *,
        at_once: Annotated[bool, typer.Option("--at-once", help="Sign nothing by the old one any more.")] = False,
        as_json: AsJson = False,
    ) -> None:
        """A new signing secret, which is printed. The old one signs too until `webhooks.rotation` is over."""
        if (key is None) is (tenant is None):
            _fail("Name an endpoint (we_…), or a tenant by --tenant.", 2)
        known, keep = directory(), 0.0 if at_once else config.rotation
        if key in known.configured:
            _fail("The configuration has this endpoint's secret: change `secret` there, and `old_secret`.", 2)
        owner = key or f"tenant:{tenant}"

        async def turn(database: Database) -> str:
            if tenant is not None:
                row = await store.rotate_own(database, owner, keep)
            else:
                row = await store.rotate(database, owner, None, keep)
            return known.secrets(owner, row)[0]

        secret = ask(turn)
        typer.echo(json.dumps({"id": owner, "signing_secret": secret}) if as_json else secret)

    @group.command("test", short_help="Send an example now.")
    def test(
        key: Annotated[str, typer.Argument(metavar="ID", help="Of an endpoint.")],
        event: Annotated[str, typer.Option(help=f"Its type: {', '.join(EVENTS)}.", show_default=True)] = EVENTS[0],
        *,
        as_json: AsJson = False,
    ) -> None:
        """Send an example now; one that is taken makes an endpoint that was disabled work again."""
        if event not in EVENTS:
            _fail(f"--event is one of {', '.join(EVENTS)}.", 2)
        known = directory()

        async def send(database: Database) -> int:
            client = Client(config.rules(), timeout=config.timeout, ca_file=config.ca_file)
            try:
                return await messages.example(client, known, database, key, event)
            finally:
                await client.close()

        status = ask(send)
        typer.echo(json.dumps({"id": key, "status_code": status}) if as_json else f"{key} answered {status}")
        if not 200 <= status < 300:
            raise typer.Exit(1)


async def _configured(known: Directory, database: Database, tenant: str | None) -> list[dict[str, Any]]:
    """The configuration's, as those that were registered are shown."""
    found = []
    for key, entry in known.configured.items():
        if tenant in {None, entry.tenant}:
            row = await store.own(database, key)
            at = row["disabled_at"] if row else None
            found.append(
                {
                    "id": key, "object": "webhook_endpoint", "name": "of the configuration",
                    "url": f"{URL(entry.url).origin()}/…",  # what follows may be a secret, from ${…}
                    "event_types": list(entry.events), "tenant": entry.tenant, "disabled_at": at and at // 1000,
                }
            )  # fmt: skip
    return found


def _message(row: Row) -> dict[str, Any]:
    times = {name: _iso(row[name]) for name in ("created_at", "next_at", "finished_at")}
    return {**{name: value for name, value in row.items() if name != "body"}, **times}


def _print_message(row: Row) -> None:
    why = row["last_status"] or row["last_error"] or "-"
    where = row["endpoint"] or "the job's own"
    then = f"  next {_iso(row['next_at'])}" if row["status"] == "waiting" else ""
    typer.echo(
        f"{row['id']} {_iso(row['created_at'])} {row['status']:9} {row['event_type']:20} {row['tenant']:20} {where:20} "
        f"{row['attempts']} tries, last {why}{then}"
    )


def _iso(milliseconds: int | None) -> str | None:
    return None if milliseconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(milliseconds // 1000))


def _fail(message: str, code: int = 1) -> Any:
    typer.echo(f"xenios: {message}", err=True)
    raise typer.Exit(code)
