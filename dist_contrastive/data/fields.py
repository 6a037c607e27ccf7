"""From the decoded fields of a batch to what tasks take: images and labels."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_contrastive.data.collate import Batch, collate
from dist_contrastive.data.index import ShardIndex
from dist_contrastive.errors import DataError


@dataclass(frozen=True)
class Samples:
    """Rows of this rank, with what identifies each of them in the stream."""

    images: Tensor  # [b, C, H, W] float32 in [0, 1]
    labels: Tensor | None  # [b] int64
    epoch: Tensor  # [b] int64
    index: Tensor  # [b] int64, number of the sample in its data set

    def to(self, device: torch.device) -> "Samples":
        """The same rows on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        images, epoch, index = (x.to(device) for x in (self.images, self.epoch, self.index))
        return Samples(images, labels, epoch, index)


@dataclass(frozen=True)
class Fields:
    """Which fields of a sample hold what."""

    image: str  # the image
    label: str | None = None  # the class, as "cls" or, inside a JSON object, "json.label"
    num_classes: int = 0  # labels are 0 ... num_classes - 1

    def samples(self, batch: Batch) -> Samples:
        """Images and labels of a batch of `ShardStream`.

        Raises:
            DataError: a field is missing or is not what it should be, naming the field.
        """
        pixels = _field(batch, self.image)
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or pixels.dtype != torch.uint8:
            raise DataError(
                f"field {self.image!r} does not hold images of one size: pack them with equal "
                f"height, width and channels, or name another field as data.image"
            )
        labels = None if self.label is None else self._labels(batch, self.label)
        return Samples(pixels.float() / 255, labels, batch["__epoch__"], batch["__index__"])

    def read(self, index: ShardIndex, numbers: Iterable[int]) -> Samples:
        """These samples of a data set, all of which must fit in memory, in their order."""
        rows = [{**index.read(i), "__epoch__": 0, "__index__": i} for i in numbers]
        return self.samples(collate(rows))

    def _labels(self, batch: Batch, path: str) -> Tensor:
        field, _, inner = path.partition(".")
        values = _field(batch, field)
        if inner:
            without = [k for k, v in zip(batch["__key__"], values, strict=True) if inner not in v]
            if without:
                raise DataError(
                    f"sample {without[0]} has no {inner!r} in its field {field!r}; set data.label "
                    f"to FIELD.NAME with a name that it has"
                )
            values = [value[inner] for value in values]
        listed = values.tolist() if isinstance(values, Tensor) else values
        for key, value in zip(batch["__key__"], listed, strict=True):
            if not isinstance(value, int):
                raise DataError(
                    f"sample {key} has label {value!r} in {path!r}; classes are whole numbers "
                    f"0..{self.num_classes - 1}: pack such labels, or name another field"
                )
        labels = torch.tensor(listed, dtype=torch.int64)
        outside = ((labels < 0) | (labels >= self.num_classes)).nonzero()
        if len(outside):
            row = int(outside[0])
            raise DataError(
                f"sample {batch['__key__'][row]} has label {int(labels[row])}, outside "
                f"0..{self.num_classes - 1}; set data.num_classes to the number of classes"
            )
        return labels


def image_shape(index: ShardIndex, image: str) -> tuple[int, int, int]:
    """(channels, height, width) of the first sample's image."""
    _, channels, height, width = Fields(image).read(index, [0]).images.shape
    return channels, height, width


def _field(batch: Batch, name: str) -> Any:
    if name not in batch:
        known = [key for key in batch if not key.startswith("__")]
        raise DataError(
            f"samples have no field {name!r}; set data.image and data.label to fields that they "
            f"have: {', '.join(known) or 'none'}"
        )
    return batch[name]
