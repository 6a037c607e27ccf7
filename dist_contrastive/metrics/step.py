"""Numbers of a step: where its time went, its memory, and the geometry of its embeddings."""

import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_contrastive import collectives

GEOMETRY_ROWS = 1024  # of the global batch; more cost memory and make the means no better
_TIE = 1e-6  # cosines in fp32 that differ by no more are equal
PARTS = ("data", "embed", "compare", "replay", "optimizer")


class Clock:
    """Wall-clock time of a rank by parts of a step.

    On a GPU kernels run asynchronously, and telling parts of a step apart takes a synchronisation
    after each, which costs time: there only steps whose row will be written are measured.

    Args:
        consumed: samples of the stream so far.
    """

    def __init__(self, consumed: int, device: torch.device) -> None:
        self._start = time.perf_counter()
        self._spent_s: dict[str, float] = defaultdict(float)
        self._consumed, self._steps, self._measured = consumed, 0, 0
        self._device, self._is_gpu = device, device.type == "cuda"
        self._is_measured = True
        self._reduce_s = 0.0
        self.part = PARTS[0]
        """The part of a step that was begun last."""

    def begin_step(self, is_logged: bool) -> None:
        """Start of a step; `is_logged`: its row will be written."""
        self._is_measured = is_logged or not self._is_gpu
        self._steps += 1
        self._measured += self._is_measured

    @contextmanager
    def spent(self, name: str) -> Iterator[None]:
        """Context whose time counts under this name."""
        self.part = name
        if not self._is_measured:
            yield
            return
        begin = time.perf_counter()
        yield
        if self._is_gpu:
            torch.cuda.synchronize(self._device)
        self._spent_s[name] += time.perf_counter() - begin

    def leave_out(self, seconds: float) -> None:
        """Seconds that are no part of the training, as of a measurement."""
        self._start += seconds

    def rates(self, consumed: int, reduce_s: float) -> dict[str, Any]:
        """Row of throughput, times per step and memory since the last call, on this rank.

        Args:
            consumed: samples of the stream so far.
            reduce_s: seconds of reductions so far.
        """
        now = time.perf_counter()
        elapsed_s, steps, measured = now - self._start, max(1, self._steps), max(1, self._measured)
        row: dict[str, Any] = {
            "consumed": consumed,
            "samples_per_s": (consumed - self._consumed) / elapsed_s,
            "step_s": elapsed_s / steps,
        }
        row |= {f"{part}_s": self._spent_s[part] / measured for part in PARTS}
        if "online" in self._spent_s:
            row["online_s"] = self._spent_s["online"] / measured
        row["reduce_s"] = (reduce_s - self._reduce_s) / steps
        row["data_wait"] = row["data_s"] / row["step_s"]
        row["memory_peak_mb"] = round(peak_memory_mb(self._device), 1)
        self._start, self._consumed, self._reduce_s = now, consumed, reduce_s
        self._steps = self._measured = 0
        self._spent_s.clear()
        return row


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MiB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def term_metrics(embeddings: Sequence[Tensor], terms: Mapping[str, Tensor]) -> dict[str, float]:
    """Value of each term, and the norm of its gradient by the embeddings of the global batch.

    A second backward pass through the comparison for each term.

    Collectives: a sum over ranks for each term.
    """
    metrics: dict[str, float] = {}
    inputs = [x for x in embeddings if x.requires_grad]
    for name, term in terms.items():
        grads = torch.autograd.grad(term, inputs, retain_graph=True, allow_unused=True)
        squares = sum((x.double().square().sum() for x in grads if x is not None), torch.zeros(()))
        # Backward leaves each rank its share times the number of ranks.
        total = collectives.all_reduce_sum(squares).item() / collectives.world_size() ** 2
        metrics |= {f"loss/{name}": term.item(), f"embedding_grad_norm/{name}": math.sqrt(total)}
    return metrics


@torch.no_grad()
def geometry(
    a: Tensor, b: Tensor, temperature: float | None = None, max_rows: int = GEOMETRY_ROWS
) -> dict[str, float]:
    """Alignment, uniformity and similarities of paired embeddings, the same on every rank.

    Of the first `max_rows` rows of the global batch.

    With a_i, b_i normalised, n rows, and means over all i and all j != i:

        positive_similarity   mean <a_i, b_i>
        negative_similarity   mean <a_i, b_j>
        recall_at_1           share of the i with <a_i, b_i> above all <a_i, b_j>, of which equal
                              ones, as of equal texts, share a hit  (chance: 1 / n)
        alignment             mean |a_i - b_i|^2                      (0: all pairs agree)
        uniformity            log mean exp(-2 |a_i - a_j|^2)          (lower: more evenly spread)
        embedding_std         standard deviation of a dimension of a, mean over dimensions, times
                              the root of their number  (1: spread over the sphere, 0: collapsed)
        effective_rank        `rank_me` of a  (1: collapsed)
        effective_negatives   mean over i of exp(entropy of softmax_j(<a_i, b_j> / temperature)):
                              how many of the n - 1 negatives the gradient comes from

    Args:
        a, b: two embeddings of this rank's samples, [b, D] each.
        temperature: of the loss; without one there are no effective negatives.

    References:
        Wang and Isola 2020, arXiv 2005.10242 (alignment, uniformity); Chen and He 2020, arXiv
        2011.10566, figure 2 (embedding_std).

    Collectives: a gather of objects, and one of rows.
    """
    sizes = collectives.gather_objects(len(a))
    first = sum(sizes[: collectives.rank()])
    local = torch.stack([a, b], dim=1)[: max(0, max_rows - first)].float()
    rows, _ = collectives.all_gather_rows(F.normalize(local, dim=-1).contiguous())
    if len(rows) < 2:
        return {}
    a, b = rows.unbind(1)
    others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    scores = a @ b.T
    ahead = (scores - scores.diagonal()[:, None]).masked_fill(~others, -torch.inf)
    shared = 1 / (1 + (ahead > -_TIE).sum(1))  # by those that are as similar
    distances = (2 - 2 * (a @ a.T)).clamp(min=0)
    numbers = {
        "positive_similarity": scores.diagonal().mean().item(),
        "negative_similarity": scores[others].mean().item(),
        "recall_at_1": shared.masked_fill((ahead > _TIE).any(1), 0.0).mean().item(),
        "alignment": (a - b).square().sum(-1).mean().item(),
        "uniformity": (-2 * distances[others]).exp().mean().log().item(),
        "embedding_std": a.std(0, correction=0).mean().item() * math.sqrt(a.shape[1]),
        "effective_rank": rank_me(a),
    }
    if temperature is not None:
        logits = scores[others].view(len(a), -1) / temperature
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        numbers["effective_negatives"] = entropy.exp().mean().item()
    return numbers


@torch.no_grad()
def rank_me(rows: Tensor) -> float:
    """Effective rank: exp of the entropy of the singular values of rows [n, D], which are not
    centred, over their sum.

    Returns:
        1 ... min(n, D); 0 where all rows are 0. From the spectrum of an fp64 Gram matrix, in which
        singular values below 1e-8 of the largest are rounding.
    References:
        Garrido et al. 2022, arXiv 2210.02885, equation 1.
    """
    x = rows.double()
    squares = torch.linalg.eigvalsh(x.T @ x if x.shape[1] < len(x) else x @ x.T)
    return effective_rank(squares.clamp(min=0).sqrt())


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of values that are 0 or more, over their sum; 0 where all are 0."""
    total = spectrum.sum()
    if not total > 0:
        return 0.0
    return torch.special.entr(spectrum / total).sum().exp().item()


def duplicates(index: Tensor) -> int:
    """Number of rows of the global batch whose sample an earlier row holds: false negatives.

    Args:
        index: number of each of this rank's samples in the data set, int64 [b].

    Collectives: one gather of rows.
    """
    gathered, _ = collectives.all_gather_rows(index[:, None])
    return len(gathered) - len(gathered.unique())
