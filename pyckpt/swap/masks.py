"""From a batch's mask and positions to packed sequences.

Padding and packing both cut each row into runs of tokens that see nothing of each other. The whole batch, flat, is then
a packed one, and nothing is moved: padding is a sequence of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.swap.modules import UnsupportedError


def packed(mask: Tensor | None, positions: Tensor | None, batch: int, seq: int) -> Tensor | None:
    """cu_seqlens (N + 1,) int32 of the flat batch; None where every row is one sequence.

    mask: (B, S), nonzero at tokens, zero at padding before or after them. positions: (B, S) or (1, S) int; without a
    mask a sequence starts wherever they do not rise by one, as transformers has it. Raises `UnsupportedError` for
    another mask.
    """
    if mask is not None:
        if tuple(mask.shape) != (batch, seq):
            raise UnsupportedError(f"an attention_mask of shape {tuple(mask.shape)}, not ({batch}, {seq})")
        return _of_padding(mask.bool())
    if positions is None:
        return None
    rows = positions.expand(batch, seq)
    return _cut(rows[:, 1:] - rows[:, :-1] != 1)


def _of_padding(mask: Tensor) -> Tensor | None:
    if bool(mask.all()):
        return None
    before, after = mask[:, :-1], mask[:, 1:]
    runs = mask[:, 0].long() + (after & ~before).sum(1)
    if bool((runs > 1).any()):
        raise UnsupportedError("an attention_mask with padding between tokens")
    return _cut(before != after)


def _cut(ends: Tensor) -> Tensor | None:
    """cu_seqlens from where in a row, (B, S - 1), the next token starts another sequence."""
    if not bool(ends.any()):
        return None
    starts = torch.cat([torch.ones_like(ends[:, :1]), ends], dim=1)
    found = starts.flatten().nonzero().flatten()
    return torch.cat([found, found.new_tensor([starts.numel()])]).to(torch.int32)
