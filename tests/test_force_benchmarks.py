"""The benchmarks of the contrastive force: what is compared agrees, and they run, at tiny sizes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_contrastive import losses
from dist_contrastive.testing import run_ranks

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import force
import force_precision
import force_runs
from force_baselines import HAS_KEOPS, clouds

DENSE = [name for name in force_runs.BASELINES if name.endswith("recorded")]


@pytest.mark.parametrize("shape", [(37, 9), (3, 12, 9)], ids=["one group", "groups"])
@pytest.mark.parametrize("name", DENSE)
def test_dense_code_is_what_ours_computes(name, shape):
    points = clouds(shape, torch.float64)
    preset = name.partition(",")[0]
    dense, chunked = (
        force_runs.step(loss, *points)
        for loss in (force_runs.loss_of(name), losses.ContrastiveForce(preset=preset, chunk_size=8))
    )
    assert dense[1].norm() > 0
    # The seed's own n - sg(n + F) rounds F beside n.
    torch.testing.assert_close(chunked, dense, rtol=1e-9, atol=1e-12)


def test_ranks_take_turns_and_agree():
    names = ["drift, computed on all ranks", force_runs.ours("drift", "ring")]
    for times, errors in run_ranks(force_runs.timed, 2, names, "drift", (32, 8), 2):
        assert np.shape(times) == (2, 2)
        assert np.max(errors) < 1e-5


def test_errors_are_seen():
    points = clouds((32, 8))
    right, wrong = (
        force_runs.step(losses.ContrastiveForce(preset=name), *points) for name in ("drift", "seed")
    )
    assert force_runs.errors(right, right) == [0, 0]
    assert min(force_runs.errors(wrong, right)) > 0.1


def test_memory_of_a_fresh_process():
    """Autograd records at least the affinities of five temperatures, 1024 x 1024 in fp32."""
    name = "drift, recorded"
    assert 5 * 4 < force_runs.peak_in_own_process(name, (512, 4)) < 50 * 4


def test_a_table_is_printed(capsys):
    force.main(["--sizes", "small", "--tables", "products"])
    title, _, *table, _ = capsys.readouterr().out.splitlines()
    assert title.startswith("products, at a load of ")
    assert [row.split()[1] for row in table] == ["preset", "---", "seed", "drift", "paper"]


def test_cells():
    times = np.array([[8.0, 6.0, 100.0], [1.0, 2.0, 3.0]])
    cells = force.as_cells(times, np.array([[np.nan, 1e-3], [1e-6, 2e-6]]), [120.0, 10.0])
    assert cells == ["8 / 2", "8.0", "6.0", "120 / 10", "12.0", "nan, 1e-03", "1e-06, 2e-06"]


@pytest.mark.skipif(HAS_KEOPS, reason="KeOps is there, and takes a minute to compile")
def test_keops_is_optional(capsys):
    force.main(["--sizes", "small", "--tables", "keops"])
    assert "KeOps is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", force_precision.DTYPES)
@pytest.mark.parametrize("preset", force_precision.DENSE)
def test_points_of_low_precision_cost_one_rounding(preset, dtype):
    """That of the gradient as it is handed back; dense code rounds everything."""
    ours, dense = force_precision.errors(preset, dtype, dim=8, points=64, draws=2)
    assert 0 < ours.force < 5e-6
    if dtype == torch.float32:
        assert max(ours.gradient, *dense) < 5e-6
    else:
        assert ours.gradient < torch.finfo(dtype).eps / 2 < min(dense)
