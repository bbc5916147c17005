"""Schedules as files: what `export` writes, what `import` reads, and the difference it finds."""

from __future__ import annotations

import json
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
