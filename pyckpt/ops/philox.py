"""Dropout's random bits: Philox4x32-10 (Salmon et al. 2011), in integer arithmetic of PyTorch.

Bit for bit what the Triton kernels draw: the key is the seed, the counter (key position // 4, query position,
head, sequence), the word the key position modulo 4. No generator's state is read or written, so recomputation
and every way of tiling see the same choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
ROUNDS = 10


def philox(seed: int, counter: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Four random words of 32 bits for each counter: int64 tensors that broadcast together, or four ints."""
    c0, c1, c2, c3 = (c & _LOW for c in counter)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        # int64 products wrap, which leaves all 64 bits right: the shift's sign bits are cut off.
        low0, low1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((low1 >> 32) & _LOW) ^ c1 ^ key0, ((low0 >> 32) & _LOW) ^ c3 ^ key1
        c1, c3 = low1 & _LOW, low0 & _LOW
        key0, key1 = (key0 + _WEYL[0]) & _LOW, (key1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def kept(rate: float, seed: int, sequences: Tensor, heads: int, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """Boolean (B, heads, rows, keys), True where dropout at `rate` keeps a probability.

    `sequences` (B,) are their numbers in the batch; rows and keys are ranges of positions.
    """
    device = sequences.device
    quads = torch.arange(keys[0] // 4, (keys[1] + 3) // 4, device=device)
    counter = (
        quads,
        torch.arange(*rows, device=device).view(-1, 1),
        torch.arange(heads, device=device).view(-1, 1, 1),
        sequences.view(-1, 1, 1, 1),
    )
    words = torch.stack(torch.broadcast_tensors(*philox(seed, counter)), dim=-1).flatten(-2)
    first = keys[0] % 4
    return (words[..., first : first + keys[1] - keys[0]] >> 1) >= threshold(rate)


def kept_rows(rate: float, seed: int, rows: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Boolean (rows, width), True where dropout at `rate` keeps a value.

    The counter is (column // 4, row), the word the column modulo 4. A row's number may take 64 bits.
    """
    row = torch.arange(*rows, device=device).view(-1, 1)
    quads = torch.arange(-(-width // 4), device=device)
    words = torch.stack(torch.broadcast_tensors(*philox(seed, (quads, row, row >> 32, row * 0))), dim=-1)
    return (words.flatten(-2)[:, :width] >> 1) >= threshold(rate)


def derive(seed: int, site: int) -> int:
    """A seed of its own for each place of a block that drops: the first two words of counter `site`, 63 bits."""
    w0, w1, _, _ = philox(seed, (site, 0, 0, _LOW))
    return w0 | (w1 >> 1) << 32


def threshold(rate: float) -> int:
    """What the upper 31 bits of a word must reach for the probability to be kept."""
    return min(round(rate * 2**31), 2**31 - 1)
