"""Rank of this process, from the variables of its launcher: torchrun, SLURM, or none; and several
ranks on this machine, each a process of its own.
"""

import gc
import multiprocessing
import os
import pickle
import re
import socket
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from dist_contrastive.errors import ConfigError

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_RANK = (*_NUMBERS, "MASTER_ADDR")
_STEP = [f"SLURM_{x}" for x in ("JOB_ID", "STEP_ID", "STEP_NODELIST", "PROCID", "LOCALID")]
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", *_MPI)
_PORTS = range(15000, 30000)  # below the ephemeral ports of common systems
_GRACE_S = 0.5  # how long to listen for a cause once a first rank has failed

PRELOADED = ["torch._dynamo", "dist_contrastive.losses"]
"""Modules that `run_ranks` imports once, in the server from which it forks ranks."""


def join() -> bool:
    """Whether this process is one of several ranks.

    torchrun (and `accelerate launch`) sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR, which go
    first: it may itself have been started by SLURM. The variables of a task of a SLURM step of
    several are translated into these. Their rendezvous is MASTER_ADDR and MASTER_PORT if they are
    set, else the first node, and a port derived from the number of the step. Some of the variables
    without the others are left over from elsewhere, and make no rank.
    """
    if all(name in os.environ for name in _RANK):
        return True
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or not tasks.isdecimal() or not all(name in os.environ for name in _STEP):
        return False
    join_slurm_step()
    return True


def check() -> None:
    """Refuse variables of a rank that cannot be meant. The only rank meets nobody: it needs no
    machine or port that are perhaps left over.

    Raises:
        ConfigError: they are no numbers, or those of a rank that there is not.
    """
    rank, size, local = (os.environ[name] for name in _NUMBERS)
    port = os.environ.setdefault("MASTER_PORT", "29500")
    numbers = [int(x) if x.isdecimal() else -1 for x in (rank, size, local, port)]
    if not (0 <= numbers[0] < numbers[1] and numbers[2] >= 0 and 0 < numbers[3] < 1 << 16):
        raise ConfigError(
            f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local}, MASTER_PORT={port} make no rank; "
            f"start with torchrun or srun, which set them, or unset them all to train alone"
        )
    if numbers[1] == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            set_rank(0, 1, numbers[2], "127.0.0.1", probe.getsockname()[1])


def forget() -> str:
    """Unset the variables from which Accelerate would take this process for one of several ranks.

    Returns:
        Those that said so, as NAME=VALUE; empty: none did.
    """
    sizes = {name: os.environ[name] for name in _SIZES if os.environ.get(name, "1") != "1"}
    for name in {*_NUMBERS, *_SIZES}:
        os.environ.pop(name, None)
    return ", ".join(f"{name}={value}" for name, value in sizes.items())


def join_slurm_step() -> None:
    """Translate the variables of a task of a SLURM step, be it the only one."""
    env = os.environ
    tasks = int(env["SLURM_STEP_NUM_TASKS"])
    step = f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}.{env.get('SLURM_RESTART_COUNT', 0)}"
    port = _PORTS[zlib.crc32(step.encode()) % len(_PORTS)]
    set_rank(
        int(env["SLURM_PROCID"]),
        tasks,
        int(env["SLURM_LOCALID"]),
        env.get("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"])),
        int(env.get("MASTER_PORT", port)),
    )


def set_rank(rank: int, world_size: int, local_rank: int, address: str, port: int) -> None:
    """Set the variables from which torch, Accelerate and DeepSpeed take rank and rendezvous."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def first_host(nodes: str) -> str:
    """First node of a list as SLURM writes it: n01 of ``n[01-03,7],m4``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


class RankError(RuntimeError):
    """A rank raised or died; the message carries that rank's traceback or exit code."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Call ``fn(*args)`` in `world_size` processes joined in one gloo process group.

    Args:
        fn: a function defined at the top level of a module. It finds its rank with
            ``torch.distributed.get_rank()``, and in the environment as under torchrun.
        args: passed to every rank; they and the results are pickled.
        timeout_s: seconds for the whole call.

    Returns:
        The results, one a rank, in the order of ranks.

    Raises:
        RankError: a rank raised, died or did not end in time. The other ranks are ended at once.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size} is below 1; use 1 or more")
    context = multiprocessing.get_context("forkserver")
    # Forked from a server that has imported torch already, a rank starts in milliseconds.
    context.set_forkserver_preload(PRELOADED)
    # Plain pickles: tensors travel as copies, not as memory shared between the ranks.
    call = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[tuple[Any, Connection]] = []
        try:
            for number in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (call, number, world_size, f"{folder}/store", timeout_s, theirs)
                process = context.Process(target=_rank_main, args=arguments)  # may have workers
                process.start()
                theirs.close()
                ranks.append((process, ours))
            return _collect(ranks, time.monotonic() + timeout_s)
        finally:
            for process, ours in ranks:
                process.kill()
                process.join()
                ours.close()


def _rank_main(
    call: bytes,
    rank: int,
    world_size: int,
    store: str,
    timeout_s: float,
    results: Connection,
) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    gc.freeze()  # what the server has imported is not searched again by each collection
    if sys.platform == "linux":  # no look-up of the machine's name, which may be slow or wrong
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # Accelerate warns of its absence
    number, size = str(rank), str(world_size)
    os.environ |= {"RANK": number, "LOCAL_RANK": number}
    os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    # Asked for by Accelerate and DeepSpeed, which use the process group that there is.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        fn, args = pickle.loads(call)
        results.send_bytes(pickle.dumps(("result", fn(*args))))
        dist.barrier()  # nobody leaves while another still talks to it
        dist.destroy_process_group()
    except BaseException:
        failure = time.monotonic(), traceback.format_exc()
        results.send_bytes(pickle.dumps(("error", failure)))
        os._exit(1)  # the group may be waiting for others: leave without its destructor


def _collect(ranks: list[tuple[Any, Connection]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, tuple[float, str]] = {}
    while len(results) < len(ranks):
        waiting = {
            ranks[number][1]: number for number in range(len(ranks)) if number not in results
        }
        waiting = {pipe: number for pipe, number in waiting.items() if number not in failures}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        for pipe in ready:
            number = waiting[pipe]  # type: ignore[index]
            kind, value = _receive(ranks[number])
            if kind == "result":
                results[number] = value
            else:
                failures[number] = value
        if failures and (not ready or len(failures) + len(results) == len(ranks)):
            raise RankError(_explain(failures))
        if failures:
            # A rank that dies makes its neighbours fail too: wait for its own error a moment.
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        elif not ready:
            late = sorted(waiting.values())
            raise RankError(f"ranks {late} did not end within the time limit (timeout_s)")
    return [results[number] for number in range(len(ranks))]


def _receive(rank: tuple[Any, Connection]) -> tuple[str, Any]:
    process, pipe = rank
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        # Time 0: a death explains the errors of the others, whenever it is noticed.
        return "died", (0.0, f"died with exit code {process.exitcode}")


def _explain(failures: dict[int, tuple[float, str]]) -> str:
    """The first failure in full; those that followed from it are only named."""
    first = min(failures, key=lambda number: failures[number][0])
    others = sorted(set(failures) - {first})
    also = f"\n(ranks {others} failed after it)" if others else ""
    return f"rank {first} failed:\n{failures[first][1]}{also}"
