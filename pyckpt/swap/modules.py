"""What can be told of a module from outside: whose class it has, and whether its forward is its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pyckpt.exec import gathering
from pyckpt.exec.gathering import hooks_of
from pyckpt.swap.shadow import unsharded_class


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
    t = module.weight
    return type(t) in (Tensor, nn.Parameter) or type(t).__name__ == "DTensor" or hasattr(t, "ds_id")


def norm_eps(module: nn.Module) -> float | None:
    """The eps of an RMSNorm or a LayerNorm of a known class; None of anything else."""
    kind = unsharded_class(module)
    if not (kind.__name__.endswith(("RMSNorm", "LayerNorm")) and is_known(kind)):
        return None
    return next((getattr(module, n) for n in ("variance_epsilon", "eps") if hasattr(module, n)), None)


def is_whole(t: Any) -> bool:
    """A tensor of PyTorch's own, neither quantized nor dealt out to processes."""
    return type(t) in (Tensor, nn.Parameter) and not hasattr(t, "ds_id")


# By which transformers records attentions and hidden states, and makes embeddings want a gradient for checkpointing.
_HARMLESS_HOOKS = ("output_capturing_hook", "make_inputs_require_grads")


def gathers(module: nn.Module) -> bool:
    """FSDP2 or ZeRO-3 gathers the module's weights for each call of it, and nobody else watches it."""
    return gathering.gathers(module) and all(map(_is_harmless, gathering.others(hooks_of(module))))


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


def _is_harmless(hook: Any) -> bool:
    return getattr(hook, "__name__", "") in _HARMLESS_HOOKS


def is_parallel(module: nn.Module) -> bool:
    """Tensor, sequence or expert parallelism has dealt it out to processes.

    By the hooks of PyTorch's `parallelize_module`, which bring its inputs and outputs together, or by the forward that
    transformers' `tp_plan` puts in the place of its own.
    """
    return is_parallel_forward(module) or any(map(_is_parallel, hooks_of(module)))


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


def may_be_called_again(module: nn.Module) -> bool:
    """What is around a call of it brings weights, inputs or outputs together, which another call does again."""
    if "forward" in module.__dict__ and not (is_parallel_forward(module) or moves(module)):
        return False
    return all(_is_harmless(h) or _is_parallel(h) for h in gathering.others(hooks_of(module)))


def _is_parallel(hook: Any) -> bool:
    return _origin(hook).startswith("torch.distributed.tensor.")


def _origin(function: Any) -> str:
    """The Python module that a function comes from."""
    return str(getattr(function, "__module__", ""))


def is_compiled(module: nn.Module) -> bool:
    """It is what torch.compile has put around a module."""
    return "_orig_mod" in module._modules


def what_watches(module: nn.Module) -> str:
    """Of a module that is `watched`: by what, and what to do where that can be told."""
    if is_compiled(module):
        return "was compiled by itself (torch.compile); swap the model first, and compile it, or its modules, then"
    if is_parallel(module):
        return "is dealt out to processes (tensor parallelism), which a block does not know"
    if moves(module):
        return "is on a device of its own (device_map), which a block does not know"
    return "has forward hooks, which a swapped layer would not run"


def watched(module: nn.Module, replaced: bool = False) -> bool:
    """The module has forward hooks, other than transformers' own that change no value.

    Or a forward of its own, as Accelerate puts there, unless that is known to be `replaced`.
    """
    if "forward" in module.__dict__ and not replaced:
        return True
    return not all(map(_is_harmless, hooks_of(module)))
