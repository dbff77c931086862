"""/v1/files from outside: a file comes back as it was, is its tenant's alone, and goes when its time is over."""

import asyncio
import io
import os
from types import SimpleNamespace

import aiohttp
import pytest

from gateway import Tasks
from gateway.kit.testing import Gateway
from tests.jobs.inline import Inline

KEYS = {"use": "api_keys", "config": {"database": True}}


def files(**settings):
    return Gateway.test(plugins=[KEYS, (Inline, {"files": settings})])


async def upload(gw, content=b"hello\n", *, name="a.jsonl", headers=None, **fields):
    form = aiohttp.FormData(quote_fields=False)
    for field, value in {"purpose": "batch", **fields}.items():
        form.add_field(field, value)
    form.add_field("file", io.BytesIO(content), filename=name)
    return await gw.request("POST", "/v1/files", data=form, headers=headers)


async def other_tenant(gw, tenant="other"):
    """Headers with a key of another tenant."""
    made = await gw.post("/admin/keys", {"id": tenant, "tenant": tenant})
    return {"Authorization": f"Bearer {made.data['key']}"}


def stored(gw):
    folder = gw.plugin("Inline").part("Files").storage._folder
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


async def rows(gw):
    return await gw.snapshot.services.database.fetch("SELECT id, state FROM jobs_files ORDER BY created_at")


async def until(condition):
    async with asyncio.timeout(5):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_a_file_comes_back_as_it_was():
    content = os.urandom(300_000)
    async with files() as gw:
        made = await upload(gw, content, name="../../Ünïted \N{SNOWMAN}.jsonl")
        shown = await gw.get(f"/v1/files/{made.data['id']}")
        back = await gw.get(f"/v1/files/{made.data['id']}/content")
        kept = stored(gw)
    assert (made.status, shown.status, back.status) == (200, 200, 200)
    assert made.data == shown.data
    assert made.data["object"] == "file"
    assert made.data["id"].startswith("file-")
    assert (made.data["bytes"], made.data["purpose"], made.data["status"]) == (300_000, "batch", "processed")
    assert made.data["filename"] == "../../Ünïted \N{SNOWMAN}.jsonl"
    assert made.data["expires_at"] - made.data["created_at"] == 30 * 86400
    assert kept == [made.data["id"]]
    assert back.body == content
    assert back.headers["Content-Type"] == "application/octet-stream"
    assert back.headers["Content-Length"] == "300000"
    assert back.headers["X-Content-Type-Options"] == "nosniff"


async def test_a_file_says_when_it_is_to_go():
    async with files() as gw:
        good = await upload(gw, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
        wrong = [
            await upload(gw, **{"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}),
            await upload(gw, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}),
            await upload(gw, **{"expires_after[anchor]": "created_at"}),
        ]
    assert good.data["expires_at"] - good.data["created_at"] == 3600
    assert [reply.status for reply in wrong] == [400] * 3


@pytest.mark.parametrize(
    ("fields", "content", "param"),
    [({"purpose": "assistants"}, b"x", "purpose"), ({"what": "else"}, b"x", "what"), ({}, b"", "file")],
)
async def test_what_is_refused_leaves_nothing(fields, content, param):
    async with files() as gw:
        reply = await upload(gw, content, **fields)

        async def nothing():
            return (stored(gw), await rows(gw)) == ([], [])

        await until(nothing)
    assert (reply.status, reply.data["error"]["param"]) == (400, param)


async def test_a_file_that_is_too_large_is_refused_with_413_and_leaves_nothing():
    """Whether its length is said in front or not."""

    async def unsaid():
        for _ in range(60):
            yield b"x" * 50_000

    async with files(max_bytes=1_000_000) as gw:
        said = await upload(gw, b"x" * 3_000_000)
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'

        async def body():
            yield head
            async for piece in unsaid():
                yield piece

        sent = await gw.request(
            "POST", "/v1/files", data=body(), headers={"Content-Type": "multipart/form-data; boundary=b"}
        )

        async def nothing():
            return (stored(gw), await rows(gw)) == ([], [])

        await until(nothing)
    assert (said.status, sent.status) == (413, 413)
    assert sent.data["error"]["code"] == "file_too_large"


async def test_the_files_of_a_tenant_have_a_bound_together():
    """Who is over it is told how much there is and what to do; another tenant is not concerned."""
    async with files(max_bytes=1_000_000, max_total=1_500_000) as gw:
        first = await upload(gw, b"x" * 1_000_000)
        second = await upload(gw, b"x" * 900_000)
        other = await upload(gw, b"x" * 900_000, headers=await other_tenant(gw))
        await gw.request("DELETE", f"/v1/files/{first.data['id']}")

        async def gone():
            return len(await rows(gw)) == 1

        await until(gone)
        third = await upload(gw, b"x" * 900_000)
    assert (first.status, second.status, other.status, third.status) == (200, 413, 200, 200)
    assert second.data["error"]["code"] == "storage_limit_exceeded"
    assert "Delete some" in second.data["error"]["message"]


async def test_a_small_file_takes_as_much_of_the_bound_as_it_costs():
    """A tenant can't keep more files than blocks of the disk fit into its room, however small they are."""
    async with files(max_total=10 * 4096) as gw:
        statuses = [(await upload(gw, b"x")).status for _ in range(10)]
        over = await upload(gw, b"x")
    assert statuses == [200] * 10
    assert (over.status, over.data["error"]["code"]) == (413, "storage_limit_exceeded")
    assert "each counts for 4,096 at least" in over.data["error"]["message"]


async def test_an_upload_whose_sender_leaves_leaves_nothing():
    """Neither a row nor a byte."""
    begun = asyncio.Event()

    async def body():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 1_000_000
        await begun.wait()
        raise ConnectionError

    async with files() as gw:
        sending = Tasks().spawn(
            gw.request("POST", "/v1/files", data=body(), headers={"Content-Type": "multipart/form-data; boundary=b"}),
            "upload",
        )

        async def there():
            return len(await rows(gw)) == 1

        async def nothing():
            return (stored(gw), await rows(gw)) == ([], [])

        await until(there)
        begun.set()
        with pytest.raises(aiohttp.ClientError):
            await sending
        await until(nothing)


async def test_an_upload_whose_sender_leaves_while_room_is_reserved_takes_none(monkeypatch):
    """A row that stands already goes, and the room is free for the next."""
    async with files() as gw:
        database, asked = gw.snapshot.services.database, asyncio.Event()

        async def fetch_one(sql, *values, fetch_one=database.fetch_one):
            if "sum(" in sql and not asked.is_set():
                asked.set()
                await asyncio.Event().wait()
            return await fetch_one(sql, *values)

        monkeypatch.setattr(database, "fetch_one", fetch_one)
        sending = Tasks().spawn(upload(gw), "upload")
        await asked.wait()
        assert [row["state"] for row in await rows(gw)] == ["uploading"]
        sending.cancel()

        async def nothing():
            return await rows(gw) == []

        await until(nothing)
        assert (await upload(gw)).status == 200


@pytest.mark.promise("P14.files")
async def test_a_tenant_sees_its_own_files_alone():
    """Every route answers another tenant's file as one that isn't there."""
    async with files() as gw:
        mine = (await upload(gw)).data["id"]
        them = await other_tenant(gw)
        seen = [
            (await gw.get(f"/v1/files/{mine}", headers=them)).status,
            (await gw.get(f"/v1/files/{mine}/content", headers=them)).status,
            (await gw.request("DELETE", f"/v1/files/{mine}", headers=them)).status,
            (await gw.get(f"/v1/files?after={mine}", headers=them)).status,
        ]
        theirs = (await gw.get("/v1/files", headers=them)).data
        asked = await gw.get("/v1/files?tenant=default", headers=them)
        still = await gw.get(f"/v1/files/{mine}/content")
        admin = await gw.get(f"/v1/files/{mine}?tenant=default")
    assert seen == [404] * 4
    assert theirs["data"] == []
    assert asked.status == 400
    assert (still.status, admin.status) == (200, 200)


async def test_lists_have_pages_as_openais():
    async with files() as gw:
        made = [(await upload(gw, name=f"{i}.jsonl")).data["id"] for i in range(5)]
        newest = (await gw.get("/v1/files?limit=2")).data
        rest = (await gw.get(f"/v1/files?limit=10&after={newest['last_id']}")).data
        oldest = (await gw.get("/v1/files?order=asc&limit=1")).data
        none = (await gw.get("/v1/files?purpose=batch_output")).data
        wrong = [
            (await gw.get(f"/v1/files?{query}")).status
            for query in ("limit=0", "limit=x", "order=up", "a=b", "after=x")
        ]
    assert [file["id"] for file in newest["data"]] == made[:-3:-1]
    assert (newest["object"], newest["has_more"], newest["first_id"]) == ("list", True, made[-1])
    assert [file["id"] for file in rest["data"]] == made[2::-1]
    assert rest["has_more"] is False
    assert oldest["data"][0]["id"] == made[0]
    assert none["data"] == []
    assert wrong == [400, 400, 400, 400, 404]


async def test_what_is_deleted_or_expired_is_gone():
    """At once for its owner, soon from the disk."""
    async with files() as gw:
        database = gw.snapshot.services.database
        deleted, old, fresh = [(await upload(gw)).data["id"] for _ in range(3)]
        gone = await gw.request("DELETE", f"/v1/files/{deleted}")
        await database.execute("UPDATE jobs_files SET expires_at = 1 WHERE id = $1", old)
        statuses = [(await gw.get(f"/v1/files/{i}/content")).status for i in (deleted, old, fresh)]
        listed = (await gw.get("/v1/files")).data["data"]
        await gw.plugin("Inline").part("Files").tidy()

        async def one():
            return stored(gw) == [fresh] and [row["id"] for row in await rows(gw)] == [fresh]

        await until(one)
    assert gone.data == {"id": deleted, "object": "file", "deleted": True}
    assert statuses == [404, 404, 200]
    assert [file["id"] for file in listed] == [fresh]


async def test_one_round_of_tidying_takes_all_that_is_over(monkeypatch):
    """However many files expired since the last one, and whatever else lies there: nobody lists the folder for each."""
    async with files() as gw:
        part = gw.plugin("Inline").part("Files")
        fresh = (await upload(gw)).data["id"]
        old = [f"file-{number}" for number in range(350)]
        for key in old:
            (part.storage._folder / key).write_bytes(b"x")
        async with gw.snapshot.services.database.transaction() as statements:
            await statements.execute_many(
                "INSERT INTO jobs_files (id, tenant, principal, purpose, filename, state, bytes, created_at, "
                "expires_at) VALUES ($1, 'default', '', 'batch', '', 'stored', 1, 1, 1)",
                [(key,) for key in old],
            )
        listed = []

        def scandir(path=".", look=os.scandir):
            listed.append(path)
            return look(path)

        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", scandir)
            await part.tidy()
        assert part.storage._folder not in listed
        assert stored(gw) == [row["id"] for row in await rows(gw)] == [fresh]


async def test_what_a_killed_upload_left_is_tidied():
    """Its row is from before the first byte, so that both are known."""
    async with files() as gw:
        part = gw.plugin("Inline").part("Files")
        await upload(gw)
        await part._reserve(
            "file-dead", SimpleNamespace(request=SimpleNamespace(header=lambda _: None), principal=None)
        )
        (part.storage._folder / "file-dead#1").write_bytes(b"half")
        await gw.snapshot.services.database.execute("UPDATE jobs_files SET expires_at = 1 WHERE id = 'file-dead'")
        await part.tidy()
        assert len(stored(gw)) == len(await rows(gw)) == 1


async def test_bytes_that_are_lost_are_told():
    """By the status: nothing has been sent yet."""
    async with files() as gw:
        made = (await upload(gw)).data["id"]
        (gw.plugin("Inline").part("Files").storage._folder / made).unlink()
        reply = await gw.get(f"/v1/files/{made}/content")
    assert (reply.status, reply.data["error"]["code"]) == (404, "file_lost")
