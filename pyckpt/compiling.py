"""torch.compile's decorators without importing the compiler, which takes as long as PyTorch itself.

`torch.compiler.disable` imports it as soon as it decorates something. PyTorch has the other one for its own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._compile import _disable_dynamo

_F = TypeVar("_F", bound=Callable[..., Any])


def uncompiled(function: _F) -> _F:
    """A graph is broken around a call of it, as by `torch.compiler.disable`."""
    return _disable_dynamo(function)  # type: ignore[return-value]


def constant_result(function: _F) -> _F:
    """What it returns is a constant of a graph, as by `torch.compiler.assume_constant_result`."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
