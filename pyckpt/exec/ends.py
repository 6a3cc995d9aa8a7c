"""The two ends of a streamed stack: where the first block's input comes from, and where the last one's output goes.

A causal language model has an embedding and a loss, by tiles; a stack alone is given x and gives y.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pyckpt.attend.dense import Layout
from pyckpt.ops.chunks import acc_dtype
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.norm import norm_of, with_offset

ops = torch.ops.pyckpt
IGNORE = -100

Named = dict[str, Tensor]
Gradients = dict[str, Tensor | None]


class Source(Protocol):
    """Gives the first block's input."""

    def fill(self, w: Named, rows: slice, out: Tensor) -> None: ...

    def backward(self, rows: slice, dx: Tensor) -> None:
        """Take the gradient of what `fill` gave."""

    def gradients(self, w: Named) -> Gradients:
        """Of its weights, after the last tile."""


class Sink(Protocol):
    """Takes the last block's output. With `leaves`, `forward` leaves something for `upstream` in the output's place."""

    leaves: bool

    def forward(self, w: Named, rows: slice, x: Tensor) -> None: ...

    def result(self) -> Tensor: ...

    def upstream(self, rows: slice, left: Tensor, out: Tensor) -> None:
        """Fill `out` with the gradient of the last block's output; `left` is what `forward` left."""

    def gradients(self, w: Named) -> Gradients: ...


# --- a causal language model -------------------------------------------------------------------------------------


class Embedding:
    """`Source`: rows of the weight "embed" by token id. Its gradient is summed in float32."""

    def __init__(self, tokens: Tensor, wanted: bool) -> None:
        self._tokens = tokens.reshape(-1)
        self._wanted = wanted
        self._sum: Tensor | None = None
        self._shape: tuple[int, ...] = ()

    def fill(self, w: Named, rows: slice, out: Tensor) -> None:
        self._shape = tuple(w["embed"].shape)
        torch.index_select(w["embed"], 0, self._tokens[rows], out=out)

    def backward(self, rows: slice, dx: Tensor) -> None:
        if not self._wanted:
            return
        if self._sum is None:
            self._sum = torch.zeros(self._shape, dtype=acc_dtype(dx.dtype), device=dx.device)
        ids, dx = self._tokens[rows], dx.to(self._sum.dtype)
        # Each is the one that adds in a fixed order on its device.
        if dx.is_cuda:
            self._sum.index_put_((ids,), dx, accumulate=True)
        else:
            self._sum.index_add_(0, ids, dx)

    def gradients(self, w: Named) -> Gradients:
        total, self._sum = self._sum, None
        return {"embed": total if self._wanted else None}


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Of `linear_cross_entropy`; `mean` divides by the number of labels that are not ignored."""

    mean: bool = True
    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0


class Loss:
    """`Sink`: final norm, head and cross-entropy of each token's next one; gradients are made in the forward.

    They are those of the sum of the losses, and the backward scales them, as `linear_cross_entropy` does.
    """

    def __init__(
        self,
        labels: Tensor,
        layout: Layout,
        spec: BlockSpec,
        dtype: torch.dtype,
        options: LossOptions,
        n_tiles: int,
        wanted: Collection[str],
        need_dx: bool,
    ) -> None:
        self.leaves = need_dx
        self._labels, self._layout = labels.reshape(-1), layout
        self._norm, self._norm_offset = norm_of(spec, "norm"), spec.norm_offset
        self._dtype, self._options, self._wanted, self._need_dx = dtype, options, wanted, need_dx
        self._ends = _last_tokens(layout)
        self._grads = WeightGradients([n for n in wanted if n != "head"], n_tiles)
        self._head: Tensor | None = None
        self._loss: Tensor | None = None
        self._count = torch.zeros((), dtype=torch.int64, device=labels.device)
        self._scale: Tensor | None = None

    def forward(self, w: Named, rows: slice, x: Tensor) -> None:
        target = self.targets(rows)
        head = w["head"].to(self._dtype)
        w = {**w, "norm.weight": with_offset(w["norm.weight"], self._norm_offset)}
        hidden, stats = self._norm.forward(w, x)
        hidden = hidden.to(self._dtype)
        inward = self._need_dx or any(n != "head" for n in self._wanted)
        dhidden = torch.empty_like(hidden) if inward else None
        if "head" in self._wanted and self._head is None:
            self._head = torch.zeros(head.shape, dtype=acc_dtype(head.dtype), device=head.device)
        o = self._options
        loss = ops.linear_cross_entropy_tile_(
            hidden, head, None, target, IGNORE, o.softcap, o.z_loss, o.label_smoothing, dhidden, self._head
        )
        self._loss = loss if self._loss is None else self._loss + loss
        self._count += (target != IGNORE).sum()
        if dhidden is not None:
            dx = torch.zeros_like(x)
            self._norm.backward_add(w, dhidden, x, stats, dx, self._grads)
            if self.leaves:
                x.copy_(dx)

    def targets(self, rows: slice) -> Tensor:
        """What each token of a range is to predict: the label after it, none at the end of a sequence."""
        target = torch.full((rows.stop - rows.start,), IGNORE, dtype=torch.int64, device=self._labels.device)
        after = self._labels[rows.start + 1 : rows.stop + 1]
        target[: after.shape[0]] = after
        low, high = (bisect.bisect_left(self._ends, token) for token in (rows.start, rows.stop))
        if low < high:
            ends = [end - rows.start for end in self._ends[low:high]]
            target.index_fill_(0, torch.tensor(ends, device=target.device), IGNORE)
        return target

    def result(self) -> Tensor:
        assert self._loss is not None
        return self._loss / self._count if self._options.mean else self._loss

    def take(self, upstream: Tensor) -> None:
        """The gradient of the result."""
        self._scale = upstream / self._count.clamp_min(1) if self._options.mean else upstream

    def upstream(self, rows: slice, left: Tensor, out: Tensor) -> None:
        assert self._scale is not None
        # A factor of one dimension, or it would be rounded to the gradient's dtype before the product.
        torch.mul(left, self._scale.view(1).to(acc_dtype(left.dtype)), out=out)

    def gradients(self, w: Named) -> Gradients:
        assert self._scale is not None and self._loss is not None
        found: Gradients = {}
        for n in self._wanted:
            if n != "head":
                g = self._grads.result(n, w[n].to(self._loss.dtype))  # scaled before it is rounded
                found[n] = None if g is None else g * self._scale
        if self._head is not None:
            found["head"], self._head = self._head.mul_(self._scale), None
        return found


def _last_tokens(layout: Layout) -> Sequence[int]:
    """The last token of each sequence that has one. On the host: to ask a GPU for each tile's would wait for it."""
    if layout.cu_seqlens is None:
        return range(layout.seq - 1, layout.tokens, layout.seq)
    return [stop - 1 for start, stop in itertools.pairwise(layout.cu_seqlens.tolist()) if stop > start]


# --- a stack alone -----------------------------------------------------------------------------------------------


class Given:
    """`Source`: x itself, (T, d_model). Its gradient is a whole tensor too."""

    def __init__(self, x: Tensor, need_dx: bool) -> None:
        self._x = x
        self.dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else None

    def fill(self, w: Named, rows: slice, out: Tensor) -> None:
        out.copy_(self._x[rows])

    def backward(self, rows: slice, dx: Tensor) -> None:
        if self.dx is not None:
            self.dx[rows] = dx

    def gradients(self, w: Named) -> Gradients:
        return {}


class Whole:
    """`Sink`: y itself, (T, d_model)."""

    leaves = False

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._y: Tensor | None = None
        self._dy: Tensor | None = None

    def forward(self, w: Named, rows: slice, x: Tensor) -> None:
        if self._y is None:
            self._y = x.new_empty(self._tokens, x.shape[1])
        self._y[rows] = x

    def result(self) -> Tensor:
        assert self._y is not None
        y, self._y = self._y, None
        return y

    def take(self, upstream: Tensor) -> None:
        self._dy = upstream

    def upstream(self, rows: slice, left: Tensor, out: Tensor) -> None:
        assert self._dy is not None
        out.copy_(self._dy[rows])

    def gradients(self, w: Named) -> Gradients:
        return {}
