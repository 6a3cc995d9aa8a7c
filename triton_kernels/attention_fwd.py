"""The forward kernel: one tile of queries against the keys it sees, softmax online.

Milakov & Gimelshein 2018, algorithm 3, tiled as in Dao 2023 (FlashAttention-2), algorithm 1. A running
(o, lse) given at the start is one more block of keys; a sink is a key without a value.
"""

import triton
import triton.language as tl

from .attention_tile import (
    LENGTHS,
    LN2,
    capped,
    exponential,
    kept,
    load_rows,
    load_tile,
    locate,
    number,
    split_program,
    store_tile,
    unit,
    visible,
    visit_range,
)


@triton.jit
def _attend(
    acc,  # [BM, BDV] float32, not yet divided by l
    m,  # [BM] running maximum
    l,  # [BM] running sum
    b_q,  # [BM, BD]
    p_k,
    p_v,
    stride_ks,
    stride_vs,
    lo,
    hi,
    sk,
    o_p,  # [BM] positions of the queries on the keys' axis
    left,
    right,
    scale,
    softcap,
    slope,
    seed,
    threshold,
    sequence,
    drawn,  # the sequence's number, by which dropout draws
    head,
    kv_head,
    k_start,
    head_dim,
    value_dim,
    MASKED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    PLAIN_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RAGGED_D: tl.constexpr,
    RAGGED_DV: tl.constexpr,
):
    """Add the keys [lo, hi) to the running softmax."""
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    for j in tl.range(lo, hi, BLOCK_N, warp_specialize=SPECIALIZE):
        o_j = j + tl.arange(0, BLOCK_N)
        b_k = load_rows(
            p_k, sequence, j, kv_head, o_j, o_d, stride_ks, sk, head_dim, MASKED, RAGGED_D, TMA, BLOCK_N, BLOCK_D
        )  # [BN, BD]
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if PLAIN_SCALE:
            factor = scale * unit(PRECISION)
        else:
            if SOFTCAP:
                s = capped(s, scale, softcap, PRECISION)[0]
            else:
                s = s * scale
            if ALIBI:
                s -= slope * tl.abs(o_p[:, None] - o_j[None, :]).to(tl.float32)
            factor = unit(PRECISION)
        if MASKED:
            s = tl.where(visible(o_p[:, None], o_j[None, :], sk, left, right, LEFT, RIGHT), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * factor)
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        p = exponential(s * factor - m_safe[:, None], PRECISION)
        alpha = exponential(m - m_safe, PRECISION)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if DROPOUT:
            m_kept = kept(seed, drawn, head, (k_start + o_p)[:, None], (k_start + o_j)[None, :], threshold)
            p = tl.where(m_kept, p, 0.0)
        b_v = load_rows(
            p_v, sequence, j, kv_head, o_j, o_dv, stride_vs, sk, value_dim, MASKED, RAGGED_DV, TMA, BLOCK_N, BLOCK_DV
        )  # [BN, BDV]
        acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
        m = m_new
    return acc, m, l


@triton.jit
def _attend_tile(
    pid,
    given,  # the kernel's arguments up to its constants
    PACKED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    SINKS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PLAIN_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RAGGED_D: tl.constexpr,
    RAGGED_DV: tl.constexpr,
):
    """o and lse of one tile of queries of one head."""
    (
        p_q, p_k, p_v, p_o, p_lse, p_sinks, p_slopes, p_cu_q, p_cu_k, stride_qb, stride_qs, stride_qh,
        stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
        stride_lb, stride_lh, stride_slopes, n_heads, groups, n_sequences, n_rows, n_tiles, section, sq, sk,
        diagonal, k_start, left, right, head_dim, value_dim, scale, softcap, keep_factor, threshold, seed,
    ) = given  # fmt: skip
    tile, row = split_program(pid, n_tiles, n_rows, section, RIGHT)
    head, sequence, i, n_q, n_k, shift, batch, token, key = locate(
        tile, row, n_heads, p_cu_q, p_cu_k, n_sequences, sq, sk, diagonal, PACKED, False, BLOCK_M
    )
    drawn = number(sequence, n_sequences, PACKED)
    if i < n_q:
        head_64 = head.to(tl.int64)
        kv_head = head // groups
        p_q_row = p_q + (batch * stride_qb + token * stride_qs + head_64 * stride_qh)
        p_o_row = p_o + (batch * stride_ob + token * stride_os + head_64 * stride_oh)
        p_lse_row = p_lse + (batch * stride_lb + token + head_64 * stride_lh)
        p_k_row, p_v_row = p_k, p_v
        if not TMA:
            p_k_row += batch * stride_kb + key * stride_ks + kv_head.to(tl.int64) * stride_kh
            p_v_row += batch * stride_vb + key * stride_vs + kv_head.to(tl.int64) * stride_vh

        o_i = i + tl.arange(0, BLOCK_M)
        o_p = o_i + shift
        o_d = tl.arange(0, BLOCK_D)
        o_dv = tl.arange(0, BLOCK_DV)
        b_q = load_tile(p_q_row, o_i, o_d, stride_qs, n_q, head_dim, True, RAGGED_D)  # [BM, BD]
        slope = 0.0
        if ALIBI:
            slope = tl.load(p_slopes + sequence * stride_slopes + head).to(tl.float32)

        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        if SINKS:
            m = tl.zeros([BLOCK_M], tl.float32) + tl.load(p_sinks + head).to(tl.float32) * unit(PRECISION)
            l += 1.0
        if ACCUMULATE:
            m = tl.load(p_lse_row + o_i, mask=o_i < n_q, other=float("-inf")) * unit(PRECISION)
            l = tl.where(m == float("-inf"), 0.0, 1.0)
            acc = load_tile(p_o_row, o_i, o_dv, stride_os, n_q, value_dim, True, RAGGED_DV or True) / keep_factor

        stop = tl.minimum(i + BLOCK_M, n_q)
        lo, full_lo, full_hi, hi = visit_range(i, stop, shift, n_k, left, right, LEFT, RIGHT, BLOCK_N)
        if LEFT:
            acc, m, l = _attend(
                acc, m, l, b_q, p_k_row, p_v_row, stride_ks, stride_vs, lo, tl.minimum(full_lo, hi), n_k,
                o_p, left, right, scale, softcap, slope, seed, threshold, sequence, drawn, head, kv_head, k_start,
                head_dim, value_dim,
                True, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, PLAIN_SCALE, PRECISION, TMA, SPECIALIZE,
                BLOCK_N, BLOCK_D, BLOCK_DV, RAGGED_D, RAGGED_DV,
            )  # fmt: skip
        acc, m, l = _attend(
            acc, m, l, b_q, p_k_row, p_v_row, stride_ks, stride_vs, full_lo, full_hi, n_k, o_p, left, right,
            scale, softcap, slope, seed, threshold, sequence, drawn, head, kv_head, k_start, head_dim, value_dim,
            False, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, PLAIN_SCALE, PRECISION, TMA, SPECIALIZE,
            BLOCK_N, BLOCK_D, BLOCK_DV, RAGGED_D, RAGGED_DV,
        )  # fmt: skip
        acc, m, l = _attend(
            acc, m, l, b_q, p_k_row, p_v_row, stride_ks, stride_vs, full_hi, hi, n_k, o_p, left, right,
            scale, softcap, slope, seed, threshold, sequence, drawn, head, kv_head, k_start, head_dim, value_dim,
            True, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, PLAIN_SCALE, PRECISION, TMA, SPECIALIZE,
            BLOCK_N, BLOCK_D, BLOCK_DV, RAGGED_D, RAGGED_DV,
        )  # fmt: skip

        # Where no key was seen l is 0 and m is -inf: o = 0, lse = -inf.
        l = tl.where(l == 0.0, 1.0, l)
        b_o = acc * (keep_factor / l)[:, None]
        store_tile(p_o_row, b_o, o_i, o_dv, stride_os, n_q, value_dim, False, RAGGED_DV)
        tl.store(p_lse_row + o_i, m / unit(PRECISION) + tl.log2(l) * LN2, mask=o_i < n_q)


@triton.jit(do_not_specialize=LENGTHS)
def attention_fwd_kernel_tile(
    p_q,
    p_k,
    p_v,
    p_o,
    p_lse,
    p_sinks,
    p_slopes,
    p_cu_q,
    p_cu_k,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lb,
    stride_lh,
    stride_slopes,
    n_heads,
    groups,
    n_sequences,
    n_rows,
    n_tiles,
    section,
    sq,
    sk,
    diagonal,
    k_start,
    left,
    right,
    head_dim,
    value_dim,
    scale,
    softcap,
    keep_factor,
    threshold,
    seed: tl.int64,
    PACKED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    SINKS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PLAIN_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RAGGED_D: tl.constexpr,
    RAGGED_DV: tl.constexpr,
):
    """o and lse of BLOCK_M queries of one head; with ACCUMULATE, merged into those that are there.

    SPECIALIZE gives loads, products and softmax warps of their own, where Triton can (Blackwell, with TMA).
    With PERSISTENT, a program takes one tile after another, one of each num_programs, from the longest on.
    With TMA, p_k and p_v are tensor descriptors, and the batch is not packed.
    """
    given = (
        p_q, p_k, p_v, p_o, p_lse, p_sinks, p_slopes, p_cu_q, p_cu_k, stride_qb, stride_qs, stride_qh,
        stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
        stride_lb, stride_lh, stride_slopes, n_heads, groups, n_sequences, n_rows, n_tiles, section, sq, sk,
        diagonal, k_start, left, right, head_dim, value_dim, scale, softcap, keep_factor, threshold, seed,
    )  # fmt: skip
    if PERSISTENT:
        n_programs = tl.num_programs(0)
        for turn in tl.range(0, tl.cdiv(n_tiles * n_rows, n_programs)):
            # Forwards and backwards by turns, or the first program would have the longest tile of every turn.
            place = tl.program_id(0) if turn % 2 == 0 else n_programs - 1 - tl.program_id(0)
            pid = turn * n_programs + place
            if pid < n_tiles * n_rows:
                _attend_tile(
                    pid, given,
                    PACKED, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, SINKS, ACCUMULATE, PLAIN_SCALE, PRECISION, TMA,
                    SPECIALIZE, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, RAGGED_D, RAGGED_DV,
                )  # fmt: skip
    else:
        _attend_tile(
            tl.program_id(0), given,
            PACKED, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, SINKS, ACCUMULATE, PLAIN_SCALE, PRECISION, TMA, SPECIALIZE,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, RAGGED_D, RAGGED_DV,
        )  # fmt: skip
