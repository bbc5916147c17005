"""Keys, join strings, who may be called where, and secrets: the decisions, and the files."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import handler
import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedulezero import (
    Config,
    ConfigError,
    Conflict,
    HandlerKey,
    InvalidField,
    KeyFile,
    KeyPair,
    Keys,
    NotAllowed,
    NotFound,
    ScheduleZeroError,
    Scrubber,
    Secrets,
    choose_security,
    encode_join,
    has_secrets,
    insert_secrets,
    load_config,
    may_call_back,
    parse_config,
    parse_keys,
    render_keys,
    secret_names,
)

SERVER = KeyPair("p" * 40, "s" * 40)
A = HandlerKey("a", "A" * 40, 1)
LOCAL_A = HandlerKey("a", "L" * 40, 2, "S" * 40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


# How handlers talk to the server


@pytest.mark.parametrize(
    ("host", "security", "chosen"),
    [
        ("127.0.0.1", "auto", "null"),
        ("localhost", "auto", "null"),
        ("::1", "auto", "null"),
        ("127.0.0.1", "curve", "curve"),
        ("0.0.0.0", "auto", "curve"),
        ("::", "auto", "curve"),
        ("10.1.2.3", "auto", "curve"),
        ("db.example.org", "auto", "curve"),  # a name may turn out to be any address
    ],
)
def test_the_link_is_encrypted_unless_only_this_machine_reaches_it(
    host: str, security: str, chosen: str
) -> None:
    assert choose_security(Config(zmq_host=host, zmq_security=security)) == chosen


def test_an_open_link_to_the_network_is_refused_unless_insisted_on() -> None:
    config = Config(zmq_host="0.0.0.0", zmq_security="null")
    with pytest.raises(ConfigError, match=r"zmq_security.*0\.0\.0\.0.*use curve"):
        choose_security(config)
    assert choose_security(replace(config, allow_insecure=True)) == "null"


@pytest.mark.parametrize(
    ("host", "peer", "networks", "allowed"),
    [
        ("127.0.0.1", "127.0.0.1", (), True),
        ("localhost", "127.0.0.1", (), True),
        ("127.0.0.1", "::ffff:127.0.0.1", (), True),
        ("10.0.0.7", "127.0.0.1", (), False),
        ("10.0.0.7", "10.0.0.7", (), True),
        ("203.0.113.9", "203.0.113.9", (), True),
        ("192.168.1.4", "203.0.113.9", (), True),
        ("127.0.0.1", "10.0.0.7", (), False),  # what only this machine reaches
        ("169.254.169.254", "10.0.0.7", (), False),  # a cloud's metadata
        ("8.8.8.8", "10.0.0.7", (), False),
        ("fd00::5", "10.0.0.7", (), True),
        ("10.0.0.7", "10.0.0.7", ("192.168.0.0/16",), False),
        ("192.168.4.4", "10.0.0.7", ("192.168.0.0/16",), True),
        ("a.name", "10.0.0.7", (), False),
        ("10.0.0.7", "", (), False),
    ],
)
def test_plain_handlers_are_called_only_where_they_may_be(
    host: str, peer: str, networks: tuple[str, ...], allowed: bool
) -> None:
    assert may_call_back(host, peer, networks) is allowed


# The configuration


def test_the_environment_can_set_the_security_of_the_link() -> None:
    environ = {
        "SCHEDULEZERO_ZMQ_SECURITY": "curve",
        "SCHEDULEZERO_HANDLER_SECRET": "a long enough one",
        "SCHEDULEZERO_CALLBACK_NETWORKS": "10.0.0.0/8, fd00::/8",
        "CREDENTIALS_DIRECTORY": "/run/credentials/x",
    }
    config = parse_config({}, environ=environ)
    assert config.zmq_security == "curve"
    assert config.handler_secret == "a long enough one"
    assert config.callback_networks == ("10.0.0.0/8", "fd00::/8")
    assert config.credentials_dir == "/run/credentials/x"
    assert "long enough" not in repr(config)


def test_null_in_yaml_is_the_word_null(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("zmq_security: null\n")
    assert load_config(str(tmp_path / "c.yaml"), {}).zmq_security == "null"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zmq_security", "ssl"),
        ("handler_secret", "short"),
        ("handler_secret", 1234567890123456),
        ("callback_networks", "10.0.0.0/8"),
        ("callback_networks", ["10.0.0.1/8"]),
        ("callback_networks", [10]),
        ("callback_networks", ["everywhere"]),
    ],
)
def test_wrong_security_settings_are_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        parse_config({key: value}, environ={})
    if key == "handler_secret":
        assert str(value) not in str(caught.value)


# Keys


def test_an_id_has_one_key_and_besides_that_of_the_handler_started_here() -> None:
    keys = Keys(SERVER).enrol(A).enrol(LOCAL_A)
    assert keys.owner("A" * 40) == A
    assert keys.local("a") == LOCAL_A
    assert keys.owner("?" * 40) is None
    assert keys.owner(None) is None
    with pytest.raises(Conflict, match="'a' has a key already"):
        keys.enrol(replace(A, public="B" * 40))


def test_revoking_ends_all_keys_of_an_id() -> None:
    keys = Keys(SERVER).enrol(A).enrol(LOCAL_A).enrol(HandlerKey("b", "B" * 40, 3))
    assert [key.handler_id for key in keys.revoke("a").handlers] == ["b"]
    with pytest.raises(NotFound, match="'c' has no key"):
        keys.revoke("c")


def test_keys_survive_their_file() -> None:
    keys = Keys(SERVER).enrol(A).enrol(LOCAL_A)
    assert parse_keys(render_keys(keys)) == keys


def test_secret_halves_are_not_shown() -> None:
    shown = repr([SERVER, LOCAL_A])
    assert "sss" not in shown
    assert "SSS" not in shown


def config_in(tmp_path: Path, **changes: Any) -> Config:
    return Config(data_dir=str(tmp_path / "data"), **changes)


def test_the_key_file_is_private_and_seen_by_others_at_once(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    ours, theirs = KeyFile(config), KeyFile(config)
    assert theirs.load() == Keys()
    assert ours.open_server(lambda: SERVER) == SERVER
    ours.change(lambda keys: keys.enrol(A))
    assert theirs.load().owner(A.public) == A
    assert theirs.open_server(lambda: KeyPair("x", "y")) == SERVER
    path = tmp_path / "data" / "keys.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0


def test_the_key_of_a_handler_started_here_stays_the_same(tmp_path: Path) -> None:
    keys = KeyFile(config_in(tmp_path))
    first = keys.open_local("a", lambda: KeyPair("1" * 40, "2" * 40), 5)
    assert keys.open_local("a", lambda: KeyPair("3" * 40, "4" * 40), 6) == first


def test_a_key_file_that_others_may_read_or_that_is_damaged_is_not_used(tmp_path: Path) -> None:
    keys = KeyFile(config_in(tmp_path))
    keys.open_server(lambda: SERVER)
    path = tmp_path / "data" / "keys.json"
    path.chmod(0o644)
    with pytest.raises(NotAllowed, match="chmod 600"):
        KeyFile(config_in(tmp_path)).load()
    path.chmod(0o600)
    for text in ("{", "[]", '{"server": {}, "handlers": []}', '{"handlers": 1}'):
        path.write_text(text)
        with pytest.raises(ScheduleZeroError, match="damaged"):
            keys.load()


# The join string


JOIN = encode_join("backup", "tcp://10.0.0.2:4242", "p" * 40, "s" * 40)


def test_a_join_string_is_one_word_that_the_handler_reads() -> None:
    assert re.fullmatch(r"sz1\.[A-Za-z0-9_-]+", JOIN)
    assert handler.read_join(f" {JOIN}\n") == ("backup", "tcp://10.0.0.2:4242", "p" * 40, "s" * 40)


@given(st.integers(0, len(JOIN) - 1))
def test_a_join_string_that_is_cut_off_is_refused(length: int) -> None:
    with pytest.raises(handler.ConfigError, match="join string"):
        handler.read_join(JOIN[:length])


def test_a_join_file_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "join"
    path.write_text(JOIN)
    path.chmod(0o600)
    assert handler.read_join(f"@{path}").handler_id == "backup"
    path.chmod(0o640)
    with pytest.raises(handler.ConfigError, match="chmod 600"):
        handler.read_join(f"@{path}")


# Secrets


def test_secrets_are_found_and_inserted_at_any_depth() -> None:
    params = {"a": {"$secret": "x"}, "b": [{"c": {"$secret": "y"}}, 1], "d": "$secret"}
    assert has_secrets(params)
    assert list(secret_names(params)) == [("x", "job_params.a"), ("y", "job_params.b.0.c")]
    inserted = insert_secrets(params, {"x": "one", "y": "two"})
    assert inserted == {"a": "one", "b": [{"c": "two"}, 1], "d": "$secret"}


@given(JSON)
def test_values_without_references_stay_as_they_are(value: Any) -> None:
    if not has_secrets(value):
        assert list(secret_names(value)) == []
        assert insert_secrets(value, {}) == value


@pytest.mark.parametrize(
    "wrong", [{"$secret": 1}, {"$secret": "../x"}, {"$secret": "a", "b": 1}, {"$secret": ""}]
)
def test_what_only_looks_like_a_reference_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidField, match=r"job_params\.k: a secret is"):
        list(secret_names({"k": wrong}))


def test_a_secret_is_hidden_however_it_is_spelt() -> None:
    secret = 'p@ss "wörd"\n-----KEY LINE 1-----'
    scrubber = Scrubber([secret])
    for spelt in (
        secret,
        json.dumps(secret),
        repr(secret),
        f"https://u:{'p%40ss%20%22w%C3%B6rd%22%0A-----KEY%20LINE%201-----'}@h",
    ):
        hidden = scrubber.text(f"before {spelt} after")
        assert "ss" not in hidden
        assert "***" in hidden
    assert scrubber.text("line: -----KEY LINE 1-----") == "line: ***"
    assert scrubber.value({secret: [secret, 1, None, {"k": secret}]}) == {
        "***": ["***", 1, None, {"k": "***"}]
    }


def test_no_secret_hides_nothing() -> None:
    assert Scrubber([]).text("abc") == "abc"


def test_secrets_are_kept_in_a_private_file_and_listed_by_name(tmp_path: Path) -> None:
    secrets = Secrets(config_in(tmp_path))
    secrets.set("b", "value of b")
    secrets.set("a", "first")
    secrets.set("a", "second")
    assert secrets.names() == {"a": "file", "b": "file"}
    assert secrets.get("a") == "second"
    assert (tmp_path / "data" / "secrets.json").stat().st_mode & 0o777 == 0o600
    secrets.delete("a")
    assert secrets.get("a") is None
    with pytest.raises(NotFound, match="no secret 'a'"):
        secrets.delete("a")


@pytest.mark.parametrize(
    ("name", "value"),
    [("", "long enough"), ("a/b", "long enough"), (".a", "long enough"), ("a", "abc"),
     ("a", "nul\0nul"), ("a", "x" * 70_000), ("a", "ü" * 40_000)],
)  # fmt: skip
def test_what_cannot_be_a_secret_is_refused(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(InvalidField, match="secret"):
        Secrets(config_in(tmp_path)).set(name, value)


def test_systemd_credentials_are_secrets_unless_one_of_the_name_is_set(tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "db").write_text("from systemd\n")
    (credentials / "binary").write_bytes(b"\xff\xfe\x00\x01")
    (credentials / "tiny").write_text("x")
    (credentials / "huge").write_text("x" * (64 << 10) + "\nand more")
    secrets = Secrets(config_in(tmp_path, credentials_dir=str(credentials)))
    assert secrets.names() == {"db": "systemd"}
    assert secrets.get("db") == "from systemd"
    assert secrets.get("../credentials/db") is None
    secrets.set("db", "from the file")
    assert secrets.get("db") == "from the file"
    assert secrets.names() == {"db": "file"}


def test_a_reference_to_nothing_is_refused_with_its_place(tmp_path: Path) -> None:
    secrets = Secrets(config_in(tmp_path))
    with pytest.raises(InvalidField, match="there is no secret 'gone'") as caught:
        secrets.check({"a": [{"$secret": "gone"}]})
    assert caught.value.field == "job_params.a.0"
    secrets.set("gone", "come back")
    params, scrubber = secrets.insert({"a": [{"$secret": "gone"}]})
    assert params == {"a": ["come back"]}
    assert scrubber.text("it has come back") == "it has ***"


def test_a_file_written_anew_replaces_the_old_one_whole(tmp_path: Path) -> None:
    secrets = Secrets(config_in(tmp_path))
    secrets.set("a", "value")
    left = tmp_path / "data" / "secrets.json.new"
    left.write_text("left by a crash")
    os.chmod(left, 0o666)
    secrets.set("b", "value")
    assert not left.exists()
    assert (tmp_path / "data" / "secrets.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_makes_belongs_to_whom_the_data_belongs_to(tmp_path: Path) -> None:
    os.chown(tmp_path, 4_321, 4_321)
    Secrets(Config(data_dir=str(tmp_path / "default"))).set("name", "value")
    made = (tmp_path / "default", tmp_path / "default" / "secrets.json")
    assert [path.stat().st_uid for path in made] == [4_321, 4_321]
    os.chown(made[0], 1_234, 1_234)
    Secrets(Config(data_dir=str(made[0]))).set("name", "other")
    assert [path.stat().st_uid for path in made] == [1_234, 1_234]
