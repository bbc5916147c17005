#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "apscheduler==4.0.0a6",
#   "pyzmq>=24,<28",
#   "pyyaml>=6,<7",
# ]
# ///
"""ScheduleZero: a job scheduler in one file, for machines where a broker is overkill.

Work is done by handlers: small processes that register over ZeroMQ and expose methods. This
program decides when (APScheduler 4), remembers everything (SQLite) and calls who (ZeroMQ), with
retries, history, a dashboard, and a governor that keeps it all alive.

                 fork                       one ROUTER socket (registration and dispatch)
     governor ──┬──────▶ server ◀────────────────────────────────────▶ handlers
     no threads │          │  HTTP, event stream ◀── browser, curl, CLI
     no loop    │          └─ schedulezero.db (WAL, synchronous=FULL)
                └──────▶ handlers named in config.yaml

The life of an execution. A trigger gives a fire time. APScheduler's loop acquires the due
schedule from the store, which has planned its fires, and releases it again: the store inserts
the execution and advances the schedule in one transaction. If the handler has a free slot the
row says `running` from the start, otherwise `queued`. After the commit the dispatcher makes the
call; the handler runs the method and answers; the end is committed, acknowledged to the handler
and published to the browsers. A failed attempt goes back to the queue with a due time.

The words. A *trigger* is a set of *fire times*. A *schedule* joins a trigger to a call: a
*handler*, a *method* and its *job_params*. A fire becomes an *execution*, the durable record of
one call, made in one or more *attempts*. A handler id is served by one or more *instances*. A
*deployment* is one server with its own data, logs and ports.

The file reads top-down: a section names only what stands above it. `grep -n '^# --- '` is its
table of contents.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import threading
from types import MappingProxyType, ModuleType

_loading = threading.RLock()  # re-entered when a module that was put off asks for another


class PutOff(ModuleType):
    """A module of the standard library that loads itself when it is first asked for something."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name != "__all__":  # the import system looks
            raise AttributeError(name)
        with _loading:
            if type(self) is PutOff:  # else another thread was faster
                assert self.__spec__ is not None and self.__spec__.loader is not None
                self.__class__ = HalfLoaded  # type: ignore[assignment]
                try:
                    self.__spec__.loader.exec_module(self)
                except BaseException:
                    self.__class__ = PutOff
                    raise
                self.__class__ = ModuleType  # type: ignore[assignment]
            return getattr(self, name)


class HalfLoaded(ModuleType):
    """The same while it loads: other threads wait, for what is there already does not work yet."""

    def __getattribute__(self, name: str) -> object:
        if name.startswith("__"):
            return ModuleType.__getattribute__(self, name)
        with _loading:
            return ModuleType.__getattribute__(self, name)  # its class is another one by now


# OpenSSL takes 5 MB, for nothing in most servers: asyncio and anyio import it for TLS, the others
# for digests. Where asyncio's module lies is looked up without importing asyncio. What follows
# takes 0.5 MB and is seldom asked; shutil, which argparse needs, tries what Python was built with.
PUT_OFF = (
    *("ssl", "asyncio.sslproto", "hashlib", "hmac", "secrets", "difflib", "getpass"),
    *(name for name in ("bz2", "lzma") if importlib.util.find_spec(f"_{name}")),
)
for _put_off in PUT_OFF:
    _above = importlib.util.find_spec(_put_off.partition(".")[0])
    _path = _above.submodule_search_locations if _above else None
    _spec = importlib.machinery.PathFinder.find_spec(_put_off, _path)
    if _spec is not None and _put_off not in sys.modules:
        sys.modules[_put_off] = importlib.util.module_from_spec(_spec)
        sys.modules[_put_off].__class__ = PutOff
if isinstance(sys.modules["ssl"], PutOff):
    vars(sys.modules["ssl"])["SSLContext"] = None  # newer anyios import it, to annotate

import argparse
import asyncio
import base64
import difflib
import enum
import errno
import fcntl
import gc
import getpass
import hashlib
import hmac
import http
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import queue
import random
import re
import secrets
import select
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import time
import typing
import urllib.parse
import zlib
from abc import abstractmethod
from bisect import bisect_left
from calendar import day_name, monthrange
from collections import Counter, OrderedDict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache, partial
from itertools import groupby, islice
from operator import attrgetter, itemgetter
from typing import (
    IO,
    Any,
    ClassVar,
    Final,
    Generic,
    NamedTuple,
    NoReturn,
    Protocol,
    TextIO,
    TypedDict,
    TypeVar,
    Unpack,
)
from urllib.parse import quote
from uuid import UUID
from zoneinfo import ZoneInfo, available_timezones

try:
    import anyio._backends._asyncio  # noqa: F401 - by the loop's first turn, while SSLContext is there
    import apscheduler
    import apscheduler.abc
    import tzlocal
    import yaml
    import zmq
    import zmq.utils.z85
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"schedulezero: {error}; what to `pip install` stands at the head of {__file__}")

if typing.TYPE_CHECKING:
    import ssl
if isinstance(sys.modules["ssl"], PutOff):
    del sys.modules["ssl"].SSLContext  # whoever asks from now on gets the real one
vars(asyncio)["sslproto"] = sys.modules["asyncio.sslproto"]  # as the import of a submodule does

# --- Constants --------------------------------------------------------------------------------

VERSION: Final = "0.1.0"
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NAIVE_EPOCH: Final = EPOCH.replace(tzinfo=None)  # a time without a zone is written faster
MICROSECOND: Final = timedelta(microseconds=1)

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NOT_RUNNING: Final = 3
EXIT_DIFFERENT: Final = 4  # `import --dry-run`: there is something to change
EXIT_ALREADY_RUNNING: Final = 75  # EX_TEMPFAIL in sysexits.h
EXIT_CONFIG: Final = 78  # EX_CONFIG in sysexits.h; a child that exits so is never restarted
EXIT_RENEW: Final = 79  # beyond those of sysexits.h; a child asks to be started anew at once

MAX_NAME_CHARS: Final = 128  # ids of schedules, handlers and methods
IDENTIFIER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:@-]{0,127}")
IDENTIFIER_RULE: Final = "1 to 128 letters, digits and . _ : @ -, the first a letter, digit or _"
MAX_JSON_BYTES: Final = 1 << 20  # one HTTP body, one ZeroMQ message
MAX_JSON_DEPTH: Final = 64
MAX_LOG_BYTES: Final = 64 << 10  # the log kept of one execution: its head and its tail
MAX_ERROR_CHARS: Final = 8_192
MAX_COALESCE_ALL: Final = 100  # catch-up runs of one schedule with `coalesce: all`
MIN_INTERVAL_S: Final = 1
MAX_INTERVAL_S: Final = 10 * 366 * 86_400
LAST_YEAR: Final = 2100  # no trigger fires after it
CALENDAR_GRACE_S: Final = 86_400  # a cron or date fire runs late by at most this
INTERVAL_GRACE_S: Final = (5, 60)  # an interval fire: its own length, within these bounds
HEARTBEAT_S: Final = 2.0
LIVENESS: Final = 5  # heartbeats missed in a row before an instance counts as gone
DRAIN_S: Final = 30.0  # what SIGTERM grants to finish


# --- Errors -----------------------------------------------------------------------------------


KeyPath = tuple[str, ...]  # through mappings, and with numbers through lists


class ScheduleZeroError(Exception):
    """Base of every failure with a sentence for the user; `code` is its snake_case name."""

    code = "failed"
    field: str | None = None  # dotted path of the value it is about: `trigger_config.hour`


class ConfigError(ScheduleZeroError):
    """The configuration is wrong; the sentence names key, line, value and what is allowed."""

    code = "bad_configuration"


class InvalidField(ScheduleZeroError):
    """A value from outside is refused; `field` says which, and `path` key by key."""

    code = "invalid_field"
    field: str

    def __init__(self, at: str | KeyPath, sentence: str) -> None:
        super().__init__(sentence)
        self.path = tuple(at.split(".")) if isinstance(at, str) else at
        self.field = ".".join(self.path)


class TriggerError(InvalidField):
    """A `trigger_config` that is malformed, out of bounds or can never fire."""

    code = "invalid_trigger"


class NotFound(ScheduleZeroError):
    code = "not_found"


class UnknownHandler(NotFound):
    field = "handler_id"


class Conflict(ScheduleZeroError):
    code = "conflict"


class IdTaken(Conflict):
    field = "schedule_id"


class Overtaken(Conflict):
    """Another change came first and nothing was stored; to be tried again from how it is now."""

    def __init__(self, sentence: str = "others keep changing the same; try again") -> None:
        super().__init__(sentence)


class StoreUnavailable(ScheduleZeroError):
    """The database cannot take a change now; nothing of the change was stored."""

    code = "store_unavailable"


class Overloaded(ScheduleZeroError):
    """A bound was reached; trying again later may work."""

    code = "overloaded"


# --- Values -----------------------------------------------------------------------------------


class Clock:
    """Real time. The only reader of the system's clocks; tests pass their own."""

    def now(self) -> datetime:
        """Wall clock, aware, UTC."""
        return datetime.now(UTC)

    def now_us(self) -> int:
        """Wall clock in microseconds since 1970."""
        return time.time_ns() // 1_000

    def monotonic(self) -> float:
        """Seconds that never step; for durations and liveness."""
        return time.monotonic()


def is_identifier(text: str) -> bool:
    """Whether a text may be the id of a schedule, a handler or a method."""
    return IDENTIFIER.fullmatch(text) is not None


def us_of(at: datetime) -> int:
    """Database time of an aware datetime: whole microseconds since 1970 UTC."""
    return (at - EPOCH) // MICROSECOND


def at_of(us: int) -> datetime:
    """The aware UTC datetime of a database time."""
    return EPOCH + timedelta(0, us // 1_000_000, us % 1_000_000)  # without keywords: half the time


def iso_of(us: int | None) -> str | None:
    """ISO 8601 in UTC with `Z`, as every time in the API is written."""
    if us is None:
        return None
    at = _NAIVE_EPOCH + timedelta(0, us // 1_000_000, us % 1_000_000)
    return at.isoformat() + "Z"


class Status(enum.StrEnum):
    """Where an execution stands. Everything but QUEUED and RUNNING is final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCESS = "success"
    ERROR = "error"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    MISSED = "missed"
    SKIPPED = "skipped"
    LOST = "lost"


TERMINAL: Final = frozenset(Status) - {Status.QUEUED, Status.RUNNING}


class Overlap(enum.StrEnum):
    """What a fire does while an earlier execution of its schedule is not final."""

    SKIP = "skip"
    QUEUE = "queue"
    ALLOW = "allow"
    REPLACE = "replace"


class Coalesce(enum.StrEnum):
    """What becomes of several fire times that are due at once, as after downtime."""

    LATEST = "latest"
    NONE = "none"
    ALL = "all"


class Reason(enum.StrEnum):
    """Why a fire did not run as planned."""

    DOWN = "down"
    CLOCK_STEP = "clock_step"
    TOO_LATE = "too_late"
    OVERLAP = "overlap"
    HANDLER_OFFLINE = "handler_offline"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how soon a failed attempt is repeated. Delays in seconds."""

    max_attempts: int = 3
    base_delay: float = 1.0
    factor: float = 2.0
    max_delay: float = 60.0
    jitter: float = 0.5

    def delay_s(self, failed_attempts: int, chance: float) -> float:
        """Seconds to wait after the nth failure, n ≥ 1; `chance` in [0, 1) sets the jitter."""
        plain = min(self.max_delay, self.base_delay * self.factor ** min(failed_attempts - 1, 64))
        return plain * (1 + self.jitter * (2 * chance - 1))


@dataclass(frozen=True, slots=True)
class Schedule:
    """A durable plan: which method of which handler is called at which times."""

    schedule_id: str
    handler_id: str
    method_name: str
    job_params: Mapping[str, Any]
    trigger_config: Mapping[str, Any]  # as the user gave it, with the time zone resolved
    trigger_state: Mapping[str, Any]  # what load_trigger reads
    name: str | None = None
    timeout: float | None = None  # seconds; None: the configuration's
    retry: RetryPolicy | None = None  # None: the configuration's
    coalesce: Coalesce = Coalesce.LATEST
    overlap: Overlap = Overlap.SKIP
    misfire_grace_time: float | None = None  # seconds; None: the trigger's default
    max_jitter: float = 0.0  # seconds
    paused: bool = False
    origin: str = "api"  # "api" or "config"
    created_us: int = 0
    updated_us: int = 0
    next_fire_us: int | None = None  # None: exhausted
    last_fire_us: int | None = None
    generation: int = 0  # grows with every change; fires and edits compare it
    quarantined: str | None = None  # why its trigger cannot be used, if it cannot
    key: int | None = None  # the store's number of it; a schedule made anew gets another

    @property
    def is_damaged(self) -> bool:
        """Whether its row could not be read; `quarantined` says why."""
        return not self.trigger_config


class Execution(NamedTuple):
    """The durable record of one call of a handler's method, through all its attempts.

    A tuple: a frozen dataclass of 25 fields takes 9 µs to replace, and each run replaces three.
    """

    execution_id: str
    schedule_id: str | None
    handler_id: str
    method_name: str
    job_params: Mapping[str, Any]
    status: Status
    created_us: int
    due_us: int  # not to be started before (jitter, retry)
    deadline_us: int | None  # not to be started for the first time after
    started_us: int | None = None
    completed_us: int | None = None
    duration_us: int | None = None  # of the last attempt, by the monotonic clock
    attempt: int = 0  # attempts begun
    retry: RetryPolicy = RetryPolicy()
    timeout: float = 3600.0
    overlap: Overlap = Overlap.ALLOW
    instance: str | None = None  # which instance runs it
    result: Any = None
    error: str | None = None
    reason: str | None = None
    coalesced: int = 0  # further fire times this row stands for
    coalesced_from_us: int | None = None  # the earliest of them
    cancelling: str | None = None  # why it is to be cancelled, if it is
    fire_us: int | None = None  # the nominal fire time; None: run by a call
    schedule_key: int | None = None  # which schedule of that id, should it be made anew

    def changed(self, **values: Any) -> Execution:
        """As _replace, in half its time."""
        row = list(self)
        for name, value in values.items():
            row[EXECUTION_PLACES[name]] = value
        return Execution._make(row)

    @property
    def scheduled_us(self) -> int:
        """The nominal fire time; for run-now the time of the call."""
        return self.created_us if self.fire_us is None else self.fire_us

    @property
    def is_final(self) -> bool:
        return self.completed_us is not None


EXECUTION_PLACES: Final[Mapping[str, int]] = {
    name: place for place, name in enumerate(Execution._fields)
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One ended try of an execution."""

    attempt: int
    instance: str | None
    started_us: int
    ended_us: int | None
    outcome: str  # a terminal Status, or "late"
    error: str | None = None
    traceback: str | None = None


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method a handler offers. `parameters`: mappings with name, type, default, required."""

    name: str
    doc: str = ""
    parameters: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """One connected (or lately gone) process that serves a handler id."""

    instance: str
    address: str  # tcp://host:port of a plain handler, "dial-in" otherwise
    status: str  # Connected, Draining or Disconnected
    concurrency: int
    running: int
    registered_us: int
    last_seen_us: int
    clock_skew_s: float | None = None
    pid: int | None = None
    hostname: str | None = None


class Role(enum.StrEnum):
    """Who may call a route; each includes those before it."""

    ANYONE = "anyone"  # without logging in
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def includes(self, role: Role) -> bool:
        return ROLE_RANKS[self] >= ROLE_RANKS[role]


ROLE_RANKS: Final = MappingProxyType({role: rank for rank, role in enumerate(Role)})


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who asked for what, when and from where."""

    at_us: int
    actor: str  # the name of a token, "loopback" without login, "" for nobody
    address: str  # of the client
    action: str  # the operation, as the description of the API names it
    target: str  # what it was asked of: the path
    status: int | None = None  # of an answer that refuses; None: accepted
    number: int = 0  # given by the store; grows


@dataclass(frozen=True, slots=True)
class HandlerInfo:
    """All instances of one handler id, as the API shows them."""

    handler_id: str
    address: str
    status: str  # Connected if any instance is
    methods: tuple[MethodInfo, ...]
    instances: tuple[InstanceInfo, ...]
    running: int
    queued: int
    last_seen_us: int


# --- JSON -------------------------------------------------------------------------------------
#
# RFC 8259, and of what it leaves open only what every reader understands alike.


class BadJson(ScheduleZeroError):
    """A text that is not the strict JSON accepted here."""

    code = "bad_json"


JSON_VALUE_BYTES: Final = 64  # an empty dict, or a number with its place in a list
_BRACKETS: Final = re.compile(r"[^\[\]{}]+")
_JSON_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_SURROGATE_ESCAPE: Final = re.compile(r"\\u[dD][89a-fA-F]")


def decode_json(body: bytes) -> Any:
    """Decode UTF-8 JSON.

    Raises BadJson for everything that two readers could understand differently: another encoding,
    duplicate keys, NaN, numbers beyond 64 bits, lone surrogates, deep nesting.
    """
    try:
        text = body.decode()
        if text.count("[") + text.count("{") > MAX_JSON_DEPTH and _is_too_deep(text):
            raise BadJson(f"the JSON is nested deeper than {MAX_JSON_DEPTH} levels")
        value = _JSON_DECODER.decode(text)
        if _SURROGATE_ESCAPE.search(text):
            dump_json(value).encode()
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise BadJson(f"not JSON: {error.msg} at {where}") from None
    except UnicodeDecodeError as error:
        raise BadJson(f"the JSON is not UTF-8: bad byte at position {error.start}") from None
    except UnicodeEncodeError:
        raise BadJson("a string in the JSON holds half of a surrogate pair") from None
    return value


def dump_json(value: Any) -> str:
    """Encode compactly. Raises ValueError for NaN, TypeError for what JSON cannot say."""
    return "".join(_JSON_ENCODE(value, 0))


def encode_json(value: Any) -> bytes:
    """Encode compactly, as UTF-8."""
    # Lone surrogates from elsewhere become JSON escapes: one bad string must not hide a list.
    return dump_json(value).encode(errors="backslashreplace")


def weight_of_json(text: str) -> int:
    """The bytes that a JSON text's value takes in memory, roughly: up to thirty times the text."""
    return len(text) + JSON_VALUE_BYTES * (text.count(",") + text.count("[") + text.count("{"))


def _is_too_deep(text: str) -> bool:
    """Whether brackets outside strings nest beyond the bound; unbalanced counts as too deep."""
    brackets = _BRACKETS.sub("", _JSON_STRING.sub("", text))
    for _ in range(MAX_JSON_DEPTH):
        if not brackets:
            break
        brackets = brackets.replace("[]", "").replace("{}", "")
    return bool(brackets)


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadJson(f"the key {twice[:80]!r} is given twice in one JSON object")
    return members


def _read_integer(digits: str) -> int:
    # 20 characters hold every 64-bit integer; longer ones would also cost quadratic time.
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**63:
        raise BadJson(f"the number {digits[:30]} does not fit into 64 bits")
    return number


def _read_float(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise BadJson(f"the number {digits[:30]} is too large")
    return number


def _refuse_constant(name: str) -> Any:
    raise BadJson(f"{name} is not JSON")


_JSON_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_read_object,
    parse_int=_read_integer,
    parse_float=_read_float,
    parse_constant=_refuse_constant,
)
# JSONEncoder.encode makes this anew for every call, which takes longer than to encode a message.
# In order: markers, default (read-only mappings), encoder of strings, indent, key separator, item
# separator, sort_keys, skipkeys, allow_nan.
_JSON_ENCODE: Final[Callable[[Any, int], Iterable[str]]] = json.encoder.c_make_encoder(  # type: ignore[attr-defined]
    None, dict, json.encoder.encode_basestring, None, ":", ",", False, False, False
)


# --- Fields -----------------------------------------------------------------------------------
#
# What values from outside may be: in the configuration, in files of schedules, in requests.

MASK: Final = "***"
MAX_TITLE_CHARS: Final = 200
MAX_PARAMS_BYTES: Final = MAX_JSON_BYTES - (8 << 10)  # what a call adds to them must fit as well
MAX_RUN_S: Final = 30 * 86_400
MAX_GRACE_S: Final = 10 * 366 * 86_400
TRIGGER_TYPES: Final = ("date", "interval", "cron", "calendar_interval", "and", "or")

_SECRET: Final = re.compile(r"secret|token|passw|credential|key", re.IGNORECASE)
_NUMBER: Final = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?")

Schema = Mapping[str, Any]


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a word close to a known one, else nothing."""
    close = difflib.get_close_matches(word[:MAX_NAME_CHARS], list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def render_value(path: KeyPath, value: Any, write: Callable[[Any], str] = repr) -> str:
    """The beginning of a value as `write` has it, without what may be a secret."""
    if "env" in path or _SECRET.search(path[-1]):
        return MASK
    return "{...}" if isinstance(value, Mapping) else _shorten(write(value))


class WrongValue(InvalidField):
    """The value at `path` is not what is `allowed`, such as `a text`; `hint` may add to that."""

    def __init__(self, path: KeyPath, allowed: str, value: Any, known: Iterable[str] = ()) -> None:
        super().__init__(path, allowed)
        self.allowed = allowed
        self.value = value
        self.hint = suggest(value, known) if isinstance(value, str) else ""

    def __str__(self) -> str:
        shown = render_value(self.path, self.value, lambda value: encode_json(value).decode())
        return f"{self.field} must be {self.allowed}, not {shown}{self.hint}"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value may be.

    `check(path, value)` returns it ready for use or raises InvalidField; `schema` tells clients
    the same.
    """

    check: Callable[[KeyPath, Any], Any]
    schema: Schema


@dataclass(frozen=True, slots=True)
class Field:
    """One member of an object, or one field of a query."""

    name: str
    kind: Kind
    about: str = ""
    required: bool = False
    alias: str | None = None


class Fields:
    """The members an object may have. `read` checks them and keeps what was given."""

    def __init__(self, *fields: Field) -> None:
        self.fields = fields
        self._by_name = {field.name: field for field in fields}
        self._by_name |= {field.alias: field for field in fields if field.alias}
        self._required = tuple(field.name for field in fields if field.required)

    def read(self, given: Mapping[str, Any], path: KeyPath = ()) -> dict[str, Any]:
        """The checked members by name. Raises InvalidField."""
        values: dict[str, Any] = {}
        for key, value in given.items():
            field = self._by_name.get(key)
            if field is None:
                raise self._unknown((*path, key[:MAX_NAME_CHARS]), value)
            if field.name in values:
                sentence = f"{field.alias} is another name of {field.name}"
                raise InvalidField((*path, key), sentence)
            at = (*path, key) if path else (key,)  # ten times sooner made
            values[field.name] = field.kind.check(at, value)
        for name in self._required:
            if name not in values:
                where = ".".join(path) or "the body"
                raise InvalidField((*path, name), f"{where} needs the key {name!r}")
        return values

    def _unknown(self, path: KeyPath, value: Any) -> InvalidField:
        names = ", ".join(sorted(self._by_name))
        sentence = f"unknown key {'.'.join(path)!r} (value {render_value(path, value)})"
        sentence += f"{suggest(path[-1], self._by_name)}; allowed here: {names}"
        return InvalidField(path, sentence)

    @property
    def is_required(self) -> bool:
        return bool(self._required)

    @property
    def schema(self) -> Schema:
        members = {
            field.name: {
                **field.kind.schema,
                **({"description": field.about} if field.about else {}),
            }
            for field in self.fields
        }
        required = {"required": list(self._required)} if self._required else {}
        return {
            "type": "object", "properties": members, **required, "additionalProperties": False
        }  # fmt: skip


def kind_of(
    allowed: str,
    is_allowed: Callable[[Any], bool],
    convert: Callable[[Any], Any] | None = None,
    **schema: Any,
) -> Kind:
    """Values that `is_allowed` accepts, and `convert` too: it may raise ValueError."""

    def check(path: KeyPath, value: Any) -> Any:
        if not is_allowed(value):
            raise WrongValue(path, allowed, value)
        try:
            return convert(value) if convert else value
        except ValueError:
            raise WrongValue(path, allowed, value) from None

    return Kind(check, schema)


def matching(
    pattern: str, most: int, allowed: str, convert: Callable[[str], Any] | None = None
) -> Kind:
    """A text of at most `most` characters that matches as a whole."""
    fits = re.compile(pattern).fullmatch

    def check(path: KeyPath, value: Any) -> Any:
        if not isinstance(value, str) or len(value) > most or not fits(value):
            raise WrongValue(path, allowed, value)
        return convert(value) if convert else value

    least = 0 if fits("") else 1
    schema = {"type": "string", "minLength": least, "maxLength": most, "pattern": f"^{pattern}$"}
    return Kind(check, schema)


def printable(most: int, least: int = 1) -> Kind:
    return kind_of(
        f"a printable text of {least} to {most} characters",
        lambda value: isinstance(value, str) and least <= len(value) <= most
        and value.isprintable() and not value.isspace(),
        type="string", minLength=least, maxLength=most,
    )  # fmt: skip


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def numeric(low: float, high: float) -> Kind:
    return kind_of(
        f"a number from {low} to {high}",
        lambda value: is_number(value) and low <= value <= high,  # NaN compares false
        float, type="number", minimum=low, maximum=high,
    )  # fmt: skip


def whole_number(low: int, high: int) -> Kind:
    return kind_of(
        f"a whole number from {low} to {high}",
        lambda value: is_number(value) and low <= value <= high and not value % 1,
        int, type="integer", minimum=low, maximum=high,
    )  # fmt: skip


def one_of(*choices: str) -> Kind:
    members = {str(member): member for member in choices}

    def check(path: KeyPath, value: Any) -> str:
        if not isinstance(value, str) or value not in members:
            raise WrongValue(path, f"one of {', '.join(members)}", value, members)
        return members[value]

    return Kind(check, {"type": "string", "enum": list(members)})


def or_null(kind: Kind) -> Kind:
    def check(path: KeyPath, value: Any) -> Any:
        return None if value is None else kind.check(path, value)

    return Kind(check, {"anyOf": [kind.schema, {"type": "null"}]})


def prepared(kind: Kind, prepare: Callable[[Any], Any]) -> Kind:
    """What `prepare` makes one of the kind."""
    return Kind(lambda path, value: kind.check(path, prepare(value)), kind.schema)


def parse_text(schema_type: str, text: str) -> Any:
    """What a text says where that is a value of the type; else the text."""
    if schema_type == "array":
        return [part.strip() for part in text.split(",")]
    if schema_type == "boolean":
        return {"true": True, "false": False}.get(text, text)
    if schema_type in ("integer", "number") and _NUMBER.fullmatch(text):
        return float(text) if "." in text else int(text)
    return text


def in_text(kind: Kind) -> Kind:
    """The kind as a query has it, where everything is text."""
    return prepared(kind, partial(parse_text, kind.schema["type"]))


def list_kind(kind: Kind, most: int) -> Kind:
    """A list of at most so many values of a kind."""

    def check(path: KeyPath, value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise WrongValue(path, f"a list of at most {most}", value)
        return [kind.check((*path, str(i)), item) for i, item in enumerate(value)]

    return Kind(check, {"type": "array", "items": kind.schema, "maxItems": most})


def members_of(fields: Fields) -> Kind:
    """An object with these members."""

    def check(path: KeyPath, value: Any) -> dict[str, Any]:
        return fields.read(OBJECT.check(path, value), path)

    return Kind(check, fields.schema)


def _check_params(path: KeyPath, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise WrongValue(path, "an object", value)
    if len(encode_json(value)) > MAX_PARAMS_BYTES:
        raise InvalidField(path, f"{'.'.join(path)} is larger than {MAX_PARAMS_BYTES} bytes")
    return value


FLAG: Final = kind_of("true or false", lambda value: isinstance(value, bool), type="boolean")
OBJECT: Final = kind_of(
    "an object: a mapping whose keys are texts",  # in YAML they may be anything
    lambda value: isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
    type="object",
)
PARAMS: Final = Kind(_check_params, OBJECT.schema)
TRIGGER: Final = Kind(
    OBJECT.check,
    {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"type": "string", "enum": list(TRIGGER_TYPES)}},
    },
)
NAME: Final = matching(
    r"[A-Za-z0-9_][A-Za-z0-9._:@-]*",
    MAX_NAME_CHARS,
    f"1 to {MAX_NAME_CHARS} letters, digits and ._:@- that begin with a letter, digit or _",
)
RETRY_FIELDS: Final = Fields(
    Field("max_attempts", whole_number(1, 1_000), "1: never repeated"),
    Field("base_delay", numeric(0, 86_400), "seconds before the second attempt"),
    Field("factor", numeric(1, 100), "by which the delay grows"),
    Field("max_delay", numeric(0, 366 * 86_400), "seconds"),
    Field("jitter", numeric(0, 1), "share of the delay left to chance"),
)
RETRY_CHANGE: Final = Fields(*(replace(f, kind=or_null(f.kind)) for f in RETRY_FIELDS.fields))
CALL_FIELDS: Final = (
    Field("handler_id", NAME, required=True),
    Field("method_name", NAME, "also accepted as job_method", required=True, alias="job_method"),
    Field("job_params", PARAMS, "the arguments of the method"),
    Field("timeout", or_null(numeric(0.1, MAX_RUN_S)), "seconds for one attempt"),
    Field("retry", or_null(members_of(RETRY_CHANGE)),
          "null, as a whole or of a member: as configured"),
)  # fmt: skip
EDIT_FIELDS: Final = (
    *CALL_FIELDS,
    Field("trigger_config", TRIGGER, "its type and the fields of that type", required=True),
    Field("name", or_null(printable(MAX_TITLE_CHARS))),
    Field("coalesce", one_of(*Coalesce), "what becomes of several fires due at once"),
    Field("overlap", one_of(*Overlap), "what a fire does while the last one still runs"),
    Field("misfire_grace_time", or_null(numeric(0, MAX_GRACE_S)), "seconds"),
    Field("max_jitter", numeric(0, 86_400), "seconds"),
    Field("paused", FLAG),
)
DECLARED_FIELDS: Final = Fields(*EDIT_FIELDS)


# --- Configuration ----------------------------------------------------------------------------

MAX_CONFIG_BYTES: Final = 1 << 20
MAX_TEXT_CHARS: Final = 1_024
MAX_LISTED: Final = 100  # hosts or origins

_SECRET_OPTION: Final = re.compile(r"(-[\w-]*(?:secret|token|passw|credential|key)[\w-]*)(=?)(.*)")
_URL_PASSWORD: Final = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """Where settings came from; turns a wrong one into a sentence that says where it stands."""

    name: str
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    variables: Mapping[KeyPath, str] = field(default_factory=dict)  # set by the environment

    def read(self, fields: Fields, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """The checked settings; only the keys that were given are in it. Raises ConfigError."""
        try:
            return fields.read(mapping)
        except WrongValue as error:
            raise self.wrong(error.path, error.value, error.allowed + error.hint) from None
        except InvalidField as error:
            raise ConfigError(f"{self._place(error.path)}: {error}") from None

    def wrong(self, path: KeyPath, value: object, allowed: str) -> ConfigError:
        where = self.variables.get(path) or f"{self._place(path)}: {'.'.join(path)}"
        return ConfigError(f"{where} is {render_value(path, value)}; it must be {allowed}")

    def refused(self, path: KeyPath, why: object) -> ConfigError:
        return ConfigError(f"{self._place(path)}: {'.'.join(path)}: {why}")

    def _place(self, path: KeyPath) -> str:
        """File and line of the key, or of the nearest key around it."""
        for length in range(len(path), 0, -1):
            if line := self.lines.get(path[:length]):
                return f"{self.name} line {line}"
        return self.name


# Kinds of settings


def texts(pattern: str, allowed: str, convert: Callable[[str], str] = str) -> Kind:
    """A list of texts that each match as a whole. `convert` may raise ValueError."""
    fits = re.compile(pattern).fullmatch
    return kind_of(
        allowed,
        lambda value: isinstance(value, list) and len(value) <= MAX_LISTED
        and all(isinstance(text, str) and fits(text) for text in value),
        lambda value: tuple(map(convert, value)),
        type="array",
    )  # fmt: skip


def section(kind: Kind) -> Kind:
    """A mapping of the file; an empty one is null in YAML."""
    return prepared(kind, lambda value: {} if value is None else value)


def mapping_of(kind: Kind, name_kind: Kind) -> Kind:
    """Named values of a kind."""

    def check(path: KeyPath, value: Any) -> dict[str, Any]:
        return {
            name_kind.check((*path, name), name): kind.check((*path, name), item)
            for name, item in OBJECT.check(path, value).items()
        }

    return Kind(check, OBJECT.schema)


def entries_of(kind: Kind, name_kind: Kind) -> Kind:
    """A section of named entries; one that is null removes what it would inherit."""
    return section(mapping_of(or_null(kind), name_kind))


def label(most: int) -> Kind:
    """A text, or a number that YAML read where a text was meant, as in `version: 1.0`."""
    text = matching(r"[^\0]*", most, f"a text of at most {most} characters")
    return prepared(text, lambda value: str(value) if is_number(value) else value)


def check_json(path: KeyPath, value: Any) -> None:
    """Raise WrongValue for what JSON cannot carry, such as .nan or keys that are numbers."""
    if len(path) > MAX_JSON_DEPTH:
        raise WrongValue(path[:4], f"nested at most {MAX_JSON_DEPTH} deep", "...")
    if isinstance(value, Mapping):
        for key, item in OBJECT.check(path, value).items():
            check_json((*path, key), item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_json((*path, str(index)), item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise WrongValue(path, "a finite number", value)
    elif not isinstance(value, str | int | float | None):
        raise WrongValue(path, "a value that JSON has", value)


def _check_timezone(path: KeyPath, value: Any) -> str:
    if not isinstance(value, str) or not is_timezone(value):
        known = available_timezones()
        raise WrongValue(path, "an IANA time zone such as Europe/Berlin or UTC", value, known)
    return value


def is_timezone(name: str) -> bool:
    """Whether the host's time zone database has the name; its copies and `localtime` are none."""
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # unknown; not a relative path; a directory
        return False
    return name.split("/")[0] not in ("posix", "right", "localtime")


_TEXT: Final = matching(r"[^\0]*", MAX_TEXT_CHARS, f"a text of at most {MAX_TEXT_CHARS} characters")
_FILLED: Final = matching(
    r"\s*[^\s\0][^\0]*", MAX_TEXT_CHARS, f"a text of 1 to {MAX_TEXT_CHARS} characters"
)
_BIND_HOST: Final = matching(
    "[A-Za-z0-9._:%-]+", 253, "a host name or address such as 127.0.0.1, 0.0.0.0 or ::1"
)
_PORT: Final = whole_number(1, 65_535)
_COMMAND: Final = kind_of(
    'a list of texts: the program and its arguments, as ["/bin/job", "-v"]',
    lambda value: isinstance(value, list) and len(value) > 0 and value[0] != ""
    and all(isinstance(part, str) and "\0" not in part for part in value),
    tuple,
)  # fmt: skip
_ENVIRONMENT: Final = mapping_of(
    label(MAX_CONFIG_BYTES), matching(r"[^=\0]+", MAX_TEXT_CHARS, "a variable's name")
)
_NETWORKS: Final = texts(
    ".+",
    'a list of networks such as ["10.0.0.0/8", "fd00::/8"]',
    lambda text: str(ipaddress.ip_network(text)),
)
_HOST_NAMES: Final = texts(
    "[A-Za-z0-9._-]{1,253}",
    "a list of host names such as sz.example.org, without scheme and port",
    lambda name: name.lower().rstrip("."),
)
_ORIGINS: Final = texts(  # as browsers send them: no path, no default port, no wildcard
    r"https?://[a-z0-9._-]{1,253}(:[1-9][0-9]{0,4})?",
    "a list of origins such as https://tools.example.org, exact and without a path",
)
_SECURITY: Final = prepared(  # YAML reads the word null as nothing
    one_of("auto", "curve", "null"), lambda value: "null" if value is None else value
)
_LOG_LEVEL: Final = prepared(
    one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    lambda value: value.upper() if isinstance(value, str) else value,
)


# Settings


def setting(default: Any, kind: Kind, table: str = "", **options: Any) -> Any:
    """A field that the file sets, at the top or in a table; a type makes its own default."""
    key = "default_factory" if isinstance(default, type) else "default"
    return field(**{key: default}, metadata={"kind": kind, "table": table}, **options)


def settings_of(cls: type, table: str = "") -> Fields:
    """The settings of a dataclass that stand in a table. Its name may be their prefix."""
    return Fields(
        *(
            Field(each.name.removeprefix(f"{table}_"), each.metadata["kind"])
            for each in fields(cls)
            if each.metadata.get("table") == table
        )
    )


@dataclass(frozen=True, slots=True)
class HandlerSpec:
    """A handler the governor keeps running: a Python class by `run`, or any `command`."""

    handler_id: str
    # "file.py:ClassName", relative to the configuration file
    run: str | None = setting(
        None, matching(r"[^\0]+\.py:[A-Za-z_]\w*", 1_024, "file.py:ClassName")
    )
    command: tuple[str, ...] = setting((), _COMMAND)
    env: Mapping[str, str] = setting(dict, _ENVIRONMENT)
    cwd: str | None = setting(None, _FILLED)
    concurrency: int | None = setting(None, whole_number(1, 1_000))  # jobs of `run` at a time,
    processes: bool = setting(False, FLAG)  # each in a process,
    config: Mapping[str, Any] = setting(dict, OBJECT)  # and arguments of its constructor
    autostart: bool = setting(True, FLAG)  # False: something else runs it, as a systemd unit


@dataclass(frozen=True, slots=True)
class Config:
    """The effective configuration of one deployment. Paths are absolute."""

    deployment: str = "default"
    instance_name: str = setting("ScheduleZero", _FILLED)
    description: str = setting("", _TEXT)
    admin_contact: str = setting("", _TEXT)
    version: str = setting(VERSION, label(MAX_TEXT_CHARS))
    timezone: str = setting("UTC", Kind(_check_timezone, _TEXT.schema))
    http_host: str = setting("127.0.0.1", _BIND_HOST)
    http_port: int = setting(8888, _PORT)
    zmq_host: str = setting("127.0.0.1", _BIND_HOST)
    zmq_port: int = setting(4242, _PORT)
    zmq_security: str = setting("auto", _SECURITY)  # auto: curve unless zmq_host is loopback
    handler_secret: str = setting("", printable(256, least=16), repr=False)  # `register` must carry
    callback_networks: tuple[str, ...] = setting((), _NETWORKS)  # see may_call_back
    credentials_dir: str | None = None  # systemd's, for secrets
    auth: str = setting("auto", one_of("auto", "required"))  # see requires_login
    allow_insecure: bool = setting(False, FLAG)  # serve other machines without TLS
    allowed_hosts: tuple[str, ...] = setting((), _HOST_NAMES)  # further names of this server
    cors_origins: tuple[str, ...] = setting((), _ORIGINS)  # sites whose pages may use the API
    tls_cert: str | None = setting(None, _FILLED)  # PEM files
    tls_key: str | None = setting(None, _FILLED)
    data_dir: str = setting("data/default", _FILLED)  # of this deployment alone
    log_dir: str = setting("logs/default", _FILLED)  # of this deployment alone
    log_level: str = setting("INFO", _LOG_LEVEL)
    log_format: str = setting("text", one_of("text", "json"))
    log_to: str = setting("file", one_of("file", "stdout"))
    log_max_mb: int = setting(100, whole_number(1, 1_000_000))  # of all logs together
    # MB of the server, above which it starts anew
    memory_limit: int | None = setting(None, whole_number(16, 1_000_000))
    timeout: float = setting(3600.0, numeric(0.001, 366 * 86_400))
    retry: RetryPolicy = RetryPolicy()
    max_executions: int = setting(10_000, whole_number(1, 100_000_000), "history")
    max_age_days: float = setting(30.0, numeric(0.01, 36_600), "history")
    # Older executions go when the history takes more; the newest of each schedule stay.
    max_size_mb: int = setting(1_024, whole_number(1, 1_000_000), "history")
    keep_per_schedule: int = setting(10, whole_number(0, 10_000), "history")
    backup_every_hours: float = setting(24.0, numeric(0, 366 * 24), "backup")  # 0: never
    backup_keep: int = setting(3, whole_number(1, 1_000), "backup")
    handlers: tuple[HandlerSpec, ...] = ()
    schedules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    path: str | None = None  # the file it came from, None for the defaults
    directory: str = "/"  # where relative paths start: the file's directory, or the working one
    lines: Mapping[KeyPath, int] = field(default_factory=dict, repr=False, compare=False)


def _check_handler(path: KeyPath, value: Any) -> HandlerSpec:
    given = members_of(_HANDLER).check(path, value)
    if ("run" in given) == ("command" in given):
        raise WrongValue(path, "a mapping with exactly one of run and command", value)
    for key in ("concurrency", "processes", "config"):
        if key in given and "command" in given:
            raise WrongValue((*path, key), "left out beside command", given[key])
    check_json((*path, "config"), given.get("config"))
    return HandlerSpec(handler_id=path[-1], **given)


def _check_declared(path: KeyPath, value: Any) -> dict[str, Any]:
    check_json(path, value)
    return DECLARED_FIELDS.read(OBJECT.check(path, value), path)


_HANDLER: Final = settings_of(HandlerSpec)
_SCALARS: Final = settings_of(Config)
_TABLES: Final[Mapping[str, Fields]] = MappingProxyType(
    {"retry": RETRY_FIELDS, **{t: settings_of(Config, t) for t in ("history", "backup")}}
)
# The id of a handler names a directory of logs, a line of `status` and an argument of `logs`.
_HANDLER_ID: Final = matching(
    r"(?!(governor|server)$)[A-Za-z0-9][A-Za-z0-9._-]*", MAX_NAME_CHARS,
    "another name than governor and server, of letters, digits, '.', '_' and '-'",
)  # fmt: skip
_DEPLOYMENT: Final = matching(  # it names directories
    "[A-Za-z0-9][A-Za-z0-9._-]*", 64, "named with at most 64 letters, digits, '.', '_' and '-'"
)
_SCHEDULES: Final = Field("schedules", entries_of(Kind(_check_declared, OBJECT.schema), NAME))
_SETTINGS: Final = Fields(
    *_SCALARS.fields,
    *(Field(name, section(members_of(table))) for name, table in _TABLES.items()),
    Field("handlers", entries_of(Kind(_check_handler, OBJECT.schema), _HANDLER_ID)),
    _SCHEDULES,
)
_FILE: Final = Fields(
    *_SETTINGS.fields,
    Field("deployments", entries_of(section(members_of(_SETTINGS)), _DEPLOYMENT)),
)
_SECTIONS: Final = (*_TABLES, "handlers", "schedules")

# What a deployment is before the file is read. The clock announces the time by the DingDong
# handler, each hour and, so that something is to be seen at once, each minute.
BUILT_IN_DEPLOYMENTS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "default": {"http_port": 8888, "zmq_port": 4242},
        "clock": {
            "http_port": 8889,
            "zmq_port": 4243,
            "handlers": {"ding-dong": {"run": "handler.py:DingDong"}},
            "schedules": {
                name: {
                    "handler_id": "ding-dong",
                    "method_name": "chime",
                    "trigger_config": {"type": "cron", "minute": minute},
                }
                for name, minute in (("hourly-chime", "0"), ("minute-chime", "1-59"))
            },
        },
        "production": {"http_port": 8890, "zmq_port": 4244},
        "test": {"http_port": 8891, "zmq_port": 4245},
    }
)


def parse_config(
    mapping: Mapping[str, Any],
    *,
    environ: Mapping[str, str],
    deployment: str | None = None,
    path: str | None = None,
    directory: str = "/",
    lines: Mapping[KeyPath, int] | None = None,
    local_timezone: Callable[[], str] = lambda: "UTC",
) -> Config:
    """Return the effective configuration of one deployment.

    Weakest first: defaults, the built-in deployment, the top level of `mapping`, its
    `deployments` entry of that name, `environ`. But 8888 and 4242 at the top leave the built-in
    deployments their own ports, so that all can run side by side. Every entry of `deployments` is
    checked, chosen or not. Mappings merge by key; a handler or schedule set to null is removed.
    `data_dir` and `log_dir` of the result are absolute and end in the deployment's name; relative
    paths start at `directory`. Raises ConfigError.
    """
    source = ConfigSource(os.path.basename(path) if path else "configuration", lines or {})
    layer = source.read(_FILE, mapping)
    entries = layer.pop("deployments", {})
    name = deployment or environ.get("SCHEDULEZERO_DEPLOYMENT") or "default"
    if name not in (known := {*BUILT_IN_DEPLOYMENTS, *entries}):
        # A misspelt one would start beside the wanted one, with no data.
        allowed = f"one of {', '.join(sorted(known))}{suggest(name, known)}"
        raise source.wrong(("deployment",), name, allowed)
    built_in = source.read(_SETTINGS, BUILT_IN_DEPLOYMENTS.get(name, {}))
    merged: dict[str, Any] = {
        "deployment": name,
        "path": path,
        "directory": directory,
        "lines": source.lines,
        "credentials_dir": environ.get("CREDENTIALS_DIRECTORY") or None,  # set by systemd
    }
    usual = BUILT_IN_DEPLOYMENTS["default"].items()
    ports = {
        key: built_in[key] for key, port in usual if key in built_in and layer.get(key) == port
    }
    for part in (built_in, layer, ports, entries.get(name) or {}, _parse_environment(environ)):
        for key, value in part.items():
            merged[key] = {**merged.get(key, {}), **value} if key in _SECTIONS else value
    if "timezone" not in merged:
        merged["timezone"] = local_timezone()
    config = _build_config(merged)
    if config.http_port == config.zmq_port:
        raise source.wrong(("zmq_port",), config.zmq_port, "another port than http_port")
    return config


def parse_schedules(text: str, name: str) -> tuple[dict[str, Any], ConfigSource]:
    """The declared schedules of a file that holds nothing else, and where each of them stands.

    Raises ConfigError.
    """
    mapping, lines = parse_yaml(text, name)
    source = ConfigSource(name, lines)
    entries = source.read(Fields(_SCHEDULES), mapping).get("schedules", {})
    for key, entry in entries.items():
        if entry is None:
            allowed = "a schedule; leave out what is not wanted"
            raise source.wrong(("schedules", key), None, allowed)
    return entries, source


def _variables() -> dict[str, tuple[KeyPath, Kind]]:
    """The environment variables that set a key; which, and what it may be."""
    settings: dict[KeyPath, Kind] = {(field.name,): field.kind for field in _SCALARS.fields}
    settings |= {(name, f.name): f.kind for name, table in _TABLES.items() for f in table.fields}
    return {"SCHEDULEZERO_" + "_".join(key).upper(): (key, kind) for key, kind in settings.items()}


def _parse_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings of `environ`. An empty variable counts as not set."""
    variables = _variables()
    _check_misspelt(environ, variables)
    names: dict[KeyPath, str] = {}
    mapping: dict[str, Any] = {}
    for name, (key, kind) in variables.items():
        if text := environ.get(name):
            names[key] = name
            settings = mapping if len(key) == 1 else mapping.setdefault(key[0], {})
            settings[key[-1]] = parse_text(kind.schema["type"], text)
    return ConfigSource("environment", variables=names).read(_SETTINGS, mapping)


def _check_misspelt(environ: Mapping[str, str], variables: Iterable[str]) -> None:
    # Foreign variables with our prefix are normal: Kubernetes sets SCHEDULEZERO_PORT and
    # SCHEDULEZERO_SERVICE_HOST for a service of that name. So only near misses are errors.
    known = {"SCHEDULEZERO_CONFIG_PATH", "SCHEDULEZERO_DEPLOYMENT", *variables}
    suffixes = {name.removeprefix("SCHEDULEZERO_"): name for name in known}
    for name in sorted(environ.keys() - known):
        if not name.startswith("SCHEDULEZERO_"):
            continue
        suffix = name.removeprefix("SCHEDULEZERO_")
        if close := difflib.get_close_matches(suffix, list(suffixes), n=1, cutoff=0.8):
            raise ConfigError(f"unknown variable {name}; did you mean {suffixes[close[0]]}?")


def _build_config(settings: Mapping[str, Any]) -> Config:
    def place(*parts: str) -> str:
        return os.path.normpath(os.path.join(settings["directory"], *parts))

    plain = {key: value for key, value in settings.items() if key not in _SECTIONS}
    plain["data_dir"] = place(plain.get("data_dir", "data"), plain["deployment"])
    plain["log_dir"] = place(plain.get("log_dir", "logs"), plain["deployment"])
    plain |= {key: place(plain[key]) for key in ("tls_cert", "tls_key") if key in plain}
    specs = [spec for spec in settings.get("handlers", {}).values() if spec]
    schedules = settings.get("schedules", {})
    return Config(
        retry=RetryPolicy(**settings.get("retry", {})),
        handlers=tuple(replace(s, cwd=place(s.cwd) if s.cwd else None) for s in specs),
        schedules={key: entry for key, entry in schedules.items() if entry},
        **plain,
        **settings.get("history", {}),
        **{f"backup_{key}": value for key, value in settings.get("backup", {}).items()},
    )


def error_in_config(config: Config, path: KeyPath, sentence: str) -> ConfigError:
    """Say where in the file of `config` the setting at `path` stands, and what is wrong with it."""
    source = ConfigSource(os.path.basename(config.path or "configuration"), config.lines)
    if ("deployments", config.deployment, *path) in config.lines:
        path = ("deployments", config.deployment, *path)
    return source.refused(path, sentence)


def mask_config(config: Config) -> dict[str, Any]:
    """The configuration as JSON values, without secrets.

    Masked: every variable of a handler's `env`, values whose key looks like a secret, options
    such as `--token=…` in commands, passwords in URLs.
    """
    shown = asdict(replace(config, lines={}))
    del shown["lines"]
    shown["handlers"] = {spec.handler_id: _show_handler(spec) for spec in config.handlers}
    for name, prefix in (("history", ""), ("backup", "backup_")):
        keys = [field.name for field in _TABLES[name].fields]
        shown[name] = {key: shown.pop(prefix + key) for key in keys}
    masked: dict[str, Any] = _mask(shown)
    return masked


def _show_handler(spec: HandlerSpec) -> dict[str, Any]:
    """What is not as by default, with its secrets masked."""
    blank = asdict(HandlerSpec(spec.handler_id))
    shown = {key: value for key, value in asdict(spec).items() if value != blank[key]}
    if spec.command:
        shown["command"] = _mask_command(spec.command)
    if spec.env:
        shown["env"] = dict.fromkeys(spec.env, MASK)
    return shown


def _mask(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: MASK if _SECRET.search(key) and item is not None else _mask(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mask(item) for item in value]
    return _URL_PASSWORD.sub(rf"\1{MASK}@", value) if isinstance(value, str) else value


def _mask_command(command: Iterable[str]) -> list[str]:
    """Mask what follows an option with a secret's name, after `=` or as the next argument."""
    shown: list[str] = []
    is_value = False
    for part in command:
        option = None if is_value else _SECRET_OPTION.fullmatch(part)
        if option and option[2]:
            part = f"{option[1]}={MASK}"
        shown.append(MASK if is_value else part)
        is_value = bool(option and not option[2])
    return shown


class _ConfigLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML without its implicit dates: `run_date: 2027-01-01 10:00` stays the text it is."""

    yaml_implicit_resolvers: Final = {
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def parse_yaml(text: str, name: str) -> tuple[Mapping[str, Any], dict[KeyPath, int]]:
    """Read a YAML mapping: its values, and the line of each key. Raises ConfigError.

    Duplicate keys are refused, since the last one would win without a word.
    """
    try:
        loader = _ConfigLoader(text)
        node = loader.get_single_node()
        lines = _lines_of(node, name)
        mapping = loader.construct_document(node) if node else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name} line {mark.line + 1}" if mark else name
        raise ConfigError(f"{place}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{name}: not valid YAML: {reason}") from None
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, Mapping) or not all(isinstance(key, str) for key in mapping):
        raise ConfigError(f"{name}: must be a mapping of settings, such as 'http_port: 8888'")
    return mapping, lines


def _lines_of(root: yaml.Node | None, name: str) -> dict[KeyPath, int]:
    """The line of every key, counted from 1. An aliased node is walked where it first stands."""
    lines: dict[KeyPath, int] = {}
    walked: set[int] = set()
    pending: list[tuple[yaml.Node | None, KeyPath]] = [(root, ())]
    while pending:
        node, at = pending.pop()
        if node is None or id(node) in walked:
            continue
        walked.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                word, line = str(key.value), key.start_mark.line + 1
                if word in seen:
                    first = f"it stands already on line {seen[word]}"
                    raise ConfigError(f"{name} line {line}: duplicate key {word!r}: {first}")
                seen[word] = lines[(*at, word)] = line
                pending.append((value, (*at, word)))
        elif isinstance(node, yaml.SequenceNode):
            pending.extend((item, (*at, str(i))) for i, item in enumerate(node.value))
    return lines


def find_config(path: str | None, environ: Mapping[str, str]) -> str | None:
    """The absolute path of the file to read; None if there is none."""
    path = path or environ.get("SCHEDULEZERO_CONFIG_PATH") or None
    if path is None and os.path.exists("config.yaml"):
        path = "config.yaml"
    return path and os.path.abspath(path)


def load_config(
    path: str | None, environ: Mapping[str, str], deployment: str | None = None
) -> Config:
    """Read the configuration: from `path`, else SCHEDULEZERO_CONFIG_PATH, else ./config.yaml if
    it exists, else the defaults. Raises ConfigError.
    """
    path = find_config(path, environ)
    mapping: Mapping[str, Any] = {}
    lines: dict[KeyPath, int] = {}
    if path is not None:
        try:
            with open(path, "rb") as file:
                text = load_utf8(file, path, MAX_CONFIG_BYTES)
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
        mapping, lines = parse_yaml(text, os.path.basename(path))
    return parse_config(
        mapping,
        environ=environ,
        deployment=deployment,
        path=path,
        directory=os.path.dirname(path) if path else os.getcwd(),
        lines=lines,
        local_timezone=load_local_timezone,  # imports 0.3 MB, so only where nothing is set
    )


def load_utf8(file: IO[bytes], name: str, most_bytes: int) -> str:
    """A file of UTF-8. Raises OSError, and ConfigError for what is none or too large."""
    data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ConfigError(f"{name}: larger than {most_bytes} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 at byte {error.start}") from None


def load_local_timezone() -> str:
    """The host's zone as an IANA name, `UTC` where that cannot be told."""
    try:
        tzlocal.reload_localzone()  # it remembers, and a reload may follow a change of the zone
        name = tzlocal.get_localzone_name()
    except (KeyError, ValueError, OSError):  # contradicting or unreadable files in /etc, odd TZ
        return "UTC"
    return name if name and is_timezone(name) else "UTC"


# --- Logging ----------------------------------------------------------------------------------

LOG_FILE_BYTES: Final = 5 << 20  # at most, before it is rotated
LOG_BACKUPS: Final = 3
TAIL_BYTES: Final = 256 << 10  # read from the end of a log, and at once while following it

# C0 controls (with CR, LF and ESC), DEL, C1, and the separators that many viewers break lines at.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def escape_controls(text: str) -> str:
    """Write control characters as escapes, so that no message can forge a line or a colour."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def render_log_time(created_s: float) -> str:
    whole, ms = divmod(int(created_s * 1_000), 1_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{ms:03}Z"


class LogFormatter(logging.Formatter):
    """A line per record, `time level file:line:function [execution id] message`, and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        at = render_log_time(record.created)
        place = f"{record.filename}:{record.lineno}:{record.funcName}"
        execution_id = getattr(record, "execution_id", None)
        context = f"[{execution_id}] " if execution_id else ""
        message = escape_controls(record.getMessage())
        trace = self.formatException(record.exc_info) if record.exc_info else None
        below = [line for text in (trace, record.stack_info) if text for line in text.split("\n")]
        lines = [f"{at} {record.levelname} {place} {context}{message}"]
        return "\n".join(lines + ["    " + escape_controls(line) for line in below])


class JsonLogFormatter(logging.Formatter):
    """One JSON object per record and line; `execution_id` and `handler_id` where it has them."""

    def format(self, record: logging.LogRecord) -> str:
        shown = {
            "time": render_log_time(record.created),
            "level": record.levelname,
            "file": record.filename,
            "line": record.lineno,
            "function": record.funcName,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in ("execution_id", "handler_id"):
            if value := getattr(record, name, None):
                shown[name] = value
        if record.exc_info:
            shown["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            shown["stack"] = record.stack_info
        return json.dumps(shown, default=str)


def log_formatter(config: Config) -> logging.Formatter:
    return JsonLogFormatter() if config.log_format == "json" else LogFormatter()


def log_file_bytes(config: Config) -> int:
    """How large one log may get before it is rotated, that all of them together stay bounded."""
    logs = 2 + 2 * len(config.handlers)  # governor, server, and two for each handler
    return min(LOG_FILE_BYTES, (config.log_max_mb << 20) // (logs * (LOG_BACKUPS + 1)))


def log_path(config: Config, name: str) -> str:
    """The log of the governor or the server."""
    return os.path.join(config.log_dir, name, f"{name}.log")


class LogFile(logging.handlers.RotatingFileHandler):
    """A log file of bounded size. With `is_stderr` stdout and stderr go there as well: what the
    interpreter itself says is not lost either.
    """

    def __init__(self, path: str, max_bytes: int, *, is_stderr: bool) -> None:
        self._is_stderr = is_stderr
        super().__init__(path, maxBytes=max_bytes, backupCount=LOG_BACKUPS, encoding="utf-8")

    def _open(self) -> Any:
        file = super()._open()
        if self._is_stderr:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        return file


def is_writable(fd: int) -> bool:
    """Whether a line can be written now, without waiting for somebody to read."""
    return bool(select.select((), (fd,), (), 0)[1])


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Lines for whoever watches. A terminal halted by Ctrl-S, or a pipe that nobody empties, loses
    them instead of halting the process; the log file has them all.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if is_writable(self.stream.fileno()):
            super().emit(record)


def configure_logging(config: Config, name: str, *, is_foreground: bool) -> None:
    """Send this process's log to its file, which is made; replaces what was set.

    In the foreground every line goes to stderr too, or with `log_to: stdout` only there;
    otherwise stdout and stderr go to the file. Raises OSError.
    """
    is_stdout = is_foreground and config.log_to == "stdout"
    handlers: list[logging.Handler] = []
    if not is_stdout:
        path = log_path(config, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handlers.append(LogFile(path, log_file_bytes(config), is_stderr=not is_foreground))
    if is_foreground:
        handlers.append(ConsoleHandler(sys.stdout if is_stdout else sys.stderr))
    for handler in handlers:
        handler.setFormatter(log_formatter(config))
    logging.basicConfig(handlers=handlers, force=True)
    logging.raiseExceptions = False  # a full disk must not print a traceback for each line
    set_log_level(config.log_level)


def log_to_stderr(config: Config) -> None:
    """Send this process's log to stderr alone; replaces what was set."""
    logging.basicConfig(level=config.log_level, stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].setFormatter(log_formatter(config))


def set_log_level(level: str) -> None:
    """Change what is logged from now on."""
    logging.getLogger().setLevel(level)
    # These two tell of each fire and each poll; what they say that matters comes back as errors.
    for library in ("apscheduler", "asyncio"):
        logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLogger().level))


def surplus_logs(
    files: Iterable[tuple[str, int, float]], most_bytes: int, kept: Iterable[str]
) -> list[str]:
    """Which log files to delete, oldest first, that the rest takes no more than `most_bytes`.

    `files`: path, size and time of last change. Those in `kept` are being written to.
    """
    listed = sorted(files, key=lambda file: file[2])
    excess, names, surplus = sum(file[1] for file in listed) - most_bytes, set(kept), []
    for path, size, _ in listed:
        if excess > 0 and path not in names:
            surplus.append(path)
            excess -= size
    return surplus


def split_log(data: bytes) -> list[str]:
    """Lines that a terminal shows as they are: a job's output may hold anything."""
    lines = data.decode(errors="replace").split("\n")
    return [escape_controls(line.expandtabs().rstrip("\r")) for line in lines if line]


def size_of(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def read_tail(path: str, count: int, start: int = 0) -> list[str]:
    """The last lines of a file, of what comes after `start` bytes; none if it does not exist."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(start if start <= size else 0, size - TAIL_BYTES))
        lines = split_log(file.read(TAIL_BYTES))
        return lines[max(0, len(lines) - count) :]
    return []


@dataclass(slots=True)
class Tail:
    """A log file that is being followed, through rotation and emptying."""

    path: str
    inode: int
    offset: int

    def read_lines(self) -> list[str]:
        """The whole lines since the last call."""
        with suppress(OSError), open(self.path, "rb") as file:  # renamed a moment ago, or closed
            found = os.fstat(file.fileno())
            if found.st_ino != self.inode or found.st_size < self.offset:
                self.inode, self.offset = found.st_ino, 0
            file.seek(self.offset)
            data = file.read(TAIL_BYTES)
            if len(data) < TAIL_BYTES:
                data = data[: data.rfind(b"\n") + 1]
            self.offset += len(data)
            return split_log(data)
        return []


def follow_log(path: str) -> Tail:
    """Follow a log file from its present end. It need not exist yet."""
    with suppress(OSError):
        found = os.stat(path)
        return Tail(path, found.st_ino, found.st_size)
    return Tail(path, 0, 0)


# --- Triggers ---------------------------------------------------------------------------------
#
# A trigger is a set of instants with three questions: which is next, which was last, how many
# lie between. Each is computed, never walked, so that the cost does not depend on the distance.
#
# Wall-clock triggers (cron, calendar_interval, and) are sets of local times: days x hours x
# minutes x seconds. A zone turns them into instants span by span, a span being a stretch with one
# UTC offset. The `dst` rule says what happens where two spans meet:
#
#   A trigger whose minute or hour starts with `*` follows the wall clock under every rule: a local
#   time that does not exist is no fire, one that happens twice is two.
#   All others are fixed times. In a gap (the clock jumps from 02:00 to 03:00) those in [02:00,
#   03:00) together are one fire at the instant of the jump; `skip` drops them. In an overlap (the
#   clock goes back from 03:00 to 02:00) those in [02:00, 03:00) fire in the first pass only;
#   `both` fires them in each.
#
# `debian` is what Debian's cron(8) does with changes of less than three hours, here for any size.

SECOND_US: Final = 1_000_000
DAY_S: Final = 86_400
EPOCH_ORDINAL: Final = EPOCH.toordinal()
LAST_US: Final = us_of(datetime(LAST_YEAR + 1, 1, 1, tzinfo=UTC)) - 1
FIRST_MONTH: Final = 1969 * 12  # months are counted from year 0; local years exceed UTC's by a day
LAST_MONTH: Final = (LAST_YEAR + 1) * 12
SAMPLE_S: Final = 3 * DAY_S  # no zone changes its offset twice within a week
MAX_MEMBERS: Final = 16  # triggers within one `and` or `or`
MAX_NESTING: Final = 3  # an `or` of `and`s of triggers
MAX_CRON_CHARS: Final = 1_000  # of one cron field or expression
OR_EXACT_COUNT: Final = 300  # up to here an `or` counts fire times that members share once
ON_TIME_S: Final = 1.0  # a fire at most this late is on time

MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
POSITIONS: Final = ("last", "1st", "2nd", "3rd", "4th", "5th")


class Dst(enum.StrEnum):
    """What becomes of a fixed local time that a clock change skips or repeats."""

    DEBIAN = "debian"
    SKIP = "skip"
    BOTH = "both"


# Zones


class Span(NamedTuple):
    """UTC seconds [begin, end) in which a zone keeps one offset; offsets in seconds east."""

    begin: int
    end: int
    offset: int
    before: int  # the offset until `begin`


def offset_at(zone: ZoneInfo, at: int) -> int:
    offset = datetime.fromtimestamp(at, zone).utcoffset()
    assert offset is not None
    return offset.days * DAY_S + offset.seconds


@lru_cache(maxsize=512)
def spans_of(zone: ZoneInfo, year: int) -> tuple[Span, ...]:
    """The spans of a UTC year; the year's own ends bound them too."""
    begin, end = (_epoch_day(y * 12, 1) * DAY_S for y in (year, year + 1))
    spans = []
    before, offset = offset_at(zone, begin - 1), offset_at(zone, begin)
    for at in range(begin, end, SAMPLE_S):
        sample = range(at, min(at + SAMPLE_S, end))
        changed = offset_at(zone, sample[-1])
        if changed != offset:
            jump = sample[bisect_left(sample, True, key=lambda s: offset_at(zone, s) == changed)]
            spans.append(Span(begin, jump, offset, before))
            begin, before, offset = jump, offset, changed
    return (*spans, Span(begin, end, offset, before))


def span_at(zone: ZoneInfo, at: int) -> Span:
    year = date.fromordinal(at // DAY_S + EPOCH_ORDINAL).year
    return next(span for span in reversed(spans_of(zone, year)) if span.begin <= at)


def instant_of(wall: datetime, zone: ZoneInfo) -> int:
    """UTC microseconds of a naive local time: after the gap, or the first of two."""
    first, second = (us_of(wall.replace(tzinfo=zone, fold=fold)) for fold in (0, 1))
    if first <= second:
        return first
    # PEP 495: in a gap fold=0 counts with the offset before it, so `first` is after the jump.
    return span_at(zone, first // SECOND_US).begin * SECOND_US


@lru_cache(maxsize=64)  # every trigger that is read asks
def load_zone(name: str) -> ZoneInfo:
    """The zone of an IANA name. Raises ValueError with the nearest names."""
    if is_timezone(name):
        return ZoneInfo(name)
    known = sorted(available_timezones() - {"localtime"})
    cities = {zone.rpartition("/")[2].lower(): zone for zone in known}
    city = name[-80:].rpartition("/")[2].lower().replace(" ", "_")
    nearest = [cities[close] for close in difflib.get_close_matches(city, cities, 3, 0.7)]
    hint = f"the nearest are {', '.join(nearest)}" if nearest else "use a name like Europe/Berlin"
    raise ValueError(f"{name!r:.80} is not a known time zone; {hint}")


# Days and times of day


def _epoch_day(month: int, day: int) -> int:
    """Days since 1970 of a day in a month that is counted from year 0."""
    return date(month // 12, month % 12 + 1, day).toordinal() - EPOCH_ORDINAL


def _month_and_day(epoch_day: int) -> tuple[int, int]:
    at = date.fromordinal(epoch_day + EPOCH_ORDINAL)
    return at.year * 12 + at.month - 1, at.day


class DayRule(NamedTuple):
    """Which days of a month match. Weekdays count from Monday, 0."""

    days: tuple[int, ...]  # of the month
    weekdays: tuple[int, ...]
    last: bool = False  # the last day of the month
    positions: tuple[tuple[int, int], ...] = ()  # (n, weekday): its nth, 0 for its last
    either: bool = False  # Vixie: day of month or day of week is enough


@lru_cache(maxsize=1024)
def days_of_month(rule: DayRule, first_weekday: int, length: int) -> tuple[int, ...]:
    """The matching days of a month by its shape; at most 28 shapes per rule."""
    found = []
    for day in range(1, length + 1):
        weekday = (first_weekday + day - 1) % 7
        nth, is_last = (day + 6) // 7, day + 7 > length
        of_month = day in rule.days or (rule.last and day == length)
        of_month |= (nth, weekday) in rule.positions
        of_month |= is_last and (0, weekday) in rule.positions
        of_week = weekday in rule.weekdays
        if (of_month or of_week) if rule.either else (of_month and of_week):
            found.append(day)
    return tuple(found)


class TimesOfDay(NamedTuple):
    """The product of sorted hours, minutes and seconds, indexed in order."""

    hours: tuple[int, ...]
    minutes: tuple[int, ...]
    seconds: tuple[int, ...]

    def total(self) -> int:
        return len(self.hours) * len(self.minutes) * len(self.seconds)

    def at(self, index: int) -> int:
        """The nth time, in seconds of the day."""
        rest, second = divmod(index, len(self.seconds))
        hour, minute = divmod(rest, len(self.minutes))
        return self.hours[hour] * 3600 + self.minutes[minute] * 60 + self.seconds[second]

    def before(self, second: int) -> int:
        """How many times lie before a second of the day."""
        hour, minute, second = second // 3600, second // 60 % 60, second % 60
        count = bisect_left(self.hours, hour) * len(self.minutes) * len(self.seconds)
        if hour in self.hours:
            count += bisect_left(self.minutes, minute) * len(self.seconds)
            if minute in self.minutes:
                count += bisect_left(self.seconds, second)
        return count


# Cron fields


class CronRule(NamedTuple):
    """A compiled cron pattern; `years` and `weeks` are empty if all match."""

    years: frozenset[int]
    months: tuple[int, ...]
    weeks: frozenset[int]
    days: DayRule
    times: TimesOfDay
    follows_clock: bool


class FieldRange(NamedTuple):
    """What a cron field may hold; names count from `low`."""

    low: int
    high: int
    names: tuple[str, ...] = ()


CRON_FIELDS: Final[Mapping[str, FieldRange]] = MappingProxyType(
    {
        "year": FieldRange(EPOCH.year, LAST_YEAR),
        "month": FieldRange(1, 12, MONTHS),
        "day": FieldRange(1, 31),
        "week": FieldRange(1, 53),
        "day_of_week": FieldRange(0, 7, ("sun", *WEEKDAYS[:-1])),  # 0 and 7 are Sunday
        "hour": FieldRange(0, 23),
        "minute": FieldRange(0, 59),
        "second": FieldRange(0, 59),
    }
)
CRONTAB_FIELDS: Final = ("minute", "hour", "day", "month", "day_of_week")
CRONTAB_NICKNAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "@yearly": "0 0 1 1 *",
        "@annually": "0 0 1 1 *",
        "@monthly": "0 0 1 * *",
        "@weekly": "0 0 * * 0",
        "@daily": "0 0 * * *",
        "@midnight": "0 0 * * *",
        "@hourly": "0 * * * *",
    }
)
ITEM: Final = re.compile(r"(\*|[0-9]{1,4}|[a-z]+)(?:-([0-9]{1,4}|[a-z]+))?(?:/([0-9]{1,4}))?")


@lru_cache(maxsize=256)
def compile_cron_fields(given: tuple[tuple[str, str], ...]) -> CronRule:
    """Compile APScheduler's fields: all must match. Raises ValueError.

    Of the fields not given, those before the last given one match always, those after it match
    their least value.
    """
    texts = dict(given)
    names = list(CRON_FIELDS)
    least_significant = max(map(names.index, texts))
    for index, name in enumerate(names):
        is_free = index < least_significant or name in ("year", "week", "day_of_week")
        texts.setdefault(name, "*" if is_free else str(CRON_FIELDS[name].low))
    days, is_last, positions = parse_days(texts["day"])
    values = {name: parse_values(name, text) for name, text in texts.items() if name != "day"}
    return _make_rule(texts, values, DayRule(days, values["day_of_week"], is_last, positions))


@lru_cache(maxsize=256)
def compile_crontab(expression: str) -> CronRule:
    """Compile a crontab's five fields as Vixie's cron reads them. Raises ValueError.

    If neither the day of month nor the day of week begins with `*`, either is enough.
    """
    texts = {"year": "*", "week": "*", "second": "0", **_split_crontab(expression.lower())}
    values = {}
    for name, text in texts.items():
        try:
            values[name] = parse_values(name, text, is_crontab=True)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    either = "*" not in (texts["day"][0], texts["day_of_week"][0])
    return _make_rule(texts, values, DayRule(values["day"], values["day_of_week"], either=either))


def _make_rule(
    texts: Mapping[str, str], values: Mapping[str, tuple[int, ...]], days: DayRule
) -> CronRule:
    years, weeks = (
        frozenset(values[name] if texts[name] != "*" else ()) for name in ("year", "week")
    )
    times = TimesOfDay(values["hour"], values["minute"], values["second"])
    follows_clock = "*" in (texts["minute"][0], texts["hour"][0])
    return CronRule(years, values["month"], weeks, days, times, follows_clock)


def _split_crontab(expression: str) -> dict[str, str]:
    if expression == "@reboot":
        raise ValueError("@reboot is no time: a trigger cannot know when a machine starts")
    if expression.startswith("@") and expression not in CRONTAB_NICKNAMES:
        raise ValueError(f"{expression!r} is unknown{suggest(expression, CRONTAB_NICKNAMES)}")
    fields = CRONTAB_NICKNAMES.get(expression, expression).split()
    if len(fields) != len(CRONTAB_FIELDS):
        sentence = f"it has {len(fields)} fields instead of minute, hour, day, month, day of week"
        seconds = "; for seconds or years give the fields second, minute, hour and so on"
        raise ValueError(sentence + (seconds if len(fields) > len(CRONTAB_FIELDS) else ""))
    return dict(zip(CRONTAB_FIELDS, fields, strict=True))


def parse_days(text: str) -> tuple[tuple[int, ...], bool, tuple[tuple[int, int], ...]]:
    """The days of a `day` field, whether it has `last`, and its positions such as `1st mon`."""
    items = [" ".join(item.split()) for item in text.split(",")]
    positions = []
    for item in items:
        position, _, weekday = item.partition(" ")
        if weekday:
            if position not in POSITIONS or weekday not in WEEKDAYS:
                raise ValueError(f"{item!r} is no day such as '1st mon' or 'last fri'")
            positions.append((POSITIONS.index(position), WEEKDAYS.index(weekday)))
    plain = [item for item in items if item != "last" and " " not in item]
    days = parse_values("day", ",".join(plain)) if plain else ()
    return days, "last" in items, tuple(positions)


def parse_values(name: str, text: str, *, is_crontab: bool = False) -> tuple[int, ...]:
    """The values of one cron field, sorted; weekdays from Monday, 0. Raises ValueError."""
    values: set[int] = set()
    for item in map(str.strip, text.split(",")):
        try:
            values.update(_parse_item(item, CRON_FIELDS[name], is_crontab))
        except ValueError as error:
            raise ValueError(f"{item!r}: {error}") from None
    if name == "day_of_week":
        values = {(value - 1) % 7 for value in values}
    return tuple(sorted(values))


def _parse_item(item: str, allowed: FieldRange, is_crontab: bool) -> Sequence[int]:
    match = ITEM.fullmatch(item)
    if match is None:
        raise ValueError("not a value, a range or a step such as 5, 1-5, */15 or 10-50/20")
    first_text, last_text, step_text = match.groups()
    step, most = int(step_text or 1), allowed.high - allowed.low + 1
    if not 1 <= step <= most:
        raise ValueError(f"the step must be between 1 and {most}")
    if first_text == "*":
        if last_text:
            raise ValueError("`*` cannot begin a range")
        return range(allowed.low, allowed.high + 1, step)
    first = last = _parse_value(first_text, allowed)
    if last_text:
        last = _parse_value(last_text, allowed)
    elif step_text:
        last = allowed.high
        if is_crontab:  # Vixie's cron silently drops the step
            raise ValueError(f"a step needs a range: {first_text}-{last}/{step}")
    if first > last and "mon" in allowed.names:  # the week goes round, and `fri-sun` is meant so
        last += 7
    if first <= last:
        return range(first, last + 1, step)
    before, after = f"{first_text}-{allowed.high}", f"{allowed.low}-{last_text}"
    raise ValueError(f"the range runs backwards; write {before},{after}")


def _parse_value(text: str, allowed: FieldRange) -> int:
    if text in allowed.names:
        return allowed.low + allowed.names.index(text)
    if not text.isdigit():
        hint = suggest(text, allowed.names) if allowed.names else "; it has no names"
        raise ValueError(f"{text!r} is unknown{hint}")
    if not allowed.low <= int(text) <= allowed.high:
        raise ValueError(f"{text} is not between {allowed.low} and {allowed.high}")
    return int(text)


# Words

WEEKDAY_NAMES: Final = tuple(day_name)


def describe_times(times: TimesOfDay) -> str:
    """Times of day in words; they begin with `at` if they are few enough to be listed."""
    if times.total() <= 6 and len(times.seconds) == 1:
        return f"at {join_words([clock_text(times.at(n)) for n in range(times.total())])}"
    parts: list[str] = []
    for name, values in zip(("second", "minute", "hour"), reversed(times), strict=True):
        text = _values_words(name, values)
        if parts and parts[-1].startswith("every") and text == f"every {name}":
            continue  # every 5 minutes, of every hour
        if parts or values != (0,):  # else on the minute, on the hour
            parts.append(text)
    return " of ".join(parts)


def describe_dates(rule: CronRule) -> str:
    """The dates of a cron rule in words."""
    parts = [_days_words(rule.days)]
    if rule.weeks:
        parts.append(f"in week {_list_words(sorted(rule.weeks))}")
    if len(rule.months) < 12:
        parts.append(f"in {_list_words(rule.months, ('', *map(str.title, MONTHS)))}")
    if rule.years:
        parts.append(f"in {_list_words(sorted(rule.years))}")
    return " ".join(parts)


def _days_words(rule: DayRule) -> str:
    parts = [f"day {_list_words(rule.days)}"] if 0 < len(rule.days) < 31 else []
    named = [f"{POSITIONS[n]} {WEEKDAY_NAMES[day]}" for n, day in rule.positions]
    if named := named + ["last day"] * rule.last:
        parts.append(f"the {join_words(named)} of the month")
    if len(rule.weekdays) == 7:
        return f"on {join_words(parts)}" if parts else "every day"
    weekdays = _list_words(rule.weekdays, WEEKDAY_NAMES)
    if parts:
        return f"on {join_words(parts)} {'or' if rule.either else 'if it is'} {weekdays}"
    return weekdays if len(rule.weekdays) > 1 else f"every {weekdays}"


def _values_words(name: str, values: Sequence[int]) -> str:
    allowed = range(CRON_FIELDS[name].high + 1)
    step = values[1] - values[0] if len(values) > 1 else 0
    if len(values) == len(allowed):
        return f"every {name}"
    if step and list(values) == list(allowed[::step]):
        return f"every {step} {name}s"
    return f"{name} {_list_words(values)}"


def _list_words(values: Sequence[int], names: Sequence[str] = ()) -> str:
    """`1 to 3 and 7`: numbers, or names by number, with runs of three or more drawn together."""
    parts: list[str] = []
    for _, run in groupby(enumerate(values), lambda pair: pair[1] - pair[0]):
        texts = [names[value] if names else str(value) for _, value in run]
        parts.extend([f"{texts[0]} to {texts[-1]}"] if len(texts) > 2 else texts)
    return join_words(parts)


def join_words(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def clock_text(second: int) -> str:
    """A second of the day as 02:30, or 02:30:15."""
    text = f"{second // 3600:02d}:{second // 60 % 60:02d}"
    return f"{text}:{second % 60:02d}" if second % 60 else text


def date_text(at: datetime) -> str:
    return f"{at.day} {MONTHS[at.month - 1].title()} {at.year}"


def moment_text(us: int, zone: ZoneInfo) -> str:
    at = at_of(us).astimezone(zone)
    return f"{date_text(at)} at {clock_text(at.hour * 3600 + at.minute * 60 + at.second)}"


def overlap_text(at: datetime, runs_twice: bool) -> str | None:
    """The note for a local time that occurs twice; None for any other."""
    if at.replace(fold=0).utcoffset() == at.replace(fold=1).utcoffset():
        return None
    which = "second" if at.fold else "first"
    runs = f"runs both times, this is the {which}" if runs_twice else "runs the first time"
    return f"{date_text(at)}: {at:%H:%M} happens twice, {runs}"


# Reading a trigger_config


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a `trigger_config` a reader is, and what holds there unless it says otherwise."""

    path: str
    timezone: ZoneInfo
    dst: Dst
    now_us: int
    depth: int = 1


Reader = Callable[[Any, Place], Any]  # raises ValueError with a sentence that follows the key


def read_number(low: float, high: float, kind: type[float], value: Any, place: Place) -> float:
    """A number within bounds; a whole one if `kind` is int."""
    is_number = isinstance(value, int | kind) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN compares false
        what = "whole number" if kind is int else "number"
        raise ValueError(f"must be a {what} between {low:g} and {high:g}, not {value!r:.80}")
    return kind(value)


def read_text(value: Any, place: Place) -> str:
    if not isinstance(value, str) or not 0 < len(value.strip()) <= MAX_CRON_CHARS:
        raise ValueError(f"must be text of 1 to {MAX_CRON_CHARS} characters, not {value!r:.80}")
    return " ".join(value.split())


def read_instant(value: Any, place: Place) -> int:
    """UTC microseconds of an ISO 8601 string (local if without offset) or of Unix seconds."""
    if isinstance(value, str):
        try:
            at = datetime.fromisoformat(value)
        except ValueError:
            sentence = f"{value!r:.80} is not ISO 8601, such as 2027-03-28T02:30:00+01:00"
            raise ValueError(sentence) from None
        us = us_of(at) if at.tzinfo else instant_of(at, place.timezone)
    else:
        us = round(read_number(0, LAST_US / SECOND_US, float, value, place) * SECOND_US)
    if not 0 <= us <= LAST_US:
        raise ValueError(f"{value!r} is not between the years {EPOCH.year} and {LAST_YEAR}")
    return us


def read_date(value: Any, place: Place) -> date:
    with suppress(ValueError):
        day = date.fromisoformat(read_text(value, place))
        if EPOCH.year <= day.year <= LAST_YEAR:
            return day
    raise ValueError(f"{value!r:.80} is not a date such as 2027-03-28, from 1970 to {LAST_YEAR}")


def read_cron_field(name: str, value: Any, place: Place) -> str:
    """A cron field, given as text or as a whole number, in lower case."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    text = str(value) if is_whole else read_text(value, place).lower()
    _ = parse_days(text) if name == "day" else parse_values(name, text)
    return text


def read_crontab(value: Any, place: Place) -> str:
    expression = read_text(value, place)
    compile_crontab(expression)
    return expression


def read_dst(value: Any, place: Place) -> Dst:
    if value not in list(Dst):
        raise ValueError(f"must be one of {', '.join(Dst)}, not {value!r:.80}")
    return Dst(value)


COMMON_READERS: Final[Mapping[str, Reader]] = MappingProxyType(
    {"timezone": lambda zone, _: load_zone(str(zone)), "dst": read_dst}
)
BOUND_READERS: Final[Mapping[str, Reader]] = MappingProxyType(
    {"start_time": read_instant, "end_time": read_instant}
)


def read_members(value: Any, place: Place) -> list[Trigger]:
    """The triggers within an `and` or `or`."""
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_MEMBERS:
        raise ValueError(f"must be a list of 1 to {MAX_MEMBERS} triggers")
    if place.depth == MAX_NESTING:
        raise ValueError(f"are nested deeper than {MAX_NESTING}")
    return [
        read_trigger(config, replace(place, path=f"{place.path}[{n}]", depth=place.depth + 1))
        for n, config in enumerate(value)
    ]


def read_trigger(config: Any, place: Place) -> Trigger:
    """The trigger of a `trigger_config` at a place. Raises TriggerError."""
    if not isinstance(config, Mapping):
        raise TriggerError(place.path, "a trigger is an object such as {'type': 'interval', …}")
    name = config.get("type")
    kind = TRIGGER_KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        sentence = f"type must be one of {', '.join(TRIGGER_KINDS)}, not {name!r:.80}"
        raise TriggerError(f"{place.path}.type", sentence + suggest(str(name), TRIGGER_KINDS))
    readers = {**COMMON_READERS, **kind.readers}  # common keys hold for those that follow
    for key in config:
        if key not in (known := ("type", *readers)):
            hint = suggest(str(key), known) or f"; it has {', '.join(known)}"
            sentence = f"a trigger of type {name} has no {key!r:.80}{hint}"
            raise TriggerError(f"{place.path}.{key}", sentence)
    given: dict[str, Any] = {}
    for key, read in readers.items():
        if config.get(key) is None:
            continue
        path = f"{place.path}.{key}"
        try:
            given[key] = read(config[key], replace(place, path=path))
        except ValueError as error:
            raise TriggerError(path, f"{key} {error}") from None
        if key in COMMON_READERS:
            place = replace(place, **{key: given[key]})
    common = {"type": name, "timezone": place.timezone.key, "dst": place.dst}
    start_us, end_us = given.get("start_time", 0), given.get("end_time", LAST_US)
    times = {"start_us": start_us, "end_us": end_us, "cursor_us": place.now_us}
    try:
        return kind(**{**common, **times, **kind.parse(given, place)})
    except ValueError as error:
        raise TriggerError(place.path, str(error)) from None


# Trigger classes


@dataclass
class Trigger(apscheduler.abc.Trigger):
    """A pure set of fire times between two bounds, none after LAST_YEAR.

    Its fields are its state, plain JSON. No question raises for an aware time, near or far.
    `next()` is APScheduler's iterator: it answers the first fire time after `cursor_us` and moves
    it there.
    """

    readers: ClassVar[Mapping[str, Reader]]  # of the keys of its trigger_config

    type: str
    timezone: str
    dst: Dst
    start_us: int
    end_us: int
    cursor_us: int

    @staticmethod
    @abstractmethod
    def parse(given: dict[str, Any], place: Place) -> dict[str, Any]:
        """The state of the keys given, but for its defaults. Raises ValueError."""

    def __post_init__(self) -> None:
        """Derive what is not in the state. Raises ValueError for a state that cannot be."""
        self.zone, self.dst = load_zone(self.timezone), Dst(self.dst)
        if not 0 <= self.start_us <= self.end_us <= LAST_US:
            raise ValueError("its end is before its start")

    def __getstate__(self) -> dict[str, Any]:
        return {own.name: getattr(self, own.name) for own in fields(self)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        type(self).__init__(self, **state)

    @property
    def grace_s(self) -> float:
        """How late a fire may run if its schedule does not say."""
        return CALENDAR_GRACE_S

    def next_after(self, after: datetime) -> datetime | None:
        """The first fire time strictly later than `after`, in UTC."""
        fire_us = self._next(max(us_of(after), self.start_us - 1))
        return None if fire_us is None or fire_us > self.end_us else at_of(fire_us)

    def latest_until(self, at: datetime) -> datetime | None:
        """The last fire time not later than `at`, in UTC."""
        at_us = min(us_of(at), self.end_us)
        fire_us = self._latest(at_us) if at_us >= self.start_us else None
        return None if fire_us is None or fire_us < self.start_us else at_of(fire_us)

    def count_between(self, first: datetime, last: datetime) -> int:
        """The number of fire times f with first <= f <= last."""
        first_us, last_us = max(us_of(first), self.start_us), min(us_of(last), self.end_us)
        return self._count(first_us, last_us) if first_us <= last_us else 0

    def next(self) -> datetime | None:
        fire_at = self.next_after(at_of(self.cursor_us))
        if fire_at is not None:
            self.cursor_us = us_of(fire_at)
        return fire_at

    def rebased(self, now: datetime, used_until: datetime | None) -> Trigger:
        """The trigger to go on with after the clock went back to `now`.

        `used_until` is its last fire. Times of the wall clock stay what they are: those that
        were used already are not used again. Raises TriggerError if it would end before it begins.
        """
        return self

    def note(self, fire_at: datetime) -> str | None:
        """What a clock change does to this fire, in words."""
        return None

    @abstractmethod
    def words(self) -> str:
        """When it fires, without zone and bounds."""

    @abstractmethod
    def render(self) -> str:
        """What stands in the brackets of `kind[...]`."""

    # Below all times are within the bounds, but `after_us` may lie 1 us before and be any later.

    @abstractmethod
    def _next(self, after_us: int) -> int | None: ...

    @abstractmethod
    def _latest(self, at_us: int) -> int | None: ...

    @abstractmethod
    def _count(self, first_us: int, last_us: int) -> int: ...


@dataclass
class DateTrigger(Trigger):
    """Fires once."""

    wall: str | None  # as it was given, if without offset

    readers = MappingProxyType({"run_date": lambda value, here: (value, read_instant(value, here))})

    @staticmethod
    def parse(given: dict[str, Any], place: Place) -> dict[str, Any]:
        if "run_date" not in given:
            raise ValueError("a date trigger needs run_date")
        value, run_us = given["run_date"]
        if run_us < place.now_us - CALENDAR_GRACE_S * SECOND_US:
            hours = CALENDAR_GRACE_S // 3600
            raise ValueError(f"run_date {iso_of(run_us)} is more than {hours} h in the past")
        is_wall = isinstance(value, str) and datetime.fromisoformat(value).tzinfo is None
        return {
            "start_us": run_us,
            "end_us": run_us,
            "cursor_us": min(place.now_us, run_us - 1),
            "wall": value if is_wall else None,
        }

    @property
    def at(self) -> datetime:
        """The fire time in the trigger's zone."""
        return at_of(self.start_us).astimezone(self.zone)

    def _next(self, after_us: int) -> int | None:
        return self.start_us if after_us < self.start_us else None

    def _latest(self, at_us: int) -> int | None:
        return self.start_us if at_us >= self.start_us else None

    def _count(self, first_us: int, last_us: int) -> int:
        return 1

    def note(self, fire_at: datetime) -> str | None:
        if self.wall is None:
            return None
        wall = datetime.fromisoformat(self.wall)
        if wall == self.at.replace(tzinfo=None):
            return overlap_text(self.at, runs_twice=False)
        return f"{date_text(wall)}: {wall:%H:%M} does not exist, runs at {self.at:%H:%M}"

    def words(self) -> str:
        return f"once, on {moment_text(self.start_us, self.zone)}"

    def render(self) -> str:
        return f"{self.at:%Y-%m-%d %H:%M:%S %Z}"


INTERVAL_UNITS: Final[Mapping[str, int]] = MappingProxyType(
    {"weeks": 7 * DAY_S, "days": DAY_S, "hours": 3600, "minutes": 60, "seconds": 1}
)


@dataclass
class IntervalTrigger(Trigger):
    """Fires at start + k x interval in UTC: clock changes do not touch it."""

    interval_us: int
    is_start_given: bool

    readers = MappingProxyType(
        {u: partial(read_number, 0, MAX_INTERVAL_S / s, float) for u, s in INTERVAL_UNITS.items()}
        | dict(BOUND_READERS)
    )

    @staticmethod
    def parse(given: dict[str, Any], place: Place) -> dict[str, Any]:
        length_s = sum(given.get(unit, 0) * unit_s for unit, unit_s in INTERVAL_UNITS.items())
        if not MIN_INTERVAL_S <= length_s <= MAX_INTERVAL_S:
            bounds = f"at least 1 second and at most 10 years long, not {length_s:g} s"
            units = ", ".join(INTERVAL_UNITS)
            raise ValueError(f"an interval is {bounds}; it is the sum of {units}")
        interval_us = round(length_s * SECOND_US)
        return {
            "interval_us": interval_us,
            "start_us": given.get("start_time", place.now_us + interval_us),
            "is_start_given": "start_time" in given,
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval_us < MIN_INTERVAL_S * SECOND_US:
            raise ValueError("its interval is too short")

    @property
    def grace_s(self) -> float:
        shortest, longest = INTERVAL_GRACE_S
        return min(max(self.interval_us / SECOND_US, shortest), longest)

    def rebased(self, now: datetime, used_until: datetime | None) -> Trigger:
        """A grid of nobody's choosing begins again, on other times than those used already."""
        is_far_off = us_of(now) + self.interval_us < self.start_us
        if self.is_start_given or not (is_far_off or (used_until and used_until > now)):
            return self
        start_us = us_of(now) + self.interval_us
        if (start_us - self.start_us) % self.interval_us == 0:
            start_us += 1
        return load_trigger(self.__getstate__() | {"start_us": start_us})

    def _next(self, after_us: int) -> int | None:
        return after_us + self.interval_us - (after_us - self.start_us) % self.interval_us

    def _latest(self, at_us: int) -> int | None:
        return at_us - (at_us - self.start_us) % self.interval_us

    def _count(self, first_us: int, last_us: int) -> int:
        before = (first_us - 1 - self.start_us) // self.interval_us
        return (last_us - self.start_us) // self.interval_us - before

    def words(self) -> str:
        rest, parts = self.interval_us / SECOND_US, []
        for unit, unit_s in INTERVAL_UNITS.items():
            n, rest = divmod(rest, unit_s) if unit_s > 1 else (rest, 0)
            if n:
                parts.append(f"{n:g} {unit[:-1] if n == 1 else unit}")
        return f"every {join_words(parts).removeprefix('1 ')}"

    def render(self) -> str:
        return str(timedelta(microseconds=self.interval_us))


class WallTrigger(Trigger):
    """Fires at local times of a zone: days x times of day, with the DST rule above.

    In the methods below times are whole seconds, UTC for `at`, and since 1970-01-01 00:00 local
    for `local`.
    """

    follows_clock: bool
    times: TimesOfDay

    @abstractmethod
    def month_days(self, month: int) -> Sequence[int]:
        """The matching days of a month counted from year 0, in order."""

    # Local times

    def _rank(self, local: int, first_month: int) -> int:
        """The number of matches before a local time, from the beginning of a month on."""
        day, second = divmod(local, DAY_S)
        month, day_of_month = _month_and_day(day)
        days = self.month_days(month)
        total = sum(len(self.month_days(other)) for other in range(first_month, month))
        total = (total + bisect_left(days, day_of_month)) * self.times.total()
        return total + (self.times.before(second) if day_of_month in days else 0)

    def _seek_local(self, local: int, step: int) -> int | None:
        """The first match at or after a local time, or with `step` -1 the last before it."""
        month, _ = _month_and_day(local // DAY_S)
        day, time = divmod(self._rank(local, month) - (step < 0), self.times.total())
        while FIRST_MONTH <= month <= LAST_MONTH:
            days = self.month_days(month)
            if 0 <= day < len(days):
                return _epoch_day(month, days[day]) * DAY_S + self.times.at(time)
            month += step
            day += -len(days) if step > 0 else len(self.month_days(month))
        return None

    def _count_local(self, first: int, end: int) -> int:
        """The number of matches in [first, end)."""
        month, _ = _month_and_day(first // DAY_S)
        return self._rank(end, month) - self._rank(first, month) if first < end else 0

    # The zone: local times to instants

    def _floor(self, span: Span) -> int:
        """The local time from which a span's own fires count."""
        if self.follows_clock or self.dst is Dst.BOTH:
            return span.begin + span.offset
        return span.begin + max(span.offset, span.before)

    def _skipped(self, span: Span) -> int:
        """How many fixed local times fell into the gap before a span."""
        if self.follows_clock or span.before >= span.offset:
            return 0
        return self._count_local(span.begin + span.before, span.begin + span.offset)

    def _fires_at_jump(self, span: Span) -> bool:
        return self.dst is not Dst.SKIP and self._skipped(span) > 0

    def _next(self, after_us: int) -> int | None:
        at = after_us // SECOND_US + 1
        while at * SECOND_US <= self.end_us:
            span = span_at(self.zone, at)
            if at <= span.begin and self._fires_at_jump(span):
                return span.begin * SECOND_US
            begin = max(at + span.offset, self._floor(span))
            local = self._seek_local(begin, 1)
            if local is not None and local - span.offset < span.end:
                return (local - span.offset) * SECOND_US
            # Jump near the next match: an overlap may repeat the last day of the span, and the
            # instant of a local time is not known to better than a day and a gap.
            if begin > (last_day := span.end + span.offset - DAY_S):
                local = self._seek_local(last_day, 1)
            if local is None:
                return None
            at = max(span.end, local - 2 * DAY_S)
        return None

    def _latest(self, at_us: int) -> int | None:
        at = at_us // SECOND_US
        while at * SECOND_US >= self.start_us:
            span = span_at(self.zone, at)
            end = at + 1 + span.offset
            local = self._seek_local(end, -1)
            if local is not None and local >= self._floor(span):
                return (local - span.offset) * SECOND_US
            if self._fires_at_jump(span):
                return span.begin * SECOND_US
            if end < (first_day := span.begin + span.offset + DAY_S):
                local = self._seek_local(first_day, -1)
            if local is None:
                return None
            at = min(span.begin - 1, local + 2 * DAY_S)
        return None

    def _count(self, first_us: int, last_us: int) -> int:
        at, last = -(-first_us // SECOND_US), last_us // SECOND_US
        total = 0
        while at <= last:
            span = span_at(self.zone, at)
            begin = max(at + span.offset, self._floor(span))
            total += self._count_local(begin, min(last + 1, span.end) + span.offset)
            if at <= span.begin and self._fires_at_jump(span):
                total += self._seek_local(begin, 1) != begin
            at = span.end
        return total

    def note(self, fire_at: datetime) -> str | None:
        at, fire_us = fire_at.astimezone(self.zone), us_of(fire_at)
        span = span_at(self.zone, fire_us // SECOND_US)
        begin_us = span.begin * SECOND_US
        is_first = begin_us >= self.start_us and self._next(begin_us - 1) == fire_us
        count = self._skipped(span) if is_first else 0
        if not count:
            return overlap_text(at, runs_twice=self.follows_clock or self.dst is Dst.BOTH)
        wall = at_of((self._seek_local(span.begin + span.before, 1) or 0) * SECOND_US)
        more = f" and {count - 1} more times do not exist" if count > 1 else " does not exist"
        then = "skipped" if self.dst is Dst.SKIP else f"runs at {at:%H:%M}"
        return f"{date_text(wall)}: {wall:%H:%M}{more}, {then}"


@dataclass
class CronTrigger(WallTrigger):
    """Fires at the local times that match APScheduler's cron fields or a crontab expression."""

    fields: Mapping[str, str]
    expression: str | None

    readers = MappingProxyType(
        {name: partial(read_cron_field, name) for name in CRON_FIELDS}
        | {"expression": read_crontab, **BOUND_READERS}
    )

    @staticmethod
    def parse(given: dict[str, Any], place: Place) -> dict[str, Any]:
        fields = {name: given[name] for name in CRON_FIELDS if name in given}
        if bool(fields) == ("expression" in given):
            raise ValueError(f"give either an expression or some of {', '.join(CRON_FIELDS)}")
        return {"fields": fields, "expression": given.get("expression")}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rule = (
            compile_crontab(self.expression)
            if self.expression is not None
            else compile_cron_fields(tuple(self.fields.items()))
        )
        self.times, self.follows_clock = self.rule.times, self.rule.follows_clock

    def month_days(self, month: int) -> Sequence[int]:
        rule, (year, index) = self.rule, divmod(month, 12)
        if index + 1 not in rule.months or (rule.years and year not in rule.years):
            return ()
        days = days_of_month(rule.days, *monthrange(year, index + 1))
        if not rule.weeks:
            return days
        return [d for d in days if date(year, index + 1, d).isocalendar().week in rule.weeks]

    def words(self) -> str:
        times, dates = describe_times(self.times), describe_dates(self.rule)
        if times.startswith("at "):
            return f"{dates} {times}"
        return times if dates == "every day" else f"{times}, {dates}"

    def render(self) -> str:
        if self.expression is not None:
            return f"expression={self.expression!r}"
        return ", ".join(f"{name}={text!r}" for name, text in self.fields.items())


CALENDAR_FIELDS: Final[Mapping[str, int]] = MappingProxyType(
    {"years": 10, "months": 120, "weeks": 520, "days": 3660, "hour": 23, "minute": 59, "second": 59}
)


@dataclass
class CalendarIntervalTrigger(WallTrigger):
    """Fires every n days or months, at one time of day; on the last of a month too short for it."""

    months: int
    days: int
    anchor: str  # the date to count from
    time: Sequence[int]  # hour, minute and second

    readers = MappingProxyType(
        {name: partial(read_number, 0, most, int) for name, most in CALENDAR_FIELDS.items()}
        | {"start_date": read_date, "end_date": read_date}
    )

    @staticmethod
    def parse(given: dict[str, Any], place: Place) -> dict[str, Any]:
        months = given.get("years", 0) * 12 + given.get("months", 0)
        days = given.get("weeks", 0) * 7 + given.get("days", 0)
        if bool(months) == bool(days):
            raise ValueError("give either years and months or weeks and days")
        anchor = given.get("start_date", at_of(place.now_us).astimezone(place.timezone).date())
        end = given.get("end_date", date(LAST_YEAR, 12, 31)) + timedelta(days=1)
        first, last = (datetime(day.year, day.month, day.day) for day in (anchor, end))
        return {
            "months": months,
            "days": days,
            "anchor": anchor.isoformat(),
            "time": [given.get(name, 0) for name in ("hour", "minute", "second")],
            "start_us": max(0, instant_of(first, place.timezone)),
            "end_us": min(instant_of(last, place.timezone) - 1, LAST_US),
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.first = date.fromisoformat(self.anchor)
        hour, minute, second = self.time
        self.times, self.follows_clock = TimesOfDay((hour,), (minute,), (second,)), False
        if max(self.months, self.days) < 1:
            raise ValueError("its interval is empty")

    def month_days(self, month: int) -> Sequence[int]:
        length = monthrange(month // 12, month % 12 + 1)[1]
        if self.days:
            first = self.first.toordinal() - EPOCH_ORDINAL
            return range((first - _epoch_day(month, 1)) % self.days + 1, length + 1, self.days)
        if (month - self.first.year * 12 - self.first.month + 1) % self.months:
            return ()
        return (min(self.first.day, length),)

    def words(self) -> str:
        if self.days:
            size, unit = (7, "week") if self.days % 7 == 0 else (1, "day")
            on = f" on {WEEKDAY_NAMES[self.first.weekday()]}" if size == 7 else ""
        else:
            size, unit = (12, "year") if self.months % 12 == 0 else (1, "month")
            on = f" on day {self.first.day}" + (" or the last" if self.first.day > 28 else "")
            on += f" of {MONTHS[self.first.month - 1].title()}" if size == 12 else ""
        n = (self.days or self.months) // size
        every = f"every {unit}" if n == 1 else f"every {n} {unit}s"
        return f"{every}{on} {describe_times(self.times)}"

    def render(self) -> str:
        length = f"days={self.days}" if self.days else f"months={self.months}"
        clock = clock_text(self.times.at(0))
        return f"{length}, time='{clock}', start_date='{self.anchor}'"


@dataclass
class AndTrigger(WallTrigger):
    """Fires at the local times that all its members match: wall-clock triggers of one zone."""

    triggers: Sequence[Mapping[str, Any]]  # the states of its members

    readers = MappingProxyType({"triggers": read_members})

    @staticmethod
    def parse(given: dict[str, Any], place: Place) -> dict[str, Any]:
        members = given.get("triggers", [])
        if not members or not all(isinstance(member, WallTrigger) for member in members):
            raise ValueError("an `and` needs triggers, of type cron, calendar_interval or and")
        if len({(member.zone, member.dst) for member in members}) > 1:
            raise ValueError("the triggers of an `and` must have the same timezone and dst")
        return {
            "triggers": [member.__getstate__() for member in members],
            "timezone": members[0].zone.key,
            "dst": members[0].dst.value,
            "start_us": max(member.start_us for member in members),
            "end_us": min(member.end_us for member in members),
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        members = map(load_trigger, self.triggers)
        self.members = [member for member in members if isinstance(member, WallTrigger)]
        all_times = zip(*(member.times for member in self.members), strict=True)
        self.times = TimesOfDay(*(tuple(sorted(set.intersection(*map(set, v)))) for v in all_times))
        self.follows_clock = all(member.follows_clock for member in self.members)
        if not self.times.total():
            raise ValueError("its triggers have no time of day in common")

    def month_days(self, month: int) -> Sequence[int]:
        all_days = [set(member.month_days(month)) for member in self.members]
        return sorted(set.intersection(*all_days))

    def words(self) -> str:
        return " and also ".join(member.words() for member in self.members)

    def render(self) -> str:
        return ", ".join(map(render_trigger, self.members))


@dataclass
class OrTrigger(Trigger):
    """Fires when any of its members does; a time that several share is one fire.

    `count_between` counts shared times once up to OR_EXACT_COUNT, and per member beyond.
    """

    triggers: Sequence[Mapping[str, Any]]  # the states of its members

    readers = MappingProxyType({"triggers": read_members})

    @staticmethod
    def parse(given: dict[str, Any], place: Place) -> dict[str, Any]:
        members = given.get("triggers", [])
        if not members:
            raise ValueError("an `or` needs triggers")
        return {
            "triggers": [member.__getstate__() for member in members],
            "start_us": min(member.start_us for member in members),
            "end_us": max(member.end_us for member in members),
            "cursor_us": min(member.cursor_us for member in members),
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.members = list(map(load_trigger, self.triggers))

    @property
    def grace_s(self) -> float:
        return min(member.grace_s for member in self.members)

    def rebased(self, now: datetime, used_until: datetime | None) -> Trigger:
        members = [member.rebased(now, used_until) for member in self.members]
        start_us = min(member.start_us for member in members)
        changed = {"triggers": [member.__getstate__() for member in members], "start_us": start_us}
        return load_trigger(self.__getstate__() | changed)

    def note(self, fire_at: datetime) -> str | None:
        firing = (m for m in self.members if m.latest_until(fire_at) == fire_at)
        return "; ".join(dict.fromkeys(filter(None, (m.note(fire_at) for m in firing)))) or None

    def _next(self, after_us: int) -> int | None:
        after = at_of(min(after_us, LAST_US))
        fires = (member.next_after(after) for member in self.members)
        return min(map(us_of, filter(None, fires)), default=None)

    def _latest(self, at_us: int) -> int | None:
        fires = (member.latest_until(at_of(at_us)) for member in self.members)
        return max(map(us_of, filter(None, fires)), default=None)

    def _count(self, first_us: int, last_us: int) -> int:
        first, last = at_of(first_us), at_of(last_us)
        total = sum(member.count_between(first, last) for member in self.members)
        if total > OR_EXACT_COUNT:
            return total
        count, at_us = 0, self._next(first_us - 1)
        while at_us is not None and at_us <= last_us:
            count, at_us = count + 1, self._next(at_us)
        return count

    def words(self) -> str:
        return " or ".join(member.words() for member in self.members)

    def render(self) -> str:
        return ", ".join(map(render_trigger, self.members))


TRIGGER_KINDS: Final[Mapping[str, type[Trigger]]] = MappingProxyType(
    {
        "date": DateTrigger,
        "interval": IntervalTrigger,
        "cron": CronTrigger,
        "calendar_interval": CalendarIntervalTrigger,
        "and": AndTrigger,
        "or": OrTrigger,
    }
)


# Triggers in and out


def parse_trigger(config: Mapping[str, Any], *, timezone: str, now: datetime) -> Trigger:
    """The trigger of a `trigger_config`; `timezone` is the zone of those that name none.

    Raises TriggerError for a config that is malformed, out of bounds or can never fire.
    """
    try:
        zone = load_zone(timezone)
    except ValueError as error:
        raise TriggerError("timezone", str(error)) from None
    trigger = read_trigger(config, Place("trigger_config", zone, Dst.DEBIAN, us_of(now)))
    if trigger.next_after(at_of(trigger.cursor_us)) is None:
        end = iso_of(trigger.end_us) if trigger.end_us < LAST_US else f"the end of {LAST_YEAR}"
        sentence = f"it would never fire: no time until {end} matches {render_trigger(trigger)}"
        raise TriggerError("trigger_config", sentence)
    return trigger


def load_trigger(state: Mapping[str, Any]) -> Trigger:
    """The trigger of a stored state. Raises TriggerError if it cannot be used any more."""
    try:
        return TRIGGER_KINDS[state["type"]](**state)
    except ValueError as error:
        raise TriggerError("trigger", str(error)) from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        sentence = f"the stored trigger cannot be read: {type(error).__name__}: {error}"
        raise TriggerError("trigger", sentence) from error


def render_trigger(trigger: Trigger) -> str:
    """The trigger as APScheduler writes it, such as `interval[1:00:00]`."""
    return f"{trigger.type}[{trigger.render()}]"


def describe_trigger(trigger: Trigger) -> str:
    """The trigger in words, such as `every day at 02:30 Europe/Berlin`."""
    words = trigger.words()
    if not isinstance(trigger, IntervalTrigger):
        words += f" {trigger.zone.key}"
    if isinstance(trigger, CronTrigger | IntervalTrigger):
        if trigger.start_us and getattr(trigger, "is_start_given", True):
            words += f", from {moment_text(trigger.start_us, trigger.zone)}"
        if trigger.end_us < LAST_US:
            words += f", until {moment_text(trigger.end_us, trigger.zone)}"
    return words


class FirePreview(NamedTuple):
    """One coming fire: the instant, the local time with its offset, what the clock does to it."""

    fire_at: datetime
    local: str
    note: str | None


def preview_fire_times(trigger: Trigger, now: datetime, n: int) -> list[FirePreview]:
    """The next n fires after `now`, or as many as there are."""
    previews: list[FirePreview] = []
    fire_at = trigger.next_after(now)
    while fire_at is not None and len(previews) < n:
        local = fire_at.astimezone(trigger.zone).isoformat(sep=" ", timespec="seconds")
        previews.append(FirePreview(fire_at, local, trigger.note(fire_at)))
        fire_at = trigger.next_after(fire_at)
    return previews


# Fire planning


class Fire(NamedTuple):
    """What becomes of a due fire time: one row, which may stand for further ones."""

    nominal_at: datetime
    run: bool
    reason: Reason | None = None  # why it does not run, or why others are on it
    coalesced: int = 0  # further fire times this row stands for
    coalesced_from: datetime | None = None  # the earliest of them


class FirePlan(NamedTuple):
    """The rows of what is due, in time order, and the next fire time."""

    fires: tuple[Fire, ...]
    next_fire_at: datetime | None


def plan_fires(
    trigger: Trigger,
    due_at: datetime,
    now: datetime,
    *,
    coalesce: Coalesce,
    grace_s: float,
    reason: Reason | None,
) -> FirePlan:
    """Decide what becomes of `due_at` and of every fire time since, up to `now`.

    Each of them is accounted for exactly once, as a row or on one. `due_at` counts as a fire time
    even if the trigger has been changed and does not produce it. `reason` says why several are
    due at once; TOO_LATE is assumed. The work is bounded by MAX_COALESCE_ALL.
    """
    if due_at > now:
        return FirePlan((), due_at)
    newest, total, next_at = due_at, 1, trigger.next_after(due_at)
    if next_at is not None and next_at <= now:  # else, as nearly always, one fire is due
        newest = trigger.latest_until(now) or next_at
        total += trigger.count_between(next_at, newest)
        next_at = trigger.next_after(now)
    is_on_time = (now - newest).total_seconds() <= ON_TIME_S
    most_runs = MAX_COALESCE_ALL if coalesce is Coalesce.ALL else 1
    if coalesce is Coalesce.NONE and total > 1 and not is_on_time:
        most_runs = 0

    runs: list[Fire] = []
    at: datetime | None = newest
    while at and len(runs) < most_runs and (now - at).total_seconds() <= grace_s:
        runs.insert(0, Fire(at, run=True))
        earlier = (trigger.latest_until(at - MICROSECOND) or due_at) if at > due_at else None
        at = earlier and max(earlier, due_at)
    if at is None:
        return FirePlan(tuple(runs), next_at)
    rest, reason = max(1, total - len(runs)), reason or Reason.TOO_LATE
    if runs and coalesce is Coalesce.LATEST:
        return FirePlan((Fire(newest, True, reason, rest, due_at),), next_at)
    missed = Fire(at, False, reason, rest - 1, due_at if rest > 1 else None)
    return FirePlan((missed, *runs), next_at)


def jitter_s(schedule_id: str, nominal_at: datetime, max_jitter: float) -> float:
    """The start delay of a fire in [0, max_jitter) seconds; always the same for the same fire."""
    key = f"{schedule_id}@{us_of(nominal_at)}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / (1 << 53) * max_jitter


# --- Clock guard ------------------------------------------------------------------------------

STEP_US: Final = 1_000_000  # wall and monotonic clock apart by more within a turn: a step
FROZEN_S: Final = 5.0  # looks are at most two seconds apart
HOLD_S: Final = 120.0  # how long fires wait for a clock that is behind the database


@dataclass(frozen=True, slots=True)
class ClockReading:
    """What one look at both clocks showed."""

    step_us: int  # how far the wall clock was set, or slept; 0 for none
    holding: str | None  # why fires must wait; None if they need not
    released: bool = False  # this look ended a hold without the clock having caught up
    froze: bool = False  # long after the last look: the process was stopped or starved


class ClockGuard:
    """Compares the wall clock with the monotonic one, look by look. Pure: times are passed in."""

    def __init__(self, now_us: int, monotonic_s: float, seen_us: int) -> None:
        """`seen_us`: the latest wall time the database knows of; 0 if it is new."""
        self._hold_until_us = seen_us if now_us < seen_us - STEP_US else 0
        self._hold_until_s = monotonic_s + HOLD_S
        self._looked_s = monotonic_s
        self._offset_us = now_us - round(monotonic_s * 1e6)

    def observe(self, now_us: int, monotonic_s: float) -> ClockReading:
        """Compare with the last look."""
        offset_us = now_us - round(monotonic_s * 1e6)
        step_us = offset_us - self._offset_us
        if abs(step_us) < STEP_US:
            step_us = 0
        froze = monotonic_s - self._looked_s > FROZEN_S
        self._offset_us, self._looked_s = offset_us, monotonic_s
        behind_us = self._hold_until_us - now_us
        if behind_us > 0 and monotonic_s < self._hold_until_s:
            behind = f"{behind_us // SECOND_US} s behind the last time the database saw"
            return ClockReading(step_us, f"the clock is {behind}", froze=froze)
        self._hold_until_us = 0
        return ClockReading(step_us, None, behind_us > 0, froze)


# --- Store ------------------------------------------------------------------------------------
#
# One file, two connections. The writer thread owns the only connection that writes or
# checkpoints (SQLite before 3.51.3 can reset the WAL wrongly with two); the event loop owns a
# read-only one. A change is a function of a cursor of the writing one; the writer collects what
# is queued and commits it in one transaction, so that 32 clients share one flush.

SCHEMA_VERSION: Final = 6
APPLICATION_ID: Final = 0x535A6462  # "SZdb", in the header of each database of ours
PAGE_BYTES: Final = 512  # a small commit writes a third of what it would with SQLite's 4096
CHECKPOINT_PAGES: Final = 8000
CACHE_KIB: Final = 1024  # per connection
MAX_WRITES_QUEUED: Final = 20_000
AUDIT_KEPT: Final = 10_000  # entries of what was accepted; a later one takes the oldest's slot
REFUSALS_KEPT: Final = 2_000  # these have slots of their own: strangers must not wash out the rest
RECEIPT_LIFE_US: Final = 86_400_000_000  # so long a repeated request is known by its key
RECEIPTS_KEPT: Final = 10_000  # the newest; the keys of older ones count as new
MAX_NOTES: Final = 2_000  # audit entries that wait for a commit
NOTE_S: Final = 1.0  # how long they wait before there is one for them alone
MAX_GROUP: Final = 512  # changes in one commit; bounds how long the first of them waits
MAX_PAGE_BYTES: Final = 4 << 20  # bounds how long reading and rendering a page holds up the loop
BUSY_MS: Final = 5_000
READ_BUSY_MS: Final = 250  # reads wait on the event loop
BALLAST_BYTES: Final = 2 << 20
RECHECK_S: Final = 2.0  # for the look at a database after an error of the disk
HUNG_S: Final = 15.0  # a commit that takes longer: the disk does not answer
CLOSE_WRITER_S: Final = 10.0
TRIGGERS_CACHED: Final = 1_024
PLANS_CACHED: Final = 128  # of schedules that are alike and due in the same turn
DUE_AHEAD: Final = 1_000  # due schedules found by one scan; APScheduler takes a hundred a turn
MAX_PRUNED: Final = 10_000  # looked for at once
PRUNE_ROWS: Final = 200  # deleted per transaction, so that pruning never holds up a fire
SPREAD_AFTER_US: Final = 1_000_000
NEXT_WAKE_S: Final = (0.001, 2.0)  # how soon and how late APScheduler looks again
ID_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, in lower case
ID_CHARS: Final = 12
ID_PAIRS: Final = tuple(a + b for a in ID_ALPHABET for b in ID_ALPHABET)  # of ten bits each
MAX_ID: Final = (1 << 5 * ID_CHARS) - 1
# To the digits that int() reads in base 32, which is ten times as fast as a loop; "?" is none.
ID_DIGITS: Final = bytes(
    b"0123456789abcdefghijklmnopqrstuv"[ID_ALPHABET.index(char)] if char in ID_ALPHABET else 63
    for char in map(chr, range(256))
)

SCHEMA: Final = (
    """
    CREATE TABLE schedules (
        key INTEGER PRIMARY KEY AUTOINCREMENT,
        schedule_id TEXT NOT NULL UNIQUE,
        name TEXT,
        handler_id TEXT NOT NULL,
        method_name TEXT NOT NULL,
        job_params TEXT NOT NULL,
        trigger_config TEXT NOT NULL,
        trigger_state TEXT NOT NULL,
        timeout REAL,
        retry TEXT,
        coalesce_policy TEXT NOT NULL,
        overlap TEXT NOT NULL,
        misfire_grace_time REAL,
        max_jitter REAL NOT NULL,
        paused INTEGER NOT NULL,
        origin TEXT NOT NULL,
        created_us INTEGER NOT NULL,
        updated_us INTEGER NOT NULL,
        next_fire_us INTEGER,
        last_fire_us INTEGER,
        generation INTEGER NOT NULL,
        quarantined TEXT
    ) STRICT;
    CREATE INDEX schedules_due ON schedules (next_fire_us)
        WHERE paused = 0 AND quarantined IS NULL AND next_fire_us IS NOT NULL;
    CREATE TABLE executions (
        id INTEGER PRIMARY KEY,
        schedule_id TEXT,
        schedule_key INTEGER,
        fire_us INTEGER,
        handler_id TEXT NOT NULL,
        method_name TEXT NOT NULL,
        job_params TEXT NOT NULL,
        status TEXT NOT NULL,
        created_us INTEGER NOT NULL,
        due_us INTEGER NOT NULL,
        deadline_us INTEGER,
        started_us INTEGER,
        completed_us INTEGER,
        duration_us INTEGER,
        attempt INTEGER NOT NULL,
        retry TEXT NOT NULL,
        timeout REAL NOT NULL,
        overlap TEXT NOT NULL,
        instance TEXT,
        result TEXT,
        error TEXT,
        reason TEXT,
        coalesced INTEGER NOT NULL,
        coalesced_from_us INTEGER,
        cancelling TEXT
    ) STRICT;
    CREATE UNIQUE INDEX executions_fire ON executions (schedule_id, fire_us, schedule_key)
        WHERE schedule_id IS NOT NULL;
    CREATE INDEX executions_live ON executions (id) WHERE completed_us IS NULL;
    CREATE TABLE attempts (
        id INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        instance TEXT,
        started_us INTEGER NOT NULL,
        ended_us INTEGER,
        outcome TEXT NOT NULL,
        error TEXT,
        traceback TEXT,
        PRIMARY KEY (id, attempt)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE logs (id INTEGER PRIMARY KEY, log TEXT NOT NULL) STRICT;
    CREATE TABLE handlers (
        handler_id TEXT PRIMARY KEY,
        address TEXT NOT NULL,
        methods TEXT NOT NULL,
        last_seen_us INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE tasks (task_id TEXT PRIMARY KEY, definition TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE audit (
        slot INTEGER PRIMARY KEY,
        number INTEGER NOT NULL,
        at_us INTEGER NOT NULL,
        actor TEXT NOT NULL,
        address TEXT NOT NULL,
        action TEXT NOT NULL,
        target TEXT NOT NULL,
        status INTEGER
    ) STRICT;
    """,
    # What is live is among the newest rows; an index of it would cost two pages for every run.
    "DROP INDEX executions_live;",
    """
    CREATE TABLE receipts (
        number INTEGER PRIMARY KEY,
        scope TEXT NOT NULL,
        key TEXT NOT NULL,
        digest BLOB NOT NULL,
        made_us INTEGER NOT NULL,
        made TEXT NOT NULL,
        UNIQUE (scope, key)
    ) STRICT;
    """,
    # What each fire writes is apart from what is written once, which may be large. Without an
    # index of the due times: to scan a thousand of them takes less than to write two pages more.
    """
    ALTER TABLE schedules RENAME TO definitions;
    CREATE TABLE states (
        key INTEGER PRIMARY KEY,
        paused INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        next_fire_us INTEGER,
        last_fire_us INTEGER,
        quarantined TEXT
    ) STRICT;
    INSERT INTO states
        SELECT key, paused, generation, next_fire_us, last_fire_us, quarantined FROM definitions;
    DROP INDEX schedules_due;
    ALTER TABLE definitions DROP COLUMN paused;
    ALTER TABLE definitions DROP COLUMN generation;
    ALTER TABLE definitions DROP COLUMN next_fire_us;
    ALTER TABLE definitions DROP COLUMN last_fire_us;
    ALTER TABLE definitions DROP COLUMN quarantined;
    CREATE VIEW schedules AS SELECT * FROM definitions LEFT JOIN states USING (key);
    """,
    # Without the handler's id, which is in the row already, most rows fit three to a page.
    """
    UPDATE executions SET instance = substr(instance, length(handler_id) + 2)
    WHERE instance IS NOT NULL;
    """,
)
"""The statements that lead from each schema version to the next; the length is the version."""

log_store = logging.getLogger("schedulezero.store")


def encode_id(number: int) -> str:
    """The 12 characters users see for an execution's row id; they sort as the numbers do."""
    n, pairs = number, ID_PAIRS
    return (
        f"{pairs[n >> 50]}{pairs[n >> 40 & 1023]}{pairs[n >> 30 & 1023]}"
        f"{pairs[n >> 20 & 1023]}{pairs[n >> 10 & 1023]}{pairs[n & 1023]}"
    )


def first_id_of(us: int) -> int:
    """The lowest row id of an execution made at a database time; none made later is lower."""
    return min(max(us, 0) // 1000 << 16, MAX_ID)


def decode_id(text: str) -> int | None:
    """The row id of an execution id, or None if it is none."""
    digits = text.encode(errors="replace").translate(ID_DIGITS)
    if len(digits) != ID_CHARS or b"?" in digits:
        return None
    return int(digits, 32)


@lru_cache(maxsize=64)
def dump_retry(retry: RetryPolicy | None) -> str | None:
    """Numbers without the ".0" of whole ones: each execution has them."""
    if retry is None:
        return None
    values = retry.max_attempts, retry.base_delay, retry.factor, retry.max_delay, retry.jitter
    return dump_json([int(value) if value == int(value) else value for value in values])


@lru_cache(maxsize=64)
def load_retry(text: str | None) -> RetryPolicy | None:
    if text is None:
        return None
    max_attempts, *values = json.loads(text)
    return RetryPolicy(max_attempts, *map(float, values))


# The columns have the order of the fields, so that most of a row is the value as it is.
SCHEDULE_NAMES: Final = tuple(
    {"coalesce": "coalesce_policy"}.get(own.name, own.name) for own in fields(Schedule)
)
SCHEDULE_COLUMNS: Final = ", ".join(SCHEDULE_NAMES)
STATE_NAMES: Final = (
    "key", "paused", "generation", "next_fire_us", "last_fire_us", "quarantined",
)  # fmt: skip
DEFINITION_NAMES: Final = tuple(name for name in SCHEDULE_NAMES if name not in STATE_NAMES[1:])
EXECUTION_NAMES: Final = ("id", *Execution._fields[1:])
EXECUTION_COLUMNS: Final = ", ".join(EXECUTION_NAMES)


TRIGGER_CURSOR: Final = re.compile(r'"cursor_us":-?\d+')


def dump_state(trigger_state: Mapping[str, Any]) -> str:
    """A trigger as it is stored: without the place of its `next()`, which the store never asks
    for, so that all alike are one text.
    """
    return TRIGGER_CURSOR.sub('"cursor_us":0', dump_json(trigger_state))


def insert_into(table: str, names: Collection[str]) -> str:
    return f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"


def update_key(table: str, names: Iterable[str]) -> str:
    return f"UPDATE {table} SET {', '.join(f'{name} = :{name}' for name in names)} WHERE key = :key"


def schedule_values(s: Schedule) -> dict[str, Any]:
    """What is stored of a schedule, by SCHEDULE_NAMES."""
    values = (
        s.schedule_id, s.handler_id, s.method_name, dump_json(s.job_params),
        dump_json(s.trigger_config), dump_state(s.trigger_state), s.name, s.timeout,
        dump_retry(s.retry), s.coalesce.value, s.overlap.value, s.misfire_grace_time,
        s.max_jitter, int(s.paused), s.origin, s.created_us, s.updated_us, s.next_fire_us,
        s.last_fire_us, s.generation, s.quarantined, s.key,
    )  # fmt: skip
    return dict(zip(SCHEDULE_NAMES, values, strict=True))


def schedule_of(row: Sequence[Any]) -> Schedule:
    """The value of a row of SCHEDULE_COLUMNS; of a damaged one what is left, quarantined."""
    try:
        values = (
            *row[:3], *map(json.loads, row[3:6]), *row[6:8], load_retry(row[8]), Coalesce(row[9]),
            Overlap(row[10]), *row[11:13], bool(row[13]), *row[14:],
        )  # fmt: skip
        return Schedule(*values)
    except (ValueError, TypeError) as error:
        return Schedule(
            str(row[0]), str(row[1]), str(row[2]), {}, {}, {}, origin=str(row[14]),
            next_fire_us=row[17], generation=row[19], key=row[21],
            quarantined=f"its row in the database is damaged: {error}",
        )  # fmt: skip


def dump_instance(e: Execution) -> str | None:
    """What follows the handler's id, which is in the row already."""
    return None if e.instance is None else e.instance.removeprefix(f"{e.handler_id}/")


def execution_row(e: Execution) -> tuple[Any, ...]:
    """The values of EXECUTION_COLUMNS; plain texts, as sqlite3 is slow to bind an enum."""
    result = None if e.result is None else dump_json(e.result)
    return (
        decode_id(e.execution_id), *e[1:4], dump_json(e.job_params), e.status.value, *e[6:13],
        dump_retry(e.retry), e.timeout, e.overlap.value, dump_instance(e), result, *e[18:],
    )  # fmt: skip


def execution_of(row: Sequence[Any]) -> Execution:
    """The value of a row of EXECUTION_COLUMNS; of a damaged one what is left, as lost."""
    try:
        values = (
            encode_id(row[0]), *row[1:4], json.loads(row[4]), Status(row[5]), *row[6:13],
            load_retry(row[13]) or RetryPolicy(), row[14], Overlap(row[15]),
            None if row[16] is None else f"{row[2]}/{row[16]}",
            None if row[17] is None else json.loads(row[17]), *row[18:],
        )  # fmt: skip
        return Execution._make(values)
    except (ValueError, TypeError) as error:
        return Execution(
            encode_id(row[0]), row[1], str(row[2]), str(row[3]), {}, Status.LOST, row[6], row[7],
            None, completed_us=row[10] or row[6],
            error=f"its row in the database is damaged: {error}",
        )  # fmt: skip


INSERT_DEFINITION: Final = insert_into("definitions", DEFINITION_NAMES)
INSERT_STATE: Final = insert_into("states", STATE_NAMES)
UPDATE_DEFINITION: Final = update_key("definitions", DEFINITION_NAMES)
UPDATE_STATE: Final = update_key("states", STATE_NAMES)
INSERT_EXECUTION: Final = insert_into("executions", EXECUTION_NAMES) + " ON CONFLICT DO NOTHING"
CLAIM_EXECUTION: Final = (
    "UPDATE executions SET status = 'running', attempt = ?, started_us = ?, instance = ? "
    "WHERE id = ? AND status = 'queued'"
)
END_EXECUTION: Final = (
    "UPDATE executions SET status = ?, completed_us = ?, duration_us = ?, result = ?, error = ?, "
    "reason = ? "
    "WHERE id = ? AND attempt = ? AND completed_us IS NULL"
)
REQUEUE_EXECUTION: Final = (
    "UPDATE executions SET status = 'queued', due_us = ?, error = ?, attempt = ?, "
    "started_us = iif(? > 0, started_us, NULL), instance = NULL "
    "WHERE id = ? AND attempt = ? AND status = 'running'"
)
SAVE_LIVE_ID: Final = """
    INSERT OR REPLACE INTO meta
    SELECT 'live_id', coalesce(min(id) FILTER (WHERE completed_us IS NULL), max(id), 0)
    FROM executions WHERE id >= ifnull((SELECT value FROM meta WHERE key = 'live_id'), 0)
"""
INSERT_AUDIT: Final = "INSERT OR REPLACE INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
INSERT_RECEIPT: Final = insert_into("receipts", ("scope", "key", "digest", "made_us", "made"))
REFUSE_AUDIT: Final = "UPDATE audit SET status = ? WHERE slot = ? AND number = ?"
INSERT_ATTEMPT: Final = "INSERT OR REPLACE INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
ADVANCE_SCHEDULE: Final = (
    "UPDATE states SET last_fire_us = ?, next_fire_us = ? "
    "WHERE key = ? AND generation = ? AND next_fire_us = ?"
)


class DiskFull(StoreUnavailable):
    """There is no room for the change; what runs can still end. Passes when there is room."""

    code = "disk_full"


class DatabaseDamaged(StoreUnavailable):
    """The file is not what was written to it. A new start looks at it and rebuilds it."""

    code = "database_damaged"


class DatabaseRefused(StoreUnavailable):
    """The file is sound but not for this program: of another one, or of a newer version."""

    code = "database_refused"


FAULTS: Final[Mapping[int, str]] = MappingProxyType(
    {
        sqlite3.SQLITE_BUSY: "another program has locked the database",
        sqlite3.SQLITE_LOCKED: "another program has locked the database",
        sqlite3.SQLITE_PROTOCOL: "another program has locked the database",
        sqlite3.SQLITE_FULL: "the disk is full",
        sqlite3.SQLITE_IOERR: "the disk reports an error",
        sqlite3.SQLITE_READONLY: "the database cannot be written to",
        sqlite3.SQLITE_PERM: "the database cannot be written to",
        sqlite3.SQLITE_CANTOPEN: "the database cannot be opened",
        sqlite3.SQLITE_CORRUPT: "the database is damaged",
        sqlite3.SQLITE_NOTADB: "the database is damaged",
        sqlite3.SQLITE_NOMEM: "there is no memory for the database",
        sqlite3.SQLITE_INTERRUPT: "the database was interrupted",
    }
)
"""SQLite's primary result codes that no change is to blame for (sqlite.org/rescode.html)."""

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
LOCKED: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def fault_code(error: BaseException) -> int | None:
    """Which of FAULTS an exception of sqlite3 tells of, None if the change is to blame."""
    if isinstance(error, MemoryError):
        return sqlite3.SQLITE_NOMEM
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says which call it was
    return code if code in FAULTS else None


def describe_fault(error: BaseException, path: str) -> StoreUnavailable:
    """The failure of disk or database that an exception tells of, in a sentence."""
    code = fault_code(error)
    sentence, about = FAULTS.get(code or 0, "the database did not take the change"), str(error)
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        # SQLite does not say why; another write beside it may meet the same cause.
        cause = find_cause(path)
        if cause in NO_ROOM:
            code = sqlite3.SQLITE_FULL
        elif cause == errno.EROFS:
            return StoreUnavailable("the file system of the database is read-only")
        elif cause is not None:
            about = os.strerror(cause)
    if code == sqlite3.SQLITE_FULL:
        return DiskFull("the disk is full: changes are refused until there is room")
    kind = DatabaseDamaged if code in DAMAGED else StoreUnavailable
    return kind(f"{sentence}: {about}")


def find_cause(path: str) -> int | None:
    """The errno of writing a new file beside another one, None if that can be done."""
    beside = path + ".probe"
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.write(fd, bytes(PAGE_BYTES))
            os.fsync(fd)
        finally:
            os.close(fd)
            os.unlink(beside)
    except OSError as error:
        return error.errno
    return None


def room_bytes(path: str) -> int:
    """What can be written beside a file; without limit where the system does not tell."""
    try:
        about = os.statvfs(os.path.dirname(path))
    except OSError:
        return sys.maxsize
    return about.f_bavail * about.f_frsize


# A text that is not UTF-8: the page it stands on was damaged within the row.
decode_damaged: Final = partial(str, encoding="utf-8", errors="replace")


def open_writing(path: str) -> sqlite3.Connection:
    """Open or create the database for the writer thread, its schema brought up to date.

    Raises DatabaseRefused, the file left as it was; StoreUnavailable with a sentence when it
    cannot be opened, DiskFull when that is why.
    """
    try:
        db = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, timeout=BUSY_MS / 1000
        )
        db.text_factory = decode_damaged
        try:
            db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            version = schema_version(db)  # before anything is written
            if 0 < version < SCHEMA_VERSION:
                ensure_room(path)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            migrate(db, version)
            mend_pairs(db)
        except BaseException:
            db.close()
            raise
    except sqlite3.Error as error:
        raise describe_fault(error, path) from error
    return db


def schema_version(db: sqlite3.Connection) -> int:
    """The schema version of a database, 0 of one without tables. Raises DatabaseRefused."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION_ID:
        raise DatabaseRefused("the file is a database of another program")
    if version > SCHEMA_VERSION:
        raise DatabaseRefused(
            f"the database has schema version {version}, this program knows up to "
            f"{SCHEMA_VERSION}: start the newer program"
        )
    return version if tables else 0


def ensure_room(path: str) -> None:
    """Raise DiskFull if a transaction that changes most pages of a database may find no room.

    Else it would be tried at each new start, and write all that there is room for.
    """
    needed, free = size_of(path), room_bytes(path)
    if free < needed:
        raise DiskFull(
            f"the disk is full: this version has to rewrite the database once, for which "
            f"{needed / 1e6:.1f} MB must be free, and {free / 1e6:.1f} MB are"
        )


def migrate(db: sqlite3.Connection, version: int) -> None:
    """Bring the schema to SCHEMA_VERSION, in one transaction."""
    if version < SCHEMA_VERSION:
        db.executescript(
            f"BEGIN; {'; '.join(SCHEMA[version:])}; PRAGMA application_id = {APPLICATION_ID}; "
            f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )


DEFINITION_ALONE: Final = "FROM definitions WHERE key NOT IN (SELECT key FROM states)"
STATE_ALONE: Final = "FROM states WHERE key NOT IN (SELECT key FROM definitions)"


def mend_pairs(db: sqlite3.Connection) -> None:
    """Quarantine definitions without a state, remove states without a definition.

    Only damage leaves such. The latter would be due for ever.
    """
    alone = f"SELECT EXISTS (SELECT 1 {DEFINITION_ALONE}) OR EXISTS (SELECT 1 {STATE_ALONE})"
    if not db.execute(alone).fetchone()[0]:
        return
    log_store.error("the database lacks half of some schedules: see which are quarantined")
    db.executescript(
        f"BEGIN; DELETE {STATE_ALONE}; INSERT INTO states SELECT key, 0, 0, NULL, NULL, "
        f"'its state is missing in the database' {DEFINITION_ALONE}; COMMIT;"
    )


def open_reading(path: str) -> sqlite3.Connection:
    """Open an existing database to read from it in any one thread. Raises sqlite3.Error.

    Such a connection never checkpoints, not even as the last one to close.
    """
    db = sqlite3.connect(
        f"file:{quote(path)}?mode=ro", uri=True, isolation_level=None,
        check_same_thread=False, timeout=READ_BUSY_MS / 1000,
    )  # fmt: skip
    db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    return db


def find_damage(db: sqlite3.Connection, limit_s: float, pragma: str = "quick_check") -> str | None:
    """What the pages of a database suffer from, None if nothing.

    `quick_check` reads every page, `integrity_check` also compares indexes with tables. Raises
    TimeoutError when that takes longer than `limit_s`, sqlite3.Error.
    """
    timer = threading.Timer(limit_s, db.interrupt)
    timer.daemon = True
    timer.start()
    try:
        (found,) = db.execute(f"PRAGMA {pragma}(1)").fetchone()
    except sqlite3.Error as error:
        if fault_code(error) == sqlite3.SQLITE_INTERRUPT:
            raise TimeoutError from None
        if fault_code(error) in DAMAGED:
            return str(error)
        raise
    finally:
        timer.cancel()
    return None if found == "ok" else " ".join(found.split())


class Trouble:
    """What is wrong with one thing now. Logged when it begins or changes and when it has passed."""

    def __init__(self, passed: str) -> None:
        """`passed`: what the log says when it is over."""
        self.sentence: str | None = None
        self._passed = passed

    def begin(self, sentence: str, error: BaseException | None = None) -> None:
        if sentence != self.sentence:
            log_store.error("%s", sentence, exc_info=error)
        self.sentence = sentence

    def end(self) -> None:
        if self.sentence is not None:
            log_store.warning("%s", self._passed)
        self.sentence = None


def ballast_path(path: str) -> str:
    return os.path.join(os.path.dirname(path), "ballast")


class Ballast:
    """Room kept on the disk, given up when there is no other, so that what runs can end."""

    def __init__(self, path: str) -> None:
        self._path = path

    def make(self) -> bool:
        """Take the room, where there is as much again; False where there is not."""
        if os.path.exists(self._path):
            return True
        if room_bytes(self._path) < 2 * BALLAST_BYTES:
            return False
        try:
            self._allocate()
        except OSError as error:
            return error.errno not in NO_ROOM  # there are file systems that keep no room
        return True

    def _allocate(self) -> None:
        """Raises OSError, and then leaves nothing."""
        temporary = self._path + ".new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, BALLAST_BYTES)
            else:
                os.write(fd, bytes(BALLAST_BYTES))
            os.rename(temporary, self._path)
        except OSError:
            os.unlink(temporary)
            raise
        finally:
            os.close(fd)

    def release(self) -> bool:
        """Give the room up; whether there was any."""
        try:
            os.unlink(self._path)
        except OSError:
            return False
        return True


Change = Callable[[sqlite3.Cursor], Any]
Note = tuple[str, tuple[Any, ...]]  # a statement and its values


Returned = TypeVar("Returned")


class Commit(Generic[Returned]):
    """A change on its way to the disk. Await it for what the change returned; it raises why it was
    not stored.

    Whoever asks with `then` is told in the very turn of the loop that learns of the commit, which
    with a future would be the second one after. Who waits no more does not take the change back.
    """

    __slots__ = ("_callbacks", "_outcome")

    def __init__(self) -> None:
        self._callbacks: list[Callable[[Returned | Exception], None]] = []
        self._outcome: list[Returned | Exception] = []  # one, once it is known

    def then(self, callback: Callable[[Returned | Exception], None]) -> None:
        """Have the outcome told, on the loop: what the change returned, or an exception."""
        if self._outcome:
            callback(self._outcome[0])
        else:
            self._callbacks.append(callback)

    def settle(self, outcome: Returned | Exception) -> None:
        self._outcome.append(outcome)
        for callback in self._callbacks:
            try:
                callback(outcome)
            except Exception:  # those that wait for other changes of the commit go on
                log_store.exception("what follows a commit has failed")

    def __await__(self) -> Generator[Any, None, Returned]:
        future: asyncio.Future[Returned] = asyncio.get_running_loop().create_future()
        self.then(partial(fulfil, future))
        return (yield from future)


def fulfil(future: asyncio.Future[Returned], outcome: Returned | Exception) -> None:
    """End a future that may have been cancelled."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


class Pending(NamedTuple):
    """A change that waits for the writer. An essential one is made although the disk is full."""

    change: Change
    commit: Commit[Any]
    essential: bool


class Writer:
    """The thread that writes. Changes queued while a commit is under way share the next one.

    When the disk is full the ballast is given up for the essential changes: the ends of what runs
    and deletions. Everything else is refused until there is room for the ballast again.

    After any other fault but a lock the connection is opened anew and checked: what a failed
    fsync has left in the kernel's cache and in SQLite's is not to be trusted.
    """

    def __init__(self, path: str, clock: Clock) -> None:
        """Open the database. Raises as open_writing does."""
        self.commits = 0
        self.is_full = False
        self.notes: deque[Note] = deque()  # go into the next commit, and cause none
        self.lost: str | None = None  # why only a new start can help
        # Told by the thread how long each commit took.
        self.took: Callable[[float], None] = lambda seconds: None
        self.busy_since_s: float | None = None  # monotonic: when the commit under way was begun
        self._path = path
        self._db: sqlite3.Connection | None = open_writing(path)
        self._files: list[tuple[int, int] | None] = []  # known when changes are taken
        self._trouble = Trouble("the database takes changes again")
        self._ballast = Ballast(ballast_path(path))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clock = clock
        self._queue: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sqlite-writer", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take changes from now on, and tell the loop of them."""
        self._loop = loop
        self._files = self._file_numbers()
        if not self._ballast.make():
            self.is_full = True
            self._trouble.begin("the disk is almost full: changes are refused until there is room")
        self._thread.start()

    @property
    def trouble(self) -> str | None:
        """Why changes are not taken now; None if they are."""
        return self.lost or self._trouble.sentence

    @property
    def is_displaced(self) -> bool:
        """Whether the files that are open no longer have their names."""
        return self._loop is not None and self._file_numbers() != self._files

    def _file_numbers(self) -> list[tuple[int, int] | None]:
        return [file_number(self._path + suffix) for suffix in ("", "-wal")]

    def submit(self, change: Change, *, essential: bool = False) -> Commit[Any]:
        """Queue a change.

        Its outcome is StoreUnavailable or Overloaded if the change was not stored; after an error
        of the disk itself it may have been.
        """
        assert self._loop is not None, "the store is not open"
        commit: Commit[Any] = Commit()
        if self._queue.qsize() >= MAX_WRITES_QUEUED:
            refusal: Exception = Overloaded(f"{MAX_WRITES_QUEUED} changes wait for the disk")
        elif self.is_full and not essential:
            refusal = DiskFull(self.trouble or FAULTS[sqlite3.SQLITE_FULL])
        else:
            self._queue.put(Pending(change, commit, essential))
            return commit
        self._loop.call_soon(commit.settle, refusal)  # as always: after the caller's turn
        return commit

    def close(self) -> None:
        """Commit what is queued, end the thread and close the connection."""
        if self._loop is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_WRITER_S)  # a disk that hangs must not hold up the end
        if self._db is not None and not self._thread.is_alive():
            self._db.close()

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while group := self._take():
                self.busy_since_s = began_s = self._clock.monotonic()
                outcomes = self._commit(group)
                self.busy_since_s = None
                self.took(self._clock.monotonic() - began_s)
                with suppress(RuntimeError):  # the loop has closed: nobody waits any more
                    self._loop.call_soon_threadsafe(self._deliver, group, outcomes)
                del group, outcomes  # the next may be long in coming, and a result be large
        finally:
            self.lost = self.lost or "the thread that writes has ended"

    def _take(self) -> list[Pending]:
        """Wait for a change, then take all that are queued; empty when told to close."""
        group: list[Pending] = []
        while not group or (len(group) < MAX_GROUP and not self._queue.empty()):
            pending = self._queue.get()
            if pending is None:
                if group:
                    self._queue.put(None)  # closing: after this group
                break
            group.append(pending)
        return group

    def _commit(self, group: list[Pending]) -> list[Any]:
        """Commit the group in one transaction; a change that fails is left out of it alone.

        If disk or database fail nothing of it is stored, but for what is essential when the
        ballast makes room for that.
        """
        try:
            results = self._transact([pending.change for pending in group])
        except Exception as error:
            fault = self._suffer(error)
            essential = [pending for pending in group if pending.essential]
            if essential and isinstance(fault, DiskFull) and self._ballast.release():
                ends = iter(self._commit(essential))
                return [next(ends) if pending.essential else fault for pending in group]
            return [fault] * len(group)
        self._succeed()
        return results

    def _transact(self, changes: list[Change]) -> list[Any]:
        """What each change gives or raises. Raises, with nothing stored, what is no change's."""
        try:
            return self._in_transaction(changes)
        except Exception as error:
            if fault_code(error) is not None or isinstance(error, StoreUnavailable):
                raise
            if len(changes) == 1:
                return [error]
        return self._in_transaction([partial(_at_savepoint, change) for change in changes])

    def _in_transaction(self, changes: list[Change]) -> list[Any]:
        db = self._connection()
        cursor = db.cursor()  # one for all: making one takes longer than most changes
        cursor.execute("BEGIN IMMEDIATE")
        try:
            results = [change(cursor) for change in changes]
            noted = 0 if self.is_full else len(self.notes)
            # A copy, for the loop may append meanwhile; what is the same statement goes together.
            for sql, notes in groupby(islice(tuple(self.notes), noted), key=itemgetter(0)):
                cursor.executemany(sql, [values for _, values in notes])
            cursor.execute("COMMIT")
        except BaseException:
            cursor.close()  # for a connection that is closed with one keeps the file open
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        for _ in range(noted):
            self.notes.popleft()
        return results

    def _suffer(self, error: Exception) -> StoreUnavailable:
        """Note a fault; what the changes that met it raise."""
        fault = error if isinstance(error, StoreUnavailable) else describe_fault(error, self._path)
        code = fault_code(error)
        self._trouble.begin(str(fault), error)
        if isinstance(fault, DatabaseDamaged):
            self.lost = str(fault)
        if isinstance(fault, DiskFull):
            self.is_full = True
        elif code in LOCKED and self._db is not None:
            # Who comes next need not wait as long to hear the same.
            self._db.execute(f"PRAGMA busy_timeout = {READ_BUSY_MS}")
        elif self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        return fault

    def _succeed(self) -> None:
        self.commits += 1
        if self.is_full and not self._ballast.make():
            return  # there was only the room of the ballast
        self.is_full = False
        if self._trouble.sentence is not None and self._db is not None:
            self._db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        self._trouble.end()

    def _connection(self) -> sqlite3.Connection:
        if self.lost:
            raise StoreUnavailable(self.lost)
        if self._db is None:
            self._db = self._reopen()
        return self._db

    def _reopen(self) -> sqlite3.Connection:
        """The database opened anew, unless that shows damage: then this server is lost."""
        if self.is_displaced:
            raise StoreUnavailable("the database file is gone")
        db = open_writing(self._path)
        try:
            with suppress(TimeoutError):
                if damage := find_damage(db, RECHECK_S):
                    raise DatabaseDamaged(f"{FAULTS[sqlite3.SQLITE_CORRUPT]}: {damage}")
            # Rewrites and syncs whatever is not yet in the main file.
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except BaseException:
            db.close()
            raise
        return db

    @staticmethod
    def _deliver(group: list[Pending], outcomes: list[Any]) -> None:
        for pending, outcome in zip(group, outcomes, strict=True):
            pending.commit.settle(outcome)


def _at_savepoint(change: Change, db: sqlite3.Cursor) -> Any:
    """What a change gives or raises; when it raises, nothing of it stays in the transaction."""
    db.execute("SAVEPOINT apart")
    try:
        result = change(db)
    except Exception as error:
        if fault_code(error) is not None:
            raise
        db.execute("ROLLBACK TO apart")
        result = error
    db.execute("RELEASE apart")
    return result


def file_number(path: str) -> tuple[int, int] | None:
    """Device and inode of a file; None if it is not there."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_dev, about.st_ino


def fetch_page(rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The first rows, up to the one with which what becomes of their texts, which may be JSON,
    exceeds MAX_PAGE_BYTES.
    """
    page = []
    left = MAX_PAGE_BYTES
    for row in rows:
        page.append(row)
        left -= sum(weight_of_json(value) for value in row if isinstance(value, str))
        if left < 0:
            break
    return page


class StoreReader:
    """The connection that the event loop reads with. Each read is one snapshot, and short."""

    def __init__(self, path: str) -> None:
        """Raises StoreUnavailable."""
        self.lost: str | None = None  # why only a new start can help
        self._path = path
        self._trouble = Trouble("the database can be read again")
        try:
            self._db = open_reading(path)
        except sqlite3.Error as error:
            raise describe_fault(error, path) from error
        # lower() knows ASCII only.
        self._db.create_function(
            "casefold", 1, lambda text: decode_damaged(text).casefold(), deterministic=True
        )

    @property
    def trouble(self) -> str | None:
        """Why the last read failed; None if it did not."""
        return self._trouble.sentence

    def all(self, sql: str, values: Sequence[Any] = (), *, is_page: bool = False) -> list[Any]:
        """All rows; of a page those up to the one with which its texts exceed MAX_PAGE_BYTES.

        Raises StoreUnavailable.
        """
        try:
            rows = self._fetch(sql, values, is_page)
        except sqlite3.Error as error:
            fault = describe_fault(error, self._path)
            self._trouble.begin(f"the database cannot be read: {fault}", error)
            if isinstance(fault, DatabaseDamaged):
                self.lost = str(fault)
            raise fault from error
        if self._trouble.sentence is not None:
            self._trouble.end()
        return rows

    def one(self, sql: str, values: Sequence[Any] = ()) -> Any:
        """The first row, None if there is none. Raises StoreUnavailable."""
        rows = self.all(sql, values)
        return rows[0] if rows else None

    def _fetch(self, sql: str, values: Sequence[Any], is_page: bool) -> list[Any]:
        rows = self._db.cursor()
        try:
            rows.execute(sql, values)
            return fetch_page(rows) if is_page else rows.fetchall()
        except sqlite3.OperationalError as error:
            if fault_code(error) is not None or self._db.text_factory is not str:
                raise
        self._db.text_factory = decode_damaged
        try:
            return self._fetch(sql, values, is_page)
        finally:
            self._db.text_factory = str

    def copy_into(self, target: str) -> None:
        """Write all that is visible to a new file. Raises StoreUnavailable."""
        try:
            self._db.execute("VACUUM INTO ?", (target,))
        except sqlite3.Error as error:
            raise describe_fault(error, target) from error

    def close(self) -> None:
        self._db.close()


@dataclass(frozen=True, slots=True)
class Count:
    """How many executions there are, up to the row id that was counted last."""

    rows: int
    last_id: int


SURPLUS: Final = """
    SELECT id FROM executions AS old
    WHERE completed_us IS NOT NULL AND id < :first_id AND completed_us < :oldest_us
        AND NOT (
            fire_us IS NOT NULL
            AND EXISTS (SELECT 1 FROM schedules WHERE schedules.key = old.schedule_key)
            AND :keep > (
                SELECT count(*) FROM (
                    SELECT 1 FROM executions AS new
                    WHERE new.schedule_id = old.schedule_id AND new.fire_us > old.fire_us
                    LIMIT :keep
                )
            )
        )
    ORDER BY id LIMIT :limit
"""
"""The oldest final executions but for the newest of each schedule there is."""


def find_surplus(
    path: str, config: Config, now_us: int, known: Count
) -> tuple[Count, list[tuple[int]]]:
    """The row ids of executions to delete, at most MAX_PRUNED, and the count brought up to date.

    Raises StoreUnavailable.
    """
    try:
        with closing(open_reading(path)) as db:
            # Counting all of a million rows each time would read the whole file.
            added, last_id = db.execute(
                "SELECT count(*), max(id) FROM executions WHERE id > ?", (known.last_id,)
            ).fetchone()
            count = Count(known.rows + added, last_id or known.last_id)
            surplus = count.rows - min(config.max_executions, _rows_that_fit(db, config, count))
            oldest_us = now_us - round(config.max_age_days * 86_400e6)
            values = {"keep": config.keep_per_schedule, "limit": MAX_PRUNED}
            old = {**values, "first_id": first_id_of(oldest_us), "oldest_us": oldest_us}
            found = db.execute(SURPLUS, old).fetchall()
            if len(found) < surplus:
                limit = min(surplus, MAX_PRUNED)
                any_age = {**values, "first_id": MAX_ID, "oldest_us": MAX_ID, "limit": limit}
                found = db.execute(SURPLUS, any_age).fetchall()
    except sqlite3.Error as error:
        raise describe_fault(error, path) from error
    return count, found


def _rows_that_fit(db: sqlite3.Connection, config: Config, count: Count) -> int:
    """How many executions of the size of those there are the configured size holds."""
    pages, free, page_bytes = (
        db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    share = (config.max_size_mb << 20) / max(1, (pages - free) * page_bytes)
    return count.rows if share >= 1 else int(count.rows * share)


def load_schedules(path: str) -> list[Schedule]:
    """All schedules of a database that may be in use, in the order of their ids.

    Raises StoreUnavailable.
    """
    query = f"SELECT {SCHEDULE_COLUMNS} FROM schedules ORDER BY schedule_id"
    return [schedule_of(row) for row in _load_rows(path, query)]


def load_handler_ids(path: str) -> list[str]:
    """The handlers that a database has heard of. Raises StoreUnavailable."""
    return [row[0] for row in _load_rows(path, "SELECT handler_id FROM handlers")]


def _load_rows(path: str, query: str) -> list[Any]:
    try:
        with closing(open_reading(path)) as db:
            schema_version(db)
            db.text_factory = decode_damaged
            return db.execute(query).fetchall()
    except sqlite3.Error as error:
        raise describe_fault(error, path) from error


async def run_apart(function: Callable[[], Returned]) -> Returned:
    """What a slow function returns or raises, run in a thread that no exit waits for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Returned] = loop.create_future()

    def work() -> None:
        try:
            outcome: Returned | Exception = function()
        except Exception as error:  # raised where it is awaited
            outcome = error
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(fulfil, future, outcome)

    threading.Thread(target=work, name="apart", daemon=True).start()
    return await future


class Intake(Protocol):
    """Who runs what the store records: told before and after each commit of a new execution."""

    def admit(self, execution: Execution) -> Execution:
        """Decide what the row says at first: queued, running already, or skipped."""

    def accept(self, execution: Execution) -> None:
        """The row is stored: go on with it."""

    def withdraw(self, execution: Execution) -> None:
        """The row was not stored: free what `admit` took for it."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """That a request with an Idempotency-Key was carried out, committed with what it made."""

    scope: str  # route and principal: the same key elsewhere is another
    key: str
    digest: bytes  # of the request's body
    at_us: int
    made: str = ""  # what a repeated request is answered with


class AlreadyMade(Overtaken):
    """There is a receipt for the key."""


TASK_ID: Final = "call"  # APScheduler's name for what we schedule: a call of a handler


class Due(NamedTuple):
    """What a fire needs of a schedule: of all its fields these few are read."""

    schedule_id: str
    handler_id: str
    method_name: str
    job_params: Mapping[str, Any]
    timeout: float | None
    retry: RetryPolicy | None
    coalesce: Coalesce
    overlap: Overlap
    misfire_grace_time: float | None
    max_jitter: float
    next_fire_us: int
    generation: int
    key: int
    trigger_state: str  # as it is stored


def due_of(row: Sequence[Any]) -> Due:
    """The value of a row of DUE_COLUMNS. Raises TriggerError if it is damaged."""
    try:
        job_params = {} if row[3] == "{}" else json.loads(row[3])
        policies = load_retry(row[5]), Coalesce(row[6]), Overlap(row[7])
        return Due._make((*row[:3], job_params, row[4], *policies, *row[8:]))
    except (ValueError, TypeError) as error:
        sentence = f"its row in the database is damaged: {error}"
        raise TriggerError("schedule", sentence) from error


DUE_COLUMNS: Final = ", ".join(Due._fields).replace("coalesce", "coalesce_policy")
COUNT_STATES: Final = """
    SELECT count(*) FILTER (WHERE quarantined IS NULL AND NOT paused),
        count(*) FILTER (WHERE quarantined IS NULL AND paused), count(quarantined) FROM states
"""
IS_DUE: Final = "next_fire_us <= ? AND paused = 0 AND quarantined IS NULL ORDER BY next_fire_us"
SELECT_DUE_KEYS: Final = f"SELECT key FROM states WHERE {IS_DUE} LIMIT ?"
SELECT_DUE: Final = (
    f"SELECT {DUE_COLUMNS} FROM schedules "
    f"WHERE key IN (SELECT value FROM json_each(?)) AND {IS_DUE}"
)


@dataclass(slots=True)
class Claim:
    """A due schedule between acquire and release, as APScheduler's loop reads it.

    Its own Schedule checks and converts sixteen fields first, which takes 9 µs a fire.
    """

    id: str
    args: tuple[str, str, Mapping[str, Any]]
    next_fire_time: datetime
    acquired_by: str
    until_us: int
    due: Due
    fires: tuple[Fire, ...]
    grace_s: float
    times: Iterator[datetime]  # the answers of `next`
    jobs: list[apscheduler.Job] = field(default_factory=list)

    task_id: ClassVar = TASK_ID
    job_executor: ClassVar = TASK_ID
    kwargs: ClassVar = MappingProxyType[str, Any]({})
    metadata: ClassVar = MappingProxyType[str, Any]({})
    coalesce: ClassVar = apscheduler.CoalescePolicy.all  # the plan has coalesced already
    misfire_grace_time: ClassVar = None  # the dispatcher sees to it
    max_jitter: ClassVar = None  # is in the execution's due time
    job_result_expiration_time: ClassVar = timedelta()

    @property
    def acquired_until(self) -> datetime:
        return at_of(self.until_us)

    @property
    def trigger(self) -> Claim:
        """Itself: all that the loop asks of a trigger is `next`."""
        return self

    def next(self) -> datetime | None:
        return next(self.times, None)


def further_times(plan: FirePlan, trigger: Trigger) -> Iterator[datetime]:
    """A plan in the way APScheduler's loop asks for it: one time after another.

    The loop takes every time up to its `now` as a fire and the first later one as the next fire
    time. It looks at the clock again after the plan was made, so the walk goes on beyond the plan.
    """
    for fire in plan.fires[1:]:
        yield fire.nominal_at
    at = plan.next_fire_at
    while at is not None:
        yield at
        at = trigger.next_after(at)


@dataclass(frozen=True, slots=True)
class DueRow:
    """What is needed of a schedule to count its coming fires."""

    key: int
    schedule_id: str
    title: str
    trigger_state: str
    next_fire_us: int


def execution_of_fire(
    schedule: Schedule | Due,
    fire: Fire,
    execution_id: str,
    now_us: int,
    grace_s: float,
    config: Config,
) -> Execution:
    """The execution that records a fire of a schedule, whether it is to run or was missed."""
    fire_us = us_of(fire.nominal_at)
    jitter = schedule.max_jitter and jitter_s(
        schedule.schedule_id, fire.nominal_at, schedule.max_jitter
    )
    delay_us = round(jitter * 1e6)
    # What is caught up after downtime is spread from now on, not all at once.
    spread_us = fire_us if now_us - fire_us < SPREAD_AFTER_US else now_us
    return Execution(
        execution_id, schedule.schedule_id, schedule.handler_id, schedule.method_name,
        schedule.job_params, Status.QUEUED if fire.run else Status.MISSED, now_us,
        due_us=spread_us + delay_us,
        deadline_us=max(fire_us + round(grace_s * 1e6), spread_us) + delay_us,
        completed_us=None if fire.run else now_us,
        retry=schedule.retry or config.retry,
        timeout=schedule.timeout or config.timeout,
        overlap=Overlap.QUEUE if schedule.coalesce is Coalesce.ALL else schedule.overlap,
        reason=fire.reason.value if fire.reason else None,
        coalesced=fire.coalesced,
        coalesced_from_us=us_of(fire.coalesced_from) if fire.coalesced_from else None,
        fire_us=fire_us, schedule_key=schedule.key,
    )  # fmt: skip


class Wanted(TypedDict, total=False):
    """What a list of schedules is narrowed by; None is as if absent."""

    handler_id: str | None
    method_name: str | None
    paused: bool | None
    search: str | None  # in its id, name, handler or method
    origin: str | None


def missed_of(
    schedule: Schedule, execution_id: str, now_us: int, reason: Reason, config: Config
) -> Execution | None:
    """The one row for all fire times of a schedule that are overdue and are not to run any more."""
    due_us = schedule.next_fire_us
    if schedule.paused or schedule.quarantined or due_us is None or due_us > now_us:
        return None
    with suppress(TriggerError):
        (fire,) = plan_fires(
            load_trigger(schedule.trigger_state), at_of(due_us), at_of(now_us),
            coalesce=schedule.coalesce, grace_s=-1.0, reason=reason,
        ).fires  # fmt: skip
        return execution_of_fire(schedule, fire, execution_id, now_us, 0.0, config)
    return None


class Store(apscheduler.abc.DataStore):
    """Everything durable, and APScheduler's data store.

    Reads are synchronous, answered from the page cache by a read-only connection. Changes are
    coroutines that return after the commit and raise StoreUnavailable when nothing was stored.
    No method that APScheduler's loop calls lets an exception of the database out: any would end
    the loop. They log, show it in `state`, and let the next turn try again.

    Leases live in memory: exactly one server may have the data directory, so a lease that
    outlives its server would only delay the next one.
    """

    def __init__(self, path: str, config: Config, clock: Clock, last_id: int = 0) -> None:
        """Open the database. Raises StoreUnavailable as open_writing does.

        `last_id`: a row id that may have been used before, so that all new ones are higher.
        """
        self.path = path
        self.config = config
        self.clock = clock
        self.intake: Intake | None = None
        self.reason: Reason = Reason.DOWN  # what late fires of the next turn are blamed on
        self.holding: str | None = None  # why no schedule is acquired now
        self.last_turn_s = clock.monotonic()  # when APScheduler last asked; the supervisor looks
        self.look: Callable[[], None] = lambda: None  # called each turn, to compare the clocks
        self._writer = Writer(path, clock)
        try:
            self._reader = StoreReader(path)
            (last,) = self._reader.one("SELECT max(id) FROM executions")
            self._load_audit()
        except BaseException:
            self._writer.close()
            raise
        self.last_id: int = max(last or 0, last_id)
        self._note_timer: asyncio.TimerHandle | None = None
        self._due_keys: list[int] = []  # of schedules that were due at the last look
        self._stuck = False  # whether something was due and nothing could be acquired
        self._count = Count(0, 0)
        self.changed: Callable[[str], None] = lambda schedule_id: None  # called after the commit
        self.took: Callable[[float], None] = lambda seconds: None  # told how long each commit took
        self._backlog = False  # whether more was due than one turn takes
        self._claims: dict[str, Claim] = {}
        self._tasks: dict[str, apscheduler.Task] = {}
        self._trigger = lru_cache(maxsize=TRIGGERS_CACHED)(_load_trigger)
        self._plan = lru_cache(maxsize=PLANS_CACHED)(self._make_plan)
        self._event_broker: apscheduler.abc.EventBroker | None = None

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the writer; before this only reads work."""
        self._writer.took = self.took
        self._writer.start(loop)

    def close(self) -> None:
        """Commit what is queued and close both connections."""
        if self._note_timer is not None:
            self._note_timer.cancel()
        self._reader.close()  # first: the last one to close checkpoints
        self._writer.close()

    @property
    def state(self) -> str:
        """`ok`, or a sentence that says what is wrong with the database."""
        if self.hung_s > HUNG_S:
            return f"the disk has not answered for {self.hung_s:.0f} s"
        return self._writer.trouble or self._reader.trouble or "ok"

    @property
    def commits(self) -> int:
        return self._writer.commits

    @property
    def lost(self) -> str | None:
        """Why this server cannot go on with its database and must start anew, if so."""
        return self._writer.lost or self._reader.lost

    @property
    def is_displaced(self) -> bool:
        """Whether the database was deleted, moved or replaced while it is open."""
        return self._writer.is_displaced

    @property
    def hung_s(self) -> float:
        """For how many seconds the disk has owed an answer to the commit under way."""
        since_s = self._writer.busy_since_s
        return 0.0 if since_s is None else self.clock.monotonic() - since_s

    async def halt(self, sentence: str) -> None:
        """Commit nothing that is not queued already; changes raise StoreUnavailable from now on."""
        self._writer.lost = sentence
        await self._settle_all()

    async def _settle_all(self) -> None:
        """Wait until all that is queued is committed, or cannot be."""
        with suppress(ScheduleZeroError):
            await self.write(lambda db: None, essential=True)

    def copy_into(self, target: str) -> None:
        """Write everything committed to a new file. Raises StoreUnavailable."""
        self._reader.copy_into(target)

    def write(self, change: Change, *, essential: bool = False) -> Commit[Any]:
        """Store a change; see Writer.submit."""
        return self._writer.submit(change, essential=essential)

    async def probe(self) -> None:
        """Write and read a little, so that a trouble that has passed is known to have passed."""
        sql = "INSERT OR REPLACE INTO meta VALUES ('probe', ?)"
        now_us = self.clock.now_us()
        with suppress(ScheduleZeroError):
            await self.write(lambda db: db.execute(sql, (now_us,)), essential=True)
            self.seen_us()

    def new_id(self) -> str:
        """A new execution id: ordered by time, and growing even when the clock goes back."""
        self.last_id = max(self.last_id + 1, first_id_of(self.clock.now_us()))
        return encode_id(self.last_id)

    # Schedules

    def schedule(self, schedule_id: str) -> Schedule | None:
        query = f"SELECT {SCHEDULE_COLUMNS} FROM schedules WHERE schedule_id = ?"
        row = self._reader.one(query, (schedule_id,))
        return schedule_of(row) if row else None

    def schedules(
        self,
        *,
        sort: str = "schedule_id",
        limit: int = -1,
        offset: int = 0,
        **wanted: Unpack[Wanted],
    ) -> tuple[list[Schedule], int]:
        """One page of the matching schedules, and how many match in all.

        A page may be shorter than `limit`, when what is on it is large; see MAX_PAGE_BYTES.
        """
        where, values = _schedule_conditions(wanted)
        (total,) = self._reader.one(f"SELECT count(*) FROM schedules {where}", values)
        rows = self._reader.all(
            f"SELECT {SCHEDULE_COLUMNS} FROM schedules {where} ORDER BY {order_of(sort)} "
            "LIMIT ? OFFSET ?",
            (*values, limit, offset),
            is_page=limit >= 0,
        )
        return [schedule_of(row) for row in rows], total

    def count_schedules(self) -> dict[str, int]:
        """How many fire, are paused, and are quarantined; empty if that cannot be read."""
        try:
            ((fire, paused, broken),) = self._reader.all(COUNT_STATES)
        except StoreUnavailable:
            return {}
        return {"active": fire, "paused": paused, "quarantined": broken}

    def schedule_ids(self, **wanted: Unpack[Wanted]) -> list[str]:
        """The ids of all matching schedules."""
        where, values = _schedule_conditions(wanted)
        rows = self._reader.all(f"SELECT schedule_id FROM schedules {where}", values)
        return [schedule_id for (schedule_id,) in rows]

    def due_until(self, end_us: int, *, after_key: int, limit: int) -> list[DueRow]:
        """Schedules that will fire before `end_us`, in the order they were made."""
        rows = self._reader.all(
            "SELECT key, schedule_id, ifnull(name, schedule_id), trigger_state, next_fire_us "
            f"FROM schedules WHERE {FIRES_BEFORE} AND key > ? ORDER BY key LIMIT ?",
            (end_us, after_key, limit),
        )
        return [DueRow(*row) for row in rows]

    def count_due(self, end_us: int, *, after_key: int) -> int:
        """How many schedules `due_until` has not given yet after this key."""
        query = f"SELECT count(*) FROM states WHERE {FIRES_BEFORE} AND key > ?"
        (count,) = self._reader.one(query, (end_us, after_key))
        return int(count)

    async def add_schedule_record(self, schedule: Schedule, receipt: Receipt | None = None) -> None:
        """Store a new schedule. Raises Conflict if the id is taken, AlreadyMade if the key is."""

        def change(db: sqlite3.Cursor) -> None:
            _insert_receipt(db, receipt)
            try:
                _insert_schedule(schedule, db)
            except sqlite3.IntegrityError:
                raise IdTaken(f"there is a schedule '{schedule.schedule_id}' already") from None

        await self.write(change)
        await self._announce(apscheduler.ScheduleAdded, schedule)

    async def replace_schedule(self, schedule: Schedule, generation: int) -> bool:
        """Store a changed schedule if nobody else changed it since `generation`.

        The next fire time is left to the scheduler unless the trigger or the pause changed: then
        fire times that are overdue get the row of missed ones, as their catch-up will not come.
        """
        execution_id, now_us, reason = self.new_id(), self.clock.now_us(), self.reason

        def change(db: sqlite3.Cursor) -> tuple[bool, Execution | None]:
            row = db.execute(
                f"SELECT {SCHEDULE_COLUMNS} FROM schedules "
                "WHERE schedule_id = ? AND generation = ?",
                (schedule.schedule_id, generation),
            ).fetchone()
            if row is None:
                return False, None
            before, missed = dict(zip(SCHEDULE_NAMES, row, strict=True)), None
            value_of = schedule_values(schedule)
            value_of |= {"key": before["key"], "generation": generation + 1}
            state = TRIGGER_CURSOR.sub('"cursor_us":0', before["trigger_state"])
            known = (state, before["paused"], before["quarantined"])
            if known == (value_of["trigger_state"], value_of["paused"], None):
                value_of |= {name: before[name] for name in TIMES}
            elif missed := missed_of(schedule_of(row), execution_id, now_us, reason, self.config):
                value_of["last_fire_us"] = missed.fire_us
                if not _insert_execution(missed, db):  # used before the clock went back
                    missed = None
            db.execute(UPDATE_DEFINITION, value_of)
            db.execute(UPDATE_STATE, value_of)
            return True, missed

        replaced, missed = await self.write(change)
        if missed and self.intake:
            self.intake.accept(missed)
        if replaced:
            await self._announce(apscheduler.ScheduleUpdated, schedule)
        return bool(replaced)

    async def delete_schedule(self, schedule_id: str, generation: int | None = None) -> bool:
        """False if there is none, or none of that generation."""

        def change(db: sqlite3.Cursor) -> bool:
            sql = (
                "SELECT key FROM schedules "
                "WHERE schedule_id = ? AND generation = ifnull(?, generation)"
            )
            key = db.execute(sql, (schedule_id, generation)).fetchone()
            for table in ("definitions", "states") if key else ():
                db.execute(f"DELETE FROM {table} WHERE key = ?", key)
            return key is not None

        deleted: bool = await self.write(change, essential=True)
        self.changed(schedule_id)
        return deleted

    async def set_paused(self, schedule_id: str, paused: bool) -> Schedule | None:
        """Pause or resume; a resumed schedule fires next after now. None: no such schedule.

        One whose row is damaged, and which never fires, stays as it is.
        """
        while True:
            schedule = self.schedule(schedule_id)
            if schedule is None or schedule.paused == paused or schedule.is_damaged:
                return schedule
            now_us = self.clock.now_us()
            changed = replace(schedule, paused=paused, updated_us=now_us)
            if not paused and schedule.quarantined is None:
                with suppress(TriggerError):  # it is due as it was, and will be quarantined
                    trigger = self._trigger(dump_state(schedule.trigger_state))
                    changed = replace(changed, next_fire_us=next_us(trigger, now_us))
            if await self.replace_schedule(changed, schedule.generation):
                return self.schedule(schedule_id)

    # Executions

    def add_execution(
        self, execution: Execution, receipt: Receipt | None = None
    ) -> Commit[Execution]:
        """Store a new execution as the intake admits it, then let the intake go on with it.

        Settled with what was admitted; it may raise AlreadyMade.
        """
        intake = self.intake
        assert intake is not None
        admitted = intake.admit(execution)

        def change(db: sqlite3.Cursor) -> Execution:
            _insert_receipt(db, receipt)
            _insert_execution(admitted, db)
            return admitted

        def settle(outcome: Any) -> None:
            (intake.withdraw if isinstance(outcome, Exception) else intake.accept)(admitted)

        stored = self.write(change)
        stored.then(settle)
        return stored

    def _update(self, sql: str, values: Sequence[Any]) -> Commit[bool]:
        """Change one execution or attempt; whether it still was as the statement says."""
        return self.write(lambda db: db.execute(sql, values).rowcount == 1, essential=True)

    def claim_execution(self, execution: Execution) -> Commit[bool]:
        """Record that an attempt of a queued execution begins; False if it is queued no more."""
        e = execution
        values = (e.attempt, e.started_us, dump_instance(e), decode_id(e.execution_id))
        return self._update(CLAIM_EXECUTION, values)

    def end_execution(
        self, execution: Execution, attempt: Attempt | None = None, log: str | None = None
    ) -> Commit[bool]:
        """Record a final state, its last attempt if worth a row, and its log.

        False if the execution was final already or a later attempt has begun; then nothing of it
        is stored.
        """
        e = execution
        number = decode_id(e.execution_id)
        result = None if e.result is None else dump_json(e.result)
        ended = (e.status.value, e.completed_us, e.duration_us, result, e.error, e.reason)
        values = (*ended, number, e.attempt)
        return self.write(
            partial(_end_attempt, END_EXECUTION, values, number, attempt, log), essential=True
        )

    def requeue_execution(
        self, execution: Execution, attempt: Attempt | None, begun: int, log: str | None = None
    ) -> Commit[bool]:
        """Record that a failed attempt (number `begun`) is to be followed by another one."""
        e = execution
        number = decode_id(e.execution_id)
        values = (e.due_us, e.error, e.attempt, e.attempt, number, begun)
        return self.write(
            partial(_end_attempt, REQUEUE_EXECUTION, values, number, attempt, log), essential=True
        )

    def record_cancel(self, execution_id: str, reason: str) -> Commit[bool]:
        """Record that an execution is to be cancelled; False if it is final already."""
        sql = "UPDATE executions SET cancelling = ? WHERE id = ? AND completed_us IS NULL"
        return self._update(sql, (reason, decode_id(execution_id)))

    def record_late(
        self, execution_id: str, attempt: int, instance: str, ended_us: int
    ) -> Commit[bool]:
        """Mark an ended attempt of an instance whose result came after it had been given up."""
        sql = (
            "UPDATE attempts SET outcome = 'late', ended_us = ? WHERE id = ? AND attempt = ? "
            "AND instance = ? AND outcome IN ('lost', 'timeout', 'cancelled')"
        )
        return self._update(sql, (ended_us, decode_id(execution_id), attempt, instance))

    def execution(self, execution_id: str) -> Execution | None:
        query = f"SELECT {EXECUTION_COLUMNS} FROM executions WHERE id = ?"
        row = self._reader.one(query, (decode_id(execution_id),))
        return execution_of(row) if row else None

    def executions(
        self,
        *,
        limit: int,
        before: str | None = None,
        handler_id: str | None = None,
        schedule_id: str | None = None,
        status: Sequence[str] = (),
        since_us: int | None = None,
    ) -> list[Execution]:
        """The newest matching executions, newest first; `before`: older than this id.

        Fewer than `limit` when their results are large; see MAX_PAGE_BYTES.
        """
        where, values = _conditions(
            ("id < ?", None if before is None else decode_id(before) or 0),
            ("handler_id = ?", handler_id),
            ("schedule_id = ?", schedule_id),
            ("id >= ?", None if since_us is None else first_id_of(since_us)),
            ("created_us >= ?", since_us),
            ("status IN (SELECT value FROM json_each(?))", dump_json(status) if status else None),
        )
        rows = self._reader.all(
            f"SELECT {EXECUTION_COLUMNS} FROM executions {where} ORDER BY id DESC LIMIT ?",
            (*values, limit),
            is_page=True,
        )
        return [execution_of(row) for row in rows]

    def live_executions(self) -> list[Execution]:
        """All that are not final, oldest first: what a restarted server goes on with."""
        rows = self._reader.all(
            f"SELECT {EXECUTION_COLUMNS} FROM executions WHERE completed_us IS NULL "
            "AND id >= ifnull((SELECT value FROM meta WHERE key = 'live_id'), 0) ORDER BY id"
        )
        found = [execution_of(row) for row in rows]
        for execution in found:
            if execution.is_final:
                log_store.error("%s cannot go on: %s", execution.execution_id, execution.error)
        return [execution for execution in found if not execution.is_final]

    def attempts(self, execution_id: str) -> list[Attempt]:
        """The recorded attempts, in order; one that runs or succeeded is told by the execution."""
        rows = self._reader.all(
            "SELECT attempt, instance, started_us, ended_us, outcome, error, traceback "
            "FROM attempts WHERE id = ? ORDER BY attempt",
            (decode_id(execution_id),),
        )
        return [Attempt(*row) for row in rows]

    def log(self, execution_id: str) -> str | None:
        query = "SELECT log FROM logs WHERE id = ?"
        row = self._reader.one(query, (decode_id(execution_id),))
        return row[0] if row else None

    def errors(self, limit: int) -> list[Execution]:
        """The newest executions that ended badly."""
        return self.executions(limit=limit, status=("error", "timeout", "lost"))

    def stats(self, since_us: int) -> dict[str, Any]:
        """Counts, success rate and durations of the executions made since, in all and by handler.

        Durations are whole milliseconds of the last attempts that succeeded.
        """
        made = "FROM executions WHERE id >= ? AND created_us >= ?"
        first_id = first_id_of(since_us)
        counts = self._reader.all(
            f"SELECT handler_id, status, count(*) {made} GROUP BY handler_id, status",
            (first_id, since_us),
        )
        durations = self._reader.all(
            f"SELECT handler_id, duration_us / 1000 {made} AND status = 'success' ORDER BY 2",
            (first_id, since_us),
        )
        minutes = self._reader.all(
            "SELECT completed_us / 60000000, count(*), sum(status = 'success'), "
            "sum(status IN ('error', 'timeout', 'lost')) FROM executions "
            "WHERE id >= ? AND completed_us >= ? GROUP BY 1 ORDER BY 1",
            (first_id, self.clock.now_us() - 3600 * 1_000_000),
        )
        names = ("minute", "total", "success", "failed")
        return {
            **_tally(counts, durations),
            "by_handler": {
                handler_id: _tally(
                    [row for row in counts if row[0] == handler_id],
                    [row for row in durations if row[0] == handler_id],
                )
                for handler_id in sorted({row[0] for row in counts})
            },
            "per_minute": [
                dict(zip(names, (iso_of(minute * 60_000_000), *sums), strict=True))
                for minute, *sums in minutes
            ],
        }

    async def prune(self, now_us: int) -> int:
        """Delete what the configuration does not keep of the history; returns how many executions.

        What to delete is looked for in a thread; it goes in small transactions, so that no fire
        waits. Pages that become free are used again, so the file stops growing but never
        shrinks; a backup that is restored is compact.
        """
        self._count, surplus = await run_apart(
            partial(find_surplus, self.path, self.config, now_us, self._count)
        )
        async for deleted in self._delete(_delete_executions, surplus):
            self._count = replace(self._count, rows=self._count.rows - deleted)
        return len(surplus)

    async def _delete(
        self, delete: Callable[[Sequence[tuple[int]], sqlite3.Cursor], int], rows: list[tuple[int]]
    ) -> AsyncIterator[int]:
        """Delete in small transactions; for each how many rows there were."""
        for first in range(0, len(rows), PRUNE_ROWS):
            chunk = rows[first : first + PRUNE_ROWS]
            yield await self.write(partial(delete, chunk), essential=True)

    def find_receipt(self, wanted: Receipt) -> Receipt | None:
        """The one that was made for the same key in the same scope, unless it has expired."""
        row = self._reader.one(
            "SELECT scope, key, digest, made_us, made FROM receipts "
            "WHERE scope = ? AND key = ? AND made_us >= ?",
            (wanted.scope, wanted.key, wanted.at_us - RECEIPT_LIFE_US),
        )
        return Receipt(*row) if row else None

    async def prune_receipts(self, now_us: int) -> None:
        """Delete those that have expired, and the oldest of too many; MAX_PRUNED at once."""
        sql = "SELECT number FROM receipts WHERE made_us < ? OR number <= ? ORDER BY 1 LIMIT ?"
        (newest,) = self._reader.one("SELECT ifnull(max(number), 0) FROM receipts")
        values = (now_us - RECEIPT_LIFE_US, newest - RECEIPTS_KEPT, MAX_PRUNED)
        async for _ in self._delete(_delete_receipts, self._reader.all(sql, values)):
            pass

    async def remove_exhausted(self, oldest_us: int) -> None:
        """Delete schedules of the API that fired for the last time before `oldest_us`."""
        rows = self._reader.all(
            f"{SELECT_FINISHED} AND paused = 0 AND origin = 'api' AND updated_us < ? "
            "AND ifnull(last_fire_us, 0) < ?",
            (oldest_us, oldest_us),
        )
        await self.remove_schedules([row[0] for row in rows], finished=True)

    # Audit

    def note(self, entry: AuditEntry) -> tuple[int, int]:
        """Record an entry with the next commit, or in NOTE_S; what `note_refusal` wants of it.

        A change that is submitted afterwards is not committed without it, while there is room.
        """
        ring = int(entry.status is not None)
        first, kept = ((0, AUDIT_KEPT), (AUDIT_KEPT, REFUSALS_KEPT))[ring]
        self._audit_number += 1
        self._audit_slots[ring] = first + (self._audit_slots[ring] - first + 1) % kept
        e, place = entry, (self._audit_slots[ring], self._audit_number)
        values = (*place, e.at_us, e.actor, e.address, e.action, e.target, e.status)
        self._add_note(INSERT_AUDIT, values)
        return place

    def note_refusal(self, place: tuple[int, int], status: int) -> None:
        """Add to an entry that what it tells of was refused or failed after all."""
        self._add_note(REFUSE_AUDIT, (status, *place))

    def _add_note(self, sql: str, values: tuple[Any, ...]) -> None:
        if len(self._writer.notes) >= MAX_NOTES:
            return  # the disk has taken nothing for long but what ends and deletes
        self._writer.notes.append((sql, values))
        if self._note_timer is None:
            loop = asyncio.get_running_loop()
            self._note_timer = loop.call_later(NOTE_S, self._commit_notes)

    def _commit_notes(self) -> None:
        self._note_timer = None
        if self._writer.notes:
            # Whether it can be stored is told by `state`.
            self.write(lambda db: None, essential=True)

    async def settle_notes(self) -> None:
        """Commit the entries that wait, if the disk takes them: then `audit` has them."""
        if self._writer.notes:
            await self._settle_all()

    def audit(self, *, limit: int, before: int | None = None) -> list[AuditEntry]:
        """The newest entries, newest first; `before`: of lower number than this."""
        where, values = _conditions(("number < ?", before))
        rows = self._reader.all(
            "SELECT at_us, actor, address, action, target, status, number FROM audit "
            f"{where} ORDER BY number DESC LIMIT ?",
            (*values, limit),
        )
        return [AuditEntry(*row) for row in rows]

    def _load_audit(self) -> None:
        """Go on counting where the last server stopped."""
        rows = self._reader.all(
            "SELECT max(number), slot FROM audit GROUP BY slot >= ?", (AUDIT_KEPT,)
        )
        self._audit_number = max((number for number, _ in rows), default=0)
        self._audit_slots = [0, AUDIT_KEPT]
        for _, slot in rows:
            self._audit_slots[slot >= AUDIT_KEPT] = slot

    # Handlers and times

    def known_handlers(self) -> list[tuple[str, str, str, int]]:
        """Rows (handler_id, address, methods as JSON, last_seen_us) of all ever registered."""
        return self._reader.all("SELECT * FROM handlers ORDER BY handler_id")

    async def save_handler(self, handler_id: str, address: str, methods: str, at_us: int) -> None:
        sql = "INSERT OR REPLACE INTO handlers VALUES (?, ?, ?, ?)"
        values = (handler_id, address, methods, at_us)
        await self.write(lambda db: db.execute(sql, values), essential=True)

    def remove_handler(self, handler_id: str) -> Commit[None]:
        sql = "DELETE FROM handlers WHERE handler_id = ?"
        return self.write(lambda db: db.execute(sql, (handler_id,)), essential=True)

    def seen_us(self) -> int:
        """The latest wall time this database knows of: no later moment has been recorded."""
        meta = dict(self._reader.all("SELECT key, value FROM meta"))
        (created_us,) = self._reader.one(
            "SELECT ifnull(max(created_us), 0) FROM (SELECT created_us FROM executions "
            "WHERE id > ? ORDER BY id DESC LIMIT 1)",
            (meta.get("seen_id", 0),),
        )
        return max(int(created_us), int(meta.get("seen_us", 0)))

    async def save_seen(self, now_us: int) -> None:
        """Note the time, and that no execution made so far knows of a later one: theirs may be
        times of a clock that ran ahead. Note also below which row id all executions are final.
        """
        values = (now_us, self.last_id)

        def change(db: sqlite3.Cursor) -> None:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('seen_us', ?), ('seen_id', ?)", values)
            db.execute(SAVE_LIVE_ID)

        await self.write(change)

    async def replan(self, now_us: int) -> int:
        """After the clock went back: let no schedule wait for a time it had only by mistake.

        Returns how many next fire times were moved. A fire time that was used already stays
        used: the row it has keeps a second one out.
        """
        (top,) = self._reader.one("SELECT ifnull(max(key), 0) FROM schedules")
        moved = 0
        for first in range(0, top + 1, PRUNE_ROWS):
            moved += await self.write(partial(self._replan_some, now_us, first))
        await self.save_seen(now_us)
        wake = apscheduler.ScheduleUpdated(schedule_id="", task_id=TASK_ID, next_fire_time=EPOCH)
        await self._publish(wake)
        return moved

    def _replan_some(self, now_us: int, first: int, db: sqlite3.Cursor) -> int:
        moved = 0
        rows = db.execute(
            "SELECT key, trigger_state, next_fire_us, last_fire_us FROM schedules "
            "WHERE key >= ? AND key < ? AND next_fire_us > ? AND quarantined IS NULL",
            (first, first + PRUNE_ROWS, now_us),
        ).fetchall()
        for key, state, planned_us, last_us in rows:
            with suppress(TriggerError):
                used_until = None if last_us is None else at_of(last_us)
                trigger = _load_trigger(state).rebased(at_of(now_us), used_until)
                earlier_us = next_us(trigger, now_us)
                if earlier_us is not None and earlier_us < planned_us:
                    state = dump_state(trigger.__getstate__())
                    sql = "UPDATE definitions SET trigger_state = ? WHERE key = ?"
                    db.execute(sql, (state, key))
                    sql = "UPDATE states SET next_fire_us = ? WHERE key = ?"
                    db.execute(sql, (earlier_us, key))
                    moved += 1
        return moved

    # What APScheduler calls

    async def start(
        self,
        exit_stack: AsyncExitStack,
        event_broker: apscheduler.abc.EventBroker,
        logger: logging.Logger,
    ) -> None:
        self._event_broker = event_broker

    async def add_task(self, task: apscheduler.Task) -> None:
        """Keep a task in memory: what is stored are schedules of calls, which need none."""
        kind = apscheduler.TaskUpdated if task.id in self._tasks else apscheduler.TaskAdded
        self._tasks[task.id] = task
        await self._publish(kind(task_id=task.id))

    async def remove_task(self, task_id: str) -> None:
        if self._tasks.pop(task_id, None) is None:
            raise apscheduler.TaskLookupError(task_id)
        await self._publish(apscheduler.TaskRemoved(task_id=task_id))

    async def get_task(self, task_id: str) -> apscheduler.Task:
        if task_id not in self._tasks:
            raise apscheduler.TaskLookupError(task_id)
        return self._tasks[task_id]

    async def get_tasks(self) -> list[apscheduler.Task]:
        return [self._tasks[task_id] for task_id in sorted(self._tasks)]

    async def get_schedules(self, ids: set[str] | None = None) -> list[apscheduler.Schedule]:
        found = self.schedules()[0] if ids is None else filter(None, map(self.schedule, ids))
        readable = []
        for schedule in found:
            with suppress(TriggerError):
                readable.append(self._as_apscheduler(schedule))
        return readable

    async def add_schedule(
        self, schedule: apscheduler.Schedule, conflict_policy: apscheduler.ConflictPolicy
    ) -> None:
        """Store a schedule made by APScheduler's own API, with a trigger of ours.

        Its args are (handler_id, method_name, job_params); coalescing and grace are taken over.
        """
        record = self._of_apscheduler(schedule)
        try:
            await self.add_schedule_record(record)
        except Conflict:
            if conflict_policy is apscheduler.ConflictPolicy.exception:
                raise apscheduler.ConflictingIdError(schedule.id) from None  # type: ignore[no-untyped-call]
            known = self.schedule(schedule.id)
            if conflict_policy is apscheduler.ConflictPolicy.replace and known is not None:
                await self.replace_schedule(record, known.generation)

    async def remove_schedules(self, ids: Iterable[str], *, finished: bool = False) -> None:
        for schedule_id in ids:
            if await self.delete_schedule(schedule_id):
                await self._publish(
                    apscheduler.ScheduleRemoved(
                        schedule_id=schedule_id, task_id=TASK_ID, finished=finished
                    )
                )

    async def acquire_schedules(
        self, scheduler_id: str, lease_duration: timedelta, limit: int
    ) -> list[apscheduler.Schedule]:
        """Claim due schedules, each with its fires planned."""
        self.last_turn_s = self.clock.monotonic()
        self.look()
        if self.holding is not None or self.state != "ok":
            return []
        now_us = self.clock.now_us()
        rows = self._due_rows(now_us, limit + len(self._claims))
        until_us = now_us + lease_duration // MICROSECOND
        acquired: list[Claim] = []
        for row in rows:
            held = self._claims.get(row[0])
            if held and held.acquired_by != scheduler_id and held.until_us >= now_us:
                continue
            try:
                claim = self._claim(due_of(row), now_us, scheduler_id, until_us)
            except TriggerError as error:
                await self._quarantine(row, str(error))
                continue
            acquired.append(claim)
            if len(acquired) == limit:
                break
        self._backlog = len(acquired) == limit or bool(self._due_keys)
        self._stuck = bool(rows) and not acquired
        return acquired  # type: ignore[return-value]

    def _due_rows(self, now_us: int, limit: int) -> list[Any]:
        """The next DUE_COLUMNS of schedules that are due, at most `limit`.

        To find them takes a scan of all states, so that one is made for many turns of a burst.
        """
        if not self._due_keys:
            found = self._rows(SELECT_DUE_KEYS, (now_us, DUE_AHEAD))
            self._due_keys = [key for (key,) in found]
        keys, self._due_keys = self._due_keys[:limit], self._due_keys[limit:]
        return self._rows(SELECT_DUE, (dump_json(keys), now_us)) if keys else []

    def _rows(self, sql: str, values: tuple[Any, ...]) -> list[Any]:
        """What APScheduler's loop reads; nothing while the database cannot be read."""
        try:
            return self._reader.all(sql, values)
        except StoreUnavailable:
            return []

    def _claim(self, due: Due, now_us: int, scheduler_id: str, until_us: int) -> Claim:
        """Plan the fires of a due schedule. Raises TriggerError if its trigger is unusable."""
        trigger, grace_s, plan = self._plan(
            due.trigger_state, due.next_fire_us, now_us, due.coalesce, due.misfire_grace_time,
            self.reason,
        )  # fmt: skip
        claim = self._claims[due.schedule_id] = Claim(
            due.schedule_id, due[1:4], plan.fires[0].nominal_at, scheduler_id, until_us,
            due, plan.fires, grace_s, further_times(plan, trigger),
        )  # fmt: skip
        return claim

    def _make_plan(
        self,
        state: str,
        due_us: int,
        now_us: int,
        coalesce: Coalesce,
        own_grace_s: float | None,
        reason: Reason,
    ) -> tuple[Trigger, float, FirePlan]:
        """A trigger, how late its fires may run in seconds, and what becomes of them."""
        trigger = self._trigger(state)
        grace_s = trigger.grace_s if own_grace_s is None else max(own_grace_s, ON_TIME_S)
        plan = plan_fires(
            trigger, at_of(due_us), at_of(now_us),
            coalesce=coalesce, grace_s=grace_s, reason=reason,
        )  # fmt: skip
        return trigger, grace_s, plan

    async def _quarantine(self, row: Sequence[Any], sentence: str) -> None:
        log_store.error("schedule %s is quarantined: %s", row[0], sentence)
        sql = "UPDATE states SET quarantined = ? WHERE key = ? AND generation = ?"
        values = (sentence, row[DUE_KEY], row[DUE_GENERATION])
        with suppress(ScheduleZeroError):
            await self.write(lambda db: db.execute(sql, values))
            self.changed(row[0])

    async def release_schedules(
        self, scheduler_id: str, results: Sequence[apscheduler.ScheduleResult]
    ) -> None:
        """Insert the executions of all fires and advance their schedules, in one transaction.

        A schedule that was changed, paused or deleted since it was acquired is left alone. A
        fire time that has its row already gets no second one.
        """
        fired: list[Fired] = []
        for result in results:
            claim = self._claims.get(result.schedule_id)
            if claim is not None and claim.acquired_by == scheduler_id:
                fired.append((claim, result, self._executions_of(claim)))
        if not self._backlog:
            self.reason = Reason.TOO_LATE
        if not fired:
            return
        stored = self.write(partial(_commit_fires, fired))
        stored.then(partial(self._settle, fired))  # not after the await: the loop may be cancelled
        try:
            await stored
        except ScheduleZeroError as error:
            log_store.warning("%d fires wait: %s", len(fired), error)
            await asyncio.sleep(NEXT_WAKE_S[1])  # the disk is in trouble: no spinning

    def _settle(self, fired: list[Fired], stored: list[list[bool]] | Exception) -> None:
        """The commit of fires has ended: end their claims, let the intake go on with the rows."""
        assert self.intake is not None
        for place, (claim, _, executions) in enumerate(fired):
            is_new = stored[place] if isinstance(stored, list) else [False] * len(executions)
            self._claims.pop(claim.id, None)
            self.changed(claim.id)
            for execution, was_stored in zip(executions, is_new, strict=True):
                (self.intake.accept if was_stored else self.intake.withdraw)(execution)

    def _executions_of(self, claim: Claim) -> list[Execution]:
        """The executions of the jobs that APScheduler made of a claimed schedule."""
        assert self.intake is not None
        now_us = self.clock.now_us()
        planned = iter(claim.fires)
        executions = []
        for job in claim.jobs:
            nominal_at = job.original_scheduled_time
            assert nominal_at is not None
            fire = next(planned, None)
            if fire is None or fire.nominal_at != nominal_at:
                fire = Fire(nominal_at, run=True)
            execution = execution_of_fire(
                claim.due, fire, self.new_id(), now_us, claim.grace_s, self.config
            )
            executions.append(self.intake.admit(execution))
        return executions

    async def get_next_schedule_run_time(self) -> datetime | None:
        """The next fire time, but never further off than NEXT_WAKE_S allows.

        APScheduler computes a wait from the wall clock and sleeps on the monotonic one; looking
        again every two seconds heals clock steps and its lost wake-ups alike.
        """
        now_us = self.clock.now_us()
        soonest_us, latest_us = (now_us + round(s * 1e6) for s in NEXT_WAKE_S)
        if self.holding is not None or self.state != "ok":
            return at_of(latest_us)
        if self._due_keys:
            return at_of(soonest_us)
        rows = self._rows(
            "SELECT min(next_fire_us) FROM states "
            "WHERE next_fire_us > ? AND paused = 0 AND quarantined IS NULL",
            (now_us if self._stuck else -1,),
        )
        next_fire_us = rows[0][0] if rows else None
        return at_of(min(max(next_fire_us or latest_us, soonest_us), latest_us))

    async def add_job(self, job: apscheduler.Job) -> None:
        """Keep a fire until release_schedules, which commits it with the schedule's advance.

        A job without a schedule, of APScheduler's own `add_job`, becomes a run-now execution.
        """
        if job.schedule_id is not None:
            if claim := self._claims.get(job.schedule_id):
                claim.jobs.append(job)
            return
        handler_id, method_name, job_params = job.args
        now_us = us_of(job.created_at)
        execution = Execution(
            self.new_id(), None, handler_id, method_name, job_params, Status.QUEUED, now_us,
            now_us, None, retry=self.config.retry, timeout=self.config.timeout,
        )  # fmt: skip
        await self.add_execution(execution)

    async def get_jobs(self, ids: Iterable[UUID] | None = None) -> list[apscheduler.Job]:
        """None: executions are run by the dispatcher, never by an APScheduler worker."""
        return []

    async def acquire_jobs(
        self, scheduler_id: str, lease_duration: timedelta, limit: int | None = None
    ) -> list[apscheduler.Job]:
        """None, as for get_jobs."""
        return []

    async def release_job(
        self, scheduler_id: str, job: apscheduler.Job, result: apscheduler.JobResult
    ) -> None:
        raise apscheduler.JobLookupError(job.id)

    async def get_job_result(self, job_id: UUID) -> apscheduler.JobResult | None:
        """None: results are read by execution id."""
        return None

    async def reap_abandoned_jobs(self, scheduler_id: str) -> None:
        """Nothing: the dispatcher adopts or gives up what ran in an earlier server."""

    async def extend_acquired_schedule_leases(
        self, scheduler_id: str, schedule_ids: set[str], duration: timedelta
    ) -> None:
        until_us = self.clock.now_us() + duration // MICROSECOND
        for schedule_id in schedule_ids & self._claims.keys():
            claim = self._claims[schedule_id]
            if claim.acquired_by == scheduler_id:
                claim.until_us = until_us

    async def cleanup(self) -> None:
        """Remove exhausted schedules that nothing runs for."""
        rows = self._reader.all(SELECT_FINISHED)
        await self.remove_schedules([row[0] for row in rows], finished=True)

    def _as_apscheduler(self, schedule: Schedule) -> apscheduler.Schedule:
        """Raises TriggerError."""
        grace_s = schedule.misfire_grace_time
        return apscheduler.Schedule(
            id=schedule.schedule_id,
            task_id=TASK_ID,
            trigger=self._trigger(dump_state(schedule.trigger_state)),
            args=(schedule.handler_id, schedule.method_name, schedule.job_params),  # type: ignore[arg-type]
            paused=schedule.paused,
            coalesce=apscheduler.CoalescePolicy.all,  # the plan has coalesced already
            misfire_grace_time=None if grace_s is None else timedelta(seconds=grace_s),  # type: ignore[arg-type]
            job_executor=TASK_ID,
            next_fire_time=at_or_none(schedule.next_fire_us),  # type: ignore[arg-type]
            last_fire_time=at_or_none(schedule.last_fire_us),  # type: ignore[arg-type]
        )

    def _of_apscheduler(self, schedule: apscheduler.Schedule) -> Schedule:
        if not isinstance(schedule.trigger, Trigger) or len(schedule.args) != 3:
            raise InvalidField("trigger", "a schedule needs a trigger and args of ScheduleZero")
        now_us = self.clock.now_us()
        grace = schedule.misfire_grace_time
        return Schedule(
            schedule_id=schedule.id,
            handler_id=schedule.args[0],
            method_name=schedule.args[1],
            job_params=schedule.args[2],
            trigger_config=schedule.trigger.__getstate__(),
            trigger_state=schedule.trigger.__getstate__(),
            coalesce=APSCHEDULER_COALESCE[schedule.coalesce],
            misfire_grace_time=None if grace is None else grace.total_seconds(),
            paused=schedule.paused,
            created_us=now_us,
            updated_us=now_us,
            next_fire_us=us_of(schedule.next_fire_time) if schedule.next_fire_time else None,
        )

    async def _announce(self, kind: type, schedule: Schedule) -> None:
        """Tell of a changed schedule, which wakes APScheduler's loop."""
        self.changed(schedule.schedule_id)
        await self._publish(
            kind(
                schedule_id=schedule.schedule_id,
                task_id=TASK_ID,
                next_fire_time=at_or_none(schedule.next_fire_us),
            )
        )

    async def _publish(self, event: apscheduler.Event) -> None:
        if self._event_broker is not None:
            await self._event_broker.publish(event)


TIMES: Final = ("next_fire_us", "last_fire_us", "quarantined")  # as the scheduler leaves them
SELECT_FINISHED: Final = (
    "SELECT schedule_id FROM schedules WHERE next_fire_us IS NULL AND quarantined IS NULL "
    "AND NOT EXISTS (SELECT 1 FROM executions WHERE completed_us IS NULL "
    "AND executions.schedule_id = schedules.schedule_id)"
)
FIRES_BEFORE: Final = "next_fire_us < ? AND paused = 0 AND quarantined IS NULL"
SCHEDULE_ORDERS: Final[Mapping[str, str]] = {
    "schedule_id": "schedule_id {0}",
    "next_fire_time": "next_fire_us IS NULL, next_fire_us {0}, schedule_id",
    "last_fire_time": "last_fire_us IS NULL, last_fire_us {1}, schedule_id",
    "name": "name IS NULL, name {0}, schedule_id",
    "handler_id": "handler_id {0}, schedule_id",
    "created_at": "created_us {0}, schedule_id",
}
DUE_KEY, DUE_GENERATION = map(Due._fields.index, ("key", "generation"))
Fired = tuple[Claim, apscheduler.ScheduleResult, list[Execution]]
APSCHEDULER_COALESCE: Final[Mapping[apscheduler.CoalescePolicy, Coalesce]] = {
    apscheduler.CoalescePolicy.latest: Coalesce.LATEST,
    apscheduler.CoalescePolicy.earliest: Coalesce.LATEST,  # one run either way
    apscheduler.CoalescePolicy.all: Coalesce.ALL,
}


def order_of(sort: str) -> str:
    """The ORDER BY of a name in SCHEDULE_ORDERS; a minus before it turns it round.

    What has no value comes last either way.
    """
    ways = ("DESC", "ASC") if sort.startswith("-") else ("ASC", "DESC")
    return SCHEDULE_ORDERS[sort.removeprefix("-")].format(*ways)


def _load_trigger(state: str) -> Trigger:
    """Raises TriggerError."""
    try:
        return load_trigger(json.loads(state))
    except ValueError as error:
        raise TriggerError("trigger", f"the stored trigger is damaged: {error}") from error


def next_us(trigger: Trigger, after_us: int) -> int | None:
    """The first fire time after a database time, as a database time."""
    at = trigger.next_after(at_of(after_us))
    return None if at is None else us_of(at)


def at_or_none(us: int | None) -> datetime | None:
    return None if us is None else at_of(us)


def _conditions(*pairs: tuple[str, Any]) -> tuple[str, tuple[Any, ...]]:
    """A WHERE clause of the conditions that have a value, and those values."""
    given = [(condition, value) for condition, value in pairs if value is not None]
    where = "WHERE " + " AND ".join(condition for condition, _ in given) if given else ""
    return where, tuple(value for _, value in given)


def _schedule_conditions(wanted: Wanted) -> tuple[str, tuple[Any, ...]]:
    """The WHERE clause of a list of schedules, and its values."""
    paused, search = wanted.get("paused"), wanted.get("search")
    return _conditions(
        *((f"{name} = ?", wanted.get(name)) for name in ("handler_id", "method_name", "origin")),
        ("paused = ?", None if paused is None else int(paused)),
        (
            "instr(casefold(CAST(schedule_id || ' ' || ifnull(name, '') || ' ' || handler_id "
            "|| ' ' || method_name AS BLOB)), ?)",
            search.casefold() if search else None,
        ),
    )


def join_logs(earlier: str, later: str) -> str:
    """The logs of two attempts in MAX_LOG_BYTES: whole lines of the head and of the tail."""
    both = (earlier + later).encode()
    if len(both) <= MAX_LOG_BYTES:
        return earlier + later
    head = both[: MAX_LOG_BYTES // 2].rpartition(b"\n")
    tail = both[-MAX_LOG_BYTES // 2 :].partition(b"\n")
    return f"{head[0].decode()}\n… lines left out …\n{tail[2].decode()}"


def _insert_schedule(schedule: Schedule, db: sqlite3.Cursor) -> None:
    value_of = schedule_values(schedule)
    values = [value_of[name] for name in DEFINITION_NAMES]
    value_of["key"] = db.execute(INSERT_DEFINITION, values).lastrowid
    db.execute(INSERT_STATE, [value_of[name] for name in STATE_NAMES])


def _insert_execution(execution: Execution, db: sqlite3.Cursor) -> bool:
    return db.execute(INSERT_EXECUTION, execution_row(execution)).rowcount == 1


def _insert_receipt(db: sqlite3.Cursor, receipt: Receipt | None) -> None:
    """In the transaction of the change that it stands for. Raises AlreadyMade."""
    if receipt is None:
        return
    r = receipt
    expired = (r.scope, r.key, r.at_us - RECEIPT_LIFE_US)
    db.execute("DELETE FROM receipts WHERE scope = ? AND key = ? AND made_us < ?", expired)
    try:
        db.execute(INSERT_RECEIPT, (r.scope, r.key, r.digest, r.at_us, r.made))
    except sqlite3.IntegrityError:
        raise AlreadyMade(f"the key {r.key} was used already") from None


def _delete_receipts(numbers: Sequence[tuple[int]], db: sqlite3.Cursor) -> int:
    return db.executemany("DELETE FROM receipts WHERE number = ?", numbers).rowcount


def _delete_executions(ids: Sequence[tuple[int]], db: sqlite3.Cursor) -> int:
    """Delete executions with all that belongs to them; how many there were."""
    for table in ("attempts", "logs"):
        db.executemany(f"DELETE FROM {table} WHERE id = ?", ids)
    sql = "DELETE FROM executions WHERE id = ? AND completed_us IS NOT NULL"
    return db.executemany(sql, ids).rowcount


def _end_attempt(
    sql: str,
    values: Sequence[Any],
    number: int | None,
    attempt: Attempt | None,
    log: str | None,
    db: sqlite3.Cursor,
) -> bool:
    """Change an execution and add to it an attempt and its log; False if it has changed since."""
    if not db.execute(sql, values).rowcount:
        return False
    if attempt is not None:
        a = attempt
        row = (number, a.attempt, a.instance, a.started_us, a.ended_us, a.outcome, a.error)
        db.execute(INSERT_ATTEMPT, (*row, a.traceback))
    if log:
        earlier = db.execute("SELECT log FROM logs WHERE id = ?", (number,)).fetchone()
        whole = join_logs(earlier[0], log) if earlier else log
        db.execute("INSERT OR REPLACE INTO logs VALUES (?, ?)", (number, whole))
    return True


def _commit_fires(fired: list[Fired], db: sqlite3.Cursor) -> list[list[bool]]:
    """Advance schedules and insert their executions; says for each whether it is a new row."""
    stored = []
    for claim, result, executions in fired:
        due = claim.due
        next_fire_us = us_of(result.next_fire_time) if result.next_fire_time else None
        last_fire_us = us_of(result.last_fire_time)
        values = (last_fire_us, next_fire_us, due.key, due.generation, due.next_fire_us)
        advanced = db.execute(ADVANCE_SCHEDULE, values).rowcount == 1
        stored.append([advanced and _insert_execution(e, db) for e in executions])
    return stored


def _tally(
    counts: Sequence[tuple[str, str, int]], durations: Sequence[tuple[str, int]]
) -> dict[str, Any]:
    """Counts by status, the success rate, and quantiles of durations, of rows sorted by them."""
    by_status: Counter[str] = Counter()
    for _, status, count in counts:
        by_status[status] += count
    good, bad = by_status["success"], sum(by_status[s] for s in ("error", "timeout", "lost"))
    return {
        "total": by_status.total(),
        "by_status": by_status,
        "success_rate": good / (good + bad) if good + bad else None,
        "duration_ms": {
            name: durations[min(len(durations) - 1, int(len(durations) * share))][1]
            if durations
            else None
            for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
        },
    }


# --- Recovery ---------------------------------------------------------------------------------
#
# What is done with a database that cannot be used, and before that: backups, and a seal. The
# database counts its seals, and a small file beside it says how far the count had come. A
# database whose count is behind has lost what was committed since: its write-ahead log was
# deleted or cut, or an older file took its place. SQLite itself opens such a file as sound.

DATABASE_FILE: Final = "schedulezero.db"
SEAL_FILE: Final = "schedulezero.seal"
BACKUP_DIRECTORY: Final = "backups"
BACKUP_NAME: Final = re.compile(r"schedulezero-(\d{8}T\d{6})(\d{3})Z\.db")
SET_ASIDE_NAME: Final = re.compile(r"schedulezero\.db(\..*)?\.(damaged|replaced)")
UNFINISHED_NAME: Final = re.compile(r"schedulezero.*\.new")
BESIDE: Final = ("", "-wal", "-shm", "-journal")  # the files of one database
STAGED: Final = ".restore"  # takes the database's place at the next start
UNFINISHED: Final = ".new"
BACKUP_RETRY_S: Final = 600.0  # after one that failed
SET_ASIDE_KEPT: Final = 3  # damaged or replaced databases, each with its log
CHECK_AT_START_S: Final = 3.0  # then the check goes on beside the running server
UNLIMITED_S: Final = 7 * 86_400.0


@dataclass(frozen=True, slots=True)
class Seal:
    """What the file beside the database says."""

    database: int = 0  # the lineage: a random number made with the database, kept by its copies
    number: int = 0  # how often it was sealed
    sealed_us: int = 0  # when last
    last_id: int = 0  # no execution had a higher row id then
    is_open: bool = False  # a server has it open, or ended without closing it
    is_suspect: bool = False  # damage was met while it was in use
    incident: str | None = None  # what happened to it, until somebody has taken note


def load_seal(path: str) -> Seal:
    """The seal in a file; an empty one if there is none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return Seal(**json.load(file))
    except (OSError, ValueError, TypeError):
        return Seal()


def replace_file(path: str, text: str) -> None:
    """Replace a file by one that is on the disk for good, or leave it as it is. Raises OSError."""
    try:
        with open(path + UNFINISHED, "w", encoding="utf-8") as file:
            file.write(text)
        place_file(path + UNFINISHED, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path + UNFINISHED)


def place_file(source: str, target: str) -> None:
    """Rename a file, with its content and then its name on the disk for good. Raises OSError."""
    sync_path(source)
    os.replace(source, target)
    sync_path(os.path.dirname(target))


def sync_path(path: str) -> None:
    """Have the disk hold a file's content, or a directory's names. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_files(path: str) -> None:
    """Remove a database with all that SQLite keeps beside it."""
    for suffix in BESIDE:
        with suppress(FileNotFoundError):
            os.unlink(path + suffix)


class Condition(enum.Enum):
    """What a look at a database file showed."""

    SOUND = enum.auto()
    UNCHECKED = enum.auto()  # sound as far as there was time to look
    EMPTY = enum.auto()  # no file, or one without tables
    DAMAGED = enum.auto()


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of a database file; `sentence` says what is wrong with an unusable one."""

    condition: Condition
    sentence: str = ""
    database: int = 0
    seal: int = 0

    @property
    def is_usable(self) -> bool:
        return self.condition in (Condition.SOUND, Condition.UNCHECKED)


def inspect_database(
    path: str, limit_s: float = UNLIMITED_S, pragma: str = "quick_check"
) -> Finding:
    """Look at a database, changing nothing.

    Raises DatabaseRefused if it is not for this program, StoreUnavailable if it cannot be looked
    at now, as while another program has it locked.
    """
    if not os.path.exists(path):
        return Finding(Condition.EMPTY, "the database file is missing")
    if os.path.getsize(path) == 0:
        return Finding(Condition.EMPTY, "the database file is empty")
    try:
        with closing(open_reading(path)) as db:
            return _inspect(db, limit_s, pragma)
    except sqlite3.Error as error:
        # Not a fault of disk or lock: what should be there is not.
        if fault_code(error) is None or fault_code(error) in DAMAGED:
            return Finding(Condition.DAMAGED, f"the database is damaged: {error}")
        raise describe_fault(error, path) from error


def _inspect(db: sqlite3.Connection, limit_s: float, pragma: str) -> Finding:
    if not schema_version(db):
        return Finding(Condition.EMPTY, "the database has no tables")
    meta = dict(db.execute("SELECT key, value FROM meta").fetchall())
    condition, sentence = Condition.SOUND, ""
    try:
        if damage := find_damage(db, limit_s, pragma):
            condition, sentence = Condition.DAMAGED, f"the database is damaged: {damage}"
    except TimeoutError:
        condition = Condition.UNCHECKED
    return Finding(condition, sentence, meta.get("database", 0), meta.get("seal", 0))


def copy_database(path: str, target: str) -> None:
    """Write a database, which may be in use, to a new file: compact, checked, for good.

    The target is there whole or not at all. Raises StoreUnavailable, OSError.
    """
    unfinished = target + UNFINISHED
    try:
        remove_files(unfinished)
        with closing(open_reading(path)) as db:
            schema_version(db)
            db.execute("VACUUM INTO ?", (unfinished,))
        finding = inspect_database(unfinished)
        if not finding.is_usable:
            raise StoreUnavailable(f"the copy is not sound: {finding.sentence}")
        place_file(unfinished, target)
    except sqlite3.Error as error:
        raise describe_fault(error, target) from error
    finally:
        remove_files(unfinished)


def stage_restore(source: str, path: str) -> None:
    """Put a sound backup where the next start takes it from. Raises StoreUnavailable, OSError."""
    finding = inspect_database(source)
    if not finding.is_usable:
        raise StoreUnavailable(finding.sentence)
    copy_database(source, path + STAGED)


def file_stamp(now_us: int) -> str:
    """A time for a file's name; names sort as times do."""
    return at_of(now_us).strftime("%Y%m%dT%H%M%S") + f"{now_us // 1000 % 1000:03d}Z"


def render_second(us: int | None) -> str:
    """A time for a sentence."""
    return iso_of((us or 0) // 1_000_000 * 1_000_000) or ""


def stamp_us(path: str) -> int | None:
    """The time in the name of an automatic backup; None if it is none."""
    if match := BACKUP_NAME.fullmatch(os.path.basename(path)):
        with suppress(ValueError):
            at = datetime.fromisoformat(f"{match[1]}Z")
            return us_of(at) + int(match[2]) * 1000
    return None


def find_files(directory: str, name: re.Pattern[str]) -> list[str]:
    """The paths of the files with such names, the last name first."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return [os.path.join(directory, each) for each in sorted(names)[::-1] if name.fullmatch(each)]


def list_backups(directory: str) -> list[str]:
    """The paths of the automatic backups, newest first."""
    backups = find_files(os.path.join(directory, BACKUP_DIRECTORY), BACKUP_NAME)
    return [path for path in backups if stamp_us(path)]


class Recovery:
    """Keeps what a database can be rebuilt from, and rebuilds it when it must be.

    `prepare` comes before the store is opened, everything else while it is open.
    """

    def __init__(self, config: Config, clock: Clock) -> None:
        self.path = os.path.join(config.data_dir, DATABASE_FILE)
        self.must_check = False  # whether not all pages were looked at when it started
        self._directory = config.data_dir
        self._config = config
        self._clock = clock
        self._seal_path = os.path.join(config.data_dir, SEAL_FILE)
        self.seal = load_seal(self._seal_path)
        self._backup_s = 0.0  # monotonic: no automatic backup is tried before
        self._changing = asyncio.Lock()
        self._backup_trouble = Trouble("the automatic backup was made")

    @property
    def incident(self) -> str | None:
        """What happened to the database, until it was acknowledged."""
        return self.seal.incident

    @property
    def last_backup_us(self) -> int | None:
        return next(map(stamp_us, list_backups(self._directory)), None)

    # Before the store is opened

    def prepare(self) -> None:
        """Leave a database that can be opened, or none if there never was one.

        One that cannot be used is moved aside, and the newest backup that can takes its place.
        Raises DatabaseRefused, with the file left as it was; StoreUnavailable; OSError.
        """
        for path in list_unfinished(self._directory):
            remove_files(path)
        if os.path.exists(self.path + STAGED):
            self._take_staged()
        finding = self._inspect()
        if finding.is_usable:
            self._compare(finding)
        elif finding.condition is Condition.DAMAGED or self.seal != Seal() or self.last_backup_us:
            self._restore(finding.sentence, None)

    def _inspect(self) -> Finding:
        if self.seal.is_suspect:
            finding = inspect_database(self.path, pragma="integrity_check")
            self.seal = replace(self.seal, is_suspect=False)
        else:
            finding = inspect_database(self.path, CHECK_AT_START_S)
        self.must_check = finding.condition is Condition.UNCHECKED
        return finding

    def _take_staged(self) -> None:
        """Put a database in place that `restore`, or a rescue, has left for this start."""
        finding = inspect_database(self.path + STAGED)
        if not finding.is_usable:
            log_store.error("the restored database cannot be used: %s", finding.sentence)
            os.replace(self.path + STAGED, self.path + STAGED + ".damaged")
            return
        aside = self._set_aside("replaced")
        place_file(self.path + STAGED, self.path)
        before = f"; the one before is {aside}" if aside else ""
        log_store.warning("the restored database is in place%s", before)
        self._adopt(finding)

    def _compare(self, finding: Finding) -> None:
        """Hold a sound database against the seal: it may be an older one, or another."""
        seal = self.seal
        if not seal.database:
            return
        if finding.database != seal.database:
            self._report("the database is another one than was here before")
            self._adopt(finding)
        elif finding.seal < seal.number:
            # Without its log a main file may be sound page by page and still make no sense.
            whole = inspect_database(self.path, pragma="integrity_check")
            since = render_second(seal.sealed_us)
            sentence = (
                f"the database lacks changes that were made before {since}: its write-ahead log "
                "was deleted or cut, or an older copy took its place"
            )
            self._restore(whole.sentence or sentence, whole if whole.is_usable else None)
        elif seal.is_open and not size_of(self.path + "-wal"):
            self._report(
                "the write-ahead log was gone after the server had ended without closing the "
                "database: unless another program has merged it, the newest changes are missing"
            )

    def _restore(self, sentence: str, present: Finding | None) -> None:
        """Go on with the newest sound state: a backup, or what is there if that is no older."""
        backup, finding = self._find_backup()
        self._report(sentence)  # what follows may be interrupted
        if present is not None and (backup is None or finding.seal <= present.seal):
            self._adopt(present)
            return
        ready = self._copy_backup(backup) if backup else None
        aside = self._set_aside("damaged")
        kept = f"; the file that was here is kept as {os.path.basename(aside)}" if aside else ""
        if ready and backup:
            place_file(ready, self.path)
            since = render_second(stamp_us(backup))
            sentence += f"; the backup of {since} was restored: changes since then are missing, "
            self._report(f"{sentence}and what was due since then may run again{kept}")
        else:
            self._report(f"{sentence}; there is no backup, so it starts anew{kept}")
        self._adopt(finding)

    def _find_backup(self) -> tuple[str | None, Finding]:
        """The sound backup that was sealed last; of those sealed together, the newest."""
        found: list[tuple[str, Finding]] = []
        for path in list_backups(self._directory):
            try:
                finding = inspect_database(path)
            except (StoreUnavailable, OSError) as error:
                finding = Finding(Condition.DAMAGED, str(error))
            if finding.is_usable:
                found.append((path, finding))
            else:
                log_store.error("the backup %s cannot be used: %s", path, finding.sentence)
        own = [each for each in found if each[1].database == self.seal.database]
        # Of equals the first, which is the newest.
        none = (None, Finding(Condition.EMPTY))
        return max(own or found, key=lambda each: each[1].seal, default=none)

    def _copy_backup(self, backup: str) -> str:
        """The path of a copy of the backup; of the backup itself where there is no room for two."""
        try:
            copy_database(backup, self.path + UNFINISHED)
        except DiskFull:
            return backup
        return self.path + UNFINISHED

    def _set_aside(self, why: str) -> str | None:
        """Rename the database with its log, and keep only the newest few of such. None: no file.

        What is left of a log must not stay: SQLite would apply it to the next database.
        """
        aside = f"{self.path}.{file_stamp(self._clock.now_us())}.{why}"
        moved = [suffix for suffix in BESIDE if os.path.exists(self.path + suffix)]
        for suffix in moved:
            os.replace(self.path + suffix, aside + suffix)
        sync_path(self._directory)
        for old in list_set_aside(self._directory)[SET_ASIDE_KEPT:]:
            log_store.warning("%s is removed: %d newer ones are kept", old, SET_ASIDE_KEPT)
            remove_files(old)
        return aside if "" in moved else None

    def _report(self, sentence: str) -> None:
        """Say what happened, in the log and, until it is acknowledged, in health."""
        log_store.critical("%s", sentence)
        now = render_second(self._clock.now_us())
        self._note(replace(self.seal, incident=f"{now}: {sentence}"))

    def _adopt(self, finding: Finding) -> None:
        """From now on the seal is that of a database as it was found."""
        seal = replace(self.seal, database=finding.database, number=finding.seal, is_open=False)
        self._note(seal)

    def _note(self, seal: Seal) -> None:
        """Remember a seal; where the disk takes nothing now, then for as long as this runs."""
        self.seal = seal
        try:
            replace_file(self._seal_path, json.dumps(asdict(seal)))
        except OSError as error:
            log_store.error("the seal was not written: %s", error)

    # While the store is open

    async def reseal(self, store: Store, *, is_open: bool = True) -> None:
        """Count one more seal. Raises StoreUnavailable."""
        lineage = int.from_bytes(os.urandom(7))
        database, number = await store.write(partial(_count_seal, lineage))
        await self._change(
            database=database,
            number=number,
            sealed_us=self._clock.now_us(),
            last_id=store.last_id,
            is_open=is_open,
        )

    async def _change(self, **fields: Any) -> None:
        async with self._changing:
            await run_apart(partial(self._note, replace(self.seal, **fields)))

    async def acknowledge(self) -> None:
        """Somebody has taken note of the incident."""
        if self.incident is not None:
            log_store.warning("acknowledged: %s", self.incident)
            await self._change(incident=None)

    async def suspect(self) -> None:
        """Have the next start look at everything."""
        await self._change(is_suspect=True)

    async def check(self) -> str | None:
        """Look at the pages that a short start has left out: what is wrong, None if nothing."""
        finding = await run_apart(partial(inspect_database, self.path))
        self.must_check = False
        return finding.sentence or None

    async def rescue(self, store: Store) -> None:
        """Save the database of a server that still has it open although its file is gone.

        Nothing is committed any more after this began. Raises StoreUnavailable, OSError.
        """
        sentence = "the database was deleted, moved or replaced while it was in use"
        await store.halt(sentence)
        unfinished = self.path + STAGED + UNFINISHED
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        remove_files(unfinished)
        store.copy_into(unfinished)
        place_file(unfinished, self.path + STAGED)
        async with self._changing:
            self._report(f"{sentence}; nothing of it is lost")

    async def back_up_if_due(self, store: Store) -> None:
        """Make an automatic backup if the newest is too old, and delete the surplus.

        What goes wrong is logged, once for as long as it lasts, and does no harm to anything
        else. Raises DatabaseDamaged.
        """
        every_us, now_us = self._config.backup_every_hours * 3_600e6, self._clock.now_us()
        newest_us = self.last_backup_us
        is_due = newest_us is None or not 0 <= now_us - newest_us < every_us
        if not every_us or not is_due or self._clock.monotonic() < self._backup_s:
            return
        self._backup_s = self._clock.monotonic() + BACKUP_RETRY_S
        try:
            await self.reseal(store)  # so that it is known how new the backup is
            await run_apart(partial(self._back_up, now_us))
        except (StoreUnavailable, OSError) as error:
            self._backup_trouble.begin(f"no automatic backup was made: {error}")
            if isinstance(error, DatabaseDamaged):
                raise
        else:
            self._backup_trouble.end()

    def _back_up(self, now_us: int) -> None:
        directory = os.path.join(self._directory, BACKUP_DIRECTORY)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        made = os.path.join(directory, f"schedulezero-{file_stamp(now_us)}.db")
        copy_database(self.path, made)
        log_store.info("backup made: %s", made)
        others = [path for path in list_backups(self._directory) if path != made]
        # One from the future was made under a wrong clock and goes first.
        past = [path for path in others if (stamp_us(path) or 0) <= now_us]
        for path in {*others} - {*past[: self._config.backup_keep - 1]}:
            remove_files(path)


def list_set_aside(directory: str) -> list[str]:
    """The databases that were set aside, newest first, each by its main file's path."""
    return find_files(directory, SET_ASIDE_NAME)


def list_unfinished(directory: str) -> list[str]:
    """The copies of databases that a server which was killed has left."""
    places = (directory, os.path.join(directory, BACKUP_DIRECTORY))
    return [path for place in places for path in find_files(place, UNFINISHED_NAME)]


def _count_seal(new_database: int, db: sqlite3.Cursor) -> tuple[int, int]:
    """The lineage and the number of a new seal."""
    db.execute("INSERT OR IGNORE INTO meta VALUES ('database', ?)", (new_database,))
    (number,) = db.execute(
        "INSERT INTO meta VALUES ('seal', 1) "
        "ON CONFLICT DO UPDATE SET value = value + 1 RETURNING value"
    ).fetchone()
    (database,) = db.execute("SELECT value FROM meta WHERE key = 'database'").fetchone()
    return database, number


# --- Keys -------------------------------------------------------------------------------------
#
# Who may serve which handler id, and the values that jobs need and nobody may read. Each is a
# file of mode 0600 beside the database and never in it, so that no backup of the database and no
# export holds a secret. They are not encrypted: whoever can read them can read the key as well.

KEYS_FILE: Final = "keys.json"
SECRETS_FILE: Final = "secrets.json"
JOIN_PREFIX: Final = "sz1."  # the version of the join string
SECRET_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
SECRET_NAME_RULE: Final = "1 to 128 letters, digits and . _ -, the first no . or -"
SECRET_KEY: Final = "$secret"
MAX_SECRET_BYTES: Final = 64 << 10
MIN_SECRET_CHARS: Final = 4  # a shorter one could not be masked without mangling everything
MIN_SCRUBBED_LINE: Final = 8  # a line of a secret that is itself taken for secret
PRIVATE_NETWORKS: Final = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"))
)


class NotAllowed(ScheduleZeroError):
    """Somebody asked for what he may not have; nothing of it was done."""

    code = "not_allowed"


# Who may connect from where.


def parse_ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address a text names without asking anybody; None for a name that must be looked up."""
    if text == "localhost":
        text = "127.0.0.1"
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def is_this_machine(host: str) -> bool:
    """Whether only this machine reaches it. A name, but for localhost, may be anything."""
    found = parse_ip(host)
    return found is not None and found.is_loopback


def choose_security(config: Config) -> str:
    """How handlers talk to the server: `curve`, or on this machine `null`. Raises ConfigError."""
    is_local = is_this_machine(config.zmq_host)
    if config.zmq_security == "auto":
        return "null" if is_local else "curve"
    if config.zmq_security == "null" and not is_local and not config.allow_insecure:
        who = f"everybody who reaches {config.zmq_host}"
        choices = "use curve, a loopback zmq_host, or allow_insecure: true"
        sentence = f"null lets {who} in, unencrypted; {choices}"
        raise error_in_config(config, ("zmq_security",), sentence)
    return config.zmq_security


def may_call_back(host: str, peer: str, networks: Sequence[str]) -> bool:
    """Whether the server may connect to `host` because the handler at `peer` asks it to.

    Without `networks` a handler may name itself, and one on another machine also a private
    address; never what only this machine reaches, nor a link-local address.
    """
    address, asking = parse_ip(host), parse_ip(peer)
    if address is not None and networks:
        return any(address in ipaddress.ip_network(network) for network in networks)
    if address is None or asking is None or asking.is_loopback != address.is_loopback:
        return False
    is_private = any(address in network for network in PRIVATE_NETWORKS)
    return address == asking or asking.is_loopback or is_private


# Keys of handlers.


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, both halves in Z85."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class HandlerKey:
    """A key that may serve one handler id."""

    handler_id: str
    public: str
    created_us: int
    secret: str | None = field(default=None, repr=False)  # kept only for handlers started here


@dataclass(frozen=True, slots=True)
class Keys:
    """The server's own key pair and the keys that were enrolled."""

    server: KeyPair | None = None
    handlers: tuple[HandlerKey, ...] = ()

    def owner(self, public: str | None) -> HandlerKey | None:
        return next((key for key in self.handlers if key.public == public), None)

    def of(self, handler_id: str) -> list[HandlerKey]:
        return [key for key in self.handlers if key.handler_id == handler_id]

    def local(self, handler_id: str) -> HandlerKey | None:
        """The key of the handler that the governor starts here."""
        return next((key for key in self.of(handler_id) if key.secret), None)

    def enrol(self, key: HandlerKey) -> Keys:
        """Raises Conflict when the id has a key already, unless one of the two is local."""
        if any((other.secret is None) == (key.secret is None) for other in self.of(key.handler_id)):
            raise Conflict(f"'{key.handler_id}' has a key already; revoke it first")
        return replace(self, handlers=(*self.handlers, key))

    def revoke(self, handler_id: str) -> Keys:
        if not self.of(handler_id):
            raise NotFound(f"'{handler_id}' has no key")
        left = tuple(key for key in self.handlers if key.handler_id != handler_id)
        return replace(self, handlers=left)


def parse_keys(text: str) -> Keys:
    """Raises ValueError, KeyError or TypeError for what render_keys has not written."""
    read = json.loads(text or '{"server": null, "handlers": []}')
    server = None if read["server"] is None else KeyPair(**read["server"])
    return Keys(server, tuple(HandlerKey(**key) for key in read["handlers"]))


def render_keys(keys: Keys) -> str:
    return json.dumps(asdict(keys), indent=1)


class PrivateFile:
    """A small file that only its owner may read, replaced as a whole, read again when changed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._text = ""

    def read(self) -> str:
        """Its text, empty if there is none. Raises NotAllowed for a file others may read."""
        try:
            stat = os.stat(self.path)
        except FileNotFoundError:
            self._seen, self._text = None, ""
            return ""
        seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if seen == self._seen:
            return self._text
        if stat.st_mode & 0o077:
            mode = f"{stat.st_mode & 0o777:o}"
            raise NotAllowed(f"{self.path} has mode {mode}, so others may read it: chmod 600 it")
        with open(self.path, encoding="utf-8") as file:
            self._text = file.read()
        self._seen = seen
        return self._text

    def parse(self, parse: Callable[[str], Returned], damage: str) -> Returned:
        """What `parse` makes of its text. Raises ScheduleZeroError when the file is no good."""
        try:
            return parse(self.read())
        except OSError as error:
            raise ScheduleZeroError(f"{self.path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ScheduleZeroError(f"{self.path} is damaged: {damage}") from None

    @property
    def exists(self) -> bool:
        """Whether there was a file when it was last read."""
        return self._seen is not None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing it meanwhile."""
        directory = os.path.dirname(self.path)
        is_new = not os.path.isdir(directory)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY)  # the lock is the directory's own
        try:
            if is_new:
                self._give(fd, directory)
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def write(self, text: str, *, durable: bool = True) -> None:
        """Replace it; on the disk for good when this returns, unless told otherwise.

        Call with the lock held where other processes write it too.
        """
        new = f"{self.path}.new"
        with suppress(FileNotFoundError):
            os.unlink(new)  # left by a crash; it might have another mode
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            self._give(fd, new)
            file.write(text)
            file.flush()
            if durable:
                os.fsync(fd)
        os.replace(new, self.path)
        if durable:
            sync_path(os.path.dirname(self.path))

    @staticmethod
    def _give(fd: int, path: str) -> None:
        """What root makes belongs to whom the directory around it belongs to: the server's user."""
        if os.geteuid() == 0:
            around = os.stat(os.path.dirname(path))
            os.fchown(fd, around.st_uid, around.st_gid)


class KeyFile:
    """The keys of one deployment, changed by the command line while the server reads them."""

    def __init__(self, config: Config) -> None:
        self._file = PrivateFile(os.path.join(config.data_dir, KEYS_FILE))
        self._parse = lru_cache(1)(parse_keys)

    def load(self) -> Keys:
        """The keys as they are now. Raises ScheduleZeroError when the file is no good."""
        return self._file.parse(self._parse, "not the keys it held")

    def change(self, step: Callable[[Keys], Keys]) -> Keys:
        """Apply `step` to the keys, whoever else does the same; durable when this returns."""
        keys = self.load()
        if step(keys) == keys:
            return keys
        with self._file.locked():
            self._file.write(render_keys(step(self.load())))
        return self.load()

    def open_server(self, make: Callable[[], KeyPair]) -> KeyPair:
        """The server's key pair, made when it is asked for the first time."""
        keys = self.change(lambda keys: keys if keys.server else replace(keys, server=make()))
        assert keys.server is not None
        return keys.server

    def open_local(self, handler_id: str, make: Callable[[], KeyPair], now_us: int) -> HandlerKey:
        """The key of a handler that is started here, made when it is first started."""

        def enrol(keys: Keys) -> Keys:
            if keys.local(handler_id):
                return keys
            pair = make()
            return keys.enrol(HandlerKey(handler_id, pair.public, now_us, pair.secret))

        key = self.change(enrol).local(handler_id)
        assert key is not None
        return key


# The join string: all that a handler elsewhere needs, in one word that survives any shell.


def encode_join(handler_id: str, endpoint: str, server_key: str, secret: str) -> str:
    """Where the server is, how to recognise it, and what proves who the handler is: what
    handler.py's read_join reads.
    """
    body = dump_json([handler_id, endpoint, server_key, secret])
    return JOIN_PREFIX + base64.urlsafe_b64encode(body.encode()).decode().rstrip("=")


def local_address() -> str:
    """The address by which other machines most likely reach this one; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET: only the routing table is asked
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


# Secrets for jobs: `{"$secret": "name"}` anywhere in job_params.


def has_secrets(value: Any) -> bool:
    """Whether a JSON value refers to a secret, or tries to."""
    if not value or type(value) in (str, int, float, bool):  # most; sooner told than the others
        return False
    if isinstance(value, Mapping):
        return SECRET_KEY in value or any(map(has_secrets, value.values()))
    return isinstance(value, list) and any(map(has_secrets, value))


def secret_names(value: Any, at: str = "job_params") -> Iterator[tuple[str, str]]:
    """Each secret that a JSON value refers to, and where. Raises InvalidField."""
    if isinstance(value, Mapping) and SECRET_KEY in value:
        name = value[SECRET_KEY]
        if len(value) > 1 or not isinstance(name, str) or not SECRET_NAME.fullmatch(name):
            sentence = f'{at}: a secret is {{"$secret": "name"}}, the name {SECRET_NAME_RULE}'
            raise InvalidField(at, sentence)
        yield name, at
    elif isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from secret_names(item, f"{at}.{key}")


def insert_secrets(value: Any, values: Mapping[str, str]) -> Any:
    """The JSON value with each reference replaced by what it refers to."""
    if isinstance(value, Mapping):
        if SECRET_KEY in value:
            return values[value[SECRET_KEY]]
        return {key: insert_secrets(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [insert_secrets(item, values) for item in value]
    return value


def has_size_of_secret(value: str) -> bool:
    size = len(value.encode(errors="replace"))
    return len(value) >= MIN_SECRET_CHARS and size <= MAX_SECRET_BYTES


class Scrubber:
    """Replaces secrets by `***`, also as JSON, Python or a URL would write them."""

    def __init__(self, values: Sequence[str]) -> None:
        spelt = {form for value in values for form in _spellings(value)}
        longest_first = sorted(spelt, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def text(self, text: str) -> str:
        return self._pattern.sub(MASK, text)

    def value(self, value: Any) -> Any:
        """The JSON value with the secrets in its strings and keys replaced."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(key): self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, list) else value


def _spellings(value: str) -> Iterator[str]:
    lines = [line.strip() for line in value.splitlines()]
    for part in (value, *(line for line in lines if len(line) >= MIN_SCRUBBED_LINE)):
        yield from (part, dump_json(part)[1:-1], json.dumps(part)[1:-1], repr(part)[1:-1])
        yield from (quote(part, safe=""), urllib.parse.quote_plus(part))


class Secrets:
    """Values by name: those set on the command line, then those systemd hands over."""

    def __init__(self, config: Config) -> None:
        self._file = PrivateFile(os.path.join(config.data_dir, SECRETS_FILE))
        self._credentials = config.credentials_dir

    def names(self) -> dict[str, str]:
        """Each name and where its value comes from: `file` or `systemd`."""
        try:
            names = os.listdir(self._credentials) if self._credentials else []
        except OSError:
            names = []
        found = {name: "systemd" for name in names if self._read_credential(name) is not None}
        return dict(sorted((found | dict.fromkeys(self._load(), "file")).items()))

    def get(self, name: str) -> str | None:
        value = self._load().get(name)
        return self._read_credential(name) if value is None else value

    def check(self, job_params: Any) -> dict[str, str]:
        """Each secret that `job_params` refers to. Raises InvalidField unless all are there."""
        found = {}
        for name, at in secret_names(job_params) if has_secrets(job_params) else ():
            value = self.get(name)
            if value is None:
                raise InvalidField(at, f"{at}: there is no secret '{name}'")
            found[name] = value
        return found

    def insert(self, job_params: Any) -> tuple[Any, Scrubber]:
        """The parameters to send, and what hides their secrets afterwards. Raises InvalidField."""
        found = self.check(job_params)
        return insert_secrets(job_params, found), Scrubber([*found.values()])

    def scrubber(self, job_params: Any) -> Scrubber:
        """What hides the secrets that `job_params` refers to, as far as they are there."""
        try:
            values = [self.get(name) for name, _ in secret_names(job_params)]
        except ScheduleZeroError:  # the call was not made by a server that could not make it
            values = []
        return Scrubber([value for value in values if value is not None])

    def set(self, name: str, value: str) -> None:
        """Raises InvalidField for what cannot be a secret."""
        if not SECRET_NAME.fullmatch(name):
            raise InvalidField("name", f"the name of a secret is {SECRET_NAME_RULE}")
        if not has_size_of_secret(value) or "\0" in value:
            bounds = f"{MIN_SECRET_CHARS} characters to {MAX_SECRET_BYTES} bytes"
            raise InvalidField("value", f"a secret is a text of {bounds}")
        with self._file.locked():
            self._file.write(json.dumps({**self._load(), name: value}, indent=1))

    def delete(self, name: str) -> None:
        with self._file.locked():
            values = self._load()
            if values.pop(name, None) is None:
                raise NotFound(f"there is no secret '{name}' to delete")
            self._file.write(json.dumps(values, indent=1))

    def _load(self) -> dict[str, str]:
        return self._file.parse(lambda text: dict(json.loads(text or "{}")), "not JSON")

    def _read_credential(self, name: str) -> str | None:
        """A file of systemd's credentials directory; its last line end is not part of the value."""
        if not self._credentials or not SECRET_NAME.fullmatch(name):
            return None
        try:
            with open(os.path.join(self._credentials, name), encoding="utf-8") as file:
                value = file.read(MAX_SECRET_BYTES + 2).removesuffix("\n")
        except (OSError, UnicodeDecodeError):
            return None
        return value if has_size_of_secret(value) else None


# --- Wire -------------------------------------------------------------------------------------

MAX_CONCURRENCY: Final = 1_000  # calls at a time in one instance
MAX_METHODS: Final = 256  # of one handler
MAX_REPORTED: Final = 5_000  # running or finished calls in one registration
MAX_LOG_LINES: Final = 1_000  # in one message
TCP_ADDRESS: Final = re.compile(
    r"tcp://(?:[A-Za-z0-9][A-Za-z0-9._-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})"
)


class WireError(ScheduleZeroError):
    """A message that is not one of the protocol; nothing of it was used."""

    code = "bad_message"


def parse_socket_event(frames: Sequence[bytes]) -> tuple[int, int]:
    """Number and value of a socket's event, as zmq_socket_monitor(3) writes them.

    pyzmq's own function would bring half a megabyte of modules with it.
    """
    event, value = struct.unpack("=Hi", frames[0])
    return event, value


def decode_message(frames: Sequence[bytes]) -> dict[str, Any]:
    """The JSON object of a message's frames: an empty delimiter, then the body."""
    if len(frames) != 2 or frames[0]:
        raise WireError("a message is an empty frame and one JSON object")
    try:
        message = decode_json(frames[1])
    except ScheduleZeroError as error:
        raise WireError(str(error)) from None
    if not isinstance(message, dict):
        raise WireError("a message is one JSON object")
    return message


class NotAdmitted(WireError):
    """Who asks may not have it."""

    code = "not_allowed"


def parse_call_id(call_id: Any) -> tuple[str, int]:
    """Execution id and attempt of `<execution_id>:<attempt>`."""
    if isinstance(call_id, str):
        execution_id, colon, attempt = call_id.partition(":")
        if colon and attempt.isascii() and attempt.isdigit() and len(attempt) < 7:
            return execution_id, int(attempt)
    raise WireError("'id' is '<execution_id>:<attempt>'")


@dataclass(frozen=True, slots=True)
class Registration:
    """What a handler said of itself."""

    handler_id: str
    instance: str
    address: str | None  # None: dial-in
    methods: tuple[MethodInfo, ...]
    concurrency: int
    running: tuple[str, ...]
    finished: tuple[Mapping[str, Any], ...]
    pid: int | None
    hostname: str | None

    @property
    def key(self) -> str:
        return f"{self.handler_id}/{self.instance}"

    @property
    def place(self) -> str:
        return self.address or "dial-in"


def parse_registration(params: Mapping[str, Any]) -> Registration:
    """Check the params of `register`. Raises WireError with a sentence that names the field."""
    address = params.get("address")
    if address is not None and not is_tcp_address(address):
        raise WireError("'address' is 'tcp://host:port'")
    return Registration(
        handler_id=_field_name(params, "handler_id"),
        instance=address if address is not None else _field_name(params, "instance"),
        address=address,
        methods=tuple(_parse_method(item) for item in _field_list(params, "methods", MAX_METHODS)),
        concurrency=1 if address is not None else _concurrency(params.get("concurrency", 1)),
        running=_running(_field_list(params, "running", MAX_REPORTED)),
        finished=_finished(_field_list(params, "finished", MAX_REPORTED)),
        pid=params["pid"] if isinstance(params.get("pid"), int) else None,
        hostname=str(params["hostname"])[:MAX_NAME_CHARS] if params.get("hostname") else None,
    )


def host_of(address: str) -> str:
    """The host in `tcp://host:port`, an IPv6 one without its brackets."""
    return address.removeprefix("tcp://").rpartition(":")[0].strip("[]")


def is_tcp_address(address: Any) -> bool:
    """Whether the server can call back there: tcp only, a host and a port, no wildcard."""
    found = TCP_ADDRESS.fullmatch(address) if isinstance(address, str) else None
    return found is not None and 0 < int(found[1]) < 65536


def _one_line(text: Any) -> str:
    """A text of a handler that cannot pose as further lines, nor steer a terminal."""
    return escape_controls(str(text).expandtabs())


def _field_name(params: Mapping[str, Any], key: str, of: str = "") -> str:
    value = params.get(key)
    if not isinstance(value, str) or not is_identifier(value):  # the API could not name it
        raise WireError(f"'{key}'{of} is {IDENTIFIER_RULE}, not {render_value((key,), value)}")
    return value


def _field_list(params: Mapping[str, Any], key: str, most: int) -> list[Any]:
    value = params.get(key, [])
    if not isinstance(value, list) or len(value) > most:
        raise WireError(f"'{key}' is a list of at most {most}")
    return value


def _running(items: list[Any]) -> tuple[str, ...]:
    for item in items:
        parse_call_id(item)
    return tuple(items)


def _finished(items: list[Any]) -> tuple[Mapping[str, Any], ...]:
    if not all(isinstance(item, dict) for item in items):
        raise WireError("'finished' is a list of results")
    _running([item.get("id") for item in items])
    return tuple(items)


def _concurrency(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_CONCURRENCY:
        return value
    raise WireError(f"'concurrency' is a whole number from 1 to {MAX_CONCURRENCY}")


def _parse_method(item: Any) -> MethodInfo:
    """A method is its name, or an object with name, doc and parameters."""
    if isinstance(item, str):
        item = {"name": item}
    if not isinstance(item, dict):
        raise WireError("a method is a name or an object with 'name'")
    name = _field_name(item, "name", " of a method")
    parameters = _field_list(item, "parameters", MAX_METHODS)
    if not all(isinstance(entry, dict) and entry.get("name") for entry in parameters):
        raise WireError(f"each of the parameters of '{name}' is an object with 'name'")
    return MethodInfo(name, str(item.get("doc") or "")[:MAX_ERROR_CHARS], tuple(parameters))


# --- Gateway ----------------------------------------------------------------------------------
#
# One ROUTER socket takes every connection of handlers. Dial-in handlers are called over it; a
# plain REP handler is called over a DEALER of its own, one call at a time. Nobody is believed
# to be who he says: what an instance may do hangs on the connection it registered from.

READ_BATCH: Final = 200  # messages read before the rest of the loop has its turn
READ_TURN_S: Final = 0.01  # the same in time: large messages take longer than many small ones
MAX_FRAMES: Final = 4  # kept of one message, to see that it is none of ours
MAX_UNFINISHED_BYTES: Final = MAX_JSON_BYTES + (256 << 10)  # of a message that does not end
MAX_STRANGERS: Final = 256  # connections that no handler has registered from
WATCH_S: Final = 0.1
QUIET_WATCH_S: Final = 0.5  # while only registered handlers are connected and none says anything
SUSPECT_S: Final = 0.02
FLOOD: Final = 2_000  # messages from one handler in WATCH_S; more are dropped
STRANGER_FLOOD: Final = 50  # the same from a connection that is nobody's yet
LOG_BYTES_PER_S: Final = 4 << 20  # log lines of one handler that are passed on
PROGRESS_PER_S: Final = 50
SAVE_AGAIN_S: Final = 1.0  # between two tries to store who serves a handler id
SAVE_WAIT_S: Final = 2.0  # how long a plain handler waits for the disk before it is answered
MAX_REGISTERING: Final = 64  # plain handlers whose host is being looked up, or being stored
ZAP_DOMAIN: Final = b"handlers"
HIGH_WATER: Final = 1_000  # messages queued for one peer; a peer that reads no more is dropped
HANDSHAKE_MS: Final = 5_000
SWEEP_S: Final = 0.5
GONE_SHOWN_S: Final = 60.0  # how long a gone instance stays in the list of its handler
PLAIN_SOUGHT_S: Final = 86_400.0  # a plain one registers but once: it is looked for this long
RECONNECT_S: Final = 0.1  # between two connections to a plain handler
MAX_INSTANCES: Final = 1_000
MAX_HANDLERS: Final = 1_000
NO_WAIT: Final = int(zmq.NOBLOCK)
RCVMORE: Final = int(zmq.RCVMORE)
SEND_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
COMPLAINT_S: Final = 10.0  # at most one log line on malformed messages in this time

log_gateway = logging.getLogger("schedulezero.gateway")


class Peer(NamedTuple):
    """Who is at the other end of a connection; from ZeroMQ and the kernel, not from messages."""

    fd: int
    address: str
    key: str | None  # its public key, if the link is encrypted
    identity: str  # a routing id of its own choice, which anybody could choose


class Sender(NamedTuple):
    """Where a message came from."""

    route: bytes
    instance: Instance | None  # what registered from there
    peer: Peer | None


def peer_of(frame: zmq.Frame) -> Peer:
    """Each property is there only if the peer's version of the protocol has it."""

    def text(name: str) -> str:
        try:
            return str(frame.get(name))
        except (zmq.ZMQError, UnicodeDecodeError):
            return ""

    return Peer(
        int(text("__fd") or -1), text("Peer-Address"), text("User-Id") or None, text("Identity")
    )


def make_keypair() -> KeyPair:
    """A new CURVE key pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


@dataclass(slots=True)
class Instance:
    """One process that serves a handler id, and the calls it is busy with."""

    registration: Registration
    route: bytes | PlainLink  # routing id of its connection, or the link to its address
    registered_us: int
    heard_s: float
    heard_us: int
    calls: set[str] = field(default_factory=set)  # ids of calls sent and not answered
    draining: bool = False
    gone: bool = False
    unreachable: bool = False  # the connection broke; it may come back in time
    skew_s: float | None = None
    peer: Peer | None = None  # who registered it; None: known from before this server
    log_bytes: int = 0  # passed on since the last sweep, as the next
    progresses: int = 0
    key: str = field(init=False)  # for each call again: faster than as properties
    handler_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.key, self.handler_id = self.registration.key, self.registration.handler_id

    @property
    def is_private(self) -> bool:
        """Whether nobody on the network reads what is sent to it."""
        if isinstance(self.route, PlainLink):
            return self.route.is_private
        return self.peer is not None and (bool(self.peer.key) or is_this_machine(self.peer.address))

    @property
    def is_callable(self) -> bool:
        return not (self.gone or self.draining or self.unreachable)

    @property
    def free(self) -> int:
        if self.gone or self.draining or self.unreachable:
            return 0
        if isinstance(self.route, PlainLink) and not self.route.is_idle:
            return 0
        return self.registration.concurrency - len(self.calls)

    def close(self) -> None:
        if isinstance(self.route, PlainLink):
            self.route.close()

    def info(self) -> InstanceInfo:
        lost = self.gone or self.unreachable
        status = "Disconnected" if lost else "Draining" if self.draining else "Connected"
        said = self.registration
        return InstanceInfo(
            said.instance, said.place, status, said.concurrency, len(self.calls),
            self.registered_us, self.heard_us, self.skew_s, said.pid, said.hostname,
        )  # fmt: skip


class Registry:
    """Who serves what. Pure: times are passed in, changes are returned."""

    def __init__(self) -> None:
        self.instances: dict[str, Instance] = {}
        self.known: dict[str, tuple[str, tuple[MethodInfo, ...], int]] = {}
        self._by_handler: dict[str, list[Instance]] = {}
        self._by_route: dict[bytes, Instance] = {}

    def register(
        self, said: Registration, route: bytes | PlainLink, now_s: float, now_us: int
    ) -> tuple[Instance, bool]:
        """Enter an instance; True if it was registered before. Raises WireError when full."""
        earlier = self.instances.get(said.key)
        if earlier is None and len(self.instances) >= MAX_INSTANCES:
            raise WireError(f"{MAX_INSTANCES} handlers are registered already")
        if said.handler_id not in self.known and len(self.known) >= MAX_HANDLERS:
            raise WireError(f"{MAX_HANDLERS} handler ids are in use already")
        instance = Instance(said, route, now_us, now_s, now_us)
        if earlier is not None:
            self.remove(earlier)
            earlier.gone = True  # a call being recorded for it must not go its way any more
            instance.calls = earlier.calls
        self.instances[instance.key] = instance
        self._by_handler.setdefault(said.handler_id, []).append(instance)
        if isinstance(route, bytes):
            self._by_route[route] = instance
        again = said.handler_id in self.known
        self.known[said.handler_id] = (said.place, said.methods, now_us)
        return instance, again

    def displaced_by(self, handler_id: str) -> str | None:
        """Whom to forget for a new handler id, when as many are known as may be: of those without
        an instance the one that was not seen for the longest time.
        """
        if handler_id in self.known or len(self.known) < MAX_HANDLERS:
            return None
        idle = [known for known in self.known if not self._by_handler.get(known)]
        return min(idle, key=lambda known: self.known[known][2], default=None)

    def forget(self, handler_id: str) -> None:
        """Know nothing of a handler any more; its instances must be gone."""
        for instance in list(self.of(handler_id)):
            self.remove(instance)
        self.known.pop(handler_id, None)

    def remove(self, instance: Instance) -> None:
        self.instances.pop(instance.key, None)
        with suppress(KeyError, ValueError):
            self._by_handler[instance.handler_id].remove(instance)
        if isinstance(instance.route, bytes) and self._by_route.get(instance.route) is instance:
            del self._by_route[instance.route]

    def on_route(self, route: bytes | None) -> Instance | None:
        """The instance that registered from this connection."""
        return self._by_route.get(route)  # type: ignore[arg-type]

    def pick(self, handler_id: str) -> Instance | None:
        """The least busy instance with a free slot."""
        instances = self._by_handler.get(handler_id)
        if not instances:
            return None
        found = instances[0] if len(instances) == 1 else max(instances, key=_freedom)
        return found if found.free > 0 else None

    def of(self, handler_id: str) -> Sequence[Instance]:
        return self._by_handler.get(handler_id, ())

    def methods(self, handler_id: str) -> tuple[MethodInfo, ...]:
        """What the instances that can be called offer; without any, what was offered last.

        Empty if one of them has not said: it may know any.
        """
        offers = [one.registration.methods for one in self.of(handler_id) if one.is_callable]
        if not offers and handler_id in self.known:
            return self.known[handler_id][1]
        if len(offers) < 2 or not all(offers):
            return offers[0] if len(offers) == 1 else ()
        return tuple({method.name: method for offer in offers for method in offer}.values())

    def expire(self, now_s: float) -> tuple[list[Instance], list[Instance]]:
        """Mark the instances gone that were silent too long, remove those gone for long.

        Returns both lists: newly gone, and removed.
        """
        silent, removed = [], []
        for instance in list(self.instances.values()):
            quiet_s = now_s - instance.heard_s
            if not instance.gone and quiet_s >= HEARTBEAT_S * LIVENESS:
                instance.gone = True
                silent.append(instance)
            shown_s = PLAIN_SOUGHT_S if instance.registration.address else GONE_SHOWN_S
            if instance.gone and quiet_s >= shown_s:
                self.remove(instance)
                removed.append(instance)
        return silent, removed


def _freedom(instance: Instance) -> float:
    """Free slots, as a share of all: what the least busy instance has most of."""
    return instance.free / instance.registration.concurrency


class Caller(Protocol):
    """Who makes the calls: told what becomes of them."""

    def on_result(self, instance: Instance, call_id: str, message: Mapping[str, Any]) -> None: ...

    def on_reconciled(self, instance: Instance, said: Registration, moved: bool) -> list[str]:
        """An instance said what it runs and has finished; returns the calls it should forget.

        `moved`: it comes over a new connection, so what was under way on the old one is lost.
        """

    def on_gone(self, instance: Instance) -> None:
        """An instance died with the calls it still has."""

    def on_unsent(self, call_id: str) -> None:
        """A call could not be sent: no handler has seen it."""

    def on_ready(self, handler_id: str) -> None:
        """A handler may have a free slot."""

    def on_handler(self, handler_id: str) -> None:
        """A handler's status changed."""

    def on_log(self, call_id: str, lines: list[list[Any]], dropped: int) -> None: ...

    def on_progress(self, call_id: str, percent: float | None, message: str | None) -> None: ...

    def queued(self, handler_id: str) -> int: ...


class Inlet:
    """Reads a socket whenever there is something, on the loop: its descriptor is edge-triggered."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        source: zmq.Socket[bytes],
        take: Callable[[list[bytes]], None],
    ) -> None:
        self._loop, self._source, self._take = loop, source, take
        loop.add_reader(source.fileno(), self.read)
        loop.call_soon(self.read)  # there may be no edge for what came before

    def close(self) -> None:
        if not self._source.closed:
            self._loop.remove_reader(self._source.fileno())
            self._source.close(0)

    def read(self) -> None:
        for _ in range(READ_BATCH):
            try:
                frames = self._source.recv_multipart(NO_WAIT)
            except zmq.ZMQError:  # nothing is left, or it is closed
                return
            self._take(frames)
        self._loop.call_soon(self.read)


class PlainLink:
    """The connection to one plain REP handler: a DEALER that asks one thing at a time.

    A REP that works cannot answer pings. That it lives is known from ZeroMQ's own heartbeats,
    which its I/O thread answers: when they stop, or the process dies, the monitor tells.
    """

    def __init__(self, gateway: Gateway, address: str, server_key: str | None) -> None:
        """`address` is numeric. With `server_key` it is who must answer there, encrypted."""
        self.is_private = server_key is not None or is_this_machine(host_of(address))
        self.address, self.server_key = self.target = (address, server_key)
        self.asked: str | None = None  # "ping" or the id of the call that is under way
        self.asked_s = 0.0
        self.instance: Instance | None = None  # whom the link serves
        self.is_connected = False
        self._gateway = gateway
        self._reopening: asyncio.TimerHandle | None = None
        self._open()

    @property
    def is_idle(self) -> bool:
        return self.is_connected and self.asked is None

    def _open(self) -> None:
        gateway = self._gateway
        self._reopening = None
        self._socket = gateway.make_socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IPV6, int("[" in self.address))
        if self.server_key is not None:
            pair = gateway.pair
            assert pair is not None
            self._socket.curve_serverkey = self.server_key.encode()
            self._socket.curve_publickey = pair.public.encode()
            self._socket.curve_secretkey = pair.secret.encode()
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # no queue while it is not connected
        monitor = self._socket.get_monitor_socket(LINK_EVENTS)
        self._socket.connect(self.address)
        self._replies = Inlet(gateway.loop, self._socket, self._on_reply)
        self._events = Inlet(gateway.loop, monitor, self._on_event)

    def close(self) -> None:
        self.is_connected = False
        if self._reopening is not None:
            self._reopening.cancel()
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._events.close()
            self._replies.close()

    def reset(self) -> None:
        """Drop the connection and what was asked on it, and connect anew a little later."""
        self.close()
        self.asked = None
        self._reopening = self._gateway.loop.call_later(RECONNECT_S, self._reopen)

    def _reopen(self) -> None:
        try:
            self._open()
        except zmq.ZMQError as error:  # no descriptors left
            log_gateway.error("cannot connect to %s: %s", self.address, error)
            self._reopening = self._gateway.loop.call_later(HEARTBEAT_S, self._reopen)

    def ask(self, what: str, message: Mapping[str, Any]) -> bool:
        """Send a request if none is under way and the handler is connected."""
        if not self.is_idle:
            return False
        try:
            self._socket.send_multipart([b"", encode_json(message)], zmq.NOBLOCK)
        except zmq.Again:
            return False
        self.asked, self.asked_s = what, self._gateway.clock.monotonic()
        self._gateway.loop.call_soon(self._replies.read)  # sending may have eaten the edge
        return True

    def _on_reply(self, frames: list[bytes]) -> None:
        asked, self.asked = self.asked, None
        self._gateway.on_plain_reply(self, asked, frames)

    def _on_event(self, frames: list[bytes]) -> None:
        if parse_socket_event(frames)[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.is_connected = True
            self._gateway.on_plain_connect(self)
        elif self.is_connected:
            self._replies.read()  # what it said before the end counts
            self.is_connected = False
            self._gateway.on_plain_disconnect(self)


class Gatekeeper:
    """Answers ZeroMQ's question whether a key may connect (ZAP, RFC 27), on the server's loop.

    Without an answer nobody gets in: the ROUTER enforces its ZAP domain.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._socket = gateway.context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("inproc://zeromq.zap.01")
        self._questions = Inlet(gateway.loop, self._socket, self._on_question)

    def close(self) -> None:
        self._questions.close()

    def _on_question(self, request: list[bytes]) -> None:
        with suppress(zmq.ZMQError):
            self._socket.send_multipart(self._answer(request), NO_WAIT)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """version, request id, status code, status text, user id, metadata."""
        version, number, _domain, address, _identity, mechanism, *credentials = request
        if mechanism == b"CURVE" and len(credentials) == 1:
            public = zmq.utils.z85.encode(credentials[0])
            if self._gateway.load_keys().owner(public.decode()) is not None:
                return [version, number, b"200", b"OK", public, b""]
        self._gateway.complain(f"a key from {address.decode(errors='replace')} is not enrolled")
        return [version, number, b"400", b"this key is not enrolled", b"", b""]


@dataclass(slots=True)
class Connection:
    """A TCP connection to the ROUTER. The descriptor is ZeroMQ's, and may be another's by now."""

    fd: int
    inode: int
    heard_s: float
    route: bytes | None = None  # known from its first message on
    key: str | None = None
    received_bytes: int = 0  # when it last delivered a message
    is_suspect: bool = False  # too much since then; only what is unread may excuse it
    floods: int = 0  # watches in a row that it sent too much in


class Connections:
    """The TCP connections to the ROUTER, watched for what ZeroMQ itself does not bound.

    libzmq keeps the frames of a multipart message until its last one has come, however many,
    and ends no connection on request. So the kernel is asked how much has come over each
    (TCP_INFO, on Linux), and a connection that brings far more than a message without a message
    becoming complete is shut down.
    """

    def __init__(self, gateway: Gateway, router: zmq.Socket[bytes]) -> None:
        self._gateway = gateway
        self._by_fd: dict[int, Connection] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._is_quiet = True
        router.monitor("inproc://connections", ROUTER_EVENTS)
        monitor = gateway.context.socket(zmq.PAIR)
        monitor.setsockopt(zmq.LINGER, 0)
        monitor.setsockopt(zmq.RCVHWM, 100_000)
        monitor.connect("inproc://connections")
        self._events = Inlet(gateway.loop, monitor, self._on_event)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._events.close()

    def meet(self, route: bytes, peer: Peer) -> None:
        """A stranger's message: now it is known which connection its routing id stands for."""
        connection = self._by_fd.get(peer.fd) or self._add(peer.fd)
        if connection is not None:
            connection.route, connection.key = route, peer.key

    def end_revoked(self, keys: Keys) -> None:
        for connection in list(self._by_fd.values()):
            if connection.key is not None and keys.owner(connection.key) is None:
                self._end(connection, "its key was revoked")

    def _on_event(self, frames: list[bytes]) -> None:
        event, fd = parse_socket_event(frames)
        if event == zmq.EVENT_ACCEPTED:
            self._add(fd)
        else:
            self._forget(fd)

    def _forget(self, fd: int) -> None:
        """A connection has ended."""
        connection = self._by_fd.pop(fd, None)
        if connection is not None:
            self._gateway.on_disconnect(connection)

    def _add(self, fd: int) -> Connection | None:
        """Take note of a connection, unless it has ended meanwhile."""
        try:
            with duplicate(fd) as found:
                if found.getsockname()[1] != self._gateway.port:
                    return None
                inode = os.fstat(found.fileno()).st_ino
            now_s = self._gateway.clock.monotonic()
            connection = self._by_fd[fd] = Connection(fd, inode, now_s)
        except OSError:
            return None
        self.watch_closely()
        return connection

    def watch_closely(self) -> None:
        """Something came in: what follows is counted in windows of WATCH_S."""
        if self._is_quiet:
            self._is_quiet = False
            self._watch_in(WATCH_S)

    def _watch_in(self, wait_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._gateway.loop.call_later(wait_s, self._watch)

    def _watch(self) -> None:
        counts, self._gateway.counts = self._gateway.counts, {}
        for connection in list(self._by_fd.values()):
            self._look_at(connection, counts.get(connection.route, 0))
        self._gateway.is_drained = False
        on_route, watched = self._gateway.registry.on_route, self._by_fd.values()
        strangers = [one for one in watched if on_route(one.route) is None]
        strangers.sort(key=lambda connection: connection.heard_s, reverse=True)
        for connection in strangers[MAX_STRANGERS:]:
            self._end(connection, f"{MAX_STRANGERS} others have not registered either")
        has_suspects = any(connection.is_suspect for connection in watched)
        self._is_quiet = not (counts or strangers or has_suspects)
        if watched or not self._is_quiet:
            wait_s = SUSPECT_S if has_suspects else QUIET_WATCH_S if self._is_quiet else WATCH_S
            self._watch_in(max(wait_s, len(watched) * 0.0005))

    def _look_at(self, connection: Connection, count: int) -> None:
        """Watch one connection that delivered `count` messages lately, or end it."""
        received = bytes_received(connection)
        if received is None:
            self._forget(connection.fd)
            return
        known = self._gateway.registry.on_route(connection.route)
        is_flood = count > (STRANGER_FLOOD if known is None else FLOOD)
        connection.floods = connection.floods + 1 if is_flood else 0
        if connection.floods > FLOOD_WATCHES:
            self._end(connection, "it sends without end")
        elif count:
            connection.heard_s = self._gateway.clock.monotonic()
            connection.is_suspect, connection.received_bytes = False, received
        elif received - connection.received_bytes > MAX_UNFINISHED_BYTES:
            if connection.is_suspect and self._gateway.is_drained:
                self._end(connection, f"over {MAX_UNFINISHED_BYTES} bytes and no end of a message")
                self._gateway.loop.call_later(1.0, release_memory)
            connection.is_suspect = True
            self._gateway.read_soon()

    def _end(self, connection: Connection, why: str) -> None:
        """Shut a connection down, which ZeroMQ takes for its peer's doing."""
        self._forget(connection.fd)
        with suppress(OSError), duplicate(connection.fd) as mine:
            if os.fstat(mine.fileno()).st_ino == connection.inode:
                mine.shutdown(socket.SHUT_RDWR)
                self._gateway.complain(f"connection ended: {why}")


def release_memory() -> None:
    """Give the kernel back what was freed; glibc would keep gigabytes for the next time."""
    import ctypes  # 1 MB that is not needed but for this

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def duplicate(fd: int) -> socket.socket:
    """A connection of ZeroMQ's to look at: its own descriptor may be closed or reused meanwhile."""
    return socket.fromfd(fd, socket.AF_INET6, socket.SOCK_STREAM)  # has room for an IPv4 name too


def bytes_received(connection: Connection) -> int | None:
    """What the kernel has taken in; None for a connection that has ended, 0 where unknown."""
    try:
        with duplicate(connection.fd) as found:
            if os.fstat(found.fileno()).st_ino != connection.inode:
                return None
            if sys.platform != "linux":
                return 0
            info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    except OSError:
        return None
    return int.from_bytes(info[128:136], sys.byteorder)  # tcpi_bytes_received in linux/tcp.h


FLOOD_WATCHES: Final = 20
ROUTER_EVENTS: Final = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
LINK_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


SOCKET_OPTIONS: Final = (
    (zmq.LINGER, 0),
    (zmq.SNDHWM, HIGH_WATER),
    (zmq.RCVHWM, HIGH_WATER),
    (zmq.MAXMSGSIZE, MAX_JSON_BYTES),
    (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
    (zmq.HEARTBEAT_IVL, int(HEARTBEAT_S * 1000)),
    (zmq.HEARTBEAT_TIMEOUT, int(HEARTBEAT_S * LIVENESS * 1000)),
    (zmq.HEARTBEAT_TTL, int(HEARTBEAT_S * LIVENESS * 1000)),
)


def load_methods(stored: str) -> tuple[MethodInfo, ...]:
    """The methods of a handler's row; none, as of one that named none, if it is damaged."""
    try:
        return tuple(
            MethodInfo(item["name"], item["doc"], tuple(item["parameters"]))
            for item in json.loads(stored)
        )
    except (ValueError, TypeError, KeyError):
        return ()


class Gateway:
    """The ZeroMQ side of the server: registrations, heartbeats, calls out and results in."""

    def __init__(
        self, config: Config, clock: Clock, store: Store, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Bind the ROUTER. Raises ScheduleZeroError when the address is taken."""
        self.clock = clock
        self.loop = loop
        self.registry = Registry()
        self.pick = self.registry.pick
        self.caller: Caller  # set before the loop goes on
        self.malformed = 0
        self._store = store
        self._configured = {spec.handler_id for spec in config.handlers}
        self._complained_s = -COMPLAINT_S
        self._reading = self._skipping = False
        self._secret = config.handler_secret.encode()
        self._networks = config.callback_networks
        self._registering: set[asyncio.Task[None]] = set()  # plain handlers
        self._saving: dict[str, asyncio.Task[None]] = {}  # by handler id
        self.counts: dict[bytes | None, int] = {}  # messages by connection, since the last watch
        self.is_drained = False  # whether all was read since the last watch
        self._flushing = False
        self._outbox: list[tuple[bytes, Mapping[str, Any], str | None]] = []
        self._acks: dict[bytes, list[str]] = {}
        self.keys = KeyFile(config) if choose_security(config) == "curve" else None
        self.pair = self.keys.open_server(make_keypair) if self.keys else None
        self._enrolled = self.keys.load() if self.keys else Keys()
        heard_of = store.known_handlers()  # before there are sockets that a failure leaves open
        self.context = zmq.Context()
        self._gatekeeper = Gatekeeper(self) if self.keys else None
        self._router = self.make_socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if self.pair is not None:
            self._router.curve_server = True
            self._router.curve_secretkey = self.pair.secret.encode()
            self._router.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
            self._router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody is let in unasked
        # Looked up once: pyzmq's sockets look for each name twice, and `send` for draft options.
        self._recv, self._has_more = self._router.recv, self._router.getsockopt
        self._send_frame = super(zmq.Socket, self._router).send
        self._connections = Connections(self, self._router)
        self.endpoint = self._bind(config)
        self.port = int(self.endpoint.rpartition(":")[2])
        loop.add_reader(self._router.fileno(), self._on_readable)
        for handler_id, address, methods, seen_us in heard_of:
            infos = load_methods(methods)
            if is_tcp_address(address):
                said = Registration(handler_id, address, address, infos, 1, (), (), None, None)
                self._start(self._seek(said, seen_us))
            self.registry.known[handler_id] = (address, infos, seen_us)
        self._swept_s = clock.monotonic()
        self._sweeper = loop.call_later(SWEEP_S, self._sweep)

    def make_socket(self, kind: int) -> zmq.Socket[bytes]:
        made = self.context.socket(kind)
        for option, value in SOCKET_OPTIONS:
            made.setsockopt(option, value)
        return made

    def _bind(self, config: Config) -> str:
        """Listen for handlers; where. Raises ScheduleZeroError."""
        host = f"[{config.zmq_host}]" if ":" in config.zmq_host else config.zmq_host
        self._router.setsockopt(zmq.IPV6, int(":" in host))
        try:
            self._router.bind(f"tcp://{host}:{config.zmq_port or '*'}")
        except zmq.ZMQError as error:
            self._close_sockets()
            raise ScheduleZeroError(
                f"cannot listen for handlers on {host}:{config.zmq_port}: {error}"
            ) from None
        return self._router.getsockopt_string(zmq.LAST_ENDPOINT)

    async def _seek(self, said: Registration, seen_us: int) -> None:
        """Look for a plain handler of an earlier server: it does not know that it should register.

        It is connected as soon as it answers a ping.
        """
        assert said.address is not None
        with suppress(WireError):
            host = await self._look_up(host_of(said.address))
            key = next((key.public for key in self._enrolled.of(said.handler_id)), None)
            is_back = said.key in self.registry.instances  # by itself meanwhile
            is_revoked = self.keys is not None and key is None
            if is_back or is_revoked or not may_call_back(host, host, self._networks):
                return
            instance, _ = self._link(said, host, key)
            instance.unreachable, instance.heard_us = True, seen_us

    def _start(self, registering: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(registering)
        self._registering.add(task)
        task.add_done_callback(self._registering.discard)

    async def _look_up(self, host: str) -> str:
        """The numeric address of a host; other than libzmq, without holding up the others."""
        address = parse_ip(host)
        if address is not None:
            return str(address)
        try:
            found = await self.loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError:
            raise WireError(f"the host of 'address' is not found: '{host}'") from None
        return str(found[0][4][0])

    def close(self) -> None:
        self._sweeper.cancel()
        for task in (*self._registering, *self._saving.values()):
            task.cancel()
        self.loop.remove_reader(self._router.fileno())
        for instance in self.registry.instances.values():
            instance.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._connections.close()
        if self._gatekeeper is not None:
            self._gatekeeper.close()
        self.context.destroy(0)

    # What the dispatcher and the API ask

    def method_names(self, handler_id: str) -> list[str] | None:
        """What a handler offers; empty if it has not said yet, None if nobody knows it."""
        if handler_id in self.registry.known:
            return [method.name for method in self.registry.methods(handler_id)]
        return [] if handler_id in self._configured else None

    def call(self, instance: Instance, call_id: str, call: Mapping[str, Any]) -> None:
        """Make a call; if it cannot be sent, which is certain, the caller hears `on_unsent`."""
        if isinstance(instance.route, bytes):
            self._post(instance.route, {"id": call_id, **call}, call_id)
            return
        plain = {key: call[key] for key in PLAIN_CALL_KEYS}
        if not instance.route.ask(call_id, plain):
            self.loop.call_soon(self._unsent, instance, call_id)

    def cancel(self, instance: Instance, call_id: str, reason: str) -> None:
        """Tell an instance to stop a call, if it can be told: a plain handler cannot."""
        if isinstance(instance.route, bytes):
            params = {"id": call_id, "reason": reason}
            self._post(instance.route, {"method": "cancel", "params": params})

    def acknowledge(self, instance: Instance, call_id: str) -> None:
        if isinstance(instance.route, bytes):
            self._acks.setdefault(instance.route, []).append(call_id)
            self._flush_soon()

    def handlers(self) -> list[HandlerInfo]:
        infos = map(self.handler, sorted(self.registry.known.keys() | self._configured))
        return [info for info in infos if info is not None]

    def handler(self, handler_id: str) -> HandlerInfo | None:
        if handler_id not in self.registry.known and handler_id not in self._configured:
            return None
        address, _, seen_us = self.registry.known.get(handler_id, ("", (), 0))
        instances = tuple(instance.info() for instance in self.registry.of(handler_id))
        connected = any(info.status != "Disconnected" for info in instances)
        return HandlerInfo(
            handler_id=handler_id,
            address=address,
            status="Connected" if connected else "Disconnected",
            methods=self.registry.methods(handler_id),
            instances=instances,
            running=sum(info.running for info in instances),
            queued=self.caller.queued(handler_id),
            last_seen_us=max((info.last_seen_us for info in instances), default=seen_us),
        )

    async def forget(self, handler_id: str) -> None:
        """Forget a handler that has left. Raises NotFound, Conflict while it may come back."""
        info = self.handler(handler_id)
        if info is None:
            raise NotFound(f"there is no handler '{handler_id}'")
        if handler_id in self._configured:
            raise Conflict(f"the configuration names the handler '{handler_id}'")
        if info.status == "Connected":
            raise Conflict(f"the handler '{handler_id}' is connected")
        await self._forget(handler_id)

    def _forget(self, handler_id: str) -> Commit[None]:
        for instance in self.registry.of(handler_id):
            instance.close()
        self.registry.forget(handler_id)
        self._stop_saving(handler_id)
        self.caller.on_handler(handler_id)
        return self._store.remove_handler(handler_id)

    # Reading

    def _read_again(self) -> None:
        # Cleared here alone: if the descriptor's call did it too, each edge would add a reader.
        self._reading = False
        self._on_readable()

    def _on_readable(self) -> None:
        """Read what is there. The descriptor is edge-triggered: stop only when nothing is left."""
        until_s = self.clock.monotonic() + READ_TURN_S
        for taken in range(READ_BATCH):
            if taken and self.clock.monotonic() > until_s:
                break
            try:
                if self._skipping and not self._skip():
                    break
                sender, frames = self._receive()
            except zmq.ZMQError:
                self.is_drained = True
                return
            if not self.counts:
                self._connections.watch_closely()
            count = self.counts[sender.route] = self.counts.get(sender.route, 0) + 1
            if count > STRANGER_FLOOD and self._is_flood(sender, count):
                continue
            try:
                self._on_message(sender, frames)
            except Exception as error:  # go on: for those behind it there is no second edge
                self.complain("it could not be handled", error)
        self.read_soon()

    def _receive(self) -> tuple[Sender, list[bytes]]:
        """The next message: who sent it, and its frames.

        Frames that tell of their peer cost more, so those of registered handlers do without,
        unless the link is encrypted: then every message must come from the key that registered,
        for a routing id can be forged.
        """
        recv, has_more = self._recv, self._has_more
        route = recv(NO_WAIT)
        known = self.registry.on_route(route)
        peer = known.peer if known is not None else None
        if known is None:
            frame = recv(NO_WAIT, copy=False)
            peer = peer_of(frame)
            frames = [frame.bytes]
            self._connections.meet(route, peer)
        elif self.keys is not None:
            frame = recv(NO_WAIT, copy=False)
            is_genuine = peer is not None and frame.get("User-Id") == peer.key
            frames = [frame.bytes if is_genuine else b"not who registered"]
        else:
            frames = [recv(NO_WAIT)]
        while has_more(RCVMORE):
            if len(frames) == MAX_FRAMES:
                self._skipping = True
                break
            frames.append(recv(NO_WAIT))
        return Sender(route, known, peer), frames

    def _skip(self) -> bool:
        """Drop the rest of a message of too many frames, some in each turn of the loop; whether
        that was all.
        """
        for _ in range(READ_BATCH):
            self._skipping = bool(self._router.getsockopt(RCVMORE))
            if not self._skipping:
                return True
            self._router.recv(NO_WAIT)
        return False

    def _is_flood(self, sender: Sender, count: int) -> bool:
        """Whether a message is one too many; results among them come again."""
        most = STRANGER_FLOOD if sender.instance is None else FLOOD
        if count == most + 1:
            self.complain(f"more than {most} from one connection in {WATCH_S:g} s")
        return count > most

    def read_soon(self) -> None:
        """Look again in this turn of the loop: a send may have eaten the edge."""
        if not self._reading:
            self._reading = True
            self.loop.call_soon(self._read_again)

    # Writing
    #
    # What is to be sent in a turn of the loop is sent at its end, back to back: waking ZeroMQ's
    # I/O thread once costs less than waking it for every message.

    def _post(self, route: bytes, message: Mapping[str, Any], call_id: str | None = None) -> None:
        self._outbox.append((route, message, call_id))
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        outbox, self._outbox = self._outbox, []
        acks, self._acks = self._acks, {}
        for route, message, call_id in outbox:
            sent = self._send(route, encode_json(message))
            if not sent and call_id is not None:
                self._unsent(self.registry.on_route(route), call_id)
        for route, call_ids in acks.items():
            self._send(route, encode_json({"method": "ack", "params": {"ids": call_ids}}))
        self.read_soon()

    def _send(self, route: bytes, body: bytes) -> bool:
        """Send to a connection; False if there is none any more, or it reads no more."""
        send = self._send_frame
        try:
            send(route, SEND_MORE)
            send(b"", SEND_MORE)
            send(body, NO_WAIT)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN, zmq.ENOTSOCK):
                raise
            return False
        return True

    def on_disconnect(self, connection: Connection) -> None:
        """A handler's connection broke: until it is heard again, nothing is sent there."""
        instance = self.registry.on_route(connection.route)
        if instance is None or instance.gone or instance.peer is None:
            return
        if instance.peer.fd == connection.fd:
            self._cut_off(instance)

    def _unsent(self, instance: Instance | None, call_id: str) -> None:
        """A call could not be sent: its instance is out of reach until it is heard again."""
        if instance is not None:
            self._cut_off(instance)
        self.caller.on_unsent(call_id)

    def _cut_off(self, instance: Instance) -> None:
        if not instance.unreachable:
            instance.unreachable = True
            self.caller.on_handler(instance.handler_id)

    def _on_message(self, sender: Sender, frames: Sequence[bytes]) -> None:
        if frames == [b""]:  # ZMQ_PROBE_ROUTER: a new connection shows itself
            self._post(sender.route, HELLO)
            return
        method: str | None = None
        try:
            message = decode_message(frames)
            if "method" not in message:
                self._on_result(sender, message)
                return
            method = str(message["method"])[:MAX_NAME_CHARS]
            reply = self._on_request(sender, method, message.get("params", {}))
        except WireError as error:
            reply = self._refuse(error)
            if self._is_flawed_result(sender, frames, str(error)):
                return
        if reply is not None:
            self._post(sender.route, {"success": True, "reply_to": method, **reply})

    def _refuse(self, error: WireError) -> dict[str, Any]:
        self.complain(str(error))
        return {"success": False, "error": str(error), "code": error.code}

    def _is_flawed_result(self, sender: Sender, frames: Sequence[bytes], flaw: str) -> bool:
        """Whether a message that was refused is the result of a call; then its attempt failed.

        It would be sent again and again: no slot may be lost to a result that is never taken.
        """
        instance = sender.instance
        if instance is None or instance.gone or frames[0]:  # no delimiter: it may be forged
            return False
        try:
            call_id = json.loads(frames[-1])["id"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return False
        if not isinstance(call_id, str) or call_id not in instance.calls:
            return False
        sentence = f"the handler's reply is malformed: {flaw}"
        self._on_result(sender, {"id": call_id, "success": False, "error": sentence})
        return True

    def complain(self, sentence: str, error: Exception | None = None) -> None:
        """Count a malformed message, and log one now and then."""
        self.malformed += 1
        now_s = self.clock.monotonic()
        if now_s - self._complained_s >= COMPLAINT_S:
            self._complained_s = now_s
            log_gateway.warning(
                "message refused (%d so far): %s", self.malformed, sentence, exc_info=error
            )

    def _on_request(self, sender: Sender, method: str, params: Any) -> dict[str, Any] | None:
        """Answer a request of a handler; None for those that have no reply."""
        answer = REQUESTS.get(method)
        if answer is None:
            raise WireError(f"unknown method; it is one of {', '.join(sorted(REQUESTS))}")
        if not isinstance(params, dict):
            raise WireError("'params' is an object")
        instance = sender.instance
        if instance is not None:
            if instance.gone:  # it has to register again, for what it ran was given up
                sender = sender._replace(instance=None)
            else:
                self._heard(instance)
        return answer(self, sender, params)

    def _heard(self, instance: Instance) -> None:
        instance.heard_s = self.clock.monotonic()
        instance.heard_us = self.clock.now_us()
        if instance.gone or instance.unreachable:
            instance.gone = instance.unreachable = False
            self.caller.on_handler(instance.handler_id)
            self.loop.call_soon(self.caller.on_ready, instance.handler_id)

    def _on_ping(self, *_: Any) -> dict[str, Any]:
        return {"server_time": self.clock.now_us() / 1e6}

    def _admit(self, sender: Sender, handler_id: str, params: Mapping[str, Any]) -> None:
        """Raise WireError unless this connection may speak for the handler id."""
        said = params.get("secret")
        if self._secret and not (
            isinstance(said, str) and hmac.compare_digest(said.encode(), self._secret)
        ):
            raise NotAdmitted("this server wants the handler secret, in 'secret'")
        if self.keys is None:
            return
        self._refresh_keys()
        owner = self._enrolled.owner(sender.peer.key if sender.peer else None)
        if owner is None:  # revoked a moment ago
            raise NotAdmitted("the key of this connection is not enrolled")
        if owner.handler_id != handler_id:
            raise NotAdmitted(
                f"the key of this connection is enrolled for '{owner.handler_id}', "
                f"not for '{handler_id}'"
            )

    def _on_register(self, sender: Sender, params: Mapping[str, Any]) -> dict[str, Any] | None:
        said = parse_registration(params)
        self._admit(sender, said.handler_id, params)
        if said.address is None:
            if sender.peer is None or sender.peer.identity:
                raise NotAdmitted("a dial-in handler must not set a ZeroMQ identity of its own")
            return self._register(sender, said, None)
        if len(self._registering) >= MAX_REGISTERING:
            raise WireError("too many plain handlers are being registered; register again later")
        self._start(self._register_plain(sender, said, said.address))
        return None

    async def _register_plain(self, sender: Sender, said: Registration, address: str) -> None:
        """Register, and answer when it is stored: it registers but once, so a later server has to
        know of it. A disk in trouble keeps it waiting for SAVE_WAIT_S only.
        """
        try:
            reply = self._register(sender, said, await self._look_up(host_of(address)))
        except WireError as error:
            reply = self._refuse(error)
        else:
            if saving := self._saving.get(said.handler_id):
                await asyncio.wait((saving,), timeout=SAVE_WAIT_S)
        self._post(sender.route, {"success": True, "reply_to": "register", **reply})

    def _register(self, sender: Sender, said: Registration, host: str | None) -> dict[str, Any]:
        """Enter who was admitted; `host` is the numeric one of a plain handler's address."""
        before = self.registry.on_route(sender.route)
        instance, again = self._enter(said, sender, host)
        moved = before is None or before.key != instance.key
        if before is not None and moved:
            self._leave(before)
        forget = [] if said.address else self.caller.on_reconciled(instance, said, moved)
        self.caller.on_handler(said.handler_id)
        self.loop.call_soon(self.caller.on_ready, said.handler_id)
        status = "re-registered" if again else "registered"
        log_gateway.info("handler %s %s (%s)", said.handler_id, status, said.instance)
        return {
            "status": status,
            "message": f"handler '{said.handler_id}' {status} with {len(said.methods)} methods",
            "heartbeat_s": HEARTBEAT_S,
            "liveness": LIVENESS,
            "forget": forget,
        }

    def _enter(self, said: Registration, sender: Sender, host: str | None) -> tuple[Instance, bool]:
        """Enter a registration, opening or keeping the link of a plain handler."""
        now_s, now_us = self.clock.monotonic(), self.clock.now_us()
        displaced = self.registry.displaced_by(said.handler_id)
        if displaced is not None:
            log_gateway.warning("handler %s is forgotten: too many are known", displaced)
            self._forget(displaced)
        known = self.registry.known.get(said.handler_id)
        peer = sender.peer
        assert peer is not None
        if host is None:
            entered = self.registry.register(said, sender.route, now_s, now_us)
        else:
            if not may_call_back(host, peer.address, self._networks):
                raise NotAdmitted(f"callback_networks does not let the server connect to {host}")
            entered = self._link(said, host, peer.key)
            for other in self._plain_instances(said.handler_id):
                if other.gone or other.unreachable:
                    self._leave(other)  # started again elsewhere
        entered[0].peer = peer
        if known is None or known[:2] != (said.place, said.methods):
            self._stop_saving(said.handler_id)
            self._saving[said.handler_id] = self.loop.create_task(self._save(said, now_us))
        return entered

    def _link(self, said: Registration, host: str, key: str | None) -> tuple[Instance, bool]:
        """Enter a plain handler with a link to its address, the one there is or a new one."""
        assert said.address is not None
        port = said.address.rpartition(":")[2]
        endpoint = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        earlier = self.registry.instances.get(said.key)
        link = earlier.route if earlier else None
        try:
            if not isinstance(link, PlainLink) or link.target != (endpoint, key):
                if earlier is not None:
                    earlier.close()
                link = PlainLink(self, endpoint, key)
            now_s, now_us = self.clock.monotonic(), self.clock.now_us()
            entered = self.registry.register(said, link, now_s, now_us)
        except zmq.ZMQError as error:
            raise WireError(f"cannot connect to '{said.address}': {error}") from None
        except WireError:
            assert isinstance(link, PlainLink)
            link.close()
            raise
        link.instance = entered[0]
        return entered

    async def _save(self, said: Registration, now_us: int) -> None:
        """Store who serves a handler id now, however long the disk does not take it."""
        methods = dump_json(
            [{"name": m.name, "doc": m.doc, "parameters": m.parameters} for m in said.methods]
        )
        while True:
            try:
                await self._store.save_handler(said.handler_id, said.place, methods, now_us)
                break
            except ScheduleZeroError:  # the store has logged it
                await asyncio.sleep(SAVE_AGAIN_S)
        del self._saving[said.handler_id]

    def _stop_saving(self, handler_id: str) -> None:
        if saving := self._saving.pop(handler_id, None):
            saving.cancel()

    def _on_heartbeat(self, sender: Sender, params: Mapping[str, Any]) -> dict[str, Any]:
        instance, now_us = sender.instance, self.clock.now_us()
        if instance is None or instance.registration.instance != params.get("instance"):
            return {"success": False, "error": "register first", "code": "unknown_instance"}
        theirs = params.get("time")
        if isinstance(theirs, int | float):
            instance.skew_s = round(theirs - now_us / 1e6, 3)
        return self._on_ping()

    def _on_report_status(self, sender: Sender, params: Mapping[str, Any]) -> dict[str, Any]:
        instance, status = sender.instance, params.get("status")
        if status not in ("draining", "offline"):
            raise WireError("'status' is 'draining' or 'offline'")
        if instance is not None:
            leaving = [instance]
        else:
            handler_id = _field_name(params, "handler_id")
            self._admit(sender, handler_id, params)
            leaving = self._plain_instances(handler_id)
        for one in leaving:
            one.draining = True
            if status == "offline":
                self._leave(one)
            else:
                self.caller.on_handler(one.handler_id)
        return {"message": f"{status} noted"}

    def _plain_instances(self, handler_id: str) -> list[Instance]:
        return [one for one in self.registry.of(handler_id) if isinstance(one.route, PlainLink)]

    def _leave(self, instance: Instance) -> None:
        """An instance is gone for good."""
        instance.gone = True
        instance.close()
        self.registry.remove(instance)
        self._lose(instance)

    def _lose(self, instance: Instance) -> None:
        """What an instance ran is lost."""
        self.caller.on_gone(instance)
        instance.calls.clear()
        self.caller.on_handler(instance.handler_id)

    def _on_log(self, sender: Sender, params: Mapping[str, Any]) -> None:
        call_id, instance = str(params.get("id")), sender.instance
        if instance is None or call_id not in instance.calls:
            return  # it came after the end, or from somebody else
        dropped = params.get("dropped", 0)
        dropped = max(0, dropped) if isinstance(dropped, int) else 0
        lines: list[list[Any]] = [
            [line[0], _one_line(line[1])[:16], _one_line(line[2])]
            for line in _field_list(params, "lines", MAX_LOG_LINES)
            if isinstance(line, list) and len(line) == 3 and isinstance(line[0], int | float)
        ]
        instance.log_bytes += sum(len(line[2]) for line in lines)
        if instance.log_bytes > LOG_BYTES_PER_S * SWEEP_S:
            dropped, lines = dropped + len(lines), []
        self.caller.on_log(call_id, lines, dropped)

    def _on_progress(self, sender: Sender, params: Mapping[str, Any]) -> None:
        call_id, percent = str(params.get("id")), params.get("percent")
        instance = sender.instance
        if instance is None or call_id not in instance.calls:
            return
        instance.progresses += 1
        jobs = min(instance.registration.concurrency, 16)
        if instance.progresses > PROGRESS_PER_S * SWEEP_S * jobs:
            return
        if not isinstance(percent, int | float) or not 0 <= percent <= 100:
            percent = None
        message = params.get("message")
        self.caller.on_progress(call_id, percent, _one_line(message)[:200] if message else None)

    def _on_result(self, sender: Sender, message: Mapping[str, Any]) -> None:
        """A result over the ROUTER: taken only from the connection of a registered instance."""
        call_id, instance = message.get("id"), sender.instance
        if instance is None or not isinstance(call_id, str) or call_id not in instance.calls:
            parse_call_id(call_id)  # raises if it is none
        if instance is None:
            self._post(sender.route, HELLO)
            return
        if not instance.gone:
            self._heard(instance)
        self._settle(instance, str(call_id), message)

    def _settle(self, instance: Instance, call_id: str, message: Mapping[str, Any]) -> None:
        instance.calls.discard(call_id)
        self.caller.on_result(instance, call_id, message)
        self.caller.on_ready(instance.handler_id)

    # Plain handlers

    def on_plain_reply(self, link: PlainLink, asked: str | None, frames: list[bytes]) -> None:
        instance = link.instance
        if instance is None or asked is None:
            return
        try:
            message = decode_message(frames)
        except WireError as error:
            self.complain(str(error))
            message = {"success": False, "error": f"the handler's reply is malformed: {error}"}
        if asked != "ping":
            # A reply without `success`, `result` and `error` is a bare result.
            if not message.keys() & {"success", "result", "error"}:
                message = {"success": True, "result": message}
            if "result" not in message and message.get("success") is True:
                message["result"] = {k: v for k, v in message.items() if k != "success"}
            self._heard(instance)
            self._settle(instance, asked, message)
        elif message.get("success") is True:
            self._heard(instance)
            self.caller.on_ready(instance.handler_id)

    def on_plain_connect(self, link: PlainLink) -> None:
        instance = link.instance
        assert instance is not None
        if instance.is_callable:
            self.caller.on_ready(instance.handler_id)
        else:
            link.ask("ping", PING)

    def on_plain_disconnect(self, link: PlainLink) -> None:
        """The handler's process died or the network broke: what it ran can never be answered."""
        instance = link.instance
        assert instance is not None
        if link.asked is not None:  # its answer must not be taken for that of a later request
            link.reset()
        if not instance.unreachable:
            instance.unreachable = True
            self._lose(instance)

    # Time

    def _sweep(self) -> None:
        """Notice the silent, ping the idle."""
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)
        now_s = self.clock.monotonic()
        stood_still_s = now_s - self._swept_s - SWEEP_S
        self._swept_s = now_s
        self._refresh_keys()
        for instance in list(self.registry.instances.values()):
            instance.log_bytes = instance.progresses = 0
            if stood_still_s > HEARTBEAT_S:  # stopped or paused ourselves: nobody could be heard
                instance.heard_s = min(now_s, instance.heard_s + stood_still_s)
            self._remind(instance, now_s)
        silent, removed = self.registry.expire(now_s)
        for instance in removed:
            instance.close()
        for instance in silent:
            log_gateway.warning(
                "handler %s is gone: silent for %.0f s (%s)",
                instance.handler_id,
                now_s - instance.heard_s,
                instance.registration.instance,
            )
            self._lose(instance)

    def _remind(self, instance: Instance, now_s: float) -> None:
        """Make a quiet instance say that it is there."""
        link, quiet_s = instance.route, now_s - instance.heard_s
        if isinstance(link, bytes):
            if not instance.gone and quiet_s > HEARTBEAT_S + SWEEP_S:
                self._post(link, {"method": "heartbeat", "params": self._on_ping()})
        elif link.asked is None:
            if quiet_s >= HEARTBEAT_S and not instance.calls:
                link.ask("ping", PING)
        elif link.asked == "ping" and now_s - link.asked_s >= HEARTBEAT_S * LIVENESS:
            link.reset()
        elif link.asked != "ping" and not instance.unreachable:
            instance.heard_s = now_s  # ZeroMQ's heartbeats vouch for it while it works

    def load_keys(self) -> Keys:
        """What the key file says by now; while it cannot be read, what it said last."""
        try:
            return self.keys.load() if self.keys else self._enrolled
        except ScheduleZeroError as error:
            self.complain(str(error))
            return self._enrolled

    def _refresh_keys(self) -> None:
        """Apply a change of the key file: who lost his key is gone at once, like a dead handler."""
        keys = self.load_keys()
        if keys is self._enrolled:
            return
        self._enrolled = keys
        for instance in list(self.registry.instances.values()):
            link, peer = instance.route, instance.peer
            used = link.server_key if isinstance(link, PlainLink) else peer.key if peer else None
            owner = keys.owner(used)
            if owner is None or owner.handler_id != instance.handler_id:
                log_gateway.warning("handler %s is gone: its key was revoked", instance.handler_id)
                self._leave(instance)
        self._connections.end_revoked(keys)


PLAIN_CALL_KEYS: Final = ("method", "params", "execution_id", "attempt")
PING: Final[Mapping[str, Any]] = {"method": "ping", "params": {}}
HELLO: Final[Mapping[str, Any]] = {"method": "hello", "params": {}}
Reply = Callable[[Gateway, Sender, Mapping[str, Any]], dict[str, Any] | None]
REQUESTS: Final[Mapping[str, Reply]] = {
    "ping": Gateway._on_ping,
    "register": Gateway._on_register,
    "heartbeat": Gateway._on_heartbeat,
    "report_status": Gateway._on_report_status,
    "log": Gateway._on_log,
    "progress": Gateway._on_progress,
}


# --- Dispatcher -------------------------------------------------------------------------------
#
# The queue is the table of executions that are not final; what stands here is its working copy.
# Every change of state is committed first and acted on after, and the UPDATE that makes it names
# the state it leaves, so that of two changes at once exactly one takes place.

MAX_QUEUED: Final = 10_000  # run-now calls are refused above; fires are always recorded
MAX_QUEUED_BYTES: Final = 16 << 20  # and above this, which is what their parameters take
MAX_QUEUED_OF_HANDLER: Final = MAX_QUEUED // 2  # so that one that is away leaves room for others
MAX_QUEUED_OF_SCHEDULE: Final = 100  # further fires are skipped, with a row
ADOPT_S: Final = 15.0  # what ran under an earlier server is given up if unclaimed by then
CANCEL_GRACE_S: Final = 10.0  # a cancelled run that does not end by then counts as ended
REFUSED_DELAY_S: Final = 0.5
STORE_RETRY_S: Final = 1.0
FAULT_RETRY_S: Final = 60.0  # where the fault is this program's
TICK_S: Final = 0.5

log_dispatcher = logging.getLogger("schedulezero.dispatcher")


class Stage(enum.Enum):
    """Where a live execution stands in the dispatcher."""

    DELAYED = enum.auto()  # due later: jitter or a retry
    BLOCKED = enum.auto()  # behind an earlier execution of its schedule
    READY = enum.auto()  # waits for a free slot
    CLAIMING = enum.auto()  # has a slot; the attempt is being recorded
    RUNNING = enum.auto()
    ADOPTING = enum.auto()  # ran under an earlier server; its handler may still claim it
    ENDING = enum.auto()  # the end of the attempt is being recorded


# Tuples: a member of an enum takes longer to hash than to compare with three others.
WAITING: Final = (Stage.DELAYED, Stage.BLOCKED, Stage.READY)
AT_HANDLER: Final = (Stage.RUNNING, Stage.ADOPTING)


@dataclass(slots=True)
class Live:
    """An execution that is not final, and what the dispatcher knows of it."""

    execution: Execution
    stage: Stage
    call_id: str = ""  # of the last attempt that was begun
    instance: Instance | None = None  # whose slot it has
    limit_s: float = 0.0  # monotonic: end of the attempt's time, of adoption or of a cancel's grace
    began_s: float | None = None  # monotonic: when the attempt was sent; None: by another server
    cancelling: str | None = None  # why it is being cancelled
    waiters: tuple[asyncio.Future[Execution], ...] = ()
    log: LogBuffer | None = None
    progress: tuple[float | None, str | None] | None = None
    scrubber: Scrubber | None = None  # hides the secrets it was called with
    weight: int = 0  # bytes, roughly, of its parameters


class LogBuffer:
    """The log of one execution: its head and its tail, MAX_LOG_BYTES in all."""

    def __init__(self) -> None:
        self._head: list[bytes] = []
        self._tail: deque[bytes] = deque()
        self._head_bytes = self._tail_bytes = self._dropped = 0

    def add(self, lines: list[list[Any]], dropped: int) -> None:
        self._dropped += dropped
        for at_s, level, text in lines:
            stamp = iso_of(round(max(0.0, min(at_s, 4e9)) * 1e6))
            line = f"{stamp} {level} {text[:MAX_ERROR_CHARS]}\n".encode()
            size = len(line)
            is_early = not self._tail and not self._dropped  # after a gap the head is complete
            if is_early and self._head_bytes + size <= MAX_LOG_BYTES // 2:
                self._head.append(line)
                self._head_bytes += size
                continue
            self._tail.append(line)
            self._tail_bytes += size
            while self._tail_bytes > MAX_LOG_BYTES // 2:
                self._tail_bytes -= len(self._tail.popleft())
                self._dropped += 1

    def text(self) -> str:
        gap = f"… {self._dropped} lines left out …\n" if self._dropped else ""
        return b"".join((*self._head, gap.encode(), *self._tail)).decode()


class Outcome(NamedTuple):
    """How an attempt ended."""

    status: Status
    result: Any = None
    error: str | None = None
    traceback: str | None = None


def key_of_runner(instance: Instance, message: Mapping[str, Any]) -> str:
    """Which instance a result is of: the one that sent it, unless it says that another process
    of the same handler had kept it on disk.
    """
    runner = message.get("instance")
    if isinstance(runner, str) and is_identifier(runner):
        return f"{instance.handler_id}/{runner}"
    return instance.key


def outcome_of(message: Mapping[str, Any], cancelling: str | None, is_overdue: bool) -> Outcome:
    """What a handler's result says. A job that ended well although told to stop has succeeded.

    A job that was told to stop, but not by this server, was told by an earlier one, or stopped
    by itself because its time was over and no server was there to say so.
    """
    if message.get("success") is True:
        return Outcome(Status.SUCCESS, message.get("result"))
    if cancelling is not None:
        return Outcome(Status.CANCELLED, error=f"cancelled: {cancelling}")
    error, traceback = message.get("error"), message.get("traceback")
    sentence = error if isinstance(error, str) and error else "the handler gave no reason"
    sentence = sentence[:MAX_ERROR_CHARS]
    if message.get("cancelled") is True:
        return Outcome(Status.TIMEOUT if is_overdue else Status.CANCELLED, error=sentence)
    told = traceback[-MAX_ERROR_CHARS:] if isinstance(traceback, str) else None
    return Outcome(Status.ERROR, error=sentence, traceback=told)


def after_attempt(
    execution: Execution,
    outcome: Outcome,
    now_us: int,
    chance: float,
    duration_us: int | None = None,
) -> Execution:
    """The execution after its attempt: final, or queued again if its retry policy grants it."""
    may_retry = outcome.status in (Status.ERROR, Status.TIMEOUT, Status.LOST)
    if may_retry and execution.attempt < execution.retry.max_attempts:
        delay_s = execution.retry.delay_s(execution.attempt, chance)
        return execution._replace(
            status=Status.QUEUED,
            due_us=now_us + round(delay_s * 1e6),
            error=outcome.error,
            instance=None,
        )
    return execution.changed(
        status=outcome.status,
        completed_us=now_us,
        duration_us=duration_us,
        result=outcome.result,
        error=outcome.error,
    )


def unbegun(execution: Execution) -> Execution:
    """The execution without its last attempt, which no handler has seen."""
    left = execution.attempt - 1
    started_us = execution.started_us if left else None
    return execution._replace(
        status=Status.QUEUED, attempt=left, started_us=started_us, instance=None
    )


class Dispatcher:
    """Takes executions from the store's commit to a handler and back.

    Implements Intake for the store and Caller for the gateway. Everything happens on the loop.
    """

    def __init__(
        self,
        store: Store,
        gateway: Gateway,
        clock: Clock,
        publish: Callable[[str, Any], None],
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._gateway = gateway
        self._clock = clock
        self._publish = publish
        self._chance = chance
        self.secrets = Secrets(store.config)
        self._live: dict[str, Live] = {}
        self._queued_bytes = 0  # of all that is live
        self._ready: dict[str, OrderedDict[str, Live]] = {}  # by handler id and execution id
        self._of_schedule: dict[str | None, dict[str, Live]] = {}  # in the order of their fires
        self._ticker: asyncio.TimerHandle | None = None
        self._closed = False
        store.intake = self
        gateway.caller = self

    # What the API asks

    @property
    def running(self) -> int:
        return len(self._live) - self.waiting

    @property
    def waiting(self) -> int:
        return sum(live.stage in WAITING for live in self._live.values())

    def count_waiting(self) -> tuple[dict[str, int], int | None]:
        """How many executions wait, by why they do, and since when the oldest is due."""
        waiting = [live for live in self._live.values() if live.stage in WAITING]
        stages = Counter(live.stage for live in waiting)
        due = (live.execution.due_us for live in waiting if live.stage is not Stage.DELAYED)
        return {stage.name.lower(): stages[stage] for stage in WAITING}, min(due, default=None)

    def queued(self, handler_id: str) -> int:
        return len(self._ready.get(handler_id, ()))

    def progress(self, execution_id: str) -> tuple[float | None, str | None] | None:
        live = self._live.get(execution_id)
        return live.progress if live else None

    def live_log(self, execution_id: str) -> str:
        """What a live execution has logged in this attempt."""
        live = self._live.get(execution_id)
        return live.log.text() if live and live.log else ""

    def submit(
        self,
        handler_id: str,
        method_name: str,
        job_params: Mapping[str, Any],
        *,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        schedule: Schedule | None = None,
        receipt: Receipt | None = None,
    ) -> Commit[Execution]:
        """Record a call to be made now; settled with the execution, after the commit.

        Raises Overloaded when too many executions are queued already, in all or of this handler,
        InvalidField for a secret that is not there. Not settled so, but with AlreadyMade or
        StoreUnavailable, if the record was not stored.
        """
        self.secrets.check(job_params)
        if len(self._live) >= MAX_QUEUED:
            raise Overloaded(f"{len(self._live)} executions are queued already")
        if self._queued_bytes >= MAX_QUEUED_BYTES:
            raise Overloaded(f"parameters of {self._queued_bytes >> 20} MiB are queued already")
        if (queued := self.queued(handler_id)) >= MAX_QUEUED_OF_HANDLER:
            raise Overloaded(f"{queued} executions wait for the handler '{handler_id}' already")
        config, now_us = self._store.config, self._clock.now_us()
        execution = Execution(
            execution_id=self._store.new_id(),
            schedule_id=schedule.schedule_id if schedule else None,
            schedule_key=schedule.key if schedule else None,
            handler_id=handler_id,
            method_name=method_name,
            job_params=job_params,
            status=Status.QUEUED,
            created_us=now_us,
            due_us=now_us,
            deadline_us=now_us + CALENDAR_GRACE_S * 1_000_000,
            retry=retry or config.retry,
            timeout=timeout or config.timeout,
        )
        if receipt is not None:
            receipt = replace(receipt, made=execution.execution_id)
        return self._store.add_execution(execution, receipt)

    async def end_of(self, submitted: Commit[Execution]) -> Execution:
        """The execution that was submitted, once it is final. Raises why it was not stored."""
        future: asyncio.Future[Execution] = asyncio.get_running_loop().create_future()

        def go_on(stored: Execution | Exception) -> None:
            if isinstance(stored, Exception):
                fulfil(future, stored)
            else:
                self._live[stored.execution_id].waiters += (future,)

        submitted.then(go_on)
        return await future

    async def wait(self, execution_id: str) -> Execution:
        """The execution once it is final. Raises NotFound."""
        if live := self._live.get(execution_id):
            future: asyncio.Future[Execution] = asyncio.get_running_loop().create_future()
            live.waiters += (future,)
            return await future
        if execution := self._store.execution(execution_id):
            return execution
        raise NotFound(f"there is no execution '{execution_id}'")

    async def cancel(self, execution_id: str, reason: str) -> Execution | None:
        """Cancel a queued execution at once, a running one through its handler.

        Returns the execution as it then stands, None if there is none. Raises Conflict if it is
        final. A run that has not ended CANCEL_GRACE_S later is given up as cancelled.
        """
        if live := self._live.get(execution_id):
            await self._cancel(live, reason)
            return self._store.execution(execution_id)
        if execution := self._store.execution(execution_id):
            raise Conflict(f"the execution has ended already: {execution.status}")
        return None

    def _cancel(self, live: Live, reason: str) -> Commit[bool]:
        """Cancel an execution; settled when that, or its end, is stored."""
        if live.stage is Stage.RUNNING and live.instance is not None:
            if live.cancelling is None:
                live.limit_s = self._clock.monotonic() + CANCEL_GRACE_S
            self._gateway.cancel(live.instance, live.call_id, reason)
        elif live.stage in WAITING:
            live.cancelling = reason
            return self._end_cancelled(live)
        # A commit under way looks at it when it is done. What ran under an earlier server may
        # still run: its handler is told when it claims it.
        live.cancelling = reason
        return self._store.record_cancel(live.execution.execution_id, reason)

    def cancel_queued(self, schedule_id: str, reason: str) -> None:
        """Cancel what a schedule has queued; what runs goes on."""
        for live in list(self._of_schedule.get(schedule_id, {}).values()):
            if live.execution.status is Status.QUEUED:
                self._cancel(live, reason)

    # Intake: before and after the commit of a new execution

    def admit(self, execution: Execution) -> Execution:
        if execution.is_final:
            return execution
        earlier = self._of_schedule.get(execution.schedule_id)
        if earlier and execution.fire_us is not None:
            skip = execution.overlap is Overlap.SKIP
            if skip or len(earlier) >= MAX_QUEUED_OF_SCHEDULE:
                return execution._replace(
                    status=Status.SKIPPED,
                    reason=Reason.OVERLAP,
                    completed_us=execution.created_us,
                )
        live = Live(execution, Stage.CLAIMING)
        if (
            execution.due_us <= execution.created_us
            and not (earlier and execution.overlap is not Overlap.ALLOW)
            and not self._ready.get(execution.handler_id)
            and (instance := self._gateway.pick(execution.handler_id)) is not None
        ):
            self._begin(live, instance)
        self._remember(live)
        return live.execution

    def _remember(self, live: Live) -> None:
        execution = live.execution
        self._live[execution.execution_id] = live
        live.weight = weight_of_json(repr(execution.job_params))
        self._queued_bytes += live.weight
        if execution.schedule_id is not None:
            of_schedule = self._of_schedule.setdefault(execution.schedule_id, {})
            of_schedule[execution.execution_id] = live

    def accept(self, execution: Execution) -> None:
        live = self._live.get(execution.execution_id)
        if live is None:  # final from the start: missed or skipped
            self._publish("execution", execution)
            return
        if execution.overlap is Overlap.REPLACE and execution.fire_us is not None:
            for other in list(self._of_schedule[execution.schedule_id].values()):
                if other is not live:
                    self._cancel(other, "replaced")
        if live.instance is not None:
            self._send(live)
        else:
            self._again(live)
        self._tick_soon()

    def withdraw(self, execution: Execution) -> None:
        live = self._live.get(execution.execution_id)
        if live is not None:
            self._free(live)
            self._forget(live)
            self.on_ready(execution.handler_id)

    def _begin(self, live: Live, instance: Instance) -> None:
        """Take a slot for the next attempt, which is to be recorded before it is sent."""
        execution, now_us = live.execution, self._clock.now_us()
        attempt = execution.attempt + 1
        live.execution = execution.changed(
            status=Status.RUNNING, attempt=attempt, started_us=now_us, instance=instance.key
        )
        live.call_id, live.instance = f"{execution.execution_id}:{attempt}", instance
        instance.calls.add(live.call_id)

    def _must_wait(self, execution: Execution) -> bool:
        """Whether an earlier execution of the schedule must end first."""
        if execution.schedule_id is None or execution.overlap is Overlap.ALLOW:
            return False
        return next(iter(self._of_schedule[execution.schedule_id])) != execution.execution_id

    # From the queue to a handler

    def _enqueue(self, live: Live) -> None:
        """Put a queued execution where it belongs now; end it, if it was cancelled meanwhile."""
        delay_s = (live.execution.due_us - self._clock.now_us()) / 1e6
        if live.cancelling is not None:
            self._end_cancelled(live)
        elif delay_s > 0:
            self._delay(live, delay_s)
        else:
            self._line_up(live)

    def _delay(self, live: Live, delay_s: float) -> None:
        live.stage = Stage.DELAYED
        execution_id = live.execution.execution_id
        asyncio.get_running_loop().call_later(delay_s, self._on_due, execution_id)

    def _on_due(self, execution_id: str) -> None:
        live = self._live.get(execution_id)
        if live is not None and live.stage is Stage.DELAYED and not self._closed:
            self._line_up(live)

    def _line_up(self, live: Live) -> None:
        """Let an execution that is due wait for its turn."""
        if self._must_wait(live.execution):
            live.stage = Stage.BLOCKED
            return
        live.stage, execution = Stage.READY, live.execution
        ready = self._ready.setdefault(execution.handler_id, OrderedDict())
        ready[execution.execution_id] = live
        self.on_ready(execution.handler_id)

    def _step_out(self, live: Live, stage: Stage) -> None:
        """Take an execution out of its handler's queue, if it stands there."""
        if live.stage is Stage.READY:
            del self._ready[live.execution.handler_id][live.execution.execution_id]
        live.stage = stage

    def on_ready(self, handler_id: str) -> None:
        """Give the handler's queue to its free slots."""
        ready = self._ready.get(handler_id)
        while ready:
            instance = self._gateway.pick(handler_id)
            if instance is None or self._closed:
                return
            live, now_us = next(iter(ready.values())), self._clock.now_us()
            if self._is_missed(live.execution, now_us):
                self._miss(live, now_us)
            else:
                self._claim(live, instance)
        self._ready.pop(handler_id, None)

    def _claim(self, live: Live, instance: Instance) -> None:
        self._step_out(live, Stage.CLAIMING)
        self._begin(live, instance)
        self._store.claim_execution(live.execution).then(partial(self._on_claimed, live))

    def _on_claimed(self, live: Live, claimed: bool | Exception) -> None:
        if claimed is True:
            self._send(live)
            return
        self._free(live)
        if not claimed:
            execution_id = live.execution.execution_id
            log_dispatcher.error("execution %s was not queued", execution_id)
            live.execution = self._store.execution(execution_id) or live.execution
            self._done(live)
            self.on_ready(live.execution.handler_id)
            return
        live.execution = unbegun(live.execution)
        if live.cancelling is not None:
            self._end_cancelled(live)
            self.on_ready(live.execution.handler_id)
        else:
            self._delay(live, STORE_RETRY_S)

    def _send(self, live: Live) -> None:
        """Make the call, now that the attempt is recorded."""
        execution, instance = live.execution, live.instance
        assert instance is not None
        if live.cancelling is not None:
            self._free(live)
            self._end_cancelled(live)
            self.on_ready(execution.handler_id)
            return
        if not instance.is_callable:  # it went while the attempt was being recorded
            self._give_back(live, 0.0)
            return
        params = execution.job_params
        if has_secrets(params):
            try:
                params, live.scrubber = self._reveal(instance, params)
            except ScheduleZeroError as error:
                self._free(live)
                self._end(live, Outcome(Status.ERROR, error=f"not sent: {error}"))
                self.on_ready(execution.handler_id)
                return
        call = {
            "method": execution.method_name,
            "params": params,
            "execution_id": execution.execution_id,
            "attempt": execution.attempt,
            "timeout": execution.timeout,
        }
        live.stage = Stage.RUNNING
        live.began_s = self._clock.monotonic()
        live.limit_s = live.began_s + execution.timeout
        self._gateway.call(instance, live.call_id, call)
        self._publish("execution", execution)

    def _reveal(self, instance: Instance, job_params: Mapping[str, Any]) -> tuple[Any, Scrubber]:
        """The parameters with their secrets, for a handler on a link that nobody else reads."""
        if not instance.is_private:
            raise NotAllowed(
                "the parameters refer to secrets, which go to no handler on another machine "
                "over an unencrypted link"
            )
        return self.secrets.insert(job_params)

    def on_unsent(self, call_id: str) -> None:
        live = self._called(call_id)
        if live is not None and live.stage is Stage.RUNNING:
            self._give_back(live, 0.0)

    def _give_back(self, live: Live, delay_s: float) -> Commit[bool]:
        """Queue an execution again whose attempt never began."""
        self._free(live)
        due_us = self._clock.now_us() + round(delay_s * 1e6)
        return self._store_end(live, unbegun(live.execution)._replace(due_us=due_us))

    # From a handler to the record

    def _called(self, call_id: str) -> Live | None:
        """The live execution whose last attempt this is."""
        live = self._live.get(call_id.partition(":")[0])
        return live if live is not None and live.call_id == call_id else None

    def _held(self, call_id: str, runner: str) -> Live | None:
        """The live execution of a call that an instance runs, or ran, if it should."""
        live = self._called(call_id)
        if live is None or live.stage not in AT_HANDLER or live.execution.instance != runner:
            return None
        return live

    def on_result(self, instance: Instance, call_id: str, message: Mapping[str, Any]) -> None:
        live = self._held(call_id, key_of_runner(instance, message))
        if live is None:
            self._on_late(instance, call_id, message)
            return
        if message.get("refused") is True:
            self._give_back(live, REFUSED_DELAY_S)
            self._gateway.acknowledge(instance, call_id)
            return
        if live.scrubber is not None:
            said = {key: message[key] for key in ("result", "error", "traceback") if key in message}
            message = {**message, **{k: live.scrubber.value(v) for k, v in said.items()}}
        is_overdue = message.get("cancelled") is True and self._is_overdue(live.execution)
        ended = self._end(live, outcome_of(message, live.cancelling, is_overdue))
        ended.then(lambda _: self._gateway.acknowledge(instance, call_id))

    def _is_overdue(self, execution: Execution) -> bool:
        """Whether its attempt has had its time, also where an earlier server began it."""
        ran_us = self._clock.now_us() - (execution.started_us or 0)
        return ran_us >= round(execution.timeout * 1e6)

    def _on_late(self, instance: Instance, call_id: str, message: Mapping[str, Any]) -> None:
        """A result nobody waits for: kept on its attempt as late, never changing the state."""
        live = self._called(call_id)
        if live is not None and live.stage is Stage.ENDING:
            return  # a repeated result; acknowledged when the first one is stored
        if message.get("cancelled") is True:  # the attempt ended as is recorded: it obeyed
            self._gateway.acknowledge(instance, call_id)
            return

        def acknowledge(kept: bool | Exception) -> None:
            if not isinstance(kept, Exception):
                self._gateway.acknowledge(instance, call_id)

        runner, now_us = key_of_runner(instance, message), self._clock.now_us()
        self._store.record_late(*parse_call_id(call_id), runner, now_us).then(acknowledge)

    def _end_cancelled(self, live: Live) -> Commit[bool]:
        return self._end(live, Outcome(Status.CANCELLED, error=f"cancelled: {live.cancelling}"))

    def _end(self, live: Live, outcome: Outcome) -> Commit[bool]:
        """Record how an attempt ended and go on from there; settled after the commit."""
        before, now_us = live.execution, self._clock.now_us()
        began = before.attempt > 0 and before.status is Status.RUNNING
        attempt = None
        if began and outcome.status is not Status.SUCCESS:
            said = (outcome.status, outcome.error, outcome.traceback)
            started_us = before.started_us or now_us
            attempt = Attempt(before.attempt, before.instance, started_us, now_us, *said)
        log, live.log = live.log.text() if live.log else None, None
        duration_us = self._duration_us(live, now_us) if began else None
        after = after_attempt(before, outcome, now_us, self._chance(), duration_us)
        return self._store_end(live, after, attempt, log)

    def _duration_us(self, live: Live, now_us: int) -> int:
        """How long the attempt took: by the monotonic clock, unless an earlier server began it."""
        if live.began_s is not None:
            return round((self._clock.monotonic() - live.began_s) * 1e6)
        return max(0, now_us - (live.execution.started_us or now_us))

    def _store_end(
        self, live: Live, after: Execution, attempt: Attempt | None = None, log: str | None = None
    ) -> Commit[bool]:
        """Record what an execution is now, final or queued again, and go on from there.

        Repeated until the store takes it: what a handler has done is not forgotten. What is
        returned is settled after that, or never, if the server closes before.
        """
        begun = live.execution.attempt
        self._step_out(live, Stage.ENDING)
        live.execution, live.instance = after, None
        if after.is_final:
            write = partial(self._store.end_execution, after, attempt, log)
        else:
            write = partial(self._store.requeue_execution, after, attempt, begun, log)
        settled: Commit[bool] = Commit()
        self._store_until_done(live, write, settled)
        return settled

    def _store_until_done(
        self, live: Live, write: Callable[[], Commit[bool]], settled: Commit[bool]
    ) -> None:
        def on_done(outcome: bool | Exception) -> None:
            if not isinstance(outcome, Exception):
                (self._done if live.execution.is_final else self._again)(live)
                settled.settle(outcome)
                return
            known = isinstance(outcome, ScheduleZeroError)  # and told of by the store
            if not known:
                log_dispatcher.error("the end of an attempt was not stored", exc_info=outcome)
            if not self._closed:
                wait_s = STORE_RETRY_S if known else FAULT_RETRY_S
                loop = asyncio.get_running_loop()
                loop.call_later(wait_s, self._store_until_done, live, write, settled)

        write().then(on_done)

    def _done(self, live: Live) -> None:
        """The final state is stored: tell everybody, let the next of the schedule go."""
        self._forget(live)
        for waiter in live.waiters:
            fulfil(waiter, live.execution)
        self._publish("execution", live.execution)

    def _again(self, live: Live) -> None:
        """A queued execution is stored: let it wait for its turn."""
        self._publish("execution", live.execution)
        self._enqueue(live)

    def _free(self, live: Live) -> None:
        if live.instance is not None:
            live.instance.calls.discard(live.call_id)
            live.instance = None

    def _forget(self, live: Live) -> None:
        execution = live.execution
        if self._live.pop(execution.execution_id, None) is live:
            self._queued_bytes -= live.weight
        of_schedule = self._of_schedule.get(execution.schedule_id)
        if of_schedule is None:
            return
        of_schedule.pop(execution.execution_id, None)
        if not of_schedule:
            del self._of_schedule[execution.schedule_id]
            return
        following = next(iter(of_schedule.values()))
        if following.stage is Stage.BLOCKED:
            self._line_up(following)

    # What handlers tell

    def on_reconciled(self, instance: Instance, said: Registration, moved: bool) -> list[str]:
        forget = []
        if moved:
            instance.calls.clear()
        for call_id in said.running:
            live = self._held(call_id, instance.key)
            if live is None:  # it holds no slot: of a forgotten call no result has to come
                forget.append(call_id)
                continue
            instance.calls.add(call_id)
            if live.stage is Stage.ADOPTING:
                granted_s = CANCEL_GRACE_S if live.cancelling else live.execution.timeout
                live.limit_s = self._clock.monotonic() + granted_s
            live.stage, live.instance = Stage.RUNNING, instance
            if live.cancelling is not None:
                self._gateway.cancel(instance, call_id, live.cancelling)
        finished = {str(message.get("id")): message for message in said.finished}
        for call_id, message in finished.items():
            instance.calls.discard(call_id)
            self.on_result(instance, call_id, message)
        if moved:
            self.on_gone(instance, keep={*said.running, *finished})
        return forget

    def on_gone(self, instance: Instance, keep: Collection[Any] = ()) -> None:
        """Count as lost what an instance was running, but for the calls to keep."""
        for live in list(self._live.values()):
            is_kept = live.call_id in keep
            if not is_kept and self._held(live.call_id, instance.key):
                instance.calls.discard(live.call_id)
                self._end_lost(live)

    def _end_lost(self, live: Live) -> None:
        if live.cancelling is not None:
            self._end_cancelled(live)
            return
        handler_id = live.execution.handler_id
        sentence = f"handler '{handler_id}' was lost while it ran this"
        self._end(live, Outcome(Status.LOST, error=sentence))

    def on_handler(self, handler_id: str) -> None:
        self._publish("handler", handler_id)

    def on_log(self, call_id: str, lines: list[list[Any]], dropped: int) -> None:
        live = self._called(call_id)
        if live is None or live.stage is not Stage.RUNNING:
            return
        if live.log is None:
            live.log = LogBuffer()
        if live.scrubber is not None:
            lines = [[at_s, level, live.scrubber.text(text)] for at_s, level, text in lines]
        live.log.add(lines, dropped)
        self._publish("log", {**self._place(live), "lines": lines})

    def on_progress(self, call_id: str, percent: float | None, message: str | None) -> None:
        live = self._called(call_id)
        if live is None:
            return
        if live.scrubber is not None and message is not None:
            message = live.scrubber.text(message)
        live.progress = (percent, message)
        self._publish("progress", {**self._place(live), "percent": percent, "message": message})

    @staticmethod
    def _place(live: Live) -> dict[str, Any]:
        return {"execution_id": live.execution.execution_id, "attempt": live.execution.attempt}

    # Time

    def adopt(self) -> None:
        """At start: go on with what an earlier server left unfinished."""
        adopt_until_s = self._clock.monotonic() + ADOPT_S
        for execution in self._store.live_executions():
            call_id = f"{execution.execution_id}:{execution.attempt}"
            live = Live(execution, Stage.ADOPTING, call_id, limit_s=adopt_until_s)
            live.cancelling = execution.cancelling
            if has_secrets(execution.job_params):
                live.scrubber = self.secrets.scrubber(execution.job_params)
            self._remember(live)
        for live in list(self._live.values()):
            if live.execution.status is Status.QUEUED:
                self._enqueue(live)
        self._tick_soon()

    def close(self) -> None:
        """Make no more calls. What runs goes on at its handlers, for the next server to adopt."""
        self._closed = True
        if self._ticker is not None:
            self._ticker.cancel()

    def _tick_soon(self) -> None:
        if self._ticker is None and self._live and not self._closed:
            self._ticker = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        """Look for attempts out of time and queued executions past their start deadline."""
        self._ticker = None
        now_s, now_us = self._clock.monotonic(), self._clock.now_us()
        for live in list(self._live.values()):
            if live.stage in AT_HANDLER:
                if now_s >= live.limit_s:
                    self._on_limit(live)
            elif live.stage in WAITING and self._is_missed(live.execution, now_us):
                self._miss(live, now_us)
        self._tick_soon()

    def _on_limit(self, live: Live) -> None:
        if live.stage is Stage.ADOPTING or live.cancelling is not None:
            self._end_lost(live)
            return
        if live.instance is not None:
            self._gateway.cancel(live.instance, live.call_id, "timeout")
        sentence = f"not done after {live.execution.timeout:g} s"
        self._end(live, Outcome(Status.TIMEOUT, error=sentence))

    @staticmethod
    def _is_missed(execution: Execution, now_us: int) -> bool:
        """Past its start deadline. A retry has none: its execution has started before."""
        deadline_us = execution.deadline_us
        return execution.attempt == 0 and deadline_us is not None and now_us > deadline_us

    def _miss(self, live: Live, now_us: int) -> None:
        instances = self._gateway.registry.of(live.execution.handler_id)
        reason = Reason.TOO_LATE
        if live.stage is Stage.BLOCKED:
            reason = Reason.OVERLAP
        elif not any(instance.is_callable for instance in instances):
            reason = Reason.HANDLER_OFFLINE
        missed = live.execution._replace(status=Status.MISSED, reason=reason, completed_us=now_us)
        self._store_end(live, missed)


# --- Events -----------------------------------------------------------------------------------

MAX_EVENTS_KEPT: Final = 1_000
MAX_EVENT_BYTES_KEPT: Final = 2 << 20
MAX_SUBSCRIBERS: Final = 64
FLUSH_S: Final = 0.05  # events of so long go out together; the last word on a thing is enough
GAP: Final = b'{"lost":true}'


Framing = Callable[[str, str, bytes], bytes]
"""Puts an event's id, kind and JSON into the bytes that go to a client."""


def frame_for_event_stream(event_id: str, kind: str, body: bytes) -> bytes:
    """An event as server-sent events have it."""
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (event_id.encode(), kind.encode(), body)


class Event(NamedTuple):
    """Something that happened. `about` names the thing; a later event on it makes this one old."""

    number: int
    kind: str
    about: str | None
    value: Any
    weight: int  # bytes, roughly


def weight_of(kind: str, value: Any) -> int:
    """The bytes that keeping an event takes, roughly, but never less than for its large parts."""
    if kind == "log":
        return sum(len(line[2]) + 40 for line in value["lines"])
    if isinstance(value, Execution):
        values = weight_of_json(repr(value.job_params)) + weight_of_json(repr(value.result))
        return 500 + values + len(value.error or "")
    return 500


@dataclass(eq=False, slots=True)
class Subscriber:
    """A client that watches. `write` answers False if it takes no more."""

    write: Callable[[bytes], bool]
    framing: Framing
    sent: int  # the number of the last event it was sent


class Events:
    """Fan-out to the browsers that watch.

    The last events are kept once, for all. A subscriber that stays away for longer than what is
    kept is told of the gap.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, boot: str, encode: Callable[[str, Any], bytes | None]
    ) -> None:
        """`boot` tells this server's event ids from an earlier one's; `encode` renders a value."""
        self._loop = loop
        self._boot = boot
        self._encode = encode
        self._kept: deque[Event] = deque()
        self._weight = 0
        self._number = 0
        self._subscribers: set[Subscriber] = set()
        self._flusher: asyncio.TimerHandle | None = None

    @property
    def subscribers(self) -> int:
        return len(self._subscribers)

    @property
    def _dropped(self) -> int:
        """The number of the last event that is not kept any more."""
        return self._kept[0].number - 1 if self._kept else self._number

    def publish(self, kind: str, value: Any) -> None:
        """Note an event; it is rendered when it is sent, and only if somebody watches."""
        self._number += 1
        about = value if isinstance(value, str) else getattr(value, "execution_id", None)
        weight = weight_of(kind, value)
        self._kept.append(Event(self._number, kind, about, value, weight))
        self._weight += weight
        while len(self._kept) > MAX_EVENTS_KEPT or self._weight > MAX_EVENT_BYTES_KEPT:
            self._weight -= self._kept.popleft().weight
        if self._subscribers and self._flusher is None:
            self._flusher = self._loop.call_later(FLUSH_S, self._flush)

    def subscribe(
        self, write: Callable[[bytes], bool], framing: Framing, last_event_id: str | None
    ) -> Callable[[], None]:
        """Send events to `write` from now on, or from the one after `last_event_id`.

        Returns what ends it. Raises Overloaded when too many watch.
        """
        if len(self._subscribers) >= MAX_SUBSCRIBERS:
            raise Overloaded(f"{MAX_SUBSCRIBERS} clients watch events already")
        subscriber = Subscriber(write, framing, self._number)
        self._subscribers.add(subscriber)
        if last_event_id:
            boot, _, digits = last_event_id.rpartition("-")
            number = int(digits) if re.fullmatch(r"[0-9]{1,18}", digits) else -1
            if boot == self._boot and self._dropped <= number <= self._number:
                subscriber.sent = number
                self._flush()
            else:
                write(framing(self._id_of(self._number), "gap", GAP))
        return partial(self._subscribers.discard, subscriber)

    def _flush(self) -> None:
        """Send every subscriber what it has not had, but each thing only as it last was."""
        self._flusher = None
        oldest_sent = min((each.sent for each in self._subscribers), default=self._number)
        events, dropped = self._encoded_since(oldest_sent), self._dropped
        for subscriber in list(self._subscribers):
            framing, sent = subscriber.framing, subscriber.sent
            frames = [framing(self._id_of(dropped), "gap", GAP)] if sent < dropped else []
            frames += [
                framing(self._id_of(number), kind, body)
                for number, kind, body in events
                if number > sent
            ]
            subscriber.sent = self._number
            if frames and not subscriber.write(b"".join(frames)):
                self._subscribers.discard(subscriber)

    def _encoded_since(self, number: int) -> list[tuple[int, str, bytes]]:
        """The events after one, rendered; of those on one thing only the last."""
        events: list[tuple[int, str, bytes]] = []
        later: set[tuple[str, str]] = set()
        for event in reversed(self._kept):
            if event.number <= number:
                break
            if event.about is not None:
                if (event.kind, event.about) in later:
                    continue
                later.add((event.kind, event.about))
            body = self._encode(event.kind, event.value)
            if body is not None:
                events.append((event.number, event.kind, body))
        return events[::-1]

    def _id_of(self, number: int) -> str:
        return f"{self._boot}-{number}"


# --- Metrics ----------------------------------------------------------------------------------
#
# What is counted is counted where it happens, as a plain number. The text is made when somebody
# asks for it; everything that can be looked up then is looked up then.

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_LABELS: Final = 50  # of one family; what is beyond shares the label `other`
STATUS_FILE: Final = "status.json"  # what the governor says of its children
DURATION_BUCKETS_S: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 1_800.0, 7_200.0)
LATENESS_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 60.0, 3_600.0)
COMMIT_BUCKETS_S: Final = (0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0)

Labels = tuple[tuple[str, str], ...]
Sample = tuple[str, Labels, float]  # what follows the family's name, labels, value


class Histogram:
    """How often a value fell into each of some fixed buckets. One thread may observe."""

    __slots__ = ("_buckets", "_counts", "_sum")

    def __init__(self, buckets: Sequence[float]) -> None:
        """`buckets`: upper bounds, growing."""
        self._buckets = tuple(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value; one that is on a bound belongs below it."""
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def samples(self, labels: Labels = ()) -> Iterator[Sample]:
        """The cumulative buckets, sum and count, which agree with one another."""
        total = 0
        counts = self._counts.copy()  # another thread may be counting
        for bound, count in zip((*map(render_number, self._buckets), "+Inf"), counts, strict=True):
            total += count
            yield "_bucket", (*labels, ("le", bound)), total
        yield "_sum", labels, self._sum
        yield "_count", labels, total


class Family(NamedTuple):
    """All samples of one name. `kind` is counter, gauge or histogram."""

    name: str
    kind: str
    about: str
    samples: Iterable[Sample]


def single(value: float) -> Iterable[Sample]:
    """The samples of a family without labels."""
    return (("", (), value),)


def labelled(
    label: str,
    values: Iterable[tuple[str, float]],
    join: Callable[[Iterable[float]], float] = sum,
) -> Iterable[Sample]:
    """The samples of a family with one label; those beyond MAX_LABELS joined in one."""
    pairs = sorted(values, key=lambda pair: pair[0] == "other")  # whoever has that name comes last
    if others := [value for _, value in pairs[MAX_LABELS:]]:
        pairs[MAX_LABELS:] = [("other", join(others))]
    return [("", ((label, name),), value) for name, value in pairs]


def render_metrics(families: Iterable[Family]) -> bytes:
    """Prometheus' text format, version 0.0.4. A family without samples is left out."""
    lines: list[str] = []
    for name, kind, about, family_samples in families:
        samples = [
            f"{name}{suffix}{_render_labels(labels)} {render_number(value)}"
            for suffix, labels, value in family_samples
        ]
        if samples:
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *samples]
    return ("\n".join(lines) + "\n").encode()


def render_number(value: float) -> str:
    """Whole numbers as such, so that no count loses its last digits."""
    return str(int(value)) if value == int(value) else repr(float(value))


LABEL_ESCAPES: Final = MappingProxyType(str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""}))


def _render_labels(labels: Labels) -> str:
    pairs = (f'{name}="{value.translate(LABEL_ESCAPES)}"' for name, value in labels)
    return "{" + ",".join(pairs) + "}" if labels else ""


class Metrics:
    """What the server has done since it started."""

    def __init__(self) -> None:
        self.executions: dict[Status, int] = dict.fromkeys(sorted(TERMINAL), 0)
        self.durations = Histogram(DURATION_BUCKETS_S)
        self.lateness = Histogram(LATENESS_BUCKETS_S)
        self.commits = Histogram(COMMIT_BUCKETS_S)
        self.requests: dict[tuple[str, str, int], int] = {}
        self.steps_forward = self.steps_back = 0

    def count_execution(self, execution: Execution) -> None:
        """Note a state of an execution: its first start and its end count."""
        started_us, fire_us = execution.started_us, execution.fire_us
        is_first = execution.status is Status.RUNNING and execution.attempt == 1
        if execution.completed_us is not None:
            self.executions[execution.status] += 1
            if execution.duration_us is not None:
                self.durations.observe(execution.duration_us / 1e6)
        elif is_first and started_us is not None and fire_us is not None:
            self.lateness.observe((started_us - fire_us) / 1e6)

    def count_request(self, method: str, route: str, status: int) -> None:
        """Note an answer. `route` is the pattern of the path, never the path itself."""
        key = (method, route, status)
        self.requests[key] = self.requests.get(key, 0) + 1

    def count_step(self, step_us: int) -> None:
        """Note that the wall clock was set."""
        self.steps_forward += step_us > 0
        self.steps_back += step_us < 0

    def families(self) -> list[Family]:
        steps = (("forward", self.steps_forward), ("back", self.steps_back))
        requests = [
            ("", (("method", method), ("route", route), ("status", str(status))), count)
            for (method, route, status), count in sorted(self.requests.items())
        ]
        return [
            Family("schedulezero_executions_total", "counter", "Executions that ended, by status.",
                   labelled("status", self.executions.items())),
            Family("schedulezero_execution_duration_seconds", "histogram",
                   "How long the last attempt of an execution took.", self.durations.samples()),
            Family("schedulezero_fire_lateness_seconds", "histogram",
                   "From a fire time to the start of its execution.", self.lateness.samples()),
            Family("schedulezero_store_commit_seconds", "histogram",
                   "How long a commit to the database took.", self.commits.samples()),
            Family("schedulezero_clock_steps_total", "counter", "Times the wall clock was set.",
                   labelled("direction", steps)),
            Family("schedulezero_http_requests_total", "counter",
                   "HTTP answers, by route and status.", requests),
        ]  # fmt: skip


# What the kernel tells of this process.


def load_rss_bytes() -> int | None:
    """Resident memory of this process; None where the kernel does not tell."""
    with suppress(OSError), open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def load_written_bytes(process: int | str = "self") -> int | None:
    """What a process has had written to disks; None where the kernel does not tell."""
    with suppress(OSError), open(f"/proc/{process}/io", "rb") as file:
        fields = dict(line.split(b": ") for line in file)
        return int(fields[b"write_bytes"])
    return None


def status_path(data_dir: str) -> str:
    return os.path.join(data_dir, STATUS_FILE)


def load_restarts(data_dir: str) -> dict[str, int]:
    """How often the governor of this process has restarted each child; empty without one."""
    with suppress(OSError, ValueError), open(status_path(data_dir), "rb") as file:
        shown = json.load(file)
        if shown["pid"] == os.getppid():
            return {child["name"]: child["restarts"] for child in shown["children"]}
    return {}


def describe_process(now_s: float, up_s: float) -> list[Family]:
    """The families that Prometheus' own clients have, under the same names."""
    times = os.times()
    rss, written = load_rss_bytes(), load_written_bytes()
    return [
        Family("process_start_time_seconds", "gauge", "When the server started, in Unix time.",
               single(round(now_s - up_s, 2))),
        Family("process_cpu_seconds_total", "counter", "Processor time of the server.",
               single(round(times.user + times.system, 2))),
        Family("process_resident_memory_bytes", "gauge", "Resident memory of the server.",
               () if rss is None else single(rss)),
        Family("schedulezero_disk_written_bytes_total", "counter",
               "What the server had written to disks.", () if written is None else single(written)),
    ]  # fmt: skip


# --- Access -----------------------------------------------------------------------------------
#
# Who may ask for what. First the decisions, pure: credentials, hosts, origins, roles, how often
# one may be wrong. Then tokens and sessions, each kind in a file of mode 0600 beside the
# database, so that its copies and backups hold no credentials. The command line alone writes
# the tokens, the server alone the sessions; both files hold hashes only.

TOKENS_FILE: Final = "tokens.json"
SESSIONS_FILE: Final = "sessions.json"
ADMIN_TOKEN_FILE: Final = "admin-token"
MAX_TOKENS: Final = 1_000
MAX_SESSIONS: Final = 1_000
MAX_TOKEN_DAYS: Final = 36_500
DAY_US: Final = 86_400_000_000
SESSION_IDLE_US: Final = DAY_US // 2
SESSION_LIFE_US: Final = 7 * DAY_US
SESSION_SEEN_US: Final = 600_000_000  # how far behind the file may be on when one was last used
FREE_FAILURES: Final = 10  # wrong credentials from one address before it has to wait
FAILURE_EVERY_S: Final = 6.0  # after those, one more in this time
MAX_ADDRESSES: Final = 1_000  # whose failures are remembered
MAX_HOSTS_CACHED: Final = 256
MAX_TARGET_CHARS: Final = 200
FORWARDED: Final = frozenset({"x-forwarded-for", "forwarded", "x-real-ip", "via"})
CREDENTIAL: Final = re.compile(r"sz_([0-9a-f]{8})_[0-9a-f]{64}")
TLS_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2; those of 1.3 are all good

log_access: Final = logging.getLogger("schedulezero.access")

HeaderLines = tuple[tuple[str, str], ...]


class HttpError(ScheduleZeroError):
    """A request that is refused: status, code, sentence, headers to add."""

    def __init__(self, status: int, code: str, sentence: str, headers: HeaderLines = ()) -> None:
        super().__init__(sentence)
        self.status = status
        self.code = code
        self.headers = headers


# Credentials


@dataclass(frozen=True, slots=True)
class Token:
    """What is kept of a token: everything but the token."""

    token_id: str  # the first part of the token, which is no secret
    name: str
    role: Role
    digest: str
    created_us: int
    expires_us: int | None = None

    def is_valid_at(self, now_us: int) -> bool:
        return self.expires_us is None or now_us < self.expires_us


@dataclass(frozen=True, slots=True)
class Session:
    """A browser that logged in with a token, and lasts no longer than that."""

    session_id: str
    digest: str
    token_id: str
    created_us: int
    seen_us: int

    def is_valid_at(self, now_us: int) -> bool:
        return now_us < min(self.created_us + SESSION_LIFE_US, self.seen_us + SESSION_IDLE_US)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks."""

    name: str  # of the token; "loopback" where no login is needed, "" for nobody
    role: Role
    token_id: str = ""
    session_id: str = ""
    expires_us: int | None = None


NOBODY: Final = Identity("", Role.ANYONE)
LOOPBACK: Final = Identity("loopback", Role.ADMIN)


def make_credential() -> tuple[str, str]:
    """A new secret of 256 random bits, and the id within it by which it is looked up."""
    key = secrets.token_hex(4)
    return f"sz_{key}_{secrets.token_hex(32)}", key


def digest_of(credential: str) -> str:
    """What is stored of a credential.

    One round of SHA-256 is enough: slow hashes protect passwords, of which there are few enough
    to try. Nobody tries 2**256 tokens, and each request would pay for the slowness.
    """
    return hashlib.sha256(credential.encode()).hexdigest()


def parse_credential(text: str) -> str | None:
    """The id within a credential; None for a text that is none."""
    match = CREDENTIAL.fullmatch(text)
    return match[1] if match else None


def is_credential(text: str, digest: str) -> bool:
    """Compare in a time that does not depend on where the two differ."""
    return hmac.compare_digest(digest_of(text), digest)


def parse_bearer(authorization: str) -> str:
    """The token of an Authorization header; empty for another scheme."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def parse_cookie(cookies: str, name: str) -> str:
    """The value of one cookie of a Cookie header; empty if it is not there."""
    pairs = (part.strip().partition("=")[::2] for part in cookies.split(";"))
    return dict(pairs).get(name, "")


# Where the server can be reached, and from which pages


def requires_login(config: Config, has_tokens: bool) -> bool:
    """On the loopback address alone, and until the first token is made, nobody need log in."""
    is_meant_for_others = bool(config.allowed_hosts or config.cors_origins)
    is_exposed = is_meant_for_others or not is_this_machine(config.http_host)
    return config.auth == "required" or has_tokens or is_exposed


def describe_insecurity(config: Config) -> str | None:
    """What `allow_insecure` allows here; None if nothing."""
    if is_this_machine(config.http_host) or config.tls_cert:
        return None
    return f"allow_insecure: tokens and data cross the network to {config.http_host} unencrypted"


def own_names(config: Config, hostname: str) -> frozenset[str]:
    """The names a client may call the server by. Addresses are decided by is_host_allowed."""
    names = {"localhost", config.http_host.lower(), *config.allowed_hosts}
    if not is_this_machine(config.http_host):
        short = hostname.lower().partition(".")[0]
        names |= {hostname.lower(), short, f"{short}.local"}
    return frozenset(names - {"", "0.0.0.0", "::"})


def is_host_allowed(host: str, names: frozenset[str], *, any_address: bool) -> bool:
    """Whether a Host header names this server.

    A page that had its own name point here (DNS rebinding) sends that name. Bare addresses
    cannot be rebound, so where others may come at all, any of them will do; 0.0.0.0 is a
    browser's detour to the loopback address.
    """
    name = host_name(host)
    if name in names or (address := parse_ip(name)) is None:
        return name in names
    return address.is_loopback or (any_address and not address.is_unspecified)


def host_name(host: str) -> str:
    """The name or address of a Host header, without port and brackets, in lower case."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def describe_cross_site(
    method: str, headers: Mapping[str, str], origins: frozenset[str]
) -> str | None:
    """Why a request that a browser makes for another site's page is refused; None if it is not.

    Programs send neither header. Browsers send Origin with every change and every WebSocket
    handshake, and Sec-Fetch-Site with all requests over TLS or to this machine. Another port of
    the same host counts as another site: other programs serve there.
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if (origin is None and site is None) or origin in origins:
        return None
    only_reads = method in ("GET", "HEAD") and "upgrade" not in headers
    if origin is not None and not only_reads and not _is_same_host(origin, headers.get("host")):
        return "a page of another origin may not do this"
    follows_link = only_reads and headers.get("sec-fetch-mode") == "navigate"
    if site not in (None, "same-origin", "none") and not follows_link:
        return "a page of another site may not ask for this"
    return None


def _is_same_host(origin: str, host: str | None) -> bool:
    """Whether an origin has the authority that was asked. A proxy may change the scheme."""
    scheme, _, authority = origin.partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    if port is None or host is None:
        return False
    return authority.removesuffix(port).lower() == host.removesuffix(port).lower()


# How often one may be wrong


def block_of(address: str) -> str:
    """Whose failures count together: an IPv4 address, or the /64 that one IPv6 customer gets."""
    parsed = parse_ip(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed or address)


class FailureLimit:
    """Counts wrong credentials by address, as leaky buckets. Of too many addresses it forgets
    the one that failed longest ago. Times are monotonic seconds.
    """

    def __init__(self) -> None:
        self._empty_s: dict[str, float] = {}  # when each bucket will have leaked out

    def wait_s(self, address: str, now_s: float) -> float:
        """How long the address has to wait before it may try again; 0 if it need not."""
        empty_s = self._empty_s.get(block_of(address), now_s)
        return max(0.0, empty_s - now_s - (FREE_FAILURES - 1) * FAILURE_EVERY_S)

    def note_failure(self, address: str, now_s: float) -> None:
        block = block_of(address)
        empty_s = max(self._empty_s.pop(block, now_s), now_s) + FAILURE_EVERY_S
        self._empty_s[block] = min(empty_s, now_s + FREE_FAILURES * FAILURE_EVERY_S)
        if len(self._empty_s) > MAX_ADDRESSES:
            del self._empty_s[next(iter(self._empty_s))]


# Files


class TokenFile:
    """The tokens of a deployment. Whoever asks sees what the file says at that moment."""

    def __init__(self, data_dir: str) -> None:
        self.is_present = False  # it stays when all tokens are revoked, and demands a login then
        self.changed: Callable[[str, Token], None] = lambda action, token: None
        self._file = PrivateFile(os.path.join(data_dir, TOKENS_FILE))
        self._parse = lru_cache(1)(_parse_tokens)
        self._trouble = ""  # why the file cannot be used; then it holds no tokens
        self._tokens: Mapping[str, Token] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take over the file if it has been replaced."""
        if not self.is_present and not os.access(self._file.path, os.F_OK):
            return  # as on most machines and for every request: the fastest way to ask
        try:
            text, self.is_present = self._file.read(), self._file.exists
            tokens, trouble = self._parse(text) if self.is_present else {}, ""
        except (OSError, ValueError, TypeError, KeyError, ScheduleZeroError) as error:
            tokens, trouble = {}, f"{type(error).__name__}: {error}"
            self.is_present = True
        if tokens is not self._tokens:
            self._take(tokens, trouble)

    def _take(self, tokens: Mapping[str, Token], trouble: str) -> None:
        if trouble and trouble != self._trouble:
            log_access.error("nobody can log in: %s: %s", self._file.path, trouble)
        before, self._tokens, self._trouble = self._tokens, tokens, trouble
        for token in tokens.values():
            if token.token_id not in before:
                self.changed("create_token", token)
        for token in before.values():
            if token.token_id not in tokens:
                self.changed("revoke_token", token)

    def get(self, token_id: str | None, now_us: int) -> Token | None:
        """The token of an id, unless it is expired or there is none."""
        self.refresh()
        token = self._tokens.get(token_id or "")
        return token if token is not None and token.is_valid_at(now_us) else None

    def find(self, credential: str, now_us: int) -> Token | None:
        """The token a text is, unless it is expired or there is none."""
        token = self.get(parse_credential(credential), now_us)
        return token if token is not None and is_credential(credential, token.digest) else None

    def all(self) -> list[Token]:
        return sorted(self._tokens.values(), key=lambda token: token.name)

    def create(self, name: str, role: Role, expires_us: int | None, now_us: int) -> str:
        """Make a token, tell it once, store its hash. Raises Conflict, Overloaded, OSError."""
        with self._locked():
            if any(token.name == name for token in self._tokens.values()):
                raise Conflict(f"there is a token '{name}' already; revoke it first")
            if len(self._tokens) >= MAX_TOKENS:
                raise Overloaded(f"there are {MAX_TOKENS} tokens already")
            credential, token_id = make_credential()
            token = Token(token_id, name, role, digest_of(credential), now_us, expires_us)
            self._write([*self._tokens.values(), token])
        return credential

    def revoke(self, name: str) -> None:
        """Raises NotFound, OSError."""
        with self._locked():
            kept = [token for token in self._tokens.values() if token.name != name]
            if len(kept) == len(self._tokens):
                hint = suggest(name, [token.name for token in kept])
                raise NotFound(f"there is no token '{name}'{hint}")
            self._write(kept)

    def create_first(self, now_us: int) -> str | None:
        """If there never was a token, one for an admin in a file; its path. Raises OSError."""
        with self._locked():
            if self.is_present:
                return None
            credential, token_id = make_credential()
            copy = PrivateFile(os.path.join(os.path.dirname(self._file.path), ADMIN_TOKEN_FILE))
            copy.write(credential + "\n")
            self._write([Token(token_id, "admin", Role.ADMIN, digest_of(credential), now_us)])
        return copy.path

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let no other process change the tokens meanwhile. Raises Conflict, OSError."""
        with self._file.locked():
            self.refresh()
            if self._trouble:
                raise Conflict(f"{self._file.path} is not to be changed: {self._trouble}")
            yield

    def _write(self, tokens: Iterable[Token]) -> None:
        self._file.write(json.dumps({"tokens": [asdict(token) for token in tokens]}, indent=1))
        self.refresh()


def _parse_tokens(text: str) -> Mapping[str, Token]:
    """The tokens by id. Raises ValueError, TypeError, KeyError."""
    tokens = [Token(**entry) for entry in json.loads(text)["tokens"]]
    return {token.token_id: replace(token, role=Role(token.role)) for token in tokens}


class SessionFile:
    """The browsers that are logged in. They stay so when the server is restarted.

    After a power cut a session may be missing or a closed one be back; it lasts no longer for it.
    """

    def __init__(self, data_dir: str) -> None:
        self._file = PrivateFile(os.path.join(data_dir, SESSIONS_FILE))
        self._sessions = self._load()

    def open(self, token: Token, now_us: int) -> tuple[str, Session]:
        """Begin a session: its credential, for the cookie, and what is kept of it."""
        credential, session_id = make_credential()
        session = Session(session_id, digest_of(credential), token.token_id, now_us, now_us)
        valid = [known for known in self._sessions.values() if known.is_valid_at(now_us)]
        kept = sorted(valid, key=lambda known: known.seen_us)[-(MAX_SESSIONS - 1) :]
        self._sessions = {known.session_id: known for known in [*kept, session]}
        self._save()
        return credential, session

    def get(self, session_id: str | None, now_us: int) -> Session | None:
        """The session of an id, if it has not ended."""
        session = self._sessions.get(session_id or "")
        return session if session is not None and session.is_valid_at(now_us) else None

    def find(self, credential: str, now_us: int) -> Session | None:
        """The session a cookie belongs to, if it has not ended; it is used now."""
        session = self.get(parse_credential(credential), now_us)
        if session is None or not is_credential(credential, session.digest):
            return None
        if now_us - session.seen_us >= SESSION_SEEN_US:
            session = self._sessions[session.session_id] = replace(session, seen_us=now_us)
            self._save()
        return session

    def close(self, session_id: str) -> None:
        if self._sessions.pop(session_id, None) is not None:
            self._save()

    def _save(self) -> None:
        """Write the file; if that fails, who is logged in stays so until the next start."""
        entries = [asdict(session) for session in self._sessions.values()]
        try:
            self._file.write(json.dumps(entries), durable=False)
        except OSError as error:
            log_access.error("%s was not written: %s", self._file.path, error.strerror)

    def _load(self) -> dict[str, Session]:
        try:
            text = self._file.read()
            sessions = [Session(**entry) for entry in json.loads(text or "[]")]
        except (OSError, ValueError, TypeError, ScheduleZeroError) as error:
            log_access.error("all are logged out: %s: %s", self._file.path, error)
            return {}
        return {session.session_id: session for session in sessions}


# The gate that requests pass


class Access:
    """Decides for each request who sends it and whether that may be."""

    def __init__(
        self, config: Config, clock: Clock, note: Callable[[AuditEntry], Any] = lambda entry: None
    ) -> None:
        """`note` records what is refused, and tokens that come and go."""
        self.tokens = TokenFile(config.data_dir)
        self.sessions = SessionFile(config.data_dir)
        self._clock = clock
        self._note = note
        self._failures = FailureLimit()
        self.apply(config)
        self.tokens.changed = self._note_change

    def apply(self, config: Config) -> None:
        """Take over a changed configuration."""
        self.config = config
        self.insecurity = describe_insecurity(config)
        self._origins = frozenset(config.cors_origins)
        names = own_names(config, socket.gethostname())
        any_address = not is_this_machine(config.http_host)
        self._is_exposed = requires_login(config, has_tokens=False)
        # Clients repeat themselves, and parsing an address takes longer than all the rest.
        self._is_host_allowed = lru_cache(MAX_HOSTS_CACHED)(
            lambda host: is_host_allowed(host, names, any_address=any_address)
        )
        prefix = "__Host-" if config.tls_cert else ""
        self._cookie = f"{prefix}schedulezero_{config.http_port}"  # ports share their cookies

    @property
    def is_login_required(self) -> bool:
        self.tokens.refresh()
        return self._is_exposed or self.tokens.is_present

    def check_host(self, headers: Mapping[str, str]) -> None:
        """Raise HttpError if the client meant another server. Programs of HTTP/1.0 need not say."""
        host = headers.get("host")
        if host is not None and not self._is_host_allowed(host):
            sentence = f"this server is not called {host_name(host)[:80]!r}; see allowed_hosts"
            raise HttpError(421, "misdirected_request", sentence)

    def check_source(self, method: str, headers: Mapping[str, str]) -> None:
        """Raise HttpError for what another site's page asks for."""
        if reason := describe_cross_site(method, headers, self._origins):
            raise HttpError(403, "cross_site", reason)

    def cors_headers(self, headers: Mapping[str, str]) -> HeaderLines:
        """What lets the page of a configured origin read the answer."""
        if not self._origins:
            return ()
        origin = headers.get("origin", "")
        allowed = (("Access-Control-Allow-Origin", origin),) if origin in self._origins else ()
        return (*allowed, ("Vary", "Origin"))

    def identify(self, headers: Mapping[str, str], peer: str) -> Identity:
        """Who sends a request. Raises HttpError for a token that is not valid."""
        authorization = headers.get("authorization")
        if authorization is not None and (token := parse_bearer(authorization)):
            # The right one passes however often others of the same address were wrong: behind a
            # proxy all have the same one, and 256 bits are not found by trying.
            found = self._find_token(token, peer, "authenticate")
            return Identity(found.name, found.role, found.token_id, expires_us=found.expires_us)
        if self.tokens.is_present and (cookies := headers.get("cookie")):
            return self._identify_session(parse_cookie(cookies, self._cookie))
        if self.is_login_required or not FORWARDED.isdisjoint(headers):
            return NOBODY
        return LOOPBACK

    def _identify_session(self, credential: str) -> Identity:
        now_us = self._clock.now_us()
        session = self.sessions.find(credential, now_us)
        token = self.tokens.get(session.token_id, now_us) if session else None
        return _identity_of(token, session) if session and token else NOBODY

    def is_still(self, identity: Identity) -> bool:
        """Whether an identity of before would be given again: for streams, which last."""
        now_us = self._clock.now_us()
        if identity is LOOPBACK:
            return not self.is_login_required
        if identity.session_id and self.sessions.get(identity.session_id, now_us) is None:
            return False
        return self.tokens.get(identity.token_id, now_us) is not None

    def refusal(self, identity: Identity, role: Role) -> HttpError:
        """What to tell an identity that has not the role."""
        if identity is NOBODY:
            needed = "log in, or send a token as Authorization: Bearer sz_..."
            if not self.is_login_required:
                needed = "what comes through a proxy needs a token: see token create"
            return HttpError(401, "login_required", needed, CHALLENGE)
        sentence = f"this needs the role {role}; the token '{identity.name}' has {identity.role}"
        return HttpError(403, "forbidden", sentence)

    # Logging in and out

    def log_in(self, credential: str, peer: str) -> tuple[Identity, tuple[str, str]]:
        """Begin a session: who it is, and the header that sets the cookie. Raises HttpError."""
        self._check_rate(peer)
        token = self._find_token(credential, peer, "log_in")
        cookie, session = self.sessions.open(token, self._clock.now_us())
        return _identity_of(token, session), self._set_cookie(cookie, SESSION_LIFE_US)

    def log_out(self, identity: Identity) -> tuple[str, str]:
        """End the session, if it is one; the header that clears the cookie."""
        self.sessions.close(identity.session_id)
        return self._set_cookie("", 0)

    def _set_cookie(self, value: str, life_us: int) -> tuple[str, str]:
        secure = "; Secure" if self.config.tls_cert else ""
        life = f"Path=/; Max-Age={life_us // 1_000_000}; HttpOnly; SameSite=Strict{secure}"
        return "Set-Cookie", f"{self._cookie}={value}; {life}"

    def _check_rate(self, peer: str) -> None:
        if wait_s := self._failures.wait_s(peer, self._clock.monotonic()):
            retry = (("Retry-After", str(int(wait_s) + 1)),)
            sentence = "too many wrong tokens from this address; try again later"
            raise HttpError(429, "too_many_failures", sentence, retry)

    def _find_token(self, credential: str, peer: str, action: str) -> Token:
        now_us = self._clock.now_us()
        if token := self.tokens.find(credential, now_us):
            return token
        self._check_rate(peer)
        self._failures.note_failure(peer, self._clock.monotonic())
        self._note(AuditEntry(now_us, "", peer, action, "", 401))
        log_access.warning("a token that is not valid, from %s", peer)
        sentence = "the token is not valid: unknown, revoked or expired"
        raise HttpError(401, "invalid_token", sentence, INVALID_TOKEN)

    def _note_change(self, action: str, token: Token) -> None:
        at_us = token.created_us if action == "create_token" else self._clock.now_us()
        self._note(AuditEntry(at_us, "command line", "", action, f"{token.name} ({token.role})"))


# RFC 6750 section 3.1
CHALLENGE: Final = (("WWW-Authenticate", 'Bearer realm="ScheduleZero"'),)
INVALID_TOKEN: Final = ((CHALLENGE[0][0], f'{CHALLENGE[0][1]}, error="invalid_token"'),)


def _identity_of(token: Token, session: Session) -> Identity:
    ends_us = session.created_us + SESSION_LIFE_US
    expires_us = ends_us if token.expires_us is None else min(ends_us, token.expires_us)
    return Identity(token.name, token.role, token.token_id, session.session_id, expires_us)


# Before the start


def check_access(config: Config) -> None:
    """Raise ConfigError for a configuration that would let strangers in, or for wrong TLS files."""
    for key, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
        if getattr(config, key) and not getattr(config, other):
            raise error_in_config(config, (key,), f"needs {other} beside it")
    if config.tls_cert:
        open_tls(config)
    elif not is_this_machine(config.http_host) and not config.allow_insecure:
        sentence = (
            f"{config.http_host} is open to other machines: set tls_cert and tls_key, or "
            "allow_insecure: true where the network or a proxy protects it"
        )
        raise error_in_config(config, ("http_host",), sentence)


def open_tls(config: Config) -> ssl.SSLContext:
    """The TLS of a server with the configured files. Raises ConfigError."""
    import ssl  # it costs 4 MB, which a server without TLS need not spend

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(TLS_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, config)
    return context


def load_certificate(context: ssl.SSLContext, config: Config) -> None:
    """Use the configured files for the connections from now on. Raises ConfigError."""
    import ssl

    paths = {"tls_cert": config.tls_cert or "", "tls_key": config.tls_key or ""}
    try:
        for key, path in paths.items():
            with open(path, "rb") as file:
                if b"-----BEGIN " not in file.read(MAX_CONFIG_BYTES):
                    raise error_in_config(config, (key,), f"{path} is not in PEM format")
        key = "tls_cert"
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(paths[key])
        key = "tls_key"
        # Without a password OpenSSL would ask the terminal for that of an encrypted key.
        context.load_cert_chain(paths["tls_cert"], paths[key], password="")
    except OSError as error:
        path = paths[key]
        if not isinstance(error, ssl.SSLError):
            sentence = f"cannot read {path}: {error.strerror}"
        elif key == "tls_cert":
            sentence = f"{path} holds no certificate that can be used"
        elif error.reason == "KEY_VALUES_MISMATCH":
            sentence = f"{path} is not the key of tls_cert"
        else:
            reason = error.reason or "no PEM, or encrypted"
            sentence = f"{path} is not usable with tls_cert ({reason})"
        raise error_in_config(config, (key,), sentence) from None


# --- WebSocket --------------------------------------------------------------------------------
#
# RFC 6455, the server's side of it, without extensions. Programs get events over it; what they
# say is of no interest: it is framed to the letter, bounded, and thrown away unread.

WEBSOCKET_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
WEBSOCKET_KEY: Final = re.compile(r"[A-Za-z0-9+/]{22}==")  # 16 bytes
MAX_WEBSOCKET_FRAME_BYTES: Final = 64 << 10
MAX_CONTROL_BYTES: Final = 125  # section 5.5
PING_FRAME: Final = b"\x89\x00"


class Opcode(enum.IntEnum):
    """Section 5.2."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


class CloseCode(enum.IntEnum):
    """Section 7.4.1: why a connection ends."""

    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    TOO_BIG = 1009


class WebSocketError(ScheduleZeroError):
    """A peer broke the protocol; `close_code` is what it is told."""

    def __init__(self, close_code: CloseCode, sentence: str) -> None:
        super().__init__(sentence)
        self.close_code = close_code


def accept_websocket(headers: Mapping[str, str]) -> str:
    """The Sec-WebSocket-Accept for a handshake's headers. Raises InvalidField if it is none."""
    tokens = {token.strip().lower() for token in headers.get("connection", "").split(",")}
    is_upgrade = "upgrade" in tokens and headers.get("upgrade", "").lower() == "websocket"
    is_13 = headers.get("sec-websocket-version") == "13"
    key = headers.get("sec-websocket-key", "")
    if not (is_upgrade and is_13 and WEBSOCKET_KEY.fullmatch(key)):
        raise InvalidField("upgrade", "this is a WebSocket of version 13: send its handshake")
    return base64.b64encode(hashlib.sha1(key.encode() + WEBSOCKET_GUID).digest()).decode()


def encode_frame(opcode: Opcode, payload: bytes) -> bytes:
    """One whole, unmasked frame, as a server sends it."""
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", 0x80 | opcode, 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 127, size)
    return head + payload


def encode_close(close_code: CloseCode, sentence: str) -> bytes:
    """A close frame; the sentence has at most the 123 bytes that a control frame has room for."""
    return encode_frame(Opcode.CLOSE, struct.pack("!H", close_code) + sentence.encode())


class WebSocketReader:
    """A client's bytes in, what to answer out, however they are cut into pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What to send, and whether the connection goes on after it."""
        self._buffer += data
        answers = bytearray()
        try:
            while (frame := self._next_frame()) is not None:
                opcode, payload = frame
                if opcode is Opcode.CLOSE:  # its code is echoed (section 5.5.1)
                    code = payload[:2] if len(payload) > 1 else b""
                    return bytes(answers + encode_frame(Opcode.CLOSE, code)), False
                if opcode is Opcode.PING:
                    answers += encode_frame(Opcode.PONG, payload)
        except WebSocketError as error:
            return bytes(answers + encode_close(error.close_code, str(error))), False
        return bytes(answers), True

    def _next_frame(self) -> tuple[Opcode, bytes] | None:
        """Take a whole frame from the buffer: its opcode and unmasked payload."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        opcode, size = _check_head(buffer[0], buffer[1])
        start = 2
        if size > MAX_CONTROL_BYTES:
            start += 2 if size == 126 else 8
            if len(buffer) < start:
                return None
            size = int.from_bytes(buffer[2:start])
        if size > MAX_WEBSOCKET_FRAME_BYTES:
            sentence = f"a frame has at most {MAX_WEBSOCKET_FRAME_BYTES} bytes"
            raise WebSocketError(CloseCode.TOO_BIG, sentence)
        end = start + 4 + size
        if len(buffer) < end:
            return None
        payload = _unmask(bytes(buffer[start + 4 : end]), bytes(buffer[start : start + 4]))
        del buffer[:end]
        return opcode, payload


def _check_head(first: int, second: int) -> tuple[Opcode, int]:
    """Opcode and length field of a frame's first two bytes. Raises WebSocketError."""
    size = second & 0x7F
    is_whole_control = first & 0x80 and size <= MAX_CONTROL_BYTES
    if first & 0x70:
        sentence = "reserved bits are set"
    elif first & 0x07 > Opcode.BINARY:
        sentence = "the opcode is reserved"
    elif not second & 0x80:
        sentence = "a client masks its frames"
    elif first & 0x0F >= Opcode.CLOSE and not is_whole_control:
        sentence = f"a control frame is whole and has at most {MAX_CONTROL_BYTES} bytes"
    else:
        return Opcode(first & 0x0F), size
    raise WebSocketError(CloseCode.PROTOCOL_ERROR, sentence)


def _unmask(payload: bytes, mask: bytes) -> bytes:
    """Section 5.3, done as one large integer: a loop over bytes is a hundred times slower."""
    size = len(payload)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload) ^ int.from_bytes(key)).to_bytes(size)


# --- HTTP -------------------------------------------------------------------------------------
#
# Pure first: bytes to requests (HttpParser), answers to bytes (render_response), the dashboard's
# files by name (StaticFiles). Then the shell: one HttpConnection for each client, one
# HttpServer that accepts, sweeps for overdue connections and closes. What RFC 9112 leaves to the
# server is refused: a message two parsers could read in two ways is never read at all.

MAX_REQUEST_LINE_BYTES: Final = 8 << 10
MAX_HEAD_BYTES: Final = 32 << 10  # the request line and all header lines
MAX_HEADERS: Final = 100
MAX_QUERY_FIELDS: Final = 32
MAX_PIPELINED_BYTES: Final = 64 << 10  # taken from a client while its last request is pending
MAX_REQUESTS_PER_TURN: Final = 16  # of one connection, before the others have theirs
MAX_TURN_S: Final = 0.01  # and no further one after so long
MAX_TURNED_AWAY: Final = 50  # connections over the bound that are being told so
MAX_STREAM_BUFFER_BYTES: Final = 256 << 10  # unread by an event stream's client
MAX_STATIC_BYTES: Final = 4 << 20

METHODS: Final = frozenset(
    {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"}
)

log_http: Final = logging.getLogger("schedulezero.http")


# Requests


@dataclass(slots=True)
class Request:
    """One request, read whole. `path` is percent-decoded, header names are lower-case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    keep_alive: bool
    peer: str  # address of the client, without its port
    body: bytes = b""
    route: str = ""  # the pattern of the path, once it is known; for what is counted


_REQUEST_LINE: Final = re.compile(r"([A-Z]{1,16}) (/[!-\"$-~]*) HTTP/1\.([01])")
_OTHER_VERSION: Final = re.compile(r"[!-~]+ [!-~]+ HTTP/(?!1\.[01])[0-9]\.[0-9]")
_HEADER_LINES: Final = re.compile(
    r"^([!#$%&'*+.^_`|~0-9A-Za-z-]++):([^\x00-\x08\n-\x1f\x7f]*+)\r\n", re.MULTILINE
)
_FORBIDDEN: Final = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BROKEN_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_HIDING_ESCAPE: Final = re.compile(r"%[01]|%2[Ff]|%5[Cc]|%7[Ff]")
_HOST: Final = re.compile(r"[A-Za-z0-9._~:\[\]-]*")
_LENGTH: Final = re.compile(r"[0-9]{1,16}")
_SINGLE_HEADERS: Final = frozenset(
    {"authorization", "content-length", "content-type", "expect", "host", "origin"}
    | {"last-event-id", "transfer-encoding"}
)


class HttpParser:
    """Turn the bytes of one connection into requests, however they are cut into pieces.

    After next_request has raised HttpError the place in the bytes is lost: close the connection.
    """

    def __init__(self, peer: str = "") -> None:
        self.peer = peer
        self._buffer = bytearray()
        self._scanned = 0  # so far there is no end of a head
        self._pending: Request | None = None  # its head is read, its body is not
        self._length = 0  # of that body

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_request(self) -> Request | None:
        """The next whole request, or None if more bytes are needed. Raises HttpError."""
        if self._pending is None:
            self._read_head()
        request = self._pending
        if request is None or len(self._buffer) < self._length:
            return None
        if self._length:
            request.body = bytes(self._buffer[: self._length])
            del self._buffer[: self._length]
        self._pending = None
        return request

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)

    @property
    def has_begun(self) -> bool:
        """Whether a request has begun and is not yet whole."""
        return self._pending is not None or bool(self._buffer)

    @property
    def is_in_body(self) -> bool:
        return self._pending is not None

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for `100 Continue` before it sends the body."""
        pending = self._pending
        return pending is not None and not self._buffer and "expect" in pending.headers

    def _read_head(self) -> None:
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n", self._scanned)
        if not 0 <= end <= MAX_REQUEST_LINE_BYTES:
            _check_head_so_far(buffer, end + 4 if end >= 0 else len(buffer), self._scanned)
        if end < 0:
            self._scanned = max(0, len(buffer) - 3)
            return
        try:
            head = buffer[: end + 2].decode("latin-1")
            self._pending, self._length = _parse_head(head, self.peer)
        except HttpError:
            # What was wrong first in the bytes is what is answered, in pieces or whole.
            _check_head_so_far(buffer, end + 4, 0)
            raise
        self._scanned = 0
        del buffer[: end + 4]


def _check_head_so_far(buffer: bytearray, end: int, start: int) -> None:
    """Refuse a head, complete or not, for its bytes: control characters, then its length."""
    line_end = buffer.find(b"\r\n", 0, min(end, MAX_REQUEST_LINE_BYTES))
    limit = MAX_REQUEST_LINE_BYTES if line_end < 0 else MAX_HEAD_BYTES
    if found := _FORBIDDEN.search(buffer, start, min(end, limit)):
        what = {b"\n": "a bare LF", b"\r": "a bare CR"}.get(found[0], "a control character")
        raise HttpError(400, "bad_request", f"the request's head holds {what}")
    if end > limit:
        if line_end < 0:
            raise HttpError(414, "uri_too_long", f"the URL is longer than {limit} bytes")
        raise HttpError(431, "head_too_large", f"the request's head is larger than {limit} bytes")


def _parse_head(head: str, peer: str) -> tuple[Request, int]:
    """Request without body, and the length of the body, of the lines before the empty line."""
    line, _, block = head.partition("\r\n")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        if _OTHER_VERSION.fullmatch(line):
            raise HttpError(505, "version_not_supported", "only HTTP/1.1 and HTTP/1.0 are spoken")
        raise HttpError(400, "bad_request", "the request line is not a method, a path and HTTP/1.1")
    method, target, minor = match.groups()
    if method not in METHODS:
        raise HttpError(501, "not_implemented", f"the method {method} is not implemented")
    headers = _parse_headers(block)
    if not _HOST.fullmatch(headers.get("host", "" if minor == "0" else "/")):
        raise HttpError(400, "bad_request", "the header host is missing or not a host name")
    if minor == "0":
        headers.pop("expect", None)  # RFC 9110 section 10.1.1
    length = _parse_length(headers, minor)
    is_plain = "%" not in target and "?" not in target
    path, query = (target, {}) if is_plain else _parse_target(target)
    keep_alive = minor == "1" and "close" not in headers.get("connection", "").lower()
    return Request(method, path, query, headers, keep_alive, peer), length


def _parse_headers(block: str) -> dict[str, str]:
    pairs = _HEADER_LINES.findall(block)
    if len(pairs) != block.count("\n"):
        raise HttpError(400, "bad_request", "a line of the request's head is not a header")
    if len(pairs) > MAX_HEADERS:
        raise HttpError(431, "head_too_large", f"there are more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for name, value in pairs:
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            if name in _SINGLE_HEADERS:
                raise HttpError(400, "bad_request", f"the header {name} is given twice")
            value = headers[name] + ("; " if name == "cookie" else ", ") + value
        headers[name] = value
    return headers


def _parse_length(headers: Mapping[str, str], minor: str) -> int:
    """Length of the body, by Content-Length alone.

    One way to frame a body cannot be confused with another, and no client of a JSON API needs to
    send chunks (RFC 9110 section 15.5.12 lets a server ask for the length instead).
    """
    coding = headers.get("transfer-encoding")
    if coding is not None:
        if not coding or "content-length" in headers:
            raise HttpError(400, "bad_request", "transfer-encoding is empty or beside a length")
        if coding.lower() == "chunked" and minor == "1":
            raise HttpError(411, "length_required", "send the body with a content-length")
        raise HttpError(501, "not_implemented", "this transfer-encoding is not implemented")
    text = headers.get("content-length")
    if text is None:
        return 0
    if not _LENGTH.fullmatch(text):
        raise HttpError(400, "bad_request", "the header content-length is not a number")
    if int(text) > MAX_JSON_BYTES:
        raise HttpError(413, "too_large", f"the body is larger than {MAX_JSON_BYTES} bytes")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise HttpError(417, "expectation_failed", "only 100-continue can be expected")
    return int(text)


def _parse_target(target: str) -> tuple[str, dict[str, str]]:
    """Path and query, decoded. No escape hides a control character or a slash in the path."""
    path, _, query = target.partition("?")
    if _BROKEN_ESCAPE.search(target) or _HIDING_ESCAPE.search(path):
        raise HttpError(400, "bad_request", "the URL holds an escape that is not allowed")
    try:
        path = urllib.parse.unquote(path, errors="strict")
        pairs = urllib.parse.parse_qsl(
            query, keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS
        )
    except ValueError:
        sentence = f"the URL is not UTF-8, or its query has more than {MAX_QUERY_FIELDS} fields"
        raise HttpError(400, "bad_request", sentence) from None
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise HttpError(400, "bad_request", "a field of the query is given twice")
    return path, fields


# Responses

JSON_TYPE: Final = "application/json"
SECURITY_HEADERS: Final = (
    b"X-Content-Type-Options: nosniff\r\n"
    b"Referrer-Policy: no-referrer\r\n"
    b"Content-Security-Policy: default-src 'self'; base-uri 'none'; form-action 'self';"
    b" frame-ancestors 'none'; object-src 'none'\r\n"
    b"Cross-Origin-Resource-Policy: same-origin\r\n"
)
STATUS_LINES: Final[Mapping[int, bytes]] = MappingProxyType(
    {status: f"HTTP/1.1 {status} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
)
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(slots=True)
class Response:
    """An answer, whole. The values of `headers` come from this program, never from a client."""

    status: int
    body: bytes = b""
    content_type: str = JSON_TYPE
    headers: HeaderLines = ()
    cache_control: str = "no-store"


@dataclass(slots=True)
class StreamResponse:
    """An answer without an end, such as an event stream.

    `start(write)` is called after the head is sent and returns `stop`, which is called once when
    the connection has ended, for whatever reason. `write(chunk)` sends, never waits, and returns
    False once the client is gone; one that reads too slowly is dropped. `start` may write.
    """

    start: Callable[[Callable[[bytes], bool]], Callable[[], None]]
    keep_alive: bytes = b":\n\n"  # sent when nothing else was for a while
    farewell: bytes = b""  # sent when the server closes
    headers: HeaderLines = ()
    is_allowed: Callable[[], bool] = lambda: True  # asked again and again; False ends it
    websocket_accept: str | None = None  # set: the connection becomes a WebSocket
    receive: Callable[[bytes], tuple[bytes, bool]] | None = None
    """Given what the client of a WebSocket sends: what to answer, and whether to go on."""


HttpAnswer = Response | StreamResponse
HttpHandler = Callable[[Request], HttpAnswer | Awaitable[HttpAnswer]]


def json_response(status: int, value: Any, headers: HeaderLines = ()) -> Response:
    return Response(status, encode_json(value), headers=headers)


def error_response(
    status: int, code: str, sentence: str, headers: HeaderLines = (), **more: Any
) -> Response:
    """The one shape of every refusal and failure."""
    return json_response(
        status, {"status": "error", "error": sentence, "code": code, **more}, headers
    )


def render_response(
    response: Response, date: bytes, *, keep_alive: bool = True, is_head: bool = False
) -> bytes:
    """The bytes of a response; a 304 and the answer to HEAD carry no body."""
    status, body = response.status, response.body
    head = (
        b"%bContent-Type: %b\r\nContent-Length: %d\r\nCache-Control: %b\r\nDate: %b\r\n%b%b%b\r\n"
    ) % (
        STATUS_LINES[status],
        response.content_type.encode(),
        len(body),
        response.cache_control.encode(),
        date,
        SECURITY_HEADERS,
        b"" if keep_alive else b"Connection: close\r\n",
        _render_headers(response.headers),
    )
    return head if is_head or status == 304 else head + body


def render_stream_head(response: StreamResponse, date: bytes) -> bytes:
    if response.websocket_accept is not None:
        upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept"
        return STATUS_LINES[101] + f"{upgrade}: {response.websocket_accept}\r\n\r\n".encode()
    return (
        b"%bContent-Type: text/event-stream\r\nCache-Control: no-store\r\nDate: %b\r\n"
        b"%b%bX-Accel-Buffering: no\r\nConnection: close\r\n\r\n"
    ) % (STATUS_LINES[200], date, SECURITY_HEADERS, _render_headers(response.headers))


def _render_headers(headers: HeaderLines) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers).encode()


def render_http_date(us: int) -> bytes:
    """`Mon, 23 Nov 2026 15:53:00 GMT`, as RFC 9110 section 5.6.7 wants it."""
    return at_of(us).strftime("%a, %d %b %Y %H:%M:%S GMT").encode()


# The dashboard's files

STATIC_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".svg": "image/svg+xml",
        ".json": "application/json",
        ".txt": "text/plain; charset=utf-8",
        ".png": "image/png",
        ".ico": "image/x-icon",
    }
)
ACCEPTS_GZIP: Final = re.compile(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", re.IGNORECASE)
NO_DASHBOARD: Final = """<!doctype html><html lang="en"><meta charset="utf-8">
<title>ScheduleZero</title><h1>ScheduleZero is running</h1>
<p>The dashboard's files are missing: put the directory <code>static</code> next to
<code>schedulezero.py</code> and restart the server. The API answers meanwhile:
<a href="/api/health">health</a>, <a href="/api/openapi.json">description</a>.</p></html>
"""


class StaticFiles:
    """The regular files below a directory, read once, and a front page if there is none.

    A request is a look-up among their names, so nothing else can be reached by any path.
    """

    def __init__(self, directory: str) -> None:
        self._files: dict[str, Response] = {}  # by URL path
        self._gzipped: dict[str, Response] = {}  # those that were asked for
        left = MAX_STATIC_BYTES
        for path, name in _walk_static(directory):
            with open(path, "rb") as file:
                body = file.read(left + 1)
            left -= len(body)
            if left < 0:
                log_http.warning("%s: more than fits; left out from %s on", directory, name)
                break
            self._files[name] = _file_response(name, body)
        self._files.setdefault("/index.html", _file_response(".html", NO_DASHBOARD.encode()))

    def handle(self, request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            allow = (("Allow", "GET, HEAD"),)
            return error_response(405, "method_not_allowed", "this can only be read", allow)
        name = "/index.html" if request.path == "/" else request.path
        chosen = self._files.get(name)
        if chosen is None:
            return error_response(404, "not_found", "there is no such page")
        if ACCEPTS_GZIP.search(request.headers.get("accept-encoding", "")):
            if name not in self._gzipped:
                self._gzipped[name] = _gzipped_response(chosen)
            chosen = self._gzipped[name]
        known = request.headers.get("if-none-match", "").replace("W/", "")
        etag = chosen.headers[0][1]
        if {etag, "*"}.isdisjoint(tag.strip() for tag in known.split(",")):
            return replace(chosen)
        return replace(chosen, status=304, body=b"", headers=chosen.headers[:2])


def _walk_static(directory: str) -> Iterator[tuple[str, str]]:
    """Path and URL path of each file to serve, sorted; no hidden file, no link, no odd type."""
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(folder, name)
            known = os.path.splitext(name)[1] in STATIC_TYPES and not name.startswith(".")
            if known and stat.S_ISREG(os.lstat(path).st_mode):
                yield path, "/" + os.path.relpath(path, directory).replace(os.sep, "/")


def _file_response(name: str, body: bytes) -> Response:
    tag = f"{zlib.crc32(body):08x}-{len(body):x}"  # hashlib would load OpenSSL, 3.6 MB
    headers = (("ETag", f'"{tag}"'), ("Vary", "Accept-Encoding"))
    return Response(200, body, STATIC_TYPES["." + name.rpartition(".")[2]], headers, "no-cache")


def _gzipped_response(plain: Response) -> Response:
    """The same file gzipped, with a tag of its own."""
    (_, etag), vary = plain.headers
    headers = (("ETag", f'{etag[:-1]}-gzip"'), vary, ("Content-Encoding", "gzip"))
    return replace(plain, body=zlib.compress(plain.body, 9, zlib.MAX_WBITS | 16), headers=headers)


# Connections


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """How long a connection may take for what, and how many there may be."""

    head_timeout_s: float = 10.0  # from connecting, or from a request's first byte
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 75.0  # between requests; longer than a proxy's usual 60
    write_timeout_s: float = 30.0  # for the client to take what has been answered
    linger_timeout_s: float = 2.0
    stream_quiet_s: float = 15.0  # then a comment keeps the event stream alive
    max_connections: int = 500  # below the usual 1,024 file descriptors
    max_per_address: int = 100  # for other machines; this one may use all
    max_held_bytes: int = 16 << 20  # of all clients: requests not yet whole, answers not yet taken
    sweep_s: float = 1.0


class Phase(enum.IntEnum):
    """What a connection is doing."""

    HANDSHAKE = enum.auto()  # of TLS
    IDLE = enum.auto()  # between requests
    HEAD = enum.auto()
    BODY = enum.auto()
    HANDLING = enum.auto()  # one request; those behind it wait unread
    WRITING = enum.auto()  # the client must read before more is answered
    STREAMING = enum.auto()
    LINGERING = enum.auto()  # refused; what the client still sends is thrown away
    CLOSING = enum.auto()  # the rest of the last answer is on its way
    CLOSED = enum.auto()


_RECEIVING: Final = frozenset({Phase.IDLE, Phase.HEAD, Phase.BODY})
_DRAINABLE: Final = _RECEIVING | {Phase.HANDSHAKE, Phase.STREAMING}


def phase_limits(limits: HttpLimits) -> dict[Phase, float]:
    """Seconds a connection may stay in each phase; what it may stay in for ever is not there."""
    return {
        Phase.HANDSHAKE: limits.head_timeout_s,
        Phase.IDLE: limits.idle_timeout_s,
        Phase.HEAD: limits.head_timeout_s,
        Phase.BODY: limits.body_timeout_s,
        Phase.WRITING: limits.write_timeout_s,
        Phase.STREAMING: limits.stream_quiet_s,
        Phase.LINGERING: limits.linger_timeout_s,
        Phase.CLOSING: limits.write_timeout_s,
    }


class HttpConnection(asyncio.Protocol):
    """One client, whose requests are answered in order, one at a time.

    The server's sweep enforces the time limit of the phase, so that a request costs no timer.
    """

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._parser = HttpParser()
        self._phase = Phase.CLOSED
        self._deadline = math.inf
        self._has_eof = False
        self._stream: StreamResponse  # while streaming
        self._stop: Callable[[], None] = lambda: None
        self._transport: asyncio.Transport
        self._plain: asyncio.Transport  # the same, but for TLS, which has a buffer of its own
        self.peer = ""

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = self._plain = transport
        self.peer = self._parser.peer = str((transport.get_extra_info("peername") or ("",))[0])
        self._server.admit(self)

    def data_received(self, data: bytes) -> None:
        phase = self._phase
        if phase in _RECEIVING:
            self._parser.feed(data)
            self._serve()
            has_room = self._server.has_room(self, self._parser.buffered_bytes)
            if self._phase is Phase.BODY and not has_room:
                self.refuse(no_room())
        elif phase is Phase.HANDSHAKE:
            self._parser.feed(data)  # it came with the end of the handshake
        elif phase is Phase.HANDLING or phase is Phase.WRITING:
            self._parser.feed(data)
            if self._parser.buffered_bytes > MAX_PIPELINED_BYTES:
                self._plain.pause_reading()
        elif phase is Phase.STREAMING:
            self._receive(data)

    def eof_received(self) -> bool:
        """Half a close: what was asked for is still answered, then the connection ends."""
        self._has_eof = True
        self._serve()
        if self._phase is Phase.HANDLING:
            # A client that left altogether looks the same: it is not kept for long.
            self._deadline = self._server.deadline(Phase.WRITING)
        if self._phase is Phase.HANDSHAKE or not self._transport.can_write_eof():
            return False  # TLS knows no half a close
        return self._phase not in (Phase.STREAMING, Phase.LINGERING, Phase.CLOSED)

    def pause_writing(self) -> None:
        if self._phase is Phase.IDLE:
            self._enter(Phase.WRITING)

    def resume_writing(self) -> None:
        if self._phase is Phase.WRITING:
            self._enter(Phase.IDLE)
            self._server.loop.call_soon(self._resume)

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase = Phase.CLOSED
        self._server.forget(self)
        self._stop()

    # Called by the server

    @property
    def held_bytes(self) -> int:
        return self._parser.buffered_bytes + self._unsent_bytes

    @property
    def _unsent_bytes(self) -> int:
        return sum(each.get_write_buffer_size() for each in {self._transport, self._plain})

    def begin(self, tls: ssl.SSLContext | None) -> None:
        """Wait for the first request, after the handshake if there is one."""
        if tls is None:
            self._enter(Phase.HEAD)
        else:
            self._enter(Phase.HANDSHAKE)
            self._plain.pause_reading()  # what comes is for start_tls
            self._server.spawn(self._shake_hands(tls))

    def check_deadline(self, now: float) -> None:
        """Do what the end of the phase's time asks for, if it has come."""
        if self._phase is Phase.STREAMING and not self._stream.is_allowed():
            self.drain()
        if now < self._deadline:
            return
        if self._phase is Phase.STREAMING:
            self._write_stream(self._stream.keep_alive)
        elif self._phase is Phase.BODY or (self._phase is Phase.HEAD and self._parser.has_begun):
            self.refuse(HttpError(408, "timeout", "the request did not arrive in time"))
        elif self._phase in _RECEIVING and not self._unsent_bytes:
            self._close()
        else:
            self._transport.abort()

    def drain(self) -> None:
        """Close as soon as nothing is being answered."""
        if self._phase is Phase.STREAMING:
            self._transport.write(self._stream.farewell)
        if self._phase in _DRAINABLE:
            self._close()

    def refuse(self, error: HttpError) -> None:
        """Answer with the refusal, and read on for a moment without looking.

        Closing with bytes unread makes the kernel reset the connection, and the answer gets lost.
        """
        response = error_response(error.status, error.code, str(error), error.headers)
        self._server.answered("", "", error.status)
        self._enter(Phase.LINGERING)
        self._transport.write(render_response(response, self._server.http_date(), keep_alive=False))
        if self._has_eof or not self._transport.can_write_eof():
            self._close()
        else:
            with suppress(OSError):  # it may have left at this moment
                self._transport.write_eof()

    def abort(self) -> None:
        self._transport.abort()

    # The life of a request

    async def _shake_hands(self, tls: ssl.SSLContext) -> None:
        """Go on over TLS. asyncio's own TLS servers tell of a client only after the handshake;
        this one counts as any other from its first byte.
        """
        secure = None
        with suppress(OSError):  # ssl.SSLError is one; a stranger's bad handshake is no news
            secure = await self._server.loop.start_tls(self._transport, self, tls, server_side=True)
        if secure is None or secure.is_closing():
            self.connection_lost(None)
            return
        self._transport = secure
        self._enter(Phase.HEAD)
        self._serve()

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._deadline = self._server.deadline(phase)

    def _serve(self) -> None:
        """Answer the requests that are here whole, until one has to wait for its answer."""
        loop = self._server.loop
        until_s = loop.time() + MAX_TURN_S
        for _ in range(MAX_REQUESTS_PER_TURN):
            if self._phase not in _RECEIVING or self._plain.is_closing():
                return
            try:
                request = self._parser.next_request()
            except HttpError as error:
                self.refuse(error)
                return
            if request is None:
                self._await_more()
                return
            try:
                answer = self._server.handle(request)
            except Exception:
                answer = self._server.failed(request)
            if isinstance(answer, (Response, StreamResponse)):
                self._send(request, answer)
            else:
                self._enter(Phase.HANDLING)
                self._server.spawn(self._send_later(request, answer))
            if loop.time() > until_s:
                break
        if self._phase in _RECEIVING:
            self._plain.pause_reading()  # until all that is here is answered
            loop.call_soon(self._serve)

    def _await_more(self) -> None:
        """Note what is being waited for; the time for it starts with its first byte."""
        parser = self._parser
        self._plain.resume_reading()
        begun = Phase.HEAD if parser.has_begun else Phase.IDLE
        phase = Phase.BODY if parser.is_in_body else begun
        if self._has_eof or self._server.is_closing:
            self._close()
        elif phase is not self._phase and phase is not Phase.IDLE:
            self._enter(phase)
            if parser.expects_continue:
                self._transport.write(CONTINUE)

    def _send(self, request: Request, answer: HttpAnswer) -> None:
        if isinstance(answer, StreamResponse):
            self._start_stream(request, answer)
            return
        # What a change has done is told in any case.
        if request.method == "GET" and not self._server.has_room(self, len(answer.body)):
            full = no_room()
            answer = error_response(full.status, full.code, str(full), full.headers)
        keep_alive = request.keep_alive and not self._server.is_closing
        is_head = request.method == "HEAD"
        data = render_response(
            answer, self._server.http_date(), keep_alive=keep_alive, is_head=is_head
        )
        self._server.answered(request.method, request.route, answer.status)
        self._enter(Phase.IDLE)  # before writing: the transport may ask for a pause at once
        self._transport.write(data)
        if not keep_alive:
            self._close()

    async def _send_later(self, request: Request, pending: Awaitable[HttpAnswer]) -> None:
        """Send what comes of `pending`. It runs to its end even if the client leaves."""
        try:
            answer = await pending
        except Exception:
            answer = self._server.failed(request)
        if self._phase is Phase.HANDLING:
            self._send(request, answer)
            self._resume()

    def _resume(self) -> None:
        """Go on with what the client has sent meanwhile."""
        if self._phase in _RECEIVING:
            self._plain.resume_reading()
            self._serve()

    def _close(self) -> None:
        self._enter(Phase.CLOSING)
        self._transport.close()

    # Event streams

    def _start_stream(self, request: Request, stream: StreamResponse) -> None:
        self._stream = stream
        self._enter(Phase.STREAMING)
        self._transport.write(render_stream_head(stream, self._server.http_date()))
        status = 101 if stream.websocket_accept else 200
        self._server.answered(request.method, request.route, status)
        if request.method == "HEAD" or self._server.is_closing:
            self._close()
            return
        self._plain.resume_reading()  # to see the client leave
        self._stop = stream.start(self._write_stream)

    def _receive(self, data: bytes) -> None:
        """What the client of a stream sends: of interest only on a WebSocket."""
        if self._stream.receive is None:
            return
        answer, goes_on = self._stream.receive(data)
        if answer:
            self._write_stream(answer)
        if not goes_on and self._phase is Phase.STREAMING:
            self._close()

    def _write_stream(self, chunk: bytes) -> bool:
        if self._phase is not Phase.STREAMING:
            return False
        if not self._stream.is_allowed():
            self.drain()
            return False
        is_behind = self._unsent_bytes > MAX_STREAM_BUFFER_BYTES
        if is_behind or not self._server.has_room(self, len(chunk)):
            self._transport.abort()
            self._phase = Phase.CLOSED
            return False
        self._enter(Phase.STREAMING)
        self._transport.write(chunk)
        return True


def no_room() -> HttpError:
    sentence = "clients that send or read slowly take the memory there is; try again later"
    return HttpError(503, "overloaded", sentence, (("Retry-After", "5"),))


# The server


class HttpServer:
    """Accepts connections and gives their requests to `handle`, which answers at once or later.

    Whatever `handle` raises is logged and answered with 500: it should raise nothing.
    """

    def __init__(
        self, handle: HttpHandler, *, clock: Clock, limits: HttpLimits | None = None
    ) -> None:
        self.handle = handle
        self.answered: Callable[[str, str, int], None] = lambda method, route, status: None
        """Told method, route and status of each answer; the first two are empty if unread."""
        self._clock = clock
        self._limits = limits or HttpLimits()
        self._allowed_s = phase_limits(self._limits)
        self._connections: set[HttpConnection] = set()
        self._turned_away: set[HttpConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused = 0  # connections over a bound since the last sweep
        self._date = (0, b"")
        self._tls: ssl.SSLContext | None = None
        self._listener: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_empty = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop
        self.is_closing = False

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Listen. Raises OSError if the address cannot be had."""
        self._tls = tls
        self.loop = asyncio.get_running_loop()
        self._listener = await self.loop.create_server(
            partial(HttpConnection, self), host, port, backlog=128
        )
        self._sweep()

    @property
    def port(self) -> int:
        """The port listened on; of use when 0 was asked for."""
        assert self._listener is not None, "the server does not listen"
        return int(self._listener.sockets[0].getsockname()[1])

    async def close(self, grace_s: float) -> None:
        """Stop accepting, let answers in progress end within `grace_s`, close all. Idempotent."""
        self.is_closing = True
        if self._listener is None or self._sweeper is None:
            return
        self._listener.close()
        for connection in tuple(self._connections):
            connection.drain()
        if self._connections:
            self._is_empty.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_empty.wait(), grace_s)
        if self._connections:
            log_http.warning("closing %d connections in progress", len(self._connections))
        self._sweeper.cancel()
        for connection in (*self._connections, *self._turned_away):
            connection.abort()
        for task in tuple(self._tasks):
            task.cancel()

    # For the connections

    def admit(self, connection: HttpConnection) -> None:
        """Let a new connection begin, or turn it away at a bound; a few of those are told why."""
        limits, peer = self._limits, connection.peer
        is_local = peer in ("127.0.0.1", "::1", "")
        allowed = limits.max_connections if is_local else limits.max_per_address
        here = sum(other.peer == peer for other in self._connections)
        if here < allowed and len(self._connections) < limits.max_connections:
            self._connections.add(connection)
            connection.begin(self._tls)
            return
        self._refused += 1
        if self._tls or len(self._turned_away) >= MAX_TURNED_AWAY:
            connection.abort()
        else:
            self._turned_away.add(connection)
            sentence = "the server has as many connections as it takes; try again later"
            retry = (("Retry-After", "5"),)
            connection.refuse(HttpError(503, "too_many_connections", sentence, retry))

    def has_room(self, connection: HttpConnection, size: int) -> bool:
        """Whether so many bytes may be held for a client; what is small always."""
        if size <= MAX_PIPELINED_BYTES:
            return True
        held = sum(other.held_bytes for other in self._connections if other is not connection)
        return held + size <= self._limits.max_held_bytes

    def forget(self, connection: HttpConnection) -> None:
        self._turned_away.discard(connection)
        self._connections.discard(connection)
        if not self._connections:
            self._is_empty.set()

    def deadline(self, phase: Phase) -> float:
        """Loop time until which a phase that begins now may last."""
        return self.loop.time() + self._allowed_s.get(phase, math.inf)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def failed(self, request: Request) -> Response:
        """Called in an `except`: what happens to the request is over, the connection goes on."""
        log_http.exception("%s %s failed", request.method, request.path)
        return error_response(500, "internal_error", "the server failed; its log says why")

    def http_date(self) -> bytes:
        """The date header's value, rendered once a second."""
        now_us = self._clock.now_us()
        if now_us // 1_000_000 != self._date[0]:
            self._date = (now_us // 1_000_000, render_http_date(now_us))
        return self._date[1]

    def _sweep(self) -> None:
        """Every now and then: enforce the time limits and say how many were turned away."""
        self._sweeper = self.loop.call_later(self._limits.sweep_s, self._sweep)
        now = self.loop.time()
        for connection in (*self._connections, *self._turned_away):
            connection.check_deadline(now)
        if self._refused:
            log_http.warning("turned away %d connections over the bound", self._refused)
            self._refused = 0


class LoopErrorLog:
    """An exception handler for the event loop that says the same thing at most once a minute.

    When descriptors run out the loop reports each failed accept, a hundred times a second.
    """

    QUIET_S: Final = 60.0
    MAX_MESSAGES: Final = 100

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._said: dict[str, tuple[float, int]] = {}  # when last, and how often since

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        message = f"{context.get('message', 'error in the event loop')}: {error!r}"[:500]
        now = self._clock.monotonic()
        said_at, unsaid = self._said.get(message, (-math.inf, 0))
        if now - said_at < self.QUIET_S:
            self._said[message] = (said_at, unsaid + 1)
            return
        if len(self._said) >= self.MAX_MESSAGES:
            self._said.clear()
        self._said[message] = (now, 0)
        again = f" (and {unsaid} times before this)" if unsaid else ""
        log_http.error("%s%s", message, again, exc_info=error)


# --- API --------------------------------------------------------------------------------------
#
# One table, ROUTES, says what can be asked and by whom: it routes, it validates, and it describes
# itself as OpenAPI. Above it the kinds of values a client may send, how things are shown to it,
# and one function for each route; below it the shell that picks the function.

MAX_PAGE: Final = 1_000  # records in one answer
MAX_PREVIEWS: Final = 100
MAX_TRIES: Final = 5  # of a change that others overtake
STATS_SPAN_S: Final = 86_400
RETRY_AFTER: Final = (("Retry-After", "2"),)
MAX_UPCOMING_HOURS: Final = 7 * 24
MAX_UPCOMING_BUCKETS: Final = 288
UPCOMING_ROWS: Final = 200  # read at once
UPCOMING_TURN_S: Final = 0.01  # of counting, before the rest of the loop has its turn
UPCOMING_BUDGET_S: Final = 3.0  # of counting for one answer; the schedules that remain are left out
UPCOMING_KEPT_S: Final = 2.0  # an answer serves all who ask for so long ...
UPCOMING_KEPT_TIMES: Final = 50  # ... or so many times as long as it took: 2 % of a processor
UPCOMING_SOONEST: Final = 8
UPCOMING_NAMES: Final = 3  # schedules named for one bucket
UPCOMING_ALIKE: Final = 128  # triggers whose count is kept for the next schedule with the same
CHANGED_AT_ONCE: Final = 64  # of many schedules; each reads its row on the loop
METRICS_PATH: Final = "/metrics"  # the one route outside /api/: Prometheus looks there


class App(Protocol):
    """What the API needs of the server."""

    config: Config
    clock: Clock
    store: Store
    dispatcher: Dispatcher
    gateway: Gateway
    events: Events
    access: Access
    recovery: Recovery
    metrics: Metrics
    forecast: Forecast
    started_monotonic: float

    def health(self) -> tuple[dict[str, str], str]: ...


# What a request may hold


def parse_time(value: str) -> int:
    """ISO 8601 (UTC unless it says otherwise) or Unix seconds; as a database time."""
    if re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,6})?", value):
        return round(float(value) * 1e6)
    at = datetime.fromisoformat(value)
    if at.year < EPOCH.year:
        raise ValueError(f"{value} is before {EPOCH.year}")
    return max(0, us_of(at if at.tzinfo else at.replace(tzinfo=UTC)))


LIMIT: Final = in_text(whole_number(1, MAX_PAGE))
OFFSET: Final = in_text(whole_number(0, 999_999_999))
TIME_TEXT: Final = kind_of(
    "a time since 1970, as 2027-03-28T02:30:00Z or in Unix seconds",
    lambda value: isinstance(value, str),
    parse_time,
    anyOf=[{"type": "number", "minimum": 0}, {"type": "string", "format": "date-time"}],
)
STATUSES: Final = matching(
    "({0})(,({0}))*".format("|".join(Status)),
    MAX_TITLE_CHARS,
    f"one or more of {', '.join(Status)}",
    lambda value: tuple(value.split(",")),
)
CURSOR: Final = kind_of(
    "the next_cursor of an earlier answer",
    lambda value: decode_id(value) is not None,
    type="string",
    pattern=f"^[{ID_ALPHABET}]{{{ID_CHARS}}}$",
)
TOKEN: Final = matching(r"[\s\S]+", MAX_TITLE_CHARS, f"a text of 1 to {MAX_TITLE_CHARS} characters")
IDEMPOTENCY_KEY: Final = "idempotency-key"
KEY_TEXT: Final = matching("[ -~]{1,255}", 255, "1 to 255 printable ASCII characters")
KEY_HEADER: Final = Field(
    "Idempotency-Key", KEY_TEXT, "the same key and body within 24 hours: the same answer, once done"
)
ANY_TEXT: Final = matching(r"[^\x00]+", MAX_TITLE_CHARS, "a text without NUL")
RUN_FIELDS: Final = Fields(
    *CALL_FIELDS, Field("wait", FLAG, "false: answer at once with the execution's id")
)
SCHEDULE_FIELDS: Final = Fields(*EDIT_FIELDS, Field("schedule_id", NAME))
CHANGE_FIELDS: Final = Fields(*(replace(field, required=False) for field in EDIT_FIELDS))
PREVIEW_FIELDS: Final = Fields(
    Field("trigger_config", TRIGGER, required=True),
    Field("count", whole_number(1, MAX_PREVIEWS), "how many fire times; 10 if not given"),
    Field("schedule_id", NAME, "whose trigger it is: then it goes on from where that began"),
)
SORT: Final = one_of(*SCHEDULE_ORDERS, *(f"-{name}" for name in SCHEDULE_ORDERS))
SCHEDULE_FILTERS: Final = (
    Field("handler_id", NAME),
    Field("method_name", NAME),
    Field("paused", in_text(FLAG)),
    Field("search", ANY_TEXT, "part of id, name, handler or method"),
)
SCHEDULES_QUERY: Final = Fields(
    *SCHEDULE_FILTERS,
    Field("sort", SORT, "a minus before the name turns it round"),
    Field("limit", LIMIT, f"{MAX_PAGE} if not given"),
    Field("offset", OFFSET),
)
EXECUTIONS_QUERY: Final = Fields(
    Field("handler_id", NAME),
    Field("schedule_id", NAME),
    Field("status", STATUSES, "one status, or several with commas between them"),
    Field("since", TIME_TEXT, "ISO 8601 or Unix seconds"),
    Field("limit", LIMIT, "50 if not given"),
    Field("cursor", CURSOR, "next_cursor of the answer before"),
)
NO_FIELDS: Final = Fields()
MANY_FIELDS: Final = Fields(
    Field("paused", FLAG, required=True),
    Field("schedule_ids", list_kind(NAME, MAX_PAGE), "only these of those that match"),
)
UPCOMING_QUERY: Final = Fields(
    Field("hours", in_text(whole_number(1, MAX_UPCOMING_HOURS)), "24 if not given"),
    Field("buckets", in_text(whole_number(1, MAX_UPCOMING_BUCKETS)), "96 if not given"),
)
WEBSOCKET_QUERY: Final = Fields(Field("last_event_id", printable(64), "go on after this event"))
AUDIT_QUERY: Final = Fields(
    Field("limit", LIMIT, "100 if not given"),
    Field("cursor", OFFSET, "next_cursor of the answer before"),
)
STATS_QUERY: Final = Fields(Field("since", TIME_TEXT, "24 hours ago if not given"))
ERRORS_QUERY: Final = Fields(Field("limit", LIMIT, "50 if not given"))

# How things are shown

TEXT: Final[Schema] = MappingProxyType({"type": "string"})
COUNT: Final[Schema] = MappingProxyType({"type": "integer", "minimum": 0})
TEXT_OR_NULL: Final[Schema] = MappingProxyType({"type": ["string", "null"]})
INTEGER_OR_NULL: Final[Schema] = MappingProxyType({"type": ["integer", "null"]})
NUMBER: Final[Schema] = MappingProxyType({"type": "number"})
NUMBER_OR_NULL: Final[Schema] = MappingProxyType({"type": ["number", "null"]})
TIME: Final[Schema] = MappingProxyType({"type": "string", "format": "date-time"})
TIME_OR_NULL: Final[Schema] = MappingProxyType({"type": ["string", "null"], "format": "date-time"})
SUCCESS: Final[Schema] = MappingProxyType({"const": "success"})
ANYTHING: Final[Schema] = MappingProxyType({})
BOOLEAN: Final[Schema] = MappingProxyType({"type": "boolean"})
OBJECT_OR_NULL: Final[Schema] = MappingProxyType({"type": ["object", "null"]})
ANY_OBJECT: Final[Schema] = MappingProxyType({"type": "object"})


def shape(**members: Schema) -> Schema:
    """An object that has at least these members."""
    return {"type": "object", "properties": members, "required": list(members)}


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def component(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


class View:
    """How a kind of thing is shown: its members, each with its schema.

    A member is the attribute of the same name, or the one named beside its schema. A time `x`,
    `x_at` or `x_time` is the database time `x_us`. The schema tells of the members that are
    `computed` as well; whoever calls `render` adds them.
    """

    def __init__(
        self,
        computed: Mapping[str, Schema] = MappingProxyType({}),
        **members: Schema | tuple[Schema, str],
    ) -> None:
        schemas, attributes = dict(computed), {}
        for name, member in members.items():
            schemas[name], attributes[name] = (
                member if isinstance(member, tuple) else (member, name)
            )
        self.schema = shape(**schemas)
        self._times = [name for name in attributes if schemas[name] in (TIME, TIME_OR_NULL)]
        attributes |= {name: re.sub("_(at|time)$", "", name) + "_us" for name in self._times}
        self._names = tuple(attributes)
        self._read = attrgetter(*attributes.values())

    def render(self, value: Any) -> dict[str, Any]:
        shown = dict(zip(self._names, self._read(value), strict=True))
        for name in self._times:
            shown[name] = iso_of(shown[name])
        return shown


SCHEDULE_VIEW: Final = View(
    {"trigger": TEXT, "description": TEXT, "retry": OBJECT_OR_NULL,
     "args": {"type": "array", "minItems": 3, "maxItems": 3}},
    id=(TEXT, "schedule_id"), schedule_id=TEXT, name=TEXT_OR_NULL, origin=TEXT,
    handler_id=TEXT, method_name=TEXT, job_params=ANY_OBJECT, trigger_config=ANY_OBJECT,
    next_fire_time=TIME_OR_NULL, last_fire_time=TIME_OR_NULL, paused=BOOLEAN,
    timeout=NUMBER_OR_NULL, coalesce=TEXT, overlap=TEXT, misfire_grace_time=NUMBER_OR_NULL,
    max_jitter=NUMBER, quarantined=TEXT_OR_NULL,
    created_at=TIME, updated_at=TIME, generation=COUNT,
)  # fmt: skip
EXECUTION_VIEW: Final = View(
    {"duration_ms": NUMBER_OR_NULL},
    execution_id=TEXT, job_id=(TEXT, "execution_id"), schedule_id=TEXT_OR_NULL,
    handler_id=TEXT, method_name=TEXT, job_params=ANY_OBJECT, status=one_of(*Status).schema,
    scheduled_at=TIME, created_at=TIME, due_at=TIME, deadline=TIME_OR_NULL,
    started_at=TIME_OR_NULL, completed_at=TIME_OR_NULL, attempt_number=(COUNT, "attempt"),
    max_attempts=(COUNT, "retry.max_attempts"), timeout=NUMBER, instance=TEXT_OR_NULL,
    result=ANYTHING, error=TEXT_OR_NULL, reason=TEXT_OR_NULL,
    coalesced=COUNT, coalesced_from=TIME_OR_NULL,
)  # fmt: skip
ATTEMPT_VIEW: Final = View(
    attempt_number=(COUNT, "attempt"), instance=TEXT_OR_NULL, started_at=TIME,
    ended_at=TIME_OR_NULL, outcome=TEXT, error=TEXT_OR_NULL, traceback=TEXT_OR_NULL,
)  # fmt: skip
INSTANCE_VIEW: Final = View(
    {"heartbeat_age_seconds": NUMBER},
    instance=TEXT, address=TEXT, status=TEXT, concurrency=COUNT, running=COUNT,
    registered_at=TIME, last_seen=TIME, clock_skew_seconds=(NUMBER_OR_NULL, "clock_skew_s"),
    pid=INTEGER_OR_NULL, hostname=TEXT_OR_NULL,
)  # fmt: skip
HANDLER_VIEW: Final = View(
    {"methods": list_of(TEXT), "method_details": list_of(ANY_OBJECT), "capacity": COUNT,
     "instances": list_of(INSTANCE_VIEW.schema), "last_seen": TIME_OR_NULL},
    id=(TEXT, "handler_id"), handler_id=TEXT, address=TEXT, status=TEXT, running=COUNT,
    queued=COUNT,
)  # fmt: skip
AUDIT_VIEW: Final = View(
    number=COUNT, at=TIME, actor=TEXT, address=TEXT, action=TEXT, target=TEXT,
    status=INTEGER_OR_NULL,
)  # fmt: skip
COMPONENTS: Final[Mapping[str, Schema]] = MappingProxyType(
    {
        "Error": {
            **shape(status={"const": "error"}, error=TEXT, code=TEXT),
            "description": "with `field`, the dotted path of what is wrong, where one value is",
        },
        "Handler": HANDLER_VIEW.schema,
        "Schedule": SCHEDULE_VIEW.schema,
        "Execution": EXECUTION_VIEW.schema,
    }
)


def render_trigger_of(schedule: Schedule) -> dict[str, Any]:
    try:
        trigger = load_trigger(schedule.trigger_state)
    except TriggerError as error:
        return {"trigger": "unusable", "description": f"cannot be used: {error}"}
    return {"trigger": render_trigger(trigger), "description": describe_trigger(trigger)}


def render_schedule(schedule: Schedule) -> dict[str, Any]:
    return {
        **SCHEDULE_VIEW.render(schedule),
        **render_trigger_of(schedule),
        "args": [schedule.handler_id, schedule.method_name, schedule.job_params],
        "retry": asdict(schedule.retry) if schedule.retry else None,
    }


def render_execution(execution: Execution) -> dict[str, Any]:
    shown, us = EXECUTION_VIEW.render(execution), execution.duration_us
    shown["duration_ms"] = None if us is None else us / 1_000
    return shown


def render_handler(info: HandlerInfo, now_us: int) -> dict[str, Any]:
    connected = [one.concurrency for one in info.instances if one.status == "Connected"]
    return {
        **HANDLER_VIEW.render(info),
        "methods": [method.name for method in info.methods],
        "method_details": [asdict(method) for method in info.methods],
        "capacity": sum(connected),
        "instances": [render_instance(instance, now_us) for instance in info.instances],
        "last_seen": iso_of(info.last_seen_us or None),
    }


def render_instance(instance: InstanceInfo, now_us: int) -> dict[str, Any]:
    age_s = round(max(0, now_us - instance.last_seen_us) / 1e6, 1)
    return {**INSTANCE_VIEW.render(instance), "heartbeat_age_seconds": age_s}


def render_definition(schedule: Schedule) -> dict[str, Any]:
    """The body that makes such a schedule anew; what is as by default is left out."""
    blank = Schedule("", "", "", {}, {}, {})
    names = (field.name for field in EDIT_FIELDS)
    shown = {name: to for name in names if (to := getattr(schedule, name)) != getattr(blank, name)}
    if schedule.retry:
        shown["retry"] = asdict(schedule.retry)
    # YAML knows no enumerations and no read-only mappings.
    return dict(json.loads(dump_json(shown)))


def etag_of(schedule: Schedule) -> tuple[str, str]:
    """The header that names this state of a definition; what fires do leaves it as it is."""
    return "ETag", f'"{schedule.key}-{schedule.generation}"'


OUTCOMES: Final[Mapping[Status, tuple[int, str]]] = MappingProxyType(
    {
        Status.ERROR: (502, "job_failed"),
        Status.TIMEOUT: (504, "job_timeout"),
        Status.CANCELLED: (502, "job_cancelled"),
        Status.MISSED: (504, "job_missed"),
        Status.SKIPPED: (409, "job_skipped"),
        Status.LOST: (502, "job_lost"),
    }
)


def answer_done(**members: Any) -> Response:
    return json_response(200, {"status": "success", **members})


def answer_outcome(execution: Execution) -> Response:
    """What waiting for an execution ends with."""
    execution_id = execution.execution_id
    if execution.status is Status.SUCCESS:
        done = {"status": "success", "result": execution.result, "execution_id": execution_id}
        return json_response(200, done)
    status, code = OUTCOMES[execution.status]
    sentence = execution.error or f"the execution ended as {execution.status}"
    return error_response(
        status, code, sentence, execution_id=execution_id, outcome=execution.status
    )


def answer_accepted(execution_id: str) -> Response:
    return json_response(202, {"status": "accepted", "execution_id": execution_id})


def encode_page(records: Iterable[dict[str, Any]]) -> list[bytes]:
    """As many of the records as fit into one answer, but at least one."""
    page: list[bytes] = []
    left = MAX_PAGE_BYTES
    for record in records:
        encoded = encode_json(record)
        left -= len(encoded)
        if left < 0 and page:
            break
        page.append(encoded)
    return page


def answer_page(name: str, page: Sequence[bytes], **about: Any) -> Response:
    """An answer whose list `name` holds the encoded records."""
    about_page = encode_json({"count": len(page), **about})
    return Response(200, b'{"%b":[%b],%b' % (name.encode(), b",".join(page), about_page[1:]))


# Schedules as they are asked for


def changed_schedule(
    schedule: Schedule, given: Mapping[str, Any], config: Config, now_us: int
) -> Schedule:
    """The schedule with the given fields. A new trigger plans from now. Raises TriggerError."""
    values = dict(given)
    if "retry" in given:
        values["retry"] = changed_retry(schedule.retry, given["retry"], config)
    if "trigger_config" in given:
        asked = given["trigger_config"]
        trigger = parse_trigger(asked, timezone=config.timezone, now=at_of(now_us))
        values |= {
            "trigger_config": {**asked, "timezone": asked.get("timezone") or config.timezone},
            "trigger_state": trigger.__getstate__(),
            "next_fire_us": next_us(trigger, trigger.cursor_us),
            "quarantined": None,
        }
    return _with_values(schedule, values, now_us)


def _with_values(schedule: Schedule, values: dict[str, Any], now_us: int) -> Schedule:
    """An unchanged trigger goes on as planned, after a pause from now."""
    is_resumed = schedule.paused and values.get("paused") is False and not schedule.quarantined
    if is_resumed and "trigger_state" not in values:
        values["next_fire_us"] = next_us(load_trigger(schedule.trigger_state), now_us)
    changed = replace(schedule, **values, updated_us=now_us)
    if "trigger_state" in values:
        refuse_late_date(changed, now_us)
    return changed


def refuse_late_date(schedule: Schedule, now_us: int) -> None:
    """Raise TriggerError for a date so long past that its only fire would be missed."""
    grace_s, run_us = schedule.misfire_grace_time, schedule.next_fire_us
    if grace_s is None or run_us is None or schedule.trigger_config["type"] != "date":
        return  # parse_trigger has seen to the grace time of dates that have none of their own
    if run_us < now_us - grace_s * 1e6:
        sentence = f"run_date {iso_of(run_us)} is more than misfire_grace_time, {grace_s:g} s, past"
        raise TriggerError("trigger_config.run_date", sentence)


def changed_retry(
    known: RetryPolicy | None, given: Mapping[str, Any] | None, config: Config
) -> RetryPolicy | None:
    """The policy with the given members; None, as a whole or of a member, is as configured."""
    if given is None:
        return None
    standard = asdict(config.retry)
    members = {name: standard[name] if to is None else to for name, to in given.items()}
    return replace(known or config.retry, **members)


def new_schedule(
    schedule_id: str, given: Mapping[str, Any], config: Config, now_us: int
) -> Schedule:
    """A schedule of checked fields. Raises TriggerError."""
    blank = Schedule(schedule_id, "", "", {}, {}, {}, created_us=now_us)
    return changed_schedule(blank, given, config, now_us)


def declared_schedule(
    schedule_id: str, given: Mapping[str, Any], config: Config, now_us: int
) -> Schedule:
    """As new_schedule; but a date that has passed since it was written down is no mistake: such
    a schedule is exhausted.
    """
    try:
        return new_schedule(schedule_id, given, config, now_us)
    except TriggerError:
        schedule = new_schedule(schedule_id, given, config, 0)
    if schedule.next_fire_us is not None and schedule.next_fire_us < now_us:
        schedule = replace(schedule, next_fire_us=None)
    return replace(schedule, created_us=now_us, updated_us=now_us)


def parse_declared_schedule(
    schedule_id: str, body: Mapping[str, Any], config: Config, now_us: int
) -> Schedule:
    """A schedule of a file. Raises InvalidField."""
    NAME.check(("schedule_id",), schedule_id)
    return declared_schedule(schedule_id, DECLARED_FIELDS.read(body), config, now_us)


def canonical_json(value: Any) -> str:
    """The same text for equal values; unlike `==` it tells 1 from true."""
    return json.dumps(value, sort_keys=True)


def has_definition(known: Schedule, wanted: Schedule) -> bool:
    """Whether nothing needs to be done for `known` to be as `wanted`."""
    known_json, wanted_json = (canonical_json(render_definition(s)) for s in (known, wanted))
    return known.quarantined is None and known_json == wanted_json


def redefined_schedule(known: Schedule, wanted: Schedule, now_us: int) -> Schedule:
    """`known` with the definition of `wanted`; an equal trigger goes on as planned."""
    names = [field.name for field in EDIT_FIELDS]
    if known.quarantined is not None or known.trigger_config != wanted.trigger_config:
        names += ["trigger_state", "next_fire_us", "quarantined"]
    return _with_values(known, {name: getattr(wanted, name) for name in names}, now_us)


def check_target(app: App, handler_id: str, method_name: str) -> None:
    """Raise UnknownHandler if it was never heard of, InvalidField for a method it has not."""
    methods = app.gateway.method_names(handler_id)
    if methods is None:
        known = [info.handler_id for info in app.gateway.handlers()]
        raise UnknownHandler(f"there is no handler '{handler_id}'{suggest(handler_id, known)}")
    if methods and method_name not in methods:
        hint = suggest(method_name, methods) or f"; it has {', '.join(methods)[:500]}"
        sentence = f"the handler {handler_id} has no method '{method_name}'{hint}"
        raise InvalidField("method_name", sentence)


def describe_doubts(app: App, schedule: Schedule) -> list[str]:
    """What a schedule still lacks to run: a handler, a method or a secret that may come later."""
    doubts = []
    for check in (
        partial(check_target, app, schedule.handler_id, schedule.method_name),
        partial(app.dispatcher.secrets.check, schedule.job_params),
    ):
        try:
            check()
        except (NotFound, InvalidField) as error:
            doubts.append(str(error))
    return doubts


def find_schedule(app: App, call: Call) -> Schedule:
    schedule_id = call.path["schedule_id"]
    schedule = app.store.schedule(schedule_id)
    if schedule is None:
        raise NotFound(f"there is no schedule '{schedule_id}'")
    return schedule


def check_undeclared(schedule: Schedule) -> None:
    """Raise Conflict for a declared schedule: the next reload would undo the change."""
    if schedule.origin == "config":
        where = "is declared in the configuration file: change it there"
        raise Conflict(f"the schedule '{schedule.schedule_id}' {where}")


def check_preconditions(headers: Mapping[str, str], known: Schedule | None) -> None:
    """Raise HttpError unless the schedule, None if there is none, is in the state that If-Match
    and If-None-Match demand. To be asked last: what else is wrong is told first (RFC 9110
    section 13.2.1).
    """
    etag = "" if known is None else etag_of(known)[1]
    for name, is_wanted in (("if-match", True), ("if-none-match", False)):
        asked = headers.get(name)
        if asked is None:
            continue
        # If-None-Match compares weakly: a proxy that compresses may have weakened the tag.
        listed = [tag.strip() for tag in asked.replace("" if is_wanted else "W/", "").split(",")]
        if bool(known and {"*", etag}.intersection(listed)) != is_wanted:
            is_now = f"its ETag is {etag}" if known else "there is no such schedule"
            raise HttpError(412, "precondition_failed", f"{name}: {asked[:80]} fails: {is_now}")


# What will fire


class ForecastCount:
    """Fires by bucket of time. The first bucket holds the time it is now."""

    def __init__(self, now_us: int, bucket_us: int, buckets: int) -> None:
        self.bucket_us = bucket_us
        self.begin_us = now_us - now_us % bucket_us
        self.end_us = self.begin_us + bucket_us * buckets
        self.schedules = 0
        begins = (self.begin_us + i * bucket_us for i in range(buckets))
        self._buckets: list[dict[str, Any]] = [
            {"at": iso_of(at_us), "count": 0, "schedules": []} for at_us in begins
        ]
        self._soonest: list[tuple[int, str, str]] = []
        self._alike: dict[tuple[str, int], list[tuple[int, int]]] = {}

    def add(self, row: DueRow) -> Iterator[None]:
        """Count a schedule; each step is short. One that cannot be read counts nothing."""
        self.schedules += 1
        fire = row.next_fire_us, row.schedule_id, row.title
        if len(self._soonest) < UPCOMING_SOONEST or fire < self._soonest[-1]:
            self._soonest = sorted([*self._soonest, fire])[:UPCOMING_SOONEST]
        alike = row.trigger_state, row.next_fire_us
        if (found := self._alike.get(alike)) is None:
            found = []
            with suppress(TriggerError):
                for counted in self._fires(row):
                    found.append(counted)
                    yield
            if len(self._alike) >= UPCOMING_ALIKE:
                self._alike.clear()
            self._alike[alike] = found
        for i, count in found:
            bucket = self._buckets[i]
            bucket["count"] += count
            if len(bucket["schedules"]) < UPCOMING_NAMES:
                bucket["schedules"].append(row.title)
        yield

    def _fires(self, row: DueRow) -> Iterator[tuple[int, int]]:
        """Each bucket the schedule fires in, and how often."""
        trigger = load_trigger(json.loads(row.trigger_state))
        fire_us: int | None = max(row.next_fire_us, self.begin_us)
        while fire_us is not None and fire_us < self.end_us:
            i = (fire_us - self.begin_us) // self.bucket_us
            last_us = self.begin_us + (i + 1) * self.bucket_us - 1
            count, later_us = 1, next_us(trigger, fire_us)
            if later_us is not None and later_us <= last_us:
                count += trigger.count_between(at_of(later_us), at_of(last_us))
                later_us = next_us(trigger, last_us)
            yield i, count
            fire_us = later_us

    def render(self, left_out: int) -> dict[str, Any]:
        return {
            "begin": iso_of(self.begin_us),
            "bucket_seconds": self.bucket_us / 1e6,
            "buckets": self._buckets,
            "soonest": [
                {"schedule_id": schedule_id, "name": title, "at": iso_of(at_us)}
                for at_us, schedule_id, title in self._soonest
            ],
            "schedules": self.schedules,
            "left_out": left_out,
        }


class Forecast:
    """What all schedules will fire, counted in turns between the loop's other work, and kept."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._counting = asyncio.Lock()
        self._kept: tuple[int, int] | None = None  # what the kept answer answers
        self._kept_until_s = 0.0
        self._answer = b""
        self.budget_s = UPCOMING_BUDGET_S

    async def ask(self, bucket_us: int, buckets: int) -> bytes:
        """The answer as JSON. Raises StoreUnavailable."""
        async with self._counting:
            if self._kept != (bucket_us, buckets) or self._clock.monotonic() > self._kept_until_s:
                count = ForecastCount(self._clock.now_us(), bucket_us, buckets)
                left_out, took_s = await self._count(count)
                self._answer = encode_json(count.render(left_out))
                self._kept = bucket_us, buckets
                kept_s = max(UPCOMING_KEPT_S, UPCOMING_KEPT_TIMES * took_s)
                self._kept_until_s = self._clock.monotonic() + kept_s
            return self._answer

    async def _count(self, count: ForecastCount) -> tuple[int, float]:
        """How many schedules were left out as the budget was spent, and what was spent of it."""
        spent_s, turn_s, key = 0.0, self._clock.monotonic(), 0
        while rows := self._store.due_until(count.end_us, after_key=key, limit=UPCOMING_ROWS):
            for row in rows:
                key = row.key
                for _ in count.add(row):
                    if (took_s := self._clock.monotonic() - turn_s) > UPCOMING_TURN_S:
                        spent_s += took_s
                        await asyncio.sleep(0)
                        turn_s = self._clock.monotonic()
                if spent_s > self.budget_s:
                    return self._store.count_due(count.end_us, after_key=key), spent_s
        return 0, spent_s + self._clock.monotonic() - turn_s


# One function for each route


@dataclass(slots=True)
class Call:
    """A request whose parts are checked: path arguments, query and body by field name."""

    request: Request
    path: Mapping[str, str]
    query: Mapping[str, Any]
    body: Mapping[str, Any]
    identity: Identity


def show_health(app: App, call: Call) -> Response:
    checks, status = app.health()
    insecurity = app.access.insecurity
    health: dict[str, Any] = {"status": status, "warnings": [insecurity] if insecurity else []}
    if call.identity is not NOBODY:
        health |= describe_health(app, checks)
    if status == "failed":
        return json_response(503, health, RETRY_AFTER)
    return json_response(200, health)


def describe_health(app: App, checks: Mapping[str, str]) -> dict[str, Any]:
    """What is for those only who may know the server."""
    up_s, written = app.clock.monotonic() - app.started_monotonic, load_written_bytes()
    # By the hour once that means something.
    hourly = None if written is None or up_s < 60 else round(written * 3_600 / up_s)
    return {
        "checks": checks,
        "version": VERSION,
        "uptime_seconds": round(up_s, 1),
        "time": iso_of(app.clock.now_us()),
        "instance_name": app.config.instance_name,
        "deployment": app.config.deployment,
        "running": app.dispatcher.running,
        "waiting": app.dispatcher.waiting,
        "last_backup": iso_of(app.recovery.last_backup_us),
        "memory_bytes": load_rss_bytes(),
        "disk_written_bytes": written,
        "disk_bytes_per_hour": hourly,
    }


async def acknowledge_health(app: App, call: Call) -> Response:
    await app.recovery.acknowledge()
    return show_health(app, call)


def show_config(app: App, call: Call) -> Response:
    return json_response(200, mask_config(app.config))


def list_handlers(app: App, call: Call) -> Response:
    now_us = app.clock.now_us()
    handlers = [render_handler(info, now_us) for info in app.gateway.handlers()]
    return json_response(200, {"handlers": handlers, "count": len(handlers)})


async def forget_handler(app: App, call: Call) -> Response:
    handler_id = call.path["handler_id"]
    await app.gateway.forget(handler_id)
    return answer_done(handler_id=handler_id)


async def once(
    app: App, call: Call, make: Callable[[App, Call, Receipt | None], Awaitable[str]]
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """What `make` has made, given the receipt to store with it; for a repeated request what was
    made then, and a header that says so. A request that failed has made nothing: it makes anew.
    """
    if IDEMPOTENCY_KEY not in call.request.headers:
        return await make(app, call, None), ()
    receipt = read_receipt(app, call)
    known = app.store.find_receipt(receipt)
    if known is None:
        # Of requests at the same time one is committed; the others try again and find its receipt.
        return await make(app, call, receipt), ()
    if known.digest != receipt.digest:
        sentence = f"the Idempotency-Key {receipt.key} was sent with another body"
        raise HttpError(422, "idempotency_key_reused", sentence)
    return known.made, (("Idempotent-Replayed", "true"),)


def read_receipt(app: App, call: Call) -> Receipt:
    """The receipt for a request, before anything is made. Raises InvalidField.

    The key may be quoted, as draft-ietf-httpapi-idempotency-key-header has it, or bare.
    """
    sent = KEY_TEXT.check(("Idempotency-Key",), call.request.headers[IDEMPOTENCY_KEY])
    key = sent[1:-1] if re.fullmatch('".+"', sent) else sent
    scope = f"{call.request.route} {call.identity.name}"
    digest = hashlib.sha256(canonical_json(call.body).encode()).digest()
    return Receipt(scope, key, digest, app.clock.now_us())


async def create_schedule(app: App, call: Call) -> Response:
    made, replayed = await once(app, call, _make_schedule)
    location = location_of(json.loads(made)["schedule_id"])
    return Response(201, made.encode(), headers=(location, *replayed))


async def _make_schedule(app: App, call: Call, receipt: Receipt | None) -> str:
    given = dict(call.body)
    schedule_id = given.pop("schedule_id", None) or f"schedule-{os.urandom(6).hex()}"
    check_target(app, given["handler_id"], given["method_name"])
    app.dispatcher.secrets.check(given.get("job_params"))
    schedule = new_schedule(schedule_id, given, app.config, app.clock.now_us())
    next_fire_time = iso_of(schedule.next_fire_us)
    made = dump_json(
        {"status": "success", "schedule_id": schedule_id, "next_fire_time": next_fire_time}
    )
    await app.store.add_schedule_record(schedule, receipt and replace(receipt, made=made))
    return made


def list_schedules(app: App, call: Call) -> Response:
    asked = {"sort": "schedule_id", "limit": MAX_PAGE, "offset": 0, **call.query}
    found, total = app.store.schedules(**asked)
    page = encode_page(map(render_schedule, found))
    end = asked["offset"] + len(page)
    next_offset = end if page and end < total else None
    return answer_page("schedules", page, total=total, next_offset=next_offset)


async def show_upcoming(app: App, call: Call) -> Response:
    hours, buckets = call.query.get("hours", 24), call.query.get("buckets", 96)
    return Response(200, await app.forecast.ask(hours * 3_600_000_000 // buckets, buckets))


async def change_schedules(app: App, call: Call) -> Response:
    paused = call.body["paused"]
    ids = app.store.schedule_ids(**call.query)
    if "schedule_ids" in call.body:
        ids = list(frozenset(ids).intersection(call.body["schedule_ids"]))
    for i in range(0, len(ids), CHANGED_AT_ONCE):
        some = ids[i : i + CHANGED_AT_ONCE]
        await asyncio.gather(*(app.store.set_paused(schedule_id, paused) for schedule_id in some))
    return answer_done(paused=paused, count=len(ids))


def show_schedule(app: App, call: Call) -> Response:
    schedule = find_schedule(app, call)
    return json_response(200, render_schedule(schedule), (etag_of(schedule),))


async def put_schedule(app: App, call: Call) -> Response:
    """Make the schedule exactly as the body says: what is absent has its default, `paused` too.

    It may name what is not there yet, as declared schedules may; `warnings` says so.
    """
    schedule_id = NAME.check(("schedule_id",), call.path["schedule_id"])
    given = dict(call.body)
    if given.pop("schedule_id", schedule_id) != schedule_id:
        raise InvalidField("schedule_id", f"schedule_id must be '{schedule_id}', as in the path")
    now_us = app.clock.now_us()
    wanted = declared_schedule(schedule_id, given, app.config, now_us)
    known = app.store.schedule(schedule_id)
    if known is not None:
        check_undeclared(known)
    check_preconditions(call.request.headers, known)
    is_equal = known is not None and has_definition(known, wanted)
    if known is None:
        await _add_schedule(app, wanted)
    elif not is_equal:
        await _replace_schedule(app, known, redefined_schedule(known, wanted, now_us))
    more = {"changed": not is_equal, "warnings": describe_doubts(app, wanted)}
    return _answer_changed(find_schedule(app, call), 200 if known else 201, **more)


async def _add_schedule(app: App, schedule: Schedule) -> None:
    try:
        await app.store.add_schedule_record(schedule)
    except IdTaken:
        raise Overtaken from None


async def _replace_schedule(app: App, known: Schedule, changed: Schedule) -> None:
    if not await app.store.replace_schedule(changed, known.generation):
        raise Overtaken


def refuse_damaged(schedule: Schedule) -> None:
    """Raise Conflict for one of which only a part is left, which must not pass for the whole."""
    if schedule.is_damaged:
        raise Conflict(f"{schedule.quarantined}; replace the schedule as a whole or delete it")


async def change_schedule(app: App, call: Call) -> Response:
    known = find_schedule(app, call)
    refuse_damaged(known)
    if call.body.keys() - {"paused"}:
        check_undeclared(known)
    changed = changed_schedule(known, call.body, app.config, app.clock.now_us())
    if (changed.handler_id, changed.method_name) != (known.handler_id, known.method_name):
        check_target(app, changed.handler_id, changed.method_name)
    app.dispatcher.secrets.check(call.body.get("job_params"))
    check_preconditions(call.request.headers, known)
    await _replace_schedule(app, known, changed)
    return _answer_changed(find_schedule(app, call))


def _answer_changed(schedule: Schedule, status: int = 200, **more: Any) -> Response:
    schedule_id = schedule.schedule_id
    shown = {"status": "success", "schedule_id": schedule_id, **more}
    headers = (etag_of(schedule), *([location_of(schedule_id)] if status == 201 else []))
    return json_response(status, {**shown, "schedule": render_schedule(schedule)}, headers)


def location_of(schedule_id: str) -> tuple[str, str]:
    return "Location", f"/api/schedules/{schedule_id}"


async def delete_schedule(app: App, call: Call) -> Response:
    schedule = find_schedule(app, call)
    check_undeclared(schedule)
    check_preconditions(call.request.headers, schedule)
    schedule_id = schedule.schedule_id
    if not await app.store.delete_schedule(schedule_id, schedule.generation):
        raise Overtaken
    app.dispatcher.cancel_queued(schedule_id, "schedule deleted")
    return answer_done(schedule_id=schedule_id)


async def pause_schedule(app: App, call: Call) -> Response:
    return await _set_paused(app, call, True)


async def resume_schedule(app: App, call: Call) -> Response:
    return await _set_paused(app, call, False)


async def _set_paused(app: App, call: Call, paused: bool) -> Response:
    schedule = await app.store.set_paused(find_schedule(app, call).schedule_id, paused)
    return _answer_changed(schedule or find_schedule(app, call))


async def run_schedule(app: App, call: Call) -> Response:
    schedule = find_schedule(app, call)
    refuse_damaged(schedule)
    check_target(app, schedule.handler_id, schedule.method_name)
    called = schedule.handler_id, schedule.method_name, schedule.job_params
    submitted = app.dispatcher.submit(
        *called, timeout=schedule.timeout, retry=schedule.retry, schedule=schedule
    )
    return await _answer_submitted(app, submitted, wait=call.body.get("wait", False))


async def run_now(app: App, call: Call) -> Response:
    wait = call.body.get("wait", True)
    if IDEMPOTENCY_KEY not in call.request.headers:
        return await _answer_submitted(app, _submit(app, call), wait=wait)
    execution_id, replayed = await once(app, call, _submit_once)
    if wait:
        answer = answer_outcome(await app.dispatcher.wait(execution_id))
    else:
        answer = answer_accepted(execution_id)
    answer.headers += replayed
    return answer


def _submit(app: App, call: Call, receipt: Receipt | None = None) -> Commit[Execution]:
    body = call.body
    handler_id, method_name = body["handler_id"], body["method_name"]
    check_target(app, handler_id, method_name)
    return app.dispatcher.submit(
        handler_id,
        method_name,
        body.get("job_params", {}),
        timeout=body.get("timeout"),
        retry=changed_retry(None, body.get("retry"), app.config),
        receipt=receipt,
    )


async def _submit_once(app: App, call: Call, receipt: Receipt | None) -> str:
    return (await _submit(app, call, receipt)).execution_id


async def _answer_submitted(app: App, submitted: Commit[Execution], *, wait: bool) -> Response:
    if wait:
        return answer_outcome(await app.dispatcher.end_of(submitted))
    return answer_accepted((await submitted).execution_id)


def list_executions(app: App, call: Call) -> Response:
    asked = {"limit": 50, **call.query}
    asked |= {"before": asked.pop("cursor", None), "since_us": asked.pop("since", None)}
    found = app.store.executions(**asked)
    page = encode_page(map(render_execution, found))
    last = found[len(page) - 1].execution_id if page else None
    # A page may be short as what is on it is large, so its length does not tell whether it ends.
    goes_on = last and app.store.executions(**{**asked, "limit": 1, "before": last})
    return answer_page("records", page, next_cursor=last if goes_on else None)


def show_execution(app: App, call: Call) -> Response:
    execution = find_execution(app, call)
    execution_id = execution.execution_id
    progress, attempts = app.dispatcher.progress(execution_id), app.store.attempts(execution_id)
    return json_response(
        200,
        {
            **render_execution(execution),
            "attempts": [*map(ATTEMPT_VIEW.render, with_current(execution, attempts))],
            "log": (app.store.log(execution_id) or "") + app.dispatcher.live_log(execution_id),
            "progress": {"percent": progress[0], "message": progress[1]} if progress else None,
        },
    )


def with_current(execution: Execution, recorded: list[Attempt]) -> list[Attempt]:
    """Every attempt: one that runs or has succeeded is told by the execution alone."""
    e = execution
    if e.started_us is None or e.status not in (Status.RUNNING, Status.SUCCESS):
        return recorded
    current = Attempt(e.attempt, e.instance, e.started_us, e.completed_us, e.status.value)
    return [item for item in recorded if item.attempt != e.attempt] + [current]


def find_execution(app: App, call: Call) -> Execution:
    execution_id = call.path["execution_id"]
    execution = app.store.execution(execution_id)
    if execution is None:
        raise NotFound(f"there is no execution '{execution_id}'")
    return execution


async def cancel_execution(app: App, call: Call) -> Response:
    execution_id = find_execution(app, call).execution_id
    await app.dispatcher.cancel(execution_id, "by request")
    execution = render_execution(find_execution(app, call))
    return answer_done(execution_id=execution_id, execution=execution)


def show_stats(app: App, call: Call) -> Response:
    since_us = call.query.get("since", app.clock.now_us() - STATS_SPAN_S * 1_000_000)
    return json_response(200, {"since": iso_of(since_us), **app.store.stats(since_us)})


def list_errors(app: App, call: Call) -> Response:
    found = app.store.errors(call.query.get("limit", 50))
    return answer_page("records", encode_page(map(render_execution, found)))


def preview_trigger(app: App, call: Call) -> Response:
    now = app.clock.now()
    asked, known = call.body["trigger_config"], app.store.schedule(call.body.get("schedule_id", ""))
    if known and known.trigger_config == asked:
        trigger = load_trigger(known.trigger_state)
    else:
        trigger = parse_trigger(asked, timezone=app.config.timezone, now=now)
    previews = preview_fire_times(trigger, now, call.body.get("count", 10))
    return json_response(
        200,
        {
            "trigger": render_trigger(trigger),
            "description": describe_trigger(trigger),
            "timezone": trigger.zone.key,
            "fire_times": [
                {"at": iso_of(us_of(fire.fire_at)), "local": fire.local, "note": fire.note}
                for fire in previews
            ],
        },
    )


def stream_events(app: App, call: Call) -> StreamResponse:
    if app.events.subscribers >= MAX_SUBSCRIBERS:
        raise Overloaded(f"{MAX_SUBSCRIBERS} clients watch events already")
    last_event_id = call.request.headers.get("last-event-id")

    def start(write: Callable[[bytes], bool]) -> Callable[[], None]:
        write(b"retry: 1000\n\n")
        return app.events.subscribe(write, frame_for_event_stream, last_event_id)

    return StreamResponse(start)


def stream_websocket(app: App, call: Call) -> StreamResponse:
    if app.events.subscribers >= MAX_SUBSCRIBERS:
        raise Overloaded(f"{MAX_SUBSCRIBERS} clients watch events already")
    last_event_id = call.query.get("last_event_id")
    return StreamResponse(
        lambda write: app.events.subscribe(write, frame_for_websocket, last_event_id),
        keep_alive=PING_FRAME,
        farewell=encode_close(CloseCode.GOING_AWAY, "the server stops"),
        websocket_accept=accept_websocket(call.request.headers),
        receive=WebSocketReader().feed,
    )


def frame_for_websocket(event_id: str, kind: str, body: bytes) -> bytes:
    """An event as one text message: `{"id", "event", "data"}`."""
    message = b'{"id":"%b","event":"%b","data":%b}' % (event_id.encode(), kind.encode(), body)
    return encode_frame(Opcode.TEXT, message)


def render_identity(app: App, identity: Identity) -> dict[str, Any]:
    return {
        "authenticated": identity is not NOBODY,
        "name": identity.name,
        "role": identity.role,
        "expires_at": iso_of(identity.expires_us),
        "login_required": app.access.is_login_required,
        "can_log_out": bool(identity.session_id),
    }


def show_session(app: App, call: Call) -> Response:
    return json_response(200, render_identity(app, call.identity))


def log_in(app: App, call: Call) -> Response:
    peer = call.request.peer
    identity, cookie = app.access.log_in(call.body["token"], peer)
    app.store.note(AuditEntry(app.clock.now_us(), identity.name, peer, "log_in", ""))
    return json_response(200, render_identity(app, identity), (cookie,))


def log_out(app: App, call: Call) -> Response:
    cookie = app.access.log_out(call.identity)
    if call.identity.session_id:
        at_us, name = app.clock.now_us(), call.identity.name
        app.store.note(AuditEntry(at_us, name, call.request.peer, "log_out", ""))
    return json_response(200, {"status": "success"}, (cookie,))


async def list_audit(app: App, call: Call) -> Response:
    await app.store.settle_notes()
    limit = call.query.get("limit", 100)
    found = app.store.audit(limit=limit + 1, before=call.query.get("cursor"))
    page = encode_page(map(AUDIT_VIEW.render, found[:limit]))
    cursor = found[len(page) - 1].number if len(page) < len(found) else None
    return answer_page("entries", page, next_cursor=cursor)


def show_metrics(app: App, call: Call) -> Response:
    return Response(200, render_metrics(describe_metrics(app)), METRICS_TYPE)


def describe_metrics(app: App) -> Iterator[Family]:
    """What was counted, and what can be looked up."""
    now_us, up_s = app.clock.now_us(), app.clock.monotonic() - app.started_monotonic
    waiting, due_us = app.dispatcher.count_waiting()
    handlers = app.gateway.handlers()
    is_up = [(info.handler_id, info.status == "Connected") for info in handlers]
    yield from app.metrics.families()
    for name, kind, about, samples in (
        ("queue_executions", "gauge", "Executions that wait, by why they do.",
         labelled("state", waiting.items())),
        ("queue_oldest_age_seconds", "gauge", "How long the oldest of those that are due waits.",
         single(0 if due_us is None else max(0, now_us - due_us) / 1e6)),
        ("executions_running", "gauge", "Executions that run.", single(app.dispatcher.running)),
        ("schedules", "gauge", "Schedules, by state; a quarantined one does not fire.",
         labelled("state", app.store.count_schedules().items())),
        ("handler_up", "gauge", "Whether an instance of the handler is connected.",
         labelled("handler_id", is_up, min)),
        ("handler_running", "gauge", "Calls that the handler is running.",
         labelled("handler_id", [(info.handler_id, info.running) for info in handlers])),
        ("messages_malformed_total", "counter", "Messages of handlers that were refused.",
         single(app.gateway.malformed)),
        ("store_commits_total", "counter", "Commits to the database.", single(app.store.commits)),
        ("store_up", "gauge", "Whether the database takes changes.",
         single(app.store.state == "ok")),
        ("event_subscribers", "gauge", "Clients that watch events.",
         single(app.events.subscribers)),
        ("restarts_total", "counter", "Restarts by the governor since it started, by process.",
         labelled("process", load_restarts(app.config.data_dir).items())),
    ):  # fmt: skip
        yield Family(f"schedulezero_{name}", kind, about, samples)
    yield from describe_process(now_us / 1e6, up_s)


def show_description(app: App, call: Call) -> Response:
    return json_response(200, describe_api(ROUTES, app.access.is_login_required))


# What else is answered

SESSION: Final = shape(authenticated=BOOLEAN, name=TEXT, role=TEXT, login_required=BOOLEAN)
SCHEDULE_CHANGED: Final = shape(status=SUCCESS, schedule_id=TEXT, schedule=component("Schedule"))
SCHEDULE_PUT: Final = shape(
    **SCHEDULE_CHANGED["properties"], changed=BOOLEAN, warnings=list_of(TEXT)
)
RUN_ENDED: Final = shape(status=SUCCESS, result=ANYTHING, execution_id=TEXT)
RUN_ACCEPTED: Final = shape(status={"const": "accepted"}, execution_id=TEXT)
UPCOMING: Final = shape(
    begin=TIME, bucket_seconds=NUMBER, schedules=COUNT, left_out=COUNT,
    buckets=list_of(shape(at=TIME, count=COUNT, schedules=list_of(TEXT))),
    soonest=list_of(shape(schedule_id=TEXT, name=TEXT, at=TIME)),
)  # fmt: skip
RECORDS: Final = shape(records=list_of(component("Execution")), count=COUNT)


# The table

RouteFunction = Callable[[App, Call], HttpAnswer | Awaitable[HttpAnswer]]
ANYONE, VIEWER, OPERATOR, ADMIN = Role


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the table. A path may hold arguments, as in `/api/schedules/{schedule_id}`."""

    method: str
    path: str
    run: RouteFunction
    role: Role
    summary: str
    answers: Mapping[int, Schema]
    query: Fields = NO_FIELDS
    body: Fields | None = None
    headers: tuple[Field, ...] = ()  # which the function itself reads
    content_type: str = JSON_TYPE  # of the answers

    @property
    def is_change(self) -> bool:
        """Whether it may change anything; those who only look need not be recorded."""
        return self.method != "GET" and self.role in (OPERATOR, ADMIN)


ONE_SCHEDULE: Final = "/api/schedules/{schedule_id}"
ONE_EXECUTION: Final = "/api/executions/{execution_id}"
HEALTH: Final = shape(status=TEXT)
ANY_HEADER: Final = Kind(lambda path, value: value, TEXT)
PRECONDITIONS: Final = (
    Field("If-Match", ANY_HEADER, "only if its ETag is one of these, or * for any"),
    Field("If-None-Match", ANY_HEADER, "only if its ETag is none of these; * to make it only"),
)

ROUTES: Final = (
    Route("GET", "/api/health", show_health, ANYONE,
          "Whether it can store and schedule; more than that only after login",
          {200: HEALTH, 503: HEALTH}),
    Route("GET", "/api/session", show_session, ANYONE,
          "Who asks, and whether a login is needed", {200: SESSION}),
    Route("POST", "/api/login", log_in, ANYONE,
          "Begin a session with a token; the cookie is for browsers", {200: SESSION},
          body=Fields(Field("token", TOKEN, required=True))),
    Route("POST", "/api/logout", log_out, ANYONE,
          "End the session", {200: shape(status=SUCCESS)}),
    Route("GET", "/api/audit", list_audit, ADMIN,
          "Who changed what and from where, and who was refused; newest first",
          {200: shape(entries=list_of(AUDIT_VIEW.schema), count=COUNT)}, query=AUDIT_QUERY),
    Route("POST", "/api/health/acknowledge", acknowledge_health, OPERATOR,
          "Take note of what happened to the database; health tells it no more",
          {200: HEALTH, 503: HEALTH}),
    Route("GET", "/api/config", show_config, VIEWER,
          "The effective configuration, secrets masked", {200: ANY_OBJECT}),
    Route("GET", "/api/handlers", list_handlers, VIEWER,
          "All handlers ever registered", {200: shape(handlers=list_of(component("Handler")))}),
    Route("DELETE", "/api/handlers/{handler_id}", forget_handler, ADMIN,
          "Forget a handler that is gone for good", {200: shape(status=SUCCESS, handler_id=TEXT)}),
    Route("POST", "/api/schedule", create_schedule, ADMIN,
          "Make a schedule", {201: shape(status=SUCCESS, schedule_id=TEXT)},
          body=SCHEDULE_FIELDS, headers=(KEY_HEADER,)),
    Route("GET", "/api/schedules", list_schedules, VIEWER,
          "Schedules, by page",
          {200: shape(schedules=list_of(component("Schedule")), count=COUNT, total=COUNT)},
          query=SCHEDULES_QUERY),
    Route("PATCH", "/api/schedules", change_schedules, OPERATOR,
          "Pause or resume all schedules that match the query",
          {200: shape(status=SUCCESS, paused=BOOLEAN, count=COUNT)},
          query=Fields(*SCHEDULE_FILTERS), body=MANY_FIELDS),
    Route("GET", "/api/upcoming", show_upcoming, VIEWER,
          "How often schedules that are not paused will fire in each part of the coming hours; "
          "`left_out` schedules were not counted, to spare the processor",
          {200: UPCOMING}, query=UPCOMING_QUERY),
    Route("GET", ONE_SCHEDULE, show_schedule, VIEWER,
          "One schedule", {200: component("Schedule")}),
    Route("PUT", ONE_SCHEDULE, put_schedule, ADMIN,
          "Make a schedule exactly so, new or not: what is absent has its default, what is equal "
          "stays untouched",
          {200: SCHEDULE_PUT, 201: SCHEDULE_PUT}, body=SCHEDULE_FIELDS, headers=PRECONDITIONS),
    Route("PATCH", ONE_SCHEDULE, change_schedule, ADMIN,
          "Change fields of a schedule", {200: SCHEDULE_CHANGED}, body=CHANGE_FIELDS,
          headers=PRECONDITIONS),
    Route("DELETE", ONE_SCHEDULE, delete_schedule, ADMIN,
          "Delete a schedule; queued runs are cancelled, running ones finish",
          {200: shape(status=SUCCESS, schedule_id=TEXT)}, headers=PRECONDITIONS),
    Route("POST", ONE_SCHEDULE + "/pause", pause_schedule, OPERATOR,
          "Pause a schedule", {200: SCHEDULE_CHANGED}),
    Route("POST", ONE_SCHEDULE + "/resume", resume_schedule, OPERATOR,
          "Resume a schedule; nothing is caught up", {200: SCHEDULE_CHANGED}),
    Route("POST", ONE_SCHEDULE + "/run", run_schedule, OPERATOR,
          "Run a schedule's call now, beside its fire times", {200: RUN_ENDED, 202: RUN_ACCEPTED},
          body=Fields(Field("wait", FLAG, "true: answer when it has ended"))),
    Route("POST", "/api/run_now", run_now, OPERATOR,
          "Call a method now", {200: RUN_ENDED, 202: RUN_ACCEPTED}, body=RUN_FIELDS,
          headers=(KEY_HEADER,)),
    Route("GET", "/api/executions", list_executions, VIEWER,
          "Executions, newest first", {200: RECORDS}, query=EXECUTIONS_QUERY),
    Route("GET", "/api/executions/stats", show_stats, VIEWER,
          "Totals, rates and durations", {200: shape(since=TIME, total=COUNT)}, query=STATS_QUERY),
    Route("GET", "/api/executions/errors", list_errors, VIEWER,
          "What failed lately", {200: RECORDS}, query=ERRORS_QUERY),
    Route("GET", ONE_EXECUTION, show_execution, VIEWER,
          "One execution with its attempts and its log", {200: component("Execution")}),
    Route("POST", ONE_EXECUTION + "/cancel", cancel_execution, OPERATOR,
          "Cancel an execution", {200: shape(status=SUCCESS, execution_id=TEXT)}),
    Route("POST", "/api/triggers/preview", preview_trigger, VIEWER,
          "The next fire times of a trigger", {200: shape(fire_times=list_of(ANY_OBJECT))},
          body=PREVIEW_FIELDS),
    Route("GET", "/api/ws", stream_websocket, VIEWER,
          "The same events over a WebSocket", {101: {}}, query=WEBSOCKET_QUERY),
    Route("GET", "/api/events", stream_events, VIEWER,
          "Server-sent events; Last-Event-ID resumes", {200: TEXT},
          headers=(Field("Last-Event-ID", printable(64), "go on after this event"),),
          content_type="text/event-stream"),
    Route("GET", METRICS_PATH, show_metrics, VIEWER,
          "What is counted, in Prometheus' text format", {200: TEXT}, content_type=METRICS_TYPE),
    Route("GET", "/api/openapi.json", show_description, VIEWER,
          "This description", {200: ANY_OBJECT}),
)  # fmt: skip


# The description


def describe_api(routes: Iterable[Route], is_login_required: bool = True) -> dict[str, Any]:
    """The routes as an OpenAPI 3.1 document."""
    token: dict[str, list[str]] = {"token": []}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = describe_route(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ScheduleZero", "version": VERSION},
        "paths": paths,
        "security": [token] if is_login_required else [{}, token],
        "components": {
            "schemas": COMPONENTS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def describe_route(route: Route) -> dict[str, Any]:
    fields = [("path", Field(name, NAME)) for name in re.findall(r"{(\w+)}", route.path)]
    fields += [("query", field) for field in route.query.fields]
    fields += [("header", field) for field in route.headers]
    described: dict[str, Any] = {
        "operationId": route.run.__name__,
        "summary": route.summary,
        "x-role": route.role,
        "parameters": [_describe_field(field, place) for place, field in fields],
        "responses": {
            str(status): _describe_content(schema, route.content_type, description=route.summary)
            for status, schema in route.answers.items()
        },
    }
    described["responses"]["default"] = _describe_content(
        component("Error"), description="Refused or failed: why, in a sentence"
    )
    if route.role is Role.ANYONE:
        described["security"] = []
    if (body := route.body) is not None:
        described["requestBody"] = _describe_content(body.schema, required=body.is_required)
    return described


def _describe_field(field: Field, place: str) -> dict[str, Any]:
    about = {"description": field.about} if field.about else {}
    required = {"required": True} if place == "path" else {}
    return {"name": field.name, "in": place, "schema": field.kind.schema, **about, **required}


def _describe_content(schema: Schema, content_type: str = JSON_TYPE, **more: Any) -> dict[str, Any]:
    return {"content": {content_type: {"schema": schema}}, **more}


# The shell

STATUS_OF: Final = (
    (NotFound, 404),
    (Conflict, 409),
    (DiskFull, 507),
    (StoreUnavailable, 503),
    (Overloaded, 503),
    (InvalidField, 400),
    (BadJson, 400),
)


def answer_failure(error: ScheduleZeroError) -> Response:
    """The one place where a failure becomes a status."""
    if isinstance(error, HttpError):
        return error_response(error.status, error.code, str(error), error.headers)
    status = next((code for kind, code in STATUS_OF if isinstance(error, kind)), 500)
    more = {"field": error.field} if error.field else {}
    headers = RETRY_AFTER if status in (503, 507) else ()
    return error_response(status, error.code, str(error), headers, **more)


JSON_CONTENT: Final = re.compile(r'application/json *(; *(charset="?utf-?8"?)? *)?', re.IGNORECASE)
PREFLIGHT: Final = (
    ("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE"),
    (
        "Access-Control-Allow-Headers",
        "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, Last-Event-ID",
    ),
    ("Access-Control-Max-Age", "600"),
)  # never credentials: another origin sends a token, not a cookie


class Router:
    """Finds the route of a request: by its path in a table, or by the pattern of its path."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._fixed: dict[str, dict[str, Route]] = {}
        patterns: dict[str, dict[str, Route]] = {}
        for route in routes:
            table = patterns if "{" in route.path else self._fixed
            table.setdefault(route.path, {})[route.method] = route
        self._patterns = [
            (re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", path)), by_method)
            for path, by_method in patterns.items()
        ]

    def find(self, method: str, path: str) -> tuple[Route, Mapping[str, str]]:
        """The route and its path arguments. Raises HttpError 404 or 405."""
        by_method, arguments = self._match(path)
        route = by_method.get("GET" if method == "HEAD" else method)
        if route is None:
            allowed = ", ".join(sorted({*by_method, *(["HEAD"] if "GET" in by_method else [])}))
            sentence = f"only {allowed} can be done here"
            raise HttpError(405, "method_not_allowed", sentence, (("Allow", allowed),))
        return route, arguments

    def _match(self, path: str) -> tuple[Mapping[str, Route], Mapping[str, str]]:
        if (by_method := self._fixed.get(path)) is not None:
            return by_method, {}
        for pattern, by_method in self._patterns:
            if match := pattern.fullmatch(path):
                return by_method, match.groupdict()
        raise HttpError(404, "not_found", f"there is nothing at {path[:200]}")


ROUTER: Final = Router(ROUTES)  # before any fork: to compile patterns costs a child 0.5 MB


class Api:
    """Answers requests: those to `/api/` by the table, all others with the dashboard's files."""

    def __init__(self, app: App) -> None:
        here = os.path.dirname(os.path.abspath(__file__))
        self._app = app
        self._static = StaticFiles(os.path.join(here, "static"))

    def handle(self, request: Request) -> HttpAnswer | Awaitable[HttpAnswer]:
        """Never raises a ScheduleZeroError; what else it raises is a fault of the program."""
        try:
            answer = self._answer(request)
        except ScheduleZeroError as error:
            answer = answer_failure(error)
        if isinstance(answer, (Response, StreamResponse)):
            return self._finish(request, answer)
        return self._settle(request, answer)

    def _answer(self, request: Request) -> HttpAnswer | Awaitable[HttpAnswer]:
        """Raises ScheduleZeroError. What was asked is looked at only when who asks is known."""
        app, headers = self._app, request.headers
        app.access.check_host(headers)
        if not request.path.startswith("/api/") and request.path != METRICS_PATH:
            request.route = "static"
            return self._static.handle(request)
        app.access.check_source(request.method, headers)
        if request.method == "OPTIONS" and "access-control-request-method" in headers:
            return Response(200, headers=PREFLIGHT)
        route, arguments = ROUTER.find(request.method, request.path)
        request.route = route.path
        identity = app.access.identify(headers, request.peer)
        if not identity.role.includes(route.role):
            raise self._refusal(request, route, identity)
        query = route.query.read(request.query)
        call = Call(request, arguments, query, read_body(route, request), identity)
        if route.is_change:
            return self._change(route, call)
        answer = route.run(app, call)
        if isinstance(answer, StreamResponse):
            answer.is_allowed = partial(app.access.is_still, identity)
        return answer

    async def _change(self, route: Route, call: Call) -> HttpAnswer:
        """Do what is asked, and record that it was; the record is committed with the change.

        A change that others overtake is tried again.
        """
        app, tries = self._app, 0
        place = app.store.note(self._entry(call.request, route, call.identity))
        answer: HttpAnswer | None = None
        while answer is None:
            tries += 1
            pending = route.run(app, call)
            assert not isinstance(pending, (Response, StreamResponse)), "changes take time"
            try:
                answer = await pending
            except ScheduleZeroError as error:
                if tries == MAX_TRIES or not isinstance(error, Overtaken):
                    answer = answer_failure(error)
        if isinstance(answer, Response) and answer.status >= 400:
            app.store.note_refusal(place, answer.status)
        return answer

    def _refusal(self, request: Request, route: Route, identity: Identity) -> HttpError:
        refusal = self._app.access.refusal(identity, route.role)
        if refusal.status == 403:
            entry = self._entry(request, route, identity)
            self._app.store.note(replace(entry, status=refusal.status))
        return refusal

    def _entry(self, request: Request, route: Route, identity: Identity) -> AuditEntry:
        action, target = route.run.__name__, request.path[:MAX_TARGET_CHARS]
        return AuditEntry(self._app.clock.now_us(), identity.name, request.peer, action, target)

    async def _settle(self, request: Request, pending: Awaitable[HttpAnswer]) -> HttpAnswer:
        try:
            answer = await pending
        except ScheduleZeroError as error:
            answer = answer_failure(error)
        return self._finish(request, answer)

    def _finish(self, request: Request, answer: HttpAnswer) -> HttpAnswer:
        if cors := self._app.access.cors_headers(request.headers):
            answer.headers += cors
        return answer


def read_body(route: Route, request: Request) -> Mapping[str, Any]:
    """The checked members of a request's body; empty where the route takes none."""
    if route.method == "GET":
        return {}
    content_type = request.headers.get("content-type", "" if request.body else JSON_TYPE)
    # Browsers send forms to any site without asking; they cannot send JSON so.
    if content_type != JSON_TYPE and not JSON_CONTENT.fullmatch(content_type):
        raise HttpError(415, "unsupported_media_type", "send JSON as content-type application/json")
    if route.body is None or not (request.body or route.body.is_required):
        return {}
    value = decode_json(request.body)
    if not isinstance(value, dict):
        raise BadJson("the body must be a JSON object")
    return route.body.read(value)


# --- Server -----------------------------------------------------------------------------------

HOUSE_EVERY_S: Final = 60.0  # pruning, and a look whether a seal or a backup is due
FIRST_HOUSE_S: Final = 2.0
TEND_EVERY_S: Final = 1.0
SEAL_EVERY_S: Final = 600.0  # notes the time as well; both together take four syncs
STALLED_S: Final = 15.0  # APScheduler's loop asks every two seconds; silent so long, it hangs
RESTART_S: Final = (0.5, 30.0)  # backoff of a scheduling loop that fails
STEADY_S: Final = 60.0  # a loop that ran so long has not failed in a row
MAX_LOOP_FAILURES: Final = 5  # in a row; then the server ends, to be started anew
SWITCH_S: Final = 0.0005  # a commit done is told to the loop within this, not Python's 5 ms
CLOSE_S: Final = 5.0  # for HTTP answers in progress when the server stops

FAILED: Final = frozenset({Status.ERROR, Status.TIMEOUT, Status.LOST})

log_server = logging.getLogger("schedulezero.server")


class Notifier:
    """Tells systemd how the server is (sd_notify(3)); nothing where systemd did not start it.

    The unit says `NotifyAccess=all`: its main process is the governor, and this is its child.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._told = ""

    def tell(self, status: str, *, is_alive: bool = True) -> None:
        """Say that it is ready and how it is, and, if it is alive, reset the watchdog."""
        lines = ["WATCHDOG=1"] if is_alive else []
        if status != self._told:
            lines += ["READY=1", f"STATUS={status}"]
            self._told = status
        if not self._address or not lines:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto("\n".join(lines).encode(), self._address)


def log_execution(execution: Execution) -> None:
    """A line for an execution that failed for good."""
    log_server.warning(
        "%s.%s ended as %s: %s",
        execution.handler_id,
        execution.method_name,
        execution.status,
        execution.error or "no reason given",
        extra={"execution_id": execution.execution_id, "handler_id": execution.handler_id},
    )


class Server:
    """All parts of the running server, opened in order and closed in reverse."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self.config = config
        self.clock = clock
        self.started_monotonic = clock.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self._closers: list[Callable[[], Any]] = []
        self.recovery = Recovery(config, clock)
        self.metrics = Metrics()
        self.memory_limit = config.memory_limit
        self.must_renew = False  # it ends to be started anew, and nothing is wrong
        self.failed: str | None = None  # why it must be started anew
        self.on_failure: Callable[[], None] = lambda: None
        self._notifier = Notifier(os.environ)
        self._undeclared: Config | None = None  # a configuration whose schedules wait for the disk
        self._declaring = asyncio.Lock()
        self.reload_wanted = asyncio.Event()
        self._must_replan = False  # whether that waits for the disk, since the clock went back
        self._loop_task: asyncio.Task[None] | None = None
        self._is_closing = False
        self._stalls = 0  # looks in a row at a loop that hangs
        self._sealed_s = -math.inf
        self._probe: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open everything; what was opened is closed again if a later part fails."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(LoopErrorLog(self.clock))
        try:
            await self._open(loop)
        except BaseException as error:
            if isinstance(error, DatabaseDamaged):
                await self.recovery.suspect()
            await self.close()
            raise

    async def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        directory = self.config.data_dir
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self.store = self._open_store()
        self._closers.append(self.store.close)
        self.store.took = self.metrics.commits.observe
        self.store.open(loop)
        with suppress(StoreUnavailable):  # the store says so itself
            await self.recovery.reseal(self.store)
        now_us = self.clock.now_us()
        seen_us = max(self.store.seen_us(), self.recovery.seal.sealed_us)
        self._guard = ClockGuard(now_us, self.clock.monotonic(), seen_us)
        self.store.look = self._look_at_clock
        self.gateway = Gateway(self.config, self.clock, self.store, loop)
        self._closers.append(self.gateway.close)
        self.events = Events(loop, f"{now_us:x}", self._encode_event)
        self.dispatcher = Dispatcher(self.store, self.gateway, self.clock, self._publish)
        self._closers.append(self.dispatcher.close)
        self.dispatcher.adopt()  # before the loop turns: a handler that is back must be known
        self.store.changed = partial(self.events.publish, "schedule")
        self.access = Access(self.config, self.clock, self.store.note)
        self.forecast = Forecast(self.store, self.clock)
        self.api = Api(self)
        self.http = HttpServer(self.api.handle, clock=self.clock)
        self.http.answered = self.metrics.count_request
        try:
            self._tls = open_tls(self.config) if self.config.tls_cert else None
            await self.http.start(self.config.http_host, self.config.http_port, self._tls)
        except OSError as error:
            address = f"{self.config.http_host}:{self.config.http_port}"
            raise ScheduleZeroError(f"cannot listen on {address}: {error.strerror}") from None
        await self._declare_or_wait(self.config)
        for work in (self._schedule(), self._keep_house(), self._tend(), self._reload_if_wanted()):
            task = loop.create_task(work)
            task.add_done_callback(self._on_task_end)
            self._tasks.append(task)
        self._tell()

    def _open_store(self) -> Store:
        """Recover the database if need be, and open it; on a full disk in the ballast's room."""
        try:
            self.recovery.prepare()
            return Store(self.recovery.path, self.config, self.clock, self.recovery.seal.last_id)
        except DiskFull:
            if not Ballast(ballast_path(self.recovery.path)).release():
                raise
        return self._open_store()

    async def close(self) -> None:
        """Stop accepting, finish what is being answered, commit what is queued."""
        self._is_closing = True
        tasks = [*self._tasks, *filter(None, (self._loop_task, self._probe))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if hasattr(self, "http"):
            self.dispatcher.close()
            await self.http.close(CLOSE_S)
        if hasattr(self, "store") and self.store.state == "ok":
            with suppress(ScheduleZeroError):
                await self.store.save_seen(self.clock.now_us())
                await self.recovery.reseal(self.store, is_open=False)
        for close in reversed(self._closers):
            close()

    def secure(self, config: Config) -> None:
        """Apply what a configuration says on access. Raises ConfigError, then nothing changed."""
        fixed = {key: getattr(self.config, key) for key in ("http_host", "http_port", "data_dir")}
        if not (self._tls and config.tls_cert):
            fixed |= {"tls_cert": self.config.tls_cert, "tls_key": self.config.tls_key}
        config = replace(config, **fixed)
        check_access(config)
        if self._tls:
            load_certificate(self._tls, config)
        self.access.apply(config)

    @property
    def address(self) -> str:
        """The URL of the dashboard."""
        host = self.config.http_host
        shown = f"[{host}]" if ":" in host else host
        return f"{'https' if self._tls else 'http'}://{shown}:{self.http.port}"

    def health(self) -> tuple[dict[str, str], str]:
        """Each check with `ok` or a sentence, and `ok`, `degraded` or `failed` for all."""
        quiet_s = self._quiet_s
        stalled = quiet_s > STALLED_S
        checks = {
            "store": self.store.state,
            "scheduler": f"the scheduling loop is silent for {quiet_s:.0f} s" if stalled else "ok",
            "clock": self.store.holding or "ok",
            "recovery": self.recovery.incident or "ok",
        }
        if checks["store"] != "ok" or stalled:
            return checks, "failed"
        return checks, "ok" if set(checks.values()) == {"ok"} else "degraded"

    @property
    def _quiet_s(self) -> float:
        return self.clock.monotonic() - self.store.last_turn_s

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        if not self._is_closing:  # something has cancelled it
            self.fail(f"a task of the server has ended: {task.get_coro()!r}")

    def fail(self, sentence: str) -> None:
        """End the server, so that it is started anew."""
        if self.failed is None:
            log_server.critical("the server ends, to be started anew: %s", sentence)
            self.failed = sentence
            self.on_failure()

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside all else, until the server closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    async def _reload_if_wanted(self) -> None:
        """One reload after the other, from the end of the start on."""
        while True:
            await self.reload_wanted.wait()
            self.reload_wanted.clear()
            try:
                await self.reload()
            except Exception:  # the next may do better
                log_server.exception("the configuration was not reloaded")

    async def reload(self) -> None:
        """Apply the declared schedules of the file as it is now, and who may do what; read the TLS
        files again. Keep the old ones if wrong.
        """
        try:
            config = load_config(self.config.path, os.environ, self.config.deployment)
            self.secure(config)
            await self._declare_or_wait(config)
        except ScheduleZeroError as error:
            log_server.error("the configuration was not reloaded: %s", error)
            return
        set_log_level(config.log_level)
        self.memory_limit = config.memory_limit
        log_server.info("configuration reloaded")

    # Declared schedules

    async def _declare_or_wait(self, config: Config) -> None:
        """As declare, but when the store cannot take it now, again when it can."""
        async with self._declaring:  # two at once would leave some of each
            self._undeclared = None
            try:
                await self.declare(config)
            except StoreUnavailable as error:
                log_server.error("the declared schedules wait: %s", error)
                self._undeclared = config

    async def declare(self, config: Config) -> None:
        """Make the schedules of the configuration file so: create, update, remove its own."""
        declared = dict(config.schedules)
        known, _ = self.store.schedules(origin="config")
        for schedule in known:
            if schedule.schedule_id not in declared:
                await self.store.delete_schedule(schedule.schedule_id)
                self.dispatcher.cancel_queued(schedule.schedule_id, "schedule removed")
                log_server.info("schedule %s is declared no more: removed", schedule.schedule_id)
        for schedule_id, body in declared.items():
            while not await self._declare_one(schedule_id, body):
                log_server.info("schedule %s was changed meanwhile", schedule_id)

    async def _declare_one(self, schedule_id: str, body: Any) -> bool:
        """Create or update one declared schedule; what is unchanged keeps its next fire time.

        False if somebody else changed it at that moment.
        """
        now_us = self.clock.now_us()
        wanted = parse_declared_schedule(schedule_id, body, self.config, now_us)
        wanted = replace(wanted, origin="config")
        known = self.store.schedule(schedule_id)
        if known is None:
            with suppress(IdTaken):
                await self.store.add_schedule_record(wanted)
                return True
            return False
        if known.origin != "config":
            log_server.error("schedule %s exists already: the declared one waits", schedule_id)
            return True
        if "paused" not in body:
            wanted = replace(wanted, paused=known.paused)
        if has_definition(known, wanted):
            return True
        changed = redefined_schedule(known, wanted, now_us)
        return await self.store.replace_schedule(changed, known.generation)

    # Tasks

    async def _schedule(self) -> None:
        """Run APScheduler's loop, and again whenever it ends; too often in a row is a failure."""
        failures = 0
        while failures < MAX_LOOP_FAILURES:
            began_s = self.store.last_turn_s = self.clock.monotonic()
            self._loop_task = asyncio.create_task(self._run_scheduler())
            try:
                await asyncio.wait({self._loop_task})
            finally:
                self._loop_task.cancel()
            cause = None if self._loop_task.cancelled() else self._loop_task.exception()
            log_server.error("the scheduling loop ended; it is started again", exc_info=cause)
            is_steady = self.clock.monotonic() - began_s >= STEADY_S
            failures = 1 if is_steady else failures + 1
            await asyncio.sleep(min(RESTART_S[0] * 2 ** (failures - 1), RESTART_S[1]))
        self.fail(f"the scheduling loop ended {failures} times in a row")

    async def _run_scheduler(self) -> None:
        scheduler = apscheduler.AsyncScheduler(
            self.store,
            identity="schedulezero",
            role=apscheduler.SchedulerRole.scheduler,
            cleanup_interval=None,  # type: ignore[arg-type]
            logger=logging.getLogger("schedulezero.apscheduler"),
        )
        async with scheduler:
            await scheduler.run_until_stopped()

    async def _tend(self) -> None:
        """Each second: help store and scheduling loop out of trouble, or end the server."""
        while self.failed is None:
            await asyncio.sleep(TEND_EVERY_S)
            try:
                await self._help_store()
                self._help_loop()
                self._tell()
            except Exception:  # the next second may do better
                log_server.exception("the server could not look after itself")

    async def _help_store(self) -> None:
        store = self.store
        if store.is_displaced:
            await self.recovery.rescue(store)
            self.fail("the database was deleted, moved or replaced")
        elif store.lost is not None:
            await self.recovery.suspect()
            self.fail(store.lost)
        elif store.state == "ok":
            if self._must_replan:
                await self._replan(self.clock.now_us())
            if self._undeclared is not None:
                await self._declare_or_wait(self._undeclared)
        elif self._probe is None or self._probe.done():  # a disk that hangs never answers
            self._probe = asyncio.create_task(store.probe())

    def _help_loop(self) -> None:
        """Restart a scheduling loop that hangs; but while the disk does, so would the next."""
        if self._quiet_s <= STALLED_S or self.store.hung_s > HUNG_S:
            self._stalls = 0 if self._quiet_s <= STALLED_S else self._stalls
            return
        self._stalls += 1
        if self._stalls * TEND_EVERY_S > STALLED_S:
            self.fail(f"the scheduling loop is silent for {self._quiet_s:.0f} s")
        elif self._stalls == 1 and self._loop_task is not None:
            log_server.error("the scheduling loop is silent for %.0f s", self._quiet_s)
            self._loop_task.cancel()

    def _tell(self) -> None:
        """Tell systemd. What no new start can cure, as a full disk, does not stop its watchdog."""
        checks, status = self.health()
        wrong = [sentence for sentence in checks.values() if sentence != "ok"]
        is_alive = self._quiet_s <= STALLED_S and self.store.hung_s <= HUNG_S
        self._notifier.tell("; ".join([status, *wrong]), is_alive=is_alive)

    async def _keep_house(self) -> None:
        """Now and then: prune history, note the time, seal and back up the database."""
        chores: dict[str, Callable[[], Awaitable[object]]] = {
            "pruning": self._prune,
            "sealing": self._seal_if_due,
            "backing up": lambda: self.recovery.back_up_if_due(self.store),
            "checking pages": self._check_pages,
            "watching memory": self._watch_memory,
        }
        await asyncio.sleep(FIRST_HOUSE_S)
        while True:
            for name, chore in chores.items():
                try:
                    await chore()
                except DatabaseDamaged as error:
                    await self.recovery.suspect()
                    self.fail(str(error))
                except StoreUnavailable as error:
                    log_server.info("put off: %s", error)
                except Exception:  # the other chores go on
                    log_server.exception("%s failed", name)
            await asyncio.sleep(HOUSE_EVERY_S)

    async def _watch_memory(self) -> None:
        """Over the limit, end to be started anew. What runs goes on at its handlers meanwhile."""
        limit_bytes = (self.memory_limit or sys.maxsize) << 20
        if (load_rss_bytes() or 0) <= limit_bytes:
            return
        gc.collect()
        if (used_bytes := load_rss_bytes() or 0) > limit_bytes:
            sentence = "%d MB are in use, the limit is %d: the server starts anew"
            log_server.warning(sentence, used_bytes >> 20, self.memory_limit)
            self.must_renew = True
            self.on_failure()

    async def _prune(self) -> None:
        now_us = self.clock.now_us()
        while await self.store.prune(now_us) == MAX_PRUNED:
            pass
        await self.store.prune_receipts(now_us)
        await self.store.remove_exhausted(now_us - round(self.config.max_age_days * 86_400e6))

    async def _seal_if_due(self) -> None:
        now_s = self.clock.monotonic()
        if now_s - self._sealed_s >= SEAL_EVERY_S:
            await self.store.save_seen(self.clock.now_us())
            await self.recovery.reseal(self.store)
            self._sealed_s = now_s

    async def _check_pages(self) -> None:
        if self.recovery.must_check and (damage := await self.recovery.check()):
            raise DatabaseDamaged(damage)

    def _look_at_clock(self) -> None:
        """Each turn of the scheduling loop: has the wall clock been set, may fires go on?"""
        now_us = self.clock.now_us()
        reading = self._guard.observe(now_us, self.clock.monotonic())
        self.store.holding = reading.holding
        if reading.step_us:
            log_server.warning("the clock stepped by %+.1f s", reading.step_us / 1e6)
            self.events.publish("clock", {"step_s": reading.step_us / 1e6})
            self.metrics.count_step(reading.step_us)
        if reading.step_us > 0:
            self.store.reason = Reason.CLOCK_STEP
        elif reading.froze:
            self.store.reason = Reason.DOWN
        if reading.step_us < 0 or reading.released:
            self.begin(self._replan(now_us))

    async def _replan(self, now_us: int) -> None:
        self._must_replan = False
        try:
            moved = await self.store.replan(now_us)
        except ScheduleZeroError as error:
            self._must_replan = True
            log_server.error("fire times are not moved yet after the clock went back: %s", error)
        else:
            log_server.warning("%d fire times moved after the clock went back", moved)

    def _publish(self, kind: str, value: Any) -> None:
        """Tell what the dispatcher has done: to the counters, the log and whoever watches."""
        if kind == "execution":
            self.metrics.count_execution(value)
            if value.status in FAILED:
                log_execution(value)
        self.events.publish(kind, value)

    def _encode_event(self, kind: str, value: Any) -> bytes | None:
        """The JSON of an event's value; None if there is nothing left to tell."""
        if kind == "execution":
            value = render_execution(value)
        elif kind == "schedule":
            try:
                schedule = self.store.schedule(value)
            except StoreUnavailable:
                return None
            value = render_schedule(schedule) if schedule else {"id": value, "deleted": True}
        elif kind == "handler":
            info = self.gateway.handler(value)
            forgotten = {"id": value, "deleted": True}
            value = render_handler(info, self.clock.now_us()) if info else forgotten
        return encode_json(value)


def run_server(config: Config, *, lifeline_fd: int | None = None) -> int:
    """Run the server until SIGTERM or SIGINT, or until the governor at the lifeline dies.

    Returns the exit code. Raises ScheduleZeroError when it cannot open.
    """
    gc.collect()
    gc.freeze()  # what is imported stays: no collection need look at it again
    gc.set_threshold(10_000, 20, 20)  # a burst makes few cycles, but many objects that stay
    sys.setswitchinterval(SWITCH_S)
    try:
        return asyncio.run(_serve(config, lifeline_fd))
    except DatabaseRefused as error:
        log_server.critical("the database is left as it is, and nothing is started: %s", error)
        return EXIT_CONFIG  # which the governor and systemd do not answer with another start


async def _serve(config: Config, lifeline_fd: int | None) -> int:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    if lifeline_fd is not None:
        loop.add_reader(lifeline_fd, stopping.set)  # readable at EOF: nobody holds the other end
    server = Server(config, Clock())
    server.on_failure = stopping.set
    loop.add_signal_handler(signal.SIGHUP, server.reload_wanted.set)
    await server.open()
    log_server.info("ready at %s, handlers at %s", server.address, server.gateway.endpoint)
    try:
        await stopping.wait()
        log_server.info("stopping")
    finally:
        if lifeline_fd is not None:
            loop.remove_reader(lifeline_fd)
        await server.close()
    if server.failed is not None:
        log_server.error("ended: %s", server.failed)  # last, for the governor to tell
        return EXIT_FAILED
    log_server.info("stopped")
    return EXIT_RENEW if server.must_renew else EXIT_OK


# --- Governor ---------------------------------------------------------------------------------

BACKOFF_S: Final = (1.0, 60.0)  # before the first restart, and at most
RESET_S: Final = 60.0  # up for so long, a death is no longer one of a series
START_S: Final = 1.0  # up for so long, a child counts as running
SERVER_DRAIN_S: Final = 5.0  # kept back of DRAIN_S for the server, which stops last
LOG_TICK_S: Final = 2.0  # between two looks at the size of the handlers' logs
LOG_PRUNE_S: Final = 60.0  # between two looks at the size of all logs
LOCK_WAIT_S: Final = 1.0  # `status` holds the lock for an instant; that is no second governor
HANDLER_OOM_SCORE: Final = 300  # of 1000; when memory runs out the kernel ends handlers first
COPY_BYTES: Final = 64 << 10
NOTIFY_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
LIFELINE_VARIABLE: Final = "SCHEDULEZERO_LIFELINE_FD"
SERVER_NAME: Final = "server"
ORPHAN_GRACE_S: Final = 7.0  # for a server and Python handlers without a governor
ECHO_S: Final = 0.5  # between two looks at what the handlers wrote, in the foreground

# What a reload changes under a running server; all else keeps its old value until a restart.
RELOADED_KEYS: Final = frozenset((
    "handlers", "schedules", "log_level", "memory_limit", "auth", "allow_insecure",
    "allowed_hosts", "cors_origins", "tls_cert", "tls_key", "path", "directory", "lines",
))  # fmt: skip

log_governor: Final = logging.getLogger("schedulezero.governor")


class AlreadyRunning(ScheduleZeroError):
    """Another governor or server holds the data directory."""

    code = "already_running"

    def __init__(self, data_dir: str, pid: int | None) -> None:
        who = f"pid {pid}" if pid else "another process"
        super().__init__(f"already running: {who} holds {data_dir}")


# The policy: pure. A child is always restarted, each time later, but for exit code 78: then its
# configuration is wrong and trying again cannot help.


class ChildState(enum.StrEnum):
    """What the governor knows of a child. The names are Supervisor's."""

    STOPPED = "STOPPED"  # not wanted
    STARTING = "STARTING"  # not yet seen alive for START_S
    RUNNING = "RUNNING"
    BACKOFF = "BACKOFF"  # died soon after its start; waits to be started again
    EXITED = "EXITED"  # died after a long run; starts again in a moment
    STOPPING = "STOPPING"  # told to end
    FATAL = "FATAL"  # exit code 78, or its command cannot be run; a reload tries again


class ChildEvent(enum.StrEnum):
    SPAWN = "spawn"
    UP = "up"
    DEATH = "death"  # within RESET_S of its start
    LATE_DEATH = "late_death"
    RENEWAL = "renewal"  # exit code 79: it asks to be started anew
    REFUSAL = "refusal"  # exit code 78
    STOP = "stop"


# What each event makes of each state, in their order; a dot where it cannot happen.
TRANSITIONS: Final = """
.           STOPPED   STARTING  RUNNING   BACKOFF   EXITED    STOPPING  FATAL
spawn       STARTING  .         .         STARTING  STARTING  .         STARTING
up          .         RUNNING   .         .         .         .         .
death       .         BACKOFF   BACKOFF   .         .         STOPPED   .
late_death  .         EXITED    EXITED    .         .         STOPPED   .
renewal     .         EXITED    EXITED    .         .         STOPPED   .
refusal     .         FATAL     FATAL     .         .         STOPPED   .
stop        STOPPED   STOPPING  STOPPING  STOPPED   STOPPED   STOPPING  STOPPED
"""


NEXT_STATE: Final = MappingProxyType(
    {
        (before, ChildEvent(event)): ChildState(after)
        for event, *cells in map(str.split, TRANSITIONS.strip().splitlines()[1:])
        for before, after in zip(ChildState, cells, strict=True)
        if after != "."
    }
)
DYING: Final = frozenset({ChildEvent.DEATH, ChildEvent.LATE_DEATH, ChildEvent.REFUSAL})


@dataclass(frozen=True, slots=True)
class ChildStatus:
    """One child's place in the policy. Times are monotonic seconds."""

    state: ChildState = ChildState.STOPPED
    spawned_s: float = 0.0
    start_s: float | None = 0.0  # when it is to be started, at first at once; None: not
    failures: int = 0  # deaths in a row
    restarts: int = 0
    reason: str | None = None  # how it last ended


def restart_delay_s(failures: int) -> float:
    """Seconds to wait after the nth death in a row; none for what was no death."""
    first, most = BACKOFF_S
    return min(most, first * 2.0 ** min(failures - 1, 16)) if failures else 0.0


def exit_event(exit_code: int, up_s: float) -> ChildEvent:
    if exit_code == EXIT_CONFIG:
        return ChildEvent.REFUSAL
    if exit_code == EXIT_RENEW and up_s >= RESET_S:  # sooner it cannot have helped
        return ChildEvent.RENEWAL
    return ChildEvent.LATE_DEATH if up_s >= RESET_S else ChildEvent.DEATH


def next_status(
    status: ChildStatus, event: ChildEvent, now_s: float, reason: str | None = None
) -> ChildStatus:
    """The status after `event`. KeyError for an event that the state cannot meet."""
    state = NEXT_STATE[status.state, event]
    status = replace(status, state=state, start_s=None)
    if event is ChildEvent.SPAWN:
        restarts = status.restarts + (status.spawned_s > 0)
        return replace(status, spawned_s=now_s, restarts=restarts)
    if event in (ChildEvent.UP, ChildEvent.STOP):
        return status
    ends = {ChildEvent.RENEWAL: 0, ChildEvent.LATE_DEATH: 1}
    failures = ends.get(event, status.failures + 1)
    status = replace(status, failures=failures, reason=reason)
    if state not in (ChildState.FATAL, ChildState.STOPPED):
        status = replace(status, start_s=now_s + restart_delay_s(failures))
    # Once renewed, as if never spawned: the start to come is no restart after a death.
    return status if failures else replace(status, spawned_s=0.0)


def describe_exit(exit_code: int) -> str:
    """`exit_code` as of os.waitstatus_to_exitcode: negative for a signal."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    with suppress(ValueError):  # real-time signals have no name
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"killed by signal {-exit_code}"


# What is on disk: the lock says that a governor runs, and who; status.json what it sees.


def lock_path(data_dir: str) -> str:
    return os.path.join(data_dir, "governor.lock")


def open_lock(data_dir: str, clock: Clock) -> int:
    """Take the data directory for this process, for as long as it lives; the descriptor.

    The kernel drops the lock with the process, however it ends, so a file left behind means
    nothing. Raises AlreadyRunning, OSError.
    """
    os.makedirs(data_dir, mode=0o700, exist_ok=True)  # parameters and results are in it
    fd = os.open(lock_path(data_dir), os.O_RDWR | os.O_CREAT, 0o644)
    give_up_s = clock.monotonic() + LOCK_WAIT_S
    while not _try_lock(fd, fcntl.LOCK_EX):
        if clock.monotonic() >= give_up_s:
            os.close(fd)
            raise AlreadyRunning(data_dir, find_governor(data_dir))
        time.sleep(0.02)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()} {read_start(os.getpid())}\n".encode(), 0)
    return fd


def signal_process(pid: int, number: signal.Signals) -> None:
    """Ask a governor or a server for something: SIGTERM to end, SIGHUP to reload."""
    os.kill(pid, number)


def find_governor(data_dir: str) -> int | None:
    """The pid that holds the data directory, None if nobody does. Never a stale pid.

    The pid counts only while the lock is held, and with the start time the kernel knows.
    """
    try:
        fd = os.open(lock_path(data_dir), os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if _try_lock(fd, fcntl.LOCK_SH):
            return None
        pid, start = os.pread(fd, 100, 0).decode().split()
        return int(pid) if start == read_start(int(pid)) else None
    except ValueError:  # locked, but not yet written
        return None
    finally:
        os.close(fd)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_start(pid: int) -> str:
    """When the process started, in the kernel's ticks since boot; `-` where /proc is missing."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except OSError:
        return "-"


def log_paths(config: Config) -> dict[str, tuple[str, ...]]:
    """The log files of the governor, the server and each configured handler, by name."""
    names = ("governor", SERVER_NAME, *(spec.handler_id for spec in config.handlers))
    return {name: log_paths_of(config, name) for name in names}


def log_paths_of(config: Config, name: str) -> tuple[str, ...]:
    """The one log of the governor or the server; where a handler's stdout and stderr go."""
    if name in ("governor", SERVER_NAME):
        return (log_path(config, name),)
    directory = os.path.join(config.log_dir, "handlers", name)
    return os.path.join(directory, "handler.log"), os.path.join(directory, "errors.log")


def trim_log(path: str, most_bytes: int) -> None:
    """Keep a log that a child writes to bounded: past `most_bytes`, copy its end and empty it.

    The child goes on appending to the same file, so it need not know. Lines written between the
    copy and the emptying are lost. Raises OSError.
    """
    if (size := size_of(path)) <= most_bytes:
        return
    with open(path, "r+b") as file:
        try:
            file.seek(size - most_bytes)
            with open(path + ".new", "wb") as copy:
                for start in range(0, most_bytes, COPY_BYTES):  # bounded, however fast it grows
                    copy.write(file.read(min(COPY_BYTES, most_bytes - start)))
            for number in range(LOG_BACKUPS - 1, 0, -1):
                with suppress(FileNotFoundError):
                    os.replace(f"{path}.{number}", f"{path}.{number + 1}")
            os.replace(path + ".new", path + ".1")
        finally:  # on a full disk room counts for more than the lines
            file.truncate(0)


def walk_logs(log_dir: str) -> Iterator[tuple[str, int, float]]:
    """Path, size and time of last change of each log file, also of handlers that are no more."""
    for directory, _, names in os.walk(log_dir):
        for name in names:
            path = os.path.join(directory, name)
            if re.fullmatch(r".+\.log(\.\d+|\.new)?", name):
                with suppress(FileNotFoundError):
                    found = os.stat(path)
                    yield path, found.st_size, found.st_mtime


# Handlers: what stands in the configuration, made to run.


def find_handler_file(run: str, directory: str) -> tuple[str, str] | None:
    """The path of the Python file in `file.py:Class`, and the name of its class.

    It is looked for beside the configuration file, then beside schedulezero.py.
    """
    file, _, name = run.rpartition(":")
    for place in (directory, os.path.dirname(os.path.abspath(__file__))):
        path = os.path.normpath(os.path.join(place, file))
        if os.path.isfile(path):
            return path, name
    return None


def check_handlers(config: Config) -> None:
    """Raise ConfigError if a handler's Python file or directory is not there."""
    for spec in config.handlers:
        at = ("handlers", spec.handler_id)
        if spec.run and not find_handler_file(spec.run, config.directory):
            sentence = f"there is no file {spec.run.rpartition(':')[0]} in {config.directory}"
            raise error_in_config(config, (*at, "run"), sentence)
        if spec.cwd and not os.path.isdir(spec.cwd):
            raise error_in_config(config, (*at, "cwd"), f"there is no directory {spec.cwd}")


def connect_endpoint(host: str, port: int) -> str:
    """Where a process on this machine reaches a socket that is bound to `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}.get(host, host)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def serve_python_handler(spec: HandlerSpec, config: Config) -> int:
    """Serve the class that `spec.run` names until told to stop; the exit code."""
    found = find_handler_file(spec.run or "", config.directory)
    library_file = find_handler_file("handler.py:", config.directory)
    if found is None or library_file is None:
        print_error(f"there is no file {spec.run if found is None else 'handler.py'}")
        return EXIT_CONFIG
    library = load_library(library_file[0])
    join = join_string(spec, config)
    options = library.Options(
        concurrency=spec.concurrency,
        processes=spec.processes,
        config=spec.config,
        drain_s=DRAIN_S - SERVER_DRAIN_S - 1,  # it is killed a second later
        log_level=config.log_level,
        join=join and library.read_join(join),
        secret=config.handler_secret or None,
    )
    server, target = connect_endpoint(config.zmq_host, config.zmq_port), ":".join(found)
    return int(library.serve(target, handler_id=spec.handler_id, server=server, options=options))


def serve_handler(spec: HandlerSpec, config: Config) -> int:
    """Be a configured handler in this process until told to stop; the exit code."""
    os.environ.update(spec.env)
    os.chdir(spec.cwd or config.directory)
    os.environ.pop("SCHEDULEZERO_HANDLER_SECRET", None)  # for the handler, not for its jobs
    if spec.command:
        if config.handler_secret:
            os.environ["SCHEDULEZERO_HANDLER_SECRET"] = config.handler_secret
        if join := join_string(spec, config):
            os.environ["SCHEDULEZERO_JOIN"] = join
        exec_command(spec)
    return serve_python_handler(spec, config)


def join_string(spec: HandlerSpec, config: Config) -> str | None:
    """What lets a handler in that is started here, with a key of its own; None without CURVE."""
    if choose_security(config) == "null":
        return None
    keys = KeyFile(config)
    pair = keys.open_server(make_keypair)
    key = keys.open_local(spec.handler_id, make_keypair, Clock().now_us())
    endpoint = connect_endpoint(config.zmq_host, config.zmq_port)
    return encode_join(spec.handler_id, endpoint, pair.public, key.secret or "")


def load_module(path: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    spec.loader_state = os.stat(path).st_mtime_ns
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_library(path: str) -> Any:
    """The handler library: as it was preloaded, unless the file has changed since."""
    loaded = sys.modules.get("handler")
    about = getattr(loaded, "__spec__", None)
    if about and about.origin == path and about.loader_state == os.stat(path).st_mtime_ns:
        return loaded
    return load_module(path, "handler")


def preload(config: Config) -> None:
    """Import what the children will need, so that they share its memory instead of each having its
    own. Only what comes with this program: a user's code has no business in the governor.
    """
    own = os.path.join(os.path.dirname(os.path.abspath(__file__)), "handler.py")
    found = find_handler_file("handler.py:", config.directory)
    if found and found[0] == own and any(s.run and s.autostart for s in config.handlers):
        with suppress(Exception):  # the handlers that need it say what is wrong with it
            load_library(own)


def exec_command(spec: HandlerSpec) -> NoReturn:
    """Become the handler's command; 78 if it cannot be run."""
    # Python and the governor ignore these; programs must not.
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(spec.command[0], spec.command)
    except OSError as error:
        print_error(f"cannot run {spec.command[0]}: {error.strerror}")
        os._exit(EXIT_CONFIG)


# A shell needs a tenth of the memory that another Python would. It reads lines with a group and
# the seconds that it has to end by itself, 0 for programs; without seconds the group has ended.
WARDEN: Final = """\
while read -r pid grace; do
  kept=
  for entry in $groups; do [ "${entry%:*}" = "$pid" ] || kept="$kept $entry"; done
  groups="$kept${grace:+ $pid:$grace}"
done
for entry in $groups; do [ "${entry#*:}" = 0 ] && kill -s KILL -- "-${entry%:*}"; done
sleep "$1"
for entry in $groups; do [ "${entry#*:}" = 0 ] || kill -s KILL -- "-${entry%:*}"; done
"""


def serve_warden(read_fd: int) -> NoReturn:
    """Wait for the governor's end, then kill what it left running.

    When nobody can write to the pipe any more, the governor is dead. This reaches what a lifeline
    cannot: programs, what they started, and handlers that hang. Raises OSError.
    """
    os.dup2(read_fd, 0)
    for number in (1, 2):  # whoever reads the governor's output must see its end
        replace_fd(number, os.open(os.devnull, os.O_RDWR))
    os.execv("/bin/sh", ["sh", "-c", WARDEN, "schedulezero-warden", f"{ORPHAN_GRACE_S:g}"])


def replace_fd(number: int, fd: int) -> None:
    """Make descriptor `number` what `fd` is, and close `fd`."""
    os.dup2(fd, number)
    os.close(fd)


def print_error(sentence: str) -> None:
    os.write(2, f"{sentence}\n".encode(errors="backslashreplace"))


def find_fixed(config: Config, loaded: Config) -> dict[str, str]:
    """Where a changed configuration is otherwise and only a restart applies it: field and key."""
    reloaded = RELOADED_KEYS
    if not (config.tls_cert and loaded.tls_cert):
        reloaded -= {"tls_cert", "tls_key"}
    tables = {each.name: each.metadata.get("table") for each in fields(Config)}
    return {
        name: f"{table}.{name.removeprefix(f'{table}_')}" if table else name
        for name, table in tables.items()
        if name not in reloaded and getattr(config, name) != getattr(loaded, name)
    }


class SignalPipe:
    """Signals as bytes in a pipe: the handler does nothing, the loop reads. Works everywhere."""

    NUMBERS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

    def __init__(self) -> None:
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        for number in self.NUMBERS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)

    def wait(self, timeout_s: float) -> set[int]:
        """The signals that came, as soon as there is one; none after `timeout_s`."""
        is_readable = select.select((self._read_fd,), (), (), max(0.0, timeout_s))[0]
        return set(os.read(self._read_fd, 4_096)) if is_readable else set()

    def close(self) -> None:
        """Give the signals their default meaning again; in a child, before it is anything else."""
        signal.set_wakeup_fd(-1)
        for number in self.NUMBERS:
            signal.signal(number, signal.SIG_DFL)
        os.close(self._read_fd)
        os.close(self._write_fd)


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to the group that `pid` leads, if there still is one."""
    with suppress(ProcessLookupError, PermissionError):  # macOS: only zombies are left
        os.killpg(pid, number)


@dataclass(slots=True)
class Child:
    """A process the governor keeps running. Without a `spec` it is the server."""

    name: str
    spec: HandlerSpec | None
    status: ChildStatus = field(default_factory=ChildStatus)
    pid: int | None = None
    started_us: int = 0  # wall clock
    since_us: int = 0  # wall clock of the last change of state
    kill_s: float | None = None  # monotonic; when a child told to stop is killed
    must_reload: bool = False  # the server is to be told, once it is up
    errors_bytes: int = 0  # the length of its error log when it was started
    tails: tuple[Tail, ...] = ()  # its logs, followed in the foreground

    @property
    def grace_s(self) -> float:
        """Seconds it has to end by itself when the governor is gone; a program knows nothing."""
        return 0.0 if self.spec and self.spec.command else ORPHAN_GRACE_S


class Governor:
    """Keeps the server and the configured handlers running. No threads, no event loop, no
    sockets: it forks, and a fork is only safe from such a process.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        lock_fd: int,
        load: Callable[[], Config],
        *,
        echo: Callable[[str, str], None] | None = None,
    ) -> None:
        """`load` reads the configuration again; `echo`, in the foreground, takes a handler's
        name and a line it wrote.
        """
        self._config = config
        self._clock = clock
        self._lock_fd = lock_fd
        self._load = load
        self._echo = echo
        self._children = {SERVER_NAME: Child(SERVER_NAME, None)}
        self._pid = os.getpid()
        self._started_us = clock.now_us()
        self._stop_s: float | None = None  # when all must have ended; None: not stopping
        self._exit_code = EXIT_OK
        self._reloads = 0
        self._reload_error: str | None = None
        self._after_restart: list[str] = []  # keys that a reload has not applied
        self._written: dict[str, Any] = {}
        self._received: set[int] = set()
        self._tick_s = self._prune_s = 0.0
        # Nothing is ever written here. Its end, which the kernel brings about however this
        # process dies, tells the children.
        self._lifeline_fd, self._lifeline_write_fd = os.pipe()
        os.set_inheritable(self._lifeline_fd, True)
        self._warden_pid: int | None = None
        self._warden_fd = os.open(os.devnull, os.O_WRONLY)
        self._signals = SignalPipe()
        self._apply_handlers()

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT, or until the server refuses its configuration."""
        deployment, names = self._config.deployment, ", ".join(self._children)
        log_governor.info("governor %s of %r starts with %s", VERSION, deployment, names)
        gc.collect()  # first, so that what is imported now fills the room
        preload(self._config)
        gc.freeze()  # a later collection in a child would copy the pages it shares with us
        while not self._is_over():
            for part in (self._turn, self._heed):
                try:
                    part()
                except Exception:
                    # Ending would take the server and all handlers down; the next turn starts
                    # from what is, not from what failed.
                    log_governor.exception("the governor's turn failed; it goes on")
                    time.sleep(1.0)
        self._write_status()
        log_governor.info("governor ends with exit code %d", self._exit_code)
        return self._exit_code

    def _keep_place(self) -> None:
        """Take the data directory anew if it was deleted, moved or replaced: no command would find
        this process any more.
        """
        held = os.fstat(self._lock_fd)
        if file_number(lock_path(self._config.data_dir)) == (held.st_dev, held.st_ino):
            return
        with suppress(AlreadyRunning, OSError):  # once more at the next look
            lock_fd = open_lock(self._config.data_dir, self._clock)
            os.close(self._lock_fd)
            self._lock_fd, self._written = lock_fd, {}
            log_governor.warning("%s was replaced, and is taken anew", self._config.data_dir)

    def _is_over(self) -> bool:
        return self._stop_s is not None and not any(c.pid for c in self._children.values())

    def _turn(self) -> None:
        now_s = self._clock.monotonic()
        if now_s >= self._tick_s:
            self._tick_s = now_s + LOG_TICK_S
            self._trim_logs()
            if now_s >= self._prune_s:
                self._prune_s = now_s + LOG_PRUNE_S
                self._prune_logs()
            self._keep_place()
            if self._warden_pid is None:
                self._start_warden()
        for child in list(self._children.values()):
            self._advance(child, now_s)
        self._write_status()
        self._received |= self._signals.wait(self._next_deadline_s() - self._clock.monotonic())

    def _heed(self) -> None:
        """Answer what has happened meanwhile, however the turn went."""
        self._received |= self._signals.wait(0.0)
        self._reap()
        self._answer_signals()
        self._echo_logs()

    def _answer_signals(self) -> None:
        received, self._received = self._received, set()
        if signal.SIGHUP in received:
            self._reload()
        if received & {signal.SIGTERM, signal.SIGINT}:
            self._begin_stop(EXIT_OK, is_impatient=signal.SIGINT in received)

    def _next_deadline_s(self) -> float:
        times = [self._tick_s]
        if self._echo:
            times.append(self._clock.monotonic() + ECHO_S)
        for child in self._children.values():
            status = child.status
            if status.start_s is not None and self._stop_s is None:
                times.append(status.start_s)
            if status.state is ChildState.STARTING:
                times.append(status.spawned_s + START_S)
            if child.kill_s is not None:
                times.append(child.kill_s)
        return min(times)

    # One child.

    def _advance(self, child: Child, now_s: float) -> None:
        status = child.status
        if child.kill_s is not None and now_s >= child.kill_s:
            log_governor.warning("%s did not stop in time and is killed", child.name)
            child.kill_s = None
            if child.pid:
                signal_group(child.pid, signal.SIGKILL)
        if status.state is ChildState.STARTING and now_s >= status.spawned_s + START_S:
            self._change(child, ChildEvent.UP)
        if child.must_reload and child.status.state is ChildState.RUNNING and child.pid:
            child.must_reload = False
            os.kill(child.pid, signal.SIGHUP)
        if self._stop_s is not None:
            return
        if child.status.state is ChildState.STOPPED and child.status.start_s is None:
            if (spec := self._wanted().get(child.name)) is None:
                del self._children[child.name]
                return
            child.spec, child.status = spec, ChildStatus()
        if child.status.start_s is not None and now_s >= child.status.start_s:
            self._spawn(child)

    def _change(self, child: Child, event: ChildEvent, reason: str | None = None) -> None:
        before = child.status.state
        child.status = next_status(child.status, event, self._clock.monotonic(), reason)
        child.since_us = self._clock.now_us()
        if event is ChildEvent.SPAWN:
            child.started_us = child.since_us
        level = logging.WARNING if event in DYING and self._stop_s is None else logging.INFO
        log_governor.log(
            level, "%s %s -> %s%s%s", child.name, before, child.status.state,
            f", pid {child.pid}" if child.pid else "", f": {reason}" if reason else "",
        )  # fmt: skip

    def _spawn(self, child: Child) -> None:
        child.errors_bytes = size_of(self._logs(child)[-1])
        child.must_reload = False  # it starts with what is loaded now
        if self._echo and child.spec and not child.tails and not self._is_logless:
            child.tails = tuple(map(follow_log, self._logs(child)))
        try:
            child.pid = self._fork(lambda: self._live(child))
        except OSError as error:  # too many processes, no memory
            self._change(child, ChildEvent.SPAWN)
            self._change(child, ChildEvent.DEATH, f"cannot fork: {error.strerror}")
            return
        self._tell_warden(f"{child.pid} {child.grace_s:g}")
        self._change(child, ChildEvent.SPAWN)

    def _fork(self, live: Callable[[], int]) -> int:
        """Start a process, a group of its own, that does `live` and exits with what it returns."""
        # The child must not write to our pipe, nor miss a SIGTERM.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            if (pid := os.fork()) == 0:
                self._become(live)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with suppress(OSError):  # the child does the same, whoever is first
            os.setpgid(pid, pid)
        return pid

    def _start_warden(self) -> None:
        """Start the warden, at the beginning or after it died.

        What runs is in its pipe before it lives: the governor may be killed at any moment.
        """
        try:
            read_fd, write_fd = os.pipe()
            os.close(self._warden_fd)
            self._warden_fd = write_fd
            try:
                for child in self._children.values():
                    if child.pid:
                        self._tell_warden(f"{child.pid} {child.grace_s:g}")
                self._warden_pid = self._fork(lambda: serve_warden(read_fd))
            finally:
                os.close(read_fd)
        except OSError as error:  # no descriptors, processes or memory; the next tick tries again
            log_governor.error("cannot start the warden: %s", error.strerror)

    def _tell_warden(self, line: str) -> None:
        with suppress(BrokenPipeError):  # it died; the next one is told everything
            os.write(self._warden_fd, f"{line}\n".encode("ascii"))

    def _reap(self) -> None:
        """Collect the dead, also those that strangers left us if we are the first process."""
        by_pid = {child.pid: child for child in self._children.values() if child.pid}
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, wait_status = found
                if pid == self._warden_pid:
                    self._warden_pid = None
                elif pid in by_pid:
                    self._bury(by_pid[pid], os.waitstatus_to_exitcode(wait_status))

    def _bury(self, child: Child, exit_code: int) -> None:
        assert child.pid is not None
        signal_group(child.pid, signal.SIGKILL)  # what it started and left behind
        self._tell_warden(str(child.pid))
        up_s = self._clock.monotonic() - child.status.spawned_s
        reason = describe_exit(exit_code) + (self._last_error(child) if exit_code > 0 else "")
        child.pid = child.kill_s = None
        self._change(child, exit_event(exit_code, up_s), reason)
        if child.status.state is ChildState.FATAL and child.spec is None:
            # Without a server there is nothing to do, and a unit that failed says so.
            self._begin_stop(EXIT_CONFIG)
        elif self._stop_s is not None:
            self._stop_next()

    def _last_error(self, child: Child) -> str:
        """`: ` and the last line this child wrote to its error log, if it wrote one."""
        try:
            lines = read_tail(self._logs(child)[-1], 1, start=child.errors_bytes)
        except OSError:
            return ""
        return f": {lines[0].strip()[:300]}" if lines else ""

    # Inside the child, between fork and its own life.

    def _become(self, live: Callable[[], int]) -> NoReturn:
        code = EXIT_FAILED
        try:
            os.setpgid(0, 0)  # a group of its own: Ctrl-C reaches only the governor
            self._signals.close()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server can take it
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            for fd in (self._lock_fd, self._lifeline_write_fd, self._warden_fd):
                os.close(fd)
            code = live()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else EXIT_FAILED
        except ScheduleZeroError as error:
            code = EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
            log_governor.error("%s", error)
        except BaseException:
            log_governor.exception("a child failed")
        finally:
            with suppress(Exception):  # nothing may keep the child from ending here
                sys.stdout.flush()
                sys.stderr.flush()
                logging.shutdown()
            os._exit(code)

    def _live(self, child: Child) -> int:
        os.environ[LIFELINE_VARIABLE] = str(self._lifeline_fd)
        config = self._config
        try:
            if child.spec is None:
                configure_logging(config, SERVER_NAME, is_foreground=self._echo is not None)
            else:
                self._redirect_output(child)
        except OSError as error:
            sentence = f"{child.name} cannot write {error.filename}: {error.strerror}"
            raise ScheduleZeroError(sentence) from None
        if child.spec is None:
            return run_server(config, lifeline_fd=self._lifeline_fd)
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(HANDLER_OOM_SCORE))
        for name in NOTIFY_VARIABLES:  # the server's alone
            os.environ.pop(name, None)
        return serve_handler(child.spec, config)

    def _redirect_output(self, child: Child) -> None:
        """stdout to handler.log, stderr to errors.log; appended to, so that they can be emptied."""
        for number, path in enumerate(self._logs(child), start=1):
            if self._is_logless:  # it writes where the governor does
                break
            os.makedirs(os.path.dirname(path), exist_ok=True)
            replace_fd(number, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
        replace_fd(0, os.open(os.devnull, os.O_RDONLY))
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        log_to_stderr(self._config)  # the governor's own log file is not the handler's

    @property
    def _is_logless(self) -> bool:
        """Whether no log files are written. In the background they always are."""
        return self._echo is not None and self._config.log_to == "stdout"

    def _logs(self, child: Child) -> tuple[str, ...]:
        """The last is the one for errors."""
        return log_paths_of(self._config, child.name)

    def _echo_logs(self) -> None:
        if self._echo:
            for child in self._children.values():
                for line in [line for tail in child.tails for line in tail.read_lines()]:
                    self._echo(child.name, line)

    def _trim_logs(self) -> None:
        most_bytes = log_file_bytes(self._config)
        for child in self._children.values():
            for path in self._logs(child) if child.spec else ():
                try:
                    trim_log(path, most_bytes)
                except OSError as error:
                    log_governor.warning("cannot rotate %s: %s", path, error.strerror)

    def _prune_logs(self) -> None:
        """Keep all logs together within their bound: those of former handlers count as well."""
        config = self._config
        kept = [path for paths in log_paths(config).values() for path in paths]
        for path in surplus_logs(walk_logs(config.log_dir), config.log_max_mb << 20, kept):
            log_governor.info("the logs take more than %d MB: %s goes", config.log_max_mb, path)
            with suppress(OSError):
                os.unlink(path)

    # Stopping: handlers first, because their last results need a server that takes them.

    def _begin_stop(self, exit_code: int, *, is_impatient: bool = False) -> None:
        now_s = self._clock.monotonic()
        if self._stop_s is None:
            log_governor.info("stopping: handlers, then the server, within %g s", DRAIN_S)
            self._stop_s = now_s + DRAIN_S
            self._exit_code = exit_code
            self._stop_next()
        elif is_impatient:  # a second Ctrl-C
            self._stop_s = now_s
            for child in self._children.values():
                child.kill_s = now_s if child.pid else None

    def _stop_next(self) -> None:
        """Tell the handlers to stop; when they have, the server."""
        assert self._stop_s is not None
        handlers = [child for child in self._children.values() if child.spec]
        for child in handlers:
            self._stop(child, self._stop_s - SERVER_DRAIN_S)
        if not any(child.pid for child in handlers):
            self._stop(self._children[SERVER_NAME], self._stop_s)

    def _stop(self, child: Child, kill_s: float) -> None:
        """SIGTERM now, SIGKILL to the whole group at `kill_s`. A repetition changes nothing."""
        if child.status.state in (ChildState.STOPPED, ChildState.STOPPING):
            return
        if child.status.state is ChildState.FATAL and self._stop_s is not None:
            return  # so the last status tells why the governor ended
        self._change(child, ChildEvent.STOP)
        if child.pid:
            child.kill_s = kill_s
            if child.spec and child.spec.command:
                # A shell forwards nothing, so what it started is told as well. A Python handler
                # passes the word on itself, as its running jobs may use processes.
                signal_group(child.pid, signal.SIGTERM)
            else:
                os.kill(child.pid, signal.SIGTERM)

    # Reloading.

    def _reload(self) -> None:
        """Apply a new configuration to the handlers; a wrong one is logged and changes nothing."""
        if self._stop_s is not None:
            return
        self._reloads += 1
        try:
            loaded = self._load()
            check_handlers(loaded)
        except ConfigError as error:
            self._reload_error = str(error)
            log_governor.error("not reloaded, the old configuration stays: %s", error)
            return
        fixed = find_fixed(self._config, loaded)
        self._after_restart = [*fixed.values()]
        if fixed:
            log_governor.warning("after a restart: %s", ", ".join(self._after_restart))
        self._reload_error = None
        set_log_level(loaded.log_level)
        self._config = replace(loaded, **{name: getattr(self._config, name) for name in fixed})
        self._apply_handlers()
        self._children[SERVER_NAME].must_reload = True
        log_governor.info("reloaded")

    def _wanted(self) -> dict[str, HandlerSpec]:
        """The handlers that the configuration has started here."""
        return {spec.handler_id: spec for spec in self._config.handlers if spec.autostart}

    def _apply_handlers(self) -> None:
        """Stop the handlers that are not as wanted, and note the new; `_advance` starts them."""
        wanted = self._wanted()
        for child in [child for child in self._children.values() if child.spec]:
            if child.status.state is ChildState.FATAL or child.spec != wanted.get(child.name):
                self._stop(child, self._clock.monotonic() + DRAIN_S)
        for name, spec in wanted.items():
            self._children.setdefault(name, Child(name, spec))

    # Telling.

    def _write_status(self) -> None:
        """Write status.json if anything changed; readers see the old one or the new one."""
        shown = self._describe()
        if shown == self._written:
            return
        path, text = status_path(self._config.data_dir), json.dumps(shown)
        try:
            try:
                with open(path + ".new", "w") as file:
                    file.write(text)
                os.replace(path + ".new", path)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                with open(path, "r+") as file:  # on a full disk, in the room it has
                    file.write(text.ljust(size_of(path)))
            self._written = shown
        except OSError as error:
            log_governor.warning("cannot write %s: %s", path, error.strerror)

    def _describe(self) -> dict[str, Any]:
        return {
            "pid": self._pid,
            "deployment": self._config.deployment,
            "version": VERSION,
            "config": self._config.path,
            "url": http_url(self._config),
            "started_at": iso_of(self._started_us),
            "is_stopping": self._stop_s is not None,
            "reloads": self._reloads,
            "reload_error": self._reload_error,
            "after_restart": self._after_restart,
            "log_dir": self._config.log_dir,
            "children": [
                {
                    "name": child.name,
                    "state": child.status.state,
                    "pid": child.pid,
                    "since": iso_of(child.since_us) if child.since_us else None,
                    "started_at": iso_of(child.started_us) if child.pid else None,
                    "restarts": child.status.restarts,
                    "reason": child.status.reason,
                }
                for child in self._children.values()
            ],
        }


def http_url(config: Config) -> str:
    """Where a browser on this machine finds the server."""
    scheme = "https" if config.tls_cert else "http"
    return connect_endpoint(config.http_host, config.http_port).replace("tcp", scheme, 1)


# --- systemd ----------------------------------------------------------------------------------
#
# Units for this installation as it is. Pure, but for the paths of this program and its Python.

UNIT_DIRECTORY: Final = "/etc/systemd/system"
# For mallopt(3). A threshold that is set stays: else the first large message raises it, and the
# next ones come to lie where what is freed of them is never given back to the kernel.
ALLOCATOR: Final = MappingProxyType(
    {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
)
UNIT_STOP_S: Final = round(DRAIN_S + 5)
UNIT_WATCHDOG_S: Final = round(BACKOFF_S[1] + 30)  # a server may wait to be started again
MEMORY_MAX_MB: Final = 512  # of all processes of a unit, unless memory_limit asks for more
HOMES: Final = ("/home/", "/root/", "/run/user/")
MADE_BY_SYSTEMD: Final = (("StateDirectory", "/var/lib/"), ("LogsDirectory", "/var/log/"))
INSTALL: Final = ("", "[Install]", "WantedBy=multi-user.target")

# For every unit, also of handlers that run whatever a user has written.
LAX_SETTINGS: Final = """\
NoNewPrivileges=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native"""
STRICT_SETTINGS: Final = """\
ProtectSystem=strict
PrivateDevices=yes
PrivateMounts=yes
PrivateUsers=yes
ProtectHostname=yes
ProtectProc=invisible
ProcSubset=pid
RemoveIPC=yes
KeyringMode=private
MemoryDenyWriteExecute=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
CapabilityBoundingSet=
AmbientCapabilities=
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM"""

# A port below 1024 takes a capability, and it must not be one of a user namespace's own.
LOW_PORT_SETTINGS: Final = (
    STRICT_SETTINGS.replace("PrivateUsers=yes\n", "")
    .replace("Capabilities=", "Capabilities=CAP_NET_BIND_SERVICE")
    .replace("BoundingSet=", "BoundingSet=CAP_NET_BIND_SERVICE")
)


def unit_name(config: Config) -> str:
    return f"schedulezero-{config.deployment}.service"


def find_archive() -> str | None:
    """The schedulezero.pyz that this process was started with; None without one."""
    path = getattr(getattr(sys.modules["__main__"], "__loader__", None), "archive", None)
    return os.path.abspath(path) if path else None


def program_words() -> list[str]:
    """The command that starts this program, in its own directory or as an archive anywhere."""
    archive = find_archive()
    return [sys.executable, archive] if archive else [sys.executable, "-m", "schedulezero"]


def render_unit(config: Config, environ: Mapping[str, str]) -> str:
    """The unit of governor, server and handlers: what they need is allowed and nothing else."""
    name = unit_name(config)
    data, logs = os.path.dirname(config.data_dir), os.path.dirname(config.log_dir)
    made = tuple(root for _, root in MADE_BY_SYSTEMD)
    others = [path for path in (data, logs) if not path.startswith(made)]
    shown = " ".join(map(repr, others))  # as a shell takes it, and in one line
    is_local = is_this_machine(config.http_host) and is_this_machine(config.zmq_host)
    is_closed = is_local and not any(spec.autostart for spec in config.handlers)
    lines = [
        f"# Save as {UNIT_DIRECTORY}/{name}, and then:",
        "#   useradd --system --shell /usr/sbin/nologin schedulezero",
        *([f"#   mkdir -p {shown} && chown -R schedulezero: {shown}"] if others else []),
        *(f"#   chmod o+x {path!r}" for path in closed_directories(_needed_places(config), others)),
        f"#   systemctl daemon-reload && systemctl enable --now {name}",
        "# Handlers that need more than this allows: `autostart: false`, and `systemd --handlers`.",
        "[Unit]",
        f"Description=ScheduleZero ({config.deployment})",
        # A Pi starts with the clock of its last run.
        "Wants=network-online.target time-sync.target",
        "After=network-online.target time-sync.target",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=all",
        "TimeoutStartSec=10min",
        f"WatchdogSec={UNIT_WATCHDOG_S}",
        *_service_lines(config, environ, ["run"]),
        "ExecReload=kill -HUP $MAINPID",
        "RestartPreventExitStatus=2 75 78",
        *_directory_lines(data),
        *_directory_lines(logs),
        "UMask=0077",
        f"ProtectHome={'read-only' if _is_in_home(config) else 'yes'}",
        LAX_SETTINGS,
        STRICT_SETTINGS if min(config.http_port, config.zmq_port) >= 1024 else LOW_PORT_SETTINGS,
        *(["IPAddressDeny=any", "IPAddressAllow=localhost"] if is_closed else []),
        *INSTALL,
    ]
    return "\n".join(lines)


def render_handler_unit(config: Config, environ: Mapping[str, str]) -> str:
    """A template for units of single handlers, which may do what their user may."""
    name = f"schedulezero-{config.deployment}-handler@"
    lines = [
        f"# Save as {UNIT_DIRECTORY}/{name}.service, and for each handler ID that",
        f"# has `autostart: false` in the configuration: systemctl enable --now {name}ID",
        "[Unit]",
        f"Description=ScheduleZero ({config.deployment}) handler %i",
        "Wants=network-online.target",
        f"After=network-online.target {unit_name(config)}",
        "",
        "[Service]",
        "Type=exec",
        *_service_lines(config, environ, ["handler", "%i"]),
        "RestartPreventExitStatus=2 78",
        "UMask=0027",
        LAX_SETTINGS,
        *INSTALL,
    ]
    return "\n".join(lines)


def _service_lines(
    config: Config, environ: Mapping[str, str], command: Iterable[str]
) -> Iterator[str]:
    home = os.path.dirname(find_archive() or os.path.abspath(__file__))
    words = [*program_words(), "--deployment", config.deployment]
    words += ["--config", config.path] if config.path else []
    variables = {name: environ[name] for name in _variables() if environ.get(name)}
    variables["SCHEDULEZERO_DATA_DIR"] = os.path.dirname(config.data_dir)
    variables["SCHEDULEZERO_LOG_DIR"] = os.path.dirname(config.log_dir)
    variables |= ALLOCATOR
    yield "User=schedulezero"
    yield f"WorkingDirectory={home.replace('%', '%%')}"  # quotes would be part of it
    yield f"ExecStart={' '.join([*map(quote_unit, words), *command])}"
    for name, value in sorted(variables.items()):
        yield f"Environment={quote_setting(f'{name}={value}')}"
    yield from ("Restart=on-failure", "RestartSec=2", "KillMode=mixed")
    yield f"TimeoutStopSec={UNIT_STOP_S}"
    if find_archive():
        yield from ("CacheDirectory=schedulezero", "CacheDirectoryMode=0700")  # to unpack to
    yield f"MemoryMax={max(MEMORY_MAX_MB, 2 * (config.memory_limit or 0))}M"


def _directory_lines(directory: str) -> list[str]:
    """Where systemd makes directories it makes this one; elsewhere it is there already."""
    for setting, root in MADE_BY_SYSTEMD:
        if directory.startswith(root):
            name = quote_setting(directory.removeprefix(root))
            return [f"{setting}={name}", f"{setting}Mode=0700"]
    return [f"ReadWritePaths={quote_setting(directory)}"]


def _needed_places(config: Config) -> list[str]:
    places = [find_archive() or __file__, sys.prefix, sys.base_prefix, config.directory]
    places += [config.data_dir, config.log_dir, config.tls_cert or "", config.tls_key or ""]
    places += [spec.cwd or "" for spec in config.handlers]
    return [os.path.abspath(place) for place in places if place]


def _is_in_home(config: Config) -> bool:
    """Whether something that is needed stands where users have their own."""
    return any(place.startswith(HOMES) for place in _needed_places(config))


def closed_directories(places: Iterable[str], given: Iterable[str]) -> list[str]:
    """The directories above these that let in their owner alone, as homes of Debian 12 do; those
    in `given` get the unit's user for an owner.
    """
    above: set[str] = set()
    for place in places:
        while place != (place := os.path.dirname(place)):
            above.add(place)
    above.difference_update(given)
    return sorted(path for path in above if os.path.isdir(path) and not os.stat(path).st_mode & 1)


def quote_unit(text: str) -> str:
    """A word of a unit's command: `%` and `$` are its own, and blanks separate."""
    return quote_setting(text).replace("$", "$$")


def quote_setting(text: str) -> str:
    """A word of a unit's other settings, which take `$` as it is."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if any(char in text for char in " \t'\"\\;") else text


# --- Doctor -----------------------------------------------------------------------------------
#
# Each check is a pure function of what was looked up for it; `diagnose` does the looking up.

PYTHONS: Final = ((3, 11), (3, 13))  # the first and the last that are tested
REQUIREMENTS: Final = (("apscheduler", "==4.0.0a6"), ("pyzmq", ">=24,<28"), ("pyyaml", ">=6,<7"))
LITTLE_ROOM_BYTES: Final = 512 << 20
NO_ROOM_BYTES: Final = 32 << 20
FLUSHES: Final = 5
FLUSHES_LIMIT_S: Final = 15.0  # for all of them
SLOW_FLUSH_S: Final = 0.1  # a good card takes 5 ms
FLUSH_FIX: Final = "another card, or set data_dir to another disk; dmesg may tell of errors"
LONG_WAL_BYTES: Final = 64 << 20  # checkpoints keep it far below, unless a reader never ends
CHECK_DATABASE_S: Final = 60.0
LATE_BACKUPS: Final = 2.5  # in intervals between two
FIRST_CREDIBLE_US: Final = 1_735_689_600_000_000  # 2025: this program was not there before
CLOCK_UNSYNCHRONISED: Final = 5  # TIME_ERROR in adjtimex(2)
TIMEX_BYTES: Final = 256  # more than struct timex has on any platform
PRIVATE_FILES: Final = (TOKENS_FILE, SESSIONS_FILE, ADMIN_TOKEN_FILE, KEYS_FILE, SECRETS_FILE)


class Verdict(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"  # it runs, but not as well or as safely as it could
    FAILED = "failed"  # it does not run, or will not for long


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What one check found, and what helps."""

    verdict: Verdict
    check: str
    sentence: str
    fix: str | None = None  # if there is anything to be done


passes, warns, fails = (partial(Diagnosis, verdict) for verdict in Verdict)


def render_diagnosis(found: Diagnosis) -> list[str]:
    mark = found.verdict if found.fix is None else found.verdict.upper()
    lines = [f"{mark:8} {found.check:14} {found.sentence}"]
    return lines if found.fix is None else [*lines, f"{'':8} {'':14} fix: {found.fix}"]


# The program.


def check_python(version: tuple[int, int]) -> Diagnosis:
    first, last = PYTHONS
    shown = ".".join(map(str, version))
    if version < first:
        return fails("python", f"{shown} is too old", "install Python 3.11 or newer")
    if version > last:
        return warns("python", f"{shown} is newer than any tested", "use Python 3.13 if it fails")
    return passes("python", shown)


def check_requirement(name: str, rule: str, version: str | None) -> Diagnosis:
    """`rule`: one version, or majors `>=from,<below`."""
    fix = f"python -m pip install '{name}{rule}'"
    if version is None:  # it was imported, or this would not run
        return warns(name, "does not tell its version", fix)
    first, *below = map(int, re.findall(r"[0-9]+", rule)[:2])
    is_within = ">" in rule and first <= int(version.partition(".")[0]) < below[0]
    if is_within or rule == f"=={version}":
        return passes(name, version)
    return fails(name, f"{version} is not {rule}", fix)


def check_bytecode(path: str, is_current: bool, is_writable: bool) -> Diagnosis:
    """`path`: where Python keeps what it has compiled of this program."""
    if is_current:
        return passes("bytecode", path)
    if is_writable:
        return passes("bytecode", "made by the first start")
    sentence = f"{path} is missing or old, and not made: each start compiles, in seconds and 30 MB"
    return warns("bytecode", sentence, "python -m compileall schedulezero.py, as its owner")


# The machine.


def check_clock(is_synchronised: bool | None, now_us: int) -> Diagnosis:
    fix = "timedatectl set-ntp true, or install chrony"
    if now_us < FIRST_CREDIBLE_US:
        return fails("clock", f"it is not {iso_of(now_us)}", fix)
    if is_synchronised is None:
        return warns("clock", "the kernel does not tell whether it is synchronised", fix)
    if not is_synchronised:
        return warns("clock", "not synchronised: schedules fire when it says so", fix)
    return passes("clock", "synchronised")


def check_zones(count: int, timezone: str, is_there: bool) -> Diagnosis:
    fix = "apt install tzdata, or python -m pip install tzdata"
    if not count:
        return fails("time zones", "there is no time zone database", fix)
    if not is_there:
        return fails("time zones", f"{timezone} is not among the {count} of this machine", fix)
    return passes("time zones", f"{count}, schedules in {timezone}")


def check_room(path: str, free_bytes: int, free_inodes: int | None) -> Diagnosis:
    shown = f"{free_bytes >> 20} MB free on {path}"
    fix = "delete something, or set data_dir to a larger disk"
    if free_inodes == 0:
        return fails("disk", f"no inode is free on {path}", fix)
    if free_bytes < NO_ROOM_BYTES:
        return fails("disk", shown, fix)
    if free_bytes < LITTLE_ROOM_BYTES:
        return warns("disk", shown, fix)
    return passes("disk", shown)


def check_flush(path: str, took_s: float | None) -> Diagnosis:
    """`took_s`: the longest of some flushes; None if they did not end."""
    if took_s is None:
        shown = f"{path} takes no {FLUSHES} times 4 KiB within {FLUSHES_LIMIT_S:g} s"
        return fails("flush", shown, FLUSH_FIX)
    shown = f"4 KiB are on the disk after {took_s * 1e3:.0f} ms"
    if took_s > SLOW_FLUSH_S:
        return warns("flush", f"{shown}; each change waits for that", FLUSH_FIX)
    return passes("flush", shown)


# The installation.


def check_directory(
    name: str, path: str, nearest: str, user: str, closed: tuple[str, str] | None
) -> Diagnosis:
    """`nearest`: the path itself, or of the directories above it the first that is there;
    `closed`: what `user` cannot write to, and whose it is.
    """
    if closed:
        sentence = f"{user} cannot write to {closed[0]}, which is {closed[1]}'s"
        fix = f"run it as {closed[1]}, or make it yours: sudo chown -R {user} {nearest}"
        return fails(name, sentence, fix)
    return passes(name, path if path == nearest else f"{path}, made by the first start")


def check_secrecy(files: Iterable[tuple[str, int]]) -> Diagnosis:
    """`files`: path and mode of what is nobody else's business."""
    open_files = [path for path, mode in files if mode & 0o077]
    if open_files:
        sentence = f"others can read {', '.join(open_files)}"
        return fails("secrecy", sentence, f"chmod go= {' '.join(open_files)}")
    return passes("secrecy", "keys and tokens are readable by their owner alone")


def check_ports(
    config: Config, pid: int | None, health: tuple[int | None, str], trouble: str | None
) -> Diagnosis:
    """`health`: as ask_health; `trouble`: why a port could not be had."""
    url = http_url(config)
    if trouble:
        fix = "end what has it (ss -ltnp shows it), or set another"
        return fails("ports", trouble, fix)
    if pid is None:
        return passes("ports", f"{config.http_port} and {config.zmq_port} are free")
    status, ailments = health
    if status is None:
        fix = f"schedulezero.py --deployment {config.deployment} logs server"
        return fails("server", f"pid {pid} runs, but {url} does not answer", fix)
    if status != 200:
        return fails("server", f"not healthy: {ailments or status}", f"see {url}/api/health")
    return passes("server", f"pid {pid} answers on {url}")


def check_database(finding: Finding | str, wal_bytes: int) -> Diagnosis:
    """`finding`: a sentence where it could not be looked at."""
    if isinstance(finding, str):
        return fails("database", finding, "start the newer program, or correct data_dir")
    if finding.condition is Condition.DAMAGED:
        fix = "the next start restores the newest sound backup; or schedulezero.py restore FILE"
        return fails("database", finding.sentence, fix)
    if finding.condition is Condition.EMPTY:
        return passes("database", "made by the first start")
    if wal_bytes > LONG_WAL_BYTES:
        sentence = f"sound, but its log has {wal_bytes >> 20} MB"
        return warns("database", sentence, "end what reads it, or restart the server")
    if finding.condition is Condition.UNCHECKED:
        return passes("database", f"sound as far as was seen in {CHECK_DATABASE_S:g} s")
    return passes("database", "sound")


def check_backups(newest_us: int | None, every_h: float, now_us: int, has_data: bool) -> Diagnosis:
    fix = "see the server's log; meanwhile: schedulezero.py backup FILE"
    if not every_h:
        return warns("backups", "are switched off", "set backup: {every_hours: 24}")
    if newest_us is None:
        if not has_data:
            return passes("backups", "none yet")
        return warns("backups", "there is none", fix)
    age_h = (now_us - newest_us) / 3_600e6
    if age_h > LATE_BACKUPS * every_h:
        return warns("backups", f"the newest is {age_h:.0f} hours old", fix)
    return passes("backups", f"the newest is {max(0.0, age_h):.1f} hours old")


def check_leftovers(paths: Sequence[str]) -> Diagnosis:
    if paths:
        sentence = f"kept aside, or left unfinished: {', '.join(paths)}"
        fix = f"when nobody needs them: rm {' '.join(paths)}"
        return warns("leftovers", sentence, fix)
    return passes("leftovers", "none")


def check_unit(path: str, present: str | None, wanted: str) -> Diagnosis:
    """A unit's user, its comments and empty lines are the installer's own."""
    if present is None:
        return passes("unit", "not installed")
    before, after = (
        [line for line in text.splitlines() if line and not line.startswith(("#", "User="))]
        for text in (present, wanted)
    )
    changes = [f"-{line}" for line in before if line not in after]
    changes += [f"+{line}" for line in after if line not in before]
    if changes:
        sentence = f"{path} is not what this version would write: {'; '.join(changes[:4])}"
        return warns("unit", sentence, "compare with: schedulezero.py systemd")
    return passes("unit", path)


# Looking things up.


def diagnose(
    load: Callable[[], Config],
    environ: Mapping[str, str],
    clock: Clock,
    ask: Callable[[Config], tuple[int | None, str]],
) -> Iterator[Diagnosis]:
    """Everything that can be checked. `ask` gives a running server's health, as ask_health."""
    yield check_python((sys.version_info[0], sys.version_info[1]))
    for name, rule in REQUIREMENTS:
        yield check_requirement(name, rule, load_version(name))
    source = os.path.abspath(__file__)
    compiled = importlib.util.cache_from_source(source)
    is_writable = os.access(nearest_directory(os.path.dirname(compiled)), os.W_OK)
    is_kept = is_writable and not sys.dont_write_bytecode
    yield check_bytecode(compiled, is_compiled_from(compiled, source), is_kept)
    yield check_clock(is_clock_synchronised(), clock.now_us())
    try:
        config = load()
    except ConfigError as error:
        fix = "correct it; schedulezero.py check says when it is right"
        yield fails("configuration", str(error), fix)
        return
    yield passes("configuration", config.path or "the defaults")
    yield from look_at_installation(config, clock, ask)
    path = os.path.join(UNIT_DIRECTORY, unit_name(config))
    yield check_unit(path, load_text(path), render_unit(config, environ))


def look_at_installation(
    config: Config, clock: Clock, ask: Callable[[Config], tuple[int | None, str]]
) -> Iterator[Diagnosis]:
    zones = available_timezones()
    yield check_zones(len(zones), config.timezone, config.timezone in zones)
    directories = [
        look_at_directory("data directory", config.data_dir),
        look_at_directory("logs directory", config.log_dir),
    ]
    yield from directories
    if any(found.verdict is Verdict.FAILED for found in directories):
        return  # nor can be said what is in them
    room = os.statvfs(nearest_directory(config.data_dir))
    inodes = room.f_favail if room.f_files else None  # btrfs has no table of them
    yield check_room(config.data_dir, room.f_bavail * room.f_frsize, inodes)
    try:
        yield check_flush(config.data_dir, measure_flush_s(config.data_dir, clock))
    except OSError as error:
        if error.errno != errno.ENOSPC:  # a full disk has been told of
            yield fails("flush", f"{config.data_dir}: {error.strerror}", FLUSH_FIX)
    yield check_secrecy(load_modes(config))
    pid = find_governor(config.data_dir)
    trouble = None if pid else port_trouble(config, "http") or port_trouble(config, "zmq")
    yield check_ports(config, pid, ask(config) if pid else (None, ""), trouble)
    yield from look_at_database(config, clock.now_us())


def measure_flush_s(directory: str, clock: Clock) -> float | None:
    """The longest of some flushes to a nameless file there; None if they do not end. Raises
    OSError.
    """
    import tempfile

    took_s: list[float] = []
    failures: list[Exception] = []
    with tempfile.TemporaryFile(dir=nearest_directory(directory), buffering=0) as file:

        def flush() -> None:
            try:
                for _ in range(FLUSHES):
                    began_s = clock.monotonic()
                    file.write(bytes(4096))
                    os.fsync(file.fileno())
                    took_s.append(clock.monotonic() - began_s)
            except (OSError, ValueError) as error:  # it is closed when nobody waits any more
                failures.append(error)

        flusher = threading.Thread(target=flush, daemon=True)  # who may never come back
        flusher.start()
        flusher.join(FLUSHES_LIMIT_S)
        for failure in failures:
            raise failure
        return None if flusher.is_alive() else max(took_s)


def is_compiled_from(compiled: str, source: str) -> bool:
    """Whether Python would load the bytecode: its head tells time and size of its source."""
    about = os.stat(source)
    stamp = struct.pack("<II", int(about.st_mtime) & 0xFFFFFFFF, about.st_size & 0xFFFFFFFF)
    try:
        with open(compiled, "rb") as file:
            return file.read(16)[8:] == stamp
    except OSError:
        return False


def look_at_directory(name: str, path: str) -> Diagnosis:
    nearest = nearest_directory(path)
    below = os.path.join(nearest, path.removeprefix(nearest).strip("/").partition("/")[0])
    if nearest != path and os.path.lexists(below):
        return fails(name, f"{below} is no directory", "move it away, or set another directory")
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        fix = "mount -o remount,rw; dmesg may tell why it became so"
        return fails(name, f"{nearest} is on a file system that can only be read", fix)
    closed = find_closed(nearest, within=nearest == path)
    owner = user_name(os.stat(closed).st_uid) if closed else ""
    user = user_name(os.geteuid())
    return check_directory(name, path, nearest, user, (closed, owner) if closed else None)


def find_closed(directory: str, *, within: bool) -> str | None:
    """The directory, or with `within` the first file in it, that this process cannot write to."""
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        return directory
    paths = sorted(entry.path for entry in os.scandir(directory)) if within else []
    return next((path for path in paths if not os.access(path, os.W_OK)), None)


def user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # as in a container
        return str(uid)


def look_at_database(config: Config, now_us: int) -> Iterator[Diagnosis]:
    path = os.path.join(config.data_dir, DATABASE_FILE)
    try:
        finding: Finding | str = inspect_database(path, CHECK_DATABASE_S)
    except StoreUnavailable as error:
        finding = str(error)
    yield check_database(finding, size_of(path + "-wal"))
    if not os.path.isdir(config.data_dir):
        return
    newest_us = next(map(stamp_us, list_backups(config.data_dir)), None)
    yield check_backups(newest_us, config.backup_every_hours, now_us, os.path.exists(path))
    yield check_leftovers([*list_set_aside(config.data_dir), *list_unfinished(config.data_dir)])


def load_version(distribution: str) -> str | None:
    import importlib.metadata  # 2 MB that no other command needs

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_clock_synchronised() -> bool | None:
    """What the kernel knows of it, which whoever keeps the time tells it; None: it does not."""
    try:
        import ctypes

        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(TIMEX_BYTES))
    except (ImportError, OSError, AttributeError):  # not Linux
        return None
    return None if state < 0 else bool(state != CLOCK_UNSYNCHRONISED)


def nearest_directory(path: str) -> str:
    """The path, or of the directories above it the first that is there."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def load_modes(config: Config) -> list[tuple[str, int]]:
    """The files that hold secrets, with their modes."""
    paths = [os.path.join(config.data_dir, name) for name in PRIVATE_FILES]
    paths += [config.tls_key] if config.tls_key else []
    return [(path, stat.S_IMODE(os.stat(path).st_mode)) for path in paths if os.path.exists(path)]


def load_text(path: str) -> str | None:
    """A file's text; None if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def port_trouble(config: Config, kind: str) -> str | None:
    """Why the `http` or `zmq` port cannot be listened on, with the key to change."""
    host, port = getattr(config, f"{kind}_host"), getattr(config, f"{kind}_port")
    try:
        # As bytes: for a text Python imports the tables of IDNA, 0.2 MB.
        found = socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)
        family, type_, protocol, _, address = found[0]
        with socket.socket(family, type_, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        return f"{kind}_host {host} is no address of this machine"
    except OSError as error:
        return f"{kind}_port {port} on {host}: {error.strerror}"
    return None


# --- Command line -----------------------------------------------------------------------------

# For /api/health to answer. A flush of a bad card takes 40 s, now and then, a first start flushes
# 14 times, and the processor of a Pi Zero compiles for 10 s.
START_TIMEOUT_S: Final = 120.0
UNHEALTHY_S: Final = 5.0  # for a server that answers to become healthy
STOP_TIMEOUT_S: Final = DRAIN_S + 5.0
RELOAD_TIMEOUT_S: Final = 5.0
POLL_S: Final = 0.05
TAIL_LINES: Final = 20
MAX_IMPORT_BYTES: Final = 32 << 20
IMPORT_TOKEN_US: Final = 3_600_000_000  # should its end be missed
HEALTH_S: Final = 2.0  # for the answer to one look
ANSWER_S: Final = 30.0  # for that to one change
MAX_ANSWER_BYTES: Final = 8 << 20  # that to a change holds job_params twice
COMPILED_BYTES: Final = 40 << 20  # in use from the start: glibc keeps what the compiler took
EXPENDABLE: Final = 500  # in proc(5)'s oom_score_adj: as if half of all memory were in use here
DATA_DIR: Final = re.compile(r"""^[^#\n]*\bdata_dir["']?\s*:\s*["']?([^\n"',}#]+)""", re.MULTILINE)

Arguments = argparse.Namespace


class NotRunning(ScheduleZeroError):
    code = "not_running"


class Unavailable(ScheduleZeroError):
    """Something a command needs is not to be had: a port, an answer in time."""

    code = "unavailable"


EXIT_CODES: Final[Mapping[type[ScheduleZeroError], int]] = MappingProxyType(
    {
        ConfigError: EXIT_CONFIG,
        AlreadyRunning: EXIT_ALREADY_RUNNING,
        NotRunning: EXIT_NOT_RUNNING,
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Do one command; the exit code. Every expected failure is one line on stderr."""
    try:
        arguments = build_parser().parse_args(argv)
        if argv is None and arguments.command not in LASTING:
            offer_to_be_killed()
        if argv is None and (load_rss_bytes() or 0) > COMPILED_BYTES:
            release_memory()
        code: int = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as error:  # argparse: --help, --version, usage
        return error.code if isinstance(error.code, int) else EXIT_USAGE
    except ScheduleZeroError as error:
        print(f"schedulezero: {error}", file=sys.stderr)
        return EXIT_CODES.get(type(error), EXIT_FAILED)
    except BrokenPipeError:  # as in `logs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_OK
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"schedulezero: {where}{error.strerror or error}{mention_owner(error)}", file=sys.stderr
        )
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def mention_owner(error: OSError) -> str:
    """Half a sentence, if somebody else may do what was denied."""
    if not isinstance(error, PermissionError) or not error.filename:
        return ""
    owner = os.stat(nearest_directory(os.path.abspath(error.filename))).st_uid
    return "" if owner == os.geteuid() else f"; run it as {user_name(owner)}"


def offer_to_be_killed() -> None:
    """Where memory runs out, have the kernel end this command rather than a handler at work."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "r+") as file:
        if int(file.read()) < EXPENDABLE:
            file.write(str(EXPENDABLE))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="schedulezero",
        description="A job scheduler in one file: schedules, handlers, history, dashboard.",
        epilog="Exit codes: 0 ok, 1 failed, 2 usage, 3 not running, 4 something to change "
        "(import --dry-run), 75 already running, 78 configuration.",
    )
    add_common_options(parser, default=None)
    parser.add_argument("--version", action="version", version=f"ScheduleZero {VERSION}")
    parser.set_defaults(command=command_run, background=False)
    groups = {"": parser.add_subparsers(title="commands", metavar="COMMAND")}
    for words, run, text, *options in COMMANDS:
        group, _, name = words.rpartition(" ")
        description = f"{text[0].upper()}{text[1:]}."
        added = groups[group].add_parser(name, help=text.split(". ")[0], description=description)
        add_common_options(added, default=argparse.SUPPRESS)
        added.set_defaults(command=run)
        for names, settings in options:
            added.add_argument(*names, **settings)
        if run is None:
            groups[name] = added.add_subparsers(title="commands", metavar="COMMAND", required=True)
    return parser


def add_common_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    # Both before and after the command. There SUPPRESS keeps the value given here.
    parser.add_argument(
        "--config", metavar="FILE", default=default,
        help="the configuration (default: $SCHEDULEZERO_CONFIG_PATH, else config.yaml here)",
    )  # fmt: skip
    parser.add_argument(
        "--deployment", metavar="NAME", default=default,
        help="which one: default, clock, production, test or one of the configuration's own",
    )  # fmt: skip


def load_arguments(arguments: Arguments) -> Config:
    return load_config(arguments.config, os.environ, arguments.deployment)


def load_checked(arguments: Arguments) -> Config:
    """The configuration, with everything it names found to be there and sound."""
    config = load_arguments(arguments)
    check_access(config)
    choose_security(config)
    check_handlers(config)
    check_schedules(config)
    return config


def check_schedules(config: Config) -> None:
    """Raise ConfigError for a declared schedule with a wrong trigger."""
    for schedule_id, entry in config.schedules.items():
        try:
            # As of 1970: a date that has passed is no mistake of the file; it was good once,
            # and must not keep the server from starting.
            parse_trigger(entry["trigger_config"], timezone=config.timezone, now=EPOCH)
        except TriggerError as error:
            at = ("schedules", schedule_id, *error.path)
            raise error_in_config(config, at, str(error)) from None


# Running.


def command_run(arguments: Arguments) -> int:
    run_as_module(arguments)
    config = load_checked(arguments)
    is_foreground = not arguments.background
    lock_fd = take_place(config, "governor", is_foreground=is_foreground)
    if is_foreground and config.log_to == "file":
        names = ", ".join(["server", *(spec.handler_id for spec in config.handlers)])
        print_banner(config, f"{names}; logs in {config.log_dir}; Ctrl-C stops")
    make_first_token(config)
    echo = print_handler_line if is_foreground else None
    return Governor(config, Clock(), lock_fd, lambda: load_checked(arguments), echo=echo).run()


def command_server(arguments: Arguments) -> int:
    config = load_checked(arguments)
    take_place(config, SERVER_NAME, is_foreground=True)
    print_banner(config, "server alone")
    make_first_token(config)
    return run_server(config, lifeline_fd=None)


def take_place(config: Config, name: str, *, is_foreground: bool) -> int:
    """Take the data directory and begin the log; the lock's descriptor, for as long as it lives.

    Raises AlreadyRunning, Unavailable, OSError.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # who sees the lock may send it before it is read
    lock_fd = open_lock(config.data_dir, Clock())
    require_ports(config)
    configure_logging(config, name, is_foreground=is_foreground)
    return lock_fd


def print_banner(config: Config, what: str) -> None:
    print(f"ScheduleZero {VERSION} ({config.deployment}) on {http_url(config)}: {what}", flush=True)


def print_handler_line(name: str, line: str) -> None:
    if is_writable(1):  # the governor must not wait; the line is in the handler's log
        print(f"{name} | {line}", flush=True)


def command_handler(arguments: Arguments) -> int:
    config = load_checked(arguments)
    specs = {spec.handler_id: spec for spec in config.handlers}
    if arguments.name not in specs:
        hint = suggest(arguments.name, specs)
        raise NotFound(f"no handler {arguments.name!r} is configured{hint}")
    log_to_stderr(config)
    return serve_handler(specs[arguments.name], config)


def run_as_module(arguments: Arguments) -> None:
    """If this file runs by its path, start over with `-m`: then Python loads its cached bytecode
    instead of compiling it, which is faster and leaves 10 MB less behind.
    """
    if __name__ == "__main__" and __spec__ is None:
        command, environ = module_command(arguments)
        os.execve(command[0], command, environ)


def module_command(arguments: Arguments) -> tuple[list[str], Mapping[str, str]]:
    """How to `run` with these arguments, from the same working directory."""
    command = program_words()
    if arguments.config:
        command += ["--config", arguments.config]
    if arguments.deployment:
        command += ["--deployment", arguments.deployment]
    command += ["run", *(["--background"] if arguments.background else [])]
    ours = os.path.dirname(os.path.abspath(__file__))
    environ = {**ALLOCATOR, **os.environ}
    if find_archive() or (os.getcwd() == ours and not sys.flags.safe_path):
        return command, environ
    paths = [ours, *filter(None, [os.environ.get("PYTHONPATH")])]
    return command, {**environ, "PYTHONPATH": os.pathsep.join(paths)}


def require_ports(config: Config) -> None:
    """Raise Unavailable, with the key to change, if the server could not listen."""
    for kind in ("http", "zmq"):
        if trouble := port_trouble(config, kind):
            raise Unavailable(trouble + mention_other(config))


# In the background.


def command_start(arguments: Arguments) -> int:
    config = load_checked(arguments)
    if pid := find_governor(config.data_dir):
        raise AlreadyRunning(config.data_dir, pid)
    require_ports(config)
    make_first_token(config)
    arguments.background = True
    paths = [log_path(config, name) for name in ("governor", SERVER_NAME)]
    before = {path: size_of(path) for path in paths}
    command, environ = module_command(arguments)
    os.makedirs(os.path.dirname(paths[0]), exist_ok=True)
    with open(paths[0], "ab") as log_file:
        process = subprocess.Popen(
            command, env=environ, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file,
        )  # fmt: skip
    failure = wait_for_health(config, process)
    if failure is None:
        print(f"ScheduleZero ({config.deployment}) runs on {http_url(config)}, pid {process.pid}")
        if fetch_health(config) != 200:
            print(f"It is not healthy: see {http_url(config)}/api/health", file=sys.stderr)
        return EXIT_OK
    process.terminate()
    if not has_ended(process):
        failure += f", and pid {process.pid} did not stop within {STOP_TIMEOUT_S:g} s"
    print(f"schedulezero: not started: {failure}", file=sys.stderr)
    for path, size in before.items():
        for line in read_tail(path, TAIL_LINES, start=size):
            if " INFO " not in line[:32] and '"level": "INFO"' not in line[:64]:
                print(f"  {line}", file=sys.stderr)
    return process.returncode or EXIT_FAILED


def wait_for_health(config: Config, process: subprocess.Popen[bytes]) -> str | None:
    """None once /api/health says 200, or goes on to say 503; else why it does neither."""
    clock = Clock()
    patient_s, give_up_s = (clock.monotonic() + s for s in (UNHEALTHY_S, START_TIMEOUT_S))
    while clock.monotonic() < give_up_s:
        if process.poll() is not None:
            return f"the governor ended with {describe_exit(process.returncode)}"
        server = read_server(config, process.pid)
        if server.get("state") == ChildState.FATAL:
            has_ended(process)  # by itself, with the exit code that says why
        if server.get("state") in (ChildState.BACKOFF, ChildState.FATAL):
            return f"the server ended with {server['reason']}"
        status = fetch_health(config) if server.get("pid") else None
        if status == 200 or (status == 503 and clock.monotonic() >= patient_s):
            return None  # a full disk, say, is no reason to end what can serve reads
        time.sleep(POLL_S)
    return f"no answer from {http_url(config)}/api/health within {START_TIMEOUT_S:g} s"


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process that is to end does; one that waits for a broken disk does not."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    return process.returncode is not None


def wait_until(is_done: Callable[[], bool], limit_s: float, failure: str) -> None:
    """Raises Unavailable, with the sentence, if it takes longer."""
    clock = Clock()
    give_up_s = clock.monotonic() + limit_s
    while not is_done():
        if clock.monotonic() >= give_up_s:
            raise Unavailable(f"{failure} within {limit_s:g} s")
        time.sleep(POLL_S)


def fetch_health(config: Config) -> int | None:
    """The HTTP status of /api/health; None if there was no answer."""
    return ask_health(config)[0]


def ask_health(config: Config) -> tuple[int | None, str]:
    """The HTTP status of /api/health, None if there was no answer; and what is wrong, if that is
    told without a login.
    """
    try:
        status, health = ask_server(config, "GET", "/api/health", {})
    except Unavailable:
        return None, ""
    checks = health.get("checks", {}).values()
    return status, "; ".join(sentence for sentence in checks if sentence != "ok")


def mention_other(config: Config) -> str:
    """Half a sentence, if a server that does not hold this data directory answers in its place."""
    try:
        _, health = ask_server(config, "GET", "/api/health", {})
    except Unavailable:
        return ""
    if "checks" not in health:
        return ""
    return f"; a ScheduleZero with another data_dir answers on {http_url(config)}"


def ask_server(
    config: Config,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: Any = None,
    token: str | None = None,
) -> tuple[int, Mapping[str, Any]]:
    """Status and answer to a request. Raises Unavailable."""
    host = http_url(config).partition("://")[2].rpartition(":")[0]
    data = b"" if body is None else encode_json(body)
    sent = {"Host": host, "Connection": "close", **headers, "Content-Length": len(data)}
    sent |= {"Content-Type": JSON_TYPE} if data else {}
    sent |= {"Authorization": f"Bearer {token}"} if token else {}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items())]
    is_change = method != "GET"
    try:
        with connect_http(host.strip("[]"), config, is_known=is_change) as connection:
            connection.settimeout(ANSWER_S if is_change else HEALTH_S)
            connection.sendall("\r\n".join([*lines, "", ""]).encode("ascii") + data)
            head, _, answered = receive_all(connection).partition(b"\r\n\r\n")
        status, shown = int(head.split(None, 2)[1]), json.loads(answered)
        if not isinstance(shown, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, IndexError, RecursionError) as error:  # who knows who is there
        raise Unavailable(f"no answer from {http_url(config)}: {error}") from None
    return status, shown


def receive_all(connection: socket.socket) -> bytes:
    """What comes until the other end closes. Raises OSError if it does not within the timeout."""
    clock, answer = Clock(), bytearray()
    give_up_s = clock.monotonic() + (connection.gettimeout() or 0.0)
    while data := connection.recv(1 << 16):
        answer += data
        if len(answer) > MAX_ANSWER_BYTES or clock.monotonic() > give_up_s:
            raise OSError("it does not end")
    return bytes(answer)


def connect_http(host: str, config: Config, *, is_known: bool = False) -> socket.socket:
    """A connection to the server that runs, or is about to; `is_known`: to none but that with the
    configured certificate. Raises OSError.
    """
    connection = socket.create_connection((host, config.http_port), timeout=HEALTH_S)
    if not config.tls_cert:
        return connection
    import ssl

    # The certificate is for other names than this address.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    wrapped = context.wrap_socket(connection)
    if is_known and wrapped.getpeercert(binary_form=True) != load_leaf(config.tls_cert):
        wrapped.close()
        raise OSError(f"the certificate shown there is not that of {config.tls_cert}; `reload`?")
    return wrapped


def load_leaf(path: str) -> bytes:
    """The first certificate of a PEM file. Raises OSError."""
    import ssl

    with open(path, encoding="ascii", errors="replace") as file:
        first, end, _ = file.read(MAX_CONFIG_BYTES).partition("-----END CERTIFICATE-----")
    begin = first.find("-----BEGIN CERTIFICATE-----")
    return ssl.PEM_cert_to_DER_cert(first[max(0, begin) :] + end)


def load_running(arguments: Arguments) -> Config:
    """As load_arguments; but what runs can be looked at and ended while its file is wrong."""
    try:
        return load_arguments(arguments)
    except ConfigError as error:
        config = guess_running(arguments)
        if config is None:
            raise
        print(f"schedulezero: the configuration is wrong: {error}", file=sys.stderr)
        return config


def guess_running(arguments: Arguments) -> Config | None:
    """Directories and handlers of the deployment as it runs, if the data directory it has can be
    found in a configuration that cannot be read.
    """
    path = find_config(arguments.config, os.environ)
    directory = os.path.dirname(path) if path else os.getcwd()
    name = arguments.deployment or os.environ.get("SCHEDULEZERO_DEPLOYMENT") or "default"
    written = (path and load_text(path)) or ""
    own = os.environ.get("SCHEDULEZERO_DATA_DIR")
    # Only what is this installation's: another's must not be stopped in its place.
    for root in [own] if own else DATA_DIR.findall(written) or ["data"]:
        data_dir = os.path.join(directory, root.strip(), name)
        config = Config(name, data_dir=data_dir, path=path, directory=directory)
        if os.path.isdir(data_dir) and (pid := find_governor(data_dir)):
            shown = read_status(config, pid)
            handlers = tuple(HandlerSpec(child["name"]) for child in shown.get("children", [])[1:])
            log_dir = shown.get("log_dir") or os.path.join(directory, "logs", name)
            return replace(config, log_dir=log_dir, handlers=handlers)
    return None


def command_stop(arguments: Arguments) -> int:
    config = load_running(arguments)
    pid = find_running(config)
    signal_process(pid, signal.SIGTERM)
    wait_until(lambda: find_governor(config.data_dir) != pid,
               STOP_TIMEOUT_S, f"pid {pid} did not stop")  # fmt: skip
    print(f"ScheduleZero ({config.deployment}) stopped")
    return EXIT_OK


def find_running(config: Config) -> int:
    pid = find_governor(config.data_dir)
    if pid is None:
        raise NotRunning(f"not running: nobody holds {config.data_dir}{mention_other(config)}")
    return pid


def command_restart(arguments: Arguments) -> int:
    load_checked(arguments)  # a mistake in the file is found while the old one still runs
    with suppress(NotRunning):
        command_stop(arguments)
    return command_start(arguments)


def command_reload(arguments: Arguments) -> int:
    config = load_checked(arguments)
    pid = find_running(config)
    before = read_status(config, pid)
    if before.get("is_stopping"):
        raise Unavailable(f"not reloaded: pid {pid} is stopping")
    signal_process(pid, signal.SIGHUP)
    if not before:  # a server alone
        print(f"pid {pid} is told to reload; its log says whether it does")
        return EXIT_OK
    wait_until(lambda: read_status(config, pid).get("reloads") != before["reloads"],
               RELOAD_TIMEOUT_S, f"pid {pid} did not reload")  # fmt: skip
    shown = read_status(config, pid)
    if trouble := shown.get("reload_error"):
        raise ConfigError(f"not reloaded: {trouble}")
    left = ", ".join(shown.get("after_restart", ()))
    print(f"ScheduleZero ({config.deployment}) reloaded{left and f'; after a restart: {left}'}")
    return EXIT_OK


# Backups.


def command_backup(arguments: Arguments) -> int:
    config = load_arguments(arguments)
    path, target = find_database(config), os.path.abspath(arguments.file)
    if not os.path.isdir(os.path.dirname(target)):
        raise NotFound(f"there is no directory {os.path.dirname(target)}")
    if os.path.exists(target):
        raise Conflict(f"there is a file {target} already")
    copy_database(path, target)
    print(f"{target}: {size_of(target)} bytes, checked")
    return EXIT_OK


def command_restore(arguments: Arguments) -> int:
    """Leave the backup where the next start takes it from; if a server runs, have it start anew."""
    config = load_arguments(arguments)
    source = os.path.abspath(arguments.file)
    os.makedirs(config.data_dir, mode=0o700, exist_ok=True)
    path = os.path.join(config.data_dir, DATABASE_FILE)
    try:
        stage_restore(source, path)
    except StoreUnavailable as error:
        raise StoreUnavailable(f"{source} cannot be restored: {error}") from None
    pid = find_governor(config.data_dir)
    server = read_server(config, pid) if pid else {}
    if server.get("pid"):
        signal_process(server["pid"], signal.SIGTERM)
        wait_until(lambda: find_governor(config.data_dir) != pid or (
            not os.path.exists(path + STAGED) and fetch_health(config) == 200
        ), START_TIMEOUT_S, "the server did not start anew")  # fmt: skip
        if not os.path.exists(path + STAGED):
            print(f"{source} is restored; what was due since it was made may run again")
            return EXIT_OK
    print(f"{source} is restored by the next start{' of the server' if pid else ''}")
    return EXIT_OK


# Schedules in and out.


def command_export(arguments: Arguments) -> int:
    """Write what can be read; schedules whose rows are damaged are named, and it fails."""
    if arguments.api and arguments.declared:
        raise InvalidField("declared", "--declared and --api exclude each other")
    path = find_database(load_arguments(arguments))
    known = load_schedules(path)
    left_out = "config" if arguments.api else "api" if arguments.declared else None
    schedules = [s for s in known if s.origin != left_out]
    damaged = [s for s in schedules if s.is_damaged]
    text = render_schedules(s for s in schedules if not s.is_damaged)
    if arguments.file == "-":
        print(text, end="")
    else:
        replace_file(os.path.abspath(arguments.file), text)
    for schedule in damaged:
        print(f"{schedule.schedule_id} is left out: {schedule.quarantined}", file=sys.stderr)
    return EXIT_FAILED if damaged else EXIT_OK


class ScheduleDumper(yaml.SafeDumper):
    """YAML with the lines of a text as they are, and escapes for what cannot be seen."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        is_lines = data.replace("\n", "").isprintable()
        style = None if data.isprintable() else "|" if is_lines else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


ScheduleDumper.add_representer(str, ScheduleDumper.represent_str)


def render_schedules(schedules: Iterable[Schedule]) -> str:
    """A YAML file of declared schedules; the same text for equal schedules in the same order."""
    head = "# Written by `export`; `import` reads it, and so does `schedules:` of config.yaml.\n"
    # One at a time: the dumper keeps several kilobytes for each of those it is given together.
    entries = (dump_yaml({s.schedule_id: render_definition(s)}) for s in schedules)
    body = "".join(entry.removeprefix("schedules:\n") for entry in entries)
    return f"{head}schedules:\n{body}" if body else head + dump_yaml({})


def dump_yaml(entries: Mapping[str, Any]) -> str:
    return yaml.dump(
        {"schedules": entries}, Dumper=ScheduleDumper, sort_keys=False, allow_unicode=True,
        width=100, default_flow_style=None,
    )  # fmt: skip


def command_import(arguments: Arguments) -> int:
    config = load_arguments(arguments)
    name, text = read_import(arguments.file)
    crontab = find_crontab(arguments, name, text)
    entries, source = (crontab.entries, crontab.source) if crontab else parse_schedules(text, name)
    wanted = list(read_entries(entries, source, config))
    if arguments.prune and not wanted:
        raise Conflict(f"{arguments.file} names no schedule: nothing is deleted for that")
    has_data = os.path.exists(path := os.path.join(config.data_dir, DATABASE_FILE))
    is_owned = crontab.owns if crontab else lambda schedule: schedule.origin == "api"
    is_surplus = is_owned if arguments.prune else lambda schedule: False
    difference = find_difference(load_schedules(path) if has_data else [], wanted, is_surplus)
    for note in crontab.notes if crontab else ():
        print(note, file=sys.stderr)
    print("\n".join(render_difference(difference)), flush=True)
    if arguments.dry_run:
        heard_of = {spec.handler_id for spec in config.handlers}
        heard_of |= {*load_handler_ids(path)} if has_data else set()
        called = {new.handler_id for _, _, new in difference.steps if new}
        for handler_id in sorted(called - heard_of):
            print(f"there is no handler '{handler_id}' yet", file=sys.stderr)
        return EXIT_DIFFERENT if difference.steps else EXIT_OK
    if difference.steps:
        find_running(config)
        with temporary_token(config) as token:
            carry_out(difference, lambda method, schedule_id, headers, body: ask_server(
                config, method, f"/api/schedules/{quote(schedule_id)}", headers, body, token
            ))  # fmt: skip
    return EXIT_OK


def read_import(path: str) -> tuple[str, str]:
    """Name and text of a file, or of stdin. Raises ConfigError."""
    name = "stdin" if path == "-" else os.path.basename(path)
    with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
        return name, load_utf8(file, name, MAX_IMPORT_BYTES)


def find_crontab(arguments: Arguments, name: str, text: str) -> Crontab | None:
    """The file as a crontab, None if it is none. Raises ConfigError, ScheduleZeroError."""
    has_user = arguments.system or os.path.realpath(arguments.file).startswith(SYSTEM_CRONTABS)
    if not (arguments.crontab or has_user or looks_like_crontab(text)):
        return None
    if not arguments.handler:
        raise ScheduleZeroError(
            f"{name} is a crontab: name the Shell handler that is to run it, --handler ID"
        )
    crontab = Crontab(name, arguments.handler, has_user=has_user)
    crontab.read(text)
    return crontab


def read_entries(
    entries: Mapping[str, Any], source: ConfigSource, config: Config
) -> Iterator[Schedule]:
    """The schedules of a file. Raises ConfigError for the first mistake."""
    now_us = Clock().now_us()
    for schedule_id, entry in entries.items():
        try:
            yield parse_declared_schedule(schedule_id, entry, config, now_us)
        except InvalidField as error:
            raise source.refused(("schedules", schedule_id, *error.path), error) from None


Step = tuple[str, Schedule | None, Schedule | None]
"""An id with the schedule as it is and as it is to be; None where there is none."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What there is to do so that schedules are as wanted."""

    steps: Sequence[Step]  # first what is made, then what is changed, then what is removed
    equal: int


def find_difference(
    known: Iterable[Schedule], wanted: Iterable[Schedule], is_surplus: Callable[[Schedule], bool]
) -> Difference:
    """Of what is not wanted, what `is_surplus` is to be removed. Raises Conflict where the
    configuration file declares a schedule otherwise.
    """
    left = {schedule.schedule_id: schedule for schedule in known}
    steps: list[Step] = []
    equal = 0
    for schedule in wanted:
        before = left.pop(schedule.schedule_id, None)
        if before and has_definition(before, schedule):
            equal += 1
            continue
        if before:
            check_undeclared(before)
        steps.append((schedule.schedule_id, before, schedule))
    steps.sort(key=lambda step: step[1] is not None)
    steps += [(old.schedule_id, old, None) for old in left.values() if is_surplus(old)]
    return Difference(steps, equal)


def render_difference(difference: Difference) -> list[str]:
    """A line for each schedule that is made, changed or deleted, and how many are equal."""
    lines = [render_step(*step) for step in difference.steps]
    return [*lines, f"= {difference.equal} unchanged"]


def render_step(schedule_id: str, old: Schedule | None, new: Schedule | None) -> str:
    if new is None:
        return f"- {schedule_id}"
    if old is not None:
        return f"~ {schedule_id}  {describe_change(old, new)}"
    trigger = render_trigger_of(new)["description"]
    return f"+ {schedule_id}  {new.handler_id}.{new.method_name}, {trigger}"


def describe_change(old: Schedule, new: Schedule) -> str:
    """The fields that differ, old → new; for those as by default `default`."""
    before, after = (
        {name: canonical_json(value) for name, value in render_definition(schedule).items()}
        for schedule in (old, new)
    )
    changes = [
        f"{name}: {_shorten(before.get(name, 'default'))} → {_shorten(after.get(name, 'default'))}"
        for name in (field.name for field in EDIT_FIELDS)
        if before.get(name) != after.get(name)
    ]
    return "; ".join(changes) or f"it was quarantined: {old.quarantined}"


Ask = Callable[[str, str, Mapping[str, str], Any], tuple[int, Mapping[str, Any]]]


def carry_out(difference: Difference, ask: Ask) -> None:
    """Make it so, each change only if nobody else made one meanwhile.

    Raises ScheduleZeroError at the first that fails, saying what was done before.
    """
    done: list[str] = []
    warned: set[str] = set()
    for schedule_id, old, new in difference.steps:
        headers = {"If-Match": etag_of(old)[1]} if old else {"If-None-Match": "*"}
        body = new and render_definition(new)
        try:
            status, answer = ask("PUT" if new else "DELETE", schedule_id, headers, body)
        except Unavailable as error:
            status, answer = 0, {"error": error}
        if status not in (200, 201):
            raise ScheduleZeroError(
                f"{schedule_id} failed: {answer.get('error')}; done before it, of "
                f"{len(difference.steps)}: {', '.join(done) or 'nothing'}; import again "
                "for the rest"
            )
        done.append(schedule_id)
        for warning in {*answer.get("warnings", ())} - warned:
            print(f"{schedule_id}: {warning}", file=sys.stderr)
            warned.add(warning)


@contextmanager
def temporary_token(config: Config) -> Iterator[str | None]:
    """A token for the server of this data directory, as long as the context lasts; None where it
    asks for none. Who may write there could make a lasting one.
    """
    tokens = TokenFile(config.data_dir)
    if not requires_login(config, tokens.is_present):
        yield None
        return
    name, now_us = f"import-{os.getpid()}", Clock().now_us()
    token = tokens.create(name, Role.ADMIN, now_us + IMPORT_TOKEN_US, now_us)
    try:
        yield token
    finally:
        tokens.revoke(name)


# Crontabs.

CRONTAB_PREFIX: Final = "cron-"  # of the ids of schedules that come from one
SYSTEM_CRONTABS: Final = ("/etc/crontab", "/etc/cron.d/")
CRONTAB_FIRST: Final = re.compile(r"@[a-z]+\s|[\d*]\S*(\s+\S+){5}|[A-Za-z_]\w*\s*=")
CRONTAB_ENTRY: Final = re.compile(r"(@\w+|\S+(?:\s+\S+){4})\s+(\S.*)")
CRONTAB_VARIABLE: Final = re.compile(r"""("[^"]*"|'[^']*'|[^\s="']+)\s*=\s*(.*)""")
CRONTAB_HEADER: Final = re.compile(r"m(in\w*)?\s+h(our)?\b", re.IGNORECASE)  # `m h dom mon dow`
CRONTAB_ESCAPE: Final = re.compile(r"\\.|%")
MAIL_VARIABLES: Final = frozenset({"MAILTO", "MAILFROM", "CONTENT_TYPE"})
CRONS_OWN: Final = frozenset({"LOGNAME", "USER"})  # which it sets itself
CRONIE_TIMES: Final = frozenset({"RANDOM_DELAY", "START_HOURS_RANGE"})
CRON_GRACE_S: Final = 60.0
LIKE_CRON: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "timeout": MAX_RUN_S,
        "retry": {"max_attempts": 1},
        "overlap": str(Overlap.ALLOW),
        "misfire_grace_time": CRON_GRACE_S,
    }
)
"""Cron sets no limit, does not repeat what failed, does not wait for the last run, and does not
catch up."""


def looks_like_crontab(text: str) -> bool:
    """Judged by the first line that says anything."""
    lines = (line.strip() for line in text.split("\n"))
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return CRONTAB_FIRST.match(first) is not None


class Crontab:
    """A crontab's lines as declared schedules: `entries` by id, and `notes` on what was lost."""

    def __init__(self, name: str, handler_id: str, *, has_user: bool = False) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._lines: dict[KeyPath, int] = {}
        self.source = ConfigSource(name, self._lines)
        self._handler_id = handler_id
        self._has_user = has_user
        self._variables: dict[str, str] = {}
        self._zone: dict[str, str] = {}
        self._title: str | None = None  # the comment right above

    def read(self, text: str) -> None:
        """Raises ConfigError with the line of what cannot be a schedule."""
        for number, line in enumerate(text.split("\n"), start=1):
            line, place = line.strip(), f"{self.source.name} line {number}"
            if line.startswith("#"):
                self._title = title_of(line)
                continue
            try:
                if match := CRONTAB_VARIABLE.fullmatch(line):
                    self._set(unquoted(match[1]), unquoted(match[2]), place)
                elif line:
                    self._lines["schedules", self._add(line)] = number
            except ValueError as error:
                raise ConfigError(f"{place}: {error}") from None
            self._title = None
        if any({"env", "cwd"} & entry["job_params"].keys() for entry in self.entries.values()):
            self.notes.append(
                f"the handler {self._handler_id} needs allow_any: true, as variables are set"
            )

    def owns(self, schedule: Schedule) -> bool:
        """Whether it came from a crontab of the same handler."""
        is_ours = schedule.schedule_id.startswith(CRONTAB_PREFIX)
        return is_ours and schedule.handler_id == self._handler_id and schedule.origin == "api"

    def _set(self, name: str, value: str, place: str) -> None:
        if name in CRONIE_TIMES:
            raise ValueError(f"{name} is not known here; give max_jitter instead")
        if name in CRONS_OWN or (name in MAIL_VARIABLES and not value):
            return
        if name in MAIL_VARIABLES:
            self.notes.append(f"{place}: no mail is sent; output is kept with each execution")
        elif name == "CRON_TZ":
            if not is_timezone(value):
                raise ValueError(f"CRON_TZ is {value!r}, which is no time zone")
            self._zone = {"timezone": value}
        else:
            self._variables[name] = value

    def _add(self, line: str) -> str:
        """Take a line that says when and what; the id of its schedule. Raises ValueError."""
        match = CRONTAB_ENTRY.fullmatch(line)
        when, command = match.groups() if match else (" ".join(line.split()[:5]), "")
        user = ""
        if self._has_user:
            user, command = (*command.split(None, 1), "", "")[:2]
        compile_crontab(when)
        if not command:
            what = "a user and a command" if self._has_user else "a command"
            raise ValueError(f"after {when!r} there must be {what}")
        trigger_config = {"type": "cron", "expression": " ".join(when.split())}
        schedule_id = self._new_id(user, command)
        self.entries[schedule_id] = {
            "handler_id": self._handler_id,
            "method_name": "run",
            "job_params": self._params(command),
            "trigger_config": trigger_config | self._zone,
            **({"name": self._title} if self._title else {}),
            **LIKE_CRON,
        }
        note = f"what {user} ran is run by the user of the handler {self._handler_id}"
        if user and note not in self.notes:
            self.notes.append(note)
        return schedule_id

    def _new_id(self, user: str, command: str) -> str:
        """An id that only depends on the command, so that a changed time keeps it."""
        words = [word for word in command.split() if not re.fullmatch(r"\w+=\S*", word)]
        program = os.path.basename(words[0]) if words else ""
        slug = re.sub(r"[^A-Za-z0-9._]+", "-", program).strip("-.")[:40] or "job"
        digest = hashlib.sha256(f"{user}\n{command}".encode()).hexdigest()[:8]
        first = f"{CRONTAB_PREFIX}{slug}-{digest}"
        ids = (f"{first}-{number}" if number > 1 else first for number in itertools.count(1))
        return next(each for each in ids if each not in self.entries)

    def _params(self, text: str) -> dict[str, Any]:
        """The arguments of Shell.run."""
        variables = dict(self._variables)
        shell, command = variables.pop("SHELL", "/bin/sh"), command_of(text)
        is_plain = shell == "/bin/sh"  # what the handler uses for a command line
        params = {"command": command} if is_plain else {"argv": [shell, "-c", command]}
        more = {"cwd": variables.get("HOME"), "env": variables}
        return params | {name: value for name, value in more.items() if value}


def command_of(text: str) -> str:
    """A crontab's command as a command line: what follows a bare `%` is its input, each further
    one a line break in that; `\\%` is a percent sign.
    """
    import shlex  # for this command alone

    lines = CRONTAB_ESCAPE.sub(lambda found: {"%": "\n", "\\%": "%"}.get(found[0], found[0]), text)
    command, _, given = lines.partition("\n")
    if not given:
        return command.strip()
    given = given.removesuffix("\n") + "\n"
    return f"printf %s {shlex.quote(given)} | (\n{command.strip()}\n)"


def unquoted(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if is_quoted else text


def title_of(comment: str) -> str | None:
    """A comment as the name of the schedule below; None for headings and what was an entry."""
    title = " ".join(comment.strip("#=-* \t").split())
    if not re.search(r"[^\W\d_]", title) or not title.isprintable():
        return None
    if CRONTAB_HEADER.match(title) or CRONTAB_VARIABLE.fullmatch(title):
        return None
    if match := CRONTAB_ENTRY.fullmatch(comment.lstrip("# \t")):
        with suppress(ValueError):
            compile_crontab(match[1])
            return None
    return title[:MAX_TITLE_CHARS]


def find_database(config: Config) -> str:
    path = os.path.join(config.data_dir, DATABASE_FILE)
    if not os.path.exists(path):
        raise NotFound(f"there is no database {path}")
    return path


# Looking.


def command_status(arguments: Arguments) -> int:
    config = load_running(arguments)
    pid = find_governor(config.data_dir)
    now_us = Clock().now_us()
    shown = describe_processes(read_status(config, pid), pid, now_us, config) if pid else {}
    if arguments.json:
        print(json.dumps({"running": pid is not None, "deployment": config.deployment, **shown}))
    elif pid:
        print(f"ScheduleZero {shown['version']} ({config.deployment}) on {shown['url']}")
        print(render_processes(shown["processes"]))
        if shown["reload_error"]:
            print(f"The last reload failed: {shown['reload_error']}")
        if shown["after_restart"]:
            print(f"After a restart: {', '.join(shown['after_restart'])}")
    else:
        print(f"ScheduleZero ({config.deployment}) is not running{mention_other(config)}")
    return EXIT_OK if pid else EXIT_NOT_RUNNING


def read_status(config: Config, pid: int) -> dict[str, Any]:
    """What the governor with this pid last wrote; empty if it wrote nothing yet."""
    try:
        with open(status_path(config.data_dir)) as file:
            shown = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}
    return shown if shown.get("pid") == pid else {}


def read_server(config: Config, pid: int) -> Mapping[str, Any]:
    """What the governor with this pid last wrote of its server; empty if it wrote nothing yet."""
    return next(iter(read_status(config, pid).get("children", [])), {})


def describe_processes(
    shown: Mapping[str, Any], pid: int, now_us: int, config: Config
) -> dict[str, Any]:
    """What `status` tells: the governor's own words, with uptime and memory of each process."""
    first = {
        "name": "governor" if shown else SERVER_NAME,  # alone that has the lock, but no status
        "state": "STOPPING" if shown.get("is_stopping") else "RUNNING",
        "pid": pid, "started_at": shown.get("started_at"), "since": shown.get("started_at"),
        "restarts": 0, "reason": None,
    }  # fmt: skip
    processes = [first, *shown.get("children", [])]
    return {
        "version": shown.get("version", VERSION),
        "url": shown.get("url") or http_url(config),
        "reload_error": shown.get("reload_error"),
        "after_restart": shown.get("after_restart", []),
        "processes": [process | read_footprint(process, now_us) for process in processes],
    }


def read_footprint(process: Mapping[str, Any], now_us: int) -> dict[str, int | None]:
    """Uptime of a process and, while it lives, memory and bytes written as the kernel tells."""
    pid, started_at = process["pid"], process["started_at"]
    found: dict[str, int | None] = {"uptime_seconds": None}
    if started_at is not None:
        up_us = now_us - us_of(datetime.fromisoformat(started_at))
        found["uptime_seconds"] = max(0, up_us // 1_000_000)
    if pid is None:
        return found
    found["disk_written_bytes"] = load_written_bytes(pid)
    with suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        fields = dict(line.split(":", 1) for line in file.readlines()[1:])
        for name in ("Rss", "Pss"):
            found[f"{name.lower()}_bytes"] = int(fields[name].split()[0]) << 10
    return found


def render_processes(processes: Iterable[Mapping[str, Any]]) -> str:
    rows = [("NAME", "STATE", "PID", "UPTIME", "RESTARTS", "RSS", "PSS", "WRITTEN", "LAST END")]
    for process in processes:
        rows.append((
            process["name"], process["state"], str(process["pid"] or "-"),
            render_duration(process["uptime_seconds"]), str(process["restarts"]),
            render_size(process.get("rss_bytes")), render_size(process.get("pss_bytes")),
            render_size(process.get("disk_written_bytes")), process["reason"] or "-",
        ))  # fmt: skip
    return render_table(rows)


def render_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def print_list(
    arguments: Arguments, shown: Mapping[str, Any], head: Sequence[str], rows: Iterable[Any]
) -> int:
    """Print what is shown as JSON if that is asked for, else the rows as a table."""
    print(json.dumps(shown) if arguments.json else render_table([head, *rows]))
    return EXIT_OK


def render_duration(seconds: int | None) -> str:
    """The two largest units, such as `3d 4h`."""
    if seconds is None:
        return "-"
    minutes, hours = seconds // 60, seconds // 3_600
    parts = [(hours // 24, "d"), (hours % 24, "h"), (minutes % 60, "m"), (seconds % 60, "s")]
    first = next((i for i, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count}{unit}" for count, unit in parts[first : first + 2])


def render_size(size: int | None) -> str:
    return "-" if size is None else f"{size / (1 << 20):.1f} MiB"


# Logs.


def command_logs(arguments: Arguments) -> int:
    config = load_running(arguments)
    known = log_paths(config)
    if arguments.name and arguments.name not in known:
        hint = suggest(arguments.name, known)
        raise NotFound(f"no log named {arguments.name!r}{hint}; there are {', '.join(known)}")
    chosen = [known[arguments.name]] if arguments.name else known.values()
    paths = [path for group in chosen for path in group]
    shown = ""
    tails = []
    for path in paths:
        tails.append(follow_log(path))
        shown = print_lines(path, read_tail(path, arguments.lines), shown, len(paths))
    while arguments.follow:
        for tail in tails:
            shown = print_lines(tail.path, tail.read_lines(), shown, len(paths))
        sys.stdout.flush()
        time.sleep(0.2)
    return EXIT_OK


def print_lines(path: str, lines: Sequence[str], shown: str, files: int) -> str:
    """Print lines under their file's name, as tail does; the path that was shown last."""
    if not lines:
        return shown
    if files > 1 and path != shown:
        print(f"==> {path} <==")
    print("\n".join(lines))
    return path


# Describing.


def command_check(arguments: Arguments) -> int:
    config = load_checked(arguments)
    print(f"{config.path or 'the built-in configuration'}: good; {config.deployment} would run")
    print(f"  dashboard  {http_url(config)}")
    print(f"  handlers   {connect_endpoint(config.zmq_host, config.zmq_port)}")
    print(f"  data       {config.data_dir}")
    print(f"  logs       {config.log_dir}, level {config.log_level}")
    print(f"  time zone  {config.timezone}")
    for spec in config.handlers:
        by_itself = "" if spec.autostart else " (started by something else)"
        print(f"  handler    {spec.handler_id}: {spec.run or ' '.join(spec.command)}{by_itself}")
    for schedule_id, entry in config.schedules.items():
        trigger = parse_trigger(entry["trigger_config"], timezone=config.timezone, now=EPOCH)
        target = f"{entry['handler_id']}.{entry['method_name']}"
        print(f"  schedule   {schedule_id}: {target} {describe_trigger(trigger)}")
    return EXIT_OK


# Keys of handlers.


def command_key_create(arguments: Arguments) -> int:
    config = load_arguments(arguments)
    name = arguments.name
    if not is_identifier(name):
        raise InvalidField("name", f"the name must be {IDENTIFIER_RULE}")
    endpoint = arguments.endpoint or endpoint_for_others(config)
    if not is_tcp_address(endpoint):
        raise InvalidField("endpoint", "--endpoint must be tcp://host:port")
    keys = KeyFile(config)
    server, pair = keys.open_server(make_keypair), make_keypair()
    keys.change(lambda now: now.enrol(HandlerKey(name, pair.public, Clock().now_us())))
    print(encode_join(name, endpoint, server.public, pair.secret))
    print(f"It is shown only now. Start the handler with it: handler.py CLASS --join STRING, or "
          f"SCHEDULEZERO_JOIN. It connects to {endpoint}.", file=sys.stderr)  # fmt: skip
    if choose_security(config) == "null":
        print(f"The link is not encrypted on zmq_host {config.zmq_host}; set zmq_security: curve "
              "for the key to count.", file=sys.stderr)  # fmt: skip
    return EXIT_OK


def endpoint_for_others(config: Config) -> str:
    """Where handlers reach the server; a wildcard address is none that one can connect to."""
    host = config.zmq_host
    return connect_endpoint(local_address() if host in ("0.0.0.0", "::") else host, config.zmq_port)


def command_key_list(arguments: Arguments) -> int:
    keys = KeyFile(load_arguments(arguments)).load()
    shown = [
        {"name": key.handler_id, "origin": "local" if key.secret else "join",
         "created_at": render_second(key.created_us), "public": key.public}
        for key in keys.handlers
    ]  # fmt: skip
    head, rows = ("NAME", "ORIGIN", "CREATED", "PUBLIC KEY"), [(*each.values(),) for each in shown]
    server = keys.server and keys.server.public
    return print_list(arguments, {"keys": shown, "server": server}, head, rows)


def command_key_revoke(arguments: Arguments) -> int:
    config = load_arguments(arguments)
    KeyFile(config).change(lambda keys: keys.revoke(arguments.name))
    print(f"key of {arguments.name} revoked; a server that runs ends its connection now")
    if any(spec.handler_id == arguments.name for spec in config.handlers):
        print("It is started by the configuration, and gets a new key when it starts again.")
    return EXIT_OK


# Secrets.


def command_secret_set(arguments: Arguments) -> int:
    config = load_arguments(arguments)
    if sys.stdin.isatty():
        value = getpass.getpass(f"Value of {arguments.name}: ")
    else:
        try:
            value = sys.stdin.buffer.read(MAX_SECRET_BYTES + 2).decode().removesuffix("\n")
        except UnicodeDecodeError:
            raise InvalidField("value", "a secret is UTF-8 text") from None
    Secrets(config).set(arguments.name, value)
    print(f"secret {arguments.name} set")
    return EXIT_OK


def command_secret_list(arguments: Arguments) -> int:
    names = Secrets(load_arguments(arguments)).names().items()
    shown = [{"name": name, "origin": origin} for name, origin in names]
    return print_list(arguments, {"secrets": shown}, ("NAME", "ORIGIN"), names)


def command_secret_delete(arguments: Arguments) -> int:
    Secrets(load_arguments(arguments)).delete(arguments.name)
    print(f"secret {arguments.name} deleted")
    return EXIT_OK


# Tokens.


def command_token_create(arguments: Arguments) -> int:
    config = load_arguments(arguments)
    name, days = arguments.name, arguments.expires
    if not is_identifier(name):
        raise InvalidField("name", f"the name must be {IDENTIFIER_RULE}")
    if days is not None and not 1 <= days <= MAX_TOKEN_DAYS:
        raise InvalidField("expires", f"--expires must be from 1 to {MAX_TOKEN_DAYS} days")
    now_us = Clock().now_us()
    tokens = TokenFile(config.data_dir)
    was_open = not requires_login(config, tokens.is_present)
    token = tokens.create(name, Role(arguments.role), days and now_us + days * DAY_US, now_us)
    print(token)
    print("It is shown only now.", file=sys.stderr)
    if was_open:
        print(f"From now on {http_url(config)} demands a token or a login.", file=sys.stderr)
    return EXIT_OK


def command_token_list(arguments: Arguments) -> int:
    now_us = Clock().now_us()
    shown = [
        {"name": token.name, "role": token.role, "id": token.token_id,
         "created_at": render_second(token.created_us),
         "expires_at": token.expires_us and render_second(token.expires_us),
         "expired": not token.is_valid_at(now_us)}
        for token in TokenFile(load_arguments(arguments).data_dir).all()
    ]  # fmt: skip
    rows = [
        (each["name"], each["role"], f"sz_{each['id']}_...", each["created_at"],
         f"{each['expires_at'] or '-'}{' (expired)' if each['expired'] else ''}")
        for each in shown
    ]  # fmt: skip
    head = ("NAME", "ROLE", "TOKEN", "CREATED", "EXPIRES")
    return print_list(arguments, {"tokens": shown}, head, rows)


def command_token_revoke(arguments: Arguments) -> int:
    config = load_arguments(arguments)
    TokenFile(config.data_dir).revoke(arguments.name)
    print(f"token {arguments.name} revoked")
    return EXIT_OK


def make_first_token(config: Config) -> None:
    """Where a login is required from the start, see to it that somebody can log in."""
    tokens = TokenFile(config.data_dir)
    is_needed = not tokens.is_present and requires_login(config, has_tokens=False)
    if not is_needed or (path := tokens.create_first(Clock().now_us())) is None:
        return
    print(f"A token of role admin is in {path}", flush=True)
    if not os.environ.get("JOURNAL_STREAM"):  # systemd would keep it in its journal
        with open(path, encoding="utf-8") as file:
            print(f"  {file.read().strip()}\nIt is shown only now.", flush=True)


def command_systemd(arguments: Arguments) -> int:
    render = render_handler_unit if arguments.handlers else render_unit
    print(render(load_checked(arguments), os.environ))
    return EXIT_OK


def command_doctor(arguments: Arguments) -> int:
    """Look at everything, also when the configuration itself is what is wrong."""
    load = partial(load_checked, arguments)
    diagnoses = list(diagnose(load, os.environ, Clock(), ask_health))
    is_well = not any(found.verdict is Verdict.FAILED for found in diagnoses)
    if arguments.json:
        print(json.dumps({"ok": is_well, "checks": [asdict(found) for found in diagnoses]}))
    else:
        print("\n".join(line for found in diagnoses for line in render_diagnosis(found)))
    return EXIT_OK if is_well else EXIT_FAILED


# The commands and their options.

Option = tuple[Sequence[str], Mapping[str, Any]]


def option(*names: str, text: str | None = None, **settings: Any) -> Option:
    return names, {"help": text, **settings}


def argument(name: str, text: str | None = None, **settings: Any) -> Option:
    return option(name, text=text, metavar=name.upper(), **settings)


def flag(*names: str, text: str) -> Option:
    return option(*names, text=text, action="store_true")


LASTING: Final = frozenset(
    {command_run, command_start, command_restart, command_server, command_handler}
)
JSON_FLAG: Final = flag("--json", text="as JSON")
COMMANDS: Final[Sequence[tuple[Any, ...]]] = (
    # Words, function (none: further words follow), help, options.
    ("run", command_run, "run the server and the handlers in the foreground (default)",
     flag("--background", text=argparse.SUPPRESS)),
    ("start", command_start, "the same in the background; returns when it answers"),
    ("stop", command_stop, "stop what runs in the background and wait for its end"),
    ("restart", command_restart, "stop, then start"),
    ("status", command_status, "show each process: state, uptime, restarts, memory", JSON_FLAG),
    ("reload", command_reload, "apply a changed configuration without stopping the rest"),
    ("logs", command_logs, "print the end of the logs",
     argument("name", "governor, server or a handler's id", nargs="?"),
     flag("-f", "--follow", text="go on printing new lines"),
     option("-n", "--lines", type=int, default=TAIL_LINES, metavar="N",
            text="how many lines of each log (default: %(default)s)")),
    ("server", command_server, "run the server alone, in the foreground"),
    ("handler", command_handler, "run one configured handler, in the foreground",
     argument("name", "the handler's id")),
    ("check", command_check, "validate the configuration and say what it would run"),
    ("systemd", command_systemd, "print a systemd unit for this installation",
     flag("--handlers", text="a template for those with `autostart: false`")),
    ("doctor", command_doctor, "look for what is wrong and say what helps", JSON_FLAG),
    ("token", None, "make, list and revoke tokens"),
    ("token create", command_token_create, "make a token; it is shown this once",
     argument("name", "who it is for; the audit shows it"),
     option("--role", required=True, choices=("viewer", "operator", "admin"),
            text="viewer reads, operator also runs, admin may do all"),
     option("--expires", type=int, metavar="DAYS", text="not at all if not given")),
    ("token list", command_token_list, "show the tokens, but not what they are", JSON_FLAG),
    ("token revoke", command_token_revoke, "end a token and the sessions begun with it",
     argument("name")),
    ("handler-key", None, "let handlers elsewhere in, or no more"),
    ("handler-key create", command_key_create, "make a key and print its join string, this once",
     argument("name", "the handler id that the key may serve"),
     option("--endpoint", metavar="ADDRESS", text="tcp://host:port where the handler reaches this "
            "server, if not by this machine's address")),
    ("handler-key list", command_key_list, "show who is enrolled", JSON_FLAG),
    ("handler-key revoke", command_key_revoke, "end a handler's key, and its connection with it",
     argument("name")),
    ("secret", None, "set what jobs may use but not show"),
    ("secret set", command_secret_set, "set a secret; its value is read from stdin",
     argument("name", 'what {"$secret": "NAME"} refers to')),
    ("secret list", command_secret_list, "show the names of the secrets", JSON_FLAG),
    ("secret delete", command_secret_delete, "forget a secret", argument("name")),
    ("backup", command_backup, "copy the database to a file, also while it is in use",
     argument("file", "a file that does not exist yet")),
    ("restore", command_restore, "put a backup in the place of the database",
     argument("file", "what `backup` or the server has made")),
    ("export", command_export, "print all schedules as YAML for `import`",
     argument("file", "where to write to, if not to stdout", nargs="?", default="-"),
     flag("--api", text="only those that the API has made"),
     flag("--declared", text="only those of the configuration file")),
    ("import", command_import, "make the schedules of a file, which `export` has written, or of a "
     "crontab. Prints what is made (+), changed (~), deleted (-) or equal (=). The server must "
     "run, but for --dry-run",
     argument("file", "the file, or - for stdin"),
     flag("--dry-run", text="only print; exit code 4 if there is something to change"),
     flag("--prune", text="delete what the API has made and the file does not name; with a crontab "
          "only what came from one for that handler"),
     flag("--crontab", text="it is what `crontab -l` prints, if that is not seen"),
     flag("--system", text="a crontab whose lines name a user, as those in /etc do"),
     option("--handler", metavar="ID", text="the Shell handler that is to run a crontab's lines")),
)  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
