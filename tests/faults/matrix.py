"""The fault matrix of gateway/README.md, made from the table that the tests check. Run it to write the README anew."""

from pathlib import Path

from tests.faults.test_upstream_faults import TABLE, Cell

README = Path(__file__).parents[2] / "gateway" / "README.md"
BEGIN, END = "<!-- fault matrix: begin -->\n", "<!-- fault matrix: end -->"


def told(cell: Cell) -> str:
    how = f"stream error `{cell.code}`" if cell.begun else f"{cell.status} `{cell.code}`"
    return f"{how}; {'next model' if cell.falls_back else 'no fallback'}"


def matrix() -> str:
    rows = [f"| {fault} | {told(whole)} | {told(stream)} |" for fault, (whole, stream) in TABLE.items()]
    return "\n".join(["| the upstream's fault | whole reply | stream |", "| --- | --- | --- |", *rows]) + "\n"


def published() -> str:
    text = README.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def write() -> None:
    text = README.read_text()
    README.write_text(text.replace(BEGIN + published() + END, BEGIN + matrix() + END))


if __name__ == "__main__":
    write()
