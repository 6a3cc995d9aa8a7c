"""What the CUDA C++ kernels compute: on a GPU with the extension built there, else emulated on a CPU (csrc/emulator.h).

The 2x rule against the float64 references, with PyTorch's own kernels as the measure; odd widths, rows with gaps, and
pointers that no vector fits.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import OPTIONS, assert_as_good, make_block, make_input, plain_twin, step
from helpers import assert_close_to_truth, check_truth
from torch import Tensor

import pyckpt
from pyckpt import doctor
from pyckpt.ops import attention_torch, cuda_backend, philox, pointwise_triton, reference, registry
from pyckpt.ops.rope import rope_tables
from pyckpt.spec import GATED_MLPS, MLPS

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-3
NORMS = pytest.mark.parametrize("kind", ["rms", "layer"])
LOW = pytest.mark.parametrize("dtype", DTYPES)

ops = torch.ops.pyckpt
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("csrc_kernels"),
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not GPU and not shutil.which("nvcc") and "CUDA_HOME" not in os.environ,
        reason="no nvcc, hence none of its headers: nothing to build the kernels with",
    ),
]


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The extension, registered while these tests run; built for the CPU where there is no GPU."""
    if GPU:
        if cuda_backend.problem:
            pytest.skip(f"the CUDA extension: {cuda_backend.problem}; make cuda builds it")
        yield
        return
    folder = tmp_path_factory.mktemp("emulated")
    command = [sys.executable, "csrc/build.py", str(folder), "--emulated", "--jobs", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    spec = importlib.util.spec_from_file_location(cuda_backend.MODULE, folder / "_cuda.abi3.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = {name: dict(have) for name, have in registry.IMPLEMENTATIONS.items()}
    sys.modules[cuda_backend.MODULE] = module
    assert cuda_backend.register() == ""
    yield
    del sys.modules[cuda_backend.MODULE]
    registry.extension_device_type = "cuda"
    for name, have in before.items():
        registry.IMPLEMENTATIONS[name] = have


@pytest.fixture(autouse=True)
def forced(extension: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCKPT_BACKEND", "cuda")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)


def laid_out(shape: tuple[int, int], dtype: torch.dtype, layout: str) -> Tensor:
    """Random rows: dense, with gaps between them, or starting where no vector of 16 bytes does."""
    rows, width = shape
    if layout == "dense":
        return randn(rows, width, dtype=dtype)
    if layout == "gaps":
        return randn(rows, 2 * width, dtype=dtype)[:, width:]
    return randn(rows, width + 1, dtype=dtype)[:, 1:]


LAYOUTS = pytest.mark.parametrize("layout", ["dense", "gaps", "misaligned"])


# --- norms --------------------------------------------------------------------------------------------------

# Parts of a warp, whole warps, blocks of every size, pieces; odd ones, which go without vectors; more rows than blocks.
SHAPES = [(1, 1), (9, 8), (70, 64), (300, 96), (35, 128), (9, 520), (45, 1000), (77, 1024), (5, 1032), (3, 2048)]
SHAPES += [(19, 4096), (13, 5120), (5, 5376), (5, 6144), (5, 16384), (2, 20000), (11, 33), (5, 4097)]


def norms(kind: str) -> tuple[Any, Any, Any]:
    if kind == "rms":
        return (
            lambda x, w: pyckpt.rms_norm(x, w, EPS),
            lambda x, w: reference.rms_norm(x, w, EPS),
            lambda x, w: F.rms_norm(x, w.shape, w, EPS),
        )
    return (
        lambda x, w, b: pyckpt.layer_norm(x, w, b, EPS),
        lambda x, w, b: reference.layer_norm(x, w, b, EPS),
        lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS),
    )


def norm_inputs(kind: str, rows: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = {"x": randn(rows, width, dtype=dtype), "weight": randn(width, dtype=dtype)}
    return inputs if kind == "rms" else inputs | {"bias": randn(width, dtype=dtype)}


class TestNorm:
    @NORMS
    @pytest.mark.parametrize(
        ("rows", "width", "dtype"),
        [
            *((*shape, DTYPES[i % 3]) for i, shape in enumerate(SHAPES)),
            *((*shape, dtype) for shape in ((9, 520), (5, 4096)) for dtype in DTYPES),
        ],
    )
    def test_against_pytorch(self, rows, width, dtype, kind):
        ours, formula, plain = norms(kind)
        # A weight's gradient sums over the rows, in another order than PyTorch's; a row's terms may cancel.
        inputs = norm_inputs(kind, rows, width, dtype)
        # In a row of one value all of it does: it is w dy / |x| that is rounded, of a dy of up to 4.
        dx = 1.0 if width > 1 else 4 * float((inputs["weight"] / inputs["x"].abs().clamp_min(EPS**0.5)).abs().max())
        terms = dict.fromkeys(("dweight", "dbias"), rows**0.5) | {"dx": dx}
        check_truth(ours, plain, formula, inputs, terms_of=terms)

    @NORMS
    @LAYOUTS
    @pytest.mark.parametrize("width", [64, 1024, 4096])
    def test_rows_with_gaps_and_gradients_over_their_inputs(self, width, layout, kind):
        """The same bits as from dense rows where the accesses are the same, and about the same where they are not."""
        shape, centered = (9, width), kind == "layer"
        for dtype in (torch.float32, torch.bfloat16):
            x, dy, w = laid_out(shape, dtype, layout), laid_out(shape, dtype, layout), randn(width)
            fwd = ops.layer_norm_fwd(x, w, None, EPS) if centered else ops.rms_norm_fwd(x, w, EPS)
            dense = (x.contiguous(), w, None, EPS) if centered else (x.contiguous(), w, EPS)
            want = ops.layer_norm_fwd(*dense) if centered else ops.rms_norm_fwd(*dense)
            bwd, add = (
                (ops.layer_norm_bwd, ops.layer_norm_bwd_add_) if centered else (ops.rms_norm_bwd, ops.rms_norm_bwd_add_)
            )
            stats = want[1:]
            dx, *dw = bwd(dy.contiguous(), x.contiguous(), w, *stats, True)
            got, *got_dw = bwd(dy, x, w, *stats, True)
            before = laid_out(shape, dtype, layout)
            total = before.clone()
            into = before.as_strided(before.shape, before.stride(), before.storage_offset())
            add_dw = add(dy, x, w, *stats, into, False)
            for a, b in zip((*fwd, got, *got_dw), (*want, dx, *dw), strict=True):
                if layout == "misaligned":
                    assert_close_to_truth(a, b, b.double(), what=f"{kind} {dtype}", terms=3.0)  # sums of 9 rows
                else:
                    assert torch.equal(a, b)
            exact = total.double() + dx.double()
            assert_close_to_truth(into, (total + dx), exact, terms=1.0)
            assert all(t.numel() == 0 for t in (add_dw if centered else (add_dw,)))

    @NORMS
    @pytest.mark.parametrize("width", [33, 128, 3072, 20000])
    def test_weights_in_float32_and_none(self, width, kind):
        """The same bits as from the weights in x's dtype, and as from ones."""
        x, dy, w = (randn(*shape, dtype=torch.bfloat16) for shape in ((7, width), (7, width), (width,)))
        centered = kind == "layer"
        stats = (ops.layer_norm_fwd(x, w, None, EPS) if centered else ops.rms_norm_fwd(x, w, EPS))[1:]
        bwd = ops.layer_norm_bwd if centered else ops.rms_norm_bwd
        for a, b in ((w, w.float()), (torch.ones_like(w), None)):
            for got, want in zip(bwd(dy, x, a, *stats, True), bwd(dy, x, b, *stats, True), strict=True):
                assert torch.equal(got, want)

    @NORMS
    @LOW
    @pytest.mark.parametrize("width", [33, 128, 4096, 20000])
    def test_residual(self, width, dtype, kind):
        """y is the norm of the stored sum."""
        x, r, w, b = (randn(3, width, dtype=dtype), randn(3, width, dtype=dtype), *randn(2, width))
        if kind == "rms":
            y, total, *stats = ops.add_rms_norm_fwd(x, r, w, EPS)
            again = ops.rms_norm_fwd(total, w, EPS)
        else:
            y, total, *stats = ops.add_layer_norm_fwd(x, r, w, b, EPS)
            again = ops.layer_norm_fwd(total, w, b, EPS)
        assert torch.equal(total, x + r)
        assert all(torch.equal(a, b) for a, b in zip((y, *stats), again, strict=True))

    @NORMS
    @pytest.mark.parametrize("width", [96, 2048, 4097])
    def test_the_same_bits_every_time(self, width, kind):
        inputs = norm_inputs(kind, 50, width, torch.bfloat16)
        leaves = [t.requires_grad_() for t in inputs.values()]
        dy = torch.randn_like(inputs["x"])
        runs = [torch.autograd.grad(norms(kind)[0](*leaves), leaves, dy) for _ in range(2)]
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))

    @NORMS
    @pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
    def test_nothing(self, shape, kind):
        inputs = {"x": randn(*shape), "weight": randn(shape[-1])} | (
            {"bias": randn(shape[-1])} if kind == "layer" else {}
        )
        leaves = [t.requires_grad_() for t in inputs.values()]
        y = norms(kind)[0](*leaves)
        assert y.shape == shape
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert all((g == 0).all() for g in grads)

    def test_weights_of_other_dtypes(self):
        x, w, b = randn(5, 64, dtype=torch.bfloat16), randn(64, dtype=torch.float16), randn(64)
        got = ops.layer_norm_fwd(x, w, b, EPS)[0]
        assert torch.equal(got, ops.layer_norm_fwd(x, w.float(), b, EPS)[0])
        apart = randn(128)[::2]
        assert torch.equal(ops.rms_norm_fwd(x, apart, EPS)[0], ops.rms_norm_fwd(x, apart.contiguous(), EPS)[0])

    def test_float64_goes_to_another_backend(self):
        x = randn(3, 5, dtype=torch.float64)
        assert torch.allclose(ops.rms_norm_fwd(x, None, EPS)[0], reference.rms_norm(x, eps=EPS))

    def test_to_one_that_runs_there(self, monkeypatch):
        """Without Triton too."""
        monkeypatch.setattr(registry, "_runs_on", lambda backend, device_type: backend != "triton")
        monkeypatch.setattr(pointwise_triton, "kernels", None)
        x = randn(3, 5, dtype=torch.float64)
        assert torch.allclose(ops.rms_norm_fwd(x, None, EPS)[0], reference.rms_norm(x, eps=EPS))

    @NORMS
    def test_a_gradient_in_the_dtype_of_the_products(self, kind):
        """As a block under autocast has it, whose residual stream is float32."""
        x, dy, w = randn(9, 64), randn(9, 64, dtype=torch.bfloat16), randn(64)
        if kind == "rms":
            stats, bwd, add = ops.rms_norm_fwd(x, w, EPS)[1:], ops.rms_norm_bwd, ops.rms_norm_bwd_add_
        else:
            stats, bwd, add = ops.layer_norm_fwd(x, w, None, EPS)[1:], ops.layer_norm_bwd, ops.layer_norm_bwd_add_
        got, want, into = (*bwd(dy, x, w, *stats, True),), (*bwd(dy.float(), x, w, *stats, True),), torch.ones_like(x)
        assert add(dy, x, w, *stats, into, False) is not None
        for a, b in zip((*got, into), (*want, 1.0 + want[0]), strict=True):
            assert a.dtype == torch.float32
            assert (a - b).abs().max() < 1e-5


# --- activations --------------------------------------------------------------------------------------------


class TestActivations:
    @LOW
    @LAYOUTS
    @pytest.mark.parametrize("kind", MLPS)
    def test_against_pytorch(self, kind, layout, dtype):
        shape = (5, 1032)
        inputs = [laid_out(shape, dtype, layout) for _ in range(2 if kind in GATED_MLPS else 1)]
        dact = laid_out(shape, dtype, layout)

        def differentiated(fn: Any, tensors: list[Tensor]) -> list[Tensor]:
            leaves = [t.detach().clone().requires_grad_() for t in tensors]
            act = fn(*leaves)
            return [act.detach(), *torch.autograd.grad(act, leaves, dact.to(act.dtype))]

        gated = kind in GATED_MLPS
        truth = differentiated(
            lambda *a: (reference.glu if gated else reference.activation)(*a, kind), [t.double() for t in inputs]
        )
        functions = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu2": lambda x: F.relu(x).square()}
        phi = functions.get(kind, lambda x: F.gelu(x, approximate="tanh"))
        plain = differentiated(lambda x, *up: phi(x) * up[0] if up else phi(x), inputs)
        fwd, bwd, bwd_ = (ops.glu_fwd, ops.glu_bwd, ops.glu_bwd_) if gated else (ops.act_fwd, ops.act_bwd, ops.act_bwd_)
        act = fwd(*inputs, kind)
        made = bwd(dact, *inputs, kind)
        for name, got, ref, want in zip(("act", "dgate", "dup"), (act, *made[1:]), plain, truth, strict=False):
            assert_close_to_truth(got, ref, want, what=f"{kind}: {name}")
        assert torch.equal(made[0], act)
        over = [dact, *inputs]
        bwd_(*over, kind)
        assert all(torch.equal(a, b) for a, b in zip(over, made, strict=True))

    @pytest.mark.parametrize("kind", MLPS)
    def test_in_place_and_odd_sizes(self, kind):
        for size in (1, 7, 8, 4096, 8193):
            x, up = randn(size, dtype=torch.float16), randn(size, dtype=torch.float16)
            want = ops.glu_fwd(x, up, kind) if kind in GATED_MLPS else ops.act_fwd(x, kind)
            if kind in GATED_MLPS:
                ops.glu_fwd_(x, up, kind)
            else:
                ops.act_fwd_(x, kind)
            assert torch.equal(x, want)

    @pytest.mark.parametrize("kind", MLPS)
    def test_not_a_number_is_passed_on(self, kind):
        x = torch.full((3,), float("nan"), device=DEVICE)
        act, *grads = ops.glu_bwd(x, x, x, kind) if kind in GATED_MLPS else ops.act_bwd(x, x, kind)
        assert all(t.isnan().all() for t in (act, *grads))

    def test_layouts_that_are_no_rows_are_copied_or_refused(self):
        x = randn(6, 4).t()
        assert torch.equal(ops.act_fwd(x, "relu2"), x.clamp_min(0).square())
        with pytest.raises(RuntimeError, match="x is written in place; expected rows that are equally far apart"):
            ops.act_fwd_(x, "relu2")


class TestBounds:
    """What lies around the rows that are written stays as it was."""

    @pytest.mark.parametrize("width", [8, 72, 1000, 1001, 4096])
    @pytest.mark.parametrize("op", ["rms_norm_bwd_add_", "glu_bwd_", "dropout_"])
    def test_nothing_else_is_written(self, op, width):
        for left in (8, 3):
            base = randn(7, left + width + 5, dtype=torch.bfloat16)
            before, inside = base.clone(), base[1:6, left : left + width]
            x, y = randn(2, 5, width, dtype=torch.bfloat16)
            if op == "rms_norm_bwd_add_":
                ops.rms_norm_bwd_add_(x, y, None, ops.rms_norm_fwd(y, None, EPS)[1], inside, True)
            elif op == "glu_bwd_":
                ops.glu_bwd_(x, inside, y, "swiglu")
            else:
                ops.dropout_(x, y, inside, 0.5, 1, 2)
            assert not torch.equal(inside, before[1:6, left : left + width])
            inside.copy_(before[1:6, left : left + width])
            assert torch.equal(base, before)


# --- RoPE and dropout ---------------------------------------------------------------------------------------


class TestRope:
    @LOW
    @pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
    @pytest.mark.parametrize(("dim", "rotary"), [(128, 128), (80, 80), (64, 32), (6, 2), (10, 6), (24, 12)])
    def test_against_the_formula(self, dim, rotary, interleaved, dtype):
        x, positions = randn(2, 7, 5, dim, dtype=dtype), torch.arange(7, device=DEVICE)
        tables = rope_tables(positions, rotary, 1e4)
        got = ops.rope(x, *tables, False, interleaved)

        def formula(x: Tensor) -> Tensor:
            return reference.rope(x, positions.cpu(), 1e4, rotary, interleaved)

        plain = formula(x.float().cpu()).to(dtype)
        assert_close_to_truth(got.cpu(), plain, formula(x.double().cpu()))
        assert torch.equal(got[..., rotary:], x[..., rotary:])

    @pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("heads", "kv_heads", "offset"), [(4, 4, 0), (7, 2, 0), (3, 1, 1)])
    def test_in_place_in_one_projection(self, heads, kv_heads, offset, dtype, interleaved):
        """q and k as parts of one product, in one launch: the bits of two; and what is between them is left alone."""
        dim, tokens = 32, 37
        qkv = randn(tokens, (heads + kv_heads + 1) * dim + offset, dtype=dtype)
        before = qkv.clone()

        def cut(t: Tensor) -> tuple[Tensor, Tensor]:
            q, k, _ = t[:, offset:].split([heads * dim, kv_heads * dim, dim], 1)
            return q.unflatten(1, (heads, dim)), k.unflatten(1, (kv_heads, dim))

        tables = rope_tables(torch.arange(tokens, device=DEVICE), dim, 1e4)
        want = [ops.rope(t.contiguous(), *tables, False, interleaved) for t in cut(before)]
        ops.rope_qk_(*cut(qkv), *tables, False, interleaved)
        assert all(torch.equal(a, b) for a, b in zip(cut(qkv), want, strict=True))
        assert torch.equal(qkv[:, -dim:], before[:, -dim:])
        for t in cut(qkv):
            ops.rope_(t, *tables, True, interleaved)
        for got, was in zip(cut(qkv), cut(before), strict=True):
            assert_close_to_truth(got, got, was.double(), factor=1.0, what="there and back")

    def test_one_table_for_every_sequence_and_tables_of_their_own(self):
        x = randn(3, 5, 2, 8)
        shared = rope_tables(torch.arange(5, device=DEVICE), 8, 1e4)
        each = [t.expand(3, 5, 4) for t in shared]
        column = [t[:1] for t in shared]  # (1, r/2): the same for all
        assert torch.equal(ops.rope(x, *shared, False, False), ops.rope(x, *each, False, False))
        assert torch.equal(
            ops.rope(x, *column, False, False), ops.rope(x, *(t.expand(5, 4) for t in column), False, False)
        )

    def test_float64_with_positions_of_each_sequence_goes_to_another_backend(self):
        x = randn(2, 5, 3, 8, dtype=torch.float64)
        tables = rope_tables(torch.arange(10, device=DEVICE).view(2, 5), 8, 1e4, dtype=torch.float64)
        want = torch.stack([ops.rope(x[i], *(t[i] for t in tables), False, False) for i in range(2)])
        assert torch.equal(ops.rope(x, *tables, False, False), want)

    @pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8), (2, 0, 4, 8)])
    def test_nothing(self, shape):
        x = randn(*shape)
        tables = rope_tables(torch.arange(shape[-3], device=DEVICE), 8, 1e4)
        assert ops.rope(x, *tables, False, False).shape == shape


class TestDropout:
    @LOW
    @LAYOUTS
    @pytest.mark.parametrize("width", [1, 64, 1031, 4096])
    def test_keeps_what_pytorch_keeps(self, width, layout, dtype):
        seed, first, rate, rows = 2**41 + 3, 2**32 - 7, 0.2, 9
        x = laid_out((rows, width), dtype, layout)
        keep = philox.kept_rows(rate, seed, (first, first + rows), width, x.device)
        for out_dtype in {dtype, torch.float32}:
            residual, out = (laid_out((rows, width), out_dtype, layout) for _ in range(2))
            ops.dropout_(x, residual, out, rate, seed, first)
            assert torch.equal(out[~keep], residual[~keep])
            wanted = residual.double() + x.double() * keep / (1 - rate)
            plain = residual.float() + x.float() * keep * (1 / (1 - rate))
            assert_close_to_truth(out, plain.to(out_dtype), wanted)
        left = keep & (x != 0)  # torch.randn draws a zero once in 2^24 numbers
        ops.dropout_(x, None, x, rate, seed, first)
        assert torch.equal(x != 0, left)

    def test_the_same_bits_as_the_other_backends(self, monkeypatch):
        x, residual = randn(5, 300, dtype=torch.float16), randn(5, 300, dtype=torch.float16)
        outs = []
        for backend in ("cuda", "triton", "torch"):
            monkeypatch.setenv("PYCKPT_BACKEND", backend)
            out = torch.empty_like(x)
            ops.dropout_(x, residual, out, 0.3, 17, 5)
            outs.append(out)
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


# --- beside attention ---------------------------------------------------------------------------------------


class TestAttention:
    @LOW
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize(
        ("tokens", "heads", "dim"), [(1, 1, 1), (37, 3, 64), (5, 2, 128), (70, 1, 20), (3, 2, 640)]
    )
    def test_delta(self, tokens, heads, dim, packed, dtype):
        lead = (tokens,) if packed else (2, tokens)
        do = randn(*lead, heads, dim, dtype=dtype)
        o = randn(*lead, 2 * heads, dim, dtype=dtype)[..., heads:, :]
        dlse = randn(*lead[:-1], heads, tokens)
        for upstream in (None, dlse):
            want = attention_torch.delta_of(do.double(), o.double(), None if upstream is None else upstream.double())
            plain = attention_torch.delta_of(do, o, upstream)
            got = ops.attention_delta(do, o, upstream)
            assert_close_to_truth(got, plain, want, terms=dim**0.5)

    @LOW
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 1), (37, 3, 64), (5, 2, 128), (3, 2, 20), (3, 2, 640)])
    def test_merge(self, tokens, heads, dim, packed, dtype):
        lead = (tokens,) if packed else (2, tokens)
        for out_dtype in {dtype, torch.float32}:
            part_o = randn(*lead, heads, dim, dtype=dtype)
            o = randn(*lead, 2 * heads, dim, dtype=out_dtype)[..., heads:, :]
            lse, part_lse = (randn(*lead[:-1], heads, tokens) * 5 for _ in range(2))
            lse[..., 0, 0], o[..., 0, 0, :] = float("-inf"), 0.0
            want_o, want_lse = reference.merge(*(t.double() for t in (o, lse, part_o, part_lse)))
            plain = reference.merge(o.float(), lse, part_o.float(), part_lse)[0].to(out_dtype)
            ops.attention_merge_(o, lse, part_o, part_lse)
            assert_close_to_truth(o, plain, want_o)
            assert_close_to_truth(lse, want_lse.float(), want_lse, terms=5.0)

    def test_a_running_lse_with_gaps_goes_to_another_backend(self):
        """As that of some of the queries is."""
        part_o, part_lse = randn(2, 5, 3, 16), randn(2, 3, 5)
        o, lse = randn(2, 5, 3, 16), randn(2, 3, 9)
        want_o, want_lse = o.clone(), lse[..., :5].contiguous()
        ops.attention_merge_(want_o, want_lse, part_o, part_lse)
        ops.attention_merge_(o, lse[..., :5], part_o, part_lse)
        assert (o - want_o).abs().max() < 1e-5 and (lse[..., :5] - want_lse).abs().max() < 1e-5


# --- loss ---------------------------------------------------------------------------------------------------


class TestLoss:
    """The kernel by itself: over logits, in place. Around it are products, the same for every backend."""

    PLAIN = (0.0, 0.0, 0.0)

    @LOW
    @pytest.mark.parametrize("options", [PLAIN, (5.0, 1e-2, 0.1), (0.0, 0.0, 0.2)])
    @pytest.mark.parametrize("vocab", [1, 7, 2048, 6151])
    def test_against_the_formula(self, vocab, options, dtype):
        softcap, z_loss, smoothing = options
        padded = -(-vocab // 8) * 8
        rows = randn(5, padded, dtype=dtype)
        rows[:, vocab:] = float("nan")  # not read, not written
        logits = rows[:, :vocab]
        target = torch.randint(0, vocab, (5,), device=DEVICE)
        target[2] = -100
        logits[2] = float("nan")  # whatever an ignored token's logits hold
        upstream, bias = randn(5), randn(vocab, dtype=dtype)

        def formula(z: Tensor) -> tuple[Tensor, Tensor]:
            """The losses, and the gradient of z."""
            z = z.detach().requires_grad_()
            eye = torch.eye(vocab, dtype=z.dtype, device=DEVICE)
            losses = reference.linear_cross_entropy(
                z,
                eye,
                target,
                bias=bias.to(z.dtype),
                reduction="none",
                softcap=softcap,
                z_loss=z_loss,
                label_smoothing=smoothing,
            )
            return losses.detach(), torch.autograd.grad(losses, z, upstream.to(z.dtype))[0]

        clean = logits.clone()
        clean[2] = 0.0
        want_loss, want = formula(clean.double())
        plain_loss, plain = formula(clean.float())
        loss, lse = torch.full((2, 5), float("nan"), device=DEVICE)
        run = torch.ops.pyckpt_cuda.cross_entropy_
        run(logits, bias, target, upstream, loss, lse, -100, *options, True)
        assert_close_to_truth(loss, plain_loss, want_loss, terms=5.0)
        assert_close_to_truth(logits, plain.to(dtype), want, terms=0.1)
        assert (logits[2] == 0).all() and lse[2] == loss[2] == 0
        assert rows[:, vocab:].isnan().all()
        again, lse_was = clean.clone(), lse.clone()
        run(again, bias, target, upstream, None, lse, -100, *options, True)  # from lse alone
        assert torch.equal(lse, lse_was)
        if again.data_ptr() % 16 == 0 and vocab % 8 == 0:
            assert torch.equal(again, logits)
        else:
            assert_close_to_truth(again, logits, want, terms=0.1)

    def test_loss_alone_leaves_the_logits(self):
        logits, target = randn(3, 1000, dtype=torch.bfloat16), torch.tensor([1, 999, 0], device=DEVICE)
        before = logits.clone()
        loss, lse = torch.empty(2, 3, device=DEVICE)
        torch.ops.pyckpt_cuda.cross_entropy_(logits, None, target, None, loss, lse, -100, *self.PLAIN, False)
        assert torch.equal(logits, before)
        assert (loss - F.cross_entropy(before.double(), target, reduction="none")).abs().max() < 1e-4

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_shows(self, value):
        logits, target = randn(2, 100), torch.tensor([0, 1], device=DEVICE)
        logits[0, 55] = value
        loss, lse = torch.empty(2, 2, device=DEVICE)
        torch.ops.pyckpt_cuda.cross_entropy_(logits, None, target, None, loss, lse, -100, *self.PLAIN, True)
        assert loss[0].isnan() or loss[0].isinf()
        assert loss[1].isfinite() and logits[1].isfinite().all()

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_a_logit_of_minus_infinity_is_a_word_that_is_none(self, smoothing):
        """Padding of the vocabulary. Smoothing asks for all words, so that none with it may be impossible."""
        logits, target = randn(3, 100), torch.tensor([0, 1, 2], device=DEVICE)
        logits[:, 90:] = -torch.inf
        want = F.cross_entropy(logits[:, :90].double(), target, reduction="none")
        loss, lse = torch.empty(2, 3, device=DEVICE)
        torch.ops.pyckpt_cuda.cross_entropy_(logits, None, target, None, loss, lse, -100, 0.0, 0.0, smoothing, True)
        if smoothing:
            assert (loss == torch.inf).all()
        else:
            assert (loss - want).abs().max() < 1e-5
            assert logits.isfinite().all() and (logits[:, 90:] == 0).all()

    def test_a_label_that_nobody_checked(self):
        x, w = randn(4, 6), randn(7, 6)
        for bad in (7, -1, 2**40):
            target = torch.tensor([1, bad, 3, 0], device=DEVICE)
            options = (-100, 0.0, 0.0, 0.0)
            loss = ops.linear_cross_entropy_fwd(x, w, None, target, *options, None, "none", False, False, False)[0]
            assert loss.isnan().tolist() == [False, True, False, False]

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_the_whole_op(self, reduction):
        target = torch.randint(0, 99, (33,), device=DEVICE)
        target[5] = -100
        options = {"softcap": 5.0, "z_loss": 1e-2, "label_smoothing": 0.1, "reduction": reduction}
        inputs = {"x": randn(33, 24), "weight": randn(99, 24) / 5, "bias": randn(99)}

        def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return pyckpt.linear_cross_entropy(x, w, target, bias=b, **options)

        def formula(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return reference.linear_cross_entropy(x, w, target, bias=b, **options)

        check_truth(ours, formula, formula, inputs, terms_of={"dx": 1.0, "dweight": 1.0, "dbias": 1.0, "out 0": 10.0})


# --- all of it ----------------------------------------------------------------------------------------------


class TestBlock:
    """The whole block on the extension's kernels, where it has them."""

    @pytest.mark.parametrize("name", ["llama", "gpt2-like", "qk_norm"])
    def test_parity(self, name):
        options = OPTIONS[name]
        block = make_block(**options).to(DEVICE)
        x = make_input(False)[0].to(DEVICE)
        dy = torch.randn_like(x)
        truth = step(plain_twin(block, torch.float64, **options).to(DEVICE), x, dy)
        plain = step(plain_twin(block, torch.float32, **options).to(DEVICE), x.float(), dy.float())
        got = step(block.float(), x.float(), dy.float())
        assert_as_good(got, plain, truth, torch.float32)

    @pytest.mark.parametrize("name", ["llama", "gpt2-like", "qk_norm"])
    def test_autocast(self, name):
        block, x = make_block(torch.float32, **OPTIONS[name]).to(DEVICE), make_input(False)[0].float().to(DEVICE)
        dy = torch.randn_like(x)
        truth = step(plain_twin(block, torch.float64, **OPTIONS[name]).to(DEVICE), x.double(), dy.double())
        with torch.autocast(DEVICE, torch.bfloat16):
            plain = step(plain_twin(block, torch.float32, **OPTIONS[name]).to(DEVICE), x, dy)
            got = step(block, x, dy)
        assert_as_good(got, plain, truth, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
class TestOnTheDevice:
    """What an emulator cannot show."""

    @pytest.mark.parametrize("op", ["rms_norm", "glu", "dropout", "rope"])
    def test_more_than_31_bits_of_elements(self, op):
        """The last rows of a tensor of more than 2^31 values are what they are alone."""
        width, rows = 1 << 14, (1 << 17) + 3
        if torch.cuda.mem_get_info()[0] < 5 * 2 * width * rows:
            pytest.skip("needs 22 GB of free memory")
        x = torch.randn(rows, width, dtype=torch.bfloat16, device=DEVICE)
        last = x[-5:].clone()
        if op == "rms_norm":
            got, want = ops.rms_norm_fwd(x, None, EPS)[0], ops.rms_norm_fwd(last, None, EPS)[0]
        elif op == "glu":
            got, want = ops.glu_fwd(x, x, "swiglu"), ops.glu_fwd(last, last, "swiglu")
        elif op == "dropout":
            got, want = x, last.clone()
            ops.dropout_(last, None, want, 0.5, 3, rows - 5)
            ops.dropout_(x, None, x, 0.5, 3, 0)
        else:
            cos, sin = rope_tables(torch.arange(rows, device=DEVICE), 128, 1e4)
            want = ops.rope(last.view(5, -1, 128), cos[-5:], sin[-5:], False, False).view(5, -1)
            got = ops.rope(x.view(rows, -1, 128), cos, sin, False, False).view(rows, -1)
        assert torch.equal(got[-5:], want)

    @pytest.mark.parametrize(("width", "dtype"), [(6144, "bfloat16"), (3072, "float32")])
    @NORMS
    def test_a_row_for_which_48_kib_are_shared(self, kind, width, dtype):
        """What goes without asking for more is less than that; in a process of its own, where nothing wider asked."""
        weights = "x[0]" if kind == "rms" else "x[0], x[1]"
        code = (
            f"import torch, pyckpt; x = torch.randn(9, {width}, device='cuda', dtype=torch.{dtype}).requires_grad_()\n"
            f"pyckpt.{kind}_norm(x, {weights}).sum().backward(); torch.cuda.synchronize()\n"
            f"assert x.grad.isfinite().all()"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_captured_in_a_graph(self):
        x, w = randn(64, 1024, dtype=torch.bfloat16), randn(1024)
        ops.rms_norm_fwd(x, w, EPS)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, rstd = ops.rms_norm_fwd(x, w, EPS)
            dx, dw = ops.rms_norm_bwd(x, x, w, rstd, True)
        x.normal_()
        graph.replay()
        again = ops.rms_norm_fwd(x, w, EPS)
        assert torch.equal(y, again[0])
        assert all(torch.equal(a, b) for a, b in zip((dx, dw), ops.rms_norm_bwd(x, x, w, again[1], True), strict=True))

    def test_on_a_stream_of_its_own(self):
        x = randn(4096, 4096)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            y = x * 2
            got = ops.act_fwd(y, "relu2")
        stream.synchronize()
        assert torch.equal(got, (x * 2).clamp_min(0).square())

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
    def test_on_a_device_that_is_not_current(self):
        x = torch.randn(5, 64, device="cuda:1")
        got = ops.act_fwd(x, "relu2")
        assert torch.cuda.current_device() == 0
        assert torch.equal(got, x.clamp_min(0).square())


@pytest.mark.skipif(GPU, reason="of the emulator")
class TestErrors:
    """Of the CUDA runtime."""

    @pytest.fixture
    def emulate(self) -> Iterator[Any]:
        """A function that has all launches end in an error."""
        function = ctypes.CDLL(sys.modules[cuda_backend.MODULE].__file__).pyckpt_emulate_error
        cuda_backend._runs_on.cache_clear()
        yield function
        function(0)
        cuda_backend._runs_on.cache_clear()

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (209, r'built for emulated, and cuda:-?\d is sm_99: build them again with TORCH_CUDA_ARCH_LIST="9.9"'),
            (98, r"built for emulated, and cuda:-?\d is sm_99"),
            (222, r"built for emulated, and cuda:-?\d is sm_99"),
            (
                35,
                r"built with CUDA \d+\.\d, which cuda:-?\d cannot be used with .*: build them again with the CUDA that",
            ),
        ],
        ids=["no code", "no function", "newer PTX", "older driver"],
    )
    def test_a_device_it_was_not_built_for_has_other_kernels(self, emulate, error, said):
        """With one warning, also where this backend is forced: as one that cannot run on a type of device."""
        x, w, target = randn(5, 8), randn(9, 8), torch.randint(0, 9, (5,))
        options = (-100, 0.0, 0.0, 0.0, None, "none", True, True, False)

        def run() -> list[Tensor]:
            y = x.clone()
            ops.act_fwd_(y, "gelu")
            return [y, *ops.rms_norm_fwd(x, None, EPS), *ops.linear_cross_entropy_fwd(x, w, None, target, *options)]

        want = run()
        cuda_backend._runs_on.cache_clear()
        emulate(error)
        with pytest.warns(UserWarning, match=said) as told:
            got = [*run(), *run()]
        assert sum(issubclass(w.category, UserWarning) for w in told) == 1  # Triton 3.6 has some of its own
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(got, [*want, *want], strict=True) if b.numel())
        with pytest.raises(RuntimeError, match=said):
            torch.ops.pyckpt_cuda.act_fwd(x, "gelu")

    def test_the_doctor_tells_of_such_a_device(self, emulate, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(cuda_backend, "problem", "")  # it came when this was imported already
        assert "build them again" not in dict(doctor._settings())["CUDA extension"]
        emulate(209)
        assert "build them again with TORCH_CUDA_ARCH_LIST" in dict(doctor._settings())["CUDA extension"]

    @pytest.mark.filterwarnings("error")
    def test_an_error_of_an_earlier_kernel_is_not_called_this_ones(self, emulate):
        """As that of a label or a token that is none has it, which shows in whatever is launched next."""
        emulate(710)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"an earlier kernel's error, pyckpt's or not, may show here"):
                ops.act_fwd(randn(3), "gelu")

    def test_an_extension_of_other_sources_is_not_used(self, monkeypatch):
        monkeypatch.delattr(sys.modules[cuda_backend.MODULE], "problem_on")
        assert cuda_backend.register().startswith("it was built from other sources")


class TestBadInput:
    """Said by the extension itself: what `pyckpt.functional` checks before is not asked again here."""

    def test_named(self):
        raw, x = torch.ops.pyckpt_cuda, randn(3, 8)
        for message, call in {
            "up has shape \\(3, 7\\); expected that of gate, \\(3, 8\\)": lambda: raw.glu_fwd(x, randn(3, 7), "swiglu"),
            "up has another dtype than gate": lambda: raw.glu_fwd(x, x.half(), "swiglu"),
            "kind is 'tanh'; expected swiglu": lambda: raw.act_fwd(x, "tanh"),
            "x has a dtype that the CUDA kernels do not take": lambda: raw.act_fwd(x.double(), "gelu"),
            "weight has shape \\(7\\); expected \\(8\\)": lambda: raw.rms_norm_fwd(x, randn(7), EPS),
            "residual has shape": lambda: raw.add_rms_norm_fwd(x, randn(4, 8), None, EPS),
            "rstd has shape \\(2\\); expected one float32 for each row": lambda: raw.rms_norm_bwd(
                x, x, None, randn(2), False
            ),
            "cos has shape \\(3, 5\\); expected \\(..., r/2\\)": lambda: raw.rope(
                x.view(3, 1, 8), randn(3, 5), randn(3, 5), False, False
            ),
            "sin has shape \\(3, 2\\)": lambda: raw.rope(x.view(3, 1, 8), randn(3, 4), randn(3, 2), False, False),
            "k has shape \\(2, 1, 8\\); expected the tokens": lambda: raw.rope_qk_(
                x.view(3, 1, 8), randn(2, 1, 8), randn(3, 4), randn(3, 4), False, False
            ),
            "rate is 1; expected at least 0 and less than 1": lambda: raw.dropout_(x, None, x, 1.0, 0, 0),
            "residual has another dtype than out": lambda: raw.dropout_(x, x.half(), x, 0.5, 0, 0),
            "o has shape \\(3, 8\\); expected \\(B, S, H, D\\)": lambda: raw.attention_delta(x, x, None),
            "lse has shape \\(3\\); expected float32 \\(B, H, S\\)": lambda: raw.attention_merge_(
                x.view(3, 1, 8), randn(3), x.view(3, 1, 8), randn(1, 3)
            ),
            "target has shape \\(2\\); expected int64 \\(3\\)": lambda: raw.cross_entropy_(
                x,
                None,
                torch.zeros(2, dtype=torch.long, device=DEVICE),
                None,
                None,
                randn(3),
                -100,
                0.0,
                0.0,
                0.0,
                True,
            ),
            "x has no dimension": lambda: raw.rms_norm_fwd(randn(), None, EPS),
        }.items():
            with pytest.raises(RuntimeError, match=message):
                call()
