"""What families of models differ in: where residual sums and norms stand, and which biases there are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from blocks import (
    SMALL,
    assert_as_good,
    assert_same_bits,
    make_block,
    make_input,
    plain_twin,
    randomise,
    relative_error,
    relative_errors,
    step,
)
from helpers import a_few
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pyckpt
from pyckpt.compare.baseline import PlainBlock, PlainCausalLM, rope_tables
from pyckpt.ops import philox
from pyckpt.save import bytes_per_token
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.parameters import parameter_shapes

FAMILIES: dict[str, dict[str, Any]] = {
    "parallel": {"residual": "parallel"},
    "parallel_shared": {"residual": "parallel_shared"},
    "sandwich": {"norm_placement": "sandwich"},
    "output": {"norm_placement": "output"},
    "post": {"norm_placement": "post"},
    "offset": {"norm_offset": 1.0, "qk_norm": True},
    "post-layernorm": {"norm_placement": "post", "norm": "layernorm", "mlp": "gelu"},
}
ALL_FAMILIES = pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES.keys())


@ALL_FAMILIES
def test_the_plain_block_passes_gradcheck(options):
    plain = PlainBlock(8, 2, n_kv_heads=1, d_ff=6, **options, dtype=torch.float64)
    randomise(plain)
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    names = list(dict(plain.named_parameters()))

    def run(x, *weights):
        return torch.func.functional_call(plain, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *plain.parameters()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ALL_FAMILIES
def test_error_is_at_most_twice_pytorchs_own(options, dtype):
    block = make_block(dtype, **options, tile=32)
    x = torch.randn(2, 131, 48, dtype=dtype)
    dy = torch.randn_like(x)
    truth = step(plain_twin(block, torch.float64, **options), x.double(), dy.double())
    plain = step(plain_twin(block, dtype, **options), x, dy)
    assert_as_good(step(block, x, dy), plain, truth, dtype)


@ALL_FAMILIES
def test_autocast(options):
    block = make_block(torch.float32, **options, tile=32)
    x = torch.randn(2, 131, 48)
    dy = torch.randn_like(x)
    truth = step(plain_twin(block, torch.float64, **options), x.double(), dy.double())
    results = []
    for module in (block, plain_twin(block, torch.float32, **options)):
        params = dict(module.named_parameters())
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(leaf)
        grads = torch.autograd.grad(y, [leaf, *params.values()], dy)
        results.append({"y": y.detach(), "dx": grads[0], **dict(zip(params, grads[1:], strict=True))})
    assert {t.dtype for t in results[0].values()} == {torch.float32}
    assert_as_good(*results, truth, torch.float32)
    for save in pyckpt.SAVE_SETS:
        block.save = save
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = block(leaf)
        assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], results[0]["dx"]), save


@pytest.mark.parametrize("save", a_few(["all", "attention"], always=(1,)))
@ALL_FAMILIES
def test_compiled(options, save):
    torch._dynamo.reset()
    block = make_block(torch.float32, **options, dropout=0.2, save=save)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, _ = make_input(False, torch.float32)
    dy = torch.randn_like(x)
    torch.manual_seed(3)
    want = step(block, x, dy)
    torch.manual_seed(3)
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    params = dict(block.named_parameters())
    grads = torch.autograd.grad(y, [leaf, *params.values()], dy)
    assert_same_bits(want, {"y": y.detach(), "dx": grads[0], **dict(zip(params, grads[1:], strict=True))})


def frozen_cases(block: nn.Module) -> list[set[str]]:
    """Every subset of: norms, the projections of attention, its last one, gate and up, down."""
    names = list(dict(block.named_parameters()))
    groups = [[n for n in names if "norm" in n], *([n for n in names if key in n] for key in ("q_proj", "o_proj"))]
    groups += [[n for n in names if "gate" in n or "up_proj" in n], [n for n in names if "down" in n]]
    groups += [[n] for n in names if "norm" in n and n.endswith("weight")]
    subsets = itertools.product([True, False], repeat=5)
    picked = [{n for group, on in zip(groups, subset, strict=False) if on for n in group} for subset in subsets]
    return picked + [set(group) for group in groups[5:]]


@pytest.mark.parametrize("input_grad", a_few([True, False], always=(0,)), ids=["dx", "no dx"])
@pytest.mark.parametrize("save", a_few(["all", "attention"], always=(1,)))
@ALL_FAMILIES
def test_subsets_of_frozen_parameters(options, save, input_grad):
    block = make_block(torch.float32, **options, bias=True, tile=20, save=save)
    x, _ = make_input(packed=False, dtype=torch.float32)
    dy = torch.randn_like(x)
    whole = step(block, x, dy)
    for live in frozen_cases(block):
        for name, p in block.named_parameters():
            p.requires_grad_(name in live)
        leaf = x.clone().requires_grad_(input_grad)
        wanted = {"dx": leaf} if input_grad else {}
        wanted |= {n: p for n, p in block.named_parameters() if n in live}
        if wanted:
            found = torch.autograd.grad(block(leaf), list(wanted.values()), dy)
            for name, grad in zip(wanted, found, strict=True):
                assert torch.equal(grad, whole[name]), (name, live)


def backward_flops(block: nn.Module, x: torch.Tensor, trained: str) -> int:
    for name, p in block.named_parameters():
        p.requires_grad_(trained in name)
    y = block(x)
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.ones_like(y))
    return counter.get_total_flops()


@pytest.mark.parametrize("residual", ["parallel", "parallel_shared"])
def test_a_parallel_block_repeats_no_output_projection(residual):
    """The backward needs no sum after attention, nor the MLP where only q, k, v are trained."""
    tokens, d, f = 50, 48, 72
    block = make_block(torch.float32, residual=residual, n_kv_heads=4, tile=10)
    x, _ = make_input(packed=False, dtype=torch.float32)
    assert backward_flops(block, x, "down_proj") == 2 * tokens * (2 * d * f + f * d + f * d)
    # The gradient of o by Wo; q, k, v made again; attention's five products; the gradient of Wq.
    attention = 5 * 2 * 2 * 25 * 25 * d
    assert backward_flops(block, x, "q_proj") == 2 * tokens * d * d * (1 + 3 + 1) + attention


@pytest.mark.parametrize("save", pyckpt.SAVE_SETS)
@ALL_FAMILIES
def test_saved_bytes_equal_arithmetic(options, save):
    tokens, sizes = 640, {"n_kv_heads": 2, "d_ff": 512}
    model = pyckpt.CkptTransformerBlock(256, 4, **sizes, **options, save=save, tile=64)
    x = torch.randn(1, tokens, 256)
    with pyckpt.measure.memory(model) as m:
        y = model(x)
    expected = tokens * bytes_per_token(BlockSpec.make(256, 4, **sizes, **options), save, torch.float32)
    assert y.requires_grad
    assert m.saved_bytes == pytest.approx(expected, rel=0.01)


@ALL_FAMILIES
def test_save_sets_with_dropout(options):
    block = make_block(torch.float32, **options, dropout=0.3)
    x, _ = make_input(False, torch.float32)
    dy = torch.randn_like(x)

    def run() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return step(block, x, dy)

    for tile in (None, 7):
        block.tile = tile
        first = run()
        for save in pyckpt.SAVE_SETS:
            block.save = save
            assert_same_bits(run(), first)


@pytest.mark.parametrize(
    ("bias", "biased"),
    [
        (False, ""),
        ("qkv", "q_proj k_proj v_proj"),
        ("attention", "q_proj k_proj v_proj o_proj"),
        ("mlp", "gate_proj up_proj down_proj"),
        (True, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    ],
)
def test_biases_by_part(bias, biased):
    block = make_block(bias=bias, tile=7)
    found = {n.split(".")[-2] for n, _ in block.named_parameters() if n.endswith("bias")}
    assert found == set(biased.split())
    x, _ = make_input(False)
    dy = torch.randn_like(x)
    truth = step(plain_twin(block, torch.float64, bias=bias), x, dy)
    assert max(relative_errors(step(block, x, dy), truth).values()) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"rope_dim": 2},
        {"rope_dim": 12},
        {"rope_interleaved": True},
        {"rope_dim": 6, "rope_interleaved": True, "qk_norm": True},
        {"head_dim": 7, "rope_dim": 4},
        {"attention_scale": 0.7},
    ],
    ids=str,
)
def test_rope_and_scale(options):
    block = make_block(**options, tile=7)
    x, cu = make_input(True)
    dy = torch.randn_like(x)
    truth = step(plain_twin(block, torch.float64, **options), x, dy, cu)
    for save in pyckpt.SAVE_SETS:
        block.save = save
        assert max(relative_errors(step(block, x, dy, cu), truth).values()) < 1e-12


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_the_norms_offset_is_a_shift_of_the_weights(norm):
    """The same block as one whose norms' weights are greater by the offset, in float32."""
    block = make_block(norm=norm, norm_offset=1.0, qk_norm=True)
    shifted = pyckpt.CkptTransformerBlock(48, 4, **SMALL, norm=norm, qk_norm=True, dtype=torch.float64)
    is_norm = {n: "norm" in n and n.endswith("weight") for n in block.state_dict()}
    shifted.load_state_dict({n: t + 1.0 if is_norm[n] else t for n, t in block.state_dict().items()})
    x, _ = make_input(False)
    dy = torch.randn_like(x)
    assert_same_bits(step(block, x, dy), step(shifted, x, dy))


def test_the_models_last_norm_has_the_offset():
    sizes = {"vocab_size": 30, "n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 24, "dtype": torch.float64}
    model, plain = pyckpt.CkptCausalLM(**sizes, norm_offset=1.0), PlainCausalLM(**sizes, norm_offset=1.0)
    assert not model.model.norm.weight.any()
    randomise(model)
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 30, (2, 9))
    logits = [m(tokens) for m in (model, plain)]
    assert relative_error(*(t.detach() for t in logits)) < 1e-12
    for m in (model, plain):
        m.loss(tokens).backward()
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in (model, plain)]
    assert max(relative_errors(*grads).values()) < 1e-6  # ours is a float32 loss


def dropped(plain: PlainBlock, x: torch.Tensor, seed: int) -> torch.Tensor:
    """The plain block with the masks that the seed stands for on what its sublayers add."""
    s, rows = plain.spec, x.shape[0] * x.shape[1]
    rope = rope_tables(s, x)

    def drop(t: torch.Tensor, site: int) -> torch.Tensor:
        keep = philox.kept_rows(s.dropout, philox.derive(seed, site), (0, rows), x.shape[-1], x.device)
        return t * keep.view(t.shape) / (1 - s.dropout)

    def normed(name: str, t: torch.Tensor) -> torch.Tensor:
        return getattr(plain, name)(t) if hasattr(plain, name) else t

    after = "post_attention_layernorm", "post_feedforward_layernorm"
    attended = plain.self_attn(normed("input_layernorm", x), rope, None)
    if s.norm_placement == "post":
        mid = normed(after[0], x + drop(attended, 1))
        return normed(after[1], mid + drop(plain.mlp(mid), 2))
    if s.norm_placement == "output":
        mid = x + drop(normed(after[0], attended), 1)
        return mid + drop(normed(after[1], plain.mlp(mid)), 2)
    if s.norm_placement == "sandwich":
        mid = x + drop(normed(after[0], attended), 1)
        return mid + drop(normed(after[1], plain.mlp(normed("pre_feedforward_layernorm", mid))), 2)
    mid = x + drop(attended, 1)
    norm = "input_layernorm" if s.residual == "parallel_shared" else after[0]
    return mid + drop(plain.mlp(normed(norm, mid if s.residual == "sequential" else x)), 2)


@ALL_FAMILIES
def test_dropout_against_plain_pytorch(options):
    options = {**options, "dropout": 0.3, "attention_dropout": 0.0}
    block, (x, _) = make_block(**options, tile=7), make_input(False)
    plain, dy = plain_twin(block, torch.float64, **options), torch.randn_like(x)
    torch.manual_seed(3)
    got = step(block, x, dy)
    torch.manual_seed(3)
    leaf = x.clone().requires_grad_()
    y = dropped(plain, leaf, int(torch.randint(2**62, ())))
    params = dict(plain.named_parameters())
    grads = torch.autograd.grad(y, [leaf, *params.values()], dy)
    truth = {"y": y.detach(), "dx": grads[0], **dict(zip(params, grads[1:], strict=True))}
    assert max(relative_errors(got, truth).values()) < 1e-12


def test_names_of_the_norms():
    def norms(**options: Any) -> list[str]:
        shapes = parameter_shapes(BlockSpec.make(48, 4, **SMALL, **options))
        return [n.removesuffix(".weight") for n in shapes if n.endswith("norm.weight")]

    assert norms() == norms(residual="parallel") == ["input_layernorm", "post_attention_layernorm"]
    assert norms(residual="parallel_shared") == ["input_layernorm"]
    after = ["post_attention_layernorm", "post_feedforward_layernorm"]
    assert norms(norm_placement="output") == norms(norm_placement="post") == after
    gemma2 = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    assert norms(norm_placement="sandwich") == gemma2
