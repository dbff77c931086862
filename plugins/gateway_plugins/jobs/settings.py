"""What the YAML may say about jobs. One class per part."""

from __future__ import annotations

import base64
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    SecretStr,
    StringConstraints,
    field_validator,
    model_validator,
)

from gateway import Duration, Size
from gateway_plugins.jobs.webhooks.addresses import Rules

QueueName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
_Settings = ConfigDict(extra="forbid", frozen=True)

# What webhooks tell of.
EVENTS = (
    *(f"job.{end}" for end in ("succeeded", "failed", "cancelled")),
    *(f"response.{end}" for end in ("completed", "failed", "cancelled", "incomplete")),
    *(f"batch.{end}" for end in ("completed", "failed", "expired", "cancelled")),
)


class Queue(BaseModel):
    """One queue: which tasks' jobs it takes, and how they run."""

    model_config = _Settings

    tasks: tuple[str, ...] = Field((), description="Jobs of these tasks go here. Default none.")
    endpoints: tuple[str, ...] = Field(
        (), description="Jobs for these endpoints go here, such as audio/transcriptions. Default none."
    )
    concurrency: int = Field(
        200, ge=1, le=10_000, description="How many of its jobs one worker process runs at once. Default 200."
    )
    timeout: Duration = Field(600.0, gt=0, le=86400, description="Longest time of one try. Default 10m.")
    attempts: int = Field(3, ge=1, le=20, description="How often a job is tried before it has failed. Default 3.")
    backoff: Duration = Field(
        2.0, gt=0, le=3600, description="Wait before the second try; it doubles with each further one. Default 2s."
    )
    priority: Literal["high", "normal", "low"] = Field(
        "normal", description="Of jobs that say none: high goes before normal, normal before low. Default normal."
    )


class Offload(BaseModel):
    """Which requests become jobs though their client did not ask for it."""

    model_config = _Settings

    above_input_tokens: int | None = Field(
        None, ge=1, description="Requests with more input than this, by estimate, become jobs. Default none does."
    )


class Worker(BaseModel):
    """The process that runs jobs."""

    model_config = _Settings

    embedded: bool = Field(
        False, description="`xenios serve` runs a worker beside itself; else start `xenios worker`. Default false."
    )
    grace: Duration = Field(
        30.0, ge=0, le=3600, description="How long a worker that is stopped waits for its jobs to end. Default 30s."
    )
    lease: Duration = Field(
        60.0, ge=5, le=3600, description="After how long without a sign of life a worker's jobs run anew. Default 60s."
    )


class Responses(BaseModel):
    """Background responses: `background: true` at /v1/responses."""

    model_config = _Settings

    enabled: bool = Field(True, description="Take them. Default true.")


class Files(BaseModel):
    """The Files API."""

    model_config = _Settings

    enabled: bool = Field(True, description="Offer /v1/files. Batches need it. Default true.")
    # ASCII alone: a compiled `\w` that may come 200 times takes 17 MB.
    storage: str = Field(
        "local",
        max_length=300,
        pattern=r"^(local|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_./-]+)?)$",
        description="Where files lie: `local`, in data_dir/files, or `s3://bucket/prefix`, which several hosts share. "
        "Default local.",
    )
    endpoint: str | None = Field(
        None, pattern=r"^https?://", description="S3: the server, if it isn't Amazon's. Default Amazon's."
    )
    region: str = Field("us-east-1", min_length=1, description="S3: the region. Default us-east-1.")
    access_key_id: SecretStr | None = Field(
        None, description="S3: the key's id. Default what the environment says, as AWS's own tools read it."
    )
    secret_access_key: SecretStr | None = Field(None, description="S3: the key. Default as for its id.")
    max_bytes: Size = Field(
        209_715_200, gt=0, le=1 << 34, description="Largest file. OpenAI's batches take 200 MB. Default 200MiB."
    )
    max_total: Size = Field(
        10_737_418_240,
        gt=0,
        description="What the files of one tenant may take together; each counts for 4 KiB at least. Default 10GiB.",
    )
    keep: Duration = Field(
        30 * 86400.0, ge=3600, le=3650 * 86400, description="How long a file is kept that says nothing. Default 30d."
    )

    @model_validator(mode="after")
    def _check_s3(self) -> Files:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("access_key_id and secret_access_key go together")
        if self.storage == "local" and (self.endpoint or self.access_key_id):
            raise ValueError("endpoint and keys are for storage: s3://…, and this says local")
        return self


class Batches(BaseModel):
    """The Batch API."""

    model_config = _Settings

    enabled: bool = Field(True, description="Offer /v1/batches. Default true.")
    lanes: int = Field(50, ge=1, le=1000, description="How many lines of one chunk run at once. Default 50.")
    chunks: int = Field(
        2,
        ge=1,
        le=100,
        description="How many chunks of one batch run at once: with `lanes` this bounds what a batch asks of an "
        "upstream. Default 2.",
    )
    chunk_lines: int = Field(500, ge=1, le=5000, description="How many lines a worker takes at a time. Default 500.")
    max_lines: int = Field(50_000, ge=1, le=1_000_000, description="Most lines of one batch. Default 50000.")
    max_open: int = Field(
        200, ge=1, description="How many batches of one tenant may be open; more are refused with 429. Default 200."
    )
    attempts: int = Field(
        5, ge=1, le=50, description="How often a line is tried whose upstream fails or is too busy. Default 5."
    )
    backoff: Duration = Field(
        1.0, gt=0, le=3600, description="Wait before the second try; it doubles with each further one. Default 1s."
    )
    line_timeout: Duration = Field(600.0, gt=0, le=86400, description="Longest time of one try. Default 10m.")
    window: Duration = Field(
        86400.0,
        ge=1,
        le=30 * 86400,
        description="How long a batch may take; what isn't done by then expires. Default 24h, as clients are told.",
    )
    keep: Duration = Field(
        90 * 86400.0, ge=3600, le=3650 * 86400, description="How long an ended batch can be asked for. Default 90d."
    )


def _signing_secret(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    try:
        key = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except ValueError:
        key = b""
    if not text.startswith("whsec_") or not 24 <= len(key) <= 64:
        raise ValueError(
            "must be whsec_ and 24 to 64 bytes in base64: `echo whsec_$(openssl rand -base64 32)` makes one"
        )
    return value


SigningSecret = Annotated[SecretStr, AfterValidator(_signing_secret)]


class WebhookEndpoint(BaseModel):
    """Somebody who is told of what has ended."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    url: str = Field(min_length=1, description="Where the messages go.")
    events: tuple[str, ...] = Field(
        ("*",), min_length=1, description="Which events, as globs such as batch.* or *.failed. Default all."
    )
    secret: SigningSecret = Field(description="What they are signed with: whsec_ and base64, from ${…}.")
    old_secret: SigningSecret | None = Field(
        None, description="The one before, while the receiver may still check by it. Default none."
    )
    tenant: str | None = Field(None, min_length=1, description="Only this tenant's events. Default all tenants'.")

    @field_validator("events")
    @classmethod
    def _check_events(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for glob in value:
            if not any(fnmatchcase(event, glob) for event in EVENTS):
                raise ValueError(f"{glob!r} is none of the events {', '.join(EVENTS)}")
        return value


class Webhooks(BaseModel):
    """Messages to others when something has ended."""

    model_config = _Settings

    enabled: bool = Field(True, description="Take and call webhooks. Default true.")
    endpoints: tuple[WebhookEndpoint, ...] = Field(
        (), description="Who is told, beside those registered at /v1/webhook_endpoints. Default nobody."
    )
    allow_http: bool = Field(False, description="Call http:// too, which anybody on the way can read. Default false.")
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] | Literal["any"] = Field(
        (80, 443, 8080, 8443), description="Ports that may be called, or any. Default 80, 443, 8080 and 8443."
    )
    allow_addresses: tuple[IPvAnyNetwork, ...] = Field(
        (),
        description="Networks that may be called though they are not the internet, such as 10.1.0.0/16. Default none: "
        "whoever may register a webhook could reach what only the gateway can.",
    )
    ca_file: Path | None = Field(
        None, description="PEM file of authorities that are trusted beside the system's. Default none."
    )
    timeout: Duration = Field(15.0, ge=0.1, le=30, description="How long a receiver has to answer. Default 15s.")
    retries: tuple[Annotated[Duration, Field(le=7 * 86400)], ...] = Field(
        (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0),
        max_length=30,
        description="Waits between tries, each up to a tenth longer by chance. Default 5s, 5m, 30m, 2h, 5h, 10h, 14h, "
        "20h, 24h; after the last the message is given up.",
    )
    rotation: Duration = Field(
        86400.0,
        ge=0,
        le=30 * 86400,
        description="How long messages are signed by the old secret too after a rotation. Default 24h.",
    )
    keep: Duration = Field(
        7 * 86400.0,
        ge=60,
        le=365 * 86400,
        description="How long messages that were delivered or given up are listed. Default 7d.",
    )

    @model_validator(mode="after")
    def _check_urls(self) -> Webhooks:
        rules = self.rules()
        for number, endpoint in enumerate(self.endpoints):
            try:
                rules.check(endpoint.url)
            except ValueError as error:
                raise ValueError(f"endpoints[{number}].url {error}") from None
        if len({(e.tenant, e.url) for e in self.endpoints}) < len(self.endpoints):
            raise ValueError("endpoints: two have the same url and tenant")
        return self

    def rules(self) -> Rules:
        """Which URLs may be called."""
        ports = None if self.ports == "any" else frozenset(self.ports)
        return Rules(self.allow_http, ports, self.allow_addresses)


class Config(BaseModel):
    """Work that is done later: jobs, background responses, files and batches, webhooks."""

    model_config = _Settings

    queues: dict[QueueName, Queue] = Field(
        {"default": Queue()},
        description="Named queues. Jobs that belong to none of them go to `default`, which is always there.",
    )
    offload: Offload = Field(Offload(), description="Requests that become jobs unasked.")
    max_body: Size = Field(
        26_214_400, gt=0, le=1 << 30, description="Largest request that may become a job. Default 25MiB."
    )
    max_waiting: int = Field(
        10_000, ge=1, description="How many jobs of one tenant may wait; more are refused with 429. Default 10000."
    )
    result_ttl: Duration = Field(
        7 * 86400.0, ge=60, le=365 * 86400, description="How long a finished job can be asked for. Default 7d."
    )
    failure_ttl: Duration = Field(
        30 * 86400.0,
        ge=60,
        le=365 * 86400,
        description="How long a failed job can be asked for, and retried. Default 30d.",
    )
    run_within: Duration = Field(
        86400.0, ge=60, le=30 * 86400, description="A job that has not begun by then has failed. Default 24h."
    )
    charge_abandoned: Literal["tenant", "operator"] = Field(
        "operator",
        description="Who pays for a call that was under way when its worker was killed, and which runs again. "
        "Default operator.",
    )
    worker: Worker = Field(Worker(), description="The process that runs jobs.")
    responses: Responses = Field(Responses(), description="Background responses.")
    files: Files = Field(Files(), description="The Files API.")
    batches: Batches = Field(Batches(), description="The Batch API.")
    webhooks: Webhooks = Field(Webhooks(), description="Messages when something has ended.")
