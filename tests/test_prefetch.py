"""Prefetcher: the same items in order, no more ahead than asked for, errors and all."""

import threading
import time
from collections.abc import Iterator

import pytest

from dist_contrastive.data.stream.shard_stream import Prefetcher


def counted(made: list[int], count: int, fails_at: int | None = None) -> Iterator[int]:
    try:
        for number in range(count):
            if number == fails_at:
                raise KeyError("no more")
            made.append(number)
            yield number
    finally:
        made.append(-1)


def all_of(prefetcher: Prefetcher[int]) -> list[int]:
    return list(iter(prefetcher.get, None))


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_all_in_order(count: int):
    before, made = threading.active_count(), []
    with Prefetcher(counted(made, count), 3) as prefetcher:
        assert all_of(prefetcher) == list(range(count))
        assert prefetcher.get() is None
    assert made == [*range(count), -1]
    assert threading.active_count() == before


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_works_ahead_but_not_further_than_its_depth(depth: int):
    made: list[int] = []
    with Prefetcher(counted(made, 100), depth) as prefetcher:
        for used in range(1, 20):
            prefetcher.get()
            deadline = time.monotonic() + 120
            while len(made) < used + depth and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.005)
            assert used + depth <= len(made) <= used + max(depth, 2)
    assert made[-1] == -1, "what makes the items is closed too"


@pytest.mark.parametrize("fails_at", [0, 1, 7])
def test_an_error_comes_where_the_item_would_have(fails_at: int):
    with Prefetcher(counted([], 10, fails_at), 2) as prefetcher:
        assert [prefetcher.get() for _ in range(fails_at)] == list(range(fails_at))
        for _ in range(2 if fails_at else 1):
            with pytest.raises(KeyError, match="no more"):
                prefetcher.get()


def test_the_first_is_made_by_the_caller():
    """Worker processes are forked then, which is not safe beside other threads."""
    threads = []

    def items() -> Iterator[int]:
        for number in range(3):
            threads.append(threading.current_thread())
            yield number

    with Prefetcher(items(), 2) as prefetcher:
        assert all_of(prefetcher) == [0, 1, 2]
    assert threads[0] is threading.main_thread()
    assert threads[1] is threads[2] is not threads[0]


def test_a_caller_that_should_stop_does_not_wait():
    """An item that takes for ever: neither asking nor leaving waits for it."""
    begun, released, made = threading.Event(), threading.Event(), []

    def items() -> Iterator[int]:
        yield 0
        begun.set()
        released.wait()
        made.append(1)
        yield 1

    with Prefetcher(items(), 2, leave_s=0.2) as prefetcher:
        assert prefetcher.get() == 0
        assert begun.wait(120)
        assert prefetcher.get(stop=lambda: True) is None
    assert not made
    released.set()
