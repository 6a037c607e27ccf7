"""Where the embeddings of a batch lie: how near those of one sample are, how spread all of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_contrastive import collectives


@torch.no_grad()
def geometry(
    a: Tensor, b: Tensor, temperature: float | None = None, max_rows: int = 1024
) -> dict[str, float]:
    """Numbers of the first `max_rows` rows of the global batch, the same on every rank.

    With a_i, b_i normalised, n rows, and means over all i and all j != i:

        positive_similarity   mean <a_i, b_i>
        negative_similarity   mean <a_i, b_j>
        alignment             mean |a_i - b_i|^2                      (0: all pairs agree)
        uniformity            log mean exp(-2 |a_i - a_j|^2)          (lower: more evenly spread)
        effective_negatives   mean over i of exp(entropy of softmax_j(<a_i, b_j> / temperature)):
                              how many of the n - 1 negatives the gradient comes from

    Args:
        a, b: two embeddings of this rank's samples, [b, D] each.
        temperature: of the loss; without one there are no effective negatives.
        max_rows: more of them cost memory and make the means no better.

    References:
        Wang and Isola 2020, arXiv 2005.10242 (alignment, uniformity).

    Collectives: a gather of objects, and one of rows.
    """
    sizes = collectives.gather_objects(len(a))
    first = sum(sizes[: collectives.rank()])
    mine = torch.stack([a, b], dim=1)[: max(0, max_rows - first)].float()
    rows, _ = collectives.all_gather_rows(F.normalize(mine, dim=-1).contiguous())
    if len(rows) < 2:
        return {}
    a, b = rows.unbind(1)
    others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    scores = a @ b.T
    distances = (2 - 2 * (a @ a.T)).clamp(min=0)
    found = {
        "positive_similarity": scores.diagonal().mean().item(),
        "negative_similarity": scores[others].mean().item(),
        "alignment": (a - b).square().sum(-1).mean().item(),
        "uniformity": (-2 * distances[others]).exp().mean().log().item(),
    }
    if temperature is not None:
        logits = scores[others].view(len(a), -1) / temperature
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        found["effective_negatives"] = entropy.exp().mean().item()
    return found


def duplicates(index: Tensor) -> int:
    """How many rows of the global batch hold a sample that an earlier row holds: false negatives.

    Args:
        index: number of each of this rank's samples in the data set, int64 [b].

    Collectives: one gather of rows.
    """
    everywhere, _ = collectives.all_gather_rows(index[:, None])
    return len(everywhere) - len(everywhere.unique())
