"""The forward of a decoder layer that cannot be cut at its attention: it runs again as a whole in the backward."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyckpt.swap import families
from pyckpt.swap.generic import check_unwatched
from pyckpt.swap.layer import CALL
from pyckpt.swap.modules import UnsupportedError
from pyckpt.swap.replaced import Replaced
from pyckpt.swap.shadow import unsharded_class
from pyckpt.swap.survey import check_weights

# By these names layers of transformers are handed what they are to write keys, values and states to.
_CACHES = ("past_key_values", "layer_past", "cache_params")
# Packages whose modules run twice under transformers' own checkpointing.
_TRUSTED = ("torch.nn.", "transformers.", "peft.", "bitsandbytes.")


def check(model: Any, layer: nn.Module) -> None:
    """Raise `UnsupportedError` where it is not known that the layer may run twice.

    That is known of the classes of transformers that its own checkpointing runs twice, of what PEFT and others put
    into them, and not of classes of one's own, which may keep what they have seen.
    """
    families.check_version()
    check_weights(layer)  # with its weights it might be cut
    kinds = {k.__name__ for k in type(layer).__mro__ if k.__module__.startswith("transformers.")}
    if "GradientCheckpointingLayer" not in kinds or not getattr(model, "supports_gradient_checkpointing", False):
        raise UnsupportedError("transformers does not say that it may run twice")
    for path, module in layer.named_modules():
        kind = unsharded_class(module)
        if not kind.__module__.startswith(_TRUSTED):
            where = f"its {path} is a {kind.__name__}" if path else f"{kind.__name__} is a class of your own"
            raise UnsupportedError(f"{where}, which may keep something when it runs twice")
    check_unwatched(layer)


class CheckpointedLayer(Replaced):
    """Keeps what the layer is given alone, by torch.utils.checkpoint, wherever gradients are enabled.

    `told`: it waits for its model's forward to hand it a `Call`, as swapped layers beside it do. Else it decides by
    itself: in training it writes to no cache, which would be written to twice (transformers' own checkpointing does
    the same); in eval mode with a cache it is the original.
    """

    def __init__(self, module: nn.Module, told: bool) -> None:
        super().__init__(module)
        self.told = told

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.pop(CALL, None)
        given = self.given(args, kwargs)
        caches = [n for n in _CACHES if given.get(n) is not None] + (["use_cache"] if given.get("use_cache") else [])
        left = call is None if self.told else bool(caches) and not self.module.training
        if left or not torch.is_grad_enabled() or self._checkpoints_itself:
            return self.original(*args, **kwargs)
        args = tuple(_cacheless(n, value) for n, value in itertools.zip_longest(self._names[: len(args)], args))
        kwargs = {n: _cacheless(n, value) for n, value in kwargs.items()}
        return checkpoint(functools.partial(self.original, *args, **kwargs), use_reentrant=False)

    @property
    def _checkpoints_itself(self) -> bool:
        """By transformers' own checkpointing, which was enabled."""
        return bool(getattr(self.module, "gradient_checkpointing", False)) and self.module.training


def _cacheless(name: str | None, value: Any) -> Any:
    """An argument of this name, None where it is a cache."""
    return None if name in _CACHES else False if name == "use_cache" else value
