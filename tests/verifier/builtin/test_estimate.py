"""The estimate of the time: what is counted, at a pace of one second an element."""

from __future__ import annotations

from dataclasses import replace

from tpshard.verifier.builtin.estimate import Pace, Work, exact_seconds, look_seconds, native_seconds
from tpshard.verifier.builtin.memory import Load, Side

NOTHING = Pace(look=0, fetch_wide=0, fetch_native=0, widen=0, wide=0, native=0, wide_step=0, native_step=0)
SIDE = Side(nbytes=2_000_000, elements=1_000_000, tables=100_000, body=800_000, head=100_000)
WORK = Work(Load(SIDE, SIDE, 8, 100_000), 4, True, 10, 0.5, True, exact=6, native=5)
ONE_LAYER = 100_000 + 100_000  # and the head


def test_the_exact_tier_multiplies_the_source_once_the_shards_twice_and_a_layer_for_each_canary() -> None:
    seconds = exact_seconds(replace(NOTHING, wide=1.0), WORK)
    assert int(seconds) == 3 * 900_000 + 6 * ONE_LAYER
    assert int(exact_seconds(replace(NOTHING, fetch_wide=1.0), WORK)) == 2 * 1_000_000 + 2 * 100_000
    streamed = replace(WORK, kept=False)
    assert int(exact_seconds(replace(NOTHING, fetch_wide=1.0), streamed)) == 3 * 900_000 + 6 * ONE_LAYER + 200_000


def test_the_native_tier_counts_every_token_in_the_layers_and_the_head_once() -> None:
    assert int(native_seconds(replace(NOTHING, native_step=1.0), WORK)) == 2 * 10 * 800_000
    native = 2 * (800_000 + 1.5 * 100_000) + 4 * 900_000 + 5 * ONE_LAYER
    assert int(native_seconds(replace(NOTHING, native=1.0), WORK)) == native
    chosen = native_seconds(replace(NOTHING, wide_step=1.0), WORK)
    assert int(chosen) == 10 * 900_000
    assert int(native_seconds(replace(NOTHING, wide_step=1.0), replace(WORK, taught=False))) == 0


def test_what_is_looked_for_comes_before_the_tiers() -> None:
    assert look_seconds(replace(NOTHING, look=1.0), WORK) == 2_000_000
    assert native_seconds(NOTHING, WORK) < 10 and exact_seconds(NOTHING, WORK) < 1
