"""Two CUDA devices that are not there. Import it before torch, in a process of its own: `pytest -p pretended`.

What runs on a GPU differs from what runs on a CPU in more than its kernels: which tensors may be used together, whose
generator draws, on which device and stream things happen, what the host waits for, what the allocator counts. All of
that can be had on a CPU. `device.cpp` registers with PyTorch's CPU build a device of type "cuda" whose memory is the
host's and whose kernels are the CPU's; here `torch.cuda` is given what it would have from a build with CUDA.

- Tensors of the host and of two devices do not mix, but where PyTorch's own kernels let them.
- Each device has a generator of its own; memory that nobody wrote to is full of NaN.
- `waits()` counts what the host waits for: numbers that are read, copies that are not asynchronous, sizes that depend
  on values.
- `races()` has what a stream does to memory beside another that nothing orders, as vector clocks tell (Mattern, 1989),
  and what is freed while another stream uses it. Ops alone are seen, not what kernels do with addresses.

Triton's kernels run in its interpreter (TRITON_INTERPRET=1), which copies what they are given to the host and back.
Kernels of CUDA, cuDNN, NCCL and CUDA graphs are not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("device.cpp")
_LONG, _INT, _PLACE, _TEXT = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "devices": (_INT, []),
    "device": (_INT, []),
    "set_device": (_INT, [_INT]),
    "stream": (_LONG, [_INT]),
    "set_stream": (None, [_INT, _LONG]),
    "new_stream": (_LONG, []),
    "bytes": (_LONG, [_INT]),
    "peak": (_LONG, [_INT]),
    "reset_peak": (None, [_INT]),
    "lock_pages": (None, [_PLACE, ctypes.c_size_t]),
    "unlock_pages": (None, [_PLACE]),
    "waits": (_LONG, []),
    "races": (_LONG, []),
    "race": (_TEXT, [_LONG]),
    "forget_races": (None, []),
    "set_idle": (None, [_INT]),
    "synchronize": (None, []),
    "synchronize_stream": (None, [_INT, _LONG]),
    "new_event": (_PLACE, []),
    "drop_event": (None, [_PLACE]),
    "record": (None, [_PLACE, _INT, _LONG]),
    "wait": (None, [_PLACE, _INT, _LONG]),
    "synchronize_event": (None, [_PLACE]),
}


def build(compiler: str) -> Path:
    """The library of device.cpp for the PyTorch that is installed, made once."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_at = Path(spec.origin).parent
    version = (torch_at / "version.py").read_bytes()
    key = hashlib.sha256(_SOURCE.read_bytes() + version + str(torch_at).encode()).hexdigest()[:16]
    made = Path(tempfile.gettempdir()) / f"pyckpt-pretended-{os.getuid()}" / f"device-{key}.so"
    if not made.exists():
        made.parent.mkdir(exist_ok=True, mode=0o700)
        beside = made.with_suffix(f".{os.getpid()}.so")
        include, lib = torch_at / "include", torch_at / "lib"
        headers = ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
        libraries = [f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w"]
        subprocess.run([compiler, *flags, *headers, str(_SOURCE), "-o", str(beside), *libraries], check=True)
        beside.rename(made)
    return made


class _Library:
    """The functions of device.cpp, by what follows their prefix."""

    def __init__(self, at: Path) -> None:
        loaded = ctypes.CDLL(str(at), mode=ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, f"pretended_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, _plain(function))


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile looks its rules up by function, for which it has to be hashable, and one of its own."""
    return lambda *args: function(*args)


assert "torch" not in sys.modules, "PyTorch asks once what there is of CUDA, when it is imported"
lib = _Library(build(os.environ.get("CXX", "c++")))

import torch  # noqa: E402
import torch._utils  # noqa: E402

_CUDA = 1  # c10::DeviceType::CUDA


def waits() -> int:
    """How often the host has waited for a device."""
    return lib.waits()


def races() -> list[str]:
    """What streams did beside each other since `forget_races`."""
    return [lib.race(i).decode() for i in range(lib.races())]


def forget_races() -> None:
    lib.forget_races()


@contextlib.contextmanager
def idle() -> Iterator[None]:
    """Kernels, Triton's too, do nothing in here: memory is taken and given back as by any, and has nothing in it.

    For what the allocator counts at sizes at which the CPU's kernels would take hours.
    """
    launch = None
    with contextlib.suppress(ImportError):
        from triton.runtime import interpreter

        launch = interpreter.GridExecutor.__call__
        interpreter.GridExecutor.__call__ = lambda self, *args, **kwargs: None
    lib.set_idle(1)
    try:
        yield
    finally:
        lib.set_idle(0)
        if launch is not None:
            interpreter.GridExecutor.__call__ = launch


class _Properties:
    name = "no GPU, an H200 pretended"
    major, minor = 9, 0
    total_memory = 140 * 2**30
    multi_processor_count = 132
    max_threads_per_multi_processor = 2048
    warp_size = 32
    shared_memory_per_block_optin = 227 * 2**10
    shared_memory_per_multiprocessor = 228 * 2**10
    L2_cache_size = 50 * 2**20


class _Stream(torch.Stream):
    def __new__(cls, device: Any = None, priority: int = 0, **known: int) -> _Stream:
        if not known:
            found = torch.device("cuda" if device is None else device)
            index = lib.device() if found.index is None else found.index
            known = {"stream_id": lib.new_stream(), "device_index": index, "device_type": _CUDA}
        return super().__new__(cls, **known)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def wait_event(self, event: _Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: _Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: _Event | None = None) -> _Event:
        event = _Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        lib.synchronize_stream(self.device_index, self.stream_id)


class _Event:
    """Of which a query answers by chance whether it is over, as on a device that takes its time."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._event = lib.new_event()

    def __del__(self) -> None:
        lib.drop_event(self._event)

    def record(self, stream: Any = None) -> None:
        stream = torch.cuda.current_stream() if stream is None else stream
        lib.record(self._event, stream.device_index, stream.stream_id)

    def wait(self, stream: Any = None) -> None:
        stream = torch.cuda.current_stream() if stream is None else stream
        lib.wait(self._event, stream.device_index, stream.stream_id)

    def query(self) -> bool:
        over = random.random() < 0.5
        if over:
            self.synchronize()
        return over

    def synchronize(self) -> None:
        lib.synchronize_event(self._event)

    def elapsed_time(self, other: _Event) -> float:
        return 1.0


class _Runtime:
    """cudart."""

    class cudaError:  # noqa: N801
        success = 0

    def cudaHostRegister(self, at: int, size: int, flags: int) -> int:  # noqa: N802
        lib.lock_pages(at, size)
        return 0

    def cudaHostUnregister(self, at: int) -> int:  # noqa: N802
        lib.unlock_pages(at)
        return 0

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return str(code)


def _set_stream(stream_id: int, device_index: int, device_type: int) -> None:
    lib.set_device(device_index)
    lib.set_stream(device_index, stream_id)


def _memory_stats(device: int) -> dict[str, Any]:
    now, peak = lib.bytes(device), lib.peak(device)
    pool = {"all": {"current": now, "peak": peak, "allocated": now, "freed": 0}}
    return {f"{kind}_bytes": pool for kind in ("allocated", "reserved", "active", "requested")} | {"num_ooms": 0}


def _storage_on(device: Any, source: Any, non_blocking: bool = False) -> Any:
    made = torch.empty(source.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
    return made.copy_(source, non_blocking)


def _pretend() -> None:
    """Fill in what a build with CUDA has."""
    cuda, core, count = torch.cuda, torch._C, lib.devices()
    cuda._is_compiled, cuda._cudart, torch.version.cuda = (lambda: True), _Runtime(), "13.0"
    cuda.is_available, cuda.device_count, cuda._device_count_nvml = (lambda: True), (lambda: count), (lambda: count)
    core._cuda_getDeviceCount, core._cuda_init, cuda._is_in_bad_fork = (lambda: count), (lambda: None), (lambda: False)
    core._cuda_getDevice, core._cuda_setDevice = lib.device, lib.set_device
    core._cuda_exchangeDevice = cuda._exchange_device = lib.set_device
    core._cuda_maybeExchangeDevice = cuda._maybe_exchange_device = _plain(lib.set_device)
    core._cuda_getCurrentStream = lambda device: (lib.stream(device), device, _CUDA)
    core._cuda_getDefaultStream = lambda device: (0, device, _CUDA)
    core._cuda_getCurrentRawStream, core._cuda_setStream = lib.stream, _set_stream
    core._cuda_synchronize, core._cuda_emptyCache = lib.synchronize, lambda: None
    core._cuda_memoryStats, core._cuda_resetPeakMemoryStats = _memory_stats, lib.reset_peak
    core._cuda_getAllocatorBackend, core._cuda_getArchFlags = (lambda: "native"), (lambda: "sm_90")
    cuda._get_device_properties = cuda.get_device_properties = lambda device=None: _Properties()
    cuda.mem_get_info = lambda device=None: (130 * 2**30, 140 * 2**30)
    cuda.is_current_stream_capturing = cuda.graphs.is_current_stream_capturing = lambda: False
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.default_generators = tuple(torch.Generator(f"cuda:{i}") for i in range(count))
    for module in (cuda, cuda.streams):
        module.Stream, module.Event = _Stream, _Event

    def to_cuda(self: Any, device: Any = None, non_blocking: bool = False, **options: Any) -> Any:
        return self.to("cuda" if device is None else device, non_blocking=non_blocking, **options)

    torch.Tensor.cuda = to_cuda
    _pretend_storages()


def _pretend_storages() -> None:
    """PyTorch's CPU build makes none on a device by itself."""
    base, to_elsewhere = torch.storage._StorageBase, torch._utils._to
    clone_elsewhere = base.clone

    def clone(self: Any) -> Any:
        return _storage_on(self.device, self) if self.device.type == "cuda" else clone_elsewhere(self)

    def to(self: Any, device: Any, non_blocking: bool = False) -> Any:
        if torch.device(device).type != "cuda":
            return to_elsewhere(self, device, non_blocking)
        return _storage_on(device, self, non_blocking)

    base.clone = clone
    torch._utils._to = torch.storage._to = to


_pretend()
