"""The handler's side of the protocol without a socket: messages and time in, messages out."""

from __future__ import annotations

import json
import os
import time

import handler
import pytest
from handler import Job, ProtocolError, Session, Spool, failure, success

PROFILE = {"handler_id": "h", "instance": "abc", "methods": [], "concurrency": 2}
ADMITTED = {"success": True, "reply_to": "register", "status": "registered", "forget": []}


def sent(session):
    """What the session wants sent, taken from it."""
    messages = [json.loads(body) for body in session.outgoing]
    session.outgoing.clear()
    return messages


def methods(messages):
    return [message.get("method", message.get("id")) for message in messages]


def call(session, call_id, now=0.0, **extras):
    return session.receive({"id": call_id, "method": "m", "params": {}, **extras}, now)


def end(session, job, now=0.0, result=None):
    session.finish(job, success(job.id, result, 1.0), now)


@pytest.fixture
def session():
    it = Session(PROFILE)
    it.opened(0.0)
    return it


@pytest.fixture
def registered(session):
    session.receive({"method": "hello", "params": {}}, 0.0)
    session.receive(ADMITTED, 0.0)
    sent(session)
    return session


# --- Registering ------------------------------------------------------------------------------


def test_a_hello_is_answered_with_a_registration(session):
    session.receive({"method": "hello", "params": {}}, 0.0)
    (message,) = sent(session)
    assert message["method"] == "register"
    assert message["params"] == {**PROFILE, "running": [], "finished": []}


def test_without_a_hello_it_registers_unasked_after_a_second(session):
    assert session.tick(0.5) == 1.0
    assert sent(session) == []
    session.tick(1.0)
    assert methods(sent(session)) == ["register"]


def test_an_unanswered_registration_is_repeated(session):
    session.receive({"method": "hello", "params": {}}, 0.0)
    sent(session)
    session.tick(4.9)
    assert sent(session) == []
    session.tick(5.0)
    assert methods(sent(session)) == ["register"]


@pytest.mark.parametrize("about", [{"reply_to": "register"}, {}])
def test_a_refused_registration_is_repeated_later_and_logged_once(session, caplog, about):
    for now in (0.0, 5.0):
        session.tick(now + 1)
        session.receive({"success": False, "error": "no such luck", **about}, now + 1)
    assert methods(sent(session)) == ["register", "register"]
    assert not session.registered
    assert caplog.text.count("no such luck") == 1


def test_it_beats_every_two_seconds_once_registered(registered):
    beats = []
    for tenth in range(90):
        registered.tick(tenth / 10)
        beats += [tenth / 10 for message in sent(registered) if message["method"] == "heartbeat"]
    assert beats == [2.0, 4.0, 6.0, 8.0]


def test_an_unknown_instance_registers_at_once(registered):
    registered.receive({"success": False, "code": "unknown_instance", "error": ""}, 3.0)
    assert methods(sent(registered)) == ["register"]
    registered.tick(3.5)
    assert sent(registered) == []


def test_the_server_counts_as_gone_after_ten_seconds_of_silence(registered):
    registered.receive({"method": "heartbeat", "params": {}}, 5.0)
    assert not registered.is_silent(15.0)
    assert registered.is_silent(15.1)
    registered.closed()
    assert registered.tick(1_000.0) == handler.NEVER and sent(registered) == []


# --- Calls and results ------------------------------------------------------------------------


def test_a_call_starts_a_job_and_its_result_is_kept_until_acknowledged(registered):
    job = call(registered, "e1:1")
    assert isinstance(job, Job) and "e1:1" in registered.running
    end(registered, job, result=5)
    assert [m["result"] for m in sent(registered)] == [5]
    assert list(registered.finished) == ["e1:1"]
    registered.receive({"method": "ack", "params": {"id": "e1:1"}}, 0.1)
    assert not registered.finished and not registered.running


def test_several_results_are_acknowledged_at_once(registered):
    for call_id in ("e1:1", "e2:1"):
        end(registered, call(registered, call_id))
    registered.receive({"method": "ack", "params": {"ids": ["e1:1", "e2:1", 5, None]}}, 0.1)
    assert not registered.finished


def test_an_unacknowledged_result_is_repeated_every_five_seconds(registered):
    end(registered, call(registered, "e1:1"))
    sent(registered)
    times = []
    for second in range(16):
        registered.receive({"method": "heartbeat", "params": {}}, second)
        registered.tick(float(second))
        times += [second for message in sent(registered) if message.get("id") == "e1:1"]
    assert times == [5, 10, 15]


def test_a_repeated_call_starts_nothing(registered):
    job = call(registered, "e1:1")
    assert call(registered, "e1:1") is None and sent(registered) == []
    end(registered, job)
    sent(registered)
    assert call(registered, "e1:1") is None
    assert methods(sent(registered)) == ["e1:1"]


def test_calls_beyond_the_promised_number_are_refused(registered):
    call(registered, "e1:1"), call(registered, "e2:1")
    assert call(registered, "e3:1") is None
    (refusal,) = sent(registered)
    assert refusal["refused"] is True and refusal["id"] == "e3:1" and not refusal["success"]
    assert "e3:1" not in registered.finished


def test_a_draining_handler_refuses_calls_and_says_so_after_every_registration(registered):
    registered.drain()
    assert sent(registered)[0]["params"]["status"] == "draining"
    call(registered, "e1:1")
    assert sent(registered)[0]["refused"] is True
    registered.receive({"method": "hello", "params": {}}, 1.0)
    registered.receive(ADMITTED, 1.0)
    assert methods(sent(registered)) == ["register", "report_status"]


def test_too_many_undelivered_results_make_it_refuse(registered):
    for n in range(handler.MAX_UNDELIVERED):
        end(registered, call(registered, f"e{n}:1"))
    sent(registered)
    assert call(registered, "late:1") is None
    assert "not acknowledged" in sent(registered)[0]["error"]
    registered.receive({"method": "ack", "params": {"id": "e0:1"}}, 0.0)
    assert call(registered, "late:1")


def test_too_many_undelivered_bytes_make_it_refuse(registered):
    for n in range(17):
        end(registered, call(registered, f"e{n}:1"), result="x" * 1_000_000)
    assert call(registered, "late:1") is None
    for n in range(17):
        registered.receive({"method": "ack", "params": {"id": f"e{n}:1"}}, 0.0)
    assert call(registered, "late:1")


# --- Cancelling -------------------------------------------------------------------------------


def test_a_cancellation_reaches_the_job_with_its_reason(registered):
    job = call(registered, "e1:1")
    registered.receive({"method": "cancel", "params": {"id": "e1:1", "reason": "replaced"}}, 1.0)
    assert job.cancelled and job.reason == "replaced"
    registered.receive({"method": "cancel", "params": {"id": "unknown"}}, 1.0)


def test_a_job_is_told_to_stop_a_second_after_its_timeout(registered):
    job = call(registered, "e1:1", timeout=3)
    assert registered.tick(1.0) == 2.0
    registered.tick(3.9)
    assert not job.cancelled
    registered.tick(4.0)
    assert job.reason == "timeout"


# --- Losing the connection --------------------------------------------------------------------


def test_a_new_registration_names_what_runs_and_what_finished(registered):
    call(registered, "e1:1")
    end(registered, call(registered, "e2:1"), result="done")
    registered.opened(20.0)
    registered.receive({"method": "hello", "params": {}}, 20.0)
    (message,) = sent(registered)
    assert message["params"]["running"] == ["e1:1"]
    assert [m["result"] for m in message["params"]["finished"]] == ["done"]
    registered.receive(ADMITTED, 20.0)
    assert sent(registered) == []
    registered.receive({"method": "ack", "params": {"id": "e2:1"}}, 20.0)
    assert not registered.finished


def test_a_result_of_the_time_without_server_waits_for_the_registration(registered):
    job = call(registered, "e1:1")
    registered.closed()
    end(registered, job)
    assert sent(registered) == []
    registered.opened(5.0)
    registered.tick(6.0)
    assert sent(registered)[0]["params"]["finished"][0]["id"] == "e1:1"


def test_the_last_words_of_a_job_precede_its_result_after_the_registration(registered):
    job = call(registered, "e1:1")
    registered.closed()
    job.outbox.write("stdout", "goodbye\n")
    end(registered, job)
    registered.opened(5.0)
    registered.tick(6.0)
    (message,) = sent(registered)
    assert message["params"]["running"] == ["e1:1"] and message["params"]["finished"] == []
    registered.receive(ADMITTED, 6.0)
    log, result = sent(registered)
    assert log["params"]["lines"][0][2] == "goodbye" and result["id"] == "e1:1"


def test_a_registration_stays_below_the_limit_however_much_is_undelivered(registered):
    for n in range(14):
        end(registered, call(registered, f"e{n}:1"), result="x" * 200_000)
    registered.opened(9.0)
    registered.outgoing.clear()
    registered.tick(10.0)
    assert len(registered.outgoing[0]) < handler.MAX_MESSAGE_BYTES
    (message,) = sent(registered)
    there = [each["id"] for each in message["params"]["finished"]]
    assert len(there) == 2 and len(message["params"]["running"]) == 12
    registered.receive(ADMITTED, 10.0)
    assert sorted(there + methods(sent(registered))) == sorted(f"e{n}:1" for n in range(14))


def test_what_the_server_wants_forgotten_is_stopped_or_dropped(registered):
    running = call(registered, "e1:1")
    end(registered, call(registered, "e2:1"))
    registered.receive({**ADMITTED, "forget": ["e1:1", "e2:1", "e3:1", 4, None]}, 1.0)
    assert running.cancelled and not registered.finished
    sent(registered)
    registered.finish(running, failure("e1:1", "stopped"), 1.0)
    assert sent(registered) == [] and not registered.finished


def test_logs_wait_while_there_is_no_server(registered):
    job = call(registered, "e1:1")
    registered.closed()
    job.outbox.write("stdout", "hello\n")
    registered.tick(1e9)
    assert sent(registered) == []
    registered.opened(1e9)
    registered.receive(ADMITTED, 1e9)
    registered.tick(1e9)
    assert methods(sent(registered)) == ["log"]


# --- Hostile messages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"success": True},
        {"success": []},
        {"success": False, "reply_to": {}, "code": []},
        {"method": None},
        {"method": 5, "params": {}},
        {"method": {}, "params": {}},
        {"method": "ack"},
        {"method": "ack", "params": []},
        {"method": "ack", "params": {"id": {}, "ids": {}}},
        {"method": "cancel", "params": {"id": []}},
        {"method": "nonsense", "params": {}},
        {"success": True, "reply_to": "register", "forget": {"a": 1}},
        {"success": True, "reply_to": "register", "status": [[]]},
    ],
)
def test_nonsense_changes_nothing(registered, message):
    assert registered.receive(message, 1.0) is None
    assert registered.registered and not registered.running


def test_a_malformed_call_is_a_protocol_error(registered):
    with pytest.raises(ProtocolError):
        registered.receive({"id": "e1:1", "method": 5}, 1.0)


# --- The spool --------------------------------------------------------------------------------


def test_spooled_results_are_delivered_by_the_next_process(tmp_path):
    spool = Spool(str(tmp_path / "a" / "b"))
    for n in range(3):
        spool.save(f"e{n}:1", success(f"e{n}:1", n, 1.0))
    session = Session(PROFILE, Spool(str(tmp_path / "a" / "b")))
    assert {call_id: json.loads(it.body)["result"] for call_id, it in session.finished.items()} == {
        "e0:1": 0, "e1:1": 1, "e2:1": 2,
    }  # fmt: skip
    session.receive({"method": "ack", "params": {"ids": ["e0:1", "e1:1", "e2:1"]}}, 0.0)
    assert not list((tmp_path / "a" / "b").iterdir())


def test_an_id_cannot_leave_the_spool(tmp_path):
    spool = Spool(str(tmp_path / "spool"))
    for call_id in ("../../x:1", "/etc/x:1", "\0:1", "ä" * 60):
        spool.save(call_id, success(call_id, 1, 1.0))
    assert set(spool.load()) == {"../../x:1", "/etc/x:1", "\0:1", "ä" * 60}
    assert len(list((tmp_path / "spool").iterdir())) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["spool"]


def test_torn_and_foreign_files_are_set_aside(tmp_path):
    spool = Spool(str(tmp_path))
    spool.save("e1:1", success("e1:1", 1, 1.0))
    (tmp_path / "6465.result").write_bytes(b'{"id":"other"}')
    (tmp_path / "zz.result").write_bytes(b"{}")
    (tmp_path / "6466.result").write_bytes(b"")
    for name, age_s in (("old.tmp", 4_000), ("young.tmp", 0)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    (tmp_path / "notes.txt").write_bytes(b"mine")
    assert list(spool.load()) == ["e1:1"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [
        ".bad", ".bad", ".bad", ".result", ".tmp", ".txt",
    ]  # fmt: skip


def test_a_spool_that_cannot_be_written_costs_no_result(tmp_path, caplog):
    spool = Spool(str(tmp_path / "spool"))
    (tmp_path / "spool").rmdir()
    spool.save("e1:1", b"{}")
    assert "kept in memory only" in caplog.text
