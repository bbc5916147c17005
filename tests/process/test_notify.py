"""What systemd is told: ready when it is, alive while it fires and stores, and how it is."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from appliance import Appliance, wait_for


class Listener:
    """A notification socket, as systemd makes one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(10)

    def receive(self) -> list[str]:
        return self._socket.recv(4_096).decode().split("\n")

    def is_silent(self, seconds: float) -> bool:
        self._socket.settimeout(seconds)
        try:
            self._socket.recv(4_096)
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(10)
        return False

    def drain(self) -> None:
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(4_096)
        self._socket.settimeout(10)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(tmp_path / "notify")
    yield made
    made.close()


def test_systemd_is_told_when_it_is_ready_and_that_it_is_alive(
    listener: Listener, appliance: Callable[..., Appliance]
) -> None:
    tell_tale = 'import os; open("seen", "w").write(os.environ.get("NOTIFY_SOCKET", "none"))'
    one = appliance(handlers={"nosy": {"command": ["python3", "-c", tell_tale]}})
    one.run("run", {"NOTIFY_SOCKET": str(listener.path), "WATCHDOG_USEC": "3000000"})
    assert listener.receive() == ["WATCHDOG=1", "READY=1", "STATUS=ok"]
    assert listener.receive() == ["WATCHDOG=1"]
    seen = one.directory / "seen"
    assert wait_for(lambda: seen.exists() and seen.read_text(), "the handler") == "none"


def test_a_server_that_stands_still_is_not_alive(
    listener: Listener, appliance: Callable[..., Appliance]
) -> None:
    one = appliance().run("server", {"NOTIFY_SOCKET": str(listener.path)})
    assert "READY=1" in listener.receive()
    assert one.process is not None
    os.kill(one.process.pid, signal.SIGSTOP)
    listener.drain()
    assert listener.is_silent(2.5)
    os.kill(one.process.pid, signal.SIGCONT)
    assert listener.receive()[0] == "WATCHDOG=1"
