"""One-step generation by the contrastive force ("drifting"): noise and a class in, a sample out."""

from dataclasses import dataclass, replace
from typing import Self

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
from dist_contrastive.tasks.base import Embeddings, StepContext, Task, Terms
from dist_contrastive.tasks.feature_spaces import FeatureSpaces

# What keeps keys of random numbers apart that have the same seed.
NOISE_STREAM = 0x6E6F697365  # "noise"
_GUIDANCE_STREAM, _POSITIVE_STREAM, _UNCONDITIONAL_STREAM = 0x67756964, 0x706F73, 0x756E63


@dataclass(frozen=True)
class Subgroups:
    """Rows of one class in one group of the global batch: those that interact.

    Numbered ``group * num_classes + class``, the same on any number of ranks.
    """

    local: Tensor  # [b] int64, of this rank's rows
    counts: list[int]  # rows of each subgroup, over all ranks
    num_classes: int
    are_whole: bool  # whether every rank holds whole groups, and as many as the others

    @property
    def present(self) -> list[int]:
        """Subgroups that have rows."""
        return [subgroup for subgroup, count in enumerate(self.counts) if count]


@dataclass(frozen=True, kw_only=True)
class DriftContext(StepContext):
    """A step, and which rows of the global batch interact in it."""

    subgroups: Subgroups

    def rows(self, rows: Tensor) -> Self:
        """The context of some rows of this rank."""
        local = self.subgroups.local[rows]
        return replace(self, subgroups=replace(self.subgroups, local=local))


@dataclass(frozen=True)
class _BankRows:
    """This rank's share of the samples that a step takes from the bank."""

    samples: Tensor  # [k, ...]
    subgroups: Tensor  # [k] int64
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
        self.loss, self.local_loss = _losses(settings)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        self.rows_multiple = 2 * settings.groups if settings.groups > 1 else 1
        self._spaces = FeatureSpaces(settings.features, self.sample_shape)

    def begin_step(
        self,
        samples: Samples,
        *,
        progress: float = 0.0,
        is_logged: bool = False,
        micro_batch_size: int | None = None,
    ) -> DriftContext:
        """Context of a step, with the subgroups of its rows.

        Collectives: two all-gathers: of the number of rows, and of the labels.
        """
        labels = samples.labels
        if labels is None:
            rows, device = len(samples.images), samples.images.device
            labels = torch.zeros(rows, dtype=torch.int64, device=device)
        return DriftContext(
            progress=progress,
            is_logged=is_logged,
            micro_batch_size=micro_batch_size,
            subgroups=_subgroups(labels, self.num_classes, self.settings.groups),
        )

    def inputs(self, samples: Samples, context: StepContext) -> tuple[Tensor, ...]:
        """Noise [b, noise_dim], keyed by the data row that it is compared with; its label [b], and
        with guidance the strength [b] of its subgroup in this step."""
        assert isinstance(context, DriftContext)
        keys = keyed_random.combine(self.seed, NOISE_STREAM, samples.epoch, samples.index)
        inputs = [keyed_random.normal(keys, self.generator.noise_dim)]
        if samples.labels is not None:
            inputs.append(samples.labels)
        if self.settings.guidance is not None:
            inputs.append(self._strengths(context.subgroups.local))
        return tuple(inputs)

    def embed(self, *inputs: Tensor) -> Embeddings:
        """Features of generated samples: [b, groups, dim] for each feature space."""
        return self._spaces(self.generator(*inputs))

    def compare(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> Terms:
        """The force's loss against this batch's data and the bank's, in each feature space."""
        assert isinstance(context, DriftContext)
        subgroups = context.subgroups
        positives, unconditional = self._bank_rows(subgroups)
        parts = [samples.images, *(x.samples for x in (positives, unconditional) if x)]
        data = self._features(torch.cat(parts), context.micro_batch_size)
        num_data = sum(map(len, parts[: 1 + (positives is not None)]))
        data_subgroups = torch.cat([subgroups.local, *([positives.subgroups] if positives else [])])
        all_interact = samples.labels is None and self.settings.groups == 1
        loss = self.local_loss if subgroups.are_whole else None
        loss = self.loss if loss is None or self.bank is not None else loss
        loss.diagnostics, terms = context.is_logged, {}
        for name, generated, real in zip(self._spaces.names, embeddings, data, strict=True):
            fixed = {}
            if unconditional is not None:
                fixed["fixed"] = real[num_data:].transpose(0, 1)
                fixed |= {"fixed_labels": unconditional.subgroups}
                fixed |= {"fixed_weights": unconditional.weights}
            terms[name] = loss(
                generated.transpose(0, 1),
                real[:num_data].transpose(0, 1),
                None if all_interact else subgroups.local,
                None if all_interact else data_subgroups,
                **fixed,
            )
            if context.is_logged:
                metrics = {f"{name}/{k}": float(x) for k, x in loss.metrics.items()}
                context.metrics.update(metrics)
        return terms

    @torch.no_grad()
    def finish_step(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> None:
        """The average follows; this step's data go into the bank."""
        super().finish_step(embeddings, samples, context)
        if self.average is not None and self.settings.ema is not None:
            decay = ema_decay_at(int(self.steps_done), self.settings.ema)
            self.average.update(self.generator, decay)
        if self.bank is not None:
            labels = samples.labels
            if labels is None:
                device = samples.images.device
                labels = torch.zeros(len(samples.images), dtype=torch.int64, device=device)
            self.bank.add(samples.images, labels)
        self.steps_done += 1

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
            row_labels = None if labels is None else labels[rows]
            strength = noise.new_full((len(rows),), guidance) if self.generator.guided else None
            parts.append(generator(noise, row_labels, strength))
        return torch.cat(parts)

    @torch.no_grad()
    def _features(self, data: Tensor, chunk: int | None) -> tuple[Tensor, ...]:
        """Features of data, `chunk` rows at a time."""
        chunks = data.split(chunk or max(1, len(data)))
        return tuple(map(torch.cat, zip(*map(self._spaces, chunks), strict=True)))

    def _strengths(self, subgroups: Tensor) -> Tensor:
        """Strength of guidance of some subgroups in this step: float32, the shape of subgroups."""
        assert self.settings.guidance is not None
        (low, high), power = self.settings.guidance.strengths, self.settings.guidance.power
        keys = keyed_random.combine(self.seed, _GUIDANCE_STREAM, int(self.steps_done), subgroups)
        uniform = keyed_random.uniform(keys, 1)[:, 0]
        if power == 1:
            return low * (high / low) ** uniform
        rest = 1 - power  # near 0 it takes fp64
        return ((low**rest + uniform.double() * (high**rest - low**rest)) ** (1 / rest)).float()

    def _bank_rows(self, subgroups: Subgroups) -> tuple[_BankRows | None, _BankRows | None]:
        """This rank's share of data of the classes, and of samples that push; None without any."""
        if self.bank is None or not int(self.bank.added.sum()):
            return None, None
        bank, guidance = self.settings.bank, self.settings.guidance
        assert bank is not None
        positives = self._share(subgroups, _POSITIVE_STREAM, bank.positives, of_class=True)
        if guidance is None:
            return positives, None
        return positives, self._share(
            subgroups, _UNCONDITIONAL_STREAM, guidance.unconditional, of_class=False
        )

    def _share(self, subgroups: Subgroups, stream: int, count: int, of_class: bool) -> _BankRows:
        assert self.bank is not None
        places, numbers, sizes = [], [], []
        for subgroup in subgroups.present:
            label = subgroup % subgroups.num_classes if of_class else None
            key = self.seed, stream, int(self.steps_done), subgroup
            drawn = self.bank.draw(key, label, count)
            places.append(drawn)
            numbers.append(torch.full_like(drawn, subgroup))
            sizes.append(torch.full_like(drawn, len(drawn)))
        share = slice(collectives.rank(), None, collectives.world_size())
        place, number, size = (torch.cat(x)[share] for x in (places, numbers, sizes))
        weights = torch.ones(len(place), device=place.device)
        if not of_class:
            generated = torch.tensor(subgroups.counts, device=place.device)[number]
            weights = (self._strengths(number) - 1) * (generated - 1) / size
        return _BankRows(self.bank.take(place), number, weights)

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
    loss = ContrastiveForce(settings.loss)
    if settings.groups == 1 or "group" in (loss.rules.scale_scope, loss.rules.norm_scope):
        return loss, None
    return loss, ContrastiveForce(settings.loss.model_copy(update={"keys_from": "local"}))


def _subgroups(labels: Tensor, num_classes: int, groups: int) -> Subgroups:
    """Subgroups of the global batch, whose rows form equal groups in the order of ranks.

    Args:
        labels: classes of this rank's rows [b].

    Collectives: two all-gathers: of b, and of the labels.
    """
    headers = collectives.exchange_headers({"labels": labels})["labels"]
    sizes = tuple(header.rows for header in headers if header)
    gathered = collectives.gather_rows(labels, sizes)
    group = torch.arange(len(gathered), device=labels.device) * groups // max(1, len(gathered))
    subgroups = group * num_classes + gathered
    start = sum(sizes[: collectives.rank()])
    return Subgroups(
        subgroups[start : start + len(labels)],
        subgroups.bincount(minlength=groups * num_classes).tolist(),
        num_classes,
        len(set(sizes)) == 1 and groups % len(sizes) == 0,
    )
