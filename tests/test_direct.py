"""Calls past the dispatcher: the same results, and whoever looks at ops still sees them; what is kept between calls."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pyckpt
from pyckpt.attend.dense import Layout
from pyckpt.exec.positions import positions_of
from pyckpt.ops import direct, keeping, registry
from pyckpt.ops.keeping import belongs_to
from pyckpt.ops.rope import rope_tables
from pyckpt.tokenwise import positions as places

CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch):
    """The ops that were called past the dispatcher."""
    seen, right = [], registry.call
    monkeypatch.setattr(registry, "call", lambda name, *rest: seen.append(name) or right(name, *rest))
    return seen


def norm(x):
    with torch.no_grad():
        return direct.ops.rms_norm_fwd(x, None, 1e-5)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Passing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


def test_the_same_bits_as_the_op(calls):
    x = torch.randn(5, 8)
    found = norm(x)
    assert calls == ["rms_norm_fwd"]
    wanted = torch.ops.pyckpt.rms_norm_fwd(x, None, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert calls == ["rms_norm_fwd"]


def test_with_autograd_it_is_the_op(calls):
    x = torch.randn(5, 8, requires_grad=True)
    assert direct.ops.rms_norm_fwd(x, None, 1e-5)[0].requires_grad
    assert not calls


def test_a_dispatch_mode_sees_it(calls):
    with Seen() as seen:
        norm(torch.randn(5, 8))
    assert "pyckpt.rms_norm_fwd.default" in seen.names
    assert not calls


def test_a_function_mode_and_a_class_of_tensors_go_by_the_dispatcher(calls):
    with Passing():
        norm(torch.randn(5, 8))
    norm(torch.randn(5, 8).as_subclass(Own))
    assert not calls


def test_the_profiler_sees_it(calls):
    with torch.profiler.profile() as p:
        norm(torch.randn(5, 8))
    assert "pyckpt::rms_norm_fwd" in {event.key for event in p.key_averages()}
    assert not calls


def test_a_list_of_tensors_comes_first_in_some(calls):
    dys, ws = [torch.randn(5, 4), torch.randn(5, 6)], [torch.randn(4, 8), torch.randn(6, 8)]
    out = torch.empty(5, 8)
    with torch.no_grad():
        direct.ops.linears_input_grad_(dys, ws, out)
    torch.testing.assert_close(out, dys[0] @ ws[0] + dys[1] @ ws[1])
    assert calls == ["linears_input_grad_"]


def test_an_op_that_there_is_not():
    with pytest.raises(AttributeError, match="nonesuch"):
        direct.ops.nonesuch  # noqa: B018


def test_a_block_calls_straight_and_is_counted_in_full(calls):
    block = pyckpt.CkptTransformerBlock(32, 4, n_kv_heads=2, d_ff=48)
    x = torch.randn(1, 16, 32, requires_grad=True)
    block(x).sum().backward()
    assert {"rms_norm_fwd", "rope_qk_", "attention_fwd", "glu_fwd_", "attention_bwd", "rms_norm_bwd_add_"} <= set(calls)
    calls.clear()
    with FlopCounterMode(display=False) as counter, Seen() as seen:
        block(x).sum().backward()
    assert not calls
    counted = {str(op) for op in counter.get_flop_counts()["Global"]}
    assert {"pyckpt.attention_fwd", "pyckpt.attention_bwd"} <= counted
    assert "pyckpt.glu_bwd_.default" in seen.names


# --- what is kept -----------------------------------------------------------------------------------------------


def block_of(**options):
    return pyckpt.CkptTransformerBlock(32, 4, **options).spec


@pytest.fixture(autouse=True)
def nothing_kept():
    places._kept.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tables_of_a_range_are_made_once(dtype):
    spec = block_of()
    layout = Layout(2, 24)
    first, second = (positions_of(layout, None, slice(5, 40), CPU).tables(spec, dtype) for _ in range(2))
    assert first[0] is second[0]
    counted = torch.arange(5, 40) % 24
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = rope_tables(counted, spec.d_rope, spec.rope_theta, None, kind)
    assert all(torch.equal(a, b) and a.dtype == kind for a, b in zip(first, wanted, strict=True))


def test_other_ranges_lengths_and_angles_have_tables_of_their_own():
    kept = {
        positions_of(Layout(*shape), None, rows, CPU).tables(spec, torch.float32)[0].data_ptr()
        for shape, rows, spec in (
            ((2, 24), slice(0, 40), block_of()),
            ((2, 24), slice(0, 41), block_of()),
            ((3, 16), slice(0, 40), block_of()),
            ((2, 24), slice(0, 40), block_of(rope_theta=500.0)),
            ((2, 24), slice(0, 40), block_of(rope_scaling={"rope_type": "linear", "factor": 2.0})),
        )
    }
    assert len(kept) == places._kept.cache_info().currsize == 5


def test_long_given_and_packed_ones_are_not_kept():
    spec = block_of()
    long = positions_of(Layout(1, 10**6), None, slice(0, 10**6), CPU).tables(spec, torch.float32)
    assert torch.equal(long[0][-1], rope_tables(torch.tensor(10**6 - 1), spec.d_rope, 10000.0)[0])
    given = torch.tensor([3, 1, 4])
    found = positions_of(Layout(1, 3), given, slice(1, 3), CPU).tables(spec, torch.float32)
    assert torch.equal(found[0], rope_tables(given[1:], spec.d_rope, 10000.0)[0])
    packed = Layout(1, 7, torch.tensor([0, 3, 7], dtype=torch.int32))
    found = positions_of(packed, None, slice(2, 6), CPU).tables(spec, torch.float32)
    assert torch.equal(found[0], rope_tables(torch.tensor([2, 0, 1, 2]), spec.d_rope, 10000.0)[0])
    assert places._kept.cache_info().currsize == 0


def test_nothing_is_kept_of_what_a_mode_made():
    spec = block_of()
    with torch._subclasses.FakeTensorMode():
        positions_of(Layout(1, 8), None, slice(0, 8), CPU).tables(spec, torch.float32)
    assert places._kept.cache_info().currsize == 0
    assert belongs_to(torch.device("meta")) is None
    assert belongs_to(CPU) == CPU
    with Seen():
        assert belongs_to(CPU) is None


def test_nothing_is_kept_in_the_memory_of_inductors_graphs(monkeypatch):
    """They warm up outside of any capture, on a stream that is not the default one."""
    device, stream = torch.device("cuda:1"), SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.delitem(sys.modules, keeping._GRAPHS, raising=False)
    assert belongs_to(device) == (device, 7)
    monkeypatch.setitem(sys.modules, keeping._GRAPHS, SimpleNamespace())
    assert belongs_to(device) is None
    stream.cuda_stream = 0
    assert belongs_to(device) == (device, 0)


def test_what_inference_made_serves_training():
    block = pyckpt.CkptTransformerBlock(32, 4)
    x = torch.randn(1, 12, 32)
    with torch.inference_mode():
        inferred = block(x)
    y = block(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(inferred, y)
    assert x.grad is not None


# --- the negative bit ------------------------------------------------------------------------------------------------


def negated(t: torch.Tensor) -> torch.Tensor:
    """-t, as the imaginary part of a conjugate is: by a bit, and the memory has t."""
    return torch.complex(torch.zeros_like(t), t).conj().imag


OPS = {
    "rms_norm": lambda x: pyckpt.rms_norm(x, torch.linspace(0.5, 1.5, 8)),
    "layer_norm": lambda x: pyckpt.layer_norm(x, torch.linspace(0.5, 1.5, 8)),
    "rope": lambda x: pyckpt.rope(x.unflatten(-1, (2, 4))),
    "glu": lambda x: pyckpt.glu(x, 2.0 * x),
    "activation": pyckpt.activation,
    "attention": lambda x: pyckpt.attention(*(x.unflatten(-1, (2, 4)) * n for n in (1.0, 0.5, 2.0))),
    "lse": lambda x: pyckpt.attention(*(x.unflatten(-1, (2, 4)) * n for n in (1.0, 0.5, 2.0)), return_lse=True)[1],
}


@pytest.mark.parametrize("name", OPS)
def test_an_upstream_gradient_that_is_read_negated(cpu_backend, name):
    x = torch.randn(2, 5, 8, requires_grad=True)
    y = OPS[name](x)
    dy = torch.randn_like(y)
    assert negated(dy).is_neg()
    (found,) = torch.autograd.grad(y, x, negated(dy), retain_graph=True)
    (truth,) = torch.autograd.grad(y, x, -dy)
    assert torch.equal(found, truth)


@pytest.mark.parametrize("save", ["attention", "all", "input"])
def test_a_block_of_what_is_read_negated(cpu_backend, save):
    block, x = pyckpt.CkptTransformerBlock(8, 2, d_ff=12, save=save), torch.randn(2, 5, 8)
    dy, results = torch.randn_like(x), []
    for given, upstream in ((negated(x), negated(dy)), (-x, -dy)):
        y = block(given)
        results.append([y, *torch.autograd.grad(y, list(block.parameters()), upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
