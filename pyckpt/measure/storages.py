"""Bytes of CPU tensor storages alive, kept up to date op by op."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def storages_of(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storages behind every tensor in ``tree`` (any nesting of lists, tuples and dicts)."""
    for tensor in _tensors(tree):
        yield from _storages_of_tensor(tensor)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """An op's arguments are nearly always of these kinds; PyTorch's own walk, for any others, takes far longer."""
    kind = type(tree)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        yield tree
    elif kind is tuple or kind is list or kind is dict:
        for part in tree.values() if kind is dict else tree:
            yield from _tensors(part)
    elif kind not in _PLAIN:
        yield from (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))


def storage_key(storage: torch.UntypedStorage) -> int:
    """What identifies a storage while it is alive, whichever tensor it was reached through."""
    return storage._cdata


def _storages_of_tensor(tensor: Any) -> Iterator[torch.UntypedStorage]:
    if is_traceable_wrapper_subclass(tensor):
        # A DTensor's parts are its local tensor and, in newer PyTorch, the mesh.
        for part in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
            if isinstance(part, torch.Tensor):
                yield from _storages_of_tensor(part)
        return
    try:
        yield tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without one storage
        return


@dataclass
class _Entry:
    nbytes: int
    # A weak reference to a storage dies with its memory, not with a Python wrapper: while C++ (autograd, an
    # alias) holds the storage, PyTorch keeps its one Python object alive.
    ref: weakref.ref[torch.UntypedStorage]


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of CPU storages alive, relative to the moment it was entered.

    A storage an op returns and none has shown before is new: its bytes are added, and taken off when its
    memory is released. A storage first met as an argument was there before: it costs nothing, and its release
    counts as negative, as it does in an allocator's own figure. Sizes are read again after every op, so
    ``resize_`` and ``out=`` arguments that grow are followed. The tracker holds no tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, _Entry] = {}

    def adopt(self, tensors: Iterable[torch.Tensor]) -> None:
        """Makes the storages of ``tensors`` part of the baseline."""
        for storage in storages_of(list(tensors)):
            self._adopt(storage)

    def refresh(self) -> None:
        """Reads every known storage's size again (``UntypedStorage.resize_`` is not an op)."""
        for entry in list(self._known.values()):
            storage = entry.ref()
            if storage is not None:
                self._resized(storage)
        self.peak = max(self.peak, self.live)

    def forget(self) -> None:
        """Stops following storages; ``live`` and ``peak`` keep their last values."""
        self._known.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # torch.tensor(...) builds its data unseen and shows it first as lift_fresh's argument.
        meet = self._count if func is torch.ops.aten.lift_fresh.default else self._adopt
        given = list(_tensors((args, kwargs)))
        for tensor in given:
            for storage in _storages_of_tensor(tensor):
                meet(storage)
        out = self._call(func, args, kwargs)
        for tensor in given:
            for storage in _storages_of_tensor(tensor):
                self._resized(storage)
        for storage in storages_of(out):
            self._count(storage)
        self.peak = max(self.peak, self.live)
        return out

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run_visible = _visible_implementation(func)
        if run_visible is None:
            return func(*args, **kwargs)
        with self:  # a mode is off inside its own handler; on again, it sees the ops the implementation is made of
            return run_visible(func, args, kwargs)

    def _adopt(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == "cpu" and not self._knows(storage):
            self._follow(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "cpu":
            return
        if self._knows(storage):
            self._resized(storage)
        else:
            self.live += self._follow(storage).nbytes

    def _resized(self, storage: torch.UntypedStorage) -> None:
        entry = self._known.get(storage_key(storage))
        if entry is None:
            return
        nbytes = storage.nbytes()
        self.live += nbytes - entry.nbytes
        entry.nbytes = nbytes

    def _knows(self, storage: torch.UntypedStorage) -> bool:
        return storage_key(storage) in self._known

    def _follow(self, storage: torch.UntypedStorage) -> _Entry:
        key = storage_key(storage)
        entry = _Entry(storage.nbytes(), weakref.ref(storage, lambda _: self._released(key)))
        self._known[key] = entry
        return entry

    def _released(self, key: int) -> None:
        entry = self._known.pop(key, None)
        if entry is not None:
            self.live -= entry.nbytes


def _visible_implementation(func: Any) -> Callable[..., Any] | None:
    """How to run one of this package's ops so that the ops inside it are seen; None for every other op."""
    if getattr(func, "namespace", None) != "pyckpt":
        return None
    try:
        from pyckpt.ops import registry
    except ImportError:
        return None
    name = func._schema.name.split("::")[-1]
    return registry.run_visible if name in registry.IMPLEMENTATIONS else None
