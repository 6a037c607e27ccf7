"""Throughput of `embed` over that of the bare encoder, on the same images.

    python benchmarks/embed.py [--images 256] [--side 256] [--encoder resnet50] [--threads 1 2]

Photograph-like JPEGs of SIDE pixels, packed in shards and as they lie in a folder; a run whose
encoder is torchvision's, its weights random, sees them at 224 pixels. Bare: the encoder alone, in
eval mode without gradients, over batches that are in memory already, as many images at a time as
`embed` takes. Both in one process, turn by turn; the medians of turns of bare seconds over seconds
of `embed`, from the first image that is read to the last part that is written. With one thread for
the encoder the other core decodes, as CPUs do beside a GPU; with two, decoding takes its time from
the encoder. Processor time counts all threads of the process.
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_contrastive.models import Encoder

SIZE = 224  # pixels that the encoder sees


class TorchvisionResNet(Encoder):
    """A ResNet of torchvision without its classifier, with random weights."""

    class Config(Encoder.Config):
        """Which."""

        arch: str = "resnet50"

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        super().__init__()
        from torchvision import models

        self.net = models.get_model(config.arch, weights=None)
        self.dim = self.net.fc.in_features
        self.net.fc = torch.nn.Identity()

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--side", type=int, default=256, help="pixels of the stored images")
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    print("| encoder | threads | source | bare images/s | embed / bare | of processor time |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "images", args.images, args.side)
        pack(folder)
        train(folder, args.encoder)
        for threads, source in itertools.product(args.threads, ("shards", "images")):
            torch.set_num_threads(threads)
            print(row(folder, source, threads, args), flush=True)


def make_images(folder: Path, count: int, side: int) -> None:
    """Noise with the spectrum of photographs: JPEGs of it are as large, and decode as slowly."""
    folder.mkdir()
    random = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij"))
    for number in range(count):
        noise = np.fft.rfft2(random.normal(size=(3, side, side))) / np.maximum(frequency, 1 / side)
        pixels = np.fft.irfft2(noise, s=(side, side)).transpose(1, 2, 0)
        pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:05d}.jpg", quality=90)


def pack(folder: Path) -> None:
    """The same images in shards."""
    from dist_contrastive.cli import main

    with contextlib.redirect_stdout(None):
        code = main(["shards", "pack", "images", str(folder / "images"), str(folder / "shards")])
    assert code == 0


def train(folder: Path, encoder: str) -> None:
    """A run of one step on a few images."""
    import dist_contrastive

    config = {
        "run_dir": str(folder / "run"),
        "data": {
            "train": str(folder / "shards"),
            "image": ["png", "jpg"],
            "image_size": SIZE,
            "image_channels": 3,
            "global_batch_size": 4,
            "num_workers": 0,
            "lanes": 4,
        },
        "task": {
            "name": "two_view",
            "encoder": {"name": f"{Path(__file__).stem}:TorchvisionResNet", "arch": encoder},
            "loss": {"name": "ntxent"},
        },
        "train": {"steps": 1, "trackers": []},
    }
    assert dist_contrastive.train(config) == 0


def row(folder: Path, source: str, threads: int, args: argparse.Namespace) -> str:
    """A line of the table."""
    from dist_contrastive.embed import BATCH, _Work, embed

    batches = [torch.rand(n, 3, SIZE, SIZE) for n in _sizes(args.images, BATCH)]
    encoder = TorchvisionResNet(TorchvisionResNet.Config(name="", arch=args.encoder), ()).eval()

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                encoder(batch)

    measured: list[tuple[float, float]] = []
    make_parts = _Work.make_parts

    def timed_parts(work: _Work, numbers: Iterable[int]) -> None:
        measured.append(spent(partial(make_parts, work, numbers)))

    turns = []
    encoder(batches[0][:8])  # the first call is slower
    for turn in range(args.turns):
        out = folder / f"{source}-{threads}-{turn}.npy"
        alone = spent(bare)
        with mock.patch.object(_Work, "make_parts", timed_parts):
            embed(folder / "run", str(folder / source), out)
        turns.append((*alone, *measured.pop()))
        assert len(np.load(out)) == args.images
    bare_s = statistics.median(turn[0] for turn in turns)
    wall = statistics.median(turn[0] / turn[2] for turn in turns)
    processor = statistics.median(turn[1] / turn[3] for turn in turns)
    rate = args.images / bare_s
    return f"| {args.encoder} | {threads} | {source} | {rate:.2f} | {wall:.3f} | {processor:.3f} |"


def _sizes(count: int, batch: int) -> list[int]:
    return [min(batch, count - begin) for begin in range(0, count, batch)]


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of the processor."""
    begin = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


if __name__ == "__main__":
    main()
