"""`export` and `import` with a real server: round trips, dry runs, pruning and crontabs."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from appliance import Appliance
from test_tls import make_certificate

SHELL = {"shell": {"run": "handler.py:Shell", "config": {"allow_any": True}}}
CALL = {"handler_id": "example", "method_name": "echo"}
BODIES: dict[str, dict[str, Any]] = {
    "hourly": {"trigger_config": {"type": "interval", "hours": 1}, "name": "Every hour"},
    "weekly": {
        "trigger_config": {"type": "cron", "expression": "30 9 * * mon"},
        "job_params": {"n": 1, "x": [None, "yes"]},
        "retry": {"max_attempts": 1},
        "paused": True,
    },
}
PLANNED = ("next_fire_time", "generation", "created_at", "updated_at")


def shown(server: Appliance) -> dict[str, Any]:
    return {s["id"]: s for s in server.get("/api/schedules").json()["schedules"]}


def definitions(server: Appliance) -> dict[str, Any]:
    return {
        key: {name: value for name, value in schedule.items() if name not in PLANNED}
        for key, schedule in shown(server).items()
    }


def filled(server: Appliance) -> Appliance:
    for schedule_id, body in BODIES.items():
        body = {**CALL, **body}
        assert server.request("PUT", f"/api/schedules/{schedule_id}", body).status == 201
    return server


def test_an_export_imported_elsewhere_makes_equal_schedules_and_a_second_time_nothing(
    appliance: Callable[..., Appliance],
) -> None:
    source = filled(appliance("source").run())
    written = source.cli("export", "out.yaml")
    assert (written.returncode, written.stdout, written.stderr) == (0, "", "")
    file = str(source.directory / "out.yaml")
    source.stop()
    assert source.cli("export").stdout == Path(file).read_text()

    target = appliance("target").run()
    dry = target.cli("import", file, "--dry-run")
    assert dry.returncode == 4
    assert dry.stdout.splitlines()[0] == "+ hourly  example.echo, every hour"
    assert "there is no handler 'example' yet" in dry.stderr
    assert shown(target) == {}
    done = target.cli("import", file)
    assert (done.returncode, done.stdout) == (0, dry.stdout)
    assert "there is no handler 'example'" in done.stderr
    assert definitions(target) == definitions(source.run())
    before = shown(target)
    again = target.cli("import", file)
    assert (again.returncode, again.stdout) == (0, "= 2 unchanged\n")
    assert shown(target) == before
    audit = [entry["action"] for entry in target.get("/api/audit").json()["entries"]]
    assert audit == ["put_schedule", "put_schedule"]


def test_an_import_shows_and_makes_changes_and_prunes_only_what_the_api_made(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    declared = {**CALL, "trigger_config": {"type": "cron", "minute": "0"}}
    server = filled(appliance(schedules={"declared": declared}).run())
    exported = server.cli("export", "--api").stdout
    assert "declared:" not in exported
    assert "declared:" in server.cli("export", "--declared").stdout
    assert "exclude each other" in server.cli("export", "--declared", "--api").stderr
    file = tmp_path / "in.yaml"
    head, _, _ = exported.partition("  weekly:")
    file.write_text(head.replace("Every hour", "Each hour"))
    expected = ['~ hourly  name: "Every hour" → "Each hour"', "- weekly", "= 0 unchanged"]
    dry = server.cli("import", str(file), "--prune", "--dry-run")
    assert (dry.returncode, dry.stdout.splitlines()) == (4, expected)
    planned = shown(server)["hourly"]["next_fire_time"]
    done = server.cli("import", str(file), "--prune")
    assert (done.returncode, done.stdout.splitlines()) == (0, expected)
    now = shown(server)
    assert sorted(now) == ["declared", "hourly"]
    assert (now["hourly"]["name"], now["hourly"]["next_fire_time"]) == ("Each hour", planned)
    file.write_text("schedules: {}\n")
    refused = server.cli("import", str(file), "--prune")
    assert (refused.returncode, "nothing is deleted" in refused.stderr) == (1, True)
    file.write_text(exported.replace("type: interval", "type: intervall"))
    refused = server.cli("import", str(file))
    assert (refused.returncode, refused.stdout) == (78, "")
    assert "in.yaml line 6: schedules.hourly.trigger_config.type" in refused.stderr
    assert shown(server) == now


def test_a_crontab_is_imported_and_its_lines_run(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    server = appliance(handlers=SHELL).run()
    server.handler("Shell", "shell", "--config", json.dumps({"allow_any": True}))
    crontab = (
        'MAILTO=""\nGREETING="good day"\n# m h dom mon dow command\n'
        "# Say it\n0 5 * * * echo $GREETING; cat; date +\\%Y%and more\n"
    )
    command = [sys.executable, "-m", "schedulezero", "--config", str(server.config), "import", "-"]
    nameless = subprocess.run(command, input=crontab, capture_output=True, text=True,
                              env=server.environ, check=False)  # fmt: skip
    assert (nameless.returncode, "--handler ID" in nameless.stderr) == (1, True)
    for expected in ("+ cron-echo-", "= 1 unchanged"):
        done = subprocess.run([*command, "--handler", "shell"], input=crontab, text=True,
                              capture_output=True, env=server.environ, check=False)  # fmt: skip
        assert (done.returncode, done.stdout.startswith(expected)) == (0, True), done.stderr
    (schedule,) = shown(server).values()
    assert schedule["name"] == "Say it"
    ran = server.post(f"/api/schedules/{schedule['id']}/run", {"wait": True}).json()
    greeting, given, year = ran["result"]["stdout"].splitlines()
    assert (greeting, given, len(year)) == ("good day", "and more", 4)
    file = tmp_path / "crontab"
    file.write_text("@daily true\n")
    pruned = server.cli("import", str(file), "--handler", "other", "--prune", "--dry-run")
    assert "- " not in pruned.stdout
    pruned = server.cli("import", str(file), "--handler", "shell", "--prune")
    assert f"- {schedule['id']}" in pruned.stdout.splitlines()
    assert [each[:9] for each in shown(server)] == ["cron-true"]


def test_an_import_brings_its_own_token_where_one_is_needed_and_leaves_none(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    server = appliance(auth="required", **make_certificate(tmp_path))
    server.cli("token", "create", "me", "--role", "viewer")
    assert server.cli("start").returncode == 0
    file = tmp_path / "in.yaml"
    file.write_text(json.dumps({"schedules": {"a": {**CALL, **BODIES["hourly"]}}}))
    done = server.cli("import", str(file))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "= 0 unchanged"), done.stderr
    assert server.cli("import", str(file)).stdout == "= 1 unchanged\n"
    tokens = json.loads(server.cli("token", "list", "--json").stdout)["tokens"]
    assert [token["name"] for token in tokens] == ["me"]
    # Another certificate than the configured one: no token is sent there.
    Path(server.settings["tls_cert"]).write_bytes(
        Path(make_certificate(tmp_path, "other")["tls_cert"]).read_bytes()
    )
    file.write_text(json.dumps({"schedules": {"b": {**CALL, **BODIES["hourly"]}}}))
    refused = server.cli("import", str(file))
    assert (refused.returncode, "is not that of" in refused.stderr) == (1, True)
    assert server.cli("stop").returncode == 0


def test_an_export_leaves_out_a_damaged_schedule_and_says_so(
    appliance: Callable[..., Appliance],
) -> None:
    server = filled(appliance().run())
    server.stop()
    database = server.directory / "data" / "default" / "schedulezero.db"
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.execute("UPDATE definitions SET trigger_config = '{' WHERE schedule_id = 'weekly'")
        db.commit()
    done = server.cli("export")
    assert (done.returncode, "weekly is left out: its row" in done.stderr) == (1, True)
    assert "hourly:" in done.stdout and "weekly:" not in done.stdout


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_without_a_server_an_import_can_only_be_tried(
    appliance: Callable[..., Appliance], tmp_path: Path, options: tuple[str, ...]
) -> None:
    server = appliance()
    file = tmp_path / "in.yaml"
    file.write_text(json.dumps({"schedules": {"a": {**CALL, **BODIES["hourly"]}}}))
    done = server.cli("import", str(file), *options)
    assert done.returncode == (4 if options else 3)
    assert done.stdout.startswith("+ a  example.echo")
    assert server.cli("export").returncode == 1
