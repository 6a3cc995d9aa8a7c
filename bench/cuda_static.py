"""What nvcc makes of the CUDA C++ kernels, and whether enough bytes are in flight to keep an H100's memory busy.

    python bench/cuda_static.py        # builds for the default architectures; needs no GPU

By Little's law a multiprocessor needs bandwidth times latency in flight: 3.35 TB/s over 132 of them for an assumed
0.8 us under load. What it has: blocks that fit (65,536 registers, 2,048 threads, 227 KiB of shared memory) times their
threads times what a thread asks for before it waits. Writes bench/results/cuda_static.json, with the time of the build.
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

from bench import common, extension

BANDWIDTH, LATENCY, PROCESSORS = 3.35e12, 0.8e-6, 132
NEEDED = BANDWIDTH * LATENCY / PROCESSORS
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 227 << 10


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as it is launched for bf16: part of its mangled name, threads, bytes a thread asks for, shared bytes."""

    what: str
    source: str
    name: str
    threads: int
    asks: int
    shared: int = 0
    resident: int = THREADS  # the launcher starts no more threads on a multiprocessor


def _norms() -> list[Launch]:
    found = []
    for norm, centered in (("RMSNorm", "Lb0E"), ("LayerNorm", "Lb1E")):
        for width, block, threads in ((1024, "Lb0E", 128), (4096, "Lb1E", 128), (16384, "Lb1E", 512)):
            name = f"kernelI13__nv_bfloat16{centered}{block}E"
            found.append(Launch(f"{norm} forward, {width:,}", "norm", f"norm_fwd_{name}", threads, 64))
            shared = threads * 256
            found.append(Launch(f"{norm} backward, {width:,}", "norm", f"norm_bwd_{name}", threads, 128, shared, 512))
    return sorted(found, key=lambda launch: launch.what.split(",")[0], reverse=True)


LAUNCHES = [
    *_norms(),
    Launch("SwiGLU forward", "activation", "glu_fwd_kernelI13__nv_bfloat16Li8ELNS_10ActivationE0E", 256, 64),
    Launch("SwiGLU backward", "activation", "glu_bwd_kernelI13__nv_bfloat16Li8ELNS_10ActivationE0E", 256, 96),
    Launch("RoPE, halves", "rope", "rope_kernelI13__nv_bfloat16Li8ELb0E", 256, 128),
    Launch("dropout and residual", "dropout", "dropout_kernelI13__nv_bfloat16S2_Lb1E", 256, 64),
    Launch("delta", "attention", "attention_delta_kernelI13__nv_bfloat16Li8E", 256, 64),
    Launch("merge into float32", "attention", "attention_merge_kernelI13__nv_bfloat16fLi8E", 256, 96),
    Launch("cross entropy, long rows", "cross_entropy", "cross_entropy_kernelI13__nv_bfloat16Li8ELb0E", 1024, 32),
]


def on_a_multiprocessor(launch: Launch, registers: int) -> int:
    """How many of its blocks run at once."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * launch.threads)
    by_shared = SHARED // (launch.shared + 1024)  # one KiB is the system's
    return min(by_registers, THREADS // launch.threads, by_shared, BLOCKS, launch.resident // launch.threads)


def rows(kernels: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """For every launch: registers, blocks on a multiprocessor, bytes in flight and that over what is needed."""
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
        "rows": rows(logs),
    }
    for row in figures["rows"]:
        print(f"{row['what']:28} {row['registers']:4d} registers, {row['blocks']} blocks, {row['over_needed']:.1f} x")
    for k in every:
        if k["spilled"] or k["stack"]:
            print(f"{k['arch']} SPILLS: {k}")
    print(f"written to {common.write('cuda_static', figures).relative_to(common.ROOT)}")
    return int(figures["build"]["spilled"] > 0)


if __name__ == "__main__":
    sys.exit(main())
