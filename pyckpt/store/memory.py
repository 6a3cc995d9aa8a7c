"""A store in the memory of the device that computes: tiles are views of it, and nothing is copied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyckpt.store.interface import OpenStore
from pyckpt.store.plan import Key, Plan

Slabs = dict[tuple[str, int], Tensor]


def allocate(plan: Plan, device: torch.device) -> Slabs:
    """One tensor (tokens, width) for each name and number."""
    with torch.inference_mode(False):  # later runs, outside of it, write to them too
        return {
            (s.name, i): torch.empty(plan.tokens, s.width, dtype=s.dtype, device=device)
            for s in plan.slabs
            for i in range(s.count)
        }


class InMemory(OpenStore):
    """`OpenStore` of tensors on the device. `done` gets them back at the end."""

    def __init__(self, plan: Plan, device: torch.device, slabs: Slabs, done: Callable[[Slabs], None]) -> None:
        super().__init__(plan, device)
        self._slabs: Slabs | None = slabs
        self._done = done

    def _view(self, key: Key) -> Tensor:
        assert self._slabs is not None, "the store is closed"
        name, index, tile = key
        return self._slabs[name, index][self.plan.rows(tile)]

    def new(self, key: Key) -> Tensor:
        self._held.discard(key)
        return self._view(key)

    def get(self, key: Key) -> Tensor:
        self._check_held(key)
        return self._view(key)

    def change(self, key: Key) -> Tensor:
        self._check_held(key)
        return self._view(key)

    def put(self, key: Key) -> None:
        self._held.add(key)

    def release(self, key: Key) -> None:
        pass

    def prefetch(self, key: Key) -> None:
        pass

    def close(self) -> None:
        slabs, self._slabs = self.__dict__.get("_slabs"), None
        if slabs is not None:
            self._done(slabs)
