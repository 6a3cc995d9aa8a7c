"""What the launchers of the row-wise and pointwise kernels share: 2-D views, tile sizes, the device to launch on."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .sizes import cdiv, next_power_of_2

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def exact_float32() -> bool:
    """Whether products of float32 keep all bits. PyTorch answers no more once its newer setting was used."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision != "tf32"


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def check_device(t: Tensor) -> None:
    """Raise ValueError for a tensor that no Triton kernel can read."""
    if t.device.type != "cuda" and not tuning.interpreted():
        raise ValueError(
            f"a tensor is on {t.device}; Triton kernels run on CUDA, or on the CPU under TRITON_INTERPRET=1"
        )
    if t.dtype not in DTYPES:
        raise ValueError(f"dtype {t.dtype}: expected one of {', '.join(str(d)[6:] for d in DTYPES)}")


def rows_of(t: Tensor) -> Tensor:
    """t (..., D) as (rows, D) with a unit last stride: a view where the layout has one."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def rows_to_write(t: Tensor) -> Tensor:
    """Like `rows_of`, always a view: raises where the layout has none."""
    flat = t.view(-1, t.shape[-1])
    if flat.stride(-1) != 1 and flat.shape[-1] != 1:
        raise ValueError(f"a tensor to be written must have a unit last stride, got strides {t.stride()}")
    return flat


def warps(elements: int, most: int = 16) -> int:
    """Warps for a tile: 16 values a thread, so that the loads are wide and many at once."""
    return max(1, min(most, next_power_of_2(cdiv(elements, 32 * 16))))
