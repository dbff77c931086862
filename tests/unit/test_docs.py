"""The documents say what is there: their blocks run, their links lead somewhere, their tables are complete."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import asyncpg
import pytest
import typer
import yaml

from gateway import Outcome, When
from gateway.admin import add_admin_routes
from gateway.cli import app
from gateway.core_routes import add_core_routes
from gateway.dialects import DIALECTS, PLAIN_DIALECT
from gateway.health import Health
from gateway.kit.testing import Gateway
from gateway.plugins import HOOKS, faults_of, hooks_of, installed, load
from gateway.routes import Router
from gateway_plugins import api_keys, jobs, usage
from tests.clients.process import plain_environment, served
from tests.contract.jobs import Keeper
from tests.integration.process import serving_beside, xenios
from tests.stores.postgres import postgres_server
from tests.stores.servers import valkey_server

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PLUGINS = ROOT / "plugins" / "README.md"
MAP = ROOT / "gateway" / "README.md"
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "THREAT_MODEL.md", "config/README.md", "deploy/README.md", "deploy/ansible/README.md", "gateway/README.md",
        "plugins/README.md", "plugins/gateway_plugins/jobs/README.md", "plugins/template/README.md", "tests/README.md", "tests/benchmarks/README.md",
        "tests/promises/README.md",
    )
]  # fmt: skip


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


def shell_lines(path):
    """Every command line of its blocks, without prompts and comments."""
    lines = "\n".join(b for language in ("sh", "console", "bash") for b in blocks(path, language)).splitlines()
    return [line for line in (re.sub(r"^\$ |(^|\s)#.*", "", line).strip() for line in lines) if line]


def prose(path):
    """Without blocks and comments, in which nothing is a link or a command."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- every document ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(path):
    """No reader follows a link to a file or a heading that isn't there."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_block_is_sound(path):
    """YAML loads, Python compiles, TOML parses, whatever a reader pastes."""
    for block in blocks(path, "yaml"):
        yaml.safe_load(block)
    for block in blocks(path, "python"):
        if "…" not in block:  # an excerpt
            compile(block, name_of(path), "exec", dont_inherit=True)
    for block in blocks(path, "toml"):
        if "…" not in block:
            tomllib.loads(block)


@cache
def with_plugin_commands():
    """The command line, with what plugins add in a configuration that has them all."""
    api_keys.Plugin.register_commands(SimpleNamespace(config=api_keys.Config(database=True), id="api_keys"), app)
    jobs.Plugin.register_commands(SimpleNamespace(config=jobs.Config(), id="jobs"), app)
    usage.Plugin.register_commands(SimpleNamespace(config=usage.Config(), id="usage"), app)
    jobs.Plugin.register_commands(SimpleNamespace(config=jobs.Config(), id="jobs"), app)
    return app


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_command_exists(path):
    """Each `xenios …` and `make …` that a document names is one, with options that it takes."""
    group = typer.main.get_group(with_plugin_commands())
    quoted = re.findall(r"`([^`\n]+)`", prose(path))
    for line in [*shell_lines(path), *quoted]:
        if not re.match(r"(\S*/)?(xenios|make) ", line) or "…" in line:
            continue
        program, *words = shlex.split(line, comments=True)
        if program.endswith("make"):
            assert words[0] in targets(), line
            continue
        command = group
        while words and not words[0].startswith("-") and hasattr(command, "commands"):
            name = words.pop(0)
            assert name in command.commands, line
            command = command.commands[name]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known | {"--help", "--config"}, line


def targets():
    makefile = (ROOT / "Makefile").read_text()
    return {match[1] for match in re.finditer(r"^([a-z-]+):", makefile, re.MULTILINE)}


def test_every_make_target_with_a_help_text_is_explained():
    """CONTRIBUTING's table has each target that `make` lists."""
    told = set(re.findall(r"`make ([a-z-]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    listed = {m[1] for m in re.finditer(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    assert listed - {"help", "clean"} <= told


# --- README.md: typed as shown ---------------------------------------------------------------------------------------


def my_yaml(*, limits=False, services=False):
    """`my.yaml` as a reader has it who followed the sections up to the plugin in one file; further ones if wanted."""
    base, limit, shared, plugin = blocks(README, "yaml")
    text = base + plugin
    if limits:
        assert text.count("  - use: rate_limit\n  - use: budgets\n") == 1
        text = text.replace("  - use: rate_limit\n  - use: budgets\n", limit)
    if services:
        text, count = re.subn(r"^services:\n(  .*\n)+", shared, text, flags=re.MULTILINE)
        assert count == 1
    return text


def typed(folder, line, **env):
    """What a command line of the page prints."""
    program, *words = shlex.split(line)
    assert program == "xenios"
    done = xenios(*words, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(section, name):
    text = README.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith(name)]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A gateway as it runs after these sections, and the colleague's key."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my.yaml").write_text(my_yaml())
    (folder / "long_prompts.py").write_text(blocks(README, "python")[0])
    with served(folder, folder / "my.yaml") as gateway:
        create, *others = commands("A key for a colleague", "xenios ")
        said = typed(folder, create)
        colleague = re.search(r"^key: +(\S+)", said, re.MULTILINE)[1]
        yield gateway, colleague, folder, others


def curl(line, gateway):
    """(status, headers, body) of a curl line, as a shell would read it."""
    line = line.replace("http://127.0.0.1:8080", gateway.url).replace("$XENIOS_KEY", gateway.key)
    program, *words = shlex.split(line)
    assert program == "curl"
    words = [word for word in words if word != "-i"]
    options = list(zip(words[1::2], words[2::2], strict=True))
    data = next((value for option, value in options if option == "-d"), None)
    return post(words[0], data, dict(value.split(": ", 1) for option, value in options if option == "-H"))


def post(url, data, headers):
    """GET without data."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.netloc, timeout=20)
    try:
        path = place.path + (f"?{place.query}" if place.query else "")
        connection.request("GET" if data is None else "POST", path, data, headers)
        reply = connection.getresponse()
        return reply.status, reply.headers, json.loads(reply.read())
    finally:
        connection.close()


def test_the_curl_lines_do_what_is_said_about_them(followed):
    """The task is answered by its model, `careful` by its second, and the plugin refuses the long prompt."""
    gateway, *_ = followed
    lines = [line for line in shell_lines(README) if line.startswith("curl ") and " -d " in line]
    lines = [line for line in lines if line not in commands("An answer for later", "curl ")]
    task, careful, refused = (curl(line, gateway) for line in lines)
    assert (task[0], task[1]["x-xenios-model"]) == (200, "anthropic/claude-sonnet-4.6")
    assert (careful[0], careful[1]["x-xenios-model"], careful[1]["x-xenios-attempts"]) == (
        200, "anthropic/claude-haiku-4.5", "2",
    )  # fmt: skip
    assert (refused[0], refused[2]["error"]["code"]) == (400, "invalid_request")
    assert int(refused[1]["x-prompt-tokens"]) > 5


def test_an_answer_for_later_comes_as_said(tmp_path):
    """The lines of that section, with the configuration of `make run`: 202, listed, and its answer by `/result`."""
    with served(tmp_path, ROOT / "config" / "xenios.yaml") as gateway:
        ask, listing = commands("An answer for later", "curl ")
        status, headers, _ = curl(ask, gateway)
        assert status == 202
        own = {"Authorization": f"Bearer {gateway.key}"}
        end = time.monotonic() + 30
        while (result := post(gateway.url + headers["location"] + "/result", None, own))[0] == 409:
            assert time.monotonic() < end
        assert (result[0], bool(result[2]["choices"])) == (200, True)
        [job] = curl(listing, gateway)[2]["data"]
        assert headers["location"].endswith(job["id"])


def test_a_request_is_explained_as_said(followed):
    """Both ways tell what decided and the models in order; nothing is sent."""
    gateway, _, folder, _ = followed
    [written] = commands("Why did this request go there?", "echo ")
    subprocess.run(["sh", "-c", written], cwd=folder, check=True)
    alone, asked = commands("Why did this request go there?", "xenios ")
    for line in (alone, asked.replace("http://127.0.0.1:8080", gateway.url)):
        said = typed(folder, line, XENIOS_KEY=gateway.key)
        assert "alias careful" in said
        assert said.index("1. openrouter/xenios/sim-fail-503") < said.index("2. openrouter/anthropic/claude-haiku-4.5")
        assert "long_prompts" in said


def test_a_changed_file_is_taken_up_as_said(followed):
    """The line answers with another hash once the file is changed."""
    gateway, _, folder, _ = followed
    [line] = commands("Another configuration while it runs", "curl ")
    _, method, verb, url, option, header = shlex.split(line)
    assert (method, verb, option) == ("-X", "POST", "-H")
    headers = dict([header.replace("$XENIOS_KEY", gateway.key).split(": ", 1)])
    url = url.replace("http://127.0.0.1:8080", gateway.url)
    mine = folder / "my.yaml"
    before, text = post(url, b"", headers)[2]["config"], mine.read_text()
    try:
        mine.write_text(text.replace("careful:", "carefree:"))
        status, _, changed = post(url, b"", headers)
        assert (status, changed["config"] != before) == (200, True)
    finally:
        mine.write_text(text)
    assert post(url, b"", headers)[2]["config"] == before


def test_the_colleagues_key_may_do_what_is_said(followed):
    """The task and the listed models: 200. Another model: 404. Another endpoint: 403. Then rotated, and revoked."""
    gateway, colleague, folder, others = followed
    headers = {"Authorization": f"Bearer {colleague}", "Content-Type": "application/json"}

    def ask(model, endpoint="chat/completions"):
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "input": "Hello"}
        return post(f"{gateway.base_url}/{endpoint}", json.dumps(body), headers)[0]

    assert [ask("task/summary"), ask("openai/gpt-5-mini")] == [200, 200]
    assert [ask("smart"), ask("anthropic/claude-opus-4.6")] == [404, 404]
    assert ask("openai/gpt-5-mini", "embeddings") == 403
    listed, rotated, revoked = (typed(folder, line) for line in others)
    assert ("ada" in listed, "key:" in rotated, "revoked" in revoked) == (True, True, True)
    end = time.monotonic() + 2
    while ask("task/summary") != 401:
        assert time.monotonic() < end


def test_what_was_used_is_shown_as_said(followed):
    """The lines of that section: sums by model as a table, by day and key as CSV, and over HTTP."""
    gateway, _, folder, _ = followed
    body = json.dumps({"model": "smart", "messages": [{"role": "user", "content": "Hello"}]})
    headers = {"Authorization": f"Bearer {gateway.key}", "Content-Type": "application/json"}
    request_id = post(f"{gateway.base_url}/chat/completions", body, headers)[1]["x-request-id"]
    end = time.monotonic() + 10
    while post(f"{gateway.base_url}/usage/{request_id}", None, headers)[0] != 200:
        assert time.monotonic() < end
    table, csv = (typed(folder, line) for line in commands("What was used", "xenios "))
    assert re.search(r"^anthropic/claude-opus-4.6 +\d", table, re.MULTILINE)
    assert csv.splitlines()[0].startswith("day,key,requests")
    own, everybody = (curl(line, gateway) for line in commands("What was used", "curl "))
    assert own[0] == everybody[0] == 200
    assert "anthropic/claude-opus-4.6" in {group["model"] for group in own[2]["data"]}
    assert "key:bootstrap" in {group["key"] for group in everybody[2]["data"]}


def test_the_limits_hold_as_they_are_shown(tmp_path):
    """With that section's limits each reply says what is left."""
    (tmp_path / "my.yaml").write_text(my_yaml(limits=True))
    (tmp_path / "long_prompts.py").write_text(blocks(README, "python")[0])
    with served(tmp_path, tmp_path / "my.yaml") as gateway:
        body = json.dumps({"model": "smart", "messages": [{"role": "user", "content": "Hello"}]})
        headers = {"Authorization": f"Bearer {gateway.key}", "Content-Type": "application/json"}
        status, said, _ = post(f"{gateway.base_url}/chat/completions", body, headers)
        assert (status, said["x-ratelimit-limit-requests"], said["x-ratelimit-remaining-requests"]) == (
            200,
            "600",
            "599",
        )


async def test_postgresql_and_redis_are_used_as_shown(tmp_path):
    """The lines of that section, with a real Redis and PostgreSQL: tables, a key, a request, its row."""
    (tmp_path / "my.yaml").write_text(my_yaml(limits=True, services=True))
    (tmp_path / "long_prompts.py").write_text(blocks(README, "python")[0])
    with valkey_server() as valkey, postgres_server() as postgres:
        env = {"XENIOS_REDIS_URL": valkey.url, "XENIOS_DATABASE_URL": await postgres.new()}
        told = commands("PostgreSQL, Redis and several processes", "export ")
        assert {line.split()[1].partition("=")[0] for line in told} == env.keys()
        upgrade, serve = commands("PostgreSQL, Redis and several processes", "xenios ")
        assert serve == "xenios serve --config my.yaml"
        assert "usage" in typed(tmp_path, upgrade, **env)
        async with serving_beside(tmp_path, "--config", "my.yaml", env=env) as gateway:
            created = await asyncio.to_thread(typed, tmp_path, commands("A key for a colleague", "xenios ")[0], **env)
            key = re.search(r"^key: +(\S+)", created, re.MULTILINE)[1]
            reply = await asyncio.to_thread(gateway.chat, "task/summary", key=key)
            assert (reply.status, reply.headers["x-ratelimit-remaining-requests"]) == (200, "59")
            async with asyncio.timeout(10):
                path = f"/v1/usage/{reply.headers['x-request-id']}"
                while (row := await asyncio.to_thread(gateway.request, "GET", path, key=key)).status != 200:
                    await asyncio.sleep(0.05)
            assert (row.data["key"], row.data["task"], row.data["outcome"]) == ("key:ada", "summary", "ok")
        connection = await asyncpg.connect(env["XENIOS_DATABASE_URL"])
        assert await connection.fetchval("SELECT count(*) FROM usage_requests") == 1
        await connection.close()


def test_the_anthropic_lines_work_as_pasted(followed):
    """The Anthropic client gets its answer from the alias."""
    gateway, *_ = followed
    code = blocks(README, "python")[1].replace("http://127.0.0.1:8080", gateway.url)
    env = {**plain_environment(), "XENIOS_KEY": gateway.key}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert "simulated answer" in done.stdout, done.stderr


def test_the_shown_banner_is_the_real_one(followed):
    """What README says that `make run` prints is what a fresh gateway prints, but for key and port."""
    gateway, *_ = followed
    shown, port = blocks(README, "text")[0], gateway.url.rpartition(":")[2]
    printed = "\n".join(gateway.banner).replace(gateway.key, "sk-xenios-…").replace(f":{port}", ":8080")
    # `my.yaml` has no task called chat
    printed = printed.replace("model='anthropic/claude-haiku-4.5'", "model='task/chat'")
    assert printed.strip() == shown.strip()


def test_the_first_screen_holds_both_commands():
    """Whoever opens the page sees what it is, why, and how to start, without scrolling."""
    head = "\n".join(README.read_text().splitlines()[:40])
    for needed in ("make run", "make test", "Why not", "plugin", "OpenRouter"):
        assert needed in head


def test_the_endpoint_table_is_the_route_table():
    """Each route that the gateway has by itself is in README, and nothing else is."""
    router = Router(DIALECTS, PLAIN_DIALECT)
    add_core_routes(router, Health(lambda: False))
    add_admin_routes(router, lambda: None, 1)
    real = {r.path.replace("{id:.+}", "{id}") for r in router.table().routes if not r.path.startswith("/api/")}
    text = README.read_text().partition("## Endpoints")[2].partition("\n## ")[0]
    told = set(re.findall(r"`(/[^`]+)`", text)) - {"/v1", "/api/v1"}
    of_plugins = {"/v1/usage", "/v1/usage/{id}", "/admin/keys", "/admin/audit", "/admin/usage", "/admin/targets"}
    of_plugins |= {"/v1/jobs", "/v1/responses/{id}", "/v1/files", "/v1/batches", "/v1/webhook_endpoints"}
    assert told - of_plugins == real
    assert of_plugins < told
    streams = {d.endpoint for d in DIALECTS.values() if d.grammar is not None}
    assert {m[1] for m in re.finditer(r"^\| POST `/v1/([^`]+)`.*\| yes \|$", text, re.MULTILINE)} == streams


# --- plugins/README.md -----------------------------------------------------------------------------------------------


def test_every_hook_is_in_the_table_with_its_arguments():
    """The table names each hook once, with its colour and arguments, in the order of the contract."""
    rows = re.findall(r"^\| `(async )?(\w+)\(([^)]*)\)` \|", PLUGINS.read_text(), re.MULTILINE)
    assert [name for _, name, _ in rows] == list(HOOKS_IN_ORDER)
    for colour, name, arguments in rows:
        code = HOOKS[name].__code__
        assert bool(colour) is bool(code.co_flags & 0x80), name  # CO_COROUTINE
        assert arguments == ", ".join(code.co_varnames[1 : code.co_argcount]), name


HOOKS_IN_ORDER = sorted(HOOKS, key=lambda name: HOOKS[name].__code__.co_firstlineno)


def own_plugins():
    return {name: point for name, point in installed().items() if point.dist and point.dist.name == "xenios"}


# Conditions have a table in config/README.md, provider preferences one at OpenRouter.
TOLD_ELSEWHERE = {"When", "TokenRange", "TimeWindow", "Provider", "MaxPrice", "Sort"}


def test_every_condition_is_explained():
    told = (ROOT / "config" / "README.md").read_text().partition("## Conditions")[2]
    for field in When.model_fields:
        assert f"`{field}`" in told, field


@pytest.mark.parametrize("name", sorted(own_plugins()))
def test_every_built_in_plugin_is_in_the_table_with_its_settings(name):
    """Its row names each of its settings, and each field of what these hold."""
    [row] = re.findall(rf"^\| \[`{name}`\].*$", PLUGINS.read_text(), re.MULTILINE)
    schema = load(name, Path())[0].Config.model_json_schema()
    models = [schema, *(model for name, model in schema.get("$defs", {}).items() if name not in TOLD_ELSEWHERE)]
    for field in {field for model in models for field in model.get("properties", {})}:
        assert f"`{field}`" in row, field


def example(code):
    """What a block defines. It doesn't inherit this file's `from __future__`, as a reader's file does not."""
    names = {"__name__": "example"}
    exec(compile(code, "plugins/README.md", "exec", dont_inherit=True), names)
    return names


PLUGIN_BLOCKS = [block for block in blocks(PLUGINS, "python") if "class Plugin" in block]


@pytest.mark.parametrize("code", PLUGIN_BLOCKS, ids=range(len(PLUGIN_BLOCKS)))
async def test_every_example_plugin_serves(code):
    """Each plugin of the page is accepted at start-up and leaves chats answered, whole and streamed."""
    cls = example(code)["Plugin"]
    assert faults_of(cls) == []
    async with Gateway.test(plugins=["api_keys", cls]) as gw:
        assert (await gw.chat()).status == 200
        assert (await gw.chat(stream=True)).body.endswith(b"data: [DONE]\n\n")
        assert (await gw.get("/health/ready")).status == 200


async def test_the_example_tap_shouts():
    """The tap of the page does what it says."""
    [code] = [block for block in PLUGIN_BLOCKS if "open_tap" in block]
    async with Gateway.test(plugins=["api_keys", example(code)["Plugin"]]) as gw:
        reply = await gw.chat(stream=True)
    text = "".join(json.loads(e[6:])["choices"][0]["delta"].get("content", "") for e in reply.events[:-1])
    assert text
    assert text == text.upper()


async def test_the_example_routes_answer():
    """A plugin's route reaches a model through the pipeline; the admin route asks for an admin."""
    [code] = [block for block in PLUGIN_BLOCKS if "/v1/translate" in block]
    async with Gateway.test(plugins=["api_keys", example(code)["Plugin"]]) as gw:
        translated = await gw.post("/v1/translate", {"text": "Bonjour"})
        status = await gw.get("/admin/catalogue")
        asked = gw.upstream.seen[0].model
    assert (translated.status, status.status, asked) == (200, 200, "fast")
    assert translated.data["choices"]


async def test_the_example_of_long_bodies_works():
    """What is uploaded is summed piece by piece; what is counted comes as events."""
    [code] = [block for block in PLUGIN_BLOCKS if "upload()" in block]
    async with Gateway.test(plugins=["api_keys", example(code)["Plugin"]]) as gw:
        reply = await gw.request("POST", "/v1/sums", data=b"abc")
        assert reply.data["sha256"] == hashlib.sha256(b"abc").hexdigest()
        assert (await gw.get("/v1/numbers")).events == [b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n"]


async def test_the_example_of_late_work_works():
    """What was taken is answered later, to whoever asks for it then."""
    [code] = [block for block in PLUGIN_BLOCKS if "takes_jobs" in block]
    async with Gateway.test(plugins=["api_keys", example(code)["Plugin"]]) as gw:
        body = {"model": "test/model", "messages": []}
        assert (await gw.post("/v1/chat/completions", body, headers={"X-Later": "1"})).data == {"waiting": 1}
        keeper = Keeper()
        exchange = await gw.plugin("Plugin").work(keeper)
        assert (exchange.phase, exchange.id, keeper.status) == ("run", "job-1-try-1", 200)


def test_the_example_test_passes(tmp_path):
    """The plugin and the test at the page's top work as they are copied."""
    plugin, test = blocks(PLUGINS, "python")[:2]
    (tmp_path / "long_prompts.py").write_text(plugin)
    (tmp_path / "test_long_prompts.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-o", "asyncio_mode=auto", "-p", "no:cacheprovider", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_what_may_be_imported_exists():
    """The examples import from the public surface only."""
    for block in [*blocks(PLUGINS, "python"), *blocks(README, "python")]:
        for module in re.findall(r"^(?:from|import) (gateway[\w.]*)", block, re.MULTILINE):
            assert module in {"gateway", "gateway.kit", "gateway.kit.testing", "gateway.kit.upstream"}


# --- gateway/README.md ----------------------------------------------------------------------------------------------


def test_every_file_of_the_core_is_on_the_map():
    """The map's table has each module and each folder of gateway/, and no other."""
    rows = re.findall(r"^\| \[`([^`]+)`\]\(", MAP.read_text(), re.MULTILINE)
    folders = {f"{p.name}/" for p in (ROOT / "gateway").iterdir() if p.is_dir() and list(p.glob("*.py"))}
    assert sorted(rows) == sorted({p.name for p in (ROOT / "gateway").glob("*.py")} | folders)


def test_what_stops_each_threat_is_tested():
    """The tests that the threat model names are there, and the promises too."""
    text = (ROOT / "THREAT_MODEL.md").read_text()
    named = re.findall(r"`(\w+/test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 30
    for file, test in named:
        source = (ROOT / "tests" / file).read_text()
        assert not test or f"def {test}(" in source, (file, test)
    promises = tomllib.loads((ROOT / "tests" / "promises.toml").read_text())
    assert set(re.findall(r"the promise (P\d+)", text)) <= set(promises)


def test_every_outcome_is_explained():
    """An outcome in a log line is found in the table."""
    table = MAP.read_text().partition("## What becomes of an exchange")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(Outcome)


def test_every_test_folder_is_explained():
    """tests/README.md has a row for each folder."""
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and p.name[0] not in "_."}
    assert folders == set(re.findall(r"^\| \[`(\w+)/`\]", (ROOT / "tests" / "README.md").read_text(), re.MULTILINE))


def test_the_reply_headers_are_explained():
    """Each x-xenios header that the core sends is in README."""
    source = "".join(p.read_text() for p in (ROOT / "gateway").glob("*.py"))
    sent = set(re.findall(r"[\"'](x-xenios-[a-z]+)[\"']", source)) - {"x-xenios-task"}
    table = README.read_text().partition("## What each reply says")[2]
    assert {header for header in sent if f"`{header}`" not in table} == set()


def test_each_plugin_shows_its_hooks():
    """`xenios plugins` has something to show for each built-in plugin."""
    assert all(hooks_of(load(name, Path())[0]) for name in own_plugins())
