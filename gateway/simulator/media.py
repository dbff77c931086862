"""Embeddings, rerank, images, speech and transcriptions: endpoints that don't answer with a conversation."""

from __future__ import annotations

import base64
import email
import email.policy
import io
import math
import re
import struct
import wave
import zlib
from typing import TYPE_CHECKING, Any

from gateway.simulator.answers import Answer, Ask, Usage, bill, digest, misreported, tokens_of
from gateway.simulator.shapes import DONE, JSON, LOST, Frames, Reply, chat_usage, data, text_of

if TYPE_CHECKING:
    from gateway.simulator.steering import Steering

_DIMENSIONS = {"openai/text-embedding-3-large": 3072}
_IMAGE_TOKENS = 272
_PCM_RATE = 24_000
_MP3_FRAME = b"\xff\xfb\x90\x64" + bytes(413)  # MPEG-1 layer III, 128 kbit/s, 44.1 kHz: 26 ms of silence
_WORDS = re.compile(r"\w+")


# embeddings


def _inputs(given: Any) -> list[str]:
    """A string, strings, a token list, token lists, or OpenRouter's objects with content parts."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        return []
    if given and all(isinstance(item, int) for item in given):
        return [" ".join(map(str, given))]
    return [" ".join(map(str, item)) if isinstance(item, list) else text_of(item) for item in given]


def read_embeddings(body: JSON) -> Ask:
    inputs = _inputs(body.get("input"))
    return Ask(body, inputs[0] if inputs else "", sum(map(len, inputs)))


def compose_input_only(ask: Ask, model: JSON, steering: Steering) -> Answer:
    return misreported(Answer(bill(model, Usage(tokens_of(ask.prompt_chars)))), steering)


def _vector(text: str, dimensions: int) -> list[float]:
    raw = struct.unpack(f"<{dimensions}h", digest(text, 2 * dimensions))
    norm = math.sqrt(sum(value * value for value in raw)) or 1.0
    return [value / norm for value in raw]


def embeddings_whole(reply: Reply) -> JSON:
    body = reply.ask.body
    wanted = body.get("dimensions")
    default = _DIMENSIONS.get(reply.model, 1536)
    dimensions = wanted if isinstance(wanted, int) and 0 < wanted <= 8192 else default
    rows = []
    for index, text in enumerate(_inputs(body.get("input"))):
        vector: Any = _vector(text, dimensions)
        if body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{dimensions}f", *vector)).decode()
        rows.append({"object": "embedding", "index": index, "embedding": vector})
    whole = {"id": reply.id, "object": "list", "provider": "Simulated", "model": reply.model, "data": rows}
    usage = reply.answer.usage
    counted = {
        "prompt_tokens": usage.prompt,
        "total_tokens": usage.prompt,
        "cost": usage.cost,
        "is_byok": False,
    }
    return whole | {"usage": counted} if reply.answer.reports_usage else whole


# rerank


def read_rerank(body: JSON) -> Ask:
    query = text_of(body.get("query"))
    documents = _inputs(body.get("documents"))
    return Ask(body, query, len(query) + sum(map(len, documents)))


def compose_rerank(ask: Ask, model: JSON, steering: Steering) -> Answer:
    documents = ask.body.get("documents")
    units = max(1, -(-len(documents) // 100)) if isinstance(documents, list) else 1
    usage = Usage(tokens_of(ask.prompt_chars), search_units=units)
    return misreported(Answer(bill(model, usage, requests=units)), steering)


def _score(query: str, document: str) -> float:
    asked, found = (set(_WORDS.findall(text.lower())) for text in (query, document))
    overlap = len(asked & found) / len(asked) if asked else 0.0
    jitter = digest(f"{query}\n{document}", 1)[0] / 255
    return round(0.05 + 0.85 * overlap + 0.09 * jitter, 6)


def _top(wanted: Any) -> int | None:
    return wanted if isinstance(wanted, int) and wanted > 0 else None


def rerank_whole(reply: Reply) -> JSON:
    body = reply.ask.body
    documents = body.get("documents")
    given: list[Any] = documents if isinstance(documents, list) else []
    texts = _inputs(given)
    results: list[JSON] = [
        {
            "index": index,
            "relevance_score": _score(reply.ask.text, text),
            "document": given[index] if isinstance(given[index], dict) else {"text": text},
        }
        for index, text in enumerate(texts)
    ]
    results.sort(key=lambda result: (-result["relevance_score"], result["index"]))
    whole = {
        "id": reply.id,
        "model": reply.model,
        "provider": "Simulated",
        "results": results[: _top(body.get("top_n"))],
    }
    usage = reply.answer.usage
    counted = {"search_units": usage.search_units, "total_tokens": usage.total, "cost": usage.cost}
    return whole | {"usage": counted} if reply.answer.reports_usage else whole


# images


def read_images(body: JSON) -> Ask:
    prompt = text_of(body.get("prompt"))
    count = body.get("n")
    return Ask(body, prompt, len(prompt), choices=count if isinstance(count, int) and 0 < count <= 10 else 1)


def compose_images(ask: Ask, model: JSON, steering: Steering) -> Answer:
    usage = Usage(tokens_of(ask.prompt_chars), _IMAGE_TOKENS * ask.choices)
    return misreported(Answer(bill(model, usage)), steering)


def _png(seed: str) -> str:
    """An 8 x 8 PNG whose pixels depend on `seed`, in base64."""

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = digest(seed, 8 * 8 * 3)
    rows = b"".join(b"\0" + pixels[at : at + 24] for at in range(0, len(pixels), 24))
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    image = part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + image).decode()


def _images_usage(reply: Reply) -> JSON:
    details = {"reasoning_tokens": 0, "image_tokens": reply.answer.usage.completion}
    return (
        {"usage": {**chat_usage(reply.answer), "completion_tokens_details": details}}
        if reply.answer.reports_usage
        else {}
    )


def images_whole(reply: Reply) -> JSON:
    pictures = [
        {"b64_json": _png(f"{reply.ask.text}#{n}"), "media_type": "image/png"} for n in range(reply.ask.choices)
    ]
    return {"created": reply.created, "data": pictures, **_images_usage(reply)}


def images_frames(reply: Reply) -> Frames:
    def partial(index: int) -> bytes:
        picture = _png(f"{reply.ask.text}#partial{index}")
        return data({"type": "image_generation.partial_image", "partial_image_index": index, "b64_json": picture})

    completed = {
        "type": "image_generation.completed",
        "b64_json": _png(f"{reply.ask.text}#0"),
        "created": reply.created,
        "media_type": "image/png",
        **_images_usage(reply),
    }
    failed = {
        "type": "error",
        "error": {"message": LOST.message, "code": str(LOST.status), "type": LOST.error_type},
    }
    return Frames(
        preamble=[],
        content=[partial(0), partial(1)],
        finish=[] if reply.blank_finish else [data(completed)],
        usage=[],
        done=[DONE],
        error=lambda _: [data(failed)],
    )


# speech


def read_speech(body: JSON) -> Ask:
    text = text_of(body.get("input"))
    return Ask(body, text, len(text))


def compose_speech(ask: Ask, model: JSON, steering: Steering) -> Answer:
    seconds = _seconds_of(ask.text)
    usage = Usage(tokens_of(ask.prompt_chars), math.ceil(seconds * 20), seconds=seconds)
    return misreported(Answer(bill(model, usage)), steering)


def _seconds_of(text: str) -> float:
    return min(max(len(text) / 15, 0.2), 30.0)  # 15 characters a second: usual reading speed


def speech_whole(reply: Reply) -> tuple[bytes, str]:
    seconds = _seconds_of(reply.ask.text)
    wanted = reply.ask.body.get("response_format", "pcm")
    if wanted == "mp3":
        return _MP3_FRAME * math.ceil(seconds / 0.026), "audio/mpeg"
    tone = b"".join(struct.pack("<h", int(8000 * math.sin(n * 440 * math.tau / _PCM_RATE))) for n in range(600))
    samples = tone * math.ceil(seconds * _PCM_RATE / 600)
    if wanted != "wav":
        return samples, "audio/pcm"
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(_PCM_RATE)
        sound.writeframes(samples)
    return file.getvalue(), "audio/wav"


# transcriptions


def parse_multipart(content_type: str, raw: bytes) -> JSON:
    """The fields of a form; a file becomes `{"filename", "content_type", "size"}`, `name[]` a list."""
    head = b"Content-Type: " + content_type.encode("latin-1", "replace") + b"\r\n\r\n"
    form = email.message_from_bytes(head + raw, policy=email.policy.HTTP)
    fields: JSON = {}
    for part in form.iter_parts() if form.is_multipart() else ():
        name = part.get_param("name", header="content-disposition")
        payload = part.get_payload(decode=True)
        content = payload if isinstance(payload, bytes) else b""
        filename = part.get_filename()
        value: Any = content.decode("utf-8", "replace")
        if filename is not None:
            value = {"filename": filename, "content_type": part.get_content_type(), "size": len(content)}
        if str(name).endswith("[]"):
            fields.setdefault(str(name)[:-2], []).append(value)
        else:
            fields[str(name)] = value
    return fields


def read_transcription(body: JSON) -> Ask:
    file, inline = body.get("file"), body.get("input_audio")
    name, size = "audio", 0
    if isinstance(file, dict):
        name, size = str(file.get("filename")), int(file.get("size") or 0)
    elif isinstance(inline, dict):
        name, size = (
            str(inline.get("url") or inline.get("format")),
            len(str(inline.get("data") or "")) * 3 // 4,
        )
    return Ask(body, name, size)


def compose_transcription(ask: Ask, model: JSON, steering: Steering) -> Answer:
    """`prompt_chars` is the size of the audio: 16 kHz mono with 16 bits is 32,000 bytes a second."""
    seconds = round(max(ask.prompt_chars / 32_000, 0.1), 3)
    text = f"This is a simulated transcription of {ask.text}."
    by_the_minute = seconds * 0.006 / 60 if str(model["id"]) == "openai/whisper-1" else 0.0
    usage = Usage(math.ceil(seconds * 10), tokens_of(len(text)), seconds=seconds, request_cost=by_the_minute)
    return misreported(Answer(bill(model, usage), pieces=(text,)), steering)


def transcription_whole(reply: Reply) -> JSON:
    usage, text = reply.answer.usage, reply.answer.text
    whole: JSON = {"text": text}
    if reply.ask.body.get("response_format") == "verbose_json":
        words = text.split()
        step = usage.seconds / max(len(words), 1)
        whole |= {"task": "transcribe", "language": "english", "duration": usage.seconds}
        whole["segments"] = [{"id": 0, "start": 0.0, "end": usage.seconds, "text": text}]
        whole["words"] = [{"word": word, "start": n * step, "end": (n + 1) * step} for n, word in enumerate(words)]
    counted = {
        "seconds": usage.seconds,
        "input_tokens": usage.prompt,
        "output_tokens": usage.completion,
        "total_tokens": usage.total,
        "cost": usage.cost,
    }
    return whole | {"usage": counted} if reply.answer.reports_usage else whole
