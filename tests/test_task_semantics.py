"""What tasks and the trainer compute, against the same written out by hand."""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, run_forked
from formulas import naive_cosine, naive_infonce, naive_supcon, naive_triplet
from torch import Tensor, nn

from dist_contrastive import config as configs
from dist_contrastive import trainer
from dist_contrastive.config import RunConfig
from dist_contrastive.data import load_index
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.training import open_data
from dist_contrastive.metrics import read_rows
from dist_contrastive.tasks import Hybrid, Moco, Task, TwoView
from dist_contrastive.tasks.base import StepContext

TINY = "task.encoder.widths=[8, 16]"
FLAT = ("data.balance=null", "data.labels_per_class=null", "task.hierarchy=null")
EXACT = {"rel": 1e-9, "abs": 1e-12}


def load(name: str, overrides, run_dir: Path, *more: str) -> RunConfig:
    return configs.load(CONFIGS / f"{name}.yaml", overrides(run_dir, TINY, *more))


def digits_of(config: RunConfig, *numbers: int) -> Samples:
    return config.fields.read(load_index(config.data.train), numbers)


CONTEXT = StepContext()


def double(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in inputs]


def images_in(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in inputs if x.dim() == 4]


def first_samples(config: RunConfig, steps: int) -> Iterator[Samples]:
    """What the task gets in the first steps of the run."""
    data = open_data(config.data, seed=config.seed, uses_labels=config.task.uses_labels)
    with closing(iter(data.stream)) as batches:
        for batch in islice(batches, steps):
            yield data.samples(batch)


# ---------------------------------------------------------------------------- MoCo


def follow(mine: nn.Module, theirs: nn.Module, momentum: float) -> None:
    with torch.no_grad():
        for old, new in zip(mine.parameters(), theirs.parameters(), strict=True):
            old.copy_(momentum * old + (1 - momentum) * new)


def test_moco_is_a_queue_of_the_last_keys_of_a_slow_copy(overrides, tmp_path):
    """Five steps with room for the keys of three."""
    options = ["data.global_batch_size=8", "task.queue_size=24", "task.momentum=0.5"]
    config = load("digits_moco", overrides, tmp_path, *options)
    digits = digits_of(config, *range(40))
    task = config.build_task(digits).double()
    assert isinstance(task, Moco)
    encoder, head = copy.deepcopy(task.encoder), copy.deepcopy(task.head)
    start = copy.deepcopy(head.state_dict())
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.5)
    places: list[Tensor] = []
    for step in range(5):
        samples = digits.rows(torch.arange(8 * step, 8 * step + 8))
        context = task.begin_step(samples, progress=step / 5)
        views = double(task.inputs(samples, context))
        embeddings = task(*views)
        loss = task.compare(embeddings, samples, context)["contrastive"]
        queries = task.head(task.encoder(views[0]))
        with torch.no_grad():
            keys = head(encoder(views[1]))
        assert loss.item() == pytest.approx(naive_infonce(queries, keys, places).item(), **EXACT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.finish_step(embeddings, samples, context)
        momentum = 1 - (1 - 0.5) * (1 + math.cos(math.pi * step / 5)) / 2
        follow(encoder, task.encoder, momentum)
        follow(head, task.head, momentum)
        places[step % 3 : step % 3 + 1] = [keys]
        filled = torch.cat(places)
        torch.testing.assert_close(task.queue[: len(filled)], filled)
        assert not task.queue[len(filled) :].any()
        for mine, theirs in ((task.key_encoder, encoder), (task.key_head, head)):
            found = mine.module.state_dict()
            for name, x in theirs.state_dict().items():
                torch.testing.assert_close(found[name], x, msg=f"{name} after step {step}")
    assert not torch.equal(head.net[0].weight, start["net.0.weight"])


def test_momentum_follows_the_steps_of_the_run(overrides, tmp_path):
    options = ["data.global_batch_size=8", "task.queue_size=16", "task.momentum=0.5"]
    config = load("digits_moco", overrides, tmp_path, *options, "train.steps=4")
    assert trainer.train(config) == trainer.EXIT_DONE
    rows = read_rows(tmp_path)
    expected = [0.5, 0.75 - 0.25 * math.sqrt(0.5), 0.75, 0.75 + 0.25 * math.sqrt(0.5)]
    assert [row["momentum"] for row in rows] == pytest.approx(expected)
    assert [row["queued_keys"] for row in rows] == [8, 16, 16, 16]


# ---------------------------------------------------------------------------- labels and batches


@pytest.mark.parametrize("name", ["digits_semisupervised", "digits_hybrid"])
def test_hidden_labels_stay_hidden(name, overrides, tmp_path):
    """Over an epoch and a bit the task sees 3 labels of each class, the right ones."""
    options = ["data.labels_per_class=3", "data.balance=null", "data.global_batch_size=128"]
    config = load(name, overrides, tmp_path, *options)
    index = load_index(config.data.train)
    seen: dict[int, set[int]] = {}
    for samples in first_samples(config, steps=12):
        for number, label in zip(samples.index.tolist(), samples.labels.tolist(), strict=True):
            seen.setdefault(number, set()).add(label)
    assert len(seen) == len(index) == 1437
    assert all(len(labels) == 1 for labels in seen.values())
    shown = {number: labels.pop() for number, labels in seen.items()}
    labelled = {number: label for number, label in shown.items() if label != -1}
    assert Counter(labelled.values()) == dict.fromkeys(range(10), 3)
    for number, label in labelled.items():
        assert index.read(number)["json"]["label"] == label


BALANCED = {  # classes of a batch, labelled rows of each, labelled samples of a class
    "digits_supcon": (10, 24, None),
    "digits_triplet": (10, 24, None),
    "digits_semisupervised": (10, 8, 10),
    "digits_hybrid": (5, 4, 6),
}


@pytest.mark.parametrize("name", BALANCED)
def test_every_batch_is_balanced(name, overrides, tmp_path):
    classes, each, kept = BALANCED[name]
    size = configs.load(CONFIGS / f"{name}.yaml").data.global_batch_size
    options = [f"data.global_batch_size={size}", f"data.balance.classes={classes}"]
    options += [f"data.balance.samples_per_class={each}"]
    options += [f"data.labels_per_class={kept}"] if kept else []
    config = load(name, overrides, tmp_path, *options)
    known: set[int] = set()
    for samples in first_samples(config, steps=4):
        labels = samples.labels.tolist()
        counts = Counter(label for label in labels if label != -1)
        assert len(labels) == len(set(samples.index.tolist())) == size
        assert list(counts.values()) == [each] * classes
        known |= {n for n, label in zip(samples.index.tolist(), labels, strict=True) if label >= 0}
    assert kept is None or len(known) <= kept * 10


def test_rows_stay_together(overrides, tmp_path):
    for name in ("digits_captions", "digits_profiles"):
        config = load(name, overrides, tmp_path)
        samples = replace(digits_of(config, *range(12)), epoch=torch.arange(12) * 10)
        order = [7, 0, 3, 3, 11]
        chosen = samples.rows(torch.tensor(order))
        index = load_index(config.data.train)
        for place, number in enumerate(order):
            sample = index.read(number)
            assert torch.equal(chosen.images[place], sample["png"].float() / 255)
            assert chosen.labels[place] == sample["json"]["label"]
            assert (chosen.index[place], chosen.epoch[place]) == (number, 10 * number)
            if name == "digits_captions":
                assert chosen.pair[place] == sample["txt"]
            else:
                assert torch.equal(chosen.pair[place], torch.from_numpy(sample["npy"]))
        assert len(chosen.pair) == len(order)


# ---------------------------------------------------------------------------- views


VIEWS = {
    "digits_encoder": 2,
    "digits_multicrop": 4,
    "digits_supcon": 3,
    "digits_hybrid": 3,
    "digits_moco": 2,
    "digits_captions": 1,
}


def task_with_views(name: str, overrides, run_dir: Path) -> tuple[Task, Samples]:
    """Its views are all made alike: what tells them apart is their numbers."""
    more = ["task.num_views=3"] if name in ("digits_supcon", "digits_hybrid") else []
    if name == "digits_multicrop":
        same = "{noise_std: 0.1, translate: 0.125}"
        more = [f"task.views={same}", f"task.crops.views={same}"]
    config = load(name, overrides, run_dir, *more)
    samples = digits_of(config, *range(6))
    return config.build_task(samples), samples


@pytest.mark.parametrize("name", VIEWS)
def test_views_belong_to_sample_epoch_and_number(name, overrides, tmp_path):
    """Views of equal images all differ, and each comes again as it was, in any batch."""
    task, samples = task_with_views(name, overrides, tmp_path)
    alike = replace(samples, images=samples.images[:1].repeat(6, 1, 1, 1))
    later = replace(alike, epoch=alike.epoch + 1)
    views = [images_in(task.inputs(part, CONTEXT)) for part in (alike, later)]
    assert [len(found) for found in views] == [VIEWS[name]] * 2
    rows = torch.cat([*views[0], *views[1]]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows) == 2 * 6 * VIEWS[name]
    for part, found in zip((alike, later), views, strict=True):
        for again, view in zip(images_in(task.inputs(part, CONTEXT)), found, strict=True):
            assert torch.equal(again, view)
        for again, view in zip(
            images_in(task.inputs(part.rows(torch.tensor([4, 1])), CONTEXT)), found, strict=True
        ):
            assert torch.equal(again, view[[4, 1]])


@pytest.mark.parametrize("name", ["digits_encoder", "digits_multicrop", "digits_supcon"])
def test_each_view_is_projected_by_itself(name, overrides, tmp_path):
    task, samples = task_with_views(name, overrides, tmp_path)
    views = double(task.double().inputs(samples, CONTEXT))
    for embedding, view in zip(task(*views), views, strict=True):
        torch.testing.assert_close(embedding, task.head(task.encoder(view)))


def naive_ntxent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    z = F.normalize(torch.cat([a, b]))
    scores = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(a)))


def test_crops_are_compared_with_the_global_views_alone(overrides, tmp_path):
    config = load("digits_multicrop", overrides, tmp_path)
    samples = digits_of(config, *range(7))
    task = config.build_task(samples).double()
    inputs = task.inputs(samples, CONTEXT)
    assert [list(x.shape) for x in inputs] == [[7, 1, 8, 8]] * 2 + [[7, 1, 6, 6]] * 2
    views = task(*double(inputs))
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    expected = torch.stack([naive_ntxent(views[i], views[j], 0.2) for i, j in pairs]).mean()
    assert task.compare(views, samples, CONTEXT)["contrastive"].item() == pytest.approx(
        expected.item(), **EXACT
    )


def test_crops_have_settings_of_their_own(overrides, tmp_path):
    """Crops that change nothing are the images, whatever is done to the global views."""
    config = load("digits_multicrop", overrides, tmp_path, "task.crops.views={}")
    samples = digits_of(config, *range(7))
    task = config.build_task(samples)
    assert isinstance(task, TwoView)
    views = task.inputs(samples, CONTEXT)
    for crop in views[2:]:
        assert torch.equal(crop, samples.images)
    for view in views[:2]:
        assert (view != samples.images).flatten(1).any(1).all()


# ---------------------------------------------------------------------------- labelled


TEN = (3, 5, 3, 3, 0, 5, -1, 0, -1, 9)
SLANTS = (0.0, 0.02, 0.04, 0.5, 0.51, math.nan, math.nan, -0.3, -0.32, 2.0)


@pytest.mark.parametrize(
    ("name", "formula", "options"),
    [
        ("digits_supcon", naive_supcon, {"temperature": 0.1}),
        ("digits_cosine", naive_cosine, {"margin": 0.2}),
        ("digits_triplet", naive_triplet, {"margin": 0.2, "distance": "cosine", "mining": "all"}),
        ("digits_slant", naive_supcon, {"temperature": 0.1, "max_delta": 0.03}),
    ],
)
def test_labels_say_what_is_similar(name, formula, options, overrides, tmp_path):
    config = load(name, overrides, tmp_path)
    labels = torch.tensor(SLANTS if name == "digits_slant" else TEN)
    samples = replace(digits_of(config, *range(10)), labels=labels)
    task = config.build_task(samples).double()
    views = [torch.randn(10, 5, dtype=torch.float64) for _ in range(config.task.num_views)]
    found = task.compare(tuple(views), samples, CONTEXT)["contrastive"]
    expected = formula(torch.stack(views, dim=1), labels, **options)
    assert found.item() == pytest.approx(expected.item(), **EXACT)


# ---------------------------------------------------------------------------- hybrid


def hybrid(overrides, run_dir: Path, *more: str) -> tuple[Hybrid, Samples]:
    config = load("digits_hybrid", overrides, run_dir, *FLAT, *more)
    samples = replace(digits_of(config, *range(10)), labels=torch.tensor(TEN))
    task = config.build_task(samples).double()
    assert isinstance(task, Hybrid)
    return task, samples


def random_embeddings(num_views: int) -> tuple[Tensor, Tensor]:
    """Projections [10, V, 5] and logits [10, V, 10]."""
    return tuple(torch.randn(10, num_views, size, dtype=torch.float64) * 2 for size in (5, 10))


def recorded_numbers(task: Hybrid) -> list[Tensor]:
    """Gets the uniform numbers of each call of the reward term."""
    found: list[Tensor] = []
    task.reward.register_forward_pre_hook(lambda _, args: found.append(args[2]))
    return found


def test_both_heads_see_each_view_in_its_place(overrides, tmp_path):
    task, samples = hybrid(overrides, tmp_path, "task.num_views=3")
    views = double(task.inputs(samples, CONTEXT))
    projections, logits = task(*views)
    for number, view in enumerate(views):
        torch.testing.assert_close(projections[:, number], task.head(task.encoder(view)))
        torch.testing.assert_close(logits[:, number], task.classifier(task.encoder(view)))


def test_supervised_and_contrastive_terms(overrides, tmp_path):
    weights = ["task.supervised.weight=3", "task.contrastive.weight=[[0, 0], [1, 2]]"]
    task, samples = hybrid(overrides, tmp_path, "task.num_views=3", *weights)
    projections, logits = random_embeddings(3)
    context = task.begin_step(samples, progress=0.25)
    terms = task.compare((projections, logits), samples, context)
    rows = [(i, v) for i, label in enumerate(TEN) if label >= 0 for v in range(3)]
    supervised = sum(-logits[i, v].log_softmax(0)[TEN[i]].item() for i, v in rows) / len(rows)
    contrastive = naive_supcon(projections, samples.labels, temperature=0.1)
    assert terms["supervised"].item() == pytest.approx(3 * supervised, **EXACT)
    assert terms["contrastive"].item() == pytest.approx(0.5 * contrastive.item(), **EXACT)


def naive_reward(
    logits: Tensor, uniform: Tensor, baseline: float | None, entropy_weight: float
) -> dict[str, float]:
    """The term and its means for logits [10, V, C] and numbers [10, V, S]; right is worth 1.

    Args:
        baseline: None for that of the most probable class.
    """
    losses, rewards, baselines, entropies = [], [], [], []
    for i, v in [
        (i, v) for i, label in enumerate(TEN) if label >= 0 for v in range(uniform.shape[1])
    ]:
        p = logits[i, v].softmax(0).tolist()
        entropies.append(-sum(x * math.log(x) for x in p))
        greedy = 1.0 if p.index(max(p)) == TEN[i] else 0.0
        for number in uniform[i, v].tolist():
            decision = next(c for c in range(10) if sum(p[: c + 1]) > number)
            rewards.append(1.0 if decision == TEN[i] else 0.0)
            baselines.append(greedy if baseline is None else baseline)
            losses.append(-(rewards[-1] - baselines[-1]) * math.log(p[decision]))
    mean = {"reward": rewards, "baseline": baselines, "entropy": entropies}
    means = {name: sum(x) / len(x) for name, x in mean.items()}
    return {**means, "loss": sum(losses) / len(losses) - entropy_weight * means["entropy"]}


@pytest.mark.parametrize(
    ("baseline", "entropy_weight"),
    [("none", 0.0), ("none", 0.3), ("self_critical", 0.3), ("running_mean", 0.1)],
)
def test_reward_term(baseline, entropy_weight, overrides, tmp_path):
    """Four steps; the running mean is that of the steps before, newer ones weighing more."""
    options = f"baseline: {baseline}, entropy_weight: {entropy_weight}, draws: 3, weight: 2"
    task, samples = hybrid(overrides, tmp_path, f"task.reward={{{options}}}")
    numbers = recorded_numbers(task)
    earlier: list[float] = []
    for step in range(4):
        samples = replace(samples, epoch=samples.epoch + 1)
        embeddings = random_embeddings(2)
        found = task.compare(embeddings, samples, CONTEXT)["reward"].item()
        fixed: float | None = None if baseline == "self_critical" else 0.0
        if baseline == "running_mean" and earlier:
            weights = [0.99 ** (step - 1 - i) for i in range(step)]
            fixed = sum(w * r for w, r in zip(weights, earlier, strict=True)) / sum(weights)
        uniform = numbers[step].view(10, 2, 3)
        expected = naive_reward(embeddings[1], uniform, fixed, entropy_weight)
        assert found == pytest.approx(2 * expected["loss"], **EXACT)
        scalars = task.scalars(CONTEXT)
        for name in ("reward", "baseline", "entropy"):
            assert scalars[f"mean_{name}"] == pytest.approx(expected[name], **EXACT)
        earlier.append(expected["reward"])
        task.finish_step(embeddings, samples, CONTEXT)
    assert len(set(earlier)) > 1


def test_entropy_is_weighed(overrides, tmp_path):
    """The same decisions with and without it differ by weight times entropy."""
    embeddings, found = random_embeddings(2), []
    for weight in (0.0, 0.3):
        task, samples = hybrid(overrides, tmp_path, f"task.reward.entropy_weight={weight}")
        context = task.begin_step(samples, progress=1.0)  # where the config's reward weighs 0.5
        found.append(task.compare(embeddings, samples, context)["reward"].item())
    log_p = embeddings[1][torch.tensor(TEN) >= 0].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    assert found[0] - found[1] == pytest.approx(0.5 * 0.3 * entropy, **EXACT)


def test_every_decision_has_a_number_of_its_own(overrides, tmp_path):
    """Of equal images too; and the same one again, in any batch and on any rank."""
    task, samples = hybrid(overrides, tmp_path, "task.reward.draws=4", "task.num_views=3")
    samples = replace(samples, images=samples.images[:1].repeat(10, 1, 1, 1))
    later = replace(samples, epoch=samples.epoch + 1)
    numbers = recorded_numbers(task)
    some = torch.tensor([8, 2, 5])
    embeddings = random_embeddings(3)
    for part in (samples, later, samples):
        task.compare(embeddings, part, CONTEXT)
    task.compare(tuple(x[some] for x in embeddings), samples.rows(some), CONTEXT)
    first, of_later, again, of_some = (x.view(-1, 3, 4) for x in numbers)
    drawn = torch.cat([first, of_later])
    assert len(drawn.unique()) == drawn.numel() == 2 * 10 * 3 * 4
    assert torch.equal(again, first)
    assert torch.equal(of_some, first[some])
    assert drawn.min() < 0.1 < 0.9 < drawn.max()


# ---------------------------------------------------------------------------- a run's own numbers


STEPS = 8
RUN = (
    *(
        "train.steps=8",
        "data.global_batch_size=64",
        "data.balance={classes: 5, samples_per_class: 4}",
    ),
    *("task.supervised.weight=[[0.25, 2], [0.75, 1]]", "task.contrastive.weight=0.5"),
    "task.reward={baseline: running_mean, weight: [[0, 0.5], [0.5, 1.5]]}",
)
WEIGHTS = {  # at steps done / 8
    "supervised": [2, 2, 2, 1.75, 1.5, 1.25, 1, 1],
    "reward": [0.5, 0.75, 1, 1.25, 1.5, 1.5, 1.5, 1.5],
    "contrastive": [0.5] * STEPS,
}


@pytest.fixture(scope="module")
def metrics(tmp_path_factory, overrides) -> list[dict]:
    """Metrics of a hybrid run on one rank."""
    folder = tmp_path_factory.mktemp("hybrid") / "run"
    assert trainer.train(load("digits_hybrid", overrides, folder, *RUN)) == trainer.EXIT_DONE
    found = read_rows(folder)
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize("term", WEIGHTS)
def test_weights_follow_the_steps_of_the_run(term, metrics):
    assert [row[f"{term}_weight"] for row in metrics] == pytest.approx(WEIGHTS[term])
    for row, weight in zip(metrics, WEIGHTS[term], strict=True):
        assert row[f"loss/{term}"] == pytest.approx(weight * row[term], rel=1e-5)


def test_baseline_of_a_run_follows_its_rewards(metrics):
    rewards = [row["mean_reward"] for row in metrics]
    assert len(set(rewards)) > 1
    for step, row in enumerate(metrics):
        weights = [0.99 ** (step - 1 - i) for i in range(step)]
        total = sum(w * r for w, r in zip(weights, rewards, strict=False))
        assert row["mean_baseline"] == pytest.approx(total / sum(weights) if step else 0.0)


@pytest.mark.parametrize("term", WEIGHTS)
def test_norm_of_a_term_is_that_of_the_term_alone(term, metrics, overrides, tmp_path):
    others = [f"task.{other}=null" for other in WEIGHTS if other != term]
    config = load("digits_hybrid", overrides, tmp_path, *RUN, *others)
    task = config.build_task(digits_of(config, 0))
    (samples,) = first_samples(config, steps=1)
    embeddings = [x.detach().requires_grad_() for x in task(*task.inputs(samples, CONTEXT))]
    (loss,) = task.compare(tuple(embeddings), samples, CONTEXT).values()
    loss.backward()
    square = sum(x.grad.square().sum().item() for x in embeddings if x.grad is not None)
    assert metrics[0][f"embedding_grad_norm/{term}"] == pytest.approx(math.sqrt(square), rel=1e-5)
    assert metrics[0][f"loss/{term}"] == pytest.approx(loss.item(), rel=1e-5)


def test_norms_do_not_depend_on_the_ranks(metrics, overrides, tmp_path):
    """Two ranks, of which the first has all labels."""
    folder = tmp_path / "run"
    options = overrides(folder, TINY, *RUN)
    done = run_forked("train", CONFIGS / "digits_hybrid.yaml", *options, number=2)
    assert done.returncode == 0, done.stderr
    for name in (*(f"embedding_grad_norm/{term}" for term in WEIGHTS), "grad_norm"):
        several = [row[name] for row in read_rows(folder)]
        assert several == pytest.approx([row[name] for row in metrics], rel=1e-4), name
