"""The gradient audit: do W ranks take the step that one process would take?

For every loss and every way to compute it: an encoder and the loss inside the real
DistributedDataParallel, on W gloo ranks with different rows each, against one process with all the
rows and the plain dense loss. What is compared is the gradient that the optimiser sees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_contrastive import losses
from dist_contrastive.data.progress import progress_bar
from dist_contrastive.losses.base import PairLoss
from dist_contrastive.ranks import run_ranks

_ROWS = 12  # of the global batch: divisible by 1 to 4, and small, so that errors are large
_DIM_IN, _DIM, _VIEWS, _CHUNK = 6, 5, 2, 4

TOLERANCE = 1e-9
MOST_RANKS = 6  # beyond that the rows of the smallest split run out
SPLITS = ("even", "uneven", "one empty rank", "all on the last rank")
IMPLS = ("dense", "chunked")


class Way(NamedTuple):
    """How the global batch is compared."""

    keys_from: str
    impl: str
    world_size: int
    split: str  # of the rows over the ranks


@dataclass(frozen=True)
class Finding:
    """The gradients on W ranks against those of one process."""

    loss: str
    way: Way
    ratios: dict[str, float]  # of the value, and of the norms of gradients, by parameter
    cosines: dict[str, float]  # between the gradients, by parameter
    differences: dict[str, float]  # norm of the difference over the norm, and that of all rows

    @property
    def error(self) -> float:
        """The largest distance from 1 of ratios and cosines, and from 0 of differences; infinite
        for NaN."""
        ones = (*self.ratios.values(), *self.cosines.values())
        return max(*map(_off, ones), *(_off(1 + x) for x in self.differences.values()))


class Gradients(NamedTuple):
    """What one backward has left."""

    value: Tensor
    parameters: dict[str, Tensor]  # "encoder" for all of its parameters
    rows: list[Tensor]  # of the embeddings [b, ...], for every input that has some


@dataclass(frozen=True)
class Case:
    """A loss with its settings, and the embeddings and labels that it takes."""

    loss: type[PairLoss]
    settings: dict[str, Any] = field(default_factory=dict)
    embeddings: int = 1  # how many inputs go through the encoder
    views: bool = False  # whether they are [rows, views, dim]
    labels: tuple[Tensor, ...] = ()
    opposite: tuple[int, ...] = ()  # inputs whose rows need not be split as those of the first
    shared: dict[str, Tensor] = field(default_factory=dict)  # whole on all ranks, past the encoder
    named: tuple[str, ...] = ()  # the last inputs, which the loss takes by these names

    def build(self, keys_from: str, impl: str) -> "Encoded":
        """The same encoder and loss in every process."""
        torch.manual_seed(0)
        options: dict[str, Any] = {"keys_from": keys_from, "impl": impl, "chunk_size": _CHUNK}
        return Encoded(self.loss(**self.settings, **options), self.named)

    def rows(self) -> list[Tensor]:
        """All inputs of the global batch."""
        generator = torch.Generator().manual_seed(7)
        shape = (_ROWS, _VIEWS, _DIM_IN) if self.views else (_ROWS, _DIM_IN)
        made = (torch.randn(shape, generator=generator) for _ in range(self.embeddings))
        return [*(x.double() for x in made), *self.labels]

    def share(self, rows: list[Tensor], way: Way, rank: int) -> list[Tensor]:
        """This rank's part of each; where inputs are independent of each other, an opposite one."""
        sizes = _split(way.split, way.world_size)
        return [
            x.split(sizes[::-1] if place in self.opposite else sizes)[rank]
            for place, x in enumerate(rows)
        ]


class Encoded(nn.Module):
    """An encoder before a loss; integer and one-dimensional inputs are labels and pass it by."""

    def __init__(self, loss: PairLoss, named: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder = nn.Linear(_DIM_IN, _DIM, dtype=torch.float64)
        self.loss = loss.double()
        self.named = named

    def forward(self, *inputs: Tensor, **shared: Tensor) -> Tensor:
        """The loss; what is shared has no gradient."""
        inputs = tuple(x if x.dim() == 1 else self.encoder(x) for x in inputs)
        self.embeddings = [x for x in inputs if x.requires_grad]
        for x in self.embeddings:
            x.retain_grad()
        first = len(inputs) - len(self.named)
        named = dict(zip(self.named, inputs[first:], strict=True))
        return self.loss(*inputs[:first], **named, **shared)


def audit(world_sizes: Sequence[int], cases: dict[str, Case] | None = None) -> list[Finding]:
    """Every way to compute the cases (None: `CASES`), each at its worst rank."""
    cases = cases or CASES
    right = {name: _reference(case) for name, case in cases.items()}
    findings = []
    for world_size in progress_bar(world_sizes, len(world_sizes), "comparing gradients"):
        of_ranks = run_ranks(_on_rank, world_size, cases)
        for place in zip(*of_ranks, strict=True):
            compared = [
                _compare(name, cases[name], way, rank, found, right[name])
                for rank, (name, way, found) in enumerate(place)
            ]
            findings.append(max(compared, key=lambda finding: finding.error))
    return findings


def _reference(case: Case) -> Gradients:
    encoded = case.build("gather", "dense")
    return _gradients(encoded, encoded(*case.rows(), **case.shared))


def _on_rank(cases: dict[str, Case]) -> list[tuple[str, Way, Gradients]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = []
    for name, case in cases.items():
        for way in _ways(world_size):
            encoded = case.build(way.keys_from, way.impl)
            parallel = DistributedDataParallel(encoded)  # must live until backward has run
            loss = parallel(*case.share(case.rows(), way, rank), **case.shared)
            results.append((name, way, _gradients(encoded, loss)))
    return results


def _ways(world_size: int) -> list[Way]:
    return [
        Way(keys_from, impl, world_size, split)
        for keys_from in ("gather", "ring")
        for impl in IMPLS
        for split in SPLITS
        if world_size > 1 or split == "even"
    ]


def _split(split: str, world_size: int) -> list[int]:
    """Rows of every rank."""
    if split == "even":
        return [len(part) for part in torch.arange(_ROWS).tensor_split(world_size)]
    if split == "all on the last rank":
        return [0] * (world_size - 1) + [_ROWS]
    busy = world_size - (split == "one empty rank")
    sizes = [2] * (busy - 1)
    sizes.insert(busy // 2, _ROWS - sum(sizes))
    return sizes if busy == world_size else [sizes[0], 0, *sizes[1:]]


def _gradients(encoded: Encoded, loss: Tensor) -> Gradients:
    loss.backward()
    named = {"encoder": list(encoded.encoder.parameters())}
    named |= {name.split(".")[-1]: [p] for name, p in encoded.loss.named_parameters()}
    parameters = {
        name: torch.cat([p.grad.flatten() for p in found if p.grad is not None])
        for name, found in named.items()
    }
    rows = [x.grad for x in encoded.embeddings if x.grad is not None]
    return Gradients(loss.detach(), parameters, rows)


def _compare(
    name: str, case: Case, way: Way, rank: int, found: Gradients, right: Gradients
) -> Finding:
    pairs = {key: (found.parameters[key], x) for key, x in right.parameters.items()}
    ratios = {key: (x.norm() / y.norm()).item() for key, (x, y) in pairs.items()}
    differences = {key: ((x - y).norm() / y.norm()).item() for key, (x, y) in pairs.items()}
    cosines = {
        key: nn.functional.cosine_similarity(x, y, dim=0).item() for key, (x, y) in pairs.items()
    }
    # A rank's rows have W times their gradient, of which the reducer takes the mean.
    rows = zip(found.rows, case.share(right.rows, way, rank), strict=True)
    errors = [(x / way.world_size - y).norm() for x, y in rows]
    norms = [x.norm() for x in right.rows]
    differences["rows"] = (torch.stack(errors).norm() / torch.stack(norms).norm()).item()
    value = {"value": (found.value / right.value).item()}
    return Finding(name, way, {**value, **ratios}, cosines, differences)


def _off(ratio: float) -> float:
    return abs(ratio - 1) if math.isfinite(ratio) else math.inf


def table(findings: Sequence[Finding]) -> str:
    """Markdown: of every loss and path the worst ratios (right: 1), cosine (1) and difference (0)
    over all world sizes and splits."""
    columns = ["value", "encoder", "cosine", "scale", "bias", "difference"]
    lines = ["| " + " | ".join(["loss", "keys", "tiles", *columns]) + " |", "| --- " * 9 + "|"]
    paths = dict.fromkeys((f.loss, f.way.keys_from, f.way.impl) for f in findings)
    for path in paths:
        these = [f for f in findings if (f.loss, f.way.keys_from, f.way.impl) == path]
        ratios = {key: max((f.ratios[key] for f in these), key=_off) for key in these[0].ratios}
        cosine = max((x for f in these for x in f.cosines.values()), key=_off)
        learned = ratios.get("log_scale"), ratios.get("bias")
        numbers = ratios["value"], ratios["encoder"], cosine, *learned
        cells = ["" if x is None else f"{x:.10f}" for x in numbers]
        difference = max(x for f in these for x in f.differences.values())
        lines.append("| " + " | ".join([*path, *cells, f"{difference:.0e}"]) + " |")
    return "\n".join(lines)


_CLASSES = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1, 4, 0, 2])
_TWO_CLASSES = (_CLASSES, _CLASSES.flip(0))
_SOME_MISSING = torch.tensor([0, -1, 1, 0, -1, 1, 2, -1, 1, 2, 0, 2])
_CONTINUOUS = torch.tensor([0.1, 0.9, 0.3, 0.15, torch.nan, 0.5, 0.55, 0.95, 0.35, 0.0, 0.7, 0.6])
_BANK = torch.randn(7, _DIM, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
_LEARNABLE = {"learnable": True}
_WEIGHTS = torch.linspace(0, 2, _ROWS, dtype=torch.float64)


def _triplet(mining: str, distance: str, **settings: Any) -> dict[str, Any]:
    return {"mining": mining, "distance": distance, "margin": 0.5, **settings}


def _force(preset: str, **settings: Any) -> dict[str, Any]:
    return {"preset": preset, "temperatures": (0.05, 0.2, 1.0), **settings}


CASES: dict[str, Case] = {
    "InfoNCE": Case(losses.InfoNCE, _LEARNABLE, 2),
    "InfoNCE, symmetric": Case(losses.InfoNCE, {"symmetric": True, **_LEARNABLE}, 2),
    "InfoNCE, symmetric, hard negatives": Case(
        losses.InfoNCE, {"symmetric": True, **_LEARNABLE}, 3, opposite=(2,)
    ),
    "InfoNCE, symmetric, bank": Case(
        losses.InfoNCE, {"symmetric": True, **_LEARNABLE}, 2, shared={"bank": _BANK}
    ),
    "InfoNCE, ids, margin": Case(
        losses.InfoNCE,
        {"false_negative_margin": 0.1, **_LEARNABLE},
        2,
        labels=(_SOME_MISSING,),
        named=("ids",),
    ),
    "InfoNCE, symmetric, hard negatives, ids, ratio": Case(
        losses.InfoNCE,
        {"symmetric": True, "false_negative_ratio": 0.9, **_LEARNABLE},
        3,
        labels=(_SOME_MISSING, _CLASSES),
        opposite=(2, 4),
        named=("ids", "negative_ids"),
    ),
    "NTXent": Case(losses.NTXent, _LEARNABLE, 2),
    "DCL": Case(losses.DCL, _LEARNABLE, 2),
    "SelfDiagonal": Case(losses.SelfDiagonal, _LEARNABLE),
    "SigLIP": Case(losses.SigLIP, {"scale": 3.0, "bias": -1.0}, 2),
    "SigLIP, ids": Case(
        losses.SigLIP, {"scale": 3.0, "bias": -1.0}, 2, labels=(_SOME_MISSING,), named=("ids",)
    ),
    "SupCon, labels": Case(losses.SupCon, _LEARNABLE, labels=(_CLASSES,)),
    "SupCon, views, labels missing": Case(
        losses.SupCon, _LEARNABLE, views=True, labels=(_SOME_MISSING,)
    ),
    "SupCon, continuous labels": Case(
        losses.SupCon, {"max_delta": 0.1, **_LEARNABLE}, labels=(_CONTINUOUS,)
    ),
    "Triplet, all, euclidean": Case(
        losses.Triplet, _triplet("all", "euclidean"), labels=(_CLASSES,)
    ),
    "Triplet, all, cosine, views": Case(
        losses.Triplet, _triplet("all", "cosine"), views=True, labels=(_SOME_MISSING,)
    ),
    "Triplet, hard, euclidean": Case(
        losses.Triplet, _triplet("hard", "euclidean"), labels=(_CLASSES,)
    ),
    "Triplet, hard, cosine, continuous": Case(
        losses.Triplet, _triplet("hard", "cosine", max_delta=0.1), labels=(_CONTINUOUS,)
    ),
    "Triplet, semihard, squared_euclidean": Case(
        losses.Triplet, _triplet("semihard", "squared_euclidean"), labels=(_CLASSES,)
    ),
    "CosineEmbedding, labels": Case(losses.CosineEmbedding, {"margin": 0.1}, labels=(_CLASSES,)),
    "CosineEmbedding, views": Case(losses.CosineEmbedding, {"margin": 0.1}, views=True),
    "VICReg": Case(losses.VICReg, {}, 2),
    "BarlowTwins": Case(losses.BarlowTwins, {}, 2),
    "KoLeo": Case(losses.KoLeo),
    "ContrastiveForce, seed": Case(losses.ContrastiveForce, _force("seed"), 2, opposite=(1,)),
    "ContrastiveForce, drift": Case(losses.ContrastiveForce, _force("drift"), 2, opposite=(1,)),
    "ContrastiveForce, drift, labels": Case(
        losses.ContrastiveForce, _force("drift"), 2, labels=_TWO_CLASSES, opposite=(1, 3)
    ),
    "ContrastiveForce, paper, fixed, weights": Case(
        losses.ContrastiveForce,
        _force("paper", affinity_floor=1e-3, normalise_total=True),
        3,
        labels=(_WEIGHTS, _WEIGHTS.flip(0)),
        opposite=(1, 4),
        named=("fixed", "negative_weights", "positive_weights"),
    ),
    "ContrastiveForce, seed, labels, fixed, weights, scopes": Case(
        losses.ContrastiveForce,
        _force("seed", scale_scope="global", norm_scope="label"),
        3,
        labels=(*_TWO_CLASSES, _CLASSES.roll(3), _WEIGHTS),
        opposite=(1, 4),
        named=("fixed", "negative_labels", "positive_labels", "fixed_labels", "fixed_weights"),
    ),
}
"""The losses with the settings that change what is exchanged between ranks."""
