"""Attention against its reference: exact in float64, by the 2x rule below, over masks, layouts and tilings."""

from __future__ import annotations

import fractions
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LOW_DTYPES, a_few, assert_close_to_truth, assert_exact, check_exact, check_truth, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import pyckpt
from pyckpt.ops import attention_torch as op
from pyckpt.ops import philox, reference

ops = torch.ops.pyckpt

# What a user gives, and the (left, right) that it means.
MASKS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "causal": ({}, (-1, 0)),
    "full": ({"causal": False}, (-1, -1)),
    "window": ({"window": 5}, (5, 0)),
    "window-self": ({"window": 0}, (0, 0)),
    "window-causal-pair": ({"window": (6, 9)}, (6, 0)),
    "window-both": ({"causal": False, "window": (17, 3)}, (17, 3)),
    "window-int-not-causal": ({"causal": False, "window": 4}, (4, 0)),
    "window-right": ({"causal": False, "window": (-1, 4)}, (-1, 4)),
    "window-left": ({"causal": False, "window": (4, -1)}, (4, -1)),
    "window-wide": ({"causal": False, "window": (10**6, 10**6)}, (-1, -1)),
}
LENGTHS = [(1, 1), (239, 1), (1, 239), (799, 3), (3, 799), (113, 203), (203, 113), (64, 64), (127, 127)]
ALL_MASKS = pytest.mark.parametrize("mask", MASKS)
SOFTCAP = pytest.mark.parametrize("softcap", [None, 1.5])
CU_SEQLENS = torch.tensor([0, 0, 19, 20, 20, 20, 83, 90, 90], dtype=torch.int32)

CU_SEQLENS_Q = torch.tensor([0, 4, 4, 9, 30], dtype=torch.int32)
CU_SEQLENS_K = torch.tensor([0, 7, 12, 12, 20], dtype=torch.int32)  # the third sequence has no key


def qkv(
    sq: int, sk: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, dim_v: int | None = None, batch: int = 2
) -> dict[str, Tensor]:
    shapes = {"q": (sq, heads, dim), "k": (sk, kv_heads, dim), "v": (sk, kv_heads, dim_v or dim)}
    return {n: torch.randn(batch, *shape, dtype=torch.float64) for n, shape in shapes.items()}


def packed(dim: int = 8, dim_v: int | None = None) -> dict[str, Tensor]:
    return {n: t[0] for n, t in qkv(90, 90, dim=dim, dim_v=dim_v, batch=1).items()}


def ours(mask: str = "causal", lse: bool = False, **options: Any) -> Any:
    return lambda q, k, v: pyckpt.attention(q, k, v, **MASKS[mask][0], return_lse=lse, **options)


def truth(mask: str = "causal", lse: bool = False, softcap: float | None = None, **options: Any) -> Any:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        both = reference.attention(q, k, v, window=MASKS[mask][1], softcap=softcap or 0.0, **options)
        return both if lse else both[0]

    return fn


def check_attention(inputs: dict[str, Tensor], mask: str, **options: Any) -> None:
    """Exact through o alone, and through o and lse (whose gradient takes another way)."""
    for lse in (False, True):
        check_exact(ours(mask, lse, **options), truth(mask, lse, **options), inputs)


def raw(mask: str, softcap: float = 0.0, scale: float = 0.3) -> tuple[int, int, float, float]:
    return *MASKS[mask][1], softcap, scale


@pytest.fixture(params=["one-tile", "tiny-tiles"])
def tiling(request, monkeypatch) -> None:
    """As it ships (all of these tests' lengths fit in few tiles), and with tiles that divide nothing evenly."""
    if request.param == "tiny-tiles":
        monkeypatch.setattr(op, "_FLASH_TILE", 7)
        monkeypatch.setattr(op, "_SCORE_ELEMENTS", 2000)


class TestExact:
    @ALL_MASKS
    @SOFTCAP
    @pytest.mark.parametrize(("sq", "sk"), LENGTHS)
    def test_lengths(self, sq, sk, softcap, mask):
        check_attention(qkv(sq, sk), mask, softcap=softcap)

    @ALL_MASKS
    @SOFTCAP
    @pytest.mark.parametrize(
        ("flash_tile", "score_elements"), a_few([(1, 1), (7, 2000), (32, 10**5)], always=(1,), names=2)
    )
    def test_tiles(self, flash_tile, score_elements, softcap, mask, monkeypatch):
        monkeypatch.setattr(op, "_FLASH_TILE", flash_tile)
        monkeypatch.setattr(op, "_SCORE_ELEMENTS", score_elements)
        for sq, sk in ((37, 50), (50, 37), (45, 45)):
            check_attention(qkv(sq, sk), mask, softcap=softcap)

    @pytest.mark.parametrize("mask", ["causal", "window", "full"])
    def test_more_than_one_tile_as_it_ships(self, mask):
        check_attention(qkv(1100, 1100, heads=1, kv_heads=1, batch=1), mask)
        check_attention(qkv(600, 1100, heads=1, kv_heads=1, batch=1), mask, softcap=2.0)

    def test_a_window_of_other_integers(self):
        inputs = qkv(20, 20)
        for window in (torch.tensor(5), (torch.tensor(5), torch.tensor(9))):
            check_exact(lambda *t, w=window: pyckpt.attention(*t, window=w), truth("window"), inputs)

    @pytest.mark.parametrize("dims", [(1, 1), (5, 5), (80, 80), (8, 3), (3, 16)])
    @pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1)])
    def test_heads(self, heads, dims, tiling):
        check_attention(qkv(21, 30, *heads, *dims), "causal")
        check_attention(qkv(21, 21, *heads, *dims), "full")

    @SOFTCAP
    @pytest.mark.parametrize("scale", [1.7, 0.0, -0.4])
    def test_scale(self, scale, softcap):
        check_attention(qkv(20, 20), "causal", softcap=softcap, scale=scale)

    @ALL_MASKS
    @SOFTCAP
    def test_packed_with_empty_sequences(self, softcap, mask, tiling):
        check_attention(packed(), mask, softcap=softcap, cu_seqlens=CU_SEQLENS)

    def test_packed_with_another_width_of_v(self, tiling):
        check_attention(packed(8, 5), "causal", cu_seqlens=CU_SEQLENS)

    @SOFTCAP
    @ALL_MASKS
    def test_packed_with_starts_of_the_keys(self, mask, softcap, tiling):
        options = {"cu_seqlens": CU_SEQLENS_Q, "cu_seqlens_k": CU_SEQLENS_K, "softcap": softcap}
        options |= {"alibi_slopes": torch.rand(4, 4, dtype=torch.float64), "sinks": torch.randn(4, dtype=torch.float64)}
        inputs = {n: t[0] for n, t in qkv(30, 20, batch=1).items()}
        check_attention(inputs, mask, **options)
        check_attention(inputs, mask, **{n: t for n, t in options.items() if n.startswith("cu")})

    @SOFTCAP
    @pytest.mark.parametrize("top_left", [False, True])
    @pytest.mark.parametrize("mask", ["causal", "full", "window", "window-both"])
    def test_packed_with_lengths_of_keys_of_their_own(self, mask, top_left, softcap, tiling):
        cu_q, cu_k = CU_SEQLENS_Q, CU_SEQLENS_K
        whole = {n: t[0] for n, t in qkv(30, 20, batch=1).items()}
        do = torch.randn(30, 4, 8, dtype=torch.float64)
        options = *raw(mask, softcap or 0.0), None, None, 0.0, None, top_left
        o, lse = ops.attention_fwd(*whole.values(), cu_q, cu_k, *options)
        grads = ops.attention_bwd(do, *whole.values(), o, lse, None, cu_q, cu_k, *options)
        for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(cu.tolist()) for cu in (cu_q, cu_k)), strict=True):
            cuts = {"q": slice(q0, q1), "k": slice(k0, k1), "v": slice(k0, k1)}
            part = {n: t[cuts[n]].unsqueeze(0) for n, t in whole.items()}
            want, _ = step(
                truth(mask, True, softcap, scale=0.3, top_left=top_left),
                part,
                [do[None, q0:q1], lse[None, :, q0:q1] * 0],
            )
            assert_exact(o[q0:q1], want["out 0"][0], "o")
            assert_exact(lse[:, q0:q1], want["out 1"][0], "lse")
            for n, g in zip("qkv", grads, strict=True):
                assert_exact(g[cuts[n]], want[f"d{n}"][0], f"d{n}")

    @pytest.mark.parametrize(("sq", "sk"), [(50, 37), (37, 50), (45, 45), (20, 0)])
    @pytest.mark.parametrize("mask", ["causal", "full", "window", "window-both"])
    def test_aligned_at_the_first_query_and_key(self, mask, sq, sk, tiling):
        slopes = torch.rand(4, dtype=torch.float64)
        for extras in ((None, None), (torch.randn(4, dtype=torch.float64), slopes)):
            sinks, slopes = extras
            given = {"sinks": sinks, "alibi_slopes": slopes, "scale": 0.3, "top_left": True}
            rest = *raw(mask), *extras, 0.0, None, True
            check_exact(
                lambda q, k, v, rest=rest: ops.attention_fwd(q, k, v, None, None, *rest),
                truth(mask, True, **given),
                qkv(sq, sk),
            )

    @SOFTCAP
    def test_only_lse_is_differentiated(self, softcap, tiling):
        inputs = qkv(20, 30)
        check_exact(
            lambda *t: pyckpt.attention(*t, softcap=softcap, return_lse=True)[1].sum(-1) + 0 * t[2].sum(),
            lambda *t: truth("causal", True, softcap)(*t)[1].sum(-1) + 0 * t[2].sum(),
            inputs,
        )

    @SOFTCAP
    @pytest.mark.parametrize("mask", ["causal", "full", "window"])
    def test_a_gradient_of_stride_zero(self, mask, softcap, tiling):
        for inputs, options in ((qkv(30, 30), {}), (packed(), {"cu_seqlens": CU_SEQLENS})):
            ones = torch.ones((), dtype=torch.float64).expand_as(inputs["q"])
            want, _ = step(truth(mask, softcap=softcap, **options), inputs, [ones.contiguous()])
            leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
            ours(mask, softcap=softcap, **options)(*leaves.values()).sum().backward()
            for n, t in leaves.items():
                assert_exact(t.grad, want[f"d{n}"], f"d{n}")

    @SOFTCAP
    @pytest.mark.parametrize("mask", ["causal", "full", "window"])
    def test_inputs_that_are_not_contiguous(self, mask, softcap, tiling):
        base = qkv(25, 25, heads=4, kv_heads=4)
        fused = torch.randn(2, 25, 3, 4, 8, dtype=torch.float64)
        layouts = {
            "heads first": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in base.values()],
            "last dim strided": [t.transpose(1, 3).contiguous().transpose(1, 3) for t in base.values()],
            "one projection": list(fused.unbind(2)),
            "shared by the batch": [t[:1].expand_as(t) for t in base.values()],
            "every second token": [t.repeat_interleave(2, 1)[:, ::2] for t in base.values()],
        }
        for name, tensors in layouts.items():
            assert not tensors[0].is_contiguous(), name
            check_attention(dict(zip("qkv", tensors, strict=True)), mask, softcap=softcap)
        tensors = fused[0].unbind(1)
        cu_seqlens = torch.tensor([0, 10, 25], dtype=torch.int32)
        check_attention(dict(zip("qkv", tensors, strict=True)), mask, softcap=softcap, cu_seqlens=cu_seqlens)

    @SOFTCAP
    def test_an_upstream_gradient_that_is_not_contiguous(self, softcap, tiling):
        inputs = qkv(30, 30, heads=4, kv_heads=2)
        do = torch.randn(2, 8, 4, 30, dtype=torch.float64).permute(0, 3, 2, 1)
        dlse = torch.randn(2, 30, 4, dtype=torch.float64).transpose(1, 2)
        for lse, douts in ((False, [do]), (True, [do, dlse])):
            want, _ = step(truth("causal", lse, softcap), inputs, douts)
            got, _ = step(ours("causal", lse, softcap=softcap), inputs, douts)
            for n in want:
                assert_exact(got[n], want[n], n)

    @SOFTCAP
    @pytest.mark.parametrize("mask", ["causal", "full", "window"])
    def test_the_op_takes_a_strided_last_dim(self, mask, softcap, tiling):
        """The function makes it dense, which the op cannot count on: PyTorch's flash kernels would read beside it."""
        dense = qkv(25, 25)
        strided = {n: t.transpose(1, 3).contiguous().transpose(1, 3) for n, t in dense.items()}
        options = (None, None, *raw(mask, softcap or 0.0))
        o, lse = ops.attention_fwd(*dense.values(), *options)
        for got, want in zip(ops.attention_fwd(*strided.values(), *options), (o, lse), strict=True):
            assert_exact(got, want, "forward")
        do = torch.randn_like(o)
        turned = o.transpose(1, 3).contiguous().transpose(1, 3)
        want = ops.attention_bwd(do, *dense.values(), o, lse, None, *options)
        got = ops.attention_bwd(do, *strided.values(), turned, lse, None, *options)
        for name, a, b in zip(("dq", "dk", "dv"), got, want, strict=True):
            assert_exact(a, b, name)

    @SOFTCAP
    @pytest.mark.parametrize("mask", ["full", "window-both"])
    def test_shares_of_the_gradient_by_tiles_of_keys(self, softcap, mask):
        """With the lse of all keys, the backward over some keys gives those keys' share: what a ring adds up."""
        inputs = qkv(12, 12)
        do, options = torch.randn_like(inputs["q"]), raw("full", softcap or 0.0)
        o, lse = ops.attention_fwd(*inputs.values(), None, None, *options)
        whole = ops.attention_bwd(do, *inputs.values(), o, lse, None, None, None, *options)
        q, k, v = inputs.values()
        parts = [
            ops.attention_bwd(do, q, k[:, sl], v[:, sl], o, lse, None, None, None, *options)
            for sl in (slice(0, 5), slice(5, 12))
        ]
        assert_exact(parts[0][0] + parts[1][0], whole[0], "dq")
        for i, n in ((1, "dk"), (2, "dv")):
            assert_exact(torch.cat([part[i] for part in parts], 1), whole[i], n)


class TestExtras:
    """Sinks, ALiBi and dropout; and tiles of a longer sequence."""

    @staticmethod
    def keep(rate: float, seed: int, batch: int, sq: int, sk: int, first: int = 0) -> Tensor:
        return philox.kept(rate, seed, torch.arange(first, first + batch), 4, (sk - sq, sk), (0, sk)).double()

    @ALL_MASKS
    @SOFTCAP
    def test_sinks_and_alibi(self, softcap, mask, tiling):
        for (sq, sk), slopes in itertools.product(((30, 41), (41, 30), (5, 0)), (torch.rand(4), torch.rand(2, 4))):
            inputs = qkv(sq, sk) | {"sinks": torch.randn(4, dtype=torch.float64)}
            for lse in (False, True):
                check_exact(
                    lambda q, k, v, s, lse=lse, slopes=slopes: ours(
                        mask, lse, softcap=softcap, sinks=s, alibi_slopes=slopes
                    )(q, k, v),
                    lambda q, k, v, s, lse=lse, slopes=slopes: truth(mask, lse, softcap, sinks=s, alibi_slopes=slopes)(
                        q, k, v
                    ),
                    inputs,
                )

    @pytest.mark.parametrize("mask", ["causal", "full", "window-both"])
    @pytest.mark.parametrize("rate", [0.1, 0.9])
    def test_dropout(self, rate, mask, tiling):
        seed = random.randrange(2**63)
        keep = self.keep(rate, seed, 2, 30, 41)
        check_exact(
            ours(mask, True, dropout=rate, seed=seed),
            truth(mask, True, keep=keep, keep_factor=1 / (1 - rate)),
            qkv(30, 41),
        )

    def test_packed_dropout_is_that_of_each_sequence_as_a_batch_entry(self):
        keep = [self.keep(0.3, 5, 1, n, n, i) for i, n in enumerate(CU_SEQLENS.diff().tolist())]
        extras = {"alibi_slopes": torch.rand(len(keep), 4)}
        check_exact(
            ours(lse=True, cu_seqlens=CU_SEQLENS, dropout=0.3, seed=5, **extras),
            truth(lse=True, cu_seqlens=CU_SEQLENS, keep=keep, keep_factor=1 / 0.7, **extras),
            packed(),
        )

    def test_no_dropout_is_the_plain_way(self):
        inputs = qkv(20, 20).values()
        assert torch.equal(pyckpt.attention(*inputs, dropout=0.0, seed=3), pyckpt.attention(*inputs))

    @pytest.mark.parametrize("mask", MASKS)
    def test_tiles_of_a_sequence_add_up_to_it(self, mask):
        """Ragged tiles in any order, merged by log-sum-exp: what streaming and rings do."""
        (left, right), slopes, sinks = MASKS[mask][1], torch.rand(4), torch.randn(4, dtype=torch.float64)
        q, k, v = qkv(37, 37, dim_v=6).values()
        options = left, right, 3.0, 0.3
        o, lse = ops.attention_fwd(q, k, v, None, None, *options, sinks, slopes, 0.2, 9)
        do, dlse = torch.randn_like(o), torch.randn_like(lse)
        delta = ops.attention_delta(do, o, dlse)
        want = ops.attention_bwd(do, q, k, v, o, lse, dlse, None, None, *options, sinks, slopes, 0.2, 9)
        got_o, got_lse = torch.zeros_like(o), sinks.view(1, 4, 1).expand_as(lse).clone()
        grads = [torch.zeros_like(t) for t in (q, k, v)]
        cuts = [slice(0, 5), slice(5, 18), slice(18, 37)]
        pairs = list(itertools.product(cuts, cuts))
        random.shuffle(pairs)
        for i, j in pairs:
            part_o, part_lse = got_o[:, i].clone(), got_lse[:, :, i].contiguous()
            tile = (*options, i.start, j.start, slopes, 0.2, 9)
            ops.attention_tile_fwd_(q[:, i], k[:, j], v[:, j], part_o, part_lse, *tile)
            got_o[:, i], got_lse[:, :, i] = part_o, part_lse
            dq, dk, dv = grads[0][:, i], grads[1][:, j], grads[2][:, j]
            stats = lse[:, :, i].contiguous(), delta[:, :, i].contiguous()
            ops.attention_tile_bwd_(do[:, i], q[:, i], k[:, j], v[:, j], *stats, dq, dk, dv, *tile)
        assert_exact(got_o, o, "o")
        assert_exact(got_lse, lse, "lse")
        for n, got, expected in zip("qkv", grads, want, strict=True):
            assert_exact(got, expected, f"d{n}")

    @pytest.mark.parametrize("mask", MASKS)
    def test_tiles_given_o_add_up_too(self, mask):
        """Without softcap and the like PyTorch's flash kernel serves a tile that is given o."""
        q, k, v = qkv(37, 37).values()
        options = *MASKS[mask][1], 0.0, 0.3
        o, lse = ops.attention_fwd(q, k, v, None, None, *options)
        do = torch.randn_like(o)
        want = ops.attention_bwd(do, q, k, v, o, lse, None, None, None, *options)
        delta, grads = torch.full_like(lse, float("nan")), [torch.zeros_like(t) for t in (q, k, v)]
        cuts = [slice(0, 5), slice(5, 18), slice(18, 37)]
        for i, j in itertools.product(cuts, cuts):
            parts = grads[0][:, i], grads[1][:, j], grads[2][:, j]
            stats = lse[:, :, i], delta[:, :, i]
            tile = *options, i.start, j.start, None, 0.0, None, 0, o[:, i]
            ops.attention_tile_bwd_(do[:, i], q[:, i], k[:, j], v[:, j], *stats, *parts, *tile)
        for n, got, expected in zip("qkv", grads, want, strict=True):
            assert_exact(got, expected, f"d{n}")

    def test_a_tile_drops_what_its_sequence_in_the_batch_drops(self):
        q, k, v = qkv(11, 11).values()
        options = -1, 0, 0.0, 0.3
        o, lse = ops.attention_fwd(q, k, v, None, None, *options, None, None, 0.4, 9)
        for b in range(q.shape[0]):
            part_o, part_lse = torch.zeros_like(o[:1]), torch.full_like(lse[:1], float("-inf"))
            one = (t[b : b + 1] for t in (q, k, v))
            ops.attention_tile_fwd_(*one, part_o, part_lse, *options, 0, 0, None, 0.4, 9, b)
            assert_exact(part_o, o[b : b + 1], "o")

    @pytest.mark.parametrize(
        ("counter", "key", "words"),
        [  # Random123's known answers (tests/kat_vectors of Salmon et al.)
            ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                0x299F31D0A4093822,
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ],
    )
    def test_philox_gives_the_published_numbers(self, counter, key, words):
        got = philox.philox(key, tuple(torch.tensor(c) for c in counter))
        assert tuple(int(w) for w in got) == words

    def test_dropout_keeps_its_rate_and_no_pattern(self):
        kept = philox.kept(0.3, random.randrange(2**63), torch.arange(2), 4, (0, 128), (3, 131))
        assert kept.shape == (2, 4, 128, 128)
        n = kept.numel()
        assert abs(float(kept.float().mean()) - 0.7) < 5 * (0.21 / n) ** 0.5  # five standard deviations
        for dim in range(4):
            shifted = kept.roll(1, dim)
            assert abs(float((kept == shifted).float().mean()) - 0.58) < 5 * (0.25 / n) ** 0.5 * 1.5


@st.composite
def problems(draw):
    heads = draw(st.sampled_from([(1, 1), (2, 1), (4, 2)]))
    dim = draw(st.integers(1, 9))
    causal = draw(st.booleans())
    side = st.integers(-1, 12)
    window = draw(st.none() | st.integers(0, 12) | st.tuples(side, side))
    lengths = draw(st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(sum))
    shape = {"heads": heads[0], "kv_heads": heads[1], "dim": dim, "dim_v": draw(st.sampled_from([dim, 4]))}
    if lengths is None:
        shape |= {"sq": draw(st.integers(1, 40)), "sk": draw(st.integers(0, 40)), "batch": draw(st.integers(1, 3))}
    else:
        shape |= {"sq": sum(lengths), "sk": sum(lengths), "batch": 1}
    tiles = draw(st.sampled_from([(512, 1 << 24), (1, 1), (5, 300)]))
    softcap = draw(st.none() | st.floats(0.5, 20.0))
    return shape, causal, window, lengths, softcap, tiles, draw(st.integers(0, 2**31))


def visible_side(causal: bool, window: Any) -> tuple[int, int]:
    if window is None:
        return (-1, 0) if causal else (-1, -1)
    left, right = (window, 0) if isinstance(window, int) else window
    return (left, 0) if causal else (left, right)


@settings(max_examples=120, deadline=None)
@given(problem=problems())
def test_any_problem_equals_the_reference(problem):
    shape, causal, window, lengths, softcap, tiles, number = problem
    torch.manual_seed(number)
    inputs, cu_seqlens = qkv(**shape), None
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        inputs = {n: t[0] for n, t in inputs.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_FLASH_TILE", tiles[0])
        patch.setattr(op, "_SCORE_ELEMENTS", tiles[1])
        for lse in (False, True):

            def fn(q: Tensor, k: Tensor, v: Tensor, lse: bool = lse) -> Any:
                options = {"causal": causal, "window": window, "softcap": softcap, "cu_seqlens": cu_seqlens}
                return pyckpt.attention(q, k, v, return_lse=lse, **options)

            def want(q: Tensor, k: Tensor, v: Tensor, lse: bool = lse) -> Any:
                options = {"window": visible_side(causal, window), "softcap": softcap or 0.0}
                both = reference.attention(q, k, v, cu_seqlens=cu_seqlens, **options)
                return both if lse else both[0]

            check_exact(fn, want, inputs)


@pytest.mark.usefixtures("cpu_backend")
class TestPrecision:
    """The 2x rule: our error against float64 is at most twice that of PyTorch in the same dtype."""

    @pytest.mark.parametrize("mask", ["window", "causal", "window-left"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sums_over_tiles_of_queries_are_rounded_once(self, dtype, mask, monkeypatch):
        """dv is a sum of probabilities times do: of its error half a unit in the last place is to be left."""
        monkeypatch.setattr(op, "_FLASH_TILE", 7)
        inputs = {n: t.to(dtype) for n, t in qkv(100, 90, heads=1, kv_heads=1).items()}
        do = torch.randn(2, 100, 1, 8).to(dtype)
        dv = step(ours(mask), inputs, [do])[0]["dv"].double()
        exact = {n: t.double() for n, t in inputs.items()}
        want, summed = (step(truth(mask), exact, [d])[0]["dv"] for d in (do.double(), do.double().abs()))
        info = torch.finfo(dtype)
        # A probability is made in float32 from scores and an lse of some units, by an exp of a few units in the last
        # place: 1.1e-5 of what is summed, over 2,400 draws; three times that. Sums rounded by tile are ten times off.
        near = 0.5 * info.eps * want.abs() + 3e-5 * summed + 0.5 * info.smallest_normal * info.eps
        assert bool(((dv - want).abs() <= near).all())

    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    @pytest.mark.parametrize("mask", ["causal", "full", "window", "window-both"])
    @pytest.mark.parametrize(("sq", "sk"), [(1, 1), (239, 1), (799, 3), (113, 203), (203, 113), (127, 127)])
    def test_against_sdpa(self, sq, sk, mask, dtype):
        visible = reference.visible_keys(sq, sk, MASKS[mask][1])
        if not visible.any(-1).all():
            visible = visible | ~visible.any(-1, keepdim=True)  # SDPA has no answer for a blind query

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)

        inputs = {n: t.to(dtype) for n, t in qkv(sq, sk, dim=16).items()}
        if MASKS[mask][1][1] == 0 and sq > sk:
            blind = sq - sk
            inputs["q"] = inputs["q"][:, blind:]
            visible = visible[blind:]
        # Of one key dq and dk are nothing, the difference of two sums of 16 products (10 in size), times q or k and the
        # scale, a quarter: what is left of it is roundings of terms of some units, but where both sums are made alike.
        terms = dict.fromkeys(("dq", "dk"), 4.0 if sk == 1 else 1.0)
        check_truth(ours(mask), plain, truth(mask), inputs, terms=1.0, terms_of=terms)

    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    @pytest.mark.parametrize("mask", ["causal", "window-both"])
    @pytest.mark.parametrize("lse", [False, True])
    def test_softcap_against_the_formula(self, lse, mask, dtype):
        inputs = {n: t.to(dtype) for n, t in qkv(113, 203, dim=16).items()}
        formula = truth(mask, lse, softcap=4.0)  # in the low precision it is plain PyTorch's
        check_truth(ours(mask, lse, softcap=4.0), formula, formula, inputs, terms=1.0)

    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    @SOFTCAP
    def test_gradients_of_keys_are_summed_in_float32(self, softcap, dtype, monkeypatch):
        """Sums over 40 tiles of queries: in the low precision they would lose bits with each."""
        monkeypatch.setattr(op, "_FLASH_TILE", 10)
        monkeypatch.setattr(op, "_SCORE_ELEMENTS", 10 * 401 * 2)
        inputs = {n: t.to(dtype) for n, t in qkv(400, 401, heads=2, kv_heads=1, dim=16, batch=1).items()}
        formula = truth(softcap=softcap)
        check_truth(ours(softcap=softcap), formula, formula, inputs, terms=1.0)

    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    def test_packed_against_the_formula(self, dtype):
        inputs = {n: t.to(dtype) for n, t in packed(16).items()}
        formula = truth(cu_seqlens=CU_SEQLENS)
        check_truth(ours(cu_seqlens=CU_SEQLENS), formula, formula, inputs, terms=1.0)

    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    def test_dtypes_of_the_results(self, dtype):
        q, k, v = (t.to(dtype).requires_grad_() for t in qkv(9, 9).values())
        for softcap in (None, 2.0):
            o, lse = pyckpt.attention(q, k, v, softcap=softcap, return_lse=True)
            assert (o.dtype, lse.dtype) == (dtype, torch.float32)
            assert {g.dtype for g in torch.autograd.grad(o.sum() + lse.sum(), (q, k, v))} == {dtype}

    def test_large_scores(self):
        """Scores near the largest float16: softmax shifts them, and the largest wins."""
        for dtype in LOW_DTYPES:
            q = torch.full((1, 4, 1, 8), 60.0, dtype=dtype)
            k = torch.randn(1, 4, 1, 8).sign().to(dtype) * 60
            k[:, 0] = 60.0
            v = torch.randn(1, 4, 1, 8).to(dtype)
            o = pyckpt.attention(q, k, v, causal=False, scale=1.0)
            best = reference.attention(*(t.double() for t in (q, k, v)), scale=1.0)[0]
            assert_exact(o.double(), best.to(dtype).double(), terms=10 * torch.finfo(dtype).eps / 1e-12)


@pytest.mark.usefixtures("cpu_backend")
class TestBlindQueries:
    """Queries that see no key: o = 0, lse = -inf, no gradient, and never NaN."""

    @pytest.mark.parametrize("dtype", [torch.float64, *LOW_DTYPES])
    @SOFTCAP
    @pytest.mark.parametrize("mask", ["causal", "window", "window-self", "window-right"])
    def test_more_queries_than_keys(self, mask, softcap, dtype, tiling):
        q, k, v = (t.to(dtype).requires_grad_() for t in qkv(40, 9).values())
        blind = 40 - 9 - max(0, MASKS[mask][1][1])
        for through_lse in (False, True):
            o, lse = pyckpt.attention(q, k, v, **MASKS[mask][0], softcap=softcap, return_lse=True)
            assert (o[:, :blind] == 0).all()
            assert (lse[:, :, :blind] == float("-inf")).all()
            assert lse[:, :, blind:].isfinite().all()
            loss = (o * torch.randn_like(o)).sum()
            loss = loss + (lse.exp() * torch.randn_like(lse)).sum() if through_lse else loss
            grads = torch.autograd.grad(loss, (q, k, v))
            assert all(g.isfinite().all() for g in grads)
            assert (grads[0][:, :blind] == 0).all()
            if mask != "window-self":  # where there is one key, its weight is 1 whatever q is
                assert (grads[0][:, blind:] != 0).any()

    @SOFTCAP
    def test_no_keys_at_all(self, softcap):
        for dtype in (torch.float64, *LOW_DTYPES):
            q, k, v = (t.to(dtype).requires_grad_() for t in qkv(5, 0).values())
            o, lse = pyckpt.attention(q, k, v, softcap=softcap, return_lse=True)
            assert (o == 0).all()
            assert (lse == float("-inf")).all()
            dq, dk, _ = torch.autograd.grad(o.sum(), (q, k, v))
            assert (dq == 0).all()
            assert dk.shape == k.shape

    @pytest.mark.parametrize("causal", [False, True])
    @SOFTCAP
    def test_nothing_to_do(self, softcap, causal):
        for sq, sk, batch in ((0, 4, 2), (0, 0, 2), (4, 4, 0)):
            inputs = {n: t.requires_grad_() for n, t in qkv(sq, sk, batch=batch).items()}
            o, lse = pyckpt.attention(*inputs.values(), causal=causal, softcap=softcap, return_lse=True)
            assert o.shape == inputs["q"].shape
            assert lse.shape == (batch, 4, sq)
            for g in torch.autograd.grad(o.sum(), list(inputs.values())):
                assert (g == 0).all()


@pytest.mark.usefixtures("cpu_backend")
class TestAutograd:
    @SOFTCAP
    def test_frozen_inputs_get_no_gradient(self, softcap):
        inputs = qkv(20, 20)
        want, douts = step(ours(softcap=softcap), inputs)
        for size in range(1, 4):
            for live in itertools.combinations("qkv", size):
                leaves = {n: t.clone().requires_grad_(n in live) for n, t in inputs.items()}
                ours(softcap=softcap)(*leaves.values()).backward(douts[0])
                for n, t in leaves.items():
                    assert torch.equal(t.grad, want[f"d{n}"]) if n in live else t.grad is None

    @SOFTCAP
    def test_one_tensor_three_times(self, softcap):
        x = torch.randn(2, 9, 2, 4, dtype=torch.float64)
        check_exact(
            lambda x: pyckpt.attention(x, x, x, softcap=softcap),
            lambda x: reference.attention(x, x, x, window=(-1, 0), softcap=softcap or 0.0)[0],
            {"x": x},
        )

    def test_autocast(self):
        q, k, v = (t.float().requires_grad_() for t in qkv(60, 60, dim=16).values())
        low = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
        for softcap in (None, 2.0):
            with torch.autocast("cpu", torch.bfloat16):
                o = pyckpt.attention(q, k, v, softcap=softcap)
                grads = torch.autograd.grad(o.float().square().sum(), (q, k, v))
            want = pyckpt.attention(*low, softcap=softcap)
            # The same bits: inside the op autocast must not touch its float32 products.
            assert torch.equal(o, want)
            assert o.dtype == torch.bfloat16
            wanted = torch.autograd.grad(want.float().square().sum(), low)
            for g, w in zip(grads, wanted, strict=True):
                assert g.dtype == torch.float32
                assert torch.equal(g, w.float())

    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_the_same_bits_every_time(self, softcap, unpoisoned):
        inputs = {n: t.bfloat16() for n, t in qkv(150, 170).items()}
        for mask, options in (("causal", {}), ("full", {}), ("window", {})):
            first, douts = step(ours(mask, softcap=softcap, **options), inputs)
            for _ in range(20):
                again, _ = step(ours(mask, softcap=softcap, **options), inputs, douts)
                assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.usefixtures("cpu_backend")
class TestCost:
    @pytest.mark.parametrize("options", [{"softcap": 2.0}, {"window": 64}, {"softcap": 2.0, "window": 64}], ids=str)
    def test_memory_grows_with_the_length_alone(self, options, monkeypatch):
        monkeypatch.setattr(op, "_SCORE_ELEMENTS", 1 << 16)
        peaks = {}
        for s in (1024, 2048):
            q, k, v = (t.float().requires_grad_() for t in qkv(s, s, 2, 1, 8, batch=1).values())
            with pyckpt.measure.memory() as m:
                pyckpt.attention(q, k, v, **options).sum().backward()
            peaks[s] = m.peak_bytes
        row = 2 * 4 * 8  # bytes of a token in q's shape
        # o, do, dq; k, v and their gradients in two heads at most; lse; and tiles.
        assert peaks[2048] - peaks[1024] < 14 * row * 1024
        assert peaks[2048] < 14 * row * 2048 + 10 * (4 << 16) + 3 * 512 * 600 * 4
        assert peaks[2048] < 2048 * 2048 * 4 / 2  # half of one head's S x S

    def test_one_tile_of_scores_at_a_time(self):
        """In the backward with their gradient, the softcap's slope, and a square on its way to that."""
        q, k, v = (t.float().requires_grad_() for t in qkv(2048, 2048, 1, 1, 8, batch=1).values())
        tile, rest = 512 * 2048 * 4, 16 * q.nbytes
        with pyckpt.measure.memory() as m:
            o = pyckpt.attention(q, k, v, softcap=2.0)
        assert m.peak_bytes < 1.5 * tile + rest
        with pyckpt.measure.memory() as m:
            o.sum().backward()
        assert m.peak_bytes < 3.5 * tile + rest

    def test_flops_are_those_of_sdpa(self):
        q, k, v = (t.float().requires_grad_() for t in qkv(40, 60, heads=4, kv_heads=4, dim=16).values())
        with FlopCounterMode(display=False) as m:
            o = pyckpt.attention(q, k, v, causal=False)
            forward = m.get_total_flops()
            o.sum().backward()
        shapes = [t.transpose(1, 2).shape for t in (q, k, v)]
        assert forward == sdpa_flop_count(*shapes) == 2 * 2 * 2 * 4 * 40 * 60 * 16
        assert m.get_total_flops() - forward == sdpa_backward_flop_count(shapes[0], *shapes)

    def test_flops_of_another_width_of_v_and_of_packed(self):
        with FlopCounterMode(display=False) as m:
            pyckpt.attention(*qkv(40, 60, 4, 2, 16, 8).values())
        assert m.get_total_flops() == 2 * 2 * 4 * 40 * 60 * (16 + 8)
        with FlopCounterMode(display=False) as m:
            pyckpt.attention(*packed().values(), cu_seqlens=CU_SEQLENS)
        assert m.get_total_flops() == 2 * 4 * 90 * 90 * (8 + 8)

    def test_no_grad_holds_nothing(self):
        q, k, v = (t.float().requires_grad_() for t in qkv(64, 64).values())
        with torch.no_grad(), pyckpt.measure.memory() as m:
            o = pyckpt.attention(q, k, v, softcap=2.0)
            assert o.grad_fn is None
            assert (m.saved_bytes, m.live_bytes) == (0, o.nbytes)

    def test_what_is_saved(self):
        q, k, v = (t.float().requires_grad_() for t in qkv(64, 64).values())
        with pyckpt.measure.memory() as m:
            o = pyckpt.attention(q, k, v)
            lse = 2 * 4 * 64 * 4
            assert m.saved_bytes == sum(t.nbytes for t in (q, k, v, o)) + lse


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0}], ids=["causal", "window-softcap"])
def test_compiled(options, dynamic):
    fn = torch.compile(
        lambda q, k, v: pyckpt.attention(q * 2, k, v, **options).sin(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    for s in (16, 24) if dynamic else (16,):
        inputs = qkv(s, s)
        check_exact(fn, lambda q, k, v: truth_of(q * 2, k, v, options).sin(), inputs)


def truth_of(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    window = (options.get("window", -1), 0)
    return reference.attention(q, k, v, window=window, softcap=options.get("softcap", 0.0))[0]


@pytest.mark.parametrize("name", ["softcap", "scale", "dropout", "seed", "window"])
def test_numbers_that_vary_stay_in_one_graph(name):
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))

    def fn(value: float) -> Tensor:
        number = int(value * 4) if name in ("seed", "window") else value
        return pyckpt.attention(q, k, v, **{"dropout": 0.5, "seed": 3, name: number})

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for value in (0.5, 0.25, 0.75):
        torch.testing.assert_close(compiled(value), fn(value))


def test_compiled_packed():
    fn = torch.compile(pyckpt.attention, fullgraph=True, backend="aot_eager")
    check_exact(lambda q, k, v: fn(q, k, v, cu_seqlens=CU_SEQLENS), truth(cu_seqlens=CU_SEQLENS), packed())


class TestBadInput:
    def good(self) -> dict[str, Any]:
        return {"q": torch.randn(2, 5, 4, 8), "k": torch.randn(2, 7, 2, 8), "v": torch.randn(2, 7, 2, 8)}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q": torch.randn(5, 4, 8)}, r"q must be \(B, S, H, D\), got shape \(5, 4, 8\)"),
            ({"k": torch.randn(7, 2, 8)}, r"k must be \(B, S, H, D\)"),
            ({"q": torch.randn(2, 5, 4, 6)}, "q has head dim 6 and k has 8"),
            ({"q": torch.randn(2, 5, 3, 8)}, "q has 3 heads, which is no multiple of the 2"),
            ({"k": torch.randn(2, 7, 0, 8), "v": torch.randn(2, 7, 0, 8)}, "no multiple of the 0"),
            ({"q": torch.randn(2, 5, 0, 8)}, "expected at least one head and one head dim"),
            ({"q": torch.randn(2, 5, 4, 0), "k": torch.randn(2, 7, 2, 0)}, "expected at least one head and one head"),
            ({"v": torch.randn(2, 7, 2, 0)}, "expected at least one head and one head dim"),
            ({"q": torch.randn(3, 5, 4, 8)}, "q has batch size 3 and k has 2"),
            ({"v": torch.randn(2, 6, 2, 8)}, "k and v differ in more than their last dim"),
            ({"k": torch.randn(2, 7, 2, 8).double()}, "k has dtype torch.float64, expected q's, torch.float32"),
            ({"q": torch.ones(2, 5, 4, 8, dtype=torch.int64)}, "q has dtype torch.int64, expected one of float32"),
            ({"v": torch.randn(2, 7, 2, 8, device="meta")}, "v is on meta, q is on cpu"),
            ({"window": -1}, "window=-1 is negative; .* or None for no limit"),
            ({"window": (1, 2, 3)}, "window must be None, an int >= 0, or a pair"),
            ({"window": (-2, 0)}, "window must be None, an int >= 0, or a pair"),
            ({"window": True}, "window must be None"),
            ({"window": (1.5, 0)}, "window must be None"),
            ({"window": torch.tensor(1.5)}, "window must be None"),
            ({"softcap": -1.0}, "softcap must be None or a positive number, got -1.0"),
            ({"softcap": float("nan")}, "softcap must be None or a positive number, got nan"),
            ({"softcap": float("inf")}, "softcap must be None or a positive number, got inf"),
            ({"scale": float("nan")}, "scale must be None or a finite number, got nan"),
            ({"scale": float("inf")}, "scale must be None or a finite number, got inf"),
            ({"scale": torch.tensor(1.0, requires_grad=True)}, "scale gets no gradient here: .*multiply q by it"),
            ({"softcap": torch.tensor(1.0, requires_grad=True)}, r"softcap gets no gradient here: .*softcap\.detach"),
        ],
        ids=lambda value: None if isinstance(value, dict) else value[:30],
    )
    def test_values(self, change, message):
        with pytest.raises(ValueError, match=message):
            pyckpt.attention(**self.good() | change)

    def test_types(self):
        for name in "qkv":
            with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
                pyckpt.attention(**self.good() | {name: [1.0]})

    @pytest.mark.parametrize("name", ["scale", "softcap", "dropout"])
    def test_what_is_no_number(self, name):
        for value in ("1", True, np.True_, 1j, [1.0], torch.ones(2), torch.tensor(True), np.ones(3)):
            with pytest.raises(TypeError, match=f"{name} must be .*, got "):
                pyckpt.attention(**self.good() | {name: value, "seed": 1})
        with pytest.raises(TypeError, match=r"scale must be None or a number, got a Tensor of shape \(2,\)"):
            pyckpt.attention(**self.good(), scale=torch.ones(2))

    def test_numbers_of_every_kind(self):
        good = self.good()
        want = pyckpt.attention(**good, scale=0.5, softcap=2.0, window=3, dropout=0.25, seed=7)
        for as_float, as_int in ((np.float32, np.int64), (torch.tensor, torch.tensor), (fractions.Fraction, int)):
            numbers = {"scale": 0.5, "softcap": 2.0, "dropout": 0.25}
            given = {n: as_float(v) for n, v in numbers.items()}
            assert torch.equal(pyckpt.attention(**good, **given, window=as_int(3), seed=as_int(7)), want)

    def test_no_gradient_is_lost(self):
        for name in ("scale", "softcap", "dropout"):
            with pytest.raises(ValueError, match=rf"{name} gets no gradient here: give {name}\.detach\(\), or"):
                pyckpt.attention(**self.good() | {name: torch.tensor(0.5, requires_grad=True)}, seed=1)
        with torch.no_grad():
            pyckpt.attention(**self.good(), softcap=torch.tensor(0.5, requires_grad=True))

    def test_what_is_no_bool(self):
        for value in ("no", 1, None, torch.tensor(True)):
            with pytest.raises(TypeError, match="causal must be True or False, got"):
                pyckpt.attention(**self.good(), causal=value)

    def test_seeds(self):
        for seed in (1.0, "1", True, torch.tensor(1.0)):
            with pytest.raises(TypeError, match="seed must be an int, got"):
                pyckpt.attention(**self.good(), dropout=0.1, seed=seed)
        for seed in (-1, np.int64(-1)):
            with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*63\), got -1"):
                pyckpt.attention(**self.good(), dropout=0.1, seed=seed)

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_nested_tensors(self, name):
        nested = torch.nested.nested_tensor([torch.randn(5, 4, 8), torch.randn(3, 4, 8)])
        with pytest.raises(ValueError, match=f"{name} is a nested tensor, expected a dense one"):
            pyckpt.attention(**self.good() | {name: nested})

    @pytest.mark.parametrize(
        ("cu", "message"),
        [
            (torch.tensor([0, 5]), "cu_seqlens has dtype torch.int64, expected int32"),
            (torch.tensor([[0, 5]], dtype=torch.int32), "one-dimensional with at least 2 entries"),
            (torch.tensor([0], dtype=torch.int32), "one-dimensional with at least 2 entries"),
            (torch.tensor([1, 5], dtype=torch.int32), "begin with 0 and end at the number of tokens, 5"),
            (torch.tensor([0, 4], dtype=torch.int32), "begin with 0 and end at the number of tokens, 5"),
            (torch.tensor([0, 4, 2, 5], dtype=torch.int32), "must not descend: entry 2 is 2, after 4"),
            (torch.tensor([0, 5], dtype=torch.int32, device="meta"), "cu_seqlens is on meta"),
        ],
        ids=range(7),
    )
    def test_cu_seqlens(self, cu, message):
        with pytest.raises(ValueError, match=message):
            pyckpt.attention(*(torch.randn(5, 2, 4) for _ in range(3)), cu_seqlens=cu)

    def test_packed_shapes(self):
        cu, x = torch.tensor([0, 5], dtype=torch.int32), torch.randn(5, 2, 4)
        with pytest.raises(TypeError, match=r"cu_seqlens must be a torch\.Tensor, got list"):
            pyckpt.attention(x, x, x, cu_seqlens=[0, 5])
        with pytest.raises(ValueError, match=r"q must be \(T, H, D\), packed, since cu_seqlens is given"):
            pyckpt.attention(x[None], x[None], x[None], cu_seqlens=cu)
        with pytest.raises(ValueError, match="packed q has 5 tokens and k has 4; they differ: give cu_seqlens_k"):
            pyckpt.attention(x, x[:4], x[:4], cu_seqlens=cu)
        with pytest.raises(ValueError, match="cu_seqlens_k is given without cu_seqlens"):
            pyckpt.attention(x[None], x[None], x[None], cu_seqlens_k=cu)
        with pytest.raises(ValueError, match="cu_seqlens_k must begin with 0 and end at the number of tokens, 4"):
            pyckpt.attention(x, x[:4], x[:4], cu_seqlens=cu, cu_seqlens_k=cu)
        three = torch.tensor([0, 1, 5], dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens_k has 2 sequences and cu_seqlens 1; they must be as many"):
            pyckpt.attention(x, x, x, cu_seqlens=cu, cu_seqlens_k=three)


@pytest.mark.usefixtures("backend")
def largest(*lses: Tensor) -> float:
    """What a merged lse is the sum of, and may cancel: the larger of two and a logarithm."""
    return max(float(t[t.isfinite()].abs().max()) for t in lses)


class TestMerge:
    @pytest.mark.parametrize("packed", [False, True])
    def test_two_sets_of_keys_are_one(self, packed):
        """Attention to all keys is that to the first and that to the others, merged."""
        q, k, v = (torch.randn(2, 7, 4, 5, dtype=torch.float64) for _ in range(3))
        want_o, want_lse = reference.attention(q, k, v)
        parts = [reference.attention(q, k[:, cut], v[:, cut]) for cut in (slice(3), slice(3, None))]
        for o, lse in (reference.merge(*parts[0], *parts[1]), _merged(*parts[0], *parts[1], packed)):
            if packed and o.dim() == 3:
                assert_exact(o, want_o[0])
                assert_exact(lse, want_lse[0])
            else:
                assert_exact(o, want_o)
                assert_exact(lse, want_lse)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_low_precision(self, dtype):
        o, part_o = torch.randn(2, 3, 9, 2, 8).to(dtype)
        lse, part_lse = torch.randn(2, 3, 2, 9) * 5
        lse[0], part_lse[1, 1] = float("-inf"), float("-inf")
        o[0], part_o[1, :, 1] = 0.0, 0.0
        want_o, want_lse = reference.merge(*(t.double() for t in (o, lse, part_o, part_lse)))
        plain = reference.merge(o.float(), lse, part_o.float(), part_lse)[0].to(dtype)
        terms = largest(lse, part_lse)
        ops.attention_merge_(o, lse, part_o, part_lse)
        assert_close_to_truth(o, plain, want_o)
        assert_close_to_truth(lse, want_lse.float(), want_lse, terms=terms)

    @pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 1), (37, 3, 64), (300, 2, 20), (3, 2, 640)])
    def test_views_of_odd_sizes(self, tokens, heads, dim):
        """Of which no other element is touched."""
        wide = torch.randn(2, tokens, 2 * heads, dim)
        o, part_o = wide[:, :, heads:], torch.randn(2, 2 * tokens, heads, dim)[:, ::2]
        lse, part_lse = torch.randn(2, heads, tokens + 3)[..., :tokens], torch.randn(2, heads, tokens)
        want_o, want_lse = reference.merge(*(t.double() for t in (o, lse, part_o, part_lse)))
        plain, terms = reference.merge(o, lse, part_o, part_lse)[0], largest(lse, part_lse)
        before = wide.clone()
        ops.attention_merge_(o, lse, part_o, part_lse)
        assert_close_to_truth(o, plain, want_o)
        assert_close_to_truth(lse, want_lse.float(), want_lse, terms=terms)
        assert torch.equal(wide[:, :, :heads], before[:, :, :heads])

    def test_two_sets_without_keys(self):
        o, lse = torch.zeros(1, 2, 3, 4), torch.full((1, 3, 2), float("-inf"))
        ops.attention_merge_(o, lse, o.clone(), lse.clone())
        assert (o == 0).all() and (lse == float("-inf")).all()


def _merged(o: Tensor, lse: Tensor, part_o: Tensor, part_lse: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """By the op, in place; of the first sequence as a packed batch."""
    tensors = [t[0].clone() if packed else t.clone() for t in (o, lse, part_o, part_lse)]
    ops.attention_merge_(*tensors)
    return tensors[0], tensors[1]
