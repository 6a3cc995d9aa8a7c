"""Output embeddings whose words tensor parallelism has dealt out to processes: PyTorch's way, or transformers'."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyckpt.exec.gathering import gathers
from pyckpt.swap.around import is_parallel, is_parallel_forward, may_be_called_again
from pyckpt.vocab_parallel import is_dealt_out


def shards_words(linear: Any) -> bool:
    """It is `is_parallel`, each process has some of its rows, and what it does to its input can be had by itself."""
    alone = may_be_called_again(linear) and not gathers(linear)
    if not (is_parallel(linear) and alone and is_dealt_out(linear.weight)):
        return False
    from torch.distributed.tensor import Shard

    by_rows = Shard(0) in linear.weight.placements and Shard(1) not in linear.weight.placements
    return by_rows and (not is_parallel_forward(linear) or _style(linear) is not None)


def given(linear: Any, x: Tensor) -> Tensor:
    """What its product takes of x, a DTensor as a rule: all tokens, where they are dealt out to processes too."""
    for hook in linear._forward_pre_hooks.values():
        made = hook(linear, (x,))
        x = x if made is None else made[0] if isinstance(made, tuple) else made
    style = _style(linear)
    if style is not None:
        how, mesh = style
        (x, *_), _ = how.transform_inputs_pre_forward(linear, (x,), {}, mesh)
    return x


def _style(linear: nn.Module) -> tuple[Any, Any] | None:
    """transformers' way of dealing it out, and to which processes, which its forward has in its closure."""
    forward = linear.__dict__.get("forward")
    if forward is None or not is_parallel_forward(linear):
        return None
    names = getattr(forward, "__code__", None) and forward.__code__.co_freevars
    held = dict(zip(names or (), forward.__closure__ or (), strict=False))
    found = [held[n].cell_contents for n in ("self", "mesh") if n in held]
    if len(found) != 2 or not hasattr(found[0], "transform_inputs_pre_forward"):
        return None
    return found[0], found[1]
