"""Images of any size and colour made alike, against Pillow; and training on them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS
from PIL import Image

from dist_contrastive.cli import main
from dist_contrastive.data import Fields, index_folder
from dist_contrastive.data.fields import fit_image
from dist_contrastive.data.shards.encoding import encode_field
from dist_contrastive.data.shards.tars import write_samples


def photo(height: int, width: int, channels: int = 3) -> torch.Tensor:
    """A smooth picture with noise."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 2, width), indexing="ij")
    parts = [(torch.sin(x * (c + 1) + y) * 100 + 120) for c in range(channels)]
    noise = torch.randn(channels, height, width, generator=torch.Generator().manual_seed(0))
    return (torch.stack(parts) + 5 * noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (64, 64), (16, 40), (33, 32), (32, 200)])
def test_scaled_and_cut_as_pillow_does(shape: tuple[int, int]):
    image, size = photo(*shape), 32
    ours = fit_image(image, size, None)
    assert ours.shape == (3, size, size)
    assert ours.dtype == torch.uint8
    sides = [max(size, round(side * size / min(shape))) for side in shape]
    whole = Image.fromarray(image.permute(1, 2, 0).numpy())
    scaled = whole.resize((sides[1], sides[0]), Image.Resampling.BILINEAR)
    left, top = (sides[1] - size) // 2, (sides[0] - size) // 2
    theirs = np.array(scaled.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
    assert np.abs(ours.numpy().astype(int) - theirs).max() <= 1


def test_long_strips_take_no_memory():
    """2.8 GB, if they were scaled whole."""
    ours = fit_image(photo(1, 30_000), 224, None)
    assert ours.shape == (3, 224, 224)


def test_colours_as_pillow_makes_them():
    colour, gray = photo(20, 20), photo(20, 20, 1)
    theirs = np.array(Image.fromarray(colour.permute(1, 2, 0).numpy()).convert("L"))
    assert np.abs(fit_image(colour, None, 1)[0].numpy().astype(int) - theirs).max() <= 1
    assert torch.equal(fit_image(gray, None, 3), gray.expand(3, -1, -1))
    assert fit_image(colour, 20, 3) is fit_image(colour, None, None) is colour


def write_photos(folder: Path, count: int) -> None:
    """JPEGs of many sizes, every third one gray."""
    folder.mkdir()
    samples = []
    for n in range(count):
        image = photo(20 + n % 13, 24 + n % 7, 1 if n % 3 == 0 else 3)
        pixels = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        path = folder / "one.jpg"
        Image.fromarray(pixels).save(path)
        samples.append(
            {"__key__": f"s{n}", "jpg": path.read_bytes(), "png": encode_field("png", image)}
        )
        path.unlink()
    write_samples(folder / "0.tar", samples)
    index_folder(folder)


def test_fields_read_and_stream_alike(tmp_path: Path):
    write_photos(tmp_path / "photos", 20)
    index = index_folder(tmp_path / "photos")
    fields = Fields("jpg", pair="png", image_size=16, image_channels=3)
    read = fields.read(index, range(20))
    assert read.images.shape == read.pair.shape == (20, 3, 16, 16)
    assert 0 <= read.images.min() < read.images.max() <= 1


def test_training_on_images_of_many_sizes(tmp_path: Path, overrides, capsys):
    write_photos(tmp_path / "photos", 64)
    options = overrides(tmp_path / "run", f"data.train={tmp_path}/photos", "data.image=jpg")
    options += ["data.global_batch_size=32", "train.steps=2", "data.num_workers=1"]
    options += ["data.label=null", "data.num_classes=null"]
    config = str(CONFIGS / "digits_encoder.yaml")
    assert main(["train", config, *options]) == 64
    assert "does not hold images of one size: set data.image_size" in capsys.readouterr().err
    assert main(["train", config, *options, "data.image_size=12", "data.image_channels=1"]) == 0
