"""What the contrastive force is measured against: dense plain torch, ranks that all compute the
force of the whole global batch, KeOps.

Losses take negative [..., m, D] (generated) and positive [..., n, D] (data) and return a scalar.
Forces take them the other way round, as the seed's function does, and return [..., m, D].
"""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_contrastive.losses.force import PRESETS

Loss = Callable[[Tensor, Tensor], Tensor]

HAS_KEOPS = find_spec("pykeops") is not None


def clouds(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Generated points, as a leaf tensor, and data, whose clouds differ in place and width; in each
    dtype the same ones, rounded to fp32."""
    random = torch.Generator().manual_seed(seed)
    negative, positive = (torch.randn(*shape, generator=random) for _ in range(2))
    return [(0.8 * negative + 0.1).to(dtype).requires_grad_(), positive.to(dtype)]


def seed_force(
    positive: Tensor, negative: Tensor, temperature: float, *, masked: bool = False
) -> Tensor:
    """The seed's function, its triple loop as two matrix products.

    Args:
        masked: leave each point out of its own softmaxes, as preset ``drift`` does.
    """
    m = negative.shape[-2]
    points = torch.cat([negative, positive], dim=-2)
    d = _distances(points, points)
    scores = -d / temperature
    if masked:
        _diagonal(scores).fill_(-torch.inf)
    affinity = scores.softmax(-1).pow(0.5) * scores.softmax(-2).pow(0.5)
    force = _pull_and_push(affinity[..., :m, :], negative, positive)
    return force / ((d * affinity) ** 2).mean((-2, -1), keepdim=True).sqrt()


def seed_loss(
    negative: Tensor, positive: Tensor, *, masked: bool = False, with_graph: bool = True
) -> Tensor:
    """The seed's loss: one call of its force for each temperature, which share nothing.

    Args:
        masked: preset ``drift``: its force, and no gradient through the scale.
        with_graph: whether autograd records the forces, as it does in the seed, which detaches
            only their sum.
    """
    points = torch.cat([negative, positive], dim=-2)
    scale = _distances(points, points).mean((-2, -1), keepdim=True)
    if masked:
        scale = scale.detach()
    n, p = negative / scale, positive / scale
    with torch.set_grad_enabled(with_graph):
        force = sum(seed_force(p, n, t, masked=masked) for t in PRESETS["drift"].temperatures)
        target = n + force
    return ((n - target.detach()) ** 2).mean()


def paper_force(positive: Tensor, negative: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Algorithm 2 of arXiv 2602.04770, divided by its root mean square at each temperature, and
    summed; the temperatures share the distances, as they do in the official code."""
    m = negative.shape[-2]
    d = _distances(negative, torch.cat([negative, positive], dim=-2))
    total = torch.zeros_like(negative)
    for temperature in temperatures:
        scores = -d / temperature
        _diagonal(scores[..., :m]).fill_(-torch.inf)
        affinity = (scores.softmax(-1) * scores.softmax(-2)).sqrt()
        force = _pull_and_push(affinity, negative, positive)
        total += force / force.square().mean().sqrt()
    return total


def paper_loss(negative: Tensor, positive: Tensor) -> Tensor:
    """Preset ``paper``, in coordinates of order 1."""
    with torch.no_grad():
        scale = _distances(negative, torch.cat([negative, positive], dim=-2)).mean()
        force = paper_force(positive / scale, negative / scale, PRESETS["paper"].temperatures)
    n = negative * math.sqrt(negative.shape[-1]) / scale
    return (n - (n + force).detach()).square().mean()


def gathered_loss(negative: Tensor, positive: Tensor) -> Tensor:
    """Preset ``drift`` on ranks with equally many points: each gathers all and computes the whole
    force, of which it takes its own rows. The mean over this rank's rows."""
    with torch.no_grad():
        n, p = _gathered(negative), _gathered(positive)
        points = torch.cat([n, p])
        scale = _distances(points, points).mean()
        n, p = n / scale, p / scale
        force = torch.zeros_like(n)
        for temperature in PRESETS["drift"].temperatures:
            force += seed_force(p, n, temperature, masked=True)
        mine = force.chunk(dist.get_world_size())[dist.get_rank()]
    n = negative / scale
    return ((n - (n + mine).detach()) ** 2).mean()


def keops_loss(negative: Tensor, positive: Tensor) -> Tensor:
    """Preset ``drift``, [m, D] and [n, D], with LazyTensors: matrices that are never held."""
    with torch.no_grad():
        points = torch.cat([negative, positive])
        scale = _lazy_distances(points, points).sum(1).sum() / len(points) ** 2
        n, p = negative / scale, positive / scale
        force = sum(keops_force(p, n, t) for t in PRESETS["drift"].temperatures)
    n = negative / scale
    return ((n - (n + force).detach()) ** 2).mean()


def keops_force(positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """`seed_force`, masked: log-sum-exps, normaliser, then a weighted sum of each kind of key."""
    from pykeops.torch import LazyTensor

    points = torch.cat([negative, positive])
    numbers = torch.arange(len(points)).to(points)[:, None]
    half = torch.zeros_like(numbers)

    def pairs(rows: slice, keys: slice) -> tuple[Any, Any]:
        """d, and -d/t less half of the log-sum-exps that are known."""
        d = _lazy_distances(points[rows], points[keys])
        apart = (LazyTensor(numbers[rows, None]) - LazyTensor(numbers[None, keys])) ** 2
        halves = LazyTensor(half[rows, None]) + LazyTensor(half[None, keys])
        return d, (apart - 0.5).ifelse(-d / temperature - halves, -1e30)

    m, everything = len(negative), slice(None)
    half = pairs(everything, everything)[1].logsumexp(dim=1) / 2
    d, log_affinity = pairs(everything, everything)
    square = ((d * log_affinity.exp()) ** 2).sum(1).sum() / len(points) ** 2
    columns = torch.cat([points, torch.ones_like(numbers)], dim=1)  # the last sums the weights
    negatives, positives = slice(m), slice(m, None)
    push, pull = (
        pairs(negatives, keys)[1].exp() @ columns[keys] for keys in (negatives, positives)
    )
    return (push[:, -1:] * pull[:, :-1] - pull[:, -1:] * push[:, :-1]) / square.sqrt()


def _lazy_distances(rows: Tensor, keys: Tensor) -> Any:
    from pykeops.torch import LazyTensor

    return (LazyTensor(rows[:, None]) - LazyTensor(keys[None])).norm2()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """As the seed computes them; in fp64, which is the reference, from differences."""
    exact = x.dtype == torch.float64
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist_if_necessary"
    return torch.cdist(x, y, p=2, compute_mode=mode)


def _diagonal(x: Tensor) -> Tensor:
    """Of matrices [..., k, l], as a view."""
    return x.diagonal(dim1=-2, dim2=-1)


def _pull_and_push(affinity: Tensor, negative: Tensor, positive: Tensor) -> Tensor:
    """``sum_i sum_{k != j} A[j, i] A[j, k] (p_i - n_k)`` from A [..., m, m + n]."""
    m = negative.shape[-2]
    push, pull = affinity[..., :m].clone(), affinity[..., m:]
    _diagonal(push).zero_()
    attraction = push.sum(-1, keepdim=True) * (pull @ positive)
    return attraction - pull.sum(-1, keepdim=True) * (push @ negative)


def _gathered(x: Tensor) -> Tensor:
    """Rows of all ranks, which have equally many, without gradient."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    return torch.cat(parts)
