"""Every clock change of every zone from 2024 to 2030, against a walk that does as Debian's cron.

The oracle knows nothing of the product: it walks minute by minute over the change and keeps
cron's virtual clock, which catches up with the wall clock and never goes back (cron.c, Debian
3.0pl1).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

import pytest
import schedulezero as sz

FIRST = datetime(2024, 1, 1, tzinfo=UTC)
LAST = datetime(2031, 1, 1, tzinfo=UTC)
AROUND_MIN = 4 * 60  # minutes walked before and after each change

EXPRESSIONS = (
    "0 0 * * *",
    "30 0 * * *",
    "0 1 * * *",
    "30 1 * * *",
    "0 2 * * *",
    "30 2 * * *",
    "0 3 * * *",
    "59 23 * * *",
    "15,45 0-4 * * *",
    "0,30 22-23 * * *",
    "1 0 1,29-31 * *",
    "30 2 1-7 * 0",
    "5 3 */2 * sun",
    "0-59/7 1-3 * * *",
    "* * * * *",
    "*/20 1-3 * * *",
    "17 * * * *",
    "0 */2 * * *",
    "30 23,0-2 * * *",
    "0 0 1 * *",
)
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


@cache
def offset_min(key: str, minute: int) -> int:
    at = datetime.fromtimestamp(minute * 60, ZoneInfo(key))
    offset = at.utcoffset()
    assert offset is not None
    return int(offset.total_seconds()) // 60


def changes(key: str) -> Iterator[tuple[int, int, int]]:
    """(UTC minute, minutes before, minutes after) of each change of offset."""
    zone = ZoneInfo(key)
    at, before = FIRST, FIRST.astimezone(zone).utcoffset() or timedelta(0)
    while at < LAST:
        at += timedelta(hours=6)
        after = at.astimezone(zone).utcoffset() or timedelta(0)
        if after != before:
            minute = int(at.timestamp()) // 60
            while offset_min(key, minute - 1) * 60 == after.total_seconds():
                minute -= 1
            yield minute, int(before.total_seconds()) // 60, int(after.total_seconds()) // 60
        before = after


@cache
def distinct_zones() -> dict[tuple[tuple[int, int, int], ...], str]:
    """One zone for each history of changes."""
    histories = ((tuple(changes(key)), key) for key in sorted(available_timezones(), reverse=True))
    return {history: key for history, key in histories if history}


def expand(text: str, low: int, high: int) -> set[int]:
    """The values of a crontab field."""
    values: set[int] = set()
    for item in text.split(","):
        span, _, step = item.partition("/")
        first, _, last = span.replace("*", f"{low}-{high}").partition("-")
        values |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return values


class Crontab:
    """An expression as cron sees it: one local minute matches or does not."""

    def __init__(self, expression: str) -> None:
        minute, hour, day, month, weekday = expression.split()
        for number, name in enumerate(WEEKDAYS):
            weekday = weekday.replace(name, str(number))
        self.minutes, self.hours = expand(minute, 0, 59), expand(hour, 0, 23)
        self.days, self.months = expand(day, 1, 31), expand(month, 1, 12)
        self.weekdays = {value % 7 for value in expand(weekday, 0, 7)}
        self.day_or_weekday = day[0] != "*" and weekday[0] != "*"
        self.is_wild = minute[0] == "*" or hour[0] == "*"
        self._day_matches: dict[int, bool] = {}

    def matches(self, local_minute: int) -> bool:
        hour, minute = divmod(local_minute % 1440, 60)
        if minute not in self.minutes or hour not in self.hours:
            return False
        number = local_minute // 1440
        if number not in self._day_matches:
            self._day_matches[number] = self._matches_day(
                datetime.fromtimestamp(number * 86400, UTC)
            )
        return self._day_matches[number]

    def _matches_day(self, day: datetime) -> bool:
        of_month, of_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        of_day = of_month or of_week if self.day_or_weekday else of_month and of_week
        return of_day and day.month in self.months


@cache
def wall_clock(key: str, first: int, last: int) -> list[tuple[int, int, int]]:
    """(UTC minute, local minute, virtual minute before it) of each minute in [first, last]."""
    virtual = first - 1 + offset_min(key, first - 1)
    minutes = []
    for minute in range(first, last + 1):
        local = minute + offset_min(key, minute)
        minutes.append((minute, local, virtual))
        virtual = max(virtual, local)
    return minutes


def walk(crontab: Crontab, key: str, first: int, last: int, dst: str) -> list[int]:
    """The UTC minutes in [first, last] at which cron runs the job."""
    fires = []
    for minute, local, virtual in wall_clock(key, first, last):
        if crontab.is_wild or local == virtual + 1:
            runs = crontab.matches(local)
        elif local <= virtual:
            runs = dst == "both" and crontab.matches(local)
        elif dst == "skip":
            runs = crontab.matches(local)
        else:
            runs = any(crontab.matches(missed) for missed in range(virtual + 1, local + 1))
        if runs:
            fires.append(minute)
    return fires


def fires_forward(trigger: sz.Trigger, first: int, last: int) -> list[int]:
    at = trigger.next_after(sz.at_of(first * 60_000_000 - 1))
    fires = []
    while at is not None and at <= sz.at_of(last * 60_000_000):
        fires.append(sz.us_of(at) // 60_000_000)
        at = trigger.next_after(at)
    return fires


def fires_backward(trigger: sz.Trigger, first: int, last: int) -> list[int]:
    at = trigger.latest_until(sz.at_of(last * 60_000_000))
    fires = []
    while at is not None and at >= sz.at_of(first * 60_000_000):
        fires.append(sz.us_of(at) // 60_000_000)
        at = trigger.latest_until(at - timedelta(microseconds=1))
    return fires[::-1]


@pytest.mark.parametrize("dst", ["debian", "skip", "both"])
def test_every_change_of_every_zone_fires_as_the_walk_does(dst: str) -> None:
    crontabs = {expression: Crontab(expression) for expression in EXPRESSIONS}
    for history, key in distinct_zones().items():
        for expression, crontab in crontabs.items():
            if dst != "debian" and crontab.is_wild:
                continue  # the rule does not touch them
            config = {"type": "cron", "expression": expression, "dst": dst}
            trigger = sz.parse_trigger(config, timezone=key, now=FIRST)
            for minute, _, _ in history:
                first, last = minute - AROUND_MIN, minute + AROUND_MIN
                expected = walk(crontab, key, first, last, dst)
                where = f"{key} {sz.at_of(minute * 60_000_000)} {expression}"
                assert fires_forward(trigger, first, last) == expected, where
                assert fires_backward(trigger, first, last) == expected, where
                span = sz.at_of(first * 60_000_000), sz.at_of(last * 60_000_000)
                assert trigger.count_between(*span) == len(expected), where


def test_the_table_holds_the_odd_changes() -> None:
    shifts = {after - before for history in distinct_zones() for _, before, after in history}
    assert shifts == {-120, -60, -30, 30, 60, 120}
    assert len(distinct_zones()) >= 30  # about 150 zones change their clocks, in 34 ways


def test_every_span_until_the_last_year_has_one_offset() -> None:
    for key in distinct_zones().values():
        zone = ZoneInfo(key)
        for year in range(2024, sz.LAST_YEAR + 1):
            spans = sz.spans_of(zone, year)
            assert [span.begin for span in spans[1:]] == [span.end for span in spans[:-1]]
            for span in spans:
                at = range(span.begin, span.end, 12 * 3600)
                assert {sz.offset_at(zone, second) for second in (*at, span.end - 1)} == {
                    span.offset
                }
                assert sz.offset_at(zone, span.begin - 1) == span.before
