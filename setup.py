"""What pyproject.toml cannot say: where `pyckpt.triton_kernels` lies, and the optional CUDA extension."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD_RECORD = "_build.json"


def load_builder() -> ModuleType:
    """csrc/build.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("pyckpt_csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BUILDER = load_builder()


def cuda_extensions() -> tuple[list[Extension], str]:
    """The CUDA extensions to build, and the reason why there are none (or what is built).

    PYCKPT_BUILD_CUDA=0 builds none, 1 demands them: then something missing is an error. Unset, they are built
    where nvcc and PyTorch's headers are found, and never stand in an install's way.
    """
    wanted = os.environ.get("PYCKPT_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"PYCKPT_BUILD_CUDA is {wanted!r}; expected 0, 1 or unset")
    if wanted == "0":
        return [], "forbidden: PYCKPT_BUILD_CUDA=0 was set when pyckpt was installed"
    if missing := BUILDER.missing():
        if wanted == "1":
            raise RuntimeError(f"PYCKPT_BUILD_CUDA=1, but {missing}; or unset it to install without the extension")
        return [], missing
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.c*"))
    architectures = ", ".join(map(str, BUILDER.architectures()))
    return [Extension(BUILDER.MODULE, sources, py_limited_api=True)], f"for {architectures}"


EXTENSIONS, REASON = cuda_extensions()


def write_record(folder: Path, names: list[str], reason: str) -> None:
    """Say in `folder` which extensions there are and why, for `pyckpt doctor` to show."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{BUILD_RECORD}.tmp"
    temporary.write_text(json.dumps({"cuda_extensions": names, "reason": reason}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / BUILD_RECORD)


class BuildPy(build_py):
    """Records why the CUDA extension is or is not there."""

    def run(self) -> None:
        super().run()
        folder = ROOT / "pyckpt" if self.editable_mode else Path(self.build_lib) / "pyckpt"
        write_record(folder, [extension.name for extension in EXTENSIONS], REASON)


class BuildExt(build_ext):
    """Builds by csrc/build.py. What was not demanded and does not compile is left out, and the record says so."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            BUILDER.build(library.parent, Path(self.build_temp), say=lambda text: print(text, flush=True))
        except BUILDER.BuildError as error:
            if os.environ.get("PYCKPT_BUILD_CUDA") == "1":
                raise
            print(f"pyckpt: installing without the CUDA extension: {error}", file=sys.stderr)
            folder = ROOT / "pyckpt" if self.editable_mode else library.parent
            first_line = str(error).splitlines()[0]
            write_record(folder, [], f"its build failed; PYCKPT_BUILD_CUDA=1 shows why ({first_line[:200]})")
            ext.optional = True  # or the missing file would be an error of its own


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
        "pyckpt.ops": ["*.json"],
        "pyckpt.triton_kernels": ["*.json"],
        "pyckpt.triton_kernels.fused": ["*.json"],
    },
    ext_modules=EXTENSIONS,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
