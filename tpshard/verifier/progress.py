"""How much of a tier is done, and how long the rest will take at the pace so far."""

import time
from collections.abc import Callable

from tpshard.verifier.fault_catalogue import CANARIES
from tpshard.verifier.options import Say, silent

QUIET_SECONDS = 10.0
"""The least time between two lines."""
TELLING = 0.05
"""The share of the steps that says something about the rest: the first ones also load the library's code."""


def steps_of(tier: str, layers: int, ranks: int) -> int:
    """About how many steps a tier takes a process that runs so many ranks: a step is one layer of one side in one pass.

    Embedding and head count as layers. Exact: the reference, and each rank alone and fed module by module. Native: both
    sides through the cache, then both fed beside float64. A canary runs one layer.
    """
    stages = layers + 2
    passes = 1 + 2 * ranks if tier == "exact" else 6 + 3 * ranks
    return stages * passes + 3 * ranks * len(CANARIES)


class Progress:
    """Says at most every ten seconds how much of `total` steps is done, and the time left."""

    def __init__(self, what: str, total: int, say: Say = silent, clock: Callable[[], float] = time.monotonic) -> None:
        self.what, self.total, self.say, self.clock = what, max(1, total), say, clock
        self.done: float = 0
        self.begun = self.said = clock()

    def step(self, count: float = 1) -> None:
        """Count steps that are done, or parts of one."""
        self.done += count
        now = self.clock()
        if now - self.said >= QUIET_SECONDS and self.done < self.total:
            self.said = now
            share = self.done / self.total
            left = f", about {duration((now - self.begun) * (1 - share) / share)} left" if share >= TELLING else ""
            self.say(f"{self.what}: {int(100 * share)}% done{left}")


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
