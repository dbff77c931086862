"""`xenios explain`: asked of a running gateway, or answered by the configuration alone; and the answer in words."""

from __future__ import annotations

import contextlib
import math
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import msgspec

from gateway import explain
from gateway.catalogue import Catalogue
from gateway.core_routes import add_core_routes
from gateway.errors import GatewayError
from gateway.exchange import Principal
from gateway.health import Health
from gateway.kit.ledger import MemoryLedger
from gateway.kit.ledger_redis import RedisLedger
from gateway.logs import hide
from gateway.plugins import schemas
from gateway.services import Services
from gateway.settings import secrets_of
from gateway.snapshot import build
from gateway.stores import open_database, open_redis
from gateway.tasks import Tasks
from gateway.upstream import UpstreamClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from gateway.exchange import JsonObject
    from gateway.explain import Asked
    from gateway.kit.ledger import Ledger
    from gateway.plugins import Blueprint
    from gateway.settings import Loaded, Settings, Upstream
    from gateway.snapshot import Snapshot

NOBODY = Principal("command-line", kind="cli", tenant="default", admin=True)
_ASK_SECONDS = 30


async def by_gateway(url: str, key: str, asked: Asked) -> JsonObject:
    """The answer of `POST /admin/explain`. Raises GatewayError with what it says instead, OSError."""
    import aiohttp  # noqa: PLC0415 - a third of a second, which the other way does without

    timeout = aiohttp.ClientTimeout(_ASK_SECONDS)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(
            url.rstrip("/") + "/admin/explain", data=msgspec.json.encode(asked), headers=headers, allow_redirects=False
        ) as reply,
    ):
        body = await reply.read()
        try:
            answer = msgspec.json.decode(body)
        except msgspec.DecodeError:
            answer = None
        if reply.status == 200 and isinstance(answer, dict):
            return answer
        error = answer.get("error") if isinstance(answer, dict) else None
        said = error.get("message") if isinstance(error, dict) else "this is no Xenios"
        raise GatewayError(f"{url} answered with HTTP {reply.status}: {said}")


async def by_configuration(loaded: Loaded, blueprints: Sequence[Blueprint], asked: Asked) -> JsonObject:
    """Plugins are constructed and not opened; of stores only what is asked is read. Raises GatewayError, StartError."""
    settings = loaded.settings
    async with _snapshot(loaded, blueprints) as snapshot:
        principal = NOBODY
        if asked.principal is not None:
            principal = await explain.restored(snapshot, asked.principal)
        answer = await explain.dry_run(snapshot, asked, principal)
    where = settings.services.redis.get_secret_value()
    left = f", and what limits have left (services.redis is {where})" if _is_private(settings) else ""
    note = f"A running gateway alone knows the state of its upstreams{left}: ask it by --url."
    return {**answer, "note": note}


def _is_private(settings: Settings) -> bool:
    """The running gateway's own counts: nobody else can read them."""
    return settings.services.redis.get_secret_value() in {"memory", "embedded"}


@contextlib.asynccontextmanager
async def _snapshot(loaded: Loaded, blueprints: Sequence[Blueprint]) -> AsyncIterator[Snapshot]:
    settings = loaded.settings
    hide(loaded.secrets())
    hide(secret for blueprint in blueprints for secret in secrets_of(blueprint.config))
    folder = settings.server.data_dir
    # What only looks must not bring the tables up to date.
    given = settings.services.database.model_copy(update={"migrate_on_start": False})
    looking = settings.model_copy(update={"services": settings.services.model_copy(update={"database": given})})
    async with contextlib.AsyncExitStack() as stack:
        ledger: Ledger = MemoryLedger()
        if not _is_private(settings) and (redis := await stack.enter_async_context(open_redis(settings, None))):
            ledger = RedisLedger(redis)
        services = Services(
            settings=settings,
            catalogue=_catalogue(settings),
            tasks=Tasks(),
            data_dir=folder,
            pepper="",  # nobody shows a key here
            bootstrap_key_hash="not read" if settings.server.bootstrap_key else None,
            ledger=ledger,
            opened_database=await stack.enter_async_context(
                open_database(looking, folder, schemas(blueprints), needed=False)
            ),
        )
        health = Health(lambda: False)
        yield build(loaded, blueprints, services, _unreachable, lambda router: add_core_routes(router, health))


def _catalogue(settings: Settings) -> Catalogue:
    async def no_fetch(_: str) -> bytes:
        raise OSError

    cache = settings.server.data_dir / "catalogue"
    catalogue = Catalogue(
        {name: upstream.kind for name, upstream in settings.upstreams.items()},
        settings.catalogue,
        cache if cache.is_dir() else None,
        no_fetch,
        default=settings.upstream.default,
    )
    catalogue.load()
    return catalogue


def _unreachable(name: str, settings: Upstream) -> UpstreamClient:
    """Known by name and kind; nothing can be sent to it, and its key is not needed."""
    no_transport: Any = None
    return UpstreamClient(name, settings, no_transport)


# --- in words --------------------------------------------------------------------------------------------------------


def in_words(answer: JsonObject) -> str:
    """For people; what programs read is the answer itself."""
    return "\n".join(_lines(answer)) + "\n"


def _lines(answer: JsonObject) -> Iterator[str]:
    yield f"{answer['endpoint']}, {answer['asked'] or 'no model'}, as {_who(answer['principal'])}"
    refused, targets = answer["refused"], answer["targets"]
    yield ""
    if refused is not None:
        yield f"Refused by {refused['by']}: {refused['status']} {refused['code']}"
        yield f"  {refused['message']}"
    elif targets:
        first = targets[0]
        goes = "Becomes a job, which goes" if answer["phase"] == "accept" else "Goes"
        yield f"{goes} to {first['model']} at {first['upstream']}{_at_most(answer['worst_case_usd'])}."
    for reason in answer["reasons"]:
        yield f"  {reason}"
    if targets:
        yield "\nTargets, in order"
        for number, target in enumerate(targets, 1):
            yield from _target(number, target)
    if answer["limits"]:
        yield "\nLimits"
        for limit in answer["limits"]:
            yield f"  {limit['plugin']:14} {_limit(limit)}"
    if answer["findings"]:
        yield "\nPlugins say"
        for finding in answer["findings"]:
            lines = _finding(finding).splitlines() or [""]
            yield from (f"  {name:14} {line}" for name, line in zip_longest([finding["plugin"]], lines, fillvalue=""))
    yield "\nPlugins, in call order"
    for hook, plugins in answer["plugins"].items():
        yield f"  {hook:18} {' → '.join(plugins)}"
    if answer["left_out"]:
        yield f"  left out by their `when:`: {', '.join(answer['left_out'])}"
    if answer["silent"]:
        yield f"  may refuse or answer too, and can't say so: {', '.join(answer['silent'])}"
    if answer.get("note"):
        yield f"\n{answer['note']}"


def _who(principal: JsonObject | None) -> str:
    if principal is None:
        return "nobody"
    more = [f"tenant {principal['tenant']}"]
    more += [f"team {principal['team']}"] if principal["team"] else []
    more += [f"roles {', '.join(principal['roles'])}"] if principal["roles"] else []
    more += ["admin"] if principal["admin"] else []
    return f"{principal['kind']}:{principal['id']} ({', '.join(more)})"


def _target(number: int, target: JsonObject) -> Iterator[str]:
    price, context = target["price"] or {}, target["context_length"]
    usd = " / ".join("?" if price.get(n) is None else f"{price[n]:g}" for n in ("input", "output"))
    about = f"{usd} USD per million tokens, context {f'{context:,}' if context else '?'}"
    skipped = "" if target["tried"] else "  (not tried)"
    yield f"  {number}. {target['upstream']}/{target['model']}  {about}{_at_most(target['worst_case_usd'])}{skipped}"
    for name, value in target["set"].items():
        yield f"     sets {name}: {msgspec.json.encode(value).decode()}"
    if target["strip"]:
        yield f"     removes {', '.join(target['strip'])}"
    for finding in target["findings"]:
        yield f"     {finding['plugin']}: {_finding(finding)}"


def _limit(limit: JsonObject) -> str:
    """What it takes, and what is left then; or what there is, if that is not enough."""
    money = limit["kind"] == "budget"
    takes, left = (limit[name] for name in (("takes_usd", "left_usd") if money else ("takes", "left")))
    if limit["refuses"] is not None:
        code = f"{limit['refuses']['status']} {limit['refuses']['code']}"
        return f"{limit['limit']}; refuses, {code}: takes {_amount(takes, money)}, {_amount(left, money)} left"
    told = "" if left is None else f", {_amount(left, money)} left then"
    return f"{limit['limit']}; takes {_amount(takes, money)}{told}"


def _amount(number: float, money: bool) -> str:
    return f"{number:,.6f} USD" if money else f"{number:,}"


def _finding(finding: JsonObject) -> str:
    refuses = finding["refuses"]
    if refuses is None:
        return str(finding["text"])
    told = f"{finding['text']}: " if finding["text"] != refuses["message"] else ""
    return f"{told}refuses, {refuses['status']} {refuses['code']}: {refuses['message']}"


def _at_most(usd: float | None) -> str:
    """Rounded up, as budgets reserve."""
    return "" if usd is None else f", at most {math.ceil(round(usd * 1e6, 3)) / 1e6:.6f} USD"
