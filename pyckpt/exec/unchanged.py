"""`Unchanged`: what a streamed run was given, beside weights, is what it was when its backward reads it again."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pyckpt.exec.ends import Sink, Source
from pyckpt.exec.stack import Stack

_Versions = list[tuple[Tensor, int]]


class Unchanged:
    """Notes versions, as autograd does of what it saves: a streamed node saves its weights alone."""

    def __init__(self) -> None:
        self._by_backward: _Versions = []
        self._by_forward: _Versions = []

    def note(self, stack: Stack, source: Source, sink: Sink) -> None:
        given = (stack.positions, stack.layout.cu_seqlens)
        self._by_backward = _versions((*given, *source.read_backward, *sink.read_backward))
        self._by_forward = _versions((*source.read_forward, *sink.read_forward))

    def check(self, forward: bool) -> None:
        """forward: another forward comes, too. Raises RuntimeError, as autograd would."""
        versions = self._by_backward + (self._by_forward if forward else [])
        if any(t._version != version for t, version in versions):
            raise RuntimeError(
                "tokens, labels, positions, cu_seqlens or x of a streamed run were modified by an inplace operation "
                "after its forward, and its backward reads them again. Write to a copy, or after the backward"
            )


def _versions(tensors: Iterable[Tensor | None]) -> _Versions:
    """Tensors of inference mode have none, and no gradient either."""
    return [(t, t._version) for t in tensors if t is not None and not t.is_inference()]
