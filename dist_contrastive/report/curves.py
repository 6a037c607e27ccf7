"""Curves over the training step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dist_contrastive.report.figures import BLUE, GREY, save


def loss_curves(
    rows: Sequence[Mapping[str, object]],
    path: str | Path,
    fields: Sequence[str] = ("loss", "lr"),
    title: str = "",
) -> None:
    """One panel for each of `fields` over the training step.

    Args:
        rows: metric rows as in metrics.jsonl, each with `step`; rows without a field, and fields
            that no row has, are left out.
        path: PNG to write.
        fields: names of numbers in the rows.
        title: above the panels.
    """
    present = [name for name in fields if any(name in row for row in rows)]
    figure = Figure(figsize=(6.4, 2.6 * max(1, len(present))), layout="constrained")
    for i, name in enumerate(present):
        axes = figure.add_subplot(len(present), 1, i + 1)
        points = [(row["step"], row[name]) for row in rows if name in row]
        _curve(axes, np.array(points, dtype=float), smooth=name != "lr")
        axes.set_ylabel({"lr": "learning rate"}.get(name, name.replace("_", " ")))
        axes.set_xlabel("step")
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def _curve(axes: Axes, points: np.ndarray, smooth: bool) -> None:
    """The values; with `smooth` they are faint where there are many, under their running mean."""
    step, value = points.T
    window = 2 * (len(value) // 80) + 1 if smooth else 1  # odd, so that it has a centre
    if window > 1:
        axes.plot(step, value, color=GREY, alpha=0.45, linewidth=0.8)
        value = np.convolve(value, np.ones(window) / window, mode="valid")
        step = step[window // 2 : -(window // 2)]
    axes.plot(step, value, color=BLUE, linewidth=1.6, marker="." if len(value) < 3 else "")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
