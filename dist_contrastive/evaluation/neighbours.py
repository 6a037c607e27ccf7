"""Classification by nearest neighbours: how well a space groups what belongs together."""

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
    if not 1 <= k <= len(keys):
        raise ConfigError(
            f"k is {k}, but there are {len(keys)} samples to be neighbours: set k from 1 to "
            f"{len(keys)}."
        )
    keys, queries = keys.flatten(1), queries.flatten(1)
    if metric == "cosine":
        keys, queries = F.normalize(keys, dim=1), F.normalize(queries, dim=1)
    num_classes = int(key_labels.max()) + 1
    # The halves of halves sum to less than one vote: they decide ties and nothing else.
    weights = 1 + 0.5 ** torch.arange(2, k + 2, device=keys.device, dtype=torch.float64)
    predicted = [torch.empty(0, dtype=torch.int64, device=keys.device)]
    for part in queries.split(chunk):
        closeness = part @ keys.T if metric == "cosine" else -torch.cdist(part, keys)
        voters = key_labels[closeness.topk(k, dim=1).indices]
        votes = weights.new_zeros(len(part), num_classes)
        votes.scatter_add_(1, voters, weights.expand(len(part), k))
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
