"""Constants of the planner: of cards, of kernels, and of what else a step of each loss does.

`KERNELS` and `COSTS` are written by ``python benchmarks/gpu/predict.py --constants --write``, which
compiles the kernels and counts steps without data; tests read them again.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Card(NamedTuple):
    """Constants of a card; rates are dense."""

    sms: int
    clock: float  # cycles a second
    half: int  # operations that the tensor cores of an SM do in a cycle, in bf16 and fp16
    fp32: float  # operations a second without tensor cores
    bandwidth: float  # bytes a second of its memory
    memory: float  # bytes
    link: float  # bytes a second that it sends to cards of its machine
    network: float  # and to those of others
    source: str = "data sheet"


CARDS: Mapping[str, Card] = {
    "a100": Card(108, 1.41e9, 2048, 19.5e12, 2.04e12, 80e9, 300e9, 25e9),
    "h100": Card(132, 1.83e9, 4096, 67e12, 3.35e12, 80e9, 450e9, 50e9),
    "h200": Card(132, 1.83e9, 4096, 67e12, 4.8e12, 141e9, 450e9, 50e9),
    "b200": Card(148, 1.86e9, 8192, 75e12, 8.0e12, 180e9, 900e9, 50e9),
}
"""SXM cards. One that was measured (benchmarks/gpu/run.py) has the rates found, and says so."""


class Assumed(NamedTuple):
    """Parts of a data sheet's rates that are reached, and costs that it does not have."""

    products: float = 0.75  # of the tensor cores' rate, by cuBLAS and by kernels alike
    bandwidth: float = 0.85
    wire: float = 0.8
    launch_s: float = 5e-6  # of the host, for a kernel or an operator
    machine: int = 8  # cards that a machine has
    kept: float = 1 / 3  # part of the memory in which the force keeps distances


ASSUMED = Assumed()


class Kernel(NamedTuple):
    """What follows the product of a tile: cycles of an SM for 1,024 scores, and blocks on an SM, of
    which two compute and finish at the same time. As benchmarks/gpu/static.py reads them for
    sm_90; other cards issue as many instructions in a cycle."""

    cycles: float
    blocks: int


class Numbers(NamedTuple):
    """Bytes for each number of the rows [n, D] and of the keys [N, D], for each row and key."""

    of_rows: int
    of_keys: int
    row: int
    key: int

    def bytes(self, rows: int, keys: int, dim: int) -> int:
        """Of so many rows and keys."""
        return rows * (dim * self.of_rows + self.row) + keys * (dim * self.of_keys + self.key)


class Cost(NamedTuple):
    """What a step does beside kernels and products."""

    memory: Numbers  # alive at the peak, without inputs, their gradients and those of scores
    moved: Numbers  # read and written by operators
    launches: tuple[int, ...]  # a step, a block of keys, and rows of gradients of scores


class Spec(NamedTuple):
    """What the planner knows of a pair loss: which kernels, rows of a sample, what keys bring."""

    inputs: int = 2  # tensors of embeddings
    rows: int = 1  # of the matrix of scores, for each sample
    has_tags: bool = False  # of 8 bytes, which travel with keys
    both: bool = False  # whether keys have log-sum-exps of their own
    counts: int = 0  # numbers of 8 bytes that are summed over ranks beside the mean
    one_round: bool = False  # whether gradients are made in the forward pass


SPECS: Mapping[str, Spec] = {
    "infonce": Spec(),
    "infonce, symmetric": Spec(both=True),
    "ntxent": Spec(rows=2),
    "dcl": Spec(rows=2, has_tags=True),
    "siglip": Spec(one_round=True),
    "self_diagonal": Spec(inputs=1),
    "supcon": Spec(inputs=1, has_tags=True, counts=1),
    "cosine_embedding": Spec(inputs=1, has_tags=True, one_round=True),
}


class ForceKernels(NamedTuple):
    """Cycles of an SM for 1,024 distances, of kernels for sm_90 at five temperatures, as
    benchmarks/gpu/static_force.py reads them."""

    distances: float  # after their product
    passes: float  # mean distance, softmaxes, sums of weights
    weights: float  # of generated points


class ForceLaunches(NamedTuple):
    """Kernels and operators of a step of the force."""

    step: int = 137
    panels: tuple[int, int] = (9, 5)  # a panel of all rows, and one of generated ones
    kept_panels: tuple[int, int] = (5, 3)  # whose distances are kept
    gather: int = 28  # more where there are other ranks
    ring: int = 149  # in the place of a step's
    block: int = 12  # of the keys of a rank


FORCE_TEMPERATURES, FORCE_ROUNDS = 5, 4
FORCE_PANEL = 2**31  # bytes of distances that are computed at a time
FORCE_CYCLES = ForceKernels(distances=560, passes=1250, weights=684)
FORCE_NUMBERS = Numbers(of_rows=128, of_keys=8, row=0, key=0)
FORCE_LAUNCHES = ForceLaunches()

FP32_PRODUCTS = 1.15
"""Cycles of an SM in which products by gradients in fp32 issue their instructions, which split each
operand in two, by cycles of their tensor cores, as `fp32_products` of predict.py reads them: two
blocks on an SM overlap these."""
KERNELS: Mapping[tuple[str, str], tuple[Kernel, ...]] = {
    ("infonce", "half"): (Kernel(64.0, 2), Kernel(70.1, 2)),
    ("infonce", "fp32"): (Kernel(64.0, 1), Kernel(86.8, 1)),
    ("infonce, symmetric", "half"): (Kernel(80.2, 2), Kernel(74.8, 2)),
    ("infonce, symmetric", "fp32"): (Kernel(111.1, 1), Kernel(94.5, 1)),
    ("ntxent", "half"): (Kernel(64.0, 2), Kernel(70.8, 2)),
    ("ntxent", "fp32"): (Kernel(64.0, 1), Kernel(87.8, 1)),
    ("dcl", "half"): (Kernel(66.8, 2), Kernel(107.7, 2)),
    ("dcl", "fp32"): (Kernel(112.6, 1), Kernel(118.2, 1)),
    ("siglip", "half"): (Kernel(170.5, 2),),
    ("siglip", "fp32"): (Kernel(183.2, 1),),
    ("self_diagonal", "half"): (Kernel(64.0, 2), Kernel(70.1, 2)),
    ("self_diagonal", "fp32"): (Kernel(64.0, 1), Kernel(86.8, 1)),
    ("supcon", "half"): (Kernel(94.2, 2), Kernel(103.8, 2)),
    ("supcon", "fp32"): (Kernel(110.4, 1), Kernel(119.8, 1)),
    ("cosine_embedding", "half"): (Kernel(167.9, 2),),
    ("cosine_embedding", "fp32"): (Kernel(200.2, 1),),
}
COSTS: Mapping[tuple[str, str, str], Cost] = {
    ("infonce", "half", "gather"): Cost(
        Numbers(8, 4, 147, -82), Numbers(46, 6, 707, -8), (40, 40, 3)
    ),
    ("infonce", "half", "ring"): Cost(
        Numbers(24, 0, 64, 0), Numbers(35, 18, -701, 623), (42, 38, 3)
    ),
    ("infonce", "fp32", "gather"): Cost(
        Numbers(12, 4, 238, -161), Numbers(72, 8, 707, -8), (40, 40, 3)
    ),
    ("infonce", "fp32", "ring"): Cost(
        Numbers(32, 0, 64, 0), Numbers(61, 20, -686, 619), (42, 38, 3)
    ),
    ("infonce, symmetric", "half", "gather"): Cost(
        Numbers(8, 4, 125, -40), Numbers(50, 5, -212, 3045), (60, 60, 4)
    ),
    ("infonce, symmetric", "half", "ring"): Cost(
        Numbers(24, 0, 108, 0), Numbers(13, 23, 14868, 277), (49, 66, 4)
    ),
    ("infonce, symmetric", "fp32", "gather"): Cost(
        Numbers(12, 4, 216, -119), Numbers(76, 9, -293, 3151), (59, 59, 4)
    ),
    ("infonce, symmetric", "fp32", "ring"): Cost(
        Numbers(32, 0, 108, 0), Numbers(39, 27, 14863, 279), (49, 66, 4)
    ),
    ("ntxent", "half", "gather"): Cost(Numbers(6, 4, 51, 5), Numbers(32, 6, 684, -8), (39, 39, 3)),
    ("ntxent", "half", "ring"): Cost(
        Numbers(22, 0, 64, 0), Numbers(21, 18, -735, 627), (40, 38, 3)
    ),
    ("ntxent", "fp32", "gather"): Cost(Numbers(8, 4, 51, 5), Numbers(52, 8, 684, -8), (39, 39, 3)),
    ("ntxent", "fp32", "ring"): Cost(
        Numbers(28, 0, 64, 0), Numbers(41, 20, -719, 622), (40, 38, 3)
    ),
    ("dcl", "half", "gather"): Cost(Numbers(6, 4, 51, 9), Numbers(32, 6, 584, 36), (38, 38, 3)),
    ("dcl", "half", "ring"): Cost(Numbers(22, 0, 88, 0), Numbers(21, 18, -992, 865), (26, 52, 3)),
    ("dcl", "fp32", "gather"): Cost(Numbers(8, 4, 51, 9), Numbers(52, 8, 584, 36), (38, 38, 3)),
    ("dcl", "fp32", "ring"): Cost(Numbers(28, 0, 88, 0), Numbers(41, 20, -974, 860), (26, 52, 3)),
    ("siglip", "half", "gather"): Cost(
        Numbers(8, 4, 153, -85), Numbers(52, 6, 257, 126), (25, 24, 6)
    ),
    ("siglip", "half", "ring"): Cost(Numbers(24, 0, 54, 0), Numbers(40, 18, 160, 180), (42, 7, 6)),
    ("siglip", "fp32", "gather"): Cost(
        Numbers(12, 4, 247, -165), Numbers(76, 8, 136, 219), (24, 24, 6)
    ),
    ("siglip", "fp32", "ring"): Cost(Numbers(32, 0, 53, 0), Numbers(63, 20, 1028, 75), (42, 7, 6)),
    ("self_diagonal", "half", "gather"): Cost(
        Numbers(6, 4, 51, 5), Numbers(28, 6, 677, -8), (38, 38, 3)
    ),
    ("self_diagonal", "half", "ring"): Cost(
        Numbers(22, 0, 64, 0), Numbers(17, 18, -747, 628), (38, 38, 3)
    ),
    ("self_diagonal", "fp32", "gather"): Cost(
        Numbers(8, 4, 51, 5), Numbers(44, 8, 676, -8), (38, 38, 3)
    ),
    ("self_diagonal", "fp32", "ring"): Cost(
        Numbers(28, 0, 64, 0), Numbers(33, 20, -731, 623), (38, 38, 3)
    ),
    ("supcon", "half", "gather"): Cost(Numbers(6, 4, 75, 9), Numbers(32, 6, 1001, 60), (55, 54, 3)),
    ("supcon", "half", "ring"): Cost(
        Numbers(22, 0, 112, 0), Numbers(21, 18, -848, 1123), (46, 65, 3)
    ),
    ("supcon", "fp32", "gather"): Cost(Numbers(8, 4, 75, 9), Numbers(52, 8, 1001, 60), (54, 54, 3)),
    ("supcon", "fp32", "ring"): Cost(
        Numbers(28, 0, 112, 0), Numbers(41, 20, -828, 1117), (46, 65, 3)
    ),
    ("cosine_embedding", "half", "gather"): Cost(
        Numbers(6, 4, 42, 17), Numbers(36, 6, 159, 153), (19, 19, 5)
    ),
    ("cosine_embedding", "half", "ring"): Cost(
        Numbers(22, 0, 74, 0), Numbers(24, 18, 36, 250), (28, 11, 5)
    ),
    ("cosine_embedding", "fp32", "gather"): Cost(
        Numbers(8, 4, 45, 16), Numbers(52, 8, 56, 219), (20, 20, 5)
    ),
    ("cosine_embedding", "fp32", "ring"): Cost(
        Numbers(28, 0, 73, 0), Numbers(39, 20, 687, 163), (28, 11, 5)
    ),
}
