"""Launching without SLURM: scripts and names, ranks of one machine or two, submitit's stand-in."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import (
    CONFIGS,
    command,
    environment,
    global_batches,
    hybrid_command,
    newest_step,
    run,
    run_forked,
    run_with_fault,
    wait_for,
    with_fault,
)

from dist_contrastive import config as configs
from dist_contrastive import ranks, trainer
from dist_contrastive.errors import (
    EXIT_RESTART,
    FINAL_EXIT_CODES,
    ChangedError,
    ConfigError,
    LostRankError,
    UserError,
)
from dist_contrastive.metrics import read_rows
from dist_contrastive.trainer import loop
from launch import local, progress
from launch.logs import Follower
from launch.rendezvous import Rendezvous
from launch.slurm.__main__ import main
from launch.slurm.checks import check_cluster, current_config
from launch.slurm.cluster import JobRecord, add_record, job_state, last_record
from launch.slurm.control import ranks_of
from launch.slurm.options import job_flags, load_options, minutes
from launch.slurm.submission import expand, lead_s

pytestmark = pytest.mark.timeout(900)  # against hangs: ten times the usual
ENCODER = CONFIGS / "digits_encoder.yaml"
PROFILE = CONFIGS / "slurm" / "profile.yaml"
SMALL = (
    *("task.encoder={name: residual, widths: [8, 16]}", "task.head={hidden: 16, out: 8}"),
    *("data.global_batch_size=48", "data.lanes=6", "train.save_every=1000"),
)
STEP = {
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08,11],big1",
}


@pytest.fixture
def fresh_environment(monkeypatch):
    """Of a process that nothing has started, with what a test adds."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "MASTER")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    kept = dict(os.environ)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(kept)


# ------------------------------------------------------------------ which rank a process is


def test_a_process_that_nothing_has_started_is_alone(fresh_environment):
    assert not ranks.join()
    assert "RANK" not in os.environ


def test_a_task_of_a_step_is_a_rank(fresh_environment):
    for name, value in STEP.items():
        fresh_environment.setenv(name, value)
    assert ranks.join()
    found = {x: os.environ[x] for x in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert found == {"RANK": "4", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07"}
    first = os.environ.pop("MASTER_PORT")
    assert 15000 <= int(first) < 30000
    os.environ["SLURM_RESTART_COUNT"] = "1"  # another port after a requeue
    os.environ.pop("LOCAL_RANK")
    assert ranks.join()
    assert os.environ["MASTER_PORT"] != first


def test_torchrun_goes_before_slurm(fresh_environment):
    """It may itself be a task of a step: one on each node."""
    torchrun = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "here"}
    for name, value in {**STEP, **torchrun}.items():
        fresh_environment.setenv(name, value)
    assert ranks.join()
    assert {name: os.environ[name] for name in torchrun} == torchrun


def test_the_only_task_of_a_step_is_alone(fresh_environment):
    """As the shell of `srun --pty bash` is."""
    for name, value in {**STEP, "SLURM_STEP_NUM_TASKS": "1"}.items():
        fresh_environment.setenv(name, value)
    assert not ranks.join()


@pytest.mark.parametrize(
    "left", [{"SLURM_STEP_NUM_TASKS": "2"}, {**STEP, "SLURM_STEP_NUM_TASKS": "2(x2)"}, {**STEP}]
)
def test_a_step_that_is_not_whole_makes_no_rank(left, fresh_environment):
    for name, value in left.items():
        fresh_environment.setenv(name, value)
    fresh_environment.delenv("SLURM_PROCID", raising=False)
    assert not ranks.join()
    assert f"SLURM_STEP_NUM_TASKS={left['SLURM_STEP_NUM_TASKS']}" in ranks.forget()


@pytest.mark.parametrize("is_by_torchrun", [False, True])
def test_the_only_rank_meets_nobody(is_by_torchrun, fresh_environment):
    """An address that is left over would be waited for; torchrun has a store of its own there."""
    only = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "gone.invalid"}
    more = {"TORCHELASTIC_RUN_ID": "1"} if is_by_torchrun else {}
    for name, value in {**only, "MASTER_PORT": "29500", **more}.items():
        fresh_environment.setenv(name, value)
    ranks.check()
    assert (os.environ["MASTER_ADDR"] == "127.0.0.1") != is_by_torchrun
    assert (os.environ["MASTER_PORT"] == "29500") == is_by_torchrun


def test_what_a_job_is_given_goes_before_what_it_would_choose(fresh_environment):
    for name, value in {**STEP, "MASTER_ADDR": "ib-07", "MASTER_PORT": "16001"}.items():
        fresh_environment.setenv(name, value)
    ranks.join()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("ib-07", "16001")


TOO_MANY = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("left", "is_told"),
    [
        ({**TOO_MANY, "MASTER_PORT": "29876"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"}, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False),
        pytest.param({"WORLD_SIZE": "2"}, True, marks=pytest.mark.slow),
        pytest.param({"PMI_SIZE": "2", "PMI_RANK": "1"}, True, marks=pytest.mark.slow),
        pytest.param({"LOCAL_RANK": "0"}, False, marks=pytest.mark.slow),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_variables_that_are_left_over(left, is_told, tmp_path, overrides):
    """Of a shell in a pod, or of another program: the run trains alone, and says so."""
    options = overrides(tmp_path, *SMALL, "train.steps=1")
    done = run_forked("train", ENCODER, *options, env={**environment(), **left})
    assert done.returncode == 0, done.stderr
    assert ("it trains alone" in done.stderr) == is_told
    assert json.loads((tmp_path / "environment.json").read_text())["world_size"] == 1


@pytest.mark.parametrize(
    "wrong", [{"RANK": "4"}, {"WORLD_SIZE": "many"}, {"LOCAL_RANK": ""}, {"MASTER_PORT": "0"}]
)
def test_variables_that_make_no_rank(wrong, tmp_path, overrides):
    rank = {**TOO_MANY, "LOCAL_RANK": "0", "MASTER_PORT": "29876", **wrong}
    options = overrides(tmp_path, *SMALL)
    done = run_forked("train", ENCODER, *options, env={**environment(), **rank})
    assert done.returncode == 64, done.stderr
    name, value = next(iter(wrong.items()))
    assert f"{name}={value}" in done.stderr
    assert "make no rank" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_never_come(rank, tmp_path, overrides, free_port):
    """One that waits says for whom, soon, and ends with a sentence."""
    me = {**TOO_MANY, "RANK": str(rank), "LOCAL_RANK": "0", "MASTER_PORT": str(free_port)}
    options = overrides(tmp_path, *SMALL, "backend.timeout_s=1")
    variables = [f"{name}={value}" for name, value in me.items()]
    done = run(["env", *variables, *command("train", ENCODER, *options)])
    assert done.returncode == EXIT_RESTART
    place = f"127.0.0.1:{free_port}"
    assert f"rank {rank} of 4 waits for the others at {place}, for 61 s at most" in done.stderr
    assert f"rank {rank} of 4 did not meet the others at {place} within 61 s" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("n[007-012,20],m1", "n007"),
        ("r[1-2]n[3,5]-ib", "r1n3-ib"),
        ("127.0.1.[1-2]", "127.0.1.1"),
    ],
)
def test_first_host(nodes, first):
    assert ranks.first_host(nodes) == first


# ------------------------------------------------------------------ what is submitted


def test_sweeps(tmp_path):
    one = expand(["optim.lr=0.1", "task.loss={name: ntxent, temperature: 0.1}", "data.x=[1,2]"])
    assert [name for name, _ in one] == [""]
    names = [name for name, _ in expand(["a.lr=1,2", "b.lr=3,4", "seed=5", "c.d='x,y'"])]
    assert names == ["a.lr=1,b.lr=3", "a.lr=1,b.lr=4", "a.lr=2,b.lr=3", "a.lr=2,b.lr=4"]
    name, overrides = expand(["data.train=a/b,c/d", "seed=1", "seed=2"])[1]
    assert (name, overrides) == ("train=c_d", ["data.train=c/d", "seed=2"])
    (tmp_path / "a,b").touch()
    for one in (
        "run_dir=runs/a,b",
        f"data.train={tmp_path}/a,b",
        "data.train=http://x/0.tar?a=1,2",
    ):
        assert expand([one, "seed=1"]) == [("", [one, "seed=1"])]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=1,2,1", "two runs of the sweep would be seed=1"),
        ("data.train=a/b,a_b", "two runs of the sweep would be train=a_b"),
        (f"data.train=a,{'x' * 300}", "of 306 bytes, above 255"),
    ],
)
def test_sweeps_whose_runs_have_no_folder_of_their_own(override, words):
    with pytest.raises(ConfigError, match=words):
        expand([override])


@pytest.mark.parametrize("name", ["50%job", "a%%b", "back\\slash", "12:30"])
def test_folders_whose_names_mean_something_in_a_job(name, tmp_path, overrides, capsys):
    options = overrides(tmp_path / name, *SMALL)
    assert main(["submit", str(ENCODER), *options, "--dry-run"]) == 64
    told = capsys.readouterr().err
    assert str(tmp_path / name) in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("name", ["exp #2", "it's", "a,b", "größer", "$HOME", "2026-11-28"])
def test_other_names_are_quoted_in_a_job(name, tmp_path, overrides, capsys):
    text = script_of(capsys, *overrides(tmp_path / name, *SMALL))
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    outputs = [line for line in text.splitlines() if line.startswith("#SBATCH --output=")]
    assert [shlex.split(line[8:]) for line in outputs] == [
        [f"--output={tmp_path / name}/logs/%j.batch.log"]
    ]


def test_several_partitions(tmp_path, monkeypatch):
    """SLURM takes the first that has room: one that has what is asked for is enough."""
    rows = "all*|3|8+|gpu:2|infinite", "short|1|8|(null)|30:00", "big|9|64|gpu:a100:8|infinite"
    sinfo = tmp_path / "sinfo"
    sinfo.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    wanted = {"nodes": 4, "time": "2:00:00"}
    check_cluster(load_options(None, {**wanted, "partition": "short,big"}))
    check_cluster(load_options(None, {**wanted, "partition": "big, all"}))
    for names, words in (
        ("short,all", "partition short has 1 nodes.*; --nodes 4: partition all has 3 nodes"),
        ("big,bigger", "--partition bigger is unknown; this cluster has all, big, short"),
        ("big,", "--partition big,: a name is missing"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_cluster(load_options(None, {**wanted, "partition": names}))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("90", 90),
        ("30:00", 30),
        ("1:30:00", 90),
        ("0:00:30", 1),
        ("2-0", 2880),
        ("1-02:03", 1563),
        ("1-02:03:30", 1564),
    ],
)
def test_times(text, found):
    assert minutes(text) == found


def test_lead_time_is_what_a_checkpoint_and_a_step_take():
    assert lead_s(0.0, 0.0) == 60
    assert lead_s(40.0, 5.5) == 60 + 137


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nodse: 2", "nodse is not a known setting; did you mean nodes?"),
        ("time: soon", "time=soon: is no time; write minutes, H:MM:SS or D-HH:MM:SS"),
        ("nodes: 0", "nodes=0"),
        ("- a", "holds no settings; see configs/"),
        ("a: [", "is not YAML: line 1"),
        ("nodes: 1\nnodes: 2", "the key nodes stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ("memory_gb: 1e308", "1000000"),
        (f"time: {'9' * 5000}", "is no time"),
    ],
)
def test_profiles_that_cannot_be_used(text, sentence, tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        load_options(path, {})


def test_flags_go_before_the_profile(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text("{partition: big, gpus_per_node: 4, account: lab, time: 8:00:00}")
    options = load_options(path, job_flags(partition="small", account=None))
    assert (options.partition, options.account, options.world_size) == ("small", "lab", 4)
    assert options.time_min == 480


def script_of(capsys, *arguments: str) -> str:
    assert main(["submit", str(ENCODER), *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path, overrides, capsys):
    """All that the profile of the documentation has, and what submitit would leave out."""
    options = overrides(tmp_path / "run", "data.global_batch_size=64", "data.lanes=16")
    text = script_of(capsys, *options, "--profile", str(PROFILE), "--nodes", "2")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    profile = load_options(PROFILE, {})
    for line in (
        "#SBATCH --nodes=2",
        f"#SBATCH --gpus-per-node={profile.gpus_per_node}",
        f"#SBATCH --ntasks-per-node={profile.gpus_per_node}",
        f"#SBATCH --account={profile.account}",
        f"#SBATCH --constraint={profile.constraint}",
        "#SBATCH --signal=USR2@60",
        "#SBATCH --requeue",
        "#SBATCH --time=480",  # which YAML would have taken for 28800
        "#SBATCH --open-mode=append",
        *profile.setup,
        *(f"export {name}={value}" for name, value in profile.env.items()),
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
    ):
        assert line in text.splitlines(), line
    srun = next(line for line in text.splitlines() if line.startswith("srun "))
    assert "--kill-on-bad-exit=1 --wait=60" in srun
    assert f"{profile.container} {profile.python} -u -m submitit.core._submit" in srun
    assert "CUDA_VISIBLE_DEVICES" not in text
    begin = next(line for line in text.splitlines() if line.startswith("begin "))
    assert f" '{codes()}' " in begin
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_an_array(tmp_path, overrides, capsys):
    options = overrides(tmp_path / "run", "seed=1,2,3", "--parallel", "2")
    assert "#SBATCH --array=0-2%2" in script_of(capsys, *options)


JOB_SCRIPT = Path(progress.__file__).parent / "slurm" / "job.sh"


@pytest.mark.parametrize("code", [0, 1, 2, 64, 70, 75, 93, 137])
@pytest.mark.parametrize("is_cancelled", [False, True])
def test_which_exit_codes_requeue_a_job(code, is_cancelled, tmp_path):
    """All but the final ones, unless the job was cancelled; SLURM sees the code itself."""
    if is_cancelled:
        (tmp_path / "7.cancelled").touch()
    script = f"""
        source {JOB_SCRIPT}
        scontrol() {{ echo "scontrol $*"; }}
        folder={tmp_path} run={tmp_path} job=7 SLURM_JOB_ID=7 final="{codes()}"
        finish {code}
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == code
    is_requeued = code not in FINAL_EXIT_CODES and not is_cancelled
    assert ("scontrol requeue 7" in done.stdout) == is_requeued


def codes() -> str:
    return " ".join(map(str, FINAL_EXIT_CODES))


def test_a_run_that_never_comes_further_is_not_begun_again(tmp_path):
    """Counted by the newest checkpoint, with which the count begins anew."""
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)
    script = f"""
        source {JOB_SCRIPT}
        folder={tmp_path} run={tmp_path} job=7 max_starts=2 at=$(newest)
        count_start
    """
    argv = ["bash", "-c", script]
    assert [subprocess.run(argv, capture_output=True).returncode for _ in range(3)] == [0, 0, 93]
    (tmp_path / "checkpoints" / "step-00000010").mkdir()
    assert subprocess.run(argv, capture_output=True).returncode == 0


def test_errors_end_with_a_final_code_or_that_of_a_restart():
    kinds = [UserError, *UserError.__subclasses__()]
    assert {kind.exit_code for kind in kinds} <= {EXIT_RESTART, *FINAL_EXIT_CODES}
    assert LostRankError.exit_code == EXIT_RESTART not in FINAL_EXIT_CODES


def test_where_there_is_no_slurm(tmp_path, overrides, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", str(ENCODER), *overrides(tmp_path / "run")]) == 64
    told = capsys.readouterr().err
    assert "there is no sbatch on this machine; submit from a login node" in told
    assert "python -m launch.local CONFIG --ranks N" in told


@pytest.mark.parametrize("what", ["status", "logs", "cancel", "resume", "list"])
def test_a_folder_that_is_no_run(what, tmp_path, capsys):
    assert main([what, str(tmp_path)]) == 64
    told = capsys.readouterr().err
    assert str(tmp_path) in told
    assert len(told.strip().splitlines()) == 1


def record_of(job: str, run_dir: Path) -> JobRecord:
    return JobRecord(job, "slurm", "then", str(run_dir), "l", "c.yaml", str(run_dir), {})


def test_a_slurm_that_cannot_be_asked(tmp_path, monkeypatch, capsys):
    """Its jobs are not taken for ended: a second one might begin beside them."""
    record = record_of("7", tmp_path)
    add_record(tmp_path, record)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not job_state(record).has_ended
    assert main(["status", str(tmp_path)]) == 0
    assert "job      7 UNREACHABLE (there is no squeue here)" in capsys.readouterr().out
    assert main(["cancel", str(tmp_path)]) == 64
    assert "scancel --signal=USR2 failed: there is no scancel here" in capsys.readouterr().err


def test_a_table_of_runs_asks_slurm_once(tmp_path, monkeypatch, capsys):
    """squeue for all of them, sacct for those that it has forgotten."""
    answers = {
        "squeue": "7|RUNNING|n1|None|0:10|1:00:00\n8_1|PENDING||Priority|0:00|1:00:00",
        "sacct": "9|CANCELLED by 0|n2|0:20|1:00:00",
    }
    for command_name, answer in answers.items():
        path = tmp_path / command_name
        path.write_text(f"#!/bin/sh\necho $0 $* >> {tmp_path}/calls\necho '{answer}'\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for job in ("7", "8_1", "9", "10"):
        add_record(tmp_path / "runs" / f"of-{job}", record_of(job, tmp_path))
    assert main(["list", str(tmp_path / "runs")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["run", "job", "state", "step", "loss", "samples/s", "left"]
    states = {line[1]: line[2] for line in lines[1:]}
    assert states == {"7": "RUNNING", "8_1": "PENDING", "9": "CANCELLED", "10": "ENDED"}
    squeue, sacct = (tmp_path / "calls").read_text().splitlines()
    assert sorted(re.search(r"-j (\S+)", squeue)[1].split(",")) == ["10", "7", "8_1", "9"]
    assert sorted(re.search(r"-j (\S+)", sacct)[1].split(",")) == ["10", "9"]


def test_status_answers_without_torch():
    code = "import sys, launch.slurm.control; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------ one run in a directory


HOLD = """
    import fcntl, sys
    file = open(sys.argv[1], "a+")
    fcntl.lockf(file, fcntl.LOCK_EX)
    file.write("process 7 on elsewhere 123\\n")
    file.flush()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_directory_that_another_run_writes(tmp_path, overrides):
    options = overrides(tmp_path, *SMALL)
    argv = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "lock")]
    holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    done = run_forked("train", ENCODER, *options)
    assert done.returncode == 64
    expected = f"{tmp_path} is being written by process 7 on elsewhere; wait for its end, or choose"
    assert expected in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()
    holder.kill()  # whatever ends it, its lock is gone
    holder.communicate()
    assert trainer.train(configs.load(ENCODER, options)) == 0
    owner = (tmp_path / "lock").read_text()
    assert re.match(rf"process {os.getpid()} on \S+ [0-9a-f]+\n$", owner)


def test_a_run_that_was_written_while_it_was_opened(tmp_path, overrides, monkeypatch):
    """Between looking for checkpoints and holding the directory another run came and went."""
    config = configs.load(ENCODER, overrides(tmp_path, *SMALL))
    opened = loop.open_run

    def start_slowly(*arguments):
        found = opened(*arguments)
        (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
        return found

    monkeypatch.setattr(loop, "open_run", start_slowly)
    with pytest.raises(ChangedError, match="was written by another run while this one was being"):
        trainer.train(config)


# ------------------------------------------------------------------ launch.local


def test_launch_local_trains_as_its_ranks_alone_and_keeps_what_they_write(tmp_path, overrides):
    alone = overrides(tmp_path / "alone", *SMALL)
    assert run_forked("train", ENCODER, *alone, number=2).returncode == 0
    done = run(command(ENCODER, *overrides(tmp_path / "local", *SMALL), ranks=2))
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in read_rows(tmp_path / n)] for n in ("alone", "local")]
    assert losses[0] == losses[1]
    logs = {p.name.split(".", 1)[1]: p.read_text() for p in (tmp_path / "local/logs").iterdir()}
    assert sorted(logs) == ["rank-0.err", "rank-0.out", "rank-1.err", "rank-1.out"]
    assert "step 12/12" in logs["rank-0.err"]
    assert logs["rank-0.err"] in done.stderr


@pytest.mark.parametrize("num_ranks", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_what_is_said_of_a_run(num_ranks, tmp_path, overrides):
    """A line at the first step, where it is stopped, however often, and at its end; what is shown
    is not always a row of metrics."""
    options = overrides(tmp_path, *SMALL, "train.log_every=1000", "train.steps=1000000")
    argv = command(*([] if num_ranks else ["train"]), ENCODER, *options, ranks=num_ranks)
    told = []
    with subprocess.Popen(
        argv, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr
        for line in process.stderr:
            told.append(line)
            # The second one comes while they end.
            if line.startswith(("step 1/1000000  loss ", "saved at step ")):
                os.killpg(process.pid, signal.SIGINT)
    assert process.returncode == EXIT_RESTART, told
    step = newest_step(tmp_path)
    expected = f"saved at step {step} of 1000000; the same command goes on from there\n"
    assert [line for line in told if "saved at" in line] == [expected]
    assert read_rows(tmp_path) == []


def test_what_is_said_at_the_end(tmp_path, overrides):
    run_dir = tmp_path / "my run"
    options = overrides(run_dir, *SMALL, "train.log_every=5")
    done = run_forked("train", ENCODER, *options)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    assert steps == ["1/12", "5/12", "10/12", "12/12"]
    assert [row["step"] for row in read_rows(run_dir)] == [5, 10, 12]
    commands = f"dist-contrastive eval '{run_dir}' or dist-contrastive export '{run_dir}'"
    assert lines[-1] == f"done: 12 steps; next: {commands}"
    again = run_forked("train", ENCODER, *options, "data.test=null")
    assert f"already; next: dist-contrastive export '{run_dir}'" in again.stderr


def test_restarts(tmp_path, overrides):
    """A rank is killed once; what it lost is done again."""
    argv = [*hybrid_command(overrides, tmp_path, ranks=1), "--restarts", "1"]
    done = run_with_fault(argv, f"kill:0:5:{tmp_path}/happened")
    assert done.returncode == 0, done.stderr
    assert "launch.local: ended with 137; starting again from step 4 (start 2)" in done.stderr
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(1, 13))
    assert len(list((tmp_path / "logs").glob("*-1.rank-0.err"))) == 1


@pytest.mark.slow
def test_restarts_have_an_end(tmp_path, overrides):
    """Always killed at the same step: once more, and no further."""
    argv = [*hybrid_command(overrides, tmp_path), "--restarts", "1"]
    done = run_with_fault(argv, "kill:1:5")
    assert done.returncode == 128 + signal.SIGKILL
    # The first start came to step 4 and counts as progress; the two after it did not.
    assert done.stderr.count("starting again") == 2


@pytest.mark.slow  # nodes of SLURM meet in test_slurm.py
def test_two_machines_meet(tmp_path, overrides, free_port):
    """Two launchers, one rank each, and a rank that is killed: both start again."""
    options = ["--machines", "2", "--rdzv", f"127.0.0.1:{free_port}", "--restarts", "1"]
    argv = [*hybrid_command(overrides, tmp_path, ranks=1), *options]
    env = with_fault(f"kill:1:5:{tmp_path}/happened")
    pair = [
        subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=600)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    assert newest_step(tmp_path) == 12
    assert json.loads((tmp_path / "environment.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ([(0.0, 75), (1.0, -9)], 137),  # killed; the other one lost it and ended first
        ([(0.0, 75), (0.5, 64)], 64),
        ([(0.0, 75), (0.1, 75)], 75),
        ([(0.0, -15), (0.1, 1)], 1),
        ([(0.0, 70), (31.0, -9)], 70),  # torchrun kills those that have not ended
    ],
)
def test_the_exit_code_is_that_of_the_cause(failures, code):
    assert local.root_cause(failures) == code


def test_launchers_agree_on_each_start(free_port):
    """Whichever of them sees a failure first, and until one of them stops."""
    first, second = (Rendezvous(f"127.0.0.1:{free_port}") for _ in range(2))
    assert [first.next_start(), second.next_start()] == [0, 0]
    assert [second.next_start(failed=0), first.next_start(failed=0)] == [1, 1]
    assert [first.next_start(failed=1), second.next_start(failed=1)] == [2, 2]
    first.stop()
    assert second.next_start(failed=2) is None


def test_a_single_launcher_counts_its_starts():
    alone = Rendezvous(None)
    assert [alone.next_start(), alone.next_start(0), alone.next_start(1)] == [0, 1, 2]


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--machines", "2"], "--machines 2 with --rdzv None: several machines need both"),
        (["--machines", "2", "--rdzv", "host"], "--rdzv host is no HOST:PORT; write it as"),
        (["--machines", "2", "--rdzv", "a:b"], "--rdzv a:b is no HOST:PORT; write it as"),
        (["--machines", "2", "--rdzv", "no.invalid:9"], "no.invalid is not known here ("),
        (["--rdzv", "host:1"], "--machines 1 with --rdzv host:1: several machines need both"),
    ],
)
def test_flags_that_do_not_fit(flags, sentence, tmp_path, overrides, capsys):
    assert local.main([str(ENCODER), *overrides(tmp_path / "run"), *flags]) == 64
    assert sentence in capsys.readouterr().err


# ------------------------------------------------------------------ accelerate launch


def accelerate_launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    common = ["--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no"]
    return run([*launcher, *common, *arguments])


@pytest.mark.slow  # its variables are torchrun's, and those of its flags are tested below
def test_accelerate_launch(tmp_path, overrides):
    train = ["-m", "dist_contrastive", "train", str(ENCODER), *overrides(tmp_path, *SMALL)]
    done = accelerate_launch("--multi_gpu", "--mixed_precision", "no", *train)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "environment.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, "starts one of them only; leave --cpu out and give"),
        ({"LOCAL_RANK": "0", "ACCELERATE_MIXED_PRECISION": "bf16"}, "backend.precision=fp32: the"),
        ({"LOCAL_RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true"}, "backend.zero_stage=0: the"),
        ({"LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "true"}, "--use_fsdp with backend.zero_stage="),
        ({"LOCAL_RANK": "0", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "backend.compile=true"),
    ],
)
def test_accelerate_launch_of_what_the_config_does_not_say(
    variables, sentence, tmp_path, overrides, fresh_environment
):
    """Its flags arrive as variables."""
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", **variables}.items():
        fresh_environment.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        trainer.train(configs.load(ENCODER, overrides(tmp_path / "run", *SMALL)))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ submitit without SLURM


def submit_here(overrides: list[str], *flags: str, ranks: int = 2) -> None:
    fixed = ["--cluster", "local", "--tasks-per-node", str(ranks), "--no-doctor"]
    submit = [sys.executable, "-m", "launch.slurm", "submit", str(ENCODER)]
    env = {**environment(), "PYTHONPATH": str(CONFIGS.parent)}
    done = subprocess.run([*submit, *overrides, *fixed, *flags], env=env, stdout=subprocess.DEVNULL)
    assert done.returncode == 0


def await_step(run_dir: Path, step: int) -> None:
    wait_for(lambda: progress.read_progress(run_dir).step >= step, story=lambda: told_by(run_dir))


@pytest.mark.slow  # a job that is told to save goes on below, and on a real SLURM in test_slurm.py
@pytest.mark.parametrize("limit", ["told", "hit"])
def test_a_chain_of_time_limits(limit, tmp_path, overrides, capsys):
    """Told to save, requeued, finished; nothing lost or repeated. Told by this test as submitit
    tells it before the limit, or by submitit itself, half a minute after each start."""
    run_dir = tmp_path / "run"
    steps = 60 if limit == "told" else 1200
    options = overrides(run_dir, *SMALL, f"train.steps={steps}", "data.num_workers=1")
    limits = ("60", "5") if limit == "told" else ("1", "30")
    submit_here(options, "--time", limits[0], "--signal-lead-s", limits[1])
    if limit == "told":
        await_step(run_dir, 5)
        for process in ranks_of(last_record(run_dir)):
            process.send_signal(signal.SIGUSR2)
    await_step(run_dir, steps)
    assert main(["logs", str(run_dir), "-f"]) == 0  # to its end
    assert f"step {steps}/{steps}" in capsys.readouterr().out
    assert told_by(run_dir).count("going on from step") == 1 or limit == "hit"
    alone = tmp_path / "alone"
    assert trainer.train(configs.load(ENCODER, [*options, f"run_dir={alone}"])) == 0
    found, expected = ([row["loss"] for row in read_rows(x)] for x in (run_dir, alone))
    assert found == pytest.approx(expected, abs=1e-4)
    assert global_batches(run_dir) == global_batches(alone)
    capsys.readouterr()
    assert main(["status", str(run_dir)]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"^job      \d+ COMPLETED\nstep     {steps} of {steps}, ", told, re.MULTILINE)


def told_by(run_dir: Path) -> str:
    return "".join(p.read_text() for p in last_record(run_dir).log_files(0) if p.exists())


def test_a_job_that_changes_its_run(tmp_path, overrides, capsys, monkeypatch):
    """With more steps and another rate, then told to save and requeued: the change is made once;
    later jobs go on with what the run is by then, and save when they are cancelled. Modules in the
    current folder that no config names have no part in them."""
    project, run_dir = tmp_path / "project", tmp_path / "run"
    project.mkdir()
    (project / "sitecustomize.py").write_text("raise SystemExit('code of the folder')\n")
    monkeypatch.chdir(project)
    options = overrides(run_dir, *SMALL, "train.steps=4")
    assert trainer.train(configs.load(ENCODER, options)) == 0
    changed = [*options, "train.steps=60", "optim.lr=0.01"]
    assert main(["submit", str(ENCODER), *changed, "--cluster", "local", "--no-doctor"]) == 64
    assert "--change" in capsys.readouterr().err
    submit_here(changed, "--change", ranks=1)
    await_step(run_dir, 8)
    for process in ranks_of(last_record(run_dir)):
        process.send_signal(signal.SIGUSR2)
    await_step(run_dir, 60)
    await_end(run_dir)
    assert trainer.train(ENCODER, overrides=[*options, "train.steps=61", "optim.lr=0.01"]) == 0
    resume_here(run_dir, "train.steps=100000")
    await_step(run_dir, 62)
    capsys.readouterr()
    assert main(["cancel", str(run_dir)]) == 0
    saved = newest_step(run_dir)
    assert f"has saved step {saved} and ended" in capsys.readouterr().out
    assert saved >= 62
    assert main(["cancel", str(run_dir)]) == 0
    assert "has ended already" in capsys.readouterr().out
    assert "code of the folder" not in told_by(run_dir)
    assert main(["status", str(run_dir)]) == 0
    told = capsys.readouterr().out
    assert "changed  from step 4 on: optim.lr: 0.002 -> 0.01; train.steps: 4 -> 60" in told
    assert "changed  from step 60 on: train.steps: 60 -> 61" in told
    assert "changed  from step 61 on: train.steps: 61 -> 100000" in told
    assert [row["step"] for row in read_rows(run_dir)] == list(range(1, saved + 1))


def resume_here(run_dir: Path, *more: str) -> None:
    resume = [sys.executable, "-m", "launch.slurm", "resume", str(run_dir), "--no-doctor", *more]
    # No pipe, which would last as long as the job.
    assert subprocess.run(resume, env=environment(), stdout=subprocess.DEVNULL).returncode == 0


def await_end(run_dir: Path) -> None:
    wait_for(lambda: job_state(last_record(run_dir)).has_ended, story=lambda: told_by(run_dir))


def test_a_change_that_was_submitted_and_never_begun_is_not_forgotten(tmp_path, overrides):
    """The config with which a run is resumed: the later one of what was submitted and what ran."""
    run_dir, options = tmp_path / "run", overrides(tmp_path / "run", *SMALL)
    (tmp_path / "job").mkdir()
    first, other = configs.load(ENCODER, options), configs.load(ENCODER, [*options, "optim.lr=1"])
    run_dir.mkdir()
    record = JobRecord("1", "slurm", "", "", "", f"{tmp_path}/job/config.yaml", "", {}, True)

    def written(config: configs.RunConfig, folder: Path, at_s: int) -> None:
        configs.save(config, folder)
        os.utime(folder / "config.yaml", (at_s, at_s))

    written(other, tmp_path / "job", 100)
    assert current_config(run_dir, record, False) == (other, True)  # the run has not begun
    written(first, run_dir, 50)
    assert current_config(run_dir, record, False) == (other, True)
    written(other, run_dir, 150)
    assert current_config(run_dir, record, False) == (other, False)
    written(first, run_dir, 200)  # changed back by hand
    assert current_config(run_dir, record, False) == (first, False)
    (tmp_path / "job" / "config.yaml").unlink()
    assert current_config(run_dir, record, False) == (first, False)


# ------------------------------------------------------------------ small parts


def test_progress_of_a_run(tmp_path, overrides):
    assert progress.read_progress(tmp_path).left_s is None
    config = configs.load(ENCODER, overrides(tmp_path, *SMALL))
    assert trainer.train(config, stop_after=7) == 75
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8')  # not whole yet
    found = progress.read_progress(tmp_path)
    assert (found.step, found.saved, found.steps) == (7, 7, 12)
    assert found.left_s == pytest.approx(5 * read_rows(tmp_path)[-1]["step_s"])


def test_follower_gives_whole_lines_in_the_order_of_writing(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    follower = Follower()
    assert follower.read([a, b]) == []
    a.write_text("one\ntw")
    assert follower.read([a, b]) == [(a, "one\n")]
    b.write_text("other\n")
    os.utime(b, ns=(1, 1))  # written before
    a.write_text("one\ntwo\nthr")
    assert follower.read([a, b]) == [(b, "other\n"), (a, "two\n")]
    assert follower.read([a, b], to_end=True) == [(a, "thr")]


def test_a_signal_before_training_is_not_lost():
    """A job listens from its first instant: what comes while it starts up stops it later."""
    code = """
        import os, signal
        from dist_contrastive import signals
        signals.listen()
        os.kill(os.getpid(), signal.SIGUSR2)
        with signals.stop_flag() as received:
            assert received == [signal.SIGUSR2], received
        os.kill(os.getpid(), signal.SIGTERM)
        with signals.stop_flag() as received:
            assert received == [signal.SIGUSR2, signal.SIGTERM], received
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == 0
