"""One streamed run and its backward, for the autograd nodes: the open store, and which weight is whose."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyckpt import errors
from pyckpt.exec.ends import Given, Gradients, Named, Sink, Source
from pyckpt.exec.places import store_plan
from pyckpt.exec.stack import Stack
from pyckpt.exec.streamed import Progress, Streamed
from pyckpt.exec.unchanged import Unchanged
from pyckpt.store import OpenStore, Store

HOW_TO = "Run without stream=, or without {what}."
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
        self._weights, self._given = _Flat(uses), Unchanged()
        self._open()

    @property
    def backward_blocks(self) -> list[int]:
        return self._stack.schedule.backward_blocks

    def new_token(self) -> Tensor:
        """On the device, so that autograd runs a node on the stream of the run's forward."""
        return torch.zeros((), device=self._stack.device)

    def _open(self) -> None:
        self._given.check(forward=True)
        self.source, sink = self._ends()
        self._given.note(self._stack, self.source, sink)
        self._store: OpenStore | None = self._where.open(store_plan(self._stack), self._stack.device)
        self._run = Streamed(self._stack, self._store, self.source, sink, self._weights.of, self._progress)
        self._shared: dict[int, Gradients] = {}
        self._begun = False

    def forward(self, weights: tuple[Tensor, ...], keeping: bool) -> Tensor:
        with self._at_work():
            self._weights.now = weights
            result = self._run.forward(self._weights.of(ENDS))
        self._weights.now = ()
        if not keeping:
            self.close()
        return result

    def _at_work(self) -> AbstractContextManager[None]:
        return at_work(self._stack.device, self.close)

    def backward(
        self, weights: tuple[Tensor, ...], upstream: Tensor, need: tuple[bool, ...], need_dx: bool
    ) -> list[Tensor | None]:
        """One gradient (or None) for each of the flat weights. `need_dx`: the source wants its own."""
        self._ready(weights)
        with self._at_work():
            self._weights.now = weights
            ends, blocks = self._run.backward(self._weights.of(ENDS), upstream, self._wanted(need), need_dx)
        self.close()
        found = dict(enumerate(blocks))
        return [self._sum(i, w, ends, found) if need[i] else None for i, w in enumerate(weights)]

    def _ready(self, weights: tuple[Tensor, ...]) -> None:
        """The forward has run, and no backward since."""
        self._given.check(forward=False)
        if self._begun:
            self.close()
        if self._store is None:
            self._open()
            self.forward(weights, keeping=True)

    # The same block by block, see `pyckpt.exec.streamed_chain`. `of_block(i)` are the flat weights that block i alone
    # reads, `of_others()` the rest.

    def of_block(self, block: int) -> list[int]:
        return [i for i, uses in enumerate(self.uses) if [owner for owner, _ in uses] == [block]]

    def of_others(self) -> list[int]:
        return [i for i, uses in enumerate(self.uses) if len(uses) > 1 or uses[0][0] == ENDS]

    def begin_backward(self, weights: tuple[Tensor, ...], upstream: Tensor) -> None:
        self._ready(weights)
        self._begun = True
        with self._at_work():
            self._weights.now = weights
            self._run.begin_backward(self._weights.of(ENDS), upstream)

    def back(self, block: int, need: tuple[bool, ...], need_dx: bool, last: bool) -> list[Tensor | None]:
        """Of the weights that this block alone reads. `need_dx`: something before it wants its input's gradient;
        `last`: nothing else comes after this."""
        mine, weights = self.of_block(block), self._weights.now
        wanted = [self.uses[i][0][1] for i, needed in zip(mine, need, strict=True) if needed]
        tied = [n for i in self.of_others() if weights[i].requires_grad for owner, n in self.uses[i] if owner == block]
        with self._at_work():
            found = self._run.back(block, [*wanted, *tied], need_dx)
        self._shared[block] = {n: found.pop(n) for n in tied}
        grads = {block: found}
        given = [self._sum(i, weights[i], {}, grads) if needed else None for i, needed in zip(mine, need, strict=True)]
        if last:
            self.close()
        return given

    def end_backward(self, need: tuple[bool, ...], need_dx: bool) -> list[Tensor | None]:
        """Of all other weights."""
        others, weights = self.of_others(), self._weights.now
        with self._at_work():
            ends = self._run.end_backward(self._weights.of(ENDS), need_dx)
        shared = self._shared
        self.close()
        return [
            self._sum(i, weights[i], ends, shared) if needed else None for i, needed in zip(others, need, strict=True)
        ]

    def dx(self, shape: torch.Size | None) -> Tensor | None:
        """The gradient of the x (of this shape) that was given, where one was and wants it."""
        return given_gradient(self.source, shape)

    def close(self) -> None:
        store, self._store, self._weights.now, self._shared = self._store, None, (), {}
        if store is not None:
            del self._run  # its scratch, and what its ends hold
            store.close()

    def _sum(self, i: int, like: Tensor, ends: Gradients, blocks: Mapping[int, Gradients]) -> Tensor | None:
        return summed(((ends if owner == ENDS else blocks.get(owner, {})).get(n) for owner, n in self.uses[i]), like)

    def _wanted(self, need: tuple[bool, ...]) -> list[Collection[str]]:
        wanted: list[list[str]] = [[] for _ in self._stack.plans]
        for uses, needed in zip(self.uses, need, strict=True):
            for owner, name in uses:
                if needed and owner != ENDS:
                    wanted[owner].append(name)
        return list(wanted)

    def reads_source(self, i: int) -> bool:
        """An embedding wants its gradient where one of its weights does."""
        return not {(ENDS, "embed"), (ENDS, "table")}.isdisjoint(self.uses[i])


@contextmanager
def at_work(device: torch.device, close: Callable[[], None]) -> Iterator[None]:
    """Inside, a run computes. What fails there ends it."""
    try:
        with torch.no_grad(), _own_precision(device):
            yield
    except BaseException:
        close()
        raise


def given_gradient(source: Source, shape: torch.Size | None) -> Tensor | None:
    """The gradient of the x (of this shape) that the source was given, where it was and wants it."""
    dx = source.take_dx() if isinstance(source, Given) else None
    return None if dx is None or shape is None else dx.view(shape)


def summed(grads: Iterable[Tensor | None], like: Tensor) -> Tensor | None:
    """The gradient of a weight that is read in several places, from those of each; None where nothing has used it."""
    total: Tensor | None = None
    for grad in grads:
        if grad is not None:
            total = grad if total is None else total.add_(grad)
    return None if total is None else total.to(like.dtype)


def _own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it: the executor casts by itself."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def check_backward(grad_outputs: Iterable[Any]) -> None:
    """In a node's backward: raise RuntimeError where that is to be differentiated itself, or for many at once."""
    errors.check_unbatched("a streamed run", grad_outputs)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward through a streamed run is not supported: backward() or grad() was called with "
            "create_graph=True. " + HOW_TO.format(what="create_graph")
        )


class Node(torch.autograd.Function):
    """What the nodes of streamed runs have in common."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            "forward-mode differentiation through a streamed run is not supported. " + HOW_TO.format(what="it")
        )
