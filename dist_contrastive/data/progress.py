"""Long work: in several threads or processes; a progress bar on a terminal."""

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_T = TypeVar("_T")
_R = TypeVar("_R")
_PENDING = 4  # items in work, or whose results wait, for each thread


def progress_bar(items: Iterable[_T], total: int | None, what: str) -> Iterator[_T]:
    """The same items, counted by a bar on stderr if that is a terminal.

    Args:
        total: how many there will be, None if that is not known.
        what: is done with them, as "packing".
    """
    console = Console(stderr=True)
    yield from track(items, what, total, console=console, disable=not sys.stderr.isatty())


def map_in_threads(
    work: Callable[[_T], _R], items: Iterable[_T], workers: int | None = None
) -> Generator[_R, None, None]:
    """Results of `work` for each item, in order, by threads.

    For work that hashes, decodes or reads, which releases the interpreter.

    Args:
        items: at most 4 for each thread are taken ahead of the results.
        workers: number of threads; None is one for each CPU.
    """
    workers = workers or os.cpu_count() or 1
    return _results(ThreadPoolExecutor(workers), work, items, workers)


def map_in_processes(
    work: Callable[[_T], _R], items: Iterable[_T], workers: int
) -> Generator[_R, None, None]:
    """Results of `work` for each item, in order, by processes.

    For work in Python itself. Function, items and results are pickled; a process takes seconds to
    start, as it imports this package.

    Args:
        items, workers: as of `map_in_threads`.
    """
    spawn = multiprocessing.get_context("spawn")  # a copy of threads would be of no use
    return _results(ProcessPoolExecutor(workers, spawn), work, items, workers)


def _results(
    pool: Executor, work: Callable[[_T], _R], items: Iterable[_T], workers: int
) -> Generator[_R, None, None]:
    pending: deque[Future[_R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= _PENDING * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
