"""What is put around a module's call: hooks, forwards in the place of its own, wrappers; and whether we may call it."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.exec import gathering
from pyckpt.exec.gathering import hooks_of
from pyckpt.exec.layouts import deals_out

# By which transformers records attentions and hidden states, and makes embeddings want a gradient for checkpointing.
_HARMLESS_HOOKS = ("output_capturing_hook", "make_inputs_require_grads")


def gathers(module: nn.Module) -> bool:
    """FSDP2 or ZeRO-3 gathers the module's weights for each call of it, and nobody else watches it."""
    return gathering.gathers(module) and all(map(is_harmless, gathering.others(hooks_of(module))))


def gather(*modules: Any) -> None:
    """`pyckpt.exec.gathering.gather` where nobody else watches a module."""
    gathering.gather(*filter(gathers, modules))


def foreign(module: nn.Module, replaced: bool = False) -> bool:
    """The module has forward hooks other than those that gather its weights. `replaced`: as for `watched`."""
    return watched(module, replaced) and not gathers(module)


def is_flattened(module: nn.Module) -> bool:
    """FSDP1 has laid its weights, or some, into one of its own, and makes views of that where they are to be read."""
    return lacks_parameters(module) or any(getattr(p, "_fsdp_flattened", False) for p in module.parameters())


def lacks_parameters(module: nn.Module) -> bool:
    """FSDP1 leaves the modules inside no parameters of their own, as without use_orig_params=True."""
    return any(getattr(m, "_fsdp_use_orig_params", True) is False for m in module.modules())


def wraps(module: nn.Module) -> bool:
    """FSDP1 wraps modules inside, of which it has the weights in calls of those alone."""
    return any(is_wrapper(m) for m in module.modules())


def is_wrapper(module: nn.Module) -> bool:
    """It is FSDP1's, around a module."""
    return "_fsdp_wrapped_module" in module._modules


def called(module: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """forward(x), in a call of the module where that is what gathers its weights."""
    if not gathers(module) or gathering.unshards(module):
        gather(module)
        return forward(x)
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        return module(x)
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def is_harmless(hook: Any) -> bool:
    return getattr(hook, "__name__", "") in _HARMLESS_HOOKS


def is_parallel(module: nn.Module) -> bool:
    """Tensor, sequence or expert parallelism has dealt it out to processes.

    By the hooks of PyTorch's `parallelize_module`, which bring its inputs and outputs together, or by the forward that
    transformers' `tp_plan` puts in the place of its own.
    """
    return is_parallel_forward(module) or any(map(deals_out, hooks_of(module)))


def is_parallel_forward(module: nn.Module) -> bool:
    """A forward of transformers' `tp_plan` is in the place of the module's own."""
    return _origin(module.__dict__.get("forward")).startswith("transformers.distributed.")


def moves(module: nn.Module) -> bool:
    """Accelerate's forward is in the place of its own, and brings what it is given to the device of its weights.

    That is what `device_map` does with a model over several devices. Not where it brings the weights, too.
    """
    forward = module.__dict__.get("forward")
    hook = module.__dict__.get("_hf_hook")
    if hook is None or not _origin(getattr(forward, "func", None)).startswith("accelerate.hooks"):
        return False
    return all(getattr(h, "offload", True) is False and not h.no_grad for h in getattr(hook, "hooks", (hook,)))


def is_replaced(module: nn.Module) -> bool:
    """A forward that may be anything is in the place of its own."""
    return "forward" in module.__dict__ and not (is_parallel_forward(module) or moves(module))


def _brings_weights(module: nn.Module) -> bool:
    """The forward in the place of its own is Accelerate's, or nobody knows whose: it may bring weights and take them.

    A function or method that somebody has written for the module may be called again as its class's own may.
    """
    forward = module.__dict__["forward"]
    somebodys = isinstance(forward, (FunctionType, MethodType)) and not is_compiled(module)
    return "_hf_hook" in module.__dict__ or not somebodys


def may_be_called_again(module: nn.Module) -> bool:
    """What is around a call of it brings weights, inputs or outputs together, which another call does again."""
    return not (is_replaced(module) and _brings_weights(module)) and all(
        is_harmless(h) or deals_out(h) for h in gathering.others(hooks_of(module))
    )


def _origin(function: Any) -> str:
    """The Python module that a function comes from."""
    return str(getattr(function, "__module__", ""))


def in_a_checkpoint() -> bool:
    """What runs now runs again in the backward, by torch.utils.checkpoint in its form that is not reentrant."""
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook.")


def is_compiled(module: nn.Module) -> bool:
    """It is what torch.compile has put around a module."""
    return "_orig_mod" in module._modules


def what_watches(module: nn.Module) -> str:
    """Of a module that is `watched`: by what, and what to do where that can be told."""
    if is_compiled(module):
        return "was compiled by itself (torch.compile); swap the model first, and compile it, or its modules, then"
    if is_parallel(module):
        return (
            "is dealt out to processes (tensor parallelism) otherwise than a block, or was since the model was swapped "
            "(unswap it and swap it again)"
        )
    if moves(module):
        return "is on a device of its own (device_map), which a block does not know"
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__ and all(map(is_harmless, hooks_of(module))):
        return "has a forward in the place of its class's, which a swapped layer would not run"
    return "has forward hooks, which a swapped layer would not run"


def watched(module: nn.Module, replaced: bool = False) -> bool:
    """The module has forward hooks, other than transformers' own that change no value.

    Or a forward of its own, as Accelerate puts there, unless that is known to be `replaced`.
    """
    if "forward" in module.__dict__ and not replaced:
        return True
    return not all(map(is_harmless, hooks_of(module)))
