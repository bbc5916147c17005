"""Where logs go, what they look like, and how they change while it runs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from appliance import Appliance, wait_for

MINE = """
import logging
from handler import Handler

class Mine(Handler):
    def fail(self):
        raise ValueError("broken")

logging.getLogger("mine").warning("imported")
"""
SLEEPER = ["sh", "-c", "echo from the command; exec sleep 3600"]


def log_of(site: Appliance, *parts: str) -> str:
    path = site.directory.joinpath("logs", "default", *parts)
    return path.read_text() if path.exists() else ""


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Callable[..., Callable[[], list[str]]]]:
    """Runs an appliance with its stdout apart from its stderr; gives the lines of stdout so far."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(site: Appliance) -> Callable[[], list[str]]:
        path = tmp_path / "stdout"
        command = [sys.executable, "-m", "schedulezero", "--config", str(site.config), "run"]
        with path.open("wb") as stdout:
            processes.append(subprocess.Popen(
                command, cwd=site.directory, env=site.environ, stdout=stdout,
                stderr=subprocess.DEVNULL, start_new_session=True,
            ))  # fmt: skip
        site.wait_healthy()
        return lambda: path.read_text().splitlines()

    yield run
    for process in processes:
        process.send_signal(signal.SIGTERM)
        process.wait(40)


def test_with_stdout_everything_goes_there_and_no_file_is_written(
    appliance: Callable[..., Appliance], output: Callable[..., Callable[[], list[str]]]
) -> None:
    site = appliance(log_to="stdout", handlers={"a": {"command": SLEEPER}})
    lines = output(site)
    wait_for(lambda: "from the command" in lines(), "the handler's line")
    places = [line.split()[2] for line in lines() if re.match(r"\S+Z [A-Z]+ ", line)]
    assert any(re.fullmatch(r"schedulezero\.py:\d+:run", place) for place in places)
    assert any(re.fullmatch(r"schedulezero\.py:\d+:_serve", place) for place in places)
    assert not (site.directory / "logs").exists()


def test_json_lines_are_json_and_nothing_else(
    appliance: Callable[..., Appliance], output: Callable[..., Callable[[], list[str]]]
) -> None:
    site = appliance(log_to="stdout", log_format="json")
    lines = output(site)
    wait_for(lambda: any("ready at" in line for line in lines()), "the server's line")
    for line in lines():
        shown = json.loads(line)
        assert {"time", "level", "file", "line", "function", "message"} <= shown.keys()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_failed_execution_is_a_line_that_names_it(
    appliance: Callable[..., Appliance], log_format: str
) -> None:
    site = appliance(log_format=log_format, handlers={"mine": {"run": "mine.py:Mine"}})
    (site.directory / "mine.py").write_text(MINE)
    site.run("run")
    site.wait_connected("mine")
    body = {"handler_id": "mine", "method_name": "fail", "retry": {"max_attempts": 1}}
    execution_id = site.post("/api/run_now", body).json()["execution_id"]
    (line,) = [
        line for line in log_of(site, "server", "server.log").splitlines() if execution_id in line
    ]
    if log_format == "json":
        shown: dict[str, Any] = json.loads(line)
        assert (shown["execution_id"], shown["handler_id"]) == (execution_id, "mine")
        assert (shown["level"], shown["function"]) == ("WARNING", "log_execution")
        first = log_of(site, "handlers", "mine", "errors.log").splitlines()[0]
        assert json.loads(first)["message"] == "imported"
    else:
        assert f" [{execution_id}] mine.fail ended as error: " in line


def test_a_reload_changes_the_level_of_what_runs(appliance: Callable[..., Appliance]) -> None:
    site = appliance(log_level="WARNING").run("run")
    site.write_config(log_level="INFO")
    assert site.cli("reload").returncode == 0
    wait_for(lambda: "configuration reloaded" in log_of(site, "server", "server.log"), "a line")
    assert "INFO" in log_of(site, "governor", "governor.log")
    site.write_config(log_level="ERROR")
    assert site.cli("reload").returncode == 0
    assert log_of(site, "governor", "governor.log").count("reloaded") == 1


def test_all_logs_together_keep_within_their_bound(appliance: Callable[..., Appliance]) -> None:
    script = "while :; do head -c 300000 /dev/zero | tr '\\0' x; echo; sleep 0.2; done"
    site = appliance(log_max_mb=1, handlers={"loud": {"command": ["sh", "-c", script]}})
    former = site.directory / "logs" / "default" / "handlers" / "former" / "handler.log"
    former.parent.mkdir(parents=True)
    former.write_bytes(bytes(3 << 20))
    site.run("run")
    wait_for(lambda: not former.exists(), "the log of a former handler to go")
    loud = site.directory / "logs" / "default" / "handlers" / "loud"
    wait_for((loud / "handler.log.1").exists, "a rotation")
    assert (loud / "handler.log.1").stat().st_size <= (1 << 20) // 16
