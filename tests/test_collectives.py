"""Gathers, reductions and `run_ranks`, each against what one process would do."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from dist_contrastive import collectives
from dist_contrastive.collectives import Embeddings, Labels, schema
from dist_contrastive.collectives.headers import bad_rows, integer_range
from dist_contrastive.errors import ConfigError, NonFiniteError
from dist_contrastive.testing import RankError, run_ranks


def rank_rows(rank: int, rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.arange(rows * 3).reshape(rows, 3) + 100 * rank).to(dtype)


def gather_and_weight(sizes: list[int], dtype: torch.dtype):
    """Every rank weighs all rows in its own way; each row's gradient is the sum of the weights."""
    rank = dist.get_rank()
    x = rank_rows(rank, sizes[rank], dtype).requires_grad_()
    rows, offset = collectives.all_gather_rows(x)
    weight = (rank + 1) * (1 + torch.arange(len(rows), dtype=dtype))[:, None]
    (rows * weight).sum().backward()
    return rows.detach(), offset, x.grad


@pytest.mark.parametrize("sizes", [[2, 2], [3, 1, 2], [0, 4], [4, 0, 1, 0], [0, 0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gather_rows_and_sum_of_gradients(sizes, dtype):
    world_size = len(sizes)
    expected = torch.cat([rank_rows(rank, size, dtype) for rank, size in enumerate(sizes)])
    total_weight = sum(range(1, world_size + 1)) * (1 + torch.arange(sum(sizes), dtype=dtype))
    for rank, (rows, offset, grad) in enumerate(
        run_ranks(gather_and_weight, world_size, sizes, dtype)
    ):
        assert torch.equal(rows, expected)
        assert offset == sum(sizes[:rank])
        mine = total_weight[offset : offset + sizes[rank], None].expand(-1, 3)
        assert torch.equal(grad, mine)
        assert grad.dtype == dtype


def gather_in_subgroup():
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    group = groups[dist.get_rank() % 2]
    rows, offset = collectives.all_gather_rows(rank_rows(dist.get_rank(), 1), group)
    return rows[:, 0].tolist(), offset, collectives.world_size(group)


def test_explicit_group():
    assert run_ranks(gather_in_subgroup, 3) == [([0, 200], 0, 2), ([100], 0, 1), ([0, 200], 1, 2)]


def test_without_process_group():
    x = torch.randn(3, 2)
    rows, offset = collectives.all_gather_rows(x)
    assert rows is x
    assert offset == 0
    assert collectives.global_mean(torch.tensor(6.0), 3) == 2


def gather_misfit(kind: str) -> str:
    rank = dist.get_rank()
    x = {
        "dtype": torch.zeros(2, 3, dtype=[torch.float32, torch.float64][rank]),
        "dim": torch.zeros(2, 3 + rank),
        "grad": torch.zeros(2, 3, requires_grad=rank == 1),
    }[kind]
    with pytest.raises(ConfigError) as caught:
        collectives.all_gather_rows(x)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("dtype", "[rows, 3] torch.float32 without gradient on rank 0; [rows, 3] torch.float64"),
        ("dim", "[rows, 3] torch.float32 without gradient on rank 0; [rows, 4]"),
        ("grad", "[rows, 3] torch.float32 with gradient on rank 1"),
    ],
)
def test_misfits_are_named_on_every_rank(kind, words):
    messages = run_ranks(gather_misfit, 2, kind)
    assert messages[0] == messages[1]
    assert words in messages[0]


def reductions(partials: list[list[float]]):
    rank = dist.get_rank()
    partial = torch.tensor(partials[rank], dtype=torch.float64, requires_grad=True)
    total = collectives.logsumexp_over_ranks(partial)
    slope = torch.zeros_like(total)
    slope[rank] = 1.0  # every rank uses its own entry
    (total * slope).nan_to_num(neginf=0.0).sum().backward()
    mean = collectives.global_mean(torch.tensor(float(rank)), 2 * rank)
    return total.detach(), partial.grad, mean.item()


def test_logsumexp_over_ranks_and_global_mean():
    partials = [[0.0, -1000.0, -torch.inf], [2.0, -torch.inf, -torch.inf], [800.0, 3.0, -torch.inf]]
    stacked = torch.tensor(partials, dtype=torch.float64, requires_grad=True)
    expected = stacked.logsumexp(0)
    expected[:2].sum().backward()
    for rank, (total, grad, mean) in enumerate(run_ranks(reductions, 3, partials)):
        torch.testing.assert_close(total, expected.detach())
        torch.testing.assert_close(grad[:2], stacked.grad[rank, :2])
        assert grad.isfinite().all()
        assert mean == (0 + 1 + 2) / (0 + 2 + 4)


def fail_on_rank_one(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("the number 41 is too small")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()  # the others wait for rank 1
    time.sleep(600)  # far beyond the time limit of run_ranks


@pytest.mark.parametrize(
    ("how", "words"),
    [("raise", "ValueError: the number 41 is too small"), ("kill", "died with exit code -9")],
)
def test_a_failing_rank_ends_all_at_once(how, words):
    with pytest.raises(RankError, match=r"rank 1 failed") as caught:
        run_ranks(fail_on_rank_one, 3, how)
    assert words in str(caught.value)


def sleep_for(seconds: float) -> None:
    time.sleep(seconds)


def test_time_limit():
    with pytest.raises(RankError, match=r"ranks \[0, 1\] did not end"):
        run_ranks(sleep_for, 2, 60.0, timeout_s=3.0)


def fetch_some(sizes: list[int], wanted: list[list[int]]):
    rank = dist.get_rank()
    x = rank_rows(rank, sizes[rank]).requires_grad_()
    rows = collectives.fetch_rows(x, torch.tensor(wanted[rank], dtype=torch.int64), tuple(sizes))
    (rows * (rank + 1)).sum().backward()
    return rows.detach(), x.grad


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ([2, 3], [[4, 0, 0], [1, 2, 3, 4]]),
        ([3, 0, 2], [[4, 4, 2, 0], [], [3]]),
        ([1, 1, 1, 1], [[3], [0], [0], [0]]),
    ],
)
def test_fetch_rows_and_sum_of_gradients(sizes, wanted):
    everyones = torch.cat([rank_rows(rank, size) for rank, size in enumerate(sizes)])
    counts = torch.zeros(sum(sizes), dtype=torch.float64)
    for rank, numbers in enumerate(wanted):
        for number in numbers:
            counts[number] += rank + 1
    expected = counts[:, None].expand(-1, 3).split(sizes)
    for rank, (rows, grad) in enumerate(run_ranks(fetch_some, len(sizes), sizes, wanted)):
        assert torch.equal(rows, everyones[wanted[rank]])
        assert torch.equal(grad, expected[rank])


def hand_round(sizes: list[int]) -> list[list[float]]:
    """Every rank's rows, in the order in which they come by."""
    rank, world_size = dist.get_rank(), len(sizes)
    held = [rank_rows(rank, sizes[rank]), torch.arange(sizes[rank])]
    seen = []
    for step in range(1, world_size + 1):
        arrive = collectives.start_shift(held, sizes[(rank - step) % world_size], first_tag=0)
        seen.append(held[0][:, 0].tolist())
        held = arrive()
        assert torch.equal(held[1], torch.arange(len(held[0])))
    assert torch.equal(held[0], rank_rows(rank, sizes[rank]))  # home again
    return seen


@pytest.mark.parametrize("sizes", [[2], [1, 2], [2, 0, 1], [0, 3, 1, 0]])
def test_shifts_bring_all_rows_round(sizes):
    columns = [rank_rows(rank, size)[:, 0].tolist() for rank, size in enumerate(sizes)]
    for rank, seen in enumerate(run_ranks(hand_round, len(sizes), sizes)):
        assert seen == [columns[(rank - step) % len(sizes)] for step in range(len(sizes))]


def summed_statistic() -> tuple[torch.Tensor, torch.Tensor]:
    rank = dist.get_rank()
    x = torch.tensor([1.0, 2.0]) * (rank + 1)
    total = collectives.sum_over_ranks(x.requires_grad_())
    (total.square().sum() * (rank + 1)).backward()
    return total.detach(), x.grad


def test_sum_over_ranks_sums_the_gradients_of_all_sums():
    for total, grad in run_ranks(summed_statistic, 3):
        assert total.tolist() == [6.0, 12.0]
        assert grad.tolist() == [2 * 6 * 6.0, 2 * 12 * 6.0]


def test_headers_tell_what_is_wrong():
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0], [1.0, 2.0]], requires_grad=True)
    labels = torch.tensor([3, -7, 2])
    told = collectives.exchange_headers({"x": x, "labels": labels, "none": None})
    assert told["none"] == [None]
    (header,) = told["x"]
    assert (header.rows, header.shape) == (3, (3, 2))
    assert (header.dtype, header.grad_flags) == (torch.float32, 1)


def test_measures_of_values():
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0], [1.0, 2.0]])
    assert bad_rows(x) == bad_rows(x.unflatten(0, (3, 1)), 1) == 2
    assert bad_rows(x, 1) == 2
    assert bad_rows(x[:0]) is bad_rows(None) is bad_rows(torch.tensor([1, 2])) is None
    # Finite numbers of a large fp16 row whose sum is not.
    assert bad_rows(torch.full((2, 9), 6e4).half()) == 0
    assert integer_range(torch.tensor([3, -7, 2])).tolist() == [-7, 3]


def deferred_errors() -> tuple[list[str], str]:
    """What calls say where values are on a GPU: the second one of these, and the last."""
    schema.is_deferred = lambda x: x is not None
    bad = torch.tensor([[1.0, torch.nan], [1.0, 2.0]]) if dist.get_rank() else torch.ones(3, 2)
    labels = -2 * torch.ones(len(bad), dtype=torch.int64) * dist.get_rank()
    said = []
    for x, y in ((bad, None), (torch.ones(2, 2), None), (torch.ones(len(bad), 2), labels)):
        try:
            inputs = {"x": Embeddings(x, "n D"), "y": Labels(y, "n", optional=True)}
            collectives.check_inputs(inputs)
            said.append("")
        except NonFiniteError as error:
            said.append(str(error))
    with pytest.raises(ConfigError) as raised:
        collectives.read_deferred()
    collectives.read_deferred()  # once
    return said, str(raised.value)


def test_values_on_a_gpu_are_checked_one_call_later_on_all_ranks():
    for said, last in run_ranks(deferred_errors, 2):
        assert said == [
            "",
            "NaN, infinity or squares that overflow in 1 of 2 rows of x on rank 1; look at the "
            "samples and the learning rate",
            "",
        ]
        assert last.startswith("y on rank 1 have -2 as the lowest; give integers from 0")


def sums_of_low_precision_gradients() -> torch.Tensor:
    """Of four rows; rank r gives 1 to the r-th of them, and 2^-9 to the others."""
    x = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
    rows, _ = collectives.all_gather_rows(x)
    weights = torch.full((16, 1), 2.0**-9)
    weights[dist.get_rank() :: 4] = 1
    (rows.float() * weights).sum().backward()
    return x.grad


def test_gradients_in_low_precision_are_summed_in_fp32():
    """In bf16 each of the small ones would vanish beside 1, whatever the order of the ranks."""
    expected = torch.full((4, 1), 1 + 3 * 2.0**-9).bfloat16()
    for found in run_ranks(sums_of_low_precision_gradients, 4):
        assert torch.equal(found, expected)
