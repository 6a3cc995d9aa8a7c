"""What pyproject.toml cannot say: where `pyckpt.triton_kernels` lies, and the optional CUDA extension."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD_RECORD = "_build.json"


def find_nvcc() -> str | None:
    """The CUDA compiler: $CUDA_HOME/bin/nvcc if that is set and there, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None) or shutil.which("nvcc")


def cuda_extensions() -> tuple[list[Extension], str]:
    """The CUDA extensions to build, and the reason why there are none (or what is built).

    PYCKPT_BUILD_CUDA=1 builds, and then a missing compiler is an error. Unset or 0 builds nothing, so that a
    plain install never depends on a compiler.
    """
    wanted = os.environ.get("PYCKPT_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"PYCKPT_BUILD_CUDA is {wanted!r}; expected 0, 1 or unset")
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cu"))
    if not sources:
        return [], "this version has no CUDA C++ sources (csrc/*.cu)"
    if wanted != "1":
        return [], "not asked for: PYCKPT_BUILD_CUDA=1 was not set when pyckpt was installed"
    if find_nvcc() is None:
        raise RuntimeError(
            "PYCKPT_BUILD_CUDA=1 but there is no nvcc on PATH or in $CUDA_HOME/bin: "
            "install the CUDA toolkit, or unset PYCKPT_BUILD_CUDA to install without the extension"
        )
    raise RuntimeError(f"csrc/ has {len(sources)} CUDA sources, and setup.py has no build for them yet")


EXTENSIONS, REASON = cuda_extensions()


class BuildPy(build_py):
    """Records why the CUDA extension is or is not there, for `pyckpt doctor` to show."""

    def run(self) -> None:
        super().run()
        folder = ROOT / "pyckpt" if self.editable_mode else Path(self.build_lib) / "pyckpt"
        folder.mkdir(parents=True, exist_ok=True)
        record = {"cuda_extensions": [extension.name for extension in EXTENSIONS], "reason": REASON}
        temporary = folder / f"{BUILD_RECORD}.tmp"
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / BUILD_RECORD)


setup(
    packages=[
        *find_packages(include=["pyckpt", "pyckpt.*"]),
        "pyckpt.triton_kernels",
        *(f"pyckpt.triton_kernels.{name}" for name in find_packages("triton_kernels")),
    ],
    # The import name `triton_kernels` is the Triton project's, so the folder is installed below pyckpt.
    package_dir={"pyckpt": "pyckpt", "pyckpt.triton_kernels": "triton_kernels"},
    package_data={
        "pyckpt": ["py.typed"],
        "pyckpt.triton_kernels": ["*.json"],
        "pyckpt.triton_kernels.fused": ["*.json"],
    },
    ext_modules=EXTENSIONS,
    cmdclass={"build_py": BuildPy},
)
