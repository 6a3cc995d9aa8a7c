"""Weights that a call does not use have no gradient, as in plain PyTorch: an optimizer is not to move them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_within
from torch import Tensor, nn

import pyckpt

WIDTH, HEADS, EXPERTS = 32, 4, 8


class Experts(nn.Module):
    """A mixture of experts with a Python loop: one that no token has asked for does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        share, index = self.gate(x).softmax(-1).max(-1, keepdim=True)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = (index == i).squeeze(-1)
            if chosen.any():
                y[chosen] = expert(x[chosen]) * share[chosen]
        return y


class Pre(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.unused = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).chunk(3, -1)


class Post(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.mlp = nn.Linear(WIDTH, WIDTH), Experts()

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        x = x + self.proj(o)
        return x + self.mlp(x)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: p.grad for n, p in model.named_parameters()}


def assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    assert {n for n, t in got.items() if t is None} == {n for n, t in want.items() if t is None}
    for name, t in want.items():
        if t is not None:
            # Float32's rounding of sums of a few tokens, in another order.
            assert_within(float((got[name] - t).norm() / (t.norm() + 1e-6)), 1e-4, name)


@pytest.mark.parametrize("tile", [None, 2])
def test_of_a_generic_block(tile):
    block = pyckpt.CkptGenericBlock(Pre(), Post(), d_model=WIDTH, n_heads=HEADS, head_dim=WIDTH // HEADS, tile=tile)
    block(torch.randn(1, 5, WIDTH)).square().mean().backward()
    none = {n for n, t in gradients(block).items() if t is None}
    assert {"pre.unused.weight", "pre.unused.bias"} <= none
    assert sum("experts" in n for n in none) >= 2 * (EXPERTS - 5)  # of five tokens
    block.zero_grad()
    block(torch.randn(1, 400, WIDTH)).square().mean().backward()
    assert {n for n, t in gradients(block).items() if t is None} == {"pre.unused.weight", "pre.unused.bias"}


HOWS: dict[str, dict[str, Any]] = {
    "whole": {},
    "tiles": {"tile": 2},
    "segments": {"segments": 2},
    "stream": {"stream": pyckpt.Stream(2)},
    "stream of segments": {"stream": pyckpt.Stream(2), "segments": 2},
    "stream by block": {"stream": pyckpt.Stream(2, gradients="by block")},
}


@pytest.mark.parametrize("how", HOWS)
def test_of_a_swapped_model(how):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=HEADS)).train()
    for layer in model.model.layers:
        layer.mlp = Experts()
    model.model.layers[1].self_attn.v_proj.requires_grad_(False)
    twin, ids = copy.deepcopy(model), torch.randint(0, 61, (1, 5))
    assert {e.path for e in pyckpt.swap(model, **HOWS[how]).entries[:-1]} == {"generic"}
    for m in (model, twin):
        m(input_ids=ids, labels=ids).loss.backward()
    assert any(t is None for n, t in gradients(twin).items() if "experts" in n)
    assert_same(gradients(model), gradients(twin))
