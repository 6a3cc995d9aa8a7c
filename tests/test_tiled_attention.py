"""Attention by pairs of tiles against the whole: geometry of packed and batched sequences, windows, dropout."""

from __future__ import annotations

import pytest
import torch
from helpers import a_few, assert_exact

from pyckpt.attend import pairs
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
    "no keys": Layout(1, 14, torch.tensor([[0, 7, 14, 14], [0, 0, 0, 14]], dtype=torch.int32)),
    "packed short ones": Layout(1, 30, torch.tensor([0, *range(1, 31)], dtype=torch.int32)),
}


def by_tiles(attend, layout, tile, q, k, v, do, seed):
    """o, dq, dk, dv and the pairs that were attended."""
    tiled, n = TiledAttend(attend, layout, tile), -(-layout.tokens // tile)
    cut = [slice(i * tile, min(i * tile + tile, layout.tokens)) for i in range(n)]
    o, grads, attended = torch.zeros_like(do), [torch.zeros_like(t) for t in (q, k, v)], []
    for i in range(n):
        rows = cut[i]
        lse = torch.full((1, HEADS, rows.stop - rows.start), float("-inf"), dtype=q.dtype)
        for j in tiled.keys_of(i):
            tiled.forward(i, j, q[rows], k[cut[j]], v[cut[j]], o[rows], lse, seed)
            attended.append((i, j))
        delta = tiled.delta(do[rows], o[rows])
        for j in tiled.keys_of(i):
            into = grads[0][rows], grads[1][cut[j]], grads[2][cut[j]]
            tiled.backward(i, j, do[rows], q[rows], k[cut[j]], v[cut[j]], o[rows], lse, delta, into, seed)
    return {"o": o, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}, attended


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
        got, attended = by_tiles(attend, layout, tile, q, k, v, do, seed)
        for name in want:
            assert_exact(got[name], want[name], f"{name} by tiles of {tile}", terms=10.0)
        assert all(j <= i for i, j in attended) or window[1] != 0


def test_sequences_that_lie_in_a_tile_are_one_call(monkeypatch):
    """The rest, across its ends, is attended one by one."""
    calls: list[tuple[str, int]] = []
    for name in ("attention_fwd", "attention_tile_fwd_", "attention_bwd", "attention_tile_bwd_"):
        op = getattr(pairs.ops, name)
        tokens = 1 if name.endswith(("bwd", "bwd_")) else 0

        def counted(*args, op=op, name=name, tokens=tokens):
            calls.append((name, args[tokens].shape[-3]))
            return op(*args)

        monkeypatch.setattr(pairs.ops, name, counted)
    starts = torch.tensor([0, 3, 3, 7, 12, 16, 19, 20], dtype=torch.int32)
    for layout, tile, whole, parts in (
        (Layout(1, 20, starts), 10, [7, 8], [3, 2, 2]),
        (Layout(5, 4), 10, [8, 8], [2, 2, 2]),
        (Layout(1, 20, torch.tensor([0, 9, 20], dtype=torch.int32)), 20, [20], []),
        (Layout(1, 20), 20, [], [20]),
    ):
        attend = DenseAttend(HEADS, KV_HEADS, DIM, (-1, 0), 0.0, 0.4)
        widths = attend.d_q, attend.d_k, attend.d_v, attend.d_o
        q, k, v, do = (torch.randn(20, w, dtype=torch.float64) for w in widths)
        calls.clear()
        by_tiles(attend, layout, tile, q, k, v, do, None)
        for kind in ("fwd", "bwd"):
            assert [n for name, n in calls if name == f"attention_{kind}"] == whole, layout
            assert [n for name, n in calls if name == f"attention_tile_{kind}_"] == parts, layout


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


@pytest.mark.parametrize("layout", ["packed", "batch of short ones", "padded"])
def test_by_the_triton_kernels(layout, monkeypatch):
    """Whose queries, keys and sums are views of a tile's here."""
    layout = LAYOUTS[layout]
    attend = DenseAttend(HEADS, KV_HEADS, 16, (-1, 0), 0.0, 0.4)
    widths = attend.d_q, attend.d_k, attend.d_v, attend.d_o
    q, k, v, do = (torch.randn(layout.tokens, w) for w in widths)
    o, lse = attend.forward(layout, *(t.double() for t in (q, k, v)))
    made = attend.backward(layout, *(t.double() for t in (do, q, k, v)), o, lse)
    monkeypatch.setenv("PYCKPT_BACKEND", "triton")
    got, _ = by_tiles(attend, layout, 20, q, k, v, do, None)
    for name, want in {"o": o, **dict(zip(("dq", "dk", "dv"), made, strict=True))}.items():
        # Float32's rounding in sums of up to 50 products of 16.
        torch.testing.assert_close(got[name].double(), want, rtol=1e-4, atol=1e-5, msg=name)
