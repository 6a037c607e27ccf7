"""Choice of the way in which pairs are computed."""

import functools
import logging
from typing import Literal, get_args

from dist_contrastive.errors import ConfigError

Impl = Literal["auto", "dense", "chunked", "triton"]
IMPLS: tuple[Impl, ...] = get_args(Impl)

# Below this many scores one matrix product beats a loop over tiles, and 4 MiB are no matter.
_DENSE_UP_TO = 2**20

_log = logging.getLogger(__name__)


def choose(impl: Impl, num_scores: int, unfit: str | None, cuda: bool = False) -> Impl:
    """Resolve ``auto``: on CUDA kernels where they can run; else dense for up to 2**20 scores, and
    chunked for more.

    Args:
        unfit: why kernels cannot run; None: they can.
    """
    if impl not in IMPLS:
        raise ConfigError(f"impl={impl!r} is not known; use one of {', '.join(IMPLS)}")
    if impl == "triton" and unfit is not None:
        raise ConfigError(f"impl='triton' cannot be used: {unfit}; use auto, dense or chunked")
    if impl != "auto":
        return impl
    if cuda:
        if unfit is None:
            return "triton"
        _say_once(f"no kernels, hence slower on a GPU: {unfit}")
    return "dense" if num_scores <= _DENSE_UP_TO else "chunked"


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)
