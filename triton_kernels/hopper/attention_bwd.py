"""The backward kernels for Hopper: dK and dV of 64 keys a warpgroup, and dQ of 64 queries a warpgroup.

Divided as the forward: one warpgroup loads, the others compute. What a warpgroup owns stays in shared memory (keys and
values; queries and dO), what it goes through comes by a ring. P and dS are made in the registers that the next product
takes them from. P is made while dP is in flight, dS while what P adds to dV is; products in flight across tiles, as the
forward has them, the assembler would put in a row.

lse and delta of the queries that dK's and dV's warpgroups go through are brought by the loading warpgroup's threads, in
base 2, +inf where a query sees nothing or is none: its P is 0, without a mask.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..attention_tile import LENGTHS, LOG2E, split_program, visible, visit_range
from .parts import ROWS, barriers, key_tiles, store_rows, tile_number, tile_range, tma_load


@gluon.jit
def _in_base_2(lse):
    """lse of queries, +inf where there is none."""
    return gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


# --- dK and dV ------------------------------------------------------------------------------------------------


@gluon.jit
def _query_tiles(j, sq, sk, diagonal, left, right, LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr,
                 BLOCK_N: gl.constexpr):  # fmt: skip
    """(first, full_first, full_last, last) query tiles that see the keys from j on."""
    stop = gl.minimum(j + BLOCK_N, sk)
    # From the keys' side the query at i stands at j = i + diagonal: the sides change places.
    lo, full_lo, full_hi, hi = visit_range(j, stop, -diagonal, sq, right, left, RIGHT, LEFT, BLOCK_M)
    first, full_first, full_last, last = tile_range(lo, full_lo, full_hi, hi, BLOCK_M)
    if not LEFT:
        full_last = last  # queries beyond the last one need no mask
    return first, full_first, full_last, last


@gluon.jit
def _bring_queries(
    descriptors, rings, sizes, statistics, count, batch, first_head, groups, first, steps, sq,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """So many tiles of queries and dO from the `first` on, of each head in turn; `count` is the place in the ring."""
    q_desc, _k_desc, _v_desc, do_desc = descriptors
    _k_smem, _v_smem, q_smem, do_smem, lse_smem, delta_smem, _kv_ready, _kv_free, q_ready, do_ready, free = rings
    p_lse, p_delta, stride_lb, stride_lh = statistics
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for t in range(steps * groups):
        head = first_head + t // steps
        i = (first + t % steps) * BLOCK_M
        stage = (count + t) % STAGES
        mbarrier.wait(free.index(stage), (((count + t) // STAGES) & 1) ^ 1)
        mbarrier.expect(q_ready.index(stage), q_desc.block_type.nbytes)
        tma_load(q_desc, [batch, i, head, 0], q_ready.index(stage), q_smem.index(stage))
        mbarrier.expect(do_ready.index(stage), do_desc.block_type.nbytes)
        tma_load(do_desc, [batch, i, head, 0], do_ready.index(stage), do_smem.index(stage))
        o_i = i + gl.arange(0, BLOCK_M, layout=layout)
        at = batch.to(gl.int64) * stride_lb + head.to(gl.int64) * stride_lh
        lse = gl.load(p_lse + at + o_i, mask=o_i < sq, other=float("-inf"))
        delta = gl.load(p_delta + at + o_i, mask=o_i < sq, other=0.0)
        lse_smem.index(stage).store(_in_base_2(lse))
        delta_smem.index(stage).store(delta)
        mbarrier.arrive(q_ready.index(stage), count=1)
    return count + steps * groups


@gluon.jit
def _load_for_keys(
    descriptors, rings, sizes, statistics,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Bring the keys and values of this program's tiles, and the queries, dO, lse and delta that they meet."""
    k_desc, v_desc = descriptors[1], descriptors[2]
    k_smem, v_smem, kv_ready, kv_free = rings[0], rings[1], rings[6], rings[7]
    n_heads, groups, n_rows, n_tiles, section, sq, sk, diagonal, left, right = sizes
    BLOCK_N: gl.constexpr = ROWS * CONSUMERS
    kv_heads = n_heads // groups
    count = 0
    tiles = 0
    for turn in range(gl.cdiv(n_tiles * n_rows, gl.num_programs(0))):
        number = tile_number(turn)
        if number < n_tiles * n_rows:
            tile, row = split_program(number, n_tiles, n_rows, section, False)
            batch = row // kv_heads
            kv_head = row % kv_heads
            j = tile * BLOCK_N
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(kv_free.index(c), (tiles & 1) ^ 1)
                mbarrier.expect(kv_ready.index(c), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
                tma_load(k_desc, [batch, j + c * ROWS, kv_head, 0], kv_ready.index(c), k_smem.index(c))
                tma_load(v_desc, [batch, j + c * ROWS, kv_head, 0], kv_ready.index(c), v_smem.index(c))
            first, full_first, full_last, last = _query_tiles(
                j, sq, sk, diagonal, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
            )
            head = kv_head * groups
            count = _bring_queries(
                descriptors, rings, sizes, statistics, count, batch, head, groups, first, full_first - first, sq,
                BLOCK_M, STAGES,
            )  # fmt: skip
            count = _bring_queries(
                descriptors, rings, sizes, statistics, count, batch, head, groups, full_first, full_last - full_first,
                sq, BLOCK_M, STAGES,
            )  # fmt: skip
            count = _bring_queries(
                descriptors, rings, sizes, statistics, count, batch, head, groups, full_last, last - full_last, sq,
                BLOCK_M, STAGES,
            )  # fmt: skip
            tiles += 1


@gluon.jit
def _add_queries(
    dk, dv, k, v, rings, count, first, steps, groups, o_j, diagonal, left, right, factor,
    MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Add what `_bring_queries` brings with the same numbers to dK (not yet scaled) and dV."""
    _k_smem, _v_smem, q_smem, do_smem, lse_smem, delta_smem, _kv_ready, _kv_free, q_ready, do_ready, free = rings
    dtype: gl.constexpr = q_smem.dtype
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    for t in range(steps * groups):
        stage = (count + t) % STAGES
        phase = ((count + t) // STAGES) & 1
        zero = gl.zeros([ROWS, BLOCK_M], gl.float32, layout)
        q = q_smem.index(stage).reshape([BLOCK_M, BLOCK_D])
        do = do_smem.index(stage).reshape([BLOCK_M, BLOCK_D])
        mbarrier.wait(q_ready.index(stage), phase)
        s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)  # [keys, queries]
        mbarrier.wait(do_ready.index(stage), phase)
        dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
        lse = lse_smem.index(stage).load(columns)
        p = gl.exp2(s * factor - lse[None, :])
        if MASKED:
            at = (first + t % steps) * BLOCK_M + diagonal  # of the first query, on the keys' axis
            o_i = gl.arange(0, BLOCK_M, layout=columns)[None, :]
            if RIGHT:
                p = gl.where((o_j - (at + right))[:, None] <= o_i, p, 0.0)
            if LEFT:
                p = gl.where((o_j - (at - left))[:, None] >= o_i, p, 0.0)
        dv = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), do, dv, is_async=True)
        dp = warpgroup_mma_wait(num_outstanding=1, deps=(dp,))
        delta = delta_smem.index(stage).load(columns)
        ds = p * (dp - delta[None, :])
        dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), p_layout), q, dk, is_async=True)
        dv, dk = warpgroup_mma_wait(num_outstanding=0, deps=(dv, dk))
        mbarrier.arrive(free.index(stage), count=1)
    return dk, dv


@gluon.jit
def _compute_keys(
    rings, sizes, gradients, scale,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """dK and dV of the CONSUMER-th 64 keys of each of this program's tiles."""
    k_smem, v_smem, kv_ready, kv_free = rings[0], rings[1], rings[6], rings[7]
    n_heads, groups, n_rows, n_tiles, section, sq, sk, diagonal, left, right = sizes
    p_dk, p_dv, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh = gradients
    BLOCK_N: gl.constexpr = ROWS * CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=d_layout, k_width=2)
    factor = scale * LOG2E
    kv_heads = n_heads // groups
    k = k_smem.index(CONSUMER).reshape([ROWS, BLOCK_D])
    v = v_smem.index(CONSUMER).reshape([ROWS, BLOCK_D])
    count = 0
    tiles = 0
    for turn in range(gl.cdiv(n_tiles * n_rows, gl.num_programs(0))):
        number = tile_number(turn)
        if number < n_tiles * n_rows:
            tile, row = split_program(number, n_tiles, n_rows, section, False)
            batch = (row // kv_heads).to(gl.int64)
            kv_head = (row % kv_heads).to(gl.int64)
            j = tile * BLOCK_N
            first, full_first, full_last, last = _query_tiles(
                j, sq, sk, diagonal, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
            )
            o_j = j + CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
            dk = gl.zeros([ROWS, BLOCK_D], gl.float32, d_layout)
            dv = gl.zeros([ROWS, BLOCK_D], gl.float32, d_layout)
            mbarrier.wait(kv_ready.index(CONSUMER), tiles & 1)
            if RIGHT:
                dk, dv = _add_queries(
                    dk, dv, k, v, rings, count, first, full_first - first, groups, o_j, diagonal, left, right, factor,
                    True, LEFT, RIGHT, BLOCK_M, BLOCK_D, STAGES, layout, p_layout,
                )  # fmt: skip
            count += (full_first - first) * groups
            dk, dv = _add_queries(
                dk, dv, k, v, rings, count, full_first, full_last - full_first, groups, o_j, diagonal, left, right,
                factor, False, LEFT, RIGHT, BLOCK_M, BLOCK_D, STAGES, layout, p_layout,
            )  # fmt: skip
            count += (full_last - full_first) * groups
            if LEFT:
                dk, dv = _add_queries(
                    dk, dv, k, v, rings, count, full_last, last - full_last, groups, o_j, diagonal, left, right,
                    factor, True, LEFT, RIGHT, BLOCK_M, BLOCK_D, STAGES, layout, p_layout,
                )  # fmt: skip
                count += (last - full_last) * groups
            mbarrier.arrive(kv_free.index(CONSUMER), count=1)
            rows = j + CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, d_layout))
            p_dk_row = p_dk + (batch * stride_kb + kv_head * stride_kh)
            p_dv_row = p_dv + (batch * stride_vb + kv_head * stride_vh)
            store_rows(p_dk_row, dk, rows, BLOCK_D, stride_ks, sk, scale, d_layout, False)
            store_rows(p_dv_row, dv, rows, BLOCK_D, stride_vs, sk, 1.0, d_layout, False)
            tiles += 1


@gluon.jit(do_not_specialize=LENGTHS)
def attention_bwd_kernel_dkdv_hopper(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    stride_lb,
    stride_lh,
    stride_dkb,
    stride_dks,
    stride_dkh,
    stride_dvb,
    stride_dvs,
    stride_dvh,
    n_heads,
    groups,
    n_rows,
    n_tiles,
    section,
    sq,
    sk,
    diagonal,
    left,
    right,
    scale,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dK and dV of a dense batch (B, S, H, D), over the queries and the query heads of each key/value head in turn.

    Tiles of k and v have 64 rows, those of q and do BLOCK_M. dK and dV may be float32. Rows are (batch, kv head).
    """
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, 1, ROWS, 1, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [CONSUMERS, 1, ROWS, 1, BLOCK_D], v_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, BLOCK_M, 1, BLOCK_D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(do_desc.dtype, [STAGES, 1, BLOCK_M, 1, BLOCK_D], do_desc.layout)
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], row)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], row)
    kv_ready = barriers(CONSUMERS, 1)
    kv_free = barriers(CONSUMERS, 1)
    q_ready = barriers(STAGES, 2)  # the bytes, and lse and delta
    do_ready = barriers(STAGES, 1)
    free = barriers(STAGES, CONSUMERS)
    fence_async_shared()
    descriptors = (q_desc, k_desc, v_desc, do_desc)
    rings = (k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, kv_ready, kv_free, q_ready, do_ready, free)
    sizes = (n_heads, groups, n_rows, n_tiles, section, sq, sk, diagonal, left, right)
    statistics = (p_lse, p_delta, stride_lb, stride_lh)
    gradients = (p_dk, p_dv, stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh)
    gl.warp_specialize(
        [
            (_load_for_keys, (descriptors, rings, sizes, statistics, LEFT, RIGHT, CONSUMERS, BLOCK_M, STAGES)),
            (_compute_keys, (rings, sizes, gradients, scale, LEFT, RIGHT, CONSUMERS, BLOCK_M, BLOCK_D, STAGES,
                             0)),
            (_compute_keys, (rings, sizes, gradients, scale, LEFT, RIGHT, CONSUMERS, BLOCK_M, BLOCK_D, STAGES,
                             1)),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip


# --- dQ -------------------------------------------------------------------------------------------------------


@gluon.jit
def _load_for_queries(
    descriptors, rings, sizes,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Bring the queries and dO of this program's tiles, and the keys and values that they see."""
    q_desc, k_desc, v_desc, do_desc = descriptors
    q_smem, do_smem, k_smem, v_smem, q_ready, q_free, k_ready, v_ready, free = rings
    n_heads, groups, n_rows, n_tiles, section, sq, sk, diagonal, left, right = sizes
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    count = 0
    tiles = 0
    for turn in range(gl.cdiv(n_tiles * n_rows, gl.num_programs(0))):
        number = tile_number(turn)
        if number < n_tiles * n_rows:
            tile, row = split_program(number, n_tiles, n_rows, section, RIGHT)
            batch = row // n_heads
            head = row % n_heads
            i = tile * BLOCK_M
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(q_free.index(c), (tiles & 1) ^ 1)
                mbarrier.expect(q_ready.index(c), q_desc.block_type.nbytes + do_desc.block_type.nbytes)
                tma_load(q_desc, [batch, i + c * ROWS, head, 0], q_ready.index(c), q_smem.index(c))
                tma_load(do_desc, [batch, i + c * ROWS, head, 0], q_ready.index(c), do_smem.index(c))
            first, _full_first, _full_last, last = key_tiles(
                i, sq, sk, diagonal, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
            )
            for t in range(last - first):
                j = (first + t) * BLOCK_N
                stage = (count + t) % STAGES
                mbarrier.wait(free.index(stage), (((count + t) // STAGES) & 1) ^ 1)
                mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
                tma_load(k_desc, [batch, j, head // groups, 0], k_ready.index(stage), k_smem.index(stage))
                mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
                tma_load(v_desc, [batch, j, head // groups, 0], v_ready.index(stage), v_smem.index(stage))
            count += last - first
            tiles += 1


@gluon.jit
def _add_keys(
    dq, q, do, lse, delta, rings, count, first, steps, o_p, sk, left, right, factor,
    MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Add what so many tiles of keys from the `first` on give to dQ, not yet scaled."""
    _q_smem, _do_smem, k_smem, v_smem, _q_ready, _q_free, k_ready, v_ready, free = rings
    dtype: gl.constexpr = k_smem.dtype
    for t in range(steps):
        stage = (count + t) % STAGES
        phase = ((count + t) // STAGES) & 1
        zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D])
        v = v_smem.index(stage).reshape([BLOCK_N, BLOCK_D])
        mbarrier.wait(k_ready.index(stage), phase)
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(stage), phase)
        dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
        p = gl.exp2(s * factor - lse[:, None])
        if MASKED:
            o_j = (first + t) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
            p = gl.where(visible(o_p[:, None], o_j[None, :], sk, left, right, LEFT, RIGHT), p, 0.0)
        mbarrier.wait(v_ready.index(stage), phase)  # passed already: keeps the wait below where it is (attention_fwd)
        dp = warpgroup_mma_wait(num_outstanding=0, deps=(dp,))
        ds = p * (dp - delta[:, None])
        dq = warpgroup_mma(gl.convert_layout(ds.to(dtype), p_layout), k, dq, is_async=True)
        dq = warpgroup_mma_wait(num_outstanding=0, deps=(dq,))
        mbarrier.arrive(free.index(stage), count=1)
    return dq


@gluon.jit
def _compute_queries(
    rings, sizes, statistics, gradient, scale,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, ACCUMULATE: gl.constexpr, CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """dQ of the CONSUMER-th 64 queries of each of this program's tiles."""
    q_smem, do_smem, q_ready, q_free = rings[0], rings[1], rings[4], rings[5]
    n_heads, _groups, n_rows, n_tiles, section, sq, sk, diagonal, left, right = sizes
    p_lse, p_delta, stride_lb, stride_lh = statistics
    p_dq, stride_b, stride_s, stride_h = gradient
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=d_layout, k_width=2)
    factor = scale * LOG2E
    q = q_smem.index(CONSUMER).reshape([ROWS, BLOCK_D])
    do = do_smem.index(CONSUMER).reshape([ROWS, BLOCK_D])
    count = 0
    tiles = 0
    for turn in range(gl.cdiv(n_tiles * n_rows, gl.num_programs(0))):
        number = tile_number(turn)
        if number < n_tiles * n_rows:
            tile, row = split_program(number, n_tiles, n_rows, section, RIGHT)
            batch = (row // n_heads).to(gl.int64)
            head = (row % n_heads).to(gl.int64)
            i = tile * BLOCK_M
            first, full_first, full_last, last = key_tiles(
                i, sq, sk, diagonal, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
            )
            o_i = i + CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
            o_p = o_i + diagonal
            at = batch * stride_lb + head * stride_lh
            lse = _in_base_2(gl.load(p_lse + at + o_i, mask=o_i < sq, other=float("-inf")))
            delta = gl.load(p_delta + at + o_i, mask=o_i < sq, other=0.0)
            dq = gl.zeros([ROWS, BLOCK_D], gl.float32, d_layout)
            mbarrier.wait(q_ready.index(CONSUMER), tiles & 1)
            if LEFT:
                dq = _add_keys(
                    dq, q, do, lse, delta, rings, count, first, full_first - first, o_p, sk, left, right, factor,
                    True, LEFT, RIGHT, BLOCK_N, BLOCK_D, STAGES, layout, p_layout,
                )  # fmt: skip
            dq = _add_keys(
                dq, q, do, lse, delta, rings, count + full_first - first, full_first, full_last - full_first, o_p, sk,
                left, right, factor,
                False, LEFT, RIGHT, BLOCK_N, BLOCK_D, STAGES, layout, p_layout,
            )  # fmt: skip
            dq = _add_keys(
                dq, q, do, lse, delta, rings, count + full_last - first, full_last, last - full_last, o_p, sk, left,
                right, factor,
                True, LEFT, RIGHT, BLOCK_N, BLOCK_D, STAGES, layout, p_layout,
            )  # fmt: skip
            count += last - first
            mbarrier.arrive(q_free.index(CONSUMER), count=1)
            rows = i + CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, d_layout))
            p_dq_row = p_dq + (batch * stride_b + head * stride_h)
            store_rows(p_dq_row, dq, rows, BLOCK_D, stride_s, sq, scale, d_layout, ACCUMULATE)
            tiles += 1


@gluon.jit(do_not_specialize=LENGTHS)
def attention_bwd_kernel_dq_hopper(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    p_lse,
    p_delta,
    p_dq,
    stride_lb,
    stride_lh,
    stride_dqb,
    stride_dqs,
    stride_dqh,
    n_heads,
    groups,
    n_rows,
    n_tiles,
    section,
    sq,
    sk,
    diagonal,
    left,
    right,
    scale,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dQ of a dense batch (B, S, H, D); with ACCUMULATE, added to the float32 sums that are there.

    Tiles of q and do have 64 rows, those of k and v BLOCK_N. Rows are (batch, query head).
    """
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, ROWS, 1, BLOCK_D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(do_desc.dtype, [CONSUMERS, 1, ROWS, 1, BLOCK_D], do_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, 1, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, 1, BLOCK_D], v_desc.layout)
    q_ready = barriers(CONSUMERS, 1)
    q_free = barriers(CONSUMERS, 1)
    k_ready = barriers(STAGES, 1)
    v_ready = barriers(STAGES, 1)
    free = barriers(STAGES, CONSUMERS)
    fence_async_shared()
    descriptors = (q_desc, k_desc, v_desc, do_desc)
    rings = (q_smem, do_smem, k_smem, v_smem, q_ready, q_free, k_ready, v_ready, free)
    sizes = (n_heads, groups, n_rows, n_tiles, section, sq, sk, diagonal, left, right)
    statistics = (p_lse, p_delta, stride_lb, stride_lh)
    gradient = (p_dq, stride_dqb, stride_dqs, stride_dqh)
    gl.warp_specialize(
        [
            (_load_for_queries, (descriptors, rings, sizes, LEFT, RIGHT, CONSUMERS, BLOCK_N, STAGES)),
            (_compute_queries, (rings, sizes, statistics, gradient, scale, LEFT, RIGHT, ACCUMULATE, CONSUMERS,
                                BLOCK_N, BLOCK_D, STAGES, 0)),
            (_compute_queries, (rings, sizes, statistics, gradient, scale, LEFT, RIGHT, ACCUMULATE, CONSUMERS,
                                BLOCK_N, BLOCK_D, STAGES, 1)),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
