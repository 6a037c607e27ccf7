"""Feature maps of frozen encoders: groups against naive loops, gradients, no rows, bad input."""

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.errors import ConfigError
from dist_contrastive.models import FeatureMaps
from dist_contrastive.models.encoders import ResidualEncoder
from dist_contrastive.models.transformers.vision import (
    TransformersEncoder,
)

TINY_VIT = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 4,
}
REGISTERS = {k: v for k, v in TINY_VIT.items() if k != "intermediate_size"} | {
    "num_register_tokens": 4
}
HIERARCHY = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]}
HIERA = {
    "masked_unit_size": [4, 4],
    "patch_size": [3, 3],
    "patch_stride": [2, 2],
    "patch_padding": [1, 1],
    "num_query_pool": 1,
}


def residual(blocks: int = 2) -> ResidualEncoder:
    torch.manual_seed(0)
    settings = ResidualEncoder.Config(widths=(8, 16), blocks=blocks)
    return ResidualEncoder(settings, (3, 8, 8)).double()


def transformer(kind: str, size: tuple[int, int] = (16, 16), **config: object):
    torch.manual_seed(0)
    settings = TransformersEncoder.Config(model_type=kind, config=config)
    return TransformersEncoder(settings, (3, *size))


def maps_of(encoder: nn.Module, size: tuple[int, int] = (8, 12), **settings: object) -> FeatureMaps:
    fields = FeatureMaps.Config.model_validate(settings)
    return FeatureMaps(fields, encoder, (3, *size))


def naive(map_: Tensor, rows: range, columns: range) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [b, C] of some locations, by sums over them."""
    values = [map_[:, :, row, column] for row in rows for column in columns]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return mean, (variance + 1e-6).sqrt()


def test_groups_equal_naive_loops() -> None:
    encoder = nn.Conv2d(3, 5, 3, padding=1).double()
    images = torch.rand(2, 3, 4, 6).double()
    found, map_ = maps_of(encoder, (4, 6), patches=[2])(images), encoder(images)
    expected = {
        "pooled": [naive(map_, range(4), range(6))[0]],
        "stage0.locations": [map_[:, :, r, c] for r in range(4) for c in range(6)],
    }
    whole = naive(map_, range(4), range(6))
    tiles = [
        naive(map_, range(r, r + 2), range(c, c + 2)) for r in range(0, 4, 2) for c in (0, 2, 4)
    ]
    for place, name in enumerate(("mean", "std")):
        expected[f"stage0.{name}"] = [whole[place]]
        expected[f"stage0.patch2.{name}"] = [tile[place] for tile in tiles]
    assert found.keys() == expected.keys()
    for name, groups in expected.items():
        torch.testing.assert_close(found[name], torch.stack(groups, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 2])
def test_maps_of_the_residual_encoder(blocks: int) -> None:
    encoder = residual(blocks)
    images = torch.rand(2, 3, 8, 12).double()
    representation, maps = encoder.with_maps(images)
    assert torch.equal(representation, encoder(images))
    stem = F.conv2d(2 * images - 1, encoder.stem.weight, padding=1)
    first = encoder.blocks[:blocks](stem)
    last = F.silu(F.group_norm(encoder.blocks[blocks:](first), 8))
    for found, expected in zip(maps, (stem, first, last), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_shapes_are_told_beforehand() -> None:
    features = maps_of(residual(), patches=[2, 4])
    found = features(torch.rand(2, 3, 8, 12).double())
    assert {name: (x.shape[1], x.shape[2]) for name, x in found.items()} == features.shapes
    patches = {"patch2.mean": 24, "patch2.std": 24, "patch4.mean": 6, "patch4.std": 6}
    assert features.shapes == {
        "pooled": (1, 16),
        **{f"stage{s}.locations": (96, 8) for s in (0, 1)},
        **{f"stage{s}.{kind}": (1, 8) for s in (0, 1) for kind in ("mean", "std")},
        **{f"stage{s}.{patch}": (groups, 8) for s in (0, 1) for patch, groups in patches.items()},
        "stage2.locations": (24, 16),
        "stage2.mean": (1, 16),
        "stage2.std": (1, 16),
        "stage2.patch2.mean": (6, 16),  # 4 x 6 is not tiled by 4 x 4
        "stage2.patch2.std": (6, 16),
    }


def test_chosen_features_only() -> None:
    chosen = maps_of(residual(), stages=[1], kinds=["mean"], patches=[4])
    assert list(chosen.shapes) == ["stage1.mean", "stage1.patch4.mean", "stage1.patch4.std"]
    pooled = maps_of(nn.Flatten(), (4, 4), kinds=["pooled"], patches=[])
    assert pooled.shapes == {"pooled": (1, 48)}
    small = maps_of(residual(), (2, 2), patches=[])
    assert small.shapes["stage2.locations"] == (1, 16)
    assert "stage1.std" in small.shapes
    assert "stage2.std" not in small.shapes  # of one location


def test_one_forward_pass_frozen_in_eval_mode() -> None:
    config = TINY_VIT | {"hidden_dropout_prob": 0.5}
    encoder = transformer("vit", **config)
    encoder.config = encoder.config.model_copy(update={"row_independent": False})
    features = maps_of(encoder.train(), (16, 16)).train()
    assert not any(module.training for module in features.modules())
    assert not any(parameter.requires_grad for parameter in features.parameters())
    passes: list[int] = []
    encoder.model.register_forward_hook(lambda *_: passes.append(1))
    images = torch.rand(2, 3, 16, 16)
    found = features(images)
    assert len(passes) == 1
    again = features(images)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("kind", ["residual", "vit", "convnext"])
def test_rows_gradients_and_no_rows(kind: str) -> None:
    config = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
    encoder = {
        "residual": residual,
        "vit": lambda: transformer("vit", **TINY_VIT).double(),
        "convnext": lambda: transformer("convnext", **config).double(),
    }[kind]()
    features = maps_of(encoder, (16, 16), patches=[2])
    images = torch.rand(3, 3, 16, 16).double().requires_grad_()
    found, nobody = features(images), features(images[:0])
    assert found.keys() == nobody.keys() == features.shapes.keys()
    for name, feature in found.items():
        apart = torch.cat([features(images[row : row + 1])[name] for row in range(3)])
        torch.testing.assert_close(feature, apart, rtol=0, atol=1e-12)
        (slope,) = torch.autograd.grad(feature[1].square().sum(), images, retain_graph=True)
        assert slope[1].any(), name
        assert not slope[[0, 2]].any(), name
        assert nobody[name].shape == (0, *features.shapes[name])
    (slope,) = torch.autograd.grad(sum(x.sum() for x in nobody.values()), images)
    assert not slope.any()


def test_constant_maps_have_a_finite_slope() -> None:
    features = maps_of(nn.Conv2d(3, 2, 1), (4, 4), patches=[2])
    images = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    found = features(images)
    torch.testing.assert_close(found["stage0.std"], torch.full((2, 1, 2), 1e-3))
    sum(x.sum() for x in found.values()).backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "size", "config", "special"),
    [
        ("vit", (16, 16), TINY_VIT, 1),
        ("vit", (8, 16), TINY_VIT, 1),  # not square
        # 2 x 2 patches and 5 special tokens are 9 positions, which a square of 3 x 3 is not
        ("dinov2_with_registers", (8, 8), REGISTERS, 5),
        ("siglip_vision_model", (8, 8), TINY_VIT, 0),
    ],
)
def test_grids_of_transformers(
    kind: str, size: tuple[int, int], config: dict[str, object], special: int
) -> None:
    encoder = transformer(kind, size, **config).eval()
    images = torch.rand(2, 3, *size)
    representation, maps = encoder.with_maps(images)
    torch.testing.assert_close(representation, encoder(images))
    states = encoder.model(pixel_values=2 * images - 1, output_hidden_states=True).hidden_states
    assert len(maps) == len(states) == 3
    height, width = size[0] // 4, size[1] // 4
    for map_, state in zip(maps, states, strict=True):
        assert map_.shape == (2, 8, height, width)
        for row in range(height):
            for column in range(width):
                token = state[:, special + row * width + column]
                torch.testing.assert_close(map_[:, :, row, column], token)


def test_a_patch_lies_where_it_is_seen() -> None:
    """A change of one patch changes its place in the embedding's map, and no other."""
    encoder = transformer("vit", (8, 16), **TINY_VIT).eval()
    images = torch.rand(1, 3, 8, 16)
    changed = images.clone()
    changed[:, :, 4:8, 8:12] += 0.3
    moved = (encoder.with_maps(images)[1][0] != encoder.with_maps(changed)[1][0]).any(dim=1)[0]
    assert moved.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("kind", "config"),
    [("swin", HIERARCHY | {"patch_size": 2, "window_size": 2}), ("hiera", HIERARCHY | HIERA)],
)
def test_models_that_arrange_their_positions(kind: str, config: dict[str, object]) -> None:
    """Swin gives maps with channels first, Hiera with channels last, of positions out of order."""
    encoder = transformer(kind, (32, 32), **config).eval()
    images = torch.rand(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 4:6, 26:28] += 0.5
    before, after = encoder.with_maps(images)[1], encoder.with_maps(changed)[1]
    assert before[0].shape == (1, 8, 16, 16)
    assert before[-1].shape == (1, 16, 8, 8)
    most = (before[0] - after[0]).abs().sum(dim=1)[0].argmax().item()
    assert divmod(most, 16) == (2, 13)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("convnext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}),
        ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    ],
)
def test_maps_of_convolutional_models_are_their_hidden_states(
    kind: str, config: dict[str, object]
) -> None:
    encoder = transformer(kind, **config).eval()
    images = torch.rand(2, 3, 16, 16)
    representation, maps = encoder.with_maps(images)
    assert torch.equal(representation, encoder(images))
    states = encoder.model(pixel_values=2 * images - 1, output_hidden_states=True).hidden_states
    assert len(maps) == 3
    assert all(torch.equal(map_, state) for map_, state in zip(maps, states, strict=True))


def test_merged_positions_without_a_patch_grid() -> None:
    """Models that merge patches and say no more than [b, positions, D]: the image's proportions."""
    encoder = transformer("vit", (8, 16), **TINY_VIT)
    state = torch.rand(2, 2, 8)
    encoder.model.config.patch_size = 2  # 4 x 8 patches, of which 1 x 2 are left
    torch.testing.assert_close(encoder._map(state, state), state.mT.reshape(2, 8, 1, 2))


def test_what_is_no_map_is_refused() -> None:
    encoder = transformer("vit", (8, 8), **TINY_VIT)
    encoder.model.config.patch_size = 1  # as where a model drops some of its patches
    with pytest.raises(
        ConfigError, match=r"^a hidden state of .*'vit' has shape \(1, 5, 8\).*grid"
    ):
        maps_of(encoder, (8, 8))
    assert maps_of(encoder, (8, 8), kinds=["pooled"], patches=[]).shapes == {"pooled": (1, 8)}
    video = SimpleNamespace(last_hidden_state=torch.rand(1, 2, 3, 4, 5))
    with pytest.raises(ConfigError, match=r"last hidden state .*\(1, 2, 3, 4, 5\).*single images"):
        encoder._pooled(video)
    with pytest.raises(ConfigError, match=r"^the encoder makes \(1, 3, 16\) of images .*\[b, D\]"):
        maps_of(nn.Flatten(2), (4, 4))


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        ((8, 8), {"stages": [1, 3]}, r"stage 3 .*has 3 maps: set stages of 0 to 2"),
        ((8, 8), {"patches": [2, 3]}, r"patches of 3x3 tile none .*\(8x8 and 8x8 and 4x4\)"),
        ((4, 4), {"patches": [4]}, r"patches of 4x4 tile none .*with two or more"),
        ((2, 2), {"stages": [2], "kinds": ["std"], "patches": []}, r"no feature .*two locations"),
    ],
)
def test_features_that_do_not_exist(
    size: tuple[int, int], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        maps_of(residual(), size, **settings)


def test_representation_alone_has_no_maps() -> None:
    with pytest.raises(ConfigError, match=r"no maps, of which .*kinds: \[pooled\]"):
        maps_of(nn.Flatten(), (4, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": [], "patches": []}, "are nothing: set one"),
        ({"patches": [1]}, "greater than or equal to 2"),
        ({"stages": []}, "at least 1 item"),
        ({"kinds": ["max"]}, "pooled"),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FeatureMaps.Config.model_validate(settings)
