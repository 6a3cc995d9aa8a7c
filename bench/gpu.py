"""Everything there is to learn from a GPU, unattended, in 8 minutes: its tests, then norms and attention timed.

    make gpu        or        python3 bench/gpu.py [--minutes 8] [--tune]

Runs from the source tree, with python3, torch, triton and pytest, and no network. Writes one JSON (device, versions,
commit, tests, every figure) to bench/results/gpu_<device>.json, and a short table to the screen. If the folder $OUT
is there, the JSON and the tests' output are copied to it. Exits with 1 when a test failed or a result was wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import attention, common, norm

ROOT = common.ROOT
# Tests whose kernels run on the GPU; they need nothing but pytest.
TESTS = ("tests/test_triton_attention.py", "tests/test_triton_pointwise.py")
# pyproject.toml's options name plugins that may be missing here.
PYTEST = ("-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short")
# Compiling the kernels is most of the tests' time, so they are dealt out to processes.
_WORKERS = 12
_SHARE_OF_TESTS = 0.55


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--tune", action="store_true", help="time candidate tiles too, with a third of the time")
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

    figures["tests"] = run_tests(_SHARE_OF_TESTS * 60 * options.minutes, options.dry_run)
    tests = figures["tests"]
    counts = ", ".join(f"{tests[k]} {k}" for k in ("passed", "failed", "skipped"))
    print(f"tests: {counts} of {tests['collected']}, in {tests['seconds']:.0f} s")
    if tests["unfinished"]:
        print(f"  {tests['unfinished']} processes of tests ran out of time and were ended")
    for name in tests["failures"]:
        print(f"  FAILED {name}")

    if device.type == "cpu" or deadline - time.monotonic() > 60:  # a few seconds, but for what torch.compile takes
        figures["norm"] = norm.run(device.type)
    left = deadline - time.monotonic()
    share = 0.6 if options.tune else 0.9
    which = "cpu" if device.type == "cpu" else "quick"
    figures["attention"] = attention.run(which, flex=True, budget=share * left, device=device.type)
    if options.tune and device.type == "cuda":
        figures |= attention.tune(0.9 * (deadline - time.monotonic()))

    name = f"gpu_{common.short_name(device)}"
    path = Path(tempfile.mkdtemp()) / f"{name}.json" if options.dry_run else common.RESULTS / f"{name}.json"
    common.write_to(path, figures)
    print("\n".join(summary(figures["attention"])))
    print(f"written to {path}")
    hand_over(path)
    rows = [*figures["attention"]["rows"], *figures.get("norm", {}).get("rows", ())]
    wrong = any(r["variant"] == attention.OURS and "failed" in r for r in rows)
    return int(bool(tests["failed"] or tests["unfinished"] or not tests["passed"] or wrong))


# --- tests --------------------------------------------------------------------------------------------------


def run_tests(seconds: float, dry_run: bool = False) -> dict[str, Any]:
    """Run the GPU tests in several processes for at most this long."""
    start = time.monotonic()
    names = collect(dry_run)
    workers = max(1, min(_WORKERS, os.cpu_count() or 1, len(names)))
    env = {k: v for k, v in os.environ.items() if k not in ("PYCKPT_BACKEND", "TRITON_INTERPRET")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    logs = [Path(tempfile.mkdtemp()) / f"tests_{i}.txt" for i in range(workers)]
    running = []
    for i, log in enumerate(logs):
        command = [sys.executable, *PYTEST, "-rfE", *names[i::workers]]
        with log.open("w") as out:
            running.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT))
    unfinished = 0
    for process in running:
        try:
            process.wait(max(1.0, start + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            unfinished += 1
    text = "\n".join(log.read_text() for log in logs)
    (logs[0].parent / "tests.txt").write_text(text)
    hand_over(logs[0].parent / "tests.txt")
    counts = {k: sum(map(int, re.findall(rf"(\d+) {k}", text))) for k in ("passed", "failed", "skipped")}
    # A process that was killed leaves no last line.
    return {
        **counts,
        "collected": len(names),
        "unfinished": unfinished,
        "failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE),
        "seconds": time.monotonic() - start,
    }


def collect(dry_run: bool) -> list[str]:
    command = [sys.executable, *PYTEST, "--collect-only", *(("-k", "TestBadInput") if dry_run else ()), *TESTS]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    names = [line for line in done.stdout.splitlines() if "::" in line and " " not in line.split("[", 1)[0]]
    if not names:
        raise RuntimeError(f"pytest found no tests:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return names


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
