"""The fixture that all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from appliance import Appliance


@pytest.fixture
def appliance(tmp_path: Path) -> Iterator[Callable[..., Appliance]]:
    """Makes appliances, each in a directory of its own, and ends them after the test."""
    made: list[Appliance] = []

    def make(name: str = "appliance", **settings: Any) -> Appliance:
        made.append(Appliance(tmp_path / name, settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Why a test had to be run twice; what passed in the end would hide it."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.section(f"rerun: {report.nodeid}")
        terminalreporter.write_line("\n".join(report.longreprtext.splitlines()[-40:]))
