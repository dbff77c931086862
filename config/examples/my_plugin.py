"""House rules: a system prompt before every chat, and a bound on how long an answer may get."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from gateway import BadRequest, hookimpl

if TYPE_CHECKING:
    from gateway import Exchange, Services


class Config(BaseModel):
    """What the house wants."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preamble: str = Field("", description="System prompt that is put before every chat. Default none.")
    max_output_tokens: PositiveInt = Field(4000, description="Longest answer that may be asked for. Default 4000.")


class Plugin:
    """Edits each request before it goes out."""

    Config: TypeAlias = Config

    def __init__(self, config: Config, services: Services) -> None:
        del services  # log, catalogue, background tasks: not needed here
        self._config = config

    @hookimpl
    async def prepare_request(self, exchange: Exchange) -> None:
        body = exchange.body
        asked = exchange.dialect.output_cap(body)
        if asked is not None and asked > self._config.max_output_tokens:
            raise BadRequest(f"At most {self._config.max_output_tokens} tokens of output may be asked for.")
        if self._config.preamble and exchange.endpoint == "chat/completions" and isinstance(body.get("messages"), list):
            body["messages"] = [{"role": "system", "content": self._config.preamble}, *body["messages"]]
