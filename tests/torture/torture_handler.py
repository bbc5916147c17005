"""Handlers that write down what they do, each line on the disk before anything follows from it.

`Torture` is served by handler.py. `python torture_handler.py SERVER ID RECORD` is the same as a
plain REQ/REP handler, from the wire protocol alone.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

import zmq
from handler import Handler, JobCancelled


class JobError(Exception):
    pass


class Record:
    """An append-only file of starts and ends, shared by processes."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, kind: str, execution_id: str, attempt: int) -> None:
        """Return when the line is on the disk."""
        line = [kind, execution_id, attempt, time.time_ns() // 1_000, os.getpid()]
        os.write(self._fd, f"{json.dumps(line)}\n".encode())
        os.fdatasync(self._fd)


class Torture(Handler):
    """One method, `work`, on the record."""

    def __init__(self, record: str) -> None:
        super().__init__()
        self._record = Record(record)

    def work(self, token: str, seconds: float = 0, chance: float = 0, talk: int = 0) -> str:
        """Take `seconds`, say `talk` lines, fail with `chance`; the token otherwise."""
        job = self.job
        self._record.write("start", job.execution_id, job.attempt)
        try:
            for line in range(talk):
                print(f"{token} says line {line}")
                job.progress(100 * line / talk, f"line {line}")
            job.wait(seconds)
        except JobCancelled:
            self._record.write("stopped", job.execution_id, job.attempt)
            raise
        if random.random() < chance:
            self._record.write("error", job.execution_id, job.attempt)
            raise JobError(token)
        self._record.write("success", job.execution_id, job.attempt)
        return token


def serve_plain(server: str, handler_id: str, record: Record) -> None:
    """Register once and answer calls, one at a time, for ever."""
    context = zmq.Context()
    calls = context.socket(zmq.REP)
    port = calls.bind_to_random_port("tcp://127.0.0.1")
    about = {
        "handler_id": handler_id,
        "address": f"tcp://127.0.0.1:{port}",
        "methods": ["work"],
    }
    while not ask(context, server, {"method": "register", "params": about}):
        time.sleep(0.2)
    while True:
        call = json.loads(calls.recv())
        reply = {"success": True} if call["method"] == "ping" else answer(call, record)
        calls.send(json.dumps(reply).encode())


def ask(context: Any, server: str, request: dict[str, Any]) -> bool:
    """Whether the server said yes in time."""
    with context.socket(zmq.REQ) as asking:
        asking.setsockopt(zmq.LINGER, 0)
        asking.setsockopt(zmq.RCVTIMEO, 3_000)
        asking.connect(server)
        asking.send(json.dumps(request).encode())
        try:
            return bool(json.loads(asking.recv())["success"])
        except zmq.Again:
            return False


def answer(call: dict[str, Any], record: Record) -> dict[str, Any]:
    params, who = call["params"], (call["execution_id"], call["attempt"])
    record.write("start", *who)
    time.sleep(params.get("seconds", 0))
    if random.random() < params.get("chance", 0):
        record.write("error", *who)
        return {"success": False, "error": params["token"]}
    record.write("success", *who)
    return {"success": True, "result": params["token"]}


if __name__ == "__main__":
    serve_plain(sys.argv[1], sys.argv[2], Record(sys.argv[3]))
