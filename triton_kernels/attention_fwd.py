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
    find_sequence,
    kept,
    load_rows,
    load_tile,
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RAGGED_D: tl.constexpr,
    RAGGED_DV: tl.constexpr,
):
    """Add the keys [lo, hi) to the running softmax."""
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    for j in tl.range(lo, hi, BLOCK_N):
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
            m_kept = kept(seed, sequence, head, (k_start + o_p)[:, None], (k_start + o_j)[None, :], threshold)
            p = tl.where(m_kept, p, 0.0)
        b_v = load_rows(
            p_v, sequence, j, kv_head, o_j, o_dv, stride_vs, sk, value_dim, MASKED, RAGGED_DV, TMA, BLOCK_N, BLOCK_DV
        )  # [BN, BDV]
        acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
        m = m_new
    return acc, m, l


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
    ACCUMULATE: tl.constexpr,
    PLAIN_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RAGGED_D: tl.constexpr,
    RAGGED_DV: tl.constexpr,
):
    """o and lse of BLOCK_M queries of one head; with ACCUMULATE, merged into those that are there.

    With TMA, p_k and p_v are tensor descriptors, and the batch is not packed.
    """
    tile, row = split_program(tl.program_id(0), n_tiles, n_rows, section, RIGHT)
    sequence = row // n_heads
    head = row % n_heads
    i = tile * BLOCK_M
    batch = sequence.to(tl.int64)
    q_first = batch * stride_qb
    k_first = batch * stride_kb
    v_first = batch * stride_vb
    o_first = batch * stride_ob
    l_first = batch * stride_lb
    if PACKED:
        sequence, i = find_sequence(tile, p_cu_q, n_sequences, BLOCK_M)
        token = tl.load(p_cu_q + sequence).to(tl.int64)
        key = tl.load(p_cu_k + sequence).to(tl.int64)
        sq = (tl.load(p_cu_q + sequence + 1) - token).to(tl.int32)
        sk = (tl.load(p_cu_k + sequence + 1) - key).to(tl.int32)
        diagonal = sk - sq
        q_first = token * stride_qs
        k_first = key * stride_ks
        v_first = key * stride_vs
        o_first = token * stride_os
        l_first = token
    if i >= sq:
        return
    head_64 = head.to(tl.int64)
    kv_head = head // groups
    p_q += q_first + head_64 * stride_qh
    if not TMA:
        p_k += k_first + kv_head.to(tl.int64) * stride_kh
        p_v += v_first + kv_head.to(tl.int64) * stride_vh
    p_o += o_first + head_64 * stride_oh
    p_lse += l_first + head_64 * stride_lh

    o_i = i + tl.arange(0, BLOCK_M)
    o_p = o_i + diagonal
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    b_q = load_tile(p_q, o_i, o_d, stride_qs, sq, head_dim, True, RAGGED_D)  # [BM, BD]
    slope = 0.0
    if ALIBI:
        slope = tl.load(p_slopes + sequence * stride_slopes + head)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if SINKS:
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(p_sinks + head).to(tl.float32) * unit(PRECISION)
        l += 1.0
    if ACCUMULATE:
        m = tl.load(p_lse + o_i, mask=o_i < sq, other=float("-inf")) * unit(PRECISION)
        l = tl.where(m == float("-inf"), 0.0, 1.0)
        acc = load_tile(p_o, o_i, o_dv, stride_os, sq, value_dim, True, True) / keep_factor

    stop = tl.minimum(i + BLOCK_M, sq)
    lo, full_lo, full_hi, hi = visit_range(i, stop, diagonal, sk, left, right, LEFT, RIGHT, BLOCK_N)
    if LEFT:
        acc, m, l = _attend(
            acc, m, l, b_q, p_k, p_v, stride_ks, stride_vs, lo, tl.minimum(full_lo, hi), sk, o_p, left, right,
            scale, softcap, slope, seed, threshold, sequence, head, kv_head, k_start, head_dim, value_dim,
            True, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, PLAIN_SCALE, PRECISION, TMA,
            BLOCK_N, BLOCK_D, BLOCK_DV, RAGGED_D, RAGGED_DV,
        )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, b_q, p_k, p_v, stride_ks, stride_vs, full_lo, full_hi, sk, o_p, left, right,
        scale, softcap, slope, seed, threshold, sequence, head, kv_head, k_start, head_dim, value_dim,
        False, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, PLAIN_SCALE, PRECISION, TMA,
        BLOCK_N, BLOCK_D, BLOCK_DV, RAGGED_D, RAGGED_DV,
    )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, b_q, p_k, p_v, stride_ks, stride_vs, full_hi, hi, sk, o_p, left, right,
        scale, softcap, slope, seed, threshold, sequence, head, kv_head, k_start, head_dim, value_dim,
        True, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, PLAIN_SCALE, PRECISION, TMA,
        BLOCK_N, BLOCK_D, BLOCK_DV, RAGGED_D, RAGGED_DV,
    )  # fmt: skip

    # Where no key was seen l is 0 and m is -inf: o = 0, lse = -inf.
    l = tl.where(l == 0.0, 1.0, l)
    b_o = acc * (keep_factor / l)[:, None]
    store_tile(p_o, b_o, o_i, o_dv, stride_os, sq, value_dim, False)
    tl.store(p_lse + o_i, m / unit(PRECISION) + tl.log2(l) * LN2, mask=o_i < sq)
