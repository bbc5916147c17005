from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import schedulezero
from schedulezero import (
    DYING,
    EXIT_CONFIG,
    EXIT_RENEW,
    NEXT_STATE,
    RESET_S,
    AlreadyRunning,
    ChildEvent,
    ChildState,
    ChildStatus,
    Clock,
    connect_endpoint,
    describe_exit,
    exit_event,
    find_governor,
    find_handler_file,
    next_status,
    open_lock,
    restart_delay_s,
    trim_log,
)

SPAWN, UP, DEATH = ChildEvent.SPAWN, ChildEvent.UP, ChildEvent.DEATH
ALIVE = {ChildState.STARTING, ChildState.RUNNING, ChildState.STOPPING}
LATE_DEATH, REFUSAL, STOP = ChildEvent.LATE_DEATH, ChildEvent.REFUSAL, ChildEvent.STOP


def after(*events: ChildEvent, now_s: float = 100.0) -> ChildStatus:
    status = ChildStatus()
    for event in events:
        status = next_status(status, event, now_s, "a reason")
    return status


def test_the_delay_doubles_from_one_second_to_a_minute() -> None:
    delays = [restart_delay_s(failures) for failures in range(1, 10)]
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert restart_delay_s(10_000) == 60


@pytest.mark.parametrize(
    ("exit_code", "up_s", "event"),
    [
        (0, 1, DEATH),
        (1, RESET_S - 0.1, DEATH),
        (1, RESET_S, LATE_DEATH),
        (-9, 1, DEATH),
        (EXIT_CONFIG, 1, REFUSAL),
        (EXIT_CONFIG, 1_000, REFUSAL),
    ],
)
def test_an_exit_is_an_event(exit_code: int, up_s: float, event: ChildEvent) -> None:
    assert exit_event(exit_code, up_s) is event


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ((), "STOPPED"),
        ((SPAWN,), "STARTING"),
        ((SPAWN, UP), "RUNNING"),
        ((SPAWN, DEATH), "BACKOFF"),
        ((SPAWN, UP, DEATH), "BACKOFF"),
        ((SPAWN, UP, LATE_DEATH), "EXITED"),
        ((SPAWN, REFUSAL), "FATAL"),
        ((SPAWN, UP, REFUSAL), "FATAL"),
        ((SPAWN, STOP), "STOPPING"),
        ((SPAWN, UP, STOP, DEATH), "STOPPED"),
        ((SPAWN, UP, STOP, REFUSAL), "STOPPED"),
        ((SPAWN, DEATH, STOP), "STOPPED"),
        ((SPAWN, REFUSAL, STOP), "STOPPED"),
        ((SPAWN, DEATH, SPAWN), "STARTING"),
    ],
)
def test_the_events_lead_to_the_state(events: tuple[ChildEvent, ...], state: str) -> None:
    assert after(*events).state == state


def test_a_dead_child_is_started_again_later_each_time() -> None:
    once = after(SPAWN, DEATH)
    assert (once.start_s, once.failures, once.reason) == (101.0, 1, "a reason")
    twice = after(SPAWN, DEATH, SPAWN, DEATH)
    assert (twice.start_s, twice.failures, twice.restarts) == (102.0, 2, 1)


def test_a_long_life_forgives_the_failures_before_it() -> None:
    status = after(SPAWN, DEATH, SPAWN, DEATH, SPAWN, UP, LATE_DEATH)
    assert (status.failures, status.start_s, status.restarts) == (1, 101.0, 2)


@pytest.mark.parametrize("events", [(SPAWN, REFUSAL), (SPAWN, STOP, DEATH), (SPAWN, DEATH, STOP)])
def test_a_refused_or_stopped_child_is_not_started_again(events: tuple[ChildEvent, ...]) -> None:
    assert after(*events).start_s is None


def test_a_renewal_starts_it_again_at_once_and_counts_as_no_restart() -> None:
    old = ChildStatus(ChildState.RUNNING, spawned_s=100.0, failures=4, restarts=2)
    event = exit_event(EXIT_RENEW, RESET_S)
    ended = next_status(old, event, 200.0, "exit code 79")
    assert (ended.state, ended.start_s, ended.failures) == (ChildState.EXITED, 200.0, 0)
    assert next_status(ended, ChildEvent.SPAWN, 200.0).restarts == 2


def test_a_renewal_that_did_not_help_waits_like_a_death() -> None:
    assert exit_event(EXIT_RENEW, RESET_S - 1) is ChildEvent.DEATH


def test_every_living_state_meets_every_way_to_die() -> None:
    # Also STARTING that of a long life: the governor itself may have been stopped meanwhile.
    for pair in itertools.product(ALIVE, {*DYING, ChildEvent.RENEWAL}):
        assert pair in NEXT_STATE
    for state in ChildState:
        assert (state, STOP) in NEXT_STATE
        assert ((state, SPAWN) in NEXT_STATE) == (state not in ALIVE)


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        (0, "exit code 0"),
        (78, "exit code 78"),
        (-9, "killed by SIGKILL"),
        (-40, "killed by signal 40"),
    ],
)
def test_an_exit_is_told_in_words(exit_code: int, words: str) -> None:
    assert describe_exit(exit_code) == words


@pytest.mark.parametrize(
    ("host", "endpoint"),
    [
        ("127.0.0.1", "tcp://127.0.0.1:4242"),
        ("0.0.0.0", "tcp://127.0.0.1:4242"),
        ("::", "tcp://[::1]:4242"),
        ("fe80::1", "tcp://[fe80::1]:4242"),
        ("box.local", "tcp://box.local:4242"),
    ],
)
def test_a_socket_on_every_interface_is_reached_on_this_machine(host: str, endpoint: str) -> None:
    assert connect_endpoint(host, 4242) == endpoint


def test_a_handler_file_is_looked_for_beside_the_configuration_first(tmp_path: Path) -> None:
    assert find_handler_file("mine.py:Mine", str(tmp_path)) is None
    (tmp_path / "mine.py").touch()
    assert find_handler_file("mine.py:Mine", str(tmp_path)) == (str(tmp_path / "mine.py"), "Mine")


# The lock.


def test_one_process_holds_a_data_directory(tmp_path: Path) -> None:
    directory = str(tmp_path / "data")
    assert find_governor(directory) is None
    fd = open_lock(directory, Clock())
    assert find_governor(directory) == os.getpid()
    with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()} holds"):
        open_lock(directory, Clock())
    os.close(fd)
    assert find_governor(directory) is None


@pytest.mark.parametrize("content", ["", "1", "1 0", "x y", "1 2 3"])
def test_a_pid_that_was_left_in_the_file_is_never_believed(tmp_path: Path, content: str) -> None:
    fd = open_lock(str(tmp_path), Clock())
    (tmp_path / "governor.lock").write_text(content)
    assert find_governor(str(tmp_path)) is None
    os.close(fd)


# Logs that children write.


def test_a_log_that_grew_too_long_is_emptied_and_its_end_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedulezero, "COPY_BYTES", 30)
    path = tmp_path / "handler.log"
    with path.open("a") as child:
        for number in range(5):
            child.write(str(number) * 150)
            child.flush()
            trim_log(str(path), 100)
            assert path.stat().st_size == 0
        child.write("after")
    kept = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert kept == {
        "handler.log": "after",
        "handler.log.1": "4" * 100,
        "handler.log.2": "3" * 100,
        "handler.log.3": "2" * 100,
    }


def test_a_short_or_missing_log_is_left_alone(tmp_path: Path) -> None:
    trim_log(str(tmp_path / "none.log"), 100)
    (tmp_path / "short.log").write_text("x")
    trim_log(str(tmp_path / "short.log"), 100)
    assert [file.name for file in tmp_path.iterdir()] == ["short.log"]


def test_a_log_is_emptied_even_when_its_end_cannot_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "handler.log"
    path.write_text("x" * 200)
    (tmp_path / "handler.log.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        trim_log(str(path), 100)
    assert path.stat().st_size == 0
