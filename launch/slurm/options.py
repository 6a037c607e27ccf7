"""Resources of a job: the settings of a site in a YAML profile, and flags that go before them."""

import inspect
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import typer
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from dist_contrastive.errors import redacted
from dist_contrastive.sentences import shown
from dist_contrastive.settings import Settings
from dist_contrastive.yaml_files import read_yaml

_SECRET = re.compile("(?i)passw|passphrase|secret|token(?!iz)|(api|access|private)_?key|credential")
_VARIABLE = re.compile(r"\b([A-Za-z_]\w*)=(?=[^\s$])")  # that is given a value of its own
_TIME = re.compile(r"(?:(\d{1,4})-)?(\d{1,7})(?::(\d{1,7}))?(?::(\d{1,7}))?", re.ASCII)
_SHELL = ("address", "container", "env", "python", "sbatch", "setup", "srun")
_PROFILE_ONLY = ("exclusive", "address", "container", "setup", "env", "srun", "sbatch")


class Options(Settings):
    """Settings of a job. A profile may hold any of them; those of `submit`'s flags go first."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    nodes: PositiveInt = 1
    """Nodes of the job."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs of a node, one rank for each."""
    tasks_per_node: PositiveInt | None = None
    """Ranks of a node, where they are not its GPUs; default: one for each GPU, or one."""
    cpus_per_task: PositiveInt | None = None
    """CPUs of a rank: one, and one for each data worker."""
    memory_gb: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    """Memory of a node."""
    time: str = "1:00:00"
    """Limit of one start: minutes, H:MM:SS or D-HH:MM:SS. A run that needs longer is saved,
    requeued and resumed."""
    partition: str | None = None
    """Partition of the cluster."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclusive: bool = False
    """Share nodes with no other job."""
    name: str | None = None
    """Name of the job; default: that of the run directory."""
    signal_lead_s: PositiveInt | None = None
    """Seconds before the end of the job at which it saves; default: measured."""
    parallel: PositiveInt = 256
    """Jobs of a sweep that run at the same time."""
    address: str = "$SLURMD_NODENAME"
    """Name of the first node for other nodes, in shell: `$(hostname -f)`, for instance."""
    python: str = shlex.quote(sys.executable)
    """Command that runs Python on the nodes."""
    container: str = ""
    """Command that runs Python in a container: `apptainer exec --nv IMAGE`. For a plug-in of srun,
    see `srun`."""
    setup: tuple[str, ...] = ()
    """Lines of shell before all others: `module load cuda`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables of all ranks: `NCCL_SOCKET_IFNAME: ib0`."""
    srun: tuple[str, ...] = ()
    """More options of srun: `--container-image=IMAGE`."""
    sbatch: dict[str, str] = Field(default_factory=dict)
    """More options of sbatch, by name without dashes: `reservation: big`; `true` for those without
    a value."""

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        for name in _SHELL:
            lines = _lines(getattr(self, name))
            found = [x for x in _VARIABLE.findall(lines) if _SECRET.search(x)]
            found += ["the password or signature of a URL"] * (redacted(lines) != lines)
            if found:
                raise ValueError(
                    f"{name} holds {found[0]}, which would be written into the run directory; "
                    f"export it where you submit instead: sbatch hands the environment on"
                )
        return self

    @field_validator("time")
    @classmethod
    def _check_time(cls, time: str) -> str:
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
        """Python, in its container."""
        return f"{self.container} {self.python}".strip()


def _lines(value: str | tuple[str, ...] | dict[str, str]) -> str:
    if isinstance(value, dict):
        value = tuple(f"{name}={text}" for name, text in value.items())
    return value if isinstance(value, str) else "\n".join(value)


def job_flags(**flags: Any) -> dict[str, Any]:
    """The options that were set by flags; a command takes one flag for each of its parameters,
    which are the fields of `Options`."""
    return {name: value for name, value in flags.items() if value is not None}


def _flag(name: str) -> inspect.Parameter:
    field = Options.model_fields[name]
    kind = next(kind for kind in (int, float, str) if kind in _types_in(field.annotation))
    default = None if name == "python" else field.default  # its default is this machine's own path
    flag = typer.Option(
        f"--{name.replace('_', '-')}",
        metavar=kind.__name__.upper(),
        help=" ".join(str(field.description).split()),
        show_default=False if default is None else str(default),
    )
    annotation = Annotated[kind | None, flag]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _types_in(annotation: Any) -> list[Any]:
    return [annotation, *(kind for part in get_args(annotation) for kind in _types_in(part))]


job_flags.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_flag(name) for name in Options.model_fields if name not in _PROFILE_ONLY]
)


def load_options(profile: Path | None, flags: dict[str, Any]) -> Options:
    """Options of a profile, if any, with those of flags instead where they are set.

    Raises:
        ConfigError: the profile cannot be read, or a setting is unknown or out of range.
    """
    tree: dict[str, Any] = {}
    if profile is not None:
        tree = read_yaml(profile, as_text=True).value  # yes is a name of a partition, not true
    return Options.checked({**tree, **flags}, f"{profile or 'flags'}: ")


def shell_in(options: dict[str, Any]) -> list[str]:
    """Options, as a record has them, that are run by a shell and are not the default, as text."""
    default = Options().model_dump(mode="json")
    return [
        f"{name}: {shown(options[name])}"
        for name in _SHELL
        if name in options and options[name] != default[name]
    ]


def minutes(time: str) -> int:
    """Minutes of a time of SLURM: minutes, MM:SS, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    match = _TIME.fullmatch(time)
    if not match:
        raise ValueError("is no time; write minutes, H:MM:SS or D-HH:MM:SS")
    days, *parts = (None if x is None else int(x) for x in match.groups())
    numbers = [x for x in parts if x is not None]
    if days is not None:
        hours, mins, secs = [*numbers, 0, 0][:3]
    elif len(numbers) == 1:
        hours, mins, secs = 0, numbers[0], 0
    else:
        hours, mins, secs = ([0, *numbers] if len(numbers) == 2 else numbers)[:3]
    total = (days or 0) * 1440 + hours * 60 + mins + (secs > 0)
    if total < 1:
        raise ValueError("is no time; give a minute or more")
    return total
