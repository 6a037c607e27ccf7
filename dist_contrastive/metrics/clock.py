"""Time spent, and on what; memory."""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("data", "embed", "compare", "replay", "optimizer")


class Clock:
    """Counts the seconds of a rank.

    On a GPU, where work is only asked for, parts of a step are told apart by waiting for it, which
    costs time: there only steps whose row will be written are measured.

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

    def begin_step(self, is_logged: bool) -> None:
        """The next step; `is_logged`: its row will be written."""
        self._is_measured = is_logged or not self._is_gpu
        self._steps += 1
        self._measured += self._is_measured

    @contextmanager
    def spent(self, name: str) -> Iterator[None]:
        """Count the time inside under this name."""
        if not self._is_measured:
            yield
            return
        begin = time.perf_counter()
        yield
        if self._is_gpu:
            torch.cuda.synchronize(self._device)
        self._spent_s[name] += time.perf_counter() - begin

    def rates(self, consumed: int, reduce_s: float) -> dict[str, Any]:
        """What was spent since the last call, on this rank.

        Args:
            consumed: samples of the stream so far.
            reduce_s: seconds of reductions so far.
        """
        now = time.perf_counter()
        elapsed_s, steps, measured = now - self._start, max(1, self._steps), max(1, self._measured)
        found: dict[str, Any] = {
            "consumed": consumed,
            "samples_per_s": (consumed - self._consumed) / elapsed_s,
            "step_s": elapsed_s / steps,
        }
        found |= {f"{part}_s": self._spent_s[part] / measured for part in PARTS}
        found["reduce_s"] = (reduce_s - self._reduce_s) / steps
        found["data_wait"] = found["data_s"] / found["step_s"]
        found["memory_peak_mb"] = round(self._peak_mb(), 1)
        self._start, self._consumed, self._reduce_s = now, consumed, reduce_s
        self._steps = self._measured = 0
        self._spent_s.clear()
        return found

    def _peak_mb(self) -> float:
        """Most memory held so far: of the GPU, or of the process."""
        if self._is_gpu:
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
