"""What a step would cost on a GPU that is not there: host waits, launches and memory, counted.

`Counts` is a dispatch mode: of the operators that run inside, forward and backward, it counts those
that would be kernels, those for which the host would wait until the device has caught up, by the
line that asks for them, and the bytes of what is alive. With tensors without data
(`FakeTensorMode`) it counts at any size; there a number that the host reads is an error.
"""

import collections
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = "dist_contrastive"

_READ = {"_local_scalar_dense", "is_nonzero", "equal"}
_SIZED_BY_DATA = {"nonzero", "argwhere", "masked_select", "bincount", "histc", "unique_dim"}
_SIZED_BY_DATA |= {"_unique2", "unique_consecutive", "repeat_interleave"}
WAITS = _READ | _SIZED_BY_DATA
_COPIES = {"tolist", "numpy", "cpu"}  # methods that read a tensor of the CPU by no operator
_INDEXED = {"index", "index_put", "index_put_", "_unsafe_index"}

_VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze"}
_VIEWS |= {"slice", "select", "narrow", "split", "split_with_sizes", "unbind", "chunk", "diagonal"}
_VIEWS |= {"detach", "alias", "as_strided", "lift_fresh", "unfold"}
_HOST = {"device", "promote_types", "scalar_tensor"}  # questions and numbers of the host
_ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class Counts(TorchDispatchMode):
    """Counts of the operators of this thread and of autograd's.

    Attributes:
        waits: how often the host waits, by place and operator.
        operators: kernels by the operator's name; `launches` is how many.
        peak: the most bytes at a time of results that were made inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: collections.Counter[str] = collections.Counter()
        self.operators: collections.Counter[str] = collections.Counter()
        self.peak = self._alive = 0
        self._known: set[int] = set()
        self._lock = threading.RLock()  # frees come from any thread, and from inside of it
        self._copies = _Copies(self.waits)

    def __enter__(self) -> Self:
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    @property
    def launches(self) -> int:
        """Kernels that would be started."""
        return self.operators.total()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS or (name in _INDEXED and _by_mask(args[1])):
            self.waits[f"{_place()} {name}"] += 1
        elif name not in _VIEWS | _ALLOCATIONS | _HOST:
            self.operators[name] += 1
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            if key in self._known:
                return
            self._known.add(key)
            self._alive += size
            self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        with self._lock:
            self._known.discard(key)
            self._alive -= size


class _Copies(TorchFunctionMode):
    """Counts of the methods that copy a tensor to the host."""

    def __init__(self, waits: collections.Counter[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in _COPIES:
            self._waits[f"{_place()} {func.__name__}"] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(index: Sequence[torch.Tensor | None]) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in index)


def _place() -> str:
    """File and line of the package that asks for the operator."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        _, found, path = frame.f_code.co_filename.rpartition(f"/{PACKAGE}/")
        if found:
            return f"{PACKAGE}/{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd or the caller"
