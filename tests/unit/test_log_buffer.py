from __future__ import annotations

from typing import Any

import pytest
import schedulezero as sz
from schedulezero import LogBuffer, join_logs

HALF = sz.MAX_LOG_BYTES // 2


def filled(count: int, text: str = "x" * 200) -> LogBuffer:
    buffer = LogBuffer()
    for number in range(count):
        buffer.add([[0.0, "stdout", f"{number:06} {text}"]], 0)
    return buffer


def test_a_line_is_time_level_and_text() -> None:
    buffer = LogBuffer()
    buffer.add([[1.25, "WARNING", "over there"], [2, "stdout", ""]], 0)
    assert buffer.text() == (
        "1970-01-01T00:00:01.250000Z WARNING over there\n1970-01-01T00:00:02Z stdout \n"
    )


def test_nothing_logged_is_an_empty_text() -> None:
    assert LogBuffer().text() == ""


@pytest.mark.parametrize("count", [1, 100, 1_000, 10_000])
@pytest.mark.parametrize("text", ["x" * 200, "ä" * 200, "\U0001f642" * 100])
def test_head_and_tail_are_kept_within_the_bound_in_bytes(count: int, text: str) -> None:
    buffer = filled(count, text)
    whole = buffer.text()
    assert len(whole.encode()) <= sz.MAX_LOG_BYTES + 60
    lines = whole.splitlines()
    assert f" {0:06} " in lines[0]
    assert f" {count - 1:06} " in lines[-1]


def test_what_is_left_out_is_counted_where_it_is_missing() -> None:
    lines = filled(1_000).text().splitlines()
    (place,) = (n for n, line in enumerate(lines) if "left out" in line)
    assert lines[place] == f"… {1_000 - (len(lines) - 1)} lines left out …"
    assert 0 < place < len(lines) - 1
    numbers = [int(line.split()[2]) for n, line in enumerate(lines) if n != place]
    assert numbers == sorted(numbers)


def test_lines_the_handler_dropped_are_counted_too() -> None:
    buffer = LogBuffer()
    buffer.add([[0, "stdout", "first"]], 7)
    assert "… 7 lines left out …" in buffer.text()


def test_lines_the_handler_dropped_are_counted_where_they_are_missing() -> None:
    buffer = LogBuffer()
    buffer.add([[0, "stdout", "first"]], 0)
    buffer.add([[0, "stdout", "last"]], 7)
    texts = [line.split(" ", 1)[1] for line in buffer.text().splitlines()]
    assert texts == ["stdout first", "7 lines left out …", "stdout last"]


def test_one_endless_line_is_cut() -> None:
    buffer = LogBuffer()
    buffer.add([[0, "stdout", "z" * 1_000_000]], 0)
    assert buffer.text().count("z") == sz.MAX_ERROR_CHARS


@pytest.mark.parametrize("at_s", [-1, -1e308, 0, True, 4e9, 1e308, 2**63 - 1])
def test_no_time_is_out_of_range(at_s: Any) -> None:
    buffer = LogBuffer()
    buffer.add([[at_s, "stdout", "x"]], 0)
    assert buffer.text().endswith("Z stdout x\n")


def test_short_logs_are_joined_as_they_are() -> None:
    assert join_logs("one\n", "two\n") == "one\ntwo\n"


@pytest.mark.parametrize("letter", ["x", "ä", "\U0001f642"])
def test_long_logs_are_joined_by_whole_lines_of_head_and_tail(letter: str) -> None:
    first = "".join(f"first {n} {letter * 50}\n" for n in range(1_000))
    second = "".join(f"second {n} {letter * 50}\n" for n in range(1_000))
    joined = join_logs(first, second)
    assert len(joined.encode()) <= sz.MAX_LOG_BYTES + 60
    lines = joined.splitlines()
    assert lines[0] == f"first 0 {letter * 50}"
    assert lines[-1] == f"second 999 {letter * 50}"
    assert all(line.endswith(letter * 50) or "left out" in line for line in lines)
    assert sum("left out" in line for line in lines) == 1


def test_joining_again_and_again_stays_within_the_bound() -> None:
    log = ""
    for attempt in range(50):
        log = join_logs(log, f"attempt {attempt}\n" + "y" * 100 * 100 + "\n")
    assert len(log.encode()) <= sz.MAX_LOG_BYTES + 60
    assert log.startswith("attempt 0\n")
    assert len(log.encode()) > HALF
