"""Items made ahead by a thread: the same, in order, no more than asked for, errors and all."""

import threading
import time
from collections.abc import Iterator

import pytest

from dist_contrastive.data.stream.prefetch import Prefetcher


def counted(made: list[int], count: int, fails_at: int | None = None) -> Iterator[int]:
    try:
        for number in range(count):
            if number == fails_at:
                raise KeyError("no more")
            made.append(number)
            yield number
    finally:
        made.append(-1)


def taken(ahead: Prefetcher[int]) -> list[int]:
    return list(iter(ahead.get, None))


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_all_in_order(count: int):
    before, made = threading.active_count(), []
    with Prefetcher(counted(made, count), 3) as ahead:
        assert taken(ahead) == list(range(count))
        assert ahead.get() is None
    assert made == [*range(count), -1]
    assert threading.active_count() == before


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_works_ahead_but_not_further_than_its_depth(depth: int):
    made: list[int] = []
    with Prefetcher(counted(made, 100), depth) as ahead:
        for used in range(1, 20):
            ahead.get()
            deadline = time.monotonic() + 5
            while len(made) < used + depth and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.005)
            assert used + depth <= len(made) <= used + max(depth, 2)
    assert made[-1] == -1, "what makes the items is closed too"


@pytest.mark.parametrize("fails_at", [0, 1, 7])
def test_an_error_comes_where_the_item_would_have(fails_at: int):
    with Prefetcher(counted([], 10, fails_at), 2) as ahead:
        assert [ahead.get() for _ in range(fails_at)] == list(range(fails_at))
        for _ in range(2 if fails_at else 1):
            with pytest.raises(KeyError, match="no more"):
                ahead.get()


def test_the_first_is_made_by_the_caller():
    """Worker processes are forked then, which is not safe beside other threads."""
    threads = []

    def items() -> Iterator[int]:
        for number in range(3):
            threads.append(threading.current_thread())
            yield number

    with Prefetcher(items(), 2) as ahead:
        assert taken(ahead) == [0, 1, 2]
    assert threads[0] is threading.main_thread()
    assert threads[1] is threads[2] is not threads[0]


def test_a_caller_that_should_stop_does_not_wait(monkeypatch: pytest.MonkeyPatch):
    """An item that takes for ever: neither asking nor leaving waits for it."""
    monkeypatch.setattr("dist_contrastive.data.stream.prefetch._LEAVE_S", 0.2)
    released = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        released.wait(60)
        yield 1

    flag: list[int] = []
    threading.Timer(0.3, flag.append, [1]).start()
    begin = time.monotonic()
    with Prefetcher(items(), 2) as ahead:
        assert ahead.get(stop=lambda: bool(flag)) == 0
        assert ahead.get(stop=lambda: bool(flag)) is None
    assert 0.25 < time.monotonic() - begin < 5
    released.set()
