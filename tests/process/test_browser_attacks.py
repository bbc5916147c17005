"""What a hostile web page, a rebound name and hostile bytes get from a real server."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from appliance import Answer, Appliance, wait_for

CALL = {"handler_id": "example", "method_name": "add", "job_params": {"a": 1, "b": 2}}
EVIL = "https://evil.example"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """One open server of the loopback address for all that is refused anyway."""
    made = Appliance(tmp_path_factory.mktemp("attacked") / "appliance")
    yield made.run()
    made.close()


def refused(answer: Answer) -> tuple[int, str]:
    assert answer.json()["status"] == "error"
    return answer.status, answer.json()["code"]


def exchange(port: int, data: bytes) -> bytes:
    """Send bytes and read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


# Rebinding


@pytest.mark.parametrize("path", ["/", "/main.js", "/api/health", "/api/schedules", "/metrics"])
def test_a_rebound_name_gets_nothing(server: Appliance, path: str) -> None:
    answer = server.request("GET", path, headers={"Host": f"evil.example:{server.http_port}"})
    assert refused(answer) == (421, "misdirected_request")
    assert "allowed_hosts" in answer.json()["error"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]:1234"])
def test_the_loopback_names_are_served(server: Appliance, host: str) -> None:
    assert server.request("GET", "/api/health", headers={"Host": host}).status == 200


# Other sites


@pytest.mark.parametrize(
    "headers",
    [{"Origin": EVIL}, {"Origin": "null"}, {"Origin": "http://localhost:3000"},
     {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}],
)  # fmt: skip
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/api/run_now"), ("POST", "/api/schedule"), ("DELETE", "/api/schedules/s"),
     ("PATCH", "/api/schedules/s"), ("POST", "/api/login"), ("POST", "/api/logout")],
)  # fmt: skip
def test_a_page_of_another_site_changes_nothing(
    server: Appliance, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = server.request(method, path, CALL, headers)
    assert refused(answer) == (403, "cross_site")
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""],
)
def test_a_form_changes_nothing(server: Appliance, content_type: str) -> None:
    """What a browser sends across sites without asking, and without Origin in old ones."""
    answer = server.request("POST", "/api/run_now", CALL, {"Content-Type": content_type})
    assert refused(answer) == (415, "unsupported_media_type")


def test_a_websocket_of_another_site_is_refused(server: Appliance) -> None:
    handshake = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Origin": EVIL,
    }
    assert refused(server.request("GET", "/api/ws", headers=handshake)) == (403, "cross_site")


def test_another_site_gets_no_permission_to_read(server: Appliance) -> None:
    preflight = {"Origin": EVIL, "Access-Control-Request-Method": "POST"}
    answers = [
        server.request("OPTIONS", "/api/run_now", headers=preflight),
        server.request("GET", "/api/schedules", headers={"Origin": EVIL}),
    ]
    assert answers[0].status == 403
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_configured_origin_may_use_the_api_with_a_token(
    appliance: Callable[..., Appliance],
) -> None:
    origin = "https://tools.example.org"
    server = appliance(cors_origins=[origin])
    made = server.cli("token", "create", "tools", "--role", "viewer")
    server.run()
    theirs = {"Origin": origin, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    preflight = server.request(
        "OPTIONS", "/api/schedules", headers={**theirs, "Access-Control-Request-Method": "GET"}
    )
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == origin
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in preflight.headers
    answer = server.request(
        "GET",
        "/api/schedules",
        headers={**theirs, "Authorization": f"Bearer {made.stdout.strip()}"},
    )
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, origin)
    assert answer.headers["vary"] == "Origin"
    assert server.request("GET", "/api/schedules", headers=theirs).status == 401
    other = server.request("POST", "/api/login", {}, {"Origin": "https://tools.example.org.evil"})
    assert refused(other) == (403, "cross_site")


def test_every_answer_forbids_framing_guessing_and_telling(server: Appliance) -> None:
    paths = ("/", "/api/health", "/api/nope", "/nope", "/api/openapi.json", "/metrics")
    for path in paths:
        headers = server.get(path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
        assert "default-src 'self'" in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["referrer-policy"] == "no-referrer", path
        expected = "no-cache" if path == "/" else "no-store"
        assert headers["cache-control"] == expected, path


# Hostile bytes


@pytest.mark.parametrize(
    "path",
    [
        "/../schedulezero.py",
        "/static/../schedulezero.py",
        "/..%2fschedulezero.py",
        "/%2e%2e/schedulezero.py",
        "/%2e%2e%2fschedulezero.py",
        "/..%5cschedulezero.py",
        "/....//schedulezero.py",
        "/..;/schedulezero.py",
        "/%252e%252e%252fschedulezero.py",
        "/%c0%ae%c0%ae/schedulezero.py",
        "/main.js%00.html",
        "/./main.js/../../schedulezero.py",
        "//etc/passwd",
        "/\\..\\schedulezero.py",
        "/api/../../etc/passwd",
        "/api/schedules/..%2f..%2fconfig",
        "/data/default/tokens.json",
        "/.git/config",
        "/main.js/",
        "/MAIN.JS",
    ],
)
def test_no_path_leads_out_of_the_dashboard(server: Appliance, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(server.http_port, request.encode())
    assert answer.split(b" ", 2)[1] in (b"400", b"404"), answer[:200]
    assert b"root:" not in answer and b"import " not in answer


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("two lengths", "Content-Length: 2\r\nContent-Length: 2\r\n"),
        ("two different lengths", "Content-Length: 2\r\nContent-Length: 3\r\n"),
        ("a list of lengths", "Content-Length: 2, 2\r\n"),
        ("length and chunks", "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n"),
        ("chunks and length", "Transfer-Encoding: chunked\r\nContent-Length: 2\r\n"),
        ("hidden chunks", "Transfer-Encoding: xchunked\r\n"),
        ("chunks", "Transfer-Encoding: chunked\r\n"),
        ("tabbed chunks", "Transfer-Encoding:\tchunked\r\nContent-Length: 2\r\n"),
        ("a plus", "Content-Length: +2\r\n"),
        ("an underscore", "Content-Length: 0_2\r\n"),
        ("arabic digits", "Content-Length: ٢\r\n"),
        ("hexadecimal", "Content-Length: 0x2\r\n"),
        ("a negative", "Content-Length: -2\r\n"),
        ("a bare LF", "A: b\nContent-Length: 2\r\n"),
        ("folding", "A: b\r\n c\r\nContent-Length: 2\r\n"),
        ("NUL", "A: \0\r\nContent-Length: 2\r\n"),
        ("a space before the colon", "Content-Length : 2\r\n"),
        ("two hosts", "Host: evil.example\r\nContent-Length: 2\r\n"),
    ],
)
def test_what_two_parsers_could_read_in_two_ways_ends_the_connection(
    server: Appliance, name: str, head: str
) -> None:
    request = f"POST /api/triggers/preview HTTP/1.1\r\nHost: localhost\r\n{head}\r\n{{}}"
    smuggled = "GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = exchange(server.http_port, (request + smuggled).encode())
    assert answer.count(b"HTTP/1.1 ") == 1, name
    assert answer.split(b" ", 2)[1] in (b"400", b"411", b"501"), name
    assert b"Connection: close" in answer


@pytest.mark.parametrize(
    "target",
    ["http://evil.example/api/health", "evil.example:443", "*", "//evil.example/api/health"],
)
def test_a_target_that_is_no_path_reaches_nothing(server: Appliance, target: str) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert exchange(server.http_port, request.encode()).split(b" ", 2)[1] in (b"400", b"404")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[" * 100_000, "nested deeper"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested deeper"),
        (b'{"handler_id":NaN}', "NaN is not JSON"),
        (b'{"handler_id":1e999}', "too large"),
        (b'{"handler_id":9223372036854775808}', "64 bits"),
        (b'{"handler_id":"a","handler_id":"b"}', "given twice"),
        (b'{"handler_id":"\\ud800"}', "surrogate"),
        ('{"handler_id":"a"}'.encode("utf-16"), "not UTF-8"),
        (b'\xef\xbb\xbf{"handler_id":"a"}', "not JSON"),
        (b"1" * 100_000, "64 bits"),
    ],
)
def test_json_that_readers_disagree_on_is_400(server: Appliance, body: bytes, said: str) -> None:
    answer = server.request("POST", "/api/run_now", body, {"Content-Type": "application/json"})
    assert answer.status == 400
    assert said in answer.json()["error"]


def test_nothing_a_client_sends_forges_a_line_of_the_log(
    appliance: Callable[..., Appliance],
) -> None:
    server = appliance(log_level="DEBUG").run()
    forged = "2026-01-01T00:00:00.000Z CRITICAL forged"
    texts = [f"\r\n{forged}", f"\x1b[2J{forged}", f"\u2028{forged}", f"\x85{forged}"]
    for text in texts:
        body = {"handler_id": text, "method_name": text, "job_params": {}}
        assert server.post("/api/run_now", body).status == 400
        assert server.post("/api/login", {"token": text}).status == 401
        assert server.post("/api/schedule", {**body, "name": text}).status == 400
    for escape in ("%0d%0a", "%1b", "%e2%80%a8", "%c2%85"):
        server.get(f"/api/schedules/{escape}{forged.replace(' ', '%20')}")
    server.stop()
    logs = server.output + "".join(p.read_text() for p in server.directory.glob("logs/**/*.log"))
    assert not [line for line in logs.splitlines() if line.startswith(forged[:40])]
    assert "\x1b" not in logs


def memory_kib(pid: int) -> int:
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return int(fields["VmRSS"].split()[0])


def test_a_thousand_connections_of_garbage_leave_memory_and_service_as_they_were(
    server: Appliance,
) -> None:
    assert server.process is not None
    garbage = [b"\x16\x03\x01" + bytes(range(256)), b"GET / HTTP/9.9\r\n\r\n", b"\0" * 4_096,
               b"POST /api/login HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"]  # fmt: skip
    for number in range(200):
        exchange(server.http_port, garbage[number % 4])
    before = memory_kib(server.process.pid)
    for number in range(1_000):
        exchange(server.http_port, garbage[number % 4])
    assert server.get("/api/health").status == 200
    wait_for(lambda: memory_kib(server.process.pid) < before + 4_096, "memory to be as before")


def test_failures_from_the_loopback_address_do_not_lock_out_programs_with_a_token(
    appliance: Callable[..., Appliance],
) -> None:
    server = appliance()
    token = server.cli("token", "create", "ci", "--role", "viewer").stdout.strip()
    server.run()

    def ask(credential: str) -> Any:
        return server.request(
            "GET", "/api/schedules", None, {"Authorization": f"Bearer {credential}"}
        )

    assert {ask("sz_wrong").status for _ in range(20)} == {401, 429}
    assert ask(token).status == 200
