"""What `eval` says, against the same written out by hand."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, num_colours, pixels_of
from sklearn.svm import SVC
from torch import Tensor

from dist_contrastive import checkpoint, evaluation, trainer
from dist_contrastive import config as configs
from dist_contrastive.cli import main
from dist_contrastive.config import RunConfig
from dist_contrastive.data import index_folder, keyed_random, load_index
from dist_contrastive.data.config import DataConfig
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.data.sources import configs_of
from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluate import read_splits
from dist_contrastive.evaluation import probe, ranking, representation
from dist_contrastive.evaluation.encoders import encode, measure_encoder
from dist_contrastive.evaluation.options import MEASURES, EvalOptions, held_out
from dist_contrastive.evaluation.splits import Split, Table
from dist_contrastive.tasks import Drift
from dist_contrastive.tasks.drift import NOISE_STREAM
from dist_contrastive.testing import run_ranks

TINY = "task.encoder.widths=[8, 16]"


def load(name: str, overrides, run_dir: Path, *more: str) -> RunConfig:
    path = CONFIGS / f"{name}.yaml"
    tiny = [] if isinstance(configs.load(path).task, Drift.Config) else [TINY]
    return configs.load(path, overrides(run_dir, *tiny, *more))


def digits_of(config: RunConfig, *numbers: int) -> Samples:
    return config.fields.read(load_index(config.data.train), numbers)


LESSONS = ("train.steps=25", "optim.lr=0.003", "data.global_batch_size=64", "train.save_every=100")
LEARNS = {  # options with which two towers learn in seconds
    "digits_captions": ("train.steps=40", "optim.lr=0.001", "task.views={}"),
    "digits_profiles": ("train.steps=60", "task.loss={name: infonce, temperature: 0.1}"),
}
UNTAUGHT, UNTESTED = 3, 7


@pytest.fixture(scope="module")
def some_digits(tmp_path_factory, digits) -> Path:
    """150 digits to train on, 120 held out, with two captions for each class."""
    return packed(tmp_path_factory.mktemp("some"), digits, {})


@pytest.fixture(scope="module")
def uneven_digits(tmp_path_factory, digits) -> Path:
    """The same without one class in training and another among the held-out ones."""
    without = {"train": UNTAUGHT, "test": UNTESTED}
    return packed(tmp_path_factory.mktemp("uneven"), digits, without)


def packed(folder: Path, digits: Path, without: dict[str, int]) -> Path:
    for split, count in (("train", 150), ("test", 120)):
        index = load_index(digits / split)
        samples = [index.read(number) for number in range(count)]
        for sample in samples[::3]:
            sample["txt"] = sample["txt"].replace("a handwritten", "by hand:")
        kept = [s for s in samples if s["json"]["label"] != without.get(split)]
        (folder / split).mkdir()
        write_samples(folder / split / "digits.tar", kept)
        index_folder(folder / split)
    return folder


def evaluated(name: str, data: Path, overrides, run_dir: Path, *more: str):
    """After a short run: lines of eval.json by name, the task, training and held-out samples."""
    folders = [f"data.train={data}/train", f"data.test={data}/test"]
    config = load(name, overrides, run_dir, *LESSONS, *folders, *more)
    assert trainer.train(config) == trainer.EXIT_DONE
    assert main(["eval", str(run_dir)]) == 0
    lines = json.loads((run_dir / "eval.json").read_text())
    indexes = [load_index(data / split) for split in ("train", "test")]
    train, test = (config.fields.read(index, range(len(index))) for index in indexes)
    task = config.build_task(train)
    task.load_state_dict(checkpoint.newest(run_dir / "checkpoints").weights())
    return (
        {line["name"]: line for line in lines},
        task.eval().requires_grad_(False),
        train,
        test,
    )


def nearest(keys: Tensor, query: Tensor) -> list[int]:
    """The 5 keys at the smallest angles, nearest first."""
    cosines = F.cosine_similarity(query[None].double(), keys.double())
    return cosines.argsort(descending=True, stable=True)[:5].tolist()


def vote(classes: list[int]) -> int:
    """The most frequent class; of several the one that comes first."""
    counts = Counter(classes)
    return next(c for c in classes if counts[c] == max(counts.values()))


def share(hits: Sequence[bool]) -> float:
    assert 0 < sum(hits) < len(hits), "a measure that is 0 or 1 shows little"
    return sum(hits) / len(hits)


def naive_knn(keys: Tensor, classes: list[int], queries: Tensor, truth: list[int]) -> float:
    guesses = [vote([classes[j] for j in nearest(keys, query)]) for query in queries]
    return share([guess == label for guess, label in zip(guesses, truth, strict=True)])


def test_eval_of_an_encoder(some_digits, overrides, tmp_path):
    found, task, train, test = evaluated("digits_encoder", some_digits, overrides, tmp_path)
    classes, truth = train.labels.tolist(), test.labels.tolist()
    line = found["kNN accuracy, k = 5"]
    accuracy = naive_knn(task.encoder(train.images), classes, task.encoder(test.images), truth)
    assert line["value"] == pytest.approx(accuracy)
    accuracy = naive_knn(train.images.flatten(1), classes, test.images.flatten(1), truth)
    assert line["beside"] == {"raw pixels": pytest.approx(accuracy)}


def test_eval_of_continuous_labels(some_digits, overrides, tmp_path):
    found, task, train, test = evaluated("digits_slant", some_digits, overrides, tmp_path)
    keys, errors = task.encoder(train.images), []
    for query, slant in zip(task.encoder(test.images), test.labels.tolist(), strict=True):
        errors.append(abs(sum(train.labels[j].item() for j in nearest(keys, query)) / 5 - slant))
    expected = sum(errors) / len(errors)
    assert found["mean absolute error of kNN, k = 5"]["value"] == pytest.approx(expected, rel=1e-6)


GROUPS = {"round": [0, 6, 8, 9], "straight": [1, 4, 7], "curved": [2, 3, 5]}


def test_eval_of_a_classifier(some_digits, overrides, tmp_path):
    more = ["data.labels_per_class=5", "data.balance=null"]
    found, task, _, test = evaluated("digits_hybrid", some_digits, overrides, tmp_path, *more)
    group_of = {c: name for name, classes in GROUPS.items() for c in classes}
    right: list[bool] = []
    right_group: list[bool] = []
    for logits, label in zip(
        task.classifier(task.encoder(test.images)), test.labels.tolist(), strict=True
    ):
        p_group, leaves, p = logits[:3].softmax(0), logits[3:].split([4, 3, 3]), {}
        for group, classes, siblings in zip(p_group, GROUPS.values(), leaves, strict=True):
            for number, inside in zip(classes, siblings.softmax(0), strict=True):
                p[number] = (group * inside).item()
        guess = max(p, key=lambda number: p[number])
        right.append(guess == label)
        right_group.append(group_of[guess] == group_of[label])
    assert found["classifier accuracy, level 2 of 2"]["value"] == pytest.approx(share(right))
    assert found["classifier accuracy, level 1 of 2"]["value"] == pytest.approx(share(right_group))
    assert right != right_group


def naive_zero_shot(task, train: Samples, test: Samples) -> float:
    """Of images of classes that training had texts of: those nearest to their own class's texts."""
    images, texts = task.embed_images(test.images), task.embed_pair(train.pair)
    of_class = {}
    for number in set(train.labels.tolist()):
        own = [
            F.normalize(x, dim=0) for x, c in zip(texts, train.labels, strict=True) if c == number
        ]
        of_class[number] = sum(own) / len(own)
    hits = []
    for image, label in zip(images, test.labels.tolist(), strict=True):
        if label in of_class:
            cosines = {c: F.cosine_similarity(image, x, dim=0) for c, x in of_class.items()}
            hits.append(max(cosines, key=lambda c: cosines[c].item()) == label)
    return share(hits)


def test_towers_embed_what_they_are_given(some_digits, overrides, tmp_path):
    """What the zero-shot tests call, against the networks themselves."""
    config = load("digits_captions", overrides, tmp_path, f"data.train={some_digits}/train")
    samples = digits_of(config, *range(5))
    task = config.build_task(samples)
    images, tokens = task.inputs(samples, task.begin_step(samples))
    by_training = task(images, tokens)
    torch.testing.assert_close(task.embed_images(images), by_training[0])
    torch.testing.assert_close(task.embed_pair(samples.pair), by_training[1])


@pytest.mark.parametrize(
    "data", [pytest.param("some_digits", marks=pytest.mark.slow), "uneven_digits"]
)
def test_eval_of_captions(data, request, overrides, tmp_path, capsys):
    """Two classes of the uneven data are seen in one of the two sets alone."""
    folder = request.getfixturevalue(data)
    found, task, train, test = evaluated(
        "digits_captions", folder, overrides, tmp_path, *LEARNS["digits_captions"]
    )
    told = capsys.readouterr()
    uneven = data == "uneven_digits"
    assert ("classes 3: data.train has no sample; no kNN and no probe" in told.out) is uneven
    assert ("classes 7: data.test has no sample; nothing is measured" in told.out) is uneven
    for split, count in (("train", len(train.images)), ("test", len(test.images))):
        assert f"reading data.{split}: {count} samples" in told.err  # also without a terminal
    missing = {number for number in range(10) if number not in train.labels}
    assert missing == ({UNTAUGHT} if data == "uneven_digits" else set())
    assert found["class by its texts"]["value"] == pytest.approx(naive_zero_shot(task, train, test))


@pytest.mark.parametrize(
    "name", [pytest.param("digits_captions", marks=pytest.mark.slow), "digits_profiles"]
)
def test_eval_of_partners(name, some_digits, overrides, tmp_path):
    """Each other's are an image and the text or the profile of its own sample, or an equal text."""
    found, task, _, test = evaluated(name, some_digits, overrides, tmp_path, *LEARNS[name])
    content = list(test.pair) if name == "digits_captions" else list(range(len(test.images)))
    images, partners = task.embed_images(test.images), task.embed_pair(test.pair)
    shares = []
    for a, b in ((images, partners), (partners, images)):
        best = [nearest(b, x)[0] for x in a]
        shares.append(share([content[n] == content[j] for n, j in enumerate(best)]))
    lines = [
        f"{x} finds its {y}, recall at 1" for x, y in (("image", "partner"), ("partner", "image"))
    ]
    assert [found[line]["value"] for line in lines] == pytest.approx(shares)
    assert shares[0] != shares[1]


def spoiled(digits: Path, folder: Path, split: str, count: int, keep, nulls: bool) -> None:
    """A split of which one image is cut short, one held-out one has another size, one sample has no
    label field, two have a null, and classes are thinned out by `keep`."""
    index = load_index(digits / split)
    samples = [s for s in (index.read_contents(n) for n in range(count)) if keep(s)]
    samples[3]["png"] = samples[3]["png"][:40]
    del samples[4]["json"]
    if split == "test":
        samples[7]["png"] = np.zeros((1, 9, 9), np.uint8)
    if nulls:
        samples[5]["json"] = samples[6]["json"] = b'{"label": null}'
    (folder / split).mkdir(parents=True)
    write_samples(folder / split / "digits.tar", samples)
    index_folder(folder / split)


class Rare:
    """Keeps the first `most` samples of a class."""

    def __init__(self, label: int, most: int) -> None:
        self.label, self.most, self.kept = label, most, 0

    def __call__(self, sample: dict) -> bool:
        if json.loads(sample["json"])["label"] != self.label:
            return True
        self.kept += 1
        return self.kept <= self.most


@pytest.mark.parametrize("name", ["digits_encoder", "digits_hybrid", "digits_generator"])
def test_eval_leaves_out_what_it_cannot_measure(name, digits, overrides, tmp_path, capsys):
    """And names it: the rest of the table stands."""
    for split, count in (("train", 150), ("test", 120)):
        nulls = split == "test" or name != "digits_generator"  # which trains with labels alone
        spoiled(digits, tmp_path / "data", split, count, Rare(9, 3), nulls)
    more = GENERATES if name == "digits_generator" else ["data.balance=null"]
    more = [*more, "data.max_skipped=2", "data.labels_per_class=null"]
    data = [f"data.{split}={tmp_path}/data/{split}" for split in ("train", "test")]
    config = load(name, overrides, tmp_path / "run", *LESSONS, *more, *data, "train.steps=2")
    assert trainer.train(config) == trainer.EXIT_DONE
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert told.count(" cannot be used; the first: ") == 2
    required = name == "digits_generator"  # labels: samples without one are of no use
    assert told.count("have no label") == (0 if required else 2)
    for split, unusable in (("train", 2), ("test", 5 if required else 3)):
        assert f"samples of data.{split}: {unusable} of " in told
    names = [line["name"] for line in json.loads((tmp_path / "run" / "eval.json").read_text())]
    if name == "digits_generator":
        assert "of classes 9: they have fewer than 6 samples" in told
        assert names == [
            *names_of_distances("pixels"),
            *names_of_distances("encoder"),
            *(f"{judge} agrees with the class asked for" for judge in ("classifier", "kNN")),
            *(*MANIFOLD, *COPIES),
        ]
        few = tmp_path / "data" / "test"
        write_samples(few / "digits.tar", [load_index(digits / "test").read(n) for n in range(8)])
        index_folder(few)
        assert main(["eval", str(tmp_path / "run")]) == 0
        assert "coverage: no class has 6 samples both" in capsys.readouterr().out
    else:
        assert "kNN accuracy, k = 5" in names
        assert "linear probe, 3 labels a class, mean of 20 draws" in names


def test_measures_of_too_few_samples_are_left_out(digits, overrides, tmp_path, capsys):
    """Four labelled samples are no 5 neighbours, and one class no probe; towers are measured."""
    for split, count in (("train", 40), ("test", 20)):
        index = load_index(digits / split)
        samples = [index.read(n) for n in range(count)]
        for number, sample in enumerate(samples):
            sample["json"] = {"label": 3 if number < 4 else None}
        (tmp_path / split).mkdir()
        write_samples(tmp_path / split / "digits.tar", samples)
        index_folder(tmp_path / split)
    data = [f"data.{split}={tmp_path}/{split}" for split in ("train", "test")]
    runs = [tmp_path / "run", tmp_path / "never trained", tmp_path / "nor this"]
    small = ["data.global_batch_size=16", "train.steps=2"]
    config = load("digits_captions", overrides, runs[0], *LESSONS, *data, *small)
    assert trainer.train(config) == trainer.EXIT_DONE
    capsys.readouterr()
    assert main(["eval", *map(str, runs[::-1])]) == 64  # and what can be measured is
    told = capsys.readouterr()
    assert all(run.name in told.err for run in runs[1:])
    for what in ("retrieval", "kNN accuracy, k = 5", "recall at 1"):  # a line each as it goes on
        assert (f"measuring {what}" in told.err) == (what != "recall at 1")
    assert "image finds its partner, recall at 1" in told.out
    assert "linear probe, all labels: a probe needs labelled samples of 2 classes" in told.out
    assert "kNN accuracy, k = 5: k is 5, but there are 4" in told.out

    # The same run beside held-out samples that are unlike those it was trained on.
    for size, label, code, words in (
        ((1, 16, 16), False, 0, "what goes by labels: samples of data.test have no field 'json'"),
        ((1, 16, 16), True, 0, "linear probe, all labels: a probe needs"),
        ((3, 8, 8), True, 64, "cannot read samples of data.test of the shape [3, 8, 8]"),
    ):
        for sample in samples:
            sample |= {"png": np.zeros(size, np.uint8), "json": {"label": 3}}
            if not label:
                del sample["json"]
        write_samples(tmp_path / "test" / "digits.tar", samples)
        index_folder(tmp_path / "test")
        assert main(["eval", str(runs[0])]) == code
        told = capsys.readouterr()
        assert words in told.out + told.err
        assert ("image finds its partner" in told.out) == (code == 0)


# ---------------------------------------------------------------------------- generators


GENERATES = (
    *("train.steps=8", "task.bank={capacity: 8, positives: 4}", "task.loss.temperatures=[0.1]"),
    *("task.generator={name: conv, noise_dim: 8, width: 16}", "optim.lr=0.01", "task.ema=0.5"),
    "task.features=[{name: pixels}, {name: encoder, encoder: {name: residual, widths: [8, 16]}}]",
)
DISTANCES = ("MMD^2", "sliced Wasserstein", "Fréchet distance")
MANIFOLD = ("precision", "recall", "density", "coverage")
COPIES = (
    *("distance to the nearest training sample, median", "the same, 5 % quantile"),
    *("nearer than 99 % of held-out data are", "copies of training samples"),
)


class Generator(NamedTuple):
    """A short run, and what its generator made before and after it of the same noise."""

    lines: dict[str, dict]
    before: Tensor
    made: Tensor
    task: Drift
    train: Samples
    test: Samples
    run: Path


def generator(name: str, data: Path, overrides, run_dir: Path, *more: str) -> Generator:
    lines, task, train, test = evaluated(name, data, overrides, run_dir, *more)
    untrained = configs.load_run(run_dir).build_task(train)
    keys = keyed_random.combine(0, NOISE_STREAM, torch.arange(4 * len(test.images)))
    noise = keyed_random.normal(keys, task.generator.noise_dim)
    classes = [] if test.labels is None else [test.labels.repeat(4)]
    with torch.no_grad():
        before, made = untrained.generator(noise, *classes), task.average(noise, *classes)
    return Generator(lines, before, made, task, train, test, run_dir)


@pytest.fixture(scope="module")
def digits_made(tmp_path_factory, some_digits, overrides) -> Generator:
    folder = tmp_path_factory.mktemp("digits_generator")
    return generator("digits_generator", some_digits, overrides, folder, *GENERATES)


@pytest.fixture(scope="module")
def points_made(tmp_path_factory, data_set, overrides) -> Generator:
    """Points without classes; their past ones are kept too."""
    folder, data = tmp_path_factory.mktemp("points"), data_set("eight_gaussians")
    return generator("eight_gaussians", data, overrides, folder, *GENERATES[:2])


def naive_energy(x: Tensor, y: Tensor) -> float:
    x, y = x.flatten(1).double(), y.flatten(1).double()
    apart = (x[:, None] - y).norm(dim=2).mean()
    within = [(z[:, None] - z).norm(dim=2).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return (2 * apart - sum(within)).item()


def check_distances(found: Generator, name: str, space: Callable[[Tensor], Tensor]) -> None:
    """Generated, training and untrained ones against the held-out ones, in one space."""
    with torch.no_grad():
        made, train, before, test = (
            space(x).flatten(1)
            for x in (found.made, found.train.images, found.before, found.test.images)
        )
    line, few = found.lines[f"energy distance, {name}"], len(test)
    assert line["value"] == pytest.approx(naive_energy(made, test), rel=1e-6, abs=1e-9)
    beside = {"train data": naive_energy(train, test), "untrained": naive_energy(before, test)}
    assert line["beside"] == pytest.approx(beside, rel=1e-6, abs=1e-9)
    way = (beside["untrained"] - line["value"]) / (beside["untrained"] - beside["train data"])
    line = found.lines[f"part of the way to train data, {name}"]
    assert line == {**line, "value": pytest.approx(way, rel=1e-6), "beside": {}}
    width = torch.pdist(test.double()).median().item()
    measures = (
        lambda x: evaluation.mmd(x, test, bandwidth=width),
        lambda x: evaluation.sliced_wasserstein(x, test),
        lambda x: evaluation.frechet_distance(x, test),
    )
    for title, measure in zip(DISTANCES, measures, strict=True):
        line = found.lines[f"{title}, {name}"]
        assert line["value"] == pytest.approx(measure(made[:few]), rel=1e-6)
        assert line["beside"] == {"train data": pytest.approx(measure(train[:few]), rel=1e-6)}


def names_of_distances(space: str) -> list[str]:
    titles = ("energy distance", "part of the way to train data", *DISTANCES)
    return [f"{title}, {space}" for title in titles]


def test_eval_of_a_generator_in_its_spaces(digits_made):
    classes = [f"{name} agrees with the class asked for" for name in ("classifier", "kNN")]
    spaces = names_of_distances("pixels") + names_of_distances("encoder")
    assert list(digits_made.lines) == [*spaces, *classes, *MANIFOLD, *COPIES]
    check_distances(digits_made, "pixels", lambda x: x)
    check_distances(digits_made, "encoder", digits_made.task.encoder_spaces()["encoder"])


def test_eval_of_the_classes_of_a_generator(digits_made):
    made, train, test = digits_made.made, digits_made.train, digits_made.test
    labels = test.labels.repeat(4)
    points = [x.flatten(1).double() for x in (train.images, made, test.images)]
    machine = SVC(C=10).fit(points[0], train.labels)
    line = digits_made.lines["classifier agrees with the class asked for"]
    assert line["value"] == pytest.approx(share(list(machine.predict(points[1]) == labels.numpy())))
    right = list(machine.predict(points[2]) == test.labels.numpy())
    assert line["beside"] == {"held-out data": pytest.approx(share(right))}
    line = digits_made.lines["kNN agrees with the class asked for"]
    for images, asked, found in (
        (made, labels, line["value"]),
        (test.images, test.labels, line["beside"]["held-out data"]),
    ):
        agreed = evaluation.class_agreement(train.images, train.labels, images, asked)
        assert 0 < found == pytest.approx(agreed)


def check_manifold_and_copies(found: Generator) -> None:
    """As many generated ones, and training ones of each class, as there are held out."""
    train, test, made = found.train, found.test, found.made[: len(found.test.images)]
    chosen, train_labels = list(range(len(test.images))), None
    if test.labels is not None:
        chosen, left = [], Counter(test.labels.tolist())
        for number, label in enumerate(train.labels.tolist()):
            if left[label]:
                left[label] -= 1
                chosen.append(number)
        train_labels = train.labels[chosen]
    for names, measure in (
        (MANIFOLD[:2], evaluation.precision_recall),
        (MANIFOLD[2:], evaluation.density_coverage),
    ):
        ours = measure(test.images, test.labels, made, test.labels)
        beside = measure(test.images, test.labels, train.images[chosen], train_labels)
        for name in names:
            line = found.lines[name]
            assert line["value"] == pytest.approx(getattr(ours, name))
            assert line["beside"] == {"train data": pytest.approx(getattr(beside, name))}
    generated, held_out = (
        torch.stack([(x - train.images).flatten(1).norm(dim=1).min() for x in images]).double()
        for images in (made, test.images)
    )
    expected = [
        *((generated.quantile(q), held_out.quantile(q)) for q in (0.5, 0.05)),
        ((generated <= held_out.quantile(0.01)).double().mean(), 0.01),
        ((generated == 0).sum(), (held_out == 0).sum()),
    ]
    for name, (ours, theirs) in zip(COPIES, expected, strict=True):
        line = found.lines[name]
        assert line["value"] == pytest.approx(float(ours), rel=1e-5)
        assert line["beside"] == {"held-out data": pytest.approx(float(theirs), rel=1e-5)}


def test_eval_of_the_manifold_and_of_copies(digits_made, points_made):
    check_manifold_and_copies(digits_made)
    check_manifold_and_copies(points_made)


def test_eval_of_points(points_made):
    """Without classes."""
    assert list(points_made.lines) == [*names_of_distances("pixels"), *MANIFOLD, *COPIES]
    check_distances(points_made, "pixels", lambda x: x)


def test_pictures_of_generators(digits_made, points_made):
    """Nothing is blank: generated points are blue, those of data bluish grey, forces orange."""
    for found, names in ((digits_made, {"samples"}), (points_made, {"samples", "force"})):
        assert {path.stem for path in (found.run / "plots").iterdir()} == {*names, "loss"}
        for name in (*names, "loss"):
            assert num_colours(found.run / "plots" / f"{name}.png") > 30, name
    generated, data = np.array_split(blueness(points_made.run / "plots" / "samples.png"), 2, axis=1)
    assert (generated > 50).sum() > 100
    assert (data > 50).sum() == 0
    assert (data > 5).sum() > 1000
    more_blue = blueness(points_made.run / "plots" / "force.png")
    assert (more_blue > 50).sum() > 100
    assert (more_blue < -100).sum() > 1000


def blueness(picture: Path) -> np.ndarray:
    """Blue less red, of every pixel."""
    pixels = pixels_of(picture)
    return pixels[..., 2] - pixels[..., 0]


def test_a_generator_of_many_pixels_is_measured_by_features(digits_made, monkeypatch, capsys):
    """Batch by batch: no split and no generated samples are there as pixels."""
    monkeypatch.setattr(evaluation.encoded, "MOST_PIXELS", 6000)
    monkeypatch.setattr(evaluation.generators, "PART", 100)
    kept, joined = [], evaluation.encoded.joined

    def counted(parts):
        kept.append(evaluation.encoded.num_pixels(parts))
        return joined(parts)

    monkeypatch.setattr(evaluation.generators, "joined", counted)
    monkeypatch.setattr(evaluation.splits, "joined", counted)
    assert main(["eval", str(digits_made.run)]) == 0
    told = capsys.readouterr().out
    assert "what goes by pixels: 150 samples of 64 numbers take long to compare" in told
    assert kept == [0] * 4  # two splits, two generators
    lines = lines_in(digits_made.run)
    of_classes = [f"{judge} agrees with the class asked for" for judge in ("classifier", "kNN")]
    others = [f"{name}, encoder" for name in (*of_classes, *MANIFOLD, *COPIES)]
    assert list(lines) == [*names_of_distances("encoder"), *others]
    check_distances(
        digits_made._replace(lines=lines),
        "encoder",
        digits_made.task.encoder_spaces()["encoder"],
    )
    made, train, test = (
        digits_made.task.encoder_spaces()["encoder"](x).detach()
        for x in (digits_made.made, digits_made.train.images, digits_made.test.images)
    )
    ours = evaluation.precision_recall(
        test, digits_made.test.labels, made[:120], digits_made.test.labels
    )
    assert lines["precision, encoder"]["value"] == pytest.approx(ours.precision, abs=0.01)
    assert lines["recall, encoder"]["value"] == pytest.approx(ours.recall, abs=0.01)
    agreed = evaluation.class_agreement(
        train, digits_made.train.labels, made, digits_made.test.labels.repeat(4)
    )
    assert lines["kNN agrees with the class asked for, encoder"]["value"] == pytest.approx(
        agreed, abs=0.01
    )
    assert num_colours(digits_made.run / "plots" / "samples.png") > 30
    main(["eval", str(digits_made.run), "--baselines", "--only", "copies"])
    assert list(lines_in(digits_made.run)) == list(COPIES)


# ------------------------------------------------------------------------------- options


@pytest.fixture(scope="module")
def two_view_run(some_digits, overrides, tmp_path_factory) -> Path:
    """A short run of an encoder."""
    folder = tmp_path_factory.mktemp("two_view") / "run"
    data = [f"data.train={some_digits}/train", f"data.test={some_digits}/test"]
    config = load("digits_encoder", overrides, folder, *LESSONS, *data, "train.steps=2")
    assert trainer.train(config) == trainer.EXIT_DONE
    return folder


def names_in(run: Path) -> list[str]:
    return [line["name"] for line in json.loads((run / "eval.json").read_text())]


def test_only_some_measures(two_view_run, capsys):
    assert main(["eval", str(two_view_run), "--only", "probe, knn"]) == 0
    assert names_in(two_view_run) == ["kNN accuracy, k = 5", "linear probe, all labels"]
    assert "measuring a map" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--only", "knn,nkk"), "nkk"), (("--limit", "0"), "limit 0")],
)
def test_options_that_mean_nothing(flags, words, two_view_run, capsys):
    assert main(["eval", str(two_view_run), *flags]) == 64
    assert words in capsys.readouterr().err


def test_a_limit_takes_samples_all_over_each_split(two_view_run, some_digits):
    """Of 150 and 120 samples every third: 40 are 120 / 3, and 50 would be 150 / 3."""
    config = configs.load_run(two_view_run)
    table = Table(options=EvalOptions(limit=40))
    splits = read_splits(config, table)
    assert splits.test.index.tolist() == list(range(0, 120, 3))
    assert splits.train.index.tolist() == [number * 150 // 40 for number in range(40)]


def test_encoded_samples_are_those_of_the_network(two_view_run, monkeypatch):
    """Batches, of which the last is smaller, against all samples at once; pixels beyond the limit
    are left out, unless they are asked for."""
    config = configs.load_run(two_view_run)
    whole = read_splits(config).train
    index = load_index(config.data.train)
    task = config.build_task(whole.rows(torch.arange(1))).eval()
    split = Split(config.fields, index, "data.train")
    monkeypatch.setattr(evaluation.splits, "BATCH", 64)
    for most, baselines, kept in ((2**24, False, True), (6000, False, False), (6000, True, True)):
        monkeypatch.setattr(evaluation.encoded, "MOST_PIXELS", most)
        found, reasons = split.encoded(partial(encode, task), baselines)
        assert reasons == []
        assert (found.pixels is not None) is kept
        torch.testing.assert_close(found.features, task.represent(whole.images))
        assert torch.equal(found.labels, whole.labels)
        assert torch.equal(found.index, whole.index)
        if kept:
            assert torch.equal(found.pixels, whole.images)


def test_many_pixels_are_named_where_they_are_left_out(two_view_run, monkeypatch, capsys):
    monkeypatch.setattr(evaluation.encoded, "MOST_PIXELS", 6000)
    for flags, beside in (((), {}), (("--baselines",), {"raw pixels"})):
        assert main(["eval", str(two_view_run), "--only", "knn", *flags]) == 0
        assert ("left out" in capsys.readouterr().out) is not bool(beside)
        (line,) = json.loads((two_view_run / "eval.json").read_text())
        assert set(line["beside"]) == set(beside)


# ----------------------------------------------------------------------- further measures


def lines_in(run: Path, name: str = "eval.json") -> dict[str, dict]:
    return {line["name"]: line for line in json.loads((run / name).read_text())}


def trained_task(run: Path, samples: Samples):
    task = configs.load_run(run).build_task(samples)
    task.load_state_dict(checkpoint.newest(run / "checkpoints").weights())
    return task.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def all_lines(two_view_run) -> dict[str, dict]:
    assert main(["eval", str(two_view_run), "--only", "all"]) == 0
    return lines_in(two_view_run)


def test_measures_by_wish_are_those_of_the_network(two_view_run, some_digits, all_lines):
    splits = read_splits(configs.load_run(two_view_run))
    train, test = splits.train, splits.test
    task = trained_task(two_view_run, train)
    known, new = task.represent(train.images), task.represent(test.images)
    embedded = task.embed_representations(new)
    views = torch.stack([task.represent(x) for x in task.make_views(test, 10)], dim=1)
    pairs = [task.embed_representations(views[:, i]) for i in (0, 1)]
    ranked = ranking.rank(new, new, test.labels, test.labels, without_itself=True)
    accuracy, c = probe.probe_sweep(known, train.labels, new, test.labels)
    expected = {
        "RankMe, representation": representation.rank_me(new),
        "RankMe, embedding": representation.rank_me(embedded),
        "uniformity": representation.uniformity(embedded),
        "LiDAR, 10 views of 120 samples": representation.lidar(views),
        "alignment of two views": representation.alignment(*pairs),
        "NMI of 10 clusters with the classes": representation.nmi(new, test.labels),
        "linear probe, all labels, C by a sweep": accuracy,
        "sample to its class, hit@1": ranked.hit_rate(1),
        "sample to its class, hit@5": ranked.hit_rate(5),
        "sample to its class, hit@10": ranked.hit_rate(10),
        "sample to its class, recall@1": ranked.recall(1),
        "sample to its class, recall@5": ranked.recall(5),
        "sample to its class, recall@10": ranked.recall(10),
        "sample to its class, nDCG@10": ranked.ndcg(10),
        "sample to its class, MAP": ranked.mean_average_precision(),
        "sample to its class, MRR": ranked.mean_reciprocal_rank(),
        "sample to its class, median rank of 119": ranked.median_rank(),
    }
    for name, value in expected.items():
        assert all_lines[name]["value"] == pytest.approx(value, rel=1e-3), name
    usual = [
        "kNN accuracy, k = 5",
        "linear probe, all labels",
        *(x for x in all_lines if "20" in x),
    ]
    assert {*all_lines} == {*expected, *usual}
    assert all_lines["RankMe, representation"]["beside"] == {"at most": min(new.shape)}
    assert all_lines["linear probe, all labels, C by a sweep"]["beside"] == {"C": c}


def evaluated_here(run: Path, *flags: str) -> int:
    """On a rank, of a copy of a run."""
    return main(["eval", str(run), *flags])


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_measure_the_same(world_size, two_view_run, all_lines, tmp_path):
    shutil.copytree(two_view_run, tmp_path / "run")
    numbers = ",".join(name for name in MEASURES if name != "map")
    found = run_ranks(evaluated_here, world_size, tmp_path / "run", "--only", numbers)
    assert found == [0] * world_size
    lines = lines_in(tmp_path / "run")
    assert list(lines) == list(all_lines)
    for name, line in all_lines.items():
        # Batches of other sizes round differently: one of 120 samples may be at a border.
        assert lines[name]["value"] == pytest.approx(line["value"], rel=0.002, abs=0.009), name
    # Fewer samples than ranks, after a run that all refuse.
    runs = tmp_path / "none", str(tmp_path / "run")
    few = "--only", "rankme,knn", "--limit", "2"
    found = run_ranks(evaluated_here, world_size, *runs, *few)
    assert found == [64] * world_size
    assert {*lines_in(tmp_path / "run")} == {"RankMe, representation", "RankMe, embedding"}


@pytest.mark.slow
def test_ranks_measure_a_generator(digits_made, tmp_path):
    shutil.copytree(digits_made.run, tmp_path / "run")
    assert main(["eval", str(tmp_path / "run")]) == 0
    alone = lines_in(tmp_path / "run")
    assert run_ranks(evaluated_here, 2, tmp_path / "run") == [0, 0]
    lines = lines_in(tmp_path / "run")
    assert list(lines) == list(alone)
    for name, line in alone.items():
        assert lines[name]["value"] == pytest.approx(line["value"], rel=1e-4, abs=1e-5), name


def test_a_split_by_name(two_view_run, some_digits, digits, tmp_path, capsys, overrides):
    """Beside data.test; its results stand in a file of their own."""
    index = load_index(digits / "test")
    (some_digits / "val").mkdir()
    write_samples(some_digits / "val" / "a.tar", [index.read(n) for n in range(150, 200)])
    index_folder(some_digits / "val")
    only = "--only", "knn,rankme"
    assert main(["eval", str(two_view_run), *only]) == 0
    of_test = lines_in(two_view_run)
    for split in ("val", f"{some_digits}/val"):
        (two_view_run / "eval-val.json").unlink(missing_ok=True)
        assert main(["eval", str(two_view_run), *only, "--split", split]) == 0
        lines = lines_in(two_view_run, "eval-val.json")
        assert list(lines) == list(of_test) != []
        assert lines["RankMe, embedding"]["beside"] == {"at most": 50}
    assert lines_in(two_view_run) == of_test
    capsys.readouterr()
    assert main(["eval", str(two_view_run), "--split", "vla"]) == 64
    told = capsys.readouterr().err
    assert "--split vla is no folder" in told
    assert "test, train, val" in told
    shutil.rmtree(some_digits / "val")


def test_a_run_without_a_held_out_split(some_digits, overrides, tmp_path, capsys):
    """Or labels: what needs none is measured, and the rest is named."""
    without = ["data.test=null", "data.label=null", "data.num_classes=null", "train.steps=1"]
    config = load(
        "digits_encoder", overrides, tmp_path, *LESSONS, f"data.train={some_digits}/train", *without
    )
    assert trainer.train(config) == trainer.EXIT_DONE
    capsys.readouterr()
    assert main(["eval", str(tmp_path)]) == 64
    assert "or name a folder beside data.train" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--split", "test", "--only", "knn,uniformity"]) == 0
    told = capsys.readouterr().out
    assert "what goes by labels: eval measures this run by labels; set data.label" in told
    assert {*lines_in(tmp_path, "eval-test.json")} == {"uniformity"}
    assert main(["eval", str(tmp_path), "--split", "test", "--only", "nmi"]) == 64


def test_few_labels_by_number_and_share(two_view_run, capsys):
    assert main(["eval", str(two_view_run), "--only", "few", "--few", "20%, 3,1000"]) == 0
    titles = [
        f"linear probe, {x}, mean of 20 draws" for x in ("20 % of labels", "3 labels a class")
    ]
    assert names_in(two_view_run) == titles
    assert "1000 labels a class, mean of 20 draws: the probe takes 1000" in capsys.readouterr().out
    for few in ("0", "x", "100%", "1.5", "1..2"):
        assert main(["eval", str(two_view_run), "--few", few]) == 64
        assert f"--few {few} is no number of labels" in capsys.readouterr().err


@pytest.fixture(scope="module")
def captions_run(some_digits, overrides, tmp_path_factory) -> Path:
    """A short run of two towers."""
    folder = tmp_path_factory.mktemp("captions") / "run"
    data = [f"data.train={some_digits}/train", f"data.test={some_digits}/test"]
    config = load("digits_captions", overrides, folder, *LESSONS, *data, "train.steps=2")
    assert trainer.train(config) == trainer.EXIT_DONE
    return folder


def test_rankings_of_partners(captions_run, capsys):
    """Equal captions are right answers of each other; a k above the number of keys is left out."""
    only = "--only", "ranking,alignment"
    assert main(["eval", str(captions_run), *only]) == 0
    lines = lines_in(captions_run)
    test = read_splits(configs.load_run(captions_run)).test
    task = trained_task(captions_run, test)
    images, partners = task.embed_images(test.images), task.embed_pair(test.pair)
    texts = sorted({*test.pair})
    groups = torch.tensor([texts.index(text) for text in test.pair])
    for title, found in (
        ("image to partner", ranking.rank(images, partners, groups, groups)),
        ("partner to image", ranking.rank(partners, images, groups, groups)),
    ):
        assert int(found.counts.max()) > 2
        value = {name: line["value"] for name, line in lines.items()}
        assert value[f"{title}, hit@5"] == pytest.approx(found.hit_rate(5), abs=0.01)
        assert value[f"{title}, recall@5"] == pytest.approx(found.recall(5), rel=0.02)
        assert value[f"{title}, MAP"] == pytest.approx(found.mean_average_precision(), rel=1e-2)
        assert value[f"{title}, median rank of 120"] == pytest.approx(found.median_rank(), rel=0.1)
    aligned = representation.alignment(images, partners)
    assert value["alignment of images and partners"] == pytest.approx(aligned, rel=1e-4)
    capsys.readouterr()
    assert main(["eval", str(captions_run), *only, "--limit", "8"]) == 0
    assert "image to partner, k = 10: there are 8 keys" in capsys.readouterr().out
    assert not any("@10" in name for name in lines_in(captions_run))
    assert "image to partner, nDCG@5" in lines_in(captions_run)


def test_a_collapsed_encoder_does_not_look_perfect(two_view_run, tmp_path):
    splits = read_splits(configs.load_run(two_view_run))
    task = trained_task(two_view_run, splits.train)
    train, test = (
        replace(encode(task, x), features=torch.ones(len(x.index), task.dim), pixels=None)
        for x in (splits.train, splits.test)
    )
    views = replace(test, features=torch.ones(len(test.index), 10, task.dim))
    table = Table(options=EvalOptions(only=frozenset(MEASURES) - {"map"}))
    measure_encoder(task, evaluation.Splits(train, test), views, tmp_path, table)
    value = {name: number for name, number, _ in table.lines}
    most = test.labels.bincount().max().item() / len(test.labels)
    for name in ("kNN accuracy, k = 5", *(x for x in value if "probe" in x)):
        assert value[name] <= most + 0.02, name
    assert value["NMI of 10 clusters with the classes"] == 0
    assert value["RankMe, representation"] == pytest.approx(1)
    assert value["uniformity"] == pytest.approx(0, abs=1e-6)
    assert value["sample to its class, hit@10"] == 0
    assert value["sample to its class, median rank of 119"] > 100
    left_out = dict(table.left_out)
    assert "collapsed" in left_out["alignment of two views"]
    assert "all views of a sample are equal" in left_out["LiDAR, 10 views of 120 samples"]


def test_splits_of_tables_and_folders_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/train", "photos/val"):
        (tmp_path / name).mkdir(parents=True)

    def sources(train, test, split):
        data = DataConfig(train=train, test=test, global_batch_size=2)
        return configs_of(held_out(data, split).test)

    table, folder = {"name": "rows", "path": "a.parquet", "split": "x"}, {"name": "folder"}
    (found,) = sources({**table, "label": "kind", "weight": 2}, None, "val")
    assert (found.split, found.label, found.path, found.weight) == (
        "val",
        "kind",
        "a.parquet",
        None,
    )
    photos = {**folder, "path": "photos/train/", "classes": ["a", "b"]}
    (found,) = sources([photos], [photos], "val")
    assert (found.path, found.classes) == ("photos/val", ("a", "b"))
    (found,) = sources("photos/train", None, "val")
    assert found.shards == "photos/val"
    (found,) = sources("s3://bucket/train", None, "val")
    assert found.shards == "s3://bucket/val"
    (found,) = sources("photos/train", None, "photos/val")  # without shards: of images
    assert (found.name, found.path) == ("folder", "photos/val")
    assert sources("a", "b", None) == configs_of("b")
    with pytest.raises(
        ConfigError, match=r"--split vla is no folder in photos; name one of train, val"
    ):
        sources("photos/train", None, "vla")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("templates: [a photo of a cat]", "which has 0 places {} for the name of a class"),
        ("templates: ['{} and {}']", "which has 2 places {}"),
        ("templates: []", "templates is empty"),
        ("classes: [cat]", "templates"),
        ("templates: ['a {}']\nclasses: [cat, cat]", "classes holds a name twice"),
        ("templates: ['a {}'", "prompts.yaml"),
    ],
)
def test_prompts_that_are_none_are_refused_before_the_run(text, words, tmp_path, capsys):
    (tmp_path / "prompts.yaml").write_text(text)
    flags = "--prompts", str(tmp_path / "prompts.yaml")
    assert main(["eval", str(tmp_path / "no run"), *flags]) == 64
    assert words in capsys.readouterr().err


def test_classes_by_prompts(captions_run, tmp_path, two_view_run, capsys):
    test = read_splits(configs.load_run(captions_run)).test
    task = trained_task(captions_run, test)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    prompts = tmp_path / "prompts.yaml"
    templates = ["a handwritten {}", "by hand: {}"]
    prompts.write_text(json.dumps({"templates": templates, "classes": names}))
    assert main(["eval", str(captions_run), "--only", "zero-shot", "--prompts", str(prompts)]) == 0
    rows = []
    for name in names:
        texts = task.embed_pair([template.replace("{}", name) for template in templates])
        rows.append(sum(F.normalize(x, dim=0) for x in texts))
    images = task.embed_images(test.images)
    hits = [
        max(range(10), key=lambda c: F.cosine_similarity(image, rows[c], dim=0).item()) == label
        for image, label in zip(images, test.labels.tolist(), strict=True)
    ]
    line = lines_in(captions_run)["class by 2 prompts"]
    assert line["value"] == pytest.approx(share(hits))
    capsys.readouterr()
    prompts.write_text(json.dumps({"templates": templates, "classes": names[:4]}))
    assert main(["eval", str(captions_run), "--only", "zero-shot", "--prompts", str(prompts)]) == 0
    assert "the prompts name 4 classes, and there are 10" in capsys.readouterr().out
    flags = "--only", "zero-shot,rankme", "--prompts", str(prompts)
    assert main(["eval", str(two_view_run), *flags]) == 0
    assert "class by prompts: prompts are for runs of the task paired" in capsys.readouterr().out
