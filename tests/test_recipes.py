"""Recipes: own components named in a config by import path, and a new setting of our own."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, global_batches
from own_modules import Dimmed, Doubled, Squares, Uniformity

from dist_contrastive import config as configs
from dist_contrastive import losses, trainer
from dist_contrastive.cli import main
from dist_contrastive.data import ShardStream, index_folder
from dist_contrastive.data.shards.tars import write_samples
from dist_contrastive.data.views import make_view
from dist_contrastive.errors import ConfigError
from dist_contrastive.evaluate import read_splits

# ---------------------------------------------------------------------------- a data source

OWN_SOURCE = "data.train={name: 'own_modules:Squares', count: 96, damaged: [7, 50]}"
OWN = [OWN_SOURCE, "data.test=null", "data.label=null", "data.num_classes=null"]


def batches(sources, *, steps=None, **options) -> list[list[str]]:
    stream = ShardStream(sources, seed=3, global_batch_size=12, lanes=6, **options)
    return [batch["__key__"] for batch in itertools.islice(stream, steps)]


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (3, 2)])
def test_own_source_has_the_order_of_shards(tmp_path: Path, world_size: int, num_workers: int):
    """The same order, resume and ranks as shards of as many samples."""
    own = Squares(Squares.Config(name="own_modules:Squares", count=60))
    for shard in range(2):
        rows = [own.read(n) for n in range(30 * shard, 30 * shard + 30)]
        write_samples(tmp_path / f"{shard}.tar", rows)
    expected = batches(index_folder(tmp_path), epochs=2)
    assert batches(own, epochs=2) == expected
    ranks = [
        batches(own, epochs=2, consumed=24, rank=rank, world_size=world_size,
                num_workers=num_workers)
        for rank in range(world_size)
    ]  # fmt: skip
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == expected[2:]


def test_own_source_beside_shards(tmp_path: Path):
    """Weights, numbers and unreadable samples of an own source among others."""
    own = Squares(Squares.Config(name="own_modules:Squares", count=60, damaged=(5,)))
    rows = [{"__key__": f"other-{n}", "cls": n, "png": own.read(0)["png"]} for n in range(40)]
    write_samples(tmp_path / "0.tar", rows)
    stream = ShardStream(
        [index_folder(tmp_path), own], weights=[1, 2], seed=0, global_batch_size=12, lanes=6,
        max_skipped=1,
    )  # fmt: skip
    keys = [key for batch in itertools.islice(stream, 30) for key in batch["__key__"]]
    assert sum(key.startswith("square") for key in keys) == 240
    assert {(one.sample, one.shard) for one in stream.take_skipped()} == {(45, "squares-0")}
    assert "square-5" not in keys
    plain = ShardStream([index_folder(tmp_path), own], seed=0, global_batch_size=10, lanes=5,
                        epochs=1, max_skipped=1)  # fmt: skip
    assert len([key for batch in plain for key in batch["__key__"]]) == 100


def test_training_from_an_own_source(tmp_path: Path, overrides):
    """Stopped, resumed and checked by its record, unreadable samples listed."""
    options = overrides(tmp_path / "run", *OWN, "data.global_batch_size=32", "train.steps=6")
    config = configs.load(CONFIGS / "digits_encoder.yaml", options)
    assert trainer.train(config, stop_after=2) == trainer.EXIT_REQUEUE
    assert trainer.train(config) == trainer.EXIT_DONE
    keys = [key for batch in global_batches(tmp_path / "run") for key in batch]
    assert len(keys) == 192
    assert not {"square-7", "square-50"} & set(keys)
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) >= 4
    other = [option.replace("count: 96", "count: 97") for option in options]
    with pytest.raises(ConfigError, match=r"was trained on 96 samples in 2 shards .* now 97"):
        trainer.train(configs.load(CONFIGS / "digits_encoder.yaml", other))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{name: 'own_modules:Nothing'}", "own_modules:Nothing is not there"),
        ("{name: 'no_such_module:A'}", "no_such_module:A cannot be imported"),
        ("{name: 'own_modules:Dimmed'}", "own_modules:Dimmed is no data source"),
        ("{name: 'own_modules:Squares', count: 0}", "count=0"),
        ("{name: 'own_modules:Squares', size: 3}", "size is not a known setting"),
        ("{name: tars, shards: a}", r"data\.train\..*name=tars is not known"),
        ("[{name: 'own_modules:Squares', weight: 1}, {shards: a}]", "weight"),
        ("[{shards: a, wait: 1}]", "wait is not a known setting; did you mean weight"),
    ],
)
def test_sources_that_do_not_fit_are_one_sentence(tmp_path, overrides, source, message):
    options = overrides(tmp_path / "run", f"data.train={source}")
    with pytest.raises(ConfigError, match=message) as error:
        configs.load(CONFIGS / "digits_encoder.yaml", options)
    assert "\n" not in str(error.value)
    assert not re.search(r"function|tagged", str(error.value))


# ---------------------------------------------------------------------------- an augmentation


def test_own_views_do_not_depend_on_the_batch():
    config = Dimmed.Config(name="own_modules:Dimmed", darkest=0.25)
    images, keys = torch.rand(5, 1, 4, 4), torch.arange(5)
    whole = make_view(images, keys, config)
    assert torch.equal(whole[2:], make_view(images[2:], keys[2:], config))
    factors = whole.sum((1, 2, 3)) / images.sum((1, 2, 3))
    assert 0.25 <= factors.min() < factors.max() <= 1


def test_training_with_own_views(tmp_path: Path, overrides):
    views = "task.views={name: 'own_modules:Dimmed'}"
    options = overrides(tmp_path / "run", views, "train.steps=2")
    config = configs.load(CONFIGS / "digits_encoder.yaml", options)
    assert isinstance(config.task.views, Dimmed.Config)
    assert trainer.train(config) == trainer.EXIT_DONE
    assert configs.load_run(tmp_path / "run").task.views == config.task.views


def test_views_without_a_name_are_ours(tmp_path: Path, overrides):
    options = overrides(tmp_path / "run", "task.views={flip: 0.5}")
    config = configs.load(CONFIGS / "digits_encoder.yaml", options)
    assert config.task.views.flip == 0.5
    for views, message in (("{flop: 1}", "flop is not a known setting"), ("{flip: 2}", "flip=2")):
        with pytest.raises(ConfigError, match=message):
            configs.load(CONFIGS / "digits_encoder.yaml", [*options, f"task.views={views}"])


# ---------------------------------------------------------------------------- a measure

MEASURES = "{name: 'own_modules:Spread', power: 2}, {name: 'own_modules:Careless'}"


@pytest.fixture(scope="module")
def encoder_run(tmp_path_factory, overrides) -> Path:
    run_dir = tmp_path_factory.mktemp("measured")
    options = overrides(run_dir, "task.encoder.widths=[8, 16]", "train.steps=2")
    config = configs.load(CONFIGS / "digits_encoder.yaml", options)
    assert trainer.train(config) == trainer.EXIT_DONE
    return run_dir


def test_own_measure_is_in_the_table(encoder_run: Path, capsys):
    """A run that was trained without it may be given it later, in its config; one that returns no
    lines is named, and what came before it stands."""
    measures = f"evaluate={{measures: [{MEASURES}]}}"
    config = configs.load(encoder_run / "config.yaml", [measures])
    assert not configs.differences(configs.load_run(encoder_run), config)
    configs.save(config, encoder_run)
    assert main(["eval", str(encoder_run)]) == 64
    told = capsys.readouterr()
    assert "own_modules:Careless returned 0.5" in told.err
    assert "kNN accuracy, k = 5" in told.out
    *ours, line = json.loads((encoder_run / "eval.json").read_text())
    assert len(ours) == 3
    images = read_splits(config).test.images.flatten(1)
    expected = (images - images.mean(0)).square().sum(1).mean().item()
    assert line["name"] == "spread"
    assert line["value"] > 0
    assert line["beside"] == {"raw pixels": pytest.approx(expected, rel=1e-5)}
    assert re.search(r"spread +\d+\.\d{4} +raw pixels \d", told.out)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ("{name: 'own_modules:Nothing'}", "own_modules:Nothing is not there"),
        ("{name: 'own_modules:Squares'}", "own_modules:Squares is no measure"),
        ("{name: 'own_modules:Spread', power: 0}", "power=0"),
        ("{name: 'own_modules:Spread', pover: 1}", "pover is not a known setting"),
        ("{name: spread}", "name=spread is not known"),
    ],
)
def test_measures_that_do_not_fit_are_one_sentence(tmp_path, overrides, measure, message):
    options = overrides(tmp_path / "run", f"evaluate={{measures: [{measure}]}}")
    with pytest.raises(ConfigError, match=message) as error:
        configs.load(CONFIGS / "digits_encoder.yaml", options)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------- a new setting

# One file: the field with its default, limit and help in the Config of its owner, and its use.
NEW_SETTING = {
    "        erase_side: tuple": '''        invert: bool = False
        """Negative of the image."""
        erase_side: tuple''',
    "        return images.clamp(0, 1)": """        if settings.invert:
            images = 1 - images
        return images.clamp(0, 1)""",
}
USE = """
import sys, torch
from dist_contrastive import config as configs
from dist_contrastive.data.views import make_view
config = configs.load(sys.argv[1], ["task.views.invert=true"])
images = torch.rand(2, 1, 8, 8)
plain = config.task.views.model_copy(update={"invert": False})
both = [make_view(images, torch.arange(2), views) for views in (config.task.views, plain)]
assert torch.equal(both[0], 1 - both[1])
"""


def test_a_new_setting_is_two_places_of_one_file(tmp_path: Path):
    """A copy of the package with the recipe applied reads, checks and uses the setting."""
    package = Path(configs.__file__).parents[1]
    shutil.copytree(package, tmp_path / "dist_contrastive")
    file = tmp_path / "dist_contrastive" / "data" / "views.py"
    text = file.read_text()
    for old, new in NEW_SETTING.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    file.write_text(text)
    argv = [sys.executable, "-c", USE, str(CONFIGS / "digits_encoder.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------- a loss

LOSS = "task.loss={name: 'own_modules:Uniformity', scale: 3}"


def test_own_loss_trains(tmp_path: Path, overrides):
    options = overrides(tmp_path / "run", "task.encoder.widths=[8, 16]", "train.steps=2", LOSS)
    config = configs.load(CONFIGS / "digits_encoder.yaml", options)
    assert losses.build_loss(config.task.loss).settings.scale == 3
    assert trainer.train(config) == trainer.EXIT_DONE
    assert configs.load_run(tmp_path / "run").task.loss == config.task.loss


def test_own_loss_is_its_formula():
    x = torch.randn(6, 4, dtype=torch.float64)
    z = torch.nn.functional.normalize(x)
    expected = (-2 * torch.cdist(z, z).square()).exp().sum(1).log().mean()
    for impl in ("dense", "chunked"):
        torch.testing.assert_close(Uniformity(impl=impl, chunk_size=4)(x), expected)


def test_own_loss_may_inherit_one_of_this_package(tmp_path: Path, overrides):
    """Its Config has the name of that one, which the import path takes the place of."""
    loss = "task.loss={name: 'own_modules:Doubled', temperature: 0.2, factor: 3}"
    config = configs.load(CONFIGS / "digits_encoder.yaml", overrides(tmp_path / "run", loss))
    a, b = torch.randn(2, 5, 4)
    expected = 3 * losses.InfoNCE(0.2)(a, b)
    torch.testing.assert_close(losses.build_loss(config.task.loss)(a, b), expected)
    torch.testing.assert_close(Doubled(temperature=0.2, factor=3)(a, b), expected)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("{name: 'own_modules:Nothing'}", "own_modules:Nothing is not there"),
        ("{name: 'own_modules:Squares'}", "own_modules:Squares is no loss"),
        ("{name: 'no_such_module:Loss'}", "no_such_module:Loss cannot be imported"),
        ("{name: 'own_modules:Uniformity', scale: 0}", "scale=0"),
        ("{name: 'own_modules:Uniformity', skale: 1}", "did you mean scale"),
        ("{name: 'own_modules:Uniformity', keys_from: local}", "keys_from=local"),
        ("{name: 'dist_contrastive.losses:SupCon'}", "takes='labels' must be 'views' or 'feat"),
    ],
)
def test_losses_that_do_not_fit_are_one_sentence(tmp_path, overrides, loss, message):
    options = overrides(tmp_path / "run", f"task.loss={loss}")
    with pytest.raises(ConfigError, match=message) as error:
        configs.load(CONFIGS / "digits_encoder.yaml", options)
    assert "\n" not in str(error.value)
