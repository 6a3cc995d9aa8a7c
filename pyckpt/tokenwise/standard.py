"""The hand-written tokenwise parts of the standard block.

    pre:   q, k, v = rope(norm(x) Wqkvᵀ)
    post:  mid = x + o Woᵀ;  y = mid + MLP(norm(mid))    (dropout on both summands)
           in a parallel block the MLP reads norm(x)

Backward of `post` for a tile: mid, its norm, gate and up are made again (or read, if kept); the down projection is
not: nothing needs its output, nor in a parallel block that of the output projection. Backward of `pre`: the norm is
made again; q and k only where QK-norm needs them raw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.branch import Branch
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.mlp import DOWN, Mlp
from pyckpt.tokenwise.parameters import ATTENTION
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
        self.attention_end = Branch(spec, f"{ATTENTION}.o_proj", ATTENTION_SITE)
        self.mlp_end = Branch(spec, DOWN, MLP_SITE)

    def cast(self, w: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: t if "norm" in n else t.to(dtype) for n, t in w.items()}

    # --- forward ---

    def pre(self, w: Weights, tile: Tile, q: Tensor, k: Tensor, v: Tensor, ws: Workspace) -> None:
        self.qkv.forward(w, tile, q, k, v)

    def finish_kept(self, w: Weights, tile: Tile, q: Tensor, k: Tensor) -> None:
        self.qkv.finish(w, tile.positions, (tile.kept["q"], tile.kept["k"]), (q, k))

    def post(self, w: Weights, tile: Tile, o: Tensor, y: Tensor, ws: Workspace) -> None:
        mid = self._mid(w, tile, o, ws)
        act = self.mlp.forward(w, tile, tile.x if self.spec.parallel else mid, o.dtype, ws)
        self.mlp_end.forward(w, tile, act, mid, y, ws)

    def _mid(self, w: Weights, tile: Tile, o: Tensor, ws: Workspace) -> Tensor:
        mid = tile.kept.get("mid")
        if mid is None:
            mid = ws.get("mid", tuple(tile.x.shape), tile.x.dtype)
        self.attention_end.forward(w, tile, o, tile.x, mid, ws)
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
        parallel = self.spec.parallel
        if parallel:
            mid = tile.x
        else:
            mid = tile.kept["mid"] if "mid" in tile.kept else self._mid(w, tile, o, ws)
        # The gradient of what the MLP reads: x in a parallel block, else mid, through which all else goes.
        dmid = dx if dx is not None else ws.get("dmid", tuple(dy.shape), dy.dtype)
        dmid.copy_(dy)
        inward = dx is not None or grads.wants(*self.mlp.norm.parameters)
        if not parallel:
            inward |= do is not None or grads.wants(*self.attention_end.parameters)
        d = self.mlp_end.backward(tile, dy, o.dtype, grads, ws)
        if inward or grads.wants(self.mlp_end.weight, *self.mlp.parameters):
            hidden = self.mlp.remake(w, tile, mid, o.dtype, ws)
            self.mlp.backward(w, hidden, mid, d, dmid if inward else None, grads, ws)
        d = self.attention_end.backward(tile, dy if parallel else dmid, o.dtype, grads, ws)
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
