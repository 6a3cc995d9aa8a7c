"""The library of CPU kernels that csrc/cpu is compiled to, where an install found a C++ compiler.

It has no view of PyTorch: it is called through ctypes with addresses and strides, and runs on PyTorch's own threads, by
the address of its `torch_parallel_for`. It holds a version for each instruction set and takes the best that the machine
has; ``PYCKPT_CPU_ISA`` names another (avx512, avx2, neon).
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch

FILE = "_cpu.abi3.so"
FOLDER = Path(__file__).resolve().parent.parent
_MOST_SETS = 8


class CpuLibrary:
    """The library at a path. `problem` says why it cannot be used, and is empty where it can."""

    def __init__(self, path: Path) -> None:
        self.path, self.problem = path, ""
        self.instruction_sets: tuple[str, ...] = ()
        if not path.is_file():
            self.problem = "not built"
            return
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            self.problem = f"it does not load: {error}"
            return
        self.instruction_sets = self._names()
        self.problem = "" if self.instruction_sets else "this processor has none of its instruction sets"

    def argument_size(self) -> int:
        """Bytes of the argument that the kernels were compiled for."""
        size = self._library.pyckpt_argument_size
        size.restype = ctypes.c_int64
        return int(size())

    def run(self, name: str, argument: ctypes.Structure) -> None:
        """Call a kernel's entry point, without the GIL, on as many threads as PyTorch takes."""
        function = getattr(self._library, name)
        status = function(ctypes.byref(argument), self._chosen(), _parallel_for())
        if status == 1:
            raise MemoryError(f"{name}: no memory for a thread's working space; use fewer threads, or a shorter input")
        if status == 3:
            raise ValueError(
                f"{name}: expected at least one head and one head dim, heads that are a multiple of the key/value "
                "heads, and lengths of 0 or more"
            )
        if status != 0:
            raise RuntimeError(f"{name}: PyTorch's threads failed")

    def chosen(self) -> str:
        """The instruction set in use. Raises ValueError where PYCKPT_CPU_ISA names one that is not here."""
        return self.instruction_sets[self._chosen().value]

    def _chosen(self) -> ctypes.c_int64:
        wanted = os.environ.get("PYCKPT_CPU_ISA", "").strip().lower()
        if wanted and wanted not in self.instruction_sets:
            raise ValueError(f"PYCKPT_CPU_ISA={wanted!r}: expected one of {', '.join(self.instruction_sets)}, or unset")
        return ctypes.c_int64(self.instruction_sets.index(wanted) if wanted else 0)

    def _names(self) -> tuple[str, ...]:
        name = self._library.pyckpt_instruction_set
        name.restype = ctypes.c_char_p
        found = (name(ctypes.c_int64(i)) for i in range(_MOST_SETS))
        return tuple(n.decode() for n in found if n is not None)


@functools.cache
def _parallel_for() -> Any:
    """The address of PyTorch's `torch_parallel_for`; None runs everything on one thread."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).is_file():
            function = getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
            return None if function is None else ctypes.cast(function, ctypes.c_void_p)
    return None


library = CpuLibrary(FOLDER / FILE)
