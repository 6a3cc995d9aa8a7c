"""Blocks under DDP and FSDP2, two processes over gloo: the same gradients as one process."""

from __future__ import annotations

import torch
from blocks import relative_errors
from processes import gradients, needs_gloo, run_processes

import pyckpt

WORLD = 2
SIZES = {"vocab_size": 40, "n_layers": 3, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}


def make_model(segments: int | None = None) -> pyckpt.CkptCausalLM:
    torch.manual_seed(0)
    return pyckpt.CkptCausalLM(**SIZES, segments=segments, tile=5, dtype=torch.float64)


def make_tokens() -> torch.Tensor:
    return torch.randint(0, 40, (2 * WORLD, 17), generator=torch.Generator().manual_seed(1))


class Loss(torch.nn.Module):
    """The loss as a forward, which is what the wrappers hook."""

    def __init__(self, model: pyckpt.CkptCausalLM, stream: pyckpt.Stream | None = None) -> None:
        super().__init__()
        self.model, self.stream = model, stream

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.loss(tokens, stream=self.stream)


class Stack(torch.nn.Module):
    """The same over a streamed stack alone, whose x and y are whole."""

    def __init__(self, model: pyckpt.CkptCausalLM, stream: pyckpt.Stream) -> None:
        super().__init__()
        self.model, self.stream = model, stream

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inner = self.model.model
        y = inner.layers(inner.embed_tokens(tokens), stream=self.stream)
        logits = self.model.lm_head(inner.norm(y))[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


# In one pair of processes, whose start takes longer than any of them.
RESIDENT = ("ddp", "ddp-segments", "fsdp2", "fsdp2-segments")
STREAMED = ("ddp-streamed", "fsdp2-streamed", "fsdp2-streamed stack")


def worker(rank: int, kinds: tuple[str, ...], path: str) -> None:
    results = {}
    for kind in kinds:
        print(f"rank {rank}: {kind}", flush=True)
        tokens = make_tokens().chunk(WORLD)[rank]
        stream = pyckpt.Stream(7) if "streamed" in kind else None
        lm = make_model(segments=2 if kind.endswith("segments") else None)
        model = Stack(lm, stream) if stream is not None and kind.endswith("stack") else Loss(lm, stream)
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
        results[kind] = gradients(wrapped)
    if rank == 0:
        torch.save(results, path)


@needs_gloo
def test_two_processes_give_the_gradients_of_one(tmp_path):
    kinds = RESIDENT + STREAMED
    run_processes(WORLD, worker, kinds, str(tmp_path / "grads.pt"))
    results = torch.load(tmp_path / "grads.pt")
    single = Loss(make_model())
    single(make_tokens()).backward()
    truth = gradients(single)
    assert tuple(results) == kinds
    for kind, grads in results.items():
        assert max(relative_errors(grads, truth).values()) < 1e-12, kind
