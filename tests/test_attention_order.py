"""The order in which attention's tiles are computed: sections of heads, in each the longest tiles first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import schedule
from pyckpt.ops import triton_backend
from pyckpt.triton_kernels.sizes import even_part

attention = triton_backend.kernels("attention")


@pytest.mark.parametrize("heads", [(32, 8), (28, 4), (16, 16), (14, 14), (8, 8)])
@pytest.mark.parametrize("length", [1024, 4096, 8192, 16384])
def test_the_last_section_keeps_a_gpu_busy(length, heads, monkeypatch):
    """A last section of what is left: 16 heads at 16K, by threes, take 1.044 of the time, 14 at 4K 1.30."""
    monkeypatch.setattr(attention.tuning, "l2_bytes", lambda device: schedule.L2_BYTES)
    batch = max(1, schedule.TOKENS // length)
    q, k = (torch.empty(batch, length, n, 128, dtype=torch.bfloat16, device="meta") for n in heads)
    problem = attention._Problem.of(q, k, k, attention.Options(window=(-1, 0), scale=1.0), False)
    section = problem.section(length, problem.groups)
    assert section % problem.groups == 0 and section <= problem.groups * schedule.fit(length)
    work = list(schedule.tiles(length, problem.rows, section))
    least = (sum(work) + schedule.START * len(work)) / schedule.MULTIPROCESSORS
    # One tile more for one program than for another is nobody's fault.
    assert schedule.by_hardware(work) <= 1.002 * least + 2


@pytest.mark.parametrize(("n", "most", "size"), [(16, 3, 2), (16, 4, 4), (17, 3, 3), (5, 8, 5), (1, 1, 1), (7, 6, 4)])
def test_even_parts(n, most, size):
    assert even_part(n, most) == size
