"""Strict JSON: what every reader understands alike, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schedulezero as sz
from hypothesis import given, settings
from hypothesis import strategies as st

REFUSED = {
    "nothing": (b"", "not JSON"),
    "half an object": (b'{"a": 1', "line 1 column"),
    "two values": (b"{} {}", "not JSON"),
    "a trailing comma": (b"[1,]", "not JSON"),
    "single quotes": (b"{'a': 1}", "not JSON"),
    "a comment": (b"{} // x", "not JSON"),
    "a raw newline in a string": (b'"a\nb"', "not JSON"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "infinity": (b"[-Infinity]", "-Infinity is not JSON"),
    "a number that overflows": (b"[1e999]", "1e999 is too large"),
    "2**63": (b"9223372036854775808", "does not fit into 64 bits"),
    "below -2**63": (b"-9223372036854775809", "does not fit into 64 bits"),
    "a million digits": (b"[" + b"9" * 1_000_000 + b"]", "does not fit into 64 bits"),
    "a leading zero": (b"01", "not JSON"),
    "a leading plus": (b"+1", "not JSON"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
    "a key twice, deep inside": (b'[{"x": {"a": 1, "a": 1}}]', "the key 'a' is given twice"),
    "a key twice by escapes": (b'{"a": 1, "\\u0061": 1}', "the key 'a' is given twice"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "UTF-16 without a mark": ('{"a": 1}'.encode("utf-16-le"), "not JSON"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8"),
    "an encoded surrogate": (b'"\xed\xa0\x80"', "not UTF-8"),
    "an overlong encoding": (b'"\xc0\xaf"', "not UTF-8"),
    "an escaped half pair": (b'{"a": "\\ud800"}', "surrogate"),
    "a half pair as key": (b'{"\\uDFFF": 1}', "surrogate"),
    "lists too deep": (b"[" * 65 + b"]" * 65, "deeper than 64"),
    "objects too deep": (b'{"a":' * 65 + b"1" + b"}" * 65, "deeper than 64"),
    "a million lists": (b"[" * 1_000_000, "deeper than 64"),
    "brackets behind a string": (b'["\\"]", ' + b"[" * 80 + b"]" * 80 + b"]", "deeper than 64"),
}


@pytest.mark.parametrize(("body", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_strict_json_is_refused_with_a_sentence(body: bytes, sentence: str) -> None:
    with pytest.raises(sz.BadJson, match=sentence.replace("+", r"\+")) as refusal:
        sz.decode_json(body)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b" {} ", {}),
        (b"[9223372036854775807, -9223372036854775808]", [2**63 - 1, -(2**63)]),
        (b"[" * 64 + b"]" * 64, None),
        (b'"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
        (b'"\\\\ud800"', "\\ud800"),
        (b'["' + b"[" * 100 + b'"]', ["[" * 100]),
        (b"[" + b"[]," * 100 + b"[]]", [[]] * 101),
        ('{"é": 1.5e3}'.encode(), {"é": 1500.0}),
        (b'"\\u0000"', "\0"),
    ],
)
def test_everything_else_is_read(body: bytes, value: Any) -> None:
    read = sz.decode_json(body)
    assert value is None or read == value


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_what_is_encoded_decodes_to_the_same(value: Any) -> None:
    assert sz.decode_json(sz.encode_json(value)) == value


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\u0d8e19 -', max_size=60).map(str.encode))
def test_any_bytes_are_json_as_python_reads_it_or_refused(body: bytes) -> None:
    try:
        value = sz.decode_json(body)
    except sz.BadJson:
        return
    assert value == json.loads(body)


def test_a_stored_half_pair_is_sent_as_an_escape_instead_of_hiding_a_whole_list() -> None:
    assert json.loads(sz.encode_json(["bad \ud800", "good"])) == ["bad \ud800", "good"]
