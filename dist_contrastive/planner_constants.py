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


SPECS: Mapping[str, Spec] = {
    "infonce": Spec(),
    "infonce, symmetric": Spec(both=True),
    "ntxent": Spec(rows=2),
    "dcl": Spec(rows=2, has_tags=True),
    "siglip": Spec(),
    "self_diagonal": Spec(inputs=1),
    "supcon": Spec(inputs=1, has_tags=True, counts=1),
    "cosine_embedding": Spec(inputs=1, has_tags=True),
}


class ForceKernels(NamedTuple):
    """Cycles of an SM for 1,024 distances, as the machine code for sm_90 has them at five
    temperatures: estimates, since its loops are not told apart."""

    distances: float  # after their product
    passes: float  # mean distance, softmaxes, sums of weights
    weights: float  # of generated points


class ForceLaunches(NamedTuple):
    """Kernels and operators of a step of the force."""

    step: int = 187
    panel: int = 11  # of four passes over it
    kept_panel: int = 6  # whose distances are kept
    gather: int = 26  # more where there are other ranks
    ring: int = 144  # in the place of a step's
    block: int = 75  # of the keys of a rank


FORCE_TEMPERATURES, FORCE_ROUNDS = 5, 4
FORCE_PANEL = 2**30  # bytes of distances that are computed at a time
FORCE_CYCLES = ForceKernels(distances=560, passes=2600, weights=670)
FORCE_NUMBERS = Numbers(of_rows=128, of_keys=8, row=0, key=0)
FORCE_LAUNCHES = ForceLaunches()

KERNELS: Mapping[tuple[str, str], tuple[Kernel, ...]] = {
    ("infonce", "half"): (Kernel(72.8, 1), Kernel(151.2, 2)),
    ("infonce", "fp32"): (Kernel(65.6, 1), Kernel(132.1, 1)),
    ("infonce, symmetric", "half"): (Kernel(130.6, 1), Kernel(172.0, 1)),
    ("infonce, symmetric", "fp32"): (Kernel(124.0, 1), Kernel(202.1, 1)),
    ("ntxent", "half"): (Kernel(88.8, 1), Kernel(133.8, 2)),
    ("ntxent", "fp32"): (Kernel(81.6, 1), Kernel(112.2, 1)),
    ("dcl", "half"): (Kernel(89.9, 1), Kernel(157.0, 1)),
    ("dcl", "fp32"): (Kernel(102.8, 1), Kernel(141.1, 1)),
    ("siglip", "half"): (Kernel(192.6, 1), Kernel(229.2, 2)),
    ("siglip", "fp32"): (Kernel(163.8, 1), Kernel(198.1, 1)),
    ("self_diagonal", "half"): (Kernel(72.8, 1), Kernel(151.2, 2)),
    ("self_diagonal", "fp32"): (Kernel(65.6, 1), Kernel(132.1, 1)),
    ("supcon", "half"): (Kernel(206.0, 1), Kernel(158.0, 1)),
    ("supcon", "fp32"): (Kernel(216.4, 1), Kernel(142.1, 1)),
    ("cosine_embedding", "half"): (Kernel(130.0, 1), Kernel(156.0, 1)),
    ("cosine_embedding", "fp32"): (Kernel(122.0, 1), Kernel(132.1, 1)),
}
COSTS: Mapping[tuple[str, str, str], Cost] = {
    ("infonce", "half", "gather"): Cost(
        Numbers(28, 8, 51, 9), Numbers(392, 18, 1027, 49), (90, 89, 5)
    ),
    ("infonce", "half", "ring"): Cost(
        Numbers(48, 0, 68, 0), Numbers(365, 46, -450, 890), (88, 91, 5)
    ),
    ("infonce", "fp32", "gather"): Cost(
        Numbers(32, 8, 48, 4), Numbers(380, 24, 956, 45), (82, 82, 5)
    ),
    ("infonce", "fp32", "ring"): Cost(
        Numbers(56, 0, 52, 0), Numbers(337, 68, -515, 882), (74, 90, 5)
    ),
    ("infonce, symmetric", "half", "gather"): Cost(
        Numbers(28, 8, 47, 45), Numbers(395, 17, 704, 2965), (102, 102, 6)
    ),
    ("infonce, symmetric", "half", "ring"): Cost(
        Numbers(48, 0, 124, 0), Numbers(342, 51, 15068, 483), (92, 106, 6)
    ),
    ("infonce, symmetric", "fp32", "gather"): Cost(
        Numbers(32, 8, 44, 40), Numbers(384, 25, 303, 3107), (94, 94, 6)
    ),
    ("infonce, symmetric", "fp32", "ring"): Cost(
        Numbers(56, 0, 108, 0), Numbers(314, 75, 14999, 474), (78, 105, 6)
    ),
    ("ntxent", "half", "gather"): Cost(
        Numbers(22, 8, 39, 9), Numbers(280, 18, 912, 49), (78, 78, 5)
    ),
    ("ntxent", "half", "ring"): Cost(
        Numbers(42, 0, 56, 0), Numbers(253, 46, -559, 883), (69, 87, 5)
    ),
    ("ntxent", "fp32", "gather"): Cost(
        Numbers(20, 8, 36, 4), Numbers(280, 24, 840, 45), (71, 72, 5)
    ),
    ("ntxent", "fp32", "ring"): Cost(
        Numbers(44, 0, 40, 0), Numbers(237, 68, -626, 876), (57, 86, 5)
    ),
    ("dcl", "half", "gather"): Cost(
        Numbers(22, 8, 40, 24), Numbers(280, 18, 1036, 165), (85, 85, 5)
    ),
    ("dcl", "half", "ring"): Cost(
        Numbers(42, 0, 88, 0), Numbers(253, 46, -557, 1120), (70, 101, 5)
    ),
    ("dcl", "fp32", "gather"): Cost(
        Numbers(20, 8, 37, 19), Numbers(280, 24, 964, 161), (79, 79, 5)
    ),
    ("dcl", "fp32", "ring"): Cost(
        Numbers(44, 0, 72, 0), Numbers(237, 68, -624, 1113), (58, 100, 5)
    ),
    ("siglip", "half", "gather"): Cost(
        Numbers(28, 8, 43, 9), Numbers(365, 12, 503, 1938), (58, 58, 5)
    ),
    ("siglip", "half", "ring"): Cost(
        Numbers(48, 0, 60, 0), Numbers(314, 41, 16487, -1085), (93, 23, 5)
    ),
    ("siglip", "fp32", "gather"): Cost(
        Numbers(32, 8, 40, 4), Numbers(339, 14, 271, 1999), (49, 49, 5)
    ),
    ("siglip", "fp32", "ring"): Cost(
        Numbers(56, 0, 44, 0), Numbers(284, 47, 16417, -1095), (79, 20, 5)
    ),
    ("self_diagonal", "half", "gather"): Cost(
        Numbers(22, 8, 39, 9), Numbers(280, 18, 940, 49), (78, 78, 5)
    ),
    ("self_diagonal", "half", "ring"): Cost(
        Numbers(42, 0, 56, 0), Numbers(253, 46, -539, 891), (66, 91, 5)
    ),
    ("self_diagonal", "fp32", "gather"): Cost(
        Numbers(24, 8, 36, 4), Numbers(280, 24, 868, 45), (72, 72, 5)
    ),
    ("self_diagonal", "fp32", "ring"): Cost(
        Numbers(48, 0, 40, 0), Numbers(237, 68, -606, 884), (54, 90, 5)
    ),
    ("supcon", "half", "gather"): Cost(
        Numbers(14, 8, 68, 24), Numbers(200, 18, 1569, 189), (101, 101, 5)
    ),
    ("supcon", "half", "ring"): Cost(
        Numbers(34, 0, 116, 0), Numbers(173, 46, -339, 1425), (86, 116, 5)
    ),
    ("supcon", "fp32", "gather"): Cost(
        Numbers(16, 8, 65, 19), Numbers(200, 24, 1498, 185), (95, 95, 5)
    ),
    ("supcon", "fp32", "ring"): Cost(
        Numbers(40, 0, 100, 0), Numbers(157, 68, -406, 1418), (74, 115, 5)
    ),
    ("cosine_embedding", "half", "gather"): Cost(
        Numbers(10, 8, 32, 24), Numbers(160, 14, 490, 132), (46, 46, 5)
    ),
    ("cosine_embedding", "half", "ring"): Cost(
        Numbers(30, 0, 80, 0), Numbers(136, 38, 240, 354), (57, 34, 5)
    ),
    ("cosine_embedding", "fp32", "gather"): Cost(
        Numbers(12, 8, 29, 19), Numbers(144, 16, 418, 128), (38, 38, 5)
    ),
    ("cosine_embedding", "fp32", "ring"): Cost(
        Numbers(36, 0, 64, 0), Numbers(116, 44, 172, 346), (45, 31, 5)
    ),
}
