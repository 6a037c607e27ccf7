"""What a loss is given, checked on all ranks together before any rows are exchanged.

Every rank sees what all others hold, so that what is wrong on one of them is raised on all, in the
same words, and nobody waits for a rank that has stopped.
"""

from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.collectives import Group, RowHeader, describe
from dist_contrastive.errors import ConfigError, NonFiniteError

Sizes = tuple[int, ...]
Headers = list[RowHeader | None]


def exchange_sizes(
    group: Group,
    paired: dict[str, Tensor],
    extra: dict[str, Tensor | None] | None = None,
    labels: Tensor | None = None,
    dims: tuple[int, ...] = (2,),
    shared: dict[str, Tensor | None] | None = None,
) -> dict[str, Sizes]:
    """Rows of every rank, for every input that is given.

    Args:
        paired: embeddings whose row i belongs to the same sample. extra: further embeddings, of as
            many rows as they like, given on all ranks or on none. labels: one a row of `paired`.
        dims: how many dimensions embeddings may have.
        shared: embeddings that all ranks hold alike, without gradient, given on all or on none.
            Their shapes are compared, their numbers are not.

    Raises:
        ConfigError, NonFiniteError: on all ranks, naming those where something is wrong.

    Collectives: one all-gather of a few numbers.
    """
    embeddings = {**paired, **(extra or {}), **(shared or {})}
    table = collectives.exchange_headers({**embeddings, "labels": labels}, group)
    given = {n: headers for n, headers in table.items() if is_given(n, headers, n in paired)}
    rows_of = {name: given[name] for name in embeddings if name in given}
    for name, headers in rows_of.items():
        _check_embeddings(name, headers, dims)
    for name, headers in given.items():
        if name in (shared or {}):
            _check_shared(name, headers)
        _check_same_on_all_ranks(name, headers)
    sizes = {name: tuple(h.rows for h in headers if h) for name, headers in given.items()}
    _check_one_dim(rows_of)
    _check_same_rows({name: sizes[name] for name in sizes if name in {**paired, "labels": 0}})
    if labels is not None:
        _check_labels(given["labels"])
    _check_finite(rows_of)
    return sizes


def check_points(group: Group, points: Tensor, are_compared: bool) -> None:
    """Points [rows, ...] must be finite, and fit together where ranks compare theirs."""
    headers = collectives.exchange_headers({"points": points}, group)["points"]
    if are_compared:
        _check_same_on_all_ranks("points", headers)
    _check_finite({"points": headers})


def is_given(name: str, headers: Headers, is_needed: bool) -> bool:
    """Whether an input is given, on all ranks or on none; refuses what some ranks alone give."""
    missing = [number for number, header in enumerate(headers) if header is None]
    if missing and (is_needed or len(missing) < len(headers)):
        or_none = "" if is_needed else " or none"
        raise ConfigError(f"{name} are missing on ranks {missing}; give them on all ranks{or_none}")
    return not missing


def _check_embeddings(name: str, headers: Headers, dims: tuple[int, ...]) -> None:
    for header in headers:
        assert header is not None
        floating = header.dtype is not None and header.dtype.is_floating_point
        if not floating or 1 + len(header.trailing) not in dims or 0 in header.trailing:
            shape = "[rows, dim]" if dims == (2,) else "[rows, dim] or [rows, views, dim]"
            raise ConfigError(f"{name}: {describe(headers)}; give floating embeddings {shape}")


def _check_same_on_all_ranks(name: str, headers: Headers) -> None:
    if len({header.fits for header in headers if header}) > 1:
        raise ConfigError(
            f"{name} differ between ranks: {describe(headers)}; give every rank the same dtype, "
            f"dimensions and requires_grad"
        )


def _check_shared(name: str, headers: Headers) -> None:
    rows = [header.rows for header in headers if header]
    if len(set(rows)) > 1:
        raise ConfigError(
            f"{name} has {', '.join(map(str, rows))} rows on the ranks, which must hold the same; "
            f"put the keys of all ranks into it, in the order of ranks"
        )
    if any(header.needs_grad for header in headers if header):
        raise ConfigError(
            f"{name} is on all ranks, none of which would get its gradient, and requires one; "
            f"detach it"
        )


def _check_one_dim(embeddings: dict[str, Headers]) -> None:
    found = {name: headers[0].trailing for name, headers in embeddings.items() if headers[0]}
    if len(set(found.values())) > 1:
        raise ConfigError(f"embeddings have different dimensions, {found}; give all the same")


def _check_same_rows(sizes: dict[str, Sizes]) -> None:
    for number, rows in enumerate(zip(*sizes.values(), strict=True)):
        if len(set(rows)) > 1:
            counts = ", ".join(f"{rows[i]} rows of {name}" for i, name in enumerate(sizes))
            raise ConfigError(
                f"rank {number} has {counts}; row i of each must belong to the same sample"
            )


def _check_labels(headers: Headers) -> None:
    for number, header in enumerate(headers):
        assert header is not None
        if header.trailing or header.dtype is None or header.lowest < -1:
            raise ConfigError(
                f"labels on rank {number} have {1 + len(header.trailing)} dimension(s), "
                f"{header.dtype} and {header.lowest} as the lowest; give one number a row, "
                f"integers from 0 and -1 where missing, or floats and NaN"
            )


def _check_finite(embeddings: dict[str, Headers]) -> None:
    bad = [
        f"{header.bad_rows} of {header.rows} rows of {name} on rank {number}"
        for name, headers in embeddings.items()
        for number, header in enumerate(headers)
        if header and header.bad_rows
    ]
    if bad:
        raise NonFiniteError(
            f"NaN, infinity or squares that overflow in {', '.join(bad)}; look at the samples and "
            f"the learning rate"
        )
