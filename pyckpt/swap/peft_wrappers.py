"""PEFT's wrappers of embeddings and heads that are trained: as a whole (`modules_to_save`), or some of their rows.

Of the second (`trainable_token_indices`, for new tokens) the weight is made anew for each call, from the frozen one and
the rows that are trained. Tied embeddings have one such set of rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyckpt.swap.around import watched
from pyckpt.swap.modules import UnsupportedError, is_whole

_WHOLE = ("peft.utils.other", "ModulesToSaveWrapper")
_ROWS = ("peft.utils.other", "TrainableTokensWrapper")
_ROWS_LAYER = ("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer")


def called_now(module: Any, ours: nn.Module | None = None) -> Any:
    """What a call of the module is one of: where PEFT has wrapped it, the module that it calls now.

    That is the wrapper itself where it is watched: hooks on it see a call. ours: a module whose forward is one of ours.
    """
    kind = _kind(module)
    if kind not in (_WHOLE, _ROWS) or watched(module):
        return module
    return _whole(module) if kind == _WHOLE else _rows(module, ours)


def _kind(module: Any) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _whole(wrapper: Any) -> Any:
    active = wrapper.active_adapters
    trained = active and not wrapper.disable_adapters and all(name in wrapper.modules_to_save for name in active)
    return wrapper.modules_to_save[active[0]] if trained else wrapper.original_module


def _rows(wrapper: Any, ours: nn.Module | None) -> Any:
    layer = wrapper.token_adapter
    if watched(layer, layer is ours) or (layer.disable_adapters and layer.merged):  # a call of the latter unmerges
        return wrapper
    return layer.base_layer if layer.disable_adapters or layer.merged or not layer.active_adapters else layer


def base_of(module: Any) -> Any:
    """The embedding or linear layer itself, of which rows may be trained."""
    return module.base_layer if trains_rows(module) else module


def trains_rows(module: Any) -> bool:
    """It is what `called_now` gives where rows are trained."""
    return _kind(module) == _ROWS_LAYER


def weight_of(module: Any) -> Tensor:
    """The weight that a call of the module reads.

    Where rows are trained: a copy of it all with those, as PEFT makes one for each call.
    """
    return module.get_merged_weights(module.active_adapters) if trains_rows(module) else module.weight


def check(module: Any) -> None:
    """Raise `UnsupportedError` where rows are trained of what is not a weight as it is, without a bias."""
    if not trains_rows(module):
        return
    base = module.base_layer
    if not is_whole(base.weight):
        raise UnsupportedError("rows are trained of a weight that is quantized or dealt out to processes")
    if getattr(base, "bias", None) is not None:
        raise UnsupportedError("rows are trained of output embeddings with a bias, which PEFT leaves out")
    if len(module.active_adapters) > 1:
        raise UnsupportedError("several adapters train rows of one weight")
