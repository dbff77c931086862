"""Background responses: taken, shown, followed, cancelled, deleted, continued."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from gateway import BadRequest, Conflict, ContextKey, LateRequest, NotFound, Reply, TooLarge
from gateway.kit import limit_of
from gateway_plugins.jobs.jobs import Jobs, Options, idempotency_key
from gateway_plugins.jobs.responses import items, objects
from gateway_plugins.jobs.responses.running import EVENT_STREAM, ResponseFollower, ResponseRunner, shown
from gateway_plugins.jobs.routes import whose

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway import Exchange, Router
    from gateway_plugins.jobs.parts import Shared
    from gateway_plugins.jobs.responses.objects import JsonObject
    from gateway_plugins.jobs.store import Job

ENDPOINT = "responses"
PREFIXES = ("/v1", "/api/v1")
MOST_ITEMS = 100
LONGEST_NUMBER = 12  # digits
_ID = re.compile(r"resp_[0-9a-f]{32}")
_TRUE = frozenset({"true", "1"})
# Of OpenAI's, what no upstream offers. Told by name: `{id}` would take them for a response's.
_ABSENT = {
    "compact": "Nothing compacts a conversation here. Have a model sum it up, and begin anew with that in `input`; or "
    "let the upstream drop its middle, by `truncation: auto`.",
    "input_tokens": "Nothing counts the tokens of a response's input here. `usage` in its answer tells them; "
    "/v1/messages/count_tokens estimates those of the same messages.",
}


class Responses(Jobs):
    """The part: each background response is a job of a kind of its own."""

    kind = "response"
    id_prefix, id_bytes = "resp_", 16
    runs = ResponseRunner
    follows = ResponseFollower

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self._taken: ContextKey[bool] = ContextKey("responses.taken")

    def register_routes(self, router: Router) -> None:
        if not self._config.responses.enabled:
            return
        for prefix in PREFIXES:
            path = prefix + "/responses/{id}"
            about = "A background response; with stream=true its events, after the one of number `starting_after`."
            router.add("GET", path, self.show, summary=about)
            router.add("POST", f"{path}/cancel", self.stop, body="none", summary="Stop a background response.")
            router.add("DELETE", path, self.forget, summary="Forget a background response.")
            router.add("GET", f"{path}/input_items", self.input_items, summary="What a background response was asked.")
            for name in _ABSENT:
                router.add(
                    "POST", f"{prefix}/responses/{name}", self.absent, summary="Not there: says what is instead."
                )

    # --- taken -----------------------------------------------------------------------------------------------------

    async def prepare(self, exchange: Exchange) -> None:
        """A conversation that goes on is filled in, whichever way the request is answered."""
        if exchange.endpoint != ENDPOINT or not self._config.responses.enabled:
            return
        body = exchange.body
        background = body.get("background") is True and exchange.phase == "live"
        if body.get("background") is True and not background:
            message = "This request is answered later as it is: leave `background` out, or send it to /v1/responses."
            raise BadRequest(message, param="background")
        await self._continue(exchange, strict=background)
        if not background:
            return
        if body.get("store") is False:
            raise BadRequest("A background response is stored: `store` can't be false.", param="store")
        exchange.set(self._taken, True)
        exchange.body = {name: value for name, value in body.items() if name != "background"}
        exchange.phase = "accept"

    async def accept(self, exchange: Exchange) -> Reply | None:
        """Its client gets the object, or the stream of its events."""
        if not exchange.get(self._taken):
            return None
        job, is_new = await self._take(exchange, Options(idempotency_key=idempotency_key(exchange)))
        headers = {} if is_new else {"Idempotent-Replayed": "true"}
        if job.stream:
            return self._stream(job, -1, headers)
        return Reply(200, data=await shown(self.store, job), headers=headers)

    def _made(self, exchange: Exchange, options: Options) -> tuple[Job, LateRequest]:
        job, late = super()._made(exchange, options)
        sent: JsonObject = msgspec.json.decode(late.body)
        response = objects.queued(sent, job.id, job.created_at // 1000)
        body = {name: value for name, value in sent.items() if name not in {"background", "previous_response_id"}}
        body["input"] = exchange.body.get("input")
        job = msgspec.structs.replace(job, metadata=msgspec.json.encode(response).decode())
        return job, replace(late, body=msgspec.json.encode(body))

    async def _continue(self, exchange: Exchange, *, strict: bool) -> None:
        """The conversation so far in front of `input`, where it is kept here. `strict`: it must be."""
        previous = exchange.body.get("previous_response_id")
        if previous is None:
            return
        known = isinstance(previous, str) and _ID.fullmatch(previous) is not None
        job = await self.store.get(previous, whose(exchange, {})) if known else None
        if job is None:
            if not strict:
                return  # the upstream may know it
            raise BadRequest(
                f"Previous response with id {str(previous)[:100]!r} not found.",
                param="previous_response_id", code="previous_response_not_found",
            )  # fmt: skip
        if job.status != "succeeded":
            raise BadRequest(
                f"Previous response with id {job.id!r} is not completed.",
                param="previous_response_id", code="previous_response_not_completed",
            )  # fmt: skip
        before = await shown(self.store, job)
        whole = items.continued(await self._input(job), before["output"], exchange.body.get("input"))
        exchange.body["input"] = whole
        del exchange.body["previous_response_id"]
        most = exchange.snapshot.settings.server.max_body
        most = min(most, self._config.max_body) if strict else most
        if (size := len(msgspec.json.encode(exchange.body))) > most:
            raise TooLarge(
                f"With all that was said before, this request has {size} bytes; it may have {most}. Begin anew, "
                "without `previous_response_id`, and say in `input` what matters of the conversation.",
                param="previous_response_id",
            )

    async def _input(self, job: Job) -> Any:
        late = LateRequest.from_json(await self.store.request(job.id))
        return msgspec.json.decode(late.body).get("input")

    # --- its routes ------------------------------------------------------------------------------------------------

    async def show(self, exchange: Exchange) -> Reply:
        job = await self._own(exchange)
        query = exchange.request.query
        if query.get("stream") not in _TRUE:
            return Reply(200, data=await shown(self.store, job))
        if not job.stream:
            raise BadRequest("It was not created with `stream: true`, so there are no events of it.", param="stream")
        return self._stream(job, _number(query, "starting_after", -1), {})

    async def stop(self, exchange: Exchange) -> Reply:
        job = await self.cancel(await self._own(exchange, "cancel"))
        return Reply(200, data=await shown(self.store, job))

    async def forget(self, exchange: Exchange) -> Reply:
        job = await self.cancel(await self._own(exchange))
        if not await self.delete(job):
            raise Conflict("It is being stopped. Try again soon.", code="response_running", retry_after=1)
        return Reply(200, data={"id": job.id, "object": "response", "deleted": True})

    async def input_items(self, exchange: Exchange) -> Reply:
        job = await self._own(exchange)
        query = exchange.request.query
        order = query.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise BadRequest("`order` is asc or desc.", param="order")
        listed = items.listed(await self._input(job), job.id)
        limit = limit_of(query, default=20, most=MOST_ITEMS)
        return Reply(200, data=items.page(listed, limit=limit, order=order, after=query.get("after")))

    async def absent(self, exchange: Exchange) -> Reply:
        raise NotFound(_ABSENT[exchange.route.path.rpartition("/")[2]], code="unknown_url")

    async def _own(self, exchange: Exchange, what: str = "") -> Job:
        """Raises NotFound: also of another tenant's."""
        response_id = exchange.request.path_params["id"]
        tenant = whose(exchange, exchange.request.query)
        job = await self.store.get(response_id, tenant) if _ID.fullmatch(response_id) else None
        if job is None:
            if what and response_id.startswith("job_"):
                raise BadRequest(f"Only background responses can be {what}led here; a job at /v1/jobs/{{id}}/{what}.")
            raise NotFound(f"Response with id {response_id[:100]!r} not found.")
        return job

    def _stream(self, job: Job, after: int, headers: dict[str, str]) -> Reply:
        headers = {"Content-Type": EVENT_STREAM, "Cache-Control": "no-cache", **headers}
        return Reply(200, chunks=self.follower.follow(job.id, after), headers=headers)


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > LONGEST_NUMBER:
        raise BadRequest(f"`{name}` is the `sequence_number` of an event.", param=name)
    return int(text)
