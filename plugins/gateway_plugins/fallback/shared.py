"""What breakers of one worker learn, told to all workers and gateways by one Redis.

Each counts for itself; told are openings, probes, closings and rests. That happens in the background, twice a second:
no request waits for it, and while Redis is away each goes on with what it knows.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from gateway import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway import Services
    from gateway.kit import Breaker, Breakers

SYNC_SECONDS = 0.5
_FORGOTTEN_AFTER = 600_000  # ms after a probe was due and nobody came

# Takes five values for each breaker that changed: name, ms since it opened (-1: closed), ms to its probe, ms of rest
# left, cause. Returns the same of all that are not closed. The times are Redis's own: clocks of hosts differ.
_SCRIPT = f"""
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
for i = 1, #ARGV, 5 do
  local since, probe, rest = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  if since < 0 and rest <= 0 then
    redis.call('HDEL', KEYS[1], ARGV[i])
  else
    local opened = since < 0 and -1 or now - since
    redis.call('HSET', KEYS[1], ARGV[i], cjson.encode({{opened, now + probe, now + rest, ARGV[i + 4]}}))
  end
end
if #ARGV > 0 then redis.call('PEXPIRE', KEYS[1], 3600000) end
local out = {{}}
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local b = cjson.decode(all[i + 1])
  local since = b[1] < 0 and -1 or now - b[1]
  if (since < 0 and b[3] <= now) or (since >= 0 and b[2] + {_FORGOTTEN_AFTER} < now) then
    redis.call('HDEL', KEYS[1], all[i])
  else
    for _, value in ipairs({{all[i], since, b[2] - now, b[3] - now, b[4]}}) do out[#out + 1] = value end
  end
end
return out
"""


class Shared:
    """Keeps one plugin's breakers and Redis together."""

    def __init__(self, services: Services, breakers: Breakers, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = services.redis
        self._services = services
        self._key = f"{{xenios}}:breaker:{services.plugin_id}"
        self._breakers = breakers
        self._clock = clock
        self._changed: set[str] = set()  # since Redis was last told

    def note(self, breaker: Breaker) -> None:
        if self._redis is not None:
            self._changed.add(breaker.name)

    async def keep(self) -> None:
        """For ever."""
        while self._redis is not None:
            await asyncio.sleep(SYNC_SECONDS)
            try:
                await self.sync()
            except StoreUnavailable:
                # It may come back empty: what is not closed is told again.
                now = self._clock()
                self._changed.update(b.name for b in self._breakers if b.state(now) != "closed")
            except Exception:
                self._services.log.exception("breakers_not_shared")

    async def sync(self) -> None:
        """Tell what changed, take over what others say. Raises StoreUnavailable."""
        if self._redis is None:
            return
        told, self._changed = self._changed, set()
        try:
            answer = await self._redis.script(_SCRIPT, [self._key], self._arguments(told))
        except BaseException:
            self._changed.update(name for name in told if self._breakers.find(name) is not None)  # not the forgotten
            raise
        now, found = self._clock(), set()
        for i in range(0, len(answer), 5):
            name, since, probe, rest, cause = answer[i : i + 5]
            found.add(name.decode())
            self._take_over(name.decode(), since, now + probe / 1000, now + rest / 1000, cause.decode())
        for breaker in self._breakers:
            if breaker.opened_at is not None and breaker.name not in found and breaker.name not in self._changed:
                breaker.close()  # somebody's probe was good

    def _arguments(self, names: set[str]) -> list[str | int]:
        now, out = self._clock(), list[str | int]()
        for breaker in map(self._breakers.find, names):
            if breaker is None:
                continue
            since = -1 if breaker.opened_at is None else _ms(now - breaker.opened_at)
            probe, rest = _ms(breaker.next_probe - now), _ms(breaker.resting_until - now)
            out += [breaker.name, since, max(0, probe), max(0, rest), breaker.cause or ""]
        return out

    def _take_over(self, name: str, since: int, next_probe: float, resting_until: float, cause: str) -> None:
        now = self._clock()
        breaker = self._breakers.of(name, now)
        if breaker is None or name in self._changed:  # it knows better since
            return
        breaker.cause = cause
        breaker.resting_until = max(breaker.resting_until, resting_until)
        if since < 0:
            if breaker.opened_at is not None:
                breaker.close()
        elif breaker.opened_at is None:
            breaker.open(now - since / 1000, next_probe)
        else:
            breaker.next_probe = max(breaker.next_probe, next_probe)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
