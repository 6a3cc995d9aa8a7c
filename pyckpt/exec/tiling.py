"""How many tokens the tokenwise parts of a block take at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Measured on a CPU (bench/NOTES.md): larger tiles are no faster, half of it loses a few percent.
_CPU_TILE = 2048
_CUDA_TILE_BYTES = 1 << 30


def choose_tile(tokens: int, widest: int, dtype: torch.dtype, device: torch.device) -> int:
    """A tile size for `tile=None`: `widest` values a token live at once inside a tile.

    The fewest tiles that are no larger than the device's best, of equal size: a short last tile would run its
    products below speed. One tile where all tokens fit in it.
    """
    if device.type == "cpu":
        tile = _CPU_TILE
    else:
        tile = max(1024, _CUDA_TILE_BYTES // max(1, widest * dtype.itemsize) // 256 * 256)
    return -(-tokens // count(tokens, tile))


def tiles(tokens: int, tile: int) -> Iterator[slice]:
    for start in range(0, tokens, tile):
        yield slice(start, min(start + tile, tokens))


def count(tokens: int, tile: int) -> int:
    return -(-tokens // tile)
