"""The load: keep-alive HTTP/1.1 connections in a process of their own, as lean as they can be.

`python load.py PORT ORDER` does what the JSON `ORDER` asks for and prints one JSON object. The
client shares the machine with what it measures, so it parses no more than it must: some 15 µs of
CPU for each call, which is counted and reported.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

SEEN_TIMEOUT_S = 60.0  # a server that says nothing for so long has failed


class Answered(NamedTuple):
    began: float  # perf_counter
    latency_s: float
    status: int
    body: bytes


def render_request(method: str, path: str, body: Any = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


class Connection:
    """One keep-alive connection with at most one request on its way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=SEEN_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._began = 0.0
        self._got = b""

    def ask(self, request: bytes) -> None:
        self._began = time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> Answered | None:
        """Take what has arrived; the answer, once it is whole."""
        chunk = self.socket.recv(1 << 18)
        if not chunk:
            raise ConnectionError("the server closed the connection")
        self._got += chunk
        end = self._got.find(b"\r\n\r\n")
        if end < 0:
            return None
        start = self._got.index(b"Content-Length: ") + 16
        size = int(self._got[start : self._got.index(b"\r", start)])
        if len(self._got) < end + 4 + size:
            return None
        latency_s = time.perf_counter() - self._began
        body, status = self._got[end + 4 :], int(self._got[9:12])
        self._got = b""
        return Answered(self._began, latency_s, status, body)

    def call(self, method: str, path: str, body: Any = None) -> Answered:
        self.ask(render_request(method, path, body))
        while (answered := self.receive()) is None:
            pass
        return answered


def drive(port: int, clients: int, requests: Iterator[bytes]) -> Iterator[Answered]:
    """Send the requests over `clients` connections, each its next when it has its answer."""
    selector = selectors.DefaultSelector()
    for _ in range(clients):
        connection = Connection(port)
        if (request := next(requests, None)) is not None:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.ask(request)
    while selector.get_map():
        ready = selector.select(SEEN_TIMEOUT_S)
        if not ready:
            raise SystemExit(f"no answer for {SEEN_TIMEOUT_S:g} s")
        for key, _ in ready:
            answered = key.data.receive()
            if answered is None:
                continue
            if (request := next(requests, None)) is not None:
                key.data.ask(request)
            else:
                selector.unregister(key.fileobj)
            yield answered


def for_seconds(request: bytes, seconds: float) -> Iterator[bytes]:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        yield request


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def run_now(port: int, clients: int, seconds: float = 0.0, calls: int = 0) -> dict[str, Any]:
    """Calls that wait for their result, for `seconds` or `calls` in number."""
    job = {"handler_id": "bench", "method_name": "nothing", "job_params": {}}
    request = render_request("POST", "/api/run_now", job)
    requests = iter([request] * calls) if calls else for_seconds(request, seconds)
    cpu_s, began = time.process_time(), time.perf_counter()
    latencies: list[float] = []
    for answered in drive(port, clients, requests):
        if answered.status != 200 or b'"result":1' not in answered.body:
            raise SystemExit(f"run_now answered {answered.status}: {answered.body[:200]!r}")
        latencies.append(answered.latency_s)
    return {
        "calls": len(latencies),
        "per_second": len(latencies) / (time.perf_counter() - began),
        "p50_ms": percentile(latencies, 0.5) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
        "client_cpu_us": (time.process_time() - cpu_s) / len(latencies) * 1e6,
    }


def schedule(port: int, count: int, trigger: dict[str, Any]) -> dict[str, Any]:
    """Make `count` schedules."""
    body = {"handler_id": "bench", "method_name": "nothing", "trigger_config": trigger}
    request = render_request("POST", "/api/schedule", body)
    for answered in drive(port, min(32, count), iter([request] * count)):
        if answered.status != 201:
            raise SystemExit(f"schedule answered {answered.status}: {answered.body[:200]!r}")
    return {"done_at": time.time()}


def health(port: int, after: float, every_s: float) -> dict[str, Any]:
    """Ask for the health until, some time later than `after`, nothing is queued or running."""
    connection = Connection(port)
    slowest, count, busy = 0.0, 0, True
    while busy or time.time() < after:
        answered = connection.call("GET", "/api/health")
        if answered.status != 200:
            raise SystemExit(f"health answered {answered.status}: {answered.body[:200]!r}")
        body = json.loads(answered.body)
        busy = bool(body["running"] or body["waiting"])
        slowest, count = max(slowest, answered.latency_s), count + 1
        time.sleep(every_s)
    return {"slowest_ms": slowest * 1e3, "count": count}


ORDERS = {"run_now": run_now, "schedule": schedule, "health": health}

if __name__ == "__main__":
    order = json.loads(sys.argv[2])
    print(json.dumps(ORDERS[order.pop("do")](int(sys.argv[1]), **order)))
