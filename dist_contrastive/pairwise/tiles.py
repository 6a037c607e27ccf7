"""Statistics and gradients of a block in tiles of plain torch."""

from collections.abc import Iterator

from dist_contrastive.pairwise.pairs import Block, Pairs, Tile, chunks
from dist_contrastive.pairwise.reductions import Reduction, Statistics
from dist_contrastive.pairwise.way import Grads, Results


class Tiles:
    """A block in tiles of plain torch.

    Args:
        chunk_size: rows and keys of a tile; None chooses.
    """

    def __init__(self, chunk_size: int | None) -> None:
        self._chunk_size = chunk_size

    def add_statistics(
        self, reduction: Reduction, pairs: Pairs, block: Block, totals: Results
    ) -> None:
        """Those of one tile after the other."""
        for r, k, tile in self._tiles(pairs, block):
            parts = reduction.fast_parts(tile)
            for where, *of_kind in zip((r, k), reduction.joins, totals, parts, strict=True):
                for join, total, part in zip(*of_kind, strict=True):
                    total[where] = join.combine(total[where], part.double())

    def add_gradients(
        self,
        reduction: Reduction,
        pairs: Pairs,
        block: Block,
        statistics: Statistics,
        grads: Grads,
    ) -> None:
        """Scores again, their gradients, and two products."""
        for r, k, tile in self._tiles(pairs, block):
            grad_scores = reduction.grad_scores(tile, statistics.of(r, k))
            grads.rows[r].addmm_(grad_scores, block.keys[k])
            if grads.keys is not None:
                grads.keys[k].addmm_(grad_scores.T, pairs.rows[r])
            if grads.bias is not None:
                grads.bias.add_(grad_scores.sum())

    def _tiles(self, pairs: Pairs, block: Block) -> Iterator[tuple[slice, slice, Tile]]:
        """Tiles of a block, each with its slice of rows and of the block's keys."""
        for r in chunks(slice(0, len(pairs.rows)), self._chunk_size):
            for k in chunks(slice(0, len(block.keys)), self._chunk_size):
                yield r, k, pairs.tile(r, block.part(k))
