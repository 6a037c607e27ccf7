"""Measures against values by hand, scikit-learn and torchmetrics, and the pictures of a run."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, ndcg_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from test_retrieval import random_case
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import report
from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation.neighbours import (
    Metric,
    knn_accuracy,
    knn_predict,
    knn_regression_error,
    recall_at_k,
    zero_shot_accuracy,
)
from dist_contrastive.evaluation.probe import few_label_probe, linear_probe
from dist_contrastive.evaluation.ranking import rank


def line(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def angles(*degrees: float, length: float = 1.0) -> Tensor:
    radians = torch.tensor(degrees) * math.pi / 180
    return length * torch.stack([radians.cos(), radians.sin()], dim=1)


def test_knn_votes_by_cosine() -> None:
    keys, labels = angles(0, 10, 20, 90, 100), torch.tensor([0, 0, 1, 1, 1])
    keys = keys * torch.tensor([1, 50, 1, 0.1, 1])[:, None]  # lengths must not matter
    queries = angles(2, 17, 80, length=7)
    assert knn_predict(keys, labels, queries, k=1).tolist() == [0, 1, 1]
    assert knn_predict(keys, labels, queries, k=3).tolist() == [0, 0, 1]
    assert knn_accuracy(keys, labels, queries, torch.tensor([0, 1, 1]), k=3) == pytest.approx(2 / 3)


def test_knn_tie_goes_to_the_nearer_class() -> None:
    keys, labels = line(0.0, 1.0, 3.0, 4.0), torch.tensor([2, 0, 0, 2])
    predicted = knn_predict(keys, labels, line(0.4, 0.6), k=2, metric="euclidean")
    assert predicted.tolist() == [2, 0]
    predicted = knn_predict(keys, labels, line(1.4, 3.8), k=4, metric="euclidean")
    assert predicted.tolist() == [0, 2]


def test_knn_chunks_and_bounds() -> None:
    torch.manual_seed(0)
    keys, labels, queries = torch.randn(50, 4), torch.randint(0, 3, (50,)), torch.randn(23, 4)
    whole = knn_predict(keys, labels, queries)
    assert torch.equal(whole, knn_predict(keys, labels, queries, chunk=7))
    assert knn_predict(keys, labels, queries[:0]).shape == (0,)
    with pytest.raises(ConfigError, match=r"k is 51, but there are 50 .*set k from 1 to 50"):
        knn_predict(keys, labels, queries, k=51)
    with pytest.raises(ConfigError, match="k is 1, but there are 0"):
        knn_predict(keys[:0], labels[:0], queries, k=1)


def test_knn_regression_by_hand() -> None:
    features, values = angles(0, 10, 20, 90) * line(1.0, 50.0, 1.0, 0.1), line(1.0, 2.0, 6.0, 9.0)
    queries, truth = angles(2, 18, 80, length=7), torch.tensor([1.5, 3.0, 9.0])
    error = knn_regression_error(features, values[:, 0], queries, truth, k=1)
    assert error == pytest.approx((0.5 + 3 + 0) / 3)
    error = knn_regression_error(features, values[:, 0], queries, truth, k=2, chunk=2)
    assert error == pytest.approx((0 + 1 + 1.5) / 3)
    every = knn_regression_error(features, values[:, 0], queries, truth, k=4)
    assert every == pytest.approx((3 + 1.5 + 4.5) / 3)
    with pytest.raises(ConfigError, match=r"k is 5, but there are 4 .*set k from 1 to 4"):
        knn_regression_error(features, values[:, 0], queries, truth, k=5)


def test_knn_regression_computes_in_fp64() -> None:
    values = torch.tensor([2.0**25, 1.0, 1.0])  # their sum needs 26 bits
    error = knn_regression_error(angles(0, 10, 20), values, angles(5), torch.zeros(1), k=3)
    assert error == pytest.approx((2**25 + 2) / 3, rel=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5])
def test_knn_is_that_of_scikit_learn(metric: Metric, k: int) -> None:
    """Two classes, whose odd numbers of votes never tie."""
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(200, 6, generator=generator), torch.randn(90, 6, generator=generator)
    labels, values = (train[:, 0] > 0.1).long(), train[:, :2].sum(1)
    theirs = KNeighborsClassifier(k, metric=metric).fit(train.numpy(), labels.numpy())
    predicted = knn_predict(train, labels, test, k, metric)
    assert predicted.tolist() == theirs.predict(test.numpy()).tolist()
    regression = KNeighborsRegressor(k, metric="cosine").fit(train.numpy(), values.numpy())
    errors = regression.predict(test.numpy()) - test[:, 0].numpy()
    ours = knn_regression_error(train, values, test, test[:, 0], k)
    assert ours == pytest.approx(abs(errors).mean(), rel=1e-5)


def blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    return centres[labels] + 0.7 * torch.randn(n, 2, generator=generator), labels


def test_probe_separates_blobs_whatever_their_scale() -> None:
    train, train_labels = blobs(90, 0)
    test, test_labels = blobs(300, 1)
    result = few_label_probe(train, train_labels, test, test_labels, per_class=5, draws=6)
    assert len(result.accuracies) == 6
    assert 0.85 < result.mean < 1
    values = torch.tensor(result.accuracies, dtype=torch.float64)
    assert result.mean == pytest.approx(values.mean().item())
    assert result.std == pytest.approx(values.std().item())
    scaled = few_label_probe(
        1000 * train + 5, train_labels, 1000 * test + 5, test_labels, per_class=5, draws=6
    )
    assert scaled.mean == pytest.approx(result.mean, abs=0.005)
    noise = torch.randn(90, 2, generator=torch.Generator().manual_seed(2))
    chance = few_label_probe(noise, train_labels, test, test_labels, per_class=5)
    assert chance.mean < 0.7


def test_probe_errors() -> None:
    features, labels = blobs(10, 0)
    with pytest.raises(ConfigError, match="class 1 has 3: set per_class to at most 3"):
        few_label_probe(features, labels, features, labels, per_class=4)
    with pytest.raises(ConfigError, match="needs 2 draws or more, but draws is 1"):
        few_label_probe(features, labels, features, labels, per_class=2, draws=1)


def test_linear_probe_uses_all_labels() -> None:
    (train, train_labels), (test, test_labels) = blobs(90, 0), blobs(300, 1)
    accuracy = linear_probe(train, train_labels, test, test_labels)
    assert 0.9 < accuracy < 1
    assert accuracy * 300 == pytest.approx(round(accuracy * 300))
    # All labels are what the few-label probe takes when it takes all.
    few = few_label_probe(train, train_labels, test, test_labels, per_class=30, draws=2)
    assert few.accuracies == pytest.approx([accuracy, accuracy])
    scaled = linear_probe(1e4 * train + 5, train_labels, 1e4 * test + 5, test_labels)
    assert scaled == pytest.approx(accuracy, abs=0.005)
    images = linear_probe(
        train.view(90, 1, 2, 1), train_labels, test.view(300, 1, 2, 1), test_labels
    )
    assert images == accuracy
    with pytest.raises(ConfigError, match="2 classes or more, but its 90 have 1: take more"):
        linear_probe(train, 0 * train_labels, test, test_labels)


def test_zero_shot_by_hand() -> None:
    images, classes = angles(2, 50, 100, 170, length=3), angles(0, 90, 180) * line(1.0, 9.0, 0.1)
    labels = torch.tensor([0, 0, 1, 1])
    assert zero_shot_accuracy(images, labels, classes) == 0.5
    assert zero_shot_accuracy(images, labels, classes, chunk=3) == 0.5
    assert zero_shot_accuracy(images, torch.tensor([0, 1, 1, 2]), classes) == 1


def test_retrieval_by_hand() -> None:
    queries, keys = angles(0, 40, 90, length=2), angles(5, 10, 70) * line(8.0, 1.0, 0.1)
    # Keys from the nearest: 0 (5, 10, 70), 40 (10, 70, 5) and 90 (70, 10, 5).
    assert recall_at_k(queries, keys, 1) == 1
    assert recall_at_k(queries, keys.flip(0), 1) == pytest.approx(1 / 3)
    assert recall_at_k(queries, keys.flip(0), 2) == pytest.approx(1 / 3)
    assert recall_at_k(queries, keys.flip(0), 3) == 1
    groups = torch.tensor([7, 0, 7])  # query 0 may find key 2, and query 2 key 0
    assert recall_at_k(queries, keys.flip(0), 1, groups) == 1
    assert recall_at_k(queries, keys[[1, 0, 2]], 1, groups) == pytest.approx(1 / 3)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_retrieval_is_that_of_torchmetrics(k: int, torchmetrics) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 60, 8, generator=generator)
    queries += keys
    groups = torch.arange(60) // 2
    scores = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
    query_of_score = torch.arange(60)[:, None].expand(60, 60)
    for own, ours in (
        (torch.eye(60, dtype=torch.bool), recall_at_k(queries, keys, k)),
        (groups[:, None] == groups, recall_at_k(queries, keys, k, groups)),
    ):
        theirs = torchmetrics.retrieval.RetrievalHitRate(top_k=k)(
            scores.flatten(), own.flatten(), indexes=query_of_score.flatten()
        )
        assert ours == pytest.approx(theirs.item(), rel=1e-6)
        assert 0.3 < ours < 1
    accuracy = torchmetrics.Accuracy("multiclass", num_classes=60)(scores, torch.arange(60))
    assert zero_shot_accuracy(queries, torch.arange(60), keys) == pytest.approx(accuracy.item())


@pytest.mark.parametrize("classes", [5, 40])
def test_several_right_answers_are_those_of_torchmetrics_and_scikit_learn(classes, torchmetrics):
    """A class with dozens of right answers, and one with few or none."""
    queries, keys, of_query, of_key = random_case(50, 90, classes)
    of_query[0] = classes  # a query without an answer
    found = rank(queries, keys, of_query, of_key)
    right = of_query[:, None] == of_key
    kept = right.any(dim=1)
    assert found.left_out == int((~kept).sum()) >= 1
    scores = (F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T)[kept]
    right = right[kept]
    assert torch.equal(found.counts, right.sum(dim=1))
    number = torch.arange(len(scores))[:, None].expand_as(scores)

    def theirs(name: str, **options) -> float:
        metric = getattr(torchmetrics.retrieval, name)(**options)
        positive = scores + 2  # its MAP counts no answer with a score of 0 or less
        return metric(positive.flatten(), right.flatten(), indexes=number.flatten()).item()

    for k in (1, 5, 20):
        assert found.hit_rate(k) == pytest.approx(theirs("RetrievalHitRate", top_k=k))
        assert found.recall(k) == pytest.approx(theirs("RetrievalRecall", top_k=k))
        assert found.ndcg(k) == pytest.approx(theirs("RetrievalNormalizedDCG", top_k=k))
        assert found.ndcg(k) == pytest.approx(ndcg_score(right.numpy(), scores.numpy(), k=k))
    assert found.mean_reciprocal_rank() == pytest.approx(theirs("RetrievalMRR"))
    assert found.mean_average_precision() == pytest.approx(theirs("RetrievalMAP"))
    precisions = [average_precision_score(*x) for x in zip(right, scores, strict=True)]
    assert found.mean_average_precision() == pytest.approx(sum(precisions) / len(precisions))
    assert 0.1 < found.mean_average_precision() < 0.9


def naive_recall(queries: Tensor, keys: Tensor, k: int, groups: list[int]) -> float:
    """Each query's keys sorted by similarity, those of its own group last among equals."""
    hits = 0
    for query, group in zip(queries, groups, strict=True):
        ranked = sorted(
            (-round(F.cosine_similarity(query, key, dim=0).item(), 9), other == group)
            for key, other in zip(keys, groups, strict=True)
        )
        hits += any(mine for _, mine in ranked[:k])
    return hits / len(queries)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_recall_is_the_naive_one(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 8))
    coordinate = st.integers(-2, 2)  # so that ties, equal keys and opposite keys are common
    rows = st.lists(
        st.tuples(coordinate, coordinate, coordinate).filter(any), min_size=n, max_size=n
    )
    queries, keys = (torch.tensor(data.draw(rows), dtype=torch.float64) for _ in range(2))
    k, chunk = data.draw(st.integers(1, n)), data.draw(st.integers(1, 9))
    groups = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    expected = naive_recall(queries, keys, k, groups)
    assert recall_at_k(queries, keys, k, torch.tensor(groups), chunk) == pytest.approx(expected)
    expected = naive_recall(queries, keys, k, list(range(n)))
    assert recall_at_k(queries, keys, k, chunk=chunk) == pytest.approx(expected)
    assert recall_at_k(keys, keys, n) == 1


def test_collapse_scores_nothing() -> None:
    torch.manual_seed(0)
    one_point = torch.randn(1, 33).expand(50, 33)  # at 50 x 33 products round differently by column
    for rows in (one_point, 0 * one_point, one_point * torch.nan):
        assert recall_at_k(rows, rows, 49) == 0
        assert recall_at_k(torch.randn(50, 33), rows, 49) == 0
        assert zero_shot_accuracy(rows, torch.arange(50), rows) == 0
        assert recall_at_k(rows, rows, 1, torch.zeros(50, dtype=torch.int64)) == 1


def test_retrieval_errors() -> None:
    rows, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    with pytest.raises(ConfigError, match=r"k is 5, but there are 4 keys: set k from 1 to 4"):
        recall_at_k(rows, rows, 5)
    with pytest.raises(ConfigError, match=r"there are 4 queries and 3 keys: .*as many of both"):
        recall_at_k(rows, rows[:3], 1)
    with pytest.raises(ConfigError, match="there are 4 keys and 3 groups"):
        recall_at_k(rows, rows, 1, labels[:3])
    with pytest.raises(ConfigError, match="there are 0 queries and 0 keys: give 1 or more"):
        recall_at_k(rows[:0], rows[:0], 1)
    with pytest.raises(ConfigError, match=r"labels run from 0 to 3, but there are 3 class"):
        zero_shot_accuracy(rows, labels, rows[:3])
    with pytest.raises(ConfigError, match="there are 4 images and 2 labels"):
        zero_shot_accuracy(rows, labels[:2], rows)


def check_png(path: Path) -> None:
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 2000


def test_pictures(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 1 / (i + 1), "lr": 0.1} for i in range(100)]
    report.loss_curves([*rows, {"step": 100, "eval": 1.0}], tmp_path / "new" / "loss.png")
    check_png(tmp_path / "new" / "loss.png")
    features, labels = blobs(40, 0)
    report.embedding_map(features, labels, tmp_path / "map.png", title="map")
    check_png(tmp_path / "map.png")
    for rows in (features[:1], features[:2], features[:1].expand(9, 2)):  # collapsed: no crash
        report.embedding_map(rows, labels[: len(rows)], tmp_path / "few.png")
        check_png(tmp_path / "few.png")
    for channels in (1, 3):
        images = torch.rand(40, channels, 8, 8)
        path = tmp_path / f"grid{channels}.png"
        report.sample_grid(images, labels, images[:20], labels[:20], path, title="samples")
        check_png(path)


def test_picture_of_one_row_or_none(tmp_path: Path) -> None:
    report.loss_curves([{"step": 0, "loss": 1.0}], tmp_path / "one.png")
    report.loss_curves([], tmp_path / "none.png")
    check_png(tmp_path / "one.png")


def test_a_probe_of_few_wide_samples_is_scikit_learns() -> None:
    """Of 12 samples in 60 dimensions, as few images are, against its fit in all of them."""
    draw = np.random.default_rng(0)
    labels = np.arange(72) % 3
    x = draw.normal(size=(72, 60)) + 4 * np.eye(60)[labels]
    train, test = torch.tensor(x[:12]), torch.tensor(x[12:])
    mean = x[:12].mean(0)
    scale = (x[:12] - mean).std()
    model = LogisticRegression(max_iter=5000, tol=1e-8).fit((x[:12] - mean) / scale, labels[:12])
    expected = model.score((x[12:] - mean) / scale, labels[12:])
    assert 0.4 < expected < 1
    found = linear_probe(train, torch.tensor(labels[:12]), test, torch.tensor(labels[12:]))
    assert found == pytest.approx(expected)
