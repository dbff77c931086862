"""`xenios explain` as a user has it: a real process, with and without a running gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.kit import hash_key, new_key
from tests.integration.process import Running, serving, xenios

ADA = new_key()
PEPPER = "0123456789abcdef"
BODY = {"model": "smart", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}
CONFIG = f"""
upstreams: {{openrouter: {{without_key: simulate}}}}
server: {{pepper: {PEPPER}}}
services: {{database: {{url: sqlite, migrate_on_start: true}}}}
plugins:
  - use: api_keys
    config:
      database: true
      keys: [{{id: ada, hash: "{hash_key(ADA, PEPPER)}", team: blue, aliases: [smart], endpoints: [chat/*]}}]
  - use: routing
    config:
      aliases: {{smart: [anthropic/claude-opus-4.6, anthropic/claude-haiku-4.5], dear: openai/gpt-5}}
      tasks: {{summary: {{use: anthropic/claude-haiku-4.5}}}}
  - use: fallback
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.yaml").write_text(CONFIG)
    (tmp_path / "request.json").write_text(json.dumps(BODY))
    return tmp_path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("explain")
    (folder / "own.yaml").write_text(CONFIG)
    (folder / "request.json").write_text(json.dumps(BODY))
    with serving(folder, "-c", "own.yaml") as gateway:
        yield gateway


def explain(folder: Path, *args: str, key: str | None = None, stdin: str = "") -> str:
    done = xenios("explain", *args, cwd=folder, env={"XENIOS_KEY": key}, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(folder: Path, *args: str, code: int, key: str | None = None) -> str:
    done = xenios("explain", *args, cwd=folder, env={"XENIOS_KEY": key})
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    return done.stderr


def test_an_empty_folder_is_enough(tmp_path: Path) -> None:
    """The configuration that is built in answers, from standard input too, and nothing is left behind."""
    said = explain(tmp_path, "-", "--header", "X-Xenios-Task: chat", stdin=json.dumps(BODY))
    assert "  task chat\n" in said
    assert (
        "  1. openrouter/anthropic/claude-opus-4.5  5 / 25 USD per million tokens, context 200,000, at most 0.0" in said
    )
    assert "  choose_targets     routing\n" in said
    assert "ask it by --url" in said
    assert list(tmp_path.iterdir()) == []


def test_in_the_name_of_a_key(folder: Path) -> None:
    """With `--as` scopes and limits are those of a key of the YAML; a refusal is told with its code, and is no failure."""
    allowed = explain(folder, "request.json", "-c", "own.yaml", "--as", "ada")
    assert allowed.startswith(
        "chat/completions, smart, as key:ada (tenant ada, team blue)\n\nGoes to anthropic/claude-opus"
    )
    (folder / "dear.json").write_text(json.dumps({**BODY, "model": "dear"}))
    assert "\nRefused by core: 404 model_not_found\n" in explain(folder, "dear.json", "-c", "own.yaml", "--as", "ada")
    other = explain(folder, "request.json", "-c", "own.yaml", "--as", "ada", "--endpoint", "messages")
    assert "\nRefused by core: 403 insufficient_permissions\n" in other


def test_in_the_name_of_a_key_of_the_database(folder: Path) -> None:
    """Keys that `xenios keys create` made can be named as well; tables that aren't there are not made for it."""
    assert "xenios db upgrade" in fails(folder, "request.json", "-c", "own.yaml", "--as", "bob", code=2)
    assert xenios("keys", "create", "-c", "own.yaml", "--id", "bob", "--team", "red", cwd=folder).returncode == 0
    assert "as key:bob (tenant bob, team red)" in explain(folder, "request.json", "-c", "own.yaml", "--as", "bob")
    assert "Nobody here is 'key:eve'" in fails(folder, "request.json", "-c", "own.yaml", "--as", "eve", code=1)


def test_a_running_gateway_answers_alike(running: Running) -> None:
    """`--url` asks the gateway itself, `POST /admin/explain`: what both know, both say alike."""
    args = ("request.json", "--as", "ada", "--json")
    asked = json.loads(explain(running.folder, *args, "--url", running.url, key=running.key))
    alone = json.loads(explain(running.folder, *args, "-c", "own.yaml"))
    assert alone.pop("note").startswith("A running gateway alone knows")
    assert asked == alone
    assert asked == running.request("POST", "/admin/explain", {"body": BODY, "as": "ada"}).data
    assert explain(running.folder, "request.json", "--url", running.url, key=running.key).startswith(
        "chat/completions, smart, as key:bootstrap (tenant default, admin)\n"
    )


def test_whom_a_running_gateway_does_not_tell(running: Running) -> None:
    """Without an admin key, without any, or where no gateway is: one line that says so."""
    ask = ("request.json", "--url", running.url)
    assert "HTTP 403: This needs an admin key" in fails(running.folder, *ask, code=1, key=ADA)
    assert "HTTP 401" in fails(running.folder, *ask, code=1, key=new_key())
    assert "$XENIOS_KEY" in fails(running.folder, *ask, code=2)
    assert "can't be asked" in fails(running.folder, "request.json", "--url", "http://127.0.0.1:9", code=1, key=ADA)
    assert "can't be asked" in fails(running.folder, "request.json", "--url", "nonsense", code=1, key=ADA)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("gone.json",), "gone.json can't be read: No such file"),
        (("own.yaml",), "own.yaml: The body is not valid JSON"),
        (("request.json", "--header", "X-Xenios-Task"), "has no colon"),
        (("request.json", "-c", "broken.yaml"), "broken.yaml:1:"),
    ],
)
def test_bad_usage_is_2(args: tuple[str, ...], says: str, folder: Path) -> None:
    """A file that is none, a header that is none, a configuration with mistakes."""
    (folder / "broken.yaml").write_text("upstreamz: {}\n")
    assert says in fails(folder, *args, code=2)


def test_an_endpoint_that_is_none(folder: Path) -> None:
    """Those that there are are told."""
    assert "chat/completions" in fails(folder, "request.json", "-c", "own.yaml", "--endpoint", "chat", code=1)
