"""What a worker tells of itself."""

import contextlib
import time
from datetime import datetime
from types import SimpleNamespace

from gateway import StatementError
from gateway.kit.testing import Gateway
from gateway.vitals import Lag


def test_the_lag_is_the_worst_of_the_last_seconds():
    """A short stall is told for five to ten seconds, to whoever asks, however often; then it is over."""
    lag = Lag()
    lag.note(100.0, 0.001)
    lag.note(101.0, 0.8)
    lag.note(102.0, 0.002)
    assert lag.worst == lag.worst == 0.8
    lag.note(105.5, 0.003)
    assert lag.worst == 0.8
    lag.note(111.0, 0.004)
    assert lag.worst == 0.004


async def told(gw):
    """{(name, labels): value} of all counters and gauges."""
    families = [f for f in await gw.worker.metrics.read() if f.kind != "histogram"]
    return {(f.name, *series.labels): series.value for f in families for series in f.series}


async def test_the_process_tells_of_itself():
    """What is in force and since when, how old its prices are, whether it is simulated, what reloads became."""
    before = time.time()
    async with Gateway.test() as gw:
        gw.worker.reloader = SimpleNamespace(done=2, refused=3)
        found = await told(gw)
        assert found["xenios_config_info", gw.snapshot.hash] == 1
        assert before - 1 <= found["xenios_config_loaded_timestamp_seconds",] <= time.time()
        listed = gw.snapshot.services.catalogue.status()["openrouter"]["as_of"]
        assert found["xenios_catalogue_updated_timestamp_seconds",] == datetime.fromisoformat(listed).timestamp()
        assert found["xenios_simulated",] == 0
        assert (found["xenios_reloads_total", "done"], found["xenios_reloads_total", "refused"]) == (2, 3)
        assert found["xenios_dropped_total", "corrections"] == 0
        assert not {name for name, *_ in found if name == "xenios_store_up"}  # nobody uses one
        loaded = found["xenios_config_loaded_timestamp_seconds",]
        await gw.reload(settings={"server": {"max_connections": 5}})
        found = await told(gw)
    assert found["xenios_config_info", gw.snapshot.hash] == 1
    assert sum(name == "xenios_config_info" for name, *_ in found) == 1
    assert found["xenios_config_loaded_timestamp_seconds",] > loaded


async def test_a_database_is_told_of():
    """How long its transactions take, how many failed, whether it is there."""
    async with Gateway.test(plugins=["usage"]) as gw:
        database = gw.snapshot.services.database
        with contextlib.suppress(StatementError):
            await database.fetch("SELECT nothing FROM nowhere")
        await database.fetch("SELECT 1")
        found = await told(gw)
        [seconds] = [f.series[0] for f in await gw.worker.metrics.read() if f.name == "xenios_store_seconds"]
        assert (found["xenios_store_up", "database"], found["xenios_store_errors_total", "database"]) == (1, 0)
        assert (seconds.labels, sum(seconds.counts)) >= (("database",), 2)
