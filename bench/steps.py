"""One step, forward and backward, of several variants of the same work: is it right, what does it hold, how long.

A variant that cannot do it (its library is missing, the memory is too small, its compiler fails, its result is wrong)
gets a row that says why, with no time, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import common
from pyckpt import measure
from pyckpt.compare.results import OUT_OF_MEMORY
from pyckpt.compare.runner import out_of_memory
from pyckpt.measure.units import format_bytes

Function = Callable[..., Tensor]
Row = dict[str, Any]
Context = Callable[[], contextlib.AbstractContextManager[Any]]
# An output passes when its error is at most this many times plain PyTorch's of the same dtype. Peers are let off more:
# some sum weight gradients in bf16, which is less exact and not wrong.
OWN, PEER = 2.0, 10.0
_FEWEST = 3
EVERY = "every variant"  # of a case that failed as a whole


class UnavailableError(Exception):
    """Why a variant cannot run on this machine."""


class WrongResultError(Exception):
    """A result that is not the truth's."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """How to come by a variant's function (raises where it cannot run), and the context that is on while it runs."""

    build: Callable[[], Function]
    within: Context = contextlib.nullcontext
    slack: float = PEER
    compiled: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """The tensors that get a gradient (weights as parameters), and the gradient of the output; None for a scalar."""

    leaves: list[Tensor]
    dout: Tensor | None = None

    def run(self, fn: Function) -> list[Tensor]:
        """The output and the gradients."""
        out = fn(*self.leaves)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.dout)]

    def exactly(self, fn: Function, dtype: torch.dtype) -> list[Tensor]:
        """`run` in a wider dtype."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in self.leaves]
        return Work(leaves, None if self.dout is None else self.dout.to(dtype)).run(fn)


@dataclasses.dataclass(frozen=True)
class Gate:
    """What results are held against: the largest error passes up to slack times plain PyTorch's, plus `rounding`."""

    truth: list[Tensor]
    plain: float
    rounding: float

    @staticmethod
    def of(truth: list[Tensor], plain: list[Tensor]) -> Gate:
        return Gate(truth, largest_error(plain, truth), torch.finfo(plain[-1].dtype).eps)

    def check(self, row: Row, results: list[Tensor], slack: float) -> None:
        """Note the error in the row; raises `WrongResultError` where it is too large."""
        row["error"] = largest_error(results, self.truth)
        limit = slack * self.plain + self.rounding
        if not row["error"] <= limit:
            raise WrongResultError(f"relative error {row['error']:.2e}, expected at most {limit:.2e}")


def largest_error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error of several tensors, by the norm; not a number where one of them is none."""
    return largest(_error(g, t) for g, t in zip(got, truth, strict=True))


def largest(errors: Iterable[float]) -> float:
    """The largest; `max` loses a NaN that is not the first."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def _error(got: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(got.to(truth.dtype) - truth) / torch.linalg.vector_norm(truth))


# --- measuring ----------------------------------------------------------------------------------------------


def run(
    variants: Mapping[str, Variant],
    work: Work,
    gate: Gate | None,
    device: torch.device,
    repeats: int,
    seconds: float = 5.0,
) -> list[Row]:
    """A row for each variant: error, bytes and seconds of a step, or why there are none.

    `peak_bytes` is the most that is alive above what was there before; `beyond_bytes` the same without the output and
    the gradients, which every variant has to make; `saved_bytes` what autograd keeps from forward to backward. Code of
    torch.compile is not watched: it has a peak on CUDA only, and no saved bytes. The times take about `seconds` and at
    most `repeats` rounds.
    """
    rows: dict[str, Row] = {name: {"variant": name} for name in variants}
    steps: dict[str, Callable[[], Any]] = {}
    for name, variant in variants.items():
        with noting_failure(rows[name]):
            steps[name] = _prepare(variant, work, gate, device, rows[name])
        free(device)
    for name, stats in _times(steps, rows, device, repeats, seconds).items():
        rows[name] |= {"seconds": stats.median, "iqr_seconds": stats.iqr, "runs": len(stats.all)}
    return list(rows.values())


def _prepare(variant: Variant, work: Work, gate: Gate | None, device: torch.device, row: Row) -> Callable[[], Any]:
    """The step to be timed, after its results were checked and its memory was measured."""
    fn = variant.build()

    def step() -> list[Tensor]:
        with variant.within():
            return work.run(fn)

    results = step()
    if gate is not None:
        gate.check(row, results, variant.slack)
    made = sum(t.nbytes for t in results)
    del results
    row |= _memory(step, variant, work, device)
    if "peak_bytes" in row:
        row["beyond_bytes"] = max(0, row["peak_bytes"] - made)
    return step


def _memory(step: Callable[[], Any], variant: Variant, work: Work, device: torch.device) -> Row:
    if not variant.compiled:
        weights = nn.ParameterList(p for p in work.leaves if isinstance(p, nn.Parameter))
        with measure.memory(weights, device=device) as m:
            step()
        return {"peak_bytes": m.peak_bytes, "saved_bytes": m.saved_bytes}
    # The hooks and modes of measure.memory would have it compiled once more, for them, or not at all.
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return {"peak_bytes": torch.cuda.max_memory_allocated(device) - before}


def _times(
    steps: Mapping[str, Callable[[], Any]],
    rows: Mapping[str, Row],
    device: torch.device,
    repeats: int,
    seconds: float,
) -> dict[str, measure.Stats]:
    """Times of the variants, in turn; those that fail meanwhile drop out."""

    def guarded(name: str) -> Callable[[], None]:
        def step() -> None:
            if "failed" not in rows[name]:
                with noting_failure(rows[name]):
                    steps[name]()

        return step

    guards = {name: guarded(name) for name in steps}
    if not guards:
        return {}
    one = sum(s.median for s in measure.interleaved(guards, 1, warmup=1, device=device).values())
    count = max(min(_FEWEST, repeats), min(repeats, int(seconds / max(one, 1e-9))))
    times = measure.interleaved(guards, count, warmup=0, device=device)
    return {name: stats for name, stats in times.items() if "failed" not in rows[name]}


@contextlib.contextmanager
def noting_failure(row: Row) -> Iterator[None]:
    """An exception inside becomes the row's `failed`."""
    try:
        yield
    except UnavailableError as error:
        row["failed"], row["unavailable"] = reason(error), True
    except Exception as error:  # libraries and compilers fail in many ways
        row["failed"] = reason(error)


def reason(error: Exception) -> str:
    """Why something failed, in one line."""
    if isinstance(error, RuntimeError) and out_of_memory(error):
        return OUT_OF_MEMORY
    said = (str(error).strip().splitlines() or [""])[0][:160]
    if isinstance(error, UnavailableError):
        return said
    return f"{'wrong' if isinstance(error, WrongResultError) else type(error).__name__}: {said}"


def free(device: torch.device) -> None:
    """Give back what a finished or failed variant held."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # of a device that is lost: the next variant says so in its row
            torch.cuda.empty_cache()


def compiled(fn: Function, keep_graph: bool = False) -> Function:
    """torch.compile for these sizes alone. Raises, where it would otherwise run a part of it uncompiled.

    `keep_graph`: its backward runs often on one graph, whose buffers must stay.
    """
    import torch._functorch.config as settings

    settings.donated_buffer = not keep_graph
    torch._dynamo.reset()  # or a script of many sizes ends at the limit of recompilations
    return torch.compile(fn, dynamic=False, fullgraph=True)


def shown_bytes(row: Row, figure: str) -> str:
    return format_bytes(row[figure]) if figure in row else "–"


def shown_ratio(row: Row, figure: str) -> str:
    return f"{row[figure]:.3f}" if figure in row else "–"


# --- over cases ---------------------------------------------------------------------------------------------


def sweep(
    cases: Iterable[Any],
    one: Callable[[Any], list[Row]],
    show: Callable[[Any, Row], str],
    save: Callable[[dict[str, Any]], Any],
    budget: float,
    device: torch.device,
) -> dict[str, Any]:
    """Rows of every case (a dataclass), printed as they come and saved after each case.

    No case is begun when `budget` seconds are over; `left_out` names those. A case that fails as a whole has one row.
    """
    start = time.monotonic()
    figures: dict[str, Any] = {"rows": [], "left_out": []}
    for case in cases:
        if figures["rows"] and time.monotonic() - start > budget:
            figures["left_out"].append(str(case))
            continue
        whole: Row = {"variant": EVERY}
        rows = [whole]
        with noting_failure(whole):
            rows = one(case)
        free(device)
        for row in rows:
            print(show(case, row), flush=True)
        figures["rows"] += [{**dataclasses.asdict(case), **row} for row in rows]
        save(figures)
    if figures["left_out"]:
        print(f"left out, for want of time: {'; '.join(figures['left_out'])}", flush=True)
        save(figures)
    return figures


def over(rows: Sequence[Row], figure: str, base: str) -> None:
    """Note each row's figure over that of the variant `base`, as `<figure>_over_<base>`, where there are both."""
    theirs = next((r.get(figure) for r in rows if r["variant"] == base and "failed" not in r), None)
    for row in rows:
        if theirs and row.get(figure) is not None and "failed" not in row:
            row[f"{figure}_over_{base}"] = row[figure] / theirs


def count_wrong(figures: dict[str, Any], ours: Iterable[str]) -> int:
    """How many results of ours failed, but for want of memory or of what they need; others' are theirs to mend."""
    names = {*ours, EVERY}
    failed = [
        r["failed"] for r in figures["rows"] if r["variant"] in names and "failed" in r and "unavailable" not in r
    ]
    return sum(f != OUT_OF_MEMORY for f in failed)


# --- the command line of a benchmark ------------------------------------------------------------------------


def add_options(parser: argparse._ActionsContainer, name: str, repeats: int = 20) -> None:
    parser.add_argument("--quick", action="store_true", help="few sizes, as for `make gpu`")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no case is begun")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each variant, at most")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes long to start")
    parser.add_argument("--out", type=Path, help=f"instead of bench/results/{name}_<device>.json")


def out(options: argparse.Namespace, name: str, device: torch.device, suffix: str = "") -> Path:
    return options.out or common.RESULTS / f"{name}_{common.short_name(device)}{suffix}.json"
