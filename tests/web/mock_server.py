"""A stand-in for the server: its API over data in memory, for states that are hard to produce.

It serves `static/` under the same Content-Security-Policy. Tests change `Mock` directly, from
their own thread, and push events with `Mock.publish`.
"""

from __future__ import annotations

import json
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

STATIC = Path(__file__).parents[2] / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
CSP = (
    "default-src 'self'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Json = dict[str, Any]


class RefusedError(Exception):
    def __init__(self, status: int, error: str, field_path: str | None = None) -> None:
        super().__init__(error)
        self.status = status
        self.body = {"status": "error", "error": error, "code": "refused"}
        if field_path:
            self.body["field"] = field_path


def iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def iso_in(seconds: float) -> str:
    return str(iso(time.time() + seconds))


@dataclass
class Mock:
    """What the server knows. Lists are newest first where the API says so."""

    schedules: dict[str, Json] = field(default_factory=dict)
    executions: list[Json] = field(default_factory=list)
    details: dict[str, Json] = field(default_factory=dict)
    handlers: list[Json] = field(default_factory=list)
    checks: Json = field(default_factory=lambda: {"store": "ok", "scheduler": "ok", "clock": "ok"})
    per_minute: list[Json] = field(default_factory=list)
    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    timezone: str = "Europe/Berlin"
    role: str = "admin"
    has_events: bool = True
    delay_s: float = 0.0
    left_out: int = 0
    _streams: list[queue.Queue[str | None]] = field(default_factory=list)
    _number: int = 0

    def publish(self, kind: str, data: Any) -> None:
        self._number += 1
        frame = f"id: mock-{self._number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"
        for stream in list(self._streams):
            stream.put(frame)

    def drop_streams(self) -> None:
        for stream in list(self._streams):
            stream.put(None)

    @contextmanager
    def stream(self) -> Iterator[queue.Queue[str | None]]:
        frames: queue.Queue[str | None] = queue.Queue()
        self._streams.append(frames)
        try:
            yield frames
        finally:
            self._streams.remove(frames)

    # One method per route; `query` has single values.

    def health(self, query: Json, body: Any) -> Json:
        bad = any(said != "ok" for said in self.checks.values())
        return {
            "status": "degraded" if bad else "ok", "checks": self.checks, "version": "0.1.0",
            "uptime_seconds": 274_311, "memory_bytes": 33_900_000,
            "disk_written_bytes": 7_340_032, "warnings": [],
        }  # fmt: skip

    def config(self, query: Json, body: Any) -> Json:
        return {
            "deployment": "default", "instance_name": "Workshop Pi",
            "description": "the machine under the bench", "timezone": self.timezone,
        }  # fmt: skip

    def session(self, query: Json, body: Any) -> Json:
        return {"authenticated": True, "name": "ann", "role": self.role, "can_log_out": False}

    def list_handlers(self, query: Json, body: Any) -> Json:
        return {"handlers": self.handlers, "count": len(self.handlers)}

    def list_schedules(self, query: Json, body: Any) -> Json:
        found = [s for s in self.schedules.values() if self._matches(s, query)]
        sort = query.get("sort", "schedule_id")
        name = sort.lstrip("-").replace("schedule_id", "id")
        found.sort(key=lambda s: (s.get(name) or "", s["id"]), reverse=sort.startswith("-"))
        found.sort(key=lambda s: s.get(name) is None)
        offset, limit = int(query.get("offset", 0)), int(query.get("limit", 100))
        return {"schedules": found[offset : offset + limit], "total": len(found)}

    @staticmethod
    def _matches(schedule: Json, query: Json) -> bool:
        text = " ".join(str(schedule[key]) for key in ("id", "name", "handler_id", "method_name"))
        return (
            query.get("search", "").lower() in text.lower()
            and query.get("handler_id") in (None, schedule["handler_id"])
            and query.get("paused") in (None, str(schedule["paused"]).lower())
        )

    def upcoming(self, query: Json, body: Any) -> Json:
        begin = time.time() // 900 * 900
        active = [s for s in self.schedules.values() if not s["paused"]]
        names = [s["name"] or s["id"] for s in active[:3]]
        counts = [len(active) * (i % 9) for i in range(96)]
        return {
            "begin": iso(begin), "bucket_seconds": 900, "soonest": [], "schedules": len(active),
            "left_out": self.left_out, "buckets": [
                {"at": iso(begin + 900 * i), "count": count, "schedules": names if count else []}
                for i, count in enumerate(counts)
            ],
        }  # fmt: skip

    def change_many(self, query: Json, body: Any) -> Json:
        found = [s for s in self.schedules.values() if self._matches(s, query)]
        wanted = [s for s in found if s["id"] in body.get("schedule_ids", [s["id"]])]
        for one in wanted:
            one["paused"] = body["paused"]
        return {"status": "success", "count": len(wanted)}

    def one_schedule(self, query: Json, body: Any, schedule_id: str) -> Json:
        if schedule_id not in self.schedules:
            raise RefusedError(404, f"There is no schedule {schedule_id}.")
        return self.schedules[schedule_id]

    def create(self, query: Json, body: Any) -> Json:
        schedule_id = body.get("schedule_id") or f"schedule-{len(self.schedules) + 1}"
        if schedule_id in self.schedules:
            raise RefusedError(409, f"The id {schedule_id} is taken.", "schedule_id")
        trigger = preview(body["trigger_config"])
        made = schedule(schedule_id, body["handler_id"], body["method_name"])
        made.update({key: value for key, value in body.items() if key != "schedule_id"})
        made.update(description=trigger["description"], next_fire_time=iso_in(300))
        self.schedules[schedule_id] = made
        self.publish("schedule", made)
        return {"status": "success", "schedule_id": schedule_id}

    def change(self, query: Json, body: Any, schedule_id: str) -> Json:
        found = self.one_schedule(query, body, schedule_id)
        found.update(body, generation=found["generation"] + 1)
        if "trigger_config" in body:
            found["description"] = preview(body["trigger_config"])["description"]
        self.publish("schedule", found)
        return found

    def delete(self, query: Json, body: Any, schedule_id: str) -> Json:
        self.one_schedule(query, body, schedule_id)
        del self.schedules[schedule_id]
        self.publish("schedule", {"id": schedule_id, "deleted": True})
        return {"status": "success"}

    def pause(self, paused: bool, query: Json, body: Any, schedule_id: str) -> Json:
        return self.change(query, {"paused": paused}, schedule_id)

    def run(self, query: Json, body: Any, schedule_id: str | None = None) -> Json:
        plan = self.schedules[schedule_id] if schedule_id else body
        number = f"run{len(self.executions) + 1:09}"
        made = execution(number, plan["handler_id"], plan["method_name"], "running", schedule_id)
        made["job_params"] = plan.get("job_params") or {}
        self.executions.insert(0, made)
        self.publish("execution", made)
        return {"status": "success", "execution_id": number}

    def list_executions(self, query: Json, body: Any) -> Json:
        statuses = [s for s in query.get("status", "").split(",") if s]
        found = [
            e for e in self.executions
            if (not statuses or e["status"] in statuses)
            and query.get("handler_id") in (None, e["handler_id"])
            and query.get("schedule_id") in (None, e["schedule_id"])
        ]  # fmt: skip
        return {"records": found[: int(query.get("limit", 100))], "count": len(found)}

    def one_execution(self, query: Json, body: Any, execution_id: str) -> Json:
        for found in self.executions:
            if found["execution_id"] == execution_id:
                return {**found, "attempts": [], "log": "", **self.details.get(execution_id, {})}
        raise RefusedError(404, f"There is no execution {execution_id}.")

    def cancel(self, query: Json, body: Any, execution_id: str) -> Json:
        found = next(e for e in self.executions if e["execution_id"] == execution_id)
        found.update(status="cancelled", completed_at=iso_in(0), error="cancelled: cancelled")
        self.publish("execution", found)
        return found

    def stats(self, query: Json, body: Any) -> Json:
        by_status: dict[str, int] = {}
        for made in self.executions:
            by_status[made["status"]] = by_status.get(made["status"], 0) + 1
        bad = sum(by_status.get(name, 0) for name in ("error", "timeout", "lost"))
        good = by_status.get("success", 0)
        tally = {
            "total": len(self.executions), "by_status": by_status,
            "success_rate": good / (good + bad) if good + bad else None,
            "duration_ms": {"p50": 42, "p95": 1800, "p99": 4000, "max": 9100},
        }  # fmt: skip
        quick = {**tally, "duration_ms": {"p50": 4, "p95": 31, "p99": 90, "max": 120}}
        slow = {**tally, "duration_ms": {"p50": 8_200, "p95": 94_000, "p99": 99_000, "max": 99_999}}
        kinds = [tally, quick, slow]
        names = [handler["id"] for handler in self.handlers] if self.executions else []
        return {
            **tally, "by_handler": {name: kinds[i % 3] for i, name in enumerate(names)},
            "per_minute": self.per_minute,
        }  # fmt: skip

    def preview(self, query: Json, body: Any) -> Json:
        return preview(body["trigger_config"], int(body.get("count", 5)))


def preview(config: Json, count: int = 5) -> Json:
    """Fires as the server would tell them, for a few kinds of trigger."""
    if config.get("minute") == "61":
        raise RefusedError(400, "61 is not between 0 and 59", "trigger_config.minute")
    if config.get("timezone") == "Mars/Base":
        raise RefusedError(400, "'Mars/Base' is not a known time zone", "trigger_config.timezone")
    units = {"weeks": 604_800, "days": 86_400, "hours": 3600, "minutes": 60, "seconds": 1}
    cron = 3600 if config.get("minute") else 86_400
    step = sum(size * float(config.get(unit, 0)) for unit, size in units.items()) or cron
    start = datetime.now(UTC).replace(microsecond=0)
    fires = []
    for k in range(1, count + 1):
        at = start + timedelta(seconds=step * k)
        text = at.strftime("%Y-%m-%d %H:%M:%S+01:00")
        note = "01:30 does not exist that day: fires right after" if k == 3 else None
        fires.append({"at": iso(at.timestamp()), "local": text, "note": note})
    words = config.get("expression") or f"every {timedelta(seconds=step)}"
    return {"trigger": "interval", "description": words, "fire_times": fires}


ROUTES: list[tuple[str, str, Callable[..., Json]]] = [
    ("GET", "/api/health", Mock.health),
    ("GET", "/api/session", Mock.session),
    ("GET", "/api/config", Mock.config),
    ("GET", "/api/handlers", Mock.list_handlers),
    ("GET", "/api/schedules", Mock.list_schedules),
    ("PATCH", "/api/schedules", Mock.change_many),
    ("GET", "/api/upcoming", Mock.upcoming),
    ("POST", "/api/schedule", Mock.create),
    ("GET", "/api/schedules/{}", Mock.one_schedule),
    ("PATCH", "/api/schedules/{}", Mock.change),
    ("DELETE", "/api/schedules/{}", Mock.delete),
    ("POST", "/api/schedules/{}/pause", lambda mock, *args: mock.pause(True, *args)),
    ("POST", "/api/schedules/{}/resume", lambda mock, *args: mock.pause(False, *args)),
    ("POST", "/api/schedules/{}/run", Mock.run),
    ("POST", "/api/run_now", Mock.run),
    ("GET", "/api/executions", Mock.list_executions),
    ("GET", "/api/executions/stats", Mock.stats),
    ("GET", "/api/executions/{}", Mock.one_execution),
    ("POST", "/api/executions/{}/cancel", Mock.cancel),
    ("POST", "/api/triggers/preview", Mock.preview),
]
PATTERNS = [
    (verb, re.compile(path.replace("{}", "([^/]+)")), answer) for verb, path, answer in ROUTES
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, mock: Mock, *args: Any) -> None:
        self.mock = mock
        super().__init__(*args)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/api/events" and self.mock.has_events:
            self.send_events()
        elif path.startswith("/api/"):
            self.answer()
        else:
            self.send_static(path)

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        time.sleep(self.mock.delay_s)
        self.mock.calls.append((self.command, self.path, body))
        for verb, pattern, method in PATTERNS:
            if verb == self.command and (match := pattern.fullmatch(parts.path)):
                try:
                    reply = method(self.mock, query, body, *map(unquote, match.groups()))
                    return self.send_json(201 if parts.path == "/api/schedule" else 200, reply)
                except RefusedError as refused:
                    return self.send_json(refused.status, refused.body)
        return self.send_json(404, {"status": "error", "error": "There is no such page."})

    do_POST = do_PATCH = do_DELETE = answer

    def send_static(self, path: str) -> None:
        file = STATIC / ("index.html" if path == "/" else path.lstrip("/"))
        if not file.is_file():
            return self.send_json(404, {"status": "error", "error": "There is no such page."})
        return self.send_body(200, TYPES[file.suffix], file.read_bytes())

    def send_json(self, status: int, reply: Json) -> None:
        self.send_body(status, "application/json", json.dumps(reply).encode())

    def send_body(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", CSP)
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        with self.mock.stream() as frames:
            self.wfile.write(b"retry: 1000\n\n")
            while (frame := frames.get()) is not None:
                try:
                    self.wfile.write(frame.encode())
                except OSError:
                    return

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: pytest shows what matters."""


class MockServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, mock: Mock, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), partial(Handler, mock))
        self.mock = mock
        self._open: set[socket.socket] = set()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves resets its connections."""

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def stop(self) -> None:
        """Go away as a killed server does: nothing listens, every connection ends."""
        self.shutdown()
        self.server_close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.mock.drop_streams()


# What a workshop could look like.


def method(name: str, doc: str, **parameters: Any) -> Json:
    told = [
        {"name": key, "type": kind, "required": False, "default": preset}
        if preset is not ...
        else {"name": key, "type": kind, "required": True}
        for key, (kind, preset) in parameters.items()
    ]
    return {"name": name, "doc": doc, "parameters": told}


def handler(handler_id: str, *methods: Json, status: str = "Connected", **more: Any) -> Json:
    instance = {
        "instance": "4f2a91c0", "address": "dial-in", "status": status, "concurrency": 4,
        "running": 1, "registered_at": iso_in(-9000), "last_seen": iso_in(-1),
        "clock_skew_seconds": 0.012, "pid": 812, "hostname": "pi-bench",
    }  # fmt: skip
    return {
        "id": handler_id, "address": "dial-in", "status": status, "running": 1,
        "queued": 0, "capacity": 4,
        "methods": [m["name"] for m in methods], "method_details": list(methods),
        "instances": [instance], "last_seen": instance["last_seen"], **more,
    }  # fmt: skip


def schedule(schedule_id: str, handler_id: str, method_name: str, **more: Any) -> Json:
    return {
        "id": schedule_id, "name": None, "handler_id": handler_id, "method_name": method_name,
        "job_params": {}, "trigger_config": {"type": "interval", "minutes": 5},
        "trigger": "interval[0:05:00]", "description": "every 5 minutes",
        "next_fire_time": iso_in(222), "last_fire_time": iso_in(-78), "paused": False,
        "coalesce": "latest", "overlap": "skip", "misfire_grace_time": None, "max_jitter": 0,
        "timeout": None, "retry": None, "quarantined": None, "generation": 1, "origin": "api",
        **more,
    }  # fmt: skip


def execution(
    execution_id: str,
    handler_id: str,
    method_name: str,
    status: str = "success",
    schedule_id: str | None = None,
    *,
    ago: float = 0,
    took: float = 0.042,
    **more: Any,
) -> Json:
    final = status not in ("queued", "running")
    return {
        "execution_id": execution_id, "job_id": execution_id, "schedule_id": schedule_id,
        "handler_id": handler_id, "method_name": method_name, "job_params": {}, "status": status,
        "scheduled_at": iso_in(-ago), "created_at": iso_in(-ago), "due_at": iso_in(-ago),
        "started_at": None if status == "queued" else iso_in(-ago),
        "completed_at": iso_in(took - ago) if final else None,
        "duration_ms": round(took * 1000) if final else None,
        "attempt_number": 0 if status == "queued" else 1, "result": None, "error": None,
        "reason": None, "coalesced": 0, "deadline": None, **more,
    }  # fmt: skip


TRACEBACK = """Traceback (most recent call last):
  File "handler.py", line 412, in _call
    result = method(**params)
  File "backup.py", line 31, in push
    client.upload(archive, timeout=30)
ConnectionRefusedError: [Errno 111] Connection refused: nas.local:2049"""

HANDLERS = [
    handler(
        "ding-dong",
        method("chime", "Ring the bell once.", volume=("int", 3), text=("str", "ding")),
        method("announce", "Say the time aloud.", language=("str", "en"), loud=("bool", False)),
    ),
    handler(
        "backup",
        method("push", "Copy a directory to the NAS, verify it, and drop copies older than "
               "`keep_days`.", path=("str", ...), keep_days=("int", 30), options=("dict", None)),
        method("verify", "Read back the newest copy.", path=("str", ...)),
        clock=1,
    ),
    handler("sensors", method("read", "Read all sensors."), status="Disconnected"),
]  # fmt: skip


def small() -> Mock:
    """Three schedules, a little history."""
    mock = Mock(handlers=json.loads(json.dumps(HANDLERS)))
    mock.handlers[2]["instances"] = []
    for made in (
        schedule("hourly-chime", "ding-dong", "chime", name="Chime on the hour",
                 trigger_config={"type": "cron", "minute": "0"}, trigger="cron[minute='0']",
                 description="every hour at minute 0", next_fire_time=iso_in(1311),
                 last_fire_time=iso_in(-2289)),
        schedule("nightly-backup", "backup", "push", job_params={"path": "/srv/photos"},
                 trigger_config={"type": "cron", "expression": "30 2 * * *",
                                 "timezone": "Europe/Berlin"},
                 trigger="cron[30 2 * * *]", description="every day at 02:30 Europe/Berlin",
                 next_fire_time=iso_in(34_000), last_fire_time=iso_in(-52_400)),
        schedule("read-sensors", "sensors", "read", description="every 15 seconds",
                 trigger_config={"type": "interval", "seconds": 15}, paused=True),
    ):  # fmt: skip
        mock.schedules[made["id"]] = made
    for i in range(60):
        status = {7: "error", 23: "timeout", 31: "skipped", 44: "missed"}.get(i, "success")
        ends: Json = {"result": {"rung": True}} if status == "success" else {}
        if status in ("error", "timeout"):
            ends = {"error": "[Errno 111] Connection refused: nas.local:2049", "attempt_number": 3}
        if status in ("skipped", "missed"):
            ends = {"reason": "overlap", "started_at": None, "duration_ms": None}
        name = ("backup", "push", "nightly-backup") if i % 8 == 7 else (
            "ding-dong", "chime", "hourly-chime")  # fmt: skip
        lasted = {"ago": 40 + i * 57, "took": 0.004 * (i + 1)}
        made = execution(f"x{999 - i:011}", name[0], name[1], status, name[2], **lasted, **ends)
        mock.executions.append(made)
    failed = next(e for e in mock.executions if e["status"] == "error")
    mock.details[failed["execution_id"]] = {
        "attempts": [
            {"attempt_number": n, "instance": "4f2a91c0", "started_at": iso_in(-500 + n * 20),
             "ended_at": iso_in(-499 + n * 20), "outcome": "error",
             "error": failed["error"], "traceback": TRACEBACK} for n in (1, 2, 3)
        ],
        "log": "2026-11-23T02:30:00.120000Z INFO packing /srv/photos\n"
               "2026-11-23T02:30:02.980000Z stdout 18,212 files, 41.2 GB\n"
               "2026-11-23T02:30:03.000000Z ERROR cannot reach nas.local\n",
    }  # fmt: skip
    now = time.time()
    for i in range(60):
        total = (i * 7919) % 11 + (i % 20 == 0) * 14
        failed_too = 2 if total > 9 else 0
        minute = {"minute": iso((now // 60 - i) * 60), "total": total, "failed": failed_too}
        mock.per_minute.append({**minute, "success": total - failed_too})
    return mock


def running() -> Mock:
    """As small, with one long job under way, one waiting for its retry, one for its handler."""
    mock = small()
    log = "".join(
        f"{iso_in(i - 41)} {'INFO' if i % 3 else 'stdout'} file {i:>3} of 180: IMG_{4400 + i}.jpg\n"
        for i in range(40)
    )
    params = {"path": "/srv/photos", "keep_days": 30}
    call = ("backup", "push", "running", "nightly-backup")
    mock.executions.insert(0, execution("live00000001", *call, ago=42, job_params=params))
    mock.details["live00000001"] = {"log": log}
    waits: Json = {"attempt_number": 1, "due_at": iso_in(14), "error": "[Errno 110] timed out"}
    mock.executions.insert(0, execution("wait00000002", "backup", "verify", "queued", **waits))
    mock.executions.insert(0, execution("wait00000003", "sensors", "read", "queued", ago=2))
    return mock


def many(count: int = 10_000) -> Mock:
    mock = small()
    for i in range(count - len(mock.schedules)):
        name = f"sensor-{i:05}"
        mock.schedules[name] = schedule(
            name, "sensors" if i % 3 else "ding-dong", "read" if i % 3 else "chime",
            paused=i % 17 == 0, next_fire_time=iso_in(60 + i * 8),
            trigger_config={"type": "cron", "minute": str(i % 60)},
            description=f"every hour at minute {i % 60}",
        )  # fmt: skip
    return mock
