"""How a sublayer ends, from x, the attention output or the MLP's activation, and the backward:

    out = residual + m dropout(x Wᵀ + b)        m the spec's residual_multiplier
    out = residual + dropout(norm(x Wᵀ + b))    norm_placement "sandwich" and "output"
    out = norm(residual + dropout(x Wᵀ + b))    norm_placement "post"

What the norm reads is called z; without a norm it is out itself. The backward of the norm needs z: it is kept, or made
again by the same product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.ops import philox
from pyckpt.ops.direct import ops
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.linear import Linear
from pyckpt.tokenwise.norm import norm_of
from pyckpt.tokenwise.tensor_parallel import Total, alone
from pyckpt.tokenwise.workspace import Workspace


class Branch:
    """The last projection of a sublayer, dropout, the residual sum, and the norm called `norm` if there is one.

    `kept`: the name under which a save set keeps z. `site`: of the dropout. `total`: of the product, a process's share.
    """

    def __init__(
        self, spec: BlockSpec, projection: str, norm: str | None, kept: str, site: int, total: Total = alone
    ) -> None:
        self.spec, self.linear, self.site, self._kept = spec, Linear(spec, projection), site, kept
        self.norm = norm_of(spec, norm)
        self._multiplier, self._total = spec.residual_multiplier, total
        self.parameters = (*self.linear.parameters, *self.norm.parameters)

    def forward(self, w: Weights, tile: Tile, x: Tensor, residual: Tensor, out: Tensor, ws: Workspace) -> None:
        """Fill out, and z where `tile.kept` asks for it."""
        z = self.project(w, tile, x, residual, out, ws)
        self.finish(w, tile, z, residual, out)

    def project(self, w: Weights, tile: Tile, x: Tensor, residual: Tensor, out: Tensor | None, ws: Workspace) -> Tensor:
        """z (t, d_model), in `tile.kept` or scratch memory; without a norm in out, if that is given."""
        if self.spec.norms_after and not self.spec.norms_sum:
            z = self._place(tile, tuple(residual.shape), x.dtype, ws)
            self._product(w, tile, x, z, ws)
            return z
        if self.spec.norms_sum or out is None:
            out = self._place(tile, tuple(residual.shape), residual.dtype, ws)
        if self._drops(tile):
            made = ws.get("branch", tuple(residual.shape), x.dtype)
            self._product(w, tile, x, made, ws)
            if self._multiplier != 1.0:
                made *= self._multiplier
            self._drop(tile, made, residual, out)
        else:
            self._add(w, tile, x, residual, out, ws)
        return out

    def finish(self, w: Weights, tile: Tile, z: Tensor, residual: Tensor, out: Tensor) -> None:
        """out from z."""
        if not self.spec.norms_after:
            return
        y = self.norm.forward(w, z)[0]
        if self.spec.norms_sum:
            out.copy_(y)
        elif self._drops(tile):
            self._drop(tile, y, residual, out)
        else:
            torch.add(residual, y, out=out)

    def backward(
        self,
        w: Weights,
        tile: Tile,
        z: Tensor | None,
        dout: Tensor,
        dresidual: Tensor,
        dtype: torch.dtype,
        grads: WeightGradients,
        ws: Workspace,
    ) -> Tensor:
        """The gradient of the projection's output, (t, d_model) in the products' dtype; fills dresidual.

        Adds the gradients of the norm and of the bias, not those of the weights. z is read where there is a norm.
        dresidual may be dout; the result may be dout or dresidual and is not to be written to.
        """
        if self.spec.norms_sum:
            assert z is not None
            dresidual.copy_(self.norm.backward(w, dout, z, self.norm.forward(w, z)[1], grads))
            d = self._dropped(tile, dresidual, dtype, ws)
        else:
            if dresidual is not dout:
                dresidual.copy_(dout)
            d = self._dropped(tile, dout, dtype, ws)
            if self.spec.norms_after:
                assert z is not None
                d = self.norm.backward(w, d, z, self.norm.forward(w, z)[1], grads)
            if self._multiplier != 1.0:
                # In memory of its own: d may be dout.
                d = torch.mul(d, self._multiplier, out=ws.get("dscaled", tuple(d.shape), d.dtype))
        grads.add_rows(self.linear.bias, d)
        return d

    def _product(self, w: Weights, tile: Tile, x: Tensor, out: Tensor, ws: Workspace) -> None:
        """out = x Wᵀ + b, with the shares of all processes."""
        if self._total is alone:
            self.linear.forward(w, tile, x, out, ws)
            return
        unbiased = {n: t for n, t in w.items() if n != self.linear.bias}
        self._total(out, lambda rows: self.linear.forward(unbiased, tile, x[rows], out[rows], ws))
        bias = w.get(self.linear.bias)
        if bias is not None:
            out += bias

    def _add(self, w: Weights, tile: Tile, x: Tensor, residual: Tensor, out: Tensor, ws: Workspace) -> None:
        if self._total is alone:
            self.linear.forward(w, tile, x, out, ws, residual=residual, multiplier=self._multiplier)
            return
        made = ws.get("branch", tuple(residual.shape), x.dtype)
        self._product(w, tile, x, made, ws)
        torch.add(residual, made, alpha=self._multiplier, out=out)

    def _place(self, tile: Tile, shape: tuple[int, ...], dtype: torch.dtype, ws: Workspace) -> Tensor:
        kept = tile.kept.get(self._kept)
        return ws.get(f"z {self._kept}", shape, dtype) if kept is None else kept

    def _drops(self, tile: Tile) -> bool:
        return tile.seed is not None and self.spec.dropout > 0.0

    def _dropped(self, tile: Tile, d: Tensor, dtype: torch.dtype, ws: Workspace) -> Tensor:
        """The gradient before dropout, from that after it; d itself where nothing is dropped or cast."""
        if not self._drops(tile):
            return d.to(dtype)
        out = ws.get("dbranch", tuple(d.shape), dtype)
        self._drop(tile, d, None, out)
        return out

    def _drop(self, tile: Tile, x: Tensor, residual: Tensor | None, out: Tensor) -> None:
        assert tile.seed is not None
        ops.dropout_(x, residual, out, self.spec.dropout, philox.derive(tile.seed, self.site), tile.first)
