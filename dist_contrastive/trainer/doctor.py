"""All that can be looked at before training, on as many ranks, without leaving anything."""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from dist_contrastive.backend import Backend
from dist_contrastive.checkpoint import flush, write_weights
from dist_contrastive.config import RunConfig
from dist_contrastive.data.training import open_data
from dist_contrastive.errors import NonFiniteError, UserError
from dist_contrastive.testing import RankError, run_ranks
from dist_contrastive.trainer.self_check import self_check
from dist_contrastive.trainer.start import Run, start

_TIMEOUT_S = 600.0


class Finding(NamedTuple):
    """What was found of one part of a run."""

    part: str
    is_fine: bool
    text: str
    save_s: float | None = None
    """Seconds that a checkpoint takes to write, of the part `disk`."""

    def __str__(self) -> str:
        return f"{self.part:9} {'ok     ' if self.is_fine else 'PROBLEM'}  {self.text}"


def examine(config: RunConfig, world_size: int, processes: int | None = None) -> Iterator[Finding]:
    """What is found, part by part; after a part that is not fine there is nothing more to look at.

    The ranks are processes on CPUs of this machine, whatever the run will have.

    Args:
        processes: the most of them; a run of more ranks is looked at on that many.
    """
    try:
        data = open_data(
            config.data,
            seed=config.seed,
            uses_labels=config.task.uses_labels,
            labels_required=config.task.labels_required,
            world_size=world_size,
        )
    except UserError as error:
        yield Finding("data", False, str(error))
        return
    size, batch = len(data.index), config.data.global_batch_size
    yield Finding("data", True, f"{size} samples; an epoch is {size / batch:.1f} steps of {batch}")
    yield Finding("ranks", True, _ranks(config, world_size))
    on_cpu = config.model_copy(
        update={"backend": config.backend.model_copy(update={"device": "cpu"})}
    )
    try:
        count = world_size if processes is None else _divisor(world_size, processes)
        yield from run_ranks(_on_a_rank, count, on_cpu, timeout_s=_TIMEOUT_S)[0]
    except RankError as error:
        yield Finding("start", False, str(error))


def _divisor(world_size: int, most: int) -> int:
    """The most ranks that divide what so many divide."""
    return max(n for n in range(1, most + 1) if world_size % n == 0)


def _ranks(config: RunConfig, world_size: int) -> str:
    rows, micro = config.data.global_batch_size // world_size, config.train.micro_batch_size
    parts = "at once" if micro is None else f"in micro-batches of {micro}"
    return f"{world_size} x {rows} rows, {parts}"


def _on_a_rank(config: RunConfig) -> list[Finding]:
    found: list[Finding] = []
    part = "start"
    try:
        backend = Backend(config.backend)
        run = start(config, backend)
        weights = run.engine.weights()
        found += [Finding("run", True, _state(run)), Finding("model", True, _model(run, weights))]
        found.append(_disk(run, weights))
        part = "gradient"
        found.append(Finding(part, True, self_check(run)))
    except (UserError, NonFiniteError) as error:
        found.append(Finding(part, False, str(error)))
    return found


def _state(run: Run) -> str:
    step, folder = run.progress.step, run.config.run_dir
    if not step:
        return f"{folder} holds no checkpoint: training starts"
    if step >= run.config.train.steps:
        return f"{folder} is trained to step {step} already"
    return f"{folder} holds step {step} of {run.config.train.steps}: training goes on there"


def _model(run: Run, weights: dict[str, Tensor]) -> str:
    trained = {name for name, p in run.task.named_parameters() if p.requires_grad}
    count = sum(x.numel() for name, x in weights.items() if name in trained)
    stage = run.config.backend.zero_stage
    engine = f"ZeRO {stage}" if stage else "one process" if run.backend.world_size == 1 else "DDP"
    precision = run.config.backend.precision
    return f"{count:,} trained parameters; {run.config.optim.name}, {engine}, {precision}"


def _disk(run: Run, weights: dict[str, Tensor]) -> Finding:
    """Weights, and as much again for each of the two averages that an optimiser keeps at most."""
    train = run.config.train
    one = 3 * sum(x.nbytes for x in weights.values())
    needed, folder = one * (train.keep_last + 1), _existing(run.config.run_dir)
    free = shutil.disk_usage(folder).free
    text = f"{_size(needed)} for checkpoints, {_size(free)} are free"
    if needed >= free or not run.backend.is_main:
        return Finding("disk", needed < free, text)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as probe:
        for number in range(3):  # weights, and the averages
            write_weights(Path(probe) / str(number), weights)
            flush(Path(probe) / str(number))
    save_s = time.perf_counter() - begin
    return Finding("disk", True, f"{text}; one takes {save_s:.2g} s", save_s)


def _size(num_bytes: float) -> str:
    power = min(3, int(math.log(max(num_bytes, 1024), 1024)))
    return f"{num_bytes / 1024**power:.3g} {('KiB', 'MiB', 'GiB')[power - 1]}"


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
