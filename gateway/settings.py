"""What the YAML file may say: typed, frozen settings; every mistake in it is told at once."""

import ast
import inspect
import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SecretStr,
    Strict,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gateway.dialects import DIALECTS
from gateway.forwarded import UNIX
from gateway.problems import MASK, ConfigError, Problem, Steps, did_you_mean, in_line_order, refusal
from gateway.units import Duration, Size, format_duration, format_size
from gateway.yaml_source import Source, read_file, read_text

__all__ = ["ConfigError", "Problem", "Settings", "Source", "examine", "json_schema", "load", "load_text", "masked"]

T = TypeVar("T")

OPENROUTER_URL: Final = "https://openrouter.ai/api/v1"


def _flag(value: object) -> object:
    """`${VAR}` gives text; of the many words that pydantic takes for a boolean these two are enough."""
    return value == "true" if value in ("true", "false") else value


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


def _texts(value: object) -> object:
    """YAML's `true` and `3` as the text that claims are compared by."""
    return [
        item if isinstance(item, str) else str(item).lower() if isinstance(item, bool | int | float) else item
        for item in (value if isinstance(value, list | tuple) else [value])
    ]


def _open(name: str) -> str:
    if name in _PRIVATE:
        raise refusal(f"{name!r} is hidden from rules: it carries credentials or the client's address")
    return name


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        raise refusal(f"there is no time zone {name!r}", "such as Europe/Berlin or UTC") from None
    return name


def _unframed(name: str) -> str:
    if name in _FRAMING:
        raise refusal(f"the gateway sets {name!r} itself")
    return name


def _unprefixed(globs: tuple[str, ...]) -> tuple[str, ...]:
    """Plugins' routes are called by their whole path; those of the gateway would never be met by it."""
    for glob in globs:
        start, v1, name = glob.partition("/v1/")
        if v1 and start in {"", "/api"} and any(fnmatchcase(endpoint, name) for endpoint in DIALECTS):
            raise refusal(f"{glob!r} meets no endpoint: they are called without {start}/v1/", f"write {name!r}")
    return globs


def _forwardable(name: str) -> str:
    if name in _PRIVATE or name.startswith(("x-forwarded-", "x-openrouter-cache")):
        raise refusal(f"{name!r} never goes upstream: it carries credentials, the client's address or a cache's scope")
    return name


def _beside_config(value: Path, info: ValidationInfo) -> Path:
    return info.context["source"].base / value if info.context else value


def _known_upstream(name: str, info: ValidationInfo) -> str:
    raw = info.context["source"].data.get("upstreams") if info.context else {name: None}
    known = {"openrouter": None} if raw is None else raw
    if isinstance(known, dict) and name not in known:
        raise refusal(f"there is no upstream {name!r}", did_you_mean(name, known) or f"known: {', '.join(known)}")
    return name


_FRAMING: Final = {
    "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
    "host", "content-length", "content-encoding", "accept-encoding", "expect",
}  # fmt: skip
_PRIVATE: Final = {
    "authorization", "x-api-key", "api-key", "x-goog-api-key", "proxy-authorization", "proxy-authenticate",
    "cookie", "set-cookie", "forwarded", "via", "x-real-ip", "true-client-ip", "cf-connecting-ip",
}  # fmt: skip
_URL: Final = re.compile(r"https?://(?:\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\\\[\]]+)(?::[0-9]{1,5})?(?:/[^\s?#\\]*)?")
_PROXY: Final = re.compile(
    r"http://(?:[^\s/?#@:\\]*(?::[^\s/?#@:\\]*)?@)?(?:\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\\\[\]]+):[0-9]{1,5}/?"
)
_USE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*|.*[^/]\.py:[A-Za-z_][A-Za-z0-9_]*")


def _trusted(value: str) -> str:
    if value == UNIX:
        return value
    try:
        network = ipaddress.ip_network(value)
    except ValueError:
        raise refusal(
            f"{value!r} is no address and no network", "10.0.0.5, 10.0.0.0/8, 2001:db8::/32 or unix"
        ) from None
    if network.prefixlen == 0:
        raise refusal(f"{value!r} is everybody: any client could say who it is", "name the proxies' own network")
    return value


def _proxy(value: SecretStr) -> SecretStr:
    if not _PROXY.fullmatch(value.get_secret_value()):
        raise refusal("is no address of an HTTP proxy", "http://host:3128 or http://user:password@host:3128")
    return _with_a_port(value)


Flag = Annotated[bool, Strict(), BeforeValidator(_flag)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_-]+$")]
UpstreamName = Annotated[str, AfterValidator(_known_upstream)]
Price = Annotated[Decimal, Field(ge=0, le=1_000_000, max_digits=13, decimal_places=6)]
Text = Annotated[str, StringConstraints(min_length=1)]
Phase = Literal["live", "accept", "run"]
Globs = Annotated[
    tuple[Text, ...], Field(min_length=1), BeforeValidator(_listed, json_schema_input_type=Text | list[Text])
]
Endpoints = Annotated[Globs, AfterValidator(_unprefixed)]
Phases = Annotated[
    tuple[Phase, ...], Field(min_length=1), BeforeValidator(_listed, json_schema_input_type=Phase | list[Phase])
]
_Header = Annotated[str, StringConstraints(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$", to_lower=True)]
HeaderName = Annotated[_Header, AfterValidator(_unframed)]
HeaderValue = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: object) -> object:
        """What is left empty, such as a section whose lines are all commented out, reads as null."""
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None or key not in cls.model_fields}
        return {} if value is None else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Each field's docstring describes it: pydantic's own way would read them at each start."""
        schema = handler(core_schema)
        shown = handler.resolve_ref_schema(schema)["properties"]
        for name, text in _docstrings(cls).items():
            shown[cls.model_fields[name].alias or name]["description"] = text
        return schema


def _docstrings(cls: type) -> dict[str, str]:
    """By the name of the attribute that they stand below."""
    [written] = ast.parse(inspect.getsource(cls)).body
    return {
        field.target.id: inspect.cleandoc(str(text.value.value))
        for field, text in pairwise(written.body if isinstance(written, ast.ClassDef) else ())
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


class Tls(_Section):
    """A certificate, for clients that come without a proxy in between. A reload reads the files again."""

    cert_file: Annotated[Path, AfterValidator(_beside_config)]
    """PEM file of the certificate and the intermediate ones after it, relative to this file. Required."""
    key_file: Annotated[Path, AfterValidator(_beside_config)]
    """PEM file of its private key, without a password, relative to this file. Required."""


class ServerSettings(_Section):
    """The socket, its limits and deadlines, and what the processes share."""

    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on. Default 127.0.0.1: reachable from this machine only."""
    port: int = Field(8080, ge=0, le=65535)
    """TCP port to listen on; 0 takes a free one. Default 8080."""
    unix_socket: Annotated[Path, AfterValidator(_beside_config)] | None = None
    """Socket file to listen on instead of host and port, for a proxy on the same machine; relative to this file.
    Default none."""
    unix_socket_mode: str = Field("0660", pattern=r"^0[0-7]{3}$")
    """Who may connect to `unix_socket`: its file's mode, in quotes. Default 0660."""
    tls: Tls | None = None
    """Speak HTTPS. Default none: plain HTTP, for loopback or behind a proxy."""
    trusted_proxies: tuple[Annotated[str, AfterValidator(_trusted)], ...] = ()
    """Proxies whose `X-Forwarded-For` is believed: addresses, networks, `unix` for who connects to `unix_socket`. The
    client is then the right-most address that is none of theirs. Default none: the client is who connected."""
    workers: int = Field(1, ge=1, le=256)
    """Processes that serve, on one port; about one per core. Several need a `services.redis` that they share.
    Default 1."""
    data_dir: Path = Path(".xenios")
    """Directory (mode 0700) of the bootstrap key, the pepper and embedded stores, relative to the working directory.
    Default .xenios. Losing it makes stored keys invalid unless `pepper` is set."""
    pepper: SecretStr | None = Field(None, min_length=16)
    """Secret, 16 characters or more, that stored API keys are hashed with; replicas must share it. Default: one is
    made in data_dir. Changing it makes every issued key invalid."""
    allow_anonymous: Flag = False
    """Serve callers without a key when no authentication plugin is on. Default false: such a configuration starts on a
    loopback address only."""
    max_body: Size = Field(20 * 2**20, gt=0)
    """Largest request body, in bytes. Default 20MiB; beyond it 413."""
    header_timeout: Duration = Field(10.0, gt=0)
    """Time for a client to send its request headers. Default 10s; then it is cut off."""
    body_timeout: Duration = Field(30.0, gt=0)
    """Time for a client to send the whole request body. Default 30s; then 408."""
    keepalive_timeout: Duration = 75.0
    """How long an idle client connection stays open. Default 75s; keep it above a proxy's."""
    write_timeout: Duration = Field(30.0, gt=0)
    """How long a client may leave sent bytes unread. Default 30s; then it is cut off."""
    request_timeout: Duration = Field(600.0, gt=0)
    """Deadline of one request, fallbacks included. Default 10m; then 504."""
    stream_commit_after: Duration = 10.0
    """How long a stream waits for its first content before its status line is sent. Default 10s; afterwards a fallback
    can no longer change the HTTP status and the x-xenios headers."""
    keepalive_interval: Duration = Field(15.0, gt=0)
    """Silence in a stream after which a keep-alive is sent. Default 15s; proxies cut silence."""
    drain_delay: Duration = 0.0
    """After SIGTERM: how long requests are still accepted while readiness says 503. Default 0s; behind a load balancer
    give it time to notice, such as 5s."""
    drain_timeout: Duration = 30.0
    """After SIGTERM: time for running requests to end. Default 30s; then they are cut off."""
    max_connections: int = Field(10_000, ge=1)
    """Open client connections per worker. Default 10000; further ones get 503."""
    debug_headers: Flag = False
    """Say in `x-xenios-tries` which targets a request tried, and why each failed. Default false: only to
    administrators."""
    server_timing: Literal["off", "admins", "everyone"] = "off"
    """Whose replies say in `Server-Timing` how long each phase and each plugin's hook took. Default off. With admins or
    everyone every request is measured."""
    watch_config: Flag = False
    """Reload when this file, or one that it names (`${file:…}`, `ca_file`, a plugin's), is changed. Default false: on
    SIGHUP and POST /admin/reload only."""
    reload_timeout: Duration = Field(30.0, gt=0)
    """Time for a reload to prepare, plugins to open among it. Default 30s; then nothing is changed."""
    bootstrap_key: Flag = True
    """Make an administrator's key in data_dir at the first start. Default true; with false the first key must come
    from elsewhere."""

    @property
    def is_local(self) -> bool:
        """Only this machine can reach it."""
        if self.unix_socket is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class LogSettings(_Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged. Default info; debug never logs contents either."""
    format: Literal["auto", "json", "pretty"] = "auto"
    """json: one object a line. pretty: for people. Default auto: pretty on a terminal."""


ClientField = Literal["models", "fallbacks", "route", "provider", "plugins", "service_tier", "presets", "auto_routers"]


class UpstreamPolicy(_Section):
    """What holds for every upstream."""

    default: UpstreamName = Field("openrouter", validate_default=True)
    """Name in `upstreams` of the one that answers when no plugin chooses. Default openrouter."""
    client_may: tuple[ClientField, ...] = ("provider",)
    """Body fields by which a client may choose models or prices itself; others are removed. Default [provider]. Each
    one widens what a key can spend on."""
    forward_headers: tuple[Annotated[HeaderName, AfterValidator(_forwardable)], ...] = ()
    """Request headers that are let through to the upstream besides the dialect's own. Default none. Credentials,
    cookies and forwarding headers are refused."""
    send_request_id: Flag = True
    """Send each request's id (`x-request-id`) to the upstream too, for its support to find it by. Default true."""
    connect_timeout: Duration = Field(5.0, gt=0)
    """Time to open a connection to an upstream. Default 5s; then the attempt fails."""
    first_event_timeout: Duration = Field(120.0, gt=0)
    """Time to the first content event of a stream, or to the first byte of a whole reply's body that isn't blank.
    Default 2m; then the attempt fails and a fallback may take over."""
    stall_timeout: Duration = Field(60.0, gt=0)
    """Longest silence within a reply. Default 60s; then the attempt fails."""
    attempt_timeout: Duration | None = Field(None, gt=0)
    """Time of one attempt to its last byte. Default none: only `server.request_timeout` holds, for all of a request's
    attempts together."""
    max_reply: Size = Field(64 * 2**20, gt=0)
    """Largest whole reply, in bytes. Default 64MiB; beyond it 502."""
    max_event: Size = Field(16 * 2**20, gt=0)
    """Largest event of a stream, in bytes. Default 16MiB; beyond it the stream ends in error."""
    max_connections: int = Field(0, ge=0)
    """Open connections to each upstream per worker; 0 = unlimited. Default 0; beyond it attempts wait."""


_NO_KEY: Final = (
    "write `api_key: ${NAME}` and set that variable, or `without_key: simulate` for simulated replies, "
    "`allow` for a server that wants none"
)


class Upstream(_Section):
    """A server that answers requests. Its address and key come from here alone, never from a request."""

    kind: Literal["openrouter", "openai"] = "openrouter"
    """openrouter, or openai for any compatible server. Default openrouter."""
    base_url: str = Field(
        default_factory=lambda known: "" if known.get("kind") == "openai" else OPENROUTER_URL, validate_default=True
    )
    """URL before `/chat/completions`. Default https://openrouter.ai/api/v1; required for kind openai."""
    without_key: Literal["fail", "simulate", "allow"] = "fail"
    """With no api_key: fail at start-up, simulate replies (marked x-xenios-simulated), or allow: ask a server that
    wants no key, such as a vLLM of your own. Default fail."""
    api_key: SecretStr | None = Field(None, validate_default=True)
    """Key sent as `Authorization: Bearer`. Default none (as is empty): see `without_key`."""
    headers: dict[HeaderName, HeaderValue] = Field({}, repr=False)
    """Headers sent with every request to this upstream. Default none. Dumps mask the values."""
    provider: dict[str, Any] | None = None
    """OpenRouter provider preferences, which win over the client's; kind openrouter only. Default none."""
    ca_file: Annotated[Path, AfterValidator(_beside_config)] | None = None
    """PEM file of the authorities trusted for this upstream, relative to this file. Default: the system's; with it,
    only those in the file."""
    # The whole test suite runs on either: XENIOS_TEST_TRANSPORT says which, and nothing else shall.
    transport: Literal["httptools", "aiohttp"] = Field(
        default_factory=lambda: os.environ.get("XENIOS_TEST_TRANSPORT", "httptools"),
        validate_default=True,
        json_schema_extra={"default": "httptools"},
    )
    """What carries requests to it: httptools (our own lean client), or aiohttp's client, at twice the processor time.
    Default httptools."""
    proxy: Annotated[SecretStr, AfterValidator(_proxy)] | None = None
    """HTTP proxy to reach it through, as `http://user:password@host:port`; transport httptools only. Default none; the
    environment's `HTTPS_PROXY` is not asked."""

    @field_validator("base_url")
    @classmethod
    def _check_base_url(cls, value: str) -> str:
        if not _URL.fullmatch(value):
            problem = (
                "is not an http(s) URL without user, query and fragment" if value else "is required for kind openai"
            )
            raise refusal(problem, f"such as {OPENROUTER_URL}")
        return value.rstrip("/")

    @field_validator("api_key")
    @classmethod
    def _check_api_key(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        key = value.get_secret_value() if value else ""
        if not re.fullmatch(r"[\x21-\x7e]*", key):
            raise refusal("holds blanks or characters that a header can't carry")
        if not key and info.data.get("without_key") == "fail":
            raise refusal("there is no key for this upstream", _NO_KEY)
        return value if key else None

    @field_validator("proxy")
    @classmethod
    def _check_proxy(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is not None and info.data.get("transport") == "aiohttp":
            raise refusal("only transport httptools goes through a proxy")
        return value

    @field_validator("provider")
    @classmethod
    def _check_provider(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if value is not None and info.data.get("kind") == "openai":
            raise refusal("only an upstream of kind openrouter has provider preferences")
        return value


class ModelOverride(_Section):
    """What this model costs and can do, where the catalogue is wrong or knows nothing."""

    input: Price | None = None
    """USD per million input tokens. Default: the catalogue's; wrong prices bill wrongly."""
    output: Price | None = None
    """USD per million output tokens. Default: the catalogue's."""
    cache_read: Price | None = None
    """USD per million input tokens read from the upstream's cache. Default: the catalogue's."""
    cache_write: Price | None = None
    """USD per million input tokens written to the upstream's cache. Default: the catalogue's."""
    context_length: Count | None = None
    """Tokens of input and output together. Default: the catalogue's."""
    max_output: Count | None = None
    """Tokens of output. Default: the catalogue's."""
    upstream: UpstreamName | None = None
    """Name in `upstreams` of the one that serves this model. Default: upstream.default."""


class CatalogueSettings(_Section):
    """Where models, prices and limits come from."""

    refresh: Duration = 3600.0
    """How often the catalogue is fetched; 0 = never. Default 1h; prices may be that old."""
    overrides: dict[str, ModelOverride] = {}
    """Corrections by model id, such as `openai/gpt-5.2`. Default none."""


def _redis(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"memory|embedded|rediss?://[^\s/].*|unix:///.+", value.get_secret_value()):
        raise refusal("is no address of a Redis", "memory, embedded, redis://host:6379/0, rediss://… or unix:///path")
    return _with_a_port(value)


def _with_a_port(value: SecretStr) -> SecretStr:
    """A `/`, `#` or `?` in a password ends the host early; the error of whoever meets it later would show a part."""
    try:
        _ = urlsplit(value.get_secret_value()).port
    except ValueError:
        raise refusal(
            "has no whole number as its port", "write / # ? @ : in a password as %2F %23 %3F %40 %3A"
        ) from None
    return value


def _database(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"sqlite|sqlite:///[^?]+|postgres(ql)?://[^\s/]\S*", value.get_secret_value()):
        raise refusal("is no address of a database", "sqlite, sqlite:///path or postgresql://user:password@host/name")
    return _with_a_port(value)


def _postgres(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"postgres(ql)?://[^\s/]\S*", value.get_secret_value()):
        raise refusal("is no address of a PostgreSQL", "postgresql://user:password@host/name")
    return _with_a_port(value)


class DatabaseSettings(_Section):
    """What keeps keys and usage. Text instead of a section is its `url`."""

    url: Annotated[SecretStr, AfterValidator(_database), Field(json_schema_extra={"default": "sqlite"})] = SecretStr(
        "sqlite"
    )
    """`postgresql://user:password@host:port/name?sslmode=require`, also of a pooler in transaction mode;
    `sqlite:///path` (`sqlite:////path` from the root); `sqlite`: the file `sqlite` in data_dir. Default sqlite."""
    migrate_url: Annotated[SecretStr, AfterValidator(_postgres)] | None = None
    """PostgreSQL address that migrations use: a direct one, where `url` is a pooler's, or a user who may change tables.
    Default: `url`."""
    migrate_on_start: Flag = False
    """Bring older tables up to date at the start. Default false: such a start ends with the command to run."""
    max_connections: int = Field(20, ge=1, le=1000)
    """Connections to PostgreSQL per worker. Default 20; when all are in use for half a second, requests get 503."""


def _database_section(value: object) -> object:
    return {"url": value} if isinstance(value, str) else value


SEVERAL_NEED_REDIS: Final = "several workers need services.redis to be embedded or an address: memory is of one process"


class ServicesSettings(_Section):
    """What workers and gateways share."""

    redis: Annotated[SecretStr, AfterValidator(_redis), Field(json_schema_extra={"default": "memory"})] = SecretStr(
        "memory"
    )
    """Where limits are counted: `redis://[user:password@]host:port/db`, `rediss://…`, `unix:///path`; `embedded` starts
    a Valkey of its own in data_dir; `memory` counts in the process and forgets at its end. Default memory."""
    database: Annotated[
        DatabaseSettings,
        BeforeValidator(_database_section, json_schema_input_type=str | DatabaseSettings),
        Field(json_schema_extra={"default": "sqlite"}),
    ] = DatabaseSettings()
    """What keeps keys and usage: an address, or a section. Default sqlite: a file in data_dir."""


Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_CLOCK = r"([01]?[0-9]|2[0-3]):[0-5][0-9]"


class TokenRange(_Section):
    """Estimated input tokens: about a quarter of the text's characters."""

    min: Count | None = None
    """At least so many. Default no lower end."""
    max: Count | None = None
    """At most so many. Default no upper end."""

    @model_validator(mode="after")
    def _in_order(self) -> "TokenRange":
        if self.min is None and self.max is None:
            raise refusal("names neither min nor max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise refusal("min is larger than max")
        return self


class TimeWindow(_Section):
    """Hours of some days. What begins in the evening may end the next morning, and belongs to the day it began."""

    model_config = ConfigDict(validate_by_alias=True, validate_by_name=True)

    days: Annotated[
        tuple[Day, ...], Field(min_length=1), BeforeValidator(_listed, json_schema_input_type=Day | list[Day])
    ] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
    """Days of the week: mon, tue … Default all."""
    begin: str = Field("00:00", alias="from", pattern=f"^{_CLOCK}$")
    """Time of the day it begins, such as "22:00". Default 00:00."""
    end: str = Field("24:00", alias="to", pattern=f"^({_CLOCK}|24:00)$")
    """Time of the day it ends, that minute not included. Default 24:00; earlier than `from`: of the next day."""
    zone: Annotated[Text, AfterValidator(_zone)] = "UTC"
    """Time zone, such as Europe/Berlin. Default UTC."""


_Windows = Annotated[
    tuple[TimeWindow, ...],
    Field(min_length=1),
    BeforeValidator(_listed, json_schema_input_type=TimeWindow | list[TimeWindow]),
]
_ClaimValue = str | int | float | bool
_Claim = Annotated[
    tuple[Text, ...],
    Field(min_length=1),
    BeforeValidator(_texts, json_schema_input_type=_ClaimValue | list[_ClaimValue]),
]


class When(_Section):
    """Some of the requests. A field left out matches all; each given one must match, and of a list one entry."""

    endpoint: Endpoints | None = None
    """Endpoints, as globs without /v1/: `chat/completions`, `images/*`. Default all."""
    roles: Globs | None = None
    """Roles, one of which the caller has. Default all."""
    teams: Globs | None = None
    """Teams, one of which is the caller's. Default all."""
    tenants: Globs | None = None
    """Tenants, one of which is the caller's. Default all."""
    keys: Globs | None = None
    """Ids of API keys, one of which is the caller's. Default all."""
    claims: dict[Text, _Claim] | None = None
    """Claims of the caller's token by name, `a.b` within others, and a glob or several. Default all."""
    models: Globs | None = None
    """Models asked for, as globs such as `openai/*`. Default all."""
    stream: Flag | None = None
    """Only streamed (true) or only whole replies. Default both."""
    tasks: Globs | None = None
    """Tasks asked for. Default all."""
    headers: dict[Annotated[_Header, AfterValidator(_open)], Flag | Globs] | None = None
    """Request headers by name: a glob or several, true (it is there) or false. Default all."""
    input_tokens: TokenRange | None = None
    """Estimated input tokens: {min: 1000, max: 100000}. Default any."""
    tools: Flag | None = None
    """With tools (true) or without. Default both."""
    images: Flag | None = None
    """With images to look at (true) or without. Default both."""
    audio: Flag | None = None
    """With audio to listen to (true) or without. Default both."""
    json_schema: Flag | None = None
    """The answer must follow a JSON schema (true) or not. Default both."""
    time: _Windows | None = None
    """Hours, or a list of such: {days: [mon, fri], from: "22:00", to: "06:00", zone: Europe/Berlin}. Default always."""
    phase: Phases | None = None
    """live, accept (a job is taken) or run (a worker runs it). Default all."""


def _use(value: str) -> str:
    if not _USE.fullmatch(value):
        raise refusal("is neither a plugin's name nor a file", "such as rate_limit or ./my_plugin.py:Plugin")
    return value


def _default_id(known: dict[str, Any]) -> str:
    use: str = known["use"]
    if ".py:" not in use:
        return use
    file, _, class_name = use.rpartition(":")
    return re.sub(r"[^A-Za-z0-9_.-]", "_", Path(file).stem if class_name == "Plugin" else class_name)


class PluginEntry(_Section):
    """One plugin that is on. The order of the list is the call order within a hook."""

    use: Annotated[str, AfterValidator(_use)]
    """Required. Name of an installed plugin, or ./file.py:Class relative to this file."""
    id: str = Field(default_factory=_default_id, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """Name of this instance in logs, metrics and state; unique. Default: `use`, or for a file its class (its stem
    where that is Plugin). A changed id is a new instance with new state."""
    when: When | None = None
    """Only for these requests. Default: all. Out of scope, the plugin isn't called."""
    on_error: Literal["fail", "ignore"] | None = None
    """When the plugin breaks: fail the request (503) or ignore and go on. Default: as each hook declares."""
    config: dict[str, Any] = {}
    """The plugin's own settings. Default {}."""


def _one_upstream() -> dict[str, Any]:
    return {"openrouter": {}}  # validated like what is written: its key is missing


class Settings(_Section):
    """Configuration of Xenios."""

    server: ServerSettings = ServerSettings()
    """The socket, limits and deadlines. Default: each field's."""
    log: LogSettings = LogSettings()
    """What is logged, and how. Default: each field's."""
    upstream: UpstreamPolicy = UpstreamPolicy()
    """What holds for every upstream. Default: each field's."""
    upstreams: dict[Name, Upstream] = Field(default_factory=_one_upstream, validate_default=True, min_length=1)
    """Servers that answer requests, by name. Default: one `openrouter`, whose key is missing."""
    catalogue: CatalogueSettings = CatalogueSettings()
    """Where prices and limits come from. Default: each field's."""
    services: Annotated[
        ServicesSettings, Field(json_schema_extra={"default": {"redis": "memory", "database": "sqlite"}})
    ] = ServicesSettings()
    """Stores that plugins use. Default: each field's."""
    plugins: tuple[PluginEntry, ...] = ()
    """The plugins that are on, in call order. Default none: requests are only forwarded."""


# --- Load -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A configuration without mistakes."""

    settings: Settings
    source: Source

    def secrets(self) -> Iterator[str]:
        """What must be printed nowhere: all that `${…}` gave, and secrets that stand there plainly."""
        for texts in self.source.expanded.values():
            yield from texts
        yield from secrets_of(self.settings)


def secrets_of(value: Any) -> Iterator[str]:
    """The texts of all `SecretStr` below a model, list or mapping."""
    return (secret.get_secret_value() for secret in found_in(value, SecretStr))


def found_in(value: Any, kind: type[T]) -> Iterator[T]:
    """All of this type below a model, list or mapping; below one that is found nothing is looked for."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from found_in(getattr(value, name), kind)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from found_in(item, kind)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from found_in(item, kind)


@dataclass(frozen=True)
class Examined:
    """A configuration with all its mistakes; `settings` is None where there are any."""

    settings: Settings | None
    source: Source
    problems: tuple[Problem, ...]

    def plugins(self) -> list[tuple[int, PluginEntry]]:
        """The entries of `plugins` that are sound in themselves, with their index, whatever else is wrong."""
        indexes = [index for index, _ in _plugins(self.source)]
        entries = ((index, self.source.validate(PluginEntry, ("plugins", index))[0]) for index in indexes)
        return [(index, entry) for index, entry in entries if entry is not None]


def load(path: Path, env: Mapping[str, str] = os.environ) -> Loaded:
    """The file's settings. Raises ConfigError with every mistake at once."""
    return _loaded(examine(path, env))


def load_text(
    text: str,
    file: str = "<text>",
    env: Mapping[str, str] = os.environ,
    base: Path | None = None,
    files: Mapping[str, str] | None = None,
) -> Loaded:
    """As `load`, from text; `base`: the directory that relative file names start from; `files`: `Source.files`."""
    return _loaded(_examine(read_text(text, file, base or Path.cwd(), env, files)))


def examine(path: Path, env: Mapping[str, str] = os.environ) -> Examined:
    """All that can be said about the file. Raises ConfigError only when it can't be read as YAML at all."""
    return _examine(read_file(path, env))


def examine_source(source: Source) -> Examined:
    """As `examine`, of what was read already."""
    return _examine(source)


def examine_text(
    text: str, file: str = "<text>", env: Mapping[str, str] = os.environ, base: Path | None = None
) -> Examined:
    return _examine(read_text(text, file, base or Path.cwd(), env))


def _loaded(examined: Examined) -> Loaded:
    if examined.settings is None:
        raise ConfigError(examined.problems)
    return Loaded(examined.settings, examined.source)


def _examine(source: Source) -> Examined:
    settings, found = source.validate(Settings)
    lone = [_lone_memory(source)] if settings is not None and counts_apart(settings) else []
    problems = in_line_order([*source.problems, *found, *_repeated_ids(source), *lone])
    return Examined(None if problems else settings, source, tuple(problems))


def counts_apart(settings: Settings) -> bool:
    """Each worker would count by itself, and every limit be as many times what it says."""
    return settings.server.workers > 1 and settings.services.redis.get_secret_value() == "memory"


def _lone_memory(source: Source) -> Problem:
    return source.problem(("server", "workers"), SEVERAL_NEED_REDIS, "redis: embedded starts one")


def _plugins(source: Source) -> list[tuple[int, Any]]:
    entries = source.data.get("plugins")
    return list(enumerate(entries)) if isinstance(entries, list) else []


def _repeated_ids(source: Source) -> Iterator[Problem]:
    """On the raw values: it must speak also where other fields are wrong."""
    first: dict[str, int] = {}
    for index, entry in _plugins(source):
        use, given = (entry.get("use"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        name = given or (_default_id({"use": use}) if isinstance(use, str) else None)
        if isinstance(name, str) and first.setdefault(name, index) != index:
            line = source.where(("plugins", first[name]))[0]
            message = f"a plugin with this id stands on line {line} already"
            path = ("plugins", index, "id" if given else "use")
            yield source.problem(path, message, "give this one an `id` of its own", value=True)


# --- Dumps and the schema ---------------------------------------------------------------------------------

_SECRET_NAME: Final = re.compile(
    r"key|secret|token|password|passwd|passphrase|pepper|credential|auth|bearer|dsn|signature|cookie|^headers$",
    re.IGNORECASE,
)
_QUERY: Final = re.compile(r"(?<=[?&])([^=&#\s]+)=([^&#\s]+)")
_PASSWORD: Final = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def masked(settings: Settings, source: Source, configs: Sequence[BaseModel] = ()) -> dict[str, Any]:
    """The settings for people to read: JSON types, `30s` and `20MiB`; secrets and what `${…}` gave as `**********`.

    `configs`: those of the plugins as they understood them, with their defaults, and their secrets known as such.
    """
    shown = settings.model_dump(mode="json")
    for entry, config in zip(shown["plugins"], configs, strict=False):
        entry["config"] = config.model_dump(mode="json", fallback=str)
    return {key: _masked(value, (key,), source) for key, value in shown.items()}


def _masked(value: Any, path: Steps, source: Source) -> Any:
    if isinstance(value, dict):
        return {key: _masked(item, (*path, key), source) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, (*path, index), source) for index, item in enumerate(value)]
    # a validator may have made a list or a section of the one text that stands in the file
    if value is not None and any(path[:length] in source.expanded for length in range(1, len(path) + 1)):
        return MASK
    if not isinstance(value, str):
        return value
    named_secret = path[2:3] == ("config",) and any(_SECRET_NAME.search(str(step)) for step in path[3:])
    return MASK if named_secret or path[2:3] == ("headers",) else without_passwords(value)


def without_passwords(text: str) -> str:
    """Without what stands between `://` and `@`, and what a query calls by a secret's name."""
    return _QUERY.sub(lambda m: f"{m[1]}={MASK}" if _SECRET_NAME.search(m[1]) else m[0], _PASSWORD.sub(MASK, text))


_EXPRESSION_SCHEMA: Final = {"type": "string", "pattern": r"^\$\{.+\}$"}
_NOTES: Final = ("title", "description", "default", "examples")


def json_schema(plugin_schemas: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The JSON schema of the file, for editors. `plugin_schemas`: by `use`, the schema of its `config`."""
    schema = Settings.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    conditions: list[dict[str, Any]] = []
    for use, original in sorted((plugin_schemas or {}).items()):
        name = f"plugin_{re.sub(r'[^A-Za-z0-9_]', '_', use)}"
        # Its references now point at the definitions' names in the whole file's schema.
        config = json.loads(json.dumps(original).replace('"#/$defs/', f'"#/$defs/{name}_'))
        definitions |= {f"{name}_{inner}": definition for inner, definition in config.pop("$defs", {}).items()}
        definitions[name] = config
        condition = {"properties": {"use": {"const": use}}, "required": ["use"]}
        conditions.append({"if": condition, "then": {"properties": {"config": {"$ref": f"#/$defs/{name}"}}}})
    if conditions:
        definitions["PluginEntry"]["allOf"] = conditions
        definitions["PluginEntry"]["properties"]["use"]["examples"] = sorted(plugin_schemas or {})
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Xenios"}
    return {key: _for_editors(value) for key, value in schema.items()}


def _for_editors(schema: Any) -> Any:
    """Defaults as people write them, and `${…}` wherever a number, boolean or one of some words stands."""
    if isinstance(schema, list):
        return [_for_editors(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: value if key == "default" else _for_editors(value) for key, value in schema.items()}
    if schema.get("$comment") in ("duration", "size") and "default" in schema:
        schema["default"] = (format_duration if schema["$comment"] == "duration" else format_size)(schema["default"])
    if "patternProperties" in schema:
        schema.setdefault("additionalProperties", False)
    if schema.get("type") in ("integer", "number", "boolean") or isinstance(schema.get("enum"), list):
        notes = {key: schema.pop(key) for key in _NOTES if key in schema}
        return {**notes, "anyOf": [schema, _EXPRESSION_SCHEMA]}
    return schema
