from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from schedulezero import (
    BUILT_IN_DEPLOYMENTS,
    Config,
    ConfigError,
    load_config,
    load_local_timezone,
    mask_config,
    parse_config,
    parse_yaml,
)


def parse(
    text: str = "", environ: dict[str, str] | None = None, deployment: str | None = None
) -> Config:
    mapping, lines = parse_yaml(text, "config.yaml")
    return parse_config(
        mapping,
        environ=environ or {},
        deployment=deployment,
        path="/srv/config.yaml",
        directory="/srv",
        lines=lines,
        local_timezone=lambda: "Europe/Berlin",
    )


def refusal(
    text: str = "", environ: dict[str, str] | None = None, deployment: str | None = None
) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, environ, deployment)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


HANDLER = "handlers: {a: {run: 'handler.py:DingDong'}}\n"
SCHEDULE = """
schedules:
  s:
    handler_id: a
    method_name: chime
    trigger_config: {type: cron, minute: "0"}
"""


# What an empty configuration is.


def test_everything_has_a_default() -> None:
    config = parse()
    assert (config.deployment, config.http_port, config.zmq_port) == ("default", 8888, 4242)
    assert (config.data_dir, config.log_dir) == ("/srv/data/default", "/srv/logs/default")
    assert config.timezone == "Europe/Berlin"
    assert config.handlers == ()


@pytest.mark.parametrize(
    ("name", "http_port", "zmq_port"),
    [
        ("default", 8888, 4242),
        ("clock", 8889, 4243),
        ("production", 8890, 4244),
        ("test", 8891, 4245),
    ],
)
def test_the_built_in_deployments_run_side_by_side(
    name: str, http_port: int, zmq_port: int
) -> None:
    config = parse(deployment=name)
    assert (config.http_port, config.zmq_port) == (http_port, zmq_port)
    assert config.data_dir == f"/srv/data/{name}"
    assert config.log_dir == f"/srv/logs/{name}"


def test_the_clock_deployment_brings_its_handler_and_chimes_each_minute() -> None:
    config = parse(deployment="clock")
    assert [spec.run for spec in config.handlers] == ["handler.py:DingDong"]
    assert set(config.schedules) == {"hourly-chime", "minute-chime"}
    assert set(BUILT_IN_DEPLOYMENTS) == {"default", "clock", "production", "test"}


def test_an_empty_file_and_empty_sections_mean_the_defaults() -> None:
    assert parse("# nothing\n") == parse("handlers:\nschedules:\nretry:\nhistory:\ndeployments:\n")


# What wins over what.


def test_the_file_wins_over_the_built_in_deployment_and_its_own_entry_over_both() -> None:
    text = "handlers: {ding-dong: {command: [a]}}\n"
    own = "deployments: {clock: {handlers: {ding-dong: {command: [b]}}}}\n"
    assert parse(text, deployment="clock").handlers[0].command == ("a",)
    assert parse(text + own, deployment="clock").handlers[0].command == ("b",)


def ports_of(text: str) -> dict[str, tuple[int, int]]:
    return {
        name: (config.http_port, config.zmq_port)
        for name in ("default", "attic", "clock", "production", "test")
        if (config := parse(text, deployment=name))
    }


def test_the_usual_ports_at_the_top_leave_the_built_in_deployments_side_by_side() -> None:
    text = "http_port: 8888\nzmq_port: 4242\ndeployments: {clock: {http_port: 9001}, attic: {}}\n"
    assert ports_of(text) == {
        "default": (8888, 4242),
        "attic": (8888, 4242),
        "clock": (9001, 4243),
        "production": (8890, 4244),
        "test": (8891, 4245),
    }


def test_other_ports_at_the_top_are_meant_for_whichever_deployment_runs() -> None:
    text = "http_port: 9000\nzmq_port: 9900\ndeployments: {clock: {http_port: 9001}, attic: {}}\n"
    ports = ports_of(text)
    assert ports.pop("clock") == (9001, 9900)
    assert set(ports.values()) == {(9000, 9900)}
    environ = {"SCHEDULEZERO_HTTP_PORT": "9002"}
    assert parse(text, environ, deployment="production").http_port == 9002


def test_the_environment_wins_over_the_file() -> None:
    environ = {"SCHEDULEZERO_HTTP_PORT": "9002", "SCHEDULEZERO_RETRY_MAX_ATTEMPTS": "7"}
    config = parse("http_port: 9000\nretry: {factor: 3}\n", environ)
    assert config.http_port == 9002
    assert (config.retry.max_attempts, config.retry.factor) == (7, 3.0)


def test_every_scalar_key_can_be_set_by_the_environment() -> None:
    environ = {
        "SCHEDULEZERO_INSTANCE_NAME": "x",
        "SCHEDULEZERO_DESCRIPTION": "d",
        "SCHEDULEZERO_ADMIN_CONTACT": "a@b",
        "SCHEDULEZERO_VERSION": "1",
        "SCHEDULEZERO_TIMEZONE": "Asia/Tokyo",
        "SCHEDULEZERO_HTTP_HOST": "::1",
        "SCHEDULEZERO_ZMQ_HOST": "0.0.0.0",
        "SCHEDULEZERO_ZMQ_PORT": "5555",
        "SCHEDULEZERO_DATA_DIR": "/var/lib/sz",
        "SCHEDULEZERO_LOG_DIR": "/var/log/sz",
        "SCHEDULEZERO_LOG_LEVEL": "debug",
        "SCHEDULEZERO_LOG_FORMAT": "json",
        "SCHEDULEZERO_LOG_TO": "stdout",
        "SCHEDULEZERO_LOG_MAX_MB": "20",
        "SCHEDULEZERO_MEMORY_LIMIT": "100",
        "SCHEDULEZERO_TIMEOUT": "1.5",
        "SCHEDULEZERO_HISTORY_MAX_AGE_DAYS": "2",
    }
    config = parse(environ=environ)
    assert (config.instance_name, config.version, config.timezone) == ("x", "1", "Asia/Tokyo")
    assert (config.http_host, config.zmq_host, config.zmq_port) == ("::1", "0.0.0.0", 5555)
    assert config.data_dir == "/var/lib/sz/default"
    assert (config.log_level, config.timeout, config.max_age_days) == ("DEBUG", 1.5, 2.0)
    assert (config.log_format, config.log_to) == ("json", "stdout")
    assert (config.log_max_mb, config.memory_limit) == (20, 100)


def test_the_environment_picks_the_deployment_and_the_command_line_wins() -> None:
    environ = {"SCHEDULEZERO_DEPLOYMENT": "clock"}
    assert parse(environ=environ).deployment == "clock"
    assert parse(environ=environ, deployment="test").deployment == "test"


def test_an_empty_variable_counts_as_not_set() -> None:
    environ = {"SCHEDULEZERO_HTTP_PORT": "", "SCHEDULEZERO_DEPLOYMENT": ""}
    assert parse(environ=environ) == parse()


def test_variables_of_others_with_our_prefix_are_ignored() -> None:
    environ = {"SCHEDULEZERO_PORT": "tcp://10.0.0.1:8888", "SCHEDULEZERO_SERVICE_HOST": "10.0.0.1"}
    assert parse(environ=environ) == parse()


def test_sections_merge_by_key_and_null_removes_an_inherited_entry() -> None:
    text = HANDLER + "deployments: {clock: {handlers: {b: {command: [b]}, ding-dong: null}}}\n"
    config = parse(text, deployment="clock")
    assert [spec.handler_id for spec in config.handlers] == ["a", "b"]


def test_a_deployment_of_the_file_can_be_chosen() -> None:
    assert parse("deployments: {attic: {http_port: 9}}", deployment="attic").http_port == 9


# Handlers and schedules.


def test_a_handler_is_a_python_class_or_a_command() -> None:
    text = HANDLER.replace("}}\n", ", env: {N: 1}}, b: {command: [x, -v], cwd: jobs}}\n")
    first, second = parse(text).handlers
    assert (first.run, first.env, first.cwd) == ("handler.py:DingDong", {"N": "1"}, None)
    assert (second.command, second.cwd) == (("x", "-v"), "/srv/jobs")


def test_a_declared_schedule_is_kept_as_it_was_written() -> None:
    entry = parse(SCHEDULE).schedules["s"]
    assert entry["trigger_config"] == {"type": "cron", "minute": "0"}


def test_a_date_in_yaml_stays_the_text_it_is() -> None:
    text = SCHEDULE.replace(
        '{type: cron, minute: "0"}', "{type: date, run_date: 2027-01-02 03:04:05}"
    )
    trigger = parse(text).schedules["s"]["trigger_config"]
    assert trigger["run_date"] == "2027-01-02 03:04:05"


# What is refused, and in which words.


def test_an_unknown_key_is_named_with_line_value_suggestion_and_what_is_allowed() -> None:
    sentence = refusal("# comment\nhtpp_port: 9000\n")
    assert sentence.startswith("config.yaml line 2: unknown key 'htpp_port' (value 9000)")
    assert "did you mean 'http_port'?" in sentence
    assert "zmq_port" in sentence


@pytest.mark.parametrize(
    ("text", "line", "key", "suggestion"),
    [
        ("retry:\n  max_atempts: 3\n", 2, "retry.max_atempts", "max_attempts"),
        ("history: {max_age: 3}\n", 1, "history.max_age", "max_age_days"),
        ("deployments:\n  x:\n    zmq_prt: 1\n", 3, "deployments.x.zmq_prt", "zmq_port"),
        ("handlers:\n  a:\n    comand: [x]\n", 3, "handlers.a.comand", "command"),
        (SCHEDULE + "    overlapp: skip\n", 7, "schedules.s.overlapp", "overlap"),
        (SCHEDULE + "    retry: {factr: 2}\n", 7, "schedules.s.retry.factr", "factor"),
    ],
)
def test_unknown_keys_are_found_at_every_depth(
    text: str, line: int, key: str, suggestion: str
) -> None:
    sentence = refusal(text)
    assert f"config.yaml line {line}: unknown key {key!r}" in sentence
    assert f"did you mean {suggestion!r}?" in sentence


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("http_port: '8888'", "a whole number from 1 to 65535"),
        ("http_port: 0", "a whole number from 1 to 65535"),
        ("http_port: 65536", "a whole number from 1 to 65535"),
        ("http_port: true", "a whole number from 1 to 65535"),
        ("http_port: 1.5", "a whole number"),
        ("http_port:", "a whole number"),
        ("timeout: .nan", "a number from"),
        ("timeout: .inf", "a number from"),
        ("timeout: -1", "a number from"),
        ("timeout: 0", "a number from"),
        ("timeout: true", "a number from"),
        ("timezone: Europe/Berlim", "did you mean 'Europe/Berlin'?"),
        ("timezone: ../etc/passwd", "IANA"),
        ("timezone: Europe", "IANA"),
        ("timezone: localtime", "IANA"),
        ("timezone: 1", "IANA"),
        ("log_level: LOUD", "one of DEBUG, INFO"),
        ("log_format: xml", "one of text, json"),
        ("log_to: syslog", "one of file, stdout"),
        ("log_max_mb: 0", "a whole number from 1"),
        ("memory_limit: 1", "a whole number from 16"),
        ("handlers: {a: {command: [x], autostart: maybe}}", "true or false"),
        ("http_host: ''", "host name"),
        ("http_host: 'a b'", "host name"),
        ("data_dir: ''", "a text of 1 to"),
        ("instance_name: [a]", "a text of 1 to"),
        (f"description: {'x' * 1025}", "at most 1024 characters"),
        ("retry: 3", "a mapping"),
        ("retry: {max_attempts: 0}", "a whole number from 1"),
        ("retry: {jitter: 1.1}", "a number from 0 to 1"),
        ("history: {max_executions: -1}", "a whole number from 1"),
        ("zmq_port: 8888", "another port than http_port"),
        ("handlers: [a]", "a mapping"),
        ("handlers: {a: {}}", "exactly one of run and command"),
        ("handlers: {a: {run: 'x.py:C', command: [x]}}", "exactly one of run and command"),
        ("handlers: {a: {run: handler}}", "file.py:ClassName"),
        ("handlers: {a: {command: x -v}}", "a list of texts"),
        ("handlers: {a: {command: []}}", "a list of texts"),
        ("handlers: {a: {command: [x, 1]}}", "a list of texts"),
        ("handlers: {../a: {command: [x]}}", "letters, digits"),
        ("handlers: {a: {1: x}}", "keys are texts"),
        ("handlers: {a: {command: [x], env: {A: null}}}", "a text"),
        ("handlers: {a: {command: [x], env: {'': x}}}", "a variable's name"),
        ("handlers: {server: {command: [x]}}", "another name"),
        ("deployments: {../x: {}}", "letters, digits"),
        ("deployments: {a: {deployments: {}}}", "unknown key"),
        (SCHEDULE + "    overlap: skipp\n", "did you mean 'skip'?"),
        (SCHEDULE + "    paused: 1\n", "true or false"),
        (SCHEDULE + "    timeout: 0.01\n", "a number from 0.1"),
        (SCHEDULE + "    name: ''\n", "a printable text"),
        (SCHEDULE.replace("handler_id: a", "handler_id: a b"), "letters, digits"),
        (SCHEDULE.replace("  s:", "  .s:"), "letters, digits"),
        (SCHEDULE + "    job_params: {x: .nan}\n", "a finite number"),
        (SCHEDULE + "    job_params: {1: x}\n", "keys are texts"),
        (SCHEDULE + "    job_params: &a {x: *a}\n", "nested at most"),
        ("schedules: {s: {method_name: x, trigger_config: {}}}", "needs the key 'handler_id'"),
    ],
)
def test_a_wrong_value_is_refused_with_line_and_what_is_allowed(text: str, allowed: str) -> None:
    sentence = refusal(text)
    assert "config.yaml" in sentence
    assert allowed in sentence


def test_a_wrong_value_says_key_line_and_value() -> None:
    assert refusal("\nhttp_port: 99999\n") == (
        "config.yaml line 2: http_port is 99999; it must be a whole number from 1 to 65535"
    )


def test_a_deployment_that_is_not_chosen_is_checked_too() -> None:
    assert "deployments.x.http_port" in refusal("deployments: {x: {http_port: no}}")


@pytest.mark.parametrize("value", ["abc", "+1", "1_0", "\u0661\u0660", "1e3", " 1"])
def test_a_wrong_variable_is_named(value: str) -> None:
    sentence = refusal(environ={"SCHEDULEZERO_HTTP_PORT": value})
    assert sentence.startswith(f"SCHEDULEZERO_HTTP_PORT is {value!r}")


def test_a_misspelt_variable_is_refused() -> None:
    sentence = refusal(environ={"SCHEDULEZERO_HTPP_PORT": "1"})
    assert sentence == (
        "unknown variable SCHEDULEZERO_HTPP_PORT; did you mean SCHEDULEZERO_HTTP_PORT?"
    )


def test_a_misspelt_deployment_is_refused() -> None:
    assert "did you mean 'production'?" in refusal(deployment="prodution")


def test_a_secret_never_shows_in_a_refusal() -> None:
    sentence = refusal("api_token: hunter2\n")
    assert "hunter2" not in sentence
    assert "hunter2" not in refusal("handlers: {a: {command: [x], env: {A: [hunter2]}}}")
    assert "hunter2" not in refusal("handlrs: {a: {command: [x], env: {A: hunter2}}}")
    assert "hunter2" not in refusal("handlers: {a: {env: {A: hunter2}}}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nhttp_port: 1\nhttp_port: 2\n", "line 3: duplicate key 'http_port'"),
        ("handlers:\n  a: {command: [x]}\n  a: {command: [y]}\n", "line 3: duplicate key 'a'"),
        ("a: [1\n", "line 2: not valid YAML"),
        ("a: !!python/object:os.system {}\n", "line 1: not valid YAML"),
        ("- a\n", "must be a mapping"),
        ("text\n", "must be a mapping"),
        ("1: 2\n", "must be a mapping"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: \x01\n", "not valid YAML"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(text: str, sentence: str) -> None:
    assert sentence in refusal(text)


# Loading.


def test_the_file_beside_is_used_without_being_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("http_port: 9000\ndata_dir: d\n")
    monkeypatch.chdir(tmp_path)
    config = load_config(None, {})
    assert config.http_port == 9000
    assert config.path == str(tmp_path / "config.yaml")
    assert config.data_dir == str(tmp_path / "d" / "default")


def test_relative_paths_start_at_the_configuration_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "sz.yaml").write_text("log_dir: ../log\n")
    monkeypatch.chdir(tmp_path)
    config = load_config(None, {"SCHEDULEZERO_CONFIG_PATH": "etc/sz.yaml"})
    assert config.log_dir == str(tmp_path / "log" / "default")
    assert load_config("etc/sz.yaml", {}).log_dir == config.log_dir


def test_without_any_file_paths_start_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, {})
    assert (config.path, config.data_dir) == (None, str(tmp_path / "data" / "default"))


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"#" * ((1 << 20) + 1)])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(str(path), {})


def test_the_local_timezone_follows_tz_and_falls_back_to_utc(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert load_local_timezone() == "Asia/Tokyo"
    monkeypatch.setenv("TZ", "No/Where")
    assert load_local_timezone() == "UTC"


# Showing.


def test_the_shown_configuration_is_json_without_secrets() -> None:
    text = """
handlers:
  a:
    command: [job, --token=s3cret, --api-key, s3cret, "http://u:s3cret@host/"]
    env: {DATABASE: s3cret}
schedules:
  s:
    handler_id: a
    method_name: m
    trigger_config: {type: cron, minute: "0"}
    job_params: {password: s3cret, nested: [{auth_token: s3cret}], city: Berlin}
"""
    shown: dict[str, Any] = mask_config(parse(text))
    assert "s3cret" not in repr(shown)
    assert shown["schedules"]["s"]["job_params"]["city"] == "Berlin"
    assert shown["handlers"]["a"]["command"][0] == "job"
    assert shown["http_port"] == 8888
    assert shown["history"] == {
        "max_executions": 10_000,
        "max_age_days": 30.0,
        "max_size_mb": 1_024,
        "keep_per_schedule": 10,
    }
    assert shown["backup"] == {"every_hours": 24.0, "keep": 3}
    assert shown["retry"]["max_attempts"] == 3
    assert "lines" not in shown


def test_numbers_of_the_environment_are_numbers() -> None:
    assert math.isclose(parse(environ={"SCHEDULEZERO_TIMEOUT": "0.25"}).timeout, 0.25)
