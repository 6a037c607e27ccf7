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
    bad, read, begin = list[str](), list[Samples](), time.monotonic()
    looked = 0
    for number in spread(len(data.index), _SAMPLES):
        if looked and time.monotonic() - begin > _LONGEST_S:
            break
        looked += 1
        try:
            read.append(_read(data, number))
        except UnreadableSample as error:
            bad.append(str(error))
    all_of_them = min(consumed, len(data.index)) * len(bad) / looked
    if len(bad) > max_skipped or (all_of_them > max_skipped and len(bad) >= _FEW):
        raise DataError(
            f"{len(bad)} of {looked} samples looked at cannot be read, and the run may meet more "
            f"than data.max_skipped={max_skipped}; first: {bad[0]}"
        )
    _refuse_equal(read)
    unreadable = f", of which {len(bad)} cannot be read: {bad[0]}" if bad else ""
    blank = sum(isinstance(x.pair, tuple) and not x.pair[0].strip() for x in read)
    texts = f"; {blank} have a blank text" if blank else ""
    return f"{looked} looked at, spread evenly{unreadable}{texts}"


def _read(data: TrainingData, number: int) -> Samples:
    sample = data.index.read(number, data.fields.names)
    row = data.fields.prepare({"__epoch__": 0, "__index__": number, **sample})
    return data.samples(collate([row]))


def _refuse_equal(read: list[Samples]) -> None:
    if len(read) < 2:
        return
    first = read[0]
    names = {"data.image": all(torch.equal(x.images, first.images) for x in read)}
    if isinstance(first.pair, tuple):
        names["data.pair"] = all(x.pair == first.pair for x in read)
    for name, are_equal in names.items():
        if are_equal:
            raise DataError(
                f"all {len(read)} samples looked at hold the same in {name}, so that nothing can "
                f"be learned; name another field, or look at the data with `shards inspect --sheet`"
            )
