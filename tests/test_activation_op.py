"""The MLP's activations against their formulas and PyTorch's functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LOW_DTYPES, a_few, assert_exact, check_exact, check_truth, step
from torch import Tensor

import pyckpt
from pyckpt.ops import chunks, reference
from pyckpt.spec import GATED_MLPS, MLPS, PLAIN_MLPS

ops = torch.ops.pyckpt
ALL_KINDS = pytest.mark.parametrize("kind", MLPS)
SHAPES = [(1, 1), (239, 1), (1, 239), (113, 203), (2, 3, 5), (7,)]
PLAIN_PHI = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


@pytest.fixture(params=["one-chunk", "many-chunks", "triton"])
def chunking(request, monkeypatch) -> None:
    if request.param == "triton":
        monkeypatch.setenv("PYCKPT_BACKEND", "triton")
    if request.param == "many-chunks":
        monkeypatch.setattr(chunks, "_CPU_CHUNK_ELEMENTS", 100)


def functions(kind: str) -> tuple[Any, Any, Any]:
    """Ours, the reference's and PyTorch's, of (gate, up) or x."""
    if kind in GATED_MLPS:
        return (
            lambda gate, up: pyckpt.glu(gate, up, kind),
            lambda gate, up: reference.glu(gate, up, kind),
            lambda gate, up: PLAIN_PHI[kind](gate) * up,
        )
    return (
        lambda x: pyckpt.activation(x, kind),
        lambda x: reference.activation(x, kind),
        PLAIN_PHI[kind],
    )


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    names = ("gate", "up") if kind in GATED_MLPS else ("x",)
    return {n: torch.randn(shape, dtype=dtype) * 2 for n in names}


class TestExact:
    @ALL_KINDS
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shapes(self, shape, kind, chunking):
        check_exact(*functions(kind)[:2], make(kind, shape))

    @ALL_KINDS
    def test_layouts(self, kind, chunking):
        base = torch.randn(4, 12, 10, dtype=torch.float64)
        for gate, up in (
            (base[..., :5], base[..., 5:]),
            (base.transpose(0, 2)[..., :3], base.transpose(0, 2)[..., 1:]),
            (base[:1].expand(4, 12, 10), base),
        ):
            tensors = {"gate": gate, "up": up} if kind in GATED_MLPS else {"x": gate}
            check_exact(*functions(kind)[:2], tensors)

    @ALL_KINDS
    def test_upstream_gradients_that_are_not_contiguous(self, kind, chunking):
        mine, truth, _ = functions(kind)
        inputs = make(kind, (7, 5))
        for dy in (torch.randn(5, 7, dtype=torch.float64).t(), torch.ones((), dtype=torch.float64).expand(7, 5)):
            want, _ = step(truth, inputs, [dy])
            got, _ = step(mine, inputs, [dy])
            for name in want:
                assert_exact(got[name], want[name], name)

    @pytest.mark.parametrize("dtype", [torch.float64, *LOW_DTYPES])
    @ALL_KINDS
    def test_in_place_forms_give_the_same_bits(self, kind, dtype, chunking):
        dact, gate, up = (torch.randn(3, 20, 11).to(dtype) for _ in range(3))
        if kind in GATED_MLPS:
            act = ops.glu_fwd(gate, up, kind)
            outs = ops.glu_bwd(dact, gate, up, kind)
            ops.glu_fwd_(written := gate.clone(), up, kind)
            ops.glu_bwd_(dact, gate, up, kind)
            changed = (dact, gate, up)
        else:
            act = ops.act_fwd(gate, kind)
            outs = ops.act_bwd(dact, gate, kind)
            ops.act_fwd_(written := gate.clone(), kind)
            ops.act_bwd_(dact, gate, kind)
            changed = (dact, gate)
        assert torch.equal(written, act)
        assert torch.equal(outs[0], act)  # made again in the backward
        for out, t in zip(outs, changed, strict=True):
            assert out.data_ptr() != t.data_ptr()
            assert torch.equal(out, t)

    def test_far_values(self):
        x = torch.tensor([-1e4, -30.0, -0.0, 0.0, 30.0, 1e4], dtype=torch.float64)
        for kind in MLPS:
            mine, truth, _ = functions(kind)
            inputs = {"gate": x, "up": x} if kind in GATED_MLPS else {"x": x}
            check_exact(mine, truth, inputs)


@pytest.mark.usefixtures("backend")
class TestPrecision:
    @ALL_KINDS
    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    @pytest.mark.parametrize("shape", a_few([(1, 64), (239, 3), (113, 203)], always=(2,)), ids=str)
    def test_against_pytorch(self, shape, dtype, kind):
        mine, truth, plain = functions(kind)
        check_truth(mine, plain, truth, make(kind, shape, dtype))


class TestAutograd:
    @pytest.mark.parametrize("kind", GATED_MLPS)
    @pytest.mark.parametrize("frozen", ["gate", "up"])
    def test_frozen_inputs_get_no_gradient(self, frozen, kind):
        inputs = make(kind, (6, 5))
        want, douts = step(functions(kind)[0], inputs)
        leaves = {n: t.clone().requires_grad_(n != frozen) for n, t in inputs.items()}
        functions(kind)[0](*leaves.values()).backward(douts[0])
        for n, t in leaves.items():
            assert t.grad is None if n == frozen else torch.equal(t.grad, want[f"d{n}"])

    def test_one_tensor_twice(self):
        check_exact(lambda x: pyckpt.glu(x, x), lambda x: reference.glu(x, x, "swiglu"), make("gelu", (6, 5)))

    @pytest.mark.parametrize("kind", ["swiglu", "relu2"])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled(self, dynamic, kind):
        mine, truth, _ = functions(kind)
        fn = torch.compile(
            lambda *t: mine(*(a + 1 for a in t)).sin(), fullgraph=True, backend="aot_eager", dynamic=dynamic
        )
        for rows in (6, 9) if dynamic else (6,):
            check_exact(fn, lambda *t: truth(*(a + 1 for a in t)).sin(), make(kind, (rows, 5)))

    @ALL_KINDS
    def test_memory(self, kind, monkeypatch):
        """Kept: the pre-activations, which were there. Made: the activation, and chunks."""
        monkeypatch.setattr(chunks, "_CPU_CHUNK_ELEMENTS", 4096)
        inputs = [t.requires_grad_() for t in make(kind, (2000, 256), torch.bfloat16).values()]
        with pyckpt.measure.memory() as m:
            act = functions(kind)[0](*inputs)
            assert m.live_bytes == act.nbytes
            assert m.saved_bytes == sum(t.nbytes for t in inputs)
            assert m.peak_bytes < act.nbytes + 8 * 4096 * 4
        with torch.no_grad(), pyckpt.measure.memory() as m:
            act = functions(kind)[0](*inputs)
            assert (m.live_bytes, m.saved_bytes) == (act.nbytes, 0)
        if kind in GATED_MLPS:
            gate, up = (t.detach() for t in inputs)
            with pyckpt.measure.memory() as m:
                ops.glu_bwd_(torch.empty_like(gate), gate, up, kind)
            assert m.peak_bytes < act.nbytes + 12 * 4096 * 4

    @ALL_KINDS
    def test_the_same_bits_every_time(self, kind, unpoisoned):
        inputs = make(kind, (300, 96), torch.float32)
        first, douts = step(functions(kind)[0], inputs)
        for _ in range(20):
            again, _ = step(functions(kind)[0], inputs, douts)
            assert all(torch.equal(again[n], first[n]) for n in first)


@pytest.mark.parametrize("kind", MLPS)
def test_rows_of_nothing(kind, chunking):
    mine, _, _ = functions(kind)
    inputs = [t.requires_grad_() for t in make(kind, (3, 0)).values()]
    y = mine(*inputs)
    y.sum().backward()
    assert y.shape == (3, 0) and all(t.grad.shape == (3, 0) for t in inputs)


class TestBadInput:
    def test_kinds(self):
        x = torch.randn(2, 3)
        for kind in (*PLAIN_MLPS, "glu"):
            with pytest.raises(ValueError, match=f"kind='{kind}' is no gated activation"):
                pyckpt.glu(x, x, kind)
        for kind in (*GATED_MLPS, "relu"):
            with pytest.raises(ValueError, match=f"kind='{kind}' is no plain activation"):
                pyckpt.activation(x, kind)

    def test_values(self):
        x = torch.randn(2, 3)
        for other in (torch.randn(2, 4), torch.randn(3), x.double(), torch.randn(2, 3, device="meta")):
            with pytest.raises(ValueError, match="gate and up differ"):
                pyckpt.glu(x, other)
        for fn in (pyckpt.activation, lambda t: pyckpt.glu(t, t)):
            with pytest.raises(ValueError, match=r"must be \(\.\.\., F\), got a scalar"):
                fn(torch.tensor(1.0))
            with pytest.raises(ValueError, match=r"has dtype torch\.int64, expected one of float32"):
                fn(torch.ones(2, 3, dtype=torch.int64))
            with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
                fn([1.0])
