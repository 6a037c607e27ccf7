"""Starting runs.

local.py      ranks of this machine, or of several, with torchrun
meeting.py    where launchers of several machines agree on the next start
slurm/        jobs of a SLURM cluster
ends.py       exit codes, and which of them are worth another start
progress.py   how far a run is, from its directory
logs.py       what ranks write, followed
"""
