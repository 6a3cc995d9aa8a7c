"""Small helpers that the PyTorch implementations of the ops share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows of this many elements stay in a core's L2 cache between the few passes that a pointwise op makes.
_CPU_CHUNK_ELEMENTS = 1 << 17


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute and accumulate in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_chunks(t: Tensor) -> Iterator[slice]:
    """Slices over the first dim of t, each small enough for the cache on a CPU; a single slice elsewhere."""
    rows = t.shape[0]
    step = rows
    if t.device.type == "cpu":
        step = max(1, _CPU_CHUNK_ELEMENTS // max(1, t.numel() // max(1, rows)))
    for start in range(0, rows, max(1, step)):
        yield slice(start, min(start + step, rows))
