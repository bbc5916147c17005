"""The guard that tells whether fires may go on. Times are passed in: nothing waits here."""

from __future__ import annotations

import schedulezero as sz
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulezero import ClockGuard, ClockReading

NOW_US = 1_800_000_000_000_000
SECOND_US = 1_000_000
STEADY = ClockReading(0, None)


def test_a_steady_clock_shows_nothing() -> None:
    guard = ClockGuard(NOW_US, 50.0, NOW_US - SECOND_US)
    for second in range(1, 100):
        assert guard.observe(NOW_US + second * SECOND_US, 50.0 + second) == STEADY


def test_a_new_database_holds_nothing() -> None:
    assert ClockGuard(0, 1.0, 0).observe(SECOND_US, 2.0) == STEADY


def test_a_step_is_told_once_with_its_size() -> None:
    for step_us in (3_600 * SECOND_US, -3_600 * SECOND_US, 5 * SECOND_US, -2 * SECOND_US):
        guard = ClockGuard(NOW_US, 50.0, 0)
        assert guard.observe(NOW_US + SECOND_US + step_us, 51.0).step_us == step_us
        assert guard.observe(NOW_US + 2 * SECOND_US + step_us, 52.0) == STEADY


def test_slewing_is_no_step() -> None:
    guard = ClockGuard(NOW_US, 50.0, 0)
    now_us = NOW_US
    for second in range(1, 1_000):
        now_us += SECOND_US - 500  # 500 ppm, as fast as adjtime slews
        assert guard.observe(now_us, 50.0 + second).step_us == 0


def test_a_clock_behind_the_database_holds_fires_and_says_how_far() -> None:
    guard = ClockGuard(NOW_US - 60 * SECOND_US, 50.0, NOW_US)
    reading = guard.observe(NOW_US - 59 * SECOND_US, 51.0)
    assert reading.holding == "the clock is 59 s behind the last time the database saw"
    assert not reading.released


def test_a_clock_behind_by_less_than_a_step_holds_nothing() -> None:
    guard = ClockGuard(NOW_US - sz.STEP_US // 2, 50.0, NOW_US)
    assert guard.observe(NOW_US - sz.STEP_US // 2 + 1, 50.0) == STEADY


def test_fires_go_on_as_soon_as_the_clock_has_caught_up() -> None:
    guard = ClockGuard(NOW_US - 3_600 * SECOND_US, 50.0, NOW_US)
    assert guard.observe(NOW_US - 3_599 * SECOND_US, 51.0).holding
    corrected = guard.observe(NOW_US + 2 * SECOND_US, 52.0)
    assert corrected.holding is None
    assert not corrected.released
    assert corrected.step_us > 3_590 * SECOND_US
    assert guard.observe(NOW_US + 3 * SECOND_US, 53.0) == STEADY


def test_a_hold_ends_by_itself_after_its_time_and_says_so_once() -> None:
    guard = ClockGuard(NOW_US - 3_600 * SECOND_US, 50.0, NOW_US)
    readings = [
        guard.observe(NOW_US - 3_600 * SECOND_US + second * SECOND_US, 50.0 + second)
        for second in range(1, int(sz.HOLD_S) + 3)
    ]
    held = [reading.holding is not None for reading in readings]
    assert held == [True] * (int(sz.HOLD_S) - 1) + [False] * 3
    assert [reading.released for reading in readings].count(True) == 1
    assert readings[int(sz.HOLD_S) - 1].released


def test_a_clock_that_goes_back_later_does_not_hold_again() -> None:
    guard = ClockGuard(NOW_US, 50.0, NOW_US - SECOND_US)
    assert guard.observe(NOW_US - 86_400 * SECOND_US, 51.0).holding is None


def test_a_process_that_was_stopped_is_noticed() -> None:
    guard = ClockGuard(NOW_US, 50.0, 0)
    assert not guard.observe(NOW_US + 2 * SECOND_US, 52.0).froze
    assert guard.observe(NOW_US + 62 * SECOND_US, 112.0).froze
    assert not guard.observe(NOW_US + 64 * SECOND_US, 114.0).froze


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-(10**13), 10**13), st.floats(0, 100)), max_size=50))
def test_a_hold_never_lasts_longer_than_its_bound(looks: list[tuple[int, float]]) -> None:
    guard = ClockGuard(NOW_US - 10**12, 0.0, NOW_US)
    monotonic_s = 0.0
    for wall_us, passed_s in looks:
        monotonic_s += passed_s
        reading = guard.observe(NOW_US + wall_us, monotonic_s)
        assert not (reading.holding and monotonic_s >= sz.HOLD_S)
