"""How many tokens the tokenwise parts of a block take at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Measured on a CPU (bench/NOTES.md): matrix products are at full speed from about this many rows on.
_CPU_TILE = 1024
_CUDA_TILE_BYTES = 1 << 30


def choose_tile(tokens: int, widest: int, dtype: torch.dtype, device: torch.device) -> int:
    """A tile size for `tile=None`: `widest` values a token live at once inside a tile.

    One tile where there are fewer than two tiles' worth of tokens: splitting those costs time and saves little.
    """
    if device.type == "cpu":
        tile = _CPU_TILE
    else:
        tile = max(1024, _CUDA_TILE_BYTES // max(1, widest * dtype.itemsize) // 256 * 256)
    return tokens if tokens < 2 * tile else tile


def tiles(tokens: int, tile: int) -> Iterator[slice]:
    for start in range(0, tokens, tile):
        yield slice(start, min(start + tile, tokens))


def count(tokens: int, tile: int) -> int:
    return -(-tokens // tile)
