"""A plugin that takes jobs, and who runs them: what a test of late work needs."""

import asyncio

from gateway import Decision, LateRequest, Principal, Reply, Scopes, Target, hookimpl

ADA = Principal(
    "ada",
    tenant="acme",
    team="blue",
    roles=frozenset({"bot"}),
    scopes=Scopes(models=("test/*",)),
    limits={"requests": 5},
    claims={"iss": "x"},
)


class Taker:
    """Takes what asks for it by a header, and keeps it. Callers are others' business."""

    reads_settings = ()
    takes_jobs = True

    def __init__(self, config, services):
        self.services = services
        self.kept = []
        self.phases = []

    @hookimpl
    async def prepare_request(self, exchange):
        if exchange.request.header("prefer") == "respond-async":
            exchange.phase = "accept"

    @hookimpl
    async def choose_targets(self, exchange):
        if exchange.request.header("x-offload"):
            target = Target("test/model", "openrouter")
            return Decision("test/model", (target,), offload=True, reasons=("large",))
        return None

    @hookimpl
    async def lookup_response(self, exchange):
        self.phases.append(exchange.phase)
        if exchange.phase != "accept":
            return None
        self.kept.append(LateRequest.of(exchange).to_json())
        return Reply(202, data={"job": len(self.kept)}, headers={"Location": "/v1/jobs/1"})

    def late(self):
        return LateRequest.from_json(self.kept[-1])


class Jobs(Taker):
    """Knows who is calling, too: `gone` is what becomes of that."""

    gone = False

    @hookimpl
    async def authenticate(self, exchange):
        return ADA

    @hookimpl
    async def restore_principal(self, reference, kept):
        if isinstance(self.gone, Exception):
            raise self.gone
        return None if self.gone else kept


class Keeper:
    """A client of `services.run`."""

    def __init__(self):
        self.status = None
        self.body = b""
        self.ended = False
        self.began = asyncio.Event()

    async def send(self, status, headers, body, progress):
        self.status, self.headers, self.body, self.ended = status, headers, body, True

    async def start(self, status, headers):
        self.status, self.headers = status, headers

    async def write(self, data):
        self.body += data
        self.began.set()

    async def end(self):
        self.ended = True

    def abort(self):
        self.ended = False


class Commits:
    def __init__(self):
        self.rows = []

    async def __call__(self, exchange, row):
        assert exchange.outcome is not None
        self.rows.append(row)


async def taken(gw, *, plugin="Jobs", headers=None, **fields):
    reply = await gw.post(
        "/v1/chat/completions",
        {"model": "test/model", "messages": [{"role": "user", "content": "Hello"}], **fields},
        headers={"Prefer": "respond-async", "X-Request-Id": "mine-1", "X-Title": "An app", **(headers or {})},
    )
    assert reply.status == 202
    return gw.plugin(plugin)
