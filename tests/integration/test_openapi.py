"""The gateway's own OpenAPI document, and a fuzzer that takes it at its word."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway.admin import add_admin_routes
from gateway.core_routes import add_core_routes
from gateway.dialects import DIALECTS, PLAIN_DIALECT
from gateway.health import Health
from gateway.metrics import Metrics
from gateway.openapi import document as document_of
from gateway.routes import Router
from gateway_plugins import fallback, jobs, metrics
from gateway_plugins.api_keys.admin import Admin
from gateway_plugins.usage.routes import Routes
from tests.clients.process import Served, served

CHECKS: Any = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# Bounded and repeatable: a test that fails on somebody else's machine must fail here too.
FUZZ = settings(
    max_examples=15,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


# The last one as config/xenios.yaml has it, which only its own machine reaches.
PUBLIC = {"/health", "/health/live", "/health/ready", "/openapi.json", "/metrics"}


def _labels() -> list[str]:
    """Operations as the core and the default's plugins have them; a test sees that the served document has the same."""
    router = Router(DIALECTS, PLAIN_DIALECT)
    add_core_routes(router, Health(lambda: False))
    add_admin_routes(router, lambda: None, 1)
    nothing: Any = SimpleNamespace(database=None)
    counting: Any = SimpleNamespace(metrics=Metrics(), settings=SimpleNamespace(upstreams={}, plugins=()), serves=True)
    metrics.Plugin(metrics.Config(), counting).register_routes(router)
    Admin(nothing, frozenset()).register(router)
    Routes(nothing.database).register(router)
    later: Any = SimpleNamespace(metrics=Metrics(), pepper="", data_dir=Path(), database=None, redis=None, log=None)
    jobs.Plugin(jobs.Config(), later).register_routes(router)
    named: Any = SimpleNamespace(plugin_id="fallback", metrics=Metrics())
    fallback.Plugin(fallback.Config(breaker=False), named).register_routes(router)
    paths = document_of(router.table().routes)["paths"]
    return [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]


LABELS = _labels()
# Those of jobs, files, batches and webhooks have no field `model`.
OF_A_MODEL = [
    label
    for label in LABELS
    if re.match(r"POST /v1/(?!jobs|files|batches|webhook)", label) and not label.endswith("/cancel")
]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("openapi")) as running:
        yield running


@pytest.fixture(scope="module")
def document(gateway: Served) -> dict[str, Any]:
    reply = httpx.get(f"{gateway.url}/openapi.json", timeout=20)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    return reply.json()


@pytest.fixture(scope="module")
def schema(document: dict[str, Any]) -> BaseSchema:
    return schemathesis.openapi.from_dict(document)


def test_the_document_is_valid(document: dict[str, Any], schema: BaseSchema) -> None:
    """It is OpenAPI 3.1, each operation has an id of its own, and every core route is in it."""
    assert document["openapi"].startswith("3.1")
    schema.validate()
    operations = [op for path in document["paths"].values() for op in path.values()]
    ids = [op["operationId"] for op in operations]
    assert len(ids) == len(set(ids))
    labels = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    assert labels == LABELS
    assert {
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/rerank",
        "/v1/images/generations", "/v1/audio/speech", "/v1/audio/transcriptions", "/v1/models", "/v1/models/{id}",
        "/v1/messages/count_tokens", "/api/v1/chat/completions", "/health", "/health/live", "/health/ready",
        "/openapi.json",
    } <= document["paths"].keys()  # fmt: skip


def case_of(operation: APIOperation[Any, Any, Any]) -> SearchStrategy[Case]:
    """Requests that fit the document and requests that miss it."""
    return st.one_of(*(operation.as_strategy(mode) for mode in GenerationMode if _can(operation, mode)))


def _can(operation: APIOperation[Any, Any, Any], mode: GenerationMode) -> bool:
    # what takes nothing can't be asked wrongly
    return mode is GenerationMode.POSITIVE or bool(operation.body or operation.path_parameters or operation.query)


def fuzz(operation: APIOperation[Any, Any, Any], gateway: Served, model: str | None = None) -> None:
    @FUZZ
    @given(case=case_of(operation))
    def send(case: Case) -> None:
        if model is not None and isinstance(case.body, dict):
            case.body["model"] = model
        case.call_and_validate(
            base_url=gateway.url, headers={"Authorization": f"Bearer {gateway.key}"}, checks=CHECKS, timeout=20
        )

    send()


@pytest.mark.parametrize("label", LABELS)
def test_whatever_is_sent_no_operation_breaks(schema: BaseSchema, gateway: Served, label: str) -> None:
    """Bodies and parameters made to fit the document and to miss it: never a 5xx, always what it promises."""
    fuzz(schema.find_operation_by_label(label), gateway)


@pytest.mark.parametrize("label", OF_A_MODEL)
def test_whatever_is_sent_to_a_model_no_operation_breaks(schema: BaseSchema, gateway: Served, label: str) -> None:
    """The same for a model that exists, so that bodies reach the upstream and its answers come back."""
    fuzz(schema.find_operation_by_label(label), gateway, model="anthropic/claude-haiku-4.5")


@pytest.mark.parametrize("label", [label for label in LABELS if label.split()[1] not in PUBLIC])
def test_no_operation_answers_a_stranger(schema: BaseSchema, gateway: Served, label: str) -> None:
    """Without a key every operation but the public ones is 401, whatever else is wrong with the request."""

    @settings(FUZZ, max_examples=2)
    @given(case=case_of(schema.find_operation_by_label(label)))
    def send(case: Case) -> None:
        reply = case.call(base_url=gateway.url, headers={"Authorization": "Bearer sk-somebody-else"}, timeout=20)
        assert reply.status_code == 401

    send()
