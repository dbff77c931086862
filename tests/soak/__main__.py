"""`make soak`: does a gateway grow with the number of requests that it has served?

    make soak                              # a million requests: an hour or more
    make soak ARGS='--minutes 10'          # as many as come; the million is reckoned from the line through them
    make soak ARGS='--json soak.json'      # the figures of each round too

A real `xenios serve` with all built-in plugins, on a Valkey and a PostgreSQL of its own, gets mixed traffic in rounds: whole
answers, streams, jobs, clients that leave, bad bodies, upstreams that fail, names that nobody configured, and after each
round another configuration. Then it rests, and tells what it holds. Exit code 0: flat; 1: it grows, or an answer was not
as it must be; 2: too short to tell.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import uvloop

from tests.soak.judge import ALLOWED, PROMISED, WARM
from tests.soak.run import Soak, shown, until_told


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make soak ARGS=…", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=PROMISED)
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="end then at the latest")
    parser.add_argument("--round", type=int, default=2000, help="requests between two looks")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    soak = Soak(
        options.requests,
        seconds=options.minutes * 60,
        each=options.round,
        clients=options.clients,
        told=lambda line: print(line, flush=True),
    )
    with tempfile.TemporaryDirectory(prefix="xenios-soak-") as folder:
        uvloop.run(until_told(soak.run(Path(folder))))
    if options.json:
        options.json.write_text(json.dumps(figures(soak), indent=1))
    print(report(soak))
    return code(soak)


def code(soak: Soak) -> int:
    verdicts = {growth.verdict for growth in soak.memory.values()}
    if soak.leaks or soak.wrong or soak.complaints or "grows" in verdicts:
        return 1
    return 2 if "unsure" in verdicts else 0


def figures(soak: Soak) -> dict[str, object]:
    return {
        "requests": soak.asked,
        "seconds": round(soak.took, 1),
        "reloads": soak.reloads,
        "sent": soak.sent,
        "wrong": soak.wrong,
        "put_off": soak.put_off,
        "leaks": soak.leaks,
        "more_of": soak.more_of,
        "memory": {name: {**asdict(growth), "verdict": growth.verdict} for name, growth in soak.memory.items()},
        "rounds": [{"requests": asked, **held} for asked, held in soak.rounds],
    }


def report(soak: Soak) -> str:
    much = f"{soak.asked:,} requests of {len(soak.sent)} kinds and {soak.reloads} reloads"
    busy = f"; {soak.put_off} put off while a store was busy" if soak.put_off else ""
    lines = [f"\n{much} in {soak.took / 60:.1f} minutes, {soak.asked / soak.took:.0f} a second{busy}."]
    for name, points in soak.warmed.items():
        (_, early), (_, late) = points[0], points[-1]
        left = f"EACH REQUEST LEAVES {soak.leaks[name]:.2f}" if name in soak.leaks else "no request leaves any"
        lines.append(f"  {name:16} {shown(name, early):>12} → {shown(name, late):>12}   {left}")
    for name, growth in soak.memory.items():
        if math.isinf(growth.high):
            lines.append(f"  {name}: too few rounds after the first {WARM:,} requests to tell")
            continue
        held = soak.asked >= PROMISED
        sure = "" if held else f", reckoned; between {growth.low:+.1%} and {growth.high:+.1%} with 99.9 %"
        lines.append(
            f"  {name}: {growth.share:+.1%} from 50 thousand to a million requests{sure} (allowed: {ALLOWED:+.0%}): "
            f"{growth.verdict}"
        )
    if soak.leaks or soak.more_of:
        lines.append(f"  objects that there are more of: {', '.join(f'{k} {n:+,}' for k, n in soak.more_of.items())}")
    lines += [f"  WRONG {count} × {what}" for what, count in list(soak.wrong.items())[:20]]
    lines += [f"  SAID {line.strip()[:500]}" for line in soak.complaints[:20]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
