"""From submitting to the first step, part by part, beside a bare srun of the same training.

    python benchmarks/launch.py --nodes 2 --tasks-per-node 2       on a login node of a cluster

Each round submits one job, waits for its end, and then runs the same config by srun alone inside an
allocation of its own, so that both find the machine alike; medians over rounds. Times of the parts
are those that the job itself wrote.
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits_encoder.yaml"
TIMEOUT_S = 300
PARTS = ("command and queue", "nodes checked", "ranks started", "run opened", "first step")


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--tasks-per-node", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    shape = [f"--nodes={args.nodes}", f"--tasks-per-node={args.tasks_per_node}"]
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".launch-") as folder:
        data = Path(folder) / "digits"
        python("-m", "dist_contrastive", "shards", "pack", "digits", str(data))
        parts, bare = [], []
        for number in range(args.rounds):
            options = settings(data, Path(folder) / f"submitted-{number}")
            parts.append(submitted(options, shape, Path(folder) / f"submitted-{number}"))
            options = settings(data, Path(folder) / f"bare-{number}")
            bare.append(bare_srun(options, shape, Path(folder) / f"bare-{number}"))
    print(f"{args.nodes} nodes x {args.tasks_per_node} ranks, {args.rounds} rounds, seconds\n")
    print("| part | median | from | to |\n| --- | --- | --- | --- |")
    for name in PARTS:
        print(row(name, [part[name] for part in parts]))
    print(row("all", [sum(part.values()) for part in parts]))
    inside = [sum(part[x] for x in PARTS[1:]) for part in parts]
    print(row("from the start of the job", inside))
    print(row("bare srun to the first step", bare))
    pairs = [a - b for a, b in zip(inside, bare, strict=True)]
    print(row("difference of the last two, by rounds", pairs))


def settings(data: Path, run_dir: Path) -> list[str]:
    """A short run of the demo's encoder."""
    short = ["train.steps=3", "train.log_every=1", "train.self_check=false"]
    return [f"run_dir={run_dir}", f"data.train={data}/train", f"data.test={data}/test", *short]


def submitted(options: list[str], shape: list[str], run_dir: Path) -> dict[str, float]:
    """Seconds of each part of a job."""
    times = [time.time()]
    python("-m", "launch.slurm", "submit", str(CONFIG), *options, *shape, "--no-doctor")
    first = await_file(run_dir / "metrics.jsonl")
    record = json.loads((run_dir / "jobs.jsonl").read_text())
    job = record["job"]
    while state(job) not in ("COMPLETED", "FAILED"):
        time.sleep(0.1)
    batch = (run_dir / "logs" / f"{job}.batch.log").read_text()
    rank = (run_dir / "logs" / f"{job}.rank-0.out").read_text()
    times += [stamp(rf"(\S+) job {job}: {what}", batch) for what in ("start 1", "nodes are ready")]
    times.append(stamp(r"submitit INFO \((\S+ \S+)\) - Starting", rank))
    times += [(run_dir / "attempts.json").stat().st_mtime, first]
    seconds = [b - a for a, b in itertools.pairwise(times)]
    return dict(zip(PARTS, seconds, strict=True))


def bare_srun(options: list[str], shape: list[str], run_dir: Path) -> float:
    """Seconds from calling srun to the first row of metrics."""
    tasks = shape[1].replace("--tasks", "--ntasks")
    command = [sys.executable, "-m", "dist_contrastive", "train", str(CONFIG), *options]
    begin = time.time()
    process = subprocess.Popen(["srun", shape[0], tasks, *command], stderr=subprocess.DEVNULL)
    first = await_file(run_dir / "metrics.jsonl")
    if process.wait():
        raise SystemExit("the bare srun failed")
    return first - begin


def await_file(path: Path) -> float:
    """When something was first seen in a file."""
    end = time.time() + TIMEOUT_S
    while not path.exists() or not path.stat().st_size:
        if time.time() > end:
            raise SystemExit(f"{path} was not written within {TIMEOUT_S} s")
        time.sleep(0.005)
    return time.time()


def stamp(pattern: str, text: str) -> float:
    """The time that a line begins with."""
    found = re.search(pattern, text)
    if found is None:
        raise SystemExit(f"no {pattern!r} in {text!r}")
    return datetime.fromisoformat(found[1].replace(",", ".")).timestamp()


def state(job: str) -> str:
    """SLURM's word for a job."""
    asked = ["squeue", "-h", "-a", "-t", "all", "-j", job, "-o", "%T"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def python(*arguments: str) -> None:
    """Run Python, which must succeed."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def row(name: str, seconds: list[float]) -> str:
    """A line of the table."""
    return (
        f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {max(seconds):.2f} |"
    )


if __name__ == "__main__":
    main()
