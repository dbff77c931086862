import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import jsonschema
import pytest
import yaml
from pydantic import AnyUrl, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator, model_validator

from gateway import yaml_source
from gateway.problems import MASK, Problem, spell
from gateway.settings import (
    ConfigError,
    Settings,
    examine,
    examine_text,
    json_schema,
    load,
    load_text,
    masked,
)

KEY = "upstreams: {openrouter: {api_key: sk-or-canary}}\n"
"""A configuration without a key is a mistake of its own; most tests are about another one."""


@pytest.fixture(params=["libyaml", "python"])
def parser(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(yaml_source, "_Loader", yaml.SafeLoader)
    return request.param


def problems(text, env=None, base=None):
    try:
        return list(examine_text(text, env=env or {}, base=base).problems)
    except ConfigError as error:
        return list(error.problems)


def only(text, env=None, base=None):
    found = problems(text, env, base)
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]


def plugin_config(config, env=None, base=None):
    """What a plugin gets for the YAML `config: …` (indented by four)."""
    loaded = load_text(f"{KEY}plugins:\n- use: p\n  config:\n{config}", env=env or {}, base=base)
    return loaded.settings.plugins[0].config


# --- all errors at once -----------------------------------------------------------------------------------

TEN_MISTAKES = """\
# yaml-language-server: $schema=schema.json
server:
  prot: 8080
  header_timeout: 10 sec
  allow_anonymous: yes
log: {level: wran}
upstream:
  default: openruter
upstreams:
  openrouter:
    api_key: ${OPENROUTER_API_KEY}
plugins:
  - use: rate_limit
    on_error: [fail]
  - use: rate_limit
  - id: no_use
    id: twice
"""


def test_ten_mistakes():
    """A file with ten different mistakes gives all of them at once, each with its line."""
    with pytest.raises(ConfigError) as caught:
        load_text(TEN_MISTAKES, file="config/x.yaml", env={})
    expected = [
        "config/x.yaml:3:3: server.prot: unknown key (did you mean 'port'?)",
        "config/x.yaml:4:19: server.header_timeout: '10 sec' is not a duration (write 30s, 5m, 1h30m)",
        "config/x.yaml:5:20: server.allow_anonymous: must be true or false, not 'yes'",
        (
            "config/x.yaml:6:14: log.level: must be 'debug', 'info', 'warning' or 'error', not 'wran' "
            "(did you mean 'warning'?)"
        ),
        "config/x.yaml:8:12: upstream.default: there is no upstream 'openruter' (did you mean 'openrouter'?)",
        (
            "config/x.yaml:11:14: upstreams.openrouter.api_key: the environment variable OPENROUTER_API_KEY is not set "
            "(set OPENROUTER_API_KEY, or write ${OPENROUTER_API_KEY:-default})"
        ),
        "config/x.yaml:14:5: plugins[0].on_error: must be 'fail' or 'ignore', not a list",
        (
            "config/x.yaml:15:10: plugins[1].use: a plugin with this id stands on line 13 already "
            "(give this one an `id` of its own)"
        ),
        "config/x.yaml:16:5: plugins[2].use: is required",
        "config/x.yaml:17:5: plugins[2].id: 'id' is given twice, first on line 16 (keep one of them)",
    ]
    assert "\n".join(expected) == str(caught.value)
    assert expected == [str(problem) for problem in caught.value.problems]


def test_a_mistake_is_reported_once():
    """A value that couldn't be read, or a list whose entry is wrong, is one mistake, not two."""
    assert only(KEY + "server: {port: '${PORT}'}").path == "server.port"
    assert only(KEY + "plugins:\n- {use: a, when: {phase: lve}}").path == "plugins[0].when.phase"
    assert only(KEY + "plugins:\n- {use: '?'}").path == "plugins[0].use"
    assert only("upstreams: {o: {api_key: k, kind: x}}\nupstream: {default: o}").path == "upstreams.o.kind"


def test_secrets_that_a_validator_takes_apart():
    """A value that a validator turned into something larger stays secret at every place within."""

    class Target(BaseModel):
        model: int

        @model_validator(mode="before")
        @classmethod
        def _alone(cls, value):
            return {"model": value} if isinstance(value, str) else value

    class Config(BaseModel):
        targets: list[Target]

    source = examine_text("plugins:\n- use: p\n  config:\n    targets:\n    - ${A}\n", env={"A": "canary"}).source
    (problem,) = source.validate(Config, ("plugins", 0, "config"))[1]
    assert (problem.line, problem.message) == (5, "must be a whole number, not the value given")


def test_problem_spelling():
    """A problem without a place or a path says only what it knows."""
    assert str(Problem("f", None, None, "", "broken")) == "f: broken"
    assert str(Problem("f", 1, 2, "a[0]", "broken", "fix")) == "f:1:2: a[0]: broken (fix)"
    assert spell(["catalogue", "overrides", "openai/gpt-5.2", "input"]) == 'catalogue.overrides["openai/gpt-5.2"].input'


# --- the file ---------------------------------------------------------------------------------------------


def test_load_a_file(tmp_path):
    """A sound file gives its settings and knows where each value stands."""
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + KEY.encode() + b"server:\n  port: 9000\n")
    loaded = load(file, {})
    assert loaded.settings.server.port == 9000
    assert loaded.source.where(("server", "port")) == (3, 3)
    assert loaded.source.where(("server", "port"), value=True) == (3, 9)
    assert loaded.source.where(("server", "port", "nothing", 7)) == (3, 3)
    assert loaded.source.where(["server"]) == (2, 1)
    assert loaded.source.where(["nowhere"]) == (1, 1)
    assert loaded.source.at(("server", "port")) == 9000
    assert tmp_path == loaded.source.base
    assert str(file) == loaded.source.file


def test_environment_is_the_process_s(monkeypatch):
    """Without an environment of its own, load reads the process's as it is at that moment."""
    monkeypatch.setitem(os.environ, "XENIOS_TEST_PORT", "7001")
    assert load_text(KEY + "server:\n  port: ${XENIOS_TEST_PORT}").settings.server.port == 7001


def test_empty_file_is_all_defaults():
    """An empty file means all defaults, of which only the key is missing."""
    for text in ("", "# nothing\n", "---\n", "~", "\ufeff"):
        problem = only(text)
        assert problem.path == "upstreams"
        assert problem.message == "there is no key for this upstream"
        assert problem.hint.startswith("write `api_key: ${NAME}`")


def test_sections_that_are_commented_out():
    """A section of which every line is commented out has its defaults."""
    text = KEY + "server:\nlog:\nupstream:\ncatalogue:\nplugins:\n"
    assert load_text(KEY).settings == load_text(text).settings
    entry = load_text(KEY + "plugins:\n- use: a\n  id:\n  when:\n  config:\n").settings.plugins[0]
    assert (entry.id, entry.when, entry.config) == ("a", None, {})
    assert (
        load_text("upstreams: {openrouter: {api_key: k}, b: {without_key: simulate}}").settings.upstream.default
        == "openrouter"
    )
    assert only(KEY.replace("}\n", ", b: }\n")).path == "upstreams.b.api_key"


def test_files_that_cannot_be_read(tmp_path):
    """A missing file, a directory, and a file that is no UTF-8 are said to be just that."""

    def message(path):
        with pytest.raises(ConfigError) as caught:
            load(path, {})
        (problem,) = caught.value.problems
        assert str(path) == problem.file
        return problem.message

    assert message(tmp_path / "none.yaml") == "can't be read: No such file or directory"
    assert message(tmp_path) == "can't be read: Is a directory"
    (tmp_path / "latin").write_bytes(b"server:\n  host: caf\xe9\n")
    assert message(tmp_path / "latin") == "is not UTF-8"
    with pytest.raises(ConfigError, match=r"latin:2:12: is not UTF-8 \(save the file as UTF-8\)"):
        examine(tmp_path / "latin", {})
    (tmp_path / "utf16").write_text("a: 1", encoding="utf-16")
    assert message(tmp_path / "utf16") == "is not UTF-8"


def test_characters_that_are_not_text(parser):
    """A NUL byte or control character is refused with its place."""
    problem = only("server:\n  host: a\0b\n")
    assert (
        problem.line,
        problem.column,
        problem.message,
    ) == (2, 10, "the character U+0000 can't stand in YAML")
    assert only("a: \x1b[31m").line == 1


@pytest.mark.parametrize(
    "text, line",
    [
        ("server:\n\tport: 1\n", 2),
        ("a: b: c\n", 1),
        ("a: @x\n", 1),
        ("a: *\n", 1),
        ("a: *nowhere\n", 1),
        ("a:\n  b: [${X}]\n", 2),
        ("a: {b: ${X:-1}}\n", 1),
        ('a:\n  b: "x\n\n', 4),
        ("a: [1, 2\nb: 3\n", 2),
        ("a: 1\n---\nb: 1\n", 2),
    ],
)
def test_broken_yaml(parser, text, line):
    """Broken YAML is one problem, with its line and a hint at the usual slips."""
    problem = only(text)
    assert line == problem.line
    assert problem.message.startswith("not valid YAML: ")
    assert "quote" in problem.hint


def test_broken_yaml_names_the_beginning():
    """A quote or bracket that is never closed is named by the line where it begins."""
    assert "that begins on line 2)" in only('a:\n  b: "x\n\n').message


@pytest.mark.parametrize("text", ["[1, 2]", "text", "42"])
def test_top_is_a_mapping(parser, text):
    """A file that is a list or a single value is refused."""
    assert only(text).message.startswith("the file must be a mapping")


# --- YAML's traps -----------------------------------------------------------------------------------------


def test_only_true_and_false_are_booleans(parser):
    """`on`, `off`, `yes`, `no` and `True` are text, as keys too; only true and false are booleans."""
    config = plugin_config("    on: off\n    yes: no\n    list: [True, y, N, true, false]\n")
    assert config == {"on": "off", "yes": "no", "list": ["True", "y", "N", True, False]}


def test_plain_values(parser):
    """Dates, clock times, leading zeros and endless numbers stay text; numbers and null have their types."""
    config = plugin_config(
        "    text: [2024-01-01, 2024-01-01T00:00:00Z, 1:30, 0777, 0x1F, 1_000, .inf, -.inf, .nan, 1e999, =, 1.2.3]\n"
        "    numbers: [0, -7, +7, 1.5, .5, 1e3, -0.0]\n"
        "    nulls: [null, ~, , ]\n".replace(", , ]", "]")
        + f"    long: {'9' * 5000}\n"
        "    quoted: ['1', \"true\", 'null', '']\n"
        "    block: |\n      1\n"
    )
    assert config["text"] == [
        "2024-01-01",
        "2024-01-01T00:00:00Z",
        "1:30",
        "0777",
        "0x1F",
        "1_000",
        ".inf",
        "-.inf",
        ".nan",
        "1e999",
        "=",
        "1.2.3",
    ]
    assert config["numbers"] == [0, -7, 7, 1.5, 0.5, 1000.0, 0.0]
    assert config["nulls"] == [None, None]
    assert config["long"] == "9" * 5000
    assert config["quoted"] == ["1", "true", "null", ""]
    assert config["block"] == "1\n"


def test_duplicate_keys(parser):
    """A key given twice is refused with both lines, at any depth."""
    problem = only(KEY + "server:\n  port: 1\n  host: a\n  'port': 2\n")
    assert (problem.line, problem.column, problem.path) == (5, 3, "server.port")
    assert problem.message == "'port' is given twice, first on line 3"


def test_keys_are_text(parser):
    """A key is the text it is written as; a list or mapping as a key is refused with its line."""
    assert plugin_config("    404: x\n    true: x\n    on: x\n") == {"404": "x", "true": "x", "on": "x"}
    problem = only(KEY + "plugins:\n- use: a\n  config:\n    ? [a]\n    : x\n")
    assert (problem.line, problem.message) == (5, "a key must be text, not a list or mapping")


def test_anchors_and_merge_keys(parser):
    """Anchors and merge keys work; what a mapping says itself wins, then the first of the merged."""
    config = plugin_config(
        "    base: &base {a: 1, b: 1}\n"
        "    more: &more {b: 2, c: 2}\n"
        "    same: *base\n"
        "    one: {<<: *base, b: 0}\n"
        "    two: {<<: [*base, *more], d: 3}\n"
        "    text: {'<<': 1}\n"
    )
    assert config["same"] == {"a": 1, "b": 1}
    assert config["one"] == {"a": 1, "b": 0}
    assert config["two"] == {"a": 1, "b": 1, "c": 2, "d": 3}
    assert config["text"] == {"<<": 1}
    assert only(KEY + "server: {<<: 5}").message == "`<<` takes a mapping or a list of mappings"


def test_a_mistake_behind_an_alias_is_one(parser):
    """A mistake in an anchored value is reported once, however often the value is used."""
    text = KEY + "plugins:\n- {use: a, config: &c {x: '${NO}', y: 1, y: 2}}\n- {use: b, config: *c}\n"
    assert [problem.line for problem in problems(text)] == [3 - 0, 3]


@pytest.mark.parametrize(
    "bomb",
    [
        "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}' if n else '1'] * 10)}]\n" for n in range(9)),
        "".join(
            f"x{n}: &x{n} {{" + (f"<<: [{', '.join([f'*x{n - 1}'] * 10)}]" if n else "a: 1") + "}\n" for n in range(9)
        ),
    ],
)
def test_alias_bombs(parser, bomb):
    """A small file whose aliases multiply to millions of values is refused at once."""
    assert only(bomb).message.startswith("more than 100000 values")


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}"])
def test_endless_aliases(parser, text):
    """An anchor that holds itself is refused."""
    assert only(text).message == "nested deeper than 50 levels"


def test_depth(parser):
    """Deep nesting is refused before anything recurses into it."""
    assert only("a: " + "[" * 100_000).message == "nested deeper than 50 levels"
    assert only("".join(" " * n + "a:\n" for n in range(60))).message == "nested deeper than 50 levels"


@pytest.mark.parametrize("tag", ["!!str", "!x", "!!python/object:os.system"])
def test_tags(parser, tag):
    """Tags are refused: they name types, and types come from the settings alone."""
    problem = only(KEY + f"plugins:\n- use: {tag} a\n")
    assert problem.line == 3
    assert "is not allowed" in problem.message


# --- ${…} -------------------------------------------------------------------------------------------------


def test_expressions(parser, tmp_path):
    """Variables, defaults, files and escapes are replaced in values after YAML was parsed."""
    (tmp_path / "secret").write_text("s3cr: # et\n")
    config = plugin_config(
        "    a: ${A}\n    b: pre-${A}-${B:-x y}-post\n    c: ${EMPTY:-full}\n    d: '${EMPTY}'\n"
        "    e: $${A} costs $5\n    f: ${file:secret}\n    g: ${TRICK}\n    h: ['${A}', {k: \"${A}\"}]\n"
        f"    i: ${{file:{tmp_path / 'secret'}}}\n    j: $$${{A}}\n    ${{A}}: key\n",
        {"A": "va: lue", "EMPTY": "", "TRICK": "${A}\n- x: *y"},
        tmp_path,
    )
    assert config == {
        "a": "va: lue",
        "b": "pre-va: lue-x y-post",
        "c": "full",
        "d": "",
        "e": "${A} costs $5",
        "f": "s3cr: # et",
        "g": "${A}\n- x: *y",
        "h": ["va: lue", {"k": "va: lue"}],
        "i": "s3cr: # et",
        "j": "$${A}",
        "${A}": "key",
    }


def test_expressions_are_text(parser):
    """What an expression gives is text, from which numbers and booleans are read; empty and unquoted it is null."""
    config = plugin_config(
        "    a: ${N}\n    b: ${N}0\n    c: ${E}\n    d: '${E}'\n    e: ${X:-1.5}\n", {"N": "8080", "E": ""}
    )
    assert config == {"a": "8080", "b": "80800", "c": None, "d": "", "e": "1.5"}
    env = {"N": "8080", "T": "true", "E": "", "PRICE": "0.5"}
    for q in ("", "'"):
        loaded = load_text(
            f"{KEY}server:\n  port: {q}${{N}}{q}\n  bootstrap_key: {q}${{T}}{q}\n  header_timeout: {q}${{N}}{q}\n"
            f"  max_body: {q}${{N}}{q}\n  pepper: ${{E}}\n"
            f"catalogue:\n  overrides:\n    a:\n      input: {q}${{PRICE}}{q}\n",
            env=env,
        )
        server = loaded.settings.server
        assert (server.port, server.bootstrap_key, server.header_timeout, server.max_body) == (8080, True, 8080.0, 8080)
        assert server.pepper is None
        assert loaded.settings.catalogue.overrides["a"].input == Decimal("0.5")


def test_secrets_of_digits_stay_text():
    """A secret that looks like a number, true or 1e5 arrives as the text it is, in plugins' settings too."""

    class Config(BaseModel):
        token: SecretStr
        names: list[str]

    env = {"KEY": "0123", "A": "12345678901234567890", "B": "1e5", "C": "true"}
    loaded = load_text(
        "upstreams:\n  openrouter:\n    api_key: ${A}\n    headers:\n      x-a: ${B}\n      x-b: ${C}\n"
        "plugins:\n- use: a\n  config:\n    token: ${B}\n    names:\n    - ${A}\n    - ${KEY}\n",
        env=env,
    )
    upstream = loaded.settings.upstreams["openrouter"]
    assert env["A"] == upstream.api_key.get_secret_value()
    assert upstream.headers == {"x-a": "1e5", "x-b": "true"}
    config, found = loaded.source.validate(Config, ("plugins", 0, "config"))
    assert found == []
    assert ("1e5", [env["A"], "0123"]) == (config.token.get_secret_value(), config.names)


@pytest.mark.parametrize(
    "written, message, hint",
    [
        ("${NO}", "the environment variable NO is not set", "set NO, or write ${NO:-default}"),
        (
            "a ${",
            "is not an expression",
            "write ${NAME}, ${NAME:-default} or ${file:/path}; $${ is a literal ${",
        ),
        ("${file:}", "the file {base} can't be read: Is a directory", None),
        ("${file:none}", "the file {base}/none can't be read: No such file or directory", None),
        ("${file:bytes}", "the file {base}/bytes can't be read: not UTF-8", None),
    ],
)
def test_expressions_that_fail(tmp_path, written, message, hint):
    """An expression without a value is one problem with line, path and a hint."""
    (tmp_path / "bytes").write_bytes(b"\xff")
    problem = only(KEY + f"server:\n  host: '{written}'\n", {}, tmp_path)
    assert (problem.line, problem.column, problem.path) == (3, 9, "server.host")
    assert (message.replace("{base}", str(tmp_path)), hint) == (problem.message, problem.hint)


@pytest.mark.parametrize("body", ["", "A B", "1A", "A-b", "A:x", "A:-${B", ":-x", "FILE:x"])
def test_expressions_that_are_none(body):
    """What is no expression is refused, nested ones too, with the forms that are."""
    problem = only(KEY + f"server: {{host: '${{{body}}}'}}", {"A": "x", "B": "y"})
    assert problem.message == "is not an expression"
    assert "${NAME:-default}" in problem.hint


def test_one_trailing_newline_is_stripped(tmp_path):
    """A secret file loses one line end, nothing else."""
    for content, expected in (
        (b"a\n", "a"),
        (b"a\r\n", "a"),
        (b" a \n\n", " a \n"),
        (b"", None),
        (b"\xef\xbb\xbfa", "a"),
    ):
        (tmp_path / "s").write_bytes(content)
        assert {"x": expected} == plugin_config("    x: ${file:s}\n", base=tmp_path)


def test_a_variable_may_stand_in_a_file(tmp_path):
    """As containers' secrets are given: `A_FILE` names the file that holds A; A itself wins; a file that is missing is said."""
    (tmp_path / "a").write_text("of the file\n")
    given = {"A_FILE": str(tmp_path / "a")}
    assert plugin_config("    x: ${A:-default}\n", given, tmp_path) == {"x": "of the file"}
    assert plugin_config("    x: ${A}\n", {**given, "A": "its own"}, tmp_path) == {"x": "its own"}
    assert plugin_config("    x: ${A}\n", {**given, "A": ""}, tmp_path) == {"x": "of the file"}
    problem = only(KEY + "server:\n  host: ${A}\n", {"A_FILE": "none"}, tmp_path)
    assert problem.message == f"the file {tmp_path}/none can't be read: No such file or directory"


def test_secret_files_are_found_beside_the_config(tmp_path, monkeypatch):
    """Relative names of secret files and authorities start at the config file, not at the working directory."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/key").write_text("sk-file\n")
    (tmp_path / "etc/x.yaml").write_text("upstreams: {openrouter: {api_key: '${file:key}', ca_file: ca.pem}}")
    monkeypatch.chdir(tmp_path)
    upstream = load(Path("etc/x.yaml"), {}).settings.upstreams["openrouter"]
    assert upstream.api_key.get_secret_value() == "sk-file"
    assert tmp_path / "etc/ca.pem" == upstream.ca_file


# --- the settings -----------------------------------------------------------------------------------------


def test_defaults():
    """The defaults are those that the documentation gives."""
    settings = load_text(KEY).settings
    server = settings.server
    assert ("127.0.0.1", 8080, Path(".xenios"), None, False) == (
        server.host, server.port, server.data_dir, server.pepper, server.allow_anonymous,
    )  # fmt: skip
    assert (
        server.max_body, server.header_timeout, server.body_timeout, server.keepalive_timeout, server.write_timeout,
    ) == (20 * 2**20, 10, 30, 75, 30)  # fmt: skip
    assert (
        server.request_timeout, server.stream_commit_after, server.keepalive_interval, server.drain_delay,
        server.drain_timeout, server.max_connections, server.debug_headers, server.server_timing, server.bootstrap_key,
    ) == (600, 10, 15, 0, 30, 10_000, False, "off", True)  # fmt: skip
    assert (settings.log.level, settings.log.format) == ("info", "auto")
    policy = settings.upstream
    assert (
        policy.default, policy.client_may, policy.forward_headers, policy.connect_timeout, policy.first_event_timeout,
        policy.stall_timeout, policy.attempt_timeout, policy.max_reply, policy.max_event, policy.max_connections,
    ) == ("openrouter", ("provider",), (), 5, 120, 60, None, 64 * 2**20, 16 * 2**20, 0)  # fmt: skip
    upstream = settings.upstreams["openrouter"]
    assert (
        upstream.kind, upstream.base_url, upstream.without_key, upstream.headers, upstream.provider, upstream.ca_file,
        upstream.transport, upstream.proxy,
    ) == ("openrouter", "https://openrouter.ai/api/v1", "fail", {}, None, None, "httptools", None)  # fmt: skip
    assert (settings.catalogue.refresh, settings.catalogue.overrides, settings.plugins) == (3600, {}, ())


@pytest.mark.parametrize(
    "given",
    [
        "socks5://h:1",
        "https://h:1",
        "http://h",
        "http://u:secret@h",
        "http://u:se/cret@h:1",
        "http://h:99999",
        "h:3128",
    ],
)
def test_what_is_no_proxy_is_refused_without_showing_it(given):
    """A proxy is http://, host and port, with a password or not; a mistake in it shows no part of it."""
    with pytest.raises(ConfigError) as caught:
        load_text(f"upstreams: {{openrouter: {{api_key: k, proxy: '{given}'}}}}")
    assert "upstreams.openrouter.proxy" in str(caught.value)
    assert "cret" not in str(caught.value)


def test_the_tests_choose_the_transport_of_upstreams_that_name_none(monkeypatch):
    """`make transport`: what a configuration names stays, and a name that there is not is refused."""
    text = "upstreams: {a: {api_key: k}, b: {api_key: k, transport: httptools}}"
    monkeypatch.setenv("XENIOS_TEST_TRANSPORT", "aiohttp")
    assert [u.transport for u in load_text(text).settings.upstreams.values()] == ["aiohttp", "httptools"]
    monkeypatch.setenv("XENIOS_TEST_TRANSPORT", "carrier pigeon")
    with pytest.raises(ConfigError, match=r"upstreams\.a\.transport"):
        load_text(text)


def test_a_proxy_is_the_lean_transports_alone():
    """With aiohttp's client it is refused rather than gone around; else it is kept, and never shown."""
    text = "upstreams: {openrouter: {api_key: k, proxy: 'http://u:secret@h:3128', transport: %s}}"
    with pytest.raises(ConfigError, match="only transport httptools"):
        load_text(text % "aiohttp")
    loaded = load_text(text % "httptools")
    assert loaded.settings.upstreams["openrouter"].proxy.get_secret_value() == "http://u:secret@h:3128"
    assert "secret" not in str(masked(loaded.settings, loaded.source)) + repr(loaded.settings)


def test_settings_are_frozen():
    """Nobody changes a configuration in force."""
    settings = load_text(KEY).settings
    with pytest.raises(ValueError, match="frozen"):
        settings.server.port = 1


@pytest.mark.parametrize(
    "yaml_text, path, message, hint",
    [
        ("prot: 1", "prot", "unknown key", None),
        ("server: {zzz: 1}", "server.zzz", "unknown key", None),
        ("server: {port: 99999}", "server.port", "must be less than or equal to 65535, not 99999", None),
        ("server: {port: -1}", "server.port", "must be greater than or equal to 0, not -1", None),
        ("server: {port: http}", "server.port", "must be a whole number, not 'http'", None),
        ("server: {port: 1.5}", "server.port", "must be a whole number, not 1.5", None),
        ("server: {host: 127}", "server.host", "must be text, not 127", "put it in quotes"),
        ("server: {host: ''}", "server.host", "must have at least 1 character", None),
        ("server: {host: [a]}", "server.host", "must be text, not a list", None),
        ("server: {data_dir: 5}", "server.data_dir", "must be a file name, not 5", "put it in quotes"),
        ("server: {bootstrap_key: 1}", "server.bootstrap_key", "must be true or false, not 1", None),
        ("server: {bootstrap_key: off}", "server.bootstrap_key", "must be true or false, not 'off'", None),
        ("server: {bootstrap_key: maybe}", "server.bootstrap_key", "must be true or false, not 'maybe'", None),
        ("server: {header_timeout: 0s}", "server.header_timeout", "must be greater than 0, not '0s'", None),
        ("server: {max_body: 0}", "server.max_body", "must be greater than 0, not 0", None),
        ("server: {max_connections: 0}", "server.max_connections", "must be greater than or equal to 1, not 0", None),
        ("server: [a]", "server", "must be a mapping, not a list", None),
        ("server: text", "server", "must be a mapping, not 'text'", None),
        ("log: {format: yaml}", "log.format", "must be 'auto', 'json' or 'pretty', not 'yaml'", None),
        ("upstream: {client_may: [model]}", "upstream.client_may[0]", None, "did you mean 'models'?"),
        ("upstream: {client_may: provider}", "upstream.client_may", "must be a list, not 'provider'",
         None),
        ("upstream: {default: zzz}", "upstream.default", "there is no upstream 'zzz'", "known: openrouter"),
        ("catalogue: {refresh: often}", "catalogue.refresh", "'often' is not a duration", "write 30s, 5m, 1h30m"),
        ("catalogue: {overrides: {a/b: {input: free}}}", 'catalogue.overrides["a/b"].input',
         "must be a number, not 'free'", None),
        ("catalogue: {overrides: {a: {input: -1}}}", "catalogue.overrides.a.input", "must be greater than or equal to 0, not -1", None),
        ("catalogue: {overrides: {a: {input: 1.1234567}}}", "catalogue.overrides.a.input", None, None),
        ("catalogue: {overrides: {a: {max_output: 0}}}", "catalogue.overrides.a.max_output",
         "must be greater than or equal to 1, not 0", None),
        ("catalogue: {overrides: {a: {upstream: openruter}}}", "catalogue.overrides.a.upstream",
         "there is no upstream 'openruter'", "did you mean 'openrouter'?"),
        ("plugins: rate_limit", "plugins", "must be a list, not 'rate_limit'", None),
        ("plugins: [rate_limit]", "plugins[0]", "must be a mapping, not 'rate_limit'", None),
        ("plugins: [{use: a, on_error: warn}]", "plugins[0].on_error", "must be 'fail' or 'ignore', not 'warn'", None),
        ("plugins: [{use: a, when: {endpoint: /v1/chat/completions}}]", "plugins[0].when.endpoint",
         "'/v1/chat/completions' meets no endpoint: they are called without /v1/", "write 'chat/completions'"),
        ("plugins: [{use: a, when: {endpoint: [embeddings, /api/v1/images/*]}}]", "plugins[0].when.endpoint",
         "'/api/v1/images/*' meets no endpoint: they are called without /api/v1/", "write 'images/*'"),
        ("plugins: [{use: a, config: [x]}]", "plugins[0].config", "must be a mapping, not a list", None),
        ("plugins: [{use: a, id: b c}]", "plugins[0].id", None, None),
        ("plugins: [{use: ./a.py}]", "plugins[0].use", "is neither a plugin's name nor a file",
         "such as rate_limit or ./my_plugin.py:Plugin"),
        ("plugins: [{use: a, when: {role: x}}]", "plugins[0].when.role", "unknown key", "did you mean 'roles'?"),
        ("plugins: [{use: a, when: {roles: []}}]", "plugins[0].when.roles", "must not be empty", None),
        ("plugins: [{use: a, when: {roles: 5}}]", "plugins[0].when.roles", "must be text, not 5", "put it in quotes"),
        ("plugins: [{use: a, when: {stream: yes}}]", "plugins[0].when.stream", "must be true or false, not 'yes'", None),
    ],
)  # fmt: skip
def test_plain_words(yaml_text, path, message, hint):
    """Each kind of mistake is said in plain words, at its path, with a hint where one helps."""
    problem = only(KEY + yaml_text)
    assert path == problem.path
    assert message in {None, problem.message}
    assert hint in {None, problem.hint}
    assert problem.line == 2


NO_URL = "is not an http(s) URL without user, query and fragment"


def upstream_problem(fields):
    return only(f"upstream: {{default: o}}\nupstreams:\n  o: {{{fields}}}\n")


@pytest.mark.parametrize(
    "fields, path, message",
    [
        ("api_key: k, base_url: ftp://x", "base_url", NO_URL),
        ("api_key: k, base_url: x", "base_url", NO_URL),
        ("api_key: k, base_url: 'http://x y'", "base_url", NO_URL),
        ("api_key: k, base_url: 'http://x:port'", "base_url", NO_URL),
        ("api_key: k, base_url: 'http://u:canary@x'", "base_url", NO_URL),
        ("api_key: k, base_url: 'http://x?k=canary'", "base_url", NO_URL),
        ("api_key: k, base_url: 'http://x#'", "base_url", NO_URL),
        ("api_key: k, kind: openai", "base_url", "is required for kind openai"),
        ("api_key: k, kind: openai, base_url: 'http://x', provider: {}", "provider",
         "only an upstream of kind openrouter has provider preferences"),
        ("api_key: ''", "api_key", "there is no key for this upstream"),
        ("api_key: ", "api_key", "there is no key for this upstream"),
        ("kind: openrouter", "api_key", "there is no key for this upstream"),
        ("api_key: 'can ary'", "api_key", "holds blanks or characters that a header can't carry"),
        ("api_key: k, headers: {a b: c}", 'headers["a b"]', "must match pattern '^[!#$%&'*+.^_`|~0-9A-Za-z-]+$'"),
        ("api_key: k, headers: {Host: c}", "headers.Host", "the gateway sets 'host' itself"),
        ('api_key: k, headers: {X: "a\\nb"}', "headers.X", "must match pattern '^[^\\x00-\\x08\\x0a-\\x1f\\x7f]*$'"),
        ("api_key: k, provider: cheap", "provider", "must be a mapping, not 'cheap'"),
    ],
)  # fmt: skip
def test_upstreams(fields, path, message):
    """An upstream needs a clean http(s) URL, a key, and only what its kind understands; no secret is printed."""
    problem = upstream_problem(fields)
    assert (f"upstreams.o.{path}", message) == (problem.path, problem.message)
    assert problem.line == 3
    assert "canary" not in str(problem)


def test_upstreams_without_key():
    """Without a key an upstream may simulate, or be asked without one; the hint tells of both."""
    text = "upstreams:\n  openrouter:\n    api_key: ${OR_KEY:-}\n"
    hint = only(text).hint
    assert "`without_key: simulate`" in hint
    assert "`allow`" in hint
    for key in (text, text.replace("${OR_KEY:-}", "'${OR_KEY:-}'")):
        for choice in ("simulate", "allow"):
            upstream = load_text(key + f"    without_key: {choice}\n", env={}).settings.upstreams["openrouter"]
            assert (upstream.api_key, upstream.without_key) == (None, choice)
    local = load_text("upstreams: {openrouter: {kind: openai, base_url: 'http://x', without_key: allow}}").settings
    assert local.upstreams["openrouter"].api_key is None
    assert Settings(upstreams={"openrouter": {"without_key": "simulate"}}).upstream.default == "openrouter"


def test_upstreams_by_name():
    """Upstreams have plain names, at least one, and each is its own."""
    loaded = load_text(
        "upstream: {default: local_1}\nupstreams:\n"
        "  local_1: {kind: openai, base_url: 'http://127.0.0.1:8000/v1/', api_key: k, headers: {X-Team: a}}\n"
        "  openrouter: {api_key: k, provider: {sort: price}}\n"
    ).settings
    assert list(loaded.upstreams) == ["local_1", "openrouter"]
    assert loaded.upstreams["local_1"].base_url == "http://127.0.0.1:8000/v1"
    assert loaded.upstreams["local_1"].headers == {"x-team": "a"}
    assert loaded.upstreams["openrouter"].provider == {"sort": "price"}
    assert only(KEY.replace("}}", "}, Ü: {api_key: k}}")).message == "must match pattern '^[a-z0-9_-]+$'"
    assert [problem.message for problem in problems("upstreams: {}")] == ["must not be empty"]


@pytest.mark.parametrize(
    "name",
    [
        "authorization",
        "X-API-Key",
        "api-key",
        "Cookie",
        "proxy-authorization",
        "X-Forwarded-For",
        "x-forwarded-anything",
        "forwarded",
        "Host",
        "x-openrouter-cache",
        "X-OpenRouter-Cache-TTL",
        "connection",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "proxy-connection",
        "proxy-authenticate",
        "content-length",
        "x-real-ip",
    ],
)
def test_headers_that_never_go_upstream(name):
    """Credentials, cookies, forwarding and hop-by-hop headers can't be let through by configuration."""
    problem = only(KEY + f"upstream: {{forward_headers: [x-fine, {name}]}}")
    assert (problem.path, problem.line) == ("upstream.forward_headers[1]", 2)
    assert load_text(KEY + "upstream: {forward_headers: [X-Fine]}").settings.upstream.forward_headers == ("x-fine",)


def test_prices():
    """Prices are exact decimals in USD per million tokens."""
    text = (
        KEY
        + "catalogue: {refresh: 0, overrides: {a/b: {input: 0.15, output: '0.6', cache_read: 0, context_length: 8}}}"
    )
    override = load_text(text).settings.catalogue.overrides["a/b"]
    assert (Decimal("0.15"), Decimal("0.6"), Decimal(0), None) == (
        override.input, override.output, override.cache_read, override.cache_write,
    )  # fmt: skip
    assert (override.context_length, override.max_output, override.upstream) == (8, None, None)


def test_plugin_entries():
    """Plugins keep their order; an entry's id is what it uses, or a file's class; `when` takes one or many."""
    entries = load_text(
        KEY
        + "plugins:\n- use: api_keys\n- use: ./dir/my plugin.py:Plugin\n- use: x.py:Other\n- use: api_keys\n  id: second\n"
        "  when: {endpoint: chat/completions, roles: [free], stream: false, phase: [live, run], models: 'openai/*'}\n"
        "  on_error: ignore\n  config: {on: 1}\n"
    ).settings.plugins
    assert [entry.id for entry in entries] == ["api_keys", "my_plugin", "Other", "second"]
    when = entries[3].when
    assert (
        when.endpoint, when.roles, when.stream, when.phase, when.models, when.teams,
    ) == (("chat/completions",), ("free",), False, ("live", "run"), ("openai/*",), None)  # fmt: skip
    assert (entries[3].on_error, entries[3].config) == ("ignore", {"on": 1})


def test_plugin_ids_are_unique():
    """A second plugin with the same id is refused with both lines, whether the id is given or not."""
    problem = only(KEY + "plugins:\n- use: a\n- use: b\n- use: a\n")
    assert (problem.line, problem.path) == (5, "plugins[2].use")
    assert "stands on line 3 already" in problem.message
    assert only(KEY + "plugins:\n- use: a\n- use: b\n  id: a\n").path == "plugins[1].id"


def test_sound_plugins_are_known_despite_mistakes():
    """The plugin loader can judge each sound entry although the file has mistakes elsewhere."""
    examined = examine_text(KEY + "server: {prot: 1}\nplugins:\n- {use: a, config: {x: 1}}\n- {}\n- {use: c}\n", env={})
    assert examined.settings is None
    assert [(index, entry.use, entry.config) for index, entry in examined.plugins()] == [
        (0, "a", {"x": 1}),
        (2, "c", {}),
    ]


# --- other models: plugins' settings -----------------------------------------------------------------------


class Rule(BaseModel):
    model_config = ConfigDict(extra="forbid")
    limit: int = Field(gt=0)
    mode: Literal["soft", "hard"] = "soft"
    target: int | list[int] = 0
    token: SecretStr | None = None
    ratio: float = 0.5
    hook: AnyUrl | None = None

    @field_validator("mode", mode="after")
    @classmethod
    def _quotes_its_value(cls, value):
        if value == "hard":
            raise ValueError(f"not {value} today")
        return value


class Rules(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rules: dict[str, list[Rule]] = {}
    secret: str = ""

    @model_validator(mode="after")
    def _quotes_its_secret(self):
        if self.secret:
            raise ValueError(f"bad secret {self.secret}")
        return self


def rules(config, env=None):
    source = examine_text(f"plugins:\n- use: p\n  config:\n{config}", env=env or {}).source
    model, found = source.validate(Rules, ("plugins", 0, "config"))
    assert (model is None) == bool(found)
    return found


def test_plugin_settings():
    """A plugin's own settings are judged like the gateway's: line, whole path, plain words, hints."""
    found = rules(
        "    rules:\n      a/b:\n      - limit: 0\n        mod: soft\n      - {limit: 1, mode: sft, target: x}\n"
        "      - {ratio: much, limit: 5}\n      - {}\n      - {limit: 1, mode: hard}\n    rulez: {}\n"
    )
    base = 'plugins[0].config.rules["a/b"]'
    assert [
        f"<text>:6:16: {base}[0].limit: must be greater than 0, not 0",
        f"<text>:7:9: {base}[0].mod: unknown key (did you mean 'mode'?)",
        f"<text>:8:26: {base}[1].mode: must be 'soft' or 'hard', not 'sft' (did you mean 'soft'?)",
        f"<text>:8:39: {base}[1].target: must be a whole number, not 'x', or must be a list, not 'x'",
        f"<text>:9:17: {base}[2].ratio: must be a number, not 'much'",
        f"<text>:10:9: {base}[3].limit: is required",
        f"<text>:11:26: {base}[4].mode: not hard today",
        "<text>:12:5: plugins[0].config.rulez: unknown key (did you mean 'rules'?)",
    ] == [str(problem) for problem in found]


def test_no_secret_is_printed():
    """No message holds a secret: not from a secret field, not from `${}`, not quoted by a plugin's validator."""
    env = {"SECRET": "canary", "MODE": "hard", "KEYS": "canary"}
    found = rules("    secret: ${SECRET}\n", env) + rules(
        "    rules:\n      a:\n      - limit: ${SECRET}\n        mode: ${SECRET}\n        token: [canary]\n"
        "        ratio: pre-${SECRET}\n      - limit: 1\n        mode: ${MODE}\n        token: {canary: 1}\n",
        env,
    )
    assert [problem.message for problem in found] == [
        f"bad secret {MASK}",
        "must be a whole number, not the value given",
        "must be 'soft' or 'hard', not the value given",
        "must be text, not a list",
        "must be a number, not the value given",
        f"not {MASK} today",
        "must be text, not a mapping",
    ]
    text = (
        "server: {pepper: canary, port: '${SECRET}', host: [canary], header_timeout: '${SECRET}', max_body: 1canaryB}\n"
        "log: {level: '${SECRET}'}\nupstream: {default: '${SECRET}', forward_headers: ['x ${SECRET}', '${COOKIE}']}\n"
        "upstreams: {o: {api_key: 'canary ', base_url: 'http://u:canary@h', headers: {x: [canary]}}}\n"
        "plugins: [{use: '?${SECRET}', id: '/${SECRET}', when: 'http://u:canary@h'}]\n"
    ).replace("1canaryB", "'http://u:canary@h'")
    found = problems(text, {**env, "COOKIE": "cookie"})
    assert len(found) >= 14
    for problem in found:
        assert "canary" not in str(problem)
        assert "'cookie'" not in str(problem)


def test_secrets_in_wrong_places():
    """A URL, a repeated id and a number where a secret belongs are refused without their values."""
    found = rules("    rules: {a: [{limit: 1, token: 4711, hook: 'canary://[x'}]}\n")
    assert [problem.message for problem in found] == [
        "must be text, not the value given",
        "must be a valid URL, invalid IPv6 address, not the value given",
    ]
    text = KEY + "plugins: [{use: '${A}'}, {use: '${A}'}, {use: b, id: '${A}'}]"
    messages = [problem.message for problem in problems(text, {"A": "canary"})]
    assert messages == ["a plugin with this id stands on line 2 already"] * 2


def test_masked():
    """A dump shows settings as people write them, and neither secrets nor what came from `${}`."""
    loaded = load_text(
        "server: {pepper: canary-canary-canary, host: '${HOST}'}\n"
        "upstreams: {openrouter: {api_key: canary, headers: {x-key: canary}, provider: {order: ['${HOST}']}}}\n"
        "plugins:\n- use: a\n  config: {url: 'redis://u:canary@h/0', token: canary, x: ['${HOST}', 5], none: null, limit: 3}\n",
        env={"HOST": "canary"},
    )
    dump = masked(loaded.settings, loaded.source)
    assert "canary" not in json.dumps(dump)
    assert tuple(dump["server"][name] for name in ("pepper", "host", "port", "max_body", "request_timeout")) == (
        MASK,
        MASK,
        8080,
        "20MiB",
        "10m",
    )
    upstream = dump["upstreams"]["openrouter"]
    assert (
        upstream["api_key"],
        upstream["headers"],
        upstream["provider"],
    ) == (MASK, {"x-key": MASK}, {"order": [MASK]})
    expected = {"url": f"redis://{MASK}@h/0", "token": MASK, "x": [MASK, 5], "none": None, "limit": 3}
    assert expected == dump["plugins"][0]["config"]
    assert "x-key" not in repr(loaded.settings)


def test_masked_by_name():
    """A plugin's setting that is called like a secret, all of its headers, and such parts of an address's query."""
    names = ("auth", "passphrase", "bearer", "dsn", "signature")
    config = {
        **dict.fromkeys(names, "canary"),
        "nested": {"headers": {"X-Other": "canary"}},
        "url": "postgresql://u:canary@h/db?password=canary&sslmode=require",
    }
    loaded = load_text(f"{KEY}plugins: [{{use: a, config: {json.dumps(config)}}}]")
    shown = masked(loaded.settings, loaded.source)["plugins"][0]["config"]
    assert "canary" not in json.dumps(shown)
    assert shown["url"] == f"postgresql://{MASK}@h/db?password={MASK}&sslmode=require"


def test_masked_as_plugins_understand_it():
    """A plugin's settings are shown with their defaults; its secrets are masked whatever they are called."""

    class Config(BaseModel):
        place: SecretStr
        names: Annotated[list[str], BeforeValidator(lambda text: text.split())]
        limit: int = 3

    loaded = load_text(
        KEY + "plugins: [{use: a, config: {place: canary, names: '${NAMES}'}}]", env={"NAMES": "canary canary"}
    )
    config, _ = loaded.source.validate(Config, ("plugins", 0, "config"))
    shown = masked(loaded.settings, loaded.source, [config])
    assert shown["plugins"][0]["config"] == {"place": MASK, "names": [MASK, MASK], "limit": 3}


def test_the_same_once_more(tmp_path):
    """Who has the text and what its `${file:…}` held reads the same settings, whatever became of the files."""
    (tmp_path / "key").write_text("first\n")
    text = "upstreams: {openrouter: {api_key: '${file:key}'}}"
    loaded = load_text(text, base=tmp_path)
    assert loaded.source.files == {str(tmp_path / "key"): "first\n"}
    (tmp_path / "key").write_text("second")
    again = load_text(text, base=tmp_path, files=loaded.source.files)
    assert again.settings == loaded.settings
    assert load_text(text, base=tmp_path).settings != loaded.settings


# --- the schema -------------------------------------------------------------------------------------------


def validate(text, **schemas):
    # Editors read the text before ${…} is replaced.
    jsonschema.Draft202012Validator(json_schema(schemas)).validate(yaml.safe_load(text))


def test_schema_takes_what_the_settings_take():
    """The schema lets through what the settings take: units, `${…}` in place of numbers, one or many."""
    jsonschema.Draft202012Validator.check_schema(json_schema())
    validate(
        KEY + "server: {port: '${PORT:-8080}', header_timeout: 10s, max_body: 1048576, allow_anonymous: '${X}'}\n"
        "upstream: {client_may: [models, '${X}']}\nlog: {level: '${LEVEL:-info}'}\n"
        "catalogue: {overrides: {a/b: {input: 0.15, context_length: '${X}'}}}\n"
        "plugins: [{use: a, when: {roles: free, phase: [live]}, config: {any: 1}}]\n"
    )


@pytest.mark.parametrize(
    "text",
    ["prot: 1", "server: {prot: 1}", "server: {port: 70000}", "server: {port: x}", "server: {header_timeout: 10 sec}",
     "server: {allow_anonymous: 'yes'}", "log: {level: wran}", "upstreams: {}", "upstreams: {A: {}}", "plugins: [{}]",
     "plugins: [{use: a, when: {role: x}}]", "plugins: [{use: p, config: {rules: {a: [{limit: 0}]}}}]",
     "plugins: [{use: p, config: {rulez: {}}}]", "catalogue: {overrides: {a: {max_output: 0}}}"],
)  # fmt: skip
def test_schema_refuses_what_the_settings_refuse(text):
    """An editor marks the same mistakes, those in a plugin's settings too."""
    with pytest.raises(jsonschema.ValidationError):
        validate(text, p=Rules.model_json_schema())


def test_schema_of_plugins():
    """A plugin's schema holds for its entries only, and definitions of the same name don't clash."""

    class When(BaseModel):
        day: Literal["monday"]

    class Config(BaseModel):
        when: When

    original = Config.model_json_schema()
    before = json.dumps(original)
    validate(
        "plugins: [{use: q, config: {when: {day: monday}}, when: {roles: x}}, {use: r, config: {when: 5}}]",
        q=original,
    )
    with pytest.raises(jsonschema.ValidationError):
        validate("plugins: [{use: q, config: {when: {day: sunday}}}]", q=original)
    assert before == json.dumps(original)


def test_schema_explains():
    """Each setting has a description with its default, and defaults are written as people write them."""
    definitions = json_schema()["$defs"]
    assert definitions["ServerSettings"]["properties"]["max_body"]["default"] == "20MiB"
    assert definitions["ServerSettings"]["properties"]["request_timeout"]["default"] == "10m"
    for model in (*definitions.values(), json_schema()):
        for name, field in model.get("properties", {}).items():
            assert "Default" in field["description"] or "Required" in field["description"], name
            default = field.get("default")
            if isinstance(default, str | int) and default is not None:
                shown = str(default).lower() if isinstance(default, bool) else str(default)
                assert f"Default {shown}" in field["description"], name
    assert Settings.__doc__ == json_schema()["description"]


@pytest.mark.parametrize(
    "line",
    [
        "redis: 'redis://:zq/ss@host:6379'",
        "redis: 'rediss://u:zq#ss@host/0'",
        "database: 'postgresql://u:zq?ss@host/name'",
        "database: {url: sqlite, migrate_url: 'postgresql://u:zq/ss@host/name'}",
    ],
)
def test_a_password_that_ends_its_address_early_is_a_mistake(line):
    """Characters that must be written as %xx are named with their line; nothing of the password is shown."""
    with pytest.raises(ConfigError) as refused:
        load_text(f"{KEY}services:\n  {line}\n")
    shown = str(refused.value)
    assert ":3:" in shown
    assert "%2F" in shown
    assert "zq" not in shown
