"""What a step costs the host on the way to a GPU, measured without one.

    python bench/host.py                # a few seconds; writes bench/results/host_cpu.json

Short sequences wait for the host: it has to say what to launch before a GPU can do it. Here tensors lie on the CPU,
Triton's launches go through all of its own code for sm_90 and then do nothing, kernels are not compiled, and matrix
products return memory as they find it. What is left is our code, Triton's and PyTorch's. A launch of CUDA, some 4
microseconds each, comes on top; so do those of PyTorch's own kernels, which work here on few numbers instead.

Prints microseconds of a call, the least of some medians' worth of calls, and the launches of Triton's kernels in it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import pyckpt
from bench import common
from pyckpt.ops import attention_triton, pointwise_triton, registry
from pyckpt.triton_kernels import attention, norm, rope, tuning

TOKENS, WIDTH = 16, 256
LAUNCHES: Counter[str] = Counter()


class Nothing:
    """A kernel that was not compiled: a launch of it is counted."""

    function, packed_metadata = 1, ()

    def __init__(self, name: str) -> None:
        self.name = name

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        LAUNCHES[self.name] += 1


class NoDriver:
    """An H100 that is not there, as Triton asks for one."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def pretend() -> None:
    """From here on ops on CPU tensors go to Triton's kernels, which do nothing. For a process of its own."""
    driver.set_active(NoDriver())
    triton.compiler.compile = lambda src, **options: Nothing(src.name)
    registry._PREFERENCE["cpu"] = ("triton", "torch")
    registry._runs_on = lambda backend, device_type: backend != "cuda"
    tuning.architecture = lambda device: "sm_90"
    tuning.interpreted = lambda: True  # what lets the launchers take CPU tensors
    for module in (attention_triton, pointwise_triton):
        module.rounds_badly = lambda t: False
    torch.mm, torch.addmm = _product, _sum_of_product


def _product(a: torch.Tensor, b: torch.Tensor, out: Any = None, **options: Any) -> torch.Tensor:
    return torch.empty(a.shape[0], b.shape[1], dtype=a.dtype) if out is None else out


def _sum_of_product(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out: Any = None, **options: Any) -> torch.Tensor:
    return _product(a, b, out)


def microseconds(fn: Callable[[], Any], calls: int, tries: int) -> float:
    for _ in range(3):
        fn()
    found = []
    for _ in range(tries):
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        found.append((time.perf_counter() - start) / calls)
    return min(found) * 1e6


def launches(fn: Callable[[], Any]) -> dict[str, int]:
    fn()
    LAUNCHES.clear()
    fn()
    return dict(LAUNCHES)


def cases(dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    block = pyckpt.CkptTransformerBlock(WIDTH, 2, n_kv_heads=1, d_ff=2 * WIDTH, dtype=dtype)
    x, dy = (torch.randn(1, TOKENS, WIDTH, dtype=dtype) for _ in range(2))
    q, do = (torch.randn(1, TOKENS, 2, 128, dtype=dtype) for _ in range(2))
    k = torch.randn(1, TOKENS, 1, 128, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (q, k, k)]
    weight = torch.ones(WIDTH, dtype=dtype)
    inputs = x.clone().requires_grad_()

    def without_grad() -> None:
        with torch.no_grad():
            block(x)

    def attend() -> None:
        torch.autograd.grad(pyckpt.attention(*leaves), leaves, do)

    return {
        "block, forward and backward": lambda: torch.autograd.grad(block(inputs), [inputs, *block.parameters()], dy),
        "block, forward without grad": without_grad,
        "attention, forward and backward": attend,
        "attention, forward without grad": lambda: pyckpt.attention(q, k, k),
        "attention, the launcher alone": lambda: attention.forward(q, k, k, attention.Options(window=(-1, 0))),
        "rms_norm": lambda: pyckpt.rms_norm(x, weight),
        "rms_norm, the launcher alone": lambda: norm.forward(x, weight, None, 1e-5, centered=False),
        "rope, the launcher alone": lambda: rope.rotate(q[0], *_tables(), False, False, q[0], k[0]),
    }


def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    return _TABLE, _TABLE


_TABLE = torch.ones(TOKENS, 64)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--tries", type=int, default=7)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "host_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pretend()
    rows = []
    for name, fn in cases().items():
        row = {"name": name, "microseconds": microseconds(fn, options.calls, options.tries), "launches": launches(fn)}
        rows.append(row)
        print(f"{name:34} {row['microseconds']:7.0f} us  {sum(row['launches'].values()):3d} launches", flush=True)
    common.write_to(options.out, {**common.stamp(), "triton": triton.__version__, "rows": rows})
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
