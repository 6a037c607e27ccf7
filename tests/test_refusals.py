"""What one rank alone does wrong is refused on all of them, at once and in the same words."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_contrastive import losses
from dist_contrastive.errors import ConfigError, NonFiniteError
from dist_contrastive.testing import run_ranks

BAD = {  # what rank 1 of two does wrong: loss, inputs of ranks 0 and 1, error, words
    "dtype": (
        losses.InfoNCE(),
        [(torch.ones(3, 4), torch.ones(3, 4)), (torch.ones(3, 4).double(), torch.ones(3, 4))],
        ConfigError,
        "[rows, 4] torch.float32 without gradient on rank 0; [rows, 4] torch.float64",
    ),
    "dimension": (
        losses.SigLIP(),
        [(torch.ones(3, 4),) * 2, (torch.ones(3, 5),) * 2],
        ConfigError,
        "[rows, 4] torch.float32 without gradient on rank 0; [rows, 5]",
    ),
    "gradient": (
        losses.NTXent(),
        [(torch.ones(3, 4),) * 2, (torch.ones(3, 4, requires_grad=True), torch.ones(3, 4))],
        ConfigError,
        "[rows, 4] torch.float32 without gradient on rank 0; [rows, 4] torch.float32 with ",
    ),
    "gradient of the force": (
        losses.ContrastiveForce(preset="seed"),
        [(torch.ones(3, 2),) * 2, (torch.ones(3, 2, requires_grad=True), torch.ones(3, 2))],
        ConfigError,
        "with gradient on rank 1",
    ),
    "rows": (
        losses.DCL(),
        [(torch.ones(3, 4),) * 2, (torch.ones(3, 4), torch.ones(2, 4))],
        ConfigError,
        "rank 1 has 3 rows of view_a, 2 rows of view_b",
    ),
    "no tensor": (
        losses.SupCon(),
        [(torch.ones(3, 4), torch.zeros(3).long()), (np.ones((3, 4)), torch.zeros(3).long())],
        ConfigError,
        "no dense tensor of a known dtype on rank 1",
    ),
    "nothing": (
        losses.NTXent(),
        [(torch.ones(3, 4),) * 2, (torch.ones(3, 4), None)],
        ConfigError,
        "view_b are missing on ranks [1]",
    ),
    "complex numbers": (
        losses.BarlowTwins(),
        [(torch.ones(3, 4),) * 2, (torch.ones(3, 4, dtype=torch.complex64), torch.ones(3, 4))],
        ConfigError,
        "no dense tensor of a known dtype on rank 1",
    ),
    "labels of an odd dtype": (
        losses.Triplet(),
        [(torch.ones(3, 4), torch.arange(3)), (torch.ones(3, 4), torch.zeros(3) * 1j)],
        ConfigError,
        "no dense tensor of a known dtype on rank 1",
    ),
    "labels that are texts": (
        losses.SupCon(),
        [(torch.ones(3, 4), ["cat", "dog", "cat"]), (torch.ones(3, 4), [0, 1, 0])],
        ConfigError,
        "labels: texts, no dense tensor of a known dtype on rank 0; [rows] torch.int64",
    ),
    "neither views nor labels": (
        losses.SupCon(),
        [(torch.ones(3, 4),)] * 2,
        ConfigError,
        "features [rows, 4] have one view a sample and no labels",
    ),
    "norms that overflow": (
        losses.NTXent(),
        [(torch.ones(3, 4),) * 2, (torch.ones(3, 4), torch.full((3, 4), 1e25))],
        NonFiniteError,
        "3 of 3 rows of view_b on rank 1",
    ),
    "not embeddings": (
        losses.KoLeo(),
        [(torch.ones(3, 4),), (torch.ones(3),)],
        ConfigError,
        "[rows] torch.float32 without gradient on rank 1",
    ),
    "negatives on one rank": (
        losses.InfoNCE(),
        [(torch.ones(3, 4),) * 2, (torch.ones(3, 4),) * 3],
        ConfigError,
        "negatives are missing on ranks [0]",
    ),
    "bank on one rank": (
        losses.InfoNCE(),
        [(torch.ones(3, 4),) * 2, (*(torch.ones(3, 4),) * 2, None, torch.ones(5, 4))],
        ConfigError,
        "bank are missing on ranks [0]",
    ),
    "bank of another length": (
        losses.InfoNCE(),
        [(*(torch.ones(3, 4),) * 2, None, torch.ones(rows, 4)) for rows in (5, 4)],
        ConfigError,
        "bank has 5, 4 rows on the ranks, which must hold the same",
    ),
    "bank of another dimension": (
        losses.InfoNCE(),
        [(*(torch.ones(3, 4),) * 2, None, torch.ones(5, 3))] * 2,
        ConfigError,
        "dimensions {'queries': 4, 'keys': 4, 'bank': 3}",
    ),
    "bank with gradient": (
        losses.InfoNCE(),
        [
            (*(torch.ones(3, 4),) * 2, None, torch.ones(5, 4, requires_grad=needs_grad))
            for needs_grad in (False, True)
        ],
        ConfigError,
        "bank is on all ranks, none of which would get its gradient",
    ),
    "bank of integers": (
        losses.InfoNCE(),
        [(*(torch.ones(3, 4),) * 2, None, torch.ones(5, 4).to(t)) for t in (torch.float32, int)],
        ConfigError,
        "torch.int64 without gradient on rank 1",
    ),
    "NaN in the bank": (
        losses.InfoNCE(),
        [(*(torch.ones(3, 4),) * 2, None, torch.full((5, 4), x)) for x in (1.0, torch.nan)],
        NonFiniteError,
        "5 of 5 rows of bank on rank 1",
    ),
    "labels of the wrong length": (
        losses.SupCon(),
        [(torch.ones(3, 4), torch.zeros(3).long()), (torch.ones(3, 4), torch.zeros(4).long())],
        ConfigError,
        "rank 1 has 3 rows of features, 4 rows of labels",
    ),
    "labels below -1": (
        losses.CosineEmbedding(),
        [(torch.ones(3, 4), torch.zeros(3).long()), (torch.ones(3, 4), torch.tensor([0, -2, 1]))],
        ConfigError,
        "labels on rank 1 have -2",
    ),
    "NaN": (
        losses.SupCon(),
        [
            (torch.ones(3, 2), torch.zeros(3).long()),
            (torch.tensor([[1.0, torch.nan], [torch.inf, 0.0], [1.0, 1.0]]), torch.zeros(3).long()),
        ],
        NonFiniteError,
        "2 of 3 rows of features on rank 1",
    ),
    "NaN in points": (
        losses.ContrastiveForce(),
        [(torch.ones(3, 4),) * 2, (torch.ones(3, 4), torch.full((2, 4), torch.nan))],
        NonFiniteError,
        "2 of 2 rows of positive on rank 1",
    ),
}


def refused(keys_from: str) -> dict[str, str]:
    messages = {}
    for name, (loss, inputs, error, _) in BAD.items():
        loss.keys_from = keys_from
        with pytest.raises(error) as caught:
            loss(*inputs[dist.get_rank()])
        messages[name] = str(caught.value)
        dist.barrier()
    return messages


@pytest.mark.parametrize("keys_from", ["gather", "ring"])
def test_bad_input_is_refused_on_all_ranks_in_the_same_words(keys_from):
    first, second = run_ranks(refused, 2, keys_from)
    assert first == second
    for name, (*_, words) in BAD.items():
        assert words in first[name], name
        assert "\n" not in first[name]
