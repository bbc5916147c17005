"""What APScheduler's abc.py promises of a data store, asked of its own memory store and of ours.

Where ours differs on purpose, the name of the test says so.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import apscheduler
import apscheduler.abc
import pytest
import schedulezero as sz
from apscheduler import (
    ConflictingIdError,
    ConflictPolicy,
    Event,
    Job,
    JobLookupError,
    JobOutcome,
    JobResult,
    ScheduleAdded,
    ScheduleRemoved,
    ScheduleResult,
    ScheduleUpdated,
    Task,
    TaskAdded,
    TaskLookupError,
    TaskRemoved,
    TaskUpdated,
)
from apscheduler.datastores.memory import MemoryDataStore
from apscheduler.eventbrokers.local import LocalEventBroker
from schedulezero import Clock, Coalesce, Config, Execution, Reason, Schedule, Status, Store

pytestmark = pytest.mark.anyio
T = TypeVar("T")
LEASE = timedelta(seconds=30)
US = timedelta(microseconds=1)


async def until(condition: Callable[[], T], within_s: float = 5.0) -> T:
    """The value of the condition as soon as it is true."""
    async with asyncio.timeout(within_s):
        while not (value := condition()):
            await asyncio.sleep(0.005)
    return value


def now() -> datetime:
    return datetime.now(UTC)


def every(seconds: float, since: datetime) -> sz.Trigger:
    config = {"type": "interval", "seconds": seconds, "start_time": since.isoformat()}
    return sz.parse_trigger(config, timezone="UTC", now=since - US)


def once(at: datetime) -> sz.Trigger:
    config = {"type": "date", "run_date": at.isoformat()}
    return sz.parse_trigger(config, timezone="UTC", now=min(at - US, now()))


def schedule(
    schedule_id: str, due: datetime, trigger: sz.Trigger | None = None, **fields: Any
) -> apscheduler.Schedule:
    return apscheduler.Schedule(
        id=schedule_id,
        task_id="call",
        trigger=trigger or once(due),
        args=("worker", "work", {"n": 1}),
        job_executor="call",
        next_fire_time=due,
        **fields,
    )


def result_of(acquired: apscheduler.Schedule, following: datetime | None = None) -> ScheduleResult:
    assert acquired.next_fire_time is not None
    return ScheduleResult(
        schedule_id=acquired.id,
        task_id=acquired.task_id,
        trigger=acquired.trigger,
        last_fire_time=acquired.next_fire_time,
        next_fire_time=following,
    )


def job_of(acquired: apscheduler.Schedule, at: datetime | None = None) -> Job:
    return Job(
        task_id=acquired.task_id,
        args=acquired.args,
        schedule_id=acquired.id,
        scheduled_fire_time=at or acquired.next_fire_time,
        executor="call",
    )


class Recorder:
    """An intake that admits everything and notes what became of it."""

    def __init__(self) -> None:
        self.accepted: list[Execution] = []
        self.withdrawn: list[Execution] = []

    def admit(self, execution: Execution) -> Execution:
        return execution

    def accept(self, execution: Execution) -> None:
        self.accepted.append(execution)

    def withdraw(self, execution: Execution) -> None:
        self.withdrawn.append(execution)


class Events:
    """What a data store publishes."""

    def __init__(self, broker: LocalEventBroker) -> None:
        self.seen: list[Event] = []
        broker.subscribe(self.seen.append)

    async def next(self) -> Event:
        await until(lambda: self.seen)
        return self.seen.pop(0)


@pytest.fixture
async def broker() -> AsyncIterator[LocalEventBroker]:
    async with AsyncExitStack() as stack:
        broker = LocalEventBroker()
        await broker.start(stack, logging.getLogger("test"))
        yield broker


@pytest.fixture
async def events(broker: LocalEventBroker) -> Events:
    return Events(broker)


@pytest.fixture
async def ours(tmp_path: Path, broker: LocalEventBroker) -> AsyncIterator[Store]:
    store = Store(str(tmp_path / "test.db"), Config(), Clock())
    store.open(asyncio.get_running_loop())
    store.intake = Recorder()
    async with AsyncExitStack() as stack:
        await store.start(stack, broker, logging.getLogger("test"))
        yield store
    store.close()


@pytest.fixture(params=["memory", "ours"])
async def store(
    request: pytest.FixtureRequest, broker: LocalEventBroker, ours: Store
) -> AsyncIterator[apscheduler.abc.DataStore]:
    if request.param == "ours":
        yield ours
        return
    async with AsyncExitStack() as stack:
        memory = MemoryDataStore()
        await memory.start(stack, broker, logging.getLogger("test"))
        yield memory


async def acquired_ids(
    store: apscheduler.abc.DataStore, scheduler_id: str = "one", limit: int = 100
) -> list[str]:
    return [s.id for s in await store.acquire_schedules(scheduler_id, LEASE, limit)]


# Tasks


async def test_tasks_come_back_sorted_by_id(store: apscheduler.abc.DataStore) -> None:
    for task_id in ("b", "c", "a"):
        await store.add_task(Task(id=task_id, func="m:f", job_executor="async"))
    assert [task.id for task in await store.get_tasks()] == ["a", "b", "c"]


async def test_a_task_keeps_what_it_is_made_of(store: apscheduler.abc.DataStore) -> None:
    task = Task(
        id="a",
        func="module:name",
        job_executor="async",
        max_running_jobs=3,
        misfire_grace_time=timedelta(seconds=1.5),
        metadata={"k": {"x": 1}},
    )
    await store.add_task(task)
    found = await store.get_task("a")
    assert (found.func, found.job_executor, found.max_running_jobs) == ("module:name", "async", 3)
    assert (found.misfire_grace_time, found.metadata) == (timedelta(seconds=1.5), {"k": {"x": 1}})


async def test_adding_a_known_task_replaces_it(
    store: apscheduler.abc.DataStore, events: Events
) -> None:
    await store.add_task(Task(id="a", func="m:f", job_executor="async"))
    await store.add_task(Task(id="a", func="m:g", job_executor="async"))
    assert [task.func for task in await store.get_tasks()] == ["m:g"]
    assert isinstance(await events.next(), TaskAdded)
    assert isinstance(await events.next(), TaskUpdated)


async def test_removing_a_task_tells_of_it(
    store: apscheduler.abc.DataStore, events: Events
) -> None:
    await store.add_task(Task(id="a", func="m:f", job_executor="async"))
    await store.remove_task("a")
    assert await store.get_tasks() == []
    await events.next()
    removed = await events.next()
    assert isinstance(removed, TaskRemoved)
    assert removed.task_id == "a"


async def test_an_unknown_task_is_a_lookup_error(store: apscheduler.abc.DataStore) -> None:
    with pytest.raises(TaskLookupError):
        await store.get_task("nobody")
    with pytest.raises(TaskLookupError):
        await store.remove_task("nobody")


# Schedules and conflicts


async def test_schedules_come_back_as_they_were_added(store: apscheduler.abc.DataStore) -> None:
    due = now() + timedelta(hours=1)
    await store.add_schedule(
        schedule("a", due, misfire_grace_time=7, paused=True), ConflictPolicy.exception
    )
    (found,) = await store.get_schedules()
    assert (found.id, found.args, found.paused) == ("a", ("worker", "work", {"n": 1}), True)
    assert (found.next_fire_time, found.last_fire_time) == (due, None)
    assert found.misfire_grace_time == timedelta(seconds=7)
    assert (found.acquired_by, found.acquired_until) == (None, None)
    assert found.trigger.next() == due


async def test_schedules_are_found_by_id(store: apscheduler.abc.DataStore) -> None:
    for schedule_id in "abc":
        await store.add_schedule(schedule(schedule_id, now()), ConflictPolicy.exception)
    assert {s.id for s in await store.get_schedules({"a", "c", "nobody"})} == {"a", "c"}
    assert {s.id for s in await store.get_schedules()} == {"a", "b", "c"}
    assert await store.get_schedules(set()) == []


async def test_an_added_schedule_is_told_with_its_next_fire_time(
    store: apscheduler.abc.DataStore, events: Events
) -> None:
    due = now() + timedelta(hours=1)
    await store.add_schedule(schedule("a", due), ConflictPolicy.exception)
    event = await events.next()
    assert isinstance(event, ScheduleAdded)
    assert (event.schedule_id, event.next_fire_time) == ("a", due)


async def test_a_taken_id_is_an_error_if_the_policy_says_so(
    store: apscheduler.abc.DataStore,
) -> None:
    await store.add_schedule(schedule("a", now()), ConflictPolicy.exception)
    with pytest.raises(ConflictingIdError):
        await store.add_schedule(schedule("a", now()), ConflictPolicy.exception)


async def test_a_taken_id_changes_nothing_if_the_policy_says_so(
    store: apscheduler.abc.DataStore, events: Events
) -> None:
    due = now() + timedelta(hours=1)
    await store.add_schedule(schedule("a", due), ConflictPolicy.exception)
    await store.add_schedule(schedule("a", due + LEASE), ConflictPolicy.do_nothing)
    assert [s.next_fire_time for s in await store.get_schedules()] == [due]
    await events.next()
    assert events.seen == []


async def test_a_taken_id_is_replaced_if_the_policy_says_so(
    store: apscheduler.abc.DataStore, events: Events
) -> None:
    due = now() + timedelta(hours=1)
    await store.add_schedule(schedule("a", due), ConflictPolicy.exception)
    await store.add_schedule(schedule("a", due + LEASE), ConflictPolicy.replace)
    assert [s.next_fire_time for s in await store.get_schedules()] == [due + LEASE]
    await events.next()
    event = await events.next()
    assert isinstance(event, ScheduleUpdated)
    assert event.next_fire_time == due + LEASE


async def test_removed_schedules_are_gone_and_unknown_ids_are_ignored(
    store: apscheduler.abc.DataStore, events: Events
) -> None:
    for schedule_id in "ab":
        await store.add_schedule(schedule(schedule_id, now()), ConflictPolicy.exception)
        await events.next()
    await store.remove_schedules(["a", "nobody"])
    assert [s.id for s in await store.get_schedules()] == ["b"]
    event = await events.next()
    assert isinstance(event, ScheduleRemoved)
    assert (event.schedule_id, event.finished) == ("a", False)
    assert events.seen == []


# Acquire


async def test_due_schedules_are_acquired_in_the_order_of_their_fire_times(
    store: apscheduler.abc.DataStore,
) -> None:
    for schedule_id, late_s in (("b", 2), ("a", 1), ("c", 3)):
        due = now() - timedelta(seconds=late_s)
        await store.add_schedule(schedule(schedule_id, due), ConflictPolicy.exception)
    assert await acquired_ids(store) == ["c", "b", "a"]


async def test_what_is_not_due_is_not_acquired(store: apscheduler.abc.DataStore) -> None:
    later = schedule("later", now() + timedelta(hours=1))
    paused = schedule("paused", now(), paused=True)
    for one in (later, paused):
        await store.add_schedule(one, ConflictPolicy.exception)
    assert await acquired_ids(store) == []


async def test_no_more_are_acquired_than_asked_for(store: apscheduler.abc.DataStore) -> None:
    for place in range(5):
        due = now() - timedelta(seconds=10 - place)
        await store.add_schedule(schedule(f"s{place}", due), ConflictPolicy.exception)
    assert await acquired_ids(store, limit=2) == ["s0", "s1"]
    assert await acquired_ids(store, "two", limit=2) == ["s2", "s3"]
    assert await acquired_ids(store, "three", limit=2) == ["s4"]


async def test_an_acquired_schedule_says_by_whom_and_until_when(
    store: apscheduler.abc.DataStore,
) -> None:
    await store.add_schedule(schedule("a", now()), ConflictPolicy.exception)
    before = now()
    (acquired,) = await store.acquire_schedules("one", LEASE, 100)
    assert acquired.acquired_by == "one"
    assert acquired.acquired_until is not None
    assert before + LEASE - timedelta(milliseconds=1) <= acquired.acquired_until <= now() + LEASE


async def test_a_lease_keeps_others_out_and_lets_its_holder_in(
    store: apscheduler.abc.DataStore,
) -> None:
    await store.add_schedule(schedule("a", now()), ConflictPolicy.exception)
    assert await acquired_ids(store, "one") == ["a"]
    assert await acquired_ids(store, "two") == []
    assert await acquired_ids(store, "one") == ["a"]


async def test_an_expired_lease_is_no_hindrance(store: apscheduler.abc.DataStore) -> None:
    await store.add_schedule(schedule("a", now()), ConflictPolicy.exception)
    await store.acquire_schedules("one", timedelta(microseconds=-1), 100)
    assert await acquired_ids(store, "two") == ["a"]


async def test_a_lease_can_be_extended_by_its_holder_alone(
    store: apscheduler.abc.DataStore,
) -> None:
    for schedule_id in "ab":
        await store.add_schedule(schedule(schedule_id, now()), ConflictPolicy.exception)
    await store.acquire_schedules("one", timedelta(microseconds=-1), 100)
    await store.extend_acquired_schedule_leases("two", {"b"}, LEASE)
    await store.extend_acquired_schedule_leases("one", {"a", "nobody"}, LEASE)
    assert await acquired_ids(store, "three") == ["b"]


# Release


async def test_a_released_schedule_has_its_new_times_and_no_claim(
    store: apscheduler.abc.DataStore,
) -> None:
    due = now() - timedelta(seconds=1)
    await store.add_schedule(schedule("a", due, every(3_600, due)), ConflictPolicy.exception)
    (acquired,) = await store.acquire_schedules("one", LEASE, 100)
    following = due + timedelta(hours=1)
    await store.release_schedules("one", [result_of(acquired, following)])
    (found,) = await store.get_schedules()
    assert (found.last_fire_time, found.next_fire_time) == (due, following)
    assert (found.acquired_by, found.acquired_until) == (None, None)
    assert await acquired_ids(store, "two") == []


async def test_a_released_schedule_that_is_due_again_can_be_acquired_by_another(
    store: apscheduler.abc.DataStore,
) -> None:
    due = now() - timedelta(seconds=5)
    await store.add_schedule(schedule("a", due, every(1, due)), ConflictPolicy.exception)
    (acquired,) = await store.acquire_schedules("one", LEASE, 100)
    assert acquired.next_fire_time is not None
    following = max(acquired.next_fire_time, due) + timedelta(milliseconds=1)
    await store.release_schedules("one", [result_of(acquired, following)])
    assert await acquired_ids(store, "two") == ["a"]


async def test_an_exhausted_schedule_stays_until_it_is_cleaned_up(
    store: apscheduler.abc.DataStore, events: Events
) -> None:
    await store.add_schedule(schedule("a", now()), ConflictPolicy.exception)
    (acquired,) = await store.acquire_schedules("one", LEASE, 100)
    await store.release_schedules("one", [result_of(acquired, None)])
    (found,) = await store.get_schedules()
    assert found.next_fire_time is None
    assert await acquired_ids(store) == []
    await store.cleanup()
    assert await store.get_schedules() == []
    await until(lambda: any(isinstance(event, ScheduleRemoved) for event in events.seen))
    removed = events.seen[-1]
    assert isinstance(removed, ScheduleRemoved)
    assert (removed.schedule_id, removed.finished) == ("a", True)


async def test_cleanup_keeps_what_will_fire(store: apscheduler.abc.DataStore) -> None:
    await store.add_schedule(schedule("a", now() + LEASE), ConflictPolicy.exception)
    await store.cleanup()
    assert len(await store.get_schedules()) == 1


async def test_the_next_run_time_is_the_earliest_fire_time(
    store: apscheduler.abc.DataStore,
) -> None:
    soon = now() + timedelta(seconds=1)
    for schedule_id, due in (("b", soon + LEASE), ("a", soon), ("c", soon + 2 * LEASE)):
        await store.add_schedule(schedule(schedule_id, due), ConflictPolicy.exception)
    assert await store.get_next_schedule_run_time() == soon


async def test_a_result_that_is_not_there_is_none(store: apscheduler.abc.DataStore) -> None:
    job = job_of(schedule("a", now()))
    assert await store.get_job_result(job.id) is None
    assert await store.get_jobs() == []
    assert await store.acquire_jobs("one", LEASE, 10) == []
    await store.reap_abandoned_jobs("one")


# Where ours differs on purpose


async def test_ours_clamps_the_next_run_time_to_two_seconds(ours: Store) -> None:
    at = await ours.get_next_schedule_run_time()
    assert at is not None
    assert timedelta(seconds=1.5) < at - now() <= timedelta(seconds=2)
    await ours.add_schedule(schedule("a", now() + timedelta(days=1)), ConflictPolicy.exception)
    at = await ours.get_next_schedule_run_time()
    assert at is not None
    assert timedelta(seconds=1.5) < at - now() <= timedelta(seconds=2)


async def test_ours_never_wakes_for_a_paused_schedule(ours: Store) -> None:
    await ours.add_schedule(schedule("a", now(), paused=True), ConflictPolicy.exception)
    at = await ours.get_next_schedule_run_time()
    assert at is not None
    assert at - now() > timedelta(seconds=1.5)


async def test_ours_looks_again_at_once_for_what_is_due(ours: Store) -> None:
    await ours.add_schedule(schedule("a", now() - LEASE), ConflictPolicy.exception)
    asked = now()
    at = await ours.get_next_schedule_run_time()
    assert at is not None
    assert asked < at < now() + timedelta(milliseconds=100)


async def test_ours_does_not_spin_for_what_is_due_but_leased_to_another(ours: Store) -> None:
    await ours.add_schedule(schedule("a", now() - LEASE), ConflictPolicy.exception)
    await ours.acquire_schedules("one", LEASE, 100)
    assert await acquired_ids(ours, "two") == []
    at = await ours.get_next_schedule_run_time()
    assert at is not None
    assert at - now() > timedelta(seconds=1.5)
    soon = now() + timedelta(seconds=0.5)
    await ours.add_schedule(schedule("b", soon), ConflictPolicy.exception)
    assert await ours.get_next_schedule_run_time() == soon


async def test_ours_acquires_nothing_while_the_clock_is_held(ours: Store) -> None:
    await ours.add_schedule(schedule("a", now()), ConflictPolicy.exception)
    ours.holding = "the clock is 5 s behind"
    assert await acquired_ids(ours) == []
    at = await ours.get_next_schedule_run_time()
    assert at is not None
    assert at - now() > timedelta(seconds=1.5)
    ours.holding = None
    assert await acquired_ids(ours) == ["a"]


async def test_ours_buffers_jobs_until_the_release_which_commits_fire_and_advance_as_one(
    ours: Store,
) -> None:
    due = now() - timedelta(seconds=1)
    await ours.add_schedule(schedule("a", due, every(3_600, due)), ConflictPolicy.exception)
    (acquired,) = await ours.acquire_schedules("one", LEASE, 100)
    commits = ours.commits
    await ours.add_job(job_of(acquired))
    assert (ours.commits, ours.executions(limit=10)) == (commits, [])
    await ours.release_schedules("one", [result_of(acquired, due + timedelta(hours=1))])
    assert ours.commits == commits + 1
    (execution,) = ours.executions(limit=10)
    assert execution.schedule_id == "a"
    assert execution.fire_us == sz.us_of(due)
    assert (execution.handler_id, execution.method_name) == ("worker", "work")
    assert (execution.status, execution.job_params) == (Status.QUEUED, {"n": 1})
    assert isinstance(ours.intake, Recorder)
    assert ours.intake.accepted == [execution]


async def test_ours_makes_one_execution_of_many_missed_fires_and_counts_them(ours: Store) -> None:
    due = now().replace(microsecond=0) - timedelta(seconds=10)
    await ours.add_schedule(
        schedule("a", due, every(1, due), misfire_grace_time=60), ConflictPolicy.exception
    )
    (acquired,) = await ours.acquire_schedules("one", LEASE, 100)
    assert acquired.next_fire_time is not None
    await ours.add_job(job_of(acquired))
    await ours.release_schedules("one", [result_of(acquired, now() + LEASE)])
    (execution,) = ours.executions(limit=10)
    assert execution.fire_us == sz.us_of(acquired.next_fire_time)
    assert execution.coalesced == (acquired.next_fire_time - due) // timedelta(seconds=1)
    assert (execution.coalesced_from_us, execution.reason) == (sz.us_of(due), Reason.DOWN)


async def test_ours_runs_each_missed_fire_if_the_schedule_says_so(ours: Store) -> None:
    due = now().replace(microsecond=0) - timedelta(seconds=3)
    await ours.add_schedule(
        schedule(
            "a", due, every(1, due), misfire_grace_time=60, coalesce=apscheduler.CoalescePolicy.all
        ),
        ConflictPolicy.exception,
    )
    (acquired,) = await ours.acquire_schedules("one", LEASE, 100)
    times = [acquired.next_fire_time]
    at = acquired.trigger.next()
    while at is not None and at <= now():
        times.append(at)
        at = acquired.trigger.next()
    for time in times:
        await ours.add_job(job_of(acquired, time))
    await ours.release_schedules("one", [result_of(acquired, at)])
    fires = [execution.fire_us for execution in reversed(ours.executions(limit=10))]
    assert fires == [sz.us_of(due + n * timedelta(seconds=1)) for n in range(len(times))]
    assert len(times) >= 4


async def test_ours_never_records_a_fire_time_twice(ours: Store) -> None:
    due = now() - timedelta(seconds=1)
    await ours.add_schedule(schedule("a", due, every(3_600, due)), ConflictPolicy.exception)
    for _ in range(2):
        (acquired,) = await ours.acquire_schedules("one", LEASE, 100)
        await ours.add_job(job_of(acquired))
        await ours.release_schedules("one", [result_of(acquired, due + timedelta(hours=1))])
        sql = "UPDATE states SET next_fire_us = ?"  # as when the clock goes back
        await ours.write(lambda db: db.execute(sql, (sz.us_of(due),)))  # noqa: B023
    assert len(ours.executions(limit=10)) == 1
    assert isinstance(ours.intake, Recorder)
    assert (len(ours.intake.accepted), len(ours.intake.withdrawn)) == (1, 1)


async def test_ours_asks_again_whether_what_it_found_due_a_turn_ago_still_is(ours: Store) -> None:
    due = now() - timedelta(seconds=1)
    for name in "abcd":
        await ours.add_schedule(schedule(name, due), ConflictPolicy.exception)
    assert await acquired_ids(ours, limit=1) == ["a"]
    next_at = await ours.get_next_schedule_run_time()
    assert next_at is not None and next_at < now() + timedelta(seconds=1)
    await ours.set_paused("b", True)
    await ours.remove_schedules(["c"])
    await ours.add_schedule(schedule("later", due), ConflictPolicy.exception)
    assert await acquired_ids(ours, limit=3) == ["d"]
    assert await acquired_ids(ours, "two", limit=3) == ["later"]


async def test_ours_blames_the_downtime_until_all_that_was_due_is_done(ours: Store) -> None:
    due = now() - timedelta(seconds=1)
    for name in "abcde":
        await ours.add_schedule(schedule(name, due), ConflictPolicy.exception)
    blamed = []
    for _ in range(3):
        acquired = await ours.acquire_schedules("one", LEASE, 2)
        await ours.set_paused("c", True)
        await ours.release_schedules("one", [result_of(each) for each in acquired])
        blamed.append((len(acquired), ours.reason))
    assert blamed == [(2, Reason.DOWN), (1, Reason.DOWN), (1, Reason.TOO_LATE)]


async def edit(store: Store) -> None:
    known = store.schedule("a")
    assert known is not None
    assert await store.replace_schedule(replace(known, method_name="other"), known.generation)


async def pause(store: Store) -> None:
    await store.set_paused("a", True)


async def delete(store: Store) -> None:
    await store.delete_schedule("a")


async def make_anew(store: Store) -> None:
    known = store.schedule("a")
    assert known is not None
    await store.delete_schedule("a")
    await store.add_schedule_record(replace(known, method_name="other", key=None))


@pytest.mark.parametrize("change", [edit, pause, delete, make_anew])
async def test_ours_leaves_a_schedule_alone_that_was_changed_since_it_was_acquired(
    ours: Store, change: Callable[[Store], Any]
) -> None:
    due = now() - timedelta(seconds=1)
    await ours.add_schedule(schedule("a", due, every(3_600, due)), ConflictPolicy.exception)
    (acquired,) = await ours.acquire_schedules("one", LEASE, 100)
    await ours.add_job(job_of(acquired))
    await change(ours)
    after = ours.schedule("a")
    await ours.release_schedules("one", [result_of(acquired, due + timedelta(hours=1))])
    rows = [(row.status, row.fire_us) for row in ours.executions(limit=10)]
    # A pause has seen to the fire time that was due: it will not come back to it.
    assert rows == ([(Status.MISSED, sz.us_of(due))] if change is pause else [])
    assert ours.schedule("a") == after
    assert isinstance(ours.intake, Recorder)
    assert len(ours.intake.withdrawn) == 1


async def test_ours_ignores_the_release_of_a_lease_that_was_lost_to_another(ours: Store) -> None:
    due = now() - timedelta(seconds=1)
    await ours.add_schedule(schedule("a", due, every(3_600, due)), ConflictPolicy.exception)
    (slow,) = await ours.acquire_schedules("one", timedelta(microseconds=-1), 100)
    (fast,) = await ours.acquire_schedules("two", LEASE, 100)
    await ours.add_job(job_of(fast))
    await ours.release_schedules("one", [result_of(slow, due + timedelta(hours=9))])
    assert ours.executions(limit=10) == []
    await ours.release_schedules("two", [result_of(fast, due + timedelta(hours=1))])
    assert len(ours.executions(limit=10)) == 1


async def test_ours_goes_on_with_a_fire_although_the_loop_is_cancelled_in_its_commit(
    ours: Store,
) -> None:
    due = now() - timedelta(seconds=1)
    await ours.add_schedule(schedule("a", due, every(3_600, due)), ConflictPolicy.exception)
    (acquired,) = await ours.acquire_schedules("one", LEASE, 100)
    await ours.add_job(job_of(acquired))
    releasing = asyncio.ensure_future(
        ours.release_schedules("one", [result_of(acquired, due + timedelta(hours=1))])
    )
    await asyncio.sleep(0)  # it has begun
    releasing.cancel()
    recorder = ours.intake
    assert isinstance(recorder, Recorder)
    await until(lambda: recorder.accepted)
    assert len(ours.executions(limit=10)) == 1


async def test_ours_publishes_no_event_for_a_release_as_nobody_else_waits_for_it(
    ours: Store, events: Events
) -> None:
    due = now() - timedelta(seconds=1)
    await ours.add_schedule(schedule("a", due, every(3_600, due)), ConflictPolicy.exception)
    (acquired,) = await ours.acquire_schedules("one", LEASE, 100)
    await ours.release_schedules("one", [result_of(acquired, due + timedelta(hours=1))])
    await ours.remove_schedules(["a"])
    await until(lambda: any(isinstance(event, ScheduleRemoved) for event in events.seen))
    assert [type(event) for event in events.seen] == [ScheduleAdded, ScheduleRemoved]


async def test_ours_keeps_the_fire_time_of_a_replaced_schedule_whose_trigger_is_the_same(
    ours: Store,
) -> None:
    due = now() + timedelta(hours=1)
    trigger = every(3_600, due)
    await ours.add_schedule(schedule("a", due, trigger), ConflictPolicy.exception)
    await ours.add_schedule(schedule("a", due + LEASE, trigger), ConflictPolicy.replace)
    assert [s.next_fire_time for s in await ours.get_schedules()] == [due]


async def test_ours_has_no_job_queue_for_workers_of_apscheduler(ours: Store) -> None:
    job = Job(task_id="call", args=("worker", "work", {"n": 2}), executor="call")
    await ours.add_job(job)
    assert await ours.get_jobs() == await ours.acquire_jobs("one", LEASE) == []
    (execution,) = ours.executions(limit=10)
    assert (execution.schedule_id, execution.fire_us) == (None, None)
    assert (execution.handler_id, execution.job_params) == ("worker", {"n": 2})
    outcome = JobResult.from_job(job, JobOutcome.success)
    with pytest.raises(JobLookupError):
        await ours.release_job("one", job, outcome)


async def test_ours_refuses_a_trigger_that_it_cannot_store(ours: Store) -> None:
    foreign = apscheduler.Schedule(
        id="a", task_id="call", trigger=_Foreign(), args=("w", "m", {}), job_executor="x"
    )
    with pytest.raises(sz.InvalidField):
        await ours.add_schedule(foreign, ConflictPolicy.exception)


class _Foreign(apscheduler.abc.Trigger):
    def next(self) -> datetime | None:
        return None

    def __getstate__(self) -> Any:
        return None

    def __setstate__(self, state: Any) -> None:
        return None


async def test_ours_quarantines_a_schedule_whose_trigger_it_cannot_read_and_fires_the_others(
    ours: Store,
) -> None:
    due = now() - timedelta(seconds=1)
    for schedule_id in "ab":
        await ours.add_schedule(schedule(schedule_id, due), ConflictPolicy.exception)
    sql = (
        "UPDATE definitions SET trigger_state = replace(trigger_state, 'UTC', 'Mars/Olympus_Mons') "
        "WHERE schedule_id = 'a'"
    )
    await ours.write(lambda db: db.execute(sql))
    assert {s.id for s in await ours.get_schedules()} == {"b"}
    assert await acquired_ids(ours) == ["b"]
    quarantined = ours.schedule("a")
    assert quarantined is not None
    assert quarantined.quarantined is not None
    assert "Mars/Olympus_Mons" in quarantined.quarantined
    assert quarantined.next_fire_us == sz.us_of(due)


async def test_ours_resumes_a_schedule_whose_trigger_it_cannot_read_and_then_quarantines_it(
    ours: Store,
) -> None:
    due = now() - timedelta(seconds=1)
    await ours.add_schedule(schedule("a", due), ConflictPolicy.exception)
    await ours.set_paused("a", True)
    sql = "UPDATE definitions SET trigger_state = replace(trigger_state, 'UTC', 'Mars/Olympus')"
    await ours.write(lambda db: db.execute(sql))
    resumed = await ours.set_paused("a", False)
    assert resumed is not None and not resumed.paused
    assert await acquired_ids(ours) == []
    quarantined = ours.schedule("a")
    assert quarantined is not None and "Mars/Olympus" in (quarantined.quarantined or "")


async def test_ours_lets_no_trouble_of_the_database_out_to_the_loop(
    ours: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    due = now() - timedelta(seconds=1)
    await ours.add_schedule(schedule("a", due, every(3_600, due)), ConflictPolicy.exception)
    monkeypatch.setattr(sz, "NEXT_WAKE_S", (0.001, 0.01))

    def broken(*_: Any) -> Any:
        raise sz.StoreUnavailable("disk on fire")

    with monkeypatch.context() as reading:
        reading.setattr(ours._reader, "all", broken)
        assert await acquired_ids(ours) == []
        assert await ours.get_next_schedule_run_time() is not None
    (acquired,) = await ours.acquire_schedules("one", LEASE, 100)
    await ours.add_job(job_of(acquired))

    def failing(db: sqlite3.Connection) -> None:
        raise sz.StoreUnavailable("disk on fire")

    with monkeypatch.context() as writing:
        writing.setattr(sz, "_commit_fires", lambda fired, db: failing(db))
        await ours.release_schedules("one", [result_of(acquired, None)])
    recorder = ours.intake
    assert isinstance(recorder, Recorder)
    await until(lambda: recorder.withdrawn)
    await ours.probe()
    assert ours.state == "ok"
    assert await acquired_ids(ours) == ["a"]


# AsyncScheduler, really running


class Running:
    """APScheduler's scheduling half over our store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        looked_s = self._store.last_turn_s
        self._task = asyncio.ensure_future(self._run())
        await until(lambda: self._store.last_turn_s != looked_s)

    async def _run(self) -> None:
        scheduler = apscheduler.AsyncScheduler(
            self._store,
            identity="test",
            role=apscheduler.SchedulerRole.scheduler,
            cleanup_interval=None,  # type: ignore[arg-type]
        )
        async with scheduler:
            await scheduler.run_until_stopped()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[tuple[Store, Running]]:
    store = Store(str(tmp_path / "running.db"), Config(), Clock())
    store.open(asyncio.get_running_loop())
    store.intake = Recorder()
    loop = Running(store)
    await loop.start()
    yield store, loop
    await loop.stop()
    store.close()


def record(schedule_id: str, due: datetime, trigger: sz.Trigger | None = None) -> Schedule:
    state = (trigger or once(due)).__getstate__()
    return Schedule(
        schedule_id, "worker", "work", {}, state, state, next_fire_us=sz.us_of(due),
        coalesce=Coalesce.LATEST,
    )  # fmt: skip


async def test_more_schedules_than_one_turn_takes_due_at_one_instant_make_one_execution_each(
    running: tuple[Store, Running],
) -> None:
    store, _ = running
    due = now() + timedelta(seconds=0.5)
    await asyncio.gather(*[store.add_schedule_record(record(f"s{n}", due)) for n in range(150)])
    await until(lambda: len(store.executions(limit=1_000)) >= 150)
    executions = store.executions(limit=1_000)
    assert {e.schedule_id for e in executions} == {f"s{n}" for n in range(150)}
    assert {e.fire_us for e in executions} == {sz.us_of(due)}
    assert all(e.created_us >= sz.us_of(due) for e in executions)
    assert all(s.next_fire_us is None for s in store.schedules()[0])


async def test_a_schedule_added_while_the_loop_sleeps_fires_on_time(
    running: tuple[Store, Running],
) -> None:
    store, _ = running
    due = now() + timedelta(seconds=0.2)
    await store.add_schedule_record(record("a", due))
    (execution,) = await until(lambda: store.executions(limit=10))
    assert timedelta() <= sz.at_of(execution.created_us) - due < timedelta(seconds=1)


async def test_an_interval_fires_each_of_its_times_once(running: tuple[Store, Running]) -> None:
    store, _ = running
    due = now() + timedelta(seconds=0.1)
    await store.add_schedule_record(record("a", due, every(1, due)))
    await until(lambda: len(store.executions(limit=10)) == 2)
    fires = [execution.fire_us for execution in reversed(store.executions(limit=10))]
    assert fires == [sz.us_of(due), sz.us_of(due + timedelta(seconds=1))]
    found = store.schedule("a")
    assert found is not None
    assert found.last_fire_us == fires[-1]
    assert found.next_fire_us == sz.us_of(due + timedelta(seconds=2))


async def test_a_loop_that_is_started_again_goes_on_where_the_first_one_ended(
    running: tuple[Store, Running],
) -> None:
    store, loop = running
    await loop.stop()
    due = now() - timedelta(seconds=1)
    await store.add_schedule_record(record("a", due, every(3_600, due)))
    await loop.start()
    (execution,) = await until(lambda: store.executions(limit=10))
    assert execution.fire_us == sz.us_of(due)


async def test_a_change_of_the_next_fire_time_wakes_the_sleeping_loop(
    running: tuple[Store, Running],
) -> None:
    store, _ = running
    far = now() + timedelta(hours=1)
    await store.add_schedule_record(record("a", far, every(3_600, far)))
    known = store.schedule("a")
    assert known is not None
    soon = now() + timedelta(seconds=0.1)
    state = every(3_600, soon).__getstate__()
    changed = replace(known, trigger_state=state, next_fire_us=sz.us_of(soon))
    assert await store.replace_schedule(changed, known.generation)
    (execution,) = await until(lambda: store.executions(limit=10))
    assert sz.at_of(execution.created_us) - soon < timedelta(seconds=1)
