"""The server looks after itself: its loop is restarted, what nothing helps ends it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schedulezero as sz
from schedulezero import Clock, Config, Server

pytestmark = pytest.mark.anyio


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    """A server in this process whose patience is short."""
    monkeypatch.setattr(sz, "RESTART_S", (0.01, 0.02))
    monkeypatch.setattr(sz, "TEND_EVERY_S", 0.02)
    monkeypatch.setattr(sz, "STALLED_S", 0.4)
    monkeypatch.setattr(sz, "NEXT_WAKE_S", (0.001, 0.05))
    config = Config(http_port=0, zmq_port=0, data_dir=str(tmp_path), log_dir=str(tmp_path))
    made = Server(config, Clock())
    await made.open()
    yield made
    await made.close()


async def until(condition: Callable[[], Any], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


class Misbehaving:
    """Stands in for `acquire_schedules`: does wrong so many times, then as it should."""

    def __init__(self, server: Server, do: Callable[[], Any], times: int) -> None:
        self.done = 0
        self._do, self._times = do, times
        self._right = server.store.acquire_schedules
        server.store.acquire_schedules = self  # type: ignore[method-assign, assignment]

    async def __call__(self, *arguments: Any) -> Any:
        if self.done < self._times:
            self.done += 1
            await self._do()
        return await self._right(*arguments)


async def raise_group() -> None:
    raise BaseExceptionGroup("all at once", [asyncio.CancelledError(), ValueError("no")])


async def raise_cancelled() -> None:
    raise asyncio.CancelledError


async def raise_error() -> None:
    raise LookupError("a fault of the program")


async def hang() -> None:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("do", [raise_error, raise_group, raise_cancelled, hang])
async def test_a_scheduling_loop_that_ends_or_hangs_is_started_again(
    server: Server, do: Callable[[], Any]
) -> None:
    wrong = Misbehaving(server, do, times=1)
    await until(lambda: wrong.done == 1)
    turned_s = server.store.last_turn_s
    await until(lambda: server.store.last_turn_s > turned_s + 0.1)
    assert server.failed is None
    assert server.health()[1] == "ok"


async def test_a_scheduling_loop_that_keeps_ending_ends_the_server(server: Server) -> None:
    told: list[str] = []
    server.on_failure = lambda: told.append("failed")
    Misbehaving(server, raise_error, times=1_000)
    await until(lambda: told)
    assert server.failed is not None and "5 times in a row" in server.failed


async def test_a_chore_that_fails_leaves_the_others_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(now_us: int) -> int:
        raise LookupError("a fault of the program")

    monkeypatch.setattr(sz, "FIRST_HOUSE_S", 0.01)
    monkeypatch.setattr(server.store, "prune", fail)
    task = asyncio.create_task(server._keep_house())
    await until(lambda: server.recovery.last_backup_us)
    task.cancel()


async def test_a_server_one_of_whose_tasks_is_cancelled_from_outside_ends(server: Server) -> None:
    server._tasks[-1].cancel()
    await until(lambda: server.failed)


HOURLY = {"handler_id": "h", "method_name": "m", "trigger_config": {"type": "cron", "minute": "0"}}


async def test_declared_schedules_follow_the_file_and_keep_what_others_did_to_them(
    server: Server,
) -> None:
    once = {**HOURLY, "trigger_config": {"type": "date", "run_date": "2001-01-01"}}
    await server.declare(replace(server.config, schedules={"hourly": HOURLY, "once": once}))
    hourly, past = server.store.schedule("hourly"), server.store.schedule("once")
    assert hourly is not None and past is not None
    assert (hourly.origin, past.next_fire_us) == ("config", None)
    paused = await server.store.set_paused("hourly", True)
    assert paused is not None

    commits = server.store.commits
    await server.declare(replace(server.config, schedules={"hourly": HOURLY, "once": once}))
    assert (server.store.commits, server.store.schedule("hourly")) == (commits, paused)

    await server.declare(replace(server.config, schedules={"hourly": {**HOURLY, "name": "new"}}))
    renamed = server.store.schedule("hourly")
    assert renamed is not None and server.store.schedule("once") is None
    assert (renamed.name, renamed.paused, renamed.origin) == ("new", True, "config")
    assert (renamed.next_fire_us, renamed.key) == (hourly.next_fire_us, hourly.key)

    resumed = {"hourly": {**HOURLY, "paused": False}}
    await server.declare(replace(server.config, schedules=resumed))
    assert (await server.store.set_paused("hourly", False)) == server.store.schedule("hourly")


async def test_a_declared_schedule_that_is_changed_at_that_moment_is_declared_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.declare(replace(server.config, schedules={"hourly": HOURLY}))
    replace_schedule = server.store.replace_schedule

    async def be_overtaken(schedule: sz.Schedule, generation: int) -> bool:
        monkeypatch.undo()
        await server.store.set_paused(schedule.schedule_id, True)
        return await replace_schedule(schedule, generation)

    monkeypatch.setattr(server.store, "replace_schedule", be_overtaken)
    await server.declare(replace(server.config, schedules={"hourly": {**HOURLY, "name": "new"}}))
    made = server.store.schedule("hourly")
    assert made is not None and (made.name, made.paused) == ("new", True)


async def test_a_declared_schedule_does_not_take_over_one_that_the_api_made(
    server: Server,
) -> None:
    mine = sz.parse_declared_schedule("hourly", HOURLY, server.config, server.clock.now_us())
    await server.store.add_schedule_record(mine)
    other = {"hourly": {**HOURLY, "name": "theirs"}}
    await server.declare(replace(server.config, schedules=other))
    await server.declare(server.config)
    kept = server.store.schedule("hourly")
    assert kept is not None
    assert (kept.name, kept.origin) == (None, "api")


def write_hourly(path: Path) -> None:
    path.write_text(json.dumps({"schedules": {"hourly": HOURLY}}))


async def test_a_reload_that_the_disk_does_not_take_is_applied_when_it_does(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def refuse(schedule: sz.Schedule) -> None:
        monkeypatch.undo()
        raise sz.StoreUnavailable("the disk is full")

    write_hourly(tmp_path / "config.yaml")
    server.config = replace(server.config, path=str(tmp_path / "config.yaml"))
    monkeypatch.setattr(server.store, "add_schedule_record", refuse)
    await server.reload()
    assert server.store.schedule("hourly") is None
    await until(lambda: server.store.schedule("hourly"))


async def test_a_reload_that_comes_while_the_server_opens_is_applied_afterwards(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.yaml"
    write_hourly(path)
    made = Server(Config(http_port=0, zmq_port=0, data_dir=str(tmp_path), path=str(path)), Clock())
    made.begin(made.reload())
    await made.open()
    try:
        await until(lambda: made.store.schedule("hourly"))
    finally:
        await made.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_thread_that_writes_no_more_ends_the_server(server: Server) -> None:
    def end(db: sqlite3.Cursor) -> None:
        raise SystemExit

    server.store.write(end)
    await until(lambda: server.failed is not None)
