"""The tables of README.md and ARCHITECTURE.md are what bench/results says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import report  # noqa: E402


@pytest.mark.parametrize("page", report.PAGES)
def test_measured_tables_are_not_typed_by_hand(page):
    text = (ROOT / page).read_text()
    assert "<!-- begin: " in text
    assert report.filled(text) == text, "run python bench/report.py"


def test_a_stale_table_is_noticed():
    stale = "<!-- begin: save-sets -->\n| 1 |\n<!-- end: save-sets -->"
    assert "attention" in report.filled(stale)


def test_no_cuda_kernel_of_any_architecture_spills():
    """By the last `bench/cuda_static.py`; the tests themselves compile for one architecture."""
    build = report.common.read("cuda_static")["build"]
    assert build["spilled"] == 0 and build["kernels"] > 0
