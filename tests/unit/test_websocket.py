"""RFC 6455 from the server's side: frames as a client sends them, whole and byte by byte."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedulezero import (
    MAX_WEBSOCKET_FRAME_BYTES,
    CloseCode,
    InvalidField,
    Opcode,
    WebSocketReader,
    accept_websocket,
    encode_frame,
)

MASK = b"\x01\x82\x03\xc4"


def client_frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0) -> bytes:
    head = struct.pack("!B", (0x80 if fin else 0) | rsv | opcode)
    if len(payload) < 126:
        head += struct.pack("!B", 0x80 | len(payload))
    elif len(payload) < 1 << 16:
        head += struct.pack("!BH", 0x80 | 126, len(payload))
    else:
        head += struct.pack("!BQ", 0x80 | 127, len(payload))
    masked = bytes(byte ^ MASK[place % 4] for place, byte in enumerate(payload))
    return head + MASK + masked


def closed(code: int) -> bytes:
    return struct.pack("!H", code)


GOOD = {
    "text is taken and not answered": (client_frame(1, "grüße".encode()), b""),
    "binary too": (client_frame(2, b"\xff\x00"), b""),
    "a long message": (client_frame(2, b"x" * 40_000), b""),
    "fragments": (
        client_frame(1, b"a", fin=False) + client_frame(0, b"b", fin=False) + client_frame(0),
        b"",
    ),
    "a character split between fragments": (
        client_frame(1, b"\xc3", fin=False) + client_frame(0, b"\xbc"),
        b"",
    ),
    "a ping is answered with its payload": (client_frame(9, b"hi"), b"\x8a\x02hi"),
    "a ping between fragments": (
        client_frame(1, b"a", fin=False) + client_frame(9) + client_frame(0, b"b"),
        b"\x8a\x00",
    ),
    "an unasked pong": (client_frame(10, b"x"), b""),
}
BAD = {
    "unmasked": (b"\x81\x02hi", CloseCode.PROTOCOL_ERROR),
    "reserved bit": (client_frame(1, b"x", rsv=0x40), CloseCode.PROTOCOL_ERROR),
    "reserved opcode": (client_frame(3), CloseCode.PROTOCOL_ERROR),
    "reserved control opcode": (client_frame(11), CloseCode.PROTOCOL_ERROR),
    "fragmented ping": (client_frame(9, fin=False), CloseCode.PROTOCOL_ERROR),
    "long ping": (client_frame(9, b"x" * 126), CloseCode.PROTOCOL_ERROR),
    "too big": (
        client_frame(2, b"x" * (MAX_WEBSOCKET_FRAME_BYTES + 1)),
        CloseCode.TOO_BIG,
    ),
}


def feed(data: bytes, step: int) -> tuple[bytes, bool]:
    reader, answers = WebSocketReader(), b""
    for place in range(0, len(data), step):
        answer, goes_on = reader.feed(data[place : place + step])
        answers += answer
        if not goes_on:
            return answers, False
    return answers, True


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", GOOD)
def test_it_takes(name: str, step: int) -> None:
    data, answer = GOOD[name]
    assert feed(data, step) == (answer, True)


@pytest.mark.parametrize("step", [1, 1 << 20])
@pytest.mark.parametrize("name", BAD)
def test_it_closes_on(name: str, step: int) -> None:
    data, code = BAD[name]
    answer, goes_on = feed(data + client_frame(9, b"never read"), step)
    assert not goes_on
    assert answer[0] == 0x88
    assert len(answer) <= 127
    assert answer[2:4] == struct.pack("!H", code)


def test_a_close_is_echoed_with_its_code() -> None:
    assert feed(client_frame(8, closed(1000) + b"bye"), 1) == (b"\x88\x02\x03\xe8", False)
    assert feed(client_frame(8), 1) == (b"\x88\x00", False)
    assert feed(client_frame(8, b"\x03"), 1) == (b"\x88\x00", False)


def test_it_closes_before_a_giant_frame_has_arrived() -> None:
    answer, goes_on = WebSocketReader().feed(b"\x82\xff" + struct.pack("!Q", 1 << 60))
    assert (answer[2:4], goes_on) == (struct.pack("!H", 1009), False)


@given(st.binary(max_size=300), st.integers(1, 20))
def test_random_bytes_never_raise_and_pieces_do_not_matter(data: bytes, step: int) -> None:
    assert feed(data, step)[1] == feed(data, 1 << 20)[1]


@pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536])
def test_a_frame_has_the_shortest_length_field(size: int) -> None:
    frame = encode_frame(Opcode.TEXT, b"x" * size)
    assert len(frame) - size == (2 if size < 126 else 4 if size < 65_536 else 10)


HANDSHAKE = {
    "connection": "keep-alive, Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def test_the_handshake_of_the_rfc_gives_its_answer() -> None:
    assert accept_websocket(HANDSHAKE) == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@pytest.mark.parametrize(
    "changes",
    [
        {"upgrade": "h2c"},
        {"connection": "close"},
        {"sec-websocket-version": "8"},
        {"sec-websocket-key": "c2hvcnQ="},
        {"sec-websocket-key": "not base64!"},
    ],
)
def test_a_handshake_that_is_none_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(InvalidField):
        accept_websocket({**HANDSHAKE, **changes})
