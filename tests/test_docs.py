"""The how-to page: its snippets are Python that names what there is, and so are the tests that it leans on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import pyckpt

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "how-to.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_name_what_there_is(snippet):
    tree = ast.parse(snippet)
    names = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pyckpt"]
    assert names
    assert all(hasattr(pyckpt, name) for name in names)


def test_the_tests_that_are_named_are_there():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", PAGE)
    assert len(named) >= 10
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE), name


@pytest.mark.parametrize("page", ["how-to.md", "swap.md", "troubleshooting.md"])
def test_links_lead_somewhere(page):
    folder = ROOT / "docs"
    for link in re.findall(r"\]\(([^)#]+)\)", (folder / page).read_text(encoding="utf-8")):
        assert link.startswith("http") or (folder / link).exists(), link
