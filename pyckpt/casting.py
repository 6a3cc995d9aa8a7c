"""What PyTorch's autocast does to the operands of a product, for functions that autocast does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on, as a matrix product would take them."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
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


def autocasts(t: Tensor) -> bool:
    """Autocast is on for products of this tensor."""
    kind = t.device.type
    return kind in _KINDS and torch.is_autocast_enabled(kind) and t.dtype != torch.float64
