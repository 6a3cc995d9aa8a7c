"""The gradient of an x that several linear layers read: Σ dy W in one accumulator, rounded and written once.

The library makes a product for each layer, and every product after the first reads and writes the sum again.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..rows import on
from ..sizes import cdiv
from . import choice
from .matrices import check_matrix, options
from .tiles import GROUP, load, place


@triton.jit
def _added(
    acc, p_d, p_w, o_m, o_n, mm, mn, d_out, stride_d, stride_w, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + d W of a tile."""
    for start in range(0, d_out, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        mk = o_k < d_out
        d = load(p_d, o_m, o_k, stride_d, mm, mk, RAGGED)  # [BLOCK_M, BLOCK_K]
        w = load(p_w, o_k, o_n, stride_w, mk, mn, RAGGED)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(d, w, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["tokens"])
def dgrad_kernel_tile(
    p_d0,
    p_d1,
    p_d2,
    p_w0,
    p_w1,
    p_w2,
    p_out,
    tokens,
    width,
    d_out0,
    d_out1,
    d_out2,
    stride_d0,
    stride_d1,
    stride_d2,
    stride_w0,
    stride_w1,
    stride_w2,
    stride_out,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out [BLOCK_M tokens, BLOCK_N of the width] = d0 W0 + d1 W1 + d2 W2, of those that are there."""
    i, j = place(tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    o_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    mm, mn = o_m < tokens, o_n < width
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = _added(acc, p_d0, p_w0, o_m, o_n, mm, mn, d_out0, stride_d0, stride_w0, RAGGED, PRECISION, BLOCK_K)
    if p_d1 is not None:
        acc = _added(acc, p_d1, p_w1, o_m, o_n, mm, mn, d_out1, stride_d1, stride_w1, RAGGED, PRECISION, BLOCK_K)
    if p_d2 is not None:
        acc = _added(acc, p_d2, p_w2, o_m, o_n, mm, mn, d_out2, stride_d2, stride_w2, RAGGED, PRECISION, BLOCK_K)
    p_to = p_out + o_m.to(tl.int64)[:, None] * stride_out + o_n[None, :]
    tl.store(p_to, acc.to(p_out.dtype.element_ty), mask=mm[:, None] & mn[None, :])


def input_gradient(dys: list[Tensor], weights: list[Tensor], out: Tensor) -> None:
    """Write Σ dy W to out (t, width). dys (t, n) and weights (n, width), at most three, all of out's dtype."""
    if not 1 <= len(dys) == len(weights) <= 3:
        raise ValueError(f"{len(dys)} gradients and {len(weights)} weights: the kernel takes one to three pairs")
    tokens, width = out.shape
    check_matrix("out", out, (tokens, width))
    for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        check_matrix(f"gradient {i}", dy, (tokens, dy.shape[1]), out)
        check_matrix(f"weight {i}", weight, (dy.shape[1], width), out)
    config = choice.config(choice.key("dgrad", width, out.dtype, out.device))
    grid = cdiv(tokens, config.block_m) * cdiv(width, config.block_n)
    if grid == 0:
        return
    d_outs = [dy.shape[1] for dy in dys]
    ragged = width % config.block_n != 0 or any(n % config.block_k for n in d_outs)
    with on(out.device):
        dgrad_kernel_tile[(grid,)](
            *_three(dys),
            *_three(weights),
            out,
            tokens,
            width,
            *_three(d_outs, 0),
            *_three([dy.stride(0) for dy in dys], 0),
            *_three([weight.stride(0) for weight in weights], 0),
            out.stride(0),
            RAGGED=ragged,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP=GROUP,
            **options(config, out.dtype),
        )


def _three(values: list[Any], missing: Any = None) -> list[Any]:
    return values + [missing] * (3 - len(values))
