"""From a batch's mask and positions to packed sequences.

Padding and packing both cut each row into runs of tokens. The whole batch, flat, is then a packed one, and nothing is
moved. Nobody sees padding. What padding itself sees is what attention gives it under the model's own mask, whose
outputs somebody may read: labels may be the padded input_ids.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyckpt.swap.modules import UnsupportedCallError, UnsupportedError


@dataclasses.dataclass(frozen=True)
class Sight:
    """What padding sees of its row's tokens: those "before" it, "all" or "none".

    A query that sees nothing gets zeros, as from a block; or, with `reach`, something that no block gives. `reach` is
    how far back the queries of every layer see. read: (B, S) bool, the tokens whose outputs are read; None: all may be.
    """

    tokens: Literal["before", "all", "none"]
    reach: int | None = None
    read: Tensor | None = None


def packed(mask: Tensor | None, positions: Tensor | None, batch: int, seq: int, sight: Sight) -> Tensor | None:
    """cu_seqlens of the flat batch; None where every row is one sequence.

    mask: (B, S), nonzero at tokens, zero at padding before or after them; gives (2, 5 * B + 1) int32, of queries and
    of keys (`Layout`). positions: (B, S) or (1, S) int; without a mask a sequence starts wherever they do not rise by
    one, as transformers has it; gives (N + 1,) int32. So it does beside a mask of ones with flash attention (`sight`
    "none"), which that does not come to. Raises `UnsupportedError` for another mask.

    Traced by torch.compile, what depends on values is an op that says nothing of them: it gives cu_seqlens where every
    row is one sequence too, and raises where it runs.
    """
    if mask is not None and tuple(mask.shape) != (batch, seq):
        raise UnsupportedCallError(f"an attention_mask of shape {tuple(mask.shape)}, not ({batch}, {seq})")
    if mask is not None and torch.compiler.is_compiling():
        return padded_lengths(mask, sight.tokens, sight.reach, sight.read)
    if mask is not None and mask.numel() > 0:
        rows = _rows(mask.bool(), sight)
        if not rows.whole:
            return _padded(rows, seq)
    if positions is None or (mask is not None and sight.tokens != "none"):
        return None
    if torch.compiler.is_compiling():
        return packed_lengths(positions, batch, seq)
    lengths = _cut(_ends(positions, batch, seq))
    return lengths if len(lengths) > batch + 1 else None


# --- padding ------------------------------------------------------------------------------------------------


def tokens_of(masks: list[tuple[Any, int]], batch: int, seq: int) -> Tensor | None:
    """(B, S) bool, of tokens and padding, as masks (B, 1, S, S) have them; None where all are tokens.

    Each is causal, of so many earlier keys, -1 for all; of one that is None all are tokens. Raises
    `UnsupportedCallError` where one says anything else.
    """
    found = [_allowed(mask, batch, seq) for mask, _ in masks]
    diagonals = [t.diagonal(dim1=-2, dim2=-1)[:, 0] for t in found if t is not None]
    if not diagonals:
        return None
    tokens = diagonals[0]
    said = [torch.equal(tokens, other) for other in diagonals[1:]]
    said += [bool(_is_causal(t, tokens, window)) for t, (_, window) in zip(found, masks, strict=True) if t is not None]
    if not all(said):
        raise UnsupportedCallError("an attention_mask (B, 1, S, S) that is not the causal one")
    if bool(tokens.all()):
        return None
    if len(diagonals) < len(found):
        raise UnsupportedCallError("attention_masks of which not all have padding")
    return tokens.expand(batch, seq)


def _allowed(mask: Any, batch: int, seq: int) -> Tensor | None:
    """(B or 1, 1, S, S) bool: which key each query sees."""
    if mask is None:
        return None
    if not (isinstance(mask, Tensor) and mask.dim() == 4) or torch.compiler.is_compiling():
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedCallError(f"an attention_mask that is not (B, S): {shape}")
    if mask.shape[0] not in (1, batch) or tuple(mask.shape[1:]) != (1, seq, seq):
        raise UnsupportedCallError(f"an attention_mask of shape {tuple(mask.shape)}, not ({batch}, 1, {seq}, {seq})")
    if mask.requires_grad and torch.is_grad_enabled():
        raise UnsupportedCallError("an attention_mask that has a gradient, which blocks do not give")
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point() or not bool(((mask == 0) | (mask <= HIDDEN)).all()):
        raise UnsupportedCallError("an attention_mask that adds numbers to the scores")
    return mask == 0


HIDDEN = -1e4  # a score to which this is added has no share left beside another, of any size that occurs
_ROWS = 1024  # of a mask that are looked at together


def _is_causal(allowed: Tensor, tokens: Tensor, window: int) -> Tensor:
    """allowed (B, 1, S, S) is what queries see of tokens (B, S) before them."""
    token = torch.arange(allowed.shape[-1], device=allowed.device)
    said = []
    for first in range(0, len(token), _ROWS):
        distance = token[first : first + _ROWS, None] - token
        seen = (distance >= 0) if window < 0 else (distance >= 0) & (distance <= window)
        said.append((allowed[:, 0, first : first + _ROWS] == (seen & tokens[:, None])).all())
    return torch.stack(said).all()


# They look at values, for which a GPU is waited for: nothing that a CUDA graph may hold.
_OUTSIDE_OF_GRAPHS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("pyckpt::padded_lengths", mutates_args=(), tags=_OUTSIDE_OF_GRAPHS)
def padded_lengths(mask: Tensor, sight: str, reach: int | None, read: Tensor | None) -> Tensor:
    """`packed` of a graph, for a mask."""
    try:
        return _padded(_rows(mask.bool(), Sight(sight, reach, read)), mask.shape[1])  # type: ignore[arg-type]
    except UnsupportedError as reason:
        raise RuntimeError(
            f"{reason} came to a compiled model, which cannot take another way; call pyckpt.unswap(model), or the "
            "model without torch.compile"
        ) from reason


@padded_lengths.register_fake
def _padded_lengths_fake(mask: Tensor, sight: str, reach: int | None, read: Tensor | None) -> Tensor:
    return mask.new_empty((2, 5 * mask.shape[0] + 1), dtype=torch.int32)


class _Rows(NamedTuple):
    """Where the tokens of a mask's rows begin and end, (B,) int64 each; whether all are tokens; `Sight.tokens`, or less
    where nobody reads what padding gives."""

    first: Tensor
    stop: Tensor
    whole: bool
    tokens: str


def _rows(mask: Tensor, sight: Sight) -> _Rows:
    """What there is to know of a mask (B, S) bool, read at once: for each look at values a GPU is waited for."""
    seq = mask.shape[1]
    runs = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    first = torch.where(runs > 0, mask.long().argmax(1), seq)
    stop = first + mask.sum(1)
    unseen, after = _read(first, stop, seq, sight)
    answers = [mask.all(), (runs > 1).any(), unseen.any(), after.any()]
    whole, torn, unseen_is_read, after_is_read = torch.stack(answers).tolist()
    if torn:
        raise UnsupportedCallError("an attention_mask with padding between tokens")
    if unseen_is_read:
        raise UnsupportedCallError(
            "padding that sees no token, and is read, under eager attention or a mask of numbers"
        )
    return _Rows(first, stop, whole, sight.tokens if after_is_read else "none")


def _read(first: Tensor, stop: Tensor, seq: int, sight: Sight) -> tuple[Tensor, Tensor]:
    """(B, S) bool each: padding that sees no token under attention that would see it, and padding after the tokens;
    of both what is read. (B,) where neither makes a difference."""
    if sight.tokens == "none" or (sight.read is None and sight.reach is None):
        return torch.zeros_like(first, dtype=torch.bool), torch.ones_like(first, dtype=torch.bool)
    token, first, stop = torch.arange(seq, device=first.device), first[:, None], stop[:, None]
    read = torch.ones_like(token < first) if sight.read is None else sight.read.to(first.device).reshape(-1, seq)
    after = (token >= stop) & read
    if sight.reach is None:
        return torch.zeros_like(read), after
    return ((token < first) | (token >= stop + sight.reach)) & read, after


def _padded(rows: _Rows, seq: int) -> Tensor:
    """(2, 5 * B + 1) of queries and of keys, five sequences a row.

    They are: queries of padding before the tokens, which see nothing; its keys, which nobody sees; the tokens, with the
    queries of padding that see them; queries of padding after them that see nothing; its keys.
    """
    first, stop, batch = rows.first, rows.stop, len(rows.first)
    row = torch.arange(0, batch * seq, seq, device=first.device)
    begin = row if rows.tokens == "all" else row + first
    end = row + (stop if rows.tokens == "none" else seq)
    queries = torch.stack([row, begin, begin, end, row + seq], dim=1)
    keys = torch.stack([row, row, row + first, row + stop, row + stop], dim=1)
    starts = torch.stack([queries.flatten(), keys.flatten()])
    return torch.nn.functional.pad(starts, (0, 1), value=batch * seq).to(torch.int32)


# --- packing ------------------------------------------------------------------------------------------------


@torch.library.custom_op("pyckpt::packed_lengths", mutates_args=())
def packed_lengths(positions: Tensor, batch: int, seq: int) -> Tensor:
    """`packed` of a graph, for positions: cu_seqlens, of as many sequences as there are."""
    return _cut(_ends(positions, batch, seq))


@packed_lengths.register_fake
def _packed_lengths_fake(positions: Tensor, batch: int, seq: int) -> Tensor:
    return positions.new_empty(torch.library.get_ctx().new_dynamic_size(min=2), dtype=torch.int32)


def _ends(positions: Tensor, batch: int, seq: int) -> Tensor:
    """Where in a row, (B, S - 1) bool, the next token starts another sequence."""
    rows = positions.expand(batch, seq)
    return rows[:, 1:] - rows[:, :-1] != 1


def restarted(positions: Tensor) -> Tensor:
    """Positions (1, S) that start anew where flash attention cuts: at each of the least, whatever lies between."""
    token = torch.arange(positions.shape[1], device=positions.device)
    return token - torch.where(positions == positions.min(), token, 0).cummax(1).values


def given_lengths(lengths: dict[str, Any], tokens: int) -> Tensor | None:
    """cu_seqlens of a flat batch of so many tokens, as flash attention is told them; None where it is not told all."""
    if any(value is None for value in lengths.values()):
        return None
    queries, keys = lengths["cu_seq_lens_q"], lengths["cu_seq_lens_k"]
    if not torch.compiler.is_compiling() and not (torch.equal(queries, keys) and int(queries[-1]) == tokens):
        raise UnsupportedCallError("cu_seq_lens_q and cu_seq_lens_k that differ, or leave out tokens")
    return queries.to(torch.int32)


def _cut(ends: Tensor) -> Tensor:
    """cu_seqlens from where in a row the next token starts another sequence."""
    starts = torch.cat([torch.ones_like(ends[:, :1]), ends], dim=1)
    found = starts.flatten().nonzero().flatten()
    return torch.nn.functional.pad(found, (0, 1), value=starts.numel()).to(torch.int32)
