"""Linear cross entropy by the library's products and the Triton kernel `cross_entropy`, in place on the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyckpt.ops import linear_cross_entropy as _op
from pyckpt.ops.registry import implement
from pyckpt.ops.triton_backend import kernels, rounds_badly

# Values: Triton knows of a stride that 16 divides or does not. 16 bytes are fewer, and were read two at a time.
_ALIGNED = 16


class InPlaceHead(_op.Head):
    """`Head`: a chunk of logits in the products' dtype, which their gradient is written over by one kernel."""

    @property
    def options(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "softcap": self.softcap,
            "z_loss": self.z_loss,
            "smoothing": self.smoothing,
        }

    def chunk(
        self, x: Tensor, target: Tensor, upstream: Tensor | None, loss: Tensor | None, lse: Tensor, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        z = self._logits(x)
        bias = self.bias
        if rounds_badly(z):
            z, bias = z.float(), None if bias is None else bias.float()
        self._run(z, bias, target, upstream, loss, lse, gradient)
        z = z.to(x.dtype)
        return z, z

    def _run(
        self,
        z: Tensor,
        bias: Tensor | None,
        target: Tensor,
        upstream: Tensor | None,
        loss: Tensor | None,
        lse: Tensor,
        gradient: bool,
    ) -> None:
        kernels("cross_entropy").cross_entropy(z, bias, target, upstream, loss, lse, gradient=gradient, **self.options)

    def _logits(self, x: Tensor) -> Tensor:
        """x Wᵀ (t, V). Rows start at multiples of 16 values, which products and kernels read faster."""
        vocab = self.weight.shape[0]
        rows = x.new_empty(x.shape[0], -(-vocab // _ALIGNED) * _ALIGNED)[:, :vocab]
        return torch.mm(x, self.weight.t(), out=rows)


@implement("linear_cross_entropy_fwd", "triton")
def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    token_weight: Tensor | None,
    reduction: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = InPlaceHead(weight, bias, ignore_index, softcap, z_loss, label_smoothing)
    return _op.forward(head, x, target, token_weight, reduction, need_dx, need_dw, need_db)


@implement("linear_cross_entropy_bwd", "triton")
def linear_cross_entropy_bwd(
    dloss: Tensor,
    lse: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    head = InPlaceHead(weight, bias, ignore_index, softcap, z_loss, label_smoothing)
    return _op.backward(head, dloss, lse, x, target, need_dx, need_dw, need_db)


@implement("linear_cross_entropy_tile_", "triton")
def linear_cross_entropy_tile_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    dloss: Tensor | None,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> Tensor:
    head = InPlaceHead(weight, bias, ignore_index, softcap, z_loss, label_smoothing)
    return _op.tile(head, x, target, dloss, dx, dw, db)
