"""Blocks under DDP and FSDP2, two processes over gloo: the same gradients as one process."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from blocks import relative_errors
from helpers import a_few

import pyckpt

WORLD = 2
SIZES = {"vocab_size": 40, "n_layers": 3, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}


def make_model(segments: int | None = None) -> pyckpt.CkptCausalLM:
    torch.manual_seed(0)
    return pyckpt.CkptCausalLM(**SIZES, segments=segments, tile=5, dtype=torch.float64)


def make_tokens() -> torch.Tensor:
    return torch.randint(0, 40, (2 * WORLD, 17), generator=torch.Generator().manual_seed(1))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    grads = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        grads[name.removeprefix("module.")] = grad.clone()
    return grads


class Loss(torch.nn.Module):
    """The loss as a forward, which is what the wrappers hook."""

    def __init__(self, model: pyckpt.CkptCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.loss(tokens)


def worker(rank: int, port: int, kind: str, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    tokens = make_tokens().chunk(WORLD)[rank]
    model = Loss(make_model(segments=2 if kind == "ddp-segments" else None))
    if kind.startswith("ddp"):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in model.model.model.layers:
            fully_shard(block)
        wrapped = fully_shard(model)
    for _ in range(2):  # a second step finds what the first left behind
        wrapped.zero_grad()
        wrapped(tokens).backward()
    grads = gradients(wrapped)
    if rank == 0:
        torch.save(grads, path)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("kind", a_few(["ddp-segments", "ddp", "fsdp2"], always=(0, 2)))
def test_two_processes_give_the_gradients_of_one(kind, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, args=(port, kind, str(tmp_path / "grads.pt")), nprocs=WORLD)
    got = torch.load(tmp_path / "grads.pt")
    single = Loss(make_model())
    single(make_tokens()).backward()
    truth = gradients(single)
    assert max(relative_errors(got, truth).values()) < 1e-12
