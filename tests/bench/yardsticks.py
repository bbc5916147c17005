"""Other schedulers at the same work: `python yardsticks.py NAME SECONDS` prints their figures.

Each is called in its own process or through its own database: none of them goes through HTTP, so
they are measured at an advantage.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any

from bench import memory_mib, usage_of
from load import percentile

Figures = dict[str, float]


def figures_of(run_now: Callable[[int], list[float]], seconds: float) -> Figures:
    """Rates from `run_now(clients)`, which gives the latency of each call in `seconds`."""
    alone, together = run_now(1), run_now(32)
    return {
        "run_now_1": len(alone) / seconds,
        "run_now_32": len(together) / seconds,
        "run_now_32_p99": percentile(together, 0.99) * 1e3,
    }


def lateness_of(burst: list[float], each_second: list[float]) -> Figures:
    """From seconds late."""
    return {
        "burst_1000": percentile(burst, 0.99) * 1e3,
        "late_p50": percentile(each_second, 0.5) * 1e3,
        "late_p99": percentile(each_second, 0.99) * 1e3,
    }


def idle(pid: int, seconds: float) -> Figures:
    before = usage_of(pid).cpu_s
    time.sleep(seconds)
    used = usage_of(pid).cpu_s - before
    return {"idle_cpu": used / seconds * 100, "idle_rss": memory_mib(pid, "Rss")}


# huey: SqliteHuey, every commit synced, a consumer with threads that polls each millisecond


def huey_tasks(directory: str) -> tuple[Any, Any, Any]:
    from huey import SqliteHuey

    app = SqliteHuey(filename=f"{directory}/huey.db", fsync=True)
    return (
        app,
        app.task(name="nothing")(lambda: 1),
        app.task(name="late")(lambda due: time.time() - due),
    )


def wait(result: Any) -> Any:
    return result.get(blocking=True, timeout=60, backoff=1.0, max_delay=0.001)


def measure_huey(seconds: float) -> Figures:
    with tempfile.TemporaryDirectory() as directory:
        _, nothing, late = huey_tasks(directory)
        command = [sys.executable, __file__, "huey-consumer", directory]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        consumer = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
        pids = (consumer.pid, os.getpid())
        try:
            wait(nothing())
            written = sum(usage_of(pid).written_bytes for pid in pids)
            for _ in range(200):
                wait(nothing())
            written = sum(usage_of(pid).written_bytes for pid in pids) - written
            return {
                "disk_run_now": written / 200 / 1024,
                **figures_of(lambda clients: huey_run_now(nothing, clients, seconds), seconds),
                **lateness_of(huey_late(late, 1000, 0), huey_late(late, round(seconds * 2), 1)),
                **idle(consumer.pid, seconds),
            }
        finally:
            consumer.terminate()
            consumer.wait()


def huey_run_now(nothing: Any, clients: int, seconds: float) -> list[float]:
    end = time.perf_counter() + seconds

    def client(_: int) -> list[float]:
        latencies = []
        while (began := time.perf_counter()) < end:
            wait(nothing())
            latencies.append(time.perf_counter() - began)
        return latencies

    with ThreadPoolExecutor(clients) as pool:
        return list(chain.from_iterable(pool.map(client, range(clients))))


def huey_late(late: Any, count: int, apart_s: float) -> list[float]:
    """Of `count` tasks due in a few seconds; its scheduler looks once a second."""
    first = time.time() + 3 + count / 400
    dues = [first + number * apart_s for number in range(count)]
    results = [late.schedule((due,), eta=datetime.fromtimestamp(due, UTC)) for due in dues]
    return [wait(result) for result in results]


# APScheduler 4: memory store, everything in one process, nothing durable


async def aps_nothing() -> int:
    return 1


async def measure_apscheduler(seconds: float) -> Figures:
    from apscheduler import AsyncScheduler
    from apscheduler.triggers.date import DateTrigger
    from apscheduler.triggers.interval import IntervalTrigger

    async with AsyncScheduler() as scheduler:
        await scheduler.start_in_background()

        async def client(end: float) -> list[float]:
            latencies = []
            while (began := time.perf_counter()) < end:
                await scheduler.run_job(aps_nothing)
                latencies.append(time.perf_counter() - began)
            return latencies

        async def run_now(clients: int) -> list[float]:
            end = time.perf_counter() + seconds
            return list(
                chain.from_iterable(await asyncio.gather(*(client(end) for _ in range(clients))))
            )

        runs = {clients: await run_now(clients) for clients in (1, 32)}
        late: list[float] = []

        async def note(due: float) -> None:
            late.append(time.time() - due)

        await scheduler.configure_task("note", func=note)
        due = datetime.now(UTC) + timedelta(seconds=3)
        for _ in range(1000):
            await scheduler.add_schedule("note", DateTrigger(due), args=(due.timestamp(),))
        await asyncio.sleep(8)
        burst = late[:]
        due = datetime.now(UTC) + timedelta(seconds=1)
        end = due + timedelta(seconds=seconds * 2)
        each_second = IntervalTrigger(seconds=1, start_time=due, end_time=end)
        await scheduler.add_schedule("note", each_second, args=(due.timestamp(),))
        await asyncio.sleep(seconds * 2 + 2)
        ticks = [one % 1 for one in late[1000:]]
        for _ in range(1000):
            first = datetime.now(UTC) + timedelta(hours=1)
            await scheduler.add_schedule(aps_nothing, IntervalTrigger(hours=1, start_time=first))
        rest = await asyncio.to_thread(idle, os.getpid(), seconds)
    return {**figures_of(runs.__getitem__, seconds), **lateness_of(burst, ticks), **rest}


if __name__ == "__main__":
    name, argument = sys.argv[1:]
    if name == "huey-consumer":
        consume = {"workers": 8, "backoff": 1.0, "initial_delay": 0.001, "max_delay": 0.001}
        huey_tasks(argument)[0].create_consumer(scheduler_interval=1, **consume).run()
    elif name == "huey":
        print(json.dumps(measure_huey(float(argument))))
    else:
        print(json.dumps(asyncio.run(measure_apscheduler(float(argument)))))
