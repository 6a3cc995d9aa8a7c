"""Merging attention to some keys with attention to others, in place: one pass over the outputs.

With a = lse, b = lse of the part and m = max(a, b): o = (e^(a-m) o + e^(b-m) part) / (e^(a-m) + e^(b-m)), as in ring
attention (Liu et al. 2023) and FlashAttention's split over keys (Dao 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .rows import check_device, on
from .sizes import cdiv, next_power_of_2

ELEMENTS = 4096  # of a program's tile
WARPS = 4


@triton.jit
def attention_merge_kernel(
    p_o,
    p_lse,
    p_part,
    p_part_lse,
    tokens,
    dim,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_pb,
    stride_pt,
    stride_ph,
    stride_lb,
    stride_lh,
    stride_mb,
    stride_mh,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program takes TOKENS of one head of one sequence. lse (B, H, S) with a unit last stride, o (B, S, H, D) too."""
    ACC: tl.constexpr = p_lse.dtype.element_ty
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    o_t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    o_c = tl.arange(0, COLUMNS)
    m_t = o_t < tokens
    m = m_t[:, None] & (o_c < dim)[None, :]
    p_old = p_lse + batch * stride_lb + head * stride_lh + o_t
    a = tl.load(p_old, mask=m_t, other=float("-inf"))
    b = tl.load(p_part_lse + batch * stride_mb + head * stride_mh + o_t, mask=m_t, other=float("-inf"))
    most = tl.maximum(a, b)
    nothing = most == float("-inf")
    at = tl.where(nothing, 0.0, most)  # exp(-inf - -inf) would be NaN
    of_old, of_part = tl.exp(a - at), tl.exp(b - at)
    whole = tl.where(nothing, 1.0, of_old + of_part)
    p_rows = p_o + batch * stride_ob + head * stride_oh + o_t[:, None] * stride_ot + o_c[None, :]
    p_parts = p_part + batch * stride_pb + head * stride_ph + o_t[:, None] * stride_pt + o_c[None, :]
    old, part = tl.load(p_rows, mask=m).to(ACC), tl.load(p_parts, mask=m).to(ACC)
    merged = old * (of_old / whole)[:, None] + part * (of_part / whole)[:, None]
    tl.store(p_rows, merged.to(p_o.dtype.element_ty), mask=m)
    tl.debug_barrier()  # every warp has read lse before one writes it
    tl.store(p_old, tl.where(nothing, float("-inf"), most + tl.log(whole)), mask=m_t)


def tile(dim: int) -> tuple[int, int]:
    """(TOKENS, COLUMNS) of a program."""
    columns = max(16, next_power_of_2(dim))
    return max(1, ELEMENTS // columns), columns


def merge(o: Tensor, lse: Tensor, part_o: Tensor, part_lse: Tensor) -> None:
    """Merge (part_o, part_lse) into (o, lse), in place; o (B, S, H, D) or (T, H, D), lse (B, H, S) or (H, T).

    o is of part_o's dtype or of lse's. Strides are any with a unit last one.
    """
    check_device(part_o)
    if o.dim() == 3:
        o, lse, part_o, part_lse = (t.unsqueeze(0) for t in (o, lse, part_o, part_lse))
    if o.numel() == 0:
        return
    for name, t in (("o", o), ("lse", lse), ("part_o", part_o), ("part_lse", part_lse)):
        if t.stride(-1) != 1 and t.shape[-1] != 1:
            raise ValueError(f"{name} must have a unit last stride, got strides {t.stride()}")
    batch, tokens, heads, dim = o.shape
    count, columns = tile(dim)
    with on(o.device):
        attention_merge_kernel[(cdiv(tokens, count), heads, batch)](
            o,
            lse,
            part_o,
            part_lse,
            tokens,
            dim,
            *o.stride()[:3],
            *part_o.stride()[:3],
            *lse.stride()[:2],
            *part_lse.stride()[:2],
            TOKENS=count,
            COLUMNS=columns,
            num_warps=WARPS,
        )
