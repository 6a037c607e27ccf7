"""A task, an encoder and a generator of the user's own: by import path, or as objects."""

from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from own_tasks import Flat, Line, Views3

from dist_contrastive import config as configs
from dist_contrastive.cli import main
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import InfoNCE, SupCon
from dist_contrastive.runs import load_weights

OWN_MODULES = {
    "encoder": ("digits_encoder", "task.encoder={name: 'own_tasks:Flat', dim: 12}"),
    "task": (
        "digits_encoder",
        "task={name: 'own_tasks:Views3', num_views: 4, loss: {name: infonce}, "
        "encoder: {name: residual, widths: [8]}}",
    ),
    "generator": ("digits_generator", "task.generator={name: 'own_tasks:Line', noise_dim: 3}"),
}


@pytest.mark.parametrize("kind", OWN_MODULES)
def test_training_with_own_tasks_and_models(kind, tmp_path: Path, overrides):
    """By the command; what opens the run later finds them by its saved config."""
    name, own = OWN_MODULES[kind]
    folder = tmp_path / "run"
    more = ["task.features=[{name: pixels}]"] if kind == "generator" else []
    options = overrides(folder, own, *more, "train.steps=2", "data.global_batch_size=32")
    assert main(["train", str(CONFIGS / f"{name}.yaml"), *options]) == 0
    config = configs.load_run(folder)
    example = config.fields.read(config.data.open_train()[0], [0])
    task = config.build_task(example)
    load_weights(task, folder)
    if kind == "encoder":
        assert isinstance(task.encoder, Flat)
        assert task.represent(example.images).shape == (1, 12)
    elif kind == "generator":
        assert isinstance(task.generator, Line)
        assert task.generate(torch.tensor([3]), 1, seed=0).shape == example.images.shape
    else:
        assert isinstance(task, Views3)
        assert len(task(*task.inputs(example, task.begin_step(example)))) == 4


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("task.encoder={name: 'no_such_module:A'}", "no_such_module:A cannot be imported"),
        ("task.encoder={name: 'own_tasks:Nothing'}", "own_tasks:Nothing is not there"),
        ("task.encoder={name: 'own_tasks:Line'}", "own_tasks:Line is no encoder"),
        ("task.encoder={name: 'own_tasks:Flat', dim: 0}", "dim=0"),
        ("task.encoder={name: 'own_tasks:Flat', dims: 4}", "dims is not a known setting"),
        ("task.encoder={name: 'dist_contrastive.models:TextEncoder'}", "it reads texts"),
        ("task.name=own_tasks:Flat", "own_tasks:Flat is no task"),
        ("task.name=own_tasks:Views3", "crops is not a known setting"),
    ],
)
def test_own_modules_that_do_not_fit_are_one_sentence(option, words, tmp_path, overrides):
    options = overrides(tmp_path / "run", "task.crops=null", option)
    with pytest.raises(ConfigError) as refused:
        configs.load(CONFIGS / "digits_encoder.yaml", options)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_own_objects_take_the_place_of_configured_ones(tmp_path: Path, overrides):
    config = configs.load(CONFIGS / "digits_encoder.yaml", overrides(tmp_path / "run"))
    example = config.fields.read(config.data.open_train()[0], [0, 1, 2])
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    loss = InfoNCE(temperature=0.3)
    task = config.build_task(example, encoder, loss)
    assert task.encoder is encoder
    assert task.loss is loss
    assert task.dim == 5
    context = task.begin_step(example)
    terms = task.compare(task(*task.inputs(example, context)), example, context)
    assert terms["contrastive"].isfinite()
    unpooled = torch.nn.Conv2d(1, 4, 3)
    for own, words in (
        ({"encoder": unpooled}, r"makes \(1, 4, 6, 6\)"),
        ({"encoder": torch.nn.Linear(7, 2)}, "cannot read images"),
        ({"loss": SupCon()}, "takes='labels'"),
        ({"loss": torch.nn.Identity()}, "it is no "),
    ):
        with pytest.raises(ConfigError, match=words):
            config.build_task(example, **own)
