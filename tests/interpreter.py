"""Triton's interpreter, made quicker: half the time of our kernels' tests went into what changes no result.

Both places are no public interface of Triton; a version without them is left as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _Nothing:
    """What was replaced where nothing had to be."""

    def restore(self) -> None:
        pass


def quicken() -> None:
    """At every call inside a kernel the interpreter searches Triton's language for what it has to replace.

    The launch has replaced it, so nothing is found, in 1.7 ms. A look at one function tells. And for each sum of
    integers it works out whether they overflow, and says so only with the option `debug`.
    """
    from triton.runtime import interpreter

    search = getattr(interpreter, "_patch_lang", None)
    if search is not None:
        interpreter._patch_lang = _when_needed(search)
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if hasattr(options, "sanitize_overflow") and not getattr(options, "debug", True):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)


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
