"""What networks make of samples, of which an evaluation keeps nothing else; that of all ranks."""

import itertools
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from typing import Any

import torch
from torch import Tensor

from dist_contrastive import collectives

MOST_PIXELS = 2**24  # numbers of raw pixels of a split that are kept for a baseline: 64 MiB


@dataclass(frozen=True)
class Encoded:
    """What networks make of the samples of a split; their images are let go of."""

    index: Tensor  # [n] int64, numbers in the data set
    labels: Tensor | None  # as of `Samples`
    features: Tensor  # [n, D], representations; or [n, q, D], those of q views
    image_shape: tuple[int, ...]
    pixels: Tensor | None = None  # [n, ...], the images; None where they are too many
    partners: Tensor | None = None  # [n, E], embeddings of the second modality
    texts: tuple[str, ...] | None = None

    def groups(self) -> Tensor | None:
        """Numbers [n] of equal texts; None without texts."""
        if self.texts is None:
            return None
        numbers = {text: number for number, text in enumerate(dict.fromkeys(self.texts))}
        return torch.tensor([numbers[text] for text in self.texts], device=self.features.device)

    def rows(self, numbers: Tensor) -> "Encoded":
        """Some of the samples, by their rows, int64 [n]."""
        chosen: dict[str, Any] = {
            name: x[numbers.to(x.device)] for name, x in vars(self).items() if isinstance(x, Tensor)
        }
        if self.texts is not None:
            chosen["texts"] = tuple(self.texts[number] for number in numbers.tolist())
        return replace(self, **chosen)

    def to(self, device: torch.device) -> "Encoded":
        """The same where measures are computed; pixels stay, which may be many."""
        return replace(
            self,
            index=self.index.to(device),
            labels=None if self.labels is None else self.labels.to(device),
            features=self.features.to(device),
            partners=None if self.partners is None else self.partners.to(device),
        )


def joined(parts: list[Encoded]) -> Encoded:
    """One after the other; what a part lacks the whole lacks."""
    whole: dict[str, Any] = {"image_shape": parts[0].image_shape}
    for name in (f.name for f in fields_of(Encoded) if f.name not in whole):
        values = [getattr(part, name) for part in parts]
        if any(x is None for x in values):
            whole[name] = None
        elif name == "texts":
            whole[name] = tuple(itertools.chain.from_iterable(values))
        else:
            whole[name] = torch.cat(values)
    return Encoded(**whole)


def num_pixels(parts: list[Encoded]) -> int:
    """Numbers of raw pixels that are kept."""
    return sum(0 if x.pixels is None else x.pixels.numel() for x in parts)


def gathered(local: Encoded | None, baselines: bool) -> Encoded:
    """The samples of all ranks, in the order of the data set, on each rank.

    Args:
        local: of this rank; None: it has none, which not all ranks may say.
        baselines: pixels are kept, however many all ranks have together.

    Collectives: gathers of rows and of objects.
    """
    if collectives.world_size() == 1:
        assert local is not None
        return local
    templates = collectives.gather_objects(None if local is None else local.rows(torch.arange(0)))
    template = next(x for x in templates if x is not None)
    local = template if local is None else local
    pixels = sum(collectives.gather_objects(num_pixels([local])))
    has_pixels = all(x is None or x.pixels is not None for x in templates)
    if not has_pixels or (pixels > MOST_PIXELS and not baselines):
        local = replace(local, pixels=None)
    found: dict[str, Any] = {
        name: collectives.all_gather_rows(x)[0]
        for name, x in vars(local).items()
        if isinstance(x, Tensor)
    }
    if local.texts is not None:
        found["texts"] = tuple(itertools.chain(*collectives.gather_objects(local.texts)))
    whole = replace(local, **found)
    return whole.rows(whole.index.argsort())
