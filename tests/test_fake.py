"""FakeTensorMode, in which tools estimate what a model takes: shapes and devices without values."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import pyckpt


@pytest.fixture(autouse=True)
def fake():
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("save", ["attention", "attention+qkv", "all", "input"])
def test_a_block_trains(save):
    block = pyckpt.CkptTransformerBlock(48, 4, n_kv_heads=2, bias=True, qk_norm=True, tile=8, save=save)
    x = torch.randn(2, 21, 48, requires_grad=True)
    y = block(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in block.parameters())


class Parts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(48, 48)

    def forward(self, x, other):
        return (self.linear(x),) * 3 if other.dim() == 1 else x + self.linear(other)


def test_a_generic_block_trains():
    block = pyckpt.CkptGenericBlock(Parts(), Parts(), 48, 4, tile=8)
    x = torch.randn(2, 21, 48, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.shape == x.shape and all(p.grad.shape == p.shape for p in block.parameters())


@pytest.mark.parametrize("packed", [False, True])
def test_a_language_model_trains(packed):
    model = pyckpt.CkptCausalLM(61, 2, d_model=48, n_heads=4)
    tokens = torch.randint(0, 61, (30,) if packed else (2, 15))
    more = {"cu_seqlens": torch.tensor([0, 12, 30], dtype=torch.int32)} if packed else {}
    loss = model.loss(tokens, **more)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert all(p.grad.shape == p.shape for p in model.parameters())
    assert model(tokens, **more).shape == (*tokens.shape, 61)


def test_values_that_are_there_cannot_be_looked_at():
    """Of real labels beside fake tensors nothing can be computed."""
    with unset_fake_temporarily():
        target = torch.zeros(3, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert pyckpt.linear_cross_entropy(torch.empty(3, 8), torch.empty(5, 8), target).shape == ()


def test_functions():
    q = torch.randn(2, 16, 4, 16, requires_grad=True)
    x, w = torch.randn(30, 64, requires_grad=True), torch.randn(100, 64, requires_grad=True)
    attended = pyckpt.attention(q, q, q).sum() + pyckpt.rope(q, torch.arange(16)).sum()
    lost = pyckpt.linear_cross_entropy(pyckpt.rms_norm(x, torch.ones(64)), w, torch.randint(0, 100, (30,)))
    (attended + lost).backward()
    assert q.grad.shape == q.shape and x.grad.shape == x.shape and w.grad.shape == w.shape
