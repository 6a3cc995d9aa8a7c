"""Modules whose weights FSDP2, or DeepSpeed's ZeRO-3, gathers for each call of them, told by their hooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def gathers(module: nn.Module) -> bool:
    """The module's weights are gathered for each call of it."""
    return any(map(_is_gathering, hooks_of(module)))


def unshards(module: Any) -> bool:
    """They can be gathered without a call, as FSDP2's."""
    return hasattr(module, "unshard") and gathers(module)


def gather(*modules: Any) -> None:
    """Have FSDP2 gather the weights of those that it shards by themselves, for who reads them without a call.

    They are let go at the end of the backward, as those of the outermost module are.
    """
    for module in modules:
        if unshards(module):
            module.unshard()


def others(hooks: Iterable[Any]) -> list[Any]:
    """Those of these forward hooks that neither gather weights nor are a measurement's of ours."""
    return [h for h in hooks if not (_is_gathering(h) or _origin(h).startswith("pyckpt.measure."))]


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """The hooks that a call of the module, or its backward, runs."""
    forward = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return (*forward, *module._backward_hooks.values(), *module._backward_pre_hooks.values())


def _is_gathering(hook: Any) -> bool:
    return _origin(hook).startswith(("torch.distributed.fsdp.", "deepspeed."))


def _origin(hook: Any) -> str:
    """The Python module that a hook, or the object whose method it is, comes from."""
    owner = getattr(hook, "__self__", None)
    return (getattr(hook, "__module__", "") if owner is None else type(owner).__module__) or ""
