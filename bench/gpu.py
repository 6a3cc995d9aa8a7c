"""Everything there is to learn from a GPU, unattended, in 8 minutes: its tests, then every benchmark at a few sizes.

    make gpu        or        python3 bench/gpu.py [--minutes 8] [--tune] [--only mlp loss]

Runs from the source tree, with python3, torch, triton and pytest, and no network. Where nvcc is, the CUDA extension is
built first, for this device, and its tests run too, once more under compute-sanitizer where that is installed. Each
benchmark is a process of its own with a share of the time: what goes wrong in one, to a hang or a lost device, costs no
other. Each writes its JSON to bench/results/<benchmark>_<device>.json, and all of it (device, versions, commit, tests,
every figure) goes to bench/results/gpu_<device>.json (with the parts in its name, if `--only` some ran), with a short
table to the screen. If the folder $OUT is there, the JSON files and the tests' output are copied to it. Exits with 1
when a test failed, a result was wrong or a benchmark broke.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import attention, common, extension, gpu_tests
from pyckpt.compare.results import OUT_OF_MEMORY

ROOT = common.ROOT
_SHARE_OF_TESTS = 0.55
# Of the tests' time.
_SHARE_OF_BUILD, _SHARE_OF_SANITIZER = 0.4, 0.3


# Starting and ending a process; a benchmark that has overrun its budget by this much more is ended.
_GRACE = 40.0
_USED = 0.9  # of what is left, or the last one would be ended in the middle of a case


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A script's share of the time, against those of the others still to come; its options on a GPU and when tried."""

    share: float
    gpu: tuple[str, ...] = ("--quick",)
    dry: tuple[str, ...] = ("--quick", "--no-compile", "--repeats", "1")


# In this order; what one leaves of its time is the next ones'. torch.compile of a block takes longer than all the rest.
BENCHMARKS = {
    "norm": Benchmark(2.0, gpu=(), dry=("--repeats", "2")),
    "block": Benchmark(1.5, gpu=("--quick", "--no-compile"), dry=("--dry-run", "--no-compile", "--repeats", "1")),
    "mlp": Benchmark(1.5),
    "loss": Benchmark(2.0),
    "attention": Benchmark(3.0, dry=()),
    # Last, until a GPU has run these kernels: a hang would cost the others the device.
    "hopper": Benchmark(1.0, dry=()),
}
_TUNING_SHARE = 2.0
PARTS = ("tests", *BENCHMARKS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--tune", action="store_true", help="time candidate tiles too, with a third of the time")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts, with all the time")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: a few tests and CPU sizes, to try this script"
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() and not options.dry_run:
        print("make gpu needs a CUDA device, and PyTorch sees none here (torch.cuda.is_available() is False)")
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = common.stamp(device)
    print(f"{figures['device']}, torch {torch.__version__}, commit {figures['commit']}", flush=True)
    bad = False
    share = _SHARE_OF_TESTS if len(options.only) > 1 else 0.9
    left_for_tests = share * 60 * options.minutes
    if device.type == "cuda" and {"tests", "norm"} & set(options.only):
        start = time.monotonic()
        figures["extension"] = extension.build(_SHARE_OF_BUILD * left_for_tests)
        left_for_tests -= time.monotonic() - start
        print(f"extension: {figures['extension']}", flush=True)
        bad = figures["extension"].get("reason", extension.NO_NVCC) != extension.NO_NVCC
    if "tests" in options.only:
        sanitized = _SHARE_OF_SANITIZER * left_for_tests if _can_sanitize(device) else 0.0
        figures["tests"] = gpu_tests.run(left_for_tests - sanitized, options.dry_run)
        bad |= gpu_tests.show(figures["tests"])
        if sanitized:
            figures["sanitizer"] = extension.sanitize(sanitized)
            print(f"compute-sanitizer: {figures['sanitizer']}", flush=True)
            bad |= any(said.startswith("exit status") for said in figures["sanitizer"].values())

    folder = Path(tempfile.mkdtemp()) if options.dry_run else common.RESULTS
    short = common.short_name(device)
    parts = "" if set(options.only) == set(PARTS) else "_" + "_".join(p for p in PARTS if p in options.only)
    name = f"gpu_{short}{parts}"
    shares = {b: BENCHMARKS[b].share for b in BENCHMARKS if b in options.only}
    later = sum(shares.values()) + (_TUNING_SHARE if options.tune else 0.0)
    for benchmark, share in shares.items():
        left = deadline - time.monotonic()
        found = run_benchmark(benchmark, _USED * left * share / later, left, folder, device)
        later -= share
        figures[benchmark] = found
        bad |= "broke" in found or _ours_failed(found)
        common.write_to(folder / f"{name}.json", figures)
    if options.tune and device.type == "cuda":
        left = deadline - time.monotonic()
        found = run_script("attention", ("--tune",), 0.8 * left, left, folder / f"attention_tuning_{short}.json")
        figures |= {k: v for k, v in found.items() if k in ("tuned", "broke", "unfinished")}

    path = common.write_to(folder / f"{name}.json", figures)
    if "attention" in figures:
        print("\n".join(summary(figures["attention"])))
    print(f"written to {path}")
    hand_over(path)
    return int(bad)


def _can_sanitize(device: torch.device) -> bool:
    return device.type == "cuda" and extension.is_there() and shutil.which("compute-sanitizer") is not None


def _ours_failed(found: dict[str, Any]) -> bool:
    # Some sizes may be too large for the device; benchmarks of other names for ours say it by their exit status.
    reasons = [r["failed"] for r in found["rows"] if r["variant"] == attention.OURS and "failed" in r]
    return any(r != OUT_OF_MEMORY for r in reasons)


# --- benchmarks ---------------------------------------------------------------------------------------------


def run_benchmark(name: str, budget: float, left: float, folder: Path, device: torch.device) -> dict[str, Any]:
    """What a benchmark found in its budget: `rows`, and `broke` or `unfinished` with the reason if it did not end."""
    if left < _GRACE / 2:
        print(f"\n{name}: not begun, no time is left")
        return {"rows": [], "unfinished": "no time was left"}
    options = BENCHMARKS[name].dry if device.type == "cpu" else BENCHMARKS[name].gpu
    return run_script(name, options, budget, left, folder / f"{name}_{common.short_name(device)}.json")


def run_script(name: str, options: tuple[str, ...], budget: float, left: float, path: Path) -> dict[str, Any]:
    """Run bench/<name>.py, at most until nothing is left of the time; what it wrote up to there is kept in `path`."""
    print(f"\n{name}: {budget:.0f} s", flush=True)
    out = Path(tempfile.mkdtemp()) / path.name  # an older result stays, until there is a new one
    env = {k: v for k, v in os.environ.items() if k not in ("PYCKPT_BACKEND", "TRITON_INTERPRET")}
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), *options]
    command += ["--budget", f"{budget:.0f}", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    ended: dict[str, Any] = {}
    try:
        status = process.wait(max(1.0, min(left, budget + _GRACE)))
        if status:
            ended["broke"] = f"exit status {status}"
    except subprocess.TimeoutExpired:
        ended["unfinished"] = f"ended after {budget + _GRACE:.0f} s"
    finally:
        process.kill()
        process.wait()
    for kind, why in ended.items():
        print(f"{name} {kind}: {why}", flush=True)
    found = {"rows": [], **(json.loads(out.read_text()) if out.exists() else {}), **ended}
    if out.exists():
        hand_over(common.write_to(path, found))
    return found


# --- what is shown and handed over --------------------------------------------------------------------------


def summary(figures: dict[str, Any]) -> list[str]:
    """Ours over the best of the others, case by case."""
    lines = ["", "pyckpt over the others: forward, backward (more than 1 is faster)"]
    rows = [r for r in figures["rows"] if "failed" not in r]
    for ours in (r for r in rows if r["variant"] == attention.OURS):
        same = [r for r in rows if r is not ours and all(r[k] == ours[k] for k in _CASE)]
        ratios = (
            f"{r['variant']} "
            + " ".join(f"{ours[f'{k}_tflops'] / r[f'{k}_tflops']:.2f}" for k in ("forward", "backward"))
            for r in same
        )
        case = attention.Case(**{k: ours[k] for k in _CASE})
        lines.append(f"{case!s}  {'   '.join(ratios)}")
    return lines


_CASE = ("length", "head_dim", "causal", "heads", "kv_heads", "batch")


def hand_over(path: Path) -> None:
    """Copy to $OUT, where the caller asks for results there."""
    folder = os.environ.get("OUT")
    if folder and Path(folder).is_dir():
        shutil.copy(path, folder)


if __name__ == "__main__":
    sys.exit(main())
