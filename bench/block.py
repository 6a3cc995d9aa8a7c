"""Time of one block's forward and backward, against plain PyTorch and torch.utils.checkpoint.

    python bench/block.py              # three lengths, about 15 minutes on 2 cores
    python bench/block.py 512 4096     # some lengths

The configuration and the aims are those of the design: fp32, d_model 1024, 16 heads, 4 key/value heads, d_ff 2816,
batch 1. Variants take turns in one process; medians. Writes bench/results/block_cpu.json. On a GPU it is Llama-8B's
block with more variants and options: see bench/block_gpu.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import block_gpu, common, steps
from pyckpt import compare
from pyckpt.compare.results import CHECKPOINT, PLAIN, Results, Row

SAVE = "attention"
CONFIG = {"d_model": 1024, "n_heads": 16, "n_kv_heads": 4, "d_ff": 2816}
# length -> (repeats, aim / checkpoint, aim / plain)
AIMS = {512: (15, 1.00, 1.20), 4096: (7, 0.82, 1.08), 16384: (3, 0.70, 0.92)}


def cpu(lengths: list[int], out: Path | None = None) -> None:
    rows: list[Row] = []
    results: Results | None = None
    for length in lengths:
        repeats = AIMS[length][0] if length in AIMS else 5
        results = compare.run(
            [length],
            **CONFIG,
            dtype=torch.float32,
            variants=[PLAIN, CHECKPOINT, SAVE],
            repeats=repeats,
            progress=lambda text: print(text, file=sys.stderr),
        )
        rows += results.rows
    assert results is not None
    results.rows = rows
    print("\n".join(table(results)))
    figures = {**common.stamp(), "aims": {str(n): aims[1:] for n, aims in AIMS.items()}, **results.to_dict()}
    print(f"\nwritten to {common.write_to(out or common.RESULTS / 'block_cpu.json', figures)}")


def table(results: Results) -> list[str]:
    """Lines of a table: time of the block over both baselines, beside the aims."""
    lines = [
        f"save={SAVE!r}, fp32, one block, forward + backward, {results.device}, {torch.get_num_threads()} threads",
        "      S     plain      ckpt    pyckpt    /ckpt     aim   /plain     aim",
    ]
    for length in results.lengths:
        ours = results.find(length, SAVE)
        times = [results.find(length, v) for v in (PLAIN, CHECKPOINT, SAVE)]
        assert ours is not None
        ms = "".join(f"{row.seconds * 1e3:7.0f} ms" for row in times if row and row.seconds)
        aims = AIMS.get(length, (0, float("nan"), float("nan")))
        over = [results.ratio(ours, "seconds", base) or float("nan") for base in (CHECKPOINT, PLAIN)]
        lines.append(f"{length:7d}{ms}   {over[0]:6.3f}  ≤ {aims[1]:4.2f}   {over[1]:6.3f}  ≤ {aims[2]:4.2f}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lengths", type=int, nargs="*", help="tokens of the sequence")
    gpu = parser.add_argument_group("on a GPU (--out anywhere)")
    gpu.add_argument("--layers", type=int, default=1, help="blocks, one after the other")
    gpu.add_argument("--dry-run", action="store_true", help="the GPU's comparison of a small block, anywhere")
    steps.add_options(gpu, "block")
    options = parser.parse_args(argv)
    if torch.cuda.is_available() or options.dry_run:
        if options.dry_run and options.out is None:
            parser.error("--dry-run needs --out FILE: its figures are no results")
        return block_gpu.main(options)
    cpu(options.lengths or list(AIMS), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
