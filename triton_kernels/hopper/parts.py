"""What the kernels for Hopper share: the copy engine by its present names, barriers, a program's tiles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..attention_tile import visit_range

# Triton 3.6 has other names for them.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
ROWS = gl.constexpr(64)  # queries or keys of a warpgroup: the rows of one wgmma instruction


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers, each through its phase after so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def tile_number(turn):
    """Of this program's tile in this turn: forwards and backwards by turns, or one would have all the longest."""
    n_programs = gl.num_programs(0)
    place = gl.program_id(0)
    if turn % 2 == 1:
        place = n_programs - 1 - place
    return turn * n_programs + place


@gluon.jit
def tile_range(lo, full_lo, full_hi, hi, BLOCK: gl.constexpr):
    """What `visit_range` gives, as numbers of tiles: (first, full_first, full_last, last), in this order."""
    first = lo // BLOCK
    last = gl.maximum((gl.maximum(hi, 0) + BLOCK - 1) // BLOCK, first)
    full_first = gl.minimum(full_lo // BLOCK, last)
    full_last = gl.maximum(gl.minimum(full_hi // BLOCK, last), full_first)
    return first, full_first, full_last, last


@gluon.jit
def key_tiles(i, sq, sk, diagonal, left, right, LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr,
              BLOCK_N: gl.constexpr):  # fmt: skip
    """(first, full_first, full_last, last) key tiles that the queries from i on see, as `visit_range` has them."""
    stop = gl.minimum(i + BLOCK_M, sq)
    lo, full_lo, full_hi, hi = visit_range(i, stop, diagonal, sk, left, right, LEFT, RIGHT, BLOCK_N)
    return tile_range(lo, full_lo, full_hi, hi, BLOCK_N)


@gluon.jit
def _places(p, o_r, width: gl.constexpr, stride, n, layout: gl.constexpr):
    """Pointers to rows o_r of a matrix of so many columns, and which of them there are: those below n."""
    o_c = gl.arange(0, width, layout=gl.SliceLayout(0, layout))
    p_tile = p + o_r.to(gl.int64)[:, None] * stride + o_c[None, :]
    return p_tile, (o_r[:, None] < n) & (o_c[None, :] < width)


@gluon.jit
def load_rows(p, o_r, width: gl.constexpr, stride, n, layout: gl.constexpr):
    """Rows o_r, 0 beyond the last. p points to a head's first row."""
    p_tile, m = _places(p, o_r, width, stride, n, layout)
    return gl.load(p_tile, mask=m, other=0.0)


@gluon.jit
def store_rows(p, value, o_r, width: gl.constexpr, stride, n, scale, layout: gl.constexpr, ADD: gl.constexpr):
    """Rows o_r of scale * value, or those added to what is there. p points to a head's first row."""
    p_tile, m = _places(p, o_r, width, stride, n, layout)
    value = value * scale
    if ADD:
        value += gl.load(p_tile, mask=m, other=0.0)
    gl.store(p_tile, value.to(p.dtype.element_ty), mask=m)
