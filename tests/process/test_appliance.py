"""The main job, end to end, on real processes: schedule, dispatch, result, history, restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from appliance import ROOT, Appliance, wait_for

PLAIN_HANDLER = Path(__file__).with_name("plain_handler.py")


def start_plain(appliance: Appliance, handler_id: str) -> subprocess.Popen[bytes]:
    server = f"tcp://127.0.0.1:{appliance.zmq_port}"
    process = subprocess.Popen(
        [sys.executable, str(PLAIN_HANDLER), server, handler_id],
        cwd=appliance.directory, start_new_session=True,
    )  # fmt: skip
    appliance.handlers.append(process)
    appliance.wait_connected(handler_id)
    return process


def add(handler_id: str, **more: object) -> dict[str, object]:
    return {
        "handler_id": handler_id,
        "method_name": "add",
        "job_params": {"a": 2, "b": 3},
        **more,
    }


def status_of(appliance: Appliance) -> dict[str, dict]:
    import json

    shown = json.loads(appliance.cli("status", "--json").stdout)
    return {process["name"]: process for process in shown["processes"]}


def test_a_call_reaches_a_dial_in_and_a_plain_handler_and_its_result_is_stored(appliance):
    one = appliance().run()
    one.handler("Example", "dialled")
    start_plain(one, "plain")
    for handler_id in ("dialled", "plain"):
        answer = one.post("/api/run_now", add(handler_id))
        assert answer.status == 200
        assert answer.json()["status"] == "success"
        assert answer.json()["result"] == 5
        stored = one.get(f"/api/executions/{answer.json()['execution_id']}").json()
        assert (stored["status"], stored["result"], stored["attempt_number"]) == ("success", 5, 1)


def test_a_failed_job_is_a_502_with_the_handlers_message_and_keeps_its_attempts(appliance):
    one = appliance().run()
    start_plain(one, "plain")
    retry = {"max_attempts": 2, "base_delay": 0.05}
    answer = one.post(
        "/api/run_now", {"handler_id": "plain", "method_name": "boom", "retry": retry}
    )
    assert answer.status == 502
    assert answer.json()["status"] == "error"
    assert "ZeroDivisionError" in answer.json()["error"]
    stored = one.get(f"/api/executions/{answer.json()['execution_id']}").json()
    assert [attempt["outcome"] for attempt in stored["attempts"]] == ["error", "error"]


def test_schedules_and_history_are_still_there_after_a_restart(appliance):
    one = appliance(handlers={"ex": {"run": "handler.py:Example"}})
    assert one.cli("start").returncode == 0
    one.wait_connected("ex")
    made = one.post("/api/schedule", add("ex", trigger_config={"type": "interval", "seconds": 1}))
    assert made.status == 201
    schedule_id = made.json()["schedule_id"]

    def runs() -> list[dict]:
        query = f"/api/executions?schedule_id={schedule_id}&status=success"
        return one.get(query).json()["records"]

    before = wait_for(runs, "a scheduled run")
    stopped = one.cli("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert one.cli("status").returncode == 3
    assert one.cli("start").returncode == 0
    assert [s["id"] for s in one.get("/api/schedules").json()["schedules"]] == [schedule_id]
    assert before[0]["execution_id"] in {run["execution_id"] for run in runs()}
    wait_for(lambda: len(runs()) > len(before), "it to go on")
    one.cli("stop")


def test_a_killed_server_and_a_killed_handler_come_back_and_nothing_is_lost(appliance):
    one = appliance(handlers={"ex": {"run": "handler.py:Example"}})
    assert one.cli("start").returncode == 0
    one.wait_connected("ex")
    accepted = [
        one.post("/api/run_now", {**add("ex"), "wait": False}).json()["execution_id"]
        for _ in range(20)
    ]
    os.kill(status_of(one)["server"]["pid"], signal.SIGKILL)
    one.wait_healthy()
    os.kill(status_of(one)["ex"]["pid"], signal.SIGKILL)
    accepted.append(one.post("/api/run_now", {**add("ex"), "wait": False}).json()["execution_id"])
    for execution_id in accepted:
        assert one.wait_execution(execution_id)["status"] == "success"
    restarts = {name: process["restarts"] for name, process in status_of(one).items()}
    assert (restarts["server"], restarts["ex"]) == (1, 1)
    one.cli("stop")


def test_two_deployments_run_side_by_side_with_separate_data_and_logs(appliance, tmp_path):
    one, two = appliance("one"), appliance("two")
    ports = {"http_port": two.http_port, "zmq_port": two.zmq_port}
    one.write_config(deployments={"clock": ports})
    try:
        assert one.cli("start").returncode == 0
        assert one.cli("--deployment", "clock", "start").returncode == 0
        two.wait_connected("ding-dong")
        said = two.post("/api/run_now", {"handler_id": "ding-dong", "method_name": "chime"})
        assert said.json()["result"]["said"].startswith("ding dong, it is ")
        assert one.get("/api/executions").json()["count"] == 0
        for name in ("default", "clock"):
            assert (one.directory / "data" / name / "schedulezero.db").exists()
            assert (one.directory / "logs" / name / "server" / "server.log").exists()
    finally:
        one.cli("--deployment", "clock", "stop")
        one.cli("stop")


def test_a_thousand_schedules_due_at_one_second_give_exactly_one_execution_each(appliance):
    one = appliance().run()
    one.handler("Example", "ex", "--concurrency", "50")
    due = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=6)
    trigger = {"type": "date", "run_date": due.isoformat()}
    for number in range(1000):
        body = add("ex", schedule_id=f"s-{number}", trigger_config=trigger)
        assert one.post("/api/schedule", body).status == 201

    def finished() -> list[dict]:
        records = one.get("/api/executions?limit=1000&status=success").json()["records"]
        return records if len(records) == 1000 else []

    records = wait_for(finished, "a thousand runs", 40)
    assert {record["schedule_id"] for record in records} == {f"s-{n}" for n in range(1000)}
    assert one.get("/api/executions/stats").json()["by_status"] == {"success": 1000}


def test_a_handler_that_dies_or_leaves_is_shown_as_disconnected(appliance):
    one = appliance().run()
    plain, dialled = start_plain(one, "plain"), one.handler("Example", "dialled")
    plain.kill()
    one.wait_connected("plain", "Disconnected")
    dialled.send_signal(signal.SIGTERM)
    one.wait_connected("dialled", "Disconnected")
    start_plain(one, "plain")
    assert one.post("/api/run_now", add("plain")).json()["result"] == 5


def test_a_slow_handler_does_not_delay_another(appliance):
    one = appliance().run()
    start_plain(one, "slow")
    one.handler("Example", "quick")
    slow = {"handler_id": "slow", "method_name": "slow", "job_params": {"seconds": 30}}
    running = one.post("/api/run_now", {**slow, "wait": False}).json()["execution_id"]
    one.wait_execution(running, "running")
    assert one.post("/api/run_now", add("quick")).json()["result"] == 5
    assert one.get(f"/api/executions/{running}").json()["status"] == "running"


def test_bad_requests_get_a_sentence_that_names_the_field(appliance):
    one = appliance().run()
    one.handler("Example", "ex")
    interval = {"type": "interval", "hours": 1}
    past = {"type": "date", "run_date": "2020-01-01T00:00:00Z"}
    cases = [
        (b"{", 400, "JSON"),
        (b'{"a": NaN}', 400, "NaN"),
        (b'{"handler_id": "a", "handler_id": "b"}', 400, "twice"),
        (b"[" * 5000 + b"]" * 5000, 400, "nested"),
        (b'"\xff"', 400, "UTF-8"),
        (add("nobody", trigger_config=interval), 404, "nobody"),
        ({**add("ex", trigger_config=interval), "method_name": "nope"}, 400, "nope"),
        (add("ex", trigger_config={"type": "interval", "seconds": 0}), 400, "1 second"),
        (add("ex", trigger_config={"type": "cron", "month": 2, "day": 30}), 400, "never"),
        (add("ex", trigger_config=past), 400, "past"),
        (add("ex", trigger_config=interval, timeout="soon"), 400, "timeout"),
        (add("ex", trigger_config=interval, colour="red"), 400, "colour"),
        (add("ex"), 400, "trigger_config"),
        (b'{"x": "' + b"a" * (2 << 20) + b'"}', 413, "bytes"),
    ]
    for body, status, word in cases:
        answer = one.post("/api/schedule", body)
        assert (answer.status, answer.json()["status"]) == (status, "error"), (body, answer.body)
        assert word in answer.json()["error"], answer.body
    taken = add("ex", schedule_id="taken", trigger_config=interval)
    assert [one.post("/api/schedule", taken).status for _ in range(2)] == [201, 409]
    assert "Traceback" not in one.output


def test_the_installed_command_says_what_is_wrong_in_one_line(appliance):
    one = appliance(http_prot=8888)
    checked = one.cli("check")
    assert checked.returncode == 78
    assert "http_prot" in checked.stderr and "http_port" in checked.stderr
    assert checked.stderr.count("\n") == 1
    assert ROOT.name not in checked.stdout


def test_a_cancel_that_was_answered_survives_a_killed_server(appliance):
    one = appliance().run()
    handler = one.handler("Example", "ex")
    body = {"handler_id": "ex", "method_name": "sleep", "job_params": {"seconds": 600}}
    execution_id = one.post("/api/run_now", {**body, "wait": False}).json()["execution_id"]
    one.wait_execution(execution_id, "running")
    handler.send_signal(signal.SIGSTOP)  # it does not hear of the cancel yet
    assert one.post(f"/api/executions/{execution_id}/cancel").status == 200
    one.kill()
    one.run()
    handler.send_signal(signal.SIGCONT)
    assert one.wait_execution(execution_id)["status"] == "cancelled"


def test_the_status_of_a_server_alone_says_where_it_is(appliance):
    one = appliance().run()
    first = one.cli("status").stdout.splitlines()[0]
    assert first.endswith(f" (default) on http://127.0.0.1:{one.http_port}")


def test_a_server_alone_is_told_to_reload(appliance):
    one = appliance().run()
    hourly = add("ex", trigger_config={"type": "interval", "hours": 1})
    one.write_config(schedules={"hourly": hourly})
    reloaded = one.cli("reload")
    assert reloaded.returncode == 0, reloaded.stderr
    wait_for(lambda: one.get("/api/schedules").json()["count"], "the declared schedule")
