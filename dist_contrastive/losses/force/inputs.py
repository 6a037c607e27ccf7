"""Inputs of the contrastive force: points of three kinds, checked on all ranks together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Embeddings, Group, Input, Integers, Weights
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.force.points import (
    FIXED,
    GENERATED,
    POSITIVE,
    Counts,
    sorting,
)

KINDS = {"negative": GENERATED, "fixed": FIXED, "positive": POSITIVE}
"""The kinds of points by the name of the argument, in the order of rows."""


@dataclass(frozen=True)
class PointKind:
    """Points of one kind, with their labels and weights."""

    points: Tensor  # [..., n, D]
    labels: Tensor | None = None  # [n]
    weights: Tensor | None = None  # [n] or [..., n]


Kinds = dict[str, PointKind]
"""By names of `KINDS`, in their order."""

_ENOUGH_ROWS = 256  # for a median


@dataclass(frozen=True)
class ForceInputs:
    """This rank's points, ready to be compared and sent."""

    rows: Tensor  # [R, G, D] in at least fp32, sorted by kind and label
    tags: Tensor  # [R, 2] int64: kind, and label from 0 (all 0 where there are none)
    weights: Tensor | None  # [R, G]
    counts: tuple[Counts, ...]  # of every rank whose points are compared with these
    num_labels: int  # ids of labels, of all those ranks
    label_counts: Tensor | None  # fp64 [L], how many of their points have each id; None: some
    num_generated: int  # the first rows of this rank
    with_gradient: frozenset[int]  # kinds whose points need gradients

    @property
    def sizes(self) -> tuple[int, ...]:
        """R of every rank whose points are compared with these."""
        return tuple(map(sum, self.counts))

    @property
    def labels_of_generated(self) -> Tensor:
        """[m] int64."""
        return self.tags[: self.num_generated, 1]


def force_inputs(
    group: Group,
    are_compared: bool,
    kinds: Kinds,
    counts: Sequence[Counts] | None = None,
    with_waits: bool = True,
) -> ForceInputs:
    """Points with labels and weights as rows.

    Args:
        kinds: by names of `KINDS`; `fixed` may be left out.
        are_compared: whether the points of different ranks belong to the same groups.
        counts: of every rank, of points that have been checked already; None checks them here.
        with_waits: whether the host may wait to know how many labels there are; if not, there are
            as many ids as points.

    Raises:
        ConfigError, NonFiniteError: on all ranks, naming those where something is wrong.

    Collectives: one all-gather of a few numbers; with labels one of these.
    """
    kinds = {name: kinds[name] for name in KINDS if name in kinds}
    kinds = {n: replace(x, labels=collectives.as_labels(x.labels)) for n, x in kinds.items()}
    counts = _checked_counts(group, kinds, are_compared) if counts is None else tuple(counts)
    rows = _rows(kinds)
    if not are_compared:
        counts = (_own_counts(kinds),)
    tags, all_labels = _tags(kinds, tuple(map(sum, counts)) if are_compared else None, group)
    num_labels, label_counts = 1, None
    if all_labels is not None:
        num_labels, label_counts = _number_labels(tags, all_labels, with_waits)
    weights = _weights(kinds, rows)
    if num_labels > 1:
        order = sorting(tags)
        rows, tags = rows.index_select(0, order), tags[order]
        weights = None if weights is None else weights[order]
    return ForceInputs(
        rows,
        tags,
        weights,
        counts,
        num_labels,
        label_counts,
        kinds["negative"].points.shape[-2],
        frozenset(KINDS[name] for name, kind in kinds.items() if kind.points.requires_grad),
    )


def center(rows: Tensor, sizes: tuple[int, ...], are_compared: bool, group: Group) -> Tensor:
    """Median of the rows of all ranks [R, G, D] in each dimension: [G, D].

    An estimate from some hundred rows, of every rank in proportion to its `sizes`; outliers do not
    move it.

    Collectives: one all-gather of these rows, if ranks are compared.
    """
    step = max(1, sum(sizes) // _ENOUGH_ROWS)
    some = rows[::step]
    if are_compared:
        some = collectives.gather_rows(some, tuple(-(-size // step) for size in sizes), group)
    return some.median(0).values


def _own_counts(kinds: Kinds) -> Counts:
    """Numbers of points of each kind on this rank."""
    generated, fixed, positive = (kinds[x].points.shape[-2] if x in kinds else 0 for x in KINDS)
    return generated, fixed, positive


def _checked_counts(group: Group, kinds: Kinds, are_compared: bool) -> tuple[Counts, ...]:
    """Numbers of points of each kind on every rank."""
    inputs: dict[str, Input] = {}
    rows = dict(zip(KINDS, ("m", "k", "n"), strict=True))
    for name, row in rows.items():
        points, labels, weights = (None,) * 3
        if kind := kinds.get(name):
            points, labels, weights = kind.points, kind.labels, kind.weights
        dtype = torch.float64
        if isinstance(points, Tensor):
            dtype = collectives.accumulation_dtype(points.dtype)
        inputs[name] = Embeddings(points, f"... {row} D", optional=name == "fixed")
        inputs[f"{name}_labels"] = Integers(labels, row, optional=True)
        inputs[f"{name}_weights"] = Weights(weights, f"{row} | ... {row}", True, dtype=dtype)
    sizes = collectives.check_inputs(inputs, group, are_compared)
    is_labelled = {name: kind.labels is not None for name, kind in kinds.items()}
    if len(set(is_labelled.values())) > 1:
        missing = " and ".join(f"{name}_labels" for name, has in is_labelled.items() if not has)
        raise ConfigError(f"{missing} are missing; give labels to points of every kind, or to none")
    nothing = (0,) * len(sizes["m"])
    counts = tuple(zip(*(sizes.get(row, nothing) for row in rows.values()), strict=True))
    _check_some_of_each(counts, are_compared)
    return counts


def _check_some_of_each(counts: tuple[Counts, ...], are_compared: bool) -> None:
    holders = {f"rank {i} holds": (m, n) for i, (m, _, n) in enumerate(counts)}
    if are_compared:
        m, _, n = map(sum, zip(*counts, strict=True))
        holders = {"the ranks together hold": (m, n)}
    for who, (m, n) in holders.items():
        if m < 1 or n < 1:
            raise ConfigError(
                f"{who} {m} negative (generated) and {n} positive (data) points; the force needs "
                f"one of each"
            )


def _rows(kinds: Kinds) -> Tensor:
    """Points of all kinds as one [R, G, D] in at least fp32."""
    points = [kind.points for kind in kinds.values()]
    dtype = torch.float32
    for x in points:
        dtype = torch.promote_types(dtype, x.dtype)
    num_groups, dim = math.prod(points[0].shape[:-2]), points[0].shape[-1]
    grouped = (x.to(dtype).reshape(num_groups, -1, dim) for x in points)
    return torch.cat([x.transpose(0, 1) for x in grouped])


def _tags(
    kinds: Kinds, sizes: tuple[int, ...] | None, group: Group
) -> tuple[Tensor, Tensor | None]:
    """Kind and label of all rows [R, 2] int64, and the labels of all ranks' rows; of none without
    labels. Sizes are None where ranks are not compared."""
    columns = []
    for name, kind in kinds.items():
        number = torch.full(kind.points.shape[-2:-1], KINDS[name], device=kind.points.device)
        label = torch.zeros_like(number) if kind.labels is None else kind.labels.to(number)
        columns.append(torch.stack([number, label]))
    tags = torch.cat(columns, dim=1).T.contiguous()
    if kinds["negative"].labels is None:
        return tags, None
    all_labels = tags[:, 1].contiguous()
    if sizes is not None:
        all_labels = collectives.gather_rows(all_labels, sizes, group)
    return tags, all_labels


def _number_labels(tags: Tensor, all_labels: Tensor, with_waits: bool) -> tuple[int, Tensor | None]:
    """Number the labels in tags from 0, on all ranks alike, in place. Without waits the number is
    that of the first point with the label, of all points in the order of labels.

    Returns:
        How many numbers there are; and how many points have each, fp64, if some have none.
    """
    known = all_labels.unique() if with_waits else all_labels.sort().values
    tags[:, 1] = torch.searchsorted(known, tags[:, 1].contiguous())
    if with_waits:
        return len(known), None
    counts = torch.zeros_like(known, dtype=torch.float64)
    ones = torch.ones_like(counts)  # whose sums are exact in any order
    return len(known), counts.scatter_add_(0, torch.searchsorted(known, known), ones)


def _weights(kinds: Kinds, rows: Tensor) -> Tensor | None:
    """Weights of all rows [R, G]; None where no kind has any."""
    if all(kind.weights is None for kind in kinds.values()):
        return None
    parts = []
    for kind in kinds.values():
        whole = rows.new_ones(())
        if kind.weights is not None:
            whole = kind.weights.detach().to(rows.dtype)
        parts.append(whole.expand(kind.points.shape[:-1]).reshape(rows.shape[1], -1).T)
    return torch.cat(parts)
