"""Lines of the benchmarks on a card: written at once, errors among them; time and memory."""

import gc
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]


@dataclass
class Bench:
    """Where a stage measures, how long it may, and where it writes its lines."""

    stage: str
    file: Path
    device: str
    small: bool
    limit_s: float
    begin: float = field(default_factory=time.monotonic)

    @property
    def is_cuda(self) -> bool:
        """Whether it is a card."""
        return self.device == "cuda"

    def left_s(self) -> float:
        """Seconds that the stage has left."""
        return self.limit_s - (time.monotonic() - self.begin)

    def add(self, name: str, **values: Any) -> None:
        """A line of the file, and on standard output."""
        seconds = round(time.monotonic() - self.begin, 1)
        line = json.dumps({"stage": self.stage, "name": name, "s": seconds, **_plain(values)})
        with self.file.open("a") as file:
            file.write(line + "\n")
        print(line[:400], flush=True)

    def attempt(
        self, name: str, function: Callable[[], dict[str, Any]], need_s: float = 2.0, **known: Any
    ) -> dict[str, Any] | None:
        """A line of what the function returns, or of its error, after which the stage goes on.

        Args:
            need_s: it is skipped if fewer seconds are left.
            known: what the line has in any case.
        """
        found = None
        if self.left_s() < need_s:
            self.add(name, **known, skipped=f"{self.left_s():.0f} s are left")
            return None
        try:
            found = function()
            self.add(name, **known, **found)
        except Exception as error:
            self.add(name, **known, **_told(error))
            error.__traceback__ = None  # it holds the tensors of the step
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
        return found

    def wait(self) -> None:
        """The end of all that the card was given."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def timed(self, step: Step, seconds: float = 0.8, most: int = 10) -> dict[str, Any]:
        """Median and smallest ms of steps after a first one, and MiB above what was there."""
        seconds, most = (0.05, 2) if self.small else (seconds, most)
        first, mib = self._once_ms(step), None
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        times = [self._once_ms(step)]
        if self.is_cuda:
            mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        count = min(most, int(1e3 * seconds / max(times[0], 1e-3)))
        times += [self._once_ms(step) for _ in range(count)]
        median = statistics.median(times)
        return {"ms": median, "min_ms": min(times), "runs": len(times), "first_ms": first} | {
            "mib": mib
        }

    def _once_ms(self, step: Step) -> float:
        if not self.is_cuda:
            begin = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - begin)
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin_event.record()
        step()
        end_event.record()
        torch.cuda.synchronize()
        return begin_event.elapsed_time(end_event)


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """Lines of a file; one that was cut off is left out."""
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def rate_of(file: Path, name: str = "product bf16") -> float | None:
    """Operations a second that the stage `ceilings` found; None: it did not run."""
    found = [x["tflops"] for x in lines(file) if x["name"] == name and "tflops" in x]
    return 1e12 * found[-1] if found else None


def relative(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest norm of a difference, over the norm; NaN counts as infinite."""
    errors = [
        float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30))
        for x, y in zip(found, exact, strict=True)
    ]
    return max(math.inf if math.isnan(x) else x for x in errors)


def _told(error: Exception) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)[-5:]
    where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
    return {"error": f"{type(error).__name__}: {error}"[:500], "where": where}


def _plain(x: Any) -> Any:
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else str(x)
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    return [_plain(value) for value in x] if isinstance(x, list | tuple) else x
