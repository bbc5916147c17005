"""Tokens, roles, sessions and the audit of a real server."""

from __future__ import annotations

import http.client
import re
import stat
from collections.abc import Callable
from typing import Any

import pytest
from appliance import Answer, Appliance

CALL = {"handler_id": "example", "method_name": "add", "job_params": {"a": 1, "b": 2}}
SCHEDULE = {
    "handler_id": "example",
    "method_name": "add",
    "job_params": {"a": 1, "b": 2},
    "trigger_config": {"type": "interval", "hours": 1},
}


def make_token(server: Appliance, name: str, role: str, *options: str) -> str:
    made = server.cli("token", "create", name, "--role", role, *options)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def ask(server: Appliance, method: str, path: str, token: str, body: Any = None) -> Answer:
    return server.request(method, path, body, {"Authorization": f"Bearer {token}"})


def log_in(server: Appliance, token: str) -> dict[str, str]:
    """The headers of a browser that logged in."""
    answer = server.post("/api/login", {"token": token})
    assert answer.status == 200, answer.body
    return {"Cookie": answer.headers["set-cookie"].partition(";")[0]}


def test_without_a_token_everything_on_the_loopback_address_is_allowed(
    appliance: Callable[..., Appliance],
) -> None:
    server = appliance().run()
    session = server.get("/api/session").json()
    assert (session["name"], session["role"]) == ("loopback", "admin")
    assert session["login_required"] is False
    assert "checks" in server.get("/api/health").json()


def test_each_role_may_do_what_it_is_for_and_no_more(appliance: Callable[..., Appliance]) -> None:
    server = appliance()
    tokens = {role: make_token(server, role, role) for role in ("viewer", "operator", "admin")}
    server.headers = {"Authorization": f"Bearer {tokens['admin']}"}
    server.run().handler("Example")
    server.headers = {}
    body = SCHEDULE | {"schedule_id": "s"}
    assert ask(server, "POST", "/api/schedule", tokens["admin"], body).status == 201
    asked = [
        ("GET", "/api/schedules", None),
        ("POST", "/api/schedules/s/pause", {}),
        ("POST", "/api/run_now", CALL),
        ("PATCH", "/api/schedules/s", {"name": "other"}),
        ("GET", "/api/audit", None),
        ("DELETE", "/api/schedules/s", None),
    ]
    statuses = {
        role: [ask(server, *call[:2], token, call[2]).status for call in asked]
        for role, token in tokens.items()
    }
    nobody = [server.request(*call) for call in asked]
    assert statuses == {
        "viewer": [200, 403, 403, 403, 403, 403],
        "operator": [200, 200, 200, 403, 403, 403],
        "admin": [200] * 6,
    }
    assert [answer.status for answer in nobody] == [401] * 6
    assert nobody[0].headers["www-authenticate"] == 'Bearer realm="ScheduleZero"'
    assert nobody[0].json()["code"] == "login_required"


def test_whoever_is_not_logged_in_learns_only_that_it_lives(
    appliance: Callable[..., Appliance],
) -> None:
    server = appliance(auth="required").run()
    assert server.get("/api/health").json() == {"status": "ok", "warnings": []}
    session = server.get("/api/session").json()
    assert (session["authenticated"], session["login_required"]) == (False, True)
    for path in ("/api/config", "/api/openapi.json", "/api/events", "/api/ws", "/metrics"):
        assert server.get(path).status == 401, path
    assert server.get("/").status == 200  # the page that asks for the token


def test_every_route_of_the_description_is_closed_but_those_for_anyone(
    appliance: Callable[..., Appliance],
) -> None:
    server = appliance()
    token = make_token(server, "ann", "admin")
    server.run()
    paths = ask(server, "GET", "/api/openapi.json", token).json()["paths"]
    answers = {
        (method.upper(), path): server.request(
            method.upper(), re.sub("{.*}", "x", path), None if method == "get" else {}
        )
        for path, operations in paths.items()
        for method in operations
    }
    open_to_all = {call for call, answer in answers.items() if answer.status != 401}
    assert open_to_all == {
        ("GET", "/api/health"), ("GET", "/api/session"),
        ("POST", "/api/login"), ("POST", "/api/logout"),
    }  # fmt: skip
    for call in open_to_all:
        assert paths[call[1]][call[0].lower()]["security"] == []


def test_tokens_come_and_go_while_the_server_runs(appliance: Callable[..., Appliance]) -> None:
    server = appliance().run()
    token = make_token(server, "ci", "viewer", "--expires", "30")
    assert server.get("/api/schedules").status == 401
    assert ask(server, "GET", "/api/schedules", token).status == 200
    listed = server.cli("token", "list").stdout
    assert re.search(r"^ci +viewer +sz_[0-9a-f]{8}_\.\.\. +20\S+Z +20\S+Z$", listed, re.MULTILINE)
    assert token.rpartition("_")[2] not in listed
    assert server.cli("token", "revoke", "ci").returncode == 0
    refused = ask(server, "GET", "/api/schedules", token)
    assert (refused.status, refused.json()["code"]) == (401, "invalid_token")
    assert 'error="invalid_token"' in refused.headers["www-authenticate"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("create", "a b", "--role", "admin"), 1, "letters, digits"),
        (("create", "a", "--role", "root"), 2, "invalid choice"),
        (("create", "a"), 2, "--role"),
        (("create", "a", "--role", "admin", "--expires", "0"), 1, "--expires must be"),
        (("revoke", "nobody"), 1, "there is no token 'nobody'"),
        ((), 2, "COMMAND"),
    ],
)
def test_wrong_token_commands_say_what_is_wrong(
    appliance: Callable[..., Appliance], arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = appliance().cli("token", *arguments)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


def test_a_browser_logs_in_with_a_token_and_out_again(
    appliance: Callable[..., Appliance],
) -> None:
    server = appliance().run()
    token = make_token(server, "ann", "operator")
    cookie = log_in(server, token)
    session = server.request("GET", "/api/session", headers=cookie).json()
    assert (session["name"], session["role"], session["can_log_out"]) == ("ann", "operator", True)
    assert server.request("GET", "/api/schedules", headers=cookie).status == 200
    out = server.request("POST", "/api/logout", {}, cookie)
    assert "Max-Age=0" in out.headers["set-cookie"]
    assert server.request("GET", "/api/schedules", headers=cookie).status == 401


def test_a_session_survives_a_crash_of_the_server(appliance: Callable[..., Appliance]) -> None:
    server = appliance()
    token = make_token(server, "ann", "viewer")
    cookie = log_in(server.run(), token)
    server.kill()
    assert server.run().request("GET", "/api/schedules", headers=cookie).status == 200


def test_an_event_stream_ends_when_its_token_is_revoked(
    appliance: Callable[..., Appliance],
) -> None:
    server = appliance()
    token = make_token(server, "ann", "viewer")
    server.run()
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=20)
    connection.request("GET", "/api/events", headers={"Authorization": f"Bearer {token}"})
    stream = connection.getresponse()
    assert stream.status == 200
    assert server.cli("token", "revoke", "ann").returncode == 0
    stream.read()  # until its end, or the timeout fails the test
    connection.close()


def test_failed_logins_are_limited_and_recorded(appliance: Callable[..., Appliance]) -> None:
    server = appliance()
    token = make_token(server, "ann", "admin")
    server.run()
    answers = [server.post("/api/login", {"token": "sz_guess"}) for _ in range(12)]
    assert [answer.status for answer in answers] == [401] * 10 + [429] * 2
    assert int(answers[-1].headers["retry-after"]) <= 7
    assert server.post("/api/login", {"token": token}).status == 429
    refusals = [
        entry
        for entry in ask(server, "GET", "/api/audit", token).json()["entries"]
        if (entry["action"], entry["status"]) == ("log_in", 401)
    ]
    assert len(refusals) == 10
    assert {entry["address"] for entry in refusals} == {"127.0.0.1"}


def test_the_audit_says_who_did_what_and_survives_a_crash(
    appliance: Callable[..., Appliance],
) -> None:
    server = appliance()
    tokens = {role: make_token(server, f"the-{role}", role) for role in ("viewer", "admin")}
    server.headers = {"Authorization": f"Bearer {tokens['admin']}"}
    server.run().handler("Example")
    assert server.post("/api/schedule", SCHEDULE | {"schedule_id": "s"}).status == 201
    assert server.post("/api/schedules/s/pause").status == 200
    assert server.request("DELETE", "/api/schedules/none").status == 404
    assert ask(server, "DELETE", "/api/schedules/s", tokens["viewer"]).status == 403
    assert server.get("/api/schedules").status == 200

    def entries() -> list[tuple[Any, ...]]:
        names = ("actor", "address", "action", "target", "status")
        shown = server.get("/api/audit").json()["entries"]
        return [tuple(entry[name] for name in names) for entry in shown]

    expected = [
        ("the-viewer", "127.0.0.1", "delete_schedule", "/api/schedules/s", 403),
        ("the-admin", "127.0.0.1", "delete_schedule", "/api/schedules/none", 404),
        ("the-admin", "127.0.0.1", "pause_schedule", "/api/schedules/s/pause", None),
        ("the-admin", "127.0.0.1", "create_schedule", "/api/schedule", None),
    ]
    assert entries() == expected
    assert server.post("/api/schedules/s/resume").status == 200
    server.kill()
    resumed = ("the-admin", "127.0.0.1", "resume_schedule", "/api/schedules/s/resume", None)
    server.run()
    assert entries() == [resumed, *expected]


def test_the_audit_is_read_page_by_page(appliance: Callable[..., Appliance]) -> None:
    server = appliance().run()
    server.handler("Example")
    for _ in range(5):
        assert server.post("/api/run_now", CALL).status == 200
    first = server.get("/api/audit?limit=3").json()
    assert first["count"] == 3
    second = server.get(f"/api/audit?limit=3&cursor={first['next_cursor']}").json()
    numbers = [entry["number"] for page in (first, second) for entry in page["entries"]]
    assert numbers == [5, 4, 3, 2, 1]
    assert second["next_cursor"] is None


def test_an_open_deployment_makes_its_first_token_and_shows_it_once(
    appliance: Callable[..., Appliance],
) -> None:
    server = appliance(http_host="0.0.0.0", allow_insecure=True)
    started = server.cli("start")
    assert started.returncode == 0, started.stderr
    token = re.findall(r"sz_[0-9a-f]{8}_[0-9a-f]{64}", started.stdout)[0]
    kept = next(server.directory.glob("data/*/admin-token"))
    assert kept.read_text().strip() == token
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert server.get("/api/schedules").status == 401
    assert ask(server, "GET", "/api/schedules", token).status == 200
    (warning,) = server.get("/api/health").json()["warnings"]
    assert warning.startswith("allow_insecure: ")
    again = server.cli("restart")
    assert again.returncode == 0
    assert "sz_" not in again.stdout
    logs = "".join(path.read_text() for path in server.directory.glob("logs/**/*.log"))
    assert token not in logs and "sz_" not in logs


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_address_without_tls_does_not_start(
    appliance: Callable[..., Appliance], host: str
) -> None:
    server = appliance(http_host=host)
    started = server.cli("start")
    assert started.returncode == 78
    assert f"http_host: {host} is open to other machines" in started.stderr
    assert not list(server.directory.glob("data/*/admin-token"))


def test_a_token_is_in_no_log_and_no_answer(appliance: Callable[..., Appliance]) -> None:
    server = appliance(log_level="DEBUG")
    token = make_token(server, "ann", "admin")
    server.run()
    cookie = log_in(server, token)
    wrong = "sz_00000000_" + "5" * 64
    bodies = [
        ask(server, "GET", path, token).body
        for path in (
            "/api/config",
            "/api/audit",
            "/api/session",
            "/api/health",
            "/api/openapi.json",
        )
    ]
    bodies.append(ask(server, "GET", "/api/schedules", wrong).body)
    bodies.append(server.post("/api/login", {"token": wrong}).body)
    bodies.append(server.post("/api/login", {"token": [wrong]}).body)
    bodies.append(server.request("GET", f"/api/{wrong}x?token={wrong}", headers=cookie).body)
    assert server.stop() == 0
    secrets = [token.rpartition("_")[2], cookie["Cookie"].rpartition("_")[2]]
    logs = server.output + "".join(p.read_text() for p in server.directory.glob("logs/**/*.log"))
    for secret in secrets:
        assert secret not in logs
        assert all(secret.encode() not in body for body in bodies)
    assert wrong not in logs
    assert wrong.encode() not in b"".join(bodies[:-1])
