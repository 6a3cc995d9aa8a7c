"""Compile one kernel for a GPU that is not here, and read what the compiler made of it. Needs no GPU and no driver."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import os
import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Short names of the dtypes, as a kernel's signature has them.
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# Bytes of shared memory that one program may have, and those of a multiprocessor (CUDA C++ Programming Guide, table of
# compute capabilities); a program is charged 1 KiB more than it asks for.
SHARED = {
    "sm_80": (163 << 10, 164 << 10),
    "sm_90": (227 << 10, 228 << 10),
    "sm_100": (227 << 10, 228 << 10),
    "gfx942": (64 << 10, 64 << 10),
}
MATRIX_UNITS = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
_REGISTERS = 65536
_THREADS = 2048
Arguments = tuple[dict[str, str], dict[str, Any], dict[Any, Any]]


class Case(abc.ABC):
    """One kernel to compile. Subclasses are frozen dataclasses with a field `arch`; they travel between processes."""

    arch: str
    allowed_spill = 0  # bytes a thread
    fp_fusion = True  # whether the compiler may turn a product and a sum into a fused multiply-add
    matrix_unit = False  # whether its products must run on the chip's matrix unit
    gluon = False  # its kernel is a `gluon.jit` function

    @property
    @abc.abstractmethod
    def kernel(self) -> Any:
        """The `triton.jit` function."""

    @property
    @abc.abstractmethod
    def num_warps(self) -> int: ...

    @property
    def all_warps(self) -> int:
        """Of a program, with those that a specialised kernel has beside its own."""
        return self.num_warps

    @property
    def num_stages(self) -> int:
        return 1

    @property
    def overlapping(self) -> int:
        """Exponentials of a thread that a loop of a Gluon kernel is to compute while a product is on its way."""
        return 0

    @property
    def resident(self) -> int:
        """Programs that must fit on one multiprocessor, since so many are started; 0 where it does not count."""
        return 0

    @abc.abstractmethod
    def arguments(self) -> Arguments:
        """Types by name, constants by name, and attributes by position: see `signature`."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The kernel's short name, at most 12 characters."""

    @property
    @abc.abstractmethod
    def what(self) -> str:
        """Dims, dtype and features, for the table: at most 33 characters."""

    @property
    def tile(self) -> str:
        """What the configuration decides, for the table: at most 13 characters."""
        return f"{self.num_warps}w {self.num_stages}s"

    def record(self) -> dict[str, Any]:
        """What stands for it in a JSON of reports."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def __str__(self) -> str:
        return f"{self.arch:7}{self.name:12} {self.what:33}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of a case. Bytes are a thread's, but for shared, which is a program's."""

    case: Case
    registers: int
    spilled: int
    stack: int
    shared: int
    unit: str
    seconds: float
    narrow: int = 0  # loads and stores of 2 bytes a thread: each takes the place of one of 16
    serialized: bool = False  # the assembler lets each product wait for the one before
    looped: int = 0  # of a Gluon kernel's spills, loads and stores inside the innermost loops with products
    overlapped: int = 0  # exponentials that each of these loops has between the two products' ends

    @property
    def programs(self) -> int:
        """Programs that fit on one multiprocessor (0 where unknown)."""
        if not self.case.arch.startswith("sm_") or not self.registers:
            return 0
        threads = 32 * self.case.all_warps
        by_registers = _REGISTERS // (-(-self.registers // 8) * 8 * threads)
        return min(by_registers, SHARED[self.case.arch][1] // (self.shared + 1024), _THREADS // threads)

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's threads that are in use."""
        return self.programs * 32 * self.case.all_warps / _THREADS

    def problems(self) -> Iterator[str]:
        """What the house does not allow."""
        case = self.case
        if self.shared > SHARED[case.arch][0]:
            yield f"{self.shared} bytes of shared memory; {case.arch} has {SHARED[case.arch][0]}"
        if not case.arch.startswith("sm_"):
            return
        if self.spilled > case.allowed_spill:
            yield f"{self.spilled} bytes spilled, {case.allowed_spill} allowed"
        if self.looped:
            yield f"{self.looped} loads and stores of spilled registers in the loops"
        if self.serialized:
            yield "the assembler puts products in a row that were to overlap"
        if self.overlapped < case.overlapping:
            yield f"{self.overlapped} exponentials of {case.overlapping} are computed while a product is on its way"
        if self.programs < case.resident:
            yield f"{self.programs} programs fit on a multiprocessor; {case.resident} are started"
        wanted = MATRIX_UNITS[case.arch]
        if case.matrix_unit and self.unit != wanted:
            yield f"runs on {self.unit or 'no matrix unit'}, not on {wanted}"

    def line(self) -> str:
        return (
            f"{self.case} {self.case.tile:14}{self.registers:4d}{self.spilled:8d}{self.stack:7d}{self.shared:8d} "
            f"{self.unit:8}{self.programs:2d}{self.occupancy:6.0%}"
        )


HEADER = (
    f"{'arch':7}{'kernel':12} {'dim, type, mask and features':33} {'tile':14}{'regs':>4}{'spilled':>8}"
    f"{'stack':>7}{'shared':>8} {'unit':7}{'programs an SM':>8}"
)


def signature(names: list[str], types: dict[str, str], constants: dict[str, Any], divisible: set[str]) -> Arguments:
    """A case's `arguments`, from the kernel's argument names.

    Constants that the kernel lacks are left out. Pointers, and what is named in `divisible`, are multiples of 16.
    """
    constants = {name: value for name, value in constants.items() if name in names}
    kinds = {name: "constexpr" if name in constants else types[name] for name in names}
    attrs: dict[Any, Any] = {}
    for i, name in enumerate(names):
        if kinds[name].startswith("*") or (name in divisible and name not in constants):
            attrs[(i,)] = [["tt.divisibility", 16]]
    return kinds, constants, attrs


def compile_case(case: Case) -> Report:
    """Compile one kernel for its architecture."""
    kinds, constants, attrs = case.arguments()
    source = _source_class(case)(case.kernel, kinds, constexprs=constants, attrs=attrs)
    options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    options["enable_fp_fusion"] = case.fp_fusion
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton warns that the default of enable_fp_fusion will change: we give it
        kernel = triton.compile(source, target=_target(case.arch), options=options)
    seconds = time.perf_counter() - start
    shared = kernel.metadata.shared
    if not case.arch.startswith("sm_"):
        text = kernel.asm["amdgcn"]
        registers, spilled = (_number(rf"\.{name}_count:\s+(\d+)", text) for name in ("vgpr", "vgpr_spill"))
        return Report(case, registers, 4 * spilled, 0, shared, "mfma" if "v_mfma" in text else "", seconds)
    ptx = kernel.asm["ptx"]
    said, code = _assemble(ptx, int(case.arch[3:]), case.gluon)
    unit = next((name for name in ("tcgen05", "wgmma") if name in ptx), "mma" if "mma.sync" in ptx else "")
    return Report(
        case,
        _number(r"Used (\d+) registers", said),
        _number(r"(\d+) bytes spill stores", said),
        _number(r"(\d+) bytes stack frame", said),
        shared,
        unit,
        seconds,
        len(re.findall(r"\b(?:ld|st)\.global\.[\w.]*b16\b", ptx)),
        "wgmma.mma_async instructions are serialized" in said,
        spills_in_loops(code),
        exponentials_in_flight(code),
    )


def spills_in_loops(code: str) -> int:
    """Loads and stores of spilled registers in the innermost loops of a disassembled kernel that multiply matrices."""
    return sum(bool(re.search(r"\b(LDL|STL)\b", line)) for loop in _loops_of_products(code) for line in loop)


def exponentials_in_flight(code: str) -> int:
    """Of a disassembled kernel's innermost loops with products, the fewest exponentials that one of them has between
    the wait for all products but one and the wait for all. The assembler takes that wait, which names no registers, for
    something that goes before them, unless a branch stands between."""
    fewest = []
    for loop in _loops_of_products(code):
        waits = [(i, m[1]) for i, line in enumerate(loop) if (m := re.search(r"DEPBAR\.LE gsb0, 0x(\w+)", line))]
        pairs = [(a, b) for (a, left), (b, none) in itertools.pairwise(waits) if (left, none) == ("1", "0")]
        fewest.append(max((sum("MUFU.EX2" in line for line in loop[a:b]) for a, b in pairs), default=0))
    return min(fewest, default=0)


def _loops_of_products(code: str) -> list[list[str]]:
    """The lines of each innermost loop of a disassembled kernel that multiplies matrices."""
    lines = [line.strip() for line in code.splitlines()]
    # What follows the end are waits that failed at first, which jump back into the loops.
    end = max((i for i, line in enumerate(lines) if re.search(r"\*/ +EXIT\b", line)), default=0)
    labels = {line[:-1]: i for i, line in enumerate(lines[:end]) if re.fullmatch(r"\.L\w+:", line)}
    jumps = ((i, re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)) for i, line in enumerate(lines[:end]))
    spans = [(labels[found[1]], i) for i, found in jumps if found and labels.get(found[1], end) < i]
    loops = [(a, b) for a, b in spans if any("GMMA" in line for line in lines[a:b])]
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return [lines[a:b] for a, b in inner]


def run(wanted: list[Case], workers: int | None = None) -> Iterator[Report]:
    """Reports in the order of the cases, compiled in several processes.

    Forked ones: each would else import PyTorch again, which takes longer than compiling ten small kernels.
    """
    workers = min(workers or os.cpu_count() or 1, len(wanted))
    if workers <= 1:
        yield from map(compile_case, wanted)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        yield from pool.map(compile_case, wanted, chunksize=4)


def _source_class(case: Case) -> type[ASTSource]:
    if not case.gluon:
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def _assemble(ptx: str, capability: int, show: bool) -> tuple[str, str]:
    """What the assembler says of registers and spills, and if `show` the code that it made."""
    with tempfile.TemporaryDirectory() as folder:
        path, made = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        path.write_text(ptx)
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        tool = Path(get_ptxas(capability).path)
        done = subprocess.run(
            [tool, "-v", f"--gpu-name={name}", path, "-o", made], capture_output=True, text=True, check=True
        )
        if not show:
            return done.stderr, ""
        code = subprocess.run([tool.with_name("nvdisasm"), "-c", made], capture_output=True, text=True)
        return done.stderr, code.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0
