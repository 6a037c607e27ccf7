"""Commands that index shards and look into them: ``dist-contrastive shards index``, ``inspect``,
``verify``."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LOCATION = "folder of .tar shards, a pattern such as 'data/train-{00000..00099}.tar', or a URL"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add them to the parser of `shards`."""
    index = commands.add_parser("index", help="write the index that the stream reads by")
    index.add_argument("location", metavar="LOCATION", help=_LOCATION)
    index.add_argument("--out", type=Path, metavar="FILE", help="default: index.npz in the folder")
    index.add_argument(
        "--full", action="store_true", help="read all shards, not only those that have changed"
    )
    index.set_defaults(command=_index)

    inspect = commands.add_parser("inspect", help="tell what shards hold")
    inspect.add_argument("location", metavar="LOCATION", help=f"{_LOCATION}; or an index file")
    inspect.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw some samples there")
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser("verify", help="read shards whole and tell all that is wrong")
    verify.add_argument("location", metavar="LOCATION", help=f"{_LOCATION}; or an index file")
    verify.add_argument("--decode", action="store_true", help="decode every field too")
    verify.set_defaults(command=_verify)


def _index(args: argparse.Namespace) -> int:
    from dist_contrastive.data import index_folder
    from dist_contrastive.data.progress import shown

    read = 0

    def progress(items: Iterator[Any], total: int) -> Iterator[Any]:
        nonlocal read
        read = total
        return shown(items, total, "indexing") if total else items

    index = index_folder(args.location, args.out, full=args.full, progress=progress)
    shards = len(index.shard_samples)
    print(f"{args.location}: {len(index)} samples in {shards} shards, of which {read} were read")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from dist_contrastive.data import load_index
    from dist_contrastive.data.shards.inspect import inspect_shards
    from dist_contrastive.errors import DataError

    index = load_index(args.location)
    if args.sheet is not None:
        try:
            args.sheet.parent.mkdir(parents=True, exist_ok=True)
            args.sheet.touch()
        except OSError as error:
            raise DataError(
                f"--sheet {args.sheet} cannot be written ({error.strerror}); give another file"
            ) from error
    print(inspect_shards(index).text())
    if args.sheet is not None:
        from dist_contrastive import report

        drawn = report.sample_sheet(index, args.sheet, title=args.location)
        print(f"\n{drawn} of {len(index)} samples are drawn in {args.sheet}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from dist_contrastive.data.progress import shown
    from dist_contrastive.data.shards.verify import verify_shards
    from dist_contrastive.errors import DataError

    found = verify_shards(
        args.location,
        args.decode,
        progress=lambda items, total: shown(items, total, "verifying"),
    )
    for problem in found.problems:
        print(problem, file=sys.stderr)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    done = [f"{found.samples} samples in {found.shards} shards read"]
    if args.decode:
        done.append("every field decoded")
    done.append(f"compared with {', '.join(found.index_files) or 'no index'}")
    count = len(found.problems)
    verdict = f"{count} problem{'s' * (count > 1)}" if count else "sound"
    print(f"{args.location}: {', '.join(done)}: {verdict}")
    return DataError.exit_code if count else 0
