"""What the tests of this directory share: a clock to set, a server without HTTP, and handlers.

The handlers are written from the protocol alone: they share no code with the product.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import schedulezero as sz
import zmq
import zmq.asyncio
from schedulezero import (
    Clock,
    Config,
    Dispatcher,
    Execution,
    Gateway,
    Overlap,
    RetryPolicy,
    Status,
    Store,
)

T = TypeVar("T")
WITHIN_S = 5.0
ONCE = RetryPolicy(max_attempts=1)
SOON = RetryPolicy(max_attempts=3, base_delay=0.02, factor=1.0, jitter=0.0)


class Dial(Clock):
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.us = 1_800_000_000_000_000
        self.passed_s = 86_400.0

    def now_us(self) -> int:
        return self.us

    def now(self) -> Any:
        return sz.at_of(self.us)

    def monotonic(self) -> float:
        return self.passed_s


class Anything:
    """An intake that takes every execution as it is."""

    def admit(self, execution: Execution) -> Execution:
        return execution

    def accept(self, execution: Execution) -> None: ...

    def withdraw(self, execution: Execution) -> None: ...


async def until(condition: Callable[[], T], within_s: float = WITHIN_S) -> T:
    """The value of the condition as soon as it is true."""
    async with asyncio.timeout(within_s):
        while not (value := condition()):
            await asyncio.sleep(0.005)
    return value


class DialIn:
    """A dial-in handler: a DEALER that says who it is and answers what it is asked."""

    def __init__(
        self, context: zmq.asyncio.Context, endpoint: str, handler_id: str, **said: Any
    ) -> None:
        self.profile = {
            "handler_id": handler_id,
            "instance": "one",
            "methods": ["work"],
            "concurrency": 1,
            **said,
        }
        self._context, self._endpoint = context, endpoint
        self._inbox: list[dict[str, Any]] = []
        self.connect()

    def connect(self) -> None:
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(self._endpoint)

    async def register(self, **more: Any) -> dict[str, Any]:
        """Register; gives the reply."""
        self._inbox = [m for m in self._inbox if m.get("reply_to") != "register"]
        await self.request("register", **self.profile, **more)
        return await self.take(lambda m: m.get("reply_to") == "register")

    async def reconnect(self, **more: Any) -> dict[str, Any]:
        self.socket.close(0)
        self._inbox.clear()
        self.connect()
        return await self.register(**more)

    async def request(self, method: str, **params: Any) -> None:
        await self.send({"method": method, "params": params})

    async def send(self, message: Any) -> None:
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        await self.socket.send_multipart([b"", body])

    async def heartbeat(self) -> dict[str, Any]:
        await self.request("heartbeat", **self.profile, time=0.0, running=0)
        return await self.take(
            lambda m: m.get("reply_to") == "heartbeat" or m.get("code") == "unknown_instance"
        )

    async def take(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first message that is wanted; the others wait for somebody who wants them."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                for place, message in enumerate(self._inbox):
                    if wanted(message):
                        return self._inbox.pop(place)
                empty, body = await self.socket.recv_multipart()
                assert empty == b""
                self._inbox.append(json.loads(body))

    async def call(self) -> dict[str, Any]:
        return await self.take(lambda m: "id" in m and "method" in m)

    async def control(self, method: str) -> dict[str, Any]:
        message = await self.take(lambda m: m.get("method") == method and "id" not in m)
        params: dict[str, Any] = message["params"]
        return params

    async def acked(self, call_id: str) -> None:
        await self.take(
            lambda m: (
                m.get("method") == "ack"
                and call_id in [m["params"].get("id"), *m["params"].get("ids", ())]
            )
        )

    async def succeed(self, call: dict[str, Any], result: Any = None) -> None:
        await self.send({"id": call["id"], "success": True, "result": result})

    async def fail(self, call: dict[str, Any], error: str = "no", **more: Any) -> None:
        await self.send({"id": call["id"], "success": False, "error": error, **more})

    async def has_no_call(self, server: Server) -> bool:
        """Whether nothing is called, once all that the server has sent has been read."""
        await self.request("ping")
        await self.take(lambda m: m.get("reply_to") == "ping")
        return not any("id" in m and "method" in m for m in self._inbox)


class Plain:
    """A plain handler: a REP that answers `ping` itself and leaves the rest to the test."""

    def __init__(self, context: zmq.asyncio.Context, handler_id: str, port: int = 0) -> None:
        self.handler_id = handler_id
        self.pings = 0
        self._context = context
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def tell(self, endpoint: str, method: str, **params: Any) -> dict[str, Any]:
        with self._context.socket(zmq.REQ) as asking:
            asking.setsockopt(zmq.LINGER, 0)
            asking.connect(endpoint)
            await asking.send(json.dumps({"method": method, "params": params}).encode())
            async with asyncio.timeout(WITHIN_S):
                reply: dict[str, Any] = json.loads(await asking.recv())
        return reply

    async def register(self, endpoint: str) -> dict[str, Any]:
        return await self.tell(
            endpoint,
            "register",
            handler_id=self.handler_id,
            address=self.address,
            methods=["work"],
        )

    async def call(self) -> dict[str, Any]:
        async with asyncio.timeout(WITHIN_S):
            while True:
                message: dict[str, Any] = json.loads(await self.socket.recv())
                if message["method"] != "ping":
                    return message
                self.pings += 1
                await self.answer(success=True)

    async def answer(self, **reply: Any) -> None:
        await self.socket.send(json.dumps(reply).encode())

    def die(self) -> None:
        self.socket.close(0)


class Server:
    """What stands between the API and the handlers, and what it published."""

    def __init__(
        self, path: Path, port: int = 0, clock: Clock | None = None, **config: Any
    ) -> None:
        loop = asyncio.get_running_loop()
        clock = clock or Clock()
        self.config = replace(Config(zmq_port=port), **config)
        self.published: list[tuple[str, Any]] = []
        with ExitStack() as undo:
            self.store = Store(str(path), self.config, clock)
            undo.callback(self.store.close)
            self.store.open(loop)
            self.gateway = Gateway(self.config, clock, self.store, loop)
            undo.callback(self.gateway.close)
            self.dispatcher = Dispatcher(
                self.store,
                self.gateway,
                clock,
                lambda kind, value: self.published.append((kind, value)),
            )
            self.dispatcher.adopt()
            undo.pop_all()
        self.endpoint = self.gateway.endpoint
        self.port = int(self.endpoint.rpartition(":")[2])

    def close(self) -> None:
        self.dispatcher.close()
        self.gateway.close()
        self.store.close()

    async def submit(
        self, handler_id: str = "worker", job_params: Any = None, **options: Any
    ) -> str:
        params = {"n": 1} if job_params is None else job_params
        submitted = await self.dispatcher.submit(handler_id, "work", params, **options)
        return submitted.execution_id

    async def fire(
        self, overlap: Overlap = Overlap.ALLOW, schedule_id: str = "nightly", **fields: Any
    ) -> str:
        """Record the fire of a schedule, as the store does when one is due."""
        now_us = self.store.clock.now_us()
        execution = Execution(
            execution_id=self.store.new_id(),
            schedule_id=schedule_id,
            schedule_key=1,
            handler_id="worker",
            method_name="work",
            job_params={},
            status=Status.QUEUED,
            created_us=now_us,
            due_us=now_us,
            deadline_us=now_us + 60_000_000,
            fire_us=now_us,
            retry=ONCE,
            overlap=overlap,
        )
        execution = execution._replace(**fields)
        await self.store.add_execution(execution)
        return execution.execution_id

    def status(self, execution_id: str) -> Status:
        execution = self.store.execution(execution_id)
        assert execution is not None
        return execution.status

    async def ended(self, execution_id: str) -> Execution:
        async with asyncio.timeout(WITHIN_S):
            return await self.dispatcher.wait(execution_id)

    def attempts(self, execution_id: str) -> list[tuple[int, str]]:
        return [(a.attempt, a.outcome) for a in self.store.attempts(execution_id)]

    def handler_status(self, handler_id: str = "worker") -> str | None:
        info = self.gateway.handler(handler_id)
        return info.status if info else None

    @contextmanager
    def held_writes(self) -> Iterator[None]:
        """The writer stands still, so that what is decided meanwhile is not committed yet."""
        go_on, holding = threading.Event(), threading.Event()

        def hold(db: sqlite3.Connection) -> None:
            holding.set()
            go_on.wait(WITHIN_S)

        self.store.write(hold)
        holding.wait(WITHIN_S)
        try:
            yield
        finally:
            go_on.set()


@asynccontextmanager
async def worker(
    context: zmq.asyncio.Context, server: Server, handler_id: str = "worker", **said: Any
) -> AsyncIterator[DialIn]:
    handler = DialIn(context, server.endpoint, handler_id, **said)
    assert (await handler.register())["success"] is True
    yield handler
    handler.socket.close(0)
