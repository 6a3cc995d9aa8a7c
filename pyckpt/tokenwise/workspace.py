"""Buffers that the tiles of one pass share.

A tile's intermediates are the same size for every tile. Reusing them keeps the working set at one tile, and on a CPU
saves the page faults that fresh large blocks cost (the C library returns them to the system at every free).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Named scratch tensors, grown on demand, of one device; lives as long as one forward or backward of a block."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor of this shape; the next call with this name hands out the same memory."""
        numel = 1
        for size in shape:
            numel *= size
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            self._buffers.pop((name, dtype), None)
            buffer = self._buffers[name, dtype] = torch.empty(numel, dtype=dtype, device=self._device)
        return buffer[:numel].view(shape)

    def clear(self) -> None:
        """Let go of all of them."""
        self._buffers.clear()
