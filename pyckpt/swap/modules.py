"""What can be told of a module from outside: whose class it has, and whether its forward is its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.swap.shadow import unsharded_class
from pyckpt.vocab_parallel import is_dealt_out


def submodule(module: nn.Module, path: str) -> Any:
    """`get_submodule`, in a tenth of its time: calls of layers ask for their inner modules dozens of times.

    Raises AttributeError where there is none.
    """
    if torch.compiler.is_compiling():
        return module.get_submodule(path)
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = None if found is None else found._modules.get(name)
    return module.get_submodule(path) if found is None else found


class UnsupportedError(Exception):
    """The layer computes something that a standard block does not; the message says what."""


class UnsupportedCallError(UnsupportedError):
    """This call asks for something that swapped layers do not compute; their own forwards do."""


def passes(check: Callable[..., None], *args: Any) -> bool:
    """A check raises no `UnsupportedError`."""
    try:
        check(*args)
    except UnsupportedError:
        return False
    return True


_OWN = ("torch.nn.modules.", "transformers.")


def is_known(kind: type) -> bool:
    """A class of PyTorch or transformers themselves: adapters have classes of the same names."""
    return kind.__module__.startswith(_OWN)


def whose(module: nn.Module) -> str:
    """The package of the module's class, as a reason."""
    return f"a class of {type(module).__module__.partition('.')[0]}"


def replaced_forward(module: nn.Module) -> bool:
    """Its class is known, and its forward is not of PyTorch or transformers: derived, or patched into the class."""
    kind = unsharded_class(module)
    return is_known(kind) and not is_own_forward(kind)


def is_own_forward(kind: type[Any]) -> bool:
    """The class's forward is one of PyTorch's or transformers' own. Decorators keep the module of what they wrap."""
    return str(kind.forward.__module__).startswith(_OWN)  # a class that exec() made has None


def is_patched(module: nn.Module) -> str | None:
    """That somebody has put another forward into the module's class, where that is known."""
    if is_own_forward(type(module)) or not replaced_forward(module):  # the first is quick, and nearly always true
        return None
    return f"the forward of {type(module).__name__} is not the one that its class was made with"


def has_plain_weight(module: Any) -> bool:
    """The module's weight is a tensor of PyTorch's own, or one dealt out to processes; quantized ones may be others."""
    return is_plain(module.weight)


def is_plain(t: Any) -> bool:
    """A tensor of PyTorch's own, or one dealt out to processes."""
    return type(t) in (Tensor, nn.Parameter) or is_dealt_out(t) or hasattr(t, "ds_id")


def norm_eps(module: nn.Module) -> float | None:
    """The eps of an RMSNorm or a LayerNorm of a known class; None of anything else."""
    kind = unsharded_class(module)
    if not (kind.__name__.endswith(("RMSNorm", "LayerNorm", "LayerNorm1P")) and is_known(kind)):
        return None
    return next((getattr(module, n) for n in ("variance_epsilon", "eps") if hasattr(module, n)), None)


def is_whole(t: Any) -> bool:
    """A tensor of PyTorch's own, neither quantized nor dealt out to processes."""
    return type(t) in (Tensor, nn.Parameter) and not hasattr(t, "ds_id")
