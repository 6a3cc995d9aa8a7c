"""FSDP2 over a swapped Hugging Face model, started by torchrun, with sharded checkpoints.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 8 examples/fsdp2.py --text book.txt --seq-len 8192 --steps 100 --checkpoint run/100
    torchrun --nproc-per-node 4 examples/fsdp2.py --text book.txt --seq-len 8192 --steps 200 --resume run/100
    torchrun --nproc-per-node 8 examples/fsdp2.py --text book.txt --seq-len 1000000 --rows 8 --stream 4096
    torchrun --nproc-per-node 8 examples/fsdp2.py --text book.txt --seq-len 262144 --rows 2 --share 4
    torchrun --nproc-per-node 8 examples/fsdp2.py --text book.txt --seq-len 4000000 --rows 2 --share 4 --stream 4096
    torchrun --nproc-per-node 8 examples/fsdp2.py --text book.txt --seq-len 65536 --rows 2 --share 2 --tensor 2

On GPUs by NCCL, each process one GPU; else by gloo on the CPU. Model and text are those of finetune_llama.py. With
--stream neither the weights nor the sequence are on a GPU as a whole: a tile of so many tokens, and a layer's weights.
With --share so many processes share each row, of which every one computes a part of the tokens; with both each streams
its part. With --tensor so many have the heads and the MLP's width of all layers together, and the words.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from arguments import a_checkpoint, a_new_folder, at_least, parser_of, text_of
from finetune_llama import batches, small_llama
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import pyckpt


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
    """What a run goes on from: both states, each process's shards of them, and how many steps were made."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "steps": steps}


def save(state: dict[str, Any], folder: Path) -> None:
    """Each process writes its shards aside; the folder has its name when all are there."""
    aside = folder.with_name(folder.name + ".part")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    dist.barrier()
    dcp.save(state, checkpoint_id=aside)
    if dist.get_rank() == 0:
        aside.rename(folder)


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Go on from a checkpoint, of any number of processes; the number of steps that were made."""
    state = state_of(model, optimizer, 0)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["steps"])


def deal_out(model: Any, mesh: Any) -> None:
    """Tensor parallelism: heads and the MLP's width of each layer, the words of embedding and head."""
    columns = [*(f"self_attn.{n}_proj" for n in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    embedding, head = RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, {"model.embed_tokens": embedding, "lm_head": head})


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, steps=10)
    parser.add_argument("--rows", type=at_least(1), default=4, help="of a batch, over all processes")
    parser.add_argument("--seq-len", type=at_least(2), default=256)
    parser.add_argument("--stream", type=at_least(1), help="tokens of a tile that is on the device; the rest waits")
    parser.add_argument("--share", type=at_least(1), default=1, help="processes that share each row")
    parser.add_argument("--tensor", type=at_least(1), default=1, help="processes that have the weights together")
    parser.add_argument("--checkpoint", type=a_new_folder, help="a folder that does not exist yet")
    parser.add_argument("--resume", type=a_checkpoint, help="the folder of a checkpoint to go on from, up to --steps")
    args = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        parser.error("start it by torchrun --nproc-per-node 2 examples/fsdp2.py")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world % (args.share * args.tensor):
        parser.error(f"--share {args.share} times --tensor {args.tensor} does not divide the {world} processes")
    groups = world // args.share // args.tensor
    if args.rows % groups:
        parser.error(f"--rows {args.rows} can't be dealt out to {groups} groups of processes; give a multiple")
    text = text_of(parser, args)

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    model = small_llama().to(device)
    if model.config.num_key_value_heads % args.tensor:
        parser.error(f"--tensor {args.tensor} does not divide the {model.config.num_key_value_heads} key/value heads")
    mesh = dist.init_device_mesh(device.type, (groups, args.share, args.tensor), mesh_dim_names=("dp", "cp", "tp"))
    weights = dist.init_device_mesh(device.type, (groups * args.share, args.tensor), mesh_dim_names=("fsdp", "tp"))
    if args.tensor > 1:
        deal_out(model, weights["tp"])
    heads = model.config.num_key_value_heads // args.tensor
    method = "ring" if args.stream is None or heads % args.share else "all-to-all"
    context = pyckpt.ContextParallel(mesh["cp"], method) if args.share > 1 else None
    pyckpt.swap(model, stream=None if args.stream is None else pyckpt.Stream(args.stream), context=context)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if on_gpu else MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mesh=weights["fsdp"], mp_policy=policy)
    fully_shard(model, mesh=weights["fsdp"], mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 0 if args.resume is None else load(model, optimizer, args.resume)
    if first >= args.steps:
        parser.error(
            f"--resume {args.resume} has {first} steps, --steps {args.steps} asks for no more; give a larger one"
        )
    for step in range(first, args.steps):
        # The rows follow from the step: the same in every process, which takes its group's, and in a resumed run.
        torch.manual_seed(step)
        (rows,) = batches(text, args.rows, args.seq_len, 1)
        tokens = rows.chunk(groups)[mesh["dp"].get_local_rank()].to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().double() / world
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean:.6f}", flush=True)
    if args.checkpoint is not None:
        save(state_of(model, optimizer, args.steps), args.checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
