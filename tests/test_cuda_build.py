"""How setup.py and csrc/build.py build where a Python or a system is unlike others; nothing is compiled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A Python without a GIL, as setuptools and csrc/build.py see it.
FREE_THREADED = """
import importlib.machinery, sys, sysconfig
was = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: 1 if name == "Py_GIL_DISABLED" else was(name)
suffixes = importlib.machinery.EXTENSION_SUFFIXES
suffixes[:] = [suffix for suffix in suffixes if "abi3" not in suffix]
"""


class TestFreeThreaded:
    """There is no limited API, and the CPU kernels, which need no Python, are there."""

    @pytest.fixture
    def source_copy(self, tmp_path: Path) -> Path:
        copy = tmp_path / "source"
        for folder in ("csrc", "pyckpt", "triton_kernels"):
            shutil.copytree(
                ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
            )
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        return copy

    def run_setup(self, source: Path, *arguments: str) -> None:
        """With a compiler that leaves empty files."""
        compiler = source.parent / "compiler.sh"
        compiler.write_text('for last; do :; done; : > "$last"\n')
        code = f"{FREE_THREADED}sys.argv = ['setup.py', '-q', *sys.argv[1:]]\n"
        code += "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py'})"
        env = {**os.environ, "PYCKPT_BUILD_CUDA": "0", "PYCKPT_BUILD_CPU": "1", "CXX": f"sh {compiler}"}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_a_wheel(self, source_copy, tmp_path):
        self.run_setup(source_copy, "bdist_wheel", "-d", str(tmp_path))
        (built,) = tmp_path.glob("*.whl")
        assert "abi3" not in built.name and "none-any" not in built.name
        assert [n for n in zipfile.ZipFile(built).namelist() if n.endswith(".so")] == ["pyckpt/_cpu.abi3.so"]

    def test_in_place(self, source_copy):
        self.run_setup(source_copy, "build_ext", "--inplace")
        assert [path.name for path in (source_copy / "pyckpt").glob("*.so")] == ["_cpu.abi3.so"]

    def test_the_cuda_extension_says_so_at_once(self):
        done = subprocess.run(
            [sys.executable, "-c", f"{FREE_THREADED}import build; print(build.missing())"],
            cwd=ROOT / "csrc",
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith("this Python is free-threaded"), done.stderr


def test_what_newer_headers_alone_have_has_another_meaning_with_older_ones():
    """PyTorch 2.11's, which the binary is for, have none of these: the extension did not compile against them."""
    source = (ROOT / "csrc" / "bindings.cpp").read_text()
    newer = set(re.findall(r"\bSTABLE_TORCH_\w*CHECK\b", source))
    assert newer and newer == set(re.findall(r"#ifndef (\w+)\n#define \1\(", source))
