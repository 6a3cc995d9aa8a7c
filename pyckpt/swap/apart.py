"""Copies of modules, for calls of them with other weights.

`torch.func.functional_call` puts the weights of a call into the modules themselves while it lasts. In the modules of a
model another thread would read them there (a `state_dict`, a second call), or put them back when the first had left.
"""

from __future__ import annotations

from collections import OrderedDict
from types import MethodType
from typing import Any

import torch
from torch import nn

from pyckpt.swap.shadow import HOOKS, unsharded_class


def apart(module: nn.Module) -> nn.Module:
    """A copy of the modules inside, on the same parameters and buffers, in which others may be put.

    It is set as the module is now, train mode included. A module with hooks, or with a `forward` of its own, stays
    itself, with all that is in it: what hangs on it may know it.
    """
    copies: dict[int, tuple[nn.Module, nn.Module]] = {}
    made = _copied(module, copies)
    for original, copied in copies.values():
        if copied is not original:
            _bind(copied, copies)
    return made


def _copied(module: nn.Module, copies: dict[int, tuple[nn.Module, nn.Module]]) -> nn.Module:
    if id(module) in copies:
        return copies[id(module)][1]
    made = module
    if not _stays(module):
        children = {name: child if child is None else _copied(child, copies) for name, child in module._modules.items()}
        made = object.__new__(unsharded_class(module))
        own: dict[str, Any] = {
            "_modules": children,
            "_parameters": dict(module._parameters),
            "_buffers": dict(module._buffers),
        }
        own |= {name: OrderedDict() for name in HOOKS}  # none that is put into the module between forward and backward
        # FSDP1 has its views as attributes too, which would be read before what is put in.
        had = {n: v for n, v in module.__dict__.items() if n not in module._parameters and n not in module._buffers}
        made.__dict__.update(had | own)
    copies[id(module)] = module, made
    return made


def _stays(module: nn.Module) -> bool:
    had = module.__dict__
    return "forward" in had or isinstance(module, torch.jit.ScriptModule) or any(had.get(hooks) for hooks in HOOKS)


def _bind(module: nn.Module, copies: dict[int, tuple[nn.Module, nn.Module]]) -> None:
    """Methods that are attributes are those of the copies."""
    for name, value in module.__dict__.items():
        if type(value) is MethodType and id(value.__self__) in copies:
            module.__dict__[name] = MethodType(value.__func__, copies[id(value.__self__)][1])
