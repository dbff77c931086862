"""The yardstick that every ratio of the benchmark is taken against: the least that a proxy on aiohttp can be.

    python yardstick.py --port 4110 --upstream 9100            web.Application in front, ClientSession behind, nothing else
    python yardstick.py --port 4110 --upstream 9100 --tricks   the same with every known trick (a second column, not the yardstick):
        lowlevel  web.Server with one handler, no router     dummyjar  DummyCookieJar        nodecomp  no auto-decompress
        prebuilt  the upstream's URL is built once           skipauto  no automatic headers  gcfreeze  gc.freeze() after start
    python yardstick.py --port 4110 --canned                   no upstream at all: aiohttp's server answering a fixed body
    python yardstick.py --port 4110 --upstream 9143 --authority ca.pem     by TLS, for targets whose upstream is asked so

Change nothing of what is measured: figures that were recorded before could no longer be compared.
"""

import argparse
import asyncio
import gc
import ssl

import aiohttp
import uvloop
from aiohttp import web
from mock_upstream import REPLY
from yarl import URL

HEADERS = {"Authorization": "Bearer sk-upstream", "Content-Type": "application/json"}
SSE = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


def proxy(session, url):
    async def handler(request):
        body = await request.read()
        stream = b'"stream":true' in body
        async with session.post(url, headers=HEADERS, data=body) as upstream:
            if not stream:
                out = await upstream.read()
                return web.Response(body=out, status=upstream.status, content_type="application/json")
            response = web.StreamResponse(status=upstream.status, headers=SSE)
            await response.prepare(request)
            async for part in upstream.content.iter_any():
                await response.write(part)
            await response.write_eof()
            return response

    return handler


async def canned(request):
    await request.read()
    return web.Response(body=REPLY, content_type="application/json")


def client(tricks, authority):
    more = {}
    if tricks:
        more = {
            "cookie_jar": aiohttp.DummyCookieJar(),
            "skip_auto_headers": ("User-Agent", "Accept", "Accept-Encoding"),
            "auto_decompress": False,
        }
    tls = {"ssl": ssl.create_default_context(cafile=authority)} if authority else {}
    connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, **tls)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None), **more)


def runner_for(handler, tricks):
    if tricks:
        return web.ServerRunner(web.Server(handler, access_log=None))
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", handler)
    app.router.add_get("/v1/models", handler)
    return web.AppRunner(app, access_log=None)


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=4110)
    parser.add_argument("--upstream", type=int, default=9100, help="port of the upstream on 127.0.0.1")
    parser.add_argument("--tricks", action="store_true")
    parser.add_argument("--canned", action="store_true")
    parser.add_argument("--authority", help="ask the upstream by TLS, as localhost; whoever signed its certificate")
    args = parser.parse_args()
    where = f"https://localhost:{args.upstream}" if args.authority else f"http://127.0.0.1:{args.upstream}"
    url = f"{where}/v1/chat/completions"
    session = client(args.tricks, args.authority)
    handler = canned if args.canned else proxy(session, URL(url) if args.tricks else url)
    runner = runner_for(handler, args.tricks)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", args.port, backlog=4096).start()
    if args.tricks:
        gc.collect()
        gc.freeze()
        gc.set_threshold(50000, 50, 50)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
