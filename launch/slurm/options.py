"""What a job asks for: the settings of a site in a YAML profile, and flags before them."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from dist_contrastive.errors import ConfigError
from dist_contrastive.settings import Settings

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


class Options(Settings):
    """Settings of a job. A profile may hold any of them; those of `submit`'s flags go first."""

    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    tasks_per_node: PositiveInt | None = None
    """Ranks of a node; default: one for each GPU, or one."""
    cpus_per_task: PositiveInt | None = None
    """CPUs of a rank: its own one, and one for each data worker."""
    memory_gb: PositiveFloat | None = None
    """Of a node."""
    time: str = "1:00:00"
    """Limit of one start, as SLURM writes it: minutes, H:MM:SS or D-HH:MM:SS. A run that needs
    longer is saved, requeued and gone on with."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclusive: bool = False
    name: str | None = None
    """Of the job; default: that of the run directory."""
    signal_lead_s: PositiveInt | None = None
    """How long before its end a job is told to save; default: from how long checkpoints take."""
    parallel: PositiveInt = 256
    """Jobs of a sweep that run at the same time."""
    address: str = "$SLURMD_NODENAME"
    """What other nodes call the first one, in shell: `$(hostname -f)`, for instance."""
    python: str = shlex.quote(sys.executable)
    """The command that runs Python on the nodes."""
    container: str = ""
    """What to run it in: `apptainer exec --nv IMAGE`. For a plug-in of srun, see `srun`."""
    setup: tuple[str, ...] = ()
    """Lines of shell before all others: `module load cuda`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables of all ranks: `NCCL_SOCKET_IFNAME: ib0`."""
    srun: tuple[str, ...] = ()
    """More options of srun: `--container-image=IMAGE`."""
    sbatch: dict[str, str] = Field(default_factory=dict)
    """More options of sbatch, by name without dashes: `reservation: big`; `true` for those without
    a value."""

    @field_validator("time")
    @classmethod
    def _time_is_known(cls, time: str) -> str:
        minutes(time)
        return time

    @property
    def tasks(self) -> int:
        """Ranks of a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.tasks

    @property
    def time_min(self) -> int:
        """Minutes of `time`."""
        return minutes(self.time)

    @property
    def python_command(self) -> str:
        """How Python is run, in its container."""
        return f"{self.container} {self.python}".strip()


def load_options(profile: Path | None, flags: dict[str, Any]) -> Options:
    """Those of a profile, if any, with those flags that are not None instead.

    Raises:
        ConfigError: the profile cannot be read, or a setting is unknown or out of range.
    """
    tree: Any = {}
    if profile is not None:
        try:
            # All as text: YAML would take 8:00:00 for a number of base 60, and yes for true.
            tree = yaml.load(profile.read_text(), Loader=yaml.BaseLoader) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"cannot read the profile {profile}: {' '.join(str(error).split())}"
            ) from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{profile} holds no settings; see configs/slurm/profile.yaml")
    given = {name: value for name, value in flags.items() if value is not None}
    return Options.checked({**tree, **given}, f"{profile or 'flags'}: ")


def minutes(time: str) -> int:
    """Of a time as SLURM writes it: minutes, MM:SS, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    found = _TIME.fullmatch(time)
    if not found:
        raise ValueError("is no time; write minutes, H:MM:SS or D-HH:MM:SS")
    days, *parts = (None if x is None else int(x) for x in found.groups())
    given = [x for x in parts if x is not None]
    if days is not None:
        hours, mins, secs = [*given, 0, 0][:3]
    elif len(given) == 1:
        hours, mins, secs = 0, given[0], 0
    else:
        hours, mins, secs = ([0, *given] if len(given) == 2 else given)[:3]
    total = (days or 0) * 1440 + hours * 60 + mins + (secs > 0)
    if total < 1:
        raise ValueError("is no time; give a minute or more")
    return total
