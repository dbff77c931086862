"""Parts of a gateway are killed at random under load: nothing is lost but what was in them, and all counts are right."""

from collections import Counter, defaultdict

import pytest

from tests.integration.test_metrics import total
from tests.soak.chaos import COST, LIMITED, RESERVED, TIGHT, Chaos

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]
RECOVERY = 10.0  # seconds after a store's return
UNTOLD = 2.0  # seconds for which a process keeps its counts and lines to itself


async def test_two_minutes_of_chaos(tmp_path):
    """Four workers, two of jobs, Valkey and PostgreSQL, killed at random for two minutes: see `must_hold`."""
    chaos = Chaos(seconds=120, seed=8)
    await chaos.run(tmp_path)
    must_hold(chaos)
    # both were used up
    assert {each.key for each in chaos.asked if each.status == 429} == {"tight", "limited"}
    assert chaos.tight_books[0] > TIGHT - RESERVED


def must_hold(chaos):
    """What clients saw, what the upstream saw, the ledger, the rows, the log and the metrics agree."""
    no_request_is_lost(chaos)
    every_job_ended_once(chaos)
    limits_were_kept(chaos)
    the_books_balance(chaos)
    counters_are_right(chaos)


def no_request_is_lost(chaos):
    """But those in a killed worker; refused is only what needs a store that is away."""
    assert [each for each in chaos.lost() if not chaos.was_killed(each)] == []
    strange = [each for each in chaos.asked if each.status not in {None, 200, 202, 429, 503}]
    assert strange == []
    assert {each.key for each in chaos.asked if each.status == 429} <= {"tight", "limited"}
    put_off = [each for each in chaos.asked if each.status == 503]
    assert [each for each in put_off if not chaos.while_a_store_was_away(each, RECOVERY)] == []
    assert {each.code for each in put_off} <= {"store_unavailable"}


def every_job_ended_once(chaos):
    """Each that was taken, also if its client had to ask twice, succeeded, and is one row."""
    taken = {each.id: each.job for each in chaos.asked if each.job}
    assert len(set(taken.values())) == len(taken)
    assert set(taken.values()) == set(chaos.jobs)
    assert set(chaos.jobs.values()) == {"succeeded"}
    good = defaultdict(list)
    for row in chaos.rows:
        if row["outcome"] == "ok":
            good[row["request_id"]].append(row)
    assert {name: good[name] for name in taken if len(good[name]) != 1} == {}


def limits_were_kept(chaos):
    """No budget is overspent, nor are more requests admitted than the limit gives, whoever died in between."""
    assert chaos.tight_books[0] <= TIGHT
    assert chaos.seen_by["tight"] * COST <= TIGHT
    assert chaos.seen_by["limited"] <= LIMITED * (1 + (chaos.seconds + 30) / 3600) + 1


def the_books_balance(chaos):
    """What was spent is the sum of the rows; the upstream charged no more; each answer is one row, and was asked once."""
    outcomes = Counter(row["outcome"] for row in chaos.rows)
    assert chaos.books == (chaos.cost, 0)
    assert chaos.cost == outcomes["ok"] * COST + outcomes["abandoned"] * RESERVED
    assert chaos.seen.total() * COST <= chaos.cost
    good = Counter(row["request_id"] for row in chaos.rows if row["outcome"] == "ok")
    answered = chaos.answered("whole", "stream")
    assert {good[name] for name in answered} == {1}
    assert max(good.values()) == 1
    assert {chaos.seen[name] for name in answered} == {1}
    assert max(n for name, n in chaos.seen.items() if not name.startswith("job")) == 1


def counters_are_right(chaos):
    """Log and metrics tell each answer once, but for the last two seconds of a worker that was killed."""
    logged = Counter(line["request_id"] for line in chaos.lines if line.get("outcome") == "ok")
    untold = chaos.just_before_a_kill(UNTOLD)
    for kind in ("whole", "stream"):
        answered = chaos.answered(kind)
        assert {logged[name] for name in answered - untold} == {1}
        assert {logged[name] for name in answered} <= {0, 1}
    streams = chaos.answered("stream")
    told = total(chaos.told, "xenios_requests_total", endpoint="chat/completions", stream="true", outcome="ok")
    lost = sum(each.kind == "stream" for each in chaos.lost())
    assert len(streams - untold) <= told <= len(streams) + lost
    assert total(chaos.told, "xenios_workers") == 4
