"""Disks that fill, freeze, fail and come back, under a server that goes on."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from appliance import Answer, Appliance, wait_for

MOUNT_MIB = 16
BIG = "x" * 20_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, mounted for the test."""
    place = tmp_path / "disk"
    place.mkdir()
    options = f"size={MOUNT_MIB}m,mode=700"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=False)


@pytest.fixture
def served(disk: Path, appliance: Callable[..., Appliance]) -> Appliance:
    """A server whose data is on that disk, with a handler."""
    one = appliance(data_dir=str(disk), backup={"every_hours": 0}).run()
    one.handler("Example", "ex", "--concurrency", "16")
    return one


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


def call(one: Appliance, method: str = "echo", *, wait: bool = False, **params: Any) -> Answer:
    body = {"handler_id": "ex", "method_name": method, "job_params": params, "wait": wait}
    return one.post("/api/run_now", body)


def accept(one: Appliance, method: str = "echo", **params: Any) -> str:
    answer = call(one, method, **params)
    assert answer.status == 202, answer.body
    return str(answer.json()["execution_id"])


def refused(one: Appliance, status: int) -> dict[str, Any] | None:
    """What a call is answered, once that is `status`; until then the calls are accepted."""
    answer = call(one, text=BIG)
    assert answer.status in (202, status), answer.body
    return answer.json() if answer.status == status else None


def store_check(one: Appliance) -> str:
    return str(one.get("/api/health").json()["checks"]["store"])


def wait_ok(one: Appliance, timeout_s: float = 30.0) -> None:
    wait_for(lambda: one.get("/api/health").json()["status"] == "ok", "health", timeout_s)


def test_on_a_full_disk_new_work_is_a_507_what_runs_ends_and_it_heals_by_itself(
    served: Appliance, disk: Path
) -> None:
    # Each end is committed on its own, with a result that does not fit in what is left over.
    running = [accept(served, "echo", text=BIG, n=n) for n in range(10)]
    for execution_id in running:
        served.wait_execution(execution_id)
    running = [accept(served, "sleep", seconds=1.5 + n / 10) for n in range(10)]
    filler = fill(disk)
    answer = wait_for(lambda: fill(disk) and refused(served, 507), "a 507")
    assert answer["code"] == "disk_full"
    assert "disk is full" in answer["error"]

    health = served.get("/api/health")
    assert (health.status, health.json()["status"]) == (503, "failed")
    assert "disk is full" in health.json()["checks"]["store"]
    body = {
        "handler_id": "ex",
        "method_name": "echo",
        "trigger_config": {"type": "interval", "hours": 1},
    }
    assert served.post("/api/schedule", body).status == 507
    assert served.get("/api/schedules").status == 200
    for execution_id in running:
        assert served.wait_execution(execution_id)["status"] == "success"
    assert served.get("/api/executions").json()["count"] > 10

    filler.unlink()
    wait_ok(served)
    assert call(served, wait=True, n=1).status == 200
    assert served.post("/api/schedule", body).status == 201
    assert (disk / "default" / "ballast").stat().st_size == 2 << 20
    statuses = {e["status"] for e in served.get("/api/executions?limit=1000").json()["records"]}
    wait_for(
        lambda: not served.get("/api/executions?status=queued,running").json()["count"],
        "all that was accepted to end",
    )
    assert statuses <= {"success", "queued", "running"}


def test_what_ends_on_a_full_disk_has_the_room_of_the_ballast(
    served: Appliance, disk: Path
) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(call, served, "sleep", wait=True, seconds=2.0) for _ in range(16)]
        wait_for(lambda: served.get("/api/executions?status=running").json()["count"] == 16, "runs")
        # Leave nothing in the log for the ends to be written to.
        with contextlib.closing(sqlite3.connect(disk / "default" / "schedulezero.db")) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        filler = fill(disk)
        results = [answer.result() for answer in answers]
    assert [answer.status for answer in results] == [200] * 16
    assert not (disk / "default" / "ballast").exists()
    assert "disk is full" in store_check(served)
    filler.unlink()
    wait_ok(served)
    assert (disk / "default" / "ballast").exists()


def test_results_that_find_no_room_at_all_are_kept_and_stored_later(
    served: Appliance, disk: Path
) -> None:
    running = [accept(served, "sleep", seconds=1.0) for _ in range(4)]
    with contextlib.closing(sqlite3.connect(disk / "default" / "schedulezero.db")) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (disk / "default" / "ballast").unlink()
    filler = fill(disk)
    wait_for(lambda: "disk is full" in store_check(served), "a full disk")
    assert {served.get(f"/api/executions/{i}").json()["status"] for i in running} == {"running"}
    filler.unlink()
    for execution_id in running:
        assert served.wait_execution(execution_id)["status"] == "success"
    wait_ok(served)


def test_it_starts_on_a_full_disk_and_goes_on_when_there_is_room(
    served: Appliance, disk: Path
) -> None:
    accepted = [accept(served, "sleep", seconds=30.0), accept(served, n=1)]
    served.wait_execution(accepted[1])
    served.kill()
    filler = fill(disk)
    served.write_config(
        schedules={
            "declared": {
                "handler_id": "ex",
                "method_name": "echo",
                "trigger_config": {"type": "interval", "hours": 1},
            }
        }
    )
    launch(served)
    wait_for(lambda: answers(served, "/api/health", 503), "an answer")
    assert served.get(f"/api/executions/{accepted[1]}").json()["status"] == "success"
    assert call(served).status == 507
    filler.unlink()
    wait_ok(served)
    wait_for(lambda: served.get("/api/schedules/declared").status == 200, "the declared schedule")
    served.wait_connected("ex")
    assert call(served, wait=True, n=2).status == 200


def test_commands_work_on_a_full_disk(disk: Path, appliance: Callable[..., Appliance]) -> None:
    one = appliance(data_dir=str(disk), backup={"every_hours": 0}).run("run")
    server = next(p for p in processes(one) if p["name"] == "server")
    filler = fill(disk)
    assert one.cli("reload").returncode == 0
    os.kill(server["pid"], signal.SIGKILL)
    wait_for(lambda: any(p["restarts"] and p["pid"] for p in processes(one)), "another server")
    filler.unlink()
    wait_ok(one)
    assert one.stop() == 0


def processes(one: Appliance) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = json.loads(one.cli("status", "--json").stdout)["processes"]
    return shown


def launch(one: Appliance) -> None:
    """Start a server that will not be healthy."""
    with (one.directory / "output.log").open("ab") as output:
        one.process = subprocess.Popen(
            [sys.executable, "-m", "schedulezero", "--config", str(one.config), "server"],
            cwd=one.directory, env=one.environ, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip


def answers(one: Appliance, path: str, status: int) -> bool:
    with contextlib.suppress(OSError):
        return one.get(path).status == status
    return False


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[FailingDisk]:
    """An ext4 file system in a file, that turns read-only at an error."""
    disk = FailingDisk(tmp_path)
    try:
        disk.mount()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no ext4 can be mounted here: {error}")
    yield disk
    disk.umount()


class FailingDisk:
    def __init__(self, directory: Path) -> None:
        self.image, self.place = directory / "image", directory / "disk"
        self.place.mkdir()
        with self.image.open("wb") as file:
            file.truncate(24 << 20)
        run("mkfs.ext4", "-q", "-F", str(self.image))

    def mount(self) -> None:
        run("mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.place))

    def umount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.place)], check=False)

    def fail(self) -> None:
        """Have the kernel find an error in the file system."""
        listed = run("losetup", "-j", str(self.image))
        device = Path(listed.partition(":")[0]).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("1")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def test_a_file_system_that_turns_read_only_refuses_changes_and_loses_nothing(
    failing_disk: FailingDisk, appliance: Callable[..., Appliance]
) -> None:
    one = appliance(data_dir=str(failing_disk.place)).run()
    one.handler("Example", "ex")
    accepted = [accept(one, n=n) for n in range(3)]
    for execution_id in accepted:
        one.wait_execution(execution_id)
    accepted.append(accept(one, "sleep", seconds=0.5))
    failing_disk.fail()
    answer = wait_for(lambda: refused(one, 503), "a 503")
    assert answer["error"] == "the file system of the database is read-only"
    assert store_check(one) == answer["error"]
    for execution_id in accepted:
        assert one.get(f"/api/executions/{execution_id}").status == 200
    one.kill()
    failing_disk.umount()
    failing_disk.mount()
    one.run()
    for execution_id in accepted:
        assert one.wait_execution(execution_id)["status"] == "success"
    assert one.get("/api/health").json()["checks"]["recovery"] == "ok"


def test_after_an_error_of_the_disk_nothing_acknowledged_is_missing(
    appliance: Callable[..., Appliance],
) -> None:
    one = appliance().run()
    one.handler("Example", "ex")
    assert one.process is not None
    pid = one.process.pid
    log = one.directory / "data" / "default" / "schedulezero.db-wal"
    accepted = [accept(one, n=n) for n in range(5)]
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    # Beyond this size every write fails with EFBIG, which SQLite calls an I/O error.
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (log.stat().st_size, hard))
    try:
        answer = wait_for(lambda: refused(one, 503), "a 503")
        assert "the disk reports an error" in answer["error"]
        assert "the disk reports an error" in store_check(one)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    wait_ok(one)
    accepted += [accept(one, n=n) for n in range(5)]
    one.kill()
    one.run()
    for execution_id in accepted:
        assert one.wait_execution(execution_id)["status"] == "success"
    assert store_check(one) == "ok"


HOLDER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another program has the database locked, as a forgotten shell does."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(database)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdin is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        yield
    finally:
        holder.communicate()


def test_a_database_that_another_program_has_locked_refuses_changes_and_heals(
    appliance: Callable[..., Appliance],
) -> None:
    one = appliance().run()
    one.handler("Example", "ex")
    second = {"type": "interval", "seconds": 1}
    body = {"schedule_id": "s", "handler_id": "ex", "method_name": "echo", "trigger_config": second}
    assert one.post("/api/schedule", body).status == 201
    execution_id = accept(one, "sleep", seconds=1.0)
    with locked(one.directory / "data" / "default" / "schedulezero.db"):
        answer = call(one)
        assert answer.status == 503
        assert "another program has locked the database" in answer.json()["error"]
        assert answer.headers["retry-after"]
        assert one.get(f"/api/executions/{execution_id}").json()["status"] == "running"
        assert one.get("/api/health").status == 503
    wait_ok(one)
    assert one.wait_execution(execution_id)["status"] == "success"
    fired = one.get("/api/executions?schedule_id=s").json()["count"]
    wait_for(
        lambda: one.get("/api/executions?schedule_id=s").json()["count"] > fired, "further fires"
    )
    assert one.output.count("another program has locked the database") <= 3


def server_pid(one: Appliance) -> int:
    shown = json.loads(one.cli("status", "--json").stdout)
    return next(int(p["pid"] or 0) for p in shown["processes"] if p["name"] == "server")


def test_a_database_damaged_while_in_use_is_restored_by_a_new_start(
    appliance: Callable[..., Appliance],
) -> None:
    one = appliance(handlers={"ex": {"run": "handler.py:Example"}})
    assert one.cli("start").returncode == 0, one.output
    one.wait_connected("ex")
    kept = accept(one, n=1)
    one.wait_execution(kept)
    wait_for(lambda: one.get("/api/health").json()["last_backup"], "the first backup")
    backup = next((one.directory / "data/default/backups").iterdir())
    backup.unlink()
    assert one.cli("backup", str(backup)).returncode == 0
    before = server_pid(one)
    for n in range(600):  # more than the page caches hold
        accept(one, n=n, text=BIG[:2_000])
    database = one.directory / "data" / "default" / "schedulezero.db"
    os.kill(before, signal.SIGSTOP)
    try:
        with contextlib.closing(sqlite3.connect(database)) as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        with database.open("r+b") as file:
            file.seek(8 * 1024)
            file.write(os.urandom(database.stat().st_size - 8 * 1024))
    finally:
        os.kill(before, signal.SIGCONT)

    def restored() -> bool:
        with contextlib.suppress(OSError):
            call(one)
            one.get("/api/executions?limit=1000")
            return "was restored" in one.get("/api/health").json()["checks"]["recovery"]
        return False

    wait_for(restored, "the backup to be restored", 30.0)
    assert server_pid(one) != before
    assert one.get(f"/api/executions/{kept}").json()["status"] == "success"
    assert one.get("/api/health").json()["status"] == "degraded"
    assert one.post("/api/health/acknowledge").json()["status"] == "ok"
    one.wait_connected("ex")
    assert call(one, wait=True, n=2).status == 200


def test_a_database_deleted_under_the_server_is_saved_and_nothing_is_lost(
    appliance: Callable[..., Appliance],
) -> None:
    one = appliance(handlers={"ex": {"run": "handler.py:Example"}})
    assert one.cli("start").returncode == 0, one.output
    one.wait_connected("ex")
    accepted = [accept(one, n=n) for n in range(5)]
    before = server_pid(one)
    for path in (one.directory / "data" / "default").glob("schedulezero.db*"):
        path.unlink()
    for _ in range(5):
        with contextlib.suppress(OSError):
            answer = call(one)
            if answer.status == 202:
                accepted.append(answer.json()["execution_id"])
    wait_for(lambda: server_pid(one) not in (0, before), "a new server")
    wait_for(lambda: answers(one, "/api/health", 200), "an answer")
    assert "nothing of it is lost" in one.get("/api/health").json()["checks"]["recovery"]
    for execution_id in accepted:
        assert one.wait_execution(execution_id)["status"] == "success"
