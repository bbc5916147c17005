"""The shape of schedulezero.py, kept true: order, ownership, no shared state, sizes."""

from __future__ import annotations

import ast
import re
import statistics
import symtable
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent.parent / "schedulezero.py"
SECTIONS = (
    "Constants",
    "Errors",
    "Values",
    "JSON",
    "Fields",
    "Configuration",
    "Logging",
    "Triggers",
    "Clock guard",
    "Store",
    "Recovery",
    "Keys",
    "Wire",
    "Gateway",
    "Dispatcher",
    "Events",
    "Metrics",
    "Access",
    "WebSocket",
    "HTTP",
    "API",
    "Server",
    "Governor",
    "systemd",
    "Doctor",
    "Command line",
)
OWNERS = {
    "sqlite3": {"Store", "Recovery"},
    "zmq": {"Wire", "Gateway"},
    "os.fork": {"Governor"},
    "os.kill": {"Governor"},
    "os.killpg": {"Governor"},
    "os.waitpid": {"Governor"},
    "datetime.now": {"Values"},
    "time.time": {"Values"},
    "time.time_ns": {"Values"},
    "time.monotonic": {"Values"},
    "print": {"Command line"},
    "argparse": {"Command line"},
}


@cache
def tree() -> ast.Module:
    return ast.parse(SOURCE.read_text())


@cache
def banners() -> tuple[tuple[int, str], ...]:
    found = re.finditer(r"^# --- (.+?) -+$", SOURCE.read_text(), re.MULTILINE)
    text = SOURCE.read_text()
    return tuple((text.count("\n", 0, match.start()) + 1, match[1]) for match in found)


def section_of(line: int) -> str:
    return next((name for start, name in reversed(banners()) if start <= line), "imports")


def definitions() -> Iterator[tuple[str, ast.stmt]]:
    """Each name that a statement of the module defines, with the statement."""
    for statement in tree().body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name, statement
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, statement
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    yield target.id, statement


def functions() -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree()):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_the_sections_stand_in_the_order_of_the_table_of_contents() -> None:
    assert tuple(name for _, name in banners()) == SECTIONS


def global_names(table: symtable.SymbolTable) -> Iterator[tuple[int, str]]:
    """Each global name that a scope reads, with the line where the scope begins."""
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module"):
            yield table.get_lineno(), symbol.get_name()
    for child in table.get_children():
        yield from global_names(child)


def test_a_section_names_only_what_stands_above_it_or_in_it() -> None:
    order = {name: place for place, name in enumerate(("imports", *SECTIONS))}
    home = {name: section_of(statement.lineno) for name, statement in definitions()}
    module = symtable.symtable(SOURCE.read_text(), str(SOURCE), "exec")
    wrong = [
        f"line {line}: {section_of(line)} names {name} of {home[name]}"
        for scope in module.get_children()
        for line, name in global_names(scope)
        if name in home and order[home[name]] > order[section_of(line)]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("resource", OWNERS)
def test_only_its_owner_touches(resource: str) -> None:
    users = {
        section_of(node.lineno)
        for node in ast.walk(tree())
        if isinstance(node, ast.Attribute | ast.Name)
        and (dotted(node) == resource or dotted(node).startswith(f"{resource}."))
    }
    assert users <= OWNERS[resource]


def is_read_only(statement: ast.stmt) -> bool:
    """Whether its annotation lets mypy refuse every change."""
    annotation = ast.unparse(getattr(statement, "annotation", None) or ast.Constant(0))
    return (
        annotation.startswith("Final[")
        and re.search(r"\b(Mapping|Schema)\b", annotation) is not None
    )


def test_the_module_has_no_mutable_state() -> None:
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    wrong = [
        f"line {statement.lineno}: {name}"
        for name, statement in definitions()
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        and isinstance(statement.value, mutable)
        and not is_read_only(statement)
    ]
    assert not wrong, "\n".join(wrong)
    assert not [node.lineno for node in ast.walk(tree()) if isinstance(node, ast.Global)]


def test_functions_stay_small() -> None:
    sizes = {f"{f.name}, line {f.lineno}": f.end_lineno - f.lineno + 1 for f in functions()}
    deciles = statistics.quantiles(sizes.values(), n=10)
    assert statistics.median(sizes.values()) <= 12
    assert deciles[8] <= 30
    assert not {name: size for name, size in sizes.items() if size > 60}


def test_every_broad_except_says_what_goes_on() -> None:
    lines = SOURCE.read_text().splitlines()
    broad = [
        node
        for node in ast.walk(tree())
        if isinstance(node, ast.ExceptHandler)
        and dotted(node.type or ast.Constant(0)) in ("Exception", "BaseException", "")
    ]
    silent = [
        f"line {node.lineno}: {lines[node.lineno - 1].strip()}"
        for node in broad
        if all(isinstance(statement, ast.Pass) for statement in node.body)
    ]
    assert not silent, "\n".join(silent)
