"""Rank of this process, from the variables of its launcher: torchrun, SLURM, or none."""

import os
import re
import zlib

_PORTS = range(15000, 30000)  # below the ephemeral ports of common systems


def join() -> bool:
    """Whether this process is one of several ranks.

    torchrun (and `accelerate launch`) sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR, which go
    first: it may itself have been started by SLURM. The variables of a task of a SLURM step of
    several are translated into these. Their rendezvous is MASTER_ADDR and MASTER_PORT if they are
    set, else the first node, and a port derived from the number of the step.
    """
    if "LOCAL_RANK" in os.environ:
        return True
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return False
    join_slurm_step()
    return True


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
