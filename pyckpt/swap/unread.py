"""Linear layers, and a mixture's experts, whose outputs nothing reads in a backward: their product is not made again.

The last projection of an MLP, say, whose output is added to the residual stream: the gradients on both sides of the sum
depend on neither. (torch.utils.checkpoint stops before it for the same reason, once it has all that was saved.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.casting import autocast
from pyckpt.swap.experts import UnreadExperts, are_known


class Unread(nn.Module):
    """Stands for a linear layer, on its parameters, with its gradients; the output is zeros, or noise to try it out."""

    def __init__(self, linear: nn.Linear, noisy: bool = False) -> None:
        super().__init__()
        self._parameters = linear._parameters  # what is put there for a call is seen in both
        self.noisy = noisy

    def forward(self, x: Tensor) -> Tensor:
        y = _UnreadFunction.apply(*autocast(x, self.weight, self.bias))
        return y + torch.randn_like(y) if self.noisy else y


def stand_in(module: nn.Module | None, noisy: bool = False) -> Unread | UnreadExperts | None:
    """What stands for the module (on which there are no hooks: else its layer is not swapped), if there is such."""
    if type(module) is nn.Linear and "forward" not in vars(module):
        plain = type(module.weight) in (Tensor, nn.Parameter)  # quantized ones may be of another class
        return Unread(module, noisy) if plain else None
    return UnreadExperts(module, noisy) if module is not None and are_known(module) else None


class _UnreadFunction(torch.autograd.Function):
    """A linear layer without its product: y (..., out) of zeros, for x (..., in), weight (out, in) and bias (out,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros((*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (dy,) = dys
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx = dy @ weight if of_x else None
        rows = dy.flatten(0, -2)
        dw = rows.t() @ x.flatten(0, -2) if of_weight else None
        return dx, dw, rows.sum(0) if of_bias else None
