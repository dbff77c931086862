"""Structured logs: one JSON line an event (pretty on a terminal). Hostile bytes never break a line."""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gateway.settings import LogSettings

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
# Keys by their scannable prefixes, bearer tokens, JWTs.
_KEY = re.compile(r"(\bsk-[A-Za-z0-9]+-|\b[Bb]earer +|\beyJ)[A-Za-z0-9_.~+/=-]{12,}")
_hidden: set[str] = set()


def hide(secrets: Iterable[str]) -> None:
    """These never stand in a logged traceback, whoever put them into an exception's message."""
    for secret in secrets:
        if len(secret) >= 8:
            _hidden.update((secret, msgspec.json.encode(secret)[1:-1].decode()))


def scrub(text: str, *more: str | None) -> str:
    """The text without what looks like a key, without what `hide` was told, and without `more`."""
    for secret in (*_hidden, *more):
        if secret:
            text = text.replace(secret, "***")
    return _KEY.sub(r"\1***", text)


def worth_a_line(count: int) -> bool:
    """The first, second, fourth, eighth … of many alike: a line for each would be a flood."""
    return count & (count - 1) == 0


def setup(settings: LogSettings) -> None:
    """Log to standard error: standard output belongs to the access log."""
    pretty = settings.format == "pretty" or (settings.format == "auto" and sys.stderr.isatty())
    renderers: list[Any] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if pretty
        else [structlog.processors.dict_tracebacks, _json_line]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _shown_exceptions(pretty=pretty),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries that log by themselves (aiohttp, asyncio) say only what is worse than a warning.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Scrubbed("%(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.ERROR)


class _Scrubbed(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


def _shown_exceptions(*, pretty: bool) -> Any:
    """Tracebacks without local variables, which hold prompts and keys, and without keys in their messages."""
    transform = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=12)
    formatter = structlog.processors.format_exc_info if pretty else structlog.processors.ExceptionRenderer(transform)

    def show(logger: Any, name: str, event: Any) -> Any:
        credentials = event.pop("credentials", None)
        if not event.get("exc_info"):
            return event
        event = formatter(logger, name, event)
        tokens = (credentials.bearer, credentials.api_key) if credentials is not None else ()
        shown = event.get("exception")
        event["exception"] = scrub(shown, *tokens) if isinstance(shown, str) else _scrubbed_json(shown, tokens)
        return event

    return show


def _scrubbed_json(frames: Any, tokens: tuple[str | None, ...]) -> Any:
    try:
        return msgspec.Raw(scrub(msgspec.json.encode(frames, enc_hook=str).decode(), *tokens).encode())
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError):
        return scrub(ascii(frames), *tokens)


def _json_line(_logger: Any, _name: str, event: Any) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=str).decode()
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError):
        return msgspec.json.encode({str(k): ascii(v)[:500] for k, v in event.items()}).decode()
