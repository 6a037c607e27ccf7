"""`dist_contrastive.train`: what the command does, from Python, with modules of one's own."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from torch import Tensor, nn

import dist_contrastive
from dist_contrastive import checkpoint
from dist_contrastive import config as configs
from dist_contrastive.cli import main
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import NTXent, SupCon
from dist_contrastive.testing import run_ranks

ENCODER = CONFIGS / "digits_encoder.yaml"


class SmallEncoder(nn.Module):
    """An encoder of this file: images [b, 1, 8, 8] to [b, 16]."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class OtherEncoder(SmallEncoder):
    """Another class with the same parameters."""


class SharpNTXent(NTXent):
    """A loss of this file."""

    def forward(self, view_a: Tensor, view_b: Tensor) -> Tensor:
        return 2 * super().forward(view_a, view_b)


def train_with_own_modules(
    path: Path, overrides: list[str], encoder: type[nn.Module] = SmallEncoder, **options
) -> int:
    """Ten lines of a user's script, on each rank."""
    torch.manual_seed(0)
    return dist_contrastive.train(
        path,
        overrides=overrides,
        model=encoder(),
        loss=SharpNTXent(temperature=0.2),
        **options,
    )


def test_own_modules_train_from_python_and_resume(tmp_path, overrides, capsys):
    """In one process and on two ranks, with the self-check, to the same weights."""
    # Micro-batches, so that the self-check has something to compare; Adam would divide by gradients
    # that are rounding alone.
    options = ("train.micro_batch_size=5", "optim.name=sgd", "optim.lr=0.05")
    whole, legs, ranks = (overrides(tmp_path / x, *options) for x in ("whole", "legs", "ranks"))
    assert train_with_own_modules(ENCODER, whole) == 0
    assert train_with_own_modules(ENCODER, legs, stop_after=7) == 75
    assert train_with_own_modules(ENCODER, legs) == 0
    assert run_ranks(train_with_own_modules, 2, ENCODER, ranks, timeout_s=600) == [0, 0]
    one, resumed, two = (
        checkpoint.newest(tmp_path / x / "checkpoints").weights()
        for x in ("whole", "legs", "ranks")
    )
    assert one["encoder.layers.1.weight"].shape == (32, 64)
    for name, value in one.items():
        assert torch.equal(resumed[name], value), name
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    assert one["encoder.layers.1.weight"].ne(initial_weight()).any()
    assert main(["eval", str(tmp_path / "whole")]) == 64
    assert "weights of other modules than its config names" in capsys.readouterr().err
    for other in (  # of another class, or none
        lambda: train_with_own_modules(ENCODER, [*legs, "train.steps=12"], OtherEncoder),
        lambda: dist_contrastive.train(ENCODER, overrides=legs),
    ):
        with pytest.raises(ConfigError, match=r"model=SmallEncoder and loss=SharpNTXent, now .*"):
            other()


def initial_weight() -> Tensor:
    torch.manual_seed(0)
    return SmallEncoder().layers[1].weight.detach()


def test_a_model_given_from_python_is_trained_itself(tmp_path, overrides):
    """And settings may be a dict or a checked config."""
    config = configs.load(ENCODER, overrides(tmp_path / "a", "train.steps=2"))
    model, before = SmallEncoder(), initial_weight()
    assert dist_contrastive.train(config.model_dump(mode="json"), model=model) == 0
    trained = checkpoint.newest(tmp_path / "a" / "checkpoints").weights()
    assert torch.equal(model.layers[1].weight.cpu(), trained["encoder.layers.1.weight"])
    assert not torch.equal(model.layers[1].weight.cpu(), before)
    assert dist_contrastive.train(config, overrides=[f"run_dir={tmp_path / 'b'}"]) == 0
    assert (tmp_path / "b" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"model": SmallEncoder}, "model=.*SmallEncoder.* is no torch.nn.Module"),
        ({"model": nn.Conv2d(1, 4, 3)}, "Conv2d"),
        ({"loss": SupCon(temperature=0.1)}, "loss=SupCon cannot be used"),
        ({"loss": nn.MSELoss()}, "loss=MSELoss cannot be used"),
    ],
)
def test_own_modules_that_cannot_be_used(modules, words, tmp_path, overrides):
    with pytest.raises(ConfigError, match=words):
        dist_contrastive.train(ENCODER, overrides=overrides(tmp_path / "run"), **modules)
    assert not (tmp_path / "run").exists()


def test_messages_of_a_training_can_be_routed(tmp_path, overrides, caplog, capsys):
    """An embedding program gets them from logging, and nothing is printed."""
    options = overrides(tmp_path, "train.steps=3")
    dist_contrastive.train(ENCODER, overrides=options, stop_after=1)
    capsys.readouterr()
    with caplog.at_level(logging.INFO, "dist_contrastive"):
        dist_contrastive.train(ENCODER, overrides=options)
    assert "going on from step 1 of 3" in caplog.messages
    assert "going on" not in "".join(capsys.readouterr())
