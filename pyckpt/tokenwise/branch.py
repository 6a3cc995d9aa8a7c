"""How a sublayer ends: out = residual + dropout(x Wᵀ + b), and the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.ops import philox
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.linear import linear
from pyckpt.tokenwise.workspace import Workspace

ops = torch.ops.pyckpt


class Branch:
    """The last projection of a sublayer, called `projection`, and the residual sum. `site`: of its dropout."""

    def __init__(self, spec: BlockSpec, projection: str, site: int) -> None:
        self.spec, self.projection, self.site = spec, projection, site
        self.weight, self.bias = f"{projection}.weight", f"{projection}.bias"
        self.parameters = (self.weight, self.bias)

    def forward(self, w: Weights, tile: Tile, x: Tensor, residual: Tensor, out: Tensor, ws: Workspace) -> None:
        if not self._drops(tile):
            linear(w, self.projection, x, out, residual=residual)
            return
        made = ws.get("branch", tuple(out.shape), x.dtype)
        linear(w, self.projection, x, made)
        self._drop(tile, made, residual, out)

    def backward(self, tile: Tile, dout: Tensor, dtype: torch.dtype, grads: WeightGradients, ws: Workspace) -> Tensor:
        """The gradient of the projection's output in the products' dtype; adds that of its bias. May be dout itself."""
        d = dout.to(dtype)
        if self._drops(tile):
            d = ws.get("dbranch", tuple(dout.shape), dtype)
            self._drop(tile, dout, None, d)
        grads.add_rows(self.bias, d)
        return d

    def _drops(self, tile: Tile) -> bool:
        return tile.seed is not None and self.spec.dropout > 0.0

    def _drop(self, tile: Tile, x: Tensor, residual: Tensor | None, out: Tensor) -> None:
        assert tile.seed is not None
        ops.dropout_(x, residual, out, self.spec.dropout, philox.derive(tile.seed, self.site), tile.first)
