"""The ops by the CUDA C++ kernels of csrc/, where the extension `pyckpt._cuda` was built.

The extension declares ops of its own, in the namespace `pyckpt_cuda`, under the names and with the arguments of those
here. It takes float16, bfloat16 and float32; what it does not take goes to the next backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

# The ops are declared, and have their other implementations, before this module adds its own.
from pyckpt.ops import attention_triton, dropout, linear_cross_entropy_triton, pointwise_triton, registry  # noqa: F401
from pyckpt.ops.registry import IMPLEMENTATIONS, implement

MODULE = "pyckpt._cuda"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Those that the extension serves as they are, given the first argument's dtype.
OPS = (
    *("rms_norm_fwd", "rms_norm_bwd", "rms_norm_bwd_add_"),
    *("layer_norm_fwd", "layer_norm_bwd", "layer_norm_bwd_add_"),
    *("add_rms_norm_fwd", "add_layer_norm_fwd"),
    *("glu_fwd", "glu_fwd_", "glu_bwd", "glu_bwd_", "act_fwd", "act_fwd_", "act_bwd", "act_bwd_"),
)


def register() -> str:
    """Load the extension and register what it serves. Returns "" if that went well, else why there is none."""
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        return "not built" if error.name == MODULE else str(error)
    except ImportError as error:  # built for another PyTorch or Python
        return str(error)
    registry.extension_device_type = module.DEVICE_TYPE
    for name in OPS:
        implement(name, "cuda")(_by_dtype(name))
    return ""


def _by_dtype(name: str) -> Callable[..., Any]:
    """The extension's op for the dtypes that it takes, the next backend's for others."""
    ours, have = getattr(torch.ops.pyckpt_cuda, name).default, IMPLEMENTATIONS[name]
    other = have.get("triton", have["torch"])

    def run(*args: Any, **kwargs: Any) -> Any:
        return (ours if args[0].dtype in DTYPES else other)(*args, **kwargs)

    return run


problem = register()
