"""What an online probe and an online kNN cost: their share of a step's processor time.

    python benchmarks/online.py [--steps 10] [--batch 128] [--size 64]

NT-Xent between two views of glyphs, by the trainer's own step, in one process; the encoders are
torchvision's ResNet-18 and the default residual network. In each step the processor time of what
learns online (taking the features included) is set against that of all the rest of the same step,
so that other work on the machine does not count; the median over steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NETWORKS = {"ResNet-18": 512, "residual (16, 32, 64)": 64}  # and their dimensions
COLD = 2  # steps that are not measured
CONFIG = {
    "task": {
        "name": "two_view",
        "encoder": {"name": "residual"},
        "loss": {"name": "ntxent", "temperature": 0.2},
    },
    "train": {"steps": 1000, "save_every": 1000},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128, help="samples of a step, two views each")
    parser.add_argument("--size", type=int, default=64, help="pixels of an image's side")
    args = parser.parse_args()
    print("| encoder | online | s of a step | of them online | share of the rest |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        from dist_contrastive.data import pack_glyphs

        folder = Path(name)
        pack_glyphs(folder / "glyphs")
        for network in NETWORKS:
            for learners in (["probe"], ["knn"], ["probe", "knn"]):
                print(row(folder, args, network, learners), flush=True)


def row(folder: Path, args: argparse.Namespace, network: str, learners: list[str]) -> str:
    """A line of the table."""
    from dist_contrastive.backend import Backend
    from dist_contrastive.config import resolve
    from dist_contrastive.trainer.run import OwnModules, open_run
    from dist_contrastive.trainer.step import train_step

    data = {"image": "png", "label": "json.label", "num_classes": 34, "image_size": args.size}
    data |= {"image_channels": 3, "global_batch_size": args.batch, "lanes": 8, "num_workers": 0}
    data |= {"train": str(folder / "glyphs" / "train")}
    run_dir = folder / f"{network}-{'-'.join(learners)}"
    config = resolve({**CONFIG, "data": data, "run_dir": run_dir, "evaluate": {"online": learners}})
    run = open_run(config, Backend(config.backend), OwnModules(model=encoder_of(network)))
    spent = Spent(run.online)
    steps = []
    for batch in run.data.batches(run.backend.device):
        online_s, begin_s = spent.seconds, time.process_time()
        train_step(run, batch.samples, batch.consumed, is_logged=False)
        steps.append((time.process_time() - begin_s, spent.seconds - online_s))
        if len(steps) == args.steps + COLD:
            break
    whole, online = (statistics.median(x) for x in zip(*steps[COLD:], strict=True))
    share = statistics.median(part / (all_of - part) for all_of, part in steps[COLD:])
    return f"| {network} | {', '.join(learners)} | {whole:.3f} | {online:.4f} | {share:.2%} |"


def encoder_of(network: str) -> torch.nn.Module | None:
    """A module, or None for that of the config."""
    if network != "ResNet-18":
        return None
    from torchvision.models import resnet18

    encoder = resnet18()
    encoder.fc = torch.nn.Identity()
    return encoder


class Spent:
    """Processor time of what learns online."""

    def __init__(self, online: Any) -> None:
        self.seconds = 0.0
        for name in ("observe", "_take"):
            setattr(online, name, self._timed(getattr(online, name)))

    def _timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begin_s = time.process_time()
            result = work(*arguments)
            self.seconds += time.process_time() - begin_s
            return result

        return timed


if __name__ == "__main__":
    main()
