"""A layer's own forward as a whole, and once more in the backward."""

from __future__ import annotations

import functools
import itertools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import _StopRecomputationError, checkpoint

from pyckpt.save import SaveSet
from pyckpt.swap import kept
from pyckpt.swap.arguments import CallArguments
from pyckpt.swap.once import FirstRun, LayerState, SecondRun, write
from pyckpt.swap.replaced import Replaced

# What PyTorch's error says of torch.func.grad inside a layer (Titans, TTT), under the hooks of a checkpoint.
_NO_HOOKS = "saved tensor hooks"
# By these names layers of transformers are handed what they are to write keys, values and states to.
_CACHES = ("past_key_values", "layer_past", "cache_params")


def caches(given: dict[str, Any]) -> bool:
    """The layer is to write to a cache."""
    return bool(given.get("use_cache")) or any(is_cache(name, value) for name, value in given.items())


def is_cache(name: str | None, value: Any) -> bool:
    """An argument of this name is a cache.

    From transformers 5.24 on all are named "cache", but for FSMT's; in a class of one's own anything may have these
    names, so what has one is to know its length as well.
    """
    if name in ("cache", "layer_state"):
        return hasattr(value, "get_seq_length")
    return name in _CACHES and value is not None


def only_reads(module: nn.Module) -> bool:
    """Its class says that it reads a cache, an encoder's, and writes to none: then it may have it twice."""
    return bool(getattr(module, "_can_checkpoint_with_cache", False))


def holds(module: nn.Module, given: dict[str, Any]) -> bool:
    """The layer is given a cache that has something for it: a prefix, or what an encoder made."""
    found = [value for name, value in given.items() if is_cache(name, value)]
    if not found:
        return False
    indices = [getattr(m, name, None) for m in module.modules() for name in ("layer_idx", "layer_id")]
    return any(_has_content(cache, {i for i in indices if isinstance(i, int)}) for cache in found)


def _has_content(cache: Any, indices: set[int]) -> bool:
    parts = [getattr(cache, n, None) for n in ("self_attention_cache", "cross_attention_cache")]
    if all(part is not None for part in parts):
        return any(_has_content(part, indices) for part in parts)
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        return True  # of a kind of its own, tuples of tensors for one
    return any(_is_filled(layer) for i, layer in enumerate(layers) if i in indices or not indices)


def _is_filled(layer: Any) -> bool:
    length, state = getattr(layer, "get_seq_length", None), getattr(layer, "has_previous_state", False)
    some = any(state.values()) if isinstance(state, dict) else any(state) if isinstance(state, list) else bool(state)
    return some or (length is not None and int(length()) > 0)


def run_twice(layer: Replaced, args: tuple[Any, ...], kwargs: dict[str, Any], save: SaveSet) -> Any:
    """The original forward, again in the backward; while gradients are enabled it writes to no cache.

    Kept are its arguments, copies of what it writes to, and, unless the save set has no attention, what attention
    made (see `kept`). Where transformers' own checkpointing was enabled it does the same, as it was told to.
    """
    checkpoints_itself = bool(getattr(layer.module, "gradient_checkpointing", False)) and layer.module.training
    if checkpoints_itself or layer.runs_once or not torch.is_grad_enabled():
        return layer.original(*args, **kwargs)
    if not only_reads(layer.module) and _writes_caches(layer, args, kwargs):
        args = tuple(_cacheless(n, value) for n, value in itertools.zip_longest(layer.by_place[: len(args)], args))
        kwargs = {n: _cacheless(n, value) for n, value in kwargs.items()}
    if torch.compiler.is_compiling():
        options: dict[str, Any] = {"context_fn": kept.traced_contexts} if save.attention else {}
        return checkpoint(functools.partial(layer.original, *args, **kwargs), use_reentrant=False, **options)
    return _checkpointed(layer, args, kwargs, save)


def _checkpointed(layer: Replaced, args: tuple[Any, ...], kwargs: dict[str, Any], save: SaveSet) -> Any:
    given = CallArguments(args, kwargs)
    state = LayerState(layer.module, given.contents.modules)
    if _runs_once(layer, given, state):
        return layer.original(*args, **kwargs)
    given.watch(state.watched)
    first = FirstRun(given, state)
    try:
        made = checkpoint(
            functools.partial(_run, layer, given),
            use_reentrant=False,
            context_fn=functools.partial(_contexts, first, given, save.attention),
            # It reads the shapes of what is saved, which parts of nested tensors do not have.
            determinism_check="none" if any(t.is_nested for t in given.tensors) else "default",
        )
    except RuntimeError as error:
        if _NO_HOOKS not in str(error):
            raise
    else:
        given.made(made)
        return made
    layer.runs_once = True
    layer.warn(f"{type(layer.module).__name__} calls torch.func.grad or its like: it stores everything")
    return _after_all(layer, first, given)


def _runs_once(layer: Replaced, given: CallArguments, state: LayerState) -> bool:
    """It cannot run again, or nothing would have it do so."""
    if given.is_read_once:
        layer.warn(f"{type(layer.module).__name__} is given an iterator, which can be read once: it stores everything")
        return True
    weights = (p for m in state.modules for p in m.parameters(recurse=False))
    return not (given.wants_gradients or any(p.requires_grad for p in weights)) or _differentiates()


def _after_all(layer: Replaced, first: FirstRun, given: CallArguments) -> Any:
    """The original, once a run has failed half-way: with all as it was before that."""
    given.ran()
    first.state.put(given.before)
    write((t, was) for t in first.state.watched if (was := given.before(t)) is not None)
    first.drawing.restore()
    args, kwargs = given.take()
    given.put_contents()
    return layer.original(*args, **kwargs)


def _differentiates() -> bool:
    """A call of torch.func.grad or its like is around the model."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() == torch._C._functorch.TransformType.Grad for interpreter in stack)


def _run(layer: Replaced, given: CallArguments) -> Any:
    args, kwargs = given.take()
    try:
        return layer.original(*args, **kwargs)
    except _StopRecomputationError:
        raise
    except Exception as error:
        _end(error)
        raise


def _end(error: BaseException | None) -> None:
    """Raise what ends a second run that has made all it is to make, where the layer's code made this error of it."""
    chain = []
    while error is not None and not isinstance(error, _StopRecomputationError):
        chain.append(error)
        error = error.__cause__ or error.__context__
    try:
        if error is not None:
            for other in chain:
                other.__cause__ = other.__context__ = None
            raise error from None
    finally:  # in circles of errors and frames all that the run has made would stay
        chain.clear()
        del error


def _writes_caches(layer: Replaced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """It does as transformers' layers do; in a class of one's own `use_cache` alone may mean anything."""
    kinds = (k.__module__.partition(".")[0] for k in type(layer.module).__mro__)
    given = layer.given(args, kwargs)
    return not {"transformers", "transformers_modules"}.isdisjoint(kinds) or any(
        is_cache(n, v) for n, v in given.items()
    )


def _cacheless(name: str | None, value: Any) -> Any:
    """An argument of this name, None where it is a cache."""
    return None if is_cache(name, value) else False if name == "use_cache" else value


def _contexts(first: FirstRun, given: CallArguments, attention: bool) -> kept.Contexts:
    """In which the layer runs first, and again."""
    keeping, giving = kept.contexts(given, attention)
    return _Both(first, keeping), _Both(SecondRun(first, given), giving)


class _Both:
    """Two contexts as one, which may be entered again."""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        self._outer.__exit__(*error)
