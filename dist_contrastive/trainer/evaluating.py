"""Measures of an encoder while it trains, by all ranks together."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.data.collate import collate
from dist_contrastive.errors import NonFiniteError, UserError
from dist_contrastive.evaluation.encoders import NEIGHBOURS, encode
from dist_contrastive.evaluation.neighbours import knn_accuracy, knn_regression_error, recall_at_k
from dist_contrastive.evaluation.probe import linear_probe
from dist_contrastive.evaluation.splits import (
    BATCH,
    Encoded,
    Split,
    batched,
    joined,
    labelled_rows,
    labels_of,
    open_splits,
    shape_of,
)
from dist_contrastive.tasks import ImageTask, Paired
from dist_contrastive.trainer.checks import eval_mode
from dist_contrastive.trainer.run import Run


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
        if self._settings.every is None:
            return
        with collectives.raised_together():
            opened = open_splits(run.config.data, run.config.fields, self._settings.limit)
            backend = run.backend
            train, test = (
                replace(split, rank=backend.rank, world_size=backend.world_size)
                for split in (opened.train, opened.test)
            )
            self._splits = train, test

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
        assert self._splits is not None, "evaluate.every is set"
        run, begin = self._run, time.perf_counter()
        task = run.task
        assert isinstance(task, ImageTask), "the config is checked"
        with torch.no_grad(), run.engine.whole_parameters(), eval_mode(task):
            splits = [self._encoded(task, split) for split in self._splits]
            numbers: dict[str, float] = {}
            with collectives.raised_together():
                if run.backend.is_main:
                    numbers = self._numbers(task, *splits)
        numbers = collectives.gather_objects(numbers)[0]
        seconds = time.perf_counter() - begin
        run.clock.leave_out(seconds)
        return {**numbers, "eval_s": seconds}

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
        return _gathered(joined([replace(part, pixels=None) for part in parts]))

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._run.warning(message)

    def _numbers(self, task: ImageTask, train: Encoded, test: Encoded) -> dict[str, float]:
        """Numbers by name, of the first rank; what cannot be measured is named once, left out, and
        ends no run."""
        measures: dict[str, Callable[[], dict[str, float]]] = {
            "knn": lambda: {"eval/knn": _knn(*_sets(train, test))},
            "probe": lambda: {"eval/probe": linear_probe(*_sets(train, test))},
            "retrieval": lambda: _retrieval(task, test),
        }
        numbers: dict[str, float] = {}
        for name in self._settings.during:
            try:
                numbers |= measures[name]()
            except (UserError, NonFiniteError) as error:
                self._warn_once(name, f"{name} is not measured: {error}")
        return numbers


def _sets(train: Encoded, test: Encoded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of what has a label, for training and for the test."""
    train, test = (x.rows(labelled_rows(labels_of(x))) for x in (train, test))
    return train.features, labels_of(train), test.features, labels_of(test)


def _knn(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy; of continuous labels the mean absolute error."""
    measure = knn_regression_error if train_labels.is_floating_point() else knn_accuracy
    return measure(train, train_labels, test, test_labels, NEIGHBOURS)


def _retrieval(task: ImageTask, test: Encoded) -> dict[str, float]:
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


def _gathered(local: Encoded) -> Encoded:
    """The samples of all ranks, in the order of the data set."""
    gathered: dict[str, Any] = {}
    for name, x in vars(local).items():
        if isinstance(x, Tensor):
            gathered[name], _ = collectives.all_gather_rows(x)
    if local.texts is not None:
        of_ranks = collectives.gather_objects(local.texts)
        gathered["texts"] = tuple(text for texts in of_ranks for text in texts)
    whole = replace(local, **gathered)
    return whole.rows(whole.index.argsort())
