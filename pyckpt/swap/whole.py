"""The forward of a decoder layer that cannot be cut at its attention: it runs again as a whole in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyckpt.save import Save, save_set
from pyckpt.swap import again, families
from pyckpt.swap.generic import check_runs_twice
from pyckpt.swap.layer import CALL
from pyckpt.swap.replaced import Replaced


def known(layer: nn.Module) -> bool:
    """The layer is of a class that transformers' own checkpointing runs twice, or of one derived from it."""
    return "GradientCheckpointingLayer" in _of_transformers(layer)


def check(layer: nn.Module) -> None:
    """Raise `UnsupportedError` where the layer may not run twice: hooks inside would see it.

    What it keeps is kept once (see `once`), whether or not transformers' own checkpointing knows its class.
    """
    if _of_transformers(layer):
        families.check_version()
    check_runs_twice(layer)


def _of_transformers(layer: nn.Module) -> set[str]:
    """The names of those of its classes that are transformers'."""
    return {k.__name__ for k in type(layer).__mro__ if k.__module__.startswith("transformers.")}


class CheckpointedLayer(Replaced):
    """Keeps what the layer is given, and what its attention made, by torch.utils.checkpoint.

    That is wherever gradients are enabled; with the save set "input" the arguments alone.

    `told`: it waits for its model's forward to hand it a `Call`, as swapped layers beside it do. Else it decides by
    itself: in training it writes to no cache, which would be written to twice (transformers' own checkpointing does
    the same); in eval mode with a cache it is the original.
    """

    def __init__(self, module: nn.Module, told: bool, save: str | Save) -> None:
        super().__init__(module)
        self.told, self._save = told, save_set(save)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.pop(CALL, None)
        if call is None and not self._alone(self.given(args, kwargs)):
            return self.original(*args, **kwargs)
        self.warn_of_a_checkpoint()
        return again.run_twice(self, args, kwargs, self._save)

    def _alone(self, given: dict[str, Any]) -> bool:
        """It runs twice though nobody told it to."""
        if self.told:
            return False
        if not self.module.training:
            return not again.caches(given)
        if not torch.is_grad_enabled():
            return True  # once, with its cache
        if again.only_reads(self.module) or not again.holds(self.module, given):
            return True
        name = type(self.module).__name__
        self.warn(f"{name} is given a cache that is not empty: its original forward runs, which stores everything")
        return False
