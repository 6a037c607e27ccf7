"""Encoders: shapes, rows that do not see each other, no rows at all, bad input."""

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from dist_contrastive.errors import ConfigError
from dist_contrastive.models import EncoderSettings, build_encoder, build_head
from dist_contrastive.models.encoders import (
    ProjectionHead,
    ProjectionHeadSettings,
    ResidualEncoder,
    ResidualEncoderSettings,
    frozen,
    representations_of,
)
from dist_contrastive.models.transformers_encoder import (
    TransformersEncoder,
    TransformersEncoderSettings,
)

TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
    "hidden_dropout_prob": 0.5,
}
TINY_CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}


def residual() -> nn.Module:
    torch.manual_seed(0)
    settings = ResidualEncoderSettings(widths=(8, 16), blocks=2)
    encoder = ResidualEncoder(settings, channels=3)
    head = ProjectionHead(ProjectionHeadSettings(hidden=8, out=4, layers=3), encoder.dim)
    return nn.Sequential(encoder, head)


def vit(**settings: object) -> TransformersEncoder:
    torch.manual_seed(0)
    fields = {"model_type": "vit", "config": TINY_VIT, **settings}
    return TransformersEncoder(TransformersEncoderSettings.model_validate(fields), 3, (8, 8))


def convnext() -> TransformersEncoder:
    torch.manual_seed(0)
    settings = TransformersEncoderSettings(model_type="convnext", config=TINY_CONVNEXT)
    return TransformersEncoder(settings, 3, (8, 8))


def check_no_rows(model: nn.Module, output: torch.Tensor, columns: tuple[int, ...]) -> None:
    """An empty output that still gives every trainable parameter a gradient: zero."""
    assert output.shape == (0, *columns)
    output.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("build", [residual, vit, convnext])
def test_encoder_rows_depend_on_themselves_only(build) -> None:
    encoder = build().train()
    images = torch.rand(6, 3, 8, 8)
    together = encoder(images)
    apart = torch.cat([encoder(images[:1]), encoder(images[1:])])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert together.shape[0] == 6
    assert together.std(dim=0).min() > 1e-5, "all images have one representation"


@pytest.mark.parametrize("build", [residual, vit, convnext])
def test_encoder_without_rows(build) -> None:
    encoder = build().train()
    dim = encoder(torch.rand(1, 3, 8, 8)).shape[1]
    check_no_rows(encoder, encoder(torch.rand(0, 3, 8, 8)), (dim,))


@pytest.mark.parametrize("build", [residual, vit, convnext])
def test_every_trainable_parameter_gets_a_gradient(build) -> None:
    encoder = build()
    encoder(torch.rand(2, 3, 8, 8)).square().sum().backward()
    missing = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_dimensions_and_chunks() -> None:
    encoder = ResidualEncoder(ResidualEncoderSettings(widths=(8, 16, 24)), channels=1)
    images = torch.rand(5, 1, 8, 8)
    assert encoder.dim == 24
    torch.testing.assert_close(
        representations_of(encoder, images, chunk=2), encoder(images).detach()
    )
    assert vit().dim == 16


def test_frozen_passes_gradients_to_images_only() -> None:
    encoder = frozen(residual())
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    encoder(images).sum().backward()
    assert images.grad is not None
    assert images.grad.any()
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("build", [residual, vit, convnext])
def test_frozen_without_rows_keeps_the_graph(build) -> None:
    images = torch.rand(0, 3, 8, 8, requires_grad=True)
    frozen(build())(images).sum().backward()
    assert images.grad is not None


def test_pooling_choices() -> None:
    pooled, mean = vit(pool="pooler"), vit(pool="mean")
    images = torch.rand(2, 3, 8, 8)
    assert pooled(images).shape == mean(images).shape == (2, 16)
    assert not torch.allclose(pooled(images), mean(images))
    frozen_in_mean = [n for n, p in mean.named_parameters() if not p.requires_grad]
    assert frozen_in_mean
    assert all("pooler" in name for name in frozen_in_mean)


def test_dropout_only_when_asked_for() -> None:
    images = torch.rand(4, 3, 8, 8)
    off, on = vit().train(), vit(row_independent=False).train()
    assert torch.equal(off(images), off(images))
    assert not torch.equal(on(images), on(images))


def test_pretrained_folder(tmp_path: Path) -> None:
    source = vit(pool="mean")
    source.model.save_pretrained(tmp_path)
    settings = TransformersEncoderSettings(pretrained=str(tmp_path), pool="mean")
    loaded = TransformersEncoder(settings, 3, (8, 8))
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(loaded(images), source(images))


def test_width_error_names_the_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"width 20 .*multiple of 8.*use 16 or 24"):
        ResidualEncoder(ResidualEncoderSettings(widths=(20,)), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "vitt"}, r"cannot build transformers model 'vitt'.*such as vit"),
        ({"model_type": "bert"}, r"'bert' does not take images: use a vision model"),
        (
            {"model_type": "vit", "config": {"hiden_size": 8}},
            r"^transformers model 'vit' has no .*'hiden_size': did you mean 'hidden_size'",
        ),
        ({"model_type": "vit", "config": {"hidden_size": "wide"}}, r"cannot build .*hidden_size"),
        ({"model_type": "vit", "config": TINY_VIT | {"image_size": 16}}, r"images of 3x8x8"),
        ({"pretrained": "/nowhere/at/all"}, r"cannot build transformers model '/nowhere"),
    ],
)
def test_transformers_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformersEncoder(TransformersEncoderSettings.model_validate(settings), 3, (8, 8))


def test_settings_choose_the_model() -> None:
    choose = TypeAdapter(EncoderSettings).validate_python
    encoder = build_encoder(choose({"name": "residual", "widths": [8]}), (1, 6, 6))
    assert isinstance(encoder, ResidualEncoder)
    assert build_head(ProjectionHeadSettings(out=3), encoder.dim)(torch.rand(2, 8)).shape == (2, 3)
    vit_settings = choose({"name": "transformers", "model_type": "vit", "config": TINY_VIT})
    assert isinstance(build_encoder(vit_settings, (1, 8, 8)), TransformersEncoder)
    with pytest.raises(ValidationError, match="name"):
        choose({"name": "resnet"})


def test_transformers_needs_one_source() -> None:
    with pytest.raises(ValidationError, match="set exactly one"):
        TransformersEncoderSettings()
