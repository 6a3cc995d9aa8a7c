"""What pyckpt finds on this machine: versions, devices, and which backend serves each op and why."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pyckpt._version import __version__

Row = tuple[str, str]
Section = tuple[str, list[Row]]

WIDTH = 80
_EXTRAS = {
    "transformers": "hf",
    "safetensors": "hf",
    "tokenizers": "hf",
    "numpy": "train",
    "matplotlib": "train",
    "rich": "train",
    "typer": "train",
}
_VARIABLES = (
    "PYCKPT_BACKEND",
    "PYCKPT_CPU_ISA",
    "PYCKPT_ATTENTION",
    "PYCKPT_FUSED",
    "PYCKPT_AUTOTUNE",
    "PYCKPT_CACHE_DIR",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
_OPS_ON = "Ops on "


def report() -> list[Section]:
    """Everything found, as (section, [(name, value), ...]); what is missing is said in a row, not raised.

    The sections "Ops on cpu" and "Ops on cuda" have one row an op: (op, "backend: reason").
    """
    return [
        ("Versions", [*_versions()]),
        ("Devices", [*_devices()]),
        ("Settings", [*_settings()]),
        (f"{_OPS_ON}cpu", [*_ops("cpu")]),
        (f"{_OPS_ON}cuda", [*_ops("cuda")]),
    ]


def main_text() -> str:
    """The report as plain text of at most 80 columns, with a newline at the end."""
    lines: list[str] = []
    for title, rows in report():
        note = "" if title != f"{_OPS_ON}cuda" or torch.cuda.is_available() else " (what they would use: none here)"
        lines += [f"{title}{note}"]
        lines += _grouped(rows) if title.startswith(_OPS_ON) else _table(rows)
        lines += [""]
    return "\n".join(lines)


def _versions() -> Iterator[Row]:
    yield "pyckpt", f"{__version__}, {_how_installed()}"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__}, {_torch_build()}"
    yield "triton", _package_version("triton", missing="not installed: no Triton kernels")
    for name, extra in _EXTRAS.items():
        yield name, _package_version(name, missing=f"not installed: pip install 'pyckpt[{extra}]'")
    yield "nvcc", _nvcc_version()


def _how_installed() -> str:
    from pyckpt._source_tree import source_root

    root = source_root()
    try:
        version("pyckpt")
    except PackageNotFoundError:
        return f"run from its source tree in {root}"
    return f"source tree in {root}" if root else "installed"


def _torch_build() -> str:
    if torch.version.cuda:
        return f"built with CUDA {torch.version.cuda}"
    hip = getattr(torch.version, "hip", None)
    return f"built with ROCm {hip}" if hip else "built without CUDA"


def _package_version(name: str, missing: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return missing


def _nvcc_version() -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None) or shutil.which("nvcc")
    if nvcc is None:
        return "not found; needed only to build the CUDA extension"
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"found, but does not run: {error}"
    release = re.search(r"release ([\d.]+)", said)
    return release.group(1) if release else "found, version unknown"


def _devices() -> Iterator[Row]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cpu", f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores, {_memory()}"
    yield "threads", f"{torch.get_num_threads()} in an op, {torch.get_num_interop_threads()} between ops"
    if not torch.cuda.is_available():
        yield (
            "cuda",
            "none: " + ("no device found" if torch.version.cuda else "this PyTorch is built without CUDA"),
        )
        return
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{p.name}, sm_{p.major}{p.minor}, {_gib(p.total_memory)}"


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f"{_gib(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} of memory"
    except (AttributeError, OSError, ValueError):
        return "memory unknown"


def _gib(n: int) -> str:
    return f"{n / 2**30:.1f} GiB"


def _settings() -> Iterator[Row]:
    yield "CPU kernels", _cpu_kernels()
    yield "CUDA extension", _cuda_extension()
    for name in _VARIABLES:
        yield name, os.environ.get(name, "not set")


def _cpu_kernels() -> str:
    from pyckpt.ops.cpu_library import library

    if not library.problem:
        return f"built for {', '.join(library.instruction_sets)}"
    # Not by the import system: a source tree beside an install that is editable would be told of that one's file.
    return _extension(
        "cpu_extensions", "cpu_reason", "pyckpt._cpu", lambda name: library.path.is_file(), library.problem
    )


def _cuda_extension() -> str:
    from pyckpt.ops import cuda_backend

    def found(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    text = _extension("cuda_extensions", "reason", cuda_backend.MODULE, found, cuda_backend.problem)
    if cuda_backend.problem or not torch.cuda.is_available():
        return text
    devices = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return "; ".join([text, *filter(None, map(cuda_backend.problem_on, devices))])


def _extension(names_key: str, reason_key: str, module: str, found: Callable[[str], bool], problem: str) -> str:
    """Whether an extension is there, with the reason that setup.py recorded when pyckpt was installed."""
    record = Path(__file__).with_name("_build.json")
    lost = f"; it does not load: {problem}" if problem else ""
    try:
        built = json.loads(record.read_text(encoding="utf-8"))
        names, reason = list(built[names_key]), str(built[reason_key])
    except FileNotFoundError:
        if found(module):
            return f"built in place{lost}"
        return "not built: pyckpt was not installed, only its source tree is on the path"
    except (OSError, ValueError, KeyError, TypeError):
        return f"unknown: {record} cannot be read; install pyckpt again"
    if not names:
        return f"not built: {reason}"
    gone = [name for name in names if not found(name)]
    if gone:
        return f"built, but {', '.join(gone)} is not found; install pyckpt again"
    return f"built: {reason}{lost}"


def _ops(device_type: str) -> Iterator[Row]:
    import pyckpt.ops  # noqa: F401  (declares every op)
    from pyckpt.ops import registry

    for name in sorted(registry.IMPLEMENTATIONS):
        try:
            backend, reason = registry.choose(name, device_type)
        except (RuntimeError, ValueError) as error:
            backend, reason = "none", str(error)
        yield name, f"{backend}: {reason}"


def _table(rows: list[Row]) -> list[str]:
    """Rows as two columns, the second wrapped under itself."""
    column = max(len(name) for name, _ in rows) + 4
    return [line for name, value in rows for line in _wrap(value, f"  {name}".ljust(column), " " * column)]


def _grouped(rows: list[Row]) -> list[str]:
    """Rows of the same value under one line with that value: most ops share a backend and a reason."""
    names: dict[str, list[str]] = {}
    for name, value in rows:
        names.setdefault(value, []).append(name)
    lines: list[str] = []
    for value, group in names.items():
        lines += _wrap(value, "  ", "    ") + _wrap(", ".join(group), "    ", "    ")
    return lines or ["  none"]


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False) or [
        first.rstrip()
    ]


if __name__ == "__main__":
    sys.stdout.write(main_text())
