"""Jobs of a SLURM cluster, by submitit.

    __main__.py     submit, resume, status, list, logs, cancel
    options.py      resources of a job: profiles and flags
    checks.py       checks before a job is submitted
    submission.py   sweeps, the copied code, the batch script, and its submission
    job.sh          steps of the batch script before and after the ranks
    job.py          entry point of each rank
    cluster.py      jobs of runs, and their states in SLURM
    control.py      tables of runs, following their logs, cancelling

All state of a run is in its directory: a job that is started anew, by SLURM or by `resume`, goes on
from there.
"""
