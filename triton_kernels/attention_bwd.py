"""The backward kernels: delta; then dK and dV by tiles of keys; then dQ by tiles of queries.

Dao 2023 (FlashAttention-2), algorithm 2, in two passes instead of one with atomic additions: each output has
one program that sums it in a fixed order, so the same bits come out every time.

With P = exp(S - lse), dS = P * (dO Vᵀ - delta) and delta = rowsum(dO * O) - dlse, since an upstream gradient
of lse adds dlse * P to dS. The kernels ask for lse and delta alone, so a global lse makes them give the exact
share of any tile of keys.
"""

import triton
import triton.language as tl

from .attention_tile import (
    LENGTHS,
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
def probabilities(
    s,  # raw scores, queries and keys on either axis
    lse,  # broadcast along the keys; +inf for a query that is not there or sees nothing
    o_p,
    o_j,
    scale,
    softcap,
    slope,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P before any mask, and the softcap's derivative (1 without one)."""
    derivative = 1.0
    if SOFTCAP:
        s, derivative = capped(s, scale, softcap, PRECISION)
        s = s * unit(PRECISION)
    else:
        s = s * (scale * unit(PRECISION))
    if ALIBI:
        s -= (slope * unit(PRECISION)) * tl.abs(o_p - o_j).to(tl.float32)
    return exponential(s - lse, PRECISION), derivative


@triton.jit
def load_lse(p_lse, o_i, n, PRECISION: tl.constexpr):
    """lse of the queries o_i in the kernels' units; +inf where P has to be 0."""
    b_lse = tl.load(p_lse + o_i, mask=o_i < n, other=float("-inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * unit(PRECISION))


# --- delta --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_heads", "n_tiles", "n", "stride_lb", "stride_lh"])
def attention_bwd_kernel_delta(
    p_do,
    p_o,
    p_dlse,
    p_delta,
    stride_db,
    stride_ds,
    stride_dh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lb,
    stride_lh,
    stride_dlb,
    stride_dls,
    stride_dlh,
    n_heads,
    n_tiles,
    n,
    value_dim,
    DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RAGGED_DV: tl.constexpr,
):
    """delta = rowsum(dO * O) - dlse of BLOCK_M queries of one head; packed tokens are one batch."""
    pid = tl.program_id(0)
    row = pid // n_tiles
    batch = (row // n_heads).to(tl.int64)
    head = (row % n_heads).to(tl.int64)
    o_i = pid % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_dv = tl.arange(0, BLOCK_DV)
    p_do += batch * stride_db + head * stride_dh
    p_o += batch * stride_ob + head * stride_oh
    b_do = load_tile(p_do, o_i, o_dv, stride_ds, n, value_dim, True, RAGGED_DV).to(tl.float32)  # [BM, BDV]
    b_o = load_tile(p_o, o_i, o_dv, stride_os, n, value_dim, True, RAGGED_DV).to(tl.float32)
    b_delta = tl.sum(b_do * b_o, 1)
    if DLSE:
        p_dlse += batch * stride_dlb + head * stride_dlh
        b_delta -= tl.load(p_dlse + o_i.to(tl.int64) * stride_dls, mask=o_i < n, other=0.0)
    tl.store(p_delta + batch * stride_lb + head * stride_lh + o_i, b_delta, mask=o_i < n)


# --- dK and dV ----------------------------------------------------------------------------------------------


@triton.jit
def _masked(
    p,
    first,
    o_p,
    o_j,
    sk,
    left,
    right,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """P [BN, BM] with 0 where the query, the first of them at `first` on the keys' axis, does not see the key.

    How that is written decides whether two accumulators fit the registers under Triton 3.6: with descriptors, by
    positions within the tile (keys beyond the last need no mask, they are not stored); with pointers, by those of the
    sequence.
    """
    if TMA:
        o_rel = tl.arange(0, BLOCK_M)[None, :]
        if RIGHT:
            p = tl.where((o_j - (first + right))[:, None] <= o_rel, p, 0.0)
        if LEFT:
            p = tl.where((o_j - (first - left))[:, None] >= o_rel, p, 0.0)
    else:
        p = tl.where(visible(o_p[None, :], o_j[:, None], sk, left, right, LEFT, RIGHT), p, 0.0)
    return p


@triton.jit
def _keys_from_queries(
    dk,  # [BN, BD] float32
    dv,  # [BN, BDV] float32
    b_k,  # [BN, BD]
    b_v,  # [BN, BDV]
    p_q,
    p_do,
    p_lse,
    p_delta,
    p_slopes,
    stride_qs,
    stride_qh,
    stride_ds,
    stride_dh,
    stride_lh,
    lo,
    hi,
    full_lo,
    full_hi,
    first_head,
    groups,
    sq,
    sk,
    diagonal,
    o_j,  # [BN]
    left,
    right,
    scale,
    softcap,
    keep_factor,
    seed,
    threshold,
    sequence,
    drawn,  # the sequence's number, by which dropout draws
    k_start,
    head_dim,
    value_dim,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RAGGED_D: tl.constexpr,
    RAGGED_DV: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add what the queries [lo, hi) of the heads that share these keys give to dK (not yet scaled) and dV.

    WIDE promises that there are some.

    One loop over (head, tile), with the mask behind a branch. Loops nested, or one for each kind of tile as in
    the other kernels, keep more alive beside the two accumulators than there are registers.
    """
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    n = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_M)
    if WIDE:
        tl.assume(n * groups > 0)
    for t in tl.range(0, n * groups):
        head = first_head + t // n
        head_64 = head.to(tl.int64)
        i = lo + t % n * BLOCK_M
        o_i = i + tl.arange(0, BLOCK_M)
        o_p = o_i + diagonal
        p_q_head, p_do_head = p_q, p_do
        if not TMA:
            p_q_head += head_64 * stride_qh
            p_do_head += head_64 * stride_dh
        b_q = load_rows(
            p_q_head, sequence, i, head, o_i, o_d, stride_qs, sq, head_dim, True, RAGGED_D, TMA, BLOCK_M, BLOCK_D
        )  # [BM, BD]
        b_lse = load_lse(p_lse + head_64 * stride_lh, o_i, sq, PRECISION)
        slope = 0.0
        if ALIBI:
            slope = tl.load(p_slopes + head).to(tl.float32)
        s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
        p, derivative = probabilities(
            s, b_lse[None, :], o_p[None, :], o_j[:, None], scale, softcap, slope, SOFTCAP, ALIBI, PRECISION
        )  # fmt: skip
        # Queries beyond the last have P = 0 by their lse: no mask for them.
        partly = False
        if RIGHT:
            partly = i < full_lo
        if LEFT:
            partly = partly | (i >= full_hi)
        if partly:
            p = _masked(p, i + diagonal, o_p, o_j, sk, left, right, LEFT, RIGHT, TMA, BLOCK_M)
        b_do = load_rows(
            p_do_head, sequence, i, head, o_i, o_dv, stride_ds, sq, value_dim, True, RAGGED_DV, TMA, BLOCK_M, BLOCK_DV
        )  # [BM, BDV]
        dropped = p
        if DROPOUT:
            m_kept = kept(seed, drawn, head, (k_start + o_p)[None, :], (k_start + o_j)[:, None], threshold)
            dropped = tl.where(m_kept, p * keep_factor, 0.0)
        # See `_masked`: with descriptors the accumulators fit if this comes early, with pointers if it comes late.
        if DK and TMA:
            b_delta = tl.load(p_delta + head_64 * stride_lh + o_i, mask=o_i < sq, other=0.0)
        if DK:
            dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BN, BM]
            if DROPOUT:
                dp = tl.where(m_kept, dp * keep_factor, 0.0)
        if DV:
            dv = tl.dot(dropped.to(b_do.dtype), b_do, dv, input_precision=PRECISION)
        if DK and not TMA:
            b_delta = tl.load(p_delta + head_64 * stride_lh + o_i, mask=o_i < sq, other=0.0)
        if DK:
            ds = p * (dp - b_delta[None, :])
            if SOFTCAP:
                ds *= derivative
            dk = tl.dot(ds.to(b_q.dtype), b_q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def attention_bwd_kernel_dkdv(
    p_q,
    p_k,
    p_v,
    p_do,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
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
    stride_db,
    stride_ds,
    stride_dh,
    stride_dkb,
    stride_dks,
    stride_dkh,
    stride_dvb,
    stride_dvs,
    stride_dvh,
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
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RAGGED_D: tl.constexpr,
    RAGGED_DV: tl.constexpr,
):
    """dK and dV of BLOCK_N keys of one key/value head, over its queries and its query heads in turn.

    DK and DV say which of the two: where the registers don't hold both accumulators, two launches make S twice.
    With TMA, p_q and p_do are tensor descriptors, and the batch is not packed.
    """
    # The first keys are seen by the most queries under a causal mask, and come first as they are.
    tile, row = split_program(tl.program_id(0), n_tiles, n_rows, section, False)
    kv_head, sequence, j, n_q, n_k, shift, batch, token, key = locate(
        tile, row, n_heads // groups, p_cu_q, p_cu_k, n_sequences, sq, sk, diagonal, PACKED, True, BLOCK_N
    )
    if j >= n_k:
        return
    kv_head_64 = kv_head.to(tl.int64)
    p_k_row = p_k + (batch * stride_kb + key * stride_ks + kv_head_64 * stride_kh)
    p_v_row = p_v + (batch * stride_vb + key * stride_vs + kv_head_64 * stride_vh)
    p_dk_row = p_dk + (batch * stride_dkb + key * stride_dks + kv_head_64 * stride_dkh)
    p_dv_row = p_dv + (batch * stride_dvb + key * stride_dvs + kv_head_64 * stride_dvh)

    o_j = j + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    b_k = load_tile(p_k_row, o_j, o_d, stride_ks, n_k, head_dim, True, RAGGED_D)  # [BN, BD]
    b_v = load_tile(p_v_row, o_j, o_dv, stride_vs, n_k, value_dim, True, RAGGED_DV)  # [BN, BDV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    stop = tl.minimum(j + BLOCK_N, n_k)
    # From the keys' side the query at i stands at j = i + diagonal: the sides change places.
    lo, full_lo, full_hi, hi = visit_range(j, stop, -shift, n_q, right, left, RIGHT, LEFT, BLOCK_M)
    # Where the loop may run no times, Hopper's assembler lets no two products overlap, if the accumulators are wide:
    # they would be zeros or a product's. Narrow ones overlap as they are, and have no register for this; so do 128
    # columns without a mask, or with descriptors.
    WIDE: tl.constexpr = BLOCK_D > 128 or (BLOCK_D > 64 and RIGHT and not TMA)
    if WIDE and hi <= lo:
        if DK:
            store_tile(p_dk_row, dk, o_j, o_d, stride_dks, n_k, head_dim, False, RAGGED_D)
        if DV:
            store_tile(p_dv_row, dv, o_j, o_dv, stride_dvs, n_k, value_dim, False, RAGGED_DV)
        return
    p_q_row, p_do_row, p_slopes_row = p_q, p_do, p_slopes
    if not TMA:
        p_q_row += batch * stride_qb + token * stride_qs
        p_do_row += batch * stride_db + token * stride_ds
    p_lse_row = p_lse + (batch * stride_lb + token)
    p_delta_row = p_delta + (batch * stride_lb + token)
    if ALIBI:
        p_slopes_row += sequence * stride_slopes
    first_head = kv_head * groups
    dk, dv = _keys_from_queries(
        dk, dv, b_k, b_v, p_q_row, p_do_row, p_lse_row, p_delta_row, p_slopes_row, stride_qs, stride_qh,
        stride_ds, stride_dh, stride_lh, lo, hi, full_lo, full_hi, first_head, groups, n_q, n_k, shift, o_j,
        left, right, scale, softcap, keep_factor, seed, threshold, sequence, number(sequence, n_sequences, PACKED),
        k_start, head_dim, value_dim,
        LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, PRECISION, TMA, DK, DV, BLOCK_M, BLOCK_D, BLOCK_DV, RAGGED_D, RAGGED_DV,
        WIDE,
    )  # fmt: skip
    if DK:
        store_tile(p_dk_row, dk * scale, o_j, o_d, stride_dks, n_k, head_dim, False, RAGGED_D)
    if DV:
        store_tile(p_dv_row, dv, o_j, o_dv, stride_dvs, n_k, value_dim, False, RAGGED_DV)


# --- dQ -----------------------------------------------------------------------------------------------------


@triton.jit
def _queries_from_keys(
    dq,  # [BM, BD] float32
    b_q,  # [BM, BD]
    b_do,  # [BM, BDV]
    b_lse,  # [BM]
    b_delta,  # [BM]
    p_k,
    p_v,
    stride_ks,
    stride_vs,
    lo,
    hi,
    sk,
    o_p,  # [BM]
    left,
    right,
    scale,
    softcap,
    slope,
    keep_factor,
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
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RAGGED_D: tl.constexpr,
    RAGGED_DV: tl.constexpr,
):
    """Add what the keys [lo, hi) give to dQ (not yet scaled)."""
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    for j in tl.range(lo, hi, BLOCK_N):
        o_j = j + tl.arange(0, BLOCK_N)
        b_k = load_rows(
            p_k, sequence, j, kv_head, o_j, o_d, stride_ks, sk, head_dim, MASKED, RAGGED_D, TMA, BLOCK_N, BLOCK_D
        )  # [BN, BD]
        b_v = load_rows(
            p_v, sequence, j, kv_head, o_j, o_dv, stride_vs, sk, value_dim, MASKED, RAGGED_DV, TMA, BLOCK_N, BLOCK_DV
        )  # [BN, BDV]
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        p, derivative = probabilities(
            s, b_lse[:, None], o_p[:, None], o_j[None, :], scale, softcap, slope, SOFTCAP, ALIBI, PRECISION
        )  # fmt: skip
        if MASKED:
            p = tl.where(visible(o_p[:, None], o_j[None, :], sk, left, right, LEFT, RIGHT), p, 0.0)
        dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [BM, BN]
        if DROPOUT:
            m_kept = kept(seed, drawn, head, (k_start + o_p)[:, None], (k_start + o_j)[None, :], threshold)
            dp = tl.where(m_kept, dp * keep_factor, 0.0)
        ds = p * (dp - b_delta[:, None])
        if SOFTCAP:
            ds *= derivative
        dq = tl.dot(ds.to(b_k.dtype), b_k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=LENGTHS)
def attention_bwd_kernel_dq(
    p_q,
    p_k,
    p_v,
    p_do,
    p_lse,
    p_delta,
    p_dq,
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
    stride_db,
    stride_ds,
    stride_dh,
    stride_dqb,
    stride_dqs,
    stride_dqh,
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
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    RAGGED_D: tl.constexpr,
    RAGGED_DV: tl.constexpr,
):
    """dQ of BLOCK_M queries of one head. With TMA, p_k and p_v are tensor descriptors, and the batch is not packed."""
    tile, row = split_program(tl.program_id(0), n_tiles, n_rows, section, RIGHT)
    head, sequence, i, n_q, n_k, shift, batch, token, key = locate(
        tile, row, n_heads, p_cu_q, p_cu_k, n_sequences, sq, sk, diagonal, PACKED, False, BLOCK_M
    )
    if i >= n_q:
        return
    head_64 = head.to(tl.int64)
    kv_head = head // groups
    p_q_row = p_q + (batch * stride_qb + token * stride_qs + head_64 * stride_qh)
    p_do_row = p_do + (batch * stride_db + token * stride_ds + head_64 * stride_dh)
    p_dq_row = p_dq + (batch * stride_dqb + token * stride_dqs + head_64 * stride_dqh)
    p_lse_row = p_lse + (batch * stride_lb + token + head_64 * stride_lh)
    p_delta_row = p_delta + (batch * stride_lb + token + head_64 * stride_lh)
    p_k_row, p_v_row = p_k, p_v
    if not TMA:
        p_k_row += batch * stride_kb + key * stride_ks + kv_head.to(tl.int64) * stride_kh
        p_v_row += batch * stride_vb + key * stride_vs + kv_head.to(tl.int64) * stride_vh

    o_i = i + tl.arange(0, BLOCK_M)
    o_p = o_i + shift
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    b_q = load_tile(p_q_row, o_i, o_d, stride_qs, n_q, head_dim, True, RAGGED_D)  # [BM, BD]
    b_do = load_tile(p_do_row, o_i, o_dv, stride_ds, n_q, value_dim, True, RAGGED_DV)  # [BM, BDV]
    b_lse = load_lse(p_lse_row, o_i, n_q, PRECISION)
    b_delta = tl.load(p_delta_row + o_i, mask=o_i < n_q, other=0.0)
    slope = 0.0
    if ALIBI:
        slope = tl.load(p_slopes + sequence * stride_slopes + head).to(tl.float32)
    drawn = number(sequence, n_sequences, PACKED)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    stop = tl.minimum(i + BLOCK_M, n_q)
    lo, full_lo, full_hi, hi = visit_range(i, stop, shift, n_k, left, right, LEFT, RIGHT, BLOCK_N)
    if LEFT:
        dq = _queries_from_keys(
            dq, b_q, b_do, b_lse, b_delta, p_k_row, p_v_row, stride_ks, stride_vs, lo, tl.minimum(full_lo, hi),
            n_k, o_p, left, right, scale, softcap, slope, keep_factor, seed, threshold, sequence, drawn, head, kv_head,
            k_start, head_dim, value_dim, True, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, PRECISION, TMA,
            BLOCK_N, BLOCK_D, BLOCK_DV, RAGGED_D, RAGGED_DV,
        )  # fmt: skip
    dq = _queries_from_keys(
        dq, b_q, b_do, b_lse, b_delta, p_k_row, p_v_row, stride_ks, stride_vs, full_lo, full_hi, n_k, o_p,
        left, right, scale, softcap, slope, keep_factor, seed, threshold, sequence, drawn, head, kv_head, k_start,
        head_dim, value_dim, False, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, PRECISION, TMA,
        BLOCK_N, BLOCK_D, BLOCK_DV, RAGGED_D, RAGGED_DV,
    )  # fmt: skip
    dq = _queries_from_keys(
        dq, b_q, b_do, b_lse, b_delta, p_k_row, p_v_row, stride_ks, stride_vs, full_hi, hi, n_k, o_p,
        left, right, scale, softcap, slope, keep_factor, seed, threshold, sequence, drawn, head, kv_head, k_start,
        head_dim, value_dim, True, LEFT, RIGHT, SOFTCAP, ALIBI, DROPOUT, PRECISION, TMA,
        BLOCK_N, BLOCK_D, BLOCK_DV, RAGGED_D, RAGGED_DV,
    )  # fmt: skip
    store_tile(p_dq_row, dq * scale, o_i, o_d, stride_dqs, n_q, head_dim, ACCUMULATE, RAGGED_D)
