"""How many instructions a compiled CUDA kernel has: read from its machine code, without a GPU.

Needs cuobjdump, which the CUDA toolkit has, and Triton's wheels for Linux.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path


def disassembler() -> str | None:
    """The path of cuobjdump, or None."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    ours = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(ours) if ours.exists() else None


def instructions(program: str, compiled: Path, arch: str) -> dict[str, tuple[int, int]]:
    """By kernel (its mangled name): all of them, and those of its longest loop.

    What a thread executes of them may be less: branches for other arguments are counted too.
    """
    command = [program, "-sass", "-arch", arch, str(compiled)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions = re.split(r"\n\s*Function : ", text)[1:]
    return {function.split("\n", 1)[0].strip(): _counted(function) for function in functions}


def _counted(function: str) -> tuple[int, int]:
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", function)]
    places = [place for place, words in code if not words.startswith("NOP")]
    jumps = ((place, re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", words)) for place, words in code)
    loops = [(int(found[1], 16), place) for place, found in jumps if found and int(found[1], 16) < place]
    return len(places), max((sum(a <= place <= b for place in places) for a, b in loops), default=0)
