"""Input schema of a loss: shapes, dtypes and values that fit together on all ranks.

``check_inputs({"queries": Embeddings(q, "n D"), "labels": Labels(x, "n")})`` makes one exchange of
headers and raises what is wrong on all ranks, in the same words, before any rows are exchanged.

A shape names its dimensions. Lower case: rows, which ranks have different numbers of; equal in all
inputs of a rank that name them. Upper case: equal in all inputs of all ranks, and not 0. ``...``:
leading dimensions, as upper case. ``n D | n V D``: one or the other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dist_contrastive.collectives.deferred import defer_check, read_deferred
from dist_contrastive.collectives.group import Group
from dist_contrastive.collectives.headers import (
    Headers,
    RowHeader,
    Tensors,
    Values,
    bad_rows,
    describe,
    exchange_headers,
    integer_range,
)
from dist_contrastive.errors import ConfigError, NonFiniteError

Sizes = tuple[int, ...]
"""Rows of every rank."""
_Dims = dict[str, int | tuple[int, ...]]


@dataclass(frozen=True)
class Input:
    """Tensor, or tensors alike as if stacked, with the shape that it must have.

    Attributes:
        optional: whether it may be left out, on all ranks.
        replicated: whether all ranks hold the same rows, so that none could get their gradient.
            Shapes are compared, numbers are not.
    """

    tensor: Tensors | None
    shape: str
    optional: bool = False
    replicated: bool = False

    kind: ClassVar[str]
    """What it must be, for messages."""
    is_converted: ClassVar[bool] = False
    """Whether it is converted before it is sent, so that dtypes of ranks may differ."""

    def accepts(self, dtype: torch.dtype) -> bool:
        """Whether a dtype is of its kind."""
        raise NotImplementedError

    def measure(self) -> Tensor | None:
        """The numbers of `Values`, on the device: [1] or [3] int64; None where there are none."""
        raise NotImplementedError

    def check_values(self, name: str, headers: Headers) -> None:
        """Refuse the values of any rank, after all shapes have been checked."""

    def names(self, num_dims: int) -> list[str] | None:
        """Name of each dimension, ``...`` for leading ones; None if the number does not fit."""
        for names in (alternative.split() for alternative in self.shape.split("|")):
            leading = num_dims - len(names) + 1
            if names[0] == "..." and leading >= 0:
                return [*["..."] * leading, *names[1:]]
            if len(names) == num_dims:
                return names
        return None

    def row_dim(self, num_dims: int) -> int:
        """Dimension of the rows."""
        names = self.names(num_dims) or ["n"]
        return next(dim for dim, name in enumerate(names) if name.islower())

    def dims(self, header: RowHeader) -> _Dims | None:
        """Sizes by name; None if the shape does not fit."""
        names = self.names(len(header.shape))
        if names is None:
            return None
        sizes: _Dims = dict(zip(names, header.shape, strict=True))
        if "..." in names or self.shape.startswith("..."):
            sizes["..."] = header.shape[: names.count("...")]
        return sizes


class Embeddings(Input):
    """Floating rows that are finite, and small enough to be squared."""

    kind = "floating embeddings"

    def accepts(self, dtype: torch.dtype) -> bool:
        """Floating."""
        return dtype.is_floating_point

    def measure(self) -> Tensor | None:
        """Bad rows."""
        if isinstance(self.tensor, Tensor):
            found = [bad_rows(self.tensor, self.row_dim(self.tensor.dim()))]
        else:
            tensors = self.tensor if isinstance(self.tensor, Sequence) else ()
            stack = [x for x in tensors if isinstance(x, Tensor)]
            found = [bad_rows(x, self.row_dim(x.dim() + 1) - 1) for x in stack]
        counts = [x for x in found if x is not None]
        if len(counts) < 2:
            return counts[0][None] if counts else None
        return torch.stack(counts).sum(0, keepdim=True)


class Integers(Input):
    """Any integers."""

    kind = "integers"
    is_converted = True

    def accepts(self, dtype: torch.dtype) -> bool:
        """Not floating."""
        return not dtype.is_floating_point

    def measure(self) -> Tensor | None:
        """Nothing."""
        return None


class Labels(Input):
    """Integers from 0 with -1 where missing, or floating numbers with NaN where missing."""

    kind = "numbers, integers from 0 and -1 where missing, or floats and NaN, as"

    def accepts(self, dtype: torch.dtype) -> bool:
        """Any number."""
        return True

    def measure(self) -> Tensor | None:
        """Range of integers, after no bad rows."""
        found = integer_range(self.tensor)
        return None if found is None else torch.nn.functional.pad(found, (1, 0))

    def check_values(self, name: str, headers: Headers) -> None:
        """Not below -1."""
        for number, header in enumerate(headers):
            if header is not None and header.values.lowest < -1:
                raise ConfigError(
                    f"{name} on rank {number} have {header.values.lowest} as the lowest; give "
                    f"integers from 0, and -1 where missing"
                )


class Ids(Labels):
    """Integers from 0, -1 where missing."""

    kind = "integers from 0, -1 where missing, as"

    def accepts(self, dtype: torch.dtype) -> bool:
        """Integer."""
        return not dtype.is_floating_point


@dataclass(frozen=True)
class ClassLabels(Ids):
    """Integers from 0 to below ``num_classes``, -1 where missing."""

    num_classes: int = 0

    kind = "integers, -1 where missing, as"

    def check_values(self, name: str, headers: Headers) -> None:
        """In the range of classes."""
        super().check_values(name, headers)
        highest = max(header.values.highest for header in headers if header)
        if highest >= self.num_classes:
            raise ConfigError(
                f"label outside the hierarchy: {highest} is not among its classes 0 to "
                f"{self.num_classes - 1}; put the class into the hierarchy, or give -1 for missing"
            )


@dataclass(frozen=True)
class Weights(Input):
    """Floating numbers of 0 or more, none too large to be squared.

    Attributes:
        dtype: what they will be converted to.
    """

    dtype: torch.dtype = torch.float64

    kind = "floating weights"
    is_converted = True

    def accepts(self, dtype: torch.dtype) -> bool:
        """Floating."""
        return dtype.is_floating_point

    def measure(self) -> Tensor | None:
        """Rows with bad weights."""
        x = self.tensor
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        x = x.detach().to(self.dtype)
        found = bad_rows(x.masked_fill(x < 0, torch.nan))
        return None if found is None else found[None]

    def check_values(self, name: str, headers: Headers) -> None:
        """Finite and 0 or more."""
        for number, header in enumerate(headers):
            if header is not None and header.values.bad_rows:
                raise NonFiniteError(
                    f"{name} on rank {number} hold NaN, infinity or negative numbers; weights must "
                    f"be 0 or more"
                )


def check_inputs(
    inputs: Mapping[str, Input], group: Group = None, compared: bool = True
) -> dict[str, Sizes]:
    """Rows of every rank, by the names that shapes have for them.

    Args:
        inputs: the same names on all ranks.
        compared: whether rows of different ranks meet; if not, their shapes may differ.

    Raises:
        ConfigError, NonFiniteError: on all ranks, naming those where something is wrong. Of values
            on a GPU this is known, and raised, by the next call of the group, or `read_deferred`;
            in a graph that is compiled or captured values are not looked at.

    Collectives: one all-gather of a few numbers, with values on a GPU another one.
    """
    tensors = {name: x.tensor for name, x in inputs.items()}
    deferred: list[str] = []
    measured: dict[str, Tensor | None] = {}
    if not torch.compiler.is_compiling():  # a graph has shapes, and no values to be looked at
        read_deferred(group)
        deferred = [name for name, x in inputs.items() if is_deferred(x.tensor)]
        measured = {name: x.measure() for name, x in inputs.items()}
    values = {n: _values(x) for n, x in measured.items() if n not in deferred}
    table = exchange_headers(tensors, group, values)
    headers = {n: line for n, line in table.items() if _is_given(n, line, inputs[n].optional)}
    dims = {name: _rank_dims(name, inputs[name], line) for name, line in headers.items()}
    for name, line in headers.items():
        if compared and not inputs[name].is_converted:
            _check_same_on_all_ranks(name, inputs[name], line)
    for number, of_rank in enumerate(zip(*dims.values(), strict=True)):
        _check_dims_of_rank(number, dict(zip(dims, of_rank, strict=True)))
    _check_values(inputs, headers)
    if deferred:
        given = {name: replace(inputs[name], tensor=None) for name in deferred if name in headers}
        _defer(given, headers, [measured[name] for name in given], group)
    return {
        symbol: tuple(int(of_rank[symbol]) for of_rank in ranks)  # type: ignore[arg-type]
        for ranks in dims.values()
        for symbol in ranks[0]
        if symbol.islower()
    }


def is_deferred(x: Tensors | None) -> bool:
    """Whether values are on a GPU, whose queue the host is not to wait for."""
    tensors = x if isinstance(x, Sequence) else (x,)
    return any(isinstance(y, Tensor) and y.is_cuda for y in tensors)


def _values(measured: Tensor | None) -> Values:
    return Values() if measured is None else Values(*measured.tolist())


def _check_values(inputs: Mapping[str, Input], headers: dict[str, Headers]) -> None:
    for name, line in headers.items():
        if name in inputs:
            inputs[name].check_values(name, line)
    _check_finite({n: x for n, x in inputs.items() if isinstance(x, Embeddings)}, headers)


def _defer(
    inputs: dict[str, Input],
    headers: dict[str, Headers],
    measured: Sequence[Tensor | None],
    group: Group,
) -> None:
    """Leave the measures of inputs for `read_deferred`; their shapes are known, and are good."""
    known = [x for x in measured if x is not None]
    if not known:
        return
    lines = known[0].new_zeros(len(inputs), 3)
    for line, x in zip(lines, measured, strict=True):
        if x is not None:
            line[: len(x)] = x

    def raise_for(table: list[list[list[int]]]) -> None:
        of_ranks = {
            name: [
                header and replace(header, values=Values(*of_rank[number]))
                for header, of_rank in zip(headers[name], table, strict=True)
            ]
            for number, name in enumerate(inputs)
        }
        _check_values(inputs, of_ranks)

    defer_check(lines, raise_for, group)


def _is_given(name: str, headers: Headers, optional: bool) -> bool:
    missing = [number for number, header in enumerate(headers) if header is None]
    if missing and (not optional or len(missing) < len(headers)):
        or_none = " or none" if optional else ""
        raise ConfigError(f"{name} are missing on ranks {missing}; give them on all ranks{or_none}")
    return not missing


def _rank_dims(name: str, wanted: Input, headers: Headers) -> list[_Dims]:
    """Sizes of the named dimensions on every rank."""
    ranks = []
    for header in headers:
        assert header is not None
        dims = None
        if header.dtype is not None and wanted.accepts(header.dtype):
            dims = wanted.dims(header)
        if dims is None or any(_is_empty(symbol, size) for symbol, size in dims.items()):
            shapes = (", ".join(shape.split()) for shape in wanted.shape.split("|"))
            row_dim = max(0, len(header.shape) - 2) if wanted.shape.startswith("...") else 0
            raise ConfigError(
                f"{name}: {describe(headers, row_dim)}; give {wanted.kind} "
                f"[{'] or ['.join(shapes)}]"
            )
        ranks.append(dims)
    return ranks


def _is_empty(symbol: str, size: int | tuple[int, ...]) -> bool:
    return 0 in size if isinstance(size, tuple) else not symbol.islower() and size == 0


def _check_same_on_all_ranks(name: str, wanted: Input, headers: Headers) -> None:
    given = [header for header in headers if header]
    if wanted.replicated:
        _check_replicated(name, given)
    row_dim = wanted.row_dim(len(given[0].shape))
    if len({header.fits(row_dim) for header in given}) > 1:
        raise ConfigError(
            f"{name} differ between ranks: {describe(headers, row_dim)}; give every rank the same "
            f"dtype, dimensions and requires_grad"
        )


def _check_replicated(name: str, headers: list[RowHeader]) -> None:
    rows = [header.rows for header in headers]
    if len(set(rows)) > 1:
        raise ConfigError(
            f"{name} has {', '.join(map(str, rows))} rows on the ranks, which must hold the same; "
            f"put the keys of all ranks into it, in the order of ranks"
        )
    if any(header.grad_flags for header in headers):
        raise ConfigError(
            f"{name} is on all ranks, none of which would get its gradient, and requires one; "
            f"detach it"
        )


def _check_dims_of_rank(number: int, dims: dict[str, _Dims]) -> None:
    """Dimensions of one name are equal in all inputs of a rank."""
    for symbol in dict.fromkeys(symbol for of_input in dims.values() for symbol in of_input):
        sizes = {name: of_input[symbol] for name, of_input in dims.items() if symbol in of_input}
        if len(set(sizes.values())) <= 1:
            continue
        if symbol.islower():
            counts = ", ".join(f"{size} rows of {name}" for name, size in sizes.items())
            raise ConfigError(
                f"rank {number} has {counts}; row i of each must belong to the same sample"
            )
        what = "leading" if symbol == "..." else "different"
        raise ConfigError(
            f"inputs have {what} dimensions {sizes} on rank {number}; give all the same"
        )


def _check_finite(embeddings: dict[str, Embeddings], headers: dict[str, Headers]) -> None:
    bad = []
    for name in (name for name in embeddings if name in headers):
        for number, header in enumerate(headers[name]):
            if header and header.values.bad_rows:
                last = embeddings[name].row_dim(len(header.shape))
                rows = math.prod(header.shape[: last + 1])
                bad.append(f"{header.values.bad_rows} of {rows} rows of {name} on rank {number}")
    if bad:
        raise NonFiniteError(
            f"NaN, infinity or squares that overflow in {', '.join(bad)}; look at the samples and "
            f"the learning rate"
        )
