"""The low-rank product beside a linear layer (`LowRank` of the spec) on a tile, and its gradients.

    low = scale dropout(x) Aᵀ        y += low Bᵀ
    dlow = scale dy B                dx += undropped(dlow A)

Nothing of it is kept: `low` is rank / (in + out) of the layer's own product to make again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.ops import philox
from pyckpt.ops.direct import ops
from pyckpt.spec import LowRank
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.workspace import Workspace

# Where dropout draws its own numbers: after the sites of the block itself.
_FIRST_SITE = 3


class LowRankProduct:
    """`number` tells those of a block apart, so that each drops values of its own."""

    def __init__(self, spec: LowRank, number: int) -> None:
        self._spec, self._site = spec, _FIRST_SITE + number
        self.parameters = (spec.a, spec.b)

    def add(self, w: Weights, tile: Tile, x: Tensor, out: Tensor, ws: Workspace, multiplier: float) -> None:
        """out += multiplier * low Bᵀ."""
        low = self._low(w, self._dropped(tile, x, ws), ws)
        torch.addmm(out, low, w[self._spec.b].t(), alpha=multiplier, out=out)

    def add_gradients(
        self, w: Weights, tile: Tile, dy: Tensor, x: Tensor, grads: WeightGradients, ws: Workspace
    ) -> None:
        if not grads.wants(*self.parameters):
            return
        dropped = self._dropped(tile, x, ws)
        if grads.wants(self._spec.b):
            grads.add_product(self._spec.b, dy, self._low(w, dropped, ws))
        if grads.wants(self._spec.a):
            grads.add_product(self._spec.a, self._dlow(w, dy, ws), dropped)

    def add_input_gradient(self, w: Weights, tile: Tile, dy: Tensor, dx: Tensor, ws: Workspace) -> None:
        dlow = self._dlow(w, dy, ws)
        if not self._drops(tile):
            torch.addmm(dx, dlow, w[self._spec.a], out=dx)
            return
        dropped = ws.get("low dropped", tuple(dx.shape), dx.dtype)
        torch.mm(dlow, w[self._spec.a], out=dropped)
        self._drop(tile, dropped, dx, dx)

    def _low(self, w: Weights, dropped: Tensor, ws: Workspace) -> Tensor:
        return self._scaled(dropped, w[self._spec.a].t(), "low", ws)

    def _dlow(self, w: Weights, dy: Tensor, ws: Workspace) -> Tensor:
        return self._scaled(dy, w[self._spec.b], "dlow", ws)

    def _scaled(self, x: Tensor, matrix: Tensor, name: str, ws: Workspace) -> Tensor:
        """scale * x matrix (t, rank), rounded once."""
        out = ws.get(name, (x.shape[0], self._spec.rank), x.dtype)
        return torch.addmm(out, x, matrix, beta=0.0, alpha=self._spec.scale, out=out)

    def _drops(self, tile: Tile) -> bool:
        return tile.seed is not None and self._spec.dropout > 0.0

    def _dropped(self, tile: Tile, x: Tensor, ws: Workspace) -> Tensor:
        if not self._drops(tile):
            return x
        out = ws.get("low dropped", tuple(x.shape), x.dtype)
        self._drop(tile, x, None, out)
        return out

    def _drop(self, tile: Tile, x: Tensor, residual: Tensor | None, out: Tensor) -> None:
        assert tile.seed is not None
        seed = philox.derive(tile.seed, self._site)
        ops.dropout_(x, residual, out, self._spec.dropout, seed, tile.first)
