"""What the store promises beyond APScheduler: durability, group commit, guards, queries."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import schedulezero as sz
from apparatus import Anything, Dial
from schedulezero import (
    Attempt,
    Clock,
    Config,
    Conflict,
    Execution,
    IdTaken,
    Overlap,
    RetryPolicy,
    Schedule,
    Status,
    Store,
    StoreUnavailable,
)

pytestmark = pytest.mark.anyio
MODULE_DIRECTORY = str(Path(sz.__file__).parent)
HOUR_US = 3_600_000_000


@pytest.fixture
async def open_store(tmp_path: Path) -> AsyncIterator[Callable[..., Store]]:
    """Opens stores on one path, and closes them after the test."""
    opened: list[Store] = []

    def start(name: str = "test.db", clock: Clock | None = None, **config: Any) -> Store:
        store = Store(str(tmp_path / name), replace(Config(), **config), clock or Dial())
        opened.append(store)
        store.open(asyncio.get_running_loop())
        store.intake = Anything()
        return store

    yield start
    for store in opened:
        store.close()


@pytest.fixture
async def store(open_store: Callable[..., Store]) -> Store:
    return open_store()


def files_of(path: Path) -> list[str]:
    """The database file and those SQLite keeps beside it."""
    return sorted(one.name for one in path.parent.glob(path.name + "*"))


@contextmanager
def held(store: Store) -> Iterator[None]:
    """The writer stands still, so that what is queued meanwhile becomes one group."""
    go_on, holding = threading.Event(), threading.Event()

    def hold(db: sqlite3.Connection) -> None:
        holding.set()
        go_on.wait(5)

    store.write(hold)
    holding.wait(5)
    try:
        yield
    finally:
        go_on.set()


def execution(store: Store, **fields: Any) -> Execution:
    now_us = store.clock.now_us()
    made = Execution(
        store.new_id(), None, "worker", "work", {"n": 1}, Status.QUEUED, now_us, now_us, None
    )
    return made._replace(**fields)


async def put(store: Store, **fields: Any) -> Execution:
    return await store.add_execution(execution(store, **fields))


def interval(seconds: float, now_us: int) -> dict[str, Any]:
    config = {"type": "interval", "seconds": seconds}
    return sz.parse_trigger(config, timezone="UTC", now=sz.at_of(now_us)).__getstate__()


def schedule(store: Store, schedule_id: str = "a", **fields: Any) -> Schedule:
    now_us = store.clock.now_us()
    state = interval(60, now_us)
    made = Schedule(
        schedule_id, "worker", "work", {}, state, state, next_fire_us=now_us + 60_000_000
    )
    return replace(made, **fields)


def found(store: Store, schedule_id: str = "a") -> Schedule:
    schedule = store.schedule(schedule_id)
    assert schedule is not None
    return schedule


# Group commit


async def test_changes_that_wait_for_a_commit_share_the_next_one(store: Store) -> None:
    with held(store):
        before = store.commits
        adding = [asyncio.ensure_future(put(store)) for _ in range(200)]
        await asyncio.sleep(0)  # all are queued
    await asyncio.gather(*adding)
    assert store.commits - before <= 3
    assert len(store.executions(limit=1_000)) == 200


async def test_a_change_that_fails_in_a_group_fails_alone(store: Store) -> None:
    await store.add_schedule_record(schedule(store, "taken"))
    with held(store):
        adding = [
            asyncio.ensure_future(store.add_schedule_record(schedule(store, schedule_id)))
            for schedule_id in ("a", "taken", "b", "taken", "c")
        ]
        await asyncio.sleep(0)
        before = store.commits
    outcomes = await asyncio.gather(*adding, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), IdTaken] * 2 + [type(None)]
    assert {s.schedule_id for s in store.schedules()[0]} == {"a", "b", "c", "taken"}
    assert store.state == "ok"
    assert store.commits - before <= 2  # those that did not fail still share one


async def test_a_change_that_fails_leaves_nothing_of_itself_behind(store: Store) -> None:
    def half(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO meta VALUES ('half', 1)")
        raise Conflict("changed my mind")

    def whole(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO meta VALUES ('whole', 1)")

    with held(store):
        writes = [store.write(change) for change in (whole, half)]
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert isinstance(outcomes[1], Conflict)
    with closing(sqlite3.connect(store.path)) as db:
        keys = {key for (key,) in db.execute("SELECT key FROM meta")}
    assert "whole" in keys
    assert "half" not in keys


async def test_a_change_whose_caller_has_gone_is_stored_all_the_same(store: Store) -> None:
    with held(store):
        adding = asyncio.ensure_future(put(store))
        await asyncio.sleep(0)
        adding.cancel()
    await store.write(lambda db: None)
    assert len(store.executions(limit=10)) == 1


async def test_what_is_queued_when_the_store_closes_is_committed(
    open_store: Callable[..., Store],
) -> None:
    store = open_store("closing.db")
    for _ in range(50):
        store.write(lambda db: db.execute("INSERT OR REPLACE INTO meta VALUES ('n', (SELECT 1))"))
    store.write(lambda db: db.execute("INSERT INTO meta VALUES ('last', 1)"))
    store.close()
    with closing(sqlite3.connect(store.path)) as db:
        assert db.execute("SELECT value FROM meta WHERE key = 'last'").fetchone() == (1,)


async def test_a_database_found_damaged_after_an_error_of_the_disk_takes_no_change(
    store: Store,
) -> None:
    def fail(db: sqlite3.Cursor) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    def fill(db: sqlite3.Cursor) -> None:
        db.execute("CREATE TABLE large AS SELECT randomblob(400000)")

    await store.write(fill)
    with closing(sqlite3.connect(store.path)) as db:
        db.execute("PRAGMA wal_checkpoint(PASSIVE)")
    with pytest.raises(StoreUnavailable):
        await store.write(fail)
    with open(store.path, "r+b") as file:
        file.seek(-100 * sz.PAGE_BYTES, os.SEEK_END)
        file.write(bytes(sz.PAGE_BYTES))
    taken: list[str] = []
    with pytest.raises(sz.DatabaseDamaged):
        await store.write(lambda db: taken.append("a change"))
    assert store.lost is not None and not taken


async def test_a_read_that_failed_once_holds_up_nothing_for_longer(store: Store) -> None:
    sound, store._reader._db = store._reader._db, sqlite3.connect(":memory:")
    with pytest.raises(StoreUnavailable):
        store.seen_us()
    store._reader._db = sound
    assert "cannot be read" in store.state
    await store.probe()
    assert store.state == "ok"


async def test_a_locked_database_refuses_a_whole_group_after_one_wait(
    open_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "BUSY_MS", 200)
    store = open_store("locked.db")
    with closing(sqlite3.connect(store.path, isolation_level=None)) as intruder:
        intruder.execute("BEGIN IMMEDIATE")
        adding = [asyncio.ensure_future(put(store)) for _ in range(30)]
        async with asyncio.timeout(4.0):  # thirty waits would be six seconds
            outcomes = await asyncio.gather(*adding, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} <= {StoreUnavailable}
        assert store.state != "ok"
        assert store.executions(limit=10) == []  # reading goes on
        intruder.execute("ROLLBACK")
    await put(store)
    assert store.state == "ok"


# Durability

WRITER = """
import asyncio, sys
from schedulezero import *
async def main():
    store = Store(sys.argv[1], Config(), Clock())
    store.open(asyncio.get_running_loop())
    class Anything:
        def admit(self, execution): return execution
        def accept(self, execution): pass
        withdraw = accept
    store.intake = Anything()
    async def client():
        while True:
            now_us = store.clock.now_us()
            params = {"x": "y" * 300}
            execution = Execution(
                store.new_id(), None, "w", "m", params, Status.QUEUED, now_us, now_us, None
            )
            await store.add_execution(execution)
            print(execution.execution_id, flush=True)
    await asyncio.gather(*[client() for _ in range(8)])
asyncio.run(main())
"""


def test_no_acknowledged_change_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "killed.db")
    acknowledged: list[str] = []
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    for _ in range(4):
        writing = subprocess.Popen(
            [sys.executable, "-c", WRITER, path],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": MODULE_DIRECTORY},
        )
        assert writing.stdout is not None
        for _ in range(chance.randrange(1, 300)):
            acknowledged.append(writing.stdout.readline().strip())
        writing.kill()
        acknowledged += writing.stdout.read().split("\n")[:-1]  # those printed before the kill
        writing.stdout.close()
        writing.wait(10)
    store = Store(path, Config(), Clock())
    stored = {execution.execution_id for execution in store.executions(limit=1_000_000)}
    store.close()
    assert len(acknowledged) == len(set(acknowledged)) > 4
    assert set(acknowledged) <= stored, f"seed {seed}"


async def test_a_database_whose_log_file_begins_with_the_first_change_is_where_it_was(
    open_store: Callable[..., Store], tmp_path: Path
) -> None:
    open_store().copy_into(str(tmp_path / "copy.db"))
    store = Store(str(tmp_path / "copy.db"), Config(), Dial())
    (tmp_path / "copy.db-wal").unlink()  # as recovery may do before the server begins
    store._reader.all("SELECT 1")
    (tmp_path / "copy.db-wal").touch()
    assert not store.is_displaced
    store.open(asyncio.get_running_loop())
    assert not store.is_displaced
    store.close()


async def test_what_was_stored_is_read_back_equal(store: Store) -> None:
    retry = RetryPolicy(5, 0.5, 3.0, 9.0, 0.25)
    whole = execution(
        store, schedule_id="s", schedule_key=3, fire_us=5, deadline_us=7, retry=retry, timeout=1.5,
        overlap=Overlap.REPLACE, reason="down", coalesced=4, coalesced_from_us=1,
        job_params={"text": "ä\x00\U0001f642", "n": 2**63 - 1, "f": 1e-300, "deep": [[{}]]},
    )  # fmt: skip
    await store.add_execution(whole)
    assert store.execution(whole.execution_id) == whole
    plan = schedule(
        store, name="Ünïcode", timeout=2.5, retry=retry, misfire_grace_time=0.0, max_jitter=3.5,
        paused=True, origin="config",
    )  # fmt: skip
    await store.add_schedule_record(plan)
    assert found(store) == replace(plan, key=1, trigger_state=without_cursor(plan))


def without_cursor(plan: Schedule) -> dict[str, Any]:
    return {**plan.trigger_state, "cursor_us": 0}


async def test_equal_triggers_are_stored_equal_whenever_they_were_made(store: Store) -> None:
    noon = {"type": "cron", "hour": "12"}
    made = [sz.parse_trigger(noon, timezone="UTC", now=sz.at_of(us)) for us in (0, 10**15)]
    for number, trigger in enumerate(made):
        plan = schedule(store, f"s{number}", trigger_state=trigger.__getstate__())
        await store.add_schedule_record(plan)
    rows = store._reader.all("SELECT DISTINCT trigger_state FROM schedules")
    assert [json.loads(state)["cursor_us"] for (state,) in rows] == [0]


async def test_a_trigger_that_an_earlier_version_stored_is_still_known_as_the_same(
    store: Store,
) -> None:
    plan = schedule(store)
    await store.add_schedule_record(plan)
    sql = "UPDATE definitions SET trigger_state = ?"
    await store.write(lambda db: db.execute(sql, (sz.dump_json(plan.trigger_state),)))
    await store.write(lambda db: db.execute("UPDATE states SET next_fire_us = 7"))
    assert found(store).trigger_state == plan.trigger_state
    assert await store.replace_schedule(replace(found(store), name="new", next_fire_us=8), 0)
    assert (found(store).name, found(store).next_fire_us) == ("new", 7)


# Ids


async def test_ids_sort_by_time_and_come_back_as_numbers(store: Store) -> None:
    assert isinstance(store.clock, Dial)
    ids = []
    for _ in range(50):
        ids.append(store.new_id())
        store.clock.us += 500
    assert ids == sorted(set(ids))
    assert all(len(one) == sz.ID_CHARS for one in ids)
    assert [sz.encode_id(sz.decode_id(one) or 0) for one in ids] == ids


async def test_ids_grow_when_the_clock_goes_back_even_over_a_restart(
    open_store: Callable[..., Store],
) -> None:
    clock = Dial()
    store = open_store("ids.db", clock)
    last = (await put(store)).execution_id
    for back_us in (1, HOUR_US, clock.us):
        clock.us -= back_us
        following = (await put(store)).execution_id
        assert following > last
        last = following
    store.close()
    again = open_store("ids.db", clock)
    assert again.new_id() > last


@pytest.mark.parametrize(
    "text", ["", "0", "0" * 11, "0" * 13, "i00000000000", "00000000000O", "ä" * 12, "-00000000001"]
)
async def test_what_is_no_execution_id_finds_nothing(store: Store, text: str) -> None:
    await put(store)
    assert sz.decode_id(text) is None
    assert store.execution(text) is None
    assert store.attempts(text) == []
    assert store.log(text) is None
    assert store.executions(limit=10, before=text) == []


# Guards: of two changes at once exactly one takes place


async def begun(store: Store, attempt: int = 1) -> Execution:
    made = await put(store)
    running = made._replace(
        attempt=attempt, started_us=5, instance="worker/1", status=Status.RUNNING
    )
    assert await store.claim_execution(running)
    return running


def ended(running: Execution, status: Status = Status.SUCCESS) -> Execution:
    return running._replace(status=status, completed_us=9, result={"r": 1})


async def test_only_a_queued_execution_can_be_claimed(store: Store) -> None:
    running = await begun(store)
    assert not await store.claim_execution(running._replace(attempt=2))
    assert store.execution(running.execution_id) == running


async def test_an_execution_ends_once(store: Store) -> None:
    running = await begun(store)
    assert await store.end_execution(ended(running))
    lost = Attempt(1, "w/1", 5, 9, "lost")
    assert not await store.end_execution(ended(running, Status.LOST), lost, "log")
    stored = store.execution(running.execution_id)
    assert stored is not None
    assert (stored.status, stored.result) == (Status.SUCCESS, {"r": 1})
    assert store.attempts(running.execution_id) == []
    assert store.log(running.execution_id) is None
    assert not await store.claim_execution(running._replace(attempt=2))
    assert not await store.requeue_execution(running._replace(due_us=99), None, 1)


async def test_the_end_of_an_older_attempt_does_not_end_a_newer_one(store: Store) -> None:
    running = await begun(store)
    failed = Attempt(1, "w/1", 5, 9, "error", "no", "Traceback")
    waiting = running._replace(status=Status.QUEUED, due_us=77, instance=None, error="no")
    assert await store.requeue_execution(waiting, failed, 1, "first\n")
    assert store.execution(running.execution_id) == waiting
    second = waiting._replace(status=Status.RUNNING, attempt=2, started_us=6, instance="w/2")
    assert await store.claim_execution(second)
    assert not await store.end_execution(ended(running))
    assert await store.end_execution(ended(second), log="second\n")
    assert store.attempts(running.execution_id) == [failed]
    assert store.log(running.execution_id) == "first\nsecond\n"


async def test_a_late_result_marks_only_an_attempt_of_its_instance_that_was_given_up(
    store: Store,
) -> None:
    running = await begun(store)
    execution_id = running.execution_id
    assert not await store.record_late(execution_id, 1, "w/1", 11)
    await store.end_execution(ended(running, Status.LOST), Attempt(1, "w/1", 5, 9, "lost"))
    assert not await store.record_late(execution_id, 1, "w/2", 11)
    assert not await store.record_late(execution_id, 2, "w/1", 11)
    assert await store.record_late(execution_id, 1, "w/1", 11)
    assert [(a.outcome, a.ended_us) for a in store.attempts(execution_id)] == [("late", 11)]


async def test_live_executions_are_those_not_final_oldest_first(store: Store) -> None:
    ids = [(await put(store)).execution_id for _ in range(3)]
    done = await begun(store)
    await store.end_execution(ended(done))
    assert [e.execution_id for e in store.live_executions()] == ids


async def test_a_page_of_large_results_is_not_read_as_a_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_PAGE_BYTES", 3_200)
    for _ in range(9):
        await store.end_execution(ended(await begun(store))._replace(result="x" * 900))
        large = schedule(store, store.new_id(), job_params={"x": "y" * 900})
        await store.add_schedule_record(large)
    page = store.executions(limit=9)
    assert len(page) == 3  # one more than fits, so that it is known that others follow
    rest = store.executions(limit=9, before=page[-1].execution_id)
    assert rest[0].execution_id < page[-1].execution_id
    few, total = store.schedules(limit=9)
    assert (len(few), total) == (2, 9)
    assert len(store.schedules()[0]) == 9


async def test_a_page_counts_what_its_texts_become_in_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_PAGE_BYTES", 100_000)
    for _ in range(9):
        await store.end_execution(ended(await begun(store))._replace(result=[{}] * 1_000))
    assert len(store.executions(limit=9)) == 1  # 3 KB, of which come more than 64


async def test_a_page_that_is_cut_short_says_where_the_next_one_begins(store: Store) -> None:
    many = [{}] * (sz.MAX_PAGE_BYTES // 100)
    made = [ended(await begun(store))._replace(result=many) for _ in range(3)]
    for one in made:
        await store.end_execution(one)
    seen, query = [], {}
    while True:
        answer = sz.list_executions(SimpleNamespace(store=store), SimpleNamespace(query=query))
        page = json.loads(answer.body)
        seen += [record["execution_id"] for record in page["records"]]
        if page["next_cursor"] is None:
            break
        query = {"cursor": page["next_cursor"]}
    assert seen == [one.execution_id for one in made[::-1]]


async def test_a_change_is_let_go_once_it_is_stored(store: Store) -> None:
    class Large:
        def __call__(self, db: sqlite3.Cursor) -> None:
            pass

    change = Large()
    ended = weakref.finalize(change, lambda: None)
    await store.write(change)
    del change
    async with asyncio.timeout(10):
        while ended.alive:  # the writer's thread has but to end its turn
            await asyncio.sleep(0)


async def test_the_note_of_what_is_final_hides_no_live_execution(store: Store) -> None:
    await store.save_seen(1)  # there are none at all
    oldest = await begun(store)
    middle = await begun(store)
    await store.end_execution(ended(middle))
    await store.save_seen(2)
    newest = await put(store)
    assert [e.execution_id for e in store.live_executions()] == [
        oldest.execution_id, newest.execution_id,
    ]  # fmt: skip
    await store.end_execution(ended(oldest))
    await store.save_seen(3)
    assert [e.execution_id for e in store.live_executions()] == [newest.execution_id]
    (noted,) = store._reader.one("SELECT value FROM meta WHERE key = 'live_id'")
    assert noted == sz.decode_id(newest.execution_id)


async def test_a_database_of_an_earlier_schema_keeps_what_is_live(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(
            f"{sz.SCHEMA[0]}; {sz.SCHEMA[1]}; PRAGMA application_id = {sz.APPLICATION_ID}; "
            "PRAGMA user_version = 2"
        )
        execution = Execution("000000000009", None, "worker", "work", {}, Status.QUEUED, 5, 5, None)
        sz._insert_execution(execution, db)
        db.commit()
    with closing(Store(str(path), Config(), Dial())) as store:
        assert [e.execution_id for e in store.live_executions()] == ["000000000009"]


# Schedules


async def test_a_replaced_schedule_must_not_have_been_changed_meanwhile(store: Store) -> None:
    await store.add_schedule_record(schedule(store))
    known = found(store)
    assert await store.replace_schedule(replace(known, name="first"), known.generation)
    assert not await store.replace_schedule(replace(known, name="second"), known.generation)
    assert (found(store).name, found(store).generation) == ("first", 1)
    assert not await store.replace_schedule(replace(known, schedule_id="nobody"), 0)


async def test_an_edit_of_the_name_does_not_turn_back_a_fire_of_meanwhile(store: Store) -> None:
    await store.add_schedule_record(schedule(store))
    known = found(store)
    sql = "UPDATE states SET next_fire_us = 5, last_fire_us = 4"
    await store.write(lambda db: db.execute(sql))
    await store.replace_schedule(replace(known, name="new"), known.generation)
    assert (found(store).next_fire_us, found(store).last_fire_us) == (5, 4)


async def test_pause_and_resume_leave_no_catch_up(store: Store) -> None:
    assert isinstance(store.clock, Dial)
    await store.add_schedule_record(schedule(store))
    paused = await store.set_paused("a", True)
    assert paused is not None
    assert paused.paused
    store.clock.us += 10 * HOUR_US
    resumed = await store.set_paused("a", False)
    assert resumed is not None
    assert resumed.next_fire_us is not None
    assert store.clock.us < resumed.next_fire_us <= store.clock.us + 60_000_000
    assert await store.set_paused("nobody", True) is None


async def test_a_pause_or_a_new_trigger_leaves_a_row_for_the_fires_that_were_overdue(
    store: Store,
) -> None:
    assert isinstance(store.clock, Dial)
    began_us = store.clock.us
    for schedule_id in ("paused", "changed", "renamed", "single"):
        await store.add_schedule_record(schedule(store, schedule_id))
    await store.set_paused("renamed", True)  # nothing of it is overdue
    store.clock.us += 60_000_000
    await store.set_paused("single", True)
    store.clock.us += 4 * 60_000_000
    await store.set_paused("paused", True)
    changed = found(store, "changed")
    state = interval(3_600, store.clock.us)
    moved = replace(changed, trigger_state=state, next_fire_us=store.clock.us + HOUR_US)
    assert await store.replace_schedule(moved, changed.generation)
    assert await store.set_paused("renamed", False)
    rows = {e.schedule_id: e for e in store.executions(limit=9)}
    assert rows.keys() == {"paused", "changed", "single"}
    for name, others in (("paused", 4), ("changed", 4), ("single", 0)):
        row = rows[name]
        assert (row.status, row.reason, row.coalesced) == (Status.MISSED, "down", others)
        assert row.coalesced_from_us == (began_us + 60_000_000 if others else None)
    assert rows["paused"].fire_us == began_us + 5 * 60_000_000
    await store.set_paused("paused", False)
    resumed = found(store, "paused")
    assert resumed.next_fire_us == began_us + 6 * 60_000_000


async def test_a_missed_fire_whose_time_was_used_before_the_clock_went_back_is_not_told_of(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(store.clock, Dial)
    told: list[Execution] = []
    monkeypatch.setattr(store.intake, "accept", told.append)
    await store.add_schedule_record(schedule(store))
    due_us = found(store).next_fire_us
    store.clock.us += 60_000_000
    sql = "UPDATE states SET paused = 0, next_fire_us = ?"  # as when the clock goes back
    for _ in range(2):
        await store.set_paused("a", True)
        await store.write(lambda db: db.execute(sql, (due_us,)))
    assert told == store.executions(limit=9) != []


async def test_an_edit_that_leaves_the_times_alone_writes_no_row(store: Store) -> None:
    assert isinstance(store.clock, Dial)
    await store.add_schedule_record(schedule(store))
    store.clock.us += HOUR_US
    known = found(store)
    assert await store.replace_schedule(replace(known, name="new"), known.generation)
    assert store.executions(limit=9) == []


async def test_a_deleted_schedule_made_anew_is_another_one(store: Store) -> None:
    await store.add_schedule_record(schedule(store))
    first = found(store)
    assert await store.delete_schedule("a")
    assert not await store.delete_schedule("a")
    await store.add_schedule_record(schedule(store))
    assert found(store).key != first.key


async def test_schedules_are_filtered_searched_sorted_and_paged(store: Store) -> None:
    for place, name in enumerate(("Über Nacht", None, "backup", "Backup two")):
        await store.add_schedule_record(
            schedule(
                store, f"s{place}", name=name, handler_id=f"h{place % 2}", paused=place == 3,
                next_fire_us=None if place == 0 else 1_000 - place,
            )
        )  # fmt: skip

    def ids(**query: Any) -> list[str]:
        return [s.schedule_id for s in store.schedules(**query)[0]]

    assert ids(handler_id="h1") == ["s1", "s3"]
    assert ids(paused=True) == ["s3"]
    assert ids(paused=False, handler_id="h1") == ["s1"]
    assert ids(search="BACKUP") == ["s2", "s3"]
    assert ids(search="ÜBER") == ids(search="über") == ["s0"]
    assert ids(search="100%") == ids(method_name="_ork") == []
    assert ids(sort="next_fire_time") == ["s3", "s2", "s1", "s0"]
    assert ids(sort="-next_fire_time") == ["s1", "s2", "s3", "s0"]
    assert ids(sort="-schedule_id") == ["s3", "s2", "s1", "s0"]
    assert ids(sort="-name") == ["s0", "s2", "s3", "s1"]
    assert ids(limit=2, offset=1) == ["s1", "s2"]
    assert store.schedules(limit=1)[1] == 4
    assert set(sz.SCHEDULE_ORDERS) >= {"schedule_id", "next_fire_time", "name"}
    for order in sz.SCHEDULE_ORDERS:
        assert len(ids(sort=order)) == 4
    assert store.schedule_ids(search="BACKUP", paused=False) == ["s2"]


async def test_schedules_that_fire_soon_are_read_in_parts(store: Store) -> None:
    for place in range(6):
        await store.add_schedule_record(
            schedule(
                store, f"s{place}", name="One" if place == 1 else None, paused=place == 4,
                quarantined="broken" if place == 5 else None, next_fire_us=100 * place or None,
            )
        )  # fmt: skip
    first = store.due_until(301, after_key=0, limit=2)
    assert [(row.title, row.next_fire_us) for row in first] == [("One", 100), ("s2", 200)]
    rest = store.due_until(301, after_key=first[-1].key, limit=9)
    assert [row.schedule_id for row in rest] == ["s3"]
    assert store.count_due(301, after_key=first[-1].key) == 1


async def test_after_the_clock_went_back_an_interval_goes_on_soon(store: Store) -> None:
    assert isinstance(store.clock, Dial)
    true_us = store.clock.us
    store.clock.us += 1_000 * HOUR_US
    await store.add_schedule_record(schedule(store, "ahead"))
    await store.add_schedule_record(schedule(store, "done", next_fire_us=None))
    store.clock.us = true_us
    assert await store.replan(true_us) == 1
    next_us = found(store, "ahead").next_fire_us
    assert next_us is not None
    assert true_us < next_us <= true_us + 61_000_000
    assert found(store, "done").next_fire_us is None


async def test_replanning_reaches_every_schedule_and_passes_the_unreadable(store: Store) -> None:
    assert isinstance(store.clock, Dial)
    true_us = store.clock.us
    store.clock.us += HOUR_US * 24
    many = sz.PRUNE_ROWS + 20
    await asyncio.gather(
        *[store.add_schedule_record(schedule(store, f"s{n:04}")) for n in range(many)]
    )
    sql = "UPDATE definitions SET trigger_state = '{}' WHERE schedule_id = 's0003'"
    await store.write(lambda db: db.execute(sql))
    assert await store.replan(true_us) == many - 1


# Executions: queries, history


async def test_executions_come_newest_first_in_pages(store: Store) -> None:
    ids = [(await put(store)).execution_id for _ in range(5)]
    page = store.executions(limit=2)
    assert [e.execution_id for e in page] == [ids[4], ids[3]]
    page = store.executions(limit=2, before=page[-1].execution_id)
    assert [e.execution_id for e in page] == [ids[2], ids[1]]


async def test_executions_are_filtered(store: Store) -> None:
    assert isinstance(store.clock, Dial)
    early = await put(store, handler_id="h1")
    store.clock.us += HOUR_US
    late = await put(store, schedule_id="s", fire_us=1)
    failed = await begun(store)
    await store.end_execution(ended(failed, Status.ERROR))

    def ids(**query: Any) -> list[str]:
        return [e.execution_id for e in store.executions(limit=10, **query)]

    assert ids(handler_id="h1") == [early.execution_id]
    assert ids(schedule_id="s") == [late.execution_id]
    assert ids(status=("error", "lost")) == [failed.execution_id]
    assert ids(since_us=store.clock.us) == [failed.execution_id, late.execution_id]
    assert ids(status=("queued",), handler_id="worker") == [late.execution_id]
    assert [e.execution_id for e in store.errors(10)] == [failed.execution_id]


@pytest.mark.parametrize("since_us", [-(2**62), -1, 0, 253_402_300_799_999_999, 2**62])
async def test_no_time_is_too_early_or_late_to_ask_for(store: Store, since_us: int) -> None:
    await put(store)
    expected = 1 if since_us <= 0 else 0
    assert len(store.executions(limit=10, since_us=since_us)) == expected
    assert store.stats(since_us)["total"] == expected


async def test_stats_count_rate_and_measure(store: Store) -> None:
    for status, took_ms in (("success", 10), ("success", 30), ("error", 5), ("missed", 0)):
        done = ended(await begun(store))._replace(status=Status(status))
        now_us = store.clock.now_us()
        await store.end_execution(done._replace(completed_us=now_us, duration_us=took_ms * 1_000))
    stats = store.stats(0)
    assert (stats["total"], stats["success_rate"]) == (4, pytest.approx(2 / 3))
    assert stats["by_status"] == {"success": 2, "error": 1, "missed": 1}
    assert stats["duration_ms"] == {"p50": 30, "p95": 30, "p99": 30, "max": 30}
    assert stats["by_handler"]["worker"]["total"] == 4
    assert [sum(m[key] for m in stats["per_minute"]) for key in ("success", "failed")] == [2, 1]
    assert store.stats(store.clock.now_us() + 1)["success_rate"] is None


async def test_pruning_keeps_the_newest_and_what_is_not_final(
    open_store: Callable[..., Store],
) -> None:
    store = open_store("history.db", max_executions=5)
    queued = await put(store)
    finals = []
    for _ in range(10):
        running = await begun(store)
        late = Attempt(1, "w/1", 5, 9, "late")
        done = ended(running)._replace(completed_us=store.clock.now_us())
        await store.end_execution(done, late, "log of it")
        finals.append(running.execution_id)
    assert await store.prune(store.clock.now_us()) == 6
    kept = [e.execution_id for e in reversed(store.executions(limit=100))]
    assert kept == [queued.execution_id, *finals[6:]]
    assert store.attempts(finals[0]) == []
    assert store.log(finals[0]) is None
    assert store.log(finals[9]) == "log of it"
    assert await store.prune(store.clock.now_us()) == 0


async def test_pruning_by_age_goes_on_in_small_transactions(
    open_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "PRUNE_ROWS", 4)
    clock = Dial()
    store = open_store("history.db", clock, max_age_days=1.0)
    for _ in range(9):
        done = ended(await begun(store))._replace(completed_us=clock.us)
        await store.end_execution(done)
    clock.us += 25 * HOUR_US
    kept = await put(store)
    before = store.commits
    assert await store.prune(clock.us) == 9
    assert store.commits - before == 3
    assert store.executions(limit=100) == [kept]


async def test_the_latest_time_seen_is_what_any_row_knows(store: Store) -> None:
    assert isinstance(store.clock, Dial)
    assert store.seen_us() == 0
    await put(store)
    assert store.seen_us() == store.clock.us
    later_us = store.clock.us + HOUR_US
    await store.save_seen(later_us)
    assert store.seen_us() == later_us


# Receipts


def a_receipt(store: Store, key: str = "k", **fields: Any) -> sz.Receipt:
    return replace(sz.Receipt("/api/x me", key, b"digest", store.clock.now_us(), "made"), **fields)


def keys_of(store: Store) -> list[str]:
    with closing(sqlite3.connect(store.path)) as db:
        return [key for (key,) in db.execute("SELECT key FROM receipts ORDER BY number")]


async def test_a_receipt_and_its_change_are_stored_together_or_not_at_all(store: Store) -> None:
    receipt = a_receipt(store)
    await store.add_schedule_record(schedule(store, schedule_id="a"), receipt)
    assert store.find_receipt(receipt) == receipt
    with pytest.raises(sz.AlreadyMade):
        await store.add_schedule_record(schedule(store, schedule_id="b"), receipt)
    assert store.schedule("b") is None
    with pytest.raises(Conflict):
        await store.add_schedule_record(schedule(store, schedule_id="a"), a_receipt(store, "k2"))
    assert keys_of(store) == ["k"]
    assert store.find_receipt(a_receipt(store, scope="/api/x you")) is None


async def test_of_requests_at_the_same_time_with_one_key_one_is_carried_out(store: Store) -> None:
    receipt = a_receipt(store)
    runs = [execution(store) for _ in range(20)]
    done = await asyncio.gather(
        *(store.add_execution(run, receipt) for run in runs), return_exceptions=True
    )
    assert sum(isinstance(each, sz.AlreadyMade) for each in done) == 19
    assert len(store.executions(limit=100)) == 1


async def test_a_receipt_is_kept_for_a_day_and_the_newest_only(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(store.clock, Dial)
    await store.add_execution(execution(store), a_receipt(store, "old"))
    store.clock.us += sz.RECEIPT_LIFE_US
    assert store.find_receipt(a_receipt(store, "old")) is not None
    store.clock.us += 1
    assert store.find_receipt(a_receipt(store, "old")) is None
    await store.add_execution(execution(store), a_receipt(store, "old"))
    assert keys_of(store) == ["old"]
    for number in range(5):
        await store.add_execution(execution(store), a_receipt(store, f"new{number}"))
    await store.prune_receipts(store.clock.us)
    assert len(keys_of(store)) == 6
    monkeypatch.setattr(sz, "RECEIPTS_KEPT", 3)
    await store.prune_receipts(store.clock.us)
    assert keys_of(store) == ["new2", "new3", "new4"]
    before = store.commits
    await store.prune_receipts(store.clock.us)
    assert store.commits == before
    await store.prune_receipts(store.clock.us + sz.RECEIPT_LIFE_US + 1)
    assert keys_of(store) == []


async def test_a_database_of_version_3_gets_receipts_and_keeps_its_rows(
    open_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as past:
        past.setattr(sz, "SCHEMA", sz.SCHEMA[:3])
        past.setattr(sz, "SCHEMA_VERSION", 3)
        past.setattr(sz, "mend_pairs", lambda db: None)  # of tables that came later
        old = open_store("old.db")
        run = await put(old)
        old.close()
    new = open_store("old.db")
    assert new.executions(limit=10) == [run]
    await new.add_execution(execution(new), a_receipt(new))
    assert keys_of(new) == ["k"]


async def test_a_database_of_version_4_keeps_its_schedules_and_their_state(
    open_store: Callable[..., Store], tmp_path: Path
) -> None:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(
            f"{'; '.join(sz.SCHEMA[:4])}; PRAGMA application_id = {sz.APPLICATION_ID}; "
            "PRAGMA user_version = 4"
        )
        kept = Schedule(
            "kept", "h", "m", {"a": 1}, {"type": "interval"}, interval(60, 0), paused=True,
            next_fire_us=9, last_fire_us=8, generation=7, quarantined="broken", key=3,
        )  # fmt: skip
        values = sz.schedule_values(kept)
        db.execute(sz.insert_into("schedules", values.keys()), [*values.values()])
        db.commit()
    store = open_store("old.db")
    assert store.schedule("kept") == kept
    await store.add_schedule_record(replace(kept, schedule_id="next", key=None))
    assert found(store, "next").key == 4  # numbers are not used twice
    assert await store.delete_schedule("kept")
    assert store._reader.all("SELECT key FROM definitions") == [(4,)]
    assert store._reader.all("SELECT key FROM states") == [(4,)]


@pytest.mark.parametrize("instance", ["tcp://127.0.0.1:4242", "82cc95608f784f89", None])
async def test_a_database_of_version_5_keeps_who_ran_an_execution(
    open_store: Callable[..., Store], tmp_path: Path, instance: str | None
) -> None:
    key = None if instance is None else f"h/{instance}"
    run = Execution("000000000009", None, "h", "m", {}, Status.RUNNING, 5, 5, None, instance=key)
    row = dict(zip(sz.EXECUTION_NAMES, sz.execution_row(run), strict=True))
    with closing(sqlite3.connect(tmp_path / "old.db")) as db:
        db.executescript(
            f"{'; '.join(sz.SCHEMA[:5])}; PRAGMA application_id = {sz.APPLICATION_ID}; "
            "PRAGMA user_version = 5"
        )
        db.execute(sz.INSERT_EXECUTION, [*(row | {"instance": key}).values()])
        db.commit()
    store = open_store("old.db")
    assert store.live_executions() == [run]
    assert store._reader.all("SELECT instance FROM executions") == [(instance,)]


async def test_what_a_schedule_writes_each_second_takes_a_third_of_a_page(store: Store) -> None:
    """Else each run would write more, and the history take half as much again."""
    pages = "SELECT count(*) FROM dbstat WHERE name = 'executions' AND pagetype = 'leaf'"
    for number in range(300):
        now_us = 1_795_859_349_730_481 + number * 1_000_000
        run = execution(
            store, schedule_id="nightly-backup", schedule_key=1, fire_us=now_us,
            handler_id="backup", method_name="run", created_us=now_us, due_us=now_us,
            deadline_us=now_us, instance="backup/82cc95608f784f89", started_us=now_us,
        )  # fmt: skip
        await store.add_execution(run)
        await store.end_execution(ended(run))
    assert store._reader.one(pages)[0] <= 110


# Opening


async def test_a_new_database_has_the_schema_and_small_pages(store: Store) -> None:
    with closing(sqlite3.connect(store.path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (sz.SCHEMA_VERSION,)
        assert db.execute("PRAGMA page_size").fetchone() == (sz.PAGE_BYTES,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_an_older_database_is_brought_up_to_date_and_keeps_its_rows(
    open_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = open_store("old.db")
    await put(old)
    old.close()
    following = (*sz.SCHEMA, "ALTER TABLE executions ADD COLUMN extra TEXT")
    monkeypatch.setattr(sz, "SCHEMA", following)
    monkeypatch.setattr(sz, "SCHEMA_VERSION", sz.SCHEMA_VERSION + 1)
    new = open_store("old.db")
    assert len(new.executions(limit=10)) == 1
    with closing(sqlite3.connect(new.path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (sz.SCHEMA_VERSION,)
        assert db.execute("SELECT extra FROM executions").fetchone() == (None,)


async def test_a_migration_that_fails_leaves_the_version_it_started_from(
    open_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store("old.db").close()
    version = sz.SCHEMA_VERSION
    monkeypatch.setattr(sz, "SCHEMA", (*sz.SCHEMA, "CREATE TABLE half (a); CREATE nonsense"))
    monkeypatch.setattr(sz, "SCHEMA_VERSION", version + 1)
    with pytest.raises(StoreUnavailable):
        open_store("old.db")
    with closing(sqlite3.connect(tmp_path / "old.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (version,)
        assert db.execute("SELECT name FROM sqlite_master WHERE name = 'half'").fetchall() == []


async def test_a_migration_is_not_begun_without_the_room_for_it(
    open_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store("old.db").close()
    before = (tmp_path / "old.db").read_bytes()
    monkeypatch.setattr(sz, "room_bytes", lambda path: len(before) - 1)
    open_store("old.db").close()
    monkeypatch.setattr(sz, "SCHEMA_VERSION", sz.SCHEMA_VERSION + 1)
    with pytest.raises(sz.DiskFull, match="must be free"):
        open_store("old.db")
    assert (tmp_path / "old.db").read_bytes() == before


@pytest.mark.parametrize("journal", ["wal", "delete"])
async def test_a_newer_database_is_refused_untouched(
    open_store: Callable[..., Store], tmp_path: Path, journal: str
) -> None:
    open_store("newer.db").close()
    path = tmp_path / "newer.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA journal_mode = {journal}")
        db.execute(f"PRAGMA user_version = {sz.SCHEMA_VERSION + 1}")
    before, files = path.read_bytes(), files_of(path)
    with pytest.raises(sz.ScheduleZeroError, match="start the newer program"):
        open_store("newer.db")
    assert path.read_bytes() == before
    assert files_of(path) == files


async def test_of_a_schedule_that_damage_has_halved_nothing_is_due_and_the_rest_can_be_mended(
    open_store: Callable[..., Store],
) -> None:
    old = open_store("old.db")
    state = {"type": "interval"}
    for schedule_id in ("whole", "stateless", "undefined"):
        made = Schedule(schedule_id, "h", "m", {}, state, state, next_fire_us=1)
        await old.add_schedule_record(made)
    whole, stateless, undefined = map(partial(found, old), ("whole", "stateless", "undefined"))
    await old.write(lambda db: db.execute("DELETE FROM states WHERE key = ?", (stateless.key,)))
    await old.write(
        lambda db: db.execute("DELETE FROM definitions WHERE key = ?", (undefined.key,))
    )
    old.close()
    store = open_store("old.db")
    assert store.schedules()[1] == 2
    assert found(store, "whole") == whole
    assert "missing" in (found(store, "stateless").quarantined or "")
    assert store._reader.all(sz.SELECT_DUE_KEYS, (1, 9)) == [(whole.key,)]
    mended = replace(stateless, quarantined=None, next_fire_us=7)
    assert await store.replace_schedule(mended, 0)
    assert found(store, "stateless").next_fire_us == 7
    assert await store.delete_schedule("stateless")


async def test_a_file_that_is_no_database_is_refused_with_a_sentence(
    open_store: Callable[..., Store], tmp_path: Path
) -> None:
    (tmp_path / "text.db").write_bytes(b"these are not the pages you look for\n" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        open_store("text.db")


async def test_closing_leaves_one_file(open_store: Callable[..., Store], tmp_path: Path) -> None:
    store = open_store("one.db")
    await put(store)
    store.close()
    assert files_of(tmp_path / "one.db") == ["one.db"]


async def test_a_store_that_was_never_opened_can_be_closed(tmp_path: Path) -> None:
    Store(str(tmp_path / "read.db"), Config(), Clock()).close()


async def test_a_fire_is_planned_late_by_its_jitter_and_may_start_until_its_grace(
    store: Store,
) -> None:
    plan = schedule(store, max_jitter=10.0)
    at = sz.at_of(store.clock.now_us())
    fire = sz.Fire(at, True, None, 0, None)
    made = sz.execution_of_fire(plan, fire, store.new_id(), sz.us_of(at), 5.0, store.config)
    delay_us = made.due_us - sz.us_of(at)
    assert 0 <= delay_us <= 10_000_000
    assert made.deadline_us == made.due_us + 5_000_000
    again = sz.execution_of_fire(plan, fire, store.new_id(), sz.us_of(at), 5.0, store.config)
    assert again.due_us == made.due_us
    other = fire._replace(nominal_at=at + timedelta(seconds=1))
    assert (
        sz.execution_of_fire(plan, other, store.new_id(), 0, 5.0, store.config).due_us
        != made.due_us + 1_000_000
    )


async def test_with_a_grace_of_zero_a_fire_on_time_runs(store: Store) -> None:
    due_us = store.clock.now_us() - 1_000
    await store.add_schedule_record(schedule(store, misfire_grace_time=0.0, next_fire_us=due_us))
    (claim,) = await store.acquire_schedules("one", timedelta(seconds=30), 10)
    assert [fire.run for fire in claim.fires] == [True]  # type: ignore[attr-defined]
