"""The printed units, judged by systemd's own tools."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from appliance import Appliance

pytestmark = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze (Debian: systemd) is absent"
)


def verify(path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
    )
    # It also judges the host's own units that this one orders itself by.
    assert path.name not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


def exposure(path: Path) -> float:
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout
    return float(found[1])


@pytest.mark.parametrize("name", ["plain", "with blank, 100% $strange"])
def test_the_unit_is_valid_and_hardened(
    appliance: Callable[..., Appliance], tmp_path: Path, name: str
) -> None:
    site = appliance(name, handlers={"a": {"command": ["true"]}})
    done = site.cli("systemd")
    assert done.returncode == 0, done.stderr
    unit = tmp_path / "schedulezero-default.service"
    unit.write_text(done.stdout)
    verify(unit)
    assert exposure(unit) <= 1.5


def test_the_handlers_unit_is_valid_and_lets_them_work(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    site = appliance(handlers={"a": {"command": ["true"], "autostart": False}})
    done = site.cli("systemd", "--handlers")
    assert done.returncode == 0, done.stderr
    unit = tmp_path / "schedulezero-default-handler@a.service"
    unit.write_text(done.stdout)
    verify(unit)
    for setting in ("ProtectSystem", "ProtectHome", "SystemCallFilter", "CapabilityBoundingSet"):
        assert setting not in done.stdout


def test_a_handler_that_is_not_started_is_run_by_its_own_command(
    appliance: Callable[..., Appliance],
) -> None:
    handlers = {"mine": {"run": "handler.py:Example", "autostart": False}}
    site = appliance(handlers=handlers).run("run")
    assert (
        "handler    mine: handler.py:Example (started by something else)"
        in site.cli("check").stdout
    )
    command = [
        sys.executable,
        "-m",
        "schedulezero",
        "--config",
        str(site.config),
        "handler",
        "mine",
    ]
    process = subprocess.Popen(
        command, cwd=site.directory, env=site.environ, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    site.handlers.append(process)
    site.wait_connected("mine")
    shown = json.loads(site.cli("status", "--json").stdout)
    assert [process["name"] for process in shown["processes"]] == ["governor", "server"]
