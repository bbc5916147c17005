"""Requests made up from the API's own description: a real server, with and without a token."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from appliance import Appliance

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
)
STREAMS = "^/api/(events|ws)$"  # they have no end
# The one method of the example that takes whatever it is given: others fail and are tried again.
NAMES = {"handler_id": ["example", "absent"], "method_name": ["echo", "absent"]}


# A job that fails is told by these; the server has not.
SETTINGS = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "4xx", 502, 504]
"""


def with_known_names(value: Any) -> Any:
    """The description, with names that exist: else nothing made up would get far."""
    if isinstance(value, list):
        return [with_known_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {key: with_known_names(item) for key, item in value.items()}
    for key in NAMES.keys() & changed.keys():
        changed[key] = {"type": "string", "enum": NAMES[key]}
    return changed


def fuzz(server: Appliance, document: Any, directory: Path, *options: str) -> tuple[int, str]:
    """Exit code and output of schemathesis; 0 when no check failed."""
    path = directory / "openapi.json"
    path.write_text(json.dumps(document))
    (directory / "schemathesis.toml").write_text(SETTINGS)
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", str(path), "--no-color",
        "--url", f"http://127.0.0.1:{server.http_port}", "--exclude-path-regex", STREAMS,
        "--seed", "1", "--request-timeout", "30", "--suppress-health-check", "all",
        "--checks", "all", *options,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=200, check=False
    )
    print(done.stdout[done.stdout.find("SUMMARY") :])
    return done.returncode, done.stdout + done.stderr


def test_no_request_with_a_token_breaks_a_promise_of_the_description(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    server = appliance()
    made = server.cli("token", "create", "fuzz", "--role", "admin")
    server.headers = {"Authorization": f"Bearer {made.stdout.strip()}"}
    server.run().handler("Example")
    document = with_known_names(server.get("/api/openapi.json").json())
    header = f"Authorization: {server.headers['Authorization']}"
    # What is well formed may still name a trigger that never fires or a handler that is gone, and
    # the eleventh of the wrong tokens that `ignored_auth` sends is answered with 429.
    excluded = "positive_data_acceptance,ignored_auth"
    code, said = fuzz(
        server, document, tmp_path, "--header", header, "--max-examples", "10",
        "--exclude-checks", excluded,
    )  # fmt: skip
    assert code == 0, said
    assert int((re.search(r"(\d+) generated", said) or [0, 0])[1]) > 500
    assert server.get("/api/health").json()["checks"]["store"] == "ok"
    assert " ERROR " not in server.output, server.output


def test_no_request_without_a_token_gets_in_where_one_is_needed(
    appliance: Callable[..., Appliance], tmp_path: Path
) -> None:
    server = appliance()
    made = server.cli("token", "create", "fuzz", "--role", "admin")
    token = {"Authorization": f"Bearer {made.stdout.strip()}"}
    server.run()
    document = server.request("GET", "/api/openapi.json", headers=token).json()
    before = server.request("GET", "/api/audit", headers=token).json()["entries"]
    # Checks that tell good requests from bad ones have no say: all of them are refused alike.
    told_apart = (
        "positive_data_acceptance,missing_required_header,negative_data_rejection,ignored_auth"
    )
    code, said = fuzz(
        server, document, tmp_path, "--phases", "coverage,fuzzing", "--max-examples", "5",
        "--exclude-checks", told_apart,
    )  # fmt: skip
    assert code == 0, said
    after = server.request("GET", "/api/audit", headers=token).json()["entries"]
    accepted = [entry for entry in after if entry["status"] is None]
    assert [entry for entry in accepted if entry not in before] == []
    assert server.request("GET", "/api/schedules", headers=token).json()["count"] == 0
    assert " ERROR " not in server.output, server.output
