"""One-step generation by the contrastive force ("drifting"): noise and a class in, a sample out."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.data import keyed_random
from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.stream.order import nearest_multiples
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import FOR_RUNS, ContrastiveForce, PairLoss
from dist_contrastive.models import AnyGenerator, MomentumCopy, build_generator, ema_decay_at
from dist_contrastive.settings import Settings
from dist_contrastive.tasks.bank import SampleBank
from dist_contrastive.tasks.base import DataInfo, Embeddings, StepContext, Task, Terms
from dist_contrastive.tasks.feature_spaces import AnyFeatureSpace, FeatureSpaces

# What keeps keys of random numbers apart that have the same seed.
NOISE_STREAM = 0x6E6F697365  # "noise"
_GUIDANCE_STREAM, _POSITIVE_STREAM, _UNCONDITIONAL_STREAM = 0x67756964, 0x706F73, 0x756E63


@dataclass(frozen=True)
class Subgroups:
    """Rows of one class in one group of the global batch: those that interact.

    Numbered ``group * num_classes + class``, the same on any number of ranks.
    """

    local: Tensor  # [b] int64, of this rank's rows, on their device
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

    def rows(self, rows: slice) -> Self:
        """The context of some rows of this rank."""
        local = self.subgroups.local[rows]
        return replace(self, subgroups=replace(self.subgroups, local=local))


@dataclass(frozen=True)
class _BankRows:
    """This rank's share of the samples that a step takes from the bank."""

    samples: Tensor  # [k, ...]
    subgroups: Tensor  # [k] int64
    weights: Tensor  # [k]


class GuidanceConfig(Settings):
    """Classifier-free guidance: samples of all classes push those of each class away."""

    unconditional: PositiveInt = 16
    """Samples of the bank that push, for each class (and group) of the batch."""
    strengths: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] = (1.0, 4.0)
    """Smallest and largest strength, 1 is none; each class draws one in each step, which the
    generator takes."""
    power: NonNegativeFloat = 1.0
    """Strengths have a density of strength^-power."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        low, high = self.strengths
        if low > high:
            raise ValueError(f"strengths={self.strengths}; give the smaller one first")
        return self


class Drift(Task):
    """A generator whose samples are moved by data and by each other, in one or more feature spaces.

    Each row of data is met by one generated row of the same class. Rows of different classes, and
    of different groups of the batch, do not interact. With a bank there are further data of each
    class, and with guidance samples of all classes, which push: A's columns of these weigh
    ``(strength - 1) (generated - 1) / unconditional``, as in the official code of arXiv 2602.04770.
    """

    class Config(Task.Config):
        """A one-step generator trained by the contrastive force."""

        labels_required: ClassVar[bool] = True

        name: Literal["drift"] = "drift"
        generator: AnyGenerator
        """Network from noise and class to samples."""
        features: tuple[AnyFeatureSpace, ...]
        """Spaces in which the force acts; their losses are added."""
        loss: Annotated[ContrastiveForce.Config, FOR_RUNS] = ContrastiveForce.Config()
        """The force, and its loss in each space."""
        groups: PositiveInt = 1
        """Equal parts of the global batch that do not interact; 1: all of it does."""
        ema: float | None = Field(default=None, ge=0, lt=1)
        """Decay of the averaged generator that `eval` and `sample` use; null: none, the last
        one."""
        bank: SampleBank.Config | None = None
        """Samples of past batches, as further data; null: none."""
        guidance: GuidanceConfig | None = None
        """Classifier-free guidance; null: none."""

        @field_validator("features")
        @classmethod
        def _some_space(cls, features: tuple[AnyFeatureSpace, ...]) -> tuple[AnyFeatureSpace, ...]:
            if not features:
                raise ValueError("the force needs a space to act in; name one, as [{name: pixels}]")
            return features

        def check(self, data: DataConfig) -> None:
            """Labels, where there are some, are classes; whole groups."""
            super().check(data)
            if data.label is not None and data.num_classes is None:
                raise ValueError("the task drift generates by class; set data.num_classes")
            batch, groups = data.global_batch_size, self.groups
            if batch % groups or batch // groups < 2:
                raise ValueError(
                    f"task.groups={groups} does not divide data.global_batch_size={batch} into "
                    f"equal groups of 2 or more; set data.global_batch_size to "
                    f"{nearest_multiples(batch, groups, 2 * groups)}"
                )
            if self.guidance is not None and (self.bank is None or data.num_classes is None):
                raise ValueError(
                    "task.guidance pushes with samples of all classes from the bank; set "
                    "task.bank, data.label and data.num_classes"
                )

    state_of_run = ("bank", "steps_done")
    steps_done: Tensor

    loss_tells = False  # forces are normalised

    def __init__(
        self,
        config: Config,
        data: DataInfo,
        encoder: nn.Module | None = None,
        loss: PairLoss | None = None,
    ) -> None:
        super().__init__()
        if encoder is not None:
            raise ConfigError(
                f"the task drift trains a generator, no encoder such as {type(encoder).__name__}; "
                f"name a generator of your own as task.generator.name=package.module:Class"
            )
        self.config, self.seed = config, data.seed
        self.sample_shape = tuple(data.example.images.shape[1:])
        self.num_classes = data.num_classes or 1
        guided = config.guidance is not None
        self.generator = build_generator(
            config.generator, self.sample_shape, data.num_classes, guided=guided
        )
        self.average = None if config.ema is None else MomentumCopy(self.generator)
        self.bank = None
        if config.bank is not None:
            example = data.example.images[:1]
            self.bank = SampleBank(config.bank, self.num_classes, example)
        self.loss, self.local_loss = _losses(config, loss)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        self.rows_multiple = 2 * config.groups if config.groups > 1 else 1
        self._spaces = FeatureSpaces(config.features, self.sample_shape)

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
        groups, device = self.config.groups, samples.images.device
        return DriftContext(
            progress=progress,
            is_logged=is_logged,
            micro_batch_size=micro_batch_size,
            subgroups=_subgroups(_classes(samples), self.num_classes, groups, device),
        )

    def momentum_copies(self) -> dict[str, tuple[MomentumCopy, nn.Module]]:
        """The averaged generator, if there is one."""
        return {} if self.average is None else {"average": (self.average, self.generator)}

    def inputs(self, samples: Samples, context: StepContext) -> tuple[Tensor, ...]:
        """Noise [b, noise_dim], keyed by the data row that it is compared with; its label [b], and
        with guidance the strength [b] of its subgroup in this step."""
        assert isinstance(context, DriftContext)
        keys = keyed_random.combine(self.seed, NOISE_STREAM, samples.epoch, samples.index)
        inputs = [keyed_random.normal(keys, self.generator.noise_dim)]
        if samples.labels is not None:
            inputs.append(samples.labels)
        if self.config.guidance is not None:
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
        all_interact = samples.labels is None and self.config.groups == 1
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
        if self.average is not None and self.config.ema is not None:
            decay = ema_decay_at(self.steps_done, self.config.ema)
            self.average.update(self.generator, decay)
        if self.bank is not None:
            self.bank.add(samples.images, _classes(samples))
        self.steps_done += 1

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor | None,
        count: int,
        seed: int,
        guidance: float = 1.0,
        chunk: int = 1024,
        first: int = 0,
    ) -> Tensor:
        """`count` samples on the CPU, by the averaged generator if there is one; for the same seed
        the same.

        Args:
            labels: classes [count], or None for a generator without.
            guidance: strength; 1 is none.
            chunk: samples at a time.
            first: number of the first one: 5 from number 3 on are the last 5 of 8.
        """
        if guidance != 1 and not self.generator.guided:
            raise ConfigError(
                f"guidance={guidance:g}, but this generator was trained without; train it with "
                f"task.guidance, or leave guidance out"
            )
        generator = self.generator if self.average is None else self.average
        device = next(self.parameters()).device
        numbers = torch.arange(first, first + count, device=device)
        keys = keyed_random.combine(seed, NOISE_STREAM, numbers)
        parts = []
        for rows in torch.arange(count, device=device).split(chunk):
            noise = keyed_random.normal(keys[rows], self.generator.noise_dim)
            row_labels = None if labels is None else labels.to(device)[rows]
            strength = noise.new_full((len(rows),), guidance) if self.generator.guided else None
            parts.append(generator(noise, row_labels, strength).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def _features(self, data: Tensor, chunk: int | None) -> tuple[Tensor, ...]:
        """Features of data, `chunk` rows at a time."""
        chunks = data.split(chunk or max(1, len(data)))
        return tuple(map(torch.cat, zip(*map(self._spaces, chunks), strict=True)))

    def _strengths(self, subgroups: Tensor) -> Tensor:
        """Strength of guidance of some subgroups in this step: float32, the shape of subgroups."""
        assert self.config.guidance is not None
        (low, high), power = self.config.guidance.strengths, self.config.guidance.power
        keys = keyed_random.combine(self.seed, _GUIDANCE_STREAM, self.steps_done, subgroups)
        uniform = keyed_random.uniform(keys, 1)[:, 0]
        if power == 1:
            return low * (high / low) ** uniform
        rest = 1 - power  # near 0 it takes fp64
        return ((low**rest + uniform.double() * (high**rest - low**rest)) ** (1 / rest)).float()

    def _bank_rows(self, subgroups: Subgroups) -> tuple[_BankRows | None, _BankRows | None]:
        """This rank's share of data of the classes, and of samples that push; None without any."""
        if self.bank is None or not self.bank.added.any():
            return None, None
        bank, guidance = self.config.bank, self.config.guidance
        assert bank is not None
        positives = self._share(subgroups, _POSITIVE_STREAM, bank.positives, of_class=True)
        if guidance is None:
            return positives, None
        return positives, self._share(
            subgroups, _UNCONDITIONAL_STREAM, guidance.unconditional, of_class=False
        )

    def _share(self, subgroups: Subgroups, stream: int, count: int, of_class: bool) -> _BankRows:
        assert self.bank is not None
        places, numbers, generated, sizes = [], [], [], []
        for subgroup in subgroups.present:
            label = subgroup % subgroups.num_classes if of_class else None
            key = self.seed, stream, self.steps_done, subgroup
            drawn = self.bank.draw(key, label, count)
            places.append(drawn)
            numbers.append(torch.full_like(drawn, subgroup))
            generated.append(torch.full_like(drawn, subgroups.counts[subgroup]))
            sizes.append(torch.full_like(drawn, len(drawn)))
        share = slice(collectives.rank(), None, collectives.world_size())
        all_of = places, numbers, generated, sizes
        place, number, count_generated, size = (torch.cat(x)[share] for x in all_of)
        weights = torch.ones(len(place), device=place.device)
        if not of_class:
            weights = (self._strengths(number) - 1) * (count_generated - 1) / size
        return _BankRows(self.bank.take(place), number, weights)

    def encoder_spaces(self) -> dict[str, torch.nn.Module]:
        """The frozen encoders in whose features the force acts, by the name of their space."""
        return self._spaces.encoders

    def _apply(self, fn, recurse=True):
        """Frozen features follow the task to another device."""
        self._spaces.apply(fn)
        return super()._apply(fn, recurse)


def _losses(
    config: Drift.Config, loss: PairLoss | None
) -> tuple[ContrastiveForce, ContrastiveForce | None]:
    """Loss over the global batch, and the one for ranks that hold whole groups, which need not be
    gathered: where numbers of groups that ranks hold are pooled as those of all are."""
    if loss is not None:
        if not isinstance(loss, ContrastiveForce):
            raise ConfigError(
                f"loss={type(loss).__name__} cannot be used by the task drift, which takes a "
                f"ContrastiveForce; pass one, or leave it out for that of the config"
            )
        return loss, None
    loss = ContrastiveForce(config.loss)
    if config.groups == 1 or "group" in (loss.rules.scale_scope, loss.rules.norm_scope):
        return loss, None
    return loss, ContrastiveForce(config.loss.model_copy(update={"keys_from": "local"}))


def _classes(samples: Samples) -> Tensor:
    """Classes of this rank's rows [b], on the CPU; of samples without labels all are of one."""
    labels = samples.labels_on_host
    return torch.zeros(len(samples.images), dtype=torch.int64) if labels is None else labels


def _subgroups(labels: Tensor, num_classes: int, groups: int, device: torch.device) -> Subgroups:
    """Subgroups of the global batch, whose rows form equal groups in the order of ranks.

    Args:
        labels: classes of this rank's rows [b], on the CPU.
        device: that of the rows.

    Collectives: two all-gathers: of b, and of the labels.
    """
    headers = collectives.exchange_headers({"labels": labels})["labels"]
    sizes = tuple(header.rows for header in headers if header)
    gathered = collectives.gather_on_host(labels, sizes)
    group = torch.arange(len(gathered)) * groups // max(1, len(gathered))
    subgroups = group * num_classes + gathered
    start = sum(sizes[: collectives.rank()])
    return Subgroups(
        collectives.to_device(subgroups[start : start + len(labels)], device),
        subgroups.bincount(minlength=groups * num_classes).tolist(),
        num_classes,
        len(set(sizes)) == 1 and groups % len(sizes) == 0,
    )
