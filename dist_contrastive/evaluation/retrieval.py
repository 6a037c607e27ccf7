"""Retrieval across two embeddings of the same things, as of images and their captions.

Similarity is the cosine, in fp64. Ties count against, and NaN does: an encoder that maps
everything to one point scores 0, not 1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError

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
