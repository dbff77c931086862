"""What a plugin is given, made by hand: real exchanges and services, no server."""

import contextlib
import gc
import itertools
import tracemalloc
from types import SimpleNamespace

import msgspec
import structlog
from multidict import CIMultiDict, CIMultiDictProxy

from gateway import Services
from gateway.dialects import DIALECTS
from gateway.exchange import Attempt, Credentials, Exchange, Limits, RequestView
from gateway.routes import Route
from gateway.settings import Settings
from gateway.stores.database import Database

PEPPER = "a pepper for tests only"
_numbers = itertools.count(1)


def settings(**sections):
    return Settings.model_validate({"upstreams": {"openrouter": {"api_key": "sk-or-canary"}}, **sections})


def services(bootstrap_key_hash=None, settings=settings(), log=None):  # noqa: B008 - frozen
    return Services(
        settings=settings,
        catalogue=None,
        tasks=None,
        data_dir=None,
        pepper=PEPPER,
        bootstrap_key_hash=bootstrap_key_hash,
        opened_database=Database("sqlite", never),
        plugin_id="tested",
        log=log or structlog.get_logger(),
    )


def never():
    raise AssertionError("a unit test connects to no database")


def exchange(body=None, *, headers=None, principal=None, bearer=None, api_key=None, endpoint="chat/completions"):
    snapshot = SimpleNamespace(
        attempt_for=lambda _, target: Attempt(target, b"{}", {}, Limits()),
        settings=settings(),
        hooks=SimpleNamespace(prepare_request=()),
    )
    route = Route("POST", f"/v1/{endpoint}", endpoint, DIALECTS[endpoint])
    view = RequestView("POST", route.path, CIMultiDictProxy(CIMultiDict(headers or {})), remote="192.0.2.7")
    made = Exchange(f"req_{next(_numbers)}", view, snapshot, route)
    made.body = {"model": "openai/gpt-5-mini", "messages": []} if body is None else body
    made.raw_body = msgspec.json.encode(made.body)
    made.stream = made.dialect.wants_stream(made.body)
    made.principal = principal
    made.credentials = Credentials(bearer, api_key)
    return made


@contextlib.contextmanager
def kept():
    """A list that has, after the block, the bytes that were allocated in it and are still held."""
    held = []
    gc.collect()
    tracemalloc.start()
    try:
        yield held
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
