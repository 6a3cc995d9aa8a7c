"""Linear cross entropy, forward and backward, against PyTorch's and Liger-Kernel's: time, memory, and the error first.

    python bench/loss.py             # on a GPU about 5 minutes; small on a CPU
    python bench/loss.py --quick     # two sizes, those of `make gpu`

Llama-8B's head (d_model 4096, 128256 words) and smaller and larger vocabularies, bf16 on a GPU, float32 on a CPU. Every
variant has to give the loss, dx and dw of a float32 (on a CPU float64) truth before it is timed; they take turns in one
process; medians. Writes bench/results/loss_<device>.json after every case.

Variants: pyckpt, which makes the gradients in the forward; pyckpt with the logits made again in the backward; PyTorch's
linear and cross_entropy, in the dtype of the weights, in float32 from the logits on (as most training code has it), and
under torch.compile; torch.nn.functional.linear_cross_entropy, where this PyTorch has it; Liger-Kernel, where installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyckpt
from bench import common, steps
from bench.steps import Row, UnavailableError, Variant, Work
from pyckpt.measure.units import format_seconds
from pyckpt.precision import exact_products

OURS, RECOMPUTE = "pyckpt", "pyckpt_recompute"
EAGER, EAGER_FP32, COMPILED = "eager", "eager_fp32", "compiled"
TORCH, LIGER = "torch_linear_ce", "liger"
# Against eager: faster from this many tokens on, and at most this share of its memory at this many.
AIMS: dict[str, Any] = {"time_over_eager": 1.0, "from_tokens": 4096, "memory_over_eager": 0.05, "at_tokens": 32768}
_CHUNK = 1024  # tokens of the truth at a time


@dataclasses.dataclass(frozen=True)
class Case:
    """x (tokens, d_model) and a head of so many words."""

    tokens: int
    d_model: int
    vocab: int

    @property
    def flops(self) -> float:
        """Of forward and backward: three products."""
        return 3 * 2.0 * self.tokens * self.d_model * self.vocab

    def __str__(self) -> str:
        return f"{self.tokens:6d} x {self.d_model} x {self.vocab:6d}"


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        sizes = [(63, 64, 1000), (300, 64, 1000)] if quick else [(n, 1024, 16384) for n in (512, 2048)]
        return [Case(*size) for size in sizes]
    if quick:
        return [Case(n, 4096, 128256) for n in (32768, 4096)]
    lengths = (1024, 2048, 4096, 8192, 16384, 32768)
    return [Case(n, 4096, v) for v in (128256, 32768, 262144) for n in lengths]


# --- variants -----------------------------------------------------------------------------------------------


def variants(target: Tensor, vocab: int, compile_too: bool) -> dict[str, Variant]:
    """name -> loss of (x (T, D), weight (V, D)) against the target (T,)."""
    found = {
        OURS: Variant(lambda: lambda x, w: pyckpt.linear_cross_entropy(x, w, target), slack=steps.OWN),
        RECOMPUTE: Variant(
            lambda: lambda x, w: pyckpt.linear_cross_entropy(x, w, target, recompute=True), slack=steps.OWN
        ),
        EAGER: Variant(lambda: _eager(target)),
        EAGER_FP32: Variant(lambda: _eager_fp32(target)),
        TORCH: Variant(lambda: _torch(target)),
        LIGER: Variant(lambda: _liger(target)),
    }
    if compile_too:
        found[COMPILED] = Variant(lambda: steps.compiled(_eager(target)), compiled=True)
    return found


def _eager(target: Tensor) -> steps.Function:
    return lambda x, w: F.cross_entropy(F.linear(x, w), target)


def _eager_fp32(target: Tensor) -> steps.Function:
    return lambda x, w: F.cross_entropy(F.linear(x, w).float(), target)


def _torch(target: Tensor) -> steps.Function:
    fn = getattr(F, "linear_cross_entropy", None)
    options = getattr(nn, "LinearCrossEntropyOptions", None)
    if fn is None or options is None:
        raise UnavailableError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    return lambda x, w: fn(x, w, target, options=options())


def _liger(target: Tensor) -> steps.Function:
    if importlib.util.find_spec("liger_kernel") is None:
        raise UnavailableError("Liger-Kernel is not installed")
    from liger_kernel.transformers import functional as liger

    return lambda x, w: liger.liger_fused_linear_cross_entropy(x, w, target)


# --- truth --------------------------------------------------------------------------------------------------


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Work, Tensor]:
    """x and weight, of a spread that gives a few words most of the probability; and random labels.

    With flat probabilities the label's own share would hide a wrong softmax in every gradient.
    """
    x = torch.randn(case.tokens, case.d_model, device=device, dtype=dtype).requires_grad_()
    scale = 3.0 * case.d_model**-0.5
    weight = nn.Parameter(torch.randn(case.vocab, case.d_model, device=device, dtype=dtype).mul_(scale))
    return Work([x, weight]), torch.randint(case.vocab, (case.tokens,), device=device)


def gate(work: Work, target: Tensor) -> steps.Gate:
    """The truth, and what plain PyTorch makes of it in the inputs' dtype; a chunk of tokens at a time, so that both fit
    where a variant does not."""
    x, weight = (t.detach() for t in work.leaves)
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32
    with exact_products():
        truth = _by_chunks(x, weight.to(wide), target, wide)
    return steps.Gate.of(truth, _by_chunks(x, weight, target, x.dtype))


def _by_chunks(x: Tensor, weight: Tensor, target: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Loss, dx and dw of plain PyTorch in `dtype`; dw is summed in float32 or better."""
    acc = torch.promote_types(dtype, torch.float32)
    loss, dx = x.new_zeros((), dtype=acc), torch.empty_like(x, dtype=dtype)
    dw = torch.zeros_like(weight, dtype=acc)
    for sl in (slice(i, i + _CHUNK) for i in range(0, x.shape[0], _CHUNK)):
        leaves = [x[sl].to(dtype).requires_grad_(), weight.detach().requires_grad_()]
        part = F.cross_entropy(F.linear(*leaves), target[sl], reduction="sum") / x.shape[0]
        dx[sl], share = torch.autograd.grad(part, leaves)
        loss += part.detach()
        dw += share
    return [loss, dx, dw.to(dtype)]


# --- measuring ----------------------------------------------------------------------------------------------


def measure(case: Case, device: torch.device, repeats: int, compile_too: bool, top: float) -> list[Row]:
    """A row a variant: seconds, bytes, TFLOP/s and the ratios to eager."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    work, target = inputs(case, dtype, device)
    found = variants(target, case.vocab, compile_too)
    rows = steps.run(found, work, gate(work, target), device, repeats)
    for row in rows:
        if "seconds" in row:
            row["tflops"] = case.flops / row["seconds"] / 1e12
            row["of_product"] = row["tflops"] / top
    for base in (EAGER, EAGER_FP32):
        steps.over(rows, "seconds", base)
        steps.over(rows, "beyond_bytes", base)
    return rows


def run(
    device: torch.device,
    quick: bool = False,
    repeats: int = 20,
    budget: float = 600.0,
    compile_too: bool = True,
    save: Callable[[dict[str, Any]], Any] = lambda figures: None,
) -> dict[str, Any]:
    """All figures."""
    top = common.ceiling(device.type)
    print(f"{common.device_name(device)}: matrix product {top:.3g} TFLOP/s\n{HEADER}", flush=True)
    head = {**common.stamp(device), "product_tflops": top, "aims": AIMS}
    found = steps.sweep(
        cases(device.type, quick),
        lambda case: measure(case, device, repeats, compile_too, top),
        line,
        lambda figures: save({**head, **figures}),
        budget,
        device,
    )
    return {**head, **found}


HEADER = f"{'tokens, width, words':24} {'variant':16} {'time':>8} {'/ eager':>8}{'':7} {'beyond*':>9} {'/ eager':>8}"
FOOTER = "* memory above inputs, loss and gradients at the peak"


def line(case: Case, row: Row) -> str:
    """One variant's figures, beside the aims where it is ours."""
    start = f"{case!s:24} {row['variant']:16}"
    if "failed" in row:
        return f"{start} {row['failed']}"[:118]
    ours = row["variant"] in (OURS, RECOMPUTE)
    time, share = (steps.shown_ratio(row, f"{k}_over_eager") for k in ("seconds", "beyond_bytes"))
    aim = f" < {AIMS['time_over_eager']:.2f}" if ours and case.tokens >= AIMS["from_tokens"] else ""
    memory = steps.shown_bytes(row, "beyond_bytes")
    limit = f" ≤ {AIMS['memory_over_eager']:.2f}" if ours and case.tokens == AIMS["at_tokens"] else ""
    return f"{start} {format_seconds(row['seconds']):>8} {time:>8}{aim:7} {memory:>9} {share:>8}{limit}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    steps.add_options(parser, "loss")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = steps.out(options, "loss", device)
    figures = run(
        device,
        options.quick,
        options.repeats,
        options.budget,
        not options.no_compile,
        lambda found: common.write_to(path, found),
    )
    print(f"{FOOTER}\nwritten to {path}")
    return int(steps.count_wrong(figures, (OURS, RECOMPUTE)) > 0)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: the interpreter's times mean nothing")
    sys.exit(main())
