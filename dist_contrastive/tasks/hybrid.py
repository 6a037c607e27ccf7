"""Supervised, reward and contrastive terms over one encoder (seed of this project):

total = w0 * supervised + w1 * reward + w2 * contrastive
"""

import torch
from torch import Tensor, nn

from dist_contrastive.config import HybridSettings
from dist_contrastive.config.tasks import RewardSettings
from dist_contrastive.data import keyed_random
from dist_contrastive.data.fields import Samples
from dist_contrastive.losses import build_loss
from dist_contrastive.losses.classification import PathCrossEntropy
from dist_contrastive.losses.hierarchy import Hierarchy
from dist_contrastive.losses.policy_gradient import PolicyGradient
from dist_contrastive.losses.rewards import load_reward
from dist_contrastive.losses.views import compare_views
from dist_contrastive.schedule import Points, value_at
from dist_contrastive.tasks.base import Embeddings, StepContext, Terms, scalars_of
from dist_contrastive.tasks.images import ImageTask

DECISION_STREAM = 0x6465636964  # "decid": keeps these keys apart from other uses of the same seed


class Hybrid(ImageTask):
    """An encoder with a classifier and a projection head; all views are classified and compared.

    A term with weight 0 is absent, and a head that no term uses is not trained.
    """

    def __init__(
        self, settings: HybridSettings, example: Samples, num_classes: int, seed: int
    ) -> None:
        super().__init__(settings, example, seed)
        self.num_views = settings.num_views
        self.hierarchy = Hierarchy.flat(num_classes)
        if settings.hierarchy is not None:
            self.hierarchy = Hierarchy.of_tree(settings.hierarchy, num_classes)
        self.classifier = nn.Linear(self.encoder.dim, self.hierarchy.num_nodes)
        self._weights: dict[str, float | Points] = {}
        if settings.supervised is not None:
            self._weights["supervised"] = settings.supervised.weight
            self.supervised = PathCrossEntropy(self.hierarchy, settings.supervised)
        if settings.reward is not None:
            self._weights["reward"] = settings.reward.weight
            self.reward = _policy_gradient(settings.reward, self.hierarchy)
            self.draws = settings.reward.draws
        if settings.contrastive is not None:
            self._weights["contrastive"] = settings.contrastive.weight
            self.contrastive = build_loss(settings.contrastive.loss)
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

    def classify(self, images: Tensor) -> Tensor:
        """Log-probabilities of the classes: [n, C, H, W] to [n, num_classes]."""
        with torch.no_grad():
            return self.hierarchy.log_probabilities(self.classifier(self.represent(images)))

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
        """The label of each view."""
        assert samples.labels is not None, "the config asks for labels"
        return samples.labels.repeat_interleave(self.num_views)


def _policy_gradient(settings: RewardSettings, hierarchy: Hierarchy) -> PolicyGradient:
    return PolicyGradient(hierarchy, load_reward(settings.function), settings)
