"""Commands for shards of samples: ``dist-contrastive shards``."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_contrastive.cli import packing
from dist_contrastive.cli.app import examples, new_app
from dist_contrastive.cli.packing import Patterns

_log = logging.getLogger(__name__)
app = new_app("Make, index, merge and check shards of samples.")
app.add_typer(packing.app, name="pack", subcommand_metavar="KIND [ARGS]...")
app.command(
    "merge",
    epilog=examples("dist-contrastive shards merge 'small-{000..099}.tar' merged --shard-mb 512"),
)(packing.merge)

_Location = Annotated[
    str,
    typer.Argument(
        metavar="LOCATION",
        help="Folder of .tar shards, a pattern such as 'data/train-{00000..00099}.tar', or a URL; "
        "for inspect and verify an index file, too.",
    ),
]


@app.command("list", epilog=examples("dist-contrastive shards list data/digits/train"))
def _list(patterns: Patterns) -> None:
    """List shards: sizes, samples, and their sums."""
    from dist_contrastive.data.shards.inspect import ShardSize, list_shards
    from dist_contrastive.tables import print_table

    rows, problems = list_shards(patterns)
    sizes, counts = [row.size for row in rows], [row.samples for row in rows]
    size = None if None in sizes else sum(size or 0 for size in sizes)
    samples = None if None in counts else sum(count or 0 for count in counts)
    rows.append(ShardSize(f"{len(rows)} shards", size, samples))
    print_table(
        ["shard", "MiB", "samples"],
        [
            (
                row.shard,
                row.size if row.size is None else f"{row.size / 2**20:,.1f}",
                row.samples if row.samples is None else f"{row.samples:,}",
            )
            for row in rows
        ],
    )
    for problem in problems:
        _log.warning("no samples counted: %s", problem)


@app.command("index", epilog=examples("dist-contrastive shards index data/photos"))
def _index(
    location: _Location,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="To write.", show_default="index.npz in the folder"),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Read all shards, not only those that have changed.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1024,
            help="Processes that read shards.",
            show_default="threads of one",
        ),
    ] = None,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Index of some of the shards, as other machines made it; "
            "may be given several times.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write the index that the stream reads by."""
    from dist_contrastive.data import index_folder
    from dist_contrastive.data.progress import progress_bar
    from dist_contrastive.data.shards.locations import counted, other_files
    from dist_contrastive.data.shards.tars import LINKS, REMEDY_OF_LINKS

    read = 0

    def progress(items: Iterator[Any], total: int) -> Iterator[Any]:
        nonlocal read
        read = total
        return progress_bar(items, total, "indexing") if total else items

    index = index_folder(
        location, out, full=full, workers=workers, reuse=reuse or (), progress=progress
    )
    shards = len(index.shard_samples)
    print(f"{location}: {len(index)} samples in {shards} shards, of which {read} were read")
    if left_out := index.left_out + other_files(location):
        print(f"left out: {counted(left_out)}")
    if left_out[LINKS]:
        print(f"links are not read: {REMEDY_OF_LINKS}")


@app.command(
    "inspect",
    epilog=examples("dist-contrastive shards inspect data/digits/train --sheet digits.png"),
)
def _inspect(
    location: _Location,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw some samples there.")
    ] = None,
) -> None:
    """Show what shards hold."""
    from dist_contrastive.data import load_index
    from dist_contrastive.data.shards.inspect import inspect_shards
    from dist_contrastive.errors import DataError

    index = load_index(location)
    if sheet is not None:
        try:
            sheet.parent.mkdir(parents=True, exist_ok=True)
            sheet.touch()
        except OSError as error:
            raise DataError(
                f"--sheet {sheet} cannot be written ({error.strerror}); give another file"
            ) from error
    print(inspect_shards(index).text())
    if sheet is not None:
        from dist_contrastive import report

        drawn = report.sample_sheet(index, sheet, title=location)
        print(f"\n{drawn} of {len(index)} samples are drawn in {sheet}")


@app.command("verify", epilog=examples("dist-contrastive shards verify data/photos --decode"))
def _verify(
    location: _Location,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every field, too.")] = False,
) -> int:
    """Read shards whole and name all that is wrong."""
    from dist_contrastive.data.progress import progress_bar
    from dist_contrastive.data.shards.verify import verify_shards
    from dist_contrastive.errors import DataError

    report = verify_shards(
        location, decode, progress=lambda items, total: progress_bar(items, total, "verifying")
    )
    for problem in report.problems:
        _log.error("%s", problem)
    for note in report.notes:
        _log.warning("note: %s", note)
    done = [f"{report.samples} samples in {report.shards} shards read"]
    if decode:
        done.append("every field decoded")
    done.append(f"compared with {', '.join(report.index_files) or 'no index'}")
    count = len(report.problems)
    verdict = f"{count} problem{'s' * (count > 1)}" if count else "sound"
    print(f"{location}: {', '.join(done)}: {verdict}")
    return DataError.exit_code if count else 0
