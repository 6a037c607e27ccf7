"""Keyed randomness and the views made with it: a sample's view never depends on its batch."""

import math

import pytest
import torch
from pydantic import ValidationError

from dist_contrastive.data import keyed_random
from dist_contrastive.data.views import RandomViews, make_view, view_keys
from dist_contrastive.errors import ConfigError

DIGITS = RandomViews.Config(
    rotation_deg=20,
    shear_deg=15,
    translate=0.125,
    scale=(0.8, 1.2),
    aspect=1.1,
    contrast=0.3,
    noise_std=0.1,
    erase=0.5,
)
NATURAL = RandomViews.Config(
    size=12,
    crop_area=(0.2, 1.0),
    crop_aspect=4 / 3,
    flip=0.5,
    brightness=0.2,
    contrast=0.4,
    saturation=0.4,
    hue_deg=30,
    greyscale=0.2,
    blur_sigma=(0.1, 2.0),
)


def splitmix64(x: int) -> int:
    """The published finaliser in Python's integers."""
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_hash_is_splitmix64() -> None:
    values = [0, 1, 2, 2**40 + 3, 2**63, 2**64 - 1]
    signed = torch.tensor([v - 2**64 if v >= 2**63 else v for v in values])
    hashed = keyed_random._finalise(signed)
    assert [h % 2**64 for h in hashed.tolist()] == [splitmix64(v) for v in values]


def test_uniform_is_uniform() -> None:
    draws = keyed_random.uniform(keyed_random.combine(3, torch.arange(2000)), 50)
    assert draws.dtype == torch.float32
    assert draws.shape == (2000, 50)
    assert draws.min() > 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=100, min=0, max=1)
    chi2 = ((counts - 1000) ** 2 / 1000).sum().item()  # 99 degrees: 99 +- 14
    assert 99 - 5 * 14 < chi2 < 99 + 5 * 14


def test_normal_is_normal() -> None:
    draws = keyed_random.normal(keyed_random.combine(3, torch.arange(4000)), 25).double()
    assert draws.shape == (4000, 25)
    moments = [draws.pow(k).mean().item() for k in (1, 2, 3, 4)]
    spread = [math.sqrt(v / draws.numel()) for v in (1, 2, 15, 96)]
    for moment, expected, sigma in zip(moments, (0, 1, 0, 3), spread, strict=True):
        assert abs(moment - expected) < 5 * sigma


def test_neighbouring_keys_and_columns_are_unrelated() -> None:
    """Rows of consecutive indices, seeds, streams; columns of one row."""
    index = torch.arange(1000)
    blocks = [
        keyed_random.normal(keyed_random.combine(seed, epoch, index), 8)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    columns = torch.cat(blocks, dim=1)  # 24 columns that should not know of each other
    correlation = torch.corrcoef(columns.T) - torch.eye(24)
    assert correlation.abs().max() < 5 / math.sqrt(1000)
    rows = torch.corrcoef(keyed_random.normal(keyed_random.combine(5, index[:50]), 2000))
    assert (rows - torch.eye(50)).abs().max() < 5 / math.sqrt(2000)


def test_combine_keeps_order_and_broadcasts() -> None:
    index = torch.arange(100)
    keys = keyed_random.combine(7, torch.tensor([[1], [2]]), index)
    assert keys.shape == (2, 100)
    assert keys.unique().numel() == 200
    assert keyed_random.combine(1, 2) != keyed_random.combine(2, 1)
    assert keyed_random.combine(1) != keyed_random.combine(1, 0)
    assert torch.equal(keyed_random.combine(7, 2, 5), keys[1, 5])
    assert keyed_random.combine(2**64 + 3) == keyed_random.combine(3)


@pytest.mark.parametrize("draw", [keyed_random.uniform, keyed_random.normal])
def test_numbers_belong_to_the_key(draw) -> None:
    keys = keyed_random.combine(1, torch.arange(100))
    together = draw(keys, 7)
    assert torch.equal(together[37:38], draw(keys[37:38], 7))
    assert torch.equal(together.flip(0), draw(keys.flip(0), 7))
    assert draw(keys[:0], 7).shape == (0, 7)


@pytest.mark.parametrize(
    ("settings", "shape"), [(DIGITS, (1, 8, 8)), (NATURAL, (3, 16, 20))], ids=["digits", "natural"]
)
def test_view_does_not_depend_on_the_batch(
    settings: RandomViews.Config, shape: tuple[int, ...]
) -> None:
    images = torch.rand(37, *shape, generator=torch.Generator().manual_seed(0))
    keys = view_keys(0, 3, torch.arange(37), view=1)
    whole = make_view(images, keys, settings)
    split = [make_view(i, k, settings) for i, k in zip(images.split(5), keys.split(5), strict=True)]
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole, torch.cat(split))
    assert torch.equal(whole[order], make_view(images[order], keys[order], settings))
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_views_differ_by_seed_epoch_sample_and_view() -> None:
    image = torch.rand(1, 1, 8, 8)
    zero = torch.zeros(1, dtype=torch.int64)
    variants = [(0, 0, zero, 0), (1, 0, zero, 0), (0, 1, zero, 0), (0, 0, zero + 1, 0)]
    views = [make_view(image, view_keys(*v), DIGITS) for v in [*variants, (0, 0, zero, 1)]]
    for i in range(len(views)):
        for j in range(i):
            assert not torch.allclose(views[i], views[j], atol=1e-3)


def test_defaults_change_nothing() -> None:
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(make_view(images, torch.arange(3), RandomViews.Config()), images)


def test_no_rows() -> None:
    assert make_view(torch.rand(0, 3, 8, 8), torch.arange(0), NATURAL).shape == (0, 3, 12, 12)


def test_flip_and_plain_resize() -> None:
    images = torch.arange(32.0).view(1, 1, 4, 8) / 32
    flipped = make_view(images, torch.arange(1), RandomViews.Config(flip=1))
    torch.testing.assert_close(flipped, images.flip(3))
    square = torch.rand(1, 1, 4, 4)
    halved = make_view(square, torch.arange(1), RandomViews.Config(size=2))
    expected = torch.nn.functional.interpolate(square, size=(2, 2), mode="bilinear")
    torch.testing.assert_close(halved, expected)


def test_scale_magnifies_and_shift_moves() -> None:
    dot = torch.zeros(64, 1, 15, 15)
    dot[:, :, 6:9, 6:9] = 1
    keys = view_keys(0, 0, torch.arange(64), 0)
    larger = make_view(dot, keys, RandomViews.Config(scale=(2, 2)))
    assert 3.5 * 9 < larger.sum() / 64 < 4.5 * 9
    moved = make_view(dot, keys, RandomViews.Config(translate=0.2))
    torch.testing.assert_close(moved.sum(dim=(1, 2, 3)), dot.sum(dim=(1, 2, 3)))
    centre = (moved.sum(dim=(1, 2)) @ torch.arange(15.0)) / 9 - 7
    assert centre.abs().max() <= 3 + 1e-4
    assert centre.abs().max() > 2


def test_new_change_leaves_the_others_alone() -> None:
    images, keys = torch.rand(8, 1, 8, 8), torch.arange(8)
    plain = make_view(images, keys, RandomViews.Config(rotation_deg=20))
    erased = make_view(images, keys, RandomViews.Config(rotation_deg=20, erase=1))
    kept = erased != 0
    assert torch.equal(plain[kept], erased[kept])
    assert 0 < (~kept).double().mean() < 0.6


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match=r"hue_deg is 10.0.*3 channels.*have 1: set hue_deg to 0"):
        make_view(torch.rand(1, 1, 8, 8), torch.arange(1), RandomViews.Config(hue_deg=10))
    with pytest.raises(ValidationError, match=r"scale is \[1.2, 0.8\].*from low to high"):
        RandomViews.Config(scale=(1.2, 0.8))
    with pytest.raises(ValidationError, match=r"crop_area is \[0.5, 2.0\].*at most 1"):
        RandomViews.Config(crop_area=(0.5, 2.0))
