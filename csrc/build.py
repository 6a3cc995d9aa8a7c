"""Builds the CUDA extension, or the CPU kernels.

    python csrc/build.py [FOLDER] [--arch "9.0"] [--jobs 2] [--werror] [--emulated]
    python csrc/build.py [FOLDER] --cpu [--machine aarch64] [--jobs 2] [--werror]

Without a folder they are built in place, as pyckpt/_cuda.abi3.so and pyckpt/_cpu.abi3.so. setup.py calls `build` and
`build_cpu`. Imports nothing but the standard library.

- CUDA: nvcc for each csrc/*.cu, the host compiler for the bindings, one link. Needs no GPU and no CUDA build of
  PyTorch: the bindings see PyTorch's stable ABI alone, and the library is linked to what every build of PyTorch has.
- CPU: the host compiler, csrc/cpu/kernels.cpp once for each instruction set. Needs nothing of PyTorch: it is called
  through ctypes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

CSRC = Path(__file__).resolve().parent
MODULE = "pyckpt._cuda"
FILE = "_cuda.abi3.so"
CPU_MODULE = "pyckpt._cpu"
CPU_FILE = "_cpu.abi3.so"
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
# The names that PyTorch's TORCH_CUDA_ARCH_LIST knows, of chips that these kernels run on.
_NAMED = {
    "turing": "7.5+PTX",
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;10.3;12.0;12.1+PTX",
}
# The oldest Python and PyTorch that the binary serves: 3.10, and the stable ABI of 2.11.
_PYTHON = "0x030a0000"
_TORCH = "0x020b000000000000"
_WARNINGS = ("-Wall", "-Wextra")
# By platform.machine(): each instruction set's name, floats of a vector, vector registers, and the compiler's options.
_X86_512 = ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq")
_X86 = ("-mavx2", "-mfma", "-mf16c")
_INSTRUCTION_SETS = {
    "x86_64": (("avx512", 16, 32, (*_X86_512, *_X86)), ("avx2", 8, 16, _X86)),
    "aarch64": (("neon", 4, 32, ()),),
}


class BuildError(RuntimeError):
    """The extension cannot be built; the message says what is missing or which command failed."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A compute capability, as in TORCH_CUDA_ARCH_LIST: 9.0, 9.0a, or 10.0+PTX."""

    number: str
    ptx: bool

    @classmethod
    def parse(cls, text: str) -> Architecture:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", text)
        if found is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has {text!r}; expected capabilities such as 8.0;9.0;10.0+PTX")
        major, minor, suffix, ptx = found.groups()
        return cls(major + minor + suffix, bool(ptx))

    def flags(self) -> list[str]:
        kinds = [f"sm_{self.number}", *([f"compute_{self.number}"] if self.ptx else [])]
        return [f"-gencode=arch=compute_{self.number},code={kind}" for kind in kinds]

    def __str__(self) -> str:
        return f"sm_{self.number}" + ("+PTX" if self.ptx else "")


def architectures(text: str | None = None) -> list[Architecture]:
    """Those of `text`, else of TORCH_CUDA_ARCH_LIST, else the default ones, as far as there is an nvcc that knows them.

    Raises BuildError for others.
    """
    text = text or os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    return _parsed(text) if text else _known(_parsed(DEFAULT_ARCHITECTURES))


def _parsed(text: str) -> list[Architecture]:
    split = re.compile(r"[;,\s]+").split
    parts = [part for name in split(text) if name for part in split(_NAMED.get(name.lower(), name))]
    return [Architecture.parse(part) for part in dict.fromkeys(parts)]


def _known(wanted: list[Architecture]) -> list[Architecture]:
    """Those that nvcc knows, the newest of them with PTX for what comes after; all where it does not say."""
    nvcc = find_nvcc()
    said = _output([nvcc, "--list-gpu-arch"]) if nvcc else ""
    known = [a for a in wanted if f"compute_{a.number}" in said.split()]
    return [*known[:-1], dataclasses.replace(known[-1], ptx=True)] if known else wanted


def find_nvcc() -> str | None:
    """The CUDA compiler: $CUDA_HOME/bin/nvcc if that is set and there, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None) or shutil.which("nvcc")


def missing() -> str | None:
    """What a build needs and is not here, in words, or None."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "this Python is free-threaded, and has no limited API to build for"
    if find_nvcc() is None:
        return "there is no nvcc on PATH or in $CUDA_HOME/bin: install the CUDA toolkit"
    if importlib.util.find_spec("torch") is None:
        return "PyTorch's headers are not to be seen: install torch first, and use pip install --no-build-isolation"
    return None


def build(
    out: Path,
    temporary: Path,
    *,
    arch: str | None = None,
    jobs: int | None = None,
    werror: bool = False,
    emulated: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Build `out` / _cuda.abi3.so, with objects and the compilers' output (*.log) in `temporary`.

    `jobs` compilers run at once: MAX_JOBS, else the number of cores. Emulated, the kernels run on CPU tensors, for
    tests: by the host compiler, from the toolkit's headers alone. Raises BuildError.
    """
    if reason := missing():
        raise BuildError(reason)
    wanted = architectures(arch)
    commands = _emulated_commands(temporary) if emulated else _compile_commands(temporary, wanted, werror)
    what = "a CPU" if emulated else ", ".join(map(str, wanted))
    link = _link_command([target for target, _ in commands], temporary / f"{FILE}.tmp", emulated)
    return _compile_and_link(commands, link, out / FILE, temporary, f"{MODULE} for {what}", jobs, say)


def missing_cpu(machine: str | None = None) -> str | None:
    """What a build of the CPU kernels needs and is not here, in words, or None."""
    machine = machine or platform.machine()
    if machine not in _INSTRUCTION_SETS:
        return f"the processor is a {machine}, and there are kernels for {', '.join(_INSTRUCTION_SETS)}"
    try:
        _host_compiler()
    except BuildError as error:
        return str(error)
    return None


def build_cpu(
    out: Path,
    temporary: Path,
    *,
    machine: str | None = None,
    jobs: int | None = None,
    werror: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Build `out` / _cpu.abi3.so: the CPU kernels for every instruction set of this kind of processor. As `build`.

    `machine`: another kind, for which CXX then has to compile.
    """
    machine = machine or platform.machine()
    if reason := missing_cpu(machine):
        raise BuildError(reason)
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *_WARNINGS, *(["-Werror"] if werror else [])]
    # A product and a sum as one instruction; and none of -ffast-math, which takes it that there is no NaN.
    flags += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    compiler, sets = _host_compiler(), _INSTRUCTION_SETS[machine]
    commands = []
    for name, lanes, registers, options in sets:
        target = temporary / f"kernels_{name}.o"
        named = [f"-DPYCKPT_ISA={name}", f"-DPYCKPT_LANES={lanes}", f"-DPYCKPT_REGISTERS={registers}"]
        source = str(CSRC / "cpu" / "kernels.cpp")
        commands.append((target, [*compiler, *flags, *options, *named, "-c", source, "-o", str(target)]))
    target = temporary / "library.o"
    commands.append((target, [*compiler, *flags, "-c", str(CSRC / "cpu" / "library.cpp"), "-o", str(target)]))
    objects = [str(target) for target, _ in commands]
    link = [*compiler, "-shared", "-pthread", *objects, "-o", str(temporary / f"{CPU_FILE}.tmp")]
    what = f"{CPU_MODULE} for {', '.join(name for name, *_ in sets)}"
    return _compile_and_link(commands, link, out / CPU_FILE, temporary, what, jobs, say)


def _compile_and_link(
    commands: list[tuple[Path, list[str]]],
    link: list[str],
    library: Path,
    temporary: Path,
    what: str,
    jobs: int | None,
    say: Callable[[str], None],
) -> Path:
    """Run the commands, MAX_JOBS at a time, and the link, which writes a .tmp; move that to `library`."""
    for folder in (library.parent, temporary):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(temporary, say):
        return _compiled(commands, link, library, temporary, what, jobs or _jobs(), say)


def _compiled(
    commands: list[tuple[Path, list[str]]],
    link: list[str],
    library: Path,
    temporary: Path,
    what: str,
    jobs: int,
    say: Callable[[str], None],
) -> Path:
    say(f"building {what}: {len(commands)} files, {jobs} at a time")
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(_run, command, target.with_suffix(".log")): target for target, command in commands}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(running), 1):
                future.result()
                said = f"[{done}/{len(commands)}] {running[future].stem}, {time.monotonic() - start:.0f} s"
                say(said)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _run(link, temporary / "link.log")
    # Copied beside it and renamed: a process that has the old one loaded keeps it, and none sees half of one.
    aside = library.with_suffix(f".{os.getpid()}.tmp")
    shutil.move(temporary / f"{library.name}.tmp", aside)
    os.replace(aside, library)
    say(f"built {library} in {time.monotonic() - start:.0f} s")
    return library


def kernels(log: str) -> list[dict[str, str | int]]:
    """What ptxas says of each kernel in an nvcc log: (mangled) name, arch, registers, bytes of stack, of spills, and of
    static shared memory."""
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
    )
    return [
        {
            "name": m[0],
            "arch": m[1],
            "stack": int(m[2]),
            "spilled": int(m[3]) + int(m[4]),
            "registers": int(m[5]),
            "shared": int(m[6] or 0),
        }
        for m in re.findall(pattern, log, re.DOTALL)
    ]


def _compile_commands(temporary: Path, wanted: Sequence[Architecture], werror: bool) -> list[tuple[Path, list[str]]]:
    nvcc = find_nvcc() or "nvcc"
    host = ["-fPIC", "-fvisibility=hidden", *_WARNINGS, *(["-Werror"] if werror else [])]
    cuda = [nvcc, "-std=c++17", "-O3", "-c", "-Xptxas=-v", *(["-Werror=all-warnings"] if werror else [])]
    cuda += [f"-Xcompiler={','.join(host)}", *(flag for a in wanted for flag in a.flags())]
    # The longest first, so that none is left alone at the end.
    sources = sorted(CSRC.glob("*.cu"), key=lambda path: -path.stat().st_size)
    commands = [(temporary / f"{s.stem}.o", [*cuda, str(s), "-o", str(temporary / f"{s.stem}.o")]) for s in sources]
    return [*commands, _bindings_command(temporary, " ".join(map(str, wanted)), host)]


def _emulated_commands(temporary: Path) -> list[tuple[Path, list[str]]]:
    flags = ["-DPYCKPT_EMULATED", "-fPIC", "-fvisibility=hidden", *_WARNINGS, "-Werror", "-Wno-unknown-pragmas"]
    command = [*_host_compiler(), "-std=c++17", "-O1", "-ffp-contract=off", "-c", *flags]
    command += [f"-I{CSRC}", f"-isystem{_cuda_include(find_nvcc() or 'nvcc')}"]
    sources = [*sorted(CSRC.glob("*.cu"), key=lambda path: -path.stat().st_size), CSRC / "emulator.cpp"]
    targets = [temporary / f"{s.stem}.o" for s in sources]
    commands = [(t, [*command, "-xc++", str(s), "-o", str(t)]) for s, t in zip(sources, targets, strict=True)]
    return [*commands, _bindings_command(temporary, "emulated", flags)]


def _bindings_command(temporary: Path, built_for: str, flags: list[str]) -> tuple[Path, list[str]]:
    includes = [CSRC, _cuda_include(find_nvcc() or "nvcc"), *_torch_includes(), Path(sysconfig.get_path("include"))]
    defines = {
        "USE_CUDA": None,
        "TORCH_TARGET_VERSION": _TORCH,
        "Py_LIMITED_API": _PYTHON,
        "PYCKPT_ARCHITECTURES": f'"{built_for}"',
    }
    target = temporary / "bindings.o"
    command = [*_host_compiler(), "-std=c++17", "-O2", "-c", *flags]
    command += [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in defines.items()]
    # Not ours to mend: what other people's headers are warned of.
    command += [f"-isystem{path}" if path != CSRC else f"-I{path}" for path in includes]
    return target, [*command, str(CSRC / "bindings.cpp"), "-o", str(target)]


def _link_command(objects: list[Path], library: Path, emulated: bool) -> list[str]:
    # libtorch.so is in every build of PyTorch, and brings libtorch_cuda.so where there is one. The CUDA runtime is
    # linked in, so that the toolkit need not be the one PyTorch was built with.
    torch = _torch_folder() / "lib"
    libraries = [f"-L{torch}", "-Xlinker", f"-rpath-link={torch}", "-Xlinker", "--no-as-needed"]
    libraries += ["-ltorch", "-ltorch_cpu"]
    linker = _host_compiler() if emulated else [find_nvcc() or "nvcc"]
    command = [*linker, "-shared", "-Xlinker", "-s", *([] if emulated else ["-cudart=static"])]
    return [*command, *map(str, objects), *libraries, "-o", str(library)]


def _run(command: list[str], log: Path) -> None:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{shlex.join(command)}\ncannot be run: {error}") from error
    log.write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\nfailed:\n{done.stdout}")


def _output(command: list[str]) -> str:
    """What it prints; nothing where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace").stdout
    except OSError:
        return ""


def _host_compiler() -> list[str]:
    """The command and its first arguments: CXX may be "ccache g++"."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    if not wanted:
        wanted = list(filter(shutil.which, ("g++", "c++", "clang++")))[:1]
    if not wanted:
        raise BuildError("there is no C++ compiler: set CXX, or install g++")
    return wanted


def _jobs() -> int:
    """How many compilers run at once: MAX_JOBS, else the number of cores."""
    given = os.environ.get("MAX_JOBS", "").strip()
    if not given:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not given.isdecimal() or int(given) < 1:
        raise BuildError(f"MAX_JOBS is {given!r}; expected a number of compilers to run at once, 1 or more")
    return int(given)


@contextlib.contextmanager
def _alone_in(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other build has its objects in this folder, where the system and the file system have locks."""
    with open(folder / ".lock", "w") as lock:
        with contextlib.suppress(ImportError, OSError):  # Windows; Lustre and NFS as many clusters mount them
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another build in {folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(missing() or "torch has no folder")
    return Path(spec.origin).parent


def _torch_includes() -> list[Path]:
    include = _torch_folder() / "include"
    return [include, include / "torch" / "csrc" / "api" / "include"]


def _cuda_include(nvcc: str) -> Path:
    """The toolkit's headers, as nvcc itself finds them."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r'INCLUDES="?-I([^"\s]+)', said)
    folder = Path(found.group(1)) if found else Path(nvcc).resolve().parent.parent / "include"
    if not (folder / "cuda_runtime_api.h").is_file():
        raise BuildError(f"{nvcc} is there, but not its headers: no cuda_runtime_api.h in {folder}")
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="for library, objects and logs; default: in place")
    parser.add_argument("--arch", help="instead of TORCH_CUDA_ARCH_LIST")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--werror", action="store_true", help="warnings are errors")
    parser.add_argument("--emulated", action="store_true", help="for tests: kernels that run on CPU tensors")
    parser.add_argument("--cpu", action="store_true", help="the CPU kernels instead")
    parser.add_argument("--machine", help="with --cpu and CXX: another kind of processor, such as aarch64")
    options = parser.parse_args(argv)
    if options.machine and not options.cpu:
        parser.error("--machine is of the CPU kernels: give --cpu too")
    if options.cpu and (options.arch or options.emulated):
        parser.error("--arch and --emulated are of the CUDA extension; --cpu builds for every instruction set")
    out = options.folder or CSRC.parent / "pyckpt"
    temporary = options.folder or CSRC.parent / "build" / ("cpu" if options.cpu else "csrc")
    how = {"jobs": options.jobs, "werror": options.werror}
    try:
        if options.cpu:
            build_cpu(out, temporary, machine=options.machine, **how)
        else:
            build(out, temporary, arch=options.arch, emulated=options.emulated, **how)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
