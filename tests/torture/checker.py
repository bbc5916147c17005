"""What must be true after a torture run, whatever died on the way. Pure: a history in, faults out.

In the manner of Jepsen's Chronos test: which fires were due is worked out here, from the
schedules as the clients asked for them, and held against what the database and the handlers'
own files say.

Two rules say what cannot be avoided when a handler hangs or is cut off:

- An attempt the server has given up (`lost`, `timeout`, `cancelled`, `late`) may still run, and
  may even begin late. No other attempt may begin after the end of its execution.
- Two executions of a schedule with overlap skip, queue or replace may run at the same time only
  if the earlier attempt was given up while it still ran.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

SECOND_US = 1_000_000
GIVEN_UP = frozenset({"lost", "timeout", "cancelled", "late"})
FINAL = frozenset({"success", "error", "timeout", "cancelled", "missed", "skipped", "lost"})
NEVER_STARTED = frozenset({"missed", "skipped"})


@dataclass(frozen=True, slots=True)
class Call:
    """A run-now call of a client. `execution_id`: None if no answer said it was accepted."""

    token: str
    execution_id: str | None = None
    told: str | None = None  # the final status, if the answer waited for it


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule as a client asked for it: it fires at grid + k x step, until `end_us`."""

    schedule_id: str
    grid_us: int
    step_us: int
    end_us: int
    overlap: str
    accepted: bool = True

    def fires(self, created_us: int) -> list[int]:
        """Every fire time after the creation."""
        skipped = max(0, (created_us - self.grid_us) // self.step_us + 1)
        return list(range(self.grid_us + skipped * self.step_us, self.end_us + 1, self.step_us))


@dataclass(frozen=True, slots=True)
class Row:
    """An execution in the database at the end."""

    execution_id: str
    token: str
    status: str
    created_us: int
    completed_us: int | None
    attempt: int = 0
    max_attempts: int = 1
    schedule_id: str | None = None
    fire_us: int | None = None
    coalesced: int = 0
    coalesced_from_us: int | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A line in a handler's file: `start`, or the end as `success`, `error` or `stopped`."""

    kind: str
    execution_id: str
    attempt: int
    at_us: int


@dataclass(frozen=True, slots=True)
class History:
    """All there is to know of a run."""

    calls: tuple[Call, ...] = ()
    plans: tuple[Plan, ...] = ()
    created_us: Mapping[str, int] = field(default_factory=dict)  # of the schedules in the database
    rows: tuple[Row, ...] = ()
    ended: Mapping[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    """The attempts in the database: outcome and time by execution and attempt."""
    marks: tuple[Mark, ...] = ()
    cancels: frozenset[str] = frozenset()  # executions a client asked to cancel
    seen: Mapping[str, frozenset[str]] = field(default_factory=dict)  # final states on the way


@dataclass(frozen=True, slots=True)
class Verdict:
    """Faults by kind, each with its sentences, and counts of what was looked at."""

    faults: Mapping[str, list[str]]
    counts: Mapping[str, int]

    @property
    def is_good(self) -> bool:
        return not any(self.faults.values())


class Index:
    """A history, by execution."""

    def __init__(self, history: History) -> None:
        self.rows = {row.execution_id: row for row in history.rows}
        self.starts: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.ends: dict[tuple[str, int], list[Mark]] = defaultdict(list)
        for mark in history.marks:
            key = (mark.execution_id, mark.attempt)
            if mark.kind == "start":
                self.starts[key].append(mark.at_us)
            else:
                self.ends[key].append(mark)
        self._ended = history.ended

    def end_of(self, execution_id: str, attempt: int) -> tuple[str, int]:
        """How and when an attempt ended by the database's account."""
        row = self.rows[execution_id]
        own = (row.status, row.completed_us or 0)
        return self._ended.get((execution_id, attempt)) or own

    def is_given_up(self, execution_id: str, attempt: int) -> bool:
        return self.end_of(execution_id, attempt)[0] in GIVEN_UP


def check(history: History) -> Verdict:
    """Hold a history against the promises."""
    index = Index(history)
    checks = {
        "lost call": find_lost_calls(history, index),
        "broken answer": find_broken_answers(history, index),
        "not final": find_unfinished(history),
        "two ends": find_second_ends(history),
        "missing or extra fire": find_misfires(history),
        "double start": find_double_starts(index),
        "unknown start": find_unknown_starts(index),
        "start after the end": find_late_starts(index),
        "attempts": find_wrong_attempts(index),
        "success without an end": find_hollow_successes(index),
        "extra execution": find_extra_executions(history),
        "cancelled by nobody": find_needless_cancels(history),
        "overlap": find_overlaps(history, index),
    }
    faults = {kind: list(found) for kind, found in checks.items()}
    return Verdict(faults, count(history, index))


def find_lost_calls(history: History, index: Index) -> Iterator[str]:
    """Accepted calls and schedules that the database does not know."""
    for call in history.calls:
        if call.execution_id and call.execution_id not in index.rows:
            yield f"call {call.token} was accepted as {call.execution_id}, which is not there"
    for plan in history.plans:
        if plan.accepted and plan.schedule_id not in history.created_us:
            yield f"schedule {plan.schedule_id} was accepted and is not there"


def find_broken_answers(history: History, index: Index) -> Iterator[str]:
    """Answers that turned out untrue."""
    for call in history.calls:
        row = index.rows.get(call.execution_id or "")
        if row is None:
            continue
        if row.token != call.token:
            yield f"call {call.token} was answered with {row.execution_id} of {row.token}"
        if call.told and call.told != row.status:
            yield f"{row.execution_id} was told to have ended as {call.told}, is {row.status}"


def find_unfinished(history: History) -> Iterator[str]:
    for row in history.rows:
        if row.status not in FINAL or row.completed_us is None:
            yield f"{row.execution_id} is {row.status} for good"


def find_second_ends(history: History) -> Iterator[str]:
    """Executions that were seen in one final state and then in another."""
    last = {row.execution_id: row.status for row in history.rows}
    for execution_id, states in history.seen.items():
        states |= {last.get(execution_id, "gone")}
        if len(states) > 1:
            yield f"{execution_id} was {' and '.join(sorted(states))}"


def find_misfires(history: History) -> Iterator[str]:
    """Due fires without a row or with two, and fires that were not due."""
    fired: dict[str, list[Row]] = defaultdict(list)
    for row in history.rows:
        if row.schedule_id is not None and row.fire_us is not None:
            fired[row.schedule_id].append(row)
    for plan in history.plans:
        rows = fired.pop(plan.schedule_id, [])
        created_us = history.created_us.get(plan.schedule_id)
        due = [] if created_us is None else plan.fires(created_us)
        yield from account_for(plan.schedule_id, due, rows)
    for schedule_id in fired:
        yield f"schedule {schedule_id} fired and nobody asked for it"


def account_for(schedule_id: str, due: list[int], rows: list[Row]) -> Iterator[str]:
    """Whether each due fire stands on exactly one row, as its own or coalesced into it."""
    accounts: Counter[int] = Counter()
    known = frozenset(due)
    for row in rows:
        assert row.fire_us is not None
        first_us = row.fire_us if row.coalesced_from_us is None else row.coalesced_from_us
        span = [at_us for at_us in due if first_us <= at_us <= row.fire_us]
        accounts.update(span)
        if row.fire_us not in known:
            yield f"{schedule_id}: {row.execution_id} fired at {row.fire_us}, which was not due"
        elif len(span) != row.coalesced + 1:
            yield f"{schedule_id}: {row.execution_id} stands for {row.coalesced + 1} of {len(span)}"
    for at_us in due:
        if accounts[at_us] != 1:
            yield f"{schedule_id}: the fire at {at_us} stands on {accounts[at_us]} rows"


def find_double_starts(index: Index) -> Iterator[str]:
    starts: Counter[str] = Counter()
    for (execution_id, attempt), times in index.starts.items():
        starts[execution_id] += len(times)
        if len(times) > 1:
            yield f"attempt {attempt} of {execution_id} was started {len(times)} times"
    for execution_id, number in starts.items():
        row = index.rows.get(execution_id)
        if row is not None and row.max_attempts == 1 and number > 1:
            yield f"{execution_id} has one attempt and was started {number} times"


def find_unknown_starts(index: Index) -> Iterator[str]:
    """Starts of what is not in the database: a handler was called before the commit."""
    for execution_id, attempt in index.starts:
        if execution_id not in index.rows:
            yield f"a handler began {execution_id}:{attempt}, which is not there"


def find_late_starts(index: Index) -> Iterator[str]:
    for (execution_id, attempt), times in index.starts.items():
        row = index.rows.get(execution_id)
        if row is None or row.completed_us is None or max(times) <= row.completed_us:
            continue
        if not index.is_given_up(execution_id, attempt):
            yield f"attempt {attempt} of {execution_id} began after its end as {row.status}"


def find_wrong_attempts(index: Index) -> Iterator[str]:
    started: Counter[str] = Counter()
    for execution_id, attempt in index.starts:
        started[execution_id] = max(started[execution_id], attempt)
    for row in index.rows.values():
        name, begun = row.execution_id, started[row.execution_id]
        if row.attempt > row.max_attempts or begun > row.attempt:
            yield f"{name}: {row.attempt} attempts, {begun} begun, {row.max_attempts} allowed"
        if row.status in NEVER_STARTED and begun:
            yield f"{name} is {row.status} and was started"
        if row.status in ("error", "timeout", "lost") and row.attempt < row.max_attempts:
            yield f"{name} ended as {row.status} after {row.attempt} of {row.max_attempts} attempts"


def find_hollow_successes(index: Index) -> Iterator[str]:
    for row in index.rows.values():
        ends = index.ends.get((row.execution_id, row.attempt), ())
        if row.status == "success" and "success" not in {mark.kind for mark in ends}:
            yield f"{row.execution_id} is a success that no handler has written down"


def find_extra_executions(history: History) -> Iterator[str]:
    """Executions nobody called for. A call that was not answered may have been made, once."""
    called = {call.token for call in history.calls}
    made = Counter(row.token for row in history.rows if row.schedule_id is None)
    for token, number in made.items():
        if token not in called or number > 1:
            yield f"call {token} led to {number} executions"


def find_needless_cancels(history: History) -> Iterator[str]:
    replacing = {plan.schedule_id for plan in history.plans if plan.overlap == "replace"}
    for row in history.rows:
        asked = row.execution_id in history.cancels or row.schedule_id in replacing
        if row.status == "cancelled" and not asked:
            yield f"{row.execution_id} was cancelled and nobody asked for it"


def find_overlaps(history: History, index: Index) -> Iterator[str]:
    """Executions of one schedule that ran at the same time without need."""
    single = {plan.schedule_id for plan in history.plans if plan.overlap != "allow"}
    spans: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for execution_id, attempt, begun_us, ended_us in settled_spans(index):
        row = index.rows[execution_id]
        if row.schedule_id in single and row.fire_us is not None:
            spans[row.schedule_id].append((begun_us, ended_us, f"{execution_id}:{attempt}"))
    for schedule_id, found in spans.items():
        busy_until_us, earlier = 0, ""
        for begun_us, ended_us, later in sorted(found):
            if begun_us < busy_until_us:
                early_us = busy_until_us - begun_us
                yield f"{schedule_id}: {later} began {early_us} us before the end of {earlier}"
            busy_until_us, earlier = max((busy_until_us, earlier), (ended_us, later))


def settled_spans(index: Index) -> Iterator[tuple[str, int, int, int]]:
    """Attempts whose end the server waited for: execution, attempt, start and end."""
    for (execution_id, attempt), starts in index.starts.items():
        ends = index.ends.get((execution_id, attempt))
        if ends and execution_id in index.rows:
            ended_us = ends[-1].at_us
            if ended_us <= index.end_of(execution_id, attempt)[1]:
                yield execution_id, attempt, starts[0], ended_us


def count(history: History, index: Index) -> dict[str, int]:
    by_status = Counter(row.status for row in history.rows)
    fires = [row for row in history.rows if row.fire_us is not None]
    return {
        "calls": len(history.calls),
        "calls accepted": total(call.execution_id for call in history.calls),
        "schedules": len(history.created_us),
        "executions": len(history.rows),
        "fires due": sum(row.coalesced + 1 for row in fires),
        "fires coalesced": sum(row.coalesced for row in fires),
        "starts": sum(map(len, index.starts.values())),
        "attempts given up": total(outcome in GIVEN_UP for outcome, _ in history.ended.values()),
        **{f"ended as {status}": number for status, number in sorted(by_status.items())},
    }


def total(conditions: Iterable[object]) -> int:
    """How many are true."""
    return sum(map(bool, conditions))
