"""Linear layers on a tile: products that write where they are told to, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyckpt.ops.products import sum_of_products
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.low_rank import LowRankProduct
from pyckpt.tokenwise.workspace import Workspace


class Linear:
    """y = x Wᵀ + bias, with the low-rank products that the spec has beside it; weights come with every call."""

    def __init__(self, spec: BlockSpec, name: str) -> None:
        self.name, self.weight, self.bias = name, f"{name}.weight", f"{name}.bias"
        self.beside = [LowRankProduct(a, i) for i, a in enumerate(spec.low_rank) if a.linear == name]
        self.weights = (self.weight, *(n for product in self.beside for n in product.parameters))
        self.parameters = (*self.weights, self.bias)

    def forward(
        self,
        w: Weights,
        tile: Tile,
        x: Tensor,
        out: Tensor,
        ws: Workspace,
        residual: Tensor | None = None,
        multiplier: float = 1.0,
    ) -> None:
        """out = y, or residual + multiplier * y."""
        weight, bias = w[self.weight].t(), w.get(self.bias)
        same = weight.dtype == x.dtype
        if same and residual is None:
            if bias is None:
                torch.mm(x, weight, out=out)
            else:
                torch.addmm(bias, x, weight, out=out)
            self._add_beside(w, tile, x, out, ws)
        elif same and residual is not None and residual.dtype == x.dtype:
            torch.addmm(residual, x, weight, alpha=multiplier, out=out)
            if bias is not None:
                out.add_(bias, alpha=multiplier)
            self._add_beside(w, tile, x, out, ws, multiplier)
        else:
            # Autocast: the product in the low precision, the residual stream in its own. Or the layer has its own.
            product = _product(x, weight, bias)
            self._add_beside(w, tile, x, product, ws)
            out.copy_(product) if residual is None else torch.add(residual, product, alpha=multiplier, out=out)

    def _add_beside(
        self, w: Weights, tile: Tile, x: Tensor, out: Tensor, ws: Workspace, multiplier: float = 1.0
    ) -> None:
        for product in self.beside:
            product.add(w, tile, x, out, ws, multiplier)

    def add_gradients(
        self, w: Weights, tile: Tile, dy: Tensor, x: Tensor, grads: WeightGradients, ws: Workspace
    ) -> None:
        """Add the gradients of the weights and the bias."""
        self.add_weight_gradients(w, tile, dy, x, grads, ws)
        grads.add_rows(self.bias, dy)

    def add_weight_gradients(
        self, w: Weights, tile: Tile, dy: Tensor, x: Tensor, grads: WeightGradients, ws: Workspace
    ) -> None:
        grads.add_product(self.weight, dy, x)
        for product in self.beside:
            product.add_gradients(w, tile, dy, x, grads, ws)


def input_gradient(
    w: Weights, tile: Tile, linears: Sequence[Linear], dys: Sequence[Tensor], out: Tensor, ws: Workspace
) -> None:
    """out = the sum over linear layers of dy W: the gradient of the x that they all read."""
    weights = [w[linear.weight] for linear in linears]
    if any(weight.dtype != out.dtype for weight in weights):
        shares = [_product(dy, weight) for dy, weight in zip(dys, weights, strict=True)]
        torch.sum(torch.stack(shares), 0, out=out)
    else:
        sum_of_products(dys, weights, out)
    for linear, dy in zip(linears, dys, strict=True):
        for product in linear.beside:
            product.add_input_gradient(w, tile, dy, out, ws)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x matrix + bias in the matrix's dtype (that in which a quantized layer computes), then in x's."""
    given = x.to(matrix.dtype)
    product = torch.mm(given, matrix) if bias is None else torch.addmm(bias.to(matrix.dtype), given, matrix)
    return product.to(x.dtype)
