"""`pyckpt.swap` on a model of one's own on a CPU: time and peak of a step, against torch.utils.checkpoint.

    python bench/own_model.py                                   # about 10 minutes on 2 cores
    python bench/own_model.py --tokens 512 --layers 2 --repeats 1       # less; the results say how much

A GPT in fp32 whose blocks call scaled_dot_product_attention, batch 1, forward and backward; 256 words, so that the
layers are nearly all of it. The variants take turns in one process; medians. Peaks are live bytes of tensors above the
weights, gradients among them, from `zero_grad()` on (pyckpt.measure.memory). Writes bench/results/own_model_cpu.json.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyckpt
from bench import common
from pyckpt.measure.timing import interleaved
from pyckpt.measure.units import format_bytes

NAME = "own_model_cpu"
WIDTH, HEADS, WORDS = 512, 8, 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(o.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(x, self.embedding.weight).flatten(0, 1), ids.flatten())


@contextmanager
def checkpointing(model: GPT) -> Iterator[None]:
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in model.blocks:
            del block.forward


@contextmanager
def swapped(model: GPT, save: str) -> Iterator[None]:
    pyckpt.swap(model, save)
    try:
        yield
    finally:
        pyckpt.unswap(model)


VARIANTS: dict[str, Callable[[GPT], Any]] = {
    "everything stored": lambda model: nullcontext(),
    "torch.utils.checkpoint": checkpointing,
    "swap": lambda model: swapped(model, "attention"),
    'swap, save="input"': lambda model: swapped(model, "input"),
}


def measure(tokens: int, layers: int, repeats: int) -> dict[str, Any]:
    """Of each variant: seconds of a step and the peak's bytes."""
    model, ids = GPT(layers), torch.randint(WORDS, (1, tokens))

    def step(way: Callable[[GPT], Any]) -> None:
        model.zero_grad()
        with way(model):
            model(ids).backward()

    timings = interleaved({n: lambda way=way: step(way) for n, way in VARIANTS.items()}, repeats, warmup=1)
    rows = []
    for name, way in VARIANTS.items():
        with pyckpt.measure.memory(model) as m:
            step(way)
        rows.append({"variant": name, "seconds": timings[name].median, "peak_bytes": m.peak_bytes})
        print(f"{tokens:7,} tokens  {name:24s} {rows[-1]['seconds']:7.2f} s  peak {format_bytes(m.peak_bytes)}")
    return {"tokens": tokens, "variants": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(argv)
    config = {"width": WIDTH, "heads": HEADS, "words": WORDS, "layers": given.layers, "repeats": given.repeats}
    rows = [measure(tokens, given.layers, given.repeats) for tokens in given.tokens]
    path = common.write(NAME, {**common.stamp(), "config": config, "rows": rows})
    print(f"\nwritten to {path.relative_to(common.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
