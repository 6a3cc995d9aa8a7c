"""RMSNorm and LayerNorm against their references and PyTorch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LOW_DTYPES, a_few, assert_exact, check_exact, check_truth, step
from torch import Tensor, nn

import pyckpt
from pyckpt.ops import chunks, reference

ops = torch.ops.pyckpt
EPS = 1e-3

# Ours, the reference, PyTorch's, and which parameters they take.
NORMS: dict[str, tuple[Any, Any, Any, tuple[str, ...]]] = {
    "rms": (pyckpt.rms_norm, reference.rms_norm, F.rms_norm, ("weight",)),
    "layer": (pyckpt.layer_norm, reference.layer_norm, F.layer_norm, ("weight", "bias")),
}
# Which of the parameters are given.
CASES = [
    ("rms", "weight"),
    ("rms", ""),
    ("layer", "weight bias"),
    ("layer", "weight"),
    ("layer", "bias"),
    ("layer", ""),
]
ALL_CASES = pytest.mark.parametrize(("norm", "given"), CASES, ids=["-".join(c).strip("-") for c in CASES])
SHAPES = [(1, 1), (1, 7), (5, 1), (239, 3), (113, 203), (2, 3, 5), (4, 3, 2, 8), (6,)]


@pytest.fixture(params=["one-chunk", "many-chunks", "triton"])
def chunking(request, monkeypatch) -> None:
    if request.param == "triton":
        monkeypatch.setenv("PYCKPT_BACKEND", "triton")
    if request.param == "many-chunks":
        monkeypatch.setattr(chunks, "_CPU_CHUNK_ELEMENTS", 20)


def functions(norm: str, given: str) -> tuple[Any, Any, Any]:
    """Ours, the reference and PyTorch's as functions of x and the parameters that are given."""
    mine, truth, plain, _ = NORMS[norm]
    names = given.split()

    def with_names(fn: Any) -> Any:
        return lambda x, *params: fn(x, eps=EPS, **dict(zip(names, params, strict=True)))

    def torch_fn(x: Tensor, *params: Tensor) -> Tensor:
        return plain(x, x.shape[-1:], eps=EPS, **dict(zip(names, params, strict=True)))

    return with_names(mine), with_names(truth), torch_fn


def make(shape: tuple[int, ...], given: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    inputs = {"x": torch.randn(shape, dtype=dtype) * 2 + 0.5}
    return inputs | {n: torch.randn(shape[-1], dtype=dtype) for n in given.split()}


class TestExact:
    @ALL_CASES
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shapes(self, shape, norm, given, chunking):
        mine, truth, _ = functions(norm, given)
        check_exact(mine, truth, make(shape, given), terms=10.0)

    @ALL_CASES
    def test_layouts(self, norm, given, chunking):
        mine, truth, _ = functions(norm, given)
        params = {n: t for n, t in make((1, 6), given).items() if n != "x"}
        base = torch.randn(5, 6, 4, dtype=torch.float64)
        layouts = (
            base.transpose(1, 2),
            base.permute(2, 0, 1)[..., :6],
            base[:, :, :1].mT.expand(5, 3, 6),
            torch.randn(9, 24, dtype=torch.float64)[::2, 1:13:2],
        )
        for x in layouts:
            assert x.shape[-1] in (5, 6)
            here = {n: t[: x.shape[-1]].flip(0) for n, t in params.items()}
            check_exact(mine, truth, {"x": x, **here}, terms=10.0)

    @ALL_CASES
    def test_upstream_gradients_that_are_not_contiguous(self, norm, given, chunking):
        mine, truth, _ = functions(norm, given)
        inputs = make((7, 5), given)
        for dy in (torch.randn(5, 7, dtype=torch.float64).t(), torch.ones((), dtype=torch.float64).expand(7, 5)):
            want, _ = step(truth, inputs, [dy])
            got, _ = step(mine, inputs, [dy])
            for name in want:
                assert_exact(got[name], want[name], name, terms=10.0)

    @pytest.mark.parametrize("need_dw", [False, True])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_added_to_a_residual_gradient(self, weighted, need_dw, chunking):
        """The in-place forms add dx to what is there, and the rest is as in the others."""
        x, dy = (torch.randn(3, 4, 6, dtype=torch.float64) for _ in range(2))
        residual = torch.randn_like(x)
        weight = torch.randn(6, dtype=torch.float64) if weighted else None
        _, rstd = ops.rms_norm_fwd(x, weight, EPS)
        dx, dw = ops.rms_norm_bwd(dy, x, weight, rstd, need_dw)
        total = residual.clone()
        dw_too = ops.rms_norm_bwd_add_(dy, x, weight, rstd, total, need_dw)
        assert_exact(total, residual + dx)
        assert torch.equal(dw, dw_too)
        assert dw.shape == ((6,) if need_dw else (0,))
        _, mean, rstd = ops.layer_norm_fwd(x, weight, None, EPS)
        dx, *dparams = ops.layer_norm_bwd(dy, x, weight, mean, rstd, need_dw)
        total = residual.clone()
        dparams_too = ops.layer_norm_bwd_add_(dy, x, weight, mean, rstd, total, need_dw)
        assert_exact(total, residual + dx)
        for a, b in zip(dparams, dparams_too, strict=True):
            assert torch.equal(a, b)
            assert a.shape == ((6,) if need_dw else (0,))

    def test_statistics(self):
        x = torch.randn(4, 9, dtype=torch.float64)
        assert_exact(ops.rms_norm_fwd(x, None, EPS)[1], (x.square().mean(-1) + EPS).rsqrt())
        _, mean, rstd = ops.layer_norm_fwd(x, None, None, EPS)
        assert_exact(mean, x.mean(-1))
        assert_exact(rstd, (x.var(-1, correction=0) + EPS).rsqrt())

    def test_a_row_of_zeros(self):
        for norm in NORMS:
            mine, truth, _ = functions(norm, "weight")
            inputs = make((3, 5), "weight")
            inputs["x"][1] = 0.0
            check_exact(mine, truth, inputs, terms=100.0)


@pytest.mark.usefixtures("backend")
class TestPrecision:
    @ALL_CASES
    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    @pytest.mark.parametrize("shape", a_few([(1, 64), (239, 16), (113, 203), (2, 700, 48)], always=(0, 2)), ids=str)
    def test_against_pytorch(self, shape, dtype, norm, given):
        mine, truth, plain = functions(norm, given)
        check_truth(mine, plain, truth, make(shape, given, dtype), terms=1.0)

    @pytest.mark.parametrize("norm", NORMS)
    def test_mixed_dtypes(self, norm):
        """bf16 activations with float32 parameters: y and dx in bf16, the parameters' gradients unrounded."""
        mine, truth, _ = functions(norm, " ".join(NORMS[norm][3]))
        inputs = make((300, 16), " ".join(NORMS[norm][3]), torch.float32)
        inputs["x"] = inputs["x"].bfloat16()
        want, douts = step(truth, {n: t.double() for n, t in inputs.items()})
        douts = [d.bfloat16() for d in douts]
        want, _ = step(truth, {n: t.double() for n, t in inputs.items()}, douts)
        got, _ = step(mine, inputs, douts)
        assert got["out 0"].dtype == got["dx"].dtype == torch.bfloat16
        for name in NORMS[norm][3]:
            assert got[f"d{name}"].dtype == torch.float32
            assert (got[f"d{name}"] - want[f"d{name}"]).abs().max() < 1e-5 * want[f"d{name}"].abs().max()

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("layout", ["dense", "transposed", "strided"])
    def test_long_rows_in_any_layout(self, layout, norm):
        """Their sums are no less exact than PyTorch's."""
        wide = 65536
        x = {
            "dense": lambda: torch.randn(4, wide),
            "transposed": lambda: torch.randn(wide, 4).t(),
            "strided": lambda: torch.randn(4, 2 * wide)[:, ::2],
        }[layout]()
        mine, truth, plain = functions(norm, "weight")
        check_truth(mine, plain, truth, {"x": x, "weight": torch.randn(wide)})

    @pytest.mark.parametrize("norm", NORMS)
    def test_large_and_small_values(self, norm):
        """Squares of float16 and bfloat16 values fit in float32, in which they are summed."""
        mine, truth, _ = functions(norm, "")
        for dtype, size in ((torch.float16, 3e4), (torch.bfloat16, 1e15), (torch.bfloat16, 1e-3)):
            x = (torch.randn(8, 64) * size / 4).to(dtype)
            want = truth(x.double())
            assert (mine(x).double() - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()


def added(norm: str, given: str, which: str) -> tuple[Any, Any, Any]:
    """Ours, the reference's and PyTorch's of (x, residual, ...): the norm, the sum, or both."""

    def pick(both: tuple[Tensor, Tensor]) -> Any:
        return {"y": both[0], "total": both[1], "both": both}[which]

    def fused(x: Tensor, residual: Tensor, *vectors: Tensor) -> Any:
        named = dict(zip(given.split(), vectors, strict=True))
        fn = pyckpt.rms_norm if norm == "rms" else pyckpt.layer_norm
        return pick(fn(x, **named, eps=EPS, residual=residual))

    def apart(fn: Any) -> Any:
        return lambda x, residual, *vectors: pick((fn(x + residual, *vectors), x + residual))

    _, truth, plain = functions(norm, given)
    return fused, apart(truth), apart(plain)


@pytest.mark.usefixtures("backend")
class TestResidual:
    @ALL_CASES
    @pytest.mark.parametrize("which", ["y", "total", "both"])
    @pytest.mark.parametrize("shape", [(5, 7), (2, 3, 33)], ids=str)
    def test_exact(self, shape, which, norm, given):
        inputs = make(shape, given)
        inputs = {"x": inputs.pop("x"), "residual": torch.randn(shape, dtype=torch.float64), **inputs}
        if which == "total":
            inputs = {n: inputs[n] for n in ("x", "residual")}
            given = ""
        check_exact(*added(norm, given, which)[:2], inputs)

    @ALL_CASES
    @pytest.mark.parametrize("dtype", a_few(LOW_DTYPES, always=(0, 1)))
    def test_against_pytorch(self, dtype, norm, given):
        inputs = make((113, 203), given, dtype)
        inputs = {"x": inputs.pop("x"), "residual": torch.randn(113, 203).to(dtype), **inputs}
        mine, truth, plain = added(norm, given, "both")
        check_truth(mine, plain, truth, inputs)

    def test_bad_residuals(self):
        x = torch.randn(3, 4)
        for fn in (pyckpt.rms_norm, pyckpt.layer_norm):
            for other in (torch.randn(3, 5), torch.randn(4), x.half(), torch.randn(3, 4, device="meta")):
                with pytest.raises(ValueError, match=r"residual is .* expected x's \(3, 4\) torch.float32 on cpu"):
                    fn(x, residual=other)
            with pytest.raises(TypeError, match=r"residual must be a torch\.Tensor, got list"):
                fn(x, residual=[1.0])


class TestAutograd:
    @pytest.mark.parametrize("norm", NORMS)
    def test_frozen_inputs_get_no_gradient(self, norm):
        names = ("x", *NORMS[norm][3])
        mine, _, _ = functions(norm, " ".join(NORMS[norm][3]))
        inputs = make((6, 5), " ".join(NORMS[norm][3]))
        want, douts = step(mine, inputs)
        for frozen in names:
            leaves = {n: t.clone().requires_grad_(n != frozen) for n, t in inputs.items()}
            mine(*leaves.values()).backward(douts[0])
            for n, t in leaves.items():
                assert t.grad is None if n == frozen else torch.equal(t.grad, want[f"d{n}"])

    @pytest.mark.parametrize("norm", NORMS)
    def test_autocast_changes_nothing(self, norm):
        mine, _, _ = functions(norm, "weight")
        inputs = make((40, 16), "weight", torch.float32)
        want, douts = step(mine, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            got, _ = step(mine, inputs, douts)
        assert all(torch.equal(got[n], want[n]) for n in want)

    @pytest.mark.parametrize("norm", NORMS)
    def test_the_same_bits_every_time(self, norm, unpoisoned):
        mine, _, _ = functions(norm, "weight")
        inputs = make((300, 96), "weight", torch.float32)
        first, douts = step(mine, inputs)
        for _ in range(20):
            again, _ = step(mine, inputs, douts)
            assert all(torch.equal(again[n], first[n]) for n in first)

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled(self, dynamic, norm):
        mine, truth, _ = functions(norm, "weight")
        compiled = torch.compile(
            lambda x, w: mine(x + 1, w).sin(), fullgraph=True, backend="aot_eager", dynamic=dynamic
        )
        for rows in (6, 9) if dynamic else (6,):
            check_exact(compiled, lambda x, w: truth(x + 1, w).sin(), make((rows, 5), "weight"), terms=10.0)

    @pytest.mark.parametrize("residual", [False, True])
    @ALL_CASES
    def test_rows_of_nothing(self, norm, given, residual, chunking):
        mine, _, _ = functions(norm, given)
        inputs = {n: t.requires_grad_() for n, t in make((3, 0), given).items()}
        y = NORMS[norm][0](inputs["x"], residual=torch.randn(3, 0).double())[0] if residual else mine(*inputs.values())
        assert y.shape == (3, 0) and y.dtype == torch.float64
        y.sum().backward()
        assert all(t.grad.shape == t.shape for t in ([inputs["x"]] if residual else inputs.values()))

    @pytest.mark.parametrize("norm", NORMS)
    def test_memory(self, norm, monkeypatch):
        """Kept: x, which was there, and the rows' statistics. Made: y, and chunks."""
        monkeypatch.setattr(chunks, "_CPU_CHUNK_ELEMENTS", 4096)
        mine, _, _ = functions(norm, "weight")
        inputs = [t.requires_grad_() for t in make((4000, 64), "weight", torch.bfloat16).values()]
        with pyckpt.measure.memory() as m:
            y = mine(*inputs)
            statistics = 4000 * 4 * (1 if norm == "rms" else 2)
            assert m.live_bytes == y.nbytes + statistics
            assert m.peak_bytes < y.nbytes + statistics + 8 * 4096 * 4
            assert m.saved_bytes <= inputs[0].nbytes + inputs[1].nbytes + statistics
        with torch.no_grad(), pyckpt.measure.memory() as m:
            y = mine(*inputs)
            assert (m.live_bytes, m.saved_bytes) == (y.nbytes, 0)


class TestBadInput:
    @pytest.mark.parametrize("norm", NORMS)
    def test_values(self, norm):
        fn, x = NORMS[norm][0], torch.randn(3, 4)
        for bad, message in (
            (torch.tensor(1.0), r"x must be \(\.\.\., D\), got a scalar"),
            (torch.ones(3, 4, dtype=torch.int64), "x has dtype torch.int64, expected one of float32"),
        ):
            with pytest.raises(ValueError, match=message):
                fn(bad)
        for name in NORMS[norm][3]:
            with pytest.raises(ValueError, match=rf"{name} has shape \(3,\), expected \(4,\)"):
                fn(x, **{name: torch.randn(3)})
            with pytest.raises(ValueError, match=f"{name} is on meta, x is on cpu"):
                fn(x, **{name: torch.randn(4, device="meta")})
            with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor, got list"):
                fn(x, **{name: [1.0] * 4})
            for dtype in (torch.complex64, torch.int64):
                with pytest.raises(ValueError, match=f"{name} has dtype {dtype}, expected one of float32"):
                    fn(x, **{name: torch.ones(4, dtype=dtype)})
        with pytest.raises(ValueError, match=r"x has layout torch\.jagged, expected a dense tensor"):
            fn(torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged))
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
            fn([1.0])


# --- what users do with it ----------------------------------------------------------------------------------


@ALL_CASES
@pytest.mark.parametrize("residual", [False, True])
def test_the_output_may_be_written_to(norm, given, residual, chunking):
    """As that of PyTorch's own."""
    mine, _, plain = functions(norm, given)
    inputs = make((3, 4, 6), given)
    gradients = []
    for fn, sums in ((mine, residual), (plain, False)):
        x, *params = (t.clone().requires_grad_() for t in inputs.values())
        if sums:
            named = dict(zip(given.split(), params, strict=True))
            y = NORMS[norm][0](x, **named, eps=EPS, residual=torch.ones_like(x))[0]
        else:
            y = fn(x + 1.0 if residual else x, *params)
        y *= 2.0
        y += 1.0
        y.square().sum().backward()
        gradients.append([y.detach(), *(t.grad for t in (x, *params))])
    for got, want in zip(*gradients, strict=True):
        assert_exact(got, want, terms=10.0)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_DTYPES], ids=str)
def test_an_rms_norm_without_eps_is_pytorchs(dtype):
    x = (torch.randn(5, 16, dtype=torch.float64) * 1e-4).to(dtype)  # small: eps counts
    got, want = pyckpt.rms_norm(x, eps=None), F.rms_norm(x, (16,), eps=None)
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps * 4, atol=0)


def test_bad_eps_is_refused():
    x = torch.randn(2, 4)
    for fn in (pyckpt.rms_norm, pyckpt.layer_norm):
        for eps in (True, "1e-5", [1e-5]):
            with pytest.raises(TypeError, match="eps must be a number >= 0, got"):
                fn(x, eps=eps)
        for eps in (-1e-5, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="eps must be a finite number >= 0, got"):
                fn(x, eps=eps)
        for eps in (torch.tensor(1e-5, requires_grad=True), nn.Parameter(torch.tensor([1e-5]))):
            with pytest.raises(ValueError, match=r"eps gets no gradient here: give eps\.detach\(\), or norm by plain"):
                fn(x, eps=eps)
        with pytest.raises(TypeError, match=r"eps must be a number >= 0, got a Tensor of shape \(2,\)"):
            fn(x, eps=torch.ones(2))
        assert torch.equal(fn(x, eps=torch.tensor(0.5)), fn(x, eps=0.5))
        with pytest.raises(ValueError, match="x is a nested tensor, expected a dense one"):
            fn(torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)]))
    with pytest.raises(ValueError, match="eps=None has no meaning for a LayerNorm"):
        pyckpt.layer_norm(x, eps=None)
    assert torch.equal(pyckpt.rms_norm(x, eps=0), pyckpt.rms_norm(x, eps=0.0))


def test_a_compiled_norm_may_be_written_to():
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        y = pyckpt.rms_norm(x, weight, None)
        y += 1.0
        return y.sum()

    x, weight = torch.randn(3, 5), torch.randn(5, requires_grad=True)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), fn(x, weight))
