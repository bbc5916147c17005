"""A real browser on the dashboard: against the stand-in, and against a real server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mock_server import Mock, MockServer

if TYPE_CHECKING:
    from appliance import Appliance
    from playwright.sync_api import Browser, Page

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
]


@pytest.fixture(scope="module")  # while it lives, no asyncio test can run in this process
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("chromium is not installed")
    api.expect.set_options(timeout=20_000)  # an upper bound: what is true at once passes at once
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages; a fault of the page's code or a breach of its policy fails the test."""
    contexts = []
    faults: list[str] = []

    def open_at(url: str, width: int = 1280, height: int = 800, **more: Any) -> Page:
        settings = {"color_scheme": "dark", "timezone_id": "Europe/Berlin", **more}
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.extend(faults_of(said)))
        page.goto(url)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert faults == []


def faults_of(said: Any) -> list[str]:
    """What the console says, unless the browser only reports a refused request: tests do that."""
    is_fault = said.type == "error" and "Failed to load resource" not in said.text
    return [said.text] if is_fault else []


@pytest.fixture
def serve() -> Iterator[Callable[..., MockServer]]:
    """Starts stand-ins and stops them after the test."""
    servers: list[MockServer] = []

    def start(mock: Mock, port: int = 0) -> MockServer:
        servers.append(MockServer(mock, port))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def real(appliance: Callable[..., Appliance]) -> Appliance:
    """A real server with two real handlers."""
    one: Appliance = appliance(timezone="Europe/Berlin", instance_name="Workshop")
    one.run("server")
    one.handler("DingDong", "ding-dong")
    one.handler("Example", "example")
    return one


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, fetched by npm into a directory of the test's own."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed, so axe-core cannot be fetched")
    directory = tmp_path_factory.mktemp("axe")
    (directory / "package.json").write_text(json.dumps({"private": True}))
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "axe-core@4"]
    try:
        subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=120)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"npm could not fetch axe-core: {error}")
    return (Path(directory) / "node_modules/axe-core/axe.min.js").read_text()
