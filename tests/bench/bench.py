"""Measure ScheduleZero on this machine: `make bench`, or `python tests/bench/bench.py --help`.

Every figure comes from a real installation in a temporary directory: a governor with its server
and one handler, driven through HTTP by a client in a process of its own. Nothing is warm that a
user's would not be, except what the heading says. Two other schedulers do comparable work
beside it, without HTTP, in a virtual environment made for them (.venv/bench).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from load import Connection, percentile

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
YARDSTICKS = {"huey": "huey, fsync on", "apscheduler": "APScheduler, in memory"}
CONCURRENCY = 32  # of the handler
TICKS = os.sysconf("SC_CLK_TCK")
READY_S = 30.0


# Rows


@dataclass
class Row:
    """One figure: what it is, what it should be, what each run gave."""

    key: str
    label: str
    unit: str
    target: float | None = None
    more_is_better: bool = False
    runs: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def is_met(self) -> bool | None:
        if self.target is None or not self.runs:
            return None
        return self.median >= self.target if self.more_is_better else self.median <= self.target


def make_rows() -> dict[str, Row]:
    rows = (
        Row("run_now_1", "durable run-now, 1 client", "/s", 600, more_is_better=True),
        Row("run_now_32", "durable run-now, 32 clients", "/s", 3500, more_is_better=True),
        Row("run_now_32_p99", "  its p99", "ms", 25),
        Row("burst_1000", "1,000 schedules due at one instant, started: p99", "ms", 250),
        Row("burst_10000", "10,000 at one instant, started: p99", "ms", 3000),
        Row("burst_health", "  slowest answer of /api/health meanwhile", "ms", 100),
        Row("late_p50", "one schedule each second, started late by: p50", "ms", 3),
        Row("late_p99", "  p99", "ms", 10),
        Row("idle_rss", "server idle, 1,000 hourly schedules: RSS", "MiB", 36),
        Row("idle_cpu", "  CPU", "%", 0.3),
        Row("idle_wakeups", "  wake-ups per second, server", "/s"),
        Row("idle_wakeups_all", "  wake-ups per second, with governor and handler", "/s"),
        Row("idle_written", "  written per hour, from windows of 20 s, all three", "KiB"),
        Row("pss", "governor + server + one handler: PSS", "MiB", 42),
        Row("cold_start", "cold start to healthy", "s", 0.5),
        Row("first_start", "  the very first, compiling to bytecode", "s"),
        Row("disk_scheduled", "disk writes for a 1/s job, per run", "KiB", 12),
        Row("disk_run_now", "  for run-now calls, one after the other", "KiB"),
        Row("syncs", "  syncs per run of a 1/s job", "", 2),
    )
    return {row.key: row for row in rows}


# What /proc says


class Usage(NamedTuple):
    """Of one process since it began."""

    cpu_s: float
    switches: int  # voluntary: each is a sleep that somebody ended
    written_bytes: int

    def since(self, before: Usage) -> Usage:
        cpu_s, switches = self.cpu_s - before.cpu_s, self.switches - before.switches
        return Usage(cpu_s, switches, self.written_bytes - before.written_bytes)


def read_field(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise ValueError(f"{path} has no {name}")


def usage_of(pid: int) -> Usage:
    tasks = [str(task) for task in Path(f"/proc/{pid}/task").iterdir()]
    ran_ns = sum(int(Path(f"{task}/schedstat").read_text().split()[0]) for task in tasks)
    switches = sum(read_field(f"{task}/status", "voluntary_ctxt_switches") for task in tasks)
    return Usage(ran_ns / 1e9, switches, read_field(f"/proc/{pid}/io", "write_bytes"))


def memory_mib(pid: int, kind: str) -> float:
    return read_field(f"/proc/{pid}/smaps_rollup", kind) / 1024


def foreign_s() -> float:
    """CPU seconds the machine has given to others: not to us and our descendants that ended."""
    user, nice, system, _, _, irq, softirq, *_ = Path("/proc/stat").read_text().split()[1:9]
    own = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    busy_s = sum(map(int, (user, nice, system, irq, softirq))) / TICKS
    return busy_s - sum(usage.ru_utime + usage.ru_stime for usage in own)


# The appliance


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class Installation:
    """A copy of the program in a directory of its own, so that its bytecode is cached there."""

    def __init__(self, root: Path, directory: Path) -> None:
        self.directory = directory / "installation"
        self.directory.mkdir()
        for path in (root / "schedulezero.py", root / "handler.py", HERE / "bench_handler.py"):
            shutil.copy(path, self.directory)
        shutil.copytree(root / "static", self.directory / "static")
        self._allocator = self._read_unit("MALLOC_")
        self._runs = 0
        with self.run() as appliance:
            self.first_start_s = appliance.start_s

    def _read_unit(self, prefix: str) -> dict[str, str]:
        """The variables with which systemd would start it."""
        unit = subprocess.run(
            [sys.executable, "schedulezero.py", "systemd"], cwd=self.directory,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # the first start makes the cache
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        given = f"Environment={prefix}"
        lines = [line for line in unit.splitlines() if line.startswith(given)]
        return dict(line.removeprefix("Environment=").split("=", 1) for line in lines)

    @contextlib.contextmanager
    def run(self, **settings: Any) -> Iterator[Appliance]:
        """Governor, server and handler with an empty database, until the block ends."""
        self._runs += 1
        directory = self.directory.parent / f"run-{self._runs}"
        directory.mkdir()
        appliance = Appliance(self.directory, directory, settings, self._allocator)
        try:
            appliance.wait_ready()
            yield appliance
        finally:
            appliance.stop()
            shutil.rmtree(directory)


class Appliance:
    def __init__(
        self, installed: Path, directory: Path, settings: dict[str, Any], variables: dict[str, str]
    ) -> None:
        self.http_port, zmq_port = free_ports(2)
        handler = {"run": f"{installed}/bench_handler.py:Bench", "concurrency": CONCURRENCY}
        config = {
            "http_port": self.http_port, "zmq_port": zmq_port, "timezone": "UTC",
            "handlers": {"bench": handler}, **settings,
        }  # fmt: skip
        (directory / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        ours = ("SCHEDULEZERO_", "PYTHONDONTWRITEBYTECODE")
        environ = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self._run: dict[str, Any] = {
            "cwd": directory,
            "env": {**environ, **variables, "PYTHONPATH": str(installed)},
        }
        self._command = [sys.executable, "-m", "schedulezero", "--config", "config.yaml"]
        self._output = (directory / "output.log").open("wb+")
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [*self._command, "run"], stdout=self._output, stderr=self._output,
            start_new_session=True, **self._run,
        )  # fmt: skip
        self._connection = self._wait_healthy()
        self.start_s = time.perf_counter() - began

    def _wait_healthy(self) -> Connection:
        give_up = time.monotonic() + READY_S
        while time.monotonic() < give_up and self.process.poll() is None:
            with contextlib.suppress(ConnectionError):
                connection = Connection(self.http_port)
                if connection.call("GET", "/api/health").status == 200:
                    return connection
            time.sleep(0.002)
        self.stop()
        self._output.seek(0)
        raise SystemExit(f"the server did not start: {self._output.read().decode()}")

    def wait_ready(self) -> None:
        """Until the handler is connected and the governor counts all as running."""
        give_up = time.monotonic() + READY_S
        while self.get("/api/handlers")["handlers"][:1] == [] or self._states() != {"RUNNING"}:
            if time.monotonic() > give_up:
                raise SystemExit("the handler did not connect")
            time.sleep(0.2)

    def _states(self) -> set[str]:
        told = subprocess.run(
            [*self._command, "status", "--json"], capture_output=True, check=False, **self._run
        )
        processes = json.loads(told.stdout)["processes"]
        self.pids = {process["name"]: int(process["pid"]) for process in processes}
        return {process["state"] for process in processes}

    @property
    def server(self) -> int:
        return self.pids["server"]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def get(self, path: str) -> Any:
        answered = self._connection.call("GET", path)
        if answered.status != 200:
            raise SystemExit(f"{path} answered {answered.status}: {answered.body[:200]!r}")
        return json.loads(answered.body)

    def load(self, do: str, **order: Any) -> dict[str, Any]:
        """What a client in its own process has to say."""
        command = [sys.executable, str(HERE / "load.py"), str(self.http_port)]
        done = subprocess.run(
            [*command, json.dumps({"do": do, **order})], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{do}: {done.stderr}")
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def executions(self) -> list[dict[str, Any]]:
        found, cursor = [], ""
        while cursor is not None:
            page = self.get(f"/api/executions?limit=1000{cursor and '&cursor=' + cursor}")
            found += page["records"]
            cursor = page["next_cursor"]
        return found

    def usage(self) -> dict[str, Usage]:
        return {name: usage_of(pid) for name, pid in self.pids.items()}


def started_late_ms(executions: list[dict[str, Any]]) -> list[float]:
    def late(execution: dict[str, Any]) -> float:
        ends = (execution["scheduled_at"], execution["started_at"])
        scheduled, started = map(datetime.fromisoformat, ends)
        return (started - scheduled).total_seconds() * 1e3

    return [late(execution) for execution in executions]


# Measurements: each gives the figures of one or more runs, by the keys of their rows

Figures = Iterator[tuple[str, float]]


class Bench(NamedTuple):
    installation: Installation
    is_quick: bool

    def times(self, full: int) -> range:
        return range(1 if self.is_quick else full)

    def seconds(self, full: float) -> float:
        return full / 3 if self.is_quick else full


def measure_start(bench: Bench) -> Figures:
    yield "first_start", bench.installation.first_start_s
    for _ in bench.times(5):
        with bench.installation.run() as appliance:
            yield "cold_start", appliance.start_s
            time.sleep(2)
            yield "pss", sum(memory_mib(pid, "Pss") for pid in appliance.pids.values())


def measure_run_now(bench: Bench) -> Figures:
    with bench.installation.run() as appliance:
        appliance.load("run_now", clients=8, calls=200)
        for _ in bench.times(5):
            alone = appliance.load("run_now", clients=1, seconds=bench.seconds(4))
            yield "run_now_1", alone["per_second"]
            together = appliance.load("run_now", clients=32, seconds=bench.seconds(4))
            yield "run_now_32", together["per_second"]
            yield "run_now_32_p99", together["p99_ms"]


def measure_burst(bench: Bench, count: int) -> Figures:
    """Lateness of `count` schedules due at one instant; the slowest health answer meanwhile."""
    for _ in bench.times(3):
        with bench.installation.run(history={"max_executions": 100_000}) as appliance:
            due = round(time.time() + 3 + count / 500, 3)
            trigger = {"type": "date", "run_date": due}
            made = appliance.load("schedule", count=count, trigger=trigger)
            if made["done_at"] > due - 1:
                raise SystemExit(f"it took too long to make {count} schedules")
            time.sleep(due - 0.5 - time.time())
            every_s = 0.02 if count > 1000 else 0.2
            health = appliance.load("health", after=due + 0.5, every_s=every_s)
            executions = appliance.executions()
            good = {one["schedule_id"] for one in executions if one["status"] == "success"}
            if not len(executions) == len(good) == count:
                raise SystemExit(f"{count} fires made {len(executions)} rows, {len(good)} good")
            yield f"burst_{count}", percentile(started_late_ms(executions), 0.99)
            if count > 1000:
                yield "burst_health", health["slowest_ms"]


def measure_lateness(bench: Bench) -> Figures:
    for _ in bench.times(2):
        with bench.installation.run() as appliance:
            appliance.load("schedule", count=1, trigger={"type": "interval", "seconds": 1})
            time.sleep(bench.seconds(45))
            late_ms = started_late_ms(appliance.executions())
            yield "late_p50", statistics.median(late_ms)
            yield "late_p99", percentile(late_ms, 0.99)


def measure_idle(bench: Bench) -> Figures:
    with bench.installation.run() as appliance:
        appliance.load("schedule", count=1000, trigger={"type": "interval", "hours": 1})
        time.sleep(5)
        for _ in bench.times(3):
            before, began = appliance.usage(), time.monotonic()
            time.sleep(20)
            after, took_s = appliance.usage(), time.monotonic() - began
            used = {name: after[name].since(before[name]) for name in before}
            yield "idle_rss", memory_mib(appliance.server, "Rss")
            yield "idle_cpu", used["server"].cpu_s / took_s * 100
            yield "idle_wakeups", used["server"].switches / took_s
            yield "idle_wakeups_all", sum(one.switches for one in used.values()) / took_s
            written = sum(one.written_bytes for one in used.values())
            yield "idle_written", written / 1024 / took_s * 3600  # what is rarer is not seen


def measure_disk(bench: Bench) -> Figures:
    with bench.installation.run() as appliance:
        for _ in bench.times(3):
            before = usage_of(appliance.server).written_bytes
            appliance.load("run_now", clients=1, calls=600)
            written = usage_of(appliance.server).written_bytes - before
            yield "disk_run_now", written / 1024 / 600
    # In a log that is new, so that no checkpoint falls into this: one adds 0.2 KiB to each run.
    with bench.installation.run() as appliance:
        appliance.load("schedule", count=1, trigger={"type": "interval", "seconds": 1})
        time.sleep(5)  # for the first backup
        for _ in bench.times(2):
            runs, before = len(scheduled(appliance)), usage_of(appliance.server).written_bytes
            time.sleep(bench.seconds(60))
            written = usage_of(appliance.server).written_bytes - before
            yield "disk_scheduled", written / 1024 / (len(scheduled(appliance)) - runs)
        if shutil.which("strace"):
            yield "syncs", count_syncs(appliance, bench.seconds(15))


def scheduled(appliance: Appliance) -> list[dict[str, Any]]:
    return [execution for execution in appliance.executions() if execution["schedule_id"]]


def count_syncs(appliance: Appliance, seconds: float) -> float:
    """Syncs for each run of the schedule there is, counted by strace for some seconds."""
    calls = "trace=fsync,fdatasync,msync,sync_file_range,syncfs"
    command = ["strace", "-f", "-q", "-e", calls, "-p", str(appliance.server), "-o", "/dev/stdout"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tracer:
        while not read_field(f"/proc/{appliance.server}/status", "TracerPid"):
            if tracer.poll() is not None:
                raise SystemExit("strace may not look at the server")
            time.sleep(0.01)
        before = len(scheduled(appliance))
        time.sleep(seconds)
        runs = len(scheduled(appliance)) - before
        tracer.send_signal(signal.SIGINT)
        lines = tracer.communicate()[0].decode().splitlines()
    return sum("sync" in line and "resumed" not in line for line in lines) / runs


MEASUREMENTS: dict[str, Callable[[Bench], Figures]] = {  # by the keys of their rows
    "cold_start first_start pss": measure_start,
    "run_now_1 run_now_32 run_now_32_p99": measure_run_now,
    "burst_1000": partial(measure_burst, count=1000),
    "burst_10000 burst_health": partial(measure_burst, count=10_000),
    "late_p50 late_p99": measure_lateness,
    "idle_rss idle_cpu idle_wakeups idle_wakeups_all idle_written": measure_idle,
    "disk_scheduled disk_run_now syncs": measure_disk,
}


# The others


def measure_yardsticks(seconds: float) -> dict[str, dict[str, float]]:
    """The same figures of other schedulers, or nothing of those that cannot be installed."""
    directory = ROOT / ".venv" / "bench"
    python = directory / "bin" / "python"
    if not python.exists():
        say("installing the other schedulers")
        venv.create(directory, with_pip=True)
    wanted = ["huey", "apscheduler==4.0.0a6"]
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    if installed.returncode:
        say(f"not compared: {installed.stderr.strip().splitlines()[-1:]}")
        return {}
    found = {}
    for name in YARDSTICKS:
        say(f"yardstick {name}")
        command = [str(python), str(HERE / "yardsticks.py"), name, str(seconds)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=180)
            found[name] = json.loads(done.stdout)
        except subprocess.SubprocessError as error:
            say(f"{name} failed: {getattr(error, 'stderr', '') or error}")
    return found


# The report


def say(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def describe_machine(directory: Path) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo").read_text()
    model = cpu.split("model name\t: ")[1].split("\n")[0] if "model name" in cpu else "?"
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [mount for mount in mounts if directory.is_relative_to(mount[0])]
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": f"{os.cpu_count()} x {model} ({platform.machine()})",
        "memory_mib": read_field("/proc/meminfo", "MemTotal") // 1024,
        "kernel": platform.release(),
        "file_system": max(above, key=lambda mount: len(mount[0]))[1],
        "sync_ms": round(sync_s(directory) * 1e3, 3),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "loadavg": os.getloadavg(),
    }


def sync_s(directory: Path) -> float:
    """How long one write and fdatasync of 4 KiB takes here: median of 200."""
    took = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for number in range(200):
            os.pwrite(file.fileno(), b"x" * 4096, number * 4096)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    return statistics.median(took)


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def print_table(rows: list[Row], yardsticks: dict[str, dict[str, float]]) -> None:
    heads = ("", "median", "min-max", "", "target", "met", *(YARDSTICKS[one] for one in yardsticks))
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        sign = ">=" if row.more_is_better else "<="
        lines.append((
            row.label,
            shown(row.median) if row.runs else "-",
            f"{shown(min(row.runs))}-{shown(max(row.runs))}" if row.runs else row.note,
            row.unit,
            f"{sign} {shown(row.target)}" if row.target is not None else "",
            {True: "yes", False: "NO", None: ""}[row.is_met],
            *(shown(one[row.key]) if row.key in one else "-" for one in yardsticks.values()),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, strict=True)
        print("  ".join(f"{cell:{width}}" for cell, width in cells).rstrip())


def measure(bench: Bench, rows: dict[str, Row], wanted: set[str]) -> dict[str, float]:
    """Fill the rows; returns for each measurement the share of the machine others used, in %."""
    others: dict[str, float] = {}
    for keys, function in MEASUREMENTS.items():
        if not wanted.intersection(keys.split()):
            continue
        name = keys.split()[0]
        say(f"{name}, loadavg {os.getloadavg()[0]:.2f}")
        foreign, began = foreign_s(), time.monotonic()
        for key, value in function(bench):
            rows[key].runs.append(value)
        foreign, took_s = max(0.0, foreign_s() - foreign), time.monotonic() - began
        others[name] = round(foreign / took_s / (os.cpu_count() or 1) * 100, 1)
        say(f"{name} took {took_s:.0f} s; others used {others[name]} % of the machine")
    return others


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short run of each")
    parser.add_argument("--only", metavar="ROW,…", help=", ".join(make_rows()))
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures there, too")
    parser.add_argument("--root", type=Path, default=ROOT, help="where schedulezero.py is")
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: $TMPDIR")
    parser.add_argument("--no-yardsticks", action="store_true", help="leave the others out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    rows = make_rows()
    wanted = set(arguments.only.split(",")) if arguments.only else set(rows)
    if unknown := wanted - set(rows):
        raise SystemExit(f"no such row: {', '.join(unknown)}; there are {', '.join(rows)}")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.directory) as name:
        directory = Path(name)
        machine = describe_machine(directory)
        for key, value in machine.items():
            print(f"{key}: {value}")
        print(
            f"One handler with {CONCURRENCY} slots. Warm: the page cache; the bytecode, after the"
            " first start; 200 calls before the rates.\n"
        )
        bench = Bench(Installation(arguments.root, directory), arguments.quick)
        others = measure(bench, rows, wanted)
    if not shutil.which("strace"):
        rows["syncs"].note = "strace is missing"
    yardsticks = {}
    if not arguments.no_yardsticks:
        yardsticks = measure_yardsticks(2 if arguments.quick else 5)
    print_table([row for row in rows.values() if row.runs or row.note], yardsticks)
    print(f"\nshare of the machine that others used, %: {others}")
    if arguments.json:
        found = {key: {**vars(row), "is_met": row.is_met} for key, row in rows.items() if row.runs}
        report = {"machine": machine, "others": others, "rows": found, "yardsticks": yardsticks}
        arguments.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
