"""A device that is not there: tensors without data (``device="meta"``) in the place of a GPU's.

What a GPU would have to wait for is found where it is asked for: numbers that the host reads,
results whose size depends on data, copies between host and device that are not from pinned memory.
Kernels are not started.
"""

import collections
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "gpu"))
import counts

from dist_contrastive import collectives
from dist_contrastive.backend.replicated import Replicated
from dist_contrastive.collectives import deferred, schema
from dist_contrastive.losses import PairLoss
from dist_contrastive.losses.force import fused as force_fused
from dist_contrastive.losses.force import panels, segments, softmaxes
from dist_contrastive.pairwise import fused, kernel_calls

DEVICE = torch.device("meta")


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the package treat that device as a GPU. Returns the kernels that it then starts."""
    started: list[str] = []

    def record(name: str, grid: tuple[int, ...], *_: Any, **constants: Any) -> None:
        started.append(f"{name} {grid} {constants}")

    def product(*_: Tensor) -> None:  # one kernel on CUDA, and two operators elsewhere
        started.append("product")

    def to_device(x: Tensor, device: torch.device) -> Tensor:
        is_sent = device.type == "meta" and not x.is_meta
        return torch.empty(x.shape, dtype=x.dtype, device=device) if is_sent else x.to(device)

    monkeypatch.setattr(kernel_calls, "start", record)
    monkeypatch.setattr(kernel_calls, "_no_place", lambda device: None)
    monkeypatch.setattr(fused, "add_product", product)
    for module in (force_fused, panels, segments, softmaxes):
        monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(collectives, "to_device", to_device)
    monkeypatch.setattr(deferred, "is_on_gpu", lambda x: x.is_meta)
    monkeypatch.setattr(deferred, "_leave", lambda *_: None)  # what has no data is never read
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(schema, "is_deferred", _is_there)
    monkeypatch.setattr(torch, "autocast", _Autocast)
    return started


def move(module: torch.nn.Module, engine: Replicated) -> None:
    """Put what is trained on that device, where losses take the way that auto takes on a GPU."""
    before = list(module.parameters())
    moved = dict(zip(before, module.to(DEVICE).parameters(), strict=True))
    for group in engine.optimizer.param_groups:
        group["params"] = [moved[parameter] for parameter in group["params"]]
    engine.optimizer.state.clear()
    engine._device, scaler = DEVICE, engine._scaler
    if scaler.is_enabled():
        scaler._scale = scaler._scale.to(DEVICE)
        scaler._growth_tracker = scaler._growth_tracker.to(DEVICE)
    for part in module.modules():
        if isinstance(part, PairLoss) and part.has_kernels and part.impl == "auto":
            part.impl = "triton"


def move_tensors(*holders: Any) -> None:
    """Put tensors that are no module's on that device: the attributes of these."""
    for holder in holders:
        for name, value in vars(holder).items():
            if isinstance(value, Tensor):
                setattr(holder, name, value.to(DEVICE))


def _is_there(x: Any) -> bool:
    return any(isinstance(y, Tensor) and y.is_meta for y in tree_leaves(x))


class _Autocast(torch.autocast):  # torch knows none of that device
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


class Waits(TorchDispatchMode):
    """Waits of the host for that device, by the place that asks, and the operators in their order.

    `tolist` gives ones; whatever else needs numbers of it raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: collections.Counter[str] = collections.Counter()
        self.operators: list[str] = []
        self._methods = _Methods(self)

    def __enter__(self) -> Self:
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def add(self, name: str) -> None:
        """A wait."""
        self.waits[f"{counts._place()} {name}"] += 1

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name, given = func.overloadpacket.__name__, _tensors([args, kwargs])
        if any(x.is_meta for x in given) and name in counts.WAITS:
            self.add(name)
        out = func(*args, **(kwargs or {}))
        both = [*given, *_tensors(out)]
        if _is_there(both):
            self.operators.append(name)
            # A number of the host is an argument of a kernel; more of them are a copy.
            if any(not x.is_meta and x.dim() for x in both):
                self.add(f"{name} of both")
        return out


def _tensors(x: Any) -> list[Tensor]:
    return [y for y in tree_leaves(x) if isinstance(y, Tensor)]


class _Methods(TorchFunctionMode):
    """What reads numbers, or makes a tensor of them, by no operator."""

    def __init__(self, found: Waits) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if name in ("tolist", "cpu", "numpy") and isinstance(first, Tensor) and first.is_meta:
            self._found.add(name)
            return torch.ones(first.shape, dtype=first.dtype).tolist()
        out = func(*args, **(kwargs or {}))
        numbers = args[1] if name == "new_tensor" else first
        is_made = name in ("tensor", "as_tensor", "new_tensor") and out.is_meta
        if is_made and not _is_there(numbers):
            self._found.add(name)
        return out
