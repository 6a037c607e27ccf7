"""Gradient caching against the naive step that keeps every graph: any loss, dropout on."""

import math
import random

import numpy as np
import pytest
import torch
from conftest import CONFIGS
from torch import Tensor, nn

from dist_contrastive import checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.backend import seed_everything
from dist_contrastive.errors import ConfigError
from dist_contrastive.grad_cache import GradCache
from dist_contrastive.losses import ContrastiveForce, InfoNCE, NTXent, SigLIP
from dist_contrastive.trainer import step as trainer_step

ROWS = 23
LOSSES = {
    "infonce": lambda: InfoNCE(symmetric=True, learnable=True, temperature=0.2),
    "siglip": SigLIP,
    "ntxent": lambda: NTXent(temperature=0.3, learnable=True),
    "force": lambda: ContrastiveForce(preset="drift", temperatures=(0.1, 0.3)),
}


class NaiveCache:
    """What `GradCache` equals: every micro-batch keeps its graph until one backward at the end."""

    def __init__(self, embed, num_parts):
        self.num_parts = num_parts
        parts = [embed(part) for part in range(num_parts)]
        self.embeddings = tuple(map(torch.cat, zip(*parts, strict=True)))

    def compared(self, loss, parameters):
        self._loss = loss

    def replay(self, part):
        is_last = part == self.num_parts - 1
        return self._loss if is_last else torch.zeros((), requires_grad=True)


class Towers(nn.Module):
    """Two networks with dropout, in fp64."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        layers = (nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 5))
        self.a, self.b = nn.Sequential(*layers), nn.Sequential(nn.Linear(8, 5), nn.Dropout(0.2))
        self.double()

    def forward(self, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        seed_everything(seed)
        return self.a(rows), self.b(rows)


def gradients(cache_class, name: str, size: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    rows = torch.randn(ROWS, 8, dtype=torch.float64)
    towers = Towers(LOSSES[name]())
    parts = rows.split(size)
    cache = cache_class(lambda part: towers(parts[part], seed=100 + part), len(parts))
    loss = towers.loss(*cache.embeddings)
    cache.compared(loss, list(towers.parameters()))
    for part in range(cache.num_parts):
        cache.replay(part).backward()
    return {name: p.grad for name, p in towers.named_parameters()}


@pytest.mark.parametrize("size", [1, 4, 22, 23])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_naive_step(name, size):
    """Also where the last part is smaller, and for temperature and bias."""
    expected, found = (gradients(cls, name, size) for cls in (NaiveCache, GradCache))
    assert any("loss" in name for name in expected) == (name != "force")
    for key, grad in expected.items():
        error = (found[key] - grad).norm() / grad.norm().clamp(min=1e-6)  # the data of a force: 0
        assert error < 1e-12, f"{key}: {error}"


def test_each_part_is_embedded_twice_and_holds_no_graph():
    """Once without a graph; the second time the graph of one part is alive at a time."""
    seen = []
    weight = torch.ones(3, requires_grad=True)

    def embed(part: int) -> tuple[Tensor, Tensor]:
        seen.append((part, torch.is_grad_enabled()))
        rows = torch.full((2, 3), part + 1.0)
        return rows * weight, torch.ones(2, 3)  # the second without gradient, as keys of MoCo

    cache = GradCache(embed, 3)
    assert seen == [(part, False) for part in range(3)]
    assert all(x.is_leaf for x in cache.embeddings)
    cache.compared((cache.embeddings[0] * cache.embeddings[1]).sum(), [])
    for part in range(3):
        cache.replay(part).backward()
    assert seen[3:] == [(part, True) for part in range(3)]
    assert torch.equal(weight.grad, torch.full((3,), 2 * (1.0 + 2 + 3)))


def test_embeddings_that_the_loss_leaves_out():
    weight = torch.ones(3, requires_grad=True)
    cache = GradCache(lambda part: (weight * torch.ones(2, 3), weight * torch.ones(2, 3)), 2)
    cache.compared(cache.embeddings[0].sum(), [])
    for part in range(2):
        cache.replay(part).backward()
    assert torch.equal(weight.grad, torch.full((3,), 4.0))


class Noisy(nn.Module):
    """A network whose randomness nobody seeds between the two passes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.layer = nn.Linear(8, 5).double()

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        x = self.layer(rows)
        if self.kind == "dropout":
            return nn.functional.dropout(x, 0.5), rows[:, :5]
        if self.kind == "numpy":
            return x * torch.from_numpy(np.random.rand(5)), rows[:, :5]
        if self.kind == "python":
            return x * random.random(), rows[:, :5]
        return x * (1 + 0.1 * self.calls), rows[:, :5]  # a state of its own


def noisy_gradient(cache_class, kind: str) -> Tensor:
    seed_everything(5)
    net, rows = Noisy(kind), torch.randn(ROWS, 8, dtype=torch.float64)
    parts = rows.split(4)
    cache = cache_class(lambda part: net(parts[part]), len(parts))
    cache.compared(InfoNCE(0.3)(*cache.embeddings), [])
    for part in range(cache.num_parts):
        cache.replay(part).backward()
    assert net.layer.weight.grad is not None
    return net.layer.weight.grad


@pytest.mark.parametrize("kind", ["dropout", "numpy", "python"])
def test_random_states_are_replayed(kind):
    """Of torch, NumPy and Python; what is drawn afterwards is what would have been."""
    expected = noisy_gradient(NaiveCache, kind)
    following = torch.rand(1), np.random.rand(), random.random()
    torch.testing.assert_close(noisy_gradient(GradCache, kind), expected, rtol=1e-12, atol=0)
    assert (torch.rand(1), np.random.rand(), random.random()) == following


def test_another_second_pass_is_refused():
    with pytest.raises(ConfigError, match=r"other embeddings the second time, off by .* random"):
        noisy_gradient(GradCache, "state")
    with pytest.raises(ConfigError, match="num_parts=0"):
        GradCache(lambda part: (), 0)


def test_parts_may_be_replayed_in_any_order():
    calls = iter(range(9))
    cache = GradCache(lambda part: (torch.ones(2, 3) * (1 + next(calls) * (part == 0)),), 2)
    cache.compared(cache.embeddings[0].sum(), [])
    cache.replay(1)
    with pytest.raises(ConfigError, match="other embeddings the second time"):
        cache.replay(0)


def test_what_embed_may_return():
    """One tensor stands for itself; anything but floating rows is named."""
    x = torch.randn(2, 3)
    assert [y.shape for y in GradCache(lambda part: x, 3).embeddings] == [(6, 3)]
    for returned, words in (
        ((x, torch.arange(2)), r"\(torch.float32 \[2, 3\], torch.int64 \[2\]\)"),
        ((x, x[:1]), r"\(.*, torch.float32 \[1, 3\]\)"),
        ({"image": x}, "dict"),
        (None, "NoneType"),
    ):
        with pytest.raises(ConfigError, match=f"embed returned {words}"):
            GradCache(lambda part: returned, 1)  # noqa: B023


@pytest.mark.parametrize("frozen", ["b", "a b", "a b loss", "loss"])
def test_frozen_parts_are_ignored(frozen):
    """A tower, both, the temperature: parameters are given as they are, also by a generator."""
    rows, grads = torch.randn(ROWS, 8, dtype=torch.float64), []
    for cache_class in (NaiveCache, GradCache):
        torch.manual_seed(3)
        towers = Towers(LOSSES["infonce"]()).eval()
        for name in frozen.split():
            getattr(towers, name).requires_grad_(False)
        parts = rows.split(5)
        cache = cache_class(lambda part: towers(parts[part], seed=0), len(parts))  # noqa: B023
        loss = towers.loss(*cache.embeddings)
        if loss.requires_grad or cache_class is GradCache:
            cache.compared(loss, towers.parameters())
            for part in range(cache.num_parts):
                cache.replay(part).backward()
        grads.append({name: p.grad for name, p in towers.named_parameters()})
    expected, found = grads
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-14)


VIT = (
    "task.encoder={name: transformers, model_type: vit, row_independent: false, config: "
    "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, "
    "patch_size: 4, hidden_dropout_prob: %s, attention_probs_dropout_prob: %s}}"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, overrides):
    """Weights after a few steps of a vision transformer."""

    def train(name: str, cache_class, dropout: float, micro_batch_size: str) -> dict[str, Tensor]:
        run_dir = tmp_path_factory.mktemp("runs") / name
        options = (
            *(VIT % (dropout, dropout), "data.global_batch_size=48", "train.steps=4"),
            *("optim.name=sgd", "optim.lr=0.03", f"train.micro_batch_size={micro_batch_size}"),
            "task.loss={name: ntxent, temperature: 0.2, learnable: true}",
        )
        config = configs.load(CONFIGS / "digits_encoder.yaml", overrides(run_dir, *options))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer_step, "GradCache", cache_class)
            assert trainer.train(config) == 0
        found = checkpoint.newest(run_dir / "checkpoints")
        assert found is not None
        return found.weights()

    return train


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of a tensor relative to its norm; a bias that is still near 0 counts as 0.1."""
    assert found.keys() == expected.keys()
    errors = [
        ((found[name] - x).norm() / x.norm().clamp(min=0.1)).item() for name, x in expected.items()
    ]
    assert all(map(math.isfinite, errors))
    return max(errors)


def test_a_training_with_dropout(trained):
    """Masks of both passes are the same: the weights are those of a training that keeps graphs."""
    expected = trained("naive", NaiveCache, 0.2, "20")
    assert worst(trained("cached", GradCache, 0.2, "20"), expected) < 1e-5
    assert worst(trained("other", GradCache, 0.0, "20"), expected) > 1e-3  # it has an effect


def test_a_training_without_dropout_is_that_of_the_plain_step(trained):
    plain = trained("plain", GradCache, 0.0, "null")
    for size in ("7", "16"):
        assert worst(trained(f"cached-{size}", GradCache, 0.0, size), plain) < 1e-5
    assert "loss.scale.log_scale" in plain
