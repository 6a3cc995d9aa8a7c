"""Streamed runs of sequences that processes share, over gloo: loss and gradients of one process that has all tokens."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from blocks import D_MODEL, assert_as_good, assert_same_bits, make_block, relative_errors
from helpers import EXACT
from processes import mean_of_processes, needs_gloo, run_processes
from test_context_parallel import LOSSES, MADE, METHODS, loss_of, make_model, same, seeded
from torch import Tensor

import pyckpt
from pyckpt.attend.dense import Layout
from pyckpt.exec.lm_ends import Ends, LossOptions, Targets
from pyckpt.stream import stream_loss
from pyckpt.tokenwise.norm import LayerNorm

STREAMS: dict[str, dict[str, Any]] = {"host": {}, "file": {"store": "file"}, "by block": {"gradients": "by block"}}
OPTIONS = {name: {n: v for n, v in how.items() if n != "recompute"} for name, how in LOSSES.items()}


def assert_exact(got: dict[str, Tensor], want: dict[str, Tensor], *what: Any) -> None:
    errors = relative_errors(got, want)
    assert max(errors.values()) < 10 * EXACT, (*what, errors)


def losses_worker(rank: int, world: int, seed: int) -> None:
    """Of a model with 4 heads and 2 key/value heads, so that four processes have the same one twice."""
    draw = random.Random(seed)
    for method in METHODS if world != 3 else ("ring",):
        context = pyckpt.ContextParallel(method=method)
        for name in draw.sample(sorted(OPTIONS), 4):  # others in another run
            made, how = draw.choice(MADE), draw.choice(sorted(STREAMS))
            model, options = make_model(seed, **made), OPTIONS[name] | {"stream": pyckpt.Stream(7, **STREAMS[how])}
            got = mean_of_processes(loss_of(model, options, seed, context))
            assert_exact(got, loss_of(model, OPTIONS[name], seed), method, name, made, how)


@needs_gloo
@pytest.mark.parametrize("world", (2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))))
def test_losses_are_those_of_one_process(world, seed):
    run_processes(world, losses_worker, world, seed)


def details_worker(rank: int, seed: int) -> None:
    for method in METHODS:
        context = pyckpt.ContextParallel(method=method)
        model, stream = make_model(seed, window=9), pyckpt.Stream(5)
        tokens = torch.randint(0, 40, (2, 24), generator=seeded(seed))
        results = []
        for save in ("attention", "attention+qkv", "all", "input"):
            model.set_save(save)
            results.append(loss_of(model, {"stream": stream}, seed, context))
        for other in results[1:]:
            assert_same_bits(other, results[0])

        loss = model.loss(tokens, stream=stream, context=context)
        once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        again = torch.autograd.grad(loss, list(model.parameters()))  # from the run's input, as the store is empty
        assert all(map(torch.equal, once, again))
        model.zero_grad()
        nothing = model.loss(tokens, torch.full_like(tokens, -100), stream=stream, context=context)
        nothing.backward()
        assert nothing.isnan() and all(not p.grad.any() for p in model.parameters())
        with torch.no_grad():
            assert torch.equal(model.loss(tokens, stream=stream, context=context), loss)
        losses = pyckpt.token_losses(model, tokens, stream=stream, context=context)
        torch.testing.assert_close(losses, pyckpt.token_losses(model, tokens))
        compiled = torch.compile(model.loss, backend="eager")
        assert torch.equal(compiled(tokens, stream=stream, context=context), loss)

        truth, bfloat16 = loss_of(model, {}, seed), {"dtype": torch.bfloat16}
        low = make_model(seed, window=9).to(**bfloat16)
        plain = loss_of(low, {"stream": stream}, seed)
        assert_as_good(mean_of_processes(loss_of(low, {"stream": stream}, seed, context)), plain, truth, torch.bfloat16)

        with pytest.raises(ValueError, match="a streamed run deals out tokens by tiles"):
            model.model.layers(same(0, 1, 8, 32), stream=stream, context=context)
    odd, context = pyckpt.CkptCausalLM(40, 1, 24, 3, d_ff=32), pyckpt.ContextParallel(method="all-to-all")
    for call in (odd.loss, lambda tokens, stream, context: stream.estimate(odd, 24, context=context)):
        with pytest.raises(ValueError, match=r"3 heads can't be dealt out evenly to 2 processes.*ring"):
            call(tokens, stream=stream, context=context)


@needs_gloo
def test_details(seed):
    run_processes(2, details_worker, seed)


def dropout_worker(rank: int, seed: int) -> None:
    """Seeded alike, tokens drop what they drop in one process; with heads dealt out, attention's are others."""
    for method, attention in (("ring", 0.3), ("all-to-all", 0.0)):
        model = make_model(seed, dropout=0.2, attention_dropout=attention)
        stream, context = pyckpt.Stream(4), pyckpt.ContextParallel(method=method)
        torch.manual_seed(seed)
        want = loss_of(model, {"stream": stream}, seed)
        torch.manual_seed(seed)
        assert_exact(mean_of_processes(loss_of(model, {"stream": stream}, seed, context)), want, method)
    model = make_model(seed, attention_dropout=0.5)
    results = []
    for given in (seed, seed, seed + 1):
        torch.manual_seed(given)
        results.append(loss_of(model, {"stream": stream}, seed, context))
    assert_same_bits(*results[:2])
    assert results[0]["loss"] != results[2]["loss"]


@needs_gloo
def test_dropout(seed):
    run_processes(2, dropout_worker, seed)


def both_ways_worker(rank: int, seed: int) -> None:
    """Blocks that see what comes after: keys are made when they are first seen, and dq waits for all of them."""
    torch.manual_seed(seed)
    embed = torch.randn(40, D_MODEL, dtype=torch.float64, requires_grad=True)
    weights = {n: torch.ones(D_MODEL, dtype=torch.float64) for n in ("norm.weight", "norm.bias")}
    ends = Ends({"embed": embed, "head": embed, **weights}, LayerNorm("norm", 1e-5), loss=LossOptions("sum"))
    tokens = torch.randint(0, 40, (27,), generator=seeded(seed))
    packed = torch.tensor([0, 4, 4, 20, 27], dtype=torch.int32)
    for options in ({"causal": False}, {"causal": False, "window": (3, 5)}):
        blocks = [make_block(**options) for _ in range(2)]
        given = {"embed": embed, **{f"{i}.{n}": p for i, b in enumerate(blocks) for n, p in b.named_parameters()}}
        for layout in (Layout(1, 27), Layout(1, 27, packed)):
            for saves in random.Random(seed).sample(["attention", "attention+qkv", "input"], 2):
                for block in blocks:
                    block.save = saves

                results = []
                for context in (None, *(pyckpt.ContextParallel(method=method) for method in METHODS)):
                    run = (blocks, 1, tokens, Targets(tokens, None, -100), ends, layout, None, pyckpt.Stream(4))
                    loss = stream_loss(*run, context=context)
                    grads = torch.autograd.grad(loss, list(given.values()))
                    results.append({"loss": loss.detach(), **dict(zip(given, grads, strict=True))})
                for got in results[1:]:
                    assert_exact(mean_of_processes(got), results[0], options, layout, saves)


@needs_gloo
def test_both_ways(seed):
    run_processes(2, both_ways_worker, seed)


def estimates_worker(rank: int, world: int) -> None:
    """The store's bytes are exact; of the device's memory and FLOPs each process has its share."""
    from torch.utils.flop_counter import FlopCounterMode

    for options in ({"mlp": "gelu", "segments": 2}, {"save": "input", "n_kv_heads": 1}):
        model = pyckpt.CkptCausalLM(30, 3, 64, 4, d_ff=128, window=1, **options)
        tokens = torch.randint(0, 30, (1, 512), generator=seeded(1))
        for method in METHODS:
            context, opened, store = pyckpt.ContextParallel(method=method), [], pyckpt.store.FileStore()
            store.check = lambda plan, opened=opened: opened.append(plan.store_bytes)
            stream = pyckpt.Stream(64, store)
            found = stream.estimate(model, 512, context=context)
            assert stream.estimate(model, 73, 7, context=context).store_bytes == found.store_bytes  # 511 in all
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            model.loss(tokens, stream=stream, context=context).backward()  # what is made once is there afterwards
            opened.clear()
            with pyckpt.measure.memory(model) as m:
                model.loss(tokens, stream=stream, context=context).backward()
            assert opened == [found.store_bytes]
            handed_over = sum(p.nbytes for p in model.parameters())
            assert 0.3 * found.device_bytes < m.peak_bytes <= found.device_bytes + handed_over, (m, found)
            alone = stream.estimate(model, 512)
            assert found.flops == pytest.approx(alone.flops / world)
            shared_heads = method == "all-to-all" and model.config["n_kv_heads"] < world
            assert found.store_bytes == alone.store_bytes / world or shared_heads
            with FlopCounterMode(display=False) as counter:
                model.loss(tokens, stream=stream, context=context).backward()
            counts = counter.get_flop_counts()["Global"]
            products = sum(n for op, n in counts.items() if "attention" not in str(op))
            assert found.flops == pytest.approx(products, rel=0.02), (options, method, found.flops, products)


@needs_gloo
def test_estimates():
    run_processes(2, estimates_worker, 2)


def peaks_worker(rank: int) -> None:
    model = pyckpt.CkptCausalLM(50, 2, 64, 4, n_kv_heads=2, d_ff=96)
    stream = pyckpt.Stream(64, "file")
    for method in METHODS:
        peaks, context = [], pyckpt.ContextParallel(method=method)
        for tokens in (256, 1024):
            model.zero_grad()
            ids = torch.randint(0, 50, (1, tokens), generator=seeded(tokens))
            with pyckpt.measure.memory(model) as m:
                model.loss(ids, stream=stream, context=context).backward()
            assert m.saved_bytes < 64, m.saved_bytes  # a count
            peaks.append(m.peak_bytes)
        # Messages of a tile's q, k and v: gloo's threads hold some of them a while after they were sent.
        messages = 4 * 64 * (64 + 2 * 32) * 4
        assert max(peaks) - min(peaks) <= messages, (method, peaks)


@needs_gloo
def test_the_peak_does_not_grow_with_the_length():
    run_processes(2, peaks_worker)


def copies_worker(rank: int, seed: int) -> None:
    """A copied model shares with the same processes; a stream kept over steps of other lengths gives the same."""
    context, stream = pyckpt.ContextParallel(), pyckpt.Stream(4)
    model = make_model(seed)
    for tokens in (20, 33, 7):
        got = mean_of_processes(loss_of(copy.deepcopy(model), {"stream": stream, "seq": tokens}, seed, context))
        assert_exact(got, loss_of(model, {"seq": tokens}, seed), tokens)


@needs_gloo
def test_steps_of_other_lengths(seed):
    run_processes(2, copies_worker, seed)


def gpu_worker(rank: int, seed: int) -> None:
    """By NCCL, in bfloat16: as exact as one process, twice the same bits."""
    torch.cuda.set_device(rank)
    group = torch.distributed.new_group(backend="nccl")
    model, tokens = make_model(seed), torch.randint(0, 40, (2, 33), generator=seeded(seed))
    model.loss(tokens).backward()
    truth = {n: p.grad for n, p in model.named_parameters()}
    ours, tokens = make_model(seed).to("cuda", torch.bfloat16), tokens.cuda()
    stream = pyckpt.Stream(8)

    def results(context: Any) -> dict[str, Tensor]:
        ours.zero_grad()
        ours.loss(tokens, stream=stream, context=context).backward()
        grads = {n: p.grad.float() for n, p in ours.named_parameters()}
        grads = grads if context is None else {n: context.total(g) / context.size for n, g in grads.items()}
        return {n: g.cpu() for n, g in grads.items()}

    alone = results(None)
    for method in METHODS:
        context = pyckpt.ContextParallel(group, method)
        got, again = results(context), results(context)
        assert_same_bits(got, again)
        assert_as_good(got, alone, truth, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(seed):
    run_processes(2, gpu_worker, seed)
