"""A layer's own forward as a whole, and once more in the backward."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from pyckpt.swap.replaced import Replaced

# By these names layers of transformers are handed what they are to write keys, values and states to.
_CACHES = ("past_key_values", "layer_past", "cache_params")


def caches(given: dict[str, Any]) -> bool:
    """The layer is to write to a cache."""
    return bool(given.get("use_cache")) or any(given.get(n) is not None for n in _CACHES)


def run_twice(layer: Replaced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The original forward; while gradients are enabled its arguments alone are kept. It writes to no cache then.

    Where transformers' own checkpointing was enabled it does the same, as it was told to.
    """
    checkpoints_itself = bool(getattr(layer.module, "gradient_checkpointing", False)) and layer.module.training
    if checkpoints_itself or not torch.is_grad_enabled():
        return layer.original(*args, **kwargs)
    args = tuple(_cacheless(n, value) for n, value in itertools.zip_longest(layer.names[: len(args)], args))
    kwargs = {n: _cacheless(n, value) for n, value in kwargs.items()}
    return checkpoint(functools.partial(layer.original, *args, **kwargs), use_reentrant=False)


def _cacheless(name: str | None, value: Any) -> Any:
    """An argument of this name, None where it is a cache."""
    return None if name in _CACHES else False if name == "use_cache" else value
