"""Gradient caching: a step over a batch that networks cannot hold, exact for any loss over it.

Embed the batch in parts without a graph, compare all embeddings, then embed each part again and
send the gradients of its embeddings through it. Memory is that of one part and of the embeddings;
time is that of one more forward pass (4/3 of a plain step's).

    Gao, Zhang, Han, Callan 2021, "Scaling deep contrastive learning batch size under memory limited
    setup", arXiv 2101.06983
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dist_contrastive.collectives import check_numbers, read_deferred
from dist_contrastive.collectives.conversions import as_embeddings
from dist_contrastive.errors import ConfigError
from dist_contrastive.random_states import replayed

Embeddings = tuple[Tensor, ...]
_LIMIT = 1e-2  # relative difference of embeddings: rounding is far below, other dropout above


class GradCache:
    """One step. Its gradient equals that of the naive

        ``compare(*(torch.cat(x) for x in zip(*map(embed, range(num_parts))))).backward()``

    Args:
        embed: embeddings of a part of the batch, floating ``[rows of the part, ...]`` each; called
            twice for each part, the second time with the random states of the first. It must give
            the same both times, and may have no lasting effect.
        num_parts: 1 or more.

    Raises: ConfigError, there is no part, or embed returns something else than embeddings; on a GPU
    what `replay` of the last one would have raised.
    """

    def __init__(self, embed: Callable[[int], Embeddings | Tensor], num_parts: int) -> None:
        read_deferred()
        if num_parts < 1:
            raise ConfigError(f"num_parts={num_parts} leaves nothing to embed; give 1 or more")
        self._embed, self.num_parts = replayed(lambda part: as_embeddings(embed(part))), num_parts
        self._grads: list[tuple[Tensor, ...]] = []  # of each part's embeddings
        self._direct: list[tuple[Tensor, Tensor]] = []
        self._off: list[Tensor] = []  # differences of the embeddings of both passes
        with torch.no_grad():
            parts = [self._embed(part) for part in range(num_parts)]
        self._sizes = [len(part[0]) for part in parts]
        self.embeddings: Embeddings = tuple(
            torch.cat(x).requires_grad_() for x in zip(*parts, strict=True)
        )
        """Of the whole batch, to be compared; leaves of the graph."""

    def compared(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Take the gradients of the loss of `embeddings`, and let go of its graph.

        Args:
            parameters: those that the loss may hold itself, as a temperature; others, and frozen
                ones, are ignored.
        """
        count, trained = len(self.embeddings), [p for p in parameters if p.requires_grad]
        grads = torch.autograd.grad(loss, [*self.embeddings, *trained], allow_unused=True)
        of_embeddings = [
            (torch.zeros_like(x) if grad is None else grad).split(self._sizes)
            for x, grad in zip(self.embeddings, grads[:count], strict=True)
        ]
        self._grads = list(zip(*of_embeddings, strict=True))
        direct = zip(trained, grads[count:], strict=True)
        self._direct = [(p, grad) for p, grad in direct if grad is not None]

    def replay(self, part: int) -> Tensor:
        """A scalar whose gradient is the part's share of the gradient of the loss.

        The last part brings that of the loss's own parameters, so that an engine which reduces over
        ranks with the last backward reduces it too.

        Raises: ConfigError, once all are replayed: one was embedded in another way. On a GPU this
        is read, and raised, by the next GradCache or `read_deferred`.
        """
        embeddings = self._embed(part)
        self._compare_passes(part, embeddings)
        pairs = list(zip(embeddings, self._grads[part], strict=True))
        if part == self.num_parts - 1:
            pairs += self._direct
        total = torch.stack([(x * grad).sum() for x, grad in pairs]).sum()
        return total if total.requires_grad else total.requires_grad_()  # all of it is frozen

    @torch.no_grad()
    def _compare_passes(self, part: int, embeddings: Embeddings) -> None:
        rows = slice(sum(self._sizes[:part]), sum(self._sizes[: part + 1]))
        for x, y in zip(embeddings, (x[rows] for x in self.embeddings), strict=True):
            self._off.append((x - y).norm() / y.norm().clamp(min=torch.finfo(y.dtype).tiny))
        if len(self._off) == self.num_parts * len(embeddings):
            check_numbers(torch.stack(self._off), _refuse)


def _refuse(differences: list[float]) -> None:
    if (worst := max(differences)) > _LIMIT:
        raise ConfigError(
            f"embed gave other embeddings the second time, off by {worst:.2g} of their norm "
            f"(limit {_LIMIT:g}): its gradient would be wrong; let it depend on the part "
            f"alone, and draw random numbers from the global generators, which are replayed"
        )
