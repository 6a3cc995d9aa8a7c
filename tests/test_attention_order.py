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


@pytest.mark.parametrize("kernel", ["forward", "dkdv"])
@pytest.mark.parametrize("heads", [(32, 8), (28, 4), (16, 16), (14, 14), (64, 8)])
@pytest.mark.parametrize("length", [1024, 4096, 8192, 16384])
def test_the_last_section_keeps_a_gpu_busy(length, heads, kernel, monkeypatch):
    """Of 16 heads at 16K the forward, three to a section, takes 1.044 of the time; 8 of dK/dV at 8K one by one 1.24."""
    monkeypatch.setattr(attention.tuning, "l2_bytes", lambda device: schedule.L2_BYTES)
    monkeypatch.setattr(attention.tuning, "multiprocessors", lambda device: schedule.MULTIPROCESSORS)
    batch, how = max(1, schedule.TOKENS // length), schedule.KERNELS[kernel]
    q, k = (torch.empty(batch, length, n, 128, dtype=torch.bfloat16, device="meta") for n in heads)
    problem = attention._Problem.of(q, k, k, attention.Options(window=(-1, 0), scale=1.0), False)
    tokens, share = (length, problem.groups) if kernel == "forward" else (length * problem.groups, 1)
    section = problem.section(tokens, share, length // how.block)
    assert section % share == 0
    work = list(schedule.tiles(length, how.block, problem.rows // problem.groups * share, section))
    # One tile more for one program than for another is nobody's fault.
    assert schedule.by_hardware(work, how.programs) <= 1.01 * schedule.least(work, how.programs) + 2


@pytest.mark.parametrize("length", [16384, 65536])
def test_a_section_fits_the_l2_cache(length, monkeypatch):
    monkeypatch.setattr(attention.tuning, "l2_bytes", lambda device: schedule.L2_BYTES)
    monkeypatch.setattr(attention.tuning, "multiprocessors", lambda device: schedule.MULTIPROCESSORS)
    q = torch.empty(8, length, 32, 64, dtype=torch.bfloat16, device="meta")
    problem = attention._Problem.of(q, q, q, attention.Options(window=(-1, 0), scale=1.0), False)
    section = problem.section(length, 1, length // 128)
    assert section * length * problem.row_bytes <= schedule.L2_BYTES // 2


@pytest.mark.parametrize(("n", "most", "size"), [(16, 3, 2), (16, 4, 4), (17, 3, 3), (5, 8, 5), (1, 1, 1), (7, 6, 4)])
def test_even_parts(n, most, size):
    assert even_part(n, most) == size
