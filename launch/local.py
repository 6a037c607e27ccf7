"""Start a config on several ranks of this machine, with torchrun.

    python -m launch.local CONFIG --ranks 2 [key=value ...]

The config is checked before any rank starts. The exit code is that of the first rank that failed,
not torchrun's own: 0 done, 64 bad config or data, 70 not finite, 75 stopped early (start it again),
93 no progress.
"""

import argparse
import os
import signal
import sys
from typing import Any

import psutil

from dist_contrastive.cli.ending import reporting_errors
from dist_contrastive.signals import STOP_SIGNALS

EXIT_REQUEUE = 75
_TOGETHER_S = 10


def main(argv: list[str] | None = None) -> int:
    """Parse arguments, check the config, run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.local", description=__doc__)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--ranks", type=_positive, default=1, help="processes on this machine")
    args = parser.parse_intermixed_args(argv)
    with reporting_errors() as outcome:
        _check(args.config, args.overrides, args.ranks)
        outcome.code = _run(args.config, args.overrides, args.ranks)
    return outcome.code


def _check(config: str, overrides: list[str], ranks: int) -> None:
    from dist_contrastive import trainer
    from dist_contrastive.config import load

    trainer.check(load(config, overrides), ranks)


def _run(config: str, overrides: list[str], ranks: int) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    # More threads than cores would fight; torchrun's own default is 1 however many cores there are.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # torchrun would end ranks 30 s after a signal, saved or not: only SIGQUIT is left to it.
    options = ["--standalone", f"--nproc-per-node={ranks}", "--signals-to-handle=SIGQUIT"]
    command = [*options, "--module", "dist_contrastive", "train", config, *overrides]
    for number in STOP_SIGNALS:
        signal.signal(number, _forward)
    try:
        run(get_args_parser().parse_args(command))
    except ChildFailedError as error:
        return _cause([(f.timestamp, f.exitcode) for f in error.failures.values()])
    return 0


def _cause(failures: list[tuple[int, int]]) -> int:
    """The exit code that explains the others, of times in seconds and codes: ranks that lose
    another one end with 75, and torchrun kills those that have not ended half a minute later."""
    first = min(time_s for time_s, _ in failures)
    codes = [code for time_s, code in failures if time_s < first + _TOGETHER_S]
    killed = [128 - code for code in codes if code < 0 and code != -signal.SIGTERM]
    raised = [code for code in codes if code > 0 and code != EXIT_REQUEUE]
    return (killed or raised or [EXIT_REQUEUE])[0]


def _forward(number: int, _: Any) -> None:
    """Pass a signal on to the ranks, which save and end; torchrun then ends by itself."""
    ranks = psutil.Process().children()
    for process in ranks:
        process.send_signal(number)
    if not ranks:
        sys.exit(128 + number)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1; use 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
