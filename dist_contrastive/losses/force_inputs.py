"""What the contrastive force is given: points of two kinds, checked on all ranks together."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Group, RowHeader
from dist_contrastive.collectives.headers import MAX_DIMS
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.inputs import check_points, is_given
from dist_contrastive.pairwise.force import NEGATIVE, POSITIVE, sorting


@dataclass(frozen=True)
class ForceInputs:
    """This rank's points, ready to be compared and sent: `pairwise.force.Points` takes them."""

    rows: Tensor  # [R, G, D] in at least fp32: negatives, then positives, each sorted by label
    tags: Tensor  # [R, 2] int64: kind, and label (0 where there are none)
    sizes: tuple[int, ...]  # R of every rank whose points are compared with these


def force_inputs(
    group: Group,
    are_compared: bool,
    negative: Tensor,
    positive: Tensor,
    negative_labels: Tensor | None = None,
    positive_labels: Tensor | None = None,
) -> ForceInputs:
    """Points [..., m, D] and [..., n, D] with labels [m] and [n], or None, as rows.

    Args:
        are_compared: whether the points of different ranks belong to the same groups.

    Raises:
        ConfigError, NonFiniteError: on all ranks, naming those where something is wrong.

    Collectives: two all-gathers of a few numbers.
    """
    given = {
        "negative": negative,
        "positive": positive,
        "negative_labels": negative_labels,
        "positive_labels": positive_labels,
    }
    table = collectives.exchange_headers(given, group)
    counts = [
        _checked_counts(number, dict(zip(table, headers, strict=True)))
        for number, headers in enumerate(zip(*table.values(), strict=True))
    ]
    is_given("labels", table["negative_labels"], is_needed=False)
    _check_some_of_each(counts, are_compared)
    rows = _rows(negative, positive)
    check_points(group, rows, are_compared)
    tags = _tags(rows, negative.shape[-2], negative_labels, positive_labels)
    order = sorting(tags)
    sizes = tuple(map(sum, counts)) if are_compared else (len(rows),)
    return ForceInputs(rows.index_select(0, order), tags[order], sizes)


def _checked_counts(number: int, given: dict[str, RowHeader | None]) -> tuple[int, int]:
    """How many points of each kind a rank holds."""
    negative, positive = given["negative"], given["positive"]
    assert negative is not None
    assert positive is not None
    shapes = [(x.rows, *x.trailing) for x in (negative, positive)]
    fits = len(shapes[0]) == len(shapes[1]) >= 2 and shapes[0][:-2] == shapes[1][:-2]
    if not fits or shapes[0][-1] != shapes[1][-1]:
        raise ConfigError(
            f"negative and positive have shapes {shapes[0]} and {shapes[1]} on rank {number}; give "
            f"[..., m, dim] and [..., n, dim] with equal leading dimensions and dim"
        )
    dtypes = negative.dtype, positive.dtype
    if not all(dtype and dtype.is_floating_point for dtype in dtypes):
        raise ConfigError(
            f"points must be floating, of at most {MAX_DIMS} dimensions, not {dtypes[0]} and "
            f"{dtypes[1]} as on rank {number}"
        )
    if 0 in (*shapes[0][:-2], shapes[0][-1]):
        raise ConfigError(
            f"points of shape {shapes[0]} on rank {number} hold no group or no dimension; give some"
        )
    m, n = shapes[0][-2], shapes[1][-2]
    labels = given["negative_labels"], given["positive_labels"]
    if labels != (None, None) and not (_are_labels(labels[0], m) and _are_labels(labels[1], n)):
        raise ConfigError(
            f"labels must be integers, one for each point of both kinds: rank {number} has to give "
            f"{m} negative_labels and {n} positive_labels"
        )
    return m, n


def _are_labels(header: RowHeader | None, count: int) -> bool:
    if header is None or header.dtype is None or header.dtype.is_floating_point:
        return False
    return header.rows == count and not header.trailing


def _check_some_of_each(counts: list[tuple[int, int]], are_compared: bool) -> None:
    holders = {f"rank {number} holds": count for number, count in enumerate(counts)}
    if are_compared:
        m, n = map(sum, zip(*counts, strict=True))
        holders = {"the ranks together hold": (m, n)}
    for who, (m, n) in holders.items():
        if m < 1 or n < 1:
            raise ConfigError(
                f"{who} {m} negative (generated) and {n} positive (data) points; the force needs "
                f"one of each"
            )


def _rows(negative: Tensor, positive: Tensor) -> Tensor:
    """Both as one [m + n, G, D] in at least fp32."""
    dtype = collectives.accumulation_dtype(torch.promote_types(negative.dtype, positive.dtype))
    num_groups, dim = math.prod(negative.shape[:-2]), negative.shape[-1]
    kinds = (x.to(dtype).reshape(num_groups, -1, dim) for x in (negative, positive))
    return torch.cat([x.transpose(0, 1) for x in kinds])


def _tags(rows: Tensor, m: int, *labels: Tensor | None) -> Tensor:
    """Kind and label of all rows: [R, 2] int64."""
    tags = torch.zeros(len(rows), 2, dtype=torch.int64, device=rows.device)
    tags[:m, 0], tags[m:, 0] = NEGATIVE, POSITIVE
    for part, its_labels in zip((tags[:m], tags[m:]), labels, strict=True):
        if its_labels is not None:
            part[:, 1] = its_labels
    return tags
