"""Rows of a table as samples: every row is checked before the first image is read."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_contrastive.data.classes import is_missing
from dist_contrastive.data.packing.columns import (
    PATHS,
    Columns,
    field_makers,
    image_path,
    label_maker,
    plain,
)
from dist_contrastive.data.packing.options import PackOptions, numbered_key, order
from dist_contrastive.data.packing.tables import Table
from dist_contrastive.data.packing.writer import Packed, pack_samples
from dist_contrastive.errors import DataError, UnreadableSample

_logger = logging.getLogger(__name__)
_NULLS = ("NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "null", "NULL", "None")


def pack_rows(
    table: Table,
    columns: Columns,
    folder: Path | str,
    options: PackOptions,
    field: str | None,
    *,
    is_text_needed: bool,
    is_numbered: bool,
) -> Packed:
    """Pack the rows of a table, each as one sample.

    Args:
        field: of the image, whatever its format.
        is_text_needed: a row without a text cannot be used; or else its sample has none.
        is_numbered: json has the number of the row, as "index".

    Raises:
        ConfigError: as `field_makers`.
        DataError: as `pack_samples`; rows that cannot be used.
    """
    make = sample_maker(
        *(table, columns, field, options.verify),
        is_text_needed=is_text_needed,
        is_numbered=is_numbered,
    )
    _check(table, columns, _text_maker(table, columns.text, is_text_needed), options)
    return pack_samples(order(len(table), options), make, folder, options, len(table))


def sample_maker(
    table: Table,
    columns: Columns,
    field: str | None,
    verify: str,
    *,
    is_text_needed: bool,
    is_numbered: bool,
) -> Callable[[int], dict[str, Any]]:
    """Function from the number of a row to its sample, which raises UnreadableSample.

    Args: those of `pack_rows`; verify as of `image_field`.
    """
    fields = field_makers(table, columns, field, verify)
    text_of = _text_maker(table, columns.text, is_text_needed)
    label_of = None if columns.label is None else label_maker(table, columns.label)

    def make(number: int) -> dict[str, Any]:
        row, where = table.read(number), table.where(number)
        details = {"index": number} if is_numbered else {}
        details |= {name: plain(row[name]) for name in columns.details if name in row}
        sample: dict[str, Any] = {"__key__": numbered_key(number), "json": details}
        for column, fill in fields.items():
            fill(sample, row.get(column), f"column {column!r} of {where}")
        if (text := text_of(row, where)) is not None:
            sample["txt"] = text
        if label_of is not None:
            entries, number_of_class = label_of(row.get(str(columns.label)))
            details.update(entries)
            if number_of_class is not None:
                sample["cls"] = number_of_class
        return sample

    return make


def _check(
    table: Table,
    columns: Columns,
    text_of: Callable[[dict[str, Any], str], str | None],
    options: PackOptions,
) -> None:
    """Refuse a table of which rows cannot be used, unless they are to be left out."""
    image = columns.image
    paths = image if image and table.kinds[image] in PATHS else None
    words = [name for name in (columns.text, columns.label) if name is not None]
    problems, nulls = list[str](), Counter[tuple[str, str]]()
    for number, row in enumerate(table.rows([*([paths] if paths else []), *words])):
        try:
            if isinstance(row, UnreadableSample):
                raise row
            where = table.where(number)
            if paths:
                _check_path(table.folder, row.get(paths), f"column {paths!r} of {where}")
            text_of(row, where)
            nulls.update((name, row[name]) for name in words if row.get(name) in _NULLS)
        except UnreadableSample as error:
            problems.append(str(error))
    if problems and not options.skip_unreadable:
        raise DataError(
            f"{len(problems)} of {len(table)} rows cannot be used, the first because "
            f"{problems[0]}; correct them, or leave them out with --skip-unreadable"
        )
    for (name, word), count in nulls.items():
        _logger.warning(
            "%d values of column %r are %r, taken as that text; --null %s makes them missing",
            *(count, name, word, word),
        )


def _check_path(folder: Path, value: Any, where: str) -> None:
    if isinstance(value, dict | bytes):  # that is no path
        return
    path = image_path(value, where)
    if not os.path.isfile(folder / path):
        raise UnreadableSample(f"the image {path} of {where} is not there, seen from {folder}")


def _text_maker(
    table: Table, column: str | None, is_needed: bool
) -> Callable[[dict[str, Any], str], str | None]:
    """Function from a row to its text, None if it has none or has several, which stay in json."""

    def text_of(row: dict[str, Any], where: str) -> str | None:
        value = None if column is None else row.get(column)
        if column is None or (not is_needed and is_missing(value)):
            return None
        texts = value if isinstance(value, list) and has_several else [value]
        if all(map(is_missing, texts)):
            raise UnreadableSample(f"there is no text in column {column!r} of {where}: {value!r}")
        for text in texts:
            if not (_is_text(text) or (has_several and is_missing(text))):
                raise UnreadableSample(
                    f"column {column!r} of {where} has {text!r}; give a text in Unicode"
                )
        return None if has_several else value

    has_several = column is not None and table.kinds[column] == "texts"
    if has_several:
        _logger.info(
            "rows have several texts, which stay in json: data.pair=json.%s draws one each time",
            column,
        )
    return text_of


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can write
        return False
