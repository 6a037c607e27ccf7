"""Pair losses in dense plain torch, as scripts have them: the matrix of scores is kept.

Each takes its inputs as the loss of that name does, in any floating dtype. Scores are a product in
that dtype, and then fp32, or as they are (`low`): softmaxes in bf16, as open_clip has them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

TEMPERATURE, SCALE, BIAS, MARGIN = 0.07, 10.0, -10.0, 0.5
PER_LABEL = 16  # rows of a label

Loss = Callable[..., Tensor]


def cosines(x: Tensor, y: Tensor, low: bool = False) -> Tensor:
    """Cosines of all pairs."""
    products = normalize(x, dim=-1) @ normalize(y, dim=-1).T
    return products if low else products.to(torch.promote_types(x.dtype, torch.float32))


def infonce(x: Tensor, y: Tensor, low: bool = False) -> Tensor:
    """Row i finds key i."""
    scores = cosines(x, y, low) / TEMPERATURE
    return cross_entropy(scores, torch.arange(len(x), device=x.device))


def infonce_symmetric(x: Tensor, y: Tensor, low: bool = False) -> Tensor:
    """CLIP's loss; one product serves both directions."""
    scores, own = cosines(x, y, low) / TEMPERATURE, torch.arange(len(x), device=x.device)
    return (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2


def ntxent(x: Tensor, y: Tensor, low: bool = False) -> Tensor:
    """SimCLR's loss."""
    z = torch.cat([x, y])
    scores = (cosines(z, z, low) / TEMPERATURE).fill_diagonal_(-torch.inf)
    own = torch.arange(len(z), device=x.device)
    return cross_entropy(scores, own.roll(len(x)))


def dcl(x: Tensor, y: Tensor, low: bool = False) -> Tensor:
    """NT-Xent without the positive in its denominator."""
    z = torch.cat([x, y])
    scores, own = cosines(z, z, low) / TEMPERATURE, torch.arange(len(x), device=x.device).repeat(2)
    negative = scores.masked_fill(own[:, None] == own, -torch.inf).logsumexp(1)
    positive = torch.cat([scores.diagonal(len(x)), scores.diagonal(-len(x))])
    return (negative - positive).mean()


def siglip(x: Tensor, y: Tensor, low: bool = False) -> Tensor:
    """Every pair by itself."""
    scores = SCALE * cosines(x, y, low) + BIAS
    sign = 2 * torch.eye(len(x), dtype=scores.dtype, device=x.device) - 1
    return -logsigmoid(sign * scores).sum() / len(x)


def self_diagonal(z: Tensor, low: bool = False) -> Tensor:
    """Row i finds itself."""
    return infonce(z, z, low)


def supcon(z: Tensor, labels: Tensor, low: bool = False) -> Tensor:
    """Each row finds those of its label."""
    scores = (cosines(z, z, low) / TEMPERATURE).fill_diagonal_(-torch.inf)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    log_p = scores.log_softmax(1).masked_fill(~positive, 0.0)
    return -(log_p.sum(1) / positive.sum(1)).mean()


def cosine_embedding(z: Tensor, labels: Tensor, low: bool = False) -> Tensor:
    """Similar rows become parallel, others are pushed apart."""
    scores = cosines(z, z, low)
    terms = torch.where(labels[:, None] == labels, 1 - scores, (scores - MARGIN).clamp(min=0))
    return terms.fill_diagonal_(0.0).sum() / (len(z) * (len(z) - 1))


DENSE: dict[str, Loss] = {
    "infonce": infonce,
    "infonce, symmetric": infonce_symmetric,
    "ntxent": ntxent,
    "dcl": dcl,
    "siglip": siglip,
    "self_diagonal": self_diagonal,
    "supcon": supcon,
    "cosine_embedding": cosine_embedding,
}
SETTINGS = {
    **{name: {"temperature": TEMPERATURE} for name in DENSE},
    "siglip": {"scale": SCALE, "bias": BIAS},
    "cosine_embedding": {"margin": MARGIN},
}
"""Of the losses of this package, to compute the same."""
