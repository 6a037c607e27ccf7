"""What all losses over the global batch share: options, the engine, the mean over ranks."""

import math
from typing import ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn

from dist_contrastive import collectives, pairwise
from dist_contrastive.collectives import GradReduction, Group
from dist_contrastive.errors import ConfigError
from dist_contrastive.pairwise import IMPLS, KEYS_FROM, Impl, KeysFrom, Pairs, Reduction

Takes = Literal["views", "features", "labels", "points"]

# What a learnable scale is kept within: CLIP's upper limit (arXiv 2103.00020, section 2.5), and a
# temperature of 1.
SMALLEST_SCALE, LARGEST_SCALE = 1.0, 100.0


class PairOptions(TypedDict, total=False):
    """Keyword arguments that every loss accepts."""

    keys_from: KeysFrom
    impl: Impl
    chunk_size: int | None
    group: Group
    grad_reduction: GradReduction


class PairLoss(nn.Module):
    """Base of the losses that compare every row with every other row of the global batch.

    The gradient contract: the value is the mean over the rows of all ranks, the same number on
    every rank; backward leaves ``W * dL/d(rows of this rank)``, so that the mean over ranks taken
    by DDP and ZeRO is the gradient of one process that holds the whole batch.

    Args:
        keys_from: ``gather`` compares with the rows of all ranks, all gathered at once; ``ring``
            with the same, handed from rank to rank (memory does not grow with the number of
            ranks); ``local`` with this rank's only, of which there must be two (the mean still
            spans all ranks).
        impl: ``dense`` keeps the score matrix (of a ring, that of one rank's keys), ``chunked``
            computes it tile by tile (memory linear in the batch), ``auto`` chooses by size.
        chunk_size: rows and keys of a tile of ``chunked``; None chooses.
        group: process group; None means all ranks.
        grad_reduction: ``mean`` when gradients are averaged over ranks later, ``sum`` when added.

    Raises:
        ConfigError, NonFiniteError: inputs that do not fit together, or are not finite; by
            ``forward``, on all ranks, in the same words, before any rows are exchanged.

    Collectives: every loss makes one all-gather of a few numbers (what ranks hold) and one
    all-reduce of two (the mean); the losses say what comes on top.
    """

    takes: ClassVar[Takes]
    """What ``forward`` is given, set by every loss: two ``views`` of the same samples, one set of
    ``features``, features and their ``labels``, or ``points`` of two kinds."""

    def __init__(
        self,
        keys_from: KeysFrom = "gather",
        impl: Impl = "auto",
        chunk_size: int | None = None,
        group: Group = None,
        grad_reduction: GradReduction = "mean",
    ) -> None:
        super().__init__()
        one_of("keys_from", keys_from, KEYS_FROM)
        one_of("impl", impl, IMPLS)
        one_of("grad_reduction", grad_reduction, ("mean", "sum"))
        if chunk_size is not None and chunk_size < 1:
            raise ConfigError(f"chunk_size={chunk_size} must be at least 1, or None to choose")
        self.keys_from: KeysFrom = keys_from
        self.impl: Impl = impl
        self.chunk_size = chunk_size
        self.group = group
        self.grad_reduction: GradReduction = grad_reduction
        self.metrics: dict[str, Tensor] = {}
        """Numbers about the last batch that a log should show; the same on all ranks."""

    def check_batch(self, sizes: tuple[int, ...]) -> None:
        """Refuse too few rows to be compared with each other; sizes are those of all ranks."""
        who, num_rows = "the global batch", sum(sizes)
        if self.keys_from == "local":
            num_rows = min(sizes)
            who = f"with keys_from='local' rank {sizes.index(num_rows)}"
        if num_rows < 2:
            raise ConfigError(f"{who} has {num_rows} row(s); a loss over pairs needs at least 2")

    def pairs(
        self,
        rows: Tensor,
        keys: Tensor,
        sizes: tuple[int, ...],
        tags: Tensor | None = None,
        max_delta: float = 0.0,
    ) -> Pairs:
        """This rank's rows against the keys that `keys_from` names; see `pairwise.Pairs`."""
        if self.keys_from == "local":
            sizes = (len(keys),)
        return Pairs(rows, keys, sizes, self.keys_from, tags, max_delta, self.group)

    def reduce(self, reduction: Reduction, pairs: Pairs) -> tuple[tuple[Tensor, ...], ...]:
        """`pairwise.reduce` in the way that the options ask for."""
        return pairwise.reduce(reduction, pairs, self.impl, self.chunk_size)

    def over_ranks(self, x: Tensor) -> Tensor:
        """Sum of a statistic over the ranks that are compared with each other, differentiable."""
        return x if self.keys_from == "local" else collectives.sum_over_ranks(x, self.group)

    def mean(self, local_sum: Tensor, count: int | Tensor) -> Tensor:
        """Mean over all ranks' elements, with the backward of the gradient contract."""
        return collectives.global_mean(local_sum, count, self.group, self.grad_reduction)

    def report_counts(self, **local_counts: Tensor) -> None:
        """Set `metrics` to these counts, summed over all ranks. Collectives: one all-reduce."""
        counts = torch.stack([x.detach().double() for x in local_counts.values()])
        totals = collectives.all_reduce_sum(counts, self.group)
        self.metrics = dict(zip(local_counts, totals.unbind(), strict=True))


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is not among the known ones."""
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known; use one of {', '.join(known)}")


def at_least(limit: float, **settings: float) -> None:
    """Refuse a setting below the limit, infinite or NaN."""
    for name, value in settings.items():
        if not limit <= value < math.inf:
            raise ConfigError(f"{name}={value} must be a finite number of at least {limit:g}")


def positive(**settings: float) -> None:
    """Refuse a setting that is not above 0, infinite or NaN."""
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}={value} must be positive and finite, for instance 0.1")


def in_full_precision(*inputs: Tensor) -> list[Tensor]:
    """The inputs in one dtype: fp64 if any is, otherwise fp32."""
    dtype = torch.float32
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in inputs]


def normalised(*inputs: Tensor) -> list[Tensor]:
    """Rows of unit length, `in_full_precision`."""
    return [nn.functional.normalize(x, dim=-1) for x in in_full_precision(*inputs)]


class Scale(nn.Module):
    """1 / temperature, constant or learnable as its logarithm (CLIP's parametrisation)."""

    def __init__(self, temperature: float, learnable: bool) -> None:
        super().__init__()
        positive(temperature=temperature)
        log_scale = -math.log(temperature)
        # A vector of one number: DeepSpeed cannot share a parameter without dimensions.
        self.log_scale = nn.Parameter(torch.tensor([log_scale])) if learnable else log_scale

    def forward(self) -> Tensor:
        """Scalar, differentiable; a constant keeps its fp64 digits whatever the module's dtype."""
        if isinstance(self.log_scale, Tensor):
            dtype = collectives.accumulation_dtype(self.log_scale.dtype)
            return self.log_scale.to(dtype).exp().squeeze()
        return torch.tensor(self.log_scale, dtype=torch.float64).exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring a learnable scale back to 1 ... 100, in place; a constant one is left alone.

        To be called after the optimiser's step, as CLIP does. A clamp in `forward` would not do:
        beyond the limit its gradient is 0, and the scale would never come back.
        """
        if isinstance(self.log_scale, Tensor):
            self.log_scale.clamp_(math.log(SMALLEST_SCALE), math.log(LARGEST_SCALE))


def clamp_scales(module: nn.Module) -> None:
    """`Scale.clamp_` of every scale inside a module. Collectives: none."""
    for part in module.modules():
        if isinstance(part, Scale):
            part.clamp_()
