"""Measures of a representation, and probes of it: values by hand, published ones, scikit-learn, and
what collapse gives."""

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.evaluation import probe, representation
from dist_contrastive.evaluation.representation import (
    alignment,
    cluster,
    lidar,
    nmi,
    rank_me,
    uniformity,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(n: int, classes: int, spread: float) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % classes
    return 3 * draw(classes, 6)[labels] + spread * draw(n, 6, seed=1), labels


def test_rank_is_of_singular_values_not_of_their_squares():
    assert rank_me(torch.diag(torch.tensor([1.0, 0.1]))) == pytest.approx(1.3561, abs=1e-4)
    assert rank_me(torch.eye(16)) == pytest.approx(16)
    assert rank_me(torch.cat([torch.eye(16)] * 3)) == pytest.approx(16)  # wider and longer
    assert rank_me(torch.eye(16)[:5]) == pytest.approx(5)


def test_rank_is_that_of_a_singular_value_decomposition_not_centred():
    for rows in (draw(200, 32), draw(200, 32) + 10, draw(20, 90)):
        values = np.linalg.svd(rows.double().numpy(), compute_uv=False)
        p = values / values.sum()
        assert rank_me(rows) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert rank_me(draw(200, 32) + 10) < rank_me(draw(200, 32)) / 3
    assert rank_me(draw(200, 32).bfloat16()) == pytest.approx(rank_me(draw(200, 32)), rel=1e-3)


def naive_lidar(views: Tensor) -> float:
    """Sample by sample, with the symmetric root of the covariance within."""
    rows = views.double().numpy()
    n, count, width = rows.shape
    means = [sample.mean(0) for sample in rows]
    whole = sum(means) / n
    between, within = np.zeros((width, width)), 1e-4 * np.eye(width)
    for sample, mean in zip(rows, means, strict=True):
        between += np.outer(mean - whole, mean - whole) / n
        for view in sample:
            within += np.outer(view - mean, view - mean) / (n * count)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    spectrum = np.linalg.eigvalsh(root @ between @ root).clip(min=0)
    p = spectrum / spectrum.sum()
    return float(np.exp(-sum(x * np.log(x) for x in p if x > 0)))


@pytest.mark.parametrize(("n", "width"), [(40, 6), (5, 12)])
def test_lidar_is_the_naive_one(n, width):
    views = draw(n, 1, width) * torch.linspace(0.1, 2, width) + 0.5 * draw(n, 4, width, seed=1)
    assert lidar(views) == pytest.approx(naive_lidar(views), rel=1e-6)
    assert 1 < lidar(views) < min(n - 1, width) + 1e-6


def test_lidar_counts_what_tells_samples_apart():
    """Noise between views fills all 32 dimensions and RankMe; samples differ in three."""
    content = F.pad(5 * draw(200, 1, 3), (0, 29))
    views = content + draw(200, 5, 32, seed=1)
    assert lidar(views) < 6
    assert rank_me(views.flatten(0, 1)) > 15


def test_what_lidar_cannot_compare():
    with pytest.raises(ConfigError, match="2 views or more of 2 samples or more"):
        lidar(draw(5, 1, 3))
    with pytest.raises(ConfigError, match="there are 3 of 1"):
        lidar(draw(1, 3, 3))
    with pytest.raises(ConfigError, match="all views of a sample are equal"):
        lidar(draw(5, 1, 3).expand(5, 4, 3))


def test_four_points_on_a_circle():
    """Pairs of different points: two neighbours at squared distance 2, one opposite at 4."""
    points = torch.tensor([[2.0, 0], [0, 1], [-3, 0], [0, -0.5]])
    assert uniformity(points) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    assert uniformity(points) == pytest.approx(-4.3963, abs=1e-4)
    rows = draw(50, 4)
    assert uniformity(rows, chunk=7) == pytest.approx(uniformity(rows), rel=1e-12)
    squared = torch.pdist(F.normalize(rows.double(), dim=1)).square()
    assert uniformity(rows) == pytest.approx((-2 * squared).exp().mean().log().item())


def test_alignment_by_hand():
    first, second = torch.tensor([[2.0, 0], [0, 3]]), torch.tensor([[1.0, 0], [4, 0]])
    assert alignment(first, second) == pytest.approx((0 + 2) / 2)
    with pytest.raises(ConfigError, match="2 first embeddings and 1 second"):
        alignment(first, second[:1])


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_collapse_looks_bad(value):
    rows, labels = torch.full((60, 9), value), torch.arange(60) % 3
    assert rank_me(rows) == pytest.approx(value, abs=1e-6)
    assert uniformity(rows) == pytest.approx(0, abs=1e-9)
    assert nmi(rows, labels) == 0
    assert nmi(draw(60, 9), 0 * labels) == 0
    with pytest.raises(DataError, match="collapsed"):
        alignment(rows, rows)
    views = rows[:, None] + 0.1 * draw(60, 4, 9)
    assert lidar(rows[:, None] + draw(1, 4, 9)) < 1.001  # all samples are one
    assert lidar(views) > 5


@pytest.mark.parametrize("measure", [rank_me, uniformity, lambda x: cluster(x, 2)])
def test_features_that_are_no_numbers_are_refused(measure):
    rows = draw(8, 3)
    rows[2, 1] = math.nan
    with pytest.raises(DataError, match="NaN"):
        measure(rows)


def test_clusters_are_those_of_scikit_learn(monkeypatch):
    """From the same centres; in blocks of rows; and the best of the restarts is found."""
    rows, labels = blobs(150, 5, 1.5)
    monkeypatch.setattr(representation, "_ROWS", 64)
    points = rows.double()
    centres = representation._first_centres(points, 5, np.random.default_rng(3))
    found, inertia = representation._lloyd(points, centres)
    theirs = KMeans(5, init=centres.numpy(), n_init=1, tol=0, max_iter=100).fit(points.numpy())
    assert found.tolist() == theirs.labels_.tolist()
    assert inertia == pytest.approx(theirs.inertia_)
    best = KMeans(5, n_init=20, random_state=0).fit(points.numpy())
    assert normalized_mutual_info_score(cluster(rows, 5).numpy(), best.labels_) > 0.99
    assert torch.equal(cluster(rows, 5), cluster(rows, 5))
    assert 0.5 < nmi(rows, labels) < 1


def test_nmi_is_over_the_mean_of_entropies():
    """Clusters that are known: 0 0 1 1 1 1 beside classes 0 0 0 1 1 2 gives 0.3863."""
    rows = torch.tensor([[1.0, 0], [1, 0.01], [0, 1], [0.01, 1], [0, 1.01], [0.02, 1]])
    labels = torch.tensor([5, 5, 5, 1, 1, 2])
    two = cluster(rows, 2)
    assert len({*two[:2].tolist()}) == len({*two[2:].tolist()}) == 1
    expected = normalized_mutual_info_score(labels.numpy(), two.numpy())
    assert expected == pytest.approx(0.3863, abs=1e-4)
    # Of three directions each twice, three clusters tell two classes apart.
    axes = torch.eye(3).repeat_interleave(2, dim=0) * torch.tensor([[1.0], [7]] * 3)
    assert nmi(axes, torch.tensor([0, 0, 1, 1, 2, 2])) == pytest.approx(1)
    assert nmi(axes, torch.tensor([0, 1, 2, 0, 1, 2])) == pytest.approx(
        1 - math.log(2) / math.log(3)
    )


def test_more_clusters_than_samples():
    with pytest.raises(ConfigError, match="4 or more samples are wanted for k-means"):
        cluster(draw(3, 2), 4)
    assert len(cluster(torch.ones(6, 2), 4).unique()) == 1


# ------------------------------------------------------------------------------- probes


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_a_probe_is_logistic_regression_of_scikit_learn(classes, c):
    """Weights, offset and accuracy; of two classes one row of weights."""
    rows, labels = blobs(120, classes, 4.0)
    train, test = probe._standardised(rows[:80], rows[80:])
    theirs = LogisticRegression(C=c, max_iter=5000).fit(train.numpy(), labels[:80].numpy())
    weights = probe._fitted(train, labels[:80], classes, c)
    expected = np.concatenate([theirs.coef_, theirs.intercept_[:, None]], axis=1)
    np.testing.assert_allclose(weights.numpy(), expected, atol=2e-2 * abs(expected).max())
    accuracy = probe.linear_probe(rows[:80], labels[:80] + 3, rows[80:], labels[80:] + 3, c)
    assert accuracy == pytest.approx(theirs.score(test.numpy(), labels[80:].numpy()), abs=1e-9)
    assert 0.2 < accuracy < 1


def test_a_sweep_chooses_without_the_test():
    """Noise in 60 dimensions of 66: a stronger penalty than that of C = 1 is right."""
    rows, labels = blobs(160, 3, 3.0)
    rows = torch.cat([rows, 3 * draw(160, 60, seed=5)], dim=1)
    train, test = (rows[:100], labels[:100]), (rows[100:], labels[100:])
    accuracy, c = probe.probe_sweep(*train, *test)
    assert c < 1
    assert accuracy == probe.linear_probe(*train, *test, c) > probe.linear_probe(*train, *test)
    held = torch.arange(100) % 5 == 0
    scores = [
        probe.linear_probe(train[0][~held], train[1][~held], train[0][held], train[1][held], x)
        for x in probe.SWEEP
    ]
    assert c == probe.SWEEP[scores.index(max(scores))]
    assert probe.probe_sweep(*train, test[0], (test[1] + 1) % 3)[1] == c
    with pytest.raises(ConfigError, match="every 5th training sample, but there are 4"):
        probe.probe_sweep(rows[:4], labels[:4], rows, labels)


def test_a_share_of_the_labels_of_each_class():
    labels = np.array([0] * 5 + [1] * 200)
    for share, counts in ((0.01, (1, 2)), (0.5, (3, 100)), (2, (2, 2))):
        chosen = probe._draw(labels, share, np.random.default_rng(0))
        assert len(set(chosen.tolist())) == len(chosen)
        assert tuple(np.bincount(labels[chosen])) == counts
    rows, labels = blobs(300, 3, 4.0)
    few, many = (
        probe.few_label_probe(rows[:200], labels[:200], rows[200:], labels[200:], share, draws=4)
        for share in (0.02, 0.9)
    )
    assert few.mean < many.mean
    assert few.std > 0
    for share in (0.0, 1.5, -0.1):
        with pytest.raises(ConfigError, match=f"takes {share} labelled samples"):
            probe.few_label_probe(rows, labels, rows, labels, share)


def test_classes_that_training_lacks_are_never_found():
    rows, labels = blobs(120, 3, 0.1)
    known = labels[:60] < 2
    accuracy = probe.linear_probe(rows[:60][known], labels[:60][known], rows[60:], labels[60:])
    assert accuracy == pytest.approx(2 / 3)
    assert probe.linear_probe(torch.ones(60, 4), labels[:60], torch.ones(60, 4), labels[60:]) == (
        pytest.approx(1 / 3)
    )  # collapsed
