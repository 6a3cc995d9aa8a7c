"""From a batch's mask and positions to packed sequences.

Padding and packing both cut each row into runs of tokens that see nothing of each other. The whole batch, flat, is then
a packed one, and nothing is moved: padding is a sequence of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.swap.modules import UnsupportedCallError, UnsupportedError


def packed(mask: Tensor | None, positions: Tensor | None, batch: int, seq: int) -> Tensor | None:
    """cu_seqlens (N + 1,) int32 of the flat batch; None where every row is one sequence.

    mask: (B, S), nonzero at tokens, zero at padding before or after them. positions: (B, S) or (1, S) int; without a
    mask a sequence starts wherever they do not rise by one, as transformers has it. Raises `UnsupportedError` for
    another mask.

    Traced by torch.compile, what depends on values is an op that says nothing of them: it gives cu_seqlens where every
    row is one sequence too, and raises where it runs.
    """
    if mask is not None and tuple(mask.shape) != (batch, seq):
        raise UnsupportedCallError(f"an attention_mask of shape {tuple(mask.shape)}, not ({batch}, {seq})")
    if mask is None and positions is None:
        return None
    if torch.compiler.is_compiling():
        return packed_lengths(mask, positions, batch, seq)
    ends = _ends(mask, positions, batch, seq)
    return _cut(ends) if bool(ends.any()) else None


@torch.library.custom_op("pyckpt::packed_lengths", mutates_args=())
def packed_lengths(mask: Tensor | None, positions: Tensor | None, batch: int, seq: int) -> Tensor:
    """`packed` of a graph: cu_seqlens, of as many sequences as there are."""
    try:
        return _cut(_ends(mask, positions, batch, seq))
    except UnsupportedError as reason:
        raise RuntimeError(
            f"{reason} came to a compiled model, whose layers know padding before and after a row's tokens alone; call "
            "pyckpt.unswap(model), or the model without torch.compile"
        ) from reason


@packed_lengths.register_fake
def _packed_lengths_fake(mask: Tensor | None, positions: Tensor | None, batch: int, seq: int) -> Tensor:
    like = mask if mask is not None else positions
    assert like is not None
    return like.new_empty(torch.library.get_ctx().new_dynamic_size(min=2), dtype=torch.int32)


def _ends(mask: Tensor | None, positions: Tensor | None, batch: int, seq: int) -> Tensor:
    """Where in a row, (B, S - 1) bool, the next token starts another sequence."""
    if mask is None:
        assert positions is not None
        rows = positions.expand(batch, seq)
        return rows[:, 1:] - rows[:, :-1] != 1
    mask = mask.bool()
    before, after = mask[:, :-1], mask[:, 1:]
    runs = mask[:, 0].long() + (after & ~before).sum(1)
    if bool((runs > 1).any()):
        raise UnsupportedCallError("an attention_mask with padding between tokens")
    return before != after


def _cut(ends: Tensor) -> Tensor:
    """cu_seqlens from where in a row the next token starts another sequence."""
    starts = torch.cat([torch.ones_like(ends[:, :1]), ends], dim=1)
    found = starts.flatten().nonzero().flatten()
    return torch.cat([found, found.new_tensor([starts.numel()])]).to(torch.int32)
