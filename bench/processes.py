"""Benchmarks of several processes: of one thread each on a CPU, by gloo, or with a GPU each, by NCCL."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench import common

Figures = dict[str, Any]
Measured = Callable[[argparse.Namespace, torch.device], Figures]
Show = Callable[[Figures], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=2, help="started here, unless torchrun has started them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)


def run(args: argparse.Namespace, measured: Measured, show: Show, name: str) -> None:
    """`measured` in each process; the first one shows what it found, and writes bench/results/<name>_<device>.json."""
    rest = (args, measured, show, name)
    if "RANK" in os.environ:
        _worker(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), *rest)
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    mp.start_processes(_worker, args=(args.processes, *rest), nprocs=args.processes, start_method="spawn")


def _worker(rank: int, world: int, args: argparse.Namespace, measured: Measured, show: Show, name: str) -> None:
    on_gpu = torch.cuda.device_count() >= world
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world)
    figures = measured(args, device)
    if rank == 0:
        show(figures)
        out = args.out or common.RESULTS / f"{name}_{common.short_name(device)}.json"
        print(f"wrote {common.write_to(Path(out), figures)}")
    dist.destroy_process_group()
