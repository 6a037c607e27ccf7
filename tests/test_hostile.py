"""Files that came from elsewhere, and unlucky ones: nothing runs that the user did not name,
nothing sound is lost, and what is wrong is one sentence."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CONFIGS, command, environment, refused
from PIL import Image

from dist_contrastive import checkpoint, report, trainer
from dist_contrastive import config as configs
from dist_contrastive.backend.trackers import run_id
from dist_contrastive.checkpoint import Keep, Progress
from dist_contrastive.cli import main
from dist_contrastive.data import ShardStream
from dist_contrastive.errors import ConfigError, DataError, StorageError, UserError
from dist_contrastive.imports import names_in
from dist_contrastive.losses.rewards import load_reward
from dist_contrastive.metrics import read_rows
from dist_contrastive.models import TransformersEncoder
from dist_contrastive.sentences import shown
from dist_contrastive.yaml_files import parse_yaml
from launch.progress import read_progress
from launch.slurm.__main__ import main as slurm
from launch.slurm.checks import measured_s
from launch.slurm.cluster import JobRecord, add_record, known_options, last_record, records
from launch.slurm.control import status
from launch.slurm.options import load_options

ENCODER = CONFIGS / "digits_encoder.yaml"
SMALL = (
    *("task.encoder={name: residual, widths: [8]}", "task.head={hidden: 8, out: 8}"),
    *("data.global_batch_size=16", "optim.warmup_steps=0", "train.steps=4", "train.save_every=2"),
    *("train.trackers=[]", "train.ledger=false", "train.keep_last=9"),
)
MINE = """from pathlib import Path
from dist_contrastive.losses import NTXent
Path("RAN").touch()
class Mine(NTXent):
    pass
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, overrides) -> Path:
    """A run directory after 4 steps, with checkpoints of steps 2 and 4."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert trainer.train(configs.load(ENCODER, overrides(run_dir, *SMALL))) == 0
    change = {"step": 1, "time": "then", "settings": {"optim.lr": [1, 2]}}
    (run_dir / "changes.jsonl").write_text(json.dumps(change) + "\n")
    return run_dir


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def resume(run_dir: Path, overrides, steps: int = 4, *more: str) -> int:
    return main(["train", str(ENCODER), *overrides(run_dir, *SMALL, f"train.steps={steps}", *more)])


# ------------------------------------------------------------------ what may run


def hostile_modules(folder: Path, *names: str) -> Path:
    marker = folder / "RAN"
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit(3)\n")
    return marker


@pytest.mark.parametrize(
    "argv",
    [
        ["-m", "dist_contrastive", "shards", "verify", "."],
        ["-m", "launch.slurm", "list", "."],
        ["-m", "launch.local", "none.yaml", "--ranks", "2"],
        pytest.param(
            ["-m", "dist_contrastive", "doctor", str(ENCODER), "--ranks", "2"],
            marks=pytest.mark.slow,  # processes of a job, in test_launch.py
        ),
    ],
    ids=lambda argv: argv[1] + argv[2],
)
def test_modules_in_the_current_folder_are_not_imported(argv, digits, tmp_path, overrides):
    """Neither by a command nor by the processes that it starts."""
    folder = Path(shutil.copytree(digits / "test", tmp_path / "data"))
    names = ("numpy", "colorsys", "fractions", "webdataset", "PIL", "queue", "socket", "psutil")
    marker = hostile_modules(folder, *names, "typer", "yaml", "selectors", "pickle")
    if "doctor" in argv:
        argv = [*argv, *overrides(tmp_path / "run", *SMALL)]
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, capture_output=True, text=True, env=environment()
    )
    assert done.returncode in (0, 64), done.stderr
    assert not marker.exists()


def test_a_folder_of_the_users_may_hold_any_names(tmp_path, overrides):
    """What a config names is found beside it and in the current folder, from the folders' ends."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "configs" / "beside.py").write_text("from mine import Mine as Beside\n")
    (tmp_path / "queue.py").write_text("raise SystemExit(3)\n")
    config = yaml.safe_load(ENCODER.read_text())
    config["task"]["loss"] = {"name": "beside:Beside", "temperature": 0.2}
    (tmp_path / "configs" / "c.yaml").write_text(yaml.safe_dump(config))
    done = run_in(tmp_path, "train", "configs/c.yaml", *overrides(tmp_path / "run", *SMALL))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "RAN").exists()


@pytest.fixture
def own_run(tmp_path, overrides) -> Path:
    """A run with a loss of the user's, trained from his folder."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text(MINE)
    loss = "task.loss={name: 'mine:Mine', temperature: 0.2}"
    options = overrides(tmp_path / "run", *SMALL, loss)
    assert run_in(tmp_path / "code", "train", ENCODER, *options).returncode == 0
    (tmp_path / "code" / "RAN").unlink()
    return tmp_path / "run"


def run_in(folder: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*map(str, argv)), cwd=folder, capture_output=True, text=True, env=environment()
    )


def test_what_a_run_names_runs_where_it_was_trained_and_else_by_the_users_word(
    own_run, tmp_path, monkeypatch, capsys
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.py").write_text("open('EVIL', 'w')\nraise SystemExit(3)\n")
    assert run_in(elsewhere, "export", own_run).returncode == 0  # the user's own module
    assert not (elsewhere / "EVIL").exists()
    (elsewhere / "RAN").unlink()

    copied = Path(shutil.copytree(own_run, elsewhere / "run"))
    shutil.copy(tmp_path / "code" / "mine.py", elsewhere / "mine.py")
    shutil.copy(tmp_path / "code" / "mine.py", copied / "mine.py")
    given = ("train", str(copied / "config.yaml"), f"run_dir={copied}")
    for folder in (elsewhere, copied):
        monkeypatch.chdir(folder)
        for argv in (("eval", str(copied)), ("export", "."), ("sample", str(copied)), given):
            assert main([*argv]) == 64 or argv[1] == "."
    told = capsys.readouterr().err
    assert told.count("mine:Mine") == told.count("--trust") == 7
    assert not (elsewhere / "RAN").exists()
    assert "mine" not in sys.modules

    out = ("--out", elsewhere / "exported")
    assert run_in(elsewhere, "export", copied, "--trust", *out).returncode == 0
    assert (elsewhere / "RAN").exists()
    assert run_in(tmp_path, "export", copied).returncode == 0  # the word is kept
    config = copied / "config.yaml"
    config.write_text(config.read_text() + "# changed since\n")
    assert main(["eval", str(copied)]) == 64


@pytest.mark.parametrize("module", ["odd-name", " odd", "1odd", "odd\n", "o·dd", "odd/x"])
def test_nothing_is_imported_by_a_name_that_is_not_seen_as_one(module, tmp_path, monkeypatch):
    """Trust is asked for by what `names_in` finds: that must be all that can be imported."""
    (tmp_path / "odd").mkdir()
    (tmp_path / f"{module}.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not names_in([f"{module}:E"])
    with refused(ConfigError, "no import path"):
        configs.load(ENCODER, [f"task.loss={{name: {json.dumps(module + ':E')}}}"])
    with refused(ConfigError, "not of the form"):
        load_reward(f"{module}:E")
    assert names_in({"x": ["größe.b:C.d", "a:", ":b", "a:1"]}) == {"größe.b:C.d"}


def test_what_is_not_code_needs_no_word(run_dir):
    assert main(["export", str(run_dir)]) == 0


def test_a_reward_and_an_encoder_of_another_run_need_it_too(run_dir, tmp_path, capsys):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["task"]["encoder"] = {"name": "evil_encoder:E"}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    from dist_contrastive.tasks.feature_spaces import load_encoder

    with refused(ConfigError, "evil_encoder:E", "--trust"):
        load_encoder(run_dir, (1, 8, 8))
    config["task"]["encoder"] = {"name": "residual", "colour": 1}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    with refused(ConfigError, "config.yaml: task: encoder.colour is not a known setting"):
        load_encoder(run_dir, (1, 8, 8))
    config["task"] = {"name": "hybrid", "reward": {"function": "evil_reward:f"}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["eval", str(run_dir)]) == 64
    assert "evil_reward:f" in capsys.readouterr().err
    assert not {"evil_reward", "evil_encoder"} & sys.modules.keys()


@pytest.mark.parametrize("name", ["trust_remote_code", "auto_map"])
def test_code_of_a_checkpoint_is_refused(name):
    with refused(ConfigError, f"config.{name}", "leave it out"):
        TransformersEncoder.Config.checked({"pretrained": "somewhere", "config": {name: True}})


def record(run_dir: Path, **changes: object) -> JobRecord:
    values = {
        **{"job": "1", "cluster": "local", "submitted": "x", "folder": str(run_dir)},
        **{"logs": str(run_dir), "config": str(run_dir / "config.yaml"), "cwd": str(run_dir)},
    }
    return JobRecord(**{**values, "options": {}, **changes})


@pytest.mark.parametrize(
    "options",
    [
        {"setup": ["touch RAN"]},
        {"python": "/tmp/python"},
        {"address": "$(touch RAN)"},
        {"container": "sh -c 'touch RAN'"},
        {"srun": ["--task-prolog=evil"]},
        {"env": {"LD_PRELOAD": "evil.so"}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_shell_lines_of_a_record_need_the_users_word(options, run_dir, capsys):
    line = json.dumps(vars(record(run_dir, options=options)))
    (run_dir / "jobs.jsonl").write_text(line + "\n")
    assert slurm(["resume", str(run_dir), "--no-doctor"]) == 64
    message = capsys.readouterr().err
    assert next(iter(options)) in message
    assert "--trust" in message
    assert not (run_dir / "RAN").exists()


def test_a_record_that_this_user_wrote_is_trusted(run_dir, monkeypatch):
    from launch.slurm.cluster import require_trusted_record

    add_record(run_dir, record(run_dir, options={"setup": ["module load x"]}))
    found = last_record(run_dir)
    require_trusted_record(run_dir, found, found.options, False)
    copied = Path(shutil.copytree(run_dir, run_dir.with_name("copied")))
    with refused(ConfigError, "module load x", "--trust"):
        require_trusted_record(copied, found, found.options, False)


# ------------------------------------------------------------------ checkpoints


def save(root: Path, step: int, keep: Keep | None = None) -> Path:
    weights = {"w": torch.full((1000,), float(step))}
    return checkpoint.save(root, Progress(step, 64 * step), weights, {}, keep or Keep())


@pytest.fixture
def unreadable(monkeypatch):
    """Files of this name fail with this error when they are opened, as on a disk that fails."""
    real = open

    def fail(name: str, error: OSError) -> None:
        def opened(file, mode="r", *args, **kwargs):
            if mode[0] == "r" and not isinstance(file, int) and Path(file).name == name:
                raise error
            return real(file, mode, *args, **kwargs)

        monkeypatch.setattr("io.open", opened)

    return fail


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "state.json"])
@pytest.mark.parametrize(
    ("number", "kind"),
    [(5, StorageError), (24, StorageError), (116, StorageError), (13, DataError)],
    ids=["input_output", "too_many_open_files", "stale", "permission"],
)
def test_what_cannot_be_read_is_not_called_damaged(name, number, kind, tmp_path, unreadable):
    for step in (1, 2):
        save(tmp_path, step)
    unreadable(name, OSError(number, os.strerror(number)))
    with refused(kind, name, os.strerror(number), "may be sound"):
        checkpoint.newest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_retention_deletes_nothing_when_it_cannot_know_the_best(tmp_path, unreadable):
    for step in (1, 2, 3):
        save(tmp_path, step, Keep(last=9))
    unreadable("state.json", OSError(5, "Input/output error"))
    save(tmp_path, 4, Keep(last=1, best="min"))
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_of_checkpoints_that_may_not_be_listed_is_not_empty(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", fail)
    with refused(DataError, str(tmp_path), "Permission denied"):
        checkpoint.newest(tmp_path)


def test_damaged_ones_are_set_aside_and_later_sound_ones_stay(tmp_path):
    save(tmp_path, 1)
    for step in (2, 3, 4):
        save(tmp_path, step, Keep(last=9))
    for step in (2, 3):
        (tmp_path / f"step-0000000{step}" / "training.pt").write_bytes(b"torn")
    save(tmp_path, 2, Keep(last=9))
    (tmp_path / "step-00000002" / "model.safetensors").unlink()
    save(tmp_path, 2, Keep(last=9))
    (tmp_path / "step-00000005").symlink_to("nowhere")
    save(tmp_path, 5, Keep(last=9))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        *("set-aside-step-00000002", "set-aside-step-00000002-2", "set-aside-step-00000003"),
        *("set-aside-step-00000005", "step-00000001", "step-00000002", "step-00000004"),
        "step-00000005",
    ]
    assert (tmp_path / "set-aside-step-00000003" / "training.pt").read_bytes() == b"torn"


@pytest.mark.parametrize(
    "state",
    [
        *("", "\0" * 200, "[]", "7", '{"step": 1}', '{"step": "x", "crc32": {}}', "{" * 5000),
        *('{"format": Infinity}', '{"step": 2, "consumed": 9, "bad_steps": 0, "crc32": {}}'),
    ],
)
def test_states_that_say_nothing_are_damaged(state, tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.json").write_text(state)
    told: list[str] = []
    assert checkpoint.newest(tmp_path, told.append).progress.step == 1
    assert "step-00000002" in told[0]


def test_a_score_that_is_no_number_is_not_the_best(tmp_path):
    for step, score in enumerate((np.nan, 2.0, 1.0, np.nan), 1):
        checkpoint.save(tmp_path, Progress(step), {}, {}, Keep(last=9), score)
    assert [checkpoint.best(tmp_path, mode).progress.step for mode in ("min", "max")] == [3, 2]


def test_a_newer_format_is_neither_passed_over_nor_replaced(tmp_path):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 9}))
    with refused(DataError, "newer version"):
        checkpoint.newest(tmp_path)


def test_files_whose_checksums_lie_are_one_sentence(run_dir, overrides, capsys):
    """As someone would make them who wants to be believed."""
    folder = run_dir / "checkpoints" / "step-00000004"
    state = json.loads((folder / "state.json").read_text())
    for name in ("model.safetensors", "training.pt"):
        (folder / name).write_bytes(b"\x80\x02cposix\nsystem\nX\x04\0\0\0exitR.")
        state["crc32"][name] = 0
        state["crc32"][name] = zlib.crc32((folder / name).read_bytes())
    (folder / "state.json").write_text(json.dumps(state))
    assert main(["eval", str(run_dir)]) == 64
    assert resume(run_dir, overrides, 6) == 64
    assert capsys.readouterr().err.count("holds no weights or state that can be read") == 2


def test_exports_have_checksums(run_dir, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(run_dir), "--out", str(out)]) == 0
    assert checkpoint.run_weights(out)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True)
    assert done.returncode == 0
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    with refused(DataError, "model.safetensors is not as it was written"):
        checkpoint.run_weights(out)
    with refused(ConfigError, "model.safetensors is not as it was written"):
        checkpoint.weights_at(out)
    sums, lines = out / "SHA256SUMS", (out / "SHA256SUMS").read_text().splitlines(True)
    sums.write_text(f"{lines[1]}\n".replace("  ", " *"))  # as of `sha256sum --binary`
    assert checkpoint.run_weights(out)
    for torn in (lines[0][:50], "\0" * 80, lines[1] + lines[0][:9]):
        sums.write_text(torn)
        with refused(DataError, "SHA256SUMS is damaged"):
            checkpoint.run_weights(out)
    sums.write_text(lines[1].replace("config", "gone"))
    with refused(DataError, "gone.yaml is not as it was written"):
        checkpoint.run_weights(out)
    sums.unlink()  # one of an older version
    assert checkpoint.run_weights(out)


# ------------------------------------------------------------------ records

RECORDS = (
    *("skipped.jsonl", "attempts.json", "metrics.jsonl", "data.json", "config.yaml"),
    *("changes.jsonl", "environment.json"),
)
ODD = {"step": 1e999, "starts": 1e999, "sample": 1e999, "time": None, "settings": {"a": [1, 2]}}


def changes_of(text: str) -> dict[str, bytes]:
    """How a crash, a full disk or another version leaves a file."""
    data = text.encode()
    return {
        "torn": data[: len(data) // 2],
        "blank": b"",
        "blank_lines": data + b"\n\n",
        "zeros": b"\0" * len(data),
        "zeros_after": data + b"\0" * 100 + b"\n",
        "no_text": b"\xff\xfe\x80" + data,
        "other_values": b"[1, 2]\n",
        "a_number": b"7\n",
        "odd": b"[" * 200_000 + b"\n" + json.dumps(ODD).encode() + b"\n",
    }


@pytest.mark.parametrize("change", changes_of(""))
def test_records_do_not_break_a_resume(change, run_dir, overrides, capsys):
    skipped = {"step": 0, "epoch": 0, "sample": 3, "shard": "s", "key": None, "reason": "r"}
    (run_dir / "skipped.jsonl").write_text(json.dumps({**skipped, "replaced_by": 4}) + "\n")
    (run_dir / "modules.json").write_text("{}")
    for name in (*RECORDS, "modules.json"):
        path = run_dir / name
        path.write_bytes(changes_of(path.read_text())[change])
    assert resume(run_dir, overrides, 4) == 0  # trained already
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    assert resume(run_dir, overrides, 4) == 0
    rows = read_rows(run_dir)
    assert [row["step"] for row in rows][-2:] == [3, 4]
    assert configs.load_run(run_dir).train.steps == 4


@pytest.mark.parametrize("name", ["skipped.jsonl", "data.json", "modules.json", "changes.jsonl"])
def test_records_that_cannot_be_read_are_named(name, run_dir, overrides, capsys):
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).mkdir()
    is_read_first = name != "changes.jsonl"
    assert (
        resume(run_dir, overrides, 6) if is_read_first else slurm(["status", str(run_dir)])
    ) == 64
    assert f"{name} cannot be read (Is a directory)" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "\xff\xfe", "\0" * 17, "\n", "../x"])
def test_an_id_of_a_tracker_that_says_nothing_is_made_anew(text, tmp_path):
    (tmp_path / "run_id").write_bytes(text.encode("latin-1"))
    found = run_id(tmp_path)
    assert len(found) == 16
    assert run_id(tmp_path) == found


@pytest.mark.parametrize(
    "row",
    [
        *({"step": 2}, {"step": 1e999, "step_s": 1}, {"step": 2, "save_s": 1.0}),
        *({"step": 2, "step_s": 1e308, "save_s": 1e999}, {"step": -2, "step_s": -1, "save_s": -1}),
        *({"step": True, "step_s": "x", "loss": {}}, {"step": 2, "step_s": 1.0, "loss": 10**30}),
    ],
)
def test_numbers_that_cannot_be_are_left_out(row, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for steps in ("9", "1" + "0" * 400, "true", "-3"):
        (tmp_path / "config.yaml").write_text(f"train: {{steps: {steps}}}")
        assert status(tmp_path)
        assert read_progress(tmp_path).steps == (9 if steps == "9" else None)
    assert 0 <= read_progress(tmp_path).step < 10
    assert measured_s(tmp_path) is None
    report.loss_curves(read_rows(tmp_path), tmp_path / "loss.png")


def test_records_of_other_versions(run_dir, overrides, capsys):
    """A newer version's settings and fields are named; an older one's are fewer."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["task"]["invented"], config["data"]["num_workers"] = 1, 0
    del config["train"]["max_bad_steps"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    data = json.loads((run_dir / "data.json").read_text())
    data[0]["colour"] = data[0].pop("weight")
    (run_dir / "data.json").write_text(json.dumps(data))
    rows = (run_dir / "metrics.jsonl").read_text() + '{"step": "later", "x": {}}\n{}\n'
    (run_dir / "metrics.jsonl").write_text(rows)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    assert resume(run_dir, overrides) == 0
    assert "task.invented is not a known setting" in capsys.readouterr().err
    config["task"]["loss"]["temperature"] = 0.7
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    assert resume(run_dir, overrides) == 64
    assert "task.loss.temperature: 0.7 -> 0.2" in capsys.readouterr().err


def test_other_data_are_still_refused(run_dir, overrides):
    data = json.loads((run_dir / "data.json").read_text())
    data[0]["fingerprint"] = "0" * 64
    (run_dir / "data.json").write_text(json.dumps(data))
    with refused(ConfigError, "was trained on"):
        trainer.train(configs.load(ENCODER, overrides(run_dir, *SMALL)))


@pytest.mark.parametrize("change", changes_of(""))
def test_one_broken_run_does_not_hide_the_others(change, run_dir, capsys):
    root = run_dir.parent
    for name in ("a", "b", "c"):
        copied = Path(shutil.copytree(run_dir, root / "list" / name))
        add_record(copied, record(copied))
    for name in (*RECORDS[2:], "jobs.jsonl"):
        path = root / "list" / "b" / name
        path.write_bytes(changes_of(path.read_text())[change])
    (root / "list" / "b" / "checkpoints" / "step-x").mkdir()
    assert slurm(["list", str(root / "list")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["a", "b", "c"]
    assert all("4/4" in line for line in (lines[1], lines[3]))
    assert slurm(["status", str(root / "list" / "b")]) == 0


@pytest.mark.parametrize(
    "line",
    [
        '{"job": "--version"}',
        '{"job": 1}',
        json.dumps({**vars(record(Path("x"))), "job": "--version"}),
        json.dumps({**vars(record(Path("x"))), "options": 3}),
        json.dumps({**vars(record(Path("x"))), "cluster": "other"}),
    ],
)
def test_lines_of_jobs_that_no_submission_wrote_are_left_out(line, tmp_path):
    newer = json.dumps({**vars(record(tmp_path)), "colour": "red"})
    older = {name: value for name, value in vars(record(tmp_path)).items() if name != "change"}
    (tmp_path / "jobs.jsonl").write_text(f"{newer}\n{line}\n{json.dumps(older)}\n")
    assert records(tmp_path) == 2 * [record(tmp_path)]


def test_a_record_may_name_what_cannot_be(tmp_path, caplog):
    add_record(tmp_path, record(tmp_path, folder="x/" * 3000, options={"colour": 1, "nodes": 2}))
    assert status(tmp_path)
    assert known_options(last_record(tmp_path)) == {"nodes": 2}
    assert "colour" in caplog.text


@pytest.mark.parametrize("kind", ["link", "hard_link", "pipe"])
def test_a_lock_that_is_not_the_runs_own_is_refused(kind, run_dir, overrides, capsys):
    precious, lock = run_dir.parent / "precious", run_dir / "lock"
    precious.write_text("of the user")
    lock.unlink()
    match kind:
        case "link":
            lock.symlink_to(precious)
        case "hard_link":
            lock.hardlink_to(precious)
        case "pipe":
            os.mkfifo(lock)
    assert resume(run_dir, overrides, 4, "train.steps=6") in (64,)
    assert "link" in capsys.readouterr().err
    assert precious.read_text() == "of the user"


@pytest.mark.parametrize("name", ["metrics.jsonl", "skipped.jsonl"])
def test_nothing_is_appended_through_links(name, run_dir, overrides):
    precious, path = run_dir.parent / "precious", run_dir / name
    precious.write_text("of the user\n")
    path.unlink(missing_ok=True)
    path.symlink_to(precious)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    assert resume(run_dir, overrides) in (0, 64)
    assert precious.read_text() == "of the user\n"


def test_pictures_take_the_place_of_links(tmp_path):
    precious, path = tmp_path / "precious", tmp_path / "plots" / "loss.png"
    precious.write_text("of the user")
    path.parent.mkdir()
    path.symlink_to(precious)
    report.loss_curves([{"step": 1, "loss": 2.0}], path)
    assert precious.read_text() == "of the user"
    with Image.open(path) as picture:
        assert picture.format == "PNG"
    with refused(ConfigError, "loss.png cannot be written (File exists)"):
        report.loss_curves([], precious / "loss.png")


# ------------------------------------------------------------------ full disks


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [0, 10, 500])
def test_a_disk_that_is_full_at_the_start(size, tmp_path, overrides, capsys):
    options = overrides(tmp_path / "run", *SMALL)
    with full_disk(size):
        assert main(["train", str(ENCODER), *options]) == 64
    message = capsys.readouterr().err
    assert "cannot be written (File too large)" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("size", [0, 3000, 20_000])
def test_a_disk_that_is_full_while_packing(size, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(images / f"{number}.png")
    with full_disk(size):
        assert main(["shards", "pack", "images", str(images), str(tmp_path / "out")]) == 64
    told = capsys.readouterr().err
    assert "File too large" in told.splitlines()[-1]
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


SHARED_MEMORY = """
mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"
"""


def test_shared_memory_that_is_full(tmp_path, overrides):
    """Of a container with 64 KiB of it; batches are larger."""
    options = overrides(tmp_path / "run", *SMALL, "data.num_workers=1", "data.image_size=64")
    wrapped = ["unshare", "--mount", "sh", "-c", SHARED_MEMORY, "sh"]
    if subprocess.run([*wrapped, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    done = subprocess.run(
        [*wrapped, *command("train", ENCODER, *options)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 75, done.stderr
    assert "/dev/shm is full" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------ YAML and sizes

BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{y}: &{y} [{', '.join([f'*{x}'] * 10)}]\n"
    for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key a stands twice"),
        ("x: {lr: 1, 'lr': 2}", "the key lr stands twice"),
        (BOMB, "aliases"),
        ("a: &a [*a]", "alias"),
        ("[" * 100_000, "nested"),
        ("a: " + "{b: " * 3000, "nested"),
        ("a: !!python/object/apply:os.system [x]", "line 1"),
        ("a: !!int x", "no int: "),
        ("a: !!timestamp 2026-01-01", "no timestamp: "),
        ("a: !!set {x, y}", "no set: "),
        ("a: !!binary aGk=", "no binary: "),
        ("a: !!bool maybe", "no bool: "),
        ("a: !!float ''", "no float:"),
        (f"a: {'1' * 6000}", "no int: "),
        ("a: \0", "not text"),
        ("? [1, 2]\n: 3", "key"),
        ("a: [1", "line 1"),
        ("a: b: c", "line 1"),
        ("--- 1\n--- 2", "line 2"),
    ],
)
def test_yaml_that_cannot_be_meant(text, words, tmp_path):
    with refused(ValueError, words):
        parse_yaml(text)
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with refused(ConfigError, "c.yaml"):
        configs.load(path)


def test_yaml_that_is_meant():
    merged = "base: &b {x: 1, y: 2}\nother: {<<: *b, x: 3}\n"
    assert parse_yaml(merged)[0] == {"base": {"x": 1, "y": 2}, "other": {"x": 3, "y": 2}}
    assert parse_yaml("a: 2026-11-28")[0] == {"a": "2026-11-28"}
    assert parse_yaml("") == (None, None)
    texts = ["010", "1:30", "12:30:45.5", "=", "08", "1.2.3", "0o17"]
    assert parse_yaml(f"[{', '.join(texts)}]")[0] == texts
    numbers = "[0, -7, 1_000, 0x1F, 1e-3, 1.5E+3, 5., -.5, .inf]"
    assert parse_yaml(numbers)[0] == [0, -7, 1000, 31, 0.001, 1500, 5, -0.5, float("inf")]
    assert parse_yaml("{a: no, b: 8:00, c: }", as_text=True)[0] == {"a": "no", "b": "8:00", "c": ""}


def test_texts_that_look_like_numbers_are_found_again(tmp_path):
    config = configs.load(ENCODER, ["train.tracker_project=1.e5", "train.steps=010"])
    assert config.train.steps == 10
    configs.save(config, tmp_path)
    assert configs.load_run(tmp_path).train.tracker_project == "1.e5"
    with refused(ConfigError, "<< is not a known setting"):
        configs.load(ENCODER, ["<<=1"])


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/mem"])
def test_configs_that_are_no_files_end(path):
    with refused(ConfigError, path):
        configs.load(path)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("data.num_workers=100000", "1024 or less"),
        ("data.lanes=99999999", "65536 or less"),
        ("data.image_size=1000000", "16384 or less"),
        ("data.num_classes=100000000000", "10000000 or less"),
        ("data.cache.block_mb=1000000", "1024 or less"),
        ("backend.timeout_s=1e300", "31536000"),
        ("task.encoder={name: residual, widths: [1000000]}", "65536 or less"),
        ("task.encoder={name: residual, blocks: 1000000}", "1024 or less"),
        ("task.head={hidden: 1000000}", "65536 or less"),
        ("train.steps=" + "9" * 30, "2**53"),
        ("train.profile_steps=[1, 99999999999999999999]", "2**53"),
    ],
)
def test_sizes_that_cannot_be_meant(option, words, tmp_path, overrides):
    with refused(ConfigError, words):
        configs.load(ENCODER, overrides(tmp_path, option))


def test_networks_larger_than_the_machine_are_not_begun(tmp_path, overrides):
    wide = "task.encoder={name: residual, widths: [65536, 65536]}"
    with refused(ConfigError, "memory of this machine", "65536"):
        trainer.train(configs.load(ENCODER, overrides(tmp_path, wide)))


@pytest.mark.parametrize(
    "pattern",
    ["a/{0..99999999}.tar", "a/{0..9}{0..99999999..3}.tar", "a/" + "{a,b}" * 40 + ".tar"],
)
def test_patterns_of_more_shards_than_there_can_be(pattern):
    with refused(DataError, "1000000"):
        ShardStream(pattern, seed=0, global_batch_size=8)


# ------------------------------------------------------------------ secrets

SECRET = "hunter2"
URLS = (
    f"https://me:{SECRET}@example.invalid/data/train.tar",
    f"https://example.invalid/train.tar?X-Amz-Signature={SECRET}&X-Amz-Expires=60",
    f"https://me:{SECRET}@example.invalid/t.tar?sig={SECRET}; restore it",
    f"s3://me:{SECRET}@bucket/train-{{000..009}}.tar",
    f"s3://me:a/{SECRET}@bucket/t.tar",
    f"https://me:p@{SECRET}@example.invalid/t.tar",
)


@pytest.mark.parametrize("url", URLS)
def test_passwords_and_signatures_are_in_no_message(url):
    message = str(UserError(f"shard {url} cannot be read"))
    assert SECRET not in message
    assert message.endswith("cannot be read")
    assert str(UserError(message)) == message
    for length in range(40, 140):  # what is cut before it is looked at
        assert SECRET[:3] not in shown("x" * length + url)


def test_messages_are_one_printable_line():
    message = str(UserError("the key '\x1b[2J\udc80\n' is odd"))
    assert message.isprintable()
    message.encode()


def test_what_urls_need_no_hiding_stays():
    for url in ("https://example.org/a/train-{00..09}.tar", "see http://example.org: there"):
        assert str(UserError(url)) == url


def test_passwords_and_signatures_are_in_no_run_directory(tmp_path, overrides):
    config = configs.load(ENCODER, overrides(tmp_path / "run", *SMALL))
    data = config.data.model_copy(update={"test": URLS[0], "train": URLS[1]})
    config = config.model_copy(update={"data": data})
    configs.save(config, tmp_path)
    assert SECRET not in (tmp_path / "config.yaml").read_text()
    assert SECRET not in json.dumps(configs.public(config))
    assert not configs.differences(configs.load_run(tmp_path), config)
    with refused(ConfigError, "no passwords or signatures"):
        configs.load_run(tmp_path).data.open_train()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"env: {{WANDB_API_KEY: {SECRET}}}", "WANDB_API_KEY"),
        (f"setup: [module load x, export HF_TOKEN={SECRET}]", "HF_TOKEN"),
        (f"srun: ['--export=ALL,MY_PASSWORD={SECRET}']", "MY_PASSWORD"),
        (f"container: apptainer exec --env AWS_SECRET_ACCESS_KEY={SECRET} x.sif", "AWS_SECRET"),
        (f"env: {{https_proxy: 'http://me:{SECRET}@proxy:3128'}}", "of a URL"),
    ],
)
def test_profiles_with_secrets_are_refused(text, found, tmp_path, capsys):
    profile = tmp_path / "site.yaml"
    profile.write_text(text)
    assert slurm(["submit", str(ENCODER), "--profile", str(profile), "--dry-run"]) == 64
    message = capsys.readouterr().err
    assert found in message
    assert SECRET not in message


def test_profiles_without_secrets_are_taken(tmp_path):
    profile = tmp_path / "site.yaml"
    profile.write_text("{env: {TOKENIZERS_PARALLELISM: no}, setup: [export HF_TOKEN=$(cat key)]}")
    assert load_options(profile, {}).env == {"TOKENIZERS_PARALLELISM": "no"}
