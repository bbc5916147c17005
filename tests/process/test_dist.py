"""schedulezero.pyz: what `make dist` makes, run by a Python that has nothing but pyzmq."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from appliance import ROOT, Appliance

DEBIAN_PYTHON = "/usr/bin/python3"
MINE = """\
from handler import Handler

class Mine(Handler):
    def double(self, number: int):
        "Twice `number`."
        return 2 * number
"""


def build(tree: Path) -> Path:
    """Run `make dist` on a clean copy, with the Python that runs the tests."""
    tree.mkdir()
    for name in ("schedulezero.py", "handler.py", "config.yaml", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, tree)
    for name in ("static", ".ci"):
        shutil.copytree(ROOT / name, tree / name)
    (tree / ".venv").mkdir()
    (tree / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (tree / ".venv" / "run").touch()
    done = subprocess.run(["make", "dist"], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tree / "dist" / "schedulezero.pyz"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dist") / "tree")


def has_pyzmq(python: str) -> bool:
    if not os.path.exists(python):
        return False
    check = "import sys, zmq; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
    return subprocess.run([python, "-c", check], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module", params=["bare", "debian"])
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with pyzmq alone: this one's version, and Debian's own."""
    if request.param == "debian":
        if not has_pyzmq(DEBIAN_PYTHON):
            pytest.skip(f"{DEBIAN_PYTHON} is not 3.11 to 3.13 with python3-zmq")
        return DEBIAN_PYTHON
    place = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    (packages,) = place.glob("lib/python3.*/site-packages")
    files = {file.parts[0] for file in metadata.files("pyzmq") or ()} - {".."}
    for name in files:
        source = Path(str(metadata.distribution("pyzmq").locate_file(name)))
        shutil.copytree(source, packages / name)
    return str(place / "bin" / "python")


class Packed(Appliance):
    """An appliance that is the archive and a configuration, in a directory of its own."""

    def install(self, python: str, archive: Path) -> Packed:
        self.home = self.directory / "home"
        self.home.mkdir()
        shutil.copy(archive, self.directory)
        self.program = [python, "schedulezero.pyz"]
        return self

    @property
    def environ(self) -> dict[str, str]:
        return {"HOME": str(self.home), "TMPDIR": str(self.directory), "PATH": "/usr/bin:/bin"}

    @property
    def cache(self) -> Path:
        return self.home / ".cache" / "schedulezero"


@pytest.fixture
def packed(tmp_path: Path, python: str, archive: Path) -> Packed:
    return Packed(tmp_path / "site").install(python, archive)


@pytest.fixture
def bare(tmp_path: Path, archive: Path) -> Packed:
    """Run by the Python of the tests: enough where only the unpacking matters."""
    return Packed(tmp_path / "site").install(sys.executable, archive)


def test_one_file_schedules_and_runs_what_a_user_wrote_beside_it(packed: Packed) -> None:
    (packed.directory / "mine.py").write_text(MINE)
    packed.write_config(
        handlers={"mine": {"run": "mine.py:Mine"}, "ready": {"run": "handler.py:Example"}}
    )
    assert packed.cli("--version").stdout.startswith("ScheduleZero ")
    assert packed.cli("check").returncode == 0
    started = packed.cli("start")
    assert started.returncode == 0, started.stderr
    try:
        packed.wait_connected("mine")
        packed.wait_connected("ready")
        call = {"handler_id": "mine", "method_name": "double", "job_params": {"number": 21}}
        assert packed.post("/api/run_now", call).json()["result"] == 42
        trigger = {"type": "date", "run_date": "2090-01-01T00:00:00Z"}
        assert packed.post("/api/schedule", {**call, "trigger_config": trigger}).status == 201
        assert b"<!doctype html>" in packed.get("/").body
        assert packed.get("/main.js").status == 200
        assert packed.get("/grafana.json").json()["title"] == "ScheduleZero"
        assert packed.cli("reload").returncode == 0
        assert packed.cli("status").returncode == 0
        assert "FAILED" not in packed.cli("doctor").stdout
    finally:
        stopped = packed.cli("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert packed.cli("status").returncode == 3


def test_a_second_start_loads_cached_bytecode(packed: Packed) -> None:
    packed.cli("--version")
    (program,) = packed.cache.iterdir()
    before = {path: path.stat().st_mtime_ns for path in program.rglob("*")}
    assert any(path.name.startswith("schedulezero.cpython-") for path in before)
    packed.cli("--version")
    assert {path: path.stat().st_mtime_ns for path in program.rglob("*")} == before


def test_the_unit_starts_the_archive(bare: Packed) -> None:
    unit = bare.cli("systemd").stdout
    archive = bare.directory / "schedulezero.pyz"
    assert f"ExecStart={sys.executable} {archive} --deployment default" in unit
    assert f"WorkingDirectory={bare.directory}\n" in unit
    assert "CacheDirectory=schedulezero\n" in unit
    shown = f"'{bare.directory}/data' '{bare.directory}/logs'"
    assert f"#   mkdir -p {shown} && chown -R schedulezero: {shown}\n" in unit


def test_two_builds_are_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "again").read_bytes() == archive.read_bytes()


def test_every_bundled_package_brings_its_licence_and_nothing_compiled(archive: Path) -> None:
    names = zipfile.ZipFile(archive).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert len(packages) >= 7
    for package in packages:
        assert [n for n in names if n.startswith(f"{package}/") and "licen" in n.lower()], package
    assert not [name for name in names if name.endswith((".so", ".pyc")) or "zmq" in name.lower()]


def test_a_python_without_pyzmq_says_what_to_install(bare: Packed) -> None:
    bare.program = [sys.executable, "-S", "schedulezero.pyz"]
    done = bare.cli("--version")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "schedulezero: it needs pyzmq: apt install python3-zmq, or pip install pyzmq\n"
    )


# Where it is unpacked


def test_without_a_home_it_is_unpacked_to_a_temporary_directory_and_says_so(bare: Packed) -> None:
    bare.home.rmdir()
    bare.home.write_text("not a directory")
    first, second = bare.cli("--version"), bare.cli("--version")
    place = bare.directory / f"schedulezero-{os.geteuid()}"
    assert first.stderr == (
        f"schedulezero: {bare.home}/.cache: Not a directory; unpacked to {place} instead\n"
    )
    assert (second.stdout, second.stderr) == (first.stdout, "")
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_under_systemd_it_is_unpacked_to_the_cache_directory_of_the_unit(bare: Packed) -> None:
    cache = bare.directory / "var-cache"
    environ = {**bare.environ, "CACHE_DIRECTORY": str(cache)}
    command = [*bare.program, "--version"]
    done = subprocess.run(
        command, cwd=bare.directory, env=environ, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert [path.name for path in cache.iterdir()] == ["schedulezero"]
    assert not bare.cache.exists()


@pytest.mark.parametrize("fault", ["open to others", "a link"])
def test_a_directory_that_others_could_fill_is_refused(bare: Packed, fault: str) -> None:
    if fault == "a link":
        bare.cache.parent.mkdir()
        bare.cache.symlink_to(bare.directory)
    else:
        bare.cache.mkdir(parents=True)
        bare.cache.chmod(0o777)
    done = bare.cli("--version")
    assert "others can write to it" in done.stderr
    assert done.stdout.startswith("ScheduleZero")
    assert not [path for path in bare.cache.iterdir() if path.name.endswith("dist-info")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to someone else")
def test_a_directory_of_someone_else_is_refused(bare: Packed) -> None:
    bare.cache.mkdir(parents=True, mode=0o700)
    os.chown(bare.cache, 65_534, 65_534)
    assert "others can write to it" in bare.cli("--version").stderr
    assert not list(bare.cache.iterdir())


def test_where_nothing_can_be_written_one_sentence_says_what_helps(bare: Packed) -> None:
    bare.home.rmdir()
    for path in (bare.home, bare.directory / f"schedulezero-{os.geteuid()}"):
        path.write_text("not a directory")
    done = bare.cli("--version")
    assert done.returncode == 1
    assert done.stderr.startswith("schedulezero: nowhere to unpack to: ")
    assert done.stderr.endswith("Set XDG_CACHE_HOME to a directory that you can write to.\n")


def grown(archive: Path) -> None:
    """Make the archive another version of itself."""
    with zipfile.ZipFile(archive, "a") as content:
        content.comment += b"grown "


def test_other_versions_are_removed_but_not_under_a_server_that_runs_them(bare: Packed) -> None:
    archive = bare.directory / "schedulezero.pyz"
    bare.run("run")
    (running,) = bare.cache.iterdir()
    (bare.cache / f"{running.name}.left").mkdir()
    (bare.cache / "mine").mkdir()
    grown(archive)
    bare.cli("--version")
    names = {path.name for path in bare.cache.iterdir()}
    assert {running.name, "mine"} < names
    assert len(names) == 3
    assert bare.get("/api/health").status == 200
    bare.stop()
    grown(archive)
    bare.cli("--version")
    assert len({path.name for path in bare.cache.iterdir()} - {"mine"}) == 1
    assert not running.exists()


def test_many_first_starts_at_once_unpack_one_whole_program(bare: Packed) -> None:
    command = [*bare.program, "--version"]
    starts = [
        subprocess.Popen(
            command, cwd=bare.directory, env=bare.environ, stderr=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    assert [start.communicate(timeout=60)[1] for start in starts] == [""] * 6
    assert len(list(bare.cache.iterdir())) == 1


def test_the_file_alone_serves_the_api_and_says_where_the_dashboard_belongs(
    appliance: Callable[..., Appliance],
) -> None:
    site = appliance()
    shutil.copy(ROOT / "schedulezero.py", site.directory)
    site.program = [sys.executable, str(site.directory / "schedulezero.py")]
    site.run()
    page = site.get("/")
    assert page.status == 200
    assert b"put the directory <code>static</code> next to" in page.body
    assert site.get("/api/health").status == 200
