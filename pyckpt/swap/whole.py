"""The forward of a decoder layer that cannot be cut at its attention: it runs again as a whole in the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pyckpt.swap import again, families
from pyckpt.swap.generic import check_unwatched
from pyckpt.swap.layer import CALL
from pyckpt.swap.modules import UnsupportedError
from pyckpt.swap.replaced import Replaced
from pyckpt.swap.shadow import unsharded_class

# Packages whose modules run twice under transformers' own checkpointing.
_TRUSTED = ("torch.nn.", "transformers.", "peft.", "bitsandbytes.")


def known(layer: nn.Module) -> bool:
    """The layer is of a class that transformers' own checkpointing runs twice."""
    kinds = {k.__name__ for k in type(layer).__mro__ if k.__module__.startswith("transformers.")}
    return "GradientCheckpointingLayer" in kinds


def check(model: Any, layer: nn.Module) -> None:
    """Raise `UnsupportedError` where it is not known that the layer may run twice.

    That is known of the classes of transformers that its own checkpointing runs twice, of what PEFT and others put
    into them, and not of classes of one's own, which may keep what they have seen.
    """
    families.check_version()
    if not known(layer) or not getattr(model, "supports_gradient_checkpointing", False):
        raise UnsupportedError("transformers does not say that it may run twice")
    check_modules(layer)


def check_modules(layer: nn.Module) -> None:
    """Raise `UnsupportedError` where the layer has modules that may keep something, or have hooks, which see all."""
    for path, module in layer.named_modules():
        kind = unsharded_class(module)
        if not kind.__module__.startswith(_TRUSTED):
            where = f"its {path} is a {kind.__name__}" if path else f"{kind.__name__} is a class of your own"
            raise UnsupportedError(f"{where}, which may keep something when it runs twice")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise UnsupportedError(f"its {path} is a {kind.__name__}, whose statistics would count all twice")
    check_unwatched(layer)


def passes(check: Callable[..., None], *args: Any) -> bool:
    """A check raises no `UnsupportedError`."""
    try:
        check(*args)
    except UnsupportedError:
        return False
    return True


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
        alone = not self.told and (self.module.training or not again.caches(self.given(args, kwargs)))
        if call is None and not alone:
            return self.original(*args, **kwargs)
        return again.run_twice(self, args, kwargs)
