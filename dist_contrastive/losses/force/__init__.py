"""The contrastive force. Reading order: spec, points, affinity, sums, passes, inputs, loss.

By Triton kernels: kernels, sum_kernels, weight_kernels, kernel_calls, panels, segments, softmaxes,
fused, which is what passes is for tiles.
"""

from dist_contrastive.losses.force.affinity import Scope
from dist_contrastive.losses.force.loss import (
    PRESETS,
    ContrastiveForce,
    Preset,
    contrastive_force,
)

__all__ = ["PRESETS", "ContrastiveForce", "Preset", "Scope", "contrastive_force"]
