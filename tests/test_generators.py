"""Generators: shapes, rows that do not see each other, no rows at all, conditions, bad input."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError
from dist_contrastive.models import (
    AnyGenerator,
    ConditionalGenerator,
    MomentumCopy,
    build_generator,
    ema_decay_at,
)
from dist_contrastive.models.layers import Modulation, ResidualBlock

SHAPE = (2, 4, 8)
CLASSES = 3
TINY = {
    "conv": {"noise_dim": 4, "class_dim": 4, "width": 8, "doublings": 1, "blocks": 2},
    "unet": {"widths": [8, 16], "blocks": 2, "condition_dim": 4, "noise_channels": 3},
    "dit": {"width": 16, "layers": 2, "heads": 2, "registers": 2, "noise_channels": 3},
    "mlp": {"noise_dim": 4, "class_dim": 4, "hidden": 16, "layers": 3},
}
NOISE_DIM = {"conv": 4, "unet": 3 * 4 * 8, "dit": 3 * 4 * 8, "mlp": 4}
every_name = pytest.mark.parametrize("name", TINY)


def build(
    name: str,
    classes: int | None = CLASSES,
    guided: bool = True,
    shape: tuple[int, ...] = SHAPE,
    seed: int = 0,
    **more: object,
) -> ConditionalGenerator:
    torch.manual_seed(seed)
    settings = TypeAdapter(AnyGenerator).validate_python({"name": name, **TINY[name], **more})
    return build_generator(settings, shape, classes, guided)


def awake(generator: ConditionalGenerator) -> ConditionalGenerator:
    """All that begins at zero moved away from it, in fp64: every path is then in use."""
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return generator.double()


def inputs(
    generator: ConditionalGenerator, rows: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = next(generator.parameters()).dtype
    noise = torch.randn(rows, generator.noise_dim, dtype=dtype)
    labels = torch.arange(rows) % CLASSES if generator.num_classes else None
    guidance = 1 + 3 * torch.rand(rows, dtype=dtype) if generator.guided else None
    return noise, labels, guidance


@every_name
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("classes", [CLASSES, None])
def test_shapes_range_and_gradients(name: str, classes: int | None, guided: bool) -> None:
    generator = build(name, classes, guided)
    assert generator.noise_dim == NOISE_DIM[name]
    samples = generator(*inputs(generator, 5))
    assert samples.shape == (5, *SHAPE)
    assert name == "mlp" or (samples.min() > 0 and samples.max() < 1)
    samples.square().sum().backward()
    missing = [n for n, p in generator.named_parameters() if p.grad is None]
    assert not missing
    generator = awake(generator)
    generator.zero_grad()
    generator(*inputs(generator, 5)).square().sum().backward()
    unused = [n for n, p in generator.named_parameters() if not p.grad.any()]
    assert not unused


@every_name
def test_rows_depend_on_themselves_only(name: str) -> None:
    generator = awake(build(name))
    noise, labels, guidance = inputs(generator, 5)
    together = generator(noise, labels, guidance)
    for row in range(5):
        one = slice(row, row + 1)
        apart = generator(noise[one], labels[one], guidance[one])
        torch.testing.assert_close(together[one], apart, rtol=0, atol=1e-12)


@every_name
@pytest.mark.parametrize("conditional", [True, False])
def test_without_rows(name: str, conditional: bool) -> None:
    generator = build(name, CLASSES if conditional else None, guided=conditional)
    samples = generator(*inputs(generator, 0))
    assert samples.shape == (0, *SHAPE)
    samples.sum().backward()
    for parameter_name, parameter in generator.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert not parameter.grad.any(), parameter_name


@every_name
def test_seed_decides(name: str) -> None:
    given = inputs(build(name), 3)
    assert torch.equal(build(name)(*given), build(name)(*given))
    assert not torch.equal(build(name)(*given), build(name, seed=1)(*given))


@every_name
def test_noise_tells_samples_apart_from_the_start(name: str) -> None:
    """Between points that coincide there is no force: they would never part."""
    generator = build(name)
    noise, _, _ = inputs(generator, 16)
    samples = generator(noise, torch.zeros(16, dtype=torch.int64), torch.ones(16)).flatten(1)
    assert torch.pdist(samples).min() > 0.02


@every_name
def test_class_and_guidance_are_learned(name: str) -> None:
    """A few steps towards samples as bright as label and strength say."""
    generator = build(name)
    noise, labels, guidance = inputs(generator, 24)
    target = (labels + guidance.log()).view(-1, 1, 1, 1) / 4
    optimiser = torch.optim.Adam(generator.parameters(), 1e-2)
    for _ in range(60):
        loss = (generator(noise, labels, guidance) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def brightness(label: int, strength: float) -> Tensor:
        rows = len(noise)
        return generator(noise, torch.full((rows,), label), torch.full((rows,), strength)).mean()

    assert brightness(2, 2.0) > brightness(0, 2.0) + 0.1  # 0.5 where all is learned
    assert brightness(1, 4.0) > brightness(1, 1.0) + 0.1  # 0.35


@every_name
def test_condition_is_the_sum_of_embeddings(name: str) -> None:
    generator = awake(build(name))
    noise, labels, guidance = inputs(generator, 4)
    rows = [
        generator.class_embedding.weight[label]
        + generator.guidance_embedding(torch.tensor([strength.item()], dtype=torch.float64).log())
        for label, strength in zip(labels, guidance, strict=True)
    ]
    expected = generator.draw(noise, torch.stack(rows))
    torch.testing.assert_close(generator(noise, labels, guidance), expected, rtol=0, atol=1e-12)
    assert build(name, None, False).condition_dim == 0


@pytest.mark.parametrize(
    ("classes", "total"), [(10, 188.61396059393883), (None, 171.15393240749836)]
)
def test_conv_is_what_it_was(classes: int | None, total: float) -> None:
    """Sums of its samples, and the names of its weights, before it could be guided."""
    torch.manual_seed(0)
    settings = TypeAdapter(AnyGenerator).validate_python({"name": "conv"})
    generator = build_generator(settings, (1, 8, 8), classes)
    samples = generator(torch.randn(6, 16), torch.arange(6) if classes else None)
    assert samples.double().sum().item() == pytest.approx(total, rel=1e-6)
    names = {name.split(".")[0] for name in generator.state_dict()} - {"class_embedding"}
    assert names == {"project", "blocks", "norm", "to_image"}
    assert ("class_embedding.weight" in generator.state_dict()) == bool(classes)


def test_adaptive_norm_by_hand() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(8, 16, condition_dim=5).double()
    nn.init.normal_(block.norm2.modulation.weight)
    nn.init.normal_(block.norm2.modulation.bias)
    x, condition = torch.randn(3, 8, 4, 4).double(), torch.randn(3, 5).double()
    gain, shift = (
        F.silu(condition) @ block.norm2.modulation.weight.T + block.norm2.modulation.bias
    ).split(16, 1)
    normed = F.group_norm(block.conv1(F.silu(block.norm1(x))), 8)
    for row in range(3):
        for channel in range(16):
            scaled = normed[row, channel] * (1 + gain[row, channel]) + shift[row, channel]
            normed[row, channel] = scaled
    expected = block.shortcut(x) + block.conv2(F.silu(normed))
    torch.testing.assert_close(block(x, condition), expected, rtol=0, atol=1e-12)
    assert not any(part.any() for part in Modulation(5, 16, 2)(torch.randn(3, 5)))


def test_unet_halves_and_doubles() -> None:
    generator = build("unet", widths=[8, 16, 24], shape=(1, 8, 12))
    sizes: list[tuple[int, ...]] = []
    for block in [*generator.down, generator.middle, *generator.up]:
        block.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[1:])))
    assert generator(*inputs(generator, 2)).shape == (2, 1, 8, 12)
    down = [(8, 8, 12), (8, 8, 12), (16, 4, 6), (16, 4, 6), (24, 2, 3), (24, 2, 3)]
    up = [(24, 2, 3), (16, 4, 6), (16, 4, 6), (8, 8, 12), (8, 8, 12), (8, 8, 12)]
    assert sizes == [*down, (24, 2, 3), *up]


def test_dit_patches_lie_where_their_noise_lies() -> None:
    """Blocks are the identity at first: a patch of noise moves its own pixels only."""
    generator = build("dit", None, False)
    noise = torch.randn(1, 3, *SHAPE[1:])
    changed = noise.clone()
    changed[0, 1, 2:4, 4:6] += 1
    before, after = generator(noise.flatten(1)), generator(changed.flatten(1))
    moved = (before != after).any(dim=1)[0]
    assert moved[2:4, 4:6].all()
    assert moved.sum() == 4
    awoken = awake(generator)
    before, after = (awoken(x.double().flatten(1)) for x in (noise, changed))
    assert (before != after).all(), "attention carries a change everywhere"


def test_dit_pixels_by_hand() -> None:
    """At the start: the noise patch's embedding plus its position, normed, to its pixels."""
    generator = build("dit", None, False).double()
    noise = torch.randn(1, 3, *SHAPE[1:]).double()
    image = generator(noise.flatten(1))[0]
    for number, (row, column) in enumerate((r, c) for r in range(2) for c in range(4)):
        part = noise[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        token = (generator.embed.weight * part).sum(dim=(1, 2, 3)) + generator.embed.bias
        token = F.layer_norm(token + generator.positions[number], (16,))
        expected = generator.to_patch(token).sigmoid().view(2, 2, 2)
        found = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_dit_block_by_hand() -> None:
    generator = awake(build("dit"))
    block = generator.blocks[0]
    tokens, condition = torch.randn(2, 5, 16).double(), torch.randn(2, 16).double()
    parts = F.silu(condition) @ block.modulation.weight.T + block.modulation.bias
    for row in range(2):
        scale1, shift1, gate1, scale2, shift2, gate2 = parts[row].split(16)
        x = tokens[row]
        q, k, v = block.to_qkv(F.layer_norm(x, (16,)) * (1 + scale1) + shift1).split(16, dim=1)
        heads = [
            (q[:, h] @ k[:, h].T / 8**0.5).softmax(dim=1) @ v[:, h]
            for h in (slice(0, 8), slice(8, 16))
        ]
        x = x + gate1 * block.out(torch.cat(heads, dim=1))
        expected = x + gate2 * block.mlp(F.layer_norm(x, (16,)) * (1 + scale2) + shift2)
        torch.testing.assert_close(block(tokens, condition)[row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(2,), (5, 3), (1, 4, 4), ()])
def test_mlp_draws_any_shape_without_bounds(shape: tuple[int, ...]) -> None:
    generator = build("mlp", None, False, shape)
    samples = generator(1e3 * torch.randn(64, 4))
    assert samples.shape == (64, *shape)
    assert samples.min() < -1
    assert samples.max() > 1


def test_average_of_weights() -> None:
    assert [ema_decay_at(step, 0.999) for step in (0, 1, 90)] == [1 / 10, 2 / 11, 91 / 100]
    assert ema_decay_at(8980, 0.999) < 0.999 == ema_decay_at(8991, 0.999)
    assert ema_decay_at(10**6, 0.9999) == 0.9999
    generator = awake(build("dit"))
    average, expected = MomentumCopy(generator), generator.to_patch.bias.detach().clone()
    for step in range(3):
        awake(generator)
        average.update(generator, ema_decay_at(step, 0.15))
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * generator.to_patch.bias.detach()
    torch.testing.assert_close(average.module.to_patch.bias, expected, rtol=0, atol=1e-12)
    assert average(*inputs(generator, 2)).shape == (2, *SHAPE)


@every_name
def test_conditions_that_do_not_fit_the_generator(name: str) -> None:
    plain, conditional = build(name, None, False), build(name)
    noise, labels, guidance = inputs(conditional, 2)
    with pytest.raises(ConfigError, match=r"needs class labels \(num_classes is 3\)"):
        conditional(noise, None, guidance)
    with pytest.raises(ConfigError, match=r"needs guidance strengths \(guided is True\)"):
        conditional(noise, labels)
    with pytest.raises(ConfigError, match=r"built without class labels \(num_classes is None\)"):
        plain(noise, labels)
    with pytest.raises(ConfigError, match=r"built without guidance strengths .*set guided"):
        plain(noise, None, guidance)
    with pytest.raises(ConfigError, match=r"strengths of shape \(1,\) do not fit 2 rows"):
        conditional(noise, labels, guidance[:1])
    with pytest.raises(ConfigError, match=r"labels of shape \(2, 1\) do not fit 2 rows"):
        conditional(noise, labels[:, None], guidance)


@pytest.mark.parametrize(
    ("name", "shape", "more", "message"),
    [
        ("conv", (2,), {}, r"'conv' draws images .*shape \(2,\): set name to mlp"),
        ("unet", (2,), {}, r"'unet' draws images .*set name to mlp"),
        ("dit", (4, 4), {}, r"'dit' draws images .*set name to mlp"),
        ("conv", (1, 6, 8), {"doublings": 2}, r"6x8 .* 2 doublings.*multiples of 4.*at most 1"),
        ("unet", (1, 4, 6), {"widths": [8] * 3}, r"4x6 .* 2 widths after.*of 4: use at most 1"),
        ("unet", SHAPE, {"widths": [8, 20]}, r"width 20 .*multiple of 8.*use 16 or 24"),
        ("dit", (1, 9, 6), {"patch": 2}, r"patches of 2x2 .*images of 9x6.*divides both.*as 1"),
        ("dit", (1, 8, 12), {"patch": 8}, r"patches of 8x8 .*images of 8x12.*such as 4"),
        ("mlp", (0, 3), {}, r"shape \(0, 3\) hold 0 numbers.*needs 1"),
    ],
)
def test_shapes_that_do_not_fit(
    name: str, shape: tuple[int, ...], more: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, shape=shape, **more)


def test_settings_that_are_wrong() -> None:
    with pytest.raises(ValidationError, match="divided among its 3 attention heads"):
        build("dit", heads=3)
    with pytest.raises(ValidationError, match=r"conv.*unet.*dit.*mlp"):
        TypeAdapter(AnyGenerator).validate_python({"name": "gan"})
