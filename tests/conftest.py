import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

from dist_contrastive import __main__ as entry
from dist_contrastive import checkpoint, ranks
from dist_contrastive import config as configs
from dist_contrastive.data import pack_digits, pack_glyphs, pack_toy
from dist_contrastive.data.packing.toys import TOYS

CONFIGS = Path(__file__).parents[1] / "configs"
HYBRID = CONFIGS / "digits_hybrid.yaml"
SMALL_HYBRID = (
    *("task.encoder={name: residual, widths: [8, 16]}", "task.head={hidden: 16, out: 8}"),
    *("data.global_batch_size=32", "data.balance=null", "train.save_every=2"),
    *("optim.warmup_steps=0", "train.steps=12", "task.reward.function=faulty:reward"),
)
POINTS = {"train_samples": 1280, "test_samples": 256, "samples_per_shard": 160}
DATA_SETS: dict[str, Callable[[Path], object]] = {  # small ones, by the folder that configs name
    "digits": pack_digits,
    "glyphs": partial(pack_glyphs, per_glyph=2),
    **{name: partial(pack_toy, name, **POINTS) for name in TOYS},
}


FIRST = [  # the files that take longest, so that all workers of pytest-xdist end together
    *("test_slurm", "test_launch", "test_faults", "test_trainer", "test_engines", "test_tasks"),
    *("test_hostile", "test_remote", "test_changes", "test_contract", "test_self_check"),
    *("test_kill", "test_doctor", "test_drift", "test_cli", "test_fuzz", "test_force_ranks"),
    *("test_unreadable", "test_supervision_refusals", "test_memory", "test_stream", "test_ledger"),
    *("test_training_benchmark", "test_supervision_benchmark", "test_task_semantics"),
]


TOGETHER = {  # the files whose module has a fixture of seconds: a single worker makes it
    *("test_slurm", "test_engines", "test_tasks", "test_hostile", "test_trainer", "test_drift"),
    *("test_kill", "test_force_ranks", "test_eval", "test_recipes", "test_sample", "test_fuzz"),
    *(
        "test_against_packages",
        "test_glyphs",
        "test_unreadable",
        "test_evaluation",
        "test_evaluating",
    ),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "where tests of a GPU run; cpu: whether they are right themselves"
    parser.addoption("--device", default="cuda", choices=["cuda", "cpu"], help=text)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    return Scheduling(config, log)


class Scheduling(LoadScopeScheduling):
    """Test by test, but for the files of `TOGETHER`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if Path(file).stem in TOGETHER else nodeid


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    last = len(FIRST)
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, last))


@pytest.fixture(autouse=True)
def search_path_of_scripts() -> Iterator[None]:
    """What commands set for the processes that they start ends with the test that ran them."""
    yield
    os.environ.pop("PYTHONSAFEPATH", None)


@pytest.fixture(autouse=True)
def _deterministic():
    """Same numbers in every run, and one thread: the ranks of a test share two cores."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory):
    """What is trusted by these tests is not by who runs them."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def torchmetrics() -> ModuleType:
    """It takes seconds to import, which every worker would do."""
    for name in ("torchmetrics.image.fid", "torchmetrics.image.kid"):
        importlib.import_module(name)
    return importlib.import_module("torchmetrics")


@pytest.fixture(scope="session")
def data_set(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a packed data set, which is made when it is first asked for."""
    root = tmp_path_factory.mktemp("data")

    @cache
    def packed(name: str) -> Path:
        DATA_SETS[name](root / name)
        return root / name

    return packed


@pytest.fixture(scope="session")
def digits(data_set) -> Path:
    """The packed digits: real shards of real images."""
    return data_set("digits")


@pytest.fixture(scope="session")
def overrides(data_set) -> Callable[..., list[str]]:
    """Overrides that make a config short, put it into another folder, and let it read a data set
    of `DATA_SETS`."""

    def make(run_dir: Path, *more: str, data_name: str = "digits") -> list[str]:
        folder = data_set(data_name)
        data = [f"data.train={folder}/train", f"data.test={folder}/test"]
        short = ["data.global_batch_size=64", "train.steps=12", "optim.warmup_steps=2"]
        log = ["train.log_every=1", "train.save_every=5", "train.ledger=true"]
        return [*data, *short, *log, f"run_dir={run_dir}", *more]

    return make


def data_of(config: Path) -> str:
    """The data set that a config reads."""
    return Path(str(configs.load(config).data.train)).parent.name


def command(*args: str | Path, ranks: int | None = None) -> list[str]:
    """`dist-contrastive ARGS`, or with ranks `launch.local ARGS` (a config and overrides)."""
    if ranks is None:
        return [sys.executable, "-m", "dist_contrastive", *map(str, args)]
    return [sys.executable, "-m", "launch.local", *map(str, args), "--ranks", str(ranks)]


def run(argv: list[str], **options) -> subprocess.CompletedProcess[str]:
    """Run to its end, one thread a rank."""
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=600, env=environment(), **options
    )


def wait_for(
    condition: Callable[[], object], timeout_s: float = 240.0, story: Callable[[], str] = lambda: ""
) -> None:
    """Look again and again; the limit ends a hang, and is many times what it takes."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not seen in {timeout_s:g} s; {story()}")
        time.sleep(0.05)


ranks.PRELOADED += ["dist_contrastive.trainer", "dist_contrastive.cli", "deepspeed"]


class Ranks:
    """Processes of `dist-contrastive ARGS`, as srun would start them, each forked from a server
    that has imported torch: that spares seconds a process. No launcher ends the peers of one that
    has failed."""

    def __init__(
        self, *args: str | Path, number: int = 1, env: dict[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(ranks.PRELOADED)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._logs = tempfile.TemporaryDirectory()
        self.argv = ["dist-contrastive", *map(str, args)]
        self.processes = []
        for rank in range(number):
            variables = dict(env or environment())
            if number > 1:
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                variables |= {"WORLD_SIZE": str(number)}
            options = (self.argv, variables, os.getcwd(), self._log(rank))
            self.processes.append(context.Process(target=_forked_rank, args=options))
            self.processes[-1].start()

    def _log(self, rank: int) -> Path:
        return Path(self._logs.name) / str(rank)

    def are_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def said(self) -> str:
        logs = [self._log(rank) for rank in range(len(self.processes))]
        return "".join(log.read_text() for log in logs if log.exists())

    def until(self, condition: Callable[[], object], pause_s: float = 0.01) -> None:
        """Let them train until it holds."""
        deadline = time.monotonic() + 240  # against hangs: many times the usual
        while not condition():
            if time.monotonic() > deadline or not self.are_alive():
                said = self.said()
                self.kill()
                pytest.fail(f"it did not come to that: {said}")
            time.sleep(pause_s)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self._logs.cleanup()

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Their end: the first exit code that is not 0, and what all have said."""
        for process in self.processes:
            process.join(600)
        said = self.said()
        self.kill()  # those that have not ended
        code = next((x.exitcode for x in self.processes if x.exitcode), 0)
        return subprocess.CompletedProcess(self.argv, code, said, said)


def _forked_rank(argv: list[str], env: dict[str, str], cwd: str, log: Path) -> None:
    gc.freeze()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv, sys.path[1:1] = argv, env.get("PYTHONPATH", "").split(os.pathsep)
    torch.set_num_threads(1)
    entry.run()


def run_forked(
    *args: str | Path, number: int = 1, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`dist-contrastive ARGS` on so many ranks to its end."""
    return Ranks(*args, number=number, env=env).wait()


def hybrid_command(
    overrides: Callable[..., list[str]], run_dir: Path, *more: str, ranks: int | None = 2
) -> list[str]:
    """A short run of the hybrid task, with the reward function that makes the faults of
    tests/faulty.py; in one process where ranks is None."""
    options = overrides(run_dir, *SMALL_HYBRID, *more)
    if ranks is None:
        return command("train", HYBRID, *options)
    return command(HYBRID, *options, ranks=ranks)


def with_fault(fault: str) -> dict[str, str]:
    """Environment in which tests/faulty.py makes a fault KIND:RANK:STEP[:FILE]."""
    here = str(Path(__file__).parent)
    return {**environment(), "FAULT": fault, "PYTHONPATH": here}


def run_with_fault(argv: list[str], fault: str = "none:0:0") -> subprocess.CompletedProcess[str]:
    """Run to its end under a fault."""
    return subprocess.run(argv, capture_output=True, text=True, timeout=600, env=with_fault(fault))


def newest_step(run_dir: Path) -> int:
    """Step of the newest whole checkpoint, 0 if there is none."""
    found = checkpoint.newest(run_dir / "checkpoints")
    return 0 if found is None else found.progress.step


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def global_batches(run_dir: Path) -> list[list[str]]:
    """The keys of every step, joined over ranks in their order."""
    ranks = []
    for number in range(len(list((run_dir / "ledger").iterdir()))):
        text = (run_dir / "ledger" / f"rank-{number}.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        ranks.append({line["step"]: line["keys"] for line in lines})
        assert len(ranks[-1]) == len(lines), "a step stands twice in a ledger"
    return [[key for rank in ranks for key in rank.get(step, ())] for step in sorted(ranks[0])]


@contextlib.contextmanager
def refused(error: type[Exception] | tuple[type[Exception], ...], *words: str) -> Iterator[None]:
    """The block raises this error; its message is one line that holds these words."""
    with pytest.raises(error) as raised:
        yield
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def pixels_of(picture: Path) -> np.ndarray:
    """Red, green and blue [height, width, 3], 0 to 255."""
    return np.array(Image.open(picture).convert("RGB")).astype(int)


def num_colours(picture: Path) -> int:
    """How many different ones it has; a blank one has 1."""
    return len(np.unique(pixels_of(picture) @ [1, 256, 65536]))
