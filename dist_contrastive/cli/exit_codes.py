"""Ends of a command: exit codes, sentences and log records on stderr, ranks that leave at once."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from dist_contrastive.errors import NonFiniteError, UserError, redacted

_LOGGERS = ("dist_contrastive", "launch")


@dataclass
class Outcome:
    """The exit code of what ran inside `reporting_errors`."""

    code: int = 0


class _StderrHandler(logging.Handler):
    """Bare messages on what is stderr at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(redacted(self.format(record)), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Our log records of level INFO and above on stderr, as long as a command runs; a program that
    uses the package as a library routes them by itself."""
    handler = _StderrHandler()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


@contextmanager
def reporting_errors() -> Iterator[Outcome]:
    """Turns the errors that have an exit code into one sentence on stderr and that code."""
    outcome = Outcome()
    with logging_to_stderr():
        try:
            yield outcome
        except (UserError, NonFiniteError) as error:
            rank = os.environ.get("RANK")
            who = "dist-contrastive" if rank is None else f"dist-contrastive, rank {rank}"
            logging.getLogger(__name__).error("%s: %s", who, error)
            outcome.code = error.exit_code


def run_rank(main: Callable[[], int]) -> NoReturn:
    """Run as one of several ranks, or as their launcher, and leave with the exit code at once.

    Threads of gloo drop their last tensors late; when Python is being finalised under them they
    abort the process (exit code 134), although everything was done and saved; so does a signal.
    """
    try:
        code = main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
