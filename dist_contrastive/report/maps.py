"""Maps of representations."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dist_contrastive.report.figures import save


def embedding_map(
    representations: Tensor,
    labels: Tensor,
    path: str | Path,
    title: str = "",
    max_points: int = 2000,
) -> None:
    """A 2-D t-SNE map of representations, coloured by label.

    Distances between far groups mean nothing on such a map, neighbourhoods do. Deterministic.

    Args:
        representations: [n, D]; normalised first, as the loss and the kNN see them.
        labels: integers, or continuous values [n].
        path: PNG to write.
        title: above the map.
        max_points: the first so many are drawn.
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
        _classes(axes, place, classes)
    axes.set(xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=11)
    save(figure, path)


def _classes(axes: Axes, place: np.ndarray, classes: np.ndarray) -> None:
    names = np.unique(classes)
    for i, name in enumerate(names):
        colour = colormaps["tab10" if len(names) <= 10 else "tab20"](i % 20)
        x, y = place[classes == name].T
        axes.scatter(x, y, s=16, color=colour, alpha=0.85, linewidths=0, label=str(name))
    if len(names) <= 20:
        axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _tsne(points: np.ndarray) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(1.0, (len(points) - 1) / 3))
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
