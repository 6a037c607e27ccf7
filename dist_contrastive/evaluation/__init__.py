"""Measures of encoders and generators, and what `eval` measures of a task with them.

| question | measure |
| --- | --- |
| how well does a representation show classes? | `knn_accuracy`, `linear_probe`, `probe_sweep`, \
`few_label_probe`, `nmi` |
| how much of its space does it use? | `rank_me`, `lidar`, `uniformity` |
| how near are two views of a sample? | `alignment` |
| and continuous labels? | `knn_regression_error` |
| do two towers find each other? | `recall_at_k`, `rank`, `zero_shot_accuracy` |
| how far apart are two distributions? | `energy_distance`, `mmd`, `sliced_wasserstein`, \
`frechet_distance` |
| do generated samples look real? | `precision_recall().precision`, `density_coverage().density` |
| is all of the data generated? | `precision_recall().recall`, `density_coverage().coverage` |
| is a sample of the class asked for? | `Classifier`, `class_agreement` |
| is a sample a copy? | `memorisation` |

No number of generated samples means much alone: compute each a second time with real samples in
their place, as many of them, and read the two side by side.
"""

from dist_contrastive.errors import retired
from dist_contrastive.evaluation.distances import (
    energy_distance,
    frechet_distance,
    mmd,
    sliced_wasserstein,
)
from dist_contrastive.evaluation.manifold import (
    DensityCoverage,
    Memorisation,
    PrecisionRecall,
    density_coverage,
    memorisation,
    precision_recall,
)
from dist_contrastive.evaluation.measure import Measure
from dist_contrastive.evaluation.neighbours import (
    knn_accuracy,
    knn_predict,
    knn_regression_error,
    recall_at_k,
    zero_shot_accuracy,
)
from dist_contrastive.evaluation.probe import (
    Classifier,
    ProbeResult,
    class_agreement,
    few_label_probe,
    linear_probe,
    probe_sweep,
)
from dist_contrastive.evaluation.ranking import Ranking, rank
from dist_contrastive.evaluation.representation import (
    alignment,
    cluster,
    lidar,
    nmi,
    rank_me,
    uniformity,
)
from dist_contrastive.evaluation.splits import Line, Splits

__all__ = [
    "Classifier",
    "DensityCoverage",
    "Line",
    "Measure",
    "Memorisation",
    "PrecisionRecall",
    "ProbeResult",
    "Ranking",
    "Splits",
    "alignment",
    "class_agreement",
    "cluster",
    "density_coverage",
    "energy_distance",
    "few_label_probe",
    "frechet_distance",
    "knn_accuracy",
    "knn_predict",
    "knn_regression_error",
    "lidar",
    "linear_probe",
    "memorisation",
    "mmd",
    "nmi",
    "precision_recall",
    "probe_sweep",
    "rank",
    "rank_me",
    "recall_at_k",
    "sliced_wasserstein",
    "uniformity",
    "zero_shot_accuracy",
]

__getattr__ = retired(
    __name__,
    {
        "generative": "dist_contrastive.evaluation",
        "retrieval": "dist_contrastive.evaluation.neighbours",
        "classifier": "dist_contrastive.evaluation.probe",
    },
)
