"""``python -m dist_contrastive``: the same as the command ``dist-contrastive``."""

import os
import sys
import traceback

from dist_contrastive.cli import main


def run_rank() -> None:
    """Run as one of several ranks, and leave at once when done.

    Threads of gloo drop their last tensors late; when Python is being finalised under them they
    abort the process (exit code 134), although everything was done and saved.
    """
    try:
        code = main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        run_rank()
    sys.exit(main())
