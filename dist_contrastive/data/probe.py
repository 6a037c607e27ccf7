"""Samples spread over the training data: what would end a run later, or teaches nothing."""

import time

import torch

from dist_contrastive.data.collate import collate
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.shards.inspect import spread
from dist_contrastive.data.training import TrainingData
from dist_contrastive.errors import DataError, UnreadableSample

_SAMPLES = 512
_LONGEST_S = 10.0
_FEW = 3  # unreadable ones from which the number of all is estimated


def probe(data: TrainingData, max_skipped: int, consumed: int) -> str:
    """What samples spread evenly over the training data are, in words.

    Args:
        consumed: samples that the run will read.

    Raises:
        DataError: more of them cannot be read than may be skipped, or would be; one is not of the
            shape of the first; or all have the same image or the same text.
    """
    bad, begin, looked, blank = list[str](), time.monotonic(), 0, 0
    first: Samples | None = None
    same = {"data.image", "data.pair"}  # fields that hold the same in all
    for number in spread(len(data.index), _SAMPLES):
        if looked and time.monotonic() - begin > _LONGEST_S:
            break
        looked += 1
        try:
            sample = data.samples(collate([data.fields.row(data.index, number)]))
        except UnreadableSample as error:
            bad.append(str(error))
            continue
        blank += isinstance(sample.pair, tuple) and not sample.pair[0].strip()
        first = sample if first is None else first
        same -= set() if sample is first else _different(sample, first)
    all_of_them = min(consumed, len(data.index)) * len(bad) / looked
    if len(bad) > max_skipped or (all_of_them > max_skipped and len(bad) >= _FEW):
        raise DataError(
            f"{len(bad)} of {looked} samples looked at cannot be read, and the run may meet more "
            f"than data.max_skipped={max_skipped}; first: {bad[0]}"
        )
    if same and looked - len(bad) > 1:
        raise DataError(
            f"all {looked - len(bad)} samples looked at hold the same in {min(same)}, so that "
            f"nothing can be learned; name another field, or look at the data with "
            f"`shards inspect --sheet`"
        )
    unreadable = f", of which {len(bad)} cannot be read: {bad[0]}" if bad else ""
    texts = f"; {blank} have a blank text" if blank else ""
    return f"{looked} looked at, spread evenly{unreadable}{texts}"


def _different(sample: Samples, first: Samples) -> set[str]:
    """Fields of which these two do not hold the same; those without a text differ."""
    are_texts = isinstance(first.pair, tuple)
    return {
        *(["data.image"] if not torch.equal(sample.images, first.images) else []),
        *(["data.pair"] if not are_texts or sample.pair != first.pair else []),
    }
