"""Launchers of the kernels for Hopper: descriptors of tensors, and the kernel's constants."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..tuning import Config
from .attention_bwd import attention_bwd_kernel_dkdv_hopper, attention_bwd_kernel_dq_hopper
from .attention_fwd import attention_fwd_kernel_hopper
from .parts import ROWS

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
WARPS = 4  # of the warpgroup that loads; those that compute are beside it
Four = tuple[Tensor, Tensor, Tensor, Tensor]


@functools.cache
def shared_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """How a tile of one head, [1, rows, 1, columns], lies in shared memory: as wgmma reads it."""
    return gl.NVMMASharedLayout.get_default_for([1, rows, 1, columns], DTYPES[dtype])


def described(t: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of (B, S, H, D) for tiles of `rows` tokens of one head."""
    dim = t.shape[-1]
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, rows, 1, dim], shared_layout(rows, dim, t.dtype))


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: what all of them have. `numbers` are the kernels' sizes, in their order.

    Tensors are (B, S, H, D), lse and delta (B, H, S) with a unit last stride.
    """

    config: Config
    programs: int
    numbers: tuple[int, ...]
    left: bool
    right: bool
    scale: float

    def forward(self, tensors: Four, lse: Tensor, sinks: Tensor | None, accumulate: bool) -> None:
        """Fill o and lse, of (q, k, v, o), or merge into those, in float32, that are there."""
        o = tensors[3]
        attention_fwd_kernel_hopper[(self.programs,)](
            *_described(tensors[:3], (ROWS.value, self.config.block_n, self.config.block_n)),
            None if accumulate else described(o, ROWS.value),
            o if accumulate else None,
            lse,
            sinks,
            *o.stride()[:3],
            *lse.stride()[:2],
            *self.numbers,
            self.scale,
            SINKS=sinks is not None,
            ACCUMULATE=accumulate,
            OVERLAP=self.config.overlap,
            CONSUMERS=self.config.block_m // ROWS.value,
            BLOCK_N=self.config.block_n,
            **self._constants(tensors[0]),
        )

    def dkdv(self, tensors: Four, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Fill dk and dv, of (q, k, v, do), in float32 too."""
        attention_bwd_kernel_dkdv_hopper[(self.programs,)](
            *_described(tensors, (self.config.block_m, ROWS.value, ROWS.value, self.config.block_m)),
            lse,
            delta,
            dk,
            dv,
            *lse.stride()[:2],
            *dk.stride()[:3],
            *dv.stride()[:3],
            *self.numbers,
            self.scale,
            CONSUMERS=self.config.block_n // ROWS.value,
            BLOCK_M=self.config.block_m,
            **self._constants(tensors[0]),
        )

    def dq(self, tensors: Four, lse: Tensor, delta: Tensor, dq: Tensor, accumulate: bool) -> None:
        """Fill dq, of (q, k, v, do), or add to it."""
        attention_bwd_kernel_dq_hopper[(self.programs,)](
            *_described(tensors, (ROWS.value, self.config.block_n, self.config.block_n, ROWS.value)),
            lse,
            delta,
            dq,
            *lse.stride()[:2],
            *dq.stride()[:3],
            *self.numbers,
            self.scale,
            ACCUMULATE=accumulate,
            CONSUMERS=self.config.block_m // ROWS.value,
            BLOCK_N=self.config.block_n,
            **self._constants(tensors[0]),
        )

    def _constants(self, q: Tensor) -> dict[str, Any]:
        return {
            "LEFT": self.left,
            "RIGHT": self.right,
            "BLOCK_D": q.shape[-1],
            "STAGES": self.config.num_stages,
            "num_warps": WARPS,
            "enable_fp_fusion": True,
        }


def _described(tensors: Sequence[Tensor], rows: Sequence[int]) -> Iterator[TensorDescriptor]:
    return (described(t, n) for t, n in zip(tensors, rows, strict=True))
