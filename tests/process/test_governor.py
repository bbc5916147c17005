"""The governor as its users see it: real processes, started by the command line."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schedulezero

PROGRAM = Path(schedulezero.__file__).resolve()
WAIT_S = 15.0
SLEEPER = ["sleep", "3600"]
MINE = """
from handler import Handler

class Mine(Handler):
    def work(self):
        return 1
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    give_up = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < give_up, f"waited in vain for {what}"
        time.sleep(0.02)
    return value


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


class Site:
    """A directory with a configuration, and the command line run in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.http_port, self.zmq_port = free_ports(2)
        self.data = directory / "data" / "default"
        self.logs = directory / "logs" / "default"
        self.processes: list[subprocess.Popen[str]] = []
        self.configure()

    def configure(self, **settings: Any) -> None:
        settings = {"http_port": self.http_port, "zmq_port": self.zmq_port, **settings}
        (self.directory / "config.yaml").write_text(json.dumps(settings, indent=1))

    def popen(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "schedulezero", *arguments],
            cwd=self.directory,
            env={**os.environ, "PYTHONPATH": str(PROGRAM.parent), **environ},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def do(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of one command."""
        process = self.popen(*arguments)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in out + err
        return process.returncode, out, err

    def start(self) -> None:
        code, _, err = self.do("start")
        assert code == 0, err

    def status(self) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.do("status", "--json")[1])
        return shown

    def glance(self) -> dict[str, dict[str, Any]]:
        """The children by name, as the governor last wrote them."""
        try:
            shown = json.loads((self.data / "status.json").read_text())
        except FileNotFoundError:
            return {}
        governor = {"pid": shown["pid"], "state": "RUNNING", "shown": shown}
        return {"governor": governor} | {child["name"]: child for child in shown["children"]}

    def wait_state(self, name: str, state: str) -> dict[str, Any]:
        found: dict[str, Any] = wait_for(
            lambda: (child := self.glance().get(name, {})).get("state") == state and child,
            f"{name} to be {state}",
        )
        return found

    def wait_running(self, *names: str) -> dict[str, int]:
        return {name: self.wait_state(name, "RUNNING")["pid"] for name in names}

    def close(self) -> None:
        pids = [child["pid"] for child in self.glance().values() if child["pid"]]
        if schedulezero.find_governor(str(self.data)):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


# Starting and stopping.


def test_start_status_and_stop_are_one_command_each(site: Site) -> None:
    site.configure(handlers={"a": {"command": SLEEPER}})
    code, out, err = site.do("start")
    assert (code, err) == (0, "")
    assert f"runs on http://127.0.0.1:{site.http_port}, pid " in out
    pids = site.wait_running("governor", "server", "a")

    code, out, _ = site.do("status")
    assert code == 0
    for name, pid in pids.items():
        assert f"{name:8}  RUNNING  {pid}" in out
    first = site.status()["processes"][0]
    assert first["rss_bytes"] >= first["pss_bytes"] > 0

    assert site.do("stop") == (0, "ScheduleZero (default) stopped\n", "")
    assert not any(is_alive(pid) for pid in pids.values())
    assert site.do("status") == (3, "ScheduleZero (default) is not running\n", "")
    code, out, err = site.do("stop")
    assert (code, out) == (3, "")
    assert "not running" in err


def test_a_data_dir_changed_under_a_server_that_runs_is_named(site: Site) -> None:
    site.start()
    site.configure(data_dir="elsewhere")
    told = f"; a ScheduleZero with another data_dir answers on http://127.0.0.1:{site.http_port}\n"
    shown = site.do("status")
    assert shown == (3, f"ScheduleZero (default) is not running{told}", "")
    for command in ("stop", "reload", "restart", "start"):
        code, _, err = site.do(command)
        assert (code, err.endswith(told)) == (1 if "start" in command else 3, True)
    site.configure()
    assert site.do("stop")[0] == 0


@pytest.mark.parametrize("chunks", [[b"[" * 200_000], [b"[]"], itertools.repeat(b"x" * 65_536)])
def test_what_answers_in_its_place_may_say_anything(site: Site, chunks: Iterable[bytes]) -> None:
    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as connection:
            connection.recv(4_096)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            for chunk in chunks:
                connection.sendall(chunk)

    with socket.create_server(("127.0.0.1", site.http_port)) as listener:
        stranger = threading.Thread(target=serve, args=(listener,))
        stranger.start()
        assert site.do("status") == (3, "ScheduleZero (default) is not running\n", "")
        stranger.join()


def test_run_says_what_runs_and_ends_by_ctrl_c(site: Site) -> None:
    site.configure(handlers={"a": {"command": SLEEPER}})
    process = site.popen("run")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert f"http://127.0.0.1:{site.http_port}: server, a; logs in {site.logs}" in line
    site.wait_running("server", "a")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert "Traceback" not in out + err
    assert "a RUNNING -> STOPPING" in err  # in the foreground the log is on stderr too
    assert "a RUNNING -> STOPPING" in (site.logs / "governor" / "governor.log").read_text()


def test_in_the_foreground_what_handlers_write_is_shown(site: Site) -> None:
    site.configure(handlers={"a": {"command": ["sh", "-c", "echo hello; exec sleep 3600"]}})
    process = site.popen("run")
    assert process.stdout is not None
    process.stdout.readline()
    assert process.stdout.readline() == "a | hello\n"


def test_a_reader_that_stops_reading_does_not_halt_it(site: Site) -> None:
    script = "yes | head -c 6000000; exec sleep 3600"
    site.configure(handlers={"a": {"command": ["sh", "-c", script]}})
    process = site.popen("run")
    log = site.logs / "handlers" / "a" / "handler.log.1"
    wait_for(log.exists, "the log to be rotated, long after the pipe was full")
    os.kill(site.glance()["a"]["pid"], signal.SIGKILL)
    site.wait_state("a", "BACKOFF")
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: not is_alive(process.pid), "its end")


def test_ctrl_c_reaches_only_the_governor(site: Site) -> None:
    script = "trap 'echo INT' INT; trap 'echo TERM; exit 0' TERM; while :; do sleep 0.1; done"
    site.configure(handlers={"a": {"command": ["sh", "-c", script]}})
    process = site.popen("run")
    site.wait_running("server", "a")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=WAIT_S)
    assert (site.logs / "handlers" / "a" / "handler.log").read_text() == "TERM\n"


def test_a_second_ctrl_c_ends_at_once(site: Site) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    site.configure(handlers={"stubborn": {"command": ["sh", "-c", script]}})
    process = site.popen("run")
    log = site.logs / "handlers" / "stubborn" / "handler.log"
    wait_for(lambda: log.exists() and "ready" in log.read_text(), "the handler")
    process.send_signal(signal.SIGINT)
    pid = site.wait_state("stubborn", "STOPPING")["pid"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert not is_alive(pid)


def test_handlers_stop_before_the_server_which_takes_their_last_results(site: Site) -> None:
    site.configure(handlers={"a": {"command": SLEEPER}, "b": {"command": SLEEPER}})
    site.start()
    site.wait_running("server", "a", "b")
    site.do("stop")
    text = (site.logs / "governor" / "governor.log").read_text()
    ends = [text.index(f"{name} STOPPING -> STOPPED") for name in ("a", "b")]
    assert max(ends) < text.index("server RUNNING -> STOPPING")


def test_a_second_one_on_the_same_data_exits_75_and_names_the_first(site: Site) -> None:
    site.start()
    pid = site.glance()["governor"]["pid"]
    for command in ("start", "run", "server"):
        code, out, err = site.do(command)
        assert (code, out) == (75, "")
        assert f"already running: pid {pid} holds {site.data}" in err


def test_a_server_alone_is_looked_at_reloaded_and_stopped_too(site: Site) -> None:
    server = site.popen("server")
    wait_for(lambda: site.do("status")[0] == 0, "the server")
    os.kill(server.pid, signal.SIGHUP)  # however early: it must not end by it
    assert f"(default) on http://127.0.0.1:{site.http_port}\n" in site.do("status")[1]
    code, out, err = site.do("reload")
    assert (code, err) == (0, "")
    assert out == f"pid {server.pid} is told to reload; its log says whether it does\n"
    assert site.do("stop")[0] == 0
    assert "configuration reloaded" in server.communicate()[1]


def test_a_stale_pid_file_is_never_trusted(site: Site) -> None:
    innocent = subprocess.Popen(SLEEPER)
    try:
        site.data.mkdir(parents=True)
        (site.data / "governor.lock").write_text(f"{innocent.pid} 1\n")
        assert site.do("stop")[0] == 3
        assert site.do("status")[0] == 3
        site.start()
        assert site.do("stop")[0] == 0
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_two_deployments_run_side_by_side(site: Site) -> None:
    other = dict(zip(("http_port", "zmq_port"), free_ports(2), strict=True))
    site.configure(deployments={"test": other})
    site.start()
    code, _, err = site.do("start", "--deployment", "test")
    assert code == 0, err
    assert site.do("--deployment", "test", "status")[0] == 0
    assert site.do("stop", "--deployment", "test")[0] == 0
    assert site.do("status")[0] == 0


def test_restart_gives_new_processes(site: Site) -> None:
    site.start()
    before = site.wait_running("governor", "server")
    assert site.do("restart")[0] == 0
    after = site.wait_running("governor", "server")
    assert not set(before.values()) & set(after.values())


# Deaths.


def test_a_killed_governor_leaves_no_child_and_no_lock(site: Site) -> None:
    (site.directory / "mine.py").write_text(MINE)
    handlers = {"a": {"command": SLEEPER}, "mine": {"run": "mine.py:Mine"}}
    site.configure(handlers=handlers)
    site.start()
    pids = site.wait_running("governor", "server", "a", "mine")
    os.kill(pids["governor"], signal.SIGKILL)
    wait_for(lambda: not any(is_alive(pid) for pid in pids.values()), "the end of the children")
    assert site.do("status")[0] == 3
    site.start()


def test_what_a_command_started_ends_with_a_killed_governor(site: Site) -> None:
    script = "sleep 3600 & echo $!; trap '' HUP TERM; wait"
    site.configure(handlers={"a": {"command": ["sh", "-c", script]}})
    site.start()
    pids = site.wait_running("governor", "a")
    grandchild = int((site.logs / "handlers" / "a" / "handler.log").read_text())
    os.kill(pids["governor"], signal.SIGKILL)
    wait_for(lambda: not is_alive(grandchild) and not is_alive(pids["a"]), "their end")


def test_a_handler_that_hangs_ends_with_a_killed_governor(site: Site) -> None:
    (site.directory / "mine.py").write_text(MINE)
    site.configure(handlers={"mine": {"run": "mine.py:Mine"}})
    site.start()
    pids = site.wait_running("governor", "mine")
    os.kill(pids["mine"], signal.SIGSTOP)
    os.kill(pids["governor"], signal.SIGKILL)
    wait_for(lambda: not is_alive(pids["mine"]), "its end")


def test_a_killed_warden_is_replaced(site: Site) -> None:
    site.configure(handlers={"a": {"command": SLEEPER}})
    site.start()
    pids = site.wait_running("governor", "server", "a")

    def wardens() -> set[int]:
        task = Path(f"/proc/{pids['governor']}/task/{pids['governor']}/children")
        return {int(pid) for pid in task.read_text().split()} - set(pids.values())

    (first,) = wardens()
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: wardens() - {first}, "another warden")
    os.kill(pids["governor"], signal.SIGKILL)
    wait_for(lambda: not is_alive(pids["a"]), "the end of the command")


def test_a_governor_that_ran_out_of_descriptors_goes_on_and_heals(site: Site) -> None:
    site.configure(handlers={"a": {"command": SLEEPER}})
    site.start()
    pids = site.wait_running("governor", "server", "a")
    governor, limits = pids["governor"], resource.getrlimit(resource.RLIMIT_NOFILE)
    task = Path(f"/proc/{governor}/task/{governor}/children")
    (warden,) = {int(pid) for pid in task.read_text().split()} - set(pids.values())
    resource.prlimit(governor, resource.RLIMIT_NOFILE, (3, limits[1]))
    os.kill(warden, signal.SIGKILL)
    log = site.logs / "governor" / "governor.log"
    wait_for(lambda: "ERROR" in log.read_text(), "a word on what it cannot do")
    resource.prlimit(governor, resource.RLIMIT_NOFILE, limits)
    os.kill(pids["a"], signal.SIGKILL)
    wait_for(lambda: site.wait_state("a", "RUNNING")["pid"] != pids["a"], "another one")
    assert "Traceback" not in log.read_text()


def test_a_governor_in_the_foreground_that_ran_out_of_descriptors_can_be_stopped(
    site: Site,
) -> None:
    site.configure(handlers={"a": {"command": SLEEPER}})
    process = site.popen("run")
    governor = site.wait_running("governor", "server", "a")["governor"]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(governor, resource.RLIMIT_NOFILE, (3, limits[1]))
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 0


@pytest.mark.parametrize("name", ["server", "a"])
def test_a_killed_child_is_back_and_the_others_do_not_notice(site: Site, name: str) -> None:
    site.configure(handlers={"a": {"command": SLEEPER}})
    site.start()
    before = site.wait_running("server", "a")
    os.kill(before[name], signal.SIGKILL)
    site.wait_state(name, "BACKOFF")
    site.wait_state(name, "STARTING")
    after = site.wait_running("server", "a")
    assert {key for key in before if before[key] != after[key]} == {name}
    child = site.glance()[name]
    assert (child["restarts"], child["reason"]) == (1, "killed by SIGKILL")


def test_a_data_directory_deleted_under_it_is_made_anew_with_all_that_was_in_it(
    site: Site,
) -> None:
    trigger = {"type": "interval", "hours": 1}
    call = {"handler_id": "h", "method_name": "m", "trigger_config": trigger}
    site.configure(schedules={"kept": call}, handlers={"a": {"command": SLEEPER}})
    site.start()
    before = site.wait_running("governor", "server", "a")
    shutil.rmtree(site.data)
    wait_for(lambda: site.glance().get("server", {}).get("restarts"), "another server")
    after = site.wait_running("governor", "server", "a")
    assert (after["governor"], after["a"]) == (before["governor"], before["a"])
    assert "was deleted, moved or replaced" in site.glance()["server"]["reason"]
    assert "kept:" in site.do("export")[1]
    assert site.do("stop")[0] == 0


def test_exit_code_78_is_fatal_and_never_restarted(site: Site) -> None:
    script = "echo the port is missing >&2; exit 78"
    site.configure(handlers={"bad": {"command": ["sh", "-c", script]}})
    site.start()
    child = site.wait_state("bad", "FATAL")
    assert (child["restarts"], child["reason"]) == (0, "exit code 78: the port is missing")
    assert "exit code 78: the port is missing" in site.do("status")[1]


def test_a_command_that_does_not_exist_is_fatal_and_named(site: Site) -> None:
    site.configure(handlers={"bad": {"command": ["/no/such/program"]}})
    site.start()
    reason = site.wait_state("bad", "FATAL")["reason"]
    assert reason == "exit code 78: cannot run /no/such/program: No such file or directory"


def test_a_child_that_keeps_dying_is_restarted_later_each_time(site: Site) -> None:
    site.configure(handlers={"bad": {"command": ["sh", "-c", "echo no >&2; exit 5"]}})
    site.start()
    wait_for(lambda: site.glance()["bad"]["restarts"] >= 2, "two restarts")
    assert site.wait_state("bad", "BACKOFF")["reason"] == "exit code 5: no"


def test_what_a_command_left_behind_ends_with_it(site: Site) -> None:
    script = "sleep 3600 & echo $!; wait"
    site.configure(handlers={"a": {"command": ["sh", "-c", script]}})
    site.start()
    log = site.logs / "handlers" / "a" / "handler.log"
    pid = int(wait_for(lambda: log.exists() and log.read_text(), "the grandchild"))
    assert is_alive(pid)
    os.kill(site.glance()["a"]["pid"], signal.SIGKILL)
    wait_for(lambda: not is_alive(pid), "the end of the grandchild")


# What a handler gets.


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_runs_in_the_background_gives_freed_memory_back(site: Site) -> None:
    site.start()
    for name in ("governor", "server"):
        environ = Path(f"/proc/{site.glance()[name]['pid']}/environ").read_bytes().split(b"\0")
        assert b"MALLOC_TRIM_THRESHOLD_=131072" in environ


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_compiling_the_program_took_is_given_back(site: Site) -> None:
    fresh = site.directory / "fresh"
    fresh.mkdir()
    shutil.copy(PROGRAM, fresh)
    governor = site.popen("run", PYTHONPATH=str(fresh), PYTHONDONTWRITEBYTECODE="1")
    site.wait_running("server")
    status = Path(f"/proc/{governor.pid}/status").read_text()
    most_kib, now_kib = map(int, re.findall(r"(?:VmHWM|VmRSS):\s+(\d+)", status))
    assert most_kib - now_kib > 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_command_is_killed_for_want_of_memory_rather_than_what_it_looks_at(site: Site) -> None:
    def score(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    site.start()
    command = site.popen("logs", "--follow")
    wait_for(lambda: score(command.pid) == 500, "the command to offer itself")
    for name in ("governor", "server"):
        assert score(site.glance()[name]["pid"]) == score(os.getpid())


def test_a_handler_gets_its_environment_directory_and_log_files(site: Site) -> None:
    (site.directory / "jobs").mkdir()
    script = 'echo "$COLOUR $(pwd)"; echo oops >&2; exec sleep 3600'
    spec = {"command": ["sh", "-c", script], "env": {"COLOUR": "blue"}, "cwd": "jobs"}
    site.configure(handlers={"a": spec})
    site.start()
    logs = site.logs / "handlers" / "a"
    wait_for(lambda: (logs / "errors.log").exists() and (logs / "errors.log").read_text(), "logs")
    assert (logs / "handler.log").read_text() == f"blue {site.directory / 'jobs'}\n"
    code, out, _ = site.do("logs", "a")
    assert code == 0
    assert f"==> {logs / 'errors.log'} <==\noops\n" in out


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_child_has_no_descriptor_of_the_governor_but_the_lifeline(site: Site) -> None:
    site.configure(handlers={"a": {"command": SLEEPER}})
    site.start()
    pids = site.wait_running("governor", "a", "server")

    def links(pid: int) -> list[str]:
        return [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]

    logs = site.logs / "handlers" / "a"
    kinds = sorted(link.partition(":")[0] for link in links(pids["a"]))
    assert kinds == sorted(
        ["/dev/null", str(logs / "handler.log"), str(logs / "errors.log"), "pipe"]
    )
    assert not any("governor" in link for link in links(pids["server"]))


# Reloading.


def test_a_reload_touches_only_the_handlers_that_changed(site: Site) -> None:
    sleeper = {"command": SLEEPER}
    site.configure(handlers={"same": sleeper, "changed": sleeper, "gone": sleeper})
    site.start()
    before = site.wait_running("governor", "server", "same", "changed", "gone")
    changed = {"command": ["sleep", "7200"]}
    site.configure(handlers={"same": sleeper, "changed": changed, "new": sleeper})
    assert site.do("reload") == (0, "ScheduleZero (default) reloaded\n", "")
    wait_for(lambda: "gone" not in site.glance(), "the end of gone")
    wait_for(lambda: site.glance()["changed"]["pid"] not in (None, before["changed"]), "changed")
    after = site.wait_running("governor", "server", "same", "changed", "new")
    assert {key for key in after if before.get(key) == after[key]} == {"governor", "server", "same"}
    assert not is_alive(before["gone"])


def test_a_reload_names_what_only_a_restart_applies_until_there_was_one(site: Site) -> None:
    site.start()
    site.wait_running("server")
    site.configure(http_port=1, timeout=60, history={"max_executions": 5}, log_level="DEBUG")
    said = "ScheduleZero (default) reloaded; after a restart: http_port, timeout"
    for _ in range(2):
        assert site.do("reload") == (0, f"{said}, history.max_executions\n", "")
    assert "After a restart: http_port, timeout" in site.do("status")[1]
    site.configure()
    assert site.do("reload") == (0, "ScheduleZero (default) reloaded\n", "")


def test_a_reload_tries_a_fatal_handler_again(site: Site) -> None:
    program = site.directory / "program"
    site.configure(handlers={"a": {"command": [str(program)]}})
    site.start()
    site.wait_state("a", "FATAL")
    program.write_text("#!/bin/sh\nexec sleep 3600\n")
    program.chmod(0o755)
    assert site.do("reload")[0] == 0
    site.wait_running("a")


def test_a_change_that_is_taken_back_while_the_handler_stops_starts_it_again(site: Site) -> None:
    slow = {"command": ["sh", "-c", "trap 'sleep 3; exit' TERM; while :; do sleep 0.1; done"]}
    site.configure(handlers={"a": slow})
    site.start()
    before = site.wait_running("a")
    for entry in ({"command": SLEEPER}, slow):
        site.configure(handlers={"a": entry})
        assert site.do("reload")[0] == 0
    wait_for(lambda: site.glance()["a"]["pid"] not in (None, before["a"]), "the start of a")
    site.wait_running("a")


def test_a_wrong_configuration_is_refused_and_the_old_one_stays(site: Site) -> None:
    site.configure(handlers={"a": {"command": SLEEPER}})
    site.start()
    before = site.wait_running("governor", "server", "a")
    site.configure(handlers={"a": {"comand": SLEEPER}})
    code, _, err = site.do("reload")
    assert code == 78
    assert "did you mean 'command'?" in err
    # Also when the signal comes from elsewhere.
    os.kill(before["governor"], signal.SIGHUP)
    shown = wait_for(lambda: (s := site.glance()["governor"]["shown"])["reloads"] and s, "reload")
    assert "did you mean 'command'?" in shown["reload_error"]
    assert site.wait_running("governor", "server", "a") == before


@pytest.mark.parametrize(
    "text", ["htpp_port: 1\ndata_dir: kept here # so\n", "data_dir: 'kept here'\n\t-"]
)
def test_what_runs_can_be_looked_at_and_stopped_while_its_configuration_is_wrong(
    site: Site, text: str
) -> None:
    site.data = site.directory / "kept here" / "default"
    site.configure(
        data_dir="kept here", log_dir="there", handlers={"a": {"command": ["echo", "said"]}}
    )
    site.start()
    site.wait_state("a", "BACKOFF")
    (site.directory / "config.yaml").write_text(text)
    code, out, err = site.do("status")
    assert (code, err.count("\n")) == (0, 1)
    assert "ScheduleZero" in out and f":{site.http_port}" in out
    assert err.startswith("schedulezero: the configuration is wrong: config.yaml line")
    assert "said" in site.do("logs", "a")[1]
    assert "governor" in site.do("logs", "governor")[1]
    assert site.do("stop")[:2] == (0, "ScheduleZero (default) stopped\n")
    assert site.do("stop")[0] == 78


# What keeps it from starting is one line.


@pytest.mark.parametrize("command", ["run", "start", "check", "server", "restart"])
def test_a_configuration_error_is_one_line_and_exit_code_78(site: Site, command: str) -> None:
    site.configure(htpp_port=1)
    code, out, err = site.do(command)
    assert (code, out, err.count("\n")) == (78, "", 1)
    assert err.startswith("schedulezero: config.yaml line 4: unknown key 'htpp_port' (value 1)")


@pytest.mark.parametrize("command", ["run", "start", "server"])
@pytest.mark.parametrize("kind", ["http", "zmq"])
def test_a_taken_port_is_one_line_that_names_the_key(site: Site, command: str, kind: str) -> None:
    port = getattr(site, f"{kind}_port")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        code, out, err = site.do(command)
    assert (code, out) == (1, "")
    assert err == f"schedulezero: {kind}_port {port} on 127.0.0.1: Address already in use\n"


def test_a_start_that_fails_says_why_and_leaves_nothing_running(site: Site) -> None:
    site.data.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(site.data / "schedulezero.db")) as theirs:
        theirs.execute("CREATE TABLE theirs (x)")
    code, out, err = site.do("start")
    assert (code, out) == (78, "")
    assert err.startswith("schedulezero: not started: the ")
    assert "a database of another program" in err
    assert site.do("status")[0] == 3


@pytest.mark.parametrize("key", ["data_dir", "log_dir"])
def test_a_directory_that_cannot_be_made_is_one_line(site: Site, key: str) -> None:
    (site.directory / "file").touch()
    site.configure(**{key: "file/x"})
    code, out, err = site.do("start")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "file/x" in err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"handlers": {"a": {"run": "none.py:A"}}}, "handlers.a.run: there is no file none.py"),
        (
            {"handlers": {"a": {"command": ["x"], "cwd": "no"}}},
            "handlers.a.cwd: there is no directory",
        ),
        (
            {
                "schedules": {
                    "s": {
                        "handler_id": "a",
                        "method_name": "m",
                        "trigger_config": {"type": "cron", "minute": "99"},
                    }
                }
            },
            "schedules.s.trigger_config.minute",
        ),
    ],
)
def test_what_the_configuration_names_has_to_be_sound(
    site: Site, settings: dict[str, Any], words: str
) -> None:
    site.configure(**settings)
    code, out, err = site.do("start")
    assert (code, out) == (78, "")
    assert err.startswith("schedulezero: config.yaml line ")
    assert words in err


def test_the_file_runs_by_its_path_too(site: Site) -> None:
    path = schedulezero.__file__
    done = subprocess.run(
        [sys.executable, path, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"ScheduleZero {schedulezero.VERSION}\n"
    process = subprocess.Popen(
        [sys.executable, path, "run"],
        cwd=site.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    site.processes.append(process)
    site.wait_running("server")
    process.terminate()
    assert process.wait(WAIT_S) == 0
