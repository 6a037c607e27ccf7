"""Gradient caching: a step over a batch that networks cannot hold, exact for any loss over it.

Embed the batch in parts without a graph, compare all embeddings, then embed each part again and
send the gradients of its embeddings through it. Memory is that of one part and of the embeddings;
time is that of one more forward pass (4/3 of a plain step's).

    Gao, Zhang, Han, Callan 2021, "Scaling deep contrastive learning batch size under memory limited
    setup", arXiv 2101.06983
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Embeddings = tuple[Tensor, ...]


class GradCache:
    """One step. Its gradient equals that of the naive

        ``compare(*(torch.cat(x) for x in zip(*map(embed, range(num_parts))))).backward()``

    Args:
        embed: embeddings of a part of the batch, ``[rows of the part, ...]`` each; called twice for
            each part, it must give the same both times (random numbers included), and may have no
            lasting effect.
        num_parts: 1 or more.
    """

    def __init__(self, embed: Callable[[int], Embeddings], num_parts: int) -> None:
        self._embed, self.num_parts = embed, num_parts
        self._grads: list[tuple[Tensor, ...]] = []  # of each part's embeddings
        self._direct: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            parts = [embed(part) for part in range(num_parts)]
        self._sizes = [len(part[0]) for part in parts]
        self.embeddings: Embeddings = tuple(
            torch.cat(x).requires_grad_() for x in zip(*parts, strict=True)
        )
        """Of the whole batch, to be compared; leaves of the graph."""

    def compared(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Take the gradients of the loss of `embeddings`, and let go of its graph.

        Args:
            parameters: those that the loss may hold itself, as a temperature; others are ignored.
        """
        count = len(self.embeddings)
        grads = torch.autograd.grad(loss, [*self.embeddings, *parameters], allow_unused=True)
        of_embeddings = [
            (torch.zeros_like(x) if grad is None else grad).split(self._sizes)
            for x, grad in zip(self.embeddings, grads[:count], strict=True)
        ]
        self._grads = list(zip(*of_embeddings, strict=True))
        self._direct = [
            (p, grad) for p, grad in zip(parameters, grads[count:], strict=True) if grad is not None
        ]

    def replay(self, part: int) -> Tensor:
        """A scalar whose gradient is the part's share of the gradient of the loss.

        The last part brings that of the loss's own parameters, so that an engine which reduces over
        ranks with the last backward reduces it too.
        """
        pairs = list(zip(self._embed(part), self._grads[part], strict=True))
        if part == self.num_parts - 1:
            pairs += self._direct
        return torch.stack([(x * grad).sum() for x, grad in pairs]).sum()
