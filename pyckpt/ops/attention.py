"""Attention with log-sum-exp, forward and backward: the ops.

Layouts: q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), o (B, Sq, H, Dv), lse (B, H, Sq); packed,
with `cu_seqlens` int32 of length N + 1: (T, H, D) and lse (H, T). lse is float32 (float64 for float64 inputs)
and -inf for a query that sees no key, whose o and gradients are 0.

Query i stands at i + Sk - Sq on the keys' axis; with `top_left`, at i. Packed, queries and keys have starts of
their own, and a sequence may have none of either.

Sinks (H,) are keys without a value, one for each head. ALiBi slopes are (H,) or (B, H). Dropout draws by `philox`
from the seed and positions alone.

The ``torch`` implementation is in `attention_torch`, the ``cpp`` one, with the same four functions, in `attention_cpp`:
the ops that compute attention take either as `kernels`. The ``triton`` one is in `attention_triton`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyckpt.ops import attention_torch
from pyckpt.ops.attention_torch import Gradients, Score, lse_like
from pyckpt.ops.direct import ops
from pyckpt.ops.registry import autograd, define

_EXTRAS = "Tensor? alibi_slopes=None, float dropout=0.0, SymInt? seed=None"
_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int window_left, int window_right, float softcap, float scale, "
    f"Tensor? sinks=None, {_EXTRAS}, bool top_left=False"
)
_TILE_OPTIONS = (
    "int window_left, int window_right, float softcap, float scale, SymInt q_start, SymInt k_start, "
    f"{_EXTRAS}, SymInt first_sequence=0"
)


# --- whole sequences ----------------------------------------------------------------------------------------


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse_like(q)


@define(f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", fake=_fwd_fake)
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
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    top_left: bool = False,
    kernels: Any = attention_torch,
) -> tuple[Tensor, Tensor]:
    """(o, lse); see the module's docstring for the layouts."""
    score = Score(softcap, scale, sinks, alibi_slopes, dropout, seed)
    window = (window_left, window_right)
    return kernels.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, window, score, top_left)


def _bwd_fake(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@define(
    "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? dlse, "
    f"{_OPTIONS}, Tensor? delta=None) -> (Tensor, Tensor, Tensor)",
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
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    top_left: bool = False,
    delta: Tensor | None = None,
    kernels: Any = attention_torch,
) -> Gradients:
    """(dq, dk, dv). Any o and lse may be given: with a global lse the result is these keys' exact share.

    `delta` may hold what `attention_delta` would make of do and o; there must be no dlse then.
    """
    score = Score(softcap, scale, sinks, alibi_slopes, dropout, seed)
    window = (window_left, window_right)
    return kernels.backward(do, q, k, v, o, lse, dlse, cu_seqlens_q, cu_seqlens_k, window, score, top_left)


# --- tiles of a sequence that is somewhere else -------------------------------------------------------------


def _delta_fake(do: Tensor, o: Tensor, dlse: Tensor | None) -> Tensor:
    return lse_like(o)


@define("attention_delta(Tensor do, Tensor o, Tensor? dlse) -> Tensor", fake=_delta_fake)
def attention_delta(do: Tensor, o: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(do * o) - dlse, laid out like lse: what the backward needs of o."""
    return attention_torch.delta_of(do, o, dlse)


def _nothing(*args: Any) -> None:
    return None


@define(
    "attention_tile_fwd_(Tensor q, Tensor k, Tensor v, Tensor(a!) o, Tensor(b!) lse, " + _TILE_OPTIONS + ") -> ()",
    fake=_nothing,
)
def attention_tile_fwd_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    q_start: int,
    k_start: int,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    first_sequence: int = 0,
    kernels: Any = attention_torch,
) -> None:
    """Attend from queries at positions q_start... to keys at k_start..., merging into a running (o, lse).

    o (B, Sq, H, Dv) and lse are float32 (float64 for float64 inputs). They begin as 0 and -inf, or, with sinks, as
    0 and the sinks. `first_sequence` is the number, in the whole batch, of the first of these B sequences: dropout
    draws by it.
    """
    score = Score(softcap, scale, None, alibi_slopes, dropout, seed, first_sequence, k_start)
    kernels.tile_forward(q, k, v, o, lse, (window_left, window_right), score, q_start)


@define(
    "attention_tile_bwd_(Tensor do, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, "
    f"Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, {_TILE_OPTIONS}, Tensor? o=None) -> ()",
    fake=_nothing,
)
def attention_tile_bwd_(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    q_start: int,
    k_start: int,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    first_sequence: int = 0,
    o: Tensor | None = None,
    kernels: Any = attention_torch,
) -> None:
    """Add this pair of tiles' share to dq, dk, dv: float32 (float64 for float64 inputs), of q's, k's, v's shapes.

    lse and delta are those of the whole sequence's keys, and so is o, the queries' output. Given o, PyTorch's CPU
    flash kernel can serve, which makes delta itself.
    """
    score = Score(softcap, scale, None, alibi_slopes, dropout, seed, first_sequence, k_start)
    window = (window_left, window_right)
    kernels.tile_backward(do, q, k, v, o, lse, delta, dq, dk, dv, window, score, q_start)


@define(
    "attention_merge_(Tensor(a!) o, Tensor(b!) lse, Tensor part_o, Tensor part_lse) -> ()",
    fake=_nothing,
)
def attention_merge_(o: Tensor, lse: Tensor, part_o: Tensor, part_lse: Tensor) -> None:
    """Make of attention to some keys, (o, lse), that to all, from (part_o, part_lse) of the others.

    Layouts as in `attention_fwd`; o is of part_o's dtype or of lse's. With lse = -inf a part has no share, and its o is
    to be 0.
    """
    attention_torch.merge(o, lse, part_o, part_lse)


# --- autograd -----------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, cu_q, cu_k, left, right, softcap, scale, sinks, slopes, *ctx.rest = inputs
    ctx.options = (left, right, softcap, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, sinks, slopes)


def _autograd_backward(ctx, do, dlse):  # type: ignore[no-untyped-def]
    q, k, v, o, lse, cu_q, cu_k, sinks, slopes = ctx.saved_tensors
    if do is None and dlse is None:
        return (None,) * 14
    do = torch.zeros_like(o) if do is None else do
    extras = (sinks, slopes, *ctx.rest)
    dq, dk, dv = ops.attention_bwd(do, q, k, v, o, lse, dlse, cu_q, cu_k, *ctx.options, *extras)
    dsinks = None
    if sinks is not None and ctx.needs_input_grad[9]:
        dsinks = sinks_backward(sinks, lse, ops.attention_delta(do, o, dlse))
    return dq, dk, dv, None, None, None, None, None, None, dsinks, None, None, None, None


def sinks_backward(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """A sink's probability p takes part in every row's sum, and has no value: its score's gradient is -p delta."""
    p = torch.exp(sinks.to(lse.dtype).view(-1, 1) - lse).masked_fill(lse == float("-inf"), 0.0)
    by_head = (p * delta).transpose(-1, -2).flatten(0, -2).sum(0)
    return by_head.neg().to(sinks.dtype)


autograd("attention_fwd", _autograd_backward, _setup)


def _flops(q_shape, k_shape, v_shape, matmuls_qk: int, matmuls_v: int) -> int:  # type: ignore[no-untyped-def]
    # Counts as PyTorch counts SDPA: the whole Sq x Sk rectangle. Shapes alone do not tell packed lengths.
    *lead, heads, d = q_shape
    pairs = lead[0] * lead[1] * k_shape[1] if len(lead) == 2 else lead[0] * k_shape[0]
    return 2 * pairs * heads * (matmuls_qk * d + matmuls_v * v_shape[-1])


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(torch.ops.pyckpt.attention_fwd)
    def forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return _flops(q_shape, k_shape, v_shape, 1, 1)

    @register_flop_formula(torch.ops.pyckpt.attention_bwd)
    def backward_flops(do, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return _flops(q_shape, k_shape, v_shape, 3, 2)


_register_flops()
