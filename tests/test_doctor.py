"""What cannot work is found before training, by `doctor` and by `train` alike."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS, command, data_of, refused, run

from dist_contrastive import config as configs
from dist_contrastive import trainer
from dist_contrastive.cli import main
from dist_contrastive.data import DataConfig, index_folder
from dist_contrastive.data.probe import probe
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.data.training import open_data
from dist_contrastive.errors import DataError, UserError

ENCODER = str(CONFIGS / "digits_encoder.yaml")
SMALL = (
    *("task.encoder={name: residual, widths: [8, 16]}", "task.head={hidden: 16, out: 8}"),
    *("data.global_batch_size=24", "data.lanes=6", "optim.warmup_steps=0", "train.steps=4"),
)
BATCH_NORM = (
    "task.encoder={name: transformers, model_type: resnet, row_independent: false, config: "
    "{embedding_size: 8, hidden_sizes: [8, 8], depths: [1, 1], layer_type: basic, num_channels: 1}}"
)


@pytest.mark.parametrize("stage", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_all_is_well(stage, tmp_path, overrides, capsys):
    """Nothing is written, and every part is told of."""
    run_dir = tmp_path / "run"
    options = overrides(run_dir, *SMALL, "train.micro_batch_size=5", f"backend.zero_stage={stage}")
    assert main(["doctor", ENCODER, "--ranks", "3", *options]) == 0
    told = capsys.readouterr().out
    engine = f"ZeRO {stage}" if stage else "DDP"
    for line in (
        r"config    ok       .*digits_encoder.yaml: task two_view, 4 steps",
        r"data      ok       1437 samples; an epoch is 59.9 steps of 24",
        r"samples   ok       512 looked at, spread evenly",
        r"ranks     ok       3 x 8 rows, in micro-batches of 5",
        rf"run       ok       {re.escape(str(run_dir))} holds no checkpoint: training starts",
        rf"model     ok       \d+,\d\d\d trained parameters; adamw, {engine}, fp32",
        r"disk      ok       \S+ KiB for checkpoints, \S+ [MG]iB are free; one takes \S+ s",
        r"gradient  ok       \d+ parameters have that of one process to \de-0[4-9]",
        r"speed     ok       about \S+ s a step on CPUs .*, \d+ s for 4; \d\S+ [MG]iB a rank",
    ):
        assert re.search(f"^{line}$", told, re.MULTILINE), (line, told)
    assert not run_dir.exists()


def test_where_a_run_goes_on(tmp_path, overrides, capsys):
    options = overrides(tmp_path, *SMALL)
    config = configs.load(ENCODER, options)
    assert trainer.train(config, stop_after=2) == 75
    assert main(["doctor", ENCODER, *options]) == 0, capsys.readouterr().out
    assert "holds step 2 of 4: training goes on there" in capsys.readouterr().out
    assert trainer.train(config) == 0
    assert main(["doctor", ENCODER, *options]) == 0
    assert "is trained to step 4 already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ranks", "options", "sentence"),
    [
        (2, ["data.train=nowhere"], "data      PROBLEM  the shard folder nowhere does not exist"),
        (4, [], "data      PROBLEM  lanes=6 is not divisible by world_size=4; set lanes="),
        (
            2,
            [BATCH_NORM],
            "BatchNorm2d) of TwoView normalises with statistics of the batch, and on 2 ranks those "
            "are of a part of it: set row_independent: true, or use a network with GroupNorm.",
        ),
        (
            1,
            [BATCH_NORM, "train.micro_batch_size=5"],
            "and with train.micro_batch_size=5 those are of a part of it",
        ),
        (1, ["task.label=3"], "label"),
        (1, ["backend.zero_stage=1", "backend.precision=fp16"], "precision=fp16"),
    ],
)
def test_what_cannot_work(ranks, options, sentence, tmp_path, overrides, capsys):
    command = ["doctor", ENCODER, *overrides(tmp_path, *SMALL), "--ranks", str(ranks), *options]
    assert main(command) == 64
    told = capsys.readouterr()
    assert sentence in told.out + told.err


def pixels(number: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (channels, 8, 8), dtype=np.uint8)


SAMPLES = {
    "another shape": (lambda n: {"png": pixels(n, 3 if n == 35 else 1)}, "sample 35 holds 3 x 8"),
    "NaN": (lambda n: {"npy": np.full((1, 8, 8), np.nan if n == 35 else n / 40)}, "sample 35"),
    "no image": (lambda n: {"png": b"?" if n > 27 else pixels(n)}, "12 of 40 samples looked at"),
    "one image": (
        lambda n: {"png": pixels(0)},
        "all 40 samples looked at hold the same in data.im",
    ),
    "one text": (lambda n: {"png": pixels(n), "txt": "cat"}, "hold the same in data.pair"),
    "no text": (lambda n: {"png": pixels(n), "json": {"a": f"{n}"} if n < 3 else {}}, "'json.a'"),
}


def test_held_out_data_without_a_field_are_told_of_before_training(tmp_path, caplog):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        more = {"txt": "x"} if split == "train" else {}
        rows = [{"__key__": f"{n}", "png": pixels(n), **more} for n in range(8)]
        write_samples(tmp_path / split / "0.tar", rows)
        index_folder(tmp_path / split)
    config = {"train": f"{tmp_path}/train", "test": f"{tmp_path}/test", "global_batch_size": 8}
    open_data(DataConfig.checked({**config, "pair": "txt"}), seed=0)
    assert "data.test has no field 'txt'" in caplog.text


def looked_at(folder: Path, samples: Iterable[dict], **fields: str) -> str:
    write_samples(folder / "0.tar", ({"__key__": f"{n:02d}", **x} for n, x in enumerate(samples)))
    index_folder(folder)
    config = {"train": str(folder), "global_batch_size": 8, **fields}
    data = open_data(DataConfig.checked(config), seed=0)
    return probe(data, max_skipped=10, consumed=40)


@pytest.mark.parametrize(("sample", "words"), SAMPLES.values(), ids=SAMPLES)
def test_samples_that_would_end_a_run_later_or_teach_nothing(sample, words, tmp_path):
    last = sorted(sample(0))[-1]
    fields = {"pair": {"txt": "txt", "png": "json.a"}[last]} if len(sample(0)) > 1 else {}
    with refused(DataError, words):
        looked_at(
            tmp_path, map(sample, range(40)), image="npy" if last == "npy" else "png", **fields
        )


def test_samples_that_a_run_may_skip_are_told_of(tmp_path):
    samples = (
        {"png": pixels(n) if n else b"?", "txt": " " if n == 7 else f"{n}"} for n in range(40)
    )
    told = looked_at(tmp_path, samples, pair="txt")
    assert told.startswith("40 looked at, spread evenly, of which 1 cannot be read: field 'png'")
    assert told.endswith("; 1 have a blank text")


def test_the_doctor_looks_at_samples(tmp_path, overrides, capsys):
    same = pixels(0)
    write_samples(tmp_path / "0.tar", [{"__key__": f"{n}", "png": same} for n in range(40)])
    index_folder(tmp_path)
    options = [*overrides(tmp_path / "run", *SMALL), f"data.train={tmp_path}", "data.test=null"]
    options += ["data.label=null", "data.num_classes=null"]
    assert main(["doctor", ENCODER, *options]) == 64
    problem = capsys.readouterr().out.splitlines()[-1]
    assert problem.startswith("samples   PROBLEM  all 40 samples looked at hold the same in data.")


def test_batch_norm_of_a_whole_batch_trains(tmp_path, overrides):
    """One process with all rows at once: its statistics are those of the batch."""
    assert trainer.train(configs.load(ENCODER, overrides(tmp_path, *SMALL, BATCH_NORM))) == 0


def test_a_changed_loss_or_data_is_refused_with_both_values(tmp_path, overrides, capsys):
    options = overrides(tmp_path, *SMALL)
    assert trainer.train(configs.load(ENCODER, options), stop_after=2) == 75
    for change, words in (
        ("task.loss.temperature=0.7", "task.loss.temperature: 0.2 -> 0.7"),
        ("data.global_batch_size=48", "data.global_batch_size: 24 -> 48"),
        ("backend.precision=bf16", "backend.precision: fp32 -> bf16"),
        (f"data.train={tmp_path.parent}/none", "does not exist"),
    ):
        assert main(["doctor", ENCODER, *options, change]) == 64
        assert words in capsys.readouterr().out
        with pytest.raises(UserError, match=re.escape(words)):
            trainer.train(configs.load(ENCODER, [*options, change]))


@pytest.mark.slow  # one that is full in test_hostile.py and test_faults.py
def test_a_disk_that_is_too_small(tmp_path, overrides):
    """A file system of 64 KB, seen before anything is written."""
    argv = command("doctor", ENCODER, *overrides(tmp_path / "run", *SMALL))
    mount = f"mount -t tmpfs -o size=64k none {tmp_path} && "
    done = run(["unshare", "-rm", "sh", "-c", mount + shlex.join(argv)])
    assert done.returncode == 64, done.stderr
    words = r"disk      PROBLEM  \d+ KiB for checkpoints, 64 KiB are free"
    assert re.search(words, done.stdout), done.stdout


@pytest.mark.parametrize("name", ["eight_gaussians", "digits_hybrid", "digits_captions"])
def test_speed_and_memory_of_a_task(name, tmp_path, overrides, capsys):
    """Of a rank of many, from the rows that one such step has, or from fewer."""
    path = CONFIGS / f"{name}.yaml"
    more = ["train.steps=7200", "data.balance=null"]
    options = overrides(tmp_path, *more, data_name=data_of(path))
    assert main(["doctor", str(path), *options, "--ranks", "2"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.search(
        r"about (\S+) s a step .*, (\d+) (s|min|h|days) for 7200; (\S+) ([MG])iB", line
    )
    assert found, line
    assert float(found[1]) > 0
    assert float(found[4]) * {"M": 1, "G": 1024}[found[5]] > 100
