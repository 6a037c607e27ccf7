"""Exponentials at several temperatures as powers of each other, against torch's exponential."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_contrastive.losses.force.affinity import Powers, Scratch

SETS = [
    (0.2,),
    (0.01, 0.02, 0.05, 0.1, 0.2),  # powers 2, 4, 10, 20
    (0.02, 0.05, 0.2),
    (0.2, 0.01, 0.05, 0.1, 0.02),  # in any order
    (0.1, 0.1, 0.05, 0.05),  # some twice
    (0.3, 0.07, 0.05),  # the last is a sixth of the first
    (0.05, 0.3, 1.0),  # 0.3 is no power of any
    (64.0, 1.0, 0.5),  # 64 is the largest power; 0.5 would be the 128th
    (1.0, 1 / 3, 1 / 7, 1 / 49, 1 / 63),
    (0.1, 0.1 * (1 + 1e-7)),  # nearly the same is not the same
]


def found(powers: Powers, temperatures: tuple, x: Tensor, scale: Tensor) -> dict[int, Tensor]:
    """By number of the temperature; each is looked at before the next is asked for."""
    slope = -1 / (x.new_tensor(temperatures)[:, None] * scale)
    # What is given may be overwritten, and so may what is yielded.
    return {t: y.clone() for t, y in powers.exponentials(x.clone(), slope)}


def check(powers: Powers, temperatures: tuple, x: Tensor, scale: Tensor) -> None:
    numbers = found(powers, temperatures, x, scale)
    assert sorted(numbers) == list(range(len(temperatures)))
    for t, y in numbers.items():
        exponent = -x.double() / (temperatures[t] * scale.double()[:, None, None])
        # The exponent is rounded, and a power has the error of its base as often.
        bound = torch.finfo(x.dtype).eps * (2 * exponent.abs() + 140) * exponent.exp()
        error = (y.double() - exponent.exp()).abs()
        at_zero = exponent == -torch.inf
        assert (y[at_zero] == 0).all()
        assert (error <= bound + torch.finfo(x.dtype).tiny)[~at_zero].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperatures", SETS, ids=str)
def test_exponentials(temperatures, dtype):
    """From 0 to infinity, in groups of their own scales."""
    x = torch.rand(3, 5, 7, dtype=dtype) * torch.logspace(-3, 2, 7, dtype=dtype)
    x[:, 0, 0], x[:, 1, 1] = 0.0, torch.inf
    check(Powers(temperatures), temperatures, x, torch.tensor([0.5, 1.0, 3.0], dtype=dtype))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.floats(1e-3, 10))
@settings(max_examples=60, deadline=None)
def test_exponentials_at_any_temperatures(divisors, largest):
    temperatures = tuple(largest / n for n in divisors)
    x = torch.linspace(0, 3, 24, dtype=torch.float64).view(2, 3, 4)
    check(Powers(temperatures), temperatures, x, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_one_after_the_other_with_the_same_memory():
    """Of other shapes and dtypes, smaller and larger: what was left in memory does not show."""
    temperatures = (0.01, 0.02, 0.07, 0.2)
    powers = Powers(temperatures)
    for shape, dtype in (
        ((2, 3, 4), torch.float32),
        ((1, 2, 2), torch.float32),
        ((2, 9, 9), torch.float64),
        ((2, 3, 4), torch.float32),
    ):
        check(
            powers, temperatures, torch.rand(shape, dtype=dtype), torch.ones(shape[0], dtype=dtype)
        )


def test_few_exponentials_are_taken(monkeypatch):
    """One for all temperatures that divide the largest, and one for each of the others."""
    taken = []
    exp_ = Tensor.exp_
    monkeypatch.setattr(Tensor, "exp_", lambda x: taken.append(x.shape) or exp_(x))
    for temperatures, expected in (((0.01, 0.02, 0.05, 0.1, 0.2), 1), ((0.3, 0.2, 0.1), 2)):
        taken.clear()
        found(Powers(temperatures), temperatures, torch.rand(1, 2, 3), torch.ones(1))
        assert len(taken) == expected


def test_scratch_is_kept_by_name_and_grows():
    scratch = Scratch()
    first = scratch.like("a", torch.empty(2, 3))
    assert scratch.like("a", torch.empty(3, 2)).data_ptr() == first.data_ptr()
    assert scratch.like("b", torch.empty(2, 3)).data_ptr() != first.data_ptr()
    larger = scratch.like("a", torch.empty(4, 5))
    assert larger.shape == (4, 5)
    assert scratch.like("a", torch.empty(2, 3)).data_ptr() == larger.data_ptr()
    assert scratch.like("a", torch.empty(2, dtype=torch.float64)).dtype == torch.float64
