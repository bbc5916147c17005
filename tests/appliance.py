"""What the tests share: a real appliance in a process of its own, and waiting for conditions."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str = "", timeout_s: float = 20.0) -> T:
    """The first true value of `condition`; fails the test when there is none in time."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < give_up_s, f"waited {timeout_s:g} s for {what or condition}"
        time.sleep(0.01)


def free_port() -> int:
    """A port of the loopback address that nobody has now.

    It lies below those the kernel gives to connections, in a range of this test worker's own, so
    that nobody takes it before the process it is meant for has.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 10_000 + worker % 4 * 5_000 + random.randrange(5_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


class Answer:
    """Status, headers and decoded body of an HTTP answer."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    def json(self) -> Any:
        return json.loads(self.body)


class Appliance:
    """ScheduleZero in a directory of its own, driven as a user drives it: files, CLI and HTTP."""

    def __init__(self, directory: Path, settings: dict[str, Any] | None = None) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.http_port, self.zmq_port = free_port(), free_port()
        self.settings: dict[str, Any] = {
            "http_port": self.http_port,
            "zmq_port": self.zmq_port,
            "timezone": "UTC",
            **(settings or {}),
        }
        self.config = directory / "config.yaml"
        self.write_config()
        self.process: subprocess.Popen[bytes] | None = None
        self.handlers: list[subprocess.Popen[bytes]] = []
        self.headers: dict[str, str] = {}  # sent with every request
        self.program = [sys.executable, "-m", "schedulezero"]

    # Running it

    def write_config(self, **changes: Any) -> None:
        self.settings.update(changes)
        self.config.write_text(json.dumps(self.settings))  # JSON is YAML

    @property
    def environ(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SCHEDULEZERO_")}
        return {**clean, "PYTHONPATH": str(ROOT)}

    def cli(self, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        command = [*self.program, "--config", str(self.config), *arguments]
        return subprocess.run(
            command, cwd=self.directory, env=self.environ, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip

    def run(self, command: str = "server", environ: dict[str, str] | None = None) -> Appliance:
        """Run a command that stays, `server` or `run`, and wait until it is healthy."""
        arguments = [*self.program, "--config", str(self.config), command]
        with (self.directory / "output.log").open("ab") as output:
            self.process = subprocess.Popen(
                arguments, cwd=self.directory, env={**self.environ, **(environ or {})},
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self.wait_healthy()
        return self

    def wait_healthy(self) -> None:
        def healthy() -> bool:
            assert self.process is None or self.process.poll() is None, self.output
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.get("/api/health").status == 200
            return False

        wait_for(healthy, "a healthy server")

    @property
    def output(self) -> str:
        path = self.directory / "output.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def stop(self) -> int:
        """SIGTERM, and wait for the end: the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(45)

    def kill(self) -> None:
        """kill -9 of what `run` started."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        for process in (*self.handlers, self.process):
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
        if self.process is None and (self.directory / "data").exists():
            self.cli("stop")

    # Using it

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=60)
        try:
            data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
            given = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, data, {**given, **self.headers, **(headers or {})})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, path: str, body: Any = None) -> Answer:
        return self.request("POST", path, {} if body is None else body)

    def handler(
        self, target: str = "Example", handler_id: str | None = None, *options: str
    ) -> subprocess.Popen[bytes]:
        """Start a handler of handler.py and wait until it is connected."""
        handler_id = handler_id or target.lower()
        command = [
            sys.executable, str(ROOT / "handler.py"), target, "--id", handler_id,
            "--server", f"tcp://127.0.0.1:{self.zmq_port}", *options,
        ]  # fmt: skip
        with (self.directory / f"{handler_id}.log").open("ab") as output:
            process = subprocess.Popen(
                command, cwd=self.directory, stdout=output, stderr=output, start_new_session=True
            )
        self.handlers.append(process)
        self.wait_connected(handler_id)
        return process

    def wait_connected(self, handler_id: str, status: str = "Connected") -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            handlers = self.get("/api/handlers").json()["handlers"]
            return next(
                (h for h in handlers if h["id"] == handler_id and h["status"] == status), None
            )

        return wait_for(found, f"handler {handler_id} to be {status}")

    def wait_execution(self, execution_id: str, *statuses: str) -> dict[str, Any]:
        """The execution once it has one of the statuses, by default any final one."""

        def reached() -> dict[str, Any] | None:
            execution = self.get(f"/api/executions/{execution_id}").json()
            final = execution["status"] not in ("queued", "running")
            return (
                execution if execution["status"] in statuses or (not statuses and final) else None
            )

        return wait_for(reached, f"execution {execution_id} to be {statuses or 'final'}")
