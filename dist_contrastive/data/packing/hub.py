"""Data sets of the library `datasets` as shards: saved, in files, or of the hub."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_contrastive.data.packing.columns import (
    choose_columns,
    field_makers,
    label_maker,
    plain,
)
from dist_contrastive.data.packing.images import check_image_field
from dist_contrastive.data.packing.options import PackOptions, check_target, numbered_key
from dist_contrastive.data.packing.writer import Packed, pack_samples
from dist_contrastive.errors import DataError

# Of the ways in which `datasets` reads files, those that are allowed: none runs what it reads.
_READERS = ("arrow", "csv", "imagefolder", "json", "parquet", "text")
_FILES = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
_SAVED = ("state.json", "dataset_dict.json")  # in folders of save_to_disk
_MAX_REASON = 300  # characters


def pack_dataset(
    source: Path | str,
    folder: Path | str,
    options: PackOptions | None = None,
    *,
    split: str | None = None,
    config: str | None = None,
    image: str | None = None,
    text: str | None = None,
    label: str | None = None,
    drop: Collection[str] = (),
    field: str | None = None,
) -> Packed:
    """Pack a data set that the library `datasets` reads.

    A sample has

        jpg   or png, webp, bmp, gif, tif, ppm: the image, as it is encoded, in the field of its
              true format; png, if it is an array of whole numbers
        txt   the text
        cls   the label, if it is a class or a whole number; -1 where it is missing
        npy   an array of numbers; of several, each COLUMN.npy
        json  "index": the row; "label": the label, null where it is missing; "class": its name, if
              classes have names; and all other columns

    and further images as COLUMN.jpg, .... Of images, texts and arrays, null is left out.

    Args:
        source: a folder written by `save_to_disk`; a file .parquet, .json, .jsonl, .csv, .tsv or
            .arrow, or a folder of such or of images; or a name of the hub.
        split: which; None if there is one only.
        config: of a data set of the hub that has several.
        image, text, label: columns; None finds them by kind and name, "-" is none. An image may
            also be a column of bytes or of arrays; a label one of texts, which are numbered in
            their order.
        drop: columns that are left out.
        field: of the image, whatever its format.

    Raises:
        ConfigError: as `check_target`, `check_image_field`; columns that are not there, do not
            fit, or are not clear.
        DataError: as `pack_samples`; a data set that cannot be loaded, or a split it has not.
    """
    options = options or PackOptions()
    check_target(folder, options)
    check_image_field(field)
    with _quiet():
        data = _load(str(source), split, config)
    wanted = {"image": image, "text": text, "label": label}
    columns = choose_columns(data.features, wanted, drop)
    data = _not_decoded(data.select_columns([n for n in data.column_names if n not in drop]))
    fields = field_makers(data.features, columns, field, options.verify)
    label = columns.label
    label_of = None if label is None else label_maker(data, label)

    def make(numbered: tuple[int, dict[str, Any]]) -> dict[str, Any]:
        number, row = numbered
        details = {"index": number, **{name: plain(row[name]) for name in columns.details}}
        sample: dict[str, Any] = {"__key__": numbered_key(number), "json": details}
        for column, fill in fields.items():
            fill(sample, row[column], f"column {column!r} of row {number}")
        if label is not None and label_of is not None:
            entries, number_of_class = label_of(row[label])
            details.update(entries)
            if number_of_class is not None:
                sample["cls"] = number_of_class
        return sample

    rows = ((number, data[number]) for number in options.order(len(data)))
    return pack_samples(rows, make, folder, options, len(data))


def _load(source: str, split: str | None, config: str | None) -> Any:
    """The `datasets.Dataset` of one split."""
    import datasets

    path = Path(source)
    if not path.exists() and (source.startswith((".", "/", "~")) or path.suffix in _FILES):
        raise DataError(f"{source} does not exist; give a folder, a file, or a name of the hub")
    try:
        if any((path / name).is_file() for name in _SAVED):
            loaded = datasets.load_from_disk(source)
            _check_saved_split(loaded, source, split)
        elif path.is_file():
            loaded = datasets.load_dataset(_reader(path), data_files=source, split=split)
        else:
            _check_reader(datasets.load_dataset_builder(source, config), source)
            loaded = datasets.load_dataset(source, config, split=split)
    except DataError:
        raise
    except Exception as error:  # of files, of the network, of the hub, of the library
        reason = " ".join(str(error).split())[:_MAX_REASON]
        raise DataError(
            f"the data set {source} cannot be loaded ({type(error).__name__}: {reason}); give a "
            f"folder written by save_to_disk, a file {', '.join(_FILES)}, a folder of such or of "
            f"images, or, with a network, a name of the hub"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = _only_split(loaded, source, split)
    return loaded.with_format(None)


def _check_saved_split(loaded: Any, source: str, split: str | None) -> None:
    held = getattr(loaded, "split", None)  # of a single one, which may have a name
    if split is not None and held is not None and str(held) != split:
        raise DataError(f"{source} holds the split {held} only, not {split}; leave --split out")


def _only_split(loaded: Any, source: str, split: str | None) -> Any:
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        problem = "has several splits" if split is None else f"has no split {split}"
        raise DataError(f"{source} {problem}; give --split with one of {', '.join(loaded)}")
    return loaded[split]


def _reader(path: Path) -> str:
    if path.suffix.lower() not in _FILES:
        raise DataError(
            f"the file {path} is of no known kind; give {', '.join(_FILES)}, or see the other "
            f"kinds of `dist-contrastive shards pack`"
        )
    return _FILES[path.suffix.lower()]


def _check_reader(builder: Any, source: str) -> None:
    modules = {base.__module__ for base in type(builder).__mro__}
    if not any(f"datasets.packaged_modules.{name}.{name}" in modules for name in _READERS):
        raise DataError(
            f"the data set {source} is read by {type(builder).__module__}, which is not allowed; "
            f"give one of files of the kinds {', '.join(_READERS)}"
        )


def _not_decoded(data: Any) -> Any:
    """Data set whose images are the stored bytes."""
    import datasets

    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the library, unless stderr is a terminal."""
    import datasets

    was_off = datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_off:
            datasets.enable_progress_bars()
