"""Encoders of texts and vectors: rows apart, no rows at all, what fits what."""

from collections.abc import Sequence

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from dist_contrastive.errors import ConfigError
from dist_contrastive.models import (
    PairEncoderSettings,
    ResidualEncoder,
    TextEncoder,
    TextEncoderSettings,
    TransformersEncoder,
    VectorEncoder,
    VectorEncoderSettings,
    build_pair_encoder,
    text_tokens,
)

TEXTS = ["", "seven", "eight", "a small green circle, left of the middle", "четыре", "x" * 200]


def text(**settings: int) -> TextEncoder:
    return TextEncoder(TextEncoderSettings(width=16, heads=2, max_bytes=24, **settings))


def vector(**settings: int) -> VectorEncoder:
    return VectorEncoder(VectorEncoderSettings(hidden=8, out=6, **settings), num_features=12)


def cases() -> list[tuple[nn.Module, Sequence[str] | Tensor, int]]:
    return [(text(), TEXTS, 16), (vector(), torch.randn(6, 12), 6)]


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


def test_rows_depend_on_themselves_only() -> None:
    for encoder, rows, dim in cases():
        together = encoder(rows)
        apart = torch.cat([encoder(rows[:1]), encoder(rows[1:4]), encoder(rows[4:])])
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
        assert together.shape == (6, dim)
        assert torch.pdist(together).min() > 1e-3, "two rows have one representation"


def test_train_and_eval_agree() -> None:
    for encoder, rows, _ in cases():
        training = encoder.train()(rows)
        with torch.no_grad():  # here torch takes a fused path of its own
            torch.testing.assert_close(encoder.eval()(rows), training, rtol=0, atol=1e-6)


def test_without_rows() -> None:
    for encoder, rows, dim in cases():
        for mode in (True, False):
            output = encoder.train(mode)(rows[:0])
            assert output.shape == (0, dim)
            encoder.zero_grad()
            output.sum().backward()
            for name, parameter in encoder.named_parameters():
                assert parameter.grad is not None, name
                assert not parameter.grad.any(), name


def test_every_parameter_gets_a_gradient() -> None:
    for encoder, rows, _ in cases():
        encoder(rows[:2]).square().sum().backward()
        missing = [name for name, p in encoder.named_parameters() if p.grad is None]
        assert not missing


def test_texts_may_come_as_tokens() -> None:
    encoder = text()
    assert torch.equal(encoder(text_tokens(TEXTS, 24)), encoder(TEXTS))


def test_padding_does_not_count() -> None:
    short, cut = text().double(), [row[:24] for row in TEXTS]
    long = TextEncoder(TextEncoderSettings(width=16, heads=2, max_bytes=60)).double()
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
    one = VectorEncoder(VectorEncoderSettings(), 1)
    values = torch.linspace(-1, 1, 9)
    assert torch.equal(one(values), one(values[:, None]))
    assert torch.pdist(one(values)).min() > 1e-3
    assert [type(m) for m in vector(layers=1).net] == [nn.Linear]


def build(name: str, example: Tensor | Sequence[str], **fields: object) -> nn.Module:
    settings = TypeAdapter(PairEncoderSettings).validate_python({"name": name, **fields})
    return build_pair_encoder(settings, example)


def test_content_chooses_what_fits() -> None:
    image, numbers = torch.rand(1, 3, 8, 8), torch.rand(1, 5)
    vit = {"model_type": "vit", "config": {"hidden_size": 8, "num_hidden_layers": 1}}
    vit["config"] |= {"num_attention_heads": 2, "intermediate_size": 8, "patch_size": 4}
    for encoder, example, kind in [
        (build("residual", image, widths=[8]), image, ResidualEncoder),
        (build("transformers", image, **vit), image, TransformersEncoder),
        (build("vector", image), image, VectorEncoder),
        (build("vector", numbers), numbers, VectorEncoder),
        (build("vector", torch.rand(1)), torch.rand(1), VectorEncoder),
        (build("text", ["a cat"]), ["a cat"], TextEncoder),
    ]:
        assert type(encoder) is kind
        assert encoder(example).shape == (1, encoder.dim)


@pytest.mark.parametrize(
    ("name", "example", "message"),
    [
        ("text", torch.rand(1, 3, 8, 8), "'text' .* holds arrays of 3x8x8: .* residual, transf"),
        ("text", torch.rand(1, 5), "'text' cannot read .* arrays of 5: set name to vector"),
        ("residual", torch.rand(1, 5), "'residual' cannot read .* arrays of 5: set name to vector"),
        ("residual", torch.rand(1), "'residual' .* holds single numbers: set name to vector"),
        ("vector", ["a cat"], "'vector' cannot read .* holds text: set name to text"),
        ("residual", ["a cat"], "'residual' cannot read .* holds text: set name to text"),
        ("vector", torch.rand(1, 0), "needs 1 feature or more, but the field has 0"),
    ],
)
def test_content_that_does_not_fit(name, example, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, example)


def test_settings_errors() -> None:
    with pytest.raises(ValidationError, match=r"width 30 .* 4 attention heads: .* multiple of 4"):
        TextEncoderSettings(width=30)
    with pytest.raises(ValidationError, match="name"):
        build("words", ["a cat"])
