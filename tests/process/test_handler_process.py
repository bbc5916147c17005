"""Real handler processes against a ROUTER that is written from the protocol alone."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import zmq

HANDLER_PY = Path(__file__).resolve().parents[2] / "handler.py"
PATIENCE_S = 20

JOBS = '''
import logging, os, signal, subprocess, sys, threading, time
from handler import Handler, JobCancelled


class Jobs(Handler):
    """Methods for the tests."""

    def __init__(self, greeting="hello"):
        self.greeting = greeting

    def greet(self):
        return self.greeting

    def talk(self, lines=3):
        logging.info("begin")
        for n in range(lines):
            print("line", n)
        print("to stderr", file=sys.stderr)
        print("no end", end="")

    def spin(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return "spun"

    def wait(self, path, seconds=60):
        open(path, "w").close()
        self.job.progress(50, "waiting")
        self.job.wait(seconds)
        return "waited"

    def stubborn(self, path):
        child = subprocess.Popen(["sleep", "1000"])
        with open(path + ".tmp", "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        os.replace(path + ".tmp", path)
        while True:
            try:
                time.sleep(1)
            except BaseException:
                pass

    def until(self, path):
        while not os.path.exists(path):
            time.sleep(0.01)
        return "seen"

    def die(self, how="exit"):
        os._exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGSEGV)

    def exits(self):
        sys.exit("bye")

    def flood(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            print("x" * 100)
        print("last words")

    def pid(self):
        return os.getpid()

    def big(self):
        return "x" * 900_000


if __name__ == "__main__":
    Jobs.main()
'''


class Server:
    """The server's side of the protocol, driven by the test: it does nothing by itself."""

    def __init__(self, port: int = 0) -> None:
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.socket.bind(f"tcp://127.0.0.1:{port or '*'}")
                break
            except zmq.ZMQError:
                assert time.monotonic() < deadline, "the port stays in use"
        self.address = self.socket.getsockopt(zmq.LAST_ENDPOINT).decode()
        self.route = b""
        self.seen: list[dict] = []
        self.forget: list[str] = []

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def close(self) -> None:
        self.socket.close()

    def send_raw(self, *frames: bytes) -> None:
        self.socket.send_multipart([self.route, *frames])

    def send(self, message: dict) -> None:
        self.send_raw(b"", json.dumps(message).encode())

    def control(self, method: str, **params) -> None:
        self.send({"method": method, "params": params})

    def call(self, call_id: str, name: str, /, limit_s: float | None = None, **params) -> None:
        execution_id, _, attempt = call_id.partition(":")
        self.send(
            {
                "id": call_id,
                "method": name,
                "params": params,
                "timeout": limit_s,
                "execution_id": execution_id,
                "attempt": int(attempt),
            }
        )

    def next(self) -> dict:
        """The next message, greeted and answered as the protocol wants it."""
        assert self.socket.poll(PATIENCE_S * 1000), f"silence after {self.seen[-5:]}"
        route, delimiter, *body = self.socket.recv_multipart()
        assert delimiter == b""
        if not body:  # the probe of a new connection
            self.route = route
            self.control("hello")
            return {"method": "probe"}
        message = json.loads(body[0])
        self.seen.append(message)
        if message.get("method") == "register":
            self.route = route
            self.send(
                {
                    "success": True,
                    "reply_to": "register",
                    "status": "registered",
                    "message": "",
                    "heartbeat_s": 2.0,
                    "liveness": 5,
                    "forget": self.forget,
                }
            )
        elif message.get("method") in ("heartbeat", "report_status"):
            self.send({"success": True, "reply_to": message["method"], "server_time": 0})
        return message

    def until(self, accept) -> dict:
        """The next message that `accept`s; fails when it does not come."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            message = self.next()
            if accept(message):
                return message
        raise AssertionError(f"it did not come; last were {self.seen[-5:]}")

    def registration(self) -> dict:
        return self.until(lambda m: m.get("method") == "register")["params"]

    def result(self, call_id: str, *, ack: bool = True) -> dict:
        message = self.until(lambda m: m.get("id") == call_id and "success" in m)
        if ack:
            self.control("ack", id=call_id)
        return message

    def log(self, call_id: str) -> list[tuple[str, str]]:
        """The log lines seen of a call."""
        return [
            (level, text)
            for m in self.seen
            if m.get("method") == "log" and m["params"]["id"] == call_id
            for _, level, text in m["params"]["lines"]
        ]


@pytest.fixture
def server():
    it = Server()
    yield it
    it.close()


@pytest.fixture
def start(tmp_path, server):
    """Start handler processes; whatever the test does, none is left behind."""
    children: list[subprocess.Popen] = []
    (tmp_path / "jobs.py").write_text(JOBS)

    def start(*arguments, target="jobs.py:Jobs", register=True, **popen):
        command = [sys.executable, str(HANDLER_PY), target, "--server", server.address, *arguments]
        output = tmp_path / f"output-{len(children)}"
        with output.open("w") as file:
            child = subprocess.Popen(
                command, cwd=tmp_path, start_new_session=True, stdout=file, stderr=file, **popen
            )
        child.output = output
        children.append(child)
        if register:
            server.registration()
        return child

    yield start
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def wait_until(condition) -> None:
    """Poll for a condition in another process."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- Registering and calling ------------------------------------------------------------------


def test_a_handler_says_what_it_offers(server, start):
    start("--id", "ding", "--concurrency", "3", target="DingDong", register=False)
    said = server.registration()
    assert (said["handler_id"], said["concurrency"]) == ("ding", 3)
    assert said["running"] == said["finished"] == []
    assert "address" not in said and said["instance"] and said["pid"]
    assert {each["name"] for each in said["methods"]} == {"chime", "announce", "countdown"}
    chime = next(each for each in said["methods"] if each["name"] == "chime")
    assert chime["parameters"] == [
        {"name": "style", "type": "str", "required": False, "default": "plain"}
    ]


def test_a_call_is_answered_with_its_result_and_its_log(server, start):
    start(target="DingDong")
    server.call("e1:1", "chime", style="cuckoo")
    result = server.result("e1:1")
    assert result["success"] and result["result"]["said"].startswith("cuckoo")
    assert server.log("e1:1") == [("stdout", result["result"]["said"])]


def test_a_file_run_by_itself_is_a_handler_too(server, start, tmp_path):
    start(register=False)
    server.registration()
    command = [
        sys.executable,
        "jobs.py",
        "--server",
        server.address,
        "--id",
        "other",
        "--config",
        '{"greeting": "moin"}',
    ]
    env = {**os.environ, "PYTHONPATH": str(HANDLER_PY.parent)}
    with subprocess.Popen(command, cwd=tmp_path, env=env) as child:
        assert server.registration()["handler_id"] == "other"
        server.call("e1:1", "greet")
        assert server.result("e1:1")["result"] == "moin"
        child.terminate()


def test_as_many_calls_run_at_once_as_were_promised_and_more_are_refused(server, start, tmp_path):
    start("--concurrency", "2")
    for n in (1, 2):
        server.call(f"e{n}:1", "wait", path=str(tmp_path / f"{n}"))
    wait_until(lambda: (tmp_path / "1").exists() and (tmp_path / "2").exists())
    server.call("e3:1", "greet")
    refusal = server.result("e3:1")
    assert refusal["refused"] is True and not refusal["success"]


def test_a_call_that_runs_or_is_not_acknowledged_is_not_run_again(server, start, tmp_path):
    start("--concurrency", "2")
    server.call("e1:1", "wait", path=str(tmp_path / "ran"))
    wait_until((tmp_path / "ran").exists)
    (tmp_path / "ran").unlink()
    server.call("e1:1", "wait", path=str(tmp_path / "ran"))
    server.call("e2:1", "greet")
    server.result("e2:1", ack=False)
    server.call("e2:1", "greet")
    server.result("e2:1")
    assert not (tmp_path / "ran").exists()


def test_an_unacknowledged_result_is_sent_again(server, start):
    start()
    server.call("e1:1", "greet")
    assert server.result("e1:1", ack=False) == server.result("e1:1")


def test_heartbeats_continue_while_every_worker_computes(server, start):
    start()
    server.call("e1:1", "spin", seconds=5)
    beats = 0
    while server.next().get("id") != "e1:1":
        beats += server.seen[-1].get("method") == "heartbeat"
    assert beats >= 2


def test_a_job_that_exits_or_is_wrong_fails_alone(server, start):
    start()
    for n, (method, params) in enumerate(
        [("exits", {}), ("nope", {}), ("spin", {}), ("spin", {"seconds": 1, "x": 2})]
    ):
        server.call(f"e{n}:1", method, **params)
        assert not server.result(f"e{n}:1")["success"]
    server.call("e9:1", "greet")
    assert server.result("e9:1")["success"]


def test_hostile_messages_are_dropped_and_the_handler_goes_on(server, start):
    start()
    for frames in [
        (b"",),
        (b"", b""),
        (b"x", b"{}"),
        (b"", b"{}", b"{}"),
        (b"", b"\xff"),
        (b"", b"[" * 99_999),
        (b"", b'{"method":[],"params":{}}'),
        (b"", b'{"id":7,"method":"greet","params":{}}'),
        (b"", b'{"id":"e:1","method":"greet","params":[]}'),
        (b"", b'{"success":true}'),
        (b"", b'{"success":true,"reply_to":"register","forget":[1,null,{}]}'),
        (b"", b'{"success":false,"reply_to":{},"code":[]}'),
        (b"", b'{"method":"ack","params":5}'),
        (b"", b'{"method":"ack","params":{"id":{}}}'),
        (b"", b'{"method":"nonsense","params":{}}'),
        (b"", b'{"method":"cancel","params":{"id":[],"reason":{}}}'),
        (b"",) * 50,
    ]:
        server.send_raw(*frames)
    server.call("e1:1", "greet")
    assert server.result("e1:1")["success"]


def test_a_message_over_the_limit_costs_only_the_connection(server, start):
    start()
    server.send_raw(b"", b'{"x":"' + b"x" * (2 << 20) + b'"}')
    server.registration()
    server.call("e1:1", "greet")
    assert server.result("e1:1")["success"]


# --- Logs -------------------------------------------------------------------------------------


def test_prints_logging_and_open_lines_arrive_before_the_result(server, start):
    start()
    server.call("e1:1", "talk")
    server.result("e1:1")
    assert server.log("e1:1") == [
        ("INFO", "begin"),
        ("stdout", "line 0"),
        ("stdout", "line 1"),
        ("stdout", "line 2"),
        ("stderr", "to stderr"),
        ("stdout", "no end"),
    ]


def test_progress_is_sent_while_the_job_runs(server, start, tmp_path):
    start()
    server.call("e1:1", "wait", path=str(tmp_path / "x"), seconds=60)
    progress = server.until(lambda m: m.get("method") == "progress")["params"]
    assert progress == {"id": "e1:1", "percent": 50.0, "message": "waiting"}


def test_a_flooding_job_is_throttled_and_keeps_its_last_words(server, start):
    handler = start()
    server.call("e1:1", "flood", seconds=3)
    server.result("e1:1")
    assert os.path.getsize(handler.output) < 1_000_000
    logs = [m["params"] for m in server.seen if m.get("method") == "log"]
    assert sum(params["dropped"] for params in logs) > 1_000
    assert sum(len(json.dumps(params)) for params in logs) < 1_000_000
    assert server.log("e1:1")[-1] == ("stdout", "last words")
    assert any(m.get("method") == "heartbeat" for m in server.seen)


# --- Cancelling -------------------------------------------------------------------------------


def test_a_cancelled_job_stops_and_says_so(server, start, tmp_path):
    start()
    server.call("e1:1", "wait", path=str(tmp_path / "x"))
    wait_until((tmp_path / "x").exists)
    server.control("cancel", id="e1:1", reason="replaced")
    result = server.result("e1:1")
    assert result["cancelled"] is True and "replaced" in result["error"]


def test_a_job_stops_at_its_timeout_even_if_the_server_does_not_say_so(server, start, tmp_path):
    start()
    server.call("e1:1", "wait", limit_s=0.5, path=str(tmp_path / "x"))
    assert "timeout" in server.result("e1:1")["error"]


def test_a_stuck_job_in_a_process_is_killed_with_all_it_started_and_replaced(
    server, start, tmp_path
):
    start("--processes")
    server.call("e1:1", "stubborn", path=str(tmp_path / "pids"))
    wait_until((tmp_path / "pids").exists)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    server.control("cancel", id="e1:1", reason="timeout")
    result = server.result("e1:1")
    assert result["cancelled"] is True and "killed" in result["error"]
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    server.call("e2:1", "greet")
    assert server.result("e2:1")["success"]


# --- Worker processes -------------------------------------------------------------------------


def test_jobs_in_processes_have_results_logs_and_cancellation_too(server, start, tmp_path):
    handler = start("--processes", "--concurrency", "2")
    server.call("e1:1", "talk")
    assert server.result("e1:1")["success"]
    assert server.log("e1:1")[0] == ("INFO", "begin")
    assert server.log("e1:1")[-1] == ("stdout", "no end")
    server.call("e2:1", "wait", path=str(tmp_path / "x"))
    progress = server.until(lambda m: m.get("method") == "progress")["params"]
    assert progress == {"id": "e2:1", "percent": 50.0, "message": "waiting"}
    server.control("cancel", id="e2:1", reason="cancelled")
    assert server.result("e2:1")["cancelled"] is True
    server.call("e3:1", "pid")
    assert server.result("e3:1")["result"] != handler.pid
    server.call("e4:1", "big")
    assert len(server.result("e4:1")["result"]) == 900_000
    server.call("e5:1", "exits")
    assert server.result("e5:1")["error_type"] == "SystemExit"


def test_text_that_is_not_unicode_reaches_a_worker_process_as_it_reaches_a_thread(server, start):
    start("--processes", target="Example")
    server.call("e1:1", "fail", message="odd \ud800")
    assert server.result("e1:1")["error"] == "odd ?"
    text = "€" * 300_000
    call = {"id": "e2:1", "method": "echo", "params": {"text": text}}
    server.send_raw(b"", json.dumps(call, ensure_ascii=False).encode())
    assert server.result("e2:1")["result"] == {"text": text}


@pytest.mark.parametrize(("how", "words"), [("exit", "exit code 3"), ("crash", "signal 11")])
def test_a_worker_process_that_dies_fails_its_job_and_is_replaced(server, start, how, words):
    start("--processes")
    server.call("e1:1", "die", how=how)
    result = server.result("e1:1")
    assert result["error_type"] == "WorkerDied" and words in result["error"]
    server.call("e2:1", "greet")
    assert server.result("e2:1")["success"]


def test_a_killed_handler_leaves_no_worker_process_behind(server, start, tmp_path):
    handler = start("--processes")
    server.call("e1:1", "stubborn", path=str(tmp_path / "pids"))
    wait_until((tmp_path / "pids").exists)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    handler.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


# --- Losing the server ------------------------------------------------------------------------


def test_a_handler_works_on_without_its_server_and_reports_when_it_is_back(server, start, tmp_path):
    start("--concurrency", "2", register=False)
    before = server.registration()
    server.call("e1:1", "until", path=str(tmp_path / "go"))
    server.call("e2:1", "until", path=str(tmp_path / "never"))
    server.until(lambda m: m.get("method") == "heartbeat")
    port = server.port
    server.close()
    (tmp_path / "go").touch()
    server.__init__(port)
    after = server.registration()
    assert (after["instance"], after["handler_id"]) == (before["instance"], before["handler_id"])
    assert "e2:1" in after["running"]
    if "e1:1" in after["running"]:  # it ended just after
        assert server.result("e1:1")["result"] == "seen"
    else:
        assert [(m["id"], m["result"]) for m in after["finished"]] == [("e1:1", "seen")]


def test_the_log_of_a_job_that_ended_without_the_server_follows_the_registration(
    server, start, tmp_path
):
    start()
    port = server.port
    server.call("e1:1", "wait", path=str(tmp_path / "x"), seconds=0.5)
    wait_until((tmp_path / "x").exists)
    server.close()
    server.__init__(port)
    server.result("e1:1")


def test_an_instance_the_server_does_not_know_registers_again(server, start):
    start()
    server.until(lambda m: m.get("method") == "heartbeat")
    server.send(
        {"success": False, "reply_to": "heartbeat", "error": "?", "code": "unknown_instance"}
    )
    server.registration()
    server.control("hello")
    server.registration()


def test_jobs_the_server_does_not_want_are_stopped_and_their_results_forgotten(
    server, start, tmp_path
):
    start()
    server.call("e1:1", "wait", path=str(tmp_path / "x"))
    wait_until((tmp_path / "x").exists)
    server.forget = ["e1:1"]
    server.control("hello")
    server.registration()
    server.until(lambda m: m.get("method") == "heartbeat" and not m["params"]["running"])
    server.control("hello")
    assert server.registration()["finished"] == []
    assert not any(m.get("id") == "e1:1" for m in server.seen)


def test_a_silent_server_is_left_and_a_new_connection_made(server, start):
    start()
    deadline = time.monotonic() + 15
    probes = set()
    while not probes:  # nothing is answered any more
        assert time.monotonic() < deadline, "it never gave up"
        if server.socket.poll(1_000):
            route, *frames = server.socket.recv_multipart()
            if frames == [b""] and route != server.route:
                probes.add(route)


# --- The spool --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [(), ("--processes",)])
def test_a_spooled_result_survives_kill_9(server, start, tmp_path, mode):
    spool = tmp_path / "spool"
    handler = start("--spool", str(spool), *mode)
    server.call("e1:1", "greet")
    server.result("e1:1", ack=False)
    handler.kill()
    handler.wait()
    spool = spool / "jobs"
    (spool / f"{b'e7:1'.hex()}.result").write_text('{"id":"e7:1","succ')
    start("--spool", str(spool.parent), *mode, register=False)
    assert [m["id"] for m in server.registration()["finished"]] == ["e1:1"]
    server.control("ack", id="e1:1")
    wait_until(lambda: [p.suffix for p in spool.iterdir()] == [".bad"])


def test_an_acknowledged_result_leaves_the_spool(server, start, tmp_path):
    start("--spool", str(tmp_path / "spool"))
    server.call("e1:1", "greet")
    server.result("e1:1", ack=False)
    assert len(list((tmp_path / "spool" / "jobs").iterdir())) == 1
    server.control("ack", id="e1:1")
    wait_until(lambda: not list((tmp_path / "spool" / "jobs").iterdir()))


# --- Stopping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_lets_running_jobs_finish_and_delivers_their_results(
    server, start, tmp_path, signum
):
    handler = start()
    server.call("e1:1", "until", path=str(tmp_path / "go"))
    server.until(lambda m: m.get("method") == "heartbeat")
    handler.send_signal(signum)
    server.until(lambda m: m.get("params", {}).get("status") == "draining")
    server.call("e2:1", "greet")
    assert server.result("e2:1")["refused"] is True
    (tmp_path / "go").touch()
    assert server.result("e1:1")["result"] == "seen"
    server.until(lambda m: m.get("params", {}).get("status") == "offline")
    assert handler.wait(PATIENCE_S) == 0


def test_a_job_that_outlasts_the_drain_is_stopped_and_fails(server, start, tmp_path):
    handler = start("--drain", "1")
    server.call("e1:1", "wait", path=str(tmp_path / "x"))
    wait_until((tmp_path / "x").exists)
    handler.terminate()
    result = server.result("e1:1")
    assert result["error_type"] == "HandlerStopped" and "cancelled" not in result
    assert handler.wait(PATIENCE_S) == 0


def test_a_job_that_cannot_be_stopped_is_abandoned_at_the_end_of_the_drain(server, start, tmp_path):
    handler = start("--drain", "1")
    server.call("e1:1", "until", path=str(tmp_path / "never"))
    server.until(lambda m: m.get("method") == "heartbeat")
    handler.terminate()
    assert handler.wait(PATIENCE_S) == 1


def test_a_second_signal_ends_it_at_once(server, start, tmp_path):
    handler = start()
    server.call("e1:1", "until", path=str(tmp_path / "never"))
    server.until(lambda m: m.get("method") == "heartbeat")
    handler.terminate()
    server.until(lambda m: m.get("params", {}).get("status") == "draining")
    handler.terminate()
    assert handler.wait(PATIENCE_S) == 128 + signal.SIGTERM


def test_a_handler_ends_when_the_governor_does(server, start):
    ours, governors = os.pipe()
    os.set_inheritable(ours, True)
    env = {**os.environ, "SCHEDULEZERO_LIFELINE_FD": str(ours)}
    handler = start(pass_fds=[ours], env=env)
    os.close(ours)
    os.close(governors)
    assert handler.wait(PATIENCE_S) == 0


def test_a_handler_without_a_server_ends_too(start, server):
    server.close()
    handler = start(register=False)
    wait_until(lambda: "calls tcp://" in handler.output.read_text())
    handler.terminate()
    assert handler.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    ("target", "arguments", "sentence"),
    [
        ("Nope", (), "has no handler 'Nope'; it has: DingDong, Example, Shell, Http"),
        ("jobs.py:Nope", (), "has no handler 'Nope'; it has: Jobs"),
        ("none.py:Nope", (), "none.py is not a Python file"),
        ("broken.py:Nope", (), "broken.py cannot be imported: NameError"),
        ("Example", ("--id", "a b"), "'a b' is no handler id"),
        ("bell.py:Bell", (), "'läuten' is no name of a method"),
        ("Example", ("--config", "[1]"), "--config is not a JSON object"),
        ("jobs.py:Jobs", ("--config", '{"greting": 1}'), "has no parameter 'greting'"),
        ("Example", ("--server", "nonsense"), "nonsense"),
        ("Example", ("--log-level", "LOUD"), "'LOUD'"),
        ("Example", ("--concurrency", "0"), "concurrency"),
        ("Example", ("--spool", "/dev/null/x"), "spool"),
    ],
)
def test_a_wrong_configuration_exits_78_with_one_clear_line(
    start, tmp_path, target, arguments, sentence
):
    (tmp_path / "broken.py").write_text("import os\nboom\n")
    bell = "from handler import Handler\nclass Bell(Handler):\n    def läuten(self): ...\n"
    (tmp_path / "bell.py").write_text(bell)
    handler = start(*arguments, target=target, register=False)
    assert handler.wait(PATIENCE_S) == 78
    said = handler.output.read_text()
    assert sentence in said and said.count("\n") == 1


# --- Shell ------------------------------------------------------------------------------------


@pytest.fixture
def shell(server, start):
    start("--config", '{"allow_any": true}', target="Shell")

    def call(call_id="e1:1", **params):
        server.call(call_id, "run", None, **params)

    return call


def test_shell_streams_output_and_returns_the_exit_code(server, shell, tmp_path):
    shell(
        command="echo out; echo err >&2; pwd; echo $X; printf 'ä€'",
        cwd=str(tmp_path),
        env={"X": "y"},
    )
    result = server.result("e1:1")
    assert result["result"] == {"exit_code": 0, "stdout": f"out\n{tmp_path}\ny\nä€"}
    assert set(server.log("e1:1")) == {
        ("stdout", "out"),
        ("stderr", "err"),
        ("stdout", str(tmp_path)),
        ("stdout", "y"),
        ("stdout", "ä€"),
    }


def test_shell_fails_on_an_unexpected_exit_code_or_signal(server, shell):
    shell(command="echo dear me >&2; exit 3")
    assert server.result("e1:1")["error"] == "exit code 3: dear me"
    shell("e2:1", command="exit 3", expect=[0, 3])
    assert server.result("e2:1")["result"]["exit_code"] == 3
    shell("e3:1", argv=["sh", "-c", "kill -9 $$"])
    assert "signal 9" in server.result("e3:1")["error"]
    shell("e4:1", argv=["/no/such/program"])
    assert server.result("e4:1")["error_type"] == "FileNotFoundError"


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_shell_kills_the_whole_process_group(server, shell, tmp_path, how):
    command = "trap '' TERM; sleep 1000 & echo $! > child.tmp; mv child.tmp child; wait; wait"
    shell(command=command, cwd=str(tmp_path), timeout=2 if how == "timeout" else None)
    wait_until((tmp_path / "child").exists)
    if how == "cancel":
        server.control("cancel", id="e1:1", reason="cancelled")
    result = server.result("e1:1")
    assert result.get("cancelled", False) is (how == "cancel")
    assert how == "cancel" or "still running after 2 s" in result["error"]
    wait_until(lambda: not is_alive(int((tmp_path / "child").read_text())))


def test_shell_does_not_wait_for_a_background_child_that_holds_its_output(server, shell):
    shell(command="sleep 30 & echo done")
    result = server.result("e1:1")
    assert result["result"]["stdout"] == "done\n" and result["duration_ms"] < 10_000


# --- Http -------------------------------------------------------------------------------------


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[3:] if len(self.path) > 5 else "/to/1")
            self.end_headers()
        elif self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            while not self.server.over.wait(0.05):  # type: ignore[attr-defined]
                self.wfile.write(b".")
        elif self.path == "/large":
            self.answer(200, b"x" * 200_000)
        else:
            self.answer(
                404 if self.path == "/none" else 200, f"{self.command} {self.path}".encode()
            )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, self.headers["Content-Type"].encode() + b" " + body)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site():
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    web.over = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.over.set()  # type: ignore[attr-defined]
    web.shutdown()
    thread.join()
    web.server_close()


def test_http_requests_follow_redirects_and_check_the_status(server, start, site):
    start("--config", json.dumps({"allow": [site]}), target="Http")
    server.call("e1:1", "request", url=f"{site}/to/to/page?x=1")
    result = server.result("e1:1")["result"]
    assert (result["status"], result["body"]) == (200, "GET /page?x=1")
    server.call("e2:1", "request", url=f"{site}/none")
    assert "answered 404" in server.result("e2:1")["error"]
    server.call("e3:1", "request", url=f"{site}/none", expect=[404])
    assert server.result("e3:1")["result"]["status"] == 404
    server.call("e4:1", "request", url=f"{site}/to/1")
    assert "more than 5 redirects" in server.result("e4:1")["error"]
    server.call("e5:1", "request", url=f"{site}/x", method="POST", json={"a": 1})
    assert server.result("e5:1")["result"]["body"] == 'application/json {"a":1}'
    server.call("e6:1", "request", url=f"{site}/large")
    result = server.result("e6:1")["result"]
    assert (len(result["body"]), result["truncated"]) == (65_536, True)
    server.call("e7:1", "request", url=f"{site}/to//evil.test/")
    assert server.result("e7:1")["error_type"] == "PermissionError"
    server.call("e8:1", "request", url="http://127.0.0.1:1/")
    assert server.result("e8:1")["error_type"] == "PermissionError"


def test_http_gives_up_at_its_timeout_and_when_cancelled(server, start, site):
    start("--config", '{"allow_any": true}', target="Http")
    server.call("e1:1", "request", url=f"{site}/drip", timeout=1)
    assert server.result("e1:1")["error_type"] == "TimeoutError"
    server.call("e2:1", "request", url=f"{site}/drip", timeout=60)
    server.until(lambda m: m.get("method") == "heartbeat")
    server.control("cancel", id="e2:1", reason="cancelled")
    result = server.result("e2:1")
    assert result["cancelled"] is True and result["duration_ms"] < 30_000
