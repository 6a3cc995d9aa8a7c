"""A step that processes share, by a ring and by an exchange of heads, beside one process: time, memory, bytes sent.

    python bench/context.py                       # two processes of one thread each, about 4 minutes on 2 cores
    python bench/context.py --tokens 1024 --layers 1 --repeats 1
    python bench/context.py --stream 1024         # all of them streamed, by tiles of 1024 tokens
    torchrun --nproc-per-node 8 bench/context.py --tokens 131072 --d-model 4096 --layers 2    # GPUs, by NCCL

A `CkptCausalLM` with random weights, batch 1, forward and backward of its loss, in fp32 on a CPU and bf16 on a GPU. All
variants have the same weights and take turns in the same processes; medians, of the slowest process. "alone" is the
first process by itself, with as many threads as each of the others has, while they wait. Peaks are a step's live bytes
of tensors above weights and gradients, of the first process. Writes bench/results/context_<device>.json, streamed
context_stream_<device>.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyckpt
from bench import common, processes
from pyckpt.measure.timing import Stats, interleaved
from pyckpt.measure.units import format_bytes, format_seconds

ALONE, METHODS = "alone", ("ring", "all-to-all")


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that attention sends to other processes meanwhile."""
    found = {"bytes": 0}
    batch, exchange = dist.batch_isend_irecv, dist.all_to_all_single

    def counting_batch(ops: list[Any]) -> Any:
        found["bytes"] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return batch(ops)

    def counting_exchange(into: Any, t: Any, **options: Any) -> Any:
        found["bytes"] += t.nbytes - t.nbytes // dist.get_world_size()
        return exchange(into, t, **options)

    dist.batch_isend_irecv, dist.all_to_all_single = counting_batch, counting_exchange  # type: ignore[assignment]
    try:
        yield found
    finally:
        dist.batch_isend_irecv, dist.all_to_all_single = batch, exchange


def sent_by_arithmetic(
    model: pyckpt.CkptCausalLM, method: str, tokens: int, world: int, dtype: torch.dtype, tile: int | None
) -> int:
    """Of a step, by the table of ARCHITECTURE.md ("Sequences that processes share"). Tiles divide a process's part."""
    s, size, share = model.spec, dtype.itemsize, (world - 1) / world
    if method == "ring":
        a_layer = 4 * size * s.d_kv * tokens * share + 8 * s.d_kv * tokens
        a_layer *= 1 if tile is None else (tokens // world / tile + 1) / 2
    else:
        a_layer = (2 + 4) * size * (s.d_q + s.d_kv) * tokens * share / world
    return round(a_layer * len(model.model.layers))


def measured(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    sizes = {"d_model": args.d_model, "n_heads": args.d_model // 64, "n_kv_heads": max(world, args.d_model // 256)}
    model = pyckpt.CkptCausalLM(256, args.layers, **sizes, device=device, dtype=dtype)
    tokens = torch.randint(0, 256, (1, args.tokens), generator=torch.Generator("cpu").manual_seed(1)).to(device)
    contexts: dict[str, Any] = {ALONE: None} | {m: pyckpt.ContextParallel(method=m) for m in METHODS}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    # One keeps the memory of its store from step to step: another's peak would be without it.
    streams = dict.fromkeys(contexts) if args.stream is None else {v: pyckpt.Stream(args.stream) for v in contexts}

    def step(variant: str) -> None:
        if variant != ALONE or rank == 0:
            model.loss(tokens, context=contexts[variant], stream=streams[variant]).backward()
        dist.barrier()

    rows = []
    for variant in contexts:
        with counted() as sent, pyckpt.measure.memory(model) as m:
            step(variant)
        given = (model, variant, args.tokens, world, dtype, args.stream)
        arithmetic = 0 if variant == ALONE else sent_by_arithmetic(*given)
        row = {"variant": variant, "peak_bytes": m.peak_bytes, "saved_bytes": m.saved_bytes}
        rows.append(row | {"sent_bytes": sent["bytes"], "sent_by_arithmetic": arithmetic})
    steps: dict[str, Callable[[], None]] = {v: lambda v=v: step(v) for v in contexts}  # type: ignore[misc]
    times = interleaved(steps, args.repeats, device=device)
    for row in rows:
        stats: Stats = times[row["variant"]]
        over = stats.median / times[ALONE].median
        row |= {"seconds": stats.median, "iqr": stats.iqr, "all": stats.all, "over_alone": over}
    options = {n: getattr(args, n) for n in ("tokens", "d_model", "layers", "repeats", "stream")}
    options |= {"processes": world, **sizes}
    return {**common.stamp(device), "options": options, "rows": rows}


def show(figures: dict[str, Any]) -> None:
    for row in figures["rows"]:
        print(
            f"{row['variant']:>10}  {format_seconds(row['seconds']):>8}  {row['over_alone']:.2f} of alone  "
            f"kept {format_bytes(row['saved_bytes']):>9}  peak {format_bytes(row['peak_bytes']):>9}  "
            f"sent {format_bytes(row['sent_bytes'])}"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--stream", type=int, metavar="TILE", help="run streamed, by tiles of so many tokens")
    processes.add_arguments(parser)
    args = parser.parse_args(arguments)
    processes.run(args, measured, show, "context" if args.stream is None else "context_stream")


if __name__ == "__main__":
    main()
