"""The torture test's checker catches each fault that is planted in a good history."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "torture"))

from checker import SECOND_US, Call, History, Mark, Plan, Row, check

S = SECOND_US
PLAN = Plan("each-second", grid_us=0, step_us=S, end_us=14 * S, overlap="skip")


def fire(second: int, **fields: object) -> Row:
    row = Row(
        f"fire-{second}", "each-second", "success", second * S, second * S + 500, attempt=1,
        schedule_id="each-second", fire_us=second * S,
    )  # fmt: skip
    return replace(row, **fields)


def ran(execution_id: str, attempt: int, begun_us: int, ended_us: int) -> tuple[Mark, Mark]:
    return (
        Mark("start", execution_id, attempt, begun_us),
        Mark("success", execution_id, attempt, ended_us),
    )


CATCH_UP = fire(13, coalesced=2, coalesced_from_us=11 * S)
RETRIED = Row("run-2", "two", "success", 20 * S, 30 * S, attempt=2, max_attempts=3)
GOOD = History(
    calls=(Call("one", "run-1", "success"), Call("two", "run-2"), Call("unanswered")),
    plans=(PLAN,),
    created_us={"each-second": 9 * S},
    rows=(
        Row("run-1", "one", "success", 20 * S, 21 * S, attempt=1),
        RETRIED,
        fire(10),
        CATCH_UP,
        fire(14, status="skipped", attempt=0),
    ),
    ended={("run-2", 1): ("lost", 25 * S)},
    marks=(
        *ran("run-1", 1, 20 * S, 20 * S + 10),
        Mark("start", "run-2", 1, 20 * S),
        *ran("run-2", 2, 26 * S, 29 * S),
        *ran("fire-10", 1, 10 * S, 10 * S + 100),
        *ran("fire-13", 1, 13 * S, 13 * S + 100),
    ),
    seen={"run-1": frozenset({"success"})},
)


def with_rows(*rows: Row, without: str = "") -> History:
    """The good history with rows put in the place of those of the same id."""
    new = {row.execution_id: row for row in (*GOOD.rows, *rows) if row.execution_id != without}
    return replace(GOOD, rows=tuple(new.values()))


def with_marks(*marks: Mark, without: str = "") -> History:
    kept = tuple(mark for mark in GOOD.marks if mark.execution_id != without)
    return replace(GOOD, marks=kept + marks)


def test_a_good_history_has_no_faults_and_its_counts_are_right() -> None:
    verdict = check(GOOD)
    assert verdict.is_good, verdict.faults
    assert verdict.counts["calls accepted"] == 2
    assert verdict.counts["fires due"] == 5
    assert verdict.counts["fires coalesced"] == 2
    assert verdict.counts["attempts given up"] == 1


def test_a_schedules_fires_are_worked_out_from_its_grid() -> None:
    assert PLAN.fires(9 * S + 1) == [10 * S, 11 * S, 12 * S, 13 * S, 14 * S]
    assert PLAN.fires(10 * S) == [11 * S, 12 * S, 13 * S, 14 * S]
    later = replace(PLAN, grid_us=12 * S + 7, step_us=10 * S)
    assert later.fires(0) == [12 * S + 7]


FAULTY = {
    ("lost call", "lost call"): with_rows(without="run-1"),
    ("lost call", "lost schedule"): replace(GOOD, created_us={}),
    ("broken answer", "an answer of another call"): with_rows(replace(GOOD.rows[0], token="two")),
    ("broken answer", "an answer that changed"): replace(
        GOOD, calls=(Call("one", "run-1", "error"),)
    ),
    ("not final", "running for good"): with_rows(
        replace(RETRIED, status="running", completed_us=None)
    ),
    ("two ends", "two final states"): replace(GOOD, seen={"run-1": frozenset({"lost"})}),
    ("two ends", "a final execution that vanished"): replace(
        GOOD, seen={"run-9": frozenset({"success"})}
    ),
    ("missing or extra fire", "missing fire"): with_rows(without="fire-10"),
    ("missing or extra fire", "fire accounted twice"): with_rows(
        replace(CATCH_UP, coalesced_from_us=10 * S, coalesced=3)
    ),
    ("missing or extra fire", "coalesced span and count differ"): with_rows(
        replace(CATCH_UP, coalesced=1)
    ),
    ("missing or extra fire", "fire that was not due"): with_rows(fire(15)),
    ("missing or extra fire", "fire before the creation"): with_rows(fire(8)),
    ("missing or extra fire", "fire of an unknown schedule"): with_rows(
        fire(10, execution_id="x", schedule_id="other")
    ),
    ("double start", "double start"): with_marks(Mark("start", "run-2", 2, 26 * S)),
    ("double start", "two starts with one attempt"): with_marks(*ran("run-1", 2, 20 * S, 21 * S)),
    ("unknown start", "unknown start"): with_marks(*ran("run-9", 1, 1, 2)),
    ("start after the end", "attempt after the end"): with_marks(
        Mark("start", "run-1", 1, 22 * S), Mark("success", "run-1", 1, 22 * S), without="run-1"
    ),
    ("attempts", "attempt beyond the recorded"): with_marks(*ran("run-2", 3, 27 * S, 28 * S)),
    ("attempts", "more attempts than allowed"): with_rows(replace(RETRIED, max_attempts=1)),
    ("attempts", "given up too early"): with_rows(replace(RETRIED, status="lost")),
    ("attempts", "skipped and started"): with_marks(*ran("fire-14", 1, 14 * S, 14 * S + 1)),
    ("success without an end", "success nobody wrote down"): with_marks(
        Mark("start", "run-1", 1, 20 * S), without="run-1"
    ),
    ("extra execution", "one call, two executions"): with_rows(
        replace(GOOD.rows[0], execution_id="run-3")
    ),
    ("extra execution", "execution nobody called"): with_rows(
        replace(RETRIED, execution_id="x", token="x")
    ),
    ("cancelled by nobody", "cancelled by nobody"): with_rows(
        replace(GOOD.rows[0], status="cancelled")
    ),
}


@pytest.mark.parametrize("kind, planted", FAULTY)
def test_a_planted_fault_is_found_and_named(kind: str, planted: str) -> None:
    assert check(FAULTY[kind, planted]).faults[kind]


def overlapping(ended_us: int, outcome: str = "success") -> History:
    """Fire 10 runs in its handler until 13.5 s; the server recorded its end at `ended_us`."""
    late = fire(10, status=outcome, completed_us=ended_us)
    history = replace(GOOD, rows=tuple(late if r.fire_us == 10 * S else r for r in GOOD.rows))
    marks = tuple(mark for mark in GOOD.marks if mark.execution_id != "fire-10")
    return replace(history, marks=marks + ran("fire-10", 1, 10 * S, 13 * S + S // 2))


def test_an_overlap_is_found_unless_the_earlier_attempt_was_given_up_while_it_ran() -> None:
    assert check(overlapping(14 * S)).faults["overlap"]
    assert not check(overlapping(12 * S, "lost")).faults["overlap"]


def test_a_start_after_the_end_is_no_fault_of_an_attempt_that_was_given_up() -> None:
    slow = Mark("start", "run-2", 1, 31 * S)
    marks = tuple(mark for mark in GOOD.marks if mark != Mark("start", "run-2", 1, 20 * S))
    assert check(replace(GOOD, marks=(*marks, slow))).is_good
