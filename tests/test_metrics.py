"""What a run tells of itself: numbers against their formulas, trackers, profiles, whole lines."""

import json
import math
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import CONFIGS
from torch import Tensor

from dist_contrastive import config as configs
from dist_contrastive import trainer
from dist_contrastive.backend import trackers
from dist_contrastive.cli import main
from dist_contrastive.errors import CollapseError, ConfigError
from dist_contrastive.metrics import (
    Clock,
    JsonLines,
    duplicates,
    forget_steps,
    geometry,
    rank_me,
    read_rows,
)
from dist_contrastive.testing import run_ranks

ENCODER = CONFIGS / "digits_encoder.yaml"
SMALL = (
    *("task.encoder={name: residual, widths: [8, 16]}", "task.head={hidden: 16, out: 8}"),
    *("data.global_batch_size=16", "optim.warmup_steps=0", "train.steps=4"),
)
ROWS, DIM, TEMPERATURE = 30, 6, 0.2


def pairs_of(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, noise = torch.randn(2, ROWS, DIM, generator=generator)
    index = torch.randint(0, 20, (ROWS,), generator=generator)
    return a[rows], (a + noise)[rows], index[rows]


def naive(a: Tensor, b: Tensor) -> dict[str, float]:
    """The definitions, pair by pair."""
    a, b = F.normalize(a.double(), dim=-1), F.normalize(b.double(), dim=-1)
    n = len(a)
    others = [(i, j) for i in range(n) for j in range(n) if i != j]
    counts = []
    for i in range(n):
        p = torch.tensor([float(a[i] @ b[j]) / TEMPERATURE for j in range(n) if j != i]).softmax(0)
        counts.append(math.exp(-float((p * p.log()).sum())))
    singular = torch.linalg.svdvals(a)
    shares = singular / singular.sum()
    return {
        "positive_similarity": sum(float(a[i] @ b[i]) for i in range(n)) / n,
        "negative_similarity": sum(float(a[i] @ b[j]) for i, j in others) / len(others),
        "recall_at_1": sum(
            all(float(a[i] @ b[i]) > float(a[i] @ b[j]) for j in range(n) if j != i)
            for i in range(n)
        )
        / n,
        "alignment": sum(float((a[i] - b[i]).square().sum()) for i in range(n)) / n,
        "uniformity": math.log(
            sum(math.exp(-2 * float((a[i] - a[j]).square().sum())) for i, j in others) / len(others)
        ),
        "effective_negatives": sum(counts) / n,
        "embedding_std": sum(float(a[:, d].std(correction=0)) for d in range(DIM)) / DIM**0.5,
        "effective_rank": math.exp(-sum(float(p) * math.log(float(p)) for p in shares)),
    }


def of_this_rank(limit: int) -> tuple[dict[str, float], int]:
    sizes = {1: [30], 3: [7, 0, 23]}[dist.get_world_size()]
    first = sum(sizes[: dist.get_rank()])
    a, b, index = pairs_of(slice(first, first + sizes[dist.get_rank()]))
    return geometry(a, b, TEMPERATURE, limit), duplicates(index)


@pytest.mark.parametrize("limit", [1024, 12])
@pytest.mark.parametrize("world_size", [1, 3])
def test_geometry_is_that_of_the_global_batch(world_size, limit):
    """Uneven rows, and a rank without any; the first rows where there are more than enough."""
    expected = naive(*(x[:limit] for x in pairs_of(slice(None))[:2]))
    repeated = ROWS - len(set(pairs_of(slice(None))[2].tolist()))
    assert repeated > 5
    for found, count in run_ranks(of_this_rank, world_size, limit):
        assert found == pytest.approx(expected, rel=1e-4)
        assert count == repeated


def test_equal_partners_share_a_hit():
    """Of texts that repeat, and of an encoder that maps everything to one point."""
    x = torch.eye(8)
    assert geometry(x, x)["recall_at_1"] == 1
    assert geometry(x[[0, 0, 0, 1]], x[[0, 0, 0, 1]])["recall_at_1"] == pytest.approx(0.5)
    assert geometry(x[:1].expand(8, -1), x[:1].expand(8, -1))["recall_at_1"] == pytest.approx(1 / 8)
    assert geometry(x, x.roll(1, 0))["recall_at_1"] == 0


def test_no_temperature_no_effective_negatives():
    a, b, _ = pairs_of(slice(None))
    assert "effective_negatives" not in geometry(a, b)
    assert geometry(a[:1], b[:1]) == {}


def test_every_logged_row_has_the_parts_of_the_step(tmp_path, overrides):
    for name, size in (("plain", "null"), ("cached", "5")):
        options = overrides(tmp_path / name, *SMALL, f"train.micro_batch_size={size}")
        assert trainer.train(configs.load(ENCODER, options)) == 0
        for row in read_rows(tmp_path / name):
            parts = {k: row[f"{k}_s"] for k in ("data", "embed", "compare", "replay", "optimizer")}
            assert all(value > 0 for value in parts.values()), parts
            assert sum(parts.values()) < row["step_s"]
            assert row["memory_peak_mb"] > 100
            assert row["parameter_norm"] > 1
            assert row["duplicates"] == 0
            assert row["alignment"] == pytest.approx(2 - 2 * row["positive_similarity"], rel=1e-3)
            assert 1 <= row["effective_negatives"] <= 15
            assert row["samples_per_s"] * row["step_s"] == pytest.approx(16)


DOUBTS = {  # config, options, words that are said once
    "one temperature for all": (
        "digits_encoder",
        ["task.loss={name: ntxent, temperature: 1.0e+9}"],
        "the loss stays at 4.14",
    ),
    "by chance": ("digits_captions", ["optim.lr=1e-30"], "find their partners no oftener"),
    "no negatives": (
        "digits_encoder",
        ["task.loss={name: vicreg, variance_weight: 0, covariance_weight: 0}", "optim.lr=0.02"],
        "embeddings have collapsed onto a line",
    ),
    "too high a rate": ("digits_encoder", ["optim.lr=3"], "embeddings have collapsed"),
    "ignored": ("digits_encoder", ["optim.lr=3", "evaluate.on_collapse=ignore"], None),
    "nothing": ("digits_encoder", [], None),
    "forces": ("eight_gaussians", [], None),
}


@pytest.mark.parametrize("case", DOUBTS)
def test_what_learns_nothing_is_said_once(case, tmp_path, overrides, capsys):
    name, options, words = DOUBTS[case]
    path = CONFIGS / f"{name}.yaml"
    small = ["data.global_batch_size=32", "optim.warmup_steps=0", "train.steps=25"]
    data = {"data_name": "eight_gaussians"} if name == "eight_gaussians" else {}
    if not data:
        small.append("task.encoder={name: residual, widths: [8, 16]}")
    assert main(["train", str(path), *overrides(tmp_path, *small, *options, **data)]) == 0
    told = capsys.readouterr().err
    assert told.count("nothing is learned") == (words is not None), told
    assert words is None or words in told


def test_effective_rank():
    """Equal shares in as many directions, whatever the shape; rows that are all equal."""
    for shape in ((40, 12), (12, 40)):
        assert rank_me(torch.linalg.qr(torch.randn(shape)).Q) == pytest.approx(12, rel=1e-3)
    assert rank_me(torch.ones(50, 8)) == pytest.approx(1, abs=1e-3)
    assert rank_me(torch.zeros(5, 3)) == 0


def outcome_of(config) -> str:
    try:
        return str(trainer.train(config))
    except CollapseError as error:
        return str(error)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_collapse_may_stop_a_run(ranks, tmp_path, overrides):
    """On all ranks; the checkpoint before it stays, and a healthy run is let alone."""
    stop = ("data.global_batch_size=32", "optim.warmup_steps=0", "train.steps=25")
    stop += ("evaluate.on_collapse=stop", "task.encoder={name: residual, widths: [8, 16]}")
    healthy, config = (
        configs.load(ENCODER, overrides(tmp_path / name, *stop, f"optim.lr={lr}"))
        for name, lr in (("healthy", 0.002), ("run", 3))
    )
    for said in run_ranks(outcome_of, ranks, config):
        assert said.startswith("embeddings have collapsed")
        assert "optim.lr" in said
    rows = read_rows(tmp_path / "run")
    assert 10 <= rows[-1]["step"] < 25
    assert rows[-1]["embedding_std"] < 0.05
    assert run_ranks(outcome_of, ranks, healthy) == ["0"] * ranks
    assert CollapseError.exit_code == 70


@pytest.mark.parametrize("name", ["doctor", "train"])
def test_a_loss_of_nothing_that_is_trained_is_refused(name, tmp_path, overrides, capsys):
    options = overrides(tmp_path, *SMALL, "task.loss={name: 'own_modules:Constant'}")
    assert main([name, str(ENCODER), *options]) == 64
    told = capsys.readouterr()
    assert "the loss depends on nothing that is trained" in told.out + told.err


def test_time_between_two_rows_is_split_over_their_steps():
    clock = Clock(0, torch.device("cpu"))
    for _ in range(3):
        clock.begin_step(is_logged=False)
        with clock.spent("embed"):
            end = torch.ones(300, 300) @ torch.ones(300, 300)
    rates = clock.rates(consumed=30, reduce_s=0.6)
    assert end.sum() > 0
    assert 0 < rates["embed_s"] < rates["step_s"]
    assert rates["reduce_s"] == pytest.approx(0.2)
    assert rates["compare_s"] == 0


def test_profile_of_some_steps(tmp_path, overrides):
    """A trace that browsers open, of these steps alone."""
    options = overrides(tmp_path, *SMALL, "train.profile_steps=[2, 3]")
    assert trainer.train(configs.load(ENCODER, options)) == 0
    trace = json.loads((tmp_path / "profile" / "rank-0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::convolution" in names


def test_profile_of_steps_that_are_not_there(tmp_path, overrides):
    for steps, words in (
        ("[3, 2]", "give the first one first"),
        ("[2, 9]", "with train.steps=4; give"),
    ):
        with pytest.raises(ConfigError, match=words):
            configs.load(ENCODER, overrides(tmp_path, *SMALL, f"train.profile_steps={steps}"))


def test_wandb_goes_on_with_one_run(tmp_path, overrides, monkeypatch):
    """Offline; each start of the run writes under the id that stands in its directory."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = overrides(tmp_path, *SMALL, "train.trackers=[tensorboard, wandb]")
    config = configs.load(ENCODER, options)
    assert trainer.train(config, stop_after=2) == 75
    assert trainer.train(config) == 0
    run_id = (tmp_path / "run_id").read_text().strip()
    written = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert written == [f"run-{run_id}.wandb"] * 2
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_trackers_that_are_not_there(tmp_path, overrides, monkeypatch):
    def missing(*_, **__):
        raise ImportError("No module named 'trackio'")

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "trackio", missing)
    config = configs.load(ENCODER, overrides(tmp_path, *SMALL, "train.trackers=[trackio]"))
    with pytest.raises(ConfigError, match=r"names trackio, which is not installed; pip install tr"):
        trainer.train(config)


def test_a_tracker_that_fails_is_dropped(tmp_path, overrides, monkeypatch, caplog):
    class Failing:
        name = "wandb"
        calls = 0

        def __init__(self, *_, **__):
            pass

        def start(self):
            pass

        def store_init_configuration(self, values):
            assert values["train"]["steps"] == 4

        def log(self, values, step):
            Failing.calls += 1
            raise ConnectionError("the server is gone")

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", Failing)
    config = configs.load(ENCODER, overrides(tmp_path, *SMALL, "train.trackers=[wandb]"))
    assert trainer.train(config) == 0
    assert Failing.calls == 1
    assert "wandb failed (the server is gone); the training goes on without it" in caplog.text


def test_lines_are_whole_or_not_there(tmp_path: Path, caplog):
    """A file that may not grow takes a part of a line only."""
    lines = JsonLines(tmp_path / "rows.jsonl")
    lines.write({"step": 1, "text": "x" * 50})
    size = os.path.getsize(tmp_path / "rows.jsonl")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, limits[1]))
        for step in (2, 3):
            lines.write({"step": step, "text": "x" * 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    lines.write({"step": 4})
    lines.close()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 4]
    assert caplog.text.count("is not written") == 1
    assert "rows.jsonl lacks 2 lines" in caplog.text


def test_lines_of_steps_that_are_done_again_are_removed(tmp_path: Path):
    """Steps in the ledger count from 0, rows of metrics count steps that are done."""
    (tmp_path / "ledger").mkdir()
    for name in ("ledger/rank-0.jsonl", "skipped.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"step": {n}}}\n' for n in range(4)) + '{"st')
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2, 3]
    forget_steps(tmp_path, 2)
    assert (tmp_path / "ledger" / "rank-0.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'
    assert (tmp_path / "skipped.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2]
