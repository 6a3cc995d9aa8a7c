"""The inside of the MLP: norm, gate and up projections, activation. Its down projection ends a `Branch`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pyckpt.ops.direct import ops
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.linear import Linear, input_gradient
from pyckpt.tokenwise.norm import Normed, norm_of
from pyckpt.tokenwise.parameters import MLP, norm_names
from pyckpt.tokenwise.tensor_parallel import Total, alone
from pyckpt.tokenwise.workspace import Workspace

DOWN = f"{MLP}.down_proj"


@dataclasses.dataclass
class Hidden:
    """What a tile's MLP has made: the norm's output, and the pre-activations (t, d_ff)."""

    normed: Normed
    gate: Tensor | None
    up: Tensor


class Mlp:
    """act(gate) * up, or act(up), of norm(x), and the backward that starts from the down projection's output.

    `total`: of the gradient of the norm's output, of which a process makes a share.
    """

    def __init__(self, spec: BlockSpec, total: Total = alone) -> None:
        self.spec, self._total = spec, total
        self.norm = norm_of(spec, norm_names(spec).mlp)
        self.projections = [Linear(spec, f"{MLP}.{n}_proj") for n in (("gate", "up") if spec.gated else ("up",))]
        self.down = Linear(spec, DOWN)
        self.parameters = tuple(n for linear in self.projections for n in linear.parameters)

    def forward(self, w: Weights, tile: Tile, x: Tensor, dtype: torch.dtype, ws: Workspace) -> Tensor:
        """The activation (t, d_ff), and what `tile.kept` asks for."""
        normed = self._normed(w, tile, x, dtype)
        hidden = Hidden(normed, *self._pre_activations(w, tile, normed.h, ws))
        if "up" in tile.kept:
            return self.activation(hidden, ws)
        return self._activate(hidden.up if hidden.gate is None else hidden.gate, hidden.up)

    def remake(self, w: Weights, tile: Tile, x: Tensor, dtype: torch.dtype, ws: Workspace) -> Hidden:
        """What the backward needs, in scratch memory, free to be overwritten."""
        normed = self._normed(w, tile, x, dtype)
        if "up" not in tile.kept:
            return Hidden(normed, *self._pre_activations(w, tile, normed.h, ws))
        copies = {}
        for name in ("gate", "up"):
            if name in tile.kept:
                copies[name] = ws.get(name, tuple(tile.kept[name].shape), dtype)
                copies[name].copy_(tile.kept[name])
        return Hidden(normed, copies.get("gate"), copies["up"])

    def activation(self, hidden: Hidden, ws: Workspace) -> Tensor:
        """The activation in memory of its own: the pre-activations stay."""
        act = ws.get("act", tuple(hidden.up.shape), hidden.up.dtype)
        act.copy_(hidden.up if hidden.gate is None else hidden.gate)
        return self._activate(act, hidden.up)

    def backward(
        self,
        w: Weights,
        tile: Tile,
        hidden: Hidden,
        x: Tensor,
        d: Tensor,
        dx: Tensor | None,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        """From d, the gradient of the down projection's output: its weight's gradient and those of all before it.

        The share of x's gradient is added to dx, or is not made where dx is None. Overwrites `hidden`.
        """
        act, dhidden = self._backward_inside(w, tile, hidden, d, ws)
        self.down.add_weight_gradients(w, tile, d, act, grads, ws)
        for linear, dinner in zip(self.projections, dhidden, strict=True):
            self._add_gradients(w, tile, linear, dinner, hidden.normed, grads, ws)
        if dx is not None:
            dh = ws.get("dh", tuple(x.shape), d.dtype)
            self._total(dh, lambda rows: self._input_gradient(w, tile, [d[rows] for d in dhidden], dh[rows], ws))
            self.norm.backward_add(w, dh, x, hidden.normed.stats, dx, grads)

    def _backward_inside(
        self, w: Weights, tile: Tile, hidden: Hidden, d: Tensor, ws: Workspace
    ) -> tuple[Tensor, list[Tensor]]:
        """The activation, and the gradients of what the projections have made."""
        up = hidden.up
        act = ws.get("act", tuple(up.shape), up.dtype)
        input_gradient(w, tile, [self.down], [d], act, ws)
        # In place: the activation's gradient becomes the activation, gate and up become their gradients.
        if hidden.gate is None:
            ops.act_bwd_(act, up, self.spec.mlp)
            return act, [up]
        ops.glu_bwd_(act, hidden.gate, up, self.spec.mlp)
        return act, [hidden.gate, up]

    def _normed(self, w: Weights, tile: Tile, x: Tensor, dtype: torch.dtype) -> Normed:
        return Normed(self.norm, w, x, dtype)

    def _add_gradients(
        self, w: Weights, tile: Tile, linear: Linear, dy: Tensor, normed: Normed, grads: WeightGradients, ws: Workspace
    ) -> None:
        linear.add_gradients(w, tile, dy, normed.h, grads, ws)

    def _input_gradient(self, w: Weights, tile: Tile, dys: list[Tensor], out: Tensor, ws: Workspace) -> None:
        input_gradient(w, tile, self.projections, dys, out, ws)

    def _pre_activations(self, w: Weights, tile: Tile, h: Tensor, ws: Workspace) -> tuple[Tensor | None, Tensor]:
        shape = (h.shape[0], self.spec.d_ff)
        made = []
        for linear in self.projections:
            key = linear.name.removeprefix(f"{MLP}.").removesuffix("_proj")
            made.append(tile.kept[key] if key in tile.kept else ws.get(key, shape, h.dtype))
            linear.forward(w, tile, h, made[-1], ws)
        return (None, made[0]) if len(made) == 1 else (made[0], made[1])

    def _activate(self, act: Tensor, up: Tensor) -> Tensor:
        """`act` holds gate, or up where there is no gate; in place."""
        if self.spec.gated:
            ops.glu_fwd_(act, up, self.spec.mlp)
        else:
            ops.act_fwd_(act, self.spec.mlp)
        return act
