"""One-step generation by the contrastive force ("drifting"): noise and a class in, a sample out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.config import DriftSettings
from dist_contrastive.data import keyed_random
from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import ContrastiveForce
from dist_contrastive.models import MomentumCopy, build_generator, ema_decay_at
from dist_contrastive.tasks.bank import SampleBank
from dist_contrastive.tasks.base import Embeddings, Task, Terms
from dist_contrastive.tasks.cells import Cells, cells_of
from dist_contrastive.tasks.feature_spaces import FeatureSpaces

# What keeps keys of random numbers apart that have the same seed.
NOISE_STREAM = 0x6E6F697365  # "noise"
_GUIDANCE_STREAM, _POSITIVE_STREAM, _UNCONDITIONAL_STREAM = 0x67756964, 0x706F73, 0x756E63


@dataclass(frozen=True)
class _Drawn:
    """This rank's share of what a step takes from the bank."""

    samples: Tensor  # [k, ...]
    cells: Tensor  # [k] int64
    weights: Tensor  # [k]


class Drift(Task):
    """A generator whose samples are moved by data and by each other, in one or more feature spaces.

    Each row of data is met by one generated row of the same class. Rows of different classes, and
    of different groups of the batch, do not interact. With a bank there are further data of each
    class, and with guidance samples of all classes, which push: A's columns of these weigh
    ``(strength - 1) (generated - 1) / unconditional``, as in the official code of arXiv 2602.04770.
    """

    steps_done: Tensor

    def __init__(
        self,
        settings: DriftSettings,
        example: Samples,
        num_classes: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.settings, self.seed = settings, seed
        self.sample_shape = tuple(example.images.shape[1:])
        self.num_classes = num_classes or 1
        guided = settings.guidance is not None
        self.generator = build_generator(
            settings.generator, self.sample_shape, num_classes, guided=guided
        )
        self.average = None if settings.ema is None else MomentumCopy(self.generator)
        self.bank = None
        if settings.bank is not None:
            self.bank = SampleBank(self.num_classes, settings.bank.capacity, example.images[:1])
        self.loss, self._loss_of_whole_groups = _losses(settings)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        self.rows_multiple = 2 * settings.groups if settings.groups > 1 else 1
        self._spaces = FeatureSpaces(settings.features, self.sample_shape)
        # Of the step: what `batch_inputs` was given and found.
        self._samples: Samples | None = None
        self._cells: Cells | None = None
        self._metrics: dict[str, float] = {}

    def batch_inputs(self, samples: Samples) -> tuple[Tensor, ...]:
        """With guidance its strength [b] in the cell of each row in this step.

        Collectives: those of `cells_of`, since which rows interact is found here.
        """
        rows, device = len(samples.images), samples.images.device
        groups = self.settings.groups
        self._samples = samples
        self._cells = cells_of(samples.labels, rows, self.num_classes, groups, device)
        return () if self.settings.guidance is None else (self._strengths(self._cells.mine),)

    def inputs(self, samples: Samples) -> tuple[Tensor, ...]:
        """Noise [b, noise_dim], keyed by the data row that it will meet, and its label [b]."""
        keys = keyed_random.combine(self.seed, NOISE_STREAM, samples.epoch, samples.index)
        inputs = [keyed_random.normal(keys, self.generator.noise_dim)]
        if samples.labels is not None:
            inputs.append(samples.labels)
        return tuple(inputs)

    def embed(self, *inputs: Tensor) -> Embeddings:
        """Features of generated samples: [b, groups, dim] for each feature space."""
        return self._spaces(self.generator(*inputs))

    def compare(self, embeddings: Embeddings, samples: Samples) -> Terms:
        """The force's loss against this batch's data and the bank's, in each feature space."""
        assert self._cells is not None, "batch_inputs begins a step"
        cells = self._cells
        positives, unconditional = self._drawn(cells)
        parts = [samples.images, *(x.samples for x in (positives, unconditional) if x)]
        data = self._features_of(torch.cat(parts))
        num_data = sum(map(len, parts[: 1 + (positives is not None)]))
        data_cells = torch.cat([cells.mine, *([positives.cells] if positives else [])])
        alone = samples.labels is None and self.settings.groups == 1
        loss = self._loss_of_whole_groups if cells.are_whole else None
        loss = self.loss if loss is None or self.bank is not None else loss
        loss.diagnostics, self._metrics, terms = self.is_logged, {}, {}
        for name, generated, its_data in zip(self._spaces.names, embeddings, data, strict=True):
            further = {}
            if unconditional is not None:
                further["fixed"] = its_data[num_data:].transpose(0, 1)
                further |= {"fixed_labels": unconditional.cells}
                further |= {"fixed_weights": unconditional.weights}
            terms[name] = loss(
                generated.transpose(0, 1),
                its_data[:num_data].transpose(0, 1),
                None if alone else cells.mine,
                None if alone else data_cells,
                **further,
            )
            self._metrics |= {f"{name}/{k}": float(x) for k, x in loss.metrics.items()}
        return terms

    @torch.no_grad()
    def finish_step(self, embeddings: Embeddings) -> None:
        """The average follows; this step's data go into the bank."""
        super().finish_step(embeddings)
        if self.average is not None and self.settings.ema is not None:
            decay = ema_decay_at(int(self.steps_done), self.settings.ema)
            self.average.update(self.generator, decay)
        if self.bank is not None and self._samples is not None:
            samples, labels = self._samples.images, self._samples.labels
            none = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
            self.bank.add(samples, none if labels is None else labels)
        self.steps_done += 1

    def scalars(self) -> dict[str, float]:
        """The mean distance, and for each temperature the force's root mean square and how many
        points a generated one sees, in each feature space."""
        return self._metrics

    @torch.no_grad()
    def generate(
        self, labels: Tensor | None, count: int, seed: int, guidance: float = 1.0, chunk: int = 1024
    ) -> Tensor:
        """`count` samples, by the averaged generator if there is one; for the same seed the same.

        Args:
            labels: classes [count], or None for a generator without.
            guidance: strength; 1 is none.
            chunk: samples at a time.
        """
        if guidance != 1 and not self.generator.guided:
            raise ConfigError(
                f"guidance={guidance:g}, but this generator was trained without; train it with "
                f"task.guidance, or leave guidance out"
            )
        generator = self.generator if self.average is None else self.average
        device = next(self.parameters()).device
        keys = keyed_random.combine(seed, NOISE_STREAM, torch.arange(count, device=device))
        parts = []
        for rows in torch.arange(count, device=device).split(chunk):
            noise = keyed_random.normal(keys[rows], self.generator.noise_dim)
            its_labels = None if labels is None else labels[rows]
            strength = noise.new_full((len(rows),), guidance) if self.generator.guided else None
            parts.append(generator(noise, its_labels, strength))
        return torch.cat(parts)

    @torch.no_grad()
    def _features_of(self, data: Tensor) -> tuple[Tensor, ...]:
        """Features of data, as many rows at a time as networks are given."""
        chunks = data.split(self.micro_batch_size or max(1, len(data)))
        return tuple(map(torch.cat, zip(*map(self._spaces, chunks), strict=True)))

    def _strengths(self, cells: Tensor) -> Tensor:
        """Strength of guidance of some cells in this step: float32, the shape of cells."""
        assert self.settings.guidance is not None
        (low, high), power = self.settings.guidance.strengths, self.settings.guidance.power
        keys = keyed_random.combine(self.seed, _GUIDANCE_STREAM, int(self.steps_done), cells)
        part = keyed_random.uniform(keys, 1)[:, 0]
        if power == 1:
            return low * (high / low) ** part
        rest = 1 - power  # near 0 it takes fp64
        return ((low**rest + part.double() * (high**rest - low**rest)) ** (1 / rest)).float()

    def _drawn(self, cells: Cells) -> tuple[_Drawn | None, _Drawn | None]:
        """This rank's share of data of the classes, and of samples that push; None without any."""
        if self.bank is None or not int(self.bank.added.sum()):
            return None, None
        bank, guidance = self.settings.bank, self.settings.guidance
        assert bank is not None
        positives = self._share(cells, _POSITIVE_STREAM, bank.positives, of_class=True)
        if guidance is None:
            return positives, None
        return positives, self._share(
            cells, _UNCONDITIONAL_STREAM, guidance.unconditional, of_class=False
        )

    def _share(self, cells: Cells, stream: int, count: int, of_class: bool) -> _Drawn:
        assert self.bank is not None
        places, their_cells, sizes = [], [], []
        for cell in cells.present:
            label = cell % cells.num_classes if of_class else None
            found = self.bank.draw((self.seed, stream, int(self.steps_done), cell), label, count)
            places.append(found)
            their_cells.append(torch.full_like(found, cell))
            sizes.append(torch.full_like(found, len(found)))
        mine = slice(collectives.rank(), None, collectives.world_size())
        place, its_cell, size = (torch.cat(x)[mine] for x in (places, their_cells, sizes))
        weights = torch.ones(len(place), device=place.device)
        if not of_class:
            generated = torch.tensor(cells.counts, device=place.device)[its_cell]
            weights = (self._strengths(its_cell) - 1) * (generated - 1) / size
        return _Drawn(self.bank.take(place), its_cell, weights)

    def encoder_spaces(self) -> dict[str, torch.nn.Module]:
        """The frozen encoders in whose features the force acts, by the name of their space."""
        return self._spaces.encoders

    def _apply(self, fn, recurse=True):
        """Frozen features follow the task to another device."""
        self._spaces.apply(fn)
        return super()._apply(fn, recurse)


def _losses(settings: DriftSettings) -> tuple[ContrastiveForce, ContrastiveForce | None]:
    """The loss over the global batch, and the one for ranks that hold whole groups, which need not
    be gathered: where numbers of groups that ranks hold are pooled as those of all are."""
    options = settings.loss.model_dump()
    del options["name"]
    loss = ContrastiveForce(**options)
    if settings.groups == 1 or "group" in (loss.rules.scale_scope, loss.rules.norm_scope):
        return loss, None
    return loss, ContrastiveForce(**{**options, "keys_from": "local"})
