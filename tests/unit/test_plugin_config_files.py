from pathlib import Path

import pytest
from plugin_objects import exchange, services

from gateway import BadRequest, Decision, ModelNotFound, Principal, Target
from gateway.access import check_models
from gateway.kit import new_key
from gateway.plugins import compile_hooks, construct, read_plugins
from gateway.settings import load

CONFIG = Path(__file__).parents[2] / "config"
FILES = sorted([*CONFIG.glob("*.yaml"), *CONFIG.glob("examples/*.yaml")])
APP_KEY = new_key()
PRODUCTION = {
    "OPENROUTER_API_KEY": "sk-or-canary",
    "XENIOS_PEPPER": "0123456789abcdef",
    "XENIOS_ADMIN_KEY": new_key(),
    "XENIOS_APP_KEY": APP_KEY,
}


def start(path, env, monkeypatch):
    """The file's settings and its plugins, constructed and compiled as at start-up."""
    for name in PRODUCTION:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    loaded = load(path)
    instances = construct(read_plugins(loaded.settings, loaded.source), services(settings=loaded.settings))
    return loaded.settings, {i.id: i.plugin for i in instances}, compile_hooks(instances)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_that_we_ship_starts(path, monkeypatch):
    """Each file works as it is; only production.yaml needs variables, and those that its head names are enough."""
    assert path.read_text().startswith("# yaml-language-server: $schema=")
    start(path, PRODUCTION if path.stem == "production" else {}, monkeypatch)


def test_all_files_are_there():
    """One default, one for production and five examples."""
    assert [p.stem for p in FILES] == [
        "limits", "openai_compatible", "passthrough", "routing_rules", "single_file_plugin", "tasks_and_aliases", "team_keys", "tokens", "tracing", "production", "xenios",
    ]  # fmt: skip


def test_the_shipped_order(monkeypatch):
    """Whoever observes stands outermost: the order of the default's calls."""
    _, _, hooks = start(CONFIG / "xenios.yaml", {}, monkeypatch)
    assert {hook: plugins for hook, plugins in hooks.order().items() if plugins} == {
        "register_routes": ["metrics", "api_keys", "usage", "jobs", "fallback"],
        "register_commands": ["api_keys", "usage", "jobs"],
        "request_received": ["usage"],
        "authenticate": ["api_keys"],
        "restore_principal": ["api_keys"],
        "prepare_request": ["jobs"],
        "choose_targets": ["routing"],
        "check_request": ["rate_limit", "budgets"],
        "lookup_response": ["jobs"],
        "around_upstream": ["fallback"],
        "attempt_finished": ["fallback"],
        "response_started": ["rate_limit"],
        "request_finished": ["budgets", "metrics", "access_log"],
        "usage_corrected": ["budgets", "usage"],
        "explain": ["api_keys", "routing", "rate_limit", "budgets", "usage", "fallback"],
    }


@pytest.mark.parametrize("path", ["xenios.yaml", "production.yaml"])
@pytest.mark.parametrize(
    "task, model",
    [
        ("chat", "anthropic/claude-opus-4.5"),
        ("session_summary", "anthropic/claude-opus-4.5"),
        ("insight_generation", "anthropic/claude-opus-4.5"),
        ("intent_classification", "anthropic/claude-sonnet-4"),
        ("entity_extraction", "anthropic/claude-sonnet-4"),
        ("structured_extraction", "anthropic/claude-sonnet-4"),
        ("document_analysis", "anthropic/claude-opus-4.5"),
        ("session_analysis", "anthropic/claude-opus-4.5"),
    ],
)
async def test_tasks_have_their_models_and_successors(path, task, model, monkeypatch):
    """Each task is asked of the model it is meant for, and outlives that model's retirement."""
    _, plugins, _ = start(CONFIG / path, PRODUCTION, monkeypatch)
    decision = await plugins["routing"].choose_targets(exchange({"model": f"task/{task}"}))
    assert decision.targets[0].model == model
    assert len(decision.targets) == 3


async def test_production_is_closed(monkeypatch):
    """In production nothing is simulated, no bootstrap key exists, and an application has its names alone."""
    settings, plugins, _ = start(CONFIG / "production.yaml", PRODUCTION, monkeypatch)
    assert not settings.server.bootstrap_key
    assert settings.upstream.client_may == ("provider",)
    assert {u.without_key for u in settings.upstreams.values()} == {"fail"}
    app = await plugins["api_keys"].authenticate(exchange(bearer=APP_KEY))
    assert not app.admin
    for model in ("smart", "task/chat"):
        asked = exchange({"model": model}, principal=app)
        check_models(asked, await plugins["routing"].choose_targets(asked))
    with pytest.raises(ModelNotFound):
        check_models(
            exchange({"model": "openai/o3"}, principal=app), Decision("openai/o3", (Target("openai/o3", "openrouter"),))
        )


async def test_a_plugin_in_one_file_works(monkeypatch):
    """The example plugin does what its file says."""
    _, plugins, _ = start(CONFIG / "examples" / "single_file_plugin.yaml", {}, monkeypatch)
    rules = plugins["house_rules"]
    asked = exchange({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}, principal=Principal("a"))
    await rules.prepare_request(asked)
    assert asked.body["messages"][0] == {"role": "system", "content": "Answer in British English."}
    with pytest.raises(BadRequest, match="At most 2000"):
        await rules.prepare_request(exchange({"model": "m", "messages": [], "max_tokens": 2001}))
