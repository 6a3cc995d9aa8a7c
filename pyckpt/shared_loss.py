"""The loss of sequences that processes share, of which each computes that of its own tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyckpt.attend.context import ContextParallel
from pyckpt.attend.dense import Layout
from pyckpt.compiling import uncompiled
from pyckpt.exec.lm_ends import Ends, Targets
from pyckpt.ops.linear_cross_entropy import counted

OfPart = Callable[[Tensor, "Tensor | None", str], Tensor]
OfTiles = Callable[[Tensor, Targets, Ends, Layout, "Tensor | None"], Tensor]


def shared_loss(
    context: ContextParallel, targets: Tensor, weights: Tensor | None, ignored: int, reduction: str, of_part: OfPart
) -> Tensor:
    """The loss of all tokens, in every process; (..., S) with reduction "none".

    targets (..., S) int64 and weights, as `linear_cross_entropy` takes them, are those of whole sequences. of_part:
    makes the loss of a part of them, by the reduction that it is given. Where S is no multiple of what the processes
    share, the parts are those of longer sequences, whose last tokens are ignored.
    """
    given = targets.shape[-1]
    padding = context.padding(given)
    if padding:
        targets = F.pad(targets, (0, padding), value=ignored)
        weights = None if weights is None else F.pad(weights, (0, padding))
    own = None if weights is None else context.shard(weights, -1)
    part = of_part(context.shard(targets, -1), own, "none" if reduction == "none" else "sum")
    if reduction == "none":
        return context.gather(part, -1)[..., :given]
    loss = context.total(part)
    if reduction == "sum":
        return loss
    if weights is not None:  # of ignored tokens too, and in any dtype
        weights = weights.to(loss.dtype).masked_fill(targets == ignored, 0.0)
    return averaged(loss, targets, weights, ignored)


def averaged(loss: Tensor, targets: Tensor, weights: Tensor | None, ignored: int) -> Tensor:
    """The mean of a sum of losses; weights: 0 of what is ignored, or None."""
    count = counted(targets, weights, ignored)
    nothing = count == 0  # NaN, as of one process, whose gradients are 0
    return (loss / count.masked_fill(nothing, 1)).masked_fill(nothing, math.nan)


@uncompiled
def of_all_tiles(
    context: ContextParallel,
    tokens: Tensor,
    targets: Targets,
    ends: Ends,
    layout: Layout,
    positions: Tensor | None,
    of_tiles: OfTiles,
) -> Tensor:
    """The loss of all tokens, in every process; (T,) with reduction "none". Streamed: each computes that of its tiles.

    of_tiles: makes it, of what it is given: the arguments, in the layout of so many tokens that each process has as
    many. With reduction "none" it is 0 of others' tokens.
    """
    given, how = layout.tokens, ends.loss
    layout = padded(layout, context.size, tokens.device)
    padding = layout.tokens - given
    if padding:
        tokens, targets = context.padded(tokens.reshape(-1), padding), targets.padded(padding)
        if positions is not None:
            positions = context.padded_positions(positions, padding, positions.dim() - 1)
    if how.reduction == "mean":
        ends = dataclasses.replace(ends, loss=dataclasses.replace(how, reduction="sum"))
    loss = context.total(of_tiles(tokens, targets, ends, layout, positions))
    if how.reduction != "mean":
        return loss if how.reduction == "sum" else loss[:given]
    everything = slice(0, layout.tokens)
    labels = targets.of(everything)
    return averaged(loss, labels, targets.weights_of(everything, labels, loss.dtype), how.ignore_index)


def padded(layout: Layout, processes: int, device: torch.device) -> Layout:
    """With one more sequence at the end, where the tokens can't be dealt out evenly to so many processes."""
    tokens = -(-layout.tokens // processes) * processes
    if tokens == layout.tokens:
        return layout
    queries, keys = ([*starts, tokens] for starts in layout.numbers)
    cu_seqlens = torch.tensor([queries, keys] if layout.apart else queries, dtype=torch.int32, device=device)
    return Layout(1, tokens, cu_seqlens, (queries, keys))
