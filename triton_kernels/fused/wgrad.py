"""The gradient of a weight behind a norm: dyᵀ norm(x), the normalised x made as it is loaded and never stored."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..rows import on
from ..sizes import cdiv
from . import choice
from .matrices import Normed, check_matrix, options
from .tiles import GROUP, load, load_statistics, normalised, place


@triton.jit(do_not_specialize=["tokens"])
def wgrad_kernel_tile(
    p_x,
    p_mean,
    p_rstd,
    p_norm,
    p_norm_bias,
    p_dy,
    p_out,
    tokens,
    d_out,
    width,
    stride_x,
    stride_dy,
    stride_out,
    CENTERED: tl.constexpr,
    RAGGED: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out [BLOCK_M rows of the weight, BLOCK_N of its columns] = dyᵀ norm(x), summed over all tokens; added if ADD."""
    i, j = place(tl.cdiv(d_out, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    o_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    mm, mn = o_m < d_out, o_n < width
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, tokens, BLOCK_K):
        o_t = start + tl.arange(0, BLOCK_K)
        mt = o_t < tokens
        mean, rstd = load_statistics(p_mean, p_rstd, o_t, mt, CENTERED)
        dy = load(p_dy, o_t, o_m, stride_dy, mt, mm, RAGGED)  # [BLOCK_K, BLOCK_M]
        x = load(p_x, o_t, o_n, stride_x, mt, mn, RAGGED)  # [BLOCK_K, BLOCK_N]
        h = normalised(x, p_norm, p_norm_bias, mean, rstd, o_n, mn, CENTERED, RAGGED, dy.dtype)
        acc = tl.dot(tl.trans(dy), h, acc, input_precision=PRECISION)
    m = mm[:, None] & mn[None, :]
    p_to = p_out + o_m.to(tl.int64)[:, None] * stride_out + o_n[None, :]
    if ADD:
        acc += tl.load(p_to, mask=m, other=0.0).to(tl.float32)
    tl.store(p_to, acc.to(p_out.dtype.element_ty), mask=m)


def weight_gradient(dy: Tensor, normed: Normed, out: Tensor, *, add: bool) -> None:
    """Write dyᵀ norm(x) to out (n, width), or add it if `add`; dy (t, n) has the dtype norm(x) is rounded to.

    out may be wider than dy (an fp32 accumulator). One program sums over all tokens, in order.
    """
    tokens, d_out = dy.shape
    normed.check()
    check_matrix("dy", dy, (normed.x.shape[0], d_out))
    check_matrix("out", out, (d_out, normed.width))
    config = choice.config(choice.key("wgrad", normed.width, dy.dtype, dy.device))
    grid = cdiv(d_out, config.block_m) * cdiv(normed.width, config.block_n)
    if grid == 0:
        return
    with on(dy.device):
        wgrad_kernel_tile[(grid,)](
            **normed.pointers(),
            p_dy=dy,
            p_out=out,
            tokens=tokens,
            d_out=d_out,
            width=normed.width,
            stride_x=normed.x.stride(0),
            stride_dy=dy.stride(0),
            stride_out=out.stride(0),
            CENTERED=normed.mean is not None,
            RAGGED=d_out % config.block_m != 0 or normed.width % config.block_n != 0,
            ADD=add,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP=GROUP,
            **options(config, dy.dtype),
        )
