from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulezero import RetryPolicy

MIDDLE = 0.5  # the chance that leaves a delay as it is


def delays(policy: RetryPolicy, count: int, chance: float = MIDDLE) -> list[float]:
    return [policy.delay_s(failed, chance) for failed in range(1, count + 1)]


def test_the_default_is_three_attempts_from_one_second_doubled_up_to_a_minute() -> None:
    assert RetryPolicy().max_attempts == 3
    assert delays(RetryPolicy(), 8) == [1, 2, 4, 8, 16, 32, 60, 60]


def test_jitter_spreads_by_half_to_either_side() -> None:
    policy = RetryPolicy(base_delay=10)
    assert policy.delay_s(1, 0.0) == pytest.approx(5)
    assert policy.delay_s(1, 1.0) == pytest.approx(15)


def test_without_jitter_chance_does_not_matter() -> None:
    policy = RetryPolicy(jitter=0.0)
    assert delays(policy, 5, 0.0) == delays(policy, 5, 0.99)


def test_a_factor_of_one_repeats_at_the_same_pace() -> None:
    assert delays(RetryPolicy(base_delay=5, factor=1), 4) == [5, 5, 5, 5]


def test_no_delay_repeats_at_once() -> None:
    assert delays(RetryPolicy(base_delay=0), 4) == [0, 0, 0, 0]


@settings(deadline=None, max_examples=50)
@given(
    st.builds(
        RetryPolicy,
        max_attempts=st.integers(1, 10_000),
        base_delay=st.floats(0, 86_400),
        factor=st.floats(1, 100),
        max_delay=st.floats(0, 86_400),
        jitter=st.floats(0, 1),
    ),
    st.integers(1, 10_000),
    st.floats(0, 1, exclude_max=True),
)
def test_a_delay_is_finite_never_negative_and_bounded(
    policy: RetryPolicy, failed: int, chance: float
) -> None:
    delay_s = policy.delay_s(failed, chance)
    assert math.isfinite(delay_s)
    assert 0 <= delay_s <= 2 * policy.max_delay
