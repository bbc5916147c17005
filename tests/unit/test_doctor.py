"""What the checks make of what was looked up for them."""

from __future__ import annotations

import errno
import os
import py_compile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import schedulezero as sz
from schedulezero import (
    Clock,
    Condition,
    Config,
    Diagnosis,
    Finding,
    Verdict,
    check_backups,
    check_bytecode,
    check_clock,
    check_database,
    check_directory,
    check_flush,
    check_leftovers,
    check_ports,
    check_python,
    check_requirement,
    check_room,
    check_secrecy,
    check_unit,
    check_zones,
    is_compiled_from,
    look_at_directory,
    look_at_installation,
    measure_flush_s,
    render_diagnosis,
    render_unit,
)

NOW_US = 1_795_000_000_000_000
HOUR_US = 3_600_000_000
CONFIG = Config(data_dir="/srv/data/default", log_dir="/srv/logs/default")
UNIT = render_unit(CONFIG, {})
SOUND = Finding(Condition.SOUND)


@pytest.mark.parametrize(
    ("found", "verdict", "words"),
    [
        (check_python((3, 10)), "failed", "3.10 is too old"),
        (check_python((3, 11)), "ok", "3.11"),
        (check_python((3, 13)), "ok", "3.13"),
        (check_python((3, 14)), "warning", "newer than any tested"),
        (check_bytecode("/c.pyc", True, False), "ok", "/c.pyc"),
        (check_bytecode("/c.pyc", False, True), "ok", "made by the first start"),
        (check_bytecode("/c.pyc", False, False), "warning", "/c.pyc is missing or old"),
        (check_clock(True, NOW_US), "ok", "synchronised"),
        (check_clock(False, NOW_US), "warning", "not synchronised"),
        (check_clock(None, NOW_US), "warning", "does not tell"),
        (check_clock(True, 0), "failed", "it is not 1970-01-01"),
        (check_zones(600, "Europe/Berlin", True), "ok", "600"),
        (check_zones(600, "Europe/Berlin", False), "failed", "Europe/Berlin is not among"),
        (check_zones(0, "UTC", False), "failed", "no time zone database"),
        (check_room("/d", 10 << 30, 1_000), "ok", "10240 MB free"),
        (check_room("/d", 10 << 30, None), "ok", "10240 MB free"),
        (check_room("/d", 100 << 20, 1_000), "warning", "100 MB free"),
        (check_room("/d", 1 << 20, 1_000), "failed", "1 MB free"),
        (check_room("/d", 1 << 20, None), "failed", "1 MB free"),
        (check_room("/d", 10 << 30, 0), "failed", "no inode"),
        (check_flush("/d", 0.005), "ok", "after 5 ms"),
        (check_flush("/d", 0.4), "warning", "after 400 ms; each change waits"),
        (check_flush("/d", None), "failed", "/d takes no 5 times 4 KiB within 15 s"),
        (check_directory("data directory", "/d/x", "/d/x", "pi", None), "ok", "/d/x"),
        (check_directory("data directory", "/d/x", "/d", "pi", None), "ok",
         "made by the first start"),
        (check_directory("data directory", "/d/x", "/d", "pi", ("/d", "root")), "failed",
         "pi cannot write to /d, which is root's"),
        (check_secrecy([("/d/tokens.json", 0o600)]), "ok", "their owner alone"),
        (check_secrecy([("/d/tokens.json", 0o640)]), "failed", "others can read /d/tokens.json"),
        (check_ports(CONFIG, None, (None, ""), None), "ok", "8888 and 4242 are free"),
        (check_ports(CONFIG, None, (None, ""), "http_port 8888: taken"), "failed", "taken"),
        (check_ports(CONFIG, 7, (200, ""), None), "ok", "pid 7 answers"),
        (check_ports(CONFIG, 7, (503, ""), None), "failed", "not healthy: 503"),
        (check_ports(CONFIG, 7, (503, "the disk hangs"), None), "failed", "the disk hangs"),
        (check_ports(CONFIG, 7, (None, ""), None), "failed", "does not answer"),
        (check_database(SOUND, 0), "ok", "sound"),
        (check_database(SOUND, 100 << 20), "warning", "its log has 100 MB"),
        (check_database(Finding(Condition.EMPTY), 0), "ok", "made by the first start"),
        (check_database(Finding(Condition.UNCHECKED), 0), "ok", "as far as was seen"),
        (check_database(Finding(Condition.DAMAGED, "page 7"), 0), "failed", "page 7"),
        (check_database("it is newer than this program", 0), "failed", "newer"),
        (check_backups(None, 24, NOW_US, False), "ok", "none yet"),
        (check_backups(None, 24, NOW_US, True), "warning", "there is none"),
        (check_backups(NOW_US - 20 * HOUR_US, 24, NOW_US, True), "ok", "20.0 hours old"),
        (check_backups(NOW_US - 100 * HOUR_US, 24, NOW_US, True), "warning", "100 hours old"),
        (check_backups(NOW_US, 0, NOW_US, True), "warning", "switched off"),
        (check_leftovers([]), "ok", "none"),
        (check_leftovers(["/d/x.damaged"]), "warning", "/d/x.damaged"),
        (check_unit("/u", None, UNIT), "ok", "not installed"),
        (check_unit("/u", UNIT, UNIT), "ok", "/u"),
        (check_unit("/u", "# mine\n\n" + UNIT.replace("User=", "User=pi"), UNIT), "ok", "/u"),
        (check_unit("/u", UNIT.replace("Type=notify", "Type=simple"), UNIT), "warning",
         "-Type=simple; +Type=notify"),
    ],
)  # fmt: skip
def test_a_check_says_what_it_found_and_what_helps(
    found: Diagnosis, verdict: str, words: str
) -> None:
    assert (str(found.verdict), words in found.sentence) == (verdict, True), found
    assert (found.fix is None) == (verdict == "ok")


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("24.0.1", "ok"),
        ("27.3.1", "ok"),
        ("23.2", "failed"),
        ("28.0.0b1", "failed"),
        (None, "warning"),
    ],
)
def test_a_requirement_is_a_range(version: str | None, verdict: str) -> None:
    found = check_requirement("pyzmq", ">=24,<28", version)
    assert str(found.verdict) == verdict


@pytest.mark.parametrize(
    ("version", "verdict"), [("4.0.0a6", "ok"), ("4.0.0a5", "failed"), ("4.0.0", "failed")]
)
def test_a_requirement_may_be_one_version_alone(version: str, verdict: str) -> None:
    found = check_requirement("apscheduler", "==4.0.0a6", version)
    assert str(found.verdict) == verdict


def test_the_fix_stands_below_what_it_is_for() -> None:
    lines = render_diagnosis(Diagnosis(Verdict.FAILED, "disk", "1 MB free", "delete something"))
    assert lines[0].split() == ["FAILED", "disk", "1", "MB", "free"]
    assert lines[1].strip() == "fix: delete something"
    assert len(render_diagnosis(Diagnosis(Verdict.OK, "disk", "fine"))) == 1


def test_a_flush_that_fails_is_an_error_and_not_a_slow_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took_s = measure_flush_s(str(tmp_path / "not there yet"), Clock())
    assert took_s is not None and took_s > 0

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        measure_flush_s(str(tmp_path), Clock())
    assert not list(tmp_path.iterdir())
    config = Config(data_dir=str(tmp_path / "data"), log_dir=str(tmp_path / "logs"))
    checks = look_at_installation(config, Clock(), lambda config: (None, ""))
    (found,) = (each for each in checks if each.check == "flush")
    assert found.verdict is Verdict.FAILED
    assert found.sentence.endswith("Input/output error")


def test_a_flush_that_ends_after_nobody_waits_any_more_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, said = threading.Event(), []
    monkeypatch.setattr(os, "fsync", lambda fd: go_on.wait(5))
    monkeypatch.setattr(sz, "FLUSHES_LIMIT_S", 0.01)
    monkeypatch.setattr(threading, "excepthook", said.append)
    before = set(threading.enumerate())
    assert measure_flush_s(str(tmp_path), Clock()) is None
    (flusher,) = set(threading.enumerate()) - before
    go_on.set()
    flusher.join(5)
    assert not flusher.is_alive() and not said


def test_what_is_in_the_way_of_a_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    for name in ("file", "link"):
        for path in (tmp_path / name, tmp_path / name / "default"):
            found = look_at_directory("data directory", str(path))
            assert found.verdict is Verdict.FAILED
            assert found.sentence == f"{tmp_path / name} is no directory"
    assert look_at_directory("data directory", str(tmp_path / "new")).verdict is Verdict.OK
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    found = look_at_directory("data directory", str(tmp_path / "new"))
    assert found.sentence == f"{tmp_path} is on a file system that can only be read"


def test_bytecode_counts_only_for_the_source_it_was_made_from(tmp_path: Path) -> None:
    source, compiled = tmp_path / "a.py", tmp_path / "a.pyc"
    source.write_text("A = 1\n")
    assert not is_compiled_from(str(compiled), str(source))
    py_compile.compile(str(source), str(compiled))
    assert is_compiled_from(str(compiled), str(source))
    source.write_text("A = 12\n")
    assert not is_compiled_from(str(compiled), str(source))
