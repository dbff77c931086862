"""What the YAML may say about jobs. One class per part."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from gateway import Duration, Size

QueueName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
_Settings = ConfigDict(extra="forbid", frozen=True)


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


class Batches(BaseModel):
    """The Batch API."""

    model_config = _Settings

    enabled: bool = Field(True, description="Offer /v1/batches. Default true.")


class Webhooks(BaseModel):
    """Messages to others when something has ended."""

    model_config = _Settings

    enabled: bool = Field(True, description="Take and call webhooks. Default true.")


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
