"""What is kept from one call to the next: results of functions, and small tensors where that is safe."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_GRAPHS = "torch._inductor.cudagraph_trees"  # imported with the first of them


def remembered(most: int) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """`functools.lru_cache(most)`, but for torch.compile, which traces through it and warns each user of that."""

    def decorate(fn: Callable[_P, _R]) -> Callable[_P, _R]:
        cached = functools.lru_cache(most)(fn)

        @functools.wraps(fn)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if torch.compiler.is_compiling():
                return fn(*args, **kwargs)
            return cached(*args, **kwargs)  # type: ignore[arg-type]

        call.cache_info, call.cache_clear = cached.cache_info, cached.cache_clear  # type: ignore[attr-defined]
        return call

    return decorate


def belongs_to(device: torch.device) -> Hashable | None:
    """A key for what is made on a device now, which later calls with the same key may read; None: keep nothing.

    On CUDA that is the stream too: on another one it might be read before it is made. A graph under capture would
    read it when it is gone, and what a dispatch mode makes (fakes, say) is its own. Inductor warms its graphs up on a
    stream of their own, in memory where what outlives the call is an error.
    """
    if torch.compiler.is_compiling() or device.type == "meta" or torch._C._len_torch_dispatch_stack():
        return None
    if device.type != "cuda":
        return device
    if torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream(device).cuda_stream
    if _GRAPHS in sys.modules and stream != torch.cuda.default_stream(device).cuda_stream:
        return None
    return device, stream
