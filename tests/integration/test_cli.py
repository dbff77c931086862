"""The command line as a user has it: real processes, their exit codes, and what they say."""

from __future__ import annotations

import importlib.metadata
import json
import re
import resource
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from gateway.cli import BUILT_IN
from gateway.kit import hash_key, is_well_formed, new_key
from tests.full.load import resident
from tests.integration.process import CONFIG, MODULE, XENIOS, environment, serving, xenios

HERE = Path(__file__).parent
COMMANDS = [
    "", "serve", "check", "explain", "plugins", "models", "simulate", "keys", "keys hash", "keys create", "keys list", "keys show",
    "keys rotate", "keys revoke", "usage", "db", "db upgrade", "db downgrade", "db status", "db sql", "schema", "version",
]  # fmt: skip
SHIPPED = sorted([*CONFIG.glob("*.yaml"), *CONFIG.glob("examples/*.yaml")])
PRODUCTION = {
    "OPENROUTER_API_KEY": "sk-or-test",
    "XENIOS_PEPPER": "0123456789abcdef",
    "XENIOS_ADMIN_KEY": new_key(),
    "XENIOS_APP_KEY": new_key(),
}
KEY = re.compile(r"sk-xenios-[0-9A-Za-z]+")


def write(folder: Path, text: str, name: str = "own.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def small(folder: Path) -> Path:
    """A configuration that starts in half the time of the default one: it has keys, and neither Valkey nor jobs."""
    return write(folder, simulated("  - use: api_keys\n"), "small.yaml")


def simulated(plugins: str) -> str:
    return f"upstreams: {{openrouter: {{without_key: simulate}}}}\nplugins:\n{plugins}"


# --- help and usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_every_option(command: str, tmp_path: Path) -> None:
    """`--help` of each command says what it does and what each option means, within 80 columns."""
    done = xenios(*command.split(), "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    usage, _, text = done.stdout.partition("\n\n")
    assert usage.startswith(f"Usage: xenios {command}".rstrip())
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "..." not in text, "a summary is cut short"
    for line in re.findall(r"^  (-[^\n]+)$", text, re.MULTILINE):
        assert re.search(r"\S  +\S|^--help", line), f"{line!r} says nothing"


def test_help_lists_every_command(tmp_path: Path) -> None:
    """`xenios` alone lists the commands; nothing that exists is hidden."""
    done = xenios(cwd=tmp_path)
    listed = re.findall(r"^  ([a-z]+)  +\S", (done.stdout + done.stderr).partition("Commands:")[2], re.MULTILINE)
    assert sorted(listed) == sorted(BUILT_IN)
    assert done.returncode == 2


def test_help_is_fast(tmp_path: Path) -> None:
    """`--help` loads no server: under 1.5 seconds of CPU on a slow machine, where that alone would take more."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {name: None for name in environment() if name.startswith("COVERAGE_")}
    xenios("--help", cwd=tmp_path, env=env, command=XENIOS)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.5


def test_help_imports_no_server(tmp_path: Path) -> None:
    """What serving needs is imported by `serve`, not by the command line."""
    heavy = {"aiohttp.web", "uvloop", "gateway.worker", "gateway.simulator"}
    code = f"import sys, gateway.cli; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    done = xenios("-c", code, cwd=tmp_path, command=(MODULE[0],))
    assert done.returncode == 0, done.stderr


def test_a_start_imports_nothing_that_it_can_do_without(tmp_path: Path) -> None:
    """`serve` loads no library for pretty tracebacks, which is there for the command line: a tenth of the start."""
    code = "import sys, gateway.cli, gateway.reload, gateway.worker; sys.exit('rich' in sys.modules and 'rich')"
    done = xenios("-c", code, cwd=tmp_path, command=(MODULE[0],))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("nothing", "No such command 'nothing'"),
        ("serve --porrt 1", "No such option: --porrt"),
        ("serve --port many", "Invalid value for '--port'"),
        ("serve --port 70000", "Invalid value for '--port'"),
        ("check --config", "requires an argument"),
        ("keys", "Usage: xenios keys"),
    ],
)
def test_bad_usage_is_2(arguments: str, says: str, tmp_path: Path) -> None:
    """Whoever mistypes is told so in one line and gets exit code 2."""
    done = xenios(*arguments.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [XENIOS, MODULE], ids=["xenios", "python -m gateway"])
def test_both_ways_to_call_it(command: tuple[str, ...], tmp_path: Path) -> None:
    """`python -m gateway` is the same command."""
    done = xenios("version", cwd=tmp_path, command=command)
    assert done.returncode == 0
    assert re.fullmatch(r"xenios \d+\.\d+\.\d+ \(Python 3\.\d+\.\d+\)\n", done.stdout)


# --- check ------------------------------------------------------------------------------------------------


def test_ten_mistakes_are_ten_errors(tmp_path: Path) -> None:
    """All mistakes at once, in line order, each with file, line, column, path and what to do; exit code 2."""
    file = HERE / "ten_mistakes.yaml"
    done = xenios("check", "--config", file, cwd=tmp_path)
    *errors, summary = done.stderr.splitlines()
    assert done.returncode == 2
    assert summary == "xenios: 10 mistakes in the configuration."
    found = [re.fullmatch(rf"{re.escape(str(file))}:(\d+):(\d+): ([^ ]+): (.+)", line) for line in errors]
    assert all(found), errors
    assert [(int(m[1]), m[3]) for m in found if m] == [
        (3, "server.prot"),
        (4, "server.max_body"),
        (9, "upstreams.openrouter.api_key"),
        (10, "upstreams.openrouter.without_key"),
        (13, "plugins[0].use"),
        (15, "plugins[1].when"),
        (20, "plugins[1].config.keys[0].hash"),
        (26, "plugins[2].config.tasks.chat.desciption"),
        (27, "plugins[3].use"),
        (28, "plugins[4].use"),
    ]
    for number, hint in {
        0: "'port'",
        3: "'simulate'",
        4: "'access_log'",
        7: "'description'",
        8: "'check_request'",
    }.items():
        assert f"id you mean {hint}" in errors[number]
    assert "not-a-hash" not in done.stderr


@pytest.mark.parametrize("command", ["serve", "plugins", "models", "keys hash --new"])
def test_no_command_works_on_mistakes(command: str, tmp_path: Path) -> None:
    """Whatever reads the configuration refuses it with the same list and 2; nothing is made on the disk."""
    done = xenios(*command.split(), "--config", HERE / "ten_mistakes.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("xenios: 10 mistakes in the configuration.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_shipped_is_fine(path: Path, tmp_path: Path) -> None:
    """`xenios check` finds no mistake in any file that we ship, and leaves nothing behind."""
    done = xenios("check", "--config", path, cwd=tmp_path, env=PRODUCTION if path.stem == "production" else {})
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{re.escape(str(path))}: fine, \d plugins?\.\n", done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_production_says_what_it_lacks(tmp_path: Path) -> None:
    """Without its variables production.yaml names each of them at once."""
    done = xenios("check", "--config", CONFIG / "production.yaml", cwd=tmp_path)
    assert done.returncode == 2
    for name in PRODUCTION:
        assert name in done.stderr


def test_files_that_are_no_plugins(tmp_path: Path) -> None:
    """An error in a plugin's file names the file, the entry's line and what is wrong, without a traceback."""
    write(tmp_path, "class Plugin:\n  def\n", "broken.py")
    write(tmp_path, "1 / 0\n", "failing.py")
    write(tmp_path, "VALUE = 1\n", "empty.py")
    write(tmp_path, "class Plugin:\n    async def check_request(self, exchange): ...\n", "unmarked.py")
    uses = {
        "./gone.py:Plugin": "there is no file",
        "./broken.py:Plugin": "can't be imported: SyntaxError",
        "./failing.py:Plugin": "can't be imported: ZeroDivisionError",
        "./empty.py:Plugin": "has no class Plugin",
        "./empty.py:VALUE": "is not a class",
        "./empty.py": "is neither a plugin's name nor a file",
        "./unmarked.py:Plugin": "has a hook's name but is not marked with @hookimpl",
    }
    config = write(tmp_path, simulated("".join(f"  - use: {use}\n" for use in uses)))
    done = xenios("check", "--config", config, cwd=tmp_path)
    assert done.returncode == 2
    *errors, summary = done.stderr.splitlines()
    assert summary.startswith(f"xenios: {len(uses)} mistakes")
    for number, (says, line) in enumerate(zip(uses.values(), errors, strict=True)):
        assert re.search(rf"own\.yaml:{number + 3}:\d+: plugins\[{number}\]\.use: ", line)
        assert says in line


def test_an_upstream_that_is_not_there(tmp_path: Path) -> None:
    """A route to an upstream that the file doesn't have is a mistake of the file, not of the first request."""
    use = "{model: m, upstream: opnrouter}"
    tables = f"aliases: {{a: {use}, b: [x, {use}]}}, rules: [{{name: r, match: x, use: {use}}}], tasks: {{t: {{use: [{use}]}}}}"
    config = write(tmp_path, simulated(f"  - use: routing\n    config: {{{tables}}}\n"))
    done = xenios("check", "--config", config, cwd=tmp_path)
    assert done.returncode == 2
    *errors, summary = done.stderr.splitlines()
    assert summary == "xenios: 4 mistakes in the configuration."
    for line in errors:
        assert re.search(
            r"own\.yaml:4:\d+: .*upstream: there is no upstream 'opnrouter' \(did you mean 'openrouter'\?\)", line
        )


@pytest.mark.parametrize(
    ("text", "says"), [(None, "No such file"), ("server: [", "not valid YAML"), ("- 1", "must be a mapping")]
)
def test_a_file_that_is_no_configuration(text: str | None, says: str, tmp_path: Path) -> None:
    """A file that is missing or no YAML is told like every other mistake."""
    if text is not None:
        write(tmp_path, text)
    done = xenios("check", "-c", "own.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("own.yaml:")
    assert says in done.stderr


# --- which configuration ----------------------------------------------------------------------------------


def test_which_configuration(tmp_path: Path) -> None:
    """--config, else $XENIOS_CONFIG, else config/xenios.yaml of the working directory, else the built-in one."""
    first, second = (write(tmp_path, simulated("  []\n"), name) for name in ("first.yaml", "second.yaml"))
    built_in = xenios("check", cwd=tmp_path).stdout
    assert built_in.endswith("xenios.yaml: fine, 9 plugins.\n")
    (tmp_path / "config").mkdir()
    write(tmp_path / "config", simulated("  - use: fallback\n"), "xenios.yaml")
    assert xenios("check", cwd=tmp_path).stdout == "config/xenios.yaml: fine, 1 plugin.\n"
    env = {"XENIOS_CONFIG": str(first)}
    assert xenios("check", cwd=tmp_path, env=env).stdout == f"{first}: fine, 0 plugins.\n"
    assert xenios("check", "-c", second, cwd=tmp_path, env=env).stdout == f"{second}: fine, 0 plugins.\n"


@pytest.mark.parametrize("command", [XENIOS, MODULE], ids=["xenios", "python -m gateway"])
def test_an_empty_folder_is_enough(command: tuple[str, ...], tmp_path: Path) -> None:
    """`xenios serve` in an empty folder finds the configuration that is built in, and answers."""
    with serving(tmp_path, command=command) as running:
        assert running.chat("fast").status == 200


# --- plugins, models, simulate, schema --------------------------------------------------------------------


def test_plugins_shows_hooks_and_order(tmp_path: Path) -> None:
    """`xenios plugins`: each plugin with version and hooks, then who is called when."""
    done = xenios("plugins", "--config", CONFIG / "xenios.yaml", cwd=tmp_path)
    assert done.returncode == 0
    listed, _, order = done.stdout.partition("\nCall order:\n")
    names = ["access_log", "metrics", "api_keys", "routing", "rate_limit", "budgets", "usage", "jobs", "fallback"]
    assert [line.split()[0] for line in listed.splitlines()] == names
    assert re.search(r"^  explain +api_keys → routing → rate_limit → budgets → usage → fallback$", order, re.MULTILINE)


def test_plugins_shows_what_is_installed(tmp_path: Path) -> None:
    """`xenios plugins --installed` also lists what no configuration names."""
    done = xenios("plugins", "--installed", "-c", "gone.yaml", cwd=tmp_path)
    assert done.returncode == 0
    points = importlib.metadata.entry_points(group="xenios.plugins")
    assert [line.split()[0] for line in done.stdout.splitlines()] == sorted(points.names)
    assert {"access_log", "api_keys", "fallback", "routing"} <= points.names


def test_models_shows_prices(tmp_path: Path) -> None:
    """`xenios models opus-4.5`: those models with their context and prices, offline."""
    done = xenios("models", "claude-opus-4.5", "--config", CONFIG / "xenios.yaml", cwd=tmp_path)
    assert done.returncode == 0
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["model", "context", "input", "output", "from"]
    assert "anthropic/claude-opus-4.5 200000 5 25 bundled" in [" ".join(row.split()) for row in rows]
    assert all("claude-opus-4.5" in row for row in rows)


def test_schema_is_current(tmp_path: Path) -> None:
    """config/schema.json is what `xenios schema` prints; `make schema` writes it anew."""
    done = xenios("schema", cwd=tmp_path)
    assert done.returncode == 0
    assert (CONFIG / "schema.json").read_text() == done.stdout


def test_simulate_is_an_upstream(tmp_path: Path) -> None:
    """`xenios simulate` answers as OpenRouter would: a gateway in front of it knows no difference; INT ends it with 0."""
    command = [*XENIOS, "simulate", "--port", "0", "--latency", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.fullmatch(
            r"Simulated OpenRouter at (http://127\.0\.0\.1:\d+\S*) \(Ctrl-C ends it\)\n", process.stdout.readline()
        )
        assert found is not None
        upstream = f"upstreams: {{openrouter: {{api_key: sk-or-v1-x, base_url: '{found[1]}'}}}}\nplugins: []\n"
        with serving(tmp_path, "--config", write(tmp_path, upstream)) as running:
            reply = running.chat("anthropic/claude-haiku-4.5")
            assert reply.status == 200
            assert "x-xenios-simulated" not in reply.headers
            assert running.chat("xenios/sim-fail-503").status == 503
        taken = xenios("simulate", "--port", found[1].split(":")[2].split("/")[0], cwd=tmp_path)
        assert (taken.returncode, taken.stderr[:22]) == (1, "xenios: Can't listen o")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()


# --- serve ------------------------------------------------------------------------------------------------


def test_the_bootstrap_key_is_made_once(tmp_path: Path) -> None:
    """Printed at the first start, the same ever after with --show-key, not printed without it, another with --new-key."""
    config = ("--config", small(tmp_path))
    with serving(tmp_path, *config) as first:
        [key] = set(KEY.findall(first.banner))
        assert is_well_formed(key)
        assert key == first.key
        assert first.request("GET", "/v1/models").status == 200
        folder = tmp_path / ".xenios"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for name in ("bootstrap_key", "pepper", "lock"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    with serving(tmp_path, *config, "--show-key") as second:
        assert set(KEY.findall(second.banner)) == {key}
    with serving(tmp_path, *config) as third:
        assert KEY.findall(third.banner) == []
        assert "--show-key" in third.banner
        assert third.request("GET", "/v1/models", key=key).status == 200
    with serving(tmp_path, *config, "--new-key") as fourth:
        [other] = set(KEY.findall(fourth.banner))
        assert other != key
        assert fourth.request("GET", "/v1/models", key=other).status == 200
        assert fourth.request("GET", "/v1/models", key=key).status == 401
        assert stat.S_IMODE((folder / "bootstrap_key").stat().st_mode) == 0o600


def test_there_is_no_default_key(tmp_path: Path) -> None:
    """Two installations have two keys and two peppers, and neither is in what we ship."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    config = ("--config", small(tmp_path))
    with serving(tmp_path / "a", *config) as one, serving(tmp_path / "b", *config) as two:
        assert one.key != two.key
        assert one.request("GET", "/v1/models", key=two.key).status == 401
    peppers = [(tmp_path / name / ".xenios" / "pepper").read_text() for name in "ab"]
    assert peppers[0] != peppers[1]


def test_the_banner_names_the_simulation(tmp_path: Path) -> None:
    """Without an upstream key a box says that answers are simulated; with one nothing does."""
    with serving(tmp_path) as running:
        assert "SIMULATED ANSWERS" in running.banner
        assert running.chat("fast").headers["x-xenios-simulated"] == "1"
    with serving(tmp_path, env={"OPENROUTER_API_KEY": "sk-or-v1-canary"}) as running:
        assert "SIMULATED" not in running.banner
        assert "sk-or-v1-canary" not in running.banner


def test_host_and_port_win_over_the_file(tmp_path: Path) -> None:
    """--host and --port replace what the configuration says; the banner names the address in force."""
    with serving(tmp_path, "--host", "127.0.0.2", env={"XENIOS_CONFIG": str(CONFIG / "xenios.yaml")}) as running:
        assert re.search(r"^Xenios \S+ at http://127\.0\.0\.2:\d+$", running.banner, re.MULTILINE)
        assert ":8080" not in running.banner
        assert running.request("GET", "/health", key=None).status == 200


def test_a_port_that_is_taken_is_1(tmp_path: Path) -> None:
    """The address and the reason in one line; exit code 1."""
    (tmp_path / "other").mkdir()
    config = ("--config", small(tmp_path))
    with serving(tmp_path, *config) as running:
        port = running.url.rpartition(":")[2]
        done = xenios("serve", *config, "--port", port, cwd=tmp_path / "other")
    assert done.returncode == 1
    assert done.stderr.startswith(f"xenios: can't listen on 127.0.0.1:{port}: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_data_directory_in_use_is_1(tmp_path: Path) -> None:
    """Two gateways don't share a data directory: the second says so and leaves the first alone."""
    config = ("--config", small(tmp_path))
    with serving(tmp_path, *config) as running:
        done = xenios("serve", *config, "--port", "0", cwd=tmp_path)
        assert running.request("GET", "/health", key=None).status == 200
    assert done.returncode == 1
    assert "Another xenios uses the data directory" in done.stderr


def test_an_open_door_is_2(tmp_path: Path) -> None:
    """Without any authentication nobody serves the world by mistake."""
    done = xenios("serve", "--host", "0.0.0.0", "-c", CONFIG / "examples" / "passthrough.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "allow_anonymous" in done.stderr


_FAILING = """
from contextlib import asynccontextmanager
from gateway import hookimpl

class Plugin:
    def __init__(self, config, services):
        self.fail("__init__")

    @asynccontextmanager
    async def lifespan(self):
        self.fail("lifespan")
        yield

    @hookimpl
    def register_routes(self, router):
        self.fail("register_routes")

    @hookimpl
    def register_upstreams(self, register):
        self.fail("register_upstreams")

    def fail(self, where):
        if where == "WHERE":
            raise RuntimeError("no such database")
"""


@pytest.mark.parametrize("where", ["__init__", "lifespan", "register_routes", "register_upstreams"])
def test_a_plugin_that_fails_to_start_is_1(where: str, tmp_path: Path) -> None:
    """The line names the plugin, what it was doing and its own words; no traceback."""
    write(tmp_path, _FAILING.replace("WHERE", where), "failing.py")
    config = write(tmp_path, simulated("  - use: ./failing.py:Plugin\n"))
    done = xenios("serve", "--port", "0", "--config", config, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"xenios: plugin failing: {where} failed: RuntimeError: no such database\n"


# --- keys -------------------------------------------------------------------------------------------------


def test_a_new_key_works(tmp_path: Path) -> None:
    """`keys hash --new`: the key authenticates once its hash stands in the YAML, and the YAML doesn't hold the key."""
    made = xenios("keys", "hash", "--new", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    found = re.fullmatch(r"key:  (\S+)   \(shown once: keep it\)\nhash: (hmac-sha256:[0-9a-f]{64})\n", made.stdout)
    assert found is not None
    key, hashed = found.groups()
    assert is_well_formed(key)
    assert stat.S_IMODE((tmp_path / ".xenios").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / ".xenios" / "pepper").stat().st_mode) == 0o600
    entry = f"  - use: api_keys\n    config: {{bootstrap: false, keys: [{{id: app, hash: '{hashed}'}}]}}\n"
    with serving(tmp_path, "--config", write(tmp_path, simulated(entry))) as running:
        assert running.chat("openai/gpt-5-mini", key=key).status == 200
        assert running.chat("openai/gpt-5-mini", key=new_key()).status == 401
        assert running.chat("openai/gpt-5-mini", key=None).status == 401


def test_a_key_is_hashed_from_standard_input(tmp_path: Path) -> None:
    """`keys hash` reads the key where no shell history keeps it, and uses the configuration's pepper."""
    pepper, key = "a pepper of this test", new_key()
    config = write(tmp_path, f"server: {{pepper: {pepper}}}\n" + simulated("  []\n"))
    done = xenios("keys", "hash", "--config", config, cwd=tmp_path, stdin=f"{key}\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"hash: {hash_key(key, pepper)}\n", "")
    foreign = xenios("keys", "hash", "--config", config, cwd=tmp_path, stdin="made elsewhere\n")
    assert foreign.returncode == 0
    assert foreign.stderr.startswith("note:")
    nothing = xenios("keys", "hash", "--config", config, cwd=tmp_path)
    assert (nothing.returncode, nothing.stderr) == (2, "xenios: No key on standard input.\n")


# --- commands of plugins ----------------------------------------------------------------------------------

_GREETER = """
import typer
from pydantic import BaseModel
from gateway import hookimpl

class Config(BaseModel):
    name: str

class Plugin:
    Config = Config
    def __init__(self, config, services): ...
    @hookimpl
    def register_commands(self, cli):
        config = self.config
        @cli.command()
        def greet(loud: bool = False):
            "Say hello."
            text = f"Hello {config.name}"
            typer.echo(text.upper() if loud else text)
"""


@pytest.fixture
def greeter(tmp_path: Path) -> Path:
    write(tmp_path, _GREETER, "greeter.py")
    return write(tmp_path, simulated("  - use: ./greeter.py:Plugin\n    config: {name: Ada}\n"))


@pytest.mark.parametrize("way", ["environment", "behind", "before", "equals"])
def test_a_plugin_brings_a_command(way: str, greeter: Path, tmp_path: Path) -> None:
    """A command of a plugin runs with that plugin's settings, wherever the configuration is named."""
    named = {
        "environment": ["greet", "--loud"],
        "behind": ["greet", "--loud", "--config", str(greeter)],
        "before": ["-c", str(greeter), "greet", "--loud"],
        "equals": ["greet", f"--config={greeter}", "--loud"],
    }[way]
    env = {"XENIOS_CONFIG": str(greeter)} if way == "environment" else {}
    done = xenios(*named, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (0, "HELLO ADA\n"), done.stderr


def test_a_plugins_command_has_help(greeter: Path, tmp_path: Path) -> None:
    """It is a command like ours."""
    done = xenios("greet", "--help", "-c", greeter, cwd=tmp_path)
    assert done.returncode == 0
    assert "Say hello." in done.stdout


def test_a_command_that_can_not_be_added(tmp_path: Path) -> None:
    """A plugin whose register_commands fails ends the command and is named, without a traceback."""
    write(tmp_path, _GREETER.replace("config = self.config", "1 / 0"), "greeter.py")
    config = write(tmp_path, simulated("  - use: ./greeter.py:Plugin\n    config: {name: Ada}\n"))
    done = xenios("greet", "--config", config, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "xenios: plugin greeter: register_commands failed: ZeroDivisionError: division by zero\n"


def test_a_command_is_missed_because_of_a_mistake(tmp_path: Path, greeter: Path) -> None:
    """If the plugin's settings are wrong, its command is missing, and the mistakes are told instead."""
    greeter.write_text(greeter.read_text().replace("name: Ada", "nam: Ada"))
    done = xenios("greet", "--config", greeter, cwd=tmp_path)
    assert done.returncode == 2
    assert "plugins[0].config.name: is required" in done.stderr
    assert "1 mistake in the configuration" in done.stderr


def test_the_schema_knows_the_plugins_settings() -> None:
    """An editor completes the settings of each plugin of ours."""
    schema = json.loads((CONFIG / "schema.json").read_text())
    uses = [entry["if"]["properties"]["use"]["const"] for entry in schema["$defs"]["PluginEntry"]["allOf"]]
    points = importlib.metadata.entry_points(group="xenios.plugins")
    assert uses == sorted(point.name for point in points if point.dist is not None and point.dist.name == "xenios")


def test_commands_of_plugins_that_are_not_there_say_whose_they_are(tmp_path: Path) -> None:
    """`usage` and `keys create` without their plugins name these; with a file that is missing or wrong, that is said."""
    plain = write(tmp_path, simulated("  - use: api_keys\n"), "plain.yaml")
    for command in (("usage",), ("keys", "create"), ("keys", "list")):
        done = xenios(*command, "--config", plain, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "with the plugin usage" in done.stderr
        assert "database: true" in done.stderr
        gone = xenios(*command, "--config", "gone.yaml", cwd=tmp_path)
        assert (gone.returncode, "gone.yaml" in gone.stderr) == (2, True)
    status = xenios("db", "status", "--config", plain, cwd=tmp_path)
    assert "No plugin of this configuration has tables" in status.stderr


# --- check --live -----------------------------------------------------------------------------------------

LIVE = """\
upstreams: {openrouter: {without_key: simulate}}
catalogue: {overrides: {openai/gpt-5-mini: {input: 99}}}
plugins:
  - use: routing
    config:
      rules:
        - {name: all, match: "old/*", use: xenios/sim-expiring}
        - {name: never, match: "old/one", use: openai/gpt-5-mini}
      aliases:
        gone: [openai/gpt-5-mini, some/gone]
"""


def test_check_live_asks_the_upstreams(tmp_path: Path) -> None:
    """`xenios check --live` names what the upstream no longer has, or soon won't, with its line: 1 for errors, 0 for warnings."""
    config = write(tmp_path, LIVE)
    done = xenios("check", "--live", "--config", config, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    *lines, last = done.stdout.splitlines()
    found = [re.fullmatch(rf"{re.escape(str(config))}:(\d+):\d+: (\S+): (.*)", line).groups() for line in lines]  # type: ignore[union-attr]
    places = [(line, path) for line, path, _ in found]
    assert places == [
        ("2", 'catalogue.overrides["openai/gpt-5-mini"]'),
        ("7", "plugins[0].config.rules[0].use[0]"),
        ("8", "plugins[0].config.rules[1]"),
        ("10", "plugins[0].config.aliases.gone[1]"),
    ]
    override, retires, never, gone = (text for _, _, text in found)
    assert override.startswith("warning: openai/gpt-5-mini: openrouter says otherwise: input $99 per million became $")
    assert re.fullmatch(r"warning: xenios/sim-expiring: retires on \S+, in (29|30) days \(rule 'all'\)", retires)
    assert never == "warning: rule 'never' can never match: rule 'all' before it takes all"
    assert gone == "error: some/gone: openrouter lists no such model (alias 'gone')"
    assert last == f"{config}: 1 error(s), 3 warning(s) beside the upstreams' lists."
    assert not list(tmp_path.glob(".xenios*"))  # it starts and writes nothing
    config = write(tmp_path, LIVE.replace(", some/gone", ""))
    assert xenios("check", "--live", "--config", config, cwd=tmp_path).returncode == 0


def test_check_live_says_when_there_is_no_list(tmp_path: Path) -> None:
    """An upstream that can't be asked is an error of its own: nothing was compared."""
    upstream = "upstreams: {openrouter: {api_key: x, base_url: 'http://127.0.0.1:1/v1'}}\n"
    done = xenios("check", "--live", "--config", write(tmp_path, upstream), cwd=tmp_path)
    assert done.returncode == 1
    assert ":1:13: upstreams.openrouter: error: its list of models can't be had: UpstreamError: " in done.stdout


def test_the_simulation_keeps_no_requests(tmp_path):
    """Who tries the gateway without a key may send what they like: what was answered is forgotten."""
    body = {"model": "openai/gpt-5-mini", "messages": [{"role": "user", "content": "long " * 800_000}]}
    with serving(tmp_path, "--config", write(tmp_path, simulated("  - use: api_keys\n"))) as running:

        def ask(times):
            for _ in range(times):
                assert running.request("POST", "/v1/chat/completions", body).status == 200
            return resident(running.pid)

        first = ask(5)
        assert ask(30) - first < 60_000_000  # kept, they were twice that
