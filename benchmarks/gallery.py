"""The toys before and after training, and the force that made the difference, in one picture.

    python benchmarks/gallery.py [--folder runs/gallery] [--picture docs/toys.png]

Trains configs/eight_gaussians.yaml, configs/checkerboard.yaml and configs/swiss_roll.yaml by the
trainer. Each is a row: samples of the untrained and of the trained generator, held-out data, and
the force on one more generated point, first and last. Runs are kept in the folder: what is trained
is not trained again. Ten minutes of one core.
"""

import argparse
from pathlib import Path

import torch

from dist_contrastive import config as configs
from dist_contrastive import report, trainer
from dist_contrastive.data import pack_toy
from dist_contrastive.data.packing.toys import TOYS
from dist_contrastive.evaluate import read_splits
from dist_contrastive.evaluation.generators import FIELD_POINTS, force_field
from dist_contrastive.report import Panel
from dist_contrastive.runs import load_weights
from dist_contrastive.tasks import Drift

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = ("train.steps=3", "data.global_batch_size=64")
SIDE_IN = 1.9  # of a panel
DRAWN = 1024  # points, of each kind


def row_of(toy: str, folder: Path, tiny: bool) -> tuple[torch.Tensor, list[Panel]]:
    """Train a toy, or find it trained: what must be in sight, and its panels."""
    data_dir = folder / "data" / toy
    if not data_dir.exists():
        pack_toy(toy, data_dir)
    where = f"data.train={data_dir}/train", f"data.test={data_dir}/test", f"run_dir={folder / toy}"
    config = configs.load(CONFIGS / f"{toy}.yaml", [*where, *(TINY if tiny else ())])
    if trainer.train(config) != trainer.EXIT_DONE:
        raise SystemExit(f"{folder / toy} was stopped before its end; start again and it goes on")
    splits = read_splits(config)
    task = config.build_task(splits.train).eval()
    assert isinstance(task, Drift)
    data = splits.test.images[:DRAWN].flatten(1)
    untrained = task.generate(None, DRAWN, seed=0).flatten(1)
    load_weights(task, config.run_dir)
    trained = task.generate(None, DRAWN, seed=0).flatten(1)
    panels = [
        Panel(f"{toy.replace('_', ' ')}: untrained", {"generated": untrained}),
        Panel("trained", {"generated": trained}),
        Panel("data", {"data": data}),
    ]
    few = slice(0, 16 if tiny else FIELD_POINTS)
    for when, generated in (("first", untrained), ("last", trained)):
        arrows = force_field(task.loss, generated[few], data[few])
        clouds = {"data": data[few], "generated": generated[few]}
        panels.append(Panel(f"force, {when}", clouds, arrows))
    return data, panels


def main() -> None:
    """Train the toys and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/gallery"))
    parser.add_argument("--picture", type=Path, default=Path("docs/toys.png"))
    parser.add_argument("--tiny", action="store_true", help="three small steps of each")
    args = parser.parse_args()
    folder = args.folder.resolve() / ("tiny" if args.tiny else "")
    rows = [row_of(toy, folder, args.tiny) for toy in TOYS]
    report.point_panels(rows, args.picture, side=SIDE_IN)
    print(args.picture)


if __name__ == "__main__":
    main()
