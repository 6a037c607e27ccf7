"""Rows of metrics: to metrics.jsonl, to trackers, and to who watches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from dist_contrastive.metrics.display import display
from dist_contrastive.metrics.lines import JsonLines

Tracker = Callable[[dict[str, float], int], None]
"""Takes numbers by name, and the step."""


class MetricsLog:
    """Writes rows of metrics; on ranks other than the first one it writes nothing.

    Args:
        folder: the run directory. num_steps: of the whole run. resumed_at: steps done before.
        tracker: of the first rank.
    """

    def __init__(
        self, folder: Path, num_steps: int, resumed_at: int, tracker: Tracker, enabled: bool
    ) -> None:
        self._enabled = enabled
        if enabled:
            self._lines = JsonLines(folder / "metrics.jsonl")
            self._tracker = tracker
            self._display = display(num_steps, resumed_at)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._enabled:
            self._display.close()
            self._lines.close()

    def write(self, row: dict[str, Any]) -> None:
        """One row; it holds `step` (the number of steps done) and numbers."""
        if not self._enabled:
            return
        self._lines.write(row)
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        self._tracker(numbers, row["step"])
        self._display.show(row)
