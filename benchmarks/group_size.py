"""Whether generators get better when more points interact, at the same total batch.

    python benchmarks/group_size.py [--only SETUP ...] [--seeds N] [--folder runs/group_size]
                                    [--picture docs/group_size.png]

`task.groups` cuts the global batch into parts that do not interact; all else is the same: runs with
the same seed have the same initial weights, noise and batches. Points in the plane, and digits by
class, where only the points of one class and part interact and the force acts on pixels. Measured
after training, within classes: distances between generated samples and held-out data, mean ±
standard deviation over seeds; the same of as many training data is what can be expected at best.

Runs are kept in the folder: what is trained and measured there is not done again, and an
interrupted run goes on. An hour of one core.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dist_contrastive import config as configs
from dist_contrastive import evaluation, trainer
from dist_contrastive.config import RunConfig
from dist_contrastive.data import pack_digits, pack_toy
from dist_contrastive.data.fields import Samples
from dist_contrastive.evaluate import read_splits
from dist_contrastive.evaluation.splits import Splits, labels_of
from dist_contrastive.runs import load_weights
from dist_contrastive.tasks import Drift

CONFIGS = Path(__file__).parents[1] / "configs"
TINY_STEPS = 2


def to_nearest_sample(samples: Tensor, data: Tensor) -> float:
    """Mean distance of a datum from the nearest sample: large where samples leave data out."""
    return torch.cdist(data.flatten(1), samples.flatten(1)).amin(1).mean().item()


MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "energy distance": evaluation.energy_distance,
    "datum to nearest sample": to_nearest_sample,
}

Results = dict[str, float]
"""A distance by its name."""


class Setup(NamedTuple):
    """What is swept, and what stays."""

    title: str
    data: str  # as the packer calls it
    config: str
    classes: int
    batch: int
    groups: tuple[int, ...]
    steps: int
    seeds: int
    overrides: tuple[str, ...]

    def interacting(self, groups: int) -> int:
        """Generated points that interact, on average; as many of data come to them."""
        return round(self.batch / groups / self.classes)


SETUPS = {
    "eight_gaussians": Setup(
        "eight Gaussians", "eight_gaussians", "eight_gaussians", 1,
        512, (1, 4, 16, 64, 128), 600, 5, (),
    ),
    "digits": Setup(
        "digits, by class", "digits", "digits_generator", 10,
        512, (1, 4, 16), 400, 3,
        ("task={name: drift, generator: {name: conv, noise_dim: 16, width: 16},"
         " features: [{name: pixels}], loss: {preset: paper}, ema: 0.99}",
         "optim={lr: 4.0e-3, warmup_steps: 30, weight_decay: 0}"),
    ),
}  # fmt: skip


def packed(setup: Setup, folder: Path) -> Path:
    """The data of a setup."""
    data_dir = folder / "data" / setup.data
    if not data_dir.exists():
        if setup.data == "digits":
            pack_digits(data_dir)
        else:
            pack_toy(setup.data, data_dir, test_samples=4096)
    return data_dir


def config_of(setup: Setup, groups: int, seed: int, folder: Path, steps: int) -> RunConfig:
    """One run of the sweep."""
    data_dir = packed(setup, folder)
    overrides = [
        *setup.overrides,
        f"data.train={data_dir}/train",
        f"data.test={data_dir}/test",
        f"data.global_batch_size={setup.batch}",
        f"task.groups={groups}",
        f"train={{steps: {steps}, log_every: {steps}, save_every: {steps}, keep_last: 1}}",
        f"run_dir={folder / setup.data}/groups-{groups}/seed-{seed}",
        f"seed={seed}",
    ]
    return configs.load(CONFIGS / f"{setup.config}.yaml", overrides)


def results_of(config: RunConfig, splits: Splits) -> Results:
    """Train and measure, unless that has been done."""
    path = config.run_dir / "distances.json"
    if path.exists() and not configs.differences(configs.load_run(config.run_dir), config):
        known = json.loads(path.read_text())
        if known.keys() == MEASURES.keys():
            return known
    if trainer.train(config) != trainer.EXIT_DONE:
        raise SystemExit(f"{config.run_dir} was stopped before its end; start again, it goes on")
    task = config.build_task(splits.train).eval()
    assert isinstance(task, Drift)
    load_weights(task, config.run_dir)
    labels = labels_of_samples(splits)
    samples = task.generate(labels, len(splits.train.images), seed=0)
    results = distances(samples, labels, splits.test)
    path.write_text(json.dumps(results))
    return results


def labels_of_samples(splits: Splits) -> Tensor | None:
    """For as many samples as there are training data, classes as frequent as in held-out data."""
    if splits.test.labels is None:
        return None
    labels = labels_of(splits.test)
    return labels.repeat(-(-len(splits.train.images) // len(labels)))[: len(splits.train.images)]


def distances(samples: Tensor, labels: Tensor | None, test: Samples) -> Results:
    """From samples to held-out data; of classes the mean."""
    pairs = [(samples, test.images)]
    if labels is not None:
        of_test = labels_of(test)
        pairs = [(samples[labels == k], test.images[of_test == k]) for k in of_test.unique()]
    return {name: mean(measure(*pair) for pair in pairs) for name, measure in MEASURES.items()}


class Sweep(NamedTuple):
    """What was found."""

    setup: Setup
    found: dict[int, list[Results]]
    """By the number of groups, of every seed."""
    of_train: Results
    """The distances of training data."""


def sweep(setup: Setup, seeds: range, folder: Path, steps: int) -> Sweep:
    """All runs of a setup; progress on stderr."""
    splits = read_splits(config_of(setup, 1, 0, folder, steps))
    found: dict[int, list[Results]] = {groups: [] for groups in setup.groups}
    for seed in seeds:
        for groups in setup.groups:
            results = results_of(config_of(setup, groups, seed, folder, steps), splits)
            found[groups].append(results)
            print(f"{setup.title}, seed {seed}, {groups} groups: {results}", file=sys.stderr)
    labels = None if splits.train.labels is None else labels_of(splits.train)
    return Sweep(setup, found, distances(splits.train.images, labels, splits.test))


def as_markdown(swept: Sweep) -> list[str]:
    """The lines of a table."""
    setup, found, of_train = swept
    heads = ["groups", "points that interact", *MEASURES]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for groups, results in found.items():
        cells = [str(groups), str(setup.interacting(groups))]
        for name in MEASURES:
            values = [x[name] for x in results]
            cells.append(f"{mean(values):.4f} ± {spread(values):.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    cells = [f"{of_train[name]:.4f}" for name in MEASURES]
    return [*lines, f"| training data | | {' | '.join(cells)} |"]


def spread(values: list[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def draw(sweeps: list[Sweep], path: Path) -> None:
    """A panel for each setup and distance, over the number of points that interact."""
    figure = Figure(figsize=(4 * len(sweeps), 2.6 * len(MEASURES)), layout="constrained")
    for column, (setup, found, of_train) in enumerate(sweeps):
        sizes = [setup.interacting(groups) for groups in found]
        for row, name in enumerate(MEASURES):
            axes = figure.add_subplot(len(MEASURES), len(sweeps), row * len(sweeps) + column + 1)
            values = [[x[name] for x in results] for results in found.values()]
            axes.errorbar(sizes, [mean(x) for x in values], [spread(x) for x in values],
                          color="#2563a8", marker="o", markersize=4, capsize=3)  # fmt: skip
            axes.axhline(of_train[name], color="#8a8f98", linestyle="--", label="training data")
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.set(xlabel="points that interact", ylabel=name)
            axes.set_title(f"{setup.title}, batch {setup.batch}" if row == 0 else "", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is asked for, print its tables and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(SETUPS), default=list(SETUPS))
    parser.add_argument("--seeds", type=int, help="how many; by default those of the setup")
    parser.add_argument("--steps", type=int, help="of every run; by default those of the setup")
    parser.add_argument("--folder", type=Path, default=Path("runs/group_size"))
    parser.add_argument("--picture", type=Path, default=Path("docs/group_size.png"))
    parser.add_argument("--tiny", action="store_true", help="two steps of every run")
    args = parser.parse_args()
    folder = args.folder.resolve() / ("tiny" if args.tiny else "")
    torch.set_num_threads(1)
    sweeps = []
    for name in args.only:
        setup = SETUPS[name]
        seeds = range(args.seeds or setup.seeds)
        steps = TINY_STEPS if args.tiny else args.steps or setup.steps
        sweeps.append(sweep(setup, seeds, folder, steps))
        print(f"{setup.title}: batch {setup.batch}, {steps} steps, {len(seeds)} seeds\n")
        print("\n".join(as_markdown(sweeps[-1])), end="\n\n", flush=True)
    draw(sweeps, args.picture)


if __name__ == "__main__":
    main()
