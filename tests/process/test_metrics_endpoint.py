"""GET /metrics of a server that has done something."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from appliance import Appliance, wait_for
from prometheus import Family, parse_metrics


def scrape(site: Appliance) -> dict[str, Family]:
    answer = site.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse_metrics(answer.body.decode())


def test_what_was_done_is_counted(appliance: Callable[..., Appliance]) -> None:
    site = appliance().run()
    site.handler("Example")
    for method, params in (("echo", {"text": "x"}), ("fail", {})):
        body = {"handler_id": "example", "method_name": method, "job_params": params}
        site.post("/api/run_now", {**body, "retry": {"max_attempts": 1}})
    trigger = {"type": "interval", "seconds": 1}
    call = {"handler_id": "example", "method_name": "echo", "job_params": {"text": "y"}}
    site.post("/api/schedule", {**call, "trigger_config": trigger, "schedule_id": "each-second"})
    site.get("/api/schedules/each-second")
    site.get("/api/schedules/none")
    site.get("/no/such/file")

    def fired() -> dict[str, Family] | None:
        found = scrape(site)
        return found if found["schedulezero_fire_lateness_seconds"].value("_count") else None

    families = wait_for(fired, "a fire")
    executions = families["schedulezero_executions_total"]
    assert executions.value(status="error") == 1
    assert executions.value(status="success") >= 1
    assert families["schedulezero_execution_duration_seconds"].value("_count") >= 2
    assert families["schedulezero_handler_up"].value(handler_id="example") == 1
    commits = families["schedulezero_store_commits_total"].value()
    assert 0 < commits <= families["schedulezero_store_commit_seconds"].value("_count") + 1
    requests = families["schedulezero_http_requests_total"]
    one = {"method": "GET", "route": "/api/schedules/{schedule_id}"}
    assert requests.value(**one, status="200") == 1
    assert requests.value(**one, status="404") == 1
    assert requests.value(method="GET", route="static", status="404") == 1
    assert families["schedulezero_store_up"].value() == 1
    assert families["process_resident_memory_bytes"].value() > 1 << 20


def test_schedules_are_counted_by_their_state(appliance: Callable[..., Appliance]) -> None:
    site = appliance(handlers={"absent": {"command": ["true"]}}).run()
    hourly = {"type": "interval", "hours": 1}
    body = {"handler_id": "absent", "method_name": "work", "trigger_config": hourly}
    for schedule_id in ("a", "b", "c", "d"):
        assert site.post("/api/schedule", {**body, "schedule_id": schedule_id}).status == 201
    site.post("/api/schedules/b/pause")
    site.stop()
    database = site.directory / "data" / "default" / "schedulezero.db"
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.execute("UPDATE states SET quarantined = 'no such zone' WHERE key > 2")
        db.commit()
    site.run()
    counted = scrape(site)["schedulezero_schedules"]
    states = ("active", "paused", "quarantined")
    assert [counted.value(state=state) for state in states] == [1, 1, 2]


def test_no_client_can_make_up_a_label(appliance: Callable[..., Appliance]) -> None:
    site = appliance().run()
    for number in range(20):
        site.get(f"/api/schedules/invented-{number}")
        site.get(f"/api/invented-{number}")
        site.request("PUT", f"/invented-{number}")
    text = site.get("/metrics").body.decode()
    assert "invented" not in text
    assert text.count("schedulezero_http_requests_total{") < 15


def test_what_waits_has_a_number_and_an_age(appliance: Callable[..., Appliance]) -> None:
    site = appliance().run()
    handler = site.handler("Example")
    handler.terminate()
    handler.wait(10)
    site.wait_connected("example", "Disconnected")
    body = {"handler_id": "example", "method_name": "echo", "job_params": {"text": "x"}}
    assert site.post("/api/run_now", {**body, "wait": False}).status == 202
    families = wait_for(
        lambda: (f := scrape(site))["schedulezero_queue_oldest_age_seconds"].value() and f, "an age"
    )
    assert families["schedulezero_queue_executions"].value(state="ready") == 1
    assert families["schedulezero_handler_up"].value(handler_id="example") == 0


def test_the_governor_s_restarts_are_shown(appliance: Callable[..., Appliance]) -> None:
    site = appliance(handlers={"brief": {"command": ["sh", "-c", "sleep 0.1; exit 1"]}}).run("run")
    wait_for(
        lambda: scrape(site)["schedulezero_restarts_total"].value(process="brief"), "a restart"
    )
    assert scrape(site)["schedulezero_restarts_total"].value(process="server") == 0


def test_health_tells_memory_and_what_was_written(appliance: Callable[..., Appliance]) -> None:
    health = appliance().run().get("/api/health").json()
    assert health["memory_bytes"] > 1 << 20
    assert health["disk_written_bytes"] >= 0


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: prometheus) is absent")
def test_promtool_finds_nothing_to_criticise(appliance: Callable[..., Appliance]) -> None:
    site = appliance().run()
    site.handler("Example")
    text = site.get("/metrics").body
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: prometheus) is absent")
def test_the_grafana_dashboard_is_served_and_its_expressions_are_sound(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    answer = appliance().run().get("/grafana.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    expressions = (t["expr"] for panel in answer.json()["panels"] for t in panel["targets"])
    rules = [
        {"record": f"panel:{n}", "expr": expression.replace("$__rate_interval", "5m")}
        for n, expression in enumerate(expressions)
    ]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "g", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], check=True)
