"""What pyproject.toml cannot say: where `pyckpt.triton_kernels` lies, the CPU kernels and the CUDA extension."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Callable
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


def wanted(variable: str) -> str:
    """Its value: 0 builds none, 1 demands, so that something missing is an error; unset, what can be built is."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable} is {value!r}; expected 0, 1 or unset")
    return value


def extensions(
    variable: str, missing: Callable[[], str | None], module: str, pattern: str, built_for: Callable[[], str]
) -> tuple[list[Extension], str]:
    """The extension to build, and the reason why there is none (or what is built). It never stands in an install's way
    unless it is demanded."""
    if wanted(variable) == "0":
        return [], f"forbidden: {variable}=0 was set when pyckpt was installed"
    if reason := missing():
        if wanted(variable) == "1":
            raise RuntimeError(f"{variable}=1, but {reason}; or unset it to install without the extension")
        return [], reason
    try:
        what = built_for()
    except BUILDER.BuildError as error:
        if wanted(variable) == "1":
            raise
        return [], str(error)
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))
    return [Extension(module, sources, py_limited_api=True)], what


def architectures() -> str:
    return f"for {', '.join(map(str, BUILDER.architectures()))}"


CUDA, CPU = "PYCKPT_BUILD_CUDA", "PYCKPT_BUILD_CPU"
EXTENSIONS, REASON = extensions(CUDA, BUILDER.missing, BUILDER.MODULE, "*.c*", architectures)
CPU_EXTENSIONS, CPU_REASON = extensions(
    CPU, BUILDER.missing_cpu, BUILDER.CPU_MODULE, "cpu/*.cpp", lambda: f"for {platform.machine()}"
)

RECORD = {
    "cuda_extensions": [extension.name for extension in EXTENSIONS],
    "reason": REASON,
    "cpu_extensions": [extension.name for extension in CPU_EXTENSIONS],
    "cpu_reason": CPU_REASON,
}


def write_record(folder: Path) -> None:
    """Say in `folder` which extensions there are and why, for `pyckpt doctor` to show."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{BUILD_RECORD}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(RECORD, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / BUILD_RECORD)


def told(error: Exception) -> str:
    """The line of a failed build that says why: the first of an error, else the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines[1:] if "error" in line.lower()), lines[-1])[:200]


class BuildPy(build_py):
    """Records why the extensions are or are not there."""

    def run(self) -> None:
        super().run()
        folder = ROOT / "pyckpt" if self.editable_mode else Path(self.build_lib) / "pyckpt"
        write_record(folder)


class BuildExt(build_ext):
    """Builds by csrc/build.py. What was not demanded and does not compile is left out, and the record says so."""

    def get_ext_filename(self, fullname: str) -> str:
        """As csrc/build.py names it, also for a Python that has no such suffix: the CPU kernels are not imported."""
        return f"{os.path.join(*fullname.split('.'))}.abi3.so"

    def build_extension(self, ext: Extension) -> None:
        is_cpu = ext.name == BUILDER.CPU_MODULE
        build, variable = (BUILDER.build_cpu, CPU) if is_cpu else (BUILDER.build, CUDA)
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            build(library.parent, Path(self.build_temp) / ext.name, say=lambda text: print(text, flush=True))
        except BUILDER.BuildError as error:
            if wanted(variable) == "1":
                raise
            print(f"pyckpt: installing without {ext.name}: {error}", file=sys.stderr)
            names, reason = ("cpu_extensions", "cpu_reason") if is_cpu else ("cuda_extensions", "reason")
            RECORD[names] = []
            RECORD[reason] = f"its build failed; {variable}=1 shows why ({told(error)})"
            write_record(ROOT / "pyckpt" if self.editable_mode else library.parent)
            ext.optional = True  # or the missing file would be an error of its own


# A Python without a GIL refuses the tag.
ABI3 = bool(EXTENSIONS or CPU_EXTENSIONS) and not sysconfig.get_config_var("Py_GIL_DISABLED")

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
    ext_modules=[*EXTENSIONS, *CPU_EXTENSIONS],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
