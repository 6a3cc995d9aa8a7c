"""A layer that runs twice computes what it computed before, and keeps what it would keep after one run."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase  # whose kernels do not count what they write

from pyckpt.swap.modules import is_wrapper

_OF_MODULES = frozenset(nn.Module().__dict__) - {"training"}
_CONTAINERS = (list, dict, set)


class FirstRun:
    """The run whose changes stay. `state` and `parameters` are what the modules had before it.

    `buffers` are then those that it wrote to, `kernels` what attention may use in it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self.buffers = module, list[Tensor]()

    def __enter__(self) -> None:
        self._versions = [(b, b._version) for b in self._module.buffers() if not b.is_inference()]
        self.state, self.parameters = _State(self._module), _Parameters(self._module)
        self.drawing = _Generators(self._module)
        self.kernels = _attention_kernels()

    def __exit__(self, *error: Any) -> None:
        silent = {id(b) for m in self._module.modules() if isinstance(m, _NormBase) for b in m.buffers()}
        self.buffers = [b for b, version in self._versions if b._version != version or id(b) in silent]
        del self._versions


class SecondRun:
    """A run that finds what `first` found, and whose changes are undone: of attributes, of lists, dicts and sets in
    them, and of buffers.

    Generators other than PyTorch's own, which torch.utils.checkpoint sees to, give the numbers of the first run again.
    What `sdpa_kernel` chose around the first run is chosen again. Modules that DeepSpeed or FSDP1 keeps its books in
    are let be.
    `before`: what was in a buffer before the first run wrote to it, None where that is not known.
    """

    def __init__(self, module: nn.Module, first: FirstRun, before: Callable[[Tensor], Tensor | None]) -> None:
        self._module, self._first, self._before = module, first, before

    def __enter__(self) -> None:
        first = self._first
        first.parameters.check()
        self._present = _State(self._module), first.state.contents()
        self._parameters = first.parameters.put()
        self._buffers = [(b, b.detach().clone()) for b in first.buffers]
        self._drawing = _Generators(self._module)
        first.drawing.restore()
        first.state.put()
        for buffer in first.buffers:
            value = self._before(buffer)
            if value is not None:
                buffer.detach().copy_(value)
        self._choice = contextlib.ExitStack()
        if _attention_kernels() != first.kernels:
            self._choice.enter_context(sdpa_kernel(first.kernels, set_priority=True))

    def __exit__(self, *error: Any) -> None:
        self._choice.close()
        self._drawing.restore()
        for buffer, value in self._buffers:
            buffer.detach().copy_(value)
        for module, name, parameter in self._parameters:
            module._parameters[name] = parameter
        present, contents = self._present
        _refill(contents)
        present.put()
        del self._present, self._buffers, self._drawing, self._parameters


_Contents = list[tuple[Any, Any]]
"""Containers, and copies of them with what was in them."""


class _State:
    """What a layer's modules have: attributes, what is in containers that are attributes, and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = [(m, _attributes(m), dict(m._buffers)) for m in module.modules() if not _has_books(m)]
        values = (v for _, attributes, _ in self._modules for v in attributes.values())
        self._contents = [(v, v.copy()) for v in values if type(v) in _CONTAINERS]

    def contents(self) -> _Contents:
        """What is in its containers at present."""
        return [(container, container.copy()) for container, _ in self._contents]

    def put(self) -> None:
        """All as it was."""
        _refill(self._contents)
        for module, attributes, buffers in self._modules:
            module._buffers.update(buffers)
            present = _attributes(module)
            if "_is_fsdp_managed_module" in attributes:
                # FSDP1 makes views of its own weights, and takes them away, as they are to be read.
                views = {n for had in (present, attributes) for n, v in had.items() if _is_view(v)}
                present, attributes = ({n: had[n] for n in had.keys() - views} for had in (present, attributes))
            for name in present.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)


class _Parameters:
    """The parameters of a layer's modules, and how often each was written to."""

    def __init__(self, module: nn.Module) -> None:
        self._of = [
            (m, name, p)
            for m in module.modules()
            if not _has_books(m)
            for name, p in m._parameters.items()
            if p is not None
        ]
        self._versions = [(p, p._version) for _, _, p in self._of if not p.is_inference()]

    def check(self) -> None:
        """Raise RuntimeError where one was written to since."""
        if any(p._version != version for p, version in self._versions):
            raise RuntimeError(
                "a weight of a layer that runs again in the backward has been modified by an inplace operation since "
                "the layer ran, by a step of an optimizer say: its gradients would be those of other weights"
            )

    def put(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """All where they were, and what was in their places: `torch.func.functional_call` has others for a call.

        What is sharded is the same object with the same or other memory, or other objects with the same memory.
        """
        now = [(module, name, module._parameters.get(name), then) for module, name, then in self._of]
        others = [(m, name, p, then) for m, name, p, then in now if p is not None and _differ(p, then)]
        for module, name, _, then in others:
            module._parameters[name] = then
        return [(module, name, p) for module, name, p, _ in others]


def _has_books(module: nn.Module) -> bool:
    """DeepSpeed's or FSDP1's own are in its attributes."""
    return is_wrapper(module) or any(n.startswith("ds_") for n in module.__dict__)


def _is_view(value: Any) -> bool:
    return isinstance(value, Tensor) and value._is_view()


def _differ(a: Tensor, b: Tensor) -> bool:
    """They are plain tensors in two places, of which the second is there."""
    if a is b or not (_is_plain(a) and _is_plain(b)) or b.untyped_storage().nbytes() == 0:
        return False
    return a.data_ptr() != b.data_ptr()


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided


def _attention_kernels() -> list[SDPBackend]:
    """What `scaled_dot_product_attention` may use at present, the first choice first."""
    return _cur_sdpa_kernel_backends(with_priority=True)


class _Generators:
    """The states of Python's and NumPy's global generators, and of those that modules have as attributes."""

    def __init__(self, module: nn.Module) -> None:
        self._python, numpy = random.getstate(), sys.modules.get("numpy")  # which need not be installed
        self._numpy = numpy and numpy.random.get_state()
        own = (v for m in module.modules() for v in m.__dict__.values() if isinstance(v, torch.Generator))
        self._own = [(g, g.get_state()) for g in own]

    def restore(self) -> None:
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        for generator, state in self._own:
            generator.set_state(state)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {n: v for n, v in module.__dict__.items() if n not in _OF_MODULES}


def _refill(contents: _Contents) -> None:
    for container, content in contents:
        if isinstance(container, list):
            container[:] = content
        else:
            container.clear()
            container.update(content)
