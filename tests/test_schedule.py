"""Values between, before and after the points of a schedule."""

import pytest

from dist_contrastive.schedule import value_at

POINTS = ((0.2, 1.0), (0.4, 3.0), (0.8, 0.0))


@pytest.mark.parametrize(
    ("progress", "value"),
    [(0, 1), (0.2, 1), (0.3, 2), (0.4, 3), (0.6, 1.5), (0.8, 0), (1, 0)],
)
def test_points(progress, value):
    assert value_at(POINTS, progress) == pytest.approx(value)


def test_constant():
    assert [value_at(0.5, progress) for progress in (0, 0.5, 1)] == [0.5] * 3
