"""What gradient caching and the trainer itself cost: memory and time of steps of a large network.

    python benchmarks/training.py [--tables memory cached overhead freed] [--rows 8192] [--turns 5]

A ViT of 22 million parameters (width 384, depth 12) reads glyphs at 64 x 64 pixels in patches of
16; SupCon compares one view of each; fp32, one process, all steps by the trainer's own code.

- memory: the peak of the resident memory of a step above what the process holds before it (model,
  gradients, optimiser and the batch itself), each row in a process of its own: plain steps, and
  cached ones of 64 rows at a time. What grows with the batch is embeddings and what the loss makes
  of them.
- cached: time of a cached step over that of the plain step of the same batch, turn by turn in one
  process. Theory: one more forward pass, 4/3.
- overhead: time of a step of `trainer.train` (stream, votes, log, all) over that of a bare step of
  embed, compare, backward and optimiser on the same batch, step by step in one process.
- freed: time and peak memory of steps of 128 rows where freed blocks are kept, as they are, over
  those where glibc does with them as it does by itself, turn by turn, each in a fresh process; of
  the network above, and of a small convolutional one.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import own_memory_kib

VIT = "hidden_size: 384, num_hidden_layers: 12, num_attention_heads: 6, intermediate_size: 1536"
CONFIG = f"""
seed: 0
data: {{image: png, label: json.label, num_classes: 34, image_size: 64, lanes: 8,
  global_batch_size: 64}}
task:
  name: labelled
  num_views: 1
  encoder: {{name: transformers, model_type: vit, config: {{{VIT}, patch_size: 16}}}}
  head: {{hidden: 512, out: 128}}
  loss: {{name: supcon, temperature: 0.1}}
optim: {{lr: 1.0e-4}}
train: {{steps: 1000, save_every: 1000}}
"""
MICRO = 64  # rows of a micro-batch
COMPARED = 512  # rows of a batch whose plain step fits too
LOGGED = 10  # steps between rows of metrics, and of a turn of the trainer
COLD = 3  # steps that are not measured


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["memory", "cached", "overhead", "freed"]
    parser.add_argument("--tables", nargs="+", choices=known, default=known)
    parser.add_argument("--rows", type=int, default=8192, help="of the large batch")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--steps", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak_of_step(*map(int, args.peak))))
        return
    if args.steps:
        print(json.dumps(cost_of_steps(*args.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GLYPHS"] = os.environ.get("GLYPHS") or packed(folder)
        for table in args.tables:
            {"memory": memory, "cached": cached, "overhead": overhead, "freed": freed}[table](args)


def packed(folder: str) -> str:
    """Glyphs of every font, packed there."""
    from dist_contrastive.data import pack_glyphs

    pack_glyphs(Path(folder) / "glyphs")
    return f"{folder}/glyphs"


def memory(args: argparse.Namespace) -> None:
    """The first table."""
    print("\n| rows | at a time | MiB |\n| --- | --- | --- |")
    batches = []
    for rows, micro in [(MICRO, 0), (COMPARED, 0), (COMPARED, MICRO), (args.rows, MICRO)]:
        peak, batch, seconds = in_own_process(rows, micro)
        at_once = micro or rows
        print(f"| {rows} | {at_once} | {peak:.0f} |", flush=True)
        batches.append(f"{rows} rows of {batch:.0f} MiB in {seconds:.1f} s")
    print("\n" + ", ".join(batches))


def in_own_process(rows: int, micro: int) -> list[float]:
    """`peak_of_step` in a fresh process."""
    give_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    return told("--peak", str(rows), str(micro), env=give_back)


def told(*arguments: str, env: dict[str, str]) -> list[float]:
    """Numbers that this script prints in a fresh process."""
    argv = [sys.executable, __file__, *arguments]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_step(rows: int, micro: int) -> list[float]:
    """Peak of a step in MiB above what is held before it, MiB of the batch, seconds."""
    run = opened(rows, micro)
    batch = batch_of(run)
    step(run, batch.rows_of(2 * MICRO))  # allocates what stays, as the moments of the optimiser
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, begin = own_memory_kib("VmRSS"), time.perf_counter()
    step(run, batch)
    seconds = time.perf_counter() - begin
    mib = batch.samples.images.numel() * 4 / 2**20
    return [(own_memory_kib("VmHWM") - before) / 1024, mib, seconds]


def cached(args: argparse.Namespace) -> None:
    """The second table."""
    runs = [opened(COMPARED, micro) for micro in (0, MICRO)]
    batch = batch_of(runs[0])
    for run in runs:
        step(run, batch.rows_of(2 * MICRO))
    turns = [[timed(run, batch) for run in runs] for _ in range(args.turns)]
    plain, with_cache = zip(*turns, strict=True)
    ratio = statistics.median(b / a for a, b in turns)
    print(f"\nbatch of {COMPARED} rows, medians of {args.turns} turns: plain step")
    print(f"{statistics.median(plain):.2f} s, cached step of {MICRO} rows at a time", end=" ")
    print(f"{statistics.median(with_cache):.2f} s: {ratio:.3f} times", flush=True)


def overhead(args: argparse.Namespace) -> None:
    """The third table."""
    from dist_contrastive import trainer

    bare, begun = [], []
    other, train_step = opened(2 * MICRO, 0), trainer.train_step

    def both(run: Any, samples: Any, *how: Any) -> dict[str, Any]:
        """The step of the trainer, in whose time the stream makes a batch; then the bare one."""
        begun.append(time.perf_counter())
        row = train_step(run, samples, *how)
        begin = time.perf_counter()
        bare_step(other, samples)
        bare.append(time.perf_counter() - begin)
        return row

    trainer.train_step = both
    with tempfile.TemporaryDirectory() as folder:
        trainer.train(
            config_of(2 * MICRO, 0, Path(folder) / "run"), stop_after=args.turns * LOGGED + COLD
        )
    between = [later - earlier for earlier, later in itertools.pairwise(begun)]
    turns = [(step - alone, alone) for step, alone in zip(between, bare, strict=False)][COLD - 1 :]
    of_trainer, alone = zip(*turns, strict=True)
    ratio = statistics.median(a / b for a, b in turns)
    print(f"\nmedians of {len(turns)} steps: bare {statistics.median(alone):.3f} s,", end=" ")
    print(f"of the trainer {statistics.median(of_trainer):.3f} s: {ratio:.4f} times,", end=" ")
    print(f"by their sums {sum(of_trainer) / sum(alone):.4f}", flush=True)


def freed(args: argparse.Namespace) -> None:
    """The fourth table."""
    print("\n| network | freed blocks | s a step | in the kernel | pages mapped | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    env = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    for network in ("vit", "residual"):
        turns = [
            [told("--steps", network, how, env=env) for how in ("kept", "given back")]
            for _ in range(args.turns)
        ]
        for number, how in enumerate(("kept", "given back")):
            medians = [statistics.median(x) for x in zip(*(t[number] for t in turns), strict=True)]
            cells = " | ".join(f"{x:.3f}" if x < 100 else f"{x:.0f}" for x in medians)
            print(f"| {network} | {how} | {cells} |")
        ratios = [[a / max(b, 1e-9) for a, b in zip(*turn, strict=True)] for turn in turns]
        cells = " | ".join(f"{statistics.median(x):.3f}" for x in zip(*ratios, strict=True))
        print(f"| {network} | ratio | {cells} |", flush=True)


def cost_of_steps(network: str, freed_blocks: str) -> list[float]:
    """Of a step: seconds, those in the kernel, pages mapped; peak MiB of the process."""
    from dist_contrastive.backend import process

    if freed_blocks == "given back":
        process.keep_freed_memory = lambda: False
    small = "{name: residual, widths: [8, 16, 32, 64]}"
    run = opened(2 * MICRO, 0, *([f"task.encoder={small}"] if network == "residual" else []))
    batches = run.data.batches(run.backend.device)
    for _ in range(COLD):
        step(run, Batch(next(batches).samples))
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(LOGGED):
        step(run, Batch(next(batches).samples))
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    spent = [seconds, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt]
    return [*(x / LOGGED for x in spent), own_memory_kib("VmHWM") / 1024]


def bare_step(run: Any, samples: Any) -> None:
    """What a script would do without a trainer."""
    task, optimizer = run.task, run.engine.optimizer
    context = task.begin_step(samples)
    embeddings = task(*task.inputs(samples, context))
    loss = sum(task.compare(embeddings, samples, context).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def timed(run: Any, batch: "Batch") -> float:
    """Seconds of a step."""
    begin = time.perf_counter()
    step(run, batch)
    return time.perf_counter() - begin


class Batch:
    """Rows, and how many samples the stream has given with them."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def rows_of(self, count: int) -> "Batch":
        """The first ones."""
        import torch

        return Batch(self.samples.rows(torch.arange(min(count, len(self.samples.images)))))


def step(run: Any, batch: Batch) -> None:
    """A step of the trainer."""
    from dist_contrastive.trainer.step import train_step

    train_step(run, batch.samples, 0, is_logged=False)


def batch_of(run: Any) -> Batch:
    """The first one of the stream."""
    return Batch(next(run.data.batches(run.backend.device)).samples)


def opened(rows: int, micro: int, *overrides: str) -> Any:
    """A run that no checkpoint is written of."""
    from dist_contrastive.backend import Backend
    from dist_contrastive.trainer.run import open_run

    config = config_of(rows, micro, Path(tempfile.mkdtemp(prefix="training-")), *overrides)
    return open_run(config, Backend(config.backend))


def config_of(rows: int, micro: int, run_dir: Path, *overrides: str) -> Any:
    """The config above, for batches of this size, in micro-batches or (0) not."""
    import torch

    from dist_contrastive import config as configs

    torch.set_num_threads(os.cpu_count() or 1)
    file = run_dir.parent / f"{run_dir.name}.yaml"
    data = Path(os.environ["GLYPHS"])
    file.write_text(CONFIG)
    options = [f"data.train={data}/train", f"data.test={data}/test", f"run_dir={run_dir}"]
    options += [f"data.global_batch_size={rows}", f"train.log_every={LOGGED}"]
    options += [f"train.micro_batch_size={micro or 'null'}", *overrides]
    return configs.load(file, options)


if __name__ == "__main__":
    main()
