"""The event stream and the WebSocket, as clients of a real server see them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from appliance import Appliance
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect


class EventStream:
    """A client of /api/events."""

    def __init__(self, one: Appliance, last_event_id: str | None = None) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", one.http_port, timeout=20)
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        self.connection.request("GET", "/api/events", headers=headers)
        self.response = self.connection.getresponse()
        assert self.response.status == 200
        assert self.response.getheader("content-type") == "text/event-stream"

    def events(self) -> Iterator[tuple[str, str, Any]]:
        """Id, kind and data of each event."""
        fields: dict[str, str] = {}
        for raw in self.response:
            line = raw.decode().rstrip("\n")
            if not line and "data" in fields:
                yield fields["id"], fields["event"], json.loads(fields["data"])
                fields = {}
            elif ": " in line:
                name, _, value = line.partition(": ")
                fields[name] = value

    def until(self, kind: str, **having: Any) -> tuple[list[tuple[str, str, Any]], str]:
        """The events up to the first of a kind with these values, and its id."""
        seen = []
        for event in self.events():
            seen.append(event)
            if event[1] == kind and having.items() <= event[2].items():
                return seen, event[0]
        raise AssertionError("the stream ended")

    def close(self) -> None:
        self.connection.close()


def call(one: Appliance, number: int) -> str:
    body = {"handler_id": "ex", "method_name": "echo", "job_params": {"n": number}}
    return one.post("/api/run_now", body).json()["execution_id"]


@pytest.fixture
def one(appliance) -> Appliance:
    one = appliance().run()
    one.handler("Example", "ex")
    return one


def test_an_execution_is_seen_to_its_end(one: Appliance) -> None:
    stream = EventStream(one)
    execution_id = call(one, 1)
    seen, _ = stream.until("execution", execution_id=execution_id, status="success")
    assert seen[-1][2]["result"] == {"n": 1}
    stream.close()


def test_a_resumed_stream_has_no_gap_and_nothing_twice(one: Appliance) -> None:
    stream = EventStream(one)
    first = call(one, 1)
    _, last_event_id = stream.until("execution", execution_id=first, status="success")
    stream.close()
    missed = [call(one, number) for number in range(5)]
    resumed = EventStream(one, last_event_id)
    seen, _ = resumed.until("execution", execution_id=missed[-1], status="success")
    ended = [e[2]["execution_id"] for e in seen if e[2].get("status") == "success"]
    assert ended == missed
    resumed.close()


def test_a_stream_of_an_earlier_server_is_told_of_the_gap(one: Appliance) -> None:
    stream = EventStream(one)
    execution_id = call(one, 1)
    _, last_event_id = stream.until("execution", execution_id=execution_id)
    one.stop()
    stream.close()
    one.run()
    resumed = EventStream(one, last_event_id)
    assert next(resumed.events())[1:] == ("gap", {"lost": True})
    resumed.close()


def test_the_log_of_a_running_job_is_streamed(one: Appliance) -> None:
    stream = EventStream(one)
    one.handler("DingDong", "bell")
    body = {"handler_id": "bell", "method_name": "chime", "wait": False}
    execution_id = one.post("/api/run_now", body).json()["execution_id"]
    seen, _ = stream.until("log", execution_id=execution_id)
    assert seen[-1][2]["lines"][0][2].startswith("ding dong")
    stream.close()


def test_a_schedule_is_told_of_when_it_is_made_changed_and_deleted(one: Appliance) -> None:
    stream = EventStream(one)
    body = {"handler_id": "ex", "method_name": "echo", "schedule_id": "s"}
    trigger = {"type": "interval", "hours": 1}
    assert one.post("/api/schedule", {**body, "trigger_config": trigger}).status == 201
    stream.until("schedule", id="s", paused=False)
    one.post("/api/schedules/s/pause")
    stream.until("schedule", id="s", paused=True)
    one.request("DELETE", "/api/schedules/s")
    stream.until("schedule", id="s", deleted=True)
    stream.close()


def test_a_websocket_carries_the_same_events(one: Appliance) -> None:
    with connect(f"ws://127.0.0.1:{one.http_port}/api/ws") as socket:
        execution_id = call(one, 1)
        while True:
            message = json.loads(socket.recv(timeout=20))
            assert message.keys() == {"id", "event", "data"}
            if message["data"].get("execution_id") == execution_id:
                break
        assert socket.ping().wait(20), "a ping is answered"
        socket.send("what a client says is taken")
        last_event_id = message["id"]
    again = f"ws://127.0.0.1:{one.http_port}/api/ws?last_event_id={last_event_id}"
    following = call(one, 2)
    with connect(again) as socket:
        ids = set()
        while following not in ids:
            ids.add(json.loads(socket.recv(timeout=20))["data"].get("execution_id"))


def test_a_server_that_stops_says_goodbye_on_its_websockets(one: Appliance) -> None:
    with connect(f"ws://127.0.0.1:{one.http_port}/api/ws") as socket:
        assert one.stop() == 0
        for _ in socket:
            pass
        assert socket.close_code == 1001


def test_a_websocket_needs_its_handshake(one: Appliance) -> None:
    assert one.get("/api/ws").status == 400
    with pytest.raises(InvalidStatus):
        connect(f"ws://127.0.0.1:{one.http_port}/api/wss").__enter__()
