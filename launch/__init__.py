"""Launchers of runs.

local.py        ranks of this machine, or of several, with torchrun
rendezvous.py   agreement of the launchers of several machines on each start
slurm/          jobs of a SLURM cluster
progress.py     progress of a run, from its directory
logs.py         output of ranks, followed
"""

import dist_contrastive  # noqa: F401  # keeps the current folder out of sys.path
