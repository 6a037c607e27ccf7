"""The losses that other packages have too, value and gradient, where the definitions agree.

Where they do not:

- pytorch-metric-learning averages by default over the terms above 0 (AvgNonZeroReducer), which
  counts triplets, or dimensions in VICReg, that have nothing to learn out of the mean; with
  MeanReducer it does as we do. Of SupCon it keeps the default: there a term is 0 only for a row
  without a positive. Its contrastive loss adds up the mean over positive pairs and that over
  negative ones; compared are the sums.
- sentence-transformers' BatchAllTripletLoss too averages over the violating triplets alone:
  compared at a margin that all triplets violate. Its BatchHardTripletLoss counts an anchor without
  a positive as one whose positive is at distance 0, we leave it out: compared where all have one.
  Its BatchSemiHardTripletLoss agrees.
"""

from types import ModuleType

import pytest
import torch
from pytorch_metric_learning import distances, miners, reducers
from pytorch_metric_learning import losses as metric_learning
from torch import Tensor

from dist_contrastive import losses

OPTIONS = {"impl": "chunked", "chunk_size": 4}
UNEVEN = torch.tensor([0, 1, 0, 2, 1, 1, 3, 0, 3, 4])  # 2 and 4 have one member
PAIRED = torch.tensor([0, 1, 0, 2, 1, 1, 3, 0, 3, 2])


@pytest.fixture(scope="module")
def sentence() -> ModuleType:
    """The losses of sentence-transformers, which takes seconds to import."""
    from sentence_transformers.sentence_transformer import losses

    return losses


@pytest.fixture
def rows() -> list[Tensor]:
    return [torch.randn(10, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def check(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(loss, inputs) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_supcon(rows):
    x = rows[0]
    theirs = metric_learning.SupConLoss(0.1)(x, UNEVEN)
    check(losses.SupCon(0.1, **OPTIONS)(x, UNEVEN), theirs, [x])


def test_supcon_of_views(rows):
    theirs = metric_learning.SupConLoss(0.1)(torch.cat(rows), UNEVEN.repeat(3))
    check(losses.SupCon(0.1, **OPTIONS)(torch.stack(rows, 1), UNEVEN), theirs, rows)
    theirs = metric_learning.SupConLoss(0.1)(torch.cat(rows), torch.arange(10).repeat(3))
    check(losses.SupCon(0.1, **OPTIONS)(torch.stack(rows, 1)), theirs, rows)


@pytest.mark.parametrize("loss", [metric_learning.NTXentLoss, metric_learning.SupConLoss])
def test_ntxent(rows, loss):
    a, b, _ = rows
    theirs = metric_learning.SelfSupervisedLoss(loss(0.2))(a, b)
    check(losses.NTXent(0.2, **OPTIONS)(a, b), theirs, [a, b])


DISTANCES = {
    "euclidean": distances.LpDistance(normalize_embeddings=False),
    "squared_euclidean": distances.LpDistance(normalize_embeddings=False, power=2),
    "cosine": distances.CosineSimilarity(),
}


@pytest.mark.parametrize("margin", [0.2, 5.0])
@pytest.mark.parametrize("mining", ["all", "hard"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_triplet(rows, distance, mining, margin):
    x, metric = rows[0], DISTANCES[distance]
    mined = miners.BatchHardMiner(distance=metric)(x, UNEVEN) if mining == "hard" else None
    theirs = metric_learning.TripletMarginLoss(
        margin, distance=metric, reducer=reducers.MeanReducer()
    )
    ours = losses.Triplet(margin, distance, mining, **OPTIONS)
    check(ours(x, UNEVEN), theirs(x, UNEVEN, mined), [x])


def test_cosine_embedding(rows):
    x = rows[0]
    metric, reducer = distances.CosineSimilarity(), reducers.SumReducer()
    theirs = metric_learning.ContrastiveLoss(1, 0.1, distance=metric, reducer=reducer)(x, UNEVEN)
    check(losses.CosineEmbedding(0.1, **OPTIONS)(x, UNEVEN), theirs / (10 * 9), [x])


def test_vicreg(rows):
    a, b, _ = rows
    theirs = metric_learning.VICRegLoss(3, 5, 7, reducer=reducers.MeanReducer())(a, ref_emb=b)
    check(losses.VICReg(3, 5, 7)(a, b), theirs, [a, b])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_inputs", [2, 3])  # the third are hard negatives
def test_infonce(rows, sentence, num_inputs, symmetric):
    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    theirs = sentence.MultipleNegativesRankingLoss(
        None, scale=20.0, directions=directions, partition_mode="per_direction"
    )
    inputs = rows[:num_inputs]
    ours = losses.InfoNCE(1 / 20, symmetric=symmetric, **OPTIONS)(*inputs)
    check(ours, theirs.compute_loss_from_embeddings(inputs, None), inputs)


def test_self_diagonal(rows, sentence):
    x = rows[0]
    theirs = sentence.MultipleNegativesRankingLoss(None, scale=10.0)
    ours = losses.SelfDiagonal(0.1, **OPTIONS)(x)
    check(ours, theirs.compute_loss_from_embeddings([x, x], None), [x])


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    ("name", "mining", "margin", "labels"),
    [
        ("BatchHardTripletLoss", "hard", 0.2, PAIRED),
        ("BatchHardTripletLoss", "hard", 5.0, PAIRED),
        ("BatchSemiHardTripletLoss", "semihard", 0.2, UNEVEN),
        ("BatchSemiHardTripletLoss", "semihard", 5.0, UNEVEN),
        ("BatchAllTripletLoss", "all", 50.0, UNEVEN),
    ],
)
def test_mined_triplets(rows, sentence, name, mining, margin, labels, distance):
    metric = getattr(sentence.BatchHardTripletLossDistanceFunction, f"{distance}_distance")
    theirs = getattr(sentence, name)(None, distance_metric=metric, margin=margin)
    x = rows[0]
    ours = losses.Triplet(margin, distance, mining, **OPTIONS)
    check(ours(x, labels), theirs.compute_loss_from_embeddings([x], labels), [x])
