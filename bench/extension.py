"""The CUDA C++ extension on a machine with a GPU: built for that GPU, and its tests under compute-sanitizer.

And how `make gpu` starts and ends a process: in a session of its own, so that all it started ends with it, and with a
limit to every wait, as a process that is stuck in the driver does not end when it is killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import common

TESTS = "tests/test_cuda_kernels.py"
ON_THE_DEVICE = f"{TESTS}::TestOnTheDevice", f"{TESTS}::TestBlock"  # what only a GPU shows, and what none has confirmed
NO_NVCC = "no nvcc"
TOOLS = ("memcheck", "racecheck")
# Every kernel with few values: under these tools a kernel takes up to a hundred times as long.
_FEW = (
    "TestBadInput or 9-520 or 13-5120 or 11-33 or TestActivations or TestRope or TestDropout or TestAttention or 2048"
)
_FOUND = 9  # the exit status that the tools are asked for
PATIENCE = 5.0  # seconds for a killed process to end


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
    status, _, errors = run(command, seconds)
    said = {"seconds": time.monotonic() - start, "arch": arch}
    if status is None:
        return {"built": False, "reason": f"not built within {seconds:.0f} s", **said}
    if status:
        return {"built": False, "reason": errors[-2000:] or f"exit status {status}", **said}
    return {"built": True, **said}


def is_there() -> bool:
    """Whether an extension was built, now or before."""
    return importlib.util.find_spec("pyckpt._cuda") is not None


def environment() -> dict[str, str]:
    """For pytest: the source tree first, and no plugins but ours, since others take seconds to import."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYCKPT_BACKEND", "TRITON_INTERPRET")}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))}


def sanitizer() -> str | None:
    """compute-sanitizer, on PATH or in the toolkit that `build` takes."""
    name, home = "compute-sanitizer", os.environ.get("CUDA_HOME")
    return shutil.which(name) or (shutil.which(name, path=f"{home}/bin") if home else None)


def sanitize(seconds: float) -> dict[str, Any]:
    """What each tool of compute-sanitizer says of the kernels' tests: "clean", or why not; {} where there is none."""
    program = sanitizer()
    if program is None:
        return {}
    # Memory of its own for every tensor, or the tool takes PyTorch's pool for one array.
    env = environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    test = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider", TESTS, "-k", _FEW]
    found: dict[str, Any] = {}
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", str(_FOUND), "--target-processes", "all", *test]
        status, said, _ = run(command, seconds / len(TOOLS), env)
        if status is None:
            found[tool] = f"not ended within {seconds / len(TOOLS):.0f} s" + (f": {said[-2000:]}" if said else "")
        else:
            found[tool] = "clean" if status == 0 else f"exit status {status}: {said[-2000:]}"
    return found


# --- processes that end, with all that they started ---------------------------------------------------------


class StoppedError(RuntimeError):
    """Nothing more is started: this script is ending."""


_running: set[subprocess.Popen[bytes]] = set()
_lock = threading.RLock()
_stopped = threading.Event()


def start(
    command: list[str], env: dict[str, str] | None = None, cwd: Path | None = None, **files: Any
) -> subprocess.Popen[bytes]:
    """A process in a session of its own, for `end`."""
    with _lock:
        if _stopped.is_set():
            raise StoppedError("this script is ending")
        process = subprocess.Popen(command, cwd=cwd or common.ROOT, env=env, start_new_session=True, **files)
        _running.add(process)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and all that it started, which may still be there when it has ended; wait no longer than `PATIENCE`."""
    _kill(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with _lock:
        _running.discard(process)


def end_all() -> None:
    """End every process, and start no more until `begin`."""
    with _lock:
        _stopped.set()
        processes = list(_running)
    for process in processes:
        _kill(process)
    until = time.monotonic() + PATIENCE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))


def begin() -> None:
    """Processes may be started (again)."""
    _stopped.clear()


def run(command: list[str], seconds: float, env: dict[str, str] | None = None) -> tuple[int | None, str, str]:
    """Exit status (None: it took longer than that and was ended), output and errors.

    By files, as what outlives the process would keep a pipe open.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = start(command, env, stdout=out, stderr=errors)
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(max(0.0, seconds))
        finally:
            end(process)
        said = []
        for file in (out, errors):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
    return status, said[0], said[1]


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
