"""A whole MLP (norm, gate and up, activation, down, residual), forward and backward: ours against PyTorch's.

    python bench/mlp.py             # on a GPU about 3 minutes; small on a CPU
    python bench/mlp.py --quick     # one size, that of `make gpu`

Llama-8B's MLP (4096 to 14336, SwiGLU) and a plain one, bf16 on a GPU, float32 on a CPU. Every variant has to give the y
and gradients of a float32 (on a CPU float64) truth before it is timed; they take turns in one process; medians. FLOPs
are those of the model, three passes of its products; recomputation does not count. `products` is what a FLOP counter
saw, in products of tokens x d_model x d_ff. Writes bench/results/mlp_<device>.json after every case.

Variants: pyckpt as a block runs it, gate and up made again or kept, and with fused kernels of ours where they run;
PyTorch with everything stored, the same under torch.compile and under torch.utils.checkpoint; Liger-Kernel's norm and
activation in the same MLP, where installed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common, steps
from bench.steps import Context, Row, UnavailableError, Variant, Work
from pyckpt.exec import tiling
from pyckpt.exec.plan import standard_plan
from pyckpt.measure.units import format_seconds
from pyckpt.ops import registry
from pyckpt.precision import exact_products
from pyckpt.save import save_set
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise import fused
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.parameters import norm_names
from pyckpt.tokenwise.positions import Counted, Positions
from pyckpt.tokenwise.standard import StandardTokenwise
from pyckpt.tokenwise.workspace import Workspace

EAGER, COMPILED, CHECKPOINT, LIGER = "eager", "compiled", "checkpoint", "liger"
_EPS = 1e-5
_COUNTED_TOKENS = 16


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables that are set inside, and as before after."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to run our MLP: whether gate and up are kept, and the context that chooses its kernels."""

    keep: bool = False
    within: Context = contextlib.nullcontext


# A set of kernels to compare is one more line here.
OURS: dict[str, Way] = {
    "pyckpt": Way(),
    "pyckpt_all": Way(keep=True),
    "fused": Way(within=lambda: environment(PYCKPT_FUSED="mlp,wgrad")),
    "fused_mlp": Way(within=lambda: environment(PYCKPT_FUSED="mlp")),
    "fused_wgrad": Way(within=lambda: environment(PYCKPT_FUSED="wgrad")),
    "fused_dgrad": Way(within=lambda: environment(PYCKPT_FUSED="dgrad")),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """x (tokens, d_model) through an MLP of this kind."""

    tokens: int
    d_model: int
    d_ff: int
    kind: str

    @property
    def spec(self) -> BlockSpec:
        return BlockSpec.make(self.d_model, 1, d_ff=self.d_ff, mlp=self.kind, norm_eps=_EPS)

    @property
    def product(self) -> float:
        """FLOPs of one product of tokens x d_model x d_ff."""
        return 2.0 * self.tokens * self.d_model * self.d_ff

    @property
    def flops(self) -> float:
        """Of the model, forward and backward."""
        return (9 if self.spec.gated else 6) * self.product

    def __str__(self) -> str:
        return f"{self.kind:10} {self.tokens:6d} x {self.d_model} x {self.d_ff:5d}"


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        width, d_ff, tokens = (32, 72, (67,)) if quick else (1024, 2816, (512, 4096))
    else:
        width, d_ff, tokens = 4096, 14336, ((16384,) if quick else (16384, 4096, 1024, 32768))
    gated = [Case(n, width, d_ff, "swiglu") for n in tokens]
    return gated if quick and device != "cpu" else [*gated, Case(tokens[0], width, 4 * width, "gelu")]


# --- variants -----------------------------------------------------------------------------------------------


def names(spec: BlockSpec) -> list[str]:
    """The MLP's weights, after x, in the order in which every variant takes them."""
    linears = (*(("gate_proj",) if spec.gated else ()), "up_proj", "down_proj")
    return [f"{norm_names(spec).mlp}.weight", *(f"mlp.{n}.weight" for n in linears)]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Work:
    spec, d = case.spec, case.d_model
    shapes = [(d,), *[(spec.d_ff, d)] * (2 if spec.gated else 1), (d, spec.d_ff)]
    new = functools.partial(torch.randn, device=device, dtype=dtype)
    weights = [nn.Parameter(new(*shape) * shape[-1] ** -0.5 if len(shape) > 1 else new(*shape)) for shape in shapes]
    return Work([new(case.tokens, d).requires_grad_(), *weights], new(case.tokens, d))


def variants(case: Case, compile_too: bool) -> dict[str, Variant]:
    """name -> y of (x, the weights of `names`)."""
    spec = case.spec
    found = {
        name: Variant(lambda way=way: functools.partial(_Tokenwise.apply, spec, way.keep), way.within, steps.OWN)
        for name, way in OURS.items()
        if way.within is contextlib.nullcontext or _fuses()
    }
    eager = functools.partial(_eager, spec)
    found[EAGER] = Variant(lambda: eager)
    found[CHECKPOINT] = Variant(lambda: functools.partial(checkpoint, eager, use_reentrant=False))
    found[LIGER] = Variant(lambda: _liger(spec))
    if compile_too:
        found[COMPILED] = Variant(lambda: steps.compiled(eager), compiled=True)
    return found


def _fuses() -> bool:
    """Whether fused kernels of ours run here: composed of PyTorch's own they are no variant."""
    return registry.choose("norm_mlp_", "cuda" if torch.cuda.is_available() else "cpu")[0] == "triton"


def _eager(spec: BlockSpec, x: Tensor, norm: Tensor, *linears: Tensor) -> Tensor:
    h = F.rms_norm(x, norm.shape, norm, _EPS)
    *inner, down = linears
    if spec.mlp == "swiglu":
        act = F.silu(F.linear(h, inner[0])) * F.linear(h, inner[1])
    else:
        act = F.gelu(F.linear(h, inner[0]))
    return x + F.linear(act, down)


def _liger(spec: BlockSpec) -> steps.Function:
    if importlib.util.find_spec("liger_kernel") is None:
        raise UnavailableError("Liger-Kernel is not installed")
    if spec.mlp != "swiglu":
        raise UnavailableError(f"Liger-Kernel has no kernel for {spec.mlp}")
    from liger_kernel.transformers import functional as liger

    def run(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        h = liger.liger_rms_norm(x, norm, _EPS)
        return x + F.linear(liger.liger_swiglu(F.linear(h, gate), F.linear(h, up)), down)

    return run


class _OnlyMLP(StandardTokenwise):
    """`post` from the residual stream on, which is the tile's x: attention's end is left out."""

    def forward(self, w: Weights, tile: Tile, y: Tensor, ws: Workspace) -> None:
        act = self.mlp.forward(w, tile, tile.x, tile.x.dtype, ws)
        self.mlp_end.forward(w, tile, act, tile.x, y, ws)

    def backward(self, w: Weights, tile: Tile, dy: Tensor, dx: Tensor, grads: WeightGradients, ws: Workspace) -> None:
        self._mlp_bwd(w, tile, tile.x, dy, dx, dy.dtype, True, grads, ws)


class _Tokenwise(torch.autograd.Function):
    """Our MLP as a block runs it: tile by tile, gate and up made again in the backward, or kept."""

    @staticmethod
    def forward(ctx: Any, spec: BlockSpec, keep: bool, x: Tensor, *weights: Tensor) -> Tensor:
        plan = standard_plan(spec, save_set("input"), None, x.shape[0], x.dtype, x.dtype, x.device)
        parts = fused.choose(spec, x.dtype, x.device)
        ctx.mlp, ctx.tile, ctx.names = _OnlyMLP(spec, parts), plan.tile, names(spec)
        kept_names = (("gate", "up") if spec.gated else ("up",)) if keep else ()
        kept = {n: x.new_empty(x.shape[0], spec.d_ff) for n in kept_names}
        w, y, ws = dict(zip(ctx.names, weights, strict=True)), torch.empty_like(x), Workspace(x.device)
        for sl in tiling.tiles(x.shape[0], ctx.tile):
            ctx.mlp.forward(w, _tile(x, kept, sl), y[sl], ws)
        ctx.kept_names = kept_names
        ctx.save_for_backward(x, *weights, *kept.values())
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        n = len(ctx.names)
        w = dict(zip(ctx.names, rest[:n], strict=True))
        kept = dict(zip(ctx.kept_names, rest[n:], strict=True))
        dy, dx, ws = upstream[0].contiguous(), torch.empty_like(x), Workspace(x.device)
        grads = WeightGradients(ctx.names, tiling.count(x.shape[0], ctx.tile))
        for sl in tiling.tiles(x.shape[0], ctx.tile):
            ctx.mlp.backward(w, _tile(x, kept, sl), dy[sl], dx[sl], grads, ws)
        return None, None, dx, *(grads.result(name, w[name]) for name in ctx.names)


def _tile(x: Tensor, kept: dict[str, Tensor], sl: slice) -> Tile:
    return Tile(
        x[sl],
        Positions(x.device, Counted(sl.start, sl.stop, x.shape[0])),
        {n: t[sl] for n, t in kept.items()},
        sl.start,
    )


# --- measuring ----------------------------------------------------------------------------------------------


def measure(case: Case, device: torch.device, repeats: int, compile_too: bool, top: float) -> list[Row]:
    """A row a variant: seconds, bytes, TFLOP/s of the model's FLOPs, and the products it made."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    work = inputs(case, dtype, device)
    found = variants(case, compile_too)
    rows = steps.run(found, work, gate(case, work), device, repeats)
    for row in rows:
        variant = found[row["variant"]]
        if "failed" not in row and not variant.compiled:
            row["products"] = products(case, variant, device, dtype)
        if "seconds" in row:
            row["tflops"] = case.flops / row["seconds"] / 1e12
            row["of_product"] = row["tflops"] / top
    for base in (EAGER, CHECKPOINT):
        steps.over(rows, "seconds", base)
        steps.over(rows, "beyond_bytes", base)
    return rows


def gate(case: Case, work: Work) -> steps.Gate:
    eager = functools.partial(_eager, case.spec)
    with exact_products():
        truth = work.exactly(eager, torch.float64 if work.leaves[0].dtype == torch.float32 else torch.float32)
    return steps.Gate.of(truth, work.run(eager))


def products(case: Case, variant: Variant, device: torch.device, dtype: torch.dtype) -> float | str:
    """Products of tokens x d_model x d_ff in a step, by PyTorch's FLOP counter; or why they could not be counted.

    Of a few tokens: the number is the same for any.
    """
    few = dataclasses.replace(case, tokens=_COUNTED_TOKENS)
    row: Row = {}
    with steps.noting_failure(row):
        fn, work = variant.build(), inputs(few, dtype, device)
        with FlopCounterMode(display=False) as counter, variant.within():
            work.run(fn)
        return counter.get_total_flops() / few.product
    return f"not counted: {row['failed']}"


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
    head = {**common.stamp(device), "product_tflops": top}
    found = steps.sweep(
        cases(device.type, quick),
        lambda case: measure(case, device, repeats, compile_too, top),
        line,
        lambda figures: save({**head, **figures}),
        budget,
        device,
    )
    return {**head, **found}


HEADER = (
    f"{'tokens, widths':31} {'variant':12} {'products':>8} {'time':>8} {'/ eager':>8} {'TFLOP/s':>8} {'':4} "
    f"{'beyond*':>9} {'saved':>9}"
)
FOOTER = "* memory above inputs, output and gradients at the peak"


def line(case: Case, row: Row) -> str:
    start = f"{case!s:31} {row['variant']:12}"
    if "failed" in row:
        return f"{start} {row['failed']}"[:118]
    made = row.get("products")
    count = f"{made:.3g}" if isinstance(made, float) else "–"
    over = steps.shown_ratio(row, "seconds_over_eager")
    beyond, saved = (steps.shown_bytes(row, k) for k in ("beyond_bytes", "saved_bytes"))
    return (
        f"{start} {count:>8} {format_seconds(row['seconds']):>8} {over:>8} {row['tflops']:8.3g} "
        f"{row['of_product']:4.0%} {beyond:>9} {saved:>9}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    steps.add_options(parser, "mlp")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = steps.out(options, "mlp", device)
    figures = run(
        device,
        options.quick,
        options.repeats,
        options.budget,
        not options.no_compile,
        lambda found: common.write_to(path, found),
    )
    print(f"{FOOTER}\nwritten to {path}")
    return int(steps.count_wrong(figures, OURS) > 0)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: the interpreter's times mean nothing")
    sys.exit(main())
