"""What is counted, and what several workers tell together."""

import asyncio
import time

import msgspec
import pytest

import gateway.metrics
from gateway.errors import StoreUnavailable
from gateway.metrics import MOST_MODELS, MOST_SERIES, Metrics


def told(families, name):
    """{label values: value} of a metric."""
    [found] = [family for family in families if family.name == name]
    return {series.labels: series.value for series in found.series}


async def test_who_asks_twice_gets_the_same():
    """A plugin that a reload makes anew goes on counting where it was."""
    metrics = Metrics()
    metrics.counter("a_total", "A.", ("x",)).add(2, "one")
    metrics.counter("a_total", "A, said otherwise.", ("x",)).of("one").value += 3
    assert told(await metrics.read(), "a_total") == {("one",): 5}


@pytest.mark.parametrize(
    "other",
    [
        lambda m: m.counter("a", "", ("y",)),
        lambda m: m.gauge("a", "", ("x",)),
        lambda m: m.histogram("a", "", ("x",)),
    ],
)
def test_two_that_differ_can_not_have_one_name(other):
    """A clash of names is the plugin's error when it starts, not a wrong number later."""
    metrics = Metrics()
    metrics.counter("a", "", ("x",))
    with pytest.raises(ValueError, match="The metric a is a counter with the labels"):
        other(metrics)


def test_labels_are_given_in_full():
    """A forgotten label is an error."""
    with pytest.raises(ValueError, match=r"a has the labels \('x', 'y'\), not 1"):
        Metrics().counter("a", "", ("x", "y")).of("one")


async def test_a_histogram_counts_up_to_each_bound():
    """A value that equals a bound is within it, as Prometheus' `le`; the last count is of what is larger than all."""
    metrics = Metrics()
    times = metrics.histogram("t_seconds", "", (), (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        times.observe(value)
    [family] = await metrics.read()
    [series] = family.series
    assert (family.bounds, series.counts, series.value) == ([1.0, 2.0], [2, 2, 1], 7.5)


async def test_series_are_bounded():
    """A label value that somebody invents anew each time ends as `other`, and nothing is lost."""
    metrics = Metrics()
    counter = metrics.counter("a_total", "", ("x",))
    for number in range(MOST_SERIES + 50):
        counter.add(1, str(number))
    found = told(await metrics.read(), "a_total")
    assert len(found) == MOST_SERIES + 1
    assert found["other",] == 50
    assert sum(found.values()) == MOST_SERIES + 50


def test_models_as_labels_are_known_ones():
    """Invented names are `other`; what the configuration names always has a label, of the rest a hundred."""
    metrics = Metrics()
    metrics.follow(lambda up, model: model.removesuffix(":free") if "real" in model else None, ["a/mine"])
    assert metrics.model("a", "mine") == "mine"
    assert metrics.model("b", "mine") == "other"
    assert metrics.model("a", "real-1:free") == "real-1"
    assert {metrics.model("a", f"invented-{n}") for n in range(10_000)} == {"other"}
    labels = {metrics.model("a", f"real-{n}") for n in range(10 * MOST_MODELS)}
    assert len(labels) == MOST_MODELS + 1
    assert metrics.model("a", "mine") == "mine"


async def test_what_is_looked_up_is_looked_up_each_time():
    """A gauge that is set before each export is as old as the question; one that fails spoils no other."""
    metrics = Metrics()
    gauge, asked = metrics.gauge("g", ""), []

    def look():
        asked.append(1)
        gauge.set(len(asked))

    def fail():
        raise RuntimeError("no")

    metrics.before_export(fail)
    end = metrics.before_export(look)
    await metrics.read()
    assert told(await metrics.read(), "g") == {(): 2}
    end()
    assert told(await metrics.read(), "g") == {(): 2}


async def test_who_shares_a_gauge_does_not_wipe_it():
    """Two instances of a plugin, or the old and the new one of a reload, tell of one gauge: the worst, the sum, or as it
    is merged. What one that closes said is gone, and nothing else.
    """
    metrics = Metrics()
    worst, sum_ = metrics.gauge("worst", "", ("x",), merge="max"), metrics.gauge("sum", "")
    old, new = {("a",): 3.0, ("b",): 1.0}, {("a",): 1.0, ("c",): 2.0}
    ends = [worst.read_from(lambda: old), sum_.read_from(lambda: {(): 5})]
    assert told(await metrics.read(), "worst") == old
    new_ends = [worst.read_from(lambda: new), sum_.read_from(lambda: {(): 7})]
    families = await metrics.read()
    assert told(families, "worst") == {("a",): 3, ("b",): 1, ("c",): 2}
    assert told(families, "sum") == {(): 12}
    for end in ends:
        end()
        end()
    families = await metrics.read()
    assert (told(families, "worst"), told(families, "sum")) == (new, {(): 7})
    for end in new_ends:
        end()
    assert told(await metrics.read(), "worst") == {}


async def test_a_source_that_fails_spoils_no_other():
    """A plugin that can't tell its own numbers hides nobody else's."""
    metrics = Metrics()
    gauge = metrics.gauge("g", "", ("x",), merge="max")
    gauge.read_from(lambda: 1 / 0)
    gauge.read_from(lambda: {("a",): 1})
    assert told(await metrics.read(), "g") == {("a",): 1}


# --- several workers -------------------------------------------------------------------------------------------------


async def test_whoever_is_asked_tells_of_all(tmp_path):
    """Counters and histograms add up; gauges as they say; each worker has its own where that is meant."""
    one, two = Metrics(tmp_path, 1), Metrics(tmp_path, 2)
    for number, metrics in ((1, one), (2, two)):
        metrics.counter("c_total", "", ("x",)).add(number, "a")
        metrics.counter("c_total", "", ("x",)).add(1, f"only {number}")
        metrics.histogram("h", "", (), (1.0,)).observe(number)
        metrics.gauge("sum", "").set(number)
        metrics.gauge("max", "", merge="max").set(number)
        metrics.gauge("min", "", merge="min").set(number)
        metrics.gauge("each", "", ("x",), merge="worker").set(number, "a")
    await two.read()
    families = await one.read()
    assert families == await two.read()
    assert told(families, "c_total") == {("a",): 3, ("only 1",): 1, ("only 2",): 1}
    assert [told(families, name)[()] for name in ("sum", "max", "min")] == [3, 2, 1]
    assert told(families, "each") == {("a", "1"): 1, ("a", "2"): 2}
    [h] = [family for family in families if family.name == "h"]
    assert (h.series[0].counts, h.series[0].value) == ([1, 1], 3)


async def test_what_was_told_once_does_not_go_down(tmp_path):
    """One is asked, then the other: its numbers of the other are as new as what that one told."""
    one, two = Metrics(tmp_path, 1), Metrics(tmp_path, 2)
    seen = 0
    for number in range(20):
        for metrics in (one, two):
            metrics.counter("c_total", "").add(1)
        now = told(await (one, two)[number % 2].read(), "c_total")[()]
        assert now >= seen
        seen = now
    await one.read()
    assert told(await two.read(), "c_total")[()] == 40


async def test_a_worker_goes_on_from_what_its_predecessor_counted(tmp_path):
    """It was killed: what it had written stays counted, also of a metric that nobody asks for any more."""
    first = Metrics(tmp_path, 1)
    first.counter("c_total", "", ("x",)).add(5, "a")
    first.counter("gone_total", "").add(7)
    first.histogram("h", "", (), (1.0,)).observe(0.5)
    first.gauge("g", "").set(3)
    await first.read()
    again, other = Metrics(tmp_path, 1), Metrics(tmp_path, 2)
    again.counter("c_total", "", ("x",)).add(1, "a")
    again.histogram("h", "", (), (1.0,)).observe(2)
    await again.read()
    families = await other.read()
    assert told(families, "c_total") == {("a",): 6}
    assert told(families, "gone_total") == {(): 7}
    assert told(families, "h") == {(): 2.5}
    assert "g" not in {family.name for family in families}


async def test_a_worker_that_is_gone_has_no_gauges(tmp_path, monkeypatch):
    """In-flight requests of a killed worker are not in flight."""
    one, two = Metrics(tmp_path, 1), Metrics(tmp_path, 2)
    for metrics in (one, two):
        metrics.gauge("g", "").set(1)
        metrics.counter("c_total", "").add(1)
        await metrics.read()
    assert told(await two.read(), "g") == {(): 2}
    now = time.time() + 60
    monkeypatch.setattr(gateway.metrics.time, "time", lambda: now)
    families = await two.read()
    assert (told(families, "g"), told(families, "c_total")) == ({(): 1}, {(): 2})


async def test_a_worker_writes_by_itself_and_once_more_at_its_end(tmp_path, monkeypatch):
    """What the others tell of it is a second old at most, and nothing of its last second is lost."""
    monkeypatch.setattr(gateway.metrics, "WRITE_SECONDS", 0.01)
    one, two = Metrics(tmp_path, 1), Metrics(tmp_path, 2)
    counter, gauge = one.counter("c_total", ""), one.gauge("g", "")
    async with one.lifespan():
        counter.add(1)
        gauge.set(1)
        async with asyncio.timeout(5):
            while "c_total" not in {family.name for family in await two.read()}:
                await asyncio.sleep(0.01)
        counter.add(1)
    families = await two.read()
    assert told(families, "c_total") == {(): 2}
    assert told(families, "g") == {}


async def test_a_broken_file_is_no_worker(tmp_path):
    """Half a file, another's file: what can't be read is left out."""
    (tmp_path / "2").write_bytes(b"\x00half")
    (tmp_path / "3").write_bytes(msgspec.msgpack.encode({"worker": 3}))
    (tmp_path / "4.123.tmp").write_bytes(b"")
    one = Metrics(tmp_path, 1)
    one.counter("c_total", "").add(1)
    assert told(await one.read(), "c_total") == {(): 1}


async def test_workers_that_differ_after_a_reload(tmp_path):
    """While one has yet to swap, a metric that changed its labels is told as the first of them knows it."""
    one, two = Metrics(tmp_path, 1), Metrics(tmp_path, 2)
    one.counter("c_total", "", ("x",)).add(1, "a")
    two.counter("c_total", "").add(1)
    await one.read()
    assert told(await two.read(), "c_total") == told(await one.read(), "c_total") == {("a",): 1}


async def test_a_sum_is_the_same_whoever_is_asked(tmp_path):
    """Not smaller by a hair, as fractions are that are added up in another order: a counter would have gone down."""
    workers = [Metrics(tmp_path, number) for number in (1, 2, 3, 4)]
    for metrics, cost in zip(workers, (0.63, 0.07, 0.01, 0.84), strict=True):
        metrics.counter("cost_total", "").add(cost)
        await metrics.read()
    sums = {told(await metrics.read(), "cost_total")[()] for metrics in workers}
    assert len(sums) == 1


async def test_numbers_that_can_not_be_exchanged_are_not_told(tmp_path):
    """A full disk, a folder that is gone, a file that can't be read: an error that says so, not what is less than
    before; and all of it once it is mended."""
    folder = tmp_path / "metrics"
    folder.mkdir()
    one, two = Metrics(folder, 1), Metrics(folder, 2)
    for metrics in (one, two):
        metrics.counter("c_total", "").add(1)
        await metrics.read()
    folder.rename(tmp_path / "gone")
    with pytest.raises(StoreUnavailable, match=r"exchange their numbers in data_dir: No such file"):
        await one.read()
    (tmp_path / "gone").rename(folder)
    (folder / "2").rename(tmp_path / "2")
    (folder / "2").mkdir()
    with pytest.raises(StoreUnavailable, match="Is a directory"):
        await one.read()
    (folder / "2").rmdir()
    (tmp_path / "2").rename(folder / "2")
    assert told(await one.read(), "c_total") == {(): 2}
