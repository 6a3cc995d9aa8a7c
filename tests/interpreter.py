"""Triton's interpreter, made quicker: most of the time of our kernels' tests went into what changes no result.

None of these places is a public interface of Triton; a version without one of them is left as it is there.
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

    _replace(interpreter, "_patch_lang", _when_needed)
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if hasattr(options, "sanitize_overflow") and not getattr(options, "debug", True):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    _remember_types()


def _remember_types() -> None:
    """Types, shapes and numpy's dtypes are made anew for every value, out of the same few: they are kept.

    With them go two look-ups that take longer than what they spare: whether a value is a constant's wrapper, where it
    is plainly none, and whether a value has to be broadcast, where the shapes are equal.
    """
    from triton import language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    _replace(tl.core, "_unwrap_if_constexpr", _of_others_than({int, bool, float, str, type(None), tl.tensor, tl.dtype}))
    _replace(tl.dtype, "__eq__", _unless_the_same)
    _replace(tl.block_type, "__init__", _block_type)
    _replace(tl.tensor, "__init__", _tensor)
    _replace(interpreter, "_get_np_dtype", _np_dtype)
    _replace(TritonSemantic, "computation_type_impl", _computation_type)
    _replace(TritonSemantic, "broadcast_impl_value", _unless_of_one_shape)


def _replace(owner: Any, name: str, by: Callable[[Any], Any]) -> None:
    if name in vars(owner):
        setattr(owner, name, by(vars(owner)[name]))


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


def _of_others_than(plain: set[type]) -> Callable[[Any], Any]:
    def replacement(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda value: value if type(value) in plain else unwrap(value)

    return replacement


def _unless_the_same(equal: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda a, b: a is b or equal(a, b)


def _block_type(init: Callable[..., None]) -> Callable[..., None]:
    known: dict[Any, dict[str, Any]] = {}

    def remembered(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        fields = known.get(key)
        if fields is None:
            init(self, element_ty, shape)
            if all(type(n) is int for n in shape):
                known[key] = {**vars(self)}
        else:
            self.__dict__.update(fields)
            self.element_ty = element_ty  # pointers of one name may differ in what they point into

    return remembered


def _tensor(init: Callable[..., None]) -> Callable[..., None]:
    known: dict[str, dict[str, Any]] = {}

    def remembered(self: Any, handle: Any, type: Any) -> None:
        fields = known.get(type.name)
        if fields is None:
            init(self, handle, type)
            known[type.name] = {k: v for k, v in vars(self).items() if k not in ("handle", "type", "dtype")}
        else:
            self.__dict__.update(fields)
            self.handle, self.type, self.dtype = handle, type, type.scalar

    return remembered


def _np_dtype(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = find(dtype)
        return known[dtype.name]

    return remembered


def _computation_type(find: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def remembered(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = (a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod)
        if key not in known:
            known[key] = find(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return known[key]

    return remembered


def _unless_of_one_shape(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(self: Any, a: Any, b: Any) -> Any:
        one = a.type.is_block() and b.type.is_block() and a.type.shape.values == b.type.shape.values
        return (a, b) if one else broadcast(self, a, b)

    return replacement
