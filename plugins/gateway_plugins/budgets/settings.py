"""What the YAML may say of budgets."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gateway.kit import NamedLimit, Period, check_limits


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"{name!r} is no time zone; names are such as UTC or Europe/Berlin") from None
    return name


class Budget(NamedLimit):
    """One limit of spending."""

    usd: Decimal = Field(gt=0, le=10**8, decimal_places=6, description="The limit, in USD.")
    per: Period = Field("month", description="When it starts anew; `total`: never. Default month.")
    time_zone: Annotated[str, AfterValidator(_zone)] = Field(
        "UTC", description="Whose days, weeks (from Monday) and months these are. Default UTC."
    )
    warn_at: float = Field(
        0.8, gt=0, le=1, description="Share of the limit from which replies carry a warning, logged once. Default 0.8."
    )
    hard: bool = Field(True, description="Refuse what doesn't fit; false only warns. Default true.")


class Assume(BaseModel):
    """What a request without an output limit is taken to use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    assume: int = Field(ge=1, le=10**7, description="Output tokens. A longer answer overshoots the budget by the rest.")


class Config(BaseModel):
    """The budgets; a request must fit in all that it falls under."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budgets: tuple[Budget, ...] = Field((), description="The budgets, each with its own sums. Default none.")
    own_limits: bool = Field(
        True, description="Hold the `usd` that a key or a token brings along (`limits` of api_keys) too. Default true."
    )
    no_max_tokens: Literal["clamp"] | Assume = Field(
        "clamp",
        description="A request without an output limit: `clamp` gives it what the model and the budget allow; "
        "`assume: N` reserves for N tokens and sets no limit. Default clamp.",
    )
    least_tokens: int = Field(
        256, ge=1, description="Output tokens that must be affordable for a request to be clamped. Default 256."
    )
    image_tokens: int = Field(5000, ge=0, description="The most input tokens that one image takes. Default 5000.")
    unknown_price: Literal["deny", "allow"] = Field(
        "deny",
        description="Requests whose cost has no known bound (no price, auto-routers, web search, dearer service tiers):"
        " deny, or allow, reserving nothing for them. Default deny.",
    )
    cost_per_request: dict[str, Decimal] = Field(
        default_factory=dict,
        description="USD to reserve per request of endpoints that have no price per token, such as images/generations "
        "or audio/speech. Default none.",
    )
    lease: bool = Field(
        True,
        description="On Redis: each worker holds some of a budget ahead for two seconds, so that most requests need "
        "not ask; nothing of its last tenth. No limit is passed for it. Default true.",
    )
    on_store_error: Literal["allow", "deny"] = Field(
        "deny", description="While Redis is away: allow requests, booked later, or deny them with 503. Default deny."
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        check_limits(self.budgets, "budgets", own_limits=self.own_limits)
        return self
