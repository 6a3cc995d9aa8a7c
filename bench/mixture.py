"""A swapped mixture of experts on a CPU: time and peak of a step, against the model's own checkpointing and without.

    python bench/mixture.py                                            # about 8 minutes on 2 cores
    python bench/mixture.py --tokens 512 --layers 2 --repeats 1        # less; the results say how much

A Qwen3-MoE in fp32 with random weights, 256 words, batch 1; each token meets 2 of 8 experts, whose products are
transformers' grouped ones. Otherwise as bench/swap.py. Writes bench/results/mixture_cpu.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common, swap

NAME = "mixture_cpu"
CONFIG: dict[str, int] = {
    "vocab_size": 256,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 704,
}
NAMES = [swap.PLAIN, swap.CHECKPOINT, swap.SWAP, swap.STREAM]


def make_model(layers: int, tokens: int) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {**CONFIG, "num_hidden_layers": layers, "max_position_embeddings": tokens}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, experts_implementation="grouped_mm")).train()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(argv)
    rows = swap.measure(make_model(given.layers, given.tokens), given.tokens, given.repeats, NAMES)
    swap.show("a mixture of 8 experts, 2 for each token", rows)
    config = {**CONFIG, "layers": given.layers, "tokens": given.tokens, "repeats": given.repeats, "tile": swap.TILE}
    found = {**common.stamp(), "config": config, "rows": rows, "ratios": swap.ratios(rows)}
    path = common.write(NAME, found)
    print(f"\nwritten to {path.relative_to(common.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
