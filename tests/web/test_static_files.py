"""What the dashboard's files promise by what they are."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

STATIC = Path(__file__).parents[2] / "static"
FILES = sorted(STATIC.iterdir())
PAGE = [path for path in FILES if path.name != "grafana.json"]  # which the page never loads
MODULES = [path for path in FILES if path.suffix == ".js"]
MAX_BYTES = 155_000
MAX_SENT_BYTES = 60_000  # as the server sends them, each compressed


def test_the_whole_page_stays_small() -> None:
    bodies = [path.read_bytes() for path in PAGE]
    assert sum(map(len, bodies)) <= MAX_BYTES
    assert sum(len(gzip.compress(body, 9)) for body in bodies) <= MAX_SENT_BYTES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_lines_are_read_without_scrolling(path: Path) -> None:
    if path.suffix in (".js", ".css"):
        assert [line for line in path.read_text().splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_loaded_from_elsewhere(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"(?:https?:)?//[\w.-]+\.\w{2,}", text) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_data_cannot_become_markup_or_code(path: Path) -> None:
    risky = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|javascript:"
    )
    assert re.findall(risky, path.read_text()) == []


def test_the_page_has_no_inline_script_or_style() -> None:
    page = (STATIC / "index.html").read_text()
    assert re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page) == []


def test_every_module_is_loaded_ahead() -> None:
    page, start = ((STATIC / name).read_text() for name in ("index.html", "start.js"))
    loaded = set(re.findall(r'(?:href|src)="(\w+)\.js"', page))
    listed = set(start.partition("`\n")[2].partition("`;")[0].split())
    assert loaded | listed == {path.stem for path in MODULES}
    assert loaded == {"main", "start"}


def test_modules_import_in_one_direction() -> None:
    imports = {
        path.name: set(re.findall(r'from "\./(\w+\.js)"', path.read_text())) for path in MODULES
    }
    while imports:
        leaves = {name for name, needed in imports.items() if not needed & imports.keys()}
        assert leaves, f"these import each other: {sorted(imports)}"
        imports = {name: needed for name, needed in imports.items() if name not in leaves}
