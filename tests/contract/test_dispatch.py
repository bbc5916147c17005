"""Store, gateway and dispatcher on a real loop and real sockets.

The handlers here are written from the protocol alone: they share no code with the product.
"""

from __future__ import annotations

import asyncio
import errno
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schedulezero as sz
import zmq
import zmq.asyncio
from apparatus import ONCE, SOON, WITHIN_S, DialIn, Plain, Server, until, worker
from schedulezero import (
    Attempt,
    Clock,
    Config,
    Conflict,
    NotFound,
    Overlap,
    Reason,
    RetryPolicy,
    Status,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def fast_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler silent for 0.2 s is gone."""
    monkeypatch.setattr(sz, "HEARTBEAT_S", 0.04)
    monkeypatch.setattr(sz, "SWEEP_S", 0.02)


# The life of one call


async def test_a_call_carries_what_the_protocol_says_and_its_result_is_stored_before_the_ack(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit(timeout=7.5)
        call = await handler.call()
        assert call == {
            "id": f"{execution_id}:1",
            "method": "work",
            "params": {"n": 1},
            "execution_id": execution_id,
            "attempt": 1,
            "timeout": 7.5,
        }
        assert server.status(execution_id) is Status.RUNNING
        await handler.succeed(call, {"total": 3})
        await handler.acked(call["id"])
        stored = server.store.execution(execution_id)
        assert stored is not None
        assert (stored.status, stored.result, stored.attempt) == (Status.SUCCESS, {"total": 3}, 1)
        assert stored == await server.ended(execution_id)
        assert server.attempts(execution_id) == []


async def test_an_execution_waits_for_a_dial_in_handler_that_comes_later(
    server: Server, context: zmq.asyncio.Context
) -> None:
    execution_id = await server.submit()
    assert (server.status(execution_id), server.dispatcher.queued("worker")) == (Status.QUEUED, 1)
    async with worker(context, server) as handler:
        call = await handler.call()
        assert (call["execution_id"], call["attempt"]) == (execution_id, 1)


async def test_an_execution_waits_for_a_plain_handler_that_comes_later_and_is_called_at_once(
    server: Server, context: zmq.asyncio.Context
) -> None:
    execution_id = await server.submit()
    plain = Plain(context, "worker")
    assert (await plain.register(server.endpoint))["status"] == "registered"
    async with asyncio.timeout(1.9):  # a ping is due after two seconds only
        call = await plain.call()
    assert call == {
        "method": "work",
        "params": {"n": 1},
        "execution_id": execution_id,
        "attempt": 1,
    }
    await plain.answer(success=True, result=[1, 2])
    assert (await server.ended(execution_id)).result == [1, 2]


async def test_a_plain_reply_without_result_is_the_result_itself(
    server: Server, context: zmq.asyncio.Context
) -> None:
    plain = Plain(context, "worker")
    await plain.register(server.endpoint)
    execution_id = await server.submit()
    await plain.call()
    await plain.answer(success=True, count=3)
    assert (await server.ended(execution_id)).result == {"count": 3}
    execution_id = await server.submit()
    await plain.call()
    await plain.answer(count=4)
    assert (await server.ended(execution_id)).result == {"count": 4}


async def test_a_plain_handler_is_called_one_call_at_a_time(
    server: Server, context: zmq.asyncio.Context
) -> None:
    plain = Plain(context, "worker")
    await plain.register(server.endpoint)
    first, second = await server.submit(), await server.submit()
    assert (await plain.call())["execution_id"] == first
    assert server.status(second) is Status.QUEUED
    await plain.answer(success=True)
    assert (await plain.call())["execution_id"] == second


async def test_a_ping_under_way_does_not_make_a_plain_handler_look_disconnected(
    server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(sz, "SWEEP_S", 0.02)
    plain = Plain(context, "worker")
    await plain.register(server.endpoint)
    async with asyncio.timeout(WITHIN_S):
        while json.loads(await plain.socket.recv())["method"] != "ping":
            await plain.answer(success=True)
    execution_id = await server.submit()
    assert server.handler_status() == "Connected"
    await plain.answer(success=True)
    assert (await plain.call())["attempt"] == 1
    await plain.answer(success=True)
    assert (await server.ended(execution_id)).attempt == 1


async def test_a_late_start_is_missed_and_says_that_the_handler_was_offline(
    server: Server,
) -> None:
    now_us = server.store.clock.now_us()
    execution_id = await server.fire(deadline_us=now_us + 50_000)
    execution = await server.ended(execution_id)
    assert (execution.status, execution.reason) == (Status.MISSED, Reason.HANDLER_OFFLINE)
    assert (execution.attempt, server.attempts(execution_id)) == (0, [])


async def test_a_late_start_behind_a_busy_handler_is_missed_as_too_late(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        await server.submit()
        await handler.call()
        now_us = server.store.clock.now_us()
        execution = await server.ended(await server.fire(deadline_us=now_us + 50_000))
        assert (execution.status, execution.reason) == (Status.MISSED, Reason.TOO_LATE)


async def test_a_slot_that_comes_free_after_the_deadline_starts_nothing(
    server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "TICK_S", 60.0)  # the dispatcher has not looked yet
    async with worker(context, server) as handler:
        await server.submit()
        call = await handler.call()
        late_us = server.store.clock.now_us() - 1
        late = await server.fire(deadline_us=late_us)
        await handler.succeed(call)
        assert (await server.ended(late)).status is Status.MISSED
        assert await handler.has_no_call(server)


async def test_wait_on_an_unknown_execution_says_so(server: Server) -> None:
    with pytest.raises(NotFound):
        await server.dispatcher.wait("000000000000")


async def test_a_slow_handler_does_not_delay_another(
    server: Server, context: zmq.asyncio.Context
) -> None:
    plain = Plain(context, "slow")
    await plain.register(server.endpoint)
    slow = [await server.submit("slow") for _ in range(20)]
    async with worker(context, server, "fast") as handler:
        for _ in range(20):
            execution_id = await server.submit("fast")
            await handler.succeed(await handler.call())
            async with asyncio.timeout(WITHIN_S):
                await server.dispatcher.wait(execution_id)
    assert not any(server.status(one).value in sz.TERMINAL for one in slow)


async def test_calls_go_to_the_least_busy_instance(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with (
        worker(context, server, instance="large", concurrency=4) as large,
        worker(context, server, instance="small", concurrency=1) as small,
    ):
        await asyncio.gather(*[server.submit() for _ in range(5)])
        for _ in range(4):
            await large.call()
        await small.call()
        info = server.gateway.handler("worker")
        assert info is not None
        assert {i.instance: i.running for i in info.instances} == {"large": 4, "small": 1}


async def test_an_instance_never_has_more_calls_than_its_concurrency(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server, concurrency=2) as handler:
        await asyncio.gather(*[server.submit() for _ in range(5)])
        first, _ = await handler.call(), await handler.call()
        assert await handler.has_no_call(server)
        await handler.succeed(first)
        await handler.call()
        assert await handler.has_no_call(server)


# Failure and retry


async def test_a_failed_attempt_is_a_row_with_a_due_time_and_the_next_one_grows_the_attempt(
    server: Server, context: zmq.asyncio.Context
) -> None:
    policy = RetryPolicy(max_attempts=3, base_delay=0.2, factor=1.0, jitter=0.0)
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=policy)
        first = await handler.call()
        await handler.fail(first, "disk on fire", traceback="Traceback …")
        await handler.acked(first["id"])
        waiting = server.store.execution(execution_id)
        assert waiting is not None
        assert (waiting.status, waiting.attempt) == (Status.QUEUED, 1)
        failed = server.store.attempts(execution_id)[0]
        assert failed.ended_us is not None
        assert waiting.due_us - failed.ended_us == 200_000
        assert (failed.outcome, failed.error) == ("error", "disk on fire")
        assert failed.traceback == "Traceback …"
        assert server.gateway.pick("worker") is not None  # waiting holds no slot
        second = await handler.call()
        assert second["id"] == f"{execution_id}:2"
        await handler.succeed(second)
        done = await server.ended(execution_id)
        assert (done.status, done.attempt, done.error) == (Status.SUCCESS, 2, None)


async def test_the_last_failed_attempt_is_final(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=SOON)
        for attempt in (1, 2, 3):
            call = await handler.call()
            assert call["attempt"] == attempt
            await handler.fail(call, f"failure {attempt}")
        done = await server.ended(execution_id)
        assert (done.status, done.error) == (Status.ERROR, "failure 3")
        assert server.attempts(execution_id) == [(1, "error"), (2, "error"), (3, "error")]


async def test_a_timeout_tells_the_handler_to_cancel_and_keeps_the_late_result_as_late(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit(timeout=0.05, retry=ONCE)
        call = await handler.call()
        assert await handler.control("cancel") == {"id": call["id"], "reason": "timeout"}
        done = await server.ended(execution_id)
        assert (done.status, server.attempts(execution_id)) == (Status.TIMEOUT, [(1, "timeout")])
        await handler.succeed(call, "finished after all")
        await handler.acked(call["id"])
        assert server.attempts(execution_id) == [(1, "late")]
        assert server.store.execution(execution_id) == done


async def test_a_handler_that_obeys_a_timeout_leaves_the_attempt_a_timeout(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit(timeout=0.05, retry=ONCE)
        call = await handler.call()
        await handler.control("cancel")
        await server.ended(execution_id)
        await handler.fail(call, "stopped: timeout", cancelled=True)
        await handler.acked(call["id"])
        assert server.attempts(execution_id) == [(1, "timeout")]


async def test_a_timed_out_call_holds_its_slot_until_the_handler_has_stopped_it(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        await server.ended(await server.submit(timeout=0.05, retry=ONCE))
        call = await handler.call()
        following = await server.submit()
        assert await handler.has_no_call(server)
        await handler.fail(call, cancelled=True)
        assert (await handler.call())["execution_id"] == following


async def test_a_late_result_never_changes_a_newer_attempt(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with (
        worker(context, server, instance="stuck") as stuck,
        worker(context, server, instance="other") as other,
    ):
        execution_id = await server.submit(timeout=0.05, retry=SOON)
        first = await asyncio.wait_for(_first_call(stuck, other), WITHIN_S)
        holder, call = first
        spare = other if holder is stuck else stuck
        again = await spare.call()
        assert again["attempt"] == 2
        await holder.succeed(call, "old")
        await holder.acked(call["id"])
        assert server.attempts(execution_id)[0] == (1, "late")
        running = server.store.execution(execution_id)
        assert running is not None
        assert (running.result, running.attempt) == (None, 2)


async def _first_call(*handlers: DialIn) -> tuple[DialIn, dict[str, Any]]:
    waiting = {asyncio.ensure_future(handler.call()): handler for handler in handlers}
    done, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    task = done.pop()
    return waiting[task], task.result()


async def test_a_result_is_acknowledged_every_time_it_is_sent_and_counts_once(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit()
        call = await handler.call()
        for result in ("first", "again", "once more"):
            await handler.succeed(call, result)
            await handler.acked(call["id"])
        execution = server.store.execution(execution_id)
        assert execution is not None
        assert execution.result == "first"


async def test_a_result_nobody_asked_for_is_acknowledged_and_changes_nothing(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        await handler.send({"id": "0123456789ab:1", "success": True})
        await handler.acked("0123456789ab:1")
        assert server.store.executions(limit=10) == []


async def test_no_handler_can_end_what_another_runs(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with (
        worker(context, server) as handler,
        worker(context, server, "stranger") as stranger,
    ):
        execution_id = await server.submit(timeout=0.3, retry=ONCE)
        call = await handler.call()
        await stranger.succeed(call, "forged")
        await stranger.acked(call["id"])
        assert server.status(execution_id) is Status.RUNNING
        await server.ended(execution_id)
        await stranger.succeed(call, "forged")
        await stranger.acked(call["id"])
        assert server.attempts(execution_id) == [(1, "timeout")]


async def test_a_refused_call_is_queued_again_without_using_an_attempt(
    server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "REFUSED_DELAY_S", 0.05)
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=ONCE)
        first = await handler.call()
        await handler.fail(first, "no free slot", refused=True)
        await handler.acked(first["id"])
        second = await handler.call()
        assert second["id"] == first["id"]
        await handler.succeed(second)
        done = await server.ended(execution_id)
        assert (done.status, done.attempt) == (Status.SUCCESS, 1)
        assert server.attempts(execution_id) == []


async def test_a_call_that_was_refused_has_not_started(
    server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "REFUSED_DELAY_S", 60)
    async with worker(context, server) as handler:
        execution_id = await server.submit()
        call = await handler.call()
        await handler.fail(call, "no free slot", refused=True)

        def told() -> tuple[Any, ...]:
            found = server.store.execution(execution_id)
            assert found is not None
            return found.status, found.attempt, found.started_us, found.instance

        await until(lambda: told()[0] is not Status.RUNNING)
        assert told() == (Status.QUEUED, 0, None, None)


# Cancel


async def test_a_queued_execution_is_cancelled_at_once(server: Server) -> None:
    execution_id = await server.submit()
    cancelled = await server.dispatcher.cancel(execution_id, "cancelled")
    assert cancelled is not None
    assert (cancelled.status, server.attempts(execution_id)) == (Status.CANCELLED, [])
    with pytest.raises(Conflict):
        await server.dispatcher.cancel(execution_id, "cancelled")


async def test_cancelling_an_unknown_execution_gives_none(server: Server) -> None:
    assert await server.dispatcher.cancel("000000000000", "cancelled") is None
    assert await server.dispatcher.cancel("not an id", "cancelled") is None


async def test_what_is_due_sooner_starts_sooner_whatever_was_put_off_first(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server, concurrency=9) as handler:
        soon_us = server.store.clock.now_us()
        in_order = {}
        for delay_ms in (90, 30, 60, 20):
            in_order[delay_ms] = await server.fire(due_us=soon_us + delay_ms * 1_000)
        called = [(await handler.call())["execution_id"] for _ in in_order]
        assert called == [in_order[delay_ms] for delay_ms in sorted(in_order)]


async def test_an_execution_that_waits_for_its_retry_is_cancelled_at_once(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit()
        call = await handler.call()
        await handler.fail(call)
        await handler.acked(call["id"])
        await server.dispatcher.cancel(execution_id, "cancelled")
        assert (await server.ended(execution_id)).status is Status.CANCELLED
        assert server.attempts(execution_id) == [(1, "error")]


async def test_a_running_execution_is_cancelled_through_its_handler(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit()
        call = await handler.call()
        still = await server.dispatcher.cancel(execution_id, "cancelled")
        assert still is not None
        assert still.status is Status.RUNNING
        assert await handler.control("cancel") == {"id": call["id"], "reason": "cancelled"}
        await handler.fail(call, "stopped", cancelled=True)
        done = await server.ended(execution_id)
        assert (done.status, done.error) == (Status.CANCELLED, "cancelled: cancelled")
        assert server.attempts(execution_id) == [(1, "cancelled")]


async def test_a_job_that_ends_well_although_told_to_stop_has_succeeded(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit()
        call = await handler.call()
        await server.dispatcher.cancel(execution_id, "cancelled")
        await handler.succeed(call, 42)
        done = await server.ended(execution_id)
        assert (done.status, done.result) == (Status.SUCCESS, 42)


async def test_the_slot_of_a_call_cancelled_before_it_was_recorded_goes_to_the_next(
    server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims: list[sz.Commit[bool]] = []

    def claim(execution: sz.Execution) -> sz.Commit[bool]:
        monkeypatch.undo()
        claims.append(sz.Commit())
        return claims[0]

    first, second = await server.submit(), await server.submit()
    monkeypatch.setattr(server.store, "claim_execution", claim)
    async with worker(context, server) as handler:
        await until(lambda: claims)
        await server.dispatcher.cancel(first, "not needed")
        claims[0].settle(sz.StoreUnavailable("the disk is full"))
        assert (await server.ended(first)).status is Status.CANCELLED
        assert (await handler.call())["execution_id"] == second


async def test_a_job_that_does_not_stop_counts_as_cancelled_after_a_grace(
    server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "CANCEL_GRACE_S", 0.05)
    async with worker(context, server) as handler:
        execution_id = await server.submit()
        await handler.call()
        await server.dispatcher.cancel(execution_id, "cancelled")
        assert (await server.ended(execution_id)).status is Status.CANCELLED


async def test_a_cancel_while_the_claim_is_being_stored_calls_nobody_and_frees_the_slot(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        busy = await server.submit()
        call = await handler.call()
        cancelled, waiting = await server.submit(), await server.submit()
        with server.held_writes():
            await handler.succeed(call)
            await until(lambda: server.dispatcher._live[cancelled].stage is sz.Stage.CLAIMING)
            await server.dispatcher.cancel(cancelled, "cancelled")
        assert (await server.ended(cancelled)).status is Status.CANCELLED
        assert (await handler.call())["execution_id"] == waiting
        assert (await server.ended(busy)).status is Status.SUCCESS


async def test_a_cancel_while_the_execution_itself_is_being_stored_is_not_forgotten(
    server: Server,
) -> None:
    with server.held_writes():
        submitting = asyncio.ensure_future(server.submit())
        await until(lambda: server.dispatcher._live)
        (execution_id,) = server.dispatcher._live
        await server.dispatcher.cancel(execution_id, "cancelled")
    await submitting
    assert (await server.ended(execution_id)).status is Status.CANCELLED


async def test_a_cancel_while_a_refused_call_is_put_back_is_not_forgotten(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit()
        call = await handler.call()
        with server.held_writes():
            await handler.fail(call, "draining", refused=True)
            await until(lambda: server.dispatcher._live[execution_id].stage is sz.Stage.ENDING)
            await server.dispatcher.cancel(execution_id, "cancelled")
        assert (await server.ended(execution_id)).status is Status.CANCELLED


async def test_a_cancel_while_a_retry_is_being_stored_is_not_forgotten(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit()
        call = await handler.call()
        with server.held_writes():
            await handler.fail(call, "first failure")
            await until(lambda: server.dispatcher._live[execution_id].stage is sz.Stage.ENDING)
            await server.dispatcher.cancel(execution_id, "cancelled")
        assert (await server.ended(execution_id)).status is Status.CANCELLED


async def test_deleting_a_schedule_cancels_what_it_queued_and_lets_run_what_runs(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        running = await server.fire(Overlap.QUEUE)
        call = await handler.call()
        waiting = await server.fire(Overlap.QUEUE)
        server.dispatcher.cancel_queued("nightly", "schedule removed")
        assert (await server.ended(waiting)).status is Status.CANCELLED
        await handler.succeed(call)
        assert (await server.ended(running)).status is Status.SUCCESS


async def test_deleting_a_schedule_cancels_a_fire_that_is_still_being_stored(
    server: Server,
) -> None:
    with server.held_writes():
        firing = asyncio.ensure_future(server.fire())
        await until(lambda: server.dispatcher._live)
        server.dispatcher.cancel_queued("nightly", "schedule removed")
    assert (await server.ended(await firing)).status is Status.CANCELLED


# Overlap


async def test_overlap_skip_leaves_a_row_that_says_so(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server, concurrency=2) as handler:
        await server.fire(Overlap.SKIP)
        call = await handler.call()
        skipped = server.store.execution(await server.fire(Overlap.SKIP))
        assert skipped is not None
        assert (skipped.status, skipped.reason) == (Status.SKIPPED, Reason.OVERLAP)
        await handler.succeed(call)
        await handler.acked(call["id"])
        assert server.status(await server.fire(Overlap.SKIP)) is not Status.SKIPPED


async def test_overlap_queue_runs_them_one_after_another_in_order(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server, concurrency=5) as handler:
        fires = [await server.fire(Overlap.QUEUE) for _ in range(3)]
        for execution_id in fires:
            call = await handler.call()
            assert call["execution_id"] == execution_id
            assert await handler.has_no_call(server)
            await handler.succeed(call)


async def test_overlap_queue_waits_while_the_earlier_one_waits_for_its_retry(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server, concurrency=2) as handler:
        first = await server.fire(Overlap.QUEUE, retry=SOON)
        second = await server.fire(Overlap.QUEUE)
        await handler.fail(await handler.call())
        retried = await handler.call()
        assert (retried["execution_id"], retried["attempt"]) == (first, 2)
        await handler.succeed(retried)
        assert (await handler.call())["execution_id"] == second


async def test_overlap_allow_runs_them_together(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server, concurrency=2) as handler:
        fires = [await server.fire(Overlap.ALLOW) for _ in range(2)]
        calls = [await handler.call() for _ in range(2)]
        assert [call["execution_id"] for call in calls] == fires


async def test_overlap_replace_cancels_the_running_one_and_starts_when_it_has_ended(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server, concurrency=2) as handler:
        old = await server.fire(Overlap.REPLACE)
        call = await handler.call()
        new = await server.fire(Overlap.REPLACE)
        assert await handler.control("cancel") == {"id": call["id"], "reason": "replaced"}
        assert await handler.has_no_call(server)
        await handler.fail(call, "stopped", cancelled=True)
        assert (await handler.call())["execution_id"] == new
        assert (await server.ended(old)).status is Status.CANCELLED


async def test_an_endless_queue_of_one_schedule_is_skipped_at_its_bound(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_QUEUED_OF_SCHEDULE", 3)
    fires = [await server.fire(Overlap.QUEUE) for _ in range(5)]
    states = [server.status(execution_id).value for execution_id in fires]
    assert states == ["queued"] * 3 + ["skipped"] * 2


# Handlers that go away


@pytest.mark.usefixtures("fast_heartbeats")
async def test_what_a_silent_handler_ran_is_lost_and_never_runs_twice_with_one_attempt(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=ONCE)
        call = await handler.call()
        done = await server.ended(execution_id)
        assert (done.status, server.attempts(execution_id)) == (Status.LOST, [(1, "lost")])
        assert done.error == "handler 'worker' was lost while it ran this"
        assert server.handler_status() == "Disconnected"
        await handler.succeed(call, "late")
        await handler.acked(call["id"])
        assert server.attempts(execution_id) == [(1, "late")]
        assert server.status(execution_id) is Status.LOST


async def test_a_lost_attempt_is_repeated_on_another_instance(
    server: Server, context: zmq.asyncio.Context, fast_heartbeats: None
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=SOON)
        await handler.call()
        await until(lambda: server.attempts(execution_id) == [(1, "lost")])
        async with worker(context, server, instance="two") as other:
            call = await other.call()
            assert (call["execution_id"], call["attempt"]) == (execution_id, 2)
            await other.succeed(call)
            assert (await server.ended(execution_id)).status is Status.SUCCESS


@pytest.mark.usefixtures("fast_heartbeats")
async def test_a_handler_thought_gone_is_asked_to_register_and_to_drop_what_was_given_up(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=ONCE)
        call = await handler.call()
        await server.ended(execution_id)
        assert (await handler.heartbeat())["code"] == "unknown_instance"
        reply = await handler.register(running=[call["id"]])
        assert reply["forget"] == [call["id"]]
        assert server.handler_status() == "Connected"


async def test_a_call_that_was_forgotten_does_not_hold_a_slot(
    server: Server, context: zmq.asyncio.Context
) -> None:
    handler = DialIn(context, server.endpoint, "worker")
    reply = await handler.register(running=["0123456789ab:1"])
    assert reply["forget"] == ["0123456789ab:1"]
    execution_id = await server.submit()
    assert (await handler.call())["execution_id"] == execution_id


async def test_a_handler_that_has_left_can_be_forgotten(
    serve: Callable[..., Server], context: zmq.asyncio.Context
) -> None:
    server = serve()
    with pytest.raises(NotFound):
        await server.gateway.forget("worker")
    async with worker(context, server) as handler:
        with pytest.raises(Conflict, match="connected"):
            await server.gateway.forget("worker")
        await handler.request("report_status", **handler.profile, status="offline")
        await until(lambda: server.handler_status() == "Disconnected")
        await server.gateway.forget("worker")
        assert server.gateway.handler("worker") is None
        assert server.published[-1] == ("handler", "worker")
        server.close()
        assert serve(port=server.port).gateway.handler("worker") is None


async def test_a_configured_handler_is_not_forgotten(serve: Callable[..., Server]) -> None:
    spec = sz.parse_config(
        {"handlers": {"worker": {"command": ["/bin/true"]}}}, environ={}
    ).handlers
    server = serve(handlers=spec)
    with pytest.raises(Conflict, match="configuration"):
        await server.gateway.forget("worker")


async def test_a_handler_that_leaves_is_disconnected_at_once(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=ONCE)
        await handler.call()
        await handler.request("report_status", handler_id="worker", status="offline")
        assert (await server.ended(execution_id)).status is Status.LOST
        assert server.handler_status() == "Disconnected"


async def test_a_draining_handler_is_called_no_more_and_may_finish(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server, concurrency=2) as handler:
        running = await server.submit()
        call = await handler.call()
        await handler.request("report_status", handler_id="worker", status="draining")
        await handler.take(lambda m: m.get("reply_to") == "report_status")
        waiting = await server.submit()
        assert await handler.has_no_call(server)
        await handler.succeed(call)
        assert (await server.ended(running)).status is Status.SUCCESS
        assert server.status(waiting) is Status.QUEUED


async def test_a_plain_handler_that_dies_mid_call_loses_the_attempt_at_once(
    server: Server, context: zmq.asyncio.Context
) -> None:
    plain = Plain(context, "worker")
    await plain.register(server.endpoint)
    execution_id = await server.submit(retry=ONCE)
    await plain.call()
    plain.die()
    assert (await server.ended(execution_id)).status is Status.LOST
    assert server.handler_status() == "Disconnected"


async def test_a_plain_handler_that_is_started_again_at_its_address_is_called_at_once(
    server: Server, context: zmq.asyncio.Context
) -> None:
    plain = Plain(context, "worker")
    await plain.register(server.endpoint)
    execution_id = await server.submit(retry=SOON)
    await plain.call()
    port = int(plain.address.rpartition(":")[2])
    plain.die()
    await until(lambda: server.attempts(execution_id) == [(1, "lost")])
    reborn = Plain(context, "worker", port)
    async with asyncio.timeout(WITHIN_S):  # without any registration: the connection comes back
        assert (await reborn.call())["attempt"] == 2
    await reborn.answer(success=True)
    assert (await server.ended(execution_id)).status is Status.SUCCESS


async def test_calls_to_a_connection_that_is_gone_are_queued_again_without_using_an_attempt(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        instance = server.gateway.pick("worker")
        assert instance is not None
        route = instance.route
        assert isinstance(route, bytes)
        handler.socket.close(0)
        await until(lambda: not server.gateway._send(route, b"{}"))  # ZeroMQ has noticed
        execution_id = await server.submit(retry=ONCE)
        await until(lambda: server.status(execution_id) is Status.QUEUED)
        assert server.handler_status() == "Disconnected"
        await handler.reconnect()
        assert (await handler.call())["id"] == f"{execution_id}:1"


async def test_a_connection_that_is_heard_again_gets_what_waited(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        instance = server.gateway.pick("worker")
        assert instance is not None
        instance.unreachable = True  # as after a send that found the peer's buffers full
        execution_id = await server.submit()
        assert server.status(execution_id) is Status.QUEUED
        await handler.heartbeat()
        assert (await handler.call())["execution_id"] == execution_id


# Connections that come back


async def test_over_a_new_connection_running_calls_go_on_and_finished_ones_count_once(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server, concurrency=3) as handler:
        ids = [await server.submit(retry=ONCE) for _ in range(3)]
        runs, finished, dropped = [await handler.call() for _ in range(3)]
        result = {"id": finished["id"], "success": True, "result": "kept"}
        reply = await handler.reconnect(running=[runs["id"]], finished=[result])
        assert (reply["status"], reply["forget"]) == ("re-registered", [])
        await handler.acked(finished["id"])
        assert (await server.ended(ids[1])).result == "kept"
        assert (await server.ended(ids[2])).status is Status.LOST
        await handler.succeed(runs)
        assert (await server.ended(ids[0])).status is Status.SUCCESS
        await handler.succeed(dropped, "too late")
        await handler.acked(dropped["id"])
        assert server.attempts(ids[2]) == [(1, "late")]


async def test_a_new_connection_takes_the_slots_of_the_old_one_with_it(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        await server.ended(await server.submit(timeout=0.05, retry=ONCE))
        call = await handler.call()  # timed out; its slot is held until it ends
        assert server.gateway.pick("worker") is None
        await handler.reconnect()  # it does not run any more
        execution_id = await server.submit()
        assert (await handler.call())["execution_id"] == execution_id
        assert call["execution_id"] != execution_id


async def test_a_call_being_stored_while_its_handler_reconnects_is_made_over_the_new_connection(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        with server.held_writes():
            submitting = asyncio.ensure_future(server.submit(retry=ONCE))
            await until(lambda: server.dispatcher.running)
            old = handler.socket  # stays open: ZeroMQ would still take messages for it
            handler.connect()
            await handler.register()
        execution_id = await submitting
        call = await handler.call()
        assert call["id"] == f"{execution_id}:1"
        old.close(0)


@pytest.mark.usefixtures("fast_heartbeats")
async def test_a_call_being_stored_while_its_handler_is_given_up_waits_for_the_next_one(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server):
        with server.held_writes():
            submitting = asyncio.ensure_future(server.submit(retry=ONCE))
            await until(lambda: server.dispatcher.running)
            await until(lambda: server.handler_status() == "Disconnected")
        execution_id = await submitting
        async with worker(context, server, instance="two") as other:
            assert (await other.call())["id"] == f"{execution_id}:1"


async def test_a_connection_that_registers_as_another_handler_leaves_the_first(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server, "first") as handler:
        lost = await server.submit("first", retry=ONCE)
        await handler.call()
        handler.profile["handler_id"] = "second"
        await handler.register()
        assert (await server.ended(lost)).status is Status.LOST
        assert server.handler_status("first") == "Disconnected"
        await server.submit("second")
        second = await handler.call()
        await handler.succeed(second)
        assert (await server.ended(second["execution_id"])).status is Status.SUCCESS


async def test_the_server_says_hello_to_a_new_connection_and_to_a_stranger_with_a_result(
    server: Server, context: zmq.asyncio.Context
) -> None:
    handler = DialIn(context, server.endpoint, "worker")
    await handler.socket.send_multipart([b""])  # as ZMQ_PROBE_ROUTER does
    await handler.control("hello")
    await handler.send({"id": "0123456789ab:1", "success": True})
    await handler.control("hello")


# Restarts of the server


async def test_a_restarted_server_adopts_what_runs_and_records_what_finished_once(
    serve: Callable[..., Server], context: zmq.asyncio.Context
) -> None:
    server = serve()
    async with worker(context, server, concurrency=3) as handler:
        ids = [await server.submit(retry=ONCE) for _ in range(2)]
        runs, finished = await handler.call(), await handler.call()
        server.close()
        server = serve(port=server.port)
        result = {"id": finished["id"], "success": True, "result": 7}
        reply = await handler.reconnect(running=[runs["id"]], finished=[result])
        assert reply["forget"] == []
        await handler.acked(finished["id"])
        assert (await server.ended(ids[1])).result == 7
        await handler.succeed(runs, 8)
        assert (await server.ended(ids[0])).result == 8
        await handler.send(result)
        await handler.acked(finished["id"])
        assert [server.attempts(one) for one in ids] == [[], []]


async def test_a_restarted_server_gives_up_what_nobody_claims(
    serve: Callable[..., Server], context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "ADOPT_S", 0.05)
    server = serve()
    async with worker(context, server, concurrency=2) as handler:
        once, retried = await server.submit(retry=ONCE), await server.submit(retry=SOON)
        for _ in range(2):
            await handler.call()
        server.close()
        server = serve(port=server.port)
        assert (await server.ended(once)).status is Status.LOST
        await until(lambda: server.attempts(retried) == [(1, "lost")])
        await handler.reconnect()
        assert (await handler.call())["id"] == f"{retried}:2"


async def test_a_restarted_server_goes_on_with_the_queue_in_order(
    serve: Callable[..., Server], context: zmq.asyncio.Context
) -> None:
    server = serve()
    ids = [await server.submit() for _ in range(5)]
    server.close()
    server = serve(port=server.port)
    async with worker(context, server, concurrency=5) as handler:
        assert [(await handler.call())["execution_id"] for _ in ids] == ids


async def test_a_restarted_server_starts_nothing_past_its_deadline(
    serve: Callable[..., Server], context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    now_us = server.store.clock.now_us()
    late = await server.fire(deadline_us=now_us + 100_000)
    server.close()
    await until(lambda: server.store.clock.now_us() > now_us + 100_000)
    monkeypatch.setattr(sz, "TICK_S", 60.0)  # its handler is there before the first look
    server = serve(port=server.port)
    async with worker(context, server) as handler:
        assert (await server.ended(late)).status is Status.MISSED
        assert await handler.has_no_call(server)


async def test_a_restarted_server_finds_its_plain_handlers_by_itself(
    serve: Callable[..., Server], context: zmq.asyncio.Context
) -> None:
    server = serve()
    plain = Plain(context, "worker")
    await plain.register(server.endpoint)
    await until(lambda: server.store.known_handlers())
    server.close()
    server = serve(port=server.port)
    execution_id = await server.submit()
    assert (await plain.call())["execution_id"] == execution_id
    await plain.answer(success=True)
    assert (await server.ended(execution_id)).status is Status.SUCCESS
    assert server.handler_status() == "Connected"


async def test_a_starting_server_has_adopted_everything_before_it_hears_a_handler(
    serve: Callable[..., Server],
    context: zmq.asyncio.Context,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = serve(name="schedulezero.db")
    async with worker(context, old, concurrency=2) as handler:
        ids = [await old.submit(retry=ONCE) for _ in range(2)]
        runs, finished = await handler.call(), await handler.call()
        old.close()
        replies = []

        async def slow_start(*_: Any) -> None:
            """Opening HTTP takes so long that the handler is back before."""
            result = {"id": finished["id"], "success": True, "result": 7}
            replies.append(await handler.reconnect(running=[runs["id"]], finished=[result]))
            await handler.acked(finished["id"])

        monkeypatch.setattr(sz.HttpServer, "start", slow_start)
        config = replace(Config(zmq_port=old.port), data_dir=str(tmp_path))
        server = sz.Server(config, Clock())
        try:
            await server.open()
            assert replies[0]["forget"] == []
            assert (await server.dispatcher.wait(ids[1])).result == 7
            await handler.succeed(runs, 8)
            async with asyncio.timeout(WITHIN_S):
                assert (await server.dispatcher.wait(ids[0])).result == 8
        finally:
            monkeypatch.undo()
            await server.close()


async def test_a_cancel_is_not_undone_by_a_restart_of_the_server(
    serve: Callable[..., Server], context: zmq.asyncio.Context
) -> None:
    server = serve()
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=SOON)
        call = await handler.call()
        await server.dispatcher.cancel(execution_id, "cancelled")
        await handler.control("cancel")
        server.close()
        server = serve(port=server.port)
        stopped = {"id": call["id"], "success": False, "error": "stopped", "cancelled": True}
        await handler.reconnect(finished=[stopped])
        assert (await server.ended(execution_id)).status is Status.CANCELLED


async def test_a_server_that_stood_still_does_not_blame_its_handlers(
    serve: Callable[..., Server], context: zmq.asyncio.Context, fast_heartbeats: None
) -> None:
    class Stopwatch(Clock):
        skipped_s = 0.0

        def monotonic(self) -> float:
            return super().monotonic() + self.skipped_s

    clock = Stopwatch()
    server = serve(clock=clock)
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=ONCE)
        call = await handler.call()
        clock.skipped_s = 3_600.0  # SIGSTOP, or a virtual machine that was paused
        swept = server.gateway._sweeper
        await until(lambda: server.gateway._sweeper is not swept)
        assert server.handler_status() == "Connected"
        await handler.succeed(call)
        assert (await server.ended(execution_id)).status is Status.SUCCESS


# Bounds


async def test_the_log_of_a_run_is_kept_with_its_head_and_its_tail(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit()
        call = await handler.call()
        for start in range(0, 5_000, 500):
            lines = [[1.5, "stdout", f"line {start + n:06d} ä"] for n in range(500)]
            await handler.request("log", id=call["id"], lines=lines)
        await handler.succeed(call)
        await server.ended(execution_id)
        log = server.store.log(execution_id)
        assert log is not None
        assert len(log.encode()) <= sz.MAX_LOG_BYTES + 100
        assert log.startswith("1970-01-01T00:00:01.500000Z stdout line 000000 ä\n")
        assert log.endswith("line 004999 ä\n")
        assert "lines left out" in log


async def test_the_log_of_many_attempts_is_bounded_too(
    server: Server, context: zmq.asyncio.Context
) -> None:
    policy = RetryPolicy(max_attempts=5, base_delay=0.0, jitter=0.0)
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=policy)
        for attempt in range(1, 6):
            call = await handler.call()
            lines = [[0, "stdout", f"attempt {attempt} " + "x" * 200]] * 400
            await handler.request("log", id=call["id"], lines=lines)
            await handler.fail(call)
        await server.ended(execution_id)
        log = server.store.log(execution_id)
        assert log is not None
        assert len(log.encode()) <= sz.MAX_LOG_BYTES + 200
        assert "attempt 1 " in log
        assert "attempt 5 " in log


async def test_the_log_of_an_attempt_is_told_from_that_of_another(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=SOON)
        first = await handler.call()
        await handler.request("log", id=first["id"], lines=[[0, "stdout", "first try"]])
        await handler.fail(first)
        second = await handler.call()
        await handler.request("log", id=first["id"], lines=[[0, "stdout", "too late"]])
        await handler.request("log", id=second["id"], lines=[[0, "stdout", "second try"]])
        await handler.succeed(second)
        await server.ended(execution_id)
        log = server.store.log(execution_id)
        assert log is not None
        texts = [line.split(" ", 2)[2] for line in log.splitlines()]
        assert texts == ["first try", "second try"]


async def test_what_was_missed_or_cancelled_takes_no_more_room_in_the_queue(
    server: Server,
) -> None:
    patient = await server.submit()
    now_us = server.store.clock.now_us()
    missed = [await server.fire(deadline_us=now_us) for _ in range(20)]
    cancelled = [await server.submit() for _ in range(20)]
    for execution_id in cancelled:
        await server.dispatcher.cancel(execution_id, "cancelled")
    for execution_id in missed:
        await server.ended(execution_id)
    assert server.dispatcher.queued("worker") == 1
    assert [*server.dispatcher._ready["worker"]] == [patient]


async def test_run_now_calls_are_refused_above_the_bound_and_fires_are_not(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_QUEUED", 2)
    for _ in range(2):
        await server.submit()
    with pytest.raises(sz.Overloaded):
        await server.submit()
    assert server.status(await server.fire()) is Status.QUEUED


async def test_what_the_parameters_of_queued_calls_take_is_bounded_until_they_end(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_QUEUED_BYTES", 1 << 20)
    first = await server.submit(job_params={"many": [{}] * 10_000})  # 40 KB of text
    with pytest.raises(sz.Overloaded, match="parameters of 1 MiB are queued already"):
        await server.submit()
    assert server.status(await server.fire()) is Status.QUEUED
    await server.dispatcher.cancel(first, "cancelled")
    await server.submit()


async def test_a_handler_that_is_away_leaves_room_in_the_queue_for_the_others(
    server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_QUEUED_OF_HANDLER", 2)
    for _ in range(2):
        await server.submit("away")
    with pytest.raises(sz.Overloaded, match="2 executions wait for the handler 'away' already"):
        await server.submit("away")
    async with worker(context, server) as handler:
        execution_id = await server.submit()
        assert (await handler.call())["execution_id"] == execution_id


async def test_a_full_write_queue_refuses_a_call_and_leaks_no_slot(
    server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker(context, server) as handler:
        with server.held_writes():
            monkeypatch.setattr(sz, "MAX_WRITES_QUEUED", 0)
            with pytest.raises(sz.Overloaded):
                await server.submit()
            monkeypatch.undo()
        await until(lambda: not (server.dispatcher.running or server.dispatcher.waiting))
        execution_id = await server.submit()
        assert (await handler.call())["execution_id"] == execution_id


async def test_a_full_write_queue_loses_no_result_and_no_queued_execution(
    server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "STORE_RETRY_S", 0.02)
    async with worker(context, server) as handler:
        first, second = await server.submit(), await server.submit()
        call = await handler.call()
        monkeypatch.setattr(sz, "MAX_WRITES_QUEUED", -1)
        await handler.succeed(call, "kept")
        await handler.send({"id": "0123456789ab:1", "success": True})  # late: not stored either
        await handler.has_no_call(server)
        monkeypatch.setattr(sz, "MAX_WRITES_QUEUED", 100)
        assert (await server.ended(first)).result == "kept"
        await handler.acked(call["id"])
        assert (await handler.call())["execution_id"] == second


async def test_progress_of_a_run_can_be_read_while_it_runs(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit()
        call = await handler.call()
        await handler.request("progress", id=call["id"], percent=40, message="half way")
        await until(lambda: server.dispatcher.progress(execution_id))
        assert server.dispatcher.progress(execution_id) == (40, "half way")
        await handler.request("progress", id=call["id"], percent=140)
        await until(lambda: server.dispatcher.progress(execution_id) == (None, None))


async def test_a_flood_from_one_connection_leaves_the_others_their_turn(
    server: Server, context: zmq.asyncio.Context
) -> None:
    async with worker(context, server) as handler:
        flood = DialIn(context, server.endpoint, "flood")
        for _ in range(5_000):
            await flood.send({"method": "log", "params": {"id": "x:1", "lines": []}})
        execution_id = await server.submit()
        async with asyncio.timeout(WITHIN_S):
            await handler.succeed(await handler.call())
            await server.dispatcher.wait(execution_id)


async def test_a_plain_handler_that_floods_replies_leaves_the_loop_its_turn(
    server: Server, context: zmq.asyncio.Context
) -> None:
    hostile = context.socket(zmq.ROUTER)
    hostile.setsockopt(zmq.LINGER, 0)
    hostile.setsockopt(zmq.SNDHWM, 0)
    port = hostile.bind_to_random_port("tcp://127.0.0.1")
    asking = Plain(context, "flood")
    asking.address = f"tcp://127.0.0.1:{port}"
    await asking.register(server.endpoint)
    await server.submit("flood")
    async with asyncio.timeout(WITHIN_S):
        peer = (await hostile.recv_multipart())[0]
    stop = threading.Event()

    def flood() -> None:
        plain_socket: zmq.Socket[bytes] = zmq.Socket(hostile)
        while not stop.is_set():
            plain_socket.send_multipart([peer, b"", b'{"success":true}'])

    flooding = asyncio.get_running_loop().run_in_executor(None, flood)
    try:
        async with worker(context, server) as handler:
            execution_id = await server.submit()
            async with asyncio.timeout(WITHIN_S):
                await handler.succeed(await handler.call())
                await server.dispatcher.wait(execution_id)
    finally:
        stop.set()
        await flooding
        hostile.close(0)


async def test_an_address_that_does_not_speak_zeromq_is_not_hammered(server: Server) -> None:
    connections = 0

    async def slam(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    deaf = await asyncio.start_server(slam, "127.0.0.1", 0)
    port = deaf.sockets[0].getsockname()[1]
    context = zmq.asyncio.Context()
    plain = Plain(context, "worker")
    plain.address = f"tcp://127.0.0.1:{port}"
    await plain.register(server.endpoint)
    await until(lambda: connections)
    await asyncio.sleep(0.5)  # the span that is measured
    assert connections < 20
    deaf.close()
    context.destroy(0)


# Malformed and hostile messages


MALFORMED: list[Any] = [
    b"",
    b"\xff\xfe",
    b"no json",
    b"[1]",
    b'"text"',
    b"{",
    b"[" * 100_000,
    b'{"method": NaN}',
    b'{"a": 1, "a": 2}',
    b'{"n": 123456789012345678901234567890}',
    b'{"s": "\\ud800"}',
    {"method": "no_such_method"},
    {"method": None},
    {"method": ["ping"]},
    {"method": {"a": 1}},
    {"method": "ping", "params": [1]},
    {"method": "register"},
    {"method": "register", "params": {"handler_id": 5}},
    {"method": "register", "params": {"handler_id": "a b", "instance": "x"}},
    {"method": "register", "params": {"handler_id": "h", "instance": ""}},
    {"method": "register", "params": {"handler_id": "h", "instance": "tcp://127.0.0.1:9"}},
    {"method": "register", "params": {"handler_id": "h", "address": "ipc:///etc/passwd"}},
    {"method": "register", "params": {"handler_id": "h", "address": "tcp://*:1"}},
    {"method": "register", "params": {"handler_id": "h", "address": "tcp://[::1:80"}},
    {"method": "register", "params": {"handler_id": "h", "address": "tcp://a b:80"}},
    {"method": "register", "params": {"handler_id": "h", "address": "tcp://a\u0000b:80"}},
    {"method": "register", "params": {"handler_id": "h", "address": "tcp://\u00e9:80"}},
    {"method": "register", "params": {"handler_id": "h", "instance": "i", "methods": "work"}},
    {"method": "register", "params": {"handler_id": "h", "instance": "i", "methods": [5]}},
    {"method": "register", "params": {"handler_id": "h", "instance": "i", "concurrency": True}},
    {"method": "register", "params": {"handler_id": "h", "instance": "i", "concurrency": 0}},
    {"method": "register", "params": {"handler_id": "h", "instance": "i", "concurrency": 2**40}},
    {"method": "register", "params": {"handler_id": "h", "instance": "i", "running": [{}]}},
    {"method": "register", "params": {"handler_id": "h", "instance": "i", "running": ["x"]}},
    {"method": "register", "params": {"handler_id": "h", "instance": "i", "finished": ["x"]}},
    {"method": "register", "params": {"handler_id": "h", "instance": "i", "finished": [{}]}},
    {"method": "report_status", "params": {"status": "asleep"}},
    {"method": "report_status", "params": {"status": ["offline"]}},
    {"method": "log", "params": {"id": {}}},
    {"method": "log", "params": {"id": ["x"], "lines": []}},
    {"method": "log", "params": {"id": None, "lines": 5}},
    {"method": "progress", "params": {"id": {"a": []}}},
    {"method": "progress", "params": {"id": [], "percent": "x"}},
    {"id": None},
    {"id": 5, "success": True},
    {"id": ["x"], "success": True},
    {"id": "x", "success": True},
    {"id": "x:-1", "success": True},
    {"id": "x:\u0661", "success": True},
    {"id": "x:99999999999999999999", "success": True},
    {},
]  # fmt: skip


async def test_malformed_messages_are_survived_and_what_follows_them_is_read(
    server: Server, context: zmq.asyncio.Context
) -> None:
    for message in MALFORMED:
        handler = DialIn(context, server.endpoint, "worker")
        await handler.send(message)
        await handler.request("ping")
        await handler.take(lambda m: m.get("reply_to") == "ping")
        assert (await handler.register())["success"] is True
        execution_id = await server.submit()
        call = await handler.call()
        await handler.send(message)
        await handler.succeed(call)
        assert (await server.ended(execution_id)).status is Status.SUCCESS, message
        handler.socket.close(0)


@pytest.mark.parametrize(
    "body",
    [
        b'{"id": "%b", "success": true, "result": 18446744073709551616}',
        b'{"id": "%b", "success": true, "result": {"1": 1, "1": 2}}',
        b'{"id": "%b", "success": true, "result": NaN}',
        b'{"id": "%b", "success": true, "result": "\\ud800"}',
    ],
)
async def test_a_result_that_is_refused_has_failed_and_frees_the_slot(
    server: Server, context: zmq.asyncio.Context, body: bytes
) -> None:
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=ONCE)
        call = await handler.call()
        await handler.send(body % call["id"].encode())
        await handler.acked(call["id"])
        done = await server.ended(execution_id)
        assert done.status is Status.ERROR
        assert str(done.error).startswith("the handler's reply is malformed")
        assert server.gateway.pick("worker") is not None


async def test_malformed_frames_are_counted_and_survived(
    server: Server, context: zmq.asyncio.Context
) -> None:
    handler = DialIn(context, server.endpoint, "worker")
    for frames in ([b"x"], [b"", b"{}", b"{}"], [b"a", b"{}"], [b"", b""], [b"", b"\x00" * 500]):
        await handler.socket.send_multipart(frames)
    await handler.register()
    assert server.gateway.malformed == 5


async def test_a_refused_registration_says_which_field_is_wrong(
    server: Server, context: zmq.asyncio.Context
) -> None:
    handler = DialIn(context, server.endpoint, "bad id!")
    reply = await handler.register()
    assert (reply["success"], reply["code"]) == (False, "bad_message")
    assert "'handler_id'" in reply["error"]
    assert server.gateway.handlers() == []


async def test_methods_that_an_earlier_server_took_do_not_keep_a_later_one_from_starting(
    server: Server, serve: Callable[..., Server]
) -> None:
    await server.store.save_handler(
        "worker", "dial-in", '[{"name":"läuten","doc":"","parameters":[]}]', 1
    )
    server.close()
    assert serve().gateway.method_names("worker") == ["läuten"]


async def test_a_plain_handler_that_no_descriptor_is_left_for_is_refused(
    server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(link: sz.PlainLink) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    plain = Plain(context, "worker")
    with monkeypatch.context() as patched:
        patched.setattr(sz.PlainLink, "_open", exhausted)
        reply = await plain.register(server.endpoint)
    assert (reply["success"], reply["code"]) == (False, "bad_message")
    assert (await plain.register(server.endpoint))["success"] is True


async def test_any_exception_while_a_message_is_handled_costs_that_message_alone(
    server: Server, context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: Any) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setitem(sz.REQUESTS, "progress", explode)
    handler = DialIn(context, server.endpoint, "worker")
    for _ in range(3):
        await handler.request("progress")
    assert (await handler.register())["success"] is True
    assert server.gateway.malformed == 3


async def test_a_plain_handler_that_answers_nonsense_has_failed(
    server: Server, context: zmq.asyncio.Context
) -> None:
    plain = Plain(context, "worker")
    await plain.register(server.endpoint)
    execution_id = await server.submit(retry=ONCE)
    await plain.call()
    await plain.socket.send(b"not json")
    done = await server.ended(execution_id)
    assert done.status is Status.ERROR
    assert done.error is not None
    assert done.error.startswith("the handler's reply is malformed")


async def test_hostile_log_and_result_fields_are_bounded(
    server: Server, context: zmq.asyncio.Context
) -> None:
    lines = [
        [True, "stdout", "a bool is a time of one second"],
        [-1e308, {"level": 1}, ["text"]],
        [2**62, "x" * 1_000, "huge time"],
        ["now", "stdout", "no number"],
        "no list",
        [1, 2],
    ]
    async with worker(context, server) as handler:
        execution_id = await server.submit(retry=ONCE)
        call = await handler.call()
        await handler.request("log", id=call["id"], lines=lines, dropped=-5)
        await handler.fail(call, "e" * 100_000, traceback="t" * 100_000, success="yes")
        done = await server.ended(execution_id)
        assert (done.status, len(done.error or "")) == (Status.ERROR, sz.MAX_ERROR_CHARS)
        (attempt,) = server.store.attempts(execution_id)
        assert isinstance(attempt, Attempt)
        assert len(attempt.traceback or "") == sz.MAX_ERROR_CHARS
        log = server.store.log(execution_id)
        assert log is not None
        assert len(log.splitlines()) == 3
