"""How a command ends: exit codes and sentences for errors, and ranks that leave at once."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from dist_contrastive.errors import NonFiniteError, UserError


@dataclass
class Outcome:
    """The exit code of what ran inside `reporting_errors`."""

    code: int = 0


@contextmanager
def reporting_errors() -> Iterator[Outcome]:
    """Turns the errors that have an exit code into one sentence on stderr and that code."""
    outcome = Outcome()
    try:
        yield outcome
    except (UserError, NonFiniteError) as error:
        rank = os.environ.get("RANK")
        who = "dist-contrastive" if rank is None else f"dist-contrastive, rank {rank}"
        print(f"{who}: {error}", file=sys.stderr, flush=True)
        outcome.code = error.exit_code


def run_rank(main: Callable[[], int]) -> NoReturn:
    """Run as one of several ranks, and leave with its exit code at once when done.

    Threads of gloo drop their last tensors late; when Python is being finalised under them they
    abort the process (exit code 134), although everything was done and saved.
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
