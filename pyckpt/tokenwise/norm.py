"""One of a block's norms over the width of the residual stream, forward and backward on a tile."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pyckpt.ops.chunks import acc_dtype
from pyckpt.ops.direct import ops
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Weights

Stats = tuple[Tensor, ...]


class Norm(Protocol):
    """`parameters` are the names of its weights. Statistics are one number a row each, in the accumulation dtype."""

    eps: float

    @property
    def parameters(self) -> tuple[str, ...]: ...

    def forward(self, w: Weights, x: Tensor) -> tuple[Tensor, Stats]:
        """The normalised tile, in x's dtype, and the statistics of its rows."""

    def backward_add(self, w: Weights, dy: Tensor, x: Tensor, stats: Stats, dx: Tensor, grads: WeightGradients) -> None:
        """Add the gradient of x to dx, and those of the weights to `grads`."""

    def backward(self, w: Weights, dy: Tensor, x: Tensor, stats: Stats, grads: WeightGradients) -> Tensor:
        """The gradient of x, in its dtype; adds those of the weights to `grads`."""


class Normed:
    """norm(x) of a tile: the statistics of its rows, and its values h (t, d_model) in the dtype of the products."""

    def __init__(self, norm: Norm, w: Weights, x: Tensor, dtype: torch.dtype) -> None:
        y, self.stats = norm.forward(w, x)
        self.h = y.to(dtype)


class NoNorm:
    """Where no norm stands: the identity."""

    parameters: tuple[str, ...] = ()
    eps = 0.0

    def forward(self, w: Weights, x: Tensor) -> tuple[Tensor, Stats]:
        return x, ()

    def backward_add(self, w: Weights, dy: Tensor, x: Tensor, stats: Stats, dx: Tensor, grads: WeightGradients) -> None:
        dx += dy

    def backward(self, w: Weights, dy: Tensor, x: Tensor, stats: Stats, grads: WeightGradients) -> Tensor:
        return dy


class RmsNorm:
    def __init__(self, name: str, eps: float) -> None:
        self._weight, self.eps = f"{name}.weight", eps
        self.parameters = (self._weight,)

    def forward(self, w: Weights, x: Tensor) -> tuple[Tensor, Stats]:
        y, rstd = ops.rms_norm_fwd(x, w[self._weight], self.eps)
        return y, (rstd,)

    def backward_add(self, w: Weights, dy: Tensor, x: Tensor, stats: Stats, dx: Tensor, grads: WeightGradients) -> None:
        need = grads.wants(self._weight)
        grads.add(self._weight, ops.rms_norm_bwd_add_(dy, x, w[self._weight], *stats, dx, need))

    def backward(self, w: Weights, dy: Tensor, x: Tensor, stats: Stats, grads: WeightGradients) -> Tensor:
        dx, dw = ops.rms_norm_bwd(dy, x, w[self._weight], *stats, grads.wants(self._weight))
        grads.add(self._weight, dw)
        return dx


class LayerNorm:
    def __init__(self, name: str, eps: float) -> None:
        self._weight, self._bias, self.eps = f"{name}.weight", f"{name}.bias", eps
        self.parameters = (self._weight, self._bias)

    def forward(self, w: Weights, x: Tensor) -> tuple[Tensor, Stats]:
        y, mean, rstd = ops.layer_norm_fwd(x, w[self._weight], w[self._bias], self.eps)
        return y, (mean, rstd)

    def backward_add(self, w: Weights, dy: Tensor, x: Tensor, stats: Stats, dx: Tensor, grads: WeightGradients) -> None:
        dw, db = ops.layer_norm_bwd_add_(dy, x, w[self._weight], *stats, dx, grads.wants(*self.parameters))
        grads.add(self._weight, dw)
        grads.add(self._bias, db)

    def backward(self, w: Weights, dy: Tensor, x: Tensor, stats: Stats, grads: WeightGradients) -> Tensor:
        dx, dw, db = ops.layer_norm_bwd(dy, x, w[self._weight], *stats, grads.wants(*self.parameters))
        grads.add(self._weight, dw)
        grads.add(self._bias, db)
        return dx


def with_offset(weight: Tensor, offset: float) -> Tensor:
    """A norm's weight as it multiplies: the sum is in the accumulation dtype, where 1 + w keeps w's bits."""
    return weight.to(acc_dtype(weight.dtype)) + offset if offset else weight


def norm_of(spec: BlockSpec, name: str | None) -> Norm:
    """The norm of this name in a block of this spec; None is the identity."""
    if name is None:
        return NoNorm()
    if spec.norm == "rmsnorm":
        return RmsNorm(name, spec.norm_eps)
    return LayerNorm(name, spec.norm_eps)
