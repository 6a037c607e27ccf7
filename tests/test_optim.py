"""Optimisers against their published formulas, and the learning rate as a function of the step."""

import math
from collections.abc import Callable

import pytest
import torch
from conftest import CONFIGS
from torch import Tensor, nn

from dist_contrastive import checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.errors import ConfigError
from dist_contrastive.optim import OptimConfig, build_optimizer, learning_rate

LR, DECAY = 0.01, 0.1
Memory = dict[str, Tensor]


def adamw(p: Tensor, g: Tensor, m: Memory, t: int, decay: float, b1=0.9, b2=0.999) -> Tensor:
    m["m"] = b1 * m.get("m", 0) + (1 - b1) * g
    m["v"] = b2 * m.get("v", 0) + (1 - b2) * g**2
    mean, square = m["m"] / (1 - b1**t), m["v"] / (1 - b2**t)
    return p - LR * (mean / (square.sqrt() + 1e-8) + decay * p)


def sgd(p: Tensor, g: Tensor, m: Memory, t: int, decay: float) -> Tensor:
    g = g + decay * p
    m["m"] = 0.9 * m.get("m", 0) + g
    return p - LR * (g + 0.9 * m["m"])


def lion(p: Tensor, g: Tensor, m: Memory, t: int, decay: float) -> Tensor:
    mean = m.get("m", torch.zeros_like(g))
    m["m"] = 0.99 * mean + 0.01 * g
    return p - LR * ((0.9 * mean + 0.1 * g).sign() + decay * p)


def lars(p: Tensor, g: Tensor, m: Memory, t: int, decay: float) -> Tensor:
    if p.dim() > 1:
        trust = 1e-3 * p.norm() / (g.norm() + decay * p.norm())
        g = trust * (g + decay * p)
    m["m"] = 0.9 * m.get("m", 0) + g
    return p - LR * m["m"]


def lamb(p: Tensor, g: Tensor, m: Memory, t: int, decay: float) -> Tensor:
    m["m"] = 0.9 * m.get("m", 0) + 0.1 * g
    m["v"] = 0.999 * m.get("v", 0) + 0.001 * g**2
    update = m["m"] / (m["v"].sqrt() + 1e-8) + decay * p
    size = p.norm().clamp(max=10)
    trust = size / (update.norm() + 1e-8) if size > 0 else 1.0
    return p - LR * trust * update


def muon(p: Tensor, g: Tensor, m: Memory, t: int, decay: float) -> Tensor:
    if p.dim() == 1:
        return adamw(p, g, m, t, decay, 0.95, 0.95)
    m["m"] = 0.95 * m.get("m", 0) + 0.05 * g
    x = (0.05 * g + 0.95 * m["m"]).flatten(1).bfloat16()
    rows, columns = x.shape
    x = x.T if rows > columns else x
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    x = (x.T if rows > columns else x).double().view(p.shape)
    return p * (1 - LR * decay) - LR * 0.2 * math.sqrt(max(rows, columns)) * x


FORMULAS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (adamw, sgd, lion, lars, lamb, muon)
}


class Small(nn.Module):
    """A matrix, a convolution, a vector, a temperature, and what is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(7, 4))
        self.kernel = nn.Parameter(torch.randn(3, 2, 5, 5))
        self.vector = nn.Parameter(torch.randn(6))
        self.log_scale = nn.Parameter(torch.randn(1))
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.double()


@pytest.mark.parametrize("name", FORMULAS)
def test_updates_are_the_published_ones(name):
    """Five steps; matrices and kernels are decayed, vectors are not."""
    torch.manual_seed(1)
    module = Small()
    settings = OptimConfig(name=name, lr=LR, weight_decay=DECAY)
    optimizer = build_optimizer(module, settings)
    expected = {key: p.detach().clone() for key, p in module.named_parameters()}
    before = {key: p.clone() for key, p in expected.items()}
    memory: dict[str, Memory] = {key: {} for key in expected}
    for step in range(1, 6):
        for key, p in module.named_parameters():
            if p.requires_grad:
                grad = torch.randn_like(p)
                p.grad = grad.clone()
                decay = DECAY if p.dim() > 1 else 0.0
                expected[key] = FORMULAS[name](expected[key], grad, memory[key], step, decay)
        optimizer.step()
    for key, p in module.named_parameters():
        moved = (expected[key] - before[key]).norm()
        # Muon makes its matrices in bf16.
        limit = 2e-2 if name == "muon" and p.dim() > 1 else 1e-6
        assert (p - expected[key]).norm() <= limit * moved, key
        assert (moved > 0) == p.requires_grad, key


@pytest.mark.parametrize("name", FORMULAS)
def test_a_resumed_run_ends_with_the_same_weights(name, tmp_path, overrides):
    """Bitwise: what each of them remembers is in the checkpoint."""
    options = (
        *("task.encoder={name: residual, widths: [8, 16]}", "task.head={hidden: 16, out: 8}"),
        *(f"optim.name={name}", "train.steps=4", "data.global_batch_size=16"),
    )
    found = []
    for stop_after in (None, 2):
        run_dir = tmp_path / str(stop_after)
        config = configs.load(CONFIGS / "digits_encoder.yaml", overrides(run_dir, *options))
        if stop_after:
            assert trainer.train(config, stop_after=stop_after) == 75
        assert trainer.train(config) == 0
        saved = checkpoint.newest(run_dir / "checkpoints")
        assert saved is not None
        found.append(saved.weights())
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key


def test_learning_rate():
    settings = OptimConfig(lr=2.0, warmup_steps=4, final_lr_ratio=0.1)
    rates = [learning_rate(step, 14, settings, 256) for step in range(15)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[9] == pytest.approx(1.1)  # half way down
    assert rates[14] == pytest.approx(0.2)
    assert sorted(rates[4:], reverse=True) == rates[4:]


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("linear", 16), ("sqrt", 4)])
def test_learning_rate_grows_with_the_batch(scaling, factor):
    settings = OptimConfig(lr=0.5, lr_scaling=scaling)
    assert learning_rate(0, 10, settings, 4096) == pytest.approx(0.5 * factor)
    assert learning_rate(0, 10, settings, 256) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("optim.name=lars", "backend.zero_stage=2"),
            "optim.name=lars with backend.zero_stage=2: its updates depend on the whole of each "
            "parameter, and a rank of ZeRO updates pieces; set backend.zero_stage=0, or optim.name "
            "to adamw, lion or sgd",
        ),
    ],
)
def test_impossible_settings(options, sentence, tmp_path, overrides):
    with pytest.raises(ConfigError) as refused:
        configs.load(CONFIGS / "digits_encoder.yaml", overrides(tmp_path, *options))
    assert sentence in str(refused.value)
