"""Decisions that are drawn and rewarded: REINFORCE over the global batch (Williams 1992)."""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.collectives import ClassLabels, Embeddings, Group
from dist_contrastive.errors import ConfigError, NonFiniteError
from dist_contrastive.losses.hierarchy import Hierarchy
from dist_contrastive.losses.rewards import Reward, call_reward, depth_credit, reward_name
from dist_contrastive.settings import Settings, settings_from

Baseline = Literal["self_critical", "running_mean", "none"]


class PolicyGradient(nn.Module):
    """The gradient of the expected reward of a classifier's decisions, from decisions drawn.

    Equals, on the rows of all ranks together, with p of the `Hierarchy`::

        rows = labels >= 0
        log_p = hierarchy.log_probabilities(logits[rows])                              [n, C]
        decision ~ exp(log_p), S times for each row                                    [n, S]
        surrogate = -((R(decision, label) - baseline) * log_p.gather(1, decision)).mean()
        entropy = -(exp(log_p) * log_p).sum(1).mean()
        loss = surrogate - entropy_weight * entropy

    Its gradient is an unbiased estimate of that of ``-(E[R] + entropy_weight * entropy)``. Its
    value says little: look at `metrics`. Without any label on any rank it is 0, and so are all
    gradients. The gradient contract is that of `PairLoss`, for reducers that take the mean.

    Args:
        reward: what a decision is worth; see `Reward`.
        args, settings: those of the nested `Config`.
        group: process group; None means all ranks.

    Collectives: three all-gathers of a few numbers, two of them of Python objects (errors of the
    reward), and two all-reduces of at most five numbers.
    """

    class Config(Settings):
        """Policy gradient on decisions that are sampled from a classifier."""

        baseline: Baseline = "self_critical"
        """Subtracted from rewards, which leaves the expected gradient as it is. self_critical: the
        reward of the row's most probable decision (Rennie et al., arXiv 1612.00563). running_mean:
        the mean reward of earlier steps, for which `finish_step` must be called. none: 0. The first
        two make gradients less noisy where rewards have a level of their own, as negative ones do;
        where most decisions are worth 0, self_critical may be the noisiest."""
        entropy_weight: NonNegativeFloat = 0.0
        """Weight of the decisions' entropy, which keeps them from becoming certain too early."""
        momentum: float = Field(default=0.99, ge=0, lt=1)
        """Of the running mean."""

    def __init__(
        self,
        hierarchy: Hierarchy,
        reward: Reward = depth_credit,
        *args: Any,
        group: Group = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.hierarchy = hierarchy
        self.reward = reward
        self.settings = settings_from(self.Config, args, settings)
        self.running_mean = RunningMean(self.settings.momentum)
        self.group = group
        self._last: tuple[Tensor, Tensor] | None = None  # mean reward, and whether there was any
        self.metrics: dict[str, Tensor] = {}
        """Means of `reward`, `baseline`, `entropy` over the last labelled rows of all ranks."""

    def forward(self, logits: Tensor, labels: Tensor, uniform: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            logits: floating [b, num_nodes]. labels: integers [b], -1 where missing; on the CPU,
                or the host waits for a GPU to know which they are.
            uniform: floating [b, S], random numbers from 0 to below 1; each draws one decision.
                Numbers that depend on the sample alone make the draws independent of the ranks.

        Raises:
            ConfigError, NonFiniteError: inputs or rewards that cannot be used; on all ranks.
        """
        labels = collectives.as_labels(labels)
        inputs = {
            "logits": Embeddings(logits, "n K"),
            "labels": ClassLabels(labels, "n", num_classes=self.hierarchy.num_classes),
            "uniform": Embeddings(uniform, "n S"),
        }
        collectives.check_inputs(inputs, self.group)
        rows = (labels >= 0).nonzero()[:, 0]
        labels = collectives.to_device(labels[rows].long(), logits.device)
        rows = collectives.to_device(rows, logits.device)
        log_p = self.hierarchy.log_probabilities(logits[rows])
        with torch.no_grad(), collectives.raised_together(self.group):
            uniform = uniform[rows]
            decisions = draw(log_p, uniform)
            rewards, baselines = self._judge(decisions, labels, log_p)
        entropy = -(log_p.exp() * log_p).sum(1)
        self._measure(uniform, rewards, baselines, entropy.detach())
        surrogate = -((rewards - baselines) * log_p.gather(1, decisions)).mean(1)
        loss = (surrogate - self.settings.entropy_weight * entropy).sum()
        return collectives.global_mean(loss, len(log_p), self.group)

    def finish_step(self) -> None:
        """Add the mean reward of the last `forward` to the running mean; once a training step."""
        if self._last is not None:
            self.running_mean.add(*self._last)
            self._last = None

    def _judge(self, decisions: Tensor, labels: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards and baselines of decisions: [n, S] each, in the dtype of log_p."""

        def rewards_of(decisions: Tensor, labels: Tensor) -> Tensor:
            # Copies: a reward that writes into its arguments must not change the loss.
            given = decisions.clone(), labels.clone()
            return call_reward(self.reward, *given, self.hierarchy).to(log_p)

        repeated = labels.repeat_interleave(decisions.shape[1])
        rewards = rewards_of(decisions.flatten(), repeated).view_as(decisions)
        baselines = torch.zeros_like(rewards)
        if self.settings.baseline == "self_critical":
            baselines += rewards_of(log_p.argmax(1), labels)[:, None]
        elif self.settings.baseline == "running_mean":
            baselines += self.running_mean.value().to(rewards)
        return rewards, baselines

    def _measure(
        self, uniform: Tensor, rewards: Tensor, baselines: Tensor, entropy: Tensor
    ) -> None:
        """Set `metrics`; refuse random numbers out of range, and rewards that are not finite.

        Collectives: one all-reduce.
        """
        num_outside = (~((uniform >= 0) & (uniform < 1))).sum()
        num_bad = (~(rewards.isfinite() & baselines.isfinite())).sum()
        sums = [rewards.mean(1).sum(), baselines.mean(1).sum(), entropy.sum()]
        num_rows = torch.full_like(num_bad, len(rewards))
        local = torch.stack([x.double() for x in (*sums, num_rows, num_outside, num_bad)])
        totals = collectives.all_reduce_sum(local, self.group)
        collectives.check_numbers(totals[-2:], self._refuse, self.group)
        *sums, num_rows = totals[:-2].unbind()
        means = [total / num_rows.clamp(min=1) for total in sums]
        self.metrics = dict(zip(("reward", "baseline", "entropy"), means, strict=True))
        self._last = means[0], num_rows > 0

    def _refuse(self, counts: list[float]) -> None:
        num_outside, num_bad = counts
        if num_outside > 0:
            raise ConfigError(
                f"uniform holds {num_outside:g} others; give numbers from 0 to below 1"
            )
        if num_bad > 0:
            raise NonFiniteError(
                f"reward {reward_name(self.reward)} returned NaN or infinity for {num_bad:g} "
                f"decisions of the global batch; return finite numbers"
            )


def draw(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Decisions [n, S] from the probabilities exp(log_p) [n, C], one for each number of `uniform`.

    A decision is the first class up to which the probabilities sum to more than the number (the
    inverse of the distribution function), so that its probability is exact.
    """
    summed = log_p.double().exp().cumsum(1)
    # By its own last number: rounding must not leave a gap below 1.
    found = torch.searchsorted(summed / summed[:, -1:], uniform.double(), right=True)
    return found.clamp(max=log_p.shape[1] - 1)  # of numbers that are refused later


class RunningMean(nn.Module):
    """The exponential mean of values so far, as if their weights always summed to 1.

    After values v_1 to v_n it is ``sum(momentum^(n-i) * v_i) / sum(momentum^(n-i))``; 0 before the
    first. It is kept in a buffer, hence in checkpoints.
    """

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.sums: Tensor
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64))  # of values, of weights

    def value(self) -> Tensor:
        """Scalar, fp64."""
        total, weight = self.sums.unbind()
        return torch.where(weight > 0, total / weight, 0.0)

    def add(self, value: Tensor, is_there: Tensor) -> None:
        """A further value, unless `is_there` is false; both scalars, equal on all ranks."""
        one_more = torch.stack([value, torch.ones_like(value)]).to(self.sums)
        added = self.momentum * self.sums + one_more
        self.sums.copy_(torch.where(is_there.to(self.sums.device), added, self.sums))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A model cast to bf16 must not cast this: the mean would stop moving.
        sums = self.sums
        super()._apply(fn, recurse)
        self.sums = sums.to(self.sums.device)
        return self
