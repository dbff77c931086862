"""GET /v1/usage for a caller's own tenant, /admin/usage for administrators."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gateway import BadRequest, NotFound, Reply
from gateway.kit import limit_of, query_of
from gateway_plugins.usage import shown, store

if TYPE_CHECKING:
    from gateway import Exchange, Router
    from gateway.kit import Database

_QUERY = "Query: from, to, group_by (day, tenant, key, team, model, task, endpoint, outcome), format=csv, limit, after"


class Routes:
    """The routes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def register(self, router: Router) -> None:
        router.add("GET", "/v1/usage", self.own, summary=f"Requests of your tenant, or sums of them. {_QUERY}, key, …")
        router.add("GET", "/v1/usage/{id}", self.own_request, summary="One request of your tenant.")
        router.add("GET", "/admin/usage", self.all, access="admin", summary=f"Of all tenants. {_QUERY}, tenant, key, …")
        router.add("GET", "/admin/usage/{id}", self.any_request, access="admin", summary="One request.")

    async def own(self, exchange: Exchange) -> Reply:
        tenant = exchange.principal.tenant if exchange.principal else ""
        return await self._answer(exchange, tenant)

    async def all(self, exchange: Exchange) -> Reply:
        return await self._answer(exchange, None)

    async def own_request(self, exchange: Exchange) -> Reply:
        return await self._one(exchange, exchange.principal.tenant if exchange.principal else "")

    async def any_request(self, exchange: Exchange) -> Reply:
        return await self._one(exchange, None)

    async def _one(self, exchange: Exchange, tenant: str | None) -> Reply:
        request_id = exchange.request.path_params["id"]
        row = await store.one(self._database, request_id, tenant)
        if row is None:
            raise NotFound(f"There is no request {request_id[:100]!r}. A request is stored within about a second.")
        return Reply(200, data=shown.request(row))

    async def _answer(self, exchange: Exchange, tenant: str | None) -> Reply:
        given = self._given(exchange, tenant)
        query = shown.query(given)
        if tenant is not None:
            query = replace(query, tenant=tenant)
        as_csv = given.get("format", "json") == "csv"
        if given.get("format", "json") not in {"csv", "json"}:
            raise BadRequest("`format` must be json or csv.", param="format")
        if "group_by" in given:
            if "after" in given:
                raise BadRequest("Sums have no pages: `limit` gives up to 10000 groups.", param="after")
            most = limit_of(given, default=shown.MOST_GROUPS, most=shown.MOST_GROUPS)
            return await self._sums(query, shown.groups(given["group_by"]), most, as_csv=as_csv)
        most = limit_of(given, default=shown.MOST_ROWS if as_csv else shown.DEFAULT_ROWS, most=shown.MOST_ROWS)
        after = shown.cursor(given["after"]) if "after" in given else None
        rows, further = await store.listed(self._database, query, most, after)
        data = [shown.request(row) for row in rows]
        last = None if further is None else f"{further[0]}.{further[1]}"
        if as_csv:
            return _csv(shown.table(data, shown.REQUEST_COLUMNS), last)
        return Reply(200, data={"object": "list", "data": data, "has_more": last is not None, "last_id": last})

    async def _sums(self, query: store.Query, by: list[str], most: int, *, as_csv: bool) -> Reply:
        everything, _ = await store.grouped(self._database, query, (), 1)
        rows, more = await store.grouped(self._database, query, by, most) if by else ([], False)
        data = [shown.sums(row) for row in rows]
        total = shown.sums(store.total(everything))
        if as_csv:
            if more:
                raise BadRequest(
                    f"There are more than {most} groups, and a table that ends early looks whole: raise `limit` (up to "
                    f"{shown.MOST_GROUPS}), or group by less.",
                    param="limit",
                )
            return _csv(shown.table(data if by else [total], [*by, *shown.SUM_COLUMNS]), None)
        return Reply(200, data={"object": "list", "data": data, "has_more": more, "total": total})

    @staticmethod
    def _given(exchange: Exchange, tenant: str | None) -> dict[str, str]:
        known = [*shown.WORDS, *(name for name in shown.FILTERS if tenant is None or name != "tenant")]
        return query_of(exchange, known)


def _csv(text: str, last: str | None) -> Reply:
    headers = {"Content-Type": "text/csv; charset=utf-8", "Content-Disposition": "attachment; filename=usage.csv"}
    if last is not None:
        headers["x-xenios-last-id"] = last  # for `after`
    return Reply(200, text.encode("utf-8", "replace"), headers)
