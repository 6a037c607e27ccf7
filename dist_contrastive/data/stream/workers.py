"""Reading by several processes: each makes a part of every batch, and the parts are joined.

Not torch's DataLoader: only through private attributes of its iterator would it end a worker that
waits for a server, or start anew one that hangs since its fork.
"""

import atexit
import contextlib
import os
import pickle
import random
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, multiprocessing

from dist_contrastive.data.collate import Batch, is_shared_memory_full, join_batches
from dist_contrastive.data.stream.reader import Part, Reader
from dist_contrastive.errors import DataError, LostWorkerError
from dist_contrastive.malloc import keep_freed_memory
from dist_contrastive.signals import STOP_SIGNALS

BEGIN_S = {"fork": 20.0, "spawn": 300.0, "forkserver": 300.0}  # the latter import torch first
_SHARED = "/dev/shm"
_STARTS = 3
_SMALL = 1 << 16  # bytes
_LEAVE_S = 1.0  # to finish a part after the end was requested

StartMethod = Literal["fork", "spawn", "forkserver"]


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


class _Failure(NamedTuple):
    """Exception of a worker, in the place of its next part."""

    error: Exception


def read_by_workers(
    reader: Reader, num_workers: int, prefetch_factor: int, start_method: StartMethod
) -> Iterator[Part]:
    """`reader.parts()`, made by several processes.

    Each works ahead by at most `prefetch_factor` batches, so that no more than that are in memory.

    Raises:
        LostWorkerError: a process was killed, or did not begin. Other exceptions of a process, as a
            DataError, are raised here.
    """
    stored = None if start_method == "fork" else _store(reader)
    workers: list[_Worker] = []
    end = partial(_end, workers, stored)
    # Workers ignore signals, so an exit that only signals and then joins them would hang.
    atexit.register(end)
    try:
        source = reader if stored is None else stored
        _start(workers, source, num_workers, start_method)
        for worker in workers:
            for _ in range(prefetch_factor):
                _request(worker)
        while parts := _next_parts(workers):
            batches = [
                {name: _received(column) for name, column in part.batch.items()}
                for part in parts
                if part.batch is not None
            ]
            skipped = [one for part in parts for one in part.skipped]
            yield Part(parts[0].stop, join_batches(batches), skipped)
    finally:
        end()  # now, even while an exception holds this frame
        atexit.unregister(end)


def _start(
    workers: list[_Worker], source: Reader | Path, num_workers: int, start_method: StartMethod
) -> None:
    """Fill the list with workers that have begun.

    A forked one may never begin: where a thread of gloo lets go of a tensor in that instant, the
    copy of Python waits for a lock that the thread has in the original only. Such are started anew.
    A forkserver with torch preloaded has no such threads, but takes 3 s and 290 MiB a rank, and
    each worker a pickled transform and an index of its own, 16 + 14 F bytes a sample.
    """
    context: Any = multiprocessing.get_context(start_method)
    for _ in range(_STARTS):
        # Held back in what is started meanwhile, until that ignores them by itself.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for number in range(num_workers):
                pipe, other = context.Pipe()
                process = context.Process(
                    target=_work, args=(source, number, num_workers, other), daemon=True
                )
                process.start()
                other.close()  # then its end is noticed here
                workers.append(_Worker(process, pipe))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        deadline = time.monotonic() + BEGIN_S[start_method]
        if all(_has_begun(worker, deadline) for worker in workers):
            return
        _end(workers, None)
    raise LostWorkerError(
        f"processes that read ahead did not begin within {BEGIN_S[start_method]:g} s, {_STARTS} "
        f"times; set data.num_workers=0 or another data.worker_start, or start again"
    )


def _has_begun(worker: _Worker, deadline: float) -> bool:
    """Whether a worker has begun, or was lost, as its first part will show."""
    timeout = max(0.0, deadline - time.monotonic())
    if not wait([worker.pipe, worker.process.sentinel], timeout):
        return False
    with contextlib.suppress(EOFError, OSError):
        if worker.pipe.poll():
            worker.pipe.recv()
    return True


def _request(worker: _Worker) -> None:
    """Ask for one more part; a worker that was lost is noticed when the part is missing."""
    with contextlib.suppress(OSError):
        worker.pipe.send(True)


def _next_parts(workers: list[_Worker]) -> list[Part]:
    """Parts of the next batch, one of each worker; none after the last batch."""
    parts: list[Part] = []
    for worker in workers:
        message = _receive(worker)
        if isinstance(message, _Failure):
            raise message.error
        if message is None:
            return []
        parts.append(message)
        _request(worker)
    return parts


def _receive(worker: _Worker) -> Any:
    # The sentinel too: processes forked meanwhile may hold the other end of the pipe open.
    wait([worker.pipe, worker.process.sentinel])
    reason = ""
    try:
        if worker.pipe.poll():
            return worker.pipe.recv()
    except EOFError:
        pass  # it has closed the pipe, and said nothing
    except OSError as error:
        reason = f"{error}; "
    worker.process.join(_LEAVE_S)
    if worker.process.exitcode == -signal.SIGBUS:
        raise _shared_memory_full()
    raise LostWorkerError(
        f"a process that reads ahead was lost ({reason}exit code {worker.process.exitcode}); if it "
        f"was killed for memory, lower data.num_workers or data.prefetch_factor; start again"
    )


def _shared_memory_full() -> LostWorkerError:
    free = ""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(_SHARED)
        free = f" ({usage.free >> 20} of {usage.total >> 20} MiB are free)"
    return LostWorkerError(
        f"{_SHARED} is full{free}, where processes that read ahead hand over what they have read; "
        f"make it larger (docker run --shm-size=8g), or set data.num_workers=0 or a lower "
        f"data.prefetch_factor; start again"
    )


def _end(workers: list[_Worker], stored: Path | None) -> None:
    """End all workers, together; kill those that wait for a server."""
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.pipe.send(False)
    deadline = time.monotonic() + _LEAVE_S
    for process, _ in workers:
        process.join(max(0.0, deadline - time.monotonic()))
    for process, pipe in workers:
        process.kill()
        process.join()
        pipe.close()
    workers.clear()
    if stored is not None:
        stored.unlink(missing_ok=True)


def _work(source: Reader | Path, number: int, num_workers: int, pipe: Connection) -> None:
    """Main function of a worker: a part for each request, until there is none or the rank ends.

    Ctrl-C, a scheduler's warning and torchrun's SIGTERM reach every process of the group; a worker
    that died of one would take the rank along before it has saved. A forked one inherits its
    handlers, too.
    """
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()  # where it is not forked
    torch.set_num_threads(1)
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    pipe.send(True)  # it has begun
    reader = source if isinstance(source, Reader) else pickle.loads(source.read_bytes())
    messages = _messages(reader, number, num_workers)
    # Sent by a thread: a part that is larger than the pipe holds waits there to be received.
    with ThreadPoolExecutor(1) as sender:
        while pipe.recv():
            sender.submit(pipe.send_bytes, next(messages))
        os._exit(0)  # whatever is still being sent


def _messages(reader: Reader, number: int, num_workers: int) -> Iterator[bytes]:
    """Pickled parts, or a failure and then no more."""
    try:
        for part in reader.parts(number, num_workers, is_shared=True):
            yield _pickled(part._replace(batch=_without_handles(part.batch)))
    except DataError as error:
        yield _pickled(_Failure(error))
    except Exception as error:
        is_full = isinstance(error, RuntimeError | OSError) and is_shared_memory_full(error)
        yield _pickled(_Failure(_shared_memory_full() if is_full else _portable(error)))
    while True:
        yield _pickled(None)


def _pickled(message: Any) -> bytes:
    return bytes(ForkingPickler.dumps(message))


def _portable(error: Exception) -> Exception:
    """The exception with its traceback as a note, or its text where it cannot be pickled."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note("in a process that reads ahead:\n" + "".join(traceback.format_exception(error)))
    return copy


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
    """File that workers read the reader from. Through the pipe by which they are started, which
    holds 64 KiB, a large index would wait for ever where a worker dies before it reads."""
    handle, name = tempfile.mkstemp(prefix="dist-contrastive-reader-")
    with os.fdopen(handle, "wb") as file:
        pickle.dump(reader, file)
    return Path(name)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
