"""What nvcc makes of the CUDA C++ kernels, and whether enough bytes are in flight to keep an H100's memory busy.

    python bench/cuda_static.py        # builds for the default architectures; needs no GPU

By Little's law a multiprocessor needs bandwidth times latency in flight: 3.35 TB/s over 132 of them for an assumed
0.8 us under load. What it has: blocks that fit (65,536 registers, 2,048 threads, 227 KiB of shared memory) times their
threads times what a thread asks for before it waits. And it issues four instructions a clock, each for 32 threads:
`issue` is what that takes, over the time in which the bytes move; branches not taken are counted with the rest.
Writes bench/results/cuda_static.json, with the time of the build.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common, extension, sass

BANDWIDTH, LATENCY, PROCESSORS, CLOCK = 3.35e12, 0.8e-6, 132, 1.755e9
ISSUED = PROCESSORS * 4 * 32 * CLOCK  # instructions of a thread, a second, on an H100
NEEDED = BANDWIDTH * LATENCY / PROCESSORS
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 227 << 10


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as it is launched for bf16: part of its mangled name, threads, bytes a thread asks for, shared bytes.

    `moves`: bytes that a thread reads and writes, in all or in a turn of its longest loop; 0 where it is neither.
    """

    what: str
    source: str
    name: str
    threads: int
    asks: int
    moves: int = 0
    loops: bool = False
    shared: int = 0
    resident: int = THREADS  # the launcher starts no more threads on a multiprocessor


def _norms() -> list[Launch]:
    found = []
    dtype, same = "kernelI13__nv_bfloat16", "LNS0_6WeightE1E"
    for norm, centered in (("RMSNorm", "Lb0E"), ("LayerNorm", "Lb1E")):
        for width, block, threads in ((1024, "Lb0E", 128), (4096, "Lb1E", 128), (16384, "Lb1E", 512)):
            name = f"norm_fwd_{dtype}{same}{centered}{block}E"
            found.append(Launch(f"{norm} forward, {width:,}", "norm", name, threads, 64, 128))
            name, shared = f"norm_bwd_{dtype}{same}{centered}{block}E", threads * 256
            found.append(Launch(f"{norm} backward, {width:,}", "norm", name, threads, 128, 192, True, shared, 512))
    return sorted(found, key=lambda launch: launch.what.split(",")[0], reverse=True)


LAUNCHES = [
    *_norms(),
    Launch("SwiGLU forward", "activation", "glu_fwd_kernelI13__nv_bfloat16Li8ELNS_10ActivationE0E", 256, 64, 96),
    Launch("SwiGLU backward", "activation", "glu_bwd_kernelI13__nv_bfloat16Li8ELNS_10ActivationE0E", 256, 96, 192),
    Launch("RoPE, halves", "rope", "rope_kernelI13__nv_bfloat16Li8ELb0E", 256, 128, 256),
    Launch("dropout and residual", "dropout", "dropout_kernelI13__nv_bfloat16S2_Lb1E", 256, 64, 96),
    Launch("delta", "attention", "attention_delta_kernelI13__nv_bfloat16Li8E", 256, 64, 64),
    Launch("merge into float32", "attention", "attention_merge_kernelI13__nv_bfloat16fLi8E", 256, 96, 160),
    Launch("cross entropy, long rows", "cross_entropy", "cross_entropy_kernelI13__nv_bfloat16Li8ELb0E", 1024, 32),
]


def on_a_multiprocessor(launch: Launch, registers: int) -> int:
    """How many of its blocks run at once."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * launch.threads)
    by_shared = SHARED // (launch.shared + 1024)  # one KiB is the system's
    return min(by_registers, THREADS // launch.threads, by_shared, BLOCKS, launch.resident // launch.threads)


def issue(launch: Launch, instructions: dict[str, tuple[int, int]], name: str) -> float | None:
    """The time it takes to issue a thread's instructions over that in which its bytes move; None if unknown."""
    if not launch.moves or name not in instructions:
        return None
    return (instructions[name][launch.loops] / ISSUED) / (launch.moves / BANDWIDTH)


def counted(folder: Path) -> dict[str, tuple[int, int]]:
    """The instructions of every kernel, by its mangled name; empty without a disassembler."""
    program = sass.disassembler()
    if program is None:
        return {}
    sources = {launch.source for launch in LAUNCHES}
    return {n: k for s in sources for n, k in sass.instructions(program, folder / f"{s}.o", "sm_90").items()}


def rows(kernels: dict[str, list[dict[str, Any]]], instructions: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """For every launch: registers, blocks on a multiprocessor, bytes in flight, these over what is needed, `issue`."""
    found = []
    for launch in LAUNCHES:
        names = [k for k in kernels[launch.source] if k["arch"] == "sm_90" and launch.name in k["name"]]
        if len(names) != 1:
            raise ValueError(f"{launch.name} is in the names of {len(names)} kernels of {launch.source}.cu, not of one")
        blocks = on_a_multiprocessor(launch, names[0]["registers"])
        in_flight = blocks * launch.threads * launch.asks
        found.append(
            {
                "what": launch.what,
                "registers": names[0]["registers"],
                "threads": launch.threads,
                "blocks": blocks,
                "bytes_in_flight": in_flight,
                "over_needed": in_flight / NEEDED,
                "issue": issue(launch, instructions, names[0]["name"]),
            }
        )
    return found


def main() -> int:
    builder = extension.builder()
    with tempfile.TemporaryDirectory() as folder:
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        library = builder.build(Path(folder), Path(folder), werror=True)
        seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        size = library.stat().st_size
        code = counted(Path(folder))
        logs = {path.stem: builder.kernels(path.read_text()) for path in Path(folder).glob("*.log")}
    every = [k for found in logs.values() for k in found]
    figures = {
        **common.stamp(),
        "build": {
            "architectures": " ".join(map(str, builder.architectures())),
            "seconds": seconds,
            "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "cores": len(os.sched_getaffinity(0)),
            "bytes": size,
            "kernels": len(every),
            "spilled": sum(k["spilled"] for k in every),
            "most_registers": max(k["registers"] for k in every),
        },
        "needed_bytes": NEEDED,
        "rows": rows(logs, code),
    }
    for row in figures["rows"]:
        print(
            f"{row['what']:28} {row['registers']:4d} registers, {row['blocks']} blocks, {row['over_needed']:.1f} x, "
            f"issuing {'?' if row['issue'] is None else format(row['issue'], '.0%')}"
        )
    for k in every:
        if k["spilled"] or k["stack"]:
            print(f"{k['arch']} SPILLS: {k}")
    print(f"written to {common.write('cuda_static', figures).relative_to(common.ROOT)}")
    return int(figures["build"]["spilled"] > 0)


if __name__ == "__main__":
    sys.exit(main())
