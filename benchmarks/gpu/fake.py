"""Steps of losses at full size without a card: tensors without data, ranks that are not there.

    python benchmarks/gpu/fake.py [--rows 65536] [--dim 768] [--ranks 1] [--keys-from gather]

What is counted: kernels and operators that would be started, bytes that are alive at most and that
operators read and write, bytes that this rank would send. Kernels are recorded in the place where
they would be started; a number that the host reads is an error.
"""

import argparse
import collections
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import counts
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from dist_contrastive import losses
from dist_contrastive.losses import PairLoss
from dist_contrastive.pairwise import fused as pair_kernels
from dist_contrastive.pairwise import kernel_calls

OF_ROWS = ("cosine", "unit_gradient")  # kernels that read and write rows alone
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

LOSSES: dict[str, tuple[type[PairLoss], dict[str, Any]]] = {
    "infonce": (losses.InfoNCE, {"learnable": True}),
    "infonce, symmetric": (losses.InfoNCE, {"learnable": True, "symmetric": True}),
    "ntxent": (losses.NTXent, {"learnable": True}),
    "dcl": (losses.DCL, {"learnable": True}),
    "siglip": (losses.SigLIP, {}),
    "self_diagonal": (losses.SelfDiagonal, {"learnable": True}),
    "supcon": (losses.SupCon, {"learnable": True}),
    "cosine_embedding": (losses.CosineEmbedding, {}),
    "koleo": (losses.KoLeo, {}),
    "triplet, all": (losses.Triplet, {}),
    "triplet, hard": (losses.Triplet, {"mining": "hard"}),
    "triplet, semihard": (losses.Triplet, {"mining": "semihard"}),
}
"""Pair losses by the names that the planner has for them, with all that can be learned."""


class Traffic(counts.Counts):
    """`Counts`, and bytes.

    Attributes:
        moved: bytes that operators read and write, without products and kernels.
        sent: bytes that this rank sends, by collective, where rings of ranks carry them out.
        kernels: names of the kernels that would be started.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
        self.sent: collections.Counter[str] = collections.Counter()
        self.kernels: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            self.sent[name] += sent_bytes(name, args)
            return func(*args, **(kwargs or {}))
        before = self.launches
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.launches > before:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.moved += sum(x.numel() * x.element_size() for x in tensors)
        return out


def sent_bytes(name: str, args: tuple[Any, ...]) -> int:
    """Bytes that a rank sends for a collective with these arguments."""
    ranks = dist.get_world_size()
    if name == "send":
        return num_bytes(args[0])
    if name == "allreduce_":  # as a reduce-scatter and an all-gather
        return 2 * (ranks - 1) * num_bytes(args[0]) // ranks
    if name == "_allgather_base_":
        return (ranks - 1) * num_bytes(args[1])
    if name == "_reduce_scatter_base_":
        return (ranks - 1) * num_bytes(args[1]) // ranks
    return 0


def num_bytes(tensors: Any) -> int:
    """Bytes of tensors as they are, however large their storage is."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(tensors) if isinstance(x, Tensor))


@contextmanager
def replaced(module: Any, **functions: Any) -> Iterator[None]:
    """Other functions in the place of a module's."""
    before = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


@contextmanager
def without_card(found: Traffic) -> Iterator[None]:
    """Kernels and products are named, instead of being run on a card."""

    def start(name: str, grid: Any, tensors: Sequence[Tensor], *_: Any) -> None:
        found.kernels.append(name)
        if name in OF_ROWS:
            found.moved += num_bytes(tensors)

    def product(total: Tensor, a: Tensor, b: Tensor) -> None:  # as on CUDA, in one kernel
        found.kernels.append("product")

    with (
        replaced(pair_kernels, add_product=product),
        replaced(kernel_calls, start=start, _no_place=lambda device: None),
    ):
        yield


@contextmanager
def fake_ranks(number: int) -> Iterator[None]:
    """This process is the first of so many ranks, which answer nothing."""
    if number == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def counted(
    name: str,
    rows: int,
    dim: int,
    dtype: str = "bf16",
    ranks: int = 1,
    keys_from: str = "gather",
    max_delta: float | None = None,
) -> Traffic:
    """Forward and backward of a loss of `LOSSES`.

    Args:
        rows: samples of each rank; NT-Xent and DCL have two rows of each. max_delta: of labelled
            losses, whose labels are continuous then.
    """
    kind, settings = LOSSES[name]
    if kind.takes == "labels":
        settings = settings | {"max_delta": max_delta}
    found = Traffic()
    with (
        fake_ranks(ranks),
        without_card(found),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        loss = kind(**settings, impl="triton", keys_from=keys_from)  # type: ignore[arg-type]
        inputs = [torch.empty(rows, dim, dtype=DTYPES[dtype]) for _ in range(num_inputs(kind))]
        inputs = [x.requires_grad_() for x in inputs]
        if kind.takes == "labels":
            of_labels = torch.int64 if max_delta is None else torch.float64
            inputs.append(torch.empty(rows, dtype=of_labels))
        with found:
            loss(*inputs, sizes=(rows,) * ranks).backward()
    return found


def force_counted(
    points: int, dim: int, ranks: int = 1, keys_from: str = "gather", cache_mb: float = 0.0
) -> Traffic:
    """Forward and backward of the force, preset `drift`.

    Args:
        points: generated ones of each rank, to which as many of data come.
    """
    from dist_contrastive.losses.force import fused, panels, segments, softmaxes

    found = Traffic()

    def launch(name: str, *_: Any, **__: Any) -> None:
        found.kernels.append(name)

    with ExitStack() as stack:
        stack.enter_context(fake_ranks(ranks))
        for module in (fused, panels, segments, softmaxes):
            stack.enter_context(replaced(module, launch=launch))
        stack.enter_context(replaced(kernel_calls, _no_place=lambda device: None))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        how: dict[str, Any] = {"impl": "triton", "keys_from": keys_from, "cache_mb": cache_mb}
        loss = losses.ContrastiveForce(preset="drift", **how)
        negative, positive = (torch.empty(points, dim) for _ in range(2))
        with found:
            counts_of_ranks = [(points, 0, points)] * ranks
            loss(negative.requires_grad_(), positive, counts=counts_of_ranks).backward()
    return found


def num_inputs(kind: type[PairLoss]) -> int:
    """Tensors of embeddings that a loss takes."""
    return 2 if kind.takes == "views" else 1


def main() -> None:
    """Print a line for each loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=65536, help="samples of each rank")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--keys-from", default="gather", choices=["gather", "ring"])
    parser.add_argument("--dtype", default="bf16", choices=[*DTYPES])
    parser.add_argument("--max-delta", type=float, help="labels are continuous; leave out: classes")
    args = parser.parse_args()
    print(f"{'loss':20} {'waits':>6} {'launches':>9} {'peak MiB':>9} {'moved GiB':>10} sent MiB")
    for name in LOSSES:
        sizes = args.rows, args.dim, args.dtype, args.ranks, args.keys_from, args.max_delta
        found = counted(name, *sizes)
        launches, waits = found.launches + len(found.kernels), found.waits.total()
        sent = " ".join(f"{key} {size / 2**20:.0f}" for key, size in found.sent.items())
        print(f"{name:20} {waits:6} {launches:9} {found.peak / 2**20:9.0f}", end=" ")
        print(f"{found.moved / 2**30:10.1f} {sent}", flush=True)


if __name__ == "__main__":
    main()
