"""Writes the table of docs/versions.md from what the matrix has run: `make matrix` calls it at its end.

python docs/tools/versions.py row-*/results.jsonl    first takes over what other machines have written down
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "versions.md"
MARKS = ("<!-- The table is made by docs/tools/versions.py. -->", "<!-- Here it ends. -->")
HEADINGS = (
    *("row", "Python", "PyTorch", "PEFT", "transformers", "run on"),
    *("`check-peft`", "tests passed", "failed", "skipped"),
)

sys.path.insert(0, str(ROOT / "tests"))

from matrix.records import add, fits, read  # noqa: E402
from matrix.rows import ROWS  # noqa: E402


def table(records: list[dict]) -> str:
    """In Markdown, with a line for every row of the matrix."""
    known = {record["row"]: record for record in records}
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for row in ROWS:
        record = known.get(row.name)
        lines.append(cells(record) if record and fits(record, row) else not_run(row))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(record: dict) -> tuple[str, ...]:
    peft = record["peft"] + (f", commit {record['peft_commit'][:7]}" if record.get("peft_commit") else "")
    counts = (str(record[name]) for name in ("passed", "failed", "skipped"))
    check = "agrees" if record["check_peft"] else "**differs**"
    versions = record["python"], record["torch"], peft, record["transformers"]
    return (f"`{record['row']}`", *versions, f"{record['date'][:10]}, {record['machine']}", check, *counts)


def not_run(row) -> tuple[str, ...]:
    peft = "its main" if row.peft == "main" else row.peft or "newest"
    versions = row.python, row.torch or "newest", peft, row.transformers or "newest"
    return (f"`{row.name}`", *versions, "not yet", *("",) * 4)


def with_table(text: str, found: str) -> str:
    """A page with another table between its marks."""
    before, _, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return f"{before}{MARKS[0]}\n\n{found}\n\n{MARKS[1]}{after}"


if __name__ == "__main__":
    add(*(record for name in sys.argv[1:] for record in read(Path(name))))
    PAGE.write_text(with_table(PAGE.read_text(), table(read())))
