"""Secrets for jobs, from the command line to the handler, and nowhere else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from appliance import Appliance, wait_for

PASSWORD = "hunter2-and-a-half"


def secret(server: Appliance, *arguments: str, value: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "schedulezero", "--config", str(server.config), "secret"]
    return subprocess.run(
        [*command, *arguments], cwd=server.directory, env=server.environ, input=value,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def server(appliance: Callable[..., Appliance], tmp_path: Path) -> Appliance:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "from-systemd").write_text("handed over\n")
    server = appliance().run(environ={"CREDENTIALS_DIRECTORY": str(credentials)})
    server.handler()
    return server


ECHO = {"handler_id": "example", "method_name": "echo"}


def test_a_secret_is_used_by_a_job_and_found_nowhere_afterwards(server: Appliance) -> None:
    assert secret(server, "set", "db", value=f"{PASSWORD}\n").returncode == 0
    params = {"url": {"$secret": "db"}, "list": [{"$secret": "from-systemd"}]}
    answer = server.post("/api/run_now", {**ECHO, "job_params": params})
    assert answer.json()["result"] == {"url": "***", "list": ["***"]}
    execution = server.get(f"/api/executions/{answer.json()['execution_id']}").json()
    assert execution["job_params"] == params
    fail = {"handler_id": "example", "method_name": "fail", "retry": {"max_attempts": 1}}
    failed = server.post("/api/run_now", {**fail, "job_params": {"message": {"$secret": "db"}}})
    assert failed.status == 502
    assert failed.json()["error"].endswith("***")
    server.stop()
    for path in server.directory.rglob("*"):
        if path.is_file() and path.name != "secrets.json":
            assert PASSWORD.encode() not in path.read_bytes(), path
    kept = server.directory / "data" / "default" / "secrets.json"
    assert kept.stat().st_mode & 0o777 == 0o600


def test_names_are_listed_and_values_never(server: Appliance) -> None:
    secret(server, "set", "b", value=PASSWORD)
    secret(server, "set", "a", value=PASSWORD)
    listed = secret(server, "list", "--json")
    assert [entry["name"] for entry in json.loads(listed.stdout)["secrets"]] == ["a", "b"]
    assert PASSWORD not in listed.stdout + secret(server, "list").stdout
    assert secret(server, "delete", "a").returncode == 0
    gone = secret(server, "delete", "a")
    assert (gone.returncode, "no secret 'a'" in gone.stderr) == (1, True)
    short = secret(server, "set", "a", value="abc")
    assert short.returncode == 1
    assert "abc" not in short.stderr


def test_an_unknown_secret_is_refused_when_it_is_scheduled(server: Appliance) -> None:
    wanted = {**ECHO, "job_params": {"x": {"y": {"$secret": "nope"}}}}
    trigger = {"type": "interval", "hours": 1}
    for path, body in (
        ("/api/run_now", wanted),
        ("/api/schedule", {**wanted, "trigger_config": trigger}),
    ):
        answer = server.post(path, body)
        assert answer.status == 400
        assert "there is no secret 'nope'" in answer.json()["error"]
        assert answer.json()["field"] == "job_params.x.y"
    made = server.post("/api/schedule", {**ECHO, "schedule_id": "s", "trigger_config": trigger})
    assert made.status == 201
    change = {"job_params": {"x": {"$secret": "nope"}}}
    assert server.request("PATCH", "/api/schedules/s", change).status == 400


def test_a_schedule_whose_secret_is_gone_fails_and_says_why(server: Appliance) -> None:
    secret(server, "set", "db", value=PASSWORD)
    body = {
        **ECHO, "schedule_id": "s", "job_params": {"x": {"$secret": "db"}},
        "trigger_config": {"type": "interval", "seconds": 1}, "retry": {"max_attempts": 1},
    }  # fmt: skip
    assert server.post("/api/schedule", body).status == 201
    secret(server, "delete", "db")

    def failed() -> list[str]:
        records = server.get("/api/executions?schedule_id=s&status=error").json()["records"]
        return [record["error"] for record in records]

    assert "not sent: job_params.x: there is no secret 'db'" in wait_for(failed)
