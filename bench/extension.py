"""The CUDA C++ extension on a machine with a GPU: built for that GPU, and its tests under compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from types import ModuleType
from typing import Any

import torch

from bench import common

TESTS = "tests/test_cuda_kernels.py"
NO_NVCC = "no nvcc"
TOOLS = ("memcheck", "racecheck")
# Every kernel with few values: under these tools a kernel takes up to a hundred times as long.
_FEW = (
    "TestBadInput or 9-520 or 13-5120 or 11-33 or TestActivations or TestRope or TestDropout or TestAttention or 2048"
)
_FOUND = 9  # the exit status that the tools are asked for


def builder() -> ModuleType:
    """csrc/build.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("pyckpt_csrc_build", common.ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def build(seconds: float) -> dict[str, Any]:
    """Build the extension in place, for the current device: `built`, and `reason` if it was not."""
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        return {"built": False, "reason": NO_NVCC}
    arch = ".".join(map(str, torch.cuda.get_device_capability()))
    start = time.monotonic()
    command = [sys.executable, "csrc/build.py", "--arch", arch]
    try:
        done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"built": False, "reason": f"not built within {seconds:.0f} s"}
    said = {"seconds": time.monotonic() - start, "arch": arch}
    if done.returncode:
        return {"built": False, "reason": done.stderr[-2000:], **said}
    return {"built": True, **said}


def is_there() -> bool:
    """Whether an extension was built, now or before."""
    return importlib.util.find_spec("pyckpt._cuda") is not None


def sanitize(seconds: float) -> dict[str, Any]:
    """What each tool of compute-sanitizer says of the kernels' tests: "clean", or why not; {} where there is none."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {}
    # Memory of its own for every tensor, or the tool takes PyTorch's pool for one array.
    env = {**os.environ, "PYTHONPATH": str(common.ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    test = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider", TESTS, "-k", _FEW]
    found: dict[str, Any] = {}
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", str(_FOUND), "--target-processes", "all", *test]
        try:
            done = subprocess.run(
                command, cwd=common.ROOT, env=env, capture_output=True, text=True, timeout=seconds / len(TOOLS)
            )
        except subprocess.TimeoutExpired:
            found[tool] = f"not ended within {seconds / len(TOOLS):.0f} s"
            continue
        found[tool] = "clean" if done.returncode == 0 else f"exit status {done.returncode}: {done.stdout[-2000:]}"
    return found
