from __future__ import annotations

import logging

import pytest
from schedulezero import LogFormatter, escape_controls


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
