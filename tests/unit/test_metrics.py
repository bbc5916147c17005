"""What is counted, and how it is written down."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import schedulezero
from hypothesis import given
from hypothesis import strategies as st
from prometheus import parse_metrics
from schedulezero import (
    Execution,
    Family,
    HandlerInfo,
    Histogram,
    Metrics,
    Status,
    describe_process,
    labelled,
    load_restarts,
    load_rss_bytes,
    load_written_bytes,
    render_metrics,
    render_number,
    single,
)

EXECUTION = Execution(
    execution_id="x", schedule_id="s", handler_id="h", method_name="m", job_params={},
    status=Status.RUNNING, created_us=0, due_us=0, deadline_us=None,
    started_us=1_020_000, attempt=1, fire_us=1_000_000,
)  # fmt: skip


def text_of(*families: Family) -> str:
    return render_metrics(families).decode()


def test_a_family_is_its_help_its_type_and_its_samples() -> None:
    samples = labelled("status", [("error", 1), ("success", 20)])
    assert text_of(Family("jobs_total", "counter", "Jobs.", samples)) == (
        "# HELP jobs_total Jobs.\n"
        "# TYPE jobs_total counter\n"
        'jobs_total{status="error"} 1\n'
        'jobs_total{status="success"} 20\n'
    )


def test_a_family_without_samples_is_left_out() -> None:
    assert text_of(Family("a", "gauge", "A.", ()), Family("b", "gauge", "B.", single(1))) == (
        "# HELP b B.\n# TYPE b gauge\nb 1\n"
    )


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=20))
def test_any_label_is_read_back_as_it_was(value: str) -> None:
    text = text_of(Family("a", "gauge", "A.", labelled("name", [(value, 1)])))
    assert [sample.labels for sample in parse_metrics(text)["a"].samples] == [{"name": value}]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (1.0, "1"), (0.5, "0.5"), (2**60 + 1, str(2**60 + 1))]
)
def test_numbers_keep_all_their_digits(number: float, text: str) -> None:
    assert render_number(number) == text


@given(st.lists(st.floats(0, 100), max_size=50))
def test_buckets_are_cumulative_and_agree_with_the_count(values: list[float]) -> None:
    histogram = Histogram((0.1, 1.0, 10.0))
    for value in values:
        histogram.observe(value)
    samples = list(histogram.samples())
    for (_, labels, count), bound in zip(samples[:4], (0.1, 1.0, 10.0, math.inf), strict=True):
        assert float(dict(labels)["le"]) == bound
        assert count == sum(value <= bound for value in values)
    assert samples[4][2] == pytest.approx(sum(values))
    assert samples[5] == ("_count", (), len(values))


def test_the_first_start_and_the_end_of_an_execution_count_once_each() -> None:
    metrics = Metrics()
    queued = EXECUTION._replace(status=Status.QUEUED, attempt=0, started_us=None)
    again = EXECUTION._replace(attempt=2, started_us=9_000_000)
    ended = again._replace(status=Status.SUCCESS, completed_us=9_500_000, duration_us=500_000)
    for execution in (queued, EXECUTION, queued._replace(attempt=1), again, ended):
        metrics.count_execution(execution)
    families = parse_metrics(text_of(*metrics.families()))
    assert families["schedulezero_executions_total"].value(status="success") == 1
    lateness = families["schedulezero_fire_lateness_seconds"]
    assert (lateness.value("_count"), lateness.value("_sum")) == (1, pytest.approx(0.02))
    duration = families["schedulezero_execution_duration_seconds"]
    assert (duration.value("_count"), duration.value("_sum")) == (1, 0.5)


def test_a_call_is_never_late() -> None:
    metrics = Metrics()
    metrics.count_execution(EXECUTION._replace(fire_us=None))
    lateness = parse_metrics(text_of(*metrics.families()))["schedulezero_fire_lateness_seconds"]
    assert lateness.value("_count") == 0


def test_what_never_ran_has_no_duration() -> None:
    metrics = Metrics()
    metrics.count_execution(EXECUTION._replace(status=Status.MISSED, completed_us=1))
    families = parse_metrics(text_of(*metrics.families()))
    assert families["schedulezero_executions_total"].value(status="missed") == 1
    assert families["schedulezero_execution_duration_seconds"].value("_count") == 0


def test_every_final_status_is_there_from_the_start() -> None:
    families = parse_metrics(text_of(*Metrics().families()))
    shown = {s.labels["status"] for s in families["schedulezero_executions_total"].samples}
    assert shown == {str(s) for s in Status} - {"queued", "running"}


def test_requests_and_clock_steps_are_counted_by_kind() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.count_request("GET", "/api/schedules/{schedule_id}", 404)
    metrics.count_step(2_000_000)
    metrics.count_step(-1)
    families = parse_metrics(text_of(*metrics.families()))
    count = families["schedulezero_http_requests_total"].value(
        method="GET", route="/api/schedules/{schedule_id}", status="404"
    )
    assert count == 3
    steps = families["schedulezero_clock_steps_total"]
    assert (steps.value(direction="forward"), steps.value(direction="back")) == (1, 1)


def bounded(values: dict[str, float], join: Callable[..., float] = sum) -> dict[str, float]:
    samples = labelled("name", values.items(), join)
    return {name: value for _, ((_, name),), value in samples}


def test_what_is_beyond_the_bound_shares_one_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedulezero, "MAX_LABELS", 1)
    assert bounded({"a": 1, "b": 2, "c": 3}) == {"a": 1, "other": 5}
    assert bounded({"other": 1, "b": 2, "c": 3}) == {"b": 2, "other": 4}  # no label comes twice
    assert bounded({"a": 1}) == {"a": 1}


def test_handlers_beyond_the_bound_are_up_while_all_are(monkeypatch: pytest.MonkeyPatch) -> None:
    is_up = {"a": True, "b": False, "c": True, "d": True}
    for most, other in ((1, False), (2, True), (3, True)):
        monkeypatch.setattr(schedulezero, "MAX_LABELS", most)
        assert bounded(is_up, min)["other"] is other
    monkeypatch.setattr(schedulezero, "MAX_LABELS", 4)
    assert bounded(is_up, min) == is_up


def test_restarts_are_believed_only_from_the_governor_of_this_process(tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    assert load_restarts(str(tmp_path)) == {}
    text = '{"pid": %d, "children": [{"name": "server", "restarts": 3}]}'
    status.write_text(text % os.getppid())
    assert load_restarts(str(tmp_path)) == {"server": 3}
    status.write_text(text % 1_000_000_000)
    assert load_restarts(str(tmp_path)) == {}
    status.write_text("{")
    assert load_restarts(str(tmp_path)) == {}


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc")
def test_the_process_families_say_when_it_began_and_what_it_uses() -> None:
    families = parse_metrics(text_of(*describe_process(1_000.0, 10.0)))
    assert families["process_start_time_seconds"].value() == 990
    assert families["process_resident_memory_bytes"].value() > 1 << 20
    assert (load_rss_bytes() or 0) > 1 << 20
    assert families["schedulezero_disk_written_bytes_total"].value() >= 0
    assert f"\nwrite_bytes: {load_written_bytes()}\n" in Path("/proc/self/io").read_text()


# The Grafana dashboard of them

HANDLER = HandlerInfo("a", "dial-in", "Connected", (), (), 0, 0, 0)

GRAFANA = json.loads((Path(schedulezero.__file__).parent / "static" / "grafana.json").read_text())
TARGETS = [target for panel in GRAFANA["panels"] for target in panel["targets"]]


def families_of_a_server(data_dir: str) -> list[Family]:
    """What /metrics offers once there was a request, a handler and a governor."""
    metrics = Metrics()
    metrics.count_request("GET", "/", 200)
    status = {"pid": os.getppid(), "children": [{"name": "server", "restarts": 0}]}
    Path(data_dir, "status.json").write_text(json.dumps(status))
    app = SimpleNamespace(
        clock=schedulezero.Clock(), started_monotonic=0.0, metrics=metrics,
        config=schedulezero.Config(data_dir=data_dir),
        dispatcher=SimpleNamespace(count_waiting=lambda: ({"ready": 0}, None), running=0),
        gateway=SimpleNamespace(handlers=lambda: [HANDLER], malformed=0),
        store=SimpleNamespace(commits=0, state="ok", count_schedules=lambda: {"active": 1}),
        events=SimpleNamespace(subscribers=0),
    )  # fmt: skip
    return list(schedulezero.describe_metrics(app))  # type: ignore[arg-type]


def test_the_grafana_dashboard_asks_only_for_what_is_offered(tmp_path: Path) -> None:
    offered = {
        family.name + suffix: {label for label, _ in labels} | {"instance"}
        for family in families_of_a_server(str(tmp_path))
        for suffix, labels, _ in family.samples
    }
    (choice,) = (v["query"] for v in GRAFANA["templating"]["list"] if v["name"] == "instance")
    for expression, legend in [(choice, ""), *((t["expr"], t["legendFormat"]) for t in TARGETS)]:
        names = re.findall(r"\b(?:schedulezero|process)_\w+", expression)
        labels = re.findall(r"{{(\w+)}}", legend) + re.findall(r"by \((\w+)\)", expression)
        assert names and set(names) <= offered.keys()
        assert all(set(labels) <= offered[name] for name in names)


def test_each_panel_of_the_grafana_dashboard_has_a_place_and_follows_its_variables() -> None:
    panels = GRAFANA["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len({panel["id"] for panel in panels}) == len(panels)
    assert {v["name"] for v in GRAFANA["templating"]["list"]} == {"DS_PROMETHEUS", "instance"}
    assert {panel["datasource"]["uid"] for panel in panels} == {"${DS_PROMETHEUS}"}
    assert all('instance=~"$instance"' in target["expr"] for target in TARGETS)
