"""Dropout on the block: the same values dropped by every tile, save set and recomputation, and the right ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import assert_same_bits, make_block, make_input, step
from helpers import a_few, assert_exact
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyckpt
from pyckpt.ops import philox

ops = torch.ops.pyckpt
RATE = 0.3
DROPS = {"dropout": RATE, "attention_dropout": 0.2}


def seeded(fn: Any, *args: Any, seed: int = 3, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return fn(*args, **kwargs)


@pytest.mark.usefixtures("backend")
class TestOp:
    @pytest.mark.parametrize(("rows", "width"), [(5, 1), (3, 7), (70, 48), (2, 2051)])
    @pytest.mark.parametrize("dtype", a_few([torch.float64, torch.float32, torch.float16, torch.bfloat16], always=(3,)))
    def test_what_is_kept(self, dtype, rows, width):
        seed, first = 2**40 + 17, 2**33 + 5
        x, residual = (torch.randn(rows, width).to(dtype) for _ in range(2))
        keep = philox.kept_rows(RATE, seed, (first, first + rows), width, x.device)
        zero = ~keep | (x == 0)  # torch.randn draws a zero once in 2^24 numbers
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        want = torch.where(keep, x.to(acc) * (1 / (1 - RATE)), 0.0)
        for added in (None, residual):
            out = torch.empty_like(x)
            ops.dropout_(x, added, out, RATE, seed, first)
            wanted = want if added is None else want + added
            eps = torch.finfo(dtype).eps
            assert ((out.to(acc) - wanted).abs() <= 2 * eps * wanted.abs() + eps).all()
            assert torch.equal(out == 0, zero) or added is not None
        ops.dropout_(x, None, x, RATE, seed, first)
        assert torch.equal(x == 0, zero)

    def test_parts_are_the_whole(self):
        x, whole, parts = torch.randn(50, 33), torch.empty(50, 33), torch.empty(50, 33)
        ops.dropout_(x, None, whole, RATE, 9, 4)
        for start in range(0, 50, 13):
            part = slice(start, start + 13)
            ops.dropout_(x[part], None, parts[part], RATE, 9, 4 + start)
        assert torch.equal(whole, parts)

    def test_strided(self):
        x = torch.randn(9, 40)[:, 3:20]
        out = torch.full((9, 40), 7.0)
        ops.dropout_(x, x, out[:, 5:22], RATE, 1, 0)
        want = torch.empty(9, 17)
        ops.dropout_(x.contiguous(), x.contiguous(), want, RATE, 1, 0)
        assert torch.equal(out[:, 5:22], want)
        assert (out[:, :5] == 7).all()
        assert (out[:, 22:] == 7).all()


def test_how_many_and_which():
    """The rate, no pattern along rows or columns, and nothing in common between seeds and sites."""
    n = 1024
    keep = philox.kept_rows(RATE, 5, (0, n), n, torch.device("cpu")).double()
    assert abs(keep.mean() - (1 - RATE)) < 5 * (RATE * (1 - RATE)) ** 0.5 / n
    bound = 6 * (RATE * (1 - RATE) / n) ** 0.5
    assert (keep.mean(0) - (1 - RATE)).abs().max() < bound
    assert (keep.mean(1) - (1 - RATE)).abs().max() < bound
    others = [philox.derive(5, site) for site in (0, 1, 2)] + [6]
    for other in others:
        again = philox.kept_rows(RATE, other, (0, n), n, torch.device("cpu")).double()
        product = ((keep - keep.mean()) * (again - again.mean())).mean()
        assert abs(product) < 6 * RATE * (1 - RATE) / n
    assert len({5, *others}) == 5
    assert all(0 <= s < 2**63 for s in others)


def test_seeds_of_places_are_made_on_no_device():
    """They are the words that tensors give, whichever device tensors are made on by default."""
    zero = torch.zeros((), dtype=torch.int64)
    block, (x, _) = make_block(torch.float32, dropout=RATE), make_input(packed=False, dtype=torch.float32)
    for seed, site in ((0, 0), (2**62 - 1, 2), (77, 2**40 + 5)):
        w0, w1, _, _ = philox.philox(seed, (zero + site, zero, zero, zero - 1))
        with torch.device("meta"):
            assert philox.derive(seed, site) == int(w0) | (int(w1) >> 1) << 32
    with torch.device("meta"):
        block(x).sum().backward()


def twin(block: pyckpt.CkptTransformerBlock, x: Tensor, seed: int) -> Tensor:
    """The block without RoPE in plain PyTorch, with the masks that the seed stands for."""
    w, s = dict(block.named_parameters()), block.spec
    batch, seq, width = x.shape

    def drop(t: Tensor, site: int) -> Tensor:
        keep = philox.kept_rows(s.dropout, philox.derive(seed, site), (0, batch * seq), width, x.device)
        return t * keep.view(t.shape) / (1 - s.dropout)

    def linear(name: str, t: Tensor) -> Tensor:
        return F.linear(t, w[f"{name}.weight"])

    def norm(name: str, t: Tensor) -> Tensor:
        return F.rms_norm(t, (width,), w[f"{name}.weight"], s.norm_eps)

    h = norm("input_layernorm", x)
    q, k, v = (linear(f"self_attn.{n}_proj", h).view(batch, seq, -1, s.head_dim).transpose(1, 2) for n in "qkv")
    k, v = (t.repeat_interleave(s.n_heads // s.n_kv_heads, 1) for t in (k, v))
    scores = (q @ k.mT * s.scale).masked_fill(~torch.ones(seq, seq, dtype=torch.bool).tril(), float("-inf"))
    rate = s.attention_dropout
    keep = philox.kept(rate, philox.derive(seed, 0), torch.arange(batch), s.n_heads, (0, seq), (0, seq))
    o = (scores.softmax(-1) * keep / (1 - rate)) @ v
    mid = x + drop(linear("self_attn.o_proj", o.transpose(1, 2).reshape(batch, seq, -1)), 1)
    h = norm("post_attention_layernorm", mid)
    act = F.silu(linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h)
    return mid + drop(linear("mlp.down_proj", act), 2)


@pytest.mark.parametrize(
    "rates", [DROPS, {"dropout": 0.5, "attention_dropout": 0.0}, {"attention_dropout": 0.4}], ids=str
)
def test_against_plain_pytorch(rates):
    block, (x, _) = make_block(rope_theta=None, **rates), make_input(False)
    dy = torch.randn_like(x)
    got = seeded(step, block, x, dy)
    seed = int(seeded(torch.randint, 2**62, ()))
    x = x.requires_grad_()
    y = twin(block, x, seed)
    params = dict(block.named_parameters())
    grads = torch.autograd.grad(y, [x, *params.values()], dy)
    for name, want in zip(("y", "dx", *params), (y, *grads), strict=True):
        assert_exact(got[name], want.detach(), name, terms=10.0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backend", a_few(["torch", "triton"], always=(0,)), indirect=True)
def test_the_same_bits_for_every_save_set(packed, backend):
    x, cu = make_input(packed, torch.float32)
    dy = torch.randn_like(x)
    block = make_block(torch.float32, tile=13, **DROPS)
    results = []
    # In Triton's interpreter a step takes seconds: what keeps the most there, and the least.
    for save in pyckpt.SAVE_SETS if backend == "torch" else ("all", "input"):
        block.save = save
        results.append(seeded(step, block, x, dy, cu))
    for other in results[1:]:
        assert_same_bits(results[0], other)
    assert not torch.equal(results[0]["y"], seeded(step, block, x, dy, cu, seed=4)["y"])


def test_the_same_values_for_every_tile():
    """And so the same bits forward, in float64 up to the order of sums."""
    (x, _), block = make_input(False), make_block(**DROPS)
    dy = torch.randn_like(x)
    want = seeded(step, block, x, dy)
    for tile in (1, 7, 50):
        block.tile = tile
        got = seeded(step, block, x, dy)
        for name in want:
            assert_exact(got[name], want[name], name, terms=10.0)


def test_evaluation_drops_nothing_and_draws_nothing():
    (x, _), block = make_input(False), make_block(**DROPS).eval()
    plain = make_block()
    plain.load_state_dict(block.state_dict())
    state = torch.get_rng_state()
    assert torch.equal(block(x), plain(x))
    assert torch.equal(torch.get_rng_state(), state)
    block.train()
    assert not torch.equal(block(x), plain(x))
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("segments", [2, 3, "sqrt"])
def test_segments_drop_the_same(segments):
    x, _ = make_input(False, torch.float32)
    dy = torch.randn_like(x)
    blocks = [make_block(torch.float32, **(DROPS if i != 1 else {})) for i in range(4)]
    model = pyckpt.CkptTransformer(blocks)
    want = seeded(step, model, x, dy)
    model.segments = segments
    assert_same_bits(seeded(step, model, x, dy), want)


def test_inside_another_checkpoint():
    """It restores the generator that the seed comes from."""
    x, _ = make_input(False, torch.float32)
    block, dy = make_block(torch.float32, **DROPS), torch.randn_like(x)
    want = seeded(step, block, x, dy)
    leaf = x.clone().requires_grad_()
    y = seeded(checkpoint, block, leaf, use_reentrant=False)
    torch.manual_seed(99)
    (dx,) = torch.autograd.grad(y, [leaf], dy)
    assert torch.equal(y, want["y"])
    assert torch.equal(dx, want["dx"])


def test_compiled():
    torch._dynamo.reset()  # other tests of the same process may have used up the recompilations of a block's forward
    x, _ = make_input(False, torch.float32)
    block, dy = make_block(torch.float32, **DROPS), torch.randn_like(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    want = seeded(step, block, x, dy)
    y = seeded(compiled, leaf)
    assert torch.equal(y, want["y"])
    assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], want["dx"])
    assert not torch.equal(compiled(leaf), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(dtype):
    """The residual stream keeps its own dtype, its branches are dropped in the products'."""
    x, _ = make_input(False, torch.float32)
    block, dy = make_block(torch.float32, **DROPS), torch.randn_like(x)
    want = seeded(step, block, x, dy)
    with torch.autocast("cpu", dtype):
        got = seeded(step, block, x, dy)
    for name in want:
        assert got[name].dtype == torch.float32
        assert (got[name] - want[name]).norm() < 0.05 * want[name].norm(), name
