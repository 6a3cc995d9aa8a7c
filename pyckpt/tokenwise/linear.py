"""Linear layers on a tile: products that write where they are told to, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Weights


def linear(
    w: Weights, name: str, x: Tensor, out: Tensor, residual: Tensor | None = None, multiplier: float = 1.0
) -> None:
    """out = x Wᵀ + bias, or residual + multiplier (x Wᵀ + bias)."""
    weight, bias = w[f"{name}.weight"].t(), w.get(f"{name}.bias")
    if residual is None:
        if bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(bias, x, weight, out=out)
    elif residual.dtype == x.dtype:
        torch.addmm(residual, x, weight, alpha=multiplier, out=out)
        if bias is not None:
            out.add_(bias, alpha=multiplier)
    else:
        # Autocast: the product in the low precision, the residual stream in its own.
        product = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
        torch.add(residual, product, alpha=multiplier, out=out)


def add_gradients(grads: WeightGradients, name: str, dy: Tensor, x: Tensor) -> None:
    """Add the gradients of the weight and the bias of y = x Wᵀ + bias."""
    grads.add_product(f"{name}.weight", dy, x)
    grads.add_rows(f"{name}.bias", dy)


def input_gradient(w: Weights, names: list[str], dys: list[Tensor], out: Tensor) -> None:
    """out = the sum over linear layers of dy W: the gradient of the x that they all read."""
    torch.mm(dys[0], w[f"{names[0]}.weight"], out=out)
    for name, dy in zip(names[1:], dys[1:], strict=True):
        # As an out= overload: FLOP counters know addmm and do not know addmm_.
        torch.addmm(out, dy, w[f"{name}.weight"], out=out)
