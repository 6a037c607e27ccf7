"""Checkpoints on disk: whole at any instant, kept by rule, on disks that are full, and exported."""

import itertools
import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from safetensors.torch import load_file

from dist_contrastive import checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.checkpoint import Keep, Progress
from dist_contrastive.cli import main
from dist_contrastive.errors import ConfigError, NonFiniteError
from dist_contrastive.metrics import read_rows
from dist_contrastive.trainer import loop

ENCODER = CONFIGS / "digits_encoder.yaml"
SMALL = (
    *("task.encoder={name: residual, widths: [8, 16]}", "task.head={hidden: 16, out: 8}"),
    *("data.global_batch_size=16", "optim.warmup_steps=0", "train.steps=6", "train.save_every=2"),
)


def small(overrides, run_dir: Path, *more: str) -> configs.RunConfig:
    return configs.load(ENCODER, overrides(run_dir, *SMALL, *more))


def save(root: Path, step: int, keep: Keep | None = None, score: float | None = None) -> Path:
    weights = {"w": torch.full((1000,), float(step))}
    return checkpoint.save(root, Progress(step, 64 * step), weights, {}, keep or Keep(), score)


def steps_in(root: Path) -> list[int]:
    """Those of all that is there; nothing else may be, but damaged ones that are set aside."""
    names = [path.name for path in root.iterdir() if not path.name.startswith("set-aside-step-")]
    return sorted(int(name.removeprefix("step-")) for name in names)


def test_steps_done_again_replace_damaged_ones(tmp_path):
    """Resumed before a damaged checkpoint, the new ones are kept although their step is smaller."""
    save(tmp_path, 100)
    (save(tmp_path, 200) / "state.json").unlink()
    (tmp_path / ".writing-step-00000170").mkdir()
    (tmp_path / ".removing-step-00000050").mkdir()
    save(tmp_path, 150, Keep(last=1))
    assert steps_in(tmp_path) == [150]
    assert checkpoint.newest(tmp_path).progress.step == 150


def test_the_same_step_again_replaces_a_damaged_one(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "model.safetensors").write_bytes(b"torn")
    told = []
    assert checkpoint.newest(tmp_path, told.append).progress.step == 1
    assert told == [
        "a checkpoint is damaged (step-00000002: model.safetensors is not as it was written); "
        "going back to step-00000001"
    ]
    save(tmp_path, 2)
    assert checkpoint.newest(tmp_path, told.append).weights()["w"][0] == 2
    assert len(told) == 1


def test_a_later_format_is_not_read(tmp_path):
    folder = save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 2}))
    with pytest.raises(ValueError, match="format 2 is newer than this version's 1"):
        checkpoint.newest(tmp_path)


def test_which_are_kept(tmp_path):
    scores = [5.0, 3.0, 1.0, 2.0, None, 4.0, 1.0, 6.0]
    for step, score in enumerate(scores, start=1):
        save(tmp_path, step, Keep(last=2, every=4, best="min"), score)
    assert steps_in(tmp_path) == [3, 4, 7, 8]
    assert checkpoint.best(tmp_path, "min").progress.step == 3
    assert checkpoint.best(tmp_path, "max").progress.step == 8
    (tmp_path / "step-00000008" / "training.pt").unlink()
    assert checkpoint.best(tmp_path, "max").progress.step == 4


CHANGES = ("open", "os.", "shutil.")


def crash_at(event: int, root: Path) -> bool:
    """Save step 2 in a process that ends at that change of the file system; whether it did."""
    process = os.fork()
    if process == 0:
        count = itertools.count()

        def crash(name: str, _: tuple) -> None:
            if name.startswith(CHANGES) and next(count) == event:
                os._exit(9)

        sys.addaudithook(crash)
        save(root, 2, Keep(last=1))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


@pytest.mark.parametrize("damaged", [False, True], ids=["first_time", "over_a_damaged_one"])
def test_a_crash_at_any_instant_leaves_a_whole_checkpoint(damaged, tmp_path):
    """Before each file or folder is opened, made, renamed or removed, of those before it, too."""
    seen = set()
    for event in itertools.count():
        root = tmp_path / str(event)
        save(root, 1, Keep(last=1))
        if damaged:
            (save(root, 2) / "model.safetensors").write_bytes(b"torn")
        crashed = crash_at(event, root)
        found = checkpoint.newest(root)
        assert found.weights()["w"][0] == found.progress.step
        seen.add(found.progress.step)
        save(root, 3, Keep(last=1))  # sweeps what the crash has left
        assert steps_in(root) == [3]
        if not crashed:
            break
    assert seen == {1, 2}
    assert event > 15


@pytest.fixture
def small_files():
    """No file can grow beyond so many bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0] if size is None else size, limits[1]))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [0, 100, 3000], ids=["nothing", "a_piece", "weights_not_state"])
def test_a_save_that_fails_leaves_nothing_and_the_one_before(size, tmp_path, small_files):
    save(tmp_path, 1)
    weights, state = {"w": torch.ones(500)}, {"state": {"w": torch.ones(5000)}}
    small_files(size)
    with pytest.raises(OSError, match="File too large"):
        checkpoint.save(tmp_path, Progress(2, 128), weights, state, Keep())
    small_files(None)
    assert steps_in(tmp_path) == [1]
    assert checkpoint.newest(tmp_path).progress.step == 1


@pytest.mark.parametrize("beside", [False, True], ids=["in_turn", "beside"])
def test_training_goes_on_when_a_save_fails_and_the_next_one_works(
    beside, tmp_path, overrides, small_files, caplog, monkeypatch
):
    config = small(overrides, tmp_path, f"train.async_save={beside}", "train.keep_last=9")
    train_step, save, tried = loop.train_step, checkpoint.save, threading.Event()

    def step(run, *args):
        if run.progress.step == 5:
            assert tried.wait(120)  # the disk is full until then
        small_files(20_000 if run.progress.step in (3, 4) else None)
        return train_step(run, *args)

    def save_and_tell(root, progress, *args):
        try:
            return save(root, progress, *args)
        finally:
            if progress.step == 4:
                tried.set()

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(checkpoint, "save", save_and_tell)
    assert trainer.train(config) == 0
    assert "the checkpoint of step 4 is not written: " in caplog.text
    assert steps_in(tmp_path / "checkpoints") == [2, 6]


def test_a_last_save_that_fails_is_an_error(tmp_path, overrides, small_files, capsys):
    options = overrides(tmp_path, *SMALL)
    config = configs.load(ENCODER, options)
    assert trainer.train(config, stop_after=2) == 75
    small_files(20_000)
    assert main(["train", str(ENCODER), *options]) == 75
    small_files(None)
    told = capsys.readouterr().err
    assert "that of step 2 is whole; make room and start again" in told
    assert steps_in(tmp_path / "checkpoints") == [2]
    assert main(["train", str(ENCODER), *options]) == 0
    assert steps_in(tmp_path / "checkpoints") == [4, 6]


def test_saving_beside_the_training_changes_nothing(tmp_path, overrides):
    """Also what is being written when the run is over is waited for."""
    found = []
    for beside in (False, True):
        config = small(overrides, tmp_path / str(beside), f"train.async_save={beside}")
        assert trainer.train(config) == 0
        found.append(checkpoint.newest(config.run_dir / "checkpoints"))
        assert steps_in(config.run_dir / "checkpoints") == [4, 6]
    for name, value in found[0].weights().items():
        assert torch.equal(found[1].weights()[name], value), name


def test_weights_that_are_not_finite_are_not_saved(tmp_path, overrides, monkeypatch):
    config = small(overrides, tmp_path)
    train_step = loop.train_step

    def step(run, *args):
        row = train_step(run, *args)
        if run.progress.step == 4:
            with torch.no_grad():
                next(run.task.encoder.parameters()).view(-1)[0] = torch.inf
        return row

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(NonFiniteError, match=r"step 4: encoder\.\S+ holds NaN or infinity, and is"):
        trainer.train(config)
    assert steps_in(tmp_path / "checkpoints") == [2]


def test_the_best_is_kept_and_exported(tmp_path, overrides, capsys):
    best = "train.keep_best={metric: temperature_is_not_one}"
    with pytest.raises(ConfigError, match=r"keep_best.metric=temperature_is_not_one is not measur"):
        trainer.train(small(overrides, tmp_path / "wrong", best))
    run_dir = tmp_path / "run"
    options = ("train.keep_best={metric: lr, mode: max}", "train.keep_last=1", "train.save_every=1")
    assert trainer.train(small(overrides, run_dir, *options)) == 0
    assert steps_in(run_dir / "checkpoints") == [1, 6]
    for which, step in (("newest", 6), ("best", 1)):
        out = tmp_path / which
        assert main(["export", str(run_dir), "--out", str(out), "--checkpoint", which]) == 0
        assert f"weights after step {step} and config in {out}" in capsys.readouterr().out
        saved = load_file(run_dir / f"checkpoints/step-0000000{step}/model.safetensors")
        exported = load_file(out / "model.safetensors")
        assert exported.keys() == saved.keys()
        assert all(torch.equal(exported[name], saved[name]) for name in saved)
    assert main(["eval", str(out)]) == 0
    assert main(["export", str(run_dir), "--out", "/dev/null/x"]) == 64
    assert main(["export", str(tmp_path / "wrong"), "--checkpoint", "best"]) == 64


def test_a_checkpoint_of_another_model_is_refused(tmp_path, overrides):
    """Where the config says the same, as after an update that changed a network."""
    config = small(overrides, tmp_path)
    assert trainer.train(config, stop_after=2) == 75
    folder = tmp_path / "checkpoints" / "step-00000002"
    weights = load_file(folder / "model.safetensors")
    name, value = max(weights.items(), key=lambda item: item[1].numel())
    for changed, words in (
        ({name: value[:-1]}, rf"{name} is \[.*\], and the task's \[.*\]"),
        ({f"{name}_2": value}, rf"the task has no {name}_2"),
        ({}, rf"it has no {name}"),
    ):
        others = {k: v for k, v in weights.items() if k != name}
        state = torch.load(folder / "training.pt", weights_only=True)
        progress = Progress(2, 32)
        checkpoint.save(tmp_path / "checkpoints", progress, {**others, **changed}, state, Keep())
        with pytest.raises(ConfigError, match=rf"is a checkpoint of another model: .*{words}"):
            trainer.train(config)


@pytest.mark.parametrize("size", [0, 0.5], ids=["empty", "half"])
def test_a_truncated_checkpoint_is_passed_over(size, tmp_path, overrides, capsys):
    options = overrides(tmp_path, *SMALL, "train.keep_last=9")
    assert trainer.train(configs.load(ENCODER, options), stop_after=5) == 75
    file = tmp_path / "checkpoints" / "step-00000005" / "training.pt"
    os.truncate(file, int(size * file.stat().st_size))
    assert main(["train", str(ENCODER), *options]) == 0
    told = capsys.readouterr().err
    assert "a checkpoint is damaged (step-00000005: training.pt is not as it was written)" in told
    assert "going on from step 4 of 6" in told
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
