"""Triton's interpreter, made quicker: a third of the time of our kernels' tests was one search, again and again."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any


class _Nothing:
    """What was replaced in a launch in which nothing had to be."""

    def restore(self) -> None:
        pass


def quicken() -> None:
    """At every call inside a kernel the interpreter searches Triton's language for what it has to replace.

    The launch has replaced it, so nothing is found, in 1.7 ms. A look at one function tells. A Triton without
    the search, which is no public interface, is left as it is.
    """
    from triton.runtime import interpreter

    search = getattr(interpreter, "_patch_lang", None)
    if search is not None:
        interpreter._patch_lang = _when_needed(search)


def _when_needed(search: Callable[[Any], Any]) -> Callable[[Any], Any]:
    from triton import language as tl

    modules: dict[Any, list[ModuleType]] = {}

    def patch(function: Any) -> Any:
        if function not in modules:
            modules[function] = [m for m in function.__globals__.values() if m is tl or m is tl.core]
        found = modules[function]
        if found and not any(tl.core.is_builtin(m.load) for m in found):
            return _Nothing()
        return search(function)

    return patch
