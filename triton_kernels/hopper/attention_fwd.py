"""The forward kernel for Hopper: a warpgroup that loads, and warpgroups that compute 64 queries each.

The division of labour of FlashAttention-3 (Shah et al. 2024, sections 3.1 and 3.2). The copy engine brings keys and
values into rings of shared memory; barriers say when a tile is there, and when all who read it are through. Between
two products the other warpgroup has the matrix unit. With OVERLAP, a warpgroup also leaves the product of the last
tile's probabilities with its values in flight while it makes the next tile's probabilities.

Key tiles are visited from the last to the first: masked ones of a causal mask come first, when nothing else waits.
What a row is, and which tiles it visits, is as in `attention_tile`; scores are in base 2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..attention_tile import LENGTHS, LN2, LOG2E, split_program, visible
from .parts import ROWS, barriers, key_tiles, load_rows, store_rows, tile_number, tma_load, tma_store, tma_store_wait


@gluon.jit
def _load(
    descriptors, rings, sizes,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Bring the queries of this program's tiles, and the keys and values that they see."""
    q_desc, k_desc, v_desc = descriptors
    q_smem, k_smem, v_smem, q_ready, q_free, k_ready, k_free, v_ready, v_free = rings
    n_heads, groups, n_rows, n_tiles, section, sq, sk, diagonal, left, right = sizes
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    count = 0  # key tiles so far
    tiles = 0  # query tiles so far
    for turn in range(gl.cdiv(n_tiles * n_rows, gl.num_programs(0))):
        number = tile_number(turn)
        if number < n_tiles * n_rows:
            tile, row = split_program(number, n_tiles, n_rows, section, RIGHT)
            batch = row // n_heads
            head = row % n_heads
            i = tile * BLOCK_M
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(q_free.index(c), (tiles & 1) ^ 1)
                mbarrier.expect(q_ready.index(c), q_desc.block_type.nbytes)
                tma_load(q_desc, [batch, i + c * ROWS, head, 0], q_ready.index(c), q_smem.index(c))
            first, _full_first, _full_last, last = key_tiles(
                i, sq, sk, diagonal, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
            )
            for t in range(last - first):
                j = (last - 1 - t) * BLOCK_N
                stage = count % STAGES
                free = ((count // STAGES) & 1) ^ 1
                mbarrier.wait(k_free.index(stage), free)
                mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
                tma_load(k_desc, [batch, j, head // groups, 0], k_ready.index(stage), k_smem.index(stage))
                mbarrier.wait(v_free.index(stage), free)
                mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
                tma_load(v_desc, [batch, j, head // groups, 0], v_ready.index(stage), v_smem.index(stage))
                count += 1
            tiles += 1


@gluon.jit
def _scores(q, k_smem, k_ready, count, layout: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """The product of queries and a tile of keys, in flight."""
    stage = count % STAGES
    mbarrier.wait(k_ready.index(stage), (count // STAGES) & 1)
    k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D])
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _add_values(acc, p, v_smem, v_ready, count, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    """acc + p v of a tile of values, in flight."""
    stage = count % STAGES
    mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)
    return warpgroup_mma(p, v_smem.index(stage).reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)


@gluon.jit
def _softmax(
    s, m, l, j, o_p, sk, left, right, factor,
    MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """(p, alpha, m, l): the tile's probabilities less the running maximum, and what older ones shrink by."""
    layout: gl.constexpr = s.type.layout
    if MASKED:
        o_j = j + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        s = gl.where(visible(o_p[:, None], o_j[None, :], sk, left, right, LEFT, RIGHT), s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * factor)
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = gl.exp2(s * factor - m_safe[:, None])
    alpha = gl.exp2(m - m_safe)
    return p, alpha, m_new, l * alpha + gl.sum(p, 1)


@gluon.jit
def _walk(
    acc, p, m, l, q, rings, count, j, steps, o_p, sk, left, right, factor,
    MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, OVERLAP: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """So many tiles of keys downwards from j; `count` is the first one's place in the rings.

    With OVERLAP the product with the values of the tile before the first is still to do when this begins, and that of
    the last one when it ends: p are its probabilities.
    """
    _q_smem, k_smem, v_smem, _q_ready, _q_free, k_ready, k_free, v_ready, v_free = rings
    p_layout: gl.constexpr = p.type.layout
    dtype: gl.constexpr = p.dtype
    for t in range(steps):
        s = _scores(q, k_smem, k_ready, count + t, layout, BLOCK_N, BLOCK_D, STAGES)
        if OVERLAP:
            acc = _add_values(acc, p, v_smem, v_ready, count + t - 1, BLOCK_N, BLOCK_D, STAGES)
            s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
        else:
            s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
        mbarrier.arrive(k_free.index((count + t) % STAGES), count=1)
        b_p, alpha, m, l = _softmax(
            s, m, l, j - t * BLOCK_N, o_p, sk, left, right, factor, MASKED, LEFT, RIGHT, BLOCK_N
        )
        shrink = gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
        if OVERLAP:
            # Passed already. The assembler moves the wait below, which names no registers to it, up before the softmax,
            # but not before a branch, and this is one.
            mbarrier.wait(v_ready.index((count + t - 1) % STAGES), ((count + t - 1) // STAGES) & 1)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            mbarrier.arrive(v_free.index((count + t - 1) % STAGES), count=1)
            acc = acc * shrink
            p = gl.convert_layout(b_p.to(dtype), p_layout)
        else:
            acc = acc * shrink
            p = gl.convert_layout(b_p.to(dtype), p_layout)
            acc = _add_values(acc, p, v_smem, v_ready, count + t, BLOCK_N, BLOCK_D, STAGES)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            mbarrier.arrive(v_free.index((count + t) % STAGES), count=1)
    return acc, p, m, l


@gluon.jit
def _compute(
    outputs, statistics, rings, sizes, scale,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, SINKS: gl.constexpr, ACCUMULATE: gl.constexpr, OVERLAP: gl.constexpr,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """o and lse of the CONSUMER-th 64 queries of each of this program's tiles."""
    o_desc, p_o, stride_ob, stride_os, stride_oh = outputs
    p_lse, p_sinks, stride_lb, stride_lh = statistics
    q_smem, k_smem, v_smem, q_ready, q_free, k_ready, k_free, v_ready, v_free = rings
    n_heads, _groups, n_rows, n_tiles, section, sq, sk, diagonal, left, right = sizes
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    dtype: gl.constexpr = q_smem.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    factor = scale * LOG2E
    q = q_smem.index(CONSUMER).reshape([ROWS, BLOCK_D])
    count = 0
    tiles = 0
    for turn in range(gl.cdiv(n_tiles * n_rows, gl.num_programs(0))):
        number = tile_number(turn)
        if number < n_tiles * n_rows:
            tile, row = split_program(number, n_tiles, n_rows, section, RIGHT)
            batch = row // n_heads
            head = row % n_heads
            i = tile * BLOCK_M
            first, full_first, full_last, last = key_tiles(
                i, sq, sk, diagonal, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
            )
            o_i = i + CONSUMER * ROWS + gl.arange(0, ROWS, layout=row_layout)
            o_p = o_i + diagonal
            m = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
            l = gl.zeros([ROWS], gl.float32, row_layout)
            if SINKS:
                m = gl.zeros([ROWS], gl.float32, row_layout) + gl.load(p_sinks + head).to(gl.float32) * LOG2E
                l += 1.0
            acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
            p_lse_row = p_lse + (batch.to(gl.int64) * stride_lb + head.to(gl.int64) * stride_lh)
            if ACCUMULATE:  # what is there is one more block of keys
                rows = i + CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, o_layout))
                p_o_row = p_o + (batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh)
                acc = load_rows(p_o_row, rows, BLOCK_D, stride_os, sq, o_layout)
                m = gl.load(p_lse_row + o_i, mask=o_i < sq, other=float("-inf")) * LOG2E
                l = gl.where(m == float("-inf"), 0.0, 1.0)
            p = gl.zeros([ROWS, BLOCK_N], dtype, p_layout)
            mbarrier.wait(q_ready.index(CONSUMER), tiles & 1)
            done = 0
            if OVERLAP and last > first:
                s = _scores(q, k_smem, k_ready, count, layout, BLOCK_N, BLOCK_D, STAGES)
                s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
                mbarrier.arrive(k_free.index(count % STAGES), count=1)
                b_p, alpha, m, l = _softmax(
                    s, m, l, (last - 1) * BLOCK_N, o_p, sk, left, right, factor, True, LEFT, RIGHT, BLOCK_N
                )
                if ACCUMULATE:
                    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
                p = gl.convert_layout(b_p.to(dtype), p_layout)
                done = 1
            # Downwards: tiles that the right side or the end cuts, those that are visible whole, those that the left
            # side cuts.
            top = last - done
            steps = gl.maximum(top - full_last, 0)
            acc, p, m, l = _walk(
                acc, p, m, l, q, rings, count + last - top, (top - 1) * BLOCK_N, steps, o_p, sk, left, right, factor,
                True, LEFT, RIGHT, OVERLAP, BLOCK_N, BLOCK_D, STAGES, layout, o_layout,
            )  # fmt: skip
            top -= steps
            steps = gl.maximum(top - full_first, 0)
            acc, p, m, l = _walk(
                acc, p, m, l, q, rings, count + last - top, (top - 1) * BLOCK_N, steps, o_p, sk, left, right, factor,
                False, LEFT, RIGHT, OVERLAP, BLOCK_N, BLOCK_D, STAGES, layout, o_layout,
            )  # fmt: skip
            if LEFT:
                top -= steps
                acc, p, m, l = _walk(
                    acc, p, m, l, q, rings, count + last - top, (top - 1) * BLOCK_N, top - first, o_p, sk, left, right,
                    factor, True, LEFT, RIGHT, OVERLAP, BLOCK_N, BLOCK_D, STAGES, layout, o_layout,
                )  # fmt: skip
            count += last - first
            if OVERLAP and last > first:
                acc = _add_values(acc, p, v_smem, v_ready, count - 1, BLOCK_N, BLOCK_D, STAGES)
                acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
                mbarrier.arrive(v_free.index((count - 1) % STAGES), count=1)

            # Where no key was seen l is 0 and m is -inf: o = 0, lse = -inf.
            l = gl.where(l == 0.0, 1.0, l)
            gl.store(p_lse_row + o_i, m * LN2 + gl.log2(l) * LN2, mask=o_i < sq)
            o = acc * gl.convert_layout(1.0 / l, gl.SliceLayout(1, o_layout))[:, None]
            if ACCUMULATE:
                store_rows(p_o_row, o, rows, BLOCK_D, stride_os, sq, 1.0, o_layout, False)
            else:  # the queries are read for the last time: o leaves through their place
                q.store(o.to(dtype))
                fence_async_shared()
                tma_store(o_desc, [batch, i + CONSUMER * ROWS, head, 0], q_smem.index(CONSUMER))
                tma_store_wait(0)
            mbarrier.arrive(q_free.index(CONSUMER), count=1)
            tiles += 1


@gluon.jit(do_not_specialize=LENGTHS)
def attention_fwd_kernel_hopper(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    p_o,
    p_lse,
    p_sinks,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lb,
    stride_lh,
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
    SINKS: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    OVERLAP: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """o and lse of a dense batch (B, S, H, D), whose tensors the descriptors describe by tiles of one head.

    With ACCUMULATE, merged into those that are there: p_o is float32, and there is no o_desc; else it is the other way.
    Tiles of q and o have 64 rows, and as many columns as D and Dv, which are equal; those of k and v BLOCK_N. A program
    takes one tile of 64 CONSUMERS queries after another, of each num_programs.
    """
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, ROWS, 1, BLOCK_D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, 1, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, 1, BLOCK_D], v_desc.layout)
    q_ready = barriers(CONSUMERS, 1)
    q_free = barriers(CONSUMERS, 1)
    k_ready = barriers(STAGES, 1)
    k_free = barriers(STAGES, CONSUMERS)
    v_ready = barriers(STAGES, 1)
    v_free = barriers(STAGES, CONSUMERS)
    fence_async_shared()
    rings = (q_smem, k_smem, v_smem, q_ready, q_free, k_ready, k_free, v_ready, v_free)
    sizes = (n_heads, groups, n_rows, n_tiles, section, sq, sk, diagonal, left, right)
    descriptors = (q_desc, k_desc, v_desc)
    outputs = (o_desc, p_o, stride_ob, stride_os, stride_oh)
    statistics = (p_lse, p_sinks, stride_lb, stride_lh)
    # Registers of a thread: 65,536 for 128 threads of each warpgroup, of which the loads want the least.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_load, (descriptors, rings, sizes, LEFT, RIGHT, CONSUMERS, BLOCK_N, STAGES)),
                (_compute, (outputs, statistics, rings, sizes, scale, LEFT, RIGHT, SINKS, ACCUMULATE, OVERLAP,
                            CONSUMERS, BLOCK_N, BLOCK_D, STAGES, 0)),
                (_compute, (outputs, statistics, rings, sizes, scale, LEFT, RIGHT, SINKS, ACCUMULATE, OVERLAP,
                            CONSUMERS, BLOCK_N, BLOCK_D, STAGES, 1)),
            ],
            [4, 4],
            [240, 240],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_load, (descriptors, rings, sizes, LEFT, RIGHT, CONSUMERS, BLOCK_N, STAGES)),
                (_compute, (outputs, statistics, rings, sizes, scale, LEFT, RIGHT, SINKS, ACCUMULATE, OVERLAP,
                            CONSUMERS, BLOCK_N, BLOCK_D, STAGES, 0)),
                (_compute, (outputs, statistics, rings, sizes, scale, LEFT, RIGHT, SINKS, ACCUMULATE, OVERLAP,
                            CONSUMERS, BLOCK_N, BLOCK_D, STAGES, 1)),
                (_compute, (outputs, statistics, rings, sizes, scale, LEFT, RIGHT, SINKS, ACCUMULATE, OVERLAP,
                            CONSUMERS, BLOCK_N, BLOCK_D, STAGES, 2)),
            ],
            [4, 4, 4],
            [160, 160, 160],
        )  # fmt: skip
