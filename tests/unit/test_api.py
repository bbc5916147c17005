"""The API's routes over a small in-memory server: what they answer, refuse and change."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import pytest
import schedulezero as sz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NOW_US = sz.us_of(sz.datetime(2026, 11, 23, 12, 0, 0, tzinfo=sz.UTC))
HOURLY = {"type": "interval", "hours": 1}
CALL = {"handler_id": "ding-dong", "method_name": "chime"}


class FixedClock(sz.Clock):
    def __init__(self) -> None:
        self.us = NOW_US

    def now(self) -> sz.datetime:
        return sz.at_of(self.us)

    def now_us(self) -> int:
        return self.us

    def monotonic(self) -> float:
        return self.us / 1e6


def dumped(schedule: sz.Schedule) -> str:
    return json.dumps(schedule.trigger_state)


class MemoryStore:
    """Schedules and executions in dictionaries; edits compare the generation as the real one."""

    def __init__(self, clock: FixedClock) -> None:
        self.clock = clock
        self.by_id: dict[str, sz.Schedule] = {}
        self.runs: dict[str, sz.Execution] = {}
        self.interfering = 0  # edits by others that come between a read and a write
        self.failure: sz.ScheduleZeroError | None = None
        self.noted: list[sz.AuditEntry] = []
        self.receipts: dict[tuple[str, str], sz.Receipt] = {}
        self.looked_up = 0

    def schedule(self, schedule_id: str) -> sz.Schedule | None:
        return self.by_id.get(schedule_id)

    def schedules(
        self,
        *,
        sort: str = "schedule_id",
        limit: int = -1,
        offset: int = 0,
        **wanted: Unpack[sz.Wanted],
    ) -> tuple[list[sz.Schedule], int]:
        search, paused = wanted.get("search"), wanted.get("paused")
        found = [
            schedule
            for schedule in sorted(self.by_id.values(), key=lambda s: s.schedule_id)
            if wanted.get("handler_id") in (None, schedule.handler_id)
            and wanted.get("method_name") in (None, schedule.method_name)
            and paused in (None, schedule.paused)
            and (search is None or search in schedule.schedule_id)
        ]
        return found[offset : offset + limit], len(found)

    def schedule_ids(self, **wanted: Unpack[sz.Wanted]) -> list[str]:
        return [schedule.schedule_id for schedule in self.schedules(**wanted, limit=999)[0]]

    def due_until(self, end_us: int, *, after_key: int, limit: int) -> list[sz.DueRow]:
        made = enumerate(self.by_id.values(), 1)
        return [
            sz.DueRow(key, s.schedule_id, s.name or s.schedule_id, dumped(s), s.next_fire_us)
            for key, s in made
            if key > after_key and not s.paused and s.next_fire_us and s.next_fire_us < end_us
        ][:limit]

    def count_due(self, end_us: int, *, after_key: int) -> int:
        return len(self.due_until(end_us, after_key=after_key, limit=999_999))

    async def add_schedule_record(
        self, schedule: sz.Schedule, receipt: sz.Receipt | None = None
    ) -> None:
        if self.failure:
            raise self.failure
        if schedule.schedule_id in self.by_id:
            raise sz.IdTaken(f"there is a schedule '{schedule.schedule_id}' already")
        self.by_id[schedule.schedule_id] = schedule
        self._keep(receipt)

    def _keep(self, receipt: sz.Receipt | None) -> None:
        if receipt is not None:
            self.receipts[receipt.scope, receipt.key] = receipt

    def find_receipt(self, wanted: sz.Receipt) -> sz.Receipt | None:
        self.looked_up += 1
        return self.receipts.get((wanted.scope, wanted.key))

    async def replace_schedule(self, schedule: sz.Schedule, generation: int) -> bool:
        known = self.by_id[schedule.schedule_id]
        if self.interfering:
            self.interfering -= 1
            known = replace(known, generation=known.generation + 1)
            self.by_id[schedule.schedule_id] = known
        if known.generation != generation:
            return False
        self.by_id[schedule.schedule_id] = replace(schedule, generation=generation + 1)
        return True

    async def delete_schedule(self, schedule_id: str, generation: int | None = None) -> bool:
        known = self.by_id[schedule_id]
        if self.interfering:
            self.interfering -= 1
            known = replace(known, generation=known.generation + 1)
            self.by_id[schedule_id] = known
        if generation not in (None, known.generation):
            return False
        return self.by_id.pop(schedule_id, None) is not None

    async def set_paused(self, schedule_id: str, paused: bool) -> sz.Schedule | None:
        self.by_id[schedule_id] = replace(self.by_id[schedule_id], paused=paused)
        return self.by_id[schedule_id]

    def execution(self, execution_id: str) -> sz.Execution | None:
        return self.runs.get(execution_id)

    def executions(
        self,
        *,
        limit: int,
        before: str | None = None,
        handler_id: str | None = None,
        schedule_id: str | None = None,
        status: Sequence[str] = (),
        since_us: int | None = None,
    ) -> list[sz.Execution]:
        return [
            run
            for run in sorted(self.runs.values(), key=lambda r: r.execution_id, reverse=True)
            if (before is None or run.execution_id < before)
            and (not status or run.status in status)
            and (since_us is None or run.created_us >= since_us)
            and handler_id in (None, run.handler_id)
            and schedule_id in (None, run.schedule_id)
        ][:limit]

    def attempts(self, execution_id: str) -> list[sz.Attempt]:
        return [sz.Attempt(1, "a", NOW_US, NOW_US + 5, "error", "first try", "Traceback …")]

    def log(self, execution_id: str) -> str | None:
        return "stored\n"

    def stats(self, since_us: int) -> dict[str, Any]:
        return {"total": len(self.runs)}

    def note(self, entry: sz.AuditEntry) -> tuple[int, int]:
        self.noted.append(replace(entry, number=len(self.noted) + 1))
        return 0, len(self.noted)

    def note_refusal(self, place: tuple[int, int], status: int) -> None:
        self.noted[place[1] - 1] = replace(self.noted[place[1] - 1], status=status)

    async def settle_notes(self) -> None:
        pass

    def audit(self, *, limit: int, before: int | None = None) -> list[sz.AuditEntry]:
        newest = self.noted[: None if before is None else before - 1][::-1]
        return newest[:limit]

    def errors(self, limit: int) -> list[sz.Execution]:
        return [run for run in self.runs.values() if run.status is sz.Status.ERROR][:limit]


class MemoryDispatcher:
    """Ends each execution as `ending` says, when it is waited for."""

    running = waiting = 0
    secrets = sz.Secrets(sz.Config(data_dir="/nonexistent"))

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.ending: dict[str, Any] = {"status": sz.Status.SUCCESS, "result": "ding dong"}
        self.submitted: list[tuple[Any, ...]] = []
        self.cancelled: list[str] = []
        self.failure: sz.ScheduleZeroError | None = None

    async def submit(
        self,
        handler_id: str,
        method_name: str,
        job_params: Mapping[str, Any],
        *,
        schedule: sz.Schedule | None = None,
        receipt: sz.Receipt | None = None,
        **own: Any,
    ) -> sz.Execution:
        if self.failure:
            raise self.failure
        call = (handler_id, method_name, job_params, own["timeout"], own["retry"])
        self.submitted.append(call)
        execution = an_execution(len(self.store.runs), schedule and schedule.schedule_id)
        execution = execution._replace(job_params=job_params, status=sz.Status.QUEUED)
        self.store.runs[execution.execution_id] = execution
        self.store._keep(receipt and replace(receipt, made=execution.execution_id))
        return execution

    async def end_of(self, submitted: Awaitable[sz.Execution]) -> sz.Execution:
        return await self.wait((await submitted).execution_id)

    async def wait(self, execution_id: str) -> sz.Execution:
        ended = self.store.runs[execution_id]._replace(completed_us=NOW_US + 9, **self.ending)
        self.store.runs[execution_id] = ended
        return ended

    async def cancel(self, execution_id: str, reason: str) -> sz.Execution | None:
        execution = self.store.runs[execution_id]
        if execution.is_final:
            raise sz.Conflict(f"the execution has ended already: {execution.status}")
        ended = execution._replace(status=sz.Status.CANCELLED, completed_us=NOW_US)
        self.store.runs[execution_id] = ended
        return ended

    def cancel_queued(self, schedule_id: str, reason: str) -> None:
        self.cancelled.append(schedule_id)

    def progress(self, execution_id: str) -> tuple[float | None, str | None] | None:
        return 50.0, "half way"

    def live_log(self, execution_id: str) -> str:
        return "live\n"


class MemoryGateway:
    def __init__(self) -> None:
        self.known = {
            "ding-dong": a_handler("ding-dong", "Connected", "chime", "ring"),
            "asleep": a_handler("asleep", "Disconnected", "snore"),
            "mute": a_handler("mute", "Disconnected"),
        }

    def handlers(self) -> list[sz.HandlerInfo]:
        return list(self.known.values())

    def handler(self, handler_id: str) -> sz.HandlerInfo | None:
        return self.known.get(handler_id)

    def method_names(self, handler_id: str) -> list[str] | None:
        known = self.known.get(handler_id)
        return [method.name for method in known.methods] if known else None


class NothingHappened:
    """The database's past, uneventful."""

    last_backup_us = None
    acknowledged = 0

    async def acknowledge(self) -> None:
        self.acknowledged += 1


class QuietEvents:
    subscribers = 0

    def subscribe(self, write: Any, framing: Any, last_event_id: str | None) -> Any:
        write(f"last was {last_event_id}".encode())
        return lambda: None


def a_handler(handler_id: str, status: str, *methods: str) -> sz.HandlerInfo:
    instance = sz.InstanceInfo("i", "dial-in", status, 2, 1, NOW_US, NOW_US - 1_500_000)
    infos = tuple(sz.MethodInfo(name, "does it", ({"name": "n"},)) for name in methods)
    return sz.HandlerInfo(handler_id, "dial-in", status, infos, (instance,), 1, 0, NOW_US)


def an_execution(number: int, schedule_id: str | None = None) -> sz.Execution:
    return sz.Execution(
        execution_id=sz.encode_id(number),
        schedule_id=schedule_id,
        handler_id="ding-dong",
        method_name="chime",
        job_params={},
        status=sz.Status.SUCCESS,
        created_us=NOW_US + number,
        due_us=NOW_US,
        deadline_us=None,
        started_us=NOW_US,
        completed_us=None,
    )


class World:
    """A server without sockets, and a client of it."""

    def __init__(self) -> None:
        self.config = sz.Config(timezone="Europe/Berlin", data_dir="/nonexistent")
        self.clock = FixedClock()
        self.access = sz.Access(self.config, self.clock)
        self.started_monotonic = self.clock.monotonic() - 60
        self.store = MemoryStore(self.clock)
        self.dispatcher = MemoryDispatcher(self.store)
        self.gateway = MemoryGateway()
        self.events = QuietEvents()
        self.recovery = NothingHappened()
        self.forecast = sz.Forecast(self.store, self.clock)  # type: ignore[arg-type]
        self.checks = {"store": "ok"}, "ok"
        self.api = sz.Api(self)  # type: ignore[arg-type]

    def health(self) -> tuple[dict[str, str], str]:
        return self.checks

    def send(self, method: str, target: str, body: bytes = b"", **headers: str) -> Any:
        path, _, query = target.partition("?")
        pairs = [pair.split("=", 1) for pair in query.split("&")] if query else []
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        request = sz.Request(method, path, dict(pairs), given, True, "127.0.0.1", body)
        answer = self.api.handle(request)
        if isinstance(answer, (sz.Response, sz.StreamResponse)):
            return answer
        return asyncio.run(_awaited(answer))

    def ask(self, method: str, target: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer."""
        if body is None:
            answer = self.send(method, target)
        else:
            data = json.dumps(body).encode()
            answer = self.send(method, target, data, content_type="application/json")
        return answer.status, json.loads(answer.body)

    def add(self, schedule_id: str = "hourly", **fields: Any) -> None:
        body = {**CALL, "trigger_config": HOURLY, "schedule_id": schedule_id, **fields}
        assert self.ask("POST", "/api/schedule", body)[0] == 201


async def _awaited(answer: Any) -> Any:
    return await answer


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize(
    ("fake", "real"),
    [(MemoryStore, "Store"), (MemoryDispatcher, "Dispatcher"), (MemoryGateway, "Gateway")],
)
def test_the_server_of_these_tests_takes_what_the_real_one_takes(fake: type, real: str) -> None:
    for name, function in vars(fake).items():
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        takes = inspect.signature(getattr(getattr(sz, real), name)).parameters
        assert set(inspect.signature(function).parameters) - {"own"} <= set(takes), name


# Schedules


def test_a_schedule_is_made_and_shown_as_the_contract_says(world: World) -> None:
    body = {**CALL, "job_params": {"n": 1}, "trigger_config": HOURLY, "schedule_id": "hourly"}
    status, answer = world.ask("POST", "/api/schedule", body)
    assert (status, answer["status"], answer["schedule_id"]) == (201, "success", "hourly")
    status, listed = world.ask("GET", "/api/schedules")
    assert (status, listed["count"], listed["total"], listed["next_offset"]) == (200, 1, 1, None)
    (shown,) = listed["schedules"]
    assert shown["id"] == "hourly"
    assert shown["next_fire_time"] == "2026-11-23T13:00:00Z" == answer["next_fire_time"]
    assert shown["trigger"] == "interval[1:00:00]"
    assert shown["description"].startswith("every hour")
    assert shown["args"] == ["ding-dong", "chime", {"n": 1}]
    assert shown["trigger_config"] == {**HOURLY, "timezone": "Europe/Berlin"}
    assert shown["paused"] is False
    assert shown["last_fire_time"] is None
    assert world.ask("GET", "/api/schedules/hourly") == (200, shown)


def test_every_field_of_a_schedule_is_kept(world: World) -> None:
    fields = {
        "name": "Every hour, on the hour",
        "timeout": 1.5,
        "retry": {"max_attempts": 7, "jitter": 0},
        "coalesce": "all",
        "overlap": "replace",
        "misfire_grace_time": 30,
        "max_jitter": 2.5,
        "paused": True,
    }
    world.add(**fields)
    shown = world.ask("GET", "/api/schedules/hourly")[1]
    retry = shown.pop("retry")
    assert {key: shown[key] for key in fields if key != "retry"} == {
        key: value for key, value in fields.items() if key != "retry"
    }
    assert retry == {
        "max_attempts": 7, "base_delay": 1.0, "factor": 2.0, "max_delay": 60.0, "jitter": 0.0
    }  # fmt: skip


def test_a_schedule_without_an_id_gets_one(world: World) -> None:
    body = {**CALL, "trigger_config": HOURLY}
    first = world.ask("POST", "/api/schedule", body)[1]["schedule_id"]
    second = world.ask("POST", "/api/schedule", body)[1]["schedule_id"]
    assert first != second
    assert {first, second} == set(world.store.by_id)


def test_a_taken_id_is_a_conflict(world: World) -> None:
    world.add()
    body = {**CALL, "trigger_config": HOURLY, "schedule_id": "hourly"}
    status, answer = world.ask("POST", "/api/schedule", body)
    assert (status, answer["code"]) == (409, "conflict")
    assert "hourly" in answer["error"]
    assert answer["field"] == "schedule_id"


@pytest.mark.parametrize("path", ["/api/schedule", "/api/run_now"])
def test_an_unknown_handler_or_method_is_told_at_its_field(world: World, path: str) -> None:
    plan = {"trigger_config": HOURLY} if path.endswith("schedule") else {}
    body = {"handler_id": "ding-don", "method_name": "chime", **plan}
    status, answer = world.ask("POST", path, body)
    assert (status, answer["code"], answer["field"]) == (404, "not_found", "handler_id")
    status, answer = world.ask("POST", path, {**CALL, "method_name": "chim", **plan})
    assert (status, answer["field"]) == (400, "method_name")


def test_job_method_is_another_name_of_method_name(world: World) -> None:
    body = {"handler_id": "ding-dong", "job_method": "ring", "trigger_config": HOURLY}
    assert world.ask("POST", "/api/schedule", body)[0] == 201
    assert [schedule.method_name for schedule in world.store.by_id.values()] == ["ring"]
    status, answer = world.ask("POST", "/api/schedule", {**body, "method_name": "ring"})
    assert (status, answer["field"]) == (400, "method_name")


@pytest.mark.parametrize(
    ("handler_id", "method_name", "status", "sentence"),
    [
        ("ding-dong", "ring", 201, ""),
        ("asleep", "snore", 201, ""),
        ("mute", "anything", 201, ""),
        ("dingdong", "chime", 404, "there is no handler 'dingdong'; did you mean 'ding-dong'?"),
        ("nobody", "x", 404, "there is no handler 'nobody'"),
        ("ding-dong", "chyme", 400, "has no method 'chyme'; did you mean 'chime'?"),
        ("asleep", "xyz", 400, "has no method 'xyz'; it has snore"),
    ],
)
def test_the_target_of_a_call_must_be_known_but_not_connected(
    world: World, handler_id: str, method_name: str, status: int, sentence: str
) -> None:
    body = {"handler_id": handler_id, "method_name": method_name}
    answer = world.ask("POST", "/api/schedule", {**body, "trigger_config": HOURLY})
    assert answer[0] == status
    assert sentence in answer[1].get("error", "")
    run = world.ask("POST", "/api/run_now", {**body, "wait": False})
    assert run[0] == {201: 202}.get(status, status)


def test_schedules_are_filtered_and_paged(world: World) -> None:
    for number in range(5):
        world.add(f"s{number}", method_name="ring" if number % 2 else "chime")
    answer = world.ask("GET", "/api/schedules?method_name=chime&limit=2")[1]
    assert [item["id"] for item in answer["schedules"]] == ["s0", "s2"]
    assert (answer["count"], answer["total"], answer["next_offset"]) == (2, 3, 2)
    answer = world.ask("GET", "/api/schedules?method_name=chime&limit=2&offset=2")[1]
    assert [item["id"] for item in answer["schedules"]] == ["s4"]
    assert answer["next_offset"] is None
    answer = world.ask("GET", "/api/schedules?paused=true")[1]
    assert (answer["schedules"], answer["count"], answer["total"]) == ([], 0, 0)


def test_an_answer_ends_where_it_would_grow_too_large_and_says_where_to_go_on(
    world: World,
) -> None:
    text = "x" * (sz.MAX_PAGE_BYTES // 2 // 3)
    for number in range(4):
        world.add(f"s{number}", job_params={"text": text})
    answer = world.ask("GET", "/api/schedules")[1]
    assert (answer["count"], answer["total"], answer["next_offset"]) == (2, 4, 2) or (
        answer["count"] == answer["next_offset"] == 3
    )
    rest = world.ask("GET", f"/api/schedules?offset={answer['next_offset']}")[1]
    assert answer["count"] + rest["count"] == 4


def test_a_change_touches_only_what_is_given(world: World) -> None:
    world.add(name="old")
    before = world.store.by_id["hourly"]
    world.clock.us += 60_000_000
    status, answer = world.ask("PATCH", "/api/schedules/hourly", {"name": "new", "timeout": 5})
    assert (status, answer["schedule"]["name"]) == (200, "new")
    assert world.store.by_id["hourly"] == replace(
        before, name="new", timeout=5.0, updated_us=world.clock.us, generation=1
    )
    world.ask("PATCH", "/api/schedules/hourly", {"name": None, "timeout": None, "retry": None})
    assert world.store.by_id["hourly"].name is None
    assert world.store.by_id["hourly"].timeout is None


def test_a_new_trigger_plans_from_now_and_ends_a_quarantine(world: World) -> None:
    world.add()
    world.store.by_id["hourly"] = replace(
        world.store.by_id["hourly"], quarantined="its zone is gone", trigger_state={"type": "?"}
    )
    shown = world.ask("GET", "/api/schedules/hourly")[1]
    assert shown["trigger"] == "unusable"
    world.clock.us += 60_000_000
    body = {"trigger_config": {"type": "interval", "minutes": 10}}
    shown = world.ask("PATCH", "/api/schedules/hourly", body)[1]["schedule"]
    assert shown["next_fire_time"] == "2026-11-23T12:11:00Z"
    assert shown["quarantined"] is None
    assert shown["trigger"] == "interval[0:10:00]"


def test_a_change_is_tried_again_when_a_fire_comes_between(world: World) -> None:
    world.add()
    world.store.interfering = 3
    status, answer = world.ask("PATCH", "/api/schedules/hourly", {"name": "new"})
    assert (status, answer["schedule"]["generation"]) == (200, 4)
    world.store.interfering = 99
    status, answer = world.ask("PATCH", "/api/schedules/hourly", {"name": "newer"})
    assert (status, answer["code"]) == (409, "conflict")


def test_a_change_checks_the_target_only_if_it_changes(world: World) -> None:
    world.add()
    del world.gateway.known["ding-dong"]
    assert world.ask("PATCH", "/api/schedules/hourly", {"name": "new"})[0] == 200
    assert world.ask("PATCH", "/api/schedules/hourly", {"method_name": "ring"})[0] == 404


def test_the_end_of_a_pause_by_a_change_catches_nothing_up(world: World) -> None:
    world.add(paused=True)
    world.clock.us += 5 * 3_600_000_000 + 1
    shown = world.ask("PATCH", "/api/schedules/hourly", {"paused": False})[1]["schedule"]
    assert (shown["paused"], shown["next_fire_time"]) == (False, "2026-11-23T18:00:00Z")


def test_a_member_of_retry_that_is_null_goes_back_to_what_is_configured(world: World) -> None:
    world.add(retry={"max_attempts": 7, "factor": 5})
    world.ask("PATCH", "/api/schedules/hourly", {"retry": {"max_attempts": None}})
    retry = world.store.by_id["hourly"].retry
    assert retry == replace(world.config.retry, factor=5)
    world.ask("POST", "/api/run_now", {**CALL, "retry": {"factor": None, "max_attempts": 2}})
    assert world.dispatcher.submitted[-1][4] == replace(world.config.retry, max_attempts=2)


# What will fire


def counts_of(answer: Mapping[str, Any]) -> list[int]:
    return [bucket["count"] for bucket in answer["buckets"]]


def test_coming_fires_are_counted_by_quarters_of_an_hour(world: World) -> None:
    world.add("hourly")
    world.add("dense", trigger_config={"type": "interval", "minutes": 1}, name="Dense")
    world.add("nightly", trigger_config={"type": "cron", "hour": "2", "timezone": "UTC"})
    world.add("paused", paused=True)
    status, answer = world.ask("GET", "/api/upcoming")
    assert (status, answer["schedules"], answer["left_out"]) == (200, 3, 0)
    assert (answer["begin"], answer["bucket_seconds"]) == ("2026-11-23T12:00:00Z", 900)
    counts = counts_of(answer)
    assert counts[:6] == [14, 15, 15, 15, 16, 15]
    assert sum(counts) == 23 + 1439 + 1
    assert answer["buckets"][14 * 4] == {
        "at": "2026-11-24T02:00:00Z", "count": 17, "schedules": ["hourly", "Dense", "nightly"]
    }  # fmt: skip
    assert [fire["name"] for fire in answer["soonest"]] == ["Dense", "hourly", "nightly"]


@pytest.mark.parametrize(
    "config",
    [
        {"type": "interval", "minutes": 7},
        {"type": "cron", "expression": "*/11 * * * *", "timezone": "Europe/Berlin"},
        {"type": "date", "run_date": "2026-11-23T20:00:00Z"},
        {"type": "or", "triggers": [{"type": "cron", "minute": "3,33"}, HOURLY]},
        {"type": "calendar_interval", "days": 1, "hour": 20},
    ],
    ids=lambda config: config["type"],
)
def test_the_counts_are_those_of_the_fires_one_by_one(world: World, config: Any) -> None:
    world.clock.us += 7 * 60_000_000 + 1
    world.add(trigger_config=config)
    _, answer = world.ask("GET", "/api/upcoming?hours=12&buckets=24")
    begin_us = sz.us_of(sz.datetime.fromisoformat(answer["begin"]))
    expected = [0] * 24
    fire_us = world.store.by_id["hourly"].next_fire_us
    trigger = sz.load_trigger(world.store.by_id["hourly"].trigger_state)
    while fire_us is not None and fire_us < begin_us + 12 * 3_600_000_000:
        expected[(fire_us - begin_us) // 1_800_000_000] += 1
        fire_us = sz.next_us(trigger, fire_us)
    assert counts_of(answer) == expected
    assert sum(expected) > 0


def test_counting_that_takes_too_long_is_cut_and_says_so(world: World) -> None:
    for number in range(9):
        world.add(f"s{number}", trigger_config={"type": "cron", "second": f"{number}"})
    taken = iter(range(100_000))
    world.clock.monotonic = lambda: next(taken) / 1_000  # type: ignore[method-assign]
    world.forecast.budget_s = 0.15
    _, answer = world.ask("GET", "/api/upcoming")
    assert 0 < answer["schedules"] < 9
    assert answer["schedules"] + answer["left_out"] == 9


def test_an_answer_serves_all_who_ask_until_it_is_old(world: World) -> None:
    world.add("first")
    before = world.ask("GET", "/api/upcoming")[1]
    world.add("second")
    assert world.ask("GET", "/api/upcoming")[1] == before
    assert world.ask("GET", "/api/upcoming?hours=2")[1]["schedules"] == 2
    world.clock.us += 3_000_000
    assert world.ask("GET", "/api/upcoming")[1]["schedules"] == 2


def test_a_stored_trigger_that_cannot_be_read_counts_nothing(world: World) -> None:
    world.add("broken")
    world.add("whole")
    broken = world.store.by_id["broken"]
    world.store.by_id["broken"] = replace(broken, trigger_state={"type": "?"})
    assert sum(counts_of(world.ask("GET", "/api/upcoming")[1])) == 23


def test_the_loop_has_its_turns_while_fires_are_counted(world: World) -> None:
    for number in range(600):
        world.add(f"s{number}", trigger_config={"type": "interval", "seconds": 30 + number})
    world.clock.monotonic = time.monotonic  # type: ignore[method-assign]

    async def longest_wait() -> float:
        counting = asyncio.ensure_future(world.forecast.ask(900_000_000, 96))
        waits = []
        while not counting.done():
            begun = time.process_time()
            await asyncio.sleep(0)
            waits.append(time.process_time() - begun)
        assert len(waits) > 1
        return max(waits)

    assert asyncio.run(longest_wait()) < 10 * sz.UPCOMING_TURN_S


def test_many_are_paused_at_once_by_what_they_match_or_by_id(world: World) -> None:
    for schedule_id in ("a-1", "a-2", "b-1"):
        world.add(schedule_id)
    status, answer = world.ask("PATCH", "/api/schedules?search=a-", {"paused": True})
    assert (status, answer["count"]) == (200, 2)
    assert [s.paused for s in world.store.by_id.values()] == [True, True, False]
    wanted = {"paused": False, "schedule_ids": ["a-2", "b-1", "gone"]}
    assert world.ask("PATCH", "/api/schedules?paused=true", wanted)[1]["count"] == 1
    assert [s.paused for s in world.store.by_id.values()] == [True, False, False]
    too_many = {"paused": True, "schedule_ids": ["x"] * 1001}
    assert world.ask("PATCH", "/api/schedules", too_many)[1]["field"] == "schedule_ids"
    assert world.ask("PATCH", "/api/schedules", {})[1]["field"] == "paused"


def test_pause_and_resume_need_no_body(world: World) -> None:
    world.add()
    status, answer = world.ask("POST", "/api/schedules/hourly/pause")
    assert (status, answer["status"], answer["schedule"]["paused"]) == (200, "success", True)
    status, answer = world.ask("POST", "/api/schedules/hourly/resume")
    assert (status, answer["schedule"]["paused"]) == (200, False)


def test_a_deleted_schedule_takes_its_queued_runs_along(world: World) -> None:
    world.add()
    answer = {"status": "success", "schedule_id": "hourly"}
    assert world.ask("DELETE", "/api/schedules/hourly") == (200, answer)
    assert world.dispatcher.cancelled == ["hourly"]
    assert world.ask("DELETE", "/api/schedules/hourly")[0] == 404


def test_a_declared_schedule_can_be_paused_but_is_changed_in_its_file(world: World) -> None:
    world.add()
    world.store.by_id["hourly"] = replace(world.store.by_id["hourly"], origin="config")
    status, answer = world.ask("PATCH", "/api/schedules/hourly", {"name": "new"})
    assert (status, answer["code"]) == (409, "conflict")
    assert "configuration file" in answer["error"]
    assert world.ask("DELETE", "/api/schedules/hourly")[0] == 409
    assert world.ask("PATCH", "/api/schedules/hourly", {"paused": True})[0] == 200
    assert world.ask("POST", "/api/schedules/hourly/resume")[0] == 200


def put(
    world: World, body: dict[str, Any], schedule_id: str = "hourly", **headers: str
) -> tuple[int, dict[str, Any]]:
    data = json.dumps({**CALL, "trigger_config": HOURLY, **body}).encode()
    path = f"/api/schedules/{schedule_id}"
    answer = world.send("PUT", path, data, content_type="application/json", **headers)
    return answer.status, json.loads(answer.body)


def etag(world: World) -> str:
    return dict(world.send("GET", "/api/schedules/hourly").headers)["ETag"]


def test_a_put_makes_a_schedule_then_leaves_it_as_it_is(world: World) -> None:
    body = {"job_params": {"a": 1, "b": [True]}, "retry": {"max_attempts": 1}, "timeout": 5}
    status, made = put(world, body)
    assert (status, made["changed"], made["warnings"]) == (201, True, [])
    stored = world.store.by_id["hourly"]
    world.clock.us += 1_234_567
    again = {"job_params": {"b": [True], "a": 1}, "retry": {"max_attempts": 1}, "timeout": 5.0}
    status, kept = put(world, {**again, "schedule_id": "hourly"})
    assert (status, kept["changed"], kept["schedule"]) == (200, False, made["schedule"])
    assert world.store.by_id["hourly"] is stored


def test_a_put_sets_everything_and_keeps_the_plan_of_an_equal_trigger(world: World) -> None:
    put(world, {"name": "old", "overlap": "queue", "paused": True})
    before = world.store.by_id["hourly"]
    world.clock.us += 90 * 60 * 1_000_000
    status, answer = put(world, {"job_params": {"a": 1}})
    now = world.store.by_id["hourly"]
    assert (status, answer["changed"], now.generation) == (200, True, before.generation + 1)
    assert (now.name, now.overlap, now.paused) == (None, sz.Overlap.SKIP, False)
    assert now.created_us == before.created_us
    assert now.trigger_state == before.trigger_state
    # The pause has ended: the grid goes on, and nothing is caught up.
    assert now.next_fire_us == NOW_US + 2 * 3600 * 1_000_000
    put(world, {"trigger_config": {"type": "interval", "hours": 2}})
    assert world.store.by_id["hourly"].next_fire_us == world.clock.us + 7200 * 1_000_000


def test_a_put_tells_true_from_one(world: World) -> None:
    put(world, {"job_params": {"a": 1}})
    assert put(world, {"job_params": {"a": True}})[1]["changed"] is True


def test_a_date_longer_past_than_its_own_grace_is_refused(world: World) -> None:
    once = {"type": "date", "run_date": "2026-11-23T11:59:00Z"}  # a minute ago
    body = {**CALL, "trigger_config": once, "misfire_grace_time": 59}
    status, answer = world.ask("POST", "/api/schedule", body)
    assert (status, answer["code"]) == (400, "invalid_trigger")
    assert "59 s" in answer["error"]
    body["misfire_grace_time"] = 61
    assert world.ask("POST", "/api/schedule", body)[0] == 201


def test_a_put_can_be_repeated_when_its_date_has_passed(world: World) -> None:
    once = {"trigger_config": {"type": "date", "run_date": "2026-11-24T00:00:00"}}
    assert put(world, once)[0] == 201
    world.clock.us += 40 * 86_400 * 1_000_000
    assert put(world, once)[1]["changed"] is False
    status, made = put(world, once, "other")
    assert (status, made["schedule"]["next_fire_time"]) == (201, None)


def test_what_is_paused_beyond_its_date_can_still_be_redefined(world: World) -> None:
    once = {
        "trigger_config": {"type": "date", "run_date": "2026-11-24T00:00:00"},
        "misfire_grace_time": 60, "paused": True,
    }  # fmt: skip
    assert put(world, once)[0] == 201
    world.clock.us += 40 * 86_400 * 1_000_000
    status, answer = put(world, {**once, "name": "late"})
    assert (status, answer["schedule"]["name"]) == (200, "late")


def test_a_put_may_name_what_comes_later_and_says_so(world: World) -> None:
    status, answer = put(world, {"handler_id": "ding-dung"})
    assert status == 201
    assert answer["warnings"] == [
        "there is no handler 'ding-dung'; did you mean 'ding-dong'?",
    ]
    assert "no method" in put(world, {"method_name": "rung"})[1]["warnings"][0]


def test_a_put_of_another_id_or_to_a_wrong_one_is_refused(world: World) -> None:
    status, answer = put(world, {"schedule_id": "daily"})
    assert (status, answer["field"]) == (400, "schedule_id")
    assert put(world, {}, "has%20space")[0] == 400
    assert put(world, {"trigger_config": {"type": "interval"}})[0] == 400
    assert world.store.by_id == {}


def test_a_put_does_not_take_over_a_declared_schedule(world: World) -> None:
    world.add()
    world.store.by_id["hourly"] = replace(world.store.by_id["hourly"], origin="config")
    assert put(world, {"name": "mine"})[0] == 409
    assert world.store.by_id["hourly"].name is None


def test_a_put_that_others_overtake_is_tried_again(world: World) -> None:
    world.add()
    world.store.interfering = 2
    assert put(world, {"name": "new"})[0] == 200
    assert world.store.by_id["hourly"].name == "new"
    world.store.interfering = 99
    assert put(world, {"name": "newer"})[0] == 409


def test_preconditions_guard_a_put_and_a_patch(world: World) -> None:
    assert put(world, {}, if_match="*")[0] == 412
    assert put(world, {}, if_none_match="*")[0] == 201
    assert put(world, {}, if_none_match="*")[0] == 412
    seen = etag(world)
    assert put(world, {"name": "a"}, if_match=f'"x", {seen}')[0] == 200
    status, answer = put(world, {"name": "b"}, if_match=seen)
    assert (status, answer["code"]) == (412, "precondition_failed")
    patch = partial(world.send, "PATCH", "/api/schedules/hourly", b'{"name": "c"}')
    assert patch(content_type="application/json", if_match=seen).status == 412
    assert patch(content_type="application/json", if_match=etag(world)).status == 200
    assert world.store.by_id["hourly"].name == "c"


def test_a_delete_heeds_what_others_change_meanwhile(world: World) -> None:
    world.add()
    seen = etag(world)
    world.store.interfering = 1
    assert world.send("DELETE", "/api/schedules/hourly", if_match=seen).status == 412
    assert world.send("DELETE", "/api/schedules/hourly", if_match=seen).status == 412
    world.store.interfering = 1
    assert world.send("DELETE", "/api/schedules/hourly").status == 200
    assert world.store.by_id == {}


def test_a_definition_makes_an_equal_schedule(world: World) -> None:
    rich = {
        "job_params": {"a": None}, "name": "n", "timeout": 5, "retry": {"factor": 3},
        "coalesce": "all", "overlap": "allow", "misfire_grace_time": 0, "max_jitter": 1,
        "paused": True,
    }  # fmt: skip
    put(world, rich)
    known = world.store.by_id["hourly"]
    body = sz.render_definition(known)
    assert set(body) == {*rich, "handler_id", "method_name", "trigger_config"}
    assert put(world, json.loads(json.dumps(body)))[1]["changed"] is False


def test_a_schedule_whose_parameters_are_lost_is_neither_run_nor_mended_in_parts(
    world: World,
) -> None:
    world.add()
    left = {"trigger_config": {}, "job_params": {}, "quarantined": "its row is damaged"}
    world.store.by_id["hourly"] = replace(world.store.by_id["hourly"], **left)
    trigger = {"type": "interval", "hours": 2}
    for method, path, body in (
        ("POST", "/api/schedules/hourly/run", None),
        ("PATCH", "/api/schedules/hourly", {"name": "new"}),
        ("PATCH", "/api/schedules/hourly", {"trigger_config": trigger}),
    ):
        status, answer = world.ask(method, path, body)
        assert status == 409
        assert answer["error"].startswith("its row is damaged; replace the schedule as a whole")
    assert world.store.runs == {}


@pytest.mark.parametrize("what", ["", "/pause", "/resume", "/run"])
def test_an_unknown_schedule_is_404(world: World, what: str) -> None:
    method = "POST" if what else "GET"
    status, answer = world.ask(method, "/api/schedules/nope" + what)
    assert (status, answer["error"]) == (404, "there is no schedule 'nope'")


def test_a_schedule_can_be_run_now_with_its_own_settings(world: World) -> None:
    world.add(job_params={"n": 3}, timeout=7, retry={"max_attempts": 1})
    status, answer = world.ask("POST", "/api/schedules/hourly/run")
    assert (status, answer["status"]) == (202, "accepted")
    assert world.store.runs[answer["execution_id"]].schedule_id == "hourly"
    (call,) = world.dispatcher.submitted
    assert call[:4] == ("ding-dong", "chime", {"n": 3}, 7.0)
    assert call[4].max_attempts == 1
    status, answer = world.ask("POST", "/api/schedules/hourly/run", {"wait": True})
    assert (status, answer["result"]) == (200, "ding dong")


def test_a_declared_schedule_is_checked_like_one_from_a_client() -> None:
    config = sz.Config()
    body = {**CALL, "trigger_config": {"type": "cron", "minute": "0"}}
    schedule = sz.parse_declared_schedule("chimes", body, config, NOW_US)
    assert (schedule.schedule_id, schedule.next_fire_us) == ("chimes", NOW_US + 3_600_000_000)
    with pytest.raises(sz.InvalidField, match="overlap must be one of"):
        sz.parse_declared_schedule("chimes", {**body, "overlap": "maybe"}, config, NOW_US)
    with pytest.raises(sz.InvalidField, match="schedule_id must be"):
        sz.parse_declared_schedule("has space", body, config, NOW_US)


# Fields

BAD_FIELDS = {
    "an unknown field": ({"overlop": "skip"}, "overlop", "did you mean 'overlap'?"),
    "a number as id": ({"schedule_id": 5}, "schedule_id", "not 5"),
    "an empty id": ({"schedule_id": ""}, "schedule_id", 'not ""'),
    "an id with a slash": ({"schedule_id": "a/b"}, "schedule_id", "letters"),
    "dots as id": ({"schedule_id": ".."}, "schedule_id", "begin"),
    "a long id": ({"schedule_id": "a" * 129}, "schedule_id", "1 to 128"),
    "an id with a line end": ({"schedule_id": "a\n"}, "schedule_id", "letters"),
    "a null handler": ({"handler_id": None}, "handler_id", "not null"),
    "a list of parameters": ({"job_params": [1]}, "job_params", "an object"),
    "a null trigger": ({"trigger_config": None}, "trigger_config", "an object"),
    "no trigger": ({"trigger_config": {}}, "trigger_config.type", "type"),
    "an odd trigger": ({"trigger_config": {"type": "moon"}}, "trigger_config.type", "moon"),
    "a zero interval": (
        {"trigger_config": {"type": "interval", "seconds": 0}},
        "trigger_config",
        "at least 1 second",
    ),
    "an escape in the name": ({"name": "a\x1bb"}, "name", "printable"),
    "a long name": ({"name": "a" * 201}, "name", "1 to 200"),
    "a blank name": ({"name": "  "}, "name", "printable"),
    "a timeout of zero": ({"timeout": 0}, "timeout", "from 0.1 to 2592000"),
    "a timeout as text": ({"timeout": "5"}, "timeout", 'not "5"'),
    "a timeout of true": ({"timeout": True}, "timeout", "not true"),
    "a timeout of a year": ({"timeout": 31_536_000}, "timeout", "2592000"),
    "retries as a number": ({"retry": 3}, "retry", "an object"),
    "no attempt": ({"retry": {"max_attempts": 0}}, "retry.max_attempts", "from 1"),
    "half an attempt": ({"retry": {"max_attempts": 1.5}}, "retry.max_attempts", "whole"),
    "too much jitter": ({"retry": {"jitter": 1.1}}, "retry.jitter", "from 0 to 1"),
    "an unknown delay": ({"retry": {"delay": 1}}, "retry.delay", "did you mean"),
    "an odd coalesce": ({"coalesce": "sometimes"}, "coalesce", "latest, none, all"),
    "a null overlap": ({"overlap": None}, "overlap", "skip, queue, allow, replace"),
    "a list as overlap": ({"overlap": ["skip"]}, "overlap", "one of"),
    "negative grace": ({"misfire_grace_time": -1}, "misfire_grace_time", "from 0"),
    "endless grace": ({"misfire_grace_time": 1e18}, "misfire_grace_time", "to 316224000"),
    "days of jitter": ({"max_jitter": 86_401}, "max_jitter", "to 86400"),
    "paused as text": ({"paused": "true"}, "paused", "true or false"),
}


@pytest.mark.parametrize(("fields", "path", "sentence"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_wrong_field_is_named_with_what_is_allowed(
    world: World, fields: dict[str, Any], path: str, sentence: str
) -> None:
    body = {**CALL, "trigger_config": HOURLY, **fields}
    status, answer = world.ask("POST", "/api/schedule", body)
    assert (status, answer["status"]) == (400, "error")
    assert answer["field"].startswith(path)
    assert path.rpartition(".")[2] in answer["error"] or path == "trigger_config"
    assert sentence in answer["error"]
    assert len(answer["error"]) < 400
    assert not world.store.by_id


@pytest.mark.parametrize("missing", ["handler_id", "method_name", "trigger_config"])
def test_a_missing_field_is_named(world: World, missing: str) -> None:
    body = {**CALL, "trigger_config": HOURLY}
    del body[missing]
    status, answer = world.ask("POST", "/api/schedule", body)
    assert (status, answer["field"]) == (400, missing)
    assert missing in answer["error"]


@pytest.mark.parametrize(
    ("target", "field"),
    [
        ("/api/schedules?limit=0", "limit"),
        ("/api/schedules?limit=1001", "limit"),
        ("/api/schedules?limit=+5", "limit"),
        ("/api/schedules?limit=\u0661", "limit"),
        ("/api/schedules?limit=", "limit"),
        ("/api/schedules?paused=yes", "paused"),
        ("/api/schedules?sort=colour", "sort"),
        ("/api/schedules?offset=-1", "offset"),
        ("/api/schedules?lim=5", "lim"),
        ("/api/executions?status=bad", "status"),
        ("/api/executions?status=error,", "status"),
        ("/api/executions?since=yesterday", "since"),
        ("/api/executions?since=0605-02-20T19:37:41Z", "since"),
        ("/api/executions?since=99999999999", "since"),
        ("/api/executions?cursor=x", "cursor"),
        ("/api/executions/stats?since=NaN", "since"),
        ("/api/health?verbose=1", "verbose"),
    ],
)
def test_a_wrong_query_field_is_named(world: World, target: str, field: str) -> None:
    status, answer = world.ask("GET", target)
    assert (status, answer["field"]) == (400, field)
    assert field in answer["error"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{}", {}, 415, "unsupported_media_type"),
        (b"{}", {"content_type": "text/plain"}, 415, "unsupported_media_type"),
        (b"a=1", {"content_type": "application/x-www-form-urlencoded"}, 415, None),
        (b"{}", {"content_type": "application/json; charset=utf-16"}, 415, None),
        (b"", {"content_type": "application/x-www-form-urlencoded"}, 415, None),
        (b"", {}, 400, "bad_json"),
        (b"{", {"content_type": "application/json"}, 400, "bad_json"),
        (b"[]", {"content_type": "application/json"}, 400, "bad_json"),
        (b"null", {"content_type": "application/json"}, 400, "bad_json"),
        (b'{"a": NaN}', {"content_type": "application/json"}, 400, "bad_json"),
        (b'{"a": 1, "a": 1}', {"content_type": "application/json"}, 400, "bad_json"),
        (b"{}", {"content_type": "Application/JSON; Charset=UTF-8"}, 400, "invalid_field"),
    ],
)
def test_a_body_must_be_a_json_object_and_say_so(
    world: World, body: bytes, headers: dict[str, str], status: int, code: str | None
) -> None:
    answer = world.send("POST", "/api/schedule", body, **headers)
    assert answer.status == status
    assert code in (None, json.loads(answer.body)["code"])


def test_a_form_cannot_pause_a_schedule(world: World) -> None:
    world.add()
    form = "application/x-www-form-urlencoded"
    assert world.send("POST", "/api/schedules/hourly/pause", content_type=form).status == 415
    assert not world.store.by_id["hourly"].paused


# Runs


def test_run_now_waits_for_the_result(world: World) -> None:
    status, answer = world.ask("POST", "/api/run_now", {**CALL, "job_params": {"n": 2}})
    assert (status, answer["status"], answer["result"]) == (200, "success", "ding dong")
    assert answer["execution_id"] in world.store.runs
    assert world.dispatcher.submitted == [("ding-dong", "chime", {"n": 2}, None, None)]


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        (sz.Status.ERROR, 502, "job_failed"),
        (sz.Status.TIMEOUT, 504, "job_timeout"),
        (sz.Status.CANCELLED, 502, "job_cancelled"),
        (sz.Status.MISSED, 504, "job_missed"),
        (sz.Status.SKIPPED, 409, "job_skipped"),
        (sz.Status.LOST, 502, "job_lost"),
    ],
)
def test_a_run_that_ends_badly_says_how(
    world: World, ending: sz.Status, status: int, code: str
) -> None:
    world.dispatcher.ending = {"status": ending, "error": "the bell is cracked"}
    answer = world.ask("POST", "/api/run_now", CALL)
    assert (answer[0], answer[1]["code"]) == (status, code)
    assert answer[1]["status"] == "error"
    assert answer[1]["error"] == "the bell is cracked"
    assert answer[1]["execution_id"] in world.store.runs


def test_run_now_can_return_at_once(world: World) -> None:
    status, answer = world.ask("POST", "/api/run_now", {**CALL, "wait": False})
    assert (status, answer["status"]) == (202, "accepted")
    assert world.store.runs[answer["execution_id"]].status is sz.Status.QUEUED


def test_run_now_takes_its_own_timeout_and_retries(world: World) -> None:
    body = {**CALL, "timeout": 2, "retry": {"max_attempts": 1}}
    assert world.ask("POST", "/api/run_now", body)[0] == 200
    (call,) = world.dispatcher.submitted
    assert call[3:] == (2.0, replace(world.config.retry, max_attempts=1))


# Idempotency-Key


def send_with_key(world: World, path: str, body: dict[str, Any], key: str) -> Any:
    data = json.dumps({**CALL, **body}).encode()
    return world.send("POST", path, data, content_type="application/json", idempotency_key=key)


def test_a_repeated_request_is_answered_as_the_first_and_makes_nothing(world: World) -> None:
    body = {"trigger_config": HOURLY, "job_params": {"a": 1, "b": 2}}
    first = send_with_key(world, "/api/schedule", body, "k1")
    world.clock.us += 5_000_000
    reordered = {"job_params": {"b": 2, "a": 1}, "trigger_config": HOURLY}
    again = send_with_key(world, "/api/schedule", reordered, '"k1"')
    assert (first.status, again.status, again.body) == (201, 201, first.body)
    assert dict(again.headers)["Location"] == dict(first.headers)["Location"]
    assert dict(again.headers)["Idempotent-Replayed"] == "true"
    assert len(world.store.by_id) == 1
    assert send_with_key(world, "/api/schedule", body, "k2").status == 201
    assert len(world.store.by_id) == 2


def test_a_repeated_run_now_gives_the_same_execution(world: World) -> None:
    accepted = send_with_key(world, "/api/run_now", {"wait": False}, "k")
    again = send_with_key(world, "/api/run_now", {"wait": False}, "k")
    assert (accepted.status, again.status, again.body) == (202, 202, accepted.body)
    waited = send_with_key(world, "/api/run_now", {}, "w")
    again = send_with_key(world, "/api/run_now", {}, "w")
    assert (waited.status, again.body) == (200, waited.body)
    assert len(world.store.runs) == 2


def test_a_key_belongs_to_one_body_one_route_and_one_principal(world: World) -> None:
    body = {"trigger_config": HOURLY}
    assert send_with_key(world, "/api/schedule", body, "k").status == 201
    other = send_with_key(world, "/api/schedule", {**body, "name": "other"}, "k")
    assert (other.status, json.loads(other.body)["code"]) == (422, "idempotency_key_reused")
    assert len(world.store.by_id) == 1
    assert send_with_key(world, "/api/run_now", {}, "k").status == 200
    scopes = {scope for scope, _ in world.store.receipts}
    assert scopes == {"/api/schedule loopback", "/api/run_now loopback"}


def test_a_request_that_failed_can_be_repeated_with_its_key(world: World) -> None:
    body = {"trigger_config": HOURLY, "schedule_id": "hourly"}
    world.store.failure = sz.StoreUnavailable("the disk is gone")
    assert send_with_key(world, "/api/schedule", body, "k").status == 503
    world.store.failure = None
    assert send_with_key(world, "/api/schedule", body, "k").status == 201
    assert send_with_key(world, "/api/schedule", body, "k").status == 201
    assert send_with_key(world, "/api/schedule", body, "k2").status == 409


@pytest.mark.parametrize("key", ["", "x" * 256, "sch\xf6n", "a\tb"])
def test_a_key_of_wrong_form_is_refused(world: World, key: str) -> None:
    answer = send_with_key(world, "/api/run_now", {}, key)
    assert (answer.status, json.loads(answer.body)["field"]) == (400, "Idempotency-Key")
    assert world.store.runs == {}


def test_a_request_without_a_key_costs_no_lookup(world: World) -> None:
    world.add()
    world.ask("POST", "/api/run_now", CALL)
    assert (world.store.looked_up, world.store.receipts) == (0, {})


def test_parameters_that_would_not_fit_into_a_call_are_refused(world: World) -> None:
    body = {**CALL, "job_params": {"text": "x" * sz.MAX_PARAMS_BYTES}}
    status, answer = world.ask("POST", "/api/run_now", body)
    assert (status, answer["field"]) == (400, "job_params")


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (sz.StoreUnavailable("the disk is full"), 503, "store_unavailable"),
        (sz.Overloaded("10000 executions are queued already"), 503, "overloaded"),
    ],
)
def test_what_may_work_later_says_when_to_try_again(
    world: World, failure: sz.ScheduleZeroError, status: int, code: str
) -> None:
    world.dispatcher.failure = failure
    data = json.dumps(CALL).encode()
    answer = world.send("POST", "/api/run_now", data, content_type="application/json")
    assert (answer.status, json.loads(answer.body)["code"]) == (status, code)
    assert dict(answer.headers)["Retry-After"] == "2"
    assert json.loads(answer.body)["error"] == str(failure)


# Executions


def test_executions_are_paged_newest_first(world: World) -> None:
    for number in range(5):
        world.store.runs[sz.encode_id(number)] = an_execution(number)
    status, answer = world.ask("GET", "/api/executions?limit=2")
    assert (status, answer["count"]) == (200, 2)
    seen = [record["execution_id"] for record in answer["records"]]
    while answer["next_cursor"]:
        answer = world.ask("GET", f"/api/executions?limit=2&cursor={answer['next_cursor']}")[1]
        seen += [record["execution_id"] for record in answer["records"]]
    assert seen == [sz.encode_id(number) for number in (4, 3, 2, 1, 0)]


def test_executions_are_filtered(world: World) -> None:
    for number, status in enumerate(("success", "error", "lost", "queued")):
        execution = an_execution(number, "s" if number else None)
        world.store.runs[execution.execution_id] = execution._replace(status=sz.Status(status))

    def ids(query: str) -> list[int]:
        records = world.ask("GET", f"/api/executions?{query}")[1]["records"]
        return [sz.decode_id(record["execution_id"]) for record in records]

    assert ids("status=error") == [1]
    assert ids("status=error,lost&limit=5") == [2, 1]
    assert ids("schedule_id=s") == [3, 2, 1]
    assert ids("handler_id=nobody") == []
    assert len(ids("since=2026-11-23T12:00:00Z")) == 4
    assert ids("since=2026-11-23T13:00:00%2B00:00".replace("%2B", "+")) == []
    assert ids(f"since={NOW_US // 1_000_000 + 1}") == []


def test_a_record_has_the_fields_of_the_contract(world: World) -> None:
    execution = an_execution(1)._replace(
        completed_us=NOW_US + 1_500, duration_us=1_500, result=[1], attempt=2
    )
    world.store.runs[execution.execution_id] = execution
    (record,) = world.ask("GET", "/api/executions")[1]["records"]
    assert record["execution_id"] == record["job_id"] == sz.encode_id(1)
    assert (record["status"], record["result"], record["error"]) == ("success", [1], None)
    assert (record["duration_ms"], record["attempt_number"]) == (1.5, 2)
    assert record["scheduled_at"] == "2026-11-23T12:00:00.000001Z"
    assert record["started_at"] == "2026-11-23T12:00:00Z"
    assert record["completed_at"] == "2026-11-23T12:00:00.001500Z"


def test_one_execution_comes_with_attempts_log_and_progress(world: World) -> None:
    world.store.runs[sz.encode_id(1)] = an_execution(1)
    status, answer = world.ask("GET", f"/api/executions/{sz.encode_id(1)}")
    assert status == 200
    assert answer["attempts"][0]["error"] == "first try"
    assert answer["log"] == "stored\nlive\n"
    assert answer["progress"] == {"percent": 50.0, "message": "half way"}
    assert world.ask("GET", "/api/executions/nope")[0] == 404


@pytest.mark.parametrize(("status", "ended"), [("success", NOW_US + 2), ("running", None)])
def test_the_attempt_that_succeeded_or_runs_is_among_the_attempts(
    world: World, status: str, ended: int | None
) -> None:
    world.store.runs[sz.encode_id(1)] = an_execution(1)._replace(
        status=sz.Status(status), attempt=2, started_us=NOW_US, completed_us=ended, instance="w/1"
    )
    attempts = world.ask("GET", f"/api/executions/{sz.encode_id(1)}")[1]["attempts"]
    assert [(item["attempt_number"], item["outcome"]) for item in attempts] == [
        (1, "error"),
        (2, status),
    ]
    assert attempts[1]["instance"] == "w/1"
    assert (attempts[1]["ended_at"] is None) == (ended is None)


def test_an_execution_is_cancelled_once(world: World) -> None:
    execution_id = world.ask("POST", "/api/run_now", {**CALL, "wait": False})[1]["execution_id"]
    status, answer = world.ask("POST", f"/api/executions/{execution_id}/cancel")
    assert (status, answer["execution"]["status"]) == (200, "cancelled")
    status, answer = world.ask("POST", f"/api/executions/{execution_id}/cancel")
    assert (status, answer["code"]) == (409, "conflict")
    assert world.ask("POST", "/api/executions/nope/cancel")[0] == 404


def test_statistics_and_errors_are_answered(world: World) -> None:
    failed = an_execution(1)._replace(status=sz.Status.ERROR, error="cracked")
    world.store.runs[failed.execution_id] = failed
    status, answer = world.ask("GET", "/api/executions/stats")
    assert (status, answer["since"], answer["total"]) == (200, "2026-11-22T12:00:00Z", 1)
    status, answer = world.ask("GET", "/api/executions/errors?limit=5")
    assert [record["error"] for record in answer["records"]] == ["cracked"]


# The rest


def test_health_says_how_the_server_is(world: World) -> None:
    status, answer = world.ask("GET", "/api/health")
    assert (status, answer["status"], answer["checks"]) == (200, "ok", {"store": "ok"})
    assert (answer["version"], answer["uptime_seconds"]) == (sz.VERSION, 60.0)
    world.checks = {"clock": "waits"}, "degraded"
    assert world.ask("GET", "/api/health")[0] == 200
    world.checks = {"store": "the disk is full"}, "failed"
    status, answer = world.ask("GET", "/api/health")
    assert (status, answer["checks"]["store"]) == (503, "the disk is full")


def test_handlers_are_listed_with_their_methods_and_load(world: World) -> None:
    status, answer = world.ask("GET", "/api/handlers")
    first = answer["handlers"][0]
    assert (status, first["id"], first["status"]) == (200, "ding-dong", "Connected")
    assert (first["methods"], first["address"]) == (["chime", "ring"], "dial-in")
    assert (first["running"], first["capacity"]) == (1, 2)
    assert first["instances"][0]["heartbeat_age_seconds"] == 1.5
    assert first["method_details"][0]["parameters"] == [{"name": "n"}]


def test_the_configuration_is_shown(world: World) -> None:
    status, answer = world.ask("GET", "/api/config")
    assert (status, answer["timezone"], answer["http_port"]) == (200, "Europe/Berlin", 8888)


def test_a_trigger_can_be_tried_out(world: World) -> None:
    body = {"trigger_config": {"type": "cron", "hour": "2", "minute": "30"}, "count": 2}
    status, answer = world.ask("POST", "/api/triggers/preview", body)
    assert (status, answer["timezone"]) == (200, "Europe/Berlin")
    assert [fire["at"] for fire in answer["fire_times"]] == [
        "2026-11-24T01:30:00Z",
        "2026-11-25T01:30:00Z",
    ]
    assert answer["fire_times"][0]["local"].startswith("2026-11-24 02:30:00")
    status, answer = world.ask("POST", "/api/triggers/preview", {"trigger_config": {"type": "x"}})
    assert (status, answer["code"], answer["field"]) == (
        400, "invalid_trigger", "trigger_config.type"
    )  # fmt: skip


def test_a_schedule_is_foreseen_on_its_own_grid_of_times(world: World) -> None:
    """A grid that nobody chose begins when the schedule is made, also within `or`."""
    trigger = {"type": "or", "triggers": [{"type": "interval", "hours": 7}]}
    world.add("either", trigger_config=trigger)
    known = world.ask("GET", "/api/schedules/either")[1]
    world.clock.us += 3_600_000_000
    asked = {"trigger_config": known["trigger_config"], "count": 1}

    def first(**more: str) -> str:
        answer = world.ask("POST", "/api/triggers/preview", {**asked, **more})[1]
        at: str = answer["fire_times"][0]["at"]
        return at

    assert first(schedule_id="either") == known["next_fire_time"] != first()
    asked["trigger_config"] = {"type": "interval", "hours": 7}  # as a form that is being changed
    assert first(schedule_id="either") == first() == first(schedule_id="nobody")


def test_the_event_stream_starts_where_the_client_left(world: World) -> None:
    stream = world.send("GET", "/api/events", last_event_id="abc-7")
    written: list[bytes] = []
    stop = stream.start(lambda chunk: not written.append(chunk))
    assert written == [b"retry: 1000\n\n", b"last was abc-7"]
    stop()
    world.events.subscribers = sz.MAX_SUBSCRIBERS
    assert world.send("GET", "/api/events").status == 503


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/api/health", "GET, HEAD"),
        ("GET", "/api/run_now", "POST"),
        ("HEAD", "/api/run_now", "POST"),
        ("POST", "/api/schedules/x", "DELETE, GET, HEAD, PATCH, PUT"),
        ("GET", "/api/schedules/x/pause", "POST"),
        ("OPTIONS", "/api/schedule", "POST"),
        ("DELETE", "/", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(
    world: World, method: str, path: str, allow: str
) -> None:
    answer = world.send(method, path)
    assert (answer.status, dict(answer.headers)["Allow"]) == (405, allow)


@pytest.mark.parametrize(
    "path", ["/api/", "/api/nope", "/api/health/", "/api/schedules/a/b", "/api//health", "/nope"]
)
def test_what_is_not_there_is_404_in_json(world: World, path: str) -> None:
    status, answer = world.ask("GET", path)
    assert (status, answer["code"]) == (404, "not_found")


def test_head_is_routed_as_get(world: World) -> None:
    assert world.send("HEAD", "/api/health").status == 200


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "hours", "expression", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
POSTS = [route for route in sz.ROUTES if route.body is not None]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_body_whatsoever_is_answered_with_a_fault(data: st.DataObject) -> None:
    world = World()
    world.add()
    route = data.draw(st.sampled_from(POSTS))
    names = [field.name for field in route.body.fields]
    good = {**CALL, "trigger_config": HOURLY}
    body = {name: good[name] for name in names if name in good and data.draw(st.booleans())}
    body |= data.draw(st.dictionaries(st.sampled_from([*names, "x"]), JUNK, max_size=3))
    path = route.path.replace("{schedule_id}", "hourly")
    status, answer = world.ask(route.method, path, body)
    assert status < 500 or answer["code"].startswith("job_")
    assert status < 400 or (answer["status"] == "error" and answer["error"])
