"""The two ends of a streamed stack: where the first block's input comes from, and where the last one's output goes.

Here those of a stack alone, which is given x and gives y; in `lm_ends` those of a causal language model.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Named = dict[str, Tensor]
Gradients = dict[str, Tensor | None]
Tensors = tuple[Tensor | None, ...]


class Source(Protocol):
    """Gives the first block's input."""

    @property
    def read_forward(self) -> Tensors:
        """What of the run's arguments a forward reads, and no backward."""

    @property
    def read_backward(self) -> Tensors:
        """What of them a backward reads too."""

    def fill(self, w: Named, rows: slice, out: Tensor) -> None: ...

    def backward(self, w: Named, rows: slice, dx: Tensor) -> None:
        """Take the gradient of what `fill` gave."""

    def gradients(self, w: Named) -> Gradients:
        """Of its weights, after the last tile."""


class Sink(Protocol):
    """Takes the last block's output.

    leaves: `forward` leaves something for `upstream` in the output's place. deferred: its weights' gradients are made
    in `upstream`. read_forward, read_backward: as of a `Source`.
    """

    leaves: bool
    deferred: bool

    @property
    def read_forward(self) -> Tensors: ...

    @property
    def read_backward(self) -> Tensors: ...

    def forward(self, w: Named, rows: slice, x: Tensor) -> None: ...

    def result(self) -> Tensor: ...

    def take(self, w: Named, upstream: Tensor) -> None:
        """The gradient of the result, before the first `upstream`."""

    def upstream(self, rows: slice, left: Tensor, out: Tensor | None) -> None:
        """Fill `out` with the gradient of the last block's output; `left` is what `forward` left."""

    def gradients(self, w: Named) -> Gradients: ...


class Given:
    """`Source`: x itself, (T, d_model). Its gradient is a whole tensor too."""

    def __init__(self, x: Tensor, need_dx: bool) -> None:
        self._x = x
        self.read_forward: Tensors = (x,)
        self.read_backward: Tensors = ()
        self.dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else None

    def fill(self, w: Named, rows: slice, out: Tensor) -> None:
        out.copy_(self._x[rows])

    def backward(self, w: Named, rows: slice, dx: Tensor) -> None:
        if self.dx is not None:
            self.dx[rows] = dx

    def gradients(self, w: Named) -> Gradients:
        return {}

    def take_dx(self) -> Tensor | None:
        """It is given away: the graph may live on, with this."""
        dx, self.dx = self.dx, None
        return dx


class Whole:
    """`Sink`: y itself, of this shape, (..., d_model)."""

    leaves = deferred = False
    read_forward: Tensors = ()
    read_backward: Tensors = ()

    def __init__(self, shape: torch.Size) -> None:
        self._shape = shape
        self._y: Tensor | None = None
        self._dy: Tensor | None = None

    def forward(self, w: Named, rows: slice, x: Tensor) -> None:
        if self._y is None:
            self._y = x.new_empty(self._shape)
        self._y.view(-1, x.shape[1])[rows] = x

    def result(self) -> Tensor:
        assert self._y is not None
        y, self._y = self._y, None
        return y

    def take(self, w: Named, upstream: Tensor) -> None:
        self._dy = upstream.reshape(-1, upstream.shape[-1])

    def upstream(self, rows: slice, left: Tensor, out: Tensor | None) -> None:
        assert self._dy is not None and out is not None
        out.copy_(self._dy[rows])

    def gradients(self, w: Named) -> Gradients:
        return {}
