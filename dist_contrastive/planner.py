"""Plan of a loss: time, memory and bytes on the wire of one step of one rank, by formula.

    n rows of this rank, N keys of all ranks, D dimensions

- kernels: n N scores, each 2 D operations of the tensor cores and what follows them, forward and
  for gradients (at once, of sums over pairs), then two matrix products of 2 n N D operations each
- memory: so many bytes for each number of rows and keys, and a buffer of gradients of scores
- wire: what the collectives of `pairwise` are given, see `wire`

Nothing is run. Constants stand in planner_constants.py.
"""

import math
import operator
from dataclasses import dataclass
from typing import Literal

from dist_contrastive.errors import ConfigError
from dist_contrastive.planner_constants import (
    ASSUMED,
    CARDS,
    COSTS,
    FORCE_CYCLES,
    FORCE_LAUNCHES,
    FORCE_NUMBERS,
    FORCE_PANEL,
    FORCE_ROUNDS,
    FORCE_TEMPERATURES,
    FP32_PRODUCTS,
    KERNELS,
    SPECS,
    Assumed,
    Card,
    Spec,
)

Dtype = Literal["bf16", "fp16", "fp32"]
KeysFrom = Literal["gather", "ring"]

MOST_ROWS, MOST_DIM, MOST_RANKS = 2**31, 2**16, 2**20
LOSSES = (*(name for name in SPECS if "," not in name), "force")


@dataclass(frozen=True)
class Asked:
    """What is to be planned: one step of a loss over the global batch.

    Attributes:
        global_batch: samples of all ranks, as many on each; of the force generated points, to which
            as many of data come.
        dim: dimensions of an embedding, or of a point.
        dtype: of the embeddings; the force computes in fp32.
    """

    loss: str
    global_batch: int
    dim: int
    ranks: int = 1
    dtype: Dtype = "bf16"
    keys_from: KeysFrom = "gather"
    card: str = "h100"
    symmetric: bool = False

    def check(self) -> None:
        """Refuse what cannot be. Raises: ConfigError."""
        if self.loss not in LOSSES:
            raise ConfigError(f"loss {self.loss!r} is not planned; give {', '.join(LOSSES)}")
        if self.card not in CARDS:
            raise ConfigError(f"card {self.card!r} is not known; give {', '.join(CARDS)}")
        if self.symmetric and self.loss != "infonce":
            raise ConfigError(f"symmetric is of infonce, not of {self.loss}; leave it out")
        for name, value, least, most in (
            ("global batch", self.global_batch, 2, MOST_ROWS),
            ("dim", self.dim, 1, MOST_DIM),
            ("ranks", self.ranks, 1, MOST_RANKS),
        ):
            if not least <= value <= most:
                raise ConfigError(f"{name} {value} is not {least} to {most:,}; give one of these")
        if self.global_batch % self.ranks:
            below = self.global_batch // self.ranks * self.ranks
            near = f"{below or self.ranks} or {below + self.ranks}" if below else f"{self.ranks}"
            raise ConfigError(
                f"global batch {self.global_batch} is not divisible by {self.ranks} ranks; give "
                f"{near}"
            )
        if self.keys_from == "ring" and self.ranks == 1:
            raise ConfigError("a ring of 1 rank exchanges nothing; give gather, or more ranks")

    @property
    def name(self) -> str:
        """The loss by its name in the tables."""
        return f"{self.loss}, symmetric" if self.symmetric else self.loss


@dataclass(frozen=True)
class Plan:
    """Time in seconds, memory and what a rank sends in bytes, each by its parts."""

    asked: Asked
    rows: int  # of this rank
    keys: int  # of all ranks
    seconds: dict[str, float]
    memory: dict[str, int]
    sent: dict[str, int]
    launches: int
    source: str  # of the card's constants

    @property
    def total_s(self) -> float:
        """Of a step: what the card computes, or the host starts, whichever takes longer. Of a ring
        keys travel meanwhile, a gather comes before."""
        on_card = sum(s for part, s in self.seconds.items() if part not in ("launches", "wire"))
        busy, wire = max(on_card, self.seconds["launches"]), self.seconds["wire"]
        return max(busy, wire) if self.asked.keys_from == "ring" else busy + wire

    @property
    def total_memory(self) -> int:
        """Of the card, at the peak, without networks and optimizer."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a card has so much memory."""
        return self.total_memory <= CARDS[self.asked.card].memory


def plan(asked: Asked) -> Plan:
    """Plan of a step. Raises: ConfigError."""
    asked.check()
    return _force(asked) if asked.loss == "force" else _pairs(asked)


# ------------------------------------------------------------------ pair losses


def _pairs(asked: Asked) -> Plan:
    spec, cost = SPECS[asked.name], COSTS[asked.name, _kind(asked), asked.keys_from]
    rows = spec.rows * asked.global_batch // asked.ranks
    keys, size, dim = rows * asked.ranks, 4 if asked.dtype == "fp32" else 2, asked.dim
    block = keys if asked.keys_from == "gather" else rows  # keys that are there at a time
    num_blocks = keys // block
    chunks = num_blocks * math.prod(chunks_of_gradients(rows, block, size))
    of_step, of_block, of_chunk = cost.launches
    launches = of_step + num_blocks * of_block + chunks * of_chunk
    given = spec.inputs * rows // spec.rows * dim * size
    sent = wire(spec, rows, dim, asked.ranks, asked.keys_from, size)
    card, assumed = _rates(asked.card)
    moved = cost.moved.bytes(rows, keys, dim) + num_blocks * added_bytes(rows, block, dim, size)
    moved += 3 * rows * keys * size  # gradients of scores: written once, read twice
    seconds = {
        **_kernel_seconds(asked, rows * keys, card, assumed),
        "rows": moved / (card.bandwidth * assumed.bandwidth),
        "wire": _wire_seconds(asked, sum(sent.values())),
        "launches": launches * assumed.launch_s,
    }
    memory = {
        "inputs and their gradients": 2 * given,
        "rows and keys": cost.memory.bytes(rows, block, dim),
        "gathered keys": gathered_bytes(rows, dim, asked.ranks, asked.keys_from, size),
        "gradients of scores": buffer_bytes(rows, block, size),
    }
    return Plan(asked, rows, keys, seconds, memory, sent, launches, card.source)


def _kind(asked: Asked) -> str:
    return "fp32" if asked.dtype == "fp32" else "half"


def _rates(name: str) -> tuple[Card, Assumed]:
    card = CARDS[name]
    return card, ASSUMED if card.source == "data sheet" else ASSUMED._replace(
        products=1.0, bandwidth=1.0
    )


def _kernel_seconds(asked: Asked, scores: int, card: Card, assumed: Assumed) -> dict[str, float]:
    """Scores and their gradients by kernels, and the two products of these."""
    is_fp32 = asked.dtype == "fp32"
    passes = 6 if is_fp32 else 1  # three in TF32, which has half the rate
    product = 1024 * 2 * asked.dim * passes / card.half
    sm_s = card.sms * card.clock * assumed.products
    times = [
        product + x.cycles if x.blocks < 2 else max(product, x.cycles)
        for x in KERNELS[asked.name, _kind(asked)]
    ]
    by_kernels = scores / 1024 * sum(times) / sm_s
    turns = FP32_PRODUCTS * passes if is_fp32 else passes
    products = 4 * scores * asked.dim * turns / (card.half * sm_s)
    return {"scores and their gradients": by_kernels, "products": products}


_ROWS, _GRADIENTS, _BLOCK = {2: 4096, 4: 8192}, 2**28, 256  # as pairwise/fused.py has them


def tile_of_gradients(rows: int, keys: int, size: int) -> tuple[int, int]:
    """Rows and keys whose gradients of scores, of so many bytes each, are kept at a time."""
    num_rows = min(rows, _ROWS[size])
    return num_rows, min(keys, max(1, _GRADIENTS // (num_rows * _BLOCK)) * _BLOCK)


def chunks_of_gradients(rows: int, keys: int, size: int) -> tuple[int, int]:
    """Into how many parts rows and keys fall."""
    of_rows, of_keys = tile_of_gradients(rows, keys, size)
    return -(-rows // of_rows), -(-keys // of_keys)


def added_bytes(rows: int, keys: int, dim: int, size: int) -> int:
    """Bytes that are read and written where gradients of rows and keys are added up in fp32."""
    of_rows, of_keys = chunks_of_gradients(rows, keys, size)
    return 8 * dim * (of_rows * keys + of_keys * rows)


def buffer_bytes(rows: int, keys: int, size: int) -> int:
    """Bytes of the gradients of scores that are kept at a time, whose lines are filled up."""
    of_rows, of_keys = tile_of_gradients(rows, keys, size)
    return of_rows * (-(-of_keys // 16) * 16) * size


def gathered_bytes(rows: int, dim: int, ranks: int, keys_from: KeysFrom, size: int) -> int:
    """Bytes of the keys of all ranks, which one rank alone has already."""
    return rows * ranks * dim * size if ranks > 1 and keys_from == "gather" else 0


def wire(
    spec: Spec, rows: int, dim: int, ranks: int, keys_from: KeysFrom, size: int
) -> dict[str, int]:
    """Bytes that a rank sends in a step, forward and backward, where all-gathers, reduce-scatters
    and all-reduces are rings.

    Args:
        rows: of each rank. size: bytes of a number of the embeddings.
    """
    others = ranks - 1
    of_keys = rows * (dim * size + 8 * spec.has_tags + 4)  # and a factor of each
    sums = 2 * others * (16 + 8 * spec.counts) // ranks
    gradients = rows * dim * 4
    if keys_from == "gather":
        forward = others * of_keys + spec.both * 4 * others * rows * 8
        backward = others * gradients + spec.both * others * rows * 12
    elif ranks == 1:
        forward = backward = 0
    else:
        forward = others * of_keys + spec.both * ranks * rows * 8
        rounds = 0 if spec.one_round else others
        backward = rounds * (of_keys + spec.both * rows * 12) + ranks * gradients
    return {"forward": forward + sums, "backward": backward}


def _wire_seconds(asked: Asked, sent: int) -> float:
    card, assumed = _rates(asked.card)
    rate = card.link if asked.ranks <= assumed.machine else card.network
    return sent / (rate * assumed.wire)


# ------------------------------------------------------------------ the force


def _force(asked: Asked) -> Plan:
    """Preset `drift`: as many points of data as generated ones. Distances and weighted sums in fp32
    by three products in TF32, distances kept where memory allows; one exponential a temperature."""
    card, assumed = _rates(asked.card)
    generated, dim, ranks = asked.global_batch // asked.ranks, asked.dim, asked.ranks
    rows, keys = 2 * generated, 2 * asked.global_batch
    is_ring = asked.keys_from == "ring"
    block = rows if is_ring else keys
    kept = 0 if is_ring else 4 * rows * keys
    kept = kept if kept <= assumed.kept * card.memory else 0
    rounds = 1 if kept else FORCE_ROUNDS
    at_a_time = min(rows, max(1, FORCE_PANEL // (4 * block * 128)) * 128)
    sm_s, scores = card.sms * card.clock, rows * keys / 1024
    product = 1024 * 12 * dim / (card.half * assumed.products)
    of_all, of_generated = FORCE_CYCLES.passes, FORCE_CYCLES.weights / 2
    sent, panels = _force_wire(asked, rows), [-(-x // at_a_time) for x in (rows, generated)]
    of_panels = FORCE_LAUNCHES.kept_panels if kept else FORCE_LAUNCHES.panels
    launches = keys // block * sum(map(operator.mul, panels, of_panels))
    launches += _force_launches(ranks, is_ring)
    # A panel is written, read by three kernels, and of generated points by one, whose weights are
    # written and read. Pairs that are close or near, of which there are few, are left out.
    moved = 4 * rows * keys * (rounds + 3.5 + 1) + FORCE_NUMBERS.bytes(rows, keys, dim)
    seconds = {
        "distances": rounds * scores * (product + FORCE_CYCLES.distances) / sm_s,
        "weights": scores * (of_all + of_generated) / sm_s,
        "weighted sums": scores / 2 * product / sm_s,
        "panels": moved / (card.bandwidth * assumed.bandwidth),
        "wire": _wire_seconds(asked, sum(sent.values())),
        "launches": launches * assumed.launch_s,
    }
    memory = {
        "inputs and their gradients": 3 * generated * dim * 4,
        "points": rows * (20 * dim + 300),
        "keys of others": keys_of_others(rows, dim, ranks, is_ring),
        "distances": kept or 4 * at_a_time * block,
        "weights": 4 * min(at_a_time, generated) * block,
    }
    return Plan(asked, rows, keys, seconds, memory, sent, launches, card.source)


def _force_launches(ranks: int, is_ring: bool) -> int:
    """Beside those of panels."""
    has = FORCE_LAUNCHES
    if is_ring:
        return has.ring + ranks * has.block
    return has.step + (has.gather if ranks > 1 else 0)


def keys_of_others(rows: int, dim: int, ranks: int, is_ring: bool) -> int:
    """Bytes of keys as they came, sorted and transposed; of a ring those that are there, and
    come."""
    if ranks == 1:
        return 0
    return 14 * rows * dim if is_ring else (12 * ranks - 4) * rows * dim


def _force_wire(asked: Asked, rows: int) -> dict[str, int]:
    """Points in fp32 with kind and label; numbers of each temperature in two rounds; and some 256
    points, whose mean is the origin."""
    others = asked.ranks - 1
    rounds = FORCE_ROUNDS if asked.keys_from == "ring" else 1
    of_points = rounds * (asked.dim * 4 + 16)
    of_weights = 2 * 4 * (FORCE_TEMPERATURES + 1)
    center = others * -(-256 // asked.ranks) * asked.dim * 4
    return {"forward": others * rows * (of_points + of_weights) + center, "backward": 0}
