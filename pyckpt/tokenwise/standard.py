"""The hand-written tokenwise parts of the standard block.

    pre:   q, k, v = rope(norm(x) Wqkvᵀ)                    `qkv`
    post:  mid = x + o Woᵀ                                  `attention_end`
           y = mid + act(norm(mid) Wgateᵀ, ...) Wdownᵀ      `mlp` and `mlp_end`

with dropout on both summands; where the norms stand is the affair of these parts. In a parallel block the MLP reads x.

Backward of `post` for a tile: mid, its norm, gate and up are made again (or read, if kept). The down projection is
not, nothing needs its output, unless a norm reads it; nor in a parallel block is the output projection. Backward of
`pre`: the norm is made again; q and k only where QK-norm needs them raw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.branch import Branch
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.mlp import DOWN, Mlp
from pyckpt.tokenwise.norm import with_offset
from pyckpt.tokenwise.parameters import ATTENTION, norm_names
from pyckpt.tokenwise.qkv import Qkv
from pyckpt.tokenwise.workspace import Workspace

# Where dropout draws its own numbers; attention's probabilities take site 0.
ATTENTION_SITE, MLP_SITE = 1, 2


class StandardTokenwise:
    """`Tokenwise` of a `BlockSpec`. Holds no tensors: weights come with every call."""

    def __init__(self, spec: BlockSpec) -> None:
        self.spec = spec
        self.qkv = Qkv(spec)
        self.mlp = Mlp(spec)
        norms = norm_names(spec)
        self.attention_end = Branch(spec, f"{ATTENTION}.o_proj", norms.after_attention, "mid", ATTENTION_SITE)
        self.mlp_end = Branch(spec, DOWN, norms.after_mlp, "down", MLP_SITE)

    def cast(self, w: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: self._norm_weight(n, t) if "norm" in n else t.to(dtype) for n, t in w.items()}

    def _norm_weight(self, name: str, t: Tensor) -> Tensor:
        return with_offset(t, self.spec.norm_offset) if name.endswith(".weight") else t

    # --- forward ---

    def pre(self, w: Weights, tile: Tile, q: Tensor, k: Tensor, v: Tensor, ws: Workspace) -> None:
        self.qkv.forward(w, tile, q, k, v)

    def finish_kept(self, w: Weights, tile: Tile, q: Tensor, k: Tensor) -> None:
        self.qkv.finish(w, tile.positions, (tile.kept["q"], tile.kept["k"]), (q, k))

    def post(self, w: Weights, tile: Tile, o: Tensor, y: Tensor, ws: Workspace) -> None:
        mid = self._mid(w, tile, self.attention_end.project(w, tile, o, tile.x, None, ws), ws)
        act = self.mlp.forward(w, tile, tile.x if self.spec.parallel else mid, o.dtype, ws)
        self.mlp_end.forward(w, tile, act, mid, y, ws)

    def _mid(self, w: Weights, tile: Tile, z: Tensor, ws: Workspace) -> Tensor:
        """The residual stream after attention, from what the norm after it reads; z itself without one."""
        if not self.spec.norms_after:
            return z
        mid = ws.get("mid", tuple(tile.x.shape), tile.x.dtype)
        self.attention_end.finish(w, tile, z, tile.x, mid)
        return mid

    # --- backward ---

    def post_bwd(
        self,
        w: Weights,
        tile: Tile,
        o: Tensor,
        dy: Tensor,
        dx: Tensor | None,
        do: Tensor | None,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        # `source` is what the MLP reads, `dsource` its gradient: dx where the residual stream leads to x.
        dsource = dx if dx is not None else ws.get("dsource", tuple(dy.shape), dy.dtype)
        inward = dx is not None or grads.wants(*self.mlp.norm.parameters)
        outward = do is not None or grads.wants(*self.attention_end.parameters)
        if self.spec.parallel:
            self._mlp_bwd(w, tile, tile.x, dy, dsource, o.dtype, inward, grads, ws)
            if outward:
                self._attention_end_bwd(w, tile, None, o, dy, dy, do, grads, ws)
            return
        z = tile.kept.get("mid")
        if z is None:
            z = self.attention_end.project(w, tile, o, tile.x, None, ws)
        self._mlp_bwd(w, tile, self._mid(w, tile, z, ws), dy, dsource, o.dtype, inward or outward, grads, ws)
        if outward or dx is not None:
            self._attention_end_bwd(w, tile, z, o, dsource, dsource, do, grads, ws)

    def _mlp_bwd(
        self,
        w: Weights,
        tile: Tile,
        source: Tensor,
        dy: Tensor,
        dsource: Tensor,
        dtype: torch.dtype,
        inward: bool,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        """From dy: dsource, filled if `inward`, and the gradients of the MLP's weights and of the norms around it."""
        inner = inward or grads.wants(self.mlp_end.weight, *self.mlp.parameters)
        if not (inner or grads.wants(*self.mlp_end.parameters)):
            return
        hidden, z = None, tile.kept.get("down")
        if self.spec.norms_after and z is None:
            hidden = self.mlp.remake(w, tile, source, dtype, ws)
            z = self.mlp_end.project(w, tile, self.mlp.activation(hidden, ws), source, None, ws)
        d = self.mlp_end.backward(w, tile, z, dy, dsource, dtype, grads, ws)
        if inner:
            hidden = hidden or self.mlp.remake(w, tile, source, dtype, ws)
            self.mlp.backward(w, hidden, source, d, dsource if inward else None, grads, ws)

    def _attention_end_bwd(
        self,
        w: Weights,
        tile: Tile,
        z: Tensor | None,
        o: Tensor,
        dout: Tensor,
        dresidual: Tensor,
        do: Tensor | None,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        d = self.attention_end.backward(w, tile, z, dout, dresidual, o.dtype, grads, ws)
        grads.add_product(self.attention_end.weight, d, o)
        if do is not None:
            torch.mm(d, w[self.attention_end.weight], out=do)

    def pre_bwd(
        self,
        w: Weights,
        tile: Tile,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dx: Tensor | None,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        self.qkv.backward(w, tile, dq, dk, dv, dx, grads, ws)
