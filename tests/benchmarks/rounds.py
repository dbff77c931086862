"""The rig: a mock upstream and a load client on one core, targets on the other, loaded one after the other in each round.

A slow drift of the machine hits all targets of a round alike, so that ratios are taken round by round.
"""

import collections
import contextlib
import dataclasses
import json
import subprocess
import time

from tests.benchmarks.processes import (
    cores,
    cpu_s,
    machine_s,
    move_stores,
    own_s,
    pause,
    pinned,
    pss_mb,
    rss_mb,
    stop,
)
from tests.benchmarks.targets import MODEL, Place, make, python
from tests.stores.certificates import certificate_for
from tests.tools import free_port

NOISY = 0.15  # cores that strangers use


class Rig:
    """`spare_s`: how long samples may be taken again, over all, that other processes disturbed."""

    def __init__(self, folder, spare_s, say):
        both, authority = certificate_for("localhost", folder)
        self.spare_s, self.say = spare_s, say
        self.core = cores()[1]
        self.place = Place(folder, free_port(), free_port(), authority)
        ports = ("--port", self.place.mock_port, "--tls-port", self.place.tls_port)
        with pinned({self.core}):
            self.mock = subprocess.Popen(python("mock_upstream.py", *ports, "--certificate", both))

    def close(self):
        stop(self.mock)

    def sample(self, target, measure):
        """One round's load against a target: the client's report, and the CPU that everybody used meanwhile."""
        command = python("load.py", "--port", target.port, "--key", target.key, "--model", MODEL, *flags(measure))
        root = target.process.pid if target.process else self.mock.pid
        if measure.streams and target.process:
            target.idle.setdefault("rested_mb", rss_mb(root))
        peak, before = 0.0, self.used(root)
        with pinned({self.core}):
            client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while True:
            try:
                out, err = client.communicate(timeout=0.5 if measure.streams else None)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, rss_mb(root))
        cpu, store, mock, machine, own, wall = (b - a for a, b in zip(before, self.used(root), strict=True))
        if client.returncode != 0:
            raise RuntimeError(f"load client: {err.strip()[-300:]}")
        report = json.loads(out)
        target.answered += report["asked"]
        mine = cpu if target.process else 0
        report |= {
            "cpu_s": round(cpu, 3),
            "store_s": round(store, 3),
            "busy": round(cpu / report["wall_s"], 3),
            "rate": report["chunks_per_s"] if measure.streams else report["rps"],
            "rig": round((report["client_cpu_s"] + mock) / report["wall_s"], 3),
            "foreign": round(max(0.0, machine - mine - store - mock - own) / wall, 3),
            "peak_mb": round(peak, 1) if target.process else 0,
        }
        if report["peak_mb"] and measure.streams:
            report["stream_kb"] = (peak - target.idle["rested_mb"]) * 1024 / measure.streams
        return report

    def used(self, root):
        return [*cpu_s(root), cpu_s(self.mock.pid)[0], machine_s(), own_s(), time.monotonic()]

    def calm_sample(self, target, measure):
        """Taken again, once, if strangers disturbed it; the calmer one is kept, with the errors of both."""
        first = self.sample(target, measure)
        if first["foreign"] <= NOISY or self.spare_s <= 0:
            return first
        self.spare_s -= first["wall_s"]
        second = self.sample(target, measure)
        errors = dict(collections.Counter(first["errors"]) + collections.Counter(second["errors"]))
        detail = first["detail"] or second["detail"]
        return {**min(first, second, key=lambda one: one["foreign"]), "errors": errors, "detail": detail}


def flags(measure):
    if measure.streams:
        chunks, delay = max(1, round(measure.seconds * measure.chunk_rate)), round(1000 / measure.chunk_rate)
        return "--streams", measure.streams, "--chunks", chunks, "--delay", delay, "--ramp", measure.ramp
    sizes = "--request-bytes", measure.request_bytes, "--reply-bytes", measure.reply_bytes
    return "--connections", measure.connections, "--seconds", measure.seconds, *sizes


def attempt(target, what, run, *args):
    """One broken target must not end the run: its row says what happened."""
    if target.failed:
        return None
    try:
        return run(*args)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        target.failed = f"{what}: {error}"
        return None


def start(rig, folder, target, times, warm):
    """Starts it as often as its start is to be timed; the last one stays, and is warmed up."""
    if not target.command:
        return
    (folder / f"{target.slug}.out").unlink(missing_ok=True)
    for i in range(times):
        if i:
            target.stop()
        target.start(folder)
    pause(1.0)
    root = target.process.pid
    move_stores(root, rig.core)  # in production they are another machine's: what they do to caches is not the target's
    target.idle |= {"idle_mb": rss_mb(root), "idle_pss_mb": pss_mb(root)}
    if warm:
        rig.sample(target, warm)


def run(rig, section, measures, slugs):
    """Measures a section: slug → Target, with its samples."""
    folder = rig.place.folder / section.name  # its own: rows of the section before are in the database
    folder.mkdir(exist_ok=True)
    targets = {slug: make(slug, dataclasses.replace(rig.place, folder=folder)) for slug in slugs}
    try:
        warm = dataclasses.replace(measures[0], seconds=0.5) if measures and not measures[0].streams else None
        for target in targets.values():
            attempt(target, "start", start, rig, folder, target, section.starts, warm)
            rig.say(f"{section.name}: started {target.slug} {target.failed}")
        for measure in measures:
            for i in range(measure.rounds):
                for target in list(targets.values())[:: 1 if i % 2 == 0 else -1]:
                    skipped = (target.slug, measure.name) in section.skip
                    sample = None if skipped else attempt(target, measure.name, rig.calm_sample, target, measure)
                    target.samples.setdefault(measure.name, []).append(sample)
            rig.say(f"{section.name}: {measure.name}, {measure.rounds} rounds")
    finally:
        for target in targets.values():
            target.stop()
    for target in targets.values():
        with contextlib.suppress(OSError):
            target.count()
    return targets


def time_command(command, times=5):
    """Seconds that it takes, each time."""
    taken = []
    with pinned(cores()[0]):
        for _ in range(times):
            begun = time.monotonic()
            subprocess.run(command, check=True, capture_output=True)
            taken.append(time.monotonic() - begun)
    return taken
