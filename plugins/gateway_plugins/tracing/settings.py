"""What the YAML may say about tracing."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, field_validator

from gateway import Duration, Size

_HeaderName = Annotated[str, StringConstraints(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")]
_Attribute = str | bool | int | float


class Config(BaseModel):
    """Where traces go, which requests are traced, and what they say."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    exporter: Literal["otlp", "console"] = Field(
        "otlp",
        description="otlp: to a collector, by OTLP over HTTP with protobuf. console: one JSON line a span on standard "
        "error. Default otlp.",
    )
    endpoint: str = Field(
        "http://localhost:4318/v1/traces",
        description="URL of the collector; without a path /v1/traces is added. Default "
        "http://localhost:4318/v1/traces.",
    )
    headers: dict[_HeaderName, SecretStr] = Field(
        {}, description="Headers that the collector asks for, such as an Authorization: ${VARIABLE}. Default none."
    )
    ca_file: Path | None = Field(
        None,
        description="Certificate authorities (PEM) that the collector is trusted by. Default the system's.",
    )
    timeout: Duration = Field(10.0, gt=0, le=60, description="Longest time for sending one batch. Default 10s.")
    compression: Literal["gzip", "none"] = Field("gzip", description="Of what is sent. Default gzip.")
    service_name: str = Field("xenios", min_length=1, description="service.name of the traces. Default xenios.")
    resource: dict[str, _Attribute] = Field(
        {}, description="More attributes of the resource, such as deployment.environment.name. Default none."
    )
    sample_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the requests without a trace of their own that is traced. Default 1.",
    )
    parent_based: bool = Field(
        True,
        description="A request with a traceparent belongs to that trace, and is traced if its flag says so. false: "
        "what clients send is ignored, so that they can't choose what is traced. Default true.",
    )
    propagate: bool = Field(
        False,
        description="Tell upstreams the trace, by traceparent and tracestate: whoever runs them can then tell which "
        "requests belong together. Default false.",
    )
    plugin_spans: bool = Field(
        False, description="A span for each hook of each plugin too: to see where time goes. Default false."
    )
    capture_content: bool = Field(
        False,
        description="Prompts, system instructions, tools and answers in the spans of attempts. Whoever can read the "
        "traces can then read those. Default false.",
    )
    max_content: Size = Field(
        16 * 1024, gt=0, le=1024 * 1024, description="Of each of these at most so many characters. Default 16KiB."
    )
    redact: tuple[str, ...] = Field(
        (),
        description="Regular expressions of Python; what they meet in captured content becomes ***, as keys, bearer "
        "tokens and JWTs always do. Default none.",
    )

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, value: str) -> str:
        try:
            url = urlsplit(value)
            sound = url.scheme in {"http", "https"} and url.hostname and url.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise ValueError("no URL of a collector; write http://host:4318/v1/traces")
        if url.username is not None or url.password is not None or url.query or url.fragment:
            raise ValueError("an endpoint holds no credentials and no query; put what is secret into headers")
        return value if url.path.strip("/") else f"{value.rstrip('/')}/v1/traces"

    @field_validator("headers")
    @classmethod
    def _check_headers(cls, value: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, secret in value.items():
            if not secret.get_secret_value().isprintable() or not secret.get_secret_value().isascii():
                raise ValueError(f"the value of {name} can't be sent as a header")
        return value

    @field_validator("ca_file")
    @classmethod
    def _check_ca_file(cls, value: Path | None) -> Path | None:
        if value is not None:
            try:
                ssl.create_default_context(cafile=value)
            except (OSError, ssl.SSLError) as error:
                raise ValueError(f"{value} can't be used: {error}") from error
        return value

    @field_validator("redact")
    @classmethod
    def _check_redact(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                meets_nothing = re.compile(pattern).match("") is not None
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
            if meets_nothing:
                raise ValueError(f"{pattern!r} meets the empty text, that is everywhere")
        return value
