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
from pyckpt.ops import attention_triton, dropout, linear_cross_entropy_triton, pointwise_triton  # noqa: F401
from pyckpt.ops.registry import IMPLEMENTATIONS, implement

MODULE = "pyckpt._cuda"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Those that the extension serves as they are, given the first argument's dtype.
OPS = ("glu_fwd", "glu_fwd_", "glu_bwd", "glu_bwd_", "act_fwd", "act_fwd_", "act_bwd", "act_bwd_")


def _load() -> str:
    """Load the extension; "" if that went well, else why not."""
    try:
        importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        return "not built" if error.name == MODULE else str(error)
    except ImportError as error:  # built for another PyTorch or Python
        return str(error)
    return ""


def _other(name: str) -> Callable[..., Any]:
    """The implementation that takes what the extension does not."""
    have = IMPLEMENTATIONS[name]
    return have.get("triton", have["torch"])


def _by_dtype(name: str) -> Callable[..., Any]:
    ours, other = getattr(torch.ops.pyckpt_cuda, name).default, _other(name)

    def run(*args: Any, **kwargs: Any) -> Any:
        return (ours if args[0].dtype in DTYPES else other)(*args, **kwargs)

    return run


problem = _load()
if not problem:
    for _name in OPS:
        implement(_name, "cuda")(_by_dtype(_name))
