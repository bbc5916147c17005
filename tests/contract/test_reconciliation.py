"""What a server and its handlers agree on after one of them was away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import schedulezero as sz
import zmq.asyncio
from apparatus import ONCE, SOON, Plain, Server, until, worker
from schedulezero import Overlap, Status

pytestmark = pytest.mark.anyio


async def test_what_an_earlier_server_left_running_is_cancelled_only_when_its_handler_is_back(
    serve: Callable[..., Server],
    context: zmq.asyncio.Context,
) -> None:
    server = serve()
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=SOON)
        call = await handler.call()
        server.close()
        server = serve(port=server.port)
        await server.dispatcher.cancel(execution_id, "cancelled")
        assert server.status(execution_id) is Status.RUNNING
        await handler.reconnect(running=[call["id"]])
        assert await handler.control("cancel") == {"id": call["id"], "reason": "cancelled"}
        await handler.fail(call, "stopped", cancelled=True)
        assert (await server.ended(execution_id)).status is Status.CANCELLED


async def test_a_replaced_execution_of_an_earlier_server_ends_before_its_successor_begins(
    serve: Callable[..., Server],
    context: zmq.asyncio.Context,
) -> None:
    server = serve()
    async with worker(context, server, concurrency=2) as handler:
        first = await server.fire(Overlap.REPLACE)
        call = await handler.call()
        server.close()
        server = serve(port=server.port)
        second = await server.fire(Overlap.REPLACE)
        await handler.reconnect(running=[call["id"]])
        await handler.control("cancel")
        assert server.status(second) is Status.QUEUED
        await handler.fail(call, "stopped", cancelled=True)
        assert (await handler.call())["execution_id"] == second
        assert server.status(first) is Status.CANCELLED


async def test_a_cancelled_execution_of_an_earlier_server_that_nobody_claims_is_cancelled(
    serve: Callable[..., Server],
    context: zmq.asyncio.Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sz, "ADOPT_S", 0.1)
    server = serve()
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=SOON)
        await handler.call()
        server.close()
        server = serve(port=server.port)
        await server.dispatcher.cancel(execution_id, "cancelled")
        assert (await server.ended(execution_id)).status is Status.CANCELLED


async def test_a_handler_that_claims_a_cancelled_run_and_does_not_stop_is_given_up_after_a_grace(
    serve: Callable[..., Server],
    context: zmq.asyncio.Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sz, "CANCEL_GRACE_S", 0.1)
    server = serve()
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=SOON)
        call = await handler.call()
        server.close()
        server = serve(port=server.port)
        await server.dispatcher.cancel(execution_id, "cancelled")
        await handler.reconnect(running=[call["id"]])
        assert (await server.ended(execution_id)).status is Status.CANCELLED


async def test_a_result_kept_on_disk_counts_for_the_process_that_ran_the_job(
    serve: Callable[..., Server],
    context: zmq.asyncio.Context,
) -> None:
    server = serve()
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=ONCE)
        call = await handler.call()
    async with worker(context, server, instance="reborn") as reborn:
        result = {"id": call["id"], "success": True, "result": 7}
        await reborn.send(result)
        await reborn.acked(call["id"])
        assert server.status(execution_id) is Status.RUNNING  # it may be anybody's
        await reborn.send({**result, "instance": "one"})
        assert (await server.ended(execution_id)).result == 7
        await reborn.acked(call["id"])


async def test_a_plain_handler_is_told_that_it_is_registered_when_a_later_server_will_know_it(
    server: Server,
    context: zmq.asyncio.Context,
) -> None:
    plain = Plain(context, "worker")
    with server.held_writes():
        registering = asyncio.ensure_future(plain.register(server.endpoint))
        await until(lambda: server.handler_status() == "Connected")
        assert not registering.done()
    assert (await registering)["status"] == "registered"
    assert server.store.known_handlers()[0][:2] == ("worker", plain.address)


async def test_who_registers_while_the_disk_takes_nothing_is_stored_when_it_does(
    server: Server,
    context: zmq.asyncio.Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SAVE_AGAIN_S", "SAVE_WAIT_S"):
        monkeypatch.setattr(sz, name, 0.05)
    takes, save = asyncio.Event(), server.store.save_handler

    async def refuse(*values: Any) -> None:
        if not takes.is_set():
            raise sz.StoreUnavailable("the disk is full")
        await save(*values)

    monkeypatch.setattr(server.store, "save_handler", refuse)
    moved, plain = Plain(context, "worker"), Plain(context, "worker")
    assert (await moved.register(server.endpoint))["success"] is True
    moved.die()
    assert (await plain.register(server.endpoint))["success"] is True
    takes.set()
    known = await until(server.store.known_handlers)
    assert [entry[:2] for entry in known] == [("worker", plain.address)]
