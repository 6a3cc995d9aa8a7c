"""Sequences that processes share, over gloo: loss and gradients of one process that has all tokens."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import pytest
import torch
from blocks import D_MODEL, OPTIONS, assert_as_good, assert_same_bits, make_block, plain_twin, relative_errors, step
from helpers import EXACT
from processes import gradients, mean_of_processes, needs_gloo, run_processes
from torch import Tensor

import pyckpt
from pyckpt import measure
from pyckpt.attend.dense import DenseAttend, Layout

METHODS = ("ring", "all-to-all")
TOKENS = 48  # a multiple of what up to 4 processes want, and of 3
PACKED = torch.tensor([0, 5, 5, 23, 24, TOKENS], dtype=torch.int32)


def seeded(seed: int) -> torch.Generator:
    """The same in every process."""
    return torch.Generator("cpu").manual_seed(seed)


def same(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def summed(t: Tensor) -> Tensor:
    """Over the processes."""
    t = t.clone()
    torch.distributed.all_reduce(t)
    return t


# --- attention ------------------------------------------------------------------------------------------------

ATTENDS: dict[str, dict[str, Any]] = {
    "causal": {"window": (-1, 0)},
    "both ways": {"window": (-1, -1)},
    "window": {"window": (7, 0), "softcap": 2.0},
    "window of both": {"window": (3, 9), "v_head_dim": 4},
    "sinks": {"window": (-1, 0), "sinks": "sinks"},
}
LAYOUTS = {"rows": (2, None), "packed": (1, PACKED)}


def of_one(
    attend: DenseAttend, layout: Layout, sinks: Tensor | None, q: Any, k: Any, v: Any, do: Any
) -> dict[str, Any]:
    o, lse = attend.forward(layout, q, k, v, None, sinks)
    dq, dk, dv = attend.backward(layout, do, q, k, v, o, lse, None, None, sinks)
    found = {"o": o, "dq": dq, "dk": dk, "dv": dv}
    if sinks is not None:
        found["sinks"] = attend.sinks_backward(layout, do, o, lse, sinks)
    return found


def attention_worker(rank: int, world: int, seed: int) -> None:
    for method in METHODS:
        context = pyckpt.ContextParallel(method=method)
        for options in ATTENDS.values():
            attend = DenseAttend(n_heads=12, n_kv_heads=2, head_dim=6, **{"softcap": 0.0, "scale": 0.4, **options})
            if method == "all-to-all" and world == 3:
                with pytest.raises(
                    ValueError, match=r"2 key/value heads can't be dealt out evenly to 3 processes.*ring"
                ):
                    context.attend(attend)
                continue
            sinks = same(seed, 12) if attend.sinks else None
            for batch, cu in LAYOUTS.values():
                whole = Layout(batch, TOKENS, cu)
                widths = attend.d_q, attend.d_k, attend.d_v, attend.d_o
                given = [same(seed + i, batch, TOKENS, w) for i, w in enumerate(widths)]
                want = of_one(attend, whole, sinks, *(t.view(batch * TOKENS, -1) for t in given))
                here = Layout(batch, TOKENS // world, cu)
                parts = [context.shard(t).flatten(0, 1) for t in given]
                got = of_one(context.attend(attend), here, sinks, *parts)
                if sinks is not None:
                    got["sinks"] = summed(got["sinks"])
                for name in ("o", "dq", "dk", "dv"):
                    got[name] = context.gather(got[name].view(batch, TOKENS // world, -1)).flatten(0, 1)
                errors = relative_errors(got, want)
                assert max(errors.values()) < 10 * EXACT, (method, options, batch, errors)


@needs_gloo
@pytest.mark.parametrize("world", (1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))))
def test_attention_is_that_of_one_process(world, seed):
    run_processes(world, attention_worker, world, seed)


# --- blocks ---------------------------------------------------------------------------------------------------


def shared_step(context: Any, block: Any, x: Tensor, dy: Tensor, **options: Any) -> dict[str, Tensor]:
    """`step` of whole x and dy: what the processes make of it together."""
    dim = x.dim() - 2
    call = functools.partial(block, context=context)
    call.named_parameters = block.named_parameters  # type: ignore[attr-defined]
    got = step(call, context.shard(x, dim), context.shard(dy, dim), **options)  # type: ignore[arg-type]
    whole = {n: context.gather(got.pop(n), dim) for n in ("y", "dx")}
    return whole | {n: summed(t) for n, t in got.items()}


def whole_inputs(packed: bool, seed: int) -> dict[str, Any]:
    shape = (TOKENS, D_MODEL) if packed else (2, TOKENS, D_MODEL)
    given = {"x": same(seed, *shape), "dy": same(seed + 1, *shape)}
    return given | ({"cu_seqlens": PACKED} if packed else {})


def block_worker(rank: int, world: int, seed: int) -> None:
    names = OPTIONS if world == 2 else ("llama", "window-both", "gemma2-like", "bert-like")
    for method in METHODS:
        context = pyckpt.ContextParallel(method=method)
        for name in names:
            options = OPTIONS[name]
            torch.manual_seed(seed)
            block = make_block(**options, tile=7)
            for packed in (False, True):
                given = whole_inputs(packed, seed)
                errors = relative_errors(shared_step(context, block, **given), step(block, **given))
                assert max(errors.values()) < 10 * EXACT, (method, name, packed, errors)


def test_blocks_are_those_of_one_process(seed):
    run_processes(2, block_worker, 2, seed)


@pytest.mark.slow
def test_blocks_of_four_processes(seed):
    run_processes(4, block_worker, 4, seed)


def details_worker(rank: int, seed: int) -> None:
    """Save sets and tiles, positions, dropout, the dtypes' own rounding, and what a process keeps."""
    context = pyckpt.ContextParallel()
    torch.manual_seed(seed)
    block = make_block(dropout=0.2)
    given = whole_inputs(False, seed)
    torch.manual_seed(seed + 1)
    first = shared_step(context, block, **given)
    for method in METHODS:
        context = pyckpt.ContextParallel(method=method)
        results = []
        for save, tile in (("attention", None), ("attention+qkv", None), ("all", None), ("input", None)):
            block.save, block.tile = save, tile
            torch.manual_seed(seed + 1)
            results.append(shared_step(context, block, **given))
        for other in results[1:]:
            assert_same_bits(other, results[0])
    assert not torch.equal(first["y"], results[0]["y"])  # all processes were seeded alike, and drop by their places
    parts = first["y"].chunk(4, 1)
    block.eval()
    quiet = shared_step(context, block, **given)["y"].chunk(4, 1)
    dropped = [a - b for a, b in zip(parts, quiet, strict=True)]
    assert all(float(d.abs().max()) > 0 for d in dropped)

    for axes in (None, [0, 1, 2, 2, 1, 0]):
        block = make_block(tile=5, rope_axes=axes)
        shape = (2, TOKENS) if axes is None else (2, TOKENS, 3)
        positions = torch.randint(0, 1000, shape, generator=seeded(seed))
        for method in METHODS:
            context = pyckpt.ContextParallel(method=method)
            got = shared_step(context, block, **given, positions=positions)
            errors = relative_errors(got, step(block, **given, positions=positions))
            assert max(errors.values()) < 10 * EXACT, errors

    for dtype in (torch.float32, torch.bfloat16):
        truth, plain = step(block, **given), plain_twin(block, dtype)
        low = {n: t.to(dtype) for n, t in given.items()}
        ours = copy.deepcopy(block).to(dtype)
        for method in METHODS:
            got = shared_step(pyckpt.ContextParallel(method=method), ours, **low)
            assert_as_good(got, step(plain, **low), truth, dtype)

    block, x = make_block(torch.float32), torch.randn(1, 4096, D_MODEL)
    with measure.memory(block) as alone:
        block(x)
    for method in METHODS:
        context = pyckpt.ContextParallel(method=method)
        part = context.shard(x)
        with measure.memory(block) as here:
            block(part, context=context)
        places = part.shape[1] * 8  # of each token, which a block alone counts
        assert here.saved_bytes - places <= alone.saved_bytes / context.size * 1.01


@needs_gloo
def test_details_of_blocks(seed):
    run_processes(2, details_worker, seed)


# --- models ---------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"vocab_size": 40, "n_layers": 3, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
# Lengths that no number of processes divides, and what a loss can be asked for.
LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "softcap": 2.0},
    "none": {"reduction": "none", "z_loss": 0.1},
    "weights": {"token_weight": True, "class_weight": True},
    "smoothed": {"label_smoothing": 0.1, "recompute": True},
    "packed": {"cu_seqlens": torch.tensor([0, 9, 9, 20, 33], dtype=torch.int32)},
    "packed weights": {
        "cu_seqlens": torch.tensor([0, 9, 10, 20, 33], dtype=torch.int32),
        "token_weight": True,
        "class_weight": True,
    },
    "positions": {"positions": torch.arange(33) * 3},
    "one token": {"seq": 2},
}


# Of the whole model: fewer with many processes, which take turns on few cores.
MADE: list[dict[str, Any]] = [{"segments": 2, "tie_embeddings": True, "save": "input"}, {"rope_axes": [0, 1, 1, 0]}]


def make_model(seed: int, **options: Any) -> pyckpt.CkptCausalLM:
    torch.manual_seed(seed)
    return pyckpt.CkptCausalLM(**{**SIZES, **options}, tile=5, dtype=torch.float64)


def loss_of(model: Any, options: dict[str, Any], seed: int, context: Any = None) -> dict[str, Tensor]:
    """The loss and all gradients, of whole sequences."""
    options = dict(options)
    seq, packed = options.pop("seq", 33), "cu_seqlens" in options
    shape = (seq,) if packed else (2, seq)
    tokens = torch.randint(0, 40, shape, generator=seeded(seed))
    labels = torch.where(torch.rand(shape, generator=seeded(seed + 1)) < 0.2, -100, tokens)
    labels[..., -1] = tokens[..., -1]
    if options.get("token_weight"):
        options["token_weight"] = torch.rand(shape, generator=seeded(seed + 2))
    if options.get("class_weight"):
        options["class_weight"] = torch.rand(40, generator=seeded(seed + 3))
    if "positions" in options and model.spec.position_axes:
        options["positions"] = torch.stack([options["positions"], options["positions"].flip(0)], -1)
    model.zero_grad()
    loss = model.loss(tokens, labels, **options, **({} if context is None else {"context": context}))
    loss.backward(same(seed + 4, *loss.shape))
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}


def model_worker(rank: int, world: int, seed: int) -> None:
    draw = random.Random(seed)
    for method in METHODS if SIZES["n_heads"] % world == 0 else ("ring",):
        context = pyckpt.ContextParallel(method=method)
        few = draw.sample(sorted(LOSSES), 6 if world == 2 else 4)  # others in another run
        for name in few:
            options = LOSSES[name]
            for made in MADE[: 2 if world == 2 else 1]:
                model = make_model(seed, **made)
                got = loss_of(model, options, seed, context)
                got = mean_of_processes(got)
                errors = relative_errors(got, loss_of(model, options, seed))
                assert max(errors.values()) < 10 * EXACT, (method, name, made, errors)
        model = make_model(seed)
        tokens = torch.randint(0, 40, (2, 24), generator=seeded(seed))
        nothing = torch.full_like(tokens, -100)  # as one process has it: no number, and gradients that harm nobody
        model.zero_grad()
        loss = model.loss(tokens, nothing, context=context)
        loss.backward()
        assert loss.isnan() and all(not p.grad.any() for p in model.parameters())
        whole = context.gather(model(tokens, context=context))
        torch.testing.assert_close(whole, model(tokens))
        compiled = torch.compile(model.loss, backend="eager")
        assert torch.equal(compiled(tokens, context=context), model.loss(tokens, context=context))
        losses = pyckpt.token_losses(model, tokens, context=context)
        torch.testing.assert_close(losses, pyckpt.token_losses(model, tokens))


@needs_gloo
@pytest.mark.parametrize("world", (2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))))
def test_losses_are_those_of_one_process(world, seed):
    run_processes(world, model_worker, world, seed)


class Loss(torch.nn.Module):
    """The loss as a forward, which is what the wrappers hook."""

    def __init__(self, model: pyckpt.CkptCausalLM, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.loss(tokens, **self.options)


def wrappers_worker(rank: int, world: int, streamed: bool) -> None:
    """Two batches, each shared by half of the processes; weights by DDP or FSDP2 over all of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "cp"))
    tokens = torch.randint(0, 40, (2, 2, 21), generator=seeded(1))
    one = make_model(0)
    for half in tokens:
        (one.loss(half) / 2).backward()
    truth = {n: p.grad for n, p in one.named_parameters()}
    for method in METHODS:
        context = pyckpt.ContextParallel(mesh["cp"], method)
        assert (context.size, context.rank) == (world // 2, mesh["cp"].get_local_rank())
        for kind in ("ddp", "fsdp2"):
            stream = pyckpt.Stream(4) if streamed else None
            made = make_model(0, segments=None if kind == "fsdp2" else 2)
            model: Any = Loss(made, context=context, stream=stream)
            if kind == "ddp":
                wrapped = torch.nn.parallel.DistributedDataParallel(model)
            else:
                for block in model.model.model.layers:
                    fully_shard(block)
                wrapped = fully_shard(model)
            for _ in range(2):  # a second step finds what the first left behind
                wrapped.zero_grad()
                wrapped(tokens[mesh["dp"].get_local_rank()]).backward()
            got = {n.removeprefix("model."): t for n, t in gradients(wrapped).items()}
            errors = relative_errors(got, truth)
            assert max(errors.values()) < 10 * EXACT, (method, kind, errors)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
def test_weights_of_ddp_and_fsdp2(streamed):
    run_processes(4, wrappers_worker, 4, streamed)


# --- what is given --------------------------------------------------------------------------------------------


def given_worker(rank: int, seed: int) -> None:
    """Parts and wholes, their gradients, torch.compile, and what is refused."""
    for method, multiple in (("ring", 4), ("all-to-all", 2)):
        context = pyckpt.ContextParallel(method=method)
        assert (context.rank, context.size, context.multiple, context.method) == (rank, 2, multiple, method)
        whole = same(seed, 3, 8, 2).requires_grad_()
        part = context.shard(whole)
        assert part.shape == (3, 4, 2)
        again = context.gather(part)
        assert torch.equal(again, whole)
        (again * same(seed + rank, 3, 8, 2)).sum().backward()
        mine = torch.zeros(3, 8, 2, dtype=torch.float64)
        places = context.positions(8)
        mine[:, places] = (same(seed, 3, 8, 2) + same(seed + 1, 3, 8, 2))[:, places]
        assert torch.equal(whole.grad, mine)
        assert torch.equal(context.gather(places, 0), torch.arange(8))

        torch.manual_seed(seed)
        block = make_block()
        given = {n: context.shard(t) for n, t in whole_inputs(False, seed).items()}
        compiled = torch.compile(block, backend="eager")
        assert torch.equal(compiled(given["x"], context=context), block(given["x"], context=context))

        with pytest.raises(ValueError, match=f"7 tokens can't be dealt out evenly.*multiple of {multiple}, 8 for"):
            context.shard(torch.zeros(1, 7))
        with pytest.raises(ValueError, match="0 tokens"):
            context.positions(0)
        with pytest.raises(ValueError, match="dim=3 is not a dim"):
            context.gather(whole, 3)
        with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got list"):
            context.shard([1, 2])
        with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got float"):
            context.total(3.0)
        with pytest.raises(ValueError, match=r"positions have shape \(24,\), expected those of whole sequences, of 48"):
            block(given["x"], positions=torch.arange(24), context=context)
        if method == "ring":  # two chunks for each process
            odd = torch.zeros(1, 3, 2, 4)
            with pytest.raises(ValueError, match="6 tokens can't be dealt out evenly"):
                pyckpt.attention(odd, odd, odd, context=context)
            with pytest.raises(ValueError, match="6 tokens can't be dealt out evenly"):
                context.gather(odd)
        for other in (torch.full((1, 8), rank), torch.zeros(1, 8 + rank, dtype=torch.long)):
            with pytest.raises(ValueError, match="not given the same: 1 of this group have other tokens than 0"):
                make_model(0).loss(other, context=pyckpt.ContextParallel(method=method))
        with pytest.raises(ValueError, match="end at the number of tokens, 96"):
            block(torch.zeros(48, D_MODEL, dtype=torch.float64), cu_seqlens=PACKED, context=context)
    with pytest.raises(ValueError, match=r"3 heads can't be dealt out evenly to 2 processes.*ring"):
        pyckpt.CkptTransformerBlock(24, 3, dtype=torch.float64)(torch.zeros(1, 4, 24).double(), context=context)
    with pytest.raises(TypeError, match=r"context must be a pyckpt\.ContextParallel or None, got str"):
        block(given["x"], context="ring")
    with pytest.raises(TypeError, match=r"context must be a pyckpt\.ContextParallel or None, got str"):
        make_model(0).loss(torch.zeros(1, 8, dtype=torch.long), context="ring")
    with pytest.raises(TypeError, match="group must be a process group or a DeviceMesh, got int"):
        pyckpt.ContextParallel(2)
    with pytest.raises(ValueError, match="this process is not in the group"):
        pyckpt.ContextParallel(torch.distributed.GroupMember.NON_GROUP_MEMBER)


def alike_worker(rank: int) -> None:
    """What differs between processes is an error in each of them, before it has them wait for one another."""
    model, tokens = make_model(0), torch.randint(0, 40, (2, 8), generator=seeded(0))
    cu_seqlens = torch.tensor([0, 4 + rank, 16], dtype=torch.int32)
    for name, given in {
        "method": {"context": pyckpt.ContextParallel(method=METHODS[rank])},
        "stream": {"stream": pyckpt.Stream(4 + rank)},
        "labels": {"labels": tokens.roll(rank)},
        "positions": {"positions": torch.arange(8) + rank},
        "cu_seqlens": {"tokens": tokens.flatten(), "cu_seqlens": cu_seqlens},
        "token_weight": {"token_weight": torch.full((2, 8), 0.5 + rank)},
        "reduction": {"reduction": ("mean", "sum")[rank]},
        "tokens, labels": {"tokens": tokens + 40 * rank, "labels": None if rank else tokens},
    }.items():
        with pytest.raises(ValueError, match=f"1 of this group have other {name} than 0"):
            model.loss(**{"tokens": tokens, "context": pyckpt.ContextParallel(), **given})
    model.model.embed_tokens.weight.data[0] = float("inf")  # which no token is
    model.loss(torch.randint(1, 40, (1, 7), generator=seeded(0)), context=pyckpt.ContextParallel()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@needs_gloo
def test_what_has_to_be_alike():
    run_processes(2, alike_worker)


@needs_gloo
def test_what_is_given(seed):
    run_processes(2, given_worker, seed)


def test_alone():
    with pytest.raises(ValueError, match=r"method='tree' does not exist; expected one of 'ring', 'all-to-all'"):
        pyckpt.ContextParallel(method="tree")
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised; start the script with torchrun"):
        pyckpt.ContextParallel()


# --- the function ---------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "lse": {"return_lse": True, "softcap": 3.0},
    "sinks": {"return_lse": True, "sinks": True, "window": 6},
    "both ways": {"causal": False, "scale": 0.0},
    "no scale": {"scale": -0.3, "cu_seqlens": PACKED, "return_lse": True},
    "packed": {"cu_seqlens": PACKED, "sinks": True},
}


def called(options: dict[str, Any], seed: int, context: Any = None) -> dict[str, Tensor]:
    """Outputs and gradients of whole q, k, v, strided as an even part of one projection has them."""
    options = dict(options)
    packed = "cu_seqlens" in options
    lead = (TOKENS,) if packed else (2, TOKENS)
    dim = len(lead) - 1
    leaf = same(seed, *lead, 4 + 2 + 2, 6).requires_grad_()
    q, k, v = leaf.split((4, 2, 2), -2)
    if options.pop("sinks", False):
        options["sinks"] = same(seed + 1, 4).requires_grad_()
    given = [leaf, *(t for t in (options.get("sinks"),) if t is not None)]
    if context is not None:
        q, k, v = (context.shard(t, dim) for t in (q, k, v))
    found = pyckpt.attention(q, k, v[..., :5], **options, context=context)
    found = found if isinstance(found, tuple) else (found,)
    if context is not None:
        found = (context.gather(found[0], dim), *(context.gather(t, -1) for t in found[1:]))
    loss = sum((t * same(seed + 2 + i, *t.shape)).nan_to_num(0.0).sum() for i, t in enumerate(found))
    grads = torch.autograd.grad(loss, given)
    if context is not None:
        grads = [summed(g) / context.size for g in grads]
    return {f"output {i}": t.detach().nan_to_num(neginf=-1.0) for i, t in enumerate(found)} | {
        f"gradient {i}": g for i, g in enumerate(grads)
    }


def function_worker(rank: int, seed: int) -> None:
    for method in METHODS:
        context = pyckpt.ContextParallel(method=method)
        for name, options in FUNCTIONS.items():
            errors = relative_errors(called(options, seed, context), called(options, seed))
            assert max(errors.values()) < 10 * EXACT, (method, name, errors)
        q, k = torch.randn(1, 8, 2, 4), torch.randn(1, 8, 1, 4)
        dropped = [pyckpt.attention(q, k, k, dropout=0.5, seed=n, context=context) for n in (1, 1, 2)]
        assert torch.equal(dropped[0], dropped[1])
        assert not torch.equal(dropped[0], dropped[2])
        with pytest.raises(ValueError, match="context goes with no alibi_slopes"):
            pyckpt.attention(q, k, k, alibi_slopes=torch.ones(2), context=context)
        with pytest.raises(ValueError, match="with context q and k are the same tokens"):
            pyckpt.attention(q[:, :4], k, k, context=context)
        starts = torch.tensor([0, 16], dtype=torch.int32)
        with pytest.raises(ValueError, match="context goes with no cu_seqlens_k"):
            pyckpt.attention(q[0], k[0], k[0], cu_seqlens=starts, cu_seqlens_k=starts, context=context)
        with pytest.raises(TypeError, match=r"context must be a pyckpt\.ContextParallel or None, got int"):
            pyckpt.attention(q, k, k, context=2)


@needs_gloo
def test_the_function_is_that_of_one_process(seed):
    run_processes(2, function_worker, seed)


# --- on GPUs --------------------------------------------------------------------------------------------------


def gpu_worker(rank: int, seed: int) -> None:
    """By NCCL: a block's output and gradients in bfloat16, by the 2x rule, twice the same bits."""
    torch.cuda.set_device(rank)
    group = torch.distributed.new_group(backend="nccl")
    torch.manual_seed(seed)
    block = make_block()
    given = whole_inputs(False, seed)
    truth, plain = step(block, **given), plain_twin(block, torch.bfloat16).cuda()
    ours = copy.deepcopy(block).to("cuda", torch.bfloat16)
    low = {n: t.to("cuda", torch.bfloat16) for n, t in given.items()}
    reference = {n: t.cpu() for n, t in step(plain, **low).items()}
    for method in METHODS:
        context = pyckpt.ContextParallel(group, method)
        results = []
        for _ in range(2):
            call = functools.partial(ours, context=context)
            call.named_parameters = ours.named_parameters  # type: ignore[attr-defined]
            got = step(call, context.shard(low["x"]), context.shard(low["dy"]))  # type: ignore[arg-type]
            whole = {n: context.gather(got.pop(n)) for n in ("y", "dx")}
            results.append({n: t.cpu() for n, t in (whole | {n: context.total(t) for n, t in got.items()}).items()})
        assert_same_bits(*results)
        assert_as_good(results[0], reference, truth, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(seed):
    run_processes(2, gpu_worker, seed)
