"""`xenios keys create | list | show | rotate | revoke`: keys in the database."""

from __future__ import annotations

import getpass
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from gateway import GatewayError
from gateway_plugins.api_keys import store

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

Many = list[str]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_commands(plugin: Any, cli: typer.Typer) -> None:
    """`plugin` has `config`, `pepper()` and `with_database()`."""
    group = next(g.typer_instance for g in cli.registered_groups if g.name == "keys")
    if group is None:
        raise RuntimeError("xenios has no command group `keys`")

    def ask(use: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        try:
            return plugin.with_database(use)
        except GatewayError as error:
            _fail(str(error))

    @group.command("create")
    def create(  # noqa: PLR0917 - one option each
        key_id: Annotated[str | None, typer.Option("--id", help="Default: one is made up.", show_default=False)] = None,
        name: Annotated[str | None, typer.Option(help="For people: what it is for.", show_default=False)] = None,
        tenant: Annotated[str | None, typer.Option(help="Default: the id.", show_default=False)] = None,
        team: Annotated[str | None, typer.Option(help="Whose use it counts for.", show_default=False)] = None,
        owner: Annotated[str | None, typer.Option(help="Whose key it is.", show_default=False)] = None,
        tag: Annotated[Many, typer.Option(help="May be given several times.", show_default=False)] = [],  # noqa: B006
        role: Annotated[Many, typer.Option(help="May be given several times.", show_default=False)] = [],  # noqa: B006
        model: Annotated[
            Many | None, typer.Option(help="Glob of models allowed; several times.", show_default=False)
        ] = None,
        alias: Annotated[
            Many | None, typer.Option(help="Glob of aliases allowed; several times.", show_default=False)
        ] = None,
        task: Annotated[
            Many | None, typer.Option(help="Glob of tasks allowed; several times.", show_default=False)
        ] = None,
        endpoint: Annotated[
            Many | None, typer.Option(help="Glob of endpoints allowed; several times.", show_default=False)
        ] = None,
        expires: Annotated[str | None, typer.Option(help="ISO date or time.", show_default=False)] = None,
        limits: Annotated[
            str | None, typer.Option(help='JSON, such as \'{"requests": 60, "usd": 5}\'.', show_default=False)
        ] = None,
        *,
        admin: Annotated[bool, typer.Option("--admin", help="May use the admin routes.")] = False,
        as_json: AsJson = False,
    ) -> None:
        """Make a key. Its secret is printed once."""
        given = {
            "id": key_id, "name": name, "tenant": tenant, "team": team, "owner": owner, "tags": tag, "roles": role,
            "models": model or None, "aliases": alias or None, "tasks": task or None, "endpoints": endpoint or None,
            "expires": expires, "admin": admin,
        }  # fmt: skip
        try:
            if limits is not None:
                given["limits"] = json.loads(limits)
            wanted = store.NewKey.model_validate({k: v for k, v in given.items() if v is not None})
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            _fail(f"{'.'.join(str(step) for step in first['loc'])}: {store.words(first['msg'])}", 2)
        except ValueError as error:
            _fail(f"--limits: not JSON: {error}", 2)
        if wanted.id in {"bootstrap", *(entry.id for entry in plugin.config.keys)}:
            _fail(f"The configuration has a key {wanted.id!r} already.", 2)
        pepper = plugin.pepper()
        key, secret = ask(lambda database: store.create(database, pepper, wanted, _actor()))
        _print_secret(key, secret, as_json=as_json)

    @group.command("list")
    def list_keys(
        tenant: Annotated[str | None, typer.Option(help="Only this tenant's.", show_default=False)] = None,
        team: Annotated[str | None, typer.Option(help="Only this team's.", show_default=False)] = None,
        *,
        as_json: AsJson = False,
    ) -> None:
        """Keys in the database."""

        async def all_pages(database: Any) -> list[dict[str, Any]]:
            out: list[dict[str, Any]] = []
            after = None
            while True:
                found = await store.page(database, limit=500, after=after, tenant=tenant, team=team)
                out += found["data"]
                after = found["last_id"]
                if not found["has_more"]:
                    return out

        keys = ask(all_pages)
        if as_json:
            typer.echo(json.dumps(keys, indent=2))
            return
        for key in keys:
            _print_line(key)
        typer.echo(f"{len(keys)} key{'' if len(keys) == 1 else 's'}")

    @group.command("show")
    def show(key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
        """One key, as JSON."""
        typer.echo(json.dumps(ask(lambda database: store.show(database, key_id)), indent=2))

    @group.command("rotate")
    def rotate(
        key_id: Annotated[str, typer.Argument(metavar="ID")],
        overlap: Annotated[str, typer.Option(help="How long the old secret works on, such as 1d.")] = "0s",
        *,
        as_json: AsJson = False,
    ) -> None:
        """Give a key a new secret, which is printed once."""
        try:
            seconds = store.Rotation.model_validate({"overlap": overlap}).overlap
        except ValidationError as error:
            _fail(f"--overlap: {store.words(error.errors()[0]['msg'])}", 2)
        pepper = plugin.pepper()
        key, secret = ask(lambda database: store.rotate(database, pepper, key_id, seconds, _actor()))
        _print_secret(key, secret, as_json=as_json)

    @group.command("revoke", short_help="Refuse a key from now on.")
    def revoke(key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
        """Refuse a key from now on; running gateways follow within two seconds."""
        _print_line(ask(lambda database: store.revoke(database, key_id, _actor())))


def _print_secret(key: dict[str, Any], secret: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**key, "key": secret}, indent=2))
        return
    typer.echo(f"id:   {key['id']}")
    typer.echo(f"key:  {secret}   (shown once: keep it)")


def _print_line(key: dict[str, Any]) -> None:
    typer.echo(
        f"{key['id']:30} {key['state']:8} {key['hint']:16} {key['tenant']:20} {key['team'] or '-':12} "
        f"last used {key['last_used_at'] or 'never'}"
    )


def _actor() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return "cli"


def _fail(message: str, code: int = 1) -> Any:
    typer.echo(f"xenios: {message}", err=True)
    raise typer.Exit(code)
