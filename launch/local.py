"""Start a config on several ranks of this machine, or of several machines, with torchrun.

The config is checked before any rank starts. The exit code is that of the first rank that failed,
not torchrun's own: 0 done, 64 bad config or data, 70 not finite, 75 stopped early (start it again),
93 no progress. The output of ranks is kept in RUN/logs, too.
"""

import logging
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from dist_contrastive.cli.app import (
    MOST_RANKS,
    ConfigFile,
    MayChange,
    Overrides,
    examples,
    new_app,
    quick_imports,
    run,
)
from dist_contrastive.cli.exit_codes import run_rank
from dist_contrastive.errors import EXIT_RESTART, FINAL_EXIT_CODES, ConfigError
from dist_contrastive.signals import STOP_SIGNALS
from launch.logs import Echo, rank_log
from launch.progress import newest_step
from launch.rendezvous import Rendezvous

_log = logging.getLogger("launch.local")
app = new_app()
_SAME_CAUSE_S = 10  # failures so close together may have one cause


@dataclass
class LocalRun:
    """A config on the ranks of this machine and perhaps of others, and whether to stop it."""

    config: str
    overrides: list[str]
    ranks: int
    machines: int
    endpoint: str | None
    run_dir: Path
    name: str
    change: bool = False
    is_stopping: bool = False

    def forward(self, number: int, _: Any) -> None:
        """Pass a signal on to the ranks, which save and end; torchrun then ends by itself. Another
        signal, which may come when they have ended, changes nothing."""
        ranks = psutil.Process().children()
        for process in ranks:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if not ranks and not self.is_stopping:
            sys.exit(128 + number)
        self.is_stopping = True


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(app, "python -m launch.local", argv)


@app.command(
    help=__doc__,
    epilog=examples(
        "python -m launch.local configs/digits_encoder.yaml --ranks 2 optim.lr=0.001",
        "python -m launch.local CONFIG --ranks 8 --restarts 3",
        "python -m launch.local CONFIG --ranks 8 --machines 2 --rdzv HOST:PORT    (on each of two)",
    ),
)
def _local(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[
        int, typer.Option(min=1, max=MOST_RANKS, help="Processes on this machine.")
    ] = 1,
    restarts: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Start again after a failure, N times in a row without a new checkpoint.",
        ),
    ] = 0,
    machines: Annotated[int, typer.Option(min=1, help="Machines that run this command.")] = 1,
    rdzv: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Rendezvous, on one of the machines.")
    ] = None,
    change: MayChange = False,
) -> int:
    if (machines > 1) != (rdzv is not None):
        raise ConfigError(
            f"--machines {machines} with --rdzv {rdzv}: several machines need both, and the same "
            f"HOST:PORT on each; one machine needs neither"
        )
    overrides = overrides or []
    run_dir = _checked_run_dir(config, overrides, ranks * machines, change)
    name = time.strftime("local-%Y%m%d-%H%M%S")
    local_run = LocalRun(config, overrides, ranks, machines, rdzv, run_dir, name, change)
    return _run(local_run, restarts, Rendezvous(rdzv))


def _checked_run_dir(config: str, overrides: list[str], world_size: int, change: bool) -> Path:
    """The run directory of a config that can be started."""
    with quick_imports():
        from dist_contrastive import trainer
        from dist_contrastive.config import load

    loaded = load(config, overrides)
    trainer.check(loaded, world_size, change)
    return loaded.run_dir


def _run(local_run: LocalRun, restarts: int, rendezvous: Rendezvous) -> int:
    """Start, and start again while that is worth it; returns the exit code of the last start."""
    # More threads than cores would fight; torchrun's own default is 1 however many cores there are.
    threads = max(1, (os.cpu_count() or 1) // local_run.ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    for which in STOP_SIGNALS:
        signal.signal(which, local_run.forward)
    number, left, code = rendezvous.next_start(), restarts, EXIT_RESTART
    while number is not None:
        before = newest_step(local_run.run_dir)
        code = _start(local_run, number)
        step = newest_step(local_run.run_dir)
        left = restarts if step > before else left - 1
        if code in FINAL_EXIT_CODES or local_run.is_stopping or left < 0 or not restarts:
            break
        number = rendezvous.next_start(failed=number)
        if number is not None:
            _log.warning(
                "launch.local: ended with %d; starting again from step %d (start %d)",
                *(code, step, number + 1),
            )
    if code not in FINAL_EXIT_CODES:
        rendezvous.stop()
    return code


def _start(local_run: LocalRun, number: int) -> int:
    """Run all ranks to their end by torchrun; returns the exit code that explains it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    options = [
        *(f"--nproc-per-node={local_run.ranks}", f"--nnodes={local_run.machines}"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={local_run.endpoint or 'localhost:0'}"),
        f"--rdzv-id={number}",  # another rendezvous for each start
        # torchrun would end ranks 30 s after a signal, saved or not: only SIGQUIT is left to it.
        "--signals-to-handle=SIGQUIT",
    ]
    command = ["--module", "dist_contrastive", "train", local_run.config, *local_run.overrides]
    command += ["--change"] if local_run.change else []
    config, entry, args = config_from_args(get_args_parser().parse_args([*options, *command]))
    logs = _log_files(local_run.run_dir / "logs", f"{local_run.name}-{number}")
    config.logs_specs = logs
    try:
        with Echo(lambda: logs.files, _to_console):
            elastic_launch(config=config, entrypoint=entry)(*args)
    except ChildFailedError as error:
        return root_cause([(f.timestamp, f.exitcode) for f in error.failures.values()])
    except RendezvousError as error:
        _log.error(
            "launch.local: the %d machines had no rendezvous at %s, or lost each other (%s)",
            *(local_run.machines, local_run.endpoint),
            (str(error) or type(error).__name__).splitlines()[0],  # stacks of C++ follow
        )
        return EXIT_RESTART
    return 0


def _log_files(folder: Path, name: str) -> Any:
    """torchrun's description of where the output of ranks goes; `files` holds the paths."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest

    from dist_contrastive.trainer.run_dir import writable

    with writable(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)

    class RankLogs(DefaultLogsSpecs):
        files: tuple[Path, ...] = ()

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            ranks = {local: env["RANK"] for local, env in envs.items()}
            out = {local: rank_log(folder, name, rank, "out") for local, rank in ranks.items()}
            err = {local: rank_log(folder, name, rank, "err") for local, rank in ranks.items()}
            self.files = (*out.values(), *err.values())
            stdouts, stderrs = ({k: str(v) for k, v in x.items()} for x in (out, err))
            return replace(super().reify(envs), stdouts=stdouts, stderrs=stderrs)

    return RankLogs()


def _to_console(path: Path, text: str) -> None:
    stream = sys.stdout if path.suffix == ".out" else sys.stderr
    print(text, end="", file=stream, flush=True)


def root_cause(failures: list[tuple[float, int]]) -> int:
    """The exit code that explains the others, of times in seconds and codes: ranks that lose
    another one end with 75, and torchrun kills those that have not ended half a minute later."""
    first = min(time_s for time_s, _ in failures)
    codes = [code for time_s, code in failures if time_s < first + _SAME_CAUSE_S]
    killed = [128 - code for code in codes if code < 0 and code != -signal.SIGTERM]
    raised = [code for code in codes if code > 0 and code != EXIT_RESTART]
    return (killed or raised or [EXIT_RESTART])[0]


if __name__ == "__main__":
    run_rank(main)
