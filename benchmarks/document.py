"""Tables of benchmarks put into docs/benchmarks.md, in the place of those with the same heads.

    python benchmarks/precision.py > precision.txt; python benchmarks/docs.py precision.txt

Several tables with the same head are replaced in their order, all of them or none. A table whose
head is not in the document is left out, and named.
"""

import re
import sys
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
TABLE = re.compile(r"^\|.*\n\|[ :|-]+\|\n(?:\|.*\n?)*", re.MULTILINE)


def with_tables(document: str, printed: str) -> tuple[str, list[str]]:
    """Document with the printed tables, and the heads of those that have no place in it.

    Raises:
        SystemExit: there are not as many tables of a head in the document as were printed.
    """
    tables: dict[str, list[str]] = {}
    for table in TABLE.findall(printed):
        tables.setdefault(head_of(table), []).append(table.rstrip("\n") + "\n")
    places = [head_of(table) for table in TABLE.findall(document)]
    missing = [head for head in tables if head not in places]
    for head, found in tables.items():
        if head not in missing and len(found) != places.count(head):
            raise SystemExit(
                f"{len(found)} tables were printed with the head {head}, but the document has "
                f"{places.count(head)}; run all parts of the benchmark"
            )

    def replaced(match: re.Match[str]) -> str:
        queue = tables.get(head_of(match[0]))
        return queue.pop(0) if queue else match[0]

    return TABLE.sub(replaced, document), missing


def head_of(table: str) -> str:
    """First line of a table, with single spaces."""
    return " ".join(table.split("\n", 1)[0].split())


def main() -> None:
    """Put the tables of files, or of standard input, into the document."""
    printed = "\n".join(Path(name).read_text() for name in sys.argv[1:]) or sys.stdin.read()
    document, missing = with_tables(DOCUMENT.read_text(), printed)
    DOCUMENT.write_text(document)
    for head in missing:
        print(f"not in the document: {head}", file=sys.stderr)


if __name__ == "__main__":
    main()
