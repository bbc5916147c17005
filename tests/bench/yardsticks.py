"""Other schedulers doing the same work on the same machine: `python yardsticks.py NAME SECONDS`.

Prints one JSON object of figures. Each is called in its own process or through its own database:
none of them goes through HTTP, so they are measured at an advantage.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from load import percentile

LONG_S = 3600


def io_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/io").read_text()
    return int(text.split("\nwrite_bytes: ")[1].split()[0])


def memory_mb(pid: int, kind: str) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split(f"\n{kind}:")[1].split()[0]) / 1024


def cpu_s(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


# huey: SqliteHuey, every commit synced, a consumer with threads that polls each millisecond


def huey_tasks(directory: str) -> tuple[Any, Any, Any]:
    from huey import SqliteHuey

    app = SqliteHuey(filename=f"{directory}/huey.db", fsync=True)

    @app.task()
    def nothing() -> int:
        return 1

    @app.task()
    def note(due: float) -> float:
        return time.time() - due

    return app, nothing, note


def huey_consumer(directory: str) -> None:
    app, _, _ = huey_tasks(directory)
    app.create_consumer(
        workers=8, initial_delay=0.001, backoff=1.0, max_delay=0.001, scheduler_interval=1
    ).run()


def wait(result: Any) -> Any:
    return result.get(blocking=True, timeout=60, backoff=1.0, max_delay=0.001)


def huey_run_now(nothing: Any, clients: int, seconds: float) -> list[float]:
    end = time.perf_counter() + seconds
    latencies: queue.Queue[float] = queue.Queue()

    def client() -> None:
        while (began := time.perf_counter()) < end:
            wait(nothing())
            latencies.put(time.perf_counter() - began)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(latencies.queue)


def huey_lateness(note: Any, count: int, apart_s: float) -> list[float]:
    """Of `count` tasks due from three seconds from now on; its scheduler looks once a second."""
    first = time.time() + 3 + count / 400
    results = []
    for number in range(count):
        due = first + number * apart_s
        eta = datetime.fromtimestamp(due, timezone.utc)
        results.append(note.schedule(args=(due,), eta=eta))
    return [wait(result) for result in results]


def measure_huey(seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        _, nothing, note = huey_tasks(directory)
        consumer = subprocess.Popen([sys.executable, __file__, "huey-consumer", directory],
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            wait(nothing())
            return huey_figures(consumer.pid, nothing, note, seconds)
        finally:
            consumer.terminate()
            consumer.wait()


def huey_figures(pid: int, nothing: Any, note: Any, seconds: float) -> dict[str, float]:
    figures: dict[str, float] = {}
    written = io_bytes(pid) + io_bytes(os.getpid())
    alone = huey_run_now(nothing, 1, seconds)
    written = io_bytes(pid) + io_bytes(os.getpid()) - written
    figures["run_now_1"] = len(alone) / seconds
    figures["disk_run_now"] = written / len(alone) / 1000
    together = huey_run_now(nothing, 32, seconds)
    figures["run_now_32"] = len(together) / seconds
    figures["run_now_32_p99"] = percentile(together, 0.99) * 1e3
    figures["burst_1000"] = percentile(huey_lateness(note, 1000, 0.0), 0.99) * 1e3
    late = huey_lateness(note, max(3, round(seconds * 2)), 1.0)
    figures["late_p50"] = percentile(late, 0.5) * 1e3
    figures["late_p99"] = percentile(late, 0.99) * 1e3
    used, began = cpu_s(pid), time.monotonic()
    time.sleep(seconds)
    figures["idle_cpu"] = (cpu_s(pid) - used) / (time.monotonic() - began) * 100
    figures["idle_rss"] = memory_mb(pid, "Rss")
    return figures


# APScheduler 4: memory store, everything in one process, nothing durable

LATE: list[float] = []


async def aps_nothing() -> int:
    return 1


async def aps_note(due: float, step: float) -> None:
    now = time.time()
    LATE.append((now - due) % step if step else now - due)


async def measure_apscheduler(seconds: float) -> dict[str, float]:
    from apscheduler import AsyncScheduler
    from apscheduler.triggers.date import DateTrigger
    from apscheduler.triggers.interval import IntervalTrigger

    figures: dict[str, float] = {}
    async with AsyncScheduler() as scheduler:
        await scheduler.start_in_background()

        async def client(end: float, latencies: list[float]) -> None:
            while (began := time.perf_counter()) < end:
                await scheduler.run_job(aps_nothing)
                latencies.append(time.perf_counter() - began)

        for clients in (1, 32):
            latencies: list[float] = []
            end = time.perf_counter() + seconds
            await asyncio.gather(*(client(end, latencies) for _ in range(clients)))
            figures[f"run_now_{clients}"] = len(latencies) / seconds
        figures["run_now_32_p99"] = percentile(latencies, 0.99) * 1e3

        async def late(triggers: list[Any], due: datetime, step: float, count: int) -> None:
            LATE.clear()
            for trigger in triggers:
                await scheduler.add_schedule(aps_note, trigger, args=(due.timestamp(), step))
            while len(LATE) < count:
                await asyncio.sleep(0.1)

        due = datetime.now(timezone.utc) + timedelta(seconds=5)
        await late([DateTrigger(due) for _ in range(1000)], due, 0.0, 1000)
        figures["burst_1000"] = percentile(LATE, 0.99) * 1e3
        due = datetime.now(timezone.utc) + timedelta(seconds=1)
        each_second = IntervalTrigger(seconds=1, start_time=due)
        await late([each_second], due, 1.0, max(3, round(seconds * 2)))
        figures["late_p50"] = percentile(LATE, 0.5) * 1e3
        figures["late_p99"] = percentile(LATE, 0.99) * 1e3
        for one in await scheduler.get_schedules():
            await scheduler.remove_schedule(one.id)
        for _ in range(1000):
            await scheduler.add_schedule(aps_nothing, IntervalTrigger(seconds=LONG_S))
        await asyncio.sleep(2)  # the first fire of an interval is at once
        used, began = cpu_s(os.getpid()), time.monotonic()
        await asyncio.sleep(seconds)
        figures["idle_cpu"] = (cpu_s(os.getpid()) - used) / (time.monotonic() - began) * 100
        figures["idle_rss"] = memory_mb(os.getpid(), "Rss")
    return figures


if __name__ == "__main__":
    name = sys.argv[1]
    if name == "huey-consumer":
        huey_consumer(sys.argv[2])
    elif name == "huey":
        print(json.dumps(measure_huey(float(sys.argv[2]))))
    else:
        print(json.dumps(asyncio.run(measure_apscheduler(float(sys.argv[2])))))
