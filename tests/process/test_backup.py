"""Backups: by the server itself, and by `backup` and `restore` while it runs."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from appliance import Appliance, wait_for

EX = {"ex": {"run": "handler.py:Example"}}
HOURLY = {"type": "interval", "hours": 1}


def add_schedule(one: Appliance, schedule_id: str) -> None:
    body = {"schedule_id": schedule_id, "handler_id": "ex", "method_name": "echo"}
    answer = one.post("/api/schedule", {**body, "trigger_config": HOURLY})
    assert answer.status == 201, answer.body


def schedule_ids(one: Appliance) -> list[str]:
    with contextlib.suppress(OSError):
        return [s["id"] for s in one.get("/api/schedules").json()["schedules"]]
    return []


def rows(path: Path, table: str) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (count,) = db.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(count)


def test_backup_and_restore_work_while_jobs_run(appliance: Callable[..., Appliance]) -> None:
    one = appliance(handlers=EX, backup={"every_hours": 0})
    assert one.cli("start").returncode == 0
    one.wait_connected("ex")
    add_schedule(one, "kept")
    body = {"handler_id": "ex", "method_name": "sleep", "job_params": {"seconds": 4}}
    running = one.post("/api/run_now", {**body, "wait": False}).json()["execution_id"]
    one.wait_execution(running, "running")

    done = one.cli("backup", "kept.db")
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(one.directory / "kept.db", "schedules") == 1
    add_schedule(one, "made-later")

    done = one.cli("restore", "kept.db")
    assert (done.returncode, done.stderr) == (0, "")
    assert "may run again" in done.stdout
    assert schedule_ids(one) == ["kept"]
    # The handler went on meanwhile; the execution of before the backup is still the same.
    assert one.wait_execution(running)["status"] == "success"
    assert one.get("/api/health").json()["status"] == "ok"
    replaced = list((one.directory / "data" / "default").glob("*.replaced"))
    assert [rows(path, "schedules") for path in replaced] == [2]


def test_backup_refuses_to_overwrite_and_restore_refuses_what_is_no_backup(
    appliance: Callable[..., Appliance],
) -> None:
    one = appliance()
    assert "there is no database" in one.cli("backup", "b.db").stderr
    one.run()
    assert one.cli("backup", "b.db").returncode == 0
    again = one.cli("backup", "b.db")
    assert (again.returncode, "already" in again.stderr) == (1, True)
    refused = one.cli("restore", "config.yaml")
    assert (refused.returncode, "cannot be restored" in refused.stderr) == (1, True)
    assert one.cli("restore", "nowhere.db").returncode == 1
    assert one.get("/api/health").status == 200


def test_a_restore_of_a_stopped_server_is_taken_by_its_next_start(
    appliance: Callable[..., Appliance],
) -> None:
    one = appliance().run()
    one.handler("Example", "ex")
    add_schedule(one, "kept")
    assert one.cli("backup", "b.db").returncode == 0
    assert one.request("DELETE", "/api/schedules/kept").status == 200
    one.stop()
    assert "by the next start" in one.cli("restore", "b.db").stdout
    one.run()
    assert schedule_ids(one) == ["kept"]


def test_the_server_makes_a_backup_soon_after_its_first_start_and_health_tells_when(
    appliance: Callable[..., Appliance],
) -> None:
    one = appliance().run()
    assert wait_for(lambda: one.get("/api/health").json()["last_backup"], "a backup")
    (path,) = (one.directory / "data" / "default" / "backups").iterdir()
    assert rows(path, "executions") == 0
    one.stop()
    one.run()
    assert one.get("/api/health").json()["last_backup"]
    one.stop()
    assert [path] == list((one.directory / "data" / "default" / "backups").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=False)


def test_a_backup_that_finds_no_room_leaves_nothing_and_harms_nothing(
    small_disk: Path, appliance: Callable[..., Appliance]
) -> None:
    one = appliance(data_dir=str(small_disk))
    one.run()
    wait_for(lambda: one.get("/api/health").json()["last_backup"], "the first backup")
    one.stop()
    for path in (small_disk / "default" / "backups").iterdir():
        path.unlink()
    with contextlib.closing(sqlite3.connect(small_disk / "default" / "schedulezero.db")) as db:
        db.execute("PRAGMA journal_mode = DELETE")  # a write-ahead log would not fit beside it
        db.execute("INSERT INTO logs VALUES (1, ?)", ("x" * (6 << 20),))
        db.commit()
    one.run()
    wait_for(lambda: "no automatic backup was made" in one.output, "the failed backup")
    assert list((small_disk / "default" / "backups").iterdir()) == []
    assert one.get("/api/health").json()["checks"]["store"] == "ok"
    failed = one.cli("backup", str(small_disk / "mine.db"))
    assert (failed.returncode, "disk is full" in failed.stderr) == (1, True)
    assert not list(small_disk.glob("mine.db*"))
    assert one.cli("backup", "elsewhere.db").returncode == 0


def test_a_newer_database_is_not_started_and_not_touched(
    appliance: Callable[..., Appliance],
) -> None:
    one = appliance().run()
    one.stop()
    database = one.directory / "data" / "default" / "schedulezero.db"
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA user_version = 99")
    before = database.read_bytes()
    refused = one.cli("start")
    assert refused.returncode == 78
    assert "schema version 99" in refused.stderr
    assert one.cli("server").returncode == 78
    assert database.read_bytes() == before
    assert json.loads(one.cli("status", "--json").stdout)["running"] is False
