"""A real server whose wall clock is set while it runs, or is wrong when it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from appliance import Appliance, wait_for

LIBRARY = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)
MONTH_S = 30 * 86_400

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs Debian's faketime")


class FakedAppliance:
    """A server under libfaketime and a handler with the real clock."""

    def __init__(self, one: Appliance) -> None:
        self.one = one
        self.offset = one.directory / "offset"
        self.set(0)

    def set(self, offset_s: int) -> None:
        """Set the server's wall clock to the real one plus so many seconds."""
        new = self.offset.with_suffix(".new")
        new.write_text(f"{offset_s:+d}")
        new.rename(self.offset)

    def run(self) -> None:
        faked = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self.offset),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
        self.one.run(environ=faked)
        self.one.handler("Example", "ex")

    def schedule(self, schedule_id: str, trigger: dict[str, Any], **more: Any) -> None:
        body = {
            "handler_id": "ex",
            "method_name": "echo",
            "schedule_id": schedule_id,
            "trigger_config": trigger,
            **more,
        }
        answer = self.one.post("/api/schedule", body)
        assert answer.status == 201, answer.body

    def rows(self, schedule_id: str) -> list[dict[str, Any]]:
        """Its executions, oldest first."""
        query = f"/api/executions?schedule_id={schedule_id}&limit=1000"
        return self.one.get(query).json()["records"][::-1]

    def wait_rows(self, schedule_id: str, count: int) -> list[dict[str, Any]]:
        def enough() -> list[dict[str, Any]]:
            found = self.rows(schedule_id)
            return found if len(found) >= count else []

        return wait_for(enough, f"{count} executions of {schedule_id}")


@pytest.fixture
def faked(appliance: Callable[..., Appliance]) -> FakedAppliance:
    return FakedAppliance(appliance())


def fires(rows: list[dict[str, Any]]) -> list[str]:
    return [row["scheduled_at"] for row in rows]


@pytest.mark.parametrize("step_s", [3600, 31 * 86_400, 10 * 365 * 86_400])
def test_a_step_forward_is_caught_up_once_and_intervals_go_on(
    faked: FakedAppliance, step_s: int
) -> None:
    faked.run()
    # With `skip` the catch-up may rightly be skipped: the run before it may not have ended.
    faked.schedule("tick", {"type": "interval", "seconds": 1}, overlap="allow")
    faked.schedule("daily", {"type": "cron", "hour": 3})
    before = len(faked.wait_rows("tick", 2))
    faked.set(step_s)
    rows = faked.wait_rows("tick", before + 4)
    assert len(set(fires(rows))) == len(rows)
    caught_up = [row for row in rows if row["coalesced"] > 10]
    assert len(caught_up) == 1
    assert abs(caught_up[0]["coalesced"] - step_s) < 30
    assert caught_up[0]["status"] == "success"
    if step_s > MONTH_S:
        daily = faked.wait_rows("daily", 1)
        assert len(daily) == 1
        assert daily[0]["coalesced"] in range(step_s // 86_400 - 2, step_s // 86_400 + 1)
    assert faked.one.get("/api/health").json()["status"] == "ok"


@pytest.mark.parametrize("step_s", [20, 3600])
def test_a_step_back_fires_nothing_twice_and_silences_no_interval(
    faked: FakedAppliance, step_s: int
) -> None:
    faked.set(step_s)
    faked.run()
    faked.schedule("tick", {"type": "interval", "seconds": 1})
    faked.schedule("hourly", {"type": "interval", "hours": 1})
    before = faked.wait_rows("tick", 3)
    faked.set(0)
    rows = faked.wait_rows("tick", len(before) + 4)
    assert len(set(fires(rows))) == len(rows)
    assert fires(rows)[-1] < fires(before)[-1], "it goes on by the clock that is right now"
    hourly = faked.one.get("/api/schedules/hourly").json()
    health = faked.one.get("/api/health").json()
    assert health["time"] < hourly["next_fire_time"]


def test_a_schedule_made_by_a_clock_ten_years_ahead_is_not_parked_there(
    faked: FakedAppliance,
) -> None:
    faked.set(10 * 365 * 86_400)
    faked.run()
    faked.schedule("minutely", {"type": "cron", "minute": "*"})
    ahead = faked.one.get("/api/schedules/minutely").json()["next_fire_time"]
    faked.set(0)

    def moved() -> bool:
        return faked.one.get("/api/schedules/minutely").json()["next_fire_time"] < ahead

    wait_for(moved, "its next fire time to come back")


def test_a_clock_behind_the_database_holds_fires_until_it_is_right(faked: FakedAppliance) -> None:
    faked.run()
    faked.schedule("tick", {"type": "interval", "seconds": 1})
    before = len(faked.wait_rows("tick", 2))
    assert faked.one.stop() == 0
    faked.set(-int(time.time()) + 60)  # a machine without a clock chip wakes up in 1970
    faked.run()
    health = faked.one.get("/api/health").json()
    assert (health["status"], "behind" in health["checks"]["clock"]) == ("degraded", True)
    held = faked.rows("tick")
    faked.set(0)
    rows = faked.wait_rows("tick", before + 3)
    assert all(row["scheduled_at"] > "2020" for row in rows)
    assert len(held) - before <= 1, "only what was due before it stopped may have come in"
    wait_for(lambda: faked.one.get("/api/health").json()["status"] == "ok", "health")


def test_half_a_year_down_is_one_row_of_a_one_second_interval(faked: FakedAppliance) -> None:
    faked.run()
    faked.schedule("tick", {"type": "interval", "seconds": 1})
    before = len(faked.wait_rows("tick", 2))
    assert faked.one.stop() == 0
    faked.set(6 * MONTH_S)
    faked.run()
    rows = faked.wait_rows("tick", before + 3)
    caught_up = [row for row in rows if row["coalesced"] > 1000]
    assert len(caught_up) == 1
    assert abs(caught_up[0]["coalesced"] - 6 * MONTH_S) < 60
    assert caught_up[0]["coalesced_from"] < caught_up[0]["scheduled_at"]
