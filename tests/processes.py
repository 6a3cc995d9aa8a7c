"""Several processes: over gloo, for the tests of distributed training, and forked ones."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import PerhapsChanceError

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


def run_processes(world: int, body: Callable[..., None], *args: Any) -> None:
    """Calls body(rank, *args) in `world` processes, which are one group. What one raises is raised here.

    As `PerhapsChanceError` where it was one, for the test to draw again.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    _prepare()
    try:
        mp.start_processes(_enter, args=(world, port, body, args), nprocs=world, start_method="forkserver")
    except mp.ProcessRaisedException as error:
        text = str(error)
        if PerhapsChanceError.__name__ in text:
            raise PerhapsChanceError(text.rpartition(PerhapsChanceError.__name__)[2]) from error
        raise


@functools.cache
def _prepare() -> None:
    """A process that has imported what takes seconds: those of the tests are its forks. It has run nothing."""
    modules = ["torch.distributed.tensor.parallel", "pyckpt"]
    if importlib.util.find_spec("transformers") is not None:
        modules += ["transformers", "transformers.models.llama.modeling_llama"]
    multiprocessing.set_forkserver_preload(modules)


def _enter(rank: int, world: int, port: int, body: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(world)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    body(rank, *args)
    dist.barrier()
    dist.destroy_process_group()


def in_a_fork(body: Callable[[], bool]) -> bool:
    """What body() gives in a process that is forked here; False where it raises, or waits for ever."""
    process = os.fork()
    if process == 0:
        signal.alarm(20)
        try:
            os._exit(0 if body() else 1)
        except BaseException:
            os._exit(1)
    return os.waitpid(process, 0)[1] == 0


def mean_of_processes(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A step's, with the mean of the processes' gradients; "loss" is the same in all."""
    found = {n: t.clone() for n, t in results.items()}
    for name, t in found.items():
        if name != "loss":
            dist.all_reduce(t)
            t /= dist.get_world_size()
    return found


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of all parameters that have one, whole where they are sharded, by their names without DDP's prefix."""
    grads = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            grads[name.removeprefix("module.")] = grad.clone()
    return grads


def compile_nothing_of_deepspeed() -> None:
    """On a CPU it would compile an op for messages in shared memory, which takes minutes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def zero_config(stage: int) -> dict[str, Any]:
    """DeepSpeed's, for batches of two rows in each process and any optimizer of PyTorch."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
