"""Every admin route of a gateway with everything on, called by everybody who is no administrator."""

import time

import jwt
import pytest

from gateway import Principal, hookimpl
from gateway.kit.keys import hash_key, new_key
from gateway.kit.testing import PEPPER, Gateway
from tests.contract.test_routes import EVERYTHING, STORES, AdminRoutes, assert_error_of, url

ADMIN = pytest.mark.promise("P5.admin")
ISSUER, SECRET = "https://login.example.com", "s" * 32
PLAIN, CHIEF = new_key(), new_key()
CONFIGS = {
    "api_keys": {
        "database": True,
        "keys": [
            {"id": "plain", "hash": hash_key(PLAIN, PEPPER), "roles": ["admin", "ops"], "tenant": "default"},
            {"id": "chief", "hash": hash_key(CHIEF, PEPPER), "admin": True},
        ],
    },
    "jwt_auth": {
        "issuers": [
            {
                "issuer": ISSUER,
                "audience": "x",
                "secret": SECRET,
                "claims": {"roles": "groups"},
                "admin_roles": ["ops"],
            }
        ]
    },
}


class Third:
    """A third party's: whoever shows its word is a caller, with an administrator's name and roles."""

    def __init__(self, config, services): ...

    @hookimpl
    async def authenticate(self, exchange):
        if exchange.credentials and exchange.credentials.token == "a third party's word":
            return Principal("bootstrap", kind="third", tenant="default", roles=frozenset({"admin", "ops"}))
        return None


def everything():
    plugins = [{**entry, "config": CONFIGS.get(entry["use"], entry["config"])} for entry in EVERYTHING]
    database = {"url": "sqlite", "migrate_on_start": True}
    return Gateway.test(
        plugins=[Third, *plugins, AdminRoutes], settings={"services": {**STORES["services"], "database": database}}
    )


def token(**claims):
    body = {"iss": ISSUER, "aud": "x", "sub": "ann", "exp": int(time.time()) + 600, **claims}
    return jwt.encode(body, SECRET, algorithm="HS256")


async def stored(gw, **fields):
    return (await gw.post("/admin/keys", fields)).data["key"]


async def ask(gw, route, credential):
    headers = {"Authorization": f"Bearer {credential}"} if credential else {"Authorization": ""}
    how = {"json": {}} if route.method in {"POST", "PATCH", "PUT", "DELETE"} else {}
    return await gw.request(route.method, url(route), headers=headers, **how)


def admin_routes(gw):
    found = [route for route in gw.snapshot.routes.routes if route.access == "admin"]
    paths = {route.path for route in found}
    assert {"/admin/keys", "/admin/keys/{id}", "/admin/audit", "/admin/things/{id}"} <= paths
    # what is called so is guarded so
    assert all(route.path in paths for route in gw.snapshot.routes.routes if "admin" in route.path.split("/"))
    return found


@ADMIN
async def test_every_admin_route_refuses_every_kind_of_caller_who_is_none():
    """Keys of the YAML and of the database, tokens without an admin role, a third party's callers: 403, nothing is done."""
    async with everything() as gw:
        callers = {
            "a key of the YAML": PLAIN,
            "a key of the database": await stored(gw, id="plain-too", roles=["admin"], owner="bootstrap"),
            "a token": token(),
            "a token that calls itself so": token(admin=True, role="ops", roles=["ops"], is_admin=True, scope="admin"),
            "a token of other roles": token(groups=["OPS", "ops2", "admin"]),
            "a third party's": "a third party's word",
        }
        before = (await gw.get("/admin/audit")).data
        for route in admin_routes(gw):
            for who, credential in callers.items():
                reply = await ask(gw, route, credential)
                assert reply.status == 403, (route, who)
                assert_error_of(reply, route.dialect, "insufficient_permissions")
            for credential in (None, new_key(), token(aud="others"), jwt.encode({"iss": ISSUER}, "x" * 32)):
                assert (await ask(gw, route, credential)).status == 401, route
        assert (await gw.get("/admin/audit")).data == before
        for credential in callers.values():  # good for what is not for administrators
            headers = {"Authorization": f"Bearer {credential}"}
            assert (await gw.get("/mine", headers=headers)).status == 200


@ADMIN
async def test_a_changed_key_is_an_administrator_no_more():
    """What makes a key of the database an administrator's can be taken away, and then every route refuses it."""
    async with everything() as gw:
        key = await stored(gw, id="boss", admin=True)
        headers = {"Authorization": f"Bearer {key}"}
        assert (await gw.get("/admin/keys", headers=headers)).status == 200
        assert (await gw.request("PATCH", "/admin/keys/boss", json={"admin": False})).status == 200
        end = time.monotonic() + 2
        while (await gw.get("/admin/keys", headers=headers)).status != 403:
            assert time.monotonic() < end
        for route in admin_routes(gw):
            assert (await ask(gw, route, key)).status == 403, route


async def test_every_kind_of_administrator_gets_in():
    """A key of the YAML, one of the database, a token with an admin role."""
    async with everything() as gw:
        for credential in (CHIEF, await stored(gw, admin=True), token(groups=["ops"])):
            for route in admin_routes(gw):
                assert (await ask(gw, route, credential)).status not in {401, 403, 500, 503}, route
