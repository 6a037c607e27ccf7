"""Encoders: rows that do not depend on each other, no rows at all, what fits what, bad input."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from dist_contrastive.errors import ConfigError
from dist_contrastive.models import (
    AnyEncoder,
    AnyPairEncoder,
    Encoder,
    ProjectionHead,
    ResidualEncoder,
    TextEncoder,
    TransformersEncoder,
    VectorEncoder,
    build_encoder,
    build_pair_encoder,
    frozen,
    representations_of,
    text_tokens,
)

TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
    "hidden_dropout_prob": 0.5,
}
TEXTS = ["", "seven", "eight", "a small green circle, left of the middle", "четыре", "x" * 200]
TINY_CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}


def residual() -> nn.Module:
    torch.manual_seed(0)
    settings = ResidualEncoder.Config(widths=(8, 16), blocks=2)
    encoder = ResidualEncoder(settings, (3, 8, 8))
    head = ProjectionHead(ProjectionHead.Config(hidden=8, out=4, layers=3), encoder.dim)
    return nn.Sequential(encoder, head)


def vit(**settings: object) -> TransformersEncoder:
    torch.manual_seed(0)
    fields = {"model_type": "vit", "config": TINY_VIT, **settings}
    return TransformersEncoder(TransformersEncoder.Config.model_validate(fields), (3, 8, 8))


def convnext() -> TransformersEncoder:
    torch.manual_seed(0)
    settings = TransformersEncoder.Config(model_type="convnext", config=TINY_CONVNEXT)
    return TransformersEncoder(settings, (3, 8, 8))


def text(**settings: int) -> TextEncoder:
    return TextEncoder(TextEncoder.Config(width=16, heads=2, max_bytes=24, **settings))


def vector(**settings: int) -> VectorEncoder:
    return VectorEncoder(VectorEncoder.Config(hidden=8, out=6, **settings), (12,))


Build = Callable[[], nn.Module]
IMAGES: list[Build] = [residual, vit, convnext]
ALL: list[Build] = [*IMAGES, text, vector]


def rows_for(build: Build) -> Sequence[str] | Tensor:
    torch.manual_seed(1)
    if build is text:
        return TEXTS
    return torch.randn(6, 12) if build is vector else torch.rand(6, 3, 8, 8)


@pytest.mark.parametrize("build", ALL)
def test_rows_depend_on_themselves_only(build: Build) -> None:
    encoder, rows = build().train(), rows_for(build)
    together = encoder(rows)
    apart = torch.cat([encoder(rows[:1]), encoder(rows[1:4]), encoder(rows[4:])])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert len(together) == 6
    assert torch.pdist(together).min() > 1e-5, "two rows have one representation"


@pytest.mark.parametrize("build", [text, vector])
def test_train_and_eval_agree(build: Build) -> None:
    encoder, rows = build(), rows_for(build)
    training = encoder.train()(rows)
    with torch.no_grad():  # here torch takes a fused path of its own
        torch.testing.assert_close(encoder.eval()(rows), training, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("build", ALL)
def test_without_rows(build: Build, mode: bool) -> None:
    """An empty output that still gives every trainable parameter a gradient: zero."""
    encoder, rows = build().train(mode), rows_for(build)
    output = encoder(rows[:0])
    assert output.shape == (0, encoder(rows[:1]).shape[1])
    output.sum().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("build", ALL)
def test_every_trainable_parameter_gets_a_gradient(build: Build) -> None:
    encoder = build()
    encoder(rows_for(build)[:2]).square().sum().backward()
    missing = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_dimensions_and_chunks() -> None:
    encoder = ResidualEncoder(ResidualEncoder.Config(widths=(8, 16, 24)), (1, 8, 8))
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


@pytest.mark.parametrize("build", IMAGES)
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
    settings = TransformersEncoder.Config(pretrained=str(tmp_path), pool="mean")
    loaded = TransformersEncoder(settings, (3, 8, 8))
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(loaded(images), source(images))


def test_width_error_names_the_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"20.* 8 .*16 or 24"):
        ResidualEncoder(ResidualEncoder.Config(widths=(20,)), (1, 8, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "vitt"}, "'vitt'.*vit"),
        ({"model_type": "bert"}, "'bert'.*vision model"),
        (
            {"model_type": "vit", "config": {"hiden_size": 8}},
            "'hiden_size'.*'hidden_size'",
        ),
        ({"model_type": "vit", "config": {"hidden_size": "wide"}}, "hidden_size"),
        ({"model_type": "vit", "config": TINY_VIT | {"image_size": 16}}, "3x8x8"),
        ({"pretrained": "/nowhere/at/all"}, "'/nowhere"),
    ],
)
def test_transformers_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformersEncoder(TransformersEncoder.Config.model_validate(settings), (3, 8, 8))


def test_settings_choose_the_model() -> None:
    choose = TypeAdapter(AnyEncoder).validate_python
    encoder = build_encoder(choose({"name": "residual", "widths": [8]}), (1, 6, 6))
    assert isinstance(encoder, ResidualEncoder)
    head = ProjectionHead(ProjectionHead.Config(out=3), encoder.dim)
    assert head(torch.rand(2, 8)).shape == (2, 3)
    vit_settings = choose({"name": "transformers", "model_type": "vit", "config": TINY_VIT})
    assert isinstance(build_encoder(vit_settings, (1, 8, 8)), TransformersEncoder)
    with pytest.raises(ValidationError, match="name"):
        choose({"name": "resnet"})


def test_transformers_needs_one_source() -> None:
    with pytest.raises(ValidationError, match="set exactly one"):
        TransformersEncoder.Config()


def test_tokens_are_bytes() -> None:
    expected = [[98, 99, 0, 0], [0, 0, 0, 0], [1, 256 - 61 + 1, 256 - 87 + 1, 0]]
    tokens = text_tokens(["ab", "", "\0é"], 4)
    assert tokens.tolist() == expected
    assert tokens.dtype == torch.int64
    assert text_tokens([], 4).shape == (0, 4)


def test_tokens_are_cut_between_characters() -> None:
    assert text_tokens(["abcdé"], 5).tolist() == [[98, 99, 100, 101, 0]]  # é takes two bytes
    assert torch.equal(text_tokens(["abcdé"], 6)[:, :5], text_tokens(["abcdé"], 6)[:, :5])
    for length in range(1, 12):
        kept = bytes(token - 1 for token in text_tokens(["aé€😀z"], length)[0].tolist() if token)
        assert "aé€😀z".startswith(kept.decode())
        assert len(kept) > length - 4
    assert torch.equal(text_tokens(["a\ud800"], 4), text_tokens(["a?"], 4))


def test_texts_may_come_as_tokens() -> None:
    encoder = text()
    assert torch.equal(encoder(text_tokens(TEXTS, 24)), encoder(TEXTS))


def test_padding_does_not_count() -> None:
    short, cut = text().double(), [row[:24] for row in TEXTS]
    long = TextEncoder(TextEncoder.Config(width=16, heads=2, max_bytes=60)).double()
    positions = torch.cat([short.positions.detach(), long.positions.detach()[25:]])
    long.load_state_dict({**short.state_dict(), "positions": positions})
    torch.testing.assert_close(long(cut), short(cut))
    assert not torch.allclose(long(TEXTS)[-1], short(TEXTS)[-1])


def test_text_order_counts() -> None:
    left, right = text()(["left", "tfel"])
    assert (left - right).norm() > 1e-2


def test_vectors_of_any_shape_and_scale() -> None:
    encoder, rows = vector(), torch.randn(5, 3, 4)
    assert torch.equal(encoder(rows), encoder(rows.flatten(1)))
    assert encoder(rows[:0]).shape == (0, 6)
    spread = encoder(1e4 * rows).std(dim=0)
    assert 1e-2 < spread.min() < spread.max() < 10
    one = VectorEncoder(VectorEncoder.Config(), (1,))
    values = torch.linspace(-1, 1, 9)
    assert torch.equal(one(values), one(values[:, None]))
    assert torch.pdist(one(values)).min() > 1e-3
    assert [type(m) for m in vector(layers=1).net] == [nn.Linear]


def build_pair(name: str, example: Tensor | Sequence[str], **fields: object) -> Encoder:
    settings = TypeAdapter(AnyPairEncoder).validate_python({"name": name, **fields})
    return build_pair_encoder(settings, example)


def test_content_chooses_what_fits() -> None:
    image, numbers = torch.rand(1, 3, 8, 8), torch.rand(1, 5)
    vit = {"model_type": "vit", "config": {"hidden_size": 8, "num_hidden_layers": 1}}
    vit["config"] |= {"num_attention_heads": 2, "intermediate_size": 8, "patch_size": 4}
    for encoder, example, kind in [
        (build_pair("residual", image, widths=[8]), image, ResidualEncoder),
        (build_pair("transformers", image, **vit), image, TransformersEncoder),
        (build_pair("vector", image), image, VectorEncoder),
        (build_pair("vector", numbers), numbers, VectorEncoder),
        (build_pair("vector", torch.rand(1)), torch.rand(1), VectorEncoder),
        (build_pair("text", ["a cat"]), ["a cat"], TextEncoder),
    ]:
        assert type(encoder) is kind
        assert encoder(example).shape == (1, encoder.dim)


@pytest.mark.parametrize(
    ("name", "example", "message"),
    [
        ("text", torch.rand(1, 3, 8, 8), "3x8x8.*residual, transformers"),
        ("text", torch.rand(1, 5), "text.* 5: .*vector"),
        ("residual", torch.rand(1, 5), "residual.* 5: .*vector"),
        ("residual", torch.rand(1), "residual.*single numbers.*vector"),
        ("vector", ["a cat"], "vector.*text.*set name to text"),
        ("residual", ["a cat"], "residual.*text.*set name to text"),
        ("vector", torch.rand(1, 0), "1 .* 0"),
    ],
)
def test_content_that_does_not_fit(name, example, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_pair(name, example)


def test_settings_errors() -> None:
    with pytest.raises(ValidationError, match=r"30 .* 4 "):
        TextEncoder.Config(width=30)
    with pytest.raises(ValidationError, match="name"):
        build_pair("words", ["a cat"])
