"""A load client for chat completions: uvloop and raw protocols. Prints one JSON object; times are in microseconds.

    python load.py --port 4110 --connections 64 --seconds 3      closed loop: each connection asks again once it was answered
    python load.py --port 4110 --connections 1 --count 2000
    python load.py --port 4110 --connections 16 --request-bytes 1000000 --reply-bytes 100000
    python load.py --port 4110 --streams 500 --chunks 400 --delay 20 --ramp 1     500 streams at once, one per connection

Every reply is verified. Plain: status 200 and exactly the mock's body. Stream: status 200, every numbered content chunk
once and in order, a usage chunk, [DONE] last, and a proper end of the HTTP message. Parsing of streams is put off until
all have ended, so that the client takes little from the core that it shares with the mock.
"""

import argparse
import asyncio
import collections
import gc
import json
import re
import resource
import time

import uvloop
from mock_upstream import CHUNKED, CONTENT_LENGTH, dechunk, reply_of, text_of

WORD = re.compile(rb'"content":" w(\d{5}) of a mocked stream"')
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "the quick brown fox jumps over the lazy dog the quick brown fox "},
]
PATIENCE_S = 30


def request_bytes(args):
    steer = f"n{args.chunks}-d{args.delay}" if args.streams else f"r{args.reply_bytes}"
    body = {"model": args.model, "user": steer, "messages": MESSAGES, "temperature": 0.7, "max_tokens": 256}
    if args.streams:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    missing = args.request_bytes - len(json.dumps(body, separators=(",", ":")))
    if missing > 0:
        system, user = MESSAGES
        body["messages"] = [system, {**user, "content": user["content"] + text_of(missing)}]
    data = json.dumps(body, separators=(",", ":")).encode()
    head = f"POST {args.path} HTTP/1.1\r\nHost: 127.0.0.1:{args.port}\r\nAuthorization: Bearer {args.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


class Run:
    """What all connections share."""

    def __init__(self, args, loop):
        self.args, self.loop, self.request, self.reply = args, loop, request_bytes(args), reply_of(args.reply_bytes)
        self.latencies, self.errors, self.detail = [], collections.Counter(), ""
        self.live, self.done, self.stopping, self.asked = 0, loop.create_future(), False, 0
        self.open = self.most_open = 0

    def fail(self, kind, detail=""):
        self.errors[kind] += 1
        self.detail = self.detail or f"{kind}: {detail!r:.300}"

    def wants_more(self):
        return not self.stopping and (not self.args.count or self.asked < self.args.count)

    def left(self):
        self.live -= 1
        if self.live == 0 and not self.done.done():
            self.done.set_result(None)

    def stop(self):
        self.stopping = True


class Plain(asyncio.Protocol):
    def __init__(self, run):
        self.run, self.buffer, self.waiting = run, bytearray(), False
        self.needed = 0  # bytes of the reply that has begun to arrive, once its head says so

    def connection_made(self, transport):
        self.transport = transport
        self.ask()

    def ask(self):
        run = self.run
        if not run.wants_more():
            self.transport.close()
            return
        run.asked += 1
        self.waiting, self.begun = True, time.perf_counter()
        self.transport.write(run.request)

    def data_received(self, data):
        if self.buffer:
            self.buffer += data
            if len(self.buffer) < self.needed:
                return
            data = self.buffer
        end = data.find(b"\r\n\r\n") + 4
        if end >= 4 and data[end:] == self.run.reply and data.startswith(b"HTTP/1.1 200 "):
            self.answered()
        else:
            self.slow(data, end)

    def slow(self, data, end):
        """Anything but the expected reply in one piece: wait for its end, then judge."""
        head, body = data[:end] if end >= 4 else b"", None
        length = CONTENT_LENGTH.search(head)
        if CHUNKED.search(head):
            body, _ = dechunk(data, end)
        elif length:
            self.needed = end + int(length[1])
            body = data[end : self.needed] if len(data) >= self.needed else None
        if body is None:
            self.buffer = data if data is self.buffer else bytearray(data)
            return
        if not head.startswith(b"HTTP/1.1 200 "):
            self.run.fail("status", bytes(head[:12] + b" " + body))
        elif body != self.run.reply:
            self.run.fail("body", bytes(body))
        self.answered()

    def answered(self):
        self.run.latencies.append(time.perf_counter() - self.begun)
        self.buffer, self.waiting, self.needed = bytearray(), False, 0
        self.ask()

    def connection_lost(self, exc):
        if self.waiting:
            self.run.fail("closed", exc)
        self.run.left()


class Stream(asyncio.Protocol):
    def __init__(self, run):
        self.run, self.parts, self.ended, self.first = run, [], False, 0.0

    def connection_made(self, transport):
        self.transport = transport
        self.run.asked += 1
        self.run.open += 1
        self.run.most_open = max(self.run.most_open, self.run.open)
        self.begun = time.perf_counter()
        transport.write(self.run.request)

    def data_received(self, data):
        self.parts.append(data)
        if not self.first:
            self.first = time.perf_counter() - self.begun
        if data.endswith(b"0\r\n\r\n") or (len(data) < 5 and b"".join(self.parts[-4:]).endswith(b"\n0\r\n\r\n")):
            self.ended = True
            self.run.latencies.append(time.perf_counter() - self.begun)
            self.transport.close()

    def connection_lost(self, exc):
        if not self.ended:
            self.run.fail("closed", exc or b"".join(self.parts)[-200:])
        self.run.open -= 1
        self.run.left()

    def content(self):
        """The number of content chunks, after judging the whole stream."""
        data = b"".join(self.parts)
        end = data.find(b"\r\n\r\n") + 4
        body = dechunk(data, end)[0] if end >= 4 and CHUNKED.search(data[:end]) else None
        words = [int(word) for word in WORD.findall(body or b"")]
        if not self.ended:
            return len(words)
        if not data.startswith(b"HTTP/1.1 200 "):
            self.run.fail("status", data)
        elif words != list(range(self.run.args.chunks)):
            self.run.fail("chunks", f"{len(words)} of {self.run.args.chunks}; {data[-300:]!r}")
        elif not body.endswith(b"data: [DONE]\n\n"):
            self.run.fail("done", body[-100:])
        elif b'"usage":{' not in body:
            self.run.fail("usage", body[-400:])
        return len(words)


async def open_all(run, factory, number, ramp_s):
    """Opens the connections, evenly over the ramp."""
    run.live = number
    protocols, begin = [], run.loop.time()
    for i in range(number):
        wait = begin + ramp_s * i / number - run.loop.time()
        if wait > 0:
            await asyncio.sleep(wait)
        try:
            _, protocol = await run.loop.create_connection(lambda: factory(run), "127.0.0.1", run.args.port)
            protocols.append(protocol)
        except OSError as error:
            run.fail("connect", error)
            run.left()
    return protocols


def quantiles(seconds):
    values = sorted(seconds)
    if not values:
        return None
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    found = {name: values[min(len(values) - 1, int(len(values) * q))] for name, q in at.items()}
    return {name: round(value * 1e6, 1) for name, value in {**found, "max": values[-1]}.items()}


async def run_load(args):
    run = Run(args, asyncio.get_running_loop())
    gc.disable()
    begun = time.perf_counter()
    expected_s = args.ramp + args.chunks * args.delay / 1000 if args.streams else args.seconds
    if not args.streams and not args.count:
        run.loop.call_later(args.seconds, run.stop)
    number = args.streams or args.connections
    protocols = await open_all(run, Stream if args.streams else Plain, number, args.ramp if args.streams else 0)
    try:
        await asyncio.wait_for(run.done, expected_s + PATIENCE_S)
    except TimeoutError:
        run.fail("timeout", f"{run.live} connections still open")
    wall = time.perf_counter() - begun
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "wall_s": round(wall, 3),
        "client_cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "asked": run.asked,
    }
    if args.streams:
        chunks = sum(protocol.content() for protocol in protocols)
        ideal = (
            (args.chunks + 2) * args.delay / 1000
        )  # the role chunk goes at once; finish and usage follow the content
        late = [max(0.0, total - ideal) for total in run.latencies]
        result |= {"chunks": chunks, "chunks_per_s": round(chunks / wall), "late": quantiles(late)}
        result |= {
            "first_byte": quantiles([p.first for p in protocols if p.first]),
            "streams": len(run.latencies),
            "most_open": run.most_open,
        }
    else:
        result |= {"requests": len(run.latencies), "rps": round(len(run.latencies) / wall, 1)}
    return result | {"latency": quantiles(run.latencies), "errors": dict(run.errors), "detail": run.detail}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/v1/chat/completions")
    parser.add_argument("--key", default="sk-bench")
    parser.add_argument("--model", default="openai/mock")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--count", type=int, default=0, help="stop after so many requests instead of --seconds")
    parser.add_argument("--request-bytes", type=int, default=0, help="make the prompt so long")
    parser.add_argument("--reply-bytes", type=int, default=0, help="have the mock answer so much; 0: about 600")
    parser.add_argument("--streams", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=400, help="content chunks of each stream")
    parser.add_argument("--delay", type=int, default=20, help="ms between two chunks")
    parser.add_argument("--ramp", type=float, default=1.0, help="seconds over which streams are opened")
    print(json.dumps(uvloop.run(run_load(parser.parse_args()))))


if __name__ == "__main__":
    main()
