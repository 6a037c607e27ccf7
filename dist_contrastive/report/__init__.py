"""Pictures as PNG.

figures.py      what all share
curves.py       losses over the training step
maps.py         representations in two dimensions
grids.py        generated images, a class to each row
points.py       points and forces in the plane
sheet.py        samples of a data set
"""

from dist_contrastive.report.curves import loss_curves
from dist_contrastive.report.grids import are_images, sample_grid
from dist_contrastive.report.maps import embedding_map
from dist_contrastive.report.points import Panel, force_field, point_clouds, point_panels
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
