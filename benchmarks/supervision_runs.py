"""The runs behind the tables of supervision.py: trained once, measured on the held-out digits."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from dist_contrastive import config as configs
from dist_contrastive import trainer
from dist_contrastive.config import RunConfig
from dist_contrastive.data.fields import Fields, Samples
from dist_contrastive.data.labels import keep_per_class
from dist_contrastive.data.shards.indexing import load_index
from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluation.neighbours import knn_accuracy
from dist_contrastive.evaluation.probe import few_label_probe, linear_probe
from dist_contrastive.evaluation.splits import labels_of
from dist_contrastive.runs import load_weights
from dist_contrastive.tasks import Hybrid, ImageTask

CONFIGS = Path(__file__).parents[1] / "configs"
BATCH, STEPS, QUICK_STEPS = 160, 150, 3
HALF = BATCH // 2
CLASSES, PER_CLASS, NEIGHBOURS, DRAWS = 10, 10, 5, 20
SHARED = (
    "task.encoder={name: residual, widths: [16, 32, 64]}",
    "task.head={hidden: 256, out: 64}",
    "task.views={rotation_deg: 20, shear_deg: 15, translate: 0.125, scale: [0.8, 1.2],"
    " aspect: 1.1, contrast: 0.3, noise_std: 0.1, erase: 0.3, erase_side: [0.3, 0.5]}",
    "optim={lr: 2.0e-3, warmup_steps: 20, weight_decay: 1.0e-4}",
    f"data.global_batch_size={BATCH}",
    "train.log_every=1000000",
    "train.save_every=1000000",
)
KNN, LINEAR, FEW = f"kNN, k = {NEIGHBOURS}", "linear probe", f"probe, {PER_CLASS} labels a class"
FIRST_STEP, ANY_STEP = "losses differ, first step", "any step"

Results = dict[str, float]
How = Literal["our trainer", "their losses", "untrained", "raw pixels"]


class Variant(NamedTuple):
    """What is trained: a row of a table."""

    title: str
    run: str  # folder of its runs; rows of several tables may share it
    config: str  # configs/digits_CONFIG.yaml
    overrides: tuple[str, ...] = ()
    how: How = "our trainer"
    against: str = ""  # title of the row that it is compared with


def hybrid(title: str, run: str, reward: bool, loss: str = "") -> Variant:
    """Supervised, with the other terms or without; a batch is half labelled, half unlabelled."""
    contrastive = f"{{weight: 0.5, loss: {{{loss}}}}}" if loss else "null"
    overrides = [balanced(HALF), f"task.contrastive={contrastive}"]
    if not reward:
        overrides.append("task.reward=null")
    against = "supervised alone" if reward or loss else ""
    return Variant(title, run, "hybrid", tuple(overrides), against=against)


def two_view(title: str, run: str, loss: str, batch: int = BATCH) -> Variant:
    """Self-supervised, with two views of each digit."""
    overrides = f"task.loss={{{loss}}}", f"data.global_batch_size={batch}"
    return Variant(title, run, "encoder", overrides)


def labelled(title: str, run: str, loss: str, batch: int = BATCH) -> Variant:
    """All labels, and two views of each digit."""
    overrides = f"task.loss={{{loss}}}", f"data.global_batch_size={batch}", balanced(batch)
    return Variant(title, run, "supcon", overrides)


def balanced(rows: int) -> str:
    """The override for so many labelled rows, as many of each class."""
    return f"data.balance={{classes: {CLASSES}, samples_per_class: {rows // CLASSES}}}"


def theirs(ours: Variant) -> Variant:
    """The same with the loss of pytorch-metric-learning."""
    title, run = f"{ours.title}, theirs", f"{ours.run}-theirs"
    return ours._replace(title=title, run=run, how="their losses", against=ours.title)


class Job(NamedTuple):
    """One run, and how it is measured."""

    variant: Variant
    measure: str  # key of MEASURES
    seed: int
    folder: Path
    quick: bool

    def config(self) -> RunConfig:
        """Its config.

        Raises:
            ConfigError: see `config.load`.
        """
        digits, run_dir = self.folder / "digits", self.folder / self.variant.run / f"{self.seed}"
        where = f"data.train={digits}/train", f"data.test={digits}/test", f"run_dir={run_dir}"
        steps = f"train.steps={QUICK_STEPS if self.quick else STEPS}"
        overrides = [*SHARED, *where, steps, f"seed={self.seed}", *self.variant.overrides]
        return configs.load(CONFIGS / f"digits_{self.variant.config}.yaml", overrides)


def results_of(job: Job) -> Results:
    """Train and measure, or only what of it has not been done before.

    Raises:
        Exception: whatever stops the run.
    """
    config = job.config()
    path = config.run_dir / f"{job.measure}.json"
    if (config.run_dir / "config.yaml").exists():
        changed = configs.differences(configs.load_run(config.run_dir), config)
        if changed:  # such a run may have more steps, but would have had another schedule
            raise ConfigError(
                f"{config.run_dir} has results of other settings ({'; '.join(changed[:3])}); give "
                f"another folder"
            )
        if path.exists():
            return json.loads(path.read_text())
    task, results = trained(job.variant.how, config)
    results |= MEASURES[job.measure](task, config)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    configs.save(config, config.run_dir)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results))
    partial.replace(path)
    return results


def trained(how: How, config: RunConfig) -> tuple[ImageTask | None, Results]:
    """The task of a config, trained or not, None for raw pixels; and what training has shown."""
    if how == "raw pixels":
        return None, {}
    if how == "their losses":
        import metric_learning  # late: its package is for table D alone

        task_of_theirs, differences = metric_learning.train(config)
        return task_of_theirs.eval(), {FIRST_STEP: differences[0], ANY_STEP: max(differences)}
    if how == "our trainer" and trainer.train(config) != trainer.EXIT_DONE:
        raise RuntimeError("stopped before its end; start again and it goes on")
    task = config.build_task(config.fields.read(load_index(config.data.train), [0]))
    assert isinstance(task, ImageTask)
    if how == "our trainer":
        load_weights(task, config.run_dir)
    return task.eval(), {}


def of_classifier(task: ImageTask | None, config: RunConfig) -> Results:
    """Accuracy of the class that is decided for, and of the group that it is in."""
    assert isinstance(task, Hybrid)
    _, test = both_splits(config)
    decided = task.classify(task.represent(test.images)).argmax(1)
    matched = task.hierarchy.matched_levels(decided, labels_of(test))
    right = {"class": matched == task.hierarchy.depth, "group": matched >= 1}
    return {name: is_right.double().mean().item() for name, is_right in right.items()}


def of_kept_labels(task: ImageTask | None, config: RunConfig) -> Results:
    """Accuracy of classifiers that have the labels that a run with this seed keeps, no others."""
    train, test = both_splits(config)
    is_kept = keep_per_class(labels_of(train), PER_CLASS, config.seed) >= 0
    kept = train.rows(is_kept.nonzero().flatten())
    data = represented(task, kept), labels_of(kept), represented(task, test), labels_of(test)
    return {KNN: knn_accuracy(*data, NEIGHBOURS), LINEAR: linear_probe(*data)}


def of_probes(task: ImageTask | None, config: RunConfig) -> Results:
    """Accuracy of classifiers with all labels, and with those of a few samples, drawn often."""
    train, test = both_splits(config)
    data = represented(task, train), labels_of(train), represented(task, test), labels_of(test)
    few = few_label_probe(*data, PER_CLASS, DRAWS)
    return {KNN: knn_accuracy(*data, NEIGHBOURS), LINEAR: linear_probe(*data), FEW: few.mean}


MEASURES: dict[str, Callable[[ImageTask | None, RunConfig], Results]] = {
    "classifier": of_classifier,
    "kept labels": of_kept_labels,
    "probes": of_probes,
}


def represented(task: ImageTask | None, samples: Samples) -> Tensor:
    """Representations [n, D], or the images themselves."""
    return samples.images if task is None else task.represent(samples.images)


def both_splits(config: RunConfig) -> tuple[Samples, Samples]:
    """All digits to train on and all that are held out, with all their labels."""
    assert config.data.test is not None
    return digits_of(config.data.train), digits_of(config.data.test)


@cache
def digits_of(folder: Path) -> Samples:
    """All digits of a folder, with their labels."""
    index = load_index(folder)
    return Fields("png", "json.label", CLASSES).read(index, range(len(index)))
