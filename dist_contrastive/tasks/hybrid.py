"""Supervised, reward and contrastive terms over one encoder (seed of this project):

total = w0 * supervised + w1 * reward + w2 * contrastive
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from dist_contrastive.data import keyed_random
from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import AnyLoss, PairLoss, SelfDiagonal, build_loss, compare_views
from dist_contrastive.losses.classification import PathCrossEntropy
from dist_contrastive.losses.hierarchy import Hierarchy
from dist_contrastive.losses.policy_gradient import PolicyGradient
from dist_contrastive.losses.rewards import load_reward
from dist_contrastive.losses.supcon import LabelledLoss
from dist_contrastive.models import device_of
from dist_contrastive.schedule import Points, Schedule, value_at
from dist_contrastive.settings import Count, Settings
from dist_contrastive.tasks.base import (
    DataInfo,
    Embeddings,
    StepContext,
    Terms,
    check_loss,
    scalars_of,
)
from dist_contrastive.tasks.images import ImageTask

DECISION_STREAM = 0x6465636964  # "decid": keeps these keys apart from other uses of the same seed


class SupervisedConfig(PathCrossEntropy.Config):
    """Cross-entropy of the classifier."""

    weight: Schedule = 1.0
    """Weight of the term, constant or by the progress of the run; 0: none."""

    @field_validator("level_weights")
    @classmethod
    def _some_level_counts(cls, weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if weights is not None and not any(weights):
            raise ValueError("all are 0; give one level a weight, or leave out supervised")
        return weights


class RewardConfig(PolicyGradient.Config):
    """Policy gradient on decisions that are sampled from the classifier."""

    weight: Schedule = 1.0
    """Weight of the term, constant or by the progress of the run; 0: none."""
    function: str = "dist_contrastive.losses.rewards:depth_credit"
    """MODULE:NAME of (decisions, labels, hierarchy) -> rewards."""
    draws: Count = 1
    """Decisions sampled for each view of a sample."""


class ContrastiveConfig(Settings):
    """Any loss over pairs, on the projections."""

    weight: Schedule = 1.0
    """Weight of the term, constant or by the progress of the run; 0: none."""
    loss: AnyLoss = SelfDiagonal.Config()
    """Loss over the projections of the global batch."""


class Hybrid(ImageTask):
    """An encoder with a classifier and a projection head; all views are classified and compared.

    A term with weight 0 is absent, and a head that no term uses is not trained.
    """

    class Config(ImageTask.Config):
        """total = w0 * supervised + w1 * reward + w2 * contrastive, over one encoder."""

        uses_labels: ClassVar[bool] = True

        name: Literal["hybrid"] = "hybrid"
        num_views: Count = 2
        """Views of each sample; all are classified and compared."""
        hierarchy: Any = None
        """Groups of classes, as {round: [0, 6, 8, 9], straight: [1, 4, 7]}, nested to any depth;
        null: the classes side by side."""
        supervised: SupervisedConfig | None = None
        """Cross-entropy term; null: none."""
        reward: RewardConfig | None = None
        """Policy-gradient term; null: none."""
        contrastive: ContrastiveConfig | None = None
        """Contrastive term; null: none."""

        @field_validator("supervised", "reward", "contrastive")
        @classmethod
        def _without_weight_is_absent(cls, term: Any) -> Any:
            return None if term is not None and term.weight == 0 else term

        def check(self, data: DataConfig) -> None:
            """Classes, and something to learn."""
            super().check(data)
            if data.num_classes is None:
                raise ValueError("the task hybrid classifies; set data.num_classes")
            if self.supervised is self.reward is self.contrastive is None:
                raise ValueError(
                    "task supervised, reward and contrastive are all absent or have weight 0; give "
                    "one of them a weight"
                )

        def check_labels(self, labels: Tensor) -> None:
            """Pairs of the kinds that the contrastive loss needs."""
            loss = self.contrastive and self.contrastive.loss
            if isinstance(loss, LabelledLoss.Config):
                loss.check_labels(labels, self.num_views)

    state_of_run = ("reward",)

    def __init__(
        self,
        config: Config,
        data: DataInfo,
        encoder: nn.Module | None = None,
        loss: PairLoss | None = None,
    ) -> None:
        super().__init__(config, data, encoder)
        assert data.num_classes is not None, "the config asks for classes"
        self.num_views = config.num_views
        self.hierarchy = Hierarchy.flat(data.num_classes)
        if config.hierarchy is not None:
            self.hierarchy = Hierarchy.of_tree(config.hierarchy, data.num_classes)
        self.classifier = nn.Linear(self.dim, self.hierarchy.num_nodes)
        self._weights: dict[str, float | Points] = {}
        if config.supervised is not None:
            self._weights["supervised"] = config.supervised.weight
            self.supervised = PathCrossEntropy(self.hierarchy, config.supervised)
        if config.reward is not None:
            self._weights["reward"] = config.reward.weight
            reward = load_reward(config.reward.function)
            self.reward = PolicyGradient(self.hierarchy, reward, config.reward)
            self.draws = config.reward.draws
        if config.contrastive is not None:
            self._weights["contrastive"] = config.contrastive.weight
            if loss is not None:
                check_loss(loss, config.contrastive)
            self.contrastive = build_loss(config.contrastive.loss) if loss is None else loss
        elif loss is not None:
            raise ConfigError(
                f"loss={type(loss).__name__} is for the contrastive term, which task.contrastive "
                f"leaves out; set task.contrastive={{}}, or leave out the loss"
            )
        self.head.requires_grad_("contrastive" in self._weights)
        self.classifier.requires_grad_(self.classifies)

    def inputs(self, samples: Samples, context: StepContext) -> tuple[Tensor, ...]:
        """Views of every image: [b, C, H, W] each."""
        return self.make_views(samples, self.num_views)

    def embed(self, *inputs: Tensor) -> Embeddings:
        """Projections [b, V, D] and the classifier's logits [b, V, nodes] of all V views."""
        representations = self.encoder(torch.cat(inputs))
        heads = self.head(representations), self.classifier(representations)
        return tuple(x.unflatten(0, (len(inputs), len(inputs[0]))).transpose(0, 1) for x in heads)

    def compare(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> Terms:
        """The terms that take part, each times its weight at this step."""
        terms = {
            "supervised": self._supervised,
            "reward": self._reward,
            "contrastive": self._contrastive,
        }
        values = {name: terms[name](embeddings, samples) for name in self._weights}
        if context.is_logged:
            context.metrics.update({name: float(x.detach()) for name, x in values.items()})
        weights = self._weights_at(context.progress)
        return {name: weights[name] * value for name, value in values.items()}

    def pairs(self, embeddings: Embeddings) -> tuple[Tensor, Tensor] | None:
        """The projections of the first two views."""
        return super().pairs(embeddings[0].unbind(1))

    def finish_step(self, embeddings: Embeddings, samples: Samples, context: StepContext) -> None:
        """The running mean of the reward follows."""
        super().finish_step(embeddings, samples, context)
        if "reward" in self._weights:
            self.reward.finish_step()

    @property
    def classifies(self) -> bool:
        """Whether a term trains the classifier."""
        return "supervised" in self._weights or "reward" in self._weights

    @torch.no_grad()
    def classify(self, representations: Tensor) -> Tensor:
        """Log-probabilities of the classes, of representations: [n, D] to [n, num_classes]."""
        scores = self.classifier(representations.to(device_of(self, representations.device)))
        return self.hierarchy.log_probabilities(scores).to(representations.device)

    @torch.no_grad()
    def scalars(self, context: StepContext) -> dict[str, float]:
        """Values of the terms before they are weighted, their weights, and what they count."""
        scalars = dict(context.metrics)
        weights = self._weights_at(context.progress)
        scalars |= {f"{name}_weight": weight for name, weight in weights.items()}
        if "reward" in self._weights:
            scalars |= {f"mean_{name}": float(x) for name, x in self.reward.metrics.items()}
        if "contrastive" in self._weights:
            scalars |= scalars_of(self.contrastive)
        return scalars

    def _weights_at(self, progress: float) -> dict[str, float]:
        return {name: value_at(weight, progress) for name, weight in self._weights.items()}

    def _supervised(self, embeddings: Embeddings, samples: Samples) -> Tensor:
        _, logits = embeddings
        return self.supervised(logits.flatten(0, 1), self._labels(samples))

    def _reward(self, embeddings: Embeddings, samples: Samples) -> Tensor:
        _, logits = embeddings
        keys = keyed_random.combine(self.seed, DECISION_STREAM, samples.epoch, samples.index)
        uniform = keyed_random.uniform(keys, self.num_views * self.draws)
        rows = logits.flatten(0, 1)
        return self.reward(rows, self._labels(samples), uniform.view(len(rows), self.draws))

    def _contrastive(self, embeddings: Embeddings, samples: Samples) -> Tensor:
        views = embeddings[0].unbind(1)
        return compare_views(self.contrastive, views, samples.labels, len(views))

    def _labels(self, samples: Samples) -> Tensor:
        """The label of each view, where the host has it: it has to count the labelled ones."""
        labels = samples.labels_on_host
        assert labels is not None, "the config asks for labels"
        return labels.repeat_interleave(self.num_views)
