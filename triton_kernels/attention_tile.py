"""What the attention kernels share: where a program works, which tiles it visits, and what a score becomes.

Geometry. Query i stands at p = i + diagonal on the axis of the keys, and sees key j where
p - left <= j <= p + right. The diagonal is Sk - Sq for a whole sequence (bottom-right alignment), or 0 (top-left), and
q_start - k_start for a tile of queries against a tile of keys. Packed sequences have one each; the argument is then 1
for bottom-right alignment, 0 for top-left.

Scores, running maxima and lse are held in units in which `exponential` is cheap. In half precision that is base
2: exp(x) is exp2(x * log2(e)), and the factor joins the scale. In exact float32 (`PRECISION` not "tf32") it is base e:
the conversion would round lse once more, by as much as all else together.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EIGHTS = tl.constexpr(8)  # a kind of RAGGED, see `_places`
# Arguments that change with the lengths, the batch and the step: specialised, each new length would compile anew, and
# in the middle of a run the first seed that is a multiple of 16.
LENGTHS = [
    "n_heads",
    "groups",
    "n_sequences",
    "n_rows",
    "n_tiles",
    "section",
    "sq",
    "sk",
    "diagonal",
    "k_start",
    "left",
    "right",
    "threshold",
    "seed",
    "stride_lb",
    "stride_lh",
    "stride_slopes",
]


@triton.jit
def unit(PRECISION: tl.constexpr):
    """How many of the kernels' units are one nat."""
    return LOG2E if PRECISION == "tf32" else 1.0


@triton.jit
def exponential(x, PRECISION: tl.constexpr):
    """exp of a number in the kernels' units."""
    return tl.exp2(x) if PRECISION == "tf32" else tl.exp2(x * LOG2E)


@triton.jit
def split_program(pid, n_tiles, n_rows, section, REVERSED: tl.constexpr):
    """(tile, row) of a program: sections of rows, within one all rows of a tile before the next tile.

    A row is a (batch, head). A section's keys and values fit the L2 cache together. `REVERSED` starts with
    the last tile: under a causal mask the longest, so that the short ones fill the gaps at the end.
    """
    per_section = section * n_tiles
    first = pid // per_section * section
    rows = tl.minimum(section, n_rows - first)
    inner = pid % per_section
    tile = inner // rows
    if REVERSED:
        tile = n_tiles - 1 - tile
    return tile, first + inner % rows


@triton.jit
def find_sequence(slot, p_cu, n_sequences, BLOCK: tl.constexpr):
    """The packed sequence that tile number `slot` belongs to, and the tile's first token within it.

    Sequence i owns the slots from cu[i] // BLOCK + i on: at least as many as it has tiles, so that the
    launch needs no list of tiles and no look at the lengths. A slot too many begins past the sequence's end.
    """
    lo = 0
    hi = n_sequences
    while hi - lo > 1:
        middle = (lo + hi) // 2
        before = tl.load(p_cu + middle) // BLOCK + middle <= slot
        lo = tl.where(before, middle, lo)
        hi = tl.where(before, hi, middle)
    return lo, (slot - tl.load(p_cu + lo) // BLOCK - lo) * BLOCK


@triton.jit
def locate(
    tile,
    row,
    n_heads,
    p_cu_q,
    p_cu_k,
    n_sequences,
    sq,
    sk,
    diagonal,
    PACKED: tl.constexpr,
    ALONG_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(head, sequence, start, sq, sk, diagonal, batch, token, key) of a tile of BLOCK queries (keys) of a row.

    The tile begins at `start` within its sequence; batch, token and key, int64, are where that begins in memory.
    Dense, the sequence is the batch; packed, the batch is 0. A `start` beyond the sequence's end: nothing to do.
    """
    sequence = row // n_heads
    head = row % n_heads
    start = tile * BLOCK
    batch = sequence.to(tl.int64)
    token = tl.zeros([], tl.int64)
    key = tl.zeros([], tl.int64)
    if PACKED:
        sequence, start = find_sequence(tile, p_cu_k if ALONG_KEYS else p_cu_q, n_sequences, BLOCK)
        batch = tl.zeros([], tl.int64)
        token = tl.load(p_cu_q + sequence).to(tl.int64)
        key = tl.load(p_cu_k + sequence).to(tl.int64)
        sq = (tl.load(p_cu_q + sequence + 1) - token).to(tl.int32)
        sk = (tl.load(p_cu_k + sequence + 1) - key).to(tl.int32)
        diagonal = (sk - sq) * diagonal
    return head, sequence, start, sq, sk, diagonal, batch, token, key


@triton.jit
def visit_range(
    start, stop, diagonal, n, before, after, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr
):
    """(lo, full_lo, full_hi, hi) along the other axis, for the rows [start, stop) of this one.

    Tiles from lo to full_lo and from full_hi to hi need a mask; those between are visible to every row, and
    end before n. Row r sees [r + diagonal - before, r + diagonal + after]; a side without limit has BEFORE
    (AFTER) false. For the queries that see a key, swap the sides and negate the diagonal.
    """
    lo = 0
    if BEFORE:
        lo = tl.maximum(start + diagonal - before, 0) // BLOCK * BLOCK
    hi = n
    full_hi = n // BLOCK * BLOCK
    if AFTER:
        hi = tl.minimum(n, stop + diagonal + after)
        full_hi = tl.minimum(n, tl.maximum(start + diagonal + after + 1, 0)) // BLOCK * BLOCK
    full_lo = lo
    if BEFORE:
        full_lo = (tl.maximum(stop - 1 + diagonal - before, 0) + BLOCK - 1) // BLOCK * BLOCK
        full_lo = tl.minimum(full_lo, (tl.maximum(hi, 0) + BLOCK - 1) // BLOCK * BLOCK)
        full_lo = tl.maximum(full_lo, lo)
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def visible(o_p, o_j, sk, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which keys j are seen from positions p; o_p and o_j broadcast against each other."""
    m = (o_j < sk) & (o_p == o_p)
    if LEFT:
        m &= o_j >= o_p - left
    if RIGHT:
        m &= o_j <= o_p + right
    return m


@triton.jit
def load_tile(p, o_r, o_c, stride, n, width, MASKED: tl.constexpr, RAGGED: tl.constexpr):
    """Rows o_r [R] and columns o_c [C] of a matrix with unit column stride, as [R, C]; 0 beyond its ends.

    RAGGED: there are more columns than `width`, see `_places`.
    """
    p_tile = _places(p, o_r, o_c, stride, RAGGED)
    if MASKED:
        if RAGGED:
            return tl.load(p_tile, mask=(o_r[:, None] < n) & _inside(o_c, width, RAGGED), other=0.0)
        return tl.load(p_tile, mask=o_r[:, None] < n, other=0.0)
    if RAGGED:
        return tl.load(p_tile, mask=_inside(o_c, width, RAGGED), other=0.0)
    return tl.load(p_tile)


@triton.jit
def _places(p, o_r, o_c, stride, RAGGED: tl.constexpr):
    """Pointers to [R, C].

    RAGGED == EIGHTS promises that 8 divides the width, and 16 each row's address: Triton can't tell that from strides
    that 16 does not divide, and would load and store two bytes at a time.
    """
    p_rows = p + o_r.to(tl.int64)[:, None] * stride
    if RAGGED == EIGHTS:
        p_rows = tl.multiple_of(p_rows, (16, 16))
    return p_rows + o_c[None, :]


@triton.jit
def _inside(o_c, width, RAGGED: tl.constexpr):
    """Which columns are there; of EIGHTS all eight of one access, or none."""
    if RAGGED == EIGHTS:
        m = o_c[None, :] // 8 < width // 8
    else:
        m = o_c[None, :] < width
    return m


@triton.jit
def load_rows(
    p,
    batch,
    start,
    head,
    o_r,
    o_c,
    stride,
    n,
    width,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The rows o_r of one head, from `start` on, as [R, C]; 0 beyond its ends.

    `p` points to the head's first row, or, with TMA, is a descriptor of the whole tensor (B, S, H, D).
    """
    if TMA:
        b = p.load([batch, start, head, 0]).reshape(ROWS, COLUMNS)
    else:
        b = load_tile(p, o_r, o_c, stride, n, width, MASKED, RAGGED)
    return b


@triton.jit
def store_tile(p, b, o_r, o_c, stride, n, width, ADD: tl.constexpr, RAGGED: tl.constexpr):
    """Store b [R, C] in the rows below n and columns below width, or add it to what is there."""
    p_tile = _places(p, o_r, o_c, stride, RAGGED)
    m = (o_r[:, None] < n) & _inside(o_c, width, RAGGED)
    if ADD:
        b += tl.load(p_tile, mask=m, other=0.0)
    tl.store(p_tile, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def tanh(x, PRECISION: tl.constexpr):
    """tanh from one exp2. Near 0 that cancels: float32 takes the Taylor series there, to x⁹."""
    a = tl.abs(x)
    t = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    t = tl.where(x < 0, -t, t)
    if PRECISION != "tf32":
        y = x * x
        series = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
        t = tl.where(a < 0.25, series, t)
    return t


@triton.jit
def capped(s, scale, softcap, PRECISION: tl.constexpr):
    """softcap * tanh(s * scale / softcap), and its derivative by s * scale."""
    t = tanh(s * (scale / softcap), PRECISION)
    return softcap * t, 1.0 - t * t


@triton.jit
def number(sequence, n_sequences, PACKED: tl.constexpr):
    """A sequence's number, by which dropout draws. In a dense batch `n_sequences` is that of the first one.

    An argument of its own would change every kernel: which products overlap hangs on less.
    """
    return sequence if PACKED else sequence + n_sequences


@triton.jit
def kept(seed, sequence, head, o_q, o_k, threshold):
    """Which probabilities dropout keeps, [Q, K]: by Philox4x32-10 (Salmon et al. 2011), keyed by the seed.

    The counter is (key position // 4, query position, head, sequence) and the word is the key position
    modulo 4, so the choice depends on no tile size. A word's upper 31 bits are compared with the threshold.
    """
    c = (o_q + o_k) * 0
    w0, w1, w2, w3 = tl.philox(seed, c + (o_k >> 2), c + o_q, c + head, c + sequence)
    word = c + (o_k & 3)
    w = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return (w >> 1).to(tl.int32) >= threshold
