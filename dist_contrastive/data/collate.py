"""Batches of decoded samples: rows to columns, and parts of a batch to one.

`join_batches([collate(a), collate(b)])` equals `collate(a + b)`, so a batch does not depend on
how many workers built it.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_contrastive.errors import DataError

Batch = dict[str, Any]


def collate(samples: Sequence[dict[str, Any]], is_shared: bool = False) -> Batch:
    """Columns of one or more samples.

    Tensors and numeric arrays of one shape are stacked to [b, ...]; whole numbers become int64,
    other numbers float64, truth values bool, each [b]; all else stays a list of b values.

    Args:
        is_shared: stack tensors in memory that another process can be sent.

    Raises:
        DataError: a field that some of the samples lack.
    """
    first = samples[0]
    for sample in samples:
        if sample.keys() != first.keys():
            raise DataError(_missing_field(first, sample))
    return {name: _column([sample[name] for sample in samples], is_shared) for name in first}


def join_batches(parts: Sequence[Batch]) -> Batch:
    """One batch from consecutive parts of it, rows in the order of the parts.

    Parts without rows count only if no part has rows, for the shapes.

    Raises:
        DataError: a field that some of the parts lack.
    """
    full = [part for part in parts if part["__key__"]] or [parts[0]]
    for part in full:
        if part.keys() != full[0].keys():
            rows = [{**p, "__key__": p["__key__"][0]} for p in (full[0], part)]
            raise DataError(_missing_field(*rows))
    return {name: _join_columns([part[name] for part in full]) for name in full[0]}


def without_rows(batch: Batch) -> Batch:
    """The batch cut to 0 rows: tensors keep their type and the shape of a row."""
    return {name: column[:0] for name, column in batch.items()}


def _column(values: list[Any], is_shared: bool) -> Any:
    if isinstance(values[0], str | bytes | dict | list) or values[0] is None:
        return values
    rows = [_as_tensor(value) for value in values]
    tensors = [row for row in rows if row is not None]
    if len(tensors) < len(values):
        return values
    if len({row.shape for row in tensors}) > 1:
        return tensors
    try:
        return _stack(tensors, is_shared)
    except RuntimeError as error:
        if is_shared and is_shared_memory_full(error):
            raise
        return tensors  # torch has no type for 16 unsigned bits beside signed ones, say


def is_shared_memory_full(error: Exception) -> bool:
    """Whether torch found no room in /dev/shm."""
    return any(words in str(error) for words in ("shared memory", "(shm)", "No space left"))


def _stack(rows: list[Tensor], is_shared: bool) -> Tensor:
    """Rows in a type that holds all, since a number may be 1 here and 1.5 there."""
    first = rows[0]
    if not is_shared or any(row.dtype != first.dtype for row in rows):
        return torch.stack(rows)
    # Private, as in torch's own collate: `share_memory_` would copy the rows once more.
    shape = (len(rows), *first.shape)
    storage = first._typed_storage()._new_shared(math.prod(shape), device=first.device)
    return torch.stack(rows, out=first.new(storage).resize_(shape))


def _as_tensor(value: Any) -> Tensor | None:
    match value:
        case Tensor():
            return value
        case bool() | int():
            return torch.tensor(value) if -(2**63) <= value < 2**63 else None
        case float():
            return torch.tensor(value, dtype=torch.float64)
        case np.ndarray() if value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
            return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
    return None


def _join_columns(columns: list[Any]) -> Any:
    if len(columns) == 1:
        return columns[0]
    if all(isinstance(column, Tensor) for column in columns) and (
        len({column.shape[1:] for column in columns}) == 1
    ):
        with contextlib.suppress(RuntimeError):  # as in `_column`
            return torch.cat(columns)
    return [row for column in columns for row in _rows(column)]


def _rows(column: Any) -> list[Any]:
    if not isinstance(column, Tensor):
        return column
    return column.tolist() if column.ndim == 1 else list(column.unbind(0))


def _missing_field(first: dict[str, Any], second: dict[str, Any]) -> str:
    if first.keys() >= second.keys():
        first, second = second, first
    missing = sorted(second.keys() - first.keys())[0]
    return (
        f"sample {first['__key__']!r} has no field {missing!r}, which sample "
        f"{second['__key__']!r} of the same batch has; pack the shards again with the same "
        "fields in every sample"
    )
