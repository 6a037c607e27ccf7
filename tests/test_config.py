"""The config: precedence, strictness, and the sentences a mistake is answered with."""

import re
from pathlib import Path

import pytest
import yaml

from dist_contrastive import config as configs
from dist_contrastive.config.reference import reference
from dist_contrastive.errors import ConfigError
from dist_contrastive.sentences import ALSO_CALLED

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
            "task.name=simclr is not known; did you mean two_view? (known: two_view, labelled, ",
        ),
        ("task.loss={temperature: 1}", "task.loss.name is missing; it says which kind of loss"),
        ("optim.lr=fast", "optim.lr=fast: should be a number; set more than 0"),
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


# ------------------------------------------------------------------ names, numbers, true and false


@pytest.mark.parametrize(
    "name",
    [
        *("runs/exp #2", "2026-11-28", "2026-13-45", "2026-11-28 10:00:00", "4711", "007", "1e3"),
        *("1.10", "12:30:00", "1_000", "0x1f", "0x_", "true", "off", "runs/a,b", "a: b", "- x"),
        *("100%", "%x", "*x", "&x y", "!x", "@x", "`x`", "|", ">x", "=", "<<", "[x]", "{x}", "?"),
        *("Experiment 1 (größer)", "it's", 'a "b"', "a\\b", "runs/{a"),
    ],
)
def test_a_folder_may_have_any_name(name, tmp_path):
    """On the command line all characters stand for themselves, but a value in quotes or brackets
    is YAML."""
    config = configs.load(ENCODER, [f"run_dir={name}"])
    assert config.run_dir == Path(name)
    configs.save(config, tmp_path)
    assert configs.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", ["2026-11-28", "4711", "007", "1e3", "1.10", "1_000", "off"])
def test_a_name_in_a_file_is_the_text_it_was(name, tmp_path):
    text = yaml.safe_dump({**yaml.safe_load(ENCODER.read_text()), "run_dir": "RUN"})
    path = tmp_path / "c.yaml"
    path.write_text(text.replace("RUN", name).replace("label: json.label", f"label: {name}"))
    config = configs.load(path)
    assert (config.run_dir, config.data.label) == (Path(name), name)
    sources = configs.load(path, [f"data.train=[{{shards: {name}}}, {{shards: b}}]"]).data.sources
    assert [source.shards for source in sources] == [name, "b"]
    assert configs.load(path, ["run_dir=other"]).run_dir == Path("other")


@pytest.mark.parametrize(
    "override",
    [
        *("run_dir=", "run_dir=null", "run_dir=''", "run_dir=a\nb", f"run_dir={'x' * 300}"),
        *("run_dir=s3://bucket/run", "run_dir=file:///runs/x"),
    ],
)
def test_what_is_no_name(override):
    with pytest.raises(ConfigError, match=r"run_dir") as caught:
        configs.load(ENCODER, [override])
    assert "\n" not in str(caught.value)


def test_the_home_folder():
    paths = ["run_dir=~/runs/x", "data.train=~/x", "data.test=[{shards: ~/y}]", "init_from=~/z"]
    config = configs.load(ENCODER, paths)
    assert config.run_dir == Path.home() / "runs/x"
    assert config.data.train == str(Path.home() / "x")
    assert config.data.test[0].shards == str(Path.home() / "y")
    assert config.init_from == Path.home() / "z"


def test_numbers_as_they_are_written():
    options = ["train.steps=1e3", "optim.lr=3E-4", "optim.eps=1.5e-8", "seed=012"]
    config = configs.load(ENCODER, options)
    assert (config.train.steps, config.seed) == (1000, 12)
    with pytest.raises(ConfigError, match=r"train\.steps=1:30: should be a whole number"):
        configs.load(ENCODER, ["train.steps=1:30"])
    assert (config.optim.lr, config.optim.eps) == (3e-4, 1.5e-8)
    with pytest.raises(ConfigError, match=r"optim\.lr=0\.1 # fast: should be a number"):
        configs.load(ENCODER, ["optim.lr=0.1 # fast"])


@pytest.mark.parametrize(
    "key",
    [
        *("optim.lr", "train.steps", "seed", "task.views.flip", "task.loss.temperature"),
        *("data.num_workers", "backend.zero_stage", "train.keep_every", "optim.clip_norm"),
        *("optim.betas", "task.encoder.widths", "train.profile_steps"),
    ],
)
@pytest.mark.parametrize("value", ["true", "no"])
def test_true_and_false_are_no_numbers(key, value):
    lists = ("optim.betas", "task.encoder.widths", "train.profile_steps")
    text = f"[{value}, {value}]" if key in lists else value
    with pytest.raises(ConfigError) as caught:
        configs.load(ENCODER, [f"{key}={text}"])
    word = {"true": "true", "no": "false"}[value]
    assert f"={word}: should be " in str(caught.value) or "zero_stage" in key


@pytest.mark.parametrize("name", ["digits_encoder", "digits_generator", "digits_hybrid"])
def test_no_words_of_the_validator(name):
    """Whatever a setting is given: its key, and what it should be."""
    path = CONFIGS / f"{name}.yaml"
    tree = configs.load(path).model_dump(mode="json")
    keys = [".".join(key) for key in _keys(tree)]
    told = []
    for key in keys:
        for value in ("5", "-1", "true", "some text", "null", "[]", "[x]", "[[1]]", "{a: 1}", "{}"):
            try:
                configs.load(path, [f"{key}={value}"])
            except ConfigError as error:
                told.append(str(error))
                assert key.split(".")[0] in told[-1]
    assert len(told) > 3 * len(keys)
    words = ("valid ", "instance", "validation", "Input", "Tuple", "List", "ependent", "parse")
    assert [text for text in told if any(word in text for word in words) or "\n" in text] == []


def _keys(tree, prefix=()):
    for name, value in tree.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from _keys(value, (*prefix, name))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task.views.blur_sigma=0.5", "should be a list of 2 numbers, as [0.5, 0.5]"),
        ("task.encoder.widths=64", "should be a list of whole numbers, as [64]"),
        ("task.encoder.widths=[]", "should have 1 or more of them"),
        ("train.trackers=tensorboard", "should be a list of any of tensorboard, "),
        (
            "train.keep_best=loss",
            "should be a group of settings (metric, mode) or null, as {metric",
        ),
        ("train.profile_steps=[3]", "should be a list of 2 whole numbers or null"),
        ("optim.betas=0.9,0.95", "should be a list of 2 numbers or null, as [0.9, 0.95]"),
        ("task.encoder.widths=(8, 16)", "should be a list of whole numbers, as [8, 16]"),
        ("train.micro_batch_size=None", "=None: should be a whole number or null; set more"),
        ("train.profile_steps=[1, 2, 3]", "should be a list of 2 whole numbers or null"),
        ("task.loss=ntxent", "should be a group of settings, as task.loss={name: ntxent}"),
        ("task.loss=null", "should be a group of settings, as task.loss={name: NAME}"),
        ("train.self_check=maybe", "train.self_check=maybe: should be true or false"),
        ("train.steps=1.5", "train.steps=1.5: should be a whole number; set more than 0"),
    ],
)
def test_what_a_setting_should_be(override, words):
    with pytest.raises(ConfigError) as caught:
        configs.load(ENCODER, [override])
    assert words in str(caught.value)


def test_a_list_is_not_too_short_for_a_wrong_item():
    with pytest.raises(ConfigError) as caught:
        configs.load(ENCODER, ["task.encoder.widths=[8.5]"])
    assert str(caught.value).endswith("task.encoder.widths.0=8.5: should be a whole number")


@pytest.mark.parametrize(
    ("override", "ours"),
    [
        ("learning_rate=1", "optim.lr"),
        ("lr=1", "optim.lr"),
        ("optim.learning-rate=1", "lr"),
        ("batch_size=64", "data.global_batch_size"),
        ("data.batch_size=64", "global_batch_size"),
        ("data.batch=64", "global_batch_size"),
        ("epochs=9", "train.steps"),
        ("train.max_steps=9", "steps"),
        ("num_workers=2", "data.num_workers"),
        ("temperature=0.1", "task.loss.temperature"),
        ("task.loss.tau=0.1", "temperature"),
        ("fp16=true", "backend.precision"),
        ("output_dir=x", "run_dir"),
        ("task.loss.name=simclr", "ntxent"),
        ("task.loss.name=NT-Xent", "ntxent"),
        ("task.loss.name=clip", "infonce (with symmetric: true)"),
        ("task.loss.name=info_nce", "infonce"),
        ("task.name=simclr", "two_view"),
        ("task.name=clip", "paired"),
        ("task.name=SupCon", "labelled"),
        ("task.encoder.name=resnet50", "residual"),
        ("task.encoder.name=vit", "transformers"),
        ("task.encoder.name=ViT-B-16", "transformers"),
        ("task.encoder.name=resnet_34", "residual"),
        ("task.name=moco_v3", "moco"),
        ("data.path=x", "data.train"),
        ("dataset=x", "data.train"),
        ("data.val=x", "data.test"),
        ("data.caption=txt", "data.pair"),
        ("train.iters=9", "steps"),
        ("optim.min_lr=0", "final_lr_ratio"),
        ("wandb=true", "train.trackers"),
        ("task.head.dim=8", "out"),
        ("augmentation=x", "task.views"),
        ("name=x", "task.name"),
    ],
)
def test_common_names_lead_to_ours(override, ours):
    with pytest.raises(ConfigError, match=re.escape(f"did you mean {ours}?")):
        configs.load(ENCODER, [override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gpus=2", "ranks are started by python -m launch.local CONFIG --ranks N"),
        ("train.resume=true", "the same command goes on"),
        ("optim.scheduler=cosine", "falls by a cosine"),
        ("train.eval_every=5", "dist-contrastive eval RUN"),
    ],
)
def test_what_is_no_setting_here(override, words):
    with pytest.raises(ConfigError, match=words) as caught:
        configs.load(ENCODER, [override])
    assert "did you mean" not in str(caught.value)


def test_keys_with_dots_in_a_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(ENCODER.read_text() + "task.loss.temperature: 0.1\n")
    with pytest.raises(ConfigError, match=re.escape("write task: {loss: {temperature: VALUE}}")):
        configs.load(path)


def test_a_setting_of_another_component():
    words = "task.loss.symmetric is not a known setting here, but of task.loss.name=infonce (known"
    with pytest.raises(ConfigError, match=re.escape(words)):
        configs.load(ENCODER, ["task.loss.symmetric=true"])


def test_every_hint_is_a_name_of_ours():
    rows = reference()
    known = {part for row in rows for part in (row.key.split(".")[-1], *row.when.split("="))}
    known = {name for names in known for name in names.split("|")} | {row.key for row in rows}
    hints = {hint.split()[0] for hints in ALSO_CALLED.values() for hint in hints}
    assert hints <= known
