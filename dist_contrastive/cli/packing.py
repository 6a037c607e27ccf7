"""Commands that write shards: ``dist-contrastive shards pack`` and ``merge``."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dist_contrastive.cli.app import examples, new_app, with_options
from dist_contrastive.pack_options import PackOptions, ShardBounds, TextFormat

if TYPE_CHECKING:
    from dist_contrastive.data.packing.writer import Packed

_log = logging.getLogger(__name__)
app = new_app(
    "Write a data set as plain webdataset tars of bounded size, with an index. Each KIND has its "
    "own --help."
)

# Data sets for demos: how they are packed, given dist_contrastive.data and a folder, and what.
_DEMOS: dict[str, tuple[Callable[[Any, Path], dict[str, Any]], str]] = {
    "digits": (
        lambda data, folder: data.pack_digits(folder),
        "scikit-learn's 1,797 handwritten digits",
    ),
    "glyphs": (
        lambda data, folder: data.pack_glyphs(folder),
        "14,688 images of 34 digits and capitals in 27 fonts",
    ),
    "eight_gaussians": (
        lambda data, folder: data.pack_toy("eight_gaussians", folder),
        "10,240 points of the plane about the corners of an octagon",
    ),
    "checkerboard": (
        lambda data, folder: data.pack_toy("checkerboard", folder),
        "10,240 points in the black squares of a board",
    ),
    "swiss_roll": (
        lambda data, folder: data.pack_toy("swiss_roll", folder),
        "10,240 points along a spiral",
    ),
}

_Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="New or empty; gets the shards.")]
Patterns = Annotated[
    list[str],
    typer.Argument(
        metavar="PATTERN",
        help="Folder, shard, or pattern such as 'train-{000..099}.tar'; or a URL of these.",
    ),
]
_Field = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="For all images.", show_default="by format, jpg, png, ..."),
]


def _column(help: str, default: str | bool = False) -> Any:
    return typer.Option(metavar="COLUMN", help=help, show_default=default)


def _file(help: str) -> Any:
    return typer.Option(metavar="FILE", help=help)


_Name = Annotated[
    str | None, typer.Option(help="Of shards, NAME-00000.tar.", show_default="that of FOLDER")
]
_Samples = Annotated[int | None, typer.Option(metavar="N", help="At most.")]
_ShardMb = Annotated[float | None, typer.Option(metavar="M", help="MiB of a tar, at most.")]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace shards of this NAME in FOLDER.")
]


def _merge_options(
    name: _Name = PackOptions.name,
    samples_per_shard: _Samples = ShardBounds.samples,
    shard_mb: _ShardMb = ShardBounds.mib,
    overwrite: _Overwrite = PackOptions.overwrite,
) -> PackOptions:
    bounds = ShardBounds(samples_per_shard, shard_mb)
    return PackOptions(name=name, bounds=bounds, overwrite=overwrite)


def _pack_options(
    name: _Name = PackOptions.name,
    samples_per_shard: _Samples = ShardBounds.samples,
    shard_mb: _ShardMb = ShardBounds.mib,
    overwrite: _Overwrite = PackOptions.overwrite,
    seed: Annotated[
        int | None, typer.Option(metavar="S", help="Of the shuffled order.")
    ] = PackOptions.seed,
    no_shuffle: Annotated[
        bool, typer.Option("--no-shuffle", help="Keep the order of the source.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(metavar="W", help="Threads.", show_default="one for each CPU")
    ] = PackOptions.workers,
    verify: Annotated[
        Literal["open", "decode"],
        typer.Option(help="Open images, or decode them: slower, finds truncated JPEGs."),
    ] = PackOptions.verify,
    skip_unreadable: Annotated[
        bool,
        typer.Option("--skip-unreadable", help="Leave out what cannot be read, and name it."),
    ] = PackOptions.skip_unreadable,
) -> PackOptions:
    return PackOptions(
        name=name,
        bounds=ShardBounds(samples_per_shard, shard_mb),
        workers=workers,
        seed=None if no_shuffle else seed,
        verify=verify,
        skip_unreadable=skip_unreadable,
        overwrite=overwrite,
    )


def _text_format(
    separator: Annotated[
        str | None,
        typer.Option(metavar="SIGN", help="Between cells of .csv, .tsv.", show_default="found"),
    ] = TextFormat.separator,
    quotes: Annotated[
        Literal["csv", "none"] | None,
        typer.Option(
            help="Whether quotation marks enclose cells, or are text.",
            show_default="none in .tsv, csv otherwise",
        ),
    ] = TextFormat.quotes,
    encoding: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a table of text.", show_default="utf-8, or its mark"),
    ] = TextFormat.encoding,
    null: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Stands for a missing value; may be repeated."),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Of a .csv or .tsv without a header."),
    ] = None,
) -> TextFormat:
    return TextFormat(
        separator="\t" if separator == "\\t" else separator,
        quotes=quotes,
        encoding=encoding,
        null=tuple(null or TextFormat.null),
        columns=tuple(columns.split(",")) if columns else TextFormat.columns,
    )


@app.command(
    "images",
    epilog=examples("dist-contrastive shards pack images photos data/photos --verify decode"),
)
@with_options(_pack_options)
def _pack_images(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of images.")],
    folder: _Folder,
    options: PackOptions,
    field: _Field = None,
    classes_of: Annotated[
        str | None,
        typer.Option(metavar="SHARDS", help="Packed shards whose numbers of classes to keep."),
    ] = None,
) -> None:
    """A folder of images; its sub-folders are classes.

    Packs the images of a folder and of those in it. Their bytes are copied. If every image lies in
    a folder directly in SOURCE, these folders are classes, and samples get the fields cls and
    json.label. A text beside an image, as 1.txt beside 1.jpg, becomes the field txt.
    """
    from dist_contrastive.data.packing.images import class_names, pack_images

    classes = None if classes_of is None else class_names(classes_of)
    packed = pack_images(source, folder, options, field, classes)
    if "cls" not in packed.index.fields and any(path.is_dir() for path in source.iterdir()):
        print("no classes: they are taken from folders if every image lies in one, one level deep")
    _report(folder, packed, has_field=True)


@app.command(
    "pairs",
    epilog=examples("dist-contrastive shards pack pairs captions.csv data/pairs --text title"),
)
@with_options(_pack_options)
@with_options(_text_format, "form")
def _pack_pairs(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help=".csv, .tsv, .json, .jsonl, .parquet or .arrow.")
    ],
    folder: _Folder,
    options: PackOptions,
    form: TextFormat,
    image: Annotated[str | None, _column("Of paths, relative to the table's folder.")] = None,
    text: Annotated[str | None, _column("Of texts.", "by its name, as caption")] = None,
    label: Annotated[str | None, _column("Of numbers or names; texts may be missing.")] = None,
    field: _Field = None,
) -> None:
    """Images with texts or labels, listed in a .csv, .tsv, .jsonl or .parquet.

    Packs the images that a table names, with their texts: fields jpg (or the like), txt, and json
    for the other columns, of which each value stays the text that it is.
    """
    from dist_contrastive.data.packing.pairs import pack_pairs

    columns = {"image": image, "text": text, "label": label}
    packed = pack_pairs(source, folder, options, form=form, field=field, **columns)
    _report(folder, packed, has_field=True)


@app.command(
    "dataset",
    epilog=examples(
        "dist-contrastive shards pack dataset mnist.parquet data/mnist",
        "dist-contrastive shards pack dataset uoft-cs/cifar10 data/cifar --split train",
    ),
)
@with_options(_pack_options)
@with_options(_text_format, "form")
def _pack_dataset(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of save_to_disk; file or folder of .parquet, .json, .csv or .arrow; hub "
            "name.",
        ),
    ],
    folder: _Folder,
    options: PackOptions,
    form: TextFormat,
    split: Annotated[str | None, typer.Option(help="Needed if there are several.")] = None,
    config: Annotated[
        str | None, typer.Option(help="Of a data set of the hub that has several.")
    ] = None,
    image: Annotated[str | None, _column("Of images.", "by its type")] = None,
    text: Annotated[str | None, _column("Of texts.", "by its name")] = None,
    label: Annotated[str | None, _column("Of labels.", "by its name or type")] = None,
    drop: Annotated[list[str] | None, _column("Left out; may be repeated.")] = None,
    field: _Field = None,
) -> None:
    """A data set of the library datasets: saved, in files, or of the hub.

    Columns are found by kind and name; '-' as a COLUMN is none.
    """
    from dist_contrastive.data.packing.hub import pack_dataset

    columns = {"image": image, "text": text, "label": label}
    names = {"split": split, "config": config, "field": field, **columns}
    packed = pack_dataset(source, folder, options, drop=drop or [], form=form, **names)
    _report(folder, packed, has_field=True)


@app.command(
    "arrays",
    epilog=examples(
        "dist-contrastive shards pack arrays data/arrays --image x.npz:train --label y.npy"
    ),
)
@with_options(_pack_options)
def _pack_arrays(
    folder: _Folder,
    options: PackOptions,
    image: Annotated[str | None, _file("uint8 [n,H,W], [n,C,H,W] or [n,H,W,C].")] = None,
    array: Annotated[str | None, _file("Numbers [n,...].")] = None,
    label: Annotated[str | None, _file("Numbers [n].")] = None,
) -> None:
    """Arrays of NumPy: images, vectors, labels.

    Packs the rows of arrays, each FILE.npy or FILE.npz:NAME. Images of uint8 become png, other
    numbers npy, whole labels cls; json has the row and the label.
    """
    from dist_contrastive.data.packing.arrays import pack_arrays

    packed = pack_arrays(folder, options, image=image, array=array, label=label)
    _report(folder, packed, has_field=False)


def _add_demo(name: str, write: Callable[[Any, Path], dict[str, Any]], what: str) -> None:
    def pack(
        folder: Annotated[
            Path, typer.Argument(metavar="FOLDER", help="Gets one folder of shards per split.")
        ],
    ) -> None:
        from dist_contrastive import data

        for split, index in write(data, folder).items():
            shards = len(index.shard_samples)
            print(f"{folder / split}: {len(index)} samples in {shards} shards")

    epilog = examples(f"dist-contrastive shards pack {name} data/{name}")
    app.command(name, help=f"{what[0].upper()}{what[1:]}.", epilog=epilog)(pack)


for _name, (_write, _what) in _DEMOS.items():
    _add_demo(_name, _write, _what)


@with_options(_merge_options)
def merge(
    patterns: Patterns,
    folder: _Folder,
    options: PackOptions,
    prefix_keys: Annotated[
        bool, typer.Option("--prefix-keys", help="Put the shard's name before every key.")
    ] = False,
) -> None:
    """Write several shards as fewer, larger ones.

    Copies samples to shards of another size, in their order, without decoding.
    """
    from dist_contrastive.data.packing.merge import merge_shards

    packed = merge_shards(patterns, folder, options, prefix_keys=prefix_keys)
    _report(folder, packed, has_field=False)


def _report(folder: Path, packed: "Packed", has_field: bool) -> None:
    """Print what was written, and what was not; log why samples were left out."""
    from dist_contrastive.data.classes import named_classes
    from dist_contrastive.data.packing.images import IMAGE_FIELDS
    from dist_contrastive.data.shards.locations import counted

    index, counts = packed.index, packed.field_counts()
    for reason in packed.left_out:
        _log.warning("left out: %s", reason)
    left_out = f", {len(packed.left_out)} left out" if packed.left_out else ""
    fields = ", ".join(f"{n} ({c})" if c < len(index) else n for n, c in counts.items())
    print(f"{folder}: {len(index)} samples in {len(index.shards)} shards{left_out}")
    print(f"fields: {fields}")
    if not_packed := +packed.not_packed:
        print(f"left out: {counted(not_packed)}")
    if index.classes:
        print(f"classes: {named_classes(index.classes)}")
    for trait, count in packed.traits.items():
        print(f"{count} images {trait}")
    images = [name for name in IMAGE_FIELDS if name in counts]
    if len(images) > 1 and has_field:
        most = max(images, key=lambda name: counts[name])
        print(
            f"several image fields: data.image=[{', '.join(images)}] reads all, or "
            f"--field {most} gives all images that one"
        )
