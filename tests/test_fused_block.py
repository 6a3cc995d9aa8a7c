"""The block with its products fused: by the 2x rule, and with the same bits for every save set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import (
    OPTIONS,
    assert_as_good,
    assert_same_bits,
    make_block,
    make_input,
    plain_twin,
    relative_errors,
    step,
)
from helpers import a_few
from test_block_flops import mlp_products
from torch.utils._python_dispatch import TorchDispatchMode

import pyckpt
from pyckpt.ops.registry import is_pyckpt
from pyckpt.save import SAVE_SETS
from pyckpt.spec import GATED_MLPS
from pyckpt.tokenwise import fused

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OPS = ("qkv", "residual", "mlp", "delta", "wgrad", "dgrad")
# Those that change what a fused part does; attention's own options change nothing here.
NAMES = ("llama", "wide-heads", "bias", "gpt2-like", "relu2", "qk_norm")
FAMILIES = tuple(n for n, o in OPTIONS.items() if o.keys() & {"norm_placement", "residual", "norm_offset", "rope_dim"})


@pytest.fixture(autouse=True)
def everything_fused(monkeypatch) -> None:
    monkeypatch.setenv("PYCKPT_BACKEND", "triton")
    monkeypatch.setenv("PYCKPT_FUSED", "all")


def on_device(packed: bool, dtype: torch.dtype = torch.float64):
    x, cu = make_input(packed, dtype)
    return x.to(DEVICE), None if cu is None else cu.to(DEVICE)


def assert_alike(got, want) -> None:
    """Equal but for the rounding of float32: sums of some hundred terms, one after another through a block."""
    errors = relative_errors(got, {name: t.double() for name, t in want.items()})
    assert max(errors.values()) < 1e-5, errors


def test_the_choice(monkeypatch):
    spec, device = make_block().spec, torch.device(DEVICE)
    assert fused.choose(spec, torch.float32, device) == set(OPS)
    assert fused.choose(spec, torch.float64, device) == set()
    monkeypatch.setenv("PYCKPT_FUSED", "mlp,delta")
    assert fused.choose(spec, torch.float32, device) == {"mlp", "delta"}
    monkeypatch.delenv("PYCKPT_FUSED")
    assert fused.choose(spec, torch.float32, device) == set()  # nothing has been measured
    monkeypatch.setenv("PYCKPT_FUSED", "all")
    monkeypatch.setenv("PYCKPT_BACKEND", "torch")
    assert fused.choose(spec, torch.float32, device) == set()
    monkeypatch.setenv("PYCKPT_BACKEND", "triton")
    monkeypatch.setenv("PYCKPT_FUSED", "everything")
    with pytest.raises(ValueError, match="PYCKPT_FUSED='everything': expected all, none, or some of"):
        make_block(torch.float32).to(DEVICE)(torch.randn(1, 4, 48, device=DEVICE))


@pytest.mark.parametrize("name", a_few([*NAMES, *FAMILIES], always=(0, 3, 5)))
def test_parity(name):
    options = OPTIONS[name]
    block = make_block(**options).to(DEVICE)
    packed = name in ("llama", "gpt2-like", "qk_norm")  # positions of their own
    x, cu = on_device(packed)
    dy, dtype = torch.randn_like(x), torch.float32
    truth = step(plain_twin(block, torch.float64, **options).to(DEVICE), x, dy, cu)
    plain = step(plain_twin(block, dtype, **options).to(DEVICE), x.to(dtype), dy.to(dtype), cu)
    assert_as_good(step(block.to(dtype), x.to(dtype), dy.to(dtype), cu), plain, truth, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-like", "qk_norm-bias-norope", "gemma2-like", "parallel_shared"])
def test_the_same_bits_for_every_save_set(name):
    block = make_block(torch.float32, **OPTIONS[name], tile=16).to(DEVICE)
    x, _ = on_device(False, torch.float32)
    dy, results = torch.randn_like(x), []
    for save in SAVE_SETS:  # what "attention+qkv" keeps, "all" keeps too
        if save != "attention+qkv":
            block.save = save
            results.append(step(block, x, dy))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("op", a_few(OPS, always=(2,)))
def test_one_alone(op, monkeypatch):
    """Fused or not, one by one: the same but for rounding, and the same bits for every save set."""
    monkeypatch.setenv("PYCKPT_FUSED", "none")
    block = make_block(torch.float32, qk_norm=True, bias=True).to(DEVICE)
    x, _ = on_device(False, torch.float32)
    dy = torch.randn_like(x)
    want = step(block, x, dy)
    monkeypatch.setenv("PYCKPT_FUSED", op)
    got = step(block, x, dy)
    assert_alike(got, want)
    assert any(not torch.equal(got[n], want[n]) for n in want)  # another way was gone
    for save in ("all", "input"):
        block.save = save
        assert_same_bits(step(block, x, dy), got)


class Calls(TorchDispatchMode):
    """Which of our ops run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_pyckpt(func):
            self.made.append((func._schema.name.split("::")[1], args))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [args for called, args in self.made if called == name]


@pytest.mark.parametrize("which", a_few(["none", "all"], always=(0,)))
def test_the_backward_of_qk_norm_is_one_pass(which, monkeypatch):
    """Over dq and over dk, of each tile: no rotation back, no norm's backward and no copy beside it."""
    monkeypatch.setenv("PYCKPT_FUSED", which)
    block = make_block(torch.float32, qk_norm=True, tile=16).to(DEVICE)
    x, _ = on_device(False, torch.float32)
    tiles = -(-x[..., 0].numel() // 16)
    y = block(x.requires_grad_())
    with Calls() as calls:
        y.sum().backward()
    assert len(calls.of("qk_finish_bwd_")) == 2 * tiles
    assert calls.of("rms_norm_bwd") == []
    assert not any(inverse for *_, inverse, _ in calls.of("rope_qk_"))


@pytest.mark.slow
def test_dropout_takes_no_residual_kernel(monkeypatch):
    """What is dropped is the same, by the library's way and by the fused one."""
    block = make_block(torch.float32, dropout=0.3).to(DEVICE)
    x, _ = on_device(False, torch.float32)
    dy, results = torch.randn_like(x), []
    for which in ("all", "none"):
        monkeypatch.setenv("PYCKPT_FUSED", which)
        torch.manual_seed(3)
        results.append(step(block, x, dy))
    assert_alike(*results)


@pytest.mark.slow
def test_autocast(monkeypatch):
    """Products in float16 and a residual stream in float32: the statistics are those of the latter."""
    block = make_block(torch.float32, tile=16).to(DEVICE)
    x, _ = on_device(False, torch.float32)
    dy = torch.randn_like(x)
    want = step(block, x, dy)
    results = []
    for save in ("attention", "attention+mid", "all"):
        block.save = save
        with torch.autocast(DEVICE, torch.float16):
            results.append(step(block, x, dy))
    for name, t in results[0].items():
        assert t.dtype == torch.float32
        assert (t - want[name]).norm() < 0.01 * want[name].norm(), name
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["self_attn", "mlp", "norm"])
def test_frozen_parameters(frozen):
    block = make_block(torch.float32).to(DEVICE)
    x, _ = on_device(False, torch.float32)
    dy = torch.randn_like(x)
    want = step(block, x, dy)
    for name, p in block.named_parameters():
        p.requires_grad_(frozen not in name)
    leaf = x.clone().requires_grad_()
    block(leaf).backward(dy)
    assert torch.equal(leaf.grad, want["dx"])
    for name, p in block.named_parameters():
        assert (p.grad is None) if frozen in name else torch.equal(p.grad, want[name])


@pytest.mark.slow
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("save", ["attention", "all"])
def test_products_of_the_mlp(save, mlp):
    """7 of a plain MLP, 11 of a gated one; 6 and 9 where gate and up are kept."""
    gated = mlp in GATED_MLPS
    extra = 0 if save == "all" else (2 if gated else 1)
    made = mlp_products(pyckpt.CkptTransformerBlock, mlp, save=save, tile=None)
    assert made == (9 if gated else 6) + extra
