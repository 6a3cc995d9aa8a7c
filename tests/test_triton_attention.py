"""The Triton attention kernels: on a GPU as they are, without one in Triton's interpreter, where they are slow."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import check_truth
from torch import Tensor

import pyckpt
from pyckpt.ops import reference
from pyckpt.ops.attention_triton import _kernels

attention = _kernels()
tuning = attention.tuning
ops = torch.ops.pyckpt

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter computes bfloat16 on raw bits (Triton 3.6 to 3.9).
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
MASKS = {
    "full": ({"causal": False}, (-1, -1)),
    "causal": ({}, (-1, 0)),
    "window": ({"window": 20}, (20, 0)),
    "window-both": ({"causal": False, "window": (17, 3)}, (17, 3)),
    "window-right": ({"causal": False, "window": (-1, 4)}, (-1, 4)),
}


@pytest.fixture(autouse=True)
def forced(monkeypatch) -> None:
    monkeypatch.setenv("PYCKPT_BACKEND", "triton")


def qkv(
    sq: int, sk: int, heads: int = 2, kv_heads: int = 1, dim: int = 16, dim_v: int | None = None, batch: int = 1
) -> dict[str, Tensor]:
    shapes = {"q": (sq, heads, dim), "k": (sk, kv_heads, dim), "v": (sk, kv_heads, dim_v or dim)}
    return {n: torch.randn(batch, *shape, device=DEVICE) for n, shape in shapes.items()}


def check(inputs: dict[str, Tensor], mask: str, dtype: torch.dtype, lse: bool = False, **options: Any) -> None:
    """Outputs and gradients by the 2x rule against the formula, in the same dtype and in float64."""

    def ours(*t: Tensor) -> Any:
        return pyckpt.attention(*t, **MASKS[mask][0], return_lse=lse, **options)

    def formula(*t: Tensor) -> Any:
        given = {**options, "softcap": options.get("softcap") or 0.0}
        both = reference.attention(*t, window=MASKS[mask][1], **given)
        return both if lse else both[0]

    # A gradient is a sum of (dP - delta), where each is a product of two rows of random numbers.
    terms = inputs["v"].shape[-1] ** 0.5
    check_truth(ours, formula, formula, {n: t.to(dtype) for n, t in inputs.items()}, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (70, 1), (1, 70), (50, 83), (83, 50), (64, 64)])
def test_lengths_and_masks(sq, sk, mask, dtype):
    check(qkv(sq, sk), mask, dtype, lse=True)


def test_the_forced_backend_serves(monkeypatch):
    served = []
    for name in ("forward", "backward"):
        real = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, real=real, name=name, **o: served.append(name) or real(*a, **o))
    q, k, v = (t.requires_grad_() for t in qkv(5, 5).values())
    pyckpt.attention(q, k, v).sum().backward()
    assert served == ["forward", "backward"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["causal", "window-both"])
def test_packed(mask, dtype):
    cu_seqlens = torch.tensor([0, *itertools.accumulate([0, 19, 1, 0, 43, 7, 0])], dtype=torch.int32, device=DEVICE)
    check({n: t[0] for n, t in qkv(70, 70).items()}, mask, dtype, lse=True, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(dtype):
    check(qkv(50, 83), "causal", dtype, lse=True, softcap=1.5)
    check(qkv(40, 40), "window", dtype, softcap=30.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(16, 16), (24, 40), (64, 64), (192, 128), (256, 256)])
def test_head_dims(dims, dtype):
    check(qkv(40, 40, 1, 1, *dims), "causal", dtype)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1), (3, 3)])
def test_heads(heads):
    check(qkv(37, 40, *heads, batch=2), "causal", torch.float32)
