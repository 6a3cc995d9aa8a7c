"""A step of a swapped model whose weights processes share (tensor parallelism): time, memory, bytes summed.

    python bench/tensor_parallel.py                     # two processes of one thread each, about 3 minutes on 2 cores
    python bench/tensor_parallel.py --tokens 256 --layers 1 --repeats 1
    torchrun --nproc-per-node 8 bench/tensor_parallel.py --tokens 32768 --d-model 4096 --layers 4    # GPUs, by NCCL

A Llama of transformers with random weights, dealt out by PyTorch's `parallelize_module`: layers by their heads and the
MLP's width, embedding and head by their words; batch 1, forward and backward of its loss, in fp32 on a CPU and bf16 on
a GPU. All variants have the same weights and take turns in the same processes; medians, of the slowest process. Peaks
are a step's live bytes of tensors above weights and gradients, of the first process; "summed" are the bytes of what
processes sum over each other in a step, or gather. Writes bench/results/tensor_parallel_<device>.json.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyckpt
from bench import common, processes
from bench.swap import CHECKPOINT, MID, PLAIN, STREAM, SWAP, checkpointing, swapped
from pyckpt.measure.timing import Stats, interleaved
from pyckpt.measure.units import format_bytes, format_seconds

SHARED = "swap, x shared"


class Summed(TorchDispatchMode):
    """Counts the bytes of what this process gives to sums over all processes, and to what is gathered of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "all_reduce" in name or "allreduce" in name:
            given = args[0]
            self.bytes += sum(t.nbytes for t in (given if isinstance(given, (list, tuple)) else [given]))
        elif "allgather" in name or "all_gather" in name:
            self.bytes += next(t.nbytes for t in args[1::-1] if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


def make_model(args: argparse.Namespace, world: int, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    d = args.d_model
    sizes = {"hidden_size": d, "intermediate_size": 8 * d // 3 // (64 * world) * 64 * world, "vocab_size": args.vocab}
    heads = {"num_attention_heads": d // 64, "num_key_value_heads": max(world, d // 128)}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=args.layers, max_position_embeddings=args.tokens)
    return deal_out(LlamaForCausalLM(config).to(device, dtype).train(), world)


def deal_out(model: Any, world: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh(model.device.type, (world,))
    columns = [*(f"self_attn.{n}_proj" for n in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
    plan: dict[str, Any] = {n: ColwiseParallel() for n in columns}
    plan |= {n: RowwiseParallel() for n in ("self_attn.o_proj", "mlp.down_proj")}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    embedding, head = RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, {"model.embed_tokens": embedding, "lm_head": head})


def variants(tile: int) -> dict[str, Callable[[Any], Any]]:
    stream = pyckpt.Stream(tile)
    return {
        PLAIN: lambda model: nullcontext(),
        CHECKPOINT: checkpointing,
        SWAP: swapped,
        SHARED: lambda model: swapped(model, save=pyckpt.Save("attention", {"x": "processes"})),
        MID: lambda model: swapped(model, save="attention+mid"),
        STREAM: lambda model: swapped(model, stream=stream),
    }


def measured(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True to a scalar")
    world = dist.get_world_size()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = make_model(args, world, device, dtype)
    ids = torch.randint(0, args.vocab, (1, args.tokens), generator=torch.Generator("cpu").manual_seed(1)).to(device)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        dist.barrier()

    ways = variants(args.tile)
    step()  # gradients are there from now on
    rows = []
    for name, way in ways.items():
        with way(model), pyckpt.measure.memory(model) as m:
            step()
        with way(model), Summed() as summed:
            step()
        rows.append(
            {"variant": name, "peak_bytes": m.peak_bytes, "saved_bytes": m.saved_bytes, "summed_bytes": summed.bytes}
        )

    def inside(way: Callable[[Any], Any]) -> Callable[[], None]:
        def run() -> None:
            with way(model):
                step()

        return run

    times = interleaved({name: inside(way) for name, way in ways.items()}, args.repeats, device=device)
    for row in rows:
        stats: Stats = times[row["variant"]]
        over = stats.median / times[CHECKPOINT].median
        row |= {"seconds": stats.median, "iqr": stats.iqr, "all": stats.all, "over_checkpointing": over}
    options = {n: getattr(args, n) for n in ("tokens", "d_model", "layers", "vocab", "tile", "repeats")}
    return {**common.stamp(device), "options": options | {"processes": world}, "rows": rows}


def show(figures: dict[str, Any]) -> None:
    for row in figures["rows"]:
        print(
            f"{row['variant']:>27}  {format_seconds(row['seconds']):>8}  "
            f"{row['over_checkpointing']:.2f} of checkpointing  kept {format_bytes(row['saved_bytes']):>9}  "
            f"peak {format_bytes(row['peak_bytes']):>9}  summed {format_bytes(row['summed_bytes'])}"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tile", type=int, default=1024, help="of the streamed run")
    processes.add_arguments(parser)
    args = parser.parse_args(arguments)
    processes.run(args, measured, show, "tensor_parallel")


if __name__ == "__main__":
    main()
