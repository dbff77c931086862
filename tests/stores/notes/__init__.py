"""A third party's plugin that owns a table."""

from pathlib import Path

from gateway import Reply, hookimpl
from gateway.kit import Schema


class Plugin:
    """Keeps notes."""

    schema = Schema("notes", Path(__file__).parent)

    def __init__(self, config, services):
        self.database = services.database

    async def ping(self):
        await self.database.ping()

    @hookimpl
    def register_routes(self, router):
        router.add("GET", "/v1/notes", self.read)
        router.add("POST", "/v1/notes", self.write)

    async def read(self, exchange):
        return Reply(200, data=await self.database.fetch("SELECT text FROM notes_kept ORDER BY id"))

    async def write(self, exchange):
        text = exchange.body["text"]
        await self.database.execute("INSERT INTO notes_kept (id, text) VALUES ($1, $2)", exchange.id, text)
        return Reply(201, data={"text": text})
