"""Generated images in a grid."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from dist_contrastive.report.figures import save


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
) -> None:
    """Generated samples, a class to each row; beside real ones, if these are given.

    Args:
        generated, real: images [n, C, H, W] in [0, 1], C 1 or 3.
        generated_labels, real_labels: integers [n].
        path: PNG to write.
        per_class: the first so many of each class are drawn.
        title: above the grid.
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
        axes.set_yticklabels([str(label) for label in classes])
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
