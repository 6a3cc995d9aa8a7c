"""The numbers, switches and functions that modules of a layer compute with, as they were when it was swapped.

A block has them in its spec, from when it was made: one that is set anew in the layer would be left out without a word.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from pyckpt.swap.code import names_in
from pyckpt.swap.modules import submodule
from pyckpt.swap.shadow import unsharded_class

Numbers = tuple[tuple[str, str, Any], ...]
"""The path of a module, the name of its attribute, and the value, or what tells a function from another."""

_PLAIN = (bool, int, float, str, type(None))
# Of what is read for caches alone, and of what is no part of a block's spec: the mode, and transformers' checkpointing.
_OTHERS = frozenset(("training", "layer_idx", "gradient_checkpointing"))
_NOT_READ = frozenset(("__init__", "__repr__", "extra_repr", "reset_parameters"))
# What attention functions read of the module that calls them.
_OF_ATTENTION = frozenset(("is_causal",))
ANEW = "it was when swapped (unswap and swap again)"


def numbers_of(layer: nn.Module, paths: Iterable[str]) -> Numbers:
    """Those of the modules at these paths, but for rates of dropout, which are read at each call."""
    return tuple((path, name, value) for path in paths for name, value in _numbers(layer.get_submodule(path)))


def other_number(layer: nn.Module, then: Numbers) -> str | None:
    """Which of them the layer has with another value now, or None."""
    path_of, module = None, layer
    for path, name, value in then:
        if path != path_of:
            path_of, module = path, submodule(layer, path)
        now = getattr(module, name, None)
        if isinstance(now, Tensor):
            return f"{path or 'it'} now has a tensor {name}, not the {_shown(value)} {ANEW}"
        if now != value and (isinstance(now, _PLAIN) or _told_apart(now) != value):
            return f"{path or 'it'} now has {name} {_shown(now)}, not the {_shown(value)} {ANEW}"
    return None


def _shown(value: Any) -> str:
    return str(getattr(value, "__name__", value))


def _told_apart(function: Any) -> Any:
    """What two functions of modules that are copies of each other have in common; None of what is no function."""
    if isinstance(function, functools.partial):
        return _told_apart(function.func), function.args, tuple(function.keywords.items())
    if isinstance(function, MethodType):
        return function.__func__
    return function if isinstance(function, (FunctionType, BuiltinFunctionType)) else None


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    if isinstance(module, nn.Dropout):
        return
    kind: type = unsharded_class(module)
    read = _read_by(kind) | _OF_ATTENTION
    for name, value in vars(module).items():
        if name not in read or name.startswith("_") or "drop" in name:
            continue
        if isinstance(value, _PLAIN):
            yield name, value
        elif (function := _told_apart(value)) is not None:
            yield name, function


@functools.cache
def _read_by(kind: type) -> frozenset[str]:
    """The names of attributes that its methods may read: what tools write into modules for themselves is not there."""
    found: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType) and name not in _NOT_READ:
                found |= names_in(function)
    return frozenset(found - _OTHERS)
