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

import copy

import torch
from torch import Tensor

from pyckpt.ops.direct import ops
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise import fused
from pyckpt.tokenwise.branch import Branch
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.linear import input_gradient
from pyckpt.tokenwise.mlp import DOWN
from pyckpt.tokenwise.norm import with_offset
from pyckpt.tokenwise.packed import Packed
from pyckpt.tokenwise.parameters import ATTENTION, norm_names
from pyckpt.tokenwise.tensor_parallel import TensorParallel, alone
from pyckpt.tokenwise.workspace import Workspace

# Where dropout draws its own numbers; attention's probabilities take site 0.
ATTENTION_SITE, MLP_SITE = 1, 2


class StandardTokenwise:
    """`Tokenwise` of a `BlockSpec`. Holds no tensors: weights come with every call.

    `parts`: which products are fused with what stands around them, see `fused.choose`. `processes`: those that have
    the block's weights together; `spec` is then what this one computes.
    """

    by_autograd = False
    _packed: tuple[Packed, ...] = ()

    def __init__(
        self, spec: BlockSpec, parts: fused.Fused = fused.NOTHING, processes: TensorParallel | None = None
    ) -> None:
        self.spec, self.makes_delta = spec, "delta" in parts
        total = alone if processes is None else processes.total
        of_norms = alone if processes is None or not processes.sums_qk_norm else total
        self.qkv = fused.qkv_of(spec, parts, total, of_norms)
        self.mlp = fused.mlp_of(spec, parts, total)
        norms = norm_names(spec)
        # A norm after a sublayer needs its output for its own backward, and the MLP, unless parallel, attention's.
        once = {DOWN: not norms.after_mlp, f"{ATTENTION}.o_proj": spec.parallel and not norms.after_attention}
        self.made_once = frozenset(f"{name}.weight" for name, is_so in once.items() if is_so)
        ends = (
            (spec, f"{ATTENTION}.o_proj", norms.after_attention, "mid", ATTENTION_SITE),
            (spec, DOWN, norms.after_mlp, "down", MLP_SITE),
        )
        self.attention_end, self.mlp_end = (Branch(*end, total) for end in ends)
        # What adds to the residual stream in a product's own kernel would add a share.
        if "residual" in parts and spec.residual_multiplier == 1.0 and processes is None:
            reads_sum = spec.norm_placement == "pre" and not spec.parallel
            self.attention_end = fused.FusedBranch(*ends[0], following=self.mlp.norm if reads_sum else None)
            self.mlp_end = fused.FusedBranch(*ends[1])

    def cast(self, w: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
        made = {n: t for packed in self._packed for n, t in packed.unpack(w).items()}
        return made | {
            n: self._norm_weight(n, t) if "norm" in n else t.to(dtype) for n, t in w.items() if n not in made
        }

    def with_packed(self, packed: tuple[Packed, ...], dtype: torch.dtype) -> StandardTokenwise:
        """The same parts for weights of which these are packed, for products in `dtype` where theirs are not others."""
        # What fuses a product takes all of its operands in one dtype.
        whole = self if all(p.dtype == dtype for p in packed) else StandardTokenwise(self.spec)
        made = copy.copy(whole)
        made._packed = packed
        return made

    def _norm_weight(self, name: str, t: Tensor) -> Tensor:
        return with_offset(t, self.spec.norm_offset) if name.endswith(".weight") else t

    # --- forward ---

    def pre(self, w: Weights, tile: Tile, q: Tensor | None, k: Tensor | None, v: Tensor | None, ws: Workspace) -> None:
        self.qkv.forward(w, tile, q, k, v, ws)

    def pre_again(
        self,
        w: Weights,
        tile: Tile,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        need_dx: bool,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        self.pre(w, tile, q, k, v, ws)

    def finish_kept(self, w: Weights, tile: Tile, q: Tensor, k: Tensor) -> None:
        self.qkv.finish(w, tile.positions, [("q", tile.kept["q"], q), ("k", tile.kept["k"], k)])

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
        inner = inward or grads.wants(*self.mlp.down.weights, *self.mlp.parameters)
        if not (inner or grads.wants(*self.mlp_end.parameters)):
            return
        hidden, z = None, tile.kept.get("down")
        if self.spec.norms_after and z is None:
            hidden = self.mlp.remake(w, tile, source, dtype, ws)
            z = self.mlp_end.project(w, tile, self.mlp.activation(hidden, ws), source, None, ws)
        d = self.mlp_end.backward(w, tile, z, dy, dsource, dtype, grads, ws)
        if inner:
            hidden = hidden or self.mlp.remake(w, tile, source, dtype, ws)
            self.mlp.backward(w, tile, hidden, source, d, dsource if inward else None, grads, ws)

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
        linear = self.attention_end.linear
        linear.add_weight_gradients(w, tile, d, o, grads, ws)
        if do is None:
            return
        if tile.delta is None:
            input_gradient(w, tile, [linear], [d], do, ws)
        else:
            ops.linear_delta_(d, w[linear.weight], o, do, tile.delta)

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
