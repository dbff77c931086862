"""Which handler answers which path, and who may call it. Authorisation goes by the matched route, never by a URL."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from gateway.errors import MethodNotAllowed, NotFound

if TYPE_CHECKING:
    from gateway.dialects import Dialect
    from gateway.exchange import Exchange, Reply

Access = Literal["principal", "admin", "bearer", "public"]
BodyKind = Literal["json", "stream", "none"]
Handler = Callable[["Exchange"], Awaitable["Reply"]]


@dataclass(frozen=True, slots=True)
class Route:
    """One method and path. `handler` None: proxied through the pipeline to an upstream."""

    method: str
    path: str
    endpoint: str
    dialect: Dialect
    handler: Handler | None = None
    access: Access = "principal"
    body: BodyKind = "json"
    max_body: int | None = None
    plugin: str = "core"
    summary: str = ""
    produces: str = "application/json"
    bearer: str | None = field(default=None, repr=False)
    pattern: re.Pattern[str] | None = field(default=None, repr=False)

    @property
    def proxied(self) -> bool:
        return self.handler is None


class RouteTable:
    """Exact paths by dictionary, templates (`{id}` without slash, `{id:regex}`) by pattern, in the order added."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self.routes = routes
        self._exact = {(r.method, r.path): r for r in routes if r.pattern is None}
        self._patterns = tuple(r for r in routes if r.pattern is not None)

    def exact(self, method: str, raw_path: str) -> Route | None:
        """The route whose path is literally what was sent: most are."""
        return self._exact.get((method, raw_path))

    def match(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        """`path` is decoded. HEAD finds the route of GET. Raises NotFound or MethodNotAllowed (with `Allow`)."""
        if method == "HEAD":
            method = "GET"
        route = self._exact.get((method, path))
        if route is not None:
            return route, {}
        allowed = {r.method for r in self.routes if r.pattern is None and r.path == path}
        for route in self._patterns:
            found = route.pattern.fullmatch(path)  # type: ignore[union-attr]  # only templates are in this tuple
            if found is None:
                continue
            if route.method == method:
                return route, found.groupdict()
            allowed.add(route.method)
        if allowed:
            raise MethodNotAllowed(
                f"This path takes {', '.join(sorted(allowed))}.",
                headers={"Allow": ", ".join(sorted(allowed))},
            )
        raise NotFound(f"There is no endpoint {path[:200]!r} here.", code="unknown_url")


class Router:
    """What plugins add their routes to."""

    def __init__(self, dialects: dict[str, Dialect], default: Dialect) -> None:
        self._dialects = dialects
        self._default = default
        self._routes: list[Route] = []
        self.plugin = "core"

    def add(
        self,
        method: str,
        path: str,
        handler: Handler | None,
        *,
        access: Access = "principal",
        body: BodyKind | None = None,
        max_body: int | None = None,
        dialect: str | None = None,
        endpoint: str | None = None,
        summary: str = "",
        bearer: str | None = None,
        produces: str = "application/json",
    ) -> None:
        """Add a route. `path` may hold `{name}` (no slash) and `{name:regex}`; found values are `request.path_params`.

        `handler(exchange)` returns a `Reply`. `body`: `json` (parsed into `exchange.body`; default for methods with a
        body), `stream` (of any content type: the handler reads `async for piece in exchange.upload()`, so that it is
        never whole in memory, and may take as long as 64 KiB come within each `server.body_timeout`), `none`.
        `max_body` in bytes. `dialect` names an endpoint (`messages`) whose error shape to use. `access`: `principal`,
        whoever has a key; `admin`; `public`; or `bearer`, for programs that are nobody: the token `bearer` is asked
        for, and no plugin that authenticates. `produces`: the answer's content type, for the document of all routes.
        """
        method = method.upper()
        if not path.startswith("/"):
            raise ValueError(f"{self.plugin}: the path {path!r} must begin with '/'.")
        if access not in get_args(Access):
            raise ValueError(f"{self.plugin}: {method} {path}: access is {access!r}; it is one of {_words(Access)}.")
        if body is not None and body not in get_args(BodyKind):
            raise ValueError(f"{self.plugin}: {method} {path}: body is {body!r}; it is one of {_words(BodyKind)}.")
        if (access == "bearer") != bool(bearer):
            raise ValueError(f"{self.plugin}: {method} {path}: access `bearer` and a token go together.")
        if handler is None and dialect is None:
            raise ValueError(f"{self.plugin}: {method} {path} has no handler.")
        if any(r.method == method and r.path == path for r in self._routes):
            owner = next(r.plugin for r in self._routes if r.method == method and r.path == path)
            raise ValueError(f"{self.plugin}: {method} {path} is taken by {owner}.")
        self._routes.append(
            Route(
                method=method,
                path=path,
                endpoint=endpoint or path,
                dialect=self._dialects[dialect] if dialect else self._default,
                handler=handler,
                access=access,
                body=body or ("none" if method in {"GET", "HEAD", "DELETE"} else "json"),
                max_body=max_body,
                plugin=self.plugin,
                summary=summary,
                bearer=bearer,
                produces=produces,
                pattern=_pattern(path) if "{" in path else None,
            )
        )

    def table(self) -> RouteTable:
        return RouteTable(tuple(self._routes))


def _words(kind: Any) -> str:
    return ", ".join(get_args(kind))


def _pattern(path: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)(?::([^{}]+))?\}", path)
    out = re.escape(pieces[0])
    for name, regex, literal in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        out += f"(?P<{name}>{regex or '[^/]+'})" + re.escape(literal)
    return re.compile(out)
