"""Activation checkpointing: blocks of networks keep their inputs alone, and are computed again."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_contrastive.errors import ConfigError


def recompute_blocks(module: nn.Module) -> None:
    """Let the trained blocks of a module keep their inputs alone for the backward pass.

    A block is what stands in a `ModuleList` or `Sequential` and has parts of its own, as a layer of
    a transformer; blocks in blocks are left as they are. Gradients are the same, with dropout too.

    Raises:
        ConfigError: there is no block.

    References:
        Chen et al. 2016, arXiv 1604.06174.
    """
    inside: set[nn.Module] = set()
    for parent in module.modules():
        if parent in inside or not isinstance(parent, nn.ModuleList | nn.Sequential):
            continue
        for block in parent.children():
            trained = any(p.requires_grad for p in block.parameters())
            if trained and any(True for _ in block.children()):
                inside |= set(block.modules())
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if not inside:
        raise ConfigError(
            "backend.activation_checkpointing=true, but these networks have no blocks to compute "
            "again; leave it out, or set train.micro_batch_size"
        )
