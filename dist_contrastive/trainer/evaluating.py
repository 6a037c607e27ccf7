"""Measures of an encoder while it trains, by all ranks together; pictures, of generators too."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dist_contrastive import collectives, report
from dist_contrastive.data.collate import collate
from dist_contrastive.errors import ConfigError, NonFiniteError, UserError
from dist_contrastive.evaluation.encoded import Encoded, gathered, joined
from dist_contrastive.evaluation.encoders import NEIGHBOURS, encode
from dist_contrastive.evaluation.neighbours import knn_accuracy, knn_regression_error, recall_at_k
from dist_contrastive.evaluation.probe import linear_probe
from dist_contrastive.evaluation.splits import (
    BATCH,
    Split,
    batched,
    labelled_rows,
    labels_of,
    open_splits,
    shape_of,
)
from dist_contrastive.tasks import Drift, ImageTask, Paired, Task
from dist_contrastive.trainer.checks import eval_mode
from dist_contrastive.trainer.run import Run

_PER_CLASS, _MOST_CLASSES = 8, 20  # samples of a generator in a picture


class Evaluator:
    """Measures every so many steps, `evaluate.every`.

    Each rank encodes its share of the samples, in eval mode; the first one measures what all have
    encoded. Weights, random numbers and the stream stay as they are: a run that is measured ends
    with the weights of one that is not.

    Args:
        heartbeat: called now and then, while a measurement goes on.

    Raises:
        ConfigError, DataError: on all ranks: the splits cannot be opened.

    Collectives: a gather of objects.
    """

    def __init__(self, run: Run, heartbeat: Callable[[], None]) -> None:
        self._run, self._heartbeat = run, heartbeat
        self._settings, self._warned = run.config.evaluate, set[str]()
        self._splits: tuple[Split, Split] | None = None
        self._classes: Mapping[int, str] = {}
        self._pictures: dict[str, Path] = {}
        if self._settings.every is None or not isinstance(run.task, ImageTask):
            return
        with collectives.raised_together():
            with self._weights(run.task):
                pass  # they are there
            opened = open_splits(run.config.data, run.config.fields, self._settings.limit)
            backend = run.backend
            train, test = (
                replace(split, rank=backend.rank, world_size=backend.world_size)
                for split in (opened.train, opened.test)
            )
            self._splits, self._classes = (train, test), opened.classes

    def is_due(self, step: int) -> bool:
        """Whether this step is measured."""
        every = self._settings.every
        return every is not None and (step % every == 0 or step == self._run.config.train.steps)

    def measure(self) -> dict[str, float]:
        """Numbers of the weights as they are, as ``{"eval/knn": 0.9, "eval_s": 3.0}``; the same on
        all ranks.

        Raises:
            ConfigError, DataError: on all ranks: nothing can be measured.

        Collectives: gathers of rows and of objects.
        """
        run, begin = self._run, time.perf_counter()
        task = run.task
        with torch.no_grad(), run.engine.whole_parameters(), eval_mode(task), self._weights(task):
            splits = []
            if isinstance(task, ImageTask) and self._splits is not None:
                splits = [self._encoded(task, split) for split in self._splits]
            numbers: dict[str, float] = {}
            with collectives.raised_together():
                if run.backend.is_main:
                    numbers = self._numbers(task, *splits)
        numbers = collectives.gather_objects(numbers)[0]
        seconds = time.perf_counter() - begin
        run.clock.leave_out(seconds)
        return {**numbers, "eval_s": seconds}

    def take_pictures(self) -> dict[str, Path]:
        """Files of the pictures since the last call, by name; on the first rank."""
        pictures, self._pictures = self._pictures, {}
        return pictures

    def _weights(self, task: Task) -> AbstractContextManager[None]:
        """Context in which the networks are those that are measured."""
        if self._settings.weights == "ema" and isinstance(task, ImageTask):
            return task.averaged()
        return nullcontext()

    def _encoded(self, task: ImageTask, split: Split) -> Encoded:
        """A split as all ranks have encoded it, in the order of its samples."""
        example, reasons = self._run.data.example, list[str]()
        nothing = replace(example.rows(torch.arange(0)), labels=_no_labels(split))
        parts = [encode(task, nothing)]  # a rank may have no samples
        with collectives.raised_together():
            for batch in batched(split.usable_rows(reasons), BATCH):
                self._heartbeat()
                alike = [row for row, shape in batch if shape == shape_of(example)]
                reasons += [
                    f"sample {row['__key__']} has the shape {shape}, and training has "
                    f"{shape_of(example)}"
                    for row, shape in batch
                    if shape != shape_of(example)
                ]
                parts.append(encode(task, split.fields.samples(collate(alike))))
        if reasons:
            found = f"{len(reasons)} samples of {split.what} are left out of measures; the first: "
            self._warn_once(split.what, found + reasons[0])
        return gathered(joined([replace(part, pixels=None) for part in parts]), baselines=False)

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._run.warning(message)

    def _numbers(self, task: Task, *splits: Encoded) -> dict[str, float]:
        """Numbers by name, of the first rank; what cannot be measured is named once, left out, and
        ends no run."""
        measures: dict[str, Callable[[], dict[str, float]]] = {
            "knn": lambda: {"eval/knn": _knn(*_sets(*splits))},
            "probe": lambda: {"eval/probe": linear_probe(*_sets(*splits))},
            "retrieval": lambda: _retrieval(task, splits[1]),
            "map": lambda: self._drawn("map", lambda path: self._map(path, *splits)),
            "samples": lambda: self._drawn("samples", lambda path: self._samples(task, path)),
        }
        numbers: dict[str, float] = {}
        for name in self._settings.during:
            try:
                numbers |= measures[name]()
            except (UserError, NonFiniteError) as error:
                self._warn_once(name, f"{name} is not measured: {error}")
        return numbers

    def _drawn(self, name: str, draw: Callable[[Path], None]) -> dict[str, float]:
        path = self._run.config.run_dir / "plots" / f"training_{name}.png"
        draw(path)
        self._pictures[f"eval/{name}"] = path
        return {}

    def _map(self, path: Path, train: Encoded, test: Encoded) -> None:
        _, _, features, labels = _sets(train, test)
        title = f"held-out samples in the representation, step {self._run.progress.step}"
        report.embedding_map(features, labels, path, title, names=self._classes)

    def _samples(self, task: Task, path: Path) -> None:
        assert isinstance(task, Drift), "the config is checked"
        classes = self._run.config.data.num_classes
        rows = torch.arange(min(classes or 1, _MOST_CLASSES)).repeat_interleave(_PER_CLASS)
        samples = task.generate(None if classes is None else rows, len(rows), seed=0)
        title = f"step {self._run.progress.step}"
        if report.are_images(samples):
            report.sample_grid(samples, rows, path=path, per_class=_PER_CLASS, title=title)
        elif samples[0].numel() == 2:
            report.point_clouds({"generated": samples.flatten(1)}, path, title)
        else:
            raise ConfigError("samples that are neither images nor points cannot be drawn")


def _sets(train: Encoded, test: Encoded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of what has a label, for training and for the test."""
    train, test = (x.rows(labelled_rows(labels_of(x))) for x in (train, test))
    return train.features, labels_of(train), test.features, labels_of(test)


def _knn(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy; of continuous labels the mean absolute error."""
    measure = knn_regression_error if train_labels.is_floating_point() else knn_accuracy
    return measure(train, train_labels, test, test_labels, NEIGHBOURS)


def _retrieval(task: Task, test: Encoded) -> dict[str, float]:
    assert isinstance(task, Paired), "the config is checked"
    assert test.partners is not None
    images, partners = task.embed_representations(test.features), test.partners
    groups = test.groups()
    return {
        "eval/recall_of_partners": recall_at_k(images, partners, 1, groups),
        "eval/recall_of_images": recall_at_k(partners, images, 1, groups),
    }


def _no_labels(split: Split) -> Tensor | None:
    """Labels of no samples, in the dtype of the split's."""
    if split.fields.label is None:
        return None
    classes = split.fields.num_classes is not None
    return torch.zeros(0, dtype=torch.int64 if classes else torch.float64)
