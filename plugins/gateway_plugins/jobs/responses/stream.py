"""The events of a background response: an upstream's, under our id, numbered through over all of its tries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from gateway_plugins.jobs.responses import objects

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway import Event
    from gateway_plugins.jobs.responses.objects import JsonObject

# An upstream's own beginning: ours was told long before. And failures: whoever runs it knows whether they are the end.
_NOT_PASSED = frozenset(
    {"response.created", "response.queued", "response.in_progress", "response.failed", "response.cancelled", "error"}
)
_ENDINGS = frozenset({"response.completed", "response.incomplete"})
# Events that add to a text → in which list of the item it stands, by which index, under which name.
_DELTAS = {
    "response.output_text.delta": ("content", "content_index", "text"),
    "response.refusal.delta": ("content", "content_index", "refusal"),
    "response.reasoning_text.delta": ("content", "content_index", "text"),
    "response.reasoning_summary_text.delta": ("summary", "summary_index", "text"),
    "response.function_call_arguments.delta": ("", "", "arguments"),
    "response.custom_tool_call_input.delta": ("", "", "input"),
}
_PARTS = {
    "response.content_part.added": ("content", "content_index"),
    "response.content_part.done": ("content", "content_index"),
    "response.reasoning_summary_part.added": ("summary", "summary_index"),
    "response.reasoning_summary_part.done": ("summary", "summary_index"),
}


def encode(event: JsonObject) -> bytes:
    """As it is sent: with its type as the name."""
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(event))


class Transcript:
    """What the clients of one response are told, event by event. `response` is the object as it stands now."""

    def __init__(self, response: JsonObject) -> None:
        self.response = response
        self.number = 0  # of the next event
        self.answer: Mapping[str, Any] | None = None  # the upstream's last word
        self._output = Output()

    @property
    def output(self) -> list[JsonObject]:
        """What there is of the answer."""
        return self._output.items()

    def begin(self) -> list[JsonObject]:
        """The first two events: every stream has them, before anybody worked on it."""
        return [self._tell(kind, response=self.response) for kind in ("response.created", "response.queued")]

    def told(self, event: JsonObject) -> None:
        """An event that clients have been told already, by another process."""
        self.number = int(event["sequence_number"]) + 1
        self._output.follow(event)

    def start(self) -> list[JsonObject]:
        """A worker has it. If another one had it before, whatever that one left open is closed: the answer begins anew
        behind it, so that nobody who follows takes two halves for one text.
        """
        self.response = objects.in_progress(self.response)
        left = self._output.close()
        return [
            *(self._tell("response.output_item.done", output_index=place, item=item) for place, item in left),
            self._tell("response.in_progress", response=self.response),
        ]

    def pass_on(self, event: Event) -> JsonObject | None:
        """An upstream's event as ours. None: no client needs it, or it is the end, which is told when it is kept."""
        data = event.data
        if not isinstance(data, dict) or not isinstance(data.get("type"), str) or data["type"] in _NOT_PASSED:
            return None
        if data["type"] in _ENDINGS:
            self.answer = data["response"] if isinstance(data.get("response"), dict) else {}
            return None
        shifted = self._output.placed(data)
        self._output.follow(shifted)
        return self._numbered(shifted)

    def complete(self, answer: Mapping[str, Any], now: int) -> JsonObject:
        """The upstream's answer is whole. `now` in seconds."""
        return self._end(objects.answered(self.response, answer, now))

    def fail(self, code: str, message: str) -> JsonObject:
        """`code` is one of the gateway's."""
        return self._end(objects.failed(self.response, code, message, self.output))

    def cancel(self) -> JsonObject:
        return self._end(objects.cancelled(self.response, self.output))

    def _end(self, response: JsonObject) -> JsonObject:
        self.response = response
        return self._tell(f"response.{response['status']}", response=response)

    def _tell(self, kind: str, **fields: Any) -> JsonObject:
        return self._numbered({"type": kind, **fields})

    def _numbered(self, event: JsonObject) -> JsonObject:
        numbered = {**event, "sequence_number": self.number}
        if "response_id" in numbered:
            numbered["response_id"] = self.response["id"]
        self.number += 1
        return numbered


class Output:
    """The output of a response, put together from its events. Texts stay in pieces until somebody asks."""

    def __init__(self) -> None:
        self._items: dict[int, JsonObject] = {}
        self._open: set[int] = set()
        self._pieces: dict[tuple[int, str, int, str], list[str]] = {}
        self._first = 0  # the place of the first item of this try

    def placed(self, event: JsonObject) -> JsonObject:
        """The event with its item's place, behind those of earlier tries."""
        place = event.get("output_index")
        return {**event, "output_index": place + self._first} if self._first and isinstance(place, int) else event

    def follow(self, event: Mapping[str, Any]) -> None:
        kind, place = event.get("type"), event.get("output_index")
        if not isinstance(place, int) or not isinstance(kind, str):
            return
        if kind in _DELTAS and isinstance(event.get("delta"), str):
            listed, index, name = _DELTAS[kind]
            self._pieces.setdefault((place, listed, event.get(index) or 0, name), []).append(event["delta"])
        elif kind in _PARTS and isinstance(event.get("part"), dict):
            listed, index = _PARTS[kind]
            self._put(place, listed, event.get(index) or 0, event["part"])
        elif kind in {"response.output_item.added", "response.output_item.done"} and isinstance(
            event.get("item"), dict
        ):
            self._items[place] = dict(event["item"])
            self._forget(place)
            (self._open.discard if kind.endswith(".done") else self._open.add)(place)

    def items(self) -> list[JsonObject]:
        """Those of this try, in their order; what is not done says `incomplete`."""
        return [self._item(place) for place in sorted(self._items) if place >= self._first]

    def close(self) -> list[tuple[int, JsonObject]]:
        """Another try begins: its items stand behind these. Those that were open, each with its place."""
        left = [(place, self._item(place)) for place in sorted(self._open)]
        for place, item in left:
            self._items[place] = item
            self._forget(place)
        self._open.clear()
        self._first = max(self._items, default=-1) + 1
        return left

    def _put(self, place: int, listed: str, index: int, part: JsonObject) -> None:
        item = self._items.get(place)
        if item is None:
            return
        parts = list(item.get(listed) or ())
        parts[index : index + 1] = [part]
        item[listed] = parts
        for name in ("text", "refusal"):
            self._pieces.pop((place, listed, index, name), None)

    def _forget(self, place: int) -> None:
        for key in [key for key in self._pieces if key[0] == place]:
            del self._pieces[key]

    def _item(self, place: int) -> JsonObject:
        item = dict(self._items[place])
        for (where, listed, index, name), pieces in self._pieces.items():
            if where != place:
                continue
            text = "".join(pieces)
            if not listed:
                item[name] = text
                continue
            parts = list(item.get(listed) or ())
            if index < len(parts):
                parts[index] = {**parts[index], name: text}
                item[listed] = parts
        if place in self._open and "status" in item:
            item["status"] = "incomplete"
        return item
