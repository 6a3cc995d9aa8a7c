"""Values that are read on the host, once for all layers of a model: a GPU has to be waited for, and is idle then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
_READ = "_pyckpt_read"  # the attribute of a tensor that has what was read of it


def read_once(t: Tensor, what: Any, asker: object, read: Callable[[], _T]) -> _T:
    """read(), which looks at values of the tensor; what another `asker`, a layer, has read of it in the same pass.

    One that asks again begins another pass. Within one nobody writes to a mask, where between two there are ways that
    no version tells of: a broadcast from another process, `.data`. On a CPU it is read each time: that is quick, and
    memory may be NumPy's. In a CUDA graph's capture reading is an error, as it should be.
    """
    if torch.compiler.is_compiling() or not _is_waited_for(t) or t.is_inference():
        return read()
    known = t.__dict__.setdefault(_READ, {})
    found = known.get(what)
    now = t._version, _stream_of(t)
    if found is None or found.at != now or id(asker) in found.askers:
        found = known[what] = _Found(now, set(), read())
    found.askers.add(id(asker))
    return found.answer


@dataclasses.dataclass
class _Found:
    """`at`: which writing of the tensor, and the stream on which the answer was made, if that is a tensor."""

    at: tuple[int, int]
    askers: set[int]
    answer: Any


def _is_waited_for(t: Tensor) -> bool:
    return t.is_cuda and type(t) is Tensor and not torch.cuda.is_current_stream_capturing()


def _stream_of(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0
