"""A fast mock of an OpenAI-compatible provider for load tests: uvloop and raw protocols, precomputed bytes.

    python mock_upstream.py --port 9100

POST …/chat/completions   a JSON reply of about 600 bytes, or SSE when the body has "stream":true
GET  …/models             the models of --models in OpenRouter's shape
GET  /__stats             counters as JSON: requests, streams, chunks, open, lag_ms_max, lag_ms_mean

Words in the model name (behind the last "/", split at "-") steer the answer; other words are ignored:
    nN  N content chunks in a stream (40)    dN  N ms between two chunks (0: all in one write)    tN  N ms before the first byte (0)

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


REPLY = compact(
    {
        "id": REPLY_ID,
        "object": "chat.completion",
        "created": CREATED,
        "model": "openai/mock",
        "provider": "Mock",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT.strip()},
                "finish_reason": "stop",
                "native_finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": USAGE,
    }
)
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
MODEL = re.compile(rb'"model":\s*"([^"]*)"')
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


class Plan:
    """What one model name asks for, as bytes that are ready to be sent."""

    def __init__(self, model):
        words = model.rsplit("/", 1)[-1].split("-")
        steer = {w[0]: int(w[1:]) for w in words if re.fullmatch(r"[ndt]\d+", w)}
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
        self.shared, self.buffer, self.transport, self.plan = shared, b"", None, None

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, exc):
        self.transport = None
        if self.plan:
            self.shared.open -= 1

    def data_received(self, data):
        self.buffer = self.buffer + data if self.buffer else data
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
                return False
            body = self.buffer[begin:end]
        self.buffer = self.buffer[end:]
        method, target, _ = head.split(b" ", 2)
        self.route(method, target.partition(b"?")[0], body)
        return True

    def route(self, method, path, body):
        if method == b"POST" and path.endswith(b"/chat/completions"):
            self.complete(body)
        elif method == b"GET" and path.endswith(b"/models"):
            self.transport.write(self.shared.models)
        elif path == b"/__stats":
            self.transport.write(whole(compact(self.shared.stats())))
        else:
            self.transport.write(whole(b'{"error":{"code":404,"message":"Not Found"}}', b"404 Not Found"))

    def complete(self, body):
        self.shared.requests += 1
        model = MODEL.search(body)
        plan = plan_for(model[1].decode() if model else "mock")
        streamed = STREAM.search(body)
        if not streamed and not plan.ttfb_ms:
            self.transport.write(self.shared.reply)
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
            self.transport.write(self.shared.reply)
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
        self.wheel, self.reply = Wheel(loop), whole(REPLY)
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
    args = parser.parse_args()
    loop = asyncio.get_running_loop()
    shared = Shared(loop, args.models.split(","))
    server = await loop.create_server(lambda: Mock(shared), "127.0.0.1", args.port, backlog=4096)
    gc.collect()
    gc.freeze()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
