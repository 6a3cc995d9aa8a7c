"""A layer that runs twice computes what it computed before, and keeps what it would keep after one run."""

from __future__ import annotations

import contextlib
import random
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase  # whose kernels do not count what they write

_OF_MODULES = frozenset(nn.Module().__dict__) - {"training"}
_CONTAINERS = (list, dict, set)


class FirstRun:
    """The run whose changes stay. `buffers` are then those that it wrote to, `kernels` what attention may use in it."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.buffers = module, list[Tensor]()

    def __enter__(self) -> None:
        self._versions = [(b, b._version) for b in self._module.buffers() if not b.is_inference()]
        self.drawing = _Generators(self._module)
        self.kernels = _attention_kernels()

    def __exit__(self, *error: Any) -> None:
        silent = {id(b) for m in self._module.modules() if isinstance(m, _NormBase) for b in m.buffers()}
        self.buffers = [b for b, version in self._versions if b._version != version or id(b) in silent]
        del self._versions


class SecondRun:
    """A run whose changes are undone: of attributes, of lists, dicts and sets in them, and of the buffers of `first`.

    Generators other than PyTorch's own, which torch.utils.checkpoint sees to, give the numbers of the first run again.
    What `sdpa_kernel` chose around the first run is chosen again. Modules that DeepSpeed keeps its books in are let be.
    """

    def __init__(self, module: nn.Module, first: FirstRun) -> None:
        self._module, self._first = module, first

    def __enter__(self) -> None:
        modules = [m for m in self._module.modules() if not any(n.startswith("ds_") for n in m.__dict__)]
        self._before = [(m, _attributes(m), dict(m._buffers)) for m in modules]
        self._contents = [
            (v, v.copy()) for _, attributes, _ in self._before for v in attributes.values() if type(v) in _CONTAINERS
        ]
        self._buffers = [(b, b.detach().clone()) for b in self._first.buffers]
        self._drawing = _Generators(self._module)
        self._first.drawing.restore()
        self._choice = contextlib.ExitStack()
        if _attention_kernels() != self._first.kernels:
            self._choice.enter_context(sdpa_kernel(self._first.kernels, set_priority=True))

    def __exit__(self, *error: Any) -> None:
        self._choice.close()
        self._drawing.restore()
        for buffer, value in self._buffers:
            buffer.detach().copy_(value)
        for container, content in self._contents:
            _refill(container, content)
        for module, attributes, buffers in self._before:
            module._buffers.update(buffers)
            for name in _attributes(module).keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
        del self._before, self._contents, self._buffers, self._drawing


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


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
        return
    container.clear()
    container.update(content)
