"""The parts of the standard block whose products are fused with what stands around them, chosen one by one.

Each goes another way to the result of the part it derives from: see `pyckpt.ops.fused`. `choose` says which do. Within
a part, forward and recomputation go the same way, so that a save set still changes no bit.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import torch
from torch import Tensor

from pyckpt.ops import registry
from pyckpt.ops.direct import ops
from pyckpt.ops.keeping import remembered
from pyckpt.ops.triton_backend import kernels
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.branch import Branch
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.linear import Linear
from pyckpt.tokenwise.mlp import Hidden, Mlp
from pyckpt.tokenwise.norm import LayerNorm, NoNorm, Norm, Normed, Stats
from pyckpt.tokenwise.parameters import ATTENTION, MLP
from pyckpt.tokenwise.positions import Positions
from pyckpt.tokenwise.qkv import Qkv
from pyckpt.tokenwise.tensor_parallel import Total, alone
from pyckpt.tokenwise.workspace import Workspace

Fused = frozenset[str]
NOTHING: Fused = frozenset()
# Names in the table of `fused.choice`, with the op that is asked for.
_OPS = {
    "qkv": "norm_qkv_",
    "residual": "linear_residual_",
    "mlp": "norm_mlp_",
    "delta": "linear_delta_",
    "wgrad": "norm_wgrad_",
    "dgrad": "linears_input_grad_",
}
# What the choice depends on beside its arguments.
_SETTINGS = ("PYCKPT_FUSED", "PYCKPT_BACKEND", "TRITON_INTERPRET")


def choose(spec: BlockSpec, dtype: torch.dtype, device: torch.device) -> Fused:
    """Which products run fused, in `dtype` on a device: by the table of `fused.choice`, or by PYCKPT_FUSED.

    Only those that our kernels serve: composed of PyTorch's own kernels, a fused op gains nothing. None beside low-rank
    products, which would add to what a fused kernel has already turned, normed or summed up.
    """
    if device.type not in registry.DEVICE_TYPES or dtype == torch.float64 or spec.low_rank:
        return NOTHING
    return _choose(spec.d_model, dtype, device, tuple(os.environ.get(name) for name in _SETTINGS))


@remembered(512)
def _choose(width: int, dtype: torch.dtype, device: torch.device, settings: tuple[str | None, ...]) -> Fused:
    served = [name for name, op in _OPS.items() if registry.choose(op, device.type)[0] == "triton"]
    if not served:
        return NOTHING
    choice = kernels("fused.choice")
    return frozenset(n for n in served if choice.fuses(choice.key(n, width, dtype, device)))


def qkv_of(spec: BlockSpec, fused: Fused, *totals: Total) -> Qkv:
    part = FusedQkv(spec, fused, *totals)
    return Qkv(spec, *totals) if isinstance(part.norm, NoNorm) or not fused & {"qkv", "wgrad", "dgrad"} else part


def mlp_of(spec: BlockSpec, fused: Fused, total: Total = alone) -> Mlp:
    part = FusedMlp(spec, fused, total)
    return Mlp(spec, total) if isinstance(part.norm, NoNorm) or not fused & {"mlp", "wgrad", "dgrad"} else part


class LazyNormed(Normed):
    """norm(x) of a tile by its statistics, as the fused ops take it; its values are made where something asks for them.

    `stats` of x's rows, if somebody has them.
    """

    def __init__(self, norm: Norm, w: Weights, x: Tensor, dtype: torch.dtype, stats: Stats | None = None) -> None:
        self._norm, self.w, self.x, self.dtype = norm, w, x, dtype
        self.stats = row_statistics(norm, x) if stats is None else stats

    @functools.cached_property
    def h(self) -> Tensor:  # type: ignore[override]
        return self._norm.forward(self.w, self.x)[0].to(self.dtype)

    @property
    def args(self) -> tuple[Any, ...]:
        """x, mean, rstd, weight, bias."""
        mean = self.stats[0] if len(self.stats) == 2 else None
        weight, bias = (*(self.w[n] for n in self._norm.parameters), None)[:2]
        return self.x, mean, self.stats[-1], weight, bias


def row_statistics(norm: Norm, x: Tensor) -> Stats:
    """As the norm's forward has them."""
    centered = isinstance(norm, LayerNorm)
    return ops.row_statistics(x, centered, norm.eps)[0 if centered else 1 :]


def _add_normed_gradients(linear: Linear, dy: Tensor, normed: Normed, grads: WeightGradients) -> None:
    assert isinstance(normed, LazyNormed)
    grads.add_normed_product(linear.weight, dy, normed.args)
    grads.add_rows(linear.bias, dy)


def _summed_input_gradient(w: Weights, linears: list[Linear], dys: list[Tensor], out: Tensor) -> None:
    ops.linears_input_grad_(dys, [w[linear.weight] for linear in linears], out)


class FusedQkv(Qkv):
    """`Qkv` by `norm_qkv_`, where "qkv" is chosen, `norm_wgrad_` with "wgrad", `linears_input_grad_` with "dgrad".

    A program has some heads: QK-norm over all of them at once stays with the library.
    """

    def __init__(self, spec: BlockSpec, fused: Fused, *totals: Total) -> None:
        super().__init__(spec, *totals)
        self._fused = fused - {"qkv"} if spec.qk_norm == "full" else fused

    def forward(
        self, w: Weights, tile: Tile, q: Tensor | None, k: Tensor | None, v: Tensor | None, ws: Workspace
    ) -> None:
        made = next((t for t in (q, k, v) if t is not None), None)
        if "qkv" not in self._fused or made is None:
            super().forward(w, tile, q, k, v, ws)
            return
        scales = (w.get(f"{ATTENTION}.{n}_norm.weight") for n in "qk")
        after = (*scales, *self._options(tile.positions, made.dtype))
        raw = (tile.kept.get("q"), tile.kept.get("k"))
        normed = LazyNormed(self.norm, w, tile.x, made.dtype)
        ops.norm_qkv_(*normed.args, *self._weights(w), *after, q, k, v, *raw)

    def finish(self, w: Weights, positions: Positions, parts: list[tuple[str, Tensor, Tensor]]) -> None:
        if "qkv" not in self._fused or not self.spec.qk_norm:
            super().finish(w, positions, parts)
            return
        for name, source, target in parts:
            options = self._options(positions, target.dtype)
            ops.qk_finish_(source, w[f"{ATTENTION}.{name}_norm.weight"], *options, target)

    def _normed(self, w: Weights, x: Tensor, dtype: torch.dtype) -> Normed:
        if not self._fused & {"qkv", "wgrad"}:
            return super()._normed(w, x, dtype)
        return LazyNormed(self.norm, w, x, dtype)

    def _raw(
        self, w: Weights, tile: Tile, normed: Normed, like: tuple[Tensor, Tensor], ws: Workspace
    ) -> tuple[Tensor, Tensor]:
        if "q" in tile.kept or "qkv" not in self._fused:
            return super()._raw(w, tile, normed, like, ws)
        assert isinstance(normed, LazyNormed)
        q, k = (ws.get(f"raw_{n}", tuple(t.shape), t.dtype) for n, t in zip("qk", like, strict=True))
        nothing_after = (None, None, self.spec.norm_eps, None, None, False, self.spec.head_dim)
        ops.norm_qkv_(*normed.args, *self._weights(w), *nothing_after, q, k, None, None, None)
        return q, k

    def _add_gradients(
        self, w: Weights, tile: Tile, linear: Linear, dy: Tensor, normed: Normed, grads: WeightGradients, ws: Workspace
    ) -> None:
        if "wgrad" in self._fused:
            _add_normed_gradients(linear, dy, normed, grads)
        else:
            super()._add_gradients(w, tile, linear, dy, normed, grads, ws)

    def _input_gradient(self, w: Weights, tile: Tile, dys: list[Tensor], out: Tensor, ws: Workspace) -> None:
        if "dgrad" in self._fused:
            _summed_input_gradient(w, self.projections, dys, out)
        else:
            super()._input_gradient(w, tile, dys, out, ws)

    def _weights(self, w: Weights) -> tuple[Any, ...]:
        return (*(w[p.weight] for p in self.projections), *(w.get(p.bias) for p in self.projections))


@dataclasses.dataclass
class Kept:
    """In place of `Hidden`: what the fused backward starts from, with gate and up only where a save set kept them."""

    normed: LazyNormed
    gate: Tensor | None
    up: Tensor | None


class FusedMlp(Mlp):
    """`Mlp` by `norm_mlp_` and `norm_mlp_bwd_`, where "mlp" is chosen, `norm_wgrad_` with "wgrad", and so on.

    gate and up exist in registers alone, unless a save set keeps them.
    """

    def __init__(self, spec: BlockSpec, fused: Fused, total: Total = alone) -> None:
        super().__init__(spec, total)
        self._fused = fused if spec.gated else fused - {"dgrad"}  # one product is no sum

    def forward(self, w: Weights, tile: Tile, x: Tensor, dtype: torch.dtype, ws: Workspace) -> Tensor:
        if "mlp" not in self._fused:
            return super().forward(w, tile, x, dtype, ws)
        return self._activated(self._lazy(w, tile, x, dtype), ws, tile.kept.get("gate"), tile.kept.get("up"))

    def remake(self, w: Weights, tile: Tile, x: Tensor, dtype: torch.dtype, ws: Workspace) -> Any:
        if "mlp" not in self._fused:
            return super().remake(w, tile, x, dtype, ws)
        return Kept(self._lazy(w, tile, x, dtype), tile.kept.get("gate"), tile.kept.get("up"))

    def activation(self, hidden: Any, ws: Workspace) -> Tensor:
        return super().activation(hidden, ws) if isinstance(hidden, Hidden) else self._activated(hidden.normed, ws)

    def _backward_inside(
        self, w: Weights, tile: Tile, hidden: Any, d: Tensor, ws: Workspace
    ) -> tuple[Tensor, list[Tensor]]:
        if isinstance(hidden, Hidden):
            return super()._backward_inside(w, tile, hidden, d, ws)
        shape = (d.shape[0], self.spec.d_ff)
        act, *inner = (ws.get(n, shape, d.dtype) for n in ("act", *(("gate", "up") if self.spec.gated else ("up",))))
        given = (*hidden.normed.args, *self._weights(w), self.spec.mlp, hidden.gate, hidden.up)
        dgate = inner[0] if self.spec.gated else None
        ops.norm_mlp_bwd_(d, w[self.down.weight], *given, act, dgate, inner[-1])
        return act, inner

    def _activated(
        self, normed: LazyNormed, ws: Workspace, gate: Tensor | None = None, up: Tensor | None = None
    ) -> Tensor:
        act = ws.get("act", (normed.x.shape[0], self.spec.d_ff), normed.dtype)
        ops.norm_mlp_(*normed.args, *self._weights(normed.w), self.spec.mlp, act, gate, up)
        return act

    def _normed(self, w: Weights, tile: Tile, x: Tensor, dtype: torch.dtype) -> Normed:
        if not self._fused & {"mlp", "wgrad"}:
            return super()._normed(w, tile, x, dtype)
        return self._lazy(w, tile, x, dtype)

    def _lazy(self, w: Weights, tile: Tile, x: Tensor, dtype: torch.dtype) -> LazyNormed:
        return LazyNormed(self.norm, w, x, dtype, tile.statistics)

    def _add_gradients(
        self, w: Weights, tile: Tile, linear: Linear, dy: Tensor, normed: Normed, grads: WeightGradients, ws: Workspace
    ) -> None:
        if "wgrad" in self._fused:
            _add_normed_gradients(linear, dy, normed, grads)
        else:
            super()._add_gradients(w, tile, linear, dy, normed, grads, ws)

    def _input_gradient(self, w: Weights, tile: Tile, dys: list[Tensor], out: Tensor, ws: Workspace) -> None:
        if "dgrad" in self._fused:
            _summed_input_gradient(w, self.projections, dys, out)
        else:
            super()._input_gradient(w, tile, dys, out, ws)

    def _weights(self, w: Weights) -> tuple[Any, ...]:
        names = (f"{MLP}.{n}_proj.{kind}" for n in ("gate", "up") for kind in ("weight", "bias"))
        return tuple(w.get(n) for n in names)


class FusedBranch(Branch):
    """`Branch` with product, bias and residual in one kernel, unless something is dropped between them.

    It leaves the statistics of the sum's rows in the tile, for `following`, the norm that reads the sum.
    """

    def __init__(self, *args: Any, following: Norm | None = None) -> None:
        super().__init__(*args)
        self._following = None if isinstance(following, NoNorm) else following

    def _add(self, w: Weights, tile: Tile, x: Tensor, residual: Tensor, out: Tensor, ws: Workspace) -> None:
        centered = isinstance(self._following, LayerNorm)
        eps = 0.0 if self._following is None else self._following.eps
        given = (x, w[self.linear.weight], w.get(self.linear.bias), residual, out)
        mean, rstd = ops.linear_residual_(*given, self._following is not None, centered, eps)
        if self._following is not None:
            tile.statistics = (mean, rstd) if centered else (rstd,)
