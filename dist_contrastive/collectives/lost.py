"""Errors by which a rank learns that another one has ended."""

import re

from torch.distributed import DistBackendError, DistNetworkError

_GLOO = re.compile(r"gloo/|Connection (closed|reset) by peer|Broken pipe|Timed out waiting")


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed since another rank has ended or does not answer. gloo tells so by
    the text of a RuntimeError alone."""
    if isinstance(error, DistBackendError | DistNetworkError):
        return True
    return type(error) is RuntimeError and _GLOO.search(str(error)) is not None
