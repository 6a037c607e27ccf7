"""Stages of the benchmark on a card: the force, what waits for the host, a whole training step."""

import collections
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fake import LOSSES
from measure import Bench, Step, relative
from pair_stages import inputs_of, ours, stepper
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parents[1]))
import force_baselines

from dist_contrastive.losses import ContrastiveForce

# ------------------------------------------------------------------ the force


def points(bench: Bench, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Generated points and data of that shape each."""
    negative, positive = force_baselines.clouds(shape)
    return [
        negative.detach().to(bench.device, dtype).requires_grad_(),
        positive.to(bench.device, dtype),
    ]


def seed(negative: Tensor, positive: Tensor) -> Tensor:
    """The seed's code, vectorised, with the rules of `drift`."""
    return force_baselines.seed_loss(negative, positive, masked=True, with_graph=False)


FORCES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "ours": ContrastiveForce,
    "ours, paper": lambda: ContrastiveForce(preset="paper"),
    "dense": lambda: seed,
    "dense, paper": lambda: force_baselines.paper_loss,
    "keops": lambda: force_baselines.keops_loss,
}


def force(bench: Bench) -> None:
    """Five temperatures; one group of points, and many small ones."""
    small = bench.small
    accuracy = (64, 16) if small else (2048, 256)
    for way in ("ours", "dense"):
        for dtype in (torch.float32, torch.bfloat16):
            bench.attempt(
                *(
                    f"gradient error force, {way}",
                    lambda w=way, d=dtype: _error(bench, w, accuracy, d),
                ),
                **{"loss": "force", "way": way, "dtype": str(dtype)[6:]},
            )
    sizes: list[tuple[tuple[int, ...], list[str]]] = [
        ((8192, 256), ["ours", "dense", "ours, paper", "dense, paper"]),
        ((32768, 1024), ["ours"]),
        ((4000, 64, 1024), ["ours", "dense"]),
        ((2048, 256), ["ours", "dense"]),
    ]
    if small:
        sizes = [((64, 16), [x for x in FORCES if x != "keops"]), ((5, 8, 16), ["ours", "dense"])]
    for shape, ways in sizes:
        for way in ways:
            _force(bench, shape, way, 15.0 if shape[0] == 32768 else 4.0)


def keops(bench: Bench) -> None:
    """The force by KeOps, whose first call compiles."""
    if not force_baselines.HAS_KEOPS or not bench.is_cuda:
        bench.add("keops", skipped="KeOps is not installed, or there is no card")
        return
    for shape in ((2048, 256), (8192, 256)):
        _force(bench, shape, "keops", 8.0)


def _force(bench: Bench, shape: tuple[int, ...], way: str, need_s: float) -> None:
    def run() -> dict[str, Any]:
        return bench.timed(stepper(FORCES[way](), points(bench, shape, torch.float32)), 0.5, 5)

    known = {"loss": "force", "dtype": "fp32", "shape": list(shape), "way": way}
    bench.attempt(f"force {shape} {way}", run, need_s, **known)


def _error(bench: Bench, way: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    given = points(bench, shape, dtype)
    double = [given[0].detach().double().requires_grad_(), given[1].double()]
    return {"error": relative(stepper(FORCES[way](), given)(), stepper(seed, double)())}


# ------------------------------------------------------------------ waits for the device

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
WAITS += ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def profiles(bench: Bench) -> None:
    """Waits and launches of a step of each loss, by the profiler; which lines wait."""
    rows, dim = (64, 16) if bench.small else (16384, 768)
    for name in LOSSES:

        def step(name: str = name) -> Step:
            inputs = inputs_of(name, rows, dim, torch.bfloat16, bench.device)
            return stepper(ours(name, bench.device), inputs)

        bench.attempt(f"profile {name}", lambda s=step: _profile(bench, s()), 4.0, loss=name)
    shape = (64, 16) if bench.small else (4096, 256)

    def force_step() -> Step:
        return stepper(ContrastiveForce(), points(bench, shape, torch.float32))

    bench.attempt("profile force", lambda: _profile(bench, force_step()), 6.0, loss="force")


def _profile(bench: Bench, step: Step) -> dict[str, Any]:
    step()
    bench.wait()
    waiting = _lines_that_wait(bench, step)
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if bench.is_cuda else []
    begin = time.perf_counter()
    step()
    bench.wait()
    wall_ms = 1e3 * (time.perf_counter() - begin)
    with profile(activities=activities) as found:
        step()
        bench.wait()  # one wait that is not the step's
    events = found.key_averages()
    counts = {event.key: event.count for event in events if event.key in WAITS + LAUNCHES}
    kernels = [event for event in events if str(event.device_type).endswith("CUDA")]
    busy_ms = sum(event.self_device_time_total for event in kernels) / 1e3
    longest = sorted(kernels, key=lambda event: event.self_device_time_total, reverse=True)[:8]
    top = {event.key[:60]: round(event.self_device_time_total / 1e3, 3) for event in longest}
    return {
        "wall_ms": wall_ms,
        "busy_ms": busy_ms,
        "kernels": sum(event.count for event in kernels),
        "counts": counts,
        "lines": waiting,
        "top_ms": top,
    }


def _lines_that_wait(bench: Bench, step: Step) -> dict[str, int]:
    """How often which lines wait, by the sync debug mode of torch."""
    if not bench.is_cuda:
        return {}
    found: collections.Counter[str] = collections.Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroni" in str(warning.message):
            found[f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"] += 1
    return dict(found.most_common(12))


# ------------------------------------------------------------------ a step of training

VIT_B = "hidden_size: 768, num_hidden_layers: 12, num_attention_heads: 12, intermediate_size: 3072"
TINY = "hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64"
CONFIG = """
seed: 0
data: {{train: {data}/train, test: {data}/test, image: png, label: json.label, num_classes: 10,
  image_size: {side}, lanes: 8, num_workers: 4, global_batch_size: {batch}}}
task:
  name: two_view
  encoder: {{name: transformers, model_type: vit, config: {{{vit}, patch_size: {patch}}}}}
  head: {{hidden: 2048, out: 128}}
  views: {{crop_area: [0.3, 1.0], flip: 0.5, contrast: 0.4}}
  loss: {{name: ntxent, temperature: 0.1}}
optim: {{lr: 1.0e-4}}
train: {{steps: {steps}, log_every: {log_every}, self_check: false, trackers: []}}
backend: {{precision: bf16, device: {device}}}
run_dir: {folder}/run
"""


def step(bench: Bench) -> None:
    """SimCLR with ViT-B/16 in bf16: a bare loop without a loss, with it, and the trainer."""
    from dist_contrastive.data import pack_digits

    with tempfile.TemporaryDirectory() as folder:
        pack_digits(Path(folder) / "digits")
        values = {"side": 224, "batch": 256, "vit": VIT_B, "patch": 16, "steps": 24, "log_every": 8}
        if bench.small:
            values = {"side": 16, "batch": 32, "vit": TINY, "patch": 8, "steps": 4, "log_every": 2}
        device = "auto" if bench.is_cuda else "cpu"
        text = CONFIG.format(**values, data=f"{folder}/digits", device=device, folder=folder)
        file = Path(folder) / "vit.yaml"
        file.write_text(text)
        for name in ("bare, without a loss", "bare"):
            bench.attempt(f"ViT-B/16, {name}", lambda n=name: _bare(bench, file, n == "bare"), 10.0)
        bench.attempt("ViT-B/16, trainer", lambda: _trained(file, Path(folder) / "run"), 15.0)
        bench.attempt("ViT-B/16, waits", lambda: _waits_of_trainer(bench, file), 10.0)


def _bare(bench: Bench, file: Path, with_loss: bool) -> dict[str, Any]:
    """Embed, backward, update, again and again on one batch."""
    from dist_contrastive import config as configs
    from dist_contrastive.backend import Backend
    from dist_contrastive.trainer.run import open_run

    config = configs.load(file, [f"run_dir={file.parent}/bare"])
    run = open_run(config, Backend(config.backend))
    samples = next(run.data.batches(run.backend.device)).samples
    optimizer = run.engine.optimizer

    def one() -> None:
        context = run.task.begin_step(samples)
        with torch.autocast(bench.device, torch.bfloat16):
            embeddings = run.task(*run.task.inputs(samples, context))
        loss = sum(x.float().square().mean() for x in embeddings)
        if with_loss:
            loss = sum(run.task.compare(embeddings, samples, context).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return bench.timed(one, 3.0, 8)


def _waits_of_trainer(bench: Bench, file: Path) -> dict[str, Any]:
    """Lines of a few steps of `train` that wait, of which the last is logged and saved."""
    from dist_contrastive import config as configs
    from dist_contrastive import trainer

    steps = 4 if bench.small else 8
    changed = [f"run_dir={file.parent}/waits", f"train.steps={steps}", f"train.log_every={steps}"]
    config = configs.load(file, changed)
    return {"steps": steps, "lines": _lines_that_wait(bench, lambda: trainer.train(config))}


def _trained(file: Path, run_dir: Path) -> dict[str, Any]:
    """A step of `train`, by its own log; the first row is that of a cold start."""
    from dist_contrastive import config as configs
    from dist_contrastive import trainer
    from dist_contrastive.metrics import read_rows

    code = trainer.train(configs.load(file))
    last = list(read_rows(run_dir))[-1]
    numbers = {key: x for key, x in last.items() if key.endswith("_s") or key == "data_wait"}
    return {"code": code, "ms": 1e3 * last["step_s"], "row": numbers}
