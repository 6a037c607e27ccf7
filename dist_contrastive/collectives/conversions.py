"""What callers give in the place of tensors, as tensors; what is none is left for checks."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_contrastive.collectives.headers import DTYPES
from dist_contrastive.errors import ConfigError

_LARGEST_LABEL = np.iinfo(np.int64).max


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; on its way to a GPU from pinned memory, so that the host does not wait
    for what is queued there."""
    if device.type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def as_labels(labels: Any) -> Any:
    """Labels as a tensor: arrays and lists of numbers are taken, whole ones as int64 and others as
    fp64; what holds no numbers, or larger ones, is returned as it is, for `check_inputs` to name.
    """
    if labels is None or (isinstance(labels, Tensor) and labels.dtype in DTYPES):
        return labels
    try:
        array = np.asarray(labels)
    except (TypeError, ValueError, RuntimeError):  # rows of different lengths, other devices
        return labels
    whole = array.dtype.kind in "biu" or (array.size == 0 and isinstance(labels, list | tuple))
    if (not whole and array.dtype.kind != "f") or (whole and (array > _LARGEST_LABEL).any()):
        return labels
    return torch.from_numpy(array.astype(np.int64 if whole else np.float64))


def as_embeddings(returned: Any) -> tuple[Tensor, ...]:
    """What a function of the user's returned, as floating tensors of the same rows.

    Raises:
        ConfigError: it is something else.
    """
    embeddings = (returned,) if isinstance(returned, Tensor) else returned
    if isinstance(embeddings, tuple | list):
        are_rows = (isinstance(x, Tensor) and x.is_floating_point() and x.dim() for x in embeddings)
        if all(are_rows) and len({len(x) for x in embeddings}) == 1:
            return tuple(embeddings)
    raise ConfigError(
        f"embed returned {_kinds(returned)}; return floating tensors [rows, ...] alone, of the "
        f"same rows, and give labels to the loss itself"
    )


def _kinds(returned: Any) -> str:
    if isinstance(returned, tuple | list):
        return f"({', '.join(map(_kinds, returned))})"
    if isinstance(returned, Tensor):
        return f"{returned.dtype} {list(returned.shape)}"
    return type(returned).__name__
