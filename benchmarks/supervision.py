"""What each kind of supervision is worth on held-out digits: tables over seeds, by our own trainer.

    python benchmarks/supervision.py [--only A B C D] [--seeds 5] [--folder runs/supervision]

A. supervised, reward and contrastive terms with 100 labels; B. unlabelled digits beside 100 labels;
C. every loss by kNN and linear probes; D. pytorch-metric-learning's losses in an equal loop.

All runs share encoder, projection head, views, steps and optimiser and, except where a table says
so, the size of the batch. Runs with the same seed have the same initial weights and, of one kind of
batch, the same batches. Runs are kept in the folder: what is trained and measured there is not done
again, and an interrupted run goes on. Two processes of one thread each; progress goes to stderr.

How settings were chosen: by training on three quarters of the training digits and measuring on the
fourth, one seed, two to four values each of the temperature, margin or weight of most losses; the
held-out digits of the tables took no part. Learning rate and views are those of
configs/digits_encoder.yaml, the weights in A those of configs/digits_hybrid.yaml.
"""

import argparse
import math
import os
import resource
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from textwrap import shorten
from typing import NamedTuple

import torch
from supervision_runs import (
    ANY_STEP,
    BATCH,
    CLASSES,
    DRAWS,
    FEW,
    FIRST_STEP,
    HALF,
    KNN,
    LINEAR,
    PER_CLASS,
    QUICK_STEPS,
    STEPS,
    Job,
    Results,
    Variant,
    balanced,
    hybrid,
    labelled,
    results_of,
    theirs,
    two_view,
)

from dist_contrastive.data import pack_digits

PROCESSES = 2
QUICK_SEEDS = 2


class Table(NamedTuple):
    """What is compared, and by what."""

    caption: str
    measure: str  # key of supervision_runs.MEASURES
    columns: tuple[str, ...]  # names of results
    variants: tuple[Variant, ...]
    difference: str = ""  # head of the columns with differences, if there are any
    largest: tuple[str, ...] = ()  # further results, of which the largest over seeds is shown


SELF_DIAGONAL = "name: self_diagonal, temperature: 0.1"
SUPCON = "name: supcon, temperature: 0.1"
NTXENT = "name: ntxent, temperature: 0.2"
VICREG = "name: vicreg, covariance_weight: 10"
TRIPLET = "name: triplet, distance: cosine, margin: 0.2, mining: "

PIXELS = Variant("raw pixels", "pixels", "encoder", how="raw pixels")
UNTRAINED = Variant("untrained encoder", "untrained", "encoder", how="untrained")
OF_NTXENT = two_view("NT-Xent", "ntxent", NTXENT)

TERMS = (
    hybrid("supervised alone", "hybrid", reward=False),
    hybrid("+ contrastive (self-diagonal)", "hybrid_self_diagonal", False, SELF_DIAGONAL),
    hybrid("+ contrastive (SupCon)", "hybrid_supcon", False, SUPCON),
    hybrid("+ contrastive (NT-Xent)", "hybrid_ntxent", False, NTXENT),
    hybrid("+ reward", "hybrid_reward", reward=True),
    hybrid("+ reward + contrastive (self-diagonal)", "hybrid_all", True, SELF_DIAGONAL),
    hybrid("+ reward + contrastive (SupCon)", "hybrid_all_supcon", True, SUPCON),
)
ALONE = Variant(
    "labels alone (SupCon)",
    "labels_alone",
    "semisupervised",
    (balanced(HALF), f"data.global_batch_size={HALF}", f"task.loss={{{SUPCON}}}"),
)
SEMI_SUPERVISED = (
    PIXELS,
    OF_NTXENT._replace(title="no labels (NT-Xent)", against=ALONE.title),
    ALONE,
    Variant(
        "labels and unlabelled digits (SupCon)",
        "semi_supervised",
        "semisupervised",
        (balanced(HALF), f"task.loss={{{SUPCON}}}"),
        against=ALONE.title,
    ),
)
LOSSES = (
    PIXELS,
    UNTRAINED,
    OF_NTXENT,
    two_view("InfoNCE, symmetric", "infonce", "name: infonce, temperature: 0.2, symmetric: true"),
    two_view("DCL", "dcl", "name: dcl, temperature: 0.2"),
    two_view("SigLIP", "siglip", "name: siglip"),
    two_view("VICReg", "vicreg", VICREG),
    two_view("Barlow Twins", "barlow_twins", "name: barlow_twins, redundancy_weight: 0.1"),
    two_view("SelfDiagonal", "self_diagonal", "name: self_diagonal, temperature: 0.5"),
    two_view("KoLeo", "koleo", "name: koleo"),
    Variant("NT-Xent, 2 crops more", "multicrop", "multicrop", (f"task.loss={{{NTXENT}}}",)),
    Variant("MoCo", "moco", "moco", ("task.queue_size=960", "task.loss.temperature=0.1")),
    Variant("captions, InfoNCE", "captions", "captions"),
    Variant("profiles, SigLIP", "profiles", "profiles"),
    labelled("SupCon", "supcon", SUPCON),
    labelled("Triplet, all", "triplet_all", TRIPLET + "all"),
    labelled("Triplet, hard", "triplet_hard", TRIPLET + "hard"),
    labelled("Triplet, semi-hard", "triplet_semihard", TRIPLET + "semihard"),
    labelled("CosineEmbedding", "cosine_embedding", "name: cosine_embedding, margin: 0.5"),
)
CHECKED = (
    two_view("NT-Xent", "ntxent_small", NTXENT, HALF),
    labelled("SupCon", "supcon_small", SUPCON, HALF),
    labelled("Triplet, all", "triplet_small", TRIPLET + "all", HALF),
    two_view("VICReg", "vicreg_small", VICREG, HALF),
)
MIXED = f"{HALF} labelled and {BATCH - HALF} unlabelled digits"
NOTE = (
    "mean ± standard deviation over seeds; differences are between runs of the same seed, mean ± "
    "standard error"
)
TABLES = {
    "A": Table(
        f"A. {CLASSES * PER_CLASS} labels, the hybrid task: accuracy of its classifier, for the "
        f"class and for the group of classes. All see the same batches of {MIXED}",
        "classifier",
        ("class", "group"),
        TERMS,
        difference="less supervised alone",
    ),
    "B": Table(
        f"B. {CLASSES * PER_CLASS} labels: accuracy of classifiers that have these labels alone. "
        f"A batch is {MIXED}; for labels alone the same {HALF}, without labels {BATCH} of "
        f"all",
        "kept labels",
        (KNN, LINEAR),
        SEMI_SUPERVISED,
        difference="less labels alone",
    ),
    "C": Table(
        f"C. Every loss: accuracy of classifiers on the representation, with all labels but for "
        f"the last ({DRAWS} draws). Batches of {BATCH}; the losses from SupCon on train with "
        f"labels, captions name the class",
        "probes",
        (KNN, LINEAR, FEW),
        LOSSES,
    ),
    "D": Table(
        f"D. Our losses in our trainer, and those of pytorch-metric-learning in an equal loop: "
        f"accuracy as in C. Batches of {HALF}, since their NT-Xent compares every positive pair "
        f"with every negative one. Last, relative to ours: how far the two losses of the same "
        f"embeddings are apart",
        "probes",
        (KNN, FEW),
        tuple(variant for ours in CHECKED for variant in (ours, theirs(ours))),
        difference="less ours",
        largest=(FIRST_STEP, ANY_STEP),
    ),
}


Found = dict[tuple[str, int], Results | str]
"""Results, or why there are none, by title and seed."""


def run_all(table: Table, seeds: range, folder: Path, quick: bool) -> Found:
    """All runs of a table, in worker processes; progress on stderr."""
    jobs = [Job(v, table.measure, seed, folder, quick) for seed in seeds for v in table.variants]
    found: Found = {}
    pool = ProcessPoolExecutor(PROCESSES, get_context("spawn"), start_worker, (folder,))
    try:
        futures = {pool.submit(results_of, job): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            error = future.exception()
            text = "" if error is None else f"{type(error).__name__}: {error}"
            found[job.variant.title, job.seed] = text or future.result()
            done = f"{table.caption[0]} {len(found)}/{len(jobs)}"
            print(f"{done}: {job.variant.title}, seed {job.seed} {text}", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def start_worker(folder: Path) -> None:
    """One thread, and a log: two progress bars would write over each other."""
    torch.set_num_threads(1)
    sys.stderr = (folder / f"worker-{os.getpid()}.log").open("a", buffering=1)


def as_markdown(table: Table, found: Found, seeds: range) -> list[str]:
    """The lines of a table."""
    heads = [""]
    for column in table.columns:
        heads += [column, table.difference] if table.difference else [column]
    heads += table.largest
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for variant in table.variants:
        cells = [variant.title]
        for column in table.columns:
            cells.append(value_cell(column_of(found, variant.title, column), len(seeds)))
            if table.difference:
                cells.append(difference_cell(found, variant, column))
        for column in table.largest:
            values = column_of(found, variant.title, column).values()
            cells.append(f"{max(values):.0e}" if values else "")
        cells[1] += failures(found, variant.title)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def column_of(found: Found, title: str, column: str) -> dict[int, float]:
    """A result by seed, of the seeds that have it."""
    return {
        seed: results[column]
        for (name, seed), results in found.items()
        if name == title and not isinstance(results, str) and column in results
    }


def value_cell(values: dict[int, float], num_seeds: int) -> str:
    """Mean and standard deviation over seeds, with n where some have failed."""
    if not values:
        return "none"
    spread = f" ± {stdev(values.values()):.3f}" if len(values) > 1 else ""
    n = f" (n = {len(values)})" if len(values) < num_seeds else ""
    return f"{mean(values.values()):.3f}{spread}{n}"


def difference_cell(found: Found, variant: Variant, column: str) -> str:
    """Mean of the differences between runs of the same seed, and the standard error of it."""
    mine, other = (column_of(found, title, column) for title in (variant.title, variant.against))
    differences = [mine[seed] - other[seed] for seed in mine.keys() & other.keys()]
    if not differences:
        return ""
    n = len(differences)
    error = f" ± {stdev(differences) / math.sqrt(n):.3f}" if n > 1 else ""
    return f"{round(mean(differences), 3) + 0.0:+.3f}{error}"  # + 0.0: never -0.000


def failures(found: Found, title: str) -> str:
    """Why runs have failed, in few words."""
    seeds_by_reason: dict[str, list[str]] = {}
    for (name, seed), reason in sorted(found.items(), key=lambda item: item[0]):
        if name == title and isinstance(reason, str):
            seeds_by_reason.setdefault(reason.replace("|", "/"), []).append(str(seed))
    return "".join(
        f"; seed {', '.join(seeds)}: {shorten(reason, 200)}"
        for reason, seeds in seeds_by_reason.items()
    )


def main() -> None:
    """Run what is asked for, and print a table after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/supervision"))
    parser.add_argument("--quick", action="store_true", help="a few steps, at most 2 seeds")
    args = parser.parse_args()
    folder = args.folder.resolve() / ("quick" if args.quick else "")
    if not (folder / "digits").exists():
        pack_digits(folder / "digits")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    seeds = range(min(args.seeds, QUICK_SEEDS) if args.quick else args.seeds)
    steps = QUICK_STEPS if args.quick else STEPS
    for name in args.only:
        table = TABLES[name]
        found = run_all(table, seeds, folder, args.quick)
        print(f"{table.caption}; {steps} steps; n = {len(seeds)} seeds, {NOTE}\n")
        print("\n".join(as_markdown(table, found, seeds)), end="\n\n", flush=True)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{(spent.ru_utime + spent.ru_stime) / 60:.1f} CPU minutes", file=sys.stderr)


if __name__ == "__main__":
    main()
