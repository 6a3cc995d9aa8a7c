"""Twins of modules: shallow copies on the same parameters, whose configs may say something else.

A twin is called in the place of the module, so that nothing of the module itself, its hooks or its config is changed.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pyckpt.swap.contents import Contents

_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_OF_MODULES = frozenset(nn.Module().__dict__)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def twin_of(
    module: nn.Module,
    config_of: Callable[[str, Any], Any],
    replaced: Mapping[str, nn.Module] | None = None,
    path: str = "",
) -> nn.Module:
    """The module's twin. Inside it only those that have a config, and those around them, are twins too.

    config_of: the config of the twin, from the module's path and its config. replaced: what stands at a path instead.
    """
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        inner = f"{path}.{name}" if path else name
        if replaced and inner in replaced:
            children[name] = replaced[inner]
        else:
            children[name] = child if child is None else twin_of(child, config_of, replaced, inner)
    config = module.__dict__.get("config")
    if path and config is None and all(children[n] is child for n, child in module._modules.items()):
        return module
    kind = unsharded_class(module)
    twin: nn.Module = nn.Module.__new__(kind)
    # The dicts of parameters and buffers are the module's own: what is put there is seen in both.
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update({name: OrderedDict() for name in HOOKS}, _modules=children)
    twin.__dict__.pop("forward", None)
    twin.__dict__["_compiled_call_impl"] = None  # `Module.compile` puts there what calls the module
    if "gradient_checkpointing" in twin.__dict__:
        twin.__dict__["gradient_checkpointing"] = False
    if hasattr(kind, "_can_record_outputs"):
        # transformers would hook what records outputs (router_logits) into the modules that both share, for each twin.
        twin.__dict__["_output_capturing_hooks_installed"] = True
    if config is not None:
        twin.__dict__["config"] = config_of(path, config)
    return twin


@contextlib.contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """Inside, forward hooks of the modules in it do not run: somebody's record would have what is tried out."""
    held = [(m, {name: m.__dict__[name] for name in HOOKS}) for m in module.modules()]
    for m, _ in held:
        m.__dict__.update({name: OrderedDict() for name in HOOKS})
    try:
        yield
    finally:
        for m, hooks in held:
            m.__dict__.update(hooks)


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[list[str]]:
    """Afterwards all modules inside have the classes, parameters, attributes, buffers and children that they had.

    And containers that are attributes hold what they did.

    The list that it gives is then that of the classes of those that had others, but for parameters: other ones are what
    `torch.func.functional_call` leaves in a module that stands in two places, and what is parametrized in a call puts
    them in again in another order.
    """
    attributes = {m: dict(m.__dict__) for m in module.modules()}
    containers = [Contents(v for n, v in own.items() if n not in _OF_MODULES) for own in attributes.values()]
    kinds = {m: m.__class__ for m in attributes}
    inside: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = [
        (m, held, dict(held)) for m in attributes for held in (m._parameters, m._buffers, m._modules)
    ]
    buffers = [(m, b, b.detach().clone()) for m in module.modules() for b in m._buffers.values() if b is not None]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for m, was in attributes.items():
            if m.__dict__.keys() != was.keys() or any(m.__dict__[n] is not value for n, value in was.items()):
                changed.append(type(m).__name__)
                m.__dict__.clear()
                m.__dict__.update(was)
        for contents in containers:
            contents.put(lambda t: t)
        for m, kind in kinds.items():
            if m.__class__ is not kind:  # parametrized, and left so by an error
                changed.append(kind.__name__)
                m.__class__ = kind
        for m, held, had in inside:
            if held is not m._parameters and held.keys() != had.keys():
                changed.append(type(m).__name__)
            held.clear()
            held.update(had)
        for m, buffer, value in buffers:
            if not torch.equal(buffer, value):
                changed.append(type(m).__name__)
                with torch.no_grad():
                    buffer.copy_(value)


def kinds_of(module: nn.Module) -> list[type]:
    """The classes of the modules inside, each once."""
    return list({unsharded_class(m): None for m in module.modules()})


def unsharded_class(module: nn.Module) -> type[Any]:
    """The module's class; of one made by FSDP2, the class that it wraps."""
    kind = type(module)
    return kind.__bases__[1] if kind.__name__.startswith("FSDP") and len(kind.__bases__) == 2 else kind


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Of the module's own forward, in order; where that takes any others, those of classes it is derived from too."""
    return tuple(p.name for p in arguments_of(module))


def arguments_of(module: nn.Module) -> list[inspect.Parameter]:
    """What `argument_names` names, but for those that take any others."""
    named: dict[str, inspect.Parameter] = {}
    for kind in unsharded_class(module).__mro__:
        if "forward" in vars(kind):
            found = list(inspect.signature(vars(kind)["forward"]).parameters.values())[1:]
            named |= {p.name: p for p in found if p.kind not in _ANY and p.name not in named}
            if not any(p.kind in _ANY for p in found):
                break
    return list(named.values())


def takes_more(module: nn.Module) -> bool:
    """The module's own forward takes any number of arguments by their place."""
    found = inspect.signature(unsharded_class(module).forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in found)


def attention_config(config: Any, implementation: str, **changes: Any) -> Any:
    """A copy of a config of transformers that names this attention implementation."""
    made = copy.deepcopy(config)
    made._attn_implementation = implementation
    made.__dict__.update(changes)
    return made
