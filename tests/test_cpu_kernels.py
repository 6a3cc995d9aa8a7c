"""The compiled CPU kernels of attention: parity with plain PyTorch by the 2x rule, for each instruction set here; bits
that depend on nothing but the inputs; how the library is built, found, and said to be missing."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LOW_DTYPES, assert_close_to_truth, check_truth, step
from torch import Tensor

import pyckpt
from pyckpt.ops import attention_cpp, cpu_library, philox, reference, registry
from pyckpt.ops.cpu_library import CpuLibrary, library

ROOT = Path(__file__).resolve().parent.parent
COMPILER = next(filter(shutil.which, ("g++", "c++", "clang++")), None)
TILE = 96  # csrc/cpu/attention.h's kTile
ops = torch.ops.pyckpt

MASKS = {"causal": (-1, 0), "full": (-1, -1), "window": (70, 0), "both": (37, 130), "right": (-1, 40), "self": (0, 0)}
ALL_MASKS = pytest.mark.parametrize("mask", MASKS)

needs_library = pytest.mark.skipif(bool(library.problem), reason=f"CPU kernels: {library.problem}")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(params=library.instruction_sets or ["none"])
def isa(request, monkeypatch) -> str:
    """Each instruction set of the library that this machine has, if the processor's bfloat16 units are no matter."""
    monkeypatch.setenv("PYCKPT_BACKEND", "cpp")
    monkeypatch.setenv("PYCKPT_CPU_ISA", request.param)
    monkeypatch.setattr(attention_cpp, "_HAS_AMX", False)
    return request.param


def qkv(
    sq: int,
    sk: int,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    shapes = {"q": (sq, heads[0], dims[0]), "k": (sk, heads[1], dims[0]), "v": (sk, heads[1], dims[1])}
    return {n: torch.randn(batch, *shape).to(dtype) for n, shape in shapes.items()}


def ours(
    mask: str, softcap: float = 0.0, scale: float = 0.3, sinks: Any = None, slopes: Any = None, **rest: Any
) -> Any:
    cu, cu_k, top_left = rest.get("cu_seqlens"), rest.get("cu_seqlens_k"), rest.get("top_left", False)
    given = (cu, cu_k, *MASKS[mask], softcap, scale, sinks, slopes, 0.0, None, top_left)
    return lambda q, k, v: ops.attention_fwd(q, k, v, *given)


def formula(mask: str, softcap: float = 0.0, scale: float = 0.3, slopes: Any = None, **rest: Any) -> Any:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Any:
        extras = {
            n: t.to(q.dtype) for n, t in (("sinks", rest.get("sinks")), ("alibi_slopes", slopes)) if t is not None
        }
        others = {n: t for n, t in rest.items() if n != "sinks"}
        return reference.attention(q, k, v, window=MASKS[mask], softcap=softcap, scale=scale, **extras, **others)

    return fn


def check(inputs: dict[str, Tensor], mask: str, **options: Any) -> None:
    """o, lse and all gradients, of both.

    Where a row sees one key, its score's gradient is the difference of two sums of d_v products that cancel: `between`
    is their size, times the scale, in the worst of some hundred rows. Plain autograd sums the same products twice in
    the same order, and has 0 there.
    """
    one_key = mask == "self" or inputs["k"].shape[-3] == 1
    between = (10 if one_key else 2) * abs(options.get("scale", 0.3)) * inputs["v"].shape[-1] ** 0.5
    sizes = {"dq": max(1.0, between), "dk": max(1.0, between)}
    fn = formula(mask, **options)
    check_truth(ours(mask, **options), fn, fn, inputs, terms=1.0, terms_of=sizes)


@needs_library
@pytest.mark.usefixtures("isa")
class TestParity:
    @ALL_MASKS
    @pytest.mark.parametrize(
        ("sq", "sk"),
        [(1, 1), (1, 300), (95, 95), (96, 96), (97, 97), (191, 193), (400, 400), (300, 120), (130, 700), (5, 0)],
    )
    def test_lengths(self, sq, sk, mask):
        check(qkv(sq, sk), mask)

    @pytest.mark.parametrize(
        "dims",
        [
            (1, 1),
            (8, 8),
            (17, 33),
            (48, 64),
            (64, 64),
            (80, 80),
            (96, 112),
            (128, 128),
            (192, 128),
            (256, 256),
            (300, 7),
        ],
    )
    @pytest.mark.parametrize("mask", ["causal", "both"])
    def test_head_dims(self, dims, mask):
        check(qkv(140, 230, dims=dims), mask, scale=dims[0] ** -0.5)

    @pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 1), (10, 2), (8, 2), (9, 3)])
    @pytest.mark.parametrize("threads", [1, 3])
    def test_heads_and_threads(self, heads, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            check(qkv(250, 250, heads=heads, batch=2), "causal")
        finally:
            torch.set_num_threads(before)

    def test_many_chunks_of_keys(self):
        """More than one chunk of the backward, whose shares of dq are added in turn."""
        for dims in ((8, 8), (65, 65), (130, 130)):
            check(qkv(700, 1300, heads=(2, 1), dims=dims), "causal", scale=dims[0] ** -0.5)
            check(qkv(1300, 1300, heads=(2, 1), dims=dims), "both", scale=dims[0] ** -0.5)

    @ALL_MASKS
    @pytest.mark.parametrize("softcap", [0.0, 4.0])
    def test_sinks_alibi_and_softcap(self, softcap, mask):
        for slopes in (torch.rand(4), torch.rand(2, 4)):
            check(qkv(130, 160, batch=2), mask, softcap=softcap, sinks=torch.randn(4), slopes=slopes)

    @pytest.mark.parametrize("softcap", [1.0, 50.0])
    def test_softcap_of_small_and_large_scores(self, softcap):
        """tanh takes another way near 0, where it would lose bits."""
        for size in (0.05, 1.0, 8.0):
            inputs = qkv(120, 120)
            inputs["q"] *= size
            check(inputs, "causal", softcap=softcap, scale=1.0)

    @pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
    def test_scales(self, scale):
        check(qkv(120, 120), "causal", scale=scale)

    @pytest.mark.parametrize("mask", ["causal", "both"])
    def test_packed(self, mask):
        cu = torch.tensor([0, 0, 19, 20, 20, 217, 230], dtype=torch.int32)
        flat = {n: t[0] for n, t in qkv(230, 230).items()}
        check(flat, mask, cu_seqlens=cu)
        check(flat, mask, cu_seqlens=cu, slopes=torch.rand(6, 4), sinks=torch.randn(4))
        of_keys = torch.tensor([0, 7, 12, 12, 140, 150, 230], dtype=torch.int32)
        for top_left in (False, True):
            check(flat, mask, cu_seqlens=cu, cu_seqlens_k=of_keys, top_left=top_left)

    @pytest.mark.parametrize("rate", [0.1, 0.9])
    @pytest.mark.parametrize("mask", ["causal", "both"])
    def test_dropout(self, rate, mask):
        """The same are dropped as in PyTorch's products, which are tested against the published Philox."""
        seed = random.randrange(-(2**63), 2**63)
        cu = torch.tensor([0, 0, 19, 20, 20, 217, 230], dtype=torch.int32)
        for batch, cu_seqlens in ((2, None), (1, cu)):
            inputs = qkv(230, 230, batch=batch)
            if cu_seqlens is not None:
                inputs = {n: t[0] for n, t in inputs.items()}
            given = (cu_seqlens, cu_seqlens, *MASKS[mask], 0.0, 0.3, torch.randn(4), torch.rand(4), rate, seed)
            exact = {n: t.double() for n, t in inputs.items()}
            truth, douts = step(lambda *args, given=given: ops.attention_fwd(*args, *given), exact)
            with pytest.MonkeyPatch.context() as patch:
                got = step(lambda *args, given=given: ops.attention_fwd(*args, *given), inputs, douts)[0]
                patch.setenv("PYCKPT_BACKEND", "torch")
                plain = step(lambda *args, given=given: ops.attention_fwd(*args, *given), inputs, douts)[0]
            for name, t in got.items():
                assert_close_to_truth(t, plain[name], truth[name], what=name, terms=1.0)

    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    @pytest.mark.parametrize("mask", ["causal", "both"])
    def test_half_precision(self, dtype, mask):
        check(qkv(213, 213, dims=(40, 40), dtype=dtype), mask)
        check(qkv(120, 150, dtype=dtype), mask, softcap=3.0, sinks=torch.randn(4), slopes=torch.rand(4))

    def test_a_long_row_is_summed_in_parts(self):
        """16,384 keys a row, of like size: one sum after another would lose three bits of what parts keep."""
        q, k, v = qkv(8, 16384, heads=(1, 1), dims=(8, 8)).values()
        v = v.abs() + 1
        exact = reference.attention(q.double(), k.double(), v.double(), scale=0.01)[0]
        o, _ = ours("full", scale=0.01)(q, k, v)
        plain = reference.attention(q, k, v, scale=0.01)[0]
        assert_close_to_truth(o, plain, exact)


@needs_library
@pytest.mark.usefixtures("isa")
class TestTiles:
    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    @pytest.mark.parametrize("mask", ["causal", "full", "window", "both"])
    def test_pairs_of_tiles_add_up(self, mask, dtype):
        """In any order, into views of larger tensors, from running results."""
        n, options = 330, (*MASKS[mask], 0.0, 0.3)
        inputs = qkv(n, n, dtype=dtype)
        q, k, v = inputs.values()
        sinks, do = torch.randn(4), torch.randn(1, n, 4, 16).to(dtype)
        exact, douts = step(formula(mask, sinks=sinks.double()), {m: t.double() for m, t in inputs.items()}, None)
        douts[0], douts[1] = do.double(), torch.zeros_like(douts[1])
        exact = step(formula(mask, sinks=sinks.double()), {m: t.double() for m, t in inputs.items()}, douts)[0]
        plain = step(formula(mask, sinks=sinks), inputs, douts)[0]
        o, lse = torch.zeros(1, n, 4, 16), sinks.view(1, 4, 1).expand(1, 4, n).clone()
        cuts = [slice(0, 5), slice(5, 180), slice(180, n)]
        pairs = list(itertools.product(cuts, cuts))
        random.shuffle(pairs)
        for i, j in pairs:
            ops.attention_tile_fwd_(q[:, i], k[:, j], v[:, j], o[:, i], lse[:, :, i], *options, i.start, j.start)
        delta = ops.attention_delta(do.float(), o, None)
        grads = [torch.zeros(t.shape) for t in (q, k, v)]
        for i, j in pairs:
            into = grads[0][:, i], grads[1][:, j], grads[2][:, j]
            stats = lse[:, :, i], delta[:, :, i]
            tile = *options, i.start, j.start
            ops.attention_tile_bwd_(do[:, i], q[:, i], k[:, j], v[:, j], *stats, *into, *tile)
        got = {"out 0": o, "out 1": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
        for name, t in got.items():
            assert_close_to_truth(t, plain[name], exact[name], what=name, terms=1.0)

    def test_tiles_drop_what_their_sequence_drops(self):
        """Keys begin at positions that 4 does not divide, and sequences at a number of their own."""
        q, k, v = qkv(230, 230, batch=3).values()
        drops = None, 0.3, 77
        o, lse = ops.attention_fwd(q, k, v, None, None, -1, 0, 0.0, 0.3, None, *drops)
        do, grads = torch.randn_like(o), [torch.zeros(t.shape) for t in (q, k, v)]
        want = ops.attention_bwd(do, q, k, v, o, lse, None, None, None, -1, 0, 0.0, 0.3, None, *drops)
        delta = ops.attention_delta(do, o, None)
        got_o, got_lse = torch.zeros_like(o), torch.full_like(lse, float("-inf"))
        cuts = [slice(0, 5), slice(5, 118), slice(118, 230)]
        for b, i, j in itertools.product(range(3), cuts, cuts):
            at, to = (slice(b, b + 1), i), (slice(b, b + 1), j)
            tile = -1, 0, 0.0, 0.3, i.start, j.start, *drops, b
            rows = slice(b, b + 1), slice(None), i
            ops.attention_tile_fwd_(q[at], k[to], v[to], got_o[at], got_lse[rows], *tile)
            into = grads[0][at], grads[1][to], grads[2][to]
            ops.attention_tile_bwd_(do[at], q[at], k[to], v[to], lse[rows], delta[rows], *into, *tile)
        for got, expected in zip((got_o, got_lse, *grads), (o, lse, *want), strict=True):
            assert (
                (got - expected).norm() / expected.norm()
            ).item() < 1e-6  # 8 units in the last place; tiles are merged


@needs_library
@pytest.mark.usefixtures("isa")
class TestMemory:
    def test_strides(self):
        """Heads first, a slice of a wider tensor, a gradient of stride zero and one with no unit stride."""
        wide = torch.randn(1, 150, 4, 3, 16)
        q, k, v = wide[:, :, :, 0], wide[:, :, :2, 1], torch.randn(1, 2, 150, 16).transpose(1, 2)
        want = step(ours("causal"), {n: t.contiguous() for n, t in zip("qkv", (q, k, v), strict=True)})
        got = step(ours("causal"), dict(zip("qkv", (q, k, v), strict=True)), want[1])
        assert all(torch.equal(got[0][n], t) for n, t in want[0].items())
        o, lse = ours("causal")(q, k, v)
        options = (None, None, *MASKS["causal"], 0.0, 0.3)
        for do in (torch.ones(1).expand(o.shape), torch.randn(1, 16, 4, 150).permute(0, 3, 2, 1)):
            grads = ops.attention_bwd(do, q, k, v, o, lse, None, *options)
            dense = ops.attention_bwd(do.contiguous(), q, k, v, o, lse, None, *options)
            assert all(map(torch.equal, grads, dense))

    def test_nothing_else_is_written(self):
        """Running results lie between rows of NaN."""
        q, k, v = qkv(100, 100, dims=(20, 20)).values()
        room = torch.full((1, 102, 4, 22), float("nan"))
        o, lse = room[:, 1:-1, :, :20], torch.full((1, 4, 102), float("nan"))[:, :, 1:-1]
        o.zero_()
        lse.fill_(float("-inf"))
        ops.attention_tile_fwd_(q, k, v, o, lse, -1, 0, 0.0, 0.3, 0, 0)
        assert o.isfinite().all() and room.isnan().sum() == room.numel() - o.numel()

    @pytest.mark.slow
    def test_strides_beyond_32_bits(self, unpoisoned):
        """Rows 2^24 elements apart, of which the last lie beyond 2^31."""
        rows, gap = 140, 1 << 24
        small = qkv(rows, rows, heads=(1, 1), dims=(8, 8), dtype=torch.bfloat16)
        far = {}
        for n, t in small.items():
            far[n] = torch.empty(rows * gap, dtype=torch.bfloat16).as_strided((1, rows, 1, 8), (0, gap, 8, 1)).copy_(t)
        want = step(ours("causal"), small)
        got = step(ours("causal"), far, want[1])[0]
        assert all(torch.equal(got[n], t) for n, t in want[0].items())

    def test_empty(self):
        for batch, sq, sk in ((0, 5, 5), (1, 0, 5), (1, 5, 0), (2, 0, 0)):
            found, _ = step(ours("causal"), qkv(sq, sk, batch=batch))
            assert all(not t.isnan().any() for t in found.values())
            assert (found["out 0"] == 0).all() and (found["out 1"] == float("-inf")).all()

    @pytest.mark.parametrize("mask", ["causal", "window"])
    def test_a_gradient_of_no_queries(self, mask):
        """What knows a backward by its queries' counters took this for a forward, and left its memory in a window."""
        found, _ = step(ours(mask), qkv(0, 170, heads=(8, 1)))
        assert not found["dk"].any() and not found["dv"].any()
        q, k, v = qkv(0, 170, heads=(8, 1)).values()
        dk, dv = torch.ones_like(k), torch.ones_like(v)
        lse = q.new_empty(1, 8, 0)
        ops.attention_tile_bwd_(q, q, k, v, lse, lse.clone(), q.clone(), dk, dv, *MASKS[mask], 0.0, 0.3, 0, 0)
        assert (dk == 1).all() and (dv == 1).all()


@needs_library
@pytest.mark.usefixtures("isa")
class TestValues:
    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_the_same_bits_with_any_threads(self, threads, unpoisoned):
        """However the parts fall on threads; and each batch entry as if it were alone."""
        inputs = qkv(600, 600, heads=(4, 2), batch=2)
        first, douts = step(ours("causal"), inputs)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(5):
                again, _ = step(ours("causal"), inputs, douts)
                assert all(torch.equal(first[n], again[n]) for n in first)
            alone = {n: t[1:] for n, t in inputs.items()}
            found, _ = step(ours("causal"), alone, [d[1:] for d in douts])
            assert all(torch.equal(first[n][1:], found[n]) for n in first)
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_nan_or_an_infinity_shows_where_it_is_seen(self, value):
        inputs = qkv(200, 200, heads=(1, 1))
        inputs["k"][0, 150, 0, 3] = value
        inputs["q"][0, 120, 0, 5] = float("nan")
        o, lse = ours("causal")(*inputs.values())
        broken = torch.zeros(200, dtype=torch.bool)
        broken[120] = True
        broken[150:] = True
        assert o[0, ~broken].isfinite().all() and lse[0, 0, ~broken].isfinite().all()
        assert o[0, 120].isnan().all()
        if value != value:
            assert o[0, broken].isnan().all()
        else:
            assert not o[0, broken & (inputs["q"][0, :, 0, 3] > 0)].isfinite().any()

    @pytest.mark.parametrize("softcap", [0.0, 5.0])
    @pytest.mark.parametrize("bits", [0x7FC00001, 0x7F800001, -1])
    def test_a_nan_of_any_bits_is_one(self, bits, softcap):
        """Whose low bits an exponential by integers could take for an exponent: -1 is memory full of ones."""
        inputs = qkv(200, 200, heads=(1, 1))
        inputs["k"][0, 150] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        found, _ = step(ours("causal", softcap=softcap), inputs)
        o, lse = found["out 0"][0], found["out 1"][0, 0]
        assert o[150:].isnan().all() and lse[150:].isnan().all()
        assert o[:150].isfinite().all() and lse[:150].isfinite().all()
        assert found["dq"][0, 150:].isnan().all() and found["dk"][0].isnan().all() and found["dv"][0].isnan().all()

    def test_what_is_divided_by(self):
        """Said before a kernel runs: the process would end there."""
        q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 1, 8)
        for a, b, c in ((q[:, :, :0], k, k), (q[..., :0], k[..., :0], k), (q, k, k[..., :0])):
            with pytest.raises(ValueError, match="expected at least one head and one head dim"):
                ours("causal")(a, b, c)
        for heads in ((1, 2), (3, 2)):  # the first ended the process, the second left a head unwritten
            inputs = qkv(4, 4, heads=heads, dims=(8, 8))
            with pytest.raises(ValueError, match="heads that are a multiple of the key/value heads"):
                ours("causal")(*inputs.values())
            lse = torch.zeros(1, heads[0], 4)
            given = (inputs["q"], *inputs.values(), inputs["q"], lse, None, None, None, -1, 0, 0.0, 0.3)
            with pytest.raises(ValueError, match="heads that are a multiple of the key/value heads"):
                ops.attention_bwd(*given)

    def test_scores_of_any_size(self):
        """Differences of scores far beyond what exp can hold, up and down."""
        inputs = qkv(200, 200)
        inputs["q"] *= 1000.0

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """PyTorch's own flash kernel, whose backward too has the scores' maximum in lse alone."""
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True).transpose(1, 2)

        def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return formula("causal", scale=1.0)(q, k, v)[0]

        check_truth(lambda *args: ours("causal", scale=1.0)(*args)[0], sdpa, truth, inputs, terms=1.0)


class TestChoice:
    @needs_library
    def test_served_by_default(self):
        for name in ("attention_fwd", "attention_bwd", "attention_tile_fwd_", "attention_tile_bwd_"):
            assert registry.choose(name, "cpu") == ("cpp", "default on cpu")
            assert registry.choose(name, "cuda")[0] != "cpp"

    @needs_library
    def test_what_they_do_not_take_is_pytorchs(self, monkeypatch):
        """float64; bfloat16 where there is AMX."""
        ran: list[str] = []
        run = library.run
        monkeypatch.setattr(library, "run", lambda name, argument: (ran.append(name), run(name, argument)))
        q, k, v = qkv(20, 20).values()
        pyckpt.attention(q, k, v)
        assert ran == ["pyckpt_attention_forward"]
        pyckpt.attention(q.double(), k.double(), v.double())
        assert len(ran) == 1
        for amx in (False, True):
            monkeypatch.setattr(attention_cpp, "_HAS_AMX", amx)
            pyckpt.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
            assert len(ran) == 2

    @needs_library
    def test_an_instruction_set_that_is_not_here(self, monkeypatch):
        monkeypatch.setenv("PYCKPT_CPU_ISA", "mmx")
        message = f"PYCKPT_CPU_ISA='mmx': expected one of {', '.join(library.instruction_sets)}, or unset"
        with pytest.raises(ValueError, match=re.escape(message)):
            pyckpt.attention(*qkv(5, 5).values())
        monkeypatch.setenv("PYCKPT_CPU_ISA", library.instruction_sets[-1].upper())
        assert library.chosen() == library.instruction_sets[-1]

    def test_a_library_that_is_missing_or_broken(self, tmp_path):
        assert CpuLibrary(tmp_path / "none.so").problem == "not built"
        (tmp_path / "broken.so").write_bytes(b"nothing")
        assert CpuLibrary(tmp_path / "broken.so").problem.startswith("it does not load: ")

    def test_without_the_library_pytorch_serves(self, tmp_path):
        """In a copy of the package that holds none; the doctor says why."""
        shutil.copytree(ROOT / "pyckpt", tmp_path / "pyckpt", ignore=shutil.ignore_patterns("*.so", "_build.json"))
        shutil.copytree(ROOT / "triton_kernels", tmp_path / "triton_kernels")
        code = "import torch, pyckpt; from pyckpt.ops import registry as r; print(r.choose('attention_fwd', 'cpu'))\n"
        code += "x = torch.randn(1, 9, 2, 8); print(pyckpt.attention(x, x, x).shape)\n"
        code += "from pyckpt import doctor; print(doctor.main_text())"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        choice, shape, *said = done.stdout.splitlines()
        assert choice == "('torch', 'default on cpu')" and shape == "torch.Size([1, 9, 2, 8])"
        assert any(re.match(r"  CPU kernels +not built: pyckpt was not installed", line) for line in said)

    @needs_library
    def test_a_library_of_other_sources_is_not_used(self):
        assert library.argument_size() == ctypes.sizeof(attention_cpp._Attention)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with a library of the sources as they are, and its objects."""
    folder = tmp_path_factory.mktemp("cpu")
    command = [sys.executable, "csrc/build.py", str(folder), "--cpu", "--werror"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@needs_compiler
@pytest.mark.xdist_group("cpu_build")
class TestBuild:
    def test_without_warnings_and_it_loads(self, built):
        fresh = CpuLibrary(built / cpu_library.FILE)
        assert fresh.problem == "" and fresh.argument_size() == ctypes.sizeof(attention_cpp._Attention)
        if not library.problem:
            assert fresh.instruction_sets == library.instruction_sets

    @pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
    def test_kernels_share_no_code(self, built):
        """A weak symbol is kept once for all instruction sets: maybe with instructions that this machine lacks."""
        objects = sorted(built.glob("kernels_*.o"))
        assert objects
        for path in objects:
            said = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
            kinds = {line.split()[1] for line in said.splitlines()}
            assert kinds <= set("tTdDrRbB"), said

    def test_older_compilers_know_what_is_asked_of_processors(self):
        """GCC before 11 and clang before 18 do not compile a question for f16c: there would be no kernels at all."""
        known = {"avx2", "fma", "avx512f", "avx512vl", "avx512bw", "avx512dq"}
        asked = re.findall(r'__builtin_cpu_supports\("(\w+)"\)', (ROOT / "csrc" / "cpu" / "library.cpp").read_text())
        assert asked and set(asked) <= known

    def test_needs_nothing_of_pytorch(self, built):
        code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-I", "-c", code, built / cpu_library.FILE], check=True)

    @pytest.mark.parametrize(
        "lacking",
        ["import fcntl; fcntl.flock = lambda *a: os.open('', 0)", "sys.modules['fcntl'] = None"],
        ids=["flock", "fcntl"],
    )
    def test_where_there_are_no_locks(self, lacking, tmp_path):
        """As on Lustre, mounted as many clusters do, and on Windows: an install ended there."""
        code = f"import os, pathlib, sys; {lacking}\ndel os.sched_getaffinity\nimport build\n"
        code += "with build._alone_in(pathlib.Path(sys.argv[1]), print): print(build._jobs() > 0)"
        command = [sys.executable, "-c", code, tmp_path]
        done = subprocess.run(
            command, cwd=ROOT / "csrc", env={**os.environ, "MAX_JOBS": ""}, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout == "True\n", done.stderr

    def test_options_of_the_other_extension(self):
        command = [sys.executable, "csrc/build.py", "--cpu", "--arch", "9.0"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "--arch and --emulated are of the CUDA extension" in done.stderr


CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")


@pytest.mark.skipif(not (CROSS and EMULATOR), reason="no compiler and emulator for aarch64")
@pytest.mark.xdist_group("cpu_build")
class TestNeon:
    """The kernels for aarch64 in an emulator of that processor."""

    @pytest.fixture(scope="class")
    def driver(self, tmp_path_factory) -> list[str]:
        """The command that runs a problem; see tests/cpu_driver.cpp."""
        folder = tmp_path_factory.mktemp("neon")
        command = [sys.executable, "csrc/build.py", str(folder), "--cpu", "--machine", "aarch64", "--werror"]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CXX": str(CROSS)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        program = folder / "driver"
        flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", f"-Wl,-rpath,{folder}"]
        sources = [str(ROOT / "tests" / "cpu_driver.cpp"), str(folder / cpu_library.FILE)]
        subprocess.run([str(CROSS), *flags, *sources, "-o", str(program)], check=True)
        return [str(EMULATOR), "-L", "/usr/aarch64-linux-gnu", str(program)]

    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    @pytest.mark.parametrize(
        ("mask", "softcap", "rate", "dims"),
        [("causal", 0.0, 0.0, (24, 24)), ("both", 4.0, 0.0, (20, 33)), ("causal", 0.0, 0.3, (130, 64))],
    )
    def test_parity(self, driver, mask, softcap, rate, dims, dtype):
        inputs, scale = qkv(130, 210, heads=(4, 2), dims=dims, dtype=dtype), dims[0] ** -0.5
        seed = random.randrange(2**63)
        options = (None, None, *MASKS[mask], softcap, scale, None, None, rate, seed)
        do = torch.randn(1, 130, 4, dims[1]).to(dtype)
        element = attention_cpp._ELEMENTS[dtype]
        head = struct.pack("12q", 1, 130, 210, 4, 2, *dims, *MASKS[mask], element, philox.threshold(rate), seed)
        head += struct.pack("3d", scale, softcap, 1 / (1 - rate))
        data = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in (*inputs.values(), do))
        done = subprocess.run(driver, input=head + data, capture_output=True)
        assert done.returncode == 0 and done.stderr == b"neon\n", done.stderr

        def run(at: torch.dtype) -> dict[str, Tensor]:
            douts = [do, torch.zeros(1, 4, 130)]
            leaves = {n: t.to(at) for n, t in inputs.items()}
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYCKPT_BACKEND", "torch")
                return step(lambda *args: ops.attention_fwd(*args, *options), leaves, douts)[0]

        at, truth, plain = 0, run(torch.float64), run(dtype)
        for name, want in truth.items():
            kind = dtype if name == "out 0" else torch.float32
            raw = bytearray(done.stdout[at : at + want.numel() * kind.itemsize])
            at += len(raw)
            got = torch.frombuffer(raw, dtype=kind).view(want.shape)
            assert_close_to_truth(got, plain[name], want, what=name, terms=1.0)
        assert at == len(done.stdout)
