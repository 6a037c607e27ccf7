"""``dist-contrastive plan``, and its line in ``doctor``."""

import json
from dataclasses import asdict, replace
from typing import Annotated, Literal

import typer

from dist_contrastive import planner
from dist_contrastive.planner import LOSSES, Asked, Plan
from dist_contrastive.planner_constants import CARDS

EXAMPLES = (
    "dist-contrastive plan --loss siglip --global-batch 32768 --dim 768",
    "dist-contrastive plan --global-batch 1048576 --dim 768 --ranks 64 --keys-from ring",
    "dist-contrastive plan --loss force --global-batch 32768 --dim 1024 --card b200 --json",
)


def plan(
    global_batch: Annotated[
        int, typer.Option(metavar="N", help="Samples of all ranks; of the force generated points.")
    ],
    dim: Annotated[int, typer.Option(metavar="D", help="Dimensions of an embedding.")],
    loss: Annotated[
        str, typer.Option(metavar="NAME", help=f"One of {', '.join(LOSSES)}.")
    ] = "infonce",
    ranks: Annotated[int, typer.Option(metavar="W", help="Cards.")] = 1,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"], typer.Option(help="Of the embeddings.")
    ] = "bf16",
    keys_from: Annotated[
        Literal["gather", "ring"], typer.Option(help="How ranks get the keys of the others.")
    ] = "gather",
    card: Annotated[str, typer.Option(metavar="CARD", help=f"{', '.join(CARDS)}.")] = "h100",
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Of infonce: both directions, as CLIP has it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
) -> None:
    """Time, memory and bytes on the wire of a loss on a card, by formula."""
    asked = Asked(loss, global_batch, dim, ranks, dtype, keys_from, card, symmetric)
    found = planner.plan(asked)
    if as_json:
        more = {"total_s": found.total_s, "total_memory": found.total_memory, "fits": found.fits}
        print(json.dumps({**asdict(found), **more}))
        return
    from dist_contrastive.tables import print_table

    print(headline(found))
    print_table(["", "", ""], [*_rows(found)])
    if not found.fits:
        print(_remedy(found))


def headline(found: Plan) -> str:
    """What is planned."""
    asked = found.asked
    dtype = "fp32" if asked.loss == "force" else asked.dtype
    shape = f"{asked.global_batch:,} x {asked.dim} in {dtype}"
    ranks = f" over {asked.ranks:,} ranks by {asked.keys_from}" if asked.ranks > 1 else ""
    return f"{asked.name}, {shape}{ranks}, on {asked.card} ({found.source})"


def _rows(found: Plan) -> list[tuple[str, str, str]]:
    seconds = ", ".join(f"{part} {_time(s)}" for part, s in found.seconds.items())
    memory = ", ".join(f"{part} {_size(n)}" for part, n in found.memory.items() if n)
    sent = ", ".join(f"{part} {_size(n)}" for part, n in found.sent.items())
    return [
        ("a step", _time(found.total_s), seconds),
        ("memory", _size(found.total_memory), memory),
        ("a rank sends", _size(sum(found.sent.values())), sent),
    ]


def _remedy(found: Plan) -> str:
    """What would fit into the memory of the card."""
    asked, has = found.asked, _size(int(CARDS[found.asked.card].memory))
    for other in (
        replace(asked, keys_from="ring" if asked.ranks > 1 else "gather"),
        *(replace(asked, ranks=asked.ranks * 2**power, keys_from="ring") for power in range(1, 12)),
    ):
        if asked.global_batch % other.ranks == 0 and planner.plan(other).fits:
            return f"{asked.card} has {has}; {other.ranks} ranks by {other.keys_from} would do"
    return f"{asked.card} has {has}; take more ranks, or a smaller batch"


def line(found: Plan) -> str:
    """All in one line."""
    sent = sum(found.sent.values())
    wire = f", a rank sends {_size(sent)}" if sent else ""
    return f"{headline(found)}: {_time(found.total_s)}, {_size(found.total_memory)}{wire}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} us" if seconds else "0 s"


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
