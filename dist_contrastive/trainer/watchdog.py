"""Watchdog thread: ends a rank that hangs, and stops one whose launcher has died."""

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from dist_contrastive.errors import StalledError

# Files of the innermost frame of a rank that waits for others.
_WAITING = ("torch/distributed/", "torch/autograd/graph.py", "deepspeed/comm/")
_GRACE_S = 5.0  # ranks that wait report later than the rank that they wait for
_POLL_S = 1.0


class Watchdog:
    """Ends the process with exit code 75 when there has been no heartbeat for too long.

    Time is counted in polls of this thread, each worth at most twice the interval: while the
    process is stopped or the machine sleeps none passes, and no clock is read that may be set.

    Args:
        timeout_s: longest time between two calls of `heartbeat`.
        rank: for the message.
        end: called with the message and the exit code.
    """

    def __init__(
        self,
        timeout_s: float,
        rank: int,
        end: Callable[[str, int], None] = lambda text, code: _end(text, code),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_s, self._rank = timeout_s, rank
        self._end, self._clock = end, clock
        self._poll_s = min(_POLL_S, timeout_s / 10)
        self._silent_s, self._last = 0.0, clock()
        self._watched = threading.get_ident()
        self._parent = os.getppid()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopped.set()
        self._thread.join()

    def heartbeat(self) -> None:
        """Note that the rank has come to the next step."""
        self._silent_s = 0.0

    def poll(self) -> None:
        """Count the time since the last poll, and end the process if that was too much."""
        now = self._clock()
        self._silent_s += min(now - self._last, 2 * self._poll_s)
        self._last = now
        frame = sys._current_frames().get(self._watched)
        limit = self._timeout_s + (_GRACE_S if _waits(frame) else 0.0)
        if self._silent_s > limit:
            self._end(self._report(frame), StalledError.exit_code)

    def _watch(self) -> None:
        is_rank = "LOCAL_RANK" in os.environ
        while not self._stopped.wait(self._poll_s):
            self.poll()
            if is_rank and os.getppid() != self._parent:
                # No launcher would signal this rank any more: save, and leave.
                is_rank = False
                os.kill(os.getpid(), signal.SIGTERM)

    def _report(self, frame: FrameType | None) -> str:
        stack = traceback.extract_stack(frame)
        own = [line for line in stack if "dist_contrastive" in line.filename] or stack
        where = f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}"
        what = "waits for other ranks" if _waits(frame) else "hangs"
        return (
            f"rank {self._rank} {what} at {where}: no step for backend.timeout_s="
            f"{self._timeout_s:g} s; start it again, or give it more time"
        )


def _waits(frame: FrameType | None) -> bool:
    return frame is not None and any(part in frame.f_code.co_filename for part in _WAITING)


def _end(text: str, code: int) -> None:
    # Not by logging: the thread that hangs may hold the lock of a handler.
    print(f"dist-contrastive, {text}", file=sys.stderr, flush=True)
    if " hangs " in text:
        faulthandler.dump_traceback(sys.stderr)
    os._exit(code)
