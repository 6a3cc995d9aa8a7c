"""Weight gradients of one backward, summed over tiles and handed to autograd once.

Summing tiles in bf16 would lose bits with every addition (a step at 500K tokens makes over a hundred), so partial
sums are float32: on CUDA every product is added to its sum as it is made, with no temporary. A single tile needs no
sum, and its product goes out as it is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pyckpt.ops.chunks import acc_dtype
from pyckpt.ops.direct import ops
from pyckpt.ops.products import product


class WeightGradients:
    """Accumulators of the weights whose gradient is wanted; asks for any other are ignored."""

    def __init__(self, wanted: Collection[str], n_tiles: int) -> None:
        self._wanted = frozenset(wanted)
        self._single = n_tiles == 1
        self._sums: dict[str, Tensor] = {}
        self._unused: set[str] = set()

    def wants(self, *names: str) -> bool:
        return any(name in self._wanted for name in names)

    def add_product(self, name: str, dy: Tensor, x: Tensor) -> None:
        """Add dyᵀ x: the gradient of a weight (out, in) from dy (t, out) and x (t, in)."""
        if name not in self._wanted:
            return
        total = self._sums.get(name)
        if total is None:
            self._sums[name] = product(dy.t(), x, x.dtype if self._single else acc_dtype(x.dtype))
        else:
            ops.add_product_(total, dy.t(), x)

    def add_normed_product(self, name: str, dy: Tensor, normed: tuple[Any, ...]) -> None:
        """`add_product` of dy and norm(x), given as `pyckpt.ops.fused` has it: the normalised x is never stored."""
        if name not in self._wanted:
            return
        total = self._sums.get(name)
        if total is None:
            dtype = dy.dtype if self._single else acc_dtype(dy.dtype)
            made = self._sums[name] = torch.empty(dy.shape[1], normed[0].shape[1], dtype=dtype, device=dy.device)
            ops.norm_wgrad_(dy, *normed, made, False)
        else:
            ops.norm_wgrad_(dy, *normed, total, True)

    def add_rows(self, name: str, dy: Tensor) -> None:
        """Add the sum of dy (t, n) over tokens: the gradient of a bias."""
        if name in self._wanted:
            self.add(name, dy.sum(0, dtype=acc_dtype(dy.dtype)))

    def add(self, name: str, grad: Tensor, owned: bool = True) -> None:
        """Add a gradient that is already summed over the tile. Not `owned`: its memory is others' too."""
        if name not in self._wanted:
            return
        total = self._sums.get(name)
        if total is None:
            made = grad.to(acc_dtype(grad.dtype))
            copied = made is grad and not owned
            self._sums[name] = grad.clone(memory_format=torch.contiguous_format) if copied else made
        else:
            total += grad

    def add_nothing(self, name: str) -> None:
        """A tile's output does not depend on the weight: where no other's does, it has no gradient, as in autograd."""
        self._unused.add(name)

    @property
    def single(self) -> bool:
        """There is one tile, and with it one gradient of each weight that a single part has."""
        return self._single

    def result(self, name: str, like: Tensor) -> Tensor | None:
        """The gradient of `like`, in its dtype; None where it is not wanted, or nothing has used it.

        Gives the accumulator away.
        """
        if name not in self._wanted:
            return None
        total = self._sums.pop(name, None)
        if total is not None:
            return total.to(like.dtype)
        return None if name in self._unused else torch.zeros_like(like)


def storage_of(t: Tensor) -> int:
    """What tensors on the same memory have in common; of one without a memory of its own (a sparse one) the tensor."""
    return t.untyped_storage()._cdata if torch._C._has_storage(t) else id(t)
