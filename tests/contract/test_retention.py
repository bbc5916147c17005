"""How much of the past is kept, and that what is kept stays in bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import schedulezero as sz
from apparatus import Dial
from schedulezero import Attempt, Config, Execution, Status, Store

pytestmark = pytest.mark.anyio
DAY_US = 86_400_000_000


class Past:
    """A store, and a way to give it a history."""

    def __init__(self, path: Path) -> None:
        self.clock = Dial()
        self.store = Store(str(path), Config(), self.clock)
        self.store.open(asyncio.get_running_loop())

    def keep(self, **config: Any) -> None:
        self.store.config = replace(self.store.config, **config)

    async def add_schedule(self, schedule_id: str, **fields: Any) -> sz.Schedule:
        state = sz.parse_trigger(
            {"type": "interval", "days": 1}, timezone="UTC", now=sz.at_of(self.clock.us)
        ).__getstate__()
        made = sz.Schedule(
            schedule_id, "worker", "work", {}, state, state,
            created_us=self.clock.us, updated_us=self.clock.us, next_fire_us=self.clock.us,
        )  # fmt: skip
        await self.store.add_schedule_record(replace(made, **fields))
        stored = self.store.schedule(schedule_id)
        assert stored is not None
        return stored

    async def add(self, count: int, of: sz.Schedule | None = None, **fields: Any) -> list[str]:
        """Executions a second apart, by default ended; the ids, oldest first."""
        made = []
        for _ in range(count):
            self.clock.us += 1_000_000
            now_us = self.clock.us
            execution = Execution(
                self.store.new_id(), of and of.schedule_id, "worker", "work", {}, Status.SUCCESS,
                now_us, now_us, None, completed_us=now_us, fire_us=of and now_us,
                schedule_key=of and of.key,
            )  # fmt: skip
            made.append(execution._replace(**fields))
        await self.store.write(
            lambda db: [sz._insert_execution(execution, db) for execution in made]
        )
        return [execution.execution_id for execution in made]

    async def prune(self) -> int:
        return await self.store.prune(self.clock.us)

    def ids(self, **filters: Any) -> list[str]:
        found = self.store.executions(limit=100_000, **filters)
        return [execution.execution_id for execution in reversed(found)]


@pytest.fixture
async def past(tmp_path: Path) -> AsyncIterator[Past]:
    made = Past(tmp_path / "test.db")
    yield made
    made.store.close()


async def test_the_newest_so_many_are_kept(past: Past) -> None:
    past.keep(max_executions=5)
    ids = await past.add(12)
    assert await past.prune() == 7
    assert past.ids() == ids[7:]
    more = await past.add(3)
    assert await past.prune() == 3
    assert past.ids() == [*ids[10:], *more]


async def test_what_is_not_final_is_never_deleted(past: Past) -> None:
    past.keep(max_executions=1, max_age_days=0.01)
    live = await past.add(5, status=Status.QUEUED, completed_us=None)
    await past.add(3)
    past.clock.us += 90 * DAY_US
    await past.prune()
    assert past.ids() == live


async def test_what_ended_too_long_ago_goes_and_what_ended_lately_stays(past: Past) -> None:
    await past.add(3)
    slow = await past.add(1, completed_us=past.clock.us + 29 * DAY_US)
    past.clock.us += 31 * DAY_US
    new = await past.add(2)
    assert await past.prune() == 3
    assert past.ids() == [*slow, *new]


async def test_the_newest_of_each_schedule_stay_whatever_their_age_and_number(
    past: Past,
) -> None:
    past.keep(max_executions=4, keep_per_schedule=3)
    rare = await past.add_schedule("rare")
    gone = await past.add_schedule("gone")
    of_rare = await past.add(5, rare)
    await past.add(5, gone)
    await past.store.delete_schedule("gone")
    others = await past.add(20)
    await past.prune()
    assert past.ids(schedule_id="rare") == of_rare[2:]
    assert past.ids(schedule_id="gone") == []
    assert past.ids() == [*of_rare[2:], others[-1]]
    past.clock.us += 365 * DAY_US
    await past.prune()
    assert past.ids() == of_rare[2:]


async def test_attempts_and_logs_go_with_their_execution(past: Past) -> None:
    past.keep(max_executions=1)
    old, new = await past.add(2)
    for execution_id in (old, new):
        number = sz.decode_id(execution_id)
        attempt = Attempt(1, "one", 1, 2, "error")
        same = "UPDATE executions SET attempt = attempt WHERE id = ?"
        await past.store.write(
            partial(sz._end_attempt, same, (number,), number, attempt, "a line\n")
        )
    await past.prune()
    assert (past.store.attempts(old), past.store.log(old)) == ([], None)
    assert (len(past.store.attempts(new)), past.store.log(new)) == (1, "a line\n")


async def test_the_history_stays_within_its_size(past: Past) -> None:
    past.keep(max_size_mb=1)
    for _ in range(6):
        await past.add(60, result="x" * 8_000)
        while await past.prune():
            pass
    with closing(sz.open_reading(past.store.path)) as db:
        pages, free = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count")
        )
    assert (pages - free) * sz.PAGE_BYTES <= 1 << 20
    assert pages * sz.PAGE_BYTES < 3 << 20  # what was freed is used again
    assert 60 < len(past.ids()) < 140


async def test_many_go_in_small_transactions(past: Past) -> None:
    past.keep(max_executions=10)
    await past.add(1_010)
    before = past.store.commits
    assert await past.prune() == 1_000
    assert past.store.commits - before == 1_000 // sz.PRUNE_ROWS


async def test_the_count_is_right_after_what_was_deleted_and_added(past: Past) -> None:
    past.keep(max_executions=100)
    for _ in range(5):
        await past.add(60)
        await past.prune()
    assert len(past.ids()) == 100


async def test_schedules_that_never_fire_again_go_with_their_history(past: Past) -> None:
    done = {"next_fire_us": None, "last_fire_us": past.clock.us}
    await past.add_schedule("once", **done)
    await past.add_schedule("declared", origin="config", **done)
    await past.add_schedule("paused", paused=True, **done)
    await past.add_schedule("goes-on")
    running = await past.add_schedule("running", **done)
    await past.add(1, running, status=Status.RUNNING, completed_us=None)
    await past.store.remove_exhausted(past.clock.us - DAY_US)
    assert past.store.schedule("once") is not None
    await past.store.remove_exhausted(past.clock.us + DAY_US)
    kept = {schedule.schedule_id for schedule in past.store.schedules()[0]}
    assert kept == {"declared", "paused", "goes-on", "running"}
