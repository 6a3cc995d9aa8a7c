"""LoRA adapters (PEFT's) beside a layer's linear layers, read as they are at each call.

Of `peft.tuners.lora.layer.Linear`, and of its like for weights of 4 bits, this knows what is plain LoRA: low-rank
products of linear layers without biases, several at once too, dropout, any scaling, merged or switched off. Variants
(DoRA and others) are not a block's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.swap.around import watched
from pyckpt.swap.modules import UnsupportedError

_CLASSES = (("peft.tuners.lora.layer", "Linear"), ("peft.tuners.lora.bnb", "Linear4bit"))


def is_adapted(module: nn.Module) -> bool:
    return (type(module).__module__, type(module).__name__) in _CLASSES


def inside(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules of adapters inside the layer, by path, which may come and go."""
    found: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        if is_adapted(module):
            children = ((n, m) for n, m in module.named_children() if n != "base_layer")
            found |= {at: m for n, child in children for at, m in child.named_modules(prefix=f"{path}.{n}")}
    return found


def base_of(module: nn.Module) -> nn.Module:
    """The linear layer itself, without what adapters are beside it."""
    base = module.base_layer if is_adapted(module) else module
    assert isinstance(base, nn.Module)
    return base


def active(module: Any) -> list[tuple[str, Tensor, Tensor, float, float]]:
    """Name, A (rank, in), B (out, rank), scale and the rate of dropout, of each adapter that adds something now.

    Raises `UnsupportedError` where what they add is not a plain low-rank product.
    """
    if module.disable_adapters and module.merged:
        raise UnsupportedError("its adapters are switched off while merged, and PEFT's forward would unmerge them")
    if module.disable_adapters or module.merged:
        return []
    return [_adapter(module, name) for name in module.active_adapters if name in module.lora_A]


def _adapter(module: Any, name: str) -> tuple[str, Tensor, Tensor, float, float]:
    if name in module.lora_variant:
        raise UnsupportedError(f"its adapter {name!r} is a {type(module.lora_variant[name]).__name__}, not plain LoRA")
    parts = {"lora_A": module.lora_A[name], "lora_B": module.lora_B[name]}
    for kind, part in parts.items():
        if type(part) is not nn.Linear or part.bias is not None:
            raise UnsupportedError(f"its adapter {name!r} has a {kind} that is not a linear layer without bias")
    dropout = module.lora_dropout[name]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        raise UnsupportedError(f"its adapter {name!r} has a {type(dropout).__name__}, not a Dropout")
    rate = float(dropout.p) if type(dropout) is nn.Dropout and dropout.training else 0.0
    return name, parts["lora_A"].weight, parts["lora_B"].weight, float(module.scaling[name]), rate


def check(path: str, module: Any) -> None:
    """Raise `UnsupportedError` where the adapters of the module at `path` are not a block's, now or in training."""
    try:
        _check(module)
    except UnsupportedError as reason:
        raise UnsupportedError(f"{path}: {reason}") from reason


def _check(module: Any) -> None:
    active(module)
    for name, inside in module.named_modules():
        if name and watched(inside):
            raise UnsupportedError("a module of its adapters has forward hooks, which a swapped layer would not run")
    rates = [d.p for name, d in module.lora_dropout.items() if type(d) is nn.Dropout and name in module.active_adapters]
    device: torch.device = module.weight.device
    if any(rates) and not draws_fast(device):
        raise UnsupportedError(
            f"its adapters have dropout, and numbers that follow from positions are slow to draw on a {device.type}"
        )


def draws_fast(device: torch.device) -> bool:
    """Philox is a kernel of ours on a GPU; in PyTorch's integer arithmetic it takes longer than the products."""
    return device.type != "cpu"
