"""Measures of generated samples, all in one place.

| question | measure |
| --- | --- |
| how far apart are the distributions? | `energy_distance`, `mmd`, `sliced_wasserstein`, \
`frechet_distance` |
| do samples look real? | `precision_recall().precision`, `density_coverage().density` |
| is all of the data generated? | `precision_recall().recall`, `density_coverage().coverage` |
| is a sample of the class asked for? | `Classifier`, `class_agreement` |
| is a sample a copy? | `memorisation` |

No number here means much alone: compute each a second time with real samples in place of the
generated ones, as many of them, and read the two side by side.
"""

from dist_contrastive.evaluation.classifier import Classifier, class_agreement
from dist_contrastive.evaluation.distances import (
    energy_distance,
    frechet_distance,
    mmd,
    sliced_wasserstein,
)
from dist_contrastive.evaluation.manifold import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    precision_recall,
)
from dist_contrastive.evaluation.memorisation import Memorisation, memorisation

__all__ = [
    "Classifier",
    "DensityCoverage",
    "Memorisation",
    "PrecisionRecall",
    "class_agreement",
    "density_coverage",
    "energy_distance",
    "frechet_distance",
    "memorisation",
    "mmd",
    "precision_recall",
    "sliced_wasserstein",
]
