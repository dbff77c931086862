"""What Valkey and PostgreSQL see of a request: python -m tests.benchmarks.stores

A gateway with the default plugins, four limits, two budgets and `usage`, on a Valkey and a PostgreSQL of its own; 64
connections in a closed loop. Commands, transactions, bytes and CPU time of each store, divided by the requests.
`--lease off`: limits and budgets ask Valkey for each request.
"""

import argparse
import asyncio
import contextlib
import copy
import dataclasses
import json
import tempfile
from pathlib import Path

import asyncpg
import redis

from tests.benchmarks.processes import cpu_s, move_stores, pause
from tests.benchmarks.rounds import Rig
from tests.benchmarks.sections import REQUEST
from tests.benchmarks.targets import LIMITS, xenios
from tests.stores.postgres import postgres_server
from tests.stores.servers import valkey_server


def seen_by_valkey(client):
    """(commands, those that scripts ran among them, bytes received and sent, bytes of memory)"""
    stats, memory = client.info("stats"), client.info("memory")
    calls = {name: one["calls"] for name, one in client.info("commandstats").items()}
    asked = sum(n for name, n in calls.items() if name in {"cmdstat_evalsha", "cmdstat_eval"})
    return (
        sum(calls.values()),
        asked,
        stats["total_net_input_bytes"] + stats["total_net_output_bytes"],
        memory["used_memory"],
    )


async def seen_by_postgres(url):
    """(transactions, rows of usage, bytes of the database)"""
    connection = await asyncpg.connect(url)
    try:
        row = await connection.fetchrow(
            "SELECT xact_commit, (SELECT count(*) FROM usage_requests), pg_database_size(datname) "
            "FROM pg_stat_database WHERE datname = current_database()"
        )
        return tuple(row)
    finally:
        await connection.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lease", choices=("on", "off"), default="on")
    parser.add_argument("--seconds", type=float, default=10)
    asked = parser.parse_args()
    limits = copy.deepcopy(LIMITS)
    for config in limits.values():
        config["lease"] = asked.lease == "on"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        valkey = stack.enter_context(valkey_server("--appendfsync", "everysec"))
        postgres = stack.enter_context(postgres_server(own=True))
        rig = Rig(folder, 0, print)
        stack.callback(rig.close)
        database = asyncio.run(postgres.new())
        target = xenios("", config={**limits, "usage": {}}, redis=valkey.url)("stores", rig.place)
        path = folder / "stores" / "xenios.yaml"
        document = json.loads(path.read_text())
        document["services"]["database"]["url"] = database
        path.write_text(json.dumps(document))
        target.start(folder)
        stack.callback(target.stop)
        client = stack.enter_context(contextlib.closing(redis.Redis.from_url(valkey.url)))
        stores = valkey._process.pid, postgres.process.pid
        for pid in stores:
            move_stores(pid, rig.core)
        rig.sample(target, dataclasses.replace(REQUEST, seconds=1))
        while asyncio.run(seen_by_postgres(database))[1] < target.answered:
            pause(0.1)  # rows are written a second late at most
        before = seen_by_valkey(client), asyncio.run(seen_by_postgres(database)), [cpu_s(pid)[1] for pid in stores]
        report = rig.sample(target, dataclasses.replace(REQUEST, seconds=asked.seconds))
        target.stop()  # what waits is written
        after = seen_by_valkey(client), asyncio.run(seen_by_postgres(database)), [cpu_s(pid)[1] for pid in stores]
    n = report["asked"]
    commands, scripts, traffic, memory = ((b - a) / n for a, b in zip(before[0], after[0], strict=True))
    transactions, rows, size = ((b - a) / n for a, b in zip(before[1], after[1], strict=True))
    valkey_us, postgres_us = ((b - a) / n * 1e6 for a, b in zip(before[2], after[2], strict=True))
    print(f"{n} requests, {report['rate']:.0f}/s, {report['cpu_s'] / n * 1e6:.0f} µs of the gateway's CPU each")
    print(
        f"Valkey:     {valkey_us:.0f} µs of CPU, {scripts:.3f} scripts, {commands - scripts:.1f} commands within them, "
        f"{traffic:.0f} bytes of traffic, {memory:.0f} bytes of memory"
    )
    print(
        f"PostgreSQL: {postgres_us:.0f} µs of CPU, {transactions:.3f} transactions, {rows:.3f} rows, {size:.0f} bytes"
    )


if __name__ == "__main__":
    main()
