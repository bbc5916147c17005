"""The handler library's pure parts: messages, methods, jobs, log bounds, ready-made handlers."""

from __future__ import annotations

import json
import logging
import time

import handler
import pytest
from handler import (
    BadParameters,
    Batch,
    ConfigError,
    DingDong,
    Example,
    Handler,
    Http,
    Job,
    JobCancelled,
    Outbox,
    ProtocolError,
    Shell,
    current_job,
    decode,
    describe_method,
    encode,
    failure,
    id_of,
    methods_of,
    perform,
)


class Backup(Handler):
    def __init__(self, root: str = "/srv") -> None:
        self.root = root

    def nightly(self, path: str, keep: int = 7, *, dry=False) -> dict[str, int]:
        """Copy `path`.

        Keeps the newest.
        """
        return {"kept": keep}

    @staticmethod
    def tidy(days=30):
        return days

    async def later(self, value):
        return value

    def quits(self):
        raise SystemExit(3)

    def interrupted(self):
        raise KeyboardInterrupt

    def gives(self, what):
        return WHAT[what]

    def loops(self):
        self.job.check_cancelled()

    def _private(self):
        return 1

    limit = 5
    shape = dict


class Child(Backup):
    limit = 6
    tidy = None  # hides the inherited method

    def nightly(self):
        return "mine"


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


WHAT = {
    "nan": float("nan"),
    "set": {1},
    "surrogate": "\ud800",
    "deep": nested(70),
    "endless": nested(200_000),
    "huge": "x" * (1 << 20),
    "fits": "x" * ((1 << 20) - 100),
    "bytes": b"x",
}


def job(method="nightly", attempt=1, **params):
    return Job({"id": f"e1:{attempt}", "method": method, "params": params})


def run(subject, method, **params):
    return json.loads(perform(job(method, **params), methods_of(subject)))


# --- Messages ---------------------------------------------------------------------------------


def test_a_message_survives_the_wire():
    message = {"method": "chime", "params": {"style": "ä€😀", "n": 1.5, "list": [None, True]}}
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe{\x00}\x00",
        b"\x00" * 100,
        b"[]",
        b"null",
        b'"text"',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b"{",
        b'{"a":1}x',
        b"[" * 200_000,
        b'{"a":' * 150_000,
        b'{"a":' + b"9" * 5_000 + b"}",
        b'{"a":"' + b"x" * (1 << 20) + b'"}',
    ],
)
def test_a_body_that_is_not_one_object_is_a_protocol_error(body):
    with pytest.raises(ProtocolError):
        decode(body)


@pytest.mark.parametrize(
    "call",
    [
        {"method": "m", "params": {}},
        {"id": 1, "method": "m", "params": {}},
        {"id": "", "method": "m", "params": {}},
        {"id": "x" * 121, "method": "m", "params": {}},
        {"id": "é:1", "method": "m", "params": {}},
        {"id": "e:1", "method": None, "params": {}},
        {"id": "e:1", "method": ["m"], "params": {}},
        {"id": "e:1", "method": "m", "params": []},
        {"id": "e:1", "method": "m", "params": None},
    ],
)
def test_a_malformed_call_is_a_protocol_error(call):
    with pytest.raises(ProtocolError):
        Job(call)


def test_execution_and_attempt_are_read_from_the_call_id():
    call = Job({"id": "a:b:7", "method": "m"})
    assert (call.execution_id, call.attempt) == ("a:b", 7)
    assert Job({"id": "odd", "method": "m"}).attempt == 1
    assert Job({"id": "e:-1", "method": "m"}).attempt == 1


@pytest.mark.parametrize("timeout", [None, 0, -1, "5", True, [], {}])
def test_a_timeout_that_is_no_positive_number_means_no_limit(timeout):
    assert Job({"id": "e:1", "method": "m", "timeout": timeout}).timeout is None


def test_a_failure_can_carry_text_that_is_not_unicode():
    assert json.loads(failure("e:1", "odd \ud800"))["error"] == "odd ?"


# --- Methods ----------------------------------------------------------------------------------


def test_public_methods_are_offered_and_nothing_else():
    names = {"nightly", "tidy", "later", "quits", "interrupted", "gives", "loops"}
    assert set(methods_of(Backup())) == names
    assert set(methods_of(Child())) == names - {"tidy"}


def test_a_method_is_described_by_its_signature_and_docstring():
    assert methods_of(Backup())["nightly"].describe() == {
        "name": "nightly",
        "doc": "Copy `path`.\n\nKeeps the newest.",
        "parameters": [
            {"name": "path", "type": "str", "required": True},
            {"name": "keep", "type": "int", "required": False, "default": 7},
            {"name": "dry", "required": False, "default": False},
        ],
    }
    assert methods_of(Backup())["tidy"].describe()["parameters"] == [
        {"name": "days", "required": False, "default": 30}
    ]


def test_a_default_that_is_not_json_is_shown_as_text():
    def wait(until=NotImplemented, text="\ud800", most=2**64):
        """."""

    described = describe_method("wait", wait).describe()["parameters"]
    defaults = ["NotImplemented", "'\\ud800'", "18446744073709551616"]
    assert [each["default"] for each in described] == defaults


def test_decorated_functions_are_methods_too():
    subject = Handler("tools")

    @subject.method
    def twice(n: int) -> int:
        return 2 * n

    assert run(subject, "twice", n=4)["result"] == 8
    assert id_of(subject) == "tools"
    assert methods_of(Handler("other")) == {}


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({}, "nightly needs the parameter 'path'"),
        ({"path": "/", "kepe": 1}, "nightly has no parameter 'kepe'; its parameters: path, keep"),
        ({"self": 1, "path": "/"}, "nightly has no parameter 'self'"),
    ],
)
def test_wrong_parameters_fail_the_attempt_before_the_call(params, sentence):
    method = methods_of(Backup())["nightly"]
    with pytest.raises(BadParameters, match=sentence):
        method.check(params)
    result = json.loads(
        perform(
            Job({"id": "e:1", "method": "nightly", "params": params}),
            {"nightly": method},
        )
    )
    assert not result["success"] and sentence in result["error"]


def test_an_unknown_method_is_answered_with_those_there_are():
    assert "there is no method 'x'; there are: add" in run(Example(), "x")["error"]


def test_keyword_arguments_take_any_parameter():
    assert run(Example(), "echo", a=1, b=[2])["result"] == {"a": 1, "b": [2]}


def test_positional_only_parameters_are_refused_when_the_handler_starts():
    def odd(a, /):
        """."""

    with pytest.raises(ConfigError, match="positional-only"):
        describe_method("odd", odd)


@pytest.mark.parametrize("name", ["läuten", "<lambda>", "-x", "x" * 129])
def test_a_method_the_server_could_not_name_is_refused_when_the_handler_starts(name):
    def ring():
        """."""

    ring.__name__ = name
    bell = Handler("bell")
    bell.method(ring)
    with pytest.raises(ConfigError, match="is no name of a method: 1 to 128 of A-Z"):
        methods_of(bell)


@pytest.mark.parametrize("name", ["main", "job", "method", "concurrency", "spool"])
def test_a_subclass_cannot_hide_what_the_handler_needs(name):
    with pytest.raises(TypeError, match="choose another name"):
        type("Bad", (Handler,), {name: lambda self: None})


def test_the_id_is_the_class_name_in_kebab_case():
    assert id_of(DingDong()) == "ding-dong"
    assert id_of(Http()) == "http"


@pytest.mark.parametrize("name", ["-a", "a b", "ä", "a/b", "x" * 129, "a\n"])
def test_an_id_the_server_would_refuse_is_a_configuration_error(name):
    with pytest.raises(ConfigError):
        id_of(Handler(name))


# --- Running a job ----------------------------------------------------------------------------


def test_a_result_carries_the_call_and_its_duration():
    result = run(Example(), "add", a=1, b=2)
    assert result["id"] == "e1:1" and result["success"] and result["result"] == 3
    assert result["duration_ms"] >= 0


def test_a_coroutine_is_awaited():
    assert run(Backup(), "later", value=5)["result"] == 5


def test_an_exception_is_a_failure_with_type_and_the_jobs_traceback():
    result = run(Example(), "fail", message="too bad")
    assert (result["success"], result["error"]) == (False, "too bad")
    assert result["error_type"] == "RuntimeError"
    assert "in fail" in result["traceback"] and "in perform" not in result["traceback"]


@pytest.mark.parametrize(
    ("method", "kind"), [("quits", "SystemExit"), ("interrupted", "KeyboardInterrupt")]
)
def test_a_job_cannot_end_the_handler(method, kind):
    assert run(Backup(), method)["error_type"] == kind


@pytest.mark.parametrize("what", ["nan", "set", "surrogate", "deep", "endless", "huge", "bytes"])
def test_a_result_that_cannot_be_sent_is_a_failure_that_says_so(what):
    result = run(Backup(), "gives", what=what)
    assert result["error_type"] == "BadResult" and "the result" in result["error"]


@pytest.mark.parametrize(
    ("value", "flaw"),
    [
        (2**63, "does not fit into 64 bits"),
        ([{"a": -(2**70)}], "does not fit into 64 bits"),
        ({1: "a", "1": "b"}, "the same text"),
        ([{None: 1, "null": 2}], "the same text"),
    ],
)
def test_a_result_the_server_would_refuse_is_a_failure_that_says_so(value, flaw):
    result = run(Backup(), "later", value=value)
    assert result["error_type"] == "BadResult" and flaw in result["error"]


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), {1: "a", "2": "b"}])
def test_a_result_within_64_bits_is_sent(value):
    assert run(Backup(), "later", value=value)["success"] is True


def test_a_result_just_below_the_limit_is_sent():
    assert len(run(Backup(), "gives", what="fits")["result"]) > (1 << 20) - 200


def test_an_exception_without_words_is_still_a_failure():
    subject = Handler("x")

    @subject.method
    def mute():
        raise Unspeakable

    assert "Unspeakable" in run(subject, "mute")["error"]


def test_the_current_job_ends_with_the_call():
    seen = []
    subject = Handler("x")

    @subject.method
    def look():
        seen.append((subject.job.execution_id, subject.job.attempt, current_job().timeout))

    run(subject, "look")
    assert seen == [("e1", 1, None)]
    assert current_job().execution_id == "none"


# --- Cancelling -------------------------------------------------------------------------------


def test_a_cancelled_job_raises_wherever_it_asks():
    told = job()
    assert not told.cancelled
    told.check_cancelled()
    told.cancel("timeout", 0.0)
    told.cancel("cancelled", 1.0)
    assert (told.cancelled, told.reason) == (True, "timeout")
    with pytest.raises(JobCancelled):
        told.check_cancelled()
    with pytest.raises(JobCancelled):
        told.wait(60)
    with pytest.raises(JobCancelled):  # not an Exception: broad handlers let it through
        try:
            told.check_cancelled()
        except Exception:
            pytest.fail("caught")


def test_a_job_that_was_told_to_stop_ends_as_cancelled():
    told = job("loops")
    told.cancel("cancelled", 0.0)
    result = json.loads(perform(told, methods_of(Backup())))
    assert result["cancelled"] is True and result["error"] == "stopped: cancelled"


def test_a_job_stopped_by_the_handlers_own_end_is_a_failed_attempt_not_a_cancelled_one():
    told = job("loops")
    told.cancel("stopping", 0.0)
    result = json.loads(perform(told, methods_of(Backup())))
    assert "cancelled" not in result and result["error_type"] == "HandlerStopped"


def test_cancel_callbacks_run_once_even_if_one_fails_or_comes_late():
    told, called = job(), []
    told.on_cancel(lambda: 1 / 0)
    told.on_cancel(lambda: called.append("early"))
    told.cancel("cancelled", 0.0)
    told.on_cancel(lambda: called.append("late"))
    assert called == ["early", "late"]


@pytest.mark.parametrize(
    ("methods", "doc", "says"),
    [(257, "", "has 257 public methods, not 1 to 256"), (256, "ü" * 2_000, "tells of its methods")],
)
def test_a_handler_that_the_server_would_not_take_does_not_begin(methods, doc, says):
    def method(self):
        pass

    method.__doc__ = doc
    large = type("Large", (Handler,), {f"method_{number}": method for number in range(methods)})
    with pytest.raises(ConfigError, match=says):
        handler.serve_handler(large, handler.Options())


def test_methods_can_be_called_without_a_handler_process():
    assert Example().sleep(0)["slept"] >= 0
    assert DingDong().countdown(0) == {"counted": 0}


# --- Logs -------------------------------------------------------------------------------------


def lines(batch):
    return [(level, text) for _, level, text in batch.lines]


def test_lines_go_out_when_complete_and_open_ones_at_the_end():
    outbox = Outbox()
    outbox.write("stdout", "one\ntw")
    outbox.write("stderr", "oops")
    outbox.write("stdout", "o\nthr")
    assert lines(outbox.take(time.monotonic() + 1)) == [("stdout", "one"), ("stdout", "two")]
    assert lines(outbox.take(0, last=True)) == [("stdout", "thr"), ("stderr", "oops")]
    assert outbox.take(0, last=True) is None


def test_a_batch_is_due_soon_after_its_first_line_and_its_arrival_is_told_once():
    outbox, told = Outbox(), []
    outbox.notify = lambda: told.append(1)
    before = time.monotonic()
    outbox.write("INFO", "one\n")
    outbox.write("INFO", "two\n")
    assert before + 0.19 < outbox.due_at <= time.monotonic() + 0.2
    assert outbox.take(before) is None
    assert told == [1]


def test_a_flood_keeps_its_last_lines_counts_the_others_and_slows_down():
    outbox = Outbox()
    for n in range(50_000):
        outbox.write("stdout", f"line {n} {'x' * 50}\n")
    now = time.monotonic() + 1
    batch = outbox.take(now)
    assert batch.lines[-1][2].startswith("line 49999 ")
    assert batch.lines[0][2].startswith("line 0 ")  # a log keeps its first lines and its last
    assert batch.lines[batch.gap - 1][2].startswith(f"line {batch.gap - 1} ")
    assert len(batch.lines) + batch.dropped == 50_000
    assert sum(len(encode({"": line})) for line in batch.lines) < 100_000
    outbox.write("stdout", "more\n")
    assert outbox.due_at > now + 0.9


def test_lines_before_and_after_the_gap_of_a_flood_are_sent_apart():
    outbox, job = Outbox(), Job({"id": "x:1"})
    outbox.write("INFO", "\n".join(map(str, range(3_000))))
    job.outbox.merge(Batch(**json.loads(encode(outbox.take(0, last=True)._asdict()))))
    parts = [json.loads(body)["params"] for body in job.take_words(0, last=True)]
    assert [part["dropped"] for part in parts] == [0, 2_000]
    assert [[part["lines"][n][2] for n in (0, -1)] for part in parts] == [
        ["0", "499"],
        ["2500", "2999"],
    ]


def test_many_short_lines_stay_below_what_the_server_takes_in_one_message():
    outbox = Outbox()
    outbox.write("stdout", "\n" * 100_000)
    batch = outbox.take(0, last=True)
    assert len(batch.lines) <= 1_000 and len(batch.lines) + batch.dropped == 100_000


def test_a_line_without_end_is_cut():
    outbox = Outbox()
    outbox.write("stdout", "x" * 1_000_000 + "\n")
    ((_, text),) = lines(outbox.take(0, last=True))
    assert len(text) < 5_000 and text.endswith("[995904 more characters]")


def test_progress_keeps_the_latest_and_stays_within_bounds():
    subject = job()
    subject.progress(10)
    subject.progress(170, "nearly")
    assert subject.outbox.take(0, last=True).progress == (100.0, "nearly")
    subject.progress(None, "who knows")
    assert subject.outbox.take(0, last=True).progress == (None, "who knows")


def test_prints_and_logging_records_of_a_job_become_its_log(capfd):
    subject = Handler("x")

    @subject.method
    def talk():
        print("hello", 1)
        logging.getLogger("mine").warning("careful %d", 2)
        raise RuntimeError

    talker = job("talk")
    with handler.captured():
        print("not in a job")
        perform(talker, methods_of(subject))
    batch = talker.outbox.take(0, last=True)
    assert lines(batch) == [("stdout", "hello 1"), ("WARNING", "careful 2")]
    assert capfd.readouterr().out == "not in a job\nhello 1\n"


# --- Ready-made handlers ----------------------------------------------------------------------


def test_a_clock_strikes_the_hour_up_to_twelve_and_once_at_half_past():
    strikes = [handler.strokes(hour, 0) for hour in range(24)]
    assert strikes == [12, *range(1, 12), 12, *range(1, 12)]
    assert handler.strokes(14, 30) == 1
    assert {handler.strokes(14, m) for m in range(60) if m not in (0, 30)} == {0}


def test_a_ship_strikes_one_more_bell_every_half_hour_of_the_watch():
    halves = [(hour, minute) for hour in range(24) for minute in (0, 30)]
    bells = [handler.ship_bells(*at) for at in halves]
    assert bells == [
        8,
        *range(1, 9),
        *range(1, 9),
        *range(1, 9),
        *range(1, 9),
        *range(1, 9),
        *range(1, 8),
    ]
    assert handler.ship_bells(12, 1) == 0


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ((0, 0), "twelve o'clock"),
        ((14, 5), "five past two"),
        ((14, 15), "a quarter past two"),
        ((14, 30), "half past two"),
        ((14, 33), "twenty-five to three"),
        ((14, 45), "a quarter to three"),
        ((23, 58), "twelve o'clock"),
        ((11, 57), "five to twelve"),
        ((11, 58), "twelve o'clock"),
    ],
)
def test_the_time_in_words(at, words):
    assert handler.time_in_words(*at) == words


def test_every_minute_has_words():
    for minute in range(24 * 60):
        assert handler.time_in_words(*divmod(minute, 60))


def test_dingdong_says_the_time_and_counts_the_strokes(capsys):
    result = DingDong().chime()
    assert capsys.readouterr().out == result["said"] + "\n"
    assert result["said"].startswith("ding dong, it is ") and result["strokes"] in range(13)
    with pytest.raises(ValueError, match="none of plain, cuckoo"):
        DingDong().chime("loud")


def test_dingdong_called_at_the_full_minute_says_that_minute(monkeypatch):
    """The clock that localtime() reads by itself still shows the minute before, for some ms."""
    noon = time.mktime((2026, 11, 28, 12, 0, 0, 0, 0, -1))
    monkeypatch.setattr(time, "time", lambda: noon)
    assert DingDong().chime()["said"] == "ding dong, it is 12:00"
    assert DingDong().announce("Lunch")["said"].startswith("It is twelve o'clock.")


@pytest.mark.parametrize(
    "params",
    [
        {"argv": ["rm", "-rf", "/"]},
        {"command": "true; rm -rf /"},
        {"command": "true "},
        {"argv": ["sync", "--more"]},
        {"argv": ["true"], "env": {"LD_PRELOAD": "/tmp/x.so"}},
        {"argv": ["true"], "cwd": "/"},
        {"argv": []},
    ],
)
def test_shell_runs_only_what_its_configuration_allows(params):
    strict = Shell(allow=["true", ["sync", "-f"]])
    assert run(strict, "run", **params)["error_type"] == "PermissionError"
    assert run(Shell(), "run", argv=["true"])["error_type"] == "PermissionError"


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/api/../secret",
        "http://example.org/api/%2e%2e/secret",
        "http://example.org/apis",
        "http://example.org:81/api/x",
        "https://example.org/api/x",
        "http://example.org@evil.test/api/",
        "http://example.org.evil.test/api/",
        "http://@evil.test/api/",
        "file:///etc/passwd",
        "gopher://example.org/api/",
        "http:///api/",
    ],
)
def test_http_requests_only_what_its_configuration_allows(url):
    strict = Http(allow=["http://example.org/api"])
    assert run(strict, "request", url=url)["error_type"] in ("PermissionError", "ValueError")
    assert run(Http(), "request", url=url)["error_type"] in ("PermissionError", "ValueError")
    assert strict._checked("http://EXAMPLE.org:80/api?x=1").query == "x=1"
