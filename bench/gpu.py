"""Everything there is to learn from a GPU, unattended, in 8 minutes: its tests, then every benchmark at a few sizes.

    make gpu        or        python3 bench/gpu.py [--minutes 8] [--tune] [--only mlp loss]

Runs from the source tree, with python3, torch, triton and pytest, and no network. Where nvcc is, the CUDA extension is
built first, for this device, and its tests run too, once more under compute-sanitizer where that is installed. Each
benchmark is a process of its own with a share of the time: what goes wrong in one, to a hang or a lost device, costs no
other. Each writes its JSON to bench/results/<benchmark>_<device>.json, and all of it (device, versions, commit, tests,
every figure) goes to bench/results/gpu_<device>.json (with the parts in its name, if `--only` some ran), with a short
table to the screen. torch.compile, which takes longer than all else, is left out. If the folder $OUT is there, the JSON
files are copied to it. Both are done after every part, and while the tests run. Exits with 1 when a test failed, a
result was wrong or anything broke, and on SIGTERM with 143, its processes ended and what it found left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
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
_OVER = 20.0  # seconds past the end after which this script ends whatever it waits for
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LONGEST_TEXT = 6000


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A script's share of the time, against those of the others still to come; its options on a GPU and when tried."""

    share: float
    gpu: tuple[str, ...] = ("--quick", "--no-compile")
    dry: tuple[str, ...] = ("--quick", "--no-compile", "--repeats", "1")


# In this order; what one leaves of its time is the next ones'. torch.compile takes longer than all the rest, and a case
# that it makes too long for the budget is lost as a whole.
BENCHMARKS = {
    "norm": Benchmark(2.0, gpu=("--no-compile",), dry=("--repeats", "2")),
    "block": Benchmark(1.5, dry=("--dry-run", "--no-compile", "--repeats", "1")),
    "mlp": Benchmark(1.5),
    "loss": Benchmark(2.0),
    "attention": Benchmark(3.0, gpu=("--quick", "--no-flex"), dry=()),
    # Last, until a GPU has run these kernels: a hang would cost the others the device.
    "hopper": Benchmark(1.0, gpu=("--quick",), dry=()),
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
    extension.begin()
    with _Run(options) as run:
        try:
            with _signals():
                run.all()
        except _Signalled as asked:
            run.stop(f"signal {asked.number}")
            return 128 + asked.number
    return int(run.bad)


class _Signalled(BaseException):
    """A signal asked this script to end; its processes have ended."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Signals end every process, which a terminal's Ctrl-C does not reach, and raise `_Signalled`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def asked(number: int, frame: object) -> None:
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        extension.end_all()
        raise _Signalled(number)

    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, asked) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """All parts, one after another, and what they found: left behind after each, whatever becomes of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.bad = options, False
        self.seconds = 60 * options.minutes
        self.deadline = time.monotonic() + self.seconds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.figures: dict[str, Any] = {}
        self.folder = Path(tempfile.mkdtemp()) if options.dry_run else common.RESULTS
        parts = "" if set(options.only) == set(PARTS) else "_" + "_".join(p for p in PARTS if p in options.only)
        try:
            self.short = common.short_name(self.device)
        except Exception:  # a lost device: the parts will say so
            self.short = "gpu"
        self.path = self.folder / f"gpu_{self.short}{parts}.json"
        self._lock = threading.RLock()
        self._watch = threading.Timer(self.seconds + _OVER, self._overrun)
        self._watch.daemon = True

    def __enter__(self) -> _Run:
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.cancel()

    def all(self) -> None:
        only, device, short = self.options.only, self.device, self.short
        with self._part(None):
            self.figures |= common.stamp(device)
            print(f"{self.figures['device']}, torch {torch.__version__}, commit {self.figures['commit']}", flush=True)
        self._first()
        shares = {b: BENCHMARKS[b].share for b in BENCHMARKS if b in only}
        later = sum(shares.values()) + (_TUNING_SHARE if self.options.tune else 0.0)
        for benchmark, share in shares.items():
            left = self.deadline - time.monotonic()
            with self._part(benchmark, rows=[]) as found:
                run_benchmark(benchmark, _USED * left * share / later, left, self.folder, device, found)
                self.bad |= "broke" in found or _ours_failed(found)
            later -= share
        if self.options.tune and device.type == "cuda":
            with self._part(None):
                left = self.deadline - time.monotonic()
                out = self.folder / f"attention_tuning_{short}.json"
                found = run_script("attention", ("--tune",), 0.8 * left, left, out)
                self.figures |= {k: v for k, v in found.items() if k in ("tuned", "broke", "unfinished")}
        with self._part(None):
            if "attention" in self.figures:
                print("\n".join(summary(self.figures["attention"])))
        print(f"written to {self.path}")

    def _first(self) -> None:
        """The extension and the tests."""
        only = self.options.only
        left = (_SHARE_OF_TESTS if len(only) > 1 else 0.9) * self.seconds
        start = time.monotonic()
        if self.device.type == "cuda" and {"tests", "norm"} & set(only):
            with self._part("extension") as found:
                found |= extension.build(_SHARE_OF_BUILD * left)
                print(f"extension: {found}", flush=True)
                self.bad |= found.get("reason", extension.NO_NVCC) != extension.NO_NVCC
        if "tests" not in only:
            return
        left = max(0.0, left - (time.monotonic() - start))
        sanitized = _SHARE_OF_SANITIZER * left if self._can_sanitize() else 0.0
        with self._part("tests") as found:
            gpu_tests.run(left - sanitized, self.options.dry_run, found, self.leave)
            self.bad |= gpu_tests.show(found)
        if sanitized:
            with self._part("sanitizer") as found:
                found |= extension.sanitize(sanitized)
                print(f"compute-sanitizer: {found}", flush=True)
                self.bad |= any(said.startswith("exit status") for said in found.values())

    def _can_sanitize(self) -> bool:
        if self.device.type != "cuda":
            return False
        missing = "no extension" if not extension.is_there() else None if extension.sanitizer() else "no such program"
        if missing:
            self.figures["sanitizer"] = {"unavailable": missing}
            print(f"compute-sanitizer: {missing}", flush=True)
        return missing is None

    @contextlib.contextmanager
    def _part(self, name: str | None, **found: Any) -> Iterator[dict[str, Any]]:
        """What a part found, for it to fill in. An exception breaks this part alone."""
        into = self.figures if name is None else self.figures.setdefault(name, found)
        try:
            yield into
        except Exception:
            into["broke"] = traceback.format_exc()[-_LONGEST_TEXT:]
            self.bad = True
            print(f"{name or 'make gpu'} broke:\n{into['broke']}", flush=True)
        self.leave()

    def leave(self) -> None:
        """Write what there is so far, and hand it over; no part is lost to a disk that is full."""
        with self._lock:
            try:
                hand_over(common.write_to(self.path, self.figures))
            except Exception:
                self.bad = True
                traceback.print_exc()

    def stop(self, why: str) -> None:
        self.bad = True
        self.figures["unfinished"] = why
        print(f"\nended: {why}", flush=True)
        self.leave()

    def _overrun(self) -> None:
        """In a thread of its own: this script waits for something that does not end."""
        extension.end_all()
        threading.Timer(_OVER, os._exit, (1,)).start()  # should the disk be what it waits for
        self.stop(f"this script had not ended after {self.seconds + _OVER:.0f} s")
        sys.stdout.flush()
        os._exit(1)


def _ours_failed(found: dict[str, Any]) -> bool:
    # Some sizes may be too large for the device; benchmarks of other names for ours say it by their exit status.
    reasons = [r["failed"] for r in found["rows"] if r["variant"] == attention.OURS and "failed" in r]
    return any(r != OUT_OF_MEMORY for r in reasons)


# --- benchmarks ---------------------------------------------------------------------------------------------


def run_benchmark(
    name: str, budget: float, left: float, folder: Path, device: torch.device, found: dict[str, Any]
) -> None:
    """What a benchmark found in its budget: `rows`, and `broke` or `unfinished` with the reason if it did not end."""
    if left < _GRACE / 2:
        print(f"\n{name}: not begun, no time is left")
        found |= {"rows": [], "unfinished": "no time was left"}
        return
    options = BENCHMARKS[name].dry if device.type == "cpu" else BENCHMARKS[name].gpu
    run_script(name, options, budget, left, folder / f"{name}_{common.short_name(device)}.json", found)


def run_script(
    name: str, options: tuple[str, ...], budget: float, left: float, path: Path, found: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run bench/<name>.py, at most until nothing is left of the time; what it wrote up to there is kept in `path`.

    And in `found`, also when a signal ends this.
    """
    found = {} if found is None else found
    print(f"\n{name}: {budget:.0f} s", flush=True)
    out = Path(tempfile.mkdtemp()) / path.name  # an older result stays, until there is a new one
    env = {k: v for k, v in os.environ.items() if k not in ("PYCKPT_BACKEND", "TRITON_INTERPRET")}
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), *options]
    command += ["--budget", f"{budget:.0f}", "--out", str(out)]
    process = extension.start(command, env, ROOT)
    ended: dict[str, Any] = {}
    try:
        status = process.wait(max(1.0, min(left, budget + _GRACE)))
        if status:
            ended["broke"] = f"exit status {status}"
    except subprocess.TimeoutExpired:
        ended["unfinished"] = f"ended after {budget + _GRACE:.0f} s"
    except _Signalled as asked:
        ended["unfinished"] = str(asked)
        raise
    finally:
        extension.end(process)
        for kind, why in ended.items():
            print(f"{name} {kind}: {why}", flush=True)
        written = _read(out, ended)
        found |= {"rows": [], **written, **ended}
        if written:
            hand_over(common.write_to(path, found))
    return found


def _read(out: Path, ended: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(out.read_text())) if out.exists() else {}
    except ValueError as error:
        ended.setdefault("broke", f"what it wrote is no JSON: {error}")
        return {}


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
    """Copy to $OUT, where the caller asks for results there; aside first, so that none is found half there."""
    folder = os.environ.get("OUT")
    if folder and Path(folder).is_dir():
        aside = Path(folder) / f".{path.name}.tmp"
        shutil.copy(path, aside)
        os.replace(aside, Path(folder) / path.name)


if __name__ == "__main__":
    sys.exit(main())
