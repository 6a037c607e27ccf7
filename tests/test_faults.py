"""Every row of docs/faults.md, on real processes: what is told, how it ends, what is left."""

import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import CONFIGS, Ranks, hybrid_command, newest_step, run_with_fault, with_fault

from dist_contrastive.metrics import read_rows
from dist_contrastive.trainer.watchdog import Watchdog

DOCS = CONFIGS.parent / "docs" / "faults.md"
NUM_RANKS = 2


def ranks_of_hybrid(
    overrides, run_dir: Path, *more: str, fault: str = "none:0:0", number: int = NUM_RANKS
) -> Ranks:
    """Its ranks under a fault, without a launcher."""
    argv = hybrid_command(overrides, run_dir, *more, ranks=None)[3:]
    return Ranks(*argv, number=number, env=with_fault(fault))


def test_a_rank_that_raises(tmp_path, overrides):
    """Its traceback comes first, the others say one line; the exit code is its own."""
    done = run_with_fault(hybrid_command(overrides, tmp_path), "raise:1:5")
    assert done.returncode == 1, done.stderr
    told = done.stderr
    assert told.count("Traceback (most recent call last)") == 1
    cause = told.index("KeyError: 'a bug of the model'")
    victim = told.index("dist-contrastive, rank 0: another rank has ended, see there; start again")
    assert cause < victim
    assert newest_step(tmp_path) == 4


def test_a_rank_that_is_killed(tmp_path, overrides):
    """Without a launcher; with one, the exit code is 137: `test_restarts`."""
    training = ranks_of_hybrid(overrides, tmp_path, fault="kill:1:5")
    done = training.wait()
    assert [process.exitcode for process in training.processes] == [75, -signal.SIGKILL]
    assert "rank 0: another rank has ended" in done.stderr
    assert "Traceback" not in done.stderr
    assert newest_step(tmp_path) == 4


@pytest.mark.parametrize("kind", ["hang", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_rank_that_hangs(kind, tmp_path, overrides):
    """One that hangs says where; one that is stopped cannot, and the others end it."""
    training = ranks_of_hybrid(overrides, tmp_path, "backend.timeout_s=10", fault=f"{kind}:1:5")
    if kind == "stop":
        training.processes[0].join(600)
        training.processes[1].kill()  # a launcher ends it
    done = training.wait()
    assert training.processes[0].exitcode == 75, done.stderr
    if kind == "hang":
        assert re.search(r"rank 1 hangs at .*: no step for backend.timeout_s=10 s", done.stderr)
        assert "faulty.py" in done.stderr  # the stack
    else:
        assert re.search(r"rank 0 waits for other ranks at .*: no step for", done.stderr)
    assert newest_step(tmp_path) == 4


def test_nan_in_one_batch(tmp_path, overrides):
    """Told of and left out; nothing else changes."""
    done = ranks_of_hybrid(overrides, tmp_path, fault="nan:1:5").wait()
    assert done.returncode == 0, done.stderr
    assert "step 6 is left out (1 of at most 3 in a row): " in done.stderr
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]


def test_weights_that_are_not_finite(tmp_path, overrides):
    training = ranks_of_hybrid(overrides, tmp_path, fault="nan_weights:1:5")
    done = training.wait()
    assert [process.exitcode for process in training.processes] == [75, 70], done.stderr
    assert newest_step(tmp_path) == 4


def test_a_disk_that_is_full(tmp_path, overrides):
    """A file system of 400 KB: lines and checkpoints are lost and told of, the last one whole."""
    folder = tmp_path / "small"
    folder.mkdir()
    argv = hybrid_command(overrides, folder / "run", "train.keep_last=99", ranks=None)
    mount = f"mount -t tmpfs -o size=400k none {folder} && "
    keep = f"; code=$?; cp -r {folder}/run {tmp_path}/left; exit $code"
    done = run_with_fault(["unshare", "-rm", "sh", "-c", mount + shlex.join(argv) + keep])
    assert done.returncode == 75, done.stderr
    assert re.search(r"the checkpoint of step \d+ is not written: ", done.stderr)
    assert re.search(r"that of step \d+ is whole; make room and start again", done.stderr)
    assert 0 < newest_step(tmp_path / "left") < 12
    assert not list((tmp_path / "left" / "checkpoints").glob(".*"))
    assert read_rows(tmp_path / "left")  # each a whole line
    shutil.copytree(tmp_path / "left", tmp_path / "run")
    again = ranks_of_hybrid(overrides, tmp_path / "run", number=1).wait()
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in read_rows(tmp_path / "run")][-1] == 12


def test_a_run_directory_that_is_read_only(tmp_path, overrides):
    argv = hybrid_command(overrides, tmp_path / "run", ranks=None)
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path} && "
    done = run_with_fault(["unshare", "-rm", "sh", "-c", mount + shlex.join(argv)])
    assert done.returncode == 64, done.stderr
    assert f"run_dir={tmp_path}/run cannot be written (Read-only file system)" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_in_the_middle_of_a_save(tmp_path, overrides):
    """Every step saves, and one rank gets the signal when a save has begun: it is finished, and so
    is the step, on all."""
    more = ("train.save_every=1", "train.steps=400")
    training = ranks_of_hybrid(overrides, tmp_path, *more)
    training.until(lambda: newest_folder(tmp_path) >= 2)
    training.until(lambda: list((tmp_path / "checkpoints").glob(".writing-*")), pause_s=0)
    training.processes[1].terminate()
    done = training.wait()
    assert [process.exitcode for process in training.processes] == [75, 75], done.stderr
    assert newest_step(tmp_path) == newest_folder(tmp_path) >= 2
    assert not list((tmp_path / "checkpoints").glob(".*"))


def newest_folder(run_dir: Path) -> int:
    steps = [int(p.name.removeprefix("step-")) for p in run_dir.glob("checkpoints/step-*")]
    return max(steps, default=0)


def data_worker_of(training: Ranks) -> psutil.Process:
    children = psutil.Process(training.processes[0].pid).children()
    return next(p for p in children if "resource_tracker" not in " ".join(p.cmdline()))


def test_a_data_worker_that_is_killed(tmp_path, overrides):
    more = ("data.num_workers=1", "train.steps=9000", "train.save_every=9000")
    training = ranks_of_hybrid(overrides, tmp_path, *more)
    training.until(lambda: len(read_rows(tmp_path)) > 2)
    data_worker_of(training).kill()
    done = training.wait()
    assert [process.exitcode for process in training.processes] == [75, 75], done.stderr
    assert "a process that reads ahead was lost" in done.stderr
    assert newest_step(tmp_path) >= 2


def test_a_data_worker_that_is_asked_to_end(tmp_path, overrides):
    more = ("data.num_workers=1", "train.steps=60", "train.save_every=60")
    training = ranks_of_hybrid(overrides, tmp_path, *more, number=1)
    training.until(lambda: len(read_rows(tmp_path)) > 2)
    data_worker_of(training).terminate()
    done = training.wait()
    assert done.returncode == 0, done.stderr
    assert newest_step(tmp_path) == 60


def test_a_launcher_that_is_killed(tmp_path, overrides):
    """Nobody would restart its ranks or tell them of each other: they save and end."""
    argv = hybrid_command(overrides, tmp_path, "train.steps=4000", "train.save_every=4000")
    process = subprocess.Popen(argv, env=with_fault("none:0:0"), stderr=subprocess.PIPE)
    while len(read_rows(tmp_path)) <= 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    ranks = [p for p in psutil.Process(process.pid).children() if "RANK" in p.environ()]
    assert len(ranks) == NUM_RANKS
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=6000)
    assert not alive
    assert newest_step(tmp_path) >= 2
    process.communicate(timeout=600)


def test_a_run_that_never_comes_further(tmp_path, overrides):
    """The same end before the same checkpoint, started by something that always starts it again."""

    def start(fault: str = "none:0:0") -> subprocess.CompletedProcess[str]:
        more = "train.max_stalled_starts=1"
        return ranks_of_hybrid(overrides, tmp_path, more, fault=fault, number=1).wait()

    for _ in range(2):  # from the start, and from the checkpoint before the fault
        assert start("kill:0:5").returncode == -signal.SIGKILL
    done = start("kill:0:5")
    assert done.returncode == 93
    assert "was started 1 times from step 4 and never came to its next checkpoint" in done.stderr
    (tmp_path / "attempts.json").unlink()
    assert start().returncode == 0


class Clock:
    """Says what it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def watched(timeout_s: float) -> tuple[Watchdog, Clock, list[tuple[str, int]]]:
    clock, ended = Clock(), []
    watchdog = Watchdog(timeout_s, 3, end=lambda *what: ended.append(what), clock=clock)
    return watchdog, clock, ended


def test_a_clock_that_jumps():
    """An hour between two polls, as when a machine slept or a process was stopped, is no hour of
    silence; thirty seconds of polls are."""
    watchdog, clock, ended = watched(timeout_s=30)
    for _ in range(10):
        clock.now_s += 3600
        watchdog.poll()
    assert not ended
    for _ in range(30):
        clock.now_s += 1
        watchdog.poll()
    assert ended[0][1] == 75
    assert ended[0][0].startswith("rank 3 hangs at ")


def test_a_rank_that_is_heard_of_is_left_alone():
    watchdog, clock, ended = watched(timeout_s=30)
    for number in range(200):
        clock.now_s += 1
        watchdog.poll()
        if number % 20 == 0:
            watchdog.heartbeat()
    assert not ended


def test_no_part_reads_the_time_of_day():
    """What decides anything must not follow a clock that people set."""
    sources = [
        p
        for folder in ("dist_contrastive", "launch")
        for p in (CONFIGS.parent / folder).rglob("*.py")
    ]
    assert len(sources) > 100
    for path in sources:
        assert not re.search(r"\btime\.time\(|datetime\.(now|utcnow)", path.read_text()), path


def test_every_row_of_the_table_has_its_test():
    rows = re.findall(r"^\| (?!Fault|--).*\| `(test_\w+)`", DOCS.read_text(), re.MULTILINE)
    tests = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    assert len(rows) >= 14
    for name in rows:
        assert f"def {name}(" in tests, name
