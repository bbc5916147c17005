"""The Dockerfile's steps, taken on a scratch tree: a virtual environment stands for the image."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from appliance import ROOT, Appliance, wait_for

PLACES = re.compile(r"(?<![\w.])/(?=(?:app|config|data|logs)\b)")
USER = "10001"


@cache
def instructions() -> tuple[tuple[str, str], ...]:
    """Name and text of each instruction, with continued lines joined."""
    lines = [
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return tuple((name, text) for name, _, text in (line.partition(" ") for line in joined) if name)


def texts(name: str) -> list[str]:
    return [text for known, text in instructions() if known == name]


def variables() -> dict[str, str]:
    return dict(pair.partition("=")[::2] for text in texts("ENV") for pair in shlex.split(text))


def health_command() -> list[str]:
    command: list[str] = json.loads(texts("HEALTHCHECK")[0].partition("CMD ")[2])
    return command


def compose() -> dict[str, Any]:
    """The example that stands in the Dockerfile's comment."""
    comment = [
        line[2:] for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] == "#"
    ]
    start = comment.index("  services:")
    end = next(i for i in range(start, len(comment)) if not comment[i].startswith("  "))
    found: dict[str, Any] = yaml.safe_load("\n".join(comment[start:end]))
    return found


class Container(Appliance):
    """A directory as a container's root, in which the Dockerfile's steps were taken."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root
        self.config.unlink()

    def place(self, text: str) -> str:
        """The same text with its absolute paths in this root, and this user in place of its own."""
        return PLACES.sub(f"{self.root}/", text).replace(USER, str(os.geteuid()))

    @property
    def environ(self) -> dict[str, str]:
        given = {name: self.place(value) for name, value in variables().items()}
        ports = {"HTTP_PORT": str(self.http_port), "ZMQ_PORT": str(self.zmq_port)}
        ports = {f"SCHEDULEZERO_{name}": port for name, port in ports.items()}
        return {"PATH": f"{self.root}/venv/bin:/usr/bin:/bin", **given, **ports}

    def build(self) -> Container:
        subprocess.run([sys.executable, "-m", "venv", str(self.root / "venv")], check=True)
        here = self.root
        for name, text in instructions():
            if name == "WORKDIR":
                here = Path(self.place(text))
                here.mkdir()
            elif name == "COPY":
                self.copy(here, *self.place(text).split())
            elif name == "RUN":
                subprocess.run(
                    ["sh", "-c", self.place(text)], cwd=here, env=self.environ, check=True
                )
        return self

    def copy(self, here: Path, *words: str) -> None:
        """As COPY does it: a directory's content, files by their names into a directory."""
        *sources, target = words
        for source in (ROOT / name for name in sources):
            if source.is_dir():
                shutil.copytree(source, here / target)
            else:
                (here / target).mkdir(exist_ok=True)
                shutil.copy(source, here / target)

    def start(self, *prefix: str) -> Container:
        entry = json.loads(texts("ENTRYPOINT")[0]) + json.loads(texts("CMD")[0])
        with (self.directory / "output.log").open("ab") as output:
            self.process = subprocess.Popen(
                [*prefix, str(self.root / "venv" / "bin" / entry[0]), *entry[1:]],
                cwd=self.root / "app", env=self.environ, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self.wait_healthy()
        return self

    def health(self) -> int:
        done = subprocess.run(health_command(), cwd=self.root / "app", env=self.environ,
                              check=False, timeout=30)  # fmt: skip
        return done.returncode


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Container:
    return Container(tmp_path_factory.mktemp("container") / "root").build()


@pytest.fixture
def container(image: Container) -> Iterator[Container]:
    """The same image for each test, with empty volumes."""
    yield image
    if image.process is not None and image.process.poll() is None:
        image.stop()
    image.close()
    for name in ("data", "logs"):
        shutil.rmtree(image.root / name)
        (image.root / name).mkdir(mode=0o700)
    (image.directory / "output.log").unlink(missing_ok=True)
    image.headers = {}


def test_it_demands_a_login_tells_the_token_once_and_logs_to_stdout(container: Container) -> None:
    container.start()
    assert container.get("/api/handlers").status == 401
    token = re.search(r"^  (sz_\S+)$", container.output, re.MULTILINE)
    assert token, container.output
    container.headers = {"Authorization": f"Bearer {token[1]}"}
    container.wait_connected("ding-dong")
    assert container.get("/").body.startswith(b"<!doctype html>")
    assert " INFO " in container.output
    assert not list((container.root / "logs").rglob("*.log"))
    assert (container.root / "data" / "default" / "schedulezero.db").is_file()


def test_the_health_check_passes_while_it_runs_and_fails_after_it_stopped(
    container: Container,
) -> None:
    container.start()
    assert container.health() == 0
    assert container.stop() == 0
    assert container.health() == 1


def is_allowed_namespaces() -> bool:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return os.geteuid() == 0 and subprocess.run(command, check=False).returncode == 0


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()]


@pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which("unshare") and is_allowed_namespaces()),
    reason="needs a PID namespace",
)
def test_as_the_first_process_it_collects_orphans_and_ends_on_sigterm(
    container: Container,
) -> None:
    container.start("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    assert container.process is not None
    (first,) = children_of(container.process.pid)
    own = set(children_of(first))
    enter = ["nsenter", "--target", str(first), "--pid"]
    subprocess.run([*enter, "sh", "-c", "sleep 1000 >/dev/null 2>&1 &"], check=True)
    (orphan,) = wait_for(lambda: set(children_of(first)) - own, "the orphan's new parent")
    os.kill(orphan, signal.SIGKILL)
    wait_for(lambda: not os.path.exists(f"/proc/{orphan}"), "the end of the zombie")
    os.kill(first, signal.SIGTERM)
    assert container.process.wait(45) == 0


def test_the_compose_example_agrees_with_the_image() -> None:
    example = compose()
    service = example["services"]["schedulezero"]
    assert service["ports"] == [f"127.0.0.1:{texts('EXPOSE')[0]}:{texts('EXPOSE')[0]}"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in service["volumes"])
    assert mounts == {"/config": "./config", "/data": "data"}
    assert os.path.dirname(variables()["SCHEDULEZERO_CONFIG_PATH"]) in mounts
    assert {*mounts, *service["tmpfs"]} >= {*json.loads(texts("VOLUME")[0])}
    assert set(example["volumes"]) == {"data"}
    assert int(service["stop_grace_period"].removesuffix("s")) > 30


def test_nothing_in_it_runs_as_root() -> None:
    (user,) = texts("USER")
    assert user == f"{USER}:{USER}"
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert variables()["SCHEDULEZERO_HTTP_HOST"] == "0.0.0.0"
