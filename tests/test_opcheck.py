"""torch.library.opcheck on every op of the namespace: schema, fake, autograd registration, dynamic shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_samples import fused_samples
from torch import Tensor

import pyckpt
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.parameters import parameter_shapes

ops = torch.ops.pyckpt
CU = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
MASK = (None, None, -1, 0, 0.0, 0.3)


def rand(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, requires_grad=grad)


def norm_case(kind: str) -> tuple[Any, ...]:
    x, w = rand(2, 5, 6), rand(6)
    y, *stats = ops.rms_norm_fwd(x, w, 1e-5) if kind == "rms" else ops.layer_norm_fwd(x, w, rand(6), 1e-5)
    return torch.randn_like(y), x, w, *stats


def attention_case(packed: bool) -> tuple[Any, ...]:
    lead = (9,) if packed else (2, 9)
    q, k, v = rand(*lead, 4, 8), rand(*lead, 2, 8), rand(*lead, 2, 8)
    options = (CU, CU, 3, 0, 2.0, 0.3) if packed else MASK
    o, lse = ops.attention_fwd(q, k, v, *options)
    return torch.randn_like(o), q, k, v, o, lse, torch.randn_like(lse) if packed else None, *options


def tile_case(backward: bool) -> tuple[Any, ...]:
    q, k, v, o, lse = rand(2, 5, 4, 8), rand(2, 7, 2, 8), rand(2, 7, 2, 6), rand(2, 5, 4, 6), rand(2, 4, 5)
    options = (-1, 0, 0.0, 0.3, 11, 7, rand(4), 0.25, 12, 3)
    if not backward:
        return q, k, v, o, lse, *options
    return rand(2, 5, 4, 6), q, k, v, lse, rand(2, 4, 5), *(torch.zeros_like(t) for t in (q, k, v)), *options


def loss_case(reduction: str, grad: bool) -> tuple[Any, ...]:
    target = torch.tensor([1, -100, 3, 0, 4, 2])
    need = (grad and reduction != "none",) * 3
    return (
        rand(6, 8, grad=grad),
        rand(5, 8, grad=grad),
        rand(5, grad=grad),
        target,
        -100,
        3.0,
        0.01,
        0.1,
        reduction,
        *need,
    )


def loss_bwd_case() -> tuple[Any, ...]:
    args = loss_case("none", False)
    lse = ops.linear_cross_entropy_fwd(*args)[1]
    return rand(6), lse, *args[:8], True, True, True


def block_case(save: str, grad: bool, packed: bool = False) -> tuple[Any, ...]:
    spec = BlockSpec.make(16, 2, n_kv_heads=1, d_ff=24, qk_norm=True, dropout=0.3 if packed else 0.0)
    weights = [rand(*shape, grad=grad) for shape in parameter_shapes(spec).values()]
    x = rand(9, 16, grad=grad) if packed else rand(2, 9, 16, grad=grad)
    return (
        x,
        None,
        CU if packed else None,
        torch.tensor([7]) if packed else None,
        weights,
        spec.to_string(),
        save,
        4,
        1 << 30,
        torch.float32,
    )


def block_bwd_case(save: str) -> tuple[Any, ...]:
    args = block_case(save, grad=False)
    y, kept = ops.block_fwd(*args)
    return torch.randn_like(y), kept, *args, True, [i % 2 == 0 for i in range(len(args[4]))]


TABLES = (torch.rand(7, 2), torch.rand(7, 2))
CASES: dict[str, list[Callable[[], tuple[Any, ...]]]] = {
    "rms_norm_fwd": [lambda: (rand(2, 5, 6, grad=True), rand(6, grad=True), 1e-5), lambda: (rand(5, 6), None, 1e-5)],
    "rms_norm_bwd": [lambda: (*norm_case("rms"), True), lambda: (*norm_case("rms"), False)],
    "rms_norm_bwd_add_": [lambda: (*norm_case("rms"), rand(2, 5, 6), True)],
    "add_rms_norm_fwd": [lambda: (*(rand(2, 5, 6, grad=True) for _ in "xr"), rand(6, grad=True), 1e-5)],
    "add_layer_norm_fwd": [
        lambda: (*(rand(2, 5, 6, grad=True) for _ in "xr"), *(rand(6, grad=True) for _ in "wb"), 1e-5)
    ],
    "layer_norm_fwd": [lambda: (rand(2, 5, 6, grad=True), rand(6, grad=True), rand(6, grad=True), 1e-5)],
    "layer_norm_bwd": [lambda: (*norm_case("layer"), True)],
    "layer_norm_bwd_add_": [lambda: (*norm_case("layer"), rand(2, 5, 6), True)],
    "rope": [
        lambda: (rand(3, 7, 2, 4, grad=True), *TABLES, False, False),
        lambda: (rand(7, 2, 6), *TABLES, True, True),
    ],
    "rope_": [lambda: (rand(7, 2, 4), *TABLES, False, False)],
    "rope_qk_": [lambda: (rand(7, 4, 4), rand(7, 2, 4), *TABLES, False, False)],
    "attention_merge_": [lambda: (rand(5, 4, 6), rand(4, 5), rand(5, 4, 6), rand(4, 5))],
    "glu_fwd": [lambda: (rand(5, 6, grad=True), rand(5, 6, grad=True), "swiglu")],
    "glu_fwd_": [lambda: (rand(5, 6), rand(5, 6), "geglu")],
    "glu_bwd": [lambda: (rand(5, 6), rand(5, 6), rand(5, 6), "swiglu")],
    "glu_bwd_": [lambda: (rand(5, 6), rand(5, 6), rand(5, 6), "geglu_tanh")],
    "act_fwd": [lambda: (rand(5, 6, grad=True), "gelu")],
    "act_fwd_": [lambda: (rand(5, 6), "relu2")],
    "act_bwd": [lambda: (rand(5, 6), rand(5, 6), "gelu_tanh")],
    "act_bwd_": [lambda: (rand(5, 6), rand(5, 6), "relu2")],
    "dropout_": [
        lambda: (rand(5, 6), rand(5, 6), rand(5, 6), 0.3, 2**40 + 1, 12),
        lambda: (rand(5, 6).half(), None, rand(5, 6), 0.3, 3, 0),
    ],
    **fused_samples(rand),
    "add_product_": [
        lambda: (rand(4, 6), rand(4, 5), rand(5, 6)),
        lambda: (rand(4, 6), rand(5, 4).bfloat16().t(), rand(5, 6).bfloat16()),
    ],
    "attention_fwd": [
        lambda: (rand(2, 9, 4, 8, grad=True), rand(2, 9, 2, 8, grad=True), rand(2, 9, 2, 8, grad=True), *MASK),
        lambda: (*attention_case(True)[1:4], CU, CU, 3, 0, 2.0, 0.3),
        lambda: (*attention_case(False)[1:4], *MASK, rand(4, grad=True), rand(4), 0.5, 2**40 + 1),
    ],
    "attention_bwd": [
        lambda: attention_case(False),
        lambda: attention_case(True),
        lambda: (*attention_case(False), rand(4), rand(2, 4), 0.5, 7),
    ],
    "attention_delta": [
        lambda: (rand(2, 5, 4, 6), rand(2, 5, 4, 6), rand(2, 4, 5)),
        lambda: (rand(5, 4, 6), rand(5, 4, 6), None),
    ],
    "attention_tile_fwd_": [lambda: tile_case(False)],
    "attention_tile_bwd_": [lambda: tile_case(True)],
    "linear_cross_entropy_fwd": [
        lambda: loss_case("mean", True),
        lambda: loss_case("none", True),
        lambda: loss_case("sum", False),
    ],
    "linear_cross_entropy_tile_": [
        lambda: (*loss_case("sum", False)[:8], rand(6, 8), rand(5, 8)),
        lambda: (*loss_case("sum", False)[:8], None, None),
    ],
    "linear_cross_entropy_bwd": [loss_bwd_case],
    "block_fwd": [
        *[lambda save=save: block_case(save, grad=True) for save in pyckpt.SAVE_SETS],
        lambda: block_case("attention", grad=True, packed=True),
    ],
    "block_bwd": [lambda save=save: block_bwd_case(save) for save in ("all", "attention", "input")],
}


def registered() -> set[str]:
    return {*pyckpt.ops.registry.IMPLEMENTATIONS, "block_fwd", "block_bwd"}


def test_every_op_has_a_case():
    assert set(CASES) == registered()


@pytest.mark.parametrize(("name", "case"), [(n, i) for n, cases in CASES.items() for i in range(len(cases))])
def test_opcheck(name, case):
    args = CASES[name][case]()
    results = torch.library.opcheck(getattr(ops, name).default, args)
    assert set(results.values()) == {"SUCCESS"}
