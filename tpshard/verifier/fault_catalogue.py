"""The faults that a verification injects, and what makes them visible."""

from __future__ import annotations

CANARIES = (
    "rank-files-exchanged",
    "heads-swapped-in-a-rank",
    "heads-swapped-between-ranks",
    "k-and-v-exchanged",
    "gate-and-up-exchanged",
    "wrong-kv-replica",
    "out-bias-dropped",
    "down-bias-dropped",
    "v-bias-dropped",
    "out-bias-added-tp-times",
    "down-bias-added-tp-times",
    "up-row-shifted",
    "sign-of-an-element-of-out",
)


# These need a second rank.
BETWEEN_RANKS = ("rank-files-exchanged", "heads-swapped-between-ranks", "wrong-kv-replica")


# A fault whose true effect is below this many times the dtype's own error cannot be asked of the native tier.
VISIBLE = 3.0
