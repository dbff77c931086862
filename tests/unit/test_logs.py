"""What stands in a log line, and what never does: one line each, whatever is in it."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import warnings

import pytest
import structlog
from plugin_objects import exchange

from gateway import logs
from gateway.settings import LogSettings

SECRET = 'pass"word\\with\n\u00e4ll-s\x1brts'
TOKEN = "token-of-a-client"


class _Credentials:
    bearer, api_key = TOKEN, None


@pytest.fixture
def log(capsys, monkeypatch):
    """Set up as a process does, in the given form; `lines()` are those that it wrote."""
    handlers, level, asyncio_level = logging.root.handlers[:], logging.root.level, logging.getLogger("asyncio").level
    for module, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    monkeypatch.setattr(logs, "_hidden", set())
    monkeypatch.setattr(logs, "_secret", set())

    class Log:
        def setup(self, form="json", level="info"):
            logs.setup(LogSettings(format=form, level=level))
            return structlog.get_logger("test")

        def text(self):
            return capsys.readouterr().err

        def lines(self):
            return [json.loads(line) for line in self.text().splitlines()]

    yield Log()
    logging.captureWarnings(capture=False)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.getLogger("asyncio").setLevel(asyncio_level)
    structlog.reset_defaults()


HOSTILE = {
    "newline": 'one\ntwo\r\n{"level": "error"}',
    "escape": "\x1b[2J\x1b]0;title\x07",
    "surrogate": "\udcff\ud800",
    "null": "a\x00b",
    "line separator": "a\u2028b\u0085c",
    "ten megabytes": "x" * 10_000_000,
    "bytes": b"\xff\xfe",
    "not a number": float("nan"),
    "huge number": 10**5000,
    "deep": json.loads("[" * 200 + "]" * 200),
    "keys": {"\udcff": 1, 2: "\n", None: ()},
    "many": list(range(100_000)),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("how", ["field", "event", "library", "exception", "note"])
def test_one_intact_line(what, how, log):
    """Whatever stands in an event, in what a library logs or in an exception: one line, valid, of bounded length."""
    logger, value = log.setup(), HOSTILE[what]
    match how:
        case "field":
            logger.info("event", value=value, other=1)
        case "event":
            logger.info(value, other=1)
        case "library":
            logging.getLogger("some.library").warning("said %s", value if what != "huge number" else hex(value))
        case _:
            try:
                error = ValueError(value)
                if how == "note":
                    error.add_note(str(value) if what != "huge number" else hex(value))
                raise error
            except ValueError:
                logger.exception("failed")
    text = log.text()
    assert text.endswith("\n")
    assert len(text.splitlines()) == text.count("\n") == 1
    assert len(text) < 2 * logs.MOST_LINE
    assert text.isprintable() or text[:-1].isprintable()
    line = json.loads(text)
    assert line["level"] in ("info", "warning", "error")
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize("what", ["newline", "escape", "surrogate", "null", "ten megabytes"])
def test_a_terminal_is_not_steered(what, log):
    """On a terminal a value is in one line too, and its control characters can be seen instead of acting."""
    log.setup("pretty").info("event", value=HOSTILE[what])
    text = log.text()
    assert "\x1b]0" not in text
    assert "\x00" not in text
    assert text.count("\n") == 1
    assert len(text) < 2 * logs.MOST_TEXT


def test_what_libraries_log_has_their_name_and_level(log):
    """Warnings and errors of libraries are lines as ours are; what they say for their developers is left out."""
    log.setup()
    logging.getLogger("aiohttp.server").error("bad %s", "request", exc_info=ValueError("why"))
    logging.getLogger("aiohttp.access").info("GET /")
    logging.getLogger("asyncio").warning("slow")
    logging.getLogger("broken").warning("%d bottles", "ten")
    warnings.showwarning("old", DeprecationWarning, "x.py", 3)
    error, broken, warning = log.lines()
    assert (error["level"], error["logger"], error["event"]) == ("error", "aiohttp.server", "bad request")
    assert error["exception"][0]["exc_value"] == "why"
    assert broken["event"] == "%d bottles ('ten',)"
    assert (warning["level"], warning["logger"]) == ("warning", "py.warnings")
    assert "DeprecationWarning: old" in warning["event"]


def test_exceptions_that_nobody_caught_are_lines(log):
    """The process's, a thread's, and one where none can be raised: each with its traceback, in one line."""
    log.setup()

    class Dies:
        def __del__(self):
            raise ValueError("in del")

    def fail():
        raise ValueError("in a thread")

    thread = threading.Thread(target=fail, name="worker")
    thread.start()
    thread.join()
    Dies()
    try:
        raise ValueError("in the process")
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    lines = log.lines()
    assert [line["event"] for line in lines] == ["thread_failed", "unraisable_exception", "uncaught_exception"]
    assert [line["exception"][0]["exc_value"] for line in lines] == ["in a thread", "in del", "in the process"]
    assert lines[0]["thread"] == "worker"
    assert lines[2]["level"] == "critical"


def raised(secret):
    """An exception with the secret wherever one can be: message, cause, context, notes, groups, repr, bytes, JSON."""
    local = secret  # noqa: F841 - local variables are not shown
    try:
        try:
            raise KeyError(secret)
        except KeyError as cause:
            raise ExceptionGroup(secret, [ValueError({"password": secret}), OSError(2, secret, secret)]) from cause
    except ExceptionGroup as group:
        group.exceptions[0].add_note(json.dumps({"note": secret}))
        group.add_note(repr(secret.encode()))
        try:
            raise RuntimeError(f"{secret!r} {secret!a} {secret}")
        except RuntimeError as error:
            return error


@pytest.mark.parametrize("form", ["json", "pretty"])
@pytest.mark.parametrize("secret", [SECRET, "plain-secret", "\u00fc" * 9, "with'single\"both", TOKEN])
def test_no_secret_in_a_traceback(secret, form, log):
    """Chained, grouped, noted, quoted and escaped: no form of a secret stands in what is logged of an exception."""
    logger = log.setup(form)
    if secret != TOKEN:
        logs.hide([secret])
    logger.error("failed", exc_info=raised(secret), credentials=_Credentials())
    if secret != TOKEN:
        logging.getLogger("library").error("it was %r", secret, exc_info=raised(secret))
        logging.getLogger("library").error("%s", json.dumps(secret))
    text = log.text()
    assert text.count("RuntimeError") >= 1
    assert text.count("KeyError") >= 1
    assert "***" in text
    for piece in (secret[:8], secret[-8:], repr(secret)[1:9], repr(secret)[-9:-1], ascii(secret)[1:9]):
        assert piece not in text, piece
        assert json.dumps(piece)[1:-1] not in text, piece


def test_a_secret_at_the_cut_is_none(log):
    """A long text is cut where it may be, not within a secret that would then not be seen to be one."""
    logger = log.setup()
    logs.hide(["0123456789abcdefghij"], everywhere=True)
    for before in range(logs.MOST_TEXT - 25, logs.MOST_TEXT + 5):
        logger.info("event", value="x" * before + "0123456789abcdefghij" + "y" * 100_000)
    assert all("0123" not in line["value"] for line in log.lines())


def test_secrets_of_the_configuration_stand_in_no_line(log):
    """A plugin that logs a key by its name logs three stars; words from the environment are words."""
    logger = log.setup()
    logs.hide(["production"])
    logs.hide(["sesame-open-sesame", "embedded"], everywhere=True)
    logger.info("production", key="sesame-open-sesame", more={"a": ["x sesame-open-sesame"]}, redis="embedded")
    logger.info("keys", value="Bearer abcdefghijklmnop sk-or-v1-0123456789abcdef", credentials=_Credentials(), x=TOKEN)
    first, second = log.lines()
    assert first["event"] == "production"
    assert (first["key"], first["more"], first["redis"]) == ("***", {"a": ["x ***"]}, "embedded")
    assert (second["value"], second["x"]) == ("Bearer *** sk-or-***", "***")
    assert "credentials" not in second


def test_a_closed_standard_error_fails_nothing(log, monkeypatch):
    """Whoever read the log is gone: requests go on."""
    logger = log.setup()

    class Gone:
        def write(self, _):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stderr", Gone())
    logger.error("event")


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_levels(level, log):
    """What is less severe than `log.level` is not logged."""
    logger, names = log.setup(level=level), ["debug", "info", "warning", "error"]
    for name in names:
        getattr(logger, name)(name)
    assert [line["event"] for line in log.lines()] == names[names.index(level) :]


def test_an_exchange_is_shown_by_its_id(log):
    """A plugin that logs a whole exchange writes nothing of the prompt or the key in it."""
    asked = exchange({"model": "m", "messages": [{"role": "user", "content": "a prompt"}]}, bearer=TOKEN)
    log.setup().error("odd", exchange=asked, text=f"{asked}")
    [line] = log.lines()
    assert line["exchange"] == line["text"] == f"<Exchange {asked.id}>"


def test_an_object_that_can_not_be_shown_is_named(log):
    """A broken `__str__` of a plugin's object breaks no line."""

    class Broken:
        def __str__(self):
            raise RuntimeError

    class BrokenError(Exception):
        __str__ = Broken.__str__

    logger = log.setup()
    logger.info("event", value=Broken())
    with contextlib.suppress(BrokenError):
        try:
            raise BrokenError
        except BrokenError:
            logger.exception("failed")
    first, second = log.lines()
    assert first["value"] == "<Broken: RuntimeError>"
    assert second["exception"][0]["exc_type"] == "BrokenError"


def test_what_a_library_can_not_even_say_is_a_line(log):
    """A message that can't be shown, or arguments that don't fit it."""

    class Broken:
        def __str__(self):
            raise RuntimeError("canary")

        __repr__ = __str__

    log.setup()
    logging.getLogger("some.library").error(Broken())
    logging.getLogger("some.library").error("%d of %s", Broken())  # noqa: PLE1206 - is what is tested
    one, two = log.lines()
    assert one["event"].startswith("<Broken: RuntimeError>")
    assert two["event"].startswith("%d of %s")


WORKER = """
import logging, structlog, sys
from gateway import logs
from gateway.settings import LogSettings

logs.setup(LogSettings(format="json"))
for _ in range(20):
    structlog.get_logger("test").info("long", one=sys.argv[1] * 9000, two=sys.argv[1] * 9000)
    structlog.get_logger("test").info("short")
    logging.getLogger("some.library").error(sys.argv[1] * 9000)
"""


def test_workers_do_not_mix_their_lines():
    """Three processes, one pipe that is always full, lines that it does not take at once: each line is whole."""
    reading, writing = os.pipe()
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, letter], stderr=writing) for letter in "abc"]
    os.close(writing)
    text = b"".join(iter(lambda: os.read(reading, 3000), b""))
    os.close(reading)
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 3 * 60
