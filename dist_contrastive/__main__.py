"""``python -m dist_contrastive``: the same as the command ``dist-contrastive``."""

import sys

from dist_contrastive.cli import main

if __name__ == "__main__":
    sys.exit(main())
