"""What is tortured: the appliance, handlers beside it, and a small disk to fill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance import Appliance

HERE = Path(__file__).resolve().parent
DISK_MIB = 192
RECOVER_S = 30.0  # what a start after a kill may take
ORPHAN_S = 15.0  # what is left of killed ones may take to end
ALREADY_RUNNING = 75


@dataclass(frozen=True, slots=True)
class Owned:
    """A handler process this test keeps running, beside those of the governor."""

    handler_id: str
    options: tuple[str, ...] = ()
    is_plain: bool = False


OWNED = (
    Owned("threads", ("--concurrency", "4")),
    Owned("threads", ("--concurrency", "2")),
    Owned("processes", ("--concurrency", "3", "--processes")),
    Owned("plain", is_plain=True),
    Owned("plain-two", is_plain=True),
)
TARGETS = ("threads",) * 4 + ("processes", "governed") * 2 + ("forked", "plain", "plain-two")


class Site:
    """The appliance under torture, its handlers, and the files of all of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.record = directory / "record.log"
        self.appliance = Appliance(directory, self._settings())
        self.data = directory / "data" / "default"
        self.processes: list[subprocess.Popen[bytes] | None] = [None] * len(OWNED)

    def _settings(self) -> dict[str, Any]:
        python = {"run": f"{HERE}/torture_handler.py:Torture"}
        config = {"config": {"record": str(self.record)}}
        return {
            "history": {"max_executions": 1_000_000},
            "handlers": {
                "governed": {**python, **config, "concurrency": 3},
                "forked": {**python, **config, "concurrency": 2, "processes": True},
            },
        }

    def start(self) -> None:
        """Start the appliance, again and again until it runs: an orphan may hold its ports."""
        give_up_s = time.monotonic() + RECOVER_S
        while (started := self.appliance.cli("start")).returncode not in (0, ALREADY_RUNNING):
            if time.monotonic() > give_up_s:
                raise RuntimeError(f"it does not start: {started.stderr}")
            time.sleep(0.2)

    def spawn(self, place: int) -> None:
        owned, server = OWNED[place], f"tcp://127.0.0.1:{self.appliance.zmq_port}"
        own = str(HERE / "torture_handler.py")
        command = [sys.executable, own, server, owned.handler_id, str(self.record)]
        if not owned.is_plain:
            library = str(HERE.parent.parent / "handler.py")
            config = json.dumps({"record": str(self.record)})
            command = [sys.executable, library, f"{own}:Torture", "--server", server]
            command += ["--id", owned.handler_id, "--config", config, *owned.options]
        with (self.directory / "handlers.log").open("ab") as output:
            self.processes[place] = subprocess.Popen(
                command, cwd=self.directory, env=self.appliance.environ,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def pid_of(self, name: str) -> int | None:
        """The pid of the governor or of one of its children, as status.json says."""
        with contextlib.suppress(OSError, ValueError):
            status = json.loads((self.data / "status.json").read_text())
            if name == "governor":
                return int(status["pid"])
            return next((c["pid"] for c in status["children"] if c["name"] == name), None)
        return None

    def signal(self, pid: int | None, number: signal.Signals) -> bool:
        """Signal a process of this site, and no other that has got its pid."""
        if pid is None:
            return False
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            if Path(f"/proc/{pid}/cwd").readlink() != self.directory:
                return False
            signal.pidfd_send_signal(fd, number)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def close(self) -> None:
        for process in filter(None, self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.appliance.cli("stop")

    def wait_empty(self) -> list[int]:
        """The processes of this site that are still there some time after all was stopped."""
        give_up_s = time.monotonic() + ORPHAN_S
        while (left := self._pids()) and time.monotonic() < give_up_s:
            time.sleep(0.2)
        return left

    def _pids(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):  # it has ended, or is only waited for
                if entry.readlink() == self.directory:
                    found.append(int(entry.parent.name))
        return found


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[str | None]:
    """Mount a small file system on the directory; why not, if that cannot be done."""
    directory.mkdir(parents=True)
    options = f"size={DISK_MIB}m,mode=700"
    command = ["mount", "-t", "tmpfs", "-o", options, "torture", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        failure = mounted.stderr.strip() if mounted.returncode else None
    except OSError as error:
        failure = str(error)
    try:
        yield failure
    finally:
        if failure is None:
            subprocess.run(["umount", "-l", str(directory)], check=True)
