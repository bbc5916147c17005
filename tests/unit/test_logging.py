from __future__ import annotations

import json
import logging

import pytest
from schedulezero import (
    LOG_BACKUPS,
    LOG_FILE_BYTES,
    Config,
    HandlerSpec,
    JsonLogFormatter,
    LogFormatter,
    escape_controls,
    log_file_bytes,
    surplus_logs,
)


def record(message: str, *args: object, exc_info: BaseException | None = None) -> logging.LogRecord:
    info = (type(exc_info), exc_info, exc_info.__traceback__) if exc_info else None
    return logging.LogRecord("x", logging.INFO, "/a/b/where.py", 12, message, args, info, "func")


def test_a_line_is_time_level_place_and_message() -> None:
    entry = record("fired %s", "hourly")
    entry.created = 1_795_448_685.1239
    assert LogFormatter().format(entry) == (
        "2026-11-23T15:44:45.123Z INFO where.py:12:func fired hourly"
    )


@pytest.mark.parametrize("control", ["\n", "\r", "\x1b", "\0", "\x7f", "\x9b", "\u2028", "\u2029"])
def test_no_message_can_forge_a_line_or_a_colour(control: str) -> None:
    text = LogFormatter().format(record("a%sb", control))
    assert control not in text
    assert len(text.splitlines()) == 1


def test_escapes_can_be_read() -> None:
    assert escape_controls("a\nb\x1b[31m\u2028é") == r"a\nb\x1b[31m\u2028é"


def test_a_traceback_is_indented_so_that_it_cannot_look_like_a_line() -> None:
    try:
        raise ValueError("bad\n2026-11-23T15:44:45.123Z INFO forged")
    except ValueError as error:
        text = LogFormatter().format(record("failed", exc_info=error))
    first, *rest = text.splitlines()
    assert first.endswith(" failed")
    assert all(line.startswith("    ") for line in rest)


def test_what_is_about_an_execution_says_so() -> None:
    entry = record("ended")
    entry.execution_id, entry.handler_id = "0abc", "ding-dong"
    assert LogFormatter().format(entry).endswith(" where.py:12:func [0abc] ended")
    shown = json.loads(JsonLogFormatter().format(entry))
    assert (shown["execution_id"], shown["handler_id"]) == ("0abc", "ding-dong")


def test_a_json_line_has_the_fields_of_a_text_line() -> None:
    entry = record("fired %s\n", "é")
    entry.created = 1_795_448_685.1239
    line = JsonLogFormatter().format(entry)
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2026-11-23T15:44:45.123Z", "level": "INFO", "file": "where.py", "line": 12,
        "function": "func", "logger": "x", "message": "fired é\n",
    }  # fmt: skip


def test_a_traceback_is_one_field_of_a_json_line() -> None:
    try:
        raise ValueError("bad")
    except ValueError as error:
        line = JsonLogFormatter().format(record("failed", exc_info=error))
    assert json.loads(line)["traceback"].endswith("ValueError: bad")
    assert "\n" not in line


@pytest.mark.parametrize("handlers", [0, 1, 50])
@pytest.mark.parametrize("max_mb", [1, 20, 100_000])
def test_all_logs_together_stay_within_their_bound(handlers: int, max_mb: int) -> None:
    specs = tuple(HandlerSpec(f"h{number}", command=("x",)) for number in range(handlers))
    file_bytes = log_file_bytes(Config(log_max_mb=max_mb, handlers=specs))
    assert file_bytes <= LOG_FILE_BYTES
    assert file_bytes * (2 + 2 * handlers) * (LOG_BACKUPS + 1) <= max_mb << 20


def test_the_oldest_logs_go_first_but_never_one_that_is_written_to() -> None:
    files = [("new.log.1", 40, 3.0), ("old.log.1", 40, 1.0), ("live.log", 40, 0.0)]
    assert surplus_logs(files, 120, ["live.log"]) == []
    assert surplus_logs(files, 119, ["live.log"]) == ["old.log.1"]
    assert surplus_logs(files, 0, ["live.log"]) == ["old.log.1", "new.log.1"]
