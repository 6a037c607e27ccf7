"""What all pictures share: colours, and how they are written.

Drawn with matplotlib's objects rather than pyplot: no display, no global state.
"""

from pathlib import Path

from matplotlib.figure import Figure

GREY = "#8a8f98"
BLUE = "#2563a8"
_DPI = 130


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, making its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
