"""Mutation check: each planted fault must make the tests that guard its property fail.

    python -m tests.planted_faults [--only TEXT] [--list]

A fault replaces one piece of text of one file, in a copy of the tree; then its tests run, and one
of them must fail. FAULTS of all files here together: five or more in each main folder.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("dist_contrastive", "launch", "tests", "configs", "docs", "benchmarks")
COPIED = (*FOLDERS, "README.md", "CONTRIBUTING.md", "CHANGELOG.md")


@dataclass(frozen=True)
class Fault:
    """Text `old` of `file`, which occurs once, becomes `new`: `tests` must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def faults() -> list[Fault]:
    """Those of all files in this folder."""
    names = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
    modules = [importlib.import_module(f"tests.planted_faults.{name}") for name in names]
    return [Fault(*fault) for module in modules for fault in module.FAULTS]


def is_caught(fault: Fault) -> bool:
    """Whether one of the fault's tests fails, where without it all pass."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in COPIED:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / part)
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            raise SystemExit(
                f"{fault.name}: {fault.file} has its text {text.count(fault.old)} times"
            )
        path.write_text(text.replace(fault.old, fault.new))
        argv = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": name, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*argv, "-m", "slow or not slow", *fault.tests],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{fault.name}: the tests did not run:\n{done.stdout[-2000:]}")
    return done.returncode == 1


def main() -> int:
    """Plant each fault in turn; exit code 1 if one is not caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name or file contains it")
    parser.add_argument("--list", action="store_true", help="name them, and run nothing")
    args = parser.parse_args()
    chosen = [f for f in faults() if args.only in f.name or args.only in f.file]
    missed = 0
    for fault in chosen:
        caught = args.list or is_caught(fault)
        missed += not caught
        print(
            f"{'' if args.list else 'caught ' if caught else 'MISSED '}{fault.file}: {fault.name}",
            flush=True,
        )
    print(f"{len(chosen)} faults, {missed} missed")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
