"""Responses as bytes, and the dashboard's files."""

from __future__ import annotations

import zlib
from datetime import UTC, datetime
from pathlib import Path

import pytest
import schedulezero as sz

DATE = b"Mon, 23 Nov 2026 15:53:00 GMT"


def headers_of(data: bytes) -> dict[str, str]:
    head = data.partition(b"\r\n\r\n")[0].decode("latin-1")
    return dict(line.split(": ", 1) for line in head.split("\r\n")[1:])


def get(path: str, method: str = "GET", **headers: str) -> sz.Request:
    lower = {name.replace("_", "-"): value for name, value in headers.items()}
    return sz.Request(method, path, {}, lower, True, "127.0.0.1")


def test_a_response_carries_length_date_and_the_security_headers() -> None:
    data = sz.render_response(sz.json_response(201, {"a": "é"}), DATE)
    assert data.startswith(b"HTTP/1.1 201 Created\r\n")
    assert data.endswith('\r\n\r\n{"a":"é"}'.encode())
    headers = headers_of(data)
    assert headers["Content-Length"] == "10"
    assert headers["Content-Type"] == "application/json"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Date"] == DATE.decode()
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Connection" not in headers


def test_the_last_response_of_a_connection_says_so() -> None:
    data = sz.render_response(sz.json_response(200, {}), DATE, keep_alive=False)
    assert headers_of(data)["Connection"] == "close"


def test_head_is_get_without_the_body() -> None:
    response = sz.json_response(200, {"a": 1}, (("X-More", "yes"),))
    whole = sz.render_response(response, DATE)
    assert sz.render_response(response, DATE, is_head=True) == whole.removesuffix(response.body)


def test_an_error_is_a_sentence_and_a_code() -> None:
    response = sz.error_response(405, "method_not_allowed", "no", (("Allow", "GET"),), field="a")
    assert sz.decode_json(response.body) == {
        "status": "error",
        "error": "no",
        "code": "method_not_allowed",
        "field": "a",
    }
    assert headers_of(sz.render_response(response, DATE))["Allow"] == "GET"


def test_dates_are_as_http_wants_them() -> None:
    at = datetime(1994, 11, 6, 8, 49, 37, 999_999, tzinfo=UTC)
    assert sz.render_http_date(sz.us_of(at)) == b"Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.fixture
def static(tmp_path: Path) -> sz.StaticFiles:
    root = tmp_path / "static"
    (root / "views").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "index.html").write_text("<!doctype html>" + "<p>hello</p>" * 100)
    (root / "views" / "list.js").write_text("export {};")
    (root / "notes.py").write_text("secret")
    (root / ".hidden.html").write_text("secret")
    (root / ".git" / "a.html").write_text("secret")
    (tmp_path / "outside.html").write_text("secret")
    (root / "link.html").symlink_to(tmp_path / "outside.html")
    (root / "up").symlink_to(tmp_path)
    return sz.StaticFiles(str(root))


def test_files_are_served_by_name_with_their_type(static: sz.StaticFiles) -> None:
    page, script = static.handle(get("/")), static.handle(get("/views/list.js"))
    assert (page.status, page.content_type) == (200, "text/html; charset=utf-8")
    assert page.body.endswith(b"<p>hello</p>")
    assert page.cache_control == "no-cache"
    assert (script.status, script.content_type) == (200, "text/javascript; charset=utf-8")
    assert static.handle(get("/index.html")).body == page.body


@pytest.mark.parametrize(
    "path",
    [
        "/link.html",
        "/up/outside.html",
        "/../outside.html",
        "/views/../../outside.html",
        "/views/../index.html",
        "//index.html",
        "/./index.html",
        "/..\\outside.html",
        "/index.html/",
        "/index.html\0.js",
        "/notes.py",
        "/.hidden.html",
        "/.git/a.html",
        "/views",
        "/views/",
        "/INDEX.HTML",
        "/static/index.html",
        "/etc/passwd",
    ],
)
def test_nothing_else_can_be_reached(static: sz.StaticFiles, path: str) -> None:
    response = static.handle(get(path))
    assert response.status == 404
    assert b"secret" not in response.body


def test_a_client_that_can_gets_gzip(static: sz.StaticFiles) -> None:
    plain = static.handle(get("/"))
    packed = static.handle(get("/", accept_encoding="br, gzip;q=0.5"))
    assert zlib.decompress(packed.body, 31) == plain.body
    assert ("Content-Encoding", "gzip") in packed.headers
    assert ("Vary", "Accept-Encoding") in plain.headers
    assert static.handle(get("/", accept_encoding="gzip;q=0, br")).body == plain.body
    assert dict(plain.headers)["ETag"] != dict(packed.headers)["ETag"]


def test_an_unchanged_file_is_not_sent_again(static: sz.StaticFiles) -> None:
    etag = dict(static.handle(get("/")).headers)["ETag"]
    for known in (etag, f'W/{etag}, "other"', "*"):
        response = static.handle(get("/", if_none_match=known))
        assert (response.status, response.body) == (304, b"")
        assert dict(response.headers)["ETag"] == etag
    assert static.handle(get("/", if_none_match='"other"')).status == 200


def test_files_can_only_be_read(static: sz.StaticFiles) -> None:
    response = static.handle(get("/", method="POST"))
    assert (response.status, dict(response.headers)["Allow"]) == (405, "GET, HEAD")


def test_without_its_files_the_front_page_says_where_they_belong(tmp_path: Path) -> None:
    response = sz.StaticFiles(str(tmp_path / "static")).handle(get("/"))
    assert response.status == 200
    assert b"schedulezero.py" in response.body


def test_more_files_than_fit_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * (sz.MAX_STATIC_BYTES - 10))
    (tmp_path / "b.txt").write_bytes(b"b" * 11)
    static = sz.StaticFiles(str(tmp_path))
    assert static.handle(get("/a.txt")).status == 200
    assert static.handle(get("/b.txt")).status == 404
    assert "/b.txt" in caplog.text


class SteppedClock(sz.Clock):
    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


def test_the_loops_complaints_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = SteppedClock()
    log = sz.LoopErrorLog(clock)
    context = {"message": "accept() out of resource", "exception": OSError(24, "too many files")}
    for _ in range(500):
        log(None, context)  # type: ignore[arg-type]
    assert len(caplog.records) == 1
    clock.seconds = 61.0
    log(None, context)  # type: ignore[arg-type]
    assert "499 times" in caplog.records[1].getMessage()
