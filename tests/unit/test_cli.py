from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import schedulezero
from schedulezero import (
    Config,
    Tail,
    build_parser,
    describe_processes,
    main,
    quote_unit,
    read_tail,
    render_duration,
    render_processes,
    render_size,
    render_unit,
    split_log,
)

# Arguments and exit codes.


@pytest.mark.parametrize(
    "line", ["--deployment x --config c status", "status --deployment x --config c"]
)
def test_options_may_stand_before_or_after_the_command(line: str) -> None:
    arguments = build_parser().parse_args(line.split())
    assert (arguments.deployment, arguments.config) == ("x", "c")


@pytest.mark.parametrize(
    ("text", "environ", "wanted"),
    [
        ("http_port: x\n", {}, ["data"]),
        ("data_dir: kept\nhttp_port: x\n", {}, ["kept"]),
        ('{"http_port": "x", "data_dir": "kept"}', {}, ["kept"]),
        ("# data_dir: others\nhttp_port: x\n", {}, ["data"]),
        ("http_port: x  # data_dir: others\n", {}, ["data"]),
        ("data_dir: kept\nhttp_port: x\n", {"SCHEDULEZERO_DATA_DIR": "own"}, ["own"]),
    ],
)
def test_behind_a_wrong_configuration_only_its_own_data_directory_is_looked_at(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    environ: dict[str, str],
    wanted: list[str],
) -> None:
    looked_at: list[str] = []
    monkeypatch.setattr(schedulezero, "find_governor", lambda path: looked_at.append(path))
    for name in ("data", "kept", "others", "own"):
        (tmp_path / name / "default").mkdir(parents=True)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "config.yaml").write_text(text)
    assert main(["--config", str(tmp_path / "config.yaml"), "stop"]) == 78
    assert looked_at == [str(tmp_path / name / "default") for name in wanted]


def test_without_a_command_it_runs() -> None:
    assert build_parser().parse_args([]).command is schedulezero.command_run


def test_help_and_version_are_fine_and_an_unknown_command_is_a_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    assert "75 already running" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ScheduleZero {schedulezero.VERSION}\n"
    assert main(["strat"]) == 2
    assert main(["--nonsense"]) == 2


def test_every_command_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("run", "start", "stop", "restart", "status", "reload", "logs", "server", "check")
    for name in (*names, "systemd"):
        assert main([name, "--help"]) == 0
        assert name in capsys.readouterr().out


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("SCHEDULEZERO_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_check_says_what_would_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "config.yaml").write_text(
        "timezone: UTC\n"
        "handlers: {a: {command: [job, -v]}}\n"
        "schedules: {s: {handler_id: a, method_name: m, "
        "trigger_config: {type: date, run_date: '2001-01-01T00:00:00Z'}}}\n"
    )
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert f"{home / 'config.yaml'}: good; default would run" in out
    assert "http://127.0.0.1:8888" in out
    assert "a: job -v" in out
    assert "s: a.m " in out


def test_a_wrong_configuration_is_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "config.yaml").write_text("http_port: x\n")
    for command in ("check", "start", "run", "stop", "status", "logs", "systemd"):
        assert main([command]) == 78
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("schedulezero: config.yaml line 1: http_port is 'x'; it must be")


def test_what_does_not_run_is_exit_code_3(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 3
    assert main(["status", "--json"]) == 3
    assert '"running": false' in capsys.readouterr().out
    assert main(["stop"]) == 3
    assert main(["reload"]) == 3
    assert list(home.iterdir()) == []


class Stuck:
    """A process that waits for its disk: no signal ends it."""

    pid, returncode = 4711, None

    def __init__(self, *arguments: object, **settings: object) -> None:
        pass

    def terminate(self) -> None:
        pass

    def wait(self, timeout_s: float) -> None:
        raise subprocess.TimeoutExpired("schedulezero", timeout_s)


def test_a_start_that_neither_answers_nor_ends_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Stuck)
    monkeypatch.setattr(schedulezero, "require_ports", lambda config: None)
    monkeypatch.setattr(schedulezero, "wait_for_health", lambda config, process: "no answer")
    assert main(["start"]) == 1
    told = "schedulezero: not started: no answer, and pid 4711 did not stop within 35 s\n"
    assert capsys.readouterr().err == told


def test_an_unknown_log_is_named_with_a_suggestion(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", "sever"]) == 1
    assert "did you mean 'server'?" in capsys.readouterr().err


def test_a_restore_while_the_server_is_down_ends_no_handler_in_its_place(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    children = [{"name": "server", "pid": None}, {"name": "a", "pid": 4_242}]
    told: list[int] = []
    monkeypatch.setattr(schedulezero, "stage_restore", lambda source, path: None)
    monkeypatch.setattr(schedulezero, "find_governor", lambda data_dir: 1)
    monkeypatch.setattr(schedulezero, "read_status", lambda config, pid: {"children": children})
    monkeypatch.setattr(schedulezero, "signal_process", lambda pid, number: told.append(pid))
    monkeypatch.setattr(schedulezero, "fetch_health", lambda config: 200)
    (home / "kept.db").touch()
    assert main(["restore", "kept.db"]) == 0
    assert "by the next start of the server" in capsys.readouterr().out
    assert told == []


def test_a_restore_whose_server_is_stopped_meanwhile_waits_for_no_other(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    governors: list[int | None] = [1]
    shown = {"children": [{"name": "server", "pid": 4_242}]}
    staged = home / "data" / "default" / "schedulezero.db.restore"
    monkeypatch.setattr(schedulezero, "stage_restore", lambda source, path: staged.touch())
    monkeypatch.setattr(schedulezero, "find_governor", lambda data_dir: governors[-1])
    monkeypatch.setattr(schedulezero, "read_status", lambda config, pid: shown)
    monkeypatch.setattr(schedulezero, "signal_process", lambda pid, number: governors.append(None))
    assert main(["restore", "kept.db"]) == 0
    assert "by the next start of the server" in capsys.readouterr().out


# Status.


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0s"),
        (59, "59s"),
        (60, "1m 0s"),
        (3_661, "1h 1m"),
        (86_400, "1d 0h"),
        (40 * 86_400 + 7_200, "40d 2h"),
    ],
)
def test_a_duration_shows_its_two_largest_units(seconds: int | None, text: str) -> None:
    assert render_duration(seconds) == text


def test_a_size_is_in_mebibytes() -> None:
    assert (render_size(None), render_size(32 << 20)) == ("-", "32.0 MiB")


def test_the_table_is_aligned() -> None:
    shown = {
        "pid": 2**22,
        "started_at": "2026-11-23T15:44:45.000001Z",
        "children": [
            {
                "name": "server",
                "state": "BACKOFF",
                "pid": None,
                "started_at": None,
                "since": "2026-11-23T15:44:45Z",
                "restarts": 3,
                "reason": "exit code 1",
            }
        ],
    }
    described = describe_processes(shown, 2**22, 1_795_448_685_000_001 + 90_000_000, Config())
    assert [process["uptime_seconds"] for process in described["processes"]] == [90, None]
    lines = render_processes(described["processes"]).splitlines()
    assert lines == [
        "NAME      STATE    PID      UPTIME  RESTARTS  RSS  PSS  WRITTEN  LAST END",
        "governor  RUNNING  4194304  1m 30s  0         -    -    -        -",
        "server    BACKOFF  -        -       3         -    -    -        exit code 1",
    ]


# Logs.


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    assert read_tail(str(path), 5) == []
    path.write_text("".join(f"line {n}\n" for n in range(100)))
    assert read_tail(str(path), 2) == ["line 98", "line 99"]
    assert read_tail(str(path), 0) == []
    size = path.stat().st_size
    with path.open("a") as file:
        file.write("new\n")
    assert read_tail(str(path), 5, start=size) == ["new"]


def test_a_followed_log_is_followed_through_rotation_and_emptying(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("one\n")
    tail = Tail(str(path), path.stat().st_ino, 0)
    assert tail.read_lines() == ["one"]
    with path.open("a") as file:
        file.write("two\nthr")
        file.flush()
        assert tail.read_lines() == ["two"]
        file.write("ee\n")
    assert tail.read_lines() == ["three"]
    path.rename(tmp_path / "x.log.1")
    assert tail.read_lines() == []
    path.write_text("a longer first line\n")
    assert tail.read_lines() == ["a longer first line"]
    path.write_text("four\n")  # emptied and written again
    assert tail.read_lines() == ["four"]


def test_a_log_cannot_play_with_the_terminal() -> None:
    assert split_log(b"a\tb\r\n\x1b[2Jx\n\xff\n") == ["a       b", r"\x1b[2Jx", "\ufffd"]


# The unit.


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("/opt/sz", "/opt/sz"),
        ("/opt/my jobs", '"/opt/my jobs"'),
        ("100%", "100%%"),
        ("$HOME", "$$HOME"),
        ('a"b', '"a\\"b"'),
    ],
)
def test_words_of_the_unit_are_quoted(text: str, quoted: str) -> None:
    assert quote_unit(text) == quoted


def test_the_unit_runs_this_installation_with_its_settings() -> None:
    config = Config(
        deployment="test", data_dir="/srv/d/test", log_dir="/srv/l/test", path="/srv/c.yaml"
    )
    lines = render_unit(config, {"SCHEDULEZERO_HTTP_PORT": "9000", "HOME": "/x"}).splitlines()
    execs = [line for line in lines if line.startswith("ExecStart=")]
    assert execs == [
        f"ExecStart={sys.executable} -m schedulezero --deployment test --config /srv/c.yaml run"
    ]
    assert "Environment=SCHEDULEZERO_HTTP_PORT=9000" in lines
    assert "Environment=MALLOC_TRIM_THRESHOLD_=131072" in lines
    assert {"ReadWritePaths=/srv/d", "ReadWritePaths=/srv/l"} <= set(lines)
    assert f"WorkingDirectory={Path(schedulezero.__file__).resolve().parent}" in lines
    assert "RestartPreventExitStatus=2 75 78" in lines
    assert not any("HOME" in line for line in lines)


def test_the_unit_says_which_homes_have_to_let_its_user_through(tmp_path: Path) -> None:
    home, data = tmp_path / "pi", tmp_path / "pi" / "data"
    data.mkdir(parents=True)
    data.chmod(0o700)  # it is chowned
    config = Config(data_dir=str(data / "default"), path=str(home / "config.yaml"))
    for mode, says in ((0o700, True), (0o711, False)):
        home.chmod(mode)
        lines = render_unit(config, {}).splitlines()
        assert (f"#   chmod o+x {str(home)!r}" in lines) == says
        assert f"#   chmod o+x {str(data)!r}" not in lines


def test_the_unit_has_systemd_make_what_it_can_and_names_the_rest() -> None:
    below = replace(
        Config(), data_dir="/var/lib/sz/data/default", log_dir="/var/lib/sz/logs/default"
    )
    lines = render_unit(below, {}).splitlines()
    assert {"StateDirectory=sz/data", "StateDirectory=sz/logs"} <= set(lines)
    assert not any("ReadWritePaths" in line or "mkdir" in line for line in lines)
    lines = render_unit(replace(below, log_dir="/srv/logs/default"), {}).splitlines()
    assert {"StateDirectory=sz/data", "ReadWritePaths=/srv/logs"} <= set(lines)
    assert "#   mkdir -p '/srv/logs' && chown -R schedulezero: '/srv/logs'" in lines


def test_a_unit_with_a_low_port_may_have_it() -> None:
    lines = render_unit(replace(Config(), http_port=443), {}).splitlines()
    capable = {
        f"{name}=CAP_NET_BIND_SERVICE" for name in ("CapabilityBoundingSet", "AmbientCapabilities")
    }
    assert capable <= set(lines)
    assert "PrivateUsers=yes" not in lines
    assert {"CapabilityBoundingSet=", "PrivateUsers=yes"} <= set(
        render_unit(Config(), {}).splitlines()
    )
