"""The YAML file → frozen settings, with every mistake named at once: file, line, path and a hint."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Secret,
    SecretBytes,
    SecretStr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError, PydanticKnownError

from gateway.units import (
    DURATION_EXAMPLES,
    SIZE_EXAMPLES,
    Duration,
    Size,
    format_duration,
    format_size,
)

Steps = tuple[str | int, ...]
"""A place in the YAML: mapping keys and list indexes from the top."""

MAX_FILE: Final = 2**20
MAX_SECRET_FILE: Final = 2**16
MAX_DEPTH: Final = 50
MAX_VALUES: Final = 100_000
OPENROUTER_URL: Final = "https://openrouter.ai/api/v1"
MASK: Final = "***"

_Model = TypeVar("_Model", bound=BaseModel)


# --- Problems ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One mistake. `line` and `column` count from 1 and are None where there is no text to point at."""

    file: str
    line: int | None
    column: int | None
    path: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        path = f" {self.path}:" if self.path else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{place}:{path} {self.message}{hint}"


class ConfigError(Exception):
    """The configuration can't be used; `problems` holds every mistake that was found, in line order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def spell(path: Sequence[str | int]) -> str:
    """`plugins[2].config.per_minute`; a key that holds other characters is quoted: `overrides["a/b"]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z0-9_-]+", part):
            text += f".{part}" if text else part
        else:
            text += f'["{part}"]'
    return text


def _in_line_order(problems: Sequence[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: (problem.line or 0, problem.column or 0))


def _did_you_mean(word: str, known: Sequence[str], cutoff: float = 0.6) -> str | None:
    close = get_close_matches(word.lower(), known, n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else None


def _refusal(problem: str, hint: str | None = None) -> PydanticCustomError:
    """An error of our own validators. Never put a value in it that may be secret."""
    return PydanticCustomError("refused", "{problem}", {"problem": problem, "hint": hint})


# --- The settings -----------------------------------------------------------------------------------------


def _flag(value: object) -> object:
    """Refuses the many words that pydantic takes for a boolean; a quoted "${VAR}" gives the text `true`."""
    value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise PydanticKnownError("bool_type")
    return value


def _whole(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


def _one_or_many(value: object) -> object:
    return value if isinstance(value, list | tuple) or value is None else [value]


def _list_schema(item: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]})


Flag = Annotated[bool, BeforeValidator(_flag)]
Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_-]+$")]
Price = Annotated[Decimal, Field(ge=0, le=1_000_000, max_digits=13, decimal_places=6), BeforeValidator(_whole)]
Globs = Annotated[
    tuple[Annotated[str, StringConstraints(min_length=1)], ...],
    Field(min_length=1),
    BeforeValidator(_one_or_many),
    _list_schema({"type": "string", "minLength": 1}),
]
Phases = Annotated[
    tuple[Literal["live", "accept", "run"], ...],
    Field(min_length=1),
    BeforeValidator(_one_or_many),
    _list_schema({"enum": ["live", "accept", "run"]}),
]

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HOP_BY_HOP: Final = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
_FRAMING: Final = _HOP_BY_HOP | {"host", "content-length", "content-encoding", "accept-encoding", "expect"}
_PRIVATE: Final = frozenset({
    "authorization", "x-api-key", "api-key", "x-goog-api-key", "proxy-authorization", "proxy-authenticate",
    "cookie", "set-cookie", "forwarded", "via", "x-real-ip", "true-client-ip", "cf-connecting-ip",
})  # fmt: skip
_PRIVATE_PREFIXES: Final = ("x-forwarded-", "x-openrouter-cache")


def _header_name(value: str) -> str:
    if not _TOKEN.fullmatch(value):
        raise _refusal("is not a header name", "letters, digits and hyphens, such as X-Trace-Tag")
    if value.lower() in _FRAMING:
        raise _refusal(f"the gateway sets {value!r} itself")
    return value.lower()


def _forwardable(value: str) -> str:
    name = _header_name(value)
    if name in _PRIVATE or name.startswith(_PRIVATE_PREFIXES):
        raise _refusal(
            f"{value!r} never goes upstream: it carries credentials, the client's address or a cache's scope"
        )
    return name


def _header_value(value: str) -> str:
    if any((character < " " and character != "\t") or character == "\x7f" for character in value):
        raise _refusal("a header's value can't hold line breaks or control characters")
    return value


def _base_url(value: str) -> str:
    hint = f"such as {OPENROUTER_URL}"
    try:
        parts = urlsplit(value)
        parts.port  # noqa: B018 # the property itself raises on a port that is no number
    except ValueError:
        raise _refusal("is not a URL", hint) from None
    if parts.scheme not in {"http", "https"} or not parts.hostname or re.search(r"[\s\x00-\x1f\\]", value):
        raise _refusal("is not an http:// or https:// URL", hint)
    if "@" in parts.netloc:
        raise _refusal("must not hold a user name or password", "use api_key or headers")
    if "?" in value or "#" in value:
        raise _refusal("must not hold a query or fragment", hint)
    return value.rstrip("/")


def _beside_config(value: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    return Path(base) / value if base else value


class _Section(BaseModel):
    # hide_input: pydantic's own texts would print the values, and some of them are secrets.
    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: object) -> object:
        """A section whose lines are all commented out reads as null."""
        return {} if value is None else value


class ServerSettings(_Section):
    """The socket, its limits and deadlines, and what the processes share."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on. Default 127.0.0.1: reachable from this machine only.",
    )
    port: Whole = Field(8080, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one. Default 8080.")
    data_dir: Path = Field(
        Path(".xenios"),
        description="Directory (mode 0700) of the bootstrap key, the pepper and embedded stores, relative to "
        "the working directory. Default .xenios. Losing it makes stored keys invalid unless `pepper` is set.",
    )
    pepper: SecretStr | None = Field(
        None,
        min_length=16,
        description="Secret, 16 characters or more, that stored API keys are hashed with; replicas must "
        "share it. Default: one is made in data_dir. Changing it makes every issued key invalid.",
    )
    allow_anonymous: Flag = Field(
        False,
        description="Serve callers without a key when no authentication plugin is on. Default false: such a "
        "configuration starts on a loopback address only.",
    )
    max_body: Size = Field(
        20 * 2**20, gt=0, description="Largest request body, in bytes. Default 20MiB; beyond it 413."
    )
    header_timeout: Duration = Field(
        10.0,
        gt=0,
        description="Time for a client to send its request headers. Default 10s; then it is cut off.",
    )
    body_timeout: Duration = Field(
        30.0, gt=0, description="Time for a client to send the whole request body. Default 30s; then 408."
    )
    keepalive_timeout: Duration = Field(
        75.0,
        description="How long an idle client connection stays open. Default 75s; keep it above a proxy's.",
    )
    write_timeout: Duration = Field(
        30.0,
        gt=0,
        description="How long a client may leave sent bytes unread. Default 30s; then it is cut off.",
    )
    request_timeout: Duration = Field(
        600.0, gt=0, description="Deadline of one request, fallbacks included. Default 10m; then 504."
    )
    stream_commit_after: Duration = Field(
        10.0,
        description="How long a stream waits for its first content before its status line is sent. Default "
        "10s; afterwards a fallback can no longer change the HTTP status and the x-xenios headers.",
    )
    keepalive_interval: Duration = Field(
        15.0,
        gt=0,
        description="Silence in a stream after which a keep-alive is sent. Default 15s; proxies cut silence.",
    )
    drain_delay: Duration = Field(
        0.0,
        description="After SIGTERM: how long requests are still accepted while readiness says 503. Default "
        "0s; behind a load balancer give it time to notice, such as 5s.",
    )
    drain_timeout: Duration = Field(
        30.0,
        description="After SIGTERM: time for running requests to end. Default 30s; then they are cut off.",
    )
    max_connections: Whole = Field(
        10_000, ge=1, description="Open client connections per worker. Default 10000; further ones get 503."
    )
    bootstrap_key: Flag = Field(
        True,
        description="Make an administrator's key in data_dir at the first start. Default true; with false "
        "the first key must come from elsewhere.",
    )


class LogSettings(_Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Least severe level that is logged. Default info; debug never logs contents either.",
    )
    format: Literal["auto", "json", "pretty"] = Field(
        "auto",
        description="json: one object a line. pretty: for people. Default auto: pretty on a terminal.",
    )


ClientField = Literal["models", "fallbacks", "route", "provider", "plugins", "service_tier", "presets", "auto_routers"]


class UpstreamPolicy(_Section):
    """What holds for every upstream."""

    default: str = Field(
        "openrouter",
        description="Name in `upstreams` of the one that answers when no plugin chooses. Default openrouter.",
    )
    client_may: tuple[ClientField, ...] = Field(
        ("provider",),
        description="Body fields by which a client may choose models or prices itself; others are removed. "
        "Default [provider]. Each one widens what a key can spend on.",
    )
    forward_headers: tuple[Annotated[str, AfterValidator(_forwardable)], ...] = Field(
        (),
        description="Request headers that are let through to the upstream besides the dialect's own. Default "
        "none. Credentials, cookies and forwarding headers are refused.",
    )
    connect_timeout: Duration = Field(
        5.0, gt=0, description="Time to open a connection to an upstream. Default 5s; then the attempt fails."
    )
    first_event_timeout: Duration = Field(
        120.0,
        gt=0,
        description="Time to the first content event of a stream, or to a whole reply's head. Default 2m; "
        "then the attempt fails and a fallback may take over.",
    )
    stall_timeout: Duration = Field(
        60.0, gt=0, description="Longest silence within a reply. Default 60s; then the attempt fails."
    )
    max_reply: Size = Field(
        64 * 2**20, gt=0, description="Largest whole reply, in bytes. Default 64MiB; beyond it 502."
    )
    max_event: Size = Field(
        16 * 2**20,
        gt=0,
        description="Largest event of a stream, in bytes. Default 16MiB; beyond it the stream ends in error.",
    )
    max_connections: Whole = Field(
        0,
        ge=0,
        description="Open connections to each upstream per worker; 0 = unlimited. Default 0; beyond it attempts wait.",
    )


class Upstream(_Section):
    """A server that answers requests. Its address and key come from here alone, never from a request."""

    kind: Literal["openrouter", "openai"] = Field(
        "openrouter", description="openrouter, or openai for any compatible server. Default openrouter."
    )
    base_url: str = Field(
        default_factory=lambda known: "" if known.get("kind") == "openai" else OPENROUTER_URL,
        validate_default=True,
        description=f"URL before `/chat/completions`. Default {OPENROUTER_URL}; required for kind openai.",
    )
    without_key: Literal["fail", "simulate"] = Field(
        "fail",
        description="With no api_key: fail at start-up, or simulate replies, marked x-xenios-simulated. Default fail.",
    )
    api_key: SecretStr | None = Field(
        None,
        validate_default=True,
        description="Key sent as `Authorization: Bearer`. Default none (as is empty): see `without_key`.",
    )
    headers: dict[Annotated[str, AfterValidator(_header_name)], Annotated[str, AfterValidator(_header_value)]] = Field(
        {},
        repr=False,
        description="Headers sent with every request to this upstream. Default none. Dumps mask the values.",
    )
    provider: dict[str, Any] | None = Field(
        None,
        description="OpenRouter provider preferences, which win over the client's; kind openrouter only. Default none.",
    )
    ca_file: Annotated[Path, AfterValidator(_beside_config)] | None = Field(
        None,
        description="PEM file of the authorities trusted for this upstream, relative to this file. Default: "
        "the system's; with it, only those in the file.",
    )

    @field_validator("base_url")
    @classmethod
    def _check_base_url(cls, value: str) -> str:
        if not value:
            raise _refusal("is required for kind openai", "such as http://127.0.0.1:8000/v1")
        return _base_url(value)

    @field_validator("api_key")
    @classmethod
    def _check_api_key(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is not None and value.get_secret_value():
            if not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
                raise _refusal("holds blanks or characters that a header can't carry")
            return value
        if info.data.get("without_key") == "fail":
            raise PydanticCustomError("missing_key", "there is no key for this upstream")
        return None

    @field_validator("provider")
    @classmethod
    def _check_provider(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if value is not None and info.data.get("kind") == "openai":
            raise _refusal("only an upstream of kind openrouter has provider preferences")
        return value


class ModelOverride(_Section):
    """What this model costs and can do, where the catalogue is wrong or knows nothing."""

    input: Price | None = Field(
        None, description="USD per million input tokens. Default: the catalogue's; wrong prices bill wrongly."
    )
    output: Price | None = Field(None, description="USD per million output tokens. Default: the catalogue's.")
    cache_read: Price | None = Field(
        None,
        description="USD per million input tokens read from the upstream's cache. Default: the catalogue's.",
    )
    cache_write: Price | None = Field(
        None,
        description="USD per million input tokens written to the upstream's cache. Default: the catalogue's.",
    )
    context_length: Count | None = Field(
        None, description="Tokens of input and output together. Default: the catalogue's."
    )
    max_output: Count | None = Field(None, description="Tokens of output. Default: the catalogue's.")
    upstream: str | None = Field(
        None, description="Name in `upstreams` of the one that serves this model. Default: upstream.default."
    )


class CatalogueSettings(_Section):
    """Where models, prices and limits come from."""

    refresh: Duration = Field(
        3600.0,
        description="How often the catalogue is fetched; 0 = never. Default 1h; prices may be that old.",
    )
    overrides: dict[str, ModelOverride] = Field(
        {}, description="Corrections by model id, such as `openai/gpt-5.2`. Default none."
    )


class When(_Section):
    """The requests that a plugin sees. A field left out matches all; each given one must match."""

    endpoint: Globs | None = Field(
        None, description="Endpoints, as globs without /v1/: `chat/completions`, `images/*`. Default all."
    )
    roles: Globs | None = Field(None, description="Roles, one of which the caller has. Default all.")
    teams: Globs | None = Field(None, description="Teams, one of which is the caller's. Default all.")
    keys: Globs | None = Field(None, description="Ids of API keys, one of which is the caller's. Default all.")
    models: Globs | None = Field(None, description="Models asked for, as globs such as `openai/*`. Default all.")
    stream: Flag | None = Field(None, description="Only streamed (true) or only whole replies. Default both.")
    tasks: Globs | None = Field(None, description="Tasks that routing found. Default all.")
    phase: Phases | None = Field(
        None, description="live, accept (a job is taken) or run (a worker runs it). Default all."
    )


_USE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*|.*[^/]\.py:[A-Za-z_][A-Za-z0-9_]*")


def _use(value: str) -> str:
    if not _USE.fullmatch(value):
        raise _refusal("is neither a plugin's name nor a file", "such as rate_limit or ./my_plugin.py:Plugin")
    return value


def _default_id(known: dict[str, Any]) -> str:
    use: str = known["use"]
    if ".py:" not in use:
        return use
    file, _, class_name = use.rpartition(":")
    return re.sub(r"[^A-Za-z0-9_.-]", "_", Path(file).stem if class_name == "Plugin" else class_name)


class PluginEntry(_Section):
    """One plugin that is on. The order of the list is the call order within a hook."""

    use: Annotated[str, AfterValidator(_use)] = Field(
        description="Required. Name of an installed plugin, or ./file.py:Class relative to this file."
    )
    id: str = Field(
        default_factory=_default_id,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        description="Name of this instance in logs, metrics and state; unique. Default: `use`, or for a file "
        "its class (its stem where that is Plugin). A changed id is a new instance with new state.",
    )
    when: When | None = Field(
        None, description="Only for these requests. Default: all. Out of scope, the plugin isn't called."
    )
    on_error: Literal["fail", "ignore"] | None = Field(
        None,
        description="When the plugin breaks: fail the request (503) or ignore and go on. Default: as each "
        "hook declares.",
    )
    config: dict[str, Any] = Field({}, description="The plugin's own settings. Default {}.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None or key not in {"id", "config"}}


def _default_upstreams() -> dict[str, Any]:
    return {"openrouter": {}}


class Settings(_Section):
    """Configuration of Xenios."""

    server: ServerSettings = Field(
        ServerSettings(), description="The socket, limits and deadlines. Default: each field's."
    )
    log: LogSettings = Field(LogSettings(), description="What is logged, and how. Default: each field's.")
    upstream: UpstreamPolicy = Field(
        UpstreamPolicy(), description="What holds for every upstream. Default: each field's."
    )
    upstreams: dict[Name, Upstream] = Field(
        default_factory=_default_upstreams,
        validate_default=True,
        min_length=1,
        description="Servers that answer requests, by name. Default: one `openrouter`, whose key is missing.",
    )
    catalogue: CatalogueSettings = Field(
        CatalogueSettings(), description="Where prices and limits come from. Default: each field's."
    )
    plugins: tuple[PluginEntry, ...] = Field(
        (), description="The plugins that are on, in call order. Default none: requests are only forwarded."
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None or key not in cls.model_fields}


# --- YAML nodes → plain values ----------------------------------------------------------------------------

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNREADABLE: Final = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_EXPRESSION: Final = re.compile(r"\$\$\{|\$\{([^}]*)\}|\$\{")
_VARIABLE: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
# Leading zeros stay text, and so do numbers longer than Python's int() accepts without complaint.
_INTEGER: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,99})")
_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS: Final[dict[str, object]] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None, "true": True, "false": False,
}  # fmt: skip


def typed(text: str) -> Any:
    """A plain YAML scalar's value: YAML 1.2's types, less its spellings of true, infinity, octal and hex."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9]+", text):
        number = float(text)
        return text if number in {float("inf"), float("-inf")} else number
    return text


@dataclass(frozen=True)
class _Position:
    key: tuple[int, int]
    value: tuple[int, int]
    scalar: bool


@dataclass(frozen=True)
class _Origin:
    """A value that `${…}` gave: the expressions' names, the text before typing, what must not be printed."""

    names: tuple[str, ...]
    text: str
    secrets: tuple[str, ...]


class _ExpressionError(Exception):
    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class _Expressions:
    """Answers `VAR`, `VAR:-default` and `file:path`: what stands between `${` and `}`."""

    def __init__(self, env: Mapping[str, str], base: Path) -> None:
        self._env = env
        self._base = base

    def value(self, expression: str) -> tuple[str, str]:
        """The name to call it by, which is never secret, and its value."""
        if expression.startswith("file:"):
            return f"${{{expression}}}", self._file(expression.removeprefix("file:"))
        match = _VARIABLE.fullmatch(expression)
        if match is None or "${" in expression:
            raise _ExpressionError(
                "is not an expression",
                "write ${NAME}, ${NAME:-default} or ${file:/path}; $${ is a literal ${",
            )
        name, default = match.groups()
        value = self._env.get(name)
        if not value and default is not None:
            value = default
        if value is None:
            hint = get_close_matches(name, self._env, n=1, cutoff=0.8)
            raise _ExpressionError(
                f"the environment variable {name} is not set",
                f"did you mean {hint[0]}?" if hint else f"set {name}, or write ${{{name}:-default}}",
            )
        if not _is_utf8(value):
            raise _ExpressionError(f"the environment variable {name} is not UTF-8")
        return f"${{{name}}}", value

    def _file(self, name: str) -> str:
        if not name:
            raise _ExpressionError("names no file", "write ${file:/run/secrets/name}")
        path = self._base / name
        try:
            if not path.is_file():
                reason = "is not a file" if path.exists() else "does not exist"
                raise _ExpressionError(f"the file {path} {reason}")
            with path.open("rb") as file:
                content = file.read(MAX_SECRET_FILE + 1)
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or "not a path"
            raise _ExpressionError(f"the file {path} can't be read: {reason}") from None
        if len(content) > MAX_SECRET_FILE:
            raise _ExpressionError(f"the file {path} is larger than {format_size(MAX_SECRET_FILE)}")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise _ExpressionError(f"the file {path} is not UTF-8") from None
        return text.removesuffix("\n").removesuffix("\r")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mark(mark: Any) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)


class _Reader:
    """Turns one YAML text into plain values and remembers where each of them stands."""

    def __init__(self, file: str, base: Path, env: Mapping[str, str]) -> None:
        self._file = file
        self._expressions = _Expressions(env, base)
        self._values = 0
        self._open: set[int] = set()
        self._reported: set[tuple[int | None, int | None, str]] = set()
        self.problems: list[Problem] = []
        self.positions: dict[Steps, _Position] = {}
        self.origins: dict[Steps, _Origin] = {}
        self.broken: set[Steps] = set()

    def read(self, text: str) -> dict[str, Any]:
        try:
            return self._document(text)
        except ConfigError as error:
            self.problems.extend(error.problems)
            self.broken.add(())
            return {}

    def _problem(self, place: tuple[int, int] | None, path: Steps, message: str, hint: str | None = None) -> Problem:
        line, column = place or (None, None)
        return Problem(self._file, line, column, spell(path), message, hint)

    def _report(self, place: tuple[int, int], path: Steps, message: str, hint: str | None = None) -> None:
        # An anchored value is built once per alias: its mistake is one mistake.
        if (*place, message) not in self._reported:
            self._reported.add((*place, message))
            self.problems.append(self._problem(place, path, message, hint))

    def _stop(
        self, place: tuple[int, int] | None, message: str, hint: str | None = None, path: Steps = ()
    ) -> ConfigError:
        return ConfigError([self._problem(place, path, message, hint)])

    def _document(self, text: str) -> dict[str, Any]:
        strange = _UNREADABLE.search(text)
        if strange:
            line = text.count("\n", 0, strange.start()) + 1
            column = strange.start() - text.rfind("\n", 0, strange.start())
            raise self._stop((line, column), f"the character U+{ord(strange[0]):04X} can't stand in YAML")
        try:
            self._check_events(text)
            root = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            raise self._syntax(error, text) from None
        except yaml.YAMLError as error:
            raise self._stop(None, f"not valid YAML: {error}") from None
        if root is None or (isinstance(root, yaml.ScalarNode) and not root.style and typed(root.value) is None):
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise self._stop(_mark(root.start_mark), "the file must be a mapping, such as `server:` at its top")
        place = _mark(root.start_mark)
        self.positions[()] = _Position(place, place, scalar=False)
        return cast("dict[str, Any]", self._build(root, ()))

    def _check_events(self, text: str) -> None:
        """Refuses what only the event stream shows, before anything recurses into the document."""
        depth = documents = 0
        for event in yaml.parse(text, Loader=_Loader):
            place = _mark(event.start_mark)
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._stop(place, "a second document begins here", "remove the line ---")
            elif isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    raise self._stop(place, f"nested deeper than {MAX_DEPTH} levels")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            tag = getattr(event, "tag", None)
            if tag is not None:
                self._report(place, (), f"the tag {tag} is not allowed", "remove it; quotes make text")

    def _syntax(self, error: yaml.MarkedYAMLError, text: str) -> ConfigError:
        mark = error.problem_mark or error.context_mark
        begun = error.context_mark
        message = f"not valid YAML: {error.problem}"
        if begun is not None and mark is not None and begun.line != mark.line:
            message += f" ({error.context} that begins on line {begun.line + 1})"
        lines = text.splitlines()
        line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
        column = mark.column if mark is not None else 0
        special = next((sign for sign in line[max(column - 1, 0) : column + 1] if sign in "@`%*&!"), None)
        hint = None
        if "mapping values" in (error.problem or ""):
            hint = "check the indentation; a text that holds ': ' needs quotes"
        elif line[column : column + 1] == "\t":
            hint = "indent with blanks, not tabs"
        elif special:
            hint = f"put a text that begins with {special} in quotes"
        elif re.search(r"[\[{].*\$\{", line):
            hint = "inside [ ] and { } put ${…} in quotes"
        return self._stop(_mark(mark) if mark else None, message, hint)

    def _count(self, node: yaml.Node) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._stop(
                _mark(node.start_mark),
                f"more than {MAX_VALUES} values, aliases counted as often as they are used",
            )

    @contextmanager
    def _inside(self, node: yaml.Node, path: Steps) -> Iterator[None]:
        if id(node) in self._open:
            raise self._stop(_mark(node.start_mark), "an alias within its own anchor never ends", path=path)
        self._open.add(id(node))
        try:
            yield
        finally:
            self._open.remove(id(node))

    def _build(self, node: yaml.Node, path: Steps) -> Any:
        self._count(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        with self._inside(node, path):
            if isinstance(node, yaml.SequenceNode):
                return [self._placed(item, item, (*path, index)) for index, item in enumerate(node.value)]
            pairs = self._pairs(node, path)
        with self._inside(node, path):
            return {name: self._placed(key, value, (*path, name)) for name, (key, value) in pairs.items()}

    def _placed(self, key: yaml.Node, value: yaml.Node, path: Steps) -> Any:
        self.positions[path] = _Position(
            _mark(key.start_mark), _mark(value.start_mark), isinstance(value, yaml.ScalarNode)
        )
        return self._build(value, path)

    def _pairs(self, node: yaml.Node, path: Steps) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            self._count(key)
            if isinstance(key, yaml.ScalarNode) and not key.style and key.value == "<<":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            name = self._key(key, path)
            if name is None:
                continue
            if name in pairs:
                first = _mark(pairs[name][0].start_mark)[0]
                message = f"{name!r} is given twice, first on line {first}"
                self._report(_mark(key.start_mark), (*path, name), message, "keep one of them")
            else:
                pairs[name] = (key, value)
        for parent in merged:
            self._merge(parent, pairs, path)
        return pairs

    def _merge(self, parent: yaml.Node, pairs: dict[str, tuple[yaml.Node, yaml.Node]], path: Steps) -> None:
        if not isinstance(parent, yaml.MappingNode):
            self._report(_mark(parent.start_mark), path, "`<<` takes a mapping or a list of mappings")
            return
        with self._inside(parent, path):
            for name, pair in self._pairs(parent, path).items():
                pairs.setdefault(name, pair)

    def _key(self, key: yaml.Node, path: Steps) -> str | None:
        place = _mark(key.start_mark)
        if not isinstance(key, yaml.ScalarNode):
            self._report(place, path, "a key must be text, not a list or mapping")
            return None
        text: str = key.value
        if not key.style and not isinstance(typed(text), str):
            self.broken.add((*path, text))
            self._report(place, (*path, text), f"the key {text or 'null'} is not text", f'write "{text}":')
        return text

    def _scalar(self, node: yaml.ScalarNode, path: Steps) -> Any:
        text: str = node.value
        if "${" not in text:
            return text if node.style else typed(text)
        try:
            result, origin = self._substitute(text)
        except _ExpressionError as error:
            self.broken.add(path)
            self._report(_mark(node.start_mark), path, str(error), error.hint)
            return None
        if origin is None:
            return result
        self.origins[path] = origin
        whole = _EXPRESSION.fullmatch(text)
        return typed(result) if whole and whole[1] is not None and not node.style else result

    def _substitute(self, text: str) -> tuple[str, _Origin | None]:
        names: list[str] = []
        secrets: list[str] = []

        def value(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            if match[1] is None:
                raise _ExpressionError("`${` has no `}`", "write $${ for a literal ${")
            name, found = self._expressions.value(match[1])
            names.append(name)
            secrets.append(found)
            return found

        result = _EXPRESSION.sub(value, text)
        return result, _Origin(tuple(names), result, (result, *secrets)) if names else None


# --- Values with their places -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A configuration file's values, not yet validated, and where each of them stands.

    `problems` are mistakes of the text itself that let the validation go on: a missing variable, a key given
    twice. A value that is missing for such a reason is never reported a second time.
    """

    file: str
    base: Path
    data: dict[str, Any]
    positions: Mapping[Steps, _Position]
    origins: Mapping[Steps, _Origin]
    broken: frozenset[Steps]
    problems: tuple[Problem, ...]

    def where(self, path: Sequence[str | int], *, value: bool = False) -> tuple[int, int]:
        """Line and column, from 1, of the key or list item at `path`, else of its nearest known ancestor."""
        steps = tuple(path)
        for length in range(len(steps), -1, -1):
            position = self.positions.get(steps[:length])
            if position is not None:
                return position.value if value and length == len(steps) else position.key
        return (1, 1)

    def at(self, path: Sequence[str | int]) -> Any:
        """The value at `path`; LookupError where there is none."""
        value: Any = self.data
        for step in path:
            value = value[step]
        return value

    def problem(
        self, path: Sequence[str | int], message: str, hint: str | None = None, *, value: bool = False
    ) -> Problem:
        """A mistake that the caller found at `path`: an unknown plugin, a clash between two entries."""
        line, column = self.where(path, value=value)
        return Problem(self.file, line, column, spell(path), message, hint)

    def validate(self, model: type[_Model], prefix: Sequence[str | int] = ()) -> tuple[_Model | None, list[Problem]]:
        """The value at `prefix` as `model`, or the problems that prevent it.

        Use it for a plugin's `config` too: a `${SECRET}` of digits only, which YAML reads as a number, is
        given to a text field as text.
        """
        prefix = tuple(prefix)
        try:
            data = self.at(prefix)
        except LookupError:
            data = {}  # a section that is left out: all defaults
        while True:
            try:
                return model.model_validate(data, context={"base": self.base}), []
            except ValidationError as error:
                patched = self._numbers_as_text(error, data, prefix)
                if patched is None:
                    return None, self.problems_of(error, model, prefix)
                data = patched

    def _numbers_as_text(self, error: ValidationError, data: Any, prefix: Steps) -> Any | None:
        changed = False
        for detail in error.errors(include_url=False):
            if detail["type"] not in {"string_type", "bytes_type", "path_type"}:
                continue
            path = (*prefix, *detail["loc"])
            known = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in self.origins), None)
            if known is None or len(known) <= len(prefix):
                continue
            steps = known[len(prefix) :]
            if not isinstance(_at(data, steps), str):
                data = _with(data, steps, self.origins[known].text)
                changed = True
        return data if changed else None

    def problems_of(
        self, error: ValidationError, model: type[BaseModel], prefix: Sequence[str | int] = ()
    ) -> list[Problem]:
        """Pydantic's findings in plain words, placed in the file, in line order, without secret values."""
        found: dict[tuple[Steps, bool], Problem] = {}
        for detail in error.errors(include_url=False):
            finding = _Finding(self, detail, model, tuple(prefix))
            if finding.is_consequence() or finding.follows_from(self.broken):
                continue
            path = finding.path
            message, hint = finding.words()
            earlier = found.get((path, finding.is_key))
            if earlier is not None:  # one union, one problem
                if message not in earlier.message:
                    found[path, finding.is_key] = replace(earlier, message=f"{earlier.message}, or {message}")
                continue
            position = self.positions.get(path)
            found[path, finding.is_key] = self.problem(
                path, message, hint, value=finding.about_value and position is not None and position.scalar
            )
        return _in_line_order(list(found.values()))


def _at(data: Any, steps: Steps) -> Any:
    for step in steps:
        data = data[step]
    return data


def _with(data: Any, steps: Steps, value: object) -> Any:
    if not steps:
        return value
    copy = data.copy()
    copy[steps[0]] = _with(data[steps[0]], steps[1:], value)
    return copy


# --- pydantic's errors in plain words ---------------------------------------------------------------------


def _alternatives(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in {Union, UnionType}:
        for argument in get_args(annotation):
            yield from _alternatives(argument)
    else:
        yield annotation


def _models(annotations: Sequence[Any]) -> list[type[BaseModel]]:
    return [kind for kind in annotations if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _below(annotations: Sequence[Any], step: str | int) -> list[Any]:
    """The types that stand at `step` below values of these types; none where no type has such a step."""
    found: list[Any] = []
    for annotation in annotations:
        origin, arguments = get_origin(annotation), get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if isinstance(step, str) and step in (fields := _fields(annotation)):
                found += _alternatives(fields[step])
        elif isinstance(origin, type) and arguments:
            if issubclass(origin, Mapping) and isinstance(step, str) and step != "[key]":
                found += _alternatives(arguments[1])
            elif issubclass(origin, list | tuple | set | frozenset | Sequence) and isinstance(step, int):
                found += _alternatives(arguments[0])
    return found


def _is_secret(annotations: Sequence[Any]) -> bool:
    kinds = (get_origin(annotation) or annotation for annotation in annotations)
    return any(isinstance(kind, type) and issubclass(kind, SecretStr | SecretBytes | Secret) for kind in kinds)


_COMPARISONS: Final = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_WANTED: Final = {
    "int": "a whole number",
    "bool": "true or false",
    "float": "a number",
    "decimal": "a number",
    "finite": "a finite number",
    "string": "text",
    "bytes": "text",
    "path": "a file name",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen": "a list",
    "dict": "a mapping of keys to values",
    "mapping": "a mapping of keys to values",
    "model": "a mapping of keys to values",
    "dataclass": "a mapping of keys to values",
    "none": "left out",
}
_KINDS_OF_TYPE_ERROR: Final = re.compile(
    rf"({'|'.join(_WANTED)})_(?:type|parsing|parsing_size|from_float|number|required|set_type|attributes_type)"
)
_ABOUT_KEYS: Final = frozenset({"missing", "extra_forbidden"})


class _Finding:
    """One of pydantic's error details, beside the file and the model that it speaks of."""

    def __init__(self, source: Source, detail: ErrorDetails, model: type[BaseModel], prefix: Steps) -> None:
        self._source = source
        self._detail = detail
        self._kind = detail["type"]
        self._context: dict[str, Any] = detail.get("ctx") or {}
        path, annotations, secret = prefix, [model], False
        self._parents: list[Any] = []
        for step in detail["loc"]:
            below = _below(annotations, step)
            # pydantic puts names of union members and `[key]` between the steps; the file knows none of them.
            if not below and not self._in_file((*path, step)):
                continue
            self._parents, annotations = annotations, below
            secret = secret or _is_secret(below)
            at = source.positions.get(path)
            if (
                isinstance(step, str) or at is None or not at.scalar
            ):  # a single value that stands for a list of one has no [0]
                path = (*path, step)
        self.path: Steps = path
        self._annotations = annotations
        self._secret = secret
        self.is_key = "[key]" in detail["loc"]
        self.about_value = self._kind not in _ABOUT_KEYS and not self.is_key

    def _in_file(self, path: Steps) -> bool:
        return path in self._source.positions

    def is_consequence(self) -> bool:
        """Whether this error only repeats that another field, or an entry of this list, is wrong."""
        if self._kind == "too_short":
            return bool(len(self._detail["input"]) >= self._context["min_length"])
        return self._kind == "default_factory_not_called"

    def follows_from(self, broken: frozenset[Steps]) -> bool:
        """Whether a value that couldn't even be read explains this error."""
        if any(self.path[:length] in broken for length in range(len(self.path) + 1)):
            return True
        judged_whole = self._kind in {"value_error", "assertion_error", "refused"}
        return judged_whole and any(steps[: len(self.path)] == self.path for steps in broken)

    def words(self) -> tuple[str, str | None]:
        kind, context = self._kind, self._context
        if kind == "missing":
            return "is required", None
        if kind == "extra_forbidden":
            return self._unknown_key()
        if kind == "missing_key":
            return str(self._detail["msg"]), self._key_hint()
        if kind in {"literal_error", "enum"}:
            return self._unknown_word()
        if kind == "unit":
            examples = DURATION_EXAMPLES if context["kind"] == "duration" else SIZE_EXAMPLES
            return f"{self._shown()} is not a {context['kind']}", f"write {examples}"
        if kind in _COMPARISONS:
            name, comparison = _COMPARISONS[kind]
            return f"must be {comparison} {self._limit(context[name])}, not {self._shown()}", None
        if kind in {"too_short", "string_too_short", "too_long", "string_too_long"}:
            return self._wrong_length(), None
        if kind == "string_pattern_mismatch":
            subject = "the key" if self.is_key else self._shown()
            return f"{subject} doesn't match {context['pattern']}", None
        if kind.startswith("url_"):
            return "is not a valid URL", None
        match = _KINDS_OF_TYPE_ERROR.fullmatch(kind)
        if match:
            return f"must be {_WANTED[match[1]]}, not {self._shown()}", self._type_hint(match[1])
        return self._own_words()

    def _unknown_key(self) -> tuple[str, str | None]:
        name = str(self.path[-1])
        models = _models(self._parents)
        known = [field for model in models for field in _fields(model)]
        hint = _did_you_mean(name, known)
        if hint is None:
            for model in models:
                for section, annotation in _fields(model).items():
                    if any(name in _fields(inner) for inner in _models(list(_alternatives(annotation)))):
                        return "unknown key", f"it belongs under {section!r}"
        return "unknown key", hint or (f"known here: {', '.join(known)}" if known else "nothing is known here")

    def _key_hint(self) -> str:
        origin = self._source.origins.get(self.path)
        if origin:
            first = f"set {origin.names[0][2:-1]}"
        elif (
            _mapping(self._source.at(self.path[:-1]) if self._in_file(self.path[:-1]) else None).get("kind") == "openai"
        ):
            first = "write `api_key: ${NAME_OF_A_VARIABLE}`, or any text for a server that wants no key"
        else:
            first = "write `api_key: ${OPENROUTER_API_KEY}` and set that variable"
        return f"{first}, or `without_key: simulate` for simulated replies"

    def _unknown_word(self) -> tuple[str, str | None]:
        known = re.findall(r"'([^']*)'", str(self._context.get("expected", "")))
        given = self._detail["input"]
        hint = _did_you_mean(given, known, cutoff=0.5) if isinstance(given, str) else None
        return f"must be one of {', '.join(known)}, not {self._shown()}", hint

    def _limit(self, limit: Any) -> str:
        forms = {"duration": format_duration, "size": format_size}
        form = forms.get(self._unit() or "")
        return form(limit) if form else str(limit)

    def _unit(self) -> str | None:
        for parent in _models(self._parents):
            field = parent.model_fields.get(str(self.path[-1]))
            for extra in field.metadata if field else ():
                if isinstance(extra, WithJsonSchema) and extra.json_schema:
                    return cast("str | None", extra.json_schema.get("$comment"))
        return None

    def _wrong_length(self) -> str:
        least = "short" in self._kind
        count = self._context["min_length" if least else "max_length"]
        things = "character" if isinstance(self._detail["input"], str) else "entry"
        many = {"character": "characters", "entry": "entries"}[things] if count != 1 else things
        return f"must have at {'least' if least else 'most'} {count} {many}"

    def _type_hint(self, wanted: str) -> str | None:
        given = self._detail["input"]
        origin = self._source.origins.get(self.path)
        if wanted == "bool" and isinstance(given, str):
            meant = {"on": "true", "yes": "true", "off": "false", "no": "false"}
            return f"write {meant[given.lower()]}" if given.lower() in meant else None
        if wanted in {"string", "bytes", "path"} and isinstance(given, bool | int | float):
            return f'put it in quotes: "{origin.names[0]}"' if origin else "put it in quotes"
        if wanted in {"list", "tuple", "set", "frozen"} and not isinstance(given, dict | list):
            return "begin each entry with `- `, or write [a, b]"
        return None

    def _own_words(self) -> tuple[str, str | None]:
        """What a validator, maybe a plugin author's, says itself. It may have quoted the value."""
        error = self._context.get("error")
        message = str(error) if isinstance(error, Exception) else str(self._detail["msg"])
        hint = self._context.get("hint")
        if self._kind != "refused" and not isinstance(error, Exception):
            message = message[:1].lower() + message[1:]
        return self._masked(message), self._masked(hint) if isinstance(hint, str) else None

    def _masked(self, text: str) -> str:
        secrets = [
            secret
            for path, origin in self._source.origins.items()
            if path[: len(self.path)] == self.path or self.path[: len(path)] == path
            for secret in origin.secrets
        ]
        if self._secret:
            secrets.append(str(self._detail["input"]))
        for secret in sorted(filter(None, secrets), key=len, reverse=True):
            text = text.replace(secret, MASK)
        return text

    def _shown(self) -> str:
        given = self._detail["input"]
        if isinstance(given, dict):
            return "a mapping"
        if isinstance(given, list | tuple):
            return "a list"
        if given is None:
            return "empty"
        origin = self._source.origins.get(self.path)
        if origin:
            return f"the value of {', '.join(origin.names)}"
        if self._secret:
            return "the value given"
        if self._unit() and self._kind != "unit":  # pydantic's input is already in seconds or bytes
            return repr(self._source.at(self.path)) if self._in_file(self.path) else str(given)
        if isinstance(given, bool):
            return str(given).lower()
        if isinstance(given, str):
            text = _without_password(given)
            return repr(text if len(text) <= 60 else text[:60] + "…")
        return str(given)


# --- Load -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A configuration without mistakes."""

    settings: Settings
    source: Source


@dataclass(frozen=True)
class Examined:
    """A configuration with all its mistakes; `settings` is None where there are any."""

    settings: Settings | None
    source: Source
    problems: tuple[Problem, ...]

    def plugins(self) -> list[tuple[int, PluginEntry]]:
        """The entries of `plugins` that are sound in themselves, with their index, whatever else is wrong."""
        return _sound_plugins(self.source)


def _content(path: Path) -> str:
    def stop(message: str, hint: str | None = None) -> ConfigError:
        return ConfigError([Problem(str(path), None, None, "", message, hint)])

    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise stop("there is no such file") from None
    except OSError as error:
        raise stop(f"can't be read: {error.strerror}") from None
    if len(content) > MAX_FILE:
        raise stop(f"is larger than {format_size(MAX_FILE)}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        problem = Problem(str(path), line, column, "", "is not UTF-8", "save the file as UTF-8")
        raise ConfigError([problem]) from None


def _source(text: str, file: str, base: Path, env: Mapping[str, str]) -> Source:
    reader = _Reader(file, base, env)
    data = reader.read(text.removeprefix("\ufeff"))
    return Source(
        file=file,
        base=base,
        data=data,
        positions=reader.positions,
        origins=reader.origins,
        broken=frozenset(reader.broken),
        problems=tuple(_in_line_order(reader.problems)),
    )


def read(path: Path, env: Mapping[str, str] = os.environ) -> Source:
    """The file's values, not validated. Raises ConfigError when its text has mistakes."""
    source = _source(_content(path), str(path), path.absolute().parent, env)
    if source.problems:
        raise ConfigError(source.problems)
    return source


def examine(path: Path, env: Mapping[str, str] = os.environ) -> Examined:
    """All that can be said about the file. Raises ConfigError only when it can't be read at all."""
    return _examine(_source(_content(path), str(path), path.absolute().parent, env))


def load(path: Path, env: Mapping[str, str] = os.environ) -> Loaded:
    """The file's settings. Raises ConfigError with every mistake at once."""
    return _loaded(examine(path, env))


def load_text(text: str, file: str = "<text>", env: Mapping[str, str] = os.environ, base: Path | None = None) -> Loaded:
    """As `load`, from text; `base` is the directory that relative file names start from."""
    return _loaded(examine_text(text, file, env, base))


def examine_text(
    text: str, file: str = "<text>", env: Mapping[str, str] = os.environ, base: Path | None = None
) -> Examined:
    return _examine(_source(text, file, base or Path.cwd(), env))


def _loaded(examined: Examined) -> Loaded:
    if examined.settings is None:
        raise ConfigError(examined.problems)
    return Loaded(examined.settings, examined.source)


def _examine(source: Source) -> Examined:
    settings: Settings | None = None
    found: list[Problem] = []
    if () not in source.broken:
        settings, found = source.validate(Settings)
        found += _cross_problems(source)
    problems = _in_line_order([*source.problems, *found])
    return Examined(None if problems else settings, source, tuple(problems))


def _cross_problems(source: Source) -> list[Problem]:
    """Checks between sections, on the raw values: they must speak also where other fields are wrong."""
    return [*_unknown_upstreams(source), *_repeated_ids(source)]


def _unknown_upstreams(source: Source) -> Iterator[Problem]:
    upstreams = source.data.get("upstreams")
    known = list(_default_upstreams() if upstreams is None else upstreams if isinstance(upstreams, dict) else ())
    if not known:
        return
    overrides = _mapping(_mapping(source.data.get("catalogue")).get("overrides"))
    named: dict[Steps, object] = {
        ("upstream", "default"): _mapping(source.data.get("upstream")).get("default", "openrouter")
    }
    for model, override in overrides.items():
        named["catalogue", "overrides", model, "upstream"] = _mapping(override).get("upstream")
    for path, raw in named.items():
        given = source.origins.get(path)
        name = given.text if given and raw is not None else raw
        if isinstance(name, str) and name not in known:
            hint = _did_you_mean(name, known) or f"known: {', '.join(known)}"
            shown = f"the value of {given.names[0]}" if given else repr(name)
            yield source.problem(path, f"there is no upstream {shown}", hint, value=True)


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _repeated_ids(source: Source) -> Iterator[Problem]:
    first: dict[str, int] = {}
    entries = source.data.get("plugins")
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        use, given = _mapping(entry).get("use"), _mapping(entry).get("id")
        name = given if given is not None else _default_id({"use": use}) if isinstance(use, str) else None
        if not isinstance(name, str) or first.setdefault(name, index) == index:
            continue
        line = source.where(("plugins", first[name]))[0]
        path = ("plugins", index, "id" if given is not None else "use")
        origin = source.origins.get(path)
        shown = f"of {', '.join(origin.names)}" if origin else repr(name)
        yield source.problem(
            path,
            f"a plugin with the id {shown} stands on line {line} already",
            "give this one an `id` of its own",
            value=True,
        )


def _sound_plugins(source: Source) -> list[tuple[int, PluginEntry]]:
    entries = source.data.get("plugins")
    sound: list[tuple[int, PluginEntry]] = []
    for index in range(len(entries) if isinstance(entries, list) else 0):
        entry, _ = source.validate(PluginEntry, ("plugins", index))
        if entry is not None:
            sound.append((index, entry))
    return sound


# --- Dumps and the schema ---------------------------------------------------------------------------------

_SECRET_NAME: Final = re.compile(
    r"key|secret|token|password|passwd|pepper|credential|authorization|cookie", re.IGNORECASE
)
_USER_INFO: Final = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def _without_password(text: str) -> str:
    return _USER_INFO.sub(MASK, text)


def masked(settings: Settings, source: Source | None = None) -> dict[str, Any]:
    """The settings for people to read: JSON types, `30s` and `20MiB`, secrets as `***`.

    With the source, values that came from `${…}` are masked too. Without it nobody knows which those are, so
    every value in a plugin's `config` is.
    """
    dump = settings.model_dump(mode="json")
    for upstream in dump["upstreams"].values():
        upstream["headers"] = dict.fromkeys(upstream["headers"], MASK)
    if source is None:
        for plugin in dump["plugins"]:
            plugin["config"] = _all_masked(plugin["config"])
    origins = source.origins if source is not None else {}
    return cast("dict[str, Any]", _masked(dump, (), origins))


def _all_masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _all_masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_all_masked(item) for item in value]
    return value if value is None else MASK


def _masked(value: Any, path: Steps, origins: Mapping[Steps, _Origin]) -> Any:
    if isinstance(value, dict):
        return {key: _masked(item, (*path, key), origins) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, (*path, index), origins) for index, item in enumerate(value)]
    if value is None:
        return None
    in_config = path[:1] == ("plugins",) and path[2:3] == ("config",)
    named_secret = (
        in_config
        and isinstance(value, str)
        and any(isinstance(step, str) and _SECRET_NAME.search(step) for step in path[3:])
    )
    if path in origins or named_secret or value == str(SecretStr("x")):
        return MASK
    return _without_password(value) if isinstance(value, str) else value


_EXPRESSION_SCHEMA: Final = {"type": "string", "pattern": r"^\$\{.+\}$"}
_ANNOTATIONS: Final = frozenset({"title", "description", "default", "examples", "$comment"})


def json_schema(plugin_schemas: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The JSON schema of the file, for editors. `plugin_schemas`: by `use`, the schema of its `config`."""
    schema = Settings.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    conditions: list[dict[str, Any]] = []
    for use, config in sorted((plugin_schemas or {}).items()):
        name = f"plugin_{re.sub(r'[^A-Za-z0-9_]', '_', use)}"
        config = _renamed(config, f"{name}_")  # noqa: PLW2901 # from here on only the renamed one is right
        for inner, definition in config.pop("$defs", {}).items():
            definitions[f"{name}_{inner}"] = definition
        definitions[name] = config
        condition = {"properties": {"use": {"const": use}}, "required": ["use"]}
        then = {"properties": {"config": {"$ref": f"#/$defs/{name}"}}}
        conditions.append({"if": condition, "then": then})
    if conditions:
        definitions["PluginEntry"]["allOf"] = conditions
        definitions["PluginEntry"]["properties"]["use"]["examples"] = sorted(plugin_schemas or {})
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Xenios"}
    return _for_editors(schema)


def _renamed(schema: Any, prefix: str) -> Any:
    """A copy whose references point at the definitions' names in the whole file's schema."""
    if isinstance(schema, dict):
        return {
            key: value.replace("#/$defs/", f"#/$defs/{prefix}", 1)
            if key == "$ref" and isinstance(value, str)
            else _renamed(value, prefix)
            for key, value in schema.items()
        }
    return [_renamed(item, prefix) for item in schema] if isinstance(schema, list) else schema


def _for_editors(schema: dict[str, Any]) -> dict[str, Any]:
    """Defaults as people write them, `${…}` wherever a number, boolean or one of some words stands."""
    result = {
        key: {name: _property(item) for name, item in value.items()}
        if key in {"properties", "patternProperties"}
        else {name: _for_editors(item) for name, item in value.items()}
        if key == "$defs"
        else _property(value)
        if key in {"items", "additionalProperties"} and isinstance(value, dict)
        else value
        for key, value in schema.items()
    }
    if "patternProperties" in result:
        result.setdefault("additionalProperties", False)
    return result


def _property(schema: dict[str, Any]) -> dict[str, Any]:
    result = _for_editors(schema)
    unit = result.get("$comment")
    if unit in {"duration", "size"} and "default" in result:
        result["default"] = (format_duration if unit == "duration" else format_size)(result["default"])
    if {"type": "string"} in result.get("anyOf", ()):
        return result
    if "anyOf" in result:
        result["anyOf"] = [*map(_for_editors, result["anyOf"]), _EXPRESSION_SCHEMA]
    elif result.get("type") in {"integer", "number", "boolean"} or "enum" in result or "pattern" in result:
        plain = {key: value for key, value in result.items() if key not in _ANNOTATIONS}
        noted = {key: value for key, value in result.items() if key in _ANNOTATIONS}
        result = {**noted, "anyOf": [plain, _EXPRESSION_SCHEMA]}
    return result
