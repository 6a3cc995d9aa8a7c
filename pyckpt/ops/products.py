"""Products that are summed into a wider accumulator: half-precision factors, float32 sum.

The sum is an op of its own: PyTorch's FLOP counter fails on the overload of addmm that it takes on CUDA.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyckpt.compiling import constant_result
from pyckpt.ops.registry import define


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`; on CUDA a float32 product of half factors is never rounded to half on its way."""
    if dtype != a.dtype and _widens(a.device, a.dtype, dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def sum_of_products(dys: Sequence[Tensor], weights: Sequence[Tensor], out: Tensor) -> None:
    """out (t, width) = Σ dy W, one product after another, dys (t, n), weights (n, width)."""
    torch.mm(dys[0], weights[0], out=out)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        # As an out= overload: FLOP counters know addmm and do not know addmm_.
        torch.addmm(out, dy, weight, out=out)


def _add_product_fake(total: Tensor, a: Tensor, b: Tensor) -> None:
    return None


@define("add_product_(Tensor(a!) total, Tensor a, Tensor b) -> ()", fake=_add_product_fake)
def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, n) += a (m, k) b (k, n): one product with beta = 1 where the library has it for these dtypes.

    Elsewhere through a temporary of a's dtype. total has a's dtype or a wider one.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif _widens(a.device, a.dtype, total.dtype):
        torch.addmm(total, a, b, total.dtype, out=total)
    else:
        total += torch.mm(a, b)


@constant_result
def _widens(device: torch.device, factors: torch.dtype, total: torch.dtype) -> bool:
    """Whether mm and addmm write `total` from factors of a narrower dtype: CUDA's do, and not in every version."""
    return device.type == "cuda" and _tried(device, factors, total)


@functools.cache
def _tried(device: torch.device, factors: torch.dtype, total: torch.dtype) -> bool:
    if device.type == "cuda" and not torch.cuda.is_available():  # only fakes of its tensors are here
        return False
    # Seen by no mode: the FLOP counter, which fails on this addmm, would make the answer no, for good.
    with _disable_current_modes():
        a, sums = (torch.zeros(16, 16, dtype=d, device=device) for d in (factors, total))
        try:
            torch.mm(a, a, out_dtype=total)
            torch.addmm(sums, a, a, total, out=sums)
        except (RuntimeError, TypeError):
            return False
    return True


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(torch.ops.pyckpt.add_product_)
    def flops(total_shape, a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]


_register_flops()
