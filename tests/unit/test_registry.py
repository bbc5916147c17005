"""Who serves what. Times are passed in and no socket is open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import schedulezero as sz
from schedulezero import Instance, MethodInfo, Registration, Registry, WireError

GONE_S = sz.HEARTBEAT_S * sz.LIVENESS


def said(handler_id: str = "worker", instance: str = "one", **fields: Any) -> Registration:
    made = Registration(handler_id, instance, None, (MethodInfo("work"),), 2, (), (), None, None)
    return replace(made, **fields)


@pytest.fixture
def registry() -> Registry:
    return Registry()


def enter(
    registry: Registry, registration: Registration | None = None, route: bytes = b"r1", **at: float
) -> Instance:
    now_s = at.get("now_s", 0.0)
    instance, _ = registry.register(registration or said(), route, now_s, round(now_s * 1e6))
    return instance


def test_an_instance_is_found_by_its_connection_and_its_handler(registry: Registry) -> None:
    instance = enter(registry)
    assert registry.on_route(b"r1") is instance
    assert registry.on_route(b"r2") is None
    assert list(registry.of("worker")) == [instance]
    assert list(registry.of("nobody")) == []
    assert instance.key == "worker/one"


def test_the_second_registration_of_a_handler_id_is_a_repetition(registry: Registry) -> None:
    assert registry.register(said(), b"r1", 0, 0)[1] is False
    assert registry.register(said(), b"r1", 1, 1)[1] is True
    assert registry.register(said(instance="two"), b"r2", 1, 1)[1] is True
    assert registry.register(said("other"), b"r3", 1, 1)[1] is False


def names(registry: Registry) -> list[str]:
    return [method.name for method in registry.methods("worker")]


def test_the_methods_are_those_of_the_instances_that_can_be_called(registry: Registry) -> None:
    assert names(registry) == []
    old = enter(registry, said(methods=(MethodInfo("add"),)), b"r1")
    new = enter(registry, said(instance="two", methods=(MethodInfo("add"), MethodInfo("x"))), b"r2")
    assert names(registry) == ["add", "x"]
    new.gone = True  # what it alone could do is no reason to refuse what the other still can
    assert names(registry) == ["add"]
    enter(registry, said(instance="three", methods=()), b"r3")
    assert names(registry) == []  # it has not said, so anything may be tried
    for instance in registry.of("worker"):
        instance.gone = True
    assert names(registry) == []
    assert old.gone


def test_a_handler_without_an_instance_offers_what_it_offered_last(registry: Registry) -> None:
    instance = enter(registry)
    instance.gone = True
    assert names(registry) == ["work"]
    registry.remove(instance)
    assert names(registry) == ["work"]


def test_the_least_busy_instance_is_picked(registry: Registry) -> None:
    large = enter(registry, said(instance="large", concurrency=4), b"r1")
    small = enter(registry, said(instance="small", concurrency=1), b"r2")
    picked = []
    for number in range(5):
        instance = registry.pick("worker")
        assert instance is not None
        instance.calls.add(f"x:{number}")
        picked.append(instance)
    assert registry.pick("worker") is None
    assert (picked.count(large), picked.count(small)) == (4, 1)
    assert registry.pick("nobody") is None


@pytest.mark.parametrize("flag", ["draining", "gone", "unreachable"])
def test_what_drains_or_cannot_be_reached_is_not_picked(registry: Registry, flag: str) -> None:
    instance = enter(registry)
    setattr(instance, flag, True)
    assert registry.pick("worker") is None
    assert instance.free == 0
    setattr(instance, flag, False)
    assert registry.pick("worker") is instance


def test_more_calls_than_slots_are_no_free_slots(registry: Registry) -> None:
    instance = enter(registry)
    instance.calls |= {f"x:{number}" for number in range(5)}
    assert registry.pick("worker") is None


def test_a_new_connection_of_an_instance_takes_over_its_calls(registry: Registry) -> None:
    before = enter(registry)
    before.calls.add("x:1")
    after = enter(registry, route=b"r2")
    assert after.calls == {"x:1"}
    assert registry.on_route(b"r1") is None
    assert registry.on_route(b"r2") is after
    assert list(registry.of("worker")) == [after]


def test_what_was_replaced_cannot_be_called_any_more(registry: Registry) -> None:
    before = enter(registry)
    enter(registry, route=b"r2")
    assert not before.is_callable


def test_removing_an_instance_leaves_the_one_that_has_its_connection_now(
    registry: Registry,
) -> None:
    first = enter(registry, said("first"))
    second = enter(registry, said("second"))  # over the same connection
    registry.remove(first)
    assert registry.on_route(b"r1") is second
    assert list(registry.of("first")) == []
    registry.remove(first)
    registry.remove(second)
    assert registry.on_route(b"r1") is None
    assert registry.instances == {}


def test_the_silent_are_gone_once_and_after_a_while_removed(registry: Registry) -> None:
    instance = enter(registry, now_s=100.0)
    assert registry.expire(100.0 + GONE_S - 0.1) == ([], [])
    assert registry.expire(100.0 + GONE_S) == ([instance], [])
    assert instance.info().status == "Disconnected"
    assert registry.expire(100.0 + GONE_S + 1) == ([], [])
    assert registry.expire(100.0 + sz.GONE_SHOWN_S) == ([], [instance])
    assert list(registry.of("worker")) == []


def test_those_heard_stay(registry: Registry) -> None:
    instance = enter(registry)
    for second in range(0, 600, 2):
        instance.heard_s = float(second)
        assert registry.expire(second + 1.0) == ([], [])


def test_a_plain_handler_is_looked_for_much_longer(registry: Registry) -> None:
    address = "tcp://127.0.0.1:5555"
    instance = enter(registry, said(instance=address, address=address))
    assert registry.expire(GONE_S) == ([instance], [])
    assert registry.expire(sz.GONE_SHOWN_S + 1) == ([], [])
    assert registry.expire(sz.PLAIN_SOUGHT_S) == ([], [instance])


def test_a_handler_is_known_after_its_last_instance_is_gone(registry: Registry) -> None:
    registry.remove(enter(registry, now_s=5.0))
    assert registry.known == {"worker": ("dial-in", (MethodInfo("work"),), 5_000_000)}


def test_instances_and_handler_ids_are_bounded(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_INSTANCES", 2)
    monkeypatch.setattr(sz, "MAX_HANDLERS", 2)
    enter(registry, said("a"), b"r1")
    enter(registry, said("b"), b"r2")
    with pytest.raises(WireError):
        enter(registry, said("a", "two"), b"r3")
    enter(registry, said("a"), b"r4")  # a known instance may always come back
    registry.remove(registry.instances["b/one"])
    with pytest.raises(WireError):
        enter(registry, said("c"), b"r5")
    assert registry.on_route(b"r3") is registry.on_route(b"r5") is None


def test_of_too_many_handler_ids_the_idle_one_seen_least_lately_makes_room(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sz, "MAX_HANDLERS", 3)
    enter(registry, said("connected"), b"r1", now_s=1.0)
    registry.remove(enter(registry, said("old"), b"r2", now_s=2.0))
    assert registry.displaced_by("new") is None  # there is room
    registry.remove(enter(registry, said("young"), b"r3", now_s=3.0))
    assert registry.displaced_by("young") is None  # it is known
    assert registry.displaced_by("new") == "old"
    registry.forget("old")
    enter(registry, said("new"), b"r4")
    registry.forget("young")
    enter(registry, said("newer"), b"r5")
    assert registry.displaced_by("newest") is None  # all are connected
    with pytest.raises(WireError, match="3 handler ids are in use"):
        enter(registry, said("newest"), b"r6")


def test_what_is_shown_of_an_instance(registry: Registry) -> None:
    instance = enter(registry, said(pid=7, hostname="pi"), now_s=3.0)
    instance.calls.add("x:1")
    instance.skew_s = 0.25
    info = instance.info()
    assert (info.instance, info.address, info.status) == ("one", "dial-in", "Connected")
    assert (info.concurrency, info.running, info.pid, info.hostname) == (2, 1, 7, "pi")
    assert (info.registered_us, info.last_seen_us, info.clock_skew_s) == (3e6, 3e6, 0.25)
    instance.draining = True
    assert instance.info().status == "Draining"
