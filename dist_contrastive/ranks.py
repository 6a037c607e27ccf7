"""Which of several ranks this process is, by what started it: torchrun, SLURM, or nobody."""

import os
import re
import zlib

_PORTS = range(15000, 30000)  # below those that systems give out by themselves


def join() -> bool:
    """Whether this process is one of several ranks.

    torchrun (and `accelerate launch`) says so in RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR, and
    goes first: it may itself have been started by SLURM. A task of a SLURM step of several has its
    own variables translated into these. Where they meet is MASTER_ADDR and MASTER_PORT if they are
    set, else the first node, and a port that the number of the step chooses.
    """
    if "LOCAL_RANK" in os.environ:
        return True
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return False
    join_slurm_step()
    return True


def join_slurm_step() -> None:
    """Translate the variables of a task of a SLURM step, be it the only one."""
    given = os.environ
    tasks = int(given["SLURM_STEP_NUM_TASKS"])
    step = f"{given['SLURM_JOB_ID']}.{given['SLURM_STEP_ID']}.{given.get('SLURM_RESTART_COUNT', 0)}"
    port = _PORTS[zlib.crc32(step.encode()) % len(_PORTS)]
    set_rank(
        int(given["SLURM_PROCID"]),
        tasks,
        int(given["SLURM_LOCALID"]),
        given.get("MASTER_ADDR", first_host(given["SLURM_STEP_NODELIST"])),
        int(given.get("MASTER_PORT", port)),
    )


def set_rank(rank: int, world_size: int, local_rank: int, address: str, port: int) -> None:
    """Say to torch, Accelerate and DeepSpeed which rank this process is, and where they meet."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def first_host(nodes: str) -> str:
    """The first of a list as SLURM writes it: n01 of ``n[01-03,7],m4``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
