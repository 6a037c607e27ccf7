"""``python -m dist_contrastive``: the same as the command ``dist-contrastive``."""

import sys
from typing import NoReturn

from dist_contrastive import ranks, signals
from dist_contrastive.cli import main
from dist_contrastive.cli.exit_codes import run_rank


def run() -> NoReturn:
    """Run the command, as the only process or as one of several ranks, and leave."""
    signals.end_with_run()
    if ranks.join():
        run_rank(main)
    sys.exit(main())


if __name__ == "__main__":
    run()
