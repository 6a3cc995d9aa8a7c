"""Runs Gluon kernels of `pyckpt.triton_kernels.hopper` on a CPU, and holds them to the rules of asynchronous hardware.

A kernel's source is executed as plain Python, with this module's stand-ins for `triton` and Gluon. Each partition of
warps is a thread of its own; only one runs at a time, and a seeded random choice says which, at every place where one
waits for another. What is asynchronous on the chip happens at a random moment of those at which it may: the copy engine
delivers a tile between its order and its barrier, a product reads shared memory between its start and its wait. A
buffer that is written while something in flight reads it, a product used before it was waited for, a store without a
fence before it and a wait that nothing will end are `HazardError`s; what is read before it was delivered is NaN.

It does not know layouts, registers or instructions: those are the compiler's, `pyckpt.triton_kernels.aot`.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

KERNELS = Path(__file__).resolve().parent.parent / "triton_kernels"
_PACKAGE = "emulated_kernels"


class HazardError(AssertionError):
    """The kernel does what hardware does not promise."""


# --- values ---------------------------------------------------------------------------------------------------


class Int(int):
    """A scalar of a kernel: an int with `.to`."""

    def to(self, dtype: torch.dtype) -> Int:
        return self


def _scalar_op(name: str) -> Callable[[int, int], Any]:
    op = getattr(int, name)

    def of(self: int, other: int) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        found = op(int(self), int(other))
        return Int(found) if isinstance(found, int) and not isinstance(found, bool) else found

    return of


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "xor", "radd", "rsub", "rmul", "rfloordiv", "rmod"):
    setattr(Int, f"__{_name}__", _scalar_op(f"__{_name}__"))


@dataclasses.dataclass(frozen=True)
class _Type:
    layout: Any


class Value:
    """A tensor in registers, or a pointer to each of its elements where `base` is set."""

    def __init__(self, data: Tensor, layout: Any = None, base: Tensor | None = None) -> None:
        self.data, self.type, self.base = data, _Type(layout), base

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.data.to(dtype), self.type.layout)

    def __getitem__(self, index: Any) -> Value:
        return Value(self.data[index], self.type.layout)

    def _with(self, other: Any, op: Callable[[Any, Any], Tensor], swapped: bool = False) -> Value:
        b = other.data if isinstance(other, Value) else other
        a = self.data
        base = self.base if self.base is not None else getattr(other, "base", None)
        return Value(op(b, a) if swapped else op(a, b), self.type.layout, base)


def _value_op(name: str, swapped: bool) -> Callable[[Value, Any], Value]:
    op = getattr(__import__("operator"), name)

    def of(self: Value, other: Any) -> Value:
        return self._with(other, op, swapped)

    return of


for _name in ("add", "sub", "mul", "truediv", "and_", "lt", "le", "ge", "gt", "eq"):
    setattr(Value, f"__{_name.rstrip('_')}__", _value_op(_name, False))
for _name in ("add", "sub", "mul", "truediv"):
    setattr(Value, f"__r{_name}__", _value_op(_name, True))


class Pointer:
    """A kernel's argument: a flat tensor, to which offsets are added."""

    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.base.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.base, more + self.offset if isinstance(more, Value) else self.offset + more)


# --- shared memory and what is in flight ----------------------------------------------------------------------


class Slot:
    """One buffer of shared memory. `version` counts what was written, `reads` what is being read."""

    def __init__(self, shape: list[int], dtype: torch.dtype) -> None:
        self.data = torch.full(shape, float("nan")).to(dtype)
        self.version, self.reads, self.unfenced = 0, 0, False

    def write(self, what: str) -> None:
        if self.reads:
            raise HazardError(f"{what} into a buffer that is still being read")
        self.version += 1


class Shared:
    """A view of a buffer of shared memory."""

    def __init__(self, slots: list[Slot], view: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        self.slots, self.view = slots, view

    def index(self, i: int) -> Shared:
        return Shared([self.slots[i]])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.slots, lambda t: self.view(t).view(*shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.slots, lambda t: self.view(t).permute(*order))

    @property
    def slot(self) -> Slot:
        (slot,) = self.slots
        return slot

    def read(self) -> Tensor:
        return self.view(self.slot.data)

    @property
    def dtype(self) -> torch.dtype:
        return self.slots[0].data.dtype

    def load(self, layout: Any) -> Value:
        return Value(self.read().clone(), layout)

    def store(self, value: Value) -> None:
        self.slot.write("registers are stored")
        self.slot.unfenced = True
        self.read().copy_(value.data)


@dataclasses.dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes are there."""

    count: int = 0
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def advance(self) -> None:
        if self.pending < 0 or self.bytes < 0:
            raise HazardError("more arrivals or bytes at a barrier than it counts")
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count

    def passed(self, parity: int) -> bool:
        return (self.phase & 1) != parity


class Flight:
    """A product in flight."""

    def __init__(self, a: Any, b: Shared, acc: Value | None, early: bool, layout: Any) -> None:
        self.layout, self.read = layout, [x.slot for x in (a, b) if isinstance(x, Shared)]
        self._versions = [s.version for s in self.read]
        for s in self.read:
            s.reads += 1
        self._compute = lambda: _product(a, b, acc)
        self._found = self._compute() if early else None
        self.result: Value | None = None

    def finish(self) -> None:
        for slot, version in zip(self.read, self._versions, strict=True):
            slot.reads -= 1
            if slot.version != version:
                raise HazardError("a buffer was written while a product read it")
        self.result = Value(self._compute() if self._found is None else self._found, self.layout)


def _product(a: Any, b: Shared, acc: Value | None) -> Tensor:
    left = a.read() if isinstance(a, Shared) else a.data
    found = left.float() @ b.read().float()
    return found if acc is None else acc.data + found


@dataclasses.dataclass
class Block:
    """`desc.block_type`."""

    shape: list[int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class Descriptor:
    """A tensor and the block that the copy engine moves: zeros beyond its ends, and nothing written there."""

    def __init__(self, base: Tensor, block: list[int]) -> None:
        self.base, self.dtype, self.block_type, self.layout = base, base.dtype, Block(block, base.dtype), None

    def _part(self, at: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        spans = [
            (max(c, 0), max(min(c + n, size), max(c, 0)), c)
            for c, n, size in zip(at, self.block_type.shape, self.base.shape, strict=True)
        ]
        return tuple(slice(a, b) for a, b, _ in spans), tuple(slice(a - c, b - c) for a, b, c in spans)

    def fetch(self, at: list[int]) -> Tensor:
        outer, inner = self._part(at)
        block = torch.zeros(self.block_type.shape, dtype=self.dtype)
        block[inner] = self.base[outer]
        return block

    def put(self, at: list[int], block: Tensor) -> None:
        outer, inner = self._part(at)
        self.base[outer] = block.view(self.block_type.shape)[inner]


# --- one program: its threads, and the order of things --------------------------------------------------------


class Program:
    """The partitions of one program, of which one runs at a time."""

    def __init__(self, pid: int, programs: int, choose: random.Random) -> None:
        self.pid, self.programs, self.choose = pid, programs, choose
        self._turn = threading.Condition()
        self._running: threading.Thread | None = None
        self._waiting: dict[threading.Thread, Callable[[], bool]] = {}
        self._events: list[Callable[[], None]] = []
        self._error: BaseException | None = None
        self.products: dict[threading.Thread, list[Flight]] = {}
        self.stores: dict[threading.Thread, list[Callable[[], None]]] = {}

    def later(self, event: Callable[[], None]) -> None:
        self._events.append(event)

    def until(self, ready: Callable[[], bool]) -> None:
        """Give way to others, and go on at some moment when this is so."""
        with self._turn:
            self._waiting[threading.current_thread()] = ready
            self._next()
            self._go_on()

    def _go_on(self) -> None:
        """Wait for the turn."""
        me = threading.current_thread()
        self._turn.wait_for(lambda: self._running is me or self._error is not None)
        if self._error is not None:
            raise _StoppedError
        del self._waiting[me]

    def _next(self) -> None:
        """Deliver what is on its way, as much of it as chance will, and choose who goes on."""
        while True:
            able = [t for t, ready in self._waiting.items() if ready()]
            if self._events and (not able or self.choose.random() < 0.5):
                event = self._events.pop(self.choose.randrange(len(self._events)))
                self._guard(event)
            elif able:
                self._running = self.choose.choice(able)
                break
            elif self._waiting:
                self._guard(_deadlock)
            if self._error is not None or not self._waiting:
                break
        self._turn.notify_all()

    def _guard(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            self._error = error

    def run(self, parts: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        def body(fn: Callable[..., None], args: tuple[Any, ...]) -> None:
            try:
                with self._turn:
                    self._go_on()
                fn(*args)
                if self.products.get(threading.current_thread()) or self.stores.get(threading.current_thread()):
                    raise HazardError("a partition ended with something in flight")
            except _StoppedError:
                return
            except BaseException as error:
                self._error = error
            with self._turn:
                self._next()

        threads = [threading.Thread(target=body, args=part, daemon=True) for part in parts]
        with self._turn:
            for t in threads:
                self._waiting[t] = lambda: True
                t.start()
            self._next()
        for t in threads:
            t.join(60)
        if self._error is not None:
            raise self._error
        if any(t.is_alive() for t in threads):
            raise HazardError("a partition did not end")


class _StoppedError(Exception):
    pass


def _deadlock() -> None:
    raise HazardError("every partition waits, and nothing is on its way")


_programs: list[Program] = []


def _now() -> Program:
    return _programs[-1]


# --- what kernels call ----------------------------------------------------------------------------------------


def _wait(bar: Shared, phase: int, pred: bool = True) -> None:
    if pred:
        _now().until(lambda: bar.slot.passed(int(phase)))


def _arrive(bar: Shared, *, count: int = 1, pred: bool = True) -> None:
    if pred:
        bar.slot.pending -= count
        bar.slot.advance()


def _expect(bar: Shared, nbytes: int, pred: bool = True) -> None:
    if pred:
        bar.slot.bytes += nbytes
        bar.slot.pending -= 1
        bar.slot.advance()


def _init(bar: Shared, count: int) -> None:
    bar.slot.count = bar.slot.pending = count


def _load_tile(desc: Descriptor, at: list[int], bar: Shared, into: Shared) -> None:
    slot = into.slot
    slot.write("the copy engine writes")
    slot.data.fill_(float("nan"))
    at = [int(c) for c in at]

    def deliver() -> None:
        slot.write("the copy engine writes")
        slot.data.copy_(desc.fetch(at))
        bar.slot.bytes -= desc.block_type.nbytes
        bar.slot.advance()

    _now().later(deliver)


def _store_tile(desc: Descriptor, at: list[int], source: Shared) -> None:
    slot = source.slot
    if slot.unfenced:
        raise HazardError("the copy engine reads what was stored without a fence since")
    version, at, done = slot.version, [int(c) for c in at], []
    slot.reads += 1

    def leave() -> None:
        if not done:
            done.append(True)
            slot.reads -= 1
            if slot.version != version:
                raise HazardError("a buffer was written while the copy engine read it")
            desc.put(at, slot.data)

    _now().later(leave)
    _now().stores.setdefault(threading.current_thread(), []).append(leave)


def _store_wait(pendings: int) -> None:
    mine = _now().stores.setdefault(threading.current_thread(), [])
    while len(mine) > pendings:
        mine.pop(0)()


_all_slots: list[Slot] = []


def _fence(cluster: bool = False) -> None:
    for slot in _all_slots:
        slot.unfenced = False


def _mma(a: Any, b: Shared, acc: Value, *, use_acc: bool = True, is_async: bool = False) -> Any:
    if isinstance(acc, Flight) or isinstance(a, Flight):
        raise HazardError("a product takes what is still in flight")
    flight = Flight(a, b, acc if use_acc else None, _now().choose.random() < 0.5, acc.type.layout)
    mine = _now().products.setdefault(threading.current_thread(), [])
    mine.append(flight)
    if not is_async:
        return _mma_wait(0, deps=(flight,))
    _now().until(lambda: True)
    return flight


def _mma_wait(num_outstanding: int = 0, deps: tuple[Any, ...] = ()) -> Any:
    mine = _now().products.setdefault(threading.current_thread(), [])
    _now().until(lambda: True)
    while len(mine) > num_outstanding:
        mine.pop(0).finish()
    results = []
    for dep in deps:
        if isinstance(dep, Flight) and dep.result is None:
            raise HazardError("a product is used that was not waited for")
        results.append(dep.result if isinstance(dep, Flight) else dep)
    return results[0] if len(results) == 1 else tuple(results)


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
    if dtype == torch.int64:
        return Shared([Barrier() for _ in range(shape[0])])  # type: ignore[misc]
    slots = [Slot(shape[1:], dtype) for _ in range(shape[0])]
    _all_slots.extend(slots)
    return Shared(slots)


def _load(p: Pointer, mask: Any = None, other: float = 0.0) -> Value:
    offset = p.offset.data if isinstance(p.offset, Value) else torch.tensor(int(p.offset))
    seen = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.data
    offset, seen = torch.broadcast_tensors(offset, seen)
    found = torch.full(offset.shape, other, dtype=p.base.dtype)
    found[seen] = p.base[offset[seen]]
    return Value(found, p.offset.type.layout if isinstance(p.offset, Value) else None)


def _store(p: Pointer, value: Value, mask: Any = None) -> None:
    assert isinstance(p.offset, Value)
    seen = torch.ones_like(p.offset.data, dtype=torch.bool) if mask is None else mask.data
    offset, found, seen = torch.broadcast_tensors(p.offset.data, value.data, seen)
    p.base[offset[seen]] = found[seen].to(p.base.dtype)


def _data(x: Any) -> Any:
    return x.data if isinstance(x, Value) else x


def _extreme(name: str) -> Callable[[Any, Any], Any]:
    def of(a: Any, b: Any) -> Any:
        if not isinstance(a, Value) and not isinstance(b, Value):
            return Int(max(a, b) if name == "maximum" else min(a, b))
        like = a if isinstance(a, Value) else b
        a, b = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=like.dtype) for x in (_data(a), _data(b)))
        return Value(getattr(torch, name)(a, b), like.type.layout)

    return of


def _where(condition: Value, a: Any, b: Any) -> Value:
    layout = next((x.type.layout for x in (a, b) if isinstance(x, Value)), None)
    return Value(torch.where(condition.data, _data(a), _data(b)), layout)


def _gluon() -> types.SimpleNamespace:
    gl = types.SimpleNamespace()
    gl.constexpr = lambda x: x
    gl.float32, gl.bfloat16, gl.float16, gl.int64, gl.int32 = (
        *(torch.float32, torch.bfloat16, torch.float16),
        *(torch.int64, torch.int32),
    )
    gl.program_id = lambda axis: Int(_now().pid)
    gl.num_programs = lambda axis: Int(_now().programs)
    gl.static_range = range
    gl.cdiv = lambda a, b: Int(-(-a // b))
    gl.maximum, gl.minimum = _extreme("maximum"), _extreme("minimum")
    gl.full = lambda shape, value, dtype, layout=None: Value(torch.full(shape, value, dtype=dtype), layout)
    gl.zeros = lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype), layout)
    gl.arange = lambda a, b, layout=None: Value(torch.arange(a, b), layout)
    gl.exp2 = lambda x: Value(torch.exp2(x.data), x.type.layout)
    gl.log2 = lambda x: Value(torch.log2(x.data), x.type.layout)
    gl.max = lambda x, axis: Value(x.data.amax(axis), x.type.layout)
    gl.sum = lambda x, axis: Value(x.data.sum(axis), x.type.layout)
    gl.where = _where
    gl.convert_layout = lambda x, layout: Value(x.data, layout)
    gl.load, gl.store = _load, _store
    gl.allocate_shared_memory = _allocate
    gl.warp_specialize = lambda parts, warps, registers: _now().run(parts)
    for name in ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout"):
        setattr(gl, name, lambda *args, kind=name, **kwargs: (kind, args, tuple(kwargs.items())))
    return gl


def _jit(fn: Any = None, **options: Any) -> Any:
    return (lambda f: f) if fn is None else fn


def _stand_ins() -> dict[str, Any]:
    """What kernels import, by name."""
    gl = _gluon()
    tl = types.ModuleType("triton.language")
    for name in ("constexpr", "maximum", "minimum", "int64", "int32", "float32"):
        setattr(tl, name, getattr(gl, name))
    triton = types.ModuleType("triton")
    triton.jit, triton.language = _jit, tl
    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.jit = _jit
    language = types.ModuleType("triton.experimental.gluon.language")
    language.__dict__.update(vars(gl))
    gluon.language = language
    hopper = types.ModuleType("triton.experimental.gluon.language.nvidia.hopper")
    hopper.fence_async_shared, hopper.warpgroup_mma, hopper.warpgroup_mma_wait = _fence, _mma, _mma_wait
    hopper.mbarrier = types.SimpleNamespace(
        wait=_wait, arrive=_arrive, expect=_expect, init=_init, MBarrierLayout=lambda: None
    )
    hopper.tma = types.SimpleNamespace(async_load=_load_tile, async_store=_store_tile, store_wait=_store_wait)
    made = {m.__name__: m for m in (triton, tl, gluon, language, hopper)}
    for name in ("triton.experimental", "triton.experimental.gluon.language.nvidia"):
        made[name] = types.ModuleType(name)
    made["triton.experimental"].gluon = gluon
    return made


@contextmanager
def _package() -> Iterator[None]:
    packages = {}
    for name, path in ((_PACKAGE, KERNELS), (f"{_PACKAGE}.hopper", KERNELS / "hopper")):
        packages[name] = types.ModuleType(name)
        packages[name].__path__ = [str(path)]
    with mock.patch.dict(sys.modules, {**_stand_ins(), **packages}):
        yield


def emulated(name: str, change: tuple[str, str] | None = None) -> types.ModuleType:
    """The module `hopper/name.py`, its kernels plain functions of Python; with a text in it changed for another."""
    path = KERNELS / "hopper" / f"{name}.py"
    source = path.read_text()
    if change is not None:
        assert change[0] in source, f"{change[0]!r} is not in {path}"
        source = source.replace(*change)
    module = types.ModuleType(f"{_PACKAGE}.hopper.{name}")
    module.__package__ = f"{_PACKAGE}.hopper"
    with _package():
        exec(compile(source, str(path), "exec"), module.__dict__)
    return module


class Launcher:
    """Stands for a kernel where it is launched: `launcher[grid](...)`, in an order of events that the seed decides."""

    def __init__(self, kernel: Callable[..., None], seed: int = 0) -> None:
        self.kernel, self.seed = kernel, seed

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def run(*args: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
            choose = random.Random(self.seed)
            for pid in range(grid[0]):
                _all_slots.clear()
                _programs.append(Program(pid, grid[0], choose))
                try:
                    self.kernel(*map(_argument, args), **constants)
                finally:
                    _programs.pop()

        return run


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer(x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0), x.storage_offset())
    if isinstance(x, int):
        return Int(x)
    if hasattr(x, "block_shape"):
        return Descriptor(x.base.as_strided(x.shape, x.strides), x.block_shape)
    return x
