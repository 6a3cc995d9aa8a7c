"""Attention by pairs of tiles against the whole: geometry of packed and batched sequences, windows, dropout."""

from __future__ import annotations

import pytest
import torch
from helpers import a_few, assert_exact

from pyckpt.attend.dense import DenseAttend, Layout
from pyckpt.attend.tiled import TiledAttend

HEADS, KV_HEADS, DIM = 4, 2, 6
WINDOWS = [(-1, 0), (-1, -1), (5, 0), (0, 0), (6, 3), (-1, 4), (4, -1)]
LAYOUTS = {
    "one": Layout(1, 40),
    "batch": Layout(3, 17),
    "batch of short ones": Layout(20, 2),
    "packed": Layout(1, 50, torch.tensor([0, 5, 5, 23, 24, 50, 50], dtype=torch.int32)),
    # Queries without keys, keys without queries, and queries beyond a sequence's keys.
    "padded": Layout(
        1,
        50,
        torch.tensor(
            [[0, 3, 3, 20, 20, 26, 26, 44, 44, 50, 50], [0, 0, 3, 11, 20, 20, 26, 44, 44, 44, 50]], dtype=torch.int32
        ),
    ),
    "packed short ones": Layout(1, 30, torch.tensor([0, *range(1, 31)], dtype=torch.int32)),
}


def by_tiles(attend, layout, tile, q, k, v, do, seed):
    """o, dq, dk, dv and the pairs that were attended."""
    tiled, n = TiledAttend(attend, layout, tile), -(-layout.tokens // tile)
    cut = [slice(i * tile, min(i * tile + tile, layout.tokens)) for i in range(n)]
    o, grads, pairs = torch.zeros_like(do), [torch.zeros_like(t) for t in (q, k, v)], []
    for i in range(n):
        rows = cut[i]
        lse = torch.full((1, HEADS, rows.stop - rows.start), float("-inf"), dtype=q.dtype)
        for j in tiled.keys_of(i):
            tiled.forward(i, j, q[rows], k[cut[j]], v[cut[j]], o[rows], lse, seed)
            pairs.append((i, j))
        delta = tiled.delta(do[rows], o[rows])
        for j in tiled.keys_of(i):
            into = grads[0][rows], grads[1][cut[j]], grads[2][cut[j]]
            tiled.backward(i, j, do[rows], q[rows], k[cut[j]], v[cut[j]], o[rows], lse, delta, into, seed)
    return {"o": o, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}, pairs


@pytest.mark.parametrize("window", a_few(WINDOWS, always=(0, 2, 4)))
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("extras", [(0.0, 0.0), (2.0, 0.3)], ids=["plain", "softcap-dropout"])
@pytest.mark.parametrize("v_dim", [None, 4])
def test_pairs_of_tiles_are_the_whole(window, layout, extras, v_dim):
    softcap, dropout = extras
    attend = DenseAttend(HEADS, KV_HEADS, DIM, window, softcap, 0.4, dropout, v_head_dim=v_dim)
    widths = attend.d_q, attend.d_k, attend.d_v, attend.d_o
    q, k, v, do = (torch.randn(layout.tokens, w, dtype=torch.float64) for w in widths)
    seed = 11 if dropout else None
    o, lse = attend.forward(layout, q, k, v, seed)
    want = {"o": o, **dict(zip(("dq", "dk", "dv"), attend.backward(layout, do, q, k, v, o, lse, seed), strict=True))}
    for tile in (4, 7, 100):
        got, pairs = by_tiles(attend, layout, tile, q, k, v, do, seed)
        for name in want:
            assert_exact(got[name], want[name], f"{name} by tiles of {tile}", terms=10.0)
        assert all(j <= i for i, j in pairs) or window[1] != 0


def test_tiles_that_nobody_sees_are_skipped():
    causal, window = (DenseAttend(1, 1, 2, w, 0.0, 1.0) for w in ((-1, 0), (10, 0)))
    long = Layout(1, 100)
    assert [list(TiledAttend(causal, long, 30).keys_of(i)) for i in range(4)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert [list(TiledAttend(window, long, 10).keys_of(i)) for i in (0, 1, 9)] == [[0], [0, 1], [8, 9]]
    packed = Layout(1, 100, torch.tensor([0, 45, 100], dtype=torch.int32))
    assert [list(TiledAttend(causal, packed, 20).keys_of(i)) for i in range(5)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [2, 3],
        [2, 3, 4],
    ]
