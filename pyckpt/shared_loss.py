"""The loss of sequences that processes share, of which each computes that of its own tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from pyckpt.attend.context import ContextParallel
from pyckpt.ops.linear_cross_entropy import counted

OfPart = Callable[[Tensor, "Tensor | None", str], Tensor]


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
    count = counted(targets, weights, ignored)
    nothing = count == 0  # NaN, as of one process, whose gradients are 0
    return (loss / count.masked_fill(nothing, 1)).masked_fill(nothing, math.nan)
