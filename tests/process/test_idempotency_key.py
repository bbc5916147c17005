"""A request with an Idempotency-Key is carried out once, whatever becomes of server and answer."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from appliance import Answer, Appliance, wait_for

SLEEP = {"handler_id": "example", "method_name": "sleep", "job_params": {"seconds": 3}}
HOURLY = {
    "handler_id": "example",
    "method_name": "echo",
    "trigger_config": {"type": "interval", "hours": 1},
}


def send(server: Appliance, path: str, body: Any, key: str) -> socket.socket:
    """Send a request whose answer nobody waits for."""
    data = json.dumps(body)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.http_port}\r\nIdempotency-Key: {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.http_port), timeout=10)
    connection.sendall((head + data).encode())
    return connection


def ask(server: Appliance, path: str, body: Any, key: str) -> Answer:
    return server.request("POST", path, body, {"Idempotency-Key": key})


def receipts(server: Appliance) -> int:
    path = server.directory / "data" / "default" / "schedulezero.db"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT count(*) FROM receipts").fetchone()[0])


@pytest.mark.parametrize(
    ("path", "body", "status"), [("/api/schedule", HOURLY, 201), ("/api/run_now", SLEEP, 200)]
)
def test_a_repeat_after_kill_9_between_commit_and_answer_makes_nothing_anew(
    appliance: Callable[..., Appliance], path: str, body: dict[str, Any], status: int
) -> None:
    server = appliance().run()
    server.handler("Example")
    with send(server, path, body, "once"):
        wait_for(lambda: receipts(server) == 1, "the commit")
        server.kill()
    server.run()
    answer = ask(server, path, body, "once")
    assert (answer.status, answer.headers["idempotent-replayed"]) == (status, "true")
    again = ask(server, path, body, "once")
    assert (again.status, again.json()) == (status, answer.json())
    schedules = server.get("/api/schedules").json()["schedules"]
    executions = server.get("/api/executions").json()["records"]
    if path == "/api/run_now":
        assert schedules == []
        assert [e["execution_id"] for e in executions] == [answer.json()["execution_id"]]
        # The handler worked on meanwhile: it was not even called twice.
        assert executions[0]["attempt_number"] == 1
    else:
        assert [s["id"] for s in schedules] == [answer.json()["schedule_id"]]
        assert executions == []
    assert ask(server, path, {**body, "timeout": 7}, "once").status == 422


def test_whenever_the_server_is_killed_a_repeat_ends_with_exactly_one_schedule(
    appliance: Callable[..., Appliance],
) -> None:
    server = appliance().run()
    server.handler("Example")
    chance = random.Random(7)
    for number in range(6):
        with send(server, "/api/schedule", HOURLY, f"key-{number}"):
            time.sleep(chance.random() * 0.004)  # somewhere between arrival and answer
            server.kill()
        server.run()
        assert ask(server, "/api/schedule", HOURLY, f"key-{number}").status == 201
        assert server.get("/api/schedules").json()["count"] == number + 1


def test_repeats_that_come_at_the_same_time_share_one_execution(
    appliance: Callable[..., Appliance],
) -> None:
    server = appliance().run()
    server.handler("Example")
    short = {**SLEEP, "job_params": {"seconds": 0.2}}
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, server, "/api/run_now", short, "same") for _ in range(16)]
        answers = [each.result() for each in asked]
    assert {answer.status for answer in answers} == {200}
    assert len({answer.json()["execution_id"] for answer in answers}) == 1
    assert server.get("/api/executions").json()["count"] == 1
