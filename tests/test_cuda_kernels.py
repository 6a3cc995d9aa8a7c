"""What the CUDA C++ kernels compute: on a GPU with the extension built there, else emulated on a CPU (csrc/emulator.h).

The 2x rule against the float64 references, with PyTorch's own kernels as the measure; odd widths, rows with gaps, and
pointers that no vector fits.
"""

from __future__ import annotations

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
from helpers import assert_close_to_truth, check_truth
from torch import Tensor

import pyckpt
from pyckpt.ops import cuda_backend, reference, registry
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
SHAPES = [(1, 1), (9, 8), (70, 64), (67, 96), (35, 128), (9, 520), (7, 1000), (3, 1024), (5, 1032), (3, 2048)]
SHAPES += [(5, 4096), (3, 5120), (2, 16384), (2, 20000), (11, 33), (5, 4097)]


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
    @LOW
    @pytest.mark.parametrize(("rows", "width"), SHAPES)
    def test_against_pytorch(self, rows, width, dtype, kind):
        ours, formula, plain = norms(kind)
        # A weight's gradient sums over the rows, in another order than PyTorch's; a row's terms may cancel.
        terms = dict.fromkeys(("dweight", "dbias"), rows**0.5) | {"dx": 1.0}
        check_truth(ours, plain, formula, norm_inputs(kind, rows, width, dtype), terms_of=terms)

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


# --- activations --------------------------------------------------------------------------------------------


class TestActivations:
    @LOW
    @LAYOUTS
    @pytest.mark.parametrize("kind", MLPS)
    def test_against_pytorch(self, kind, layout, dtype):
        shape = (5, 1032)
        inputs = [laid_out(shape, dtype, layout) for _ in range(2 if kind in GATED_MLPS else 1)]
        dact = laid_out(shape, dtype, layout)

        def step(fn: Any, tensors: list[Tensor]) -> list[Tensor]:
            leaves = [t.detach().clone().requires_grad_() for t in tensors]
            act = fn(*leaves)
            return [act.detach(), *torch.autograd.grad(act, leaves, dact.to(act.dtype))]

        gated = kind in GATED_MLPS
        truth = step(
            lambda *a: (reference.glu if gated else reference.activation)(*a, kind), [t.double() for t in inputs]
        )
        functions = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu2": lambda x: F.relu(x).square()}
        phi = functions.get(kind, lambda x: F.gelu(x, approximate="tanh"))
        plain = step(lambda x, *up: phi(x) * up[0] if up else phi(x), inputs)
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
            "x has no dimension": lambda: raw.rms_norm_fwd(randn(), None, EPS),
        }.items():
            with pytest.raises(RuntimeError, match=message):
                call()
