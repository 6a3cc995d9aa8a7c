"""One model trained plainly, with torch.utils.checkpoint, and with each save set: ``pyckpt compare``."""

from __future__ import annotations

from pyckpt.compare.plot import plot
from pyckpt.compare.results import Results, Row
from pyckpt.compare.runner import DEFAULT_LENGTHS, run
from pyckpt.compare.variants import VARIANTS
from pyckpt.compare.words import caption, sentences, show, table

__all__ = [
    "DEFAULT_LENGTHS",
    "VARIANTS",
    "Results",
    "Row",
    "caption",
    "plot",
    "run",
    "sentences",
    "show",
    "table",
]
