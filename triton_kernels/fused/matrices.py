"""What the launchers of the fused products share: a normalised input that is not made yet, and checks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..rows import check_device, exact_float32
from .choice import Config

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Normed:
    """norm(x), made tile by tile inside the products: x (t, width); statistics (t,) in float32, mean None for RMSNorm.

    weight, and bias where the norm has one, are (width,).
    """

    x: Tensor
    mean: Tensor | None
    rstd: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def width(self) -> int:
        return self.x.shape[1]

    def pointers(self) -> dict[str, Tensor | None]:
        """The kernels' arguments of these tensors."""
        return {
            "p_x": self.x,
            "p_mean": self.mean,
            "p_rstd": self.rstd,
            "p_norm": self.weight,
            "p_norm_bias": self.bias,
        }

    def check(self) -> None:
        """Raise ValueError for what the kernels cannot read."""
        tokens = self.x.shape[0]
        check_matrix("x", self.x, (tokens, self.width))
        if self.width == 0:  # the kernels' loops over the width run at least once
            raise ValueError(f"x must have at least one column to be normalised, got {tuple(self.x.shape)}")
        for name, t, size in (
            ("mean", self.mean, tokens),
            ("rstd", self.rstd, tokens),
            ("the norm's weight", self.weight, self.width),
            ("the norm's bias", self.bias, self.width),
        ):
            if t is None:
                continue
            if tuple(t.shape) != (size,) or (size > 1 and t.stride(0) != 1) or t.device != self.x.device:
                raise ValueError(
                    f"{name} must be contiguous ({size},) on {self.x.device}, got {tuple(t.shape)} with strides "
                    f"{t.stride()} on {t.device}"
                )


def check_matrix(name: str, t: Tensor, shape: tuple[int, int], like: Tensor | None = None) -> None:
    """Raise ValueError unless t is such a matrix of unit last stride, of `like`'s dtype and device."""
    check_device(t)
    if t.dtype not in DTYPES:
        raise ValueError(f"{name} is {t.dtype}; the fused products take float16, bfloat16 and float32")
    if tuple(t.shape) != shape or (t.stride(-1) != 1 and t.shape[-1] != 1):
        raise ValueError(
            f"{name} must be {shape} with a unit last stride, got {tuple(t.shape)} with strides {t.stride()}"
        )
    if like is not None and (t.dtype != like.dtype or t.device != like.device):
        raise ValueError(f"{name} is {t.dtype} on {t.device}, expected {like.dtype} on {like.device}")


def check_vector(name: str, t: Tensor | None, size: int) -> None:
    """Raise ValueError unless t is a contiguous vector, or None."""
    if t is not None and (tuple(t.shape) != (size,) or (size > 1 and t.stride(0) != 1)):
        raise ValueError(f"{name} must be contiguous ({size},), got {tuple(t.shape)} with strides {t.stride()}")


def options(config: Config, dtype: torch.dtype) -> dict[str, object]:
    """What every launch says: how float32 products are made, warps and stages.

    Without fused multiply-adds outside the products: the compiler places them as it likes in each kernel, and what a
    backward makes again must have the forward's bits.
    """
    exact = dtype == torch.float32 and exact_float32()
    return {
        "PRECISION": config.exact if exact else "tf32",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": False,
    }
