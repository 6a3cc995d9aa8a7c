"""Values that are read on the host, once for each tensor: a GPU has to be waited for, which empties its queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

_T = TypeVar("_T")
_READ = "_pyckpt_read"  # the attribute of a tensor that has what was read of it


def read_once(t: Tensor, what: Any, read: Callable[[], _T]) -> _T:
    """read(), which looks at values of the tensor; the same again, for the same `what`, until it is written to.

    On a CPU each time: reading is quick there, and memory may be NumPy's, whose writing nobody hears of.
    """
    if not _is_waited_for(t) or t.is_inference():
        return read()
    known = t.__dict__.setdefault(_READ, {})
    version, answer = known.get(what, (None, None))
    if version != t._version:
        version, answer = known[what] = t._version, read()
    return answer


def _is_waited_for(t: Tensor) -> bool:
    return t.is_cuda and type(t) is Tensor
