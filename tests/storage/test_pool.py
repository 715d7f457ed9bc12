"""The pool of threads: order, the first error, and that nothing goes on after it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tpshard.storage.pool import Pool


def test_results_are_in_the_order_of_the_items_whichever_ends_first() -> None:
    second = threading.Event()

    def square(number: int) -> int:
        assert second.wait(60) if number == 1 else (second.set() or True)
        return number * number

    assert Pool(2).map(square, [1, 2, 3]) == [1, 4, 9]


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_no_items_and_one_item(workers: int) -> None:
    assert Pool(workers).map(str, []) == []
    assert Pool(workers).map(str, [7]) == ["7"]


def test_no_more_threads_than_workers() -> None:
    running, most, lock = [0], [0], threading.Lock()

    def work(item: int) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.002)
        with lock:
            running[0] -= 1

    Pool(3).map(work, range(30))
    assert most[0] == 3


def test_of_several_items_that_fail_the_first_is_raised_and_no_other_begins() -> None:
    begun: list[int] = []
    late = threading.Event()

    def fail(item: int) -> None:
        begun.append(item)
        if item == 0:
            assert late.wait(60)
        late.set()
        raise ValueError(str(item))

    before = threading.active_count()
    with pytest.raises(ValueError, match="0"):
        Pool(2).map(fail, range(100))
    assert sorted(begun) == [0, 1] and threading.active_count() == before


def test_a_long_item_sees_that_another_has_failed() -> None:
    pool = Pool(2)

    def work(item: int) -> bool:
        if item == 1:
            raise ValueError("the other")
        return pool.stopped.wait(60)

    with pytest.raises(ValueError, match="the other"):
        pool.map(work, [0, 1])


def test_a_pool_serves_again_after_an_error() -> None:
    pool = Pool(2)
    with pytest.raises(ZeroDivisionError):
        pool.map(lambda item: 1 // item, [0, 1, 2])
    assert pool.map(lambda item: -item, [1, 2, 3]) == [-1, -2, -3]


def test_an_interrupt_stops_the_threads_and_is_raised_after_they_ended() -> None:
    pool, before = Pool(4), threading.active_count()

    def interrupt() -> None:
        raise KeyboardInterrupt

    def until_stopped() -> None:
        assert pool.stopped.wait(60)

    with pytest.raises(KeyboardInterrupt):
        pool.run(until_stopped, meanwhile=interrupt)
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_error_of_a_thread_is_raised_by_the_caller(kind: type[BaseException]) -> None:
    def run(action: Callable[[], None]) -> None:
        Pool(2).run(action)

    def fail() -> None:
        raise kind("here")

    with pytest.raises(kind, match="here"):
        run(fail)
