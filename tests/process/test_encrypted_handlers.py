"""Handlers on an encrypted link, as a user sets them up: keys, join strings, revoking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from appliance import ROOT, Appliance, wait_for


@pytest.fixture
def server(appliance: Callable[..., Appliance]) -> Appliance:
    return appliance(zmq_security="curve").run()


def join_string(server: Appliance, name: str) -> str:
    made = server.cli("handler-key", "create", name)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def start_handler(server: Appliance, name: str, *options: str, **environ: str) -> Path:
    """Start handler.py's Example; gives the file of what it says."""
    log = server.directory / f"{name}.log"
    command = [sys.executable, str(ROOT / "handler.py"), "Example", *options]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=server.directory, env={**os.environ, **environ},
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    server.handlers.append(process)
    return log


def add(server: Appliance, handler_id: str) -> Any:
    body = {"handler_id": handler_id, "method_name": "add", "job_params": {"a": 1, "b": 2}}
    return server.post("/api/run_now", body).json().get("result")


def test_a_join_string_is_all_a_handler_needs(server: Appliance, tmp_path: Path) -> None:
    start_handler(server, "argv", "--join", join_string(server, "argv"))
    start_handler(server, "environ", SCHEDULEZERO_JOIN=join_string(server, "environ"))
    file = tmp_path / "join"
    file.touch(mode=0o600)
    file.write_text(join_string(server, "file"))
    start_handler(server, "file", "--join", f"@{file}")
    for name in ("argv", "environ", "file"):
        server.wait_connected(name)
        assert add(server, name) == 3


def test_who_is_not_enrolled_or_takes_anothers_name_is_told_so(server: Appliance) -> None:
    join = join_string(server, "backup")
    start_handler(server, "backup", "--join", join)
    server.wait_connected("backup")
    other = start_handler(server, "other", "--join", join_string(server, "other"), "--id", "backup")
    wait_for(lambda: "enrolled for 'other', not for 'backup'" in other.read_text(), "a refusal")
    server.cli("handler-key", "revoke", "other")
    wait_for(lambda: "does not know this handler's key" in other.read_text(), "a refusal")
    assert len(server.wait_connected("backup")["instances"]) == 1


def test_a_handler_without_a_key_learns_that_it_needs_one(server: Appliance) -> None:
    log = start_handler(server, "open", "--server", f"tcp://127.0.0.1:{server.zmq_port}")
    wait_for(lambda: "use --join" in log.read_text(), "a hint", timeout_s=30)
    assert server.get("/api/handlers").json()["handlers"] == []


def test_revoking_disconnects_at_once_and_a_new_key_lets_in_again(server: Appliance) -> None:
    start_handler(server, "example", "--join", join_string(server, "example"))
    server.wait_connected("example")
    assert "has a key already" in server.cli("handler-key", "create", "example").stderr
    body = {
        "handler_id": "example", "method_name": "sleep", "job_params": {"seconds": 60},
        "wait": False, "retry": {"max_attempts": 1},
    }  # fmt: skip
    execution_id = server.post("/api/run_now", body).json()["execution_id"]
    server.wait_execution(execution_id, "running")
    assert server.cli("handler-key", "revoke", "example").returncode == 0
    assert server.wait_execution(execution_id)["status"] == "lost"
    server.wait_connected("example", "Disconnected")
    listed = json.loads(server.cli("handler-key", "list", "--json").stdout)
    assert listed["keys"] == []
    assert "has no key" in server.cli("handler-key", "revoke", "example").stderr
    start_handler(server, "again", "--join", join_string(server, "example"))
    server.wait_connected("example")


def test_handlers_of_the_configuration_get_their_keys_by_themselves(
    appliance: Callable[..., Appliance],
) -> None:
    handlers = {
        "ours": {"run": "handler.py:Example"},
        "program": {"command": [sys.executable, str(ROOT / "handler.py"), "Example"]},
    }
    server = appliance(zmq_security="curve", handlers=handlers).run("run")
    for name in handlers:
        server.wait_connected(name)
        assert add(server, name) == 3
    listed = json.loads(server.cli("handler-key", "list", "--json").stdout)
    assert {(key["name"], key["origin"]) for key in listed["keys"]} == {
        ("ours", "local"), ("program", "local"),
    }  # fmt: skip
    assert server.stop() == 0


def test_the_network_is_not_listened_to_without_encryption(
    appliance: Callable[..., Appliance],
) -> None:
    server = appliance(zmq_host="0.0.0.0", zmq_security="null")
    refused = server.cli("check")
    assert refused.returncode == 78
    assert "zmq_security" in refused.stderr
    server.write_config(zmq_security="auto")
    assert server.cli("check").returncode == 0


def test_a_handler_secret_from_the_environment_is_shown_and_demanded_and_not_shown(
    appliance: Callable[..., Appliance],
) -> None:
    secret = "a secret of the handlers"
    server = appliance(handler_secret=secret, handlers={"own": {"run": "handler.py:Example"}})
    server.run("run")
    server.wait_connected("own")
    address = f"tcp://127.0.0.1:{server.zmq_port}"
    start_handler(server, "good", "--server", address, "--id", "good",
                  SCHEDULEZERO_HANDLER_SECRET=secret)  # fmt: skip
    server.wait_connected("good")
    bad = start_handler(server, "bad", "--server", address, "--id", "bad")
    wait_for(lambda: "wants the handler secret" in bad.read_text(), "a refusal")
    shown = [
        server.get("/api/config").body.decode(),
        server.get("/api/handlers").body.decode(),
        server.output,
        server.cli("systemd").stdout,
        *(path.read_text() for path in server.directory.rglob("*.log")),
    ]
    assert not any(secret in text for text in shown)
