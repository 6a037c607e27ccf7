"""What a user may get wrong about labels, towers, queues and rewards: one sentence each."""

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS, run_forked

from dist_contrastive.cli import main
from dist_contrastive.config import load
from dist_contrastive.data import index_folder, load_index
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.metrics import read_rows

HYBRID, MOCO, CAPTIONS, SUPCON, SLANT = (
    f"digits_{name}" for name in ("hybrid", "moco", "captions", "supcon", "slant")
)
CROPS = "digits_multicrop"
PLAIN = "data.balance=null"
RESNET = "name: transformers, model_type: resnet, config: {hidden_sizes: [8], depths: [1]}"
VIT = (
    "name: transformers, model_type: vit, config: {hidden_size: 8, num_attention_heads: 1, "
    "num_hidden_layers: 1, intermediate_size: 8, patch_size: 4}"
)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (MOCO, ["task.queue_size=32"], "task.queue_size=32 does not hold whole batches of"),
        (MOCO, ["task.queue_size=200"], "data.global_batch_size=64; set 192 or 256"),
        (MOCO, [f"task.encoder={{{RESNET}, row_independent: false}}"], "know its own key by them"),
        (CROPS, [f"task.encoder={{{VIT}}}"], "cannot read crops of 6 x 6 pixels"),
        (CAPTIONS, ["task.head.out=32"], "task.head.out=32 and task.pair.head.out=64 differ"),
        (CAPTIONS, ["data.pair=null"], "needs data.pair, the field of the second modality"),
        (CAPTIONS, ["data.pair=npy"], "text"),
        (CAPTIONS, ["data.pair=wav"], "samples have no field 'wav'"),
        (CAPTIONS, ["data.labels_per_class=3"], "the task does not train with labels"),
        (
            HYBRID,
            ["data.label=null", "data.num_classes=null", PLAIN],
            "labels_per_class needs classes",
        ),
        (HYBRID, ["task.hierarchy={a: [0, 1], b: [2, 3]}"], "classes are missing from the"),
        (HYBRID, ["task.hierarchy.round=[0, 6, 8, 11]"], "label outside the hierarchy: class 11"),
        (HYBRID, ["task.hierarchy.round=[0, 6, 8, 9, 1]"], "class 1 stands twice in the hierarchy"),
        (HYBRID, ["data.num_classes=7", "task.hierarchy=null"], "outside 0..6"),
        (HYBRID, ["task.supervised.level_weights=[1, 2, 3]"], "level_weights"),
        (HYBRID, ["task.reward.function=nowhere:f"], "nowhere"),
        (HYBRID, ["task.reward.function=math"], "module:function"),
        (HYBRID, ["task.reward.weight=[[0.5, 1], [0.5, 2]]"], "must grow from 0 to 1, as in"),
        (
            HYBRID,
            ["task.reward.weight=-1"],
            "task.reward.weight=-1: -1 must be a number, 0 or more",
        ),
        (HYBRID, ["task.reward.weight=[1, 2]"], "give a number, or points as [[0, 0], [0.5, 1]]"),
        (HYBRID, ["task.reward.weight=[[2, 1]]"], "progress of points must grow from 0 to 1"),
        (HYBRID, [f"task.{t}=null" for t in ("supervised", "reward", "contrastive")], "absent"),
        (HYBRID, ["task.contrastive.loss={name: ntxent}", "task.num_views=1"], "needs at least 2"),
        (HYBRID, ["task.hierarchy={a: [0, 1, 2, 3, 4], b: [5, 6, 7, 8, x]}"], "'x' stands in the"),
        (HYBRID, ["task.supervised.level_weights=[0, 0]"], "all are 0; give one level a weight"),
        (HYBRID, ["task.reward.function=broken:f"], "cannot be imported (division by zero)"),
        (HYBRID, ["data.pair=txt"], "data.pair=txt is set, but the task has no second modality"),
        (SUPCON, ["data.labels_per_class=1", "task.num_views=1", PLAIN], "no two rows that are"),
        (SUPCON, ["data.balance.classes=11"], "11"),
        (SUPCON, ["data.balance.samples_per_class=200"], "200"),
        (SUPCON, ["data.num_classes=null", PLAIN], "task.loss.max_delta=None with data.num_cl"),
        (SUPCON, ["data.labels_per_class=1000", PLAIN], "1000"),
        (SLANT, ["task.loss.max_delta=null"], "max_delta, the largest difference of similar"),
        (SLANT, ["data.label=json.label", "data.num_classes=10"], "task.loss.max_delta=0.03"),
    ],
)
def test_refused_before_the_first_step(
    name, options, words, tmp_path, overrides, capsys, monkeypatch
):
    (tmp_path / "broken.py").write_text("x = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    smaller = ["data.balance={classes: 5, samples_per_class: 4}"] if name == HYBRID else []
    smaller = ["data.balance={classes: 8, samples_per_class: 8}"] if name == SUPCON else smaller
    arguments = [*overrides(tmp_path / "run"), *smaller, *options]
    assert main(["train", str(CONFIGS / f"{name}.yaml"), *arguments]) == 64
    message = capsys.readouterr().err
    assert words in message
    assert len(message.strip().splitlines()) == 1
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


def relabelled(digits: Path, folder: Path, label: int | None) -> Path:
    """The first 80 training digits, all with one label."""
    index = load_index(digits / "train")
    samples = [index.read(number) for number in range(80)]
    folder.mkdir()
    rows = [{**s, "json": {**s["json"], "label": label}} for s in samples]
    write_samples(folder / "digits.tar", rows)
    index_folder(folder)
    return folder


@pytest.mark.parametrize(("label", "words"), [(None, "missing"), (3, "class 3")])
@pytest.mark.parametrize("name", [SUPCON, HYBRID])
def test_labels_that_teach_nothing(name, label, words, tmp_path, digits, overrides, capsys):
    folder = relabelled(digits, tmp_path / "data", label)
    arguments = [*overrides(tmp_path / "run"), f"data.train={folder}", PLAIN]
    arguments.append("data.labels_per_class=null")
    assert main(["train", str(CONFIGS / f"{name}.yaml"), *arguments]) == 64
    message = capsys.readouterr().err
    assert words in message
    assert len(message.strip().splitlines()) == 1


NO_PAIRS = {  # labels of 80 samples, loss, options, words
    "all different": (range(80), "supcon", [], "no two of 80 labels are similar"),
    "some missing": ([*range(60), *[None] * 20], "triplet", [], "no two of 80 labels"),
    "beyond any margin": (range(80), "{name: cosine_embedding, margin: 1}", [], "no two of 80"),
    "far apart": (
        [2 * n / 7 for n in range(80)],
        "{name: supcon, max_delta: 0.1}",
        ["data.num_classes=null"],
        "no two of 80 labels are similar within max_delta=0.1",
    ),
    "all near": (
        [n / 1000 for n in range(80)],
        "{name: triplet, max_delta: 0.1}",
        ["data.num_classes=null"],
        "all 80 labels are similar within max_delta=0.1",
    ),
}


def labelled(digits: Path, folder: Path, labels) -> list[str]:
    """Digits with these labels, and the options with which one view of them is compared."""
    index = load_index(digits / "train")
    folder.mkdir()
    rows = [{**index.read(n), "json": {"label": label}} for n, label in enumerate(labels)]
    write_samples(folder / "digits.tar", rows)
    index_folder(folder)
    data = [f"data.train={folder}", "data.num_classes=100", "data.labels_per_class=null"]
    return [*data, PLAIN, "task.num_views=1", "task.encoder={name: residual, widths: [8]}"]


@pytest.mark.parametrize("case", NO_PAIRS)
def test_labels_without_the_pairs_that_a_loss_needs(case, tmp_path, digits, overrides, capsys):
    labels, loss, more, words = NO_PAIRS[case]
    loss = loss if loss.startswith("{") else f"{{name: {loss}}}"
    options = labelled(digits, tmp_path / "data", labels)
    arguments = [*overrides(tmp_path / "run"), *options, *more, f"task.loss={loss}"]
    for name in ("doctor", "train"):
        assert main([name, str(CONFIGS / f"{SUPCON}.yaml"), *arguments]) == 64
        told = capsys.readouterr()
        assert words in told.out + told.err
    more_views = [*arguments, "task.num_views=2", "train.steps=1"]
    assert main(["train", str(CONFIGS / f"{SUPCON}.yaml"), *more_views]) == (
        64 if case == "all near" else 0
    )


def test_pairs_that_no_batch_has_are_told_of(tmp_path, digits, overrides, capsys):
    """Two of 80 samples are similar; they do not meet."""
    options = labelled(digits, tmp_path / "data", [0, *range(79)])
    arguments = [*overrides(tmp_path / "run"), *options, "data.global_batch_size=4", "data.lanes=2"]
    assert main(["train", str(CONFIGS / f"{SUPCON}.yaml"), *arguments, "train.steps=13"]) == 0
    assert {row["rows_with_positives"] for row in read_rows(tmp_path / "run")} == {0}
    assert capsys.readouterr().err.count("has a row with a positive, so nothing is learned") == 1


def test_a_rare_class_ends_no_run(tmp_path, digits, overrides):
    """Most batches of 16 hold one class alone; hybrid and triplet go on."""
    labels = [int(n % 20 == 0) for n in range(80)]
    options = labelled(digits, tmp_path / "data", labels)
    small = ["data.global_batch_size=8", "data.num_classes=2", "train.steps=20"]
    for number, (name, loss) in enumerate(
        (
            (SUPCON, ["task.loss={name: triplet, distance: cosine}"]),
            (SUPCON, ["task.loss={name: triplet, mining: hard}"]),
            (HYBRID, ["task.contrastive.loss={name: triplet}", "task.hierarchy=null"]),
        )
    ):
        run_dir = tmp_path / f"run-{number}"
        arguments = [*overrides(run_dir), *options, *small, *loss]
        assert main(["train", str(CONFIGS / f"{name}.yaml"), *arguments]) == 0
        counts = [row["valid_triplets"] for row in read_rows(run_dir)]
        assert 0 in counts
        assert any(counts)


def test_a_text_that_yaml_makes_of_a_number(tmp_path, overrides):
    options = overrides(tmp_path / "run", "task.reward.weight=[[0, 1e-3]]", PLAIN)
    assert load(CONFIGS / f"{HYBRID}.yaml", options).task.reward.weight == ((0, 0.001),)


def packed(digits: Path, folder: Path, change) -> Path:
    """Two shards of 40 digits each; `change` makes the samples of the second."""
    index = load_index(digits / "train")
    samples = [index.read(number) for number in range(80)]
    folder.mkdir()
    write_samples(folder / "a.tar", samples[:40])
    write_samples(folder / "b.tar", [{**s, **change(s)} for s in samples[40:]])
    index_folder(folder)
    return folder


CHANGES = {
    "longer": (lambda s: {"npy": np.zeros(20, np.float32)}, "holds 20 in 'npy', and the first of"),
    "larger": (lambda s: {"png": np.zeros((1, 9, 9), np.uint8)}, "holds 1 x 9 x 9 in 'png'"),
    "nan": (lambda s: {"npy": np.full(16, np.nan, np.float32)}, "holds NaN or infinity in 'npy'"),
}


@pytest.mark.parametrize("name", [pytest.param("longer", marks=pytest.mark.slow), "larger", "nan"])
def test_samples_unlike_the_first_end_all_ranks(name, tmp_path, digits, overrides):
    """Only the second rank reads some at first."""
    change, words = CHANGES[name]
    data = f"data.train={packed(digits, tmp_path / 'data', change)}"
    options = [*overrides(tmp_path / "run"), data, "data.lanes=2", "data.shuffle_window=8"]
    options.append("data.global_batch_size=16")
    done = run_forked("train", CONFIGS / "digits_profiles.yaml", *options, number=2)
    assert done.returncode == 64, done.stderr
    assert done.stderr.count(words) == 2
    assert "Traceback" not in done.stderr


REWARDS = """
import os
import torch

def fails_on_rank_1(decisions, labels, hierarchy):
    if os.environ.get("RANK") == "1":
        raise KeyError("price list")
    return (decisions == labels).float()

def too_few(decisions, labels, hierarchy):
    return (decisions == labels).float()[:-1]

def infinite(decisions, labels, hierarchy):
    return torch.where(decisions == labels, 0.0, -torch.inf)

def second_best(decisions, labels, hierarchy):
    return ((decisions - labels) % 10 == 1).float()
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """A module of the user's own, in the current folder."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    yield "task.reward.weight=1", PLAIN
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize(("function", "code"), [("too_few", 64), ("infinite", 70)])
def test_rewards_that_cannot_be_used(function, code, rewards, tmp_path, overrides, capsys):
    options = [
        *overrides(tmp_path / "run"),
        *rewards,
        f"task.reward.function=my_rewards:{function}",
    ]
    assert main(["train", str(CONFIGS / f"{HYBRID}.yaml"), *options]) == code
    assert f"my_rewards:{function}" in capsys.readouterr().err


def test_a_reward_that_fails_on_one_rank_ends_both(rewards, tmp_path, overrides):
    options = [*overrides(tmp_path / "run"), *rewards]
    options.append("task.reward.function=my_rewards:fails_on_rank_1")
    done = run_forked("train", CONFIGS / f"{HYBRID}.yaml", *options, number=2)
    assert done.returncode == 64, done.stderr
    assert done.stderr.count("price list") == 2
    assert "Traceback" not in done.stderr


def test_a_reward_of_the_users_own_is_followed(rewards, tmp_path, overrides):
    """By reward alone the classifier learns to decide for what is rewarded."""
    options = [
        *overrides(tmp_path / "run"),
        *rewards,
        "task.reward.function=my_rewards:second_best",
    ]
    options += [
        "train.steps=60",
        "optim.lr=0.005",
        "data.labels_per_class=null",
        "task.num_views=1",
    ]
    options += ["task.supervised=null", "task.contrastive=null", "task.hierarchy=null"]
    options += ["task.reward.draws=8"]
    assert main(["train", str(CONFIGS / f"{HYBRID}.yaml"), *options]) == 0
    rewarded = [row["mean_reward"] for row in read_rows(tmp_path / "run")]
    assert rewarded[-1] > 0.45 > 0.25 > rewarded[0]
