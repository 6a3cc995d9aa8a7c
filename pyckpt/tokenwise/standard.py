"""The hand-written tokenwise parts of the standard pre-norm block.

    pre:   q, k, v = rope(norm(x) Wqkvᵀ)
    post:  mid = x + o Woᵀ;  y = mid + MLP(norm(mid))    (dropout on both summands)

Backward of `post` for a tile: mid, its norm, gate and up are made again (or read, if kept); the down projection is
not: nothing needs its output. Backward of `pre`: the norm is made again; q and k only where QK-norm needs them raw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.ops import philox
from pyckpt.ops.rope import rope_tables
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.workspace import Workspace

ops = torch.ops.pyckpt

INPUT_NORM = "input_layernorm"
POST_NORM = "post_attention_layernorm"
ATTENTION = "self_attn"
# Where dropout draws its own numbers; attention's probabilities take site 0.
ATTENTION_SITE, MLP_SITE = 1, 2


def parameter_shapes(spec: BlockSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter of a standard block with its shape, in the order of a Hugging Face Llama decoder layer."""
    d, f = spec.d_model, spec.d_ff
    linears = {
        f"{ATTENTION}.q_proj": (spec.d_q, d),
        f"{ATTENTION}.k_proj": (spec.d_kv, d),
        f"{ATTENTION}.v_proj": (spec.d_kv, d),
        f"{ATTENTION}.o_proj": (d, spec.d_q),
        **({"mlp.gate_proj": (f, d)} if spec.gated else {}),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        shapes[f"{name}.weight"] = shape
        if spec.bias:
            shapes[f"{name}.bias"] = shape[:1]
    if spec.qk_norm:
        shapes[f"{ATTENTION}.q_norm.weight"] = shapes[f"{ATTENTION}.k_norm.weight"] = (spec.head_dim,)
    for name in (INPUT_NORM, POST_NORM):
        shapes[f"{name}.weight"] = (d,)
        if spec.norm == "layernorm":
            shapes[f"{name}.bias"] = (d,)
    return shapes


def pre_parameters(spec: BlockSpec) -> tuple[str, ...]:
    """The parameters whose gradient comes through q, k, v."""
    return tuple(n for n in parameter_shapes(spec) if n.startswith((INPUT_NORM, ATTENTION)) and ".o_proj" not in n)


class StandardTokenwise:
    """`Tokenwise` of a `BlockSpec`. Holds no tensors: weights come with every call."""

    def __init__(self, spec: BlockSpec) -> None:
        self.spec = spec

    def cast(self, w: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: t if "norm" in n else t.to(dtype) for n, t in w.items()}

    # --- forward ---

    def pre(self, w: Weights, tile: Tile, q: Tensor, k: Tensor, v: Tensor, ws: Workspace) -> None:
        h = _norm(self.spec, w, INPUT_NORM, tile.x)[0].to(q.dtype)
        raw = (tile.kept.get("q", q), tile.kept.get("k", k))
        for name, out in (("q_proj", raw[0]), ("k_proj", raw[1]), ("v_proj", v)):
            _linear(w, f"{ATTENTION}.{name}", h, out)
        self._finish_qk(w, tile.positions, raw, (q, k))

    def finish_kept(self, w: Weights, tile: Tile, q: Tensor, k: Tensor) -> None:
        """Fill the q and k that attention reads from the raw ones in `tile.kept`."""
        self._finish_qk(w, tile.positions, (tile.kept["q"], tile.kept["k"]), (q, k))

    def _finish_qk(self, w: Weights, positions: Tensor, raw: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor]) -> None:
        tables = self._rope_tables(positions, out[0].dtype)
        q, k = (_by_head(t, self.spec.head_dim) for t in out)
        if self.spec.qk_norm:
            for name, source, heads in zip(("q_norm", "k_norm"), raw, (q, k), strict=True):
                weight = w[f"{ATTENTION}.{name}.weight"]
                heads.copy_(ops.rms_norm_fwd(_by_head(source, self.spec.head_dim), weight, self.spec.norm_eps)[0])
        if tables is not None:
            ops.rope_qk_(q, k, *tables, False, False)

    def _rope_tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if self.spec.rope_theta is None:
            return None
        return rope_tables(
            positions,
            self.spec.head_dim,
            self.spec.rope_theta,
            self.spec.rope_scaling,
            torch.float64 if dtype == torch.float64 else torch.float32,
        )

    def post(self, w: Weights, tile: Tile, o: Tensor, y: Tensor, ws: Workspace) -> None:
        mid = self._mid(w, tile, o, ws)
        h = _norm(self.spec, w, POST_NORM, mid)[0].to(o.dtype)
        gate, up = self._pre_activations(w, tile, h, ws)
        if "up" in tile.kept:
            act = ws.get("act", tuple(up.shape), up.dtype)
            act.copy_(up if gate is None else gate)
        else:
            act = up if gate is None else gate
        if gate is None:
            ops.act_fwd_(act, self.spec.mlp)
        else:
            ops.glu_fwd_(act, up, self.spec.mlp)
        self._branch(w, "mlp.down_proj", MLP_SITE, tile, act, y, mid, ws)

    def _mid(self, w: Weights, tile: Tile, o: Tensor, ws: Workspace) -> Tensor:
        mid = tile.kept.get("mid")
        if mid is None:
            mid = ws.get("mid", tuple(tile.x.shape), tile.x.dtype)
        self._branch(w, f"{ATTENTION}.o_proj", ATTENTION_SITE, tile, o, mid, tile.x, ws)
        return mid

    def _branch(
        self,
        w: Weights,
        name: str,
        site: int,
        tile: Tile,
        x: Tensor,
        out: Tensor,
        residual: Tensor,
        ws: Workspace,
    ) -> None:
        """out = residual + dropout(x Wᵀ + bias)."""
        if not self._drops(tile):
            _linear(w, name, x, out, residual=residual)
            return
        made = ws.get("branch", tuple(out.shape), x.dtype)
        _linear(w, name, x, made)
        self._drop(site, tile, made, residual, out)

    def _drops(self, tile: Tile) -> bool:
        return tile.seed is not None and self.spec.dropout > 0.0

    def _drop(self, site: int, tile: Tile, x: Tensor, residual: Tensor | None, out: Tensor) -> None:
        assert tile.seed is not None
        ops.dropout_(x, residual, out, self.spec.dropout, philox.derive(tile.seed, site), tile.first)

    def _branch_gradient(self, site: int, tile: Tile, d: Tensor, dtype: torch.dtype, ws: Workspace) -> Tensor:
        """The gradient of what a branch adds, from that of the sum, in the dtype of the products."""
        if not self._drops(tile):
            return d.to(dtype)
        dropped = ws.get("dbranch", tuple(d.shape), dtype)
        self._drop(site, tile, d, None, dropped)
        return dropped

    def _pre_activations(self, w: Weights, tile: Tile, h: Tensor, ws: Workspace) -> tuple[Tensor | None, Tensor]:
        shape = (h.shape[0], self.spec.d_ff)
        gate = None
        if self.spec.gated:
            gate = tile.kept["gate"] if "gate" in tile.kept else ws.get("gate", shape, h.dtype)
            _linear(w, "mlp.gate_proj", h, gate)
        up = tile.kept["up"] if "up" in tile.kept else ws.get("up", shape, h.dtype)
        _linear(w, "mlp.up_proj", h, up)
        return gate, up

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
        mid = tile.kept["mid"] if "mid" in tile.kept else self._mid(w, tile, o, ws)
        dmid = dx if dx is not None else ws.get("dmid", tuple(dy.shape), dy.dtype)
        dmid.copy_(dy)
        branch = self._branch_gradient(MLP_SITE, tile, dy, o.dtype, ws)
        self._mlp_bwd(w, tile, mid, branch, dmid, do is not None or dx is not None, grads, ws)
        d = self._branch_gradient(ATTENTION_SITE, tile, dmid, o.dtype, ws)
        name = f"{ATTENTION}.o_proj"
        grads.add_product(f"{name}.weight", d, o)
        grads.add_rows(f"{name}.bias", d)
        if do is not None:
            torch.mm(d, w[f"{name}.weight"], out=do)

    def _mlp_bwd(
        self,
        w: Weights,
        tile: Tile,
        mid: Tensor,
        dy: Tensor,
        dmid: Tensor,
        beyond: bool,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        """Add the MLP's share of the gradient to dmid. `beyond`: something before the MLP needs a gradient."""
        names = [n for n in ("mlp.gate_proj", "mlp.up_proj") if f"{n}.weight" in w]
        hidden = [f"{n}.{kind}" for n in names for kind in ("weight", "bias")]
        norm = [f"{POST_NORM}.weight", f"{POST_NORM}.bias"]
        attention = [f"{ATTENTION}.o_proj.weight", f"{ATTENTION}.o_proj.bias"]
        inward = beyond or grads.wants(*norm, *attention)
        grads.add_rows("mlp.down_proj.bias", dy)
        if not (inward or grads.wants("mlp.down_proj.weight", *hidden)):
            return
        h, stats = _norm(self.spec, w, POST_NORM, mid)
        h = h.to(dy.dtype)
        gate, up = self._kept_or_made(w, tile, h, ws)
        dact = ws.get("dact", tuple(up.shape), up.dtype)
        torch.mm(dy, w["mlp.down_proj.weight"], out=dact)
        if gate is None:
            ops.act_bwd_(dact, up, self.spec.mlp)
        else:
            ops.glu_bwd_(dact, gate, up, self.spec.mlp)
        grads.add_product("mlp.down_proj.weight", dy, dact)
        inner = [up] if gate is None else [gate, up]
        for name, dinner in zip(names, inner, strict=True):
            grads.add_product(f"{name}.weight", dinner, h)
            grads.add_rows(f"{name}.bias", dinner)
        if inward:
            dh = ws.get("dh", tuple(h.shape), h.dtype)
            _sum_of_products(inner, [w[f"{n}.weight"] for n in names], dh)
            _norm_bwd_add(self.spec, w, POST_NORM, dh, mid, stats, dmid, grads)

    def _kept_or_made(self, w: Weights, tile: Tile, h: Tensor, ws: Workspace) -> tuple[Tensor | None, Tensor]:
        """gate and up in scratch memory, free to be overwritten."""
        if "up" not in tile.kept:
            return self._pre_activations(w, tile, h, ws)
        copies = {}
        for name in ("gate", "up"):
            if name in tile.kept:
                copies[name] = ws.get(name, tuple(tile.kept[name].shape), h.dtype)
                copies[name].copy_(tile.kept[name])
        return copies.get("gate"), copies["up"]

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
        h, stats = _norm(self.spec, w, INPUT_NORM, tile.x)
        h = h.to(dq.dtype)
        tables = self._rope_tables(tile.positions, dq.dtype)
        dim = self.spec.head_dim
        if tables is not None:
            ops.rope_qk_(_by_head(dq, dim), _by_head(dk, dim), *tables, True, False)
        if self.spec.qk_norm:
            for name, d in (("q", dq), ("k", dk)):
                self._qk_norm_bwd(w, tile, name, h, d, grads, ws)
        names = [f"{ATTENTION}.{n}_proj" for n in "qkv"]
        for name, d in zip(names, (dq, dk, dv), strict=True):
            grads.add_product(f"{name}.weight", d, h)
            grads.add_rows(f"{name}.bias", d)
        if dx is not None or grads.wants(f"{INPUT_NORM}.weight", f"{INPUT_NORM}.bias"):
            dh = ws.get("dh", tuple(h.shape), h.dtype)
            _sum_of_products([dq, dk, dv], [w[f"{n}.weight"] for n in names], dh)
            target = dx if dx is not None else ws.get("dx", tuple(tile.x.shape), tile.x.dtype).zero_()
            _norm_bwd_add(self.spec, w, INPUT_NORM, dh, tile.x, stats, target, grads)

    def _qk_norm_bwd(
        self, w: Weights, tile: Tile, name: str, h: Tensor, d: Tensor, grads: WeightGradients, ws: Workspace
    ) -> None:
        raw = tile.kept.get(name)
        if raw is None:
            raw = ws.get(f"raw_{name}", tuple(d.shape), d.dtype)
            _linear(w, f"{ATTENTION}.{name}_proj", h, raw)
        heads = _by_head(raw, self.spec.head_dim)
        key = f"{ATTENTION}.{name}_norm.weight"
        rstd = ops.rms_norm_fwd(heads, None, self.spec.norm_eps)[1]
        dheads, dw = ops.rms_norm_bwd(_by_head(d, self.spec.head_dim), heads, w[key], rstd, grads.wants(key))
        _by_head(d, self.spec.head_dim).copy_(dheads)
        grads.add(key, dw)


def _by_head(t: Tensor, head_dim: int) -> Tensor:
    return t.view(t.shape[0], -1, head_dim)


def _linear(w: Weights, name: str, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
    """out = residual + x Wᵀ + bias."""
    weight, bias = w[f"{name}.weight"].t(), w.get(f"{name}.bias")
    if residual is None:
        if bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(bias, x, weight, out=out)
    elif residual.dtype == x.dtype:
        torch.addmm(residual, x, weight, out=out)
        if bias is not None:
            out += bias
    else:
        # Autocast: the product in the low precision, the residual stream in its own.
        product = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
        torch.add(residual, product, out=out)


def _sum_of_products(lefts: list[Tensor], rights: list[Tensor], out: Tensor) -> None:
    torch.mm(lefts[0], rights[0], out=out)
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        # As an out= overload: FLOP counters know addmm and do not know addmm_.
        torch.addmm(out, left, right, out=out)


def _norm(spec: BlockSpec, w: Weights, name: str, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The normalised tile and its row statistics."""
    weight = w[f"{name}.weight"]
    if spec.norm == "rmsnorm":
        y, rstd = ops.rms_norm_fwd(x, weight, spec.norm_eps)
        return y, (rstd,)
    y, mean, rstd = ops.layer_norm_fwd(x, weight, w[f"{name}.bias"], spec.norm_eps)
    return y, (mean, rstd)


def _norm_bwd_add(
    spec: BlockSpec,
    w: Weights,
    name: str,
    dy: Tensor,
    x: Tensor,
    stats: tuple[Tensor, ...],
    dx: Tensor,
    grads: WeightGradients,
) -> None:
    weight, need = w[f"{name}.weight"], grads.wants(f"{name}.weight", f"{name}.bias")
    if spec.norm == "rmsnorm":
        grads.add(f"{name}.weight", ops.rms_norm_bwd_add_(dy, x, weight, *stats, dx, need))
        return
    dw, db = ops.layer_norm_bwd_add_(dy, x, weight, *stats, dx, need)
    grads.add(f"{name}.weight", dw)
    grads.add(f"{name}.bias", db)
