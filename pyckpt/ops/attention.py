"""Attention with log-sum-exp, forward and backward: the ops and their PyTorch implementation.

Layouts: q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), o (B, Sq, H, Dv), lse (B, H, Sq); packed,
with `cu_seqlens` int32 of length N + 1: (T, H, D) and lse (H, T). lse is float32 (float64 for float64 inputs)
and -inf for a query that sees no key, whose o and gradients are 0.

Two ways to compute, both without an Sq x Sk matrix:

- PyTorch's CPU flash kernels, whole where the mask is none or square causal, else one query tile at a time
  against the keys it sees, under an explicit mask of that tile;
- an exact tiled form in plain matrix products, for all others (softcap, Dv != D, a gradient of lse, other
  devices).

The backward is that of Dao et al. 2022, algorithm 4: P from lse, delta = rowsum(do * o).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyckpt.ops.chunks import acc_dtype
from pyckpt.ops.masking import Mask
from pyckpt.ops.registry import autograd, define

aten = torch.ops.aten
ops = torch.ops.pyckpt

_FLASH_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FLASH_TILE = 512
_SCORE_ELEMENTS = 1 << 24

Gradients = tuple[Tensor, Tensor, Tensor]


# --- the ops ------------------------------------------------------------------------------------------------

_ARGS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int window_left, int window_right, float softcap, float scale"


def _lse_like(q: Tensor) -> Tensor:
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(shape, dtype=acc_dtype(q.dtype))


def _fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), _lse_like(q)


@define(f"attention_fwd(Tensor q, Tensor k, Tensor v, {_ARGS}) -> (Tensor, Tensor)", fake=_fwd_fake)
def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(o, lse); see the module's docstring for the layouts."""
    o, lse = q.new_empty((*q.shape[:-1], v.shape[-1])), _lse_like(q)
    for part in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        mask = Mask(part.q.stop - part.q.start, part.k.stop - part.k.start, window_left, window_right)
        _forward(part.rows(q), part.keys(k), part.keys(v), mask, softcap, scale, part.rows(o), part.statistics(lse))
    return o, lse


def _bwd_fake(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@define(
    "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? dlse, "
    f"{_ARGS}) -> (Tensor, Tensor, Tensor)",
    fake=_bwd_fake,
)
def attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
) -> Gradients:
    """(dq, dk, dv). Any o and lse may be given: with a global lse the result is these keys' exact share."""
    if cu_seqlens_q is None and dlse is None:
        mask = Mask(q.shape[1], k.shape[1], window_left, window_right)
        if _flash_serves(q, v, softcap) and (mask.full or mask.square_causal):
            return _flash_backward(do, q, k, v, o, lse, mask, scale)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for part in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        mask = Mask(part.q.stop - part.q.start, part.k.stop - part.k.start, window_left, window_right)
        grads = _backward(
            part.rows(do),
            part.rows(q),
            part.keys(k),
            part.keys(v),
            part.rows(o),
            part.statistics(lse),
            None if dlse is None else part.statistics(dlse),
            mask,
            softcap,
            scale,
        )
        for whole, grad, cut in zip((dq, dk, dv), grads, (part.rows, part.keys, part.keys), strict=True):
            cut(whole).copy_(grad)
    return dq, dk, dv


class _Sequence:
    """One sequence of a packed batch, or a whole dense batch: cuts it out of the tensors, as (B, S, H, D)."""

    def __init__(self, q: slice, k: slice, packed: bool) -> None:
        self.q, self.k, self.packed = q, k, packed

    def rows(self, t: Tensor) -> Tensor:
        return t[self.q].unsqueeze(0) if self.packed else t

    def keys(self, t: Tensor) -> Tensor:
        return t[self.k].unsqueeze(0) if self.packed else t

    def statistics(self, t: Tensor) -> Tensor:
        return t[:, self.q].unsqueeze(0) if self.packed else t


def _sequences(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Iterator[_Sequence]:
    if cu_q is None:
        yield _Sequence(slice(0, q.shape[1]), slice(0, k.shape[1]), packed=False)
        return
    starts_q = cu_q.tolist()
    starts_k = starts_q if cu_k is None else cu_k.tolist()
    for i in range(len(starts_q) - 1):
        if starts_q[i + 1] > starts_q[i] or starts_k[i + 1] > starts_k[i]:
            yield _Sequence(slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1]), packed=True)


def _flash_serves(q: Tensor, v: Tensor, softcap: float) -> bool:
    return q.device.type == "cpu" and q.dtype in _FLASH_DTYPES and softcap == 0.0 and q.shape[-1] == v.shape[-1]


# --- one dense batch ----------------------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, softcap: float, scale: float, o: Tensor, lse: Tensor) -> None:
    if mask.sq == 0:
        return
    # The flash kernel divides by zero on an empty batch of keys.
    if mask.sk == 0 or q.shape[0] == 0:
        o.zero_()
        lse.fill_(float("-inf"))
    elif _flash_serves(q, v, softcap):
        _flash_forward(q, k, v, mask, scale, o, lse)
    else:
        _tiled_forward(q, k, v, mask, softcap, scale, o, lse)


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    mask: Mask,
    softcap: float,
    scale: float,
) -> Gradients:
    if mask.sq == 0 or mask.sk == 0 or q.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if dlse is None and _flash_serves(q, v, softcap):
        return _flash_backward(do, q, k, v, o, lse, mask, scale)
    return _tiled_backward(do, q, k, v, o, lse, dlse, mask, softcap, scale)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


# --- PyTorch's flash kernels --------------------------------------------------------------------------------


def _flash_tiles(mask: Mask, q: Tensor) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(queries, keys, additive mask) of each query tile that sees some key."""
    for start in range(0, mask.sq, _FLASH_TILE):
        stop = min(start + _FLASH_TILE, mask.sq)
        lo, hi = mask.keys(start, stop)
        if lo >= hi:
            continue
        visible = mask.tile(start, stop, lo, hi, q.device)
        bias = None
        if visible is not None:
            # In q's own dtype: the kernel reads a float32 mask as float64 when q is float64.
            bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
        yield slice(start, stop), slice(lo, hi), bias


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, o: Tensor, lse: Tensor) -> None:
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    qh, kh, vh = _heads_first(q, k, v)
    if mask.full or mask.square_causal:
        oh, stats = flash(qh, kh, vh, 0.0, not mask.full, scale=scale)
        o.copy_(oh.transpose(1, 2))
        lse.copy_(stats)
        return
    o.zero_()
    lse.fill_(float("-inf"))
    for rows, keys, bias in _flash_tiles(mask, q):
        oh, stats = flash(qh[:, :, rows], kh[:, :, keys], vh[:, :, keys], 0.0, False, attn_mask=bias, scale=scale)
        o[:, rows] = oh.transpose(1, 2)
        lse[:, :, rows] = stats
    blind = mask.blind_rows(q.device)
    if blind is not None:
        lse.masked_fill_(blind, float("-inf"))


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Mask, scale: float
) -> Gradients:
    flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
    doh, qh, kh, vh, oh = _heads_first(do.contiguous(), q, k, v, o)
    if mask.full or mask.square_causal:
        grads = flash(doh, qh, kh, vh, oh, lse, 0.0, not mask.full, scale=scale)
        dq, dk, dv = (g.transpose(1, 2).contiguous() for g in grads)
        return dq, dk, dv
    acc = acc_dtype(q.dtype)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(t.shape, dtype=acc) for t in (k, v))
    # A row that sees nothing has lse = -inf, and exp(-inf + inf) is NaN; with 0 it is exp(-inf) = 0.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    for rows, keys, bias in _flash_tiles(mask, q):
        dq_t, dk_t, dv_t = flash(
            doh[:, :, rows],
            qh[:, :, rows],
            kh[:, :, keys],
            vh[:, :, keys],
            oh[:, :, rows],
            lse[:, :, rows],
            0.0,
            False,
            attn_mask=bias,
            scale=scale,
        )
        dq[:, rows] = dq_t.transpose(1, 2)
        dk[:, keys] += dk_t.transpose(1, 2)
        dv[:, keys] += dv_t.transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# --- exact, tiled, in plain matrix products -----------------------------------------------------------------


def _tiles(mask: Mask, q: Tensor) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(queries, keys, hidden) of each query tile that sees some key; its scores stay under a fixed size."""
    batch, _, heads, _ = q.shape
    start = 0
    while start < mask.sq:
        widest = max(1, min(mask.sk, mask.keys(start, min(start + 512, mask.sq))[1] - mask.keys(start, start + 1)[0]))
        stop = min(mask.sq, start + max(1, min(512, _SCORE_ELEMENTS // (batch * heads * widest))))
        lo, hi = mask.keys(start, stop)
        if lo < hi:
            visible = mask.tile(start, stop, lo, hi, q.device)
            yield slice(start, stop), slice(lo, hi), None if visible is None else ~visible
        start = stop


def _grouped(t: Tensor, groups: int, acc: torch.dtype) -> Tensor:
    """(B, s, H, D) -> (B, Hkv, G * s, D): the query heads that share a key/value head side by side."""
    b, s, h, d = t.shape
    return t.to(acc).reshape(b, s, h // groups, groups, d).permute(0, 2, 3, 1, 4).reshape(b, h // groups, -1, d)


def _ungrouped(t: Tensor, groups: int) -> Tensor:
    """The inverse of `_grouped`, as a view."""
    b, h, gs, d = t.shape
    return t.view(b, h, groups, gs // groups, d).permute(0, 3, 1, 2, 4).reshape(b, gs // groups, h * groups, d)


def _scores(
    q: Tensor, k: Tensor, hidden: Tensor | None, groups: int, softcap: float, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Masked scores (B, Hkv, G * tq, tk), and the softcap's derivative where there is one."""
    s = torch.matmul(q, k.transpose(-1, -2)).mul_(scale)
    slope = None
    if softcap:
        t = s.div_(softcap).tanh_()
        slope = 1.0 - t * t
        s = t * softcap
    if hidden is not None:
        s.view(*s.shape[:2], groups, -1, s.shape[-1]).masked_fill_(hidden, float("-inf"))
    return s, slope


def _tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, softcap: float, scale: float, o: Tensor, lse: Tensor
) -> None:
    acc, groups = acc_dtype(q.dtype), q.shape[2] // k.shape[2]
    o.zero_()
    lse.fill_(float("-inf"))
    for rows, keys, hidden in _tiles(mask, q):
        kt, vt = (t[:, keys].to(acc).transpose(1, 2) for t in (k, v))
        s, _ = _scores(_grouped(q[:, rows], groups, acc), kt, hidden, groups, softcap, scale)
        stats = torch.logsumexp(s, dim=-1, keepdim=True)
        p = s.sub_(stats.masked_fill(stats == float("-inf"), 0.0)).exp_()
        o[:, rows] = _ungrouped(torch.matmul(p, vt), groups).to(o.dtype)
        lse[:, :, rows] = _ungrouped(stats, groups).squeeze(-1).transpose(1, 2)


def _tiled_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    mask: Mask,
    softcap: float,
    scale: float,
) -> Gradients:
    acc, groups = acc_dtype(q.dtype), q.shape[2] // k.shape[2]
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(t.shape, dtype=acc, device=t.device).transpose(1, 2) for t in (k, v))
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    for rows, keys, hidden in _tiles(mask, q):
        qt, dot, ot = (_grouped(t[:, rows], groups, acc) for t in (q, do, o))
        kt, vt = (t[:, keys].to(acc).transpose(1, 2) for t in (k, v))
        delta = (dot * ot).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= _grouped(dlse[:, :, rows].transpose(1, 2).unsqueeze(-1), groups, acc)
        s, slope = _scores(qt, kt, hidden, groups, softcap, scale)
        p = s.sub_(_grouped(lse[:, :, rows].transpose(1, 2).unsqueeze(-1), groups, acc)).exp_()
        dv[:, :, keys] += torch.matmul(p.transpose(-1, -2), dot)
        ds = torch.matmul(dot, vt.transpose(-1, -2)).sub_(delta).mul_(p).mul_(scale)
        if slope is not None:
            ds.mul_(slope)
        dk[:, :, keys] += torch.matmul(ds.transpose(-1, -2), qt)
        dq[:, rows] = _ungrouped(torch.matmul(ds, kt), groups).to(dq.dtype)
    return dq, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)


# --- autograd -----------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, cu_q, cu_k, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _autograd_backward(ctx, do, dlse):  # type: ignore[no-untyped-def]
    q, k, v, o, lse, cu_q, cu_k = ctx.saved_tensors
    nothing = (None,) * (2 + len(ctx.options))
    if do is None and dlse is None:
        return None, None, None, *nothing
    do = torch.zeros_like(o) if do is None else do
    dq, dk, dv = ops.attention_bwd(do, q, k, v, o, lse, dlse, cu_q, cu_k, *ctx.options)
    return dq, dk, dv, *nothing


autograd("attention_fwd", _autograd_backward, _setup)


def _flops(q_shape, k_shape, v_shape, matmuls_qk: int, matmuls_v: int) -> int:  # type: ignore[no-untyped-def]
    # Counts as PyTorch counts SDPA: the whole Sq x Sk rectangle. Shapes alone do not tell packed lengths.
    *lead, heads, d = q_shape
    pairs = lead[0] * lead[1] * k_shape[1] if len(lead) == 2 else lead[0] * k_shape[0]
    return 2 * pairs * heads * (matmuls_qk * d + matmuls_v * v_shape[-1])


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(ops.attention_fwd)
    def forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return _flops(q_shape, k_shape, v_shape, 1, 1)

    @register_flop_formula(ops.attention_bwd)
    def backward_flops(do, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return _flops(q_shape, k_shape, v_shape, 3, 2)


_register_flops()
