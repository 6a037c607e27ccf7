"""Tables in the output of commands."""

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table

_ENDLESS = 100_000  # characters of a line: rich has no "as wide as it is"
_NUMBER = re.compile(r"[-+]?\d.*|[-?]?")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None
) -> None:
    """Aligned text on standard output, a line a row unless it is a terminal, of whose width it is.

    The arguments are those of `format_table`.
    """
    width = Console().width if sys.stdout.isatty() else None
    print(format_table(columns, rows, title, width))


def format_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    title: str | None = None,
    width: int | None = None,
) -> str:
    """Aligned text: numbers to the right, texts wrapped, single words as paths never cut.

    Args:
        columns: their names; all empty: no line of names.
        rows: of cells, shown by `str`, and None by "?".
        width: in characters, more where single words do not fit; None: nothing is wrapped.
    """
    cells = [["?" if cell is None else str(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns))
    for column, name in enumerate(columns):
        is_number = bool(cells) and all(_NUMBER.fullmatch(row[column]) for row in cells)
        has_words = any(" " in row[column] for row in cells)
        justify: Literal["left", "right"] = "right" if is_number else "left"
        table.add_column(name, justify=justify, no_wrap=is_number or not has_words)
    for row in cells:
        table.add_row(*row)
    console = Console(width=_ENDLESS, color_system=None, markup=False, emoji=False, highlight=False)
    if width is not None:
        console.width = max(width, console.measure(table).minimum)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().rstrip("\n").split("\n")]
    return "\n".join([title, *lines] if title else lines)
