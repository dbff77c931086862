"""From the samples of each round to the figures of a table. Pure: a figure is {"value": median, "spread": of its rounds}."""

import statistics


def figure(values):
    """The median of what is known, and how far apart its rounds lie: the middle half of them. None if nothing is known."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    spread = 0.0
    if len(known) > 1:
        low, _, high = statistics.quantiles(known, n=4, method="inclusive")
        spread = high - low
    return {"value": statistics.median(known), "spread": spread}


def ratios(values, base):
    """Round by round: what disturbs a whole round disturbs both."""
    return [a / b if a is not None and b else None for a, b in zip(values, base, strict=False)]


def minus(values, base):
    return [a - b if a is not None and b is not None else None for a, b in zip(values, base, strict=False)]


class Rounds:
    """One target's samples of one measure."""

    def __init__(self, target, measure):
        self.samples = target.samples.get(measure.name, []) if target else []
        self.unit = "chunks" if measure.streams else "requests"

    def column(self, *path):
        return [dig(sample, *path) for sample in self.samples]

    def cpu(self, whose="cpu_s"):
        return [s[whose] / max(s[self.unit], 1) * 1e6 if s else None for s in self.samples]


def dig(sample, *path):
    for name in path:
        sample = sample.get(name) if isinstance(sample, dict) else None
    return sample


def of_measure(section, measure, target, targets):
    """What one load tells of one target: name of a figure → values of the rounds."""
    mine, base, direct = (
        Rounds(target, measure),
        Rounds(targets.get(section.base), measure),
        Rounds(targets.get("direct"), measure),
    )
    found = {
        "cpu": mine.cpu(),
        "cpu_ratio": ratios(mine.cpu(), base.cpu()),
        "store": mine.cpu("store_s") if any(mine.column("store_s")) else [],
        "rate": mine.column("rate"),
        "busy": mine.column("busy"),
        "rig": mine.column("rig"),
        "most_open": mine.column("most_open"),
        "late_ms": [value / 1000 if value is not None else None for value in mine.column("late", "p99")],
        "peak_mb": [value or None for value in mine.column("peak_mb")],
        "stream_kb": [value or None for value in mine.column("stream_kb")],
    }
    for q in ("p50", "p99"):
        found[q] = mine.column("latency", q)
        if direct.samples and target.slug != "direct":
            added = minus(found[q], direct.column("latency", q))
            found[f"added_{q}"] = added
            found[f"added_{q}_ratio"] = ratios(added, minus(base.column("latency", q), direct.column("latency", q)))
    if section.beside and target.slug not in (section.beside, section.base):
        beside = Rounds(targets.get(section.beside), measure)
        sign = -1 if target.slug.startswith("no-") else 1  # without it less, with it more
        found["cost"] = [sign * value if value is not None else None for value in minus(mine.cpu(), beside.cpu())]
        found["cost_ratio"] = ratios(found["cost"], base.cpu())
    return found


def row(key, label, values, **more):
    figures = {name: figure(of) for name, of in values.items()}
    return {"key": key, "label": label, "figures": {name: of for name, of in figures.items() if of}, **more}


def rows_of(section, measures, targets):
    """The rows of a section's table. `targets`: slug → Target."""
    rows = []
    for target in targets.values():
        resting = {name: [value] for name, value in target.idle.items()}
        # That a worker starts once in most sections tells too little for a ratio.
        if section.starts > 1:
            base = targets.get(section.base)
            resting |= {"start": target.starts, "start_ratio": ratios(target.starts, base.starts if base else [])}
        if section.apart:
            rows += [
                row(
                    f"{target.slug} {measure.name}",
                    f"{measure.label}: {target.label}",
                    {**of_measure(section, measure, target, targets), **wrong(target, measure)},
                    failed=target.failed,
                )
                for measure in measures
            ]
            continue
        values = dict(resting)
        for measure in measures:
            found = of_measure(section, measure, target, targets)
            values |= {f"{measure.name}.{name}": of for name, of in found.items()}
        if measures:
            values |= wrong(target, *measures)
        rows.append(row(target.slug, target.label, values, failed=target.failed))
    return sorted(rows, key=lambda one: order(section, measures, one)) if section.apart else rows


def wrong(target, *measures):
    """How many replies were, of all rounds together."""
    samples = [s for measure in measures for s in target.samples.get(measure.name, []) if s]
    return {"errors": [sum(sum(s["errors"].values()) for s in samples)]} if samples else {}


def order(section, measures, one):
    """Rows of one load stand together."""
    return next(i for i, measure in enumerate(measures) if one["key"].endswith(f" {measure.name}"))
