"""Structured logs: one JSON line an event (pretty on a terminal). Hostile bytes never break a line, nor make it long.

What libraries log, warnings, and exceptions that nobody caught become the same lines. Lines that are written while a
request is handled carry its id.
"""

from __future__ import annotations

import fcntl
import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gateway.exchange import Exchange
    from gateway.settings import LogSettings

# structlog's, for all others: whoever imports it first decides about rich.
__all__ = ["bind_contextvars", "get_logger"]


@contextmanager
def _as_if_missing(name: str) -> Iterator[None]:
    """Who imports it meanwhile is told that it isn't installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say so
    try:
        yield
    finally:
        del sys.modules[name]


with _as_if_missing("rich"):  # typer brings it; a tenth of the start and 5 MB, for tracebacks other than ours
    import structlog
    from structlog import get_logger
    from structlog.contextvars import bind_contextvars


class _Handles(Protocol):
    exchange: Exchange | None


# What handles a request in the running task; it forgets the exchange when that is over, tasks that remember it or not.
handling: ContextVar[_Handles | None] = ContextVar("handling", default=None)

MOST_TEXT = 10_000  # characters of one value
MOST_TRACEBACK = 50_000
MOST_LINE = 200_000
MOST_ITEMS = 100
MOST_LEVELS = 20
# More is read than is shown: half a secret at the cut would not be seen to be one. A token has 16 KiB at most.
_MARGIN = 20_000

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
# Keys by their scannable prefixes, bearer tokens, JWTs.
_KEY = re.compile(r"(\bsk-[A-Za-z0-9]+-|\b[Bb]earer +|\beyJ)[A-Za-z0-9_.~+/=-]{12,}")
_SHORTEST = 8
_WORDS = frozenset({"embedded", "memory"})  # stand where a secret address may
_OURS = frozenset({"level", "timestamp"})
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but \n and \t
_BREAKS = re.compile("[\x7f-\x9f\u2028\u2029]")
_hidden: set[str] = set()
_secret: set[str] = set()


def hide(secrets: Iterable[str], *, everywhere: bool = False) -> None:
    """These never stand in a traceback or in what libraries say, however written; `everywhere`: in no line at all.

    What a configuration takes from its environment may be an ordinary word, and would be missing in ordinary lines.
    """
    for secret in (part for text in secrets for part in (text, *text.splitlines())):
        if len(secret) >= _SHORTEST and secret not in _WORDS:
            forms = _written(secret)
            _hidden.update(forms)
            if everywhere:
                _secret.update(forms)


def _written(secret: str) -> set[str]:
    """As exceptions write it: plain, in quotes, as JSON, in a URL; and a quoted one within JSON."""
    with suppress(UnicodeEncodeError):
        plain = {secret, repr(secret)[1:-1], ascii(secret)[1:-1], repr(secret.encode())[2:-1], quote(secret, safe="")}
        return plain.union(*({json.dumps(form, ensure_ascii=a)[1:-1] for a in (True, False)} for form in plain))
    return {secret, repr(secret)[1:-1], ascii(secret)[1:-1]}


def scrub(text: str, *more: str | None) -> str:
    """The text without what looks like a key, without what `hide` was told, and without `more`."""
    return _scrubbed(text, {*_hidden, *filter(None, more)})


def without_keys(text: str) -> str:
    """As log lines show a text: without what looks like a key and what is hidden everywhere."""
    return _scrubbed(text, _secret)


def looks_like_key(text: str) -> bool:
    return _KEY.search(text) is not None


def _scrubbed(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, "***")
    return _KEY.sub(r"\1***", text)


def worth_a_line(count: int) -> bool:
    """The first, second, fourth, eighth … of many alike: a line for each would be a flood."""
    return count & (count - 1) == 0


def setup(settings: LogSettings) -> None:
    """Log to standard error: standard output belongs to the access log."""
    pretty = settings.format == "pretty" or (settings.format == "auto" and sys.stderr.isatty())
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _of_the_request,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _pretty if pretty else _json_line,
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.level]),
        logger_factory=_Lines,
        cache_logger_on_first_use=False,
    )
    # Libraries that log by themselves (aiohttp, asyncio) say only what is worse than a warning.
    handler = _ForeignLines()
    handler.setFormatter(_Foreign(processors))
    logging.basicConfig(level=max(logging.WARNING, _LEVELS[settings.level]), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    logging.raiseExceptions = False
    logging.captureWarnings(capture=True)
    sys.excepthook = _uncaught
    sys.unraisablehook = _unraisable
    threading.excepthook = _uncaught_in_thread


_NOT_THERE = (OSError, ValueError, AttributeError)  # closed at some time, or from the beginning: then it is None
_writing = threading.RLock()  # again by whoever has it: a destructor may log at any moment


def _put(line: str) -> None:
    """To standard error, whole. One that nobody reads any more fails nothing."""
    with _writing, suppress(*_NOT_THERE), _alone():
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


@contextmanager
def _alone() -> Iterator[None]:
    """No other worker writes: a pipe takes PIPE_BUF bytes at once, and a line with a traceback is longer."""
    try:
        descriptor = sys.stderr.fileno()
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
    except _NOT_THERE:
        yield
        return
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN)


class _Lines:
    """Where structlog's lines go."""

    def __init__(self, *_: Any) -> None: ...

    def msg(self, message: str) -> None:
        _put(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


class _ForeignLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _put(self.format(record))


class _Foreign(logging.Formatter):
    """What libraries log by `logging`, as lines like ours, with the logger's name."""

    def __init__(self, processors: list[Any]) -> None:
        super().__init__()
        self._processors = processors

    def format(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - its arguments do not fit; that is no reason to lose it
            message = f"{_said(record.msg)} {_said(record.args)}"
        event: Any = {"event": _text(message, _hidden), "logger": record.name, "exc_info": record.exc_info}
        level = next((name for name, least in reversed(_LEVELS.items()) if record.levelno >= least), "debug")
        for process in self._processors:
            event = process(None, level, event)
        return str(event)


def _uncaught(kind: type[BaseException], error: BaseException, _: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    structlog.get_logger("gateway").critical("uncaught_exception", exc_info=error)


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = args.thread.name if args.thread is not None else None
        structlog.get_logger("gateway").error("thread_failed", thread=name, exc_info=args.exc_value)


def _unraisable(args: Any) -> None:
    """An error where none can be raised, such as in `__del__`."""
    what = f"{args.err_msg or 'Exception ignored in'}: {type(args.object).__qualname__}"
    structlog.get_logger("gateway").error("unraisable_exception", where=what, exc_info=args.exc_value)


def _of_the_request(_logger: Any, _name: str, event: Any) -> Any:
    handles = handling.get()
    if handles is not None and (exchange := handles.exchange) is not None:
        if event.get("request_id") is None:
            event["request_id"] = exchange.request_id
        if event.get("credentials") is None:
            event["credentials"] = exchange.credentials
    return event


# --- one line --------------------------------------------------------------------------------------------------------


def _json_line(_logger: Any, _name: str, event: Any) -> str:
    tokens, exception = _taken_out(event)
    fields = _tamed_fields(event, tokens)
    if exception is not None:
        fields["exception"] = _tamed(_traceback(exception), {*_hidden, *tokens})
    line = _encoded(fields)
    if len(line) > MOST_LINE:
        items = list(fields.items())[:MOST_ITEMS]
        line = _encoded({k: v if k in _OURS else _text(_encoded(v), (), MOST_ITEMS) for k, v in items})
    return line


def _pretty(logger: Any, name: str, event: Any) -> str:
    tokens, exception = _taken_out(event)
    fields = {key: _printable(value) for key, value in _tamed_fields(event, tokens).items()}
    if exception is not None:
        try:
            shown = "".join(traceback.format_exception(exception)).rstrip()
        except Exception as error:  # noqa: BLE001 - an exception that can't even be shown
            shown = _unshown(exception, error)
        shown = _text(shown, {*_hidden, *tokens}, MOST_TRACEBACK)
        fields["exception"] = _CONTROL.sub(lambda m: ascii(m[0])[1:-1], shown)
    return str(_console(logger, name, fields))


def _encoded(value: Any) -> str:
    """As JSON, in what everybody takes for one line."""
    text = msgspec.json.encode(value).decode()
    return text if text.isascii() and "\x7f" not in text else _BREAKS.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


_console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
_transform = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=12)


def _taken_out(event: Any) -> tuple[tuple[str, ...], BaseException | None]:
    """The request's tokens, which are not shown, and the exception, which is shown in its own way."""
    credentials = event.pop("credentials", None)
    tokens = (credentials.bearer, credentials.api_key) if credentials is not None else ()
    error = event.pop("exc_info", None)
    if isinstance(error, tuple):
        error = error[1]
    elif error and not isinstance(error, BaseException):
        error = sys.exc_info()[1]
    return tuple(filter(None, tokens)), error or None


def _traceback(error: BaseException) -> Any:
    """Without local variables, which hold prompts and keys."""
    try:
        return _transform((type(error), error, error.__traceback__))
    except Exception as failure:  # noqa: BLE001 - an exception that can't even be shown
        return _unshown(error, failure)


def _unshown(error: BaseException, failure: Exception) -> str:
    return f"{type(error).__name__} ({type(failure).__name__} when it was to be shown)"


def _tamed_fields(event: Any, tokens: tuple[str, ...]) -> dict[str, Any]:
    secrets = {*_secret, *(token for token in tokens if len(token) >= _SHORTEST)}
    return {_text(str(k), ()): v if k in _OURS and type(v) is str else _tamed(v, secrets) for k, v in event.items()}


def _tamed(value: Any, secrets: Iterable[str], level: int = 0) -> Any:
    """JSON of bounded size, valid UTF-8, without secrets."""
    if value is None or type(value) in (bool, int, float):
        return value if type(value) is not int or abs(value) < 1 << 63 else _text(hex(value), ())
    if isinstance(value, str):
        return _text(str(value), secrets)
    if level < MOST_LEVELS and isinstance(value, Mapping):
        items = list(value.items())
        return {_text(_said(key), secrets): _tamed(item, secrets, level + 1) for key, item in items[:MOST_ITEMS]}
    if level < MOST_LEVELS and isinstance(value, list | tuple | set | frozenset):
        return [_tamed(item, secrets, level + 1) for item in list(value)[:MOST_ITEMS]]
    return _text(_said(value), secrets)


def _said(value: Any) -> str:
    try:
        return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
    except Exception as error:  # noqa: BLE001 - whatever it is, a line about it must not fail
        return f"<{type(value).__name__}: {type(error).__name__}>"


def _text(text: str, secrets: Iterable[str], most: int = MOST_TEXT) -> str:
    size = len(text)
    if size > most:
        text = text[: most + _MARGIN]
    if not text.isascii():
        text = text.encode(errors="backslashreplace").decode()
    text = _scrubbed(text, secrets)
    return text if size <= most else f"{text[:most][: max(0, len(text) - _MARGIN)]}… ({size} characters)"


def _printable(value: Any) -> Any:
    """Nothing that steers a terminal or makes a line look like two."""
    if isinstance(value, str) and not value.isprintable():
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value)
    return value
