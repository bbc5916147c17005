"""Triggers: what they accept, when they fire, what they cost, what they say."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import schedulezero as sz
from hypothesis import given, settings
from hypothesis import strategies as st

NOW = datetime(2027, 3, 3, 12, 0, 5, 250_000, tzinfo=UTC)  # a Wednesday
BERLIN = "Europe/Berlin"
US = timedelta(microseconds=1)


def parse(config: Any, zone: str = "UTC", now: datetime = NOW) -> sz.Trigger:
    return sz.parse_trigger(config, timezone=zone, now=now)


def cron(**fields: Any) -> sz.Trigger:
    return parse({"type": "cron", **fields})


def next_fires(trigger: sz.Trigger, n: int, after: datetime = NOW) -> list[str]:
    """The next n fires in the trigger's zone, as weekday, date and time."""
    fires: list[str] = []
    at: datetime | None = after
    while at is not None and len(fires) < n:
        at = trigger.next_after(at)
        if at is not None:
            fires.append(f"{at.astimezone(trigger.zone):%a %Y-%m-%d %H:%M:%S}")
    return fires


# Cron fields


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"minute": 0}, ["Wed 2027-03-03 13:00:00", "Wed 2027-03-03 14:00:00"]),
        ({"hour": 2, "minute": 30}, ["Thu 2027-03-04 02:30:00", "Fri 2027-03-05 02:30:00"]),
        ({"hour": "2"}, ["Thu 2027-03-04 02:00:00", "Fri 2027-03-05 02:00:00"]),
        ({"second": "*/20"}, ["Wed 2027-03-03 12:00:20", "Wed 2027-03-03 12:00:40"]),
        ({"second": 7}, ["Wed 2027-03-03 12:00:07", "Wed 2027-03-03 12:01:07"]),
        ({"day_of_week": "mon"}, ["Mon 2027-03-08 00:00:00", "Mon 2027-03-15 00:00:00"]),
        ({"day_of_week": 0}, ["Sun 2027-03-07 00:00:00", "Sun 2027-03-14 00:00:00"]),
        ({"day_of_week": "7"}, ["Sun 2027-03-07 00:00:00", "Sun 2027-03-14 00:00:00"]),
        (
            {"day_of_week": "sat-mon"},
            [
                "Sat 2027-03-06 00:00:00",
                "Sun 2027-03-07 00:00:00",
                "Mon 2027-03-08 00:00:00",
                "Sat 2027-03-13 00:00:00",
            ],
        ),
        ({"month": 6}, ["Tue 2027-06-01 00:00:00", "Thu 2028-06-01 00:00:00"]),
        ({"month": "jun-aug/2"}, ["Tue 2027-06-01 00:00:00", "Sun 2027-08-01 00:00:00"]),
        ({"year": 2029}, ["Mon 2029-01-01 00:00:00"]),
        ({"year": "2028,2030", "month": 2, "day": 29}, ["Tue 2028-02-29 00:00:00"]),
        ({"day": "last"}, ["Wed 2027-03-31 00:00:00", "Fri 2027-04-30 00:00:00"]),
        ({"month": 2, "day": "last"}, ["Tue 2028-02-29 00:00:00", "Wed 2029-02-28 00:00:00"]),
        ({"day": "1st mon"}, ["Mon 2027-04-05 00:00:00", "Mon 2027-05-03 00:00:00"]),
        ({"day": "last fri, 3rd  Tue"}, ["Tue 2027-03-16 00:00:00", "Fri 2027-03-26 00:00:00"]),
        ({"day": "5th wed"}, ["Wed 2027-03-31 00:00:00", "Wed 2027-06-30 00:00:00"]),
        ({"day": "10, last"}, ["Wed 2027-03-10 00:00:00", "Wed 2027-03-31 00:00:00"]),
        ({"day": 13, "day_of_week": "fri"}, ["Fri 2027-08-13 00:00:00", "Fri 2028-10-13 00:00:00"]),
        ({"week": 53}, ["Mon 2032-12-27 00:00:00", "Tue 2032-12-28 00:00:00"]),
        ({"week": 1, "day_of_week": "tue"}, ["Tue 2028-01-04 00:00:00", "Tue 2029-01-02 00:00:00"]),
        ({"hour": "9-17/4", "minute": 15}, ["Wed 2027-03-03 13:15:00", "Wed 2027-03-03 17:15:00"]),
        (
            {"minute": "50/5"},
            ["Wed 2027-03-03 12:50:00", "Wed 2027-03-03 12:55:00", "Wed 2027-03-03 13:50:00"],
        ),
        ({"hour": 23, "minute": 59, "second": 59}, ["Wed 2027-03-03 23:59:59"]),
    ],
)
def test_cron_fields_have_apschedulers_meaning(fields: dict[str, Any], expected: list[str]) -> None:
    assert next_fires(cron(**fields), len(expected)) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("*/5 9-17 * * mon-fri", ["Wed 2027-03-03 12:05:00", "Wed 2027-03-03 12:10:00"]),
        ("0 0 * * 0", ["Sun 2027-03-07 00:00:00", "Sun 2027-03-14 00:00:00"]),
        ("0 0 * * 7", ["Sun 2027-03-07 00:00:00", "Sun 2027-03-14 00:00:00"]),
        ("0 0 * * 0-7", ["Thu 2027-03-04 00:00:00", "Fri 2027-03-05 00:00:00"]),
        (
            "0 0 * * 5-7",
            [
                "Fri 2027-03-05 00:00:00",
                "Sat 2027-03-06 00:00:00",
                "Sun 2027-03-07 00:00:00",
                "Fri 2027-03-12 00:00:00",
            ],
        ),
        (
            "0 0 * * Fri-Sun",
            [
                "Fri 2027-03-05 00:00:00",
                "Sat 2027-03-06 00:00:00",
                "Sun 2027-03-07 00:00:00",
                "Fri 2027-03-12 00:00:00",
            ],
        ),
        (
            "0 0 * * 1-5/2",
            ["Fri 2027-03-05 00:00:00", "Mon 2027-03-08 00:00:00", "Wed 2027-03-10 00:00:00"],
        ),
        (
            "0 0 * * */2",
            [
                "Thu 2027-03-04 00:00:00",
                "Sat 2027-03-06 00:00:00",
                "Sun 2027-03-07 00:00:00",
                "Tue 2027-03-09 00:00:00",
            ],
        ),
        # Day of month or day of week, unless either begins with a star: Vixie's DOM_STAR, DOW_STAR.
        (
            "0 0 13 * fri",
            ["Fri 2027-03-05 00:00:00", "Fri 2027-03-12 00:00:00", "Sat 2027-03-13 00:00:00"],
        ),
        ("0 0 */2 * fri", ["Fri 2027-03-05 00:00:00", "Fri 2027-03-19 00:00:00"]),
        ("0 0 13 * */2", ["Sat 2027-03-13 00:00:00", "Tue 2027-04-13 00:00:00"]),
        ("0 0 1-31 * fri", ["Thu 2027-03-04 00:00:00", "Fri 2027-03-05 00:00:00"]),
        ("0 0 1 jan,JUL *", ["Thu 2027-07-01 00:00:00", "Sat 2028-01-01 00:00:00"]),
        ("0\t0  29 2 *", ["Tue 2028-02-29 00:00:00", "Sun 2032-02-29 00:00:00"]),
        ("@hourly", ["Wed 2027-03-03 13:00:00", "Wed 2027-03-03 14:00:00"]),
        ("@daily", ["Thu 2027-03-04 00:00:00"]),
        ("@midnight", ["Thu 2027-03-04 00:00:00"]),
        ("@weekly", ["Sun 2027-03-07 00:00:00"]),
        ("@Monthly", ["Thu 2027-04-01 00:00:00"]),
        ("@yearly", ["Sat 2028-01-01 00:00:00"]),
        ("@annually", ["Sat 2028-01-01 00:00:00"]),
    ],
)
def test_expressions_have_vixies_meaning(expression: str, expected: list[str]) -> None:
    assert next_fires(cron(expression=expression), len(expected)) == expected


def test_a_cron_trigger_keeps_within_its_bounds() -> None:
    trigger = cron(hour=9, start_time="2027-03-10T09:00", end_time="2027-03-12T09:00:00Z")
    days = ["Wed 2027-03-10 09:00:00", "Thu 2027-03-11 09:00:00", "Fri 2027-03-12 09:00:00"]
    assert next_fires(trigger, 9) == days
    assert trigger.count_between(NOW, NOW + timedelta(days=99)) == 3
    assert trigger.latest_until(NOW) is None
    last = datetime(2027, 3, 12, 9, tzinfo=UTC)
    assert trigger.next_after(last - US) == last == trigger.latest_until(last)


def test_fires_end_with_the_last_year_wherever_its_midnight_is() -> None:
    for zone, local in (
        ("Pacific/Kiritimati", "2101-01-01 00:00"),
        ("America/New_York", "2100-12-31 00:00"),
    ):
        last = parse({"type": "cron", "hour": 0}, zone).latest_until(
            datetime(2200, 1, 1, tzinfo=UTC)
        )
        assert last is not None and f"{last.astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M}" == local
    first = parse({"type": "cron", "hour": 16}, "America/Los_Angeles").latest_until(sz.EPOCH)
    assert first == sz.EPOCH


def test_rare_fires_next_to_the_end_of_a_year_are_found_from_both_sides() -> None:
    for zone in ("UTC", BERLIN, "America/Los_Angeles", "Pacific/Kiritimati"):
        for expression in ("0 12 31 12 *", "30 0 1 1 *", "59 23 31 12 *", "0 0 2 1 *"):
            trigger = parse({"type": "cron", "expression": expression}, zone)
            fires = [
                trigger.next_after(datetime(year, 6, 1, tzinfo=UTC)) for year in range(2027, 2032)
            ]
            for first, second in pairwise(fires):
                assert first is not None and second is not None
                assert timedelta(days=364) < second - first < timedelta(days=367)
                for near in (timedelta(minutes=1), timedelta(hours=20), timedelta(days=3)):
                    assert trigger.latest_until(first + near) == first
                    assert trigger.next_after(second - near) == second


# Dates, intervals, calendar intervals, and, or


@pytest.mark.parametrize(
    ("run_date", "expected"),
    [
        ("2027-03-04T10:00:00", "2027-03-04T09:00:00Z"),  # in the zone of the trigger
        ("2027-03-04 10:00", "2027-03-04T09:00:00Z"),
        ("2027-03-04T10:00:00Z", "2027-03-04T10:00:00Z"),
        ("2027-03-04T10:00:00+05:30", "2027-03-04T04:30:00Z"),
        ("2027-03-28T02:30:00", "2027-03-28T01:00:00Z"),  # in the gap: right after it
        ("2027-10-31T02:30:00", "2027-10-31T00:30:00Z"),  # in the overlap: the first pass
        (1_804_150_800, "2027-03-04T09:00:00Z"),
        (1_804_150_800.5, "2027-03-04T09:00:00.500000Z"),
        ("2027-03-02T13:00:06", "2027-03-02T12:00:06Z"),  # past, but not more than the grace
    ],
)
def test_a_date_fires_once_at_its_instant(run_date: Any, expected: str) -> None:
    trigger = parse({"type": "date", "run_date": run_date}, BERLIN)
    first = trigger.next()
    assert first is not None and sz.iso_of(sz.us_of(first)) == expected
    assert trigger.next() is None and trigger.next() is None


def test_an_interval_begins_one_interval_from_now_and_keeps_its_grid() -> None:
    trigger = parse({"type": "interval", "minutes": 90})
    first = NOW + timedelta(minutes=90)
    assert trigger.next_after(NOW) == first
    ten_years_on = first + 58_438 * timedelta(minutes=90)
    assert trigger.next_after(ten_years_on - timedelta(microseconds=1)) == ten_years_on
    assert trigger.latest_until(ten_years_on) == ten_years_on
    assert trigger.count_between(first, ten_years_on) == 58_439


def test_an_interval_with_a_local_start_is_not_touched_by_clock_changes() -> None:
    config = {"type": "interval", "days": 1, "start_time": "2027-03-27T10:00"}
    local = ["Sat 2027-03-27 10:00:00", "Sun 2027-03-28 11:00:00", "Mon 2027-03-29 11:00:00"]
    assert next_fires(parse(config, BERLIN), 3) == local


def test_an_interval_that_began_long_ago_goes_on_at_its_next_slot() -> None:
    config = {"type": "interval", "hours": 1, "start_time": "2020-01-01T00:30", "end_time": 1.9e9}
    assert next_fires(parse(config), 1) == ["Wed 2027-03-03 12:30:00"]


def test_an_interval_made_while_the_clock_ran_ahead_begins_again_on_the_right_time() -> None:
    trigger = parse({"type": "interval", "hours": 1}, now=NOW + timedelta(days=300, seconds=1))
    assert trigger.rebased(NOW, None).next_after(NOW) == NOW + timedelta(hours=1)
    given = parse({"type": "interval", "hours": 1, "start_time": "2028-01-01"})
    assert given.rebased(NOW, NOW + timedelta(days=400)) == given
    short = parse({"type": "interval", "days": 9, "end_time": "2027-03-13"})
    with pytest.raises(sz.TriggerError):
        short.rebased(NOW + timedelta(days=8), NOW + timedelta(days=9))
    members = [{"type": "cron", "year": 2030}, {"type": "interval", "hours": 1}]
    ahead = NOW + timedelta(days=9, seconds=1)
    either = parse({"type": "or", "triggers": [*members, INTERVAL | {"days": 1}]}, now=ahead)
    assert either.rebased(NOW, None).next_after(NOW) == NOW + timedelta(hours=1)


def test_an_interval_that_fired_in_a_wrong_future_never_uses_those_times_again() -> None:
    trigger = parse({"type": "interval", "hours": 1})
    assert trigger.rebased(NOW, NOW) == trigger
    used = [NOW + timedelta(hours=n) for n in range(1, 9)]
    for back_to in (NOW, NOW + timedelta(seconds=7)):
        again = trigger.rebased(back_to, used[-1])
        fires = [again.next() for _ in used]
        assert fires[0] is not None and fires[0] - back_to <= timedelta(hours=1, microseconds=1)
        assert not set(fires) & set(used)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"months": 3, "start_date": "2027-01-31", "hour": 9},
            ["2027-04-30 09:00", "2027-07-31 09:00", "2027-10-31 09:00", "2028-01-31 09:00"],
        ),
        (
            {"months": 1, "start_date": "2027-12-30"},
            ["2027-12-30 00:00", "2028-01-30 00:00", "2028-02-29 00:00", "2028-03-30 00:00"],
        ),
        ({"years": 1, "start_date": "2024-02-29"}, ["2028-02-29 00:00", "2029-02-28 00:00"]),
        (
            {"years": 1, "months": 6, "start_date": "2026-01-15"},
            ["2027-07-15 00:00", "2029-01-15 00:00"],
        ),
        (
            {"weeks": 2, "start_date": "2027-02-24", "hour": 8, "minute": 15},
            ["2027-03-10 08:15", "2027-03-24 08:15", "2027-04-07 08:15"],
        ),
        ({"days": 10, "start_date": "2026-12-30"}, ["2027-03-10 00:00", "2027-03-20 00:00"]),
        ({"days": 1, "hour": 14}, ["2027-03-03 14:00", "2027-03-04 14:00"]),
        ({"days": 1, "hour": 12}, ["2027-03-04 12:00"]),
        (
            {"days": 1, "hour": 12, "start_date": "2027-03-08", "end_date": "2027-03-09"},
            ["2027-03-08 12:00", "2027-03-09 12:00"],
        ),
        (
            {"days": 2, "start_date": "2027-03-08", "end_date": "2027-03-10"},
            ["2027-03-08 00:00", "2027-03-10 00:00"],
        ),
        (
            {"days": 1, "start_date": "2027-03-08", "end_date": "2027-03-09"},
            ["2027-03-08 00:00", "2027-03-09 00:00"],
        ),
        (
            {"days": 1, "start_date": "2027-03-30"},
            ["2027-03-30 00:00", "2027-03-31 00:00", "2027-04-01 00:00"],
        ),
        (
            {"days": 1, "hour": 2, "minute": 30, "start_date": "2027-03-27"},
            ["2027-03-27 02:30", "2027-03-28 03:00", "2027-03-29 02:30"],
        ),
    ],
)
def test_a_calendar_interval_counts_days_or_months(
    config: dict[str, Any], expected: list[str]
) -> None:
    trigger = parse({"type": "calendar_interval", **config}, BERLIN)
    fires = [fire[4:20] for fire in next_fires(trigger, len(expected) + 1)]
    assert fires[: len(expected)] == expected
    assert ("end_date" not in config) or len(fires) == len(expected)


def test_an_and_fires_where_all_its_triggers_match() -> None:
    payday = {"type": "calendar_interval", "months": 1, "start_date": "2027-01-31", "hour": 10}
    workday = {"type": "cron", "day_of_week": "mon-fri", "hour": "8-18", "minute": "*/10"}
    trigger = parse({"type": "and", "triggers": [payday, workday]}, BERLIN)
    assert next_fires(trigger, 3) == [
        "Wed 2027-03-31 10:00:00",
        "Fri 2027-04-30 10:00:00",
        "Mon 2027-05-31 10:00:00",
    ]
    ten_years = [date(2027 + n // 12, n % 12 + 1, 1) - timedelta(days=1) for n in range(3, 123)]
    workdays = sum(day.weekday() < 5 for day in ten_years)
    assert trigger.count_between(NOW, NOW + timedelta(days=3653)) == workdays


def test_an_or_fires_once_where_its_triggers_meet() -> None:
    triggers = [{"type": "cron", "hour": "*/6"}, {"type": "cron", "hour": "*/4"}]
    trigger = parse({"type": "or", "triggers": triggers})
    hours = [fire[15:17] for fire in next_fires(trigger, 9)]
    assert hours == ["16", "18", "20", "00", "04", "06", "08", "12", "16"]
    assert trigger.count_between(NOW, NOW + timedelta(days=30)) == 240


def test_an_or_begins_with_a_date_that_is_past_but_within_its_grace() -> None:
    triggers = [{"type": "date", "run_date": "2027-03-03T09:00"}, {"type": "cron", "hour": 13}]
    trigger = parse({"type": "or", "triggers": triggers})
    fires = [trigger.next(), trigger.next()]
    assert [fire and fire.hour for fire in fires] == [9, 13]


def test_an_or_ends_with_the_last_of_its_triggers() -> None:
    triggers = [
        {"type": "date", "run_date": "2027-03-05"},
        {"type": "date", "run_date": "2027-03-04"},
    ]
    trigger = parse({"type": "or", "triggers": triggers})
    assert next_fires(trigger, 5) == ["Thu 2027-03-04 00:00:00", "Fri 2027-03-05 00:00:00"]
    assert trigger.latest_until(NOW + timedelta(days=99)) == datetime(2027, 3, 5, tzinfo=UTC)


# What is refused

CRON: dict[str, Any] = {"type": "cron"}
INTERVAL: dict[str, Any] = {"type": "interval"}
BAD: list[tuple[Any, str, str]] = [
    (None, "", "object"),
    ([], "", "object"),
    ({}, "type", "must be one of date, interval, cron"),
    ({"type": "chron"}, "type", "did you mean 'cron'"),
    ({"type": ["cron"]}, "type", "must be one of"),
    ({**CRON, "hours": 2}, "hours", "did you mean 'hour'"),
    ({**INTERVAL, "second": 5}, "second", "did you mean 'seconds'"),
    ({**INTERVAL, 5: 5}, "5", "has no 5"),
    ({**CRON, "hour": 2, "timezone": "Europe/Berlni"}, "timezone", "Europe/Berlin"),
    ({**CRON, "hour": 2, "timezone": "berlin"}, "timezone", "Europe/Berlin"),
    ({**CRON, "hour": 2, "timezone": "New York"}, "timezone", "America/New_York"),
    ({**CRON, "hour": 2, "timezone": "../../etc/passwd"}, "timezone", "not a known time zone"),
    ({**CRON, "hour": 2, "timezone": "Europe"}, "timezone", "not a known time zone"),
    ({**CRON, "hour": 2, "timezone": "right/Europe/Berlin"}, "timezone", "Europe/Berlin"),
    ({**CRON, "hour": 2, "timezone": 5}, "timezone", "not a known time zone"),
    ({**CRON, "hour": 2, "timezone": "x" * 5000}, "timezone", "not a known time zone"),
    ({**CRON, "hour": 2, "timezone": "a\0b"}, "timezone", "not a known time zone"),
    ({**CRON, "hour": 2, "dst": "debain"}, "dst", "debian, skip, both"),
    (CRON, "", "either an expression or some of"),
    ({**CRON, "expression": "* * * * *", "hour": 2}, "", "either an expression or some of"),
    ({**CRON, "hour": 24}, "hour", "24 is not between 0 and 23"),
    ({**CRON, "hour": -1}, "hour", "'-1'"),
    ({**CRON, "hour": True}, "hour", "True"),
    ({**CRON, "hour": 2.0}, "hour", "2.0"),
    ({**CRON, "hour": [1, 2]}, "hour", "must be text"),
    ({**CRON, "hour": ""}, "hour", "must be text"),
    ({**CRON, "hour": "1,"}, "hour", "''"),
    ({**CRON, "hour": "\u0661\u0660"}, "hour", "not a value"),
    ({**CRON, "hour": "+1"}, "hour", "not a value"),
    ({**CRON, "hour": "1_0"}, "hour", "not a value"),
    ({**CRON, "hour": "22-2"}, "hour", "write 22-23,0-2"),
    ({**CRON, "minute": "*/90"}, "minute", "between 1 and 60"),
    ({**CRON, "minute": "*/0"}, "minute", "between 1 and 60"),
    ({**CRON, "minute": "*-5"}, "minute", "cannot begin a range"),
    ({**CRON, "minute": "x" * 2000}, "minute", "1 to 1000 characters"),
    ({**CRON, "month": "janu"}, "month", "did you mean 'jan'"),
    ({**CRON, "month": "*/13"}, "month", "between 1 and 12"),
    ({**CRON, "day_of_week": 8}, "day_of_week", "between 0 and 7"),
    ({**CRON, "day": "1st day"}, "day", "'1st mon'"),
    ({**CRON, "day": "6th mon"}, "day", "'1st mon'"),
    ({**CRON, "day": 32}, "day", "between 1 and 31"),
    ({**CRON, "year": 2101}, "year", "between 1970 and 2100"),
    ({**CRON, "year": 2026}, "", "would never fire"),
    ({**CRON, "month": 2, "day": 30}, "", "would never fire"),
    ({**CRON, "expression": "0 0 30 2 *"}, "", "would never fire"),
    ({**CRON, "hour": 2, "end_time": "2027-01-01"}, "", "would never fire"),
    (
        {**CRON, "hour": 2, "start_time": 1.9e9, "end_time": 1.8e9},
        "",
        "its end is before its start",
    ),
    ({**CRON, "hour": 2, "start_time": "tomorrow"}, "start_time", "ISO 8601"),
    ({**CRON, "hour": 2, "end_time": "2101-01-01"}, "end_time", "between the years 1970 and 2100"),
    ({**CRON, "expression": "* * * *"}, "expression", "has 4 fields"),
    ({**CRON, "expression": "* * * * * *"}, "expression", "for seconds"),
    ({**CRON, "expression": "@reboot"}, "expression", "@reboot is no time"),
    ({**CRON, "expression": "@dayly"}, "expression", "did you mean '@daily'"),
    (
        {**CRON, "expression": "5/10 * * * *"},
        "expression",
        "minute '5/10': a step needs a range: 5-59/10",
    ),
    ({**CRON, "expression": "0 0 * * 8"}, "expression", "day_of_week '8'"),
    ({**CRON, "expression": "0 0 L * *"}, "expression", "day 'l'"),
    ({**CRON, "expression": 5}, "expression", "must be text"),
    (INTERVAL, "", "at least 1 second"),
    ({**INTERVAL, "seconds": 0}, "", "at least 1 second"),
    ({**INTERVAL, "seconds": 0.999}, "", "at least 1 second"),
    ({**INTERVAL, "seconds": -5}, "seconds", "must be a number between 0"),
    ({**INTERVAL, "seconds": "5"}, "seconds", "must be a number between 0"),
    ({**INTERVAL, "seconds": True}, "seconds", "not True"),
    ({**INTERVAL, "seconds": float("nan")}, "seconds", "not nan"),
    ({**INTERVAL, "seconds": float("inf")}, "seconds", "not inf"),
    ({**INTERVAL, "hours": 10**400}, "hours", ""),
    ({**INTERVAL, "days": 3661}, "days", "must be a number between 0 and 3660"),
    ({**INTERVAL, "days": 3660, "seconds": 1}, "", "at most 10 years"),
    (
        {**INTERVAL, "hours": 1, "start_time": "2026-01-01", "end_time": "2027-01-01"},
        "",
        "never fire",
    ),
    ({"type": "date"}, "", "needs run_date"),
    ({"type": "date", "run_date": "2027-03-02T11:00:00Z"}, "", "more than 24 h in the past"),
    ({"type": "date", "run_date": True}, "run_date", "not True"),
    ({"type": "date", "run_date": float("nan")}, "run_date", "not nan"),
    ({"type": "date", "run_date": 1_804_150_800_000}, "run_date", "between 0 and"),
    ({"type": "date", "run_date": "2101-01-01"}, "run_date", "between the years"),
    ({"type": "date", "run_date": "0001-01-01T00:00+14:00"}, "run_date", "between the years"),
    ({"type": "date", "run_date": "1804150800"}, "run_date", "ISO 8601"),
    ({"type": "calendar_interval"}, "", "either years and months or weeks and days"),
    ({"type": "calendar_interval", "months": 1, "days": 1}, "", "either years and months"),
    ({"type": "calendar_interval", "months": 1.5}, "months", "whole number"),
    ({"type": "calendar_interval", "days": 1, "hour": 24}, "hour", "between 0 and 23"),
    (
        {"type": "calendar_interval", "days": 1, "start_date": "2027-13-01"},
        "start_date",
        "not a date",
    ),
    (
        {"type": "calendar_interval", "days": 1, "end_date": "2027-03-01"},
        "",
        "end is before its start",
    ),
    ({"type": "or"}, "", "needs triggers"),
    ({"type": "or", "triggers": []}, "triggers", "list of 1 to 16"),
    ({"type": "or", "triggers": [INTERVAL | {"seconds": 1}] * 17}, "triggers", "list of 1 to 16"),
    (
        {"type": "or", "triggers": [INTERVAL | {"seconds": 1}, {**CRON, "hour": 25}]},
        "triggers[1].hour",
        "25 is not between",
    ),
    ({"type": "and", "triggers": [INTERVAL | {"seconds": 1}]}, "", "of type cron"),
    ({"type": "and", "triggers": [{**CRON, "hour": 1}, {**CRON, "hour": 2}]}, "", "no time of day"),
    (
        {"type": "and", "triggers": [{**CRON, "hour": 1, "day": 1}, {**CRON, "hour": 1, "day": 2}]},
        "",
        "would never fire",
    ),
    (
        {"type": "and", "triggers": [{**CRON, "hour": 1}, {**CRON, "hour": 1, "timezone": BERLIN}]},
        "",
        "same timezone",
    ),
]


@pytest.mark.parametrize(("config", "field", "fragment"), BAD)
def test_a_bad_trigger_is_refused_at_the_right_field_with_a_reason(
    config: Any, field: str, fragment: str
) -> None:
    with pytest.raises(sz.TriggerError) as refusal:
        parse(config)
    assert refusal.value.field == ("trigger_config." + field).rstrip(".")
    assert fragment in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_triggers_are_not_nested_without_end() -> None:
    config: dict[str, Any] = {"type": "interval", "seconds": 1}
    for _ in range(4):
        config = {"type": "or", "triggers": [config]}
    with pytest.raises(sz.TriggerError, match="nested deeper than 3"):
        parse(config)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["type", "hour", "seconds", "run_date", "expression", "triggers", "dst"]),
        st.recursive(
            st.one_of(
                st.none(),
                st.booleans(),
                st.integers(),
                st.floats(),
                st.text("0aL*/-,@ \u0661", max_size=9),
                st.sampled_from(["cron", "interval", "date", "or", "*/5", "* * * * *"]),
            ),
            lambda inner: st.lists(inner, max_size=2),
            max_leaves=3,
        ),
    )
)
def test_whatever_json_comes_in_a_trigger_or_a_trigger_error_comes_out(config: Any) -> None:
    try:
        trigger = parse(config)
    except sz.TriggerError as refusal:
        assert refusal.field and str(refusal)
    else:
        assert trigger.next() is not None


# Properties of every trigger


def cron_texts(low: int, high: int) -> st.SearchStrategy[str]:
    value = st.integers(low, high)
    spans = st.tuples(value, value).map(sorted).map(lambda pair: f"{pair[0]}-{pair[1]}")
    steps = st.integers(1, high - low).map(lambda step: f"*/{step}")
    item = st.one_of(value.map(str), spans, steps)
    return st.one_of(st.just("*"), st.lists(item, min_size=1, max_size=3).map(",".join))


FIELDS = st.fixed_dictionaries(
    {"minute": cron_texts(0, 59)},
    optional={
        "second": cron_texts(0, 59),
        "hour": cron_texts(0, 23),
        "day": st.one_of(cron_texts(1, 28), st.sampled_from(["last", "2nd tue", "last sun"])),
        "month": cron_texts(1, 12),
        "day_of_week": cron_texts(0, 6),
        "week": cron_texts(1, 52),
    },
)
CRONTABS = st.tuples(
    cron_texts(0, 59), cron_texts(0, 23), cron_texts(1, 31), cron_texts(1, 12), cron_texts(0, 7)
)
COMMON = {
    "timezone": st.sampled_from(
        ["UTC", BERLIN, "Australia/Lord_Howe", "America/Havana", "Africa/Casablanca", "Asia/Gaza"]
    ),
    "dst": st.sampled_from(list(sz.Dst)),
}
WALL = st.one_of(
    st.builds(lambda fields: {"type": "cron", **fields}, FIELDS),
    st.builds(lambda parts: {"type": "cron", "expression": " ".join(parts)}, CRONTABS),
    st.fixed_dictionaries(
        {"type": st.just("calendar_interval"), "days": st.integers(1, 40)},
        optional={"hour": st.integers(0, 23), "minute": st.integers(0, 59)},
    ),
    st.fixed_dictionaries(
        {"type": st.just("calendar_interval"), "months": st.integers(1, 40)},
        optional={
            "start_date": st.dates(datetime(2020, 1, 1).date(), datetime(2028, 1, 1).date()).map(
                str
            )
        },
    ),
)
SIMPLE = st.one_of(
    WALL,
    st.builds(lambda s: {"type": "interval", "seconds": s}, st.floats(1, 1e7)),
    st.builds(lambda s: {"type": "date", "run_date": s}, st.floats(1.81e9, 1.9e9)),
)
CONFIGS = st.builds(
    lambda config, common: {**config, **common},
    st.one_of(
        SIMPLE,
        st.builds(
            lambda many: {"type": "or", "triggers": many}, st.lists(SIMPLE, min_size=1, max_size=3)
        ),
        st.builds(
            lambda many: {"type": "and", "triggers": many}, st.lists(WALL, min_size=1, max_size=2)
        ),
    ),
    st.fixed_dictionaries(COMMON),
)


@st.composite
def triggers(draw: Callable[[st.SearchStrategy[Any]], Any]) -> sz.Trigger:
    while True:
        try:
            return parse(draw(CONFIGS))
        except sz.TriggerError as refusal:
            assert "never fire" in str(refusal) or "in common" in str(refusal)


INSTANTS = st.datetimes(datetime(2027, 1, 1), datetime(2031, 1, 1), timezones=st.just(UTC))


@settings(max_examples=50, deadline=None)
@given(triggers())
def test_a_trigger_outlives_being_stored(trigger: sz.Trigger) -> None:
    stored = json.loads(json.dumps(trigger.__getstate__(), allow_nan=False))
    loaded = sz.load_trigger(stored)
    assert loaded == trigger and loaded.__getstate__() == stored
    assert [loaded.next() for _ in range(3)] == [trigger.next() for _ in range(3)]
    assert sz.load_trigger(loaded.__getstate__()).next() == trigger.next()


@settings(max_examples=60, deadline=None)
@given(triggers(), INSTANTS)
def test_next_and_latest_are_each_others_inverse(trigger: sz.Trigger, at: datetime) -> None:
    later = trigger.next_after(at)
    if later is None:
        return
    assert later > at and later.utcoffset() == timedelta(0)
    assert trigger.latest_until(later) == later
    assert trigger.next_after(later - US) == later
    assert trigger.count_between(at + US, later) == 1
    earlier = trigger.latest_until(later - US)
    if earlier is not None:
        assert earlier <= at
        assert trigger.next_after(earlier) == later


@settings(max_examples=25, deadline=None)
@given(triggers(), INSTANTS)
def test_fires_rise_strictly_and_are_counted_exactly(trigger: sz.Trigger, at: datetime) -> None:
    fires: list[datetime] = []
    fire = trigger.next_after(at)
    while fire is not None and len(fires) < 40:
        fires.append(fire)
        fire = trigger.next_after(fire)
    assert all(first < second for first, second in pairwise(fires))
    for n, fire in enumerate(fires):
        assert trigger.count_between(at + US, fire) == n + 1
    if len(fires) > 20:
        assert trigger.count_between(fires[5], fires[20]) == 16
        assert trigger.count_between(fires[5] + US, fires[20] - US) == 14


@settings(max_examples=40, deadline=None)
@given(triggers(), INSTANTS, INSTANTS, INSTANTS)
def test_counts_over_years_add_up(
    trigger: sz.Trigger, first: datetime, second: datetime, third: datetime
) -> None:
    first, second, third = sorted((first, second, third))
    whole = trigger.count_between(first, third)
    parts = trigger.count_between(first, second) + trigger.count_between(second + US, third)
    assert whole == parts or (trigger.type == "or" and whole > sz.OR_EXACT_COUNT)


@settings(max_examples=20, deadline=None)
@given(triggers())
def test_no_question_raises_however_far_away(trigger: sz.Trigger) -> None:
    least, greatest = (at.replace(tzinfo=UTC) for at in (datetime.min, datetime.max))
    east = datetime.min.replace(tzinfo=ZoneInfo("Asia/Tokyo"))
    assert trigger.next_after(least) == trigger.next_after(east) is not None
    assert trigger.next_after(greatest) is None and trigger.latest_until(least) is None
    last = trigger.latest_until(greatest)
    assert last is not None and last.year <= sz.LAST_YEAR
    assert trigger.next_after(last) is None
    assert trigger.count_between(least, greatest) >= 1
    assert trigger.count_between(greatest, least) == 0
    assert trigger.grace_s > 0
    assert sz.describe_trigger(trigger) and sz.render_trigger(trigger) and repr(trigger)
    assert sz.preview_fire_times(trigger, NOW, 3)


# What it costs


def duration_s(call: Callable[[], object]) -> float:
    """CPU time, so that a busy machine fails no test."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


def test_questions_jump_over_years_of_seconds() -> None:
    trigger = parse({"type": "cron", "second": "*"}, BERLIN)
    far = NOW + timedelta(days=3653)
    sz.spans_of.cache_clear()
    assert trigger.count_between(NOW, far) == 3653 * 86_400
    assert duration_s(lambda: trigger.count_between(NOW, far)) < 0.05  # a walk takes minutes
    assert duration_s(lambda: trigger.next_after(far)) < 0.05
    assert duration_s(lambda: trigger.latest_until(far)) < 0.05


def test_an_impossible_expression_is_refused_at_once() -> None:
    def refuse() -> None:
        with pytest.raises(sz.TriggerError):
            cron(month=2, day=30, second="*")

    assert min(duration_s(refuse) for _ in range(3)) < 0.05  # 2 ms; APScheduler takes seconds


# What it says


@pytest.mark.parametrize(
    ("config", "words", "rendered"),
    [
        (
            {"type": "cron", "hour": 2, "minute": 30},
            "every day at 02:30 Europe/Berlin",
            "cron[hour='2', minute='30']",
        ),
        ({"type": "interval", "hours": 1}, "every hour", "interval[1:00:00]"),
        ({"type": "interval", "seconds": 90}, "every minute and 30 seconds", "interval[0:01:30]"),
        ({"type": "interval", "seconds": 241}, "every 4 minutes and 1 second", "interval[0:04:01]"),
        ({"type": "interval", "seconds": 2.5}, "every 2.5 seconds", "interval[0:00:02.500000]"),
        (
            {"type": "interval", "weeks": 2, "start_time": "2027-05-01T08:00"},
            "every 2 weeks, from 1 May 2027 at 08:00",
            "interval[14 days, 0:00:00]",
        ),
        (
            {"type": "date", "run_date": "2027-07-01T12:00"},
            "once, on 1 Jul 2027 at 12:00 Europe/Berlin",
            "date[2027-07-01 12:00:00 CEST]",
        ),
        (
            {"type": "cron", "expression": "*/5 9-17 * * mon-fri"},
            "every 5 minutes of hour 9 to 17, Monday to Friday Europe/Berlin",
            "cron[expression='*/5 9-17 * * mon-fri']",
        ),
        (
            {"type": "cron", "expression": "@hourly"},
            "every hour Europe/Berlin",
            "cron[expression='@hourly']",
        ),
        (
            {"type": "cron", "minute": 15},
            "minute 15 of every hour Europe/Berlin",
            "cron[minute='15']",
        ),
        (
            {"type": "cron", "minute": "*/30"},
            "every 30 minutes Europe/Berlin",
            "cron[minute='*/30']",
        ),
        ({"type": "cron", "minute": "*"}, "every minute Europe/Berlin", "cron[minute='*']"),
        ({"type": "cron", "second": "*"}, "every second Europe/Berlin", "cron[second='*']"),
        (
            {"type": "cron", "second": "*/10"},
            "every 10 seconds Europe/Berlin",
            "cron[second='*/10']",
        ),
        (
            {"type": "cron", "hour": 2, "second": 0},
            "every minute of hour 2 Europe/Berlin",
            "cron[hour='2', second='0']",
        ),
        (
            {"type": "cron", "expression": "0 0 13 * fri"},
            "on day 13 or Friday at 00:00 Europe/Berlin",
            "cron[expression='0 0 13 * fri']",
        ),
        (
            {"type": "cron", "day": "last", "hour": "9,17"},
            "on the last day of the month at 09:00 and 17:00 Europe/Berlin",
            "cron[day='last', hour='9,17']",
        ),
        (
            {"type": "cron", "month": "jan-mar,dec", "day": "1,2,3,15", "end_time": "2028-01-01"},
            "on day 1 to 3 and 15 in Jan to Mar and Dec at 00:00 Europe/Berlin, "
            "until 1 Jan 2028 at 00:00",
            "cron[month='jan-mar,dec', day='1,2,3,15']",
        ),
        (
            {"type": "cron", "year": 2030, "week": "1-3"},
            "every day in week 1 to 3 in 2030 at 00:00 Europe/Berlin",
            "cron[year='2030', week='1-3']",
        ),
        (
            {"type": "cron", "day": "1st mon", "day_of_week": "mon,tue"},
            "on the 1st Monday of the month if it is Monday and Tuesday at 00:00 Europe/Berlin",
            "cron[day='1st mon', day_of_week='mon,tue']",
        ),
        (
            {"type": "calendar_interval", "months": 3, "start_date": "2027-01-31", "hour": 9},
            "every 3 months on day 31 or the last at 09:00 Europe/Berlin",
            "calendar_interval[months=3, time='09:00', start_date='2027-01-31']",
        ),
        (
            {"type": "calendar_interval", "weeks": 1, "start_date": "2027-03-01"},
            "every week on Monday at 00:00 Europe/Berlin",
            "calendar_interval[days=7, time='00:00', start_date='2027-03-01']",
        ),
        (
            {"type": "calendar_interval", "years": 2, "start_date": "2027-03-01"},
            "every 2 years on day 1 of Mar at 00:00 Europe/Berlin",
            "calendar_interval[months=24, time='00:00', start_date='2027-03-01']",
        ),
        (
            {
                "type": "or",
                "triggers": [{"type": "cron", "hour": 2}, {"type": "cron", "day_of_week": "sun"}],
            },
            "every day at 02:00 or every Sunday at 00:00 Europe/Berlin",
            "or[cron[hour='2'], cron[day_of_week='sun']]",
        ),
    ],
)
def test_a_trigger_is_described_in_words(config: dict[str, Any], words: str, rendered: str) -> None:
    trigger = parse(config, BERLIN)
    assert sz.describe_trigger(trigger) == words
    assert sz.render_trigger(trigger) == rendered


def test_a_date_that_a_clock_change_moves_says_so() -> None:
    for run_date, note in (
        ("2027-03-28T02:30", "28 Mar 2027: 02:30 does not exist, runs at 03:00"),
        ("2027-10-31T02:30", "31 Oct 2027: 02:30 happens twice, runs the first time"),
        ("2027-10-31T02:30+01:00", None),
        ("2027-07-01T02:30", None),
    ):
        trigger = parse({"type": "date", "run_date": run_date}, BERLIN)
        assert [fire.note for fire in sz.preview_fire_times(trigger, NOW, 2)] == [note]


def test_an_or_gives_the_notes_of_the_members_that_fire() -> None:
    triggers = [{"type": "cron", "hour": 2, "minute": 30}, {"type": "cron", "hour": 3}]
    trigger = parse({"type": "or", "triggers": triggers}, BERLIN)
    fires = sz.preview_fire_times(trigger, datetime(2027, 3, 27, 12, tzinfo=UTC), 2)
    assert [fire.note for fire in fires] == [
        "28 Mar 2027: 02:30 does not exist, runs at 03:00",
        None,
    ]


def test_the_default_grace_fits_the_kind() -> None:
    for config, grace_s in (
        ({"type": "cron", "hour": 2}, 86_400),
        ({"type": "date", "run_date": "2027-07-01"}, 86_400),
        ({"type": "interval", "seconds": 1}, 5),
        ({"type": "interval", "seconds": 30}, 30),
        ({"type": "interval", "hours": 1}, 60),
        (
            {
                "type": "or",
                "triggers": [{"type": "cron", "hour": 2}, {"type": "interval", "seconds": 9}],
            },
            9,
        ),
    ):
        assert parse(config).grace_s == grace_s


# Stored states


def test_the_iterator_goes_on_where_its_state_was_stored() -> None:
    trigger = cron(hour=2)
    fires = [trigger.next(), trigger.next()]
    again = sz.load_trigger(trigger.__getstate__())
    assert fires[1] is not None and again.next() == fires[1] + timedelta(days=1)


@pytest.mark.parametrize(
    "damage",
    [
        {"type": "lunar"},
        {"timezone": "Mars/Olympus"},
        {"timezone": None},
        {"fields": {"hour": "99"}},
        {"fields": {"moon": "1"}},
        {"fields": {}},
        {"fields": None},
        {"start_us": "x"},
        {"dst": "never"},
        {"start_us": 5, "end_us": 4},
        {"expression": "* *"},
    ],
)
def test_a_state_that_cannot_be_used_is_named_not_raised_through(damage: dict[str, Any]) -> None:
    with pytest.raises(sz.TriggerError):
        sz.load_trigger({**cron(hour=2).__getstate__(), **damage})


def test_a_state_without_a_key_is_refused() -> None:
    for config in (
        {"type": "cron", "hour": 2},
        {"type": "interval", "seconds": 5},
        {"type": "date", "run_date": "2027-07-01"},
        {"type": "calendar_interval", "days": 5},
        {"type": "and", "triggers": [{"type": "cron", "hour": 2}]},
        {"type": "or", "triggers": [{"type": "cron", "hour": 2}]},
    ):
        state = parse(config).__getstate__()
        for key in state:
            with pytest.raises(sz.TriggerError):
                sz.load_trigger({name: value for name, value in state.items() if name != key})


def test_a_zone_that_vanished_is_named_with_the_nearest_ones() -> None:
    state = {**cron(hour=2).__getstate__(), "timezone": "Europe/Berlim"}
    with pytest.raises(
        sz.TriggerError, match=r"'Europe/Berlim' is not a known time zone.*Europe/Berlin"
    ):
        sz.load_trigger(state)
