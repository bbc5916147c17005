"""Schedules as files: what `export` writes, what `import` reads, and the difference it finds."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schedulezero as sz
from hypothesis import given, settings
from hypothesis import strategies as st

NOW_US = sz.us_of(sz.datetime(2026, 11, 23, 12, 0, 0, tzinfo=sz.UTC))
CONFIG = sz.Config(timezone="Europe/Berlin")
HOURLY = {"type": "interval", "hours": 1}


def a_schedule(schedule_id: str = "a", **fields: Any) -> sz.Schedule:
    body = {"handler_id": "h", "method_name": "m", "trigger_config": HOURLY, **fields}
    return sz.parse_declared_schedule(schedule_id, body, CONFIG, NOW_US)


def read_back(text: str) -> dict[str, sz.Schedule]:
    entries, _ = sz.parse_schedules(text, "file.yaml")
    return {key: sz.parse_declared_schedule(key, body, CONFIG, 0) for key, body in entries.items()}


# Export

names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._:@-]{0,20}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
YAML_WORDS = """yes null ~ 1e3 0x1f 1_000 12:30 2027-01-01 = << # &a *a !t % @ ` ' " - ? |"""
awkward = st.sampled_from(
    [*YAML_WORDS.split(), "", "- a", "a: b", " a ", "\n a\n\n", "\x85", "\u2028"]
)
lines = st.text(st.sampled_from("ab \n\t#:-'\"\\%ü|>&*!{}[],?"), max_size=14)
texts |= lines
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | texts | awkward
scalars |= st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | awkward, inner, max_size=3),
    max_leaves=8,
)
triggers = st.one_of(
    st.builds(lambda n: {"type": "interval", "seconds": n}, st.integers(1, 10_000)),
    st.sampled_from(
        [
            {"type": "cron", "expression": "*/5 9-17 * * mon-fri"},
            {"type": "cron", "expression": "@daily", "timezone": "Asia/Tokyo"},
            {"type": "cron", "hour": "9", "minute": 30, "dst": "skip"},
            {"type": "date", "run_date": "2030-01-01 10:00"},
            {"type": "date", "run_date": "2001-01-01"},
            {"type": "or", "triggers": [{"type": "cron", "minute": "0"}, HOURLY]},
        ]
    ),
)
titles = st.text(min_size=1, max_size=200).filter(lambda t: t.isprintable() and not t.isspace())
schedules = st.fixed_dictionaries(
    {"handler_id": names, "method_name": names, "trigger_config": triggers},
    optional={
        "job_params": st.dictionaries(texts | awkward, values, max_size=4),
        "name": titles,
        "timeout": st.floats(0.1, 1_000),
        "retry": st.fixed_dictionaries({}, optional={"max_attempts": st.integers(1, 1_000)}),
        "coalesce": st.sampled_from([str(each) for each in sz.Coalesce]),
        "overlap": st.sampled_from([str(each) for each in sz.Overlap]),
        "misfire_grace_time": st.floats(0, sz.MAX_GRACE_S),
        "max_jitter": st.floats(0, 86_400),
        "paused": st.booleans(),
    },
)


@given(st.dictionaries(names, schedules, max_size=4))
@settings(max_examples=150, deadline=None)
def test_what_is_exported_makes_equal_schedules(bodies: dict[str, Any]) -> None:
    stored = json.loads(json.dumps(bodies))
    known = {key: a_schedule(key, **body) for key, body in stored.items()}
    made = read_back(sz.render_schedules(known.values()))
    assert list(made) == list(known)
    for key, schedule in known.items():
        assert sz.has_definition(schedule, made[key])


def test_an_export_is_short_and_reads_like_the_configuration() -> None:
    one = a_schedule("chime", trigger_config={"type": "cron", "minute": "0"}, paused=True)
    assert sz.render_schedules([one]).splitlines()[1:] == [
        "schedules:",
        "  chime:",
        "    handler_id: h",
        "    method_name: m",
        "    trigger_config: {type: cron, minute: '0', timezone: Europe/Berlin}",
        "    paused: true",
    ]
    assert read_back(sz.render_schedules([])) == {}
    rich = a_schedule(job_params={"command": "a\n  b\n", "x": "\x85", "title": "Überall"})
    assert sz.render_schedules([rich]).splitlines()[5:11] == [
        "    job_params:",
        "      command: |",
        "        a",
        "          b",
        '      x: "\\N"',
        "      title: Überall",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("http_port: 1", "file.yaml line 1: unknown key 'http_port'"),
        ("schedules:\n  a:\n", "file.yaml line 2: schedules.a is None; it must be a schedule"),
        ("schedules:\n  a: {handler_id: h}", "line 2: schedules.a needs the key 'method_name'"),
        ("schedules:\n  a: {}\n  a: {}", "line 3: duplicate key 'a'"),
        ("- a", "must be a mapping"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_line(text: str, sentence: str) -> None:
    with pytest.raises(sz.ConfigError) as caught:
        sz.parse_schedules(text, "file.yaml")
    assert sentence in str(caught.value)


# Crontabs


def read_crontab(text: str, *, has_user: bool = False) -> sz.Crontab:
    crontab = sz.Crontab("crontab", "shell", has_user=has_user)
    crontab.read(text)
    return crontab


def one_of_crontab(text: str, *, has_user: bool = False) -> dict[str, Any]:
    (entry,) = read_crontab(text, has_user=has_user).entries.values()
    return entry


@pytest.mark.parametrize(
    ("line", "params"),
    [
        ("run it", {"command": "run it"}),
        ("  run   it \t", {"command": "run   it"}),
        ("run # not a comment", {"command": "run # not a comment"}),
        ("A=1 B=2 run", {"command": "A=1 B=2 run"}),
        (r"date +\%F", {"command": "date +%F"}),
        (r"printf '\n\\\%'", {"command": r"printf '\n\\%'"}),
        ("cat%", {"command": "cat"}),
        ("cat%one%two", {"command": "printf %s 'one\ntwo\n' | (\ncat\n)"}),
        (r"cat # x%it\%s%", {"command": "printf %s 'it%s\n' | (\ncat # x\n)"}),
        ("cat%it's", {"command": "printf %s 'it'\"'\"'s\n' | (\ncat\n)"}),
    ],
)
def test_a_command_becomes_what_the_shell_handler_runs(line: str, params: dict[str, Any]) -> None:
    assert one_of_crontab(f"0 5 * * * {line}")["job_params"] == params


@pytest.mark.parametrize("text", ["cat%one%two", r"cat # 100\%%a\%b", "cat%x%%y%", "cat"])
def test_the_input_after_a_percent_sign_reaches_the_command(text: str) -> None:
    command = sz.command_of(text)
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True,
                          stdin=subprocess.DEVNULL)  # fmt: skip
    expected = {"cat%one%two": "one\ntwo\n", "cat%x%%y%": "x\n\ny\n", "cat": ""}
    assert done.stdout == expected.get(text, "a%b\n")


@pytest.mark.parametrize(
    ("line", "expression"),
    [
        ("*/5 9-17 * * mon-fri run", "*/5 9-17 * * mon-fri"),
        ("\t0\t5  *  *  0,7   run", "0 5 * * 0,7"),
        ("@daily run", "@daily"),
        ("@midnight   run it", "@midnight"),
    ],
)
def test_the_times_of_a_line_become_a_cron_trigger(line: str, expression: str) -> None:
    trigger = one_of_crontab(line)["trigger_config"]
    assert trigger == {"type": "cron", "expression": expression}


@pytest.mark.parametrize(
    ("variables", "params", "notes"),
    [
        ("PATH=/bin:/opt/bin", {"command": "run", "env": {"PATH": "/bin:/opt/bin"}}, ["allow_any"]),
        ("  A  =  b c  ", {"command": "run", "env": {"A": "b c"}}, ["allow_any"]),
        ("A=' b '", {"command": "run", "env": {"A": " b "}}, ["allow_any"]),
        ('"C"="d\'"', {"command": "run", "env": {"C": "d'"}}, ["allow_any"]),
        ("SHELL=/bin/sh", {"command": "run"}, []),
        ("SHELL=/bin/bash", {"argv": ["/bin/bash", "-c", "run"]}, []),
        ("HOME=/x", {"command": "run", "cwd": "/x", "env": {"HOME": "/x"}}, ["allow_any"]),
        ('MAILTO=""\nLOGNAME=me', {"command": "run"}, []),
        ("MAILTO=me@example.org", {"command": "run"}, ["line 1: no mail is sent"]),
    ],
)  # fmt: skip
def test_variables_hold_for_the_lines_below_them(
    variables: str, params: dict[str, Any], notes: list[str]
) -> None:
    crontab = read_crontab(f"{variables}\n@daily run\n")
    assert [entry["job_params"] for entry in crontab.entries.values()] == [params]
    assert len(crontab.notes) == len(notes)
    assert all(part in note for part, note in zip(notes, crontab.notes, strict=True))
    above = read_crontab(f"@daily run\n{variables}\n")
    assert [entry["job_params"] for entry in above.entries.values()] == [{"command": "run"}]


def test_cron_tz_is_the_time_zone_of_the_lines_below() -> None:
    crontab = read_crontab("@daily a\nCRON_TZ=Asia/Tokyo\n@daily b\n")
    zones = [entry["trigger_config"].get("timezone") for entry in crontab.entries.values()]
    assert zones == [None, "Asia/Tokyo"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# x\n@reboot run", "crontab line 2: @reboot is no time"),
        ("@dialy run", "crontab line 1: '@dialy' is unknown; did you mean '@daily'?"),
        ("61 * * * * run", "crontab line 1: minute '61': 61 is not between 0 and 59"),
        ("\n\n* * * * run", "crontab line 3: day_of_week 'run'"),
        ("* * * * *", "crontab line 1: after '* * * * *' there must be a command"),
        ("@daily", "crontab line 1: after '@daily' there must be a command"),
        ("run it", "crontab line 1: it has 2 fields instead of minute"),
        ("RANDOM_DELAY=5\n@daily run", "line 1: RANDOM_DELAY is not known here; give max_jitter"),
        ("CRON_TZ=Mars/Base\n@daily run", "line 1: CRON_TZ is 'Mars/Base', which is no time zone"),
    ],
)
def test_a_line_that_cannot_be_a_schedule_is_named(text: str, sentence: str) -> None:
    with pytest.raises(sz.ConfigError) as caught:
        read_crontab(text)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("comment", "name"),
    [
        ("# Back up the house", "Back up the house"),
        ("## --- nightly\tbackup --- ##", "nightly backup"),
        ("#", None),
        ("# m h  dom mon dow   command", None),
        ("# minute hour day month weekday command", None),
        ("#0 5 * * * old", None),
        ("# @daily old", None),
        ("#PATH=/bin", None),
        ("# An old one\n", None),
        ("# An old one\nA=b", None),
        ("# first\n# second", "second"),
        ("# " + "x" * 300, "x" * 200),
    ],
)
def test_the_comment_right_above_a_line_is_its_name(comment: str, name: str | None) -> None:
    assert one_of_crontab(f"{comment}\n@daily run").get("name") == name


def test_only_a_newline_ends_a_line() -> None:
    crontab = read_crontab("@daily a\u2028b\x0bc\r\n@daily d\r\n")
    commands = [entry["job_params"]["command"] for entry in crontab.entries.values()]
    assert commands == ["a\u2028b\x0bc", "d"]


def test_a_crontab_of_the_system_is_known_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("timezone: UTC\n")
    (tmp_path / "jobs").write_text("17 * * * * root cd / && run-parts --report /etc/cron.hourly\n")
    dry = ["--config", str(tmp_path / "config.yaml"), "import", str(tmp_path / "jobs"), "--dry-run"]
    assert sz.main([*dry, "--handler", "shell"]) == sz.EXIT_DIFFERENT
    assert capsys.readouterr().out.startswith("+ cron-root-")
    monkeypatch.setattr(sz, "SYSTEM_CRONTABS", (str(tmp_path),))
    assert sz.main([*dry, "--handler", "shell"]) == sz.EXIT_DIFFERENT
    out, err = capsys.readouterr()
    assert out.startswith("+ cron-cd-")
    assert err == (
        "what root ran is run by the user of the handler shell\nthere is no handler 'shell' yet\n"
    )
    (tmp_path / "jobs").write_text("@reboot root run\n")
    assert sz.main([*dry, "--handler", "shell"]) == sz.EXIT_CONFIG
    assert "jobs line 1: @reboot is no time" in capsys.readouterr().err


def test_an_id_stays_when_the_time_changes_and_tells_commands_apart() -> None:
    ids = list(read_crontab("@daily A=1 /opt/back up.sh\n@daily [ -x a ]\n@daily run\n").entries)
    assert [each.rpartition("-")[0] for each in ids] == ["cron-back", "cron-job", "cron-run"]
    moved = "5 5 * * * run\n#\n\n0 1 * * *   A=1 /opt/back up.sh\n@weekly [ -x a ]"
    assert sorted(read_crontab(moved).entries) == sorted(ids)
    twice = list(read_crontab("@daily run\n@weekly run\n").entries)
    assert twice == [ids[2], f"{ids[2]}-2"]
    assert all(sz.NAME.check(("id",), each) for each in ids + twice)


def test_the_lines_of_a_system_crontab_name_a_user() -> None:
    crontab = read_crontab("@daily\troot\trun it\n@daily me run it\n@weekly me x\n", has_user=True)
    assert [e["job_params"]["command"] for e in crontab.entries.values()] == ["run it"] * 2 + ["x"]
    assert len(crontab.entries) == 3
    assert crontab.notes == [
        "what root ran is run by the user of the handler shell",
        "what me ran is run by the user of the handler shell",
    ]
    with pytest.raises(sz.ConfigError, match="there must be a user and a command"):
        read_crontab("@daily root", has_user=True)


def test_a_crontabs_schedules_behave_as_cron_did() -> None:
    (entry,) = read_crontab("# Nightly\n30 2 * * * run").entries.values()
    made = sz.parse_declared_schedule("cron-run", entry, CONFIG, NOW_US)
    assert (made.handler_id, made.method_name, made.name) == ("shell", "run", "Nightly")
    assert made.retry is not None
    assert (made.retry.max_attempts, made.overlap, made.timeout) == (1, "allow", sz.MAX_RUN_S)
    assert made.misfire_grace_time == 60


@pytest.mark.parametrize(
    ("text", "is_crontab"),
    [
        ("# Written\n\nschedules:\n  a: {}\n", False),
        ('{"schedules": {}}', False),
        ("---\nschedules: {}\n", False),
        ("", False),
        ("# m h\n\n*/5 * * * * run\n", True),
        ("0 5 * * 1 run it", True),
        ("@daily run", True),
        ("MAILTO=me\n", True),
        ("PATH = /bin\n", True),
    ],
)
def test_a_crontab_is_known_by_its_first_line(text: str, is_crontab: bool) -> None:
    assert sz.looks_like_crontab(text) is is_crontab


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_text_makes_more_than_a_sentence_of_a_crontab(text: str) -> None:
    try:
        crontab = read_crontab(text)
    except sz.ConfigError as error:
        assert str(error).startswith("crontab line ")
    else:
        for key, entry in crontab.entries.items():
            sz.NAME.check(("id",), key)
            assert entry["job_params"]


# The difference


def difference_of(
    known: list[sz.Schedule], wanted: list[sz.Schedule], *, prunes: bool = False
) -> sz.Difference:
    return sz.find_difference(known, wanted, lambda s: prunes and s.origin == "api")


def test_the_difference_names_what_is_new_changed_equal_and_too_many() -> None:
    before = a_schedule("b", timeout=5, name="old", job_params={"a": 1})
    known = [a_schedule("a"), before, a_schedule("old"), a_schedule("older", paused=True)]
    after = a_schedule("b", timeout=6, name="old", job_params={"a": True}, paused=True)
    wanted = [a_schedule("a"), after, a_schedule("c")]
    assert sz.render_difference(difference_of(known, wanted, prunes=True)) == [
        "+ c  h.m, every hour",
        '~ b  job_params: {"a": 1} → {"a": true}; timeout: 5.0 → 6.0; paused: default → true',
        "- old",
        "- older",
        "= 1 unchanged",
    ]
    assert all(new for _, _, new in difference_of(known, wanted).steps)


def test_importing_what_is_there_is_no_difference() -> None:
    known = [a_schedule("a"), a_schedule("b", retry={"max_attempts": 1}, job_params={"x": [1]})]
    wanted = read_back(sz.render_schedules(known)).values()
    difference = difference_of(known, list(wanted), prunes=True)
    assert (difference.steps, difference.equal) == ([], 2)


def test_a_declared_schedule_is_neither_changed_nor_removed() -> None:
    declared = replace(a_schedule("a"), origin="config")
    assert difference_of([declared], [], prunes=True).steps == []
    assert difference_of([declared], [a_schedule("a")]).equal == 1
    with pytest.raises(sz.Conflict, match="declared in the configuration file"):
        difference_of([declared], [a_schedule("a", name="mine")])


def test_a_failure_half_way_says_what_was_done() -> None:
    old = replace(a_schedule("b"), key=7, generation=3)
    difference = difference_of(
        [old, a_schedule("z")], [a_schedule("a"), a_schedule("b", name="n")], prunes=True
    )
    asked: list[tuple[str, str, Any]] = []

    def ask(method: str, schedule_id: str, headers: Any, body: Any) -> tuple[int, dict[str, Any]]:
        asked.append((method, schedule_id, headers))
        return (412, {"error": "it fails"}) if schedule_id == failing else (200, {})

    failing = "z"
    with pytest.raises(sz.ScheduleZeroError) as caught:
        sz.carry_out(difference, ask)
    assert "z failed: it fails; done before it, of 3: a, b;" in str(caught.value)
    assert asked == [
        ("PUT", "a", {"If-None-Match": "*"}),
        ("PUT", "b", {"If-Match": '"7-3"'}),
        ("DELETE", "z", {"If-Match": '"None-0"'}),
    ]
    failing = "a"
    with pytest.raises(sz.ScheduleZeroError, match=r"a failed: .*: nothing; import again"):
        sz.carry_out(difference, ask)
