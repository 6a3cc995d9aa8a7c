"""norm, q, k and v, QK-norm and RoPE in one kernel: the same one in the forward and when the backward makes them again.

A program takes some tokens and some heads, of q, k or v. RoPE turns pairs of a head's values, so a head's first halves
and second halves are two products over the same normalised x (of the weight's rows that hold them): the rotation is
then between two accumulators of one layout. What RoPE leaves alone is paired too, and turned by nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..norm import reciprocal_root
from ..rows import on
from ..sizes import cdiv, next_power_of_2
from . import choice
from .matrices import Normed, check_matrix, check_vector, options
from .pairs import load_pairs, pair_columns, store_pairs
from .tiles import GROUP, load, load_statistics, load_transposed, normalised, place, tree_sum

FINISH_ROWS, _FINISH_COLUMNS = 16, 128  # of a program of `finish_stored`


@triton.jit
def finish(
    a,
    b,
    p_weight,
    p_cos,
    p_sin,
    o_m,
    mm,
    o_n,
    col_a,
    col_b,
    m_pair,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """QK-norm and RoPE of the pairs (a, b) [ROWS, HEADS * HALF], which hold 0 where not m_pair; each rounded to DTYPE.

    The same bits from a product's accumulators and from stored values.
    """
    if NORM:
        a, b = a.to(tl.float32), b.to(tl.float32)
        squares = tl.reshape(a * a + b * b, (ROWS * HEADS, HALF))
        squares = tree_sum(squares, ROWS * HEADS, HALF, LEVELS)
        rstd = reciprocal_root(squares / HEAD_DIM + EPS, tl.float32)
        rstd = tl.reshape(tl.broadcast_to(rstd[:, None], (ROWS * HEADS, HALF)), (ROWS, HEADS * HALF))
        wa = tl.load(p_weight + col_a, mask=m_pair, other=0.0).to(tl.float32)
        wb = tl.load(p_weight + col_b, mask=m_pair, other=0.0).to(tl.float32)
        a, b = (a * rstd * wa[None, :]).to(DTYPE), (b * rstd * wb[None, :]).to(DTYPE)
    if ROPE:
        a, b = a.to(tl.float32), b.to(tl.float32)
        pair = o_n % HALF
        turned = mm[:, None] & (pair < ROTATED // 2)[None, :]
        p_angle = o_m.to(tl.int64)[:, None] * (ROTATED // 2) + pair[None, :]
        cos = tl.load(p_cos + p_angle, mask=turned, other=1.0)
        sin = tl.load(p_sin + p_angle, mask=turned, other=0.0)
        a, b = a * cos - b * sin, b * cos + a * sin
    return a.to(DTYPE), b.to(DTYPE)


@triton.jit(do_not_specialize=["tokens"])
def qkv_fwd_kernel_heads(
    p_x,
    p_mean,
    p_rstd,
    p_norm,
    p_norm_bias,
    p_wq,
    p_wk,
    p_wv,
    p_bq,
    p_bk,
    p_bv,
    p_q_norm,
    p_k_norm,
    p_cos,
    p_sin,
    p_q,
    p_k,
    p_v,
    p_raw_q,
    p_raw_k,
    tokens,
    width,
    heads_q,
    heads_kv,
    stride_x,
    stride_wq,
    stride_wk,
    stride_wv,
    stride_q,
    stride_k,
    stride_v,
    stride_raw_q,
    stride_raw_k,
    EPS: tl.constexpr,
    CENTERED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """HEADS heads of q, k or v for BLOCK_M tokens; p_raw_q and p_raw_k get q and k as they are before QK-norm."""
    DTYPE: tl.constexpr = p_wq.dtype.element_ty
    QK_NORM: tl.constexpr = p_q_norm is not None
    ROPE: tl.constexpr = p_cos is not None
    BLOCK_N: tl.constexpr = HEADS * HALF
    groups_q, groups_kv = tl.cdiv(heads_q, HEADS), tl.cdiv(heads_kv, HEADS)
    # Without v (what a backward wants raw) there are no programs for it.
    kinds = 1 if p_v is None else 2
    i, j = place(tl.cdiv(tokens, BLOCK_M), groups_q + kinds * groups_kv, GROUP)
    of_q = j < groups_q
    of_v = j >= groups_q + groups_kv
    first = (j if of_q else (j - groups_q) % tl.maximum(groups_kv, 1)) * HEADS
    heads = heads_q if of_q else heads_kv
    p_w, stride_w = p_wk, stride_wk
    if of_q:
        p_w, stride_w = p_wq, stride_wq
    elif of_v:
        p_w, stride_w = p_wv, stride_wv

    o_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    mm = o_m < tokens
    local, col_a, col_b = pair_columns(o_n, HEAD_DIM, ROTATED, INTERLEAVED, HALF)
    head = first + local
    mn = (head < heads) & (o_n % HALF < HEAD_DIM // 2)
    row = head * HEAD_DIM
    mean, rstd = load_statistics(p_mean, p_rstd, o_m, mm, CENTERED)
    a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        mk = o_k < width
        x = load(p_x, o_m, o_k, stride_x, mm, mk, RAGGED)  # [BLOCK_M, BLOCK_K]
        h = normalised(x, p_norm, p_norm_bias, mean, rstd, o_k, mk, CENTERED, RAGGED, DTYPE)
        w = load_transposed(p_w, row + col_a, o_k, stride_w, mn, mk, RAGGED)  # [BLOCK_K, BLOCK_N]
        a = tl.dot(h, w, a, input_precision=PRECISION)
        w = load_transposed(p_w, row + col_b, o_k, stride_w, mn, mk, RAGGED)
        b = tl.dot(h, w, b, input_precision=PRECISION)
    if p_bq is not None:
        p_bias = p_bk
        if of_q:
            p_bias = p_bq
        elif of_v:
            p_bias = p_bv
        a += tl.load(p_bias + row + col_a, mask=mn, other=0.0).to(tl.float32)[None, :]
        b += tl.load(p_bias + row + col_b, mask=mn, other=0.0).to(tl.float32)[None, :]
    a, b = a.to(DTYPE), b.to(DTYPE)
    if of_v:
        if p_v is not None:
            store_pairs(
                p_v, a, b, o_m, first, heads, col_a, col_b, mm, mn, stride_v,
                HEAD_DIM, ROTATED, INTERLEAVED, BLOCK_M, HEADS, HALF,
            )  # fmt: skip
    else:
        if p_raw_q is not None:
            p_raw, stride_raw = p_raw_k, stride_raw_k
            if of_q:
                p_raw, stride_raw = p_raw_q, stride_raw_q
            store_pairs(
                p_raw, a, b, o_m, first, heads, col_a, col_b, mm, mn, stride_raw,
                HEAD_DIM, ROTATED, INTERLEAVED, BLOCK_M, HEADS, HALF,
            )  # fmt: skip
        p_scale = p_k_norm
        p_out, stride_out = p_k, stride_k
        if of_q:
            p_out, stride_out = p_q, stride_q
            p_scale = p_q_norm
        a, b = finish(
            a, b, p_scale, p_cos, p_sin, o_m, mm, o_n, col_a, col_b, mn,
            EPS, QK_NORM, ROPE, DTYPE, HEAD_DIM, ROTATED, BLOCK_M, HEADS, HALF, LEVELS,
        )  # fmt: skip
        store_pairs(
            p_out, a, b, o_m, first, heads, col_a, col_b, mm, mn, stride_out,
            HEAD_DIM, ROTATED, INTERLEAVED, BLOCK_M, HEADS, HALF,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def qk_finish_kernel_heads(
    p_raw,
    p_weight,
    p_cos,
    p_sin,
    p_out,
    tokens,
    heads,
    stride_raw,
    stride_out,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """QK-norm and RoPE of stored q or k: the bits of `qkv_fwd_kernel_heads`."""
    groups = tl.cdiv(heads, HEADS)
    pid = tl.program_id(0)
    i, j = pid // groups, pid % groups
    BLOCK_N: tl.constexpr = HEADS * HALF
    first = j * HEADS
    o_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    mm = o_m < tokens
    local, col_a, col_b = pair_columns(o_n, HEAD_DIM, ROTATED, INTERLEAVED, HALF)
    head = first + local
    mn = (head < heads) & (o_n % HALF < HEAD_DIM // 2)
    a, b = load_pairs(
        p_raw, o_m, first, heads, col_a, col_b, mm, mn, stride_raw,
        HEAD_DIM, ROTATED, INTERLEAVED, BLOCK_M, HEADS, HALF,
    )  # fmt: skip
    a, b = finish(
        a, b, p_weight, p_cos, p_sin, o_m, mm, o_n, col_a, col_b, mn,
        EPS, True, p_cos is not None, p_out.dtype.element_ty, HEAD_DIM, ROTATED, BLOCK_M, HEADS, HALF, LEVELS,
    )  # fmt: skip
    store_pairs(
        p_out, a, b, o_m, first, heads, col_a, col_b, mm, mn, stride_out,
        HEAD_DIM, ROTATED, INTERLEAVED, BLOCK_M, HEADS, HALF,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Finish:
    """What q and k get after their product: QK-norm's weights (head_dim,), or None; RoPE's tables (t, r/2), or None."""

    head_dim: int
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False

    @property
    def rotated(self) -> int:
        """How many of a head's values RoPE turns."""
        return self.head_dim if self.cos is None else 2 * self.cos.shape[1]

    def check(self, tokens: int) -> None:
        if self.head_dim % 2 or self.rotated > self.head_dim or (self.head_dim - self.rotated) % 2:
            raise ValueError(f"head_dim {self.head_dim} with {self.rotated} rotated values: the kernel takes pairs")
        for name, t in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            check_vector(name, t, self.head_dim)
        for name, t in (("cos", self.cos), ("sin", self.sin)):
            if t is not None and (tuple(t.shape) != (tokens, self.rotated // 2) or not t.is_contiguous()):
                raise ValueError(f"{name} must be contiguous ({tokens}, {self.rotated // 2}), got {tuple(t.shape)}")

    def heads(self, columns: int) -> int:
        """How many heads a matrix of so many columns has; raises ValueError for a part of one."""
        if columns % self.head_dim:
            raise ValueError(f"{columns} columns of q or k: expected a multiple of head_dim {self.head_dim}")
        return columns // self.head_dim

    def pairing(self) -> dict[str, Any]:
        """Constants of the kernels that go by pairs of a head's values."""
        return {
            "EPS": self.eps,
            "HEAD_DIM": self.head_dim,
            "ROTATED": self.rotated,
            "INTERLEAVED": self.interleaved,
            "HALF": max(16, next_power_of_2(self.head_dim // 2)),
        }

    def constants(self, block_n: int) -> dict[str, Any]:
        """Constants of the kernels whose programs have about block_n columns."""
        pairing = self.pairing()
        half = pairing["HALF"]
        return {**pairing, "HEADS": max(1, block_n // (2 * half)), "LEVELS": half.bit_length() - 1}


def forward(
    normed: Normed,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    after: Finish,
    outs: tuple[Tensor | None, Tensor | None, Tensor | None],
    raw: tuple[Tensor | None, Tensor | None] | None = None,
) -> None:
    """Write q (t, H * head_dim), k and v (t, Hkv * head_dim); q and k as they are before `after` to `raw` too.

    weights (out, width) of q, k, v. What is None is not made, and neither is its raw form; v only goes with k. Biases
    are there for all or none.
    """
    tokens = normed.x.shape[0]
    normed.check()
    after.check(tokens)
    for name, w, out, bias in zip("qkv", weights, outs, biases, strict=True):
        check_matrix(f"the weight of {name}", w, (w.shape[0], normed.width), weights[0])
        check_vector(f"the bias of {name}", bias, w.shape[0])
        if out is not None:
            check_matrix(name, out, (tokens, w.shape[0]), w)
    for name, w, out in zip("qk", weights, raw or (), strict=False):
        if out is not None:
            check_matrix(f"raw {name}", out, (tokens, w.shape[0]), w)
    q, k, v = outs
    if v is not None and k is None:
        raise ValueError("v is made with k: give both, or k alone")
    heads = [0 if t is None else w.shape[0] // after.head_dim for w, t in zip(weights, outs, strict=True)]
    if tokens == 0:
        return
    config = choice.config(choice.key("qkv", normed.width, weights[0].dtype, weights[0].device))
    constants = after.constants(config.block_n)
    block_m = config.rows(2 * constants["HALF"])
    programs = sum(cdiv(n, constants["HEADS"]) for n in heads)
    with on(normed.x.device):
        qkv_fwd_kernel_heads[(cdiv(tokens, block_m) * programs,)](
            **normed.pointers(),
            **_named("p_w", weights),
            **_named("p_b", biases),
            p_q_norm=after.q_norm,
            p_k_norm=after.k_norm,
            p_cos=after.cos,
            p_sin=after.sin,
            # No program writes to what stands in for q or k: it has no heads.
            **_named("p_", (k if q is None else q, q if k is None else k, v)),
            **_named("p_raw_", _both(raw)),
            tokens=tokens,
            width=normed.width,
            heads_q=heads[0],
            heads_kv=heads[1],
            stride_x=normed.x.stride(0),
            **_strides("stride_w", weights),
            **_strides("stride_", outs),
            **_strides("stride_raw_", _both(raw)),
            CENTERED=normed.mean is not None,
            RAGGED=normed.width % config.block_k != 0,
            BLOCK_M=block_m,
            BLOCK_K=config.block_k,
            GROUP=GROUP,
            **constants,
            **options(config, weights[0].dtype),
        )


def _both(raw: tuple[Tensor | None, Tensor | None] | None) -> tuple[Tensor | None, Tensor | None]:
    """The raw q and k, one standing in for the other where that is not made."""
    q, k = raw or (None, None)
    return (k if q is None else q), (q if k is None else k)


def finish_stored(raw: Tensor, weight: Tensor, after: Finish, out: Tensor) -> None:
    """Write `after` of a raw q or k (t, heads * head_dim) to out, with `forward`'s bits. weight is QK-norm's."""
    tokens, columns = raw.shape
    after.check(tokens)
    check_matrix("raw", raw, (tokens, columns))
    check_matrix("out", out, (tokens, columns), raw)
    constants = after.constants(_FINISH_COLUMNS)
    heads = after.heads(columns)
    if tokens == 0:
        return
    with on(raw.device):
        qk_finish_kernel_heads[(cdiv(tokens, FINISH_ROWS) * cdiv(heads, constants["HEADS"]),)](
            raw,
            weight,
            after.cos,
            after.sin,
            out,
            tokens,
            heads,
            raw.stride(0),
            out.stride(0),
            BLOCK_M=FINISH_ROWS,
            num_warps=4,
            enable_fp_fusion=False,
            **constants,
        )


def _named(prefix: str, tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    return {f"{prefix}{name}": t for name, t in zip("qkv", tensors, strict=False)}


def _strides(prefix: str, tensors: tuple[Tensor | None, ...]) -> dict[str, int]:
    return {name: 0 if t is None else t.stride(0) for name, t in _named(prefix, tensors).items()}
