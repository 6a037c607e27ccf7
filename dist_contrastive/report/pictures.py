"""Pictures of a run as PNG: curves, maps of representations, generated samples, points and forces.

Drawn with matplotlib's objects rather than pyplot: no display, no global state.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dist_contrastive.atomic import open_file
from dist_contrastive.errors import ConfigError

GREY = "#8a8f98"
BLUE = "#2563a8"
_DPI = 130
_MAX_NAME = 24  # characters of a class


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, making its folder; it takes the place of a link.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_file(path) as file:
            figure.savefig(file, dpi=_DPI, format="png")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); make room, or choose another folder"
        ) from error


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


def embedding_map(
    representations: Tensor,
    labels: Tensor,
    path: str | Path,
    title: str = "",
    max_points: int = 2000,
    names: Mapping[int, str] | None = None,
) -> None:
    """A 2-D t-SNE map of representations, coloured by label.

    Distances between far groups mean nothing on such a map, neighbourhoods do. Deterministic.

    Args:
        representations: [n, D]; normalised first, as the loss and the kNN see them.
        labels: integers, or continuous values [n].
        path: PNG to write.
        title: above the map.
        max_points: the first so many are drawn.
        names: of classes, by number.
    """
    points = representations[:max_points].detach().flatten(1).double().cpu().numpy()
    points /= np.linalg.norm(points, axis=1, keepdims=True) + 1e-12
    classes = labels[:max_points].cpu().numpy()
    place = _tsne(points)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.add_subplot()
    if labels.is_floating_point():
        x, y = place.T
        points_drawn = axes.scatter(x, y, s=16, c=classes, cmap="viridis", linewidths=0)
        figure.colorbar(points_drawn, label="label", fraction=0.04)
    else:
        _classes(axes, place, classes, names or {})
    axes.set(xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=11)
    save(figure, path)


def _classes(axes: Axes, place: np.ndarray, classes: np.ndarray, names: Mapping[int, str]) -> None:
    numbers = np.unique(classes).tolist()
    for i, number in enumerate(numbers):
        colour = colormaps["tab10" if len(numbers) <= 10 else "tab20"](i % 20)
        x, y = place[classes == number].T
        label = _class_label(number, names)
        axes.scatter(x, y, s=16, color=colour, alpha=0.85, linewidths=0, label=label)
    if len(numbers) <= 20:
        axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _class_label(number: int, names: Mapping[int, str]) -> str:
    """Number and name of a class; $ would begin mathematics, an underscore in front hide it."""
    name = names.get(number, "")[:_MAX_NAME].replace("$", r"\$")
    return f"{number} {name}".rstrip()


def _tsne(points: np.ndarray) -> np.ndarray:
    # Of one point, or of points that are all equal, there is no map; sklearn crashes.
    if len(points) < 2 or np.ptp(points, axis=0).max() < 1e-12:
        return np.zeros((len(points), 2))
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(1.0, (len(points) - 1) / 3))
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)


def are_images(samples: Tensor) -> bool:
    """Whether they can be shown as such: [n, C, H, W] of 1 or 3 channels."""
    return samples.dim() == 4 and samples.shape[1] in (1, 3)


def sample_grid(
    generated: Tensor,
    generated_labels: Tensor,
    real: Tensor | None = None,
    real_labels: Tensor | None = None,
    path: str | Path = "samples.png",
    per_class: int = 8,
    title: str = "",
    names: Mapping[int, str] | None = None,
) -> None:
    """Generated samples, a class to each row; beside real ones, if these are given.

    Args:
        generated, real: images [n, C, H, W] in [0, 1], C 1 or 3.
        generated_labels, real_labels: integers [n].
        path: PNG to write.
        per_class: the first so many of each class are drawn.
        title: above the grid.
        names: of classes, by number.
    """
    classes = generated_labels.unique().tolist()
    shape = (generated.shape[-2] + 1) * len(classes) / ((generated.shape[-1] + 1) * per_class)
    sides = [("generated", generated, generated_labels)]
    if real is not None and real_labels is not None:
        sides.append(("real", real, real_labels))
    figure = Figure(figsize=(4.2 * len(sides), 3.9 * shape + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for column, (name, images, labels) in enumerate(sides):
        axes = figure.add_subplot(1, len(sides), column + 1)
        axes.imshow(
            _mosaic(images, labels, classes, per_class),
            cmap="gray", vmin=0, vmax=1, interpolation="nearest",
        )  # fmt: skip
        axes.set_title(name, fontsize=10)
        side = images.shape[-2] + 1
        axes.set(xticks=[], yticks=[side * (i + 0.5) - 0.5 for i in range(len(classes))])
        axes.set_yticklabels([_class_label(label, names or {}) for label in classes])
        axes.set_ylabel("class" if column == 0 else "")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    save(figure, path)


def _mosaic(images: Tensor, labels: Tensor, classes: list[int], per_class: int) -> np.ndarray:
    """Rows of images with a line of one pixel between; [rows, columns] or [rows, columns, 3]."""
    _, channels, height, width = images.shape
    tile_height, tile_width = height + 1, width + 1
    mosaic = np.ones((len(classes) * tile_height - 1, per_class * tile_width - 1, channels))
    for row, label in enumerate(classes):
        chosen = images[labels == label][:per_class].detach().float().clamp(0, 1).cpu()
        for column, image in enumerate(chosen):
            top, left = row * tile_height, column * tile_width
            mosaic[top : top + height, left : left + width] = image.permute(1, 2, 0).numpy()
    return mosaic[..., 0] if channels == 1 else mosaic


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
