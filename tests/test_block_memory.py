"""Saved bytes by arithmetic, and how the peak grows with the length and with the depth."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from helpers import a_few
from torch import Tensor

import pyckpt
from pyckpt.attend.dense import DenseAttend
from pyckpt.ops import chunks
from pyckpt.save import bytes_per_token, save_set
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.standard import StandardTokenwise

# Sizes at which a tile's scratch is small beside the sequence, and float32 lse is 1% of the smallest save set.
TILE = 64


def block(**options) -> pyckpt.CkptTransformerBlock:
    return pyckpt.CkptTransformerBlock(256, 4, **{"n_kv_heads": 2, "d_ff": 512, "tile": TILE, **options})


def spec(**options) -> BlockSpec:
    return BlockSpec.make(256, 4, **{"n_kv_heads": 2, "d_ff": 512, **options})


@pytest.mark.parametrize("save", pyckpt.SAVE_SETS)
@pytest.mark.parametrize(
    "options",
    [{}, {"mlp": "gelu", "norm": "layernorm", "bias": True}, {"qk_norm": True}],
    ids=["llama", "gpt", "qk"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes_equal_arithmetic(save, options, dtype):
    tokens = 640
    model = block(save=save, dtype=dtype, **options)
    x = torch.randn(1, tokens, 256, dtype=dtype)
    with pyckpt.measure.memory(model) as m:
        y = model(x)
    expected = tokens * bytes_per_token(spec(**options), save, dtype)
    assert m.saved_bytes == pytest.approx(expected, rel=0.01)
    # And by what is really alive: the output, and all that is kept but x, which was there before.
    kept_here = expected - x.numel() * dtype.itemsize
    assert m.live_bytes == pytest.approx(kept_here + y.numel() * dtype.itemsize, rel=0.01)


def test_bytes_per_token_of_llama_3_8b():
    """The table of the design page, in bf16."""
    llama = BlockSpec.make(4096, 32, n_kv_heads=8, d_ff=14336)
    table = {s: bytes_per_token(llama, s, torch.bfloat16) for s in pyckpt.SAVE_SETS}
    assert table == {
        "all": 94_336,
        "attention+qkv": 36_992,
        "attention+mid": 24_704,
        "attention": 16_512,
        "input": 8_192,
    }


def step_peak(model, tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Peak of forward and backward in bytes above weights, their gradients, x, dy, y and dx."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randn(1, tokens, 256, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    with pyckpt.measure.memory(model) as m:
        model(x).backward(dy)
    return m.peak_bytes - 2 * x.numel() * dtype.itemsize


def post_peak(model, tokens: int) -> int:
    """The same of a backward that ends with `post`, as nothing before it is trained: its tiles take the most."""
    plan = model.plan(tokens, torch.float32, torch.float32, torch.device("cpu"))
    for name, p in model.named_parameters():
        p.requires_grad_(name not in plan.pre_names)
    x = torch.randn(1, tokens, 256)
    with pyckpt.measure.memory(model) as m:
        model(x).backward(torch.randn_like(x))
    return m.peak_bytes - x.numel() * 4


@pytest.mark.parametrize("save", a_few(pyckpt.SAVE_SETS, always=(3,)))
def test_slope_of_the_peak_over_the_length(save):
    """Above x, y, dy, dx: the save set, and do, q, k, v, dq, dk, dv of the one block, less those that are kept."""
    s = spec()
    keeps = save_set(save)
    kept = bytes_per_token(s, save, torch.float32) - 4 * s.d_model
    transient = 4 * (3 * s.d_q + 4 * s.d_kv) - (4 * (s.d_q + 2 * s.d_kv) if keeps.qkv else 0)
    if not keeps.attention:
        transient += 4 * s.d_q + 4 * s.n_heads  # o and lse, made again
    model = block(save=save)
    short, long = 1024, 3072
    slope = (step_peak(model, long) - step_peak(model, short)) / (long - short)
    assert slope == pytest.approx(kept + transient, rel=0.10)


@pytest.mark.parametrize(
    "kind", a_few([("post", "all"), ("sandwich", "attention+mid"), ("output", "input")], always=(1,)), ids="-".join
)
def test_slope_with_norms_after(kind):
    placement, save = kind
    options = {"norm_placement": placement}
    s, keeps = spec(**options), save_set(save)
    expected = bytes_per_token(s, save, torch.float32) - 4 * s.d_model
    expected += 4 * (3 * s.d_q + 4 * s.d_kv) - (4 * (s.d_q + 2 * s.d_kv) if keeps.qkv else 0)
    expected += 0 if keeps.attention else 4 * s.d_q + 4 * s.n_heads
    model = block(save=save, **options)
    slope = (step_peak(model, 3072) - step_peak(model, 1024)) / 2048
    assert slope == pytest.approx(expected, rel=0.10)


@pytest.mark.parametrize(
    "options",
    a_few([{}, {"mlp": "gelu", "norm": "layernorm"}, {"qk_norm": True}, {"norm_placement": "sandwich"}], always=(0, 1)),
    ids=str,
)
@pytest.mark.parametrize("tile_bytes", a_few([3_000_000, 10_000_000], always=(0,)))
def test_a_tile_takes_its_budget_and_no_more(tile_bytes, options):
    options = {"d_ff": 1024, "tile": None, **options}
    tokens = 2048
    least = post_peak(block(**options, tile_bytes=1), tokens)  # tiles of 64 tokens
    plan = block(**options, tile_bytes=1).plan(tokens, torch.float32, torch.float32, torch.device("cpu"))
    assert plan.tile == 64
    grown = post_peak(block(**options, tile_bytes=tile_bytes), tokens) - least
    own = 64 * 4 * (3 * 1024 + 8 * 256)  # of the small tiles, roughly
    assert 0.3 * tile_bytes < grown <= tile_bytes
    chunk = 4 * chunks._CPU_CHUNK_ELEMENTS  # of pointwise work, which no budget counts; 64 tokens are half of one
    assert grown + own <= 1.1 * tile_bytes + chunk


def test_the_transient_of_a_tile_does_not_grow_with_the_length():
    """Above the tensors of the whole sequence: what a tile takes, whatever the length."""
    budget, small = ({"d_ff": 2048, "tile": None, "tile_bytes": b} for b in (8_000_000, 1))
    taken = [post_peak(block(**budget), s) - post_peak(block(**small), s) for s in (1024, 2048, 4096)]
    assert max(taken) <= 1.05 * min(taken)
    assert max(taken) <= 8_000_000


def test_a_tiles_budget_hides_behind_attentions_gradients():
    """`post` is through, and its scratch gone, when q, k, v and their gradients come: the peak is the larger one."""
    s, tokens = spec(d_ff=1024), 3072
    hidden = tokens * 4 * 2 * (s.d_q + 2 * s.d_kv)  # q, k, v, dq, dk, dv
    small, large = (step_peak(block(d_ff=1024, tile=None, tile_bytes=b), tokens) for b in (1, hidden - (1 << 20)))
    assert large <= 1.01 * small


@pytest.mark.parametrize("options", [{}, {"residual": "parallel_shared"}, {"qk_norm": True}], ids=str)
def test_the_gradients_of_posts_weights_are_rounded_before_attentions(options, monkeypatch):
    """What is alive when attention's backward begins: nothing of a tile, and no float32 sums of weights but pre's."""
    dtype, tokens = torch.bfloat16, 700
    model = block(d_ff=2048, dtype=dtype, **options)
    plan = model.plan(tokens, dtype, dtype, torch.device("cpu"))
    x = torch.randn(1, tokens, 256, dtype=dtype, requires_grad=True)
    right = DenseAttend.backward
    monkeypatch.setattr(DenseAttend, "backward", lambda *a: m.mark("attention") and right(*a))
    with pyckpt.measure.memory(model) as m:
        y = model(x)
        y.backward(torch.randn_like(x))
    s = model.spec
    weights = sum(p.nbytes for n, p in model.named_parameters() if n not in plan.pre_names)
    alive = tokens * 2 * (3 * 256 + 3 * s.d_q + 2 * s.d_kv) + tokens * 4 * s.n_heads  # y, dy, dx; o, do, q, k, v; lse
    assert m.marks["attention"].live_bytes == pytest.approx(alive + weights, rel=0.01)


def test_slope_over_the_length_does_not_depend_on_the_mlp():
    """Nothing as wide as d_ff lives for the whole sequence."""
    slopes = []
    for d_ff in (512, 2048):
        model = block(d_ff=d_ff)
        slopes.append((step_peak(model, 2048) - step_peak(model, 1024)) / 1024)
    assert slopes[0] == pytest.approx(slopes[1], rel=0.01)


@pytest.mark.slow
def test_slope_of_the_peak_over_the_depth():
    """A deeper stack costs one save set a block, and with segments one input a segment."""
    tokens = 512
    per_block = {None: bytes_per_token(spec(), "attention", torch.float32), 4: 4 * 256 / 4}
    for segments, expected in per_block.items():
        peaks = [
            step_peak(pyckpt.CkptTransformer([block() for _ in range(depth)], segments), tokens) for depth in (4, 12)
        ]
        assert (peaks[1] - peaks[0]) / 8 / tokens == pytest.approx(expected, rel=0.02)


def test_segments_save_only_inputs():
    tokens = 256
    for segments, inputs in ((None, None), (1, None), (2, 3), (3, 2), ("sqrt", 2), (6, 1), (99, 1)):
        stack = pyckpt.CkptTransformer([block() for _ in range(6)], segments)
        x = torch.randn(1, tokens, 256)
        with pyckpt.measure.memory(stack) as m:
            y = stack(x)
        assert y.requires_grad
        expected = 6 * bytes_per_token(spec(), "attention", torch.float32) if inputs is None else inputs * 4 * 256
        assert m.saved_bytes == pytest.approx(tokens * expected, rel=0.01), segments


def test_inputs_without_grad_hold_no_input_gradient():
    model = block()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    tokens, peaks = 2048, {}
    for wanted in (True, False):
        x = torch.randn(1, tokens, 256, requires_grad=wanted)
        dy = torch.randn_like(x)
        with pyckpt.measure.memory(model) as m:
            model(x).backward(dy)
        peaks[wanted] = m.peak_bytes
    assert peaks[True] - peaks[False] == pytest.approx(tokens * 256 * 4, rel=0.2)


@pytest.mark.slow
def test_the_loss_does_not_hold_the_logits():
    """Peak of CkptCausalLM.loss over the length: nothing as wide as the vocabulary."""
    vocab, peaks = 8192, []
    model = pyckpt.CkptCausalLM(vocab, 1, 64, 2, d_ff=128, tile=64)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for tokens in (4096, 8192):
        ids = torch.randint(0, vocab, (1, tokens))
        with pyckpt.measure.memory(model) as m:
            model.loss(ids).backward()
        peaks.append(m.peak_bytes)
    assert (peaks[1] - peaks[0]) / 4096 < vocab * 4 / 4, "a quarter of one row of logits for each token is too much"


def test_cast_weights_of_the_mlp_are_gone_before_attentions_gradients(monkeypatch):
    """Under autocast, as what is made of packed ones: of one block of a segment at a time, and none outlives it."""
    made: list[dict[str, Any]] = []
    alive: list[set[str]] = []
    cast, backward = StandardTokenwise.cast, DenseAttend.backward

    def noted(self: Any, w: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        assert not any(ref() is not None for refs in made for ref in refs.values())
        found = cast(self, w, dtype)
        made.append({n: weakref.ref(t) for n, t in found.items() if t.dtype == dtype})
        return found

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        alive.append({n for n, ref in made[-1].items() if ref() is not None})
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(StandardTokenwise, "cast", noted)
    monkeypatch.setattr(DenseAttend, "backward", seen)
    stack = pyckpt.CkptTransformer([pyckpt.CkptTransformerBlock(32, 2, d_ff=48) for _ in range(3)], segments=2)
    x = torch.randn(1, 20, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = stack(x)
    y.sum().backward()
    assert len(made) == 3 + 1 + 3  # ahead; again, of the one segment's first block; back
    assert alive == [{f"self_attn.{n}_proj.weight" for n in "qkv"}] * 3
