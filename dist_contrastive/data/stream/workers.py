"""Reading by several processes: each makes a part of every batch, and the parts are joined."""

import atexit
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import signal_handling

from dist_contrastive.data.collate import Batch, join_batches
from dist_contrastive.data.stream.reader import Part, Reader
from dist_contrastive.errors import DataError, LostWorkerError
from dist_contrastive.signals import STOP_SIGNALS

_SMALL = 1 << 16  # bytes
_LEAVE_S = 1.0  # for what a worker is doing when it is told to end
_LOOK_S = 0.1
_STARTS = 3
_BEGIN_S = {"fork": 20.0, "spawn": 300.0, "forkserver": 300.0}  # the latter import torch first

StartMethod = Literal["fork", "spawn", "forkserver"]


def read_by_workers(
    reader: Reader, num_workers: int, prefetch_factor: int, start_method: StartMethod
) -> Iterator[Part]:
    """`reader.parts()`, made by so many processes.

    The loader asks the workers in turn, in their order. Each works ahead by at most
    `prefetch_factor` batches, so that no more than that are in memory.
    """
    stored = None if start_method == "fork" else _store(reader)
    worker = _Worker(reader if stored is None else None, stored)
    try:
        parts = _started(worker, num_workers, prefetch_factor, start_method)
    except BaseException:
        if stored is not None:
            stored.unlink(missing_ok=True)
        raise
    # Workers ignore signals, so an exit that only signals and then awaits them would hang.
    end = partial(_end, parts, stored)
    atexit.register(end)
    try:
        while received := _next_parts(parts, num_workers):
            for part in received:
                if isinstance(part, _Failure):
                    raise part.kind(part.message)
            batches = [
                {name: _received(column) for name, column in part.batch.items()}
                for part in received
                if part.batch is not None
            ]
            skipped = [one for part in received for one in part.skipped]
            yield Part(received[0].stop, join_batches(batches), skipped)
    finally:
        end()  # now, even while an exception holds this frame
        atexit.unregister(end)


def _started(
    worker: "_Worker", num_workers: int, prefetch_factor: int, start_method: StartMethod
) -> Any:
    """The loader's iterator, all of whose workers have begun.

    A forked one may never begin: where a thread of gloo lets go of a tensor in that instant, the
    copy of Python waits for a lock that the thread has in the original only. Such are started anew.
    """
    context = multiprocessing.get_context(start_method)
    of_child = signal.getsignal(signal.SIGCHLD)
    for _ in range(_STARTS):
        begun = context.Semaphore(0)
        loader: DataLoader[Any] = DataLoader(
            worker,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            multiprocessing_context=context,
            collate_fn=_unchanged,
            worker_init_fn=partial(_begin, begun),
            # The loader draws a base seed; from the global generator that would make the model's
            # own random numbers depend on the number of workers.
            generator=torch.Generator(),
        )
        # Held back here and in what is started meanwhile, until that ignores them by itself.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            parts = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        # The loader's handler would raise wherever this process is when a worker is lost, in the
        # middle of a collective too. It looks for lost ones by itself while it waits for them.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, of_child)
        if _have_begun(parts, begun, _BEGIN_S[start_method]):
            return parts
        _end_workers(parts)
    raise LostWorkerError(
        f"processes that read ahead did not begin within {_BEGIN_S[start_method]:g} s, {_STARTS} "
        f"times; set data.num_workers=0 or another data.worker_start, or start again"
    )


def _have_begun(parts: Any, begun: Any, timeout_s: float) -> bool:
    """Whether all workers have, or one has died, of which the loader will tell."""
    deadline = time.monotonic() + timeout_s
    for _ in parts._workers:
        while not begun.acquire(timeout=_LOOK_S):
            if not all(process.is_alive() for process in parts._workers):
                return True
            if time.monotonic() > deadline:
                return False
    return True


def _next_parts(parts: Any, num_workers: int) -> list[Any]:
    """What each of the workers made of the next batch; none after the last."""
    try:
        first = next(parts, None)
        return [] if first is None else [first, *(next(parts) for _ in range(1, num_workers))]
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise  # of a transform
        raise LostWorkerError(
            f"a process that reads ahead was lost ({error}); if it was killed for memory, lower "
            f"data.num_workers or data.prefetch_factor; start again"
        ) from error


class _Failure:
    """A worker's DataError. The loader would wrap an exception's text in a traceback."""

    def __init__(self, error: DataError) -> None:
        self.kind = type(error)
        self.message = str(error)


class _Worker(IterableDataset[Any]):
    """Iterated in a worker: its part of every batch, or a `_Failure` and then no more."""

    def __init__(self, reader: Reader | None, stored: Path | None) -> None:
        self.reader = reader
        self.stored = stored

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        assert worker is not None
        reader = self.reader
        if self.stored is not None:
            with self.stored.open("rb") as file:
                reader = pickle.load(file)
        assert reader is not None
        try:
            for part in reader.parts(worker.id, worker.num_workers):
                yield part._replace(batch=_without_handles(part.batch))
        except DataError as error:
            yield _Failure(error)


def _without_handles(batch: Batch | None) -> Batch | None:
    """Small tensors, and those of lists, as arrays: these are sent by value, while a tensor is
    shared through a file handle, of which a process has few, and which takes a millisecond."""
    if batch is None:
        return None
    return {name: _sent(column) for name, column in batch.items()}


class _Array(NamedTuple):
    """A tensor on its way from a worker."""

    values: NDArray[Any]


def _sent(column: Any) -> Any:
    if isinstance(column, list):
        return [_Array(row.numpy()) if isinstance(row, Tensor) else row for row in column]
    return _Array(column.numpy()) if column.nbytes < _SMALL else column


def _received(column: Any) -> Any:
    """The inverse of `_sent`."""
    if isinstance(column, _Array):
        return torch.from_numpy(column.values)
    return [_received(row) for row in column] if isinstance(column, list) else column


def _store(reader: Reader) -> Path:
    """A file that workers read it from. Through the pipe by which they are started, which holds
    64 KiB, a large index would wait for ever where a worker dies before it reads."""
    handle, name = tempfile.mkstemp(prefix="dist-contrastive-reader-")
    with os.fdopen(handle, "wb") as file:
        pickle.dump(reader, file)
    return Path(name)


def _end(parts: Any, stored: Path | None) -> None:
    if not parts._shutdown:  # as it does by itself after the last part
        _end_workers(parts)
    if stored is not None:
        stored.unlink(missing_ok=True)


def _end_workers(parts: Any) -> None:
    """Tell all workers to end, and kill those that wait for a server.

    First they are told: one that is killed while it looks whether it was told would keep the lock
    of that from the loader, for ever. Then they are awaited together, where the loader would do it
    one by one. It must not take for a failure that some are killed.
    """
    parts._workers_done_event.set()
    for wanted in parts._index_queues:
        wanted.put(None)
    deadline = time.monotonic() + _LEAVE_S
    for process in parts._workers:
        process.join(max(0.0, deadline - time.monotonic()))
    if parts._worker_pids_set:
        signal_handling._remove_worker_pids(id(parts))
        parts._worker_pids_set = False
    for process in parts._workers:
        process.kill()
    parts._shutdown_workers()


def _unchanged(item: Any) -> Any:
    return item


def _begin(begun: Any, worker: int) -> None:
    """Tell that the worker has begun; leave signals to the main process, and end with it.

    Ctrl-C, a scheduler's warning and torchrun's SIGTERM reach every process of the group; a worker
    that died of one would take the rank along before it has saved. A forked one inherits its
    handlers, too.

    A worker that is told to end does so. The loader's own watch over a rank that was killed looks
    whether the parent has changed since it began, so it waits for ever where that happened before.
    """
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begun.release()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
