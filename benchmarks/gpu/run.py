"""The benchmark on a card: everything that a machine without one cannot know, in nine minutes.

    python benchmarks/gpu/run.py [--stages ceilings losses] [--out benchmarks/results]
    python benchmarks/gpu/run.py --device cpu --small      # a dry run

Each stage is a process of its own with a time limit. What it measures is a line of
OUT/gpu-CARD-DATE.jsonl at once, so that nothing is lost with a stage that fails or is stopped; at
the end there are tables and a picture beside it. Errors are lines too, and the rest goes on.
"""

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from draw import draw
from measure import Bench
from tables import write_tables

ROOT = Path(__file__).parents[2]


class Stage(NamedTuple):
    """A part of the benchmark: a function of its module, and its limit in seconds."""

    module: str
    limit_s: float


STAGES = {
    "ceilings": Stage("pair_stages", 25),
    "compile": Stage("pair_stages", 50),
    "losses": Stage("pair_stages", 100),
    "peers": Stage("pair_stages", 50),
    "force": Stage("other_stages", 55),
    "profiles": Stage("other_stages", 30),
    "step": Stage("other_stages", 55),
    "tests": Stage("", 90),
    "million": Stage("pair_stages", 40),
    "keops": Stage("other_stages", 30),
}
"""In all less than nine minutes, the most important first."""
_END_S = 4.0  # of the limit, for what a stage has begun
_ON_CPU = 4  # times the limit of a dry run


def main() -> int:
    """Run the stages; 1 if one of them failed or was stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=[*STAGES], default=[*STAGES])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny sizes: whether it works")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--stage", choices=[*STAGES], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        run_stage(args)
        return 0
    if args.device == "cuda" and (reason := no_card()):
        print(f"{reason}; try --device cpu --small", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"gpu-{card_name(args.device)}-{time.strftime('%Y-%m-%d')}.jsonl"
    ended = [in_own_process(name, file, args) for name in args.stages]
    written = [file, write_tables(file)]
    with contextlib.suppress(ImportError):  # of matplotlib, which a machine with a card may lack
        written.append(draw(file))
    print(*filter(None, written), sep="\n")
    return 0 if all(ended) else 1


def no_card() -> str:
    """Why nothing can be measured; empty: it can."""
    import torch

    return "" if torch.cuda.is_available() else "torch finds no CUDA device here"


def card_name(device: str) -> str:
    """Short name for files: h100, or cpu."""
    import torch

    if device == "cpu":
        return "cpu"
    words = torch.cuda.get_device_name().lower().split()
    return next((x for x in words if x[-1].isdigit() and x[0].isalpha()), "card")


def in_own_process(name: str, file: Path, args: argparse.Namespace) -> bool:
    """Whether the stage ended by itself and without an error of its own."""
    limit_s = limit_of(name, args.device)
    print(f"== {name}, at most {limit_s:.0f} s", flush=True)
    argv = [sys.executable, __file__, "--stage", name, "--file", str(file)]
    argv += ["--device", args.device, *(["--small"] if args.small else [])]
    process = subprocess.Popen(argv, cwd=ROOT, env=environment(), start_new_session=True)
    try:
        code: int | str = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = f"it was stopped after {limit_s:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()
    if code:
        bench = Bench(name, file, args.device, args.small, limit_s)
        bench.add("stage", error=f"{name} ended: {code}")
    return not code


def limit_of(name: str, device: str) -> float:
    """Seconds of a stage."""
    return STAGES[name].limit_s * (_ON_CPU if device == "cpu" else 1)


def environment() -> dict[str, str]:
    """For stages: this checkout, and nothing from the network."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run_stage(args: argparse.Namespace) -> None:
    """In a process of its own."""
    stage = STAGES[args.stage]
    limit_s = limit_of(args.stage, args.device) - _END_S
    bench = Bench(args.stage, args.file, args.device, args.small, limit_s)
    function: Callable[[Bench], None] = tests
    if stage.module:
        name = "compile_kernels" if args.stage == "compile" else args.stage
        function = getattr(importlib.import_module(stage.module), name)
    function(bench)


def tests(bench: Bench) -> None:
    """tests/test_gpu.py on the device; a line for each that fails."""
    argv = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "--tb=line"]
    argv += ["--device", bench.device, "-p", "no:cacheprovider", "--durations=0"]
    workers = str(max(2, min(12, (os.cpu_count() or 2) - 2)))  # they compile kernels
    argv += ["-k", "losses_equal and InfoNCE"] if bench.small else ["-n", workers]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout or ():
            if line.startswith(("FAILED", "ERROR", "E  ")):
                bench.add("test", error=line.strip()[:400])
            elif " passed" in line or " failed" in line:
                bench.add("pytest", told=line.strip())


if __name__ == "__main__":
    sys.exit(main())
