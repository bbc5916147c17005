"""The wire format: what a message may look like, and the sentence for each that may not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schedulezero as sz
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulezero import (
    MethodInfo,
    WireError,
    decode_message,
    is_tcp_address,
    parse_call_id,
    parse_registration,
)

DIAL_IN: dict[str, Any] = {"handler_id": "worker", "instance": "3f9a", "methods": ["work"]}
PLAIN: dict[str, Any] = {"handler_id": "worker", "address": "tcp://10.0.0.7:5555"}


def test_a_message_is_an_empty_frame_and_one_json_object() -> None:
    assert decode_message([b"", b'{"method":"ping","params":{}}']) == {
        "method": "ping",
        "params": {},
    }


MALFORMED_FRAMES: list[tuple[list[bytes], str]] = [
    ([], "an empty frame and one JSON object"),
    ([b""], "an empty frame and one JSON object"),
    ([b"{}"], "an empty frame and one JSON object"),
    ([b"x", b"{}"], "an empty frame and one JSON object"),
    ([b"", b"{}", b""], "an empty frame and one JSON object"),
    ([b"", b""], "not JSON"),
    ([b"", b"{"], "not JSON"),
    ([b"", b"{} {}"], "not JSON"),
    ([b"", b"[]"], "one JSON object"),
    ([b"", b"null"], "one JSON object"),
    ([b"", b'"ping"'], "one JSON object"),
    ([b"", b"5"], "one JSON object"),
    ([b"", b"\xff\xfe{\x00}\x00"], "not UTF-8"),
    ([b"", b"\xef\xbb\xbf{}"], "not JSON"),
    ([b"", b'{"a":NaN}'], "NaN"),
    ([b"", b'{"a":-Infinity}'], "Infinity"),
    ([b"", b'{"a":1e999}'], "too large"),
    ([b"", b'{"a":9223372036854775808}'], "64 bits"),
    ([b"", b'{"a":' + b"9" * 100_000 + b"}"], "64 bits"),
    ([b"", b'{"a":1,"a":2}'], "twice"),
    ([b"", b'{"a":"\\ud800"}'], "surrogate"),
    ([b"", b'{"a":' * 100 + b"1" + b"}" * 100], "nested deeper"),
    ([b"", b"[" * 500_000], "nested deeper"),
]


@pytest.mark.parametrize(("frames", "sentence"), MALFORMED_FRAMES, ids=lambda v: repr(v)[:40])
def test_any_other_frames_are_refused_with_a_sentence(frames: list[bytes], sentence: str) -> None:
    with pytest.raises(WireError) as refused:
        decode_message(frames)
    assert sentence in str(refused.value)
    assert len(str(refused.value)) < 300


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=300))
def test_random_bytes_are_a_message_or_a_wire_error(body: bytes) -> None:
    try:
        assert isinstance(decode_message([b"", body]), dict)
    except WireError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("call_id", "parsed"),
    [
        ("0123456789ab:1", ("0123456789ab", 1)),
        ("x:999999", ("x", 999_999)),
        (":0", ("", 0)),
    ],
)
def test_a_call_id_is_execution_and_attempt(call_id: str, parsed: tuple[str, int]) -> None:
    assert parse_call_id(call_id) == parsed


@pytest.mark.parametrize(
    "call_id",
    [
        None, 5, True, [], {}, ["x:1"], "", "x", "x:", "x:-1", "x:+1", "x: 1", "x:1_0", "x:1.0",
        "x:\u0661", "x:\u00b2", "x:1000000", "x:1:2", "x:1\n",
    ],
)  # fmt: skip
def test_what_is_no_call_id_is_refused(call_id: Any) -> None:
    with pytest.raises(WireError):
        parse_call_id(call_id)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:5555", "tcp://localhost:1", "tcp://my-host.example:65535",
        "tcp://[::1]:5555", "tcp://[fe80::1]:80", "tcp://host_name:80",
    ],
)  # fmt: skip
def test_a_tcp_host_and_port_can_be_called_back(address: str) -> None:
    assert is_tcp_address(address)


@pytest.mark.parametrize(
    "address",
    [
        None, 5, "", "tcp://", "tcp://:5", "tcp://host", "tcp://host:", "tcp://host:0",
        "tcp://host:65536", "tcp://host:99999999999", "tcp://host:+80", "tcp://host:8_0",
        "tcp://host:\u0668", "tcp://*:80", "tcp://host:*", "ipc:///run/x", "inproc://x",
        "udp://host:80", "TCP://host:80", " tcp://host:80", "tcp://host:80 ", "tcp://host:80\n",
        "tcp://a b:80", "tcp://a;b:80", "tcp://[::1:80", "tcp://::1:80", "tcp://\u00e9:80",
        "tcp://a\x00b:80", "tcp://-host:80", "tcp://" + "h" * 300 + ":80", ["tcp://host:80"],
    ],
)  # fmt: skip
def test_nothing_else_is_an_address(address: Any) -> None:
    assert not is_tcp_address(address)


def test_a_dial_in_registration_says_who_what_and_how_many() -> None:
    said = parse_registration(
        {
            **DIAL_IN,
            "methods": ["work", {"name": "rest", "doc": "Sleep.", "parameters": [{"name": "s"}]}],
            "concurrency": 4,
            "running": ["0123456789ab:1"],
            "finished": [{"id": "0123456789ac:2", "success": True}],
            "pid": 77,
            "hostname": "pi",
            "library": "handler.py 1.0",
        }
    )
    assert (said.handler_id, said.instance, said.address) == ("worker", "3f9a", None)
    assert said.methods == (MethodInfo("work"), MethodInfo("rest", "Sleep.", ({"name": "s"},)))
    assert (said.concurrency, said.pid, said.hostname) == (4, 77, "pi")
    assert said.running == ("0123456789ab:1",)
    assert said.finished == ({"id": "0123456789ac:2", "success": True},)


def test_a_plain_registration_is_one_call_at_a_time_at_its_address() -> None:
    said = parse_registration({**PLAIN, "concurrency": 50, "instance": "ignored"})
    assert (said.address, said.instance, said.concurrency) == (
        "tcp://10.0.0.7:5555",
        "tcp://10.0.0.7:5555",
        1,
    )


def test_a_registration_needs_little() -> None:
    said = parse_registration({"handler_id": "h", "instance": "i"})
    assert (said.methods, said.concurrency, said.running, said.finished) == ((), 1, (), ())
    assert (said.pid, said.hostname) == (None, None)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"handler_id": None}, "'handler_id'"),
    ({"handler_id": 5}, "'handler_id'"),
    ({"handler_id": ""}, "'handler_id'"),
    ({"handler_id": "a b"}, "'handler_id'"),
    ({"handler_id": "a/b"}, "'handler_id'"),
    ({"handler_id": "-b"}, "'handler_id'"),  # the API could not name it
    ({"handler_id": ".b"}, "'handler_id'"),
    ({"handler_id": "x" * 129}, "'handler_id'"),
    ({"instance": None}, "'instance'"),
    ({"instance": ""}, "'instance'"),
    ({"instance": ["i"]}, "'instance'"),
    ({"instance": "tcp://10.0.0.7:5555"}, "'instance'"),
    ({"address": ""}, "'address'"),
    ({"address": 5}, "'address'"),
    ({"address": "ipc:///x"}, "'address'"),
    ({"methods": None}, "'methods'"),
    ({"methods": "work"}, "'methods'"),
    ({"methods": {"work": 1}}, "'methods'"),
    ({"methods": ["m"] * 257}, "'methods'"),
    ({"methods": [None]}, "method"),
    ({"methods": [""]}, "'name'"),
    ({"methods": [{"doc": "nameless"}]}, "'name'"),
    ({"methods": ["läuten"]}, "'name' of a method is 1 to 128 letters, digits and"),
    ({"methods": ["work", {"name": "-x"}]}, "the first a letter, digit or _, not '-x'"),
    ({"address": "tcp://10.0.0.7:5555", "methods": ["a b"]}, "'name' of a method is 1 to 128"),
    ({"methods": [{"name": 5}]}, "'name'"),
    ({"methods": [{"name": "m", "parameters": "a, b"}]}, "'parameters'"),
    ({"methods": [{"name": "m", "parameters": ["a"]}]}, "parameters"),
    ({"methods": [{"name": "m", "parameters": [{}]}]}, "parameters"),
    ({"concurrency": None}, "'concurrency'"),
    ({"concurrency": 0}, "'concurrency'"),
    ({"concurrency": -1}, "'concurrency'"),
    ({"concurrency": True}, "'concurrency'"),
    ({"concurrency": 1.0}, "'concurrency'"),
    ({"concurrency": "4"}, "'concurrency'"),
    ({"concurrency": 1_001}, "'concurrency'"),
    ({"concurrency": 2**62}, "'concurrency'"),
    ({"running": "x:1"}, "'running'"),
    ({"running": [5]}, "'id'"),
    ({"running": ["x"]}, "'id'"),
    ({"running": ["x:1"] * 5_001}, "'running'"),
    ({"finished": {}}, "'finished'"),
    ({"finished": ["x:1"]}, "'finished'"),
    ({"finished": [{"success": True}]}, "'id'"),
    ({"finished": [{"id": {}}]}, "'id'"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=lambda v: repr(v)[:50])
def test_a_malformed_registration_is_refused_and_the_sentence_names_the_field(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(WireError) as refused:
        parse_registration({**DIAL_IN, **changes})
    assert named in str(refused.value)
    assert refused.value.code == "bad_message"


@pytest.mark.parametrize("value", [None, 5, "x", [], {}, [[]], True, 1.5])
@pytest.mark.parametrize("key", ["pid", "hostname", "library", "surplus"])
def test_what_is_only_shown_is_never_a_reason_to_refuse(key: str, value: Any) -> None:
    said = parse_registration({**DIAL_IN, key: value})
    assert said.pid is None or isinstance(said.pid, int)
    assert said.hostname is None or len(said.hostname) <= sz.MAX_NAME_CHARS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)  # fmt: skip
FIELDS = st.sampled_from(
    ["handler_id", "instance", "address", "methods", "concurrency", "running", "finished", "pid"]
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(FIELDS, JSON))
def test_any_json_is_a_registration_or_a_wire_error(changes: dict[str, Any]) -> None:
    try:
        said = parse_registration({**DIAL_IN, **changes})
    except WireError as error:
        assert str(error)
    else:
        json.dumps([said.handler_id, said.instance, said.running])
        assert 1 <= said.concurrency <= sz.MAX_CONCURRENCY
