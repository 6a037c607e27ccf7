"""Online probe and kNN: their formulas, on any ranks and engine, and a run that is not changed."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS
from test_engines import MICRO_BATCHES, config_of, with_engine
from torch import Tensor, nn

from dist_contrastive import checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.backend import Backend
from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation import knn_predict
from dist_contrastive.metrics import read_rows
from dist_contrastive.testing import run_ranks
from dist_contrastive.trainer.online import QUEUE, Knn, Probe
from dist_contrastive.trainer.run import open_run
from dist_contrastive.trainer.step import backward, train_step

ONLINE = "evaluate={online: [probe, knn]}"
LEARNS = ("train.steps=5", "train.log_every=2", "train.save_every=2")
CPU = torch.device("cpu")


def features_of(rows: int, dim: int = 6, classes: int = 3, seed: int = 1):
    """Blobs far from the origin and of a large scale, with labels and numbers of samples."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(rows, dim, generator=generator)
    return 40 + 10 * (centres[labels] + 0.2 * noise), labels, torch.arange(rows)


# ------------------------------------------------------------------ formulas


def test_a_probe_is_a_linear_layer_by_adam():
    """On features less the mean, over the deviation, of the steps before, with weights 0.9^age; the
    first step finds the mean alone; a sample without label counts nowhere."""
    probe, linear = Probe(6, 3, CPU), nn.Linear(6, 3)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    adam = torch.optim.Adam(linear.parameters(), lr=0.5 / 6, betas=(0.9, 0.99), eps=1e-5)
    before: list[Tensor] = []
    for step in range(6):
        x, labels, index = features_of(20 + step, seed=step)
        labels[step] = -1
        known = labels >= 0
        local = probe.local(x, labels, index)
        loss = linear(torch.zeros(1, 6)).sum() * 0
        if before:
            weights = torch.cat(
                [torch.full((len(b),), 0.9**age) for age, b in enumerate(reversed(before))]
            )
            weights /= weights.sum()
            rows = torch.cat(before[::-1]).double()
            mean = weights.double() @ rows
            scale = (weights.double() @ (rows - mean).square()).mean().sqrt()
            logits = linear(((x - mean) / scale).float())
            assert local[0] == (logits.argmax(1) == labels)[known].sum()
            loss = F.cross_entropy(logits[known], labels[known])
        assert local[1] == known.sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        probe.update(local[2:])
        before.append(x[known])
        torch.testing.assert_close(
            probe.weight[:, :6], linear.weight.detach(), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(probe.weight[:, 6], linear.bias.detach(), rtol=1e-3, atol=1e-4)
    assert probe.weight.abs().max() > 0.1


def test_knn_is_that_of_evaluation():
    """Among past rows; one of the sample itself, and one without label, is no neighbour."""
    knn = Knn(6, CPU)
    keys, key_labels, key_index = features_of(300)
    keys += 30 * torch.randn(300, 6, generator=torch.Generator().manual_seed(5))
    key_labels[::7] = -1
    for rows in torch.arange(300).split(128):
        knn.local(keys[rows], key_labels[rows], key_index[rows])
    x, labels, index = keys + 3.0, key_labels.clone(), key_index
    hits, rows = knn.local(x, labels, index).tolist()
    found = 0
    for i in range(300):
        fit = (key_labels >= 0) & (key_index != i)
        predicted = knn_predict(keys[fit], key_labels[fit], x[i : i + 1])
        found += int(labels[i] >= 0 and predicted[0] == labels[i])
    assert (hits, rows) == (found, int((labels >= 0).sum()))
    assert 0.3 * rows < hits < 0.95 * rows


def test_a_queue_holds_the_last_rows_and_needs_five():
    knn = Knn(2, CPU)
    x = torch.nn.functional.normalize(torch.randn(QUEUE + 30, 2), dim=1)
    labels, index = torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x))
    assert knn.local(x[:4], labels[:4], index[:4]).tolist() == [0, 0]
    assert knn.local(x[4:6], labels[4:6], index[4:6]).tolist() == [0, 0]  # 4 are no 5
    assert knn.local(x[6:7], labels[6:7], index[6:7]).tolist() == [1, 1]
    knn.local(x[7:], labels[7:], index[7:])
    torch.testing.assert_close(knn.rows.roll(-7, 0), x[30:])


# ------------------------------------------------------------------ in runs


def trained(config, *more: str) -> int:
    return trainer.train(config)


def states(run_dir: Path) -> dict:
    """State of what learns online, in the newest checkpoint."""
    return checkpoint.newest(run_dir / "checkpoints").optimizer_state()["online"]


def online_rows(run_dir: Path) -> dict[int, dict[str, float]]:
    return {
        int(row["step"]): {k: v for k, v in row.items() if k in ("online/probe", "online/knn")}
        for row in read_rows(run_dir)
    }


def assert_same_state(found: dict, expected: dict, **tolerance: float) -> None:
    probe, other = found["probe"], expected["probe"]
    pairs = [(probe[name], other[name]) for name in ("weight", "averages", "moments")]
    pairs += [(found["knn"]["rows"], expected["knn"]["rows"])]
    for a, b in pairs:
        torch.testing.assert_close(a, b, **tolerance)
    assert torch.equal(found["knn"]["about"], expected["knn"]["about"])
    assert found["knn"]["position"] == expected["knn"]["position"] > 0
    assert probe["steps"] == other["steps"] > 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory, overrides) -> dict[str, Path]:
    """Folders of a run without, with, stopped twice, in micro-batches."""
    root = tmp_path_factory.mktemp("online")
    options = {"without": (), "with": (ONLINE,), "stopped": (ONLINE,)}
    for name, more in options.items():
        config = config_of("two_view", overrides, root / name, *LEARNS, *more)
        for after in (1, 2, None) if name == "stopped" else (None,):
            trainer.train(config, stop_after=after)
    return {name: root / name for name in options}


@pytest.mark.parametrize("name", ["with", "stopped"])
def test_weights_are_bitwise_those_of_a_run_without(name, runs):
    expected, found = (
        checkpoint.newest(runs[x] / "checkpoints").weights() for x in ("without", name)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], x) for key, x in expected.items())
    assert states(runs["without"]) == {}


def test_a_stop_changes_nothing(runs):
    assert_same_state(states(runs["stopped"]), states(runs["with"]), rtol=0, atol=0)
    assert states(runs["stopped"])["counts"] == states(runs["with"])["counts"]
    rows = online_rows(runs["with"])
    assert online_rows(runs["stopped"]) == rows
    assert set(rows[5]) == {"online/probe", "online/knn"}
    assert all(0 <= x <= 1 for x in rows[5].values())
    assert states(runs["with"])["probe"]["weight"].abs().max() > 0.01
    assert all("online_s" in row for row in read_rows(runs["with"]))
    assert all("online_s" not in row for row in read_rows(runs["without"]))


def on_ranks(cases: list) -> list[tuple[dict, dict[str, float]]]:
    """State of this rank, as it would be saved, and its numbers."""
    found = []
    for config in cases:
        backend = Backend(config.backend)
        run = open_run(config, backend)
        for taken in run.data.batches(backend.device):
            train_step(run, taken.samples, taken.consumed, is_logged=False)
            if run.progress.step == config.train.steps:
                break
        found.append((run.online.state(), run.online.numbers()))
        backend.close()
    return found


@pytest.mark.parametrize(
    ("ranks", "stage", "micro"),
    [
        (1, 0, 5),
        (3, 0, None),
        (2, 3, 5),
        (2, 1, None),
        pytest.param(6, 2, 3, marks=pytest.mark.slow),  # as many as there are lanes
    ],
)
def test_it_is_the_same_on_any_ranks(ranks, stage, micro, runs, overrides, tmp_path):
    config = config_of("two_view", overrides, tmp_path / "run", *LEARNS, ONLINE)
    expected = states(runs["with"]), online_rows(runs["with"])[5]
    results = [x[0] for x in run_ranks(on_ranks, ranks, [with_engine(config, stage, micro)])]
    for state, numbers in results:
        assert_same_state(state, results[0][0], rtol=0, atol=0)  # of ranks bitwise
        assert_same_state(state, expected[0], rtol=2e-3, atol=2e-3)
        assert numbers == pytest.approx(expected[1], abs=0.05)


def features_and_views(config) -> list[tuple[Tensor, Tensor]]:
    """Features of a step, and what the encoder makes of the first views."""
    backend = Backend(config.backend)
    run = open_run(config, backend)
    samples = next(run.data.batches(backend.device)).samples
    micro = config.train.micro_batch_size
    context = run.task.begin_step(samples, micro_batch_size=micro)
    backward(run, samples, context)
    with torch.no_grad():
        expected = run.task.encoder(run.task.inputs(samples, context)[0])
    found = torch.cat(run.online._features)
    backend.close()
    return found, expected


@pytest.mark.parametrize("micro", MICRO_BATCHES.values(), ids=MICRO_BATCHES)
@pytest.mark.parametrize("task", ["two_view", "crops", "paired", "labelled", "hybrid", "moco"])
def test_features_are_those_of_the_first_views(task, micro, overrides, tmp_path):
    more = ["data.num_classes=10", "data.label=json.label"]
    if task == "crops":
        task, more = "two_view", ["task.crops={count: 2, views: {size: 6}}"]
    config = config_of(task, overrides, tmp_path / "run", ONLINE, *more)
    found, expected = features_and_views(with_engine(config, 0, micro))
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_teaches_nothing(overrides, tmp_path):
    config = config_of("two_view", overrides, tmp_path / "run", *LEARNS, ONLINE)
    backend = Backend(config.backend)
    run = open_run(config, backend)
    batches = run.data.batches(backend.device)
    for number, taken in enumerate(batches):
        if number == 2:
            before = run.online.state()["probe"]["moments"].clone()
            run.online.begin_step()
            run.online._features = [torch.full((len(taken.samples.images), 16), math.nan)]
            run.online.observe(taken.samples)
            break
        train_step(run, taken.samples, taken.consumed, is_logged=False)
    state = run.online.state()
    assert state["probe"]["weight"].isfinite().all()
    torch.testing.assert_close(state["probe"]["moments"], 0.9 * before)
    backend.close()


def test_a_learner_that_is_added_later_begins_then(runs, overrides, tmp_path):
    config = config_of("two_view", overrides, tmp_path / "run", *LEARNS)
    assert trainer.train(config, stop_after=2) == trainer.EXIT_REQUEUE
    config = config_of("two_view", overrides, tmp_path / "run", *LEARNS, ONLINE)
    assert trainer.train(config) == 0
    assert states(tmp_path / "run")["probe"]["steps"] == 3
    weights = checkpoint.newest(tmp_path / "run" / "checkpoints").weights()
    expected = checkpoint.newest(runs["with"] / "checkpoints").weights()
    assert all(torch.equal(weights[name], x) for name, x in expected.items())


def test_the_best_checkpoint_by_what_learns_online(overrides, tmp_path):
    best = "train.keep_best={metric: online/knn, mode: max}", "train.keep_last=1"
    config = config_of("two_view", overrides, tmp_path / "run", *LEARNS, ONLINE, *best)
    assert trained(config) == 0
    assert checkpoint.best(tmp_path / "run" / "checkpoints", "max").score > 0


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ("digits_encoder", ("data.label=null", "data.num_classes=null"), "data.label and data.num"),
        ("digits_slant", (), "data.num_classes"),
        ("digits_generator", (), "encoder of images"),
        ("digits_encoder", ("evaluate.online=[knn, knn]",), "twice"),
        ("digits_encoder", ("evaluate.online=[svm]",), "evaluate.online"),
    ],
)
def test_what_cannot_be_learned_is_refused(config, options, words, overrides, tmp_path):
    with pytest.raises(ConfigError, match=words):
        configs.load(CONFIGS / f"{config}.yaml", overrides(tmp_path, ONLINE, *options))
