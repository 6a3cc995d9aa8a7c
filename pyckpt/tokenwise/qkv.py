"""q, k, v = rope(qk_norm(norm(x) Wqkvᵀ + b)): how attention's inputs are made, and the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyckpt.ops.direct import ops
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.linear import Linear, input_gradient
from pyckpt.tokenwise.norm import Normed, norm_of
from pyckpt.tokenwise.parameters import ATTENTION, norm_names
from pyckpt.tokenwise.positions import Positions
from pyckpt.tokenwise.tensor_parallel import Total, alone, is_made
from pyckpt.tokenwise.workspace import Workspace


class Qkv:
    """`pre` of the standard block, from x (t, d_model) to q, k, v (t, heads * head_dim).

    `total`: of the gradients of the norms' outputs, of which a process makes a share, and `total_of_norms` of those of
    QK-norm's weights.
    """

    def __init__(self, spec: BlockSpec, total: Total = alone, total_of_norms: Total = alone) -> None:
        self.spec, self._total, self._total_of_norms = spec, total, total_of_norms
        self.norm = norm_of(spec, norm_names(spec).attention)
        self.projections = [Linear(spec, f"{ATTENTION}.{n}_proj") for n in "qkv"]

    def forward(
        self, w: Weights, tile: Tile, q: Tensor | None, k: Tensor | None, v: Tensor | None, ws: Workspace
    ) -> None:
        """Fill those that are there; `tile.kept` may ask for q and k as they are before QK-norm."""
        wanted = {name: out for name, out in (("q", q), ("k", k), ("v", v)) if out is not None}
        raw = {name: tile.kept.get(name, out) for name, out in wanted.items()}
        h = self._normed(w, tile.x, next(iter(wanted.values())).dtype).h
        for linear, name in zip(self.projections, "qkv", strict=True):
            if name in raw:
                linear.forward(w, tile, h, raw[name], ws)
        self.finish(w, tile.positions, [(n, raw[n], out) for n, out in wanted.items() if n != "v"])

    def finish(self, w: Weights, positions: Positions, parts: list[tuple[str, Tensor, Tensor]]) -> None:
        """From the projections' own to what attention reads: (name, raw, finished), which may be the same tensors."""
        if not parts:
            return
        if self.spec.qk_norm:
            for name, source, target in parts:
                weight = w[f"{ATTENTION}.{name}_norm.weight"]
                made = ops.rms_norm_fwd(self._norm_rows(source), weight, self.spec.norm_eps)[0]
                self._norm_rows(target).copy_(made)
        outs = [self._by_head(target) for _, _, target in parts]
        tables = positions.tables(self.spec, outs[0].dtype)
        if tables is not None:
            rotate = ops.rope_qk_ if len(outs) == 2 else ops.rope_
            rotate(*outs, *tables, False, self.spec.rope_interleaved)

    def backward(
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
        """Add the share of dx that comes through q, k, v. Overwrites dq and dk."""
        normed = self._normed(w, tile.x, dq.dtype)
        raws = self._raw(w, tile, normed, (dq, dk), ws) if self.spec.qk_norm else (None, None)
        self._finish_bwd(w, tile.positions, raws, (dq, dk), grads)
        for linear, d in zip(self.projections, (dq, dk, dv), strict=True):
            self._add_gradients(w, tile, linear, d, normed, grads, ws)
        if dx is not None or grads.wants(*self.norm.parameters):
            dh = ws.get("dh", tuple(tile.x.shape), dq.dtype)
            self._total(dh, lambda rows: self._input_gradient(w, tile, [d[rows] for d in (dq, dk, dv)], dh[rows], ws))
            target = dx if dx is not None else ws.get("dx", tuple(tile.x.shape), tile.x.dtype).zero_()
            self.norm.backward_add(w, dh, tile.x, normed.stats, target, grads)

    def _finish_bwd(
        self,
        w: Weights,
        positions: Positions,
        raws: tuple[Tensor | None, Tensor | None],
        ds: tuple[Tensor, Tensor],
        grads: WeightGradients,
    ) -> None:
        """`finish` backwards: turn dq and dk into the gradients of what the projections gave, raw for QK-norm."""
        if self.spec.qk_norm is True:
            options = self._options(positions, ds[0].dtype)
            for name, raw, d in zip("qk", raws, ds, strict=True):
                key = f"{ATTENTION}.{name}_norm.weight"
                made = ops.qk_finish_bwd_(d, raw, w[key], *options, grads.wants(key))
                if grads.wants(key):
                    self._total_of_norms(made, is_made)
                grads.add(key, made)
            return
        tables = positions.tables(self.spec, ds[0].dtype)
        if tables is not None:
            ops.rope_qk_(*map(self._by_head, ds), *tables, True, self.spec.rope_interleaved)
        for name, raw, d in zip("qk", raws, ds, strict=True):
            if raw is not None:
                self._qk_norm_bwd(w, name, raw, d, grads)

    def _normed(self, w: Weights, x: Tensor, dtype: torch.dtype) -> Normed:
        return Normed(self.norm, w, x, dtype)

    def _raw(
        self, w: Weights, tile: Tile, normed: Normed, like: tuple[Tensor, Tensor], ws: Workspace
    ) -> tuple[Tensor, Tensor]:
        """q and k before QK-norm, kept or made again."""
        if "q" in tile.kept:
            return tile.kept["q"], tile.kept["k"]
        q, k = (ws.get(f"raw_{n}", tuple(t.shape), t.dtype) for n, t in zip("qk", like, strict=True))
        for linear, out in zip(self.projections, (q, k), strict=False):
            linear.forward(w, tile, normed.h, out, ws)
        return q, k

    def _add_gradients(
        self, w: Weights, tile: Tile, linear: Linear, dy: Tensor, normed: Normed, grads: WeightGradients, ws: Workspace
    ) -> None:
        linear.add_gradients(w, tile, dy, normed.h, grads, ws)

    def _input_gradient(self, w: Weights, tile: Tile, dys: list[Tensor], out: Tensor, ws: Workspace) -> None:
        input_gradient(w, tile, self.projections, dys, out, ws)

    def _qk_norm_bwd(self, w: Weights, name: str, raw: Tensor, d: Tensor, grads: WeightGradients) -> None:
        """Turn d, the gradient of q or k normalised over all heads, into that of the raw one."""
        rows, drows = self._norm_rows(raw), self._norm_rows(d)
        key = f"{ATTENTION}.{name}_norm.weight"
        rstd = ops.rms_norm_fwd(rows, None, self.spec.norm_eps)[1]
        made, dw = ops.rms_norm_bwd(drows, rows, w[key], rstd, grads.wants(key))
        drows.copy_(made)
        grads.add(key, dw)

    def _options(self, positions: Positions, dtype: torch.dtype) -> tuple[Any, ...]:
        """Of the ops that run QK-norm by heads and RoPE together."""
        tables = positions.tables(self.spec, dtype) or (None, None)
        return self.spec.norm_eps, *tables, self.spec.rope_interleaved, self.spec.head_dim

    def _norm_rows(self, t: Tensor) -> Tensor:
        """(t, rows, width) as QK-norm sees it."""
        return t.unsqueeze(1) if self.spec.qk_norm == "full" else self._by_head(t)

    def _by_head(self, t: Tensor) -> Tensor:
        return t.view(t.shape[0], -1, self.spec.head_dim)
