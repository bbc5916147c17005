"""Hostile bytes on the handlers' port: the server stays up, small, and there for the others."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from appliance import Appliance, wait_for

MORE, LONG, COMMAND = 1, 2, 4
MIB = 1 << 20


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


class RawPeer:
    """A TCP connection that speaks as much ZMTP 3.0 as it is told to."""

    def __init__(self, port: int, identity: bytes = b"") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self._identity = identity
        self.heard = b""

    def greet(self) -> RawPeer:
        """Handshake with the NULL mechanism, as a DEALER."""
        greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
        ready = b"\x05READY" + self._property(b"Socket-Type", b"DEALER")
        if self._identity:
            ready += self._property(b"Identity", self._identity)
        self.socket.sendall(greeting + bytes([COMMAND, len(ready)]) + ready)
        self._read(64)  # a message before the server's own READY would end the handshake
        _flags, size = self._read(2)
        self._read(size)
        return self

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self.socket.recv(size - len(data))
        return data

    @staticmethod
    def _property(name: bytes, value: bytes) -> bytes:
        return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value

    def send(self, *frames: bytes) -> None:
        last = len(frames) - 1
        for place, frame in enumerate(frames):
            flags = LONG | (MORE if place < last else 0)
            self.socket.sendall(bytes([flags]) + struct.pack(">Q", len(frame)) + frame)

    def pour(self, chunk: bytes, most_bytes: int) -> int:
        """Send the chunk again and again until the server ends it; how many bytes went."""
        sent = 0
        with contextlib.suppress(OSError):
            while sent < most_bytes:
                sent += self.socket.send(chunk)
        return sent

    def read_until(self, wanted: bytes) -> bytes:
        """What the server said, once it holds `wanted`; empty before."""
        with contextlib.suppress(TimeoutError):
            self.socket.settimeout(0.05)
            self.heard += self.socket.recv(65_536)
        return self.heard if wanted in self.heard else b""

    def is_ended(self) -> bool:
        """Whether the server has closed the connection; reads what it said before."""
        self.socket.settimeout(0.05)
        try:
            while self.socket.recv(65_536):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def server(appliance: Callable[..., Appliance]) -> Appliance:
    return appliance().run()


@pytest.fixture
def peer(server: Appliance) -> Iterator[Callable[..., RawPeer]]:
    made: list[RawPeer] = []

    def make(identity: bytes = b"") -> RawPeer:
        made.append(RawPeer(server.zmq_port, identity))
        return made[-1]

    yield make
    for one in made:
        one.close()


def pid_of(server: Appliance) -> int:
    assert server.process is not None
    return server.process.pid


def adds_up(server: Appliance) -> bool:
    body = {"handler_id": "example", "method_name": "add", "job_params": {"a": 1, "b": 2}}
    answer = server.post("/api/run_now", body)
    return answer.status == 200 and answer.json()["result"] == 3


class Watch:
    """The highest resident size of a process while this is open."""

    def __init__(self, pid: int) -> None:
        self.before = self.peak = rss_mib(pid)
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.peak = max(self.peak, rss_mib(self._pid))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        print(f"RSS MiB: before {self.before:.1f}, peak {self.peak:.1f}, "
              f"now {rss_mib(self._pid):.1f}")  # fmt: skip


BOMBS = {
    "of frames of 1 MiB": bytes([LONG | MORE]) + struct.pack(">Q", MIB) + bytes(MIB),
    "of empty frames": bytes([MORE, 0]) * 65_536,
    "of frames of 1 KiB": (bytes([LONG | MORE]) + struct.pack(">Q", 1024) + bytes(1024)) * 64,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_message_without_an_end_is_cut_off_and_its_memory_given_back(
    server: Appliance, peer: Callable[..., RawPeer], bomb: str
) -> None:
    server.handler()
    with Watch(pid_of(server)) as memory:
        sent = peer().greet().pour(BOMBS[bomb], 4096 * MIB)
        print(f"{bomb}: cut off after {sent / MIB:.1f} MiB")
    assert sent < 1024 * MIB
    assert memory.peak < memory.before + 600
    wait_for(lambda: rss_mib(pid_of(server)) < memory.before + 40, "the memory to be given back")
    assert adds_up(server)


def test_a_thousand_garbage_connections_leave_no_trace(
    server: Appliance, peer: Callable[..., RawPeer]
) -> None:
    server.handler()
    bodies = [os.urandom(64) for _ in range(50)] + [b"GET / HTTP/1.1\r\n\r\n", b"\x01\x00" * 30]
    before, fds = rss_mib(pid_of(server)), 0
    with Watch(pid_of(server)) as memory:
        for number in range(1_000):
            one = RawPeer(server.zmq_port)
            with contextlib.suppress(OSError):
                one.socket.sendall(bodies[number % len(bodies)])
            one.close()
        assert adds_up(server)
    fds = len(os.listdir(f"/proc/{pid_of(server)}/fd"))
    print("descriptors", fds)
    assert memory.peak < before + 20
    wait_for(lambda: len(os.listdir(f"/proc/{pid_of(server)}/fd")) < 60, "the descriptors")


def test_connections_that_never_shake_hands_are_closed(
    server: Appliance, peer: Callable[..., RawPeer]
) -> None:
    idle = [peer() for _ in range(300)]
    half = [peer() for _ in range(20)]
    for one in half:
        one.socket.sendall(b"\xff" + bytes(8) + b"\x7f")
    assert server.get("/api/health").status == 200
    for one in (*idle, *half):
        wait_for(one.is_ended, "the end of a connection without a handshake")


def test_a_frame_over_the_limit_ends_its_connection(
    server: Appliance, peer: Callable[..., RawPeer]
) -> None:
    one = peer().greet()
    with Watch(pid_of(server)) as memory:
        one.socket.sendall(bytes([LONG]) + struct.pack(">Q", 1 << 62))
        wait_for(one.is_ended, "the end of the connection")
    assert memory.peak < memory.before + 10


def test_nobody_takes_over_a_connection_by_claiming_its_routing_id(
    server: Appliance, peer: Callable[..., RawPeer]
) -> None:
    for identity in (b"example", b"x" * 190):
        one = peer(identity).greet()
        said = {"handler_id": "example", "instance": "i", "methods": ["add"]}
        one.send(b"", json.dumps({"method": "register", "params": said}).encode())
        refused = wait_for(lambda one=one: one.read_until(b"not_allowed"), "a refusal")
        assert b"identity" in refused
    assert server.get("/api/handlers").json()["handlers"] == []


def test_a_handler_that_floods_is_cut_off_while_another_works(server: Appliance) -> None:
    server.handler()
    with zmq.Context() as context, context.socket(zmq.DEALER) as flood:
        flood.setsockopt(zmq.LINGER, 0)
        flood.setsockopt(zmq.SNDHWM, 1_000)
        flood.connect(f"tcp://127.0.0.1:{server.zmq_port}")
        said = {"handler_id": "flood", "instance": "f", "methods": ["m"]}
        flood.send_multipart([b"", json.dumps({"method": "register", "params": said}).encode()])
        assert flood.poll(5_000)
        beat = json.dumps({"method": "heartbeat", "params": said}).encode()
        over, slowest_s = threading.Event(), 0.0

        def pour() -> None:
            while not over.is_set():
                with contextlib.suppress(zmq.Again):
                    flood.send_multipart([b"", beat], zmq.NOBLOCK)

        pouring = threading.Thread(target=pour)
        with Watch(pid_of(server)) as memory:
            pouring.start()
            try:
                for _ in range(50):
                    began_s = time.monotonic()
                    assert adds_up(server)
                    slowest_s = max(slowest_s, time.monotonic() - began_s)
            finally:
                over.set()
                pouring.join()
        print(f"slowest call beside the flood: {slowest_s * 1000:.0f} ms")
        assert slowest_s < 5
        assert memory.peak < memory.before + 50
