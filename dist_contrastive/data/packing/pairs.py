"""Images with texts or labels, listed in a table, as shards."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dist_contrastive.data.packing.columns import (
    IMAGE_NAMES,
    NONE,
    PATHS,
    TEXT_NAMES,
    choose_columns,
)
from dist_contrastive.data.packing.hub import TABLE_FILES, open_table
from dist_contrastive.data.packing.images import check_image_field
from dist_contrastive.data.packing.options import PackOptions, check_target
from dist_contrastive.data.packing.rows import pack_rows
from dist_contrastive.data.packing.tables import Table
from dist_contrastive.data.packing.writer import Packed
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.pack_options import TextFormat


def pack_pairs(
    table: Path | str,
    folder: Path | str,
    options: PackOptions | None = None,
    *,
    image: str | None = None,
    text: str | None = None,
    label: str | None = None,
    field: str | None = None,
    form: TextFormat | None = None,
) -> Packed:
    """Pack the images that a table names, with their texts; the images' bytes are copied.

    A sample has

        jpg   or png, webp, bmp, gif, tif, ppm: the image, in the field of its true format
        txt   the text; a list of texts stays in json instead
        cls   the label, if a column is named for it that has whole numbers or names of classes
        json  all other columns of the row, the path too; "label", "class": as of `pack_dataset`

    Args:
        table: .csv or .tsv with a header; .json or .jsonl, one object a line; .parquet or .arrow.
            Paths of images are seen from its folder.
        image, text: columns; None finds one by its name, as "image" and "caption".
        label: column of numbers or texts, see `label_maker`. With it, texts may be missing.
        field: for all images, whatever their formats.
        form: how a table of text is written.

    Raises:
        ConfigError: as `check_target`, `check_image_field`; columns that are not there, or not
            found by name.
        DataError: as `pack_samples`; a table that cannot be read, naming the line; rows without an
            image or a text, unless they are to be left out.
    """
    options = options or PackOptions()
    check_target(folder, options)
    check_image_field(field)
    if Path(table).suffix.lower() not in TABLE_FILES:
        kind = "a folder" if Path(table).is_dir() else "of no known kind"
        raise DataError(
            f"the table {table} is {kind}; give {', '.join(TABLE_FILES)}; images with texts beside "
            f"them, as 1.jpg and 1.txt, are packed by `dist-contrastive shards pack images`"
        )
    rows = open_table(str(table), form=form or TextFormat())
    image = image or _by_name(rows, table, IMAGE_NAMES, "image")
    if text is None and (label is None or any(x.lower() in TEXT_NAMES for x in rows.kinds)):
        text = _by_name(rows, table, TEXT_NAMES, "text")
    wanted = {"image": image, "text": text or NONE, "label": label or NONE}
    columns = choose_columns(rows, wanted, ())
    path = (image,) if rows.kinds[image] in PATHS else ()
    columns = replace(columns, arrays=(), details=(*path, *columns.arrays, *columns.details))
    return pack_rows(
        *(rows, columns, folder, options, field), is_text_needed=label is None, is_numbered=False
    )


def _by_name(rows: Table, table: Path | str, names: Sequence[str], role: str) -> str:
    columns = [column for column in rows.kinds if column.lower() in names]
    if len(columns) != 1:
        raise ConfigError(
            f"{table} does not tell which column is the {role}; give --{role} with one of "
            f"{', '.join(rows.kinds)}; or with --columns if these are no names"
        )
    return columns[0]
