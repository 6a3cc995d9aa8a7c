"""Putting pyckpt into models that people already have: `swap` replaces what their layers and loss compute with."""

from pyckpt.swap.api import swap, unswap
from pyckpt.swap.report import Entry, Report

__all__ = ["Entry", "Report", "swap", "unswap"]
