"""What the trainer knows of a task."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dist_contrastive.data.fields import Samples

Embeddings = tuple[Tensor, ...]


class Task(nn.Module, ABC):
    """An objective over the global batch: `embed`, then `compare`.

    Its parameters, those of the loss included, are all that is trained. Randomness (views, noise)
    is drawn in `inputs`, keyed by the sample, so that it depends on neither rank nor batch.
    """

    @abstractmethod
    def inputs(self, samples: Samples) -> tuple[Tensor, ...]:
        """What `embed` takes for these rows."""

    @abstractmethod
    def embed(self, *inputs: Tensor) -> Embeddings:
        """Embeddings of some rows, each row for itself; all trained networks act here."""

    @abstractmethod
    def compare(self, embeddings: Embeddings, samples: Samples) -> Tensor:
        """Scalar loss over the rows of all ranks, from the embeddings of this rank's rows."""

    def forward(self, *inputs: Tensor) -> Embeddings:
        """`embed`, under the name that engines wrap."""
        return self.embed(*inputs)

    @torch.no_grad()
    def scalars(self) -> dict[str, float]:
        """Numbers of the task itself that are worth logging."""
        return {}
