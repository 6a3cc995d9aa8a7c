"""A swapped model of transformers on a CPU: time and peak of a step, against the model's own checkpointing and without.

    python bench/swap.py                      # about 25 minutes on 2 cores
    python bench/swap.py --vocab 256 --repeats 1 --layers 2 --tokens 512    # less; the results say how much

A Llama in fp32 with random weights, batch 1, forward and backward with labels. Once with a small vocabulary, where the
layers are nearly all of it, once with Llama 2's, where logits matter too. "keep_within" has all the memory that
checkpointing takes: save sets are chosen to fill it. "LoRA": adapters of rank 8 on q and v, the base frozen, beside a
swapped step that trains all weights, and beside the products alone that make the frozen weights' gradients in it: what
a step with adapters has no need of. All variants hold the same weights; they take turns in one process; medians. Peaks
are live bytes of tensors above the weights, gradients among them, from `zero_grad()` on (pyckpt.measure.memory); with
adapters also those of training: AdamW, two micro-batches to a step, where gradients and the optimiser's state live
through a backward. Writes bench/results/swap_cpu.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyckpt
from bench import common
from pyckpt.measure.timing import interleaved
from pyckpt.measure.units import format_bytes
from pyckpt.save import bytes_per_token
from pyckpt.spec import BlockSpec

NAME = "swap_cpu"
PLAIN, CHECKPOINT = "transformers", "its gradient checkpointing"
SWAP, MID, STREAM = "swap", "swap, attention+mid", "swap, streamed"
WITHIN = "swap, keep_within"  # checkpointing's peak
ALL = "swap, all weights trained"  # beside adapters
GRADIENTS = "its frozen weights' gradients"  # the products alone
CONFIG: dict[str, int] = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1376}
VOCABS = (256, 32000)
AIMS = {"time over checkpointing": 0.85, "peak over checkpointing": 1.05, "peak over transformers": 0.35}
TILE = 1024
PEAKS = {"peak_bytes": "peak", "training_peak_bytes": "training peak"}


def make_model(vocab: int, layers: int, tokens: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {**CONFIG, "vocab_size": vocab, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=tokens)).train()


def with_adapters(model: nn.Module) -> nn.Module:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


@contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    model.gradient_checkpointing_enable()
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextmanager
def swapped(model: nn.Module, **options: Any) -> Iterator[None]:
    pyckpt.swap(model, **options)
    try:
        yield
    finally:
        pyckpt.unswap(model)


@contextmanager
def spent(model: nn.Module, memory: int, tokens: int) -> Iterator[None]:
    with swapped(model):
        pyckpt.keep_within(model, memory, tokens)
        yield


def variants(stream: pyckpt.Stream, memory: int, tokens: int) -> dict[str, Callable[[nn.Module], Any]]:
    return {
        PLAIN: lambda model: nullcontext(),
        CHECKPOINT: checkpointing,
        SWAP: swapped,
        MID: lambda model: swapped(model, save="attention+mid"),
        WITHIN: lambda model: spent(model, memory, tokens),
        STREAM: lambda model: swapped(model, stream=stream),
    }


def peak(model: nn.Module, way: Callable[[nn.Module], Any], ids: torch.Tensor) -> int:
    model.zero_grad()
    with way(model), pyckpt.measure.memory(model) as m:
        model(input_ids=ids, labels=ids).loss.backward()
    return m.peak_bytes


def training_peak(model: nn.Module, way: Callable[[nn.Module], Any], ids: torch.Tensor) -> int:
    """Of AdamW's first two steps, each of two micro-batches."""
    model.zero_grad()
    with way(model), pyckpt.measure.memory(model) as m:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        for _ in range(2):
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return m.peak_bytes


def frozen_products(model: Any, tokens: int) -> Callable[[], None]:
    """dW = dYᵀ X of every frozen linear layer, the head's too."""
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    shapes = [tuple(p.shape) for n, p in frozen.items() if p.dim() == 2 and "embed_tokens" not in n]
    of_width = {width: torch.randn(tokens, width) for width in {w for shape in shapes for w in shape}}

    def run() -> None:
        for out, into in shapes:
            torch.mm(of_width[out].t(), of_width[into])

    return run


def memory_to_spend(model: nn.Module, ids: torch.Tensor) -> int:
    """Bytes that blocks may keep where a step may take what it takes with checkpointing."""
    spec = BlockSpec.make(CONFIG["hidden_size"], CONFIG["num_attention_heads"], d_ff=CONFIG["intermediate_size"])
    layers = model.config.num_hidden_layers  # type: ignore[union-attr]
    kept = ids.numel() * layers * bytes_per_token(spec, "attention", torch.float32)  # type: ignore[operator]
    return kept + max(0, peak(model, checkpointing, ids) - peak(model, swapped, ids))


def measure(
    model: nn.Module, tokens: int, repeats: int, names: list[str] | None = None, whole: nn.Module | None = None
) -> list[dict[str, Any]]:
    """A row for each variant: seconds of a step, all of them, and the peak's bytes. `whole`: another model, for ALL."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))  # type: ignore[union-attr,arg-type]
    stream = pyckpt.Stream(TILE, "file")
    memory = memory_to_spend(model, ids) if names is None or WITHIN in names else 0
    ways = {n: (model, way) for n, way in variants(stream, memory, tokens).items() if names is None or n in names}
    if whole is not None:
        ways[ALL] = (whole, swapped)

    def step(model: nn.Module, way: Callable[[nn.Module], Any]) -> None:
        model.zero_grad()
        with way(model):
            model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    runs: dict[str, Callable[[], None]] = {n: lambda both=both: step(*both) for n, both in ways.items()}  # type: ignore[misc]
    if whole is not None:
        runs[GRADIENTS] = frozen_products(model, tokens)
    timings = interleaved(runs, repeats, warmup=1)
    rows: list[dict[str, Any]] = []
    for name, (one, way) in ways.items():
        rows.append({"variant": name, "seconds": timings[name].median, "peak_bytes": peak(one, way, ids)})
        if whole is not None:
            rows[-1]["training_peak_bytes"] = training_peak(one, way, ids)
    return rows + [{"variant": n, "seconds": timings[n].median} for n in runs if n not in ways]


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Time and peak of each of our variants over transformers' two, and with adapters over ALL."""
    by = {r["variant"]: r for r in rows}
    found: dict[str, dict[str, float]] = {}
    for name in (SWAP, MID, WITHIN, STREAM):
        for base, word in ((CHECKPOINT, "checkpointing"), (PLAIN, "transformers"), (ALL, "all weights")):
            for key, what in (("seconds", "time"), *PEAKS.items()):
                if key in by.get(name, {}) and key in by.get(base, {}):
                    found.setdefault(name, {})[f"{what} over {word}"] = by[name][key] / by[base][key]
    return found


def below_all_weights(rows: list[dict[str, Any]], frozen: int) -> dict[str, float]:
    """What adapters save of a step that trains everything, as shares of what frozen weights take in it.

    Of time: of the products that make their gradients. Of training's peak: of their gradients and AdamW's two moments,
    fp32. Adapters' own work and bytes are taken off; 1 is all of it.
    """
    by = {r["variant"]: r for r in rows}
    saved = {key: by[ALL][key] - by[SWAP][key] for key in ("seconds", "training_peak_bytes")}
    return {
        "time": saved["seconds"] / by[GRADIENTS]["seconds"],
        "training peak": saved["training_peak_bytes"] / (3 * 4 * frozen),
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    for r in rows:
        peaks = [f"{what} {format_bytes(r[key])}" for key, what in PEAKS.items() if key in r]
        print(f"  {r['variant']:30s} {r['seconds']:7.2f} s  {', '.join(peaks)}")
    for name, found in ratios(rows).items():
        for what, value in found.items():
            aim = f"  (aim {AIMS[what]:.2f})" if what in AIMS and name in (SWAP, MID, WITHIN) else ""
            print(f"  {name}: {what} {value:.3f}{aim}")


def run(vocab: int, layers: int, tokens: int, repeats: int) -> dict[str, Any]:
    model = make_model(vocab, layers, tokens)
    full = measure(model, tokens, repeats)
    show(f"vocabulary {vocab:,}: all weights trained", full)
    whole = copy.deepcopy(model)
    adapted = with_adapters(model)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    lora = measure(adapted, tokens, repeats, [CHECKPOINT, SWAP], whole)
    show(f"vocabulary {vocab:,}: LoRA", lora)
    shares = below_all_weights(lora, frozen)
    print("  saved, of what frozen weights take: " + ", ".join(f"{what} {share:.2f}" for what, share in shares.items()))
    found = {"ratios": ratios(full), "lora_ratios": ratios(lora)}
    return {"vocab": vocab, "full": full, "lora": lora, **found, "frozen_weights": frozen, "lora_saved": shares}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="*", default=list(VOCABS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(argv)
    config = {**CONFIG, "layers": given.layers, "tokens": given.tokens, "repeats": given.repeats, "tile": TILE}
    rows = [run(v, given.layers, given.tokens, given.repeats) for v in given.vocab]
    path = common.write(NAME, {**common.stamp(), "aims": AIMS, "config": config, "rows": rows})
    print(f"\nwritten to {path.relative_to(common.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
