"""The planner's formulas are what a step without data and a fake group of ranks count; and the
benchmark for a card, which is not here, runs."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, refused, run

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "gpu"))
import draw
import fake
import predict
import tables
from measure import lines
from run import STAGES

from dist_contrastive import config as configs
from dist_contrastive import planner
from dist_contrastive.cli import main
from dist_contrastive.errors import ConfigError
from dist_contrastive.planner import Asked
from dist_contrastive.planner_constants import FP32_PRODUCTS, KERNELS, SPECS
from dist_contrastive.trainer.failures import plan_of_run

ROOT = Path(__file__).parents[1]


def asked_of(name: str, rows: int, dim: int, ranks: int = 1, **more: str) -> Asked:
    """Of so many rows of scores on each rank."""
    loss, _, symmetric = name.partition(", ")
    samples = rows * ranks // SPECS[name].rows
    return Asked(loss, samples, dim, ranks, symmetric=bool(symmetric), **more)


# None of these shapes is one of those that the constants were read from.
SHAPES = [
    *((24576, 640, 1, "bf16", "gather"), (12288, 640, 6, "bf16", "gather")),
    *((12288, 640, 6, "bf16", "ring"), (12288, 640, 6, "fp32", "ring")),
    (24576, 640, 1, "fp32", "gather"),
]
READ_AGAIN = "are constants old? python benchmarks/gpu/predict.py --constants --write"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("name", SPECS)
def test_formulas_are_what_is_counted(name, shape):
    """Memory, launches, and what collectives are given, of which divisions may round a byte."""
    check(name, *shape)


@pytest.mark.parametrize(
    "shape",
    [
        (65536, 768, 1, "bf16", "gather"),
        (16384, 768, 64, "bf16", "gather"),
        pytest.param((16384, 768, 64, "bf16", "ring"), marks=pytest.mark.slow),
    ],
    ids=lambda shape: "-".join(map(str, shape)),
)
def test_formulas_at_full_size(shape):
    check("infonce, symmetric", *shape)


def check(name: str, rows: int, dim: int, ranks: int, dtype: str, keys_from: str) -> None:
    planned = planner.plan(asked_of(name, rows, dim, ranks, dtype=dtype, keys_from=keys_from))
    found = fake.counted(name, rows // SPECS[name].rows, dim, dtype, ranks, keys_from)
    beyond = planned.total_memory - planned.memory["inputs and their gradients"]
    assert beyond == pytest.approx(found.peak, rel=0.02), READ_AGAIN
    launches = found.launches + len(found.kernels)
    assert planned.launches == pytest.approx(launches, rel=0.05), READ_AGAIN
    assert sum(planned.sent.values()) == pytest.approx(found.sent.total(), rel=0, abs=2)


@pytest.mark.parametrize(
    ("points", "dim", "ranks", "keys_from"),
    [
        *((32768, 1024, 1, "gather"), (2048, 256, 1, "gather")),
        *((8192, 512, 8, "gather"), (8192, 512, 8, "ring")),
    ],
)
def test_formulas_of_the_force(points, dim, ranks, keys_from):
    """Distances are kept, as the planner has it, unless they come in a ring."""
    planned = planner.plan(Asked("force", points * ranks, dim, ranks, keys_from=keys_from))
    is_ring = keys_from == "ring"
    found = fake.force_counted(points, dim, ranks, keys_from, 0.0 if is_ring else 2.0**15)
    beyond = planned.total_memory - planned.memory["inputs and their gradients"]
    assert beyond == pytest.approx(found.peak, rel=0.03)
    launches = found.launches + len(found.kernels)
    assert planned.launches == pytest.approx(launches, rel=0.1)
    assert sum(planned.sent.values()) == pytest.approx(found.sent.total(), rel=1e-4)


def test_a_ring_does_not_grow_with_its_ranks_and_a_gather_does():
    def memory(ranks: int, keys_from: str) -> int:
        return planner.plan(asked_of("siglip", 4096, 512, ranks, keys_from=keys_from)).total_memory

    assert memory(4, "ring") == memory(512, "ring")
    small, large, larger = (memory(ranks, "gather") for ranks in (64, 128, 256))
    assert larger - large == pytest.approx(2 * (large - small), rel=0.2)


@pytest.mark.slow  # compiles sixteen kernels
def test_cycles_are_those_of_the_machine_code():
    for (loss, kind), kernels in predict.kernel_table().items():
        for found, known in zip(kernels, KERNELS[loss, kind], strict=True):
            assert found.blocks == known.blocks, (loss, kind)
            assert found.cycles == pytest.approx(known.cycles, rel=0.1), (loss, kind)
    assert predict.fp32_products() == pytest.approx(FP32_PRODUCTS, rel=0.05)


def test_time_grows_as_it_should():
    """With the square of the batch; part by part; and none is faster than the tensor cores."""
    small, large = (planner.plan(asked_of("siglip", n, 768)) for n in (2**16, 2**17))
    for part in ("scores and their gradients", "products"):
        assert large.seconds[part] == pytest.approx(4 * small.seconds[part])
    assert large.total_s > 8 * (2**17) ** 2 * 768 / 990e12
    fp32 = planner.plan(asked_of("siglip", 2**16, 768, dtype="fp32"))
    assert fp32.total_s > 3 * small.total_s
    few = planner.plan(asked_of("siglip", 256, 64))
    assert few.total_s == few.seconds["launches"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--global-batch 100 --dim 8 --ranks 64", "100 is not divisible by 64 ranks; give 64 or"),
        ("--global-batch 3 --dim 8 --ranks 64", "3 is not divisible by 64 ranks; give 64"),
        ("--global-batch 1 --dim 8", "global batch 1 is not 2 to 2,147,483,648"),
        ("--global-batch 8 --dim 0", "dim 0 is not 1 to 65,536"),
        ("--global-batch 8 --dim 99999", "dim 99999 is not 1 to"),
        ("--global-batch 8 --dim 8 --ranks 0", "ranks 0 is not 1 to"),
        ("--global-batch 8 --dim 8 --keys-from ring", "a ring of 1 rank exchanges nothing; give"),
        ("--global-batch 8 --dim 8 --loss triplet", "loss 'triplet' is not planned; give infonce,"),
        ("--global-batch 8 --dim 8 --card h900", "card 'h900' is not known; give a100, h100"),
        ("--global-batch 8 --dim 8 --loss siglip --symmetric", "symmetric is of infonce, not of"),
    ],
)
def test_what_cannot_be_planned(options, words, capsys):
    assert main(["plan", *options.split()]) == 64
    message = capsys.readouterr().err
    assert words in message
    assert len(message.strip().splitlines()) == 1


def test_plan_in_a_table_and_as_json(capsys):
    options = ["plan", "--global-batch", "1048576", "--dim", "768", "--ranks", "64", "--symmetric"]
    assert main(options) == 0
    told = capsys.readouterr().out
    assert told.startswith("infonce, symmetric, 1,048,576 x 768 in bf16 over 64 ranks by gather")
    for words in ("data sheet", "a step", "memory", "a rank sends", "wire", "launches"):
        assert words in told
    assert main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 16384
    assert found["keys"] == 2**20
    assert found["total_memory"] == sum(found["memory"].values())


def test_what_does_not_fit_names_what_would(capsys):
    assert main(["plan", "--global-batch", "16777216", "--dim", "1024", "--ranks", "16"]) == 0
    told = capsys.readouterr().out
    assert "h100 has 74.5 GiB; 16 ranks by ring would do" in told


@pytest.mark.parametrize("loss", planner.LOSSES)
def test_every_loss_on_every_card(loss):
    for card in ("a100", "h100", "h200", "b200"):
        for dtype in ("bf16", "fp32"):
            one = Asked(loss, 65536, 768, dtype=dtype, card=card)
            for asked in (one, replace(one, ranks=16, keys_from="ring")):
                found = planner.plan(asked)
                assert found.fits
                assert 0 < found.total_s < 60


def test_doctor_tells_the_plan_of_the_run(tmp_path, capsys):
    config = str(CONFIGS / "digits_encoder.yaml")
    options = [f"data.train={tmp_path}", "data.global_batch_size=512", "task.loss.keys_from=ring"]
    assert main(["doctor", config, "--ranks", "4", *options]) == 64  # there are no data
    assert (
        "plan      ok       ntxent, 512 x 64 in fp32 over 4 ranks by ring, on h100 (data sheet): "
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("config", "is_planned"),
    [
        ("digits_captions", True),
        ("digits_supcon", True),
        ("digits_triplet", False),
        ("digits_moco", False),
        ("digits_generator", False),
        ("digits_multicrop", False),
    ],
)
def test_which_runs_are_planned(config, is_planned):
    found = plan_of_run(configs.load(CONFIGS / f"{config}.yaml"), 1)
    assert (found is not None) == is_planned


def test_ranks_that_do_not_divide_the_batch_are_told_of_elsewhere():
    assert plan_of_run(configs.load(CONFIGS / "digits_encoder.yaml"), 7) is None
    with refused(ConfigError, "512 is not divisible by 7"):
        planner.plan(Asked("ntxent", 512, 64, ranks=7))


def test_predictions_are_in_the_document():
    """As they are printed, but for what was measured."""
    document = (ROOT / "docs" / "gpu.md").read_text()
    for line in predict.table_of("h100"):
        assert line.rpartition("|")[0].rpartition("|")[0] in document, line


def test_the_benchmark_runs_without_a_card(tmp_path):
    script = str(ROOT / "benchmarks" / "gpu" / "run.py")
    argv = [sys.executable, script, "--device", "cpu", "--small", "--out", str(tmp_path)]
    done = run([*argv, "--stages", "ceilings", "peers"])
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("gpu-cpu-*.jsonl")
    names = {line["name"] for line in lines(file)}
    assert {"environment", "product bf16", "copy", "host"} <= names
    assert not [line for line in lines(file) if "error" in line and line["stage"] == "ceilings"]
    assert "| what the card does | rate |" in file.with_suffix(".md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_the_benchmark_says_that_there_is_no_card(tmp_path):
    script = str(ROOT / "benchmarks" / "gpu" / "run.py")
    done = run([sys.executable, script, "--out", str(tmp_path)])
    assert done.returncode == 1
    assert "torch finds no CUDA device here; try --device cpu --small" in done.stderr


def test_its_stages_take_less_than_nine_minutes():
    assert sum(stage.limit_s for stage in STAGES.values()) < 9 * 60


def test_a_picture_has_the_ways_side_by_side(tmp_path):
    known = {"loss": "dcl", "dtype": "bf16", "rows": 8, "dim": 4}
    found = [{**known, "way": "ours", "ms": 1.5}, {**known, "way": "dense", "ms": 3.0}]
    file = tmp_path / "gpu.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in [*found, {"name": "copy", "ms": 1}]))
    assert draw.grouped(list(lines(file))) == {"dcl, bf16, 8 x 4": {"ours": 1.5, "dense": 3.0}}
    assert draw.draw(file).stat().st_size > 5000
    file.write_text("")
    assert draw.draw(file) is None


def test_tables_have_every_kind_of_line():
    found = [
        {"stage": "losses", "name": "x", "loss": "dcl", "way": "ours", "rows": 8, "ms": 1.5},
        {"stage": "losses", "name": "gradient error dcl", "loss": "dcl", "ours": 1e-3},
        {"stage": "force", "name": "y", "error": "ValueError: no"},
        {"stage": "peers", "name": "memeff", "skipped": "is not installed"},
    ]
    text = tables.text_of(found)
    for words in ("| dcl |", "1.5", "ours 0.001", "ValueError: no", "is not installed"):
        assert words in text
