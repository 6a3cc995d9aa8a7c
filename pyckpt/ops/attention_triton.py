"""Attention by the Triton kernels of `pyckpt.triton_kernels`; what they cannot take goes to PyTorch's products."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from pyckpt.ops import attention as op
from pyckpt.ops.registry import implement


def _kernels() -> Any:
    # Imported late: Triton decides at import whether it interprets, and machines without it never get here.
    from pyckpt.triton_kernels import attention

    return attention


def _served(q: Tensor, v: Tensor) -> bool:
    reason = _kernels().unsupported(q.dtype, q.shape[-1], v.shape[-1])
    if reason and q.dtype != torch.float64:
        warnings.warn(f"pyckpt: {reason}; PyTorch's own products are used here, which is slower", stacklevel=3)
    return reason is None


def _rounds_badly(q: Tensor) -> bool:
    """Triton's interpreter computes bfloat16 on raw bits (3.6 to 3.9): it gets float32 instead."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu"


def _options(
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
) -> Any:
    return _kernels().Options(
        window=(window_left, window_right),
        softcap=softcap,
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )


@implement("attention_fwd", "triton")
def attention_fwd(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    if not _served(q, v):
        return op.attention_fwd(q, k, v, *options)
    if _rounds_badly(q):
        o, lse = attention_fwd(q.float(), k.float(), v.float(), *options)
        return o.to(q.dtype), lse
    return _kernels().forward(q, k, v, _options(*options))


@implement("attention_bwd", "triton")
def attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None, *options: Any
) -> op.Gradients:
    if not _served(q, v):
        return op.attention_bwd(do, q, k, v, o, lse, dlse, *options)
    if _rounds_badly(q):
        grads = attention_bwd(do.float(), q.float(), k.float(), v.float(), o.float(), lse, dlse, *options)
        dq, dk, dv = (g.to(q.dtype) for g in grads)
        return dq, dk, dv
    kernels = _kernels()
    return kernels.backward(do, q, k, v, lse, kernels.delta(do, o, dlse), _options(*options))
