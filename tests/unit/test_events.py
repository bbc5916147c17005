from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import schedulezero as sz
from schedulezero import Events, Execution, Overloaded, Status


class Loop:
    """A loop whose timers the test runs."""

    def __init__(self) -> None:
        self.timers: list[Callable[[], None]] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> object:
        self.timers.append(callback)
        return object()

    def turn(self) -> None:
        timers, self.timers = self.timers, []
        for callback in timers:
            callback()


class Watcher:
    """A client: what was written to it, as (id, kind, value)."""

    def __init__(self, events: Events, last_event_id: str | None = None) -> None:
        self.seen: list[tuple[str, str, Any]] = []
        self.takes_more = True
        self.close = events.subscribe(self.write, self.framing, last_event_id)

    def framing(self, event_id: str, kind: str, body: bytes) -> bytes:
        return json.dumps([event_id, kind, json.loads(body)]).encode() + b"\n"

    def write(self, chunk: bytes) -> bool:
        self.seen += [tuple(json.loads(line)) for line in chunk.splitlines()]
        return self.takes_more

    @property
    def values(self) -> list[Any]:
        return [value for _, _, value in self.seen]


@pytest.fixture
def loop() -> Loop:
    return Loop()


def encode(kind: str, value: Any) -> bytes | None:
    if isinstance(value, Execution):
        value = [value.execution_id, value.status]
    return None if value == "gone" else json.dumps(value).encode()


@pytest.fixture
def events(loop: Loop) -> Events:
    return Events(loop, "boot", encode)  # type: ignore[arg-type]


def execution(number: int, status: Status = Status.QUEUED, **fields: Any) -> Execution:
    return Execution(f"{number:012}", None, "h", "m", fields, status, 0, 0, None)


def test_events_reach_every_subscriber_together_after_a_moment(events: Events, loop: Loop) -> None:
    first, second = Watcher(events), Watcher(events)
    events.publish("handler", "a")
    events.publish("handler", "b")
    assert first.seen == []
    loop.turn()
    assert first.seen == [("boot-1", "handler", "a"), ("boot-2", "handler", "b")]
    assert second.seen == first.seen


def test_of_several_events_on_one_thing_only_the_last_is_sent(events: Events, loop: Loop) -> None:
    watcher = Watcher(events)
    events.publish("execution", execution(1, Status.QUEUED))
    events.publish("handler", "h")
    events.publish("execution", execution(1, Status.RUNNING))
    events.publish("execution", execution(2, Status.RUNNING))
    events.publish("execution", execution(1, Status.SUCCESS))
    loop.turn()
    assert watcher.values == ["h", ["000000000002", "running"], ["000000000001", "success"]]


def test_one_thing_of_two_kinds_is_two_things(events: Events, loop: Loop) -> None:
    watcher = Watcher(events)
    events.publish("handler", "same")
    events.publish("schedule", "same")
    loop.turn()
    assert [kind for _, kind, _ in watcher.seen] == ["handler", "schedule"]


def test_nothing_is_rendered_while_nobody_watches(loop: Loop) -> None:
    def refuse(kind: str, value: Any) -> bytes:
        raise AssertionError("rendered")

    events = Events(loop, "boot", refuse)  # type: ignore[arg-type]
    events.publish("handler", "a")
    assert loop.timers == []


def test_what_has_nothing_left_to_tell_is_left_out(events: Events, loop: Loop) -> None:
    watcher = Watcher(events)
    events.publish("handler", "gone")
    events.publish("handler", "there")
    loop.turn()
    assert watcher.values == ["there"]


def test_a_subscriber_goes_on_after_the_event_it_saw_last(events: Events) -> None:
    for name in "abc":
        events.publish("handler", name)
    assert Watcher(events, "boot-1").values == ["b", "c"]
    assert Watcher(events, "boot-3").values == []
    assert Watcher(events, None).values == []


@pytest.mark.parametrize(
    "last_event_id",
    ["other-1", "boot-99", "boot-", "boot-x", "boot--1", "1", "boot-\u0661", "boot-" + "9" * 30],
)
def test_an_id_that_cannot_be_resumed_is_told_as_a_gap(events: Events, last_event_id: str) -> None:
    events.publish("handler", "a")
    watcher = Watcher(events, last_event_id)
    assert watcher.seen == [("boot-1", "gap", {"lost": True})]


def test_a_subscriber_that_stayed_away_too_long_is_told_of_the_gap(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_EVENTS_KEPT", 3)
    for name in "abcde":
        events.publish("handler", name)
    assert Watcher(events, "boot-1").seen == [("boot-5", "gap", {"lost": True})]
    assert Watcher(events, "boot-2").values == ["c", "d", "e"]


def test_a_burst_that_outruns_what_is_kept_is_told_as_a_gap_to_those_connected(
    events: Events, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_EVENTS_KEPT", 3)
    watcher = Watcher(events)
    for name in "abcde":
        events.publish("handler", name)
    loop.turn()
    assert watcher.seen == [
        ("boot-2", "gap", {"lost": True}),
        ("boot-3", "handler", "c"),
        ("boot-4", "handler", "d"),
        ("boot-5", "handler", "e"),
    ]
    events.publish("handler", "f")
    loop.turn()
    assert watcher.seen[4:] == [("boot-6", "handler", "f")]


def test_large_results_and_logs_push_out_what_is_old(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_EVENT_BYTES_KEPT", 100_000)
    for number in range(50):
        events.publish("execution", execution(number, params="x" * 20_000))
    assert len(events._kept) <= 5
    events.publish("execution", execution(50, params=[{}] * 10_000))  # 40 kB of text, 640 of dicts
    assert not events._kept
    events.publish("log", {"lines": [[0, "stdout", "y" * 90_000]]})
    assert len(events._kept) == 1
    for number in range(50):
        events.publish("execution", execution(number)._replace(error="z" * 8_000))
    assert len(events._kept) <= 12


def test_a_subscriber_that_takes_no_more_is_dropped(events: Events, loop: Loop) -> None:
    slow, quick = Watcher(events), Watcher(events)
    slow.takes_more = False
    events.publish("handler", "a")
    loop.turn()
    events.publish("handler", "b")
    loop.turn()
    assert (slow.values, quick.values) == (["a"], ["a", "b"])
    assert events.subscribers == 1


def test_a_subscriber_that_leaves_while_it_is_written_to_stays_away(
    events: Events, loop: Loop
) -> None:
    watcher = Watcher(events)
    write = watcher.write

    def leave(chunk: bytes) -> bool:
        watcher.close()
        return write(chunk)

    leaving = events.subscribe(leave, watcher.framing, None)
    events.publish("handler", "a")
    loop.turn()
    leaving()
    assert events.subscribers == 0


def test_the_number_of_subscribers_is_bounded(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_SUBSCRIBERS", 2)
    first, _ = Watcher(events), Watcher(events)
    with pytest.raises(Overloaded):
        Watcher(events)
    first.close()
    first.close()
    Watcher(events)
    assert events.subscribers == 2


def test_an_event_stream_frame_has_id_event_and_data() -> None:
    frame = sz.frame_for_event_stream("boot-7", "handler", b'{"a":1}')
    assert frame == b'id: boot-7\nevent: handler\ndata: {"a":1}\n\n'
