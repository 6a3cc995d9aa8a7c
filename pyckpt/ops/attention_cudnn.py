"""Attention by cuDNN's kernels, through PyTorch: PYCKPT_ATTENTION=cudnn, on CUDA, for the calls that it takes.

It is faster on Hopper than kernels written in Triton. Its backward adds up dQ in the order in which blocks happen to
finish: gradients are as exact as ours, but the last bits change from run to run, and from one save set to another.
So it is used where asked for, and never under `torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from pyckpt.ops.direct import ops

Gradients = tuple[Tensor, Tensor, Tensor]
VARIABLE = "PYCKPT_ATTENTION"
KINDS = ("triton", "cudnn", "hopper")
_MAX_HEAD_DIM = 128


def asked_for() -> bool:
    """Whether the user wants it. Raises ValueError for a value of the variable that means nothing."""
    value = os.environ.get(VARIABLE, KINDS[0])
    if value not in KINDS:
        raise ValueError(f"{VARIABLE}={value!r}: expected one of {', '.join(KINDS)}")
    return value == "cudnn" and not torch.are_deterministic_algorithms_enabled()


def causal(q: Tensor, k: Tensor, v: Tensor, options: Any) -> bool | None:
    """Whether the mask is causal, or None where cuDNN is not to be used for this call (B, S, H, D)."""
    if not asked_for() or q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    if options.packed or options.softcap or options.dropout or options.sinks is not None:
        return None
    if options.alibi_slopes is not None or not (q.numel() and k.numel()) or k.shape[1] == 1:
        return None  # PyTorch's own choice hands it no single key either
    dims = (q.shape[-1], v.shape[-1])
    if max(dims) > _MAX_HEAD_DIM or any(d % 8 for d in dims) or not torch.backends.cudnn.is_available():
        return None
    return _mask(q.shape[1], k.shape[1], options)


def _mask(queries: int, keys: int, options: Any) -> bool | None:
    """Whether query i sees the keys up to i alone; None if neither these nor all. A pair of tiles may be either."""
    left, right = options.window
    first = options.diagonal(queries, keys)  # where the first query stands on the keys' axis
    if left >= 0 and first + queries - 1 > left:
        return None
    if right < 0 or first + right >= keys - 1:
        return False
    return True if first + right == 0 and queries == keys else None


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """(o (B, S, H, Dv), lse (B, H, S) float32)."""
    heads = (t.transpose(1, 2) for t in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True, 0.0, is_causal, False, scale=scale)
    return found[0].transpose(1, 2).contiguous(), found[1].reshape(q.shape[0], q.shape[2], q.shape[1])


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, is_causal: bool
) -> Gradients:
    """(dq, dk, dv), as q, k and v."""
    heads = (t.transpose(1, 2) for t in (do, q, k, v, o))
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of a dropout that is off
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads,
        lse.unsqueeze(-1),
        nothing,
        nothing,
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        is_causal,
        scale=scale,
    )
    dq, dk, dv = (t.transpose(1, 2).contiguous() for t in found)
    return dq, dk, dv


def tile_forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, is_causal: bool) -> None:
    """Merge what the queries make of these keys into the running (o, lse): float32, (B, S, H, Dv) and (B, H, S)."""
    ops.attention_merge_(o, lse, *forward(q, k, v, scale, is_causal))


def tile_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    grads: Gradients,
) -> None:
    """Add these keys' share to dq, dk and dv, from o and lse over all keys. It is rounded to q's dtype before."""
    for total, part in zip(grads, backward(do, q, k, v, o, lse.contiguous(), scale, is_causal), strict=True):
        total.add_(part)
