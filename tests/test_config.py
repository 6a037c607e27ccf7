"""The config: precedence, strictness, and the sentences a mistake is answered with."""

from pathlib import Path

import pytest
import yaml

from dist_contrastive import config as configs
from dist_contrastive.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
ENCODER = CONFIGS / "digits_encoder.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_says_how_to_run_it(path):
    configs.load(path)
    assert path.read_text().startswith(f"# python -m launch.local configs/{path.name}")


def test_defaults_then_file_then_overrides():
    assert configs.load(ENCODER).optim.lr == 2e-3
    assert configs.load(ENCODER).optim.eps == 1e-8  # default
    changed = configs.load(
        ENCODER, ["optim.lr=1e-4", "optim.clip_norm=2", "task.loss.name=infonce"]
    )
    assert changed.optim.lr == 1e-4
    assert changed.optim.clip_norm == 2
    assert changed.task.loss.name == "infonce"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", "optim.lrr is not a known setting; did you mean lr?"),
        ("task.views.rotate_deg=1", "task.views.rotate_deg is not a known setting; did you mean"),
        ("task.encoder.width=1", "task.encoder.width is not a known setting; did you mean widths?"),
        ("task.loss.name=infonse", "task.loss.name=infonse is not known; did you mean infonce?"),
        (
            "task.name=simclr",
            "task.name=simclr is not known; (known: two_view, labelled, moco, paired, ",
        ),
        ("task.loss={temperature: 1}", "task.loss.name is missing; it says which kind of loss"),
        ("optim.lr=fast", "optim.lr=fast: should be a valid number"),
        ("optim.lr=-1", "optim.lr=-1: should be greater than 0"),
        ("optim.betas=[0.9,1.5]", "optim.betas.1=1.5: should be less than 1; set less than 1"),
        ("optim.lr=.inf", "optim.lr=inf: should be a finite number"),
        ("train.steps=0", "train.steps=0: should be greater than 0"),
        (
            "data.global_batch_size=1",
            "data.global_batch_size=1: should be greater than or equal to 2; set 2 or more",
        ),
        ("data.label=null", "data: num_classes without label; set label to the field"),
        ("seed=4294967296", "seed=4294967296: must be below 2**31"),
        ("train.steps", "override 'train.steps' is not key=value"),
        ("seed.a=1", "override 'seed.a=1': seed is a value"),
        ("seed=[1", "override 'seed=[1': the value is not YAML"),
    ],
)
def test_mistakes_are_answered_with_one_sentence(override, words):
    with pytest.raises(ConfigError) as caught:
        configs.load(ENCODER, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["task.groups=3"],
            "task.groups=3 does not divide data.global_batch_size=512 into equal groups of 2 or "
            "more; set data.global_batch_size to 510 or 513",
        ),
        (["task.groups=512"], "groups of 2 or more; set data.global_batch_size to 1024"),
        (["task.guidance={}"], "all classes from the bank; set task.bank, data.label and data.num"),
        (
            ["task.bank={capacity: 4, positives: 5}"],
            "task.bank: positives=5 of a bank of capacity=4; set positives to at most 4",
        ),
        (
            ["task.guidance={strengths: [4, 1]}"],
            "task.guidance: strengths=(4.0, 1.0); give the smaller one first",
        ),
        (
            ["task.guidance={strengths: [0.5, 2]}"],
            "task.guidance.strengths.0=0.5: should be greater than or equal to 1; set 1.0 or more",
        ),
        (["task.guidance={strengths: [1, .inf]}"], "strengths.1=inf: should be a finite number"),
        (["task.ema=1"], "task.ema=1: should be less than 1"),
        (["task.features=[]"], "task.features=[]: the force needs a space to act in; name one, as"),
        (["data.num_classes=null"], "the task drift generates by class; set data.num_classes"),
        (
            [
                *("data.num_classes=null", "data.label=null", "task.guidance={}"),
                "task.bank={capacity: 4, positives: 4}",
            ],
            "task.guidance pushes with samples of all classes from the bank; set",
        ),
        (["data.balance={classes: 2, samples_per_class: 2}"], "the task does not train with label"),
    ],
)
def test_mistakes_with_generators(overrides, words):
    with pytest.raises(ConfigError) as caught:
        configs.load(CONFIGS / "digits_generator.yaml", overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_settings_and_files(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: x\n")
    with pytest.raises(ConfigError, match="data is missing; set it in the file or as data=VALUE"):
        configs.load(path)
    path.write_text("- a list\n")
    with pytest.raises(ConfigError, match="holds no settings"):
        configs.load(path)
    path.write_text("a: [1\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        configs.load(path)
    with pytest.raises(ConfigError, match=r"cannot read the config .*No such file"):
        configs.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is no run directory"):
        configs.load_run(tmp_path)


def test_resolved_config_round_trips(tmp_path):
    config = configs.load(CONFIGS / "digits_generator.yaml", [f"run_dir={tmp_path}"])
    configs.save(config, tmp_path)
    assert configs.load_run(tmp_path) == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["optim"]["name"] == "adamw"


def test_differences_leave_out_what_may_change():
    old = configs.load(ENCODER)
    assert configs.differences(old, configs.load(ENCODER, ["train.log_every=1"])) == []
    new = configs.load(ENCODER, ["optim.lr=1e-4", "task.head.out=32"])
    changed = configs.differences(old, new)
    assert changed == ["task.head.out: 64 -> 32", "optim.lr: 0.002 -> 0.0001"]
