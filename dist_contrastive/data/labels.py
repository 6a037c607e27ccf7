"""Label table of a whole data set: read by all ranks together, thinned out, checked; and the names
of its classes."""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Group
from dist_contrastive.data import keyed_random
from dist_contrastive.data.classes import MISSING_CLASS, named_classes
from dist_contrastive.data.fields import Fields
from dist_contrastive.data.source import Source
from dist_contrastive.errors import ConfigError, DataError

_PROBED = 1000  # samples among which one with a label is looked for
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


def with_class_names(fields: Fields, index: Source, group: Group = None) -> Fields:
    """Fields that know the numbers of labels that are texts: by the names stored with the data set,
    or else by all that it holds, sorted.

    Raises:
        DataError: some labels are texts, others are not; more names than `num_classes`.

    Collectives: as `read_label_table`, if texts have to be collected.
    """
    if fields.num_classes is None or fields.label is None or fields.classes is not None:
        return fields
    with collectives.raised_together(group):
        probed = islice(fields.stored_labels(index, range(len(index)), True), _PROBED)
        first = next((value for _, value in probed if value is not None), None)
    if not isinstance(first, str):
        return fields
    if fields.label == "json.class" and list(index.classes) == list(range(len(index.classes))):
        names = list(index.classes.values())
    else:
        names = _all_texts(fields, index, group)
    if len(names) > fields.num_classes:
        shown = named_classes(dict(enumerate(names)))
        raise DataError(
            f"data.num_classes={fields.num_classes}, but {fields.label!r} holds {len(names)} "
            f"classes: {shown}; set data.num_classes={len(names)}"
        )
    return fields.model_copy(update={"classes": tuple(names)})


def _all_texts(fields: Fields, index: Source, group: Group) -> list[str]:
    """Different labels of a data set, sorted; each rank reads an equal part."""
    ranks, rank = collectives.world_size(group), collectives.rank(group)
    start, stop = (len(index) * part // ranks for part in (rank, rank + 1))
    texts: set[str] = set()
    with collectives.raised_together(group):
        for key, value in fields.stored_labels(index, range(start, stop), True):
            if isinstance(value, str):
                texts.add(value)
            elif value is not None:
                raise DataError(
                    f"sample {key} has the label {value!r} in {fields.label!r}, and others have "
                    f"texts; pack all as texts or all as whole numbers"
                )
    return sorted(set().union(*collectives.gather_objects(texts, group)))


def refuse_other_classes(
    label: str | None, sources: Sequence[Source], classes: Sequence[str] = ()
) -> None:
    """Refuse data sets in which one number stands for different classes.

    Args:
        classes: names of the classes 0, 1, ... as the config has them, if it has.

    Raises:
        DataError: their names differ, and labels are the numbers.
    """
    first = {number: (name, "data.classes") for number, name in enumerate(classes)}
    for source in sources if label in ("cls", "json.label") else ():
        for number, name in source.classes.items():
            known, shard = first.setdefault(number, (name, source.shards[0]))
            if known != name:
                raise DataError(
                    f"class {number} is {known!r} in {shard}, but {name!r} in {source.shards[0]}; "
                    f"pack one of them again with --classes-of the other, give a folder that is "
                    f"read as it lies the classes of the other, or train on json.class"
                )


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
