"""What is in containers and objects, for a run that comes later and is to find it again."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_MOST = 10_000  # things looked at: beyond that somebody has handed over a whole program
_CONTAINERS = (dict, list, set, deque)
_NOTHING_IN = (str, bytes, int, float, complex, bool, type(None), type, FunctionType, MethodType, ModuleType, Tensor)
# What is in objects of their classes is their own business; transformers' caches are seen to by name.
_FOREIGN = frozenset(("torch", "numpy", "transformers", "accelerate", "deepspeed", "builtins", "functools", "weakref"))

Held = list[tuple[Any, Any]]
"""Containers and objects, and what was in each."""


class Contents:
    """What is now in the containers (dicts, lists, sets, deques, and classes derived from them) that `values` lead to,
    one in another too; with `objects` in instances of classes of one's own as well.

    `tensors`, `modules` and `generators` are those found on the way, `others` all else; in modules nothing is looked
    for.
    """

    def __init__(self, values: Iterable[Any], objects: bool = False) -> None:
        self._held: Held = []
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.generators: list[Any] = []
        self.others: list[Any] = []
        self._look(list(values), objects)

    def _look(self, waiting: list[Any], objects: bool) -> None:
        seen: set[int] = set()
        while waiting and len(seen) < _MOST:
            value = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                self.tensors.append(value)
            elif isinstance(value, nn.Module):
                self.modules.append(value)
            elif is_generator(type(value)):
                self.generators.append(value)
            elif isinstance(value, (tuple, frozenset)):
                waiting.extend(value)
            elif isinstance(value, _CONTAINERS) or (objects and _is_own(value)):
                held = _content(value)
                self._held.append((value, held))
                waiting.extend(held.values() if isinstance(held, dict) else held)
            elif not isinstance(value, _NOTHING_IN):
                self.others.append(value)

    def present(self) -> Held:
        """What is in them at present."""
        return [(holder, _content(holder)) for holder, _ in self._held]

    def put(self, instead: Callable[[Tensor], Tensor]) -> None:
        """All as it was, with other tensors instead of some."""
        refill([(holder, _replaced(content, instead)) for holder, content in self._held])


def refill(held: Held) -> None:
    for holder, content in held:
        if not same(_content(holder), content):
            _fill(holder, content)


def is_generator(kind: type) -> bool:
    """What is of this class draws random numbers: PyTorch's, Python's or NumPy's."""
    if issubclass(kind, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")  # which need not be installed
    return numpy is not None and issubclass(kind, (numpy.random.Generator, numpy.random.RandomState))


def drawing(generator: Any) -> Any:
    """The state of a generator."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.get_state()


def draw_from(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _is_own(value: Any) -> bool:
    """An object of a class of one's own, or of the standard library, that has attributes."""
    kind = type(value)
    if isinstance(value, _NOTHING_IN) or kind.__module__.partition(".")[0] in _FOREIGN:
        return False
    return hasattr(value, "__dict__") or bool(_slots(kind))


def _slots(kind: type) -> list[str]:
    found: list[str] = []
    for k in kind.__mro__:
        slots = k.__dict__.get("__slots__", ())
        found += [slots] if isinstance(slots, str) else slots
    return [n for n in found if n not in ("__dict__", "__weakref__")]


def _content(holder: Any) -> Any:
    # By the methods of the classes that all are derived from: what a class makes of its own is made of these.
    if isinstance(holder, dict):
        return dict(dict.items(holder))
    if isinstance(holder, set):
        return set(set.__iter__(holder))
    if isinstance(holder, _CONTAINERS):
        return list(holder)
    slots = {n: getattr(holder, n) for n in _slots(type(holder)) if hasattr(holder, n)}
    return {**slots, **getattr(holder, "__dict__", {})}


def _fill(holder: Any, content: Any) -> None:
    if isinstance(holder, dict):
        kind = OrderedDict if isinstance(holder, OrderedDict) else dict
        kind.clear(holder)
        for key, value in content.items():
            kind.__setitem__(holder, key, value)
    elif isinstance(holder, set):
        set.clear(holder)
        set.update(holder, content)
    elif isinstance(holder, deque):
        holder.clear()
        holder.extend(content)
    elif isinstance(holder, list):
        list.__setitem__(holder, slice(None), content)
    else:
        _fill_object(holder, content)


def _fill_object(holder: Any, content: dict[str, Any]) -> None:
    slots = set(_slots(type(holder)))
    for name in slots:
        if name in content:
            object.__setattr__(holder, name, content[name])  # of a frozen dataclass too
        elif hasattr(holder, name):
            object.__delattr__(holder, name)
    attributes = getattr(holder, "__dict__", None)
    if attributes is not None:
        attributes.clear()
        attributes.update({n: value for n, value in content.items() if n not in slots})


def _replaced(content: Any, instead: Callable[[Tensor], Tensor]) -> Any:
    def of(value: Any) -> Any:
        return instead(value) if isinstance(value, Tensor) else value

    if isinstance(content, dict):
        return {key: of(value) for key, value in content.items()}
    return type(content)(of(value) for value in content)


def same(a: Any, b: Any) -> bool:
    """The same things in the same order."""
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(k is m and v is w for (k, v), (m, w) in zip(a.items(), b.items(), strict=True))
    if isinstance(a, set):
        return {id(v) for v in a} == {id(v) for v in b}
    return all(v is w for v, w in zip(a, b, strict=True))
