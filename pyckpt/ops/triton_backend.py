"""What the ops' Triton implementations share: how they reach the kernels, and what the interpreter cannot do."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor


@functools.cache
def kernels(module: str) -> Any:
    """A module of `pyckpt.triton_kernels`.

    Imported late: Triton decides at import whether it interprets, and machines without it never get here.
    """
    return importlib.import_module(f"pyckpt.triton_kernels.{module}")


def rounds_badly(t: Tensor) -> bool:
    """Triton's interpreter computes bfloat16 on raw bits (3.6 to 3.9): it gets float32 instead."""
    return t.dtype == torch.bfloat16 and t.device.type == "cpu"
