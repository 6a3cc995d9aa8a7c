"""What PyTorch's allocator counts on a GPU, without one: Llama-8B's block, and its layers streamed.

    python bench/gpu_memory.py                     # a few minutes; writes bench/results/gpu_memory.json
    python bench/gpu_memory.py --root OTHER        # the same of another checkout, written nowhere

The devices are pretended and idle (tests/pretended): every tensor is made and freed as on a GPU, and no kernel runs.
Memory that PyTorch's kernels take for themselves (cuBLAS) is not seen. The memory of plain PyTorch, of which a block's
is said, is the H200's (bench/results/block_h200.json): PyTorch's build without CUDA norms by other ops.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
# As in block_gpu.py and stream_gpu.py, which cannot be imported beside an older pyckpt.
LLAMA_8B: dict[str, Any] = {"d_model": 4096, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14336}
WORDS, LAYERS, TILE = 32_000, 2, 8192
BLOCKS, STREAMS = (8192, 32768), (32768, 131072, 262144)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE, help="the checkout whose pyckpt is measured")
    parser.add_argument("--streams", type=int, nargs="*", default=STREAMS, help="lengths of streamed runs")
    options = parser.parse_args()
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    sys.path[:0] = [str(options.root), str(HERE / "tests")]
    import pretended

    import pyckpt
    from pyckpt.store import host

    sys.path.insert(0, str(HERE))
    from bench import common

    host.available_bytes = lambda: None  # of its memory no page is touched

    h200 = common.read("block_h200")
    with pretended.idle():
        sets = [(length, save) for length in BLOCKS for save in pyckpt.SAVE_SETS]
        rows = [block(length, save, plain_bytes(h200, length)) for length, save in sets]
        rows += [streamed(length) for length in options.streams]
    for row in rows:
        print(line(row), flush=True)
    if options.root == HERE:
        figures = {**common.stamp("cuda"), "plain": {k: h200[k] for k in ("commit", "device", "date")}, "rows": rows}
        print(f"written to {common.write('gpu_memory', figures)}")


def plain_bytes(h200: Row, length: int) -> int:
    return next(r["beyond_bytes"] for r in h200["rows"] if (r["length"], r["variant"]) == (length, "plain"))


def block(length: int, save: str, plain: int) -> Row:
    """What a step of the block needs beyond its output and gradients, in bfloat16."""
    import torch

    import pyckpt

    made = pyckpt.CkptTransformerBlock(**LLAMA_8B, save=save, device="cuda", dtype=torch.bfloat16)
    x = torch.empty(1, length, LLAMA_8B["d_model"], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.empty_like(x)

    def step() -> None:
        made(x).backward(dy)
        made.zero_grad()
        x.grad = None

    beyond = peak_bytes(step) - 2 * x.nbytes - sum(p.nbytes for p in made.parameters())
    return {"what": "block", "length": length, "save": save, "bytes": beyond, "over_plain": beyond / plain}


def streamed(length: int) -> Row:
    """What a streamed step needs above weights and gradients, with the store in host memory."""
    import torch

    import pyckpt

    model = pyckpt.CkptCausalLM(WORDS, LAYERS, **LLAMA_8B, device="cuda", dtype=torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    tokens, stream = torch.zeros(1, length, dtype=torch.int64, device="cuda"), pyckpt.Stream(TILE, "host")
    peak = peak_bytes(lambda: model.loss(tokens, stream=stream).backward())
    return {"what": "streamed", "length": length, "layers": LAYERS, "tile": TILE, "bytes": peak}


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most that a second step takes above what was there before it."""
    import torch

    for _ in range(2):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
    return torch.cuda.max_memory_allocated() - before


def line(row: Row) -> str:
    size = f"{row['bytes'] / 2**30:6.2f} GiB"
    if row["what"] == "block":
        return f"block    {row['length']:>9,} {row['save']:14} {size} {row['over_plain']:.3f} of plain"
    return f"streamed {row['length']:>9,} {row['layers']} layers       {size}"


if __name__ == "__main__":
    main()
