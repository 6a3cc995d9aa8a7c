"""How modules are set: in one mode for a while; in a layer's call, for its backward, which may come when they are set
otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

# Train mode, and PEFT's: which adapters count, and whether any do.
_NAMES = ("training", "_disable_adapters", "_active_adapter")


class Settings:
    """Those of all modules inside these, at present."""

    def __init__(self, *parts: nn.Module) -> None:
        self._of = [(m, _now(m)) for m in {m: None for part in parts for m in part.modules()}]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, modules are set as they were."""
        others = [(m, then, now) for m, then in self._of if (now := _now(m)) != then]
        for m, then, _ in others:
            m.__dict__.update(then)
        try:
            yield
        finally:
            for m, _, now in others:
                m.__dict__.update(now)


@contextlib.contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """All modules inside in one mode, and afterwards each in its own.

    Not by their `train`, which may do more: some adapters merge their weights there.
    """
    before = {m: m.training for m in module.modules()}
    for m in before:
        m.training = training
    try:
        yield
    finally:
        for m, was in before.items():
            m.training = was


def _now(module: nn.Module) -> dict[str, Any]:
    found = {n: module.__dict__[n] for n in _NAMES if n in module.__dict__}
    return {n: list(v) if isinstance(v, list) else v for n, v in found.items()}
