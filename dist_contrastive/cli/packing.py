"""Commands that make shards: ``dist-contrastive shards pack``, ``merge`` and ``list``."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_contrastive.data.packing.options import PackOptions
    from dist_contrastive.data.packing.writer import Packed

    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# Data sets that `shards pack` makes: how, given dist_contrastive.data and a folder, and what.
_KNOWN: dict[str, tuple[Callable[[Any, Path], dict[str, Any]], str]] = {
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


def add_commands(commands: "_Commands") -> None:
    """Add them to the parser of `shards`."""
    pack = commands.add_parser(
        "pack",
        help="write a data set as shards, and index them",
        description="Write a data set as plain webdataset tars of bounded size, with an index. "
        "Each KIND has its own --help.",
    )
    kinds = pack.add_subparsers(required=True, metavar="KIND")
    _add_images(kinds)
    _add_pairs(kinds)
    _add_dataset(kinds)
    _add_arrays(kinds)
    for name, (_, what) in _KNOWN.items():
        known = kinds.add_parser(name, help=what, description=f"Pack {what}.")
        known.add_argument("folder", type=Path, help="gets one folder of shards per split")
        known.set_defaults(command=_pack_known, source=name)
    _add_merge(commands)
    listing = commands.add_parser("list", help="list shards: sizes, samples, and their sums")
    listing.add_argument("patterns", nargs="+", metavar="PATTERN", help=_PATTERN_HELP)
    listing.set_defaults(command=_list)


_PATTERN_HELP = "folder, shard, or pattern such as 'train-{000..099}.tar'; or a URL of these"


def _add_images(kinds: "_Commands") -> None:
    images = kinds.add_parser(
        "images",
        help="a folder of images; its sub-folders are classes",
        description="Pack the images of a folder and of those in it. Their bytes are copied. If "
        "every image lies in a folder directly in SOURCE, these folders are classes, and samples "
        "get the fields cls and json.label.",
    )
    images.add_argument("source", type=Path, metavar="SOURCE", help="folder of images")
    _add_target(images)
    _add_field(images)
    _add_options(images)
    images.set_defaults(command=_pack_images)


def _add_pairs(kinds: "_Commands") -> None:
    pairs = kinds.add_parser(
        "pairs",
        help="images with texts or labels, listed in a .jsonl, .csv or .tsv",
        description="Pack the images that a table names, with their texts: fields jpg (or the "
        "like), txt, and json for the other columns.",
    )
    pairs.add_argument("source", type=Path, metavar="FILE", help=".jsonl, .csv or .tsv")
    _add_target(pairs)
    pairs.add_argument("--image", metavar="COLUMN", help="of paths, seen from the table's folder")
    pairs.add_argument("--text", metavar="COLUMN", help="default: found by its name, as caption")
    pairs.add_argument("--label", metavar="COLUMN", help="of whole numbers; texts may be missing")
    _add_field(pairs)
    _add_options(pairs)
    pairs.set_defaults(command=_pack_pairs)


def _add_dataset(kinds: "_Commands") -> None:
    dataset = kinds.add_parser(
        "dataset",
        help="a data set of the library datasets: saved, in files, or of the hub",
        description="Pack a data set that the library `datasets` reads. Columns are found by kind "
        "and name; '-' as a COLUMN is none.",
    )
    dataset.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of save_to_disk; file or folder of .parquet, .json, .csv or .arrow; hub name",
    )
    _add_target(dataset)
    dataset.add_argument("--split", help="needed if there are several")
    dataset.add_argument("--config", help="of a data set of the hub that has several")
    for role in ("image", "text", "label"):
        dataset.add_argument(f"--{role}", metavar="COLUMN", help="default: found")
    dataset.add_argument(
        "--drop", action="append", default=[], metavar="COLUMN", help="left out; may be repeated"
    )
    _add_field(dataset)
    _add_options(dataset)
    dataset.set_defaults(command=_pack_dataset)


def _add_arrays(kinds: "_Commands") -> None:
    arrays = kinds.add_parser(
        "arrays",
        help="arrays of NumPy: images, vectors, labels",
        description="Pack the rows of arrays, each FILE.npy or FILE.npz:NAME. Images of uint8 "
        "become png, other numbers npy, whole labels cls; json tells the row and the label.",
    )
    _add_target(arrays)
    arrays.add_argument("--image", metavar="FILE", help="uint8 [n,H,W], [n,C,H,W] or [n,H,W,C]")
    arrays.add_argument("--array", metavar="FILE", help="numbers [n,...]")
    arrays.add_argument("--label", metavar="FILE", help="numbers [n]")
    _add_options(arrays)
    arrays.set_defaults(command=_pack_arrays)


def _add_merge(commands: "_Commands") -> None:
    merge = commands.add_parser(
        "merge",
        help="write several shards as fewer, larger ones",
        description="Copy samples to shards of another size, in their order, without decoding.",
    )
    merge.add_argument("patterns", nargs="+", metavar="PATTERN", help=_PATTERN_HELP)
    _add_target(merge)
    merge.add_argument(
        "--prefix-keys", action="store_true", help="put the shard's name before every key"
    )
    _add_bounds(merge)
    merge.set_defaults(command=_merge)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new or empty; gets the shards")


def _add_field(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--field", metavar="NAME", help="for all images; default: by format, jpg, png, ..."
    )


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("shards").add_argument
    add("--name", help="of shards, NAME-00000.tar; default: that of FOLDER")
    add("--samples-per-shard", type=int, default=10_000, metavar="N", help="at most (10000)")
    add("--shard-mb", type=float, default=256.0, metavar="M", help="MiB of a tar, at most (256)")
    add("--overwrite", action="store_true", help="replace shards of this NAME in FOLDER")


def _add_options(parser: argparse.ArgumentParser) -> None:
    _add_bounds(parser)
    add = parser.add_argument_group("samples").add_argument
    add("--seed", type=int, default=0, metavar="S", help="of the shuffled order (0)")
    add("--no-shuffle", action="store_true", help="keep the order of the source")
    add("--workers", type=int, metavar="W", help="threads (one for each CPU)")
    add(
        "--verify",
        choices=["open", "decode"],
        default="open",
        help="open images (default), or decode them: slower, finds truncated JPEGs",
    )
    add("--skip-unreadable", action="store_true", help="leave out what cannot be read, and say so")


def _options(args: argparse.Namespace) -> "PackOptions":
    from dist_contrastive.data.packing.options import PackOptions, ShardBounds

    bounds = ShardBounds(args.samples_per_shard, args.shard_mb)
    common = {"name": args.name, "bounds": bounds, "overwrite": args.overwrite}
    if args.command is _merge:
        return PackOptions(**common)
    return PackOptions(
        **common,
        workers=args.workers,
        seed=None if args.no_shuffle else args.seed,
        verify=args.verify,
        skip_unreadable=args.skip_unreadable,
    )


def _pack_known(args: argparse.Namespace) -> int:
    from dist_contrastive import data

    write, _ = _KNOWN[args.source]
    for split, index in write(data, args.folder).items():
        print(f"{args.folder / split}: {len(index)} samples in {len(index.shard_samples)} shards")
    return 0


def _pack_images(args: argparse.Namespace) -> int:
    from dist_contrastive.data.packing.images import pack_images

    packed = pack_images(args.source, args.folder, _options(args), args.field)
    if "cls" not in packed.index.fields and any(path.is_dir() for path in args.source.iterdir()):
        print("no classes: they are taken from folders if every image lies in one, one level deep")
    return _report(args, packed)


def _pack_pairs(args: argparse.Namespace) -> int:
    from dist_contrastive.data.packing.pairs import pack_pairs

    columns = {"image": args.image, "text": args.text, "label": args.label}
    packed = pack_pairs(args.source, args.folder, _options(args), **columns, field=args.field)
    return _report(args, packed)


def _pack_dataset(args: argparse.Namespace) -> int:
    from dist_contrastive.data.packing.hub import pack_dataset

    names = ("split", "config", "image", "text", "label", "drop", "field")
    chosen = {name: getattr(args, name) for name in names}
    return _report(args, pack_dataset(args.source, args.folder, _options(args), **chosen))


def _pack_arrays(args: argparse.Namespace) -> int:
    from dist_contrastive.data.packing.arrays import pack_arrays

    files = {"image": args.image, "array": args.array, "label": args.label}
    return _report(args, pack_arrays(args.folder, _options(args), **files))


def _merge(args: argparse.Namespace) -> int:
    from dist_contrastive.data.packing.merge import merge_shards

    options = _options(args)
    packed = merge_shards(args.patterns, args.folder, options, prefix_keys=args.prefix_keys)
    return _report(args, packed)


def _report(args: argparse.Namespace, packed: "Packed") -> int:
    """What was written, and what was left out."""
    from dist_contrastive.data.packing.image_files import IMAGE_FIELDS

    index = packed.index
    for reason in packed.left_out:
        print(f"left out: {reason}", file=sys.stderr)
    left_out = f", {len(packed.left_out)} left out" if packed.left_out else ""
    counts = dict(zip(index.fields, index.field_counts().sum(axis=0).tolist(), strict=True))
    fields = ", ".join(f"{n} ({c})" if c < len(index) else n for n, c in counts.items())
    print(f"{args.folder}: {len(index)} samples in {len(index.shards)} shards{left_out}")
    print(f"fields: {fields}")
    images = [name for name in IMAGE_FIELDS if name in counts]
    if len(images) > 1 and hasattr(args, "field"):
        most = max(images, key=lambda name: counts[name])
        print(f"a config names one image field: --field {most} gives all images that one")
    return 0


def _list(args: argparse.Namespace) -> int:
    from dist_contrastive.data.shards.inspect import list_shards

    rows, problems = list_shards(args.patterns)
    width = max(len(row.shard) for row in rows)
    for row in rows:
        print(f"{row.shard:{width}}  {_mib(row.size)}  {_samples(row.samples)}")
    sizes, counts = [row.size for row in rows], [row.samples for row in rows]
    size = None if None in sizes else sum(size or 0 for size in sizes)
    samples = None if None in counts else sum(count or 0 for count in counts)
    total = f"{len(rows)} shards"
    print(f"{total:{width}}  {_mib(size)}  {_samples(samples)}")
    for problem in problems:
        print(f"no samples counted: {problem}", file=sys.stderr)
    return 0


def _mib(size: int | None) -> str:
    return f"{'?' if size is None else f'{size / 2**20:,.1f}':>10} MiB"


def _samples(count: int | None) -> str:
    return f"{'?' if count is None else f'{count:,}':>11} samples"
