"""The ops by the CUDA C++ kernels of csrc/, where the extension `pyckpt._cuda` was built.

The extension declares ops of its own, in the namespace `pyckpt_cuda`, under the names and with the arguments of those
here. It takes float16, bfloat16 and float32; what it does not take goes to the next backend. So does everything on a
device for which it was not built, or whose driver is too old for the CUDA that it was built with: with one warning.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The ops are declared, and have their other implementations, before this module adds its own.
from pyckpt.ops import (  # noqa: F401
    attention_triton,
    dropout,
    linear_cross_entropy,
    linear_cross_entropy_triton,
    pointwise_triton,
    registry,
)
from pyckpt.ops.linear_cross_entropy_triton import InPlaceHead
from pyckpt.ops.registry import implement
from pyckpt.ops.rope import angle_rows

MODULE = "pyckpt._cuda"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Those that the extension serves by itself; the loss is Python around its cross entropy.
OPS = (
    *("rms_norm_fwd", "rms_norm_bwd", "rms_norm_bwd_add_"),
    *("layer_norm_fwd", "layer_norm_bwd", "layer_norm_bwd_add_"),
    *("add_rms_norm_fwd", "add_layer_norm_fwd"),
    *("glu_fwd", "glu_fwd_", "glu_bwd", "glu_bwd_", "act_fwd", "act_fwd_", "act_bwd", "act_bwd_"),
    *("rope", "rope_", "rope_qk_", "dropout_", "attention_delta", "attention_merge_"),
)


def register() -> str:
    """Load the extension and register what it serves. Returns "" if that went well, else why there is none."""
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        return "not built" if error.name == MODULE else str(error)
    except ImportError as error:  # built for another PyTorch or Python
        return str(error)
    if not hasattr(module, "problem_on"):
        return "it was built from other sources: run make cuda, or install pyckpt again"
    registry.extension_device_type = module.DEVICE_TYPE
    for name in OPS:
        implement(name, "cuda")(_where_it_can(name))
    for name, fn in (("fwd", _loss_fwd), ("bwd", _loss_bwd), ("tile_", _loss_tile)):
        implement(f"linear_cross_entropy_{name}", "cuda")(fn)
    return ""


# --- what the extension takes -------------------------------------------------------------------------------


@functools.cache
def _runs_on(device: torch.device) -> bool:
    """Whether it was built for this device and its driver; warns where it was not."""
    found = problem_on(device)
    if found:
        warnings.warn(f"{found}; other kernels are used there until then", stacklevel=2)
    return not found


def problem_on(device: torch.device) -> str:
    """Why the extension's kernels do not run on this device; empty where they do."""
    found: str = importlib.import_module(MODULE).problem_on(device.index or 0)
    return found


# Which arguments of an op have to be of one dtype, where that is more than the first: a block whose residual stream is
# float32 has a norm's dy in the products' dtype.
_ALIKE = {
    **dict.fromkeys(("add_rms_norm_fwd", "add_layer_norm_fwd", "attention_delta", "rope_qk_"), (0, 1)),
    **dict.fromkeys(("rms_norm_bwd", "layer_norm_bwd", "glu_fwd", "glu_fwd_", "act_bwd", "act_bwd_"), (0, 1)),
    **dict.fromkeys(("glu_bwd", "glu_bwd_"), (0, 1, 2)),
    "rms_norm_bwd_add_": (0, 1, 4),
    "layer_norm_bwd_add_": (0, 1, 5),
}


def _one_dtype(name: str) -> Callable[..., bool]:
    alike = _ALIKE.get(name, (0,))

    def takes(*args: Any) -> bool:
        dtype = args[0].dtype
        return dtype in DTYPES and all(args[i].dtype == dtype for i in alike)

    return takes


def _dropout(x: Tensor, residual: Tensor | None, out: Tensor, *args: Any) -> bool:
    written = out.dtype in (x.dtype, torch.float32) and (residual is None or residual.dtype == out.dtype)
    return x.dtype in DTYPES and written


def _merge(o: Tensor, lse: Tensor, part_o: Tensor, *args: Any) -> bool:
    return part_o.dtype in DTYPES and o.dtype in (part_o.dtype, torch.float32) and lse.is_contiguous()


_TAKES: dict[str, Callable[..., bool]] = {"dropout_": _dropout, "attention_merge_": _merge}


def _where_it_can(name: str) -> Callable[..., Any]:
    """The extension's op for what it takes, the next backend's for the rest."""
    takes, ours = _TAKES.get(name) or _one_dtype(name), getattr(torch.ops.pyckpt_cuda, name).default
    if name.startswith("rope"):
        ours = _with_rows(ours, 2 if name == "rope_qk_" else 1)

    def run(*args: Any) -> Any:
        device = args[0].device
        return (ours if takes(*args) and _runs_on(device) else registry.beside_cuda(name, device.type))(*args)

    return run


def _with_rows(ours: Callable[..., Any], first: int) -> Callable[..., Any]:
    """Give it the angles as rows; `first` is where cos and sin are."""

    def run(*args: Any) -> Any:
        return ours(*args[:first], *angle_rows(args[0], *args[first : first + 2]), *args[first + 2 :])

    return run


# --- the loss -----------------------------------------------------------------------------------------------


class _Head(InPlaceHead):
    """Its chunks go through the extension's cross entropy."""

    def _run(self, *args: Any) -> None:
        *tensors, gradient = args
        torch.ops.pyckpt_cuda.cross_entropy_.default(*tensors, *self.options.values(), gradient)


def _takes_loss(x: Tensor) -> bool:
    return x.dtype in DTYPES and _runs_on(x.device)


def _loss_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *args: Any) -> Any:
    if not _takes_loss(x):
        return registry.beside_cuda("linear_cross_entropy_fwd", x.device.type)(x, weight, bias, target, *args)
    *options, token_weight, reduction, need_dx, need_dw, need_db = args
    head = _Head(weight, bias, *options)
    return linear_cross_entropy.forward(head, x, target, token_weight, reduction, need_dx, need_dw, need_db)


def _loss_bwd(
    dloss: Tensor, lse: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *args: Any
) -> Any:
    if not _takes_loss(x):
        return registry.beside_cuda("linear_cross_entropy_bwd", x.device.type)(
            dloss, lse, x, weight, bias, target, *args
        )
    *options, need_dx, need_dw, need_db = args
    head = _Head(weight, bias, *options)
    return linear_cross_entropy.backward(head, dloss, lse, x, target, need_dx, need_dw, need_db)


def _loss_tile(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *args: Any) -> Any:
    if not _takes_loss(x):
        return registry.beside_cuda("linear_cross_entropy_tile_", x.device.type)(x, weight, bias, target, *args)
    *options, dloss, dx, dw, db = args
    return linear_cross_entropy.tile(_Head(weight, bias, *options), x, target, dloss, dx, dw, db)


problem = register()
