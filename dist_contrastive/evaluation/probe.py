"""Classifiers fitted on real samples: linear probes, and judges of the class of generated samples.

Probes tell how much of the class a representation shows linearly; `Classifier` and
`class_agreement` whether generated samples are of the class that was asked for. scikit-learn is
imported where it is used: it takes half a second.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation.neighbours import Metric, knn_predict
from dist_contrastive.evaluation.points import as_points, check_labels

_WIDE = 4  # times as many dimensions as samples, from which fewer are as good, and fitted sooner


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy on the test set, as fractions, over several draws of the labelled samples."""

    mean: float
    std: float
    accuracies: tuple[float, ...]


def linear_probe(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> float:
    """Accuracy of logistic regression fitted on all training samples.

    Features are standardised as in `few_label_probe`; the regularisation is scikit-learn's
    default, C = 1.

    Args:
        train_features, test_features: [n, D] and [m, D], or images, which are flattened.
        train_labels, test_labels: integers [n] and [m].
    Returns:
        Fraction of the test samples, computed in fp64.
    Raises:
        ConfigError: the training samples are of one class.
    """
    labels = train_labels.cpu().numpy()
    train, test = _standardised(train_features, test_features)
    return _accuracy(train, labels, test, test_labels.cpu().numpy())


def few_label_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    per_class: int = 10,
    draws: int = 10,
    seed: int = 0,
) -> ProbeResult:
    """Logistic regression fitted on `per_class` labelled samples of each class.

    Features are centred and divided by their overall standard deviation over all training
    samples (without labels), so that representations of any scale get the same
    regularisation. Draws depend on labels and seed only: every feature matrix meets the same ones.

    Args:
        train_features, test_features: [n, D] and [m, D], or images, which are flattened.
        train_labels, test_labels: integers [n] and [m].
        per_class: labelled samples of each class.
        draws: how often samples are drawn anew.
        seed: of the draws.
    Returns:
        Mean and standard deviation (over draws, n - 1) of the accuracy.
    Raises:
        ConfigError: a class has fewer than `per_class` samples, there are fewer than two draws,
            or the training samples are of one class.
    """
    labels = train_labels.cpu().numpy()
    _check(labels, per_class, draws)
    train, test = _standardised(train_features, test_features)
    accuracies = []
    for draw in range(draws):
        chosen = _draw(labels, per_class, np.random.default_rng([seed, draw]))
        accuracies.append(_accuracy(train[chosen], labels[chosen], test, test_labels.cpu().numpy()))
    return ProbeResult(
        float(np.mean(accuracies)), float(np.std(accuracies, ddof=1)), tuple(accuracies)
    )


def _standardised(train_features: Tensor, test_features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both in fp64, less the mean and divided by the overall deviation of the first."""
    train = train_features.detach().flatten(1).double().cpu().numpy()
    test = test_features.detach().flatten(1).double().cpu().numpy()
    mean = train.mean(axis=0)
    scale = (train - mean).std() or 1.0
    return (train - mean) / scale, (test - mean) / scale


def _accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Fraction of the test samples that a model fitted on the training samples gets right."""
    classes = len(np.unique(train_labels))
    if classes < 2:
        raise ConfigError(
            f"a probe needs labelled samples of 2 classes or more, but its {len(train)} have "
            f"{classes}: take more samples, or another label."
        )
    from sklearn.linear_model import LogisticRegression

    if train.shape[1] > _WIDE * len(train):
        # The weights lie in what the samples span: as many dimensions as samples are enough.
        basis = np.linalg.qr(train.T).Q
        train, test = train @ basis, test @ basis
    model = LogisticRegression(max_iter=5000).fit(train, train_labels)
    return float(model.score(test, test_labels))


def _draw(labels: np.ndarray, per_class: int, random: np.random.Generator) -> np.ndarray:
    """Indices of `per_class` samples of each class."""
    return np.concatenate(
        [
            random.choice(np.flatnonzero(labels == label), per_class, replace=False)
            for label in np.unique(labels)
        ]
    )


def _check(labels: np.ndarray, per_class: int, draws: int) -> None:
    values, counts = np.unique(labels, return_counts=True)
    if counts.min() < per_class:
        raise ConfigError(
            f"the probe takes {per_class} labelled samples of each class, but class "
            f"{values[counts.argmin()]} has {counts.min()}: set per_class to at most "
            f"{counts.min()}."
        )
    if draws < 2:
        raise ConfigError(f"the probe's spread needs 2 draws or more, but draws is {draws}.")


class Classifier:
    """A support vector machine with a Gaussian kernel, fitted once on real samples.

    No shift and no scale of all points changes it, since the width of the kernel follows the
    variance. Its time grows with the square of the number of training samples: fractions of a
    second for 2,000, a minute for 10,000 images of 32 x 32. Its own errors are part of what it
    says of generated samples, so read `accuracy` of them beside `accuracy` of held-out samples.

    Args:
        train: [n, D], or images, which are flattened.
        labels: integers [n], of 2 classes or more.
    Raises:
        ConfigError: there are no samples, or all are of one class.
        DataError: there is not one label for each sample; or as `as_points`.
    """

    def __init__(self, train: Tensor, labels: Tensor) -> None:
        (points,) = as_points("the classifier", 1, train=train)
        check_labels("train", labels, points)
        if len(labels.unique()) < 2:
            raise ConfigError(
                f"the classifier needs samples of 2 classes or more, but its {len(labels)} have "
                "1: take more samples, or another label."
            )
        from sklearn.svm import SVC

        self._example = points[:1]
        # Of C = 1, 10 and 100, by five splits of the digits: 0.988, 0.991 and 0.991.
        self._model = SVC(C=10, cache_size=500).fit(points.cpu().numpy(), labels.cpu().numpy())

    def predict(self, x: Tensor) -> Tensor:
        """Classes [m] of `x` [m, D], or images; DataError as `as_points`."""
        points, _ = as_points("the classifier", 1, x=x, train=self._example)
        return torch.from_numpy(self._model.predict(points.cpu().numpy())).to(x.device)

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """Fraction of `x` [m, D], or images, whose class is that of `labels`, integers [m]."""
        check_labels("x", labels, x)
        return (self.predict(x) == labels).double().mean().item()


def class_agreement(
    real: Tensor,
    real_labels: Tensor,
    generated: Tensor,
    generated_labels: Tensor,
    k: int = 5,
    metric: Metric = "euclidean",
) -> float:
    """Fraction of generated samples that a kNN classifier fitted on real ones gives their class.

    Args:
        real, generated: [n, D] and [m, D], or images, which are flattened.
        real_labels, generated_labels: int64 [n], and the classes asked for [m].
        k, metric: of the classifier.
    """
    predicted = knn_predict(real, real_labels, generated, k, metric)
    return (predicted == generated_labels).double().mean().item()
