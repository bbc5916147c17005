"""The fixtures that the tests of this directory share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import schedulezero as sz
import zmq.asyncio
from apparatus import Server


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sz, "TICK_S", 0.03)


@pytest.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    yield context
    context.destroy(0)


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Callable[..., Server]]:
    """Starts servers, all on one database, and closes them."""
    running: list[Server] = []

    def start(name: str = "test.db", **options: Any) -> Server:
        running.append(Server(tmp_path / name, **options))
        return running[-1]

    yield start
    for server in running:
        if not server.gateway.context.closed:
            server.close()
    await asyncio.sleep(0)  # what the last commits told the loop is heard before it ends


@pytest.fixture
async def server(serve: Callable[..., Server]) -> Server:
    return serve()
