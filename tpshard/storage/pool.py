"""One pool of threads, for everything that reads, copies or hashes side by side."""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Pool:
    """At most `workers` threads that live as long as one call of `run` or `map`.

    The first error stops the others and is raised by the call when all have ended; so is KeyboardInterrupt. Work that
    takes long looks at `stopped` now and then.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.stopped = threading.Event()

    def run(self, work: Callable[[], None], meanwhile: Callable[[], None] = lambda: None) -> None:
        """Call `work` on every thread. meanwhile: called from this thread some twenty times a second until they end."""
        errors: list[BaseException] = []
        self.stopped.clear()

        def body() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
                self.stopped.set()

        threads = [threading.Thread(target=body, name=f"tpshard-{i}", daemon=True) for i in range(self.workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.05)
                    meanwhile()
        finally:
            self.stopped.set()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """The results in the order of the items. Of several items that fail, the first one's error is raised.

        A pool of one worker, or for one item, is this thread.
        """
        if min(self.workers, len(items)) <= 1:
            return [function(item) for item in items]
        pending = iter(enumerate(items))
        turn = threading.Lock()
        results: dict[int, R] = {}
        errors: dict[int, BaseException] = {}

        def work() -> None:
            while not self.stopped.is_set():
                with turn:  # items are begun in order, so all before one that fails are finished
                    taken = next(pending, None)
                if taken is None:
                    return
                try:
                    results[taken[0]] = function(taken[1])
                except BaseException as error:
                    errors[taken[0]] = error
                    self.stopped.set()

        self.run(work)
        if errors:
            raise errors[min(errors)]
        return [results[index] for index in sorted(results)]
