"""What a class's forward names, and whose functions it finds under these names."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

# Whose functions compute what transformers' own of the same name do.
_SAME = ("torch.", "transformers.", "liger_kernel.", "kernels.")
_TOOLS = sys.stdlib_module_names | {"numpy", "einops"}


def names_in(function: FunctionType) -> set[str]:
    """What a function's code names: globals and attributes, those of functions inside it too."""
    return set(_of_code(function.__code__))


def _of_code(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)


def odd_function(kinds: Iterable[type]) -> str | None:
    """That a function which a forward of these classes of transformers calls is somebody else's, or None.

    RoPE's (`apply_rotary_pos_emb`) and those that make masks (`create_causal_mask`) are functions in a modelling file,
    which a block does not call: another one in their place would be left out without a word.
    """
    for kind in kinds:
        for namespace, name in _named(kind):
            whose = _whose(namespace.get(name))
            if not f"{whose}.".startswith(_SAME) and whose.partition(".")[0] not in _TOOLS:
                return f"{namespace['__name__']}.{name} is of {whose}, and may compute anything"
    return None


def functions(kinds: Iterable[type]) -> dict[str, str]:
    """Which functions these are now, by their names: where each was written."""
    return {
        f"{namespace['__name__']}.{name}": _written(namespace.get(name))
        for kind in kinds
        for namespace, name in _named(kind)
    }


@functools.cache
def _named(kind: type) -> tuple[tuple[dict[str, Any], str], ...]:
    """The functions that its forward names, and those of the same file that these name: where, and by which name."""
    start = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    namespace = getattr(start, "__globals__", {})
    if not str(namespace.get("__name__", "")).startswith("transformers.models."):
        return ()
    found: dict[str, None] = {}
    look = [start]
    while look:
        for name in sorted(names_in(look.pop()) - found.keys()):
            value = namespace.get(name)
            if isinstance(value, type) or not callable(value):
                continue
            found[name] = None
            inner = inspect.unwrap(value)
            if isinstance(inner, FunctionType) and inner.__globals__ is namespace:
                look.append(inner)
    return tuple((namespace, name) for name in found)


def _whose(value: Any) -> str:
    """The module in which a function was written; `functools.wraps` does not hide that."""
    while isinstance(value, functools.partial):
        value = value.func
    namespace = getattr(value, "__globals__", None)
    found = type(value).__module__ if namespace is None else namespace.get("__name__")
    return "transformers" if found == "builtins" else str(found)


def _written(value: Any) -> str:
    code = getattr(value, "__code__", None)
    line = "" if code is None else f", line {code.co_firstlineno}"
    return f"{_whose(value)}.{getattr(value, '__qualname__', type(value).__qualname__)}{line}"
