"""Kill everything at random, under load, and check that every promise was kept.

    python tests/torture/torture.py --minutes 10 --seed 7

Clients call and schedule, handlers write down what they do, three nemeses kill -9, stop, restart
and fill the disk. After a quiet end checker.py holds the database against the files of clients
and handlers. The exit code is 0 if it found no fault; otherwise the directory is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from checker import FINAL, SECOND_US, Call, History, Mark, Plan, Row, Verdict, check  # noqa: E402
from schedulezero import encode_id  # noqa: E402
from torture_site import OWNED, TARGETS, Site, small_disk  # noqa: E402

CLIENTS = 8
CALLS_PER_S = 12.0  # of each client
SCHEDULES = 32
QUIET_S = 180.0  # for everything to end after the last fault
POLICIES = ("skip", "queue", "allow", "replace")
RETRY = {"base_delay": 0.3, "max_delay": 3}


class Log:
    """A file of JSON lines, each on the disk before `write` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a")

    def write(self, **entry: Any) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fdatasync(self._file.fileno())

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]


class Actor(threading.Thread):
    """A thread whose failure is told to the main thread, which then ends the run."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.failed: BaseException | None = None
        self.stop = threading.Event()

    def run(self) -> None:
        try:
            self.act()
        except BaseException as error:
            self.failed = error

    def act(self) -> None:
        raise NotImplementedError


class Client(Actor):
    """Calls, schedules and cancels at random, and writes down what was accepted."""

    def __init__(self, site: Site, number: int, seed: int, end_us: int, plans: int) -> None:
        super().__init__(f"client-{number}")
        self._site = site
        self._random = random.Random(f"{seed}/{number}")
        self._end_us = end_us
        self._plans_left = plans
        self._sent = 0
        self._recent: list[str] = []
        self.log = Log(site.directory / f"{self.name}.log")

    def act(self) -> None:
        chance = self._random
        while time.time_ns() // 1_000 < self._end_us:
            time.sleep(chance.expovariate(CALLS_PER_S))
            if self._plans_left and chance.random() < 0.2:
                self._schedule()
            elif self._recent and chance.random() < 0.03:
                self._cancel(chance.choice(self._recent))
            else:
                self._call()

    def _request(self, path: str, body: Any, timeout_s: float) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer; 0 if there was none."""
        port = self._site.appliance.http_port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            time.sleep(0.2)  # it is down: a client with manners does not hammer
            return 0, {}
        finally:
            connection.close()

    def _new_name(self) -> str:
        self._sent += 1
        return f"{self.name}-{self._sent}"

    def _job(self, token: str) -> dict[str, Any]:
        chance = self._random
        seconds = chance.choice((0, 0, 0, 0, 0.02, 0.1, chance.uniform(0, 3)))
        fails, lines = chance.choice((0, 0, 0, 0.3)), chance.choice((0, 0, 0, 5))
        params = {"token": token, "seconds": seconds, "chance": fails, "talk": lines}
        return {
            "handler_id": chance.choice(TARGETS),
            "method_name": "work",
            "job_params": params,
            "retry": {**RETRY, "max_attempts": chance.choice((1, 3))},
            "timeout": chance.choice((60, 60, 2)),
        }

    def _call(self) -> None:
        token, is_waiting = self._new_name(), self._random.random() < 0.2
        self.log.write(kind="call", token=token)
        body = {**self._job(token), "wait": is_waiting}
        status, answer = self._request("/api/run_now", body, 20 if is_waiting else 5)
        if answer.get("execution_id"):
            told = answer.get("outcome") or ("success" if status == 200 else None)
            execution_id = answer["execution_id"]
            self.log.write(kind="accepted", token=token, execution_id=execution_id, told=told)
            self._recent = [*self._recent[-9:], execution_id]

    def _schedule(self) -> None:
        name, overlap = self._new_name(), self._random.choice(POLICIES)
        grid_us, step_us, trigger = self._trigger()
        plan = {
            "schedule_id": name, "grid_us": grid_us, "step_us": step_us,
            "end_us": self._end_us, "overlap": overlap,
        }  # fmt: skip
        self.log.write(kind="plan", **plan)
        policy = {
            "overlap": overlap,
            "coalesce": self._random.choice(("latest", "all", "none")),
            "misfire_grace_time": self._random.choice((None, 2, 60)),
        }
        given = {key: value for key, value in policy.items() if value is not None}
        body = {**self._job(name), "schedule_id": name, "trigger_config": trigger, **given}
        status, _ = self._request("/api/schedule", body, 5)
        if status == 201:
            self._plans_left -= 1
            self.log.write(kind="planned", schedule_id=name)

    def _trigger(self) -> tuple[int, int, dict[str, Any]]:
        """Grid and step in microseconds, and the trigger that fires on them."""
        kind, end = self._random.choice(("interval", "interval", "cron", "date")), self._end_us
        soon_us = (time.time_ns() // 1_000_000_000 + self._random.randint(2, 5)) * SECOND_US
        if kind == "interval":
            seconds = self._random.randint(1, 5)
            start = {"start_time": iso(soon_us), "end_time": iso(end)}
            return soon_us, seconds * SECOND_US, {"type": kind, "seconds": seconds, **start}
        if kind == "date":
            at_us = min(soon_us + self._random.randint(0, 60) * SECOND_US, end)
            return at_us, 10**15, {"type": kind, "run_date": iso(at_us)}
        field, seconds = self._random.choice((("second", 1), ("minute", 60)))
        return 0, seconds * SECOND_US, {"type": "cron", field: "*", "end_time": iso(end)}

    def _cancel(self, execution_id: str) -> None:
        self.log.write(kind="cancel", execution_id=execution_id)
        self._request(f"/api/executions/{execution_id}/cancel", {}, 5)


def iso(us: int) -> str:
    return datetime.fromtimestamp(us // SECOND_US, UTC).isoformat()


class Watcher(Actor):
    """Looks at the history again and again: what is final must stay as it is."""

    def __init__(self, site: Site) -> None:
        super().__init__("watcher")
        self._site = site
        self.seen: dict[str, set[str]] = {}

    def act(self) -> None:
        while not self.stop.wait(1.0):
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                newest = self._site.appliance.get("/api/executions?limit=300").json()
                for record in newest["records"]:
                    if record["status"] in FINAL:
                        states = self.seen.setdefault(record["execution_id"], set())
                        states.add(record["status"])


class Nemesis(Actor):
    """Does one harm after another until it is told to stop; what it stopped it lets go on."""

    def __init__(self, site: Site, name: str, seed: int, harms: dict[str, int]) -> None:
        """`harms`: how often each is chosen, in proportion."""
        super().__init__(name)
        self._site = site
        self._random = random.Random(f"{seed}/{name}")
        self._harms = harms
        self.done: Counter[str] = Counter()

    def act(self) -> None:
        acts: dict[str, Callable[[], str | None]] = {
            "handler": self._kill_handler,
            "server": self._kill_server,
            "governor": self._kill_governor,
            "pause": self._pause,
            "restart": self._restart,
            "disk": self._fill_disk,
        }
        while not self.stop.wait(self._random.uniform(0.5, 4)):
            (harm,) = self._random.choices([*self._harms], [*self._harms.values()])
            done = acts[harm]()
            if done:
                self.done[done] += 1

    def _kill_handler(self) -> str | None:
        place = self._random.randrange(len(OWNED) + 2)
        if place >= len(OWNED):
            pid = self._site.pid_of(("governed", "forked")[place - len(OWNED)])
            return "kill -9 handler" if self._site.signal(pid, signal.SIGKILL) else None
        process = self._site.processes[place]
        assert process is not None
        process.kill()
        process.wait()
        self.stop.wait(self._random.choice((0, 0, 0, 1)))
        self._site.spawn(place)
        return "kill -9 handler"

    def _kill_server(self) -> str | None:
        pid = self._site.pid_of("server")
        return "kill -9 server" if self._site.signal(pid, signal.SIGKILL) else None

    def _kill_governor(self) -> str | None:
        if not self._site.signal(self._site.pid_of("governor"), signal.SIGKILL):
            return None
        self.stop.wait(self._random.choice((0, 1, 9)))
        self._site.start()
        return "kill -9 governor"

    def _restart(self) -> str | None:
        restarted = self._site.appliance.cli("restart", timeout_s=90)
        if restarted.returncode:
            self._site.start()
        return "restart" if restarted.returncode == 0 else "restart failed, start"

    def _pause(self) -> str | None:
        """SIGSTOP for a while, sometimes for longer than silence is borne."""
        names = ("server", "governed", "forked", "governor")
        owned = [process.pid for process in self._site.processes if process]
        name = self._random.choice((*names, *owned))
        pid = name if isinstance(name, int) else self._site.pid_of(name)
        if not self._site.signal(pid, signal.SIGSTOP):
            return None
        long = self._random.random() < 0.4
        self.stop.wait(self._random.uniform(10, 15) if long else self._random.uniform(1, 9))
        self._site.signal(pid, signal.SIGCONT)
        what = name if name in ("server", "governor") else "handler"
        return f"SIGSTOP {what}{' for more than 10 s' if long else ''}"

    def _fill_disk(self) -> str | None:
        filler = self._site.data / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
        self.stop.wait(self._random.uniform(1, 6))
        filler.unlink()
        return "disk full"


HUNTER = {"handler": 1}
KILLER = {"server": 5, "governor": 3, "restart": 1}
STOPPER = {"pause": 5, "disk": 2}


def torture(
    site: Site, seed: int, duration_s: float, can_fill: bool
) -> tuple[History, Counter[str]]:
    """Run for about the duration, wait for the quiet, and tell what happened."""
    site.start()
    for place in range(len(OWNED)):
        site.spawn(place)
    for handler_id in dict.fromkeys(TARGETS):
        site.appliance.wait_connected(handler_id)
    end_us = (round(time.time() + duration_s)) * SECOND_US
    plans = SCHEDULES // CLIENTS
    clients = [Client(site, number, seed, end_us, plans) for number in range(CLIENTS)]
    watcher = Watcher(site)
    stopper = {name: weight for name, weight in STOPPER.items() if name != "disk" or can_fill}
    harms = {"hunter": HUNTER, "killer": KILLER, "stopper": stopper}
    nemeses = [Nemesis(site, name, seed, weights) for name, weights in harms.items()]
    actors: list[Actor] = [*clients, *nemeses, watcher]
    for actor in actors:
        actor.start()
    heal_s = time.monotonic() + duration_s * 0.93 - 2
    while time.monotonic() < heal_s and not any(actor.failed for actor in actors):
        time.sleep(0.2)
    finish(nemeses)
    finish(clients)
    wait_until_quiet(site, end_us)
    finish([watcher])
    site.appliance.cli("stop")
    seen = {name: frozenset(states) for name, states in watcher.seen.items()}
    return gather(site, clients, seen), sum((n.done for n in nemeses), Counter())


def finish(actors: Sequence[Actor]) -> None:
    """Let them stop; raises what one of them died of."""
    for actor in actors:
        actor.stop.set()
    for actor in actors:
        actor.join()
        if actor.failed:
            raise actor.failed


def wait_until_quiet(site: Site, end_us: int) -> None:
    """Wait until nothing is live, at most QUIET_S; the checker names what is left."""
    give_up_s = time.monotonic() + QUIET_S
    while time.monotonic() < give_up_s:
        time.sleep(0.5)
        if time.time() * SECOND_US < end_us + 3 * SECOND_US:
            continue
        with contextlib.suppress(OSError, http.client.HTTPException):
            health = site.appliance.get("/api/health").json()
            if health["running"] == health["waiting"] == 0:
                return


def gather(site: Site, clients: Sequence[Client], seen: dict[str, frozenset[str]]) -> History:
    """All that was written down, and the database."""
    entries = [entry for client in clients for entry in client.log.read()]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_kind.setdefault(entry.pop("kind"), []).append(entry)
    accepted = {entry["token"]: entry for entry in by_kind.get("accepted", ())}
    planned = {entry["schedule_id"] for entry in by_kind.get("planned", ())}
    marks = [json.loads(line) for line in site.record.read_text().splitlines()]
    with contextlib.closing(sqlite3.connect(site.data / "schedulezero.db")) as db:
        db.create_function("encode_id", 1, encode_id)
        return History(
            calls=tuple(
                Call(**accepted.get(entry["token"], entry)) for entry in by_kind.get("call", ())
            ),
            plans=tuple(
                Plan(**plan, accepted=plan["schedule_id"] in planned)
                for plan in by_kind.get("plan", ())
            ),
            created_us=dict(db.execute("SELECT schedule_id, created_us FROM schedules")),
            rows=tuple(Row(*row) for row in db.execute(ROWS)),
            ended={(row[0], row[1]): row[2:] for row in db.execute(ATTEMPTS)},
            marks=tuple(Mark(*mark[:4]) for mark in marks),
            cancels=frozenset(entry["execution_id"] for entry in by_kind.get("cancel", ())),
            seen=seen,
        )


ROWS = """
    SELECT encode_id(id), json_extract(job_params, '$.token'), status, created_us, completed_us,
        attempt, json_extract(retry, '$[0]'), schedule_id, fire_us, coalesced, coalesced_from_us
    FROM executions
"""
ATTEMPTS = "SELECT encode_id(id), attempt, outcome, ended_us FROM attempts"


def report(verdict: Verdict, done: Counter[str], seconds: float) -> None:
    kills = sum(number for harm, number in done.items() if harm.startswith("kill"))
    print(f"ran {seconds:.0f} s; {done.total()} faults injected, {kills} of them kill -9:")
    for harm, number in done.most_common():
        print(f"  {number:6} {harm}")
    print("looked at:")
    for name, number in verdict.counts.items():
        print(f"  {number:6} {name}")
    print("found:")
    for kind, sentences in verdict.faults.items():
        print(f"  {len(sentences):6} {kind}")
        for sentence in sentences[:10]:
            print(f"         {sentence}")


def run(directory: Path, seed: int, duration_s: float) -> bool:
    """One whole run in a new directory; whether every promise was kept."""
    began_s = time.monotonic()
    with small_disk(directory / "data") as failure:
        if failure:
            print(f"no disk-full episodes: {failure}", flush=True)
        site = Site(directory)
        try:
            history, done = torture(site, seed, duration_s, failure is None)
        finally:
            site.close()
            shutil.copytree(site.data, directory / "kept", dirs_exist_ok=True)
        left = site.wait_empty()
    verdict = check(history)
    report(verdict, done, time.monotonic() - began_s)
    print(f"  {len(left):6} processes left behind {left or ''}")
    return verdict.is_good and verdict.counts["starts"] > 0 and not left


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="default: %(default)g")
    parser.add_argument("--seed", type=int, default=None, help="default: a random one")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    directory = Path(tempfile.mkdtemp(prefix="torture-")).resolve()
    print(f"seed {seed}, {arguments.minutes:g} minutes, in {directory}", flush=True)
    is_good = run(directory, seed, arguments.minutes * 60)
    if is_good:
        shutil.rmtree(directory)
    print("every promise was kept" if is_good else f"FAULTS FOUND; see {directory}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
