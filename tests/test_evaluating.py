"""Measures during training: the numbers of `eval`, on any ranks, and a run that is not changed."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, num_colours
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_engines import config_of

from dist_contrastive import checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.backend import Backend
from dist_contrastive.cli import main
from dist_contrastive.errors import ConfigError
from dist_contrastive.metrics import read_rows
from dist_contrastive.testing import run_ranks
from dist_contrastive.trainer.evaluating import Evaluator
from dist_contrastive.trainer.run import open_run

LEARNS = ("train.steps=4", "optim.name=adamw", "optim.lr=0.01", "train.log_every=3")
MEASURED = ("evaluate={every: 2, during: [knn, probe], limit: 200}", "train.save_every=2")
PAIRS = ("evaluate={every: 2, during: [retrieval], limit: 90}", "train.save_every=2")


def trained(config, *more: str) -> int:
    return trainer.train(config)


def evaluations(run_dir: Path) -> dict[int, dict[str, float]]:
    """Measures by step."""
    return {
        int(row["step"]): {k: v for k, v in row.items() if k.startswith("eval/")}
        for row in read_rows(run_dir)
        if any(k.startswith("eval/") for k in row)
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, overrides) -> dict[str, Path]:
    """Folders of a run without measures, with them, stopped in between, on two and three ranks."""
    root = tmp_path_factory.mktemp("runs")
    options = {"without": (), "with": MEASURED, "stopped": MEASURED, "2": MEASURED, "3": MEASURED}
    found = {}
    for name, more in options.items():
        config = config_of("two_view", overrides, root / name, *LEARNS, *more)
        found[name] = root / name
        if name in "23":
            assert run_ranks(trained, int(name), config) == [0] * int(name)
        elif name == "stopped":
            for after in (1, 2, None):
                trainer.train(config, stop_after=after)
        else:
            assert trained(config) == 0
    return found


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.newest(run_dir / "checkpoints").weights()


@pytest.mark.parametrize("name", ["with", "stopped"])
def test_a_run_that_is_measured_ends_with_the_same_weights(name, runs):
    expected = weights(runs["without"])
    found = weights(runs[name])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], x) for key, x in expected.items())


def test_every_second_step_has_measures_and_others_have_none(runs):
    assert list(evaluations(runs["with"])) == [2, 4]
    assert evaluations(runs["without"]) == {}
    assert [int(row["step"]) for row in read_rows(runs["with"])] == [2, 3, 4]
    (*_, last) = read_rows(runs["with"])
    assert last["eval_s"] > 0


@pytest.mark.parametrize("name", ["stopped", "2", "3"])
def test_measures_are_the_same_on_any_ranks_and_after_a_stop(name, runs):
    expected = evaluations(runs["with"])
    found = evaluations(runs[name])
    assert found.keys() == expected.keys()
    for step, numbers in expected.items():
        assert set(numbers) == {"eval/knn", "eval/probe"}
        assert found[step] == pytest.approx(numbers, abs=0.011)  # one of 100 near a border


def test_they_are_those_of_eval(runs, capsys):
    assert main(["eval", str(runs["with"]), "--only", "knn,probe", "--limit", "200"]) == 0
    lines = json.loads((runs["with"] / "eval.json").read_text())
    measures = evaluations(runs["with"])[4]
    assert [line["value"] for line in lines] == [measures["eval/knn"], measures["eval/probe"]]
    assert 0.15 < measures["eval/knn"] < 1


def test_networks_train_on_after_a_measurement(overrides, tmp_path):
    """In eval mode dropout would be gone from then on."""
    config = config_of("two_view", overrides, tmp_path / "run", *LEARNS, *MEASURED)
    backend = Backend(config.backend)
    run = open_run(config, backend)
    assert run.task.training
    found = Evaluator(run, lambda: None).measure()
    assert {"eval/knn", "eval/probe", "eval_s"} == set(found)
    assert run.task.training
    backend.close()


def test_partners_are_found_during_training(overrides, tmp_path, capsys):
    config = config_of("paired", overrides, tmp_path / "run", *LEARNS, *PAIRS)
    assert run_ranks(trained, 2, config) == [0, 0]
    assert main(["eval", str(tmp_path / "run"), "--only", "retrieval", "--limit", "90"]) == 0
    lines = json.loads((tmp_path / "run" / "eval.json").read_text())
    measures = evaluations(tmp_path / "run")[4]
    assert [line["value"] for line in lines] == pytest.approx(
        [measures["eval/recall_of_partners"], measures["eval/recall_of_images"]], abs=0.012
    )


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_zero_is_measured_too(stage, runs, overrides, tmp_path):
    zero = f"backend.zero_stage={stage}"
    config = config_of("two_view", overrides, tmp_path / "run", *LEARNS, *MEASURED, zero)
    assert run_ranks(trained, 2, config) == [0, 0]
    for step, expected in evaluations(runs["with"]).items():
        assert evaluations(tmp_path / "run")[step] == pytest.approx(expected, abs=0.011)


def test_the_best_checkpoint_by_a_measure(overrides, tmp_path):
    best = "train.keep_best={metric: eval/knn, mode: max}", "train.keep_last=1"
    config = config_of("two_view", overrides, tmp_path / "run", *LEARNS, *MEASURED, *best)
    assert trained(config) == 0
    measured = {
        step: numbers["eval/knn"] for step, numbers in evaluations(tmp_path / "run").items()
    }
    kept = checkpoint.best(tmp_path / "run" / "checkpoints", "max")
    assert kept.score == max(measured.values())


@pytest.mark.slow
def test_measures_are_the_same_on_four_ranks(runs, overrides, tmp_path):
    config = config_of("two_view", overrides, tmp_path / "run", *LEARNS, *MEASURED, "data.lanes=8")
    alone = config_of("two_view", overrides, tmp_path / "alone", *LEARNS, *MEASURED, "data.lanes=8")
    assert trained(alone) == 0
    assert run_ranks(trained, 4, config) == [0] * 4
    for step, expected in evaluations(tmp_path / "alone").items():
        assert evaluations(tmp_path / "run")[step] == pytest.approx(expected, abs=0.011)


AVERAGED = "evaluate={every: 2, during: [knn], limit: 200, weights: ema}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_moving_average_is_measured(ranks, overrides, tmp_path, capsys):
    """By `eval` alike; it is another encoder than the trained one, which is trained on."""
    slow = ("task.momentum=1", "optim.lr=0.05", "train.save_every=2")
    config = config_of("moco", overrides, tmp_path / "run", *LEARNS, *slow, AVERAGED)
    without = config_of("moco", overrides, tmp_path / "without", *LEARNS, *slow)
    for one in (config, without):
        assert run_ranks(trained, ranks, one) == [0] * ranks
    measures = evaluations(tmp_path / "run")
    assert measures[2] == measures[4], "a momentum of 1 leaves the average as it was"
    assert main(["eval", str(tmp_path / "run"), "--only", "knn", "--limit", "200"]) == 0
    (line,) = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert line["value"] == measures[4]["eval/knn"]
    expected, found = weights(tmp_path / "without"), weights(tmp_path / "run")
    assert all(torch.equal(found[key], x) for key, x in expected.items())


def test_networks_are_the_trained_ones_after_a_measurement(overrides, tmp_path):
    config = config_of("moco", overrides, tmp_path / "run", *LEARNS, AVERAGED)
    backend = Backend(config.backend)
    run = open_run(config, backend)
    own, names = (run.task.encoder, run.task.head), list(run.task.state_dict())
    evaluator = Evaluator(run, lambda: None)
    with run.task.averaged():
        assert run.task.encoder is run.task.key_encoder.module
    evaluator.measure()
    assert (run.task.encoder, run.task.head) == own
    assert list(run.task.state_dict()) == names
    backend.close()


def test_a_task_without_a_moving_average_is_refused(overrides, tmp_path):
    config = config_of("two_view", overrides, tmp_path / "run", *LEARNS, AVERAGED)
    with pytest.raises(ConfigError, match=r"evaluate\.weights=ema"):
        trainer.train(config)


@pytest.mark.parametrize(("task", "name"), [("two_view", "map"), ("drift", "samples")])
def test_pictures_go_to_trackers(task, name, overrides, tmp_path):
    picture = f"evaluate={{every: 2, during: [{name}], limit: 60}}"
    config = config_of(task, overrides, tmp_path / "run", *LEARNS, picture)  # logs more steps
    without = config_of(task, overrides, tmp_path / "without", *LEARNS)
    assert trained(config) == trained(without) == 0
    assert num_colours(tmp_path / "run" / "plots" / f"training_{name}.png") > 10
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0})
    events.Reload()
    assert [image.step for image in events.Images(f"eval/{name}")] == [2, 4]
    expected, found = weights(tmp_path / "without"), weights(tmp_path / "run")
    assert all(torch.equal(found[key], x) for key, x in expected.items())


def test_what_turns_out_to_be_impossible_is_named_and_left_out(overrides, tmp_path, caplog):
    """Three samples are no five neighbours; the probe may still have two classes."""
    few = "evaluate={every: 2, during: [knn, probe], limit: 3}"
    config = config_of("two_view", overrides, tmp_path / "run", *LEARNS, few)
    assert trained(config) == 0
    told = [record.message for record in caplog.records if "not measured" in record.message]
    assert len([text for text in told if text.startswith("knn")]) == 1
    assert "but there are 3 samples" in told[0]
    assert "eval/knn" not in str(evaluations(tmp_path / "run"))


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ("digits_encoder", ("data.test=null",), "data.test"),
        ("digits_encoder", ("data.label=null", "data.num_classes=null"), "data.label"),
        ("digits_encoder", ("evaluate.during=[retrieval]",), "paired"),
        ("digits_generator", (), "encoder of images"),
        ("digits_encoder", ("evaluate.every=0",), "evaluate.every"),
        ("digits_encoder", ("evaluate.during=[samples]",), "the task drift"),
    ],
)
def test_what_cannot_be_measured_is_refused(config, options, words, overrides, tmp_path):
    with pytest.raises(ConfigError, match=words):
        configs.load(
            CONFIGS / f"{config}.yaml", overrides(tmp_path / "run", "evaluate.every=2", *options)
        )
