"""The doctor on a healthy and on broken installations."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from appliance import ROOT, Appliance, wait_for

# What the machine that runs the tests may lack.
OF_THE_MACHINE = {"bytecode", "clock", "unit", "disk", "flush"}


def examine(site: Appliance) -> tuple[int, dict[str, dict[str, Any]]]:
    done = site.cli("doctor", "--json")
    assert done.stderr == ""
    shown = json.loads(done.stdout)
    assert shown["ok"] == (done.returncode == 0)
    return done.returncode, {found["check"]: found for found in shown["checks"]}


def ailing(checks: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {
        name: found["verdict"]
        for name, found in checks.items()
        if found["verdict"] != "ok" and name not in OF_THE_MACHINE
    }


@pytest.mark.parametrize("is_running", [False, True])
def test_a_healthy_installation_is_told_so(
    appliance: Callable[..., Appliance], is_running: bool
) -> None:
    site = appliance()
    if is_running:
        site.run("run")
    code, checks = examine(site)
    assert (code, {k: v for k, v in ailing(checks).items() if k != "backups"}) == (0, {})
    assert {"server" if is_running else "ports", "flush"} <= checks.keys()
    assert site.cli("doctor").stdout.startswith("ok       python")


def test_a_wrong_configuration_is_named_with_its_line(appliance: Callable[..., Appliance]) -> None:
    site = appliance()
    site.config.write_text("http_prot: 1\n")
    code, checks = examine(site)
    assert (code, ailing(checks)) == (1, {"configuration": "failed"})
    assert "config.yaml line 1: unknown key 'http_prot'" in checks["configuration"]["sentence"]
    assert "fix: correct it" in site.cli("doctor").stdout


def test_a_taken_port_is_named_with_its_key(appliance: Callable[..., Appliance]) -> None:
    site = appliance()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", site.zmq_port))
        taken.listen()
        code, checks = examine(site)
    assert (code, ailing(checks)) == (1, {"ports": "failed"})
    assert f"zmq_port {site.zmq_port}" in checks["ports"]["sentence"]


def test_damage_and_carelessness_are_found_in_the_data(appliance: Callable[..., Appliance]) -> None:
    site = appliance().run()
    site.stop()
    data = site.directory / "data" / "default"
    database = bytearray((data / "schedulezero.db").read_bytes())
    database[1_024 * 2 : 1_024 * 6] = b"\xff" * 4_096
    (data / "schedulezero.db").write_bytes(database)
    (data / "schedulezero.db.20270101T000000Z.damaged").touch()
    (data / "tokens.json").touch()
    (data / "tokens.json").chmod(0o644)
    code, checks = examine(site)
    assert code == 1
    found = ailing(checks)
    assert (found["database"], found["leftovers"], found["secrecy"]) == (
        "failed", "warning", "failed"
    )  # fmt: skip
    assert f"chmod go= {data / 'tokens.json'}" == checks["secrecy"]["fix"]
    assert "restore" in checks["database"]["fix"]


only_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can give files away"
)


def weaken(site: Appliance) -> None:
    """Run its commands without the powers that root has over files of others."""
    powers = "-dac_override,-dac_read_search"
    site.program = [
        "setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}", *site.program
    ]  # fmt: skip


@only_root
@pytest.mark.parametrize("closed", ["", "governor.lock"])
def test_what_belongs_to_another_user_is_named_with_its_owner(
    appliance: Callable[..., Appliance], closed: str
) -> None:
    site = appliance().run()
    site.stop()
    path = site.directory / "data" / "default" / closed
    path.chmod(path.stat().st_mode & 0o700)
    os.chown(path, 65_534, 65_534)
    weaken(site)
    code, checks = examine(site)
    assert (code, ailing(checks)) == (1, {"data directory": "failed"})
    found = checks["data directory"]
    assert found["sentence"] == f"root cannot write to {path}, which is nobody's"
    assert found["fix"].endswith(f"sudo chown -R root {site.directory / 'data' / 'default'}")


def test_a_python_that_lacks_the_packages_says_where_they_are_listed() -> None:
    command = [sys.executable, "-S", "-m", "schedulezero", "doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("schedulezero: No module named ")
    assert "stands at the head of" in done.stderr


def test_a_port_that_another_program_answers_on_is_told(
    appliance: Callable[..., Appliance],
) -> None:
    site = appliance()
    site.cli("start")
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        site.write_config(http_port=other.getsockname()[1])
        code, checks = examine(site)
        thread.join(10)
    assert (code, checks["server"]["verdict"]) == (1, "failed")
    assert "does not answer" in checks["server"]["sentence"]
    site.write_config(http_port=site.http_port)


@only_root
def test_a_command_that_may_not_look_says_who_may(appliance: Callable[..., Appliance]) -> None:
    site = appliance().run()
    site.stop()
    data = site.directory / "data" / "default"
    os.chown(data, 65_534, 65_534)
    weaken(site)
    for command in ("status", "stop", "start"):
        done = site.cli(command)
        told = f"schedulezero: {data}/governor.lock: Permission denied; run it as nobody\n"
        assert (done.returncode, done.stderr) == (1, told)


@only_root
def test_a_handler_whose_log_cannot_be_written_is_one_line(
    appliance: Callable[..., Appliance],
) -> None:
    site = appliance(handlers={"a": {"command": ["true"]}})
    logs = site.directory / "logs" / "default"
    (logs / "handlers" / "a").mkdir(parents=True)
    os.chown(logs / "handlers" / "a", 65_534, 65_534)
    (logs / "handlers" / "a").chmod(0o700)
    weaken(site)
    site.run("run")
    log = logs / "governor" / "governor.log"
    told = f"a cannot write {logs}/handlers/a/handler.log: Permission denied"
    wait_for(lambda: told in log.read_text(), "the reason")
    assert "Traceback" not in log.read_text()
