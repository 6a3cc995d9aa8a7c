"""The autograd node of a streamed run: weights (and, for a stack alone, x) in, the loss or y out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyckpt.exec.ends import Given, Named, Sink, Source
from pyckpt.exec.streamed import Progress, Stack, Streamed, store_plan
from pyckpt.store import OpenStore, Store

_HOW_TO = "Run without stream=, or without {what}."
ENDS = -1
"""The owner of the weights that belong to no block."""


class _Flat:
    """The weights of the pass under way, and which is whose. Apart from `Session`: a circle would keep its store."""

    def __init__(self, uses: list[list[tuple[int, str]]]) -> None:
        self.uses = uses
        self.now: tuple[Tensor, ...] = ()

    def of(self, owner: int) -> Named:
        return {name: w for uses, w in zip(self.uses, self.now, strict=True) for of, name in uses if of == owner}


class Session:
    """One streamed run, from its forward to the end of its backward: the open store, and which weight is whose.

    uses: for each of the flat weights, (block or ENDS, name) of every place that reads it; tied weights have two.
    ends: makes the source and the sink of one run.

    A backward empties the store as it goes along. Asked for another one (retain_graph), the run starts from its input
    again: to keep the store's tensors instead would take memory from every user for the sake of few.
    """

    def __init__(
        self,
        stack: Stack,
        store: Store,
        uses: list[list[tuple[int, str]]],
        ends: Callable[[], tuple[Source, Sink]],
        progress: Progress | None,
    ) -> None:
        self._stack, self._where, self.uses, self._ends, self._progress = stack, store, uses, ends, progress
        self._weights = _Flat(uses)
        self._open()

    def _open(self) -> None:
        self.source, sink = self._ends()
        self._store: OpenStore | None = self._where.open(store_plan(self._stack), self._stack.device)
        self._run = Streamed(self._stack, self._store, self.source, sink, self._weights.of, self._progress)

    def forward(self, weights: tuple[Tensor, ...], keeping: bool) -> Tensor:
        try:
            with torch.no_grad(), _own_precision(self._stack.device):
                self._weights.now = weights
                result = self._run.forward(self._weights.of(ENDS))
        except BaseException:
            self.close()
            raise
        self._weights.now = ()
        if not keeping:
            self.close()
        return result

    def backward(
        self, weights: tuple[Tensor, ...], upstream: Tensor, need: tuple[bool, ...], need_dx: bool
    ) -> list[Tensor | None]:
        """One gradient (or None) for each of the flat weights. `need_dx`: the source wants its own."""
        if self._store is None:
            self._open()
            self.forward(weights, keeping=True)
        try:
            with torch.no_grad(), _own_precision(self._stack.device):
                self._weights.now = weights
                ends, blocks = self._run.backward(self._weights.of(ENDS), upstream, self._wanted(need), need_dx)
        finally:
            self.close()
        return [self._sum(i, w, ends, blocks) if need[i] else None for i, w in enumerate(weights)]

    def close(self) -> None:
        store, self._store, self._weights.now = self._store, None, ()
        if store is not None:
            store.close()

    def _sum(self, i: int, like: Tensor, ends: Any, blocks: Any) -> Tensor | None:
        total: Tensor | None = None
        for owner, name in self.uses[i]:
            grad = (ends if owner == ENDS else blocks[owner]).get(name)
            if grad is not None:
                total = grad if total is None else total.add_(grad)
        return torch.zeros_like(like) if total is None else total.to(like.dtype)

    def _wanted(self, need: tuple[bool, ...]) -> list[Collection[str]]:
        wanted: list[list[str]] = [[] for _ in self._stack.plans]
        for uses, needed in zip(self.uses, need, strict=True):
            for owner, name in uses:
                if needed and owner != ENDS:
                    wanted[owner].append(name)
        return list(wanted)


def _own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it: the executor casts by itself."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@torch.compiler.disable
def execute(session: Session, x: Tensor | None, weights: tuple[Tensor, ...]) -> Tensor:
    """The sink's result; one autograd node where a gradient can be asked for, nothing kept where none can."""
    if torch._C._are_functorch_transforms_active():
        session.close()
        raise RuntimeError(
            "streamed runs do not support torch.func transforms. " + _HOW_TO.format(what="the transform")
        )
    grad = torch.is_grad_enabled()
    if grad and ((x is not None and x.requires_grad) or any(w.requires_grad for w in weights)):
        return _Streamed.apply(session, x, *weights)
    return session.forward(weights, keeping=False)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, session: Session, x: Tensor | None, *weights: Tensor) -> Tensor:
        result = session.forward(weights, keeping=True)
        ctx.session, ctx.shape = session, None if x is None else x.shape
        ctx.save_for_backward(*weights)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "double backward through a streamed run is not supported: backward() or grad() was called with "
                "create_graph=True. " + _HOW_TO.format(what="create_graph")
            )
        session, weights = ctx.session, ctx.saved_tensors
        need = ctx.needs_input_grad
        # An embedding wants its gradient where one of its weights does.
        tables = {(ENDS, "embed"), (ENDS, "table")}
        looked_up = any(n and tables.intersection(uses) for n, uses in zip(need[2:], session.uses, strict=True))
        grads = session.backward(weights, grad_outputs[0], tuple(need[2:]), need[1] or looked_up)
        dx = session.source.dx if isinstance(session.source, Given) else None
        return None, None if dx is None else dx.view(ctx.shape), *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            "forward-mode differentiation through a streamed run is not supported. " + _HOW_TO.format(what="it")
        )
