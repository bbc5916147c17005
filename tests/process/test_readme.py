"""The README is true: its commands run as they stand, its tables name what exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from appliance import ROOT, free_port

README = (ROOT / "README.md").read_text()


def test_the_first_lines_are_the_two_commands() -> None:
    lines = [line.strip() for line in README.splitlines() if line.startswith("    make ")]
    assert [line.split()[:2] for line in lines] == [["make", "run"], ["make", "test"]]
    assert len(README.splitlines()) <= 250


def test_the_commands_of_the_first_page_run_as_they_stand(tmp_path: Path) -> None:
    for name in ("schedulezero.py", "handler.py", "config.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "static", tmp_path / "static")
    port = str(free_port())
    (script,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    script = script.replace("8888", port).replace("curl -s ", "curl -s --fail-with-body ")
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SCHEDULEZERO_HTTP_PORT": port,
        "SCHEDULEZERO_ZMQ_PORT": str(free_port()),
    }
    connected = f"curl -s http://127.0.0.1:{port}/api/handlers | grep -q '\"registered_at\"'"
    wait = f"for i in $(seq 100); do {connected} && break; sleep 0.1; done\n"
    script = script.replace("# What is connected", wait + "# What is connected")
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
    finally:
        stop = [sys.executable, "-m", "schedulezero", "stop"]
        subprocess.run(stop, cwd=tmp_path, env=environ, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"result":5' in done.stdout
    assert '"schedule_id":"sums"' in done.stdout
    assert "RUNNING" in done.stdout


@pytest.mark.parametrize("path", sorted(set(re.findall(r"/api/[a-z_./]+", README))))
def test_every_path_it_names_is_served(path: str) -> None:
    import schedulezero

    patterns = [re.sub(r"\{\w+\}", "[^/]+", route.path) for route in schedulezero.ROUTES]
    assert any(re.fullmatch(pattern, path.rstrip("/.")) for pattern in patterns), path


@pytest.mark.parametrize("command", sorted(set(re.findall(r"-m schedulezero ([a-z]+)", README))))
def test_every_command_it_names_exists(command: str) -> None:
    import schedulezero

    assert f"    {command} " in schedulezero.build_parser().format_help()
