"""The torture test in short. `make torture` runs it for minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TORTURE = Path(__file__).resolve().parent.parent / "torture" / "torture.py"


def test_every_promise_is_kept_while_everything_is_killed_at_random(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TORTURE), "--minutes", "0.4"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
