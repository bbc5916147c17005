"""HTTPS of a real server: what it speaks, the certificate it shows, and wrong files."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schedulezero as sz
from appliance import Appliance, wait_for

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")


def make_certificate(directory: Path, name: str = "server") -> dict[str, str]:
    """A self-signed certificate for localhost; the two settings that name its files."""
    paths = {key: str(directory / f"{name}-{key}.pem") for key in ("tls_cert", "tls_key")}
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost",
        "-keyout", paths["tls_key"], "-out", paths["tls_cert"],
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return paths


class Client:
    """Speaks HTTPS to a server whose certificate it knows."""

    def __init__(self, server: Appliance, paths: dict[str, str]) -> None:
        self.port = server.http_port
        self.context = ssl.create_default_context(cafile=paths["tls_cert"])

    def connect(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        return self.context.wrap_socket(plain, server_hostname="localhost")

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, http.client.HTTPResponse]:
        with contextlib.closing(
            http.client.HTTPSConnection("localhost", self.port, timeout=10, context=self.context)
        ) as connection:
            given = {"Content-Type": "application/json"} if body is not None else {}
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, given | headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), answer


@pytest.fixture
def started(appliance: Callable[..., Appliance], tmp_path: Path) -> Any:
    """An appliance that runs in the background over TLS, and its client."""
    paths = make_certificate(tmp_path)
    server = appliance(**paths)
    result = server.cli("start")  # waits for health, over TLS as well
    assert result.returncode == 0, result.stderr
    assert f"https://127.0.0.1:{server.http_port}" in result.stdout
    return server, Client(server, paths)


def test_the_api_answers_over_tls_and_cookies_stay_there(started: Any) -> None:
    server, client = started
    assert client.ask("GET", "/api/health")[0] == 200
    token = server.cli("token", "create", "ann", "--role", "viewer").stdout.strip()
    status, session, answer = client.ask("POST", "/api/login", {"token": token})
    assert (status, session["role"]) == (200, "viewer")
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith("__Host-") and cookie.endswith("; Secure")
    assert client.ask("GET", "/api/session", Cookie=cookie.partition(";")[0])[1]["name"] == "ann"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
def test_only_modern_tls_is_spoken(started: Any) -> None:
    _, client = started
    with client.connect() as connection:
        assert connection.version() == "TLSv1.3"
    client.context.maximum_version = ssl.TLSVersion.TLSv1_2
    with client.connect() as connection:
        assert connection.version() == "TLSv1.2"
        cipher = (connection.cipher() or ("",))[0]
        assert cipher.startswith("ECDHE-") and ("GCM" in cipher or "POLY1305" in cipher)
    client.context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    client.context.maximum_version = ssl.TLSVersion.TLSv1_1
    client.context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        client.connect()


def test_plain_http_to_a_tls_port_is_dropped(started: Any) -> None:
    server, client = started
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=10) as connection:
        connection.sendall(b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"HTTP/1.1" not in connection.recv(100)
    assert client.ask("GET", "/api/health")[0] == 200


def test_connections_that_never_shake_hands_are_bounded_and_do_not_keep_others_out(
    started: Any,
) -> None:
    server, client = started
    with contextlib.ExitStack() as silent:
        for _ in range(450):
            silent.enter_context(socket.create_connection(("127.0.0.1", server.http_port)))
        assert client.ask("GET", "/api/health")[0] == 200
        for _ in range(150):
            silent.enter_context(socket.create_connection(("127.0.0.1", server.http_port)))
        with pytest.raises(OSError, match=r"."):
            client.ask("GET", "/api/health")

    def is_served() -> bool:
        with contextlib.suppress(OSError):
            return client.ask("GET", "/api/health")[0] == 200
        return False

    wait_for(is_served, "the server to take connections again")


def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(started: Any) -> None:
    _, client = started
    ask = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    for _ in range(20):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client.context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    connection.sendall(outgoing.read())
                    incoming.write(connection.recv(65_536))
            tls.write(ask)
            connection.sendall(outgoing.read())  # the last flight and the request as one
            while (data := connection.recv(65_536)) and b"200 OK" not in _read(tls, incoming, data):
                pass
            assert data


def _read(tls: ssl.SSLObject, incoming: ssl.MemoryBIO, data: bytes) -> bytes:
    incoming.write(data)
    with contextlib.suppress(ssl.SSLWantReadError):
        return tls.read(65_536)
    return b""


def test_a_renewed_certificate_is_used_after_a_reload_and_old_connections_go_on(
    started: Any, tmp_path: Path
) -> None:
    server, client = started
    with client.connect() as old:
        renewed = make_certificate(tmp_path, "renewed")
        for key, path in renewed.items():
            shutil.copy(path, server.settings[key])
        assert server.cli("reload").returncode == 0

        def shows_the_new_one() -> bool:
            with contextlib.suppress(ssl.SSLError):
                return Client(server, renewed).ask("GET", "/api/health")[0] == 200
            return False

        wait_for(shows_the_new_one, "the renewed certificate")
        old.sendall(b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in b"".join(iter(lambda: old.recv(4_096), b""))


def test_a_reload_with_a_wrong_certificate_changes_nothing(started: Any, tmp_path: Path) -> None:
    server, client = started
    shutil.copy(make_certificate(tmp_path, "other")["tls_key"], server.settings["tls_key"])
    reloaded = server.cli("reload")
    assert reloaded.returncode == 78
    assert "tls_key" in reloaded.stderr and "is not the key of tls_cert" in reloaded.stderr
    assert client.ask("GET", "/api/health")[0] == 200


def make_contexts(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's, and that of a client which trusts it."""
    paths = make_certificate(directory)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(paths["tls_cert"], paths["tls_key"])
    return context, ssl.create_default_context(cafile=paths["tls_cert"])


def test_requests_of_a_client_that_has_left_are_not_answered_over_tls(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context, trusting = make_contexts(tmp_path)

    async def test() -> None:
        server = sz.HttpServer(lambda request: sz.Response(200), clock=sz.Clock())
        await server.start("127.0.0.1", 0, context)
        for end in ("abort", "half a close") * 3:
            _, rude = await asyncio.open_connection("localhost", server.port, ssl=trusting)
            rude.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
            if end == "abort":
                rude.transport.abort()
            else:
                rude.get_extra_info("socket").shutdown(socket.SHUT_WR)
            while server._connections:
                await asyncio.sleep(0.005)
        await server.close(0)

    asyncio.run(asyncio.wait_for(test(), 20))
    assert [each.message for each in caplog.records if each.name == "asyncio"] == []


def test_answers_that_are_not_taken_over_tls_are_bounded_for_all_clients_together(
    tmp_path: Path,
) -> None:
    context, trusting = make_contexts(tmp_path)
    statuses: list[int] = []

    async def test() -> None:
        limits = sz.HttpLimits(max_held_bytes=24 << 20)
        large = sz.Response(200, bytes(8 << 20))
        server = sz.HttpServer(lambda request: large, clock=sz.Clock(), limits=limits)
        server.answered = lambda method, route, status: statuses.append(status)
        await server.start("127.0.0.1", 0, context)
        clients = []
        for asked in range(1, 6):
            clients.append(await asyncio.open_connection("localhost", server.port, ssl=trusting))
            lazy = clients[-1][1]
            lazy.transport.pause_reading()
            lazy.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while len(statuses) < asked:
                await asyncio.sleep(0.005)
        assert sum(each.held_bytes for each in server._connections) < 24 << 20
        await server.close(0)

    asyncio.run(asyncio.wait_for(test(), 20))
    assert statuses[0] == 200 and statuses[-1] == 503


def test_an_event_stream_runs_over_tls_until_the_server_stops(started: Any) -> None:
    server, client = started
    with client.connect() as connection:
        connection.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        stream = connection.makefile("rb")
        assert b"200 OK" in stream.readline()
        assert server.cli("stop").returncode == 0
        stream.read()


def test_a_client_that_never_shakes_hands_does_not_hold_up_the_stop(started: Any) -> None:
    server, client = started
    with socket.create_connection(("127.0.0.1", server.http_port)):
        assert client.ask("GET", "/api/health")[0] == 200  # accepted after the silent one
        assert server.cli("stop").returncode == 0
    logs = "".join(path.read_text() for path in server.directory.glob("logs/**/*.log"))
    assert "closing 1 connections in progress" not in logs


def test_an_open_address_with_tls_starts_with_a_token_of_its_own(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    paths = make_certificate(tmp_path)
    server = appliance(http_host="0.0.0.0", **paths)
    result = server.cli("start")
    assert result.returncode == 0, result.stderr
    client = Client(server, paths)
    assert client.ask("GET", "/api/schedules")[0] == 401
    token = next(server.directory.glob("data/*/admin-token")).read_text().strip()
    assert token in result.stdout
    assert client.ask("GET", "/api/schedules", Authorization=f"Bearer {token}")[0] == 200
    assert client.ask("GET", "/api/health")[1]["warnings"] == []


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("missing", "tls_cert", "cannot read"),
        ("no PEM", "tls_cert", "is not in PEM format"),
        ("garbage", "tls_cert", "holds no certificate"),
        ("another key", "tls_key", "is not the key of tls_cert"),
        ("an encrypted key", "tls_key", "is not usable with tls_cert"),
    ],
)
def test_wrong_files_are_refused_with_key_and_line(
    appliance: Callable[..., Appliance], tmp_path: Path, name: str, key: str, said: str
) -> None:
    paths = make_certificate(tmp_path)
    if name == "missing":
        Path(paths["tls_cert"]).unlink()
    elif name == "no PEM":
        Path(paths["tls_cert"]).write_bytes(b"\x30\x82\x01\x0a")
    elif name == "garbage":
        Path(paths["tls_cert"]).write_text("-----BEGIN CERTIFICATE-----\nxx\n")
    elif name == "another key":
        shutil.copy(make_certificate(tmp_path, "other")["tls_key"], paths["tls_key"])
    else:
        command = ["openssl", "pkey", "-in", paths["tls_key"], "-aes256", "-passout", "pass:x"]
        encrypted = subprocess.run(command, check=True, capture_output=True).stdout
        Path(paths["tls_key"]).write_bytes(encrypted)
    checked = appliance(**paths).cli("check")
    assert checked.returncode == 78
    assert f"config.yaml line 1: {key}: " in checked.stderr, checked.stderr
    assert said in checked.stderr, checked.stderr


def test_a_hangup_reloads_the_certificate_of_a_server_alone(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    paths = make_certificate(tmp_path)
    server = appliance(**paths)
    client = Client(server, paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "wait_healthy", lambda: None)
        server.run()

    def is_healthy() -> bool:
        with contextlib.suppress(OSError):
            return client.ask("GET", "/api/health")[0] == 200
        return False

    wait_for(is_healthy, "a healthy server")
    renewed = make_certificate(tmp_path, "renewed")
    for key, path in renewed.items():
        shutil.copy(path, paths[key])
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGHUP)
    client = Client(server, renewed)
    wait_for(is_healthy, "the renewed certificate")
