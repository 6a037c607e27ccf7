"""Nearest neighbours: classes and values from them, retrieval, zero-shot classes.

Retrieval compares cosines in fp64. Ties count against, and NaN does: an encoder that maps
everything to one point scores 0, not 1.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError, DataError

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
        ConfigError: k is larger than n. DataError: keys and queries have not one width.
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
        ConfigError, DataError: as `knn_predict`.
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
    # Not scikit-learn's NearestNeighbors: the same neighbours, but 1.5 to 3.9 times as slow (2,000
    # queries, 1,437 to 50,000 keys of 256 dimensions, one thread), and on CPUs alone.
    keys, queries = keys.flatten(1), queries.flatten(1)
    if keys.shape[1] != queries.shape[1]:
        raise DataError(
            f"neighbours have {keys.shape[1]} values a sample and what is compared with them "
            f"{queries.shape[1]}: take both from one space."
        )
    if metric == "cosine":
        keys, queries = F.normalize(keys, dim=1), F.normalize(queries, dim=1)
    nearest = []
    for part in queries.split(chunk):
        closeness = part @ keys.T if metric == "cosine" else -torch.cdist(part, keys)
        nearest.append(closeness.topk(k, dim=1).indices)
    return torch.cat(nearest)


TIE = 1e-12
"""Cosines that differ by no more are equal: a product in fp64 is exact to about 1e-15."""


def zero_shot_accuracy(
    image_embeddings: Tensor, labels: Tensor, class_embeddings: Tensor, chunk: int = 1024
) -> float:
    """Fraction of images whose own class has the most similar of the class embeddings.

    Args:
        image_embeddings: [n, D].
        labels: int64 [n], 0 ... C - 1.
        class_embeddings: [C, D], one for each class, as of the caption "a photo of a dog".
        chunk: images at a time; bounds the memory to chunk x C.
    Raises:
        ConfigError: the lengths do not match, a label has no class embedding, or n is 0.
    References:
        Radford et al. 2021, arXiv 2103.00020, section 3.1.
    """
    _check_lengths("images", len(image_embeddings), "labels", len(labels))
    num_classes = len(class_embeddings)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ConfigError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but there are "
            f"{num_classes} class embeddings: give one for each class from 0."
        )
    classes = torch.arange(num_classes, device=labels.device)
    return _hit_rate(image_embeddings, labels, class_embeddings, classes, 1, chunk)


def recall_at_k(
    queries: Tensor, keys: Tensor, k: int, groups: Tensor | None = None, chunk: int = 1024
) -> float:
    """Fraction of queries whose own key is among the `k` keys most similar to the query.

    Args:
        queries, keys: [n, D] each; row i of both belong together.
        k: keys that are looked at, at most n.
        groups: int64 [n]; where several keys are equally right, as captions that repeat, rows of
            one group: then any key of the query's group is a hit. None: every row is its own.
        chunk: queries at a time; bounds the memory to chunk x n.
    Raises:
        ConfigError: the lengths do not match, or k is not within 1 and n.
    """
    _check_lengths("queries", len(queries), "keys", len(keys))
    if not 1 <= k <= len(keys):
        raise ConfigError(f"k is {k}, but there are {len(keys)} keys: set k from 1 to {len(keys)}.")
    if groups is None:
        groups = torch.arange(len(keys), device=keys.device)
    _check_lengths("keys", len(keys), "groups", len(groups))
    return _hit_rate(queries, groups, keys, groups, k, chunk)


def _hit_rate(
    queries: Tensor, query_groups: Tensor, keys: Tensor, key_groups: Tensor, k: int, chunk: int
) -> float:
    """Fraction of queries with fewer than `k` keys of other groups before the best of their own."""
    queries, keys = (F.normalize(x.double(), dim=1) for x in (queries, keys))
    hits = 0
    for part, group in zip(queries.split(chunk), query_groups.split(chunk), strict=True):
        scores = part @ keys.T
        own = group[:, None] == key_groups
        best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        before = ~own & ~(scores < best - TIE)  # not `>=`, which NaN would always escape
        hits += int((before.sum(dim=1) < k).sum())
    return hits / len(queries)


def _check_lengths(first: str, n: int, second: str, m: int) -> None:
    if n != m or n == 0:
        raise ConfigError(
            f"there are {n} {first} and {m} {second}: give 1 or more, and as many of both."
        )
