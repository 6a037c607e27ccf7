"""Classes and values by nearest neighbours: how well a space groups what belongs together."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError

Metric = Literal["cosine", "euclidean"]


def knn_predict(
    keys: Tensor,
    key_labels: Tensor,
    queries: Tensor,
    k: int = 5,
    metric: Metric = "cosine",
    chunk: int = 1024,
) -> Tensor:
    """The class that most of the `k` nearest keys of each query have.

    A tie goes to the class that has the nearest of the neighbours concerned.

    Args:
        keys: [n, D], or images [n, ...], which are flattened.
        key_labels: int64 [n], 0 or more.
        queries: [m, D], or images [m, ...].
        k: neighbours that vote, at most n.
        metric: `cosine` (largest similarity) or `euclidean` (smallest distance).
        chunk: queries compared at a time; bounds the memory to chunk x n.
    Returns:
        int64 [m].
    Raises:
        ConfigError: k is larger than n.
    """
    neighbours = _nearest(keys, queries, k, metric, chunk)
    num_classes = int(key_labels.max()) + 1
    # The halves of halves sum to less than one vote: they decide ties and nothing else.
    weights = 1 + 0.5 ** torch.arange(2, k + 2, device=keys.device, dtype=torch.float64)
    predicted = []
    for part in neighbours.split(chunk):
        votes = weights.new_zeros(len(part), num_classes)
        votes.scatter_add_(1, key_labels[part], weights.expand(len(part), k))
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 5,
    metric: Metric = "cosine",
) -> float:
    """Fraction of test samples whose class `knn_predict` finds among the training samples."""
    predicted = knn_predict(train_features, train_labels, test_features, k, metric)
    return (predicted == test_labels).double().mean().item()


def knn_regression_error(
    train_features: Tensor,
    train_values: Tensor,
    test_features: Tensor,
    test_values: Tensor,
    k: int = 5,
    chunk: int = 1024,
) -> float:
    """Mean absolute error of predicting a value as the mean over the `k` nearest samples.

    Nearest by cosine. Compare with the error of always predicting the mean or the median.

    Args:
        train_features, test_features: [n, D] and [m, D], or images, which are flattened.
        train_values, test_values: floats [n] and [m], all known: one NaN gives NaN.
        k: neighbours, at most n.
        chunk: test samples compared at a time; bounds the memory to chunk x n.
    Returns:
        The error in units of the values; computed in fp64.
    Raises:
        ConfigError: k is larger than n.
    """
    neighbours = _nearest(train_features.double(), test_features.double(), k, "cosine", chunk)
    predicted = train_values.double()[neighbours].mean(dim=1)
    return (predicted - test_values.double()).abs().mean().item()


def _nearest(keys: Tensor, queries: Tensor, k: int, metric: Metric, chunk: int) -> Tensor:
    """Indices int64 [m, k] of the keys nearest to each query, nearest first."""
    if not 1 <= k <= len(keys):
        raise ConfigError(
            f"k is {k}, but there are {len(keys)} samples to be neighbours: set k from 1 to "
            f"{len(keys)}."
        )
    keys, queries = keys.flatten(1), queries.flatten(1)
    if metric == "cosine":
        keys, queries = F.normalize(keys, dim=1), F.normalize(queries, dim=1)
    found = []
    for part in queries.split(chunk):
        closeness = part @ keys.T if metric == "cosine" else -torch.cdist(part, keys)
        found.append(closeness.topk(k, dim=1).indices)
    return torch.cat(found)
