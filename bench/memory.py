"""Saved bytes and peak of one block, for every save set, against arithmetic.

    python bench/memory.py             # about five minutes on 2 cores

Bytes of live tensors (see pyckpt.measure.memory), above weights, gradients, x and dy. The slope over the length is
taken between two lengths with the tile fixed, so that a tile's scratch, which does not grow, falls out. Writes
bench/results/memory_cpu.json.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

sys.path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parent.parent))

from bench import common
from pyckpt import SAVE_SETS, CkptTransformerBlock, measure
from pyckpt.compare.baseline import PlainBlock
from pyckpt.save import bytes_per_token, save_set
from pyckpt.spec import BlockSpec

CONFIG: dict[str, Any] = {"n_kv_heads": 4, "d_ff": 2816}
D_MODEL, N_HEADS, TILE = 1024, 16, 256
# Long enough that the peak is in the attention backward, not where the weight gradients are largest.
LENGTHS = (4096, 8192)


def main() -> None:
    spec = BlockSpec.make(D_MODEL, N_HEADS, **CONFIG)
    rows = [row(spec, save) for save in (None, *SAVE_SETS)]
    print(f"bytes a token, fp32, d_model {D_MODEL}, between S = {LENGTHS[0]} and {LENGTHS[1]}")
    print(f"{'save':15s} {'kept':>8s} {'expected':>9s} {'peak':>8s} {'expected':>9s}")
    for r in rows:
        cells = (r["saved"], r["saved_expected"], r["peak_slope"], r["peak_slope_expected"])
        print(f"{r['save']:15s} " + " ".join(f"{'-' if c is None else format(round(c), ','):>8s}" for c in cells))
    figures = {
        **common.stamp(),
        "config": {"d_model": D_MODEL, "n_heads": N_HEADS, **CONFIG, "tile": TILE},
        "rows": rows,
    }
    print(f"\nwritten to {common.write('memory_cpu', figures).relative_to(common.ROOT)}")


def row(spec: BlockSpec, save: str | None) -> dict[str, Any]:
    """One save set, or plain PyTorch for None. Bytes for each token; the peak is above x, dy, y, dx."""
    if save is None:
        block: torch.nn.Module = PlainBlock(D_MODEL, N_HEADS, **CONFIG)
    else:
        block = CkptTransformerBlock(D_MODEL, N_HEADS, **CONFIG, save=save, tile=TILE)
    measured = [measured_bytes(block, length) for length in LENGTHS]
    span = LENGTHS[1] - LENGTHS[0]
    saved, peak = ((b - a) / span for a, b in zip(*measured, strict=True))
    expected = None if save is None else bytes_per_token(spec, save, torch.float32)
    return {
        "save": save or "plain",
        "saved": saved,
        "saved_expected": expected,
        "peak_slope": peak - 2 * 4 * D_MODEL,
        "peak_slope_expected": None if save is None else peak_slope(spec, save),
    }


def peak_slope(spec: BlockSpec, save: str) -> int:
    """Bytes a token at the peak of the backward, above x, dy, y and dx: the save set and one block's transient.

    The transient is do, q, k, v, dq, dk, dv, without those of them that are kept; and o, lse where they are not kept.
    """
    keeps = save_set(save)
    kept = bytes_per_token(spec, save, torch.float32) - 4 * spec.d_model
    qkv = 0 if keeps.qkv else spec.d_q + 2 * spec.d_kv
    o = 0 if keeps.attention else spec.d_q + spec.n_heads
    return kept + 4 * (2 * spec.d_q + 2 * spec.d_kv + qkv + o)


def measured_bytes(block: torch.nn.Module, length: int) -> tuple[int, int]:
    for p in block.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randn(1, length, D_MODEL, requires_grad=True)
    dy = torch.randn_like(x)
    with measure.memory(block) as m:
        block(x).backward(dy)
    return m.saved_bytes, m.peak_bytes


if __name__ == "__main__":
    main()
