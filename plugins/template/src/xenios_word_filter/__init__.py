"""Word filter: refuses a request whose last message from the user holds one of certain words.

Words are compared whole and without regard to case: `tulip` is found in "Tulip!" and not in "tulips". A request that
was looked at gets the reply header `x-word-filter: passed` or `refused`; the word itself is not told.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gateway import ContextKey, Finding, Refused, hookimpl

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from gateway import Exchange, Services

HEADER = "x-word-filter"


class Config(BaseModel):
    """Which words are refused."""

    # extra="forbid": a typo in the YAML is a mistake that `xenios check` reports, never silently a default
    model_config = ConfigDict(extra="forbid", frozen=True)

    words: tuple[str, ...] = Field((), description="Words that are refused. Default none.")
    words_file: Path | None = Field(
        None, description="File with further words, one a line, relative to the working directory. Default none."
    )
    message: str = Field("This request holds a word that is not allowed here.", description="What the client is told.")

    @model_validator(mode="after")
    def _filters_something(self) -> Config:
        if not self.words and self.words_file is None:
            raise ValueError("refuses nothing: list `words`, or name a `words_file`")
        return self


class Plugin:
    """Refuses requests that hold certain words."""

    Config: TypeAlias = Config

    def __init__(self, config: Config, services: Services) -> None:
        # no I/O here: `xenios check` and a reload construct plugins that never run
        self._config = config
        self._log = services.log
        self._pattern = _pattern(config.words)
        self._verdict: ContextKey[str] = ContextKey("verdict")
        self.refused = 0

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """What must be opened, read or connected, and closed again."""
        if self._config.words_file is not None:
            text = await asyncio.to_thread(self._config.words_file.read_text, encoding="utf-8")
            self._pattern = _pattern((*self._config.words, *text.splitlines()))
        yield
        self._log.info("word_filter_stopped", refused=self.refused)

    @hookimpl
    async def check_request(self, exchange: Exchange) -> None:
        found = self._pattern.search(last_user_text(exchange.body))
        exchange.set(self._verdict, "refused" if found else "passed")
        if found:
            self.refused += 1
            raise self._refusal()

    @hookimpl
    def response_started(self, exchange: Exchange) -> None:
        # Also called for errors, and for requests that were refused before this plugin saw them: no verdict then.
        verdict = exchange.get(self._verdict)
        if verdict is not None:
            exchange.reply_headers[HEADER] = verdict

    @hookimpl
    async def explain(self, exchange: Exchange) -> Sequence[Finding] | None:
        """What check_request would do; here without counting it."""
        found = self._pattern.search(last_user_text(exchange.body))
        return [Finding("a word is not allowed", refuses=self._refusal())] if found else None

    def _refusal(self) -> Refused:
        return Refused(self._config.message, code="word_refused")


def last_user_text(body: dict[str, Any]) -> str:
    """What the user said last, in the bodies of /chat/completions, /messages and /responses; "" in any other."""
    turns = body.get("messages", body.get("input"))
    if isinstance(turns, str):
        return turns
    for turn in reversed(turns) if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("role") == "user":
            return _text(turn.get("content"))
    return ""


def _text(content: object) -> str:
    """A text, or those of its parts that are text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part["text"]) for part in parts if isinstance(part, dict) and "text" in part)


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    """One pattern for all words: it runs on every request."""
    wanted = "|".join(re.escape(word.strip()) for word in words if word.strip())
    # not \b: a word may end in other characters, as c++ does
    return re.compile(rf"(?<!\w)(?:{wanted})(?!\w)" if wanted else r"(?!)", re.IGNORECASE)
