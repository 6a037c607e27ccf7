"""Ids by which kernels know which pairs are similar."""

import torch
from torch import Tensor

from dist_contrastive.pairwise.pairs import Block, Pairs


def ids_of(pairs: Pairs, block: Block) -> tuple[Tensor, Tensor]:
    """Ids [b], [k] in int32 that are equal where tags are, of keys like no row any other, or -1; of
    continuous labels [b, 3], [k, 3] in fp64: tags and `max_delta`. Tags that are ids already stay.
    """
    row_tags, key_tags, own = pairs.tags_of_rows, block.tags, pairs.start - block.first
    assert key_tags is not None, "rows have tags, and keys none"
    if row_tags.dtype == key_tags.dtype == torch.int32:
        return row_tags, key_tags
    if key_tags.dim() > 1:
        return continuous_ids(row_tags, pairs.max_delta), continuous_ids(key_tags, pairs.max_delta)
    if pairs.row_tags is None and 0 <= own <= len(key_tags) - len(row_tags):
        # The rows' tags are those of their own keys.
        ids = torch.searchsorted(key_tags.sort().values, key_tags, out_int32=True)
        return ids[own : own + len(row_tags)], ids
    known = row_tags.sort().values
    row_ids, key_ids = (torch.searchsorted(known, x, out_int32=True) for x in (row_tags, key_tags))
    if not len(known):
        return row_ids, key_ids
    found = known[key_ids.clamp(max=len(known) - 1)]
    return row_ids, torch.where(found == key_tags, key_ids, -1)


def continuous_ids(tags: Tensor, max_delta: float) -> Tensor:
    """Tags of two columns, or these ids themselves [n, 3], as kernels compare them: fp64 [n, 3],
    with `max_delta`."""
    return torch.nn.functional.pad(tags[:, :2].double(), (0, 1), value=max_delta)
