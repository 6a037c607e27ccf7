"""Checks before training: the data, the disk, and the gradient against that of one process."""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_contrastive import collectives
from dist_contrastive.backend import Backend
from dist_contrastive.changes import changes_text
from dist_contrastive.checkpoint import flush, newest_step, write_weights
from dist_contrastive.config import RunConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.probe import probe
from dist_contrastive.data.training import TrainingData
from dist_contrastive.errors import ConfigError, NonFiniteError, UnreadableSample, UserError
from dist_contrastive.metrics import peak_memory_mb
from dist_contrastive.ranks import RankError, run_ranks
from dist_contrastive.tasks import StepContext, Task
from dist_contrastive.trainer.failures import check_finite
from dist_contrastive.trainer.run import Run, check_changes, open_run, open_training_data
from dist_contrastive.trainer.step import backward

_TIMEOUT_S = 600.0
_ROWS = 4  # of each rank, or a few more
_PARAMETERS = 16
_TOO_FEW = "too few samples, or too many that cannot be read"
_LONG_S = 2.0  # of a step, from which longer ones are estimated
_LONGEST_S = 60.0  # that one process may take
_TOLERANCE = {"fp32": 1e-2, "bf16": 0.2, "fp16": 0.2}  # what goes wrong is wrong by a factor


def check(config: RunConfig, world_size: int, change: bool = False) -> TrainingData:
    """The data of a config, as that many ranks would open it.

    Args:
        change: the run may go on with other settings, as `train` has it.

    Raises:
        ConfigError, DataError: training could not start.
    """
    if step := newest_step(config.run_dir / "checkpoints"):
        check_changes(config, step, change)
    return open_training_data(config, world_size=world_size)


# ------------------------------------------------------------------ gradient


def self_check(run: Run) -> str:
    """Compare gradients on the first few samples, in eval mode; it leaves nothing behind.

    Returns:
        The largest difference, or why there was no check.

    Raises:
        ConfigError: on all ranks: the gradient of a parameter is another one.

    Collectives: those of a step, and a gather for each of a few parameters.
    """
    settings, micro = run.config.backend, run.config.train.micro_batch_size
    if settings.compile:
        return "not looked at: backend.compile would compile for it"
    if run.backend.world_size == 1 and micro is None and not settings.zero_stage:
        return "that of one process"
    samples = _few_samples(run, _ROWS)
    if samples is None:
        return f"not looked at: {_TOO_FEW}"
    local = _rows_of_rank(run, samples)
    count = len(local.images)
    parameters = _some_parameters(run.task)
    progress = run.progress.step / run.config.train.steps
    half = None if micro is None else min(micro, math.ceil(count / 2))
    with eval_mode(run.task), run.engine.scale_kept():
        begin = time.perf_counter()
        context = run.task.begin_step(local, progress=progress, micro_batch_size=half)
        gradients = _gradients(run, local, context, list(parameters.values()))
        # In fp16 training looks for a scale too; gradients are the same on all ranks.
        while not all(x.isfinite().all() for x in gradients) and run.engine.lower_scale():
            gradients = _gradients(run, local, context, list(parameters.values()))
        took_s = max(collectives.gather_objects(time.perf_counter() - begin))
    if took_s * run.backend.world_size > _LONGEST_S:
        return f"not looked at: one process would take longer than {_LONGEST_S:g} s"
    weights = run.engine.weights()
    with collectives.raised_together():
        worst = 0.0
        if run.backend.is_main:
            expected = _single_process_gradients(run, samples, weights, list(parameters))
            named = dict(zip(parameters, gradients, strict=True))
            worst = _largest_difference(run, named, expected)
    worst = collectives.gather_objects(worst)[0]
    return f"{len(parameters)} parameters have that of one process to {worst:.0e}"


def _gradients(
    run: Run, local: Samples, context: StepContext, parameters: list[nn.Parameter]
) -> list[Tensor]:
    """Gradients of some parameters by these rows of this rank, on the CPU."""
    _, terms, _ = backward(run, local, context)
    gradients = [run.engine.gradient(p).cpu() for p in parameters]
    run.engine.discard_gradients()
    check_finite(terms)
    return gradients


def _few_samples(run: Run, rows: int) -> Samples | None:
    """The first readable ones, the same on every rank, as many as make equal ranks and groups.

    Args:
        rows: for each rank, or a few more. None if there are too few on some rank.

    Collectives: two gathers of objects.
    """
    with collectives.raised_together():
        samples = _first_readable(run, rows)
    return samples if all(collectives.gather_objects(samples is not None)) else None


def _first_readable(run: Run, rows: int) -> Samples | None:
    data, step = run.data, math.lcm(run.backend.world_size, run.task.rows_multiple)
    wanted = step * math.ceil(rows * run.backend.world_size / step)
    readable: list[int] = []
    for number in range(min(wanted + run.config.data.max_skipped, len(data.index))):
        try:
            data.fields.read(data.index, [number])
        except UnreadableSample:
            continue
        readable.append(number)
        if len(readable) == wanted:
            samples = data.fields.read(data.index, readable)
            if data.labels is not None:
                samples = replace(samples, labels=data.labels[samples.index])
            return samples.to(run.backend.device)
    return None


def _rows_of_rank(run: Run, samples: Samples) -> Samples:
    count, rank = len(samples.images) // run.backend.world_size, run.backend.rank
    return samples.rows(torch.arange(rank * count, (rank + 1) * count, device=run.backend.device))


def _some_parameters(task: Task) -> dict[str, nn.Parameter]:
    """Trained parameters from all parts, those of the loss among them."""
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    names = list(trained)
    every = max(1, len(names) // _PARAMETERS)
    chosen = {*names[::every], *(name for name in names if name.startswith("loss"))}
    return {name: trained[name] for name in names if name in chosen}


@contextmanager
def eval_mode(task: Task) -> Iterator[None]:
    """In training mode dropout would draw other masks for other ranks."""
    mode = task.training
    task.eval()
    try:
        yield
    finally:
        task.train(mode)


def _single_process_gradients(
    run: Run, samples: Samples, weights: dict[str, Tensor], names: list[str]
) -> dict[str, Tensor]:
    """Gradients by the plain step, in fp32, of the task with these weights."""
    with collectives.alone():
        task = run.fresh_task().to(run.backend.device).eval()
        task.load_state_dict(weights)
        progress = run.progress.step / run.config.train.steps
        context = task.begin_step(samples, progress=progress)
        embeddings = task(*task.inputs(samples, context))
        torch.stack(list(task.compare(embeddings, samples, context).values())).sum().backward()
    grads = {name: task.get_parameter(name).grad for name in names}
    return {
        name: torch.zeros(task.get_parameter(name).shape) if grad is None else grad.cpu()
        for name, grad in grads.items()
    }


def _largest_difference(
    run: Run, gradients: dict[str, Tensor], expected: dict[str, Tensor]
) -> float:
    """Largest relative difference; small gradients, mostly rounding, are related to the largest.

    Raises:
        ConfigError: it is beyond the tolerance of the precision.
    """
    settings = run.config.backend
    largest = max(float(grad.norm()) for grad in expected.values())
    worst = 0.0
    for name, grad in expected.items():
        size = max(float(grad.norm()), 1e-2 * largest, 1e-30)
        off = float((gradients[name].float() - grad).norm()) / size
        if not off <= _TOLERANCE[settings.precision]:
            ratio = float(gradients[name].norm()) / max(float(grad.norm()), 1e-30)
            raise ConfigError(
                f"the gradient of {name} on {run.backend.world_size} ranks (zero_stage="
                f"{settings.zero_stage}, micro_batch_size={run.config.train.micro_batch_size}) is "
                f"not that of one process: {ratio:.3g} times its norm, off by {off:.2g} of it; "
                f"look for networks whose rows depend on each other and losses of this rank alone, "
                f"or set train.self_check=false to train all the same"
            )
        worst = max(worst, off)
    return worst


# ------------------------------------------------------------------ all of them, for `doctor`


class Finding(NamedTuple):
    """Result of one check."""

    part: str
    is_fine: bool
    text: str
    save_s: float | None = None
    """Seconds that a checkpoint takes to write, of the check `disk`."""

    def __str__(self) -> str:
        return f"{self.part:9} {'ok     ' if self.is_fine else 'PROBLEM'}  {self.text}"


def examine(
    config: RunConfig, world_size: int, processes: int | None = None, change: bool = False
) -> Iterator[Finding]:
    """Findings of all checks; the first one that is not fine is the last.

    The ranks are processes on CPUs of this machine, whatever the run will have.

    Args:
        processes: the most of them; a run of more ranks is checked on that many.
        change: as of `check`.
    """
    part, batch = "data", config.data.global_batch_size
    try:
        data = check(config, world_size, change)
        size = len(data.index)
        yield Finding(
            part, True, f"{size} samples; an epoch is {size / batch:.1f} steps of {batch}"
        )
        part = "samples"
        looked = probe(data, config.data.max_skipped, config.train.steps * batch)
        yield Finding(part, True, looked)
    except UserError as error:
        yield Finding(part, False, str(error))
        return
    yield Finding("ranks", True, _ranks_text(config, world_size))
    on_cpu = config.model_copy(
        update={"backend": config.backend.model_copy(update={"device": "cpu"})}
    )
    try:
        count = world_size if processes is None else _divisor(world_size, processes)
        arguments = on_cpu, change, world_size
        yield from run_ranks(_check_rank, count, *arguments, timeout_s=_TIMEOUT_S)[0]
    except RankError as error:
        yield Finding("start", False, str(error))


def _divisor(world_size: int, most: int) -> int:
    """Largest divisor of the number of ranks that is at most `most`."""
    return max(n for n in range(1, most + 1) if world_size % n == 0)


def _ranks_text(config: RunConfig, world_size: int) -> str:
    rows, micro = config.data.global_batch_size // world_size, config.train.micro_batch_size
    parts = "at once" if micro is None else f"in micro-batches of {micro}"
    return f"{world_size} x {rows} rows, {parts}"


def _check_rank(config: RunConfig, change: bool, world_size: int) -> list[Finding]:
    findings: list[Finding] = []
    part = "start"
    try:
        backend = Backend(config.backend)
        run = open_run(config, backend, change=change)
        weights = run.engine.weights()
        findings.append(Finding("run", True, _state_text(run)))
        findings.append(Finding("model", True, _model_text(run, weights)))
        findings.append(_check_disk(run, weights))
        part = "gradient"
        findings.append(Finding(part, True, self_check(run)))
        part = "speed"
        findings.append(Finding(part, True, _speed_text(run, world_size)))
    except (UserError, NonFiniteError) as error:
        findings.append(Finding(part, False, str(error)))
    return findings


def _speed_text(run: Run, world_size: int) -> str:
    """Time and memory of a step on CPUs of this machine, measured on more and more rows."""
    batch, steps = run.config.data.global_batch_size, run.config.train.steps
    rows, wanted, took_s, peaks = 0, batch // world_size, 0.0, [(0, 0.0)]
    while rows < wanted and took_s < _LONG_S:
        samples = _few_samples(run, min(wanted, 2 * rows or _ROWS))
        if samples is None or len(samples.images) // run.backend.world_size <= rows:
            break
        local = _rows_of_rank(run, samples)
        rows = len(local.images)
        measured = [_step(run, local) for _ in range(2)]  # the first one is slower
        took_s = max(collectives.gather_objects(min(measured)))
        peaks.append((rows, max(collectives.gather_objects(peak_memory_mb(run.backend.device)))))
    if not rows:
        return f"not measured: {_TOO_FEW}"
    (rows_before, mb_before), (_, mb) = peaks[-2:]
    if rows_before and rows < wanted:
        mb += (mb - mb_before) * (wanted - rows) / (rows - rows_before)
    step_s = took_s * max(1.0, wanted / rows)
    measured_on = "" if rows >= wanted else f" (from {rows} rows of {wanted})"
    return (
        f"about {step_s:.2g} s a step on CPUs of this machine, {_duration(steps * step_s)} for "
        f"{steps}; {_size(mb * 2**20)} a rank{measured_on}"
    )


def _step(run: Run, local: Samples) -> float:
    """Seconds of a step that changes no weights."""
    begin, train = time.perf_counter(), run.config.train
    progress = run.progress.step / train.steps
    context = run.task.begin_step(local, progress=progress, micro_batch_size=train.micro_batch_size)
    _, terms, _ = backward(run, local, context)
    run.engine.step(0.0)
    check_finite(terms)
    return time.perf_counter() - begin


def _duration(seconds: float) -> str:
    for name, length_s in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {name}"
    return f"{seconds:.0f} s"


def _state_text(run: Run) -> str:
    step, folder = run.progress.step, run.config.run_dir
    if not step:
        start = run.config.init_from
        begins = "training starts" if start is None else f"training starts from weights of {start}"
        return f"{folder} holds no checkpoint: {begins}"
    if step >= run.config.train.steps:
        return f"{folder} is trained to step {step} already"
    changed = f" with {changes_text(run.changes)}" if run.changes else ""
    return (
        f"{folder} holds step {step} of {run.config.train.steps}: training goes on there{changed}"
    )


def _model_text(run: Run, weights: dict[str, Tensor]) -> str:
    trained = {name for name, p in run.task.named_parameters() if p.requires_grad}
    count = sum(x.numel() for name, x in weights.items() if name in trained)
    stage = run.config.backend.zero_stage
    engine = f"ZeRO {stage}" if stage else "one process" if run.backend.world_size == 1 else "DDP"
    precision = run.config.backend.precision
    return f"{count:,} trained parameters; {run.config.optim.name}, {engine}, {precision}"


def _check_disk(run: Run, weights: dict[str, Tensor]) -> Finding:
    """Free space for checkpoints: weights, and twice that for the optimizer state at most."""
    train = run.config.train
    one = 3 * sum(x.nbytes for x in weights.values())
    needed, folder = one * (train.keep_last + 1), _existing(run.config.run_dir)
    free = shutil.disk_usage(folder).free
    text = f"{_size(needed)} for checkpoints, {_size(free)} are free"
    if needed >= free or not run.backend.is_main:
        return Finding("disk", needed < free, text)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as probe:
        for number in range(3):  # weights, and the optimizer state
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
