"""Label table of a whole data set: read by all ranks together, thinned out, checked."""

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Group
from dist_contrastive.data import keyed_random
from dist_contrastive.data.fields import MISSING_CLASS, Fields
from dist_contrastive.data.source import Source
from dist_contrastive.errors import ConfigError

_KEEP_STREAM = 0x6B656570  # "keep": keeps these keys apart from other uses of the same seed


def read_label_table(index: Source, fields: Fields, group: Group = None) -> Tensor:
    """``fields.labels(index, range(len(index)))``, of which each rank reads an equal part.

    Of every sample the field with the label is read alone. Where that cannot be read the label
    counts as missing: if the sample is drawn, the stream replaces it.

    Returns:
        [N] on the CPU of every rank, in the order of sample numbers: int64 with -1 where missing,
        or float64 with NaN where missing.

    Raises:
        DataError: as `Fields.labels`, on all ranks.

    Collectives: two gathers of objects, which any backend has for what lies on the CPU.
    """
    ranks, rank = collectives.world_size(group), collectives.rank(group)
    start, stop = (len(index) * part // ranks for part in (rank, rank + 1))
    with collectives.raised_together(group):
        local = fields.labels(index, range(start, stop), unreadable_is_missing=True)
    parts = collectives.gather_objects(local, group)
    return torch.cat(parts)


def keep_per_class(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """The labels of `per_class` samples of every class; those of all others go missing.

    Each sample draws a number from (seed, its own number), and the lowest of each class stay: the
    same on any rank, in any run, and fewer of a class are a part of more of it.

    Args:
        labels: int64 [N], -1 where missing. per_class: 1 or more.

    Returns:
        int64 [N], -1 where missing or not kept.

    Raises:
        ConfigError: continuous labels; per_class below 1, or above the labels that a class has.
    """
    if labels.is_floating_point():
        raise ConfigError(
            f"labels_per_class={per_class} is for classes, and these labels are continuous; "
            f"set data.num_classes, or keep all labels"
        )
    if per_class < 1:
        raise ConfigError(
            f"labels_per_class={per_class} is below 1; keep 1 label of every class or more"
        )
    draws = keyed_random.combine(seed, _KEEP_STREAM, torch.arange(len(labels)))
    kept = torch.full_like(labels, MISSING_CLASS)
    for number in labels[labels != MISSING_CLASS].unique().tolist():
        members = (labels == number).nonzero().flatten()
        if len(members) < per_class:
            raise ConfigError(
                f"labels_per_class={per_class} cannot be kept of class {number}, which has "
                f"{len(members)}; keep {len(members)} or fewer, or label more of its samples"
            )
        kept[members[draws[members].argsort(stable=True)[:per_class]]] = number
    return kept


def check_labels(labels: Tensor) -> None:
    """Refuse labels [N] by which no two samples differ.

    Raises:
        ConfigError: all are missing, or all that are not are the same.
    """
    continuous = labels.is_floating_point()
    present = labels[~labels.isnan() if continuous else labels != MISSING_CLASS]
    if not len(present):
        raise ConfigError(
            f"all {len(labels)} labels are missing; set data.label to a field that holds some, or "
            f"train without labels"
        )
    if len(present.unique()) == 1:
        what = "continuous labels are" if continuous else "labels are class"
        fix = "values" if continuous else "classes"
        raise ConfigError(
            f"all {len(present)} {what} {present[0].item()}, so no two samples differ; "
            f"set data.label to a field with two {fix} or more"
        )
