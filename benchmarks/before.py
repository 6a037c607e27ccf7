"""Speed of this checkout against another one, side by side in one run.

    python benchmarks/before.py OTHER [--pairs 9]        OTHER: a checkout of the commit before

Each checkout has a process of its own, of one thread, which do the same work in turns; what is
compared is the time of the processor that each turn took, which a busy machine changes least. The
ratio is the median over pairs of neighbouring turns, with the quartiles. Commands are started anew
for each turn.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "--help": ["--help"],
    "train of one step, from its start": ["train", "configs/digits_encoder.yaml"],
}
BATCH = 64


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="a checkout of another commit")
    parser.add_argument("--pairs", type=int, default=9, help="turns of each")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        serve(args.work)
        return
    print("| work | s of a processor, before / now | now / before | quartiles |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        checkouts = [args.other.resolve(), ROOT]
        pack = "import sys; from dist_contrastive.data import pack_digits; pack_digits(sys.argv[1])"
        subprocess.run([sys.executable, "-c", pack, folder], env=environment(ROOT), check=True)
        workers = [start(checkout, folder) for checkout in checkouts]
        for name in work(folder):
            report(name, [lambda w=w, n=name: ask(w, n) for w in workers], args.pairs)
        peaks = [ask(worker, "peak") for worker in workers]
        for worker in workers:
            worker.communicate()
        for name, argv in COMMANDS.items():
            report(name, [lambda c=c, a=argv: run(c, a, folder) for c in checkouts], args.pairs)
    print(f"\npeak memory of all but the commands: {peaks[0]:.0f} / {peaks[1]:.0f} MiB")


def report(name: str, turns: list[Callable[[], float]], pairs: int) -> None:
    """A line of the table: the first turn of each is left out."""
    taken = np.array([[turn() for turn in turns] for _ in range(pairs + 1)])[1:]
    before, now = np.median(taken, axis=0)
    low, middle, high = np.quantile(taken[:, 1] / taken[:, 0], [0.25, 0.5, 0.75])
    print(f"| {name} | {before:.3f} / {now:.3f} | {middle:.2f} | {low:.2f} to {high:.2f} |")


# ------------------------------------------------------------------ in a process of each checkout


def work(folder: str) -> dict[str, Callable[[], object]]:
    """What is measured, of the package that is imported."""
    from dist_contrastive import losses
    from dist_contrastive.data import ShardStream

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def rows(number: int, dim: int) -> torch.Tensor:
        return torch.randn(number, dim, requires_grad=True)

    def infonce(impl: str, number: int) -> Callable[[], object]:
        loss = losses.InfoNCE(0.1, symmetric=True, impl=impl)
        a, b = rows(number, 256), rows(number, 256)
        return lambda: loss(a, b).backward()

    def stream() -> None:
        found = ShardStream(
            f"{folder}/train", global_batch_size=BATCH, lanes=8, seed=0, epochs=2, only=["png"]
        )
        assert sum(len(batch["png"]) for batch in found) >= 2 * 1400

    force = losses.ContrastiveForce(preset="drift")
    negative, positive = rows(1024, 64), rows(1024, 64)
    return {
        "InfoNCE, symmetric, dense, 2,048 x 256": infonce("dense", 2048),
        "InfoNCE, symmetric, chunked, 4,096 x 256": infonce("chunked", 4096),
        "force, drift, 1,024 and 1,024 x 64": lambda: force(negative, positive).backward(),
        "two epochs of the digits' stream": stream,
    }


def serve(folder: str) -> None:
    """Do what a line of stdin names, and answer with the time that it took."""
    known = work(folder)
    for line in sys.stdin:
        if line.strip() == "peak":
            answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        else:
            begin = time.process_time()
            known[line.strip()]()
            answer = time.process_time() - begin
        print(json.dumps(answer), flush=True)


def start(checkout: Path, folder: str) -> subprocess.Popen[str]:
    """The process of a checkout."""
    argv = [sys.executable, __file__, str(checkout), "--work", folder]
    return subprocess.Popen(
        argv, env=environment(checkout), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(worker: subprocess.Popen[str], what: str) -> float:
    """Its answer."""
    assert worker.stdin
    assert worker.stdout
    worker.stdin.write(f"{what}\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def run(checkout: Path, argv: list[str], folder: str) -> float:
    """Time of the processor that a command of a checkout takes."""
    with tempfile.TemporaryDirectory() as run_dir:
        if argv[0] == "train":
            data = [f"data.train={folder}/train", f"data.test={folder}/test"]
            argv = [*argv, *data, f"data.global_batch_size={BATCH}", "train.steps=1"]
            argv = [*argv, "optim.warmup_steps=0", f"run_dir={run_dir}/run"]
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "dist_contrastive", *argv],
            cwd=checkout,
            env=environment(checkout),
            check=True,
            capture_output=True,
        )
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime


def environment(checkout: Path) -> dict[str, str]:
    """Of a process that imports the package from a checkout, which keeps its bytecode."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
