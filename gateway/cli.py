"""The command line. Exit codes: 0 fine, 1 failed, 2 bad usage or configuration."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from gateway.begin import begin

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from gateway.catalogue import Catalogue, Price
    from gateway.companions import Order
    from gateway.explain import Asked
    from gateway.headless import Run
    from gateway.kit.schema import Schema
    from gateway.notices import Notices
    from gateway.plugins import Blueprint
    from gateway.reload import Reloader
    from gateway.settings import Loaded, Problem, ServerSettings, Settings
    from gateway.stores.database import Database
    from gateway.worker import Worker

T = TypeVar("T")
STOP_SECONDS = 30.0  # for what there is to do after the drain: plugins and stores that close

app = typer.Typer(
    name="xenios",
    help="Xenios, a self-hosted LLM gateway: OpenAI and Anthropic clients in front, OpenRouter's models behind.",
    epilog="Plugins of the configuration bring commands of their own; their table in plugins/README.md names them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="Make and hash client keys.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
db_app = typer.Typer(help="The tables of plugins: bring them up to date, look at them.", no_args_is_help=True)
app.add_typer(db_app, name="db")

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="The configuration file. Default: $XENIOS_CONFIG, else config/xenios.yaml, else the one that is built in.",
        show_default=False,
    ),
]
BUILT_IN = frozenset({"serve", "check", "explain", "plugins", "models", "simulate", "keys", "db", "version", "schema"})


def main() -> None:
    """Run the command line. Commands of plugins are looked for when a name is not one of ours."""
    begin()
    arguments = sys.argv[1:]
    config, others = _without_config(arguments)
    name = next((word for word in others if not word.startswith("-")), None)
    plugins_too = name == "keys" and others[-1:] != ["--version"] and "hash" not in others
    if name is not None and (name not in BUILT_IN or plugins_too):
        # --config says whose plugins to ask: it is no option of the plugin's command
        arguments = others
        _add_plugin_commands(_config_path(config), [word for word in others if not word.startswith("-")])
    app(arguments)


def main_as_told(order: Order) -> None:
    """As `main`, by a parent that keeps this process running: it says whose configuration."""
    _orders.append(order)
    words = [word for word in order.arguments if not word.startswith("-")]
    _add_plugin_commands(Path(order.config["file"]), words, only=order.plugin)
    app(order.arguments)


_orders: list[Order] = []  # one, if a parent keeps this process running


@app.command(short_help="Start the gateway.")
def serve(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address to bind.", show_default=False)] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Processes that serve, on one port.", show_default=False)
    ] = None,
    *,
    show_key: Annotated[bool, typer.Option("--show-key", help="Print the bootstrap key at every start.")] = False,
    new_key: Annotated[bool, typer.Option("--new-key", help="Replace the bootstrap key by a new one.")] = False,
) -> None:
    """Start the gateway. SIGHUP reads the configuration again."""
    changes: dict[str, Any] = {
        name: v for name, v in (("host", host), ("port", port), ("workers", workers)) if v is not None
    }
    from gateway import listening, logs
    from gateway.errors import StartError
    from gateway.reload import read

    try:
        sockets = listening.from_systemd()
    except StartError as error:
        _fail(str(error), 2)
    changes |= listening.told_of(sockets) if sockets else {}
    loaded = _load(config, changes)

    logs.setup(loaded.settings.log)
    path = _config_path(config)
    sys.exit(_serve(loaded, lambda: read(path, changes), sockets, show_key=show_key, new_key=new_key))


@app.command(short_help="Report all mistakes in the configuration.")
def check(
    config: ConfigOption = None,
    *,
    live: Annotated[
        bool,
        typer.Option("--live", help="Ask the upstreams too: models that are gone, retire, or cost something else."),
    ] = False,
) -> None:
    """Validate the configuration and every plugin's; report ALL mistakes. Starts nothing.

    With --live: exit code 1 for errors (an unknown model), 0 for warnings (one that retires).
    """
    path = _config_path(config)
    blueprints, problems, loaded = _examine(path)
    _stop_on(problems)
    if live and loaded is not None:
        sys.exit(_check_live(loaded, blueprints))
    typer.echo(f"{path}: fine, {len(blueprints)} plugin{'' if len(blueprints) == 1 else 's'}.")


def _check_live(loaded: Loaded, blueprints: Sequence[Blueprint]) -> int:
    import asyncio

    from gateway.checks import live

    cache = loaded.settings.server.data_dir / "catalogue"
    found, errors = asyncio.run(live(loaded, blueprints, cache if cache.is_dir() else None))
    for problem in found:
        typer.echo(str(problem))
    typer.echo(
        f"{loaded.source.file}: {errors} error(s), {len(found) - errors} warning(s) beside the upstreams' lists."
    )
    return 1 if errors else 0


@app.command(short_help="Why a request goes where it goes.")
def explain(  # noqa: PLR0917 - one option each
    request: Annotated[Path, typer.Argument(help="The request's body, a JSON file; - is standard input.")],
    config: ConfigOption = None,
    principal: Annotated[
        str | None,
        typer.Option("--as", metavar="KEY_ID", help="Whose request. Default: an administrator's.", show_default=False),
    ] = None,
    endpoint: Annotated[str, typer.Option(help="Where it would be sent.")] = "chat/completions",
    header: Annotated[
        list[str], typer.Option(help="Such as 'X-Xenios-Task: chat'; several times.", show_default=False)
    ] = [],  # noqa: B006 - typer copies it
    url: Annotated[
        str | None,
        typer.Option(help="Ask the gateway that runs there, by the admin key in $XENIOS_KEY.", show_default=False),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What would become of a request, and why: rule, targets, limits, plugins, cost. Nothing is sent or counted.

    By the configuration alone, without a running gateway; limits as a shared Redis has them. With --url by the
    gateway that runs there, which also knows its own counts and the state of its upstreams.
    """
    import json

    from gateway.explain_command import in_words

    answer = _explained(config, url, _asked(request, principal, endpoint, header))
    typer.echo(json.dumps(answer, indent=2) if as_json else in_words(answer), nl=as_json)


@app.command(short_help="List the plugins, their hooks and the call order.")
def plugins(
    config: ConfigOption = None,
    *,
    installed: Annotated[bool, typer.Option("--installed", help="List what is installed, enabled or not.")] = False,
) -> None:
    """The plugins of the configuration: version, hooks, and the call order within each hook."""
    from gateway.plugins import HOOKS, hooks_of
    from gateway.plugins import installed as all_installed

    if installed:
        for name, point in sorted(all_installed().items()):
            typer.echo(f"{name:20} {point.dist.version if point.dist else '?':10} {point.value}")
        return
    blueprints, problems, _ = _examine(_config_path(config))
    _stop_on(problems)
    for blueprint in blueprints:
        typer.echo(f"{blueprint.id:20} {blueprint.version:14} {', '.join(hooks_of(blueprint.cls)) or 'no hooks'}")
    typer.echo("\nCall order:")
    for hook in HOOKS:
        order = [b.id for b in blueprints if hook in hooks_of(b.cls)]
        if order:
            typer.echo(f"  {hook:20} {' → '.join(reversed(order) if hook == 'request_finished' else order)}")


@app.command(short_help="List the models, their context and prices.")
def models(
    config: ConfigOption = None,
    search: Annotated[str, typer.Argument(help="Only models whose id contains this.")] = "",
) -> None:
    """The models that the catalogue knows: context, prices in USD per million tokens, where that is known from."""
    loaded = _load(config)
    catalogue = _catalogue(loaded)
    typer.echo(f"{'model':48} {'context':>9} {'input':>9} {'output':>9}  from")
    for item in catalogue.listing(lambda _: True)["data"]:
        if search not in item["id"]:
            continue
        model = next((m for u in loaded.settings.upstreams if (m := catalogue.model(u, item["id"]))), None)
        if model is not None:
            context = model.context_length or "?"
            prices = f"{_usd(model.price, 'input'):>9} {_usd(model.price, 'output'):>9}"
            typer.echo(f"{model.id:48} {context:>9} {prices}  {model.origin}")


@app.command(short_help="Run the simulated OpenRouter alone.")
def simulate(
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 9999,
    latency: Annotated[float, typer.Option(min=0, help="Seconds before the first byte.")] = 0.2,
    chunk_delay: Annotated[float, typer.Option(min=0, help="Seconds between two chunks of a stream.")] = 0.02,
) -> None:
    """Run the simulated OpenRouter alone. It answers every endpoint; models named `sim-…` misbehave as told.

    The words are listed by `python -c "import gateway.simulator; help(gateway.simulator)"`, for example
    `xenios/sim-fail-503`, `xenios/sim-t500-n20-d50`, `xenios/sim-cutmid`.
    """
    from gateway.simulator import Simulator

    async def run() -> None:
        stop = stop_signals()
        simulator = Simulator(latency=latency, chunk_delay=chunk_delay, remembered=0)
        await simulator.start(host, port)
        typer.echo(f"Simulated OpenRouter at {simulator.url} (Ctrl-C ends it)")
        await stop.wait()
        await simulator.close()

    try:
        run_loop(run())
    except OSError as error:
        _fail(f"Can't listen on {host}:{port}: {error.strerror or error}", 1)


@keys_app.command("hash")
def keys_hash(
    config: ConfigOption = None,
    *,
    new: Annotated[bool, typer.Option("--new", help="Make a new key and print it with its hash.")] = False,
) -> None:
    """Print the hash of a key, for `api_keys` in the YAML. The key is read from standard input, not from arguments."""
    from gateway.kit import hash_key, is_well_formed, new_key
    from gateway.supervisor import DataDirError, read_pepper

    if new:
        key = new_key()
        typer.echo(f"key:  {key}   (shown once: keep it)")
    else:
        key = typer.prompt("Key", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline().strip()
        if not key:
            _fail("No key on standard input.", 2)
        if not is_well_formed(key):
            typer.echo("note: this is not a key of the form that `xenios keys hash --new` makes.", err=True)
    try:
        hashed = hash_key(key, read_pepper(_load(config).settings))
    except DataDirError as error:
        _fail(str(error), 1)
    typer.echo(f"hash: {hashed}")


PluginOption = Annotated[
    str | None, typer.Option("--plugin", help="Only the tables of this plugin. Default: of all.", show_default=False)
]


@db_app.command("upgrade", short_help="Bring the tables up to date.")
def db_upgrade(config: ConfigOption = None, plugin: PluginOption = None) -> None:
    """Bring the plugins' tables up to date, in one transaction. Running it again, or twice at once, does no harm."""
    loaded, folder, schemas = _schemas(config, plugin)
    from gateway import migrations

    changed = _migrated(lambda: migrations.upgrade(loaded.settings, folder, schemas))
    for schema in schemas:
        typer.echo(f"{schema.name:20} {schema.head}{'' if schema.name in changed else '  (was there)'}")


@db_app.command("downgrade", short_help="Bring one plugin's tables back.")
def db_downgrade(
    plugin: Annotated[str, typer.Argument(help="Whose tables, as `xenios db status` names them.")],
    revision: Annotated[str, typer.Argument(help="The revision to go back to; `base` removes the tables.")],
    config: ConfigOption = None,
) -> None:
    """Bring one plugin's tables back to an older revision; what they held beyond it is lost."""
    loaded, folder, [schema] = _schemas(config, plugin)
    from gateway import migrations

    _migrated(lambda: migrations.downgrade(loaded.settings, folder, schema, revision))
    typer.echo(f"{schema.name:20} {revision}")


@db_app.command("status", short_help="What there is, and what is needed.")
def db_status(config: ConfigOption = None) -> None:
    """Each plugin's tables: what the database has and what this program needs. Exit code 1 if any are older."""
    loaded, folder, schemas = _schemas(config)
    from gateway import migrations

    found = _migrated(lambda: migrations.versions(loaded.settings, folder, schemas))
    for schema, version in zip(schemas, found, strict=True):
        word = "older: xenios db upgrade" if schema.is_older(version) else "ok" if version == schema.head else "newer"
        typer.echo(f"{schema.name:20} has {version or 'nothing':12} needs {schema.head:12} {word}")
    sys.exit(any(schema.is_older(version) for schema, version in zip(schemas, found, strict=True)))


@db_app.command("sql", short_help="Print what upgrade would run.")
def db_sql(
    config: ConfigOption = None,
    plugin: PluginOption = None,
    *,
    pending: Annotated[bool, typer.Option("--pending", help="Only what the database does not have yet.")] = False,
) -> None:
    """Print the SQL that `xenios db upgrade` would run on an empty database, for somebody else to run."""
    loaded, folder, schemas = _schemas(config, plugin)
    from gateway import migrations
    from gateway.stores import database_address

    start: list[str | None] = [None] * len(schemas)
    if pending:
        start = _migrated(lambda: migrations.versions(loaded.settings, folder, schemas))
    dialect, _ = database_address(loaded.settings, folder, migrate=True)
    typer.echo(_migrated(lambda: migrations.sql(dialect, schemas, start)), nl=False)


@app.command(short_help="Print the JSON schema of the configuration.")
def schema(
    *,
    installed: Annotated[
        bool, typer.Option("--installed", help="With the settings of all installed plugins, not of our own alone.")
    ] = False,
) -> None:
    """Print the JSON schema of the configuration: for editors, which then complete and check as you type."""
    import json

    try:
        typer.echo(json.dumps(settings_schema(others=installed), indent=2))
    except LookupError as error:
        _fail(str(error), 1)


@app.command(short_help="Print the version.")
def version() -> None:
    """Print the version."""
    from gateway import __version__

    typer.echo(f"xenios {__version__} (Python {sys.version.split()[0]})")


def settings_schema(*, others: bool = False) -> dict[str, Any]:
    """What `config/schema.json` holds; `others`: with plugins that don't come with Xenios. Raises LookupError."""
    from gateway.plugins import NoConfig, installed, load
    from gateway.settings import json_schema

    classes = {
        name: load(name, Path())[0]
        for name, point in sorted(installed().items())
        if others or (point.dist and point.dist.name == "xenios")
    }
    return json_schema({name: getattr(cls, "Config", NoConfig).model_json_schema() for name, cls in classes.items()})


# --- serving --------------------------------------------------------------------------------


def _serve(
    loaded: Loaded, read: Callable[[], Loaded], sockets: Sequence[socket.socket], *, show_key: bool, new_key: bool
) -> int:
    from gateway.errors import StartError
    from gateway.logs import scrub
    from gateway.plugins import PluginStartError
    from gateway.settings import ConfigError
    from gateway.supervisor import DataDirError, data_dir, identity
    from gateway.worker import Worker

    settings = loaded.settings
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it serves: what would be read again was read just now
    try:
        with data_dir(settings.server.data_dir) as folder:
            own = identity(folder, settings, new_bootstrap_key=new_key)
            shown = own.bootstrap_key if show_key or own.bootstrap_key_is_new or sys.stdout.isatty() else None
            key_file = str(folder / "bootstrap_key") if own.bootstrap_key else None
            if settings.server.workers > 1:
                run_loop(_workers_until_stopped(loaded, read, sockets, folder, key=shown, key_file=key_file))
            else:
                run_loop(_until_stopped(Worker(loaded, own, folder, sockets=sockets), loaded, read, shown, key_file))
    except ConfigError as error:
        _stop_on(list(error.problems))
    except (StartError, PluginStartError, DataDirError) as error:
        typer.echo(f"xenios: {scrub(str(error))}", err=True)  # a plugin may have quoted what it was given
        return 2 if isinstance(error, StartError) else 1
    except OSError as error:
        typer.echo(f"xenios: can't listen on {_place(settings.server)}: {error.strerror}", err=True)
        return 1
    return 0


async def _until_stopped(
    worker: Worker, loaded: Loaded, read: Callable[[], Loaded], key: str | None, key_file: str | None
) -> None:
    from gateway.companions import Companions
    from gateway.notices import Notices
    from gateway.reload import Reloader

    companions, notices = Companions(), Notices()
    stop = stop_signals(companions.kill)
    worker.companions_ended = companions.ended
    worker.reloader = reloader = Reloader(
        loaded,
        read,
        worker.put_in_force,
        lambda: worker.snapshot.hash,
        lambda: companions.follow(reloader.loaded),
        notices=notices,
    )
    on_hangup(reloader.ask, stop.set)
    async with worker.running(), reloader.listening():
        has_task = "task/chat" in worker.snapshot.names()
        _greet(
            settings=worker.snapshot.settings,
            port=worker.port,
            simulated=worker.simulated,
            has_task=has_task,
            key=key,
            key_file=key_file,
        )
        companions.follow(loaded)
        await _serve_until(stop, notices, reloader, worker.snapshot.hash)
        companions.stop()


async def _serve_until(stop: asyncio.Event, notices: Notices, reloader: Reloader, config: str) -> None:
    """Tell whoever started this process that it is ready, lives, and stops."""
    await notices.until(stop, f"configuration {config}")
    server = reloader.loaded.settings.server
    notices.stopping(server.drain_delay + server.drain_timeout + STOP_SECONDS)


async def _workers_until_stopped(
    loaded: Loaded,
    read: Callable[[], Loaded],
    sockets: Sequence[socket.socket],
    folder: Path,
    *,
    key: str | None,
    key_file: str | None,
) -> None:
    from gateway.companions import Companions
    from gateway.notices import Notices
    from gateway.plugins import read_plugins
    from gateway.processes import Group
    from gateway.stores import embedded_redis

    read_plugins(loaded.settings, loaded.source)  # a mistake is told once, not by each worker
    companions, notices = Companions(), Notices()

    def kill() -> None:
        companions.kill()
        group.kill()

    async with contextlib.AsyncExitStack() as stack:
        redis_url = await stack.enter_async_context(embedded_redis(loaded.settings, folder))
        stack.push_async_callback(companions.ended)
        group = Group(loaded, folder, redis_url, read, companions.follow, sockets=sockets, notices=notices)
        stop = stop_signals(kill)
        on_hangup(group.reloader.ask, stop.set)
        async with group.running() as ready, group.reloader.listening():
            _greet(
                settings=loaded.settings,
                port=group.port,
                simulated=ready.simulated,
                has_task=ready.has_chat_task,
                key=key,
                key_file=key_file,
            )
            companions.follow(loaded)
            await _serve_until(stop, notices, group.reloader, group.config)
            companions.stop()


def _greet(**about: Any) -> None:
    sys.stderr.write(_banner(**about))
    sys.stderr.flush()


def stop_signals(at_second: Callable[[], None] | None = None) -> asyncio.Event:
    """Set by TERM or INT; a second one ends the process at once, after `at_second`."""
    import asyncio

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            if at_second is not None:
                at_second()
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


def on_hangup(reload: Callable[[], None], stop: Callable[[], None]) -> None:
    """SIGHUP: reload; but stop if it means that the terminal was closed, as a program without a reload would."""
    import asyncio

    terminals = [fd for fd in (0, 1, 2) if os.isatty(fd)]

    def on_signal() -> None:
        closed = any(not os.isatty(fd) for fd in terminals)
        stop() if closed else reload()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_signal)


def _banner(
    *, settings: Settings, port: int, simulated: bool, has_task: bool, key: str | None, key_file: str | None
) -> str:
    import shlex

    from gateway import __version__

    server = settings.server.model_copy(update={"port": port})
    url, place = _url(server), _place(server)
    lines = [f"Xenios {__version__} at {place if server.unix_socket else url}"]
    if simulated:
        bar = "#" * 80
        text = (
            "SIMULATED ANSWERS: no upstream key is set, so a built-in simulation answers.",
            "Set OPENROUTER_API_KEY and start again for real models.",
        )
        lines += [bar, *(f"# {line:<76} #" for line in text), bar]
    # Without a key to show: double quotes, in which a shell puts the variable's value.
    bearer = f"'Authorization: Bearer {key}'" if key else '"Authorization: Bearer $XENIOS_KEY"'
    python_key = repr(key) if key else "os.environ['XENIOS_KEY']"
    imports = "from openai import OpenAI" if key else "import os; from openai import OpenAI"
    through = ""
    if server.unix_socket:
        imports = f"import httpx; {imports}"
        through = f", http_client=httpx.Client(transport=httpx.HTTPTransport(uds={str(server.unix_socket)!r}))"
    model = "task/chat" if has_task else "anthropic/claude-haiku-4.5"
    if key is not None:
        lines.append(f"Key (admin):  {key}")
    elif key_file is not None:
        lines.append(f"Key (admin):  export XENIOS_KEY=$(cat {shlex.quote(key_file)})   # --show-key prints it")
    by = f"--unix-socket {shlex.quote(str(server.unix_socket))} " if server.unix_socket else ""
    curl = (
        f"curl {by}{url}/v1/chat/completions -H {bearer} -H 'Content-Type: application/json' "
        """-d '{"model": "anthropic/claude-haiku-4.5", "messages": [{"role": "user", "content": "Hello"}]}'"""
    )
    messages = "[{'role': 'user', 'content': 'Hello'}]"
    # not indented: Python refuses pasted lines that are
    lines += [
        "",
        "Try it:",
        curl,
        "",
        "Or in Python (pip install openai), streamed:",
        f"{imports}; client = OpenAI(base_url={url + '/v1'!r}, api_key={python_key}{through})",
        f"stream = client.chat.completions.create(model={model!r}, messages={messages}, stream=True)",
        "for chunk in stream: print(chunk.choices[0].delta.content or '', end='', flush=True)",
        "",
    ]
    return "\n".join(lines) + "\n"


def _place(server: ServerSettings) -> str:
    return str(server.unix_socket or f"{server.host}:{server.port}")


def _url(server: ServerSettings) -> str:
    """Where a client on this machine finds it."""
    scheme = "https" if server.tls else "http"
    if server.unix_socket:
        return f"{scheme}://localhost"
    host = server.host if server.host not in {"0.0.0.0", "::"} else "127.0.0.1"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{server.port}"


def run_loop(main_coroutine: Any) -> None:
    try:
        import uvloop
    except ImportError:
        import asyncio

        asyncio.run(main_coroutine)
    else:
        uvloop.run(main_coroutine)


# --- configuration --------------------------------------------------------------------------------


def _config_path(given: Path | None) -> Path:
    if given is not None:
        return given
    if chosen := os.environ.get("XENIOS_CONFIG"):
        return Path(chosen)
    local = Path("config/xenios.yaml")
    if local.is_file():
        return local
    packaged = Path(__file__).parent / "data" / "xenios.yaml"
    return packaged if packaged.is_file() else Path(__file__).parent.parent / "config" / "xenios.yaml"


def _load(config: Path | None, changes: Mapping[str, Any] | None = None) -> Loaded:
    """The configuration, under what the command line says of `server`; or exit 2 with every mistake in it."""
    from gateway.reload import changed
    from gateway.settings import SEVERAL_NEED_REDIS, ConfigError, counts_apart, load

    path = _config_path(config)
    try:
        loaded = load(path)
    except ConfigError:
        _, problems, _ = _examine(path)
        _stop_on(problems)
        raise
    loaded = changed(loaded, changes or {})
    if counts_apart(loaded.settings):
        typer.echo(f"xenios: {SEVERAL_NEED_REDIS}.", err=True)
        raise typer.Exit(2)
    return loaded


def _examine(path: Path) -> tuple[list[Blueprint], list[Problem], Loaded | None]:
    """Everything that is wrong with the file and its plugins, in line order."""
    from gateway.reload import examine_all
    from gateway.yaml_source import read_text

    if _orders:
        told = _orders[0].config
        return examine_all(read_text(told["text"], told["file"], Path(told["base"]), os.environ, told["files"]))
    return examine_all(path)


def _stop_on(problems: list[Problem]) -> None:
    if problems:
        for problem in problems:
            typer.echo(str(problem), err=True)
        _fail(f"{len(problems)} mistake{'s' if len(problems) > 1 else ''} in the configuration.", 2)


def _fail(message: str, code: int) -> NoReturn:
    from gateway.logs import scrub

    typer.echo(f"xenios: {scrub(message)}", err=True)  # a plugin's error may quote what it was given
    sys.exit(code)


def _schemas(config: Path | None, name: str | None = None) -> tuple[Loaded, Path, list[Schema]]:
    """The configuration, its data directory and the tables of its plugins; or exit 2."""
    from gateway.plugins import schemas
    from gateway.supervisor import DataDirError, make_data_dir

    blueprints, problems, loaded = _examine(_config_path(config))
    _stop_on(problems)
    found = schemas(blueprints)
    if not found:
        typer.echo("No plugin of this configuration has tables.", err=True)
    if name is not None:
        found = [schema for schema in found if schema.name == name]
        if not found:
            _fail(f"No plugin of the configuration has tables named {name!r}.", 2)
    if loaded is None:
        raise AssertionError
    try:
        return loaded, make_data_dir(loaded.settings), found
    except DataDirError as error:
        _fail(str(error), 1)


def _migrated(work: Callable[[], T]) -> T:
    from gateway.errors import StartError
    from gateway.migrations import MigrationError

    try:
        return work()
    except (MigrationError, StartError) as error:
        _fail(str(error), 1)


def _asked(request: Path, principal: str | None, endpoint: str, headers: Sequence[str]) -> Asked:
    """What is to be explained, or exit 2."""
    from gateway.errors import GatewayError
    from gateway.explain import Asked
    from gateway.incoming import parse_object

    try:
        raw = sys.stdin.buffer.read() if str(request) == "-" else request.read_bytes()
        body = parse_object(raw)
    except OSError as error:
        _fail(f"{request} can't be read: {error.strerror}", 2)
    except GatewayError as error:
        _fail(f"{request}: {error.message}", 2)
    pairs = [header.partition(":") for header in headers]
    for name, colon, _ in pairs:
        if not colon:
            _fail(f"--header {name!r} has no colon; write it as 'X-Xenios-Task: chat'.", 2)
    return Asked(body, endpoint, {name.strip(): value.strip() for name, _, value in pairs}, principal)


def _explained(config: Path | None, url: str | None, asked: Asked) -> dict[str, Any]:
    """The explanation, or exit 1; exit 2 if the configuration has mistakes."""
    import asyncio

    from gateway import logs
    from gateway.errors import GatewayError, StartError
    from gateway.explain_command import by_configuration, by_gateway
    from gateway.plugins import PluginStartError

    try:
        if url is not None:
            key = os.environ.get("XENIOS_KEY", "")
            if not key:
                _fail("--url needs an administrator's key in $XENIOS_KEY.", 2)
            return asyncio.run(by_gateway(url, key, asked))
        blueprints, problems, loaded = _examine(_config_path(config))
        _stop_on(problems)
        if loaded is None:
            raise AssertionError
        logs.setup(loaded.settings.log)  # to standard error: standard output is the command's
        return asyncio.run(by_configuration(loaded, blueprints, asked))
    except GatewayError as error:
        _fail(error.message, 1)
    except (StartError, PluginStartError) as error:
        _fail(str(error), 2)
    except (OSError, ValueError) as error:
        _fail(f"{url} can't be asked: {error}", 1)


def _catalogue(loaded: Loaded) -> Catalogue:
    from gateway.catalogue import Catalogue

    async def no_fetch(_: str) -> bytes:
        raise OSError

    kinds = {name: upstream.kind for name, upstream in loaded.settings.upstreams.items()}
    cache = loaded.settings.server.data_dir / "catalogue"
    catalogue = Catalogue(kinds, loaded.settings.catalogue, cache if cache.is_dir() else None, no_fetch)
    catalogue.load()
    return catalogue


def _usd(price: Price, name: str) -> str:
    pico = getattr(price, name)
    return "?" if pico is None else f"{pico / 1e6:g}"


def _without_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """What `--config` names, and the other arguments."""
    given: str | None = None
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in {"--config", "-c"}:
            given = next(rest, None)
        elif argument.startswith("--config="):
            given = argument.removeprefix("--config=")
        else:
            others.append(argument)
    return Path(given) if given else None, others


def _add_plugin_commands(config: Path, wanted: Sequence[str], only: str | None = None) -> None:
    """Commands that plugins of the configuration bring (`register_commands`). Ends it if none brings what is wanted.

    `only`: of the plugin with this id.
    """
    import inspect

    blueprints, problems, loaded = _examine(config)
    for blueprint in blueprints:
        if not hasattr(blueprint.cls, "register_commands") or only not in {None, blueprint.id}:
            continue
        register = inspect.getattr_static(blueprint.cls, "register_commands")
        try:
            register(_Unstarted(blueprint, loaded, config), app)
        except Exception as error:  # noqa: BLE001 - a plugin's own code
            _fail(f"plugin {blueprint.id}: register_commands failed: {type(error).__name__}: {error}", 1)
    found: Any = typer.main.get_group(app)
    for word in wanted:
        if not hasattr(found, "commands"):
            return
        found = found.commands.get(word)
        if found is None:
            _stop_on(problems)
            told = "".join(f"\n  {line}" for line in _commands_of_installed())
            _fail(f"No such command '{word}', nor does a plugin of {config} bring it.{told}", 2)


def _commands_of_installed() -> list[str]:
    """What each installed plugin says of its commands (`commands`), for whoever misses one."""
    from gateway.plugins import installed, load

    said: list[str] = []
    for name in sorted(installed()):
        with contextlib.suppress(LookupError):  # it can't be loaded
            said += [line] if (line := getattr(load(name, Path())[0], "commands", None)) else []
    return said


class _Unstarted:
    """What a plugin's `register_commands` sees as `self`: its config, its id, the database for a command's time, and a
    gateway without a server to work in.
    """

    def __init__(self, blueprint: Blueprint, loaded: Loaded | None, file: Path) -> None:
        self.config = blueprint.config
        self.id = blueprint.id
        self._file = file
        self._cls = blueprint.cls
        self._loaded = loaded

    def pepper(self) -> str:
        """What client keys are hashed with."""
        from gateway.supervisor import DataDirError, read_pepper

        if self._loaded is None:
            _fail("The configuration has mistakes (`xenios check`).", 2)
        try:
            return read_pepper(self._loaded.settings)
        except DataDirError as error:
            _fail(str(error), 1)

    def headless(self, run: Run, *, processes: int = 1) -> NoReturn:
        """Await `run(plugin, stop)` in a gateway without a server (`headless.py`), or in several such processes."""
        from gateway import companions, headless
        from gateway.reload import read

        loaded, order = self._loaded, _orders[0] if _orders else None
        if loaded is None:
            _fail("The configuration has mistakes (`xenios check`).", 2)
        ordered = order is not None
        if processes == 1 or (order is not None and order.alone):
            sys.exit(headless.main(loaded, self.id, run, lambda: read(self._file, {}), ordered=ordered))
        arguments = order.arguments if order is not None else _without_config(sys.argv[1:])[1]
        keeping = companions.keep_several(
            loaded, self.id, arguments, processes, lambda: read(self._file, {}), ordered=ordered
        )
        run_loop(keeping)
        sys.exit(0)

    def with_database(self, use: Callable[[Database], Coroutine[Any, Any, T]]) -> T:
        """What `use(database)` returns. Ends the command with a message if the database is away or its tables old."""
        import asyncio

        from gateway.errors import StartError, StoreUnavailable
        from gateway.stores import open_database
        from gateway.supervisor import DataDirError, make_data_dir

        if self._loaded is None:
            _fail("The configuration has mistakes (`xenios check`).", 2)
        from gateway import logs

        settings = self._loaded.settings
        logs.setup(settings.log)  # to standard error: standard output is the command's
        schema = getattr(self._cls, "schema", None)

        async def run() -> T:
            folder = make_data_dir(settings)
            async with open_database(settings, folder, [schema] if schema else [], needed=True) as database:
                return await use(database)

        try:
            return asyncio.run(run())
        except (StartError, DataDirError) as error:
            _fail(str(error), 2)
        except StoreUnavailable:
            _fail("The database (services.database) can't be used now; the line above says why.", 1)
