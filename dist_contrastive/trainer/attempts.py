"""A run that is started again and again without coming further is stopped."""

import json

from dist_contrastive.atomic import write_text
from dist_contrastive.errors import NoProgressError
from dist_contrastive.trainer.start import Run

_NAME = "attempts.json"


def count_attempt(run: Run) -> None:
    """Write that the run is about to train from where it is; called by one rank.

    Raises:
        NoProgressError: it has been there too often.
    """
    path, step = run.config.run_dir / _NAME, run.progress.step
    before = json.loads(path.read_text()) if path.exists() else {}
    starts = before.get("starts", 0) if before.get("step") == step else 0
    if starts >= run.config.train.max_stalled_starts:
        raise NoProgressError(
            f"{run.config.run_dir} was started {starts} times from step {step} and never came to "
            f"its next checkpoint (train.max_stalled_starts={run.config.train.max_stalled_starts}"
            f"); look at how these ended, and delete {path} to try again"
        )
    write_text(path, json.dumps({"step": step, "starts": starts + 1}) + "\n")
