"""The HTTP parser: bytes in, requests or refusals out, however the bytes are cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple

import pytest
import schedulezero as sz
from hypothesis import given, settings
from hypothesis import strategies as st

HOST = b"Host: localhost\r\n"


def parse(pieces: Iterable[bytes]) -> list[tuple | tuple[int, str]]:
    """Everything that comes out: requests as tuples, and (status, code) of a final refusal."""
    parser, seen = sz.HttpParser("10.0.0.7"), []
    try:
        for piece in pieces:
            parser.feed(piece)
            while (request := parser.next_request()) is not None:
                seen.append(astuple(request))
    except sz.HttpError as error:
        seen.append((error.status, error.code, str(error)))
    return seen


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def one(data: bytes) -> sz.Request:
    parser = sz.HttpParser("10.0.0.7")
    parser.feed(data)
    request = parser.next_request()
    assert request is not None
    return request


GOOD = {
    "a plain GET": b"GET / HTTP/1.1\r\n" + HOST + b"\r\n",
    "HTTP/1.0 without a host": b"GET /a HTTP/1.0\r\n\r\n",
    "a query": b"GET /api/executions?limit=5&status=error HTTP/1.1\r\n" + HOST + b"\r\n",
    "an escaped path": b"GET /api/schedules/caf%C3%A9 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a body": b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello",
    "an empty body": b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n",
    "a body that looks like a head": (
        b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: 22\r\n\r\nGET /evil HTTP/1.1\r\n\r\n"
    ),
    "header with no value": b"GET / HTTP/1.1\r\n" + HOST + b"X-Empty:\r\n\r\n",
    "latin-1 in a value": b"GET / HTTP/1.1\r\n" + HOST + b"X-Name: caf\xe9\r\n\r\n",
    "expecting to go on": (
        b"PUT /x HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\nok"
    ),
    "a host with port": b"GET / HTTP/1.1\r\nHost: [::1]:8888\r\n\r\n",
    "a long head": b"GET / HTTP/1.1\r\n" + HOST + b"X-Long: " + b"a" * 20_000 + b"\r\n\r\n",
}

HEAD = b"POST /x HTTP/1.1\r\n" + HOST
BAD = {
    "lengths and chunks": (
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello",
        400,
    ),
    "two lengths": (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", 400),
    "the same length twice": (HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400),
    "a list of lengths": (HEAD + b"Content-Length: 5, 5\r\n\r\nhello", 400),
    "a signed length": (HEAD + b"Content-Length: +10\r\n\r\nhellohello", 400),
    "a negative length": (HEAD + b"Content-Length: -1\r\n\r\n", 400),
    "a length with underscore": (HEAD + b"Content-Length: 1_0\r\n\r\nhellohello", 400),
    "a length in Arabic digits": (
        HEAD + "Content-Length: \u0661\u0660\r\n\r\nhellohello".encode(),
        400,
    ),
    "a length in hex": (HEAD + b"Content-Length: 0xa\r\n\r\nhellohello", 400),
    "an empty length": (HEAD + b"Content-Length:\r\n\r\n", 400),
    "a length of many digits": (HEAD + b"Content-Length: 0000000000000000005\r\n\r\nhello", 400),
    "a body over the limit": (HEAD + b"Content-Length: 1048577\r\n\r\n", 413),
    "chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    "gzip and chunks": (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "a misspelt coding": (HEAD + b"Transfer-Encoding: xchunked\r\n\r\n", 501),
    "a coding with a vertical tab": (HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n", 400),
    "two codings": (
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
        400,
    ),
    "an empty coding": (HEAD + b"Transfer-Encoding:\r\n\r\n", 400),
    "chunks in HTTP/1.0": (b"POST /x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
    "bare LF after the request line": (b"GET / HTTP/1.1\nHost: localhost\r\n\r\n", 400),
    "bare LF between headers": (b"GET / HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n", 400),
    "bare LF at the end": (b"GET / HTTP/1.1\r\nHost: localhost\n\n", 400),
    "bare CR in a value": (b"GET / HTTP/1.1\r\n" + HOST + b"X: a\rY: b\r\n\r\n", 400),
    "a folded header": (b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n b\r\n\r\n", 400),
    "a header before the first": (b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n", 400),
    "NUL in a value": (b"GET / HTTP/1.1\r\n" + HOST + b"X: a\x00b\r\n\r\n", 400),
    "NUL in the path": (b"GET /\x00 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "space before the colon": (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
    "space in a header name": (b"GET / HTTP/1.1\r\n" + HOST + b"X Y: z\r\n\r\n", 400),
    "no header name": (b"GET / HTTP/1.1\r\n" + HOST + b": z\r\n\r\n", 400),
    "no colon": (b"GET / HTTP/1.1\r\n" + HOST + b"garbage\r\n\r\n", 400),
    "a name that is not ASCII": (b"GET / HTTP/1.1\r\n" + HOST + b"X\xe9: z\r\n\r\n", 400),
    "an absolute URI": (b"GET http://evil/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "an authority": (b"CONNECT evil:80 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "an asterisk": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a fragment": (b"GET /a#b HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "raw UTF-8 in the path": ("GET /é HTTP/1.1\r\n".encode() + HOST + b"\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\n" + HOST + b"host: evil\r\n\r\n", 400),
    "a host that is none": (b"GET / HTTP/1.1\r\nHost: a/b@c\r\n\r\n", 400),
    "an unknown method": (b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "a method in lower case": (b"get / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\n" + HOST + b"\r\n", 505),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a tab": (b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "an empty line first": (b"\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a TLS greeting": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "a broken escape": (b"GET /%zz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "an escaped NUL": (b"GET /a%00b HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "an escaped slash": (b"GET /a%2fb HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "an escaped backslash": (b"GET /..%5cb HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "an escape that is not UTF-8": (b"GET /%ff HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a broken escape in the query": (b"GET /?a=%4 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a query that is not UTF-8": (b"GET /?a=%ff HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a query field twice": (b"GET /?a=1&a=2 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "too many query fields": (
        b"GET /?" + b"&".join(b"a%d=" % n for n in range(40)) + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        400,
    ),
    "another expectation": (
        HEAD + b"Expect: miracles\r\nContent-Length: 1\r\n\r\nx",
        417,
    ),
    "a long URL": (b"GET /" + b"a" * 8_192 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "an endless request line": (b"GET /" + b"a" * 9_000, 414),
    "too many headers": (
        b"GET / HTTP/1.1\r\n" + HOST + b"".join(b"X-%d: y\r\n" % n for n in range(100)) + b"\r\n",
        431,
    ),
    "a head over the limit": (
        b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 33_000 + b"\r\n\r\n",
        431,
    ),
    "an endless head": (b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 33_000, 431),
    "a bare LF in a long head": (
        b"GET / HTTP/1.1\r\n" + HOST + b"X: \n" + b"a" * 33_000 + b"\r\n\r\n",
        400,
    ),
    "a bare LF behind a bad request line": (b"bad\r\nX: y\nZ: z\r\n\r\n", 400),
}


@pytest.mark.parametrize("data", GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_request_is_the_same_however_it_is_cut(data: bytes, size: int) -> None:
    whole = parse([data])
    assert len(whole) == 1
    assert len(whole[0]) > 3
    assert parse(cut(data, size)) == whole


@pytest.mark.parametrize(("data", "status"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_refusal_is_the_same_however_it_is_cut(data: bytes, status: int, size: int) -> None:
    whole = parse([data])
    assert [refusal[0] for refusal in whole] == [status]
    assert parse(cut(data, size)) == whole


@pytest.mark.parametrize(("data", "status"), BAD.values(), ids=BAD)
def test_what_came_before_a_bad_request_is_still_answered(data: bytes, status: int) -> None:
    before = GOOD["a body"]
    seen = parse([before + data])
    assert seen[0] == parse([before])[0]
    assert seen[1][0] == status


@pytest.mark.parametrize("size", [1, 13, 1 << 20])
def test_pipelined_requests_come_out_in_order(size: int) -> None:
    everything = b"".join(GOOD.values())
    alone = [parse([data])[0] for data in GOOD.values()]
    assert parse(cut(everything, size)) == alone


def test_bytes_after_a_request_belong_to_the_next_one() -> None:
    seen = parse([GOOD["a body"] + b"garbage\r\n\r\n"])
    assert b"hello" in seen[0]
    assert seen[1][:2] == (400, "bad_request")


def test_a_request_says_who_asked_and_what_for() -> None:
    request = one(
        b"POST /api/schedules/caf%C3%A9?limit=5&q=a+b%26c%3D&empty= HTTP/1.1\r\nHost: pi:8888\r\n"
        b"X-Two: a\r\nx-two: b\r\nCookie: a=1\r\nCookie: b=2\r\nContent-Length: 2\r\n\r\n{}"
    )
    assert request.method == "POST"
    assert request.path == "/api/schedules/café"
    assert request.query == {"limit": "5", "q": "a b&c=", "empty": ""}
    assert request.headers["x-two"] == "a, b"
    assert request.headers["cookie"] == "a=1; b=2"
    assert request.body == b"{}"
    assert request.peer == "10.0.0.7"


@pytest.mark.parametrize(
    ("data", "keep_alive"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Close\r\n\r\n", False),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", True),
        (b"GET / HTTP/1.0\r\nHost: a\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", False),
    ],
)
def test_a_connection_is_kept_as_its_version_says(data: bytes, keep_alive: bool) -> None:
    assert one(data).keep_alive is keep_alive


def test_the_parser_says_when_the_client_waits_for_leave_to_send_its_body() -> None:
    parser = sz.HttpParser()
    parser.feed(HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert parser.next_request() is None
    assert parser.is_in_body
    assert parser.expects_continue
    parser.feed(b"o")
    assert not parser.expects_continue
    parser.feed(b"k")
    request = parser.next_request()
    assert request is not None
    assert request.body == b"ok"
    assert not parser.has_begun


def test_http_1_0_clients_are_not_told_to_continue() -> None:
    parser = sz.HttpParser()
    parser.feed(b"PUT /x HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert parser.next_request() is None
    assert not parser.expects_continue


FRAGMENTS = [
    b"GET / HTTP/1.1\r\n",
    b"POST /x HTTP/1.1\r\n",
    HOST,
    b"Content-Length: 3\r\n",
    b"Content-Length: 4\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"X: y\r\n",
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b":",
    b"abc",
    b"\x00",
    b"HTTP/1.1",
    b"/%41",
    b"a" * 5_000,
    b"\xff",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.integers(1, 9))
def test_any_mixture_gives_the_same_result_whole_and_in_pieces(
    fragments: list[bytes], size: int
) -> None:
    data = b"".join(fragments)
    assert parse(cut(data, size)) == parse([data])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_a_refusal(data: bytes) -> None:
    for result in parse([data, b"\r\n\r\n"]):
        assert len(result) == 3 or result[0] in sz.METHODS


@settings(max_examples=200, deadline=None)
@given(
    method=st.sampled_from(sorted(sz.METHODS)),
    body=st.binary(max_size=300),
    values=st.lists(st.text(alphabet="aZ09 \t;=,\"'é", max_size=20), max_size=5),
)
def test_what_a_client_sends_is_what_the_server_reads(
    method: str, body: bytes, values: list[str]
) -> None:
    lines = "".join(f"X-{n}:{value}\r\n" for n, value in enumerate(values)).encode("latin-1")
    head = f"{method} /p HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n".encode()
    request = one(head + lines + b"\r\n" + body)
    assert (request.method, request.body) == (method, body)
    for n, value in enumerate(values):
        assert request.headers[f"x-{n}"] == value.strip(" \t")
