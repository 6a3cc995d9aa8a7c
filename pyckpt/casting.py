"""What PyTorch's autocast does to the operands of a product, for functions that autocast does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on, as a matrix product would take them."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not _is_on(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


# torch.compile of older versions cannot ask this itself.
_KINDS = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu") if torch.amp.is_autocast_available(kind)
)


def autocasts(device_type: str, dtype: torch.dtype) -> bool:
    """Autocast is on for products of such a tensor."""
    return _is_on(device_type) and dtype != torch.float64


def _is_on(device_type: str) -> bool:
    """PyTorch refuses to be asked about devices that have no autocast, the meta device for one."""
    return device_type in _KINDS and torch.is_autocast_enabled(device_type)
