"""A server that outgrows its limit starts anew, and nobody's work is lost."""

from __future__ import annotations

from collections.abc import Callable

from appliance import Appliance, wait_for


def test_over_its_limit_the_server_starts_anew_and_running_jobs_go_on(
    appliance: Callable[..., Appliance],
) -> None:
    site = appliance(memory_limit=16).run("run")
    site.handler("Example")
    body = {"handler_id": "example", "method_name": "sleep", "job_params": {"seconds": 6}}
    answer = site.post("/api/run_now", {**body, "wait": False, "retry": {"max_attempts": 1}})
    execution_id = answer.json()["execution_id"]
    log = site.directory / "logs" / "default" / "governor" / "governor.log"
    wait_for(lambda: "exit code 79" in log.read_text(), "the server's end")
    assert "the limit is 16" in (log.parent.parent / "server" / "server.log").read_text()
    site.write_config(memory_limit=10_000)
    assert site.cli("reload").returncode == 0
    site.wait_healthy()
    site.wait_connected("example")
    execution = site.wait_execution(execution_id)
    assert (execution["status"], execution["attempt_number"]) == ("success", 1)
