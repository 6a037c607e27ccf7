"""Nearest neighbours: classes and values from them, retrieval, zero-shot classes.

Neighbours are compared in fp32 (or as their points are, if that is more); of equally near ones the
first counts, the order of rows, whatever tiles they are compared in. Retrieval, and ties in it, are
those of `ranking`.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.evaluation.ranking import check_lengths, rank

Metric = Literal["cosine", "euclidean"]
_TILE = 2**14  # keys that are compared at a time: 64 MiB beside 1,024 queries


def knn_predict(
    keys: Tensor,
    key_labels: Tensor,
    queries: Tensor,
    k: int = 5,
    metric: Metric = "cosine",
    chunk: int = 1024,
) -> Tensor:
    """The class that most of the `k` nearest keys of each query have.

    A tie of votes goes to the class that has the nearest of the neighbours concerned; of keys that
    are equally near the first ones count.

    Args:
        keys: [n, D], or images [n, ...], which are flattened.
        key_labels: int64 [n], 0 or more.
        queries: [m, D], or images [m, ...].
        k: neighbours that vote, at most n.
        metric: `cosine` (largest similarity) or `euclidean` (smallest distance).
        chunk: queries compared at a time; bounds the memory to chunk x 16,384 keys.
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
        chunk: test samples compared at a time.
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
        best: tuple[Tensor, Tensor] | None = None
        for first in range(0, len(keys), _TILE):
            some = keys[first : first + _TILE]
            closeness = part @ some.T if metric == "cosine" else -torch.cdist(part, some)
            values, numbers = _largest(closeness, k)
            numbers += first
            if best is not None:  # those of earlier keys come first
                values, numbers = (
                    torch.cat(x, dim=1) for x in zip(best, (values, numbers), strict=True)
                )
                values, order = _largest(values, k)
                numbers = numbers.gather(1, order)
            best = values, numbers
        assert best is not None
        nearest.append(best[1])
    return torch.cat(nearest) if nearest else torch.empty(0, k, dtype=torch.int64)


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values [n, k] and their columns, in descending order; of equal ones the first columns."""
    if k >= values.shape[1]:
        return values.sort(dim=1, descending=True, stable=True)
    largest, columns = values.topk(k, dim=1)
    columns, order = columns.sort(dim=1)
    largest, second = largest.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, second)
    # topk takes any of those that equal the k-th.
    tied = ((values >= largest[:, -1:]).sum(dim=1) > k).nonzero().flatten()
    if len(tied):
        order = values[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
        columns[tied] = order
    return largest, columns


def zero_shot_accuracy(
    image_embeddings: Tensor, labels: Tensor, class_embeddings: Tensor, chunk: int = 1024
) -> float:
    """Fraction of images whose own class has the most similar of the class embeddings.

    Args:
        image_embeddings: [n, D].
        labels: int64 [n], 0 ... C - 1.
        class_embeddings: [C, D], one for each class, as of the caption "a photo of a dog".
        chunk: classes compared at a time.
    Raises:
        ConfigError: the lengths do not match, a label has no class embedding, or n is 0.
    References:
        Radford et al. 2021, arXiv 2103.00020, section 3.1.
    """
    check_lengths("images", len(image_embeddings), "labels", len(labels))
    num_classes = len(class_embeddings)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ConfigError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but there are "
            f"{num_classes} class embeddings: give one for each class from 0."
        )
    classes = torch.arange(num_classes, device=labels.device)
    ranking = rank(image_embeddings, class_embeddings, labels, classes, top=1, tile=chunk)
    return ranking.hit_rate(1)


def recall_at_k(
    queries: Tensor, keys: Tensor, k: int, groups: Tensor | None = None, chunk: int = 1024
) -> float:
    """Fraction of queries whose own key is among the `k` keys most similar to the query.

    Args:
        queries, keys: [n, D] each; row i of both belong together.
        k: keys that are looked at, at most n.
        groups: int64 [n]; where several keys are equally right, as captions that repeat, rows of
            one group: then any key of the query's group is a hit. None: every row is its own.
        chunk: keys compared at a time.
    Raises:
        ConfigError: the lengths do not match, or k is not within 1 and n.
    """
    check_lengths("queries", len(queries), "keys", len(keys))
    if groups is not None:
        check_lengths("keys", len(keys), "groups", len(groups))
    return rank(queries, keys, groups, groups, top=1, tile=chunk).hit_rate(k)
