"""Items made ahead by a thread: the same, in order, no more than asked for, errors and all."""

import threading
import time
from collections.abc import Iterator

import pytest

from dist_contrastive.data.stream.prefetch import ahead


def counted(made: list[int], count: int, fails_at: int | None = None) -> Iterator[int]:
    try:
        for number in range(count):
            if number == fails_at:
                raise KeyError("no more")
            made.append(number)
            yield number
    finally:
        made.append(-1)


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_all_in_order(count: int):
    before, made = threading.active_count(), []
    assert list(ahead(counted(made, count), 3)) == list(range(count))
    assert made == [*range(count), -1]
    assert threading.active_count() == before


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_works_ahead_but_not_further_than_its_depth(depth: int):
    made: list[int] = []
    items = ahead(counted(made, 100), depth)
    for used in range(1, 20):
        next(items)
        deadline = time.monotonic() + 5
        while len(made) < used + depth and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)
        assert used + depth <= len(made) <= used + max(depth, 2)
    items.close()
    assert made[-1] == -1, "what makes the items is closed too"


@pytest.mark.parametrize("fails_at", [0, 1, 7])
def test_an_error_comes_where_the_item_would_have(fails_at: int):
    items = ahead(counted([], 10, fails_at), 2)
    assert [next(items) for _ in range(fails_at)] == list(range(fails_at))
    with pytest.raises(KeyError, match="no more"):
        next(items)


def test_the_first_is_made_by_the_caller():
    """Worker processes are forked then, which is not safe beside other threads."""
    threads = []

    def items() -> Iterator[int]:
        for number in range(3):
            threads.append(threading.current_thread())
            yield number

    assert list(ahead(items(), 2)) == [0, 1, 2]
    assert threads[0] is threading.main_thread()
    assert threads[1] is threads[2] is not threads[0]
