"""Time and memory of `eval`: of 7,529 emoji beside another checkout, and of many images.

    python benchmarks/evaluation.py emoji OTHER [--cache DIR]    OTHER: a checkout of another commit
    python benchmarks/evaluation.py large [--images 100000]

The emoji are those of npm's emoji-datasource-{apple,google,twitter,facebook}, version 15, of 64 x
64, fetched once by npm into the cache; every eighth, by the checksum of its code point, is held
out. The same run, of one step, is measured by both checkouts, of one thread each, one after the
other. What is compared is the time of the processor, which a busy machine changes least. The
encoder's share is that of `--only rankme`, which measures next to nothing, less that of the same of
64 samples of each split, which is the start.

Of many images, which are made here and packed, it is the largest memory of the process, and how
much that is above one of 64 samples of each split, which has all modules and the network.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
VENDORS = ("apple", "google", "twitter", "facebook")
HELD_OUT = 8  # one in so many
SIDE, CLASSES = 64, 10
SHARD = 10_000  # images
EVERYTHING = ("--baselines",)  # as the checkout before, which knew no less
FEW = ("--limit", "64")
CONFIG = """
run_dir: {run}
data: {{train: {data}/train, test: {data}/test, image: png, label: {label}, num_classes: {classes},
        image_size: 64, image_channels: 3, global_batch_size: 64}}
task:
  name: two_view
  encoder: {{name: residual, widths: {widths}}}
  head: {{hidden: 64, out: 32}}
  loss: {{name: ntxent, temperature: 0.2}}
train: {{steps: 1, save_every: 1}}
"""


class Cost(NamedTuple):
    """What a command took."""

    cpu_s: float
    peak_mib: float


def main() -> None:
    """Measure one part, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    emoji = parts.add_parser("emoji")
    emoji.add_argument("other", type=Path, help="a checkout of another commit")
    emoji.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "emoji-datasource")
    emoji.add_argument("--limit", type=int, help="samples of each split; all")
    large = parts.add_parser("large")
    large.add_argument("--images", type=int, default=100_000)
    large.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.part == "emoji":
            measure_emoji(args.other.resolve(), args.cache, Path(folder), args.limit)
        else:
            measure_large(args.images, args.threads, Path(folder))


# -------------------------------------------------------------------------------- emoji


def measure_emoji(other: Path, cache: Path, folder: Path, limit: int | None) -> None:
    """The table of both checkouts."""
    counts = sort_emoji(fetch(cache), folder / "images")
    if limit is not None:
        counts = tuple(min(count, limit) for count in counts)
    for split in ("train", "test"):
        command = ["shards", "pack", "images", folder / "images" / split, folder / split]
        classes = ["--classes-of", folder / "train"] if split == "test" else []
        call(ROOT, [*command, "--field", "png", *classes])
    runs = [folder / "before", folder / "now"]
    train(other, folder, runs[0], label="cls", widths="[24, 48, 96]")
    shutil.copytree(runs[0], runs[1])
    some = [] if limit is None else ["--limit", limit]
    before = call(other, ["eval", runs[0], *some])
    now = {
        name: call(ROOT, ["eval", runs[1], *some, *flags])
        for name, flags in (
            ("few", ("--only", "rankme", *FEW)),
            ("encoder", ("--only", "rankme")),
            ("usual", ()),
            ("all", EVERYTHING),
        )
    }
    print(f"{sum(counts)} emoji, {counts[0]} to learn from, 64 x 64\n")
    print("| eval of emoji | s of a processor, before / now | times | peak MiB, before / now |")
    print("| --- | --- | --- | --- |")
    for name, key in (("with raw pixels beside", "all"), ("as it is without a word", "usual")):
        taken, peaks = (
            f"{before.cpu_s:.0f} / {now[key].cpu_s:.0f}",
            [before.peak_mib, now[key].peak_mib],
        )
        times = before.cpu_s / now[key].cpu_s
        print(f"| {name} | {taken} | {times:.1f} | {peaks[0]:.0f} / {peaks[1]:.0f} |")
    encoder, start = now["encoder"].cpu_s - now["few"].cpu_s, now["few"].cpu_s
    rest = {key: now[key].cpu_s - encoder - start for key in ("all", "usual")}
    print(
        f"\nNow {start:.0f} s are the start, {encoder:.0f} s reading and encoding, the measures "
        f"{rest['all']:.0f} s and {rest['usual']:.0f} s.\n"
    )
    print_values(*(json.loads((run / "eval.json").read_text()) for run in runs))


def print_values(before: list[dict], now: list[dict]) -> None:
    """Both tables side by side."""
    found = {line["name"]: line for line in now}
    print("| measure | before | now | raw pixels, before | now |")
    print("| --- | --- | --- | --- | --- |")
    for line in before:
        values = [x["value"] for x in (line, found[line["name"]])]
        pixels = [x["beside"].get("raw pixels", np.nan) for x in (line, found[line["name"]])]
        print(f"| {line['name']} | " + " | ".join(f"{x:.4f}" for x in (*values, *pixels)) + " |")


def fetch(cache: Path) -> Path:
    """The folder of the pictures of all vendors, as npm has them."""
    for vendor in VENDORS:
        folder = cache / vendor
        if (folder / "package" / "emoji.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        package = f"emoji-datasource-{vendor}@15"
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True)
        for archive in folder.glob("*.tgz"):
            with tarfile.open(archive) as tar:
                wanted = [x for x in tar if "/64/" in x.name or x.name.endswith("/emoji.json")]
                tar.extractall(folder, wanted, filter="data")
            archive.unlink()
    return cache


def sort_emoji(cache: Path, folder: Path) -> tuple[int, ...]:
    """FOLDER/train|test/CATEGORY/VENDOR-CODE.png; how many are in each split."""
    counts = dict.fromkeys(("train", "test"), 0)
    for vendor in VENDORS:
        package = cache / vendor / "package"
        for one in json.loads((package / "emoji.json").read_text()):
            picture = package / "img" / vendor / "64" / one["image"]
            if picture.exists():
                held_out = zlib.crc32(one["unified"].encode()) % HELD_OUT == 0
                split = "test" if held_out else "train"
                category = folder / split / one["category"]
                category.mkdir(parents=True, exist_ok=True)
                shutil.copy(picture, category / f"{vendor}-{picture.name}")
                counts[split] += 1
    return tuple(counts.values())


# -------------------------------------------------------------------------------- large


def measure_large(images: int, threads: int, folder: Path) -> None:
    """The table of many synthetic images."""
    sys.path.insert(0, str(ROOT))
    held_out = images // 10
    for split, count in (("train", images - held_out), ("test", held_out)):
        write_images(folder / split, count, len(split))
    train(ROOT, folder, folder / "run", label="json.label", widths="[8, 16, 32]")
    few = call(ROOT, ["eval", folder / "run", *FEW], threads)
    whole = call(ROOT, ["eval", folder / "run"], threads)
    print(f"| images of {SIDE} x {SIDE} | s of a processor | peak MiB | above that of 64 and 64 |")
    print("| --- | --- | --- | --- |")
    grown = whole.peak_mib - few.peak_mib
    print(f"| {images} | {whole.cpu_s:.0f} | {whole.peak_mib:.0f} | {grown:.0f} |")


def write_images(folder: Path, count: int, seed: int) -> None:
    """Shards of squares on a ground, each of a colour; the class is the place of the square."""
    from dist_contrastive.data import index_folder
    from dist_contrastive.data.shards.tars import write_samples

    folder.mkdir()
    random = np.random.default_rng(seed)

    def sample(number: int) -> dict[str, object]:
        label = int(random.integers(CLASSES))
        ground, colour, shift = (
            random.integers(0, 256, 3),
            random.integers(0, 256, 3),
            random.integers(-4, 5),
        )
        image = np.broadcast_to(ground[:, None, None], (3, SIDE, SIDE)).astype(np.uint8)
        top, left = 8 + 24 * (label // 5) + shift, 4 + 11 * (label % 5)
        image[:, top : top + 12, left : left + 12] = colour[:, None, None]
        return {"__key__": f"{number:07d}", "png": image, "json": {"label": label}}

    for first in range(0, count, SHARD):
        numbers = range(first, min(first + SHARD, count))
        write_samples(folder / f"{first:07d}.tar", map(sample, numbers))
    index_folder(folder)


# ----------------------------------------------------------------------------- commands


def train(checkout: Path, data: Path, run: Path, label: str, widths: str) -> None:
    """A run of one step: what is measured takes as long as after a thousand."""
    config = data / "config.yaml"
    config.write_text(
        CONFIG.format(run=run, data=data, label=label, classes=CLASSES, widths=widths)
    )
    call(checkout, ["train", config])


def call(checkout: Path, arguments: Sequence[object], threads: int = 1) -> Cost:
    """A command of a checkout, in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    argv = [sys.executable, "-m", "dist_contrastive", *map(str, arguments)]
    process = subprocess.Popen(
        argv,
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(argv)} failed:\n{printed}")
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


if __name__ == "__main__":
    main()
