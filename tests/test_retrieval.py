"""Retrieval against several right answers: definitions of others, values by hand, ties, tiles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation import neighbours, ranking
from dist_contrastive.evaluation.neighbours import knn_predict
from dist_contrastive.evaluation.ranking import rank


def at_ranks(*ranks: int, of: int) -> ranking.Ranking:
    """One query whose right answers stand at these ranks among so many keys."""
    angles = torch.arange(1, of + 1, dtype=torch.float64) / of
    keys = torch.stack([angles.cos(), angles.sin()], dim=1)
    groups = torch.zeros(of, dtype=torch.int64)
    groups[torch.tensor(ranks) - 1] = 7
    return rank(torch.tensor([[1.0, 0.0]]), keys, torch.tensor([7]), groups)


def test_several_right_answers_by_hand():
    found = at_ranks(1, 6, 7, 8, of=10)  # one of four among the first
    assert (found.hit_rate(1), found.recall(1), found.capped_recall(1)) == (1.0, 0.25, 1.0)
    assert (found.hit_rate(6), found.recall(6), found.capped_recall(6)) == (1.0, 0.5, 0.5)
    assert (found.median_rank(), found.mean_reciprocal_rank()) == (1, 1)
    # Divided by all that are right, not by those that were found.
    assert at_ranks(1, 3, 9, 10, of=10).mean_average_precision() == pytest.approx(
        (1 + 2 / 3 + 3 / 9 + 4 / 10) / 4
    )
    gains = 1 + 1 / math.log2(4)
    best = sum(1 / math.log2(1 + r) for r in (1, 2, 3, 4))
    assert at_ranks(1, 3, 9, 10, of=10).ndcg(5) == pytest.approx(gains / best)
    assert at_ranks(1, 3, 9, 10, of=10).ndcg(2) == pytest.approx(1 / (1 + 1 / math.log2(3)))


def test_the_median_is_between_two_ranks():
    keys = torch.eye(4)
    queries = torch.tensor([[4.0, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1], [1, 2, 3, 4]])
    found = rank(queries, keys)
    assert found.ranks[:, 0].tolist() == [1, 2, 3, 1]
    assert found.median_rank() == 1.5


def random_case(n: int, m: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    of_query = torch.randint(0, classes, (n,), generator=generator)
    of_key = torch.randint(0, classes, (m,), generator=generator)
    centres = torch.randn(classes, 8, generator=generator)
    queries, keys = (
        centres[x] + 1.5 * torch.randn(len(x), 8, generator=generator) for x in (of_query, of_key)
    )
    return queries, keys, of_query, of_key


def naive_ranks(queries: Tensor, keys: Tensor, right: list[list[bool]]) -> list[list[int]]:
    """Each query's keys sorted by similarity, right ones last among equals."""
    ranks = []
    for query, is_right in zip(queries, right, strict=True):
        cosines = F.cosine_similarity(query[None], keys).tolist()
        ranked = sorted((-round(c, 9), x) for c, x in zip(cosines, is_right, strict=True))
        ranks.append([number + 1 for number, (_, x) in enumerate(ranked) if x])
    return ranks


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_ranks_are_the_naive_ones(data):
    """Ties, equal rows, more right answers than are compared one by one; any tile."""
    n, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    coordinate = st.integers(-2, 2)
    row = st.tuples(coordinate, coordinate, coordinate).filter(any)
    queries, keys = (
        torch.tensor(data.draw(st.lists(row, min_size=x, max_size=x)), dtype=torch.float64)
        for x in (n, m)
    )
    of_query, of_key = (
        torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=x, max_size=x))) for x in (n, m)
    )
    right = of_query[:, None] == of_key
    expected = [x for x in naive_ranks(queries, keys, right.tolist()) if x]
    tile = data.draw(st.integers(1, 13))
    if not expected:
        with pytest.raises(ConfigError, match="has a right answer"):
            rank(queries, keys, of_query, of_key, tile=tile)
        return
    found = rank(queries, keys, of_query, of_key, tile=tile)
    ranks = [[r for r in row if r < ranking.MISSING] for row in found.ranks.tolist()]
    assert ranks == expected
    assert found.mean_average_precision() == pytest.approx(
        sum(sum((i + 1) / r for i, r in enumerate(x)) / len(x) for x in expected) / len(expected)
    )


def test_a_query_among_the_keys_is_no_answer_to_itself(monkeypatch):
    rows, _, classes, _ = random_case(40, 1, 4)
    monkeypatch.setattr(ranking, "_NUMBERS", 100)  # several parts of queries
    found = rank(rows, rows, classes, classes, without_itself=True, tile=7)
    for number, (ranks, count) in enumerate(zip(found.ranks, found.counts, strict=True)):
        others = torch.arange(40) != number
        alone = rank(rows[[number]], rows[others], classes[[number]], classes[others])
        assert ranks[:count].tolist() == alone.ranks[0].tolist()
        assert int(count) == int(alone.counts)
    assert found.num_keys == 39
    assert rank(rows, rows, classes, classes).hit_rate(1) == 1


def test_equal_pictures_under_two_keys():
    """Each is an answer of its own, and none counts twice."""
    keys = torch.eye(3)[[0, 0, 1, 2]]
    groups = torch.tensor([0, 0, 1, 2])
    found = rank(torch.eye(3), keys, torch.arange(3), groups)
    assert found.ranks[0].tolist() == [1, 2]
    assert (found.recall(1), found.recall(2)) == (pytest.approx((0.5 + 1 + 1) / 3), 1)
    # Where each sample is its own, an equal one is a wrong answer of the same score.
    assert rank(keys, keys).ranks[:, 0].tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan])
def test_collapse_finds_nothing(value):
    rows = torch.full((50, 33), value)
    groups = torch.arange(50) // 2
    found = rank(rows, rows, groups, groups, without_itself=True)
    assert found.ranks[:, 0].tolist() == [49] * 50
    assert found.hit_rate(48) == found.recall(48) == 0
    assert found.mean_reciprocal_rank() == pytest.approx(1 / 49)
    assert rank(rows, rows).median_rank() == 50
    # Scores that differ by rounding alone, as of rows of one direction.
    scaled = torch.rand(50, 1).expand(50, 33).double() + 0.1
    assert rank(scaled, scaled).hit_rate(49) == 0


def test_a_k_that_cannot_be():
    found = rank(torch.eye(4), torch.eye(4), top=2)
    for k in (0, 5):
        with pytest.raises(ConfigError, match=f"k is {k}, but there are 4 keys"):
            found.hit_rate(k)
    with pytest.raises(ConfigError, match="only 2 ranks are kept"):
        found.recall(3)
    with pytest.raises(ConfigError, match="4 keys and 3 groups"):
        rank(torch.eye(4), torch.eye(4), torch.arange(4), torch.arange(3))


def test_bf16_embeddings_are_compared_in_fp64():
    """In bf16 4 % of the best scores of such rows tie."""
    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(4000, 512, generator=generator), dim=1)
    queries = F.normalize(torch.randn(100, 512, generator=generator), dim=1)
    rough = queries.bfloat16() @ keys.bfloat16().T
    best = rough.float().amax(dim=1, keepdim=True)
    assert int(((rough == best).sum(dim=1) > 1).sum()) >= 2
    exact = (queries.bfloat16().double() @ keys.bfloat16().double().T).argmax(dim=1)
    found = rank(queries.bfloat16(), keys.bfloat16(), torch.arange(100), _own(exact, 4000))
    assert found.hit_rate(1) == pytest.approx(1, abs=0.011)  # rows are normalised anew


def _own(best: Tensor, num_keys: int) -> Tensor:
    groups = torch.full((num_keys,), -1)
    groups[best] = torch.arange(len(best))
    return groups


@pytest.mark.parametrize("tile", [3, 7, 1000])
def test_neighbours_that_are_equally_near_count_by_their_order(tile, monkeypatch):
    monkeypatch.setattr(neighbours, "_TILE", tile)
    generator = torch.Generator().manual_seed(0)
    # Whole numbers on a line, squares: distances are exact, and many are equal.
    keys = torch.randint(0, 6, (60, 1), generator=generator).double()
    queries = torch.arange(6)[:, None].double()
    distances = (queries - keys.T).abs()
    for k in (1, 4, 13, 60):
        expected = distances.sort(dim=1, stable=True).indices[:, :k]
        assert torch.equal(neighbours._nearest(keys, queries, k, "euclidean", 4), expected)
    collapsed = torch.ones(60, 4)
    found = neighbours._nearest(collapsed, collapsed[:5], 5, "cosine", 1024)
    assert found.tolist() == [[0, 1, 2, 3, 4]] * 5
    labels = torch.arange(60) % 3
    assert knn_predict(collapsed, labels, collapsed[:5]).tolist() == [0] * 5


def test_neighbours_of_rows_with_much_in_common():
    """Half precision finds another nearest one for some in a hundred."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 64, generator=generator) + 4
    keys, queries = rows[:1800], rows[1800:]
    exact = (F.normalize(queries.double()) @ F.normalize(keys.double()).T).argmax(dim=1)
    found = neighbours._nearest(keys, queries, 1, "cosine", 64)[:, 0]
    assert (found == exact).double().mean() > 0.995
    half = (F.normalize(queries).bfloat16() @ F.normalize(keys).bfloat16().T).argmax(dim=1)
    assert (half == exact).double().mean() < 0.97
