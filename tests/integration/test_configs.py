"""Every configuration that we ship, started as a real process; and its schema."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gateway.kit import hash_key, new_key
from gateway.kit.upstream import Error, Json, ScriptedUpstream, chat_completion
from tests.integration.collector import Collector
from tests.integration.process import CONFIG, Running, serving, serving_beside

FILES = sorted([*CONFIG.glob("*.yaml"), *CONFIG.glob("examples/*.yaml")])
PEPPER = "0123456789abcdef"
ADMIN, APP = new_key(), new_key()
PRODUCTION = {
    "OPENROUTER_API_KEY": "sk-or-test",
    "XENIOS_PEPPER": PEPPER,
    "XENIOS_ADMIN_KEY": ADMIN,
    "XENIOS_APP_KEY": APP,
}
BEST = ["anthropic/claude-opus-4.5", "anthropic/claude-opus-4.6", "anthropic/claude-sonnet-4.6"]
QUICK = ["anthropic/claude-sonnet-4", "anthropic/claude-sonnet-4.6", "anthropic/claude-haiku-4.5"]
TASKS = {
    "chat": BEST,
    "session_summary": BEST,
    "insight_generation": BEST,
    "intent_classification": QUICK,
    "entity_extraction": QUICK,
    "structured_extraction": QUICK,
    "document_analysis": BEST,
    "session_analysis": BEST,
}


def copied(folder: Path, name: str, upstream: str | None = None) -> Path:
    """The shipped file, and what stands beside it, in a folder of the test; `upstream`: asked instead of OpenRouter."""
    shutil.copytree(CONFIG, folder / "config", dirs_exist_ok=True)
    path = folder / "config" / name
    if upstream is not None:
        text, count = re.subn(r"(  openrouter:\n)", rf"\1    base_url: {upstream}\n", path.read_text())
        assert count == 1
        # the upstream of the tests lists other models than are asked for here
        path.write_text(text + ("" if "\ncatalogue:" in text else "\ncatalogue: {refresh: 0}\n"))
    return path


def gone(model: str) -> Error:
    """What OpenRouter says of a model that it has no more."""
    return Error(400, message=f"{model} is not a valid model ID", metadata={"error_type": "invalid_request"})


# --- the schema -------------------------------------------------------------------------------------------


class _Plain(yaml.SafeLoader):
    """As JSON has it: dates stay text."""


_Plain.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((CONFIG / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def mistakes(validator: jsonschema.Draft202012Validator, text: str) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(yaml.load(text, _Plain))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_editor_finds_no_mistake(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    """The first line of each file points editors to the schema, and the file satisfies it."""
    text = path.read_text()
    found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert found is not None
    assert (path.parent / found[1]).resolve() == CONFIG / "schema.json"
    assert mistakes(validator, text) == []


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("server: {prot: 1}", "$.server"),
        ("server: {port: eighty}", "$.server.port"),
        ("server: {max_body: plenty}", "$.server.max_body"),
        ("upstreams: {openrouter: {without_key: simulat}}", "$.upstreams.openrouter.without_key"),
        ("plugins: [{config: {}}]", "$.plugins[0]"),
        ("plugins: [{use: fallback, config: {max_attempts: 0}}]", "$.plugins[0].config.max_attempts"),
        ("plugins: [{use: access_log, config: {file: x}}]", "$.plugins[0].config"),
    ],
)
def test_an_editor_finds_a_mistake(text: str, where: str, validator: jsonschema.Draft202012Validator) -> None:
    """The schema is strict: keys, units, words and the settings of each plugin."""
    found = mistakes(validator, text)
    assert found
    assert all(message.startswith(f"{where}: ") for message in found)


# --- each file, started -----------------------------------------------------------------------------------


def test_all_are_here() -> None:
    """A file that is added to config/ gets a test here."""
    assert [path.relative_to(CONFIG).as_posix() for path in FILES] == [
        "examples/limits.yaml",
        "examples/openai_compatible.yaml",
        "examples/passthrough.yaml",
        "examples/routing_rules.yaml",
        "examples/single_file_plugin.yaml",
        "examples/tasks_and_aliases.yaml",
        "examples/team_keys.yaml",
        "examples/tokens.yaml",
        "examples/tracing.yaml",
        "production.yaml",
        "xenios.yaml",
    ]


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("default"), "--config", CONFIG / "xenios.yaml") as running:
        yield running


def test_default_answers(default: Running) -> None:
    """config/xenios.yaml as it is: simulated answers for whoever has the key, 401 for others."""
    reply = default.chat("anthropic/claude-haiku-4.5")
    assert (reply.status, reply.headers["x-xenios-simulated"]) == (200, "1")
    assert reply.headers["x-xenios-model"] == "anthropic/claude-haiku-4.5"
    assert default.chat("anthropic/claude-haiku-4.5", key=None).status == 401


@pytest.mark.parametrize(("task", "models"), TASKS.items())
def test_default_routes_tasks(task: str, models: list[str], default: Running) -> None:
    """A task is answered by the model that it is meant for, by header and by name; all successors exist too."""
    by_name = default.chat(f"task/{task}")
    by_header = default.chat("whatever", headers={"X-Xenios-Task": task})
    for reply in (by_name, by_header):
        assert (reply.status, reply.headers["x-xenios-model"]) == (200, models[0])
    for model in models:
        assert default.request("GET", f"/v1/models/{model}").status == 200, model


@pytest.mark.parametrize(
    ("asked", "model"),
    [
        ("smart", "anthropic/claude-opus-4.6"),
        ("fast", "anthropic/claude-haiku-4.5"),
        ("gpt-3.5-turbo-0125", "openai/gpt-4.1-mini"),
    ],
)
def test_default_aliases_and_rules(asked: str, model: str, default: Running) -> None:
    """The names that the file defines answer."""
    assert default.chat(asked).headers["x-xenios-model"] == model


def test_default_logs(default: Running) -> None:
    """Its access log holds a line for a request, without the prompt and the key."""
    reply = default.chat("fast", headers={"X-Request-Id": "a-request-of-this-test"})
    assert reply.status == 200
    log = default.folder / "access.log"
    lines: list[str] = []
    with log.open() as file:
        for _ in range(2000):
            lines += [line for line in file if "a-request-of-this-test" in line and line.endswith("\n")]
            if lines:
                break
            default.request("GET", "/health/live", key=None)  # lines are written 50 ms late at most
    [line] = lines
    entry = json.loads(line)
    assert (entry["model_asked"], entry["model_served"]) == ("fast", "anthropic/claude-haiku-4.5")
    assert "Hello" not in line
    assert default.key not in line


@pytest.mark.parametrize("name", ["xenios.yaml", "production.yaml"])
async def test_a_task_outlives_its_first_model(name: str, tmp_path: Path) -> None:
    """When the upstream refuses the first model of a task as gone, the next answers, and the reply names it."""
    first = [BEST[0], QUICK[0]]
    async with ScriptedUpstream(default=lambda seen: Json(chat_completion(model=seen.model or ""))) as upstream:
        for model in first:
            upstream.on(model, gone(model))
        path = copied(tmp_path, name, upstream.url)
        env = {**PRODUCTION, "XENIOS_DATA_DIR": str(tmp_path / "data")}
        async with serving_beside(tmp_path, "--config", path, "--host", "127.0.0.1", env=env) as running:
            key = running.key or APP
            for task, models in TASKS.items():
                reply = await _thread(running.chat, f"task/{task}", key=key)
                assert (reply.status, reply.headers["x-xenios-model"]) == (200, models[1]), task
                assert reply.headers["x-xenios-attempts"] == "2"
                assert "x-xenios-simulated" not in reply.headers
            upstream.on(BEST[1], Error(503))
            reply = await _thread(running.chat, "task/chat", key=key)
            assert (reply.headers["x-xenios-model"], reply.headers["x-xenios-attempts"]) == (BEST[2], "3")


def test_default_goes_on_without_a_tasks_first_model(tmp_path: Path) -> None:
    """config/xenios.yaml in front of the simulation: where the first model is gone (404) or unknown, the next answers."""
    path = copied(tmp_path, "xenios.yaml")
    text = path.read_text()
    assert (text.count(f"[{BEST[0]}, "), text.count(f"[{QUICK[0]}, ")) == (5, 3)
    text = text.replace(f"[{BEST[0]}, ", "[xenios/sim-fail-404, ").replace(f"[{QUICK[0]}, ", "[anthropic/claude-gone, ")
    path.write_text(text)
    with serving(tmp_path, "--config", path) as running:
        for task, models in TASKS.items():
            for reply in (running.chat(f"task/{task}"), running.chat("any", headers={"X-Xenios-Task": task})):
                assert (reply.status, reply.headers["x-xenios-model"]) == (200, models[1]), task
                assert (reply.headers["x-xenios-attempts"], reply.headers["x-xenios-simulated"]) == ("2", "1")


async def _thread(function: Any, *args: Any, **kwargs: Any) -> Any:
    return await asyncio.to_thread(function, *args, **kwargs)


async def test_production(tmp_path: Path) -> None:
    """production.yaml: the keys of its variables alone, each within its scopes, and what the operator set wins."""
    async with ScriptedUpstream() as upstream:
        path = copied(tmp_path, "production.yaml", upstream.url)
        env = {**PRODUCTION, "XENIOS_DATA_DIR": str(tmp_path / "data")}
        async with serving_beside(tmp_path, "--config", path, "--host", "127.0.0.1", env=env) as running:
            assert running.key is None
            assert not list((tmp_path / "data").rglob("bootstrap_key"))
            for secret in (*PRODUCTION.values(),):
                assert secret not in running.banner
            body = {
                "model": "fast",
                "messages": [{"role": "user", "content": "Hello"}],
                "models": ["openai/o3"],
                "provider": {"data_collection": "allow", "sort": "price"},
            }
            reply = await _thread(running.request, "POST", "/v1/chat/completions", body, key=APP)
            assert reply.status == 200
            sent = [seen for seen in upstream.seen if seen.method == "POST"][-1]
            assert sent.json["model"] == "anthropic/claude-haiku-4.5"
            assert "models" not in sent.json
            # its key has a budget: whoever serves it, for the list price
            ceiling = {"max_price": {"prompt": 1.0, "completion": 5.0}}
            assert sent.json["provider"] == {"data_collection": "deny", "sort": "price", **ceiling}
            assert sent.headers["authorization"] == "Bearer sk-or-test"
            assert (await _thread(running.chat, "openai/o3", key=APP)).status == 404
            assert (await _thread(running.chat, "openai/o3", key=ADMIN)).status == 200
            embed = {"model": "fast", "input": "x"}
            assert (await _thread(running.request, "POST", "/v1/embeddings", embed, key=APP)).status == 403
            assert (await _thread(running.chat, "fast", key=None)).status == 401


def test_passthrough(tmp_path: Path) -> None:
    """examples/passthrough.yaml: no key is asked for, and what was asked for is what answers."""
    with serving(tmp_path, "--config", CONFIG / "examples" / "passthrough.yaml") as running:
        reply = running.chat("openai/gpt-5-mini", key=None)
        assert (reply.status, reply.headers["x-xenios-model"]) == (200, "openai/gpt-5-mini")
        assert running.chat("task/chat", key=None).status == 404


async def test_openai_compatible(tmp_path: Path) -> None:
    """examples/openai_compatible.yaml: its models are asked for there; `summary` goes on at OpenRouter, `private` not."""
    async with ScriptedUpstream() as local:
        env = {"LOCAL_LLM_URL": local.url}
        path = CONFIG / "examples" / "openai_compatible.yaml"
        async with serving_beside(tmp_path, "--config", path, env=env) as running:
            for asked, model in {"private": "llama3.3", "qwen3:8b": "qwen3:8b", "summary": "llama3.3"}.items():
                reply = await _thread(running.chat, asked)
                assert (reply.status, reply.headers["x-xenios-model"]) == (200, model)
                assert [seen.model for seen in local.seen if seen.method == "POST"][-1] == model
            remote = await _thread(running.chat, "openai/gpt-5-mini")
            assert remote.headers["x-xenios-simulated"] == "1"
            assert "openai/gpt-5-mini" not in [seen.model for seen in local.seen]
            await local.close()
            reply = await _thread(running.chat, "summary")
            assert (reply.status, reply.headers["x-xenios-model"]) == (200, "meta-llama/llama-3.3-70b-instruct")
            assert (await _thread(running.chat, "private")).status == 502


def test_single_file_plugin(tmp_path: Path) -> None:
    """examples/single_file_plugin.yaml: the file beside it is a plugin with the rights of ours."""
    with serving(tmp_path, "--config", copied(tmp_path, "examples/single_file_plugin.yaml")) as running:
        assert running.chat("openai/gpt-5-mini").status == 200
        body = {"model": "openai/gpt-5-mini", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2001}
        reply = running.request("POST", "/v1/chat/completions", body)
        assert (reply.status, reply.data["error"]["message"]) == (
            400,
            "At most 2000 tokens of output may be asked for.",
        )
        assert running.request("POST", "/v1/chat/completions", {**body, "max_tokens": 2000}).status == 200


async def test_tasks_and_aliases(tmp_path: Path) -> None:
    """examples/tasks_and_aliases.yaml: names, defaults, parameters per model and fallbacks reach the upstream."""
    async with ScriptedUpstream() as upstream:
        path = copied(tmp_path, "examples/tasks_and_aliases.yaml", upstream.url)
        env = {"OPENROUTER_API_KEY": "sk-or-test"}
        async with serving_beside(tmp_path, "--config", path, env=env) as running:

            async def sent(model: str, **fields: Any) -> dict[str, Any]:
                body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], **fields}
                reply = await _thread(running.request, "POST", "/v1/chat/completions", body)
                assert reply.status == 200
                return [seen.json for seen in upstream.seen if seen.method == "POST"][-1]

            support = await sent("task/support")
            assert (support["model"], support["temperature"]) == ("anthropic/claude-sonnet-4.6", 0.3)
            assert (await sent("task/support", temperature=1))["temperature"] == 1
            labels = await sent("task/labels", temperature=1)
            assert (labels["model"], labels["reasoning_effort"]) == ("openai/gpt-5-nano", "minimal")
            assert "temperature" not in labels
            assert (await sent("gpt-4-0613"))["model"] == "openai/gpt-4.1-mini"
            assert (await sent("openai/gpt-4o"))["model"] == "openai/gpt-4o"
            upstream.on("openai/gpt-4o", Error(503))
            assert (await sent("openai/gpt-4o"))["model"] == "openai/gpt-4.1"


async def test_routing_rules(tmp_path: Path) -> None:
    """examples/routing_rules.yaml: each rule does over the wire what its comment says."""
    async with ScriptedUpstream() as upstream:
        path = copied(tmp_path, "examples/routing_rules.yaml", upstream.url)
        env = {"OPENROUTER_API_KEY": "sk-or-test"}
        async with serving_beside(tmp_path, "--config", path, env=env) as running:

            async def sent(
                model: str, headers: dict[str, str] | None = None, **fields: Any
            ) -> tuple[str, dict[str, Any]]:
                """(the rule that the reply names, what went upstream)"""
                body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], **fields}
                reply = await _thread(running.request, "POST", "/v1/chat/completions", body, headers=headers)
                assert reply.status == 200, reply.body
                return reply.headers.get("x-xenios-rule", ""), [s.json for s in upstream.seen if s.method == "POST"][-1]

            long = [{"role": "user", "content": "word " * 130_000}]
            rule, body = await sent("task/summary", messages=long)
            assert (rule, body["model"], body["temperature"]) == ("long-summaries", "anthropic/claude-sonnet-4.5", 0.2)
            rule, body = await sent("task/summary")
            assert (rule, body["model"]) == ("", "anthropic/claude-haiku-4.5")
            picture = [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}]}
            ]
            rule, body = await sent("smart", messages=picture, max_tokens=1000)
            assert (rule, body["model"]) == ("pictures", "google/gemini-2.5-pro")
            rule, body = await sent("smart", messages=picture, max_tokens=50_000)
            assert (rule, body["model"]) == ("pictures", "google/gemini-2.5-flash")
            sides = set()
            for number in range(40):
                rule, body = await sent("smart", user=f"user-{number}")
                sides.add(body["model"])
                assert rule == "canary"
            assert sides == {"anthropic/claude-opus-4.5", "anthropic/claude-opus-4.6"}
            rule, body = await sent(
                "openai/gpt-5-mini",
                {"User-Agent": "agent-7"},
                stream=True,
                tools=[{"type": "function", "function": {"name": "f"}}],
            )
            assert (rule, body["model"], body["parallel_tool_calls"]) == (
                "streams-of-agents",
                "openai/gpt-5-mini",
                False,
            )
            _, body = await sent("task/sentiment", temperature=1)
            assert body["response_format"]["json_schema"]["name"] == "sentiment"
            assert "temperature" not in body
            assert (await sent("task/contract_review"))[0] == "canary"


def test_team_keys(tmp_path: Path) -> None:
    """examples/team_keys.yaml: each key may do what stands there and nothing else; the rest does not exist for it."""
    path = copied(tmp_path, "examples/team_keys.yaml")
    keys = {digit: new_key() for digit in "123"}
    text = path.read_text()
    for digit, key in keys.items():
        text = text.replace(f"hmac-sha256:{digit * 64}", hash_key(key, PEPPER))
    path.write_text(f"{text}server: {{pepper: '{PEPPER}'}}\n")
    research, bot, search = keys.values()
    with serving(tmp_path, "--config", path) as running:
        assert running.chat("anthropic/claude-haiku-4.5", key=research).status == 200
        assert running.chat("smart", key=research).status == 200
        assert running.chat("google/gemini-2.5-pro", key=research).status == 404
        assert running.chat("task/support", key=bot).status == 200
        assert running.chat("anthropic/claude-sonnet-4.6", key=bot).status == 404
        assert running.chat("openai/gpt-5-mini", key=search).status == 403
        embed = {"model": "openai/text-embedding-3-small", "input": "x"}
        assert running.request("POST", "/v1/embeddings", embed, key=search).status == 200
        assert running.request("POST", "/v1/embeddings", embed, key=bot).status == 403


def test_limits(tmp_path: Path) -> None:
    """examples/limits.yaml: replies say what is left, and a dear model's fourth request at once is refused."""
    with serving(tmp_path, "--config", copied(tmp_path, "examples/limits.yaml")) as running:
        reply = running.chat("anthropic/claude-haiku-4.5")
        assert reply.status == 200
        assert reply.headers["x-ratelimit-limit-requests"] == "60"
        assert int(reply.headers["x-ratelimit-remaining-tokens"]) < 200_000
        body = {"model": "anthropic/claude-opus-4.6", "max_tokens": 10, "messages": [{"role": "user", "content": "Hi"}]}
        dear = [running.request("POST", "/v1/chat/completions", body) for _ in range(4)]
        assert [r.status for r in dear] == [200, 200, 200, 429]
        body["max_tokens"] = 100_000
        body["model"] = "anthropic/claude-sonnet-4.6"
        spent = running.request("POST", "/v1/chat/completions", body)
        assert (spent.status, spent.data["error"]["code"]) == (429, "insufficient_quota")
        assert "(user)" in spent.data["error"]["message"]


async def test_tracing(tmp_path: Path) -> None:
    """examples/tracing.yaml: a request of a sampled trace is told to the collector, a health check never."""
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with Collector() as collector:
        path = CONFIG / "examples" / "tracing.yaml"
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}"}
        async with serving_beside(tmp_path, "--config", path, env=env) as running:
            headers = {"traceparent": parent}
            assert (await _thread(running.request, "GET", "/health", headers=headers)).status == 200
            assert (await _thread(running.chat, "openai/gpt-5-mini", headers=headers)).status == 200
        server, attempt = await collector.received(2)
        assert (server.name, attempt.name) == ("POST /v1/chat/completions", "chat openai/gpt-5-mini")
        assert attempt.attributes["xenios.simulated"] is True
        assert server.resource["deployment.environment.name"] == "production"
        assert len(collector.spans) == 2
