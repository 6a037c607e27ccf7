"""The tables of benchmarks/supervision.py: every run can start, none is done twice, and one that
fails takes no other along."""

import sys
from pathlib import Path

import pytest
import torch

from dist_contrastive import trainer
from dist_contrastive.errors import ConfigError
from dist_contrastive.runs import load_weights

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import metric_learning
import supervision
import supervision_runs
from supervision_runs import Job, Variant

ALL = {variant.run: variant for table in supervision.TABLES.values() for variant in table.variants}


@pytest.fixture
def folder(tmp_path, digits) -> Path:
    (tmp_path / "digits").symlink_to(digits)
    return tmp_path


def test_every_run_can_start(folder):
    for table in supervision.TABLES.values():
        assert table.measure in supervision_runs.MEASURES
        for variant in table.variants:
            trainer.check(Job(variant, table.measure, 0, folder, quick=False).config(), 1)
            assert variant.against in {"", *(other.title for other in table.variants)}


@pytest.mark.parametrize("ours", supervision.CHECKED, ids=lambda variant: variant.run)
def test_only_the_loss_is_theirs(folder, ours):
    """Three steps end at the same weights, but for one bias that VICReg leaves alone: AdamW takes
    whole steps even along a gradient that is nothing but rounding."""
    config = Job(ours, "probes", 3, folder, quick=True).config()
    found, differences = metric_learning.train(config)
    assert max(differences) < 1e-6
    start = config.build_task(supervision_runs.digits_of(config.data.train))
    before = torch.nn.utils.parameters_to_vector(start.parameters())
    assert trainer.train(config) == trainer.EXIT_DONE
    load_weights(start, config.run_dir)
    expected, mine = (torch.nn.utils.parameters_to_vector(x.parameters()) for x in (start, found))
    assert (mine - expected).norm() < 0.02 * (expected - before).norm()


def test_what_is_done_is_not_done_again(folder):
    job = Job(ALL["hybrid"], "classifier", 0, folder, quick=True)
    results = supervision_runs.results_of(job)
    assert 0 <= results["class"] <= results["group"] <= 1
    (folder / "digits").unlink()  # neither trained nor measured without them
    assert supervision_runs.results_of(job) == results
    with pytest.raises(ConfigError, match="other settings"):
        supervision_runs.results_of(job._replace(quick=False))


@pytest.mark.slow
def test_a_failing_run_takes_no_other_along(folder, monkeypatch):
    monkeypatch.setattr(supervision, "PROCESSES", 1)  # each takes seconds to start
    good = ALL["pixels"]
    bad = Variant("nothing", "nothing", "no_such", against=good.title)
    table = supervision.TABLES["B"]._replace(variants=(good, bad))
    found = supervision.run_all(table, range(2), folder, quick=True)
    *_, first, second = supervision.as_markdown(table, found, range(2))
    assert first.startswith("| raw pixels | 0.8")
    assert second.startswith("| nothing | none; seed 0, 1: ConfigError: cannot read the config")


def test_cells():
    table = supervision.Table("", "probes", ("x",), (), difference="less b", largest=("worst",))
    a, b = Variant("a", "a", "", against="b"), Variant("b", "b", "")
    found: supervision.Found = {
        ("a", 0): {"x": 0.5, "worst": 1e-8},
        ("a", 1): {"x": 0.7, "worst": 1e-7},
        ("a", 2): "Error: a | b\nc",
        ("b", 0): {"x": 0.4},
        ("b", 1): {"x": 0.4},
        ("b", 2): {"x": 0.4},
    }
    lines = supervision.as_markdown(table._replace(variants=(a, b)), found, range(3))
    assert lines[0] == "|  | x | less b | worst |"
    reason = "seed 2: Error: a / b c"
    assert lines[2] == f"| a | 0.600 ± 0.141 (n = 2); {reason} | +0.200 ± 0.100 | 1e-07 |"
    assert lines[3] == "| b | 0.400 ± 0.000 |  |  |"
