"""Every objective written out in the most literal way, in one process: what losses must equal."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_contrastive import losses

NAN = math.nan


def naive_infonce(queries, keys, further=(), temperature=0.2, symmetric=False):
    """Further keys one by one: no one's positive, and without queries of their own."""
    q, k = F.normalize(queries), F.normalize(torch.cat([keys, *further]))
    target = torch.arange(len(q))
    loss = F.cross_entropy(q @ k.T / temperature, target)
    if symmetric:
        loss = (loss + F.cross_entropy(k[: len(q)] @ q.T / temperature, target)) / 2
    return loss


def naive_dcl(a, b, temperature=0.2):
    z, size = F.normalize(torch.cat([a, b])), len(a)
    scores, terms = z @ z.T / temperature, []
    for i in range(2 * size):
        positive = (i + size) % (2 * size)
        others = [j for j in range(2 * size) if j not in (i, positive)]
        terms.append(scores[i, others].exp().sum().log() - scores[i, positive])
    return torch.stack(terms).mean()


def naive_self_diagonal(x, temperature=0.2):
    z = F.normalize(x)
    return F.cross_entropy(z @ z.T / temperature, torch.arange(len(z)))


def naive_siglip(a, b, scale=10.0, bias=-10.0):
    a, b = F.normalize(a), F.normalize(b)
    total = a.new_zeros(())
    for i in range(len(a)):
        for j in range(len(b)):
            sign = 1 if i == j else -1
            total = total - F.logsigmoid(sign * (scale * (a[i] @ b[j]) + bias))
    return total / len(a)


def naive_vicreg(a, b, weights=(25, 25, 1), eps=1e-4):
    def variance(x):
        return (1 - (x.var(0, unbiased=True) + eps).sqrt()).relu().mean() / 2

    def covariance(x):
        matrix = torch.cov(x.T)
        return (matrix - matrix.diagonal().diag()).square().sum() / x.shape[1]

    terms = F.mse_loss(a, b), variance(a) + variance(b), covariance(a) + covariance(b)
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


def naive_barlow(a, b, weight=5e-3, eps=1e-5):
    a, b = (F.batch_norm(x, None, None, training=True, eps=eps) for x in (a, b))
    matrix = a.T @ b / len(a)
    diagonal = matrix.diagonal()
    return (diagonal - 1).square().sum() + weight * (matrix - diagonal.diag()).square().sum()


def naive_koleo(x, eps=1e-8):
    """As in DINOv2: pairwise_distance adds eps to each component of the difference."""
    z = F.normalize(x)
    nearest = (z @ z.T).detach().fill_diagonal_(-2).argmax(1)
    return -(F.pairwise_distance(z, z[nearest], eps=eps) + eps).log().mean()


SIGLIP, WEIGHTS = {"scale": 3.0, "bias": -1.0}, (3.0, 5.0, 7.0)
UNLABELLED = {  # class with its settings, formula, number of inputs
    "dcl": (partial(losses.DCL, temperature=0.2), naive_dcl, 2),
    "self diagonal": (partial(losses.SelfDiagonal, temperature=0.2), naive_self_diagonal, 1),
    "siglip": (
        partial(losses.SigLIP, **SIGLIP, learnable=False),
        partial(naive_siglip, **SIGLIP),
        2,
    ),
    "vicreg": (
        partial(losses.VICReg, *WEIGHTS, eps=1e-2),
        partial(naive_vicreg, weights=WEIGHTS, eps=1e-2),
        2,
    ),
    "barlow": (
        partial(losses.BarlowTwins, 0.5, eps=1e-2),
        partial(naive_barlow, weight=0.5, eps=1e-2),
        2,
    ),
    "koleo": (losses.KoLeo, naive_koleo, 1),
}


def mean(terms: list[Tensor], rows: Tensor) -> Tensor:
    """Mean of the terms; 0 with zero gradient where there are none."""
    return torch.stack(terms).mean() if terms else 0 * rows.sum()


def flat(features: Tensor) -> Tensor:
    """[b, D] or [b, V, D] -> a row for every view of a sample."""
    return features.reshape(-1, features.shape[-1])


def similar(features: Tensor, labels: Tensor | None, max_delta: float | None) -> Tensor:
    """[rows, rows]: views of one sample, or samples whose labels are there and agree."""
    num_views = 1 if features.dim() == 2 else features.shape[1]
    num_rows = len(flat(features))
    table = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    for i in range(num_rows):
        for j in range(num_rows):
            s, t = i // num_views, j // num_views
            table[i, j] = s == t
            if labels is not None and max_delta is not None:
                table[i, j] |= abs(labels[s] - labels[t]) <= max_delta  # never with NaN
            elif labels is not None and labels[s] != -1:
                table[i, j] |= labels[s] == labels[t]
    return table


def around(i: int, same: Tensor) -> tuple[list[int], list[int]]:
    """Rows that should be near row i, and rows that should not."""
    others = [j for j in range(len(same)) if j != i]
    return [j for j in others if same[i, j]], [j for j in others if not same[i, j]]


def naive_supcon(features, labels=None, max_delta=None, temperature=0.2):
    z, same = F.normalize(flat(features)), similar(features, labels, max_delta)
    scores, terms = z @ z.T / temperature, []
    for i in range(len(z)):
        positives, negatives = around(i, same)
        if positives:
            log_sum = scores[i, positives + negatives].exp().sum().log()
            terms.append((log_sum - scores[i, positives]).mean())
    return mean(terms, z)


def distance_between(x: Tensor, y: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return 1 - F.cosine_similarity(x, y, dim=0)
    square = (x - y).square().sum()
    if kind == "squared_euclidean":
        return square
    return square.sqrt() if square > 0 else square  # the gradient of d = 0 is 0


def naive_triplet(features, labels=None, max_delta=None, *, distance, mining, margin=0.2):
    x, same = flat(features), similar(features, labels, max_delta)
    terms = []
    for i in range(len(x)):
        d = [distance_between(x[i], y, distance) for y in x]
        positives, negatives = around(i, same)
        if not positives or not negatives:
            continue
        if mining == "all":
            pairs = [(d[p], d[n]) for p in positives for n in negatives]
        elif mining == "hard":
            pairs = [(max(d[p] for p in positives), min(d[n] for n in negatives))]
        else:
            pairs = []
            for p in positives:
                farther = [d[n] for n in negatives if d[n] > d[p]]
                pairs.append((d[p], min(farther) if farther else max(d[n] for n in negatives)))
        terms += [(near - far + margin).relu() for near, far in pairs]
    return mean(terms, x)


def naive_cosine(features, labels=None, max_delta=None, margin=0.5):
    x, same = flat(features), similar(features, labels, max_delta)
    terms = []
    for i in range(len(x)):
        for j in range(len(x)):
            s = F.cosine_similarity(x[i], x[j], dim=0)
            if i != j:
                terms.append(1 - s if same[i, j] else (s - margin).relu())
    return mean(terms, x)


LABELLED = {  # class with its settings, formula
    "supcon": (partial(losses.SupCon, temperature=0.2), naive_supcon),
    "cosine embedding": (partial(losses.CosineEmbedding, 0.1), partial(naive_cosine, margin=0.1)),
}
for _distance in ("euclidean", "squared_euclidean", "cosine"):
    for _mining in ("all", "hard", "semihard"):
        _options = {"margin": 0.6, "distance": _distance, "mining": _mining}
        LABELLED[f"triplet {_distance} {_mining}"] = (
            partial(losses.Triplet, **_options),
            partial(naive_triplet, **_options),
        )

BATCHES = {  # shape of the features, labels, max_delta
    "classes": ((9, 4), [3, 0, 0, 1, 3, 1, 1, 0, 7], None),  # 7 has one member
    "missing": ((8, 3), [-1, 0, 0, 1, -1, 1, 2, -1], None),
    "views": ((5, 3, 4), [0, 2, 0, -1, -1], None),
    "one view": ((5, 1, 4), [0, 0, 1, 1, 1], None),
    "views without labels": ((4, 2, 6), None, None),
    # 0 is similar to 0.5 and 0.5 to 1, but not 0 to 1; and a delta of exactly 0.5 is similar.
    "continuous": ((8, 4), [0.0, 0.5, 1.0, -2.25, -2.5, NAN, NAN, 9.0], 0.5),
    "continuous views": ((5, 2, 3), [0.0, NAN, 0.25, 3.0, NAN], 0.5),
    "no positive": ((4, 3), [0, 1, -1, -1], None),
}
