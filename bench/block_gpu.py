"""Time and memory of Llama-8B's block on a GPU: every save set against PyTorch's, stored, checkpointed and compiled.

    python bench/block.py                     # on a GPU: five lengths, about 8 minutes
    python bench/block.py --quick             # two lengths, those of `make gpu`
    python bench/block.py 8192 --layers 4     # these lengths, and a stack of blocks

bf16, batch 1, forward and backward. PyTorch's block takes the SDPA backend that is fastest at the length, in this run.
Gradients are held against float32 at a short length, and against plain PyTorch's at each length, before any is timed.
Variants take turns in one process; medians. Writes bench/results/block_<device>.json (block_<device>_x4.json for four
blocks) after every length.

Variants: plain (everything stored), compiled (plain under torch.compile), checkpoint (plain in torch.utils.checkpoint),
and ours by save set; "all" stores everything too, from the same kernels as the others. "cudnn": ours with attention by
cuDNN's kernels (PYCKPT_ATTENTION=cudnn).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import attention, common, steps
from bench.mlp import environment
from bench.steps import Context, Row, Variant, Work
from pyckpt import SAVE_SETS, CkptTransformer, CkptTransformerBlock
from pyckpt.compare.baseline import PlainBlock, PlainStack
from pyckpt.compare.results import CHECKPOINT, PLAIN
from pyckpt.compare.runner import GRADIENT_TOLERANCE
from pyckpt.measure.flops import block_flops
from pyckpt.measure.timing import interleaved
from pyckpt.measure.units import format_seconds
from pyckpt.precision import exact_products
from pyckpt.spec import BlockSpec

COMPILED, CUDNN = "compiled", "cudnn"
SAVE = "attention"
LLAMA_8B: dict[str, Any] = {"d_model": 4096, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14336, "rope_theta": 5e5}
SMALL: dict[str, Any] = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 176}
# Of save="attention" at this length.
AIMS: dict[str, Any] = {
    "at_length": 32768,
    "seconds_over_all": 1.10,
    "seconds_over_checkpoint": 0.85,
    "beyond_bytes_over_plain": 0.25,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One sequence through so many blocks."""

    length: int
    layers: int

    def __str__(self) -> str:
        return f"{self.length:6d}" + (f" x {self.layers}" if self.layers > 1 else "")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is run, and where. `config` are arguments of a block."""

    config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    gate_length: int

    @staticmethod
    def of(device: torch.device, small: bool) -> Setup:
        if small:
            return Setup(SMALL, device, torch.float32, 33)
        return Setup(LLAMA_8B, device, torch.bfloat16, 1024)

    @property
    def spec(self) -> BlockSpec:
        return BlockSpec.make(**self.config)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the truth."""
        return torch.float64 if self.dtype == torch.float32 else torch.float32


class Models:
    """PyTorch's stack of blocks and ours, over the same parameters."""

    def __init__(self, setup: Setup, layers: int) -> None:
        kind: dict[str, Any] = {**setup.config, "device": setup.device, "dtype": setup.dtype}
        self.setup, self.layers = setup, layers
        self.plain = PlainStack([PlainBlock(**kind) for _ in range(layers)])
        self.ours = CkptTransformer([CkptTransformerBlock(**kind) for _ in range(layers)])
        self.ours.load_state_dict(dict(self.plain.named_parameters()), assign=True)

    def work(self, length: int) -> Work:
        size = (1, length, self.setup.config["d_model"])
        x, dy = (torch.randn(size, device=self.setup.device, dtype=self.setup.dtype) for _ in range(2))
        return Work([x.requires_grad_(), *self.plain.parameters()], dy)

    def variants(self, sdpa: Context, compile_too: bool) -> dict[str, Variant]:
        """name -> y of (x, the parameters, which the models hold themselves)."""
        found = {PLAIN: Variant(lambda: self._plain(False), sdpa)}
        if compile_too:
            found[COMPILED] = Variant(self._compiled, sdpa, compiled=True)
        found[CHECKPOINT] = Variant(lambda: self._plain(True), sdpa)
        found |= {save: Variant(lambda save=save: self._ours(save), slack=steps.OWN) for save in SAVE_SETS}
        if self.setup.device.type == "cuda":
            within = functools.partial(environment, PYCKPT_ATTENTION="cudnn")
            for save in ("all", SAVE):
                found[f"{save}, {CUDNN}"] = Variant(lambda save=save: self._ours(save), within, steps.OWN)
        return found

    def truth(self, work: Work) -> list[Tensor]:
        """y, dx and the gradients of the parameters in the wider dtype."""
        kind: dict[str, Any] = {**self.setup.config, "device": self.setup.device, "dtype": self.setup.wide}
        wide = PlainStack([PlainBlock(**kind) for _ in range(self.layers)])
        wide.load_state_dict(self.plain.state_dict())
        assert work.dout is not None
        leaves = [work.leaves[0].detach().to(self.setup.wide).requires_grad_(), *wide.parameters()]
        with exact_products():
            return Work(leaves, work.dout.to(self.setup.wide)).run(lambda x, *_: wide(x))

    def _plain(self, checkpointed: bool) -> steps.Function:
        def run(x: Tensor, *_: Tensor) -> Tensor:
            self.plain.checkpointed = checkpointed
            return self.plain(x)

        return run

    def _compiled(self) -> steps.Function:
        self.plain.checkpointed = False
        compiled = steps.compiled(lambda x: self.plain(x))

        def run(x: Tensor, *_: Tensor) -> Tensor:
            self.plain.checkpointed = False
            return compiled(x)

        return run

    def _ours(self, save: str) -> steps.Function:
        def run(x: Tensor, *_: Tensor) -> Tensor:
            for block in self.ours:
                block.save = save
            return self.ours(x)

        return run


# --- measuring ----------------------------------------------------------------------------------------------


def best_sdpa(setup: Setup, length: int) -> dict[str, Any]:
    """Seconds of forward and backward of each SDPA backend at this length, and which is the fastest.

    Those that cannot run there are left out; empty where none can.
    """
    spec = setup.spec
    shapes = [(1, heads, length, spec.head_dim) for heads in (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads)]
    leaves = [torch.randn(s, device=setup.device, dtype=setup.dtype).requires_grad_() for s in shapes]
    work, times = Work(leaves, torch.randn(shapes[0], device=setup.device, dtype=setup.dtype)), {}
    row: Row = {}
    for name, backend in attention.SDPA.items():
        with steps.noting_failure(row), sdpa_kernel(backend):
            step = {name: lambda: work.run(_sdpa)}
            times[name] = interleaved(step, 3, warmup=2, device=setup.device)[name].median
        steps.free(setup.device)
    return {"seconds": times, "best": min(times, key=lambda name: times[name])} if times else {}


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def sdpa_context(found: dict[str, Any]) -> Context:
    if not found:
        return contextlib.nullcontext
    backend: SDPBackend = attention.SDPA[found["best"]]
    return lambda: sdpa_kernel(backend)


def wrong_variants(models: Models) -> dict[str, str]:
    """Variants whose gradients at a short length are not those of the truth, with the reason.

    The compiled one is checked at each length only: it would be compiled for this one as well.
    """
    work = models.work(models.setup.gate_length)
    found = models.variants(contextlib.nullcontext, compile_too=False)
    gate = steps.Gate.of(models.truth(work), work.run(found[PLAIN].build()))
    rows: dict[str, Row] = {name: {} for name in found}
    for name, variant in found.items():
        with steps.noting_failure(rows[name]):
            gate.check(rows[name], work.run(variant.build()), variant.slack)
    return {name: row["failed"] for name, row in rows.items() if "failed" in row}


def measure(
    models: Models, case: Case, wrong: dict[str, str], repeats: int, compile_too: bool, top: float
) -> list[Row]:
    """A row a variant: seconds, bytes, TFLOP/s of the model's FLOPs, and the ratios that the aims are about."""
    setup = models.setup
    # Off a GPU PyTorch chooses by itself, by what a case needs.
    sdpa = best_sdpa(setup, case.length) if setup.device.type == "cuda" else {}
    work = models.work(case.length)
    found = models.variants(sdpa_context(sdpa), compile_too)
    right = {name: variant for name, variant in found.items() if name not in wrong}
    rows = steps.run(right, work, _gate_of_plain(setup, right, work), setup.device, repeats)
    rows += [{"variant": name, "failed": wrong[name]} for name in found if name in wrong]
    flops = case.layers * block_flops(setup.spec, case.length)
    for row in rows:
        if "seconds" in row:
            row["tflops"] = flops / row["seconds"] / 1e12
            row["of_product"] = row["tflops"] / top
        if row["variant"] in (PLAIN, COMPILED, CHECKPOINT) and sdpa:
            row["sdpa"] = sdpa
    for base in (PLAIN, CHECKPOINT, "all"):
        steps.over(rows, "seconds", base)
        steps.over(rows, "beyond_bytes", base)
    return rows


def _gate_of_plain(setup: Setup, found: dict[str, Variant], work: Work) -> steps.Gate | None:
    """Plain PyTorch's own results at a length; None where it has none. Both sides round in the same dtype."""
    row: Row = {}
    with steps.noting_failure(row):
        with found[PLAIN].within():
            truth = work.run(found[PLAIN].build())
        return steps.Gate(truth, 0.0, GRADIENT_TOLERANCE[setup.dtype])
    steps.free(setup.device)
    return None


def run(
    setup: Setup,
    lengths: Sequence[int],
    layers: int = 1,
    repeats: int = 20,
    budget: float = 600.0,
    compile_too: bool = True,
    save: Callable[[dict[str, Any]], Any] = lambda figures: None,
) -> dict[str, Any]:
    """All figures."""
    top = common.ceiling(setup.device.type)
    print(f"{common.device_name(setup.device)}: matrix product {top:.3g} TFLOP/s\n{HEADER}", flush=True)
    models = Models(setup, layers)
    wrong: dict[str, str] = {}
    unchecked: Row = {}
    with steps.noting_failure(unchecked):
        wrong = wrong_variants(models)
    steps.free(setup.device)
    head = {**common.stamp(setup.device), "config": setup.config, "product_tflops": top, "aims": AIMS}
    if unchecked:
        head["unchecked"] = unchecked["failed"]
        print(f"not checked against {setup.wide}: {unchecked['failed']}", flush=True)
    found = steps.sweep(
        [Case(length, layers) for length in lengths],
        lambda case: measure(models, case, wrong, repeats, compile_too, top),
        line,
        lambda figures: save({**head, **figures}),
        budget,
        setup.device,
    )
    return {**head, **found}


HEADER = (
    f"{'length':>6} {'variant':14} {'time':>8} {'TFLOP/s':>8} {'':4} {'/ all':>6} {'/ ckpt':>6}  {'beyond*':>8} "
    f"{'/ plain':>7} {'/ all':>6} {'saved':>8}"
)
FOOTER = (
    f"* memory above input, output and gradients at the peak. Aims of save={SAVE!r} at {AIMS['at_length']}: time\n"
    f"  ≤ {AIMS['seconds_over_all']:.2f} of save='all', ≤ {AIMS['seconds_over_checkpoint']:.2f} of "
    f"torch.utils.checkpoint; memory ≤ {AIMS['beyond_bytes_over_plain']:.2f} of plain"
)


def line(case: Case, row: Row) -> str:
    start = f"{case!s:>6} {row['variant']:14}"
    if "failed" in row:
        return f"{start} {row['failed']}"[:118]
    beyond, saved = (steps.shown_bytes(row, k) for k in ("beyond_bytes", "saved_bytes"))
    figures = ("seconds_over_all", "seconds_over_checkpoint", "beyond_bytes_over_plain", "beyond_bytes_over_all")
    ratios = [steps.shown_ratio(row, k) for k in figures]
    return (
        f"{start} {format_seconds(row['seconds']):>8} {row['tflops']:8.3g} {row['of_product']:4.0%} {ratios[0]:>6} "
        f"{ratios[1]:>6}  {beyond:>8} {ratios[2]:>7} {ratios[3]:>6} {saved:>8}"
    )


def main(options: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if os.environ.get("TRITON_INTERPRET") == "1" and not options.dry_run:
        raise SystemExit("unset TRITON_INTERPRET: the interpreter's times mean nothing")
    setup = Setup.of(device, options.dry_run)
    # The length of the aims first, in case time runs out.
    lengths = (65, 130) if options.dry_run else (32768, 8192) if options.quick else (32768, 4096, 8192, 16384, 65536)
    path = steps.out(options, "block", device, f"_x{options.layers}" if options.layers > 1 else "")
    figures = run(
        setup,
        options.lengths or lengths,
        options.layers,
        options.repeats,
        options.budget,
        not options.no_compile,
        lambda found: common.write_to(path, found),
    )
    print(f"{FOOTER}\nwritten to {path}")
    return int(steps.count_wrong(figures, SAVE_SETS) > 0)
