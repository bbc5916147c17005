"""How an attempt ended, and what becomes of its execution: pure decisions."""

from __future__ import annotations

from typing import Any

import pytest
import schedulezero as sz
from schedulezero import Execution, Outcome, RetryPolicy, Status, after_attempt, outcome_of

NOW_US = 1_800_000_000_000_000
POLICY = RetryPolicy(max_attempts=3, base_delay=2.0, factor=3.0, max_delay=60.0, jitter=0.0)
RUNNING = Execution(
    "0123456789ab", None, "h", "m", {}, Status.RUNNING, 1, 1, None, started_us=2, attempt=1,
    retry=POLICY, instance="h/one",
)  # fmt: skip


def outcome(message: Any, cancelling: str | None = None, is_overdue: bool = False) -> Outcome:
    return outcome_of(message, cancelling, is_overdue)


@pytest.mark.parametrize("result", [None, 0, False, "", [], {}, {"a": [1]}, "text", 1.5])
def test_success_carries_any_result(result: Any) -> None:
    assert outcome({"success": True, "result": result}) == Outcome(Status.SUCCESS, result)


def test_success_without_a_result_has_none() -> None:
    assert outcome({"success": True}) == Outcome(Status.SUCCESS, None)


@pytest.mark.parametrize("success", [None, 1, "true", "yes", [True], {}, 0, False])
def test_only_true_is_success(success: Any) -> None:
    assert outcome({"success": success}).status is Status.ERROR


def test_a_failure_keeps_sentence_and_traceback_within_bounds() -> None:
    message = {"success": False, "error": "e" * 99_999, "traceback": "start" + "t" * 99_999}
    failed = outcome(message)
    assert failed.status is Status.ERROR
    assert failed.error == "e" * sz.MAX_ERROR_CHARS
    assert failed.traceback == "t" * sz.MAX_ERROR_CHARS  # its end says what happened


@pytest.mark.parametrize("error", [None, "", 5, ["x"], {"message": "x"}])
def test_a_failure_without_a_sentence_says_so(error: Any) -> None:
    failed = outcome({"success": False, "error": error, "traceback": error})
    assert failed.error == "the handler gave no reason"
    assert failed.traceback in (None, "")


def test_a_job_that_ends_well_although_told_to_stop_has_succeeded() -> None:
    assert outcome({"success": True, "result": 1}, "cancelled").status is Status.SUCCESS


def test_a_job_that_fails_after_it_was_told_to_stop_is_cancelled_for_that_reason() -> None:
    for message in ({"success": False, "cancelled": True}, {"success": False, "error": "oops"}):
        stopped = outcome(message, "replaced")
        assert (stopped.status, stopped.error) == (Status.CANCELLED, "cancelled: replaced")


def test_a_job_that_an_earlier_server_told_to_stop_is_cancelled() -> None:
    stopped = outcome({"success": False, "cancelled": True, "error": "stopped: cancelled"})
    assert (stopped.status, stopped.error) == (Status.CANCELLED, "stopped: cancelled")


def test_a_job_that_stopped_by_itself_when_its_time_was_over_has_timed_out() -> None:
    message = {"success": False, "cancelled": True, "error": "stopped: timeout"}
    stopped = outcome(message, is_overdue=True)
    assert (stopped.status, stopped.error) == (Status.TIMEOUT, "stopped: timeout")


@pytest.mark.parametrize("status", [Status.ERROR, Status.TIMEOUT, Status.LOST])
def test_what_failed_is_queued_again_with_a_due_time(status: Status) -> None:
    after = after_attempt(RUNNING, Outcome(status, error="why"), NOW_US, 0.5)
    assert after == RUNNING._replace(
        status=Status.QUEUED, due_us=NOW_US + 2_000_000, error="why", instance=None
    )


def test_the_delay_grows_with_each_failure() -> None:
    second = after_attempt(RUNNING._replace(attempt=2), Outcome(Status.ERROR), NOW_US, 0.5)
    assert second.due_us == NOW_US + 6_000_000


@pytest.mark.parametrize("status", [Status.ERROR, Status.TIMEOUT, Status.LOST])
@pytest.mark.parametrize("attempt", [3, 4])
def test_the_last_attempt_is_final(status: Status, attempt: int) -> None:
    last = RUNNING._replace(attempt=attempt)
    after = after_attempt(last, Outcome(status, error="why"), NOW_US, 0.5)
    assert (after.status, after.completed_us, after.error) == (status, NOW_US, "why")
    assert after.is_final
    assert after.attempt == attempt


@pytest.mark.parametrize("status", [Status.ERROR, Status.TIMEOUT, Status.LOST])
def test_with_one_attempt_nothing_is_ever_repeated(status: Status) -> None:
    once = RUNNING._replace(retry=RetryPolicy(max_attempts=1))
    assert after_attempt(once, Outcome(status), NOW_US, 0.5).status is status


@pytest.mark.parametrize("status", [Status.SUCCESS, Status.CANCELLED])
def test_success_and_cancellation_are_final_at_once(status: Status) -> None:
    after = after_attempt(RUNNING, Outcome(status, result=5), NOW_US, 0.5)
    assert (after.status, after.result, after.completed_us) == (status, 5, NOW_US)


def test_success_clears_the_error_of_an_earlier_attempt() -> None:
    retried = RUNNING._replace(attempt=2, error="first failure")
    assert after_attempt(retried, Outcome(Status.SUCCESS), NOW_US, 0.5).error is None


def test_an_execution_stays_the_same_execution() -> None:
    for status in (Status.ERROR, Status.SUCCESS):
        after = after_attempt(RUNNING, Outcome(status), NOW_US, 0.5)
        assert after.execution_id == RUNNING.execution_id
        assert (after.created_us, after.started_us) == (RUNNING.created_us, RUNNING.started_us)
