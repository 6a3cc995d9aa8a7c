"""The tests that need a GPU, dealt out to processes; none takes others with it when it crashes, hangs or loses the GPU.

A process runs its share in order and keeps a journal (bench/journal.py). One that ends early, or whose test takes too
long, is ended with all that it started, the test counts as failed, and the rest of the share goes to a new process. A
file that cannot be collected is a failed test too. Nothing is waited for without a limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import extension, journal

# Tests whose kernels run on the GPU, in this order; they need nothing but pytest. Each is collected by itself, with the
# options that follow it. First what no GPU has confirmed yet, after the extension's own first.
TESTS = (
    "tests/test_hopper.py",
    "tests/test_offload.py -m gpu",
    "tests/test_store.py -m gpu",
    "tests/test_gpu.py",
    "tests/test_fused_block.py",
    "tests/test_triton_attention.py",
    "tests/test_triton_pointwise.py",
    "tests/test_products.py",
    "tests/test_fused_ops.py",
)
# pyproject.toml's options name plugins that may be missing here.
PYTEST = ("-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short")
# Compiling the kernels is most of the tests' time, so they are dealt out to processes.
_WORKERS = 12
_LONGEST = 90.0  # seconds of one test, the compiling of its kernels included
# Of those whose kernels wait for events, and may hang: every process has some of them, and would lose its time to one.
_LONGEST_OF = {"tests/test_hopper.py": 60.0}
_COLLECTING = 90.0  # seconds to collect a file's
_LOOK = 0.2
_KEEP = 10.0  # seconds between what is kept while they run
_NONE = 5  # pytest's exit status where it found no tests


def run(
    seconds: float,
    dry_run: bool = False,
    found: dict[str, Any] | None = None,
    keep: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Run the GPU tests in several processes for at most this long.

    What is known is in `found` all the time, also when this is interrupted; `keep` is called now and then.
    """
    found = {} if found is None else found
    start = time.monotonic()
    deadline = start + seconds
    names, broken = collect(deadline, dry_run)
    count = max(1, min(_WORKERS, os.cpu_count() or 1, len(names)))
    folder = Path(tempfile.mkdtemp())
    shares = [Share(names[i::count], folder / f"journal_{i}.jsonl", deadline) for i in range(count)]
    for share in shares:
        share.start()
    last = deadline + 2 * extension.PATIENCE  # a share ends its process at the deadline
    try:
        for share in shares:
            while share.is_alive() and time.monotonic() < last:
                share.join(min(_KEEP, max(0.0, last - time.monotonic())))
                found.update(_figures(names, broken, shares, start))
                keep()
    finally:
        found.update(_figures(names, broken, shares, start))
    return found


def _figures(names: list[str], broken: dict[str, str], shares: list[Share], start: float) -> dict[str, Any]:
    ended = [line for share in shares for line in share.ended()]
    counts = Counter(line["outcome"] for line in ended)
    counts["failed"] += len(broken)
    failed = [line for line in ended if line["outcome"] == "failed"]
    slowest = sorted(ended, key=lambda line: -line["seconds"])[:10]
    return {
        **{k: counts[k] for k in ("passed", "failed", "skipped")},
        "collected": len(names) + len(broken),
        "not_run": len(names) - len(ended),
        "failures": broken | {line["test"]: line["text"] for line in failed},
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
        try:
            self._run()
        except extension.StoppedError:
            pass
        except Exception:
            done = {line["test"] for line in self.ended()}
            self._broken |= dict.fromkeys((t for t in self.names if t not in done), traceback.format_exc())

    def _run(self) -> None:
        left = self.names
        while left and time.monotonic() < self.deadline:
            why = self._process(left)
            begun = [line["test"] for line in journal.read(self.path) if line["outcome"] == "begun"]
            done = {line["test"] for line in self.ended()}
            under_way = [t for t in begun if t not in done]
            if time.monotonic() >= self.deadline:
                return
            if why and under_way:
                hung = under_way[-1]
                self._broken[hung] = why
                done.add(hung)
            elif why and not done & set(left):  # not even begun: a test file that does not import, say
                self._broken |= dict.fromkeys(left, why)
            left = [t for t in left if t not in done and t not in self._broken] if why else []
            if begun:  # those beside it may hang or lose the device as well, and would take the time of all others
                left = sorted(left, key=lambda t: t.split("::")[0] == begun[-1].split("::")[0])

    def ended(self) -> list[dict[str, Any]]:
        lines = [line for line in journal.read(self.path) if line["outcome"] != "begun"]
        return lines + [
            {"test": t, "outcome": "failed", "seconds": 0.0, "text": why} for t, why in dict(self._broken).items()
        ]

    def _process(self, names: list[str]) -> str | None:
        """Run these; why it ended early, if it did."""
        env = extension.environment() | {"OMP_NUM_THREADS": "1", journal.FILE: str(self.path)}
        command = [sys.executable, *PYTEST, "-p", "bench.journal", *names]
        log = self.path.with_suffix(".txt")
        with log.open("w") as out:
            process = extension.start(command, env, stdout=out, stderr=subprocess.STDOUT)
        try:
            return self._watch(process) or _why(process.returncode, log)
        finally:
            extension.end(process)

    def _watch(self, process: subprocess.Popen[bytes]) -> str | None:
        changed, size, longest = time.monotonic(), -1, _LONGEST
        while process.poll() is None:
            now = time.monotonic()
            if self.path.exists() and self.path.stat().st_size != size:
                changed, size, longest = now, self.path.stat().st_size, self._longest()
            if now > self.deadline:
                return "the time was over"
            if now - changed > longest:
                return f"not ended within {longest:.0f} s"
            time.sleep(_LOOK)
        return None

    def _longest(self) -> float:
        """What the test under way may take; between two, the process as such."""
        last = journal.read(self.path)[-1:]
        under_way = last[0]["test"].split("::")[0] if last and last[0]["outcome"] == "begun" else ""
        return _LONGEST_OF.get(under_way, _LONGEST)


def _why(status: int | None, log: Path) -> str | None:
    """Why a process of pytest ended with that status; None where all its tests ran."""
    return None if status in (0, 1) else f"exit status {status}: {log.read_text(errors='replace')[-1500:]}"


def collect(deadline: float, dry_run: bool) -> tuple[list[str], dict[str, str]]:
    """The tests' names, and why files could not be collected."""
    wanted = [*TESTS]
    if not dry_run and extension.is_there():
        wanted = [*extension.ON_THE_DEVICE, *TESTS, extension.TESTS]
    with ThreadPoolExecutor(min(len(wanted), os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda file: _collect(file, deadline, dry_run), wanted))
    names = list(dict.fromkeys(name for names, _ in found for name in names))
    return names, {file: why for file, (_, why) in zip(wanted, found, strict=True) if why}


def _collect(file: str, deadline: float, dry_run: bool) -> tuple[list[str], str | None]:
    command = [sys.executable, *PYTEST, "--collect-only", *(("-k", "TestBadInput") if dry_run else ()), *file.split()]
    seconds = min(_COLLECTING, max(0.0, deadline - time.monotonic()))
    status, said, errors = extension.run(command, seconds, extension.environment())
    names = [line for line in said.splitlines() if "::" in line and " " not in line.split("[", 1)[0]]
    if status == 0 or (status == _NONE and dry_run):
        return names, None
    why = f"not collected within {seconds:.0f} s" if status is None else f"not collected: exit status {status}"
    return names, f"{said[-4000:]}{errors[-2000:]}\n{why}"
