"""Measures the gateway against a bare aiohttp proxy (the yardstick), section by section. Linux; needs the project's venv only.

    make bench                                          everything, about twelve minutes
    make bench ARGS=--quick                             the core's rows, coarse, in two
    make bench ARGS='--only core,plugins --targets yardstick,xenios,no-metrics --rounds 15 --json out.json'
    make bench ARGS='--record'                          and keep it as what later runs are compared with

README.md beside this file says what each row and figure means.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from tests.benchmarks import figures, jobs, report, rounds
from tests.benchmarks.processes import open_files
from tests.benchmarks.sections import BARS, QUICK, SECTIONS
from tests.benchmarks.targets import MAKERS, beside

HERE = Path(__file__).resolve().parent
RECORDED, README = HERE / "recorded.json", HERE / "README.md"
SPARE_S = 60  # for samples that other processes disturbed


def machine():
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "optimised_python": "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or ""),
        **{name: importlib.metadata.version(name) for name in ("aiohttp", "uvloop")},
    }


def commit():
    """The checkout's commit, with a + where it has changes."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def planned(section, args):
    """Its measures, as the command line wants them."""
    for measure in section.measures:
        times, seconds = measure.quick if args.quick else (measure.rounds, measure.seconds)
        yield dataclasses.replace(measure, rounds=args.rounds or times, seconds=args.seconds or seconds)


def load_in_words(measures):
    parts = [
        f"{measure.name} {measure.rounds} × {measure.seconds:g} s"
        + (f" of {measure.chunk_rate}/s" if measure.streams else f" on {measure.connections}")
        for measure in measures
    ]
    return ", ".join(parts) or "one after the other"


def remarks(rows, targets):
    """What a reader must know before believing the table."""
    for target in targets.values():
        if target.failed:
            yield f"FAILED {target.label}: {target.failed}"
        for what, number in target.kept.items():
            if number != target.answered and not target.failed:
                yield f"WRONG {target.label}: {number} {what} for {target.answered} requests"
        samples = [sample for taken in target.samples.values() for sample in taken if sample]
        detail = next((sample["detail"] for sample in samples if sample["detail"]), "")
        if detail:
            yield f"WRONG {target.label}: {sum(sum(s['errors'].values()) for s in samples)} wrong replies; one: {detail}"
        foreign = max((sample["foreign"] for sample in samples), default=0)
        if foreign > rounds.NOISY:
            yield f"noise {target.label}: others used up to {foreign:.2f} cores: trust ratios and CPU, not rates"
    kept = [f"{n} {what}" for target in targets.values() for what, n in target.kept.items() if n == target.answered]
    if kept:
        yield f"as many as requests: {', '.join(kept)}"
    rates = {row["key"]: row["figures"].get("request.rate") for row in rows}
    if rates.get("direct") and rates.get("yardstick"):
        headroom = rates["direct"]["value"] / rates["yardstick"]["value"]
        yield f"rig the client reaches {headroom:.1f} times the yardstick's rate when it asks the mock directly"


def measured(rig, section, args):
    """(rows, remarks, the load in words, slug → samples) of a section."""
    if section.name == "jobs":
        found = jobs.measured()
        rows = [figures.row(kind, kind, {name: [v] for name, v in one.items()}) for kind, one in found.items()]
        return (
            rows,
            [],
            "a thousand jobs that do nothing (150 of the forking worker); calls that wait three seconds",
            {},
        )
    measures, told = list(planned(section, args)), []
    for measure in [one for one in measures if one.files > args.files]:
        measures.remove(measure)
        told.append(f"left out: {measure.label or measure.name}, as a process may open {args.files} files (ulimit -n)")
    slugs = [slug for slug in section.targets if not args.targets or slug in args.targets]
    targets = rounds.run(rig, section, measures, slugs)
    rows = figures.rows_of(section, measures, targets)
    for command in section.commands:
        name = " ".join(("xenios", *command))
        rows.append(figures.row(name, f"`{name}`", {"start": rounds.time_command(beside(*command))}))
    samples = {slug: {"starts": target.starts, **target.samples} for slug, target in targets.items()}
    return rows, [*told, *remarks(rows, targets)], load_in_words(measures), samples


def arguments():
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(known):
        def read(text):
            given = tuple(filter(None, text.split(",")))
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
            return given

        return read

    parser.add_argument("--quick", action="store_true", help=f"few short rounds; of {', '.join(QUICK)} unless --only")
    parser.add_argument("--only", type=names(SECTIONS), default=(), help=f"sections: {', '.join(SECTIONS)}")
    parser.add_argument("--targets", type=names(MAKERS), default=(), help="of each section only these rows")
    parser.add_argument("--rounds", type=int, help="of every kind of load")
    parser.add_argument("--seconds", type=float, help="of each round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and samples there")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--record", action="store_true", help="write recorded.json and the README's tables anew")
    parser.add_argument("--note", default="", help="what a reader of the recorded tables must know of them")
    parser.add_argument("--silent", action="store_true", help="no progress on stderr")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep configuration and output of the targets there")
    args = parser.parse_args()
    args.only = args.only or (QUICK if args.quick else tuple(SECTIONS))
    if args.record and args.targets:
        parser.error("--record takes whole sections: leave --targets out")
    args.files = open_files()
    return args


@contextlib.contextmanager
def workplace(keep):
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="xenios-bench-") as name:
            yield Path(name)


def record(document, found, note):
    """Sections that were not measured stay as they are."""
    document = {"note": note, "sections": {**document["sections"], **found}}
    RECORDED.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    text = report.recorded_text(SECTIONS.values(), document)
    README.write_text(report.between_marks(README.read_text(), text))


def main():
    args = arguments()
    if not hasattr(os, "sched_setaffinity") or not Path("/proc/stat").exists():
        raise SystemExit("The benchmark reads CPU times from /proc and pins processes: it needs Linux.")
    document = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"note": "", "sections": {}}
    where, found, samples, notes = machine(), {}, {}, []
    print(f"{time.strftime('%Y-%m-%d')}, {report.words_of(where)}, commit {commit()}")
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if not args.silent else (lambda _text: None)
    with workplace(args.keep) as folder, contextlib.closing(rounds.Rig(folder, SPARE_S, say)) as rig:
        for name in args.only:
            section = SECTIONS[name]
            rows, told, load, samples[name] = measured(rig, section, args)
            found[name] = {
                "date": time.strftime("%Y-%m-%d"),
                "commit": commit(),
                "machine": where,
                "load": load,
                "rows": rows,
                "remarks": told,
            }
            print(f"\n{section.title} ({name}; {load})\n")
            print(report.table(section.columns, rows, markdown=args.markdown), *told, sep="\n", flush=True)
            notes += told
    print("\nWhat is aimed at:")
    for name, one in found.items():
        for line in report.bars(BARS, SECTIONS[name], one["rows"]):
            print(f"  {line}")
    print("\nBeside what was recorded:")
    for name, one in found.items():
        for line in report.comparison(SECTIONS[name], document["sections"].get(name), one["rows"], where):
            print(f"  {line}")
    if args.json:
        args.json.write_text(json.dumps({"sections": found, "samples": samples}, indent=1))
    bad = any(note.startswith(("FAILED", "WRONG")) for note in notes)
    if args.record and bad:
        print("\nNothing is recorded: a target failed, or what it did was wrong.")
    elif args.record:
        record(document, found, args.note)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
