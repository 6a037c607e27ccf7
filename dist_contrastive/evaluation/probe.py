"""Classifiers fitted on real samples: linear probes, and judges of the class of generated samples.

Probes tell how much of the class a representation shows linearly; `Classifier` and
`class_agreement` whether generated samples are of the class that was asked for. A probe is fitted
where its features are, on a GPU or not, to what scikit-learn's LogisticRegression finds. scipy and
scikit-learn are imported where they are used: it takes half a second.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation.neighbours import Metric, knn_predict
from dist_contrastive.evaluation.points import as_points, check_labels

SWEEP = tuple(10.0**x for x in range(-4, 5))  # C of `probe_sweep`
_PARTS = 5
_ITERATIONS = 5000
_WIDE = 4  # times as many dimensions as samples, from which fewer are as good, and fitted sooner


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy on the test set, as fractions, over several draws of the labelled samples."""

    mean: float
    std: float
    accuracies: tuple[float, ...]


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    c: float = 1.0,
) -> float:
    """Accuracy of logistic regression fitted on all training samples, by full-batch L-BFGS.

    Features are standardised as in `few_label_probe`; the regularisation is scikit-learn's.

    Args:
        train_features, test_features: [n, D] and [m, D], or images, which are flattened.
        train_labels, test_labels: integers [n] and [m]; a class that training lacks is never found.
        c: C, the inverse of the strength of the penalty of squared weights.
    Returns:
        Fraction of the test samples, computed in fp64.
    Raises:
        ConfigError: the training samples are of one class.
    """
    train, test = _standardised(train_features, test_features)
    return _accuracy(train, train_labels, test, test_labels, c)


def probe_sweep(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> tuple[float, float]:
    """Accuracy of `linear_probe`, and its C: the one of SWEEP that is best on every fifth training
    sample after fitting on the others (of equal ones the smallest). The test chooses nothing.

    Raises:
        ConfigError: as `linear_probe`; or there are fewer than 5 training samples.
    """
    if len(train_labels) < _PARTS:
        raise ConfigError(
            f"a sweep holds out every {_PARTS}th training sample, but there are "
            f"{len(train_labels)}: take more."
        )
    held = torch.arange(len(train_labels), device=train_labels.device) % _PARTS == 0
    features = train_features[~held], train_features[held]
    labels = train_labels[~held], train_labels[held]
    scores = {c: linear_probe(features[0], labels[0], features[1], labels[1], c) for c in SWEEP}
    best = max(scores, key=lambda c: scores[c])
    return linear_probe(train_features, train_labels, test_features, test_labels, best), best


def few_label_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    per_class: int | float = 10,
    draws: int = 10,
    seed: int = 0,
) -> ProbeResult:
    """Logistic regression fitted on few labelled samples of each class.

    Features are centred and divided by their overall standard deviation over all training
    samples (without labels), so that representations of any scale get the same
    regularisation. Draws depend on labels and seed only: every feature matrix meets the same ones.

    Args:
        train_features, test_features: [n, D] and [m, D], or images, which are flattened.
        train_labels, test_labels: integers [n] and [m].
        per_class: labelled samples of each class; below 1 the share of them, 0.01 for 1 %, rounded
            up.
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
        rows = _draw(labels, per_class, np.random.default_rng([seed, draw]))
        chosen = torch.from_numpy(rows).to(train.device)
        accuracies.append(_accuracy(train[chosen], train_labels[chosen], test, test_labels, 1.0))
    return ProbeResult(
        float(np.mean(accuracies)), float(np.std(accuracies, ddof=1)), tuple(accuracies)
    )


def _standardised(train_features: Tensor, test_features: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp64, less the mean and divided by the overall deviation of the first."""
    train, test = (x.detach().flatten(1) for x in (train_features, test_features))
    mean = train.mean(dim=0, dtype=torch.float64)
    train, test = train - mean, test - mean  # fp64, since the mean is
    scale = train.std(correction=0).item() or 1.0
    return train.div_(scale), test.div_(scale)


def _accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, c: float
) -> float:
    """Fraction of the test samples that a model fitted on the training samples gets right."""
    classes, numbers = train_labels.to(train.device).unique(return_inverse=True)
    if len(classes) < 2:
        raise ConfigError(
            f"a probe needs labelled samples of 2 classes or more, but its {len(train)} have "
            f"{len(classes)}: take more samples, or another label."
        )
    if train.shape[1] > _WIDE * len(train):
        # The weights lie in what the samples span: as many dimensions as samples are enough.
        basis = torch.linalg.qr(train.T).Q
        train, test = train @ basis, test @ basis
    predicted = classes[_logits(test, _fitted(train, numbers, len(classes), c)).argmax(dim=1)]
    return (predicted == test_labels.to(predicted.device)).double().mean().item()


def _fitted(x: Tensor, numbers: Tensor, num_classes: int, c: float) -> Tensor:
    """Weights and offset [K, D + 1] of least mean cross entropy + |weights|^2 / (2 c n), fp64.

    Of two classes K is 1: the first has the logit 0. The method and its limits are those of
    scikit-learn's LogisticRegression.
    """
    from scipy.optimize import minimize

    n, width = x.shape
    shape = 1 if num_classes == 2 else num_classes, width + 1
    rows = torch.arange(n, device=x.device)

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(shape).to(x.device)
        log_p = _logits(x, weights).log_softmax(dim=1)
        penalty = weights[:, :-1].square().sum() / (2 * c * n)
        loss = penalty - log_p[rows, numbers].mean()
        gap = log_p.exp_()
        gap[rows, numbers] -= 1
        gap = gap[:, -shape[0] :] / n
        gradient = torch.cat([gap.T @ x, gap.sum(dim=0)[:, None]], dim=1)
        gradient[:, :-1] += weights[:, :-1] / (c * n)
        return loss.item(), gradient.flatten().cpu().numpy()

    limits = {"maxiter": _ITERATIONS, "maxls": 50, "gtol": 1e-4, "ftol": 64 * np.finfo(float).eps}
    start = np.zeros(shape[0] * shape[1])
    found = minimize(loss_and_gradient, start, method="L-BFGS-B", jac=True, options=limits)
    return torch.from_numpy(found.x).view(shape).to(x.device)


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    logits = x @ weights[:, :-1].T + weights[:, -1]
    return logits if len(weights) > 1 else torch.cat([torch.zeros_like(logits), logits], dim=1)


def _draw(labels: np.ndarray, per_class: int | float, random: np.random.Generator) -> np.ndarray:
    """Indices of `per_class` samples of each class, or of that share of them."""
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = per_class if per_class >= 1 else math.ceil(per_class * len(rows))
        chosen.append(random.choice(rows, int(count), replace=False))
    return np.concatenate(chosen)


def _check(labels: np.ndarray, per_class: int | float, draws: int) -> None:
    if not (0 < per_class < 1 or (per_class >= 1 and per_class == int(per_class))):
        raise ConfigError(
            f"the probe takes {per_class} labelled samples of each class: set per_class to a whole "
            f"number, or to a share between 0 and 1."
        )
    values, counts = np.unique(labels, return_counts=True)
    if per_class >= 1 and counts.min() < per_class:
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
