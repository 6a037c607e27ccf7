"""Points and forces in the plane."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dist_contrastive.report.figures import BLUE, GREY, save


class Panel(NamedTuple):
    """Points in the plane, and arrows over them."""

    title: str
    clouds: Mapping[str, Tensor]
    """Points [n, 2] by what they are; `data` are grey, others blue."""
    arrows: tuple[Tensor, Tensor] | None = None
    """Places and forces, both [k, 2]. An arrow has the direction of the force and the logarithm of
    its length, since forces span orders of magnitude."""


def point_panels(
    rows: Sequence[tuple[Tensor, Sequence[Panel]]],
    path: str | Path,
    title: str = "",
    side: float = 3.6,
    legend: bool = False,
) -> None:
    """Rows of panels.

    Args:
        rows: in each the points [n, 2] that must be in sight, and as many panels as in the others.
        path: PNG to write.
        title: above them.
        side: of a panel, in inches.
        legend: what the points in each panel are.
    """
    columns = len(rows[0][1])
    figure = Figure(figsize=(side * columns, side * len(rows) + 0.3), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for i, (in_sight, panels) in enumerate(rows):
        for j, panel in enumerate(panels):
            axes = figure.add_subplot(len(rows), columns, i * columns + j + 1)
            _draw_panel(axes, panel)
            _frame(axes, in_sight)
            if legend:
                axes.legend(frameon=False, loc="upper right", fontsize=8)
    save(figure, path)


def point_clouds(clouds: Mapping[str, Tensor], path: str | Path, title: str = "") -> None:
    """Points [n, 2] by the name of their panel, all panels on the axes of the last."""
    *_, last = clouds.values()
    panels = [Panel(name, {name: points}) for name, points in clouds.items()]
    point_panels([(last, panels)], path, title)


def force_field(
    at: Tensor, force: Tensor, generated: Tensor, data: Tensor, path: str | Path, title: str = ""
) -> None:
    """Arrows [k, 2] at places [k, 2], over generated points and data [n, 2]."""
    panel = Panel("", {"data": data, "generated": generated}, (at, force))
    point_panels([(at, [panel])], path, title, side=5.2, legend=True)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for name, points in panel.clouds.items():
        x, y = points.detach().cpu().numpy().T
        colour = GREY if name == "data" else BLUE
        axes.scatter(x, y, s=4, color=colour, alpha=0.5, linewidths=0, label=name)
    if panel.arrows is not None:
        at, force = panel.arrows
        size = force.norm(dim=1, keepdim=True)
        arrows = force / size.clamp(min=1e-30) * (1 + 10 * size).log()
        axes.quiver(*at.cpu().numpy().T, *arrows.cpu().numpy().T, color="#c2410c", width=0.003)
    axes.set_title(panel.title, fontsize=10)


def _frame(axes: Axes, points: Tensor) -> None:
    """Equal units, and room for the points."""
    low, high = points.amin(0).tolist(), points.amax(0).tolist()
    margin = [0.08 * (b - a) for a, b in zip(low, high, strict=True)]
    axes.set(
        aspect="equal",
        xlim=(low[0] - margin[0], high[0] + margin[0]),
        ylim=(low[1] - margin[1], high[1] + margin[1]),
    )
    axes.tick_params(labelsize=7)
