"""A bank of past samples of every class, the same on all ranks."""

from typing import Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.data import keyed_random
from dist_contrastive.settings import Settings

_BYTE = 255


class SampleBank(nn.Module):
    """The newest samples of each class, in the order of the global batches.

    Its buffers are part of the task's weights, hence of checkpoints, and know nothing of the number
    of ranks. Memory: classes x capacity samples on each rank; images take a byte a number, as they
    were read, and arrays four.

    Args:
        num_classes: labels are 0 ... num_classes - 1.
        example: a sample [1, ...], which shows the shape, and whether these are images.
    """

    class Config(Settings):
        """Samples of past batches, as further data for each class."""

        capacity: PositiveInt
        """Samples of each class to keep; each rank keeps all of them."""
        positives: PositiveInt
        """How many of them are data in a step, for each class (and group) of the batch."""

        @model_validator(mode="after")
        def _holds_enough(self) -> Self:
            if self.positives > self.capacity:
                raise ValueError(
                    f"positives={self.positives} of a bank of capacity={self.capacity}; set "
                    f"positives to at most {self.capacity}"
                )
            return self

    samples: Tensor
    added: Tensor

    def __init__(self, config: Config, num_classes: int, example: Tensor) -> None:
        super().__init__()
        self._are_images = _is_image(example)
        dtype = torch.uint8 if self._are_images else torch.float32
        shape = num_classes, config.capacity, *example.shape[1:]
        self.register_buffer("samples", torch.zeros(shape, dtype=dtype))
        # On the host, which chooses places by them.
        self.register_buffer("added", torch.zeros(num_classes, dtype=torch.int64))

    def _apply(self, fn, recurse=True):
        on_host = self.added
        super()._apply(fn, recurse)
        self.added = on_host
        return self

    @property
    def capacity(self) -> int:
        """Samples of each class."""
        return self.samples.shape[1]

    @torch.no_grad()
    def add(self, samples: Tensor, labels: Tensor) -> None:
        """The samples of all ranks replace the oldest of their classes.

        Args:
            labels: their classes [n], on the CPU.

        Collectives: three all-gathers: of the number of rows, of the samples, and of the labels.
        """
        if self._are_images:
            samples = (samples * _BYTE).round().to(torch.uint8)
        headers = collectives.exchange_headers({"labels": labels})["labels"]
        sizes = tuple(header.rows for header in headers if header)
        gathered = collectives.gather_rows(samples.to(self.samples.dtype), sizes)
        labels = collectives.gather_on_host(labels, sizes)
        rows, places = [labels[:0]], [labels[:0]]
        for label in labels.unique().tolist():
            newest = (labels == label).nonzero()[:, 0]
            slots = int(self.added[label]) + torch.arange(len(newest))
            kept = slice(max(0, len(newest) - self.capacity), None)
            rows.append(newest[kept])
            places.append(label * self.capacity + slots[kept] % self.capacity)
            self.added[label] += len(newest)
        row, place = (collectives.to_device(torch.cat(x), gathered.device) for x in (rows, places))
        self.samples.flatten(0, 1)[place] = gathered[row]

    def draw(self, key: tuple[int | Tensor, ...], label: int | None, count: int) -> Tensor:
        """Places [n] of up to `count` different samples of a class, or of all (label None).

        Args:
            key: the same gives the same samples, wherever they are drawn.
        """
        held = self.added.clamp(max=self.capacity).tolist()
        classes = range(len(held)) if label is None else [label]
        places = [c * self.capacity + torch.arange(held[c]) for c in classes]
        candidates = collectives.to_device(torch.cat(places), self.samples.device)
        return candidates[keyed_random.combine(*key, candidates).argsort()[:count]]

    def take(self, places: Tensor) -> Tensor:
        """The samples [n, ...] at places of `draw`, float32."""
        samples = self.samples.flatten(0, 1)[places].float()
        return samples / _BYTE if self._are_images else samples


def _is_image(example: Tensor) -> bool:
    """Whether its numbers [1, C, H, W] are bytes over 255; those of other arrays are not."""
    in_bytes = example * _BYTE
    whole = (in_bytes - in_bytes.round()).abs().max() < 1e-4  # which fp32 rounds by less
    within = example.min() >= 0 and example.max() <= 1
    return example.dim() == 4 and bool(whole and within)
