"""Start a config on several ranks of this machine, or of several machines, with torchrun.

    python -m launch.local CONFIG --ranks 2 [key=value ...]
    python -m launch.local CONFIG --ranks 8 --machines 2 --rdzv HOST:PORT    on each of the two

The config is checked before any rank starts. The exit code is that of the first rank that failed,
not torchrun's own: 0 done, 64 bad config or data, 70 not finite, 75 stopped early (start it again),
93 no progress. What ranks write is kept in RUN/logs, too.
"""

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from dist_contrastive.cli.ending import reporting_errors
from dist_contrastive.errors import ConfigError
from dist_contrastive.signals import STOP_SIGNALS
from launch.ends import EXIT_REQUEUE, FINAL
from launch.logs import Echo, rank_log
from launch.meeting import Meeting
from launch.progress import newest_step

_TOGETHER_S = 10


@dataclass
class Ranks:
    """What is to be started, and what became of it."""

    config: str
    overrides: list[str]
    ranks: int
    machines: int
    rdzv: str | None
    run_dir: Path
    name: str
    asked_to_stop: bool = False

    def forward(self, number: int, _: Any) -> None:
        """Pass a signal on to the ranks, which save and end; torchrun then ends by itself."""
        self.asked_to_stop = True
        ranks = psutil.Process().children()
        for process in ranks:
            process.send_signal(number)
        if not ranks:
            sys.exit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """Parse arguments, check the config, run; returns the exit code."""
    args = _parser().parse_intermixed_args(argv)
    with reporting_errors() as outcome:
        _check_meeting(args.machines, args.rdzv)
        started = Ranks(
            args.config,
            args.overrides,
            args.ranks,
            args.machines,
            args.rdzv,
            _check(args.config, args.overrides, args.ranks * args.machines),
            time.strftime("local-%Y%m%d-%H%M%S"),
        )
        outcome.code = _run(started, args.restarts, Meeting(args.rdzv))
    return outcome.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.local",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--ranks", type=_positive, default=1, help="processes on this machine")
    parser.add_argument(
        "--restarts",
        type=_count,
        default=0,
        metavar="N",
        help="start again after a failure, N times in a row without a new checkpoint (default 0)",
    )
    parser.add_argument("--machines", type=_positive, default=1, help="that run this command")
    parser.add_argument("--rdzv", metavar="HOST:PORT", help="where they meet: one of them")
    return parser


def _check_meeting(machines: int, rdzv: str | None) -> None:
    if (machines > 1) != (rdzv is not None):
        raise ConfigError(
            f"--machines {machines} with --rdzv {rdzv}: several machines need both, and the same "
            f"HOST:PORT on each; one machine needs neither"
        )


def _check(config: str, overrides: list[str], world_size: int) -> Path:
    """The run directory of a config that can be started."""
    from dist_contrastive import trainer
    from dist_contrastive.config import load

    loaded = load(config, overrides)
    trainer.check(loaded, world_size)
    return loaded.run_dir


def _run(started: Ranks, restarts: int, meeting: Meeting) -> int:
    """Start, and start again while that is worth it; returns the exit code of the last start."""
    # More threads than cores would fight; torchrun's own default is 1 however many cores there are.
    threads = max(1, (os.cpu_count() or 1) // started.ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    for which in STOP_SIGNALS:
        signal.signal(which, started.forward)
    number, left, code = meeting.next_start(), restarts, EXIT_REQUEUE
    while number is not None:
        before = newest_step(started.run_dir)
        code = _start(started, number)
        step = newest_step(started.run_dir)
        left = restarts if step > before else left - 1
        if code in FINAL or started.asked_to_stop or left < 0 or not restarts:
            break
        number = meeting.next_start(failed=number)
        if number is not None:
            told = f"ended with {code}; starting again from step {step} (start {number + 1})"
            print(f"launch.local: {told}", file=sys.stderr, flush=True)
    if code not in FINAL:
        meeting.stop()
    return code


def _start(started: Ranks, number: int) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    folder, name = started.run_dir / "logs", f"{started.name}-{number}"
    options = [
        *(f"--nproc-per-node={started.ranks}", f"--nnodes={started.machines}"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={started.rdzv or 'localhost:0'}"),
        f"--rdzv-id={number}",  # machines meet anew for each start
        # torchrun would end ranks 30 s after a signal, saved or not: only SIGQUIT is left to it.
        "--signals-to-handle=SIGQUIT",
    ]
    command = ["--module", "dist_contrastive", "train", started.config, *started.overrides]
    config, entry, args = config_from_args(get_args_parser().parse_args([*options, *command]))
    logs = _in_files(folder, name)
    config.logs_specs = logs
    try:
        with Echo(lambda: logs.files, _to_console):
            elastic_launch(config=config, entrypoint=entry)(*args)
    except ChildFailedError as error:
        return _cause([(f.timestamp, f.exitcode) for f in error.failures.values()])
    except RendezvousError as error:
        told = (str(error) or type(error).__name__).splitlines()[0]  # stacks of C++ follow
        text = f"the {started.machines} machines did not meet at {started.rdzv}, or lost each other"
        print(f"launch.local: {text} ({told})", file=sys.stderr, flush=True)
        return EXIT_REQUEUE
    return 0


def _in_files(folder: Path, name: str) -> Any:
    """Where torchrun is to put what ranks write."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest

    from dist_contrastive.trainer.describing import writable

    with writable(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)

    class InFiles(DefaultLogsSpecs):
        files: tuple[Path, ...] = ()

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            ranks = {local: env["RANK"] for local, env in envs.items()}
            out = {local: rank_log(folder, name, rank, "out") for local, rank in ranks.items()}
            err = {local: rank_log(folder, name, rank, "err") for local, rank in ranks.items()}
            self.files = (*out.values(), *err.values())
            stdouts, stderrs = ({k: str(v) for k, v in x.items()} for x in (out, err))
            return replace(super().reify(envs), stdouts=stdouts, stderrs=stderrs)

    return InFiles()


def _to_console(path: Path, text: str) -> None:
    print(
        text,
        end="",
        file=sys.stdout if path.suffix == ".out" else sys.stderr,
        flush=True,
    )


def _cause(failures: list[tuple[int, int]]) -> int:
    """The exit code that explains the others, of times in seconds and codes: ranks that lose
    another one end with 75, and torchrun kills those that have not ended half a minute later."""
    first = min(time_s for time_s, _ in failures)
    codes = [code for time_s, code in failures if time_s < first + _TOGETHER_S]
    killed = [128 - code for code in codes if code < 0 and code != -signal.SIGTERM]
    raised = [code for code in codes if code > 0 and code != EXIT_REQUEUE]
    return (killed or raised or [EXIT_REQUEUE])[0]


def _positive(text: str) -> int:
    return _at_least(1, text)


def _count(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is below {least}; use {least} or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
