"""Norm, activation and RoPE kernels against PyTorch's, as a share of the bandwidth of a copy in the same run.

    python bench/norm.py [--out FILE] [--repeats 20] [--no-compile]

Widths of Llama-8B (4096 features, 14336 in the MLP, heads of 128) and of models beside it; bf16 on a GPU, float32 on a
CPU. Variants take turns; medians. Bytes are those that must move: every input read once, every output written once.
Writes bench/results/norm_<device>.json.

Variants: pyckpt, by the backend that it takes by itself; pyckpt-cuda, its CUDA C++ kernels, where they are built;
PyTorch eager; on a GPU torch.compile, and Liger-Kernel where it is installed. Before them what one launch costs, by
backend: in eager mode, and one of 100 in a CUDA graph. The ops for which the C++ kernels are faster in every case are
named at the end, for pyckpt/ops/measured.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyckpt
from bench import common, steps
from pyckpt.measure.timing import interleaved
from pyckpt.ops import cuda_backend, registry

OURS, OURS_CUDA, EAGER, COMPILED, LIGER = "pyckpt", "pyckpt-cuda", "eager", "compiled", "liger"
AIM = 0.9  # of the copy's bandwidth
LAUNCH_AIM = 1 / 3  # of the eager cost of a Triton launch, for one of the extension's
_LAUNCHES = 100
_FASTER = 0.98  # of the time: less is noise
_EPS = 1e-5
_HEAD_START = 2_000_000  # clocks, about a millisecond: these kernels are shorter than what launches them
Function = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """op on x (tokens, width); SwiGLU has two such inputs, RoPE takes width as heads of 128."""

    op: str
    tokens: int
    width: int

    def __str__(self) -> str:
        return f"{self.op:10} {self.tokens:6d} x {self.width:5d}"


TOKENS = {"cuda": 16384, "cpu": 256}
WIDTHS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {
        "rms_norm": (1024, 4096, 8192, 16384),
        "layer_norm": (1024, 4096, 8192),
        "swiglu": (14336,),
        "rope": (4096,),
    },
    "cpu": {"rms_norm": (1024,), "layer_norm": (1024,), "swiglu": (2816,), "rope": (1024,)},
}


def cases(device: str) -> list[Case]:
    found = [Case(op, TOKENS[device], width) for op, widths in WIDTHS[device].items() for width in widths]
    if device == "cuda":  # as many bytes as at 4,096: a launch and a grid's end weigh as much
        found += [Case(op, 4 * TOKENS[device], 1024) for op in ("rms_norm", "layer_norm")]
    return found


def inputs(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    x = torch.randn(case.tokens, case.width, dtype=dtype, device=device)
    if case.op == "swiglu":
        return [x, torch.randn_like(x)]
    if case.op == "rope":
        return [x.view(case.tokens, -1, 128)]
    vectors = 2 if case.op == "layer_norm" else 1
    return [x, *(torch.randn(case.width, dtype=dtype, device=device) for _ in range(vectors))]


def moved(case: Case, given: list[Tensor]) -> tuple[int, int]:
    """Bytes that must move forward and backward (statistics and vectors, under a percent, are left out)."""
    tensors = {"rms_norm": (2, 3), "layer_norm": (2, 3), "swiglu": (3, 5), "rope": (2, 2)}[case.op]
    return tensors[0] * given[0].nbytes, tensors[1] * given[0].nbytes


# --- variants -----------------------------------------------------------------------------------------------


def variants(case: Case, device: str, compile_too: bool = True) -> dict[str, Function]:
    found: dict[str, Function] = {OURS: _ours(case), EAGER: _plain(case)}
    if device == registry.extension_device_type and not cuda_backend.problem:
        found[OURS_CUDA] = _ours(case)
    if device == "cuda":
        if compile_too:
            found[COMPILED] = steps.compiled(_plain(case), keep_graph=True)
        if liger := _liger(case):
            found[LIGER] = liger
    return found


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """With a backend forced, or none."""
    before = os.environ.pop("PYCKPT_BACKEND", None)
    if name is not None:
        os.environ["PYCKPT_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("PYCKPT_BACKEND", None)
        if before is not None:
            os.environ["PYCKPT_BACKEND"] = before


def within(variant: str) -> contextlib.AbstractContextManager[None]:
    """What a variant's forward and backward run in."""
    return backend("cuda" if variant == OURS_CUDA else None)


def _ours(case: Case) -> Function:
    return {
        "rms_norm": lambda x, w: pyckpt.rms_norm(x, w, _EPS),
        "layer_norm": lambda x, w, b: pyckpt.layer_norm(x, w, b, _EPS),
        "swiglu": lambda gate, up: pyckpt.glu(gate, up, "swiglu"),
        "rope": lambda x: pyckpt.rope(x),
    }[case.op]


def _plain(case: Case) -> Function:
    return {
        "rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, _EPS),
        "layer_norm": lambda x, w, b: F.layer_norm(x, w.shape, w, b, _EPS),
        "swiglu": lambda gate, up: F.silu(gate) * up,
        "rope": _plain_rope,
    }[case.op]


def _plain_rope(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    frequencies = 1e4 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[0], device=x.device, dtype=torch.float64)[:, None] * frequencies
    cos, sin = (t.to(x.dtype)[:, None] for t in (angles.cos(), angles.sin()))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _liger(case: Case) -> Function | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import functional as liger

    return {
        "rms_norm": lambda x, w: liger.liger_rms_norm(x, w, _EPS),
        "layer_norm": lambda x, w, b: liger.liger_layer_norm(x, w, b, _EPS),
        "swiglu": lambda gate, up: liger.liger_swiglu(gate, up),
    }.get(case.op)


# --- measuring ----------------------------------------------------------------------------------------------


def copy_bandwidth(device: str, repeats: int) -> float:
    """Bytes a second of a copy of 256 MiB (16 on a CPU), read and written."""
    source = torch.randn((256 if device == "cuda" else 16) << 18, device=device)
    target = torch.empty_like(source)
    stats = interleaved({"copy": lambda: target.copy_(source)}, repeats, 3, device=device, head_start=_HEAD_START)
    return 2 * source.nbytes / stats["copy"].median


def measure(case: Case, device: str, repeats: int, copy: float, compile_too: bool = True) -> list[dict[str, Any]]:
    """A row a variant: seconds, GB/s and the share of the copy, forward and backward, and the error of both."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    given = [t.requires_grad_() for t in inputs(case, dtype, device)]
    found = variants(case, device, compile_too)
    dout = torch.randn_like(found[EAGER](*given))
    truth = _step(found[EAGER], [t.detach().double().requires_grad_() for t in given], dout.double())
    started: dict[str, dict[str, Any]] = {name: {} for name in found}
    outs: dict[str, Tensor] = {}
    for name, fn in found.items():
        with within(name), steps.noting_failure(started[name]):  # a compiler that fails, a library of another version
            started[name]["error"] = _error(_step(fn, given, dout), truth)
            outs[name] = fn(*given)
    errors = {name: row["error"] for name, row in started.items() if name in outs}

    def forward(name: str) -> Callable[[], Any]:
        def run() -> None:
            with within(name), torch.no_grad():
                found[name](*given)

        return run

    def backward(name: str) -> Callable[[], Any]:
        def run() -> None:
            with within(name):
                torch.autograd.grad(outs[name], given, dout, retain_graph=True)

        return run

    times = {
        which: interleaved({n: of(n) for n in outs}, repeats, 3, device=device, head_start=_HEAD_START)
        for which, of in (("forward", forward), ("backward", backward))
    }
    rows = []
    for name in found:
        row: dict[str, Any] = {**dataclasses.asdict(case), "variant": name, **started[name]}
        if name not in outs:
            rows.append(row)
            continue
        # A variant whose result is wrong has no time.
        if not errors[name] <= 2 * errors[EAGER] + torch.finfo(dtype).eps:
            rows.append({**row, "failed": f"wrong: error {errors[name]:.2e}, PyTorch's {errors[EAGER]:.2e}"})
            continue
        for which, nbytes in zip(("forward", "backward"), moved(case, given), strict=True):
            seconds = times[which][name].median
            row[f"{which}_seconds"], row[f"{which}_gbs"] = seconds, nbytes / seconds / 1e9
            row[f"{which}_of_copy"] = nbytes / seconds / copy
        rows.append(row)
    return rows


def _step(fn: Function, given: list[Tensor], dout: Tensor) -> list[Tensor]:
    out = fn(*given)
    return [out.detach(), *torch.autograd.grad(out, given, dout)]


def _error(got: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative error of the results, by the norm."""
    return steps.largest(float((g.double() - t).norm() / t.norm()) for g, t in zip(got, truth, strict=True))


# --- launches, and what follows -----------------------------------------------------------------------------


def launch_costs(device: str, repeats: int) -> list[dict[str, Any]]:
    """Seconds of one small RMSNorm, by backend: called in eager mode, and as one of many in a CUDA graph."""
    x = torch.randn(1, 1024, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    weight = torch.ones(1024, device=device, dtype=x.dtype)
    rows: list[dict[str, Any]] = []
    for name in registry.BACKENDS:
        with backend(name):
            if registry.choose("rms_norm_fwd", device)[0] != name:
                continue
            row: dict[str, Any] = {"backend": name, "op": "rms_norm_fwd"}
            with steps.noting_failure(row):
                row["eager_seconds"] = _seconds_a_call(lambda: torch.ops.pyckpt.rms_norm_fwd(x, weight, _EPS), repeats)
                if device == "cuda":
                    graph = _graph_of(lambda: torch.ops.pyckpt.rms_norm_fwd(x, weight, _EPS))
                    found = interleaved({"graph": graph.replay}, repeats, 3, device=device, head_start=_HEAD_START)
                    row["graph_seconds"] = found["graph"].median / _LAUNCHES
            rows.append(row)
    return rows


def _seconds_a_call(fn: Callable[[], Any], repeats: int) -> float:
    """The host's time for a call, in a row of them that the device keeps up with; the best of some rows."""
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_LAUNCHES):
            fn()
        best = min(best, time.perf_counter() - start)
    return best / _LAUNCHES


def _graph_of(fn: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            fn()
    return graph


# The ops that a case's forward and backward stand for.
_STANDS_FOR = {
    "rms_norm": (("rms_norm_fwd", "add_rms_norm_fwd"), ("rms_norm_bwd", "rms_norm_bwd_add_")),
    "layer_norm": (("layer_norm_fwd", "add_layer_norm_fwd"), ("layer_norm_bwd", "layer_norm_bwd_add_")),
    "swiglu": (("glu_fwd", "glu_fwd_", "act_fwd", "act_fwd_"), ("glu_bwd", "glu_bwd_", "act_bwd", "act_bwd_")),
    "rope": (("rope", "rope_", "rope_qk_"), ()),
}


def faster_in_cuda(rows: list[dict[str, Any]]) -> list[str]:
    """The ops whose C++ kernels were faster than the default in every case, for `measured.json`."""
    ops: list[str] = []
    failed = {r["op"] for r in rows if r["variant"] == OURS_CUDA and "failed" in r}
    for op, sides in _STANDS_FOR.items():
        if op in failed:
            continue
        for which, names in zip(("forward", "backward"), sides, strict=True):
            key = f"{which}_seconds"
            times = {((r["tokens"], r["width"]), r["variant"]): r[key] for r in rows if r["op"] == op and key in r}
            ours = {shape: t for (shape, variant), t in times.items() if variant == OURS_CUDA}
            if ours and all(t <= _FASTER * times.get((shape, OURS), 0.0) for shape, t in ours.items()):
                ops += names
    return sorted(ops)


def run(
    device: str,
    repeats: int = 20,
    budget: float = 600.0,
    save: Callable[[dict[str, Any]], Any] = lambda figures: None,
    compile_too: bool = True,
) -> dict[str, Any]:
    """All figures."""
    copy = copy_bandwidth(device, repeats)
    print(f"copy: {copy / 1e9:.0f} GB/s (read and written)\n{'':26}{'variant':12}{'forward':>20}{'backward':>20}")
    head = {**common.stamp(device), "copy_gbs": copy / 1e9, "aim_of_copy": AIM, "launch_aim": LAUNCH_AIM}
    head |= {"extension": cuda_backend.problem or "built", "launches": launch_costs(device, repeats)}
    for row in head["launches"]:
        print(launch_line(row))
    found = steps.sweep(
        cases(device),
        lambda case: measure(case, device, repeats, copy, compile_too),
        line,
        lambda figures: save({**head, **figures}),
        budget,
        torch.device(device),
    )
    figures = {**head, **found, "cuda_first": faster_in_cuda(found["rows"])}
    save(figures)
    if OURS_CUDA in {r["variant"] for r in found["rows"]}:
        print(f"faster in CUDA C++, for pyckpt/ops/measured.json: {', '.join(figures['cuda_first']) or 'none'}")
    return figures


def launch_line(row: dict[str, Any]) -> str:
    start = f"a launch: {row['op']} by {row['backend']:8}"
    if "failed" in row:
        return f"{start}  {row['failed']}"
    names = {"eager": "eager", "graph": f"one of {_LAUNCHES} in a graph"}
    return start + "  ".join(
        f"{row[f'{kind}_seconds'] * 1e6:7.1f} us {name}" for kind, name in names.items() if f"{kind}_seconds" in row
    )


def line(case: Case, row: dict[str, Any]) -> str:
    start = f"{case!s:26}{row['variant']:12}"
    if "failed" in row:
        return f"{start}  {row['failed']}"
    parts = (f"{row[f'{w}_gbs']:8.0f} GB/s {row[f'{w}_of_copy']:5.0%}" for w in ("forward", "backward"))
    return start + " ".join(f"{p:>19}" for p in parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="instead of bench/results/norm_<device>.json")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no case is begun")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes long to start")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = options.out or common.RESULTS / f"norm_{common.short_name(device)}.json"

    def save(found: dict[str, Any]) -> None:
        common.write_to(path, found)

    figures = run(device.type, options.repeats, options.budget, save, not options.no_compile)
    print(f"written to {path}")
    return int(steps.count_wrong(figures, (OURS, OURS_CUDA)) > 0)


if __name__ == "__main__":
    sys.exit(main())
