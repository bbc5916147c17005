"""Who is let in on the handlers' port, as whom, and what a job's secrets are shown to."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import schedulezero as sz
import zmq
import zmq.asyncio
from apparatus import WITHIN_S, DialIn, Plain, Server, until
from schedulezero import HandlerKey, KeyPair, RetryPolicy, Status

pytestmark = pytest.mark.anyio
ONCE = RetryPolicy(max_attempts=1)
PASSWORD = "correct horse battery"


@pytest.fixture
def context() -> Iterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    yield context
    context.destroy(0)


@contextmanager
def opened(tmp_path: Path, **config: Any) -> Iterator[Server]:
    server = Server(tmp_path / "sz.db", data_dir=str(tmp_path), **config)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
async def server(tmp_path: Path, context: zmq.asyncio.Context) -> AsyncIterator[Server]:
    with opened(tmp_path, zmq_security="curve") as server:
        yield server


@pytest.fixture
async def open_server(tmp_path: Path, context: zmq.asyncio.Context) -> AsyncIterator[Server]:
    """One without encryption, as on the loopback address."""
    with opened(tmp_path) as server:
        yield server


def enrol(server: Server, handler_id: str) -> KeyPair:
    """As `handler-key create` does, in another process."""
    pair = sz.make_keypair()
    keys = sz.KeyFile(server.config)
    keys.change(lambda now: now.enrol(HandlerKey(handler_id, pair.public, 1)))
    return pair


def encrypt(socket: zmq.Socket[Any], server: Server, pair: KeyPair) -> None:
    assert server.gateway.pair is not None
    socket.curve_serverkey = server.gateway.pair.public.encode()
    socket.curve_publickey = pair.public.encode()
    socket.curve_secretkey = pair.secret.encode()


class Encrypted(DialIn):
    """A dial-in handler with a key."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        server: Server,
        pair: KeyPair,
        handler_id: str = "worker",
        identity: bytes = b"",
        **said: Any,
    ) -> None:
        self._server, self._pair, self._identity = server, pair, identity
        super().__init__(context, server.endpoint, handler_id, **said)

    def connect(self) -> None:
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if self._identity:
            self.socket.setsockopt(zmq.ROUTING_ID, self._identity)
        encrypt(self.socket, self._server, self._pair)
        self.events = self.socket.get_monitor_socket()
        self.socket.connect(self._endpoint)

    async def event(self, wanted: int) -> None:
        async with asyncio.timeout(WITHIN_S):
            while True:
                frames = await self.events.recv_multipart()
                if struct.unpack("=hi", frames[0])[0] == wanted:
                    return


@asynccontextmanager
async def enrolled(
    context: zmq.asyncio.Context, server: Server, handler_id: str = "worker"
) -> AsyncIterator[Encrypted]:
    handler = Encrypted(context, server, enrol(server, handler_id), handler_id)
    assert (await handler.register())["success"] is True
    yield handler


# Who gets in


async def test_an_enrolled_handler_is_called_over_an_encrypted_link(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with enrolled(context, server) as handler:
        execution_id = await server.submit()
        await handler.succeed(await handler.call(), "done")
        assert (await server.ended(execution_id)).result == "done"
        assert server.gateway.registry.of("worker")[0].is_private


async def test_a_key_nobody_enrolled_is_refused_in_the_handshake(
    server: Server, context: zmq.asyncio.Context
) -> None:
    handler = Encrypted(context, server, sz.make_keypair())
    await handler.event(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    assert server.gateway.handler("worker") is None


async def test_a_key_enrolled_while_the_server_runs_counts_at_once(
    server: Server, context: zmq.asyncio.Context
) -> None:
    pair = sz.make_keypair()
    handler = Encrypted(context, server, pair)
    await handler.event(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    sz.KeyFile(server.config).change(lambda now: now.enrol(HandlerKey("worker", pair.public, 1)))
    assert (await handler.reconnect())["status"] == "registered"


async def test_without_encryption_nobody_is_heard(
    server: Server, context: zmq.asyncio.Context
) -> None:
    handler = DialIn(context, server.endpoint, "worker")
    await handler.request("register", **handler.profile)
    async with enrolled(context, server, "other") as other:
        await other.request("ping")
        await other.take(lambda m: m.get("reply_to") == "ping")
    assert server.gateway.handler("worker") is None
    with pytest.raises(zmq.Again):
        await handler.socket.recv(zmq.NOBLOCK)


async def test_a_name_is_bound_to_its_key_and_the_refusal_says_so(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with enrolled(context, server, "worker") as worker:
        intruder = Encrypted(context, server, enrol(server, "other"), "worker", instance="two")
        refused = await intruder.register()
        assert refused["code"] == "not_allowed"
        assert "is enrolled for 'other', not for 'worker'" in refused["error"]
        assert len(server.gateway.registry.of("worker")) == 1
        await intruder.request("report_status", handler_id="worker", status="offline")
        answer = await intruder.take(lambda m: m.get("reply_to") == "report_status")
        assert answer["code"] == "not_allowed"
        assert not await worker.has_no_call(server) or server.handler_status() == "Connected"


async def test_a_registered_connection_cannot_take_another_name(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with enrolled(context, server) as handler:
        handler.profile["handler_id"] = "other"
        assert (await handler.register())["code"] == "not_allowed"
        assert server.handler_status("worker") == "Connected"


async def test_a_routing_id_of_ones_own_choice_is_refused(
    server: Server, open_server: Server, context: zmq.asyncio.Context
) -> None:
    pair = enrol(server, "worker")
    refused = await Encrypted(context, server, pair, identity=b"worker").register()
    assert refused["code"] == "not_allowed"
    assert "identity" in refused["error"]
    claimant = DialIn(context, open_server.endpoint, "worker")
    claimant.socket.close(0)
    claimant.socket = context.socket(zmq.DEALER)
    claimant.socket.setsockopt(zmq.ROUTING_ID, b"\x01claimed")
    claimant.socket.connect(open_server.endpoint)
    assert (await claimant.register())["code"] == "not_allowed"


async def test_a_forged_routing_id_neither_speaks_nor_hears_for_another(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with enrolled(context, server) as handler:
        instance = server.gateway.registry.of("worker")[0]
        execution_id = await server.submit()
        call = await handler.call()
        handler.socket.close(0)
        await until(lambda: instance.unreachable)
        assert isinstance(instance.route, bytes)
        forger = Encrypted(context, server, enrol(server, "other"), identity=instance.route)
        await forger.succeed(call, "forged")
        await forger.request("heartbeat", **handler.profile)
        await server.submit()
        await forger.request("ping")
        for _ in range(3):
            await forger.take(lambda m: m.get("code") == "bad_message")
        with pytest.raises(zmq.Again):
            await forger.socket.recv(zmq.NOBLOCK)
        assert instance.unreachable
        assert server.status(execution_id) is Status.RUNNING


async def test_a_revoked_handler_is_gone_with_what_it_ran_and_does_not_come_back(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with enrolled(context, server) as handler:
        execution_id = await server.submit(retry=ONCE)
        await handler.call()
        sz.KeyFile(server.config).change(lambda keys: keys.revoke("worker"))
        assert (await server.ended(execution_id)).status is Status.LOST
        await handler.event(zmq.EVENT_DISCONNECTED)
        await handler.event(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        assert server.handler_status() == "Disconnected"


async def test_revoking_one_leaves_the_others_alone(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with enrolled(context, server, "one"), enrolled(context, server, "two") as two:
        execution_id = await server.submit("two")
        call = await two.call()
        sz.KeyFile(server.config).change(lambda keys: keys.revoke("one"))
        await until(lambda: server.handler_status("one") == "Disconnected")
        await two.succeed(call, 2)
        assert (await server.ended(execution_id)).result == 2


async def test_a_damaged_key_file_lets_nobody_new_in_and_ends_nobody(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with enrolled(context, server) as handler:
        path = Path(server.config.data_dir) / sz.KEYS_FILE
        text = path.read_text()
        path.write_text("{")
        newcomer = Encrypted(context, server, sz.make_keypair(), "new")
        await newcomer.event(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        assert (await handler.reconnect())["success"] is True  # it is not new
        execution_id = await server.submit()
        await handler.succeed(await handler.call(), 1)
        assert (await server.ended(execution_id)).status is Status.SUCCESS
        path.write_text(text)


# Plain handlers


class EncryptedPlain(Plain):
    """A plain handler that uses its key both ways: as client to register, as server to serve."""

    def __init__(self, context: zmq.asyncio.Context, server: Server, pair: KeyPair) -> None:
        super().__init__(context, "worker")
        self.socket.close(0)
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.curve_server = True
        self.socket.curve_secretkey = pair.secret.encode()
        self.socket.bind("tcp://127.0.0.1:*")
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._server, self._pair = server, pair

    async def tell(self, endpoint: str, method: str, **params: Any) -> dict[str, Any]:
        with self._context.socket(zmq.REQ) as asking:
            asking.setsockopt(zmq.LINGER, 0)
            encrypt(asking, self._server, self._pair)
            asking.connect(endpoint)
            await asking.send(json.dumps({"method": method, "params": params}).encode())
            async with asyncio.timeout(WITHIN_S):
                reply: dict[str, Any] = json.loads(await asking.recv())
        return reply


async def test_a_plain_handler_is_called_encrypted_with_the_key_it_registered_with(
    server: Server, context: zmq.asyncio.Context
) -> None:
    handler = EncryptedPlain(context, server, enrol(server, "worker"))
    assert (await handler.register(server.endpoint))["status"] == "registered"
    execution_id = await server.submit()
    await handler.call()
    await handler.answer(success=True, result=7)
    assert (await server.ended(execution_id)).result == 7
    assert server.gateway.registry.of("worker")[0].is_private


async def test_a_plain_handler_with_a_key_is_found_again_by_the_next_server(
    tmp_path: Path, context: zmq.asyncio.Context
) -> None:
    with opened(tmp_path, zmq_security="curve") as first:
        handler = EncryptedPlain(context, first, enrol(first, "worker"))
        await handler.register(first.endpoint)
    with opened(tmp_path, zmq_security="curve") as second:
        execution_id = await second.submit()
        await handler.call()
        await handler.answer(success=True, result=8)
        assert (await second.ended(execution_id)).result == 8


@pytest.mark.parametrize(
    "address", ["tcp://169.254.169.254:80", "tcp://10.0.0.9:5000", "tcp://[fd00::1]:5000"]
)
async def test_the_server_connects_to_no_address_outside_the_allowed_networks(
    open_server: Server, context: zmq.asyncio.Context, address: str
) -> None:
    handler = Plain(context, "worker")
    handler.address = address
    refused = await handler.register(open_server.endpoint)
    assert refused["code"] == "not_allowed"
    assert "callback_networks" in refused["error"]
    assert open_server.gateway.handler("worker") is None


async def test_a_host_name_is_looked_up_beside_the_loop_and_then_checked_like_an_address(
    open_server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answer = ["127.0.0.1"]

    async def getaddrinfo(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        if not answer:
            raise OSError("no such host")
        return [(2, 1, 6, "", (answer[0], 0))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    handler = Plain(context, "worker")
    port = handler.address.rpartition(":")[2]
    handler.address = f"tcp://worker.example:{port}"
    assert (await handler.register(open_server.endpoint))["status"] == "registered"
    execution_id = await open_server.submit()
    await handler.call()
    await handler.answer(success=True, result=9)
    assert (await open_server.ended(execution_id)).result == 9
    answer[0] = "93.184.216.34"
    assert (await handler.register(open_server.endpoint))["code"] == "not_allowed"
    answer.clear()
    assert "not found" in (await handler.register(open_server.endpoint))["error"]
    assert asked == ["worker.example"] * 3


# The handler secret


async def test_a_handler_secret_is_demanded_where_one_is_set(
    tmp_path: Path, context: zmq.asyncio.Context
) -> None:
    with opened(tmp_path, handler_secret=PASSWORD) as server:
        handler = DialIn(context, server.endpoint, "worker")
        for wrong in ({}, {"secret": "guess"}, {"secret": None}, {"secret": [PASSWORD]}):
            refused = await handler.register(**wrong)
            assert refused["code"] == "not_allowed"
            assert PASSWORD not in refused["error"]
        assert (await handler.register(secret=PASSWORD))["status"] == "registered"
        stranger = Plain(context, "worker")
        told = await stranger.tell(
            server.endpoint, "report_status", handler_id="worker", status="offline"
        )
        assert told["code"] == "not_allowed"
        assert server.handler_status() == "Connected"


# Hostile messages


async def test_what_is_no_message_is_refused_and_the_next_one_read(
    open_server: Server, context: zmq.asyncio.Context
) -> None:
    handler = DialIn(context, open_server.endpoint, "worker")
    await handler.register()
    hostile: list[list[bytes]] = [
        [b"", b"\xff\xfe"],
        [b"", b"{"],
        [b"", b"[" * 100_000],
        [b"", b'{"method":"ping","params":' + b'{"a":' * 70 + b"1" + b"}" * 71],
        [b"", b'{"method":"ping","method":"ping"}'],
        [b"", b'{"method":"ping","params":{"x":NaN}}'],
        [b"", b'{"method":{"a":1}}'],
        [b"", b'{"method":"ping","params":[]}'],
        [b"", b'{"id":"x"}'],
        [b"", '{"method":"ping"}'.encode("utf-16")],
        [b"x", b'{"method":"ping"}'],
        [b"", b'{"method":"ping"}', b""],
        [b""] * 5_000,
    ]
    for frames in hostile:
        await handler.socket.send_multipart(frames)
        await handler.take(lambda m: m.get("code") == "bad_message")
    await handler.request("ping")
    await handler.take(lambda m: m.get("reply_to") == "ping")
    assert open_server.gateway.malformed == len(hostile)


async def test_a_flood_of_one_handler_holds_up_no_other(
    open_server: Server, context: zmq.asyncio.Context
) -> None:
    steady = DialIn(context, open_server.endpoint, "steady")
    await steady.register()
    with zmq.Context() as hostile, hostile.socket(zmq.DEALER) as flood:
        flood.setsockopt(zmq.LINGER, 0)
        flood.setsockopt(zmq.SNDHWM, 100)
        flood.connect(open_server.endpoint)
        body = json.dumps({"method": "progress", "params": {"id": "x:1", "percent": 1}}).encode()
        over = asyncio.Event()

        def pour() -> None:
            while not over.is_set():
                try:
                    flood.send_multipart([b"", body], zmq.NOBLOCK)
                except zmq.Again:
                    flood.poll(10, zmq.POLLOUT)

        pouring = asyncio.create_task(asyncio.to_thread(pour))
        try:
            for number in range(30):
                execution_id = await open_server.submit("steady")
                await steady.succeed(await steady.call(), number)
                assert (await open_server.ended(execution_id)).result == number
            await until(lambda: open_server.gateway.malformed > 0)
        finally:
            over.set()
            await pouring


async def test_a_handler_cannot_forge_lines_of_a_log(
    open_server: Server, context: zmq.asyncio.Context
) -> None:
    handler = DialIn(context, open_server.endpoint, "worker")
    await handler.register()
    execution_id = await open_server.submit()
    call = await handler.call()
    forged = "a\r\n2030-01-01T00:00:00Z stdout forged\x1b[2J\u2028b\tc"
    await handler.request("log", id=call["id"], lines=[[1, "stdout\nx", forged]])
    await handler.succeed(call)
    await open_server.ended(execution_id)
    log = open_server.store.log(execution_id)
    assert log is not None
    assert log.count("\n") == 1
    assert "\x1b" not in log
    assert "\u2028" not in log
    assert "a\\r\\n2030" in log


async def test_logs_and_progress_without_end_are_counted_not_passed_on(
    open_server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "LOG_BYTES_PER_S", 20_000)
    handler = DialIn(context, open_server.endpoint, "worker")
    await handler.register()
    execution_id = await open_server.submit()
    call = await handler.call()
    for _ in range(100):
        await handler.request("log", id=call["id"], lines=[[1, "stdout", "x" * 500]])
        await handler.request("progress", id=call["id"], percent=1)
    await handler.succeed(call)
    await open_server.ended(execution_id)
    kinds = [kind for kind, _ in open_server.published]
    assert 0 < kinds.count("progress") < 100
    shown = [v for k, v in open_server.published if k == "log" and v["lines"]]
    assert 0 < len(shown) < 100
    assert "lines left out" in (open_server.store.log(execution_id) or "")


# Secrets


async def test_a_secret_reaches_the_handler_and_nothing_that_comes_back_shows_it(
    open_server: Server, context: zmq.asyncio.Context
) -> None:
    open_server.dispatcher.secrets.set("db", PASSWORD)
    handler = DialIn(context, open_server.endpoint, "worker")
    await handler.register()
    params = {"url": {"$secret": "db"}, "n": [{"$secret": "db"}]}
    for success in (True, False):
        execution_id = await open_server.submit(job_params=params, retry=ONCE)
        call = await handler.call()
        assert call["params"] == {"url": PASSWORD, "n": [PASSWORD]}
        await handler.request("log", id=call["id"], lines=[[1, "stdout", f"got {PASSWORD}!"]])
        await handler.request("progress", id=call["id"], percent=1, message=PASSWORD)
        if success:
            await handler.succeed(call, {"seen": [f"<{PASSWORD}>"], PASSWORD: 1})
        else:
            await handler.fail(call, f"bad {PASSWORD}", traceback=f"login({PASSWORD!r})")
        execution = await open_server.ended(execution_id)
        assert execution.job_params == params
        attempts = open_server.store.attempts(execution_id)
        log = open_server.store.log(execution_id)
        assert log is not None
        assert "got ***!" in log
        assert PASSWORD not in repr((execution, attempts, log, open_server.published))
    assert execution.error == "bad ***"


async def test_a_secret_is_not_sent_over_an_open_link_to_another_machine(
    open_server: Server, context: zmq.asyncio.Context
) -> None:
    open_server.dispatcher.secrets.set("db", PASSWORD)
    handler = DialIn(context, open_server.endpoint, "worker")
    await handler.register()
    instance = open_server.gateway.registry.of("worker")[0]
    assert instance.peer is not None
    instance.peer = instance.peer._replace(address="10.0.0.9")
    params = {"p": {"$secret": "db"}}
    execution_id = await open_server.submit(job_params=params, retry=ONCE)
    execution = await open_server.ended(execution_id)
    assert execution.status is Status.ERROR
    assert "unencrypted link" in (execution.error or "")
    assert await handler.has_no_call(open_server)
    execution_id = await open_server.submit()  # its slot is free again
    await handler.succeed(await handler.call(), 1)
    await open_server.ended(execution_id)


async def test_a_secret_deleted_since_fails_the_attempt_with_its_name(
    open_server: Server, context: zmq.asyncio.Context
) -> None:
    open_server.dispatcher.secrets.set("db", PASSWORD)
    params = {"p": {"$secret": "db"}}
    execution_id = await open_server.submit(job_params=params, retry=ONCE)
    open_server.dispatcher.secrets.delete("db")
    await DialIn(context, open_server.endpoint, "worker").register()
    execution = await open_server.ended(execution_id)
    assert execution.error == "not sent: job_params.p: there is no secret 'db'"
    with pytest.raises(sz.InvalidField, match="no secret 'db'"):
        await open_server.dispatcher.submit("worker", "work", params)


async def test_a_result_that_the_next_server_takes_is_hidden_too(
    tmp_path: Path, context: zmq.asyncio.Context
) -> None:
    with opened(tmp_path) as first:
        first.dispatcher.secrets.set("db", PASSWORD)
        handler = DialIn(context, first.endpoint, "worker")
        await handler.register()
        params = {"p": {"$secret": "db"}}
        execution_id = await first.submit(job_params=params)
        call = await handler.call()
        port = first.port
    with opened(tmp_path, port=port) as second:
        await handler.reconnect(running=[call["id"]])
        await handler.succeed(call, f"it was {PASSWORD}")
        assert (await second.ended(execution_id)).result == "it was ***"
