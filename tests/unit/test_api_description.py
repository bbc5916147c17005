"""The API's description of itself agrees with the table it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import schedulezero as sz

DOCUMENT = json.loads(sz.encode_json(sz.describe_api(sz.ROUTES)))


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (item for key, item in value.items() if key == "$ref")
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_every_route_is_described_once() -> None:
    described = [
        (method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item
    ]
    assert sorted(described) == sorted((route.method, route.path) for route in sz.ROUTES)
    assert len(set(described)) == len(described)


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [item["operationId"] for path in DOCUMENT["paths"].values() for item in path.values()]
    assert len(set(names)) == len(names)


def test_every_reference_leads_somewhere() -> None:
    for reference in references(DOCUMENT):
        name = reference.removeprefix("#/components/schemas/")
        assert name in DOCUMENT["components"]["schemas"]


@pytest.mark.parametrize("route", sz.ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_a_route_describes_its_arguments_its_body_and_its_answers(route: sz.Route) -> None:
    operation = DOCUMENT["paths"][route.path][route.method.lower()]
    placed = [item["name"] for item in operation["parameters"] if item["in"] == "path"]
    assert placed == re.findall(r"{(\w+)}", route.path)
    asked = [item["name"] for item in operation["parameters"] if item["in"] == "query"]
    assert asked == [field.name for field in route.query.fields]
    headers = [item["name"] for item in operation["parameters"] if item["in"] == "header"]
    assert headers == [field.name for field in route.headers]
    assert ("requestBody" in operation) == (route.body is not None)
    assert {*map(str, route.answers), "default"} == set(operation["responses"])
    assert operation["summary"]


def test_the_header_that_resumes_the_event_stream_is_described() -> None:
    (header,) = DOCUMENT["paths"]["/api/events"]["get"]["parameters"]
    assert (header["name"], header["in"]) == ("Last-Event-ID", "header")


def test_a_body_is_described_by_the_fields_that_check_it() -> None:
    schema = sz.RUN_FIELDS.schema
    assert schema["required"] == ["handler_id", "method_name"]
    assert schema["additionalProperties"] is False
    timeout = schema["properties"]["timeout"]["anyOf"][0]
    assert (timeout["minimum"], timeout["maximum"]) == (0.1, sz.MAX_RUN_S)
    retry = schema["properties"]["retry"]["anyOf"][0]
    assert set(retry["properties"]) == set(sz.RetryPolicy.__dataclass_fields__)


def test_every_type_of_trigger_is_described() -> None:
    assert tuple(sz.TRIGGER_KINDS) == sz.TRIGGER_TYPES


@pytest.mark.parametrize("route", sz.ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_the_router_finds_each_route_by_its_own_path(route: sz.Route) -> None:
    path = re.sub(r"{\w+}", "a.b:c@d-e_f", route.path)
    found, arguments = sz.Router(sz.ROUTES).find(route.method, path)
    assert found is route
    assert set(arguments.values()) <= {"a.b:c@d-e_f"}


def test_only_reading_is_open_to_viewers() -> None:
    changing = {r.path for r in sz.ROUTES if r.method != "GET" and r.role is sz.Role.VIEWER}
    assert changing == {"/api/triggers/preview"}  # it computes, and changes nothing
