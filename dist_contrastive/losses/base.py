"""What all losses over the global batch share: where keys come from, and the mean over ranks."""

import math
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.collectives import GradReduction, Group
from dist_contrastive.errors import ConfigError
from dist_contrastive.pairwise import IMPLS, Impl

KeysFrom = Literal["gather", "local"]
KEYS_FROM = ("gather", "local")


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
        keys_from: ``gather`` compares with the rows of all ranks, ``local`` with this rank's only
            (the mean still spans all ranks).
        impl: ``dense`` keeps the score matrix, ``chunked`` computes it tile by tile (memory linear
            in the batch), ``auto`` chooses by size.
        chunk_size: rows and keys of a tile of ``chunked``; None chooses.
        group: process group; None means all ranks.
        grad_reduction: ``mean`` when gradients are averaged over ranks later, ``sum`` when added.
    """

    def __init__(
        self,
        keys_from: KeysFrom = "gather",
        impl: Impl = "auto",
        chunk_size: int | None = None,
        group: Group = None,
        grad_reduction: GradReduction = "mean",
    ) -> None:
        super().__init__()
        _one_of("keys_from", keys_from, KEYS_FROM)
        _one_of("impl", impl, IMPLS)
        _one_of("grad_reduction", grad_reduction, ("mean", "sum"))
        if chunk_size is not None and chunk_size < 1:
            raise ConfigError(f"chunk_size={chunk_size} must be at least 1, or None to choose")
        self.keys_from = keys_from
        self.impl = impl
        self.chunk_size = chunk_size
        self.group = group
        self.grad_reduction = grad_reduction

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """The keys [B, ...] that this rank's rows [b, ...] are compared with, and its offset."""
        if self.keys_from == "local":
            return rows, 0
        return collectives.all_gather_rows(rows, self.group)

    def mean(self, local_sum: Tensor, count: int) -> Tensor:
        """Mean over all ranks' elements, with the backward of the gradient contract."""
        return collectives.global_mean(local_sum, count, self.group, self.grad_reduction)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known; use one of {', '.join(known)}")


def check_rows(**inputs: Tensor) -> None:
    """Embeddings must be floating [b, D] and of one shape; the names appear in the error."""
    shapes = {name: tuple(x.shape) for name, x in inputs.items()}
    for name, x in inputs.items():
        if x.dim() != 2 or not x.is_floating_point():
            raise ConfigError(
                f"{name} is {x.dtype} of shape {shapes[name]}; give floating embeddings [rows, dim]"
            )
    if len(set(shapes.values())) > 1:
        raise ConfigError(f"shapes {shapes} differ; row i of each must belong to the same sample")


def check_batch(num_rows: int) -> None:
    """A row needs another one to be compared with."""
    if num_rows < 2:
        raise ConfigError(
            f"the global batch has {num_rows} row(s); a loss over pairs needs at least 2"
        )


def normalised(x: Tensor) -> Tensor:
    """Rows of unit length in fp32 (fp64 stays), so that scores are kept in at least fp32."""
    return nn.functional.normalize(x.to(collectives.accumulation_dtype(x.dtype)), dim=-1)


class Scale(nn.Module):
    """1 / temperature, constant or learnable as its logarithm (CLIP's parametrisation)."""

    def __init__(self, temperature: float, learnable: bool) -> None:
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ConfigError(f"temperature={temperature} must be positive, for instance 0.1")
        log_scale = -math.log(temperature)
        self.log_scale = nn.Parameter(torch.tensor(log_scale)) if learnable else log_scale

    def forward(self) -> Tensor:
        """Scalar, differentiable; a constant keeps its fp64 digits whatever the module's dtype."""
        if isinstance(self.log_scale, Tensor):
            return self.log_scale.exp()
        return torch.tensor(self.log_scale, dtype=torch.float64).exp()
