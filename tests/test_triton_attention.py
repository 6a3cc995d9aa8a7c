"""The Triton attention kernels: on a GPU as they are, without one in Triton's interpreter.

Tiles are small here, so that short sequences have several and none ends where a sequence does. On a GPU the
tiles of the table are tried too.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import a_few, assert_close_to_truth, check_truth
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyckpt
from pyckpt.ops import attention as in_torch
from pyckpt.ops import philox, reference, triton_backend

attention = triton_backend.kernels("attention")
tuning = attention.tuning
Config, Options = attention.Config, attention.Options
ops = torch.ops.pyckpt

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter computes bfloat16 on raw bits (Triton 3.6 to 3.9).
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
LOW = DTYPES[-1]
MASKS = {
    "full": ({"causal": False}, (-1, -1)),
    "causal": ({}, (-1, 0)),
    "window": ({"window": 20}, (20, 0)),
    "window-both": ({"causal": False, "window": (17, 3)}, (17, 3)),
    "window-right": ({"causal": False, "window": (-1, 4)}, (-1, 4)),
    "window-left": ({"causal": False, "window": (40, -1)}, (40, -1)),
}
LENGTHS = [(1, 1), (239, 1), (1, 239), (70, 3), (3, 70), (50, 83), (83, 50), (64, 64), (127, 127)]
TILES = {
    "32x32": Config(32, 32),
    "16x32": Config(16, 32),
    "64x16": Config(64, 16),
    "32x32 tma": Config(32, 32, tma=True),
    "32x16 tma": Config(32, 16, tma=True),
    "32x32 persistent": Config(32, 32, tma=True, persistent=1),
    "32x32 split": Config(32, 32, split=True),
}


@pytest.fixture(autouse=True)
def forced(monkeypatch) -> None:
    monkeypatch.setenv("PYCKPT_BACKEND", "triton")


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch) -> None:
    """Tiles chosen by the test, by the mark `tiles`, or 32 x 32; "table" leaves the choice to the table."""
    mark = request.node.get_closest_marker("tiles")
    name = (
        mark.args[0] if mark else getattr(request.node, "callspec", None) and request.node.callspec.params.get("tiles")
    )
    if name != "table":
        monkeypatch.setattr(tuning, "lookup", lambda key: TILES[name or "32x32"])


def qkv(
    sq: int, sk: int, heads: int = 2, kv_heads: int = 1, dim: int = 16, dim_v: int | None = None, batch: int = 1
) -> dict[str, Tensor]:
    shapes = {"q": (sq, heads, dim), "k": (sk, kv_heads, dim), "v": (sk, kv_heads, dim_v or dim)}
    return {n: torch.randn(batch, *shape, device=DEVICE) for n, shape in shapes.items()}


def keep(rate: float, seed: int, batch: int, heads: int, sq: int, sk: int, first: int = 0) -> Tensor:
    sequences = torch.arange(first, first + batch)
    return philox.kept(rate, seed, sequences, heads, (sk - sq, sk), (0, sk)).float().to(DEVICE)


def check(
    inputs: dict[str, Tensor],
    mask: str = "causal",
    dtype: torch.dtype = torch.float32,
    lse: bool = True,
    dropout: float = 0.0,
    **options: Any,
) -> None:
    """Outputs and gradients by the 2x rule against the formula, in the same dtype and in float64."""
    seed = random.randrange(2**63)
    batch, (sq, heads), sk = len(inputs["q"]), inputs["q"].shape[-3:-1], inputs["k"].shape[-3]
    given = {k: v for k, v in options.items() if k != "softcap"} | {"softcap": options.get("softcap") or 0.0}
    cu_seqlens = options.get("cu_seqlens")
    if dropout:
        lengths = None if cu_seqlens is None else cu_seqlens.diff().tolist()
        given["keep_factor"] = 1 / (1 - dropout)
        given["keep"] = (
            keep(dropout, seed, batch, heads, sq, sk)
            if lengths is None
            else [keep(dropout, seed, 1, heads, n, n, i) for i, n in enumerate(lengths)]
        )

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Any:
        extras = {"sinks": sinks, "dropout": dropout, "seed": seed}
        return pyckpt.attention(q, k, v, **MASKS[mask][0], return_lse=lse, **extras, **options)

    def formula(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Any:
        both = reference.attention(q, k, v, window=MASKS[mask][1], sinks=sinks, **given)
        return both if lse else both[0]

    # A gradient is a sum of (dP - delta), where each is a product of two rows of random numbers. A probability has
    # the rounding of its score, made again from q, k and lse, and of lse: where scores are large (here two standard
    # deviations), that is more than its own.
    scale = options.get("scale")
    sharp = 1.0 if scale is None else max(1.0, 2.0 * abs(scale) * inputs["q"].shape[-1] ** 0.5)
    terms = sharp * inputs["v"].shape[-1] ** 0.5
    # A sink's is a sum of such differences over all queries, whose roundings add up like a random walk.
    # So is dk's, over the queries that look at a key; with a single key the formula's own cancel to the last bit.
    of = {
        "dsinks": terms * inputs["q"][..., 0, 0].numel() ** 0.5,
        "dk": terms * max(1.0, sq / sk, abs(scale or 0.0)) ** 0.5,
    }
    check_truth(ours, formula, formula, {n: t.to(dtype) for n, t in inputs.items()}, terms=terms, terms_of=of)


def test_float32_after_pytorchs_newer_setting_of_its_precision():
    """PyTorch does not answer the older question then; transformers' TrainingArguments(tf32=True) sets it."""
    code = f"""
import torch, pyckpt
from pyckpt.precision import exact_products
torch.backends.fp32_precision = "tf32"
q = torch.randn(1, 40, 2, 16, device="{DEVICE}", requires_grad=True)
pyckpt.attention(q, q, q).sum().backward()
with exact_products():
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
assert torch.backends.cuda.matmul.fp32_precision == "tf32"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYCKPT_BACKEND": "triton"}
    )
    assert done.returncode == 0, done.stderr


def packed(lengths: list[int], **shape: Any) -> tuple[dict[str, Tensor], Tensor]:
    n = sum(lengths)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    return {name: t[0] for name, t in qkv(n, n, **shape).items()}, cu_seqlens


FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "window": lambda: {"mask": "window"},
    "window-both": lambda: {"mask": "window-both"},
    "softcap": lambda: {"softcap": 1.5},
    "alibi": lambda: {"alibi_slopes": torch.rand(4, device=DEVICE)},
    "dropout": lambda: {"dropout": 0.3},
    "sinks": dict,
    "packed": dict,
    "gqa": dict,
    "value dim": dict,
    "ragged": dict,
}


PAIRS = [p for p in itertools.combinations(FEATURES, 2) if p != ("window", "window-both")]


def check_features(names: tuple[str, ...], dtype: torch.dtype) -> None:
    shape = {
        "heads": 4,
        "kv_heads": 2 if "gqa" in names else 4,
        "dim": 24 if "ragged" in names else 16,
        "dim_v": 40 if "value dim" in names else None,
    }
    options: dict[str, Any] = {}
    for name in names:
        options |= FEATURES[name]()
    if "packed" in names:
        inputs, options["cu_seqlens"] = packed([0, 19, 1, 0, 37, 7, 0], **shape)
    else:
        inputs = qkv(41, 50, **shape)
    if "sinks" in names:
        inputs["sinks"] = torch.randn(4, device=DEVICE)
    check(inputs, dtype=dtype, **options)


class TestFeatures:
    @pytest.mark.parametrize("dtype", a_few(DTYPES, always=(1,)))
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("lengths", a_few(LENGTHS, always=(0, 4, 6)), ids=str)
    def test_lengths_and_masks(self, lengths, mask, dtype):
        check(qkv(*lengths), mask, dtype)

    @pytest.mark.parametrize("dtype", a_few(DTYPES, always=(1,)))
    @pytest.mark.parametrize("name", a_few(FEATURES, always=range(2, len(FEATURES))))
    def test_each(self, name, dtype):
        check_features((name,), dtype)

    @pytest.mark.parametrize("dtype", a_few([torch.float32, LOW], always=(1,)))
    @pytest.mark.parametrize("pair", a_few(PAIRS, always=range(3, len(PAIRS), 15)), ids="+".join)
    def test_pairs(self, pair, dtype):
        check_features(pair, dtype)

    @pytest.mark.parametrize("dtype", a_few(DTYPES, always=(1,)))
    def test_all_at_once(self, dtype):
        check_features(tuple(n for n in FEATURES if n != "window"), dtype)

    @pytest.mark.parametrize("dtype", a_few(DTYPES, always=(1,)))
    @pytest.mark.parametrize(
        "dims", [(1, 1), (16, 16), (24, 40), (64, 64), (72, 72), (80, 80), (128, 128), (192, 128), (256, 256)]
    )
    def test_head_dims(self, dims, dtype):
        check(qkv(40, 40, 1, 1, *dims), "causal", dtype, lse=False)

    @pytest.mark.parametrize("heads", a_few([(1, 1), (4, 2), (3, 1), (3, 3), (5, 1)], always=(1, 2)))
    def test_heads(self, heads):
        check(qkv(37, 40, *heads, batch=2))

    @pytest.mark.parametrize("tiles", TILES)
    @pytest.mark.parametrize("mask", a_few(MASKS, always=(3,)))
    def test_tiles(self, tiles, mask):
        check(qkv(90, 75), mask, LOW)

    @pytest.mark.parametrize("scale", [1.7, 0.0, -0.4])
    @pytest.mark.parametrize("softcap", [None, 20.0])
    def test_scale(self, scale, softcap):
        check(qkv(30, 40), scale=scale, softcap=softcap)

    def test_slopes_of_half_precision(self):
        """Forward and backward take them to float32 alike: rounded once more, P is another one in the backward."""
        check(qkv(300, 300, 4, 2), alibi_slopes=torch.rand(4, device=DEVICE).half())

    def test_slopes_of_each_sequence(self):
        check(qkv(30, 40, 4, 2, batch=2), alibi_slopes=torch.rand(2, 4, device=DEVICE))
        inputs, cu_seqlens = packed([9, 0, 21], heads=4)
        check(inputs, cu_seqlens=cu_seqlens, alibi_slopes=torch.rand(3, 4, device=DEVICE))

    @pytest.mark.parametrize("mask", a_few(["causal", "window-both"], always=(1,)))
    @pytest.mark.parametrize("lengths", [[70], [1, 1, 1], [33, 0, 0, 31, 32, 1], [16] * 9, [0, 0, 5]])
    def test_packed(self, lengths, mask):
        inputs, cu_seqlens = packed(lengths)
        check(inputs, mask, cu_seqlens=cu_seqlens)

    @pytest.mark.parametrize("mask", a_few(["causal", "window", "window-both"], always=(0, 1)))
    @pytest.mark.parametrize("top_left", [False, True])
    def test_packed_with_lengths_of_keys_of_their_own(self, top_left, mask):
        # Queries without keys, keys without queries, fewer of either, and neither.
        cu_q, cu_k = [0, 4, 4, 9, 50, 50, 50], [0, 37, 42, 42, 57, 57, 60]
        given = dict(zip("qkv", (t[0] for t in qkv(50, 60).values()), strict=True))
        cu = [torch.tensor(c, dtype=torch.int32, device=DEVICE) for c in (cu_q, cu_k)]
        do, dlse = torch.randn_like(given["q"]), torch.randn(2, 50, device=DEVICE)
        rest = (*MASKS[mask][1], 0.0, 0.3, None, torch.rand(2, device=DEVICE), 0.2, 5, top_left)

        def run(dtype: torch.dtype, module: Any) -> dict[str, Tensor]:
            q, k, v = (t.to(dtype) for t in given.values())
            o, lse = module.attention_fwd(q, k, v, *cu, *rest)
            sees = lse.isfinite()
            grads = module.attention_bwd(do.to(dtype), q, k, v, o, lse, dlse.to(dtype) * sees, *cu, *rest)
            return {"o": o, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

        ours, plain, truth = run(torch.float32, ops), run(torch.float32, in_torch), run(torch.float64, in_torch)
        for name, t in truth.items():
            # Gradients are sums of (dP - delta), see `check`.
            assert_close_to_truth(ours[name], plain[name], t, what=name, terms=4.0 if name[0] == "d" else 1.0)


class TestTiles:
    @pytest.mark.parametrize("dtype", a_few([torch.float32, LOW], always=(1,)))
    @pytest.mark.parametrize("mask", a_few(MASKS, always=(1,)))
    def test_of_a_sequence_add_up_to_it(self, mask, dtype):
        """Ragged tiles in any order against the float64 truth, no worse than the whole sequence at once."""
        inputs = {n: t.to(dtype) for n, t in qkv(75, 75, dim_v=24).items()}
        q, k, v = inputs.values()
        slopes, sinks = torch.rand(2, device=DEVICE), torch.randn(2, device=DEVICE)
        options, extras = (*MASKS[mask][1], 3.0, 0.3), (slopes, 0.2, 9)
        o, lse = ops.attention_fwd(q, k, v, None, None, *options, sinks, *extras)
        do, dlse = torch.randn_like(o), torch.randn_like(lse)
        delta = ops.attention_delta(do, o, dlse)
        whole = ops.attention_bwd(do, q, k, v, o, lse, dlse, None, None, *options, sinks, *extras)
        exact = [t.double() for t in (q, k, v)]
        true_o, true_lse = ops.attention_fwd(*exact, None, None, *options, sinks, *extras)
        true = ops.attention_bwd(
            do.double(), *exact, true_o, true_lse, dlse.double(), None, None, *options, sinks, *extras
        )

        got_o, got_lse = torch.zeros_like(o, dtype=torch.float32), sinks.view(1, 2, 1).expand_as(lse).clone()
        grads = [torch.zeros_like(t, dtype=torch.float32) for t in (q, k, v)]
        cuts = [slice(0, 5), slice(5, 38), slice(38, 75)]
        pairs = list(itertools.product(cuts, cuts))
        random.shuffle(pairs)
        for i, j in pairs:
            part_o, part_lse = got_o[:, i], got_lse[:, :, i]  # as the streamed executor has them: views
            tile = (*options, i.start, j.start, *extras)
            ops.attention_tile_fwd_(q[:, i], k[:, j], v[:, j], part_o, part_lse, *tile)
            parts = (grad[:, s] for grad, s in zip(grads, (i, j, j), strict=True))
            ops.attention_tile_bwd_(do[:, i], q[:, i], k[:, j], v[:, j], lse[:, :, i], delta[:, :, i], *parts, *tile)
        for name, got, one, want in (
            ("o", got_o, o, true_o),
            ("lse", got_lse, lse, true_lse),
            *zip(("dq", "dk", "dv"), grads, whole, true, strict=True),
        ):
            assert_close_to_truth(got.to(one.dtype), one, want, what=name, terms=24**0.5)

    def test_dropout_draws_by_the_sequences_number(self, monkeypatch):
        """A tile of a later sequence drops what the whole batch does, by the kernels too, as streams need it."""
        for name in ("tile_forward", "tile_backward"):
            monkeypatch.delattr(in_torch.attention_torch, name)
        inputs = {n: t.to(LOW) for n, t in qkv(40, 40, batch=3).items()}
        q, k, v = inputs.values()
        options, extras = (-1, 0, 0.0, 0.3), (None, 0.4, 7)
        o, lse = ops.attention_fwd(q, k, v, None, None, *options, None, *extras)
        do = torch.randn_like(o)
        delta = ops.attention_delta(do, o, None)
        whole = ops.attention_bwd(do, q, k, v, o, lse, None, None, None, *options, None, *extras)
        near = {"rtol": 2 * torch.finfo(LOW).eps, "atol": 1e-6}  # the same sums, perhaps rounded to the other side
        for first, rows in ((1, slice(1, 2)), (1, slice(1, 3)), (2, slice(2, 3))):
            got_o, got_lse = torch.zeros_like(o[rows], dtype=torch.float32), torch.full_like(lse[rows], -torch.inf)
            ops.attention_tile_fwd_(q[rows], k[rows], v[rows], got_o, got_lse, *options, 0, 0, *extras, first)
            torch.testing.assert_close(got_o.to(LOW), o[rows], **near)
            grads = [torch.zeros_like(t[rows], dtype=torch.float32) for t in (q, k, v)]
            given = (t[rows] for t in (do, q, k, v, lse, delta))
            ops.attention_tile_bwd_(*given, *grads, *options, 0, 0, *extras, first)
            for got, want in zip(grads, whole, strict=True):
                torch.testing.assert_close(got.to(LOW), want[rows], **near)

    def test_a_global_lse_gives_each_tile_of_keys_its_share(self):
        q, k, v = qkv(40, 70).values()
        do, options = torch.randn_like(q), (-1, -1, 0.0, 0.3)
        o, lse = ops.attention_fwd(q, k, v, None, None, *options)
        whole = ops.attention_bwd(do, q, k, v, o, lse, None, None, None, *options)
        parts = [
            ops.attention_bwd(do, q, k[:, s], v[:, s], o, lse, None, None, None, *options)
            for s in (slice(0, 33), slice(33, 70))
        ]
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
        for i in (1, 2):
            torch.testing.assert_close(torch.cat([part[i] for part in parts], 1), whole[i])


def four_heads() -> list[Tensor]:
    return list(qkv(40, 40, heads=4, kv_heads=4).values())


LAYOUTS = {
    "heads first": lambda: [t.transpose(1, 2).contiguous().transpose(1, 2) for t in four_heads()],
    "last dim strided": lambda: [t.transpose(1, 3).contiguous().transpose(1, 3) for t in four_heads()],
    "one projection": lambda: list(torch.randn(2, 40, 3, 4, 16, device=DEVICE).unbind(2)),
    "shared by the batch": lambda: [t.expand(2, -1, -1, -1) for t in four_heads()],
    "every second token": lambda: [t.repeat_interleave(2, 1)[:, ::2] for t in four_heads()],
    "not aligned": lambda: [torch.randn(1, 40, 4, 17, device=DEVICE)[..., 1:] for _ in "qkv"],
}


class TestLayouts:
    @pytest.mark.parametrize("name", a_few(LAYOUTS, always=(1, 2)))
    def test_inputs_that_are_not_contiguous(self, name):
        tensors = LAYOUTS[name]()
        assert not all(t.is_contiguous() for t in tensors)
        check(dict(zip("qkv", tensors, strict=True)))

    @pytest.mark.parametrize(
        ("dim", "row", "first", "promised"),
        [(72, 72, 0, True), (8, 24, 8, True), (72, 76, 0, False), (72, 72, 1, False), (80, 80, 0, False)],
    )
    def test_rows_are_promised_to_be_aligned_where_they_are(self, dim, row, first, promised, monkeypatch):
        """Triton sees it of strides that 16 divides alone. `first`: where the first row begins in its memory."""
        seen = []
        real = attention._ragged
        monkeypatch.setattr(attention, "_ragged", lambda *a: seen.append(real(*a)) or real(*a))
        base = torch.randn(2 * 20 * 2 * row + first, device=DEVICE).half()
        q, k, v = (base[first:].view(2, 20, 2, row)[..., :dim].detach() for _ in range(3))
        options = (None, None, -1, 0, 0.0, 0.25)

        def run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
            o, lse = ops.attention_fwd(q, k, v, *options)
            return [o, lse, *ops.attention_bwd(q, q, k, v, o, lse, None, *options)]

        got = run(q, k, v)
        assert {kind == 8 for kind in seen} == {promised} and len(seen) == 5  # forward and backward by two dims, delta
        for t, want in zip(got, run(*(t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))), strict=True):
            assert torch.equal(t, want)

    def test_upstream_gradients_of_any_stride(self):
        inputs = qkv(40, 40, heads=4, kv_heads=2)
        q, k, v = inputs.values()
        o, lse = ops.attention_fwd(q, k, v, None, None, -1, 0, 0.0, 0.25)
        for do in (
            torch.ones((), device=DEVICE).expand_as(o),
            torch.randn(1, 16, 4, 40, device=DEVICE).permute(0, 3, 2, 1),
            torch.randn(1, 40, 1, 16, device=DEVICE).expand_as(o),
        ):
            dlse = torch.randn(1, 40, 4, device=DEVICE).transpose(1, 2)
            args = (q, k, v, o, lse, dlse, None, None, -1, 0, 0.0, 0.25)
            for got, want in zip(ops.attention_bwd(do, *args), ops.attention_bwd(do.contiguous(), *args), strict=True):
                assert torch.equal(got, want)

    @pytest.fixture
    def made(self, monkeypatch) -> list[torch.Size]:
        """The shapes that the copy engine is given."""
        shapes: list[torch.Size] = []
        real = attention.TensorDescriptor
        monkeypatch.setattr(attention, "TensorDescriptor", lambda t, *a: shapes.append(t.shape) or real(t, *a))
        return shapes

    @pytest.mark.parametrize("tiles", ["32x32 tma"])
    def test_the_copy_engine_takes_no_packed_sequences(self, tiles, made):
        check(qkv(40, 50, heads=4, kv_heads=2))
        assert made == [(1, 50, 2, 16)] * 2 + [(1, 40, 4, 16)] * 2 + [(1, 50, 2, 16)] * 2
        made.clear()
        inputs, cu_seqlens = packed([9, 31])
        check(inputs, cu_seqlens=cu_seqlens)
        assert not made

    @pytest.mark.parametrize("tiles", ["32x32 tma"])
    @pytest.mark.parametrize("name", a_few(LAYOUTS, always=(2, 5)))
    def test_the_copy_engine_takes_only_what_it_can_read(self, name, tiles, made):
        check(dict(zip("qkv", LAYOUTS[name](), strict=True)))
        assert bool(made) == (name not in ("shared by the batch", "not aligned"))

    @pytest.mark.parametrize("packs", [False, True])
    def test_offsets_beyond_int32(self, packs):
        """Rows 2³⁰ elements apart: the third is past 2³¹. The memory between them is never touched."""
        far = 2**30 + 16
        base = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(
            torch.UntypedStorage(2 * (2 * far + 64), device=DEVICE), 0, (3, 1, 16), (far, 16, 1)
        )
        values = torch.randn(3, 1, 16, device=DEVICE).half()
        base.copy_(values)
        cu = torch.tensor([0, 1, 3], dtype=torch.int32, device=DEVICE) if packs else None
        q, near = (t if packs else t.unsqueeze(0) for t in (base, values))
        options = (cu, cu, -1, 0, 0.0, 0.25)
        o, lse = ops.attention_fwd(q, q, q, *options)
        want_o, want_lse = ops.attention_fwd(near, near, near, *options)
        assert torch.equal(o, want_o)
        assert torch.equal(lse, want_lse)
        do = torch.randn_like(o)
        grads = ops.attention_bwd(do, q, q, q, o, lse, None, *options)
        for got, want in zip(grads, ops.attention_bwd(do, near, near, near, o, lse, None, *options), strict=True):
            assert torch.equal(got, want)
        running = q.new_zeros(()).float().expand_as(near).clone()
        if not packs:
            wide = torch.empty(0, device=DEVICE).set_(
                torch.UntypedStorage(4 * (2 * far + 64), device=DEVICE), 0, (1, 3, 1, 16), (far, far, 16, 1)
            )
            wide.zero_()
            for out in (running, wide):
                ops.attention_tile_fwd_(q, q, q, out, torch.full_like(lse, float("-inf")), -1, 0, 0.0, 0.25, 0, 0)
            assert torch.equal(running, wide)


class TestBlindQueries:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("sq", "sk", "mask"), [(83, 50, "causal"), (40, 0, "full"), (70, 3, "window-both"), (90, 20, "window")]
    )
    def test_give_zero_and_no_nan(self, sq, sk, mask, dtype):
        inputs = {n: t.to(dtype) for n, t in qkv(sq, sk).items()}
        leaves = [t.requires_grad_() for t in inputs.values()]
        o, lse = pyckpt.attention(*leaves, **MASKS[mask][0], return_lse=True)
        blind = ~reference.visible_keys(sq, sk, MASKS[mask][1]).any(-1)
        assert blind.any()
        assert (o[:, blind] == 0).all()
        assert (lse[:, :, blind] == float("-inf")).all()
        grads = torch.autograd.grad([o, lse], leaves, [torch.randn_like(o), torch.randn_like(lse)])
        assert all(g.isfinite().all() for g in grads)
        assert (grads[0][:, blind] == 0).all()

    @pytest.mark.parametrize("dims", [(16, 16), (192, 128), (256, 256)])
    def test_unseen_keys_get_zero(self, dims):
        q, k, v = (t.requires_grad_() for t in qkv(5, 150, dim=dims[0], dim_v=dims[1]).values())
        o = pyckpt.attention(q, k, v, causal=True, window=9)
        seen = reference.visible_keys(5, 150, (9, 0)).any(0)
        for grad in torch.autograd.grad(o, (k, v), torch.randn_like(o)):
            assert (grad[:, ~seen] == 0).all()
            assert (grad[:, seen] != 0).any(-1).all()

    def test_see_their_sink(self):
        q, k, v = qkv(40, 0).values()
        sinks = torch.randn(2, device=DEVICE)
        o, lse = pyckpt.attention(q, k, v, sinks=sinks, return_lse=True)
        assert (o == 0).all()
        torch.testing.assert_close(lse, sinks.view(1, 2, 1).expand_as(lse))

    @pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
    def test_empty_tensors(self, shape):
        batch, sq, sk = shape
        leaves = [t.requires_grad_() for t in qkv(sq, sk, batch=batch).values()]
        o = pyckpt.attention(*leaves, causal=False)
        assert o.shape == leaves[0].shape
        for grad in torch.autograd.grad(o.sum(), leaves):
            assert (grad == 0).all()


class TestCost:
    @pytest.mark.parametrize("part", ["fwd_kernel_tile", "bwd_kernel_dkdv", "bwd_kernel_dq"])
    def test_a_new_seed_compiles_nothing(self, part):
        """Unless told otherwise, Triton compiles anew for the first seed that is a multiple of 16."""
        kernel = getattr(attention, f"attention_{part}")
        told = [p.name for p in kernel.params if p.do_not_specialize] if GPU else kernel.kwargs["do_not_specialize"]
        assert "seed" in told

    @pytest.mark.parametrize("mask", a_few(["causal", "window", "window-both"], always=(2,)))
    def test_hidden_tiles_are_never_read(self, mask):
        """NaN in every key that no query of a tile sees, and in every query that sees no key of one."""
        q, k, v = qkv(96, 96).values()
        left, right = MASKS[mask][1]
        do, options = torch.randn_like(q), (None, None, left, right, 0.0, 0.3)
        o, lse = ops.attention_fwd(q, k, v, *options)
        grads = ops.attention_bwd(do, q, k, v, o, lse, None, *options)
        row = slice(32, 64)  # the second tile
        lo = 0 if left < 0 else (32 - left) // 32 * 32
        hi = -(-(64 + right) // 32) * 32
        bad_k, bad_v = (torch.full_like(t, float("nan")) for t in (k, v))
        for bad, t in ((bad_k, k), (bad_v, v)):
            bad[:, lo:hi] = t[:, lo:hi]
        got, got_lse = ops.attention_fwd(q, bad_k, bad_v, *options)
        assert torch.equal(got[:, row], o[:, row])
        assert torch.equal(got_lse[:, :, row], lse[:, :, row])
        assert torch.equal(ops.attention_bwd(do, q, bad_k, bad_v, o, lse, None, *options)[0][:, row], grads[0][:, row])
        lo, hi = (32 - right) // 32 * 32, 96 if left < 0 else -(-(64 + left) // 32) * 32
        bad_q = torch.full_like(q, float("nan"))
        bad_q[:, lo:hi] = q[:, lo:hi]
        for i in (1, 2):
            assert torch.equal(ops.attention_bwd(do, bad_q, k, v, o, lse, None, *options)[i][:, row], grads[i][:, row])

    def test_allocates_outputs_and_delta_only(self, monkeypatch):
        made = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, Tensor) and out._base is None:
                    made.append(tuple(out.shape))
                return out

        class Nothing:
            def __getitem__(self, grid):
                return lambda *args, **options: None

        for name in [n for n in vars(attention) if n.startswith("attention_") and "_kernel_" in n]:
            monkeypatch.setattr(attention, name, Nothing())  # the interpreter allocates, where a GPU does not
        q, k, v = qkv(40, 50, heads=4).values()
        options = Options(window=(-1, 0), scale=0.3)
        with Watch():
            o, lse = attention.forward(q, k, v, options)
        assert made == [o.shape, lse.shape]
        made.clear()
        with Watch():
            attention.backward(o, q, k, v, lse, attention.delta(o, o), options)
        assert made == [lse.shape, q.shape, k.shape, v.shape]

    @pytest.mark.parametrize("runs", a_few([3, 20], always=(0,)))
    def test_runs_give_the_same_bits(self, runs):
        inputs, cu_seqlens = packed([33, 0, 31], heads=4, kv_heads=2)
        q, k, v = (t.to(LOW) for t in inputs.values())
        options = (cu_seqlens, None, 20, 0, 2.0, 0.3, None, None, 0.1, 3)
        do, first = torch.randn_like(q), None
        for _ in range(runs):
            o, lse = ops.attention_fwd(q, k, v, *options)
            now = (o, lse, *ops.attention_bwd(do, q, k, v, o, lse, None, *options))
            first = first or now
            assert all(torch.equal(a, b) for a, b in zip(first, now, strict=True))

    def test_a_head_does_not_depend_on_its_neighbours(self):
        q, k, v = qkv(60, 60, heads=4, kv_heads=2, batch=2).values()
        whole = pyckpt.attention(q, k, v, dropout=0.2, seed=1)
        assert torch.equal(pyckpt.attention(q[:1], k[:1], v[:1], dropout=0.2, seed=1), whole[:1])
        assert torch.equal(
            pyckpt.attention(q[:, :, :2], k[:, :, :1], v[:, :, :1], dropout=0.2, seed=1), whole[:, :, :2]
        )


class TestSchedules:
    """What decides who computes a tile, and when, leaves its bits alone."""

    @pytest.mark.parametrize("mask", a_few(MASKS, always=(1,)))
    @pytest.mark.parametrize(
        "way", a_few([{"persistent": 1}, {"persistent": 1, "tma": True}, {"split": True}], always=(1,)), ids=str
    )
    def test_give_the_same_bits(self, way, mask, monkeypatch):
        monkeypatch.setattr(
            tuning, "multiprocessors", lambda device: 5
        )  # 12 tiles of queries, 9 of keys: a last turn not full
        q, k, v = (t.to(LOW) for t in qkv(101, 90, heads=3, kv_heads=3).values())
        options = Options(window=MASKS[mask][1], dropout=0.1, seed=7)
        found = []
        for config in (Config(32, 32), Config(32, 32, **way)):
            configs = dict.fromkeys(("fwd", "dkdv", "dq"), config)
            o, lse = attention.forward(q, k, v, options, configs=configs)
            found.append(
                (o, lse, *attention.backward(o, q, k, v, lse, attention.delta(o, o), options, configs=configs))
            )
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def test_persistent_with_packed_sequences(self, monkeypatch):
        monkeypatch.setattr(tuning, "multiprocessors", lambda device: 5)
        monkeypatch.setattr(tuning, "lookup", lambda key: Config(16, 16, persistent=2))
        inputs, cu_seqlens = packed([0, 19, 1, 0, 37, 7, 0], heads=2, kv_heads=1)
        check(inputs, cu_seqlens=cu_seqlens)


class TestDispatch:
    def test_the_forced_backend_serves(self, monkeypatch):
        served = []
        for name in ("forward", "backward"):
            real = getattr(attention, name)
            monkeypatch.setattr(
                attention, name, lambda *a, real=real, name=name, **o: served.append(name) or real(*a, **o)
            )
        q, k, v = (t.requires_grad_() for t in qkv(5, 5).values())
        pyckpt.attention(q, k, v).sum().backward()
        assert served == ["forward", "backward"]

    @pytest.mark.skipif(GPU, reason="bfloat16 is right on a GPU")
    def test_bfloat16_is_right_in_the_interpreter_too(self):
        check(qkv(40, 50), dtype=torch.bfloat16)

    def test_what_the_kernels_cannot_take_goes_to_pytorch(self):
        q, k, v = qkv(5, 5, dim=320).values()
        with pytest.warns(UserWarning, match=r"head dim 320: the Triton attention kernels take 1 to 256"):
            got = pyckpt.attention(q, k, v)
        torch.testing.assert_close(got, reference.attention(q, k, v, window=(-1, 0))[0])
        q, k, v = (t.double() for t in qkv(5, 5).values())
        torch.testing.assert_close(pyckpt.attention(q, k, v), reference.attention(q, k, v, window=(-1, 0))[0])

    @pytest.mark.slow
    def test_opcheck(self):
        q, k, v = (t.requires_grad_() for t in qkv(9, 9, heads=4, kv_heads=2).values())
        options = (None, None, -1, 0, 0.0, 0.3, torch.randn(4, device=DEVICE), torch.rand(4, device=DEVICE), 0.2, 5)
        torch.library.opcheck(ops.attention_fwd.default, (q, k, v, *options))
        o, lse = (t.detach() for t in ops.attention_fwd(q, k, v, *options))
        q, k, v = (t.detach() for t in (q, k, v))
        torch.library.opcheck(ops.attention_bwd.default, (o, q, k, v, o, lse, lse, *options))
        torch.library.opcheck(ops.attention_delta.default, (o, o, lse))
        tile = (-1, 0, 0.0, 0.3, 4, 2)
        torch.library.opcheck(ops.attention_tile_fwd_.default, (q, k, v, o.clone(), lse.clone(), *tile))
        grads = (torch.zeros_like(t) for t in (q, k, v))
        torch.library.opcheck(ops.attention_tile_bwd_.default, (o, q, k, v, lse, lse, *grads, *tile))

    def test_compiles_without_a_graph_break(self):
        def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return pyckpt.attention(q * 2, k, v, window=20, softcap=5.0).relu()

        inputs = [t.requires_grad_() for t in qkv(40, 40).values()]
        want = fn(*inputs)
        got = torch.compile(fn, fullgraph=True, backend="aot_eager")(*inputs)
        assert torch.equal(got, want)
        do = torch.randn_like(got)
        for a, b in zip(torch.autograd.grad(got, inputs, do), torch.autograd.grad(want, inputs, do), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("save", ["attention", "input"])
    def test_a_block_trains_on_them(self, save):
        torch.manual_seed(0)
        block = pyckpt.CkptTransformerBlock(32, 2, n_kv_heads=1, d_ff=48, save=save, tile=24, window=20, device=DEVICE)
        x = torch.randn(1, 50, 32, device=DEVICE, requires_grad=True)
        dy = torch.randn_like(x)
        grads = torch.autograd.grad(block(x), [x, *block.parameters()], dy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYCKPT_BACKEND", "torch")
            want = torch.autograd.grad(block(x), [x, *block.parameters()], dy)
        for got, expected in zip(grads, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


LOOKUP = tuning.lookup  # before any test replaces it


class TestTable:
    @pytest.mark.slow
    def test_every_kind_of_call_has_a_row(self):
        archs = (
            "sm_75",
            "sm_80",
            "sm_86",
            "sm_89",
            "sm_90",
            "sm_100",
            "sm_103",
            "sm_120",
            "gfx942",
            "gfx90a",
            "interpreter",
        )
        dims, masks = (16, 32, 64, 128, 256), ("full", "causal", "window")
        scores, loads = ("plain", "into", "extra"), ("tma", "pointers")
        for key in itertools.product(
            archs, ("fwd", "dkdv", "dq"), dims, dims, ("half", "float32"), masks, scores, loads
        ):
            found = LOOKUP(tuning.Key(*key))
            for n in (found.block_m, found.block_n):
                assert n >= 16
                assert n & (n - 1) == 0

    def test_rows_name_only_known_keys(self):
        known = {"arch", "op", "head_dim", "value_dim", "dtype", "mask", "score", "loads", "config", "source"}
        for row in tuning.rows():
            assert set(row) <= known
            assert Config(*row["config"]).num_warps in (4, 8, 16)
            assert row["source"]

    def test_an_unknown_chip_takes_the_rows_of_the_one_before_it(self):
        key = tuning.Key("sm_90", "fwd", 128, 128, "half", "causal")
        assert LOOKUP(dataclasses.replace(key, arch="sm_95")) == LOOKUP(key)
        assert LOOKUP(dataclasses.replace(key, arch="sm_89")) != LOOKUP(dataclasses.replace(key, arch="sm_80"))


class TestAutotuning:
    KEY = tuning.Key("sm_90", "fwd", 128, 128, "half", "causal")

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tuning, "lookup", LOOKUP)
        monkeypatch.setenv("PYCKPT_CACHE_DIR", str(tmp_path / "new"))
        tuning._tuned.cache_clear()
        yield tmp_path / "new" / "attention.json"
        tuning._tuned.cache_clear()

    def test_is_off_by_default(self, cache, monkeypatch):
        monkeypatch.delenv("PYCKPT_AUTOTUNE", raising=False)
        monkeypatch.setattr(tuning, "time_config", None)
        assert tuning.configured(self.KEY, print, repeatable=True) == LOOKUP(self.KEY)
        assert not cache.exists()

    def test_takes_the_fastest_once_and_keeps_it_on_disk(self, cache, monkeypatch):
        monkeypatch.setenv("PYCKPT_AUTOTUNE", "1")
        tried = []
        wanted = tuning.candidates(self.KEY)[5]

        def time_config(config: Any, run: Any) -> float | None:
            tried.append(config)
            return None if config.num_stages == 3 and config != wanted else 1.0 if config == wanted else 2.0

        monkeypatch.setattr(tuning, "time_config", time_config)
        assert tuning.configured(self.KEY, print, repeatable=True) == wanted
        assert tried == tuning.candidates(self.KEY)
        assert tried[0] == LOOKUP(self.KEY)
        tuning._tuned.cache_clear()  # as in a new process
        assert tuning.configured(self.KEY, print, repeatable=True) == wanted
        assert len(tried) == len(tuning.candidates(self.KEY))
        cache.write_text("{ not json")
        tuning._tuned.cache_clear()
        assert tuning.configured(self.KEY, print, repeatable=True) == wanted

    @pytest.mark.parametrize("kept", [[128, 64, 4, 2, True, 0], {"block_m": 128}, None, "everything"])
    def test_what_another_version_kept_is_found_anew(self, cache, monkeypatch, kept):
        monkeypatch.setenv("PYCKPT_AUTOTUNE", "1")
        monkeypatch.setattr(tuning, "time_config", lambda config, run: float(config != tuning.candidates(self.KEY)[3]))
        wanted = tuning.configured(self.KEY, print, repeatable=True)
        (name,) = json.loads(cache.read_text())
        cache.write_text(json.dumps([kept] if kept == "everything" else {name: kept}))
        tuning._tuned.cache_clear()
        assert tuning.configured(self.KEY, print, repeatable=True) == wanted == tuning.candidates(self.KEY)[3]

    def test_nothing_is_timed_inside_a_graph(self, cache, monkeypatch):
        """It waits for the device, which ends the capture."""
        monkeypatch.setenv("PYCKPT_AUTOTUNE", "1")
        monkeypatch.setattr(tuning, "_capturing", lambda: True)
        monkeypatch.setattr(tuning, "time_config", None)
        assert tuning.configured(self.KEY, print, repeatable=True) == LOOKUP(self.KEY)
        assert not cache.exists()

    def test_never_runs_twice_what_writes_in_place(self, monkeypatch):
        monkeypatch.setenv("PYCKPT_AUTOTUNE", "1")
        monkeypatch.setattr(tuning, "time_config", None)
        assert tuning.configured(self.KEY, print, repeatable=False) == LOOKUP(self.KEY)


class TestBadInput:
    """Errors of the launchers, before anything is launched; those of `pyckpt.attention` are tested with the op."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q": (5, 2, 16)}, "q must have 4 dims"),
            ({"k": (1, 5, 1, 8)}, "q, k, v do not fit together"),
            ({"v": (1, 6, 1, 16)}, "q, k, v do not fit together"),
            ({"q": (2, 5, 2, 16)}, "q, k, v do not fit together"),
            ({"q": (1, 5, 3, 16), "k": (1, 5, 2, 16), "v": (1, 5, 2, 16)}, "no multiple of the 2 key/value heads"),
            ({"q": (1, 5, 2, 257), "k": (1, 5, 1, 257)}, "head dim 257: the Triton attention kernels take 1 to 256"),
            ({"v": (1, 5, 1, 300)}, "value head dim 300"),
        ],
    )
    def test_shapes(self, change, message):
        shapes = {"q": (1, 5, 2, 16), "k": (1, 5, 1, 16), "v": (1, 5, 1, 16)} | change
        with pytest.raises(ValueError, match=message):
            attention.forward(*(torch.randn(*s, device=DEVICE) for s in shapes.values()), Options())

    def test_dtypes_and_devices(self):
        q, k, v = qkv(5, 5).values()
        with pytest.raises(ValueError, match=r"k is torch\.float16 on .*; expected q's torch\.float32"):
            attention.forward(q, k.half(), v, Options())
        with pytest.raises(ValueError, match=r"v is torch\.float32 on meta"):
            attention.forward(q, k, v.to("meta"), Options())
        with pytest.raises(ValueError, match=r"dtype torch\.float64: the Triton attention kernels take"):
            attention.forward(q.double(), k.double(), v.double(), Options())

    @pytest.mark.skipif(GPU, reason="without a GPU the interpreter is the only way")
    def test_cpu_tensors_without_the_interpreter(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="Triton kernels run on CUDA, or on the CPU under TRITON_INTERPRET=1"):
            attention.forward(*qkv(5, 5).values(), Options())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"window": (-2, 0)}, r"window sides must be -1 \(no limit\) or more"),
            ({"dropout": 0.5}, "dropout needs a seed"),
            ({"dropout": 1.0, "seed": 1}, r"dropout must be in \[0, 1\)"),
            ({"softcap": -1.0}, "softcap not negative"),
            ({"scale": float("nan")}, "scale and softcap must be finite"),
            ({"sinks": torch.zeros(3)}, r"sinks must be \(2,\)"),
            ({"alibi_slopes": torch.zeros(3, 2)}, r"alibi_slopes must be \(2,\) or \(1, 2\)"),
        ],
    )
    def test_options(self, options, message):
        options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
        with pytest.raises(ValueError, match=message):
            attention.forward(*qkv(5, 5).values(), Options(**options))

    def test_cu_seqlens(self):
        q, k, v = (t[0] for t in qkv(5, 5).values())
        with pytest.raises(ValueError, match="cu_seqlens_q must be contiguous int32"):
            attention.forward(q, k, v, Options(cu_seqlens_q=torch.tensor([0, 5], device=DEVICE)))
        with pytest.raises(ValueError, match="cu_seqlens must not descend"):
            pyckpt.attention(q, k, v, cu_seqlens=torch.tensor([0, 4, 2, 5], dtype=torch.int32, device=DEVICE))

    def test_running_results(self):
        q, k, v = qkv(5, 5).values()
        o, lse = torch.zeros(1, 5, 2, 16, device=DEVICE), torch.zeros(1, 2, 5, device=DEVICE)
        for bad_o, bad_lse, message in (
            (o.half(), lse, "the running o must be float32"),
            (o[:, :4], lse, "the running o must be float32"),
            (o, lse[:, :, :4], "the running lse must be float32 .* with a unit last stride"),
        ):
            with pytest.raises(ValueError, match=message):
                attention.forward(q, k, v, Options(), into=(bad_o, bad_lse))
        with pytest.raises(ValueError, match="take no sinks"):
            attention.forward(q, k, v, Options(sinks=torch.zeros(2, device=DEVICE)), into=(o, lse))
        with pytest.raises(ValueError, match="dk to add to must be float32"):
            attention.backward(o, q, k, v, lse, lse, Options(), into=(q, k.half(), v))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
class TestOnTheGpu:
    """As they ship, at sizes that fill the chip."""

    @pytest.mark.parametrize("tiles", ["table"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
    @pytest.mark.parametrize(("sq", "sk"), [(1023, 1024), (2048, 2048), (113, 2003)])
    def test_the_table(self, sq, sk, dims, mask, dtype, tiles):
        check(qkv(sq, sk, 4, 2, *dims), mask, dtype)

    @pytest.mark.parametrize("tiles", ["table"])
    @pytest.mark.parametrize("name", FEATURES)
    def test_features_with_the_table(self, name, tiles):
        check_features((name,), torch.bfloat16)

    @pytest.mark.parametrize("tiles", ["table"])
    def test_memory_of_a_long_sequence_is_its_tensors(self, tiles):
        n = 65536
        q, k, v = (torch.randn(1, n, 4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        o = pyckpt.attention(q, k, v)
        o.backward(torch.ones_like(o))
        tensors = q.numel() * 2
        # o, do, dq, dk, dv and what autograd holds of them; lse and delta are 1/32 of one of them.
        assert torch.cuda.max_memory_allocated() - before <= 6 * tensors

    @pytest.mark.parametrize("tiles", ["table"])
    def test_a_new_length_compiles_nothing(self, tiles):
        def run(n: int) -> None:
            q, k, v = (t.to(torch.bfloat16).requires_grad_() for t in qkv(n, n, 4, 2, 64, batch=2).values())
            pyckpt.attention(q, k, v).sum().backward()

        def compiled() -> int:
            kernels = [k for n, k in vars(attention).items() if n.startswith("attention_") and "_kernel_" in n]
            return sum(len(cache[0]) for k in kernels for cache in k.device_caches.values())

        run(640)
        before = compiled()
        for n in (17, 128, 1000, 4096):
            run(n)
        assert compiled() == before
