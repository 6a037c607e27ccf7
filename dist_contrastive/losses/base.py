"""What all losses over the global batch share: options, the engine, the mean over ranks."""

import inspect
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from dist_contrastive import collectives, pairwise
from dist_contrastive.collectives import Embeddings, GradReduction, Group, Input, Sizes
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.scale import TEMPERATURES, Scale, check_start, refuse_parameters
from dist_contrastive.pairwise import Impl, KeysFrom, Pairs, Reduction
from dist_contrastive.settings import ComponentSettings, settings_from, signature_of

Takes = Literal["views", "features", "labels", "points"]


class PairLoss(nn.Module):
    """Base of the losses that compare every row with every other row of the global batch.

    The gradient contract: the value is the mean over the rows of all ranks, the same number on
    every rank; backward leaves ``W * dL/d(rows of this rank)``, so that the mean over ranks taken
    by DDP and ZeRO is the gradient of one process that holds the whole batch.

    A loss is made of its `Config`, or of the settings in it: ``InfoNCE(InfoNCE.Config(...))`` is
    ``InfoNCE(temperature=0.07, impl="dense")``. By position they follow the order in which the
    classes declare them, the loss's own first.

    Args:
        args, settings: those of the nested `Config`.
        group: process group; None means all ranks.
        grad_reduction: ``mean`` when gradients are averaged over ranks later, ``sum`` when added.

    Raises:
        ConfigError: a setting that is unknown or out of range; by ``forward`` inputs that do not
            fit together, on all ranks, in the same words, before any rows are exchanged.
        NonFiniteError: inputs that are not finite; likewise.

    Collectives: every loss makes one all-gather of a few numbers (what ranks hold) and one
    all-reduce of two (the mean); the losses say what comes on top.
    """

    takes: ClassVar[Takes]
    """Inputs of ``forward``, set by every loss: two ``views`` of the same samples, one set of
    ``features``, features and their ``labels``, or ``points`` of two kinds. Where it also has a
    keyword ``sizes``, callers that have checked the inputs give it the rows of every rank."""

    has_kernels: ClassVar[bool] = True
    """Whether ``impl="triton"`` is known to it: whether all its pairs go through `reduce`."""

    class Config(ComponentSettings):
        """Settings that every loss has."""

        name: str = ""
        """A loss of this package, or the import path of another one."""
        keys_from: KeysFrom = "gather"
        """gather compares with the rows of all ranks, gathered at once; ring with the same, sent
        from rank to rank (memory does not grow with the number of ranks); local with those of this
        rank alone (the mean still spans all ranks; not in a config)."""
        impl: Impl = "auto"
        """dense keeps the score matrix (of a ring, that of one rank's keys), chunked computes it in
        tiles (memory linear in the batch), triton likewise by kernels, on a GPU. auto takes these
        where they run, and elsewhere chooses by size."""
        chunk_size: PositiveInt | None = None
        """Rows and keys of a tile of chunked, rows of one of triton in backward; null chooses."""

        def check_run(self) -> None:
            """Refuse what the training loop of this package cannot use. Raises: ValueError."""
            if self.keys_from == "local":
                raise ValueError("keys_from=local compares no ranks; set it to gather or ring")

    settings: Config

    def __init__(
        self,
        *args: Any,
        group: Group = None,
        grad_reduction: GradReduction = "mean",
        **settings: Any,
    ) -> None:
        super().__init__()
        if grad_reduction not in get_args(GradReduction):
            raise ConfigError(f"grad_reduction={grad_reduction!r} is not known; use mean or sum")
        refuse_parameters(type(self).__name__, (*args, *settings.values()))
        self.settings = settings_from(type(self).Config, args, settings)
        self.keys_from: KeysFrom = self.settings.keys_from
        self.impl: Impl = self.settings.impl
        if self.impl == "triton" and not self.has_kernels:
            raise ConfigError(
                f"impl='triton': {type(self).__name__} has no kernels; use auto, dense or chunked"
            )
        self.chunk_size = self.settings.chunk_size
        self.group = group
        self.grad_reduction: GradReduction = grad_reduction
        self.metrics: dict[str, Tensor] = {}
        """Numbers about the last batch that a log should show; the same on all ranks."""

    def __init_subclass__(cls) -> None:
        """The signature that help and editors show."""
        super().__init_subclass__()
        own = inspect.signature(cls.__init__).parameters.values()
        if any(p.kind is p.VAR_POSITIONAL for p in own):
            shared = inspect.signature(PairLoss.__init__).parameters.values()
            keywords = {p.name: p for p in (*own, *shared) if p.kind is p.KEYWORD_ONLY}
            cls.__signature__ = signature_of(cls.Config, keywords)  # type: ignore[attr-defined]

    def check_rows(self, sizes: Sizes | None, **given: Tensor | Input) -> Sizes:
        """Rows of every rank, of embeddings [n, D] whose rows i belong to the same sample.

        Args:
            sizes: those of embeddings that have been checked already; None checks them here.

        Raises:
            ConfigError, NonFiniteError: on all ranks, naming those where something is wrong.

        Collectives: one all-gather of a few numbers, or none if sizes are known.
        """
        if sizes is None:
            kinds = {
                n: x if isinstance(x, Input) else Embeddings(x, "n D") for n, x in given.items()
            }
            sizes = collectives.check_inputs(kinds, self.group)["n"]
        self.check_batch(sizes)
        return sizes

    def check_batch(self, sizes: Sizes) -> None:
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
        sizes: Sizes,
        tags: Tensor | None = None,
        max_delta: float = 0.0,
        **more: Any,
    ) -> Pairs:
        """This rank's rows against the keys that `keys_from` names; see `pairwise.Pairs`."""
        if self.keys_from == "local":
            sizes = (len(keys),)
        return Pairs(rows, keys, sizes, self.keys_from, tags, max_delta, self.group, **more)

    def reduce(
        self, reduction: Reduction, pairs: Pairs, partners: int | None = None
    ) -> tuple[tuple[Tensor, ...], ...]:
        """`pairwise.reduce` in the way that the options ask for."""
        return pairwise.reduce(reduction, pairs, self.impl, self.chunk_size, partners)

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


class TemperatureLoss(PairLoss):
    """Base of the losses that divide similarities by a temperature."""

    class Config(PairLoss.Config):
        """Temperature, constant or learnable."""

        temperature: PositiveFloat
        """Divides the similarities."""
        learnable: bool = False
        """Whether the temperature is a parameter, log(1 / temperature); see clamp_scales."""

        def check_run(self) -> None:
            """A learnable temperature must start where the clamp leaves it."""
            super().check_run()
            if self.learnable:
                check_start("temperature", self.temperature, *TEMPERATURES)

    settings: Config

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.scale = Scale(self.settings.temperature, self.settings.learnable)


def in_full_precision(*inputs: Tensor) -> list[Tensor]:
    """The inputs in one dtype: fp64 if any is, otherwise fp32."""
    dtype = torch.float32
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in inputs]


def normalised(*inputs: Tensor) -> list[Tensor]:
    """Rows of unit length, `in_full_precision`."""
    return [pairwise.distances.unit_rows(x) for x in in_full_precision(*inputs)]


def not_below_zero(terms: Tensor) -> Tensor:
    """Terms that only rounding brings below 0, at 0 there; gradients are left as they are."""
    return terms - terms.detach().clamp(max=0)
