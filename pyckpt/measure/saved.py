"""Bytes that autograd keeps from forward to backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pyckpt.measure.storages import storage_key, storages_of


class _Held:
    """What the autograd graph keeps in a saved tensor's place; its end is the end of the saving."""

    __slots__ = ("_release", "tensor")

    def __init__(self, tensor: torch.Tensor, release: Callable[[], None] | None = None) -> None:
        self.tensor = tensor
        self._release = release

    def __del__(self) -> None:
        if self._release is not None:
            self._release()


class _Saved:
    __slots__ = ("count", "nbytes", "owner")

    def __init__(self, nbytes: int, owner: str | None) -> None:
        self.nbytes = nbytes
        self.owner = owner
        self.count = 0


class SavedLedger:
    """Follows the storages packed for backward, each counted once however many nodes save it.

    Weights are no activations and are not counted: every ``nn.Parameter`` and view of one, ``weights``, and
    the parameters and buffers of every module that runs. What is packed while a backward runs (a recomputed
    graph) is not kept from the forward, and is not counted either.

    ``held`` is what is held now, ``peak`` the most held at once; ``peak_of[name]`` the same for what was
    first packed inside the module ``modules[name]``.
    """

    def __init__(self, weights: Iterable[torch.Tensor], modules: Mapping[str, nn.Module]) -> None:
        self.held = 0
        self.peak = 0
        self.held_of = dict.fromkeys(modules, 0)
        self.peak_of = dict.fromkeys(modules, 0)
        self._modules = dict(modules)
        self._weights: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._known_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._add_weights(weights)
        self._saved: dict[int, _Saved] = {}
        self._inside: list[str] = []
        self._handles: list[Any] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def start(self) -> None:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._entering(name)))
            self._handles.append(module.register_forward_hook(self._leaving(name), always_call=True))
        # A weight saved through a detached alias can't be told by its type: each module shows its own.
        self._handles.append(nn.modules.module.register_module_forward_pre_hook(self._learn_weights))
        self._hooks.__enter__()

    def stop(self) -> None:
        self._hooks.__exit__()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inside.clear()

    def _learn_weights(self, module: nn.Module, _args: Any) -> None:
        if module not in self._known_modules:
            self._known_modules.update(module.modules())
            self._add_weights([*module.parameters(), *module.buffers()])

    def _add_weights(self, weights: Iterable[torch.Tensor]) -> None:
        for storage in storages_of(list(weights)):
            self._weights[storage_key(storage)] = weakref.ref(storage)

    def _is_weight(self, storage: torch.UntypedStorage) -> bool:
        ref = self._weights.get(storage_key(storage))
        return ref is not None and ref() is storage  # the address of a freed weight may serve an activation

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            self._inside.append(name)

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, _out: Any) -> None:
            if name in self._inside:
                del self._inside[self._inside.index(name) :]

        return hook

    def _pack(self, tensor: torch.Tensor) -> _Held:
        alias = tensor.detach()  # never the tensor itself: a node that holds its own output would never be freed
        if torch._C._current_graph_task_id() != -1 or _is_parameter(tensor):
            return _Held(alias)
        keys = []
        for storage in storages_of(alias):
            if not self._is_weight(storage):
                keys.append(storage_key(storage))
                self._add(keys[-1], storage.nbytes())
        return _Held(alias, lambda: self._drop(keys)) if keys else _Held(alias)

    def _add(self, key: int, nbytes: int) -> None:
        saved = self._saved.get(key)
        if saved is None:
            owner = self._inside[-1] if self._inside else None
            saved = self._saved[key] = _Saved(nbytes, owner)
            self._move(owner, nbytes)
        saved.count += 1

    def _drop(self, keys: list[int]) -> None:
        for key in keys:
            saved = self._saved[key]
            saved.count -= 1
            if saved.count == 0:
                del self._saved[key]
                self._move(saved.owner, -saved.nbytes)

    def _move(self, owner: str | None, nbytes: int) -> None:
        self.held += nbytes
        self.peak = max(self.peak, self.held)
        if owner is not None:
            self.held_of[owner] += nbytes
            self.peak_of[owner] = max(self.peak_of[owner], self.held_of[owner])


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
