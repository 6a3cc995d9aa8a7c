"""The streamed executor on a CPU: is memory flat over the length, and what does a step take against the resident one?

    python bench/stream.py             # about 20 minutes on 2 cores
    python bench/stream.py --part flat # or one part: flat, time
    python bench/stream.py --part time --layers 1 --repeats 1    # less of it; the results say how much

"flat": a small causal language model, forward and backward with the store in a file, each length in a process of its
own. Live bytes are those of pyckpt.measure.memory, above weights, gradients and token ids. Resident memory is the
process's own high-water mark (ru_maxrss), in which the file's pages count while they are in the process's page table:
16 MiB of them at most here. "time": the stack that the aim names, both executors in turn in one process, medians, by
the clock and by CPU time, which other processes on the machine disturb less.
Writes bench/results/stream_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time as clock
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyckpt
from bench import common

NAME = "stream_cpu"
LENGTHS = (8192, 16384, 32768, 65536)
FLAT: dict[str, Any] = {"vocab_size": 256, "n_layers": 1, "d_model": 64, "n_heads": 1, "d_ff": 192}
TILE = 1024
TIME: dict[str, Any] = {"d_model": 512, "n_heads": 8, "n_layers": 4, "length": 16384, "repeats": 3}
AIMS = {"flat": 0.01, "rss": 0.05, "time": 1.05}


def flat_row(length: int) -> dict[str, int]:
    """Bytes of one step at a length, in this process."""
    model = pyckpt.CkptCausalLM(**FLAT)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    stream = pyckpt.Stream(TILE, "file")
    # Libraries set up their threads and scratch memory at the first step.
    model.loss(torch.randint(0, 256, (1, 2 * TILE)), stream=stream).backward()
    tokens = torch.randint(0, 256, (1, length))
    model.loss(tokens, stream=stream).backward()
    rss = _rss()  # before live bytes are counted, which takes memory itself
    with pyckpt.measure.memory(model) as m:
        model.loss(tokens, stream=stream).backward()
    return {"length": length, "live_bytes": m.peak_bytes, "rss_bytes": rss}


def _rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flat() -> dict[str, Any]:
    rows = []
    for length in LENGTHS:
        command = [sys.executable, __file__, "--length", str(length)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=common.ROOT)
        rows.append(json.loads(done.stdout))
        print(f"S = {length:6d}: live {rows[-1]['live_bytes']:,} bytes, RSS {rows[-1]['rss_bytes']:,} bytes")
    spread = {
        name: max(r[f"{name}_bytes"] for r in rows) / min(r[f"{name}_bytes"] for r in rows) - 1
        for name in ("live", "rss")
    }
    print(f"spread: live {spread['live']:.2%} (aim 1%), RSS {spread['rss']:.2%} (aim 5%)")
    return {"config": {**FLAT, "tile": TILE}, "rows": rows, "spread": spread}


def time(**changes: int) -> dict[str, Any]:
    config = {**TIME, **changes}
    length = config["length"]
    blocks = [pyckpt.CkptTransformerBlock(config["d_model"], config["n_heads"]) for _ in range(config["n_layers"])]
    stack = pyckpt.CkptTransformer(blocks)
    x = torch.randn(1, length, config["d_model"], requires_grad=True)
    dy = torch.randn_like(x)
    streams = {"resident": None, **{f"streamed, {s}": pyckpt.Stream(TILE, s) for s in ("host", "file")}}
    # A memory-flat step starts from nothing kept; a short one warms up what is the same for all lengths.
    for stream in streams.values():
        stack(x[:, : 2 * TILE], stream=stream).backward(dy[:, : 2 * TILE])
    steps = {name: lambda stream=stream: stack(x, stream=stream).backward(dy) for name, stream in streams.items()}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(config["repeats"]):
        for name, step in steps.items():
            start = clock.perf_counter(), clock.process_time()
            step()
            runs[name].append((clock.perf_counter() - start[0], clock.process_time() - start[1]))
    rows = []
    for name, both in runs.items():
        row: dict[str, Any] = {"executor": name}
        for i, kind in enumerate(("seconds", "cpu_seconds")):
            every = [run[i] for run in both]
            row |= {kind: statistics.median(every), f"all_{kind}": every}
            row[f"{kind}_over_resident"] = row[kind] / (rows[0][kind] if rows else row[kind])
        rows.append(row)
        ratios = f"{row['seconds_over_resident']:.3f} of resident, by CPU time {row['cpu_seconds_over_resident']:.3f}"
        print(f"{name:16s} {row['seconds']:7.1f} s  {ratios} (aim 1.05)")
    return {"config": {**config, "tile": TILE, "dtype": "float32"}, "rows": rows}


def main(parts: list[str], **changes: int) -> None:
    path = common.RESULTS / f"{NAME}.json"
    for part in parts:
        made = {**common.stamp(), **(flat() if part == "flat" else time(**changes))}
        before = common.read(NAME) if path.exists() else {}
        common.write(NAME, {**before, "aims": AIMS, part: made})
    print(f"\nwritten to {path.relative_to(common.ROOT)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["flat", "time"], help="only this one")
    parser.add_argument("--layers", type=int, default=TIME["n_layers"])
    parser.add_argument("--repeats", type=int, default=TIME["repeats"])
    parser.add_argument("--tokens", type=int, default=TIME["length"], help="of the part time")
    parser.add_argument("--length", type=int, help="measure memory at this length only, and print it")
    given = parser.parse_args()
    if given.length:
        print(json.dumps(flat_row(given.length)))
    else:
        main(
            [given.part] if given.part else ["flat", "time"],
            n_layers=given.layers,
            repeats=given.repeats,
            length=given.tokens,
        )
