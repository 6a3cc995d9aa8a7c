"""Linear layers with weights of 4 bits (bitsandbytes'; QLoRA, Dettmers et al. 2023), as the matrices that they are.

Their matrix is made in the dtype that the layer computes in, as its own forward makes it, for as long as a block runs:
once ahead and once in the backward, not once for every tile. What a step keeps are the 4 bits, which the model has.

In layers that no table knows such modules run themselves, as do those whose x is quantized too (LLM.int8, Dettmers et
al. 2022). To try such a layer out plain linear layers stand in for them, as no random numbers can.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.swap.modules import UnsupportedError
from pyckpt.swap.shadow import twin_of, unsharded_class

_MODULE, _CLASSES = "bitsandbytes.nn.modules", ("Linear4bit", "LinearNF4", "LinearFP4")


def is_quantized(module: nn.Module) -> bool:
    """Its weight is of 4 bits."""
    kind = unsharded_class(module)
    return kind.__module__ == _MODULE and kind.__name__ in _CLASSES


def check(path: str, module: Any) -> None:
    """Raise `UnsupportedError` where its matrix cannot be made of what is there now."""
    state = _state(module)
    if state is None:
        raise UnsupportedError(f"the weight of {path} is not quantized yet, and has not the form that it will have")
    if getattr(state, "packing_format_for_cpu", False):
        raise UnsupportedError(f"the weight of {path} was packed for inference on a CPU, in eval mode")


def shape_of(module: Any) -> torch.Size:
    """(out, in)."""
    return torch.Size(_state(module).shape)


def compute_dtype(module: Any, given: torch.dtype) -> torch.dtype:
    """The dtype of the product of an x in the dtype `given`, whose dtype the result has again."""
    known = module.compute_dtype
    if module.compute_type_is_set:
        return given if known is None else known
    # At its first call it takes x's own where that has float32's range.
    return given if known is None or given in (torch.float32, torch.bfloat16) else known


class Matrix:
    """What makes the matrix (out, in) of a layer's packed weight, in the layer's dtype for products."""

    def __init__(self, module: Any, given: torch.dtype) -> None:
        self.dtype = compute_dtype(module, given)
        self._state = _state(module)

    def __call__(self, packed: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        state = self._state
        # Since 0.50 products take it in their own dtype, before that in the state's.
        if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
            state = copy.copy(state)
            state.dtype = self.dtype
        return dequantize_4bit(packed.reshape(-1, 1), state).to(self.dtype)


def _state(module: Any) -> Any:
    """How the weight was quantized; it is the module's where the parameter is another by now, as FSDP makes it."""
    return getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)


# --- layers that run their own modules -------------------------------------------------------------------------------


def plain(layer: nn.Module) -> nn.Module:
    """A twin of the layer with plain linear layers in the place of quantized ones; without any, the layer itself."""
    odd = {path: _StandIn(m) for path, m in layer.named_modules() if isinstance(m, nn.Linear) and _is_odd(m)}
    return twin_of(layer, lambda _, config: config, odd) if odd else layer


class _StandIn(nn.Linear):
    """Of a class of its own, so that nothing is found out of it which a plain linear layer alone is."""

    def __init__(self, module: nn.Linear) -> None:
        bias, device = module.bias is not None, module.weight.device
        super().__init__(module.in_features, module.out_features, bias, device)
        self.weight.requires_grad_(False)
        if bias:
            self.bias.requires_grad_(module.bias.requires_grad)


def _is_odd(module: nn.Linear) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):  # stored under other names, for one: what stands in would have too many
        return False
    return not weight.is_floating_point() or weight.shape != (module.out_features, module.in_features)


# On CPUs with AVX512-BF16 bitsandbytes packs weights of 4 bits otherwise, in place and for good, once a layer is called
# in eval mode with an x without a gradient, as layers that are tried out, or run again in a backward, are. From then on
# its products have no gradient.
_PACKS = "support_avx512bf16_for_cpu"


@contextlib.contextmanager
def never_packed(model: nn.Module) -> Iterator[None]:
    """From here on no weight of the model is packed for inference, until `may_be_packed`, or an error inside."""
    for module in model.modules():
        if _PACKS in module.__dict__:
            module.__dict__[_PACKS] = False
    try:
        yield
    except BaseException:
        may_be_packed(model)
        raise


def may_be_packed(model: nn.Module) -> None:
    for module in model.modules():
        if _PACKS in module.__dict__:
            from bitsandbytes.nn.modules import has_avx512bf16

            module.__dict__[_PACKS] = has_avx512bf16()
