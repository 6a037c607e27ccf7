"""`dist-contrastive sample`: files, and the sentences that a mistake is answered with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, num_colours
from PIL import Image
from torch import Tensor

from dist_contrastive import checkpoint, report, trainer
from dist_contrastive import config as configs
from dist_contrastive.cli import main
from dist_contrastive.data import keyed_random, load_index
from dist_contrastive.errors import ConfigError
from dist_contrastive.models import build_generator
from dist_contrastive.tasks.drift import NOISE_STREAM
from dist_contrastive.tasks.feature_spaces import load_encoder

SHORT = ("train.steps=3", "train.log_every=10")
PIXELS = "task.features=[{name: pixels}]"
GUIDED = (
    *(PIXELS, "task.ema=0.9", "task.generator={name: conv, noise_dim: 4, width: 8}"),
    *("task.bank={capacity: 8, positives: 4}", "task.guidance={unconditional: 4}"),
)
RUNS = {  # config, data, overrides
    "guided": ("digits_generator", "digits", GUIDED),
    "plain": ("digits_generator", "digits", (PIXELS, "task.ema=null")),
    "points": ("eight_gaussians", "eight_gaussians", ()),
    "points of classes": (
        *("swiss_roll", "swiss_roll"),
        ("data.label=json.label", "data.num_classes=8", "task.ema=null"),
    ),
    "encoder": ("digits_encoder", "digits", ("task.encoder.widths=[8]",)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, overrides) -> dict[str, Path]:
    """Short runs of each kind."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, (config, data, more) in RUNS.items():
        found[name] = folder / name.replace(" ", "_")
        options = overrides(found[name], *SHORT, *more, data_name=data)
        assert trainer.train(configs.load(CONFIGS / f"{config}.yaml", options)) == 0
    return found


def made_by(
    run: Path,
    prefix: str,
    shape: tuple[int, ...],
    classes: list[int] | None,
    seed: int,
    strength=None,
) -> Tensor:
    """What the generator with the checkpoint's weights of a name makes of the noise of a seed."""
    config = configs.load_run(run)
    classed, guided = config.data.num_classes, strength is not None
    generator = build_generator(config.task.generator, shape, classed, guided=guided)
    weights = checkpoint.newest(run / "checkpoints").weights()
    generator.load_state_dict(
        {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}
    )
    count = 16 if classes is None else len(classes)
    keys = keyed_random.combine(seed, NOISE_STREAM, torch.arange(count))
    noise = keyed_random.normal(keys, generator.noise_dim)
    labels = None if classes is None else torch.tensor(classes)
    with torch.no_grad():
        return generator(
            noise, labels, None if strength is None else torch.full((count,), strength)
        )


def images_in(folder: Path) -> Tensor:
    """Of sample-00000-class-C.png and so on, as bytes [n, 1, 8, 8]."""
    paths = sorted(folder.glob("sample-*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(path)))[None] for path in paths])


def test_samples_are_files(runs, tmp_path, capsys):
    """Classes in turn; each image as the averaged generator made it, to the byte."""
    command = ["sample", str(runs["guided"]), "--out", str(tmp_path), "--count", "12"]
    assert main([*command, "--seed", "3"]) == 0
    assert f"12 samples in {tmp_path}, all in {tmp_path}/grid.png" in capsys.readouterr().out
    classes = [*range(10), 0, 1]
    names = [f"sample-{n:05d}-class-{c}.png" for n, c in enumerate(classes)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", *names]
    found = made_by(runs["guided"], "average.module.", (1, 8, 8), classes, 3, strength=1.0)
    assert torch.equal(images_in(tmp_path), (found * 255).round().byte())
    own = made_by(runs["guided"], "generator.", (1, 8, 8), classes, 3, strength=1.0)
    assert not torch.equal((own * 255).round(), (found * 255).round())
    assert num_colours(tmp_path / "grid.png") > 100


def test_guidance_and_classes_of_choice(runs, tmp_path):
    command = ["sample", str(runs["guided"]), "--classes", "7", "2", "--count", "5"]
    assert main([*command, "--out", str(tmp_path / "a"), "--guidance", "3"]) == 0
    expected = made_by(runs["guided"], "average.module.", (1, 8, 8), [7, 2, 7, 2, 7], 0, 3.0)
    assert torch.equal(images_in(tmp_path / "a"), (expected * 255).round().byte())
    assert (tmp_path / "a" / "sample-00004-class-7.png").exists()
    assert main([*command, "--out", str(tmp_path / "b")]) == 0
    assert not torch.equal(images_in(tmp_path / "a"), images_in(tmp_path / "b"))


def test_same_seed_same_files(runs, tmp_path):
    """By default in the run's own folder; fewer are the first of more."""
    assert main(["sample", str(runs["plain"])]) == 0
    folder = runs["plain"] / "samples"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(files) == 81
    for name, options in (
        ("again", []),
        ("fewer", ["--count", "30"]),
        ("other", ["--seed", "1"]),
    ):
        out = tmp_path / name
        assert main(["sample", str(runs["plain"]), "--out", str(out), *options]) == 0
        found = {path.name: path.read_bytes() for path in out.glob("sample-*")}
        same = [files[key] == found[key] for key in found]
        assert len(same) == (30 if name == "fewer" else 80)
        assert not any(same) if name == "other" else all(same)
    classes = [*range(10)] * 8
    expected = made_by(runs["plain"], "generator.", (1, 8, 8), classes, 0)
    assert torch.equal(images_in(folder), (expected * 255).round().byte())


def test_samples_do_not_depend_on_the_chunk(runs):
    config = configs.load_run(runs["plain"])
    task = config.build_task(config.fields.read(load_index(config.data.train), [0])).eval()
    labels = torch.arange(20) % 10
    whole = task.generate(labels, 20, seed=5)
    torch.testing.assert_close(task.generate(labels, 20, seed=5, chunk=7), whole)


@pytest.mark.parametrize("name", ["points", "points of classes"])
def test_points_are_an_array_and_a_picture(name, runs, tmp_path):
    assert main(["sample", str(runs[name]), "--out", str(tmp_path), "--count", "16"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "samples.npy"]
    found = torch.from_numpy(np.load(tmp_path / "samples.npy"))
    assert found.dtype == torch.float32
    classes = None if name == "points" else [*range(8), *range(8)]
    prefix = "average.module." if name == "points" else "generator."
    assert torch.equal(found, made_by(runs[name], prefix, (2,), classes, 0))
    assert num_colours(tmp_path / "grid.png") > 50


@pytest.mark.parametrize(
    ("run", "options", "words"),
    [
        ("plain", ["--guidance", "2"], "guidance=2, but this generator was trained without"),
        ("plain", ["--count", "1000001"], "count=1000001 and guidance=1 must both be 1 or more"),
        ("plain", ["--count", "0"], "count=0 and guidance=1 must both be 1 or more"),
        ("guided", ["--guidance", "0.5"], "guidance=0.5 must both be 1 or more"),
        ("guided", ["--guidance", "nan"], "guidance=nan must both be 1 or more"),
        (
            "guided",
            ["--guidance", "inf"],
            "guidance=inf must both be 1 or more, count up to 1000000",
        ),
        ("guided", ["--classes", "3", "10", "-1"], "classes [10, -1] are not among 0 ... 9"),
        ("points", ["--classes", "0"], "this generator was trained without classes"),
        ("encoder", [], "is a run of task 'two_view', which trains no generator"),
    ],
)
def test_what_cannot_be_sampled(run, options, words, runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["sample", str(runs[run]), "--out", str(out), *options]) == 64
    message = capsys.readouterr().err
    assert words in message
    assert len(message.strip().splitlines()) == 1
    assert not out.exists()


def test_wrong_folders(runs, tmp_path, capsys):
    assert main(["sample", str(tmp_path)]) == 64
    assert f"{tmp_path} is no run directory" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text((runs["plain"] / "config.yaml").read_text())
    assert main(["sample", str(tmp_path)]) == 64
    assert f"{tmp_path} has no checkpoint yet; train it first" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["sample", str(runs["plain"]), "--out", str(tmp_path / "file")]) == 64
    assert f"samples cannot be written to {tmp_path}/file (File exists)" in capsys.readouterr().err


def test_an_encoder_of_other_images_is_refused(runs):
    with pytest.raises(ConfigError) as caught:
        load_encoder(runs["encoder"], (3, 8, 8))
    assert f"the encoder of {runs['encoder']} does not fit images of shape (3, 8, 8)" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("shape", "expected"), [((2, 1, 8, 8), True), ((2, 3, 8, 8), True), ((2, 2, 8, 8), False)]
)
def test_what_is_an_image(shape, expected):
    assert report.are_images(torch.zeros(shape)) == expected
