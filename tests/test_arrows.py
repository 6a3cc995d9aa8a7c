"""Arrows between the packages of pyckpt go one way: what is imported, at any place, makes no circle."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "pyckpt"
# A convenience of users: `CkptCausalLM.save_pretrained` and `from_pretrained` call what is built on the model.
ALLOWED = {("model", "hf")}


def name_of(parts: list[str]) -> str:
    """The package, or the module beside the packages, that a module of pyckpt belongs to."""
    return parts[0] if parts else "pyckpt"


def imported(tree: ast.AST) -> list[list[str]]:
    """The modules of pyckpt that are imported, but for types alone."""
    found: list[list[str]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyckpt":
            base = (node.module or "").split(".")[1:]
            for alias in node.names:
                inner = PACKAGE.joinpath(*base, alias.name)
                found.append([*base, alias.name] if inner.is_dir() or inner.with_suffix(".py").exists() else base)
        elif isinstance(node, ast.Import):
            found += [a.name.split(".")[1:] for a in node.names if a.name.split(".")[0] == "pyckpt"]
        found += imported(node)
    return found


def arrows() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = [p for p in path.relative_to(PACKAGE).with_suffix("").parts if p != "__init__"]
        here = name_of(parts)
        others = {name_of(to) for to in imported(ast.parse(path.read_text(encoding="utf-8")))}
        found.setdefault(here, set()).update(o for o in others if o != here and (here, o) not in ALLOWED)
    return found


def circle(to: dict[str, set[str]]) -> list[str]:
    """Names each of which imports the next, the last one the first; none where there is no circle."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return []
        for other in sorted(to.get(name, ())):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(to) if (found := walk(name, []))), [])


def test_arrows_go_one_way():
    to = arrows()
    assert {"attend", "exec", "ops", "swap"} <= to.keys()  # something was read
    assert not circle(to), " -> ".join(circle(to))
    assert to["ops"] <= {"compiling", "errors", "spec"}


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
