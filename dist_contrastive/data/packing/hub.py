"""Data sets as shards: in files, saved by the library `datasets`, or of the hub."""

import logging
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from dist_contrastive.data.packing.columns import IMAGE_NAMES, choose_columns
from dist_contrastive.data.packing.images import check_image_field
from dist_contrastive.data.packing.options import PackOptions, check_target
from dist_contrastive.data.packing.rows import pack_rows
from dist_contrastive.data.packing.tables import TABLE_KINDS, Kind, Table, TextTable
from dist_contrastive.data.packing.writer import Packed
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.pack_options import TextFormat

_logger = logging.getLogger(__name__)
# Of the ways in which `datasets` reads files, those that are allowed: none runs what it reads.
_READERS = ("arrow", "csv", "imagefolder", "json", "parquet", "text")
_TEXT_READERS = ("csv", "json")  # in whose place `TextTable` reads: they guess what values mean
_FILES = {".parquet": "parquet", ".arrow": "arrow"}
TABLE_FILES = (*TABLE_KINDS, *_FILES)
"""Extensions of files of tables."""
_COMPRESSED = r"\.(gz|bz2|xz|zst|lz4)$"
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
    form: TextFormat | None = None,
) -> Packed:
    """Pack a table, or a data set that the library `datasets` reads.

    A sample has

        jpg   or png, webp, bmp, gif, tif, ppm: the image, as it is encoded, in the field of its
              true format; png, if it is an array of whole numbers
        txt   the text; a list of texts stays in json instead
        cls   the label, if it is a class or a whole number; -1 where it is missing
        npy   an array of numbers; of several, each COLUMN.npy
        json  "index": the row; "label": the label, null where it is missing; "class": its name, if
              classes have names; and all other columns

    and further images as COLUMN.jpg, .... Of these, texts and arrays, null is left out; a row
    without a text and a label is no sample if those that cannot be read are to be left out.

    Args:
        source: a folder written by `save_to_disk`; a file .parquet, .json, .jsonl, .csv, .tsv or
            .arrow, or a folder of such or of images; or a name of the hub. Of files of text values
            are what is written there: see `TextTable`.
        split: which; None if there is one only.
        config: of a data set of the hub that has several.
        image, text, label: columns; None finds them by kind and name, "-" is none. An image may
            also be a column of bytes, of arrays, or of paths, seen from the file's folder; a label
            one of texts, see `label_maker`.
        drop: columns that are left out.
        field: of the image, whatever its format.
        form: how a table of text is written.

    Raises:
        ConfigError: as `check_target`, `check_image_field`; columns that are not there, do not
            fit, or are not clear.
        DataError: as `pack_samples`; a data set that cannot be loaded, or a split it has not.
    """
    options = options or PackOptions()
    check_target(folder, options)
    check_image_field(field)
    table = open_table(str(source), split, config, form or TextFormat())
    wanted = {"image": image, "text": text, "label": label}
    columns = choose_columns(table, wanted, drop)
    table.leave_out(drop)
    paths = [name for name in columns.details if name.lower() in IMAGE_NAMES]
    if columns.image is None and image is None and paths:
        _logger.warning("column %r stays a text; --image %s packs the images there", *paths[:1] * 2)
    is_text_needed = options.skip_unreadable and columns.label is None
    return pack_rows(
        *(table, columns, folder, options, field), is_text_needed=is_text_needed, is_numbered=True
    )


class DatasetTable(Table):
    """A `datasets.Dataset`, with the stored bytes of its images."""

    def __init__(self, data: Any, folder: Path) -> None:
        features = data.features  # a copy each time
        for name, feature in stored_images(features).items():
            if feature is not features[name]:  # any other column would be copied into files
                data = data.cast_column(name, feature)
        self._data, self._lock = data, Lock()
        self._describe(data.features, folder)

    def _describe(self, features: Mapping[str, Any], folder: Path) -> None:
        self.folder, self._features = folder, dict(features)
        self.kinds = {name: _kind_of(feature) for name, feature in features.items()}

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._data)

    def where(self, number: int) -> str:
        """Number of a row."""
        return f"row {number}"

    def read(self, number: int) -> dict[str, Any]:
        """Values of a row by column. Any thread may call it."""
        with self._lock:
            return self._data[number]

    def rows(self, columns: Collection[str]) -> Iterator[dict[str, Any]]:
        """All rows in their order, with these columns alone."""
        return iter(self._data.select_columns(list(columns))) if columns else iter(())

    def leave_out(self, columns: Collection[str]) -> None:
        """Read rows without some columns."""
        self._data = self._data.remove_columns(list(columns))

    def type_name(self, column: str) -> str:
        """Type of a column, for messages."""
        feature = self._features[column]
        return type(feature).__name__ if hasattr(feature, "decode") else str(feature)

    def class_names(self, column: str) -> list[str]:
        """Names of the classes of a column of the kind "class"."""
        names: list[str] = self._features[column].names
        return names

    def array_type(self, column: str) -> Any:
        """NumPy type of a column of arrays."""
        return _leaf(_arrow_type(self._features[column])).to_pandas_dtype()


def stored_images(features: Mapping[str, Any]) -> dict[str, Any]:
    """Features of which images are the bytes that are stored, not decoded."""
    import datasets

    return {
        name: datasets.Image(decode=False) if isinstance(feature, datasets.Image) else feature
        for name, feature in features.items()
    }


def _kind_of(feature: Any) -> Kind:
    """Kind of the values of a column."""
    import datasets
    import pyarrow as pa

    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    kind = _arrow_type(feature)
    leaf = _leaf(kind)
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        return "other" if hasattr(feature, "decode") else "image"  # audio and video have both too
    found = _kind_of_leaf(leaf)
    if found is not None and leaf is kind:
        return found
    if found == "text" and kind.value_type == leaf:
        return "texts"
    if found in ("integer", "number"):
        return "array"
    return "other" if _holds_bytes(kind) or hasattr(feature, "decode") else "plain"


def _kind_of_leaf(kind: Any) -> Kind | None:
    import pyarrow as pa

    types = pa.types
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    if types.is_integer(kind) or types.is_boolean(kind):
        return "integer"
    return "number" if types.is_floating(kind) else None


def _arrow_type(feature: Any) -> Any:
    import datasets
    import pyarrow as pa

    kind = datasets.Features({"x": feature}).arrow_schema.field("x").type
    return kind.storage_type if isinstance(kind, pa.ExtensionType) else kind  # of a fixed shape


def _leaf(kind: Any) -> Any:
    """Type of what lists of lists hold."""
    import pyarrow as pa

    types = pa.types
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    leaf = _leaf(kind)
    if pa.types.is_struct(leaf):
        return any(_holds_bytes(field.type) for field in leaf)
    return _kind_of_leaf(leaf) == "bytes"


# ---------------------------------------------------------------------------- loading


def open_table(
    source: str, split: str | None = None, config: str | None = None, form: TextFormat | None = None
) -> Table:
    """The rows of one split of a data set.

    Args:
        source, split, config: as of `pack_dataset`.

    Raises:
        DataError: a data set that cannot be loaded, or a split it has not.
    """
    path, form = Path(source), form or TextFormat()
    if path.suffix.lower() in TABLE_KINDS and not path.is_dir():
        _only_split({"train": path}, source, split)
        return TextTable({path: path}, form)
    with _quiet():
        loaded = _load(source, split, config, form)
    if isinstance(loaded, Table):
        return loaded
    if form != TextFormat():
        raise ConfigError(f"{source} is no table of text: leave out {form.flags()}")
    return DatasetTable(loaded, path.parent if path.is_file() else Path())


def _load(source: str, split: str | None, config: str | None, form: TextFormat) -> Any:
    """The `datasets.Dataset` of one split, or the `TextTable`."""
    import datasets

    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # versions below 4 would ask
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
            builder = datasets.load_dataset_builder(source, config)
            reader = _reader_of(builder, source)
            if reader in _TEXT_READERS:
                return _text_table(builder, source, split, form)
            if reader == "imagefolder" and (tables := sorted(path.rglob("metadata.csv"))):
                _logger.warning(
                    "values of %s are guessed, 001 is 1 and NA missing: `pack pairs %s --image "
                    "file_name` keeps them as they are",
                    *(tables[0], tables[0]),
                )
            loaded = datasets.load_dataset(source, config, split=split)
    except DataError:
        raise
    except Exception as error:  # of files, of the network, of the hub, of the library
        reason = " ".join(str(error).split())[:_MAX_REASON]
        raise DataError(
            f"the data set {source} cannot be loaded ({type(error).__name__}: {reason}); give a "
            f"folder written by save_to_disk, a file {', '.join(TABLE_FILES)}, a folder of such or "
            f"of images, or, with a network, a name of the hub"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = _only_split(loaded, source, split)
    return loaded.with_format(None)


def _text_table(builder: Any, source: str, split: str | None, form: TextFormat) -> TextTable:
    """The table in the files of text that a data set of a folder or of the hub consists of."""
    import datasets

    splits = {str(name): files for name, files in builder.config.data_files.items()}
    files = [str(file) for file in _only_split(splits, source, split)]
    paths = datasets.DownloadManager().download_and_extract(files)
    names = [re.sub(_COMPRESSED, "", file) for file in files]
    return TextTable(dict(zip(map(Path, paths), map(Path, names), strict=True)), form)


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
            f"the file {path} is of no known kind; give {', '.join(TABLE_FILES)}, or see the other "
            f"kinds of `dist-contrastive shards pack`"
        )
    return _FILES[path.suffix.lower()]


def _reader_of(builder: Any, source: str) -> str:
    modules = {base.__module__ for base in type(builder).__mro__}
    for name in _READERS:
        if f"datasets.packaged_modules.{name}.{name}" in modules:
            return name
    raise DataError(
        f"the data set {source} is read by {type(builder).__module__}, which is not allowed; "
        f"give one of files of the kinds {', '.join(_READERS)}"
    )


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
