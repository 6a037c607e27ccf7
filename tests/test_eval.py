"""What `eval` says, against the same written out by hand."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS
from torch import Tensor

from dist_contrastive import checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.cli import main
from dist_contrastive.config import RunConfig
from dist_contrastive.data import ShardIndex, index_folder
from dist_contrastive.data.fields import Samples
from dist_contrastive.data.samples import write_samples
from dist_contrastive.tasks import build_task

TINY = "task.encoder.widths=[8, 16]"


def load(name: str, overrides, run_dir: Path, *more: str) -> RunConfig:
    return configs.load(CONFIGS / f"{name}.yaml", overrides(run_dir, TINY, *more))


def digits_of(config: RunConfig, *numbers: int) -> Samples:
    return config.fields.read(ShardIndex.load(config.data.train), numbers)


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
        index = ShardIndex.load(digits / split)
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
    indexes = [ShardIndex.load(data / split) for split in ("train", "test")]
    train, test = (config.fields.read(index, range(len(index))) for index in indexes)
    task = build_task(config, train)
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
    task = build_task(config, samples)
    images, tokens = task.inputs(samples)
    by_training = task(images, tokens)
    torch.testing.assert_close(task.embed_images(images), by_training[0])
    torch.testing.assert_close(task.embed_pair(samples.pair), by_training[1])


@pytest.mark.parametrize("data", ["some_digits", "uneven_digits"])
def test_eval_of_captions(data, request, overrides, tmp_path):
    """Two classes of the uneven data are seen in one of the two sets alone."""
    folder = request.getfixturevalue(data)
    found, task, train, test = evaluated(
        "digits_captions", folder, overrides, tmp_path, *LEARNS["digits_captions"]
    )
    missing = {number for number in range(10) if number not in train.labels}
    assert missing == ({UNTAUGHT} if data == "uneven_digits" else set())
    assert found["class by its texts"]["value"] == pytest.approx(naive_zero_shot(task, train, test))


@pytest.mark.parametrize("name", LEARNS)
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
