"""Pictures as PNG.

pictures.py    of a run: curves, maps of representations, generated samples, points and forces
sheet.py       of a data set: a sheet of its samples
"""

from dist_contrastive.report.pictures import (
    Panel,
    are_images,
    embedding_map,
    force_field,
    loss_curves,
    point_clouds,
    point_panels,
    sample_grid,
)
from dist_contrastive.report.sheet import sample_sheet

__all__ = [
    "Panel",
    "are_images",
    "embedding_map",
    "force_field",
    "loss_curves",
    "point_clouds",
    "point_panels",
    "sample_grid",
    "sample_sheet",
]
