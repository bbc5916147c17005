#!/usr/bin/env python3
"""ScheduleZero's handler library and its ready-made handlers: one file that needs only pyzmq.

A handler is a process whose methods ScheduleZero calls. Ten lines make one:

    from handler import Handler

    class Backup(Handler):
        def nightly(self, path: str, keep: int = 7):
            "Copy `path`; keep the newest `keep` copies."
            print("copying", path)             # goes to the execution's log, like logging
            self.job.progress(50, "half way")  # self.job: the call this thread is running
            return {"kept": keep}              # any JSON value; an exception is a failure

    if __name__ == "__main__":
        Backup.main()                          # python backup.py --server tcp://10.0.0.2:4242

The ready-made ones below run the same way: `python -m handler DingDong` (`python handler.py
DingDong` does too, but compiles this file at every start, which costs 5 MB that stay).

The id is the class name in kebab case (`backup`) unless `handler_id` or `--id` says otherwise.
Functions work too: `handler = Handler("backup")`, `@handler.method` above each, `handler.main()`.
`--config '{"root": "/srv"}'` makes `Backup(root="/srv")`; `super().__init__()` need not be called.

A job that is told to stop (cancelled, timed out, replaced) finds `self.job.cancelled` true;
`self.job.check_cancelled()` and `self.job.wait(seconds)` raise JobCancelled. With `--processes`
each job runs in a worker process, which is killed when it ignores that for GRACE_S.
Output of threads a job starts by itself is not captured unless they run in its context
(`contextvars.copy_context().run`).

    socket thread (main)                              workers (threads, or processes)
      DEALER ── Session ── calls ─────────────────────▶ perform(job)
        ▲         │  ◀──── results, log lines ─────────── Outbox, captured output
        └─────────┘        (deque + wake-up pipe)

Only the main thread touches the socket; heartbeats go out whatever the jobs do. Results are kept
until the server acknowledges them and sent again after every reconnection; `--spool DIR` also
keeps them on disk, so that they outlive this process.

Signals: SIGTERM and SIGINT refuse new calls, let running jobs finish for `--drain` seconds,
deliver their results and exit 0; a second one exits at once. Exit codes: 0 drained, 1 jobs were
abandoned, 2 usage, 78 configuration.

The wire format is that of schedulezero.py, repeated here on purpose: this file stands alone.
"""

from __future__ import annotations

import contextvars
import errno
import json
import logging
import os
import re
import select
import signal
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import zmq

if TYPE_CHECKING:
    import socket

__version__ = "0.1.0"

# --- Constants --------------------------------------------------------------------------------

DEFAULT_SERVER: Final = "tcp://127.0.0.1:4242"
EXIT_OK: Final = 0
EXIT_ABANDONED: Final = 1
EXIT_CONFIG: Final = 78  # EX_CONFIG in sysexits.h; the governor never restarts it

MAX_CONCURRENCY: Final = 1_000
MAX_METHODS: Final = 256  # the server takes no more of one handler
HANDLER_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
WORD_START: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # within the name of a class
METHOD_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:@-]{0,127}")  # what its API can name
MAX_MESSAGE_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 60  # the server refuses JSON nested deeper than 64, envelope included
MAX_ID_CHARS: Final = 120  # in hex it still fits a file name
MAX_DOC_CHARS: Final = 2_000
MAX_ERROR_CHARS: Final = 8_192  # of an error's sentence, and of its traceback
MAX_LINE_CHARS: Final = 4_096
MAX_LOG_LINES: Final = 1_000  # the server takes no more in one message
MAX_LOG_BYTES: Final = 64 << 10  # log kept per job between two sends; the middle lines go first
LOG_BYTES_PER_S: Final = 64 << 10  # what one flooding job may send
MAX_UNDELIVERED: Final = 1_000  # results; beyond them or the bytes below calls are refused
MAX_UNDELIVERED_BYTES: Final = 16 << 20
MAX_BODY_BYTES: Final = 64 << 10  # of what Http returns of an answer
MAX_FINISHED_BYTES: Final = 512 << 10  # of results inside one registration; the rest follow it

HEARTBEAT_S: Final = 2.0
LIVENESS_S: Final = 10.0  # silence after which the server counts as gone
HELLO_S: Final = 1.0  # how long a new connection waits for the server's hello
REGISTER_S: Final = 5.0  # how long a registration waits for its reply
RESEND_S: Final = 5.0
BACKOFF_S: Final = (0.2, 5.0)
FLUSH_S: Final = 0.2  # how long log lines and progress may wait for company
GRACE_S: Final = 5.0  # between telling a job to stop and killing its worker process
TIMEOUT_SLACK_S: Final = 1.0  # the server ends a job at its timeout; if it cannot, we do
DRAIN_S: Final = 30.0
ORPHAN_DRAIN_S: Final = 5.0  # the same when the governor is gone
LAST_CALL_S: Final = 3.0  # before the end of the drain running jobs are told to stop
NEVER: Final = float("inf")

log = logging.getLogger("schedulezero.handler")

F = TypeVar("F", bound=Callable[..., Any])


class Options(NamedTuple):
    """How to serve; None leaves the choice to the handler's class attributes."""

    server: str = DEFAULT_SERVER
    handler_id: str | None = None
    concurrency: int | None = None
    processes: bool = False
    spool: str | None = None
    drain_s: float = DRAIN_S
    log_level: str = "INFO"
    config: Mapping[str, Any] = {}
    join: Join | None = None  # with it the link is encrypted
    secret: str | None = None  # the server's handler_secret, where it demands one


class Join(NamedTuple):
    """What a join string says: who the handler is, where the server is and how it is recognised."""

    handler_id: str
    server: str
    server_key: str
    secret_key: str


# --- Errors -----------------------------------------------------------------------------------


class JobCancelled(BaseException):
    """The job was told to stop. Not an Exception, so that `except Exception` lets it through."""


class ConfigError(Exception):
    """The handler cannot start as it is configured; the sentence says what to change."""


class ProtocolError(Exception):
    """A message is not what the protocol says; it is dropped."""


class BadParameters(Exception):
    """A call's parameters do not fit the method; nothing was called."""


# --- Wire: one UTF-8 JSON object per message --------------------------------------------------


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("two keys of an object are the same text")


def _refuse_long_integer(digits: str) -> None:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"the number {digits[:30]} does not fit into 64 bits")


_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)
_LONG_NUMBER: Final = re.compile("[0-9]{19}")
_CHECKER: Final = json.JSONDecoder(
    object_pairs_hook=_refuse_duplicates, parse_int=_refuse_long_integer
)


def encode(message: Mapping[str, Any], errors: str = "strict") -> bytes:
    """The body of `message`. ValueError, TypeError or RecursionError if it is not JSON, or none
    that the server takes: keys 1 and "1" in one object, an integer beyond 64 bits.

    With `errors` "replace", text that is not valid Unicode becomes `?`.
    """
    text = _ENCODER.encode(message)
    if errors == "strict" and (text.count("{") > 1 or _LONG_NUMBER.search(text)):
        _CHECKER.decode(text)
    return text.encode("utf-8", errors)


def decode(body: bytes) -> dict[str, Any]:
    """The message in `body`; ProtocolError for everything else, however it is broken."""
    if len(body) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{len(body)} bytes are more than {MAX_MESSAGE_BYTES}")
    try:
        message = _DECODER.decode(body.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None
    if type(message) is not dict:
        raise ProtocolError("not a JSON object")
    return message


def request(method: str, **params: Any) -> bytes:
    return encode({"method": method, "params": params}, "replace")


def failure(call_id: str, error: str, **extras: Any) -> bytes:
    """A failed result; `error` is a sentence for the user."""
    error = error[:MAX_ERROR_CHARS]
    return encode({"id": call_id, "success": False, "error": error, **extras}, "replace")


def nests_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects in `value` nest more than `limit` deep."""
    if not isinstance(value, dict | list | tuple):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return limit == 0 or any(nests_deeper(each, limit - 1) for each in inside)


# --- Methods: what can be called, derived from signatures -------------------------------------


class Method(NamedTuple):
    name: str
    function: Callable[..., Any]
    doc: str
    parameters: list[dict[str, Any]]  # as the registration describes them
    takes_any: bool  # it has **kwargs
    known: frozenset[str]
    required: frozenset[str]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "doc": self.doc, "parameters": self.parameters}

    def check(self, params: Mapping[str, Any]) -> None:
        """BadParameters, naming the parameter, unless `params` can be passed to the method."""
        given = params.keys()
        if self.required <= given and (self.takes_any or given <= self.known):
            return
        for name in sorted(self.required - given):
            raise BadParameters(f"{self.name} needs the parameter {name!r}")
        unknown = sorted(given - self.known)[0]
        takes = ", ".join(parameter["name"] for parameter in self.parameters) or "none"
        raise BadParameters(f"{self.name} has no parameter {unknown!r}; its parameters: {takes}")


def describe_method(name: str, function: Callable[..., Any]) -> Method:
    """The Method for a function or bound method, read from its code object.

    (`inspect` would do this too, for 0.8 MB more in every handler process.)
    """
    plain: Any = function
    while hasattr(plain, "__wrapped__"):
        plain = plain.__wrapped__
    bound = hasattr(plain, "__self__") or hasattr(function, "__self__")
    plain = getattr(plain, "__func__", plain)
    code = plain.__code__
    if code.co_posonlyargcount > bound:
        raise ConfigError(f"{name} has positional-only parameters; calls pass them by name")
    names = code.co_varnames[bound : code.co_argcount + code.co_kwonlyargcount]
    given = plain.__defaults__ or ()
    defaults = dict(zip(code.co_varnames[code.co_argcount - len(given) :], given, strict=False))
    defaults.update(plain.__kwdefaults__ or {})
    parameters = [describe_parameter(plain, each, defaults) for each in names]
    takes_any = bool(code.co_flags & 0x08)  # CO_VARKEYWORDS
    lines = (line.strip() for line in (plain.__doc__ or "").strip().splitlines())
    doc = "\n".join(lines)[:MAX_DOC_CHARS]
    known = frozenset(names)
    return Method(name, function, doc, parameters, takes_any, known, known.difference(defaults))


def describe_parameter(function: Any, name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    about = {"name": name, "required": name not in defaults}
    if hint := function.__annotations__.get(name):
        named = isinstance(hint, type)
        about["type"] = hint.__name__ if named else str(hint).replace("typing.", "")
    if name in defaults:
        about["default"] = defaults[name]
        try:
            is_shown = len(encode(about)) < MAX_DOC_CHARS
        except (TypeError, ValueError, RecursionError):
            is_shown = False
        if not is_shown:
            about["default"] = repr(defaults[name])
    return about


# --- Jobs: one call while it runs -------------------------------------------------------------


class Batch(NamedTuple):
    """What a job said since the last batch: log lines `[unix time, level, text]` and progress."""

    lines: list[tuple[float, str, str]]
    dropped: int
    progress: tuple[float | None, str | None] | None
    gap: int = 0  # how many of the lines came before those that were dropped


class Outbox:
    """A job's log lines and progress, between the thread that runs it and the one that sends.

    Never blocks and never grows past MAX_LOG_BYTES: lines in the middle are dropped and counted,
    so that the first and the last words of a flooding job are kept. After n bytes the next batch
    is due no sooner than n / LOG_BYTES_PER_S later.
    """

    def __init__(self) -> None:
        self.due_at = NEVER
        self.notify: Callable[[], None] | None = None  # called when due_at is set
        self._lock = threading.RLock()  # re-entered when a finalizer prints during a print
        self._head: list[tuple[float, str, str]] = []
        self._lines: deque[tuple[float, str, str]] = deque()
        self._head_bytes = self._bytes = self._dropped = 0
        self._partial: dict[str, str] = {}
        self._progress: tuple[float | None, str | None] | None = None
        self._not_before = self._echo_at = self._echo_bytes = 0.0

    def write(self, level: str, text: str) -> None:
        """Take text that was printed to a stream or logged; a line goes out when it is complete."""
        with self._lock:
            *lines, rest = (self._partial.get(level, "") + text).split("\n")
            if len(rest) > MAX_LINE_CHARS:
                lines, rest = [*lines, rest], ""
            self._partial[level] = rest
            for line in lines:
                self._append(round(time.time(), 3), level, line)
        self._announce()

    def progress(self, percent: float | None, message: str | None) -> None:
        with self._lock:
            self._progress = (percent, message)
        self._announce()

    def merge(self, batch: Batch) -> None:
        """Take over what another outbox collected."""
        with self._lock:
            self._progress = batch.progress or self._progress
            for line in batch.lines[: batch.gap]:
                self._append(*line)
            self._dropped += batch.dropped
            for line in batch.lines[batch.gap :]:
                self._append(*line)
        self._announce()

    def may_echo(self, size: int) -> bool:
        """Whether `size` more bytes may go to the handler's own output: a flood fills no disk."""
        now = time.monotonic()
        gained = (now - self._echo_at) * LOG_BYTES_PER_S
        self._echo_at = now
        self._echo_bytes = min(self._echo_bytes + gained, 4.0 * MAX_LOG_BYTES)
        if self._echo_bytes < size:
            return False
        self._echo_bytes -= size
        return True

    def take(self, now: float, *, last: bool = False) -> Batch | None:
        """The batch that is due at monotonic `now`; with `last`, all there is, open lines too."""
        with self._lock:
            if last:
                for level, text in list(self._partial.items()):
                    if text:
                        self.write(level, "\n")
            elif now < self.due_at:
                return None
            if not (self._head or self._lines or self._dropped or self._progress):
                return None
            lines = [*self._head, *self._lines]
            batch = Batch(lines, self._dropped, self._progress, len(self._head))
            self._not_before = now + (self._head_bytes + self._bytes) / LOG_BYTES_PER_S
            self._head.clear()
            self._lines.clear()
            self._head_bytes = self._bytes = self._dropped = 0
            self._progress = None
            self.due_at = NEVER
            return batch

    def _append(self, at: float, level: str, text: str) -> None:
        if len(text) > MAX_LINE_CHARS:
            text = f"{text[:MAX_LINE_CHARS]} [{len(text) - MAX_LINE_CHARS} more characters]"
        line, size = (at, level, text), len(text) + 32
        has_room = self._head_bytes + size <= MAX_LOG_BYTES // 2
        if has_room and not (self._lines or self._dropped) and len(self._head) < MAX_LOG_LINES // 2:
            self._head.append(line)
            self._head_bytes += size
            return
        self._lines.append(line)
        self._bytes += size
        while self._bytes > MAX_LOG_BYTES // 2 or len(self._lines) > MAX_LOG_LINES // 2:
            self._bytes -= len(self._lines.popleft()[2]) + 32
            self._dropped += 1

    def _announce(self) -> None:
        if self.due_at == NEVER and (self._head or self._lines or self._progress):
            self.due_at = max(time.monotonic() + FLUSH_S, self._not_before)
            if self.notify:
                self.notify()


class Job:
    """The call a worker is running; `self.job` inside a handler's method.

    `execution_id` is the same in every attempt, `attempt` counts from 1, `timeout` is in seconds
    (None: no limit). Outside a call `self.job` is a job of its own that nobody cancels, so that
    methods can be called directly in tests.
    """

    reason: str | None = None  # why it was told to stop
    cancelled_at = NEVER
    deadline = NEVER
    forgotten = False  # the server does not want the result

    def __init__(self, call: Mapping[str, Any]) -> None:
        """Of a call message; ProtocolError names the field that is not of the right type."""
        self.call = call
        self.id: str = call.get("id", "")
        self.method: str = call.get("method", "")
        self.params: dict[str, Any] = call.get("params", {})
        if (
            type(self.id) is not str
            or not self.id.isascii()
            or not 0 < len(self.id) <= MAX_ID_CHARS
        ):
            raise ProtocolError(f"id is not a string of 1 to {MAX_ID_CHARS} ASCII characters")
        if type(self.method) is not str or type(self.params) is not dict:
            raise ProtocolError("method is not a string or params not an object")
        execution_id, _, attempt = self.id.rpartition(":")
        self.execution_id = execution_id or self.id
        self.attempt = int(attempt) if attempt.isdigit() else 1
        timeout: Any = call.get("timeout")
        self.timeout = timeout if type(timeout) in (int, float) and timeout > 0 else None
        self.outbox = Outbox()
        self._callbacks: list[Callable[[], None]] = []
        self._going_on = threading.Lock()  # held until it is told to stop; an Event costs 3 µs
        self._going_on.acquire()

    @property
    def cancelled(self) -> bool:
        """Whether the job was told to stop; `reason` says why."""
        return self.reason is not None

    def check_cancelled(self) -> None:
        """Raise JobCancelled if the job was told to stop."""
        if self.reason is not None:
            raise JobCancelled(self.reason)

    def wait(self, seconds: float) -> None:
        """Sleep; raise JobCancelled as soon as the job is told to stop."""
        if self._going_on.acquire(timeout=max(0.0, seconds)):
            self._going_on.release()
        self.check_cancelled()

    def progress(self, percent: float | None, message: str | None = None) -> None:
        """Show how far the job is, 0 to 100, or None when only the message is known."""
        if percent is not None:
            percent = min(100.0, max(0.0, float(percent)))
        self.outbox.progress(percent, None if message is None else str(message)[:MAX_LINE_CHARS])

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once, by the socket thread, when the job is told to stop.

        It must not block: heartbeats wait for it.
        """
        self._callbacks.append(callback)
        if self.cancelled:
            self._call_back()

    def cancel(self, reason: str, now: float) -> None:
        """Tell the job to stop; only one thread may. The first reason stays."""
        if not self.cancelled:
            self.reason, self.cancelled_at = reason, now
            self._going_on.release()
            self._call_back()

    def _call_back(self) -> None:
        with suppress(IndexError):  # two threads may empty the list: each callback runs once
            while True:
                callback = self._callbacks.pop()
                try:
                    callback()
                except Exception:
                    log.exception("%s: a callback for its cancellation failed", self.id)

    def take_words(self, now: float, *, last: bool = False) -> list[bytes]:
        """The messages with what it said that are due at monotonic `now`; with `last`, all."""
        batch = self.outbox.take(now, last=last)
        if batch is None:
            return []
        found = []
        gap = batch.gap if batch.dropped else 0
        for lines, dropped in ((batch.lines[:gap], 0), (batch.lines[gap:], batch.dropped)):
            if lines or dropped:
                found.append(request("log", id=self.id, lines=lines, dropped=dropped))
        if batch.progress:
            percent, message = batch.progress
            found.append(request("progress", id=self.id, percent=percent, message=message))
        return found


_CURRENT: contextvars.ContextVar[Job] = contextvars.ContextVar("schedulezero_job")


def current_job() -> Job:
    """The job this thread (or task) is running, or a detached one."""
    return _CURRENT.get(None) or Job({"id": "none:1"})


def perform(job: Job, methods: Mapping[str, Method]) -> bytes:
    """Run a job to its result message. Whatever the job raises, even SystemExit, ends only it."""
    token = _CURRENT.set(job)
    started = time.monotonic()
    try:
        method = methods.get(job.method)
        if method is None:
            names = ", ".join(sorted(methods)) or "none"
            raise BadParameters(f"there is no method {job.method!r}; there are: {names}")
        method.check(job.params)
        job.check_cancelled()
        value = method.function(**job.params)
        if hasattr(value, "__await__"):
            import asyncio  # only handlers with `async def` methods pay for it

            value = asyncio.run(complete(value))
        return success(job.id, value, elapsed_ms(started))
    except BadParameters as error:
        return failure(job.id, str(error), error_type="BadParameters")
    except JobCancelled:
        return stopped(job, elapsed_ms(started))
    except BaseException as error:
        return raised(job.id, error, elapsed_ms(started))
    finally:
        _CURRENT.reset(token)


async def complete(awaitable: Any) -> Any:
    return await awaitable


def elapsed_ms(started: float) -> float:
    return round((time.monotonic() - started) * 1_000, 3)


def success(call_id: str, value: Any, duration_ms: float) -> bytes:
    """The result message, or a failed one when `value` cannot be sent."""
    try:
        body = encode({"id": call_id, "success": True, "result": value, "duration_ms": duration_ms})
    except (TypeError, ValueError, RecursionError) as error:
        flaw = f"is not JSON: {error}"
    else:
        if len(body) > MAX_MESSAGE_BYTES:
            flaw = f"has {len(body)} bytes; at most {MAX_MESSAGE_BYTES} can be sent"
        elif body.count(b"[") + body.count(b"{") > MAX_DEPTH and nests_deeper(value, MAX_DEPTH):
            flaw = f"nests deeper than {MAX_DEPTH}"
        else:
            return body
    return failure(call_id, f"the result {flaw}", error_type="BadResult")


def stopped(job: Job, duration_ms: float) -> bytes:
    """The result of a job that ended because it was told to, or raised JobCancelled itself."""
    if job.reason == "stopping":
        # Not the user's wish: without `cancelled` it is a failed attempt and is tried again.
        sentence = "the handler stopped before the job was finished"
        return failure(job.id, sentence, error_type="HandlerStopped", duration_ms=duration_ms)
    sentence = f"stopped: {job.reason or 'by itself'}"
    return failure(job.id, sentence, cancelled=True, duration_ms=duration_ms)


def raised(call_id: str, error: BaseException, duration_ms: float) -> bytes:
    """The failed result for an exception: its text, type and traceback, from the job's code on."""
    kind = type(error).__name__
    try:
        sentence = str(error) or kind
        below = error.__traceback__ and error.__traceback__.tb_next
        lines = traceback.format_exception(type(error), error, below)
        trace = "".join(lines)[-MAX_ERROR_CHARS:]
    except Exception as second:  # its __str__ raises
        sentence, trace = f"{kind}, whose text cannot be had: {type(second).__name__}", ""
    return failure(call_id, sentence, error_type=kind, traceback=trace, duration_ms=duration_ms)


# --- Handler ----------------------------------------------------------------------------------


class _Main:
    """`MyHandler.main(argv)` and `handler.main(argv)`: the command line of a class or instance."""

    def __get__(self, instance: Handler | None, owner: type[Handler]) -> Callable[..., int]:
        def run(argv: Sequence[str] | None = None) -> int:
            """Serve until told to stop; sys.exit with the exit code unless `argv` is given."""
            code = main(argv, owner if instance is None else instance)
            return code if argv is not None else sys.exit(code)

        return run


class Handler:
    """A set of methods ScheduleZero may call: the public ones of a subclass, or `@method`'s.

    Everything here except the names below is free for methods. Class attributes are defaults for
    the command line's options of the same names.
    """

    handler_id: str | None = None  # None: the class name in kebab case
    concurrency: int = 1  # jobs at the same time
    processes: bool = False  # run them in worker processes, so that stuck ones can be killed
    spool: str | None = None  # directory in which results wait until they are acknowledged
    main = _Main()

    def __init__(self, handler_id: str | None = None) -> None:
        self.handler_id = handler_id or self.handler_id

    def __init_subclass__(cls, **extras: Any) -> None:
        super().__init_subclass__(**extras)
        options = ("handler_id", "concurrency", "processes", "spool")
        for name, value in vars(cls).items():
            if name in ("main", "job", "method") or (name in options and callable(value)):
                raise TypeError(f"{cls.__name__}.{name} hides Handler.{name}; choose another name")

    @property
    def job(self) -> Job:
        """The job being run here: see Job."""
        return current_job()

    def method(self, function: F) -> F:
        """Decorator: make a function one of this handler's methods."""
        vars(self).setdefault("_functions", {})[function.__name__] = function
        return function


def methods_of(handler: Handler) -> dict[str, Method]:
    """Every public method of a handler's class, and the functions registered on it.

    ConfigError if the server would refuse one.
    """
    found: dict[str, Callable[..., Any]] = {}
    for owner in reversed(type(handler).__mro__):
        if owner is not object and owner is not Handler:
            for name, member in vars(owner).items():
                if not name.startswith("_"):
                    found.pop(name, None)
                    if isinstance(member, FunctionType | staticmethod | classmethod):
                        found[name] = getattr(handler, name)
    found.update(vars(handler).get("_functions", {}))
    for name in found:
        if not METHOD_NAME.fullmatch(name):
            allowed = "1 to 128 of A-Z a-z 0-9 . _ : @ -, the first a letter, digit or _"
            raise ConfigError(f"{name!r} is no name of a method: {allowed}")
    return {name: describe_method(name, function) for name, function in found.items()}


def id_of(handler: Handler) -> str:
    """The handler's id; ConfigError if the server would refuse it."""
    handler_id = handler.handler_id or WORD_START.sub("-", type(handler).__name__).lower()
    if not HANDLER_ID.fullmatch(handler_id):
        allowed = "1 to 128 of A-Z a-z 0-9 . _ -, the first a letter or digit"
        raise ConfigError(f"{handler_id!r} is no handler id: {allowed}")
    return handler_id


# --- Ready-made: DingDong, Example ------------------------------------------------------------


def strokes(hour: int, minute: int) -> int:
    """How often a clock strikes: the hour (1 to 12) on the hour, once at half past, else not."""
    if minute == 0:
        return hour % 12 or 12
    return 1 if minute == 30 else 0


def ship_bells(hour: int, minute: int) -> int:
    """A ship's bell: 1 to 8, one more every half hour of the four-hour watch, else 0."""
    if minute % 30:
        return 0
    return (hour * 2 + minute // 30) % 8 or 8


_HOURS: Final = (
    "twelve", "one", "two", "three", "four", "five",
    "six", "seven", "eight", "nine", "ten", "eleven",
)  # fmt: skip
_STEPS: Final = ("", "five", "ten", "a quarter", "twenty", "twenty-five", "half")


def time_in_words(hour: int, minute: int) -> str:
    """The time as people say it, to five minutes: "five to three", "half past two"."""
    fives = (minute + 2) // 5
    hour += fives > 6
    name = _HOURS[hour % 12]
    if fives % 12 == 0:
        return f"{name} o'clock"
    return f"{_STEPS[min(fives, 12 - fives)]} {'to' if fives > 6 else 'past'} {name}"


class DingDong(Handler):
    """Announces the time."""

    _STYLES: Final = {
        "plain": "ding dong",
        "cuckoo": "cuckoo, cuckoo",
        "westminster": "ding dang dong, bim bam bom",
        "ship": "clang clang",
    }

    def chime(self, style: str = "plain") -> dict[str, Any]:
        """Say the time and strike it. Styles: plain, cuckoo, westminster, ship."""
        if style not in self._STYLES:
            raise ValueError(f"style {style!r} is none of {', '.join(self._STYLES)}")
        now = time.localtime(time.time())  # without, it is the kernel's coarse clock: ms behind
        said = f"{self._STYLES[style]}, it is {now.tm_hour:02}:{now.tm_min:02}"
        count = (ship_bells if style == "ship" else strokes)(now.tm_hour, now.tm_min)
        print(said)
        return {"said": said, "strokes": count, "style": style}

    def announce(self, message: str) -> dict[str, Any]:
        """Say the time in words, then `message`."""
        now = time.localtime(time.time())
        said = f"It is {time_in_words(now.tm_hour, now.tm_min)}. {message}"
        print(said)
        return {"said": said}

    def countdown(self, seconds: int = 10) -> dict[str, Any]:
        """Count `seconds` down aloud; can be cancelled between two of them."""
        for left in range(seconds, 0, -1):
            print(left)
            self.job.progress(100 * (seconds - left) / seconds, f"{left} s left")
            self.job.wait(1)
        print("ding dong")
        return {"counted": seconds}


class Example(Handler):
    """Small methods to try things with."""

    concurrency = 4

    def add(self, a: float, b: float) -> float:
        """The sum of two numbers."""
        return a + b

    def echo(self, **params: Any) -> dict[str, Any]:
        """Return whatever was passed."""
        return params

    def fail(self, message: str = "told to fail") -> None:
        """Fail with `message`."""
        raise RuntimeError(message)

    def sleep(self, seconds: float) -> dict[str, float]:
        """Sleep with progress; stops at once when cancelled."""
        began = time.monotonic()
        while (slept := time.monotonic() - began) < seconds:
            self.job.progress(100 * slept / seconds, f"{slept:.1f} of {seconds} s")
            self.job.wait(min(0.5, seconds - slept))
        return {"slept": round(slept, 3)}


# --- Ready-made: Shell ------------------------------------------------------------------------


def describe_exit(code: int) -> str:
    """Words for a process's end; `code` as subprocess has it, negative for signals."""
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"


class ProgramFailed(Exception):
    """A program ended with another exit code than expected."""


class Shell(Handler):
    """Runs programs. Refuses every one until its configuration allows it.

    `allow` lists what may run: a program by the name or path calls give (with any arguments: list
    only programs for which all are harmless), a whole argv as a list, or a whole command line:
    `{"allow": ["backup.sh", ["rsync", "-a", "/home", "/mnt"], "sync && fstrim /"]}`.
    `allow_any` allows everything, and calls to set `cwd` and `env`.
    """

    def __init__(
        self,
        handler_id: str | None = None,
        *,
        allow: Sequence[str | Sequence[str]] = (),
        allow_any: bool = False,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(handler_id)
        self._allow = [each if isinstance(each, str) else list(each) for each in allow]
        self._allow_any = allow_any
        self._cwd, self._env = cwd, env or {}

    def run(
        self,
        argv: list[str] | None = None,
        command: str | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout: float | None = None,
        expect: Sequence[int] = (0,),
    ) -> dict[str, Any]:
        """Run a program (`argv`) or a command line (`command`, by /bin/sh) to its end.

        Its output becomes the log as it comes. Fails unless the exit code is in `expect`, or when
        it runs longer than `timeout` seconds; then, as when cancelled, its whole process group
        gets SIGTERM and 3 s later SIGKILL. Returns `exit_code` and the end of `stdout`.
        """
        if (argv is None) == (command is None):
            raise ValueError("give either argv, a list, or command, a command line")
        self._check(argv, command, cwd is not None or env is not None)
        started = [str(each) for each in argv] if argv else ["/bin/sh", "-c", str(command)]
        program = Program(started, cwd or self._cwd, {**os.environ, **self._env, **(env or {})})
        with program.process as process:  # which closes the pipes
            try:
                program.follow(self.job, NEVER if timeout is None else timeout)
            finally:
                program.end()
        if process.returncode not in expect:
            raise ProgramFailed(f"{describe_exit(process.returncode)}: {program.last_words()}")
        return {"exit_code": process.returncode, "stdout": program.tails["stdout"]}

    def _check(self, argv: list[str] | None, command: str | None, special: bool) -> None:
        """PermissionError unless the configuration allows the call."""
        if self._allow_any:
            return
        if special:
            raise PermissionError("cwd and env can be set by calls only with allow_any")
        allowed = (command if argv is None else argv) in self._allow
        if not allowed and not (argv and argv[0] in self._allow):
            what = command if argv is None else argv[:1]
            raise PermissionError(f"{what!r} is not in this handler's `allow`")


class Program:
    """A running program, the leader of its process group, and the ends of what it printed."""

    _TAIL_CHARS: Final = 16_384
    _TERM_S: Final = 3.0
    _LINGER_S: Final = 1.0  # for output after the exit: a background child may hold the pipes

    def __init__(self, argv: Sequence[str], cwd: str | None, env: Mapping[str, str]) -> None:
        import codecs
        import subprocess  # a third of a megabyte for this handler only

        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        self.process = subprocess.Popen(
            argv, cwd=cwd, env=env, stdin=null, stdout=pipe, stderr=pipe, start_new_session=True
        )
        self.tails = {"stdout": "", "stderr": ""}
        self._poll = select.poll()
        self._open: dict[int, tuple[str, Any]] = {}
        for name in self.tails:
            fd = getattr(self.process, name).fileno()
            self._open[fd] = (name, codecs.getincrementaldecoder("utf-8")("replace"))
            self._poll.register(fd, select.POLLIN)

    def last_words(self) -> str:
        """The last line of stderr, else of stdout."""
        words = self.tails["stderr"].strip() or self.tails["stdout"].strip()
        return words.rpartition("\n")[2] or "it printed nothing"

    def follow(self, job: Job, timeout_s: float) -> None:
        """Pass output to the job's log until the program ends."""
        now = time.monotonic()
        give_up_at, leave_at = now + timeout_s, NEVER
        while now < leave_at and (self._open or self.process.poll() is None):
            for fd, _ in self._poll.poll(250 if self._open else 20):
                self._pass_on(fd, job)
            now = time.monotonic()
            job.check_cancelled()
            if now >= give_up_at:
                raise TimeoutError(f"still running after {timeout_s:g} s")
            if leave_at == NEVER and self.process.poll() is not None:
                leave_at = now + self._LINGER_S

    def end(self) -> None:
        """Leave nothing of it behind, unless it ended by itself."""
        if self.process.poll() is None:
            self._signal(signal.SIGTERM)
            give_up_at = time.monotonic() + self._TERM_S
            while self.process.poll() is None and time.monotonic() < give_up_at:
                time.sleep(0.02)
            self._signal(signal.SIGKILL)

    def _pass_on(self, fd: int, job: Job) -> None:
        name, decoder = self._open[fd]
        data = os.read(fd, 1 << 16)
        text = decoder.decode(data, final=not data)
        self.tails[name] = (self.tails[name] + text)[-self._TAIL_CHARS :]
        job.outbox.write(name, text)
        if not data:
            del self._open[fd]
            self._poll.unregister(fd)

    def _signal(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)


# --- Ready-made: Http -------------------------------------------------------------------------


class UnexpectedStatus(Exception):
    """A server answered with another status than expected."""


class Http(Handler):
    """Makes HTTP requests. Refuses every URL until its configuration allows it.

    `allow` lists URLs; those on the same scheme, host and port and at or below the path may be
    requested, redirects included. `allow_any` allows every URL.
    """

    _PRIVATE: Final = ("authorization", "cookie", "proxy-authorization")

    def __init__(
        self, handler_id: str | None = None, *, allow: Sequence[str] = (), allow_any: bool = False
    ) -> None:
        super().__init__(handler_id)
        self._allow, self._allow_any = list(allow), allow_any

    def request(
        self,
        url: str,
        method: str = "GET",
        headers: dict[str, str] | None = None,
        body: str | None = None,
        json: Any = None,
        expect: Sequence[int] = tuple(range(200, 300)),
        timeout: float = 30.0,
        max_redirects: int = 5,
    ) -> dict[str, Any]:
        """Request `url`; fails unless the final status is in `expect` within `timeout` seconds.

        Returns `status`, `url`, `body` (its first 64 KiB as text) and `truncated`.
        """
        headers = {"User-Agent": f"ScheduleZero/{__version__}", **(headers or {})}
        if json is not None:
            body = _ENCODER.encode(json)
            headers.setdefault("Content-Type", "application/json")
        payload = None if body is None else body.encode()
        deadline = time.monotonic() + timeout
        for _ in range(max_redirects + 1):
            exchange = Exchange(self._checked(url), self.job, deadline)
            status, location, answer = exchange.run(method, headers, payload)
            print(f"{method} {url}: {status}")
            if not location or status not in (301, 302, 303, 307, 308) or status in expect:
                break
            if status == 303 or (status < 303 and method == "POST"):
                method, payload = "GET", None
            url, headers = self._redirected(url, location, headers)
        else:
            raise UnexpectedStatus(f"more than {max_redirects} redirects, the last one to {url}")
        text = answer[:MAX_BODY_BYTES].decode("utf-8", "replace")
        if status not in expect:
            raise UnexpectedStatus(f"{url} answered {status}: {text[:200]}")
        truncated = len(answer) > MAX_BODY_BYTES
        return {"status": status, "url": url, "body": text, "truncated": truncated}

    def _checked(self, url: str) -> Any:
        """The parts of an allowed URL; ValueError or PermissionError for any other."""
        from urllib.parse import unquote, urlsplit

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError(f"{url!r} is no http or https URL, or has a user name in it")
        path = unquote(parts.path)
        for allowed in map(urlsplit, self._allow):
            below = allowed.path.rstrip("/") + "/"
            covered = origin(parts) == origin(allowed) and f"{path}/".startswith(below)
            if covered and ".." not in path.split("/"):
                return parts
        if not self._allow_any:
            raise PermissionError(f"{url} is not in this handler's `allow`")
        return parts

    def _redirected(self, url: str, location: str, headers: dict[str, str]) -> tuple[str, Any]:
        """Where to go next and with which headers: credentials stay with their origin."""
        from urllib.parse import urljoin, urlsplit

        target = urljoin(url, location)
        if origin(urlsplit(target)) != origin(urlsplit(url)):
            headers = {k: v for k, v in headers.items() if k.lower() not in self._PRIVATE}
        return target, headers


def origin(parts: Any) -> tuple[str, str | None, int]:
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


class Exchange:
    """One request and its answer, over a connection that a cancellation or the deadline breaks."""

    def __init__(self, parts: Any, job: Job, deadline: float) -> None:
        """`parts` of the URL as urlsplit has them, `deadline` in monotonic seconds."""
        self._parts, self._job, self._deadline = parts, job, deadline
        self._socket: Any = None

    def run(
        self, method: str, headers: Mapping[str, str], payload: bytes | None
    ) -> tuple[int, str | None, bytes]:
        """Status, Location and up to 64 KiB and one byte of the body. OSError, TimeoutError."""
        from http import client  # several megabytes, as it loads ssl: for this handler only

        url = self._parts
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connect = client.HTTPSConnection if url.scheme == "https" else client.HTTPConnection
        left_s = max(0.001, self._deadline - time.monotonic())
        connection = connect(url.hostname, url.port, timeout=left_s)
        timer = threading.Timer(left_s, self._break)
        timer.daemon = True
        timer.start()
        self._job.on_cancel(self._break)
        try:
            connection.connect()
            self._socket = connection.sock  # http.client may let go of it before the body is read
            self._check()
            connection.request(method, target, payload, dict(headers))
            answer = connection.getresponse()
            body = answer.read(MAX_BODY_BYTES + 1)
            self._check()
            return answer.status, answer.getheader("Location"), body
        except (OSError, client.HTTPException) as error:
            self._check()
            raise ConnectionError(f"{url.hostname}: {error or type(error).__name__}") from error
        finally:
            timer.cancel()
            connection.close()

    def _check(self) -> None:
        self._job.check_cancelled()
        if time.monotonic() >= self._deadline:
            raise TimeoutError(f"{self._parts.hostname} gave no complete answer in time")

    def _break(self) -> None:
        """End a transfer that another thread waits for."""
        import socket

        if self._socket is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


# --- Captured output --------------------------------------------------------------------------


class CapturedStream:
    """Stands for sys.stdout or sys.stderr: a job's text goes to its outbox and to the original."""

    def __init__(self, name: str, original: Any) -> None:
        self._name = name
        self._original = original

    def write(self, text: str) -> int:
        job = _CURRENT.get(None)
        if job:
            job.outbox.write(self._name, text)
        if self._original is not None and (job is None or job.outbox.may_echo(len(text))):
            with suppress(OSError, ValueError):  # nobody reads it, or it cannot be encoded
                self._original.write(text)
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class JobLog(logging.Handler):
    """Passes the logging records made inside a job to its outbox."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if job := _CURRENT.get(None):
                job.outbox.write(record.levelname, self.format(record) + "\n")
        except Exception:
            self.handleError(record)


def may_echo(record: logging.LogRecord) -> bool:
    """Logging filter of the handler's own output: a flooding job is cut off there too."""
    job = _CURRENT.get(None)
    return job is None or job.outbox.may_echo(len(str(record.msg)) + 80)


@contextmanager
def captured() -> Iterator[None]:
    """Capture the output and the logging of jobs in this process."""
    streams, job_log = (sys.stdout, sys.stderr), JobLog()
    logging.getLogger().addHandler(job_log)
    sys.stdout = CapturedStream("stdout", sys.stdout)
    sys.stderr = CapturedStream("stderr", sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        logging.getLogger().removeHandler(job_log)


# --- Spool: finished results on disk ----------------------------------------------------------


class Spool:
    """One file per unacknowledged result, so that it survives this process and a power cut."""

    _STALE_S: Final = 3_600  # age of a half-written file nobody works on any more

    def __init__(self, directory: str) -> None:
        self._directory = directory
        try:
            os.makedirs(directory, exist_ok=True)
            self._fd = os.open(directory, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"the spool directory cannot be used: {error}") from None

    def save(self, call_id: str, body: bytes) -> None:
        """Return when the result is on disk. If it cannot be, say so: it is still delivered."""
        path = self._path(call_id)
        try:
            with open(path + ".tmp", "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".tmp", path)
            os.fsync(self._fd)
        except OSError as error:
            log.warning("the result of %s is kept in memory only: %s", call_id, error)

    def remove(self, call_id: str) -> None:
        try:
            os.unlink(self._path(call_id))
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("%s stays in the spool and will be sent again: %s", call_id, error)

    def load(self) -> dict[str, bytes]:
        """The results an earlier process left, oldest first. A torn file is renamed `.bad`."""
        with os.scandir(self._directory) as entries:
            files = sorted((entry.stat().st_mtime, entry.path) for entry in entries)
        found = {}
        for written_at, path in files:
            if path.endswith(".tmp") and written_at < time.time() - self._STALE_S:
                os.unlink(path)
            elif path.endswith(".result"):
                try:
                    with open(path, "rb") as file:
                        body = file.read(MAX_MESSAGE_BYTES + 1)
                    call_id = str(decode(body).get("id"))
                    if path != self._path(call_id):
                        raise ProtocolError("it is the result of another call")
                    found[call_id] = body
                except (OSError, ProtocolError) as error:
                    log.error("%s is set aside: %s", path, error)
                    os.replace(path, path + ".bad")
        return found

    def _path(self, call_id: str) -> str:
        return os.path.join(self._directory, call_id.encode().hex() + ".result")


def name_runner(body: bytes, instance: str) -> bytes:
    """The result with the instance that ran the job, as a later process may have to send it.

    The rare one that has no room for it stays as it is; from another process it would be late.
    """
    named = body[:-1] + b',"instance":"%b"}' % instance.encode()
    return named if len(named) <= MAX_MESSAGE_BYTES else body


# --- Session: the protocol without a socket ---------------------------------------------------


class Finished:
    """A result that is not acknowledged yet, and what the job said last if that is unsent too."""

    __slots__ = ("body", "sent_at", "words")

    def __init__(self, body: bytes, words: Sequence[bytes] = ()) -> None:
        self.body, self.words = body, words
        self.sent_at: float | None = None


def strings(value: Any) -> list[str]:
    """Those in a list that came from outside."""
    return [each for each in value if type(each) is str] if type(value) is list else []


class Session:
    """What the server and this handler have agreed on. Pure: no socket, no thread, no clock.

    Messages go in by `receive`, time by `now` (monotonic seconds); messages to send collect in
    `outgoing`. Any of them may be lost: everything that matters is sent again.
    """

    def __init__(self, profile: Mapping[str, Any], spool: Spool | None = None) -> None:
        """Of the registration's parameters that stay the same."""
        self.outgoing: deque[bytes] = deque()
        self.running: dict[str, Job] = {}
        self.finished: dict[str, Finished] = {}
        self.registered = False
        self.draining = False
        self._profile = profile
        self._spool = spool
        self._finished_bytes = 0
        self._refusal: str | None = None
        self.closed()
        for call_id, body in (spool.load() if spool else {}).items():
            self._keep(call_id, Finished(body))

    def opened(self, now: float) -> None:
        """A new connection: the server says hello, or we register unasked."""
        self.outgoing.clear()
        self.registered = False
        self._heard_at = now
        self._register_at = now + HELLO_S

    def closed(self) -> None:
        """The connection is gone; nothing is due until there is another."""
        self.registered = False
        self._register_at = self._heartbeat_at = self._resend_at = self._heard_at = NEVER

    def is_silent(self, now: float) -> bool:
        """Whether the server has said nothing for so long that it counts as gone."""
        return now - self._heard_at > LIVENESS_S

    def receive(self, message: Mapping[str, Any], now: float) -> Job | None:
        """Take a message; return the job to start, if it is one."""
        self._heard_at = now
        method = message.get("method")
        if method is None:
            self._replied(message, now)
        elif "id" in message:
            return self._called(message, now)
        else:
            params = message.get("params")
            act = self._CONTROLS.get(method) if type(method) is str else None
            if act and type(params) is dict:
                act(self, params, now)
        return None

    def finish(self, job: Job, body: bytes, now: float) -> None:
        """A job has ended: keep its result until it is acknowledged."""
        self.running.pop(job.id, None)
        finished = Finished(body, job.take_words(now, last=True))
        if not job.forgotten:
            self._keep(job.id, finished)
            self._send(finished, now)
        elif self._spool:
            self._spool.remove(job.id)

    def tick(self, now: float) -> float:
        """Do what is due; return when to come back at the latest."""
        if now >= self._register_at:
            self._register(now)
        if now >= self._heartbeat_at:
            self._tell("heartbeat", time=time.time(), running=len(self.running))
            self._heartbeat_at = now + HEARTBEAT_S
        if now >= self._resend_at:
            self._resend(now)
        silent_at = self._heard_at + LIVENESS_S
        due_at = min(self._register_at, self._heartbeat_at, self._resend_at, silent_at)
        for job in self.running.values():
            if now >= job.deadline:
                job.cancel("timeout", now)
                job.deadline = NEVER
            if self.registered and job.outbox.due_at < NEVER:
                self.outgoing.extend(job.take_words(now))
                due_at = min(due_at, job.outbox.due_at)
            due_at = min(due_at, job.deadline)
        return due_at

    def drain(self) -> None:
        """From now on refuse calls."""
        self.draining = True
        self.report("draining")

    def report(self, status: str) -> None:
        if self.registered:
            self._tell("report_status", status=status)

    def is_done(self) -> bool:
        """Whether nothing runs and no result waits for the server that is nowhere else."""
        is_delivered = not self.finished or (self._spool and not self.registered)
        return not self.running and bool(is_delivered)

    # What the server says.

    def _called(self, message: Mapping[str, Any], now: float) -> Job | None:
        job = Job(message)
        if job.id in self.running:
            return None
        if job.id in self.finished:
            self._send(self.finished[job.id], now)
        elif refusal := self._refuse():
            self.outgoing.append(failure(job.id, refusal, refused=True))
        else:
            self.running[job.id] = job
            if job.timeout is not None:
                job.deadline = now + job.timeout + TIMEOUT_SLACK_S
            return job
        return None

    def _refuse(self) -> str | None:
        """Why no call can be taken now, if so."""
        if self.draining:
            return "the handler is stopping"
        if len(self.running) >= self._profile["concurrency"]:
            return f"the handler runs {len(self.running)} jobs and takes no more at a time"
        kept = len(self.finished)
        if kept >= MAX_UNDELIVERED or self._finished_bytes >= MAX_UNDELIVERED_BYTES:
            return f"the handler has {kept} results that are not acknowledged yet"
        return None

    def _acked(self, params: Mapping[str, Any], now: float) -> None:
        for call_id in strings(params.get("ids", [params.get("id")])):
            self._drop(call_id)

    def _cancelled(self, params: Mapping[str, Any], now: float) -> None:
        call_id, reason = params.get("id"), params.get("reason")
        job = self.running.get(call_id) if type(call_id) is str else None
        if job:
            job.cancel(reason if type(reason) is str else "cancelled", now)

    def _greeted(self, params: Mapping[str, Any], now: float) -> None:
        self.registered = False
        self._register(now)

    # A heartbeat asks for nothing: it was heard.
    _CONTROLS: Final = {"ack": _acked, "cancel": _cancelled, "hello": _greeted}

    def _replied(self, reply: Mapping[str, Any], now: float) -> None:
        accepted, about = reply.get("success"), reply.get("reply_to")
        if about == "register" or (about is None and not self.registered):
            self._admitted(reply, now) if accepted is True else self._rejected(reply, now)
        elif accepted is False and reply.get("code") == "unknown_instance":
            self._greeted({}, now)

    def _admitted(self, reply: Mapping[str, Any], now: float) -> None:
        log.info("%s as %s", reply.get("status", "registered"), self._profile["handler_id"])
        self.registered, self._refusal = True, None
        self._register_at = NEVER
        self._heartbeat_at = now + HEARTBEAT_S
        for call_id in strings(reply.get("forget")):
            self._drop(call_id)
            if job := self.running.get(call_id):
                job.forgotten = True
                job.cancel("forgotten", now)
        for finished in self.finished.values():
            if finished.sent_at is None:
                self._send(finished, now)
        if self.draining:
            self.report("draining")

    def _rejected(self, reply: Mapping[str, Any], now: float) -> None:
        sentence = str(reply.get("error"))[:MAX_DOC_CHARS]
        if sentence != self._refusal:
            log.error("the server refuses the registration: %s", sentence)
        self._refusal = sentence
        self._register_at = now + REGISTER_S

    # What we say.

    def _register(self, now: float) -> None:
        """Announce ourselves, what runs and what finished.

        Results that do not fit, or that last words have to precede, are named as running and
        follow when the registration is accepted.
        """
        bodies, running, size = [], list(self.running), 0
        for call_id, finished in self.finished.items():
            size += len(finished.body)
            if finished.words or size > MAX_FINISHED_BYTES:
                finished.sent_at = None
                running.append(call_id)
            else:
                finished.sent_at = now
                bodies.append(finished.body)
        head = request("register", **self._profile, running=running)
        self.outgoing.append(head[:-2] + b',"finished":[' + b",".join(bodies) + b"]}}")
        self._register_at = now + REGISTER_S
        self._heartbeat_at = NEVER

    def _tell(self, method: str, **params: Any) -> None:
        who = {name: self._profile[name] for name in ("handler_id", "instance")}
        self.outgoing.append(request(method, **who, **params))

    def _send(self, finished: Finished, now: float) -> None:
        if self.registered:
            self.outgoing.extend(finished.words)
            self.outgoing.append(finished.body)
            finished.words, finished.sent_at = (), now
            self._resend_at = min(self._resend_at, now + RESEND_S)

    def _resend(self, now: float) -> None:
        self._resend_at = now + RESEND_S if self.finished else NEVER
        for finished in self.finished.values():
            if finished.sent_at is not None and now >= finished.sent_at + RESEND_S:
                self._send(finished, now)

    def _keep(self, call_id: str, finished: Finished) -> None:
        self.finished[call_id] = finished
        self._finished_bytes += len(finished.body)

    def _drop(self, call_id: str) -> None:
        if finished := self.finished.pop(call_id, None):
            self._finished_bytes -= len(finished.body)
            if self._spool:
                self._spool.remove(call_id)


# --- Workers: threads -------------------------------------------------------------------------


class Wakeup:
    """Wakes the socket thread out of its poll, from any thread and from signals."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()
        for fd in (self.read_fd, self.write_fd):
            os.set_blocking(fd, False)
        self.parked = False  # spares a system call when nobody sleeps

    def notify(self) -> None:
        if self.parked:
            self.parked = False
            with suppress(BlockingIOError):  # a full pipe wakes as well
                os.write(self.write_fd, b"\0")

    def clear(self) -> None:
        with suppress(BlockingIOError):
            os.read(self.read_fd, 4_096)


Work = Callable[[Job], bytes]  # run a job to its result message
Done = Callable[[Job, bytes], None]  # hand the result to the socket thread


class ThreadPool:
    """Runs jobs in daemon threads, each started when the others are busy."""

    def __init__(self, make_work: Callable[[], Work], done: Done) -> None:
        """`make_work` is called once in each thread."""
        self._make_work = make_work
        self._done = done
        self._calls: SimpleQueue[Job] = SimpleQueue()
        self._idle: deque[None] = deque()  # one for each thread without a job

    def start(self, job: Job) -> None:
        if self._idle:
            self._idle.pop()
        else:
            threading.Thread(target=self._run, daemon=True).start()
        self._calls.put(job)

    def _run(self) -> None:
        work = self._make_work()
        while True:
            job = self._calls.get()
            body = work(job)
            self._idle.append(None)
            self._done(job, body)


# --- Workers: processes -----------------------------------------------------------------------
#
# A nursery, forked before there are threads and sockets, forks the workers: a clean parent, and
# the only one that kills and waits. Each worker thread of the pool talks to a worker process of
# its own over a Link.

_ORDER: Final = struct.Struct("!i")  # to the nursery: 0 or whom to kill; back: pid, status, -errno


class Link:
    """One end of a socket pair: lines of a kind and a body of JSON, which holds no line end.

    Kinds: C call, X cancel (a call id and the reason), L log and progress, R result.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._rest = b""
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)
        self.close = end.close

    def send(self, kind: bytes, body: bytes) -> None:
        self._socket.sendall(kind + body + b"\n")

    def is_quiet(self, wait_s: float | None = 0) -> bool:
        """Whether nothing can be read, not even its end, for `wait_s` seconds (None: ever)."""
        return not self._poll.poll(None if wait_s is None else wait_s * 1_000)

    def receive(self, wait_s: float | None) -> list[tuple[bytes, bytes]]:
        """The kinds and bodies that came. OSError if the other end is gone."""
        if self.is_quiet(wait_s):
            return []
        data = self._socket.recv(1 << 18)
        if not data:
            raise OSError("the other end is gone")
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [(line[:1], line[1:]) for line in lines]


def fork(child: Callable[[], None]) -> int:
    """Fork a process that calls `child` and ends; return its pid. OSError if there can be none."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except Exception:
            log.exception("a process for workers failed")
        finally:
            os._exit(EXIT_ABANDONED)
    return pid


class Nursery:
    """Forks, kills and reaps worker processes on behalf of the process that opened it."""

    def __init__(self, work: Work) -> None:
        """Fork the nursery. The calling process must have no threads yet."""
        import socket  # half a megabyte that only process workers need

        self._net = socket
        self._work = work
        self._asking = threading.Lock()
        sys.stdout.flush()
        self._link, theirs = socket.socketpair()
        self._link.settimeout(5.0)
        self._pid = fork(lambda: self._serve(theirs))
        theirs.close()

    def fork(self) -> tuple[int, Link]:
        """A new worker: its pid and the link to it. OSError if there can be none."""
        ours, theirs = self._net.socketpair()
        ours.settimeout(GRACE_S)
        with theirs:
            pid = self.order(0, theirs.fileno())
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return pid, Link(ours)

    def order(self, pid: int, *descriptors: int) -> int:
        """Kill a worker with all it started: its wait status. Or, if 0, fork one: pid or -errno.

        OSError if the nursery does not answer.
        """
        with self._asking:
            self._net.send_fds(self._link, [_ORDER.pack(pid)], descriptors)
            answer = self._link.recv(_ORDER.size, self._net.MSG_WAITALL)
        if len(answer) < _ORDER.size:
            raise OSError("the nursery is dead")
        return int(_ORDER.unpack(answer)[0])

    def close(self) -> None:
        """End every worker and the nursery."""
        self._link.close()
        os.waitpid(self._pid, 0)

    def _serve(self, link: socket.socket) -> None:
        """In the nursery: obey until the parent closes the link or dies."""
        self._link.close()
        for signum in (signal.SIGTERM, signal.SIGINT):  # the parent gets them too and decides
            signal.signal(signum, signal.SIG_IGN)
        children: set[int] = set()
        while True:
            order, descriptors, _, _ = self._net.recv_fds(link, _ORDER.size, 1)
            if len(order) < _ORDER.size:
                break
            pid = int(_ORDER.unpack(order)[0])
            if pid:
                children.discard(pid)
                answer = end_group(pid)
            elif (answer := self._bear(link, descriptors[0])) > 0:
                children.add(answer)
            link.sendall(_ORDER.pack(answer))
        for pid in children:
            end_group(pid)

    def _bear(self, link: socket.socket, descriptor: int) -> int:
        """Fork a worker that talks over `descriptor`: its pid, or -errno."""

        def live() -> None:
            link.close()
            WorkerProcess(Link(theirs), self._work).run()

        with self._net.socket(fileno=descriptor) as theirs:
            try:
                pid = fork(live)
            except OSError as error:
                return -(error.errno or errno.EAGAIN)
        with suppress(OSError):
            os.setpgid(pid, pid)  # here as well as in the child: whoever is first
        return pid


def end_group(pid: int) -> int:
    """Kill the process group of a child; return the child's wait status, 0 if it is stuck."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    for _ in range(200):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    return 0


class WorkerProcess:
    """In a worker: runs one job after the other, while a thread keeps talking to the parent."""

    def __init__(self, link: Link, work: Work) -> None:
        self._link = link
        self._work = work
        self._calls: SimpleQueue[Job] = SimpleQueue()
        self._job: Job | None = None
        self._sending = threading.Lock()

    def run(self) -> None:
        os.setpgid(0, 0)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        threading.Thread(target=self._converse, daemon=True).start()
        while True:
            job = self._calls.get()
            body = self._work(job)
            with suppress(OSError):
                sys.stdout.flush()
            self._report(job, body)

    def _converse(self) -> None:
        """Talk to the parent; when that ends, in whatever way, so does this process."""
        try:
            while True:
                job = self._job
                for kind, body in self._link.receive(FLUSH_S if job else None):
                    self._obey(kind, json.loads(body))
                if job:
                    self._report(job)
        except OSError as error:
            log.debug("the handler is gone: %s", error)
        finally:
            os._exit(EXIT_OK)

    def _obey(self, kind: bytes, message: dict[str, Any]) -> None:
        if kind == b"C":
            self._job = Job(message)
            self._calls.put(self._job)
        elif (job := self._job) and job.id in message:  # else it is about an earlier job
            job.cancel(message[job.id], time.monotonic())

    def _report(self, job: Job, result: bytes | None = None) -> None:
        with self._sending:
            if job is not self._job:
                return  # what its threads still say is for nobody
            batch = job.outbox.take(time.monotonic(), last=result is not None)
            if batch:
                self._link.send(b"L", encode(batch._asdict(), "replace"))
            if result is not None:
                self._job = None
                self._link.send(b"R", result)


class Worker:
    """Work done in a process of its own, started when there is a job; called by one thread."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._pid = 0
        self._link: Link | None = None

    def __call__(self, job: Job) -> bytes:
        try:
            if self._link and not self._link.is_quiet():  # between jobs only its end can be read
                log.warning("an idle worker process died: %s", self._bury())
            if self._link is None:
                self._pid, self._link = self._nursery.fork()
            result = self._run(job, self._link)
            if result:
                return result
            end = self._bury()
        except OSError as error:
            return failure(job.id, f"no worker process: {error}", error_type="WorkerDied")
        if job.cancelled:
            sentence = f"stopped: {job.reason}; killed as it did not stop within {GRACE_S:g} s"
            return failure(job.id, sentence, cancelled=True)
        sentence = f"the worker process died while it ran {job.method}: {end}"
        return failure(job.id, sentence, error_type="WorkerDied")

    def _run(self, job: Job, link: Link) -> bytes | None:
        """Run a job to its result; None if the process died or did not stop in time."""

        def pass_on() -> None:
            with suppress(OSError):  # a dead process has stopped already
                link.send(b"X", encode({job.id: job.reason}, "replace"))

        try:
            link.send(b"C", json.dumps(job.call).encode())
            job.on_cancel(pass_on)
            while time.monotonic() < job.cancelled_at + GRACE_S:
                for kind, body in link.receive(0.5):
                    if kind == b"R":
                        return body
                    job.outbox.merge(Batch(**json.loads(body)))
        except OSError as error:
            log.debug("worker process %d: %s", self._pid, error)
        return None

    def _bury(self) -> str:
        """Kill the process and all it started; say how it ended."""
        assert self._link is not None
        self._link.close()
        self._link = None
        return describe_exit(os.waitstatus_to_exitcode(self._nursery.order(self._pid)))


# --- Dealer: the socket thread ----------------------------------------------------------------

NO_WAIT: Final = int(zmq.NOBLOCK)  # as plain numbers: each use of zmq's enums costs up to 0.7 µs
SEND_MORE: Final = int(zmq.SNDMORE | zmq.NOBLOCK)
HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


SOCKET_OPTIONS: Final[Mapping[int, int]] = {
    zmq.LINGER: 0,
    zmq.IMMEDIATE: 1,  # queue nothing for a server that is not there
    zmq.PROBE_ROUTER: 1,  # so that the server notices a reconnection and says hello
    zmq.MAXMSGSIZE: MAX_MESSAGE_BYTES,
    zmq.RECONNECT_IVL: 100,
    zmq.RECONNECT_IVL_MAX: 1_000,
    zmq.CONNECT_TIMEOUT: 5_000,
    zmq.HANDSHAKE_IVL: 5_000,
    zmq.TCP_KEEPALIVE: 1,
}


def open_lifeline() -> int | None:
    """The read end of the governor's pipe, hidden from the programs that jobs start."""
    try:
        fd = int(os.environ.pop("SCHEDULEZERO_LIFELINE_FD", ""))
        os.set_inheritable(fd, False)
    except (ValueError, OSError):
        return None
    return fd


class Dealer:
    """Owns the DEALER socket and the loop that connects it with the session and the workers."""

    def __init__(self, options: Options, session: Session, make_work: Callable[[], Work]) -> None:
        self._options = options
        self._session = session
        self._pool = ThreadPool(make_work, self._done)
        self._results: deque[tuple[Job, bytes]] = deque()
        self._wakeup = Wakeup()
        self._poll = select.poll()
        self._poll.register(self._wakeup.read_fd, select.POLLIN)
        self._lifeline = open_lifeline()  # end of file on it: the governor is gone
        if self._lifeline is not None:
            self._poll.register(self._lifeline, select.POLLIN)
        self._context = zmq.Context()
        self._socket: Any = None
        self._monitor: Any = None  # tells of handshakes that failed
        self._flaw = ""  # the last one
        self._open_at = 0.0
        self._backoff_s = BACKOFF_S[0]
        self._drain_s = options.drain_s
        self._drain_until = NEVER
        self._stop_signals = 0
        self._malformed = 0
        try:
            self._open(time.monotonic())
        except zmq.ZMQError as error:
            raise ConfigError(f"the server's address {options.server!r}: {error}") from None

    def run(self) -> int:
        """Serve until drained; return the exit code. SIGTERM and SIGINT are ours meanwhile."""
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {each: signal.signal(each, self._on_signal) for each in signals}
        signal.set_wakeup_fd(self._wakeup.write_fd, warn_on_full_buffer=False)
        try:
            self._serve()
            return self._close()
        finally:
            signal.set_wakeup_fd(-1)
            for each, handler in before.items():
                signal.signal(each, handler)

    def _on_signal(self, signum: int, frame: object) -> None:
        """The first asks for a drain, the second ends the process."""
        self._stop_signals += 1
        if self._stop_signals > 1:
            os._exit(128 + signum)

    def _done(self, job: Job, body: bytes) -> None:
        """Hand over a result; called by workers."""
        self._results.append((job, body))
        self._wakeup.notify()

    def _serve(self) -> None:
        tick_at = 0.0
        while True:
            busy = self._receive()
            busy |= self._collect()
            now = time.monotonic()
            if not busy or now >= tick_at:
                due_at = self._tick(now)
                tick_at = now + 0.1
                if now >= self._drain_until or (self._session.draining and self._session.is_done()):
                    return
            busy |= self._flush()
            if not busy:
                self._park(due_at)

    def _tick(self, now: float) -> float:
        """Do what is due; return when to come back at the latest."""
        if self._stop_signals and not self._session.draining:
            self._begin_drain("told to stop", now, self._drain_s)
        if self._socket is None:
            if now >= self._open_at:
                self._open(now)
        elif self._session.is_silent(now):
            self._abandon(now)
        last_call = self._drain_until - min(LAST_CALL_S, self._drain_s / 2)
        if now >= last_call:
            for job in self._session.running.values():
                job.cancel("stopping", now)
            last_call = self._drain_until
        open_at = self._open_at if self._socket is None else NEVER
        return min(self._session.tick(now), last_call, open_at)

    def _begin_drain(self, why: str, now: float, seconds: float) -> None:
        running = len(self._session.running)
        log.info("%s: %d jobs may finish within %g s", why, running, seconds)
        self._drain_s = seconds
        self._drain_until = min(self._drain_until, now + seconds)
        self._session.drain()

    def _close(self) -> int:
        """Say goodbye; return the exit code."""
        session = self._session
        session.report("offline")
        self._flush()
        if self._socket is not None:
            self._monitor.close()
            self._socket.close(linger=500)
        self._context.term()
        if session.is_done():
            return EXIT_OK
        running, results = len(session.running), len(session.finished)
        log.error("gave up on %d running jobs and %d undelivered results", running, results)
        return EXIT_ABANDONED

    # The socket.

    def _open(self, now: float) -> None:
        self._socket = dealer = self._context.socket(zmq.DEALER)
        for option, value in SOCKET_OPTIONS.items():
            dealer.setsockopt(option, value)
        if join := self._options.join:
            secret = join.secret_key.encode()
            dealer.curve_serverkey = join.server_key.encode()
            dealer.curve_secretkey, dealer.curve_publickey = secret, zmq.curve_public(secret)
        self._monitor = dealer.get_monitor_socket(HANDSHAKE_FAILED)
        dealer.connect(self._options.server)
        for socket in (self._monitor, self._socket):
            self._poll.register(socket.getsockopt(zmq.FD), select.POLLIN)
        self._session.opened(now)

    def _abandon(self, now: float) -> None:
        """Close a connection on which nothing is heard, to try another one later."""
        if self._session.registered:
            log.warning("nothing heard from %s for %g s", self._options.server, LIVENESS_S)
            self._backoff_s = BACKOFF_S[0]
        for socket in (self._monitor, self._socket):
            self._poll.unregister(socket.getsockopt(zmq.FD))
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._socket = None
        self._session.closed()
        self._open_at = now + self._backoff_s * (0.5 + os.urandom(1)[0] / 256)
        self._backoff_s = min(BACKOFF_S[1], self._backoff_s * 2)

    def _explain(self) -> None:
        """Log, once, why no connection comes about; ZeroMQ itself does not try again."""
        try:
            event, _ = struct.unpack("=hi", self._monitor.recv_multipart(NO_WAIT)[0])
        except zmq.Again:
            return
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            flaw = "it does not know this handler's key, or has revoked it"
        elif self._options.join:
            flaw = "it is not the server that the join string is for"
        else:
            flaw = "it wants an encrypted link: use --join"
        if flaw != self._flaw and (self._options.join or self._backoff_s > BACKOFF_S[0]):
            self._flaw = flaw  # without a join string the first one may just be a server's end
            log.error("%s refuses the connection: %s", self._options.server, flaw)
        self._session.closed()
        self._abandon(time.monotonic())

    def _receive(self) -> bool:
        """Take messages, at most a hundred, so that results get their turn."""
        if self._socket is None:
            return False
        for taken in range(100):
            try:
                frames = self._socket.recv_multipart(NO_WAIT)
            except zmq.Again:
                return taken > 0
            self._take(frames)
        return True

    def _take(self, frames: Sequence[bytes]) -> None:
        try:
            if len(frames) != 2 or frames[0]:
                raise ProtocolError("not an empty frame and a body")
            job = self._session.receive(decode(frames[1]), time.monotonic())
        except ProtocolError as error:
            self._malformed += 1
            if self._malformed & (self._malformed - 1) == 0:  # the 1st, 2nd, 4th, 8th …
                log.warning("dropped malformed message %d: %s", self._malformed, error)
            return
        if job:
            job.outbox.notify = self._wakeup.notify
            self._pool.start(job)

    def _collect(self) -> bool:
        """Take what the workers finished."""
        if not self._results:
            return False
        now = time.monotonic()
        while self._results:
            job, body = self._results.popleft()
            self._session.finish(job, body, now)
        return True

    def _flush(self) -> bool:
        """Send what there is. What cannot go now is lost: the session sends again what counts."""
        outgoing, socket = self._session.outgoing, self._socket
        if not outgoing:
            return False
        try:
            while outgoing and socket is not None:
                socket.send(b"", SEND_MORE)
                socket.send(outgoing.popleft(), NO_WAIT)
        except zmq.Again:
            pass
        outgoing.clear()
        return True

    def _park(self, due_at: float) -> None:
        """Sleep until something happens or is due.

        Only after a look that found nothing to read and no send since: the socket's descriptor
        signals edges, and a send may take one away.
        """
        self._wakeup.parked = True
        if not self._results:
            for fd, _ in self._poll.poll(min(60.0, max(0.0, due_at - time.monotonic())) * 1_000):
                if fd == self._wakeup.read_fd:
                    self._wakeup.clear()
                elif fd == self._lifeline:
                    self._governor_died(fd)
                elif self._socket is not None:
                    self._explain()
        self._wakeup.parked = False

    def _governor_died(self, fd: int) -> None:
        if os.read(fd, 1) == b"":
            self._poll.unregister(fd)
            self._lifeline = None
            seconds = min(self._drain_s, ORPHAN_DRAIN_S)
            self._begin_drain("the governor is gone", time.monotonic(), seconds)


# --- Command line -----------------------------------------------------------------------------


def serve(target: str, *, handler_id: str, server: str, options: Options) -> int:
    """Serve "path/to/file.py:Class" in a freshly forked child until drained; the exit code."""
    options = options._replace(handler_id=handler_id, server=server)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # what jobs start is waited for
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # and must not inherit blocked signals
    try:
        return serve_handler(load_target(target), options)
    except ConfigError as error:
        sys.stderr.write(f"{handler_id}: {error}\n")
        return EXIT_CONFIG


def load_target(target: str) -> type[Handler] | Handler:
    """The class or instance named by "path/to/file.py:Name", or by "Name" for one of this file."""
    path, _, name = target.rpartition(":")
    here = sys.modules[__name__]
    path = os.path.abspath(path) if path else __file__
    module = here
    same = os.path.realpath(path) == os.path.realpath(__file__)
    if not same and (os.path.exists(path) or os.path.basename(path) != "handler.py"):
        sys.modules.setdefault("handler", here)  # what the file means by `from handler import …`
        module = load_module(path)
    found: type[Handler] | Handler | None = getattr(module, name, None)
    if found is not None and is_handler(found):
        return found
    names = [each for each, value in vars(module).items() if is_handler(value)]
    raise ConfigError(f"{path} has no handler {name!r}; it has: {', '.join(names) or 'none'}")


def is_handler(value: Any) -> bool:
    if isinstance(value, type):
        return issubclass(value, Handler) and value is not Handler
    return isinstance(value, Handler)


def load_module(path: str) -> ModuleType:
    """Import a file by its path; ConfigError says what went wrong where."""
    import importlib.util

    name = os.path.basename(path).removesuffix(".py")
    if name in sys.modules:
        name = f"handler_file_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise ConfigError(f"{path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.path.dirname(path))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        raise ConfigError(f"{path} cannot be imported: {what}") from None
    return module


def build(subject: type[Handler] | Handler, options: Options) -> Handler:
    """The instance to serve, made with the configuration as keyword arguments."""
    handler = subject
    if isinstance(handler, type):
        construct = MethodType(handler.__init__, handler)
        try:
            describe_method(handler.__name__, construct).check(options.config)
            handler = handler(**options.config)
        except (BadParameters, ValueError, TypeError) as error:
            raise ConfigError(f"configuration: {error}") from None
    if options.handler_id:
        handler.handler_id = options.handler_id
    return handler


def serve_handler(subject: type[Handler] | Handler, options: Options) -> int:
    configure_logging(options.log_level)
    handler = build(subject, options)
    handler_id = id_of(handler)
    methods = methods_of(handler)
    if not 1 <= len(methods) <= MAX_METHODS:
        name = type(handler).__name__
        raise ConfigError(f"{name} has {len(methods)} public methods, not 1 to {MAX_METHODS}")
    concurrency = handler.concurrency if options.concurrency is None else options.concurrency
    if not 1 <= concurrency <= MAX_CONCURRENCY:
        raise ConfigError(f"concurrency {concurrency} is not from 1 to {MAX_CONCURRENCY}")
    directory = options.spool or handler.spool
    spool = Spool(os.path.join(directory, handler_id)) if directory else None
    profile: dict[str, Any] = {
        **({"secret": options.secret} if options.secret else {}),
        "handler_id": handler_id,
        "methods": [method.describe() for method in methods.values()],
        "instance": os.urandom(8).hex(),
        "concurrency": concurrency,
        "pid": os.getpid(),
        "hostname": os.uname().nodename,
        "library": f"handler.py {__version__}",
    }
    size, most = len(request("register", **profile)), MAX_MESSAGE_BYTES - MAX_FINISHED_BYTES
    if size > most:
        raise ConfigError(f"what {handler_id} tells of its methods takes {size} bytes, not {most}")

    def work(job: Job) -> bytes:
        body = perform(job, methods)
        if spool:
            body = name_runner(body, profile["instance"])
            spool.save(job.id, body)
        return body

    with captured():
        nursery = Nursery(work) if options.processes or handler.processes else None
        try:
            make_work = partial(Worker, nursery) if nursery else lambda: work
            dealer = Dealer(options, Session(profile, spool), make_work)
            log.info("%s calls %s: %s", handler_id, options.server, ", ".join(methods))
            return dealer.run()
        finally:
            if nursery:
                nursery.close()


def configure_logging(level: str) -> None:
    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ConfigError(f"log level {level!r} is none of DEBUG INFO WARNING ERROR CRITICAL")
    line = "%(asctime)s %(levelname)s %(filename)s:%(lineno)d:%(funcName)s %(message)s"
    logging.basicConfig(format=line)  # does nothing where the governor or the user has done it
    logging.getLogger().setLevel(level.upper())
    for handler in logging.getLogger().handlers:
        handler.addFilter(may_echo)


def parse_arguments(argv: Sequence[str] | None, subject: Any) -> tuple[str, Options]:
    """The target's name (empty if `subject` is given) and the options; exits 2 on a usage error."""
    import argparse

    environ = os.environ
    parser = argparse.ArgumentParser(description="Serve a handler's methods to ScheduleZero.")
    add = parser.add_argument
    if subject is None:
        names = ", ".join(name for name, value in globals().items() if is_handler(value))
        add("target", metavar="CLASS", help=f"{names}, or path/to/file.py:Class")
    add("--server", help=f"tcp://host:port (default: the join string's, else {DEFAULT_SERVER})")
    join = environ.pop("SCHEDULEZERO_JOIN", "")  # what jobs start must not inherit it
    about = "what `schedulezero.py handler-key create` printed, or @FILE that holds it"
    add("--join", metavar="STRING", default=join, help=f"{about} (also $SCHEDULEZERO_JOIN)")
    add("--id", metavar="ID", dest="handler_id", help="default: the class name in kebab case")
    add("--concurrency", metavar="N", type=int, help="jobs at the same time")
    about = "run jobs in processes; stuck ones are killed when cancelled"
    add("--processes", action="store_true", help=about)
    add("--spool", metavar="DIR", help="keep undelivered results there")
    about = "how long SIGTERM waits for running jobs (default: %(default)g)"
    add("--drain", metavar="SECONDS", dest="drain_s", type=float, default=DRAIN_S, help=about)
    add("--log-level", default=environ.get("SCHEDULEZERO_LOG_LEVEL", "INFO"))
    config = environ.get("SCHEDULEZERO_HANDLER_CONFIG", "{}")
    add("--config", metavar="JSON", default=config, help="arguments of the class's constructor")
    return complete_options(vars(parser.parse_args(argv)))


def complete_options(given: dict[str, Any]) -> tuple[str, Options]:
    """What `parse_arguments` returns, of the arguments and the environment."""
    join = given["join"] = read_join(given["join"]) if given["join"] else None
    server = join.server if join else os.environ.get("SCHEDULEZERO_SERVER", DEFAULT_SERVER)
    given["server"] = given["server"] or server
    given["handler_id"] = given["handler_id"] or (join.handler_id if join else None)
    try:
        given["config"] = decode(given["config"].encode("utf-8", "replace"))
    except ProtocolError as error:
        raise ConfigError(f"--config is {error}") from None
    secret = os.environ.pop("SCHEDULEZERO_HANDLER_SECRET", None)
    return given.pop("target", ""), Options(secret=secret, **given)


def read_join(text: str) -> Join:
    """What a join string says; `@path` names a file, which nobody else may read, that holds it."""
    from base64 import urlsafe_b64decode

    if text.startswith("@"):
        text = read_private(text[1:])
    body = text.strip().removeprefix("sz1.")
    try:
        parts = json.loads(urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        if body != text.strip() and [type(part) for part in parts] == [str] * len(Join._fields):
            return Join(*parts)
    except (ValueError, TypeError):
        pass
    raise ConfigError("--join is not a join string, or cut off")


def read_private(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise ConfigError(f"others may read {path}: chmod 600 it")
            return file.read(MAX_ERROR_CHARS)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def main(argv: Sequence[str] | None = None, subject: Any = None) -> int:
    """Serve `subject`, or else the handler named on the command line; return the exit code."""
    try:
        target, options = parse_arguments(argv, subject)
        return serve_handler(subject or load_target(target), options)
    except ConfigError as error:
        sys.stderr.write(f"handler.py: {error}\n")
        return EXIT_CONFIG


if __name__ == "__main__":
    sys.exit(main())
