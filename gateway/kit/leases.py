"""What a worker holds of a rule ahead of its requests, so that they need not ask Redis.

Redis counts what is leased as taken: whatever workers do with it, no limit is passed. A worker leases at most a
quarter of what remains, divided by the number of workers, and nothing once less than a tenth remains: then each request
asks, and the end is exact. A lease lasts for `USE_SECONDS`. It is given back when it is over, at the process' end, and
before a request of the same worker is refused. What a dead worker held is there again after `LEASE_SECONDS`.

- A rate's lease melts as the bucket refills, from the moment it was taken. So what is outstanding is never more than
  what the bucket lacks because of it, and in any span of t seconds at most burst + limit · t / per are admitted, as
  without leases. It is worth `LEASE_SECONDS` at most: by then a dead worker's has come back by itself. Where that is
  less than two requests, as with 40 an hour, there is none.
- Slots are leased as a number of places. Who sits where is known here alone; the number is renewed.
- Of a budget's lease each admission is noted in Redis without waiting for an answer, but before its request goes out;
  from then on it is a reservation like any. What is admitted in one turn of the loop is noted together. Notes go over a
  connection of their own on which Redis answers nothing: it reads all that was written there, as it can't find earlier
  that the process is gone. So a worker may be killed at any moment, and nothing that it admitted is forgotten. Notes
  are numbered, and what is to come after them (their settlement, the end of a lease) says the last number: Redis does
  it only when it has heard of all. A note that doesn't arrive, since a connection broke, is found by that, and told
  again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from gateway.limits import Level, Rule

USE_SECONDS = 2.0
SWEEP_SECONDS = 1.0


class Lease:
    """Of one rule. Times in µs."""

    __slots__ = (
        "ahead", "asking", "end", "given", "key", "kind", "left", "limit", "most", "offset", "ops", "others", "owned",
        "reserved", "room", "spent", "until",
    )  # fmt: skip

    def __init__(self, rule: Rule, key: str, now: float) -> None:
        """`key` is the rule's in Redis. At first it is nothing but a note that the rule is asked for."""
        self.key = key
        self.kind = rule.kind
        self.limit = rule.limit  # what it was leased for
        self.room = rule.room
        self.until = now + USE_SECONDS * 1e6  # as this process counts
        self.given = False  # Redis knows of it
        self.asking: asyncio.Future[None] | None = None  # a request is about to bring a new one
        # rate: when the lease has melted, and the bucket will be full, as Redis counts; Redis's time less ours.
        self.end = self.ahead = self.offset = 0.0
        # slots: whose places are taken here; how many we have, how many others have, how many of ours may be free.
        self.ops: set[str] = set()
        self.owned = self.others = self.most = 0
        # budget: what is left of the lease, and as far as is known here what is spent and reserved
        self.left = self.spent = self.reserved = 0

    def fits(self, rule: Rule, amount: int, now: float) -> bool:
        """Has it room for so much?"""
        if now >= self.until or self.limit != rule.limit or self.room != rule.room:
            return False
        if self.kind == "rate":
            return self.end - now - self.offset >= amount * rule.unit
        return len(self.ops) < self.owned if self.kind == "slots" else 0 < amount <= self.left

    def take(self, rule: Rule, amount: int, op: str, now: float) -> Level:
        """What there was before."""
        if self.kind == "rate":
            level = max(0.0, self.ahead - now - self.offset)
            self.ahead = now + self.offset + level + amount * rule.unit
            self.end -= amount * rule.unit
            return level
        if self.kind == "slots":
            before = self.others + len(self.ops)
            self.ops.add(op)
            return before
        was = (self.spent, self.reserved)
        self.left -= amount
        self.reserved += amount
        return was

    def spare(self, now: float) -> bool:
        """Does it keep anything from others that nobody here has taken?"""
        if self.kind == "rate":
            return self.end > now + self.offset
        return len(self.ops) < self.owned if self.kind == "slots" else self.left > 0

    @property
    def kept(self) -> str:
        """What Redis is told when the lease ends, or a new one begins: a rate's end, how many places stay in use."""
        return repr(self.end) if self.kind == "rate" else str(len(self.ops))

    def granted(self, rule: Rule, level: Level, kept: str, text: bytes, *, sent: float, redis_now: float) -> None:
        """A request that was sent then brought so much; `level`: what the rule held before, `kept` as it was told."""
        self.limit, self.room, self.given = rule.limit, rule.room, True
        self.until = sent + USE_SECONDS * 1e6
        if self.kind == "rate":
            self.offset = redis_now - sent
            self.end = float(text)
            self.ahead = redis_now + float(level) + rule.amount * rule.unit  # type: ignore[arg-type]  # a rate's
        elif self.kind == "slots":
            self.most = int(text)
            self.owned = int(kept) + self.most
            self.others = int(level) - int(kept) + 1  # type: ignore[arg-type]  # and the one that was asked for
        else:
            self.left = int(text)
            self.spent, self.reserved = level  # type: ignore[misc, assignment]

    def ended(self) -> None:
        """Nothing of it is left but the places that are taken."""
        self.until = self.end = 0.0
        self.left = self.most = 0
        self.owned = len(self.ops)
        self.given = self.owned > 0

    def leave(self, op: str, now: float) -> bool:
        """A place is free again. Are there more now than are ours to keep?"""
        self.ops.discard(op)
        return self.owned - len(self.ops) > (self.most if now < self.until else 0)
