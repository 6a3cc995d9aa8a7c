"""Dropout by Philox on absolute positions, and the residual beside it, in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .rows import check_device, on, rows_of, rows_to_write
from .sizes import cdiv

BLOCK = 1024
WARPS = 4


@triton.jit(do_not_specialize=["first", "threshold", "seed"])
def dropout_kernel(
    p_x,
    p_res,
    p_out,
    width,
    first: tl.int64,
    seed: tl.int64,
    threshold,
    stride_x,
    stride_r,
    stride_o,
    KEEP_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = residual + KEEP_FACTOR x where kept. A row's words: counter (column // 4, row), column modulo 4."""
    ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    row = pid // blocks
    start = (pid % blocks) * BLOCK
    o_c = start + tl.arange(0, BLOCK)
    m = o_c < width
    position = first + row
    c = ((start // 4) + tl.arange(0, BLOCK // 4)).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, c, c * 0 + position.to(tl.int32), c * 0 + (position >> 32).to(tl.int32), c * 0)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    kept = (words >> 1).to(tl.int32) >= threshold
    x = tl.load(p_x + row * stride_x + o_c, mask=m).to(ACC)
    y = tl.where(kept, x * KEEP_FACTOR, 0.0)
    if p_res is not None:
        y += tl.load(p_res + row * stride_r + o_c, mask=m).to(ACC)
    tl.store(p_out + row * stride_o + o_c, y.to(p_out.dtype.element_ty), mask=m)


def dropout(
    x: Tensor, residual: Tensor | None, out: Tensor, threshold: int, keep_factor: float, seed: int, first: int
) -> None:
    """Write residual + dropout(x) to out (t, n), which may be x. `first` is the absolute number of x's first row.

    A value is kept where the upper 31 bits of its word reach `threshold`.
    """
    check_device(x)
    if x.numel() == 0:
        return
    a, b, o = rows_of(x), None if residual is None else rows_of(residual), rows_to_write(out)
    with on(x.device):
        dropout_kernel[(a.shape[0] * cdiv(a.shape[1], BLOCK),)](
            a,
            b,
            o,
            a.shape[1],
            first,
            seed,
            threshold,
            a.stride(0),
            0 if b is None else b.stride(0),
            o.stride(0),
            KEEP_FACTOR=keep_factor,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
