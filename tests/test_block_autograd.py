"""The block inside autograd: what users do to graphs, hooks, frozen weights, modes and transforms."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from blocks import (
    CU_SEQLENS,
    assert_as_good,
    assert_same_bits,
    make_block,
    make_input,
    plain_twin,
    relative_errors,
    step,
)
from helpers import a_few
from torch.utils.checkpoint import checkpoint

import pyckpt

SAVES = pytest.mark.parametrize("save", pyckpt.SAVE_SETS)


def test_zero_stride_gradient():
    block = make_block(tile=7)
    x, _ = make_input(packed=False)
    expanded = step(block, x, torch.ones(1, dtype=x.dtype).expand_as(x))
    x = x.clone().requires_grad_()
    block(x).sum().backward()
    assert torch.equal(x.grad, expanded["dx"])


PARAMETER_GROUPS = {
    "input norm": ("input_layernorm",),
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "qk norm": ("q_norm", "k_norm"),
    "o": ("o_proj",),
    "post norm": ("post_attention_layernorm",),
    "gate/up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@pytest.mark.parametrize("input_grad", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize("save", a_few(["all", "attention"], always=(1,)))
def test_every_subset_of_frozen_parameters(save, input_grad):
    block = make_block(torch.float32, bias=True, qk_norm=True, tile=10, save=save)
    x, _ = make_input(packed=False, dtype=torch.float32)
    dy = torch.randn_like(x)
    whole = step(block, x, dy)
    for trained in itertools.product([True, False], repeat=len(PARAMETER_GROUPS)):
        live = [key for keys, on in zip(PARAMETER_GROUPS.values(), trained, strict=True) if on for key in keys]
        for name, p in block.named_parameters():
            p.requires_grad_(any(key in name for key in live))
            p.grad = None
        x = x.detach().requires_grad_(input_grad)
        y = block(x)
        assert torch.equal(y, whole["y"])
        if not (input_grad or live):
            assert not y.requires_grad
            continue
        y.backward(dy)
        assert (x.grad is not None) == input_grad
        if input_grad:
            assert torch.equal(x.grad, whole["dx"])
            x.grad = None
        for name, p in block.named_parameters():
            if p.requires_grad:
                assert torch.equal(p.grad, whole[name]), name
            else:
                assert p.grad is None, name


def _products(block, x, dy) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    y = block(x)
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    return counter.get_total_flops()


def test_frozen_parts_skip_their_work():
    """Backward FLOPs fall by each frozen weight's product, and by all that lies before the first trained weight."""
    tokens, d, d_q, f = 50, 48, 48, 72
    block = make_block(torch.float32, tile=10)
    x, _ = make_input(packed=False, dtype=torch.float32)
    dy = torch.randn_like(x)
    full = _products(block, x.clone().requires_grad_(), dy)
    block.mlp.up_proj.weight.requires_grad_(False)
    assert full - _products(block, x.clone().requires_grad_(), dy) == 2 * tokens * f * d
    block.requires_grad_(False)
    block.mlp.down_proj.weight.requires_grad_(True)
    # o Woᵀ, gate and up again; dy Wdown; the gradient of Wdown. No attention, nothing before it.
    expected = 2 * tokens * (d_q * d + 2 * d * f + f * d + f * d)
    assert _products(block, x, dy) == expected


def test_only_what_a_backward_asks_for_is_made():
    """By `grad` and by `backward(inputs=)`, as of PyTorch's own layers; bitwise what a whole backward gives."""
    from torch.utils.flop_counter import FlopCounterMode

    tokens, d, f = 50, 48, 72
    block, after = make_block(torch.float32, tile=10), make_block(torch.float32, tile=10)
    x, _ = make_input(packed=False, dtype=torch.float32)
    x.requires_grad_()
    y = after(block(x))
    dy, up = torch.randn_like(y), block.mlp.up_proj.weight

    def count(*inputs: torch.Tensor) -> tuple[int, tuple[torch.Tensor, ...]]:
        with FlopCounterMode(display=False) as counter:
            found = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        return counter.get_total_flops(), found

    weights = [p for p in (*block.parameters(), *after.parameters()) if p.dim() == 2]
    full, whole = count(x, *block.parameters(), *after.parameters())
    alone, of_x = count(x)
    assert full - alone == sum(2 * tokens * w.numel() for w in weights)
    of_weight = count(x, up)
    assert of_weight[0] - alone == 2 * tokens * f * d
    assert torch.equal(of_x[0], whole[0])
    assert torch.equal(of_weight[1][1], dict(zip(block.parameters(), whole[1:], strict=False))[up])
    y.backward(dy, inputs=[up])
    assert torch.equal(up.grad, of_weight[1][1])
    assert all(p.grad is None for p in block.parameters() if p is not up)


def test_backward_twice_needs_retain_graph():
    for save in pyckpt.SAVE_SETS:
        block = make_block(torch.float32, tile=10, save=save, qk_norm=True)
        x, _ = make_input(packed=False, dtype=torch.float32)
        x.requires_grad_()
        y = block(x)
        dy = torch.randn_like(y)
        first = torch.autograd.grad(y, [x, *block.parameters()], dy, retain_graph=True)
        second = torch.autograd.grad(y, [x, *block.parameters()], dy)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, x, dy)


def test_double_backward_is_a_clear_error():
    block = make_block(torch.float32)
    x, _ = make_input(packed=False, dtype=torch.float32)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="double backward through a pyckpt block is not supported"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("trained", [True, False])
def test_forward_mode_is_a_clear_error(trained):
    block = make_block(torch.float32).requires_grad_(trained)
    x, _ = make_input(packed=False, dtype=torch.float32)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        block(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.jacrev])
def test_functorch_transforms_are_a_clear_error(transform):
    block = make_block(torch.float32)
    x = torch.randn(3, 1, 5, 48)
    with pytest.raises(RuntimeError, match=r"do not support torch\.func transforms"):
        transform(lambda t: block(t.reshape(-1, 5, 48)).sum())(x)


@pytest.mark.parametrize("what", ["x", "weight"])
def test_in_place_change_of_a_saved_tensor_is_caught(what):
    block = make_block(torch.float32)
    x, _ = make_input(packed=False, dtype=torch.float32)
    x = x.requires_grad_() * 1
    y = block(x)
    with torch.no_grad():
        (x if what == "x" else block.mlp.down_proj.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@SAVES
def test_no_grad_keeps_nothing(save):
    block = make_block(torch.float32, save=save)
    x, _ = make_input(packed=False, dtype=torch.float32, seq=64)
    block.eval()
    for enter in (torch.no_grad, torch.inference_mode):
        with enter(), pyckpt.measure.memory(block) as m:
            y = block(x)
        assert y.grad_fn is None
        assert m.saved_bytes == 0
        assert m.live_bytes == y.numel() * 4


def test_the_graph_dies_with_its_output():
    block = make_block(torch.float32)
    x, _ = make_input(packed=False, dtype=torch.float32)
    y = block(x)
    node = weakref.ref(y.grad_fn)
    gc.collect()
    gc.disable()
    try:
        del y
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_the_middle_then_a_clean_retry(where, monkeypatch):
    block = make_block(torch.float32, tile=10)
    x, _ = make_input(packed=False, dtype=torch.float32)
    dy = torch.randn_like(x)
    clean = step(block, x, dy)
    implementations = pyckpt.ops.registry.IMPLEMENTATIONS
    name = "glu_fwd_" if where == "forward" else "glu_bwd_"
    original = implementations[name]["torch"]
    calls = 0

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory, say")
        return original(*args)

    monkeypatch.setitem(implementations[name], "torch", failing)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        step(block, x, dy)
    assert all(p.grad is None for p in block.parameters())
    assert_same_bits(clean, step(block, x, dy))


def test_autocast():
    """Under autocast products and attention are in bf16, the residual stream and gradients stay float32."""
    block = make_block(torch.float32, tile=32)
    plain = plain_twin(block, torch.float32)
    x = torch.randn(2, 131, 48)
    dy = torch.randn_like(x)
    truth = step(plain_twin(block, torch.float64), x.double(), dy.double())

    def cast_step(module):
        params = dict(module.named_parameters())
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(leaf)
        grads = torch.autograd.grad(y, [leaf, *params.values()], dy)
        return {"y": y.detach(), "dx": grads[0], **dict(zip(params, grads[1:], strict=True))}

    got, theirs = cast_step(block), cast_step(plain)
    assert {t.dtype for t in got.values()} == {torch.float32}
    assert_as_good(got, theirs, truth, torch.float32)
    assert min(relative_errors(got, truth).values()) > 1e-4, "this was not computed in bf16"


@pytest.mark.parametrize("reentrant", [True, False])
@SAVES
def test_nested_in_torch_checkpoint(save, reentrant):
    block = make_block(torch.float32, tile=10, save=save)
    x, _ = make_input(packed=False, dtype=torch.float32)
    dy = torch.randn_like(x)
    direct = step(block, x, dy)
    leaf = x.clone().requires_grad_()
    block.zero_grad()
    y = checkpoint(block, leaf, use_reentrant=reentrant)
    y.backward(dy)
    assert torch.equal(leaf.grad, direct["dx"])
    for name, p in block.named_parameters():
        assert torch.equal(p.grad, direct[name])


def test_saved_tensor_hooks_see_what_is_kept():
    """torch.autograd.graph.save_on_cpu and its like work on a block's kept tensors."""
    block = make_block(torch.float32, tile=10)
    x, _ = make_input(packed=False, dtype=torch.float32)
    dy = torch.randn_like(x)
    direct = step(block, x, dy)
    with torch.autograd.graph.save_on_cpu():
        offloaded = step(block, x, dy)
    assert_same_bits(direct, offloaded)


def test_save_set_and_tile_may_change_between_forward_and_backward():
    block = make_block(torch.float32, save="all", tile=10)
    x, _ = make_input(packed=False, dtype=torch.float32)
    dy = torch.randn_like(x)
    direct = step(block, x, dy)
    leaf = x.clone().requires_grad_()
    y = block(leaf)
    block.save, block.tile = "input", 3
    assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], direct["dx"])


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_what_a_block_gives_may_be_written_to(packed):
    block = make_block(torch.float32, tile=10)
    x, cu = make_input(packed, torch.float32)
    results = []
    for in_place in (False, True):
        leaf = x.clone().requires_grad_()
        y = block(leaf, cu_seqlens=cu)
        y = y.add_(leaf) if in_place else y + leaf
        y = block(y, cu_seqlens=cu)
        results.append({"y": y.detach(), "dx": torch.autograd.grad(y.square().sum(), leaf)[0]})
    assert_same_bits(*results)


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(packed, dynamic):
    block = make_block(torch.float32, tile=10, qk_norm=True)
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for repeat in (1, 2, 3):
        x, cu = make_input(packed, torch.float32, seq=20 + repeat)
        if packed:
            x = x.repeat(repeat, 1)
            cu = torch.tensor([i * CU_SEQLENS[-1] + c for i in range(repeat) for c in CU_SEQLENS], dtype=torch.int32)
        dy = torch.randn_like(x)
        assert_same_bits(step(block, x, dy, cu), _compiled_step(compiled, block, x, dy, cu))


def _compiled_step(compiled, block, x, dy, cu):
    leaf = x.clone().requires_grad_()
    y = compiled(leaf, cu_seqlens=cu)
    params = dict(block.named_parameters())
    grads = torch.autograd.grad(y, [leaf, *params.values()], dy)
    return {"y": y.detach(), "dx": grads[0], **dict(zip(params, grads[1:], strict=True))}


@pytest.mark.slow
def test_compiles_with_inductor_and_frozen_weights():
    block = make_block(torch.float32, save="attention+mid")
    block.self_attn.requires_grad_(False)
    compiled = torch.compile(lambda x: block(x).relu(), fullgraph=True)
    x, _ = make_input(packed=False, dtype=torch.float32)
    results = []
    for fn in (lambda x: block(x).relu(), compiled):
        leaf = x.clone().requires_grad_()
        block.zero_grad()
        fn(leaf).sum().backward()
        results.append({"dx": leaf.grad, **{n: p.grad for n, p in block.named_parameters() if p.grad is not None}})
    assert_same_bits(*results)
