"""Layers of classes that are neither PyTorch's nor transformers', found by the attention in them."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

from pyckpt.block import CheckpointedBlock
from pyckpt.swap.around import is_wrapper
from pyckpt.swap.code import names_in

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# In lower case, in the name of a module's class.
_ATTENTIONS, _BLOCKS = ("attention", "attn", "mha"), ("block", "layer")
_CHECKPOINTED = "_checkpoint_wrapped_module"  # the name of what PyTorch's wrapper that checkpoints wraps
# Functions of PyTorch and others, and ours; what a module's code names.
_FUNCTIONS = frozenset(
    (
        "scaled_dot_product_attention",
        "flex_attention",
        "varlen_attn",
        "multi_head_attention_forward",
        "flash_attn_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_varlen_func",
        "flash_attn_varlen_qkvpacked_func",
        "memory_efficient_attention",
    )
)


def is_checkpointed(module: nn.Module) -> bool:
    """It is PyTorch's `checkpoint_wrapper`, around a module that it runs again."""
    return _CHECKPOINTED in module._modules


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers in the model's lists of modules, by path; of layers in layers the innermost."""
    return list(_layers(model, "", False, False))


def _layers(module: nn.Module, path: str, listed: bool, deeper: bool) -> Iterator[tuple[str, nn.Module]]:
    """`listed`: it stands in a list; `deeper`: that, or something around it, does."""
    if is_checkpointed(module) or isinstance(module, (CheckpointedBlock, torch.jit.ScriptModule)):
        return
    held = isinstance(module, _CONTAINERS)
    inside = held or (listed and is_wrapper(module))
    inner = [
        (_joined(path, name), child, list(_layers(child, _joined(path, name), inside, deeper or held)))
        for name, child in module.named_children()
    ]
    if any(found for _, _, found in inner):
        alike = _alike(inner) if held and not listed else ()
        beside = _lists_beside(inner)
        # What stands beside an attention with a norm or a residual around it has the same around something else.
        sublayers = held and listed and any(len(found) == 1 and found[0][1] is child for _, child, found in inner)
        for child_path, child, found in inner:
            if found:
                yield from found
            elif (sublayers or isinstance(child, alike)) and _is_more(child):
                yield child_path, child
            elif isinstance(child, nn.ModuleList) and len(child) in beside and all(map(_is_more, child)):
                yield from ((_joined(child_path, n), m) for n, m in child.named_children())
            elif isinstance(module, nn.ModuleList):
                yield from _beside(child, child_path, inner)
    elif (listed or isinstance(module, nn.TransformerDecoderLayer)) and not inside and _is_layer(module):
        yield path, module
    elif not deeper and isinstance(module, nn.ModuleList) and sum(map(_attends, module)) > 1:
        # Sublayers in turns, or attentions alone.
        yield from ((_joined(path, n), m) for n, m in module.named_children() if _has_children(m))
    elif listed and held and any(_attends(m) for m in module.modules()):
        if isinstance(module, nn.Sequential):
            yield path, module
        else:  # a layer that is no module of its own: attention and MLP in a list
            yield from ((_joined(path, n), m) for n, m in module.named_children() if _has_children(m))


def _alike(inner: list[tuple[str, nn.Module, Any]]) -> tuple[type, ...]:
    """Of a flat list: the classes of its layers, whose others wrap something else than attention (a residual's)."""
    return tuple({type(child) for _, child, found in inner if len(found) == 1 and found[0][1] is child})


def _lists_beside(inner: list[tuple[str, nn.Module, Any]]) -> set[int]:
    """The lengths of lists of attentions alone: a list beside one, of as many modules, has what follows each."""
    lists = [child for _, child, found in inner if found and isinstance(child, nn.ModuleList)]
    return {len(child) for child in lists if len(child) > 1 and all(map(_attends, child))}


def _is_more(module: nn.Module) -> bool:
    """A sublayer, that is: neither a list nor a single operation."""
    return _has_children(module) and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _beside(own: nn.Module, path: str, inner: list[tuple[str, nn.Module, Any]]) -> Iterator[tuple[str, nn.Module]]:
    """In a list of lists as [norm, attention, residual] and [norm, MLP, residual]: the MLP of this one of them."""
    if not isinstance(own, nn.ModuleList):
        return
    others = [(list(m), found[0][1]) for _, m, found in inner if len(found) == 1 and isinstance(m, nn.ModuleList)]
    for other, layer in others:
        place = next((i for i, m in enumerate(other) if m is layer), None)
        if place is not None and _differ_at(list(own), other, place):
            if _has_children(own[place]):
                yield _joined(path, str(place)), own[place]
            return


def _differ_at(a: list[nn.Module], b: list[nn.Module], place: int) -> bool:
    """They are of the same classes, but for one, which may be a wrapper of the same class too."""
    return len(a) == len(b) and all(type(m) is type(n) for i, (m, n) in enumerate(zip(a, b, strict=True)) if i != place)


def _is_layer(module: nn.Module) -> bool:
    """It has a module of attention, or is a block that calls attention by itself."""
    name = type(module).__name__.lower()
    if _is_named(name) and not any(n in name for n in _BLOCKS) and all(map(_is_of_attention, module.children())):
        return False
    return any(_attends(m) for m in module.modules())


def _is_of_attention(module: nn.Module) -> bool:
    """A part of attention by itself, whose heads may be modules too: one of those, a list of them, or an operation."""
    listed = isinstance(module, nn.ModuleList) and all(map(_attends, module))
    return listed or _attends(module) or not _has_children(module)


def _attends(module: nn.Module) -> bool:
    return _is_named(type(module).__name__.lower()) or _calls(type(module))


def are_layers(model: nn.Module, kinds: set[type]) -> list[tuple[str, nn.Module]]:
    """What stands in no list, of a class of which layers were found, and has attention inside."""
    return [(path, m) for path, m in model.named_modules() if type(m) in kinds and path and _is_layer(m)]


def _is_named(name: str) -> bool:
    return any(n in name for n in _ATTENTIONS)


def _calls(kind: type) -> bool:
    """Its code, other than PyTorch's, names a function of attention, or calls one that does."""
    own_kinds = [k for k in kind.__mro__ if not k.__module__.startswith("torch.")]
    functions = [f for k in own_kinds for f in vars(k).values() if isinstance(f, FunctionType)]
    return any(names_in(f) & _FUNCTIONS for own in functions for f in (own, *_called(own)))


def _called(function: FunctionType) -> list[FunctionType]:
    """Functions of its own module that it names."""
    found: list[Any] = [function.__globals__.get(name) for name in names_in(function)]
    return [f for f in found if isinstance(f, FunctionType)]
