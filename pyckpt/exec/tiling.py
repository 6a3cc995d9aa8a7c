"""How many tokens the tokenwise parts of a block take at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Measured on a CPU (bench/NOTES.md): larger tiles are no faster, half of it loses a few percent.
_CPU_TILE = 2048
TILE_BYTES = 1 << 30
# Where even a tile of this many tokens takes more than the budget, the budget is not kept: below it a matrix unit
# works on padding.
_MIN_TILE = 64


def choose_tile(tokens: int, token_bytes: int, device: torch.device, tile_bytes: int = TILE_BYTES) -> int:
    """A tile size for `tile=None`: a token takes `token_bytes` inside a tile, which takes at most `tile_bytes`.

    The fewest tiles that are no larger than that, and on a CPU than what runs best there, of equal size: a short last
    tile would run its products below speed. One tile where all tokens fit in it. More tokens fill a GPU better, so
    there only the budget limits them; 1 GiB holds 9,000 tokens of Llama-8B, whose narrowest product (1,024 columns)
    is then 500 blocks of 128 x 128 for 132 multiprocessors.
    """
    most = tile_bytes // max(1, token_bytes)
    tile = max(_MIN_TILE, min(most, _CPU_TILE) if device.type == "cpu" else most)
    return -(-tokens // max(1, count(tokens, tile)))


def tiles(tokens: int, tile: int) -> Iterator[slice]:
    for start in range(0, tokens, tile):
        yield slice(start, min(start + tile, tokens))


def count(tokens: int, tile: int) -> int:
    return -(-tokens // tile)
