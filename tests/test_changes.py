"""Runs that grow: more steps, other rates and lanes on the way, weights of others at the start."""

import json
import math
import os
import shutil
import stat
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, command, global_batches, refused, run, run_forked
from safetensors.torch import load_file, save_file

import dist_contrastive
from dist_contrastive import changes, checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.cli import main
from dist_contrastive.errors import ConfigError
from dist_contrastive.metrics import read_rows
from dist_contrastive.optim import learning_rate
from launch.slurm.__main__ import main as slurm

ENCODER = CONFIGS / "digits_encoder.yaml"
SMALL = (
    *("task.encoder={name: residual, widths: [8, 16]}", "task.head={hidden: 16, out: 8}"),
    *("train.steps=4", "train.save_every=2", "train.trackers=[]"),
)


@pytest.fixture
def options(tmp_path, overrides):
    """Overrides of a short run in tmp_path/run."""
    return overrides(tmp_path / "run", *SMALL)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.run_newest(run_dir).weights()


def rates(run_dir: Path) -> list[float]:
    return [row["lr"] for row in read_rows(run_dir)]


def status(run_dir: Path, capsys) -> str:
    capsys.readouterr()
    assert slurm(["status", str(run_dir)]) == 0
    return capsys.readouterr().out


# ------------------------------------------------------------------ changes on the way


def test_a_finished_run_has_more_steps(options, tmp_path, capsys):
    """Without --change: nothing else can be meant; the rate follows the new length."""
    run_dir = tmp_path / "run"
    assert main(["train", str(ENCODER), *options]) == 0
    longer = [*options, "train.steps=8"]
    assert main(["doctor", str(ENCODER), *longer]) == 0
    assert "train.steps: 4 -> 8" in capsys.readouterr().out
    assert main(["train", str(ENCODER), *longer]) == 0
    told = capsys.readouterr().err
    assert "changed from step 4 on: train.steps: 4 -> 8" in told
    assert [row["step"] for row in read_rows(run_dir)] == list(range(1, 9))
    settings = configs.load_run(run_dir).optim
    assert rates(run_dir)[4:] == [learning_rate(s, 8, settings, 64) for s in range(4, 8)]
    assert "changed  from step 4 on: train.steps: 4 -> 8" in status(run_dir, capsys)
    assert main(["train", str(ENCODER), *longer]) == 0  # done: the same command changes nothing
    assert "trained to step 8 already" in capsys.readouterr().err
    assert main(["train", str(ENCODER), *options]) == 64  # and the first one is told so
    assert "train.steps: 8 -> 4" in capsys.readouterr().err


MAY_CHANGE = [
    "optim.lr=0.01",
    "optim.lr_scaling=sqrt",
    "optim.warmup_steps=3",
    "optim.final_lr_ratio=0.5",
    "optim.weight_decay=0.1",
    "optim.clip_norm=0.1",
    "optim.betas=[0.8, 0.9]",
    "train.steps=3",
    "train.steps=9",
]


@pytest.mark.parametrize("setting", MAY_CHANGE)
def test_what_may_change_is_told_and_recorded(setting, options, tmp_path, capsys):
    """Refused without the flag, with a sentence that names it; what was done is as it was."""
    run_dir = tmp_path / "run"
    assert trainer.train(configs.load(ENCODER, options), stop_after=2) == trainer.EXIT_REQUEUE
    before = (run_dir / "config.yaml").read_text()
    changed = ["train", str(ENCODER), *options, setting]
    assert main(changed) == 64
    assert "--change" in capsys.readouterr().err
    assert (run_dir / "config.yaml").read_text() == before
    assert not (run_dir / "changes.jsonl").exists()
    assert main([*changed, "--change"]) == 0
    key = setting.partition("=")[0]
    [change] = changes.read_changes(run_dir)
    assert (change.step, list(change.settings)) == (2, [key])
    assert key in status(run_dir, capsys)
    now = configs.load_run(run_dir)
    expected = [learning_rate(s, now.train.steps, now.optim, 64) for s in range(2, now.train.steps)]
    assert rates(run_dir)[2:] == expected


def test_a_changed_run_is_the_same_wherever_it_was_stopped(options, tmp_path):
    """Changed at step 2 and stopped at 3: bitwise that which was stopped at 2 alone; the decay of
    weights is that of the config, not of the checkpoint."""
    new = ["optim.lr=0.01", "optim.weight_decay=0.5", "train.steps=5"]
    ends = []
    for name, stops in (("once", [None]), ("twice", [1, None])):
        folder = [*options, f"run_dir={tmp_path / name}"]
        trainer.train(configs.load(ENCODER, folder), stop_after=2)
        config = configs.load(ENCODER, [*folder, *new])
        for number, stop in enumerate(stops):
            trainer.train(config, stop_after=stop, change=number == 0)
        ends.append(weights(tmp_path / name))
        assert [c.step for c in changes.read_changes(tmp_path / name)] == [2]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    trainer.train(configs.load(ENCODER, [*options, *new]))  # from the start
    assert not all(torch.equal(ends[0][n], x) for n, x in weights(tmp_path / "run").items())


FIXED = [
    "data.global_batch_size=32",
    "task.loss.temperature=0.5",
    "task.head.out=4",
    "optim.name=sgd",
    "seed=1",
    "data.shuffle_window=7",
    "init_from=elsewhere",
]


@pytest.mark.parametrize("setting", FIXED)
def test_what_a_run_is_cannot_change(setting, options, capsys):
    trainer.train(configs.load(ENCODER, options), stop_after=1)
    assert main(["train", str(ENCODER), *options, setting, "optim.lr=1", "--change"]) == 64
    told = capsys.readouterr().err
    assert f"({setting.partition('=')[0]}: " in told
    assert "another run_dir" in told
    assert "optim.lr" not in told


@pytest.mark.parametrize(
    ("setting", "words"),
    [("train.steps=2", ["train.steps: 4 -> 2", "more than 4"]), ("optim.lr=1", ["more than 4"])],
)
def test_a_change_that_leaves_no_step(setting, words, options):
    """It would be forgotten without a word."""
    trainer.train(configs.load(ENCODER, options))
    with refused(ConfigError, *words):
        dist_contrastive.train(ENCODER, overrides=[*options, setting], change=True)


def test_precision_changes_there_and_back(options, tmp_path):
    """fp16 begins with a loss scale of its own, which fp32 has not."""
    for number, precision in enumerate(["fp32", "fp16", "bf16", "fp16"]):
        config = configs.load(ENCODER, [*options, f"backend.precision={precision}"])
        trainer.train(config, stop_after=1, change=number > 0)
    found = changes.read_changes(tmp_path / "run")
    assert [c.settings["backend.precision"] for c in found] == [
        ("fp32", "fp16"),
        ("fp16", "bf16"),
        ("bf16", "fp16"),
    ]
    assert checkpoint.run_newest(tmp_path / "run").progress.step == 4


def test_changes_on_two_ranks(options, tmp_path):
    assert run_forked("train", ENCODER, *options, number=2).returncode == 0
    for flags, code in (([], 64), (["--change"], 0)):
        more = ["train.steps=6", "optim.lr=0.01"]
        done = run_forked("train", ENCODER, *options, *more, *flags, number=2)
        assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert changes.read_changes(tmp_path / "run")[0].settings == {
        "optim.lr": (0.002, 0.01),
        "train.steps": (4, 6),
    }


# ------------------------------------------------------------------ lanes


@pytest.fixture
def few(tmp_path) -> list[str]:
    """Overrides for 48 samples in batches of 16."""
    images = np.random.default_rng(0).integers(0, 255, (48, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    assert (
        main(["shards", "pack", "arrays", f"{tmp_path}/few", "--image", f"{tmp_path}/x.npy"]) == 0
    )
    return [
        *(f"data.train={tmp_path}/few", "data.global_batch_size=16", "data.lanes=2"),
        *("data.label=null", "data.num_classes=null", "data.test=null", "train.ledger=true"),
    ]


@pytest.mark.parametrize(("step", "batch", "next_step"), [(2, 16, 3), (4, 16, 6), (2, 32, 3)])
def test_lanes_wait_for_the_end_of_an_epoch(step, batch, next_step, options, few, tmp_path):
    """48 samples: an epoch is 3 steps of 16; 2 epochs are 3 of 32."""
    settings = [*options, *few, f"data.global_batch_size={batch}", "train.steps=12"]
    trainer.train(configs.load(ENCODER, settings), stop_after=step)
    more = configs.load(ENCODER, [*settings, "data.lanes=4"])
    with refused(ConfigError, "--change"):
        trainer.train(more)
    with refused(ConfigError, "data.lanes: 2 -> 4", f"step {step}", f"to step {next_step} "):
        trainer.train(more, change=True)
    trainer.train(configs.load(ENCODER, settings), stop_after=next_step - step)
    assert trainer.train(more, change=True) == 0
    batches = global_batches(tmp_path / "run")
    samples = [key for one in batches for key in one]
    assert len(batches) == 12
    part = math.lcm(batch, 48)  # a batch may be of two epochs
    for begin in range(0, len(samples) // part * part, part):
        counts = Counter(samples[begin : begin + part])
        assert len(counts) == 48
        assert set(counts.values()) == {part // 48}
    assert changes.read_changes(tmp_path / "run")[0].step == next_step


def test_lanes_for_a_number_of_ranks_that_did_not_divide_them(options, few, tmp_path):
    settings = [*options, *few, "data.global_batch_size=24"]
    trainer.train(configs.load(ENCODER, settings), stop_after=2)
    refusal = run_forked("train", ENCODER, *settings, number=3)
    assert refusal.returncode == 64
    done = run_forked("train", ENCODER, *settings, "data.lanes=3", "--change", number=3)
    assert done.returncode == 0, done.stderr
    keys = [key for one in global_batches(tmp_path / "run")[2:] for key in one]
    assert len(set(keys)) == 48


def test_lanes_of_batches_without_epochs(options, tmp_path):
    balanced = [*options, "data.balance={classes: 8, samples_per_class: 8}"]
    config = CONFIGS / "digits_supcon.yaml"
    trainer.train(configs.load(config, balanced), stop_after=1)
    with refused(ConfigError, "data.balance", "data.lanes=8"):
        trainer.train(configs.load(config, [*balanced, "data.lanes=4"]), change=True)


# ------------------------------------------------------------------ the record


def test_a_record_that_is_torn_or_older_checkpoints(tmp_path):
    """Rows that cannot be read are left out; after a way back steps that are gone do not count."""
    changes.record_changes(tmp_path, 4, {"optim.lr": (1, 2)})
    changes.record_changes(tmp_path, 4, {"optim.lr": (1, 2)})  # killed in between, begun again
    changes.record_changes(tmp_path, 8, {"optim.lr": (2, 3), "train.steps": (9, 10)})
    assert [(c.step, c.settings) for c in changes.read_changes(tmp_path)] == [
        (4, {"optim.lr": (1, 2)}),
        (8, {"optim.lr": (2, 3), "train.steps": (9, 10)}),
    ]
    with (tmp_path / "changes.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "ti\n\xff\x00\n[]\n{"step": "x"}\n')
    changes.record_changes(tmp_path, 6, {})  # the checkpoint of step 8 was damaged
    assert [(c.step, c.settings) for c in changes.read_changes(tmp_path)][1:] == [
        (6, {"optim.lr": (2, 3), "train.steps": (9, 10)})
    ]
    changes.record_changes(tmp_path, 6, {"optim.lr": (3, 2)})  # as it was
    assert changes.read_changes(tmp_path)[1].settings == {"train.steps": (9, 10)}
    changes.record_changes(tmp_path, 0, {})
    assert changes.read_changes(tmp_path) == []


def test_a_change_counts_as_progress(options, tmp_path):
    """A run that diverged again and again may be tried at another rate."""
    more = ["train.max_stalled_starts=1", "train.save_every=100"]
    trainer.train(configs.load(ENCODER, [*options, *more]), stop_after=1)
    attempts = tmp_path / "run" / "attempts.json"
    attempts.write_text(json.dumps({"step": 1, "starts": 1}))
    changed = configs.load(ENCODER, [*options, *more, "optim.lr=0.001"])
    assert trainer.train(changed, change=True) == 0


def test_environment_has_the_command_and_the_commit(options, tmp_path):
    secret = "train.tracker_project='https://alice:w0rd@host.org/a.tar?s1gn=k3y'"
    done = run(command("train", ENCODER, *options, secret))
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert told["command"].split()[1:4] == ["-m", "dist_contrastive", "train"]
    assert f"run_dir={tmp_path / 'run'}" in told["command"]
    assert "host.org/a.tar" in told["command"]
    assert not any(word in told["command"] for word in ("alice", "w0rd", "s1gn", "k3y"))
    root = Path(dist_contrastive.__file__).parents[1]
    head = subprocess.run(
        ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    if head and (root / ".git").exists():
        assert told["commit"].removesuffix("-dirty") == head
    assert told["folder"] == os.getcwd()


# ------------------------------------------------------------------ weights to start from


@pytest.fixture(scope="module")
def trained(tmp_path_factory, overrides) -> Path:
    """A run of two views."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    trainer.train(configs.load(ENCODER, overrides(run_dir, *SMALL)))
    return run_dir


def first_weights(config: Path, settings: list[str]) -> dict[str, torch.Tensor]:
    """Those after a step that moves nothing."""
    loaded = configs.load(config, [*settings, "optim.lr=1e-30", "train.steps=1"])
    trainer.train(loaded)
    return weights(loaded.run_dir)


@pytest.mark.parametrize("kind", ["run", "export", "checkpoint", "checkpoints", "file", "pieces"])
def test_a_run_starts_from_weights(kind, trained, options, tmp_path, caplog):
    """All of them, told in a table; another objective with the same networks is strict too."""
    expected, source = weights(trained), trained
    if kind == "export":
        source = tmp_path / "exported"
        assert main(["export", str(trained), "--out", str(source)]) == 0
    elif kind == "checkpoint":
        source = checkpoint.run_newest(trained).folder
    elif kind == "checkpoints":
        source = trained / "checkpoints"
    elif kind == "file":
        source = checkpoint.run_newest(trained).folder / "model.safetensors"
    elif kind == "pieces":
        source = tmp_path / "pieces"
        source.mkdir()
        for number, name in enumerate(expected):
            save_file({name: expected[name]}, source / f"model-{number:05d}.safetensors")
    config = CONFIGS / "digits_supcon.yaml"
    with caplog.at_level("INFO", "dist_contrastive"):
        found = first_weights(config, [*options, "data.balance=null", f"init_from={source}"])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
    table = next(m for m in caplog.messages if m.startswith("init_from="))
    count = sum(name.startswith("encoder.") for name in expected)
    assert f"encoder  {count} of {count}" in table
    # A resumed run has weights of its own, and does not look there again.
    again = configs.load(config, [*options, "data.balance=null", f"init_from={source}"])
    if kind not in ("run", "checkpoint", "checkpoints", "file"):
        shutil.rmtree(source, ignore_errors=True)
    assert (
        trainer.train(
            again.model_copy(update={"optim": again.optim.model_copy(update={"lr": 1e-30})}),
            change=True,
        )
        == 0
    )


def test_weights_that_do_not_fit(trained, options, tmp_path, capsys):
    """Refused with what is other; or those that fit are taken, and the others told."""
    settings = [*options, f"init_from={trained}", "task.head.out=4"]
    assert main(["doctor", str(ENCODER), *settings]) == 64
    assert main(["train", str(ENCODER), *settings]) == 64
    told = capsys.readouterr().err
    assert "[8, 16] there, [4, 16] here" in told
    assert "init_strict=false" in told
    assert not (tmp_path / "run" / "checkpoints").exists()
    found = first_weights(ENCODER, [*settings, "init_strict=false"])
    expected = weights(trained)
    for name, value in found.items():
        if value.shape == expected[name].shape:
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)
    seed = first_weights(ENCODER, [*options, f"run_dir={tmp_path / 'seed'}", "task.head.out=4"])
    other = next(name for name in found if found[name].shape != expected[name].shape)
    torch.testing.assert_close(found[other], seed[other], rtol=0, atol=1e-12)


def test_momentum_copies_follow_the_new_weights(trained, options, caplog):
    """Of two views to MoCo: left as the seed makes them, keys would be those of another network."""
    more = ["task.queue_size=64", f"init_from={trained}", "init_strict=false"]
    with caplog.at_level("INFO", "dist_contrastive"):
        found = first_weights(CONFIGS / "digits_moco.yaml", [*options, *more])
    for name, value in weights(trained).items():
        if name.startswith("encoder."):
            copied = found[name.replace("encoder.", "key_encoder.module.", 1)]
            torch.testing.assert_close(copied, value, rtol=0, atol=1e-12)
    table = next(m for m in caplog.messages if m.startswith("init_from="))
    assert "copied from the new weights" in table


def test_what_a_run_has_met_is_not_taken(options, tmp_path, overrides):
    """Keys of MoCo's queue are of the other run's data."""
    moco, more = CONFIGS / "digits_moco.yaml", ["task.queue_size=128"]
    trainer.train(configs.load(moco, [*options, *more]))
    assert weights(tmp_path / "run")["num_queued"] == 4 * 64
    new = [*options, *more, f"run_dir={tmp_path / 'new'}", f"init_from={tmp_path / 'run'}"]
    found = first_weights(moco, new)
    assert found["num_queued"] == 64
    before = weights(tmp_path / "run")
    for name in (n for n in found if n.startswith("key_head.")):  # a step of momentum 0.99 later
        way = before[name.replace("key_head.module.", "head.")] - before[name]
        assert (found[name] - before[name]).norm() < 0.1 * way.norm()


def test_weights_of_a_part(trained, options, tmp_path):
    """A folder that somebody else made has the names of the encoder alone."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    prefix = "encoder."
    part = {n.removeprefix(prefix): x for n, x in weights(trained).items() if n.startswith(prefix)}
    save_file(part, folder / "model.safetensors")
    with refused(ConfigError, "init_strict=false", "not there"):
        first_weights(ENCODER, [*options, f"init_from={folder}"])
    found = first_weights(ENCODER, [*options, f"init_from={folder}", "init_strict=false"])
    for name, value in part.items():
        torch.testing.assert_close(found[prefix + name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["is not there", "give a run directory"]),
        ({}, ["holds no safetensors"]),
        ({"model.safetensors": b"version https://git-lfs"}, ["holds no weights"]),
        ({"pytorch_model.bin": b"PK"}, ["holds no safetensors"]),
        ({f"{x}.safetensors": {"a": torch.ones(2)} for x in "ab"}, ["same names"]),
        ({"state.json": b"{}"}, ["holds no weights"]),
        ({"model.safetensors": {"a": torch.ones(2)}}, ["a: not of this task"]),
        ({"checkpoints": None}, ["has no checkpoint yet"]),
        ({"model.safetensors": "nan"}, ["holds NaN"]),
    ],
)
@pytest.mark.parametrize("strict", ["true", "false"])
def test_nothing_to_start_from(content, words, strict, trained, options, tmp_path):
    folder = tmp_path / "source"
    for name, value in (content or {}).items():
        folder.mkdir(exist_ok=True)
        if value is None:
            (folder / name).mkdir()
        elif isinstance(value, bytes):
            (folder / name).write_bytes(value)
        elif isinstance(value, dict):
            save_file(value, folder / name)
        else:
            broken = weights(trained)
            next(iter(broken.values())).fill_(float("nan"))
            save_file(broken, folder / name)
    if content == {}:
        folder.mkdir()
    with refused(ConfigError, str(folder), *words):
        settings = [*options, f"init_from={folder}", f"init_strict={strict}"]
        trainer.train(configs.load(ENCODER, settings))


def test_weights_in_a_file_that_is_not_of_safetensors(options, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pth")
    with refused(ConfigError, "model.pth", "safetensors.torch.save_file"):
        trainer.train(configs.load(ENCODER, [*options, f"init_from={tmp_path}/model.pth"]))


# ------------------------------------------------------------------ runs that are moved and shared


def test_a_run_directory_is_given_as_the_config(options, tmp_path, monkeypatch, capsys):
    """It goes on where it lies now, from any folder; an export says where its run was."""
    assert main(["train", str(ENCODER), *options]) == 0
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(run_dir, moved)
    assert main(["export", str(run_dir), "--out", str(tmp_path / "exported")]) == 0
    monkeypatch.chdir(tmp_path)
    for given, steps in (("moved", 6), ("moved/config.yaml", 8)):
        assert configs.load(given).run_dir == Path("moved")
        assert main(["train", given, f"train.steps={steps}"]) == 0
        assert f"going on from step {steps - 2}" in capsys.readouterr().err
    assert checkpoint.run_newest(run_dir).progress.step == 4
    assert configs.load("exported/config.yaml").run_dir == run_dir
    (tmp_path / "own" / "checkpoints").mkdir(parents=True)  # of something else
    shutil.copy(run_dir / "config.yaml", tmp_path / "own")
    assert configs.load("own/config.yaml").run_dir == run_dir


def test_a_run_is_evaluated_wherever_it_lies(tmp_path, digits, overrides, monkeypatch, capsys):
    """Moved alone, copied with its project, and from another folder."""
    project, archive = tmp_path / "project", tmp_path / "archive" / "deep" / "er"
    project.mkdir()
    archive.mkdir(parents=True)
    shutil.copytree(digits, project / "data")
    monkeypatch.chdir(project)
    settings = overrides(Path("runs/a"), *SMALL, "data.train=data/train", "data.test=data/test")
    assert main(["train", str(ENCODER), *settings]) == 0
    assert configs.load_run("runs/a").data.train == "data/train"
    monkeypatch.chdir(archive)
    assert main(["export", str(project / "runs" / "a"), "--out", "exported"]) == 0
    assert configs.load_run("exported").data.test == str(project / "data" / "test")
    shutil.copytree(project / "runs" / "a", archive / "b")
    assert configs.load_run("b").data.train == str(project / "data" / "train")
    shutil.copytree(project, tmp_path / "copy")
    moved = configs.load_run(tmp_path / "copy" / "runs" / "a")
    assert moved.data.train == str(tmp_path / "copy" / "data" / "train")
    monkeypatch.chdir(tmp_path / "copy")  # and the same command goes on there
    assert main(["train", str(ENCODER), *settings]) == 0
    shutil.rmtree(project)
    assert main(["eval", "runs/a"]) == 0


def test_paths_of_sources_patterns_and_networks(tmp_path, monkeypatch):
    """Each kind of path in a config."""
    project = tmp_path / "one"
    (project / "data").mkdir(parents=True)
    (project / "runs" / "enc").mkdir(parents=True)
    monkeypatch.chdir(project)
    config = configs.load(
        CONFIGS / "digits_generator.yaml",
        [
            "data.train=[{shards: 'data/train-{000..003}.tar'}, {shards: data}]",
            "data.test=https://example.com/data",
            "task.features=[{name: run, run_dir: runs/enc}]",
            "data.balance=null",
            "run_dir=runs/gen",
        ],
    )
    Path("runs/gen").mkdir()
    configs.save(config, Path("runs/gen"))
    Path("runs/gen/environment.json").write_text(json.dumps(configs.place(Path("runs/gen"))))
    project.rename(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    found = configs.load_run("two/runs/gen")
    here = tmp_path / "two"
    assert [s.shards for s in found.data.sources] == [
        f"{here}/data/train-{{000..003}}.tar",
        f"{here}/data",
    ]
    assert found.data.test == "https://example.com/data"
    assert str(found.task.features[0].run_dir) == f"{here}/runs/enc"
    Path("two/runs/gen/environment.json").write_text("{torn")
    assert configs.load_run("two/runs/gen").data.sources[1].shards == "data"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_weights_are_as_readable_as_the_umask_has_it(umask, tmp_path):
    before = os.umask(umask)
    try:
        checkpoint.save(
            tmp_path / "checkpoints",
            checkpoint.Progress(1),
            {"a": torch.ones(2)},
            {},
            checkpoint.Keep(),
        )
    finally:
        os.umask(before)
    files = list((tmp_path / "checkpoints" / "step-00000001").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}
    assert load_file(next(f for f in files if f.suffix == ".safetensors"))["a"].tolist() == [1, 1]
