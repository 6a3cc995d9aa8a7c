"""The tests that need a GPU, dealt out to processes; none takes others with it when it crashes, hangs or loses the GPU.

A process runs its share in order and keeps a journal (bench/journal.py). One that ends early, or whose test takes too
long, is ended, the test counts as failed, and the rest of the share goes to a new process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench import common, extension, journal

# Tests whose kernels run on the GPU; they need nothing but pytest.
TESTS = (
    "tests/test_triton_attention.py",
    "tests/test_triton_pointwise.py",
    "tests/test_fused_ops.py",
    "tests/test_fused_block.py",
    "tests/test_products.py",
    "tests/test_gpu.py",
    "tests/test_hopper.py",  # last, until a GPU has run these kernels: one that hangs takes time from all beside it
)
# pyproject.toml's options name plugins that may be missing here.
PYTEST = ("-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short")
# Compiling the kernels is most of the tests' time, so they are dealt out to processes.
_WORKERS = 12
_LONGEST = 90.0  # seconds of one test, the compiling of its kernels included
_LOOK = 0.2


def run(seconds: float, dry_run: bool = False) -> dict[str, Any]:
    """Run the GPU tests in several processes for at most this long."""
    start = time.monotonic()
    names = collect(dry_run)
    count = max(1, min(_WORKERS, os.cpu_count() or 1, len(names)))
    folder = Path(tempfile.mkdtemp())
    shares = [Share(names[i::count], folder / f"journal_{i}.jsonl", start + seconds) for i in range(count)]
    for share in shares:
        share.start()
    for share in shares:
        share.join()
    ended = [line for share in shares for line in share.ended()]
    counts = Counter(line["outcome"] for line in ended)
    failed = [line for line in ended if line["outcome"] == "failed"]
    slowest = sorted(ended, key=lambda line: -line["seconds"])[:10]
    return {
        **{k: counts[k] for k in ("passed", "failed", "skipped")},
        "collected": len(names),
        "not_run": len(names) - len(ended),
        "failures": {line["test"]: line["text"] for line in failed},
        "slowest": {line["test"]: line["seconds"] for line in slowest},
        "seconds": time.monotonic() - start,
    }


def show(tests: dict[str, Any]) -> bool:
    """Print how the tests went; whether any failed, none passed or some were not run."""
    counts = ", ".join(f"{tests[k]} {k}" for k in ("passed", "failed", "skipped"))
    print(f"tests: {counts} of {tests['collected']}, in {tests['seconds']:.0f} s")
    if tests["not_run"]:
        print(f"  {tests['not_run']} were not run: the time was over")
    for name, text in tests["failures"].items():
        said = [line for line in text.splitlines() if line.startswith("E  ")] or text.splitlines()[-1:]
        print(f"  FAILED {name}\n      {' '.join(said[:1])[:200]}")
    return bool(tests["failures"] or tests["not_run"] or not tests["passed"])


class Share(threading.Thread):
    """Some tests, in one process after another until all have ended or the time is over."""

    def __init__(self, names: list[str], path: Path, deadline: float) -> None:
        super().__init__(daemon=True)
        self.names, self.path, self.deadline = names, path, deadline
        self._broken: dict[str, str] = {}  # tests that never ended: why

    def run(self) -> None:
        left = self.names
        while left and time.monotonic() < self.deadline:
            why = self._process(left)
            begun = [line["test"] for line in journal.read(self.path) if line["outcome"] == "begun"]
            done = {line["test"] for line in self.ended()}
            under_way = [t for t in begun if t not in done]
            if why and under_way and time.monotonic() < self.deadline:
                self._broken[under_way[-1]] = why
                done.add(under_way[-1])
            elif why and not done & set(left):  # not even begun: a test file that does not import, say
                self._broken |= dict.fromkeys(left, why)
            left = [t for t in left if t not in done and t not in self._broken] if why else []

    def ended(self) -> list[dict[str, Any]]:
        lines = [line for line in journal.read(self.path) if line["outcome"] != "begun"]
        return lines + [
            {"test": t, "outcome": "failed", "seconds": 0.0, "text": why} for t, why in self._broken.items()
        ]

    def _process(self, names: list[str]) -> str | None:
        """Run these; why it ended early, if it did."""
        env = {k: v for k, v in os.environ.items() if k not in ("PYCKPT_BACKEND", "TRITON_INTERPRET")}
        env |= {"PYTHONPATH": _path(), "OMP_NUM_THREADS": "1", journal.FILE: str(self.path)}
        command = [sys.executable, *PYTEST, "-p", "bench.journal", *names]
        log = self.path.with_suffix(".txt")
        with log.open("w") as out:
            process = subprocess.Popen(command, cwd=common.ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            return self._watch(process) or _why(process.returncode, log)
        finally:
            process.kill()
            process.wait()

    def _watch(self, process: subprocess.Popen[bytes]) -> str | None:
        changed, size = time.monotonic(), -1
        while process.poll() is None:
            now = time.monotonic()
            if self.path.exists() and self.path.stat().st_size != size:
                changed, size = now, self.path.stat().st_size
            if now > self.deadline:
                return "the time was over"
            if now - changed > _LONGEST:
                return f"not ended within {_LONGEST:.0f} s"
            time.sleep(_LOOK)
        return None


def _why(status: int | None, log: Path) -> str | None:
    """Why a process of pytest ended with that status; None where all its tests ran."""
    return None if status in (0, 1) else f"exit status {status}: {log.read_text()[-1500:]}"


def _path() -> str:
    """The source tree first, before what the caller has."""
    return os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))


def collect(dry_run: bool) -> list[str]:
    """The tests' names."""
    command = [sys.executable, *PYTEST, "--collect-only", *(("-k", "TestBadInput") if dry_run else ()), *TESTS]
    if not dry_run and extension.is_there():
        command.append(extension.TESTS)
    done = subprocess.run(
        command, cwd=common.ROOT, env={**os.environ, "PYTHONPATH": _path()}, capture_output=True, text=True
    )
    names = [line for line in done.stdout.splitlines() if "::" in line and " " not in line.split("[", 1)[0]]
    if not names:
        raise RuntimeError(f"pytest found no tests:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return names
