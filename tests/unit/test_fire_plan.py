"""Fire plans: what becomes of every fire time that is due, however many there are."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import schedulezero as sz
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulezero import Coalesce, Fire, Reason

NOON = datetime(2027, 3, 3, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY_S = 86_400.0


def trigger_of(**config: Any) -> sz.Trigger:
    return sz.parse_trigger(config, timezone="UTC", now=datetime(2027, 1, 1, tzinfo=UTC))


HOURLY = trigger_of(type="cron", minute=0)
SECONDLY = trigger_of(type="cron", second="*")


def plan(
    trigger: sz.Trigger,
    due_at: datetime,
    now: datetime,
    coalesce: Coalesce = Coalesce.LATEST,
    grace_s: float = DAY_S,
    reason: Reason | None = None,
) -> sz.FirePlan:
    return sz.plan_fires(trigger, due_at, now, coalesce=coalesce, grace_s=grace_s, reason=reason)


@pytest.mark.parametrize("coalesce", list(Coalesce))
def test_a_single_fire_in_time_runs_and_the_next_is_planned(coalesce: Coalesce) -> None:
    now = NOON + timedelta(milliseconds=3)
    assert plan(HOURLY, NOON, now, coalesce) == sz.FirePlan((Fire(NOON, True),), NOON + HOUR)


@pytest.mark.parametrize("coalesce", list(Coalesce))
def test_a_single_fire_within_its_grace_runs_late(coalesce: Coalesce) -> None:
    now = NOON + timedelta(minutes=59)
    assert plan(HOURLY, NOON, now, coalesce, reason=Reason.DOWN).fires == (Fire(NOON, True),)


@pytest.mark.parametrize("coalesce", list(Coalesce))
def test_a_single_fire_beyond_its_grace_is_missed(coalesce: Coalesce) -> None:
    now = NOON + timedelta(seconds=61)
    assert plan(HOURLY, NOON, now, coalesce, 61).fires == (Fire(NOON, True),)
    assert plan(HOURLY, NOON, now, coalesce, 60).fires == (Fire(NOON, False, Reason.TOO_LATE),)
    missed = (Fire(NOON, False, Reason.CLOCK_STEP),)
    assert plan(HOURLY, NOON, now, coalesce, 60, Reason.CLOCK_STEP).fires == missed


def test_latest_runs_the_newest_fire_for_all_the_others() -> None:
    now = NOON + timedelta(minutes=30)
    (fire,) = plan(HOURLY, NOON - 71 * HOUR, now, reason=Reason.DOWN).fires
    assert fire == Fire(NOON, True, Reason.DOWN, 71, NOON - 71 * HOUR)


def test_latest_misses_all_if_even_the_newest_is_too_late() -> None:
    now = NOON + timedelta(minutes=30)
    (fire,) = plan(HOURLY, NOON - 71 * HOUR, now, grace_s=60, reason=Reason.DOWN).fires
    assert fire == Fire(NOON, False, Reason.DOWN, 71, NOON - 71 * HOUR)


def test_none_runs_no_catch_up_but_what_is_due_now() -> None:
    due_at = NOON - 9 * HOUR
    fires = plan(HOURLY, due_at, NOON, Coalesce.NONE, reason=Reason.DOWN).fires
    assert fires == (Fire(NOON - HOUR, False, Reason.DOWN, 8, due_at), Fire(NOON, True))
    late = NOON + timedelta(seconds=2)
    fires = plan(HOURLY, due_at, late, Coalesce.NONE, reason=Reason.DOWN).fires
    assert fires == (Fire(NOON, False, Reason.DOWN, 9, due_at),)


def test_all_runs_each_fire_in_time_order() -> None:
    fires = plan(HOURLY, NOON - 3 * HOUR, NOON, Coalesce.ALL, reason=Reason.DOWN).fires
    assert fires == tuple(Fire(NOON - n * HOUR, True) for n in (3, 2, 1, 0))


def test_all_runs_at_most_the_newest_hundred() -> None:
    due_at = NOON - timedelta(days=10)
    missed, *runs = plan(HOURLY, due_at, NOON, Coalesce.ALL, 1e9, Reason.CLOCK_STEP).fires
    assert [fire.nominal_at for fire in runs] == [NOON - n * HOUR for n in range(99, -1, -1)]
    assert missed == Fire(NOON - 100 * HOUR, False, Reason.CLOCK_STEP, 140, due_at)


def test_all_runs_only_what_is_within_the_grace() -> None:
    fires = plan(HOURLY, NOON - 5 * HOUR, NOON, Coalesce.ALL, 7200, Reason.DOWN).fires
    missed = Fire(NOON - 3 * HOUR, False, Reason.DOWN, 2, NOON - 5 * HOUR)
    assert fires == (missed, *(Fire(NOON - n * HOUR, True) for n in (2, 1, 0)))


@pytest.mark.parametrize("coalesce", list(Coalesce))
def test_a_due_time_that_the_trigger_no_longer_has_is_a_fire_all_the_same(
    coalesce: Coalesce,
) -> None:
    due_at = NOON - timedelta(minutes=7)
    assert plan(HOURLY, due_at, NOON - timedelta(minutes=6), coalesce).fires == (
        Fire(due_at, True),
    )
    fires = plan(HOURLY, due_at, NOON, coalesce).fires
    assert sum(1 + fire.coalesced for fire in fires) == 2
    ended = trigger_of(type="date", run_date="2027-02-01")
    assert plan(ended, due_at, NOON, coalesce) == sz.FirePlan((Fire(due_at, True),), None)


def test_nothing_is_due_before_its_time() -> None:
    assert plan(HOURLY, NOON, NOON - HOUR) == sz.FirePlan((), NOON)


def test_a_fire_at_the_last_instant_is_not_followed_by_another() -> None:
    trigger = trigger_of(type="interval", hours=1, end_time="2027-03-03T12:00")
    assert plan(trigger, NOON, NOON) == sz.FirePlan((Fire(NOON, True),), None)


@pytest.mark.parametrize("coalesce", list(Coalesce))
@pytest.mark.parametrize("years", [1, 10, 70])
def test_years_of_seconds_are_planned_at_once(coalesce: Coalesce, years: int) -> None:
    now = NOON + timedelta(days=365 * years)
    plan(SECONDLY, NOON, now, coalesce)  # fills the cache of zones
    begun = time.process_time()
    fires = plan(SECONDLY, NOON, now, coalesce, reason=Reason.DOWN).fires
    assert time.process_time() - begun < 0.25  # 10 ms; a walk takes hours
    assert sum(1 + fire.coalesced for fire in fires) == 365 * years * 86_400 + 1
    assert len(fires) <= sz.MAX_COALESCE_ALL + 1


TRIGGERS = [
    HOURLY,
    SECONDLY,
    trigger_of(type="interval", seconds=7.5),
    trigger_of(type="interval", days=3),
    trigger_of(type="date", run_date="2027-03-03T11:59"),
    trigger_of(type="cron", expression="30 2 * * *", timezone="Europe/Berlin"),
    trigger_of(
        type="cron", expression="*/10 1-3 * * *", timezone="Australia/Lord_Howe", dst="both"
    ),
    trigger_of(type="calendar_interval", months=1, start_date="2027-01-31"),
    trigger_of(
        type="or", triggers=[{"type": "cron", "hour": "*/2"}, {"type": "cron", "hour": "*/3"}]
    ),
]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(TRIGGERS),
    st.datetimes(datetime(2027, 1, 2), datetime(2027, 12, 1), timezones=st.just(UTC)),
    st.floats(0, 1e6),
    st.booleans(),
    st.sampled_from(list(Coalesce)),
    st.floats(0, 1e6),
    st.sampled_from([None, *Reason]),
)
def test_every_due_fire_is_accounted_for_exactly_once(
    trigger: sz.Trigger,
    at: datetime,
    late_s: float,
    is_edited: bool,
    coalesce: Coalesce,
    grace_s: float,
    reason: Reason | None,
) -> None:
    fire_at = trigger.next_after(at)
    due_at = at if is_edited or fire_at is None else fire_at
    now = due_at + timedelta(seconds=late_s)
    planned = plan(trigger, due_at, now, coalesce, grace_s, reason)
    later = trigger.count_between(due_at + timedelta(microseconds=1), now)
    assert sum(1 + fire.coalesced for fire in planned.fires) == 1 + later
    times = [fire.nominal_at for fire in planned.fires]
    assert times == sorted(set(times)) and due_at <= times[0] and times[-1] <= now
    assert all(t == due_at or trigger.latest_until(t) == t for t in times)
    assert planned.next_fire_at == trigger.next_after(now)
    for fire in planned.fires:
        is_recent = (now - fire.nominal_at).total_seconds() <= grace_s
        assert is_recent or not fire.run
        assert (fire.coalesced_from == due_at) == (fire.coalesced > 0)
        assert (fire.reason is None) == (fire.run and not fire.coalesced)
    missed = [fire for fire in planned.fires if not fire.run]
    assert len(missed) <= 1 and (not missed or planned.fires[0] is missed[0])
    if coalesce is Coalesce.LATEST:
        assert len(planned.fires) == 1


def test_jitter_is_spread_over_its_bound_and_the_same_for_the_same_fire() -> None:
    delays = [sz.jitter_s(f"job-{n}", NOON, 60.0) for n in range(1000)]
    assert all(0 <= delay < 60 for delay in delays)
    assert 28 < sum(delays) / 1000 < 32
    assert sz.jitter_s("job-7", NOON, 60.0) == delays[7] == 2 * sz.jitter_s("job-7", NOON, 30.0)
    assert sz.jitter_s("job-7", NOON + HOUR, 60.0) != delays[7]
    assert sz.jitter_s("job-7", NOON, 0.0) == 0.0
