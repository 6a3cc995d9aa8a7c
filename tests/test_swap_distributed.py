"""Swapped models under DDP and FSDP2, two and four processes over gloo: the same gradients as one process."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from typing import Any

import pytest
import torch
from blocks import assert_as_good, relative_errors
from processes import gradients, needs_gloo, run_processes
from swap_models import InFloat64, make_adapted, make_model, step

import pyckpt

pytest.importorskip("transformers")
# What is done, by the number of processes; some of it together, as starting them takes most of the time.
KINDS = {
    (2, "resident"): (
        *("ddp", "swap, then fsdp2", "fsdp2, then swap", "fsdp2, offloaded", "fsdp2, in groups"),
        *("ddp, by its own forward", "fsdp2, by its own forward"),
        *("ddp, again as a whole", "fsdp2, again as a whole"),
    ),
    (2, "streamed"): (
        *("ddp, streamed", "fsdp2, streamed", "fsdp2, then swap, streamed", "fsdp2, offloaded, streamed"),
        *("fsdp2, in groups, streamed", "fsdp2, by its own forward, streamed"),
    ),
    (2, "mixed precision"): (
        *("mixed precision", "mixed precision, LoRA"),
        *("mixed precision, streamed", "mixed precision, LoRA, streamed"),
    ),
    (2, "fsdp1"): (
        *("fsdp1", "fsdp1, then swap", "fsdp1, streamed", "fsdp1, without parameters"),
        *("fsdp1, by its own forward", "fsdp1, by its own forward, without parameters", "fsdp1, again as a whole"),
    ),
    (4, "all"): ("ddp", "swap, then fsdp2", "fsdp2, streamed"),
}


def model_and_tokens(kind: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """By its own forward: of a class that swap has no table of, and that is no standard block."""
    torch.manual_seed(0)
    family = "Olmo" if "own forward" in kind else "Lfm2" if kind.endswith("as a whole") else "Phi3"
    return make_model(family, torch.float64), torch.randint(1, 61, (8, 17))


def counted_hooks(model: torch.nn.Module) -> dict[str, int]:
    """How often each parameter's hook has run, by its name."""
    calls: dict[str, int] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _, n=name: calls.update({n: calls.get(n, 0) + 1}))
    return calls


def run(rank: int, world: int, kind: str) -> dict[str, torch.Tensor]:
    """The gradients of this kind of training, of the whole batch."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    model, tokens = model_and_tokens(kind)
    tokens = tokens.chunk(world)[rank]
    stream = pyckpt.Stream(7) if kind.endswith("streamed") else None
    if "then swap" not in kind:
        assert not pyckpt.swap(model, tile=5, stream=stream).left
    if kind.startswith("ddp"):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        policy = CPUOffloadPolicy(pin_memory=False) if "offloaded" in kind else OffloadPolicy()
        if "in groups" in kind:
            from torch.distributed.fsdp import fully_shard

            fully_shard(model.model.embed_tokens)
            fully_shard([model.model.norm, model.lm_head])
        wrapped = sharded(model, offload_policy=policy)
    if "then swap" in kind:
        assert not pyckpt.swap(model, tile=5, stream=stream).left
    calls = counted_hooks(wrapped)
    for i in range(2):  # a second step finds what the first left behind
        wrapped.zero_grad()
        out = wrapped(input_ids=tokens, labels=tokens)
        assert out.logits is None
        out.loss.backward()
        assert calls == {n: i + 1 for n, _ in wrapped.named_parameters()}
    return gradients(wrapped)


def run_fsdp1(rank: int, world: int, kind: str) -> dict[str, torch.Tensor]:
    """The same under FSDP1, which wraps layers and what is in them, and is told of what it can't have."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model, tokens = model_and_tokens(kind)
    tokens = tokens.chunk(world)[rank]
    stream = pyckpt.Stream(7) if kind.endswith("streamed") else None
    own = not kind.endswith("without parameters")
    wrapped = {type(m) for m in model.model.layers}
    if kind.endswith("as a whole"):
        wrapped |= {type(m.conv) for m in model.model.layers if hasattr(m, "conv")}
    if "then swap" not in kind:
        pyckpt.swap(model, tile=5, stream=stream)
    policy, device = ModuleWrapPolicy(wrapped), torch.device("cpu")
    outer = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=own, device_id=device)
    if "then swap" in kind:
        assert {e.path for e in pyckpt.swap(outer).entries} == {"checkpointed", "standard"}
    told = (
        "streaming is not used" if stream else None if own or "forward" not in kind else "it takes use_orig_params=True"
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.filterwarnings("always", message="pyckpt.swap")
        for _ in range(2):
            outer.zero_grad()
            outer(input_ids=tokens, labels=tokens).loss.backward()
    ours = [str(w.message) for w in warned if "pyckpt.swap" in str(w.message)]
    assert len(ours) == (told is not None) and all(told is not None and told in text for text in ours)
    if own:
        with FullyShardedDataParallel.summon_full_params(outer, with_grads=True):
            return {n.replace("_fsdp_wrapped_module.", ""): g for n, g in gradients(outer).items()}
    squares = sum(p.grad.square().sum() for p in outer.parameters() if p.grad is not None)
    torch.distributed.all_reduce(squares)
    return {"norm": squares.sqrt()}


def sharded(model: Any, **policies: Any) -> Any:
    """The model under FSDP2, each layer by itself."""
    from torch.distributed.fsdp import fully_shard

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, **policies)
    return fully_shard(model, **policies)


def check_mixed(rank: int, world: int, kind: str, seed: int) -> None:
    """In bfloat16, summed in float32: gradients as good as those of the model before, each hook once."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    torch.manual_seed(seed)
    model, tokens = make_model("Llama"), torch.randint(1, 61, (4, 17))
    if "LoRA" in kind:
        model = make_adapted(model, target_modules="all-linear")
    with InFloat64():
        truth = step(copy.deepcopy(model).double(), {"input_ids": tokens, "labels": tokens})
    del truth["loss"]  # of all processes
    results = []
    for swapped in (False, True):
        trained = copy.deepcopy(model)
        if swapped:
            assert not pyckpt.swap(trained, tile=5, stream=pyckpt.Stream(7) if "streamed" in kind else None).left
        trained = sharded(trained, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        calls, mine = counted_hooks(trained), tokens.chunk(world)[rank]
        trained(input_ids=mine, labels=mine).loss.backward()
        assert calls == dict.fromkeys(truth, 1)
        results.append(gradients(trained))
    assert all(g.dtype == torch.float32 for g in results[1].values())
    assert_as_good(results[1], results[0], truth, torch.bfloat16)


def worker(rank: int, world: int, kinds: list[str], seed: int, path: str) -> None:
    warnings.filterwarnings("error", message="pyckpt.swap")
    results = {}
    for kind in kinds:
        print(f"rank {rank}: {kind}", flush=True)
        if kind.startswith("mixed precision"):
            check_mixed(rank, world, kind, seed)
        else:
            results[kind] = (run_fsdp1 if kind.startswith("fsdp1") else run)(rank, world, kind)
    if rank == 0:
        torch.save(results, path)


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize(("world", "what"), KINDS)
def test_several_processes_give_the_gradients_of_one(world, what, seed, tmp_path):
    kinds = [k for k in KINDS[world, what] if "LoRA" not in k or importlib.util.find_spec("peft")]
    run_processes(world, worker, world, kinds, seed, str(tmp_path / "grads.pt"))
    results = torch.load(tmp_path / "grads.pt")
    assert list(results) == [k for k in kinds if "mixed" not in k]
    for kind, grads in results.items():
        model, tokens = model_and_tokens(kind)
        pyckpt.swap(model)
        model(input_ids=tokens, labels=tokens).loss.backward()
        truth = {n: g.double() for n, g in gradients(model).items()}
        if kind.endswith("without parameters"):
            truth = {"norm": torch.stack([g.norm() for g in truth.values()]).norm()}
        assert max(relative_errors(grads, truth).values()) < 1e-6, kind
