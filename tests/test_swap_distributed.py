"""Swapped models under DDP and FSDP2, two and four processes over gloo: the same gradients as one process."""

from __future__ import annotations

import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from blocks import relative_errors
from swap_models import make_model

import pyckpt

pytest.importorskip("transformers")
# By what is done: the number of processes.
KINDS = {
    "ddp": 2,
    "ddp of four": 4,
    "swap, then fsdp2": 2,
    "fsdp2, then swap": 2,
    "fsdp2 of four": 4,
    "fsdp2, offloaded": 2,
    "ddp, by its own forward": 2,
    "fsdp2, by its own forward": 2,
}


def model_and_tokens(kind: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """By its own forward: of a class that swap has no table of, whose norm is read before and after attention."""
    torch.manual_seed(0)
    family = "Phi" if kind.endswith("own forward") else "Phi3"
    return make_model(family, torch.float64), torch.randint(1, 61, (8, 17))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    grads = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        grads[name.removeprefix("module.")] = grad.clone()
    return grads


def worker(rank: int, port: int, kind: str, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="pyckpt.swap")
    dist.init_process_group("gloo", rank=rank, world_size=KINDS[kind])
    model, tokens = model_and_tokens(kind)
    tokens = tokens.chunk(KINDS[kind])[rank]
    if kind != "fsdp2, then swap":
        assert not pyckpt.swap(model, tile=5).left
    if kind.startswith("ddp"):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        policy = CPUOffloadPolicy(pin_memory=False) if kind == "fsdp2, offloaded" else OffloadPolicy()
        for layer in model.model.layers:
            fully_shard(layer, offload_policy=policy)
        wrapped = fully_shard(model, offload_policy=policy)
    if kind == "fsdp2, then swap":
        assert not pyckpt.swap(model, tile=5).left
    calls: dict[str, int] = {}
    for name, p in wrapped.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, n=name: calls.update({n: calls.get(n, 0) + 1}))
    for i in range(2):  # a second step finds what the first left behind
        wrapped.zero_grad()
        out = wrapped(input_ids=tokens, labels=tokens)
        assert out.logits is None
        out.loss.backward()
        assert set(calls.values()) == {i + 1} and len(calls) == len(list(wrapped.parameters()))
    grads = gradients(wrapped)
    if rank == 0:
        torch.save(grads, path)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_give_the_gradients_of_one(kind, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, args=(port, kind, str(tmp_path / "grads.pt")), nprocs=KINDS[kind])
    got = torch.load(tmp_path / "grads.pt")
    model, tokens = model_and_tokens(kind)
    pyckpt.swap(model)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert max(relative_errors(got, {n: g.double() for n, g in gradients(model).items()}).values()) < 1e-6
