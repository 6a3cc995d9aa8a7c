"""The ops as executors call them: `ops.<name>(...)` is `torch.ops.pyckpt.<name>(...)`, without PyTorch's dispatcher.

On its way to an implementation in Python an op passes the autograd key, boxing and, where arguments are left out, their
defaults: 10 to 80 microseconds a call, where a block makes fifteen. An executor runs without autograd, so that nobody
misses this, unless something looks at ops: then they take the dispatcher's way, see `_is_watched`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.ops import registry

_PLAIN = (Tensor, nn.Parameter)


class _Ops:
    """Arguments are positional, the first a tensor or a list of some."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = _direct(name)
        setattr(self, name, call)
        return call


ops: Any = _Ops()


def _direct(name: str) -> Callable[..., Any]:
    packet = getattr(torch.ops.pyckpt, name)

    def call(*args: Any) -> Any:
        if _is_watched() or not _are_plain(args):
            return packet(*args)
        first = args[0][0] if isinstance(args[0], list) else args[0]
        if first.device.type not in registry.DEVICE_TYPES:  # on the meta device the dispatcher finds the shapes
            return packet(*args)
        return registry.call(name, first.device.type, *args)

    call.__name__ = name
    return call


def _is_watched() -> bool:
    """Whether ops are recorded, counted, traced or differentiated."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def _are_plain(args: tuple[Any, ...]) -> bool:
    """Whether no tensor is of a class of its own, which might have a say in what an op does, or to be read negated.

    That is what `Tensor.conj` leaves of an imaginary part: kernels read memory, and the dispatcher a bit beside it.
    """
    for arg in args:
        if isinstance(arg, Tensor):
            if type(arg) not in _PLAIN or arg.is_neg():
                return False
        elif isinstance(arg, list) and not _are_plain(tuple(arg)):
            return False
    return True
