"""A third party's plugin: built, installed beside Xenios in a clean environment, switched on, and seen at work."""

from __future__ import annotations

import email.parser
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.kit import new_key
from tests.integration.process import CONFIG, REPOSITORY, Running, environment, serving, xenios

TEMPLATE = REPOSITORY / "plugins" / "template"
CONFIGURATION = """
upstreams: {openrouter: {without_key: simulate}}
plugins:
  - use: api_keys
  - use: word_filter
    when: {endpoint: chat/*}
    config: {words: [tulip]}
"""


@dataclass(frozen=True)
class Clean:
    """A virtual environment that holds the two wheels and what Xenios needs to run."""

    python: Path
    xenios_wheel: Path
    template_wheel: Path

    @property
    def xenios(self) -> tuple[str, ...]:
        return (str(self.python.with_name("xenios")),)


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(source: Path, folder: Path) -> Path:
    """The wheel, with the build tools that are installed here: nothing is fetched."""
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, source, cwd=folder)
    [wheel] = folder.glob("*.whl")
    return wheel


def required() -> list[str]:
    """The distributions of requirements/run.txt."""
    return re.findall(r"^([A-Za-z0-9_.-]+)==", (REPOSITORY / "requirements" / "run.txt").read_text(), re.MULTILINE)


def supply(site: Path) -> None:
    """Link exactly the locked run-time requirements from the environment of the tests: no download, nothing else."""
    for name in required():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    folder = tmp_path_factory.mktemp("clean")
    wheels = [built(source, _made(folder / name)) for name, source in (("x", REPOSITORY), ("t", TEMPLATE))]
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    assert list(site.iterdir()) == []
    supply(site)
    # --no-index: whatever the lock file lacks is missing then
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--quiet", *wheels, cwd=folder)
    return Clean(python, *wheels)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def running(clean: Clean, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("template")
    (folder / "own.yaml").write_text(CONFIGURATION)
    with serving(folder, "--config", "own.yaml", command=clean.xenios) as gateway:
        yield gateway


# --- the wheels -------------------------------------------------------------------------------------------


def test_what_is_in_the_wheel(clean: Clean) -> None:
    """Our wheel puts two packages into site-packages, with types and the default configuration, and nothing else."""
    names = zipfile.ZipFile(clean.xenios_wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gateway", "gateway_plugins"}
    assert {
        "gateway/py.typed",
        "gateway_plugins/py.typed",
        "gateway/data/xenios.yaml",
        "gateway/data/openrouter-models.json",
    } <= set(names)
    assert not [name for name in names if re.search(r"(^|/)(tests?|plugins|template|__pycache__)/|\.pyc$", name)]
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "gateway").rglob("*.py")}
    assert modules <= set(names)
    with zipfile.ZipFile(clean.xenios_wheel) as wheel:
        assert wheel.read("gateway/data/xenios.yaml") == (CONFIG / "xenios.yaml").read_bytes()


def test_what_the_wheel_needs(clean: Clean) -> None:
    """Test tools are an extra, and no requirement names a place to fetch it from."""
    with zipfile.ZipFile(clean.xenios_wheel) as wheel:
        [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.parser.Parser().parsestr(wheel.read(name).decode())
    needs = metadata.get_all("Requires-Dist") or []
    always = {re.split(r"[<>=!;\[ ]", need)[0].lower() for need in needs if "extra ==" not in need}
    assert not always & {"pytest", "mypy", "ruff", "openai", "anthropic"}
    assert "aiohttp" in always
    assert not [need for need in needs if "@" in need or "://" in need]


def test_the_template_is_a_package_of_its_own(clean: Clean) -> None:
    """Its wheel holds its package and names its entry point; it brings nothing of ours."""
    with zipfile.ZipFile(clean.template_wheel) as wheel:
        names = wheel.namelist()
        [points] = [name for name in names if name.endswith("entry_points.txt")]
        assert "[xenios.plugins]\nword_filter = xenios_word_filter:Plugin" in wheel.read(points).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"xenios_word_filter"}


def test_the_templates_own_tests_pass(tmp_path: Path) -> None:
    """Whoever copies the template starts with tests that pass."""
    out = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", tmp_path / "base", cwd=TEMPLATE)
    assert re.search(r"^\d+ passed", out, re.MULTILINE)


def test_the_template_is_typed(tmp_path: Path) -> None:
    """The public surface is typed well enough for a strict third party."""
    command = ("--strict", "--python-version", "3.11", "--cache-dir", tmp_path, "-p", "xenios_word_filter")
    config = tmp_path / "mypy.ini"
    config.write_text(
        f"[mypy]\nmypy_path = {TEMPLATE / 'src'}:{REPOSITORY}\nfollow_imports = silent\nplugins = pydantic.mypy\n"
    )
    run(sys.executable, "-m", "mypy", "--config-file", config, *command, cwd=tmp_path)


# --- installed --------------------------------------------------------------------------------------------


def test_the_environment_is_clean(clean: Clean, tmp_path: Path) -> None:
    """What runs comes from the wheel, not from this checkout; test tools are not there."""
    where = run(clean.python, "-c", "import gateway, gateway_plugins; print(gateway.__file__)", cwd=tmp_path)
    assert where.startswith(str(clean.python.parents[1]))
    script = (
        "import importlib.util as u; print([n for n in ('pytest', 'tests', 'plugins', 'openai') if u.find_spec(n)])"
    )
    assert run(clean.python, "-c", script, cwd=tmp_path) == "[]\n"


def test_it_is_listed(clean: Clean, tmp_path: Path) -> None:
    """`xenios plugins --installed` shows it beside ours, and the schema for editors knows its settings."""
    done = xenios("plugins", "--installed", cwd=tmp_path, command=clean.xenios)
    assert re.search(r"^word_filter +1\.0\.0 +xenios_word_filter:Plugin$", done.stdout, re.MULTILINE)
    assert '"plugin_word_filter"' in xenios("schema", "--installed", cwd=tmp_path, command=clean.xenios).stdout
    assert "word_filter" not in xenios("schema", cwd=tmp_path, command=clean.xenios).stdout


def test_its_mistakes_are_ours(clean: Clean, tmp_path: Path) -> None:
    """`xenios check` reports a mistake in its settings with line and hint, like one in a built-in plugin's."""
    config = tmp_path / "own.yaml"
    config.write_text(CONFIGURATION.replace("words:", "wrods:"))
    done = xenios("check", "--config", config, cwd=tmp_path, command=clean.xenios)
    assert done.returncode == 2
    assert f"{config}:7:14: plugins[1].config.wrods: unknown key (did you mean 'words'?)" in done.stderr


def test_its_effect_is_seen(running: Running) -> None:
    """A real request to a real gateway: refused with its header and message, or let through with its header."""
    passed = running.chat("anthropic/claude-haiku-4.5")
    assert (passed.status, passed.headers["x-word-filter"]) == (200, "passed")
    body = {"model": "anthropic/claude-haiku-4.5", "messages": [{"role": "user", "content": "A tulip, please"}]}
    for stream in (False, True):
        refused = running.request("POST", "/v1/chat/completions", {**body, "stream": stream})
        assert (refused.status, refused.headers["x-word-filter"]) == (403, "refused")
        assert refused.data["error"]["code"] == "word_refused"
    assert running.request("POST", "/v1/messages", {**body, "max_tokens": 9}).status == 200, "`when` left it out"
    stranger = running.request("POST", "/v1/chat/completions", body, key=new_key())
    assert stranger.status == 401
    assert "x-word-filter" not in stranger.headers


def test_what_is_not_listed_is_not_there(clean: Clean, tmp_path: Path) -> None:
    """Installed is not enabled: in an empty folder the wheel's own configuration serves, without the third party's."""
    with serving(tmp_path, command=clean.xenios) as gateway:
        body = {"model": "task/chat", "messages": [{"role": "user", "content": "A tulip, please"}]}
        reply = gateway.request("POST", "/v1/chat/completions", body)
        assert (reply.status, reply.headers["x-xenios-model"]) == (200, "anthropic/claude-opus-4.5")
        assert "x-word-filter" not in reply.headers


# --- one file ---------------------------------------------------------------------------------------------


def test_one_file_is_enough(tmp_path: Path) -> None:
    """`use: ./my_plugin.py:Plugin`: the same code in one file beside the YAML has the same effect."""
    source = TEMPLATE / "src" / "xenios_word_filter" / "__init__.py"
    (tmp_path / "my_plugin.py").write_text(source.read_text())
    (tmp_path / "own.yaml").write_text(CONFIGURATION.replace("word_filter", "./my_plugin.py:Plugin"))
    with serving(tmp_path, "--config", "own.yaml") as gateway:
        body = {"model": "openai/gpt-5-mini", "messages": [{"role": "user", "content": "A tulip, please"}]}
        reply = gateway.request("POST", "/v1/chat/completions", body)
        assert (reply.status, reply.headers["x-word-filter"]) == (403, "refused")
        assert gateway.chat("openai/gpt-5-mini").headers["x-word-filter"] == "passed"


def test_one_file_twice(tmp_path: Path) -> None:
    """Listed twice with an id each, it is two plugins with their own settings and state."""
    source = TEMPLATE / "src" / "xenios_word_filter" / "__init__.py"
    (tmp_path / "my_plugin.py").write_text(source.read_text())
    entry = "  - {{use: './my_plugin.py:Plugin', id: {0}, config: {{words: [{0}], message: no {0}}}}}\n"
    (tmp_path / "own.yaml").write_text(
        "upstreams: {openrouter: {without_key: simulate}}\nplugins:\n" + entry.format("tulip") + entry.format("rose")
    )
    with serving(tmp_path, "--config", "own.yaml") as gateway:
        for word in ("tulip", "rose"):
            body = {"model": "openai/gpt-5-mini", "messages": [{"role": "user", "content": f"A {word}"}]}
            reply = gateway.request("POST", "/v1/chat/completions", body)
            assert (reply.status, reply.data["error"]["message"]) == (403, f"no {word}")
