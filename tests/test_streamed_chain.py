"""`Stream(gradients="by block")`: each block's gradients as soon as they are made, the same bits as all together."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from blocks import assert_same_bits, make_block, make_input, randomise, step
from helpers import a_few
from test_model import OPTIONS, SIZES, loss_and_grads
from test_streamed import streamed_stack

import pyckpt

VOCAB = 50
KINDS = ("together", "by block")


def stream(gradients: str = "by block", tile: int = 7, store: Any = "host", **options: Any) -> pyckpt.Stream:
    return pyckpt.Stream(tile, store, gradients=gradients, **options)


def make_lm(dtype: torch.dtype, n_layers: int = 3, **options: Any) -> pyckpt.CkptCausalLM:
    model = pyckpt.CkptCausalLM(**{**SIZES, **OPTIONS, "n_layers": n_layers, **options})
    randomise(model)
    return model.to(dtype)


def tokens_of(seq: int = 61) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, seq))


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_embeddings": True}, {"segments": 2}, {"save": "input"}, {"dropout": 0.2}, {"reduction": "none"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", a_few([torch.float32, torch.bfloat16], always=(1,)))
def test_the_same_bits_as_together(dtype, options):
    loss = {"reduction": options.pop("reduction")} if "reduction" in options else {}
    model, tokens, results = make_lm(dtype, **options), tokens_of(), []
    for kind in KINDS:
        torch.manual_seed(3)
        model.zero_grad()
        losses = model.loss(tokens, stream=stream(kind), **loss)
        losses.backward(torch.linspace(1.0, 2.0, losses.numel()).view(losses.shape))
        results.append({n: p.grad.clone() for n, p in model.named_parameters()} | {"loss": losses.detach()})
    assert_same_bits(*results)


@pytest.mark.parametrize("packed", [False, True])
def test_a_stack_gives_the_gradient_of_its_input(packed):
    stack = pyckpt.CkptTransformer([make_block(torch.float32, causal=packed) for _ in range(3)])
    x, cu = make_input(packed, dtype=torch.float32)
    dy = torch.randn_like(x)
    results = [step(streamed_stack(stack, tile=9, gradients=kind), x, dy, cu) for kind in KINDS]
    assert_same_bits(*results)


def test_a_block_that_stands_twice_in_a_stack_has_one_gradient():
    block = make_block(torch.float32)
    stack = pyckpt.CkptTransformer([block, make_block(torch.float32), block])
    x, _ = make_input(False, dtype=torch.float32)
    dy = torch.randn_like(x)
    assert_same_bits(*(step(streamed_stack(stack, tile=9, gradients=kind), x, dy) for kind in KINDS))


def test_a_block_has_its_gradients_before_the_next_one_begins():
    model, seen = make_lm(torch.float32, n_layers=3), []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    kept = stream(tile=16, progress=lambda what, block, tile: seen.append((what, block, tile)))
    model.loss(tokens_of(), stream=kept).backward()
    seen = seen[seen.index(("backward", 2, 3)) :]
    of_blocks = [[n for n, _ in model.named_parameters() if f"layers.{b}." in n] for b in range(3)]
    for block in (2, 1, 0):
        assert seen[:4] == [("backward", block, tile) for tile in (3, 2, 1, 0)]
        given = 4 + len(of_blocks[block])
        assert sorted(seen[4:given]) == sorted(of_blocks[block])
        seen = seen[given:]
    assert sorted(seen) == sorted(n for n, _ in model.named_parameters() if ".layers." not in n)


def peak_of(model: Any, tokens: torch.Tensor, kind: str) -> int:
    with pyckpt.measure.memory(model) as m:
        model.loss(tokens, stream=stream(kind, 16, "file")).backward()
    return m.peak_bytes


def test_accumulation_takes_one_blocks_gradients_beside_those_that_are_there():
    model, tokens = make_lm(torch.float32, n_layers=8), tokens_of()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    together, apart = (peak_of(model, tokens, kind) for kind in KINDS)
    block = sum(p.nbytes for n, p in model.named_parameters() if "layers.0." in n)
    # Beside the block whose sums are made, one that waits for the others of its node at most.
    assert together - apart >= 6 * block


def test_an_optimizer_in_the_backward_needs_one_blocks_gradients_at_a_time():
    """And gives the weights of one that steps after it."""
    tokens, results, peaks = tokens_of(), [], []
    for kind in KINDS:
        torch.manual_seed(5)
        model = make_lm(torch.float32, n_layers=8)

        def update(p: torch.Tensor) -> None:
            with torch.no_grad():
                p -= 0.1 * p.grad
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(update)
        peaks.append(peak_of(model, tokens, kind))
        results.append(dict(model.named_parameters()))
    assert_same_bits(*results)
    block = sum(p.nbytes for n, p in model.named_parameters() if "layers.0." in n)
    assert peaks[0] - peaks[1] >= 6 * block


@pytest.mark.parametrize("trained", ["layers.0.", "layers.1.", "layers.2.", "lm_head", "embed_tokens", "q_proj"])
def test_frozen_weights(trained):
    """Whatever is trained alone has the gradient that it has beside all others, and the store is given back."""
    model, tokens = make_lm(torch.float32, n_layers=3), tokens_of()
    whole = loss_and_grads(model, tokens, stream=stream())
    model.zero_grad()
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    kept = stream()
    loss = model.loss(tokens, stream=kept)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert_same_bits(found, {n: whole[n] for n in found})
    assert kept.store._idle is not None


def test_gradients_of_some_weights_and_of_a_graph_that_is_retained():
    model, tokens, kept = make_lm(torch.float32, n_layers=3, dropout=0.2), tokens_of(), stream()
    loss, named = model.loss(tokens, stream=kept), dict(model.named_parameters())

    def grads(names: list[str]) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(loss, [named[n] for n in names], retain_graph=True)
        return dict(zip(names, found, strict=True))

    whole = grads(list(named))
    some = [n for n in named if "layers.1." in n]
    for names in (some[:2], list(named), some, [n for n in named if "embed" in n], list(named)):
        assert_same_bits(grads(names), {n: whole[n] for n in names})
    assert kept.store._idle is not None


def test_two_losses_at_once():
    model, tokens, calls = make_lm(torch.float32), tokens_of(), []
    once = loss_and_grads(model, tokens, stream=stream())
    for name, p in model.named_parameters():
        p.grad = None
        p.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    sum(model.loss(tokens, stream=stream()) for _ in range(2)).backward()
    assert sorted(calls) == sorted(n for n, _ in model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, 2 * once[name])


def test_what_ends_in_the_middle_leaves_what_was_given():
    model, tokens = make_lm(torch.float32, n_layers=3), tokens_of()
    whole = loss_and_grads(model, tokens, stream=stream())
    model.zero_grad()

    def stop(what: str, block: int, tile: int) -> None:
        if (what, block, tile) == ("backward", 0, 2):
            raise KeyboardInterrupt

    kept = stream(store="file", progress=stop)
    with pytest.raises(KeyboardInterrupt):
        model.loss(tokens, stream=kept).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {n for n in whole if "layers.1." in n or "layers.2." in n}
    assert_same_bits(found, {n: whole[n] for n in found})
    assert kept.store._idle is not None
    kept.progress = None
    assert_same_bits(loss_and_grads(model, tokens, stream=kept), whole)


@pytest.mark.parametrize("when", ["forward", "part of a backward"])
def test_a_loss_that_is_dropped_gives_its_store_back(when):
    model, kept = make_lm(torch.float32, n_layers=3), stream(store="file")
    loss = model.loss(tokens_of(), stream=kept)
    if when != "forward":
        last = next(p for n, p in model.named_parameters() if "layers.2." in n)
        torch.autograd.grad(loss, last, retain_graph=True)
        kept.store._idle = None
        torch.autograd.grad(loss, last, retain_graph=True)
    session = weakref.ref(loss.grad_fn.session)
    gc.collect()
    gc.disable()
    try:
        del loss
        assert session() is None and kept.store._idle is not None
    finally:
        gc.enable()


def test_what_is_not_supported_says_so():
    model, tokens = make_lm(torch.float32), tokens_of()
    with pytest.raises(RuntimeError, match="double backward through a streamed run is not supported"):
        torch.autograd.grad(model.loss(tokens, stream=stream()), list(model.parameters()), create_graph=True)
    with pytest.raises(ValueError, match="gradients must be 'together' or 'by block', got 'one'"):
        stream("one")
