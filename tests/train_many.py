"""Train several configs one after the other on the ranks of one torchrun: starts cost seconds.

Run as ``torchrun ... train_many.py JOBS``; each line of JOBS is JSON: [config, override, ...].
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from dist_contrastive import config, trainer

jobs = Path(sys.argv[1])
rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
for number, line in enumerate(jobs.read_text().splitlines()):
    # A store of its own for each run: in that of torchrun, a new group finds the old one's keys.
    store = dist.FileStore(f"{jobs}.store-{number}", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    path, *overrides = json.loads(line)
    assert trainer.train(config.load(path, overrides)) == trainer.EXIT_DONE
    dist.destroy_process_group()
