"""The policy gradient: its formula, its expectation, its noise, and the same over ranks."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_contrastive.errors import ConfigError, NonFiniteError
from dist_contrastive.losses.hierarchy import Hierarchy
from dist_contrastive.losses.policy_gradient import PolicyGradient, RunningMean, draw
from dist_contrastive.losses.rewards import depth_credit, load_reward
from dist_contrastive.testing import run_ranks

TREE = {"a": [4, 1], "b": [0, 2, 5], "c": [3]}
HIERARCHY = Hierarchy.of_tree(TREE, 6)
BASELINES = ("self_critical", "running_mean", "none")
EARLIER = (1.75, 1.25)  # mean rewards of two steps before
MOMENTUM = 0.9
ENTROPY_WEIGHT = 0.3


def uneven(decisions: Tensor, labels: Tensor, hierarchy: Hierarchy) -> Tensor:
    """A reward unlike any metric, with negative numbers and another dtype."""
    return (2 * depth_credit(decisions, labels, hierarchy) - 0.1 * decisions).float()


def make(baseline: str, **options) -> PolicyGradient:
    """A loss that has seen two steps."""
    loss = PolicyGradient(HIERARCHY, baseline=baseline, momentum=MOMENTUM, **options)
    for value in EARLIER:
        loss.running_mean.add(torch.tensor(value).double(), torch.tensor(True))
    return loss


# --- the formula ---------------------------------------------------------------------------------


def naive(logits: Tensor, labels: Tensor, uniform: Tensor, baseline: str) -> Tensor:
    """Row by row and decision by decision, with uneven rewards: the loss."""
    log_p = HIERARCHY.log_probabilities(logits)
    running = (MOMENTUM * EARLIER[0] + EARLIER[1]) / (MOMENTUM + 1)
    terms = []
    for i, label in enumerate(labels.tolist()):
        if label < 0:
            continue
        p = log_p[i].exp()
        greedy = naive_reward(int(p.argmax()), label)
        b = {"self_critical": greedy, "running_mean": running, "none": 0.0}[baseline]
        for u in uniform[i].tolist():
            decision, summed = 0, p[0].item()
            while summed <= u:
                decision += 1
                summed += p[decision].item()
            term = -(naive_reward(decision, label) - b) * log_p[i, decision]
            terms.append(term + ENTROPY_WEIGHT * (p * log_p[i]).sum())
    return torch.stack(terms).mean() if terms else 0 * logits.sum()


def naive_reward(decision: int, label: int) -> float:
    def group(c: int) -> str:
        return next(name for name, members in TREE.items() if c in members)

    credit = ((decision == label) + (group(decision) == group(label))) / 2
    return torch.tensor(2 * credit - 0.1 * decision, dtype=torch.float64).float().item()


SPLITS = {1: [(7,)], 2: [(4, 3), (0, 7)], 3: [(1, 4, 2), (5, 0, 2)]}
# In the split (4, 3) all labels are on rank 0; in (5, 0, 2) rank 2 has rows but no label.
LABELS = {"some": [3, -1, 5, 0, -1, -1, -1], "none": [-1] * 7, "all": [0, 1, 2, 3, 3, 5, 4]}
CASES = [(labels, baseline) for labels in LABELS for baseline in BASELINES]


def problem(labels: str) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """The same linear classifier, rows, labels and random numbers in every process."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Linear(4, HIERARCHY.num_nodes, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    rows = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    uniform = torch.rand(7, 3, generator=generator)
    return model, rows, torch.tensor(LABELS[labels]), uniform


def on_rank(split: tuple[int, ...]) -> list[tuple[Tensor, list[Tensor], dict[str, Tensor], Tensor]]:
    found = []
    for labels_name, baseline in CASES:
        model, *inputs = problem(labels_name)
        rows, labels, uniform = (x.split(split)[dist.get_rank()] for x in inputs)
        loss = make(baseline, reward=uneven, entropy_weight=ENTROPY_WEIGHT)
        value = loss(model(rows), labels, uniform)
        value.backward()
        loss.finish_step()
        slopes = [parameter.grad for parameter in model.parameters()]
        found.append((value.detach(), slopes, loss.metrics, loss.running_mean.value()))
    return found


@pytest.mark.parametrize(("world_size", "split"), [(w, s) for w in SPLITS for s in SPLITS[w]])
def test_formula_and_gradient_contract(world_size, split):
    results = run_ranks(on_rank, world_size, split)
    for place, (labels_name, baseline) in enumerate(CASES):
        model, rows, labels, uniform = problem(labels_name)
        expected = naive(model(rows), labels, uniform, baseline)
        slopes = torch.autograd.grad(expected, list(model.parameters()))
        ranks = [result[place] for result in results]
        for value, _, metrics, running in ranks:
            torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-11)
            assert value.equal(ranks[0][0])
            assert metrics == ranks[0][2]
            assert running.equal(ranks[0][3])
        for number, slope in enumerate(slopes):
            mean = torch.stack([found[1][number] for found in ranks]).mean(0)
            torch.testing.assert_close(mean, slope, rtol=1e-9, atol=1e-12)


def test_metrics_are_means_over_labelled_rows():
    model, rows, labels, uniform = problem("some")
    kept = labels >= 0
    log_p = HIERARCHY.log_probabilities(model(rows).detach())[kept]
    loss = PolicyGradient(HIERARCHY)
    loss(model(rows), labels, uniform)
    decisions = draw(log_p, uniform[kept])
    expected = {
        "reward": depth_credit(decisions, labels[kept][:, None], HIERARCHY).mean(),
        "baseline": depth_credit(log_p.argmax(1), labels[kept], HIERARCHY).mean(),
        "entropy": torch.distributions.Categorical(logits=log_p).entropy().mean(),
    }
    assert loss.metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert loss.metrics[name].item() == pytest.approx(value.item(), abs=1e-11)
        assert not loss.metrics[name].requires_grad


# --- the draw ------------------------------------------------------------------------------------


def test_decisions_have_their_probabilities():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    uniform = torch.tensor([[0.0, 0.1, 0.2501, 0.7499, 0.7501, 1 - 2**-24]])
    assert draw(p.log(), uniform).tolist() == [[1, 1, 3, 3, 4, 4]]
    # Probabilities whose sum rounding has left below 1.
    assert draw(p.log() - 1e-6, torch.tensor([[1 - 2**-24]])).item() == 4
    count = 100_000
    grid = ((torch.arange(count) + 0.5) / count)[None].double()
    p = torch.randn(1, 6).double().softmax(1)
    found = draw(p.log(), grid).flatten().bincount(minlength=6) / count
    torch.testing.assert_close(found.double(), p[0], rtol=0, atol=1.5 / count)


@pytest.mark.parametrize("wrong", [1.0, -0.1, 1.5])
def test_random_numbers_outside_their_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"uniform holds .*; give numbers from 0 to below 1"):
        PolicyGradient(HIERARCHY)(
            torch.zeros(1, 9), torch.zeros(1).long(), torch.tensor([[0.5, wrong]])
        )


# --- expectation and noise -----------------------------------------------------------------------

LOGITS = torch.tensor(
    [
        [0.5, -0.3, 0.1, 0.8, -0.4, 0.2, 0.7, -0.9, 0.4],
        [-1.0, 0.6, 0.3, 0.1, 0.9, -0.5, 0.4, 0.6, -0.2],
        [0.2, 0.4, -0.8, -0.6, 0.3, 1.1, -0.7, 0.2, 0.5],
    ],
    dtype=torch.float64,
)
TARGETS = torch.tensor([4, 0, 3])
NUM_TRIALS, NUM_DRAWS = 100_000, 2


def priced(decisions: Tensor, labels: Tensor, hierarchy: Hierarchy) -> Tensor:
    """Some rows are worth more than others, whatever is decided: what baselines are there for."""
    return depth_credit(decisions, labels, hierarchy) + 0.5 + 0.25 * labels


def exact_gradient(entropy_weight: float) -> Tensor:
    """Of -(E[R] + weight * H), the expectation summed over all classes."""
    logits = LOGITS.clone().requires_grad_()
    log_p = HIERARCHY.log_probabilities(logits)
    rewards = priced(torch.arange(6), TARGETS[:, None], HIERARCHY)
    entropy = -(log_p.exp() * log_p).sum(1)
    (-((log_p.exp() * rewards).sum(1) + entropy_weight * entropy).mean()).backward()
    return logits.grad


def trials(loss: nn.Module) -> Tensor:
    """Independent gradients of the 3 rows, [trials, 3, nodes]: each trial is a batch of its own."""
    generator = torch.Generator().manual_seed(3)
    logits = LOGITS.repeat(NUM_TRIALS, 1).requires_grad_()
    uniform = torch.rand(3 * NUM_TRIALS, NUM_DRAWS, generator=generator, dtype=torch.float64)
    loss(logits, TARGETS.repeat(NUM_TRIALS), uniform).backward()
    return NUM_TRIALS * logits.grad.view(NUM_TRIALS, *LOGITS.shape)


def worst_deviation(gradients: Tensor, exact: Tensor) -> float:
    """Of the mean from the exact gradient, in standard errors, over all components."""
    error = gradients.std(0) / math.sqrt(NUM_TRIALS)
    return ((gradients.mean(0) - exact).abs() / (error + 1e-12)).max().item()


class BaselineOfSameDraws(PolicyGradient):
    """Wrong on purpose: the mean reward of a row's draws, each of which it depends on."""

    def _judge(self, decisions: Tensor, labels: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        rewards, _ = super()._judge(decisions, labels, log_p)
        return rewards, rewards.mean(1, keepdim=True).expand_as(rewards)


@pytest.mark.parametrize("entropy_weight", [0.0, ENTROPY_WEIGHT])
def test_the_estimate_is_unbiased(entropy_weight):
    exact = exact_gradient(entropy_weight)
    for baseline in BASELINES:
        gradients = trials(make(baseline, reward=priced, entropy_weight=entropy_weight))
        assert worst_deviation(gradients, exact) < 4, baseline
        for factor in (0.9, 1.1, -1.0):  # the check is sharp enough for these
            assert worst_deviation(factor * gradients, exact) > 6, baseline
    biased = BaselineOfSameDraws(HIERARCHY, priced, entropy_weight=entropy_weight)
    assert worst_deviation(trials(biased), exact) > 6


def test_baselines_make_it_less_noisy():
    losses = {baseline: make(baseline, reward=priced) for baseline in BASELINES}
    noise = {baseline: trials(loss).var(0).sum().item() for baseline, loss in losses.items()}
    assert noise["self_critical"] < 0.5 * noise["none"]
    assert noise["running_mean"] < 0.5 * noise["none"]


# --- the running mean ----------------------------------------------------------------------------


def forward(loss: PolicyGradient, seed: int, labels: str = "all") -> tuple[float, float]:
    """Mean reward and baseline of one forward."""
    model, rows, targets, _ = problem(labels)
    uniform = torch.rand(7, 3, generator=torch.Generator().manual_seed(seed))
    loss(model(rows), targets, uniform)
    return loss.metrics["reward"].item(), loss.metrics["baseline"].item()


def step(loss: PolicyGradient, seed: int, labels: str = "all") -> tuple[float, float]:
    """The same of one training step."""
    found = forward(loss, seed, labels)
    loss.finish_step()
    return found


def test_running_mean_is_of_earlier_steps_and_resumes():
    loss = PolicyGradient(HIERARCHY, baseline="running_mean", momentum=MOMENTUM)
    rewards: list[float] = []
    for seed in range(4):
        weights = [MOMENTUM**age for age in range(len(rewards))][::-1]
        weighted = sum(w * r for w, r in zip(weights, rewards, strict=True))
        reward, baseline = step(loss, seed)
        assert baseline == pytest.approx(weighted / sum(weights) if weights else 0.0, abs=1e-12)
        rewards.append(reward)
    assert len(set(rewards)) > 1
    resumed = PolicyGradient(HIERARCHY, baseline="running_mean", momentum=MOMENTUM)
    resumed.load_state_dict(loss.state_dict())
    assert step(resumed, 4) == step(loss, 4)


def test_running_mean_skips_what_is_no_step():
    loss = PolicyGradient(HIERARCHY, baseline="running_mean", momentum=MOMENTUM)
    first, _ = step(loss, 0)
    left_out, _ = forward(loss, 1)
    last, _ = step(loss, 2)
    loss.finish_step()
    step(loss, 3, labels="none")
    assert len({first, left_out, last}) == 3
    expected = (MOMENTUM * first + last) / (MOMENTUM + 1)
    assert loss.running_mean.value().item() == pytest.approx(expected, abs=1e-12)


def test_running_mean_keeps_its_digits_in_a_half_precision_model():
    mean = RunningMean(MOMENTUM)
    mean.add(torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(True))
    assert nn.Sequential(mean).bfloat16()[0].value().item() == 1 / 3


# --- rewards -------------------------------------------------------------------------------------


def raising(decisions, labels, hierarchy):
    raise KeyError("no such\nprice")


def too_few(decisions, labels, hierarchy):
    return decisions[1:].float()


def boolean(decisions, labels, hierarchy):
    return decisions == labels


def numbers(decisions, labels, hierarchy):
    return decisions.tolist()


def infinite(decisions, labels, hierarchy):
    return 1 / (decisions - decisions).float()


def not_a_number(decisions, labels, hierarchy):
    return decisions * torch.nan


BAD_REWARDS = {  # function, error, words
    "raises": (raising, ConfigError, "raising raised KeyError ('no such\\nprice'); it must take"),
    "shape": (too_few, ConfigError, "too_few returned torch.float32 [8] for 9 decisions; return"),
    "boolean": (boolean, ConfigError, "boolean returned torch.bool [9] for 9 decisions; return"),
    "list": (numbers, ConfigError, "numbers returned list for 9 decisions; return a tensor"),
    "infinity": (infinite, NonFiniteError, "infinite returned NaN or infinity for 9 decisions"),
    "NaN": (not_a_number, NonFiniteError, "not_a_number returned NaN or infinity for 9 decisions"),
}


def refused() -> dict[str, str]:
    """Rank 1 alone has labels, hence calls the reward; all ranks must hear of it."""
    messages = {}
    for name, (reward, error, _) in BAD_REWARDS.items():
        labels = torch.tensor([0, 1, 2] if dist.get_rank() == 1 else [-1, -1])
        loss = PolicyGradient(HIERARCHY, reward=reward)
        with pytest.raises(error) as caught:
            loss(torch.zeros(len(labels), 9), labels, torch.full((len(labels), 3), 0.5))
        messages[name] = str(caught.value)
    return messages


def test_bad_rewards_on_one_rank_are_refused_on_all():
    first, second = run_ranks(refused, 2)
    for name, (*_, words) in BAD_REWARDS.items():
        assert f"reward test_policy_gradient:{words}" in second[name], name
        assert first[name].removeprefix("rank 1: ") == second[name]
        assert "\n" not in first[name]


def test_depth_credit():
    decisions, labels = torch.tensor([4, 1, 0, 3]), torch.tensor([4, 4, 4, 3])
    assert depth_credit(decisions, labels, HIERARCHY).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert depth_credit(decisions, labels, Hierarchy.flat(6)).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_rewards_are_found_by_their_path():
    assert load_reward("dist_contrastive.losses.rewards:depth_credit") is depth_credit


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("depth_credit", "is not of the form"),
        ("rewards.depth_credit:", "is not of the form"),
        ("/home/rewards.py:credit", "is not of the form"),
        ("no_such_module:credit", "cannot be imported (No module named 'no_such_module')"),
        ("dist_contrastive.losses.rewards:credit", "has no 'credit'"),
        ("dist_contrastive:__version__", "is str, not a function"),
    ],
)
def test_rewards_that_are_not_there_are_refused(path, words):
    with pytest.raises(ConfigError) as caught:
        load_reward(path)
    assert words in str(caught.value)
    assert "package.module:function" in str(caught.value)


def test_impossible_settings_are_refused():
    for options in ({"baseline": "mean"}, {"entropy_weight": -1.0}, {"momentum": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            partial(PolicyGradient, HIERARCHY)(**options)


def overwriting(decisions: Tensor, labels: Tensor, hierarchy: Hierarchy) -> Tensor:
    """As `depth_credit`, from arguments that it then makes use of as its own."""
    rewards = depth_credit(decisions, labels, hierarchy)
    decisions.zero_()
    labels.zero_()
    return rewards


def test_a_reward_may_write_into_what_it_is_given():
    encoder, x, labels, uniform = problem("all")
    values = []
    for reward in (depth_credit, overwriting):
        given = labels.clone()
        loss = PolicyGradient(HIERARCHY, reward)
        values.append(loss(encoder(x), given, uniform).item())
        assert torch.equal(given, labels)
    assert values[0] == values[1]
