"""Entry point of each rank of a job, run by submitit."""

import os
import signal
from pathlib import Path
from platform import node
from typing import NoReturn

from dist_contrastive import ranks
from dist_contrastive.cli.exit_codes import reporting_errors, run_rank
from dist_contrastive.errors import EXIT_RESTART, ConfigError
from dist_contrastive.signals import listen

_LOCAL_REQUEUE = 144  # the exit code for which submitit's local executor starts a job again


class Job:
    """Trains a config; its state is in the run directory, never in what was submitted.

    Args:
        config: YAML file.
        cwd: folder in which it was submitted, for paths in it.
        cancelled: folder in which a file JOB.cancelled keeps the job from being requeued.
        port: rendezvous of the ranks of submitit's local executor; the batch script of SLURM
            chooses one itself.
        change: the run may go on with other settings; when it has, they are its own.
    """

    def __init__(
        self, config: Path, cwd: Path, cancelled: Path, port: int = 0, change: bool = False
    ) -> None:
        self._config, self._cwd, self._cancelled, self._port = config, cwd, cancelled, port
        self._change = change

    def __call__(self) -> NoReturn:
        """Train, and leave with the exit code; submitit's own handling of signals, which saves on
        one rank at any instant, is not come to."""
        listen()
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # which SLURM sends first
        run_rank(self._train)

    def _train(self) -> int:
        is_local = os.environ["SUBMITIT_EXECUTOR"] == "local"
        if is_local:
            self._join_local()
        else:
            ranks.join_slurm_step()
        with reporting_errors() as outcome:
            from dist_contrastive import trainer
            from dist_contrastive.config import load
            from dist_contrastive.imports import look_in

            look_in(self._config.parents[2] / "modules")
            try:
                os.chdir(self._cwd)  # for paths in the config
            except OSError as error:
                raise ConfigError(
                    f"the job was submitted in {self._cwd}, which is not there on {node()}; submit "
                    f"from a file system that all nodes share"
                ) from error
            outcome.code = trainer.train(load(self._config), change=self._change)
        if is_local and outcome.code == EXIT_RESTART:
            name = f"{os.environ['SUBMITIT_LOCAL_JOB_ID']}.cancelled"
            return EXIT_RESTART if (self._cancelled / name).exists() else _LOCAL_REQUEUE
        return outcome.code

    def _join_local(self) -> None:
        rank, count = (int(os.environ[f"SUBMITIT_LOCAL_{x}"]) for x in ("GLOBALID", "NTASKS"))
        ranks.set_rank(rank, count, rank, "127.0.0.1", self._port)
