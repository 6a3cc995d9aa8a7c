"""What a model's config, and what is registered beside it, say of how its attention is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

# In the names of options that may be limits to what a token sees, and what is in those of others.
_LIMITS, _NO_LIMITS = ("window", "chunk", "local"), ("layers", "pattern", "experts", "feed_forward")
# Modules of transformers whose attention functions compute the same; "eager" is in each model's own.
_SAME = frozenset(
    f"transformers.integrations.{n}"
    for n in ("sdpa_attention", "flash_attention", "flex_attention", "sdpa_paged", "flash_paged", "eager_paged")
)


def names_limit(name: str) -> bool:
    """An option of this name may be a window."""
    return any(w in name for w in _LIMITS) and not any(w in name for w in _NO_LIMITS)


def limits(config: Any) -> dict[str, Any]:
    """The options of a config that say which keys a token sees, as they are now."""
    named = (n for n in vars(config) if n == "layer_types" or "bidirectional" in n or names_limit(n))
    found = {n: getattr(config, n) for n in named}
    return {n: tuple(value) if isinstance(value, list) else value for n, value in found.items()}


def other(config: Any) -> str | None:
    """That attention is computed by a function that is neither transformers' nor PyTorch's, or None.

    One that was registered, under a name of its own or in the place of another, may compute anything: over the tokens
    of other processes (DeepSpeed's Ulysses), with numbers added to the scores.
    """
    name = getattr(config, "_attn_implementation", None)
    if name is None:
        return None
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function, mask = ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if function is not None and _module(function) not in _SAME:
        return f"its attention function {name!r} is of {_module(function)}, and may compute anything"
    if mask is not None and _module(mask) != "transformers.masking_utils":
        return f"the masks of its attention function {name!r} are made by {_module(mask)}, and may be any"
    if name == "sdpa" and F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention:
        # As `context_parallel` does, for attention over the tokens of all processes.
        return "torch.nn.functional.scaled_dot_product_attention is not PyTorch's own"
    return None


def _module(function: Any) -> str:
    return str(getattr(function, "__module__", None))
