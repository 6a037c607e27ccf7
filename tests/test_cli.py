"""Commands as a newcomer types them, also wrongly: exit codes and one sentence each."""

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import typer
from conftest import CONFIGS, command, environment, run

import dist_contrastive
from dist_contrastive import cli
from dist_contrastive.cli import main
from dist_contrastive.cli.exit_codes import reporting_errors
from dist_contrastive.config import RunConfig
from dist_contrastive.errors import ConfigError
from dist_contrastive.settings import settings_in
from launch import local
from launch.slurm import __main__ as launch_slurm

ENCODER = CONFIGS / "digits_encoder.yaml"
README = Path(__file__).parents[1] / "README.md"


def starts(arguments: list[str], capsys: pytest.CaptureFixture[str], ranks: int) -> tuple[int, str]:
    """Exit code and stderr of `train` (0 ranks) or of `launch.local`, neither getting far."""
    argv = [*arguments, "--ranks", str(ranks)]
    code = local.main(argv) if ranks else main(["train", *arguments])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("ranks", [0, 4])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train={tmp}/nowhere", "{tmp}/nowhere"),
        ("data.train={tmp}", "{tmp} holds 0 files that end in .tar"),
        ("data.global_batch_size=100", "global_batch_size=100"),
        ("data.global_batch_size=1", "greater than or equal to 2"),
        ("data.global_batch_size=4096", "1437"),
        ("data.lanes=7 data.num_workers=3", "lanes=7"),
        ("task.loss.name=magic", "task.loss.name=magic is not known"),
        ("data.imaeg=png", "did you mean image?"),
    ],
)
def test_bad_settings_end_with_64(ranks, override, words, tmp_path, overrides, capsys):
    override, words = (text.replace("{tmp}", str(tmp_path)) for text in (override, words))
    arguments = [str(ENCODER), *overrides(tmp_path / "run"), override]
    code, message = starts(arguments, capsys, ranks)
    assert code == 64
    assert words in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        (["--lr", "3"], "optim.lr=VALUE"),
        (["--optim.lr=3"], "optim.lr=VALUE"),
        (["--batch-size", "64"], "data.global_batch_size=VALUE"),
        (["--epochs", "3"], "train.steps=VALUE"),
        (["--nothing-like-it"], "KEY=VALUE"),
        (["--gpus", "2"], "--ranks N"),
        (["--resume"], "the same command"),
    ],
)
@pytest.mark.parametrize("ranks", [0, 2])
def test_flags_that_are_settings(flags, setting, ranks, capsys):
    code, message = starts([str(ENCODER), *flags], capsys, ranks)
    assert code == 2
    assert setting in message
    assert ("a setting is written" in message) == ("VALUE" in setting)
    assert len(message.strip().splitlines()) == 1


def test_flags_of_sbatch(capsys):
    assert launch_slurm.main(["submit", str(ENCODER), "--dry-run", "--gres", "gpu:8"]) == 2
    assert "--profile" in capsys.readouterr().err


def test_index_that_does_not_match(tmp_path, digits, overrides, capsys):
    folder = tmp_path / "train"
    shutil.copytree(digits / "train", folder)
    shard = sorted(folder.glob("*.tar"))[0]
    with shard.open("ab") as file:
        file.write(b"\0" * 512)
    arguments = [str(ENCODER), *overrides(tmp_path / "run"), f"data.train={folder}"]
    code, message = starts(arguments, capsys, 2)
    assert code == 64
    assert shard.name in message
    assert "dist-contrastive shards index" in message
    assert main(["shards", "index", str(folder)]) == 0  # the fix that it names
    assert main(["train", *arguments, "train.steps=1"]) == 0


def test_shard_replaced_by_another_of_its_size(tmp_path, digits, overrides, capsys):
    folder = tmp_path / "train"
    shutil.copytree(digits / "train", folder)
    shards = sorted(folder.glob("*.tar"))
    assert shards[1].stat().st_size == shards[3].stat().st_size
    shutil.copy(shards[3], shards[1])
    arguments = [str(ENCODER), *overrides(tmp_path / "run"), f"data.train={folder}"]
    code, message = starts(arguments, capsys, 2)
    assert code == 64
    assert f"{shards[1].name} is damaged or was changed" in message


@pytest.mark.parametrize(("label", "words"), [("json", "has label {"), ("json.index", "0..9")])
def test_labels_that_are_no_classes(label, words, tmp_path, overrides, capsys):
    arguments = [str(ENCODER), *overrides(tmp_path / "run"), f"data.label={label}"]
    code, message = starts(arguments, capsys, 0)
    assert code == 64
    assert words in message


def test_missing_index_names_the_command(tmp_path, digits, capsys):
    (tmp_path / "a.tar").write_bytes(next((digits / "test").glob("*.tar")).read_bytes())
    arguments = [str(ENCODER), f"data.train={tmp_path}", f"run_dir={tmp_path}/run"]
    code, message = starts(arguments, capsys, 0)
    assert code == 64
    assert f"dist-contrastive shards index {tmp_path}" in message


@pytest.mark.slow  # of one's own images in test_docs.py, tables of both kinds in test_eval.py
def test_pack_train_evaluate(tmp_path, overrides, capsys, monkeypatch):
    """The demo in small, and what it leaves behind."""
    monkeypatch.chdir(tmp_path)  # the table has 120 columns, which long paths would take
    assert main(["shards", "pack", "digits", str(tmp_path / "digits")]) == 0
    assert "1437 samples in 8 shards" in capsys.readouterr().out
    encoder, generator = tmp_path / "encoder", tmp_path / "generator"
    assert main(["train", str(ENCODER), *overrides(encoder)]) == 0
    features = f"task.features=[{{name: pixels}}, {{name: run, run_dir: {encoder}}}]"
    config = str(CONFIGS / "digits_generator.yaml")
    assert main(["train", config, *overrides(generator, features)]) == 0
    assert main(["eval", "encoder", "generator"]) == 0
    table = capsys.readouterr().out
    for words in ("kNN accuracy", "raw pixels", "energy distance", "train data", "precision"):
        assert words in table
    for picture in ("encoder/plots/embedding", "encoder/plots/loss", "generator/plots/samples"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5000
    measures = {m["name"]: m["value"] for m in json.loads((encoder / "eval.json").read_text())}
    assert 0.5 < measures["kNN accuracy, k = 5"] <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "nowhere"], "nowhere is no run directory"),
        (["shards", "index", "nowhere"], "nowhere"),
        (["train", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
    ],
)
def test_wrong_paths(arguments, words, capsys):
    assert main(arguments) == 64
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("module", ["dist_contrastive", "launch.local", "launch.slurm"])
def test_help_is_quick_and_works_outside_the_checkout(module, tmp_path):
    """Without importing what takes long, from any folder."""
    done = run([sys.executable, "-X", "importtime", "-m", module, "--help"], cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "rich.console", "submitit", "datasets"}
    assert module != "dist_contrastive" or "pydantic" not in imported


def test_public_names_import_torch_only_when_used():
    code = """
        import sys, dist_contrastive
        assert "torch" not in sys.modules
        from dist_contrastive import collectives, losses, testing
        assert dist_contrastive.losses is losses
        from dist_contrastive.trainer import train
        assert dist_contrastive.train is train
        try:
            dist_contrastive.magic
        except AttributeError as error:
            assert "magic" in str(error)
    """
    done = run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == 0, done.stderr


def commands(command, path: tuple[str, ...]) -> dict[tuple[str, ...], object]:
    """All commands below one that may be a group, by the words that name them."""
    if not hasattr(command, "commands"):
        return {path: command}
    inside = [commands(below, (*path, name)) for name, below in command.commands.items()]
    return {words: leaf for some in inside for words, leaf in some.items()}


COMMANDS = {
    **commands(typer.main.get_command(cli.app), ("dist-contrastive",)),
    **commands(typer.main.get_command(launch_slurm.app), ("python", "-m", "launch.slurm")),
    **commands(typer.main.get_command(local.app), ("python", "-m", "launch.local")),
}


@pytest.mark.parametrize("words", COMMANDS, ids="-".join)
def test_every_command_has_help_with_examples_that_can_be_typed(words):
    command = COMMANDS[words]
    assert command.help
    examples = [shlex.split(line) for line in command.epilog.splitlines()[2:]]
    typed = [argv for argv in examples if tuple(argv[: len(words)]) == words]
    assert typed
    for argv in typed:
        arguments = [word for word in argv[len(words) :] if not word.startswith("(")]
        command.make_context(" ".join(words), arguments)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "Missing command"),
        (["trian"], "trian"),
        (["train"], "CONFIG"),
        (["train", "a.yaml", "--rank", "2"], "--rank"),
        (["doctor", "a.yaml", "--ranks", "two"], "--ranks two: should be a whole number"),
        (["sample", "run", "--guidance", "big"], "--guidance big: should be a number"),
        (["export", "run", "--checkpoint", "oldest"], "newest"),
        (["sample", "run", "another"], "another"),
        (["audit", "--world-sizes"], "--world-sizes"),
        (["shards", "pack", "images", "folder"], "FOLDER"),
    ],
)
def test_wrong_flags_end_with_2(argv, words, capsys):
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "--help" in message
    assert not any(word in message for word in ("Input", "valid", "parse", "Value error"))
    assert len(message.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["{config}", "optim.magic=-1", "--ranks", "2"],
        ["{config}", "--ranks", "2", "optim.magic=-1"],
        ["--ranks", "2", "{config}", "optim.magic=-1"],
        ["{config}", "seed=1", "--ranks=2", "optim.magic=-1"],
    ],
)
def test_overrides_stand_anywhere_after_the_config(argv, capsys):
    argv = [word.replace("{config}", str(ENCODER)) for word in argv]
    for start in (lambda: main(["doctor", *argv]), lambda: local.main(argv)):
        assert start() == 64
        assert "optim.magic is not a known setting" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == dist_contrastive.__version__


def test_interrupted(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dist_contrastive.config.load", interrupt)
    assert main(["doctor", "a.yaml"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_shell_completion():
    variables = {
        "_DIST_CONTRASTIVE_COMPLETE": "complete_bash",
        "COMP_WORDS": "dist-contrastive shards in",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        command(), env={**environment(), **variables}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["index", "inspect"], done.stderr


def settings_of(capsys: pytest.CaptureFixture[str], *section: str) -> dict[str, list[dict]]:
    """Rows of `config SECTION --json` by their keys."""
    assert main(["config", *section, "--json"]) == 0
    rows: dict[str, list[dict]] = {}
    for row in json.loads(capsys.readouterr().out):
        rows.setdefault(row["key"], []).append(row)
    return rows


def test_config_has_every_setting_with_type_default_limits_unit_and_help(capsys):
    rows = settings_of(capsys)
    (lr,) = rows["optim.lr"]
    assert (lr["type"], lr["default"], lr["limits"]) == ("float", 1e-3, "more than 0")
    assert rows["train.steps"][0]["unit"] == "steps"
    assert rows["run_dir"][0]["required"]
    lines = [row for same in rows.values() for row in same]
    assert [row["key"] for row in lines if not row["help"]] == []
    known = RunConfig.model_fields
    assert {key.split(".")[0] for key in rows} == set(known)
    for name, field in known.items():
        for group in settings_in(field.annotation, field.metadata):
            assert {f"{name}.{inner}" for inner in group.model_fields} <= set(rows)


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ("optim", "optim.warmup_steps", "steps"),
        ("optim.warmup_steps", "optim.warmup_steps", "steps"),
        ("task.loss", "task.loss.temperature", "more than 0"),
        ("loss", "task.loss.temperature", "more than 0"),
        ("infonce", "task.loss.temperature", "0.07"),
        ("two_view", "task.views", "augmentation"),
    ],
)
def test_config_of_a_section_or_a_component(section, key, words, capsys):
    assert main(["config", section]) == 0
    table = capsys.readouterr().out
    assert table.split()[:4] == ["key", "type", "default", "help"]
    line = next(line for line in table.splitlines() if line.startswith(f"{key} "))
    assert words in line
    assert "run_dir" not in table
    assert key in settings_of(capsys, section)


def test_config_of_what_is_not_there(capsys):
    assert main(["config", "optm"]) == 64
    message = capsys.readouterr().err
    assert "'optm'" in message
    assert "optim" in message
    assert len(message.strip().splitlines()) == 1


def test_log_records_go_to_stderr_only_while_a_command_runs(capsys):
    """A program that uses the package routes them by itself."""
    log = logging.getLogger("dist_contrastive.somewhere")
    with reporting_errors() as outcome:
        log.info("a step of %d", 3)
        raise ConfigError("lr=-1 is below 0")
    log.info("nobody listens")
    assert outcome.code == 64
    assert capsys.readouterr().err == "a step of 3\ndist-contrastive: lr=-1 is below 0\n"


def test_errors_of_a_rank_name_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with reporting_errors():
        raise ConfigError("lr=-1 is below 0")
    assert capsys.readouterr().err == "dist-contrastive, rank 3: lr=-1 is below 0\n"


@pytest.mark.parametrize(
    "is_broken", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["as_it_is", "broken"]
)
def test_readme_example_runs(is_broken, tmp_path):
    """And its assertion fails with negatives of one rank alone."""
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    assert "assert" in code.strip().splitlines()[-1]
    if is_broken:
        code = code.replace("temperature=0.1", 'temperature=0.1, keys_from="local"')
    (tmp_path / "example.py").write_text(code)
    done = run([sys.executable, "-W", "error", "example.py"], cwd=tmp_path)
    assert ("AssertionError" in done.stderr) == is_broken, done.stderr
    assert (done.returncode == 0) == (not is_broken)


def test_audit_prints_its_table(capsys):
    assert main(["audit", "--only", "SigLIP", "--world-sizes", "1", "2"]) == 0
    out = capsys.readouterr().out
    assert "| loss | keys | tiles | value | encoder | cosine | scale | bias | difference |" in out
    for keys_from in ("gather", "ring"):
        for tiles in ("dense", "chunked"):
            assert f"| SigLIP | {keys_from} | {tiles} | 1.0000000000 | 1.0000000000 |" in out
    # 2 cases, 4 paths: one rank even, two ranks split in four ways
    assert "40 ways, worst error " in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "magic"], "--only 'magic' is in no name; known are InfoNCE; "),
        (["--world-sizes", "0"], "--world-sizes [0] must be 1 to "),
        (["--world-sizes", "2", "-1", "--only", "SigLIP"], "--world-sizes [2, -1] must be 1 to "),
    ],
)
def test_audit_of_nothing_ends_with_64(arguments, words, capsys):
    assert main(["audit", *arguments]) == 64
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("shards inspect {digits}/test --sheet /proc/sheet.png", "sheet.png cannot be written"),
        ("shards index {digits}/test --out /proc/x.npz", "cannot be written (No such file"),
        ("shards index {digits}/test/index.npz", "index.npz is an index; give the folder or"),
        ("shards inspect ftp://nowhere", "index.npz cannot be opened"),
        ("shards pack digits http://host/digits", "is a URL; pack into a folder, and copy"),
        ("shards pack digits /proc/digits", "/proc/digits cannot be written"),
        ("shards list {tmp}/nothing", "nothing does not exist"),
        ("train {config} data.train=", "data.train"),
        ("train {config} data.test={tmp}/nothing", "nothing does not exist"),
        ("train {config} data.tail=drop data.balance={{classes: 2, samples_per_class: 2}}", "drop"),
    ],
)  # fmt: skip
def test_wrong_places_end_with_64(argv, words, tmp_path, digits, overrides, capsys):
    options = [o for o in overrides(tmp_path / "run") if not o.startswith("data.test")]
    words_of = argv.format(digits=digits, tmp=tmp_path, config=ENCODER).split(" ", 2)
    split = words_of[:2] + (words_of[2].split(" ") if words_of[0] == "shards" else [])
    if words_of[0] == "train":
        split += [*options, *re.split(r" (?=data\.)", words_of[2])]
    assert main(split) == 64
    message = capsys.readouterr().err
    assert words in message
    assert len(message.strip().splitlines()) == 1


def test_folders_of_any_name(tmp_path, capsys):
    """Brackets and braces are what patterns are made of."""
    folder = tmp_path / "out [1]{2}"
    assert main(["shards", "pack", "checkerboard", str(folder)]) == 0
    for command_of in ("list", "inspect", "verify", "index"):
        assert main(["shards", command_of, str(folder / "train")]) == 0, capsys.readouterr().err
