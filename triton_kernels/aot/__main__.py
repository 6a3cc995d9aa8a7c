"""Compile the kernels for GPUs that are not here, and report what the compiler made of them.

    python -m pyckpt.triton_kernels.aot                      # every kernel, dtype and tuned configuration
    python -m pyckpt.triton_kernels.aot --arch sm_90 --quick # the ones that matter most, for one architecture
    python -m pyckpt.triton_kernels.aot --family pointwise   # one family of kernels

Prints a line a kernel: registers, spilled bytes and stack a thread, shared memory, the matrix unit in use, and the
programs that fit on one multiprocessor. Exits with 1 where `Report.problems` finds any. Needs no GPU and no driver.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import triton

from . import attention, fused, hopper, loss, pointwise
from .compile import ARCHS, HEADER, Case, Report, run

# Each has cases(arch, quick): every kernel, dtype and configuration that ships; quick, those that matter most.
FAMILIES = {"attention": attention, "hopper": hopper, "pointwise": pointwise, "loss": loss, "fused": fused}


def cases(archs: Iterable[str] = ARCHS, quick: bool = False, families: Iterable[str] = FAMILIES) -> Iterator[Case]:
    for arch in archs:
        for family in families:
            yield from FAMILIES[family].cases(arch, quick)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only this one (may be repeated)")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only these kernels (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="only the usual dims in bf16")
    parser.add_argument("--json", type=Path, help="write the reports to this file too")
    options = parser.parse_args(argv)
    wanted = list(cases(options.arch or ARCHS, options.quick, options.family or FAMILIES))
    print(f"Triton {triton.__version__}: {len(wanted)} kernels\n{HEADER}")
    reports, problems = [], 0
    for report in run(wanted):
        reports.append(report)
        print(report.line(), flush=True)
        for problem in report.problems():
            problems += 1
            print(f"  !! {problem}", flush=True)
    if options.json:
        _write(options.json, reports)
    print(f"{len(reports)} kernels compiled, {problems} problems")
    return 1 if problems else 0


def _write(path: Path, reports: list[Report]) -> None:
    figures = ("registers", "spilled", "stack", "shared", "unit", "programs", "narrow", "serialized", "looped")
    rows = [{"family": _family(r.case), **r.case.record(), **{f: getattr(r, f) for f in figures}} for r in reports]
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    os.replace(aside, path)


def _family(case: Case) -> str:
    return next(name for name, module in FAMILIES.items() if type(case).__module__ == module.__name__)


if __name__ == "__main__":
    sys.exit(main())
