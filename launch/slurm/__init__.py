"""Jobs of a SLURM cluster, by submitit.

    __main__.py     submit, resume, status, list, logs, cancel
    options.py      what a job asks for: profiles and flags
    sweep.py        several runs from one command
    checks.py       what can be known before
    snapshot.py     the code, copied
    submission.py   the script, and submitting it
    job.sh          what the script does before and after the ranks
    job.py          what each rank does
    cluster.py      what SLURM says
    records.py      which jobs a run has had
    tables.py       what there is to see of runs
    control.py      following logs, cancelling

All state of a run is in its directory: a job that is started anew, by SLURM or by `resume`, finds
there how far it is.
"""
