"""Structured logs: one JSON line an event (pretty on a terminal). Hostile bytes never break a line."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

if TYPE_CHECKING:
    from gateway.settings import LogSettings

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def setup(settings: LogSettings) -> None:
    """Log to standard error: standard output belongs to the access log and the banner."""
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
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s", force=True
    )
    logging.getLogger("asyncio").setLevel(logging.ERROR)


def _shown_exceptions(*, pretty: bool) -> Any:
    """Tracebacks without local variables: those hold prompts and keys."""
    transform = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=12)
    formatter = structlog.processors.ExceptionRenderer(transform)
    return (lambda _logger, _name, event: event) if pretty else formatter


def _json_line(_logger: Any, _name: str, event: Any) -> str:
    try:
        return msgspec.json.encode(event, enc_hook=str).decode()
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError):
        return msgspec.json.encode({str(k): ascii(v)[:500] for k, v in event.items()}).decode()
