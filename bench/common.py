"""What the benchmarks share: where results go, and what is noted beside every figure."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from pyckpt.compare.runner import device_name, versions
from pyckpt.measure.timing import interleaved

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def stamp(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Commit (with "+" when the tree has changes besides results), device, threads, versions and day of a run."""
    return {
        "commit": os.environ.get("PYCKPT_COMMIT") or _commit(),
        "date": datetime.date.today().isoformat(),
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def short_name(device: torch.device) -> str:
    """For a file's name: h100, a100, cpu."""
    if device.type == "cpu":
        return "cpu"
    words = device_name(device).replace("-", " ").split()
    return next((w.lower() for w in words if any(c.isdigit() for c in w)), "gpu")


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write bench/results/<name>.json."""
    return write_to(RESULTS / f"{name}.json", figures)


def write_to(path: Path, figures: dict[str, Any]) -> Path:
    """Write JSON, aside first, so that a reader never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(figures, indent=1) + "\n")
    os.replace(aside, path)
    return path


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def ceiling(device: str) -> float:
    """TFLOP/s of a large matrix product."""
    n = 8192 if device != "cpu" else 1024
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = interleaved({"product": lambda: a @ b}, 20, warmup=5, device=device)["product"].median
    return 2 * n**3 / seconds / 1e12


def _commit() -> str:
    return _git("rev-parse", "--short=12", "HEAD") + ("+" if _changed() else "")


def _changed() -> bool:
    lines = _git("status", "--porcelain", "--untracked-files=no").splitlines()
    return any("bench/results/" not in line for line in lines)


def _git(*args: str) -> str:
    try:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
