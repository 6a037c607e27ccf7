"""The momentum copy and its schedule, and what may not stand beside it."""

import math

import pytest
import torch
from torch import nn

from dist_contrastive.errors import ConfigError
from dist_contrastive.models import (
    MomentumCopy,
    ResidualEncoder,
    check_row_independent,
    momentum_at,
)
from dist_contrastive.models.transformers.vision import (
    TransformersEncoder,
)

TINY_RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}


def resnet(row_independent: bool) -> TransformersEncoder:
    settings = TransformersEncoder.Config(
        model_type="resnet", config=TINY_RESNET, row_independent=row_independent
    )
    return TransformersEncoder(settings, (3, 16, 16))


def batch_normed() -> nn.Module:
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def perturbed(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter)


def test_copy_is_apart_and_without_gradients() -> None:
    source = batch_normed()
    target, x = MomentumCopy(source), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(target(x), source.eval()(x))
    assert not target(x).requires_grad
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in source.parameters())
    before = target(x)
    perturbed(source)
    assert torch.equal(target(x), before)


def test_copy_stays_in_eval_mode() -> None:
    task = nn.ModuleDict({"target": MomentumCopy(batch_normed().train())}).train()
    assert task.training
    assert not any(module.training for module in task["target"].modules())
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(task["target"](x)[:1], task["target"](x[:1]), rtol=0, atol=1e-12)


def test_update_by_hand() -> None:
    source = batch_normed().train()
    target = MomentumCopy(source)
    expected = [p.detach().clone() for p in source.parameters()]
    for momentum in (0.9, 0.5, 0.0, 1.0, 0.99):
        perturbed(source)
        source(torch.randn(6, 4, dtype=torch.float64))  # moves the running statistics
        target.update(source, momentum)
        expected = [
            momentum * old + (1 - momentum) * new.detach()
            for old, new in zip(expected, source.parameters(), strict=True)
        ]
        for mine, wanted in zip(target.parameters(), expected, strict=True):
            torch.testing.assert_close(mine.detach(), wanted, rtol=0, atol=1e-12)
        for mine, wanted in zip(target.buffers(), source.buffers(), strict=True):
            assert torch.equal(mine, wanted)
    assert target.module[1].num_batches_tracked == 5


def test_small_steps_survive_half_precision() -> None:
    source = nn.Linear(3, 2).to(torch.bfloat16)
    target = MomentumCopy(source)
    nn.init.constant_(target.module.weight, 1.0)
    nn.init.constant_(source.weight, 2.0)
    for _ in range(1000):
        target.update(source, 0.999)
    assert target.module.weight.dtype == torch.float32
    assert target.module.weight.min() == pytest.approx(2 - 0.999**1000, abs=1e-4)


def test_update_refuses_another_network() -> None:
    target = MomentumCopy(nn.Linear(3, 2))
    before = target.module.weight.clone()
    with pytest.raises(ValueError, match="shorter"):
        target.update(nn.Linear(3, 2, bias=False), 0.5)
    assert torch.equal(target.module.weight, before)


def test_checkpoints_hold_the_copy() -> None:
    task = nn.ModuleDict({"online": nn.Linear(3, 2)})
    task["target"] = MomentumCopy(task["online"])
    perturbed(task["online"])
    task["target"].update(task["online"], 0.5)
    again = nn.ModuleDict({"online": nn.Linear(3, 2), "target": MomentumCopy(nn.Linear(3, 2))})
    again.load_state_dict(task.state_dict())
    x = torch.randn(2, 3)
    assert torch.equal(again["target"](x), task["target"](x))
    assert not torch.equal(again["target"](x), again["online"](x))


def test_momentum_schedule() -> None:
    assert momentum_at(0, 0.99) == pytest.approx(0.99, abs=1e-15)
    assert momentum_at(1, 0.99) == 1
    assert momentum_at(0.5, 0.99) == pytest.approx(0.995)
    assert momentum_at(1 / 3, 0.9) == pytest.approx(1 - 0.1 * (1 + math.cos(math.pi / 3)) / 2)
    assert momentum_at(1.5, 0.9) == 1
    values = [momentum_at(i / 100, 0.9) for i in range(101)]
    assert values == sorted(values)
    assert momentum_at(0.3, 1.0) == 1


def test_batch_norm_mixes_rows_and_ours_do_not() -> None:
    images = torch.rand(6, 3, 16, 16)
    ours = ResidualEncoder(ResidualEncoder.Config(widths=(8,)), (3, 8, 8))
    for encoder, mixes in [(resnet(False), True), (resnet(True), False), (ours, False)]:
        encoder.train()
        difference = (encoder(images)[:2] - encoder(images[:2])).abs().max()
        assert (difference > 1e-2) == mixes
        assert mixes or difference < 1e-5


def test_networks_that_mix_rows_are_refused() -> None:
    why = "a query could find its own key by them"
    for module in (resnet(True), ResidualEncoder(ResidualEncoder.Config(), (1, 8, 8))):
        check_row_independent(module, why)
    with pytest.raises(
        ConfigError,
        match=r"^model\.embedder\.\S+ \(BatchNorm2d\) of TransformersEncoder .* statistics of the "
        r"batch, and a query could find its own key by them: set row_independent: true, or use",
    ):
        check_row_independent(resnet(False), why)
    mixing = [
        batch_normed(),
        batch_normed().eval(),  # training would turn it on
        nn.Sequential(nn.SyncBatchNorm(4)),
        nn.BatchNorm1d(4),
        MomentumCopy(nn.BatchNorm1d(4, track_running_stats=False)),  # even in eval mode
    ]
    for module in mixing:
        with pytest.raises(ConfigError, match=r"BatchNorm.* statistics of the batch"):
            check_row_independent(module, why)
    check_row_independent(MomentumCopy(batch_normed()), why)
    check_row_independent(nn.Sequential(nn.GroupNorm(2, 4), nn.InstanceNorm1d(4)), why)


def test_check_leaves_the_mode() -> None:
    for mode in (True, False):
        encoder = resnet(True).train(mode)
        check_row_independent(encoder, "")
        assert encoder.training == mode
        assert not encoder.model.training
