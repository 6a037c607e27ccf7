"""Rendezvous of the launchers of several machines, which agree on each start.

torchrun's own `--max-restarts` does not do: its agents restart after every failure, also one whose
exit code is final, and count restarts in all instead of those without a new checkpoint.
"""

import datetime
import socket
from contextlib import suppress
from typing import Any

from dist_contrastive.errors import ConfigError, LostRankError

_AWAIT_S = 600.0  # as long as torchrun waits for the others
_NEXT, _STOP = "launch.local/start", "launch.local/stop"


class Rendezvous:
    """Number of each start, the same on all machines, whichever of them saw the last one fail.

    The launcher on the machine HOST keeps the store, for itself and for torchrun's c10d rendezvous,
    from its first start to its last: it does not go away between two of them.

    Args:
        endpoint: HOST:PORT; None for one machine alone.

    Raises:
        ConfigError: it is no HOST:PORT, or HOST is not known.
        LostRankError: nobody was there within ten minutes.
    """

    def __init__(self, endpoint: str | None) -> None:
        self._endpoint, self._local_start, self._store = endpoint, 0, None
        if endpoint is not None:
            self._store = _open_store(endpoint, *_parse(endpoint))

    def next_start(self, failed: int | None = None) -> int | None:
        """The number of the next start after one that failed; None once a launcher has called
        `stop`."""
        if self._store is None:
            self._local_start += failed is not None
            return self._local_start
        try:
            if self._store.check([_STOP]):
                return None
            if failed is None:
                return int(self._store.add(_NEXT, 0))
            # Whoever is first sets the number, the others read it.
            return int(self._store.compare_set(_NEXT, str(failed), str(failed + 1)))
        except RuntimeError as error:
            raise LostRankError(
                f"the launcher at {self._endpoint} has ended; start the same command on each "
                f"machine"
            ) from error

    def stop(self) -> None:
        """Keep all launchers from starting again."""
        if self._store is not None:
            with suppress(RuntimeError):  # the one that keeps the store has ended already
                self._store.set(_STOP, "")
                self._store.check([_STOP])  # answered once it is set, for whoever asks next


def _parse(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--rdzv {endpoint} is no HOST:PORT; write it as node1:29500")
    return host, int(port)


def _open_store(endpoint: str, host: str, port: int) -> Any:
    from torch.distributed import TCPStore

    timeout = datetime.timedelta(seconds=_AWAIT_S)
    options: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True, "timeout": timeout}
    if _is_local(endpoint, host):
        try:
            return TCPStore(host, port, is_master=True, **options)
        except RuntimeError:
            pass  # another launcher of this machine has it
    try:
        return TCPStore(host, port, is_master=False, **options)
    except RuntimeError as error:
        raise LostRankError(
            f"no launcher at {endpoint} answered within {_AWAIT_S:g} s; start the same command on "
            f"each machine, one of which is {host}"
        ) from error


def _is_local(endpoint: str, host: str) -> bool:
    """Whether a host name or address is that of this machine."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"--rdzv {endpoint}: {host} is not known here ({error.strerror}); give the name or "
            f"address of one of the machines"
        ) from error
    for family, kind, _, _, address in addresses:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False
