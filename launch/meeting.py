"""Where the launchers of several machines agree on which start comes next."""

import datetime
import socket
from contextlib import suppress
from typing import Any

from dist_contrastive.errors import ConfigError, LostRankError

_AWAIT_S = 600.0  # as long as torchrun waits for the others
_NEXT, _STOP = "launch.local/start", "launch.local/stop"


class Meeting:
    """A number for each start, the same on all machines, whichever of them saw it fail first.

    On the machine that HOST names the launcher keeps the store, for itself and for torchrun's own
    rendezvous, from its first start to its last: it does not go away between two of them.

    Args:
        rdzv: HOST:PORT; None for one machine alone.

    Raises:
        ConfigError: it is no HOST:PORT, or HOST is not known.
        LostRankError: nobody was there within ten minutes.
    """

    def __init__(self, rdzv: str | None) -> None:
        self._rdzv, self._alone, self._store = rdzv, 0, None
        if rdzv is not None:
            self._store = _open(rdzv, *_parsed(rdzv))

    def next_start(self, failed: int | None = None) -> int | None:
        """The number of the next start after one that failed; None when a launcher was told to
        stop."""
        if self._store is None:
            self._alone += failed is not None
            return self._alone
        try:
            if self._store.check([_STOP]):
                return None
            if failed is None:
                return int(self._store.add(_NEXT, 0))
            # The first one to say so counts; the others learn of it.
            return int(self._store.compare_set(_NEXT, str(failed), str(failed + 1)))
        except RuntimeError as error:
            raise LostRankError(
                f"the launcher at {self._rdzv} has ended; start the same command on each machine"
            ) from error

    def stop(self) -> None:
        """No launcher is to start again."""
        if self._store is not None:
            with suppress(RuntimeError):  # the one that keeps the store has ended already
                self._store.set(_STOP, "")


def _parsed(rdzv: str) -> tuple[str, int]:
    host, _, port = rdzv.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--rdzv {rdzv} is no HOST:PORT; write it as node1:29500")
    return host, int(port)


def _open(rdzv: str, host: str, port: int) -> Any:
    from torch.distributed import TCPStore

    timeout = datetime.timedelta(seconds=_AWAIT_S)
    options: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True, "timeout": timeout}
    if _is_here(rdzv, host):
        try:
            return TCPStore(host, port, is_master=True, **options)
        except RuntimeError:
            pass  # another launcher of this machine has it
    try:
        return TCPStore(host, port, is_master=False, **options)
    except RuntimeError as error:
        raise LostRankError(
            f"no launcher at {rdzv} answered within {_AWAIT_S:g} s; start the same command on each "
            f"machine, one of which is {host}"
        ) from error


def _is_here(rdzv: str, host: str) -> bool:
    """Whether an address is one of this machine."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"--rdzv {rdzv}: {host} is not known here ({error.strerror}); give the name or address "
            f"of one of the machines"
        ) from error
    for family, kind, _, _, address in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False
