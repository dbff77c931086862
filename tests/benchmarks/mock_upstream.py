"""A fast mock of an OpenAI-compatible provider for load tests: uvloop and raw protocols, precomputed bytes.

    python mock_upstream.py --port 9100
    python mock_upstream.py --port 9100 --tls-port 9143 --certificate both.pem     the same by TLS too

POST …/chat/completions   a JSON reply of about 600 bytes, or SSE when the body has "stream":true
GET  …/models             the models of --models in OpenRouter's shape
POST …/traces             taken and thrown away, as of a collector
GET  /__stats             counters as JSON: requests, streams, chunks, open, lag_ms_max, lag_ms_mean

Words in the field `user` (split at "-") steer the answer; other words are ignored:
    nN  N content chunks in a stream (40)    dN  N ms between two chunks (0: all in one write)    tN  N ms before the first byte (0)
    rN  a whole reply of N bytes

A stream is: head and role chunk, N content chunks numbered in their text, the finish chunk, then usage and [DONE].
Each chunk is a write of its own; one timer wheel of 1 ms drives all streams. A chunk that is late is sent in a later
tick, never in one write with its successor, and the rate is kept: the next one is due from when this one was due.
"""

import argparse
import asyncio
import functools
import gc
import json
import re
import ssl
import time

import uvloop

CREATED = 1_790_000_000
REPLY_ID = "gen-1790000000-Q2hhdENvbXBsZXRpb24x"
USAGE = {
    "prompt_tokens": 34,
    "completion_tokens": 40,
    "total_tokens": 74,
    "cost": 0.0000945,
    "is_byok": False,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}
TEXT = "The quick brown fox jumps over the lazy dog near the bank of the river. " * 2


def compact(value):
    return json.dumps(value, separators=(",", ":")).encode()


def completion(content):
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "native_finish_reason": "stop", "logprobs": None}
    head = {"id": REPLY_ID, "object": "chat.completion", "created": CREATED, "model": "openai/mock", "provider": "Mock"}
    return compact({**head, "choices": [choice], "usage": USAGE})


REPLY = completion(TEXT.strip())


@functools.cache
def reply_of(size):
    """The body of a whole reply of so many bytes; 0: the usual one."""
    return completion(text_of(size - len(completion("")))) if size else REPLY


def text_of(size):
    return (TEXT * (size // len(TEXT) + 1))[:size]


CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
USER = re.compile(rb'"user":\s*"([^"]*)"')
STREAM = re.compile(rb'"stream":\s*true')
SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"


def whole(body, status=b"200 OK"):
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        len(body),
        body,
    )


def frame(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(delta, finish):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    head = {"id": REPLY_ID, "object": "chat.completion.chunk", "created": CREATED, "model": "openai/mock"}
    return b"data: %s\n\n" % compact({**head, "choices": [choice]})


def found_in(body, pattern):
    """Fields that steer stand before or behind the messages: a megabyte of them is not searched."""
    return pattern.search(body, 0, 1024) or pattern.search(body, max(0, len(body) - 4096))


class Plan:
    """What these words ask for, as bytes that are ready to be sent."""

    def __init__(self, words):
        steer = {w[0]: int(w[1:]) for w in words.split("-") if re.fullmatch(r"[ndtr]\d+", w)}
        self.reply = whole(reply_of(steer.get("r", 0)))
        self.delay_ms, self.ttfb_ms = steer.get("d", 0), steer.get("t", 0)
        chunks = [event({"content": f" w{i:05d} of a mocked stream"}, None) for i in range(steer.get("n", 40))]
        usage = event({}, "stop").replace(
            b'"finish_reason":"stop"}]', b'"finish_reason":"stop"}],"usage":%s' % compact(USAGE)
        )
        self.content = len(chunks)
        self.writes = [SSE_HEAD + frame(event({"role": "assistant", "content": ""}, None))]
        self.writes += [frame(chunk) for chunk in chunks]
        self.writes += [frame(event({}, "stop")), frame(usage) + frame(b"data: [DONE]\n\n") + b"0\r\n\r\n"]


plan_for = functools.lru_cache(maxsize=256)(Plan)


class Wheel:
    """Streams by the millisecond in which their next chunk is due."""

    def __init__(self, loop):
        self.loop, self.slots, self.at, self.turning = loop, {}, 0, False
        self.lag_max = self.lag_sum = self.steps = 0

    def add(self, stream, due):
        self.slots.setdefault(max(due, self.at), []).append(stream)
        if not self.turning:
            self.turning, self.at = True, int(time.monotonic() * 1000)
            self.loop.call_later(0.001, self.turn)

    def turn(self):
        now = int(time.monotonic() * 1000)
        begin, self.at = self.at, now + 1
        for slot in range(begin, now + 1):
            for stream in self.slots.pop(slot, ()):
                lag = now - stream.due
                self.lag_sum, self.steps = self.lag_sum + lag, self.steps + 1
                self.lag_max = max(self.lag_max, lag)
                stream.step()
        self.turning = bool(self.slots)
        if self.turning:
            self.loop.call_later(0.001, self.turn)


class Mock(asyncio.Protocol):
    def __init__(self, shared):
        self.shared, self.buffer, self.transport, self.plan = shared, bytearray(), None, None
        self.needed = 0  # bytes of the request that has begun to arrive, once its head says so

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, exc):
        self.transport = None
        if self.plan:
            self.shared.open -= 1

    def data_received(self, data):
        self.buffer += data
        if len(self.buffer) >= self.needed:
            self.answer_next()

    def answer_next(self):
        while self.plan is None and self.buffer and self.transport and self.take():
            pass

    def take(self):
        """Answer the first request in the buffer; False while it is incomplete."""
        end = self.buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return False
        head = self.buffer[:end]
        if CHUNKED.search(head):
            body, end = dechunk(self.buffer, end)
            if body is None:
                return False
        else:
            length = CONTENT_LENGTH.search(head)
            begin, end = end, end + (int(length[1]) if length else 0)
            if len(self.buffer) < end:
                self.needed = end
                return False
            body = self.buffer[begin:end]
        del self.buffer[:end]
        self.needed = 0
        method, target, _ = head.split(b" ", 2)
        self.route(method, target.partition(b"?")[0], body)
        return True

    def route(self, method, path, body):
        if method == b"POST" and path.endswith(b"/chat/completions"):
            self.complete(body)
        elif method == b"GET" and path.endswith(b"/models"):
            self.transport.write(self.shared.models)
        elif method == b"POST" and path.endswith(b"/traces"):
            self.transport.write(whole(b""))
        elif path == b"/__stats":
            self.transport.write(whole(compact(self.shared.stats())))
        else:
            self.transport.write(whole(b'{"error":{"code":404,"message":"Not Found"}}', b"404 Not Found"))

    def complete(self, body):
        self.shared.requests += 1
        user = found_in(body, USER)
        plan = plan_for(user[1].decode() if user else "")
        streamed = found_in(body, STREAM)
        if not streamed and not plan.ttfb_ms:
            self.transport.write(plan.reply)
            return
        self.plan, self.sent, self.streamed = plan, 0, bool(streamed)
        self.shared.streams += self.streamed
        self.shared.open += 1
        self.due = int(time.monotonic() * 1000) + plan.ttfb_ms
        if plan.ttfb_ms:
            self.shared.wheel.add(self, self.due)
        else:
            self.step()

    def step(self):
        if self.transport is None:
            return
        plan = self.plan
        if not self.streamed:
            self.transport.write(plan.reply)
        elif plan.delay_ms:
            self.transport.write(plan.writes[self.sent])
            self.shared.chunks += 1
            self.sent += 1
            if self.sent < len(plan.writes):
                self.due += plan.delay_ms
                self.shared.wheel.add(self, self.due)
                return
        else:
            self.transport.write(b"".join(plan.writes))
            self.shared.chunks += len(plan.writes)
        self.plan = None
        self.shared.open -= 1
        self.answer_next()


def dechunk(buffer, at):
    """The body of a chunked message whose head ends at `at`, and where the message ends; (None, at) while incomplete."""
    parts, begin = [], at
    while True:
        eol = buffer.find(b"\r\n", at)
        if eol < 0:
            return None, begin
        size = int(buffer[at:eol].partition(b";")[0], 16)
        at = eol + 2 + size + 2
        if len(buffer) < at:
            return None, begin
        if size == 0:
            return b"".join(parts), at
        parts.append(buffer[eol + 2 : at - 2])


class Shared:
    def __init__(self, loop, models):
        self.wheel = Wheel(loop)
        self.requests = self.streams = self.chunks = self.open = 0
        data = [model_entry(name) for name in models]
        links = {"self": "/api/v1/models", "next": None}
        self.models = whole(compact({"data": data, "total_count": len(data), "links": links}))

    def stats(self):
        wheel = self.wheel
        counts = {
            "requests": self.requests,
            "streams": self.streams,
            "chunks": self.chunks,
            "open": self.open,
        }
        return {
            **counts,
            "lag_ms_max": wheel.lag_max,
            "lag_ms_mean": round(wheel.lag_sum / max(wheel.steps, 1), 2),
        }


def model_entry(name):
    return {
        "id": name,
        "canonical_slug": name,
        "name": name,
        "created": CREATED,
        "description": "A mock.",
        "context_length": 128000,
        "architecture": {
            "modality": "text->text",
            "input_modalities": ["text"],
            "output_modalities": ["text"],
            "tokenizer": "GPT",
            "instruct_type": None,
        },
        "pricing": {"prompt": "0.00000015", "completion": "0.0000006", "request": "0", "image": "0"},
        "top_provider": {"context_length": 128000, "max_completion_tokens": 16384, "is_moderated": False},
        "per_request_limits": None,
        "supported_parameters": ["temperature", "max_tokens", "stream", "tools"],
    }


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9100)
    parser.add_argument("--models", default="openai/mock")
    parser.add_argument("--tls-port", type=int)
    parser.add_argument("--certificate", help="file with its key too")
    args = parser.parse_args()
    loop = asyncio.get_running_loop()
    shared = Shared(loop, args.models.split(","))
    server = await loop.create_server(lambda: Mock(shared), "127.0.0.1", args.port, backlog=4096)
    if args.tls_port:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(args.certificate)
        await loop.create_server(lambda: Mock(shared), "127.0.0.1", args.tls_port, backlog=4096, ssl=context)
    gc.collect()
    gc.freeze()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
