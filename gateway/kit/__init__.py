"""Batteries for plugin authors: what two plugins need. Public and kept stable."""

from gateway.kit.breaker import Breaker, BreakerPolicy, Breakers, BreakerState, Change
from gateway.kit.keys import hash_key, is_hash, is_well_formed, new_key
from gateway.kit.ledger import ENDLESS
from gateway.kit.ledger import Row as PendingRow
from gateway.kit.queries import limit_of, moment, query_of
from gateway.kit.schema import Schema
from gateway.kit.subjects import (
    NO_MEDIA,
    OF_CALLERS,
    By,
    Media,
    NamedLimit,
    OwnLimits,
    PerCaller,
    Period,
    brings,
    check_limits,
    choices,
    end_user,
    input_bound,
    input_estimate,
    may_mention,
    media,
    output_cap,
    own_limits,
    subjects,
)
from gateway.kit.text import clean, cleaned
from gateway.limits import Admission, Held, Level, Rule, RuleSet, State
from gateway.logs import scrub
from gateway.stores.database import Database, Row, Statements

__all__ = [
    "ENDLESS",
    "NO_MEDIA",
    "OF_CALLERS",
    "Admission",
    "Breaker",
    "BreakerPolicy",
    "BreakerState",
    "Breakers",
    "By",
    "Change",
    "Database",
    "Held",
    "Level",
    "Media",
    "NamedLimit",
    "OwnLimits",
    "PendingRow",
    "PerCaller",
    "Period",
    "Row",
    "Rule",
    "RuleSet",
    "Schema",
    "State",
    "Statements",
    "brings",
    "check_limits",
    "choices",
    "clean",
    "cleaned",
    "end_user",
    "hash_key",
    "input_bound",
    "input_estimate",
    "is_hash",
    "is_well_formed",
    "limit_of",
    "may_mention",
    "media",
    "moment",
    "new_key",
    "output_cap",
    "own_limits",
    "query_of",
    "scrub",
    "subjects",
]
