"""Whole runs of the demo's configs, shortened: any number of ranks, stopped anywhere."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, Ranks, global_batches, run_forked

from dist_contrastive import checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.cli import main
from dist_contrastive.data import load_index
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.metrics import read_rows

ENCODER = CONFIGS / "digits_encoder.yaml"
GENERATOR = CONFIGS / "digits_generator.yaml"


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.newest(run_dir / "checkpoints")
    assert found is not None
    return found.weights()


def assert_bitwise_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def encoder_run(tmp_path_factory, overrides) -> Path:
    """A short encoder run on one rank."""
    run_dir = tmp_path_factory.mktemp("runs") / "encoder"
    assert trainer.train(configs.load(ENCODER, overrides(run_dir))) == 0
    return run_dir


@pytest.fixture(scope="module")
def generator_features(encoder_run) -> str:
    return f"task.features=[{{name: pixels}}, {{name: run, run_dir: {encoder_run}}}]"


REMEMBERED = (  # what a generator's next step takes from those before it, besides weights
    *("task.bank={capacity: 8, positives: 4}", "task.guidance={unconditional: 6}"),
    *("task.ema=0.5", "task.loss.temperatures=[0.05]"),
)
RESUMED = ("encoder", "generator", "semisupervised", "moco", "hybrid")


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] * (x == "semisupervised")) for x in RESUMED],
)  # a hybrid, too
def test_stopped_and_resumed_bitwise(name, tmp_path, overrides, generator_features):
    """Three legs, stopped between and at checkpoints, end with the weights of one."""
    path = CONFIGS / f"digits_{name}.yaml"
    more = {
        "generator": [generator_features, *REMEMBERED],
        "semisupervised": ["data.balance={classes: 5, samples_per_class: 4}"],
        "moco": ["task.queue_size=192"],  # three batches: it is full and goes round
        "hybrid": ["data.balance=null", "task.reward.baseline=running_mean"],
    }.get(name, [])
    whole = configs.load(path, overrides(tmp_path / "whole", *more))
    assert trainer.train(whole) == trainer.EXIT_DONE
    legs = configs.load(path, overrides(tmp_path / "legs", *more))
    assert trainer.train(legs, stop_after=3) == trainer.EXIT_REQUEUE
    assert trainer.train(legs, stop_after=2) == trainer.EXIT_REQUEUE
    assert trainer.train(legs) == trainer.EXIT_DONE
    assert_bitwise_equal(weights(whole.run_dir), weights(legs.run_dir))
    assert global_batches(whole.run_dir) == global_batches(legs.run_dir)
    drop = ("samples_per_s", "data_wait", "memory_peak_mb")
    rows = [
        [
            {k: v for k, v in row.items() if k not in drop and k[-2:] != "_s"}
            for row in read_rows(c.run_dir)
        ]
        for c in (whole, legs)
    ]
    assert rows[0] == rows[1]
    assert trainer.train(legs) == trainer.EXIT_DONE  # a full re-run has nothing to do


LONGER = ("train.steps=30", "train.save_every=10", "data.num_workers=1")


@pytest.fixture(scope="module")
def longer_run(tmp_path_factory, overrides) -> Path:
    """An uninterrupted run on two ranks."""
    run_dir = tmp_path_factory.mktemp("runs") / "longer"
    done = run_forked("train", ENCODER, *overrides(run_dir, *LONGER), number=2)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.slow  # bitwise in one process above; on ranks, in test_kill.py and test_faults.py
@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_signals_over_two_ranks(kill, tmp_path, overrides, longer_run):
    """SIGTERM saves and asks to be started again (75); SIGKILL loses only unsaved steps."""
    options = overrides(tmp_path / "legs", *LONGER)
    training = Ranks("train", ENCODER, *options, number=2)
    training.until(lambda: any(row["step"] >= 13 for row in read_rows(tmp_path / "legs")))
    if kill == signal.SIGTERM:
        training.processes[0].terminate()  # the ranks vote
        assert training.wait().returncode == trainer.EXIT_REQUEUE
    else:
        training.kill()
        assert checkpoint.newest(tmp_path / "legs" / "checkpoints").progress.step == 10
    again = run_forked("train", ENCODER, *options, number=2)
    assert again.returncode == 0, again.stderr
    assert "going on from step" in again.stderr
    assert_bitwise_equal(weights(longer_run), weights(tmp_path / "legs"))
    assert global_batches(tmp_path / "legs") == global_batches(longer_run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_not_finite_ends_with_70(ranks, tmp_path, overrides):
    options = overrides(tmp_path / "run", "optim.lr=1e25", "optim.warmup_steps=0")
    done = run_forked("train", ENCODER, *options, number=ranks)
    assert done.returncode == 70, done.stderr
    assert "step 2: NaN, infinity or " in done.stderr
    for rank in range(ranks):
        assert f"{128 // ranks} of {128 // ranks} rows of views on rank {rank}" in done.stderr


def test_run_dir_that_cannot_be_written(tmp_path, overrides):
    (tmp_path / "file").touch()
    config = configs.load(ENCODER, overrides(tmp_path / "file" / "run"))
    with pytest.raises(ConfigError, match=r"run_dir=.*cannot be written \(Not a directory\)"):
        trainer.train(config)


def test_damaged_sample_ends_all_ranks_with_64(tmp_path, digits, overrides):
    """Only one rank reads it; the other hears of it instead of losing its peer.

    23 steps of 64 are more than 1437 samples: each is read.
    """
    folder = tmp_path / "train"
    shutil.copytree(digits / "train", folder)
    shard = sorted(folder.glob("*.tar"))[4]
    index = load_index(folder)
    number = int(index.shard_starts[4]) + 90
    image = index.sample_offset[number] + index.member_start[number, index.fields.index("png")]
    data = bytearray(shard.read_bytes())
    data[int(image) + 600] ^= 1
    shard.write_bytes(data)
    epoch = ["train.steps=23", f"data.train={folder}", "data.max_skipped=0"]
    done = run_forked("train", ENCODER, *overrides(tmp_path / "run", *epoch), number=2)
    assert done.returncode == 64
    assert done.stderr.count(f"shard {shard} is damaged or was changed") == 2
    assert "Traceback" not in done.stderr


def test_bad_data_ends_all_ranks_with_64(tmp_path, overrides):
    """No launcher looks before the ranks do: all say so, none hangs."""
    options = overrides(tmp_path / "run", "data.label=json.colour")
    training = Ranks("train", ENCODER, *options, number=2)
    done = training.wait()
    assert [process.exitcode for process in training.processes] == [64, 64]
    for rank in (0, 1):
        assert f"rank {rank}: sample digit-" in done.stderr
    assert "has no 'colour' in its field 'json'" in done.stderr


def test_changed_settings_are_refused(encoder_run, overrides):
    changed = configs.load(ENCODER, overrides(encoder_run, "task.loss.temperature=0.5"))
    with pytest.raises(ConfigError, match=r"task.loss.temperature: 0.2 -> 0.5.*another run_dir"):
        trainer.train(changed)


def test_damaged_checkpoint_is_passed_over(tmp_path, overrides):
    config = configs.load(ENCODER, overrides(tmp_path / "run"))
    trainer.train(config, stop_after=7)  # checkpoints at 5 and 7
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest.progress.step == 7
    with (newest.folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").progress.step == 5
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(DataError, match=r"every checkpoint .* is damaged"):
        trainer.train(config)


def test_run_directory_describes_itself(encoder_run):
    assert configs.load_run(encoder_run).train.steps == 12
    environment = json.loads((encoder_run / "environment.json").read_text())
    assert environment["world_size"] == 1
    rows = read_rows(encoder_run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["consumed"] == 12 * 64
    assert {"loss", "lr", "grad_norm", "temperature", "samples_per_s", "data_wait"} <= rows[
        0
    ].keys()
    assert list((encoder_run / "tensorboard").glob("events*"))


def losses_of(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run_dir)]


VIEW_LOSSES = ("barlow_twins", "dcl", "infonce", "koleo", "ntxent", "self_diagonal", "siglip")
LABEL_LOSSES = [
    "supcon",
    "cosine_embedding",
    "triplet, mining: all",
    "triplet, mining: hard, distance: cosine",
    "triplet, mining: semihard, distance: squared_euclidean",
]


@pytest.mark.parametrize("name", [*VIEW_LOSSES, "vicreg"])
def test_every_two_view_loss_trains_from_its_settings(name, tmp_path, overrides):
    loss = f"task.loss={{name: {name}, keys_from: ring, impl: chunked}}"
    assert main(["train", str(ENCODER), *overrides(tmp_path, "train.steps=3", loss)]) == 0
    assert len(losses_of(tmp_path)) == 3


@pytest.mark.parametrize("name", LABEL_LOSSES)
def test_every_labelled_loss_trains_from_its_settings(name, tmp_path, overrides):
    loss = f"task.loss={{name: {name}, keys_from: ring, impl: chunked}}"
    options = overrides(tmp_path, "train.steps=3", loss, "data.balance=null")
    assert main(["train", str(CONFIGS / "digits_supcon.yaml"), *options]) == 0
    assert len(losses_of(tmp_path)) == 3


def test_a_ring_of_two_ranks_trains_as_one_process(tmp_path, overrides):
    loss = "task.loss={name: siglip, keys_from: ring, impl: chunked, chunk_size: 7}"
    one, two = (overrides(tmp_path / name, "train.steps=4", loss) for name in ("one", "two"))
    assert main(["train", str(ENCODER), *one]) == 0
    done = run_forked("train", ENCODER, *two, number=2)
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
