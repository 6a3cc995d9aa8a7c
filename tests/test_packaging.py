"""The wheel holds what it must, versions agree, and the doctor's report can be read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import pyckpt
from pyckpt import doctor
from pyckpt._version import __version__
from pyckpt.ops import cuda_backend, registry

# The tests of one wheel go to one test process, so that it is built once.
pytestmark = pytest.mark.xdist_group("packaging")

ROOT = Path(__file__).resolve().parent.parent
BUILD_INPUTS = (
    "LICENSE",
    "README.md",
    "csrc",
    "pyckpt",
    "pyproject.toml",
    "setup.py",
    "triton_kernels",
)


def run_python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with the variables in `env` added, "" meaning unset."""
    merged = {name: value for name, value in {**os.environ, **env}.items() if value}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=merged, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a build reads, without what earlier builds and runs left among them."""
    copy = tmp_path_factory.mktemp("source")
    left_behind = shutil.ignore_patterns("__pycache__", "_build.json", "*.so")
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=left_behind)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    built = run_python(
        *("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)),
        str(source_copy),
        cwd=source_copy,
        PYCKPT_BUILD_CUDA="0",
        PYCKPT_BUILD_CPU="0",
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_nothing_else_of_the_repository(wheel: Path) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pyckpt").rglob("*.py")}
    expected |= {f"pyckpt/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("triton_kernels/**/*.py")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "pyckpt/ops/measured.json" in names
    assert "pyckpt/triton_kernels/__init__.py" in names
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"pyckpt"}
    assert "pyckpt/py.typed" in names


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    unconditional = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert [re.split(r"[: <>=;]+", line)[1] for line in unconditional] == ["torch", "triton"]
    assert {"train", "hf", "bench", "dev"} == set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE))


def test_wheel_records_why_there_is_no_extension(wheel: Path) -> None:
    record = json.loads(zipfile.ZipFile(wheel).read("pyckpt/_build.json"))
    assert record == {
        "cuda_extensions": [],
        "reason": "forbidden: PYCKPT_BUILD_CUDA=0 was set when pyckpt was installed",
        "cpu_extensions": [],
        "cpu_reason": "forbidden: PYCKPT_BUILD_CPU=0 was set when pyckpt was installed",
    }
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.slow
def test_a_wheel_with_cpu_kernels_needs_no_pytorch_to_be_built(source_copy: Path, tmp_path: Path) -> None:
    """In a Python where PyTorch is not to be seen, as in pip's isolated builds; and it serves any later Python."""
    hidden = "import sys; sys.modules['torch'] = None\n"
    code = hidden + "sys.argv = ['setup.py', '-q', 'bdist_wheel', '-d', sys.argv[1]]\n"
    code += (
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': '__main__'})"
    )
    done = run_python("-c", code, str(tmp_path), cwd=source_copy, PYCKPT_BUILD_CUDA="0", PYCKPT_BUILD_CPU="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-linux_" in built.name
    archive = zipfile.ZipFile(built)
    assert "pyckpt/_cpu.abi3.so" in archive.namelist()
    record = json.loads(archive.read("pyckpt/_build.json"))
    assert record["cpu_extensions"] == ["pyckpt._cpu"] and record["cpu_reason"].startswith("for ")
    archive.extractall(tmp_path / "unpacked")
    code = (
        "import pyckpt; from pyckpt.ops.cpu_library import library as l; print(l.path); assert not l.problem, l.problem"
    )
    done = run_python("-c", code, cwd=tmp_path / "unpacked", PYTHONPATH=str(tmp_path / "unpacked"))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_cpu_kernels_that_do_not_compile_are_left_out_with_the_reason(source_copy: Path, tmp_path: Path) -> None:
    """Unless they are demanded."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no such processor; exit 1\n")
    compiler.chmod(0o755)
    command = ("setup.py", "-q", "bdist_wheel", "-d", str(tmp_path))
    for demanded in ("1", ""):
        env = {"PYCKPT_BUILD_CUDA": "0", "PYCKPT_BUILD_CPU": demanded, "CXX": str(compiler)}
        done = run_python(*command, "-b", str(tmp_path / f"build{demanded}"), cwd=source_copy, **env)
        assert (done.returncode != 0) == (demanded == "1"), done.stdout + done.stderr
        assert "no such processor" in done.stderr
    (built,) = tmp_path.glob("*.whl")
    record = json.loads(zipfile.ZipFile(built).read("pyckpt/_build.json"))
    assert record["cpu_extensions"] == []
    assert record["cpu_reason"] == "its build failed; PYCKPT_BUILD_CPU=1 shows why (no such processor)"


def test_unpacked_wheel_imports_its_kernels_package(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # The Triton project's package of that name, as it would lie beside pyckpt in site-packages.
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "__init__.py").write_text("raise ImportError('the other triton_kernels')\n")
    done = run_python(
        *("-c", "import pyckpt, pyckpt.triton_kernels as t; print(pyckpt.__file__); print(t.__file__)"),
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert [Path(line).relative_to(tmp_path).as_posix() for line in done.stdout.split()] == [
        "pyckpt/__init__.py",
        "pyckpt/triton_kernels/__init__.py",
    ]


def test_bare_source_tree_imports_its_kernels_package(source_copy: Path, tmp_path: Path) -> None:
    done = run_python(
        "-c",
        "import pyckpt.triton_kernels as t; print(t.__file__)",
        cwd=tmp_path,
        PYTHONPATH=str(source_copy),
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == source_copy.resolve() / "triton_kernels" / "__init__.py"


@pytest.mark.parametrize("variable", ["PYCKPT_BUILD_CUDA", "PYCKPT_BUILD_CPU"])
@pytest.mark.parametrize(("value", "expected"), [("0", 0), ("yes", 1)])
def test_build_variable_is_checked(source_copy: Path, variable: str, value: str, expected: int) -> None:
    env = {"PYCKPT_BUILD_CUDA": "0", "PYCKPT_BUILD_CPU": "0", variable: value}
    done = run_python("setup.py", "--version", cwd=source_copy, **env)
    assert (done.returncode != 0) == expected, done.stderr
    if expected:
        assert f"{variable} is 'yes'; expected 0, 1 or unset" in done.stderr


def nothing_on_path(tmp_path: Path) -> dict[str, str]:
    """Variables under which no compiler is found."""
    (tmp_path / "empty").mkdir()
    return {"PATH": str(tmp_path / "empty"), "CUDA_HOME": ""}


def test_without_compilers_there_is_no_extension_and_the_reason(source_copy: Path, tmp_path: Path) -> None:
    code = "import runpy, setuptools; setuptools.setup = lambda **k: print(k['ext_modules'])\n"
    code += "found = runpy.run_path('setup.py'); print(found['REASON'], found['CPU_REASON'], sep='\\n')"
    unset = {"PYCKPT_BUILD_CUDA": "", "PYCKPT_BUILD_CPU": "", "CXX": ""}
    done = run_python("-c", code, cwd=source_copy, **unset, **nothing_on_path(tmp_path))
    assert done.returncode == 0, done.stderr
    extensions, reason, cpu_reason = done.stdout.splitlines()
    assert extensions == "[]"
    assert reason == "there is no nvcc on PATH or in $CUDA_HOME/bin: install the CUDA toolkit"
    assert cpu_reason == "there is no C++ compiler: set CXX, or install g++"


def test_demanded_without_nvcc(source_copy: Path, tmp_path: Path) -> None:
    variables = {"PYCKPT_BUILD_CUDA": "1", **nothing_on_path(tmp_path)}
    done = run_python("setup.py", "--version", cwd=source_copy, **variables)
    assert done.returncode != 0
    assert "PYCKPT_BUILD_CUDA=1, but there is no nvcc on PATH" in done.stderr


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "sm_80, sm_90, sm_100+PTX"),
        ("9.0", "sm_90"),
        ("8.6 9.0a+PTX", "sm_86, sm_90a+PTX"),
        ("12.0;10.3f", "sm_120, sm_103f"),
        ("Hopper", "sm_90+PTX"),
        ("8.0;ampere;Ada", "sm_80, sm_86+PTX, sm_89+PTX"),
        ("Kepler", "TORCH_CUDA_ARCH_LIST has 'Kepler'; expected capabilities such as 8.0;9.0;10.0+PTX"),
        ("90", "TORCH_CUDA_ARCH_LIST has '90'"),
    ],
)
def test_architectures(value: str, expected: str) -> None:
    code = "import build; print(', '.join(map(str, build.architectures())))"
    done = run_python("-c", code, cwd=ROOT / "csrc", TORCH_CUDA_ARCH_LIST=value)
    assert expected in done.stdout + done.stderr
    assert done.returncode == expected.startswith("TORCH")


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_an_older_nvcc_builds_what_it_knows(tmp_path: Path) -> None:
    """And PTX of the newest, for the chips after it."""
    program(tmp_path / "bin" / "nvcc", "echo compute_80; echo compute_86; echo compute_90")
    code = "import build; print(', '.join(map(str, build.architectures())))"
    env = {"CUDA_HOME": str(tmp_path), "TORCH_CUDA_ARCH_LIST": ""}
    assert run_python("-c", code, cwd=ROOT / "csrc", **env).stdout.strip() == "sm_80, sm_90+PTX"
    done = run_python("-c", code, cwd=ROOT / "csrc", **{**env, "TORCH_CUDA_ARCH_LIST": "10.0"})
    assert done.stdout.strip() == "sm_100"  # what was asked for is not left out in silence


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "no-such-compiler -m64"}, "cannot be run: [Errno 2]"),
        ({"MAX_JOBS": "auto"}, "MAX_JOBS is 'auto'; expected a number of compilers"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS is '0'; expected a number of compilers"),
    ],
    ids=["CXX", "MAX_JOBS", "none"],
)
def test_settings_that_make_no_build_are_no_error_of_an_install(
    source_copy: Path, tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    command = ("setup.py", "-q", "bdist_wheel", "-d", str(tmp_path), "-b", str(tmp_path / "build"))
    env = {"PYCKPT_BUILD_CUDA": "0", "PYCKPT_BUILD_CPU": "", **variables}
    done = run_python(*command, cwd=source_copy, **env)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert reason in json.loads(zipfile.ZipFile(built).read("pyckpt/_build.json"))["cpu_reason"]
    done = run_python(*command, cwd=source_copy, **{**env, "PYCKPT_BUILD_CPU": "1"})
    assert done.returncode != 0 and reason in done.stderr


def test_an_architecture_that_is_none_is_no_error_of_an_install(source_copy: Path, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "nvcc", "")
    code = "import runpy, setuptools; setuptools.setup = lambda **k: None\n"
    code += "print(runpy.run_path('setup.py')['REASON'])"
    env = {"CUDA_HOME": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "Kepler", "PYCKPT_BUILD_CPU": "0"}
    done = run_python("-c", code, cwd=source_copy, **env, PYCKPT_BUILD_CUDA="")
    assert done.returncode == 0 and "TORCH_CUDA_ARCH_LIST has 'Kepler'" in done.stdout, done.stderr
    done = run_python("-c", code, cwd=source_copy, **env, PYCKPT_BUILD_CUDA="1")
    assert done.returncode != 0 and "TORCH_CUDA_ARCH_LIST has 'Kepler'" in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiler_may_be_a_command_with_arguments(tmp_path: Path) -> None:
    done = run_python("-c", "import build; print(build._host_compiler())", cwd=ROOT / "csrc", CXX="env g++")
    assert done.stdout.strip() == "['env', 'g++']"


def test_one_build_waits_for_another_in_the_same_folder(tmp_path: Path) -> None:
    code = (
        "import build, pathlib, sys, time\n"
        "with build._alone_in(pathlib.Path(sys.argv[1]), print):\n"
        "    print('in', flush=True); time.sleep(float(sys.argv[2])); print('out', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen([*command, "3"], cwd=ROOT / "csrc", stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "in\n"
        second = subprocess.run([*command, "0"], cwd=ROOT / "csrc", capture_output=True, text=True)
        assert second.stdout.splitlines() == [f"waiting for another build in {tmp_path}", "in", "out"]
        assert first.poll() is not None or first.stdout.readline() == "out\n"


def test_kernels_package_imports_nothing_of_pyckpt() -> None:
    for path in ROOT.glob("triton_kernels/**/*.py"):
        assert not re.search(r"^\s*(from|import) pyckpt\b", path.read_text(), re.MULTILINE), path


def test_versions_agree() -> None:
    assert pyckpt.__version__ == __version__
    try:
        installed = version("pyckpt")
    except PackageNotFoundError:
        pytest.skip("pyckpt is not installed here, only on the path")
    assert installed == __version__


def test_doctor_text_fits_and_names_every_op() -> None:
    text = doctor.main_text()
    assert text.endswith("\n")
    assert all(len(line) <= doctor.WIDTH for line in text.splitlines())
    words = set(re.findall(r"\w+", text))
    assert registry.IMPLEMENTATIONS
    assert words >= set(registry.IMPLEMENTATIONS)
    assert {__version__, "CUDA extension", "PYCKPT_BACKEND"} <= {
        part for _, rows in doctor.report() for name, value in rows for part in (name, value.split(",")[0])
    }


def test_doctor_agrees_with_the_registry() -> None:
    sections = dict(doctor.report())
    for device_type in ("cpu", "cuda"):
        expected = {name: ": ".join(registry.choose(name, device_type)) for name in registry.IMPLEMENTATIONS}
        assert dict(sections[f"Ops on {device_type}"]) == expected


def test_doctor_says_what_is_wrong_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCKPT_BACKEND", "no_such_backend")
    text = doctor.main_text()
    assert "none: PYCKPT_BACKEND='no_such_backend'" in text
    assert all(len(line) <= doctor.WIDTH for line in text.splitlines())


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, "not built: pyckpt was not installed"),
        ('{"cuda_extensions": [], "reason": "no compiler"}', "not built: no compiler"),
        ('{"cuda_extensions": ["pyckpt_no_such"], "reason": "sm_90a"}', "is not found; install pyckpt again"),
        ('{"cuda_extensions": ["json"], "reason": "sm_90a"}', "built: sm_90a; it does not load: no driver"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
    ],
)
def test_doctor_reads_the_build_record(
    record: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    monkeypatch.setattr(cuda_backend, "problem", "no driver")
    if record is not None:
        (tmp_path / "_build.json").write_text(record)
    assert said in dict(dict(doctor.report())["Settings"])["CUDA extension"]
