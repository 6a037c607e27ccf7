"""Tiles of the Triton kernels, by kernel, size of an operand and generation of the card."""

from dataclasses import dataclass

_PROGRAMS = 264  # that keys are split among, where rows are few: two for each SM of a large card


@dataclass(frozen=True)
class TileShape:
    """Rows, keys and dimensions of a step of the product; warps; steps that are loaded ahead; parts
    of the keys that follow it one by one."""

    rows: int
    keys: int
    dims: int
    warps: int
    stages: int
    parts: int = 1

    def row_grid(self, num_rows: int, num_keys: int) -> tuple[int, int]:
        """Grid of a program for each block of rows and part of the keys, which is all of them
        unless rows are few."""
        blocks = -(-num_rows // self.rows)
        return blocks, max(1, min(-(-num_keys // self.keys), _PROGRAMS // blocks))


# By kernel and bytes of an operand: as large as spills no register. A table, since what timing
# chooses would differ between ranks, and with it their last digits.
TILES = {
    ("lse", 2): TileShape(128, 128, 64, 4, 3),
    ("lse_positives", 2): TileShape(128, 64, 64, 4, 3),
    ("lse_gradient", 2): TileShape(128, 128, 64, 4, 3, 4),
    ("lse_gradient_each", 2): TileShape(128, 128, 64, 4, 3, 4),
    ("lse_limited", 2): TileShape(64, 128, 64, 4, 3),
    ("lse_gradient_limited", 2): TileShape(128, 64, 64, 4, 3, 2),
    ("lse_gradient_each_limited", 2): TileShape(128, 64, 64, 4, 3, 2),
    ("lse_continuous", 2): TileShape(128, 64, 64, 4, 3),
    ("lse_gradient_continuous", 2): TileShape(128, 64, 64, 4, 3, 2),
    ("pair", 2): TileShape(128, 64, 64, 4, 3, 2),
    ("pair_continuous", 2): TileShape(128, 64, 64, 4, 3, 2),
    ("extreme", 2): TileShape(128, 64, 64, 8, 3, 2),
    ("extreme_continuous", 2): TileShape(128, 64, 64, 8, 3, 2),
    ("panel", 2): TileShape(128, 64, 64, 8, 3, 2),
    ("lse", 4): TileShape(128, 128, 32, 8, 3),
    ("lse_positives", 4): TileShape(128, 128, 32, 8, 3),
    ("lse_gradient", 4): TileShape(128, 64, 32, 8, 3),
    ("lse_gradient_each", 4): TileShape(128, 64, 32, 8, 3),
    ("lse_limited", 4): TileShape(128, 64, 32, 8, 3),
    ("lse_gradient_limited", 4): TileShape(128, 64, 32, 8, 3),
    ("lse_gradient_each_limited", 4): TileShape(128, 64, 32, 8, 3),
    ("lse_continuous", 4): TileShape(128, 64, 32, 8, 3),
    ("lse_gradient_continuous", 4): TileShape(128, 64, 32, 8, 3),
    ("pair", 4): TileShape(128, 64, 32, 8, 3, 2),
    ("pair_continuous", 4): TileShape(128, 64, 32, 8, 3, 2),
    ("add_product", 4): TileShape(128, 64, 32, 8, 3),
    ("extreme", 4): TileShape(128, 64, 32, 8, 3, 2),
    ("extreme_continuous", 4): TileShape(128, 64, 32, 8, 3, 2),
    ("panel", 4): TileShape(128, 64, 32, 8, 3, 2),
}
HOPPER = 9
OTHER_TILES = {  # those of other generations that differ, by the first digit of the capability
    **{(8, name, 2): TileShape(128, 128, 32, 8, 3) for name, size in TILES if size == 2},
    **{(8, name, 4): TileShape(128, 64, 32, 8, 3) for name, size in TILES if size == 4},
    (8, "lse", 4): TileShape(128, 64, 16, 8, 3),
    (8, "pair", 2): TileShape(128, 128, 32, 8, 3, 2),
    (8, "pair", 4): TileShape(64, 64, 32, 8, 3, 2),
    (8, "extreme", 2): TileShape(128, 64, 32, 8, 3, 2),
    (8, "extreme", 4): TileShape(64, 64, 32, 8, 3, 2),
    **{(10, name, 2): TileShape(128, 128, 64, 8, 3) for name, size in TILES if size == 2},
    (10, "lse_gradient", 2): TileShape(128, 128, 64, 4, 3, 4),
    (10, "lse_gradient_each", 2): TileShape(128, 64, 64, 8, 3),
    (8, "lse_limited", 4): TileShape(64, 64, 32, 8, 3),
    **{(10, name, 2): TileShape(128, 64, 64, 8, 3) for name, size in TILES if "_limited" in name},
    (10, "lse_gradient_limited", 2): TileShape(128, 64, 64, 8, 3, 2),
    (10, "lse_gradient_each_limited", 2): TileShape(64, 64, 64, 8, 3),
    (8, "lse_continuous", 2): TileShape(128, 64, 32, 8, 3),
    (8, "pair_continuous", 4): TileShape(64, 64, 32, 8, 3),
    (8, "extreme_continuous", 2): TileShape(64, 64, 32, 8, 3, 2),
    (8, "extreme_continuous", 4): TileShape(64, 64, 32, 8, 3, 2),
    **{(10, name, 2): TileShape(128, 64, 64, 8, 3) for name, size in TILES if "_cont" in name},
    (10, "lse_continuous", 2): TileShape(64, 64, 64, 8, 3),
    (10, "pair_continuous", 4): TileShape(64, 64, 32, 8, 3),
    (10, "extreme_continuous", 2): TileShape(128, 64, 64, 8, 3, 2),
    (10, "extreme_continuous", 4): TileShape(64, 64, 32, 8, 3, 2),
    (10, "pair", 2): TileShape(128, 64, 64, 8, 3),
    (10, "lse_positives", 4): TileShape(128, 64, 32, 8, 3),
    (10, "add_product", 4): TileShape(128, 128, 32, 8, 3),
    (10, "extreme", 2): TileShape(128, 64, 64, 8, 3, 2),
}


def tile_of(
    name: str,
    operand_bytes: int,
    generation: int,
    limited: bool = False,
    continuous: bool = False,
) -> TileShape:
    """The tile of a kernel on a card; of unknown ones as on the oldest, which need least.

    Args:
        limited: scores have limits; then steps of a product are those of all kernels, so that its
            last digit is, too. continuous: labels are.
    """
    if continuous:
        fewer = {"lse_positives": "lse", "lse_gradient_each": "lse_gradient"}
        name = f"{fewer.get(name, name)}_continuous"
    elif limited and "lse" in name:
        name += "_limited"
    generation = generation if generation in (HOPPER, 10) else 8
    other = OTHER_TILES.get((generation, name, operand_bytes))
    return other or TILES[name, operand_bytes]
