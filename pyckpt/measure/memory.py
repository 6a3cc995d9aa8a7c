"""``memory()``: the peak of a piece of code, and what autograd keeps in it from forward to backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from pyckpt.measure.saved import SavedLedger
from pyckpt.measure.storages import StorageTracker
from pyckpt.measure.units import format_bytes

_active: MemoryMeasurement | None = None


@dataclass(frozen=True)
class Mark:
    """The state at one call of `MemoryMeasurement.mark`, in bytes above the entry baseline.

    ``live_bytes`` was alive then, ``peak_bytes`` was the most alive at once up to then, ``saved_bytes`` was
    held by autograd then.
    """

    live_bytes: int
    peak_bytes: int
    saved_bytes: int


def memory(
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    modules: Mapping[str, nn.Module] | Iterable[nn.Module] | None = None,
) -> MemoryMeasurement:
    """Measure the memory of what runs inside a ``with`` block::

        with pyckpt.measure.memory(model) as m:
            loss = model.loss(tokens)
            m.mark("forward done")
            loss.backward()
        print(m.peak_bytes, m.saved_bytes, m.marks["forward done"].live_bytes)

    Everything is in bytes and relative to the entry: weights, gradients and inputs made before are the
    baseline.

    - ``m.peak_bytes``: the most that was alive at once.
    - ``m.live_bytes``: alive now, or at the end; negative when more was freed than made.
    - ``m.saved_bytes``: the most that autograd held at once from forward to backward. Each storage counts
      once, whole, with the block's input; parameters and buffers do not count. It counts what goes through
      autograd's saving; a tensor that a custom ``autograd.Function`` hides as an attribute of ``ctx`` is seen
      in ``live_bytes`` only. Graphs that are built during a backward (recomputation) do not count.
    - ``m.per_module``: the same for each measured module, by name. What two modules save counts for the
      first. Blocks that run together as one segment of a stack have none of their own.
    - ``m.mark(name)`` notes all three; ``m.marks[name]`` gives them back as a `Mark`.

    On CUDA the first two are the caching allocator's (``memory_allocated`` and its maximum, which is reset at
    entry), after a synchronisation. On CPU they are the storages that ops return, each counted once however
    many tensors view it, from the end of the op that made it until its memory is released. Not seen on CPU:
    scratch that a kernel allocates and frees inside one op (see `allocator_peak`), code compiled by
    ``torch.compile``, other threads, and sparse tensors. A storage of before that is freed inside counts as
    negative when it belongs to ``model`` or took part in an op inside.

    Measuring puts `torch.autograd.graph.saved_tensors_hooks` around the code: results are the same, but
    autograd's check that a saved tensor was not changed in place is off meanwhile.

    Args:
        model: its parameters and buffers are known from the start, and the pyckpt blocks in it are the
            modules measured one by one.
        device: "cpu" or "cuda"; by default that of ``model``, else CUDA if this process uses it already.
        modules: the modules measured one by one instead: a mapping by name, or modules (named as in
            ``model``).

    Raises:
        ValueError: for a device of another type, and for one that is not there. TypeError: for what is no module.
        RuntimeError: when a measurement is already active.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be None or a torch.nn.Module, got a {type(model).__name__}")
    return MemoryMeasurement(model, _device(model, device), _measured_modules(model, modules))


class _Gauge(Protocol):
    def start(self) -> None: ...

    def read(self) -> tuple[int, int]: ...

    def stop(self) -> None: ...


class MemoryMeasurement:
    """What `memory` returns: a context manager that can be entered once, and its figures."""

    def __init__(self, model: nn.Module | None, device: torch.device, modules: Mapping[str, nn.Module]) -> None:
        weights = [] if model is None else [*model.parameters(), *model.buffers()]
        grads = [w.grad for w in weights if w.grad is not None]
        self.device = device
        self.marks: dict[str, Mark] = {}
        self._ledger = SavedLedger(weights, modules)
        self._gauge: _Gauge = _CudaGauge(device) if device.type == "cuda" else _CpuGauge([*weights, *grads])
        self._state = "new"
        self._last = (0, 0)

    def __enter__(self) -> MemoryMeasurement:
        global _active
        if _active is not None:
            raise RuntimeError(
                "pyckpt.measure.memory() is already active here and can't be nested; use m.mark(name) of the "
                "outer measurement, or leave it first"
            )
        if self._state != "new":
            raise RuntimeError("this measurement was used before; call pyckpt.measure.memory() again for a new one")
        self._ledger.start()
        try:
            self._gauge.start()
        except BaseException:  # __exit__ won't be called
            self._ledger.stop()
            raise
        _active = self
        self._state = "active"
        return self

    def __exit__(self, *exc: Any) -> None:
        global _active
        _active = None
        self._state = "done"
        try:
            self._last = self._gauge.read()
        finally:
            self._gauge.stop()
            self._ledger.stop()

    def mark(self, name: str) -> Mark:
        """Note the figures of this moment under ``name`` (a name used again is replaced)."""
        if self._state != "active":
            raise RuntimeError(f"mark({name!r}) must be called inside the measurement's with block")
        live, peak = self._gauge.read()
        self.marks[name] = Mark(live, peak, self._ledger.held)
        return self.marks[name]

    @property
    def peak_bytes(self) -> int:
        return self._read()[1]

    @property
    def live_bytes(self) -> int:
        return self._read()[0]

    @property
    def saved_bytes(self) -> int:
        return self._ledger.peak

    @property
    def per_module(self) -> dict[str, int]:
        return dict(self._ledger.peak_of)

    def _read(self) -> tuple[int, int]:
        return self._gauge.read() if self._state == "active" else self._last

    def __str__(self) -> str:
        return (
            f"peak {format_bytes(self.peak_bytes)}, saved {format_bytes(self.saved_bytes)}, "
            f"live {format_bytes(self.live_bytes)} (on {self.device}, above the memory in use at the start)"
        )


class _CpuGauge:
    def __init__(self, baseline: Iterable[torch.Tensor]) -> None:
        self._tracker = StorageTracker()
        self._tracker.adopt(baseline)

    def start(self) -> None:
        self._tracker.__enter__()

    def read(self) -> tuple[int, int]:
        self._tracker.refresh()
        return self._tracker.live, self._tracker.peak

    def stop(self) -> None:
        self._tracker.__exit__(None, None, None)
        self._tracker.forget()


class _CudaGauge:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = 0

    def start(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._baseline = torch.cuda.memory_allocated(self._device)

    def read(self) -> tuple[int, int]:
        torch.cuda.synchronize(self._device)
        live = torch.cuda.memory_allocated(self._device) - self._baseline
        return live, torch.cuda.max_memory_allocated(self._device) - self._baseline

    def stop(self) -> None:
        pass


def _device(model: nn.Module | None, device: torch.device | str | None) -> torch.device:
    if device is None:
        first = None if model is None else next(model.parameters(), None)
        device = first.device if first is not None else "cuda" if torch.cuda.is_initialized() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device!r} is no device; give device='cpu' or device='cuda'") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"memory is measured on cpu and cuda, not on {found}; give device='cpu' or device='cuda'")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, and this PyTorch sees no CUDA device; give device='cpu'")
    return found


def _measured_modules(
    model: nn.Module | None, modules: Mapping[str, nn.Module] | Iterable[nn.Module] | None
) -> dict[str, nn.Module]:
    if modules is None:
        blocks = {} if model is None else {n: m for n, m in model.named_modules() if _is_block(m)}
        return {name or "block": module for name, module in blocks.items()}
    if isinstance(modules, Mapping):
        found = dict(modules)
    else:
        names = {} if model is None else {id(m): n for n, m in model.named_modules()}
        found = {names.get(id(m)) or str(i): m for i, m in enumerate(modules)}
    for name, module in found.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules has a {type(module).__name__} under {name!r}, expected a torch.nn.Module")
    return found


def _is_block(module: nn.Module) -> bool:
    # By name: measuring must work on its own, without importing what it measures.
    return any(cls.__name__ == "CheckpointedBlock" for cls in type(module).__mro__)
