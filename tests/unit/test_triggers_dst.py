"""Clock changes: a table of what each schedule does, and where other implementations differ."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
import schedulezero as sz
from croniter import croniter  # type: ignore[import-untyped]
from cronsim import CronSim

# Zone, local day, crontab expression, dst rule, the fires of that day as local time and offset.
BERLIN_SPRING = ("Europe/Berlin", "2027-03-28")  # 02:00 -> 03:00
BERLIN_AUTUMN = ("Europe/Berlin", "2027-10-31")  # 03:00 -> 02:00
LORD_HOWE_SPRING = ("Australia/Lord_Howe", "2027-10-03")  # 02:00 -> 02:30
LORD_HOWE_AUTUMN = ("Australia/Lord_Howe", "2027-04-04")  # 02:00 -> 01:30
TROLL_SPRING = ("Antarctica/Troll", "2027-03-28")  # 01:00 -> 03:00
TROLL_AUTUMN = ("Antarctica/Troll", "2027-10-31")  # 03:00 -> 01:00
CAIRO_SPRING = ("Africa/Cairo", "2027-04-30")  # 00:00 -> 01:00
CAIRO_AUTUMN = ("Africa/Cairo", "2027-10-28")  # 24:00 -> 23:00
HAVANA_AUTUMN = ("America/Havana", "2027-11-07")  # 01:00 -> 00:00
CASABLANCA_RAMADAN = ("Africa/Casablanca", "2027-02-07")  # 03:00 -> 02:00, before the fast
CASABLANCA_AFTER = ("Africa/Casablanca", "2027-03-14")  # 02:00 -> 03:00, after it
SAMOA_SKIPS_A_DAY = ("Pacific/Apia", "2011-12-31")  # all of 30 December is missing

TABLE = [
    (BERLIN_SPRING, "30 2 * * *", "debian", "03:00+0200"),
    (BERLIN_SPRING, "30 2 * * *", "skip", ""),
    (BERLIN_SPRING, "30 2 * * *", "both", "03:00+0200"),
    (BERLIN_SPRING, "0,15,30,45 2 * * *", "debian", "03:00+0200"),
    (BERLIN_SPRING, "0 2,3 * * *", "debian", "03:00+0200"),
    (BERLIN_SPRING, "30 2,3 * * *", "debian", "03:00+0200 03:30+0200"),
    (BERLIN_SPRING, "30 1-4 * * *", "debian", "01:30+0100 03:00+0200 03:30+0200 04:30+0200"),
    (BERLIN_SPRING, "30 1-4 * * *", "skip", "01:30+0100 03:30+0200 04:30+0200"),
    (BERLIN_SPRING, "*/30 1-3 * * *", "debian", "01:00+0100 01:30+0100 03:00+0200 03:30+0200"),
    (BERLIN_SPRING, "0 */2 * * *", "debian", "00:00+0100 " + "04:00+0200 06:00+0200 08:00+0200 "
     "10:00+0200 12:00+0200 14:00+0200 16:00+0200 18:00+0200 20:00+0200 22:00+0200"),
    (BERLIN_SPRING, "* 2 * * *", "debian", ""),
    (BERLIN_SPRING, "5 0 * * *", "debian", "00:05+0100"),
    (BERLIN_AUTUMN, "30 2 * * *", "debian", "02:30+0200"),
    (BERLIN_AUTUMN, "30 2 * * *", "skip", "02:30+0200"),
    (BERLIN_AUTUMN, "30 2 * * *", "both", "02:30+0200 02:30+0100"),
    (BERLIN_AUTUMN, "0 3 * * *", "debian", "03:00+0100"),
    (BERLIN_AUTUMN, "0 2,3 * * *", "debian", "02:00+0200 03:00+0100"),
    (BERLIN_AUTUMN, "*/30 2 * * *", "debian", "02:00+0200 02:30+0200 02:00+0100 02:30+0100"),
    (BERLIN_AUTUMN, "*/30 2 * * *", "skip", "02:00+0200 02:30+0200 02:00+0100 02:30+0100"),
    (LORD_HOWE_SPRING, "15 2 * * *", "debian", "02:30+1100"),
    (LORD_HOWE_SPRING, "0,20,40 2 * * *", "debian", "02:30+1100 02:40+1100"),
    (LORD_HOWE_SPRING, "*/20 2 * * *", "debian", "02:40+1100"),
    (LORD_HOWE_AUTUMN, "45 1 * * *", "debian", "01:45+1100"),
    (LORD_HOWE_AUTUMN, "15,45 1 * * *", "both", "01:15+1100 01:45+1100 01:45+1030"),
    (LORD_HOWE_AUTUMN, "*/15 1 * * *", "debian",
     "01:00+1100 01:15+1100 01:30+1100 01:45+1100 01:30+1030 01:45+1030"),
    (LORD_HOWE_AUTUMN, "0 2 * * *", "debian", "02:00+1030"),
    (TROLL_SPRING, "30 1,2 * * *", "debian", "03:00+0200"),
    (TROLL_SPRING, "0 1-3 * * *", "debian", "03:00+0200"),
    (TROLL_AUTUMN, "30 1,2 * * *", "debian", "01:30+0200 02:30+0200"),
    (TROLL_AUTUMN, "30 1,2 * * *", "both", "01:30+0200 02:30+0200 01:30+0000 02:30+0000"),
    (CAIRO_SPRING, "0 0 * * *", "debian", "01:00+0300"),
    (CAIRO_SPRING, "30 0 * * *", "debian", "01:00+0300"),
    (CAIRO_SPRING, "30 0 30 * *", "debian", "01:00+0300"),
    (CAIRO_SPRING, "30 0 29 * *", "debian", ""),
    (CAIRO_SPRING, "30 0 * * *", "skip", ""),
    (CAIRO_AUTUMN, "30 23 * * *", "debian", "23:30+0300"),
    (CAIRO_AUTUMN, "30 23 * * *", "both", "23:30+0300 23:30+0200"),
    (CAIRO_AUTUMN, "0 0 * * *", "debian", "00:00+0300"),
    (HAVANA_AUTUMN, "0 0 * * *", "debian", "00:00-0400"),
    (HAVANA_AUTUMN, "*/30 0 * * *", "debian", "00:00-0400 00:30-0400 00:00-0500 00:30-0500"),
    (CASABLANCA_RAMADAN, "30 2 * * *", "debian", "02:30+0100"),
    (CASABLANCA_RAMADAN, "30 2 * * *", "both", "02:30+0100 02:30+0000"),
    (CASABLANCA_AFTER, "30 2 * * *", "debian", "03:00+0100"),
    (SAMOA_SKIPS_A_DAY, "0 9,18 30 12 *", "debian", "00:00+1400"),
    (SAMOA_SKIPS_A_DAY, "0 9 * * *", "debian", "00:00+1400 09:00+1400"),
]  # fmt: skip


def cron(expression: str, zone: str, dst: str = "debian") -> sz.Trigger:
    config = {"type": "cron", "expression": expression, "dst": dst}
    return sz.parse_trigger(config, timezone=zone, now=datetime(2011, 1, 1, tzinfo=UTC))


def fires_between(trigger: sz.Trigger, first: datetime, end: datetime) -> list[datetime]:
    """Its fires in [first, end), in UTC."""
    fires: list[datetime] = []
    at = trigger.next_after(first - timedelta(microseconds=1))
    while at is not None and at < end:
        fires.append(at)
        at = trigger.next_after(at)
    return fires


@pytest.mark.parametrize(("where", "expression", "dst", "expected"), TABLE)
def test_a_clock_change_moves_fires_as_the_table_says(
    where: tuple[str, str], expression: str, dst: str, expected: str
) -> None:
    zone, day = ZoneInfo(where[0]), datetime.fromisoformat(where[1])
    first = day.replace(tzinfo=zone).astimezone(UTC) - timedelta(hours=1)
    trigger = cron(expression, where[0], dst)
    local = [
        fire.astimezone(zone) for fire in fires_between(trigger, first, first + timedelta(27 / 24))
    ]
    assert " ".join(f"{at:%H:%M%z}" for at in local if at.date() == day.date()) == expected


def test_jobs_after_midnight_and_monthly_jobs_outlive_spring_forward() -> None:
    for expression, per_year in (("5 0 * * *", 365), ("0 0 1 * *", 12), ("0 0 * * 0", 52)):
        for zone in ("Europe/Berlin", "America/New_York", "Africa/Cairo", "America/Havana"):
            begin, end = (datetime(year, 1, 1, tzinfo=ZoneInfo(zone)) for year in (2026, 2027))
            fires = fires_between(
                cron(expression, zone), begin.astimezone(UTC), end.astimezone(UTC)
            )
            assert len(fires) == per_year, (expression, zone)


def test_fires_of_one_gap_are_one_fire_and_never_go_back() -> None:
    trigger = sz.parse_trigger(
        {"type": "cron", "hour": 2, "minute": "0,30", "second": "*/10"},
        timezone="Europe/Berlin",
        now=datetime(2027, 3, 1, tzinfo=UTC),
    )
    jump = datetime(2027, 3, 28, 1, tzinfo=UTC)
    around = fires_between(trigger, jump - timedelta(hours=2), jump + timedelta(hours=2))
    assert around == [jump]
    assert trigger.count_between(jump, jump) == 1
    assert trigger.latest_until(jump + timedelta(hours=5)) == jump


def test_seconds_follow_their_minute_into_the_second_pass_only_if_it_is_free() -> None:
    begin = datetime(2027, 10, 31, tzinfo=UTC)  # 02:00 CEST; 02:00 CET is an hour later
    for minute, count in (("30", 6), ("*", 720)):
        config = {"type": "cron", "hour": 2, "minute": minute, "second": "*/10"}
        trigger = sz.parse_trigger(config, timezone="Europe/Berlin", now=begin)
        assert trigger.count_between(begin, begin + timedelta(hours=3)) == count


@pytest.mark.parametrize(
    ("dst", "spring", "autumn"),
    [
        ("debian", "28 Mar 2027: 02:30 does not exist, runs at 03:00",
         ["31 Oct 2027: 02:30 happens twice, runs the first time"]),
        ("skip", "28 Mar 2027: 02:30 does not exist, skipped",
         ["31 Oct 2027: 02:30 happens twice, runs the first time"]),
        ("both", "28 Mar 2027: 02:30 does not exist, runs at 03:00",
         ["31 Oct 2027: 02:30 happens twice, runs both times, this is the first",
          "31 Oct 2027: 02:30 happens twice, runs both times, this is the second"]),
    ],
)  # fmt: skip
def test_a_preview_says_what_a_clock_change_does(dst: str, spring: str, autumn: list[str]) -> None:
    trigger = cron("30 2 * * *", "Europe/Berlin", dst)
    before_spring = datetime(2027, 3, 27, 12, tzinfo=UTC)
    notes = [fire.note for fire in sz.preview_fire_times(trigger, before_spring, 3)]
    assert notes == [spring, None, None]
    before_autumn = datetime(2027, 10, 30, 12, tzinfo=UTC)
    fires = sz.preview_fire_times(trigger, before_autumn, 3)
    assert [fire.note for fire in fires if fire.note] == autumn
    assert fires[0].local == "2027-10-31 02:30:00+02:00"


def test_a_preview_counts_the_fires_that_a_gap_joins() -> None:
    trigger = cron("0,15,30 0-2 * * *", "Europe/Berlin")
    jump = datetime(2027, 3, 28, 1, tzinfo=UTC)
    (fire,) = sz.preview_fire_times(trigger, jump - timedelta(minutes=5), 1)
    assert fire.note == "28 Mar 2027: 02:00 and 2 more times do not exist, runs at 03:00"


# Other implementations, walked over every clock change of the zones above in 2027 and 2028.

EXPRESSIONS = [
    "0 0 * * *", "30 0 * * *", "0 1 * * *", "30 1 * * *", "30 2 * * *", "0 3 * * *", "59 23 * * *",
    "15,45 0-4 * * *", "0-59/7 1-3 * * *", "*/20 1-3 * * *", "17 * * * *", "0 */2 * * *",
    "30 2 1-7 * 0", "5 3 */2 * sun", "5 3 1-15 * sun", "0 0 1 * *",
]  # fmt: skip
ZONES = sorted({where[0] for where, *_ in TABLE} - {"Pacific/Apia"})

# Lord Howe's wall clock shows 02:00 once on the autumn night, an hour after 01:30 came again.
# cronsim steps whole hours from 01:00 and passes over it.
CRONSIM_IS_WRONG = {("Australia/Lord_Howe", "0 */2 * * *", "autumn")}

# croniter has no notion of Debian's rule: it runs fixed times in both passes of an overlap, and
# moves `*/2` hours that a gap swallows behind it. It also takes `*/2` in day of month for a
# restriction, so that `*/2 * sun` is an OR; in Vixie's cron the star makes it an AND.
CRONITER_IS_WRONG = {
    "fixed times in the second pass": {"0 0 * * *", "30 0 * * *", "0 1 * * *", "30 1 * * *",
        "30 2 * * *", "59 23 * * *", "15,45 0-4 * * *", "0-59/7 1-3 * * *", "30 2 1-7 * 0"},
    "free times in a gap": {"0 */2 * * *", "*/20 1-3 * * *"},
    "day of month with a stepped star": {"5 3 */2 * sun"},
}  # fmt: skip


def nights(zone: str) -> list[tuple[str, datetime]]:
    """(season, jump) of the clock changes of 2027 and 2028."""
    return [
        ("spring" if span.offset > span.before else "autumn", sz.at_of(span.begin * 1_000_000))
        for year in (2027, 2028)
        for span in sz.spans_of(ZoneInfo(zone), year)
        if span.offset != span.before
    ]


def fires_of_cronsim(expression: str, zone: str, first: datetime, end: datetime) -> list[datetime]:
    fires: list[datetime] = []
    for at in CronSim(expression, (first - timedelta(minutes=1)).astimezone(ZoneInfo(zone))):
        if at.astimezone(UTC) >= end:
            return fires
        fires.append(at.astimezone(UTC))
    return fires


def fires_of_croniter(expression: str, zone: str, first: datetime, end: datetime) -> list[datetime]:
    local = (first - timedelta(minutes=1)).astimezone(ZoneInfo(zone))
    walker, fires = croniter(expression, local, ret_type=datetime), []
    while (at := walker.get_next().astimezone(UTC)) < end:
        fires.append(at)
    return fires


def test_cronsim_disagrees_only_where_it_is_wrong() -> None:
    disagreements = set()
    for zone in ZONES:
        for season, jump in nights(zone):
            window = jump - timedelta(hours=5), jump + timedelta(hours=5)
            for expression in EXPRESSIONS:
                ours = fires_between(cron(expression, zone), *window)
                if ours != fires_of_cronsim(expression, zone, *window):
                    disagreements.add((zone, expression, season))
    assert disagreements == CRONSIM_IS_WRONG


def test_croniter_disagrees_only_where_it_is_wrong() -> None:
    disagreements = set()
    for zone in ZONES:
        for _, jump in nights(zone):
            window = jump - timedelta(hours=5), jump + timedelta(hours=5)
            for expression in EXPRESSIONS:
                ours = fires_between(cron(expression, zone), *window)
                if ours != fires_of_croniter(expression, zone, *window):
                    disagreements.add(expression)
    assert disagreements == set.union(*CRONITER_IS_WRONG.values())


def random_expression(dice: random.Random) -> str:
    def field(low: int, high: int) -> str:
        first, last = sorted(dice.sample(range(low, high + 1), 2))
        step = dice.randint(1, (high - low) // 2)
        options = ["*", "*", str(first), f"{first}-{last}", f"*/{step}", f"{first},{last}"]
        return dice.choice([*options, f"{first}-{last}/{step}"])

    return " ".join(field(*bounds) for bounds in ((0, 59), (0, 23), (1, 28), (1, 12), (0, 7)))


def test_random_expressions_fire_as_in_cronsim_on_ordinary_days() -> None:
    dice = random.Random(3)
    for _ in range(150):
        expression = random_expression(dice)
        at = datetime(2027, 1, 1, tzinfo=UTC) + timedelta(minutes=dice.randrange(500_000))
        trigger, walker = cron(expression, "UTC"), CronSim(expression, at)
        for _ in range(20):
            expected = next(walker)
            assert trigger.next_after(at) == expected, expression
            at = expected
