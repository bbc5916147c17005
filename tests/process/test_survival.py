"""What survives what: restarts, kills, hangs and cut connections, on real processes.

The handlers write every start and end to a file of their own, which is what they are held to.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from appliance import ROOT, Appliance, wait_for

HANDLER = Path(__file__).resolve().parent.parent / "torture" / "torture_handler.py"
ONCE = {"max_attempts": 1}
ADD = {"handler_id": "worker", "method_name": "work", "job_params": {"token": "add"}}
STUBBORN = """
import time
from handler import Handler

class Stubborn(Handler):
    def stay(self):
        while True:
            time.sleep(1)

    def add(self, a, b):
        return a + b
"""


class Recorder:
    """Starts handlers of torture_handler.py that share one record, and reads it."""

    def __init__(self, one: Appliance) -> None:
        self._one = one
        self.path = one.directory / "record.log"

    def spec(self, **options: Any) -> dict[str, Any]:
        """The handler for the configuration, run by the governor."""
        return {"run": f"{HANDLER}:Torture", "config": {"record": str(self.path)}, **options}

    def start(self, *options: str, server_port: int | None = None) -> subprocess.Popen[bytes]:
        """A handler `worker` of its own, connected."""
        command = [
            sys.executable, str(ROOT / "handler.py"), f"{HANDLER}:Torture", "--id", "worker",
            "--server", f"tcp://127.0.0.1:{server_port or self._one.zmq_port}",
            "--config", json.dumps({"record": str(self.path)}), *options,
        ]  # fmt: skip
        with (self._one.directory / "worker.log").open("ab") as output:
            process = subprocess.Popen(
                command, cwd=self._one.directory, env=self._one.environ,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self._one.handlers.append(process)
        self._one.wait_connected("worker")
        return process

    def marks(self, execution_id: str) -> list[tuple[str, int]]:
        """What handlers wrote of an execution: kind and attempt."""
        if not self.path.exists():
            return []
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [(line[0], line[2]) for line in lines if line[1] == execution_id]

    def pids(self, execution_id: str) -> set[int]:
        """The processes that wrote of an execution."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return {line[4] for line in lines if line[1] == execution_id}

    def wait_mark(self, execution_id: str, *mark: object) -> None:
        wait_for(lambda: tuple(mark) in self.marks(execution_id), f"{mark}", 40)

    def run(self, seconds: float, **more: Any) -> str:
        """Call `work` and return once a handler has begun it: the execution's id."""
        params = {"token": "t", "seconds": seconds}
        body = {"handler_id": "worker", "method_name": "work", "job_params": params, "wait": False}
        execution_id = self._one.post("/api/run_now", {**body, **more}).json()["execution_id"]
        self.wait_mark(execution_id, "start", 1)
        return str(execution_id)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not only what its parent has not collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_idle(pid: int) -> bool:
    """Whether every thread of a process sleeps."""
    stats = Path(f"/proc/{pid}/task").glob("*/stat")
    return all(stat.read_text().rpartition(")")[2].split()[0] == "S" for stat in stats)


def outcomes(one: Appliance, execution_id: str) -> tuple[str, list[str]]:
    """The status of an execution, and how each of its attempts ended that did not succeed."""
    execution = one.get(f"/api/executions/{execution_id}").json()
    ends = [attempt["outcome"] for attempt in execution["attempts"]]
    return execution["status"], [end for end in ends if end not in ("running", "success")]


def test_an_upgrade_with_jobs_running_loses_nothing_and_runs_nothing_twice(appliance):
    one = appliance()
    worker = Recorder(one)
    one.write_config(handlers={"governed": worker.spec(concurrency=2)})
    assert one.cli("start").returncode == 0
    one.wait_connected("governed")
    worker.start("--concurrency", "2")
    there = worker.run(12, retry=ONCE)
    here = worker.run(3, retry=ONCE, handler_id="governed")
    assert one.cli("restart").returncode == 0
    assert one.get(f"/api/executions/{there}").json()["status"] == "running"
    for execution_id in (there, here):
        assert one.wait_execution(execution_id)["status"] == "success"
        assert worker.marks(execution_id) == [("start", 1), ("success", 1)]


def test_a_job_that_ends_while_the_server_is_dead_is_recorded_once(appliance):
    one = appliance().run()
    worker = Recorder(one)
    worker.start()
    execution_id = worker.run(1, retry=ONCE)
    one.kill()
    worker.wait_mark(execution_id, "success", 1)
    one.run()
    assert one.wait_execution(execution_id)["status"] == "success"
    assert worker.marks(execution_id) == [("start", 1), ("success", 1)]


def test_what_nobody_claims_after_a_restart_is_lost_or_tried_again(appliance):
    one = appliance().run()
    worker = Recorder(one)
    process = worker.start("--concurrency", "2")
    once, again = worker.run(60, retry=ONCE), worker.run(2, retry={"max_attempts": 2})
    one.kill()
    process.kill()
    one.run()
    worker.start("--concurrency", "2")
    wait_for(lambda: outcomes(one, once) == ("lost", ["lost"]), "it to be lost", 30)
    assert one.wait_execution(again)["status"] == "success"
    assert outcomes(one, again)[1] == ["lost"]
    assert worker.marks(again) == [("start", 1), ("start", 2), ("success", 2)]
    assert worker.marks(once) == [("start", 1)]


def test_a_spooled_result_is_recorded_although_both_ends_died(appliance, tmp_path):
    one = appliance().run()
    worker = Recorder(one)
    spool = tmp_path / "spool"
    process = worker.start("--spool", str(spool))
    execution_id = worker.run(1, retry=ONCE)
    one.kill()
    wait_for(lambda: [*spool.rglob("*.result")], "the result to be on the disk")
    process.kill()
    process.wait()
    one.run()
    worker.start("--spool", str(spool))
    assert one.wait_execution(execution_id)["status"] == "success"
    assert worker.marks(execution_id) == [("start", 1), ("success", 1)]
    wait_for(lambda: not [*spool.rglob("*.result")], "the result to be acknowledged")


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_handler_that_hung_cannot_change_what_was_decided_without_it(appliance, attempts):
    one = appliance().run()
    worker = Recorder(one)
    process = worker.start()
    execution_id = worker.run(1, retry={"max_attempts": attempts, "base_delay": 0.1})
    process.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: "lost" in outcomes(one, execution_id)[1], "it to be given up", 30)
        if attempts == 2:
            worker.start()
    finally:
        process.send_signal(signal.SIGCONT)
    ended = one.wait_execution(execution_id)
    one.wait_connected("worker")
    assert one.post("/api/run_now", ADD).status == 200  # it has said all it had to say
    assert ended["status"] == ("lost", "success")[attempts - 1]
    assert outcomes(one, execution_id) in [(ended["status"], [end]) for end in ("lost", "late")]
    assert worker.marks(execution_id).count(("start", 1)) == 1


class Line:
    """A TCP connection to the server that can swallow what either side says."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.swallows_calls = self.swallows_results = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._server_port))
                except OSError:
                    near.close()
                    continue
                for ends in ((near, far, "swallows_results"), (far, near, "swallows_calls")):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, swallows: str) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if not getattr(self, swallows):
                    target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def line(appliance) -> Iterator[tuple[Appliance, Line]]:
    """A server and a line to it."""
    one = appliance()
    with closing(Line(one.zmq_port)) as line:
        yield one.run(), line


def test_a_result_whose_acknowledgement_was_lost_is_sent_again_and_counts_once(line):
    one, wire = line
    worker = Recorder(one)
    process = worker.start(server_port=wire.port)
    execution_id = worker.run(1, retry=ONCE)
    wire.swallows_calls = True
    ended = one.wait_execution(execution_id)
    one.kill()
    wire.swallows_calls = False
    one.run()
    one.wait_connected("worker")
    assert one.get(f"/api/executions/{execution_id}").json() == ended
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, "results are left that were never acknowledged"
    assert worker.marks(execution_id) == [("start", 1), ("success", 1)]


def test_the_result_of_a_handler_that_was_cut_off_is_kept_as_late(line):
    one, wire = line
    worker = Recorder(one)
    worker.start(server_port=wire.port)
    execution_id = worker.run(1, retry=ONCE)
    wire.swallows_calls = wire.swallows_results = True
    worker.wait_mark(execution_id, "success", 1)
    wait_for(lambda: outcomes(one, execution_id) == ("lost", ["lost"]), "it to be given up", 30)
    wire.swallows_calls = wire.swallows_results = False
    wait_for(lambda: outcomes(one, execution_id) == ("lost", ["late"]), "the late result", 30)
    assert worker.marks(execution_id) == [("start", 1), ("success", 1)]


def test_a_queued_execution_is_cancelled_at_once_and_never_starts(appliance):
    one = appliance().run()
    worker = Recorder(one)
    worker.start()
    running = worker.run(3)
    body = {"handler_id": "worker", "method_name": "work", "job_params": {"token": "q"}}
    queued = one.post("/api/run_now", {**body, "wait": False}).json()["execution_id"]
    assert one.post(f"/api/executions/{queued}/cancel").status == 200
    assert outcomes(one, queued) == ("cancelled", [])
    assert one.post(f"/api/executions/{queued}/cancel").status == 409
    assert one.wait_execution(running)["status"] == "success"
    assert worker.marks(queued) == []


def test_a_running_execution_is_cancelled_through_its_handler(appliance):
    one = appliance().run()
    worker = Recorder(one)
    worker.start()
    execution_id = worker.run(60)
    assert one.post(f"/api/executions/{execution_id}/cancel").status == 200
    assert one.wait_execution(execution_id)["status"] == "cancelled"
    assert worker.marks(execution_id) == [("start", 1), ("stopped", 1)]


@pytest.mark.parametrize("how", ["cancelled", "timeout"])
def test_a_job_that_ignores_its_end_is_killed_and_its_worker_replaced(appliance, tmp_path, how):
    one = appliance().run()
    path = tmp_path / "stubborn.py"
    path.write_text(STUBBORN)
    one.handler(f"{path}:Stubborn", "stubborn", "--processes", "--concurrency", "1")
    body = {"handler_id": "stubborn", "method_name": "stay", "retry": ONCE, "wait": False}
    limit = {"timeout": 1} if how == "timeout" else {}
    execution_id = one.post("/api/run_now", {**body, **limit}).json()["execution_id"]
    one.wait_execution(execution_id, "running", "timeout")
    if how == "cancelled":
        assert one.post(f"/api/executions/{execution_id}/cancel").status == 200
    assert one.wait_execution(execution_id)["status"] == how
    add = {"handler_id": "stubborn", "method_name": "add", "job_params": {"a": 2, "b": 3}}
    assert one.post("/api/run_now", add).json()["result"] == 5


def test_a_worker_process_ends_with_its_handler_although_what_it_said_was_never_read(appliance):
    one = appliance().run()
    worker = Recorder(one)
    process = worker.start("--processes")
    execution_id = worker.run(1, job_params={"token": "t", "seconds": 1, "talk": 50})
    process.send_signal(signal.SIGSTOP)
    worker.wait_mark(execution_id, "success", 1)
    (pid,) = worker.pids(execution_id)
    wait_for(lambda: is_idle(pid), "the worker process to wait for its next job")
    os.killpg(process.pid, signal.SIGKILL)
    wait_for(lambda: not is_running(pid), "the worker process to end")
