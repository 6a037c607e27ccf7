"""Online probe and online kNN: classes from the features of the training batches, while it trains.

Features are those that the encoder makes of the first view of each sample in the step itself,
detached: no further pass, and no gradient into the encoder. What is reported is an accuracy before
a sample has been learned from, over about the last ten steps. Nothing is drawn at random.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.data.fields import Samples
from dist_contrastive.evaluation.encoders import NEIGHBOURS
from dist_contrastive.evaluation.measure import OnlineName
from dist_contrastive.tasks import ImageTask, Task

QUEUE = 4096  # rows that an online kNN looks among
_DECAY = 0.9  # a step, of what is averaged over the last steps
_LR = 0.5  # over D: an update changes a logit by about as much at most
_BETAS = 0.9, 0.99
_EPS = 1e-5  # a smaller gradient may be rounding alone
_CHUNK = 1024  # rows that are compared with the queue at a time

State = dict[str, Any]


class Learner(ABC):
    """Classes from features; its state is the same on all ranks."""

    @abstractmethod
    def local(self, features: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """What this rank adds to the sum over ranks: its hits and labelled rows, and more.

        Args:
            features: [b, D] fp32. labels: int64 [b], below 0 where missing. index: int64 [b].
        Returns:
            fp32 [2 + n].
        """

    @abstractmethod
    def update(self, rest: Tensor) -> None:
        """Learn from the sum over ranks [n], without the first two."""

    @abstractmethod
    def state(self) -> State:
        """Tensors and numbers, as they are."""


class Probe(Learner):
    """Multinomial logistic regression by Adam, one update a step, its gradient the mean over the
    labelled rows of the global batch. Features are less their mean and divided by their overall
    deviation, as `linear_probe` has them; both are of the last steps."""

    def __init__(self, dim: int, num_classes: int, device: torch.device) -> None:
        self.weight = torch.zeros(num_classes, dim + 1, device=device)  # the last column: biases
        self._moments = torch.zeros(dim + 2, dtype=torch.float64, device=device)
        self._averages = torch.zeros(2, num_classes, dim + 1, device=device)  # gradient, square
        self._steps = 0  # not on the device, as torch.optim.Adam would read it at every step

    def local(self, features: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        known = (labels >= 0).float()
        z = self._standardised(features)
        logits = z @ self.weight.T
        hits = ((logits.argmax(1) == labels) * known).sum()
        target = labels.clamp(min=0)[:, None]
        grad_logits = logits.softmax(1).scatter_add(1, target, -torch.ones_like(target).float())
        grad = (grad_logits * known[:, None]).T @ z
        moments = known @ features, (known @ features.square()).sum()
        return torch.cat([x.flatten() for x in (hits, known.sum(), grad, *moments, known.sum())])

    def update(self, rest: Tensor) -> None:
        grad, moments = rest[: self.weight.numel()], rest[self.weight.numel() :]
        is_standardised = self._moments[-1] > 0  # the first step finds the mean alone
        grad = torch.where(is_standardised, grad / moments[-1].clamp(min=1), 0.0)
        self._adam(grad.view_as(self.weight))
        self._moments.mul_(_DECAY).add_(moments)

    def state(self) -> State:
        tensors = {"weight": self.weight, "averages": self._averages, "moments": self._moments}
        return {**tensors, "steps": self._steps}

    def load(self, state: State) -> None:
        """Go on from a state."""
        self.weight.copy_(state["weight"])
        self._averages.copy_(state["averages"])
        self._moments.copy_(state["moments"])
        self._steps = int(state["steps"])

    def _adam(self, grad: Tensor) -> None:
        self._steps += 1
        first, second = self._averages
        first.lerp_(grad, 1 - _BETAS[0])
        second.lerp_(grad.square(), 1 - _BETAS[1])
        corrected = [
            x / (1 - beta**self._steps) for x, beta in zip((first, second), _BETAS, strict=True)
        ]
        rate = _LR / (self.weight.shape[1] - 1)
        self.weight.sub_(rate * corrected[0] / (corrected[1].sqrt() + _EPS))

    def _standardised(self, features: Tensor) -> Tensor:
        """Features [b, D + 1], of which the last is 1."""
        total, squares, count = self._moments.split([features.shape[1], 1, 1])
        mean = total / count.clamp(min=1)
        variance = (squares / count.clamp(min=1) - mean.square().sum()) / len(mean)
        scale = variance.clamp(min=1e-12).rsqrt()
        return F.pad(((features - mean) * scale).float(), (0, 1), value=1.0)


class Knn(Learner):
    """The class of most of the nearest rows in a queue of past batches, as `knn_predict` has it;
    rows of the sample itself do not count."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self.rows = torch.zeros(QUEUE, dim, device=device)
        self._about = torch.full((QUEUE, 2), -1, device=device)  # label and number of the sample
        self._position = 0

    def local(self, features: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        rows, about = F.normalize(features, dim=1), torch.stack([labels, index], dim=1)
        counts = [self._hits(*x) for x in zip(rows.split(_CHUNK), about.split(_CHUNK), strict=True)]
        self._append(collectives.all_gather_rows(rows)[0], collectives.all_gather_rows(about)[0])
        return torch.stack(counts).sum(0)

    def update(self, rest: Tensor) -> None:
        """Nothing: what it knows it has gathered."""

    def state(self) -> State:
        return {"rows": self.rows, "about": self._about, "position": self._position}

    def load(self, state: State) -> None:
        """Go on from a state."""
        self.rows.copy_(state["rows"])
        self._about.copy_(state["about"])
        self._position = int(state["position"])

    def _hits(self, rows: Tensor, about: Tensor) -> Tensor:
        """How many classes are found, and of how many rows; those with too few neighbours, as at
        the start, do not count."""
        (labels, index), (key_labels, key_index) = about.T, self._about.T
        unfit = (key_labels < 0) | (index[:, None] == key_index)
        nearest = (rows @ self.rows.T).masked_fill(unfit, -torch.inf).topk(NEIGHBOURS, dim=1)
        found = key_labels[nearest.indices]
        # One vote each; halves of halves, which sum to less than a vote, decide ties.
        weights = 1 + 0.5 ** torch.arange(2, NEIGHBOURS + 2, device=rows.device)
        votes = (found[:, :, None] == found[:, None, :]).float() @ weights
        predicted = found.gather(1, votes.argmax(1, keepdim=True))[:, 0]
        known = (labels >= 0) & (nearest.values[:, -1] > -torch.inf)
        return torch.stack([((predicted == labels) & known).sum(), known.sum()]).float()

    def _append(self, rows: Tensor, about: Tensor) -> None:
        rows, about = rows[-QUEUE:], about[-QUEUE:]
        places = torch.arange(self._position, self._position + len(rows), device=rows.device)
        self.rows[places % QUEUE], self._about[places % QUEUE] = rows, about
        self._position = (self._position + len(rows)) % QUEUE


class Online:
    """The learners of a run, `evaluate.online`, and the features that they are given.

    Args:
        task: whose networks they watch; nothing of it is changed.
        names: none: nothing is watched.
    """

    def __init__(
        self, task: Task, names: Sequence[OnlineName], num_classes: int | None, device: torch.device
    ) -> None:
        self.learners: dict[str, Probe | Knn] = {}
        self._features: list[Tensor] = []
        self._rows: int | None = None  # of the samples of which the next features are
        self._is_cached = False
        if not names:
            return
        assert isinstance(task, ImageTask), "the config is checked"
        assert num_classes is not None, "the config is checked"
        for name in names:
            is_probe = name == "probe"
            self.learners[name] = (
                Probe(task.dim, num_classes, device) if is_probe else Knn(task.dim, device)
            )
        self._counts = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
        task.register_forward_pre_hook(self._embeds)
        task.encoder.register_forward_hook(self._encoded)

    def begin_step(self) -> None:
        """Forget the features of a step that changed nothing."""
        self._features, self._is_cached = [], False

    def observe(self, samples: Samples) -> None:
        """Measure and learn from this step's features of this rank's rows.

        Collectives: a sum over ranks of as many numbers as a probe has; two gathers of rows of kNN.
        """
        if not self.learners:
            return
        features, labels = torch.cat(self._features), samples.labels
        assert labels is not None, "the config asks for labels"
        self.begin_step()
        learners = list(self.learners.values())
        with torch.no_grad():
            parts = [x.local(features, labels, samples.index) for x in learners]
            total = collectives.all_reduce_sum(torch.cat(parts))
            # A feature that is not finite, of any rank, teaches nothing.
            total = torch.where(total.isfinite().all(), total, 0.0)
            sums = total.split([len(part) for part in parts])
            self._counts.mul_(_DECAY).add_(torch.stack([x[:2] for x in sums]))
            for learner, x in zip(learners, sums, strict=True):
                learner.update(x[2:])

    def numbers(self) -> dict[str, float]:
        """Accuracies by name, as ``{"online/knn": 0.8}``; none before there is one."""
        if not self.learners:
            return {}
        counts = dict(zip(self.learners, self._counts.tolist(), strict=True))
        return {f"online/{name}": hits / rows for name, (hits, rows) in counts.items() if rows}

    def state(self) -> State:
        """A copy on the CPU, for checkpoints."""
        if not self.learners:
            return {}
        states = {name: learner.state() for name, learner in self.learners.items()}
        return {**_copied(states), "counts": dict(zip(states, self._counts.tolist(), strict=True))}

    def load(self, state: State) -> None:
        """Go on from a state; a learner that it does not hold begins anew."""
        for number, (name, learner) in enumerate(self.learners.items()):
            if name in state:
                learner.load(state[name])
                self._counts[number] = self._counts.new_tensor(state["counts"][name])

    def _embeds(self, task: Task, inputs: tuple[Tensor, ...]) -> None:
        """The task begins to embed rows; of gradient caching the pass without a graph counts."""
        self._is_cached |= not torch.is_grad_enabled()
        is_watched = task.training and not (self._is_cached and torch.is_grad_enabled())
        self._rows = len(inputs[0]) if is_watched else None

    def _encoded(self, _: torch.nn.Module, __: Any, output: Tensor) -> None:
        """The encoder's first output since then, whose first rows are of the first views."""
        if self._rows is not None:
            self._take(output.detach()[: self._rows])
            self._rows = None

    def _take(self, features: Tensor) -> None:
        self._features.append(features.float())


def _copied(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in state.items()}
    return state.detach().to("cpu", copy=True) if isinstance(state, Tensor) else state
