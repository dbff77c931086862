"""Rows in words: tables, what a reader must know, what got slower than it was recorded. Pure, but for the README's marks."""

import dataclasses
import re

FLOOR = 0.05  # a smaller difference is not resolved, as a share of what was recorded; and the least of a ratio:
LEAST = 0.02
MARKS = "<!-- recorded: begin -->", "<!-- recorded: end -->"


@dataclasses.dataclass(frozen=True)
class Column:
    """`compared`: it is told when it got worse than it was recorded; less is better. `spread`: shown too."""

    heading: str
    key: str
    form: str
    compared: bool = False
    spread: bool = False

    def cell(self, row):
        if row.get("failed") and not row["figures"]:
            return "failed"
        found = row["figures"].get(self.key)
        if not found:
            return "-"
        text = format(found["value"], self.form)
        return f"{text} ± {found['spread'] / 2:.0f}" if self.spread else text


def table(columns, rows, *, markdown):
    lines = [["", *(column.heading for column in columns)]]
    lines += [[row["label"], *(column.cell(row) for column in columns)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))] for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


def words_of(machine):
    optimised = " (PGO)" if machine["optimised_python"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, CPython {machine['python']}{optimised}, "
        f"aiohttp {machine['aiohttp']}, uvloop {machine['uvloop']}"
    )


# --- beside what was recorded ------------------------------------------------------------------------------------------


def noise(*figures):
    """By how much a figure may differ from the first of them and mean nothing."""
    return max(FLOOR * abs(figures[0]["value"]), LEAST, *(one["spread"] for one in figures))


def changes(columns, recorded, rows):
    """(row's label, heading, recorded, now, noise) of every compared figure that differs by more than the noise."""
    before = {row["key"]: row["figures"] for row in recorded}
    for row in rows:
        for column in columns:
            old, new = before.get(row["key"], {}).get(column.key), row["figures"].get(column.key)
            if not column.compared or not old or not new:
                continue
            slack = noise(old, new)
            if abs(new["value"] - old["value"]) > slack:
                yield row["label"], heading_of(column), old["value"], new["value"], slack


def heading_of(column):
    """A ratio's heading says nothing where its neighbour is not beside it."""
    return f"{column.key.removesuffix('_ratio')} {column.heading}"


def comparison(section, recorded, rows, machine):
    """Lines that say what got slower or faster than it was recorded."""
    if not recorded:
        yield f"{section.name}: nothing is recorded to compare with"
        return
    at = f"{section.name}: recorded {recorded['date']} ({recorded['commit']})"
    if words_of(recorded["machine"]) != words_of(machine):
        at += f", on another machine or Python ({words_of(recorded['machine'])})"
    found = sorted(changes(section.columns, recorded["rows"], rows), key=lambda one: one[3] < one[2])
    yield f"{at}: {'nothing differs beyond the noise' if not found else 'beyond the noise:'}"
    for label, heading, old, new, slack in found:
        word = "SLOWER" if new > old else "better"
        yield f"  {word} {label}: {heading} {old:.2f} -> {new:.2f} (noise {slack:.2f})"


def bars(aims, section, rows):
    """What is aimed at, and what is. `aims`: (section, row, column) → (at most, in words)."""
    for (name, key, column), (most, words) in aims.items():
        found = next((row["figures"].get(column) for row in rows if row["key"] == key), None)
        if name == section.name and found:
            met = "met" if found["value"] <= most else "missed"
            yield f"bar {words}: at most {most:g}, is {found['value']:.2f}: {met}"


# --- the README --------------------------------------------------------------------------------------------------------


def recorded_text(sections, document):
    """What stands between the README's marks: each section's table as it was recorded last."""
    parts = [document["note"]] if document["note"] else []
    for section in sections:
        recorded = document["sections"].get(section.name)
        if recorded:
            where = (
                f"{recorded['date']}, commit {recorded['commit']}; {words_of(recorded['machine'])}; {recorded['load']}"
            )
            rows = table(section.columns, recorded["rows"], markdown=True)
            parts += [f"### {section.title}", f"`{section.name}`: {where}.", rows]
            parts += ["\n".join(f"- {remark}" for remark in recorded["remarks"])] if recorded["remarks"] else []
    return "\n\n".join(parts)


def between_marks(text, inner):
    begin, end = MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"there is no single {begin} … {end}")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{inner}\n{end}", text, flags=re.DOTALL)
