"""Power cuts, simulated by ext4: what was acknowledged is there afterwards, the database sound.

A shutdown of the file system stops all its I/O at once, and what only its cache held is gone.
Mounting it again recovers from its journal, as after a cut.

It has one fault as an instrument: a flush that is under way while the shutdown runs may report
success, and its data is gone all the same. So a call counts if its answer came before the shutdown
began, or if it was sent after that had ended; of those between nothing can be said.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import random
import sqlite3
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import schedulezero as sz
from appliance import Appliance, wait_for

EXT4_IOC_SHUTDOWN = 0x8004587D
WITHOUT_JOURNAL, WITH_JOURNAL, WITH_EVERYTHING = 2, 1, 0  # what is written before the end
ROUNDS = (WITHOUT_JOURNAL, WITHOUT_JOURNAL, WITH_JOURNAL, WITHOUT_JOURNAL, WITH_EVERYTHING)
CLIENTS = 4
DAILY = {"type": "interval", "days": 1}


class Span(NamedTuple):
    """From when to when, in seconds of the monotonic clock."""

    began_s: float
    ended_s: float

    def overlaps(self, other: Span) -> bool:
        return self.began_s <= other.ended_s and other.began_s <= self.ended_s


class Disk:
    """An ext4 in a file, whose power can be cut."""

    def __init__(self, directory: Path) -> None:
        """Raises CalledProcessError or OSError where loop devices cannot be mounted."""
        self.path = directory / "disk"
        self._image = directory / "disk.img"
        self.path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(96 << 20)
        self._run("mkfs.ext4", "-q", "-F", str(self._image))
        self.mount()

    def mount(self) -> None:
        self._run("mount", "-t", "ext4", "-o", "loop", str(self._image), str(self.path))

    def unmount(self, *options: str) -> None:
        self._run("umount", *options, str(self.path))

    def cut(self, flag: int) -> Span:
        """Cut the power; when that was."""
        fd = os.open(self.path, os.O_RDONLY)
        began_s = time.monotonic()
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", flag))
        finally:
            os.close(fd)
        return Span(began_s, time.monotonic())

    @staticmethod
    def _run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        made = Disk(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a loop device cannot be mounted here: {error.stderr.strip()}")
    except OSError as error:
        pytest.skip(f"a loop device cannot be mounted here: {error}")
    yield made
    made.unmount("--lazy")


class Client(threading.Thread):
    """Calls and schedules as fast as it can until nobody answers; keeps what was acknowledged, and
    from when to when each request was under way.
    """

    def __init__(self, port: int, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        self._handler = name.rpartition("-")[0]  # one for each round: its queue has a bound
        self.executions: dict[str, Span] = {}
        self.schedules: dict[str, Span] = {}

    def run(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            while self._schedule() if random.random() < 0.3 else self._call():
                pass
        self._connection.close()

    def _call(self) -> bool:
        body = {"handler_id": self._handler, "method_name": "work", "wait": False}
        status, answer, span = self._post("/api/run_now", body)
        if status == 202:
            self.executions[answer["execution_id"]] = span
        return status == 202

    def _schedule(self) -> bool:
        schedule_id = f"{self.name}-{len(self.schedules)}"
        body = {"schedule_id": schedule_id, "handler_id": self._handler, "method_name": "work"}
        status, _, span = self._post("/api/schedule", {**body, "trigger_config": DAILY})
        if status == 201:
            self.schedules[schedule_id] = span
        return status == 201

    def _post(self, path: str, body: object) -> tuple[int, dict[str, str], Span]:
        headers = {"Content-Type": "application/json"}
        sent_s = time.monotonic()
        self._connection.request("POST", path, json.dumps(body), headers)
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        return response.status, answer, Span(sent_s, time.monotonic())


def stored(database: Path) -> tuple[set[str], set[str]]:
    """The ids of the executions and schedules of a sound database."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        executions = {sz.encode_id(number) for (number,) in db.execute("SELECT id FROM executions")}
        schedules = {name for (name,) in db.execute("SELECT schedule_id FROM schedules")}
    return executions, schedules


def load_and_cut(one: Appliance, disk: Disk, flag: int, name: str) -> tuple[list[Client], Span]:
    """Clients at work, then the cut in the middle of it; they have ended."""
    clients = [Client(one.http_port, f"{name}-{number}") for number in range(CLIENTS)]
    for client in clients:
        client.start()
    wait_for(lambda: all(client.executions for client in clients), "a call of each client")
    time.sleep(random.uniform(0.2, 0.6))  # how long the power stays on
    cut = disk.cut(flag)
    one.kill()
    for client in clients:
        client.join(20)
        assert not client.is_alive()
    return clients, cut


def test_no_acknowledged_call_or_schedule_is_missing_after_a_power_cut(disk, appliance):
    handlers = {f"round-{number}": {"command": ["true"]} for number in range(len(ROUNDS))}
    one = appliance(data_dir=str(disk.path / "data"), handlers=handlers)
    executions: set[str] = set()
    schedules: set[str] = set()
    one.run()
    for number, flag in enumerate(ROUNDS):
        clients, cut = load_and_cut(one, disk, flag, f"round-{number}")
        for client in clients:
            executions.update(k for k, span in client.executions.items() if not span.overlaps(cut))
            schedules.update(k for k, span in client.schedules.items() if not span.overlaps(cut))
        disk.unmount()
        disk.mount()
        one.run()
        assert one.get("/api/health").json()["checks"]["recovery"] == "ok"
        there = stored(disk.path / "data" / "default" / "schedulezero.db")
        assert not executions - there[0], f"{len(executions - there[0])} calls are missing"
        assert not schedules - there[1], f"{len(schedules - there[1])} schedules are missing"
    print(f"{len(ROUNDS)} cuts, {len(executions)} calls, {len(schedules)} schedules, 0 missing")
    assert executions and schedules
