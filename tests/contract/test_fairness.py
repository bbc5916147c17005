"""No handler can keep the others, or HTTP, from their turn."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest
import schedulezero as sz
import zmq
import zmq.asyncio
from apparatus import Server, until, worker

pytestmark = pytest.mark.anyio
MESSAGES = 20


async def test_messages_that_take_long_do_not_hold_up_the_rest_of_the_loop(
    server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, turn, read_in = asyncio.get_running_loop(), 0, Counter[int]()

    def count() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(count)

    monkeypatch.setattr(sz, "READ_TURN_S", 0.0)  # every message takes longer
    monkeypatch.setattr(server.dispatcher, "on_log", lambda *_: read_in.update([turn]))
    async with worker(context, server) as handler:
        await server.submit()
        call = await handler.call()
        log = {"method": "log", "params": {"id": call["id"], "lines": [[1, "stdout", "x"]]}}
        with zmq.Socket.shadow(handler.socket) as sender:  # no turn of the loop between two
            for _ in range(MESSAGES):
                sender.send_multipart([b"", json.dumps(log).encode()])
        loop.call_soon(count)
        await until(lambda: read_in.total() == MESSAGES)
        assert max(read_in.values()) <= 2  # the descriptor and the loop may each call for one
