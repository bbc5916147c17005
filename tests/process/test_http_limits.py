"""A listening HttpServer and clients that behave badly: slow, greedy, many, rude."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import schedulezero as sz

QUICK = sz.HttpLimits(
    head_timeout_s=0.2,
    body_timeout_s=0.2,
    idle_timeout_s=0.3,
    write_timeout_s=0.3,
    linger_timeout_s=0.2,
    stream_quiet_s=0.1,
    sweep_s=0.02,
)
PATIENT = replace(sz.HttpLimits(), sweep_s=0.02)
HEAD = b" HTTP/1.1\r\nHost: localhost\r\n"
LARGE = b"x" * (8 << 20)


class Site:
    """A handler for the tests, and what it saw."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.entered = asyncio.Event()
        self.finished = asyncio.Event()
        self.stopped = asyncio.Event()
        self.seen: list[str] = []
        self.write: Callable[[bytes], bool] | None = None

    def __call__(self, request: sz.Request) -> sz.Answer | Awaitable[sz.Answer]:
        self.seen.append(request.path)
        if request.path == "/large":
            return sz.Response(200, LARGE)
        if request.path == "/slow":
            return self.slow()
        if request.path == "/stream":
            return sz.StreamResponse(self.start)
        if request.path == "/broken":
            raise KeyError("broken")
        return sz.json_response(200, {"path": request.path, "bytes": len(request.body)})

    async def slow(self) -> sz.Answer:
        self.entered.set()
        await self.release.wait()
        self.finished.set()
        return sz.json_response(200, {"path": "/slow"})

    def start(self, write: Callable[[bytes], bool]) -> Callable[[], None]:
        self.write = write
        write(b"data: hello\n\n")
        return self.stopped.set


@contextlib.asynccontextmanager
async def serving(limits: sz.HttpLimits) -> AsyncIterator[tuple[sz.HttpServer, Site]]:
    site = Site()
    server = sz.HttpServer(site, clock=sz.Clock(), limits=limits)
    await server.start("127.0.0.1", 0)
    try:
        async with asyncio.timeout(20):
            yield server, site
    finally:
        await server.close(0)


class Client:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, *, body: bool = True) -> tuple[int, bytes]:
        head = await self.reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")),
            0,
        )
        return status, await self.reader.readexactly(length) if body else b""

    async def ask(self, what: bytes) -> tuple[int, bytes]:
        self.send(what + HEAD + b"\r\n")
        return await self.answer()

    async def rest(self) -> bytes:
        """Everything until the server closes."""
        try:
            return await self.reader.read()
        except ConnectionResetError:
            return b""


async def connect(server: sz.HttpServer) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", server.port))


async def until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds; the test's own time limit bounds it."""
    while not condition():
        await asyncio.sleep(0.005)


def run(limits: sz.HttpLimits, test: Callable[[sz.HttpServer, Site], Awaitable[None]]) -> None:
    async def main() -> None:
        async with serving(limits) as (server, site):
            await test(server, site)

    asyncio.run(main())


def test_a_connection_serves_many_requests_in_order() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        for n in range(3):
            assert await client.ask(b"GET /%d" % n) == (200, b'{"path":"/%d","bytes":0}' % n)
        client.send(b"".join(b"GET /p%d" % n + HEAD + b"\r\n" for n in range(100)))
        for n in range(100):
            assert await client.answer() == (200, b'{"path":"/p%d","bytes":0}' % n)

    run(PATIENT, test)


def test_pipelined_requests_wait_for_a_slow_one_before_them() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.send(b"GET /slow" + HEAD + b"\r\n" + b"GET /next" + HEAD + b"\r\n")
        await site.entered.wait()
        assert (await (await connect(server)).ask(b"GET /other"))[0] == 200
        assert site.seen == ["/slow", "/other"]
        site.release.set()
        assert (await client.answer())[1] == b'{"path":"/slow"}'
        assert (await client.answer())[1] == b'{"path":"/next","bytes":0}'

    run(PATIENT, test)


def test_a_client_that_pipelines_without_end_is_not_read_while_it_waits() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.send(b"GET /slow" + HEAD + b"\r\n")
        await site.entered.wait()
        more = b"POST /more" + HEAD + b"Content-Length: 100000\r\n\r\n" + b"x" * 100_000
        client.send(more * 200)
        (connection,) = server._connections
        await until(lambda: connection._parser.buffered_bytes > sz.MAX_PIPELINED_BYTES)
        await until(lambda: not connection._transport.is_reading())
        assert connection._parser.buffered_bytes < 1 << 20
        site.release.set()
        assert (await client.answer())[0] == 200
        for _ in range(200):
            assert await client.answer() == (200, b'{"path":"/more","bytes":100000}')

    run(PATIENT, test)


def test_a_client_that_pipelines_without_end_is_not_read_beyond_what_is_answered() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        buffered: list[int] = []
        client = await connect(server)
        assert (await client.ask(b"GET /first"))[0] == 200
        (connection,) = server._connections
        server.answered = lambda *_: buffered.append(connection._parser.buffered_bytes)
        client.send((b"GET /more" + HEAD + b"Padding: " + b"x" * 1_000 + b"\r\n\r\n") * 2_000)
        for _ in range(2_000):
            assert (await client.answer())[0] == 200
        assert max(buffered) < 512 << 10

    run(PATIENT, test)


def test_a_client_that_asks_for_much_at_once_lets_others_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        greedy, other = await connect(server), await connect(server)
        for client in (greedy, other):
            assert (await client.ask(b"GET /first"))[0] == 200
        greedy.send((b"GET /heavy" + HEAD + b"\r\n") * 16)
        assert (await other.ask(b"GET /other"))[0] == 200
        for _ in range(16):
            assert (await greedy.answer())[0] == 200
        assert site.seen.index("/other") < 16

    monkeypatch.setattr(sz, "MAX_TURN_S", 0.0)  # as if each request took longer
    run(PATIENT, test)


def test_requests_of_a_client_that_has_left_are_not_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port)) as rude:
                rude.sendall((b"GET /a" + HEAD + b"\r\n") * 16)
                rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await until(lambda: bool(site.seen))
        await until(lambda: len(server._connections) == 0)

    run(PATIENT, test)
    assert [record.message for record in caplog.records if record.levelname != "DEBUG"] == []


def test_half_a_close_still_gets_every_answer() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.send(b"GET /slow" + HEAD + b"\r\n" + b"".join([b"GET /a" + HEAD + b"\r\n"] * 40))
        client.writer.write_eof()
        await site.entered.wait()
        site.release.set()
        assert (await client.rest()).count(b"HTTP/1.1 200 OK") == 41

    run(PATIENT, test)


def test_head_is_answered_without_a_body() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.send(b"HEAD /a" + HEAD + b"\r\n")
        assert await client.answer(body=False) == (200, b"")
        assert (await client.ask(b"GET /b"))[0] == 200

    run(PATIENT, test)


def test_a_client_that_asks_first_is_told_to_send_its_body() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.send(b"POST /a" + HEAD + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"ok")
        assert await client.answer() == (200, b'{"path":"/a","bytes":2}')
        client.send(b"POST /a" + HEAD + b"Content-Length: 9999999\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.answer())[0] == 413

    run(PATIENT, test)


def test_a_failing_handler_costs_a_500_and_one_line_with_the_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        status, body = await client.ask(b"GET /broken")
        assert status == 500
        assert b"KeyError" not in body
        assert (await client.ask(b"GET /fine"))[0] == 200

    run(PATIENT, test)
    assert [record.exc_info is not None for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "data",
    [b"GET /a HTTP/1.1\r\nHost: a\r\nX: ", b"POST /a" + HEAD + b"Content-Length: 9\r\n\r\nabc"],
    ids=["head", "body"],
)
def test_a_request_that_does_not_arrive_in_time_gets_408(data: bytes) -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.send(data)
        assert (await client.answer())[0] == 408
        assert await client.rest() == b""
        await until(lambda: len(server._connections) == 0)

    run(QUICK, test)


def test_a_head_that_drips_in_does_not_extend_its_time() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        async with asyncio.timeout(3):
            with contextlib.suppress(ConnectionError):
                while server._connections or not site.seen:
                    client.send(b"G")
                    await client.writer.drain()
                    await asyncio.sleep(0.01)
                    if not server._connections:
                        break
        assert site.seen == []

    run(QUICK, test)


def test_silent_connections_are_closed_without_a_word() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        fresh, used = await connect(server), await connect(server)
        assert (await used.ask(b"GET /a"))[0] == 200
        assert await fresh.rest() == b""
        assert await used.rest() == b""

    run(QUICK, test)


def test_a_client_that_does_not_read_its_answer_is_dropped() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.writer.transport.pause_reading()
        client.send(b"GET /large" + HEAD + b"\r\n")
        await until(lambda: bool(site.seen))
        await until(lambda: len(server._connections) == 0)

    run(QUICK, test)


def test_answers_that_are_not_taken_are_bounded_for_all_clients_together() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        for asked in range(1, 4):
            lazy = await connect(server)
            lazy.writer.transport.pause_reading()
            lazy.send(b"GET /large" + HEAD + b"\r\n")
            await until(lambda asked=asked: len(site.seen) == asked)
        client = await connect(server)
        status, body = await client.ask(b"GET /large")
        assert (status, sz.decode_json(body)["code"]) == (503, "overloaded")
        assert (await client.ask(b"GET /small"))[0] == 200
        assert sum(other.held_bytes for other in server._connections) < 9 << 20

    run(replace(PATIENT, max_held_bytes=9 << 20), test)


def test_bodies_that_do_not_end_are_bounded_for_all_clients_together() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        clients = [await connect(server) for _ in range(3)]
        for client in clients[:2]:
            client.send(b"POST /a" + HEAD + b"Content-Length: 1000000\r\n\r\n" + b"x" * 900_000)
        await until(lambda: sum(each.held_bytes for each in server._connections) >= 1_800_000)
        clients[2].send(b"POST /a" + HEAD + b"Content-Length: 1000000\r\n\r\n" + b"x" * 900_000)
        status, body = await clients[2].answer()
        assert (status, sz.decode_json(body)["code"]) == (503, "overloaded")
        for client in clients[:2]:
            client.send(b"x" * 100_000)
            assert (await client.answer())[0] == 200

    run(replace(PATIENT, max_held_bytes=2 << 20), test)


def test_a_client_that_reads_slowly_gets_all_of_a_large_answer() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        for _ in range(2):
            assert await client.ask(b"GET /large") == (200, LARGE)

    run(PATIENT, test)


def test_a_refused_body_does_not_reset_the_connection_before_the_answer_is_read() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.send(b"POST /a" + HEAD + b"Content-Length: 4000000\r\n\r\n" + b"x" * 4_000_000)
        status, body = await client.answer()
        assert (status, sz.decode_json(body)["code"]) == (413, "too_large")

    run(PATIENT, test)


def test_a_waiting_request_goes_on_when_its_client_leaves() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.send(b"GET /slow" + HEAD + b"\r\n")
        await site.entered.wait()
        client.writer.transport.abort()
        await until(lambda: len(server._connections) == 0)
        site.release.set()
        await site.finished.wait()

    run(QUICK, test)


def test_connections_over_the_bound_are_told_to_come_back_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        clients = [await connect(server) for _ in range(3)]
        for client in clients:
            assert (await client.ask(b"GET /a"))[0] == 200
        for _ in range(20):
            refused = await connect(server)
            head = await refused.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503")
            assert b"Retry-After: " in head
            refused.writer.close()
        clients[0].writer.close()
        await until(lambda: len(server._connections) == 2)
        assert (await (await connect(server)).ask(b"GET /a"))[0] == 200
        assert (await clients[1].ask(b"GET /still-there"))[0] == 200
        await until(lambda: bool(caplog.records))

    run(replace(PATIENT, max_connections=3, sweep_s=0.3), test)
    assert len(caplog.records) <= 5


def test_one_address_cannot_take_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        # Another loopback address stands for another machine: only 127.0.0.1 is exempt.
        kept = [
            await asyncio.open_connection("127.0.0.1", server.port, local_addr=("127.0.0.9", 0))
            for _ in range(3)
        ]
        first, third = Client(*kept[0]), Client(*kept[2])
        assert (await third.answer())[0] == 503
        assert (await first.ask(b"GET /a"))[0] == 200
        assert (await (await connect(server)).ask(b"GET /b"))[0] == 200

    run(replace(PATIENT, max_per_address=2), test)


def test_a_thousand_rude_connections_leave_nothing_behind() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        for _ in range(1_000):
            with socket.create_connection(("127.0.0.1", server.port)) as rude:
                rude.sendall(b"\x16\x03\x01" + b"garbage" * 10)
            await asyncio.sleep(0)
        await until(lambda: len(server._connections) == 0)
        assert not server._turned_away
        assert not server._tasks
        assert (await (await connect(server)).ask(b"GET /a"))[0] == 200

    run(PATIENT, test)


def test_a_stream_gets_what_is_written_and_a_comment_when_it_is_quiet() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.send(b"GET /stream" + HEAD + b"\r\n")
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b"Content-Type: text/event-stream\r\n" in head
        assert await client.reader.readuntil(b"\n\n") == b"data: hello\n\n"
        assert await client.reader.readuntil(b"\n\n") == b":\n\n"
        assert site.write is not None
        assert site.write(b"data: more\n\n")
        while (event := await client.reader.readuntil(b"\n\n")) == b":\n\n":
            pass
        assert event == b"data: more\n\n"
        client.writer.close()
        await site.stopped.wait()
        assert not site.write(b"data: late\n\n")

    run(QUICK, test)


def test_a_stream_whose_client_reads_takes_much_at_once() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.send(b"GET /stream" + HEAD + b"\r\n")
        await client.reader.readuntil(b"data: hello\n\n")
        assert site.write is not None
        for _ in range(5):
            assert site.write(LARGE[: 1 << 20])
            assert await client.reader.readexactly(1 << 20) == LARGE[: 1 << 20]

    run(PATIENT, test)


def test_a_stream_whose_client_does_not_read_is_dropped_at_its_bound() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.send(b"GET /stream" + HEAD + b"\r\n")
        await client.reader.readuntil(b"\n\n")
        client.writer.transport.pause_reading()
        await until(lambda: site.write is not None)
        written = 0
        while site.write(b"x" * 65_536):
            written += 65_536
            assert written < 64 << 20
            await asyncio.sleep(0)
        await site.stopped.wait()
        await until(lambda: len(server._connections) == 0)

    run(PATIENT, test)


def test_closing_finishes_what_is_in_progress_and_takes_nothing_new() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        busy, idle, stream = [await connect(server) for _ in range(3)]
        assert (await idle.ask(b"GET /a"))[0] == 200
        stream.send(b"GET /stream" + HEAD + b"\r\n")
        await stream.reader.readuntil(b"\n\n")
        busy.send(b"GET /slow" + HEAD + b"\r\n")
        await site.entered.wait()
        port = server.port
        closing = asyncio.create_task(server.close(5))
        assert await idle.rest() == b""
        assert await stream.rest() == b""
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        site.release.set()
        answer = await busy.rest()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"\r\nConnection: close\r\n" in answer
        await closing

    run(PATIENT, test)


def test_closing_does_not_wait_longer_than_its_grace() -> None:
    async def test(server: sz.HttpServer, site: Site) -> None:
        client = await connect(server)
        client.send(b"GET /slow" + HEAD + b"\r\n")
        await site.entered.wait()
        await server.close(0.05)
        assert await client.rest() == b""

    run(PATIENT, test)


OUT_OF_DESCRIPTORS = """
import asyncio, logging, resource, sys, time
import schedulezero as sz

async def main():
    logging.basicConfig(stream=sys.stdout, format="log: %(message)s")
    asyncio.get_running_loop().set_exception_handler(sz.LoopErrorLog(sz.Clock()))
    server = sz.HttpServer(lambda request: sz.json_response(200, {}), clock=sz.Clock())
    await server.start("127.0.0.1", 0)
    print(server.port, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print("cpu", time.process_time(), flush=True)

resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
asyncio.run(main())
"""


def test_running_out_of_descriptors_neither_spins_nor_floods_the_log_and_passes() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", OUT_OF_DESCRIPTORS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(sz.__file__).parent,
        start_new_session=True,
    )
    assert child.stdout is not None
    with child:
        port = int(child.stdout.readline())
        crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        first_line = child.stdout.readline()
        for client in crowd:
            client.close()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"GET /" + HEAD + b"Connection: close\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        output, _ = child.communicate("\n", timeout=10)
    assert "Too many open files" in first_line
    assert output.count("log: ") <= 2
    assert float(output.rpartition("cpu ")[2]) < 1.5
