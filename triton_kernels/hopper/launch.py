"""Launchers of the kernels for Hopper: descriptors of tensors, and the kernel's constants."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..tuning import Config
from .attention_fwd import ROWS, attention_fwd_kernel_hopper

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
WARPS = 4  # of the warpgroup that loads; those that compute are beside it


@functools.cache
def shared_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """How a tile of one head, [1, rows, 1, columns], lies in shared memory: as wgmma reads it."""
    return gl.NVMMASharedLayout.get_default_for([1, rows, 1, columns], DTYPES[dtype])


def described(t: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of (B, S, H, D) for tiles of `rows` tokens of one head."""
    dim = t.shape[-1]
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, rows, 1, dim], shared_layout(rows, dim, t.dtype))


def forward(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    lse: Tensor,
    sinks: Tensor | None,
    numbers: tuple[int, ...],
    scale: float,
    config: Config,
    *,
    programs: int,
    masks: dict[str, bool],
) -> None:
    """Fill o and lse (B, H, S) of (q, k, v, o), (B, S, H, D) each; `numbers` are the kernel's sizes."""
    q, k, v, o = tensors
    dim, rows = q.shape[-1], ROWS.value
    attention_fwd_kernel_hopper[(programs,)](
        described(q, rows),
        described(k, config.block_n),
        described(v, config.block_n),
        described(o, rows),
        lse,
        sinks,
        lse.stride(0),
        lse.stride(1),
        *numbers,
        scale,
        **masks,
        SINKS=sinks is not None,
        OVERLAP=config.overlap,
        CONSUMERS=config.block_m // rows,
        BLOCK_N=config.block_n,
        BLOCK_D=dim,
        BLOCK_DV=dim,
        STAGES=config.num_stages,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
