"""Makes `pyckpt.triton_kernels` importable when pyckpt runs from its source tree without being installed.

The folder `triton_kernels/` lies beside `pyckpt/` and becomes a package below it only when it is installed.
A finder in `sys.meta_path` does the same for a bare source tree.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_NAME = "pyckpt.triton_kernels"
_PACKAGE = Path(__file__).resolve().parent


class _SourceTreeFinder(MetaPathFinder):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _NAME:
            return None
        return spec_from_file_location(
            fullname, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)]
        )


def source_root() -> Path | None:
    """The repository's root if this copy of pyckpt lies in one, else None (installed from a wheel)."""
    root = _PACKAGE.parent
    if (_PACKAGE / "triton_kernels").is_dir():
        return None
    # In site-packages a `triton_kernels` is the Triton project's; pyproject.toml tells a repository apart.
    marks = (root / "pyproject.toml", root / "triton_kernels" / "__init__.py")
    return root if all(mark.is_file() for mark in marks) else None


def install() -> None:
    """Add the finder, once, if this is a source tree."""
    root = source_root()
    if root is not None and not any(isinstance(finder, _SourceTreeFinder) for finder in sys.meta_path):
        # First, or the kernels of another tree that is installed editable would serve this one.
        sys.meta_path.insert(0, _SourceTreeFinder(root / "triton_kernels"))


install()
