"""Who may ask for what: credentials, hosts, origins, roles, limits, and the small files."""

from __future__ import annotations

import json
import logging
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schedulezero as sz
from hypothesis import given
from hypothesis import strategies as st

NOW_US = sz.us_of(sz.datetime(2026, 11, 23, 12, 0, 0, tzinfo=sz.UTC))
DAY_US = 86_400_000_000
ADMIN, OPERATOR, VIEWER = sz.Role.ADMIN, sz.Role.OPERATOR, sz.Role.VIEWER


class SetClock(sz.Clock):
    """Stands where it is set."""

    def __init__(self) -> None:
        self.us = NOW_US

    def now_us(self) -> int:
        return self.us

    def monotonic(self) -> float:
        return self.us / 1e6


class Gate:
    """An Access over a directory of its own, with what it noted."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.clock = SetClock()
        self.noted: list[sz.AuditEntry] = []
        self.config = sz.Config(data_dir=str(directory), **settings)
        self.access = sz.Access(self.config, self.clock, self.noted.append)

    @property
    def command_line(self) -> sz.TokenFile:
        """The tokens as another process sees and changes them."""
        return sz.TokenFile(str(self.directory))

    def token(self, name: str = "ci", role: sz.Role = VIEWER, days: int | None = None) -> str:
        expires_us = None if days is None else self.clock.us + days * DAY_US
        return self.command_line.create(name, role, expires_us, self.clock.us)

    def bearer(self, token: str, peer: str = "127.0.0.1") -> sz.Identity:
        return self.access.identify({"authorization": f"Bearer {token}"}, peer)

    def cookie(self, header: str) -> sz.Identity:
        return self.access.identify({"cookie": header.partition(";")[0]}, "127.0.0.1")

    def refusal(self, token: str, peer: str = "127.0.0.1") -> sz.HttpError:
        with pytest.raises(sz.HttpError) as caught:
            self.bearer(token, peer)
        return caught.value


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


# Credentials


def test_a_credential_has_256_random_bits_and_its_id_in_front() -> None:
    credential, key = sz.make_credential()
    assert sz.parse_credential(credential) == key
    assert len(bytes.fromhex(credential.rpartition("_")[2])) * 8 == 256
    assert sz.make_credential() != (credential, key)


@pytest.mark.parametrize(
    "text",
    ["", "sz_", "sz_12345678_", "x" * 76, "SZ_" + "0" * 8 + "_" + "0" * 64,
     "sz_" + "0" * 8 + "_" + "0" * 64 + "\n", "sz_" + "٠" * 8 + "_" + "0" * 64],
)  # fmt: skip
def test_what_is_no_credential_is_not_looked_up(text: str) -> None:
    assert sz.parse_credential(text) is None


def test_only_the_hash_of_a_token_is_stored(gate: Gate) -> None:
    token = gate.token()
    secret = token.rpartition("_")[2]
    for path in gate.directory.iterdir():
        assert secret not in path.read_text()
    (stored,) = json.loads((gate.directory / "tokens.json").read_text())["tokens"]
    assert stored["digest"] == sz.digest_of(token)


def test_what_holds_credentials_is_for_its_owner_alone(gate: Gate) -> None:
    gate.access.log_in(gate.token(), "127.0.0.1")
    for name in ("tokens.json", "sessions.json"):
        assert stat.S_IMODE((gate.directory / name).stat().st_mode) == 0o600


def test_the_first_admin_token_is_made_once_and_kept_in_a_private_file(gate: Gate) -> None:
    path = gate.command_line.create_first(NOW_US)
    assert path is not None
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    token = Path(path).read_text().strip()
    assert gate.bearer(token).role is ADMIN
    assert gate.command_line.create_first(NOW_US) is None


@pytest.mark.parametrize(
    ("header", "token"),
    [("Bearer x", "x"), ("bearer  x ", "x"), ("Basic x", ""), ("Bearer", ""), ("", "")],
)
def test_a_token_is_taken_from_a_bearer_header_only(header: str, token: str) -> None:
    assert sz.parse_bearer(header) == token


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("a=1", "1"),
        ("b=2; a=1", "1"),
        ("aa=2;a=1", "1"),
        ("a=1=2", "1=2"),
        ("b=a=1", ""),
        ("a", ""),
    ],
)
def test_a_cookie_is_found_by_its_whole_name(header: str, value: str) -> None:
    assert sz.parse_cookie(header, "a") == value


# Who it is


def test_without_tokens_the_loopback_address_needs_no_login(gate: Gate) -> None:
    identity = gate.access.identify({}, "127.0.0.1")
    assert (identity.name, identity.role) == ("loopback", ADMIN)


def test_from_the_first_token_on_a_login_is_needed_even_when_all_are_revoked(gate: Gate) -> None:
    gate.token()
    assert gate.access.identify({}, "127.0.0.1") is sz.NOBODY
    gate.command_line.revoke("ci")
    assert gate.access.identify({}, "127.0.0.1") is sz.NOBODY


@pytest.mark.parametrize(
    "settings",
    [{"auth": "required"}, {"http_host": "0.0.0.0"}, {"http_host": "192.168.1.5"},
     {"allowed_hosts": ("sz.example.org",)}, {"cors_origins": ("https://a.example",)}],
)  # fmt: skip
def test_a_server_meant_for_others_always_needs_a_login(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    assert Gate(tmp_path, **settings).access.identify({}, "127.0.0.1") is sz.NOBODY


@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded", "x-real-ip", "via"])
def test_what_came_through_a_proxy_is_not_taken_for_this_machine(gate: Gate, name: str) -> None:
    assert gate.access.identify({name: "203.0.113.9"}, "127.0.0.1") is sz.NOBODY
    assert "proxy" in str(gate.access.refusal(sz.NOBODY, VIEWER))


def test_a_token_says_who_asks_and_in_which_role(gate: Gate) -> None:
    identity = gate.bearer(gate.token("ci", OPERATOR))
    assert (identity.name, identity.role) == ("ci", OPERATOR)


def test_a_wrong_token_is_refused_even_where_none_is_needed(gate: Gate) -> None:
    assert gate.refusal("sz_x").status == 401


def test_a_token_is_good_until_it_expires(gate: Gate) -> None:
    token = gate.token(days=2)
    gate.clock.us += 2 * DAY_US - 1
    assert gate.bearer(token).name == "ci"
    gate.clock.us += 1
    assert gate.refusal(token).code == "invalid_token"


def test_a_revoked_token_is_refused_at_once_and_its_sessions_end(gate: Gate) -> None:
    token = gate.token()
    identity, (_, cookie) = gate.access.log_in(token, "127.0.0.1")
    assert gate.access.is_still(identity)
    gate.command_line.revoke("ci")
    assert gate.refusal(token).status == 401
    assert gate.cookie(cookie) is sz.NOBODY
    assert not gate.access.is_still(identity)


def test_a_new_token_of_the_same_name_does_not_revive_old_sessions(gate: Gate) -> None:
    _, (_, cookie) = gate.access.log_in(gate.token(), "127.0.0.1")
    gate.command_line.revoke("ci")
    gate.token()
    assert gate.cookie(cookie) is sz.NOBODY


def test_a_name_is_taken_once(gate: Gate) -> None:
    gate.token()
    with pytest.raises(sz.Conflict):
        gate.token()
    with pytest.raises(sz.NotFound, match="did you mean 'ci'"):
        gate.command_line.revoke("cii")


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"tokens": [{}]}', b'{"tokens": 5}', b"\xff"]
)
def test_a_damaged_file_lets_nobody_in(
    gate: Gate, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    token = gate.token()
    (gate.directory / "tokens.json").write_bytes(damage)
    with caplog.at_level(logging.ERROR):
        assert gate.access.identify({}, "127.0.0.1") is sz.NOBODY
        assert gate.refusal(token).status == 401
    assert len(caplog.records) == 1
    with pytest.raises(sz.Conflict):
        gate.command_line.revoke("ci")


def test_a_file_that_others_can_read_lets_nobody_in(gate: Gate) -> None:
    token = gate.token()
    (gate.directory / "tokens.json").chmod(0o644)
    os.utime(gate.directory / "tokens.json")
    assert gate.refusal(token).status == 401


# Sessions


def test_a_session_cookie_is_out_of_reach_of_scripts_and_of_other_sites(gate: Gate) -> None:
    _, (name, value) = gate.access.log_in(gate.token(), "127.0.0.1")
    assert name == "Set-Cookie"
    cookie, *attributes = value.split("; ")
    assert cookie.startswith("schedulezero_8888=sz_")
    assert attributes == ["Path=/", "Max-Age=604800", "HttpOnly", "SameSite=Strict"]


def test_over_tls_a_session_cookie_is_bound_to_the_host(tmp_path: Path) -> None:
    gate = Gate(tmp_path, tls_cert="c.pem", tls_key="k.pem")
    _, (_, value) = gate.access.log_in(gate.token(), "127.0.0.1")
    assert value.startswith("__Host-schedulezero_8888=sz_")
    assert value.endswith("; Secure")


def test_a_session_ends_after_12_idle_hours(gate: Gate) -> None:
    _, (_, cookie) = gate.access.log_in(gate.token(), "127.0.0.1")
    gate.clock.us += DAY_US // 2 - 1
    assert gate.cookie(cookie).name == "ci"
    gate.clock.us += DAY_US // 2 - 1
    assert gate.cookie(cookie).name == "ci"
    gate.clock.us += DAY_US // 2
    assert gate.cookie(cookie) is sz.NOBODY


def test_a_session_ends_after_7_days_however_busy(gate: Gate) -> None:
    identity, (_, cookie) = gate.access.log_in(gate.token(), "127.0.0.1")
    assert identity.expires_us == NOW_US + 7 * DAY_US
    for _ in range(27):
        gate.clock.us += DAY_US // 4
        assert gate.cookie(cookie).name == "ci"
    gate.clock.us += DAY_US // 4
    assert gate.cookie(cookie) is sz.NOBODY


def test_a_session_ends_with_its_token(gate: Gate) -> None:
    identity, (_, cookie) = gate.access.log_in(gate.token(days=1), "127.0.0.1")
    assert identity.expires_us == NOW_US + DAY_US
    gate.clock.us += DAY_US // 4 * 2 - 1
    assert gate.cookie(cookie).name == "ci"
    gate.clock.us = NOW_US + DAY_US
    assert gate.cookie(cookie) is sz.NOBODY


def test_a_restarted_server_knows_the_session(gate: Gate) -> None:
    _, (_, cookie) = gate.access.log_in(gate.token(), "127.0.0.1")
    after = sz.Access(gate.config, gate.clock)
    assert after.identify({"cookie": cookie.partition(";")[0]}, "127.0.0.1").name == "ci"


def test_after_logging_out_the_cookie_is_worth_nothing(gate: Gate) -> None:
    identity, (_, cookie) = gate.access.log_in(gate.token(), "127.0.0.1")
    name, cleared = gate.access.log_out(identity)
    assert (name, cleared[:37]) == ("Set-Cookie", "schedulezero_8888=; Path=/; Max-Age=0")
    assert gate.cookie(cookie) is sz.NOBODY


def test_sessions_are_bounded_and_the_one_unused_longest_goes(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_SESSIONS", 3)
    token = gate.token()
    cookies = []
    for _ in range(4):
        gate.clock.us += 1_000_000
        cookies.append(gate.access.log_in(token, "127.0.0.1")[1][1])
    assert [gate.cookie(cookie).name for cookie in cookies] == ["", "ci", "ci", "ci"]


# Roles


@pytest.mark.parametrize(
    ("role", "may"),
    [(sz.Role.ANYONE, 1), (VIEWER, 2), (OPERATOR, 3), (ADMIN, 4)],
)
def test_each_role_includes_those_before_it(role: sz.Role, may: int) -> None:
    assert [role.includes(other) for other in sz.Role] == [True] * may + [False] * (4 - may)


def test_a_refusal_says_which_role_is_needed(gate: Gate) -> None:
    refusal = gate.access.refusal(sz.Identity("ci", VIEWER), OPERATOR)
    assert refusal.status == 403
    assert str(refusal) == "this needs the role operator; the token 'ci' has viewer"


# Hosts


LOCAL_NAMES = sz.own_names(sz.Config(), "pi")
WIDE_NAMES = sz.own_names(
    sz.Config(http_host="0.0.0.0", allowed_hosts=("sz.example.org",)), "Pi.lan"
)


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost:8888", "localhost.", "127.0.0.1", "127.0.0.1:8888", "127.8.9.10",
     "[::1]", "[::1]:8888"],
)  # fmt: skip
def test_the_loopback_names_are_always_ours(host: str) -> None:
    assert sz.is_host_allowed(host, LOCAL_NAMES, any_address=False)
    assert sz.is_host_allowed(host, WIDE_NAMES, any_address=True)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.localhost", "",
     "192.168.1.5", "0.0.0.0", "[::]", "2130706433", "0x7f000001", "127.1", "pi", "[evil]",
     "localhost@evil.example", "::ffff:127.0.0.1"],
)  # fmt: skip
def test_another_name_may_be_a_rebound_one(host: str) -> None:
    assert not sz.is_host_allowed(host, LOCAL_NAMES, any_address=False)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [("sz.example.org", True), ("SZ.example.org:443", True), ("pi.lan:8888", True), ("pi", True),
     ("pi.local:8888", True), ("192.168.1.5:8888", True), ("[2001:db8::1]:8888", True),
     ("evil.example", False), ("sz.example.org.evil.example", False), ("0.0.0.0:8888", False)],
)  # fmt: skip
def test_an_open_server_is_called_by_its_names_and_by_any_address(host: str, allowed: bool) -> None:
    assert sz.is_host_allowed(host, WIDE_NAMES, any_address=True) is allowed


@given(st.text(max_size=50))
def test_no_host_header_is_a_fault(host: str) -> None:
    sz.is_host_allowed(host, LOCAL_NAMES, any_address=True)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.5.5.5", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.5", False), ("example.org", False)],
)  # fmt: skip
def test_what_is_reached_from_this_machine_alone(host: str, expected: bool) -> None:
    assert sz.is_this_machine(host) is expected


# Other sites


HERE = {"host": "localhost:8888"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://localhost:8888"},
        {"origin": "http://localhost:8888", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"origin": "https://localhost:8888"},  # a proxy ends the TLS
    ],
)
def test_a_program_and_the_dashboard_may_change_things(headers: dict[str, str]) -> None:
    assert sz.describe_cross_site("POST", {**HERE, **headers}, frozenset()) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://localhost:3000"},
        {"origin": "http://localhost:8888.evil.example"},
        {"origin": "file://"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
        {"origin": "http://localhost:8888", "sec-fetch-site": "cross-site"},
    ],
)
@pytest.mark.parametrize("method", ["POST", "PATCH", "DELETE", "PUT", "OPTIONS"])
def test_a_page_of_another_site_changes_nothing(method: str, headers: dict[str, str]) -> None:
    assert sz.describe_cross_site(method, {**HERE, **headers}, frozenset())


def test_a_websocket_of_another_site_is_refused() -> None:
    handshake = {**HERE, "upgrade": "websocket"}
    evil = {**handshake, "origin": "https://evil.example"}
    assert sz.describe_cross_site("GET", evil, frozenset())
    ours = {**handshake, "origin": "http://localhost:8888"}
    assert sz.describe_cross_site("GET", ours, frozenset()) is None
    assert sz.describe_cross_site("GET", handshake, frozenset()) is None


def test_another_site_may_link_to_us_but_not_load_from_us() -> None:
    link = {**HERE, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert sz.describe_cross_site("GET", link, frozenset()) is None
    load = {**HERE, "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert sz.describe_cross_site("GET", load, frozenset())


def test_a_configured_origin_is_taken_to_the_letter() -> None:
    allowed = frozenset({"https://tools.example.org"})
    good = {**HERE, "origin": "https://tools.example.org", "sec-fetch-site": "cross-site"}
    assert sz.describe_cross_site("POST", good, allowed) is None
    for near in (
        "http://tools.example.org",
        "https://tools.example.org:444",
        "https://example.org",
    ):
        assert sz.describe_cross_site("POST", {**good, "origin": near}, allowed)


def test_default_ports_are_the_same_as_none() -> None:
    for origin, host in (
        ("https://a.example", "a.example:443"),
        ("http://a.example:80", "a.example"),
    ):
        headers = {"origin": origin, "host": host}
        assert sz.describe_cross_site("POST", headers, frozenset()) is None


# How often one may be wrong


def test_after_ten_wrong_tokens_an_address_has_to_wait() -> None:
    limit = sz.FailureLimit()
    for _ in range(10):
        assert limit.wait_s("203.0.113.9", 100.0) == 0
        limit.note_failure("203.0.113.9", 100.0)
    assert limit.wait_s("203.0.113.9", 100.0) == 6
    assert limit.wait_s("203.0.113.10", 100.0) == 0
    assert limit.wait_s("203.0.113.9", 106.0) == 0
    limit.note_failure("203.0.113.9", 106.0)
    assert limit.wait_s("203.0.113.9", 106.0) == 6
    assert limit.wait_s("203.0.113.9", 200.0) == 0


def test_failures_of_one_ipv6_network_count_together() -> None:
    assert sz.block_of("2001:db8:1:2:3:4:5:6") == sz.block_of("2001:db8:1:2::9") != "2001:db8::"
    assert sz.block_of("::ffff:203.0.113.9") == sz.block_of("203.0.113.9")
    assert sz.block_of("fe80::1%eth0") == sz.block_of("fe80::2")
    assert sz.block_of("") == ""


def test_the_memory_for_failures_is_bounded() -> None:
    limit = sz.FailureLimit()
    for number in range(5_000):
        limit.note_failure(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0.0)
    assert len(limit._empty_s) == sz.MAX_ADDRESSES


def test_too_many_failures_are_429_but_the_right_token_of_a_program_passes(gate: Gate) -> None:
    token = gate.token()
    assert [gate.refusal("sz_wrong").status for _ in range(12)] == [401] * 10 + [429] * 2
    assert dict(gate.refusal("sz_wrong").headers)["Retry-After"] == "7"
    assert gate.bearer(token).name == "ci"
    with pytest.raises(sz.HttpError) as caught:
        gate.access.log_in(token, "127.0.0.1")
    assert caught.value.status == 429
    assert gate.access.log_in(token, "203.0.113.9")[0].name == "ci"


# What is recorded


def test_failures_and_changes_of_tokens_are_recorded(gate: Gate) -> None:
    gate.token("ci", OPERATOR)
    with pytest.raises(sz.HttpError):
        gate.access.log_in("sz_wrong", "203.0.113.9")
    gate.command_line.revoke("ci")
    assert not gate.access.is_still(sz.LOOPBACK)
    shown = [(entry.actor, entry.address, entry.action, entry.target) for entry in gate.noted]
    assert shown == [
        ("command line", "", "create_token", "ci (operator)"),
        ("", "203.0.113.9", "log_in", ""),
        ("command line", "", "revoke_token", "ci (operator)"),
    ]


def test_a_refused_token_is_never_repeated(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    token = gate.token()
    gate.command_line.revoke("ci")
    with caplog.at_level(logging.DEBUG):
        refusal = gate.refusal(token)
    said = f"{refusal} {refusal.headers} {caplog.text} {gate.noted}"
    assert token.rpartition("_")[2] not in said
    assert "sz_" not in said.replace("sz_...", "")


# Before the start


def parse(text: str) -> sz.Config:
    mapping, lines = sz.parse_yaml(text, "config.yaml")
    return sz.parse_config(mapping, environ={}, path="/x/config.yaml", directory="/x", lines=lines)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "sz.example.org"])
def test_an_open_address_without_tls_is_refused_with_its_line(host: str) -> None:
    config = parse(f"timezone: UTC\nhttp_host: '{host}'\n")
    with pytest.raises(sz.ConfigError) as caught:
        sz.check_access(config)
    assert str(caught.value).startswith(f"config.yaml line 2: http_host: {host} is open to other")
    assert "allow_insecure" in str(caught.value)


def test_an_open_address_without_tls_can_be_allowed_and_is_then_shown() -> None:
    config = parse("http_host: 0.0.0.0\nallow_insecure: true\n")
    sz.check_access(config)
    assert "unencrypted" in (sz.describe_insecurity(config) or "")
    assert sz.describe_insecurity(replace(config, http_host="127.0.0.1")) is None
    assert sz.describe_insecurity(replace(config, tls_cert="c", tls_key="k")) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tls_cert: c.pem\n", "line 1: tls_cert: needs tls_key beside it"),
        ("\ntls_key: c.pem\n", "line 2: tls_key: needs tls_cert beside it"),
        ("tls_key: k.pem\ntls_cert: c.pem\n", "line 2: tls_cert: cannot read /x/c.pem: No such"),
    ],
)
def test_tls_files_come_in_pairs_and_are_there(text: str, said: str) -> None:
    with pytest.raises(sz.ConfigError) as caught:
        sz.check_access(parse(text))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("auth: no\n", "auth is False; it must be one of auto, required"),
        ("auth: never\n", "one of auto, required"),
        ("allow_insecure: 1\n", "true or false"),
        ("allowed_hosts: sz.example.org\n", "a list of host names"),
        ("allowed_hosts: ['sz.example.org:443']\n", "without scheme and port"),
        ("allowed_hosts: ['*']\n", "a list of host names"),
        ("cors_origins: ['*']\n", "a list of origins"),
        ("cors_origins: ['https://a.example/']\n", "without a path"),
        ("cors_origins: ['https://A.example']\n", "exact"),
        ("cors_origins: ['null']\n", "a list of origins"),
    ],
)
def test_wrong_settings_of_access_are_named_with_their_line(text: str, said: str) -> None:
    with pytest.raises(sz.ConfigError) as caught:
        parse(text)
    assert "config.yaml line 1" in str(caught.value)
    assert said in str(caught.value)


def test_the_environment_sets_lists_and_flags() -> None:
    environ = {
        "SCHEDULEZERO_ALLOWED_HOSTS": "a.example, b.example",
        "SCHEDULEZERO_CORS_ORIGINS": "https://c.example",
        "SCHEDULEZERO_ALLOW_INSECURE": "true",
    }
    config = sz.parse_config({}, environ=environ)
    assert config.allowed_hosts == ("a.example", "b.example")
    assert config.cors_origins == ("https://c.example",)
    assert config.allow_insecure is True
