"""Jobs of a real SLURM: several nodes, gloo between their ranks, every way to be interrupted."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import CONFIGS, command, global_batches, run_forked, wait_for
from slurm_cluster import Cluster, cluster, last_step, submit

from dist_contrastive import checkpoint, trainer
from dist_contrastive import config as configs
from dist_contrastive.metrics import read_rows
from launch.slurm.__main__ import main
from launch.slurm.cluster import last_record

pytestmark = pytest.mark.timeout(900)  # against hangs: ten times the usual
ENCODER = CONFIGS / "digits_encoder.yaml"
SMALL = (
    *("task.encoder={name: residual, widths: [8, 16]}", "task.head={hidden: 16, out: 8}"),
    *("data.global_batch_size=48", "data.lanes=6", "train.save_every=1000", "seed=3"),
)
TWO_NODES = ("--nodes", "2", "--tasks-per-node", "1")


@pytest.fixture(scope="module")
def slurm():
    with cluster() as started:
        yield started


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run_dir)]


def reference(run_dir: Path, options: list[str]) -> Path:
    """The same run in one process that nothing interrupts."""
    assert trainer.train(configs.load(ENCODER, [*options, f"run_dir={run_dir}"])) == 0
    return run_dir


def assert_same_run(found: Path, expected: Path) -> None:
    """Every step once, on the same samples, with the same losses."""
    steps = [row["step"] for row in read_rows(found)]
    assert steps == list(range(1, len(steps) + 1))
    assert losses(found) == pytest.approx(losses(expected), abs=1e-4)
    assert global_batches(found) == global_batches(expected)


@pytest.mark.slow  # two nodes are compared with one process below, too
def test_two_nodes_train_what_one_machine_and_one_process_do(slurm, tmp_path, overrides):
    """The demo's encoder, over gloo, 2 nodes x 2 ranks."""
    options = overrides(tmp_path, "data.global_batch_size=256", "train.steps=20")
    there, here = tmp_path / "slurm", tmp_path / "here"
    submit(ENCODER, *options, f"run_dir={there}", "--nodes", "2", "--tasks-per-node", "2")
    slurm.await_state(there, "COMPLETED")
    done = run_forked("train", ENCODER, *options, f"run_dir={here}", number=4)
    assert done.returncode == 0, done.stderr
    alone = reference(tmp_path / "alone", options)
    assert_same_run(there, alone)
    assert_same_run(here, alone)
    told = json.loads((there / "environment.json").read_text())
    assert (told["world_size"], told["machine"]) == (4, slurm_name(slurm, 1))


def slurm_name(slurm: Cluster, number: int) -> str:
    """Of a machine: nodes that are not namespaces have the name of this one."""
    mode = os.environ["EMU_MODE"]
    return os.uname().nodename if mode == "plain" else f"n{number}"


def test_a_run_that_is_requeued_cancelled_and_resumed(slurm, tmp_path, overrides, capsys):
    """Nothing is lost and nothing is done twice, also on another number of nodes. Its folder has
    marks in its name, and a second job is refused: when it is submitted, and if it gets in
    otherwise, when it starts."""
    run_dir = tmp_path / 'exp #2, it\'s "50" (größer) $HOME'
    options = overrides(run_dir, *SMALL, "train.steps=100000", "optim.final_lr_ratio=1")
    submit(ENCODER, *options, *TWO_NODES, "--partition", "short,low", "--time", "10")
    slurm.await_step(run_dir, 5)
    identity, job = (run_dir / "run_id").read_text(), last_record(run_dir).job
    second = run_forked("train", ENCODER, *options)
    assert second.returncode == 64
    expected = rf"is being written by SLURM job {job} of process \d+ on \S+; wait for"
    assert re.search(expected, second.stderr), second.stderr
    slurm.ask("scontrol", "requeue", job)  # by an administrator
    slurm.await_state(run_dir, "PENDING")
    requeued_at = saved(run_dir)
    slurm.await_step(run_dir, requeued_at + 5)
    capsys.readouterr()
    assert main(["submit", str(ENCODER), *options, "--no-doctor"]) == 64
    assert f"{run_dir} has job {job} already (RUNNING); wait for it" in capsys.readouterr().err
    assert main(["cancel", str(run_dir)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"job \d+ has saved step \d+ and ended", told), told
    assert 0 < requeued_at < saved(run_dir)
    assert main(["status", str(run_dir)]) == 0
    assert re.search(r"^job      \d+ CANCELLED on ", capsys.readouterr().out, re.MULTILINE)
    written = {path.name for path in (run_dir / "logs").iterdir()}
    assert {f"{job}.batch.log", f"{job}.rank-0.out", f"{job}.rank-1.err"} <= written
    shorter = f"train.steps={saved(run_dir) + 20}"
    flags = ("--no-doctor", "--change", "--nodes", "1")
    assert main(["resume", str(run_dir), shorter, *flags]) == 0
    slurm.await_state(run_dir, "COMPLETED")
    assert_same_run(run_dir, reference(tmp_path / "alone", [*options, shorter]))
    assert (run_dir / "run_id").read_text() == identity  # one run for trackers
    assert len(list((run_dir / "tensorboard").iterdir())) >= 1


@pytest.mark.slow  # a job is requeued in the test above, too
def test_a_run_that_is_preempted(slurm, tmp_path, overrides):
    """Data workers live through every signal."""
    run_dir = tmp_path / "run"
    options = overrides(run_dir, *SMALL, "train.steps=100", "data.num_workers=1")
    submit(ENCODER, *options, *TWO_NODES, "--partition", "low")
    slurm.await_step(run_dir, 5)
    slurm.ask("sbatch", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    wait_for(lambda: slurm.restarts(run_dir) == 1, 120, lambda: slurm.story(run_dir))
    assert 0 < saved(run_dir) < 100
    slurm.await_state(run_dir, "COMPLETED")
    assert_same_run(run_dir, reference(tmp_path / "alone", options))


def saved(run_dir: Path) -> int:
    found = checkpoint.newest(run_dir / "checkpoints")
    return 0 if found is None else found.progress.step


@pytest.mark.slow  # a job is cancelled in the test above, too
def test_scancel_saves(slurm, tmp_path, overrides):
    """SLURM's own command: SIGTERM to all, and SIGKILL after KillWait."""
    run_dir = tmp_path / "run"
    submit(ENCODER, *overrides(run_dir, *SMALL, "train.steps=100000"), *TWO_NODES)
    slurm.await_step(run_dir, 3)
    slurm.ask("scancel", last_record(run_dir).job)
    slurm.await_state(run_dir, "CANCELLED")
    wait_for(lambda: saved(run_dir) >= 3, 120)
    assert saved(run_dir) == last_step(run_dir)


@pytest.mark.slow
def test_a_sweep_runs_two_at_a_time(slurm, tmp_path, overrides, capsys):
    """An array of four, and a table of what came out."""
    root = tmp_path / "sweep"
    options = overrides(root, *SMALL, "optim.lr=0.001,0.002", "data.global_batch_size=48,96")
    submit(ENCODER, *options, "--parallel", "2")
    runs = sorted(p.parent for p in root.glob("*/jobs.jsonl"))
    names = [p.name for p in runs]
    assert names == [f"lr={lr},global_batch_size={b}" for lr in (0.001, 0.002) for b in (48, 96)]
    array = last_record(runs[0]).job.split("_")[0]
    most = 0

    def all_done() -> bool:
        nonlocal most
        told = slurm.ask("squeue", "-h", "-a", "-r", "-t", "all", "-j", array, "-o", "%T").split()
        most = max(most, told.count("RUNNING"))
        return told == ["COMPLETED"] * 4

    wait_for(all_done, 150, lambda: slurm.story(runs[0]))
    assert most == 2
    capsys.readouterr()
    assert main(["list", str(root), "--metric", "loss", "lr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "job", "state", "step", "loss", "lr", "samples/s", "left"]
    for line, run_dir, name in zip(lines[1:], runs, names, strict=True):
        cells = line.split()
        assert cells[:4] == [name, last_record(run_dir).job, "COMPLETED", "12/12"]
        assert float(cells[4]) == pytest.approx(losses(run_dir)[-1], abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--partition", "nowhere"], "--partition nowhere is unknown; this cluster has all, high"),
        (
            ["--partition", "short", "--time", "2:00:00"],
            "partition short allows 30:00; ask for that",
        ),
        (["--nodes", "9"], "--nodes 9: the default partition has 3 nodes; ask for 3 or fewer"),
        (["--gpus-per-node", "3"], "--gpus-per-node 3: the largest node of the default partition"),
        (["--cpus-per-task", "99"], "has 16 CPUs; ask for 16 or fewer"),
        (["--nodes", "2", "--memory-gb", "999"], "sbatch does not take the job: "),
        (
            ["--time", "1", "--signal-lead-s", "60"],
            "--time 1: a job gets the signal to save 60 s before",
        ),
        (["--nodes", "3", "--tasks-per-node", "3"], "lanes=6 is not divisible by world_size=9"),
        (["optim.magic=1"], "optim.magic is not a known setting"),
    ],
)
def test_what_is_refused_before_it_waits(flags, sentence, slurm, tmp_path, overrides, capsys):
    arguments = [str(ENCODER), *overrides(tmp_path / "run", *SMALL), "--no-doctor", *flags]
    assert main(["submit", *arguments]) == 64
    told = capsys.readouterr().err
    assert sentence in told
    assert len(told.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "jobs.jsonl").exists()


@pytest.mark.slow  # what SLURM tells a rank: test_launch.py; nodes that meet: above
def test_srun_alone(slurm, tmp_path, overrides):
    """Without our script: ranks find each other by what SLURM tells them."""
    argv = command("train", ENCODER, *overrides(tmp_path / "run", *SMALL))
    done = subprocess.run(
        ["srun", "-N2", "--ntasks-per-node=1", *argv], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert told["world_size"] == 2


@pytest.mark.slow
def test_a_time_limit_that_is_hit_again_and_again(slurm, tmp_path, overrides):
    """Saved, requeued, finished; SLURM's shortest limit is a minute."""
    run_dir = tmp_path / "run"
    options = overrides(run_dir, *SMALL, "train.steps=1500", "data.num_workers=2")
    submit(ENCODER, *options, *TWO_NODES, "--time", "1", "--signal-lead-s", "15")
    slurm.await_state(run_dir, "COMPLETED", 800)
    assert slurm.restarts(run_dir) >= 1
    assert_same_run(run_dir, reference(tmp_path / "alone", options))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["n1", "n2"], ids=["first_node", "other_node"])
def test_a_node_that_dies(victim, slurm, tmp_path, overrides):
    """A power cut: its ranks and its daemon are gone, the rest end within a minute."""
    if os.environ["EMU_MODE"] == "plain":
        pytest.skip("nodes that are no namespaces of their own cannot be cut off (needs root)")
    run_dir = tmp_path / "run"
    options = overrides(run_dir, *SMALL, "train.steps=600", "train.save_every=20")
    submit(ENCODER, *options, *TWO_NODES)
    slurm.await_step(run_dir, 60)
    slurm.ask("emu-node", "kill", victim)
    try:
        wait_for(lambda: not ranks_of(run_dir), 120)  # SLURM kills them after a minute
        slurm.await_state(run_dir, "COMPLETED", 400)
    finally:
        slurm.ask("emu-node", "start", victim)
    assert slurm.restarts(run_dir) == 1
    assert_same_run(run_dir, reference(tmp_path / "alone", options))


def ranks_of(run_dir: Path) -> list[str]:
    """Processes that train in a run directory."""
    found = subprocess.run(["pgrep", "-f", f"_submit {run_dir}/jobs"], capture_output=True)
    pids = found.stdout.decode().split()
    return [p for p in pids if "srun" not in Path(f"/proc/{p}/comm").read_text()]


@pytest.mark.slow
def test_a_run_directory_that_nodes_do_not_share(slurm, tmp_path, overrides):
    """Seen by the script before any rank starts; and by ranks that got further."""
    if os.environ["EMU_MODE"] == "plain":
        pytest.skip("nodes that are no namespaces of their own have no mounts of their own")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with hidden_on(slurm, "n2", run_dir):
        submit(ENCODER, *overrides(run_dir, *SMALL), *TWO_NODES)
        slurm.await_state(run_dir, "FAILED")
        log = last_record(run_dir).log_files(0)[0].read_text()
        assert re.search(r"node n2: \S+ is not there; put run_dir on a file system that", log), log
        assert "ended with exit code 64" in log
        argv = command("train", ENCODER, *overrides(run_dir, *SMALL))
        done = subprocess.run(
            ["srun", "-N2", "--ntasks-per-node=1", *argv],
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert done.returncode == 64
    assert f"run_dir={run_dir} on n2 is not the folder that n1 writes to" in done.stderr


class hidden_on:
    """An empty file system over a folder, on one node only."""

    def __init__(self, slurm: Cluster, node: str, folder: Path) -> None:
        self._enter = ["nsenter", "-m", "-t", slurm.ask("emu-node", "pid", node)]
        self._folder = str(folder)

    def __enter__(self) -> None:
        subprocess.run([*self._enter, "mount", "-t", "tmpfs", "none", self._folder], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run([*self._enter, "umount", self._folder], check=True)


@pytest.mark.slow
def test_a_python_that_nodes_do_not_have(slurm, tmp_path, overrides):
    run_dir = tmp_path / "run"
    for python in ("/nowhere/python", "/usr/bin/python3"):
        submit(ENCODER, *overrides(run_dir, *SMALL), *TWO_NODES, "--python", python)
        slurm.await_state(run_dir, "FAILED")
        log = last_record(run_dir).log_files(0)[0].read_text()
        expected = rf'node \S+: "{python}" is no Python that has torch submitit dist_contrastive;'
        assert re.search(expected, log), log


@pytest.mark.slow
def test_a_run_that_never_comes_further_is_not_requeued_for_ever(slurm, tmp_path, overrides):
    """Killed before its first checkpoint, each time."""
    run_dir = tmp_path / "run"
    options = overrides(run_dir, *SMALL, "train.steps=100000", "train.max_stalled_starts=2")
    submit(ENCODER, *options, *TWO_NODES)
    for restarts in range(2):
        wait_for(lambda n=restarts: slurm.restarts(run_dir) == n and ranks_of(run_dir), 120)
        subprocess.run(["kill", "-KILL", *ranks_of(run_dir)], check=True)
    slurm.await_state(run_dir, "FAILED")
    log = last_record(run_dir).log_files(0)[0].read_text()
    assert "started 2 times without coming to another checkpoint (the newest one: none;" in log
    job = last_record(run_dir).job
    assert "ExitCode=93:0" in slurm.ask("scontrol", "show", "job", job)


@pytest.mark.slow
@pytest.mark.parametrize("accounting", ["0", "1"], ids=["without", "with"])
def test_what_is_known_of_a_job_that_slurm_has_forgotten(accounting, tmp_path, overrides, capsys):
    """With accounting its state; without, what the run directory tells."""
    settings = {"EMU_DBD": accounting, "EMU_MIN_JOB_AGE": "2"}
    run_dir = tmp_path / "run"
    with cluster(1, **settings) as slurm:
        submit(ENCODER, *overrides(run_dir, *SMALL))
        job = last_record(run_dir).job
        forgotten = ["squeue", "-h", "-t", "all", "-j", job]
        wait_for(lambda: subprocess.run(forgotten, capture_output=True).returncode, 180)
        capsys.readouterr()
        assert main(["status", str(run_dir)]) == 0
        told = capsys.readouterr().out
        assert re.search(rf"^job      {job} COMPLETED", told, re.MULTILINE), told
        assert (" on n1" in told) == (accounting == "1")
        assert slurm.folder.exists()
