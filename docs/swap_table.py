"""Write the table of docs/swap.md: what `pyckpt.swap` reports for the models of its tests.

python docs/swap_table.py
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "swap.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import swap_models  # noqa: E402

import pyckpt  # noqa: E402


def table() -> str:
    """A row for each family: its layer's class, the layers' path, the loss's, what of it is streamed, and the options
    that the test sets."""
    lines = ["| family | layer | path | loss | streamed | options in the test |", "|---|---|---|---|---|---|"]
    s = swap_models
    models = s.FAMILIES | s.MIXTURES | s.OTHERS | s.WHOLE | s.HYBRIDS
    for family, options in sorted(models.items()):
        model = swap_models.make_model(family)
        *layers, loss = pyckpt.swap(model).entries
        pyckpt.unswap(model)
        paths = ", ".join(dict.fromkeys(e.path for e in layers))
        way = "no logits" if loss.path == "standard" else "the model's own"
        lines.append(f"| {family} | `{layers[0].kind}` | {paths} | {way} | {_streamed(model)} | {_shown(options)} |")
    return "\n".join(lines)


def _streamed(model: Any) -> str:
    try:
        *layers, loss = pyckpt.swap(model, stream=pyckpt.Stream()).entries
    except ValueError:
        return "no"
    if "; streamed from the token ids on" in loss.why:
        return "all"
    return "its layers" if all("; streamed by" in e.why for e in layers) else "some layers"


def _shown(options: dict[str, Any]) -> str:
    values = (f"`{n}={v['rope_type'] if isinstance(v, dict) else v}`" for n, v in options.items())
    return ", ".join(values)


def filled(text: str) -> str:
    """The page with the table in its place."""
    marks = re.compile(r"(<!-- begin: families -->\n).*?(<!-- end: families -->)", re.DOTALL)
    return marks.sub(lambda m: f"{m[1]}{table()}\n{m[2]}", text)


if __name__ == "__main__":
    aside = PAGE.with_suffix(".tmp")
    aside.write_text(filled(PAGE.read_text()))
    os.replace(aside, PAGE)
