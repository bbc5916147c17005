"""Logging belongs to a whole process, so it is tried in one of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import schedulezero

CONFIGURE = "s.configure_logging(s.Config(log_dir=sys.argv[1]), 'server', is_foreground={})\n"


def run_process(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    module = str(Path(schedulezero.__file__).resolve().parent)
    script = (
        f"import sys; sys.path.insert(0, {module!r})\nimport logging, os, schedulezero as s\n{code}"
    )
    command = [sys.executable, "-c", script, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_in_the_foreground_each_line_is_in_the_file_and_on_stderr(tmp_path: Path) -> None:
    code = f"{CONFIGURE.format(True)}logging.info('hi')"
    done = run_process(code, tmp_path / "logs")
    text = (tmp_path / "logs" / "server" / "server.log").read_text()
    assert done.stderr == text
    assert re.fullmatch(r"\S+Z INFO <string>:\d+:<module> hi", text.strip())


def test_in_the_background_stray_output_is_in_the_file_and_it_stays_bounded(tmp_path: Path) -> None:
    code = f"""
s.LOG_FILE_BYTES = 1_000
{CONFIGURE.format(False)}
for n in range(200):
    logging.info('line %d', n)
print('stray', flush=True)
os.write(2, b'native fault\\n')
"""
    done = run_process(code, tmp_path)
    assert (done.stdout, done.stderr) == ("", "")
    files = sorted((tmp_path / "server").iterdir())
    assert [file.name for file in files] == ["server.log", *(f"server.log.{n}" for n in (1, 2, 3))]
    assert all(file.stat().st_size <= 1_100 for file in files)
    assert files[0].read_text().endswith("stray\nnative fault\n")


def test_a_full_disk_costs_lines_but_never_the_process(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "server.log").symlink_to("/dev/full")
    code = f"{CONFIGURE.format(True)}logging.info('hi')"
    done = run_process(code, tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
