"""Compile the attention kernels for GPUs that are not here, and report what the compiler made of them.

    python -m pyckpt.triton_kernels.aot                      # every kernel, dtype and tuned configuration
    python -m pyckpt.triton_kernels.aot --arch sm_90 --quick # the ones that matter most, for one architecture

Prints a line a kernel: registers, spilled bytes and stack a thread, shared memory, the matrix unit in use, and the
programs that fit on one multiprocessor. Exits with 1 where `problems` finds any. Needs no GPU and
no driver.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from . import attention_bwd, attention_fwd, tuning
from .tuning import Config, Key

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
KERNELS = {
    "fwd": attention_fwd.attention_fwd_kernel_tile,
    "dkdv": attention_bwd.attention_bwd_kernel_dkdv,
    "dq": attention_bwd.attention_bwd_kernel_dq,
    "delta": attention_bwd.attention_bwd_kernel_delta,
}
DIMS = ((16, 16), (32, 32), (64, 64), (128, 128), (192, 128), (256, 256))
QUICK_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
MASKS = ("full", "causal", "window")
FEATURES = ("packed", "softcap", "alibi", "dropout", "sinks", "accumulate", "ragged")
_FEATURE_DIMS = (128, 128)

# Bytes of shared memory that one program may have, and those of a multiprocessor (CUDA C++ Programming Guide, table of
# compute capabilities); a program is charged 1 KiB more than it asks for.
SHARED = {
    "sm_80": (163 << 10, 164 << 10),
    "sm_90": (227 << 10, 228 << 10),
    "sm_100": (227 << 10, 228 << 10),
    "gfx942": (64 << 10, 64 << 10),
}
_REGISTERS = 65536
_THREADS = 2048
_FLOATS = ("scale", "softcap", "keep_factor")
_FLOAT32 = ("p_lse", "p_delta", "p_dlse", "p_sinks", "p_slopes")


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel to compile. Dims are those of the user, not the padded ones."""

    arch: str
    op: str
    head_dim: int
    value_dim: int
    dtype: str
    mask: str
    features: tuple[str, ...] = ()
    tried: Config | None = None  # instead of the table's

    @property
    def key(self) -> Key:
        padded = [max(16, triton.next_power_of_2(n)) for n in (self.head_dim, self.value_dim)]
        kind = "float32" if self.dtype == "float32" else "half"
        padding = padded != [self.head_dim, self.value_dim]
        extra = padding or not {"softcap", "alibi", "dropout", "accumulate", "ragged"}.isdisjoint(self.features)
        return Key(self.arch, self.op, *padded, kind, self.mask, "extra" if extra else "plain")

    @property
    def config(self) -> Config:
        if self.op == "delta":
            return Config(tuning.delta_rows(self.key.value_dim), 0)
        return self.tried or tuning.lookup(self.key)

    def __str__(self) -> str:
        dims = str(self.head_dim) if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        return f"{self.arch:7}{self.op:6}{dims:>8} {DTYPES[self.dtype]:5}{'+'.join((self.mask, *self.features)):18}"


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

    @property
    def programs(self) -> int:
        """Programs that fit on one multiprocessor (0 where unknown)."""
        if not self.case.arch.startswith("sm_") or not self.registers:
            return 0
        threads = 32 * self.case.config.num_warps
        by_registers = _REGISTERS // (-(-self.registers // 8) * 8 * threads)
        return min(by_registers, SHARED[self.case.arch][1] // (self.shared + 1024), _THREADS // threads)

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's threads that are in use."""
        return self.programs * 32 * self.case.config.num_warps / _THREADS

    def problems(self) -> Iterator[str]:
        """What the house does not allow."""
        case = self.case
        if self.shared > SHARED[case.arch][0]:
            yield f"{self.shared} bytes of shared memory; {case.arch} has {SHARED[case.arch][0]}"
        if not case.arch.startswith("sm_"):
            return
        allowed = 0 if max(case.head_dim, case.value_dim) <= 128 else 64
        if self.spilled > allowed:
            yield f"{self.spilled} bytes spilled, {allowed} allowed"
        wanted = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[case.arch]
        if case.op != "delta" and case.dtype != "float32" and self.unit != wanted:
            yield f"runs on {self.unit or 'no matrix unit'}, not on {wanted}"

    def line(self) -> str:
        c = self.case.config
        tile = "" if self.case.op == "delta" else f"{c.block_m}x{c.block_n} {c.num_warps}w {c.num_stages}s"
        return (
            f"{self.case} {tile:14}{self.registers:4d}{self.spilled:8d}{self.stack:7d}{self.shared:8d} {self.unit:8}"
            f"{self.programs:2d}{self.occupancy:6.0%}"
        )


HEADER = (
    f"{'arch':7}{'kernel':6}{'dim':>8} {'type':5}{'mask and features':18} {'tile':14}{'regs':>4}{'spilled':>8}"
    f"{'stack':>7}{'shared':>8} {'unit':7}{'programs an SM':>8}"
)


def cases(archs: Iterable[str] = ARCHS, quick: bool = False) -> Iterator[Case]:
    """Every kernel, dim, dtype and mask; then every feature, at one dim. Quick: the usual dims, bf16, causal."""
    dims, dtypes, masks = (QUICK_DIMS, ("bfloat16",), ("causal",)) if quick else (DIMS, tuple(DTYPES), MASKS)
    for arch in archs:
        for dim, dtype in itertools.product(dims, dtypes):
            for op, mask in itertools.product(("fwd", "dkdv", "dq"), masks):
                case = Case(arch, op, *dim, dtype, mask)
                parts = ("dk", "dv") if case.config.split else ()
                yield from (dataclasses.replace(case, features=(part,)) for part in parts) if parts else (case,)
                if case.config.tma:  # what tensors get that the copy engine cannot read
                    yield dataclasses.replace(case, features=("pointers",))
            yield Case(arch, "delta", *dim, dtype, "full")
        if quick:
            continue
        for op, feature in itertools.product(("fwd", "dkdv", "dq"), FEATURES):
            if feature != "sinks" or op == "fwd":
                yield Case(arch, op, *_FEATURE_DIMS, "bfloat16", "causal", (feature,))


def compile_case(case: Case) -> Report:
    """Compile one kernel for its architecture."""
    fn = KERNELS[case.op]
    signature, constants, attrs = _arguments(fn.arg_names, case)
    source = ASTSource(fn, signature, constexprs=constants, attrs=attrs)
    options: dict[str, Any] = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton warns that the default of enable_fp_fusion will change: we give it
        kernel = triton.compile(source, target=_target(case.arch), options={**options, "enable_fp_fusion": True})
    seconds = time.perf_counter() - start
    shared = kernel.metadata.shared
    if not case.arch.startswith("sm_"):
        text = kernel.asm["amdgcn"]
        registers, spilled = (_number(rf"\.{name}_count:\s+(\d+)", text) for name in ("vgpr", "vgpr_spill"))
        return Report(case, registers, 4 * spilled, 0, shared, "mfma" if "v_mfma" in text else "", seconds)
    ptx = kernel.asm["ptx"]
    said = _assemble(ptx, int(case.arch[3:]))
    unit = next((name for name in ("tcgen05", "wgmma") if name in ptx), "mma" if "mma.sync" in ptx else "")
    return Report(
        case,
        _number(r"Used (\d+) registers", said),
        _number(r"(\d+) bytes spill stores", said),
        _number(r"(\d+) bytes stack frame", said),
        shared,
        unit,
        seconds,
    )


def run(wanted: list[Case], workers: int | None = None) -> Iterator[Report]:
    """Reports in the order of the cases, compiled in several processes."""
    workers = min(workers or os.cpu_count() or 1, len(wanted))
    if workers <= 1:
        yield from map(compile_case, wanted)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_case, wanted, chunksize=4)


def _target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def _arguments(names: list[str], case: Case) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and divisibility hints, as a launch on contiguous tensors would have them."""
    constants = {name: value for name, value in _constants(case).items() if name in names}
    signature, attrs = {}, {}
    for i, name in enumerate(names):
        signature[name] = "constexpr" if name in constants else _type(name, case)
        if constants.get("TMA") and name in _STREAMED[case.op]:
            signature[name] = _descriptor(name, case)
        if signature[name].startswith("*") or name.startswith("stride") or name in ("head_dim", "value_dim"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attrs


# What the loop of each kernel goes through, a tile at a time.
_STREAMED = {"fwd": ("p_k", "p_v"), "dkdv": ("p_q", "p_do"), "dq": ("p_k", "p_v"), "delta": ()}


def _descriptor(name: str, case: Case) -> str:
    rows = case.config.block_m if case.op == "dkdv" else case.config.block_n
    columns = case.key.head_dim if name in ("p_q", "p_k") else case.key.value_dim
    return f"tensordesc<{DTYPES[case.dtype]}[1, {rows}, 1, {columns}]>"


def _type(name: str, case: Case) -> str:
    if name.startswith("p_cu"):
        return "*i32"
    if name in _FLOAT32 or (name in ("p_dk", "p_dv", "p_dq", "p_o") and "accumulate" in case.features):
        return "*fp32"
    if name.startswith("p_"):
        return f"*{DTYPES[case.dtype]}"
    return "fp32" if name in _FLOATS else "i64" if name == "seed" else "i32"


def _constants(case: Case) -> dict[str, Any]:
    has = {f: f in case.features for f in (*FEATURES, "pointers", "dk", "dv")}
    config, key = case.config, case.key
    tma = config.tma and not (has["packed"] or has["pointers"])
    constants: dict[str, Any] = {
        "PACKED": has["packed"],
        "LEFT": case.mask == "window",
        "RIGHT": case.mask != "full",
        "SOFTCAP": has["softcap"],
        "ALIBI": has["alibi"],
        "DROPOUT": has["dropout"],
        "SINKS": has["sinks"],
        "ACCUMULATE": has["accumulate"],
        "DLSE": False,
        "PERSISTENT": config.persistent > 0,
        "SPECIALIZE": config.specialize and tma,
        "DK": not (config.split and has["dv"]),
        "DV": not (config.split and has["dk"]),
        "PLAIN_SCALE": not (has["softcap"] or has["alibi"]),
        "PRECISION": config.exact if case.dtype == "float32" else "tf32",
        "TMA": tma,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": key.head_dim,
        "BLOCK_DV": key.value_dim,
        "RAGGED_D": has["ragged"] or key.head_dim != case.head_dim,
        "RAGGED_DV": has["ragged"] or key.value_dim != case.value_dim,
    }
    absent = {"p_sinks": "sinks", "p_slopes": "alibi", "p_cu_q": "packed", "p_cu_k": "packed"}
    constants |= {name: None for name, feature in absent.items() if not has[feature]}
    return constants | {"p_dlse": None}


def _assemble(ptx: str, capability: int) -> str:
    """What the assembler says of registers and spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={name}", str(path), "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only this one (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="only bf16, causal, head dims from 64 on")
    parser.add_argument("--json", type=Path, help="write the reports to this file too")
    options = parser.parse_args(argv)
    wanted = list(cases(options.arch or ARCHS, options.quick))
    print(f"Triton {triton.__version__}: {len(wanted)} kernels\n{HEADER}")
    reports, problems = [], 0
    for report in run(wanted):
        reports.append(report)
        print(report.line(), flush=True)
        for problem in report.problems():
            problems += 1
            print(f"  !! {problem}", flush=True)
    if options.json:
        _write(options.json, reports)
    print(f"{len(reports)} kernels compiled, {problems} problems")
    return 1 if problems else 0


def _write(path: Path, reports: list[Report]) -> None:
    rows = [
        {
            **dataclasses.asdict(r.case),
            "config": dataclasses.astuple(r.case.config),
            **{f: getattr(r, f) for f in ("registers", "spilled", "stack", "shared", "unit", "programs")},
        }
        for r in reports
    ]
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    os.replace(aside, path)


if __name__ == "__main__":
    sys.exit(main())
