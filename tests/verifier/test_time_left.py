"""Progress: how often a line is said, and the time left at the pace so far."""

from __future__ import annotations

from tpshard.verifier.progress import Progress, duration, steps_of


def test_a_line_every_ten_seconds_with_the_time_left() -> None:
    now, lines = [0.0], list[str]()
    progress = Progress("exact tier", 100, lines.append, lambda: now[0])
    for _ in range(50):
        now[0] += 1.0
        progress.step()
    assert lines[0] == "exact tier: 10% done, about 2 min left" and len(lines) == 5
    assert lines[-1] == "exact tier: 50% done, about 50 s left"
    now[0] += 100
    progress.step(50)
    assert len(lines) == 5  # all done: nothing is left


def test_the_first_steps_say_nothing_about_the_rest() -> None:
    now, lines = [0.0], list[str]()
    progress = Progress("exact tier", 1000, lines.append, lambda: now[0])
    now[0] += 15
    progress.step()
    assert lines == ["exact tier: 0% done"]


def test_units_and_steps() -> None:
    assert [duration(x) for x in (0.1, 80, 600, 7200)] == ["1 s", "80 s", "10 min", "2.0 h"]
    assert steps_of("native", 8, 4) > steps_of("exact", 8, 4) > 10 * 9
