"""The streamed executor against the resident one: exact for every option, flat in memory, safe when it is disturbed."""

from __future__ import annotations

import copy
import gc
import math
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from blocks import OPTIONS, assert_as_good, assert_same_bits, make_block, make_input, plain_twin, relative_errors, step
from helpers import a_few
from lanes import DelayedStore
from test_model import loss_and_grads, make_lm

import pyckpt
from pyckpt.compare.baseline import PlainCausalLM
from pyckpt.exec.schedule import Advance, Back, by_segments, by_slots, without_gradient
from pyckpt.store import mapped

# Sums of about a hundred terms in another order: some hundred units in the last place of a float64; times ten for
# gradients that nearly cancel.
ROUNDING = 1e-12
VOCAB = 50


def stream(tile: int = 7, store="host", **options) -> pyckpt.Stream:
    return pyckpt.Stream(tile, store, **options)


def streamed_stack(stack, **options):
    """The stack as a module whose call is streamed, for `step`."""

    class Streamed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = stack

        def named_parameters(self, *args, **kwargs):
            return stack.named_parameters(*args, **kwargs)

        def forward(self, x, positions=None, cu_seqlens=None):
            return stack(x, positions, cu_seqlens, stream=stream(**options))

    return Streamed()


def assert_exact(got, want):
    assert max(relative_errors(got, want).values()) < ROUNDING


# --- exact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("packed", a_few([False, True], always=(1,)), ids=["batched", "packed"])
def test_a_stack_equals_the_resident_one_for_every_option(options, packed):
    stack = pyckpt.CkptTransformer([make_block(**options) for _ in range(2)])
    x, cu = make_input(packed)
    dy = torch.randn_like(x)
    want = step(stack, x, dy, cu)
    for tile in (9, 1000):
        assert_exact(step(streamed_stack(stack, tile=tile), x, dy, cu), want)


@pytest.mark.parametrize("save", pyckpt.SAVE_SETS)
@pytest.mark.parametrize("options", [{}, {"causal": False, "qk_norm": True, "mlp": "gelu"}], ids=["causal", "full"])
def test_save_sets_and_segments_give_the_same_bits(save, options):
    stack = pyckpt.CkptTransformer([make_block(torch.float32, **options) for _ in range(3)])
    x, cu = make_input(packed=True, dtype=torch.float32)
    dy = torch.randn_like(x)
    want = step(streamed_stack(stack, tile=17), x, dy, cu)
    for block in stack:
        block.save = save
    for segments, store in ((None, "file"), (2, "host"), (9, "file")):
        stack.segments = segments
        assert_same_bits(step(streamed_stack(stack, tile=17, store=store), x, dy, cu), want)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm": "layernorm", "mlp": "gelu", "window": 9}], ids=["llama", "layernorm"])
def test_a_language_model_equals_the_resident_one(tie, options):
    model = make_lm(tie_embeddings=tie, **options)
    tokens = torch.randint(0, VOCAB, (2, 19))
    labels = tokens.clone()
    labels[0, 3:7] = -100
    packed = {"cu_seqlens": torch.tensor([0, 4, 4, 5, 19, 38], dtype=torch.int32)}
    positions = {"positions": torch.randint(0, 99, (2, 19))}
    extras = {"softcap": 5.0, "z_loss": 1e-3, "label_smoothing": 0.1, "reduction": "sum"}
    weighed = {"token_weight": torch.rand(2, 19), "class_weight": torch.rand(VOCAB)}
    flat = {"token_weight": torch.rand(38)}
    for args, kwargs in (
        ((tokens,), {}),
        ((tokens, labels), extras),
        ((tokens, labels), weighed),
        ((tokens,), positions),
        ((tokens.flatten(), labels.flatten()), packed | flat),
    ):
        want = loss_and_grads(model, *args, **kwargs)
        for tile in (7, 19, 64):
            assert_exact(loss_and_grads(model, *args, **kwargs, stream=stream(tile)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_pytorchs_own(dtype):
    """At a length that does not divide by the tile."""
    model = make_lm(dtype)
    sizes = {"vocab_size": VOCAB, "n_layers": 5, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
    plains = [PlainCausalLM(**sizes, dtype=d) for d in (dtype, torch.float64)]
    for plain in plains:
        plain.load_state_dict(model.state_dict())
    draws = [torch.randint(0, VOCAB, (1, 131)) for _ in range(6)]

    def results(model, **kwargs):
        grads = loss_and_grads(model, draws[0], **kwargs)
        with torch.no_grad():
            return grads | {"loss": torch.stack([model.loss(tokens, **kwargs) for tokens in draws])}

    theirs, truth = (results(plain) for plain in plains)
    assert_as_good(results(model, stream=stream(32)), theirs, truth, dtype)


def test_tiles_of_many_lengths():
    block = make_block()
    stack = pyckpt.CkptTransformer([block])
    x, _ = make_input(packed=False)
    dy = torch.randn_like(x)
    want = step(stack, x, dy)
    for tile in (1, 2, 24, 25, 26, 49, 50, 51):
        for inner in (None, 5):  # the tokenwise parts' own tile, inside
            block.tile = inner
            assert_exact(step(streamed_stack(stack, tile=tile), x, dy), want)


@pytest.mark.parametrize("packed", a_few([False, True], always=(1,)), ids=["batched", "packed"])
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_drops_what_the_resident_executor_drops(packed, causal):
    options = {"dropout": 0.3, "attention_dropout": 0.2, "causal": causal}
    stack = pyckpt.CkptTransformer([make_block(**options), make_block(causal=causal), make_block(**options)])
    x, cu = make_input(packed)
    dy = torch.randn_like(x)
    torch.manual_seed(5)
    want = step(stack, x, dy, cu)
    for segments in (None, 2):
        stack.segments = segments
        torch.manual_seed(5)
        assert_exact(step(streamed_stack(stack, tile=9), x, dy, cu), want)


def test_autocast():
    """Products and attention in bf16, the residual stream and gradients in float32: as near the truth as resident."""
    stack = pyckpt.CkptTransformer([make_block(torch.float32) for _ in range(2)])
    x, dy = torch.randn(2, 131, 48), torch.randn(2, 131, 48)
    plain = torch.nn.Sequential(*(plain_twin(block, torch.float64) for block in stack))
    leaf = x.double().requires_grad_()
    y = plain(leaf)
    params = [dict(p.named_parameters()) for p in plain]
    names = [f"{i}.{n}" for i, p in enumerate(params) for n in p]
    grads = torch.autograd.grad(y, [leaf, *(t for p in params for t in p.values())], dy.double())
    truth = {"y": y.detach(), "dx": grads[0], **dict(zip(names, grads[1:], strict=True))}

    def cast_step(module):
        leaf, params = x.clone().requires_grad_(), dict(module.named_parameters())
        with torch.autocast("cpu", torch.bfloat16):
            y = module(leaf)
        grads = torch.autograd.grad(y, [leaf, *params.values()], dy)
        return {"y": y.detach(), "dx": grads[0], **dict(zip(params, grads[1:], strict=True))}

    got, resident = cast_step(streamed_stack(stack, tile=32)), cast_step(stack)
    assert {t.dtype for t in got.values()} == {torch.float32}
    assert_as_good(got, resident, {n: truth[n] for n in got}, torch.float32)
    assert min(relative_errors(got, truth).values()) > 1e-4, "this was not computed in bf16"


def test_autocast_of_a_language_model():
    model = make_lm(torch.float32)
    tokens = torch.randint(0, VOCAB, (2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        resident, got = (loss_and_grads(model, tokens, **kwargs) for kwargs in ({}, {"stream": stream(16)}))
    truth = loss_and_grads(copy.deepcopy(model).double(), tokens)
    assert_as_good(got, resident, truth, torch.bfloat16)
    assert max(relative_errors(got, truth).values()) > 1e-3, "this was not computed in bf16"


def test_a_generic_block():
    pre_in, post_in = torch.nn.Linear(12, 36, dtype=torch.float64), torch.nn.Linear(24, 12, dtype=torch.float64)

    class Pre(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pre_in

        def forward(self, x, positions):
            return self.inner(x).split(12, dim=-1)

    class Post(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = post_in

        def forward(self, x, o):
            return x + self.inner(torch.cat([x, o], dim=-1)).tanh()

    stack = pyckpt.CkptTransformer([pyckpt.CkptGenericBlock(Pre(), Post(), 12, 3) for _ in range(2)])  # weights shared
    x, dy = torch.randn(2, 17, 12, dtype=torch.float64), torch.randn(2, 17, 12, dtype=torch.float64)
    assert_exact(step(streamed_stack(stack), x, dy), step(stack, x, dy))


# --- what autograd and users see ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["embed", "head", "norm", "layers.2", "layers.0.mlp", "layers.4.self_attn.q"])
@pytest.mark.parametrize("segments", a_few([None, 2], always=(1,)))
def test_frozen_weights(trained, segments):
    model = make_lm(torch.float32)
    model.set_segments(segments)
    tokens = torch.randint(0, VOCAB, (2, 19))
    whole = loss_and_grads(model, tokens, stream=stream())
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name and (trained != "norm" or name == "model.norm.weight"))
    got = loss_and_grads(model, tokens, stream=stream())
    assert torch.equal(got["loss"], whole["loss"])
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, whole[name]) if p.requires_grad else p.grad is None, name


def test_frozen_parts_skip_their_work():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model):
        with FlopCounterMode(display=False) as counter:
            model.loss(tokens, stream=stream()).backward()
        return counter.get_total_flops()

    model, tokens = make_lm(torch.float32), torch.randint(0, VOCAB, (2, 19))
    full = flops(model)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert full - flops(model) == 2 * 38 * 32 * 48
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with torch.no_grad():
        forward = flops_forward = flops_of_forward(model, tokens)
    assert flops(model) == forward + 2 * 38 * 32 * VOCAB, flops_forward


def flops_of_forward(model, tokens):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, stream=stream())
    return counter.get_total_flops()


def test_streaming_costs_no_further_products():
    """FLOPs of a step: those of the resident executor, for the attention of visible tiles alone."""
    from torch.utils.flop_counter import FlopCounterMode

    stack, (x, cu) = pyckpt.CkptTransformer([make_block(torch.float32, tile=7)]), make_input(False, torch.float32)
    counts = []
    for module in (stack, streamed_stack(stack)):
        with FlopCounterMode(display=False) as counter:
            module(x, cu_seqlens=cu).sum().backward()
        flops = counter.get_flop_counts()["Global"]
        counts.append(sum(n for op, n in flops.items() if "attention" not in str(op)))
    assert counts[0] == counts[1] > 0


def test_bitwise_the_same_over_runs_and_stores(tmp_path):
    model = make_lm(torch.float32)
    tokens = torch.randint(0, VOCAB, (1, 61))
    kept = stream(16, "file", path=tmp_path)
    streams = [stream(16), stream(16), stream(16, "device"), kept, kept, stream(16, DelayedStore(3))]
    first, *others = (loss_and_grads(model, tokens, stream=s) for s in streams)
    for other in others:
        assert_same_bits(first, other)


def test_no_grad_keeps_nothing():
    model = make_lm(torch.float32)
    tokens = torch.randint(0, VOCAB, (1, 61))
    with torch.no_grad():
        loss = model.loss(tokens, stream=stream())
    assert loss.grad_fn is None
    assert torch.equal(loss, model.loss(tokens, stream=stream()).detach())


def test_a_loss_that_is_dropped_gives_its_store_back():
    model, kept = make_lm(torch.float32), stream(store="file")
    loss = model.loss(torch.randint(0, VOCAB, (1, 61)), stream=kept)
    session = weakref.ref(loss.grad_fn.session)
    assert kept.store._idle is None
    gc.collect()
    gc.disable()
    try:
        del loss
        assert session() is None
        assert kept.store._idle is not None
    finally:
        gc.enable()


def test_hooks_fire_once_and_gradients_accumulate():
    model = make_lm(torch.float32)
    tokens, calls = torch.randint(0, VOCAB, (1, 61)), []
    once = loss_and_grads(model, tokens, stream=stream())
    for name, p in model.named_parameters():
        p.grad = None
        p.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    losses = [model.loss(tokens, stream=stream()) for _ in range(2)]  # two runs at a time
    sum(losses).backward()
    assert sorted(calls) == sorted(n for n, _ in model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, 2 * once[name])


@pytest.mark.parametrize("reduction", a_few(["mean", "none"], always=(1,)))
@pytest.mark.parametrize("store", a_few(["host", "file"], always=(1,)))
def test_a_graph_that_is_retained_is_run_again(reduction, store):
    """Also with dropout, whose seeds are those of the first run; beside another graph whose store is open."""
    model = make_lm(torch.float32, dropout=0.2)
    tokens, kept = torch.randint(0, VOCAB, (1, 61)), stream(store=store)
    loss, other = (model.loss(tokens, stream=kept, reduction=reduction) for _ in range(2))
    upstream, params = torch.randn_like(loss), list(model.parameters())

    def grads(of, **options):
        return dict(enumerate(torch.autograd.grad(of, params, upstream, **options)))

    first = grads(loss, retain_graph=True)
    assert_same_bits(grads(loss, retain_graph=True), first)
    drops_others = grads(other)
    assert any(not torch.equal(g, first[i]) for i, g in drops_others.items())
    assert_same_bits(grads(loss), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        grads(loss)


def test_a_stack_that_is_retained_is_run_again():
    stack = pyckpt.CkptTransformer([make_block(torch.float32) for _ in range(2)])
    x = torch.randn(1, 33, 48, requires_grad=True)
    y, dy = stack(x, stream=stream()), torch.randn(1, 33, 48)
    wanted = [x, *stack.parameters()]
    twice = [dict(enumerate(torch.autograd.grad(y, wanted, dy, retain_graph=True))) for _ in range(2)]
    assert_same_bits(*twice)


@pytest.mark.parametrize("trained", ["", "lm_head", "model.norm", "embed", "layers.2", "lm_head|model.norm", "tied"])
def test_losses_of_single_tokens(trained):
    """Each with an upstream gradient of its own, as policy gradients have it."""
    model = make_lm(tie_embeddings=trained == "tied")
    trained = trained.replace("tied", "")
    for name, p in model.named_parameters():
        p.requires_grad_(re.search(trained, name) is not None)
    tokens = torch.randint(0, VOCAB, (2, 19))
    labels = tokens.clone()
    labels[0, 3:7] = -100
    upstream, options = torch.randn(2, 19, dtype=torch.float64), {"softcap": 5.0, "z_loss": 1e-3, "reduction": "none"}
    options["token_weight"] = torch.rand(2, 19)

    def results(**kwargs):
        model.zero_grad()
        losses = model.loss(tokens, labels, **options, **kwargs)
        assert losses.shape == (2, 19)
        losses.backward(upstream)
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {"losses": losses.detach(), **grads}

    want = results()
    for tile in (7, 64):
        assert_exact(results(stream=stream(tile)), want)


def test_double_backward_is_a_clear_error():
    model = make_lm(torch.float32)
    loss = model.loss(torch.randint(0, VOCAB, (1, 61)), stream=stream())
    with pytest.raises(RuntimeError, match="double backward through a streamed run is not supported"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("how", ["frozen", "no_grad", "trained"])
def test_forward_mode_is_a_clear_error(how):
    """Also where there is no node, which would know of the tangent."""
    stack = pyckpt.CkptTransformer([make_block(torch.float32)]).requires_grad_(how != "frozen")
    x, dual = make_input(False, torch.float32)[0], torch.autograd.forward_ad
    with dual.dual_level(), pytest.raises(RuntimeError, match="does not support forward-mode differentiation"):
        x = dual.make_dual(x, torch.ones_like(x))
        with torch.set_grad_enabled(how != "no_grad"):
            stack(x, stream=stream())


@pytest.mark.parametrize("kind", ["together", "by block"])
def test_a_batch_of_gradients_is_refused_in_words(kind):
    stack = pyckpt.CkptTransformer([make_block(torch.float32)])
    y = stack(make_input(False, torch.float32)[0], stream=stream(gradients=kind))
    with pytest.raises(RuntimeError, match="a streamed run takes one gradient at a time"):
        torch.autograd.grad(y, list(stack.parameters()), torch.randn(3, *y.shape), is_grads_batched=True)


def test_in_place_change_of_a_weight_is_caught():
    model = make_lm(torch.float32)
    loss = model.loss(torch.randint(0, VOCAB, (1, 61)), stream=stream())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_trains():
    torch.manual_seed(0)
    model = pyckpt.CkptCausalLM(VOCAB, 2, 32, 4, d_ff=48)
    tokens = torch.arange(40).remainder(8).repeat(2, 1)
    optimizer, kept = torch.optim.AdamW(model.parameters(), lr=5e-3), stream(16)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.loss(tokens, stream=kept)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5


# --- memory ------------------------------------------------------------------------------------------------------


def step_peak(model, tokens: int, **options) -> int:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ids = torch.randint(0, VOCAB, (1, tokens))
    kept = stream(64, "file", **options)
    with pyckpt.measure.memory(model) as m:
        model.loss(ids, stream=kept).backward()
    assert m.saved_bytes == 0
    return m.peak_bytes


@pytest.mark.parametrize(
    "options",
    a_few([{}, {"window": 100, "softcap": 3.0}, {"save": "input", "segments": 2, "mlp": "gelu"}], always=(1,)),
    ids=str,
)
def test_the_peak_does_not_grow_with_the_length_at_all(options):
    model = pyckpt.CkptCausalLM(VOCAB, 2, 64, 4, n_kv_heads=2, d_ff=96, **options)
    peaks = [step_peak(model, tokens) for tokens in (256, 512, 1024)]
    assert len(set(peaks)) == 1, peaks


def test_the_peak_does_not_grow_with_the_depth():
    """But for the weights' gradients, which are handed over all at once."""
    peaks = []
    for depth in (2, 6):
        model = pyckpt.CkptCausalLM(VOCAB, depth, 64, 4, d_ff=96)
        peaks.append(step_peak(model, 256) - sum(p.nbytes for p in model.parameters()))
    assert peaks[1] - peaks[0] <= 0


def test_store_bytes_by_arithmetic():
    """x, o, lse of each block; the output's gradient; k, v and their float32 gradients of one block."""
    model = pyckpt.CkptCausalLM(VOCAB, 3, 64, 4, n_kv_heads=2, d_ff=96)
    tokens = 640
    per_token = 4 * (3 * (64 + 64 + 4) + 64 + 2 * 32 + 2 * 32)
    limit = per_token * tokens
    model.loss(torch.randint(0, VOCAB, (1, tokens)), stream=stream(64, limit=limit)).backward()
    store = pyckpt.store.HostStore()  # a limit of the store alone
    opened = []
    store.check = lambda plan: opened.append(plan.store_bytes)
    model.loss(torch.randint(0, VOCAB, (1, tokens)), stream=stream(64, store))
    assert opened == [limit]


def test_a_limit_in_words():
    assert pyckpt.Stream(limit="1.5 GiB").store.limit == 3 << 29
    with pytest.raises(ValueError, match="limit='much': expected a number of bytes above 0, or text such as '20GiB'"):
        pyckpt.Stream(limit="much")


def test_a_limit_keeps_less_and_changes_no_gradient():
    """x, o and lse; x alone; ever fewer x; and below the least possible a refusal that names it."""
    model = pyckpt.CkptCausalLM(VOCAB, 7, 32, 4, d_ff=48)
    tokens, used = torch.randint(0, VOCAB, (1, 61)), []
    want = loss_and_grads(model, tokens, stream=stream(8))

    class Noting(pyckpt.store.HostStore):
        def open(self, plan, device):
            used.append(plan.store_bytes)
            return super().open(plan, device)

    x = 4 * 32 * 61
    rest = x + 2 * x + 2 * x  # the gradient; k, v; dk, dv
    best = 7 * (2 * x + 4 * 4 * 61) + rest
    for limit, fits in ((best, best), (best - 1, 7 * x + rest), (6 * x + rest, 6 * x + rest)):
        assert_same_bits(loss_and_grads(model, tokens, stream=stream(8, Noting(limit))), want)
        assert used[-1] == fits
    least = int(re.search(r"at least ([\d,]+) bytes", str(refused(model, tokens, x)))[1].replace(",", ""))
    assert_same_bits(loss_and_grads(model, tokens, stream=stream(8, Noting(least))), want)
    assert used[-1] == least <= 3 * x + rest
    refused(model, tokens, least - 1)


def refused(model, tokens, limit: int) -> Exception:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="needs at least") as error:
        model.loss(tokens, stream=stream(8, limit=limit))
    assert torch.equal(torch.get_rng_state(), state)
    return error.value


@pytest.mark.parametrize(("blocks", "slots", "repeats"), [(10, 10, 0), (10, 3, 6), (10, 1, 36), (2, 1, 0), (32, 4, 44)])
def test_the_binomial_schedule(blocks, slots, repeats):
    """Its repeats are those of the closed form (Griewank and Walther 2000, equation 3), less the one forward."""
    schedule = by_slots(blocks, slots)
    again = [s for s in schedule.backward if isinstance(s, Advance)]
    # t(l, c) = r l - C(c + r, r - 1), with C(c + r - 1, c) < l <= C(c + r, c), counts all that is run forward.
    r = next(r for r in range(blocks + 1) if math.comb(slots + r, slots) >= blocks)
    assert len(again) == repeats == r * blocks - math.comb(slots + r, r - 1) - (blocks - 1)
    assert [s.block for s in schedule.backward if isinstance(s, Back)] == list(reversed(range(blocks)))
    kept, most = set(), 0
    for move in (Advance(-1, keep=False, drop=True), *schedule):
        assert move.block in kept or move.block == -1, "its input was dropped"
        if isinstance(move, Advance):
            kept.add(move.block + 1)
        most = max(most, len(kept - {blocks}))
        if isinstance(move, Back) or move.drop:
            kept.discard(move.block)
    assert most <= slots + 2


@pytest.mark.parametrize("usable", [True, False], ids=["mapped", "copied"])
def test_an_estimate_bounds_the_peak_before_anything_runs(usable, monkeypatch):
    """Above weights' gradients; the store's bytes are exact."""
    monkeypatch.setattr(mapped, "USABLE", usable and mapped.USABLE)
    for options in ({}, {"save": "input", "n_kv_heads": 1}, {"mlp": "gelu", "segments": 2}):
        model = pyckpt.CkptCausalLM(VOCAB, 3, 64, 4, d_ff=128, **options)
        opened = []
        store = pyckpt.store.FileStore()
        store.check = lambda plan, opened=opened: opened.append(plan.store_bytes)
        kept = stream(128, store)
        found = kept.estimate(model, 512)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        handed_over = sum(p.nbytes for p in model.parameters())
        with pyckpt.measure.memory(model) as m:
            model.loss(torch.randint(0, VOCAB, (1, 512)), stream=kept).backward()
        assert opened == [found.store_bytes]
        assert 0.3 * found.device_bytes < m.peak_bytes <= found.device_bytes + handed_over
        assert found.seconds(1e9) == pytest.approx(found.flops / 1e9)
        if not mapped.USABLE:
            assert found.bytes_in > found.bytes_out > 0
            assert found.seconds(1e30, 1e6) == pytest.approx(found.bytes_in / 1e6)
        assert "in the file store" in str(found)
    with pytest.raises(ValueError, match="needs at least"):
        stream(128, limit=100).estimate(model, 512)


@pytest.mark.parametrize("save", a_few(["attention", "attention+qkv", "attention+mid", "all", "input"], always=(0, 3)))
def test_estimated_flops_are_those_counted(save):
    """But for attention, which the counter counts without its mask, and the norms, which it doesn't count."""
    from torch.utils.flop_counter import FlopCounterMode

    for options in (
        {"save": save},
        {"save": save, "segments": 3, "mlp": "gelu"},
        {"save": save, "norm_placement": "sandwich", "qk_norm": True},
        {"save": save, "residual": "parallel"},
    ):
        model = pyckpt.CkptCausalLM(VOCAB, 3, 64, 4, n_kv_heads=2, d_ff=128, window=1, **options)
        with FlopCounterMode(display=False) as counter:
            model.loss(torch.randint(0, VOCAB, (1, 512)), stream=stream(128)).backward()
        counts = counter.get_flop_counts()["Global"]
        products = sum(n for op, n in counts.items() if "attention" not in str(op))
        assert stream(128).estimate(model, 512).flops == pytest.approx(products, rel=0.02)


@pytest.mark.parametrize("trained", ["all", "head", "norm", "layers.2", "none"])
def test_estimates_do_not_depend_on_the_gradient_mode(trained):
    """And count forward and backward of what is trained, the head's products too."""
    from torch.utils.flop_counter import FlopCounterMode

    model = pyckpt.CkptCausalLM(VOCAB, 3, 64, 4, d_ff=128, window=1)
    for name, p in model.named_parameters():
        p.requires_grad_(trained == "all" or (trained in name and (trained != "norm" or name == "model.norm.weight")))
    found = stream(128).estimate(model, 512)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert stream(128).estimate(model, 512) == found
    with FlopCounterMode(display=False) as counter:
        loss = model.loss(torch.randint(0, VOCAB, (1, 512)), stream=stream(128))
        if loss.requires_grad:
            loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    assert found.flops == pytest.approx(products, rel=0.02)


def test_estimates_of_a_stack():
    stack = pyckpt.CkptTransformer([pyckpt.CkptTransformerBlock(64, 4, d_ff=128) for _ in range(3)])
    opened, store = [], pyckpt.store.FileStore()
    store.check = lambda plan: opened.append(plan.store_bytes)
    kept = stream(128, store)
    found = kept.estimate(stack, 512, 2)
    for p in stack.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randn(2, 512, 64, requires_grad=True)
    with pyckpt.measure.memory(stack) as m:
        y = stack(x, stream=kept)
        y.backward(torch.ones_like(y))
    assert opened == [found.store_bytes]
    beside = 3 * x.nbytes + sum(p.nbytes for p in stack.parameters())  # y, dy, dx, and gradients handed over
    assert 0.3 * found.device_bytes < m.peak_bytes <= found.device_bytes + beside
    trained, frozen = stack.requires_grad_(True), copy.deepcopy(stack).requires_grad_(False)
    assert kept.estimate(frozen, 512).device_bytes < kept.estimate(trained, 512).device_bytes
    assert kept.estimate(frozen, 512).flops < kept.estimate(trained, 512).flops


@pytest.mark.parametrize("mapped_files", [True, False])
def test_estimates_count_what_a_store_takes_of_the_device(mapped_files, monkeypatch):
    """All tiles where they lie in its memory, a ring where they are copied, nothing where a file is mapped."""
    if mapped_files and not mapped.USABLE:
        pytest.skip("files are not mapped here")
    monkeypatch.setattr(mapped, "USABLE", mapped_files)
    stack = pyckpt.CkptTransformer([pyckpt.CkptTransformerBlock(64, 4, d_ff=128) for _ in range(2)])
    found = {kind: stream(64, kind).estimate(stack, 2048) for kind in pyckpt.store.STORES}
    beside = found["device"].device_bytes - found["device"].store_bytes
    assert found["host"].device_bytes == found["device"].device_bytes and found["host"].bytes_in == 0
    ring = found["file"].device_bytes - beside
    if mapped_files:
        assert ring == found["file"].bytes_in == found["file"].bytes_out == 0
    else:
        assert 0 < ring < found["file"].store_bytes and found["file"].bytes_in > found["file"].bytes_out > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.nn.Linear(3, 3), 512), "this Linear has nothing that can be streamed as one run: expected a"),
        ((None, 512), "this NoneType has nothing that can be streamed"),
        ((None, 0), "tokens=0: expected a positive whole number"),
        ((None, 512, 1.5), "batch=1.5: expected a positive whole number"),
    ],
)
def test_estimates_of_what_cannot_be_streamed(given, message):
    with pytest.raises(ValueError, match=message):
        stream(128).estimate(*given)


# --- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("options", [{}, {"save": "attention+qkv", "segments": 2}], ids=["plain", "segments"])
@pytest.mark.parametrize("orders", a_few([25, 100], always=(0,)))
def test_orders_of_delayed_copies_change_no_gradient(orders, options):
    torch.manual_seed(1)
    model = pyckpt.CkptCausalLM(VOCAB, 2, 16, 2, n_kv_heads=1, d_ff=16, **options)
    tokens = torch.randint(0, VOCAB, (1, 14))
    want = loss_and_grads(model, tokens, stream=stream(4))
    for seed in range(orders):
        assert_same_bits(loss_and_grads(model, tokens, stream=stream(4, DelayedStore(seed))), want)


@pytest.mark.usefixtures("unpoisoned")
def test_delayed_copies_without_a_causal_mask():
    torch.manual_seed(1)
    stack = pyckpt.CkptTransformer([make_block(torch.float32, causal=False, window=(5, 3)) for _ in range(2)])
    x, _ = make_input(False, torch.float32)
    dy = torch.randn_like(x)
    want = step(streamed_stack(stack, tile=9), x, dy)
    for seed in range(20):
        assert_same_bits(step(streamed_stack(stack, tile=9, store=DelayedStore(seed)), x, dy), want)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts: a job that a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["embed", "forward", "head", "backward"])
@pytest.mark.parametrize("store", a_few(["host", "file"], always=(1,)))
def test_ctrl_c_between_tiles_changes_nothing(where, store, tmp_path, interruptible):
    model = make_lm(torch.float32)
    tokens = torch.randint(0, VOCAB, (1, 61))
    path = tmp_path if store == "file" else None
    want = loss_and_grads(model, tokens, stream=stream(store=store, path=path))
    seen = []

    def interrupt(what, block, tile):
        seen.append((what, block, tile))
        if what == where and tile == 2:
            os.kill(os.getpid(), signal.SIGINT)

    kept = stream(store=store, path=path, progress=interrupt)
    model.zero_grad(set_to_none=True)
    with pytest.raises(KeyboardInterrupt):
        model.loss(tokens, stream=kept).backward()
    assert seen[-1][0] == where
    assert all(p.grad is None for p in model.parameters())
    kept.progress = None
    assert_same_bits(loss_and_grads(model, tokens, stream=kept), want)
    assert os.listdir(tmp_path) == []


CHANGED = {
    "tokens": ("mean", False),
    "positions": ("mean", False),
    "cu_seqlens": ("mean", False),
    "labels": ("none", False),
    "labels, again": ("mean", True),  # a second backward runs the forward again
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_was_written_to_before_the_backward_is_an_error(what):
    """As it is to autograd, which would have saved it: the backward would be of another input."""
    (reduction, again), name = CHANGED[what], what.split(",")[0]
    model, length = make_lm(), 37
    tokens = torch.randint(model.vocab_size, (1, length))
    given = {
        "positions": torch.arange(length),
        "cu_seqlens": torch.tensor([0, 10, length], dtype=torch.int32),
        "labels": tokens.clone(),
    }
    arguments = {} if name == "tokens" else {name: given[name]}
    tokens = tokens.view(-1) if name == "cu_seqlens" else tokens
    loss = model.loss(tokens, **arguments, stream=stream(), reduction=reduction).sum()
    if again:
        loss.backward(retain_graph=True)
    {"tokens": tokens, **given}[name][..., 1:-1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation after its forward"):
        loss.backward()


def test_x_of_a_stack_is_read_again_by_a_second_backward_alone():
    stack = pyckpt.CkptTransformer([make_block() for _ in range(2)])
    x = make_input(False)[0]
    y = stack(x, stream=stream())
    x += 1
    dy, weights = torch.randn_like(y), list(stack.parameters())
    torch.autograd.grad(y, weights, dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation after its forward"):
        torch.autograd.grad(y, weights, dy)


@pytest.mark.parametrize("gradients", ["together", "by block"])
def test_a_loss_keeps_no_scratch_after_its_backward(gradients, interruptible):
    """Nor after one that was interrupted."""
    model = make_lm()
    for p in (model.model.embed_tokens.weight, model.lm_head.weight, model.model.norm.weight):
        p.requires_grad_(False)
    tokens = torch.randint(model.vocab_size, (1, 37))
    for stop in (False, True):

        def progress(what, block, tile, stop=stop):
            if stop and what == "backward":
                raise KeyboardInterrupt

        loss = model.loss(tokens, stream=stream(gradients=gradients, progress=progress))
        session = loss.grad_fn.session
        run = weakref.ref(session._run)
        del session
        try:
            loss.backward()
        except KeyboardInterrupt:
            assert stop
        gc.collect()
        assert run() is None


@pytest.mark.parametrize("gradients", ["together", "by block"])
def test_a_graph_that_lives_on_keeps_no_gradient_of_x(gradients):
    stack = pyckpt.CkptTransformer([make_block(torch.float32)])
    x, freed = torch.randn(1, 33, 48, requires_grad=True), []
    y = stack(x, stream=stream(gradients=gradients))
    y.sum().backward()
    weakref.finalize(x.grad.untyped_storage(), freed.append, True)
    x.grad = None
    assert freed and y.grad_fn is not None


def test_progress_names_every_tile():
    model, seen = make_lm(torch.float32), []
    kept = stream(10, progress=lambda *at: seen.append(at))
    model.loss(torch.randint(0, VOCAB, (1, 25)), stream=kept).backward()
    forward = [("forward", b, t) for b in range(5) for t in range(3)]
    backward = [("backward", b, t) for b in reversed(range(5)) for t in reversed(range(3))]
    ends = [[(what, 0, t) for t in range(3)] for what in ("embed", "head")]
    assert seen == ends[0] + forward + ends[1] + backward


def test_a_kill_in_the_middle_of_a_step_leaves_nothing(tmp_path):
    script = (
        "import os, sys, torch, pyckpt\n"
        "die = lambda what, block, tile: os.kill(os.getpid(), 9) if what == 'backward' and tile == 1 else None\n"
        "model = pyckpt.CkptCausalLM(50, 2, 16, 2, d_ff=16)\n"
        "stream = pyckpt.Stream(8, 'file', path=sys.argv[1], progress=die)\n"
        "model.loss(torch.randint(0, 50, (1, 40)), stream=stream).backward()"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=os.getcwd(), check=False)
    assert ended.returncode == -9
    assert os.listdir(tmp_path) == []


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [0, -4, 1.5, True, None, 1 << 21])
def test_a_bad_tile(tile):
    with pytest.raises(ValueError, match="tile must be"):
        pyckpt.Stream(tile)


def test_bad_settings_are_refused_at_once():
    for tile in ("4", None, 1 << 21):
        with pytest.raises(ValueError, match=r"tile must be an int of 1 to 1,048,576 \(tokens\), got"):
            pyckpt.Stream(tile)
    for progress in ("x", 3):
        with pytest.raises(TypeError, match=r"progress must be None or a function of \(part, block, tile\), got"):
            pyckpt.Stream(progress=progress)
    for limit in (0, "0", -1, 1.5, True):
        with pytest.raises(ValueError, match=r"limit=.*: expected a number of bytes above 0"):
            pyckpt.Stream(limit=limit)
    assert pyckpt.Stream(np.int64(4), limit=np.int64(1000)).store.limit == 1000


@pytest.mark.parametrize("where", ["embed_tokens", "layers", "layers.1"])
@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward"])
def test_hooks_that_would_not_run_are_told(where, kind):
    """They may change what goes through, and nothing does."""
    model = make_lm()
    getattr(model.model.get_submodule(where), f"register_{kind}_hook")(lambda *_: None)
    named = where.replace("layers.", "block ")
    with pytest.raises(ValueError, match=f"{named} has hooks, and in a streamed run they would see no hidden states"):
        model.loss(torch.randint(model.vocab_size, (1, 9)), stream=stream())
    if where == "layers.1":
        with pytest.raises(ValueError, match="block 1 has hooks"):
            model.model.layers(torch.randn(1, 9, model.spec.d_model, dtype=torch.float64), stream=stream())


def test_bad_arguments_are_refused_before_anything_runs():
    model, tokens = make_lm(torch.float32), torch.randint(0, VOCAB, (1, 20))
    with pytest.raises(TypeError, match=r"stream must be a pyckpt\.Stream, got str"):
        model.loss(tokens, stream="host")
    with pytest.raises(ValueError, match="reduction='all' does not exist; expected one of mean, sum, none"):
        model.loss(tokens, stream=stream(), reduction="all")
    with pytest.raises(ValueError, match="recompute=True is not for a streamed loss"):
        model.loss(tokens, stream=stream(), recompute=True)
    with pytest.raises(ValueError, match="store='disk' does not exist"):
        pyckpt.Stream(store="disk")
    with pytest.raises(ValueError, match="is out of range"):
        model.loss(tokens + VOCAB, stream=stream())
    with pytest.raises(ValueError, match="x must be"):
        pyckpt.CkptTransformer([make_block()])(torch.randn(3), stream=stream())
    mixed = pyckpt.CkptTransformer([make_block(), make_block(head_dim=20)])
    with pytest.raises(ValueError, match="block 1 has k of width 40, an earlier one of 24"):
        mixed(torch.randn(1, 9, 48, dtype=torch.float64), stream=stream())


def test_schedules():
    assert [type(s).__name__[0] + str(s.block) for s in by_segments(3, 1)] == ["A0", "A1", "A2", "B2", "B1", "B0"]
    forward = ["A0", "A1", "A2", "A3", "A4"]
    backward = ["B4", "A2", "B3", "B2", "A0", "B1", "B0"]
    assert [type(s).__name__[0] + str(s.block) for s in by_segments(5, 2)] == forward + backward
    assert not without_gradient(4).backward
