"""The place where a layer of transformers calls its attention function: q, k, v are taken out there, o is put in.

Layers look the function up by the name in their config. A twin of the layer (see `pyckpt.swap.shadow`) has another name
there, that of a function which asks the tap that hangs on the twin's config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.swap.by_thread import ByThread
from pyckpt.swap.modules import UnsupportedError
from pyckpt.swap.shadow import attention_config, twin_of

_NAME, _TAP = "pyckpt_tap", "pyckpt_tap"


@dataclasses.dataclass(frozen=True)
class Taken:
    """What attention was called with: q, k, v (t, heads * head_dim), their heads and dims, and its options.

    `module` is the one that called.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_head_dim: int
    options: dict[str, Any]
    module: nn.Module


class _ReachedError(BaseException):
    """Leaves the layer's forward; not an Exception, which some catch."""


class Tap:
    """Stands in for the attention function of one layer, for a batch of one, in several threads if need be."""

    def __init__(self) -> None:
        self._now = ByThread()

    def take(self, forward: Callable[[], Any]) -> Taken:
        """What attention is called with when `forward` comes to it."""
        try:
            forward()
        except _ReachedError:
            taken: Taken = self._now.taken
            del self._now.taken
            return taken
        raise UnsupportedError("its attention does not go through transformers' attention functions")

    def fill(self, forward: Callable[[], Any], o: Tensor) -> Any:
        """What `forward` returns where its attention gives o (t, heads, head_dim)."""
        self._now.o, self._now.calls = o, 0
        try:
            made = forward()
            calls = self._now.calls
        finally:
            del self._now.o, self._now.calls
        if calls != 1:
            raise UnsupportedError(f"it calls an attention function {calls} times")
        return made

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """As transformers calls it: q, k, v (1, heads, t, head_dim) to o (1, t, heads, head_dim)."""
        if self._now.o is not None:
            self._now.calls += 1
            return self._now.o[None], None
        options.pop("attention_mask", None)
        sizes = (query.shape[1], key.shape[1], query.shape[-1], value.shape[-1])
        q, k, v = (t[0].transpose(0, 1).flatten(1) for t in (query, key, value))
        self._now.taken = Taken(q, k, v, *sizes, options, module)
        raise _ReachedError


def configs_of(layer: nn.Module, tap: Tap) -> dict[str, Any]:
    """Copies of the layer's configs by the path of their module, with which attention asks the tap."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    copies: dict[int, Any] = {}
    found = {}
    for path, module in layer.named_modules():
        config = module.__dict__.get("config")
        if hasattr(config, "_attn_implementation"):
            if id(config) not in copies:
                copies[id(config)] = attention_config(config, _NAME, **{_TAP: tap})
            found[path] = copies[id(config)]
    return found


def tapped(layer: nn.Module, configs: dict[str, Any], replaced: dict[str, nn.Module] | None = None) -> nn.Module:
    """The layer's twin, whose attention asks the tap."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _NAME not in ALL_ATTENTION_FUNCTIONS:  # a model from a pickle
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)

    def config_of(path: str, config: Any) -> Any:
        return _brought_up_to_date(configs[path], config) if path in configs else config

    return twin_of(layer, config_of, replaced)


def _brought_up_to_date(copied: Any, config: Any) -> Any:
    """The copy, with what was set in the config since: `set_experts_implementation`, a rate, a flag."""
    plain = {n: v for n, v in vars(config).items() if v is None or isinstance(v, (bool, int, float, str))}
    copied.__dict__.update({n: v for n, v in plain.items() if not n.startswith("_attn_implementation")})
    return copied


def _attention(module: Any, *tensors: Any, **options: Any) -> tuple[Tensor, None]:
    return getattr(module.config, _TAP).attend(module, *tensors, **options)


class Idle(nn.Module):
    """Stands where nobody reads the output: (..., width), or the input's own shape; numbers that mean nothing.

    `noisy`: random ones, to see whether somebody does read it.
    """

    def __init__(self, width: int, noisy: bool = False) -> None:
        super().__init__()
        self.width, self.noisy = width, noisy

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shape = (*x.shape[:-1], self.width)
        return torch.randn(shape, dtype=x.dtype, device=x.device) if self.noisy else x.new_zeros(shape)
